"""AI Backend Worker: takes generation jobs from a Celery queue, and brings each one to exactly one end.

A message names a job document in MongoDB. The worker claims the document (a lease with a fencing token), generates
text, a picture or sound through an OpenAI-compatible server, and ends the attempt with one fenced write. When a
process dies on the way, its lease runs out, and a sweeper gives the job to the next worker.

    message -> claim -> handler -> Result -> settle: artifact, then complete | fail | release -> notify -> ack

Read `process_job` first. The sections, each of which uses only those above it:

    vocabulary, Celery app, job store, notifier, handlers, recovery, runtime, task, hooks, command line

What knows no job is in workerkit/, and the commands are in worker_commands/.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import itertools
import json
import logging
import math
import os
import random
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum, StrEnum
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import click
import pymongo
import redis
from bson import ObjectId, json_util
from celery import Celery, Task, signals
from celery.exceptions import Ignore, Reject
from celery.worker.request import Request
from kombu import Exchange
from pydantic import BaseModel

from workerkit import __version__, logs
from workerkit.artifacts import Artifacts, open_artifacts
from workerkit.broker import Broker, ExistingQueue, JobAMQP, transport_options, waiting_queue
from workerkit.errors import (
    Document,
    DropJob,
    FailJob,
    HandBack,
    InvalidInput,
    JobError,
    JobFailed,
    LeaveJob,
    NotesUnavailable,
    OperatorFault,
    RetryJob,
    StoreUnavailable,
)
from workerkit.inputs import AudioInput, ImageInput, JobInput, TextInput, check_input
from workerkit.logs import RepeatedFaultLog, logger, place_of
from workerkit.media import inspect_picture, inspect_sound, nearest_size
from workerkit.mongodb import Clock, NoSubDocument, open_database, unknown_when_unreachable
from workerkit.process import EventLoopThread, Heartbeat, ShutdownTime, is_process_alive, signals_deferred
from workerkit.provider import OpenAIProvider, Provider
from workerkit.settings import (
    EXIT_BAD_SETTINGS,
    PROVIDER_KINDS,
    Limits,
    ProviderKind,
    ProviderSettings,
    Settings,
    load_settings,
)
from workerkit.surroundings import pool_fault, write_any_character

if TYPE_CHECKING:
    from pymongo.collection import Collection
    from pymongo.database import Database

# What a module of job types needs.
__all__ = ["Call", "FailJob", "JobInput", "Media", "Result", "RetryJob", "handles"]

# ── vocabulary ───────────────────────────────────────────────────────────────────────────────────────────────────


class Status(StrEnum):
    """The four statuses of a job document (contract, section 2). The API rejects a document with any other."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"


ACTIVE_STATUSES = frozenset({Status.PENDING, Status.PROCESSING})
TERMINAL_STATUSES = frozenset({Status.COMPLETED, Status.FAILED})


@dataclass(frozen=True)
class Job:
    """A claimed job as its document describes it. The message is only a hint.

    `owner` is the fencing token, new for each attempt. `waited_s` is the time from its creation, or from the end of
    its last wait, until the claim; None where the document has no such time.
    """

    id: ObjectId
    job_type: str
    user_id: str
    session_id: str | None
    input_data: Any
    owner: str
    attempt: int
    limits: Limits
    first_started_at: datetime
    waited_s: float | None = field(default=None, compare=False)
    leased_at: float = field(default_factory=lambda: time.monotonic(), compare=False)

    def __str__(self) -> str:
        return f"job={self.id} attempt={self.attempt} type={self.job_type!r}"


@dataclass(frozen=True)
class Media:
    """A generated file: its bytes, and the field of `output_data` that takes its URL."""

    data: bytes = field(repr=False)
    suffix: str
    url_field: str


@dataclass(frozen=True)
class Result:
    """What a handler made: the fields of `output_data`, and a file where there is one."""

    output: Document
    media: Media | None = None


Outcome = Result | JobError

# ── Celery app ───────────────────────────────────────────────────────────────────────────────────────────────────

TASK_NAME = "src.infrastructure.queue.tasks.process_job"
NODE = f"{socket.gethostname()}-{secrets.token_hex(4)}"  # made before the fork, so that siblings know each other


class WorkerApp(Celery):
    """The Celery app, with the settings of this process: read when first needed, or given to `configure`."""

    @cached_property
    def settings(self) -> Settings:
        return load_settings()


def celery_configuration(settings: Settings) -> Document:
    """Celery's settings: JSON only, late acknowledgement, one message in hand per slot, endless reconnection."""
    queue = settings.celery_queue_name
    return {
        # All three, since Celery prefers variables called CELERY_BROKER_URL and the like, and takes them as they are.
        **dict.fromkeys(("broker_url", "broker_read_url", "broker_write_url"), settings.broker_url),
        "broker_transport_options": transport_options(settings),
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_channel_error_retry": True,  # a full or read-only Redis must not end the worker
        "result_backend": f"workerkit.broker.ResultBackend+{settings.result_backend}",
        "result_backend_transport_options": {"retry_policy": {"timeout": 5.0}},
        "result_expires": 86_400,
        # A result is only a copy of what the document has, so no job waits long to store it.
        **dict.fromkeys(("redis_socket_connect_timeout", "redis_socket_timeout"), 5),
        "imports": settings.handler_modules,
        "task_default_queue": queue,
        "task_queues": [ExistingQueue(queue, Exchange(queue), queue)] if settings.is_rabbitmq else None,
        "accept_content": ["json"],
        **dict.fromkeys(("task_serializer", "result_serializer"), "json"),
        "timezone": "UTC",
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "task_track_started": True,
        "task_time_limit": settings.celery_time_limit,  # the soft limit is the attempt's own deadline instead
        "worker_consumer": "workerkit.broker:JobConsumer",
        "worker_send_task_events": settings.celery_send_events,
        "worker_prefetch_multiplier": 1,
        "worker_cancel_long_running_tasks_on_connection_loss": False,  # with a Redis result backend it loses the job
        **dict.fromkeys(("worker_log_format", "worker_task_log_format"), logs.FORMAT),
    }


# Importing this module doesn't change Celery's current app. A worker sets it when it starts.
app = WorkerApp("ai_backend_worker", amqp=JobAMQP, set_as_current=False)


def read_configuration() -> Document:
    """Celery calls this when it first needs its configuration, for example in `celery -A worker …`."""
    configuration = celery_configuration(app.settings)
    app.backend_cls = configuration["result_backend"]
    return configuration


app.add_defaults(read_configuration)


# ── job store ────────────────────────────────────────────────────────────────────────────────────────────────────

OBJECT_ID_DIGITS = 24
Written = TypeVar("Written")


class Reason(Enum):
    """Why a job could not be claimed."""

    UNKNOWN = "no such document (another DATABASE_NAME on this queue?)"
    FOREIGN_STATUS = "its status isn't one of the contract's four"
    TERMINAL = "it has ended already"
    HELD = "it is held by a live lease"
    WAITING = "it waits for its next try"
    EXHAUSTED = "it has used up its attempts or its time"


@dataclass(frozen=True)
class NotClaimed:
    """A claim that got nothing: why, and the document in which that was read."""

    reason: Reason
    document: Document = field(default_factory=dict)


def bookkeeping(document: Document) -> Document:
    """The worker's own fields (`worker`); empty where the API or another program left something else there."""
    worker = document.get("worker")
    return worker if isinstance(worker, dict) else {}


def seconds_since(moment: object, now: datetime) -> float | None:
    """Seconds from a document's time until now; None if the field holds no date."""
    return max(0.0, (now - moment.replace(tzinfo=UTC)).total_seconds()) if isinstance(moment, datetime) else None


