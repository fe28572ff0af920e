"""What the API does with jobs, and the worker as a process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import psutil
from bson import ObjectId
from celery import Celery
from celery.result import AsyncResult
from pymongo import MongoClient
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from testbed.forks import WORKER, ForkedProcess, can_fork, fork
from testbed.processes import current_environment, poll, spawn
from testbed.servers import DATABASE

Document = dict[str, Any]

PATIENCE_S: Final = (
    60.0  # for what takes a second: a busy machine is slow, and waiting costs nothing when all goes well
)
TASK_NAME: Final = "src.infrastructure.queue.tasks.process_job"
STATUS_CHANNEL: Final = "job_notifications"
PROGRESS_CHANNEL: Final = "job_progress"
CHANNELS: Final = (STATUS_CHANNEL, PROGRESS_CHANNEL)
ACTIVE: Final = ("pending", "processing")
TERMINAL: Final = ("completed", "failed")
CANCELLED: Final = "Cancelled."

# The beginnings of the names of all variables that the worker or Celery reads.
FOREIGN_SETTINGS: Final = (
    *("OPENAI_", "TEXT_", "IMAGE_", "AUDIO_", "CELERY_", "MONGODB_", "REDIS_", "AWS_ACCESS", "AWS_SECRET", "S3_"),
    *("DATABASE_NAME", "WORKER_", "ARTIFACT_", "HANDLER_MODULES", "LEASE_", "SWEEP_", "ORPHAN_", "JOB_DEADLINE"),
    *("RETRY_", "SHUTDOWN_", "MAX_ANSWER_", "PICTURE_HOSTS", "SSL_CERT_", "DEBUG", "LOG_FORMAT"),
)


def without_foreign_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the settings of whoever runs this, which must not reach the workers started here.

    What a test or a measurement sets itself has to be added afterwards.
    """
    return {name: value for name, value in environment.items() if not name.startswith(FOREIGN_SETTINGS)}


def remove_foreign_settings() -> None:
    """Remove them from the environment of this process, since Celery and other clients in it read them as well."""
    for name in os.environ.keys() - without_foreign_settings(os.environ).keys():
        del os.environ[name]


# --- documents and messages ---------------------------------------------------------------------------------


def new_document(job_type: str, input_data: object, **fields: object) -> Document:
    """Return the document of a new job as the API makes it. The fields replace the usual ones or are added."""
    now = datetime.now(UTC)
    return {
        "_id": ObjectId(),
        "user_id": "user-1",
        "session_id": "session-1",
        "job_type": job_type,
        "status": "pending",
        "input_data": input_data,
        **dict.fromkeys(("output_data", "artifact_url", "error_message", "started_at", "completed_at")),
        "created_at": now,
        "updated_at": now,
        **fields,
    }


def message_of(document: Document) -> tuple[str, Document]:
    """Return the arguments of the message for a document: the job's id, and copies of some fields."""
    copied = {key: document.get(key) for key in ("job_type", "input_data", "user_id", "session_id")}
    job_id = str(document["_id"])
    return job_id, {"job_id": job_id, **copied}


# --- notifications ------------------------------------------------------------------------------------------

CONFIRMED_WITHIN_S: Final = 5.0
RECONNECT_S: Final = 0.02
READ_S: Final = 0.2
CERTAIN_S: Final = 0.1  # a connection that has just been read may have been cut so long before


