"""Waiting, free ports, child processes that end with their parent, and the base class of the servers."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Final, TypeVar

T = TypeVar("T")
ServerType = TypeVar("ServerType", bound="Server")

SOURCE: Final = Path(__file__).parent.parent  # the folder of worker.py
LOOPBACK: Final = "127.0.0.1"
START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 10.0
PORTS: Final = range(20_000, 32_000)


def current_environment() -> dict[str, str]:
    """Return a copy of this process's environment, while another thread may change that.

    pytest does at each step of a test, and `{**os.environ}` in a thread would fail where a variable goes meanwhile.
    """
    return {name: value for name in list(os.environ) if (value := os.environ.get(name)) is not None}


# --- waiting and ports --------------------------------------------------------------------------------------


def poll(condition: Callable[[], T], timeout_s: float, interval_s: float = 0.02, description: str = "") -> T:
    """Call the condition again and again until it returns something truthy, and return that.

    Raises: TimeoutError, whose message has the description or, without one, the condition's name, file and line.
    """
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() >= deadline:
            waited_for = description or _describe(condition)
            raise TimeoutError(f"not within {timeout_s:g} s: {waited_for} (last value: {value!r})")
        time.sleep(interval_s)
    return value


def _describe(condition: Callable[[], object]) -> str:
    """Return a condition's qualified name, file and line."""
    name = getattr(condition, "__qualname__", repr(condition))
    code = getattr(condition, "__code__", None)
    return f"{name} ({Path(code.co_filename).name}:{code.co_firstlineno})" if code else name


def _is_free(host: str, port: int) -> bool:
    """Return whether a server could listen there.

    SO_REUSEADDR, which the servers set too, allows that while the kernel still keeps closed connections of that port.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):
            probe.bind((host, port))
            return True
    return False


def free_port(host: str = LOOPBACK) -> int:
    """Return a TCP port on which no process listens at the moment.

    Systems take no port of this range for an outgoing connection. So a server that was stopped finds its own port free
    when it starts again.
    """
    while not _is_free(host, port := random.SystemRandom().choice(PORTS)):
        pass
    return port


def reachable_host(host: str) -> str:
    """Return the host by which clients on this machine reach a server that is bound to the given host."""
    return LOOPBACK if host in {"0.0.0.0", "::", ""} else host


# --- child processes that end with their parent -------------------------------------------------------------


class ServerUnavailable(RuntimeError):
    """This machine has no usable binary of the server. The message says how to get one."""


class ServerFailed(RuntimeError):
    """The server could not start. The message has the end of its log."""


# The child runs this before it becomes the server. PR_SET_PDEATHSIG (1) makes the kernel send it a signal when its
# parent ends. The signal is SIGKILL (9), since a paused server would not react to any other. A preexec_fn of
# subprocess could do the same, but it runs in a fork of this process, where a lock that another thread holds at that
# moment is never released.
_DIE_WITH_PARENT: Final = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""

# The kernel sends that signal as soon as the *thread* ends that started the child. So all children are started by one
# thread, which lasts as long as the process.
_spawner: Final = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")


def spawn(
    command: list[str], output: Path, environment: Mapping[str, str] | None = None, directory: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a child process in a session of its own, and append its output to a file.

    On Linux the kernel kills the child when this process ends, even by SIGKILL.
    """
    launcher = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]
    full_command = [*launcher, *command] if sys.platform == "linux" else command

    def start() -> subprocess.Popen[bytes]:
        with output.open("ab") as stream:
            return subprocess.Popen(
                full_command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=directory,
                start_new_session=True,
            )

    return _spawner.submit(start).result()


