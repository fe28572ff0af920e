"""The task on a real MongoDB and a real Redis: files, handlers that break, and results that can't be written."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gridfs
import pymongo
import pytest
from bson import ObjectId
from celery import uuid
from celery.exceptions import Ignore, Reject, Retry
from kombu import Connection

import worker
from testbed.answers import picture, sound_wav
from testbed.processes import poll
from testbed.provider import Provider
from tests.lab import (
    AUDIO,
    IMAGE,
    NOWHERE,
    PNG,
    SECRET,
    Ago,
    Notices,
    SetHandler,
    ago,
    change,
    claim,
    deliver,
    deliver_in_thread,
    gone_pid,
    insert,
    insert_text,
    queued,
    raising,
    read,
    some_job,
    table,
)
from worker import Attempt, Call, Job, Media, Result, Runtime
from workerkit.broker import JobRequest
from workerkit.errors import FailJob, HandBack, JobFailed, LeaveJob, StoreUnavailable
from workerkit.sentences import CANT_BE_STORED
from workerkit.settings import Limits


def stored(runtime: Runtime, url: str) -> bytes:
    """The file in GridFS that a document's URL names."""
    return bytes(gridfs.GridFS(runtime.database, collection="artifacts").get(url.rsplit("/", 1)[-1]).read())


# ── the whole way ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_picture_job_names_its_file_twice(runtime: Runtime) -> None:
    job_id = insert(runtime, job_type=IMAGE, input_data={"prompt": "A city", "size": "64x48"})
    deliver(runtime, job_id)
    document = read(runtime, job_id)
    assert document["artifact_url"] == document["output_data"]["image_url"]
    assert stored(runtime, document["artifact_url"]) == picture(64, 48)


def test_a_sound_job_names_its_file_twice(runtime: Runtime) -> None:
    job_id = insert(runtime, job_type=AUDIO, input_data={"text": "Hello", "voice": "default"})
    deliver(runtime, job_id)
    document = read(runtime, job_id)
    assert document["artifact_url"] == document["output_data"]["audio_url"]
    assert stored(runtime, document["artifact_url"]) == sound_wav()


def test_a_message_about_a_job_whose_process_died_takes_it_over(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__pid=gone_pid())
    assert deliver(runtime, job.id)["status"] == "completed"


@table("bookkeeping", ("null, as in an older document", None), ("of another program", "text"))
def test_a_job_whose_bookkeeping_is_no_sub_document_reaches_an_end(runtime: Runtime, bookkeeping: object) -> None:
    runtime.store_patience_s = 0.0
    job_id = insert(runtime, worker=bookkeeping)
    with suppress(JobFailed):
        deliver(runtime, job_id)
    assert read(runtime, job_id)["status"] in ("completed", "failed")


def test_a_claim_that_waited_leaves_less_time_than_the_soft_limit(runtime: Runtime) -> None:
    job = claim(runtime)
    assert Attempt(job, 30, time.monotonic()).time_left_s() == job.limits.soft_s
    long_ago = time.monotonic() - 50
    assert job.limits.soft_s - 50 < Attempt(job, 30, long_ago).time_left_s() < job.limits.soft_s - 10


