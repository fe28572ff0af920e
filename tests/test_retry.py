"""`retry`: which jobs it puts back, with what message, and that a session never gets a second job by it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
from bson import Code, MinKey, ObjectId, Regex

import worker
import worker_commands.retry
from testbed.api import Api
from testbed.processes import SOURCE
from testbed.servers import RabbitServer
from tests.lab import (
    IMAGE,
    NOWHERE,
    TEXT,
    Notices,
    Run,
    adopt,
    ago,
    change,
    claim,
    deliver,
    insert,
    insert_text,
    new_sweeper,
    queued,
    read,
    redis_away,
    table,
)
from tests.place import PATIENCE_S, OpenPlace, Step
from tests.site import StartWorker, run_forked, running
from worker import Notifier, Runtime
from worker_commands.changes import CHANGED, Plan, Progress
from worker_commands.retry import (
    BUSY,
    CANCELLED,
    ODD,
    OLDER,
    STOPPING,
    UNDONE,
    Retry,
    active_jobs,
    plan_named,
    plan_selected,
    retry_jobs,
    same_end,
)
from worker_commands.selection import Selection, read_jobs
from workerkit.bookkeeping import PAST_LIVES
from workerkit.errors import JobFailed, StoreUnavailable
from workerkit.lost_messages import LostMessages
from workerkit.messages import describe_delivery
from workerkit.notes import REVOKED, RevokedTask
from workerkit.sentences import RETRIED, STOPPED

FAILED = Selection(("failed",))
Meanwhile = Callable[[Callable[[], object]], None]


def insert_failed(runtime: Runtime, **fields: Any) -> ObjectId:
    """Inserts a job that a worker has failed."""
    own = {"owner": "former", "attempt": 4, "limits": [120.0, 90.0], "first_started_at": ago(90), "message": "No."}
    usual = {"status": "failed", "error_message": "No.", "started_at": ago(90), "completed_at": ago(60)}
    return insert(runtime, **{**usual, "updated_at": ago(60), "session_id": str(ObjectId()), "worker": own, **fields})


def put_back(runtime: Runtime, *job_ids: ObjectId, **options: bool) -> Retry:
    done = Retry(runtime, **options)
    done.retry(job_ids, Progress(0))
    return done


# ── the document, the notice and the message ─────────────────────────────────────────────────────────────────────


def test_a_retried_job_is_pending_and_its_person_is_told(runtime: Runtime, notices: Notices) -> None:
    job_id = insert_failed(runtime, session_id="s-1")
    before = read(runtime, job_id)
    assert put_back(runtime, job_id).retried == 1
    document = read(runtime, job_id)
    assert (document["status"], document["worker"]["message"]) == ("pending", RETRIED)
    assert document["updated_at"] > before["updated_at"]
    kept = ("input_data", "user_id", "session_id", "created_at", "error_message", "completed_at")
    assert [document[name] for name in kept] == [before[name] for name in kept]
    [notice] = notices.statuses(1)
    assert (notice["job_id"], notice["session_id"]) == (str(job_id), "s-1")
    assert (notice["status"], notice["message"]) == ("pending", RETRIED)


def test_a_retried_job_begins_a_new_life(runtime: Runtime, notices: Notices) -> None:
    job_id = insert_failed(runtime)
    put_back(runtime, job_id)
    assert deliver(runtime, job_id)["status"] == "completed"
    document = read(runtime, job_id)
    assert (document["worker"]["attempt"], document["error_message"]) == (1, None)
    assert [(life["reason"], life["attempts"]) for life in document["worker"]["past"]] == [("No.", 4)]
    assert "retried_by" not in document["worker"]
    assert [notice["status"] for notice in notices.statuses(3)] == ["pending", "processing", "completed"]


def test_its_message_has_the_limits_of_the_former_one_and_a_new_task(runtime: Runtime) -> None:
    own = {"owner": "former", "attempt": 1, "limits": [60.0, 50.0], "task_id": "the API's"}
    job_id = insert_failed(runtime, worker=own)
    put_back(runtime, job_id)
    [message] = queued(runtime)
    assert message["args"] == [str(job_id), {"job_id": str(job_id)}]
    assert message["timelimit"] == [60.0, 50.0]
    assert message["id"] == message["root_id"] != "the API's"


@table(
    "own, options",
    ("of a job that no worker had begun", {"owner": None}, {}),
    ("if the operator wants the workers' own", {"owner": "former", "limits": [60.0, 50.0]}, {"has_new_limits": True}),
)
def test_its_message_has_no_limits(runtime: Runtime, own: dict[str, Any], options: dict[str, bool]) -> None:
    put_back(runtime, insert_failed(runtime, worker=own), **options)
    assert queued(runtime)[0]["timelimit"] == [None, None]


@table("is_served, goes_to", ("from which workers take jobs", True, "another"), ("that has no worker", False, ""))
def test_its_message_goes_to_the_queue_of_the_former_one(runtime: Runtime, is_served: bool, goes_to: str) -> None:
    if is_served:
        runtime.turns.register("another")
    put_back(runtime, insert_failed(runtime, worker={"owner": "former", "attempt": 1, "queue": "another"}))
    assert runtime.redis.llen(goes_to or runtime.settings.celery_queue_name) == 1
    runtime.redis.delete("another")


def test_a_revoke_of_the_former_task_doesnt_end_the_new_life(runtime: Runtime) -> None:
    own = {"owner": "former", "attempt": 1, "task_id": "the API's"}
    job_id = insert_failed(runtime, worker=own)
    put_back(runtime, job_id)
    [message] = queued(runtime)
    task: Any = worker.process_job
    task.push_request(id=message["id"], root_id=message["root_id"], called_directly=False, delivery_info={}, args=[])
    try:
        delivery = describe_delivery(task.request, runtime.settings.limits(), {})
    finally:
        task.pop_request()
    runtime.store.claim(job_id, "owner-2", delivery)
    runtime.notes.note_revoked(RevokedTask(str(job_id), "the API's", REVOKED))
    assert new_sweeper(runtime).sweep() == []
    assert read(runtime, job_id)["status"] == "processing"


def test_a_job_may_be_retried_again_and_again(runtime: Runtime) -> None:
    job_id = insert_text(runtime, "no [status 400]")
    for _ in range(PAST_LIVES + 2):
        with pytest.raises(JobFailed):
            deliver(runtime, job_id)
        assert put_back(runtime, job_id).retried == 1
    assert len(read(runtime, job_id)["worker"]["past"]) == PAST_LIVES


# ── a session has one job ────────────────────────────────────────────────────────────────────────────────────────


def test_of_a_session_the_youngest_is_chosen(runtime: Runtime) -> None:
    _old, _older = (insert_failed(runtime, session_id="s-1", created_at=ago(seconds)) for seconds in (20, 30))
    young = insert_failed(runtime, session_id="s-1", created_at=ago(10))
    for plan in (plan_selected(runtime, FAILED), plan_named(runtime, [_old, young, _older])):
        assert (plan.job_ids, plan.left.counts) == ([young], {OLDER: 2})


@table(
    "fields, is_busy",
    ("another pending one", {"status": "pending"}, True),
    ("another that runs", {"status": "processing"}, True),
    ("a completed one", {"status": "completed"}, False),
    ("one in another session", {"status": "pending", "session_id": "s-2"}, False),
    ("one without a session", {"status": "pending", "session_id": None}, False),
    ("the same session of another person", {"status": "pending", "user_id": "user-2"}, False),
)
def test_no_job_is_chosen_while_its_session_has(runtime: Runtime, fields: dict[str, Any], is_busy: bool) -> None:
    failed = insert_failed(runtime, session_id="s-1")
    insert(runtime, **{"session_id": "s-1", **fields})
    for plan in (plan_selected(runtime, FAILED), plan_named(runtime, [failed])):
        assert (plan.job_ids, plan.left.counts) == (([], {BUSY: 1}) if is_busy else ([failed], {}))
    assert put_back(runtime, failed).retried == (not is_busy)


def test_a_person_with_many_other_sessions_costs_no_reading_of_their_jobs(runtime: Runtime) -> None:
    usual = {"user_id": "user-1", "status": "pending", "job_type": TEXT}
    runtime.database["jobs"].insert_many({**usual, "session_id": f"busy-{number}"} for number in range(50))
    failed = [insert_failed(runtime), insert_failed(runtime, session_id="busy-7")]
    assert len(active_jobs(runtime, read_jobs(runtime, failed))) == 1
    assert plan_named(runtime, failed).job_ids == failed[:1]


@table("fields", ("null", {"session_id": None}), ("missing", {}))
def test_jobs_without_a_session_are_those_of_one_session(runtime: Runtime, fields: dict[str, Any]) -> None:
    failed = insert_failed(runtime, session_id=None)
    if not fields:
        runtime.database["jobs"].update_one({"_id": failed}, {"$unset": {"session_id": ""}})
    insert(runtime, session_id=None)
    assert plan_selected(runtime, FAILED).left.counts == {BUSY: 1}


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Meanwhile:
    """Lets something happen when documents are pending already, before the retry looks at their sessions again."""
    return lambda act: monkeypatch.setattr(Retry, "wait", lambda *_: act())


@table("status", ("has just been inserted", "pending"), ("has even begun", "processing"))
def test_a_job_whose_session_got_another_one_meanwhile_is_set_back_to_what_it_was(
    runtime: Runtime, notices: Notices, meanwhile: Meanwhile, status: str
) -> None:
    job_id, other = insert_failed(runtime, session_id="s-1"), insert_failed(runtime)
    before = read(runtime, job_id)
    meanwhile(partial(insert, runtime, status=status, session_id="s-1"))
    done = put_back(runtime, job_id, other)
    assert (done.retried, done.left.counts) == (1, {UNDONE: 1})
    assert read(runtime, job_id) == before
    assert [message["args"][0] for message in queued(runtime)] == [str(other)]
    assert [notice["job_id"] for notice in notices.statuses(1)] == [str(other)]


def test_where_an_index_keeps_the_rule_it_leaves_the_job_and_retries_the_others(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    active = {"status": {"$in": ["pending", "processing"]}}
    session: list[tuple[str, int]] = [("user_id", 1), ("session_id", 1)]
    index = runtime.database["jobs"].create_index(session, unique=True, partialFilterExpression=active)
    jobs = [insert_failed(runtime, session_id=f"s-{number}") for number in range(3)]
    insert(runtime, session_id="s-1")
    monkeypatch.setattr(worker_commands.retry, "active_jobs", lambda *_: [])  # the API inserts it behind the look
    try:
        done = put_back(runtime, *jobs)
    finally:
        runtime.database["jobs"].drop_index(index)
    why = "MongoDB refuses it: DuplicateKeyError 11000: a unique index allows only one such document"
    assert (done.retried, done.left.counts) == (2, {why: 1})
    assert [read(runtime, job_id)["status"] for job_id in jobs] == ["pending", "failed", "pending"]


@pytest.mark.parametrize("own", [None, "text", ["x"], {}], ids=repr)
def test_what_is_set_back_is_as_before_whatever_its_bookkeeping_is(
    runtime: Runtime, meanwhile: Meanwhile, own: object
) -> None:
    job_id = insert_failed(runtime, session_id="s-1", worker=own)
    runtime.database["jobs"].update_one({"_id": job_id}, {"$unset": {"updated_at": ""}})
    before = read(runtime, job_id)
    meanwhile(partial(insert, runtime, session_id="s-1"))
    assert put_back(runtime, job_id).left.counts == {UNDONE: 1}
    assert read(runtime, job_id) == before


def test_a_job_that_a_worker_has_claimed_meanwhile_is_not_set_back(runtime: Runtime, meanwhile: Meanwhile) -> None:
    job_id = insert_failed(runtime, session_id="s-1")

    def act() -> None:
        claim(runtime, job_id)
        insert(runtime, session_id="s-1")

    meanwhile(act)
    put_back(runtime, job_id)
    assert read(runtime, job_id)["status"] == "processing"


def test_a_job_that_has_ended_anew_since_it_was_read_is_no_longer_what_was_selected(runtime: Runtime) -> None:
    job_id = insert_failed(runtime)
    [job] = read_jobs(runtime, [job_id])
    jobs = runtime.database["jobs"]
    assert jobs.count_documents(same_end(job)) == 1
    change(runtime, job_id, worker__lease_until=ago(1))  # which a worker may change at any time
    assert jobs.count_documents(same_end(job)) == 1
    change(runtime, job_id, completed_at=ago(0))
    assert jobs.count_documents(same_end(job)) == 0


def test_of_two_operators_who_retry_two_jobs_of_a_session_at_most_one_does(runtime: Runtime) -> None:
    for _ in range(5):
        session = str(ObjectId())
        jobs = [insert_failed(runtime, session_id=session) for _ in range(2)]
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(partial(put_back, runtime), jobs))
        active = {"session_id": session, "status": {"$in": ["pending", "processing"]}}
        assert runtime.database["jobs"].count_documents(active) <= 1


def test_of_operators_who_retry_the_same_jobs_at_once_one_sends_each_message(runtime: Runtime) -> None:
    jobs = [insert_failed(runtime) for _ in range(50)]
    with ThreadPoolExecutor(4) as threads:
        done = list(threads.map(lambda _: put_back(runtime, *jobs), range(4)))
    assert sum(each.retried for each in done) == 50
    assert sum(each.left.counts[CHANGED] for each in done) == 150
    assert sorted(message["args"][0] for message in queued(runtime)) == sorted(map(str, jobs))


def test_a_retry_beside_an_api_that_submits_leaves_no_session_with_two_jobs(runtime: Runtime) -> None:
    """The API looks for a job that hasn't ended, and inserts one if there is none, each a moment after the other."""
    jobs = runtime.database["jobs"]
    sessions = [str(ObjectId()) for _ in range(40)]
    failed = [insert_failed(runtime, session_id=session) for session in sessions]

    def submit(session: str) -> None:
        active = {"user_id": "user-1", "session_id": session, "status": {"$in": ["pending", "processing"]}}
        if not jobs.find_one(active):
            insert(runtime, session_id=session)

    with ThreadPoolExecutor(8) as threads:
        retried = threads.submit(put_back, runtime, *failed)
        list(threads.map(submit, sessions))
        retried.result()
    for session in sessions:
        assert jobs.count_documents({"session_id": session, "status": {"$in": ["pending", "processing"]}}) == 1


