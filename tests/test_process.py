"""What concerns the process: the grace of a shutdown, signs of life, the event loop's thread, deferred signals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from testbed.processes import SOURCE, poll
from tests.lab import gone_pid
from workerkit.process import (
    EventLoopThread,
    Heartbeat,
    Shutdown,
    ShutdownTime,
    is_process_alive,
    process_age_s,
    signals_deferred,
)

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


class QuickShutdown(Shutdown):
    ORDERLY_END_S, LOOK_AGAIN_S, ANNOUNCED_WITHIN_S = 0.0, 0.05, 0.1


def in_child(run: Callable[[int], None]) -> tuple[int, bytes]:
    """Runs this in a child, with the end of a pipe to write to. Returns its exit code, and what it has written."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            run(write)
        finally:
            os._exit(99)
    os.close(write)
    with os.fdopen(read, "rb") as written:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), written.read()


def hold_a_job(shutdown: Shutdown, write: int) -> None:
    """Holds a job for a moment, in which the process is asked to end several times. Then there is nothing to do."""
    with shutdown.waits_for_task():
        with shutdown.waits_for_job():
            time.sleep(0.3)
            os.write(write, b"written, ")
        os.write(write, b"published")
    time.sleep(60)


def test_a_process_ends_by_force_once_it_holds_no_job() -> None:
    def run(write: int) -> None:
        shutdown = QuickShutdown()
        shutdown.bound(list)
        shutdown.announce(0, exit_code=7)
        hold_a_job(shutdown, write)

    code, written = in_child(run)
    assert code == 7
    assert written.startswith(b"written, ")


def test_a_parent_ends_by_force_once_its_children_hold_no_job() -> None:
    def run(write: int) -> None:
        shutdown = QuickShutdown()
        child = os.fork()
        if child == 0:
            hold_a_job(shutdown, write)
        shutdown.bound(lambda: [child])
        shutdown.announce(0.1, exit_code=7)
        time.sleep(60)

    code, written = in_child(run)
    assert code == 7
    assert written.startswith(b"written, ")


HUNG = """
import time
from workerkit.process import Shutdown

Shutdown.ORDERLY_END_S, Shutdown.LOOK_AGAIN_S = 0.0, 0.1
shutdown = Shutdown("json")
shutdown.bound(lambda: [])
shutdown.announce(0, exit_code=7)
time.sleep(60)
"""


def test_an_end_by_force_is_said_in_the_format_of_the_log() -> None:
    ended = subprocess.run([sys.executable, "-c", HUNG], cwd=SOURCE, timeout=30, check=False, capture_output=True)
    assert (ended.returncode, json.loads(ended.stderr)["message"]) == (7, Shutdown.BY_FORCE)


SLOW_END = """
import time
from workerkit.process import Shutdown

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(0.3)

Shutdown.ORDERLY_END_S, Shutdown.LOOK_AGAIN_S = 0.0, 0.1
shutdown, slow = Shutdown(), Slow()
shutdown.bound(lambda: [])
shutdown.announce(0)
"""


def test_a_process_that_is_at_its_end_is_not_ended_by_force() -> None:
    """Python has no handlers of signals any more by then, so the timer's signal would kill it."""
    ended = subprocess.run([sys.executable, "-c", SLOW_END], cwd=SOURCE, timeout=30, check=False)
    assert ended.returncode == 0


def test_sigterm_to_a_child_waits_for_its_task_once_a_shutdown_is_announced() -> None:
    def run(write: int) -> None:
        shutdown = QuickShutdown()
        if child := os.fork():
            shutdown.announce(60)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        signal.setitimer(signal.ITIMER_REAL, 0.1)  # SIGALRM is what SIGTERM is tried again by
        hold_a_job(shutdown, write)

    assert in_child(run) == (143, b"written, published")


