"""What concerns the process: the grace of a shutdown, signs of life, the event loop's thread, deferred signals."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from testbed.processes import poll
from tests.lab import gone_pid
from workerkit.process import EventLoopThread, Heartbeat, ShutdownTime, is_process_alive, signals_deferred

# ── shutdown ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_shutdown_announced_by_the_parent_is_seen_in_its_children_and_back(at: list[float]) -> None:
    shutdown = ShutdownTime()
    child = os.fork()
    if child == 0:
        shutdown.announce(5)
        os._exit(0)
    os.waitpid(child, 0)
    assert shutdown.due_at == 1005.0


def test_of_two_shutdowns_the_earlier_is_due(at: list[float]) -> None:
    shutdown = ShutdownTime()
    for grace_s in (9, 5, 7):
        shutdown.announce(grace_s)
    assert shutdown.due_at == 1005.0


def test_a_shutdown_is_announced_first_and_due_after_its_grace(at: list[float]) -> None:
    shutdown = ShutdownTime()
    assert not shutdown.is_announced
    assert not shutdown.is_due
    shutdown.announce(5)
    assert shutdown.is_announced
    assert not shutdown.is_due
    at[0] += 5
    assert shutdown.is_due


def test_a_shutdown_that_the_parent_announces_a_moment_later_is_waited_for() -> None:
    shutdown = ShutdownTime()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(shutdown.wait_until_announced)
        shutdown.announce(5)
        assert waiting.result(10)


def test_a_shutdown_that_is_not_announced_is_waited_for_briefly_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShutdownTime, "ANNOUNCED_WITHIN_S", 0.05)
    assert not ShutdownTime().wait_until_announced()


# ── signs of life ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_process_is_alive_until_it_has_ended() -> None:
    assert is_process_alive(os.getpid())
    assert not is_process_alive(gone_pid())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a zombie counts as alive")
def test_a_killed_process_whose_parent_has_not_waited_for_it_is_dead() -> None:
    killed = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert is_process_alive(killed.pid)
    killed.kill()
    poll(lambda: not is_process_alive(killed.pid), timeout_s=30)
    os.kill(killed.pid, 0)  # it is still there
    killed.communicate()


def test_a_process_of_another_user_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_pid: int, _signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert is_process_alive(gone_pid())


def test_a_heartbeat_has_an_age_while_its_process_lives(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path / "beats")
    assert heartbeat.ages_s() == {}
    heartbeat.beat()
    (tmp_path / "beats" / str(gone_pid())).touch()
    (tmp_path / "beats" / "notes.txt").touch()
    assert list(heartbeat.ages_s()) == [os.getpid()]
    heartbeat.stop()
    assert heartbeat.ages_s() == {}


def test_a_heartbeats_age_is_the_time_since_the_last_beat(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path)
    heartbeat.beat()
    os.utime(tmp_path / str(os.getpid()), (time.time() - 100,) * 2)
    assert heartbeat.ages_s()[os.getpid()] == pytest.approx(100, abs=5)
    heartbeat.beat()
    assert heartbeat.ages_s()[os.getpid()] < 5


def test_a_heartbeat_that_cant_be_written_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    heartbeat = Heartbeat(tmp_path / "file" / "beats")
    heartbeat.beat()
    heartbeat.beat()
    heartbeat.stop()
    assert len(caplog.messages) == 1


def test_heartbeats_are_in_a_folder_that_only_this_user_can_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    Heartbeat().beat()
    folder = tmp_path / f"ai-backend-worker-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700


# ── event loop ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def loop() -> Iterator[EventLoopThread]:
    loop = EventLoopThread()
    yield loop
    loop.close()


async def name_of_thread() -> str:
    return threading.current_thread().name


def used(loop: EventLoopThread) -> asyncio.AbstractEventLoop:
    """The loop on which a coroutine has just run."""
    future, its_loop = loop.submit(name_of_thread())
    assert future.result(10) == "event-loop"
    return its_loop


def close_abandoned(loop: asyncio.AbstractEventLoop) -> None:
    loop.call_soon_threadsafe(loop.stop)
    poll(lambda: not loop.is_running(), 10)
    loop.close()


def test_coroutines_run_on_one_loop_in_a_thread_of_its_own(loop: EventLoopThread) -> None:
    assert used(loop) is used(loop)


def test_a_loop_that_is_blocked_is_left_behind_for_a_new_one(loop: EventLoopThread) -> None:
    released = threading.Event()

    async def block() -> bool:
        return released.wait(30)

    blocked, its_loop = loop.submit(block())
    loop.abandon(its_loop)
    assert used(loop) is not its_loop
    released.set()
    assert blocked.result(10)
    close_abandoned(its_loop)


def test_only_the_loop_that_is_used_now_can_be_left_behind(loop: EventLoopThread) -> None:
    first = used(loop)
    loop.abandon(first)
    second = used(loop)
    loop.abandon(first)
    assert used(loop) is second
    close_abandoned(first)


def test_a_closed_loop_has_ended_its_thread_and_may_be_closed_again() -> None:
    loop = EventLoopThread()
    its_loop = used(loop)
    for _ in range(2):
        loop.close()
    assert its_loop.is_closed()


# ── signals ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_signal_during_the_last_write_comes_after_it() -> None:
    order: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: order.append("signal"))
    try:
        with signals_deferred() as arrived:
            signal.raise_signal(signal.SIGTERM)
            order.append("written")
            assert arrived == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert order == ["written", "signal"]


def test_a_thread_defers_no_signals_since_it_gets_none() -> None:
    def handler_inside() -> object:
        with signals_deferred():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(handler_inside).result() is signal.getsignal(signal.SIGTERM)
