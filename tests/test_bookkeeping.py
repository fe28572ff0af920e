"""What is read from the sub-document `worker`, whatever is in it, and what is judged by it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import Code, DatetimeMS, MinKey, ObjectId, Regex

from tests.lab import table
from workerkit.bookkeeping import Bookkeeping, Snapshot, first_attempt, parse_bookkeeping
from workerkit.sentences import GOES_ON

NOW = datetime(2030, 1, 1, tzinfo=UTC)
LONGEST_WAIT_S, ORPHAN_AFTER_S = 1000.0, 180.0
LIVE: dict[str, Any] = {
    "owner": "owner-1",
    "node": "node-1",
    "pid": 7,
    "queue": "ai_jobs",
    "priority": 3,
    "task_id": "task-1",
    "lease_until": NOW + timedelta(seconds=30),
    "deadline": NOW + timedelta(seconds=120),
    "available_at": NOW - timedelta(seconds=5),
    "rescue_at": NOW + timedelta(seconds=25),
    "rescues": 2,
    "attempt": 3,
    "first_started_at": NOW - timedelta(seconds=60),
    "limits": [120, 90],
    "past": [{"ended_at": NOW, "reason": "No.", "model": "m", "tokens": 3, "attempts": 4}],
}
ABSENT = Bookkeeping()
ODD_VALUES: list[Any] = [
    None,
    "",
    [],
    {},
    2**40,
    -1,
    True,
    1.5,
    float("nan"),
    MinKey(),
    Regex("x"),
    Code("x"),
    DatetimeMS(10**15),
]


def parse(raw: Any) -> Bookkeeping:
    return parse_bookkeeping(raw, NOW, LONGEST_WAIT_S)


def snapshot(started_at: object = LIVE["first_started_at"], **changed: Any) -> Snapshot:
    own = {name: value for name, value in {**LIVE, **changed}.items() if value is not ...}
    return Snapshot({"_id": ObjectId(), "status": "processing", "started_at": started_at}, parse(own))


def test_every_field_is_read() -> None:
    own = parse(LIVE)
    assert {name: getattr(own, name) for name in LIVE if name not in ("limits", "past")} == {
        name: value for name, value in LIVE.items() if name not in ("limits", "past")
    }
    assert (own.limits, own.past, own.raw) == ((120, 90), tuple(LIVE["past"]), LIVE)


@pytest.mark.parametrize("value", ODD_VALUES, ids=repr)
@pytest.mark.parametrize("name", LIVE)
def test_a_field_of_the_wrong_type_counts_as_missing_and_costs_no_other(name: str, value: object) -> None:
    own = parse({**LIVE, name: value})
    assert getattr(own, name) == getattr(ABSENT, name)
    others = set(LIVE) - {name}
    assert {other: getattr(own, other) for other in others} == {other: getattr(parse(LIVE), other) for other in others}


@table(
    "name, ahead_s",
    ("a lease of over an hour", "lease_until", 3601),
    ("a rescue further than its longest wait", "rescue_at", LONGEST_WAIT_S + 1),
    ("a wait further than that", "available_at", LONGEST_WAIT_S + 1),
    ("a first start in the future", "first_started_at", 61),
    ("an attempt of over two days", "deadline", 172_801),
)
def test_a_time_that_makes_no_sense_counts_as_missing(name: str, ahead_s: float) -> None:
    assert getattr(parse({**LIVE, name: NOW + timedelta(seconds=ahead_s - 2)}), name) is not None
    assert getattr(parse({**LIVE, name: NOW + timedelta(seconds=ahead_s)}), name) is None


@pytest.mark.parametrize("raw", [None, "text", 7, [], [LIVE], datetime(3000, 1, 1), MinKey()], ids=repr)
def test_what_is_no_sub_document_is_empty_and_can_still_be_compared(raw: object) -> None:
    assert parse(raw) == Bookkeeping(raw)
    assert not parse(raw).has_past


@table("limits", ("one number", [1]), ("three", [1, 2, 3]), ("text", ["1", "2"]), ("for ever", [float("inf"), 1]))
def test_limits_are_two_durations(limits: list[Any]) -> None:
    assert parse({**LIVE, "limits": limits}).limits is None


# ── whether an attempt works on it ───────────────────────────────────────────────────────────────────────────────


@table(
    "job, is_stale",
    ("its lease is live", snapshot(), False),
    ("its lease has run out", snapshot(lease_until=NOW), True),
    ("its lease is damaged", snapshot(lease_until="soon"), True),
    ("its owner is damaged", snapshot(owner=["owner-1"]), True),
    ("released, and its message is on its way", snapshot(owner=None), False),
    ("released, and its message is overdue", snapshot(owner=None, rescue_at=NOW), True),
    ("released, and its rescue is damaged", snapshot(owner=None, rescue_at=datetime(3000, 1, 1)), True),
    ("an older worker's, young", snapshot(NOW, owner=...), False),
    ("an older worker's, old", snapshot(NOW - timedelta(hours=1), owner=...), True),
    ("an older worker's, without a time", snapshot(None, owner=...), True),
    ("an older worker's, of a time to come", snapshot(datetime(3000, 1, 1), owner=...), True),
    ("an older worker's, after a former life of ours", snapshot(NOW, lease_until=NOW), False),
    ("a live lease, whatever its start", snapshot(NOW), False),
)
def test_only_what_says_that_somebody_has_the_job_is_believed(job: Snapshot, is_stale: bool) -> None:
    assert job.is_stale(NOW, ORPHAN_AFTER_S) is is_stale


# ── from one state to the next ───────────────────────────────────────────────────────────────────────────────────


def test_a_rescue_keeps_attempts_limits_queue_and_task() -> None:
    rescued = snapshot(lease_until=NOW).rescued(NOW, 30, 600)
    kept = {name: LIVE[name] for name in ("queue", "priority", "task_id", "attempt", "first_started_at", "past")}
    waits = {"owner": None, "available_at": NOW, "rescue_at": NOW + timedelta(seconds=120)}
    own = rescued.pop("worker")
    assert (rescued, own.pop("message"), own.pop("attempts")[0]["end"]) == ({"updated_at": NOW}, GOES_ON, "lost")
    assert own == {**kept, **waits, "limits": [120, 90], "rescues": 3}


def test_the_life_of_an_older_workers_job_begins_with_its_rescue() -> None:
    rescued = snapshot(NOW - timedelta(hours=1), owner=...).rescued(NOW, 30, 600)
    assert (rescued["worker"]["attempt"], rescued["worker"]["first_started_at"]) == (0, NOW)
    assert rescued["started_at"] == NOW


def test_the_next_attempt_counts_and_takes_the_new_lease() -> None:
    own = parse({**LIVE, "owner": None}).next_attempt({"owner": "owner-2", "task_id": "task-2"}, 5)
    assert (own["owner"], own["task_id"], own["attempt"], own["rescues"]) == ("owner-2", "task-2", 4, 2)
    assert "rescue_at" not in own
    assert own["message"] == "Your job has started (try 4 of 5)."


def test_a_new_life_has_nothing_of_the_former_one_but_how_it_ended() -> None:
    ended = {"status": "failed", "completed_at": NOW, "error_message": "No." * 100}
    former = Snapshot({"_id": ObjectId(), **ended, "output_data": {"model_used": "m"}}, parse({**LIVE, "past": []}))
    own = first_attempt({"owner": "owner-2"}, NOW, is_copy=False, former=former)
    [life] = own.pop("past")
    assert own == {"owner": "owner-2", "attempt": 1, "first_started_at": NOW, "message": "Your job has started."}
    assert (life["ended_at"], life["model"], life["attempts"], len(life["reason"])) == (NOW, "m", 3, 200)


def test_the_last_five_lives_are_kept() -> None:
    former = snapshot(past=[{"attempts": number} for number in range(9)])
    lives = first_attempt({}, NOW, is_copy=False, former=former)["past"]
    assert [life["attempts"] for life in lives] == [5, 6, 7, 8, 3]
