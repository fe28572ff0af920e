"""Documents with anything in them, some near 16 MB: each one ends or runs, and none keeps the others from their rescue.

Real workers on a real MongoDB meet them all at once: every field of the bookkeeping with values of the wrong type or
without sense, in jobs that wait, run, or were left by a worker that died.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import bson
import pymongo
import pytest
from bson import Code, DatetimeMS, MaxKey, MinKey, ObjectId, Regex, Timestamp
from bson.raw_bson import RawBSONDocument

from testbed.api import TERMINAL
from testbed.processes import poll
from tests.lab import ago, change, claim, deliver, insert, new_sweeper, queued, read, stale, table
from tests.place import PATIENCE_S, OpenPlace, Outcomes, Place, Scenario, Step, side_by_side
from tests.site import lease
from worker import NODE, Runtime
from workerkit.mongodb import TOLERANT

# The search for lost messages waits a minute in earnest.
HURRY = """
import worker
worker.LostMessages.overdue_s = 1.0
"""
THE_YEAR_3000 = datetime(3000, 1, 1)
ODD_VALUES: list[Any] = [
    None,
    "text",
    "",
    [],
    ["x"],
    {},
    {"x": 1},
    7,
    -1,
    2**40,
    1.5,
    float("nan"),
    True,
    THE_YEAR_3000,
]
ODD_VALUES += [DatetimeMS(10**15), DatetimeMS(-(10**15)), MinKey(), MaxKey(), Regex("x"), Code("x"), Timestamp(1, 1)]
FIELDS = ["owner", "node", "pid", "queue", "task_id", "lease_until", "available_at", "rescue_at", "rescues", "deadline"]
FIELDS += ["attempt", "first_started_at", "limits", "unnotified", "past", "priority", "released_by"]
NOT_UTF8 = b"\xff\xfe"


def expired(**fields: Any) -> dict[str, Any]:
    """The bookkeeping of a job whose worker died a moment ago."""
    now = datetime.now(UTC)
    times = {"lease_until": now - timedelta(seconds=1), "first_started_at": now - timedelta(seconds=20)}
    return {**lease(**times), **fields}


def released(**fields: Any) -> dict[str, Any]:
    return expired(**{"owner": None, "available_at": ago(5), "rescue_at": ago(5), **fields})


def insert_odd(place: Place, status: str, own: Any, **fields: Any) -> ObjectId:
    """Inserts a job without a message. A job that has started did so when its bookkeeping says so, or long ago."""
    started_at = own.get("first_started_at") if isinstance(own, dict) else None
    started = {"started_at": started_at if isinstance(started_at, datetime) else ago(3600)}
    document = {"worker": own, **(started if status == "processing" else {}), **fields}
    return place.insert(f"odd {ObjectId()}", Step("[tokens 1]"), status=status, **document)


def wait_all_ended(place: Place, jobs: list[ObjectId]) -> dict[str, list[Any]]:
    """Waits until all have ended, and returns their sentences by status."""

    def find() -> list[dict[str, Any]]:
        ended = list(place.api.jobs.find({"_id": {"$in": jobs}, "status": {"$in": list(TERMINAL)}}))
        return ended if len(ended) == len(jobs) else []

    ended = poll(find, PATIENCE_S, description="the end of all odd jobs")
    return {status: [job["error_message"] for job in ended if job["status"] == status] for status in TERMINAL}


def every_field_with_every_value(place: Place) -> None:
    place.add_module(HURRY)
    place.start_worker(WORKER_POOL="threads", WORKER_CONCURRENCY="8", ORPHAN_AFTER="2")
    jobs: list[ObjectId] = []
    for name in FIELDS:
        for value in ODD_VALUES:
            state = ("processing", expired) if len(jobs) % 2 else ("processing", released)
            jobs.append(insert_odd(place, state[0], state[1](**{name: value})))
        jobs.append(insert_odd(place, "pending", released(**{name: ODD_VALUES[len(jobs) % len(ODD_VALUES)]})))
    jobs += [insert_odd(place, status, value) for value in ODD_VALUES for status in ("pending", "processing")]
    honest = insert_odd(place, "processing", expired())
    place.api.wait(honest, timeout_s=PATIENCE_S)
    ended = wait_all_ended(place, jobs)
    assert all(isinstance(sentence, str) and sentence for sentence in ended["failed"])
    assert len(ended["completed"]) > len(jobs) / 2


def odd_times_and_texts(place: Place) -> None:
    """Dates beyond the year 9999, and text that isn't UTF-8, in every field that the API writes."""
    place.add_module(HURRY)
    place.start_worker(ORPHAN_AFTER="2")
    late: dict[str, Any] = {
        name: DatetimeMS(10**15) for name in ("created_at", "updated_at", "started_at", "completed_at")
    }
    jobs = [insert_odd(place, status, None, **late) for status in ("pending", "processing")]
    for status, own in (("pending", None), ("processing", None), ("processing", expired()), ("pending", released())):
        for name in ("user_id", "session_id", "job_type", "prompt"):
            jobs.append(insert_not_utf8(place, name, status, own))
    honest = insert_odd(place, "processing", expired())
    place.api.wait(honest, timeout_s=PATIENCE_S)
    tolerant: Any = place.api.jobs.with_options(TOLERANT)
    poll(lambda: not tolerant.count_documents({"status": {"$in": ["pending", "processing"]}}), PATIENCE_S)
    assert tolerant.count_documents({"_id": {"$in": jobs}}) == len(jobs)