class JobStore:
    """The jobs in MongoDB: one method for each transition, each an atomic operation guarded by status and owner.

    `database` comes from `open_database`: the guards hold only where a majority confirms each write. Every method but
    the constructor raises StoreUnavailable.
    """

    rescue_first_s, rescue_max_s = 30.0, 600.0  # from one rescue of a job to the next, doubled each time
    pending_overdue_s = 60.0  # until a message that hasn't come may be lost
    batch = 100  # documents that one search returns at most

    def __init__(self, database: Database[Document], node: str, clock: Clock, settings: Settings) -> None:
        self._database = database
        self._jobs: Collection[Document] = database["jobs"]
        self._node = node
        self._settings = settings
        self.clock = clock
        self.primary: ObjectId | None = None

    def synchronise_clock(self) -> None:
        """Reads the database's time, and which server process is the primary (unknown behind a mongos)."""
        with unknown_when_unreachable():
            try:
                hello = self._database.command("hello")
            except NotImplementedError:  # mongomock has no `hello`, so the host's clock serves
                hello = {"localTime": datetime.now(UTC)}
        self.primary = None if hello.get("msg") == "isdbgrid" else hello.get("topologyVersion", {}).get("processId")
        self.clock.synchronise(hello["localTime"].replace(tzinfo=UTC))

    def now(self) -> datetime:
        """The database's time. It is asked before its first use, since the host's clock may be minutes off."""
        if not self.clock.is_synchronised:
            self.synchronise_clock()
        return self.clock.now()

    def ensure_indexes(self) -> None:
        with unknown_when_unreachable():
            self._jobs.create_index([("status", 1), ("created_at", 1)], name="worker_status")
            self._jobs.create_index([("worker.unnotified", 1)], name="worker_unnotified", sparse=True)

    def read(self, job_id: ObjectId) -> Document | None:
        with unknown_when_unreachable():
            return self._jobs.find_one({"_id": job_id})

    def claim(
        self, job_id: ObjectId, owner: str, limits: Limits, *, bounded: bool = True, waited_s: float = 0.0
    ) -> Job | NotClaimed:
        """Claims a job that is pending, or released and due. An expired lease has to be released by a sweeper first.

        A pending job starts afresh, whatever bookkeeping it has. The worker never sets a job back to pending, so the
        API or an operator has put it back to be tried again.

        Call it with the same `owner` until it answers: a claim whose reply was lost is then recognised.
        `bounded=False` ignores attempts and deadline, for a job whose result is there already. `waited_s` is how long
        ago the message was taken, which is when Celery's hard limit began.
        """
        now = self.now()
        lease = self._lease(now, owner, limits, waited_s)
        taken = {"status": Status.PROCESSING, "updated_at": now}
        afresh = {"started_at": now, "completed_at": None, "error_message": None}
        first = {"$set": {**taken, **afresh, "worker": {**lease, "attempt": 1, "first_started_at": now}}}
        again = {
            "$set": {**taken, **{f"worker.{name}": value for name, value in lease.items()}},
            "$inc": {"worker.attempt": 1},
            "$min": {"worker.first_started_at": now},
        }
        pending = {"_id": job_id, "status": Status.PENDING}
        released = {"_id": job_id, "status": Status.PROCESSING, "worker.owner": None}
        due = {**released, "worker.available_at": {"$lte": now}, **(self._bounds(limits) if bounded else {})}
        take = partial(self._jobs.find_one_and_update, return_document=True)
        document = self._write_below_worker(job_id, lambda: take(pending, first) or take(due, again))
        return self._job(document) if document else self._why_not_claimed(job_id, owner)

    def _lease(self, now: datetime, owner: str, limits: Limits, waited_s: float) -> Document:
        return {
            "owner": owner,
            "node": self._node,
            "pid": os.getpid(),
            "lease_until": now + timedelta(seconds=self._settings.lease_seconds),
            "deadline": now + timedelta(seconds=limits.hard_s - waited_s),
            "limits": [limits.hard_s, limits.soft_s],
        }

    def _write_below_worker(self, job_id: ObjectId, write: Callable[[], Written]) -> Written:
        """Makes a write that sets fields below `worker`. Where that is no sub-document, it is replaced by one first."""
        try:
            with unknown_when_unreachable():
                return write()
        except NoSubDocument:
            # `$type: object` would match an array of objects as well.
            no_object = [{"worker": {"$not": {"$type": "object"}}}, {"worker": {"$type": "array"}}]
        with unknown_when_unreachable():
            self._jobs.update_one({"_id": job_id, "$or": no_object}, {"$set": {"worker": {}}})
            return write()

    def oldest_start(self, limits: Limits, after_s: float = 0.0) -> datetime:
        """A job that first started at this time or before has used up its time, now or in `after_s` seconds."""
        longest_s = max(self._settings.job_deadline, limits.hard_s)
        return self.now() + timedelta(seconds=after_s - longest_s)

    def _bounds(self, limits: Limits) -> Document:
        return {
            "worker.attempt": {"$not": {"$gte": self._settings.max_attempts}},
            "worker.first_started_at": {"$not": {"$lte": self.oldest_start(limits)}},
        }

    def _why_not_claimed(self, job_id: ObjectId, owner: str) -> Job | NotClaimed:
        """Reads the document to see why a claim got nothing. Returns the job if this owner has claimed it after all."""
        document = self.read(job_id)
        if document is None:
            return NotClaimed(Reason.UNKNOWN)
        worker, status = bookkeeping(document), document.get("status")
        if status in TERMINAL_STATUSES:
            return NotClaimed(Reason.TERMINAL, document)
        if status not in ACTIVE_STATUSES:
            return NotClaimed(Reason.FOREIGN_STATUS, document)
        if status == Status.PENDING:  # put back since the claim, so it can be claimed at once
            return NotClaimed(Reason.WAITING)
        if worker.get("owner") == owner:
            return self._job(document)
        if worker.get("owner") or "available_at" not in worker:
            return NotClaimed(Reason.HELD, document)
        # It may have been released since the claim, so its bounds have to be looked at.
        return NotClaimed(Reason.EXHAUSTED if self.is_past_bounds(document) else Reason.WAITING, document)

    def _job(self, document: Document) -> Job:
        worker, now = document["worker"], self.now()
        hard_s, soft_s = worker["limits"]
        left_s = (worker["lease_until"].replace(tzinfo=UTC) - now).total_seconds()
        return Job(
            id=document["_id"],
            job_type=str(document.get("job_type")),
            user_id=str(document.get("user_id") or ""),
            session_id=document.get("session_id"),
            input_data=document.get("input_data"),
            owner=worker["owner"],
            attempt=worker["attempt"],
            limits=Limits(soft_s, hard_s),
            first_started_at=worker["first_started_at"].replace(tzinfo=UTC),
            waited_s=seconds_since(worker.get("available_at") or document.get("created_at"), now),
            leased_at=time.monotonic() - (self._settings.lease_seconds - left_s),
        )

    def complete(self, job: Job, output: Document, artifact_url: str | None) -> bool:
        """Ends the job with its result. False: the job is no longer this attempt's, and nothing was written."""
        return self._end(job, Status.COMPLETED, output_data=output, artifact_url=artifact_url, error_message=None)

    def fail(self, job: Job, sentence: str) -> bool:
        """Ends the job with a sentence for the person. False: it is no longer this attempt's; nothing was written."""
        return self._end(job, Status.FAILED, error_message=sentence)

    def release(self, job: Job, available_at: datetime, *, counted: bool) -> bool:
        """Releases the job: it may be claimed from `available_at` on. False: it is no longer this attempt's.

        If the reply to an earlier try was lost and the job was claimed or ended since, the answer is False as well.
        Where it is False, nothing was written.
        """
        update: Document = {
            "$set": {**self._released(available_at, self.rescue_first_s), "worker.released_by": job.owner}
        }
        if not counted:
            update["$inc"] = {"worker.attempt": -1}
        with unknown_when_unreachable():
            released_before = {**self._fence(job), "worker.owner": None, "worker.released_by": job.owner}
            released = self._jobs.update_one(self._fence(job), update).matched_count == 1
            return released or self._jobs.find_one(released_before, {"_id": 1}) is not None

    def fail_active(self, job_id: ObjectId, sentence: str) -> Document | None:
        """Fails a job, even one that an attempt runs; that attempt then loses it. None: the job had ended already."""
        update = {"$set": self._ended(Status.FAILED, error_message=sentence)}
        active = {"_id": job_id, "status": {"$in": list(ACTIVE_STATUSES)}}
        fail = partial(self._jobs.find_one_and_update, active, update, return_document=True)
        return self._write_below_worker(job_id, fail)

    def fail_unowned(self, job_id: ObjectId, sentence: str) -> bool:
        """Fails a job that no attempt runs: pending, or released. False: it was neither, and nothing was written."""
        released = {"status": Status.PROCESSING, "worker.owner": None, "worker.available_at": {"$ne": None}}
        unowned = {"_id": job_id, "$or": [{"status": Status.PENDING}, released]}
        update = {"$set": self._ended(Status.FAILED, error_message=sentence)}
        return self._write_below_worker(job_id, lambda: self._jobs.update_one(unowned, update).matched_count == 1)

    def _fence(self, job: Job) -> Document:
        return {"_id": job.id, "status": Status.PROCESSING, "worker.owner": job.owner}

    def _ended(self, status: Status, **fields: Any) -> Document:
        now = self.now()
        return {"status": status, "updated_at": now, "completed_at": now, "worker.unnotified": now, **fields}

    def _released(self, available_at: datetime, rescue_s: float) -> Document:
        return {
            "updated_at": self.now(),
            "worker.owner": None,
            "worker.available_at": available_at,
            "worker.rescue_at": available_at + timedelta(seconds=rescue_s),
        }

    def _end(self, job: Job, status: Status, **fields: Any) -> bool:
        with unknown_when_unreachable():
            if self._jobs.update_one(self._fence(job), {"$set": self._ended(status, **fields)}).matched_count:
                return True
            seen = {"status": 1, "worker.owner": 1, "error_message": 1}
            document = self._jobs.find_one({"_id": job.id}, seen) or {}
        if bookkeeping(document).get("owner") != job.owner:
            return False
        if document["status"] == Status.PROCESSING:
            raise StoreUnavailable("the last write isn't confirmed by a majority yet")
        # This owner's and terminal: either this very write, whose reply was lost, or a cancel by the API, which
        # leaves the owner in place.
        return bool((document["status"], document.get("error_message")) == (status, fields["error_message"]))

    def renew_leases(self, jobs: Sequence[Job]) -> None:
        """Renews the leases of those jobs that are still owned, in one operation. `updated_at` stays as it is."""
        until = self.now() + timedelta(seconds=self._settings.lease_seconds)
        held = {
            "_id": {"$in": [job.id for job in jobs]},
            "status": Status.PROCESSING,
            "worker.owner": {"$in": [job.owner for job in jobs]},
        }
        with unknown_when_unreachable():
            # A renewal that a frozen MongoDB makes late, after a younger one, must not shorten the lease.
            self._jobs.update_many(held, {"$max": {"worker.lease_until": until}})

    def find_lost(self, jobs: Sequence[Job]) -> list[Job]:
        """Those of these jobs that were cancelled or taken: no longer processing, or with another owner."""
        with unknown_when_unreachable():
            found = self._jobs.find({"_id": {"$in": [job.id for job in jobs]}}, {"status": 1, "worker.owner": 1})
            owners = {d["_id"]: bookkeeping(d).get("owner") for d in found if d["status"] == Status.PROCESSING}
        return [job for job in jobs if owners.get(job.id) != job.owner]

    def mark_notified(self, job_ids: Sequence[ObjectId]) -> None:
        with unknown_when_unreachable():
            self._jobs.update_many({"_id": {"$in": list(job_ids)}}, {"$unset": {"worker.unnotified": ""}})

    def find_unnotified(self, older_than_s: float) -> list[Document]:
        """Jobs that ended longer ago, and whose last notice was not confirmed as published."""
        since = self.now() - timedelta(seconds=older_than_s)
        with unknown_when_unreachable():
            return list(self._jobs.find({"worker.unnotified": {"$lte": since}}).limit(self.batch))

    def find_siblings(self) -> list[Document]:
        """Jobs that processes of this node hold, including processes that are dead."""
        with unknown_when_unreachable():
            held = {"status": Status.PROCESSING, "worker.node": self._node, "worker.owner": {"$ne": None}}
            return list(self._jobs.find(held))

    def find_stale(self) -> list[Document]:
        """Jobs that no attempt works on.

        Their lease ran out, the message after their release is lost, or a worker of an older version left them.
        """
        now = self.now()
        expired = {"worker.lease_until": {"$lte": now}, "worker.owner": {"$ne": None}}
        # A job that was rescued while pending has a `rescue_at` but no owner field. Once a worker of an
        # older version runs it, only its age counts.
        forgotten = {"worker.owner": {"$exists": True, "$eq": None}, "worker.rescue_at": {"$lte": now}}
        with unknown_when_unreachable():
            stale = list(self._jobs.find({"status": Status.PROCESSING, "$or": [expired, forgotten]}).limit(self.batch))
            without_lease = {"status": Status.PROCESSING, "worker.owner": {"$exists": False}}
            older = self._jobs.find(without_lease).limit(self.batch)
            return stale + [document for document in older if self._is_orphan(document, now)]

    def find_forgotten_pending(self, count_queued: Callable[[], int]) -> list[Document]:
        """Pending jobs whose message the broker has lost.

        They have waited for over a minute although the queue is empty, or although a job that is a minute younger has
        started. A job that merely waits behind others is not among them, since a copy of its message would not help.
        """
        now, minute = self.now(), timedelta(seconds=self.pending_overdue_s)
        overdue = {"created_at": {"$lt": now - minute}, "worker.rescue_at": {"$not": {"$gt": now}}}
        with unknown_when_unreachable():
            oldest = self._jobs.find({"status": Status.PENDING, **overdue}).sort("created_at", 1).limit(self.batch)
            if not (waiting := list(oldest)) or count_queued() == 0:
                return waiting
            started = {"started_at": {"$ne": None}, "created_at": {"$lte": now}}  # leaves out values that are not dates
            youngest_started = [
                self._jobs.find_one({"status": status, **started}, sort=[("created_at", -1)])
                for status in (Status.PROCESSING, *TERMINAL_STATUSES)
            ]
        overtaken = max((document["created_at"] - minute for document in youngest_started if document), default=None)
        return [document for document in waiting if overtaken and document["created_at"] < overtaken]

    def _is_orphan(self, document: Document, now: datetime) -> bool:
        age_s = self._settings.orphan_after or self._settings.celery_time_limit + 60
        times = [t for t in map(document.get, ("started_at", "updated_at", "created_at")) if isinstance(t, datetime)]
        return not times or times[0].replace(tzinfo=UTC) < now - timedelta(seconds=age_s)

    def is_past_bounds(self, document: Document) -> bool:
        """Whether a job has used up its attempts, or the time since its first start."""
        worker = bookkeeping(document)
        oldest_start = self.oldest_start(self._settings.limits(worker.get("limits")))
        started_at = worker.get("first_started_at")
        too_old = started_at is not None and started_at.replace(tzinfo=UTC) <= oldest_start
        return bool(too_old) or worker.get("attempt", 0) >= self._settings.max_attempts

    def release_stale(self, document: Document) -> bool:
        """Turns a stale job into a released one that is due now. False: it has changed since it was read.

        Each time the next rescue is twice as far away, so that a long queue isn't flooded with copies.
        """
        worker = bookkeeping(document)
        rescue_s, rescues = self._next_rescue(worker)
        update = {**self._released(self.now(), rescue_s), "worker.rescues": rescues}
        if not worker:  # MongoDB sets no field below `worker` if that is null, as in the job of an older version
            fields = {key.removeprefix("worker."): update.pop(key) for key in list(update) if key.startswith("worker.")}
            update["worker"] = fields
        with unknown_when_unreachable():
            return self._jobs.update_one(self._unchanged(document), {"$set": update}).matched_count == 1

    def _next_rescue(self, worker: Document) -> tuple[float, int]:
        """Seconds until the rescue after this one, and how many there have been then."""
        rescues = worker.get("rescues", 0)
        return min(self.rescue_first_s * 2 ** min(rescues, 10), self.rescue_max_s), rescues + 1

    def reserve_rescue(self, document: Document) -> bool:
        """Reserves the rescue of a pending job for this sweeper. False: another has it, or the job has started."""
        worker = bookkeeping(document)
        rescue_s, rescues = self._next_rescue(worker)
        update = {"rescue_at": self.now() + timedelta(seconds=rescue_s), "rescues": rescues}
        with unknown_when_unreachable():
            same = {"_id": document["_id"], "status": Status.PENDING, "worker": document.get("worker")}
            return self._jobs.update_one(same, {"$set": {"worker": {**worker, **update}}}).matched_count == 1

    def undo_rescue(self, document: Document) -> None:
        """Makes a rescue due soon again after its message couldn't be sent, so that it doesn't wait twice as long."""
        unsent = {
            "_id": document["_id"],
            "status": Status.PROCESSING,
            "worker.owner": None,
            "worker.rescues": self._next_rescue(bookkeeping(document))[1],
        }
        due_at = self.now() + timedelta(seconds=self._settings.sweep_interval)
        with unknown_when_unreachable():
            self._jobs.update_one(unsent, {"$inc": {"worker.rescues": -1}, "$set": {"worker.rescue_at": due_at}})

    def fail_stale(self, document: Document, sentence: str) -> bool:
        """Fails a stale job. False: it has changed since it was read."""
        update = {"$set": self._ended(Status.FAILED, error_message=sentence)}
        with unknown_when_unreachable():
            return self._jobs.update_one(self._unchanged(document), update).matched_count == 1

    def _unchanged(self, document: Document) -> Document:
        same: Document = {"_id": document["_id"], "status": Status.PROCESSING}
        worker = bookkeeping(document)
        if not worker:
            return {**same, "worker": document.get("worker")}
        # The values as they were read: after a renewal, or another sweeper's release, they no longer match.
        return same | {f"worker.{key}": worker.get(key) for key in ("owner", "lease_until", "rescue_at")}

    def find_unreferenced(self, names: Sequence[str]) -> list[str]:
        """Those of these files (named by job and owner) whose job has ended without naming them."""
        ids = [ObjectId(name[:OBJECT_ID_DIGITS]) for name in names]
        ended = {"_id": {"$in": ids}, "status": {"$in": list(TERMINAL_STATUSES)}}
        with unknown_when_unreachable():
            found = self._jobs.find(ended, {"artifact_url": 1, "output_data": 1})
            named = {str(d["_id"]): f"{d.get('artifact_url')} {d.get('output_data')}" for d in found}
        return [name for name in names if name not in named.get(name[:OBJECT_ID_DIGITS], name)]


