"""Notifications while Redis is away, and the batches of streamed text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from bson import ObjectId

from tests.lab import redis_away, some_job
from worker import Job, Notifier, Progress, Result, Runtime, SharedNotes, Status
from workerkit.errors import NotesUnavailable

# ── notifier ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_while_redis_is_away_writing_returns_false_and_reading_raises(caplog: pytest.LogCaptureFixture) -> None:
    notifier, notes = Notifier(redis_away()), SharedNotes(redis_away())
    assert not notifier.publish_status({"_id": ObjectId()}, Status.FAILED, "x")
    assert not notifier.publish_progress(some_job(), 0, "x")
    assert not notes.take_turn("chore", 1)
    assert not notes.keep_result(some_job(), Result({}))
    with pytest.raises(NotesUnavailable):
        notes.kept_result(ObjectId())
    with pytest.raises(NotesUnavailable):
        notes.revoked()
    notes.forget_result(ObjectId())
    notes.note_revoked("0" * 24)
    notes.forget_revoked("0" * 24)
    assert "can't be published" in caplog.text


def test_a_kept_result_is_gone_after_an_hour(light_runtime: Runtime) -> None:
    job = some_job()
    light_runtime.notes.keep_result(job, Result({}))
    assert 3_500 < int(str(light_runtime.redis.ttl(f"result:{job.id}"))) <= 3_600
    light_runtime.notes.forget_result(job.id)


# ── streamed text ────────────────────────────────────────────────────────────────────────────────────────────────────


class Listener:
    """Stands in for the notifier. Its subscriber comes when it was asked so many times for one."""

    recheck_s = 0.02

    def __init__(self, absent: int = 0) -> None:
        self.absent = absent
        self.pieces: list[tuple[int, str]] = []

    def may_have_listeners(self) -> bool:
        self.absent -= 1
        return self.absent < 0

    def publish_progress(self, _job: Job, sequence: int, delta: str) -> bool:
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
        progress = Progress(some_job(), listener, is_fresh, batch_s)  # type: ignore[arg-type]
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
        progress = Progress(some_job(), listener, lambda: True)  # type: ignore[arg-type]
        progress("late")
        progress.stop()
        with pytest.raises(asyncio.CancelledError):
            await progress.finish()

    asyncio.run(send())
    assert listener.pieces == []


def test_a_stream_without_text_finishes() -> None:
    stream(listener := Listener(), [])
    assert listener.pieces == []
