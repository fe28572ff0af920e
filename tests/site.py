"""What tests of whole processes share: a running worker, the API in front of it, the provider behind it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import gridfs
import pytest
from bson import ObjectId

from conftest import start
from testbed.api import Api, WorkerProcess
from testbed.processes import Server, poll
from testbed.provider import Provider
from testbed.servers import ReplicaSet
from tests.lab import AUDIO, IMAGE, SOURCE, TEXT

# Kept from one run to the next, in the user's cache.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ai-backend-worker-tests"
POOLS = ("prefork", "threads", "solo")
JOBS: dict[str, dict[str, Any]] = {
    TEXT: {"prompt": "Generate a story about AI", "max_tokens": 200},
    IMAGE: {"prompt": "A futuristic city", "size": "512x512"},
    AUDIO: {"text": "Hello world", "voice": "default"},
}
REFUSED = "The provider refused this request. Change the input and try again."
CELERY_COMMAND = ("-m", "celery", "-A", "worker", "worker")  # a worker that Celery's own command line starts

in_each_pool = pytest.mark.parametrize("site", POOLS, indirect=True)
for_each_pool = pytest.mark.parametrize("pool", POOLS)
of_each_type = pytest.mark.parametrize("job_type", JOBS)


@dataclass(frozen=True)
class Site:
    """A running worker, the API in front of it, the provider behind it."""

    api: Api
    worker: WorkerProcess
    provider: Provider
    environment: dict[str, str]
    log_start: int = 0

    @property
    def pool(self) -> str:
        return self.environment["WORKER_POOL"]

    def log(self) -> str:
        """The worker's log since the test began."""
        return self.worker.text()[self.log_start :]

    def wait_log(self, text: str, timeout_s: float = 20) -> None:
        poll(lambda: text in self.log(), timeout_s, description=f"{text!r} in the log")

    def wait_call(self, prompt: str, count: int = 1, timeout_s: float = 20) -> None:
        """Waits until the provider has been asked for this so many times."""
        poll(lambda: len(self.provider.calls_for(prompt)) >= count, timeout_s, description=f"{count} calls: {prompt}")

    def goes_on(self) -> bool:
        """Whether the worker completes the next job. With one slot, all that it did before is over then."""
        job = self.api.text(f"the next job {ObjectId()}")
        return bool(self.api.wait_notice(job, "completed", timeout_s=30))


SiteOf = Callable[[str], Site]
Startable = TypeVar("Startable", bound=Server | ReplicaSet)


@contextmanager
def running(server: Startable) -> Iterator[Startable]:
    """Starts a server of a test's own, and closes it. One that can't be had fails in CI, and skips elsewhere."""
    with contextmanager(start)(cast(Server, server)):
        yield server


def artifacts(api: Api) -> gridfs.GridFS:
    return gridfs.GridFS(api.database, collection="artifacts")


def run_python(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python …` to its end, in a folder without `.env`."""
    command, variables = [sys.executable, *arguments], {**os.environ, "PYTHONPATH": str(SOURCE), **environment}
    return subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, timeout=100)


def run_worker(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python worker.py …` to its end."""
    return run_python(environment, folder, str(SOURCE / "worker.py"), *arguments)


# A MongoDB that is away is looked for as long as the command's patience lasts, which need not be long in a test.
IMPATIENT = """
import contextlib, sys
import worker, worker_commands.check

worker.Runtime.mongodb_timeout_s = 1.0
worker_commands.check.CHECK_TIMEOUT_S = 1
*others, last = sys.argv[1:]
for command in others:
    with contextlib.suppress(SystemExit):
        worker.main([command])
worker.main([last])
"""


def run_impatiently(environment: dict[str, str], folder: Path, *commands: str) -> subprocess.CompletedProcess[str]:
    """Runs commands of the worker one after the other, with little patience for servers that are away.

    They run in one process, whose exit code is that of the last one.
    """
    return run_python(environment, folder, "-c", IMPATIENT, *commands)


def an_hour_ago() -> datetime:
    return datetime.now(UTC) - timedelta(hours=1)


def lease(**other: object) -> dict[str, Any]:
    """The bookkeeping of a job that a worker elsewhere holds, with some of it replaced."""
    now = datetime.now(UTC)
    times = {"lease_until": now + timedelta(hours=1), "deadline": now + timedelta(hours=1), "first_started_at": now}
    return {"owner": "elsewhere", "node": "elsewhere", "pid": 1, "attempt": 1, "limits": [30, 20], **times, **other}


def insert_processing(api: Api, prompt: str, **fields: object) -> ObjectId:
    """Inserts a text job that is processing, and sends no message."""
    return api.insert(TEXT, {"prompt": prompt}, status="processing", **fields)


@contextmanager
def events_of(api: Api) -> Iterator[list[dict[str, Any]]]:
    """Collects the events that workers send, in a thread. It begins when the first one has come, a heartbeat."""
    events: list[dict[str, Any]] = []
    with api.celery.connection_for_read() as connection:
        receiver: Any = api.celery.events.Receiver(connection, handlers={"*": events.append})
        thread = threading.Thread(target=list, args=(receiver.consume(wakeup=False, safety_interval=0.1),), daemon=True)
        thread.start()

        def is_connected() -> bool:
            api.celery.control.broadcast("heartbeat")  # asks the workers for one
            return bool(events)

        try:
            poll(is_connected, 30, interval_s=0.1, description="a worker's heartbeat")
            yield events
        finally:
            receiver.should_stop = True
            thread.join(10)