class Subscription:
    """A subscription to channels of the API, for the thread that waits for messages. It is a context manager."""

    def __init__(self, redis_url: str, channels: Sequence[str]) -> None:
        """Subscribe, and wait until Redis has confirmed every channel. Raises: RedisError, TimeoutError."""
        self._client = Redis.from_url(redis_url, socket_connect_timeout=2, retry=Retry(NoBackoff(), 0))
        self._pubsub = self._client.pubsub()  # type: ignore[no-untyped-call]
        try:
            self._pubsub.subscribe(*channels)
            self._wait_confirmed(len(channels))
        except BaseException:
            self.close()
            raise

    def _wait_confirmed(self, count: int) -> None:
        """Wait until Redis has confirmed so many subscriptions."""
        give_up_at = time.monotonic() + CONFIRMED_WITHIN_S
        while count:
            message = self._pubsub.get_message(timeout=READ_S)
            count -= bool(message and message["type"] == "subscribe")
            if count and time.monotonic() > give_up_at:
                raise TimeoutError("Redis has not confirmed the subscription")

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._pubsub.close()
        self._client.close()

    def read(self, timeout_s: float = 0.0) -> Document | None:
        """Return the next message, or None if none arrives in time. Raises: RedisError, when the connection breaks."""
        message = self._pubsub.get_message(timeout=timeout_s)
        return dict(json.loads(message["data"])) if message and message["type"] == "message" else None

    def drain(self) -> None:
        """Discard the messages that have arrived so far."""
        while self.read():
            pass

    def wait_for(self, job_ids: Iterable[str], status: str, timeout_s: float = 60) -> float:
        """Wait until this status was published for each of the jobs; return when the last notice came (monotonic).

        Raises: TimeoutError.
        """
        awaited, came_at, give_up_at = set(job_ids), time.monotonic(), time.monotonic() + timeout_s
        while awaited:
            notice = self.read(1.0)
            came_at = time.monotonic()
            if notice and notice.get("status") == status:
                awaited.discard(notice["job_id"])
            if came_at > give_up_at:
                raise TimeoutError(f"{len(awaited)} jobs not {status} within {timeout_s:g} s")
        return came_at


class Listener(threading.Thread):
    """A thread that keeps every message of the channels, and connects again whenever Redis was away.

    Redis keeps no message for a subscriber that is not connected. So the listener also notes the times of its gaps:
    what is missing in them may have been published all the same.
    """

    def __init__(self, redis_url: str, channels: Sequence[str]) -> None:
        super().__init__(name="listener", daemon=True)
        self._redis_url, self._channels = redis_url, channels
        self._is_subscribed, self._is_ending = threading.Event(), threading.Event()
        self._connected_until: float | None = None
        self.messages: list[Document] = []  # each with the Unix time of its arrival, `received_at`
        self.gaps: list[tuple[float, float]] = []  # from when until when, in Unix times

    def subscribe(self) -> None:
        """Start, and wait for the first subscription. Raises: TimeoutError."""
        self.start()
        if not self._is_subscribed.wait(CONFIRMED_WITHIN_S):
            self.end()
            raise TimeoutError("there is no Redis to subscribe to")

    def run(self) -> None:
        """Subscribe again and again until the end."""
        while not self._is_ending.is_set():
            with suppress(RedisError, OSError):
                self._listen()
            self._is_ending.wait(RECONNECT_S)

    def _listen(self) -> None:
        """Keep messages until the connection breaks or the end has come."""
        with Subscription(self._redis_url, self._channels) as subscription:
            if self._connected_until is not None:
                self.gaps.append((self._connected_until, time.time()))
            self._is_subscribed.set()
            while not self._is_ending.is_set():
                if message := subscription.read(READ_S):
                    self.messages.append({**message, "received_at": time.time()})
                self._connected_until = time.time() - CERTAIN_S

    def end(self) -> None:
        """Stop listening."""
        self._is_ending.set()
        self.join(CONFIRMED_WITHIN_S)


# --- the API's side -----------------------------------------------------------------------------------------


