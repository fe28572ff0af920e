"""MongoDB goes away, killed or hung, for longer than some jobs may take: each job ends once all the same.

Workers with long limits wait until the outage is over. Those with short ones have to give up, so they keep what they
have generated in Redis, and a later attempt writes it. Both kinds live through the same outage.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest

import worker
from testbed.api import Api
from testbed.processes import poll
from testbed.servers import MongoServer, RedisServer
from tests.lab import IMAGE, TEXT, adopt, bare_settings
from tests.outage_lab import UNTIL_AWAY, UNTIL_OVER, hung, stopped
from tests.place import PATIENCE_S, HoldingProvider, OpenPlace, Place, Step, assert_ended_once, opener
from tests.site import start

pytestmark = pytest.mark.servers

# Writes give up a try, messages and notices come again sooner than usual.
SHORT_WAITS = """
import worker

worker.LATER_S = worker.Runtime.settle_try_s = 2.0
worker.Sweeper.notice_overdue_s = 1.0
"""
FAULTS: dict[str, Callable[[MongoServer], AbstractContextManager[None]]] = {"killed": stopped, "hung": hung}
with_each_fault = pytest.mark.parametrize("outage", FAULTS, indirect=True)


@pytest.fixture(scope="module")
def mongo_server() -> Iterator[MongoServer]:
    """A MongoDB of this module's own, which its tests take away."""
    yield from start(MongoServer(replica_set=True))  # type: ignore[misc]


# ── places with long limits ──────────────────────────────────────────────────────────────────────────────────────

STEPS = {
    "before the claim": Step(""),
    "while the handler runs": Step(UNTIL_OVER),
    "at completion": Step(UNTIL_AWAY),
    "while its file is stored": Step(UNTIL_AWAY, IMAGE, files=1),
    "at the release for a retry": Step(f"{UNTIL_AWAY} [status 500 times=1]", answers=2),
    "when it fails": Step(f"{UNTIL_AWAY} [status 400]", ends="failed"),
}
# A MongoDB that has just come back may take longer over the first renewals than a lease of a few seconds.
OUTLASTING_LEASE = {"LEASE_SECONDS": "10"}
LONG_LIMITS = {
    "CELERY_SOFT_TIME_LIMIT": "80",
    "CELERY_TIME_LIMIT": "100",
    "WORKER_CONCURRENCY": f"{len(STEPS)}",
    **OUTLASTING_LEASE,
}
WAITING_PLACES = ("prefork", "threads", "folder")
in_each_waiting_place = pytest.mark.parametrize("name", WAITING_PLACES)


def open_waiting_places(open_place: OpenPlace) -> dict[str, Place]:
    """Workers of both pools, one that stores files in a folder, and a rival.

    The rival sees the threads' jobs but not their queue, so it could only steal.
    """
    places = {name: open_place(name, WORKER_POOL=name, **LONG_LIMITS) for name in ("prefork", "threads")}
    places["folder"] = open_place("folder", WORKER_POOL="threads", **LONG_LIMITS)
    places["folder"].environment["ARTIFACT_URL"] = f"file://{places['folder'].folder}/files"
    return places


def bring_jobs_to_their_steps(places: Mapping[str, Place]) -> None:
    """A job for each step. Those that the outage meets in the handler or later have asked the provider."""
    asked = [name for name in STEPS if name != "before the claim"]
    for place in places.values():
        for name, step in STEPS.items():
            place.insert(name, step)
        for name in asked:
            place.send(place.jobs[name])
    for place in places.values():
        for name in asked:
            place.wait_call(name)


@dataclass(frozen=True)
class Meanwhile:
    """What is seen of a place while MongoDB is away."""

    health: int
    heartbeat_age_s: float
    children: list[int]
    log: str


def look(place: Place) -> Meanwhile:
    """Waits until a write has failed, and looks."""
    place.wait_log("the ends of jobs can't be written")
    return Meanwhile(place.health(), place.heartbeat_age_s(), place.workers[0].children(), place.log())


# ── places with short limits ─────────────────────────────────────────────────────────────────────────────────────

# Within the soft limit all generations begin and MongoDB goes away, on a busy machine too.
SHORT_LIMITS = {"CELERY_SOFT_TIME_LIMIT": "8", "CELERY_TIME_LIMIT": "12", "LEASE_SECONDS": "2"}
LIMITS_ARE_OVER_S = 13.0
KEPT = {"text": Step(UNTIL_AWAY), "picture": Step(UNTIL_AWAY, IMAGE, files=1)}
UNCLAIMED = {f"unclaimed {number}": Step("") for number in range(6)}
KEEPING_PLACES: dict[str, dict[str, str]] = {
    "gives up, prefork": {"WORKER_CONCURRENCY": "2"},
    "gives up, threads": {"WORKER_CONCURRENCY": "2", "WORKER_POOL": "threads"},
    "past its deadline": {"WORKER_CONCURRENCY": "2", "JOB_DEADLINE": "12"},
    "worker killed": {"WORKER_CONCURRENCY": "2"},
}
STARTED_MEANWHILE = "worker started meanwhile"
SHORT_PLACES = (*KEEPING_PLACES, STARTED_MEANWHILE)


