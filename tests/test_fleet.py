"""Several workers, queues and priorities on one database: who sweeps, and what is sent again."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial

import pytest
from bson import ObjectId

from testbed.api import WorkerProcess
from testbed.forks import WORKER
from testbed.processes import poll
from tests.lab import ago
from tests.place import PATIENCE_S, OpenPlace, Outcomes, Place, Scenario, Step, side_by_side
from tests.site import lease

# The search for lost messages waits a minute in earnest.
HURRY = """
import worker
worker.LostMessages.overdue_s = 1.0
"""
QUICK = Step("[tokens 1]")


def insert_expired(place: Place, name: str, **own: object) -> ObjectId:
    """Inserts a job whose worker died a moment ago."""
    started_at = datetime.now() - timedelta(seconds=20)
    bookkeeping = lease(lease_until=ago(3600), first_started_at=started_at, **own)
    return place.insert(name, QUICK, status="processing", started_at=started_at, worker=bookkeeping)


def children_that_live_for_one_job(place: Place) -> None:
    command = [str(WORKER), "run", "--max-tasks-per-child=1"]
    worker = WorkerProcess(place.environment, place.folder / "worker.log", command)
    place.workers.append(worker)
    worker.wait_ready(PATIENCE_S)
    expired = insert_expired(place, "expired")

    def is_rescued() -> bool:
        place.api.wait(place.submit(f"traffic {ObjectId()}", QUICK))
        return bool(place.api.status(expired) == "completed")

    poll(is_rescued, PATIENCE_S)
    pids = {document["worker"]["pid"] for document in place.api.jobs.find()}
    assert len(pids) == place.api.jobs.count_documents({}), "each child runs one job"


def two_queues(place: Place) -> None:
    """One queue has a backlog, and the worker of the other one has nothing to do."""
    place.add_module(HURRY)
    place.start_worker(WORKER_CONCURRENCY="1").wait_ready(PATIENCE_S)
    place.start_worker(CELERY_QUEUE_NAME="idle", TEXT_MODEL="the other queue's")
    place.wait_ready()
    jobs = [place.submit(f"slow {number}", Step("[delay 0.4]")) for number in range(12)]
    expired = insert_expired(place, "of the idle queue", queue="idle")
    for job in [*jobs, expired]:
        place.api.wait(job, timeout_s=PATIENCE_S)
    assert {place.api.document(job)["output_data"]["model_used"] for job in jobs} == {"testbed-model"}
    assert {len(place.provider.calls_for(place.prompts[job])) for job in jobs} == {1}
    assert place.api.document(expired)["output_data"]["model_used"] == "the other queue's"


def priorities(place: Place) -> None:
    """Many jobs of a low priority wait behind a few of a high one, and the API's clock is an hour behind."""
    place.add_module(HURRY)
    place.start_worker(WORKER_CONCURRENCY="1").wait_ready(PATIENCE_S)
    low = [place.insert(f"low {number}", Step("[delay 0.1]"), created_at=ago(3600)) for number in range(40)]
    for job in low:
        place.api.enqueue(job, priority=9)
    lost = place.insert("lost", QUICK, created_at=ago(3600))
    high = []
    for number in range(3):
        high.append(place.insert(f"high {number}", Step("[delay 0.1]")))
        place.api.enqueue(high[-1], priority=0)
    for job in [*low, *high, lost]:
        place.api.wait_notice(job, "completed", timeout_s=PATIENCE_S)
    assert place.goes_on()
    for job in [*low, *high, lost]:
        assert place.api.notices(job) == ["processing", "completed"]
        assert len(place.provider.calls_for(place.prompts[job])) == 1
    last_high = max(place.api.document(job)["started_at"] for job in high)
    assert place.api.document(low[-1])["started_at"] > last_high
    assert place.api.document(lost)["started_at"] > place.api.document(low[0])["started_at"]


def the_one_that_has_the_turn_is_stopped(place: Place) -> None:
    """The others sweep soon after."""
    first = place.start_worker(WORKER_POOL="solo").wait_ready(PATIENCE_S)
    poll(lambda: place.api.database["worker_turns"].find_one({"_id": "sweep"}), PATIENCE_S)
    place.start_worker(WORKER_POOL="solo").wait_ready(PATIENCE_S)
    first.signal(signal.SIGSTOP)
    expired = insert_expired(place, "expired")
    assert place.api.wait(expired, timeout_s=PATIENCE_S)["status"] == "completed"
    first.signal(signal.SIGCONT)


def one_that_sweeps_every_ten_minutes(place: Place) -> None:
    """It had the turn last. The others keep to their own interval."""
    place.start_worker(WORKER_POOL="solo", SWEEP_INTERVAL="600").wait_ready(PATIENCE_S)
    poll(lambda: place.api.database["worker_turns"].find_one({"_id": "sweep"}), PATIENCE_S)
    place.start_worker(WORKER_POOL="solo").wait_ready(PATIENCE_S)
    expired = insert_expired(place, "expired")
    assert place.api.wait(expired, timeout_s=PATIENCE_S)["status"] == "completed"