# ── which jobs ───────────────────────────────────────────────────────────────────────────────────────────────────


@table("status", ("waits", "pending"), ("runs", "processing"), ("is completed", "completed"), ("is odd", "archived"))
def test_a_job_that_hasnt_failed_is_left(runtime: Runtime, run_here: Run, status: str) -> None:
    job_id = insert(runtime, status=status)
    ended = run_here("retry", job_id, "--yes")
    assert (ended.code, f"1 job left: it hasn't failed, but is {status} ({job_id})" in ended.out) == (1, True)
    assert read(runtime, job_id)["status"] == status


def test_a_job_that_was_cancelled_a_moment_ago_is_left_while_its_attempt_may_run(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, status="failed", updated_at=ago(0))  # as the API cancels
    assert plan_named(runtime, [job.id]).left.counts == {STOPPING: 1}
    change(runtime, job.id, updated_at=ago(4))
    assert plan_named(runtime, [job.id]).job_ids == [job.id]


@pytest.mark.parametrize("name", ["user_id", "session_id"])
@pytest.mark.parametrize("value", [7, ["x"], {"$gt": ""}, Regex(""), MinKey(), Code("x"), "a\ufffd"], ids=repr)
def test_a_job_whose_session_cant_be_looked_for_is_left(runtime: Runtime, name: str, value: object) -> None:
    odd, usual = insert_failed(runtime, **{name: value}), insert_failed(runtime)
    plan = plan_named(runtime, [odd, usual])
    assert (plan.job_ids, plan.left.counts) == ([usual], {ODD: 1})


