"""`cancel`: which jobs it ends, that exactly one end wins, that the person is told, and that running attempts stop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bson
import click
import pytest
from bson import Code, MinKey, ObjectId
from celery.exceptions import Ignore

import worker
from testbed.api import Api
from testbed.processes import poll
from testbed.provider import Provider
from tests.lab import (
    IMAGE,
    TEXT,
    Ago,
    Notices,
    Run,
    ago,
    change,
    claim,
    deliver,
    deliver_in_thread,
    insert,
    look,
    new_sweeper,
    read,
    redis_away,
    table,
)
from tests.site import StartWorker, artifacts, for_each_pool, run_forked
from worker import Notifier, Runtime
from worker_commands.cancel import ODD_ID, Cancel, cancel_jobs, plan_selected
from worker_commands.changes import ACTIVE, CHANGED, Left, Plan, Progress
from worker_commands.selection import Selection
from workerkit.errors import StoreUnavailable
from workerkit.sentences import STOPPED

RELEASED = {"owner": None, "available_at": Ago(-60), "attempt": 1, "first_started_at": Ago(9), "task_id": "the API's"}
HONOURED_S = 2.0  # what is promised


def cancel(runtime: Runtime, *job_ids: ObjectId, statuses: tuple[str, ...] = ACTIVE) -> Cancel:
    done = Cancel(runtime, statuses)
    done.cancel(job_ids, Progress(0))
    return done


@pytest.fixture
def tolerant(runtime: Runtime) -> Iterator[None]:
    """Lets MongoDB take each document again at the end of the test."""
    if "jobs" not in runtime.database.list_collection_names():
        runtime.database.create_collection("jobs")
    yield
    runtime.database.command("collMod", "jobs", validator={})


# ── the document and the notice ──────────────────────────────────────────────────────────────────────────────────


@table(
    "fields",
    ("waits in the queue", {}),
    ("has null for bookkeeping", {"worker": None}),
    ("waits for its next try", {"status": "processing", "worker": RELEASED}),
    ("was put back", {"worker": {"owner": "former", "attempt": 2, "lease_until": Ago(60)}}),
    ("runs in an older worker", {"status": "processing", "started_at": Ago(5)}),
)
def test_a_cancelled_job_has_failed_with_a_sentence_that_its_person_reads(
    runtime: Runtime, notices: Notices, fields: dict[str, Any]
) -> None:
    job_id = insert(runtime, session_id="s-1", **fields)
    assert cancel(runtime, job_id).cancelled == 1
    document = read(runtime, job_id)
    assert (document["status"], document["error_message"]) == ("failed", STOPPED)
    assert document["completed_at"] == document["updated_at"]
    assert document["worker"]["message"] == STOPPED
    assert "unnotified" not in document["worker"]
    [notice] = notices.statuses(1)
    assert (notice["job_id"], notice["user_id"], notice["session_id"]) == (str(job_id), "user-1", "s-1")
    assert (notice["status"], notice["message"]) == ("failed", STOPPED)


def test_a_running_job_keeps_its_owner_and_its_lease_by_which_workers_see_the_cancel(runtime: Runtime) -> None:
    job = claim(runtime)
    before = read(runtime, job.id)["worker"]
    cancel(runtime, job.id)
    after = read(runtime, job.id)["worker"]
    assert {name: after.get(name) for name in before} == {**before, "message": STOPPED}
    assert runtime.store.find_cancelled() == [job.id]
    assert runtime.store.find_lost([job]) == [job]


def test_a_cancel_makes_each_worker_look_for_itself_though_the_last_note_is_still_there(runtime: Runtime) -> None:
    runtime.turns.register(runtime.settings.celery_queue_name)
    runtime.notes.note_cancelled([runtime.settings.celery_queue_name], [])
    assert runtime.notes.cancelled() == set()
    cancel(runtime, claim(runtime).id)
    assert runtime.notes.cancelled() is None


def test_the_message_of_a_job_that_was_cancelled_in_the_queue_costs_nothing(
    runtime: Runtime, provider: Provider, notices: Notices
) -> None:
    job_id = insert(runtime)
    cancel(runtime, job_id)
    assert deliver(runtime, job_id)["status"] == "failed"
    assert provider.calls == []
    assert {notice["status"] for notice in notices.statuses(2)} == {"failed"}


def test_the_message_of_a_job_that_was_cancelled_between_two_tries_costs_nothing(
    runtime: Runtime, provider: Provider
) -> None:
    job_id = insert(runtime, status="processing", started_at=RELEASED["first_started_at"], worker=RELEASED)
    cancel(runtime, job_id)
    assert deliver(runtime, job_id)["status"] == "failed"
    assert provider.calls == []


def test_a_cancelled_job_can_be_tried_again(runtime: Runtime) -> None:
    job_id = insert(runtime)
    cancel(runtime, job_id)
    change(runtime, job_id, status="pending")
    assert deliver(runtime, job_id)["status"] == "completed"
    assert [life["reason"] for life in read(runtime, job_id)["worker"]["past"]] == [STOPPED]


# ── exactly one end ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("end", ["complete", "fail", "release"])
def test_of_a_cancel_and_an_attempts_own_end_exactly_one_wins(runtime: Runtime, end: str) -> None:
    def end_it(job: worker.Job, barrier: threading.Barrier) -> bool:
        barrier.wait()
        match end:
            case "complete":
                return runtime.store.complete(job, {"generated_text": "x"}, None)
            case "fail":
                return runtime.store.fail(job, "No.")
        return runtime.store.release(job, runtime.store.now(), counted=True)

    with ThreadPoolExecutor(1) as threads:
        for number in range(30):
            job, barrier = claim(runtime, owner=f"owner-{number}"), threading.Barrier(2)
            ended = threads.submit(end_it, job, barrier)
            barrier.wait()
            cancelled = cancel(runtime, job.id).cancelled
            document = read(runtime, job.id)
            # A job that was released in the same moment hasn't ended, so it may be cancelled behind that.
            assert cancelled + ended.result() == 1 or (end == "release" and cancelled == 1)
            assert (document["error_message"] == STOPPED) is bool(cancelled)
            assert ("output_data" in document) is (end == "complete" and not cancelled)


def test_a_lease_that_is_renewed_meanwhile_doesnt_keep_a_job_from_its_cancel(runtime: Runtime) -> None:
    jobs, is_over = [claim(runtime, owner=f"owner-{number}") for number in range(20)], threading.Event()

    def renew() -> None:
        while not is_over.is_set():
            runtime.store.renew_leases(jobs)

    with ThreadPoolExecutor(1) as threads:
        renewed = threads.submit(renew)
        done = [cancel(runtime, job.id).cancelled for job in jobs]
        is_over.set()
        renewed.result()
    assert done == [1] * 20


def test_of_two_cancels_at_once_one_tells_the_person(runtime: Runtime, notices: Notices) -> None:
    jobs = [insert(runtime) for _ in range(50)]
    with ThreadPoolExecutor(4) as threads:
        done = list(threads.map(lambda _: cancel(runtime, *jobs).cancelled, range(4)))
    assert sum(done) == 50
    runtime.notifier.publish_status({"_id": "the last"}, worker.Status.FAILED, "")
    assert len(notices.statuses(51)) == 51


def test_a_job_that_has_begun_meanwhile_is_no_pending_one(runtime: Runtime) -> None:
    job = claim(runtime)
    done = cancel(runtime, job.id, statuses=("pending",))
    assert (done.cancelled, done.left.counts) == (0, {CHANGED: 1})
    assert look(runtime, job.id).status == "processing"


def test_what_a_cancelled_attempt_has_made_is_deleted(runtime: Runtime, provider: Provider, notices: Notices) -> None:
    job_id = insert(runtime, job_type=IMAGE, input_data={"prompt": "a picture [delay 0.5]"})
    delivered = deliver_in_thread(runtime, job_id, provider)
    cancel(runtime, job_id)
    with pytest.raises(Ignore):
        delivered.result(20)
    assert list(runtime.artifacts.names()) == []
    assert read(runtime, job_id)["error_message"] == STOPPED
    assert [notice["status"] for notice in notices.statuses(3)] == ["processing", "failed", "failed"]


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_notice_that_redis_doesnt_take_is_published_by_a_sweep(runtime: Runtime, notices: Notices) -> None:
    jobs, notifier = [insert(runtime) for _ in range(3)], runtime.notifier
    runtime.notifier = Notifier(redis_away())
    assert cancel(runtime, *jobs).unpublished == 3
    runtime.notifier = notifier
    for job_id in jobs:
        change(runtime, job_id, worker__unnotified=ago(60))
    assert len(new_sweeper(runtime).sweep()) == 3
    assert {notice["job_id"] for notice in notices.statuses(3)} == set(map(str, jobs))


def test_where_redis_is_away_no_batch_waits_for_it_again(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, asked = [insert(runtime) for _ in range(3)], list[object]()
    monkeypatch.setattr(Cancel, "batch", 1)
    monkeypatch.setattr(Notifier, "publish_status", lambda *message: asked.append(message))
    monkeypatch.setattr(runtime.notes, "forget_cancelled", asked.append)
    assert cancel(runtime, *jobs).unpublished == 3
    assert len(asked) == 1


def test_a_notice_of_a_former_life_doesnt_take_that_of_the_cancel_out_of_the_outbox(runtime: Runtime) -> None:
    job = claim(runtime)
    runtime.store.fail(job, "No.")
    change(runtime, job.id, status="pending")
    runtime.notifier = Notifier(redis_away())
    cancel(runtime, job.id)
    runtime.store.mark_notified([(job.id, job.owner)])
    assert "unnotified" in read(runtime, job.id)["worker"]


@pytest.mark.parametrize("status", ACTIVE)
@pytest.mark.parametrize("own", ["text", [], [{"x": 1}], 7, {}, {"owner": 7}, MinKey(), Code("x")], ids=repr)
def test_a_job_is_cancelled_whatever_its_bookkeeping_is(
    runtime: Runtime, notices: Notices, own: object, status: str
) -> None:
    job_id = insert(runtime, status=status, worker=own)
    assert cancel(runtime, job_id).cancelled == 1
    assert read(runtime, job_id)["error_message"] == STOPPED
    assert notices.statuses(1)[0]["status"] == "failed"


@pytest.mark.parametrize("job_id", ["\x1b[2J", 7, MinKey(), {"x": 1}], ids=repr)
def test_a_job_is_cancelled_whatever_its_id_is_but_a_document(runtime: Runtime, run_here: Run, job_id: object) -> None:
    insert(runtime, _id=job_id)
    usual = insert(runtime)
    ended = run_here("cancel", "--user", "user-1", "--yes")
    assert ended.code == 0
    assert read(runtime, usual)["error_message"] == STOPPED
    is_left = f"1 job left: {ODD_ID} (" in ended.out
    assert runtime.database["jobs"].count_documents({"status": "pending"}) == is_left == isinstance(job_id, dict)


def test_what_is_left_is_named_without_control_characters() -> None:
    left = Left()
    left.add("odd", ["\x1b[2J"] * 6)  # type: ignore[list-item]
    assert left.lines() == [f"6 jobs left: odd ({', '.join(['[2J'] * 5)}, …)"]


def test_a_document_without_room_is_cancelled_with_less_in_it(runtime: Runtime, notices: Notices) -> None:
    size = len(bson.encode(read(runtime, insert(runtime, input_data={"prompt": ""}))))
    job_id = insert(runtime, input_data={"prompt": "x" * (16 * 2**20 - size - 10)})
    other = insert(runtime)
    assert cancel(runtime, job_id, other).cancelled == 2
    assert read(runtime, job_id)["error_message"] == STOPPED
    assert len(notices.statuses(2)) == 2


@pytest.mark.usefixtures("tolerant")
def test_what_mongodb_refuses_is_left_with_its_reason_and_the_others_are_cancelled(
    runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [insert(runtime) for _ in range(3)]
    runtime.database.command("collMod", "jobs", validator={"$nor": [{"_id": jobs[1], "status": "failed"}]})
    plan = plan_selected(runtime, Selection(ACTIVE, user="user-1"))
    assert cancel_jobs(runtime, plan, ACTIVE, is_yes=True) == 1
    shown = capsys.readouterr().out
    assert "2 jobs cancelled." in shown
    assert (
        f"1 job left: MongoDB refuses it: WriteError 121: a validator of the collection is against it ({jobs[1]})"
        in shown
    )


def test_a_mongodb_that_goes_away_meanwhile_leaves_a_report_of_what_was_done(
    runtime: Runtime, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        insert(runtime)
    plan = plan_selected(runtime, Selection(ACTIVE, user="user-1"))
    monkeypatch.setattr(Cancel, "batch", 1)
    marks = iter([None])

    def mark_once(_published: object) -> None:
        if next(marks, "away") == "away":
            raise StoreUnavailable("NetworkTimeout")

    monkeypatch.setattr(runtime.store, "mark_notified", mark_once)
    with pytest.raises(click.ClickException, match="MongoDB can't be reached"):
        cancel_jobs(runtime, plan, ACTIVE, is_yes=True)
    shown = capsys.readouterr()
    assert "2 jobs cancelled." in shown.out
    assert "1 job not tried: as before. Call it again." in shown.err


def test_ctrl_c_leaves_a_report_of_what_was_done(
    runtime: Runtime, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan([insert(runtime) for _ in range(3)])
    monkeypatch.setattr(Cancel, "batch", 1)

    def interrupt(_progress: Progress, _count: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "add", interrupt)
    assert cancel_jobs(runtime, plan, ACTIVE, is_yes=True) == 130
    shown = capsys.readouterr()
    assert "1 job cancelled." in shown.out
    assert shown.err == "2 jobs not tried: as before. Call it again.\n"


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "options, cancelled",
    ("a person's", ["--user", "user-1"], {"pending", "running", "picture"}),
    ("those in the queue", ["--pending"], {"pending", "picture", "of another"}),
    ("a person's in the queue", ["--pending", "--user", "user-1"], {"pending", "picture"}),
    ("those of a type", ["--pending", "--type", "image"], {"picture"}),
    ("nobody's", ["--user", "nobody"], set()),
)
def test_jobs_are_cancelled_by_what_they_have_in_common(
    runtime: Runtime, run_here: Run, options: list[str], cancelled: set[str]
) -> None:
    jobs = {
        "pending": insert(runtime),
        "running": claim(runtime).id,
        "picture": insert(runtime, job_type=IMAGE),
        "of another": insert(runtime, user_id="user-2"),
        "completed": insert(runtime, status="completed"),
        "failed": insert(runtime, status="failed", error_message="No."),
    }
    ended = run_here("cancel", *options, "--yes")
    assert ended.code == 0
    stopped = {name for name, job_id in jobs.items() if read(runtime, job_id).get("error_message") == STOPPED}
    assert stopped == cancelled
    assert (f"{len(cancelled)} jobs cancelled." in ended.out) is (len(cancelled) > 1)


def test_named_jobs_that_have_ended_or_dont_exist_are_left_and_the_exit_code_is_1(
    runtime: Runtime, run_here: Run
) -> None:
    running, completed = claim(runtime).id, insert(runtime, status="completed")
    ended = run_here("cancel", running, completed, "0" * 24, "--yes")
    assert ended.code == 1
    assert "1 job cancelled." in ended.out
    assert f"1 job left: it has ended already (completed) ({completed})" in ended.out
    assert f"1 job left: there is no such job ({'0' * 24})" in ended.out


def test_without_yes_and_without_a_terminal_it_only_counts(runtime: Runtime, run_here: Run) -> None:
    jobs = [insert(runtime), insert(runtime), claim(runtime).id]
    before = [read(runtime, job_id) for job_id in jobs]
    ended = run_here("cancel", "--user", "user-1")
    assert (ended.code, ended.err) == (1, "Nothing was done. Add --yes to do it.\n")
    assert [" ".join(line.split()) for line in ended.out.splitlines() if "generation" in line] == [
        "│ 2 │ pending │ text_generation │",
        "│ 1 │ processing │ text_generation │",
    ]
    assert "3 jobs can be cancelled." in ended.out
    assert [read(runtime, job_id) for job_id in jobs] == before


def test_without_any_stdin_it_only_counts(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job_id = insert(runtime)
    monkeypatch.setattr("sys.stdin", None)
    assert cancel_jobs(runtime, Plan([job_id]), ACTIVE, is_yes=False) == 1
    assert capsys.readouterr().err == "Nothing was done. Add --yes to do it.\n"
    assert read(runtime, job_id)["status"] == "pending"


@table(
    "arguments",
    ("nothing", []),
    ("jobs and a person", ["0" * 24, "--user", "user-1"]),
    ("jobs and a type", ["0" * 24, "--type", "text"]),
    ("a type alone", ["--type", "text"]),
)
def test_it_wants_jobs_or_a_selection(runtime: Runtime, run_here: Run, arguments: list[str]) -> None:
    ended = run_here("cancel", *arguments, "--yes")
    assert (ended.code, "Name the JOBs, or select jobs by --user ID or --pending" in ended.err) == (2, True)


def test_many_jobs_are_cancelled_in_batches(runtime: Runtime, notices: Notices) -> None:
    usual = {"job_type": TEXT, "status": "pending", "user_id": "user-1"}
    jobs = runtime.database["jobs"].insert_many([dict(usual) for _ in range(1000)]).inserted_ids
    assert cancel(runtime, *jobs).cancelled == 1000
    assert runtime.database["jobs"].count_documents({"status": "failed", "worker.unnotified": None}) == 1000
    assert len(notices.statuses(1000)) == 1000


# ── with real workers ────────────────────────────────────────────────────────────────────────────────────────────


@for_each_pool
@table("swept", ("before anybody sweeps", False), ("by a worker that has the turn", True))
def test_a_cancel_by_an_operator_stops_a_running_attempt_within_two_seconds(
    api: Api,
    start_worker: StartWorker,
    provider: Provider,
    environment: dict[str, str],
    tmp_path: Path,
    pool: str,
    swept: bool,
) -> None:
    # A lease that long isn't renewed meanwhile, by which the attempt would learn of its cancel, too.
    start_worker(WORKER_POOL=pool, LEASE_SECONDS="60", WORKER_CONCURRENCY="1")
    if swept:  # a worker begins to sweep one lease after its start, and has the turn then
        start_worker(WORKER_POOL="solo", CELERY_QUEUE_NAME="another")
        poll(lambda: api.redis.exists(f"cancelled:{api.queue}:{api.database.name}"), 60)
    job = api.submit(IMAGE, {"prompt": "cancelled [hang]"})
    poll(lambda: provider.calls_for("cancelled"), 60)
    ended = run_forked(environment, tmp_path, "cancel", str(job), "--yes")
    assert (ended.returncode, "1 job cancelled." in ended.stdout) == (0, True)
    [call] = provider.calls_for("cancelled")
    poll(lambda: call.outcome == "disconnected", 60)
    document = api.document(job)
    assert call.ended_at
    assert call.ended_at - document["completed_at"].timestamp() < HONOURED_S
    assert api.wait(api.text("the next one"))["status"] == "completed"
    assert api.document(job) == document
    assert api.updates(job)[0]["status"] == "processing"
    assert {(notice["status"], notice["message"]) for notice in api.updates(job)[1:]} == {("failed", STOPPED)}
    assert not artifacts(api).exists({"filename": {"$regex": str(job)}})


def test_of_many_jobs_that_end_while_they_are_cancelled_each_has_one_end(
    api: Api, start_worker: StartWorker, provider: Provider, environment: dict[str, str], tmp_path: Path
) -> None:
    start_worker(WORKER_POOL="threads", WORKER_CONCURRENCY="20")
    jobs = [api.submit(IMAGE, {"prompt": f"one end {number} [delay {0.1 * (number % 12)}]"}) for number in range(60)]
    poll(lambda: api.jobs.count_documents({"status": "completed"}) >= 5, 60)
    run_forked(environment, tmp_path, "cancel", "--user", "user-1", "--yes")
    documents = [api.wait(job) for job in jobs]
    assert api.wait(api.text("the next one"))["status"] == "completed"
    for document in documents:
        is_cancelled = document["error_message"] == STOPPED
        assert (document["status"], bool(document["artifact_url"])) == (
            ("failed", False) if is_cancelled else ("completed", True)
        )
    cancelled = [document["_id"] for document in documents if document["status"] == "failed"]
    assert 0 < len(cancelled) < 60
    poll(lambda: not provider.running, 60)
    poll(lambda: not any(artifacts(api).exists({"filename": {"$regex": str(job)}}) for job in cancelled), 60)
    for document in documents:
        ends = {notice["status"] for notice in api.updates(document["_id"])} - {"processing"}
        assert ends == {document["status"]}
