"""Workers that are asked to end when it is hard: while the broker hangs, at any step of a job, right at their start."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from testbed.forks import WORKER
from testbed.network import Gateway
from testbed.processes import SOURCE, poll
from testbed.servers import RedisServer
from tests.outage_lab import hung, swallowed
from tests.place import PATIENCE_S, OpenPlace, Place, Step
from tests.site import POOLS, StartWorker, for_each_pool, running

GRACE_S = 1.0
BOUND_S = GRACE_S + 10
CONTROLLED = pytest.mark.skipif(sys.platform != "linux", reason="reads in /proc which signals a process handles")

# ── while the broker hangs ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Ended:
    """How a worker ended, and what it left of the job that ran then."""

    within_s: float
    exit_code: int
    job: dict[str, Any] | None
    log: str


Ends = Mapping[str, "Future[Ended]"]
FAULTS = ("hangs", "is unreachable")
for_each_fault = pytest.mark.parametrize("fault", FAULTS)


def end(place: Place) -> Ended:
    [worker] = place.workers
    began = time.monotonic()
    exit_code = worker.stop(60)
    job = place.document("job") if place.jobs else None
    return Ended(time.monotonic() - began, exit_code, job, worker.text())


@pytest.fixture(scope="module")
def ends(open_place: OpenPlace) -> Iterator[Ends]:
    """An idle worker and a busy one of each pool, for each fault of the broker. All of them end side by side."""
    with running(RedisServer()) as redis, Gateway(redis.url) as gate:
        urls = dict(zip(FAULTS, (redis.url, gate.url), strict=True))
        places: dict[str, Place] = {}
        for fault in FAULTS:
            for pool in POOLS:
                for state in ("idle", "busy"):
                    name = f"{state} {pool}, {fault}"
                    settings = {"WORKER_POOL": pool, "SHUTDOWN_GRACE": f"{GRACE_S:g}", "LEASE_SECONDS": "60"}
                    places[name] = open_place(name, REDIS_URL=urls[fault], **settings)
                    places[name].start_worker()
        for name, place in places.items():
            place.wait_ready()
            if name.startswith("busy"):
                place.submit("job", Step("[hang]"))
                place.wait_call("job")
        with swallowed(gate), hung(redis), ThreadPoolExecutor(len(places)) as threads:
            yield {name: threads.submit(end, place) for name, place in places.items()}


@for_each_fault
@for_each_pool
def test_an_idle_worker_ends_in_time_while_redis(ends: Ends, pool: str, fault: str) -> None:
    ended = ends[f"idle {pool}, {fault}"].result()
    assert (ended.exit_code, ended.within_s < BOUND_S) == (0, True), ended


@for_each_fault
@for_each_pool
def test_a_worker_hands_its_job_back_and_ends_in_time_while_redis(ends: Ends, pool: str, fault: str) -> None:
    ended = ends[f"busy {pool}, {fault}"].result()
    assert (ended.exit_code, ended.within_s < BOUND_S) == (0, True), ended
    assert ended.job
    assert (ended.job["status"], ended.job["worker"]["owner"]) == ("processing", None)
    assert ended.job["worker"]["attempt"] == 0


# ── at any step of a job ─────────────────────────────────────────────────────────────────────────────────────────

STEPS = ("claim", "announce_job", "settle", "conclude")
# Waits behind one function of the worker, where a signal then finds it.
MODULE = """
import functools, pathlib, time
import worker

plain = worker.{step}

@functools.wraps(plain)
def slow(*args, **kwargs):
    try:
        return plain(*args, **kwargs)
    finally:
        pathlib.Path({marker!r}).touch()
        time.sleep(1)

