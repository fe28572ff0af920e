"""What the API does with jobs: their documents in MongoDB, and their messages in the queue (docs/contract.md)."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from bson import ObjectId
from bson.errors import BSONError
from celery import Celery
from fastapi import HTTPException
from kombu.exceptions import OperationalError
from pymongo.database import Database
from redis.exceptions import RedisError

Document = dict[str, Any]
Owner = dict[str, str]  # of a job: its `user_id` and `session_id`

TASK_NAME = "src.infrastructure.queue.tasks.process_job"
ACTIVE, ENDED = ["pending", "processing"], ["completed", "failed"]
SHOWN, MAX_PROMPT = 5, 200
BUSY = "One job at a time: please wait until your running job has ended, or cancel it."
CANCELLED = "You have cancelled this."
SENTENCES = {"pending": "Waiting for its turn.", "processing": "In progress.", "completed": "Your result is ready."}


class Jobs:
    """Every method waits for servers, so call it in a thread. Raises HTTPException with a sentence, PyMongoError."""

    def __init__(self, database: Database[Document], celery: Celery, queue: str) -> None:
        self._jobs, self._celery, self._queue = database["jobs"], celery, queue

    def newest(self, owner: Owner) -> dict[str, Document]:
        """A session's newest jobs by id, as a page shows them."""
        return {str(job["_id"]): shown(job) for job in self._jobs.find(owner).sort("created_at", -1).limit(SHOWN)}

    def submit(self, owner: Owner, job_type: str, input_data: Document) -> None:
        """Inserts the document and sends the message. The worker checks the input."""
        job = {"_id": ObjectId(), **owner, "job_type": job_type, "status": "pending", "input_data": input_data}
        self._check_free(job)
        empty = dict.fromkeys(("output_data", "artifact_url", "error_message", "started_at", "completed_at"))
        try:
            self._jobs.insert_one({**job, **empty, **dict.fromkeys(("created_at", "updated_at"), datetime.now(UTC))})
        except (BSONError, OverflowError, UnicodeError):
            raise HTTPException(422, "This input is too large, or it holds what can't be stored.") from None
        self._enqueue(job, undo=self._jobs.delete_one)

    def cancel(self, owner: Owner, job_id: str) -> None:
        """The worker sees in the document that it has to stop."""
        self._change(owner, job_id, ACTIVE, "This job has ended already.", status="failed", error_message=CANCELLED)

    def retry(self, owner: Owner, job_id: str) -> None:
        """Lets a job that has ended begin anew."""
        self._check_free(self._find(owner, job_id))
        job = self._change(owner, job_id, ENDED, "This job hasn't ended yet.", status="pending")
        before = {"status": job["status"]}
        self._enqueue(job, undo=lambda pending: self._jobs.update_one(pending, {"$set": before}))

    def _find(self, owner: Owner, job_id: str) -> Document:
        job = self._jobs.find_one({"_id": ObjectId(job_id), **owner}) if ObjectId.is_valid(job_id) else None
        if job is None:
            raise HTTPException(404, "There is no such job.")
        return job

    def _change(self, owner: Owner, job_id: str, statuses: list[str], otherwise: str, **fields: Any) -> Document:
        """Changes a job that has one of these statuses, by one atomic write. Returns it as it was before."""
        same = {"_id": self._find(owner, job_id)["_id"], "status": {"$in": statuses}}
        job = self._jobs.find_one_and_update(same, {"$set": {**fields, "updated_at": datetime.now(UTC)}})
        if job is None:
            raise HTTPException(409, otherwise)
        return job

    def _check_free(self, job: Document) -> None:
        """A session may have one active job."""
        session = {name: job[name] for name in ("user_id", "session_id")}
        if self._jobs.find_one({**session, "status": {"$in": ACTIVE}, "_id": {"$ne": job["_id"]}}, {"_id": 1}):
            raise HTTPException(409, BUSY)

    def _enqueue(self, job: Document, undo: Callable[[Document], object]) -> None:
        """Sends the message of a job that is pending now. If that isn't possible, the job is as it was before."""
        pending, names = {"_id": job["_id"], "status": "pending"}, ("user_id", "session_id", "job_type", "input_data")
        arguments = (str(job["_id"]), {"job_id": str(job["_id"]), **{name: job[name] for name in names}})
        try:
            self._check_free(job)  # once more: of two requests at the same time, one or both see the other's job
            self._celery.send_task(TASK_NAME, arguments, queue=self._queue)
        except HTTPException:
            undo(pending)
            raise
        except (OperationalError, RedisError, OSError):
            undo(pending)
            raise HTTPException(503, "The queue can't be reached. Please try again in a minute.") from None


def shown(job: Document) -> Document:
    """What a page shows of a job. With each status the worker writes a sentence for the person into the document."""
    status, inputs, written = job["status"], job["input_data"], job.get("worker")
    sentence = written.get("message") if isinstance(written, dict) and status != "pending" else None
    sentence = job["error_message"] if status == "failed" else sentence
    prompt = str(inputs.get("prompt") or inputs.get("text") or "")
    return {
        "id": str(job["_id"]),
        "sentence": sentence or SENTENCES.get(status, "This has failed."),
        "prompt": prompt if len(prompt) <= MAX_PROMPT else f"{prompt[: MAX_PROMPT - 1]}…",
        **{name: job[name] for name in ("job_type", "status", "output_data")},
    }