class Server:
    """A server as a child process, which keeps its port and its data over restarts. It is a context manager."""

    name: ClassVar[str] = "server"
    start_timeout_s: ClassVar[float] = START_TIMEOUT_S

    def __init__(self, port: int = 0, host: str = LOOPBACK, directory: Path | None = None) -> None:
        """Choose the port and the directory, but start nothing.

        Without a directory the server gets a temporary one, which `close` removes.
        """
        self.host = host
        self.port = port or free_port()
        self.directory = directory or Path(tempfile.mkdtemp(prefix=f"testbed-{self.name}-"))
        self._owns_directory = directory is None
        self._owner_pid = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self.directory.mkdir(parents=True, exist_ok=True)
        atexit.register(self.close)

    @property
    def url(self) -> str:
        """The URL that clients use."""
        raise NotImplementedError

    @property
    def address(self) -> str:
        """The host and port that clients on this machine use."""
        return f"{reachable_host(self.host)}:{self.port}"

    @property
    def log(self) -> Path:
        """The file to which the server's output is written."""
        return self.directory / f"{self.name}.log"

    @property
    def pid(self) -> int | None:
        """The process id, or None when the server does not run."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def is_running(self) -> bool:
        """Whether the process exists. That of a paused server does."""
        return self.pid is not None

    def start(self: ServerType) -> ServerType:
        """Start the server, unless it runs already, and wait until it answers.

        Raises: ServerUnavailable, ServerFailed, TimeoutError.
        """
        if not self.is_running:
            if not _is_free(self.host, self.port):
                raise ServerFailed(f"{self.name} can't start: port {self.port} is taken")
            self._process = spawn(self._command(), self.log, self._environment())
            description = f"{self.name} answers at {self.address}"
            poll(self._answers_or_ended, self.start_timeout_s, description=description)
            self._prepare()
        return self

    def stop(self) -> None:
        """Send SIGTERM and wait for the end. A server that does not end within STOP_TIMEOUT_S is killed."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL, as if the server had crashed."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Stop the process by SIGSTOP: its connections stay open, but it does not answer.

        On a busy machine its threads stop one after the other, and until then the last ones still answer.
        """
        self._signal(signal.SIGSTOP)
        poll(self._is_stopped, STOP_TIMEOUT_S, description=f"{self.name} stopped")

    def _is_stopped(self) -> bool:
        try:
            stats = [path.read_text() for path in Path(f"/proc/{self.pid}/task").glob("*/stat")]
        except OSError:  # a thread has just ended
            return False
        return all(stat.rpartition(")")[2].split()[0] in "TZ" for stat in stats)

    def resume(self) -> None:
        """Let a paused server continue."""
        self._signal(signal.SIGCONT)

    def restart(self: ServerType, crash: bool = False) -> ServerType:
        """Stop the server, or kill it, and start it again on the same data."""
        if crash:
            self.kill()
        else:
            self.stop()
        return self.start()

    def close(self) -> None:
        """Stop the server and remove its temporary directory.

        In a fork of the process that made this object it does nothing. A fork inherits the atexit handler, and its end
        must not stop the server of its parent.
        """
        if os.getpid() != self._owner_pid:
            return
        self.stop()
        atexit.unregister(self.close)
        if self._owns_directory:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self: ServerType) -> ServerType:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _command(self) -> list[str]:
        """Return the command line that starts the server in the foreground."""
        raise NotImplementedError

    def _environment(self) -> Mapping[str, str] | None:
        """Return the server's environment, or None for that of this process."""
        return None

    def _answers(self) -> bool:
        """Return whether the server answers a request in its own protocol."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """Do what remains to be done once the server answers, for example create its users."""

    def _answers_or_ended(self) -> bool:
        """Return whether the server answers. Raises: ServerFailed, when its process has ended."""
        if not self.is_running:
            tail = self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""
            raise ServerFailed(f"{self.name} ended at its start on port {self.port}:\n{tail}")
        return self._answers()

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to the server if it runs."""
        if self._process and self._process.poll() is None:
            self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        """Send the signal and wait for the end.

        SIGCONT follows it, since a paused process would otherwise not react to SIGTERM.
        """
        if self._process is None:
            return
        self._signal(number)
        self._signal(signal.SIGCONT)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