class Api:
    """Does what the API does: inserts documents, sends messages, cancels jobs, and receives all notifications.

    It is a stock Celery client, which knows nothing of the worker's modules.
    """

    def __init__(
        self,
        mongodb_url: str,
        redis_url: str,
        database: str = DATABASE,
        queue: str = "ai_jobs",
        broker_url: str = "",
        *,
        channels: Sequence[str] = CHANNELS,
        timeout_s: float | None = None,
    ) -> None:
        """Connect to MongoDB and the broker, which is Redis without a broker URL, and subscribe to the channels.

        Without channels no thread listens. With a timeout, calls to a server that is away fail after so many seconds.
        """
        self.queue = queue
        self.redis_url = redis_url
        limit: dict[str, Any] = {"timeoutMS": int(timeout_s * 1000)} if timeout_s else {}
        self.mongo: MongoClient[Document] = MongoClient(mongodb_url, tz_aware=True, **limit)
        self.database = self.mongo[database]
        self.jobs = self.database["jobs"]
        self.celery = Celery("api", broker=broker_url or redis_url, backend=redis_url, set_as_current=False)
        self.celery.conf.update(task_serializer="json", accept_content=["json"], task_ignore_result=False)
        if timeout_s:
            timeouts = dict.fromkeys(("socket_timeout", "socket_connect_timeout"), timeout_s)
            self.celery.conf.broker_transport_options = timeouts
        self.redis = Redis.from_url(redis_url)
        self._listener = Listener(redis_url, channels)
        if channels:
            self._listener.subscribe()

    def close(self) -> None:
        """Stop listening and close the connections."""
        self.stop_listening()
        self.celery.close()
        self.redis.close()
        self.mongo.close()

    def stop_listening(self) -> None:
        """End the thread that listens; what it has received stays."""
        if self._listener.is_alive():
            self._listener.end()

    @property
    def received(self) -> list[Document]:
        """The notifications so far, each with the Unix time of its arrival, `received_at`."""
        return self._listener.messages

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """The times (from, until) in which notifications may have been published that were not received."""
        return self._listener.gaps

    def subscribed(self, *channels: str) -> Subscription:
        """Return a subscription of its own, by which the calling thread itself waits for messages."""
        return Subscription(self.redis_url, channels)

    def insert(self, job_type: str, input_data: object, **fields: object) -> ObjectId:
        """Insert a document as the API does and return its id. The fields replace the usual ones or are added."""
        inserted: ObjectId = self.jobs.insert_one(new_document(job_type, input_data, **fields)).inserted_id
        return inserted

    def send(
        self,
        *args: object,
        kwargs: dict[str, Any] | None = None,
        task: str = TASK_NAME,
        queue: str = "",
        **options: Any,
    ) -> AsyncResult[Any]:
        """Send a message with exactly these arguments."""
        return self.celery.send_task(task, args=args, kwargs=kwargs, queue=queue or self.queue, **options)

    def send_body(self, body: object, headers: Mapping[str, object] | None = None, **options: Any) -> None:
        """Send a message of the task with exactly this body, which may be malformed, and replace some headers."""
        usual, properties, _, event = self.celery.amqp.as_task_v2(str(uuid.uuid4()), TASK_NAME, args=(), kwargs={})
        with self.celery.producer_pool.acquire() as producer:
            message = ({**usual, **(headers or {})}, properties, body, event)
            self.celery.amqp.send_task_message(producer, TASK_NAME, message, queue=self.queue, **options)

    def enqueue(self, job_id: ObjectId, **options: Any) -> AsyncResult[Any]:
        """Send the message for a document, with copies of some fields, as the API does."""
        return self.send(*message_of(self.document(job_id)), **options)

    def submit(self, job_type: str, input_data: object, **options: Any) -> ObjectId:
        """Insert a document, send its message, and return the id."""
        job_id = self.insert(job_type, input_data)
        self.enqueue(job_id, **options)
        return job_id

    def text(self, prompt: str, **options: Any) -> ObjectId:
        """Submit a text job with this prompt, which may contain directives for the provider."""
        return self.submit("text_generation", {"prompt": prompt}, **options)

    def cancel(self, job_id: ObjectId) -> None:
        """Cancel a job that has not ended as the API does, which only changes the document."""
        active = {"_id": job_id, "status": {"$in": list(ACTIVE)}}
        failed = {"status": "failed", "error_message": CANCELLED, "updated_at": datetime.now(UTC)}
        self.jobs.update_one(active, {"$set": failed})

    def document(self, job_id: ObjectId) -> Document:
        """Return the job's document as it is now."""
        document = self.jobs.find_one({"_id": job_id})
        assert document is not None, f"no document {job_id}"
        return document

    def status(self, job_id: ObjectId) -> str:
        """Return the job's status as it is now."""
        return str(self.document(job_id)["status"])

    def wait(self, job_id: ObjectId, *statuses: str, timeout_s: float = PATIENCE_S) -> Document:
        """Wait until the job has one of these statuses, by default a terminal one, and return its document."""
        wanted = statuses or TERMINAL
        poll(lambda: self.status(job_id) in wanted, timeout_s, description=f"job {job_id} {' or '.join(wanted)}")
        return self.document(job_id)

    def notices(self, job_id: ObjectId) -> list[str]:
        """Return the statuses that were published about the job, in order."""
        return [notice["status"] for notice in self.updates(job_id)]

    def updates(self, job_id: ObjectId) -> list[Document]:
        """Return the status messages about the job, in order."""
        return [m for m in list(self.received) if m["job_id"] == str(job_id) and m["type"] == "job_status_update"]

    def progress(self, job_id: ObjectId) -> list[Document]:
        """Return the pieces of streamed text of the job, in order."""
        return [m for m in list(self.received) if m["job_id"] == str(job_id) and m["type"] == "job_progress"]

    def wait_notice(self, job_id: ObjectId, status: str, timeout_s: float = PATIENCE_S / 2) -> Document:
        """Wait for a message with this status about the job, and return the first one."""

        def find() -> Document | None:
            return next((m for m in self.updates(job_id) if m["status"] == status), None)

        found = poll(find, timeout_s, description=f"notice {status} of {job_id}")
        assert found is not None
        return found


