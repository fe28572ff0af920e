"""A store that refuses for good: MongoDB by a validator, a right or a size, and the artifact store. No slot is held."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pymongo
import pytest
from bson import ObjectId, encode
from celery.exceptions import Ignore, Retry

import worker
from testbed.provider import Provider
from testbed.servers import DATABASE, MongoServer
from tests.lab import (
    IMAGE,
    SetHandler,
    adopt,
    ago,
    bare_settings,
    change,
    claim,
    deliver,
    insert,
    insert_text,
    kept,
    new_sweeper,
    queued,
    raising,
    read,
    stale,
    table,
)
from worker import Runtime
from worker_commands.check import check_mongodb
from workerkit.errors import ArtifactsUnavailable, DropJob, JobFailed, StoreUnavailable
from workerkit.sentences import CANT_BE_STORED, NOT_SET_UP, TOO_LARGE_TO_RUN

LIMIT_BYTES = 16 * 2**20
ENDS = ["completed", "failed"]


@pytest.fixture
def refuse(runtime: Runtime) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Lets MongoDB refuse each write that leaves a document like this."""
    database = runtime.database

    def set_validator(refused: dict[str, Any] | None) -> None:
        database.command("collMod", "jobs", validator={"$nor": [refused]} if refused else {})

    database["jobs"].delete_one({"_id": "makes the collection"})
    if "jobs" not in database.list_collection_names():
        database.create_collection("jobs")
    yield set_validator
    set_validator(None)


@pytest.fixture(autouse=True)
def short_waits(runtime: Runtime) -> None:
    runtime.poll_store_s = 0.05


Refuse = Callable[[dict[str, Any]], None]


def failure(runtime: Runtime, job_id: ObjectId) -> str:
    """Delivers the job's message, and returns the sentence with which the task failed."""
    with pytest.raises(JobFailed) as failed:
        deliver(runtime, job_id)
    return str(failed.value)


# ── MongoDB ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_result_that_a_validator_refuses_fails_the_job_and_the_operator_reads_why(
    runtime: Runtime, refuse: Refuse, provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    refuse({"output_data.generated_text": {"$exists": True}})
    job_id = insert_text(runtime, "planted prompt")
    assert failure(runtime, job_id) == CANT_BE_STORED
    document = read(runtime, job_id)
    assert (document["status"], document["error_message"]) == ("failed", CANT_BE_STORED)
    assert "unnotified" in document["worker"]
    [line] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "121: a validator of the collection is against it" in line.getMessage()
    assert "planted" not in caplog.text
    assert len(provider.calls) == 1


@table(
    "refused",
    ("our bookkeeping", {"worker": {"$exists": True}}),
    ("a field of it", {"worker.pid": {"$exists": True}}),
    ("the status processing", {"status": "processing"}),
)
def test_a_claim_that_a_validator_refuses_fails_the_job_untried(
    runtime: Runtime, refuse: Refuse, provider: Provider, caplog: pytest.LogCaptureFixture, refused: dict[str, Any]
) -> None:
    refuse(refused)
    job_id = insert(runtime)
    assert failure(runtime, job_id) == NOT_SET_UP
    assert (read(runtime, job_id)["status"], read(runtime, job_id)["error_message"]) == ("failed", NOT_SET_UP)
    assert "can't be claimed: MongoDB refuses it: OperationFailure 121" in caplog.text
    assert provider.calls == []


def test_a_release_that_a_validator_refuses_fails_the_job(
    runtime: Runtime, refuse: Refuse, handler: SetHandler
) -> None:
    refuse({"worker.rescue_at": {"$exists": True}})
    handler(raising(worker.RetryJob("busy")))
    job_id = insert(runtime)
    assert failure(runtime, job_id) == NOT_SET_UP
    assert read(runtime, job_id)["status"] == "failed"


@table(
    "refused, left",
    ("no end of a job", {"status": {"$in": ENDS}}, "processing"),
    ("nothing but pending", {"status": {"$ne": "pending"}}, "pending"),
)
def test_where_no_end_can_be_written_the_message_is_acknowledged_and_the_operator_reads_why(
    runtime: Runtime, refuse: Refuse, caplog: pytest.LogCaptureFixture, refused: dict[str, Any], left: str
) -> None:
    refuse(refused)
    job_id = insert(runtime)
    failure(runtime, job_id)
    assert read(runtime, job_id)["status"] == left
    assert f"MongoDB takes no end of a job: job={job_id}" in caplog.text
    assert {record.levelno for record in caplog.records if "takes no end" in record.getMessage()} == {logging.ERROR}


def test_a_sweep_ends_what_it_cant_release_and_rescues_the_others(runtime: Runtime, refuse: Refuse) -> None:
    jobs = [claim(runtime, owner=f"owner-{number}") for number in range(5)]
    for number, job in enumerate(jobs):
        change(runtime, job.id, worker__lease_until=ago(5), user_id="odd" if number == 2 else "user-1")
    refuse({"user_id": "odd", "worker.rescues": {"$exists": True}})
    assert len(new_sweeper(runtime).sweep()) == 5
    assert [read(runtime, job.id)["status"] for job in jobs] == ["processing"] * 2 + ["failed"] + ["processing"] * 2
    assert len(queued(runtime)) == 4