def test_an_attempts_time_runs_from_the_moment_at_which_its_message_was_taken(
    runtime: Runtime, handler: SetHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Since Celery's hard limit does. The claim may have waited long for MongoDB."""
    attempts: list[Attempt] = []
    claim_job, claimed_at = worker.claim, [0.0]

    def claim_and_note(*arguments: Any) -> Any:
        claimed = claim_job(*arguments)
        claimed_at[0] = time.monotonic()
        return claimed

    monkeypatch.setattr(worker, "claim", claim_and_note)
    monkeypatch.setattr(runtime.keeper, "register", attempts.append)
    handler(raising(FailJob("enough")))
    with pytest.raises(JobFailed):
        deliver(runtime, insert_text(runtime, "Hello"))
    assert [attempt.started_at < claimed_at[0] for attempt in attempts] == [True]


@pytest.mark.usefixtures("runtime")
def test_a_message_whose_broker_is_away_goes_back_and_is_not_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_broker(**_: object) -> None:
        raise Reject("no broker", requeue=False)

    monkeypatch.setattr(worker.process_job, "retry", no_broker)
    rejected: Any = worker.redelivery(worker.process_job, ObjectId(), 1)
    assert (type(rejected), rejected.requeue) == (Reject, True)


@pytest.mark.usefixtures("runtime")
def test_a_message_in_the_parent_loses_celerys_soft_limit() -> None:
    app: Any = worker.app
    with Connection("memory://") as connection:
        message = app.amqp.as_task_v2(uuid(), worker.TASK_NAME, args=("x", {}), time_limit=50, soft_time_limit=20)
        with connection.SimpleQueue("parent") as queue:
            queue.put(message.body, headers=message.headers, serializer="json", **message.properties)
            request = JobRequest(queue.get(timeout=5), app=app, task=worker.process_job)
    assert request.time_limits == (50, None)


# ── handlers that are stopped, or break ──────────────────────────────────────────────────────────────────────────────


def test_a_cancelled_job_stops_its_generation_and_is_left_as_the_api_wrote_it(
    runtime: Runtime, notices: Notices, provider: Provider
) -> None:
    job_id = insert_text(runtime, "[hang]")
    delivered = deliver_in_thread(runtime, job_id, provider)
    change(runtime, job_id, status="failed", error_message="Cancelled.")  # as the API does it
    runtime.keeper.tick()
    assert isinstance(delivered.exception(10), Ignore)
    poll(lambda: provider.calls[0].outcome == "disconnected", 15)
    assert read(runtime, job_id)["error_message"] == "Cancelled."
    assert [notice["status"] for notice in notices.statuses(1)] == ["processing"]


def test_a_handler_that_blocks_the_loop_fails_and_the_next_job_runs(runtime: Runtime, handler: SetHandler) -> None:
    runtime.stuck_loop_s = 0.1
    released = threading.Event()

    async def block(call: Call) -> Result:
        released.wait(0 if call.input.prompt == "quick" else 30)
        return Result({"generated_text": "done"})

    handler(block)
    with pytest.raises(JobFailed, match="took too long"):
        deliver(runtime, insert_text(runtime, "slow"), timelimit=[60, 0.1])
    assert deliver(runtime, insert_text(runtime, "quick"))["status"] == "completed"
    released.set()


def test_a_cancel_ends_a_handler_with_the_cancels_reason(runtime: Runtime, provider: Provider) -> None:
    attempt = Attempt(some_job(input_data={"prompt": "[hang]"}), 30)
    with ThreadPoolExecutor(1) as threads:
        ended = threads.submit(worker.run, runtime, attempt)
        poll(lambda: provider.running, 10)
        attempt.cancel(reason := HandBack("the reason"))
        assert ended.result(10) is reason


def test_a_crash_with_the_prompt_in_its_text_leaks_it_nowhere(
    runtime: Runtime, notices: Notices, handler: SetHandler, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "worker")
    handler(raising(ValueError(f"can't do {SECRET}")))
    job_id = insert_text(runtime, f"Hello {SECRET}")
    with pytest.raises(JobFailed) as caught:
        deliver(runtime, job_id)
    published = json.dumps(notices.statuses(2))
    visible = caplog.text + str(read(runtime, job_id)["error_message"]) + published
    assert SECRET not in visible + "".join(traceback.format_exception(caught.value))


# ── statuses that come late ──────────────────────────────────────────────────────────────────────────────────────────


TRIED_AGAIN = "[status 503 times=1]"
COMPLETED = {"status": "completed", "completed_at": Ago(0), "worker__owner": "of another attempt"}
CANCELLED = {"status": "failed", "error_message": "Cancelled."}  # as the API writes it


@table(
    "prompt, which, ended, raised",
    ("another attempt, of a job that is tried again", TRIED_AGAIN, 2, COMPLETED, Retry),
    ("another attempt, of an attempt that has begun", "", 1, COMPLETED, Ignore),
    ("a cancel by the API, of a job that is tried again", TRIED_AGAIN, 2, CANCELLED, Retry),
)
def test_a_processing_that_is_published_after_the_end_is_followed_by_that_end(
    runtime: Runtime,
    notices: Notices,
    monkeypatch: pytest.MonkeyPatch,
    prompt: str,
    which: int,
    ended: dict[str, Any],
    raised: type[Exception],
) -> None:
    """A process is suspended right before it publishes the first or second `processing`, and the job ends then."""
    job_id, publish, numbers = insert_text(runtime, prompt), runtime.notifier.publish_status, count(1)

    def publish_late(document: Any, status: worker.Status, sentence: str) -> bool:
        if status == "processing" and next(numbers) == which:
            change(runtime, job_id, **ended)
        return publish(document, status, sentence)

    monkeypatch.setattr(runtime.notifier, "publish_status", publish_late)
    with pytest.raises(raised):
        deliver(runtime, job_id)
    assert [notice["status"] for notice in notices.statuses(which + 1)] == ["processing"] * which + [ended["status"]]


def test_a_job_is_tried_again_though_its_end_cant_be_looked_for(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: ObjectId) -> None:
        raise StoreUnavailable("away")

    monkeypatch.setattr(runtime.store, "look", refuse)
    with pytest.raises(Retry):
        deliver(runtime, insert_text(runtime, TRIED_AGAIN))


# ── results that can't be written ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def severed(runtime: Runtime, tmp_path: Path) -> Iterator[Runtime]:
    """The same runtime with MongoDB away, its files in a folder."""
    files = f"file://{tmp_path}/files"
    settings = runtime.settings.model_copy(update={"artifact_url": files})
    with pymongo.MongoClient[Any](f"mongodb://{NOWHERE}", timeoutMS=50) as client:
        severed = Runtime(settings, client)
        severed.keeper = runtime.keeper
        severed.mongodb_timeout_s = severed.settle_try_s = severed.poll_store_s = 0.05
        severed.store.clock.synchronise(runtime.store.now())  # it was there at the claim
        yield severed
        severed.close()


def late(job: Job) -> Attempt:
    """An attempt whose hard limit is near."""
    attempt = Attempt(job, 30)
    attempt.started_at -= job.limits.hard_s
    return attempt


def test_a_result_that_cant_be_written_is_kept_and_the_next_attempt_uses_it(
    runtime: Runtime, severed: Runtime, provider: Provider
) -> None:
    job = claim(runtime, insert_text(runtime, "Hello"))
    outcome = worker.settle(severed, late(job), Result({"generated_text": "kept"}))
    assert isinstance(outcome, LeaveJob)
    change(runtime, job.id, worker__lease_until=ago(5))
    runtime.sweeper.sweep()
    assert deliver(runtime, job.id)["status"] == "completed"
    assert read(runtime, job.id)["output_data"] == {"generated_text": "kept"}
    assert provider.calls == []
    assert worker.find_kept(runtime, job) is None


def test_a_picture_that_cant_be_written_is_kept_whole(runtime: Runtime, severed: Runtime) -> None:
    job = claim(runtime, insert(runtime, job_type=IMAGE, input_data={"prompt": "A city"}))
    worker.settle(severed, late(job), Result({}, Media(PNG, "png", "image_url")))
    change(runtime, job.id, worker__lease_until=ago(5))
    runtime.sweeper.sweep()
    deliver(runtime, job.id)
    assert stored(runtime, read(runtime, job.id)["artifact_url"]) == PNG


def test_an_unknown_outcome_never_deletes_the_file(runtime: Runtime, severed: Runtime, tmp_path: Path) -> None:
    attempt = late(claim(runtime))
    outcome = worker.settle(severed, attempt, Result({}, Media(PNG, "png", "image_url")))
    with pytest.raises(Ignore):
        worker.conclude(SimpleNamespace(runtime=severed), attempt, outcome)  # type: ignore[arg-type]
    assert [path.read_bytes() for path in tmp_path.glob("files/*")] == [PNG]


def test_the_winner_deletes_what_an_earlier_attempt_stored(runtime: Runtime) -> None:
    job_id = insert(runtime, job_type=IMAGE, input_data={"prompt": "A city", "size": "64x48"})
    earlier = claim(runtime, job_id)
    runtime.artifacts.publish(worker.file_name(earlier, "png"), PNG)
    runtime.store.release(earlier, ago(5), counted=True)
    deliver(runtime, job_id)
    [name] = runtime.artifacts.names(str(job_id))
    assert read(runtime, job_id)["artifact_url"].endswith(name)


@pytest.mark.parametrize("output", [None, "text", ["a"]], ids=repr)
def test_a_job_completes_whatever_its_handler_returns(
    runtime: Runtime, notices: Notices, handler: SetHandler, caplog: pytest.LogCaptureFixture, output: Any
) -> None:
    async def run(_call: Call) -> Result:
        return Result(output)

    handler(run)
    caplog.set_level(logging.INFO, "worker")
    job_id = insert_text(runtime, "")
    assert deliver(runtime, job_id)["status"] == "completed"
    assert (read(runtime, job_id)["output_data"], notices.statuses(2)[-1]["status"]) == (output, "completed")
    assert f"job={job_id} attempt=1 type='text_generation' completed (" in caplog.messages[-1]


def test_a_result_that_mongodb_cant_hold_fails_the_job(runtime: Runtime, handler: SetHandler) -> None:
    async def write_too_much(_call: Call) -> Result:
        return Result({"generated_text": "x" * 17_000_000})

    handler(write_too_much)
    job_id = insert_text(runtime, "Hello")
    with pytest.raises(JobFailed, match="too large"):
        deliver(runtime, job_id)
    assert read(runtime, job_id)["error_message"] == CANT_BE_STORED


def test_a_write_is_tried_until_mongodb_is_back(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.poll_store_s = 0.01
    job, complete, failures = claim(runtime), runtime.store.complete, iter([True, True, False])

    def complete_at_last(*args: Any) -> bool:
        if next(failures):
            raise StoreUnavailable("away")
        return complete(*args)

    monkeypatch.setattr(runtime.store, "complete", complete_at_last)
    outcome = worker.settle(runtime, Attempt(job, 30), Result({}))
    assert (outcome, read(runtime, job.id)["status"]) == (Result({}), "completed")


def test_settle_writes_to_the_end_although_a_signal_comes(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    job, complete = claim(runtime), runtime.store.complete

    def complete_while_a_signal_comes(*args: Any) -> bool:
        signal.raise_signal(signal.SIGTERM)
        return complete(*args)

    monkeypatch.setattr(runtime.store, "complete", complete_while_a_signal_comes)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("SIGTERM came"))
    try:
        with pytest.raises(SystemExit):
            worker.settle(runtime, Attempt(job, 30), Result({}))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert read(runtime, job.id)["status"] == "completed"


def test_a_write_is_given_up_once_a_signal_has_come(severed: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[object] = []

    def fail_while_a_signal_comes(*arguments: Any) -> bool:
        tries.append(arguments)
        signal.raise_signal(signal.SIGTERM)
        raise StoreUnavailable("away")

    monkeypatch.setattr(severed.store, "fail", fail_while_a_signal_comes)
    arrived: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: arrived.append(number))
    try:
        outcome = worker.settle(severed, Attempt(replace(some_job(), limits=Limits(1, 7)), 30), FailJob())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert isinstance(outcome, LeaveJob)
    assert (len(tries), arrived) == (1, [signal.SIGTERM])


def test_a_write_is_given_up_once_a_shutdown_is_due(severed: Runtime) -> None:
    severed.shutdown.announce(0)
    assert isinstance(worker.settle(severed, Attempt(some_job(), 30), FailJob()), LeaveJob)


def test_while_mongodb_is_away_a_message_waits_and_then_comes_back_later(
    severed: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.process_job, "runtime", severed)
    severed.store_patience_s = 0.1
    job_id = ObjectId()
    with pytest.raises(Retry):
        deliver(severed, job_id)
    assert [message["args"] for message in queued(severed)] == [[str(job_id), {"job_id": str(job_id)}]]


def test_while_mongodb_is_away_a_shutdown_gives_the_message_back(
    severed: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.process_job, "runtime", severed)
    severed.shutdown.announce(5)
    with pytest.raises(Reject) as caught:
        deliver(severed, ObjectId())
    rejected: Any = caught.value
    assert rejected.requeue
