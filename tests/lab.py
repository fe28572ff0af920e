"""What tests share: tables, settings and jobs in one line, and the ways to look at what the worker did."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from bson import ObjectId
from celery import uuid
from celery.result import denied_join_result

import worker
from testbed.answers import picture
from testbed.processes import poll
from testbed.provider import Provider
from worker import Attempt, Call, Job, NotClaimed, Reason, Result, Runtime, Sweeper
from workerkit.bookkeeping import Snapshot
from workerkit.inputs import check_input
from workerkit.messages import Delivery
from workerkit.process import Heartbeat
from workerkit.provider import Providers
from workerkit.settings import Limits, Settings
from workerkit.turns import EveryTurn

LIMITS = Limits(soft_s=90, hard_s=120)
DELIVERY = Delivery(LIMITS)
KEY = "sk-test-planted-key"
SECRET = "hunter2"
NOWHERE = "127.0.0.1:1"  # nothing listens on this port
TEXT, IMAGE, AUDIO = "text_generation", "image_generation", "audio_generation"
PNG = picture(8, 8)


def table(names: str, *rows: tuple[Any, ...]) -> pytest.MarkDecorator:
    """Parametrizes a test. Each row begins with its reason, which becomes the test's id."""
    return pytest.mark.parametrize(names, [pytest.param(*values, id=reason) for reason, *values in rows])


def bare_settings(**values: Any) -> Settings:
    """Settings from these values alone, whatever the environment says."""
    return Settings(_env_file=None, **values)


class Clock:
    """A clock that a test sets by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# ── jobs ─────────────────────────────────────────────────────────────────────────────────────────────────────────


all_collected = threading.Event()  # conftest.py sets it, so that tests can run


def ago(seconds: float) -> datetime:
    """The time so many seconds before now.

    A table's rows are made when the tests are collected, and a test may run many minutes later. A row that held a time
    would say another than it means, on a slow machine most of all. It holds an `Ago`.
    """
    if not all_collected.is_set():
        raise RuntimeError("tests are being collected: write Ago(…) into a table, or call ago() within the test")
    return datetime.now(UTC) - timedelta(seconds=seconds)


@dataclass(frozen=True)
class Ago:
    """The time so many seconds before `insert` or `change` writes it."""

    seconds: float


def reckoned(value: Any, now: datetime) -> Any:
    """The value with each `Ago` in it, and in the documents within it, as a time."""
    if isinstance(value, dict):
        return {name: reckoned(each, now) for name, each in value.items()}
    return now - timedelta(seconds=value.seconds) if isinstance(value, Ago) else value


def insert(runtime: Runtime, **fields: object) -> ObjectId:
    """Inserts a document as the API does. Fields replace the usual ones, or add to them."""
    now = ago(0)
    usual: dict[str, Any] = {"user_id": "user-1", "session_id": None, "job_type": TEXT, "status": "pending"}
    usual |= {"input_data": {"prompt": "Hello [tokens 3]"}, "created_at": now, "updated_at": now}
    inserted: ObjectId = runtime.database["jobs"].insert_one({**usual, **reckoned(fields, now)}).inserted_id
    return inserted


def insert_text(runtime: Runtime, prompt: str, **fields: object) -> ObjectId:
    """Inserts a text job with this prompt, which may hold directives for the provider."""
    return insert(runtime, input_data={"prompt": prompt}, **fields)


def read(runtime: Runtime, job_id: ObjectId) -> dict[str, Any]:
    document = runtime.database["jobs"].find_one({"_id": job_id})
    assert document
    return document


def change(runtime: Runtime, job_id: ObjectId, **fields: object) -> None:
    """Sets fields without the store. `worker__owner` stands for `worker.owner`."""
    paths = {name.replace("__", "."): value for name, value in reckoned(fields, ago(0)).items()}
    runtime.database["jobs"].update_one({"_id": job_id}, {"$set": paths})


def claim(runtime: Runtime, job_id: ObjectId | None = None, owner: str = "owner-1") -> Job:
    """Claims this job, or a new one."""
    job = runtime.store.claim(job_id or insert(runtime), owner, DELIVERY)
    assert isinstance(job, Job)
    return job


def kept(runtime: Runtime, owner: str = "owner-1") -> Attempt:
    """An attempt that the keeper looks after."""
    attempt = Attempt(claim(runtime, owner=owner), runtime.settings.lease_seconds)
    runtime.keeper.register(attempt)
    return attempt


def look(runtime: Runtime, job_id: ObjectId) -> Snapshot:
    job = runtime.store.look(job_id)
    assert job
    return job


def stale(runtime: Runtime) -> list[ObjectId]:
    """The ids of the jobs that a sweep finds."""
    return [job.id for job in runtime.store.find_stale()]


def first_started(seconds: float) -> dict[str, Ago]:
    """The fields of a job whose first attempt began so many seconds ago."""
    at = Ago(seconds)
    return {"started_at": at, "worker__first_started_at": at}


def why_not(runtime: Runtime, job_id: ObjectId, owner: str = "another") -> Reason:
    """Tries to claim the job, and returns why that was refused."""
    refused = runtime.store.claim(job_id, owner, DELIVERY)
    assert isinstance(refused, NotClaimed)
    return refused.reason


def some_job(**fields: Any) -> Job:
    """A job that is in no database."""
    usual = {"id": ObjectId(), "job_type": TEXT, "user_id": "user-1", "session_id": "s-1"}
    usual |= {"input_data": {"prompt": "planted prompt"}, "owner": "owner-1", "attempt": 1, "limits": LIMITS}
    return Job(**{**usual, "first_started_at": ago(0), **fields})


# ── handlers ─────────────────────────────────────────────────────────────────────────────────────────────────────


def serving(provider: Provider, **values: Any) -> Settings:
    """Settings with this provider for every kind of job."""
    return bare_settings(**{"openai_base_url": provider.url, "audio_format": "wav", **values})


def generate(job_type: str, input_data: object, settings: Settings, pieces: list[str] | None = None) -> Result:
    """Runs a handler as the worker does: the input is checked, and the provider is reached over HTTP."""
    handler = worker.find_handler(job_type)
    inputs = check_input(handler.input_model, input_data)

    async def call() -> Result:
        provider = Providers(settings).get(handler.provider)
        progress = (pieces if pieces is not None else []).append
        try:
            defaults = await provider.with_model(settings.provider(handler.provider))
            return await handler.run(Call(some_job(), inputs, settings, provider, defaults, progress))
        finally:
            await provider.close()

    return asyncio.run(call())


# ── messages and notifications ───────────────────────────────────────────────────────────────────────────────────


def deliver(runtime: Runtime, *args: object, timelimit: object = None, **kwargs: object) -> Any:
    """Runs the task as Celery does for one message. A lone id stands for the contract's two arguments.

    As in a worker, nothing waits for a task's result. Otherwise a retry would subscribe to the result in the Redis that
    the first such test of this process had, which may be gone.
    """
    if len(args) == 1 and isinstance(args[0], ObjectId):
        args = (str(args[0]), {"job_id": str(args[0])})
    task: Any = worker.process_job
    route = {"exchange": "", "routing_key": runtime.settings.celery_queue_name}
    request = {"id": uuid(), "called_directly": False, "timelimit": timelimit, "delivery_info": route, "retries": 0}
    task.push_request(**request, args=args, kwargs=kwargs)
    try:
        with denied_join_result():
            return task.run(*args, **kwargs)
    finally:
        task.pop_request()


def deliver_in_thread(runtime: Runtime, job_id: ObjectId, provider: Provider) -> Future[Any]:
    """Runs the task in a thread. Returns once the provider works on it."""
    threads = ThreadPoolExecutor(1)
    delivered = threads.submit(deliver, runtime, job_id)
    threads.shutdown(wait=False)
    poll(lambda: provider.running, 10)
    return delivered


def queued(runtime: Runtime) -> list[dict[str, Any]]:
    """The messages in the runtime's queue on Redis, the oldest first: task id, arguments and limits of each."""
    raw: Any = runtime.redis.lrange(runtime.settings.celery_queue_name, 0, -1)
    messages = [json.loads(one) for one in reversed(raw)]
    bodies = [json.loads(base64.b64decode(message["body"])) for message in messages]
    heads = [{name: message["headers"][name] for name in ("id", "root_id", "timelimit", "eta")} for message in messages]
    return [{**head, "args": body[0]} for head, body in zip(heads, bodies, strict=True)]


