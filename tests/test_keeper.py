"""Sweeper, keeper and file sweeper on a real MongoDB and a real Redis: the details beside the specification."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import NoPermissionError

import worker
from testbed.processes import poll
from tests.lab import (
    NOWHERE,
    PNG,
    ago,
    change,
    claim,
    deliver,
    gone_pid,
    insert,
    kept,
    new_sweeper,
    queued,
    read,
    redis_away,
    some_job,
    stale,
    table,
)
from worker import Job, Keeper, Notifier, Result, Runtime
from workerkit.broker import Broker
from workerkit.errors import DropJob, StoreRefused, StoreUnavailable
from workerkit.files import FileSweeper
from workerkit.notes import EXPIRED, REVOKED, RevokedTask, SharedNotes
from workerkit.preparation import Preparation
from workerkit.sentences import GAVE_UP
from workerkit.settings import Settings
from workerkit.turns import Turns

# ── sweeper ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_rescue_has_a_task_id_of_its_own(runtime: Runtime) -> None:
    job = claim(runtime)
    for _ in range(2):
        change(runtime, job.id, worker__owner=None, worker__rescue_at=ago(5))
        runtime.sweeper.sweep()
    assert len({message["id"] for message in queued(runtime)}) == 2


def test_a_sweep_that_finds_nothing_does_nothing(runtime: Runtime) -> None:
    claim(runtime)
    assert runtime.sweeper.sweep() == []
    assert queued(runtime) == []


def test_a_lost_job_at_its_bounds_with_a_kept_result_is_brought_to_its_end(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(5), worker__attempt=4)
    runtime.notes.keep_result(job.kept_name, Result({"generated_text": "kept"}))
    runtime.sweeper.sweep()
    assert len(queued(runtime)) == 1
    assert deliver(runtime, job.id)["status"] == "completed"


def test_a_notice_that_is_on_its_way_is_not_sent_twice(runtime: Runtime) -> None:
    runtime.store.complete(claim(runtime), {}, None)
    assert runtime.sweeper.sweep() == []


def test_a_notice_stays_in_the_outbox_while_redis_is_away(runtime: Runtime) -> None:
    failed, overdue = claim(runtime), claim(runtime, owner="owner-2")
    change(runtime, failed.id, worker__lease_until=ago(5), worker__attempt=4)
    runtime.store.complete(overdue, {}, None)
    change(runtime, overdue.id, worker__unnotified=ago(31))
    new_sweeper(runtime, notifier=Notifier(redis_away()), notes=SharedNotes(redis_away())).sweep()
    assert [document["_id"] for document in runtime.store.find_unnotified(0)] == [overdue.id]
    assert read(runtime, failed.id)["status"] == "processing", "Redis may have its result, but can't be asked"


def test_a_sweep_tries_a_hung_redis_once_only(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []
    notifier = Notifier(redis_away())
    monkeypatch.setattr(notifier, "publish_status", lambda *notice: tried.append(notice))
    for number in range(3):
        job = claim(runtime, owner=f"owner-{number}")
        runtime.store.complete(job, {}, None)
        change(runtime, job.id, worker__unnotified=ago(31))
    new_sweeper(runtime, notifier=notifier).sweep()
    assert len(tried) == 1


def test_a_rescue_without_broker_is_made_up_for_by_a_later_sweep(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(5))
    away = Celery("away", broker=f"redis://{NOWHERE}", set_as_current=False)
    assert new_sweeper(runtime, broker=Broker(away, "queue", worker.TASK_NAME, patience_s=0.1)).sweep() == []
    assert len(new_sweeper(runtime).sweep()) == 1


def test_only_the_notices_that_redis_took_leave_the_outbox(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    notifier, answers = Notifier(redis_away()), iter([True, False])
    monkeypatch.setattr(notifier, "publish_status", lambda *_notice: next(answers))
    for number in range(2):
        job = claim(runtime, owner=f"owner-{number}")
        runtime.store.complete(job, {}, None)
        change(runtime, job.id, worker__unnotified=ago(31))
    assert len(new_sweeper(runtime, notifier=notifier).sweep()) == 1
    assert len(list(runtime.store.find_unnotified(0))) == 1


@pytest.fixture
def tried(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The messages that could not be sent, since the broker is away."""
    tried: list[object] = []

    def fail(*arguments: object, **_options: object) -> None:
        tried.append(arguments)
        raise OSError("the broker is away")

    monkeypatch.setattr(runtime.broker, "send", fail)
    return tried


