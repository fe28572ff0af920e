"""Workers that are asked to end: idle, with a job that ends in time, with one that doesn't.

Each of these shutdowns takes seconds in which next to nothing is computed. So they happen side by side, a few at a
time, and each test looks at what has become of one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId

from testbed.api import Api, WorkerProcess
from testbed.processes import SOURCE, poll
from testbed.provider import Provider
from testbed.servers import MongoServer, RedisServer
from tests.lab import TEXT
from tests.place import PATIENCE_S, OpenPlace, Outcomes, Place, Scenario, Step, side_by_side
from tests.site import CELERY_COMMAND, POOLS, events_of, for_each_pool, open_api, run_forked, worker_settings

AT_A_TIME = 4
STOP_S = 30.0


@dataclass(frozen=True)
class Shutdown:
    """How a worker is asked to end, and the job that runs at that moment. Without a prompt none does."""

    prompt: str
    grace_s: float
    pool: str = "prefork"
    command: tuple[str, ...] = ()
    is_for_the_group: bool = False

    @property
    def settings(self) -> dict[str, str]:
        return {"WORKER_POOL": self.pool, "SHUTDOWN_GRACE": f"{self.grace_s:g}", "PYTHONPATH": str(SOURCE)}


@dataclass(frozen=True)
class Ended:
    """What a shutdown left: of the worker, of its job, and of the job's message."""

    exit_code: int
    log: str
    queued: int
    job: dict[str, Any]
    notices: list[str]
    events: list[str]
    call_outcomes: list[str]
    health_after: int | None  # exit code of `python worker.py health` after the end of a worker that was healthy

    @property
    def is_handed_back(self) -> bool:
        """Whether any worker may take the job at once, by its message in the queue."""
        return self.job["status"] == "processing" and self.job["worker"]["owner"] is None and self.queued == 1


SHUTDOWNS = {
    **{f"idle, {pool}": Shutdown("", 60, pool) for pool in POOLS},
    **{f"within the grace, {pool}": Shutdown("quick enough [delay 1]", 60, pool) for pool in POOLS},
    **{f"beyond the grace, {pool}": Shutdown("too slow [hang]", 1, pool) for pool in POOLS},
    **{f"whole group, {pool}": Shutdown("[hang]", 1, pool, is_for_the_group=True) for pool in POOLS},
    "celery": Shutdown("started by celery [hang]", 1, command=(*CELERY_COMMAND, "--concurrency=1")),
    "no grace": Shutdown("planned [hang]", 0),
}


def end(worker: WorkerProcess, shutdown: Shutdown) -> int:
    """Sends SIGTERM and returns the exit code. Raises TimeoutExpired: the worker goes on."""
    if shutdown.is_for_the_group:
        os.killpg(worker.process.pid, signal.SIGTERM)
        return worker.process.wait(STOP_S)
    return worker.stop(STOP_S)


def look(api: Api, provider: Provider, prompt: str, task_id: str, events: list[dict[str, Any]]) -> dict[str, Any]:
    """What is left of the job and its message. Events come after the worker's end, so they are waited for."""
    document = api.jobs.find_one({"input_data.prompt": prompt}) or {}
    if document.get("status") == "completed":
        poll(lambda: any(e["type"] == "task-succeeded" for e in list(events) if e.get("uuid") == task_id), 10)
    return {
        "queued": api.redis.llen(api.queue),
        "job": document,
        "notices": api.notices(document["_id"]) if document else [],
        "events": [event["type"] for event in events if event.get("uuid") == task_id],
        "call_outcomes": [call.outcome for call in provider.calls_for(prompt)] if prompt else [],
    }


def shut_down(shutdown: Shutdown, settings: dict[str, str], provider: Provider, folder: Path) -> Ended:
    """Starts a worker, gives it the job, and asks it to end once the provider works on that."""
    prompt = f"{ObjectId()} {shutdown.prompt}" if shutdown.prompt else ""
    environment = {**settings, **shutdown.settings, "TMPDIR": str(folder)}

    def health() -> int:
        return run_forked(environment, folder, "health").returncode

    with open_api(environment) as api:
        worker = WorkerProcess(environment, folder / "worker.log", list(shutdown.command) or None)
        try:
            worker.wait_ready(60)
            with events_of(api) as events:
                task_id = api.enqueue(api.insert(TEXT, {"prompt": prompt})).id if prompt else ""
                poll(lambda: not prompt or provider.calls_for(prompt), 30, description=f"a call for {prompt!r}")
                if not prompt:  # its first beat may come a moment after it is ready
                    poll(lambda: not health(), 30, description="a healthy worker")
                exit_code = end(worker, shutdown)
                seen = look(api, provider, prompt, task_id, events)
            return Ended(exit_code, worker.text(), **seen, health_after=None if prompt else health())
        finally:
            worker.kill()