# ── notifier ─────────────────────────────────────────────────────────────────────────────────────────────────────

STATUS_CHANNEL = "job_notifications"
PROGRESS_CHANNEL = "job_progress"
READY = "Your result is ready."


class Notifier:
    """Publishes to the API over Redis pub/sub (contract, section 3). A failure is logged and returned, never raised."""

    recheck_s = 1.0  # how long no text is sent after a piece that no subscriber received

    def __init__(self, client: redis.Redis) -> None:
        self._redis = client
        self._log = RepeatedFaultLog("notifications can't be published")
        self._next_progress_at = 0.0

    def publish_status(self, document: Document, status: Status, sentence: str) -> bool:
        """Publishes a status that the document already has. False: Redis could not be reached."""
        message = {
            "type": "job_status_update",
            "user_id": str(document.get("user_id") or ""),
            "job_id": str(document["_id"]),
            "status": status,
            "session_id": document.get("session_id"),
            "message": sentence,
        }
        return self._publish(STATUS_CHANNEL, message) is not None

    def may_have_listeners(self) -> bool:
        """Whether a piece of text is worth sending: False for `recheck_s` after one that no subscriber received."""
        return time.monotonic() >= self._next_progress_at

    def publish_progress(self, job: Job, sequence: int, delta: str) -> bool:
        """Publishes a piece of text. False: there is no subscriber, or Redis could not be reached."""
        message = {
            "type": "job_progress",
            "user_id": job.user_id,
            "job_id": str(job.id),
            "session_id": job.session_id,
            "attempt": job.attempt,
            "sequence": sequence,
            "delta": delta,
        }
        receivers = self._publish(PROGRESS_CHANNEL, message)
        self._next_progress_at = 0.0 if receivers else time.monotonic() + self.recheck_s
        return bool(receivers)

    def _publish(self, channel: str, message: Document) -> int | None:
        """The number of receivers; None if Redis could not be reached."""
        try:
            receivers = int(self._redis.publish(channel, json.dumps(message, default=str)))
        except redis.RedisError as error:
            self._log.fault(type(error).__name__)
            return None
        self._log.over()
        return receivers


class SharedNotes:
    """What workers note for each other in Redis: results that MongoDB couldn't take, revoked jobs, whose turn it is."""

    KEPT_S = 3600

    def __init__(self, client: redis.Redis, database_name: str = "") -> None:
        self._redis = client
        self._database_name = database_name  # one Redis may serve several databases
        self._revoked_key = f"revoked_jobs:{database_name}"

    def keep_result(self, job: Job, result: Result) -> bool:
        """Keeps a finished generation for the job's next attempt. False: Redis could not be reached."""
        media = result.media and [result.media.data, result.media.suffix, result.media.url_field]
        try:
            # Not set again (nx), so that it expires in the end however often it is kept.
            self._redis.set(f"result:{job.id}", json_util.dumps([result.output, media]), ex=self.KEPT_S, nx=True)
        except redis.RedisError as error:
            logger.error("%s its result could not be kept: %s", job, type(error).__name__)
            return False
        return True

    def kept_result(self, job_id: ObjectId) -> Result | None:
        """The result that an earlier attempt kept. Raises NotesUnavailable: Redis can't be asked."""
        try:
            raw = self._redis.get(f"result:{job_id}")
        except redis.RedisError as error:
            raise NotesUnavailable(f"Redis: {type(error).__name__}") from error
        if not raw:
            return None
        output, media = json_util.loads(raw)
        return Result(output, media and Media(*media))

    def forget_result(self, job_id: ObjectId) -> None:
        with contextlib.suppress(redis.RedisError):  # it expires by itself
            self._redis.delete(f"result:{job_id}")

    def take_turn(self, chore: str, every_s: float) -> bool:
        """Whether this process is to do a chore now, of all processes that share the database."""
        try:
            return bool(self._redis.set(f"{chore}:{self._database_name}", "taken", ex=int(every_s), nx=True))
        except redis.RedisError:  # the chore can wait
            return False

    def note_revoked(self, job_id: str) -> None:
        """Notes a job whose task an operator revoked, until a sweep has failed it."""
        try:
            self._redis.sadd(self._revoked_key, job_id)
        except redis.RedisError as error:
            logger.warning("job=%s was revoked, but this can't be noted in Redis: %s", job_id, type(error).__name__)

    def revoked(self) -> list[str]:
        """The ids of revoked jobs. Raises NotesUnavailable: Redis can't be asked."""
        try:
            members = self._redis.smembers(self._revoked_key)
        except redis.RedisError as error:
            raise NotesUnavailable(f"Redis: {type(error).__name__}") from error
        return [str(job_id, "ascii") for job_id in members if isinstance(job_id, bytes)]

    def forget_revoked(self, job_id: str) -> None:
        with contextlib.suppress(redis.RedisError):  # failing the job once more does nothing
            self._redis.srem(self._revoked_key, job_id)