def test_a_rescue_whose_message_cant_be_sent_is_due_soon_again_and_does_not_count(
    runtime: Runtime, tried: list[object]
) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(5))
    new_sweeper(runtime).sweep()
    assert len(tried) == 1
    left = read(runtime, job.id)["worker"]
    assert left["rescues"] == 0
    assert left["rescue_at"] <= ago(-runtime.settings.sweep_interval).replace(tzinfo=None)


@pytest.fixture
def other_queue(runtime: Runtime) -> Runtime:
    """A runtime of another queue on the same database."""
    for name in (runtime.settings.celery_queue_name, "other_queue"):
        runtime.turns.register(name)
    other = Runtime(runtime.settings.model_copy(update={"celery_queue_name": "other_queue"}))
    other.mongo, other.redis = runtime.mongo, runtime.redis
    return other


def test_a_sweep_fails_what_was_revoked_in_another_queue(runtime: Runtime, other_queue: Runtime) -> None:
    other_queue.notes.note_revoked(RevokedTask(str(insert(runtime)), "task", EXPIRED))
    assert len(runtime.sweeper.sweep()) == 1
    assert other_queue.notes.revoked() == []


def test_a_sweep_finds_the_result_that_a_worker_of_another_queue_has_kept(
    runtime: Runtime, other_queue: Runtime
) -> None:
    job = claim(other_queue, insert(runtime))
    other_queue.notes.keep_result(job.kept_name, Result({"generated_text": "paid"}))
    change(runtime, job.id, worker__lease_until=ago(5), worker__attempt=4)
    runtime.sweeper.sweep()
    assert read(runtime, job.id)["status"] == "processing"
    assert runtime.redis.llen("other_queue") == 1
    runtime.redis.delete("other_queue")


