"""What the API does with jobs, and the worker as a process."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Mapping
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

from testbed.processes import poll, spawn
from testbed.servers import DATABASE

TASK_NAME: Final = "src.infrastructure.queue.tasks.process_job"
STATUS_CHANNEL: Final = "job_notifications"
PROGRESS_CHANNEL: Final = "job_progress"
TERMINAL: Final = ("completed", "failed")
SOURCE: Final = Path(__file__).parent.parent  # the folder of worker.py


class Api:
    """Does what the API does: inserts documents, sends messages, cancels jobs, and receives all notifications.

    `heard` is the list of the notifications so far.
    """

    def __init__(
        self, mongodb_url: str, redis_url: str, database: str = DATABASE, queue: str = "ai_jobs", broker_url: str = ""
    ) -> None:
        """Connect to MongoDB and the broker, which is Redis without a broker URL, and subscribe to both channels."""
        self.queue = queue
        self.redis_url = redis_url
        self.mongo: MongoClient[dict[str, Any]] = MongoClient(mongodb_url, tz_aware=True)
        self.database = self.mongo[database]
        self.jobs = self.database["jobs"]
        self.celery = Celery("api", broker=broker_url or redis_url, backend=redis_url, set_as_current=False)
        self.celery.conf.update(task_serializer="json", accept_content=["json"], task_ignore_result=False)
        self.redis = Redis.from_url(redis_url)
        self.heard: list[dict[str, Any]] = []
        self._pubsub = self.redis.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
        self._pubsub.subscribe(**{name: self._hear for name in (STATUS_CHANNEL, PROGRESS_CHANNEL)})
        self._listener = self._pubsub.run_in_thread(0.05, daemon=True, exception_handler=self._ignore_outage)

    def _hear(self, message: dict[str, Any]) -> None:
        """Keep a notification, with the time of its arrival."""
        self.heard.append({**json.loads(message["data"]), "heard_at": time.time()})

    @staticmethod
    def _ignore_outage(_error: BaseException, _pubsub: object, _thread: object) -> None:
        """Wait a little while Redis is away, which tests cause on purpose. The client connects again by itself."""
        time.sleep(0.2)

    def close(self) -> None:
        """Stop listening and close the connections."""
        self._listener.stop()
        self._listener.join(5)
        self._pubsub.close()
        self.celery.close()
        self.mongo.close()

    def insert(self, job_type: str, input_data: object, **fields: object) -> ObjectId:
        """Insert a document as the API does and return its id. The fields replace the usual ones or are added."""
        now = datetime.now(UTC)
        document = {
            "user_id": "user-1",
            "session_id": "session-1",
            "job_type": job_type,
            "status": "pending",
            "input_data": input_data,
            **dict.fromkeys(("output_data", "artifact_url", "error_message", "started_at", "completed_at")),
            "created_at": now,
            "updated_at": now,
        }
        inserted: ObjectId = self.jobs.insert_one({**document, **fields}).inserted_id
        return inserted

    def send(self, *args: object, kwargs: dict[str, Any] | None = None, **options: Any) -> AsyncResult[Any]:
        """Send a message with exactly these arguments."""
        return self.celery.send_task(TASK_NAME, args=args, kwargs=kwargs, queue=self.queue, **options)

    def send_body(self, body: object, headers: Mapping[str, object] | None = None, **options: Any) -> None:
        """Send a message of the task with exactly this body, which may be malformed, and replace some headers."""
        usual, properties, _, event = self.celery.amqp.as_task_v2(str(uuid.uuid4()), TASK_NAME, args=(), kwargs={})
        with self.celery.producer_pool.acquire() as producer:
            message = ({**usual, **(headers or {})}, properties, body, event)
            self.celery.amqp.send_task_message(producer, TASK_NAME, message, queue=self.queue, **options)

    def enqueue(self, job_id: ObjectId, **options: Any) -> AsyncResult[Any]:
        """Send the message for a document, with copies of some fields, as the API does."""
        document = self.document(job_id)
        copied = {key: document.get(key) for key in ("job_type", "input_data", "user_id", "session_id")}
        return self.send(str(job_id), {"job_id": str(job_id), **copied}, **options)

    def submit(self, job_type: str, input_data: object, **options: Any) -> ObjectId:
        """Insert a document, send its message, and return the id."""
        job_id = self.insert(job_type, input_data)
        self.enqueue(job_id, **options)
        return job_id

    def text(self, prompt: str, **options: Any) -> ObjectId:
        """Submit a text job with this prompt, which may contain directives for the provider."""
        return self.submit("text_generation", {"prompt": prompt}, **options)

    def cancel(self, job_id: ObjectId) -> None:
        """Cancel a job as the API does, which only changes the document."""
        self.jobs.update_one({"_id": job_id}, {"$set": {"status": "failed", "error_message": "Cancelled."}})

    def document(self, job_id: ObjectId) -> dict[str, Any]:
        """Return the job's document as it is now."""
        document = self.jobs.find_one({"_id": job_id})
        assert document is not None, f"no document {job_id}"
        return document

    def status(self, job_id: ObjectId) -> str:
        """Return the job's status as it is now."""
        return str(self.document(job_id)["status"])

    def wait(self, job_id: ObjectId, *statuses: str, timeout_s: float = 20) -> dict[str, Any]:
        """Wait until the job has one of these statuses, by default a terminal one, and return its document."""
        wanted = statuses or TERMINAL
        poll(lambda: self.status(job_id) in wanted, timeout_s, description=f"job {job_id} {' or '.join(wanted)}")
        return self.document(job_id)

    def notices(self, job_id: ObjectId) -> list[str]:
        """Return the statuses that were published about the job, in order."""
        return [notice["status"] for notice in self.updates(job_id)]

    def updates(self, job_id: ObjectId) -> list[dict[str, Any]]:
        """Return the status messages about the job, in order."""
        return [m for m in list(self.heard) if m["job_id"] == str(job_id) and m["type"] == "job_status_update"]

    def progress(self, job_id: ObjectId) -> list[dict[str, Any]]:
        """Return the pieces of streamed text of the job, in order."""
        return [m for m in list(self.heard) if m["job_id"] == str(job_id) and m["type"] == "job_progress"]

    def wait_notice(self, job_id: ObjectId, status: str, timeout_s: float = 10) -> dict[str, Any]:
        """Wait for a message with this status about the job, and return the first one."""

        def find() -> dict[str, Any] | None:
            return next((m for m in self.updates(job_id) if m["status"] == status), None)

        found = poll(find, timeout_s, description=f"notice {status} of {job_id}")
        assert found is not None
        return found


class WorkerProcess:
    """`python worker.py` as a child process in a session of its own, which writes its log to a file.

    It runs in the folder of the log, so that a `.env` beside worker.py does not change its settings.
    """

    def __init__(
        self, environment: Mapping[str, str], log: Path, command: list[str] | None = None, python: str = sys.executable
    ) -> None:
        """Start the worker, or another command. The environment adds to that of this process."""
        self.log = log
        arguments = command or [str(SOURCE / "worker.py")]
        self.process = spawn([python, *arguments], log, {**os.environ, **environment}, log.parent)

    @property
    def name(self) -> str:
        """Celery's name for the worker, which has to be ready."""
        found = re.search(r"(\S+@\S+) ready\.", self.text())
        assert found, self.text()
        return found[1]

    def text(self) -> str:
        """Return the log so far."""
        return self.log.read_text(errors="replace")

    def wait_ready(self, timeout_s: float = 20, says: str = " ready.") -> WorkerProcess:
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