class Progress:
    """Streams a job's text to its subscribers: the first piece at once, then a batch every `batch_s` seconds.

    A piece that no subscriber received is sent again with the next one. Use it on the event loop only.
    """

    def __init__(self, job: Job, notifier: Notifier, is_lease_fresh: Callable[[], bool], batch_s: float = 0.05) -> None:
        self._job, self._notifier, self._is_lease_fresh, self._batch_s = job, notifier, is_lease_fresh, batch_s
        self._pending: list[str] = []
        self._sequence = 0
        self._flusher: asyncio.Task[None] | None = None
        self._finished = asyncio.Event()

    def __call__(self, delta: str) -> None:
        self._pending.append(delta)
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.get_running_loop().create_task(self._flush())

    async def _flush(self) -> None:
        while self._pending:
            is_last = self._finished.is_set()
            was_received = await self._send()
            if is_last:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._batch_s if was_received else self._notifier.recheck_s):
                    await self._finished.wait()

    async def _send(self) -> bool:
        if not (self._is_lease_fresh() and self._notifier.may_have_listeners()):  # then it is not worth a thread
            return False
        count = len(self._pending)
        delta = "".join(self._pending[:count])
        was_received = await asyncio.to_thread(self._notifier.publish_progress, self._job, self._sequence, delta)
        if was_received:
            del self._pending[:count]
            self._sequence += 1
        return was_received

    async def finish(self) -> None:
        """Sends what is left, so that no progress follows the final status."""
        self._finished.set()
        if self._flusher:
            await self._flusher

    def stop(self) -> None:
        """Sends nothing more."""
        if self._flusher:
            self._flusher.cancel()


# ── handlers ─────────────────────────────────────────────────────────────────────────────────────────────────────

GPT_IMAGE_SIZES = ("1024x1024", "1536x1024", "1024x1536")


@dataclass(frozen=True)
class Call:
    """What a handler gets: the job, its checked input, the provider and its defaults, and where streamed text goes."""

    job: Job
    input: Any
    settings: Settings
    provider: Provider
    defaults: ProviderSettings
    progress: Callable[[str], None]

    @property
    def model(self) -> str:
        """The model that the input names, if the settings allow it, else the default.

        Raises:
            InvalidInput: the input names another model.
        """
        wanted = getattr(self.input, "model", None)
        offered = (self.defaults.model, *self.defaults.allowed_models)
        if wanted is None or wanted in offered:
            return wanted or self.defaults.model
        sentence = f"This model isn't offered. Choose one of: {', '.join(offered)}."
        raise InvalidInput("a model that isn't on the list", sentence)


Run = Callable[[Call], Awaitable[Result]]


@dataclass(frozen=True)
class Handler:
    run: Run
    input_model: type[BaseModel]
    provider: ProviderKind


HANDLERS: dict[str, Handler] = {}


def handles(job_type: str, input_model: type[BaseModel], *, provider: ProviderKind = "text") -> Callable[[Run], Run]:
    """Makes an async function the handler of a job type: it gets a Call and returns a Result.

    `input_data` is checked against `input_model` first. The function raises RetryJob or FailJob to end the attempt
    without a result.
    """

    def register(run: Run) -> Run:
        HANDLERS[job_type] = Handler(run, input_model, provider)
        return run

    return register


def find_handler(job_type: str) -> Handler:
    """The handler of a job type. Raises OperatorFault: there is none."""
    if job_type in HANDLERS:
        return HANDLERS[job_type]
    sentence = f"This kind of job isn't known here: {job_type[:40]!r}."
    raise OperatorFault("no handler for this job type: does HANDLER_MODULES name its module?", sentence)


@handles("text_generation", TextInput, provider="text")
async def text_generation(call: Call) -> Result:
    """Generates a text by a chat completion, which is streamed to the person as it grows."""
    inputs: TextInput = call.input
    cap = call.settings.text_max_tokens
    if inputs.max_tokens and inputs.max_tokens > cap:
        sentence = f"The input can't be used: max_tokens should be at most {cap}."
        raise InvalidInput("max_tokens over the cap", sentence)
    request = {"model": call.model, "messages": inputs.conversation(), "max_tokens": inputs.max_tokens or cap}
    request |= {key: getattr(inputs, key) for key in TextInput.PASSED_ON if getattr(inputs, key) is not None}
    answer = await call.provider.text(request, call.progress)
    return Result({"generated_text": answer.text, "model_used": answer.model, "tokens_used": answer.tokens})


@handles("image_generation", ImageInput, provider="image")
async def image_generation(call: Call) -> Result:
    """Generates a picture. Its resolution is read from its bytes."""
    inputs: ImageInput = call.input
    is_gpt_image = call.model.startswith("gpt-image") and not call.defaults.base_url
    sizes = call.settings.image_sizes or (GPT_IMAGE_SIZES if is_gpt_image else ())
    request = {"model": call.model, "prompt": inputs.prompt, "n": 1, "size": nearest_size(inputs.size, sizes)}
    if inputs.quality:
        request["quality"] = inputs.quality
    data, model = await call.provider.image(request)
    resolution, suffix = await asyncio.to_thread(inspect_picture, data)
    return Result({"model_used": model, "resolution": resolution}, Media(data, suffix, "image_url"))


@handles("audio_generation", AudioInput, provider="audio")
async def audio_generation(call: Call) -> Result:
    """Speaks a text. Format and duration are read from the bytes."""
    inputs: AudioInput = call.input
    request: Document = {
        "model": call.model,
        "input": inputs.text or inputs.prompt,
        "voice": call.settings.audio_voice if inputs.voice == "default" else inputs.voice,
        "response_format": inputs.format or call.settings.audio_format,
    }
    if inputs.speed:
        request["speed"] = inputs.speed
    data, model = await call.provider.speech(request)
    data, duration_s, sound_format = await asyncio.to_thread(inspect_sound, data)
    output = {"model_used": model, "duration_seconds": duration_s, "format": sound_format}
    return Result(output, Media(data, sound_format, "audio_url"))


class Providers:
    """One provider for each server and key, made when first needed, in the process that generates."""

    CLOSE_S = 5.0

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._made: dict[tuple[asyncio.AbstractEventLoop, str, str], Provider] = {}

    def preload(self) -> None:
        """Imports the HTTP client before the first job needs it."""
        if not all(self._settings.provider(kind).is_offline for kind in PROVIDER_KINDS):
            importlib.import_module("aiohttp")

    def get(self, kind: ProviderKind) -> Provider:
        """The provider of one kind of generation. Call it on the event loop, to which its connections then belong."""
        where = self._settings.provider(kind)
        if where.is_offline:
            from workerkit.offline import OfflineProvider

            return OfflineProvider()
        key = (asyncio.get_running_loop(), where.base_url, where.api_key)
        if key not in self._made:
            self._made[key] = OpenAIProvider(where, self._settings.max_answer_bytes)
        return self._made[key]

    def close(self) -> None:
        """Closes every provider on its own loop. Call it from another thread, while the loops run."""
        for (loop, _, _), provider in self._made.items():
            with contextlib.suppress(TimeoutError):  # a handler blocks its loop
                asyncio.run_coroutine_threadsafe(provider.close(), loop).result(self.CLOSE_S)
        self._made.clear()


# ── recovery ─────────────────────────────────────────────────────────────────────────────────────────────────────

LIMIT_MARGIN_S = 5.0
DEADLINE_TOLERANCE_S = 1.0
TOOK_TOO_LONG = "This took too long and was stopped. Please try again, perhaps with a smaller request."
STOPPED = "This was stopped by the operator."
GAVE_UP = "This could not be finished after several tries. Please try again."


class Attempt:
    """One claimed run of a job, as the task, the event loop and the keeper share it."""

    def __init__(self, job: Job, lease_s: float, taken_at: float | None = None) -> None:
        self.job = job
        self.started_at = time.monotonic() if taken_at is None else taken_at  # when Celery's hard limit began
        self.lease_s = lease_s
        self.renewed_at = job.leased_at
        self.provider: ProviderSettings | None = None  # once the handler runs
        self.reason: JobError | None = None  # once it was cancelled
        self._stop: Callable[[], object] | None = None
        self._lock = threading.Lock()

    def is_lease_fresh(self) -> bool:
        return time.monotonic() < self.renewed_at + self.lease_s

    def may_renew(self) -> bool:
        """Whether the lease may be renewed: not past the hard limit and a margin, so no lease lasts for ever."""
        return time.monotonic() < self.started_at + self.job.limits.hard_s + LIMIT_MARGIN_S

    def time_left_s(self) -> float:
        """The soft limit; less if the claim had to wait so long that the hard limit would come first."""
        limits = self.job.limits
        latest = self.started_at + limits.hard_s - min(LIMIT_MARGIN_S, limits.hard_s - limits.soft_s)
        return max(0.0, min(limits.soft_s, latest - time.monotonic()))

    def bind(self, stop: Callable[[], object]) -> None:
        """Sets how to stop the running handler, and stops it if a cancel came before."""
        with self._lock:
            self._stop = stop
            if self.reason:
                stop()

    def cancel(self, reason: JobError) -> None:
        """Stops the handler, which closes its connection to the provider. Only the first reason counts."""
        with self._lock:
            if self.reason is None:
                self.reason = reason
                if self._stop:
                    self._stop()


def final_sentence(document: Document) -> str:
    """What the person reads about a job that has ended."""
    if document["status"] == Status.FAILED:
        return str(document.get("error_message") or "The job has failed.")
    return READY