def test_a_queue_to_which_nothing_can_be_sent_costs_only_its_own_jobs(
    runtime: Runtime, other_queue: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [claim(other_queue, insert(runtime), owner=f"owner-{number}") for number in range(3)]
    for job in (*others, claim(runtime, owner="own")):
        change(runtime, job.id, worker__lease_until=ago(5))
    send = runtime.broker.send

    def refuse(job_id: ObjectId, queue: str | None, *args: Any, **options: Any) -> None:
        if queue == "other_queue":
            raise OperationalError("NOPERM")
        send(job_id, queue, *args, **options)

    monkeypatch.setattr(runtime.broker, "send", refuse)
    assert len(runtime.sweeper.sweep()) == 1
    assert runtime.sweeper.had_fault
    assert len(queued(runtime)) == 1
    assert [read(runtime, job.id)["worker"]["rescues"] for job in others] == [0, 0, 0], "they wait no longer for it"


def test_a_fault_gives_the_turn_to_others_though_the_time_is_over_as_well(
    runtime: Runtime, tried: list[object]
) -> None:
    change(runtime, claim(runtime).id, worker__lease_until=ago(5))
    sweeper = new_sweeper(runtime)
    sweeper.budget_s = 0.0
    sweeper.sweep()
    assert len(tried) == 1
    assert (sweeper.had_fault, sweeper.has_turn) == (True, False)


def test_revoked_tasks_of_a_queue_that_may_not_be_read_keep_no_others_back(
    runtime: Runtime, other_queue: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.notes.note_revoked(RevokedTask(str(insert(runtime)), "task", EXPIRED))
    members = runtime.redis.smembers

    def refuse(key: str) -> object:
        if "other_queue" in key:
            raise NoPermissionError
        return members(key)

    monkeypatch.setattr(runtime.redis, "smembers", refuse)
    assert len(runtime.sweeper.sweep()) == 1


def test_a_kept_result_that_may_not_be_read_costs_no_rescue(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    used_up, lost = claim(runtime), claim(runtime, owner="owner-2")
    change(runtime, used_up.id, worker__lease_until=ago(5), worker__attempt=4)
    change(runtime, lost.id, worker__lease_until=ago(5))

    def refuse(_key: str) -> None:
        raise NoPermissionError

    monkeypatch.setattr(runtime.redis, "get", refuse)
    assert len(new_sweeper(runtime).sweep()) == 2
    assert read(runtime, used_up.id)["error_message"] == GAVE_UP


def test_a_redis_that_is_away_costs_only_the_jobs_that_may_have_a_kept_result(runtime: Runtime) -> None:
    used_up, lost = claim(runtime), claim(runtime, owner="owner-2")
    change(runtime, used_up.id, worker__lease_until=ago(5), worker__attempt=4)
    change(runtime, lost.id, worker__lease_until=ago(5))
    sweeper = new_sweeper(runtime, notes=SharedNotes(redis_away()))
    assert len(sweeper.sweep()) == 1
    assert sweeper.had_fault
    assert stale(runtime) == [used_up.id]


def test_the_end_of_a_job_whose_owner_is_odd_is_published_once(runtime: Runtime) -> None:
    odd = {"owner": ["x"], "attempt": 1, "unnotified": ago(100)}
    insert(runtime, status="failed", error_message="No.", worker=odd)
    sweeper = new_sweeper(runtime)
    assert [len(sweeper.sweep()) for _ in range(3)] == [1, 0, 0]


def test_a_running_job_whose_status_is_gone_is_lost(runtime: Runtime) -> None:
    attempt = kept(runtime)
    runtime.database["jobs"].update_one({"_id": attempt.job.id}, {"$unset": {"status": ""}})
    runtime.keeper.tick()
    assert isinstance(attempt.reason, DropJob)
    assert not runtime.store.fail(attempt.job, "No.")


def test_a_revoked_job_is_failed_once(runtime: Runtime) -> None:
    runtime.notes.note_revoked(RevokedTask(str(insert(runtime)), "task", REVOKED))
    assert [len(runtime.sweeper.sweep()) for _ in range(2)] == [1, 0]
    assert runtime.notes.revoked() == []


@table("fields", ("its process lives", {}), ("of another node", {"worker__pid": 2**22, "worker__node": "other"}))
def test_a_job_of_a_living_or_foreign_process_is_left_alone(runtime: Runtime, fields: dict[str, Any]) -> None:
    job = claim(runtime)
    change(runtime, job.id, **fields)
    assert runtime.sweeper.release_dead_siblings() == []


# ── keeper ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_lease_is_renewed_three_times_in_its_length(runtime: Runtime, at: list[float]) -> None:
    attempt, renewals, runtime.rest.at = kept(runtime), set(), at[0] + 60  # a sweep would renew it, too
    for _ in range(12):
        runtime.keeper.tick()
        renewals.add(attempt.renewed_at)
        at[0] += runtime.settings.lease_seconds / 12
    assert len(renewals) == 3


@table(
    "is_turn_of_another, is_renewed",
    ("it has the turn", False, True),
    ("another process has the turn, so it doesn't sweep", True, False),
)
def test_a_process_renews_its_leases_before_it_sweeps(
    runtime: Runtime, at: list[float], is_turn_of_another: bool, is_renewed: bool
) -> None:
    """A sweep may take seconds, for example while a broker that hangs takes no message."""
    runtime.rest.at = None
    attempt = kept(runtime)
    runtime.keeper._sweep_at = math.inf
    runtime.keeper.tick()
    at[0] += runtime.settings.lease_seconds / 6  # no renewal is due yet
    if is_turn_of_another:
        Turns(runtime.database, runtime.store.now).take(runtime.sweeper.TURN, 60)
    runtime.keeper._sweep_at = 0.0
    runtime.keeper.tick()
    assert (attempt.renewed_at == at[0]) is is_renewed


@table(
    "note, asks",
    ("no worker watches", None, True),
    ("a worker watches, and nothing was cancelled", [], False),
    ("another job was cancelled", [ObjectId()], False),
)
def test_a_keeper_asks_mongodb_what_was_cancelled_only_where_it_has_to(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, note: list[ObjectId] | None, asks: bool
) -> None:
    kept(runtime)
    runtime.keeper.tick()
    asked: list[object] = []

    def find_lost(jobs: list[Job]) -> list[Job]:
        asked.append(jobs)
        return []

    monkeypatch.setattr(runtime.store, "find_lost", find_lost)
    if note is not None:
        runtime.notes.note_cancelled([runtime.settings.celery_queue_name], note)
    runtime.keeper.tick()
    assert bool(asked) is asks
    runtime.redis.delete(f"cancelled:{runtime.settings.celery_queue_name}:{runtime.settings.database_name}")


def test_the_process_that_has_the_turn_tells_the_others_what_was_cancelled(runtime: Runtime) -> None:
    runtime.rest.at = None
    runtime.keeper.tick()
    poll(lambda: runtime.preparation.has_indexes, 10)
    cancelled = kept(runtime)
    change(runtime, cancelled.job.id, status="failed")
    runtime.keeper.tick()
    assert runtime.notes.cancelled() == {str(cancelled.job.id)}
    assert isinstance(cancelled.reason, DropJob)
    runtime.redis.delete(f"cancelled:{runtime.settings.celery_queue_name}:{runtime.settings.database_name}")


def test_no_process_watches_for_cancels_until_there_is_an_index_for_it(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look would read every job that has ever failed. So each process looks for its own jobs alone."""

    def refuse() -> None:
        raise StoreRefused("OperationFailure 13")

    monkeypatch.setattr(runtime.store, "ensure_indexes", refuse)
    runtime.rest.at = None
    runtime.keeper.tick()
    cancelled = kept(runtime)
    change(runtime, cancelled.job.id, status="failed")
    runtime.keeper.tick()
    assert runtime.notes.cancelled() is None
    assert isinstance(cancelled.reason, DropJob)


def test_what_a_process_of_the_node_held_is_released_once_it_was_replaced(runtime: Runtime) -> None:
    runtime.keeper.tick()
    job = claim(runtime)
    change(runtime, job.id, worker__pid=gone_pid())
    runtime.keeper.tick()
    assert read(runtime, job.id)["worker"]["owner"] == job.owner
    runtime.forks.increase()
    runtime.keeper.tick()
    assert read(runtime, job.id)["worker"]["owner"] is None


def test_a_result_that_was_kept_before_the_hard_limit_is_not_thrown_away(runtime: Runtime) -> None:
    job = claim(runtime)
    runtime.notes.keep_result(job.kept_name, Result({"generated_text": "paid"}))
    change(runtime, job.id, worker__pid=gone_pid(), worker__deadline=ago(0))
    assert runtime.sweeper.release_dead_siblings() == [f"job={job.id} its process died: released"]


def test_a_result_that_may_be_kept_is_not_thrown_away_while_redis_cant_be_asked(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__pid=gone_pid(), worker__deadline=ago(0))
    assert new_sweeper(runtime, notes=SharedNotes(redis_away())).release_dead_siblings() == []
    assert read(runtime, job.id)["status"] == "processing"


def test_the_queue_is_registered_and_the_indexes_are_made_in_spite_of_a_refusal(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_queue: str) -> None:
        raise StoreRefused("OperationFailure 121")

    monkeypatch.setattr(runtime.turns, "register", refuse)
    runtime.keeper.tick()
    poll(lambda: runtime.preparation.has_indexes, 10)


def test_indexes_that_could_not_be_made_are_tried_again_soon(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def fail() -> None:
        tries.append(1)
        raise StoreUnavailable("AutoReconnect")

    preparation = Preparation(runtime.turns, runtime.settings.celery_queue_name, fail)
    monkeypatch.setattr(preparation, "AGAIN_S", 0.0)

    def is_tried_again() -> bool:
        preparation.do_if_due()
        return len(tries) > 1

    poll(is_tried_again, 10)


def test_the_lease_of_an_ended_attempt_is_not_renewed(runtime: Runtime) -> None:
    attempt = kept(runtime)
    change(runtime, attempt.job.id, worker__lease_until=ago(5))
    runtime.keeper.unregister(attempt)
    runtime.keeper.tick()
    assert len(stale(runtime)) == 1


def test_the_first_tick_makes_the_indexes_and_frees_what_dead_processes_held(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__pid=gone_pid())
    runtime.keeper.tick()
    poll(lambda: "worker_unnotified" in runtime.database["jobs"].index_information(), 10)
    assert read(runtime, job.id)["worker"]["owner"] is None


def tick_for_a_lease(keeper: Keeper, at: list[float], settings: Settings) -> None:
    """Lets a lease's time go by in a keeper's steps: a longer silence would look like an outage."""
    for _ in range(math.ceil(settings.lease_seconds / keeper.tick_s)):
        at[0] += keeper.tick_s
        keeper.tick()


def test_a_node_that_just_began_rests_one_lease_before_it_sweeps(runtime: Runtime, at: list[float]) -> None:
    runtime.rest.at, keeper = at[0] + runtime.settings.lease_seconds, runtime.keeper
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(5))
    keeper.tick()
    assert queued(runtime) == []
    tick_for_a_lease(keeper, at, runtime.settings)
    assert len(queued(runtime)) == 1


def test_after_a_change_of_the_primary_the_keeper_rests_one_lease_before_it_sweeps(
    runtime: Runtime, at: list[float]
) -> None:
    runtime.rest.at = None
    runtime.keeper.tick()
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(5))
    runtime.keeper._sweep_at = runtime.keeper._renew_at = 0.0
    runtime.store.clock.primary, runtime.store.clock.address = ObjectId(), "elsewhere"  # as if it had been another
    runtime.keeper.tick()
    assert queued(runtime) == []
    tick_for_a_lease(runtime.keeper, at, runtime.settings)
    assert len(queued(runtime)) == 1


def test_a_keeper_that_was_frozen_rests_one_lease_before_it_sweeps(runtime: Runtime, at: list[float]) -> None:
    runtime.rest.at = None
    runtime.keeper.tick()
    runtime.keeper._sweep_at = 0.0
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(5))
    at[0] += runtime.settings.lease_seconds
    runtime.keeper.tick()
    assert queued(runtime) == []
    tick_for_a_lease(runtime.keeper, at, runtime.settings)
    assert len(queued(runtime)) == 1


def test_after_a_renewal_that_took_longer_than_a_lease_the_keeper_rests_before_it_sweeps(
    runtime: Runtime, at: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would rescue its own job, whose lease has run out again meanwhile."""
    runtime.rest.at = None
    runtime.keeper.tick()
    attempt, renew = kept(runtime), runtime.store.renew_leases

    def renew_slowly(jobs: list[Job]) -> list[Job]:
        renew(jobs)
        at[0] += runtime.settings.lease_seconds
        change(runtime, attempt.job.id, worker__lease_until=ago(5))
        return []

    monkeypatch.setattr(runtime.store, "renew_leases", renew_slowly)
    runtime.keeper._sweep_at = runtime.keeper._renew_at = 0.0
    runtime.keeper.tick()
    assert queued(runtime) == []


def test_a_worker_that_shuts_down_sweeps_no_more(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(5))
    runtime.shutdown.announce(3600)
    runtime.rest.at = None
    runtime.keeper.tick()
    assert queued(runtime) == []


def test_a_keeper_without_the_right_to_make_indexes_goes_on(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise StoreUnavailable("OperationFailure 13")

    monkeypatch.setattr(runtime.store, "ensure_indexes", refuse)
    runtime.keeper.tick()
    runtime.keeper.tick()
    poll(lambda: "indexes could not be made" in caplog.text, 10)
    assert caplog.text.count("indexes could not be made (OperationFailure 13)") == 1


class Troubled:
    """Breaks a keeper's ticks: the first ones by this error, each noted."""

    def __init__(self, keeper: Keeper, error: Exception, times: int) -> None:
        self.tick, self.error, self.left, self.fine = keeper.tick, error, times, 0

    def __call__(self) -> None:
        if self.left:
            self.left -= 1
            raise self.error
        self.tick()
        self.fine += 1


@table(
    "error, line",
    ("MongoDB is away", StoreUnavailable("AutoReconnect"), "leases and sweeps wait for MongoDB: AutoReconnect"),
    ("a defect of our own", ValueError("planted"), "the keeper goes on after"),
)
def test_the_keepers_thread_survives_an_error(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, line: str
) -> None:
    runtime.keeper.tick_s = 0.01
    ticks = Troubled(runtime.keeper, error, times=3)
    monkeypatch.setattr(runtime.keeper, "tick", ticks)
    runtime.keeper.start()
    poll(lambda: ticks.fine >= 2, 10)
    runtime.keeper.stop()
    assert line in caplog.text


def test_after_an_outage_the_keeper_renews_first_and_rests_one_lease_before_it_sweeps(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.keeper.tick_s = 0.01
    attempt, lost = kept(runtime), claim(runtime, owner="owner-2")
    for job in (attempt.job, lost):
        change(runtime, job.id, worker__lease_until=ago(5))
    runtime.rest.at, runtime.keeper._renew_at = None, time.monotonic() + 3600
    ticks = Troubled(runtime.keeper, StoreUnavailable("away"), times=1)
    monkeypatch.setattr(runtime.keeper, "tick", ticks)
    runtime.keeper.start()
    poll(lambda: ticks.fine >= 3, 10)
    runtime.keeper.stop()
    assert stale(runtime) == [lost.id]


def test_the_last_tick_of_a_keeper_that_stops_writes_down_what_was_published(runtime: Runtime, tmp_path: Path) -> None:
    job = claim(runtime)
    runtime.store.complete(job, {}, None)
    runtime.keeper.start()
    poll(lambda: list(tmp_path.glob("heartbeat/*")), 10)
    runtime.keeper.note_published(job.id, job.owner)
    runtime.keeper.stop()
    assert list(runtime.store.find_unnotified(0)) == []
    assert list(tmp_path.glob("heartbeat/*")) == []


def test_what_was_published_stays_in_the_batch_while_mongodb_is_away(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_told: object) -> None:
        raise StoreUnavailable("away")

    job = claim(runtime)
    runtime.store.complete(job, {}, None)
    runtime.keeper.note_published(job.id, job.owner)
    with monkeypatch.context() as broken:
        broken.setattr(runtime.store, "mark_notified", refuse)
        with pytest.raises(StoreUnavailable):
            runtime.keeper.tick()
    runtime.keeper.tick()
    assert list(runtime.store.find_unnotified(0)) == []


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def file_of(runtime: Runtime, job: Job, suffix: str = "png") -> str:
    """Stores a file of this attempt and returns its name."""
    name = worker.file_name(replace(job, owner=sha256(job.owner.encode()).hexdigest()[:16]), suffix)
    runtime.artifacts.publish(name, PNG)
    return name


def new_file_sweeper(runtime: Runtime, retention_days: float = 0) -> FileSweeper:
    """Another process's file sweeper."""
    turns = Turns(runtime.database, runtime.store.now)
    store = runtime.store
    return FileSweeper(lambda: runtime.artifacts, store.find_unreferenced, turns, store.now, retention_days)


def files(runtime: Runtime) -> set[str]:
    return set(runtime.artifacts.names())


def test_the_file_of_an_attempt_that_died_is_deleted_when_the_job_has_ended(runtime: Runtime) -> None:
    won, failed = claim(runtime), claim(runtime, owner="owner-2")
    lost = some_job(id=won.id, owner="dead")
    kept = [file_of(runtime, won), file_of(runtime, lost), file_of(runtime, failed)][0]
    runtime.store.complete(won, {}, f"/artifacts/{kept}")
    runtime.store.fail(failed, "No.")
    assert runtime.files.sweep() == ["2 file(s) deleted that no job names or that are too old"]
    assert files(runtime) == {kept}


def test_files_of_a_job_that_may_still_win_and_of_no_job_at_all_are_kept(runtime: Runtime) -> None:
    kept = {file_of(runtime, claim(runtime)), file_of(runtime, some_job())}
    runtime.artifacts.publish("somebody-elses.png", PNG)
    assert runtime.files.sweep(all_files=True) == []
    assert files(runtime) == {*kept, "somebody-elses.png"}


@table("all_files, left", ("in passing", False, 1), ("asked for by `recover`", True, 0))
def test_files_of_days_ago_are_looked_at_when_asked_for(runtime: Runtime, all_files: bool, left: int) -> None:
    job = some_job(id=ObjectId.from_datetime(ago(3 * 86_400)))
    runtime.database["jobs"].insert_one({"_id": job.id, "status": "failed"})
    file_of(runtime, job)
    runtime.files.sweep(all_files=all_files)
    assert len(files(runtime)) == left


@table("days, left", ("for ever", 0, 2), ("past its time", 2, 1))
def test_a_file_is_kept_as_long_as_the_setting_says(runtime: Runtime, days: float, left: int) -> None:
    for age_s in (3 * 86_400, 86_400):
        job = some_job(id=ObjectId.from_datetime(ago(age_s)))
        name = file_of(runtime, job)
        runtime.database["jobs"].insert_one({"_id": job.id, "status": "completed", "artifact_url": f"/a/{name}"})
    new_file_sweeper(runtime, retention_days=days).sweep()
    assert len(files(runtime)) == left


def test_one_process_of_all_looks_for_files_in_an_hour(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    swept: list[FileSweeper] = []
    sweepers = [new_file_sweeper(runtime) for _ in range(3)]
    for sweeper in sweepers:
        monkeypatch.setattr(sweeper, "sweep_and_log", partial(swept.append, sweeper))
        sweeper.sweep_if_due()
        sweeper.sweep_if_due()
    poll(lambda: swept == sweepers[:1], 10)


def test_the_keeper_deletes_files_without_holding_leases_up(runtime: Runtime) -> None:
    failed = claim(runtime)
    file_of(runtime, failed)
    runtime.store.fail(failed, "No.")
    runtime.rest.at = None
    runtime.keeper.tick()
    poll(lambda: not files(runtime), 10)


def test_an_artifact_store_that_cant_be_reached_leaves_a_line(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: object) -> list[str]:
        raise StoreUnavailable("artifact store: OSError")

    monkeypatch.setattr(runtime.files, "sweep", refuse)
    runtime.files.sweep_and_log()
    assert "the next search for files of lost attempts is in an hour: artifact store: OSError" in caplog.text
