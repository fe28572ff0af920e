"""What tests of whole processes share: a running worker, the API in front of it, the provider behind it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import gridfs
import pytest
from bson import ObjectId

from testbed.api import Api, WorkerProcess
from testbed.forks import WORKER, can_fork, fork
from testbed.processes import SOURCE, Server, ServerUnavailable, current_environment, poll
from testbed.provider import Provider
from testbed.servers import MongoServer, RedisServer, ReplicaSet
from tests.lab import AUDIO, IMAGE, TEXT, ago

# Kept from one run to the next, in the user's cache.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ai-backend-worker-tests"
POOLS = ("prefork", "threads", "solo")
JOBS: dict[str, dict[str, Any]] = {
    TEXT: {"prompt": "Generate a story about AI", "max_tokens": 200},
    IMAGE: {"prompt": "A futuristic city", "size": "512x512"},
    AUDIO: {"text": "Hello world", "voice": "default"},
}
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


StartWorker = Callable[..., WorkerProcess]
SiteOf = Callable[[str], Site]
Startable = TypeVar("Startable", bound=Server | ReplicaSet)


@contextmanager
def skipping_outside_ci() -> Iterator[None]:
    """A server that can't be had fails in CI, and skips elsewhere with a sentence on how to get it."""
    try:
        yield
    except ServerUnavailable as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def start(server: Server) -> Iterator[Server]:
    """Starts a real server. One that can't be had fails in CI, and skips elsewhere."""
    with skipping_outside_ci():
        server.start()
    yield server
    server.close()


@contextmanager
def running(server: Startable) -> Iterator[Startable]:
    """Starts a server of a test's own, and closes it. One that can't be had fails in CI, and skips elsewhere."""
    with contextmanager(start)(cast(Server, server)):
        yield server


def worker_settings(
    mongo_server: MongoServer | ReplicaSet, redis_server: RedisServer, provider: Provider, name: str
) -> dict[str, str]:
    """The environment of a worker that works in a database and a queue of this name, with short waits."""
    return {
        "MONGODB_URL": mongo_server.url,
        "DATABASE_NAME": f"test_{name}",
        "REDIS_URL": redis_server.url,
        "CELERY_QUEUE_NAME": f"queue_{name}",
        "OPENAI_BASE_URL": provider.url,
        "OPENAI_API_KEY": "sk-test-planted-key",
        "AUDIO_FORMAT": "wav",
        "RETRY_DELAYS": "0.5,0.5,0.5",
        "LEASE_SECONDS": "6",
        "SWEEP_INTERVAL": "1",
    }


@contextmanager
def open_api(environment: dict[str, str]) -> Iterator[Api]:
    """The API's side of these settings. What it made in the database is dropped at the end."""
    mongodb_url, redis_url, database, queue = map(
        environment.__getitem__, ("MONGODB_URL", "REDIS_URL", "DATABASE_NAME", "CELERY_QUEUE_NAME")
    )
    api = Api(mongodb_url, redis_url, database, queue, environment.get("CELERY_BROKER_URL", ""))
    try:
        yield api
        for collection in api.database.list_collection_names():
            api.database.drop_collection(collection)
    finally:
        api.close()


def artifacts(api: Api) -> gridfs.GridFS:
    return gridfs.GridFS(api.database, collection="artifacts")


def run_python(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python …` to its end, in a folder without `.env`."""
    command = [sys.executable, *arguments]
    variables = {**current_environment(), "PYTHONPATH": str(SOURCE), **environment}
    return subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, timeout=100)


def run_worker(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python worker.py …` to its end."""
    return run_python(environment, folder, str(WORKER), *arguments)


def run_forked(
    environment: dict[str, str], folder: Path, *arguments: str, program: Path = WORKER
) -> subprocess.CompletedProcess[str]:
    """Does the same in less time where it can."""
    variables, command = {**current_environment(), **environment}, [str(program), *arguments]
    if not can_fork(variables):
        return run_python(environment, folder, *command)
    output, errors = (folder / f"{ObjectId()}.txt" for _ in range(2))
    process = fork(command, output, variables, folder, errors)
    try:
        exit_code = process.wait(100)
        return subprocess.CompletedProcess(command, exit_code, output.read_text(), errors.read_text())
    finally:
        process.kill()


# A MongoDB that is away is looked for as long as the command's patience lasts, which need not be long in a test.
IMPATIENT = """
import contextlib, sys
import worker, worker_commands.findings

worker.Runtime.mongodb_timeout_s = 1.0
worker_commands.findings.CHECK_TIMEOUT_S = 1
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
    (folder / "impatient_commands.py").write_text(IMPATIENT)
    return run_forked(environment, folder, *commands, program=folder / "impatient_commands.py")


def lease(**other: object) -> dict[str, Any]:
    """The bookkeeping of a job that a worker elsewhere holds, with some of it replaced."""
    now = ago(0)
    times = {"lease_until": now + timedelta(hours=1), "deadline": now + timedelta(hours=1), "first_started_at": now}
    return {"owner": "elsewhere", "node": "elsewhere", "pid": 1, "attempt": 1, "limits": [30, 20], **times, **other}


def insert_processing(api: Api, prompt: str, **fields: object) -> ObjectId:
    """Inserts a text job that is processing, and sends no message. It started when its bookkeeping says so."""
    own = fields.get("worker")
    if isinstance(own, dict) and "first_started_at" in own:
        fields = {"started_at": own["first_started_at"], **fields}
    return api.insert(TEXT, {"prompt": prompt}, status="processing", **fields)


# kombu keeps the fanout queues of all connections of a process in one dictionary. A listener that ends goes through
# it and deletes its own queue at the broker. A listener of another thread must not begin meanwhile.
_fanout_lock = threading.Lock()


def _listen(receiver: Any) -> None:
    """Hands events to the receiver's handlers until it should stop."""
    stack = ExitStack()
    with _fanout_lock:
        connection, _channel, _consumers = stack.enter_context(receiver.consumer_context(wakeup=False))
    try:
        while not receiver.should_stop:
            with suppress(TimeoutError):
                connection.drain_events(timeout=0.1)
    finally:
        with _fanout_lock:
            stack.close()


@contextmanager
def events_of(api: Api) -> Iterator[list[dict[str, Any]]]:
    """Collects the events that workers send, in a thread. It begins when the first one has come, a heartbeat."""
    events: list[dict[str, Any]] = []
    with api.celery.connection_for_read() as connection:
        receiver: Any = api.celery.events.Receiver(connection, handlers={"*": events.append})
        thread = threading.Thread(target=_listen, args=(receiver,), daemon=True)
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
