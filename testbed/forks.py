"""Workers that start in a fraction of the time: forks of a process that has imported the worker's libraries.

Most of a worker's start is spent on imports, and the tests start some two hundred workers. `python -m testbed.forks`
makes the imports once. For each worker it forks twice: the first fork is the worker's parent, which reports how the
worker ended, and the second one runs worker.py from its first line, as `python worker.py` does.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import types
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing import connection as multiprocessing_connection
from pathlib import Path
from typing import Final

from testbed.processes import SOURCE, START_TIMEOUT_S, ServerFailed, current_environment, poll, spawn

WORKER: Final = SOURCE / "worker.py"
MESSAGE: Final = struct.Struct("!ci")  # what a number is, and the number
STARTED, ENDED = b"s", b"e"  # with the process id, and with the exit code

# What the worker and its commands import, but nothing that makes a Celery app. What is missing here only costs time.
LIBRARIES: Final = """
aiohttp billiard.popen_fork billiard.sharedctypes celery.app.control celery.app.events celery.app.log
celery.apps.worker celery.backends.redis celery.bin.celery celery.bin.worker celery.concurrency.prefork
celery.concurrency.solo celery.concurrency.thread celery.events.state celery.fixups.django celery.worker.autoscale
celery.worker.components celery.worker.consumer celery.worker.strategy gridfs kombu.pidbox kombu.transport.pyamqp
kombu.transport.redis pydantic_settings pymongo rich.console rich.table workerkit.artifacts workerkit.broker
workerkit.inputs workerkit.logs workerkit.media workerkit.mongodb workerkit.process workerkit.provider
workerkit.settings
"""


# --- the process that forks ---------------------------------------------------------------------------------


def die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends (prctl 1 is PR_SET_PDEATHSIG).

    The parent has one thread. So it doesn't matter here that the signal comes when the thread ends that has forked.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def fork_for_each_connection(listener: socket.socket) -> socket.socket:
    """Fork for each connection. It returns in the forks alone, with the connection."""
    template = os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that ended forks don't stay as zombies
    while True:
        client, _ = listener.accept()
        if not os.fork():
            break
        client.close()
    listener.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    die_with(template)
    return client


def fork_and_report(client: socket.socket) -> None:
    """Fork, and send the client the exit code when the fork has ended. Only the fork returns.

    Its process id stays taken until the client has read the exit code, as with subprocess.Popen. So no signal of the
    client's can reach another process.
    """
    parent = os.getpid()
    if pid := os.fork():
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended
        exit_code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        client.sendall(MESSAGE.pack(ENDED, exit_code))
        client.recv(1)  # returns when the client writes no more
        os._exit(0)
    die_with(parent)


def become_spawned(
    command: list[str], environment: Mapping[str, str], output: str, errors: str, directory: str
) -> None:
    """Make this process what `spawn` would have started: a session, an environment, a folder, files for its output."""
    os.setsid()
    for descriptor, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    folders = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:1] = [str(SOURCE), *folders]
    sys.argv[:] = command


def compile_program(path: str) -> types.CodeType:
    """Compile a program as Python compiles its main module, without the `__future__` of this one."""
    return compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)


def run_template(address: str) -> None:
    """Import the libraries, then serve forks at this Unix socket. Each fork returns here and runs its program."""
    for name in LIBRARIES.split():
        importlib.import_module(name)
    assert "worker" not in sys.modules, "each fork has to make what belongs to a process"
    compiled = {str(WORKER): compile_program(str(WORKER))}
    gc.freeze()  # else each fork's garbage collection would copy the memory of all that was imported
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.new")
        listener.listen(64)
        os.rename(f"{address}.new", address)  # whoever sees it there can connect
        client = fork_for_each_connection(listener)
    with client.makefile() as lines:
        request = json.loads(lines.readline())
    fork_and_report(client)
    become_spawned(**request)
    client.sendall(MESSAGE.pack(STARTED, os.getpid()))
    client.close()
    program = sys.argv[0]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    main.__file__ = program
    exec(compiled.get(program) or compile_program(program), vars(main))


# --- the process that asks for forks ------------------------------------------------------------------------


class ForkedProcess:
    """A process that was forked, with the methods of subprocess.Popen that the tests use."""

    def __init__(self, command: Sequence[str], client: socket.socket) -> None:
        """Take the connection on which the fork has been asked for. Raises: ServerFailed, when there is none."""
        self.args = command
        self._client = client
        weakref.finalize(self, client.close)  # not before, since several threads may wait
        self.returncode: int | None = None
        message = client.recv(MESSAGE.size)
        if not message.startswith(STARTED):
            raise ServerFailed(f"{' '.join(command)} was not started")
        self.pid: int = MESSAGE.unpack(message)[1]

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code. Raises: subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not multiprocessing_connection.wait([self._client], timeout):
                raise subprocess.TimeoutExpired(list(self.args), timeout or 0)
            message = self._client.recv(MESSAGE.size, socket.MSG_PEEK)  # left there for other threads that wait
            self.returncode = MESSAGE.unpack(message)[1] if message else -signal.SIGKILL
            with contextlib.suppress(OSError):  # another thread was first
                self._client.shutdown(socket.SHUT_WR)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that take effect before a fork could set them, as far as the tests set any.

    The loader and the interpreter read them when they start, and OpenSSL when aiohttp is imported.
    """
    prefixes, own = ("LD_", "PYTHON", "SSL_"), "PYTHONPATH"  # a fork reads this one itself
    return {name: value for name, value in environment.items() if name.startswith(prefixes) and name != own}