def test_a_sweep_leaves_what_it_can_neither_release_nor_end_and_rescues_the_others(
    runtime: Runtime, refuse: Refuse, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = [claim(runtime, owner=f"owner-{number}") for number in range(3)]
    for job in jobs:
        change(runtime, job.id, worker__lease_until=ago(5))
    refuse({"_id": jobs[0].id, "$or": [{"worker.rescues": {"$exists": True}}, {"status": {"$in": ENDS}}]})
    sweeper = new_sweeper(runtime)
    assert [len(sweeper.sweep()) for _ in range(3)] == [2, 0, 0]
    assert stale(runtime) == [jobs[0].id]
    assert caplog.text.count("MongoDB takes no end of a job") == 1


def test_the_lease_of_one_job_that_cant_be_renewed_costs_no_other_its_lease(runtime: Runtime, refuse: Refuse) -> None:
    jobs = [claim(runtime, owner=f"owner-{number}") for number in range(4)]
    for job in jobs:
        change(runtime, job.id, worker__lease_until=ago(5))
    refuse({"_id": jobs[1].id})
    assert runtime.store.renew_leases(jobs) == [jobs[1]]
    assert stale(runtime) == [jobs[1].id]


def test_an_attempt_whose_lease_cant_be_renewed_stops_and_writes_nothing(runtime: Runtime, refuse: Refuse) -> None:
    runtime.preparation.has_indexes = True  # while one is made, a validator can't be set
    attempt = kept(runtime)
    change(runtime, attempt.job.id, worker__lease_until=ago(5))
    refuse({"_id": attempt.job.id})
    runtime.keeper.tick()
    assert isinstance(attempt.reason, DropJob)


def test_a_notice_that_cant_be_marked_costs_no_other_its_mark(runtime: Runtime, refuse: Refuse) -> None:
    jobs = [claim(runtime, owner=f"owner-{number}") for number in range(3)]
    for job in jobs:
        runtime.store.fail(job, "No.")
    refuse({"_id": jobs[0].id})
    runtime.store.mark_notified([(job.id, job.owner) for job in jobs])
    assert [document["_id"] for document in runtime.store.find_unnotified(0)] == [jobs[0].id]


def test_an_end_whose_mark_is_refused_is_published_again_once_and_holds_up_no_other(
    runtime: Runtime, refuse: Refuse
) -> None:
    jobs = [claim(runtime, owner=f"owner-{number}") for number in range(2)]
    for job in jobs:
        runtime.store.fail(job, "No.")
        change(runtime, job.id, worker__unnotified=ago(60))
    refuse({"_id": jobs[0].id})
    assert [len(runtime.sweeper.sweep()) for _ in range(2)] == [2, 0]


@pytest.mark.servers
def test_a_user_without_the_right_to_write_holds_no_slot(tmp_path: Path, fake_redis_url: str) -> None:
    with MongoServer(auth=True) as server:
        with pymongo.MongoClient[Any](server.root_url) as admin:
            roles = [{"role": "read", "db": DATABASE}]
            admin[DATABASE].command("createUser", "reader", pwd="reader", roles=roles)
            job_id = admin[DATABASE]["jobs"].insert_one({"status": "pending", "input_data": {}}).inserted_id
        url = f"mongodb://reader:reader@{server.address}/{DATABASE}?authSource={DATABASE}"
        runtime = adopt(Runtime(bare_settings(mongodb_url=url, redis_url=fake_redis_url)), tmp_path)
        runtime.poll_store_s = 0.05
        assert failure(runtime, job_id) == NOT_SET_UP
        runtime.close()


# ── documents near MongoDB's limit ───────────────────────────────────────────────────────────────────────────────


def insert_large(runtime: Runtime, room: int, name: str = "input_data", **fields: Any) -> ObjectId:
    """Inserts a job whose document leaves so many bytes of MongoDB's 16 MB, since one of its fields is large."""
    small = insert(runtime, **{**fields, name: {"prompt": ""}})
    size = len(encode(read(runtime, small)))
    runtime.database["jobs"].delete_one({"_id": small})
    return insert(runtime, **{**fields, name: {"prompt": "x" * (LIMIT_BYTES - size - room)}})


@table("room", ("no room at all", 0), ("none for our bookkeeping", 300), ("none for a sentence", 520))
def test_a_pending_document_without_room_ends_with_a_sentence(runtime: Runtime, room: int) -> None:
    job_id = insert_large(runtime, room)
    sentence = failure(runtime, job_id)
    document = read(runtime, job_id)
    assert (document["status"], document["error_message"]) == ("failed", sentence)
    assert sentence == TOO_LARGE_TO_RUN or "prompt" in sentence
    assert document["completed_at"] is not None


def test_a_document_without_room_that_no_attempt_runs_is_ended_by_a_sweep(runtime: Runtime) -> None:
    large = insert_large(runtime, 10, status="processing", started_at=ago(3600))
    other = claim(runtime)
    change(runtime, other.id, worker__lease_until=ago(5))
    assert len(new_sweeper(runtime).sweep()) == 2
    document = read(runtime, large)
    assert (document["status"], document["error_message"]) == ("failed", TOO_LARGE_TO_RUN)
    assert document["input_data"] == {}
    assert len(queued(runtime)) == 1


def test_the_larger_of_input_and_output_is_let_go(runtime: Runtime) -> None:
    job_id = insert_large(runtime, 10, "output_data", input_data={"prompt": "short"})
    failure(runtime, job_id)
    document = read(runtime, job_id)
    assert (document["status"], document["output_data"]) == ("failed", None)
    assert document["input_data"] == {"prompt": "short"}


# ── the artifact store ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder(runtime: Runtime, tmp_path: Path) -> Path:
    """A place for files where nothing can be written: its name is that of a file."""
    runtime.settings.artifact_url = f"file://{tmp_path}/files"
    (tmp_path / "files").write_text("no folder")
    return tmp_path / "files"


def insert_picture(runtime: Runtime) -> ObjectId:
    return insert(runtime, job_type=IMAGE, input_data={"prompt": "A city"})


def release_now(runtime: Runtime, job_id: ObjectId) -> None:
    change(runtime, job_id, worker__available_at=ago(5))


def test_a_file_that_cant_be_stored_waits_without_a_slot_and_without_another_generation(
    runtime: Runtime, folder: Path, provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = insert_picture(runtime)
    with pytest.raises(Retry):
        deliver(runtime, job_id)
    document = read(runtime, job_id)
    assert (document["status"], document["worker"]["owner"]) == ("processing", None)
    assert "artifact store: FileExistsError File exists" in caplog.text
    folder.unlink()
    release_now(runtime, job_id)
    assert deliver(runtime, job_id)["status"] == "completed"
    assert len(provider.calls) == 1


def test_a_file_that_can_never_be_stored_fails_the_job_after_a_few_tries(
    runtime: Runtime, folder: Path, provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = insert_picture(runtime)
    for _ in range(3):
        with pytest.raises(Retry):
            deliver(runtime, job_id)
        release_now(runtime, job_id)
    sentence = failure(runtime, job_id)
    assert sentence == "The result can't be saved at the moment; given up after 4 tries. Please try again later."
    assert read(runtime, job_id)["error_message"] == sentence
    assert len(provider.calls) == 1
    [line] = [record for record in caplog.records if " failed: " in record.getMessage()]
    assert (line.levelno, "File exists" in line.getMessage()) == (logging.ERROR, True)
    assert not list(runtime.redis.scan_iter(f"result:*:{job_id}:*"))


def test_a_kept_result_beyond_the_deadline_is_tried_once_more(runtime: Runtime, folder: Path) -> None:
    job_id = insert_picture(runtime)
    with pytest.raises(Retry):
        deliver(runtime, job_id)
    change(runtime, job_id, worker__available_at=ago(3600), worker__attempt=4)
    assert "given up after 5 tries" in failure(runtime, job_id)
    assert read(runtime, job_id)["status"] == "failed"


def test_a_completed_job_keeps_its_file_though_a_second_try_to_store_it_failed(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, complete = insert_picture(runtime), runtime.store.complete

    def lose_the_reply(*arguments: Any) -> bool:
        complete(*arguments)
        monkeypatch.setattr(runtime.artifacts, "put", fail)
        raise StoreUnavailable("the reply is lost")

    def fail(*_: object) -> None:
        raise ArtifactsUnavailable("full")

    monkeypatch.setattr(runtime.store, "complete", lose_the_reply)
    with pytest.raises(Ignore):
        deliver(runtime, job_id)
    assert read(runtime, job_id)["artifact_url"].endswith(next(iter(runtime.artifacts.names())))


# ── what `check` says ────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "refused, seen",
    ("nothing", {"status": "archived"}, "a job claimed, completed, failed, released; deleted"),
    ("our bookkeeping", {"worker": {"$exists": True}}, "121: a validator of the collection is against it"),
    ("a result", {"output_data.generated_text": {"$exists": True}}, "121: a validator of the collection is against it"),
    (
        "a failure",
        {"status": "failed", "worker.unnotified": {"$exists": True}},
        "only without the worker's bookkeeping",
    ),
)
def test_check_writes_what_the_worker_writes(
    runtime: Runtime, refuse: Refuse, refused: dict[str, Any], seen: str
) -> None:
    refuse(refused)
    [found] = [finding for finding in check_mongodb(runtime) if finding.what == "MongoDB documents"]
    assert seen in found.seen
    assert found.is_fault is (seen != "a job claimed, completed, failed, released; deleted")
    assert runtime.database["jobs"].count_documents({}) == 0
