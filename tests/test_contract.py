"""docs/contract.md: what it shows works, and what a real worker writes and publishes is as the schemas say."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cache, partial
from typing import Any

import pytest
from bson import ObjectId, json_util
from pymongo.errors import DuplicateKeyError

from testbed.api import Api
from testbed.processes import poll
from tests.contract_lab import PAGE, example, faults, rows, section, validator_of
from tests.lab import AUDIO, IMAGE, TEXT, table
from tests.place import PATIENCE_S, OpenPlace, Step
from tests.site import JOBS, Site, StartWorker, of_each_type
from worker import HANDLERS, PROGRESS_CHANNEL, STATUS_CHANNEL, TASK_NAME
from workerkit.schemas import OUTPUTS, Bookkeeping, JobDocument
from workerkit.sentences import STOPPED

Document = dict[str, Any]
SCHEMAS = {"job_status_update": "JobStatusUpdate", "job_progress": "JobProgress"}


@cache
def closed(name: str) -> Any:
    return validator_of(name, is_closed=True)


# ── the page says what the schemas say ───────────────────────────────────────────────────────────────────────────


def test_the_page_has_every_field_of_a_document() -> None:
    assert set(rows("2. The document")) == set(JobDocument.__annotations__)


def test_the_page_has_every_field_of_the_workers_notes_that_an_api_may_read() -> None:
    fields = validator_of("JobDocument").schema["$defs"]["Bookkeeping"]["properties"]
    described = {name for name, field in fields.items() if "description" in field}
    assert set(rows("The worker's notes")) == described < set(Bookkeeping.__annotations__)


@of_each_type
def test_the_page_has_every_field_of_an_input(job_type: str) -> None:
    named = set(re.findall(r"`(\w+)`", rows("Inputs")[job_type][0]))
    assert set(HANDLERS[job_type].input_model.model_fields) - named == set()


@of_each_type
def test_the_page_has_every_field_of_an_output(job_type: str) -> None:
    named = set(re.findall(r"`(\w+)`", rows("Outputs")[job_type][0]))
    assert set(OUTPUTS[job_type].__annotations__) - named == set()


def test_the_pages_document_and_message_are_as_the_schemas_say() -> None:
    document, message = json_util.loads(example("2. The document")), json.loads(example("Without Celery, on Redis"))
    assert faults(closed("JobDocument"), document) == []
    assert faults(validator_of("RedisMessage"), message) == []
    body = base64.b64decode(message["body"]).decode()
    assert body in section("Without Celery, on Redis")
    assert json.loads(body)[0] == [str(document["_id"]), {}]


@table("heading", ("a status", "Statuses"), ("a piece of text", "A text as it grows"))
def test_the_pages_notices_are_as_the_schemas_say(heading: str) -> None:
    notice = {**json.loads(example(heading)), "job_id": "66a1f0c2e4b0a1b2c3d4e5f6"}
    assert faults(validator_of(SCHEMAS[notice["type"]]), notice) == []


def test_the_page_names_task_and_channels() -> None:
    assert all(name in PAGE for name in (TASK_NAME, STATUS_CHANNEL, PROGRESS_CHANNEL))


# ── what the page shows ──────────────────────────────────────────────────────────────────────────────────────────


def submit_text(site: Site, directives: str) -> tuple[ObjectId, str]:
    """Submits a text job with a prompt of its own. Returns both."""
    prompt = f"{ObjectId()} {directives}"
    return site.api.text(prompt), prompt


@pytest.fixture
def indexed(site: Site) -> Site:
    """The running worker, on a collection with the indexes of the page."""
    site.api.database.command(json.loads(example("Indexes")))
    return site


def send_the_pages_message(site: Site) -> ObjectId:
    """Inserts the page's document, and puts the page's message into the queue by Redis' own command."""
    document, message = json_util.loads(example("2. The document")), json.loads(example("Without Celery, on Redis"))
    message["properties"]["delivery_info"]["routing_key"] = site.api.queue
    site.api.jobs.replace_one({"_id": document["_id"]}, document, upsert=True)
    site.api.redis.lpush(site.api.queue, json.dumps(message))
    return ObjectId(document["_id"])


