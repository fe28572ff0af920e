"""Real worker processes against a real MongoDB, a real Redis and a provider that misbehaves on demand.

Most tests share one running worker per pool (`site`). A test that ends a worker, or needs other settings, starts its
own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import gridfs
import psutil
import pytest
from bson import ObjectId

from conftest import StartWorker, open_api, start, worker_settings
from testbed.api import SOURCE, STATUS_CHANNEL, TASK_NAME, Api, WorkerProcess
from testbed.processes import free_port, poll
from testbed.provider import Provider
from testbed.servers import DATABASE, DATABASE_PASSWORD, MongoServer, RedisServer

POOLS = ("prefork", "threads", "solo")
KEY = "sk-test-planted-key"
JOBS = {
    "text_generation": {"prompt": "Generate a story about AI", "max_tokens": 200},
    "image_generation": {"prompt": "A futuristic city", "size": "512x512"},
    "audio_generation": {"text": "Hello world", "voice": "default"},
}
OWN_HANDLERS = """
import time
from worker import JobInput, Result, handles

class Nap(JobInput):
    seconds: float

@handles("blocking_nap", Nap)
async def blocking_nap(call):
    time.sleep(call.input.seconds)  # what no handler should do: it blocks the event loop
    return Result({"slept": call.input.seconds})
"""


# ── what the tests share ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Site:
    """A running worker, the API in front of it, the provider behind it."""

    api: Api
    worker: WorkerProcess
    provider: Provider
    environment: dict[str, str]
    log_start: int = 0

    def log(self) -> str:
        """The worker's log since the test began."""
        return self.worker.text()[self.log_start :]

    def wait_log(self, text: str, timeout_s: float = 10) -> None:
        poll(lambda: text in self.log(), timeout_s, description=f"{text!r} in the log")

    def wait_call(self, prompt: str, count: int = 1, timeout_s: float = 10) -> None:
        """Waits until the provider has been asked for this so many times."""
        poll(lambda: len(self.provider.calls_for(prompt)) >= count, timeout_s, description=f"{count} calls: {prompt}")

    def goes_on(self) -> bool:
        """Whether the worker completes the next job; with one slot all that it did before is over then."""
        job = self.api.text(f"the next job {ObjectId()}")
        return bool(self.api.wait_notice(job, "completed", timeout_s=20))


@pytest.fixture(scope="module")
def sites(
    mongo_server: MongoServer,
    redis_server: RedisServer,
    running_provider: Provider,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], Site]]:
    """A worker per pool with one slot, started when first asked for, and again where a test has ended it."""
    folder = tmp_path_factory.mktemp("sites")
    (folder / "own_handlers.py").write_text(OWN_HANDLERS)
    own = {"PYTHONPATH": str(folder), "HANDLER_MODULES": "own_handlers"}
    limits = {"CELERY_SOFT_TIME_LIMIT": "20", "CELERY_TIME_LIMIT": "30", "ORPHAN_AFTER": "60"}
    running: dict[str, Site] = {}
    with ExitStack() as stack:

        def site(pool: str) -> Site:
            if pool not in running or running[pool].worker.process.poll() is not None:
                settings = worker_settings(mongo_server, redis_server, running_provider, f"{pool}_{ObjectId()}")
                environment = {**settings, **own, **limits, "WORKER_POOL": pool, "DEBUG": "true"}
                api = stack.enter_context(open_api(environment))
                worker = WorkerProcess(environment, folder / f"{environment['CELERY_QUEUE_NAME']}.log")
                stack.callback(worker.kill)
                running[pool] = Site(api, worker.wait_ready(), running_provider, environment)
            return running[pool]

        yield site


@pytest.fixture
def site(sites: Callable[[str], Site], request: pytest.FixtureRequest) -> Iterator[Site]:
    """The shared worker of a pool (prefork unless parametrized); what a test leaves unfinished is cancelled."""
    shared = sites(getattr(request, "param", "prefork"))
    yield Site(shared.api, shared.worker, shared.provider, shared.environment, len(shared.worker.text()))
    for job in shared.api.jobs.find({"status": {"$in": ["pending", "processing"]}}, {"_id": 1}):
        shared.api.cancel(job["_id"])


in_each_pool = pytest.mark.parametrize("site", POOLS, indirect=True)
of_each_type = pytest.mark.parametrize("job_type", JOBS)
for_each_pool = pytest.mark.parametrize("pool", POOLS)


def artifacts(api: Api) -> gridfs.GridFS:
    return gridfs.GridFS(api.database, collection="artifacts")


