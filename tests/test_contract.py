"""docs/contract.md: what it shows works, and what a real worker writes and publishes is as the schemas say."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import re
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from typing import Any
from uuid import uuid4

import pytest
from bson import ObjectId, json_util
from gridfs import GridFSBucket
from pymongo.errors import DuplicateKeyError

from examples.api import live
from testbed.api import Api
from testbed.processes import SOURCE, poll
from tests.contract_lab import PAGE, as_json, example, faults, plain_validator_of, rows, section, validator_of
from tests.lab import AUDIO, IMAGE, TEXT, table
from tests.place import PATIENCE_S, OpenPlace, Step
from tests.site import JOBS, Site, StartWorker, of_each_type
from worker import HANDLERS, PROGRESS_CHANNEL, STATUS_CHANNEL, TASK_NAME
from workerkit.schemas import OUTPUTS, AttemptRecord, Bookkeeping, FormerLife, JobDocument
from workerkit.sentences import EXPIRED_UNTRIED, STOPPED

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


@table(
    "field, record",
    ("what is kept of an attempt, but for its node", "attempts", set(AttemptRecord.__annotations__) - {"node"}),
    ("what is kept of a former life", "past", set(FormerLife.__annotations__)),
)
def test_the_page_has_every_field_of_what_the_notes_list(field: str, record: set[str]) -> None:
    assert record - set(re.findall(r"`(\w+)`", rows("The worker's notes")[field][0])) == set()


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


@pytest.mark.parametrize("document", ["contract.md", "providers.md"])
def test_every_link_to_a_section_of_the_page_leads_to_one(document: str) -> None:
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^ *```.*?^ *```$", "", PAGE, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    page = "" if document == "contract.md" else r"contract\.md"
    linked = set(re.findall(rf"\]\({page}#([^)]+)\)", (SOURCE / "docs" / document).read_text()))
    assert linked
    assert linked - anchors == set()


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


def send_plain(site: Site, job: ObjectId, **headers: str) -> None:
    """Puts a message for a job into the queue by Redis' own command: the page's, without base64 and limits."""
    message = json.loads(example("Without Celery, on Redis"))
    message["body"] = json.dumps([[str(job), {}], {}, {}])
    message["properties"] |= {"delivery_info": {"exchange": "", "routing_key": site.api.queue}}
    del message["properties"]["body_encoding"], message["headers"]["timelimit"]
    message["headers"] |= {"id": str(uuid4()), **headers}
    message["properties"]["delivery_tag"] = str(uuid4())
    site.api.redis.lpush(site.api.queue, json.dumps(message))


def test_a_message_on_redis_needs_no_base64_and_no_limits(site: Site) -> None:
    job = site.api.insert(TEXT, {"prompt": "plain"})
    send_plain(site, job)
    assert site.api.wait(job)["status"] == "completed"


def test_a_job_that_was_sent_without_celery_is_tried_again(site: Site) -> None:
    job = site.api.insert(TEXT, {"prompt": "raw, and again [status 500 times=1]"})
    send_plain(site, job)
    assert site.api.wait(job)["worker"]["attempt"] == 2


@table(
    "expires_in_s, status, sentence",
    ("its time is over", -1, "failed", EXPIRED_UNTRIED),
    ("there is time left", 600, "completed", None),
)
def test_a_message_that_was_sent_without_celery_may_expire(
    site: Site, expires_in_s: int, status: str, sentence: str | None
) -> None:
    job = site.api.insert(TEXT, {"prompt": "expires"})
    send_plain(site, job, expires=f"{datetime.now(UTC) + timedelta(seconds=expires_in_s):%Y-%m-%dT%H:%M:%SZ}")
    ended = site.api.wait(job)
    assert (ended["status"], ended["error_message"]) == (status, sentence)


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


def run_update(site: Site, heading: str, job: ObjectId) -> int:
    """Runs the page's command to cancel a job or to try it again. Returns how many documents it has matched."""
    command = json_util.loads(example(heading))
    [update] = command["updates"]
    update["q"]["_id"], update["u"]["$set"]["updated_at"] = job, datetime.now(UTC)
    return int(site.api.database.command(command)["n"])


CANCEL_SENTENCE = json.loads(example("Cancel"))["updates"][0]["u"]["$set"]["error_message"]


def test_the_pages_cancel_ends_a_job_and_the_pages_try_again_begins_it_anew(site: Site) -> None:
    job, prompt = submit_text(site, "[hang times=1]")
    site.wait_call(prompt)
    assert (run_update(site, "Try again", job), run_update(site, "Cancel", job)) == (0, 1)
    site.wait_log(f"job={job} attempt=1 type='{TEXT}' abandoned", PATIENCE_S)
    cancelled = site.api.document(job)
    assert (cancelled["error_message"], cancelled["completed_at"]) == (CANCEL_SENTENCE, None)
    assert (run_update(site, "Cancel", job), run_update(site, "Try again", job)) == (0, 1)
    send_plain(site, job)
    done = site.api.wait(job)
    assert (done["status"], done["error_message"], done["worker"]["attempt"]) == ("completed", None, 1)
    assert [(life["reason"], life["ended_at"]) for life in done["worker"]["past"]] == [(CANCEL_SENTENCE, None)]
    assert done["worker"]["attempts"][0]["waited_s"] < (done["completed_at"] - done["created_at"]).total_seconds()
    assert done["started_at"] > cancelled["started_at"]