# Stops its own process in the middle of a sweep, behind the first job that it has put back, and before it runs that.
STOPS_IN_MID_SWEEP = """
import os, signal, threading, worker
enqueue = worker.Sweeper._enqueue
worker.JobStore.claim = lambda *_, **__: threading.Event().wait()

def stop_behind(self, *arguments):
    enqueue(self, *arguments)
    os.kill(os.getpid(), signal.{signal})

worker.Sweeper._enqueue = stop_behind
"""


def ends_in_mid_sweep(place: Place, signal_name: str) -> None:
    """The process that has the turn is stopped or killed while it sweeps. Another one goes on within a few sweeps."""
    place.add_module(STOPS_IN_MID_SWEEP.format(signal=signal_name))
    first = place.start_worker(WORKER_POOL="solo").wait_ready(PATIENCE_S)
    poll(lambda: place.api.database["worker_turns"].find_one({"_id": "sweep"}), PATIENCE_S)
    del place.environment["HANDLER_MODULES"]
    jobs = [insert_expired(place, f"expired {number}") for number in range(5)]
    poll(lambda: place.api.jobs.count_documents({"worker.owner": None}), PATIENCE_S)
    ended_at = time.monotonic()
    place.start_worker(WORKER_POOL="solo")
    for job in jobs:
        assert place.api.wait(job, timeout_s=PATIENCE_S)["status"] == "completed"
    assert time.monotonic() < ended_at + 45
    assert {len(place.provider.calls_for(place.prompts[job])) for job in jobs} == {1}
    with suppress(ProcessLookupError):
        first.signal(signal.SIGCONT)


def mongodb_cant_be_found_at_first(place: Place) -> None:
    """Its name doesn't resolve for some seconds after the worker's start."""
    place.add_module(
        """
import time, pymongo, worker
from pymongo.errors import ConfigurationError
until, connect = time.monotonic() + 4, pymongo.MongoClient

def find(*arguments, **options):
    if time.monotonic() < until:
        raise ConfigurationError("The DNS query name does not exist: _mongodb._tcp.host.")
    return connect(*arguments, **options)

worker.pymongo.MongoClient = find
"""
    )
    place.start_worker().wait_ready(PATIENCE_S)
    job = place.submit("early", QUICK)
    assert place.health() == 0
    place.wait_log("leases and sweeps wait for MongoDB: ConfigurationError")
    assert place.calls("early") == []
    assert place.api.wait(job, timeout_s=PATIENCE_S)["status"] == "completed"
    expired = insert_expired(place, "expired")
    assert place.api.wait(expired, timeout_s=PATIENCE_S)["status"] == "completed"
    assert len(place.calls("early")) == 1


def a_lost_message(place: Place) -> None:
    place.add_module(HURRY)
    place.start_worker()
    job = place.insert("lost", QUICK)
    assert place.api.wait(job, timeout_s=PATIENCE_S)["status"] == "completed"
    place.api.wait_notice(job, "completed")
    assert place.api.notices(job) == ["processing", "completed"]


SCENARIOS: dict[str, Scenario] = {
    "one job a child": children_that_live_for_one_job,
    "two queues": two_queues,
    "priorities": priorities,
    "stopped in its turn": the_one_that_has_the_turn_is_stopped,
    "seldom": one_that_sweeps_every_ten_minutes,
    "stopped in mid-sweep": partial(ends_in_mid_sweep, signal_name="SIGSTOP"),
    "killed in mid-sweep": partial(ends_in_mid_sweep, signal_name="SIGKILL"),
    "lost message": a_lost_message,
    "MongoDB not found": mongodb_cant_be_found_at_first,
}


@pytest.fixture(scope="module", autouse=True)
def outcomes(open_place: OpenPlace) -> Iterator[Outcomes]:
    with side_by_side(open_place, SCENARIOS) as outcomes:
        yield outcomes


def test_jobs_are_rescued_though_no_child_lives_longer_than_a_job(outcomes: Outcomes) -> None:
    outcomes["one job a child"].result()


def test_a_pending_job_whose_message_was_lost_is_put_into_the_queue_again(outcomes: Outcomes) -> None:
    outcomes["lost message"].result()


def test_two_queues_on_one_database_keep_their_jobs(outcomes: Outcomes) -> None:
    outcomes["two queues"].result()


def test_jobs_of_all_priorities_run_once_in_their_order_and_a_lost_one_behind_them(outcomes: Outcomes) -> None:
    outcomes["priorities"].result()


def test_another_worker_sweeps_when_the_one_that_has_the_turn_is_stopped(outcomes: Outcomes) -> None:
    outcomes["stopped in its turn"].result()


def test_a_worker_that_sweeps_seldom_keeps_no_other_from_it(outcomes: Outcomes) -> None:
    outcomes["seldom"].result()


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_another_worker_goes_on_when_the_sweeper_ends_in_the_middle_of_a_sweep(outcomes: Outcomes, how: str) -> None:
    outcomes[f"{how} in mid-sweep"].result()


def test_no_job_begins_before_mongodb_is_found_and_leases_are_kept_from_then_on(outcomes: Outcomes) -> None:
    outcomes["MongoDB not found"].result()