@pytest.fixture(scope="module")
def shutdowns(
    mongo_server: MongoServer,
    redis_server: RedisServer,
    running_provider: Provider,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Mapping[str, Future[Ended]]]:
    """All shutdowns, some of which may still go on."""
    folder = tmp_path_factory.mktemp("shutdowns")

    def make(name: str, shutdown: Shutdown) -> Ended:
        environment = worker_settings(mongo_server, redis_server, running_provider, f"shutdown_{ObjectId()}")
        (folder / name).mkdir()
        return shut_down(shutdown, environment, running_provider, folder / name)

    with ThreadPoolExecutor(AT_A_TIME) as threads:
        yield {name: threads.submit(partial(make, name, shutdown)) for name, shutdown in SHUTDOWNS.items()}


@for_each_pool
def test_an_idle_worker_ends_soon_after_sigterm(shutdowns: Mapping[str, Future[Ended]], pool: str) -> None:
    """It doesn't wait until the grace of a minute is over, by when it would have been killed."""
    assert shutdowns[f"idle, {pool}"].result().exit_code == 0


@for_each_pool
def test_health_is_0_beside_a_running_worker(shutdowns: Mapping[str, Future[Ended]], pool: str) -> None:
    """It was 0 before the worker was asked to end, and is 1 afterwards."""
    assert shutdowns[f"idle, {pool}"].result().health_after == 1


@for_each_pool
def test_a_job_that_ends_within_the_grace_is_completed(shutdowns: Mapping[str, Future[Ended]], pool: str) -> None:
    ended = shutdowns[f"within the grace, {pool}"].result()
    assert ended.exit_code == 0
    assert ended.job["status"] == "completed"
    assert ended.notices == ["processing", "completed"]


@for_each_pool
def test_the_events_of_a_last_job_are_sent_though_they_wait_for_others(
    shutdowns: Mapping[str, Future[Ended]], pool: str
) -> None:
    ended = shutdowns[f"within the grace, {pool}"].result()
    assert ended.events == ["task-received", "task-started", "task-succeeded"]


@for_each_pool
def test_a_job_that_outlasts_the_grace_is_handed_back_uncounted(
    shutdowns: Mapping[str, Future[Ended]], pool: str
) -> None:
    ended = shutdowns[f"beyond the grace, {pool}"].result()
    assert ended.exit_code == 0
    assert ended.is_handed_back
    assert ended.job["worker"]["attempt"] == 0
    assert ended.call_outcomes == ["disconnected"]


@for_each_pool
def test_a_signal_to_the_whole_process_group_hands_back_too(shutdowns: Mapping[str, Future[Ended]], pool: str) -> None:
    ended = shutdowns[f"whole group, {pool}"].result()
    assert ended.exit_code == 0
    assert ended.is_handed_back


def test_a_worker_that_celery_started_hands_back_too(shutdowns: Mapping[str, Future[Ended]]) -> None:
    ended = shutdowns["celery"].result()
    assert ended.exit_code == 0
    assert ended.is_handed_back


def test_a_hand_back_is_no_accident_in_the_log(shutdowns: Mapping[str, Future[Ended]]) -> None:
    ended = shutdowns["no grace"].result()
    assert ended.exit_code == 0
    assert f"job={ended.job['_id']} attempt=1 type='text_generation' handed back" in ended.log
    assert "Traceback" not in ended.log


# ── two workers, and one that breaks down ────────────────────────────────────────────────────────────────────────


def hand_over(place: Place) -> None:
    job, step = "handed over", Step("[hang times=1]", answers=2)
    first = place.start_worker(SHUTDOWN_GRACE="1").wait_ready(PATIENCE_S)
    place.submit(job, step)
    place.wait_call(job)
    place.start_worker().wait_ready(PATIENCE_S)
    assert first.stop(STOP_S) == 0
    # Without its message the job would wait half a minute for a sweep.
    assert place.api.wait(place.jobs[job])["status"] == "completed"
    place.wait_ends({job: step})
    assert place.document(job)["worker"]["attempt"] == 1
    assert place.api.notices(place.jobs[job]) == ["processing", "processing", "completed"]


def break_down(place: Place) -> None:
    worker = place.start_worker().wait_ready(PATIENCE_S)
    place.api.redis.lpush(place.api.queue, "what no broker would send")  # the transport itself stumbles over it
    assert worker.process.wait(STOP_S) == 1


SCENARIOS: dict[str, Scenario] = {"handed over": hand_over, "broken down": break_down}


@pytest.fixture(scope="module", autouse=True)
def outcomes(open_place: OpenPlace) -> Iterator[Outcomes]:
    with side_by_side(open_place, SCENARIOS, at_a_time=1) as outcomes:
        yield outcomes


def test_another_worker_completes_what_was_handed_back(outcomes: Outcomes) -> None:
    outcomes["handed over"].result()


def test_a_worker_that_breaks_down_ends_with_exit_code_1(outcomes: Outcomes) -> None:
    outcomes["broken down"].result()