@pytest.mark.parametrize("own", [None, "text", [], [{"x": 1}], 7, {}, {"owner": 7, "limits": "x"}, MinKey()], ids=repr)
def test_a_job_is_retried_whatever_its_bookkeeping_is(runtime: Runtime, own: object) -> None:
    job_id = insert_failed(runtime, worker=own)
    assert put_back(runtime, job_id).retried == 1
    assert deliver(runtime, job_id)["status"] == "completed"


@table(
    "options, retried",
    ("lately", ["--since", "1h"], {"text", "picture", "of another"}),
    ("a person's", ["--since", "1h", "--user", "user-1"], {"text", "picture"}),
    ("those of a type", ["--since", "1h", "--type", "image"], {"picture"}),
    ("those with a reason", ["--since", "1h", "--reason", "HTTP 401"], {"picture"}),
    ("all of a week", ["--since", "7d"], {"text", "picture", "of another", "old"}),
)
def test_failed_jobs_are_retried_by_what_they_have_in_common(
    runtime: Runtime, run_here: Run, options: list[str], retried: set[str]
) -> None:
    refused = {"owner": "a", "attempt": 1, "attempts": [{"attempt": 1, "end": "failed", "reason": "HTTP 401 no key"}]}
    jobs = {
        "text": insert_failed(runtime),
        "picture": insert_failed(runtime, job_type=IMAGE, worker=refused),
        "of another": insert_failed(runtime, user_id="user-2"),
        "old": insert_failed(runtime, _id=ObjectId.from_datetime(ago(3 * 86_400)), updated_at=ago(2 * 86_400)),
    }
    completed = insert(runtime, status="completed")
    ended = run_here("retry", "--failed", *options, "--yes")
    assert (ended.code, ended.err) == (0, "")
    pending = {name for name, job_id in jobs.items() if read(runtime, job_id)["status"] == "pending"}
    assert pending == retried
    assert read(runtime, completed)["status"] == "completed"
    assert sorted(message["args"][0] for message in queued(runtime)) == sorted(str(jobs[name]) for name in retried)