worker.{step} = slow
"""


@pytest.fixture(scope="module")
def signalled(open_place: OpenPlace) -> Iterator[Mapping[str, Future[Place]]]:
    """Workers whose whole process group got SIGTERM behind one step of a job that takes no time."""

    def make(step: str) -> Place:
        place = places[step]
        place.start_worker().wait_ready(PATIENCE_S)
        place.submit("job", Step(""))
        poll((place.folder / "marker").exists, PATIENCE_S)
        os.killpg(place.workers[0].process.pid, signal.SIGTERM)
        assert place.workers[0].process.wait(30) == 0
        return place

    places = {step: open_place(f"signal at {step}", SHUTDOWN_GRACE="20", LEASE_SECONDS="60") for step in STEPS}
    for step, place in places.items():
        place.add_module(MODULE.format(step=step, marker=str(place.folder / "marker")))
    with ThreadPoolExecutor(len(STEPS)) as threads:
        yield {step: threads.submit(make, step) for step in STEPS}


@pytest.mark.parametrize("step", STEPS)
def test_a_signal_to_the_whole_group_lets_a_child_end_its_job(
    signalled: Mapping[str, Future[Place]], step: str
) -> None:
    """Whatever the signal breaks into, no lease is left behind, and the end is published."""
    place = signalled[step].result()
    assert place.document("job")["status"] == "completed"
    assert place.api.notices(place.jobs["job"]) == ["processing", "completed"]
    assert "unnotified" not in place.document("job")["worker"]


def test_a_child_that_alone_gets_sigterm_ends_and_its_job_is_done_by_another(open_place: OpenPlace) -> None:
    """As before: no shutdown is announced, so the child ends at once, and its sibling releases the job."""
    place, step = open_place("one child"), Step("[hang times=1]", answers=2)
    worker = place.start_worker().wait_ready(PATIENCE_S)
    place.submit("job", step)
    place.wait_call("job")
    os.kill(worker.children()[0], signal.SIGTERM)
    place.wait_ends({"job": step})
    assert place.document("job")["worker"]["attempt"] == 2


# ── right at the start ───────────────────────────────────────────────────────────────────────────────────────────


def handles_sigterm(pid: int) -> bool:
    [mask] = [line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigCgt" in line]
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


def only_child(pid: int) -> int:
    """The id of a process's child; 0 while there is none."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text() or 0)


def start(folder: Path, *command: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    """Starts `python worker.py …` itself, since a fork would have its libraries already."""
    variables = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.Popen(
        [*prefix, sys.executable, str(WORKER), *command], cwd=folder, env=variables, stdout=subprocess.PIPE
    )


@CONTROLLED
@pytest.mark.parametrize(("command", "exit_code"), [((), 0), (("run",), 0), (("check",), 143), (("demo",), 143)])
def test_sigterm_before_anything_is_imported_ends_a_command_at_once(
    tmp_path: Path, command: tuple[str, ...], exit_code: int
) -> None:
    process = start(tmp_path, *command)
    poll(lambda: handles_sigterm(process.pid), 30, interval_s=0.001)
    process.terminate()
    output, _ = process.communicate(timeout=10)
    assert (process.returncode, output) == (exit_code, b"")


def can_make_namespaces() -> bool:
    command = ["unshare", "--pid", "--fork", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@CONTROLLED
@pytest.mark.skipif(not can_make_namespaces(), reason="needs the right to make a namespace for processes")
def test_sigterm_ends_process_1_of_a_container_before_anything_is_imported(tmp_path: Path) -> None:
    """The kernel keeps from process 1 what it has no handler for."""
    outside = start(tmp_path, prefix=("unshare", "--pid", "--fork", "--kill-child"))
    first = poll(lambda: only_child(outside.pid), 30, interval_s=0.001)
    poll(lambda: handles_sigterm(first), 30, interval_s=0.001)
    os.kill(first, signal.SIGTERM)
    output, _ = outside.communicate(timeout=10)
    assert (outside.returncode, output) == (0, b"")


@for_each_pool
def test_sigterm_at_the_moment_at_which_celery_begins_ends_the_worker(start_worker: StartWorker, pool: str) -> None:
    worker = start_worker(ready=False, WORKER_POOL=pool)
    worker.wait_ready(says="AI Backend Worker")
    assert worker.stop(15) == 0
