"""Faults that last, met by real workers: a MongoDB that refuses a write for good, no room in a document, and an
artifact store that takes no file. Each job ends with a sentence as soon as it can, and none holds a slot.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import bson
import pytest
from pymongo.errors import OperationFailure

from testbed.processes import poll
from tests.lab import IMAGE, ago
from tests.place import PATIENCE_S, OpenPlace, Outcomes, Place, Scenario, Step, assert_ended_once, side_by_side
from tests.site import lease
from workerkit.sentences import CANT_BE_STORED, NOT_SET_UP, TOO_LARGE_TO_RUN

LIMIT_BYTES = 16 * 2**20
# The search for lost messages waits a minute in earnest, and an S3 that hangs is given up after half a minute.
HURRY = """
import worker
from workerkit.artifacts import FsspecArtifacts
worker.LostMessages.overdue_s = 1.0
FsspecArtifacts.patience_s = 1.0
"""
S3 = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "S3_REGION": "us-east-1", "ARTIFACT_BASE_URL": "/files"}


def start(place: Place, **settings: str) -> None:
    place.add_module(HURRY)
    place.start_worker(**settings)
    place.wait_ready()


# ── MongoDB ──────────────────────────────────────────────────────────────────────────────────────────────────────


def refuse(place: Place, *conditions: dict[str, Any]) -> None:
    """Lets MongoDB refuse each write that leaves a job like one of these."""

    def is_set() -> bool:
        try:
            place.api.database.command("collMod", "jobs", validator={"$nor": list(conditions)} if conditions else {})
        except OperationFailure:  # the workers make their indexes
            return False
        return True

    poll(is_set, PATIENCE_S)


def a_validator_refuses(place: Place) -> None:
    steps = {
        "its result": Step("[tokens 1]", ends="failed"),
        "its claim": Step("[tokens 1]", ends="failed", answers=0),
        "everything": Step("[tokens 1]"),
    }
    jobs = {name: place.insert(name, step) for name, step in steps.items()}
    start(place, WORKER_CONCURRENCY="2")
    refuse(
        place,
        {"_id": jobs["its result"], "status": "completed"},
        {"_id": jobs["its claim"], "status": "processing"},
        {"_id": jobs["everything"], "status": {"$ne": "pending"}},
    )
    for job in jobs.values():
        place.send(job)
    everything = {"everything": steps.pop("everything")}
    place.wait_ends(steps)
    sentences = [place.document(name)["error_message"] for name in steps]
    assert sentences == [CANT_BE_STORED, NOT_SET_UP]
    place.wait_log("MongoDB takes no end of a job")
    assert place.goes_on(slots=2)
    assert "a validator of the collection is against it" in place.log()
    assert place.document("everything")["status"] == "pending"
    refuse(place)
    place.wait_ends(everything)
    for name, step in {**steps, **everything}.items():
        assert_ended_once(place, name, step)


def fill(place: Place, name: str, room: int) -> None:
    """Lets a job's document grow until so many bytes are left. It is inserted anew, as an update takes more memory."""
    document = place.document(name)
    document["input_data"]["filling"] = ""
    document["input_data"]["filling"] = "x" * (LIMIT_BYTES - room - len(bson.encode(document)))
    place.api.jobs.delete_one({"_id": document["_id"]})
    place.api.jobs.insert_one(document)


def left_behind() -> dict[str, Any]:
    """What a worker that died a moment ago left in the document of its job."""
    own = lease(lease_until=ago(5))
    return {"status": "processing", "started_at": own["first_started_at"], "worker": own}