def open_short_places(open_place: OpenPlace) -> dict[str, Place]:
    """Workers that may hold a job for seconds only. One starts during the outage."""
    places = {name: open_place(name, **SHORT_LIMITS, **own) for name, own in KEEPING_PLACES.items()}
    places[STARTED_MEANWHILE] = open_place(STARTED_MEANWHILE, **SHORT_LIMITS | OUTLASTING_LEASE)
    return places


def warm_up(places: Mapping[str, Place]) -> None:
    """A job in every slot, so that afterwards each begins at once."""
    warm = {f"warm {number}": Step("hold until_warm") for number in range(len(KEPT))}
    for name in KEEPING_PLACES:
        for job, step in warm.items():
            places[name].submit(job, step, soft_time_limit=80, time_limit=100)
    for name in KEEPING_PLACES:
        for job in warm:
            places[name].wait_call(job)
    places[STARTED_MEANWHILE].provider.let_go.add("hold until_warm")
    for name in KEEPING_PLACES:
        places[name].wait_ends(warm)


def begin_generations(places: Mapping[str, Place]) -> None:
    """Generations that would be completed as soon as the provider answers."""
    for name, step in UNCLAIMED.items():
        places[STARTED_MEANWHILE].insert(name, step)
    for name in KEEPING_PLACES:
        for job, step in KEPT.items():
            places[name].submit(job, step)
    for name in KEEPING_PLACES:
        for job in KEPT:
            places[name].wait_call(job)


def is_kept(place: Place, name: str) -> bool:
    """Whether a result waits in Redis."""
    return any(place.api.redis.scan_iter(f"result:*:{place.jobs[name]}:*"))


def are_all_kept(place: Place) -> bool:
    return all(is_kept(place, name) for name in KEPT)


def start_late(place: Place) -> None:
    """Starts the worker whose jobs have been waiting, and sends their messages."""
    place.start_worker()
    for name in UNCLAIMED:
        place.send(place.jobs[name])


def outlast_the_limits(places: Mapping[str, Place], began_at: float) -> None:
    """What happens while MongoDB is away, until every short limit is over."""
    for name in KEEPING_PLACES:
        poll(partial(are_all_kept, places[name]), PATIENCE_S, description=f"kept: {name}")
    places["worker killed"].workers.pop().kill()
    places["worker killed"].start_worker().wait_ready(PATIENCE_S)
    places[STARTED_MEANWHILE].wait_log(" retry: Retry in ")
    poll(lambda: time.monotonic() > began_at + LIMITS_ARE_OVER_S, 20, description="the end of every short limit")


# ── the outage ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Outage:
    """An outage that is over: all its jobs have ended."""

    places: dict[str, Place]
    seen: dict[str, Meanwhile]  # of the places with long limits
    children: dict[str, list[int]]  # of the last worker in the places with short limits, at the end of the outage
    queued: int  # messages that no worker had taken then, where the worker started meanwhile


def wait_for_the_ends(places: Mapping[str, Place]) -> None:
    for name, place in places.items():
        place.wait_ends(STEPS if name in WAITING_PLACES else UNCLAIMED if name == STARTED_MEANWHILE else KEPT)
    for place in places.values():
        assert place.goes_on()


@pytest.fixture(scope="module")
def places(
    mongo_server: MongoServer,
    redis_server: RedisServer,
    holding_provider: HoldingProvider,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Place]]:
    """All places with their workers, which live through every outage."""
    with ExitStack() as stack:
        open_place = opener(mongo_server, redis_server, holding_provider, tmp_path_factory.mktemp("mongodb"), stack)
        places = open_waiting_places(open_place) | open_short_places(open_place)
        for name, place in places.items():
            place.add_module(SHORT_WAITS)
            if name != STARTED_MEANWHILE:
                place.start_worker()
        places["threads"].start_worker(CELERY_QUEUE_NAME="another_queue")
        for place in places.values():
            place.wait_ready()
        yield places


@pytest.fixture(scope="module")
def outage(
    request: pytest.FixtureRequest,
    mongo_server: MongoServer,
    holding_provider: HoldingProvider,
    places: dict[str, Place],
) -> Outage:
    waiting = {name: places[name] for name in WAITING_PLACES}
    late = places[STARTED_MEANWHILE]
    late.kill_workers()
    bring_jobs_to_their_steps(waiting)
    warm_up(places)
    begin_generations(places)  # the last, since their limits have begun
    for place in places.values():
        place.mark_logs()
    with FAULTS[request.param](mongo_server):
        began_at = time.monotonic()
        holding_provider.let_go.add(UNTIL_AWAY)
        start_late(late)
        for place in waiting.values():
            place.send(place.jobs["before the claim"])
        with ThreadPoolExecutor() as threads:
            seen = dict(zip(waiting, threads.map(look, waiting.values()), strict=True))
        outlast_the_limits(places, began_at)
        children = {name: places[name].workers[-1].children() for name in SHORT_PLACES}
        queued: int = late.api.redis.llen(late.api.queue)
    holding_provider.let_go.add(UNTIL_OVER)
    wait_for_the_ends(places)
    holding_provider.let_go.clear()
    return Outage(places, seen, children, queued)