@table(
    "fields",
    ("by the API", {"error_message": "Cancelled.", "completed_at": None}),
    ("by the API, after it was put back", {"error_message": "Cancelled."}),
    ("by an operator", {"error_message": STOPPED, "worker": {"owner": None, "message": STOPPED}}),
)
def test_a_job_that_was_cancelled_is_only_retried_by_its_id_or_its_words(
    runtime: Runtime, fields: dict[str, Any]
) -> None:
    cancelled, usual = insert_failed(runtime, **fields), insert_failed(runtime)
    plan = plan_selected(runtime, FAILED)
    assert (plan.job_ids, plan.left.counts) == ([usual], {CANCELLED: 1})
    words = Selection(("failed",), reason=str(fields["error_message"]))
    assert plan_selected(runtime, words).job_ids == plan_named(runtime, [cancelled]).job_ids == [cancelled]


def test_the_oldest_are_the_first_in_the_queue(runtime: Runtime) -> None:
    jobs = [insert_failed(runtime) for _ in range(5)]
    for plan in (plan_selected(runtime, FAILED), plan_named(runtime, jobs[::-1])):
        assert plan.job_ids == jobs


# ── what it says ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_yes_and_without_a_terminal_it_only_counts(runtime: Runtime, run_here: Run) -> None:
    jobs = [insert_failed(runtime, error_message=words, worker=None) for words in ("No.", "No.", "Too long.")]
    before = [read(runtime, job_id) for job_id in jobs]
    ended = run_here("retry", "--failed", "--since", "1h")
    assert (ended.code, ended.err) == (1, "Nothing was done. Add --yes to do it.\n")
    assert [" ".join(line.split()) for line in ended.out.splitlines() if "generation" in line] == [
        "│ 2 │ text_generation │ No. │",
        "│ 1 │ text_generation │ Too long. │",
    ]
    assert "3 jobs can be tried again." in ended.out
    assert [read(runtime, job_id) for job_id in jobs] == before
    assert queued(runtime) == []