def insert_not_utf8(place: Place, name: str, status: str, own: Any) -> ObjectId:
    job_id, marked = ObjectId(), "~~~~"
    texts = {"user_id": "user", "session_id": "session", "job_type": "text_generation", "prompt": "Hello"}
    texts[name] += marked
    document = {"_id": job_id, "status": status, "input_data": {"prompt": texts.pop("prompt")}, **texts}
    document |= {"created_at": ago(3600), "updated_at": ago(3600), "worker": own}
    document |= {"started_at": own["first_started_at"] if own and status == "processing" else ago(3600)}
    raw = bson.encode(document).replace(marked.encode(), NOT_UTF8 * 2)
    place.api.jobs.insert_one(RawBSONDocument(raw))
    return job_id


SCENARIOS: dict[str, Scenario] = {"values": every_field_with_every_value, "texts": odd_times_and_texts}


@pytest.fixture(scope="module", autouse=True)
def outcomes(open_place: OpenPlace) -> Iterator[Outcomes]:
    with side_by_side(open_place, SCENARIOS) as outcomes:
        yield outcomes


# ── what a sweep reads ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_sweep_reads_neither_inputs_nor_outputs(runtime: Runtime) -> None:
    large = {"input_data": {"prompt": "x" * 2_000_000}, "output_data": {"text": "x" * 2_000_000}}
    for _ in range(4):
        insert(runtime, **large)
        for job in [claim(runtime, insert(runtime, **large)) for _ in range(2)]:
            change(runtime, job.id, worker__lease_until=ago(-30))
        ended = insert(runtime, status="failed", **large)
        change(runtime, ended, worker={"owner": "x", "attempt": 1, "unnotified": ago(60)})
        change(runtime, claim(runtime, insert(runtime, **large)).id, worker__lease_until=ago(5))
    before, sweeper = bytes_out(runtime), new_sweeper(runtime)
    sweeper.budget_s = 60.0  # on a busy machine one sweep would leave the rest to the next
    assert len(sweeper.sweep()) == 8
    runtime.sweeper.release_dead_siblings()
    assert bytes_out(runtime) - before < 1_000_000, "half of one input; other workers of these tests get the rest"


def bytes_out(runtime: Runtime) -> int:
    """The bytes that MongoDB has sent to all its clients."""
    with pymongo.MongoClient[Any](runtime.settings.mongodb_url.get_secret_value()) as client:
        return int(client.admin.command("serverStatus")["network"]["bytesOut"])


@table("odd_id", ("text", "text"), ("a document", {"a": 1}))
def test_a_job_whose_id_is_odd_ends_at_its_deadline_and_others_are_rescued(runtime: Runtime, odd_id: object) -> None:
    jobs = runtime.database["jobs"]
    jobs.insert_one({"_id": odd_id, "status": "processing", "started_at": ago(3600)})
    others = [insert(runtime, status="processing", started_at=ago(3600)) for _ in range(2)]
    assert len(new_sweeper(runtime).sweep()) == 3
    assert [read(runtime, job_id)["worker"]["rescues"] for job_id in others] == [1, 1]
    times = {"started_at": ago(3600), "worker.first_started_at": ago(3600), "worker.rescue_at": ago(5)}
    jobs.update_one({"_id": odd_id}, {"$set": {**times, "started_at": times["worker.first_started_at"]}})
    assert len(new_sweeper(runtime).sweep()) == 1
    assert (jobs.find_one({"_id": odd_id}) or {})["status"] == "failed"


def undecodable(document: dict[str, Any]) -> RawBSONDocument:
    """A document with binary data of an old kind whose length is wrong: MongoDB stores it, pymongo can't read it."""
    right, wrong = (b"\x08\x00\x00\x00\x02" + size + b"\x00\x00\x00abcd" for size in (b"\x04", b"\x63"))
    raw = bson.encode(document)
    assert right in raw
    return RawBSONDocument(raw.replace(right, wrong))


