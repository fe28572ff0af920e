"""Fixtures for test_worker.py and tests/: real servers, one set a session, and fakes for what needs no server."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mongomock
import pymongo
import pytest
import redis
from mongomock.gridfs import enable_gridfs_integration
from pydantic import BaseModel

import worker
import workerkit.logs
import workerkit.process
from testbed.api import Api, WorkerProcess, remove_foreign_settings
from testbed.provider import Provider
from testbed.servers import MongoServer, RedisServer
from tests.lab import TEXT, Notices, SetHandler, adopt, all_collected, bare_settings
from tests.site import StartWorker, open_api, start, worker_settings
from worker_commands.demo import embedded_redis
from workerkit.settings import Settings

SERVER_FIXTURES = {"mongo_server", "redis_server"}
# These files take longest, in this order, so they begin first. One that began last would run alone.
LONGEST = """
model_servers rabbitmq_outages secrets model metrics elections redis_outages browser redis_rights command_line
mongodb_outages jobs status report contract chaos hostile_providers hostile_messages health shutdown_in_trouble
celery_view commands rabbitmq broker clocks recovery worker shutdown
"""
LONGEST_FILES = [f"test_{name}.py" for name in LONGEST.split()]


def rank(item: pytest.Item) -> int:
    """The place of the item's file in the order: the longest first, the others in the order in which they are."""
    name = item.path.name
    return LONGEST_FILES.index(name) if name in LONGEST_FILES else len(LONGEST_FILES)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what needs a real server, so that `make test-fast` can leave it out. Sorts the longest files first."""
    for item in items:
        if SERVER_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("servers")
    items.sort(key=rank)


def pytest_collection_finish() -> None:
    all_collected.set()


@pytest.fixture(scope="session", autouse=True)
def mongomock_with_bulk_writes() -> Iterator[None]:
    """mongomock (4.3) doesn't know an argument of today's pymongo, and would keep the caller's own values."""
    builder: Any = mongomock.collection.BulkOperationBuilder
    add_update = builder.add_update

    def add(self: Any, selector: Any, doc: Any, *args: Any, sort: Any = None, **options: Any) -> None:
        add_update(self, selector, copy.deepcopy(doc), *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "add_update", add)
        yield


@pytest.fixture(scope="session", autouse=True)
def clean_environment() -> None:
    remove_foreign_settings()


# ── real servers ─────────────────────────────────────────────────────────────────────────────────────────────────


class ExternalServer:
    """A server that was running already. Only its address is known."""

    def __init__(self, url: str) -> None:
        self.url = url


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


@pytest.fixture(scope="session")
def running_provider() -> Iterator[Provider]:
    with Provider() as provider:
        yield provider


@pytest.fixture
def provider(running_provider: Provider) -> Provider:
    """A scripted provider in this process, reached over HTTP."""
    running_provider.clear()
    return running_provider


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────


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


@pytest.fixture
def start_worker(environment: dict[str, str], tmp_path: Path) -> Iterator[StartWorker]:
    """Starts worker processes, ready to take jobs. Keyword arguments are settings. Each is killed at the end."""
    started: list[WorkerProcess] = []

    def start_one(*, command: list[str] | None = None, ready: bool = True, **settings: str) -> WorkerProcess:
        process = WorkerProcess({**environment, **settings}, tmp_path / f"worker-{len(started)}.log", command)
        started.append(process)
        return process.wait_ready() if ready else process

    yield start_one
    for process in started:
        process.kill()


# ── the worker's parts in this process ───────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def shared_database(mongo_server: MongoServer) -> Iterator[str]:
    """One database for all runtimes of this process. A test empties it, which takes less time than to drop it."""
    yield (name := f"test_in_process_{os.getpid()}")
    with pymongo.MongoClient[Any](mongo_server.url) as client:
        client.drop_database(name)


@pytest.fixture
def settings(environment: dict[str, str], shared_database: str) -> Settings:
    values: dict[str, Any] = {name.lower(): value for name, value in environment.items()}
    return bare_settings(**{**values, "database_name": shared_database})


@pytest.fixture
def runtime(settings: Settings, tmp_path: Path) -> Iterator[worker.Runtime]:
    """What one worker process works with, on real MongoDB and Redis."""
    runtime = adopt(worker.Runtime(settings), tmp_path)
    yield runtime
    for collection in runtime.database.list_collection_names():
        runtime.database[collection].delete_many({})
    runtime.redis.delete(settings.celery_queue_name)
    runtime.close()


@pytest.fixture(scope="session")
def fake_redis_url() -> Iterator[str]:
    with embedded_redis() as url:
        yield url


@pytest.fixture
def light_runtime(fake_redis_url: str, provider: Provider, tmp_path: Path) -> Iterator[worker.Runtime]:
    """The same on mongomock and fakeredis, which stand for shapes and decisions, but not for races."""
    enable_gridfs_integration()  # type: ignore[no-untyped-call]
    settings = bare_settings(
        redis_url=fake_redis_url, openai_base_url=provider.url, openai_api_key="sk-test-planted-key", audio_format="wav"
    )
    runtime = adopt(worker.Runtime(settings, mongomock.MongoClient()), tmp_path)
    yield runtime
    runtime.redis.flushall()
    runtime.close()


@pytest.fixture
def notices(runtime: worker.Runtime) -> Iterator[Notices]:
    """What the runtime publishes for the API."""
    with redis.Redis.from_url(runtime.settings.redis_url.get_secret_value()) as client:
        notices = Notices(client)
        yield notices
        notices.close()


@pytest.fixture
def handler(monkeypatch: pytest.MonkeyPatch) -> SetHandler:
    """Makes a function the handler of text jobs."""

    class Anything(BaseModel):
        prompt: str = ""

    monkeypatch.setattr(worker, "HANDLERS", dict(worker.HANDLERS))
    return lambda run: worker.HANDLERS.update({TEXT: worker.Handler(run, Anything, "text")})


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The worker's monotonic clock, to be set by hand."""
    now = [1000.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], time=time.time, sleep=time.sleep)
    for module in (worker, workerkit.logs, workerkit.process):
        monkeypatch.setattr(module, "time", clock)
    return now