def test_the_pages_message_on_redis_gets_the_pages_job_done(site: Site) -> None:
    job = send_the_pages_message(site)
    done = site.api.wait(job)
    assert (done["status"], done["worker"]["limits"]) == ("completed", [120, 90])
    assert done["worker"]["task_id"] == json.loads(example("Without Celery, on Redis"))["headers"]["id"]


def test_a_message_on_redis_needs_no_base64_and_no_limits(site: Site) -> None:
    job = site.api.insert(TEXT, {"prompt": "plain"})
    message = json.loads(example("Without Celery, on Redis"))
    message["body"] = json.dumps([[str(job), {}], {}, {}])
    message["properties"]["delivery_info"]["routing_key"] = site.api.queue
    del message["properties"]["body_encoding"], message["headers"]["timelimit"]
    site.api.redis.lpush(site.api.queue, json.dumps(message))
    assert site.api.wait(job)["status"] == "completed"


def test_a_job_that_was_sent_without_celery_is_tried_again(site: Site) -> None:
    job = site.api.insert(TEXT, {"prompt": "raw, and again [status 500 times=1]"})
    message = json.loads(example("Without Celery, on Redis"))
    message["body"] = json.dumps([[str(job), {}], {}, {}])
    message["properties"] |= {"delivery_info": {"exchange": "", "routing_key": site.api.queue}}
    del message["properties"]["body_encoding"]
    site.api.redis.lpush(site.api.queue, json.dumps(message))
    assert site.api.wait(job)["worker"]["attempt"] == 2


def test_the_pages_function_for_celery_gets_a_job_done(site: Site) -> None:
    source = example("With Celery", "python").replace('"ai_backend"', repr(site.api.database.name))
    names: Document = {"MONGODB_URL": site.environment["MONGODB_URL"], "REDIS_URL": site.environment["REDIS_URL"]}
    exec(source.replace('"ai_jobs"', repr(site.api.queue)), names)
    try:
        job = ObjectId(names["submit"]("user-1", None, TEXT, JOBS[TEXT]))
        assert faults(closed("JobDocument"), site.api.document(job)) == []
        assert site.api.wait(job)["status"] == "completed"
    finally:
        names["celery"].close()
        names["jobs"].database.client.close()


def test_a_session_cant_have_two_active_jobs_with_the_pages_index(indexed: Site) -> None:
    first = indexed.api.text("the first [hang]")
    with pytest.raises(DuplicateKeyError):
        indexed.api.text("the second")
    indexed.api.cancel(first)
    assert indexed.api.wait(indexed.api.text("the third"))["status"] == "completed"


def grown_texts() -> tuple[Callable[[Document], object], Callable[[], str]]:
    """The page's way to collect a text: what takes each notice about its job, and what has grown so far."""
    names: Document = {}
    exec(example("A text as it grows", "python"), names)
    text = [names["GrowingText"]()]

    def receive(notice: Document) -> object:
        if notice["type"] == "job_progress":
            return text[0].add(notice)
        text[0] = names["GrowingText"]()
        return None

    return receive, lambda: "".join(text[0].pieces)


def notices_of(api: Api, job: ObjectId) -> list[Document]:
    """All that was published about a job, in its order."""
    own = [one for one in list(api.received) if one["job_id"] == str(job)]
    return [{name: value for name, value in one.items() if name != "received_at"} for one in own]


def text_grown_by(notices: list[Document]) -> str:
    """The text that the page's way has collected, right before the job ended."""
    receive, text = grown_texts()
    grown = ""
    for notice in notices:
        receive(notice)
        grown = text() or grown
    return grown