def run(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python …` to its end, in a folder without `.env`."""
    command, variables = [sys.executable, *arguments], {**os.environ, "PYTHONPATH": str(SOURCE), **environment}
    return subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, timeout=60)


def run_worker(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python worker.py …` to its end."""
    return run(environment, folder, str(SOURCE / "worker.py"), *arguments)


def long_ago() -> datetime:
    return datetime.now(UTC) - timedelta(hours=1)


# ── jobs ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@in_each_pool
def test_a_text_job_completes_with_the_contracts_fields(site: Site) -> None:
    job = site.api.wait(site.api.submit("text_generation", JOBS["text_generation"]))
    output = job["output_data"]
    assert (job["status"], job["artifact_url"], job["error_message"]) == ("completed", None, None)
    assert output["generated_text"]
    assert output["model_used"] == "gpt-6-luna"
    assert output["tokens_used"] > 0
    assert job["created_at"] <= job["started_at"] <= job["completed_at"] <= job["updated_at"]


def test_an_image_job_completes_with_a_picture_of_its_resolution(site: Site) -> None:
    job = site.api.wait(site.api.submit("image_generation", JOBS["image_generation"]))
    output = job["output_data"]
    assert job["status"] == "completed"
    assert output["image_url"] == job["artifact_url"]
    assert (output["resolution"], output["model_used"]) == ("512x512", "gpt-image-2.6-flare")


def test_an_audio_job_completes_with_a_sound_of_its_duration(site: Site) -> None:
    job = site.api.wait(site.api.submit("audio_generation", JOBS["audio_generation"]))
    output = job["output_data"]
    assert job["status"] == "completed"
    assert output["audio_url"] == job["artifact_url"]
    assert (output["duration_seconds"], output["format"]) == (0.76, "wav")
    assert output["model_used"] == "gpt-4o-mini-tts"


@pytest.mark.parametrize(("job_type", "magic"), [("image_generation", b"\x89PNG"), ("audio_generation", b"RIFF")])
def test_the_artifact_url_names_a_file_that_is_stored(site: Site, job_type: str, magic: bytes) -> None:
    job = site.api.wait(site.api.submit(job_type, JOBS[job_type]))
    base, name = job["artifact_url"].rsplit("/", 1)
    assert base == "/artifacts"
    assert artifacts(site.api).get(name).read().startswith(magic)


@of_each_type
def test_a_job_is_told_as_processing_and_then_as_completed(site: Site, job_type: str) -> None:
    job = site.api.submit(job_type, JOBS[job_type])
    site.api.wait_notice(job, "completed")
    first, last = site.api.updates(job)
    assert (first["status"], last["status"]) == ("processing", "completed")
    assert (last["user_id"], last["session_id"]) == ("user-1", "session-1")
    assert last["message"]


@of_each_type
def test_a_status_is_told_only_after_the_document_says_it(site: Site, job_type: str) -> None:
    words = "Slowly [delay 0.5]"
    with site.api.redis.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]
        pubsub.subscribe(STATUS_CHANNEL)
        job = site.api.submit(job_type, {"prompt": words, "text": words})
        seen = []
        for message in pubsub.listen():
            notice = json.loads(message["data"])
            if notice["job_id"] == str(job):
                seen.append((notice["status"], site.api.status(job)))
            if seen and seen[-1][0] == "completed":
                break
    assert seen == [("processing", "processing"), ("completed", "completed")]


def test_a_hundred_jobs_of_all_types_complete_once_each_and_in_order(site: Site) -> None:
    words = [f"hundred {number:03}" for number in range(100)]
    types = [list(JOBS)[number % 3] for number in range(100)]
    jobs = [
        site.api.submit(kind, {"prompt": word, "text": word, "size": "64x64"})
        for kind, word in zip(types, words, strict=True)
    ]
    site.api.wait_notice(jobs[-1], "completed", timeout_s=60)
    assert site.goes_on()
    assert [site.api.notices(job) for job in jobs] == [["processing", "completed"]] * 100
    assert site.api.jobs.count_documents({"_id": {"$in": jobs}, "status": "completed", "worker.attempt": 1}) == 100
    assert [len(site.provider.calls_for(word)) for word in words] == [1] * 100
    told = [m["job_id"] for m in site.api.heard if m.get("status") == "completed"]
    assert [job_id for job_id in told if ObjectId(job_id) in jobs] == [str(job) for job in jobs]


# ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────


def message_of(api: Api, job: ObjectId, **other: object) -> tuple[str, dict[str, Any]]:
    """The two arguments that the API sends for a document, with some of `job_data` replaced."""
    document = api.document(job)
    copied = {key: document.get(key) for key in ("job_type", "input_data", "user_id", "session_id")}
    return str(job), {"job_id": str(job), **copied, **other}


def test_the_call_with_queue_and_limits_is_understood(site: Site) -> None:
    job = site.api.insert("text_generation", {"prompt": "apply_async"})
    task = site.api.celery.signature(TASK_NAME)
    task.apply_async(
        args=message_of(site.api, job), queue=site.api.queue, soft_time_limit=10, time_limit=12, add_to_parent=False
    )
    assert site.api.wait(job)["worker"]["limits"] == [12, 10]


def test_the_older_call_by_delay_is_understood(site: Site) -> None:
    job = site.api.insert("text_generation", {"prompt": "delay"})
    site.api.celery.signature(TASK_NAME).set(queue=site.api.queue).delay(*message_of(site.api, job))
    assert site.api.wait(job)["status"] == "completed"


def test_keyword_arguments_are_understood(site: Site) -> None:
    job = site.api.insert("text_generation", {"prompt": "keywords"})
    job_id, job_data = message_of(site.api, job)
    site.api.send(kwargs={"job_id": job_id, "job_data": job_data})
    assert site.api.wait(job)["status"] == "completed"


def test_job_data_of_an_older_api_without_user_and_session_is_understood(site: Site) -> None:
    job = site.api.insert("text_generation", {"prompt": "older"})
    site.api.send(str(job), {"job_id": str(job), "job_type": "text_generation", "input_data": {"prompt": "older"}})
    assert site.api.wait_notice(job, "completed")["user_id"] == "user-1"


def test_a_null_session_is_told_as_null(site: Site) -> None:
    job = site.api.insert("text_generation", {"prompt": "null session"}, session_id=None)
    site.api.enqueue(job)
    assert site.api.wait_notice(job, "completed")["session_id"] is None


def test_a_missing_session_is_told_as_null(site: Site) -> None:
    job = site.api.insert("text_generation", {"prompt": "no session"})
    site.api.jobs.update_one({"_id": job}, {"$unset": {"session_id": ""}})
    site.api.enqueue(job)
    assert site.api.wait_notice(job, "completed")["session_id"] is None


def test_where_message_and_document_disagree_the_document_wins(site: Site) -> None:
    job = site.api.insert("text_generation", {"prompt": "the document's words"})
    other = {"job_type": "image_generation", "input_data": {"prompt": "the message's words"}, "user_id": "thief"}
    site.api.send(*message_of(site.api, job, **other, session_id="thief's"))
    notice = site.api.wait_notice(job, "completed")
    assert (notice["user_id"], notice["session_id"]) == ("user-1", "session-1")
    assert site.api.document(job)["output_data"]["generated_text"]
    assert site.provider.calls_for("the document's words")
    assert not site.provider.calls_for("the message's words")


NAMELESS: dict[str, tuple[tuple[Any, ...], dict[str, Any] | None]] = {
    "no arguments": ((), None),
    "an id that is not hex": (("not-an-id", {}), None),
    "an id that is a number": ((7, {}), None),
    "an id that is null": ((None, {}), None),
    "an id that is a list": (([], {}), None),
    "an unknown keyword": ((), {"id": "5f0000000000000000000000"}),
}


@pytest.mark.parametrize(("args", "kwargs"), NAMELESS.values(), ids=NAMELESS)
def test_a_message_that_names_no_job_is_dropped_with_a_line(site: Site, args: Any, kwargs: Any) -> None:
    task = site.api.send(*args, kwargs=kwargs)
    task.get(timeout=10, propagate=False)
    assert site.goes_on()
    assert "dropped a message without a job id" in site.log()
    assert task.state == "FAILURE"
    assert "Traceback" not in site.log()


def test_a_message_for_a_missing_document_is_dropped_with_a_line(site: Site) -> None:
    job = ObjectId()
    task = site.api.send(str(job), {})
    assert "no such job" in str(task.get(timeout=10, propagate=False))
    assert site.goes_on()
    assert f"job={job} not taken" in site.log()
    assert "Traceback" not in site.log()


DAMAGED = {
    "one argument": lambda job: (job,),
    "three arguments": lambda job: (job, {}, {}),
    "job_data is a string": lambda job: (job, "data"),
    "job_data is a list": lambda job: (job, [1]),
    "job_data is null": lambda job: (job, None),
}


@pytest.mark.parametrize("arguments", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_message_fails_its_document_with_a_sentence(site: Site, arguments: Callable[[str], Any]) -> None:
    job = site.api.insert("text_generation", {"prompt": "damaged"})
    site.api.send(*arguments(str(job)))
    site.api.wait_notice(job, "failed")
    assert site.goes_on()
    assert site.api.document(job)["error_message"] == "Your request reached us damaged. Please send it again."
    assert site.api.document(job)["completed_at"]
    assert site.api.notices(job) == ["failed"]
    assert "Traceback" not in site.log()


ARGUMENTS: dict[str, Any] = {
    "args is a string": ("planted-words", {}, {}),
    "args is null": (None, {}, {}),
    "args is a number": (7, {}, {}),
    "args is an object": ({"planted-words": "planted-words"}, {}, {}),
    "kwargs is a list": (["planted-words"], ["planted-words"], {}),
    "kwargs is null": ([], None, {}),
    "embed is null": ([], {}, None),
}


@pytest.mark.parametrize("body", ARGUMENTS.values(), ids=ARGUMENTS)
def test_the_worker_goes_on_after_arguments_of_any_shape(site: Site, body: object) -> None:
    site.api.send_body(body)
    assert site.goes_on()
    assert "planted-words" not in site.log()
    assert "Traceback" not in site.log()


def test_a_message_of_an_unknown_task_is_dropped_without_its_words_in_the_log(site: Site) -> None:
    site.api.celery.send_task("another.task", args=("planted-words",), queue=site.api.queue)
    assert site.goes_on()
    assert "another.task" in site.log()
    assert "planted-words" not in site.log()


def test_a_message_that_is_no_json_is_dropped_without_its_words_in_the_log(site: Site) -> None:
    site.api.send_body("planted-words", serializer="pickle")
    assert site.goes_on()
    assert "planted-words" not in site.log()


@pytest.mark.parametrize("task_id", [None, ["x"], {"x": 1}], ids=repr)
def test_the_worker_goes_on_after_an_unknown_task_with_any_id(site: Site, task_id: object) -> None:
    site.api.send_body([[], {}, {}], headers={"task": "nope", "id": task_id})
    site.wait_log("whose task isn't known here")
    assert site.goes_on()
    assert site.worker.process.poll() is None


@pytest.mark.parametrize("body", [{"prompt": "planted-words"}, "planted-words", [], None], ids=repr)
def test_the_worker_goes_on_after_a_body_of_any_shape(api: Api, start_worker: StartWorker, body: object) -> None:
    worker = start_worker()
    api.send_body(body)
    assert api.wait(api.text("the next job"), timeout_s=5)["status"] == "completed"
    assert worker.process.poll() is None
    assert "planted-words" not in worker.text()


def test_a_damaged_message_leaves_a_job_that_runs_alone(site: Site) -> None:
    job = site.api.text("undisturbed [delay 1]", soft_time_limit=10)
    site.wait_call("undisturbed")
    site.api.send(str(job))
    assert site.api.wait(job)["status"] == "completed"
    assert site.goes_on()
    assert site.api.notices(job)[:2] == ["processing", "completed"]
    assert site.api.status(job) == "completed"


def test_an_unknown_job_type_fails_with_a_sentence(site: Site) -> None:
    job = site.api.submit("video_generation", {"prompt": "unknown"})
    site.api.wait_notice(job, "failed")
    assert site.goes_on()
    assert site.api.document(job)["error_message"] == "This kind of job isn't known here: 'video_generation'."
    assert "Traceback" not in site.log()


@pytest.mark.parametrize("input_data", [None, "words", ["words"], {}, {"prompt": 7}, {"prompt": "x", "max_tokens": -1}])
def test_unusable_input_fails_with_a_sentence_and_costs_nothing(site: Site, input_data: object) -> None:
    job = site.api.submit("text_generation", input_data)
    site.api.wait_notice(job, "failed")
    before = len(site.provider.calls)
    assert site.goes_on()
    assert site.api.document(job)["error_message"].startswith("The input can't be used: ")
    assert len(site.provider.calls) == before + 1
    assert "Traceback" not in site.log()


# ── one generation a job ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_duplicate_of_a_running_job_is_dropped(api: Api, provider: Provider, start_worker: StartWorker) -> None:
    worker = start_worker(WORKER_CONCURRENCY="2")
    job = api.text("twice at a time [delay 2]")
    poll(lambda: provider.calls, 10)
    api.enqueue(job)
    poll(lambda: "is held by a live lease" in worker.text(), 10)
    api.wait_notice(job, "completed")
    assert len(provider.calls) == 1
    assert api.notices(job) == ["processing", "completed"]


def test_a_duplicate_of_a_completed_job_tells_the_status_again(site: Site) -> None:
    job = site.api.text("twice in turn")
    site.api.wait_notice(job, "completed")
    again = site.api.enqueue(job)
    assert again.get(timeout=10) == {"job_id": str(job), "status": "completed"}
    poll(lambda: site.api.notices(job) == ["processing", "completed", "completed"], 5)
    assert len(site.provider.calls_for("twice in turn")) == 1


def test_a_job_cancelled_before_it_starts_is_never_generated(site: Site) -> None:
    job = site.api.insert("text_generation", {"prompt": "cancelled early"})
    site.api.cancel(job)
    before = site.api.document(job)
    site.api.enqueue(job)
    assert site.goes_on()
    assert not site.provider.calls_for("cancelled early")
    assert {**site.api.document(job), "worker": None} == {**before, "worker": None}


def test_a_failed_job_that_the_api_sets_back_to_pending_is_tried_afresh(site: Site) -> None:
    job = site.api.text("refused at first [status 400 times=1]")
    assert site.api.wait(job)["status"] == "failed"
    site.api.jobs.update_one({"_id": job}, {"$set": {"status": "pending"}})
    site.api.enqueue(job)
    again = site.api.wait(job)
    assert (again["status"], again["error_message"], again["worker"]["attempt"]) == ("completed", None, 1)


@in_each_pool
def test_a_cancel_stops_the_generation_within_two_seconds(site: Site) -> None:
    words = f"cancelled {ObjectId()}"
    job = site.api.text(f"{words} [hang]")
    site.wait_call(words)
    cancelled_at = time.time()
    site.api.cancel(job)
    [call] = site.provider.calls_for(words)
    poll(lambda: call.outcome == "disconnected", 5)
    assert call.ended_at is not None
    assert call.ended_at - cancelled_at < 2


@of_each_type
def test_a_cancelled_job_is_left_as_the_api_wrote_it(site: Site, job_type: str) -> None:
    words = f"untouched {job_type}"
    job = site.api.submit(job_type, {"prompt": f"{words} [hang]", "text": f"{words} [hang]"})
    site.wait_call(words)
    site.api.cancel(job)
    cancelled = site.api.document(job)
    assert site.goes_on()
    assert site.api.document(job) == cancelled
    assert cancelled["error_message"] == "Cancelled."
    assert site.api.notices(job) == ["processing"]
    assert not artifacts(site.api).exists({"filename": {"$regex": str(job)}})


# ── progress ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_streamed_text_arrives_whole_and_in_order_before_the_end(site: Site) -> None:
    job = site.api.text("streamed [tokens 40] [pace 0.03]")
    end = site.api.wait_notice(job, "completed")
    pieces = site.api.progress(job)
    assert len(pieces) > 5
    assert "".join(piece["delta"] for piece in pieces) == site.api.document(job)["output_data"]["generated_text"]
    assert [piece["sequence"] for piece in pieces] == list(range(len(pieces)))
    assert {(p["attempt"], p["user_id"], p["session_id"]) for p in pieces} == {(1, "user-1", "session-1")}
    assert all(piece["heard_at"] <= end["heard_at"] for piece in pieces)


def test_a_second_attempt_streams_the_text_anew(site: Site) -> None:
    job = site.api.text("broken off [tokens 30] [pace 0.03] [cut times=1]")
    site.api.wait_notice(job, "completed")
    pieces = [piece for piece in site.api.progress(job) if piece["attempt"] == 2]
    assert site.api.progress(job)[0]["attempt"] == 1
    assert pieces[0]["sequence"] == 0
    assert "".join(piece["delta"] for piece in pieces) == site.api.document(job)["output_data"]["generated_text"]


# ── errors and retries ───────────────────────────────────────────────────────────────────────────────────────────


def test_two_errors_of_the_provider_are_tried_again(site: Site) -> None:
    job = site.api.text("third time lucky [status 500 times=2]")
    site.api.wait_notice(job, "completed")
    messages = [update["message"] for update in site.api.updates(job)]
    assert [message for message in messages if "trying again" in message] == [
        "The provider is busy; trying again in 1 s (2 of 4).",
        "The provider is busy; trying again in 1 s (3 of 4).",
    ]
    assert set(site.api.notices(job)[:-1]) == {"processing"}
    assert len(site.provider.calls_for("third time lucky")) == 3


def test_errors_without_end_fail_the_job_after_four_tries(site: Site) -> None:
    job = site.api.text("never lucky [status 500]")
    failed = site.api.wait(job)
    assert failed["error_message"] == ("The provider is busy; given up after 4 tries. Please try again later.")
    assert len(site.provider.calls_for("never lucky")) == 4
    assert site.goes_on()
    assert site.api.notices(job)[-2:] == ["processing", "failed"]


REFUSALS = {
    400: "The provider refused this request. Change the input and try again.",
    401: "The service isn't set up correctly; tell its operator.",
    403: "The service isn't set up correctly; tell its operator.",
}


@pytest.mark.parametrize(("status", "sentence"), REFUSALS.items())
def test_a_refusal_of_the_provider_fails_the_job_at_once(site: Site, status: int, sentence: str) -> None:
    job = site.api.text(f"refused [status {status}]")
    assert site.api.wait(job)["error_message"] == sentence
    assert site.api.wait_notice(job, "failed")["message"] == sentence
    assert len(site.provider.calls_for(f"refused [status {status}]")) == 1


@pytest.mark.parametrize("status", [400, 401, 500])
def test_neither_key_nor_the_providers_words_are_told_or_logged(site: Site, status: int) -> None:
    job = site.api.text(f"secretive [status {status}]")
    site.api.wait(job)
    assert site.goes_on()
    shown = f"{site.api.document(job)} {site.api.updates(job)} {site.log()}"
    assert KEY not in shown
    assert "Incorrect API key" not in shown
    assert "had an error while processing" not in shown


def test_the_wait_that_the_provider_asks_for_is_kept(site: Site) -> None:
    job = site.api.text("patience [status 429 times=1 retry-after=3]")
    site.api.wait_notice(job, "completed", timeout_s=15)
    first, second = site.provider.calls_for("patience")
    assert 3 <= second.started_at - first.started_at < 6
    assert "trying again in 3 s" in site.api.updates(job)[1]["message"]


def test_a_job_that_waits_for_its_retry_holds_no_slot(site: Site) -> None:
    waiting = site.api.text("holds no slot [status 429 times=1 retry-after=4]")
    poll(lambda: len(site.api.notices(waiting)) == 2, 5)
    assert site.goes_on()
    assert site.api.status(waiting) == "processing"
    assert site.api.document(waiting)["worker"]["owner"] is None
    assert site.api.wait(waiting)["status"] == "completed"


# ── limits ───────────────────────────────────────────────────────────────────────────────────────────────────────

TOOK_TOO_LONG = "This took too long and was stopped. Please try again, perhaps with a smaller request."


@in_each_pool
def test_the_messages_own_soft_limit_fails_a_slow_job(site: Site) -> None:
    words, began_at = f"slow {ObjectId()}", time.monotonic()
    job = site.api.text(f"{words} [hang]", soft_time_limit=1, time_limit=5)
    assert site.api.wait(job)["error_message"] == TOOK_TOO_LONG
    assert time.monotonic() - began_at < 3
    assert site.goes_on()
    assert site.api.notices(job) == ["processing", "failed"]
    assert site.provider.calls_for(words)[0].outcome == "disconnected"


@in_each_pool
def test_the_messages_limit_may_be_longer_than_the_workers_own(site: Site) -> None:
    job = site.api.submit("blocking_nap", {"seconds": 0.1}, soft_time_limit=200, time_limit=300)
    assert site.api.wait(job)["worker"]["limits"] == [300, 200]
    assert site.api.status(job) == "completed"


def test_limits_that_no_clock_can_hold_are_ignored(site: Site) -> None:
    job = site.api.text("patient", time_limit=10**400, soft_time_limit=1e12)
    assert site.api.wait(job)["status"] == "completed"
    assert site.goes_on()


@in_each_pool
def test_a_handler_that_blocks_the_event_loop_fails_and_the_worker_goes_on(site: Site) -> None:
    assert site.goes_on()
    job = site.api.submit("blocking_nap", {"seconds": 30}, soft_time_limit=0.5, time_limit=20)
    assert site.api.wait(job, timeout_s=8)["error_message"] == TOOK_TOO_LONG
    assert site.goes_on()
    assert site.api.notices(job) == ["processing", "failed"]


def test_the_hard_limit_kills_a_hung_child_and_fails_its_job(site: Site) -> None:
    children = site.worker.children()
    job = site.api.submit("blocking_nap", {"seconds": 30}, soft_time_limit=1, time_limit=2)
    assert site.api.wait(job, timeout_s=12)["error_message"] == TOOK_TOO_LONG
    assert site.goes_on()
    assert site.api.notices(job) == ["processing", "failed"]
    assert set(site.worker.children()).isdisjoint(children)


# ── dead processes ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_job_of_a_killed_child_completes_by_a_second_attempt(site: Site) -> None:
    job = site.api.text("killed child [hang times=1]")
    site.wait_call("killed child")
    os.kill(site.api.document(job)["worker"]["pid"], signal.SIGKILL)
    assert site.api.wait(job, timeout_s=12)["status"] == "completed"
    assert site.goes_on()
    assert site.api.document(job)["worker"]["attempt"] == 2
    assert len(site.provider.calls_for("killed child")) == 2
    told = site.api.notices(job)  # Celery delivers the message again, and the sweep sends one: the later tells the end
    assert (told[:3], set(told[3:]) - {"completed"}) == (["processing", "processing", "completed"], set())


@pytest.mark.slow
def test_the_job_of_a_killed_worker_is_rescued_by_another(
    api: Api, provider: Provider, start_worker: StartWorker
) -> None:
    first = start_worker()
    job = api.text("killed worker [hang times=1]")
    poll(lambda: provider.calls, 10)
    start_worker()
    first.kill()
    assert api.wait(job, timeout_s=20)["status"] == "completed"
    api.wait_notice(job, "completed")
    assert api.document(job)["worker"]["attempt"] == 2
    assert api.notices(job) == ["processing", "processing", "completed"]


@pytest.mark.slow
def test_a_job_that_kills_every_child_fails_in_the_end(site: Site) -> None:
    job = site.api.text("kills all [hang]")
    killed: set[int] = set()

    def has_failed() -> bool:
        document = site.api.document(job)
        pid = document.get("worker", {}).get("pid")
        if document["status"] == "processing" and pid not in killed and psutil.pid_exists(pid):
            site.wait_call("kills all", len(killed) + 1)
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        return bool(document["status"] == "failed")

    poll(has_failed, 50)
    assert len(killed) == 4
    assert site.goes_on()


# ── shutdown ─────────────────────────────────────────────────────────────────────────────────────────────────────


@for_each_pool
def test_an_idle_worker_ends_soon_after_sigterm(start_worker: StartWorker, pool: str) -> None:
    worker = start_worker(WORKER_POOL=pool)
    began_at = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - began_at < 5


@for_each_pool
def test_a_job_that_ends_within_the_grace_is_completed(
    api: Api, provider: Provider, start_worker: StartWorker, pool: str
) -> None:
    worker = start_worker(WORKER_POOL=pool)
    job = api.text("quick enough [delay 1.5]")
    poll(lambda: provider.calls, 10)
    assert worker.stop() == 0
    assert api.status(job) == "completed"
    assert api.notices(job) == ["processing", "completed"]


@for_each_pool
def test_a_job_that_outlasts_the_grace_is_handed_back_uncounted(
    api: Api, provider: Provider, start_worker: StartWorker, pool: str
) -> None:
    worker = start_worker(WORKER_POOL=pool, SHUTDOWN_GRACE="2")
    job = api.text("too slow [hang]")
    poll(lambda: provider.calls, 10)
    began_at = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - began_at < 10
    document = api.document(job)
    assert (document["status"], document["worker"]["owner"], document["worker"]["attempt"]) == ("processing", None, 0)
    assert api.redis.llen(api.queue) == 1
    assert provider.calls[0].outcome == "disconnected"


def test_a_worker_that_celery_started_hands_back_too(api: Api, provider: Provider, start_worker: StartWorker) -> None:
    command = ["-m", "celery", "-A", "worker", "worker", "--concurrency=1"]
    worker = start_worker(command=command, PYTHONPATH=str(SOURCE), SHUTDOWN_GRACE="1")
    job = api.text("started by celery [hang]")
    poll(lambda: provider.calls, 10)
    assert worker.stop() == 0
    assert api.status(job) == "processing"
    assert api.document(job)["worker"]["owner"] is None
    assert api.redis.llen(api.queue) == 1


def test_a_hand_back_is_no_accident_in_the_log(api: Api, provider: Provider, start_worker: StartWorker) -> None:
    worker = start_worker(SHUTDOWN_GRACE="0")
    job = api.text("planned [hang]")
    poll(lambda: provider.calls, 10)
    assert worker.stop() == 0
    assert f"job={job} attempt=1 type='text_generation' handed back" in worker.text()
    assert "Traceback" not in worker.text()


@pytest.mark.slow
def test_another_worker_completes_what_was_handed_back(api: Api, provider: Provider, start_worker: StartWorker) -> None:
    first = start_worker(SHUTDOWN_GRACE="1")
    job = api.text("handed over [hang times=1]")
    poll(lambda: provider.calls, 10)
    start_worker()
    assert first.stop() == 0
    assert api.wait(job, timeout_s=3)["status"] == "completed"
    api.wait_notice(job, "completed")
    assert api.document(job)["worker"]["attempt"] == 1
    assert api.notices(job) == ["processing", "processing", "completed"]


@for_each_pool
def test_a_signal_to_the_whole_process_group_hands_back_too(
    api: Api, provider: Provider, start_worker: StartWorker, pool: str
) -> None:
    worker = start_worker(WORKER_POOL=pool, SHUTDOWN_GRACE="1")
    job = api.text("whole group [hang]")
    poll(lambda: provider.calls, 10)
    os.killpg(worker.process.pid, signal.SIGTERM)
    assert worker.process.wait(10) == 0
    assert api.status(job) == "processing"
    assert api.document(job)["worker"]["owner"] is None
    assert api.redis.llen(api.queue) == 1


def test_a_worker_that_breaks_down_tells_so_by_its_exit_code(api: Api, start_worker: StartWorker) -> None:
    worker = start_worker()
    api.redis.lpush(api.queue, "what no broker would send")  # the transport itself stumbles over it
    assert worker.process.wait(10) == 1


# ── recovery ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pool_in_which_no_lease_would_be_kept_is_refused(environment: dict[str, str], tmp_path: Path) -> None:
    ended = run_worker(environment, tmp_path, "run", "--pool=gevent")
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False)
    assert "isn't supported: use prefork, threads or solo" in ended.stderr


def lease(**other: object) -> dict[str, Any]:
    """The bookkeeping of a job that a worker elsewhere holds, with some of it replaced."""
    now = datetime.now(UTC)
    times = {"lease_until": now + timedelta(hours=1), "deadline": now + timedelta(hours=1), "first_started_at": now}
    return {"owner": "elsewhere", "node": "elsewhere", "pid": 1, "attempt": 1, "limits": [30, 20], **times, **other}


def abandoned(api: Api, prompt: str, **fields: object) -> ObjectId:
    """Inserts a job that is processing, and sends no message."""
    return api.insert("text_generation", {"prompt": prompt}, status="processing", **fields)


def test_a_job_with_an_expired_lease_is_rescued(site: Site) -> None:
    job = abandoned(site.api, "expired", worker=lease(lease_until=long_ago()))
    assert site.api.wait(job)["status"] == "completed"
    assert site.api.document(job)["worker"]["attempt"] == 2


def test_a_pending_job_whose_message_was_lost_is_put_into_the_queue_again(site: Site) -> None:
    long_ago = datetime.now(UTC) - timedelta(minutes=2)
    job = site.api.insert("text_generation", {"prompt": "lost before it started"}, created_at=long_ago)
    assert site.api.wait(job, timeout_s=15)["status"] == "completed"
    assert site.api.notices(job)[0] == "processing"


def test_a_revoked_task_that_runs_fails_its_job_and_the_worker_goes_on(site: Site) -> None:
    job = site.api.insert("text_generation", {"prompt": "revoked while it runs [hang]"})
    task = site.api.enqueue(job)
    site.wait_call("revoked while it runs")
    site.api.celery.control.revoke(task.id, terminate=True)
    assert site.api.wait(job, timeout_s=20)["error_message"] == "This was stopped by the operator."
    site.api.wait_notice(job, "failed")
    assert site.goes_on()


def test_a_task_that_is_revoked_before_it_runs_fails_its_job(site: Site) -> None:
    first = site.api.text("keeps the slot [delay 2]")
    site.wait_call("keeps the slot")
    job = site.api.insert("text_generation", {"prompt": "revoked in the queue"})
    site.api.celery.control.revoke(site.api.enqueue(job).id)
    assert site.api.wait(job, timeout_s=20)["error_message"] == "This was stopped by the operator."
    assert site.api.wait(first)["status"] == "completed"
    assert not site.provider.calls_for("revoked in the queue")


def test_a_file_that_a_dead_attempt_left_is_deleted(api: Api, start_worker: StartWorker) -> None:
    failed = api.insert("image_generation", {"prompt": "x"}, status="failed", error_message="Cancelled.")
    artifacts(api).put(b"x", _id=f"{failed}-0123456789abcdef.png", filename=f"{failed}-0123456789abcdef.png")
    start_worker(LEASE_SECONDS="2")
    poll(lambda: not artifacts(api).list(), 20)


def test_a_live_lease_of_another_worker_is_never_touched(site: Site) -> None:
    held = abandoned(site.api, "held elsewhere", worker=lease())
    before = site.api.document(held)
    for _ in range(2):
        site.api.wait(abandoned(site.api, "expired beside it", worker=lease(lease_until=long_ago())))
    assert site.api.document(held) == before


def test_a_released_job_whose_message_was_lost_is_rescued(site: Site) -> None:
    job = abandoned(
        site.api, "lost", worker=lease(owner=None, available_at=long_ago(), rescue_at=long_ago(), attempt=0)
    )
    assert site.api.wait(job)["status"] == "completed"


@pytest.mark.parametrize("bookkeeping", [{}, {"worker": None}], ids=["no field", "null"])
def test_an_old_job_of_a_worker_without_leases_is_taken_over(site: Site, bookkeeping: dict[str, Any]) -> None:
    job = abandoned(site.api, "orphan", started_at=long_ago(), **bookkeeping)
    assert site.api.wait(job)["status"] == "completed"


def test_a_young_job_of_a_worker_without_leases_is_left_to_it(site: Site) -> None:
    young = abandoned(site.api, "young", started_at=datetime.now(UTC))
    site.api.wait(abandoned(site.api, "old", started_at=long_ago()))
    assert site.api.status(young) == "processing"
    assert not site.provider.calls_for("young")


@pytest.mark.parametrize(
    "used_up", [{"attempt": 4}, {"first_started_at": long_ago()}], ids=["its attempts", "its time"]
)
def test_a_lost_job_that_has_used_up_its_bounds_fails(site: Site, used_up: dict[str, Any]) -> None:
    job = abandoned(site.api, f"used up {used_up}", worker=lease(lease_until=long_ago(), **used_up))
    site.api.wait_notice(job, "failed")
    assert site.api.document(job)["error_message"] == (
        "This could not be finished after several tries. Please try again."
    )
    assert not site.provider.calls_for(f"used up {used_up}")


@pytest.mark.slow
def test_the_worker_takes_jobs_again_after_redis_was_away(
    environment: dict[str, str], provider: Provider, start_worker: StartWorker
) -> None:
    with RedisServer() as redis, open_api({**environment, "REDIS_URL": redis.url}) as api:
        start_worker(REDIS_URL=redis.url)
        api.wait(api.text("before"))
        redis.restart()
        assert api.wait(api.text("afterwards"), timeout_s=30)["status"] == "completed"


# ── Celery's view ────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def events_of(api: Api) -> Iterator[list[dict[str, Any]]]:
    """Collects the events that workers send, in a thread; begins when the first one (a heartbeat) is heard."""
    events: list[dict[str, Any]] = []
    with api.celery.connection_for_read() as connection:
        receiver = api.celery.events.Receiver(connection, handlers={"*": events.append})
        thread = threading.Thread(target=receiver.capture, kwargs={"wakeup": False}, daemon=True)
        thread.start()
        poll(lambda: events, 10, description="a worker's heartbeat")
        yield events
        receiver.should_stop = True
        thread.join(10)


LIVES = {
    "is it well": ["task-received", "task-started", "task-succeeded"],
    "try again [status 500 times=1]": ["task-started", "task-retried", "task-started", "task-succeeded"],
    "refused [status 400]": ["task-received", "task-started", "task-failed"],
}


@pytest.mark.parametrize(("prompt", "expected"), LIVES.items())
def test_a_tasks_life_is_told_by_events(site: Site, prompt: str, expected: list[str]) -> None:
    with events_of(site.api) as events:
        task = site.api.enqueue(site.api.insert("text_generation", {"prompt": prompt}))

        def told() -> list[str]:
            kinds = [event["type"] for event in events if event.get("uuid") == task.id]
            return [kind for kind in kinds if kind in expected]

        with suppress(TimeoutError):
            poll(lambda: told()[-1:] == expected[-1:], 10)
        received = expected.count("task-received") or told().count("task-received")
        assert [kind for kind in told() if kind != "task-received" or received == 1] == expected


@for_each_pool
def test_the_events_of_a_last_job_are_sent_though_they_wait_for_others(
    api: Api, provider: Provider, start_worker: StartWorker, pool: str
) -> None:
    worker = start_worker(WORKER_POOL=pool)
    with events_of(api) as events:
        job = api.text("the last one [delay 1]")
        poll(lambda: provider.calls, 10)
        assert worker.stop() == 0
        assert api.status(job) == "completed"
        expected = ["task-received", "task-started", "task-succeeded"]
        poll(lambda: [event["type"] for event in events if event["type"] in expected] == expected, 5)


def test_the_tasks_result_names_job_and_status(site: Site) -> None:
    job = site.api.insert("text_generation", {"prompt": "result"})
    task = site.api.enqueue(job)
    assert task.get(timeout=10) == {"job_id": str(job), "status": "completed"}
    assert task.state == "SUCCESS"


def test_a_failed_jobs_task_ends_in_failure_with_the_persons_sentence(site: Site) -> None:
    task = site.api.enqueue(site.api.insert("text_generation", {"prompt": "refused [status 400]"}))
    assert str(task.get(timeout=10, propagate=False)) == REFUSALS[400]
    assert task.state == "FAILURE"
    assert "Traceback" not in site.log()


def test_a_running_job_is_told_by_inspect_active(site: Site) -> None:
    task = site.api.enqueue(site.api.insert("text_generation", {"prompt": "active [delay 2]"}))
    site.wait_call("active")
    active = site.api.celery.control.inspect([site.worker.name], timeout=2).active() or {}
    assert [(running["id"], running["name"]) for running in active[site.worker.name]] == [(task.id, TASK_NAME)]


INSPECTED = {
    "active": "OK",
    "scheduled": "empty",
    "reserved": "empty",
    "registered": TASK_NAME,
    "active_queues": "queue_prefork",
    "stats": '"prefetch_count"',
}


@pytest.mark.parametrize(("command", "shown"), INSPECTED.items())
def test_celery_inspect_answers(site: Site, tmp_path: Path, command: str, shown: str) -> None:
    arguments = ["-m", "celery", "-A", "worker", "inspect", command, "-d", site.worker.name]
    ended = run({**site.environment, "PYTHONPATH": f"{site.environment['PYTHONPATH']}:{SOURCE}"}, tmp_path, *arguments)
    assert ended.returncode == 0, ended.stderr
    assert shown in ended.stdout


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────

FAULTS = {
    "MONGODB_URL": "mongo://user:planted-password@host",
    "REDIS_URL": "http://:planted-password@host",
    "CELERY_SOFT_TIME_LIMIT": "ninety",
    "CELERY_TIME_LIMIT": "-1",
    "WORKER_POOL": "gevent",
    "WORKER_CONCURRENCY": "0",
    "OPENAI_BASE_URL": "localhost:1234",
}
COMMANDS = {"worker.py": [str(SOURCE / "worker.py")], "celery": ["-m", "celery", "-A", "worker", "worker"]}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_bad_setting_is_named_at_once_and_the_worker_ends_with_2(tmp_path: Path, command: list[str]) -> None:
    ended = run({**FAULTS, "OPENAI_API_KEY": KEY}, tmp_path, *command)
    shown = ended.stdout + ended.stderr
    assert ended.returncode == 2
    assert [name for name in FAULTS if f"{name} = " not in shown] == []
    assert "Traceback" not in shown
    assert "planted" not in shown


def test_a_soft_limit_over_the_hard_one_is_a_fault(tmp_path: Path) -> None:
    ended = run_worker({"CELERY_SOFT_TIME_LIMIT": "120", "CELERY_TIME_LIMIT": "120"}, tmp_path)
    assert ended.returncode == 2
    assert "CELERY_TIME_LIMIT = '120': should be greater than CELERY_SOFT_TIME_LIMIT" in ended.stderr


def test_the_worker_reads_dotenv(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("WORKER_POOL=gevent\nAPI_PORT=8000\nPROCESSING_TIMEOUT_SECONDS=120\n")
    ended = run_worker({}, tmp_path)
    assert "WORKER_POOL = 'gevent'" in ended.stderr
    assert "API_PORT" not in ended.stderr


@pytest.fixture(scope="module")
def guarded_servers() -> Iterator[dict[str, str]]:
    """Servers that ask for passwords: MongoDB with the contract's user, who may only read and write its database."""
    with ExitStack() as stack:
        mongo = stack.enter_context(contextmanager(start)(MongoServer(auth=True)))
        redis = stack.enter_context(contextmanager(start)(RedisServer(password="redis-planted-password")))
        yield {"MONGODB_URL": mongo.url, "DATABASE_NAME": DATABASE, "REDIS_URL": redis.url}


@of_each_type
def test_a_worker_works_with_the_contracts_user_alone(
    guarded_servers: dict[str, str], environment: dict[str, str], start_worker: StartWorker, job_type: str
) -> None:
    with open_api({**environment, **guarded_servers}) as api:
        start_worker(**guarded_servers)
        assert api.wait(api.submit(job_type, JOBS[job_type]))["status"] == "completed"


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────────────────────

LOUD = {"worker.py": None, "celery": ["-m", "celery", "-A", "worker", "worker", "--loglevel=DEBUG", "--concurrency=1"]}
PLANTED = ("planted-words", KEY, "redis-planted-password", DATABASE_PASSWORD)


@pytest.mark.parametrize("command", LOUD.values(), ids=LOUD)
def test_no_log_holds_a_prompt_a_key_or_a_password(
    guarded_servers: dict[str, str], environment: dict[str, str], start_worker: StartWorker, command: list[str] | None
) -> None:
    with open_api({**environment, **guarded_servers}) as api:
        worker = start_worker(command=command, **guarded_servers, DEBUG="true", PYTHONPATH=str(SOURCE))
        faults = ("", "[status 401]", "[status 500 times=1]", "[html]", "[shape]", "[cut times=1]", "[empty]")
        jobs = [api.text(f"planted-words {fault}") for fault in faults]
        jobs += [api.submit(job_type, {"prompt": "planted-words"}) for job_type in JOBS]
        jobs += [api.submit("text_generation", wrong) for wrong in ({"planted-words": 1}, "planted-words", None)]
        for body in (["planted-words", {}], [str(ObjectId()), "planted-words"], [str(ObjectId())]):
            api.send(*body, kwargs={"planted-words": "planted-words"})
        for job in jobs:
            api.wait_notice(job, api.wait(job, timeout_s=30)["status"])
        assert [secret for secret in PLANTED if secret in worker.text()] == []


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", ["run", "check", "status", "health", "recover", "submit", "demo"])
def test_every_command_has_help(tmp_path: Path, command: str) -> None:
    ended = run_worker({}, tmp_path, command, "--help")
    assert ended.returncode == 0
    assert f"{command} [OPTIONS]" in ended.stdout


def test_help_lists_the_commands(tmp_path: Path) -> None:
    ended = run_worker({}, tmp_path, "--help")
    assert ended.returncode == 0
    assert all(name in ended.stdout for name in ("check", "demo", "health", "recover", "run", "status", "submit"))


def test_the_start_says_what_the_worker_is_connected_to(site: Site) -> None:
    head = site.worker.text()[:2000]
    assert site.environment["CELERY_QUEUE_NAME"] in head
    assert site.environment["DATABASE_NAME"] in head
    assert f"127.0.0.1:{site.provider.port}" in head
    assert "prefork, 1 at a time" in head


def test_check_finds_everything_in_order(environment: dict[str, str], tmp_path: Path) -> None:
    ended = run_worker(environment, tmp_path, "check")
    assert ended.returncode == 0, ended.stdout
    assert "FAULT" not in ended.stdout
    wanted = ("MongoDB", "broker", "maxmemory-policy", "artifact store", "provider, text", "provider, audio")
    assert [what for what in wanted if what not in ended.stdout] == []


WRONG = {
    "MONGODB_URL": ("mongodb://user:planted@127.0.0.1:{port}/x", "is MONGODB_URL right"),
    "REDIS_URL": ("redis://:planted@127.0.0.1:{port}/0", "is REDIS_URL right"),
    "OPENAI_BASE_URL": ("http://127.0.0.1:{port}/v1", "is the URL right"),
    "ARTIFACT_URL": ("file:///proc/no/such/folder", "is ARTIFACT_URL right"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("variable", "value", "advice"), [(name, *wrong) for name, wrong in WRONG.items()])
def test_check_says_what_is_wrong_and_ends_with_1(
    environment: dict[str, str], tmp_path: Path, variable: str, value: str, advice: str
) -> None:
    ended = run_worker({**environment, variable: value.format(port=free_port())}, tmp_path, "check")
    assert ended.returncode == 1
    assert "FAULT" in ended.stdout
    assert advice in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr
    assert "planted" not in ended.stdout + ended.stderr


def test_status_shows_jobs_queue_and_last_errors(environment: dict[str, str], api: Api, tmp_path: Path) -> None:
    for status in ("pending", "completed", "completed"):
        api.insert("text_generation", {}, status=status)
    abandoned(api, "expired", worker=lease(lease_until=long_ago()))
    failed = api.insert("text_generation", {}, status="failed", error_message="It broke.", completed_at=long_ago())
    api.send("waiting")
    ended = run_worker(environment, tmp_path, "status")
    rows = [" ".join(row.replace("│", " ").replace("┃", " ").split()) for row in ended.stdout.splitlines()]
    assert ended.returncode == 0
    for row in ("pending 1", "processing 1", "completed 2", "failed 1", f"waiting in {api.queue} 1"):
        assert row in rows
    assert any(row.startswith("expired leases 1") for row in rows)
    assert any("It broke." in row and str(failed) in row for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["status", "recover"])
def test_a_command_without_mongodb_ends_with_one_sentence(
    environment: dict[str, str], tmp_path: Path, command: str
) -> None:
    ended = run_worker({**environment, "MONGODB_URL": f"mongodb://127.0.0.1:{free_port()}/x"}, tmp_path, command)
    assert ended.returncode == 1
    assert "MongoDB can't be reached" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_recover_puts_a_lost_job_back_into_the_queue(environment: dict[str, str], api: Api, tmp_path: Path) -> None:
    job = abandoned(api, "expired", worker=lease(lease_until=long_ago()))
    ended = run_worker(environment, tmp_path, "recover")
    assert ended.returncode == 0
    assert ended.stdout.strip() == f"job={job} nobody worked on it: put back into the queue"
    assert api.document(job)["worker"]["owner"] is None
    assert api.redis.llen(api.queue) == 1


def test_recover_says_when_there_is_nothing_to_do(environment: dict[str, str], api: Api, tmp_path: Path) -> None:
    ended = run_worker(environment, tmp_path, "recover")
    assert (ended.returncode, ended.stdout.strip()) == (0, "nothing to recover")


def test_health_is_1_without_a_worker(environment: dict[str, str], tmp_path: Path) -> None:
    assert run_worker({**environment, "TMPDIR": str(tmp_path)}, tmp_path, "health").returncode == 1


@for_each_pool
def test_health_is_0_beside_a_running_worker(
    environment: dict[str, str], start_worker: StartWorker, tmp_path: Path, pool: str
) -> None:
    here = {"TMPDIR": str(tmp_path), "WORKER_POOL": pool}
    worker = start_worker(**here)
    poll(lambda: run_worker({**environment, **here}, tmp_path, "health").returncode == 0, 10)
    worker.stop()
    assert run_worker({**environment, **here}, tmp_path, "health").returncode == 1


def test_health_stays_0_while_redis_is_away(
    environment: dict[str, str], start_worker: StartWorker, tmp_path: Path
) -> None:
    with RedisServer() as redis:
        here = {"TMPDIR": str(tmp_path), "REDIS_URL": redis.url}
        start_worker(**here)
        heartbeat = poll(lambda: [path for path in tmp_path.glob("*/*") if path.name.isdigit()], 10)[0]
        redis.stop()
        away_since = time.time()
        poll(lambda: heartbeat.stat().st_mtime > away_since + 2, 10)
        assert run_worker({**environment, **here}, tmp_path, "health").returncode == 0


# ── an older client ──────────────────────────────────────────────────────────────────────────────────────────────

OLD_CLIENT = ("celery==5.3.4", "kombu==5.3.4", "redis==5.0.1")
OLD_CLIENT_SCRIPT = """
import json, sys, threading, time
import celery, kombu, redis

url, queue, task_name, job_id, worker = sys.argv[1:]
app = celery.Celery("api", broker=url, backend=url)
events = []
receiver = app.events.Receiver(app.connection_for_read(), handlers={"*": events.append})
threading.Thread(target=receiver.capture, kwargs={"wakeup": False}, daemon=True).start()
while not events:
    time.sleep(0.05)
args = (job_id, {"job_id": job_id, "job_type": "text_generation", "input_data": {"prompt": "x"}})
result = app.send_task(task_name, args=args, queue=queue, soft_time_limit=20, time_limit=30)
while not [event for event in events if event["type"] == "task-started" and event["uuid"] == result.id]:
    time.sleep(0.05)
inspect = app.control.inspect([worker], timeout=3)
said = {
    "versions": [celery.__version__, kombu.__version__, redis.__version__],
    "active": [[task["name"], task["id"] == result.id] for task in inspect.active()[worker]],
    "pool": inspect.stats()[worker]["pool"]["max-concurrency"],
    "queues": [entry["name"] for entry in inspect.active_queues()[worker]],
    "idle": [inspect.scheduled()[worker], inspect.reserved()[worker]],
    "result": result.get(timeout=20),
}
while "task-succeeded" not in [event["type"] for event in events if event.get("uuid") == result.id]:
    time.sleep(0.05)
said["events"] = [event["type"] for event in events if event.get("uuid") == result.id]
print(json.dumps(said))
"""


@pytest.fixture(scope="session")
def old_python() -> Path:
    """The Python of an environment with the API's client of Celery, made once and kept in the user's cache."""
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ai-backend-worker-tests"
    folder = cache_folder / "-".join([*OLD_CLIENT, f"python{sys.version_info.major}.{sys.version_info.minor}"])
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *OLD_CLIENT]
        ended = subprocess.run(install, capture_output=True, text=True)
        if ended.returncode and not os.environ.get("CI"):
            pytest.skip(f"pip can't install the older client: {ended.stderr.strip()[-300:]}")
        assert ended.returncode == 0, ended.stderr
        complete.touch()
    return python


@pytest.mark.slow
def test_the_apis_older_celery_sends_reads_inspects_and_hears_events(site: Site, old_python: Path) -> None:
    job = site.api.insert("text_generation", {"prompt": "an older client [delay 3]"})
    arguments = [site.api.redis_url, site.api.queue, TASK_NAME, str(job), site.worker.name]
    command = [str(old_python), "-I", "-c", OLD_CLIENT_SCRIPT, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout)
    assert said["versions"] == ["5.3.4", "5.3.4", "5.0.1"]
    assert (said["active"], said["pool"], said["queues"]) == ([[TASK_NAME, True]], 1, [site.api.queue])
    assert said["idle"] == [[], []]
    assert said["result"] == {"job_id": str(job), "status": "completed"}
    assert said["events"] == ["task-received", "task-started", "task-succeeded"]
