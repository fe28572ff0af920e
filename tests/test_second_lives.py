"""A job that the API sets back to `pending` and enqueues again has nothing of its former life in its way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from bson import ObjectId
from celery.exceptions import Ignore

import worker
from testbed.provider import Provider
from tests.lab import (
    DELIVERY,
    IMAGE,
    PNG,
    TEXT,
    Ago,
    Notices,
    ago,
    change,
    claim,
    deliver,
    deliver_in_thread,
    first_started,
    insert,
    insert_text,
    new_sweeper,
    queued,
    read,
    table,
)
from tests.site import Site
from worker import Job, Media, Result, Runtime
from workerkit.errors import JobFailed
from workerkit.notes import EXPIRED, REVOKED, RevokedTask
from workerkit.sentences import EXPIRED_UNTRIED, STOPPED


def end_first_life(runtime: Runtime, job_id: ObjectId, **fields: Any) -> Job:
    """Lets the job fail, and puts it back."""
    job = claim(runtime, job_id, owner="former")
    runtime.store.fail(job, "No.")
    change(runtime, job_id, **fields)
    change(runtime, job_id, status="pending")
    return job


# ── the next life ────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "fields",
    ("a moment after it failed", {}),
    ("after all its tries", {"worker__attempt": 4}),
    ("long after its deadline", first_started(86_400)),
    ("while its former lease is live", {"worker__lease_until": Ago(-25)}),
    ("while its former attempt was to wait", {"worker__owner": None, "worker__available_at": Ago(-600)}),
    ("whatever its bookkeeping has become", {"worker": ["odd"]}),
)
def test_a_job_that_is_put_back_completes_by_its_next_message(
    runtime: Runtime, notices: Notices, fields: dict[str, Any]
) -> None:
    job_id = insert_text(runtime, "[say again]")
    end_first_life(runtime, job_id, **fields)
    assert deliver(runtime, job_id)["status"] == "completed"
    document = read(runtime, job_id)
    assert (document["worker"]["attempt"], document["error_message"]) == (1, None)
    assert [notice["status"] for notice in notices.statuses(2)] == ["processing", "completed"]


def test_how_the_last_lives_ended_stays_on_record(runtime: Runtime) -> None:
    job_id = insert_text(runtime, "Hello")
    for number in range(7):
        runtime.store.fail(claim(runtime, job_id, owner=f"owner-{number}"), f"No {number}.")
        change(runtime, job_id, status="pending")
    deliver(runtime, job_id)
    past = read(runtime, job_id)["worker"]["past"]
    assert [life["reason"] for life in past] == [f"No {number}." for number in range(2, 7)]
    assert all(life["attempts"] == 1 and life["ended_at"] for life in past)


def test_a_result_that_a_former_life_kept_is_not_used(runtime: Runtime, provider: Provider) -> None:
    job_id = insert_text(runtime, "[say new]")
    former = end_first_life(runtime, job_id)
    runtime.notes.keep_result(former.kept_name, Result({"generated_text": "old"}))
    change(runtime, job_id, worker__attempt=2)
    deliver(runtime, job_id)
    assert read(runtime, job_id)["output_data"]["generated_text"] == "new"
    assert len(provider.calls) == 1


def test_a_former_lifes_last_notice_is_not_told_of_the_next_one(runtime: Runtime, notices: Notices) -> None:
    job_id = insert(runtime)
    end_first_life(runtime, job_id, worker__unnotified=ago(3600))
    assert new_sweeper(runtime).sweep() == []
    claim(runtime, job_id)
    assert new_sweeper(runtime).sweep() == []
    runtime.notifier.publish_status({"_id": job_id}, worker.Status.PROCESSING, "the only one")
    assert [notice["message"] for notice in notices.statuses(1)] == ["the only one"]


def test_a_notice_that_was_told_of_a_former_end_doesnt_take_the_next_one_out_of_the_outbox(runtime: Runtime) -> None:
    job_id = insert(runtime)
    former = end_first_life(runtime, job_id)
    runtime.store.fail(claim(runtime, job_id), "Again no.")
    runtime.keeper.note_published(job_id, former.owner)
    runtime.keeper.tick()
    assert len(list(runtime.store.find_unnotified(0))) == 1


def test_a_former_attempt_stops_as_soon_as_the_next_life_begins(runtime: Runtime, provider: Provider) -> None:
    job_id = insert_text(runtime, "[hang]")
    former = deliver_in_thread(runtime, job_id, provider)
    runtime.keeper.tick()  # renews, and not again for a third of a lease
    runtime.notes.note_cancelled([runtime.settings.celery_queue_name], [])
    change(runtime, job_id, status="pending", input_data={"prompt": "[say hello]"})
    deliver(runtime, job_id)
    runtime.keeper.tick()
    with pytest.raises(Ignore):
        former.result(30)


def stored_picture(runtime: Runtime, job: Job) -> str:
    result = Result({}, Media(PNG, "png", "image_url"))
    assert worker.complete(runtime, job, result)
    return f"{job.id}-{job.owner}.png"


@table("prompt, files_of", ("the next picture replaces it", "A city", 1), ("none replaces it", "[status 400]", 1))
def test_the_file_of_a_former_life_stays_until_it_is_replaced(runtime: Runtime, prompt: str, files_of: int) -> None:
    job_id = insert(runtime, job_type=IMAGE, input_data={"prompt": prompt})
    former = stored_picture(runtime, claim(runtime, job_id, owner="0123456789abcdef"))
    change(runtime, job_id, status="pending")
    try:
        deliver(runtime, job_id)
    except JobFailed:
        assert list(runtime.artifacts.names()) == [former]
    else:
        assert former not in list(runtime.artifacts.names())
    assert len(list(runtime.artifacts.names())) == files_of
    assert next(iter(runtime.artifacts.names())) in read(runtime, job_id)["artifact_url"]


# ── messages of the former life ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("is_running", [False, True], ids=["while the next one waits", "while the next one runs"])
@table("why", ("is revoked", REVOKED), ("expires", EXPIRED))
def test_a_former_message_that_ends_changes_nothing(runtime: Runtime, why: str, is_running: bool) -> None:
    job_id = insert(runtime)
    change(runtime, job_id, worker=None)
    end_first_life(runtime, job_id, worker__task_id="former task")
    if is_running:
        runtime.store.claim(job_id, "owner-2", replace(DELIVERY, task_id="next task"))
    before = read(runtime, job_id)
    runtime.notes.note_revoked(RevokedTask(str(job_id), "former task", why))
    assert new_sweeper(runtime).sweep() == []
    assert (read(runtime, job_id), runtime.notes.revoked()) == (before, [])


def test_a_former_message_that_is_delivered_again_while_the_next_one_runs_is_dropped(runtime: Runtime) -> None:
    job_id = insert(runtime)
    end_first_life(runtime, job_id)
    claim(runtime, job_id)
    before = read(runtime, job_id)
    with pytest.raises(Ignore):
        deliver(runtime, job_id)
    assert read(runtime, job_id) == before


# ── messages of this life ────────────────────────────────────────────────────────────────────────────────────────


@table("why, sentence", ("revoked", REVOKED, STOPPED), ("expired", EXPIRED, EXPIRED_UNTRIED))
def test_a_message_that_ends_before_its_job_began_fails_it_with_a_sentence_of_its_own(
    runtime: Runtime, why: str, sentence: str
) -> None:
    job_id = insert(runtime)
    runtime.notes.note_revoked(RevokedTask(str(job_id), "task", why))
    new_sweeper(runtime).sweep()
    assert read(runtime, job_id)["error_message"] == sentence


@table("why, status", ("revoked", REVOKED, "failed"), ("expired", EXPIRED, "processing"))
def test_a_running_job_ends_by_a_revoke_of_its_task_and_not_by_an_expiry(
    runtime: Runtime, why: str, status: str
) -> None:
    job_id = insert(runtime)
    runtime.store.claim(job_id, "owner-1", replace(DELIVERY, task_id="task"))
    runtime.notes.note_revoked(RevokedTask(str(job_id), "task", why))
    new_sweeper(runtime).sweep()
    assert read(runtime, job_id)["status"] == status


def test_a_rescued_job_can_still_be_revoked_by_the_apis_task_id(runtime: Runtime) -> None:
    job_id = insert(runtime)
    runtime.store.claim(job_id, "owner-1", replace(DELIVERY, task_id="the API's"))
    change(runtime, job_id, worker__lease_until=ago(5))
    new_sweeper(runtime).sweep()
    assert read(runtime, job_id)["worker"]["task_id"] == "the API's"
    [message] = queued(runtime)
    assert message["root_id"] == "the API's"
    assert message["id"] != "the API's"


# ── with real processes ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_failed_job_is_tried_again_as_often_as_the_api_likes(site: Site) -> None:
    job = site.api.text("again and again [status 400]")
    for number in range(3):
        assert site.api.wait(job)["status"] == "failed"
        site.wait_call("again and again", number + 1)
        site.api.jobs.update_one({"_id": job}, {"$set": {"status": "pending"}})
        site.api.enqueue(job)
    assert site.api.wait(job)["status"] == "failed"
    assert site.goes_on()
    assert site.api.notices(job) == ["processing", "failed"] * 4
    assert len(site.api.document(job)["worker"]["past"]) == 3


def test_a_message_that_expires_behind_a_backlog_fails_its_job_with_a_sentence_of_its_own(site: Site) -> None:
    site.api.text("keeps the slot [delay 2]")
    site.wait_call("keeps the slot")
    job = site.api.insert(TEXT, {"prompt": "expires"})
    site.api.enqueue(job, expires=0.5)
    assert site.api.wait(job)["error_message"] == EXPIRED_UNTRIED
    site.api.wait_notice(job, "failed")
    assert not site.provider.calls_for("expires")