def test_without_any_job_it_ends_with_0(runtime: Runtime, run_here: Run) -> None:
    assert run_here("retry", "--failed", "--since", "1h").code == 0


@table(
    "arguments, says",
    ("nothing", [], "Name the JOBs, or select jobs by --failed --since TIME"),
    ("jobs and a selection", ["0" * 24, "--failed", "--since", "1h"], "Name the JOBs, or select jobs"),
    ("jobs and a reason", ["0" * 24, "--reason", "x"], "Name the JOBs, or select jobs"),
    ("all that ever failed", ["--failed"], "--failed needs --since, for example --since 1h."),
    ("no duration", ["--failed", "--since", "an hour"], "such as 90s, 15m, 1h or 7d"),
    ("half an id", ["65f0"], "'65f0' is no job's id"),
)
def test_it_wants_jobs_or_a_selection_of_some_time(
    runtime: Runtime, run_here: Run, arguments: list[str], says: str
) -> None:
    ended = run_here("retry", *arguments, "--yes")
    assert (ended.code, says in " ".join(ended.err.split())) == (2, True)


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_where_the_broker_is_away_the_jobs_stay_pending_and_it_says_who_sends_them(
    runtime: Runtime, run_here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Retry, "batch", 2)
    jobs = [insert_failed(runtime) for _ in range(5)]
    ended = run_here("retry", *jobs, "--yes", CELERY_BROKER_URL=f"redis://{NOWHERE}")
    assert ended.code == 1
    assert "2 jobs put back into the queue." in ended.out
    assert f"2 jobs of these without a message ({NOWHERE}: nothing listens there): pending." in ended.err
    assert "3 jobs not tried: as before. Call it again." in ended.err
    assert [read(runtime, job_id)["status"] for job_id in jobs] == ["pending"] * 2 + ["failed"] * 3


