"""What the API does with a job, for `submit` and `demo`: inserts the document, sends the message, follows the job."""

from __future__ import annotations

import base64
import contextlib
import json
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gridfs
import pymongo
import redis
from bson import ObjectId
from pymongo.errors import PyMongoError

from worker import PROGRESS_CHANNEL, STATUS_CHANNEL, TASK_NAME, TERMINAL_STATUSES, Runtime, Status, app
from worker_commands.terminal import printable
from workerkit.errors import Document
from workerkit.sentences import final_sentence

SERVER_PATIENCE_S = 5
LISTEN_S = 0.1
READ_EVERY_S = 3.0
DOWNLOAD_S = 30
USER_ID = "try-out"


class Unreachable(Exception):
    """A server can't be reached; the text names it and the setting to look at."""


@contextlib.contextmanager
def reaching(server: str, variable: str, *errors: type[BaseException]) -> Iterator[None]:
    """Turns these errors into one sentence with advice. Raises Unreachable."""
    try:
        with pymongo.timeout(SERVER_PATIENCE_S):
            yield
    except errors as error:
        advice = f"Is it running, and is {variable} right? `python worker.py check` shows more."
        raise Unreachable(f"{server} can't be reached ({type(error).__name__}). {advice}") from None


@dataclass
class Followed:
    """A job as its submitter sees it: what was published about it, and in the end its document."""

    id: ObjectId
    job_type: str
    submitted_at: float = field(default_factory=time.monotonic)
    took_s: float | None = None
    status: Status = Status.PENDING
    message: str = ""
    attempt: int = 0
    pieces: list[str] = field(default_factory=list)
    document: Document = field(default_factory=dict)

    @property
    def age_s(self) -> float:
        return self.took_s or time.monotonic() - self.submitted_at

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def add_text(self, message: Document) -> bool:
        """Adds a piece of text. False: it is of an attempt that is over, or a piece before it is missing.

        It takes the place of all pieces from its number on. So one that comes again, with more in it, counts once, and
        piece 0 begins the text anew, also after a hand-back, where the next attempt has the same number.
        """
        attempt, sequence = message["attempt"], message["sequence"]
        known = [] if attempt > self.attempt else self.pieces
        if attempt < self.attempt or sequence > len(known):
            return False
        self.attempt, self.pieces = attempt, [*known[:sequence], message["delta"]]
        return True

    def end(self, document: Document) -> None:
        self.took_s, self.document, self.status = self.age_s, document, Status(document["status"])
        self.message = final_sentence(document)


class View:
    """Shows jobs while they are followed: a line for each event."""

    def line(self, job: Followed, event: str, words: str) -> None:
        print(f"{job.age_s:6.1f} s  {job.job_type:16}  {event:10}  {printable(words)}", flush=True)

    def on_status(self, job: Followed) -> None:
        self.line(job, job.status, job.message)

    def on_text(self, job: Followed, delta: str) -> None:
        if len(job.pieces) == 1:
            self.line(job, "streaming", f"The first words: {delta.strip()} …")

    def on_tick(self, jobs: Sequence[Followed]) -> None:
        """Called about ten times a second."""