def a_document_has_no_room(place: Place) -> None:
    untried = Step("[tokens 1]", ends="failed", answers=0)
    steps = {f"waits {room}": untried for room in (20, 100, 300)}
    steps |= {f"is left {room}": untried for room in (20, 100)}
    steps |= {"has no room for its result 700": Step("[tokens 200]", ends="failed")}
    for name, step in steps.items():
        place.insert(name, step, **(left_behind() if "left" in name else {}))
        fill(place, name, room=int(name.split()[-1]))
    steps["honest"] = Step("[tokens 1]")
    place.insert("honest", steps["honest"], **left_behind())
    start(place, WORKER_CONCURRENCY="2")
    for name in steps:
        if "left" not in name and name != "honest":
            place.send(place.jobs[name])
    place.wait_ends(steps)
    for name, step in steps.items():
        assert_ended_once(place, name, step)
        assert place.document(name)["error_message"] in (TOO_LARGE_TO_RUN, CANT_BE_STORED, None)
    assert place.goes_on(slots=2)


# ── the artifact store ───────────────────────────────────────────────────────────────────────────────────────────


def no_folder(place: Place) -> dict[str, str]:
    (place.folder / "files").write_text("no folder")
    return {"ARTIFACT_URL": f"file://{place.folder}/files"}


def no_bucket(_: Place) -> dict[str, str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    return {**S3, "ARTIFACT_URL": "s3://no-such-bucket", "S3_ENDPOINT_URL": f"http://{host}:{port}"}


def hangs(_: Place) -> dict[str, str]:
    """The address of a server whose connections are made, and never answered."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=100)
    LISTENING.append(listening)
    return {**S3, "ARTIFACT_URL": "s3://bucket", "S3_ENDPOINT_URL": f"http://127.0.0.1:{listening.getsockname()[1]}"}


LISTENING: list[socket.socket] = []
STORES = {"its folder is a file": no_folder, "its bucket is missing": no_bucket, "it hangs": hangs}


def a_store_takes_no_file(place: Place, name: str) -> None:
    start(place, WORKER_CONCURRENCY="1", **STORES[name](place))
    picture = {"picture": Step("", IMAGE, ends="failed")}
    place.submit("picture", picture["picture"])
    place.wait_log("will be tried again")
    assert place.goes_on()
    place.wait_ends(picture)
    assert "given up after 4 tries" in place.document("picture")["error_message"]
    assert "failed: artifact store: " in place.log()
    assert_ended_once(place, "picture", picture["picture"])
    assert place.goes_on()


def a_folder_comes_back(place: Place) -> None:
    start(place, WORKER_CONCURRENCY="1", **no_folder(place))
    picture = {"picture": Step("", IMAGE, files=1)}
    place.submit("picture", picture["picture"])
    place.wait_log("will be tried again")
    (place.folder / "files").unlink()
    place.wait_ends(picture)
    assert_ended_once(place, "picture", picture["picture"])


# ── the scenarios, side by side ──────────────────────────────────────────────────────────────────────────────────

SCENARIOS: dict[str, Scenario] = {
    "a validator": a_validator_refuses,
    "no room": a_document_has_no_room,
    "it comes back": a_folder_comes_back,
    **{name: partial(a_store_takes_no_file, name=name) for name in STORES},
}


@pytest.fixture(scope="module", autouse=True)
def outcomes(open_place: OpenPlace) -> Iterator[Outcomes]:
    with side_by_side(open_place, SCENARIOS) as outcomes:
        yield outcomes
    for listening in LISTENING:
        listening.close()


def test_what_mongodb_refuses_fails_its_job_and_holds_no_slot_and_ends_once_it_is_taken(outcomes: Outcomes) -> None:
    outcomes["a validator"].result()


def test_a_document_without_room_ends_and_keeps_no_other_from_its_rescue(outcomes: Outcomes) -> None:
    outcomes["no room"].result()


@pytest.mark.parametrize("name", STORES)
def test_a_store_that_takes_no_file_holds_no_slot_and_costs_one_generation(outcomes: Outcomes, name: str) -> None:
    outcomes[name].result()


def test_a_result_is_stored_without_another_generation_when_the_folder_is_back(outcomes: Outcomes) -> None:
    outcomes["it comes back"].result()
