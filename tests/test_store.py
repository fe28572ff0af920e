"""The job store on a real MongoDB: races, documents of any kind, indexes, outages and rights."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import pymongo
import pytest
from bson import ObjectId

import worker
from testbed.servers import MongoServer
from tests.lab import (
    DELIVERY,
    NOWHERE,
    PNG,
    Ago,
    Notices,
    ago,
    bare_settings,
    change,
    claim,
    insert,
    new_sweeper,
    queued,
    read,
    some_job,
    stale,
    table,
)
from worker import Job, JobStore, NotClaimed, Reason, Runtime
from workerkit.bookkeeping import Bookkeeping, Snapshot
from workerkit.errors import StoreRefused, StoreUnavailable
from workerkit.mongodb import ServerClock
from workerkit.notes import REVOKED, RevokedTask

# ── races ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_of_fifty_claims_at_once_exactly_one_wins(runtime: Runtime) -> None:
    job_id, barrier = insert(runtime), threading.Barrier(50)

    def race(number: int) -> Job | NotClaimed:
        barrier.wait()
        return runtime.store.claim(job_id, f"owner-{number}", DELIVERY)

    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(race, range(50)))
    [winner] = [answer for answer in answers if isinstance(answer, Job)]
    assert {answer.reason for answer in answers if isinstance(answer, NotClaimed)} == {Reason.HELD}
    assert read(runtime, job_id)["worker"]["owner"] == winner.owner


def test_of_two_sweepers_one_releases(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(5))
    [lost] = runtime.store.find_stale()
    assert [bool(runtime.store.release_stale(lost)) for _ in range(2)] == [True, False]


def test_of_several_jobs_those_are_released_that_have_not_changed(runtime: Runtime) -> None:
    jobs = [claim(runtime, owner=f"owner-{number}") for number in range(4)]
    for job in jobs:
        change(runtime, job.id, worker__lease_until=ago(5))
    stale = list(runtime.store.find_stale())
    runtime.store.renew_leases([jobs[0]])
    assert runtime.store.complete(jobs[1], {}, None)
    released = runtime.store.release_together(stale)
    assert set(released) == {jobs[2].id, jobs[3].id}
    assert [read(runtime, job.id)["worker"]["rescues"] for job in jobs[2:]] == [1, 1]
    assert runtime.store.release_together(stale) == {}


def test_an_orphan_that_got_a_claim_in_between_is_left_alone(runtime: Runtime) -> None:
    job_id = insert(runtime, status="processing", started_at=ago(3600))
    [lost] = runtime.store.find_stale()
    change(runtime, job_id, worker__owner="owner-1")
    assert not runtime.store.release_stale(lost)


def test_of_eight_sweepers_at_once_one_rescues_each_job(runtime: Runtime, notices: Notices) -> None:
    lost, done_for = ([claim(runtime) for _ in range(5)] for _ in range(2))
    for job in lost + done_for:
        change(runtime, job.id, worker__lease_until=ago(5), worker__attempt=4 if job in done_for else 1)
    with ThreadPoolExecutor(8) as threads:
        rounds = list(threads.map(lambda _: new_sweeper(runtime).sweep(), range(8)))
    assert len([line for lines in rounds for line in lines]) == 10
    assert len(queued(runtime)) == 5
    assert len(notices.statuses(5)) == 5


# ── whose job it is ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_attempt_whose_document_was_deleted_writes_nothing(runtime: Runtime) -> None:
    job, store = claim(runtime), runtime.store
    runtime.database["jobs"].delete_one({"_id": job.id})
    assert not store.complete(job, {}, None)
    assert not store.fail(job, "No.")
    assert not store.release(job, ago(0), counted=False)
    assert store.read(job.id) is None


def test_a_repeated_release_does_nothing_once_the_job_was_cancelled(runtime: Runtime) -> None:
    job = claim(runtime)
    assert runtime.store.release(job, ago(0), counted=False)
    change(runtime, job.id, status="failed")
    assert not runtime.store.release(job, ago(0), counted=False)


@table(
    "fields",
    ("an attempt runs it", {}),
    ("it has ended", {"status": "completed"}),
    ("it ended without an owner", {"status": "failed", "worker__owner": None}),
)
def test_a_job_that_is_run_or_ended_is_not_failed_without_a_claim(runtime: Runtime, fields: dict[str, Any]) -> None:
    job = claim(runtime)
    change(runtime, job.id, **fields)
    before = read(runtime, job.id)
    assert not runtime.store.fail_unowned(job.id, "Damaged.")
    assert read(runtime, job.id) == before


def test_an_older_workers_running_job_is_not_failed_without_a_claim(runtime: Runtime) -> None:
    assert not runtime.store.fail_unowned(insert(runtime, status="processing"), "Damaged.")


@table(
    "fields",
    ("another attempt's lease", {"worker__owner": "owner-2"}),
    ("a released job", {"worker__owner": None}),
    ("an ended job", {"status": "failed"}),
)
def test_a_renewal_touches_only_what_is_still_owned(runtime: Runtime, fields: dict[str, Any]) -> None:
    job, other = claim(runtime), claim(runtime, owner="owner-3")
    change(runtime, job.id, worker__lease_until=ago(5), **fields)
    before = read(runtime, job.id)
    runtime.store.renew_leases([job, other])
    assert read(runtime, job.id) == before


def test_a_job_that_the_api_cancels_while_it_runs_is_found_among_those_that_ended(runtime: Runtime) -> None:
    cancelled, failed, completed, running = (claim(runtime, owner=f"owner-{number}") for number in range(4))
    runtime.store.fail(failed, "No.")
    runtime.store.complete(completed, {}, None)
    change(runtime, cancelled.id, status="failed", error_message="Cancelled.")
    assert runtime.store.find_cancelled() == [cancelled.id]
    assert runtime.store.renew_leases([running]) == []
    assert runtime.store.renew_leases([running, cancelled]) == [cancelled]


# ── lost jobs ────────────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "fields",
    ("its lease ran out", {"worker__lease_until": Ago(5)}),
    ("released, and its message was lost", {"worker__owner": None, "worker__rescue_at": Ago(5)}),
    ("an older worker's", {"worker": None, "started_at": Ago(3600)}),
    ("an older worker's without start", {"worker": None, "started_at": None, "updated_at": Ago(3600)}),
    ("an older worker's without any time", {"worker": None, "started_at": None, "updated_at": 1, "created_at": None}),
)
def test_a_job_that_no_attempt_works_on_is_stale(runtime: Runtime, fields: dict[str, Any]) -> None:
    job = claim(runtime)
    change(runtime, job.id, **fields)
    assert stale(runtime) == [job.id]


@table(
    "fields",
    ("its lease is live", {}),
    ("released a moment ago", {"worker__owner": None, "worker__rescue_at": Ago(-600)}),
    ("its end needs no lease", {"status": "completed", "worker__lease_until": Ago(5)}),
    ("an older worker may still work on it", {"worker": None, "started_at": Ago(-1800)}),
    ("the same, rescued while it was pending", {"worker": {"rescue_at": Ago(5)}, "started_at": Ago(-1800)}),
    ("pending is another matter", {"status": "pending", "worker": None, "created_at": Ago(3600)}),
)
def test_a_job_that_an_attempt_works_on_is_not_stale(runtime: Runtime, fields: dict[str, Any]) -> None:
    job = claim(runtime)
    change(runtime, job.id, **fields)
    assert stale(runtime) == []


def test_orphan_after_is_a_setting(runtime: Runtime) -> None:
    runtime.settings.orphan_after = 5
    job_id = insert(runtime, status="processing", started_at=ago(10))
    assert stale(runtime) == [job_id]


def test_a_failed_stale_job_keeps_the_sentence(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(5))
    [lost] = runtime.store.find_stale()
    assert runtime.store.fail_seen(lost, "Given up.")
    assert read(runtime, job.id)["error_message"] == "Given up."


def test_siblings_are_the_jobs_of_this_node(runtime: Runtime) -> None:
    mine, other, released = (claim(runtime, owner=f"owner-{number}") for number in range(3))
    change(runtime, other.id, worker__node="another-node")
    runtime.store.release(released, ago(0), counted=True)
    assert [job.id for job in runtime.store.find_siblings()] == [mine.id]


# ── odd documents and results ────────────────────────────────────────────────────────────────────────────────────────


@table(
    "text",
    ("an operator of MongoDB", "$inc"),
    ("a reference to a field", "$status"),
    ("dots", "worker.owner"),
    ("null characters", "a\0b"),
    ("another script", "смысл 🜲"),
)
def test_a_generated_text_is_stored_verbatim(runtime: Runtime, text: str) -> None:
    job = claim(runtime)
    runtime.store.complete(job, {"generated_text": text}, None)
    assert read(runtime, job.id)["output_data"] == {"generated_text": text}


@table(
    "input_data, output",
    ("an output over 16 MB", {}, {"generated_text": "x" * 17_000_000}),
    ("an output that makes the document so", {"prompt": "x" * 9_000_000}, {"a": "x" * 9_000_000}),
    ("a number beyond 64 bits", {}, {"tokens_used": 2**64}),
)
def test_a_result_that_no_document_can_hold_is_refused(
    runtime: Runtime, input_data: dict[str, str], output: dict[str, Any]
) -> None:
    job = claim(runtime, insert(runtime, input_data=input_data))
    with pytest.raises(StoreRefused):
        runtime.store.complete(job, output, None)


@table(
    "output",
    ("an object of Python", {"generated_text": {1, 2}}),
    ("half a character", {"model_used": "\ud83d"}),
    ("a field's name that isn't text", {1: "x"}),
    ("a null character in a field's name", {"a\0b": "x"}),
)
def test_a_result_that_is_no_document_is_refused(runtime: Runtime, output: dict[Any, Any]) -> None:
    with pytest.raises(StoreRefused):
        runtime.store.complete(claim(runtime), output, None)


# ── indexes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_indexes_are_made_and_made_again_without_harm(runtime: Runtime) -> None:
    for _ in range(2):
        runtime.store.ensure_indexes()
    names = set(runtime.database["jobs"].index_information())
    assert names == {"_id_", "worker_status_id", "worker_node", "worker_unnotified", "worker_cancelled"}


def test_an_index_that_is_there_under_another_name_costs_no_other(runtime: Runtime) -> None:
    runtime.database["jobs"].drop_indexes()
    runtime.database["jobs"].create_index([("status", 1), ("_id", 1)], name="the_apis")
    runtime.store.ensure_indexes()
    assert {"the_apis", "worker_node", "worker_cancelled"} <= set(runtime.database["jobs"].index_information())
    runtime.database["jobs"].drop_indexes()


@table(
    "question, index",
    ("jobs that run", {"status": "processing"}, "worker_status_id"),
    ("the outbox", {"worker.unnotified": {"$lte": datetime(2026, 1, 1)}}, "worker_unnotified"),
)
def test_a_sweep_reads_by_index(runtime: Runtime, question: dict[str, Any], index: str) -> None:
    runtime.store.ensure_indexes()
    plan = runtime.database["jobs"].find(question).explain()
    assert index in json.dumps(plan["queryPlanner"]["winningPlan"], default=str)


class Questions(pymongo.monitoring.CommandListener):
    """Every `find` that a client sends."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def started(self, event: pymongo.monitoring.CommandStartedEvent) -> None:
        if event.command_name == "find":
            parts = ("find", "filter", "sort", "limit", "projection")
            self.asked.append({part: event.command[part] for part in parts if part in event.command})

    def succeeded(self, event: pymongo.monitoring.CommandSucceededEvent) -> None: ...

    def failed(self, event: pymongo.monitoring.CommandFailedEvent) -> None: ...


