"""Jobs through a real worker: what the API sends and gets back, and what becomes of errors and of slow jobs.

All tests share one running worker per pool (`site`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from bson import ObjectId

from testbed.api import STATUS_CHANNEL, TASK_NAME, Api
from testbed.processes import poll
from tests.lab import AUDIO, IMAGE, KEY, TEXT
from tests.place import OpenPlace, Step
from tests.site import JOBS, POOLS, Site, SiteOf, artifacts, in_each_pool, of_each_type
from workerkit.sentences import DAMAGED as DAMAGED_SENTENCE
from workerkit.sentences import NOT_SET_UP, REFUSED, TOOK_TOO_LONG, unknown_type

# ── jobs ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@in_each_pool
def test_a_text_job_completes_with_the_contracts_fields(site: Site) -> None:
    job = site.api.wait(site.api.submit(TEXT, JOBS[TEXT]))
    output = job["output_data"]
    assert (job["status"], job["artifact_url"], job["error_message"]) == ("completed", None, None)
    assert output["generated_text"]
    assert output["model_used"] == "testbed-model"
    assert output["tokens_used"] > 0
    assert job["created_at"] <= job["started_at"] <= job["completed_at"] <= job["updated_at"]


def test_an_image_job_completes_with_a_picture_of_its_resolution(site: Site) -> None:
    job = site.api.wait(site.api.submit(IMAGE, JOBS[IMAGE]))
    output = job["output_data"]
    assert job["status"] == "completed"
    assert output["image_url"] == job["artifact_url"]
    assert (output["resolution"], output["model_used"]) == ("512x512", "testbed-model")


def test_an_audio_job_completes_with_a_sound_of_its_duration(site: Site) -> None:
    job = site.api.wait(site.api.submit(AUDIO, JOBS[AUDIO]))
    output = job["output_data"]
    assert job["status"] == "completed"
    assert output["audio_url"] == job["artifact_url"]
    assert (output["duration_seconds"], output["format"]) == (0.76, "wav")
    assert output["model_used"] == "testbed-model"


@pytest.mark.parametrize(("job_type", "magic"), [(IMAGE, b"\x89PNG"), (AUDIO, b"RIFF")])
def test_the_artifact_url_names_a_file_that_is_stored(site: Site, job_type: str, magic: bytes) -> None:
    job = site.api.wait(site.api.submit(job_type, JOBS[job_type]))
    base, name = job["artifact_url"].rsplit("/", 1)
    assert base == "/artifacts"
    assert artifacts(site.api).get(name).read().startswith(magic)


@of_each_type
def test_a_job_is_published_as_processing_and_then_as_completed(site: Site, job_type: str) -> None:
    job = site.api.submit(job_type, JOBS[job_type])
    site.api.wait_notice(job, "completed")
    first, last = site.api.updates(job)
    assert (first["status"], last["status"]) == ("processing", "completed")
    assert (last["user_id"], last["session_id"]) == ("user-1", "session-1")
    assert last["message"]


@of_each_type
def test_a_status_is_published_only_after_the_document_has_it(site: Site, job_type: str) -> None:
    words = "Slowly [delay 0.2]"
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
    assert [status for status, _ in seen] == ["processing", "completed"]
    assert seen[0] != ("processing", "pending")  # on a busy machine the job may be completed when it is read
    assert seen[1] == ("completed", "completed")


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
    ended = [m["job_id"] for m in site.api.received if m.get("status") == "completed"]
    assert [job_id for job_id in ended if ObjectId(job_id) in jobs] == [str(job) for job in jobs]


# ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────


def message_of(api: Api, job: ObjectId, **other: object) -> tuple[str, dict[str, Any]]:
    """The two arguments that the API sends for a document, with some of `job_data` replaced."""
    document = api.document(job)
    copied = {key: document.get(key) for key in ("job_type", "input_data", "user_id", "session_id")}
    return str(job), {"job_id": str(job), **copied, **other}


def test_the_call_with_queue_and_limits_is_understood(site: Site) -> None:
    job = site.api.insert(TEXT, {"prompt": "apply_async"})
    task = site.api.celery.signature(TASK_NAME)
    task.apply_async(
        args=message_of(site.api, job), queue=site.api.queue, soft_time_limit=10, time_limit=12, add_to_parent=False
    )
    assert site.api.wait(job)["worker"]["limits"] == [12, 10]


def test_the_older_call_by_delay_is_understood(site: Site) -> None:
    job = site.api.insert(TEXT, {"prompt": "delay"})
    site.api.celery.signature(TASK_NAME).set(queue=site.api.queue).delay(*message_of(site.api, job))
    assert site.api.wait(job)["status"] == "completed"


def test_keyword_arguments_are_understood(site: Site) -> None:
    job = site.api.insert(TEXT, {"prompt": "keywords"})
    job_id, job_data = message_of(site.api, job)
    site.api.send(kwargs={"job_id": job_id, "job_data": job_data})
    assert site.api.wait(job)["status"] == "completed"


def test_job_data_of_an_older_api_without_user_and_session_is_understood(site: Site) -> None:
    job = site.api.insert(TEXT, {"prompt": "older"})
    site.api.send(str(job), {"job_id": str(job), "job_type": TEXT, "input_data": {"prompt": "older"}})
    assert site.api.wait_notice(job, "completed")["user_id"] == "user-1"


def test_a_null_session_is_published_as_null(site: Site) -> None:
    job = site.api.insert(TEXT, {"prompt": "null session"}, session_id=None)
    site.api.enqueue(job)
    assert site.api.wait_notice(job, "completed")["session_id"] is None


def test_a_missing_session_is_published_as_null(site: Site) -> None:
    job = site.api.insert(TEXT, {"prompt": "no session"})
    site.api.jobs.update_one({"_id": job}, {"$unset": {"session_id": ""}})
    site.api.enqueue(job)
    assert site.api.wait_notice(job, "completed")["session_id"] is None


def test_where_message_and_document_disagree_the_document_wins(site: Site) -> None:
    job = site.api.insert(TEXT, {"prompt": "the document's words"})
    other = {"job_type": IMAGE, "input_data": {"prompt": "the message's words"}, "user_id": "thief"}
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
    task.get(timeout=30, propagate=False)
    assert site.goes_on()
    assert "dropped a message without a job id" in site.log()
    assert task.state == "FAILURE"
    assert "Traceback" not in site.log()


def test_a_message_for_a_missing_document_is_dropped_with_a_line(site: Site) -> None:
    job = ObjectId()
    task = site.api.send(str(job), {})
    assert "no such job" in str(task.get(timeout=30, propagate=False))
    assert site.goes_on()
    assert f"job={job} not claimed: no such document" in site.log()
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
    job = site.api.insert(TEXT, {"prompt": "damaged"})
    site.api.send(*arguments(str(job)))
    site.api.wait_notice(job, "failed")
    assert site.goes_on()
    assert site.api.document(job)["error_message"] == DAMAGED_SENTENCE
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
def test_the_worker_goes_on_after_a_body_of_any_shape(site: Site, body: object) -> None:
    site.api.send_body(body)
    assert site.goes_on()
    assert site.worker.process.poll() is None
    assert "planted-words" not in site.log()


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
    assert site.api.document(job)["error_message"] == unknown_type("video_generation")
    assert "Traceback" not in site.log()


@pytest.mark.parametrize("input_data", [None, "words", ["words"], {}, {"prompt": 7}, {"prompt": "x", "max_tokens": -1}])
def test_unusable_input_fails_with_a_sentence_and_costs_nothing(site: Site, input_data: object) -> None:
    job = site.api.submit(TEXT, input_data)
    site.api.wait_notice(job, "failed")
    before = len(site.provider.calls)
    assert site.goes_on()
    assert site.api.document(job)["error_message"].startswith("Your request can't be used: ")
    assert len(site.provider.calls) == before + 1
    assert "Traceback" not in site.log()


# ── one generation a job ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_duplicate_of_a_running_job_is_dropped(open_place: OpenPlace) -> None:
    place, name, gate = open_place("duplicate", WORKER_CONCURRENCY="2"), "twice at a time", "hold until_it_is_dropped"
    place.start_worker()
    place.wait_ready()
    job = place.submit(name, step := Step(gate))
    place.wait_call(name)
    place.send(job)
    place.wait_log("not claimed: it is held by a live lease")
    place.provider.let_go.add(gate)
    place.wait_ends({name: step})
    assert len(place.calls(name)) == 1
    assert place.api.notices(job) == ["processing", "completed"]


def test_a_duplicate_of_a_completed_job_publishes_the_status_again(site: Site) -> None:
    job = site.api.text("twice in turn")
    site.api.wait_notice(job, "completed")
    again = site.api.enqueue(job)
    assert again.get(timeout=30) == {"job_id": str(job), "status": "completed"}
    poll(lambda: site.api.notices(job) == ["processing", "completed", "completed"], 30)
    assert len(site.provider.calls_for("twice in turn")) == 1


def test_a_job_cancelled_before_it_starts_is_never_generated(site: Site) -> None:
    job = site.api.insert(TEXT, {"prompt": "cancelled early"})
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
def test_a_cancel_stops_the_generation_long_before_its_limit(site: Site) -> None:
    words = f"cancelled {ObjectId()}"
    job = site.api.text(f"{words} [hang]", soft_time_limit=200, time_limit=300)
    site.wait_call(words)
    site.api.cancel(job)
    [call] = site.provider.calls_for(words)
    poll(lambda: call.outcome == "disconnected", 20)


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
    assert all(piece["received_at"] <= end["received_at"] for piece in pieces)


def test_a_second_attempt_streams_the_text_from_its_beginning(site: Site) -> None:
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
        "The AI service is busy; trying again in 1 s (2 of 4).",
        "The AI service is busy; trying again in 1 s (3 of 4).",
    ]
    assert set(site.api.notices(job)[:-1]) == {"processing"}
    assert len(site.provider.calls_for("third time lucky")) == 3


def test_errors_without_end_fail_the_job_after_four_tries(site: Site) -> None:
    job = site.api.text("never lucky [status 500]")
    failed = site.api.wait(job)
    assert failed["error_message"] == ("The AI service is busy; given up after 4 tries. Please try again later.")
    assert len(site.provider.calls_for("never lucky")) == 4
    assert site.goes_on()
    assert site.api.notices(job)[-2:] == ["processing", "failed"]


REFUSALS = {400: REFUSED, 401: NOT_SET_UP, 403: NOT_SET_UP}


@pytest.mark.parametrize(("status", "sentence"), REFUSALS.items())
def test_a_refusal_of_the_provider_fails_the_job_at_once(site: Site, status: int, sentence: str) -> None:
    job = site.api.text(f"refused [status {status}]")
    assert site.api.wait(job)["error_message"] == sentence
    assert site.api.wait_notice(job, "failed")["message"] == sentence
    assert len(site.provider.calls_for(f"refused [status {status}]")) == 1


@pytest.mark.parametrize("status", [400, 401, 500])
def test_neither_key_nor_the_providers_words_are_shown_or_logged(site: Site, status: int) -> None:
    job = site.api.text(f"secretive [status {status}]")
    site.api.wait(job)
    assert site.goes_on()
    shown = f"{site.api.document(job)} {site.api.updates(job)} {site.log()}"
    assert KEY not in shown
    assert "Incorrect API key" not in shown
    assert "had an error while processing" not in shown


def test_the_wait_that_the_provider_asks_for_is_kept(site: Site) -> None:
    job = site.api.text("patience [status 429 times=1 retry-after=2]")
    site.api.wait_notice(job, "completed")
    first, second = site.provider.calls_for("patience")
    assert second.started_at - first.started_at >= 2  # without the provider's wish it would be half a second at most
    assert "trying again in 2 s" in site.api.updates(job)[1]["message"]


def test_a_job_that_waits_for_its_retry_holds_no_slot(site: Site) -> None:
    waiting = site.api.text("holds no slot [status 429 retry-after=60]")
    poll(lambda: len(site.api.notices(waiting)) == 2, 20)
    for number in range(3):
        assert site.api.wait(site.api.text(f"meanwhile {number}"))["status"] == "completed"
    document = site.api.document(waiting)
    assert (document["status"], document["worker"]["owner"]) == ("processing", None)


# ── limits ───────────────────────────────────────────────────────────────────────────────────────────────────────


@in_each_pool
def test_the_messages_limit_may_be_longer_than_the_workers_own(site: Site) -> None:
    job = site.api.submit("blocking_nap", {"seconds": 0.1}, soft_time_limit=200, time_limit=300)
    assert site.api.wait(job)["worker"]["limits"] == [300, 200]
    assert site.api.status(job) == "completed"


def test_limits_that_no_clock_can_hold_are_ignored(site: Site) -> None:
    job = site.api.text("patient", time_limit=10**400, soft_time_limit=1e12)
    assert site.api.wait(job)["status"] == "completed"
    assert site.goes_on()


SLOW, BLOCKING = "slow [hang]", "blocking_nap"


@pytest.fixture(scope="module")
def too_long(sites: SiteOf) -> Mapping[tuple[str, str], ObjectId]:
    """Jobs over their limits, in all pools at the same time: those that wait for the provider, and those that block."""
    jobs = {}
    for pool in POOLS:
        api = sites(pool).api
        # The worker's own limits would be 20 and 30 s. Within 4 s the provider is called on a busy machine too.
        jobs[pool, SLOW] = api.text(f"{pool} {SLOW}", soft_time_limit=4, time_limit=80)
        jobs[pool, BLOCKING] = api.submit("blocking_nap", {"seconds": 60}, soft_time_limit=0.5, time_limit=80)
    for (pool, _), job in jobs.items():
        sites(pool).api.wait(job)
    return jobs


@in_each_pool
def test_the_messages_own_soft_limit_fails_a_slow_job(too_long: Mapping[tuple[str, str], ObjectId], site: Site) -> None:
    job, pool = too_long[site.pool, SLOW], site.pool
    assert site.api.document(job)["error_message"] == TOOK_TOO_LONG
    assert site.goes_on()
    assert site.api.notices(job) == ["processing", "failed"]
    assert site.provider.calls_for(f"{pool} {SLOW}")[0].outcome == "disconnected"


@in_each_pool
def test_a_handler_that_blocks_the_event_loop_fails_and_the_worker_goes_on(
    too_long: Mapping[tuple[str, str], ObjectId], site: Site
) -> None:
    job = too_long[site.pool, BLOCKING]
    assert site.api.document(job)["error_message"] == TOOK_TOO_LONG
    assert site.goes_on()
    assert site.api.notices(job) == ["processing", "failed"]


def test_the_hard_limit_kills_a_hung_child_and_fails_its_job(site: Site) -> None:
    children = site.worker.children()
    job = site.api.submit("blocking_nap", {"seconds": 30}, soft_time_limit=0.9, time_limit=1)
    assert site.api.wait(job, timeout_s=25)["error_message"] == TOOK_TOO_LONG
    assert site.goes_on()
    assert site.api.notices(job) == ["processing", "failed"]
    assert set(site.worker.children()).isdisjoint(children)
