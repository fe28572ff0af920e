"""Fixtures: one set of real servers a session, a database, a queue and an API of its own for each test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fakeredis
import mongomock
import pytest
from mongomock.gridfs import enable_gridfs_integration
from redis import Redis

import worker
from testbed.api import Api, WorkerProcess
from testbed.processes import Server, ServerUnavailable
from testbed.provider import Provider
from testbed.servers import MongoServer, RedisServer

# Settings of whoever runs the tests must not reach the workers that they start.
FOREIGN_SETTINGS = (
    *("OPENAI_", "TEXT_", "IMAGE_", "AUDIO_", "CELERY_", "MONGODB_", "REDIS_", "AWS_ACCESS", "S3_"),
    *("WORKER_", "ARTIFACT_", "HANDLER_MODULES", "DEBUG"),
)


def start(server: Server) -> Iterator[Server]:
    """Starts a real server. One that can't be had fails in CI and skips elsewhere, saying how to get it."""
    try:
        server.start()
    except ServerUnavailable as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    yield server
    server.close()


@pytest.fixture(scope="session", autouse=True)
def clean_environment() -> None:
    for name in list(os.environ):
        if name.startswith(FOREIGN_SETTINGS):
            del os.environ[name]


@pytest.fixture(scope="session")
def mongo_server() -> Iterator[MongoServer]:
    if url := os.environ.get("TEST_MONGODB_URL"):
        yield ExternalServer(url)  # type: ignore[misc]
    else:
        yield from start(MongoServer(replica_set=True))  # type: ignore[misc]


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    if url := os.environ.get("TEST_REDIS_URL"):
        yield ExternalServer(url)  # type: ignore[misc]
    else:
        yield from start(RedisServer())  # type: ignore[misc]


class ExternalServer:
    """A server that was running already: only its address is known."""

    def __init__(self, url: str) -> None:
        self.url = url


@pytest.fixture(scope="session")
def running_provider() -> Iterator[Provider]:
    with Provider() as provider:
        yield provider


@pytest.fixture
def provider(running_provider: Provider) -> Provider:
    running_provider.clear()
    return running_provider


def worker_settings(
    mongo_server: MongoServer, redis_server: RedisServer, provider: Provider, name: str
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
    """The API's side of these settings; what it made in the database is dropped at the end."""
    names = ("MONGODB_URL", "REDIS_URL", "DATABASE_NAME", "CELERY_QUEUE_NAME")
    api = Api(*(environment[name] for name in names), broker_url=environment.get("CELERY_BROKER_URL", ""))
    try:
        yield api
        for collection in api.database.list_collection_names():
            api.database.drop_collection(collection)
    finally:
        api.close()


@pytest.fixture
def environment(
    mongo_server: MongoServer, redis_server: RedisServer, provider: Provider, request: pytest.FixtureRequest
) -> dict[str, str]:
    """The environment of a worker that works in this test's own database and queue, with short waits."""
    name = f"t{abs(hash(request.node.nodeid)) % 10**10}"
    return worker_settings(mongo_server, redis_server, provider, name)


@pytest.fixture
def api(environment: dict[str, str]) -> Iterator[Api]:
    with open_api(environment) as api:
        yield api


StartWorker = Callable[..., WorkerProcess]


@pytest.fixture
def start_worker(environment: dict[str, str], tmp_path: Path) -> Iterator[StartWorker]:
    """Starts worker processes, ready to take jobs; keyword arguments are settings. Each is killed at the end."""
    started: list[WorkerProcess] = []

    def start_one(*, command: list[str] | None = None, ready: bool = True, **settings: str) -> WorkerProcess:
        worker = WorkerProcess({**environment, **settings}, tmp_path / f"worker-{len(started)}.log", command)
        started.append(worker)
        return worker.wait_ready() if ready else worker

    yield start_one
    for process in started:
        process.kill()


# In-process use: the worker's parts in the test's own process.


@pytest.fixture
def settings(environment: dict[str, str]) -> worker.Settings:
    """The settings of `environment`, whatever the variables and the `.env` around the tests say."""
    return worker.Settings(_env_file=None, **{name.lower(): value for name, value in environment.items()})


def adopt(runtime: worker.Runtime, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Makes the runtime the task's own, with no shutdown announced and its heartbeat in the test's folder."""
    monkeypatch.setattr(worker, "SHUTDOWN", worker.ShutdownTime())
    monkeypatch.setattr(worker.process_job, "runtime", runtime, raising=False)
    heartbeat = worker.Heartbeat(folder / "heartbeat")
    runtime.keeper = worker.Keeper(runtime.store, runtime.sweeper, worker.SHUTDOWN, heartbeat, runtime.settings)


@pytest.fixture
def runtime(
    settings: worker.Settings, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[worker.Runtime]:
    """What one worker process works with, on real MongoDB and Redis. Its keeper ticks only when told to.

    What it stored is deleted at the end, which is quicker than to drop the database.
    """
    worker.app.conf.update(broker_read_url=redis_server.url, broker_write_url=redis_server.url)
    assert worker.app.conf.task_acks_late  # read for the first time it configures the app
    worker.app.backend_cls = redis_server.url
    runtime = worker.Runtime(settings)
    adopt(runtime, monkeypatch, tmp_path)
    yield runtime
    for collection in runtime.database.list_collection_names():
        runtime.database[collection].delete_many({})
    runtime.mongo.close()
    with Redis.from_url(redis_server.url) as client:
        client.delete(settings.celery_queue_name, f"artifact_sweep:{settings.database_name}")


@pytest.fixture
def light_runtime(provider: Provider, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> worker.Runtime:
    """The same on mongomock and fakeredis, for what these can stand for: shapes and decisions, no races."""
    enable_gridfs_integration()
    settings = worker.Settings(_env_file=None, openai_base_url=provider.url, openai_api_key="sk-test-planted-key")
    runtime = worker.Runtime(settings, mongomock.MongoClient())
    runtime.notifier = worker.Notifier(fakeredis.FakeRedis())
    adopt(runtime, monkeypatch, tmp_path)
    return runtime
