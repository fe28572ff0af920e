"""Waiting, free ports, child processes that end with their parent, and the base class of the servers."""

from __future__ import annotations

import atexit
import os
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

LOOPBACK: Final = "127.0.0.1"
START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 10.0


# --- waiting and ports --------------------------------------------------------------------------------------


def poll(condition: Callable[[], T], timeout_s: float, interval_s: float = 0.02, description: str = "") -> T:
    """Wait until the condition is truthy and return its value.

    Raises: TimeoutError, which says what was waited for (the description, or where the condition stands).
    """
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() >= deadline:
            waited_for = description or _describe(condition)
            raise TimeoutError(f"not within {timeout_s:g} s: {waited_for} (last value: {value!r})")
        time.sleep(interval_s)
    return value


def _describe(condition: Callable[[], object]) -> str:
    """Name a condition by its qualified name, file and line."""
    name = getattr(condition, "__qualname__", repr(condition))
    code = getattr(condition, "__code__", None)
    return f"{name} ({Path(code.co_filename).name}:{code.co_firstlineno})" if code else name


def free_port(host: str = LOOPBACK) -> int:
    """Return a TCP port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _is_free(host: str, port: int) -> bool:
    """Return whether a server could listen there; old connections that still fade away don't matter."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):
            probe.bind((host, port))
            return True
    return False


def reachable(host: str) -> str:
    """Return the address under which this machine reaches a server bound to the host."""
    return LOOPBACK if host in {"0.0.0.0", "::", ""} else host


# --- child processes that die with us -----------------------------------------------------------------------


class ServerUnavailable(RuntimeError):
    """No usable binary of this server on this machine; the message says how to get one."""


class ServerFailed(RuntimeError):
    """The server was found but ended at its start; the message has the end of its log."""


# Runs in the child before its exec: PR_SET_PDEATHSIG (1) with SIGKILL, which reaches a paused server too.
# A preexec_fn would run in a copy of this process, where a lock held by another thread stays locked for ever.
_DIE_WITH_PARENT: Final = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""

# The signal comes when the *thread* that made the child ends, so one thread makes all of them and never ends.
_spawner: Final = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")


def spawn(
    command: list[str], output: Path, environment: Mapping[str, str] | None = None, directory: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own, output appended to a file; on Linux it is killed when we end."""
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
    """A server as a child process, on the same port and data over restarts; a context manager."""

    name: ClassVar[str] = "server"
    start_timeout_s: ClassVar[float] = START_TIMEOUT_S

    def __init__(self, port: int = 0, host: str = LOOPBACK, directory: Path | None = None) -> None:
        """Choose port and directory; a directory that isn't given is a temporary one, removed by `close`."""
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
        """The URL under which clients reach the server."""
        raise NotImplementedError

    @property
    def address(self) -> str:
        """Host and port as a client on this machine needs them."""
        return f"{reachable(self.host)}:{self.port}"

    @property
    def log(self) -> Path:
        """The file that the server's output goes to."""
        return self.directory / f"{self.name}.log"

    @property
    def pid(self) -> int | None:
        """The process id while the server runs, else None."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def is_running(self) -> bool:
        """Whether the process is alive (a paused one is)."""
        return self.pid is not None

    def start(self: ServerType) -> ServerType:
        """Start the server and wait until it answers; does nothing when it runs.

        Raises: ServerUnavailable, ServerFailed, TimeoutError.
        """
        if not self.is_running:
            if not _is_free(self.host, self.port):
                raise ServerFailed(f"{self.name} can't start: port {self.port} is taken")
            self._process = spawn(self._command(), self.log)
            description = f"{self.name} answers at {self.address}"
            poll(self._answers_or_ended, self.start_timeout_s, description=description)
            self._prepare()
        return self

    def stop(self) -> None:
        """End the server in an orderly way, by force when that takes too long."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Freeze the server: connections stay open and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused server go on."""
        self._signal(signal.SIGCONT)

    def restart(self: ServerType, crash: bool = False) -> ServerType:
        """Stop (or kill) the server and start it again on the same data."""
        if crash:
            self.kill()
        else:
            self.stop()
        return self.start()

    def close(self) -> None:
        """Stop the server and remove its temporary directory; harmless in a forked child."""
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

    def _answers(self) -> bool:
        """Return whether the server answers a ping of its own protocol."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """Bring a server that answers into the state that was asked for."""

    def _answers_or_ended(self) -> bool:
        """Return whether the server answers; raises ServerFailed as soon as its process has ended."""
        if not self.is_running:
            tail = self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""
            raise ServerFailed(f"{self.name} ended at its start on port {self.port}:\n{tail}")
        return self._answers()

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to a running server."""
        if self._process and self._process.poll() is None:
            self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        """Send the signal, wake a paused process so that it sees it, and wait for the end."""
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