def test_sigterm_to_a_child_ends_it_at_once_where_no_shutdown_is_announced() -> None:
    def run(write: int) -> None:
        shutdown = QuickShutdown()
        if child := os.fork():
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        hold_a_job(shutdown, write)

    assert in_child(run) == (143, b"")


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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a test's signs of life are. It isn't there yet."""
    return tmp_path / "beats"


def seen(folder: Path) -> list[tuple[int, str, bool]]:
    return [(sign.pid, sign.part, sign.is_overdue) for sign in Heartbeat(folder).signs_of_life()]


def test_a_sign_of_life_is_seen_until_it_is_taken_back(folder: Path) -> None:
    heartbeat = Heartbeat(folder)
    assert seen(folder) == []
    heartbeat.beat()
    assert seen(folder) == [(os.getpid(), "keeper", False)]
    heartbeat.stop()
    assert seen(folder) == []


def test_the_parts_of_one_process_give_signs_of_their_own(folder: Path) -> None:
    for part in ("keeper", "parent"):
        Heartbeat(folder, part).beat()
    assert {part for _pid, part, _is_overdue in seen(folder)} == {"keeper", "parent"}


def test_a_part_is_overdue_once_it_has_been_silent_for_its_time(folder: Path) -> None:
    heartbeat = Heartbeat(folder, silent_s=0.05)
    heartbeat.beat()
    poll(lambda: seen(folder) == [(os.getpid(), "keeper", True)], 10)
    [sign] = heartbeat.signs_of_life()
    assert 0.05 <= sign.age_s < 10
    heartbeat.beat()
    assert heartbeat.signs_of_life()[0].age_s < sign.age_s


def test_a_part_may_be_silent_longer_after_one_beat(folder: Path) -> None:
    heartbeat = Heartbeat(folder, silent_s=-1)
    heartbeat.beat(60)
    assert seen(folder) == [(os.getpid(), "keeper", False)]
    heartbeat.beat()
    assert seen(folder) == [(os.getpid(), "keeper", True)]


def test_the_file_of_a_process_that_has_ended_is_removed(folder: Path) -> None:
    Heartbeat(folder).beat()
    left = folder / f"{gone_pid()}.keeper"
    left.touch()
    (folder / "notes.txt").touch()
    assert len(seen(folder)) == 1
    assert not left.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the age of a process isn't known")
def test_the_file_of_a_process_whose_number_is_used_again_is_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Heartbeat(folder).beat()
    monkeypatch.setattr("workerkit.process.BORN_EARLIER_S", -3600.0)  # as if this process had begun just now
    assert seen(folder) == []
    assert list(folder.iterdir()) == []


def test_the_age_of_a_process_is_known() -> None:
    before = process_age_s(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    age = process_age_s(child.pid)
    child.communicate()
    if sys.platform == "linux":
        assert age is not None
        assert before is not None
        assert 0 <= age < min(before, 30)
    assert process_age_s(child.pid) is None


def test_a_sign_of_life_that_cant_be_given_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    heartbeat = Heartbeat(tmp_path / "file" / "beats")
    heartbeat.beat()
    heartbeat.beat()
    heartbeat.stop()
    assert len(caplog.messages) == 1


def test_signs_of_life_are_in_a_folder_that_only_this_user_can_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    Heartbeat().beat()
    folder = tmp_path / f"ai-backend-worker-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700


def link(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "elsewhere")


def dangling_link(folder: Path) -> None:
    folder.symlink_to(folder.parent / "nowhere")


def file(folder: Path) -> None:
    folder.touch()


def open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def of_another(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    os.chown(folder, 65534, -1)


as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")


@pytest.mark.parametrize("make", [link, dangling_link, file, open_to_all, pytest.param(of_another, marks=as_root)])
def test_a_folder_that_another_user_could_have_made_is_refused(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture, make: Callable[[Path], None]
) -> None:
    make(folder)
    heartbeat = Heartbeat(folder)
    for _ in range(2):
        heartbeat.beat()
    heartbeat.stop()
    assert len(caplog.messages) == 1
    assert f"{folder} " in caplog.text
    with pytest.raises(OSError, match=r"beats .*: remove it, or set TMPDIR"):
        heartbeat.signs_of_life()
    assert [path for path in tmp_path.rglob("*") if path.name.endswith(".keeper")] == []


def test_a_link_in_place_of_the_file_is_not_followed(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "precious").touch()
    os.utime(tmp_path / "precious", (0, 0))
    folder.mkdir(mode=0o700)
    (folder / f"{os.getpid()}.keeper").symlink_to(tmp_path / "precious")
    Heartbeat(folder).beat()
    assert (tmp_path / "precious").stat().st_mtime == 0


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
