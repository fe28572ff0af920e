"""The worker's specification, section by section in the order of worker.py. It needs no server.

MongoDB and Redis are mongomock and fakeredis here, and the provider is a scripted one in this process. What depends on
the real servers (races, failures, indexes) and what is about a detail is in tests/.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bson import ObjectId
from celery import Celery
from celery.concurrency import solo, thread
from celery.exceptions import Ignore, Reject, Retry

import worker
from testbed.answers import SOUND_DURATION_S, picture, sound_wav
from testbed.processes import SOURCE, poll
from testbed.provider import Provider
from tests.lab import (
    DELIVERY,
    IMAGE,
    LIMITS,
    PNG,
    SECRET,
    TEXT,
    Ago,
    Notices,
    SetHandler,
    ago,
    bare_settings,
    change,
    claim,
    deliver,
    deliver_in_thread,
    first_started,
    generate,
    gone_pid,
    insert,
    insert_text,
    kept,
    look,
    queued,
    raising,
    read,
    serving,
    some_job,
    stale,
    table,
    why_not,
)
from worker import Attempt, Job, JobInput, Media, NotClaimed, Reason, Result, Runtime, Status
from workerkit import sentences
from workerkit.errors import DropJob, FailJob, HandBack, InvalidInput, JobError, JobFailed, OperatorFault, RetryJob
from workerkit.messages import Delivery
from workerkit.sentences import DAMAGED, GAVE_UP, TOOK_TOO_LONG
from workerkit.settings import Limits


@pytest.fixture
def runtime(light_runtime: Runtime) -> Runtime:
    return light_runtime


# ── vocabulary ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_there_are_the_contracts_four_statuses() -> None:
    assert {status.value for status in Status} == {"pending", "processing", "completed", "failed"}


@table(
    "error, detail, sentence",
    ("nothing given", RetryJob(), "The AI service is busy", "The AI service is busy"),
    ("a detail is for the log alone", RetryJob("HTTP 503"), "HTTP 503", "The AI service is busy"),
    ("both", FailJob("HTTP 400", "Change it."), "HTTP 400", "Change it."),
    ("a sentence is better than no detail", FailJob(sentence="Change it."), "Change it.", "Change it."),
)
def test_an_error_has_a_detail_for_the_log_and_a_sentence_for_the_person(
    error: JobError, detail: str, sentence: str
) -> None:
    assert (error.detail, str(error), error.sentence) == (detail, detail, sentence)


def test_a_job_in_a_log_line_shows_no_prompt() -> None:
    job = some_job(attempt=2)
    assert str(job) == f"job={job.id} attempt=2 type='text_generation'"


# ── Celery app ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_json_is_accepted() -> None:
    configuration = worker.celery_configuration(bare_settings())
    assert configuration["accept_content"] == ["json"]
    assert {configuration["task_serializer"], configuration["result_serializer"]} == {"json"}


def test_a_message_is_acknowledged_after_its_job_and_comes_back_from_a_dead_worker() -> None:
    configuration = worker.celery_configuration(bare_settings())
    assert configuration["task_acks_late"]
    assert configuration["task_reject_on_worker_lost"]
    assert configuration["worker_prefetch_multiplier"] == 1


def test_the_queue_and_the_hard_limit_are_the_settings() -> None:
    configuration = worker.celery_configuration(bare_settings(celery_queue_name="mine", celery_time_limit=200))
    assert (configuration["task_default_queue"], configuration["task_time_limit"]) == ("mine", 200)


def test_celery_gets_no_soft_limit_since_the_attempt_has_its_own() -> None:
    assert "task_soft_time_limit" not in worker.celery_configuration(bare_settings())


def test_celery_takes_broker_and_results_from_the_settings_though_it_knows_the_variables_itself() -> None:
    urls = {"CELERY_BROKER_URL": "rediss://broker/1", "CELERY_RESULT_BACKEND": "redis://results/2"}
    script = "import worker; app = worker.app; print(app.connection_for_read().ssl, app.connection_for_write().ssl)"
    command = [sys.executable, "-c", f"{script}; print(type(app.backend).__name__, app.backend.as_uri())"]
    ended = subprocess.run(command, env={**os.environ, **urls}, cwd=SOURCE, capture_output=True, text=True, timeout=30)
    verified = str({"ssl_cert_reqs": ssl.CERT_REQUIRED})
    assert ended.stdout == f"{verified} {verified}\nResultBackend redis://results/2\n"


def test_only_rabbitmqs_queue_is_declared_by_ourselves() -> None:
    by_url = {url: worker.celery_configuration(bare_settings(celery_broker_url=url)) for url in ("", "amqp://rabbit")}
    assert by_url[""]["task_queues"] is None
    (queue,) = by_url["amqp://rabbit"]["task_queues"]
    assert (queue.name, queue.exchange.name, queue.exchange.type, queue.routing_key) == ("ai_jobs",) * 2 + (
        "direct",
        "ai_jobs",
    )


def test_importing_the_worker_reads_no_settings_and_configures_nothing(tmp_path: Path) -> None:
    script = "import worker; print('settings' in vars(worker.app), worker.app.configured)"
    environment = {**os.environ, "MONGODB_URL": "bad", "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert (ended.stdout, ended.stderr) == ("False False\n", "")


# ── job store ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pending_job_is_claimed_under_a_lease(runtime: Runtime) -> None:
    job_id = insert(runtime, input_data={"prompt": "Hello"})
    job = claim(runtime, job_id)
    document = read(runtime, job_id)
    assert (job.id, job.owner, job.attempt, job.limits) == (job_id, "owner-1", 1, LIMITS)
    assert (job.user_id, job.session_id, job.input_data) == ("user-1", None, {"prompt": "Hello"})
    assert (document["status"], document["worker"]["pid"]) == ("processing", os.getpid())
    lease_s = (document["worker"]["lease_until"] - document["updated_at"]).total_seconds()
    assert lease_s == runtime.settings.lease_seconds


def test_an_attempt_has_the_less_time_the_longer_ago_its_message_was_taken(runtime: Runtime) -> None:
    job_id = insert(runtime)
    runtime.store.claim(job_id, "owner-1", DELIVERY, waited_s=5.0)
    document = read(runtime, job_id)
    assert (document["worker"]["deadline"] - document["started_at"]).total_seconds() == LIMITS.hard_s - 5


def test_a_released_job_that_is_due_is_claimed_with_one_more_attempt(runtime: Runtime) -> None:
    job = claim(runtime)
    runtime.store.release(job, ago(5), counted=True)
    assert claim(runtime, job.id, "owner-2").attempt == 2


def test_started_at_is_the_first_start(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, **first_started(60))
    before = read(runtime, job.id)
    runtime.store.release(job, ago(5), counted=True)
    again = claim(runtime, job.id, "owner-2")
    assert read(runtime, job.id)["started_at"] == before["started_at"]
    assert again.first_started_at.replace(tzinfo=None) == before["worker"]["first_started_at"]


@table(
    "fields",
    ("failed, and set back to pending", {}),
    ("after all its attempts", {"worker__attempt": 4}),
    ("after its deadline", {"worker__first_started_at": Ago(3600), "worker__available_at": Ago(-3600)}),
    ("whatever its bookkeeping is", {"worker": "text"}),
)
def test_a_job_that_is_set_back_to_pending_starts_afresh(runtime: Runtime, fields: dict[str, Any]) -> None:
    job = claim(runtime)
    runtime.store.fail(job, "No.")
    change(runtime, job.id, **fields)
    change(runtime, job.id, status="pending")
    again = claim(runtime, job.id, "owner-2")
    document = read(runtime, job.id)
    assert (again.attempt, again.owner, document["worker"]["attempt"]) == (1, "owner-2", 1)
    assert (document["completed_at"], document["error_message"]) == (None, None)
    assert document["started_at"] == document["worker"]["first_started_at"] == document["updated_at"]
    assert "unnotified" not in document["worker"]


def test_a_claim_whose_reply_was_lost_is_recognised_by_its_owner(runtime: Runtime) -> None:
    job = claim(runtime)
    assert runtime.store.claim(job.id, job.owner, DELIVERY) == job


def test_a_live_lease_is_held(runtime: Runtime) -> None:
    assert why_not(runtime, claim(runtime).id) is Reason.HELD


def test_an_expired_lease_is_never_claimed_before_a_sweeper_released_it(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(60))
    assert why_not(runtime, job.id) is Reason.HELD


def test_an_older_workers_running_job_is_held(runtime: Runtime) -> None:
    assert why_not(runtime, insert(runtime, status="processing", worker=None)) is Reason.HELD


def test_a_released_job_waits_until_it_is_due(runtime: Runtime) -> None:
    job = claim(runtime)
    runtime.store.release(job, ago(-60), counted=True)
    assert why_not(runtime, job.id) is Reason.WAITING


@table("status", ("completed", "completed"), ("failed or cancelled", "failed"))
def test_an_ended_job_is_not_claimed(runtime: Runtime, status: str) -> None:
    refused = runtime.store.claim(insert(runtime, status=status), "owner-1", DELIVERY)
    assert isinstance(refused, NotClaimed)
    assert refused.job
    assert (refused.reason, refused.job.status) == (Reason.TERMINAL, status)


def test_a_job_without_document_is_unknown(runtime: Runtime) -> None:
    assert why_not(runtime, ObjectId()) is Reason.UNKNOWN


@table("status", ("a fifth one", "archived"), ("none", None))
def test_a_document_of_another_status_is_no_job(runtime: Runtime, status: str | None) -> None:
    job = claim(runtime)
    change(runtime, job.id, status=status, worker__owner=None)
    assert why_not(runtime, job.id) is Reason.FOREIGN_STATUS


@table("fields", ("all attempts are used up", {"worker__attempt": 4}), ("its deadline has passed", first_started(3600)))
def test_a_job_at_its_bounds_is_not_claimed(runtime: Runtime, fields: dict[str, Any]) -> None:
    job = claim(runtime)
    runtime.store.release(job, ago(5), counted=True)
    change(runtime, job.id, **fields)
    assert why_not(runtime, job.id) is Reason.EXHAUSTED
    assert isinstance(runtime.store.claim(job.id, "owner-2", DELIVERY, bounded=False), Job)


def test_the_job_deadline_is_never_below_the_attempts_own_limit(runtime: Runtime) -> None:
    job = claim(runtime)
    runtime.store.release(job, ago(5), counted=True)
    change(runtime, job.id, **first_started(700))
    assert isinstance(runtime.store.claim(job.id, "owner-2", Delivery(Limits(900, 1000))), Job)


def test_complete_writes_output_and_time_and_clears_the_error(runtime: Runtime) -> None:
    job = claim(runtime)
    assert runtime.store.complete(job, {"image_url": "/a.png"}, "/a.png")
    document = read(runtime, job.id)
    assert (document["status"], document["output_data"]) == ("completed", {"image_url": "/a.png"})
    assert (document["artifact_url"], document["error_message"]) == ("/a.png", None)
    assert document["completed_at"] == document["updated_at"]
    assert (document["worker"]["owner"], "unnotified" in document["worker"]) == ("owner-1", True)


def test_fail_writes_the_sentence_and_completed_at_too(runtime: Runtime) -> None:
    job = claim(runtime)
    assert runtime.store.fail(job, "That was too much.")
    document = read(runtime, job.id)
    assert (document["status"], document["error_message"]) == ("failed", "That was too much.")
    assert isinstance(document["completed_at"], datetime)


def end_by_complete(runtime: Runtime, job: Job) -> bool:
    return runtime.store.complete(job, {}, None)


def end_by_fail(runtime: Runtime, job: Job) -> bool:
    return runtime.store.fail(job, "No.")


def end_by_release(runtime: Runtime, job: Job) -> bool:
    return runtime.store.release(job, ago(0), counted=False)


VERBS = [end_by_complete, end_by_fail, end_by_release]


@pytest.mark.parametrize("end", VERBS)
@table(
    "fields",
    ("another attempt owns it", {"worker__owner": "owner-2"}),
    ("a sweeper released it", {"worker__owner": None}),
    ("the API cancelled it", {"status": "failed", "error_message": "Cancelled."}),
    ("another attempt completed it", {"status": "completed", "worker__owner": "owner-2"}),
)
def test_an_attempt_that_lost_its_job_writes_nothing(
    runtime: Runtime, end: Callable[[Runtime, Job], bool], fields: dict[str, Any]
) -> None:
    job = claim(runtime)
    change(runtime, job.id, **fields)
    before = read(runtime, job.id)
    assert not end(runtime, job)
    assert read(runtime, job.id) == before


@pytest.mark.parametrize("end", [end_by_complete, end_by_fail])
def test_an_end_whose_reply_was_lost_is_recognised_as_our_own(
    runtime: Runtime, end: Callable[[Runtime, Job], bool]
) -> None:
    job = claim(runtime)
    assert end(runtime, job)
    before = read(runtime, job.id)
    assert end(runtime, job)
    assert read(runtime, job.id) == before


def test_a_release_whose_reply_was_lost_is_recognised_as_our_own(runtime: Runtime) -> None:
    job = claim(runtime)
    assert end_by_release(runtime, job)
    assert end_by_release(runtime, job)


@table("counted, attempt", ("a try that counts", True, 1), ("a hand-back doesn't count", False, 0))
def test_release_lets_go_of_the_job(runtime: Runtime, counted: bool, attempt: int) -> None:
    job, due = claim(runtime), ago(-20).replace(microsecond=0)
    assert runtime.store.release(job, due, counted=counted)
    document = read(runtime, job.id)
    assert (document["status"], document["worker"]["owner"]) == ("processing", None)
    assert document["worker"]["attempt"] == attempt
    assert document["worker"]["available_at"].replace(tzinfo=UTC) == due
    assert document["worker"]["rescue_at"] > document["worker"]["available_at"]


def test_a_pending_job_can_be_failed_without_a_claim(runtime: Runtime) -> None:
    job_id = insert(runtime)
    assert runtime.store.fail_unowned(job_id, "Damaged.")
    document = read(runtime, job_id)
    assert (document["status"], document["error_message"]) == ("failed", "Damaged.")


def test_a_released_job_can_be_failed_without_a_claim(runtime: Runtime) -> None:
    job = claim(runtime)
    runtime.store.release(job, ago(-60), counted=True)
    assert runtime.store.fail_unowned(job.id, "Stopped.")


def test_a_renewal_moves_the_lease_and_not_updated_at(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(5))
    before = read(runtime, job.id)
    runtime.store.renew_leases([job])
    after = read(runtime, job.id)
    assert after["worker"]["lease_until"] > before["worker"]["lease_until"]
    assert after["updated_at"] == before["updated_at"]


def test_a_renewal_that_comes_late_does_not_shorten_the_lease(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(-3600))
    before = read(runtime, job.id)
    runtime.store.renew_leases([job])
    assert read(runtime, job.id) == before


def test_a_lost_job_is_found_among_those_that_run(runtime: Runtime) -> None:
    kept, cancelled, taken, deleted = (claim(runtime, owner=f"owner-{number}") for number in range(4))
    change(runtime, cancelled.id, status="failed")
    change(runtime, taken.id, worker__owner="another")
    runtime.database["jobs"].delete_one({"_id": deleted.id})
    assert runtime.store.find_lost([kept, cancelled, taken, deleted]) == [cancelled, taken, deleted]


def test_an_ended_job_stays_in_the_outbox_until_its_notice_is_out(runtime: Runtime) -> None:
    job, running = claim(runtime), claim(runtime, owner="owner-2")
    runtime.store.fail(job, "No.")
    assert [document["_id"] for document in runtime.store.find_unnotified(0)] == [job.id]
    assert list(runtime.store.find_unnotified(60)) == []
    runtime.store.mark_notified([(job.id, "a former attempt")])
    assert len(list(runtime.store.find_unnotified(0))) == 1
    runtime.store.mark_notified([(job.id, job.owner), (running.id, running.owner)])
    assert list(runtime.store.find_unnotified(0)) == []


def test_a_renewal_in_between_saves_the_job_from_the_sweeper(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(5))
    [lost] = runtime.store.find_stale()
    runtime.store.renew_leases([job])
    assert not runtime.store.release_stale(lost)
    assert not runtime.store.fail_seen(lost, "Given up.")
    assert read(runtime, job.id)["worker"]["owner"] == job.owner


def test_each_rescue_is_twice_as_far_up_to_ten_minutes(runtime: Runtime) -> None:
    job, waits_s = claim(runtime), []
    change(runtime, job.id, worker__owner=None)
    for _ in range(7):
        runtime.store.release_stale(look(runtime, job.id))
        released = read(runtime, job.id)["worker"]
        waits_s.append((released["rescue_at"] - released["available_at"]).total_seconds())
    assert waits_s == [30, 60, 120, 240, 480, 600, 600]


@table(
    "fields, is_past",
    ("the first attempt", {}, False),
    ("the last attempt", {"worker__attempt": 4}, True),
    ("its time is over", first_started(601), True),
    ("its own limit is longer", {**first_started(601), "worker__limits": [9000, 8000]}, False),
    ("an older worker's", {"worker": None}, False),
)
def test_a_job_is_past_its_bounds_by_attempts_or_time(runtime: Runtime, fields: dict[str, Any], is_past: bool) -> None:
    job = claim(runtime)
    change(runtime, job.id, **fields)
    assert runtime.store.is_past_bounds(look(runtime, job.id)) is is_past


# ── notifier ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_status_message_has_the_contracts_shape(runtime: Runtime, notices: Notices) -> None:
    document = {"_id": ObjectId(), "user_id": "user-1", "session_id": None, "input_data": {"prompt": "planted"}}
    assert runtime.notifier.publish_status(document, Status.PROCESSING, "It has started.")
    head = {"type": "job_status_update", "user_id": "user-1", "job_id": str(document["_id"])}
    tail = {"status": "processing", "session_id": None, "message": "It has started."}
    assert notices.statuses(1) == [{**head, **tail}]


def test_a_progress_message_names_attempt_and_place(runtime: Runtime, notices: Notices) -> None:
    job = some_job(attempt=2)
    assert runtime.notifier.publish_progress(job, 7, "some words")
    head = {"type": "job_progress", "user_id": "user-1", "job_id": str(job.id), "session_id": "s-1"}
    assert notices.of("job_progress", 1) == [{**head, "attempt": 2, "sequence": 7, "delta": "some words"}]


def test_progress_without_a_subscriber_is_not_sent_again_for_a_second(runtime: Runtime, at: list[float]) -> None:
    notifier = runtime.notifier
    assert notifier.may_have_listeners()
    assert not notifier.publish_progress(some_job(), 0, "x")
    assert not notifier.may_have_listeners()
    at[0] += notifier.recheck_s
    assert notifier.may_have_listeners()


def test_a_status_without_a_subscriber_counts_as_published(runtime: Runtime) -> None:
    assert runtime.notifier.publish_status({"_id": ObjectId()}, Status.FAILED, "x")


@table(
    "result",
    ("a text", Result({"generated_text": "Да\0$x", "tokens_used": 3})),
    ("a file", Result({"resolution": "1x1"}, Media(b"\x00\xff\x89PNG", "png", "image_url"))),
)
def test_a_kept_result_comes_back_whole(runtime: Runtime, result: Result) -> None:
    job = some_job()
    assert runtime.notes.keep_result(job.kept_name, result)
    assert worker.find_kept(runtime, job) == result
    runtime.notes.forget_result(job.kept_name)
    assert worker.find_kept(runtime, job) is None


# ── handlers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_contracts_text_job_is_done_and_streamed(provider: Provider) -> None:
    pieces: list[str] = []
    asked_for = {"prompt": "Generate a story about AI", "max_tokens": 200}
    result = generate("text_generation", asked_for, serving(provider), pieces)
    assert result.output["generated_text"] == "".join(pieces)
    assert (result.output["model_used"], result.output["tokens_used"]) == ("testbed-model", 25)
    assert result.media is None


def test_the_contracts_image_job_is_done(provider: Provider) -> None:
    result = generate("image_generation", {"prompt": "A futuristic city", "size": "512x512"}, serving(provider))
    assert result.output == {"model_used": "testbed-model", "resolution": "512x512"}
    assert result.media == Media(picture(512, 512), "png", "image_url")


def test_the_contracts_audio_job_is_done(provider: Provider) -> None:
    result = generate("audio_generation", {"text": "Hello world", "voice": "default"}, serving(provider))
    assert result.output["duration_seconds"] == pytest.approx(SOUND_DURATION_S, abs=0.01)
    assert (result.output["model_used"], result.output["format"]) == ("testbed-model", "wav")
    assert result.media == Media(sound_wav(), "wav", "audio_url")


def test_more_tokens_than_configured_are_refused_before_anything_is_spent(provider: Provider) -> None:
    with pytest.raises(FailJob) as caught:
        generate(TEXT, {"prompt": "Hi", "max_tokens": 101}, serving(provider, text_max_tokens=100))
    assert "max_tokens should be at most 100" in caught.value.sentence
    assert provider.calls == []


@table(
    "model, used",
    ("none", None, "testbed-model"),
    ("the default", "testbed-model", "testbed-model"),
    ("one on the list", "large", "large"),
)
def test_a_model_on_the_allow_list_is_used(provider: Provider, model: str | None, used: str) -> None:
    generate(TEXT, {"prompt": "Hi", "model": model}, serving(provider, text_models="small,large"))
    assert provider.calls[0].body["model"] == used


@table("model", ("unknown", "dear"), ("empty", ""), ("another type's", "pictures"))
def test_a_model_off_the_list_is_refused_with_the_list(provider: Provider, model: str) -> None:
    settings = serving(provider, text_models="small", image_models="pictures")
    with pytest.raises(FailJob) as caught:
        generate(TEXT, {"prompt": "Hi", "model": model}, settings)
    assert caught.value.sentence == sentences.model_not_offered(["testbed-model", "small"])
    assert provider.calls == []


@pytest.mark.usefixtures("handler")
def test_the_input_of_your_own_job_type_is_checked() -> None:
    class Wanted(JobInput):
        text: str

    worker.handles("mine", Wanted)(worker.text_generation)
    with pytest.raises(InvalidInput) as caught:
        generate("mine", {}, bare_settings())
    assert caught.value.sentence == "Your request can't be used: text is missing."


def test_an_unknown_job_type_is_named_cut_to_size() -> None:
    with pytest.raises(FailJob) as caught:
        worker.find_handler("video_generation" + "!" * 1000)
    assert "video_generation" in caught.value.sentence
    assert len(caught.value.sentence) < 150


# ── recovery ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_cancel_before_the_handler_runs_stops_it_as_it_begins() -> None:
    attempt, stops = Attempt(some_job(), 30), []
    attempt.cancel(DropJob("early"))
    attempt.bind(lambda: stops.append("stopped"))
    assert stops == ["stopped"]


def test_only_the_first_reason_of_a_cancel_counts() -> None:
    attempt, stops = Attempt(some_job(), 30), []
    attempt.bind(lambda: stops.append("stopped"))
    attempt.cancel(HandBack("first"))
    attempt.cancel(DropJob("second"))
    assert (str(attempt.reason), stops) == ("first", ["stopped"])


def test_a_lease_is_fresh_for_as_long_as_it_was_given(at: list[float]) -> None:
    attempt = Attempt(some_job(), 30)
    at[0] += 29
    assert attempt.is_lease_fresh()
    at[0] += 1
    assert not attempt.is_lease_fresh()


def test_no_lease_is_renewed_past_the_hard_limit_and_a_margin(at: list[float]) -> None:
    attempt = Attempt(some_job(), 30)
    at[0] += LIMITS.hard_s
    assert attempt.may_renew()
    at[0] += worker.LIMIT_MARGIN_S
    assert not attempt.may_renew()


@table(
    "fields, timelimit",
    ("its lease ran out", {"worker__lease_until": Ago(5)}, [120, 90]),
    ("released, and its message was lost", {"worker__owner": None, "worker__rescue_at": Ago(5)}, [120, 90]),
    ("an older worker's", {"worker": None, "started_at": Ago(3600)}, [None, None]),
)
def test_a_lost_job_goes_back_into_the_queue_with_its_limits_and_no_prompt(
    runtime: Runtime, fields: dict[str, Any], timelimit: list[float | None]
) -> None:
    job = claim(runtime)
    change(runtime, job.id, **fields)
    assert runtime.sweeper.sweep() == [f"job={job.id} no attempt worked on it: put back into the queue"]
    [message] = queued(runtime)
    assert (message["args"], message["timelimit"]) == ([str(job.id), {"job_id": str(job.id)}], timelimit)
    assert isinstance(runtime.store.claim(job.id, "owner-2", DELIVERY), Job)


def test_a_lost_job_at_its_bounds_fails_and_the_person_is_notified(runtime: Runtime, notices: Notices) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(5), worker__attempt=4)
    assert runtime.sweeper.sweep() == [f"job={job.id} failed: {GAVE_UP}"]
    [notice] = notices.statuses(1)
    assert (notice["status"], notice["message"]) == ("failed", GAVE_UP)
    assert "unnotified" not in read(runtime, job.id)["worker"]
    assert queued(runtime) == []


def test_a_notice_that_got_lost_is_published_again_once(runtime: Runtime, notices: Notices) -> None:
    job = claim(runtime)
    runtime.store.complete(job, {}, None)
    change(runtime, job.id, worker__unnotified=ago(31))
    assert runtime.sweeper.sweep() == [f"job={job.id} its last notification was published again"]
    assert runtime.sweeper.sweep() == []
    assert [notice["status"] for notice in notices.statuses(1)] == ["completed"]


def test_a_job_whose_process_died_is_released_at_once(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__pid=gone_pid())
    assert runtime.sweeper.release_dead_siblings() == [f"job={job.id} its process died: released"]
    assert isinstance(runtime.store.claim(job.id, "owner-2", DELIVERY), Job)


def test_a_job_whose_process_was_killed_at_the_hard_limit_took_too_long(runtime: Runtime, notices: Notices) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__pid=gone_pid(), worker__deadline=ago(0))
    runtime.sweeper.release_dead_siblings()
    assert read(runtime, job.id)["error_message"] == TOOK_TOO_LONG
    assert notices.statuses(1)[0]["message"] == TOOK_TOO_LONG


@table(
    "document, sentence",
    ("a failure says why", {"status": "failed", "error_message": "No."}, "No."),
    ("or at least that", {"status": "failed", "error_message": None}, sentences.FAILED),
    ("a success has no message", {"status": "completed"}, "Your result is ready."),
)
def test_every_end_has_a_sentence_for_the_person(document: dict[str, Any], sentence: str) -> None:
    assert sentences.final_sentence(document) == sentence


def test_a_tick_renews_the_leases_of_all_running_jobs(runtime: Runtime) -> None:
    attempts = [kept(runtime, f"owner-{number}") for number in range(2)]
    for attempt in attempts:
        attempt.renewed_at = 0.0
        change(runtime, attempt.job.id, worker__lease_until=ago(5))
    runtime.keeper.tick()
    assert all(attempt.is_lease_fresh() for attempt in attempts)
    assert stale(runtime) == []


def test_an_attempt_past_its_hard_limit_loses_its_lease(runtime: Runtime) -> None:
    attempt = kept(runtime)
    attempt.started_at -= LIMITS.hard_s + 6
    change(runtime, attempt.job.id, worker__lease_until=ago(5))
    runtime.keeper.tick()
    assert len(stale(runtime)) == 1


def test_a_tick_stops_the_attempts_that_lost_their_jobs(runtime: Runtime) -> None:
    cancelled, running = kept(runtime, "owner-1"), kept(runtime, "owner-2")
    change(runtime, cancelled.job.id, status="failed")
    runtime.keeper.tick()
    assert isinstance(cancelled.reason, DropJob)
    assert running.reason is None


def test_a_tick_empties_the_outbox_for_what_was_published(runtime: Runtime) -> None:
    published, other = claim(runtime), claim(runtime, owner="owner-2")
    for job in (published, other):
        runtime.store.complete(job, {}, None)
    runtime.keeper.note_published(published.id, published.owner)
    runtime.keeper.tick()
    assert [document["_id"] for document in runtime.store.find_unnotified(0)] == [other.id]


def test_attempts_are_handed_back_once_the_grace_is_over(runtime: Runtime) -> None:
    attempt = kept(runtime)
    runtime.shutdown.announce(3600)
    runtime.keeper.tick()
    assert attempt.reason is None
    runtime.shutdown.announce(0)
    runtime.keeper.tick()
    assert isinstance(attempt.reason, HandBack)


# ── task ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_text_job_goes_from_message_to_document_and_person(runtime: Runtime, notices: Notices) -> None:
    job_id = insert_text(runtime, "[say one two three]")
    assert deliver(runtime, job_id) == {"job_id": str(job_id), "status": "completed"}
    document = read(runtime, job_id)
    wanted: Any = {"generated_text": "one two three", "model_used": "testbed-model", "tokens_used": 7}
    wanted |= {"prompt_tokens": 4, "completion_tokens": 3}
    assert (document["output_data"], document["artifact_url"]) == (wanted, None)
    assert [notice["status"] for notice in notices.statuses(2)] == ["processing", "completed"]
    assert "".join(piece["delta"] for piece in notices.of("job_progress", 1)) == "one two three"


@table(
    "args, kwargs",
    ("by position", ("{id}", {}), {}),
    ("by name", (), {"job_id": "{id}", "job_data": {}}),
    ("mixed", ("{id}",), {"job_data": {"user_id": "x"}}),
)
def test_a_message_of_either_calling_convention_is_read(
    runtime: Runtime, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    job_id = insert_text(runtime, "Hello")
    filled = [str(job_id) if one == "{id}" else one for one in args]
    named = {name: str(job_id) if one == "{id}" else one for name, one in kwargs.items()}
    assert deliver(runtime, *filled, **named)["status"] == "completed"


@table(
    "args, kwargs",
    ("no arguments", (), {}),
    ("an id that isn't hex", ("xyz", {}), {}),
    ("an id that is a number", (12, {}), {}),
    ("an id in a list", (["0" * 24], {}), {}),
    ("an id with a line end", ("0" * 24 + "\n", {}), {}),
    ("null", (None, None), {}),
    ("other names", (), {"id": "0" * 24}),
)
def test_a_message_without_a_job_id_is_dropped_with_a_log_line(
    runtime: Runtime, caplog: pytest.LogCaptureFixture, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    with pytest.raises(JobFailed, match="names no job"):
        deliver(runtime, *args, **kwargs)
    assert "without a job id" in caplog.text


@table(
    "args, kwargs",
    ("no data", (), {}),
    ("data that is text", ("text",), {}),
    ("data that is a list", ([],), {}),
    ("a third argument", ({}, 1), {}),
    ("the same argument twice", ({},), {"job_id": "x"}),
    ("an unknown argument", (), {"data": {}}),
)
def test_a_damaged_message_fails_the_document_that_it_names(
    runtime: Runtime, notices: Notices, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    job_id = insert_text(runtime, "Hello")
    kwargs = {name: str(job_id) if name == "job_id" else value for name, value in kwargs.items()}
    with pytest.raises(JobFailed, match="damaged"):
        deliver(runtime, str(job_id), *args, **kwargs)
    assert read(runtime, job_id)["error_message"] == DAMAGED
    assert notices.statuses(1)[0]["user_id"] == "user-1"


def test_the_document_wins_over_the_message(runtime: Runtime, notices: Notices) -> None:
    job_id = insert_text(runtime, "[say from the document]")
    lies = {"user_id": "another", "job_type": IMAGE, "input_data": {"prompt": "from the message"}, "job_id": "x"}
    deliver(runtime, str(job_id), lies)
    assert read(runtime, job_id)["output_data"]["generated_text"] == "from the document"
    assert {notice["user_id"] for notice in notices.statuses(2)} == {"user-1"}


def test_a_message_about_an_ended_job_repeats_the_notice_and_generates_nothing(
    runtime: Runtime, notices: Notices, provider: Provider
) -> None:
    job_id = insert_text(runtime, "Hello")
    first = deliver(runtime, job_id)
    assert deliver(runtime, job_id) == first
    assert len(provider.calls) == 1
    assert notices.statuses(3)[-1]["status"] == "completed"


def test_a_message_about_a_running_job_is_ignored(runtime: Runtime, provider: Provider) -> None:
    job = claim(runtime)
    with pytest.raises(Ignore):
        deliver(runtime, job.id)
    assert (read(runtime, job.id)["worker"]["owner"], provider.calls) == ("owner-1", [])


def test_a_message_before_its_time_comes_back_then_without_a_prompt(runtime: Runtime) -> None:
    job = claim(runtime)
    runtime.store.release(job, ago(-60), counted=True)
    with pytest.raises(Retry):
        deliver(runtime, job.id, timelimit=[120, 90])
    [message] = queued(runtime)
    assert message["args"] == [str(job.id), {"job_id": str(job.id)}]
    assert message["timelimit"] == [120, 90]
    assert ago(-55) < datetime.fromisoformat(message["eta"]) < ago(-65)


def test_a_message_about_a_job_at_its_bounds_fails_it(runtime: Runtime) -> None:
    job = claim(runtime)
    runtime.store.release(job, ago(5), counted=True)
    change(runtime, job.id, worker__attempt=4)
    with pytest.raises(JobFailed):
        deliver(runtime, job.id)
    assert read(runtime, job.id)["error_message"] == GAVE_UP


def test_a_message_without_a_document_fails(runtime: Runtime) -> None:
    with pytest.raises(JobFailed, match="no such job"):
        deliver(runtime, ObjectId())


@table(
    "fields, sentence",
    ("an unknown job type", {"job_type": "video_generation"}, "isn't known here"),
    ("no job type", {"job_type": None}, "isn't known here"),
    ("no input", {"input_data": None}, "should be an object"),
    ("a bad input", {"input_data": {"prompt": ""}}, "should not be blank"),
    ("a provider that refuses", {"input_data": {"prompt": "[status 400]"}}, "refused this request"),
    ("a wrong key", {"input_data": {"prompt": "[status 401]"}}, "isn't set up correctly"),
)
def test_a_job_that_can_never_succeed_fails_at_once(
    runtime: Runtime, notices: Notices, fields: dict[str, Any], sentence: str
) -> None:
    job_id = insert(runtime, **fields)
    with pytest.raises(JobFailed, match=sentence):
        deliver(runtime, job_id)
    document = read(runtime, job_id)
    assert (document["status"], sentence in document["error_message"]) == ("failed", True)
    assert notices.statuses(2)[-1]["message"] == document["error_message"]


def test_the_line_about_an_end_says_what_an_operator_asks(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "worker")
    job_id = insert_text(runtime, "[say one two three]", created_at=ago(700))
    deliver(runtime, job_id)
    figures = r"\(waited 70\d\.\d s, ran \d\.\d s, testbed-model at http://\S+, 7 tokens\)"
    assert re.fullmatch(f"job={job_id} attempt=1 type='text_generation' completed {figures}", caplog.messages[-1])


@table(
    "fields, level",
    ("a person's input", {"input_data": {"prompt": ""}}, "INFO"),
    ("the operator's key", {"input_data": {"prompt": "[status 401]"}}, "ERROR"),
    ("the operator's model or URL", {"input_data": {"prompt": "[status 404]"}}, "ERROR"),
    ("the operator's HANDLER_MODULES", {"job_type": "video_generation"}, "ERROR"),
)
def test_a_failure_is_logged_by_whose_fault_it_is(
    runtime: Runtime, caplog: pytest.LogCaptureFixture, fields: dict[str, Any], level: str
) -> None:
    caplog.set_level(logging.INFO, "worker")
    with pytest.raises(JobFailed):
        deliver(runtime, insert(runtime, **fields))
    assert (caplog.records[-1].levelname, " failed: " in caplog.messages[-1]) == (level, True)


def test_a_busy_provider_means_a_wait_that_the_person_reads(runtime: Runtime, notices: Notices) -> None:
    runtime.settings.retry_delays = (0.5,) * 3
    job_id = insert_text(runtime, "[status 503 times=1]")
    with pytest.raises(Retry):
        deliver(runtime, job_id)
    notice = notices.statuses(2)[-1]
    assert notice["status"] == "processing"
    assert notice["message"] == "The AI service is busy; trying again in 1 s (2 of 4)."
    assert read(runtime, job_id)["worker"]["owner"] is None
    assert len(queued(runtime)) == 1


def test_a_retry_that_is_due_completes_the_job(runtime: Runtime, notices: Notices) -> None:
    job_id = insert_text(runtime, "[status 503 times=1]")
    with pytest.raises(Retry):
        deliver(runtime, job_id)
    change(runtime, job_id, worker__available_at=ago(5))
    assert deliver(runtime, job_id)["status"] == "completed"
    assert "(try 2 of 4)" in notices.statuses(3)[2]["message"]


def test_the_last_try_fails_the_job_and_says_how_many_there_were(runtime: Runtime) -> None:
    job = claim(runtime, insert_text(runtime, "[status 503]"))
    runtime.store.release(job, ago(5), counted=True)
    change(runtime, job.id, worker__attempt=3)
    with pytest.raises(JobFailed, match="given up after 4 tries"):
        deliver(runtime, job.id)


def test_a_shutdown_hands_a_running_job_back_uncounted(runtime: Runtime, provider: Provider) -> None:
    job_id = insert_text(runtime, "[hang]")
    delivered = deliver_in_thread(runtime, job_id, provider)
    runtime.shutdown.announce(0)
    runtime.keeper.tick()
    rejected: Any = delivered.exception(10)
    assert (type(rejected), rejected.requeue) == (Reject, True)
    bookkeeping = read(runtime, job_id)["worker"]
    assert (bookkeeping["owner"], bookkeeping["attempt"]) == (None, 0)


def test_a_job_beyond_its_soft_limit_fails_and_closes_its_socket(runtime: Runtime, provider: Provider) -> None:
    deliver(runtime, insert_text(runtime, "warm up"))
    with pytest.raises(JobFailed, match="took too long"):
        deliver(runtime, insert_text(runtime, "[hang]"), timelimit=[60, 2])
    poll(lambda: provider.calls_for("[hang]")[0].outcome == "disconnected", 15)


@table(
    "error, outcome, detail",
    ("a retry stays one", RetryJob("busy", after_s=3), RetryJob, "busy"),
    ("a failure stays one", FailJob("bad"), FailJob, "bad"),
    ("a time-out of its own is no deadline", TimeoutError(), RetryJob, "TimeoutError"),
    ("a cancel without a reason", asyncio.CancelledError(), DropJob, "cancelled"),
    ("a defect names its place", KeyError(SECRET), OperatorFault, "KeyError at lab.py:"),
)
def test_however_a_handler_ends_it_is_an_outcome(
    runtime: Runtime, handler: SetHandler, error: BaseException, outcome: type[JobError], detail: str
) -> None:
    handler(raising(error))
    ended = worker.run(runtime, Attempt(some_job(), 30))
    assert type(ended) is outcome
    assert detail in str(ended)


@table(
    "attempt, error, least_s, most_s",
    ("the first wait, jittered", 1, RetryJob(), 2.5, 5),
    ("the second", 2, RetryJob(), 7.5, 15),
    ("the third", 3, RetryJob(), 22.5, 45),
    ("as the provider asks", 3, RetryJob(after_s=7), 7, 7),
    ("at once, if it says so", 1, RetryJob(after_s=0), 0, 0),
    ("to its cap while it is away", 1, RetryJob(after_s=3600, is_counted=False), 120, 120),
    ("uncounted, whatever the tries", 4, RetryJob(after_s=7, is_counted=False), 7, 7),
)
def test_a_retry_gets_its_wait(runtime: Runtime, attempt: int, error: RetryJob, least_s: float, most_s: float) -> None:
    outcome = worker.within_bounds(runtime, some_job(attempt=attempt), error)
    assert isinstance(outcome, RetryJob)
    assert outcome.after_s is not None
    assert least_s <= outcome.after_s <= most_s


@table(
    "attempt, age_s, after_s, says",
    ("the tries are used up", 4, 0, 30, "The AI service is busy; given up after 4 tries."),
    ("our wait would end too late", 2, 599, None, "given up after 2 tries."),
    ("even after the first", 1, 599, None, "given up after one try."),
    ("the provider's would end too late", 1, 580, 30, "The AI service is busy. Please try again after "),
    ("the provider's is longer than is waited", 1, 0, 3600, "The AI service is busy. Please try again after "),
)
def test_a_retry_beyond_the_bounds_fails(runtime: Runtime, attempt: int, age_s: int, after_s: int, says: str) -> None:
    job = some_job(attempt=attempt, first_started_at=ago(age_s))
    outcome = worker.within_bounds(runtime, job, RetryJob("HTTP 503", after_s=after_s))
    assert isinstance(outcome, FailJob)
    assert says in outcome.sentence


@pytest.mark.parametrize("outcome", [Result({}), FailJob(), HandBack(), DropJob()])
def test_what_is_no_retry_stays_as_it_is(runtime: Runtime, outcome: worker.Outcome) -> None:
    assert worker.within_bounds(runtime, some_job(attempt=4), outcome) is outcome


def test_an_attempt_that_lost_its_job_deletes_its_file(runtime: Runtime) -> None:
    attempt = Attempt(claim(runtime), 30)
    change(runtime, attempt.job.id, status="failed", error_message="Cancelled.")
    outcome = worker.settle(runtime, attempt, Result({}, Media(PNG, "png", "image_url")))
    assert len(list(runtime.artifacts.names())) == 1
    with pytest.raises(Ignore):
        worker.conclude(SimpleNamespace(runtime=runtime), attempt, outcome)  # type: ignore[arg-type]
    assert list(runtime.artifacts.names()) == []


# ── hooks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@table("how, grace_s", ("SIGTERM", "Warm", 7.0), ("Ctrl-C twice", "Cold", 0.0))
def test_a_shutdown_has_the_grace_of_its_kind(runtime: Runtime, at: list[float], how: str, grace_s: float) -> None:
    runtime.settings.shutdown_grace = 7
    worker.announce_shutdown(how=how)
    assert runtime.shutdown.due_at == 1000.0 + grace_s


@pytest.fixture
def started_worker() -> Iterator[SimpleNamespace]:
    """A worker of the app that has started in this process, as far as the hooks know."""
    started = SimpleNamespace(app=worker.app, pool_cls="solo", concurrency=1)
    worker.connect_hooks(started)
    yield started
    for signal, hook in worker.HOOKS:
        signal.disconnect(hook)


@table(
    "pool", ("solo announces itself as a child does", solo.TaskPool), ("threads at the worker's start", thread.TaskPool)
)
def test_the_keeper_starts_once_in_the_process_that_runs_jobs(
    runtime: Runtime, started_worker: SimpleNamespace, tmp_path: Path, pool: Callable[[int], object]
) -> None:
    worker.start_in_threads(SimpleNamespace(pool=pool(1)))
    poll(lambda: list(tmp_path.glob("heartbeat/*")), 10)
    worker.stop_keeper()
    assert not list(tmp_path.glob("heartbeat/*"))


def test_the_worker_of_another_app_calls_no_hook() -> None:
    worker.connect_hooks(SimpleNamespace(app=Celery("another", set_as_current=False), pool_cls="gevent"))
    assert not [hook for signal, hook in worker.HOOKS if signal.disconnect(hook)]


def test_a_parent_that_ran_no_keeper_stops_none(runtime: Runtime) -> None:
    worker.stop_keeper()
    assert "keeper" not in vars(runtime)