OLD_JOBS, JOBS_ELSEWHERE, LIVE_JOBS = 2000, 200, 20
RUNNING = JOBS_ELSEWHERE + LIVE_JOBS


API_INDEXES = ("user_id", "status", "job_type", "created_at", [("user_id", 1), ("created_at", 1)])


def fill_with_old_and_live_jobs(runtime: Runtime) -> None:
    """With the API's own indexes beside the worker's, among which MongoDB has to choose."""
    jobs, common = runtime.database["jobs"], {"user_id": "u", "job_type": "text_generation", "started_at": ago(500)}
    lease = {"owner": "owner-1", "node": worker.NODE, "pid": 1, "lease_until": ago(-60), "attempt": 1}
    elsewhere = {**lease, "node": "another node"}
    jobs.insert_many([{**common, "status": "processing", "worker": elsewhere} for _ in range(JOBS_ELSEWHERE)])
    states = {"completed": OLD_JOBS, "failed": OLD_JOBS, "processing": LIVE_JOBS, "pending": LIVE_JOBS}
    for status, count in states.items():
        own = {**lease, "lease_until": ago(60)} if status in ("completed", "failed") else lease
        started = {} if status == "pending" else {"worker": own}
        jobs.insert_many([{**common, **started, "status": status, "created_at": ago(900 + n)} for n in range(count)])
    for index in API_INDEXES:
        jobs.create_index(index)
    runtime.store.ensure_indexes()