SLOW = "[tokens 60] [pace 0.03]"


def test_a_text_grows_piece_by_piece_to_what_the_document_has(site: Site) -> None:
    job, _ = submit_text(site, SLOW)
    site.api.wait_notice(job, "completed")
    assert len(site.api.progress(job)) > 3
    assert text_grown_by(notices_of(site.api, job)) == site.api.document(job)["output_data"]["generated_text"]


def test_a_text_that_breaks_off_grows_anew_by_the_next_try(site: Site) -> None:
    job, _ = submit_text(site, f"{SLOW} [cut times=1]")
    site.api.wait_notice(job, "completed")
    assert {one["attempt"] for one in site.api.progress(job)} == {1, 2}
    assert text_grown_by(notices_of(site.api, job)) == site.api.document(job)["output_data"]["generated_text"]


def test_a_text_that_a_shutdown_interrupts_grows_anew_although_its_attempt_has_the_same_number(
    api: Api, start_worker: StartWorker
) -> None:
    first = start_worker(SHUTDOWN_GRACE="0")
    job = api.text("interrupted [tokens 120] [pace 0.03]")
    poll(lambda: len(api.progress(job)) > 3, PATIENCE_S, description="some pieces")
    assert first.stop(PATIENCE_S) == 0
    start_worker()
    api.wait_notice(job, "completed", timeout_s=PATIENCE_S)
    assert [one["attempt"] for one in api.progress(job) if one["sequence"] == 0] == [1, 1]
    document = api.document(job)
    assert text_grown_by(notices_of(api, job)) == document["output_data"]["generated_text"]
    assert faults(closed("JobDocument"), document) == []
    assert [one["end"] for one in document["worker"]["attempts"]] == ["handed_back", "completed"]


def test_a_page_that_is_loaded_again_finds_the_last_sentence_and_the_text_so_far(site: Site) -> None:
    job, _ = submit_text(site, "[tokens 300] [pace 0.03]")
    poll(lambda: len(site.api.progress(job)) > 3, PATIENCE_S, description="some pieces")
    document, notices = site.api.document(job), notices_of(site.api, job)
    assert document["worker"]["message"] == next(one["message"] for one in notices if "message" in one)
    assert text_grown_by(notices)
    site.api.cancel(job)


def test_a_countdown_isnt_kept_and_its_message_does_no_harm_when_it_comes(open_place: OpenPlace) -> None:
    place = open_place("countdown")
    place.add_module("import worker\nworker.LostMessages.overdue_s = 1.0\n")  # instead of a minute
    started = place.start_worker().wait_ready(PATIENCE_S)
    job = place.insert("later", Step(""))
    place.send(job, countdown=15)
    early = place.api.wait(job, timeout_s=PATIENCE_S)
    assert (early["completed_at"] - early["created_at"]).total_seconds() < 15
    late = f"job={job} not claimed: it has ended already"
    poll(lambda: late in started.text(), PATIENCE_S, description="the message that was delayed")
    assert place.api.notices(job) == ["processing", "completed"]
    assert len(place.calls("later")) == 1


# ── documents and notices of a real run ──────────────────────────────────────────────────────────────────────────


def complete(job_type: str, site: Site) -> ObjectId:
    job = site.api.submit(job_type, JOBS[job_type])
    site.api.wait(job)
    return job


def end(directives: str, site: Site) -> ObjectId:
    job, _ = submit_text(site, directives)
    site.api.wait(job)
    return job


def end_at_the_cap(site: Site) -> ObjectId:
    job = site.api.submit(TEXT, {"prompt": "cut [tokens 9]", "max_tokens": 3})
    assert site.api.wait(job)["output_data"]["is_cut"] is True
    return job


def be_unusable(site: Site) -> ObjectId:
    job = site.api.submit(IMAGE, {"prompt": "x", "size": "huge"})
    assert site.api.wait(job)["worker"]["attempts"][-1]["error"] == "InvalidInput"
    return job


