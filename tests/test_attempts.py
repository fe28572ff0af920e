"""What a job's document says about its attempts and to the person: written by the writes that are made anyway."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pymongo
import pymongo.monitoring
import pytest
from bson import DatetimeMS, ObjectId
from celery.exceptions import Reject, Retry

from testbed.provider import Provider
from tests.lab import (
    IMAGE,
    SECRET,
    Notices,
    SetHandler,
    adopt,
    ago,
    change,
    claim,
    deliver,
    deliver_in_thread,
    insert,
    insert_text,
    new_sweeper,
    raising,
    read,
    table,
)
from worker import NODE, Call, Result, Runtime
from workerkit import sentences
from workerkit.attempts import LOST, MAX_KEPT, AttemptRecord, read_record, read_records, usage_of
from workerkit.errors import FailJob, JobFailed, OperatorFault, ProviderAway
from workerkit.mongodb import CLIENT_OPTIONS
from workerkit.refusals import Unexplained
from workerkit.settings import Settings

NOW = datetime(2030, 1, 1, tzinfo=UTC)
WHOLE = AttemptRecord(2, "failed", "node", NOW, 0.5, 7.25, "OperatorFault", True, "HTTP 401", "http://host/v1", "m")


def attempts_of(runtime: Runtime, job_id: ObjectId) -> list[dict[str, Any]]:
    return list(read(runtime, job_id)["worker"].get("attempts", []))


def deliver_until_it_ends(runtime: Runtime, job_id: ObjectId) -> None:
    """Delivers the job's message again as soon as it may be claimed."""
    for _ in range(runtime.settings.max_attempts):
        try:
            deliver(runtime, job_id)
            return
        except Retry:
            change(runtime, job_id, worker__available_at=ago(1))
        except JobFailed:
            return


# ── records in documents ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_record_is_read_as_it_was_written() -> None:
    assert read_record(WHOLE.document()) == WHOLE
    assert read_record({"attempt": 1, "end": "lost"}) == AttemptRecord(1, "lost")


@table(
    "odd",
    ("no mapping", ["attempt"]),
    ("without a number", {"end": "failed"}),
    ("with an end that isn't known", {"attempt": 1, "end": "exploded"}),
    ("with an end that can't be one", {"attempt": 1, "end": ["failed"]}),
)
def test_what_is_no_record_is_left_out(odd: Any) -> None:
    assert read_record(odd) is None
    assert read_records([odd, WHOLE.document()]) == (WHOLE,)


@table(
    "value, numbers",
    ("no list", "text", []),
    ("none", None, []),
    ("more than are kept", [AttemptRecord(n, LOST).document() for n in range(MAX_KEPT + 2)], [*range(2, MAX_KEPT + 2)]),
)
def test_the_last_records_of_a_list_are_read(value: Any, numbers: list[int]) -> None:
    assert [record.attempt for record in read_records(value)] == numbers


@pytest.mark.parametrize("name", sorted(set(WHOLE.document()) - {"attempt", "end"}))
@pytest.mark.parametrize("odd", [None, [], {}, -1, 2**40, float("nan"), "x" * 3000, DatetimeMS(10**15)], ids=repr)
def test_a_field_of_a_wrong_type_is_left_out(name: str, odd: object) -> None:
    record = read_record({**WHOLE.document(), name: odd})
    assert record
    rest = {other: value for other, value in record.document().items() if other != name}
    assert rest == {other: value for other, value in WHOLE.document().items() if other != name}


@table(
    "output, used",
    ("a text", {"tokens_used": 9, "prompt_tokens": 4, "completion_tokens": 5}, {"tokens": 9}),
    ("a picture", {"resolution": "8x8", "image_url": "/x.png"}, {"pictures": 1}),
    ("a sound", {"duration_seconds": 1.5, "format": "wav"}, {"seconds": 1.5}),
    ("another job type's", {"score": 1}, {}),
    ("of other kinds", {"tokens_used": "9", "duration_seconds": float("inf"), "resolution": []}, {}),
)
def test_usage_is_what_the_output_says(output: dict[str, Any], used: dict[str, Any]) -> None:
    parts = {name: output[name] for name in ("prompt_tokens", "completion_tokens") if name in output}
    assert usage_of(output) == used | parts