@table(
    "look, at_most",
    ("stale jobs", lambda store: list(store.find_stale()), RUNNING),
    ("stale jobs behind another", lambda store: list(store.find_stale(ObjectId())), 0),
    ("jobs of this node", lambda store: store.find_siblings(), LIVE_JOBS),
    ("pending jobs, by their ids alone", lambda store: store.pending_ids(), 0),
    ("those of some jobs that are pending", lambda store: store.pending_ids([ObjectId()]), 0),
    ("the outbox", lambda store: list(store.find_unnotified(30)), 0),
    ("cancelled jobs", lambda store: store.find_cancelled(), 0),
)
def test_a_sweep_examines_only_jobs_that_run_or_wait(
    runtime: Runtime, look: Callable[[JobStore], object], at_most: int
) -> None:
    fill_with_old_and_live_jobs(runtime)
    questions = Questions()
    with pymongo.MongoClient[Any](
        runtime.settings.mongodb_url.get_secret_value(), event_listeners=[questions]
    ) as client:
        look(Runtime(runtime.settings, client).store)
    assert questions.asked
    for question in questions.asked:
        explained = runtime.database.command("explain", question, verbosity="executionStats")
        assert "COLLSCAN" not in json.dumps(explained["queryPlanner"]["winningPlan"], default=str), question
        assert explained["executionStats"]["totalDocsExamined"] <= at_most, question