# ── within the limits ────────────────────────────────────────────────────────────────────────────────────────────


@with_each_fault
@in_each_waiting_place
@pytest.mark.parametrize("step", STEPS)
def test_a_job_that_an_outage_meets_at_any_step_ends_once(outage: Outage, name: str, step: str) -> None:
    assert_ended_once(outage.places[name], step, STEPS[step])


@with_each_fault
@in_each_waiting_place
def test_the_worker_and_its_children_live_on(outage: Outage, name: str) -> None:
    process = outage.places[name].workers[0]
    assert process.process.poll() is None
    assert set(outage.seen[name].children) <= set(process.children())


@with_each_fault
@in_each_waiting_place
def test_an_outage_is_logged_in_a_few_lines_without_stack_traces(outage: Outage, name: str) -> None:
    """At most a line from each process's keeper, one for what waits to be written, one for what waits to be claimed."""
    place = outage.places[name]
    processes = len(outage.seen[name].children) + len(place.workers)
    lines = [line for line in outage.seen[name].log.splitlines() if " WARNING " in line or " ERROR " in line]
    assert len([line for line in lines if "MongoDB" in line or "can't be written" in line]) <= 4 * processes, lines
    assert all("Traceback" not in process.text() for process in place.workers)


@with_each_fault
@in_each_waiting_place
def test_the_worker_counts_as_healthy_meanwhile(outage: Outage, name: str) -> None:
    assert outage.seen[name].health == 0
    assert outage.seen[name].heartbeat_age_s < 30


@with_each_fault
def test_another_worker_leaves_the_jobs_to_those_whose_leases_ran_out_meanwhile(outage: Outage) -> None:
    place = outage.places["threads"]
    assert "no attempt worked on it" not in place.workers[1].text()
    jobs = place.api.jobs.find({"_id": {"$in": list(place.jobs.values())}})
    assert all("rescues" not in job["worker"] for job in jobs)


# ── beyond the limits ────────────────────────────────────────────────────────────────────────────────────────────


@with_each_fault
@pytest.mark.parametrize("name", KEEPING_PLACES)
@pytest.mark.parametrize("step", KEPT)
def test_a_result_that_the_outage_outlasted_is_written_later(outage: Outage, name: str, step: str) -> None:
    place = outage.places[name]
    assert_ended_once(place, step, KEPT[step])
    is_by_a_later_attempt = place.document(step)["worker"]["attempt"] > 1
    assert not (is_by_a_later_attempt and is_kept(place, step))


@with_each_fault
@pytest.mark.parametrize("name", SHORT_PLACES)
def test_no_child_dies_of_an_outage(outage: Outage, name: str) -> None:
    process = outage.places[name].workers[-1]
    assert process.process.poll() is None
    assert process.children() == outage.children[name]
    assert "Traceback" not in process.text()


@with_each_fault
@pytest.mark.parametrize("name", UNCLAIMED)
def test_a_worker_that_starts_meanwhile_takes_the_jobs_when_it_is_over(outage: Outage, name: str) -> None:
    place = outage.places[STARTED_MEANWHILE]
    assert_ended_once(place, name, UNCLAIMED[name])
    assert place.document(name)["worker"]["attempt"] == 1


@with_each_fault
def test_messages_wait_in_the_queue_meanwhile(outage: Outage) -> None:
    """One is in the slot, one waits to be tried again."""
    assert outage.queued >= len(UNCLAIMED) - 2


# ── whose lease ran out meanwhile ────────────────────────────────────────────────────────────────────────────────


def test_the_sweep_rests_a_lease_after_a_hang_that_no_call_saw_fail(
    mongo_server: MongoServer, environment: dict[str, str], api: Api, tmp_path: Path
) -> None:
    """The owners of leases that ran out during the hang may be about to renew them."""
    values = {name.lower(): value for name, value in environment.items()}
    with closing(adopt(worker.Runtime(bare_settings(**{**values, "lease_seconds": 2})), tmp_path)) as runtime:
        keeper = runtime.keeper
        keeper.tick_s = 0.5
        keeper.tick()
        keeper._sweep_at = 0.0
        owner = {"owner": "about to renew", "node": "elsewhere", "lease_until": datetime.now(UTC), "attempt": 1}
        job = api.insert(TEXT, {}, status="processing", worker=owner)
        mongo_server.pause()
        # A second and a half is over half a lease, and less than the patience of a call.
        timer = threading.Timer(1.5, mongo_server.resume)
        timer.start()
        keeper.tick()
        timer.join()
        assert api.document(job)["worker"]["owner"] == "about to renew"