def test_a_document_that_cant_be_decoded_keeps_no_other_from_its_rescue_or_its_last_notice(runtime: Runtime) -> None:
    odd = {"_id": ObjectId("0" * 24), "created_at": bson.Binary(b"abcd", 2), "user_id": bson.Binary(b"abcd", 2)}
    own = {"owner": "x", "node": NODE, "attempt": 1, "unnotified": ago(60)}
    runtime.database["jobs"].insert_one(undecodable({**odd, "status": "processing", "worker": own}))
    runtime.database["jobs"].insert_one(undecodable({**odd, "_id": ObjectId(), "status": "failed", "worker": own}))
    insert(runtime, status="processing", started_at=ago(3600))
    ended = insert(runtime, status="failed")
    change(runtime, ended, worker={"owner": "x", "attempt": 1, "unnotified": ago(60)})
    assert len(new_sweeper(runtime).sweep()) == 2
    assert runtime.sweeper.release_dead_siblings() == []


@table("status", ("it waits", "pending"), ("it was left", "processing"))
def test_bookkeeping_that_cant_be_decoded_is_replaced_and_others_are_rescued(runtime: Runtime, status: str) -> None:
    document: dict[str, Any] = {
        "_id": ObjectId(),
        "status": status,
        "job_type": "text_generation",
        "input_data": {"prompt": "Hello"},
    }
    odd = {**document, "started_at": ago(3600), "worker": {"x": bson.Binary(b"abcd", 2)}}
    runtime.database["jobs"].insert_one(undecodable(odd))
    others = [insert(runtime, status="processing", started_at=ago(3600)) for _ in range(2)]
    assert len(new_sweeper(runtime).sweep()) == (2 if status == "pending" else 3)
    assert [read(runtime, job_id)["worker"]["rescues"] for job_id in others] == [1, 1]
    if status == "pending":
        deliver(runtime, document["_id"])
    assert set(read(runtime, document["_id"])["worker"]) >= {"attempt", "first_started_at"}


# ── one after the other ──────────────────────────────────────────────────────────────────────────────────────────


def test_more_stale_jobs_than_a_batch_holds_are_put_back_in_one_sweep(runtime: Runtime) -> None:
    jobs = [{"status": "processing", "started_at": ago(3600), "user_id": "u"} for _ in range(350)]
    runtime.database["jobs"].insert_many(jobs)
    sweeper = new_sweeper(runtime)
    sweeper.budget_s = 60.0
    assert len(sweeper.sweep()) == 350
    assert len(queued(runtime)) == 350
    assert stale(runtime) == []


def test_a_sweep_whose_time_is_over_goes_on_behind_the_last_job_it_saw(runtime: Runtime) -> None:
    jobs = [{"status": "processing", "started_at": ago(3600), "user_id": "u"} for _ in range(250)]
    runtime.database["jobs"].insert_many(jobs)
    sweeper = new_sweeper(runtime)
    sweeper.budget_s, sweeper.batch = 0.0, 100
    assert [len(sweeper.sweep()) for _ in range(3)] == [100, 100, 50]


def test_an_odd_pending_job_is_claimed_with_fresh_bookkeeping(runtime: Runtime) -> None:
    for value in ODD_VALUES:
        job_id = insert(runtime, worker=value)
        assert deliver(runtime, job_id)["status"] == "completed"
        assert read(runtime, job_id)["worker"]["attempt"] == 1


@table("status, ends", ("it waits", "pending", "completed"), ("it was left", "processing", "processing"))
@pytest.mark.parametrize("own", ["~~~~", ["~~~~"]], ids=["text", "a list"])
def test_bookkeeping_that_is_text_and_not_utf8_is_replaced(
    runtime: Runtime, status: str, ends: str, own: object
) -> None:
    document = {"_id": ObjectId(), "status": status, "job_type": "text_generation", "input_data": {"prompt": "Hello"}}
    raw = bson.encode({**document, "started_at": ago(3600), "worker": own}).replace(b"~~~~", NOT_UTF8 * 2)
    runtime.database["jobs"].insert_one(RawBSONDocument(raw))
    if status == "pending":
        deliver(runtime, document["_id"])
    else:
        assert len(new_sweeper(runtime).sweep()) == 1
    assert read(runtime, ObjectId(str(document["_id"])))["status"] == ends


# ── with real processes ──────────────────────────────────────────────────────────────────────────────────────────


def test_every_odd_value_in_every_field_of_the_bookkeeping_ends_or_runs(outcomes: Outcomes) -> None:
    outcomes["values"].result()


def test_dates_beyond_the_year_9999_and_text_that_isnt_utf8_end_or_run(outcomes: Outcomes) -> None:
    outcomes["texts"].result()