def be_cancelled(site: Site) -> ObjectId:
    job, prompt = submit_text(site, "[hang]")
    site.wait_call(prompt)
    site.api.cancel(job)
    site.wait_log(f"job={job} attempt=1 type='{TEXT}' abandoned", PATIENCE_S)
    return job


def be_cancelled_before_the_start(site: Site) -> ObjectId:
    job = site.api.insert(AUDIO, JOBS[AUDIO])
    site.api.cancel(job)
    site.api.enqueue(job)
    site.api.wait_notice(job, "failed")
    return job


def be_set_back(directives: str, next_input: Document, site: Site) -> ObjectId:
    job, _ = submit_text(site, directives)
    site.api.wait(job)
    ended = {"_id": job, "status": {"$in": ["failed", "completed"]}}
    again = {"status": "pending", "updated_at": datetime.now(UTC), **next_input}
    assert site.api.jobs.update_one(ended, {"$set": again}).modified_count == 1
    site.api.enqueue(job)
    poll(lambda: len([status for status in site.api.notices(job) if status != "processing"]) == 2, PATIENCE_S)
    assert len(site.api.document(job)["worker"]["past"]) == 1
    return job


def be_killed(site: Site) -> ObjectId:
    job, prompt = submit_text(site, "[hang times=1]")
    site.wait_call(prompt)
    os.kill(site.api.document(job)["worker"]["pid"], signal.SIGKILL)
    assert [one["end"] for one in site.api.wait(job)["worker"]["attempts"]] == ["lost", "completed"]
    return job


def be_revoked(site: Site) -> ObjectId:
    job = site.api.insert(TEXT, {"prompt": (prompt := f"{ObjectId()} [hang]")})
    task = site.api.enqueue(job)
    site.wait_call(prompt)
    site.api.celery.control.revoke(task.id, terminate=True)
    assert site.api.wait(job)["error_message"] == STOPPED
    return job


COMPLETED, FAILED = ["pending", "processing", "completed"], ["pending", "processing", "failed"]
LIVES: dict[str, tuple[Callable[[Site], ObjectId], list[str]]] = {
    "a text": (partial(complete, TEXT), COMPLETED),
    "a picture": (partial(complete, IMAGE), COMPLETED),
    "a sound": (partial(complete, AUDIO), COMPLETED),
    "a text that is streamed": (partial(end, SLOW), COMPLETED),
    "a text that ends at its cap": (end_at_the_cap, COMPLETED),
    "a text that breaks off": (partial(end, f"{SLOW} [cut times=1]"), COMPLETED),
    "a provider that is busy": (partial(end, "[status 429 times=1 retry-after=1]"), COMPLETED),
    "a provider that is busy again and again": (partial(end, "[status 503]"), FAILED),
    "a wrong key": (partial(end, "[status 401]"), FAILED),
    "a refusal": (partial(end, "[status 400]"), FAILED),
    "a bad input": (be_unusable, FAILED),
    "a cancel": (be_cancelled, FAILED),
    "a cancel before the start": (be_cancelled_before_the_start, ["pending", "failed"]),
    "a revoked task": (be_revoked, FAILED),
    "a killed process": (be_killed, COMPLETED),
    "a failure that is tried again": (partial(be_set_back, "[status 400 times=1]", {}), [*FAILED, *COMPLETED]),
    "a result that is tried again": (partial(be_set_back, "", {}), [*COMPLETED, *COMPLETED]),
    "a result whose next life fails": (partial(be_set_back, "", {"input_data": {}}), [*COMPLETED, *FAILED]),
}
SOME_LIVES = (
    "a text",
    "a bad input",
    "a provider that is busy",
    "a provider that is busy again and again",
    "a killed process",
    "a failure that is tried again",
)