class Sweeper:
    """Finds jobs that no attempt works on, and gets them going again or ends them at their bounds.

    Any number of processes may sweep at a time, since each step is a compare-and-set.
    """

    notice_overdue_s = 30.0  # until a notice that wasn't confirmed is published again
    broker_rest_s = 5.0  # after a failure the queue is left alone, since each try costs the keeper time

    def __init__(self, store: JobStore, notifier: Notifier, notes: SharedNotes, broker: Broker) -> None:
        self._store, self._notifier, self._notes, self._broker = store, notifier, notes, broker
        self._publish_again_at = 0.0
        self._enqueue_again_at = 0.0
        self._queue_log = RepeatedFaultLog("lost jobs can't be put back into the queue")

    def sweep(self) -> list[str]:
        """One search for lost jobs and lost notices; returns a line for each thing done.

        Raises:
            StoreUnavailable: MongoDB can't be reached.
        """
        done: list[str] = []
        unreachable: tuple[type[BaseException], ...] = (NotesUnavailable, *self._broker.errors)
        try:
            if time.monotonic() >= self._enqueue_again_at:
                self._recover_jobs(done)
                self._queue_log.over()
        except unreachable as error:  # the rest waits, since the keeper has leases to renew
            self._queue_log.fault(type(error).__name__)
            self._enqueue_again_at = time.monotonic() + self.broker_rest_s
        overdue = self._store.find_unnotified(self.notice_overdue_s)
        published = [document["_id"] for document in overdue if self._publish(document)]
        if published:
            self._store.mark_notified(published)
        return done + [f"job={job_id} its last notification was published again" for job_id in published]

    def _recover_jobs(self, done: list[str]) -> None:
        """Adds a line for each job that goes on or ends. Raises NotesUnavailable, and the broker's errors."""
        for job_id in self._notes.revoked():
            done += self._fail_revoked(job_id)
        for document in self._store.find_stale():
            done += self._rescue(document)
        for document in self._store.find_forgotten_pending(self._broker.queue_length):
            if self._store.reserve_rescue(document):
                self._enqueue(document)
                done.append(f"job={document['_id']} its message was lost: put into the queue again")

    def _fail_revoked(self, job_id: str) -> list[str]:
        failed = self._store.fail_active(ObjectId(job_id), STOPPED)
        self._notes.forget_revoked(job_id)
        if failed and self._publish(failed):
            self._store.mark_notified([failed["_id"]])
        return [f"job={job_id} failed: its task was revoked"] if failed else []

    def _rescue(self, document: Document) -> list[str]:
        job_id = document["_id"]
        if self._store.is_past_bounds(document) and not self._notes.kept_result(job_id):
            return self._fail(document, GAVE_UP)
        if not self._store.release_stale(document):
            return []
        self._enqueue(document)
        return [f"job={job_id} no attempt worked on it: put back into the queue"]

    def _fail(self, document: Document, sentence: str) -> list[str]:
        if not self._store.fail_stale(document, sentence):
            return []
        failed = {**document, "status": Status.FAILED, "error_message": sentence}
        if self._publish(failed):
            self._store.mark_notified([document["_id"]])
        return [f"job={document['_id']} failed: {sentence}"]

    def _publish(self, document: Document) -> bool:
        """Publishes a final status. After a failure it doesn't try for a while, since each try waits for Redis."""
        if time.monotonic() < self._publish_again_at:
            return False
        sent = self._notifier.publish_status(document, Status(document["status"]), final_sentence(document))
        self._publish_again_at = 0.0 if sent else time.monotonic() + self.notice_overdue_s
        return sent

    def _enqueue(self, document: Document) -> None:
        """Sends a message for the job. Raises the broker's errors, after it has made the rescue due soon again."""
        try:
            self._send(document)
        except self._broker.errors:
            self._store.undo_rescue(document)
            raise

    def _send(self, document: Document) -> None:
        """Sends a message with the job's own limits. It has no prompt, since the document has it."""
        job_id = str(document["_id"])
        hard_s, soft_s = bookkeeping(document).get("limits") or (None, None)
        self._broker.send(TASK_NAME, (job_id, {"job_id": job_id}), time_limit=hard_s, soft_time_limit=soft_s)

    def release_dead_siblings(self) -> list[str]:
        """Releases the jobs of this node's dead processes; fails those that were killed at their hard limit."""
        lines: list[str] = []
        for document in self._store.find_siblings():
            if is_process_alive(document["worker"]["pid"]):
                continue
            deadline = document["worker"]["deadline"].replace(tzinfo=UTC)
            if self._store.now() >= deadline - timedelta(seconds=DEADLINE_TOLERANCE_S):
                lines += self._fail(document, TOOK_TOO_LONG)
            elif self._store.release_stale(document):
                # Celery delivers its own message again, but another worker may have dropped that while the lease was
                # alive. If this one can't be sent, the next rescue sends it.
                with contextlib.suppress(*self._broker.errors):
                    self._enqueue(document)
                lines.append(f"job={document['_id']} its process died: released")
        return lines


class FileSweeper:
    """Deletes files that attempts which died left behind, and files past `ARTIFACT_RETENTION_DAYS`."""

    EVERY_S = 3600.0
    NAME = re.compile(r"[0-9a-f]{24}-[0-9a-f]{16}\.")

    def __init__(
        self, store: JobStore, notes: SharedNotes, artifacts: Callable[[], Artifacts], retention_days: float
    ) -> None:
        self._store, self._notes, self._artifacts, self._retention_days = store, notes, artifacts, retention_days
        self._next_at = 0.0

    def is_due(self) -> bool:
        """Whether it is time, and this process's turn among all that share the database."""
        if time.monotonic() < self._next_at:
            return False
        self._next_at = time.monotonic() + self.EVERY_S
        return self._notes.take_turn("artifact_sweep", self.EVERY_S)

    def sweep(self, *, all_files: bool = False) -> list[str]:
        """One search; returns a line that says how many files were deleted.

        A name begins with its job's id, which begins with the time. So without retention only the files of the last
        day are listed, unless `all_files` are asked for.

        Raises:
            StoreUnavailable, FailJob: MongoDB or the artifact store can't be reached, or refuses.
        """
        artifacts, now, kept_days = self._artifacts(), self._store.now(), self._retention_days
        oldest = ObjectId.from_datetime(now - timedelta(days=kept_days)) if kept_days else ObjectId("0" * 24)
        period = int(now.timestamp()) >> 16  # the first four of the 24 digits change every 18 hours
        prefixes = [""] if all_files or kept_days else [f"{period - 1:04x}", f"{period:04x}"]
        names = (name for prefix in prefixes for name in artifacts.names(prefix) if self.NAME.match(name))
        deleted = 0
        while batch := list(itertools.islice(names, self._store.batch)):
            for name in {*self._store.find_unreferenced(batch), *(name for name in batch if name < str(oldest))}:
                artifacts.delete(name)
                deleted += 1
        return [f"{deleted} file(s) deleted that no job names or that are too old"] if deleted else []


class Keeper:
    """One thread in each process that runs jobs. It renews leases, stops cancelled jobs, hands back, and sweeps."""

    tick_s = 1.0
    PATIENCE_S = 5.0
    INDEX_PATIENCE_S = 3600.0

    def __init__(
        self,
        store: JobStore,
        sweeper: Sweeper,
        files: FileSweeper,
        shutdown: ShutdownTime,
        heartbeat: Heartbeat,
        settings: Settings,
    ) -> None:
        self._store, self._sweeper, self._files = store, sweeper, files
        self._shutdown, self._heartbeat, self._settings = shutdown, heartbeat, settings
        self._attempts: dict[str, Attempt] = {}
        self._published: list[ObjectId] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._store_log = RepeatedFaultLog("MongoDB can't be reached")
        self._is_prepared = False
        self._renew_at = 0.0
        self._answered_at = time.monotonic()
        # The first sweep waits for one lease, since the owners of expired leases may be about to renew them.
        self._sweep_at = time.monotonic() + settings.lease_seconds

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after one more tick, which marks what was published."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self.PATIENCE_S)
        self._heartbeat.stop()

    def register(self, attempt: Attempt) -> None:
        with self._lock:
            self._attempts[attempt.job.owner] = attempt

    def unregister(self, attempt: Attempt) -> None:
        with self._lock:
            self._attempts.pop(attempt.job.owner, None)

    def note_published(self, job_id: ObjectId) -> None:
        """Takes a job's notice out of the outbox, with the next batch."""
        with self._lock:
            self._published.append(job_id)

    def _run(self) -> None:
        stopping = False
        while True:
            try:
                self.tick()
            except StoreUnavailable as error:
                self._store_log.fault(error)
                self._renew_at = 0.0
                self._sweep_at = time.monotonic() + self._settings.lease_seconds
            except Exception:  # nothing may end this thread, since no lease would be renewed any more
                logger.exception("the keeper goes on after an error")
            if stopping:
                return
            stopping = self._stopping.wait(self.tick_s)

    def tick(self) -> None:
        """Does everything that is due, the most urgent first.

        Raises:
            StoreUnavailable: MongoDB can't be reached. The next tick renews leases before anything else.
        """
        self._heartbeat.beat()
        with self._lock:
            attempts = list(self._attempts.values())
        if self._shutdown.is_due:
            for attempt in attempts:
                attempt.cancel(HandBack("the grace of the shutdown is over"))
        with pymongo.timeout(self.PATIENCE_S):
            self._renew(attempts)
            self._cancel_lost(attempts)
            self._empty_outbox()
            self._prepare_store()
            if time.monotonic() >= self._sweep_at and not self._shutdown.is_announced:
                self._sweep()
        self._answered_at = time.monotonic()
        self._store_log.over()

    def _renew(self, attempts: list[Attempt]) -> None:
        if time.monotonic() < min(self._renew_at, self._sweep_at):
            return
        at, primary_before = time.monotonic(), self._store.primary
        self._store.synchronise_clock()
        renewed = [attempt for attempt in attempts if attempt.may_renew()]
        if renewed:
            self._store.renew_leases([attempt.job for attempt in renewed])
        for attempt in renewed:
            attempt.renewed_at = at
        silent_s = time.monotonic() - self._answered_at  # MongoDB hung, or this process was suspended
        if primary_before != self._store.primary or silent_s > max(self._settings.lease_seconds / 2, 2 * self.tick_s):
            # The owners of leases that ran out meanwhile may be about to renew them.
            self._sweep_at = max(self._sweep_at, time.monotonic() + self._settings.lease_seconds)
        self._renew_at = at + self._settings.lease_seconds / 3

    def _cancel_lost(self, attempts: list[Attempt]) -> None:
        if not attempts:
            return
        lost = {job.owner for job in self._store.find_lost([attempt.job for attempt in attempts])}
        for attempt in attempts:
            if attempt.job.owner in lost:
                attempt.cancel(DropJob("cancelled, or taken by another worker"))

    def _empty_outbox(self) -> None:
        with self._lock:
            batch, self._published = self._published, []
        try:
            if batch:
                self._store.mark_notified(batch)
        except StoreUnavailable:
            with self._lock:
                self._published += batch
            raise

    def _prepare_store(self) -> None:
        """Once: makes the indexes, and releases what dead processes of this node held."""
        if self._is_prepared:
            return
        for line in self._sweeper.release_dead_siblings():
            logger.warning(line)
        self._is_prepared = True
        threading.Thread(target=self._ensure_indexes, name="indexes", daemon=True).start()

    def _ensure_indexes(self) -> None:
        """In a thread of its own: on a large collection this takes longer than leases can wait."""
        try:
            with pymongo.timeout(self.INDEX_PATIENCE_S):
                self._store.ensure_indexes()
        except StoreUnavailable as error:
            logger.warning("indexes could not be made (%s): the worker runs without them, more slowly", error)

    def _sweep(self) -> None:
        self._sweep_at = time.monotonic() + self._settings.sweep_interval * random.uniform(0.8, 1.2)
        for line in self._sweeper.release_dead_siblings() + self._sweeper.sweep():
            logger.warning(line)
        if self._files.is_due():
            threading.Thread(target=self._sweep_files, name="files", daemon=True).start()

    def _sweep_files(self) -> None:
        """In a thread of its own: a slow artifact store must not cost leases."""
        try:
            for line in self._files.sweep():
                logger.info(line)
        except (StoreUnavailable, FailJob) as error:
            logger.warning("the next search for files of lost attempts is in an hour: %s", error)