# ── the database's time ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_clock_takes_the_databases_time(runtime: Runtime) -> None:
    runtime.store.clock.synchronise(datetime(2001, 1, 1, tzinfo=UTC))
    runtime.store.clock.read()
    assert abs(runtime.store.clock.now() - datetime.now(UTC)) < timedelta(minutes=1)


def test_a_process_asks_for_the_databases_time_before_it_judges_a_lease(runtime: Runtime) -> None:
    claim(runtime)
    ahead = ServerClock(runtime.database)
    ahead.synchronise(ago(-3600))
    ahead.is_synchronised = False
    assert next(JobStore(runtime.database, "another-node", ahead, runtime.settings).find_stale(), None) is None


def test_a_database_without_a_time_of_its_own_leaves_the_hosts(light_runtime: Runtime) -> None:
    light_runtime.store.clock.read()
    assert abs(light_runtime.store.clock.now() - datetime.now(UTC)) < timedelta(minutes=1)


# ── MongoDB away, or without the right ───────────────────────────────────────────────────────────────────────────────


def store_on(client: pymongo.MongoClient[Any]) -> JobStore:
    return JobStore(client["away"], "node", ServerClock(client["away"]), bare_settings())


NOBODY = Snapshot({"_id": ObjectId(), "status": "processing"}, Bookkeeping())
EVERY_VERB: list[Callable[[JobStore], object]] = [
    lambda store: store.clock.read(),
    lambda store: store.ensure_indexes(),
    lambda store: store.read(ObjectId()),
    lambda store: store.claim(ObjectId(), "owner-1", DELIVERY),
    lambda store: store.complete(some_job(), {}, None),
    lambda store: store.fail(some_job(), "No."),
    lambda store: store.release(some_job(), ago(0), counted=True),
    lambda store: store.fail_unowned(ObjectId(), "No."),
    lambda store: store.renew_leases([some_job()]),
    lambda store: store.find_lost([some_job()]),
    lambda store: store.find_cancelled(),
    lambda store: store.mark_notified([(ObjectId(), "owner-1")]),
    lambda store: list(store.find_unnotified(0)),
    lambda store: store.find_siblings(),
    lambda store: store.look(ObjectId()),
    lambda store: list(store.find_stale()),
    lambda store: store.release_stale(NOBODY),
    lambda store: store.release_together([NOBODY]),
    lambda store: store.fail_seen(NOBODY, "No."),
    lambda store: store.fail_revoked(RevokedTask(str(ObjectId()), "task", REVOKED), "No."),
    lambda store: store.undo_rescue(ObjectId(), {}),
    lambda store: store.pending_ids(),
    lambda store: store.find_unreferenced(["0" * 24 + "-x.png"]),
]


def test_every_verb_raises_while_mongodb_is_away() -> None:
    with pymongo.MongoClient[Any](f"mongodb://{NOWHERE}", timeoutMS=50) as client, ThreadPoolExecutor(20) as threads:
        tries = [threads.submit(verb, store_on(client)) for verb in EVERY_VERB]
        assert {type(one.exception()) for one in tries} == {StoreUnavailable}


@pytest.mark.servers
def test_a_mongodb_that_freezes_in_mid_write_leaves_the_outcome_unknown() -> None:
    with MongoServer() as server, pymongo.MongoClient[Any](server.url) as client:
        store = store_on(client)
        assert store.read(ObjectId()) is None
        server.pause()
        with pymongo.timeout(0.5), pytest.raises(StoreUnavailable):
            store.claim(ObjectId(), "owner-1", DELIVERY)
        server.resume()


@pytest.mark.servers
def test_the_contracts_user_may_do_all_that_the_worker_does() -> None:
    with MongoServer(auth=True) as server, closing(Runtime(bare_settings(mongodb_url=server.url))) as runtime:
        runtime.store.ensure_indexes()
        job = claim(runtime)
        assert runtime.artifacts.publish("a.png", PNG)
        assert runtime.store.complete(job, {}, None)


@pytest.mark.servers
def test_a_user_without_the_right_is_refused() -> None:
    with MongoServer(auth=True) as server, pymongo.MongoClient[Any](server.url, timeoutMS=2000) as client:
        with pytest.raises(StoreRefused, match="13: its user lacks the right"):
            store_on(client).ensure_indexes()