class Api:
    """Subscribes, inserts the document and sends the message (contract, sections 1 to 3).

    It subscribes when it is entered, before anything is sent, so that it misses nothing.

    Raises:
        Unreachable: when it is entered, and in `submit`.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._settings, self._jobs, self._broker = runtime.settings, runtime.database["jobs"], runtime.broker
        self._redis = runtime.settings.redis_target.client({"socket_connect_timeout": SERVER_PATIENCE_S})
        self._pubsub = self._redis.pubsub()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Api:
        channels = (STATUS_CHANNEL, PROGRESS_CHANNEL)
        with reaching("Redis", "REDIS_URL", redis.RedisError):
            self._pubsub.subscribe(*channels)
            for _ in channels:  # each is confirmed
                self._pubsub.get_message(timeout=SERVER_PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._pubsub.close()
        self._redis.close()

    def submit(self, job_type: str, input_data: Document) -> Followed:
        """Sends one job, in a session of its own: a session may not have two jobs that haven't ended."""
        job_id, now = ObjectId(), datetime.now(UTC)
        copy: Document = {"job_type": job_type, "input_data": input_data, "user_id": USER_ID, "session_id": f"{job_id}"}
        empty = dict.fromkeys(("output_data", "artifact_url", "error_message", "started_at", "completed_at"))
        document = {
            "_id": job_id,
            "status": Status.PENDING.value,
            **copy,
            **empty,
            "created_at": now,
            "updated_at": now,
        }
        with reaching("MongoDB", "MONGODB_URL", PyMongoError):
            self._jobs.insert_one(document)
        try:
            self._enqueue(str(job_id), copy)
        except Unreachable:
            with contextlib.suppress(PyMongoError):  # a job without a message would stay pending
                self._jobs.delete_one({"_id": job_id, "status": Status.PENDING.value})
            raise
        return Followed(job_id, job_type)

    def _enqueue(self, job_id: str, copy: Document) -> None:
        settings = self._settings
        limits: dict[str, Any] = {
            "soft_time_limit": settings.celery_soft_time_limit,
            "time_limit": settings.celery_time_limit,
        }
        variable = "REDIS_URL (or CELERY_BROKER_URL)"
        errors: tuple[type[BaseException], ...] = (
            redis.RedisError,
            *self._broker.errors,
        )  # of the result backend, and of the broker
        with reaching("The queue", variable, *errors), app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=SERVER_PATIENCE_S)
            arguments = (job_id, {"job_id": job_id, **copy})
            app.send_task(TASK_NAME, arguments, queue=settings.celery_queue_name, connection=connection, **limits)

    def follow(self, jobs: Sequence[Followed], view: View) -> None:
        """Shows what is published about these jobs until all have ended.

        It also reads the documents every few seconds, since a notification may be missed.
        """
        read_at = time.monotonic() + READ_EVERY_S
        while not all(job.document for job in jobs):
            message = self._listen()
            for job in jobs:
                if message.get("job_id") == str(job.id):
                    self._take(job, message, view)
                if time.monotonic() >= read_at:
                    self._read(job, view)
            if time.monotonic() >= read_at:
                read_at = time.monotonic() + READ_EVERY_S
            view.on_tick(jobs)

    def _listen(self) -> Document:
        """The next notification; empty if none came, or while Redis is away (redis-py connects again by itself)."""
        try:
            received = self._pubsub.get_message(ignore_subscribe_messages=True, timeout=LISTEN_S)
            message = json.loads(received["data"]) if received else {}
        except redis.RedisError:
            time.sleep(LISTEN_S)
            return {}
        except ValueError:
            return {}
        return message if isinstance(message, dict) else {}

    def _take(self, job: Followed, message: Document, view: View) -> None:
        if message["type"] == "job_progress" and job.add_text(message):
            view.on_text(job, message["delta"])
        elif message["type"] == "job_status_update" and message["status"] in TERMINAL_STATUSES:
            self._read(job, view)
        elif message["type"] == "job_status_update":
            job.status, job.message = Status(message["status"]), str(message["message"])
            view.on_status(job)

    def _read(self, job: Followed, view: View) -> None:
        """Reads the document, which has more than any notification. While MongoDB is away, nothing happens."""
        with contextlib.suppress(PyMongoError), pymongo.timeout(SERVER_PATIENCE_S):
            document = self._jobs.find_one({"_id": job.id}) or {}
            if not job.document and document.get("status") in TERMINAL_STATUSES:
                job.end(document)
                view.on_status(job)
            job.status = Status(document.get("status", job.status))


def fetch_file(runtime: Runtime, url: str) -> bytes | None:
    """The file behind a result's URL. None: it can't be reached from here."""
    if url.startswith("data:"):
        return base64.b64decode(url.partition(",")[2])
    files = (
        gridfs.GridFS(runtime.database, collection="artifacts") if runtime.settings.artifact_url == "gridfs" else None
    )
    if files and (found := files.find_one({"filename": url.rsplit("/", 1)[-1]})):
        return bytes(found.read())
    if url.startswith(("http://", "https://")):
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=DOWNLOAD_S) as answer:
            return bytes(answer.read())
    return None


def writable_folder(wanted: Path) -> Path:
    """The folder, which is made if it is missing. If it can't be written (a read-only container), a temporary one."""
    with contextlib.suppress(OSError):
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted.resolve()
    return Path(tempfile.mkdtemp(prefix="ai-backend-worker-"))