# ── runtime ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Runtime:
    """What one process works with. Each part is made when first used, so never in the parent of a fork.

    Only the shutdown time is made at once: parent and children share its memory.
    """

    mongodb_timeout_s = 10.0  # for one call
    store_patience_s = 60.0  # for MongoDB, before a message leaves its slot and is delivered again later
    settle_try_s = 5.0  # for one try to write a job's end
    poll_store_s = 1.0  # between two tries while MongoDB is away
    stuck_loop_s = 5.0  # that a handler may take to end after its deadline
    REDIS_OPTIONS: ClassVar = {
        **dict.fromkeys(("socket_connect_timeout", "socket_timeout"), 2),
        "socket_keepalive": True,
        "health_check_interval": 25,
    }

    def __init__(self, settings: Settings, mongo: pymongo.MongoClient[Document] | None = None) -> None:
        self.settings = settings
        self.shutdown = ShutdownTime()
        # One log for all jobs of the process: an outage is a single fault, however many jobs meet it.
        self.waiting_log = RepeatedFaultLog("jobs wait to be claimed")
        self.unwritten_log = RepeatedFaultLog("the ends of jobs can't be written")
        if mongo is not None:
            self.mongo = mongo

    @cached_property
    def mongo(self) -> pymongo.MongoClient[Document]:
        url, timeout_ms = self.settings.mongodb_url.get_secret_value(), int(self.mongodb_timeout_s * 1000)
        return pymongo.MongoClient(url, timeoutMS=timeout_ms, appname="ai-backend-worker")

    @cached_property
    def database(self) -> Database[Document]:
        return open_database(self.mongo, self.settings.database_name)

    @cached_property
    def store(self) -> JobStore:
        return JobStore(self.database, NODE, Clock(), self.settings)

    @cached_property
    def redis(self) -> redis.Redis:
        return self.settings.redis_target.client(self.REDIS_OPTIONS)

    @cached_property
    def notifier(self) -> Notifier:
        return Notifier(self.redis)

    @cached_property
    def notes(self) -> SharedNotes:
        return SharedNotes(self.redis, self.settings.database_name)

    @cached_property
    def broker(self) -> Broker:
        return Broker(app, self.settings.celery_queue_name)

    @cached_property
    def artifacts(self) -> Artifacts:
        settings = self.settings
        store_url, base_url = settings.artifact_store_url, settings.artifact_base_url
        return open_artifacts(store_url, base_url, lambda: self.database, settings.s3_options)

    @cached_property
    def providers(self) -> Providers:
        return Providers(self.settings)

    @cached_property
    def loop(self) -> EventLoopThread:
        return EventLoopThread()

    @cached_property
    def sweeper(self) -> Sweeper:
        return Sweeper(self.store, self.notifier, self.notes, self.broker)

    @cached_property
    def files(self) -> FileSweeper:
        return FileSweeper(self.store, self.notes, lambda: self.artifacts, self.settings.artifact_retention_days)

    @cached_property
    def heartbeat(self) -> Heartbeat:
        return Heartbeat()

    @cached_property
    def keeper(self) -> Keeper:
        return Keeper(self.store, self.sweeper, self.files, self.shutdown, self.heartbeat, self.settings)

    def close(self) -> None:
        """Closes what was made: connections to the providers and the event loop, MongoDB, Redis."""
        made = vars(self)
        if "providers" in made:
            self.providers.close()
        if "loop" in made:
            self.loop.close()
        if "mongo" in made:
            self.mongo.close()
        if "redis" in made:
            self.redis.close()


# ── task ─────────────────────────────────────────────────────────────────────────────────────────────────────────

LATER_S = 10.0  # the wait of a message for which MongoDB was away
MIN_REDELIVERY_S = 0.2
DAMAGED = "Your request reached us damaged. Please send it again."
JOB_ID = re.compile(r"[0-9a-fA-F]{24}")
Reply = TypeVar("Reply")


class JobRequest(Request):
    """A message in the parent. It has no soft limit, since the attempt has a deadline of its own in every pool.

    Of its arguments, which hold the prompt, `inspect` and the events show the job's id only.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        task: Any = self.task
        limits = task.runtime.settings.limits(self.request_dict.get("timelimit"))
        self.time_limits = (limits.hard_s, None)
        self._visible_args = [value for value in self.args[:1] if isinstance(value, str) and JOB_ID.fullmatch(value)]
        self._argsrepr, self._kwargsrepr = repr(self._visible_args), "{}"

    def info(self, safe: bool = False) -> Any:
        return {**super().info(safe), "args": self._visible_args, "kwargs": {}}


class JobTask(Task):  # type: ignore[type-arg]
    abstract = True
    Request = JobRequest  # type: ignore[assignment]
    typing = False  # the task itself checks its arguments, so that a damaged message gets an answer

    @cached_property
    def runtime(self) -> Runtime:
        return Runtime(app.settings)


def redelivery(task: JobTask, job_id: ObjectId, wait_s: float) -> Exception:
    """The exception that redelivers the message later: under the same task id and limits, without its prompt."""
    options: Document = {"args": (str(job_id), {"job_id": str(job_id)}), "kwargs": {}, "countdown": wait_s}
    settings = task.runtime.settings
    if settings.is_rabbitmq:  # a message that waits in a worker's memory would hold a slot
        options |= {"countdown": 0, "queue": waiting_queue(settings.celery_queue_name, math.ceil(wait_s))}
    try:
        return task.retry(**options, max_retries=None, throw=False)
    except Reject:  # the broker is away; Celery's own Reject would throw the message away
        return Reject("the broker is away", requeue=True)


def message_limits(task: JobTask) -> Limits:
    return task.runtime.settings.limits(task.request.timelimit)


def wait_for_store(task: JobTask, job_id: ObjectId, action: Callable[[], Reply]) -> Reply:
    """Does something in MongoDB before the job is claimed. It waits while MongoDB is away: no other job could run.

    Raises:
        Retry: it took too long, and the message is delivered again later. Reject: the worker is shutting down.
    """
    runtime = task.runtime
    give_up_at = time.monotonic() + min(runtime.store_patience_s, message_limits(task).soft_s / 2)
    while True:
        try:
            # A call that hangs must not reach the hard limit, which would kill the process and lose the message.
            time_left_s = max(runtime.poll_store_s, give_up_at - time.monotonic())
            with pymongo.timeout(min(runtime.mongodb_timeout_s, time_left_s)):
                answer = action()
            runtime.waiting_log.over()
            return answer
        except StoreUnavailable as error:
            runtime.waiting_log.fault(f"job={job_id} {error}")
        if runtime.shutdown.is_announced:
            raise Reject("shutting down", requeue=True)
        if time.monotonic() > give_up_at:
            raise redelivery(task, job_id, LATER_S)
        time.sleep(runtime.poll_store_s)


def announce(runtime: Runtime, document: Document, status: Status, sentence: str) -> None:
    """Publishes a status that the document has. A terminal one then leaves the outbox."""
    if runtime.notifier.publish_status(document, status, sentence) and status in TERMINAL_STATUSES:
        runtime.keeper.note_published(document["_id"])


def announce_job(runtime: Runtime, job: Job, status: Status, sentence: str) -> None:
    document = {"_id": job.id, "user_id": job.user_id, "session_id": job.session_id}
    announce(runtime, document, status, sentence)


def fail_unowned(task: JobTask, job_id: ObjectId, sentence: str) -> JobFailed:
    """Fails a job that no attempt runs, notifies the person, and returns the exception to raise."""
    runtime = task.runtime
    if wait_for_store(task, job_id, lambda: runtime.store.fail_unowned(job_id, sentence)):
        document = wait_for_store(task, job_id, lambda: runtime.store.read(job_id)) or {"_id": job_id}
        announce(runtime, document, Status.FAILED, sentence)
    return JobFailed(sentence)


def parse_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, Document]:
    """The job id in a message's arguments, and all arguments by name. Raises JobFailed: there is no job id."""
    arguments = dict(zip(("job_id", "job_data"), args, strict=False)) | dict(kwargs)
    job_id = arguments.get("job_id")
    if not isinstance(job_id, str) or not JOB_ID.fullmatch(job_id):
        logger.error("dropped a message without a job id (24 hex digits)")
        raise JobFailed("The message names no job.")
    return job_id, arguments