@pytest.fixture
def watched(indexed: Site) -> Iterator[Callable[[ObjectId], list[Document]]]:
    """Returns each version of a job's document that MongoDB has had since the test began."""
    images = {"collMod": "jobs", "changeStreamPreAndPostImages": {"enabled": True}}
    indexed.api.database.command(images)
    changes: list[Document] = []
    with indexed.api.jobs.watch(full_document="required", max_await_time_ms=100) as stream:

        def versions(job: ObjectId) -> list[Document]:
            while change := stream.try_next():
                changes.append(change)
            return [change["fullDocument"] for change in changes if change["documentKey"]["_id"] == job]

        yield versions


def without_repetition(values: list[str]) -> list[str]:
    return [value for number, value in enumerate(values) if number == 0 or value != values[number - 1]]


@pytest.mark.parametrize("life", LIVES)
def test_every_version_of_a_document_and_every_notice_is_as_the_schemas_say(
    indexed: Site, watched: Callable[[ObjectId], list[Document]], life: str
) -> None:
    live, statuses = LIVES[life]
    job = live(indexed)
    assert indexed.goes_on()  # so that all is published
    poll(lambda: watched(job) and watched(job)[-1] == indexed.api.document(job), PATIENCE_S)
    versions, notices = watched(job), notices_of(indexed.api, job)
    assert [faults(closed("JobDocument"), version) for version in versions] == [[]] * len(versions)
    assert [faults(validator_of(SCHEMAS[one["type"]]), one) for one in notices] == [[]] * len(notices)
    assert without_repetition([version["status"] for version in versions]) == statuses


@pytest.mark.parametrize("life", SOME_LIVES)
def test_the_document_has_the_sentence_that_was_published_last(indexed: Site, life: str) -> None:
    job = LIVES[life][0](indexed)
    assert indexed.goes_on()
    assert indexed.api.document(job)["worker"]["message"] == indexed.api.updates(job)[-1]["message"]


def test_the_worker_leaves_fields_of_the_apis_own_alone(site: Site) -> None:
    own = {"price": 5, "nested": {"worker": [1]}}
    job = site.api.insert(TEXT, {"prompt": "own fields [status 500 times=1]"}, **own)
    site.api.enqueue(job)
    done = site.api.wait(job)
    assert {name: done[name] for name in own} == own


# ── messages and results of a real client ────────────────────────────────────────────────────────────────────────


def test_what_celery_puts_into_the_queue_is_as_the_schema_says(api: Api) -> None:
    job = api.insert(TEXT, JOBS[TEXT])
    api.enqueue(job, soft_time_limit=90, time_limit=120, priority=0)
    raw: Any = api.redis.lindex(api.queue, 0)
    message = json.loads(raw)
    assert faults(validator_of("RedisMessage"), message) == []
    arguments, named, _ = json.loads(base64.b64decode(message["body"]))
    assert (faults(validator_of("JobArguments"), arguments), named) == ([], {})
    assert message["headers"]["timelimit"] == [120, 90]


@pytest.mark.parametrize("priority", [0, 2, 3, 5, 6, 8, 9, 255])
def test_a_message_goes_into_the_list_of_its_priority(api: Api, priority: int) -> None:
    steps = re.findall(r'`"(?:ai_jobs\\u0006\\u0016|…)(\d)"`', section("Without Celery, on Redis"))
    assert steps == ["3", "6", "9"]
    api.send(str(ObjectId()), {}, priority=priority)
    step = max(step for step in (0, *map(int, steps)) if step <= priority)
    assert api.redis.llen(api.queue + (f"\x06\x16{step}" if step else "")) == 1


def test_the_tasks_result_is_as_the_schema_says(site: Site) -> None:
    job = site.api.insert(TEXT, JOBS[TEXT])
    task = site.api.enqueue(job)
    task.get(timeout=PATIENCE_S)
    stored: Any = site.api.redis.get(f"celery-task-meta-{task.id}")
    assert faults(validator_of("TaskResult"), json.loads(stored)["result"]) == []