def test_a_sweep_sends_the_messages_that_the_broker_didnt_take(
    runtime: Runtime, run_here: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job_id = insert_failed(runtime)
    run_here("retry", job_id, "--yes", CELERY_BROKER_URL=f"redis://{NOWHERE}")
    adopt(runtime, tmp_path)
    monkeypatch.setattr(LostMessages, "overdue_s", 0.0)
    runtime.turns.register(runtime.settings.celery_queue_name)
    done = [new_sweeper(runtime).sweep() for _ in range(2)]
    assert done == [[], [f"job={job_id} its message was lost: put into the queue again"]]
    assert deliver(runtime, job_id)["status"] == "completed"


def test_where_redis_takes_no_notice_the_jobs_are_retried_all_the_same(
    runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [insert_failed(runtime) for _ in range(3)]
    runtime.notifier = Notifier(redis_away())
    assert retry_jobs(runtime, plan_named(runtime, jobs), is_yes=True) == 0
    assert len(queued(runtime)) == 3
    assert "Redis can't be reached: 3 jobs go on without a notice, until they begin." in capsys.readouterr().err


def test_what_mongodb_refuses_is_left_with_its_reason_and_the_others_are_retried(
    runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [insert_failed(runtime) for _ in range(3)]
    runtime.database.command("collMod", "jobs", validator={"$nor": [{"_id": jobs[1], "status": "pending"}]})
    try:
        assert retry_jobs(runtime, plan_named(runtime, jobs), is_yes=True) == 1
    finally:
        runtime.database.command("collMod", "jobs", validator={})
    assert f"a validator of the collection is against it ({jobs[1]})" in capsys.readouterr().out
    assert len(queued(runtime)) == 2


def test_a_mongodb_that_goes_away_meanwhile_leaves_a_report_of_what_was_done_and_what_isnt_known(
    runtime: Runtime, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan([insert_failed(runtime) for _ in range(5)])
    monkeypatch.setattr(Retry, "batch", 2)
    set_pending = Retry._set_pending

    def answer_once(self: Retry, jobs: Any) -> Any:
        if self.retried:
            raise StoreUnavailable("NetworkTimeout")
        return set_pending(self, jobs)

    monkeypatch.setattr(Retry, "_set_pending", answer_once)
    with pytest.raises(click.ClickException, match="MongoDB can't be reached"):
        retry_jobs(runtime, plan, is_yes=True)
    shown = capsys.readouterr()
    assert "2 jobs put back into the queue." in shown.out
    assert "Of the last 2 it isn't known whether they were put back. If so, they are pending." in shown.err
    assert "1 job not tried: as before. Call it again." in shown.err


def test_ctrl_c_leaves_a_report_that_counts_each_job_once(
    runtime: Runtime, capsys: pytest.CaptureFixture[str], meanwhile: Meanwhile, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan([insert_failed(runtime) for _ in range(3)])
    monkeypatch.setattr(Retry, "batch", 2)

    def interrupt() -> None:
        raise KeyboardInterrupt

    meanwhile(interrupt)
    assert retry_jobs(runtime, plan, is_yes=True) == 130
    shown = capsys.readouterr()
    assert "2 jobs put back into the queue." in shown.out
    assert "2 jobs of these without a message: pending." in shown.err
    assert "1 job not tried: as before. Call it again." in shown.err
    assert "it isn't known" not in shown.err


# ── many of them ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_many_jobs_are_retried_in_batches_each_with_one_message_and_one_notice(
    runtime: Runtime, notices: Notices
) -> None:
    ended = dict.fromkeys(("updated_at", "completed_at"), ago(9))
    usual = {"job_type": TEXT, "status": "failed", "user_id": "user-1", **ended}
    documents = [{**usual, "session_id": f"s-{number}"} for number in range(1000)]
    jobs = runtime.database["jobs"].insert_many(documents).inserted_ids
    plan = plan_selected(runtime, FAILED)
    assert plan.job_ids == jobs
    done = put_back(runtime, *plan.job_ids)
    assert (done.retried, done.unsent, done.left.counts) == (1000, 0, {})
    assert [message["args"][0] for message in queued(runtime)] == list(map(str, jobs))
    assert len(notices.statuses(1000)) == 1000


def test_a_call_that_meets_more_jobs_than_it_may_hold_says_so(
    runtime: Runtime, run_here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker_commands.changes.MAX_JOBS", 2)
    for _ in range(3):
        insert_failed(runtime)
    shown = run_here("retry", "--failed", "--since", "1h").out
    assert "There may be more: one call changes at most 2. Call it again afterwards." in shown


# ── with a terminal, real workers and RabbitMQ ───────────────────────────────────────────────────────────────────


def run_in_terminal(environment: dict[str, str], folder: Path, typed: str, *arguments: str) -> tuple[int, str]:
    """Runs a command of the worker in a terminal in which this is typed. Returns its exit code and the screen."""
    terminal, child = pty.openpty()
    command = [sys.executable, str(SOURCE / "worker.py"), *arguments]
    variables = {**os.environ, **environment}
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=variables, cwd=folder)
    os.close(child)
    os.write(terminal, typed.encode())
    screen = b""
    with suppress(OSError):  # EIO, when the process has ended
        while piece := os.read(terminal, 65_536):
            screen += piece
    os.close(terminal)
    return process.wait(60), screen.decode()


@table("typed, code, status", ("yes", "y\n", 0, "pending"), ("no", "n\n", 1, "failed"), ("nothing", "\n", 1, "failed"))
def test_in_a_terminal_it_asks(
    runtime: Runtime, environment: dict[str, str], tmp_path: Path, typed: str, code: int, status: str
) -> None:
    job_id = insert_failed(runtime)
    own = {**environment, "DATABASE_NAME": runtime.settings.database_name}
    ended, screen = run_in_terminal(own, tmp_path, typed, "retry", str(job_id))
    assert (ended, read(runtime, job_id)["status"]) == (code, status)
    assert "Try 1 job again? [y/N]: " in screen


def test_jobs_that_the_provider_refused_are_completed_by_a_retry(
    api: Api, start_worker: StartWorker, environment: dict[str, str], tmp_path: Path
) -> None:
    start_worker(WORKER_POOL="threads", WORKER_CONCURRENCY="4")
    sessions = [str(ObjectId()) for _ in range(8)]
    jobs = [api.insert(TEXT, {"prompt": f"{n} [status 400 times=1]"}, session_id=sessions[n]) for n in range(8)]
    for job in jobs:
        api.enqueue(job)
    assert {api.wait(job)["status"] for job in jobs} == {"failed"}
    ended = run_forked(environment, tmp_path, "retry", "--failed", "--since", "1h", "--yes")
    assert (ended.returncode, "8 jobs put back into the queue." in ended.stdout) == (0, True)
    for job in jobs:
        api.wait_notice(job, "completed", 60)
        assert api.notices(job) == ["processing", "failed", "pending", "processing", "completed"]


@pytest.mark.servers
def test_a_retry_goes_through_rabbitmq(open_place: OpenPlace) -> None:
    with running(RabbitServer()) as server:
        place = open_place("rabbitmq", CELERY_BROKER_URL=server.url)
        place.start_worker().wait_ready(PATIENCE_S)
        job = place.submit("refused", Step("[status 400 times=1]", ends="failed"))
        place.api.wait_notice(job, "failed", PATIENCE_S)
        server.stop()
        away = run_forked(place.environment, place.folder, "retry", str(job), "--yes")
        assert (away.returncode, "1 job of these without a message" in away.stderr) == (1, True)
        assert place.api.status(job) == "pending"
        place.api.cancel(job)
        server.start()
        ended = run_forked(place.environment, place.folder, "retry", str(job), "--yes")
        assert (ended.returncode, ended.stderr) == (0, "")
        place.api.wait_notice(job, "completed", PATIENCE_S)
        place.kill_workers()