def read_message(task: JobTask, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ObjectId:
    """The job's id. If the message has a wrong form, the document that it names fails with a sentence.

    Raises:
        JobFailed: the message doesn't have the contract's form.
    """
    job_id, arguments = parse_arguments(args, kwargs)
    fits = len(args) + len(kwargs) == 2 == len(arguments) and isinstance(arguments.get("job_data"), dict)
    if not fits:
        logger.error("job=%s its message has the wrong arguments: (job_id, job_data) are expected", job_id)
        raise fail_unowned(task, ObjectId(job_id), DAMAGED)
    return ObjectId(job_id)


def claim(task: JobTask, job_id: ObjectId, taken_at: float) -> Job | NotClaimed:
    """The claimed job, or why it can't be claimed.

    It also claims a job whose process on this node has died, and one beyond its bounds if its result is kept in Redis.
    """
    runtime, limits, owner = task.runtime, message_limits(task), secrets.token_hex(8)

    def try_claim(*, bounded: bool = True) -> Job | NotClaimed:
        waited_s = time.monotonic() - taken_at
        return runtime.store.claim(job_id, owner, limits, bounded=bounded, waited_s=waited_s)

    claimed = wait_for_store(task, job_id, try_claim)
    is_held = isinstance(claimed, NotClaimed) and claimed.reason is Reason.HELD
    if is_held and wait_for_store(task, job_id, runtime.sweeper.release_dead_siblings):
        claimed = wait_for_store(task, job_id, try_claim)
    is_exhausted = isinstance(claimed, NotClaimed) and claimed.reason is Reason.EXHAUSTED
    if is_exhausted and wait_for_store(task, job_id, lambda: runtime.notes.kept_result(job_id)):
        claimed = wait_for_store(task, job_id, partial(try_claim, bounded=False))
    return claimed


def answer_not_claimed(task: JobTask, job_id: ObjectId, not_claimed: NotClaimed) -> Document:
    """What becomes of a message whose job could not be claimed.

    Raises:
        Ignore: a live attempt has the job. (A result under this task id would make Celery drop its redelivery.)
        Retry: the job waits for its next try. JobFailed: there is no such job, or it is at its bounds.
    """
    reason, document = not_claimed.reason, not_claimed.document
    level = logging.ERROR if reason is Reason.UNKNOWN else logging.INFO
    logger.log(level, "job=%s not claimed: %s", job_id, reason.value)
    match reason:
        case Reason.TERMINAL:
            status = Status(document["status"])
            announce(task.runtime, document, status, final_sentence(document))
            return {"job_id": str(job_id), "status": status.value}
        case Reason.HELD:
            raise Ignore()
        case Reason.WAITING:
            now = task.runtime.store.now()
            available_at = bookkeeping(document).get("available_at", now).replace(tzinfo=UTC)
            raise redelivery(task, job_id, max(MIN_REDELIVERY_S, (available_at - now).total_seconds()))
        case Reason.EXHAUSTED:
            raise fail_unowned(task, job_id, GAVE_UP)
        case Reason.UNKNOWN | Reason.FOREIGN_STATUS:
            raise JobFailed("There is no such job.")


async def generate(runtime: Runtime, attempt: Attempt, progress: Progress) -> Result:
    """Checks the job's input and runs its handler under the attempt's deadline."""
    job, settings = attempt.job, runtime.settings
    handler = find_handler(job.job_type)
    inputs = check_input(handler.input_model, job.input_data)
    provider, attempt.provider = runtime.providers.get(handler.provider), settings.provider(handler.provider)
    ends_at = asyncio.get_running_loop().time() + attempt.time_left_s()
    await provider.ready(attempt.time_left_s() / 4)  # most of the limit is left for the answer
    if not attempt.is_lease_fresh():  # looked at again, right before a call that costs money
        raise HandBack("its lease ran out before it asked the provider")
    try:
        async with asyncio.timeout_at(ends_at) as deadline:
            return await handler.run(Call(job, inputs, settings, provider, attempt.provider, progress))
    except TimeoutError:
        if deadline.expired():
            raise FailJob(f"the limit of {job.limits.soft_s:g} s", TOOK_TOO_LONG) from None
        raise RetryJob("TimeoutError") from None


async def run_handler(runtime: Runtime, attempt: Attempt) -> Result:
    """Runs the job's handler on the event loop. Raises a JobError for every end but a result."""
    running, loop = asyncio.current_task(), asyncio.get_running_loop()
    attempt.bind(lambda: running and loop.call_soon_threadsafe(running.cancel))
    progress = Progress(attempt.job, runtime.notifier, attempt.is_lease_fresh)
    try:
        result = await generate(runtime, attempt, progress)
        with contextlib.suppress(asyncio.CancelledError):  # the result is there, and settle sees whose the job is
            await progress.finish()
        return result
    except asyncio.CancelledError:
        raise attempt.reason or DropJob("cancelled") from None
    except JobError:
        raise
    except Exception as error:  # a defect of the handler; its text may hold a prompt, its place can't
        detail, sentence = f"{type(error).__name__} at {place_of(error)}", JobError.default_sentence
        raise OperatorFault(detail, sentence) from None
    finally:
        progress.stop()


def find_kept(runtime: Runtime, job: Job) -> Result | None:
    """A result that an earlier attempt could not write. If Redis can't be asked, the job is generated again."""
    with contextlib.suppress(NotesUnavailable):
        return runtime.notes.kept_result(job.id)
    return None


def run(runtime: Runtime, attempt: Attempt) -> Outcome:
    """Runs the job's handler on the event loop, within its deadline. Nothing is written here.

    Raises:
        SystemExit: the process got a signal to end, but no shutdown was announced (a revoke does this). The lease
            runs out.
    """
    job = attempt.job
    if not attempt.is_lease_fresh():  # the process was suspended, or MongoDB's answer took long
        return HandBack("its lease ran out before it began")
    logger.info("%s started", job)
    again = f" (try {job.attempt} of {runtime.settings.max_attempts})" if job.attempt > 1 else ""
    announce_job(runtime, job, Status.PROCESSING, f"Your job has started{again}.")
    try:
        if job.attempt > 1 and (kept := find_kept(runtime, job)):
            return kept
        future, loop = runtime.loop.submit(run_handler(runtime, attempt))
        try:
            return future.result(attempt.time_left_s() + runtime.stuck_loop_s)
        except TimeoutError:
            runtime.loop.abandon(loop)
            stuck = FailJob("the handler blocks the event loop", TOOK_TOO_LONG)
            attempt.cancel(stuck)
            return stuck
    except JobError as error:
        return error
    except SystemExit:
        hand_back = HandBack("this process got a signal to end")
        attempt.cancel(hand_back)
        if runtime.shutdown.wait_until_announced():
            return hand_back
        raise


def within_bounds(runtime: Runtime, job: Job, outcome: Outcome) -> Outcome:
    """Gives a retry its wait in seconds. A retry beyond the job's bounds becomes a failure."""
    if not isinstance(outcome, RetryJob):
        return outcome
    settings = runtime.settings
    if job.attempt < settings.max_attempts or not outcome.is_counted:
        if outcome.after_s is None:
            delays = (*settings.retry_delays[job.attempt - 1 :], *settings.retry_delays[-1:], 0.0)
            wait_s = delays[0] * random.uniform(0.5, 1.0)
        else:
            wait_s = min(outcome.after_s, settings.retry_after_max)
        if job.first_started_at > runtime.store.oldest_start(job.limits, wait_s):
            return RetryJob(outcome.detail, outcome.sentence, wait_s, is_counted=outcome.is_counted)
    tries = f"{job.attempt} tries" if job.attempt > 1 else "one try"
    return FailJob(outcome.detail, f"{outcome.sentence}; given up after {tries}. Please try again later.")


def file_name(job: Job, suffix: str) -> str:
    """Job and owner make a file's name, so that a late attempt never touches the file of another."""
    return f"{job.id}-{job.owner}.{suffix}"


def complete(runtime: Runtime, job: Job, result: Result) -> bool:
    """Stores the file, then ends the job. So a completed document never names a file that isn't there."""
    if result.media is None:
        return runtime.store.complete(job, result.output, None)
    url = runtime.artifacts.publish(file_name(job, result.media.suffix), result.media.data)
    return runtime.store.complete(job, {**result.output, result.media.url_field: url}, url)


def discard_files(runtime: Runtime, job: Job, *, of_others: bool = False) -> None:
    """Deletes the files of this attempt, or those of all others at the job. The sweeper deletes what is left."""
    with contextlib.suppress(StoreUnavailable, FailJob):
        for name in list(runtime.artifacts.names(f"{job.id}-")):
            if name.startswith(f"{job.id}-{job.owner}") is not of_others:
                runtime.artifacts.delete(name)


def write_outcome(runtime: Runtime, job: Job, outcome: Outcome) -> Outcome:
    """Makes the fenced write that belongs to an outcome. Returns DropJob if the job is no longer this attempt's.

    Raises:
        StoreUnavailable: the write may have been made; try again.
    """
    store, now = runtime.store, runtime.store.now()
    match outcome:
        case Result():
            try:
                done = complete(runtime, job, outcome)
            except FailJob as error:  # MongoDB or the artifact store can't take it
                discard_files(runtime, job)
                return write_outcome(runtime, job, error)
        case RetryJob():
            available_at = now + timedelta(seconds=outcome.after_s or 0)
            done = store.release(job, available_at, counted=outcome.is_counted)
        case HandBack():
            done = store.release(job, now, counted=False)
        case FailJob():
            done = store.fail(job, outcome.sentence)
        case _:
            done = False
    return outcome if done else DropJob("the job is no longer this attempt's")


def write_patiently(runtime: Runtime, attempt: Attempt, outcome: Outcome, signals_arrived: Sequence[int]) -> Outcome:
    """Writes the outcome, again and again while MongoDB is away, until the hard limit or the end of the process.

    A result that can't be written is then kept in Redis.
    """
    job, limits, is_kept, try_s = attempt.job, attempt.job.limits, False, runtime.settle_try_s
    give_up_at = attempt.started_at + max(limits.hard_s - LIMIT_MARGIN_S, limits.soft_s)
    while True:
        try:
            # A MongoDB that hangs must not outlast the hard limit, nor the grace of a shutdown.
            with pymongo.timeout(max(runtime.poll_store_s, min(try_s, give_up_at - time.monotonic()))):
                written = write_outcome(runtime, job, outcome)
            runtime.unwritten_log.over()
            if is_kept:
                runtime.notes.forget_result(job.id)
            return written
        except StoreUnavailable as error:
            runtime.unwritten_log.fault(f"{job} {error}")
        if signals_arrived or runtime.shutdown.is_due or time.monotonic() + runtime.poll_store_s >= give_up_at:
            break
        if isinstance(outcome, Result) and outcome.media and runtime.notes.keep_result(job, outcome):
            is_kept, try_s = True, try_s * 2  # a large file takes long, and a kill meanwhile loses nothing now
        time.sleep(runtime.poll_store_s)
    if isinstance(outcome, Result):
        runtime.notes.keep_result(job, outcome)
    return LeaveJob("its end couldn't be written: the lease runs out, and a sweeper rescues the job")


def settle(runtime: Runtime, attempt: Attempt, outcome: Outcome) -> Outcome:
    """Ends the attempt by one fenced write, which no signal interrupts. Nothing else of an attempt writes.

    Returns what holds now: the outcome; DropJob if nothing was written, since the job is no longer this attempt's;
    LeaveJob if the write couldn't be confirmed, so that it is unknown.
    """
    outcome = within_bounds(runtime, attempt.job, outcome)
    with signals_deferred() as arrived:
        return write_patiently(runtime, attempt, outcome, arrived)


def remove_leftovers(runtime: Runtime, job: Job) -> None:
    """Removes what earlier attempts at a job left, once it has ended. What can't be reached now stays."""
    if job.attempt > 1:
        runtime.notes.forget_result(job.id)
        discard_files(runtime, job, of_others=True)


def repeat_final_status(runtime: Runtime, job: Job) -> None:
    """Publishes the final status again, if another attempt ended the job while this process was suspended.

    This attempt may have published "processing" after that end.

    A cancel by the API, about which nothing is published, leaves `completed_at` empty.
    """
    with contextlib.suppress(StoreUnavailable):
        document = runtime.store.read(job.id) or {}
        if document.get("status") in TERMINAL_STATUSES and document.get("completed_at"):
            announce(runtime, document, Status(document["status"]), final_sentence(document))


def log_end(attempt: Attempt, outcome: Outcome, event: str) -> None:
    """Logs the end of an attempt in one line: waiting and running time, model and provider, tokens, and the reason."""
    job, where = attempt.job, attempt.provider
    made = outcome.output if isinstance(outcome, Result) else {}
    output = made if isinstance(made, dict) else {}  # a handler of the operator's own may return anything
    model = output.get("model_used", where.model if where else None)
    figures = [f"waited {job.waited_s:.1f} s"] if job.waited_s is not None else []
    figures += [f"ran {time.monotonic() - attempt.started_at:.1f} s"]
    figures += [f"{model} at {where.place}" if where else f"{model}"] if model else []
    figures += [f"{output['tokens_used']} tokens"] if "tokens_used" in output else []
    reason = "" if isinstance(outcome, Result) else f": {outcome.detail}"
    level = logging.INFO if isinstance(outcome, Result) else outcome.log_level
    logger.log(level, "%s %s%s (%s)", job, event, reason, ", ".join(figures))


def conclude(task: JobTask, attempt: Attempt, outcome: Outcome) -> Document:
    """Logs what the document holds now, publishes it to the person, and ends the Celery task accordingly.

    Raises:
        JobFailed, Retry, Reject, Ignore: for every outcome but a result.
    """
    runtime, job = task.runtime, attempt.job
    match outcome:
        case Result():
            log_end(attempt, outcome, "completed")
            announce_job(runtime, job, Status.COMPLETED, READY)
            remove_leftovers(runtime, job)
            return {"job_id": str(job.id), "status": Status.COMPLETED.value}
        case RetryJob():
            wait_s = outcome.after_s or 0.0
            log_end(attempt, outcome, f"will be tried again in {wait_s:.1f} s")
            number = job.attempt + outcome.is_counted
            next_try = f"trying again in {math.ceil(wait_s)} s ({number} of {runtime.settings.max_attempts})"
            announce_job(runtime, job, Status.PROCESSING, f"{outcome.sentence}; {next_try}.")
            raise redelivery(task, job.id, wait_s)
        case HandBack():
            log_end(attempt, outcome, "handed back")
            raise Reject(outcome.detail, requeue=True)
        case FailJob():
            log_end(attempt, outcome, "failed")
            announce_job(runtime, job, Status.FAILED, outcome.sentence)
            remove_leftovers(runtime, job)
            raise JobFailed(outcome.sentence)
        case _:
            log_end(attempt, outcome, "abandoned")
            if not isinstance(outcome, LeaveJob):
                discard_files(runtime, job)
                repeat_final_status(runtime, job)
            raise Ignore()


@app.task(bind=True, base=JobTask, name=TASK_NAME, throws=(JobFailed,), max_retries=None, shared=False)
def process_job(task: JobTask, *args: Any, **kwargs: Any) -> Document:
    """Brings one job to its end: claim, run, settle, conclude (contract, section 1).

    Raises:
        JobFailed: the job has failed; the text is the person's sentence.
        Ignore: another attempt has the job, or its end is unknown and a sweeper decides. Retry: it is tried later.
        Reject: the message goes back to the queue.
    """
    taken_at = time.monotonic()
    job_id = read_message(task, args, kwargs)
    claimed = claim(task, job_id, taken_at)
    if isinstance(claimed, NotClaimed):
        return answer_not_claimed(task, job_id, claimed)
    attempt = Attempt(claimed, task.runtime.settings.lease_seconds, taken_at)
    task.runtime.keeper.register(attempt)
    try:
        outcome = settle(task.runtime, attempt, run(task.runtime, attempt))
    finally:
        task.runtime.keeper.unregister(attempt)
    return conclude(task, attempt, outcome)


def configure(settings: Settings, runtime: Runtime | None = None) -> Runtime:
    """Makes this process work with these settings, and with this runtime or a new one.

    Every start of ours calls it: the commands, the demo and the tests. Where Celery's own command starts the process,
    the settings of the environment are read when they are first needed.
    """
    app.settings = settings
    app.conf.update(read_configuration())
    process_job.runtime = runtime or Runtime(settings)
    return process_job.runtime


# ── hooks ────────────────────────────────────────────────────────────────────────────────────────────────────────


def set_up_logging(**kwargs: Any) -> None:
    """In the parent, at its start."""
    logs.install(app.settings.debug, kwargs["logger"].handlers)


@signals.import_modules.connect(sender=app)
def import_handlers(**_: Any) -> None:
    """In the parent, at its start: a fault in a module of job types is one sentence and exit code 2."""
    for name in app.settings.handler_modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # its text may hold a secret, its place can't
            what = f"{type(error).__name__} at {place_of(error)}"
            print(f"The worker can't start: HANDLER_MODULES names {name}, which raises {what}.", file=sys.stderr)
            raise SystemExit(EXIT_BAD_SETTINGS) from None


def refuse_unsafe_pool(worker: Any) -> None:
    """In the parent, at its start: a pool in which no lease would be kept, or that can't work here."""
    pool = str(getattr(worker.pool_cls, "__module__", worker.pool_cls))
    if fault := pool_fault(pool, worker.concurrency, app.settings.lease_seconds):
        print(f"The worker can't start: {fault}.", file=sys.stderr)
        raise SystemExit(EXIT_BAD_SETTINGS)


def share_memory(**_: Any) -> None:
    """In the parent, before each fork: children share what is imported, and no garbage collection copies it."""
    runtime = process_job.runtime  # makes the shutdown time, which children share with their parent
    runtime.providers.preload()
    gc.unfreeze()  # what became garbage since the last fork
    gc.collect()
    gc.freeze()


def start_keeper() -> None:
    runtime = process_job.runtime
    runtime.keeper.start()
    threading.Thread(target=runtime.providers.preload, name="preload", daemon=True).start()


def start_in_child(**_: Any) -> None:
    """In each child after its fork, and in the only process of the solo pool."""
    start_keeper()


def start_in_threads(sender: Any, **_: Any) -> None:
    """In the only process of the threads pool, once it consumes."""
    if sender.pool.__class__.__module__.endswith(".thread"):
        start_keeper()


def note_revoked(request: Any = None, **_: Any) -> None:
    """In the parent, for a task that Celery dropped or killed: the next sweep fails its job."""
    with contextlib.suppress(JobFailed):
        job_id, _arguments = parse_arguments(request.args or (), request.kwargs or {})
        process_job.runtime.notes.note_revoked(job_id)


def announce_shutdown(how: str = "", **_: Any) -> None:
    """In the parent's signal handler. A cold shutdown (Ctrl-C twice, SIGQUIT) has no grace."""
    runtime = process_job.runtime
    runtime.shutdown.announce(runtime.settings.shutdown_grace if how == "Warm" else 0.0)


def stop_keeper(**_: Any) -> None:
    """In each process, at its end. A parent that forks has no keeper."""
    if "keeper" in vars(process_job.runtime):
        process_job.runtime.keeper.stop()


HOOKS: tuple[tuple[Any, Callable[..., None]], ...] = (
    (signals.after_setup_logger, set_up_logging),
    (signals.worker_before_create_process, share_memory),
    (signals.worker_process_init, start_in_child),
    (signals.worker_ready, start_in_threads),
    (signals.task_revoked, note_revoked),
    (signals.worker_shutting_down, announce_shutdown),
    (signals.worker_process_shutdown, stop_keeper),
    (signals.worker_shutdown, stop_keeper),
)


@signals.worker_init.connect
def connect_hooks(sender: Any, **_: Any) -> None:
    """In the parent, at its start. Celery's signals are shared by all apps, so another app's worker connects none."""
    if sender.app is not app:
        return
    refuse_unsafe_pool(sender)
    for signal, hook in HOOKS:
        signal.connect(hook)


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────

# Each is `command` in the module of worker_commands/ that has its name.
COMMANDS = ("check", "demo", "health", "recover", "run", "status", "submit")


def load_command(name: str) -> click.Command:
    return cast(click.Command, importlib.import_module(f"worker_commands.{name}").command)


class CommandGroup(click.Group):
    """Imports a command's module only when the command is asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted([*super().list_commands(context), *COMMANDS])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        return load_command(name) if name in COMMANDS else super().get_command(context, name)


@click.group(cls=CommandGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.pass_context
def main(context: click.Context) -> None:
    """AI Backend Worker: takes generation jobs from a Celery queue, and brings each one to exactly one end.

    Without a command it runs the worker. Settings come from the environment and from .env.
    """
    write_any_character()
    if context.invoked_subcommand is None:
        context.invoke(load_command("run"))


if __name__ == "__main__":
    sys.modules["worker"] = sys.modules["__main__"]  # so that `import worker` elsewhere finds this very module
    main()
