"""`health` beside running workers: what makes it 1, and what doesn't.

All tolerances are shortened in the same proportion, to a fortieth. Each pool has two workers, whose experiences are
made side by side: one meets a long job, an outage of Redis, and a loop that hangs; the other is stopped.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from testbed.processes import poll
from testbed.servers import RedisServer
from tests.outage_lab import hung, stopped
from tests.place import PATIENCE_S, OpenPlace, Place, Step
from tests.site import POOLS, for_each_pool, running
from worker_commands.health import find_faults
from workerkit.process import Heartbeat

SILENT_S = 3.0
LONG_S = 1.5 * SILENT_S  # longer than the parent may be silent
HANG_S = LONG_S + 3  # Celery's own heartbeat, every 2 s, is the first that waits for a Redis that hangs
MODULE = f"""
import time
from functools import partialmethod
from celery.worker.control import control_command
import worker
from workerkit.broker import JobConnection, JobConsumer

JobConsumer.SILENT_S, JobConsumer.SILENT_AFTER_LIMIT_S, JobConsumer.BEAT_S = {SILENT_S}, 1.5, 0.2
JobConnection.ensure_connection = partialmethod(JobConnection.ensure_connection, interval_start=0.5, interval_step=0)
worker.app.conf.broker_transport_options |= dict.fromkeys(("socket_connect_timeout", "socket_timeout"), 0.5)

@control_command(args=[("seconds", float)])
def hang_parent(state, seconds):
    time.sleep(seconds)
"""


@dataclass
class Seen:
    """What `health` said about one worker."""

    during_job: list[str]
    during_outage: list[str]
    during_hang: list[str]
    stopped: list[str]


def faults(place: Place) -> list[str]:
    return find_faults(Heartbeat(place.folder / f"ai-backend-worker-{os.getuid()}"))


def faults_within(place: Place, seconds: float) -> list[str]:
    """All that `health` would have complained about."""
    found: list[str] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found += faults(place)
        time.sleep(0.1)
    return found


def wait_alive(place: Place) -> None:
    place.wait_ready()
    poll(lambda: not faults(place), PATIENCE_S, description="a healthy worker")


def wait_fault(place: Place) -> list[str]:
    return poll(lambda: faults(place), PATIENCE_S, description="a fault")


Experience = Callable[[Place], list[str]]


def run_long_job(place: Place) -> list[str]:
    """Its limit is the message's own, and longer than that of the settings."""
    place.submit("long", Step(f"[delay {LONG_S}]"), soft_time_limit=20, time_limit=25)
    place.wait_call("long")
    return faults_within(place, LONG_S)


def hang(place: Place) -> list[str]:
    place.api.celery.control.broadcast("hang_parent", arguments={"seconds": 1000.0})
    return wait_fault(place)


def stop(place: Place) -> list[str]:
    wait_alive(place)
    place.workers[0].signal(signal.SIGSTOP)
    return wait_fault(place)


@pytest.fixture(scope="module")
def seen(open_place: OpenPlace) -> Iterator[Callable[[str], Seen]]:
    with running(RedisServer()) as redis, ThreadPoolExecutor(2 * len(POOLS)) as threads:
        limits = {"CELERY_SOFT_TIME_LIMIT": "1", "CELERY_TIME_LIMIT": "1.5"}

        def start(name: str, pool: str) -> Place:
            place = open_place(f"{name}-{pool}", REDIS_URL=redis.url, WORKER_POOL=pool, **limits)
            place.add_module(MODULE)
            place.start_worker()
            return place

        def in_each(experience: Experience, places: dict[str, Place]) -> dict[str, list[str]]:
            made: dict[str, Future[list[str]]] = {p: threads.submit(experience, places[p]) for p in places}
            return {pool: future.result() for pool, future in made.items()}

        places = {pool: start("hangs", pool) for pool in POOLS}
        others = {pool: start("stopped", pool) for pool in POOLS}
        stops = {pool: threads.submit(stop, other) for pool, other in others.items()}
        for place in places.values():
            wait_alive(place)
        during_job = in_each(run_long_job, places)
        after_stop = {pool: future.result() for pool, future in stops.items()}
        with stopped(redis):
            during_outage = in_each(lambda place: faults_within(place, LONG_S), places)
        with hung(redis):
            while_paused = in_each(lambda place: faults_within(place, HANG_S), places)
        for place in places.values():
            assert place.goes_on()
        during_hang = in_each(hang, places)

        def of(pool: str) -> Seen:
            outage = during_outage[pool] + while_paused[pool]
            return Seen(during_job[pool], outage, during_hang[pool], after_stop[pool])

        yield of


SeenOf = Callable[[str], Seen]


@for_each_pool
def test_health_is_1_once_a_pools_parent_is_stopped(seen: SeenOf, pool: str) -> None:
    assert any(fault.startswith("the parent of process") for fault in seen(pool).stopped)


@for_each_pool
def test_health_is_1_once_the_loop_of_a_pools_parent_hangs(seen: SeenOf, pool: str) -> None:
    [fault] = seen(pool).during_hang
    assert fault.startswith("the parent of process")


@for_each_pool
def test_health_stays_0_while_redis_is_down_or_hangs_for_longer_than_a_parent_may_be_silent(
    seen: SeenOf, pool: str
) -> None:
    assert seen(pool).during_outage == []


@for_each_pool
def test_health_stays_0_during_a_job_that_takes_longer_than_a_parent_may_be_silent(seen: SeenOf, pool: str) -> None:
    assert seen(pool).during_job == []