def redis_away() -> redis.Redis:
    """A client whose Redis isn't there."""
    return redis.Redis.from_url(f"redis://{NOWHERE}", socket_connect_timeout=1)


class Notices:
    """What is published for the API on a runtime's Redis, from the moment on at which this is made."""

    def __init__(self, client: redis.Redis) -> None:
        self._pubsub = client.pubsub()  # type: ignore[no-untyped-call]
        self._received: list[dict[str, Any]] = []
        for channel in (worker.STATUS_CHANNEL, worker.PROGRESS_CHANNEL):
            self._pubsub.subscribe(channel)
            self._pubsub.get_message(timeout=5)  # the server confirms it

    def close(self) -> None:
        self._pubsub.close()

    def of(self, kind: str, count: int) -> list[dict[str, Any]]:
        """Waits until so many messages of a type have come, and returns these."""

        def find() -> list[dict[str, Any]]:
            while message := self._pubsub.get_message(ignore_subscribe_messages=True, timeout=0.01):
                self._received.append(json.loads(message["data"]))
            found = [message for message in self._received if message["type"] == kind]
            return found if len(found) >= count else []

        return poll(find, 10, description=f"{count} {kind}") if count else []

    def statuses(self, count: int) -> list[dict[str, Any]]:
        """Waits until so many status messages have come, and returns these."""
        return self.of("job_status_update", count)


@dataclass(frozen=True)
class Ended:
    """A command that was run in this process: its exit code, and what it printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]


def gone_pid() -> int:
    """The id of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


SetHandler = Callable[[worker.Run], None]


def raising(error: BaseException) -> worker.Run:
    """A handler that raises this."""

    async def run(_call: Call) -> Result:
        raise error

    return run


def adopt(runtime: worker.Runtime, folder: Path) -> worker.Runtime:
    """Configures this process with the runtime. Its keeper beats there, and ticks only when a test calls tick()."""
    vars(worker.app).pop("amqp", None)  # with the connections of the test before
    runtime.heartbeat = Heartbeat(folder / "heartbeat")
    return worker.configure(runtime.settings, runtime)


def new_sweeper(runtime: Runtime, **parts: Any) -> Sweeper:
    """Another process's sweeper, which gets each turn. Parts of it may be replaced."""
    turns = EveryTurn(runtime.database, runtime.store.now)
    usual = {"store": runtime.store, "turns": turns, "lost_messages": runtime.lost_messages}
    usual |= {"notifier": runtime.notifier, "notes": runtime.notes, "broker": runtime.broker}
    return Sweeper(**{**usual, "lease_s": runtime.settings.lease_seconds, **parts})
