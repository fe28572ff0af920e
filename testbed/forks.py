"""Workers that start in a fraction of the time: forks of a process that has imported the worker's libraries.

Half of a worker's start is spent on imports, and the tests start some two hundred workers. `python -m testbed.forks`
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
import types
import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import connection as multiprocessing_connection
from pathlib import Path
from typing import Final

from testbed.processes import SOURCE, START_TIMEOUT_S, ServerFailed, poll, spawn

WORKER: Final = SOURCE / "worker.py"
NUMBER: Final = struct.Struct("!i")  # a process id, then an exit code

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
    """Let the kernel kill this process when its parent ends (prctl 1 is PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def accept_in_fork(listener: socket.socket) -> socket.socket:
    """Fork for each connection. It returns in the forks alone, with the connection."""
    template = os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that the kernel forgets forks that have ended
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
    """Fork, and tell the client the fork's process id and, once it has ended, its exit code. Only the fork returns."""
    parent = os.getpid()
    if pid := os.fork():
        client.sendall(NUMBER.pack(pid))
        client.sendall(NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
        os._exit(0)
    client.close()
    die_with(parent)


def take_on(command: list[str], environment: Mapping[str, str], output: str, directory: str) -> None:
    """Make this process what `spawn` would have started: a session, an environment, a folder, an output file."""
    os.setsid()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    folders = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:1] = [str(SOURCE), *folders]
    sys.argv[:] = command


def run_template(address: str) -> None:
    """Import the libraries, then serve forks at this Unix socket. Each fork returns here and runs its program."""
    for name in LIBRARIES.split():
        importlib.import_module(name)
    compiled = {str(WORKER): compile(WORKER.read_bytes(), WORKER, "exec")}
    gc.freeze()  # else each fork's garbage collection would copy the memory of all that was imported
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.new")
        listener.listen(64)
        os.rename(f"{address}.new", address)  # whoever sees it there can connect
        client = accept_in_fork(listener)
    with client.makefile() as request:
        wanted = json.load(request)
    fork_and_report(client)
    take_on(**wanted)
    program = sys.argv[0]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    main.__file__ = program
    exec(compiled.get(program) or compile(Path(program).read_bytes(), program, "exec"), vars(main))


# --- the process that asks for forks ------------------------------------------------------------------------


class ForkedProcess:
    """A process that was forked, with the methods of subprocess.Popen that the tests use."""

    def __init__(self, client: socket.socket) -> None:
        """Take the connection on which the fork's process id has been asked for.

        Raises: ServerFailed, when the process that forks is gone.
        """
        self._client = client
        weakref.finalize(self, client.close)  # not before, since several threads may wait
        self.returncode: int | None = None
        if not (reply := client.recv(NUMBER.size)):
            raise ServerFailed("the process that forks workers has ended")
        self.pid: int = NUMBER.unpack(reply)[0]

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code. Raises: subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not multiprocessing_connection.wait([self._client], timeout):
                raise subprocess.TimeoutExpired(str(WORKER), timeout or 0)
            reply = self._client.recv(NUMBER.size, socket.MSG_PEEK)  # left there for other threads that wait
            self.returncode = NUMBER.unpack(reply)[0] if reply else -signal.SIGKILL
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


@cache
def template_of(owner: int) -> str:
    """Start the process that forks for this process, and return its address. It ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="testbed-forks-"))
    address, log = folder / "socket", folder / "log"
    template = spawn([sys.executable, "-m", "testbed.forks", str(address)], log, directory=SOURCE)

    def close() -> None:
        if os.getpid() != owner:  # a fork of it ends
            return
        template.kill()
        template.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(close)
    poll(lambda: address.exists() or template.poll() is not None, START_TIMEOUT_S, description="workers can be forked")
    if template.poll() is not None:
        raise ServerFailed(f"the process that forks workers has ended:\n{log.read_text()}")
    return str(address)


def read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that take effect before worker.py runs.

    The loader and the interpreter read them when they start, and OpenSSL when aiohttp is imported.
    """
    prefixes, own = ("LD_", "PYTHON", "SSL_"), "PYTHONPATH"  # the fork reads this one itself
    return {name: value for name, value in environment.items() if name.startswith(prefixes) and name != own}


def can_fork(environment: Mapping[str, str]) -> bool:
    """Return whether a fork of this interpreter would be the same as a new process with this environment."""
    return sys.platform == "linux" and read_at_start(environment) == read_at_start(os.environ)


def fork(command: Sequence[str], output: Path, environment: Mapping[str, str], directory: Path) -> ForkedProcess:
    """Start `python worker.py …`, or another program, in a session of its own, and append its output to a file.

    It ends with this process, as everything does that `spawn` starts.
    """
    output.touch()
    client = socket.socket(socket.AF_UNIX)
    client.connect(template_of(os.getpid()))
    process = {"command": command, "environment": dict(environment)}
    client.sendall(json.dumps({**process, "output": str(output), "directory": str(directory)}).encode())
    client.shutdown(socket.SHUT_WR)
    return ForkedProcess(client)


if __name__ == "__main__":
    run_template(sys.argv[1])