# ── how attempts end ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_completed_attempt_is_on_record_with_its_times_and_its_server(runtime: Runtime, provider: Provider) -> None:
    job_id = insert_text(runtime, "[say hello]")
    deliver(runtime, job_id)
    [record] = attempts_of(runtime, job_id)
    waited_s, ran_s, ended_at = (record.pop(name) for name in ("waited_s", "ran_s", "ended_at"))
    made_by: dict[str, object] = {"provider": provider.url, "model": "testbed-model"}
    assert record == {"attempt": 1, "end": "completed", "node": NODE, **made_by}
    assert waited_s >= 0 <= ran_s < 60
    assert abs(ended_at - read(runtime, job_id)["completed_at"]) < timedelta(seconds=10)


class Commands(pymongo.monitoring.CommandListener):
    """The names of the commands about jobs that a client sends."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def started(self, event: pymongo.monitoring.CommandStartedEvent) -> None:
        if event.command.get(event.command_name) == "jobs":
            self.names.append(event.command_name)

    def succeeded(self, event: pymongo.monitoring.CommandSucceededEvent) -> None: ...

    def failed(self, event: pymongo.monitoring.CommandFailedEvent) -> None: ...


@pytest.mark.usefixtures("runtime")  # which empties the database at the end
def test_all_of_it_is_written_by_the_claim_and_by_the_end(settings: Settings, tmp_path: Path) -> None:
    url, commands = settings.mongodb_url.get_secret_value(), Commands()
    mongo = pymongo.MongoClient[dict[str, Any]](url, event_listeners=[commands], **CLIENT_OPTIONS)
    with contextlib.closing(adopt(Runtime(settings, mongo), tmp_path)) as runtime:
        job_id = insert_text(runtime, "[say hello]")
        commands.names.clear()
        deliver(runtime, job_id)
        assert commands.names == ["findAndModify", "update"]
        assert attempts_of(runtime, job_id)


def test_every_attempt_of_a_life_is_on_record(runtime: Runtime) -> None:
    job_id = insert_text(runtime, "[status 503 times=2] [say hello]")
    deliver_until_it_ends(runtime, job_id)
    records = attempts_of(runtime, job_id)
    assert [(one["attempt"], one["end"]) for one in records] == [(1, "retried"), (2, "retried"), (3, "completed")]
    assert [one.get("error") for one in records] == ["RetryJob", "RetryJob", None]
    assert [one.get("reason") for one in records] == ["HTTP 503 server_error", "HTTP 503 server_error", None]


@table(
    "error, wanted",
    ("the operator's", OperatorFault("HTTP 401"), ("OperatorFault", "HTTP 401", True)),
    ("the job's", FailJob("input: size", "No."), ("FailJob", "input: size", None)),
    ("nobody's", Unexplained("HTTP 418"), ("Unexplained", "HTTP 418", None)),
    ("a long one", FailJob("x" * 300, "No."), ("FailJob", "x" * 200, None)),
    ("an exception in place of a text", FailJob(KeyError(SECRET), "No."), ("FailJob", "KeyError", None)),  # type: ignore[arg-type]
    ("half a character", FailJob("\ud800", "No."), ("FailJob", "?", None)),
)
def test_a_failed_attempt_says_why(
    runtime: Runtime, handler: SetHandler, error: FailJob, wanted: tuple[object, ...]
) -> None:
    handler(raising(error))
    job_id = insert_text(runtime, "Hello")
    with pytest.raises(JobFailed):
        deliver(runtime, job_id)
    [record] = attempts_of(runtime, job_id)
    assert record["end"] == "failed"
    assert (record["error"], record["reason"], record.get("is_operators")) == wanted
    assert read(runtime, job_id)["error_message"] == error.sentence


def test_a_handler_that_returns_no_result_fails_the_job_at_once(runtime: Runtime, handler: SetHandler) -> None:
    async def forget(call: Call) -> Result:
        return {"generated_text": "hello"}  # type: ignore[return-value]

    handler(forget)
    job_id = insert_text(runtime, "Hello")
    with pytest.raises(JobFailed):
        deliver(runtime, job_id)
    [record] = attempts_of(runtime, job_id)
    assert (record["error"], record["reason"]) == ("OperatorFault", "its handler returned no Result")


def test_an_attempt_that_a_shutdown_hands_back_is_on_record(runtime: Runtime, provider: Provider) -> None:
    job_id = insert_text(runtime, "[hang]")
    delivered = deliver_in_thread(runtime, job_id, provider)
    runtime.shutdown.announce(0.0)
    runtime.keeper.tick()
    with pytest.raises(Reject):
        delivered.result(30)
    [record] = attempts_of(runtime, job_id)
    assert (record["attempt"], record["end"], record["error"]) == (1, "handed_back", "HandBack")


def test_an_attempt_that_was_lost_is_on_record(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(1))
    new_sweeper(runtime).sweep()
    [record] = attempts_of(runtime, job.id)
    assert (record["attempt"], record["end"], record["node"]) == (1, "lost", NODE)


def test_a_job_that_was_lost_too_often_keeps_its_attempts(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(1), worker__attempt=4)
    new_sweeper(runtime).sweep()
    [record] = attempts_of(runtime, job.id)
    assert (record["attempt"], record["end"]) == (4, "lost")
    assert read(runtime, job.id)["status"] == "failed"


def test_a_rescue_of_a_job_that_waited_adds_no_attempt(runtime: Runtime) -> None:
    job = claim(runtime)
    runtime.store.release(job, ago(60), counted=True)
    change(runtime, job.id, worker__rescue_at=ago(1))
    new_sweeper(runtime).sweep()
    assert attempts_of(runtime, job.id) == []


def test_a_life_that_ends_untried_has_no_attempts_and_the_one_before_keeps_its_figures(runtime: Runtime) -> None:
    job_id = insert_text(runtime, "[say one two three]")
    deliver(runtime, job_id)
    change(runtime, job_id, status="pending")
    assert runtime.store.fail_unowned(job_id, "No.")
    own = read(runtime, job_id)["worker"]
    assert (own["attempt"], "attempts" in own) == (0, False)
    assert [(life["tokens"], life["attempts"]) for life in own["past"]] == [(7, 1)]


def test_a_life_that_an_older_worker_began_has_no_attempts_of_the_one_before(runtime: Runtime) -> None:
    job_id = insert_text(runtime, "Hello")
    deliver(runtime, job_id)
    change(runtime, job_id, status="processing", started_at=ago(3600))
    new_sweeper(runtime).sweep()
    assert attempts_of(runtime, job_id) == []


def test_only_the_last_attempts_are_kept(runtime: Runtime) -> None:
    job_id, records = insert(runtime), [AttemptRecord(number, "retried").document() for number in range(MAX_KEPT)]
    runtime.store.release(claim(runtime, job_id), ago(1), counted=True)
    change(runtime, job_id, worker__attempts=records)
    deliver(runtime, job_id)
    assert [one["attempt"] for one in attempts_of(runtime, job_id)] == [*range(1, MAX_KEPT), 2]


def test_odd_attempts_cost_no_job_its_result(runtime: Runtime, handler: SetHandler) -> None:
    async def damage(call: Call) -> Result:
        change(runtime, call.job.id, worker__attempts="odd", worker__message=7)
        return Result({"generated_text": "hello"})

    handler(damage)
    deliver(runtime, job_id := insert_text(runtime, "Hello"))
    assert read(runtime, job_id)["output_data"] == {"generated_text": "hello"}
    assert [one["end"] for one in attempts_of(runtime, job_id)] == ["completed"]


# ── the person's last sentence ───────────────────────────────────────────────────────────────────────────────────


@table(
    "prompt",
    ("of a job that completes", "[say hello]"),
    ("of a job that is refused", "[status 400]"),
    ("of a job that is tried again", "[status 503 times=1]"),
    ("of a job that is given up", "[status 503]"),
)
def test_the_document_has_the_last_sentence_that_was_published(runtime: Runtime, notices: Notices, prompt: str) -> None:
    job_id = insert_text(runtime, prompt)
    deliver_until_it_ends(runtime, job_id)
    count = 2 * max(1, len(attempts_of(runtime, job_id)))
    assert read(runtime, job_id)["worker"]["message"] == notices.statuses(count)[-1]["message"]


def test_a_running_job_says_that_it_has_started(runtime: Runtime) -> None:
    job = claim(runtime)
    assert read(runtime, job.id)["worker"]["message"] == "Your job has started."
    runtime.store.release(job, ago(1), counted=True)
    claim(runtime, job.id, owner="owner-2")
    assert read(runtime, job.id)["worker"]["message"] == "Your job has started (try 2 of 4)."


def test_a_job_that_waits_says_for_what(runtime: Runtime, handler: SetHandler) -> None:
    handler(raising(ProviderAway("refused", after_s=7.0, is_counted=False)))
    with pytest.raises(Retry):
        deliver(runtime, job_id := insert_text(runtime, "Hello"))
    wanted = "The AI service can't be reached; trying again in 7 s (1 of 4)."
    assert read(runtime, job_id)["worker"]["message"] == wanted


def test_a_rescued_job_says_that_it_goes_on(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(1))
    new_sweeper(runtime).sweep()
    assert read(runtime, job.id)["worker"]["message"] == sentences.GOES_ON


def test_a_job_says_why_it_has_failed_though_mongodb_takes_no_record_of_its_attempt(runtime: Runtime) -> None:
    job = claim(runtime)
    runtime.database.command("collMod", "jobs", validator={"worker.attempts": None})
    try:
        ended = replace(job, attempts=(AttemptRecord(1, "failed"),))
        assert runtime.store.fail(ended, "No.")
    finally:
        runtime.database.command("collMod", "jobs", validator={})
    assert read(runtime, job.id)["worker"]["message"] == "No."


def test_a_job_that_is_failed_without_an_attempt_says_why(runtime: Runtime) -> None:
    job_id = insert(runtime)
    assert runtime.store.fail_unowned(job_id, "No.")
    assert read(runtime, job_id)["worker"]["message"] == "No."


# ── former lives ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_former_life_says_what_it_used(runtime: Runtime) -> None:
    job_id = insert_text(runtime, "[say one two three]")
    deliver(runtime, job_id)
    change(runtime, job_id, status="pending")
    deliver(runtime, job_id)
    [life] = read(runtime, job_id)["worker"]["past"]
    assert (life["tokens"], life["prompt_tokens"], life["completion_tokens"]) == (7, 4, 3)


def test_a_picture_of_a_former_life_is_counted(runtime: Runtime) -> None:
    job_id = insert(runtime, job_type=IMAGE, input_data={"prompt": "A city"})
    deliver(runtime, job_id)
    change(runtime, job_id, status="pending")
    claim(runtime, job_id)
    assert read(runtime, job_id)["worker"]["past"][0]["pictures"] == 1


def test_a_job_that_is_tried_again_waits_from_then_on(runtime: Runtime) -> None:
    job_id = insert_text(runtime, "[say hello]", created_at=ago(3600))
    deliver(runtime, job_id)
    change(runtime, job_id, status="pending", updated_at=ago(5))
    deliver(runtime, job_id)
    [record] = attempts_of(runtime, job_id)
    assert 5 <= record["waited_s"] < 60


def test_a_life_that_failed_keeps_its_sentence_though_the_api_takes_it_away(
    runtime: Runtime, handler: SetHandler
) -> None:
    handler(raising(FailJob("", "No.")))
    job_id = insert_text(runtime, "Hello")
    with pytest.raises(JobFailed):
        deliver(runtime, job_id)
    change(runtime, job_id, status="pending", error_message=None)
    claim(runtime, job_id)
    assert read(runtime, job_id)["worker"]["past"][0]["reason"] == "No."


def test_a_life_that_failed_doesnt_count_what_the_one_before_made(runtime: Runtime, handler: SetHandler) -> None:
    job_id = insert_text(runtime, "[say one two three]")
    deliver(runtime, job_id)
    change(runtime, job_id, status="pending")
    handler(raising(FailJob("", "No.")))
    with pytest.raises(JobFailed):
        deliver(runtime, job_id)
    change(runtime, job_id, status="pending")
    claim(runtime, job_id)
    first, second = read(runtime, job_id)["worker"]["past"]
    assert (first["tokens"], second["tokens"]) == (7, None)
