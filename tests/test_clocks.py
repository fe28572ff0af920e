"""Hosts whose clocks differ by minutes: jobs are neither doubled nor delayed, since the database's time counts."""

from __future__ import annotations

import importlib.util
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.place import PATIENCE_S, OpenPlace, Place, Step, assert_ended_once

pytestmark = pytest.mark.servers

LEASE_S = 8  # libfaketime slows a process down so much that a busy machine could cost it a shorter lease
OFFSETS_S = (300, -300)
SLOTS = 4  # of each worker
SHORT_WAITS = """
import worker

worker.LostMessages.overdue_s = 2.0
worker.JobStore.rescue_first_s = 2.0
worker.Sweeper.notice_overdue_s = 1.0
"""


def wrong_clock(seconds: int) -> dict[str, str]:
    """The environment of a process whose clock is wrong by so much. Only the time that passes is right."""
    found = importlib.util.find_spec("libfaketime")
    if not (found and found.submodule_search_locations):
        if os.environ.get("CI") and sys.platform == "linux":
            raise RuntimeError("pip install libfaketime")
        pytest.skip("there is no libfaketime: pip install libfaketime (Linux)")
    library = Path(found.submodule_search_locations[0], "vendor/libfaketime/src/libfaketime.so.1")
    return {"LD_PRELOAD": str(library), "FAKETIME": f"{seconds:+}s", "DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}


@pytest.fixture(scope="module")
def place(open_place: OpenPlace) -> Place:
    """Two workers at one queue: a clock five minutes fast, and one five minutes slow."""
    limits = {"CELERY_SOFT_TIME_LIMIT": "60", "CELERY_TIME_LIMIT": "90", "WORKER_CONCURRENCY": f"{SLOTS}"}
    place = open_place("clocks", LEASE_SECONDS=f"{LEASE_S}", **limits)
    place.add_module(SHORT_WAITS)
    for offset_s in OFFSETS_S:
        place.start_worker(**wrong_clock(offset_s))
    place.wait_ready()
    return place


UNTIL_ALL_RUN = "hold until_all_slots_are_taken"
QUICK = {f"quick {number}": Step(UNTIL_ALL_RUN) for number in range(SLOTS * len(OFFSETS_S))}
LONG = {f"long {number}": Step(f"[delay {LEASE_S + 2}]") for number in range(2)}
RETRIED = {
    f"retried {number}": Step("[delay 0.1] [status 429 times=1 retry-after=1]", answers=2) for number in range(6)
}


@pytest.fixture(scope="module")
def ended(place: Place) -> Place:
    """The place when jobs of all these kinds have ended."""
    for name, step in QUICK.items():
        place.submit(name, step)
    for name in QUICK:
        place.wait_call(name)  # all at the same time, so that each worker has to take its share
    place.provider.let_go.add(UNTIL_ALL_RUN)
    for name, step in (LONG | RETRIED).items():  # the long ones first, so that the others take no slot from them
        place.submit(name, step)
    place.wait_ends(QUICK | LONG | RETRIED)
    return place


@pytest.mark.parametrize("name", QUICK | LONG)
def test_clocks_that_differ_by_minutes_neither_double_nor_delay_a_job(ended: Place, name: str) -> None:
    assert_ended_once(ended, name, (QUICK | LONG)[name])
    document = ended.document(name)
    assert document["worker"]["attempt"] == 1
    assert abs(datetime.now(UTC) - document["completed_at"]) < timedelta(seconds=max(OFFSETS_S) - 100)


def test_both_workers_took_jobs(ended: Place) -> None:
    assert all("started" in worker.text() for worker in ended.workers)


@pytest.mark.parametrize("name", RETRIED)
def test_retries_come_in_time_though_clocks_differ_by_minutes(ended: Place, name: str) -> None:
    """With a host's own time the wait would last minutes, or there would be no wait."""
    assert_ended_once(ended, name, RETRIED[name])
    first, second = ended.calls(name)
    assert 1 <= second.started_at - first.started_at < max(OFFSETS_S) - 100


def test_a_killed_workers_job_is_rescued_once_though_clocks_differ_by_minutes(ended: Place) -> None:
    place, gate = ended, "hold until_a_worker_is_killed"
    steps = {f"rescued {number}": Step(gate) for number in range(2)}
    for name, step in steps.items():
        place.submit(name, step)
    for name in steps:
        place.wait_call(name)
    running = {name: str(place.jobs[name]) for name in steps}
    killed = next(worker for worker in place.workers if running["rescued 0"] in worker.text())
    lost = [name for name in steps if running[name] in killed.text()]
    killed.kill()
    place.provider.let_go.add(gate)
    for name, job in place.jobs.items():
        if name in steps:
            attempts = place.api.wait(job, timeout_s=PATIENCE_S)["worker"]["attempt"]
            assert attempts == len(place.calls(name)) == (2 if name in lost else 1)
