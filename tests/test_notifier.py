"""Notifications while Redis is away, and the batches of streamed text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from bson import ObjectId
from redis.exceptions import NoPermissionError

from tests.lab import redis_away, some_job, table
from worker import PROGRESS_CHANNEL, Notifier, Result, Runtime, Status
from workerkit.errors import NotesUnavailable
from workerkit.notes import REVOKED, RevokedTask, SharedNotes
from workerkit.progress import Progress

RECHECK_S = 0.02
REVOKED_TASK = RevokedTask("0" * 24, "task", REVOKED)

# ── notifier ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_while_redis_is_away_writing_returns_false_and_reading_raises(caplog: pytest.LogCaptureFixture) -> None:
    notifier, notes = Notifier(redis_away()), SharedNotes(redis_away())
    assert not notifier.publish_status({"_id": ObjectId()}, Status.FAILED, "x")
    assert not notifier.publish_progress(some_job(), 0, "x")
    assert not notes.keep_result("name", Result({}))
    with pytest.raises(NotesUnavailable):
        notes.kept_result("name")
    with pytest.raises(NotesUnavailable):
        notes.revoked()
    notes.forget_result("name")
    notes.note_revoked(REVOKED_TASK)
    notes.forget_revoked(REVOKED_TASK)
    assert "can't be published" in caplog.text


def test_a_channel_that_is_refused_is_logged_once_while_the_other_one_works(
    light_runtime: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    notifier, publish = light_runtime.notifier, light_runtime.redis.publish

    def refuse(channel: str, message: str) -> Any:
        if channel == PROGRESS_CHANNEL:
            raise NoPermissionError
        return publish(channel, message)

    monkeypatch.setattr(light_runtime.redis, "publish", refuse)
    for _ in range(3):
        notifier.publish_progress(some_job(), 0, "x")
        notifier.publish_status({"_id": ObjectId()}, Status.COMPLETED, "x")
    assert caplog.text.count("can't be published to job_progress: NoPermissionError") == 1
    assert ": over" not in caplog.text


def test_a_kept_result_is_gone_after_an_hour(light_runtime: Runtime) -> None:
    light_runtime.notes.keep_result("name", Result({}))
    assert 3_500 < int(str(light_runtime.redis.ttl("result:ai_jobs:ai_backend:name"))) <= 3_600


@table(
    "note",
    ("an older version's", "0" * 24),
    ("no JSON", b"\xff{"),
    ("another shape", '{"job": 1}'),
    ("no job's id", '["x", "task", "revoked"]'),
    ("another reason", f'["{ObjectId()}", "task", "moved"]'),
)
def test_a_note_of_a_revoked_task_that_cant_be_read_is_deleted(light_runtime: Runtime, note: str | bytes) -> None:
    light_runtime.redis.sadd("revoked:ai_jobs:ai_backend", note)
    light_runtime.notes.note_revoked(REVOKED_TASK)
    assert light_runtime.notes.revoked() == [REVOKED_TASK]
    assert light_runtime.redis.scard("revoked:ai_jobs:ai_backend") == 1


@table("queue, database", ("another queue", "other", "ai_backend"), ("another database", "ai_jobs", "other"))
def test_notes_are_those_of_one_queue_and_database(light_runtime: Runtime, queue: str, database: str) -> None:
    light_runtime.notes.keep_result("name", Result({}))
    light_runtime.notes.note_revoked(REVOKED_TASK)
    others = SharedNotes(light_runtime.redis, queue, database)
    assert (others.kept_result("name"), others.revoked()) == (None, [])


def test_workers_read_which_jobs_were_cancelled_as_long_as_one_watches(light_runtime: Runtime) -> None:
    notes, job_id = light_runtime.notes, ObjectId()
    assert notes.cancelled() is None
    notes.note_cancelled(["ai_jobs", "another"], [])
    assert notes.cancelled() == set()
    notes.note_cancelled(["ai_jobs"], [job_id])
    assert notes.cancelled() == {str(job_id)}
    assert 0 < int(str(light_runtime.redis.ttl("cancelled:another:ai_backend"))) <= 3


def test_a_redis_that_cant_say_what_was_cancelled_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    notes = SharedNotes(redis_away())
    assert notes.cancelled() is None
    monkeypatch.setattr(notes._redis, "get", pytest.fail)
    assert notes.cancelled() is None
    notes.note_cancelled(["ai_jobs"], [])


# ── streamed text ────────────────────────────────────────────────────────────────────────────────────────────────────


class Listener:
    """Stands in for the notifier. Its subscriber comes when it was asked so many times for one."""

    def __init__(self, absent: int = 0) -> None:
        self.absent = absent
        self.pieces: list[tuple[int, str]] = []

    def may_publish(self) -> bool:
        self.absent -= 1
        return self.absent < 0

    def publish(self, sequence: int, delta: str) -> bool:
        self.pieces.append((sequence, delta))
        return True

    @property
    def text(self) -> str:
        return "".join(delta for _, delta in self.pieces)


def stream(
    listener: Listener, words: list[str], is_fresh: Callable[[], bool] = lambda: True, batch_s: float = 0.01
) -> None:
    """Streams the words, each after a turn of the loop, and finishes."""

    async def send() -> None:
        progress = Progress(listener.publish, lambda: is_fresh() and listener.may_publish(), RECHECK_S, batch_s)
        for word in words:
            progress(word)
            await asyncio.sleep(0.002)
        await progress.finish()

    asyncio.run(send())


def test_progress_comes_in_order_and_in_batches_the_first_piece_at_once() -> None:
    listener, words = Listener(), [f"{number} " for number in range(200)]
    stream(listener, words, batch_s=0.1)
    assert listener.text == "".join(words)
    assert [sequence for sequence, _ in listener.pieces] == list(range(len(listener.pieces)))
    assert listener.pieces[0] == (0, "0 ")
    assert len(listener.pieces) < len(words) / 2


def test_text_waits_until_there_is_a_subscriber() -> None:
    listener = Listener(absent=3)
    stream(listener, [f"{number} " for number in range(100)])
    assert listener.text == "".join(f"{number} " for number in range(100))
    assert listener.pieces[0][0] == 0


def test_nothing_is_published_once_the_lease_is_stale() -> None:
    listener = Listener()
    stream(listener, ["a", "b"], is_fresh=lambda: False)
    assert listener.pieces == []


def test_finish_sends_the_rest_without_waiting_for_the_next_batch() -> None:
    listener = Listener()
    stream(listener, ["first ", "and ", "last"], batch_s=3600)
    assert listener.pieces == [(0, "first "), (1, "and last")]


def test_a_stopped_stream_sends_nothing_more() -> None:
    listener = Listener()

    async def send() -> None:
        progress = Progress(listener.publish, lambda: True, RECHECK_S)
        progress("late")
        progress.stop()
        with pytest.raises(asyncio.CancelledError):
            await progress.finish()

    asyncio.run(send())
    assert listener.pieces == []


def test_a_stream_without_text_finishes() -> None:
    stream(listener := Listener(), [])
    assert listener.pieces == []
