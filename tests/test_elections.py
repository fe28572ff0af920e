"""MongoDB's replica set elects another primary: no job is lost or doubled, not even what only the old primary had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from bson import ObjectId
from pymongo import MongoClient

from testbed.processes import poll
from testbed.servers import Member, MongoServer, RedisServer, ReplicaSet
from tests.lab import IMAGE, TEXT
from tests.place import LIMITS, PATIENCE_S, HoldingProvider, OpenPlace, Place, Step, assert_ended_once, opener
from tests.site import running

pytestmark = pytest.mark.servers

# A primary that hangs is given up sooner than usual.
SHORT_WAITS = """
import worker

worker.Runtime.settle_try_s = 2.0
worker.Runtime.mongodb_timeout_s = 4.0
worker.Sweeper.notice_overdue_s = 5.0
"""


@pytest.fixture(scope="module")
def replica_set() -> Iterator[ReplicaSet]:
    with running(ReplicaSet()) as replica_set:
        yield replica_set


@pytest.fixture(scope="module")
def open_place(
    replica_set: ReplicaSet,
    redis_server: RedisServer,
    holding_provider: HoldingProvider,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[OpenPlace]:
    with ExitStack() as stack:
        open_one = opener(replica_set, redis_server, holding_provider, tmp_path_factory.mktemp("elections"), stack)

        def open_place(name: str, **settings: str) -> Place:
            # A lease has to outlast an election and the write that it breaks off, for which a keeper waits 5 s.
            place = open_one(name, LEASE_SECONDS="10", **LIMITS, **settings)
            place.add_module(SHORT_WAITS)
            return place

        yield open_place


@pytest.fixture
def whole_set(replica_set: ReplicaSet) -> Iterator[ReplicaSet]:
    """The replica set, which is mended after the test."""
    yield replica_set
    mend(replica_set)


def mend(replica_set: ReplicaSet) -> None:
    for member in replica_set.members:
        member.start().resume()
    replica_set.copy_again()
    replica_set.wait_whole()


# ── elections ────────────────────────────────────────────────────────────────────────────────────────────────────

ELECTIONS = {
    "steps down": ReplicaSet.step_down,
    "is killed": ReplicaSet.kill_primary,
    "hangs": ReplicaSet.pause_primary,
}
UNTIL_THE_ELECTION, UNTIL_IT_IS_ELECTED = "hold until_the_election", "hold until_it_is_elected"
MEANWHILE = {
    "text 1": Step(UNTIL_THE_ELECTION),
    "text 2": Step(f"{UNTIL_THE_ELECTION} [tokens 60] [pace 0.05]"),
    "text 3": Step(UNTIL_IT_IS_ELECTED),
    "picture": Step(UNTIL_THE_ELECTION, IMAGE, files=1),
    "retry": Step(f"{UNTIL_THE_ELECTION} [status 500 times=1]", answers=2),
    "failure": Step(f"{UNTIL_THE_ELECTION} [status 400]", ends="failed"),
}
UNCLAIMED = {f"unclaimed {number}": Step("") for number in range(3)}


@pytest.fixture(scope="module")
def members_place(open_place: OpenPlace) -> Place:
    """A place with a worker of each pool, which live through all elections."""
    place = open_place("members")
    place.start_worker(WORKER_POOL="threads", WORKER_CONCURRENCY="8")
    place.start_worker(WORKER_POOL="prefork", WORKER_CONCURRENCY="2")
    place.wait_ready()
    return place


@pytest.mark.parametrize("election", ELECTIONS.values(), ids=ELECTIONS)
def test_no_job_is_lost_or_doubled_in_any_election(
    whole_set: ReplicaSet, members_place: Place, election: Callable[[ReplicaSet], object]
) -> None:
    place, steps = members_place, MEANWHILE | UNCLAIMED
    for name, step in MEANWHILE.items():
        place.submit(name, step)
    for name in MEANWHILE:
        place.wait_call(name)
    for name, step in UNCLAIMED.items():
        place.insert(name, step)
    election(whole_set)
    place.provider.let_go.add(UNTIL_THE_ELECTION)
    for name in UNCLAIMED:
        place.send(place.jobs[name])
    assert whole_set.primary
    place.provider.let_go.add(UNTIL_IT_IS_ELECTED)
    place.wait_ends(steps)
    mend(whole_set)
    place.provider.let_go.clear()
    assert place.goes_on()
    for name, step in steps.items():
        assert_ended_once(place, name, step)
        assert "rescues" not in place.document(name)["worker"]
    assert all("Traceback" not in worker.text() for worker in place.workers)


# ── writes that only the old primary had ─────────────────────────────────────────────────────────────────────────

LOSSES = {
    "it dies with a text": (ReplicaSet.kill_primary, TEXT),
    "it dies with a picture": (ReplicaSet.kill_primary, IMAGE),
    "it rolls a text back": (ReplicaSet.overrule_primary, TEXT),
}


@pytest.fixture(scope="module")
def careless_place(open_place: OpenPlace, replica_set: ReplicaSet) -> Place:
    """A place with a worker whose URL asks for less than a majority at each write."""
    place = open_place("careless")
    place.start_worker(MONGODB_URL=f"{replica_set.url}&w=1")
    place.wait_ready()
    return place


def wait_for_a_write(old: MongoServer, place: Place, name: str) -> None:
    """Waits until the isolated primary has the end of the job, or the worker has given up a try to store its file."""
    completed, database = {"_id": place.jobs[name], "status": "completed"}, place.environment["DATABASE_NAME"]
    with MongoClient[dict[str, Any]](old.root_url) as client:
        jobs = client[database]["jobs"]
        poll(lambda: jobs.find_one(completed) or "the ends of jobs can't be written" in place.log(), PATIENCE_S)


@pytest.mark.parametrize(("loss", "kind"), LOSSES.values(), ids=LOSSES)
def test_a_result_that_only_the_old_primary_had_is_written_again(
    whole_set: ReplicaSet, careless_place: Place, loss: Callable[[ReplicaSet], Member], kind: str
) -> None:
    """Whatever the URL says about writes."""
    place, gate = careless_place, f"hold until_{ObjectId()}"
    place.mark_logs()
    step = Step(gate, kind, files=int(kind == IMAGE))
    job = place.submit("rolled back", step)
    place.wait_call("rolled back")
    old = whole_set.isolate_primary()
    place.provider.let_go.add(gate)
    wait_for_a_write(old, place, "rolled back")
    assert "completed" not in place.api.notices(job)
    whole_set.end_isolation(loss(whole_set))
    place.api.wait_notice(job, "completed", timeout_s=PATIENCE_S)
    mend(whole_set)
    if loss is ReplicaSet.overrule_primary:
        poll(lambda: list(old.directory.glob("data/rollback/*/*.bson")), 30, description="what was rolled back")
    assert place.goes_on()
    assert_ended_once(place, "rolled back", step)