# --- the worker ---------------------------------------------------------------------------------------------


class WorkerProcess:
    """A worker as a process in a session of its own, which writes its log to a file.

    It runs in the folder of the log, so that a `.env` beside worker.py does not change its settings.
    """

    def __init__(
        self, environment: Mapping[str, str], log: Path, command: list[str] | None = None, python: str = sys.executable
    ) -> None:
        """Start the worker, or another command. The environment adds to that of this process.

        Without a command the worker is forked from a process that has its libraries, where that makes no difference.
        """
        self.log = log
        full_environment = {**current_environment(), **environment}
        self.process: subprocess.Popen[bytes] | ForkedProcess
        if command is None and can_fork(full_environment):
            self.process = fork([str(WORKER)], log, full_environment, log.parent)
        else:
            self.process = spawn([python, *(command or [str(WORKER)])], log, full_environment, log.parent)

    @property
    def name(self) -> str:
        """Celery's name for the worker, which has to be ready."""
        found = re.search(r"(\S+@\S+) ready\.", self.text())
        assert found, self.text()
        return found[1]

    def text(self) -> str:
        """Return the log so far."""
        return self.log.read_text(errors="replace")

    def wait_ready(self, timeout_s: float = PATIENCE_S, says: str = " ready.") -> WorkerProcess:
        """Wait until the log says that the worker is ready to take jobs."""
        poll(lambda: says in self.text() or self.process.poll() is not None, timeout_s, description="worker ready")
        assert self.process.poll() is None, self.text()
        return self

    def children(self) -> list[int]:
        """Return the process ids of the worker's pool."""
        return [child.pid for child in psutil.Process(self.process.pid).children()]

    def signal(self, number: int) -> None:
        """Send a signal to the main process."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kill the worker and its children at the same time, as a power cut does."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def stop(self, timeout_s: float = 20) -> int:
        """Send SIGTERM and return the exit code. A worker that does not end in time is killed."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout_s)
        finally:
            self.kill()
