"""What concerns the process: shutdown, signs of life, its event loop, its signals."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import math
import mmap
import os
import signal
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from workerkit.logs import RepeatedFaultLog, lone_line

T = TypeVar("T")

# ── shutdown ─────────────────────────────────────────────────────────────────────────────────────────────────────


class ShutdownTime:
    """When the grace of a shutdown ends, in 8 bytes of memory that the parent shares with every child it forks."""

    ANNOUNCED_WITHIN_S = 3.0
    ORDERLY_END_S = 3.0  # for what is left to do in order once the grace is over

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)
        self._made_by = os.getpid()

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
    def overdue_at(self) -> float:
        """When the worker should have ended in order."""
        return (self.due_at or math.inf) + self.ORDERLY_END_S

    @property
    def is_announced(self) -> bool:
        return self.due_at is not None

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= (self.due_at or math.inf)

    @property
    def is_of_parent(self) -> bool:
        """Whether another process has made it, from which this one was forked."""
        return os.getpid() != self._made_by

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


class Shutdown(ShutdownTime):
    """A shutdown, and what it waits for: the jobs that this process holds, and the tasks of their messages.

    A signal must not end a process between the claim of a job and the write of its end: the job's lease would have to
    run out. So in a pool's child, which a signal to the whole process group reaches too, SIGTERM waits for that. And a
    parent that can't end in order ends by force, but not before it and its children hold no job.

    A parent must not have a thread of ours while it forks. So it has a timer of the kernel, whose signal is handled in
    the main thread wherever that waits.
    """

    LOOK_AGAIN_S = 0.5  # from one look at whether the process can end to the next
    BY_FORCE = "The worker couldn't end in order (does its broker hang?), so it ends by force. It holds no job."

    def __init__(self, log_format: str = "text") -> None:
        super().__init__()
        self._log_format = log_format
        self._tasks: set[object] = set()  # to add and to discard is atomic, so that a signal handler can look
        self._jobs: set[object] = set()
        self._children: Callable[[], Sequence[int]] | None = None
        self._exit_code = 0
        self._end_child: Callable[..., object] | None = (
            None  # the pool's own handler in a child, once ours stands in front of it
        )

    @contextlib.contextmanager
    def waits_for_task(self) -> Iterator[None]:
        """Around the task of a message. The end of its job is announced and logged in it, so it should not be cut."""
        if self.is_of_parent and self._end_child is None:
            before = signal.getsignal(signal.SIGTERM)
            self._end_child = before if callable(before) else lambda *_: os._exit(128 + signal.SIGTERM)
            for number in (signal.SIGTERM, signal.SIGALRM):
                signal.signal(number, self._end_child_later)
        with self._one_of(self._tasks):
            yield

    def waits_for_job(self) -> contextlib.AbstractContextManager[None]:
        """Around the claim of a job, its run, and the write of its end."""
        return self._one_of(self._jobs)

    @staticmethod
    @contextlib.contextmanager
    def _one_of(these: set[object]) -> Iterator[None]:
        one = object()
        these.add(one)
        try:
            yield
        finally:
            these.discard(one)

    def bound(self, children: Callable[[], Sequence[int]]) -> None:
        """Makes this process the parent, whose end has a bound. `children` returns the ids of its pool's processes."""
        self._children = children

    def announce(self, grace_s: float, exit_code: int = 0) -> None:
        """Also sets the timer of the bounded end, with this exit code."""
        super().announce(grace_s)
        if self._children:
            self._exit_code = exit_code
            signal.signal(signal.SIGALRM, self._end_by_force)
            atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)  # Python's own end takes its handler away
            in_s = max(self.LOOK_AGAIN_S, self.overdue_at - time.monotonic())
            signal.setitimer(signal.ITIMER_REAL, in_s, self.LOOK_AGAIN_S)

    def _end_child_later(self, _number: int, frame: FrameType | None) -> None:
        is_overdue = time.monotonic() >= self.overdue_at
        is_busy = bool(self._jobs) or (bool(self._tasks) and not is_overdue)
        if is_busy and self.wait_until_announced():
            signal.setitimer(signal.ITIMER_REAL, self.LOOK_AGAIN_S)
        elif self._end_child:  # also for a task that is revoked
            self._end_child(signal.SIGTERM, frame)

    def _end_by_force(self, _number: int, _frame: FrameType | None) -> None:
        children = [pid for pid in self._children() if is_process_alive(pid)] if self._children else []
        for pid in children:
            # A child that holds a job ends afterwards. One that holds none begins to end at the first signal, for which
            # it may want an answer of this process, and is killed by the second.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        if not children and not self._jobs:
            # Celery has replaced sys.stderr.
            os.write(2, lone_line("WARNING", self.BY_FORCE, self._log_format).encode())
            os._exit(self._exit_code)


