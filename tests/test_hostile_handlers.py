"""Handlers that can't be stopped: each job fails at its limit, and the worker goes on with the next one.

Each scenario takes seconds of waiting and little else. So they happen side by side, each in a place of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest

from testbed.processes import poll
from tests.place import OpenPlace, Outcomes, Place, Scenario, side_by_side
from workerkit.sentences import GAVE_UP, TOOK_TOO_LONG

OWN_HANDLERS = '''
import asyncio, ctypes
from worker import JobInput, Keeper, Result, Runtime, handles

Runtime.stuck_loop_s = 2.0  # a handler that doesn't end is given up sooner than usual
Keeper.tick_s = 0.2  # lost jobs are found sooner than usual

class Nothing(JobInput):
    pipe: str = ""
    attempts: list[int] = []

@handles("ignores_cancellation", Nothing)
async def ignores_cancellation(call):
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            continue

@handles("swallows_everything", Nothing)
async def swallows_everything(call):
    while True:
        try:
            await asyncio.sleep(0.1)
        except BaseException:
            pass

@handles("cleans_up_for_ever", Nothing)
async def cleans_up_for_ever(call):
    async def pieces():
        try:
            while True:
                yield "piece"
                await asyncio.sleep(0.1)
        finally:
            await asyncio.sleep(3600)

    async for piece in pieces():
        call.progress(piece)

@handles("holds_the_gil", Nothing)
async def holds_the_gil(call):
    """As a regular expression that takes for ever: no thread of the process runs until a writer opens the pipe."""
    if call.job.attempt in call.input.attempts:
        ctypes.PyDLL(None).open(call.input.pipe.encode(), 0)
    return Result({"words": "done"})
'''
BAD_HANDLERS = ("ignores_cancellation", "swallows_everything", "cleans_up_for_ever")
USUAL = {"soft_time_limit": 20, "time_limit": 30}  # limits of a message, where the worker's own are very short
SHORT = {"LEASE_SECONDS": "4", "SWEEP_INTERVAL": "0.3"}  # a busy machine could cost it a shorter lease


# ── what happens side by side ────────────────────────────────────────────────────────────────────────────────────


def make_pipes(place: Place, count: int = 1) -> list[str]:
    """Named pipes. A process that opens one to read waits until another opens it to write."""
    paths = [str(place.folder / f"pipe-{number}") for number in range(count)]
    for path in paths:
        os.mkfifo(path)
    return paths


def start_workers(place: Place, *pools: str, **settings: str) -> None:
    place.add_module(OWN_HANDLERS)
    for pool in pools:
        place.start_worker(WORKER_POOL=pool, **settings)
    place.wait_ready()


def cant_be_cancelled(place: Place, pool: str, job_types: tuple[str, ...]) -> None:
    api = place.api
    limits = {"CELERY_SOFT_TIME_LIMIT": "0.5", "CELERY_TIME_LIMIT": "100"}
    start_workers(place, pool, WORKER_CONCURRENCY="3", **limits)
    jobs = [api.submit(job_type, {}) for job_type in job_types]
    ended = [api.wait(job, timeout_s=50) for job in jobs]
    assert [(job["status"], job["error_message"]) for job in ended] == [("failed", TOOK_TOO_LONG)] * len(jobs)
    # No process was killed at the hard limit.
    assert all(job["completed_at"] - job["started_at"] < timedelta(seconds=50) for job in ended)
    assert api.wait(api.text("the next job", **USUAL))["status"] == "completed"


def hangs_a_child(place: Place) -> None:
    api, [pipe] = place.api, make_pipes(place)
    start_workers(place, "prefork", CELERY_SOFT_TIME_LIMIT="2", CELERY_TIME_LIMIT="5", **SHORT)
    job = api.submit("holds_the_gil", {"pipe": pipe, "attempts": [1]})
    assert api.wait(job, timeout_s=40)["error_message"] == TOOK_TOO_LONG
    assert api.wait(api.text("the next job", **USUAL))["status"] == "completed"
    assert api.notices(job) == ["processing", "failed"]


def hangs_a_process(place: Place) -> None:
    api, pipes = place.api, make_pipes(place, count=2)
    start_workers(place, "threads", "solo", **SHORT)
    hung = list(place.workers)
    jobs = [api.submit("holds_the_gil", {"pipe": pipe, "attempts": [1]}) for pipe in pipes]
    poll(lambda: [api.status(job) for job in jobs] == ["processing"] * 2, 20)
    other = place.start_worker(**SHORT).wait_ready(40)
    done = [api.wait(job, timeout_s=40) for job in jobs]
    assert [(job["status"], job["worker"]["attempt"]) for job in done] == [("completed", 2)] * 2
    other.stop()
    for pipe in pipes:
        os.close(os.open(pipe, os.O_WRONLY))
    poll(lambda: all(" abandoned" in worker.text() for worker in hung), 30, description="both have awoken")
    after = [api.document(job) for job in jobs]
    kept = ("status", "output_data", "completed_at", "updated_at")
    assert [[job[key] for key in kept] for job in after] == [[job[key] for key in kept] for job in done]
    assert all(api.wait(job)["status"] == "completed" for job in [api.text(f"next job {i}") for i in range(4)])
    assert [api.notices(job).count("failed") for job in jobs] == [0, 0]


def hangs_every_process(place: Place) -> None:
    api, [pipe] = place.api, make_pipes(place)
    start_workers(place, "threads", "prefork", **SHORT)
    now = datetime.now(UTC)
    started = {"status": "processing", "started_at": now}
    released = {"owner": None, "attempt": 3, "available_at": now, "first_started_at": now}
    job = api.insert("holds_the_gil", {"pipe": pipe, "attempts": [4]}, **started, worker=released)
    api.enqueue(job)
    assert api.wait(job, timeout_s=40)["error_message"] == GAVE_UP
    assert api.wait(api.text("the next job"))["status"] == "completed"


LIMITED = {"prefork": BAD_HANDLERS, "threads": BAD_HANDLERS, "solo": BAD_HANDLERS[:1]}
SCENARIOS: dict[str, Scenario] = {
    "hangs a process": hangs_a_process,  # the longest first
    "hangs a child": hangs_a_child,
    "hangs every process": hangs_every_process,
    **{pool: partial(cant_be_cancelled, pool=pool, job_types=job_types) for pool, job_types in LIMITED.items()},
}


@pytest.fixture(scope="module")
def outcomes(open_place: OpenPlace) -> Iterator[Outcomes]:
    with side_by_side(open_place, SCENARIOS) as outcomes:
        yield outcomes


# ── what has come of it ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pool", LIMITED)
def test_a_handler_that_cant_be_cancelled_fails_at_the_workers_own_limit(outcomes: Outcomes, pool: str) -> None:
    outcomes[pool].result()


def test_a_child_that_hangs_in_native_code_is_killed_at_the_workers_own_hard_limit(outcomes: Outcomes) -> None:
    outcomes["hangs a child"].result()


def test_the_job_of_a_process_that_hangs_in_native_code_goes_to_another_worker_and_stays_there(
    outcomes: Outcomes,
) -> None:
    outcomes["hangs a process"].result()


def test_a_job_that_hangs_every_process_fails_at_its_bounds(outcomes: Outcomes) -> None:
    outcomes["hangs every process"].result()