def test_a_file_has_the_pages_name_under_which_it_is_read_and_deleted(site: Site) -> None:
    job = complete(IMAGE, site)
    folder, name = site.api.document(job)["artifact_url"].rsplit("/", 1)
    assert f"(by default `{folder}`)" in section("4. The files")
    [shown] = re.findall(r"`([0-9a-f]{24}-\S+)`", section("4. The files"))
    assert re.sub("[0-9a-f]", "0", name) == re.sub("[0-9a-f]", "0", shown)
    assert name.startswith(str(job))
    bucket = GridFSBucket(site.api.database, "artifacts")
    file = bucket.open_download_stream(name)
    assert (file.filename, (file.metadata or {})["contentType"]) == (name, "image/png")
    assert file.read() == bucket.open_download_stream_by_name(name).read()
    bucket.delete(name)
    assert not site.api.database["artifacts.chunks"].find_one({"files_id": name})


def test_the_url_of_a_file_leads_nowhere_once_the_next_life_has_another(site: Site) -> None:
    job = complete(IMAGE, site)
    former = site.api.document(job)["artifact_url"]
    assert run_update(site, "Try again", job) == 1
    assert site.api.document(job)["artifact_url"] == former
    send_plain(site, job)
    assert site.api.wait(job)["artifact_url"] != former
    files = site.api.database["artifacts.files"]
    poll(lambda: not files.find_one({"_id": former.rsplit("/", 1)[1]}), PATIENCE_S, description="the file's end")


def test_a_session_cant_have_two_active_jobs_with_the_pages_index(indexed: Site) -> None:
    first = indexed.api.text("the first [hang]")
    with pytest.raises(DuplicateKeyError):
        indexed.api.text("the second")
    indexed.api.cancel(first)
    assert indexed.api.wait(indexed.api.text("the third"))["status"] == "completed"


def new_growing_text() -> Any:
    """The page's class."""
    names: Document = {}
    exec(example("A text as it grows", "python"), names)
    return names["GrowingText"]()


def notices_of(api: Api, job: ObjectId) -> list[Document]:
    """All that was published about a job, in its order."""
    own = [one for one in list(api.received) if one["job_id"] == str(job)]
    return [{name: value for name, value in one.items() if name != "received_at"} for one in own]


def text_grown_by(notices: list[Document]) -> str:
    """The text that the page's way has collected, right before the job ended."""
    text, grown = new_growing_text(), ""
    for notice in notices:
        if notice["type"] == "job_progress":
            text.add(notice)
        else:
            text.begin_anew()
        grown = "".join(text.pieces) or grown
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


def test_the_example_collects_a_text_by_the_pages_rules() -> None:
    dice, ours, examples = random.Random(5), new_growing_text(), live.GrowingText()
    changes = [0, 0]
    for number in range(2000):
        attempt, sequence = dice.choice((1, 1, 1, 2, 2, 3)) + number // 500, dice.randrange(6)
        has_changed = ours.add({"attempt": attempt, "sequence": sequence, "delta": f"{number} "})
        assert examples.add(attempt, sequence, f"{number} ") == has_changed
        assert str(examples) == "".join(ours.pieces)
        changes[has_changed] += 1
    assert min(changes) > 100


def test_the_examples_page_keeps_a_text_until_the_document_was_read() -> None:
    """The notice of the end comes while the document is being read, as it was before."""
    owner = {"user_id": "user-1", "session_id": "session-1"}
    jobs, is_slow = {"a": {"id": "a", "status": "processing"}}, threading.Event()
    is_reading, may_return = threading.Event(), threading.Event()

    def newest(_owner: object) -> dict[str, Document]:
        found = dict(jobs)
        if is_slow.is_set():
            is_reading.set()
            may_return.wait(PATIENCE_S)
        return found

    async def scene() -> list[str]:
        api, seen = live.Live("redis://nowhere", newest), list[str]()
        stream = api.stream(owner)

        async def follow(until: str) -> None:
            async with asyncio.timeout(PATIENCE_S):
                while not seen or until not in seen[-1]:
                    seen.append(await anext(stream))

        def publish(notice: Document) -> None:
            api._receive(json.dumps({**owner, "job_id": "a", **notice}).encode())

        await follow('"processing"')
        publish({"type": "job_progress", "attempt": 1, "sequence": 0, "delta": "Once"})
        await follow("Once")
        is_slow.set()
        api.wake(owner)
        last = asyncio.create_task(follow('"completed"'))
        await asyncio.to_thread(is_reading.wait, PATIENCE_S)
        jobs["a"] = {"id": "a", "status": "completed"}
        publish({"type": "job_status_update", "status": "completed"})
        may_return.set()
        await last
        return seen

    texts = [event for event in asyncio.run(scene()) if event.startswith("event: text")]
    assert len(texts) == 1


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


def be_cancelled_while_it_waits(site: Site) -> ObjectId:
    job, _ = submit_text(site, "[status 503 times=1 retry-after=2]")
    waits = {"_id": job, "worker.owner": None, "worker.available_at": {"$ne": None}}
    poll(lambda: site.api.jobs.find_one(waits), PATIENCE_S, description="the wait for a retry")
    assert run_update(site, "Cancel", job) == 1
    assert site.api.wait_notice(job, "failed")["message"] == CANCEL_SENTENCE
    return job


def be_cancelled_before_its_next_life(site: Site) -> ObjectId:
    job = complete(IMAGE, site)
    site.api.wait_notice(job, "completed")
    assert (run_update(site, "Try again", job), run_update(site, "Cancel", job)) == (1, 1)
    assert site.api.document(job)["output_data"]  # of the former life
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
    "a cancel while it waits": (be_cancelled_while_it_waits, FAILED),
    "a cancel before the next life": (be_cancelled_before_its_next_life, [*COMPLETED, "pending", "failed"]),
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
    assert [faults(plain_validator_of("JobDocument"), as_json(each)) for each in versions] == [[]] * len(versions)
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