class Template:
    """The process that forks, started when it is first needed. It ends with this process."""

    def __init__(self) -> None:
        """Start nothing."""
        self._lock = threading.Lock()
        self._folder: Path | None = None
        self._environment: dict[str, str] = {}

    def fits(self, environment: Mapping[str, str]) -> bool:
        """Return whether a fork would be the same as a new process with this environment."""
        started_with = self._environment if self._folder else current_environment()
        return sys.platform == "linux" and read_at_start(environment) == read_at_start(started_with)

    def connect(self) -> socket.socket:
        """Return a connection for which the template forks. Raises: ServerFailed, with the end of its log."""
        with self._lock:
            folder = self._folder = self._folder or self._start()
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(str(folder / "socket"))
        except OSError as error:
            client.close()
            log = (folder / "log").read_text(errors="replace")[-2000:]
            raise ServerFailed(f"the process that forks workers has ended:\n{log}") from error
        return client

    def _start(self) -> Path:
        """Start the process; return the folder of its socket and its log."""
        folder, owner = Path(tempfile.mkdtemp(prefix="testbed-forks-")), os.getpid()
        address = folder / "socket"
        self._environment = current_environment()
        process = spawn([sys.executable, "-m", "testbed.forks", str(address)], folder / "log", directory=SOURCE)

        def close() -> None:
            if os.getpid() == owner:  # and not in a fork of it, which has inherited this handler
                process.kill()
                process.wait()
                shutil.rmtree(folder, ignore_errors=True)

        atexit.register(close)
        poll(lambda: address.exists() or process.poll() is not None, START_TIMEOUT_S, description="a process to fork")
        return folder


TEMPLATE: Final = Template()


def can_fork(environment: Mapping[str, str]) -> bool:
    """Return whether a fork would be the same as a new process with this environment. Only Linux has forks here."""
    return TEMPLATE.fits(environment)


def fork(
    command: Sequence[str], output: Path, environment: Mapping[str, str], directory: Path, errors: Path | None = None
) -> ForkedProcess:
    """Start `python worker.py …`, or another program, in a session of its own, and append its output to a file.

    What it prints on stderr goes to a file of its own if one is given. The command begins with the program, without an
    interpreter in front. The process ends with this one, as everything does that `spawn` starts. Raises: ServerFailed.
    """
    output.touch()
    client = TEMPLATE.connect()
    files = {"output": str(output), "errors": str(errors or output), "directory": str(directory)}
    request = {"command": command, "environment": dict(environment), **files}
    client.sendall(json.dumps(request).encode() + b"\n")
    return ForkedProcess(command, client)


if __name__ == "__main__":
    run_template(sys.argv[1])