class SharedCount:
    """A number that only grows, in memory that a process shares with every child it forks."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    @property
    def value(self) -> int:
        return int(struct.unpack("q", self._memory[:])[0])

    def increase(self) -> None:
        self._memory[:] = struct.pack("q", self.value + 1)


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


# ── signs of life ────────────────────────────────────────────────────────────────────────────────────────────────

KEEPER, PARENT = "keeper", "parent"  # the two parts of a worker that give signs of life
BORN_EARLIER_S = 2.0  # by which a process must be younger than a file, so that the file is of another process


def process_age_s(pid: int) -> float | None:
    """Seconds since a process started; None where the system doesn't tell."""
    with contextlib.suppress(OSError, AttributeError):
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return None


@dataclass(frozen=True)
class SignOfLife:
    """The last one of a part of a process that still runs."""

    pid: int
    part: str
    age_s: float
    is_overdue: bool  # whether the next one should have come


class Heartbeat:
    """Signs of life of one part of this process: a file that it touches, and that `health` looks at.

    The file's time of modification is in the future: until then silence is no fault. So `health`, which knows no
    settings, can judge every part of every worker. The file lies in a folder that only this user can write to.
    """

    def __init__(self, folder: Path | None = None, part: str = KEEPER, silent_s: float = 60.0) -> None:
        """`silent_s` is how long this part may be silent."""
        self._given_folder, self._part, self._silent_s = folder, part, silent_s
        self._log = RepeatedFaultLog("no sign of life for `health`")

    @property
    def _folder(self) -> Path:
        """Raises OSError: there is no folder in which temporary files can be written."""
        return self._given_folder or Path(tempfile.gettempdir()) / f"ai-backend-worker-{os.getuid()}"

    @property
    def _file(self) -> Path:
        return self._folder / f"{os.getpid()}.{self._part}"

    def beat(self, silent_s: float | None = None) -> None:
        """Gives a sign of life. `silent_s` is how long this part may be silent now, if that isn't as usual."""
        now = time.time()
        until = now + (self._silent_s if silent_s is None else silent_s)
        try:
            with contextlib.suppress(FileExistsError):
                self._folder.mkdir(mode=0o700)
            self._check_folder()
            file = os.open(self._file, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.utime(file, (now, until))
            finally:
                os.close(file)
        except OSError as error:
            self._log.fault(error.strerror or error)
        else:
            self._log.over()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._check_folder()
            self._file.unlink()

    def signs_of_life(self) -> list[SignOfLife]:
        """Of every part of all workers that share the folder. Removes what processes that have ended left there.

        Raises:
            OSError: the folder can't be read or trusted.
        """
        if not os.path.lexists(self._folder):
            return []
        self._check_folder()
        return [sign for path in self._folder.iterdir() if (sign := self._read(path))]

    def _check_folder(self) -> None:
        """Raises OSError: another user could have made the folder, or could change what is in it."""
        found = self._folder.lstat()
        fault = ""
        if not stat.S_ISDIR(found.st_mode):
            fault = "is no folder"  # but a link, perhaps, that leads to files of somebody else's choice
        elif found.st_uid != os.getuid():
            fault = "belongs to another user"
        elif found.st_mode & 0o022:
            fault = "can be written to by other users"
        if fault:
            raise OSError(f"{self._folder} {fault}: remove it, or set TMPDIR to another folder for worker and health")

    def _read(self, path: Path) -> SignOfLife | None:
        pid, _, part = path.name.partition(".")
        if not pid.isdigit() or part not in (KEEPER, PARENT):
            return None
        try:
            file = path.lstat()
        except FileNotFoundError:  # the process has ended just now
            return None
        age_s = time.time() - file.st_ctime
        born_s = process_age_s(int(pid))
        # A number of a process is used again, in containers by nearly each start.
        if not is_process_alive(int(pid)) or (born_s is not None and born_s + BORN_EARLIER_S < age_s):
            path.unlink(missing_ok=True)
            return None
        return SignOfLife(int(pid), part, age_s, time.time() > file.st_mtime)


# ── event loop and signals ───────────────────────────────────────────────────────────────────────────────────────


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
