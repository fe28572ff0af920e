"""What concerns the process: shutdown, signs of life, its event loop, its signals."""

from __future__ import annotations

import asyncio
import contextlib
import math
import mmap
import os
import signal
import struct
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

from workerkit.logs import RepeatedFaultLog

T = TypeVar("T")


class made_once(cached_property[T]):
    """A part of an object that has a `lock`: made when first used, by one of the threads that ask for it."""

    def __get__(self, instance: Any, owner: Any = None) -> T:  # type: ignore[override]
        with instance.lock:
            return cast(T, super().__get__(instance, owner))


class ShutdownTime:
    """When the grace of a shutdown ends, in 8 bytes of memory that the parent shares with every child it forks."""

    ANNOUNCED_WITHIN_S = 1.0

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    def announce(self, grace_s: float) -> None:
        """Called in a signal handler, where nothing but this write is safe.

        The monotonic clock belongs to the host, so parent and children read the same time.
        """
        due_at = time.monotonic() + grace_s
        self._memory[:] = struct.pack("d", min(due_at, self.due_at or due_at))

    @property
    def due_at(self) -> float | None:
        return float(struct.unpack("d", self._memory[:])[0]) or None

    @property
    def is_announced(self) -> bool:
        return self.due_at is not None

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= (self.due_at or math.inf)

    def wait_until_announced(self) -> bool:
        """Whether a shutdown is announced, now or in a moment.

        A signal to the whole process group may reach a child before its parent reacts.
        """
        give_up_at = time.monotonic() + self.ANNOUNCED_WITHIN_S
        while not self.is_announced and time.monotonic() < give_up_at:
            time.sleep(0.02)
        return self.is_announced


class SharedTime:
    """A time on the monotonic clock, or None, in memory that a process shares with every child it forks."""

    def __init__(self, at: float | None = None) -> None:
        self._memory = mmap.mmap(-1, 8)
        self.at = at

    @property
    def at(self) -> float | None:
        return float(struct.unpack("d", self._memory[:])[0]) or None

    @at.setter
    def at(self, at: float | None) -> None:
        self._memory[:] = struct.pack("d", at or 0.0)


def is_process_alive(pid: int) -> bool:
    """Whether a process runs. A zombie (ended, but its parent hasn't waited for it) doesn't; Linux alone shows it."""
    with contextlib.suppress(OSError):
        # The state follows the command's name, which is in brackets and may hold brackets itself.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as another user
        return True
    return True


class Heartbeat:
    """A file for each process that runs jobs. The keeper touches it, and `health` looks at its age."""

    STALE_S = 60.0

    def __init__(self, folder: Path | None = None) -> None:
        self._given_folder = folder
        self._log = RepeatedFaultLog("the heartbeat file can't be written")

    @property
    def _folder(self) -> Path:
        """Raises OSError: there is no folder in which temporary files can be written."""
        return self._given_folder or Path(tempfile.gettempdir()) / f"ai-backend-worker-{os.getuid()}"

    def beat(self) -> None:
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            (self._folder / str(os.getpid())).touch()
        except OSError as error:
            self._log.fault(error.strerror)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            (self._folder / str(os.getpid())).unlink()

    def ages_s(self) -> dict[int, float]:
        """Seconds since the last beat, by process id, of the processes that still run."""
        files = [path for path in self._folder.glob("*") if path.name.isdigit()]
        alive = [path for path in files if is_process_alive(int(path.name))]
        return {int(path.name): time.time() - path.stat().st_mtime for path in alive}


class EventLoopThread:
    """One event loop per process, in a thread of its own. A loop that a handler blocks is left behind."""

    CLOSE_S = 5.0

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> tuple[Future[T], asyncio.AbstractEventLoop]:
        """Starts the coroutine on the loop and returns its future, with the loop that it runs on."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="event-loop", daemon=True)
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop), self._loop

    def abandon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Gives the next job a new loop. What else runs on the blocked one goes on once its handler lets go."""
        with self._lock:
            if self._loop is loop:
                self._loop = self._thread = None

    def close(self) -> None:
        """Stops the loop, if there is one, and waits for its thread."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop and thread:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(self.CLOSE_S)
            if not thread.is_alive():  # else a handler blocks it
                loop.close()


@contextlib.contextmanager
def signals_deferred() -> Iterator[list[int]]:
    """Keeps signals from interrupting what is inside: collects them in a list, and raises each one afterwards.

    Python runs signal handlers in the main thread only, so in other threads there is nothing to do.
    """
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
    before = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in numbers}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        for arrived_number in arrived:
            signal.raise_signal(arrived_number)
