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

if __name__ == "__main__":  # before the imports that take most of a second
    from workerkit.start import end_on_sigterm

    end_on_sigterm()

import asyncio
import contextlib
import gc
import itertools
import json
import logging
import math
import os
import random
import secrets
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import click
import pymongo
import redis
from bson import ObjectId
from celery import Celery, Task, signals
from celery.exceptions import Ignore, Reject
from kombu import Exchange
from pydantic import BaseModel

from workerkit import __version__, logs, mongodb, sentences, values
from workerkit.artifacts import Artifacts, open_artifacts
from workerkit.attempts import AttemptRecord, end_of, in_words, output_of, usage_of, why
from workerkit.bookkeeping import INDEXES, Snapshot, first_attempt, kept_attempts, owner_of, parse_bookkeeping, waiting
from workerkit.broker import Broker, ExistingQueue, JobAMQP, JobRequest, child_pids, transport_options, waiting_queue
from workerkit.chores import Chores
from workerkit.commands import LazyGroup
from workerkit.errors import (
    ArtifactsUnavailable,
    Document,
    DropJob,
    EndRefused,
    FailJob,
    HandBack,
    InvalidInput,
    JobError,
    JobFailed,
    LeaveJob,
    NotesUnavailable,
    NotStored,
    OperatorFault,
    RetryJob,
    StoreRefused,
    StoreUnavailable,
)
from workerkit.files import FileSweeper
from workerkit.inputs import AudioInput, ImageInput, JobInput, TextInput, check_input
from workerkit.logs import OncePerCause, RepeatedFaultLog, logger, place_of
from workerkit.lost_messages import LostMessages
from workerkit.media import inspect_picture, nearest_size
from workerkit.messages import COPY, Delivery, carried_data, describe_delivery, own_arguments, parse_arguments
from workerkit.models import sizes_of
from workerkit.mongodb import ServerClock, iterate, largest_field, open_database, read_raw, unknown_when_unreachable
from workerkit.notes import EXPIRED, REVOKED, RevokedTask, SharedNotes, result_name
from workerkit.once import made_once
from workerkit.preparation import Preparation
from workerkit.process import (
    EventLoopThread,
    Heartbeat,
    SharedCount,
    SharedTime,
    Shutdown,
    is_process_alive,
    signals_deferred,
)
from workerkit.progress import Progress
from workerkit.provider import Provider, Providers
from workerkit.results import Media, Result
from workerkit.settings import Limits, ProviderKind, ProviderSettings, Settings, announce_settings
from workerkit.sounds import inspect_sound
from workerkit.surroundings import modules_fault, pool_fault, refuse, write_any_character
from workerkit.turns import Turns

if TYPE_CHECKING:
    from pymongo.collection import Collection
    from pymongo.database import Database

    from workerkit.schemas import JobProgress, JobStatusUpdate

__all__ = ["Call", "FailJob", "JobInput", "Media", "Result", "RetryJob", "handles"]  # for modules of job types

# ── vocabulary ───────────────────────────────────────────────────────────────────────────────────────────────────


class Status(StrEnum):
    """The four statuses of a job document (contract, section 2). The API rejects a document with any other."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"


TERMINAL_STATUSES = frozenset({Status.COMPLETED, Status.FAILED})


@dataclass(frozen=True)
class Job:
    """A claimed job as its document describes it. The message is only a hint.

    `owner` is the fencing token, new for each attempt. `has_past` says that it had ended before, and was put back.
    `waited_s` is the time from its creation, or from the end of its last wait, until the claim; None where the document
    has no such time. `attempts` are those that have ended; when this one ends, it is the last of them.
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
    has_past: bool = False
    waited_s: float | None = field(default=None, compare=False)
    attempts: tuple[AttemptRecord, ...] = ()
    leased_at: float = field(default_factory=lambda: time.monotonic(), compare=False)

    @property
    def kept_name(self) -> str:
        return result_name(self.id, self.first_started_at)

    def __str__(self) -> str:
        return f"job={self.id} attempt={self.attempt} type={self.job_type!r}"


Outcome = Result | JobError


def log_fields(job: Job, **fields: Any) -> Document:
    """What a line about a job has besides its text, where each line of the log is a JSON object."""
    return {"fields": {"job": str(job.id), "type": job.job_type, "attempt": job.attempt, **fields}}


# ── Celery app ───────────────────────────────────────────────────────────────────────────────────────────────────

TASK_NAME = "src.infrastructure.queue.tasks.process_job"
NODE = f"{socket.gethostname()}-{secrets.token_hex(4)}"  # made before the fork, so that siblings know each other


class WorkerApp(Celery):
    """The Celery app, with the settings of this process: read when first needed, or given to `configure`."""

    @cached_property
    def settings(self) -> Settings:
        return announce_settings()


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
# What is read of a job: never its output, which may be large, and its input only when it is claimed.
TIMES = dict.fromkeys(("status", "started_at", "updated_at", "created_at", "worker"), 1)
CLAIMED = dict.fromkeys(("job_type", "user_id", "session_id", "input_data", "created_at"), 1)
ADDRESS = dict.fromkeys(("user_id", "session_id", "error_message"), 1)
NOTICE = {**ADDRESS, "status": 1, "worker.owner": 1}
FIGURES = ("model_used", "tokens_used", "prompt_tokens", "completion_tokens", "duration_seconds", "resolution")
END = dict.fromkeys(("completed_at", *(f"output_data.{name}" for name in FIGURES)), 1)


class Reason(StrEnum):
    """Why a job could not be claimed."""

    UNKNOWN = "no such document (another DATABASE_NAME on this queue?)"
    FOREIGN_STATUS = "its status isn't one of the contract's four"
    TERMINAL = "it has ended already"
    HELD = "it is held by a live lease"
    WAITING = "it waits for its next try"
    EXHAUSTED = "it has used up its attempts or its time"


@dataclass(frozen=True)
class NotClaimed:
    """A claim that got nothing: why, and the job as it was read then (None: there is no document)."""

    reason: Reason
    job: Snapshot | None = None


class JobStore:
    """The jobs in MongoDB: one method for each transition, each an atomic operation guarded by status and owner.

    A change of a job that was read before compares its bookkeeping with what was read. `database` comes from
    `open_database`: the guards hold only where a majority confirms each write. Every method but the constructor raises
    StoreUnavailable, and those that write raise StoreRefused.
    """

    rescue_first_s, rescue_max_s = 30.0, 600.0  # from one rescue of a job to the next, doubled each time
    max_pending = 10_000  # ids of pending jobs that are looked at together
    CLAIM_TRIES = 5  # others may change a job between the read and the write of a claim

    def __init__(self, database: Database[Document], node: str, clock: ServerClock, settings: Settings) -> None:
        self._jobs: Collection[Document] = database["jobs"]
        self._raw_jobs = read_raw(self._jobs)
        self._node = node
        self._settings = settings
        self.clock = clock

    def now(self) -> datetime:
        return self.clock.now()

    def ensure_indexes(self) -> None:
        mongodb.make_indexes(self._jobs, INDEXES)

    def read(self, job_id: ObjectId, same: Document | None = None) -> Document | None:
        with unknown_when_unreachable():
            return self._jobs.find_one({"_id": job_id, **(same or {})})

    def look(self, job_id: ObjectId) -> Snapshot | None:
        """The job without its input and output; None if there is no document."""
        with unknown_when_unreachable():
            document = self._raw_jobs.find_one({"_id": job_id}, {**TIMES, **ADDRESS, **END})
        return self._snapshot(document) if document else None

    def _snapshot(self, document: Any) -> Snapshot:
        waits = (self._settings.job_deadline, self._settings.retry_after_max, *self._settings.retry_delays)
        longest_wait_s = max(waits) + self.rescue_max_s
        bookkeeping = parse_bookkeeping(document.get("worker"), self.now(), longest_wait_s)
        return Snapshot(document, bookkeeping)

    def is_past_bounds(self, job: Snapshot, limits: Limits | None = None) -> bool:
        """Whether a job has used up its attempts, or the time since its first start, in which attempts may begin."""
        own = job.bookkeeping
        oldest_start = self.oldest_start(limits or self._settings.limits(own.limits))
        is_too_old = own.first_started_at is not None and own.first_started_at <= oldest_start
        is_used_up = is_too_old or own.attempt >= self._settings.max_attempts
        return is_used_up and not job.is_of_older_worker

    def oldest_start(self, limits: Limits, after_s: float = 0.0) -> datetime:
        """A job that first started at this time or before has used up its time, now or in `after_s` seconds."""
        longest_s = max(self._settings.job_deadline, limits.hard_s)
        return self.now() + timedelta(seconds=after_s - longest_s)

    def is_stale(self, job: Snapshot) -> bool:
        """Whether no attempt works on a job that is `processing`, and a message of it may be lost."""
        return job.is_stale(self.now(), self._settings.orphan_after or self._settings.celery_time_limit + 60)

    def claim(
        self, job_id: ObjectId, owner: str, delivery: Delivery, *, bounded: bool = True, waited_s: float = 0.0
    ) -> Job | NotClaimed:
        """Claims a job that is pending, or released and due. An expired lease has to be released by a sweeper first.

        A pending job starts afresh, since only the API or an operator sets one back, to be tried again. Call it with
        the same `owner` until it answers: a claim whose reply was lost is then recognised. `bounded=False` ignores
        attempts and deadline, for a job whose result is there already. `waited_s` is how long ago the message was
        taken, which is when Celery's hard limit began.
        """
        self.clock.refresh()
        now = self.now()
        lease = self._lease(now, owner, delivery, waited_s)
        untouched = {"_id": job_id, "status": Status.PENDING, "worker": None}  # null matches a missing field, too
        document = self._take(untouched, self._afresh(now, first_attempt(lease, now, is_copy=delivery.is_copy)))
        for _ in range(self.CLAIM_TRIES):
            if document:
                break
            job = self.look(job_id)
            if job and job.status == Status.PROCESSING and job.bookkeeping.owner == owner:
                document = self.read(job_id, {"status": Status.PROCESSING, "worker.owner": owner})
            elif reason := self._why_not(job, delivery.limits, now, bounded=bounded):
                return NotClaimed(reason, job)
            elif job and job.status == Status.PENDING:
                own = first_attempt(lease, now, is_copy=delivery.is_copy, former=job)
                document = self._take(job.unchanged(), self._afresh(now, own))
            elif job:
                own = job.bookkeeping.next_attempt(lease, self._settings.max_attempts)
                document = self._take(job.unchanged(), {"$set": {"updated_at": now, "worker": own}})
        return self._job(document) if document else NotClaimed(Reason.WAITING)

    def _take(self, same: Document, update: Document) -> Document | None:
        """Claims the job that is still the same. The reply needn't hold what is sent, nor a former life's output."""
        document = self._update(same, update, CLAIMED)
        return document and {**document, "worker": update["$set"]["worker"]}

    def _afresh(self, now: datetime, own: Document) -> Document:
        """The update that begins a life. The result of a former one stays until it is replaced."""
        times = {"started_at": now, "updated_at": now, "completed_at": None}
        return {"$set": {"status": Status.PROCESSING, **times, "error_message": None, "worker": own}}

    def _lease(self, now: datetime, owner: str, delivery: Delivery, waited_s: float) -> Document:
        return {
            "owner": owner,
            "node": self._node,
            "pid": os.getpid(),
            "queue": self._settings.celery_queue_name,
            **delivery.origin,
            "lease_until": now + timedelta(seconds=self._settings.lease_seconds),
            "deadline": now + timedelta(seconds=delivery.limits.hard_s - waited_s),
            "limits": [delivery.limits.hard_s, delivery.limits.soft_s],
        }

    def _why_not(self, job: Snapshot | None, limits: Limits, now: datetime, *, bounded: bool) -> Reason | None:
        """Why a job that was read can't be claimed; None if it can."""
        if job is None:
            return Reason.UNKNOWN
        if job.status in TERMINAL_STATUSES:
            return Reason.TERMINAL
        if job.status == Status.PENDING:
            return None
        if job.status != Status.PROCESSING:
            return Reason.FOREIGN_STATUS
        own = job.bookkeeping
        if not own.is_released or job.is_of_older_worker:
            return Reason.HELD
        if bounded and self.is_past_bounds(job, limits):
            return Reason.EXHAUSTED
        return Reason.WAITING if own.available_at and own.available_at > now else None

    def _job(self, document: Document) -> Job:
        own, now = self._snapshot(document).bookkeeping, self.now()
        limits = self._settings.limits(own.limits)
        lease_until = own.lease_until or now
        left_s = (lease_until - now).total_seconds()
        waited_since = own.available_at or values.as_time(document.get("created_at"))
        return Job(
            id=document["_id"],
            job_type=str(document.get("job_type")),
            user_id=str(document.get("user_id") or ""),
            session_id=document.get("session_id"),
            input_data=document.get("input_data"),
            owner=own.owner or "",
            attempt=own.attempt,
            limits=limits,
            first_started_at=own.first_started_at or now,
            has_past=bool(own.past),
            attempts=own.attempts,
            waited_s=max(0.0, (now - waited_since).total_seconds()) if waited_since else None,
            leased_at=time.monotonic() - (self._settings.lease_seconds - left_s),
        )

    def _update(self, same: Document, update: Document, fields: Document | None = None) -> Document | None:
        """Updates the job that is still the same, and returns it afterwards; None if no job matches."""
        with unknown_when_unreachable():
            return self._jobs.find_one_and_update(same, update, fields, return_document=True)

    def complete(self, job: Job, output: Document, artifact_url: str | None) -> bool:
        """Ends the job with its result. False: the job is no longer this attempt's, and nothing was written."""
        return self._end(job, Status.COMPLETED, output_data=output, artifact_url=artifact_url, error_message=None)

    def fail(self, job: Job, sentence: str) -> bool:
        """Ends the job with a sentence for the person. False: it is no longer this attempt's; nothing was written."""
        try:
            return self._end(job, Status.FAILED, error_message=sentence)
        except StoreRefused:
            own = {"owner": job.owner, "attempt": job.attempt, "message": sentence}
            return self._end_by_force(self._fence(job), sentence, own) is not None

    def release(self, job: Job, available_at: datetime, sentence: str = "", *, counted: bool) -> bool:
        """Releases the job: it may be claimed from `available_at` on. False: it is no longer this attempt's.

        The answer is False as well if the reply to an earlier try was lost, and the job was claimed or ended since.
        """
        own = {**waiting(available_at, self.rescue_first_s), "released_by": job.owner, "message": sentence}
        own |= kept_attempts(job.attempts)
        update: Document = {"$set": {"updated_at": self.now(), **{f"worker.{name}": own[name] for name in own}}}
        if not counted:
            update["$inc"] = {"worker.attempt": -1}
        with unknown_when_unreachable():
            released_before = {**self._fence(job), "worker.owner": None, "worker.released_by": job.owner}
            is_released = self._jobs.update_one(self._fence(job), update).matched_count == 1
            return is_released or self._jobs.find_one(released_before, {"_id": 1}) is not None

    def _fence(self, job: Job) -> Document:
        return {"_id": job.id, "status": Status.PROCESSING, "worker.owner": job.owner}

    def _ended(self, status: Status, **fields: Any) -> Document:
        now = self.now()
        return {"status": status, "updated_at": now, "completed_at": now, **fields}

    def _end(self, job: Job, status: Status, **fields: Any) -> bool:
        ended = self._ended(status, **fields)
        # The lease ends, too, so that a live one shows a cancel: see `find_cancelled`.
        own = dict.fromkeys(("unnotified", "lease_until"), ended["completed_at"])
        own |= {"message": sentences.final_sentence(ended), **kept_attempts(job.attempts)}
        with unknown_when_unreachable():
            update = {"$set": {**ended, **{f"worker.{name}": own[name] for name in own}}}
            if self._jobs.update_one(self._fence(job), update).matched_count:
                return True
            document = self._jobs.find_one({"_id": job.id}, NOTICE) or {}
        if values.as_mapping(document.get("worker")).get("owner") != job.owner:
            return False
        if document.get("status") == Status.PROCESSING:
            raise StoreUnavailable("the last write isn't confirmed by a majority yet")
        # This owner's and terminal: either this very write, whose reply was lost, or a cancel by the API, which
        # leaves the owner in place.
        return bool((document.get("status"), document.get("error_message")) == (status, fields["error_message"]))

    def renew_leases(self, jobs: Sequence[Job]) -> list[Job]:
        """Renews leases, and not `updated_at`. Returns the jobs that were cancelled or taken, or can't be renewed."""
        until = self.now() + timedelta(seconds=self._settings.lease_seconds)
        # A renewal that a frozen MongoDB makes late, after a younger one, must not shorten the lease.
        held = [(job.id, job.owner) for job in jobs]
        renewed = self._update_owned(held, {"$max": {"worker.lease_until": until}}, running=True)
        return [] if renewed == len(jobs) else self.find_lost(jobs, until)

    def _update_owned(self, jobs: Sequence[tuple[ObjectId, str | None]], update: Document, *, running: bool) -> int:
        """Updates those of these jobs (id and owner) that still have this owner; in halves where one is refused."""
        held: Document = {"_id": {"$in": [job_id for job_id, _ in jobs]}}
        held |= {"worker.owner": {"$in": [owner for _, owner in jobs]}}
        held |= {"status": Status.PROCESSING} if running else {}
        try:
            with unknown_when_unreachable():
                return self._jobs.update_many(held, update).matched_count
        except StoreRefused as refusal:
            if len(jobs) > 1:
                return sum(self._update_owned(half, update, running=running) for half in (jobs[::2], jobs[1::2]))
            logger.warning("job=%s its bookkeeping can't be updated: %s", jobs[0][0], refusal)
            return 0

    def find_lost(self, jobs: Sequence[Job], leased_until: datetime | None = None) -> list[Job]:
        """Those of these jobs that were cancelled or taken, or whose lease ends before a time."""
        held: Document = {"_id": {"$in": [job.id for job in jobs]}, "status": Status.PROCESSING}
        held |= {"worker.lease_until": {"$gte": leased_until}} if leased_until else {}
        with unknown_when_unreachable():
            owners = {document["_id"]: owner_of(document) for document in self._jobs.find(held, {"worker.owner": 1})}
        return [job for job in jobs if owners.get(job.id) != job.owner]

    def find_cancelled(self) -> list[ObjectId]:
        """Jobs that the API cancels while attempts run them: they have failed, and have a live lease."""
        cancelled = {"status": Status.FAILED, "worker.lease_until": {"$gt": self.now()}}
        with unknown_when_unreachable():
            return [document["_id"] for document in self._jobs.find(cancelled, {"_id": 1}).limit(self.max_pending)]

    def mark_notified(self, published: Sequence[tuple[ObjectId, str | None]]) -> int:
        """Takes the last notices of jobs out of the outbox, each with the owner of the attempt that ended the job.

        Returns how many were taken out.
        """
        return self._update_owned(published, {"$unset": {"worker.unnotified": ""}}, running=False)

    def find_unnotified(self, older_than_s: float) -> Iterator[Document]:
        """Jobs that ended longer ago, and whose last notice was not confirmed as published."""
        since = self.now() - timedelta(seconds=older_than_s)
        ended = {"status": {"$in": list(TERMINAL_STATUSES)}, "worker.unnotified": {"$lte": since}}
        return iterate(self._raw_jobs.find(ended, NOTICE))

    def fail_unowned(self, job_id: ObjectId, sentence: str) -> Document | None:
        """Fails a job that no attempt runs: pending, or released. None: it was neither, and nothing was written."""
        return self._fail_if(job_id, sentence, lambda job: job.is_unowned)

    def fail_revoked(self, task: RevokedTask, sentence: str) -> Document | None:
        """Fails the job of a task that was revoked or has expired. None: the job isn't that task's any more.

        A running job has to be the task's own, and no expiry ends it. A pending one must not have been put back.
        """

        def is_its_job(job: Snapshot) -> bool:
            if job.status == Status.PENDING:
                return not job.bookkeeping.has_past
            is_running = job.status == Status.PROCESSING and task.why == REVOKED
            return is_running and job.bookkeeping.task_id == task.task_id

        return self._fail_if(ObjectId(task.job_id), sentence, is_its_job)

    def _fail_if(self, job_id: ObjectId, sentence: str, applies: Callable[[Snapshot], bool]) -> Document | None:
        for _ in range(self.CLAIM_TRIES):
            job = self.look(job_id)
            if job is None or not applies(job):
                return None
            if failed := self.fail_seen(job, sentence):
                return failed
        return None

    def fail_seen(self, job: Snapshot, sentence: str) -> Document | None:
        """Fails a job as it was read, and returns it for the notice. None: it has changed since.

        Raises StoreRefused: MongoDB takes this end in no form.
        """
        return self._end_by_force(job.unchanged(), sentence, job.failed(self.now(), sentence))

    def _end_by_force(self, same: Document, sentence: str, own: Document) -> Document | None:
        """Fails a job; with less and less in its document, where MongoDB refuses more."""
        ended = self._ended(Status.FAILED, error_message=sentence)
        attempt = {name: own[name] for name in ("owner", "attempt")}
        for each in (own, attempt):
            with contextlib.suppress(StoreRefused):
                with_notice = {**each, "unnotified": ended["completed_at"]}
                return self._update(same, {"$set": {**ended, "worker": with_notice}}, NOTICE)
        try:
            return self._update(same, {"$set": ended, "$unset": {"worker": ""}}, NOTICE)
        except StoreRefused as refusal:
            if not refusal.is_too_large:
                raise
        # There is no room for a sentence, so the largest part of the document goes.
        let_go: Document = {"input_data": {}, "output_data": None}
        name = largest_field(self._jobs, same["_id"], tuple(let_go))
        return self._update(same, {"$set": {**ended, name: let_go[name]}, "$unset": {"worker": ""}}, NOTICE)

    def find_siblings(self) -> list[Snapshot]:
        """Jobs that processes of this node hold, including processes that are dead."""
        held = {"status": Status.PROCESSING, "worker.node": self._node}
        with unknown_when_unreachable():
            jobs = [self._snapshot(document) for document in iterate(self._raw_jobs.find(held, TIMES))]
        return [job for job in jobs if job.bookkeeping.owner and job.bookkeeping.node == self._node]

    def find_stale(self, after: ObjectId | None = None) -> Iterator[Snapshot]:
        """Jobs that no attempt works on, in the order of their ids, behind the given one."""
        running: Document = {"status": Status.PROCESSING, **({"_id": {"$gt": after}} if after else {})}
        found = self._raw_jobs.find(running, TIMES).sort("_id", 1)
        return (job for document in iterate(found) if self.is_stale(job := self._snapshot(document)))

    def release_stale(self, job: Snapshot) -> Document | None:
        """Turns a stale job into a released one that is due now, and returns its bookkeeping. None: it has changed.

        Each time the next rescue is twice as far away, so that a long queue isn't flooded with copies.
        """
        rescued: Document = {"$set": job.rescued(self.now(), self.rescue_first_s, self.rescue_max_s)}
        return rescued["$set"]["worker"] if self._update(job.unchanged(), rescued, {"_id": 1}) else None

    def release_together(self, jobs: Sequence[Snapshot]) -> dict[ObjectId, Document]:
        """Does for several jobs at once what `release_stale` does, in a tenth of the time.

        Returns the bookkeeping of those that were released. The others have changed, or MongoDB refuses the change.
        """
        now = self.now()
        rescued = {job.id: job.rescued(now, self.rescue_first_s, self.rescue_max_s) for job in jobs}
        released = {job_id: fields["worker"] for job_id, fields in rescued.items()}
        updates = [pymongo.UpdateOne(job.unchanged(), {"$set": rescued[job.id]}) for job in jobs]
        found = {"_id": {"$in": list(released)}, "worker": {"$in": list(released.values())}}
        with contextlib.suppress(StoreRefused), unknown_when_unreachable():
            self._jobs.bulk_write(updates, ordered=False)
        with unknown_when_unreachable():
            return {job["_id"]: released[job["_id"]] for job in self._jobs.find(found, {"_id": 1})}

    def undo_rescue(self, job_id: ObjectId, released: Document) -> None:
        """Makes a rescue due soon again after its message couldn't be sent, so that it doesn't wait twice as long."""
        due_at = self.now() + timedelta(seconds=min(self._settings.sweep_interval, self.rescue_first_s))
        unsent = {"_id": job_id, "status": Status.PROCESSING, "worker": {"$eq": released}}
        with unknown_when_unreachable():
            self._jobs.update_one(unsent, {"$inc": {"worker.rescues": -1}, "$set": {"worker.rescue_at": due_at}})

    def pending_ids(self, among: Sequence[ObjectId] | None = None) -> list[ObjectId]:
        """The ids of pending jobs, the oldest first; all or some of these."""
        pending: Document = {"status": Status.PENDING, **({} if among is None else {"_id": {"$in": list(among)}})}
        with unknown_when_unreachable():
            found = self._jobs.find(pending, {"_id": 1}).sort("_id", 1).limit(self.max_pending)
            return [document["_id"] for document in found]

    def find_unreferenced(self, names: Sequence[str]) -> list[str]:
        """Those of these files (named by job and owner) whose job has ended without naming them."""
        ids = [ObjectId(name[:OBJECT_ID_DIGITS]) for name in names]
        ended = {"_id": {"$in": ids}, "status": {"$in": list(TERMINAL_STATUSES)}}
        with unknown_when_unreachable():
            found = self._jobs.find(ended, {"artifact_url": 1})
            urls = {str(job["_id"]): str(job.get("artifact_url")) for job in found}
        return [name for name in names if name not in urls.get(name[:OBJECT_ID_DIGITS], name)]


# ── notifier ─────────────────────────────────────────────────────────────────────────────────────────────────────

STATUS_CHANNEL = "job_notifications"
PROGRESS_CHANNEL = "job_progress"


class Notifier:
    """Publishes to the API over Redis pub/sub (contract, section 3). A failure is logged and returned, never raised."""

    recheck_s = 1.0  # how long no text is sent after a piece that no subscriber received

    def __init__(self, client: redis.Redis) -> None:
        self._redis = client
        channels = (STATUS_CHANNEL, PROGRESS_CHANNEL)
        self._logs = {name: RepeatedFaultLog(f"notifications can't be published to {name}") for name in channels}
        self._next_progress_at = 0.0

    def publish_status(self, document: Mapping[str, Any], status: Status, sentence: str) -> bool:
        """Publishes a status that the document already has. False: Redis could not be reached."""
        message: JobStatusUpdate = {
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
        message: JobProgress = {
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

    def _publish(self, channel: str, message: Mapping[str, Any]) -> int | None:
        """The number of receivers; None if Redis could not be reached."""
        try:
            receivers = int(self._redis.publish(channel, json.dumps(message, default=str)))
        except redis.RedisError as error:
            self._logs[channel].fault(type(error).__name__)
            return None
        self._logs[channel].over()
        return receivers


# ── handlers ─────────────────────────────────────────────────────────────────────────────────────────────────────


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

        Raises InvalidInput: the input names another model.
        """
        wanted = getattr(self.input, "model", None)
        offered = (self.defaults.model, *self.defaults.allowed_models)
        if wanted is None or wanted in offered:
            return wanted or self.defaults.model
        raise InvalidInput("a model that isn't on the list", sentences.model_not_offered(offered))


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
    fault = "no handler for this job type: does HANDLER_MODULES name its module?"
    raise OperatorFault(fault, sentences.unknown_type(job_type))


@handles("text_generation", TextInput, provider="text")
async def text_generation(call: Call) -> Result:
    """Generates a text by a chat completion, which is streamed to the person as it grows."""
    inputs: TextInput = call.input
    cap = call.settings.text_max_tokens
    if inputs.max_tokens and inputs.max_tokens > cap:
        raise InvalidInput("max_tokens over the cap", sentences.over_the_cap("max_tokens", cap))
    request = {"model": call.model, "messages": inputs.conversation(), **inputs.passed_on()}
    answer = await call.provider.text(request, call.progress, call.settings.usual_cap)
    output = {"generated_text": answer.text, "model_used": answer.model, "tokens_used": answer.tokens, **answer.parts}
    return Result({**output, "is_cut": True} if answer.is_cut else output)


@handles("image_generation", ImageInput, provider="image")
async def image_generation(call: Call) -> Result:
    """Generates a picture. Its resolution is read from its bytes."""
    inputs: ImageInput = call.input
    request = {"model": call.model, "prompt": inputs.prompt, **inputs.passed_on()}
    if inputs.size:
        request["size"] = nearest_size(inputs.size, call.settings.image_sizes or sizes_of(call.model, inputs.size))
    data, model = await call.provider.image(request)
    resolution, suffix = await asyncio.to_thread(inspect_picture, data)
    return Result({"model_used": model, "resolution": resolution}, Media(data, suffix, "image_url"))


@handles("audio_generation", AudioInput, provider="audio")
async def audio_generation(call: Call) -> Result:
    """Speaks a text. Format and duration are read from the bytes."""
    inputs: AudioInput = call.input
    request = {"model": call.model, "input": inputs.text or inputs.prompt, **inputs.passed_on()}
    ours = {"voice": call.settings.audio_voice, "response_format": call.settings.audio_format}
    data, model = await call.provider.speech(request, ours)
    data, duration_s, sound_format = await asyncio.to_thread(inspect_sound, data)
    output = {"model_used": model, "duration_seconds": duration_s, "format": sound_format}
    return Result(output, Media(data, sound_format, "audio_url"))


# ── recovery ─────────────────────────────────────────────────────────────────────────────────────────────────────

LIMIT_MARGIN_S = 5.0
DEADLINE_TOLERANCE_S = 1.0


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

    def record(self, outcome: Outcome, ended_at: datetime | None = None) -> AttemptRecord:
        """What is kept of this attempt if it ends now, with this outcome."""
        job, where = self.job, self.provider
        model = values.as_text(output_of(outcome).get("model_used", where and where.model))
        return AttemptRecord(
            attempt=job.attempt,
            end=end_of(outcome),
            node=NODE,
            ended_at=ended_at,
            waited_s=job.waited_s and round(job.waited_s, 2),
            ran_s=round(time.monotonic() - self.started_at, 2),
            provider=where.place if where else None,
            model=model,
            **why(outcome),
        )

    def ended(self, outcome: Outcome, at: datetime) -> Job:
        """The job as it is written when this attempt ends."""
        return replace(self.job, attempts=(*self.job.attempts, self.record(outcome, at)))

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


def notice_of(document: Mapping[str, Any]) -> str:
    return f"{document['_id']} of {owner_of(document)}"


class Sweeper:
    """Finds jobs that no attempt works on, and gets them going again or ends them at their bounds.

    One process at a time does this for all that share the database. Should two do it, nothing is done twice, since each
    step is a compare-and-set. A fault costs only the chore that meets it, and a job that can't be handled is ended.
    """

    TURN = "sweep"
    notice_overdue_s = 30.0  # until a notice that wasn't confirmed is published again
    batch = 20  # jobs that are released together; if the process dies then, their messages wait for the next rescue

    def __init__(
        self,
        store: JobStore,
        turns: Turns,
        lost_messages: LostMessages,
        notifier: Notifier,
        notes: SharedNotes,
        broker: Broker,
        lease_s: float,
    ) -> None:
        self._store, self._turns, self._lost_messages = store, turns, lost_messages
        self._notifier, self._notes, self._broker = notifier, notes, broker
        # The keeper renews leases before and after a sweep, so it mustn't last. Other chores have a third of this each.
        self._turn_s, self.budget_s = min(15.0, lease_s / 2), min(4.0, lease_s / 8)  # for the rescue of stale jobs
        self.after: ObjectId | None = None  # the last stale job that was handled, if there was no time for the rest
        self._queues: list[str] = []  # in which workers take jobs of this database
        # Faults of this sweep: of Redis, and of queues to which nothing can be sent.
        self._notes_fault: NotesUnavailable | None = None
        self._queue_faults: dict[str | None, BaseException] = {}
        self._unmarkable: set[str] = set()  # notices that were published, and that MongoDB leaves in the outbox
        self.had_fault, self._turn_until, self._publish_again_at = False, 0.0, 0.0
        self._refused_log = RepeatedFaultLog("MongoDB takes no end of a job", logging.ERROR)
        self._chores = Chores(
            {
                "lost jobs can't be put back into the queue": self._rescue_stale,
                "lost messages can't be looked for": self._rescue_pending,
                "revoked tasks can't be looked up": self._fail_revoked,
                "last notices can't be published": self._publish_ends,
            }
        )

    @property
    def has_turn(self) -> bool:
        return time.monotonic() < self._turn_until

    def _take_turn(self) -> bool:
        at = time.monotonic()
        self._turn_until = at + self._turn_s if self._turns.take(self.TURN, self._turn_s) else 0.0
        return self.has_turn

    def watch(self) -> None:
        """Tells all workers which jobs were cancelled. The process that has the turn does this every second."""
        self._notes.note_cancelled(self._queues, self._store.find_cancelled())

    def sweep(self, may_go_on: Callable[[], bool] = lambda: True) -> list[str]:
        """Does every chore, if it is this process's turn; returns a line for each thing done.

        `may_go_on` is asked once it has the turn. After a fault it leaves the next turn to other processes.

        Raises StoreUnavailable: MongoDB can't be reached.
        """
        done: list[str] = []
        if self.had_fault or not self._take_turn():
            self.had_fault = False
            return done
        self._queues, self._notes_fault, self._queue_faults = self._turns.queues(), None, {}
        may_go_on_now = may_go_on()
        self.had_fault = may_go_on_now and not self._chores.do(done)
        if self.had_fault or not may_go_on_now:
            self._turn_until = 0.0
            self._turns.give_back(self.TURN)
        return done

    def _rescue_stale(self, done: list[str]) -> None:
        give_up_at = time.monotonic() + self.budget_s
        stale, connection = self._store.find_stale(self.after), None
        with contextlib.ExitStack() as stack:
            while batch := list(itertools.islice(stale, self.batch)):
                connection = connection or stack.enter_context(self._broker.connection())
                released = self._release(batch)
                for job in batch:
                    done += self._on_its_own(job, partial(self._rescue, released, connection))
                self.after = batch[-1].id
                if time.monotonic() > give_up_at or not self._take_turn():
                    break
            else:
                self.after = None
        for fault in (*self._queue_faults.values(), self._notes_fault):  # each has cost only the jobs that it concerns
            if fault:
                raise fault

    def _release(self, batch: Sequence[Snapshot]) -> dict[ObjectId, Document]:
        """Releases those jobs of a batch that are to go on, as far as that is possible together."""
        going_on = [job for job in batch if isinstance(job.id, ObjectId) and not self._store.is_past_bounds(job)]
        sendable = [job for job in going_on if self._queue_of(job) not in self._queue_faults]
        return self._store.release_together(sendable) if len(sendable) > 1 else {}

    def _on_its_own(self, job: Snapshot, action: Callable[[Snapshot], list[str]]) -> list[str]:
        """Does something with a job. A job with which it can't be done is ended."""
        try:
            return action(job)
        except StoreRefused as refusal:
            logger.error("job=%s can't go on: %s", job.id, refusal)
            sentence = sentences.TOO_LARGE_TO_RUN if refusal.is_too_large else sentences.NOT_SET_UP
        except Exception as error:
            if isinstance(error, (StoreUnavailable, *self._broker.errors)):  # which is no fault of this job
                raise
            logger.error("job=%s can't go on: %s at %s", job.id, type(error).__name__, place_of(error))
            sentence = sentences.GAVE_UP
        try:
            return self._fail(job, sentence)
        except StoreRefused as refusal:
            self._refused_log.fault(f"job={job.id} {refusal}")
            return []

    def _rescue(self, together: dict[ObjectId, Document], connection: Any, job: Snapshot) -> list[str]:
        """Sends a message for a job, which is released first if it isn't yet; ends the job at its bounds."""
        released = together.get(job.id) if isinstance(job.id, ObjectId) else None
        if not released and self._store.is_past_bounds(job) and (has_result := self._has_kept_result(job)) is not True:
            return self._fail(job, sentences.GAVE_UP) if has_result is False else []
        queue = self._queue_of(job)
        if queue in self._queue_faults and released:
            self._store.undo_rescue(job.id, released)
        if queue in self._queue_faults or not (released := released or self._store.release_stale(job)):
            return []
        try:
            self._enqueue(job, released, connection)
        except self._broker.errors as error:
            self._queue_faults[queue] = error
            return []
        return [f"job={job.id} no attempt worked on it: put back into the queue"]

    def _has_kept_result(self, job: Snapshot) -> bool | None:
        """Whether the job's result is kept in Redis; None if that can't be asked now."""
        started_at, queue = job.bookkeeping.first_started_at, job.bookkeeping.queue
        if started_at is None or self._notes_fault:
            return None if started_at else False
        try:
            return self._notes.kept_result(result_name(job.id, started_at), queue) is not None
        except NotesUnavailable as error:
            self._notes_fault = error
            return None

    def _fail(self, job: Snapshot, sentence: str) -> list[str]:
        if not (failed := self._store.fail_seen(job, sentence)):
            return []
        self._publish(failed)
        return [f"job={job.id} failed: {sentence}"]

    def _publish(self, document: Document) -> bool:
        """Publishes the end of a job. After a failure it doesn't try for a while, since each try waits for Redis."""
        if time.monotonic() < self._publish_again_at:
            return False
        sent = self._notifier.publish_status(document, Status(document["status"]), sentences.final_sentence(document))
        self._publish_again_at = 0.0 if sent else time.monotonic() + self.notice_overdue_s
        if sent and not self._store.mark_notified([(document["_id"], owner_of(document))]):
            self._unmarkable.add(notice_of(document))
        return sent

    def _queue_of(self, job: Snapshot) -> str | None:
        """The queue from which the job came; this worker's own (None) if no worker takes jobs from that one."""
        queue = job.bookkeeping.queue
        return queue if queue in self._queues else None

    def _enqueue(self, job: Snapshot, released: Document, connection: Any = None) -> None:
        """Sends a message for a released job. Raises the broker's errors, and makes the rescue due soon again then."""
        try:
            self._broker.send(job.id, self._queue_of(job), connection, **job.bookkeeping.message_options())
        except self._broker.errors:
            self._store.undo_rescue(job.id, released)
            raise

    def _rescue_pending(self, done: list[str]) -> None:
        """Sends messages for pending jobs that have none: behind those that wait, since their priority isn't known."""
        give_up_at = time.monotonic() + self.budget_s / 3
        lost, priority = self._lost_messages.find(self._store.now(), self._store.pending_ids)
        with self._broker.connection() if lost else contextlib.nullcontext() as connection:
            for job_id in lost:
                self._broker.send(job_id, None, connection, data=COPY, priority=priority)
                done.append(f"job={job_id} its message was lost: put into the queue again")
                if time.monotonic() > give_up_at:  # the next search finds the rest
                    break

    def _fail_revoked(self, done: list[str]) -> None:
        give_up_at = time.monotonic() + self.budget_s / 3
        for queue, task in [(name, task) for name in self._queues or [""] for task in self._notes.revoked(name)]:
            try:
                failed = self._store.fail_revoked(task, sentences.REVOKED_SENTENCES[task.why])
            except StoreRefused as refusal:
                self._refused_log.fault(f"job={task.job_id} {refusal}")
                failed = None
            self._notes.forget_revoked(task, queue)
            if failed:
                done.append(f"job={task.job_id} failed: its task was {task.why}")
                self._publish(failed)
            if time.monotonic() > give_up_at:
                break

    def _publish_ends(self, done: list[str]) -> None:
        give_up_at = time.monotonic() + self.budget_s / 3
        for document in self._store.find_unnotified(self.notice_overdue_s):
            if notice_of(document) in self._unmarkable:
                continue
            if not self._publish(document):
                raise NotesUnavailable("Redis can't be reached")
            done.append(f"job={document['_id']} its last notification was published again")
            if time.monotonic() > give_up_at:
                break

    def release_dead_siblings(self) -> list[str]:
        """Releases the jobs of this node's dead processes; fails those that were killed at their hard limit."""
        siblings, self._notes_fault = self._store.find_siblings(), None
        dead = [job for job in siblings if job.bookkeeping.pid and not is_process_alive(job.bookkeeping.pid)]
        return [line for job in dead for line in self._on_its_own(job, self._release_dead)]

    def _release_dead(self, job: Snapshot) -> list[str]:
        deadline = job.bookkeeping.deadline
        is_over = deadline and self._store.now() >= deadline - timedelta(seconds=DEADLINE_TOLERANCE_S)
        if is_over and (has_result := self._has_kept_result(job)) is not True:  # else it was killed while it wrote
            return self._fail(job, sentences.TOOK_TOO_LONG) if has_result is False else []
        if not (released := self._store.release_stale(job)):
            return []
        # Celery delivers its own message again, but another worker may have dropped that while the lease was alive. If
        # this one can't be sent, the next rescue sends it.
        with contextlib.suppress(*self._broker.errors):
            self._enqueue(job, released)
        return [f"job={job.id} its process died: released"]


class Keeper:
    """One thread in each process that runs jobs. It renews leases, stops cancelled jobs, hands back, and sweeps.

    `connect` returns what it works with, and raises StoreUnavailable as long as there is no MongoDB. No process of the
    node sweeps until `rest`, which they share: the owners of expired leases may be about to renew them.
    """

    tick_s = 1.0
    PATIENCE_S = 5.0

    def __init__(
        self,
        connect: Callable[[], tuple[JobStore, Sweeper, FileSweeper, Preparation]],
        shutdown: Shutdown,
        cancelled: Callable[[], set[str] | None],
        rest: SharedTime,
        forks: SharedCount,
        heartbeat: Heartbeat,
        settings: Settings,
    ) -> None:
        self._connect, self._cancelled, self._forks = connect, cancelled, forks
        self._shutdown, self._rest, self._heartbeat, self._settings = shutdown, rest, heartbeat, settings
        self._attempts: dict[str, Attempt] = {}
        self._published: list[tuple[ObjectId, str | None]] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._store_log = RepeatedFaultLog("leases and sweeps wait for MongoDB")
        self._error_log = RepeatedFaultLog("the keeper goes on after an error", logging.ERROR)
        self._forks_seen = -1
        self._renew_at = self._sweep_at = 0.0
        self._longest_silence_s = max(settings.lease_seconds / 2, 2 * self.tick_s)
        self._answered_at = time.monotonic()

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

    def note_published(self, job_id: ObjectId, owner: str | None) -> None:
        """Takes a job's notice out of the outbox, with the next batch. `owner` is the attempt that ended the job."""
        with self._lock:
            self._published.append((job_id, owner))

    def _run(self) -> None:
        stopping = False
        while True:
            try:
                self.tick()
            except StoreUnavailable as error:
                self._store_log.fault(error)
                self._renew_at = 0.0
                self._rest_one_lease()
            except Exception as error:  # nothing may end this thread, since no lease would be renewed any more
                self._error_log.fault(f"{type(error).__name__} at {place_of(error)}")
            if stopping:
                return
            stopping = self._stopping.wait(self.tick_s)

    def tick(self) -> None:
        """Does everything that is due, the most urgent first.

        Raises StoreUnavailable: MongoDB can't be reached. The next tick renews leases before anything else.
        """
        self._heartbeat.beat()
        with self._lock:
            attempts = list(self._attempts.values())
        if self._shutdown.is_due:
            for attempt in attempts:
                attempt.cancel(HandBack("the grace of the shutdown is over"))
        with pymongo.timeout(self.PATIENCE_S):
            store, sweeper, files, preparation = self._connect()
            if time.monotonic() >= self._renew_at:
                self._renew(store, attempts)
            if sweeper.has_turn and preparation.has_indexes:  # else each look would read every job that has failed
                sweeper.watch()
            self._stop_cancelled(store, attempts)
            self._empty_outbox(store)
            preparation.do_if_due()
            self._release_dead_siblings(sweeper)
        if not self._shutdown.is_announced and time.monotonic() >= max(self._sweep_at, self._rest.at or 0.0):
            self._sweep_at = time.monotonic() + self._settings.sweep_interval * random.uniform(0.8, 1.2)
            self._sweep(store, sweeper, attempts)
            if sweeper.after:
                self._sweep_at = 0.0
            files.sweep_if_due()
        self._answered_at = time.monotonic()
        self._store_log.over()

    def _rest_one_lease(self) -> None:
        self._rest.at = max(self._rest.at or 0.0, time.monotonic() + self._settings.lease_seconds)

    def _renew(self, store: JobStore, attempts: list[Attempt]) -> None:
        at = time.monotonic()
        if attempts:
            self._keep_time(store)
        renewed = [attempt for attempt in attempts if attempt.may_renew()]
        if renewed:
            self._cancel(renewed, store.renew_leases([attempt.job for attempt in renewed]))
        for attempt in renewed:
            attempt.renewed_at = at
        silent_s = time.monotonic() - self._answered_at  # MongoDB hung, or this process was suspended
        if silent_s > self._longest_silence_s:
            self._rest_one_lease()
        self._renew_at = at + self._settings.lease_seconds / 3

    def _keep_time(self, store: JobStore) -> None:
        """Keeps the database's time. Where another primary has answered than before, the node rests for one lease."""
        before = store.clock.primary
        store.clock.refresh()
        if before is not None and before != store.clock.primary:
            self._rest_one_lease()

    def _stop_cancelled(self, store: JobStore, attempts: list[Attempt]) -> None:
        """Stops what the API has cancelled. One process watches for that; where none does, each looks for itself."""
        if attempts:
            cancelled = self._cancelled()
            if cancelled is None or any(str(attempt.job.id) in cancelled for attempt in attempts):
                self._cancel(attempts, store.find_lost([attempt.job for attempt in attempts]))

    def _cancel(self, attempts: list[Attempt], lost: list[Job]) -> None:
        owners = {job.owner for job in lost}
        for attempt in attempts:
            if attempt.job.owner in owners:
                attempt.cancel(DropJob("cancelled, taken by another worker, or its lease can't be renewed"))

    def _empty_outbox(self, store: JobStore) -> None:
        with self._lock:
            batch, self._published = self._published, []
        try:
            if batch:
                store.mark_notified(batch)
        except StoreUnavailable:
            with self._lock:
                self._published += batch
            raise

    def _release_dead_siblings(self, sweeper: Sweeper) -> None:
        """At first, and whenever a process of this node was replaced, which may have died with its jobs."""
        if (forks := self._forks.value) != self._forks_seen:
            for line in sweeper.release_dead_siblings():
                logger.warning(line)
            self._forks_seen = forks

    def _sweep(self, store: JobStore, sweeper: Sweeper, attempts: list[Attempt]) -> None:
        def is_calm() -> bool:
            """Renews the leases of this process first: they have to outlast the sweep."""
            if not attempts:  # otherwise the renewal does it
                self._keep_time(store)
            self._renew(store, attempts)
            return time.monotonic() >= (self._rest.at or 0.0)

        with pymongo.timeout(2 * self.PATIENCE_S):
            for line in sweeper.sweep(is_calm):
                logger.warning(line)


# ── runtime ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Runtime:
    """What one process works with. Each part is made when first used, so never in the parent of a fork.

    Only the shutdown and the rest are made at once: parent and children share the memory that holds their times.
    """

    mongodb_timeout_s = 10.0  # for one call
    store_patience_s = 60.0  # for MongoDB, before a message leaves its slot and is delivered again later
    settle_try_s = 5.0  # for one try to write a job's end
    poll_store_s = 1.0  # between two tries while MongoDB is away
    stuck_loop_s = 5.0  # that a handler may take to end after its deadline

    def __init__(self, settings: Settings, mongo: pymongo.MongoClient[Document] | None = None) -> None:
        self.settings = settings
        self.shutdown = Shutdown(settings.log_format)
        self.rest = SharedTime(time.monotonic() + settings.lease_seconds)
        self.forks = SharedCount()
        self.lock = threading.RLock()
        # One log for all jobs of the process: an outage is a single fault, however many jobs meet it.
        self.waiting_log = RepeatedFaultLog("jobs wait to be claimed")
        self.unwritten_log = RepeatedFaultLog("the ends of jobs can't be written")
        self.causes = OncePerCause()
        self.refused_log = RepeatedFaultLog("MongoDB takes no end of a job", logging.ERROR)
        if mongo is not None:
            self.mongo = mongo

    @made_once
    def mongo(self) -> pymongo.MongoClient[Document]:
        url, timeout_ms = self.settings.mongodb_url.get_secret_value(), int(self.mongodb_timeout_s * 1000)
        with unknown_when_unreachable():  # a name that doesn't resolve may raise here already
            return pymongo.MongoClient(url, timeoutMS=timeout_ms, **mongodb.CLIENT_OPTIONS)

    @made_once
    def database(self) -> Database[Document]:
        return open_database(self.mongo, self.settings.database_name)

    @made_once
    def store(self) -> JobStore:
        return JobStore(self.database, NODE, ServerClock(self.database), self.settings)

    @made_once
    def redis(self) -> redis.Redis:
        return self.settings.redis_target.client()

    @made_once
    def notifier(self) -> Notifier:
        return Notifier(self.redis)

    @made_once
    def notes(self) -> SharedNotes:
        return SharedNotes(self.redis, self.settings.celery_queue_name, self.settings.database_name)

    @made_once
    def lost_messages(self) -> LostMessages:
        return LostMessages(self.database, self.turns, self.broker)

    @made_once
    def turns(self) -> Turns:
        return Turns(self.database, self.store.now)

    @made_once
    def broker(self) -> Broker:
        patience_s = min(Broker.PATIENCE_S, self.settings.lease_seconds / 4)
        return Broker(app, self.settings.celery_queue_name, TASK_NAME, patience_s)

    @made_once
    def artifacts(self) -> Artifacts:
        settings = self.settings
        store_url, base_url = settings.artifact_store_url, settings.artifact_base_url
        return open_artifacts(store_url, base_url, lambda: self.database, settings.s3_options)

    @made_once
    def providers(self) -> Providers:
        return Providers(self.settings)

    @made_once
    def loop(self) -> EventLoopThread:
        return EventLoopThread()

    @made_once
    def sweeper(self) -> Sweeper:
        parts = (self.store, self.turns, self.lost_messages, self.notifier, self.notes, self.broker)
        return Sweeper(*parts, self.settings.lease_seconds)

    @made_once
    def files(self) -> FileSweeper:
        store, days = self.store, self.settings.artifact_retention_days
        return FileSweeper(lambda: self.artifacts, store.find_unreferenced, self.turns, store.now, days)

    @made_once
    def preparation(self) -> Preparation:
        return Preparation(self.turns, self.settings.celery_queue_name, self.store.ensure_indexes)

    @made_once
    def heartbeat(self) -> Heartbeat:
        return Heartbeat()

    @made_once
    def keeper(self) -> Keeper:
        def connect() -> tuple[JobStore, Sweeper, FileSweeper, Preparation]:
            return self.store, self.sweeper, self.files, self.preparation

        times = self.shutdown, self.notes.cancelled, self.rest, self.forks
        return Keeper(connect, *times, self.heartbeat, self.settings)

    def close(self) -> None:
        """Closes what was made: connections to the providers and the event loop, MongoDB, Redis."""
        for name in ("providers", "loop", "mongo", "redis"):
            if name in vars(self):
                getattr(self, name).close()


# ── task ─────────────────────────────────────────────────────────────────────────────────────────────────────────

REFUSED_TRIES = 3  # a refusal of a store is taken for final
LATER_S = 10.0  # the wait of a message for which MongoDB was away
MIN_REDELIVERY_S = 0.2
Reply = TypeVar("Reply")


class JobTask(Task):  # type: ignore[type-arg]
    abstract = True
    Request = JobRequest  # type: ignore[assignment]
    typing = False  # the task itself checks its arguments, so that a damaged message gets an answer

    @cached_property
    def runtime(self) -> Runtime:
        return Runtime(app.settings)


def redelivery(task: JobTask, job_id: ObjectId, wait_s: float) -> Exception:
    """The exception that redelivers the message later: under the same task id and limits, without its prompt."""
    arguments = own_arguments(job_id, **carried_data(task.request.args))
    options: Document = {"args": arguments, "kwargs": {}, "countdown": wait_s}
    settings = task.runtime.settings
    if settings.is_rabbitmq:  # a message that waits in a worker's memory would hold a slot
        options |= {"countdown": 0, "queue": waiting_queue(settings.celery_queue_name, math.ceil(wait_s))}
    try:
        return task.retry(**options, max_retries=None, throw=False)
    except Reject:  # the broker is away; Celery's own Reject would throw the message away
        return Reject("the broker is away", requeue=True)


def wait_for_store(task: JobTask, job_id: ObjectId, action: Callable[[], Reply]) -> Reply:
    """Does something in MongoDB before the job is claimed. It waits while MongoDB is away: no other job could run.

    Raises:
        Retry: it took too long, and the message is delivered again later. Reject: the worker is shutting down.
        StoreRefused: MongoDB has refused it several times.
    """
    runtime, refusals = task.runtime, 0
    soft_s = runtime.settings.limits(task.request.timelimit).soft_s
    give_up_at = time.monotonic() + min(runtime.store_patience_s, soft_s / 2)
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
            refusals += isinstance(error, StoreRefused)
            if refusals >= REFUSED_TRIES:
                raise
        if runtime.shutdown.is_announced:
            raise Reject("shutting down", requeue=True)
        if time.monotonic() > give_up_at:
            raise redelivery(task, job_id, LATER_S)
        time.sleep(runtime.poll_store_s)


def announce(
    runtime: Runtime, document: Mapping[str, Any], status: Status, sentence: str, owner: str | None = None
) -> None:
    """Publishes a status that the document has. A terminal one, which `owner` wrote, then leaves the outbox."""
    if runtime.notifier.publish_status(document, status, sentence) and status in TERMINAL_STATUSES:
        runtime.keeper.note_published(document["_id"], owner)


def announce_job(runtime: Runtime, job: Job, status: Status, sentence: str) -> None:
    document = {"_id": job.id, "user_id": job.user_id, "session_id": job.session_id}
    announce(runtime, document, status, sentence, job.owner)


def announce_end(runtime: Runtime, document: Mapping[str, Any]) -> None:
    announce(runtime, document, Status(document["status"]), sentences.final_sentence(document), owner_of(document))


def fail_unowned(task: JobTask, job_id: ObjectId, fail: Callable[[], Document | None], sentence: str) -> JobFailed:
    """Fails a job that no attempt runs, notifies the person, and returns the exception to raise."""
    runtime, failed = task.runtime, None
    try:
        failed = wait_for_store(task, job_id, fail)
    except StoreRefused as refusal:
        runtime.refused_log.fault(f"job={job_id} {refusal}")
    if failed:
        announce_end(runtime, failed)
    return JobFailed(sentence)


def read_message(task: JobTask, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[ObjectId, Document]:
    """The job's id and data. If the message has a wrong form, the document that it names fails with a sentence.

    Raises JobFailed: the message doesn't have the contract's form.
    """
    job_id, arguments = parse_arguments(args, kwargs)
    fits = len(args) + len(kwargs) == 2 == len(arguments) and isinstance(arguments.get("job_data"), dict)
    if not fits:
        logger.error("job=%s its message has the wrong arguments: (job_id, job_data) are expected", job_id)
        damaged, known_id = sentences.DAMAGED, ObjectId(job_id)
        raise fail_unowned(task, known_id, lambda: task.runtime.store.fail_unowned(known_id, damaged), damaged)
    return ObjectId(job_id), arguments["job_data"]


def receive_marker(task: JobTask, marker: ObjectId, queue_list: str) -> Document:
    """Notes that a search's marker has come out of a list of the queue. It is no job."""
    with contextlib.suppress(StoreRefused):  # then the search waits for it in vain, and ends in an hour
        wait_for_store(task, marker, lambda: task.runtime.lost_messages.receive(marker, queue_list))
    return {"job_id": str(marker), "status": "marker"}


def claim(task: JobTask, job_id: ObjectId, job_data: Document, taken_at: float) -> Job | NotClaimed:
    """The claimed job, or why it can't be claimed.

    It also claims a job whose process on this node has died, and one beyond its bounds if its result is kept in Redis.

    Raises JobFailed: MongoDB refuses the claim.
    """
    runtime, owner = task.runtime, secrets.token_hex(8)
    delivery = describe_delivery(task.request, runtime.settings.limits(task.request.timelimit), job_data)

    def try_claim(*, bounded: bool = True) -> Job | NotClaimed:
        waited_s = time.monotonic() - taken_at
        return runtime.store.claim(job_id, owner, delivery, bounded=bounded, waited_s=waited_s)

    try:
        claimed = wait_for_store(task, job_id, try_claim)
        is_held = isinstance(claimed, NotClaimed) and claimed.reason is Reason.HELD
        if is_held and wait_for_store(task, job_id, runtime.sweeper.release_dead_siblings):
            claimed = wait_for_store(task, job_id, try_claim)
        if isinstance(claimed, NotClaimed) and claimed.reason is Reason.EXHAUSTED and claimed.job:
            started_at = claimed.job.bookkeeping.first_started_at
            name = started_at and result_name(job_id, started_at)
            if name and wait_for_store(task, job_id, lambda: runtime.notes.kept_result(name)):
                claimed = wait_for_store(task, job_id, partial(try_claim, bounded=False))
        if isinstance(claimed, Job) and claimed.has_past:  # a former life's attempt may still run, and has to stop
            runtime.notes.forget_cancelled([runtime.settings.celery_queue_name])
        return claimed
    except StoreRefused as refusal:
        logger.error("job=%s can't be claimed: %s", job_id, refusal)
        sentence = sentences.TOO_LARGE_TO_RUN if refusal.is_too_large else sentences.NOT_SET_UP
        raise fail_unowned(task, job_id, partial(runtime.store.fail_unowned, job_id, sentence), sentence) from None


def answer_ended(runtime: Runtime, job: Snapshot, *, is_copy: bool) -> Document:
    """Publishes the end of a job again, of which another message has come.

    If the worker itself sent messages for it, this may be one too many, so only an unpublished end is published then.
    """
    own = job.bookkeeping
    if (own.rescues is None and not is_copy) or "unnotified" in values.as_mapping(own.raw):
        announce_end(runtime, job.document)
    return {"job_id": str(job.id), "status": str(job.status)}


def answer_not_claimed(task: JobTask, job_id: ObjectId, not_claimed: NotClaimed) -> Document:
    """What becomes of a message whose job could not be claimed.

    Raises:
        Ignore: a live attempt has the job. (A result under this task id would make Celery drop its redelivery.)
        Retry: the job waits for its next try. JobFailed: there is no such job, or it is at its bounds.
    """
    runtime, reason, job = task.runtime, not_claimed.reason, not_claimed.job
    logger.log(logging.ERROR if reason is Reason.UNKNOWN else logging.INFO, "job=%s not claimed: %s", job_id, reason)
    if (job is None and reason is not Reason.WAITING) or reason is Reason.FOREIGN_STATUS:
        raise JobFailed(sentences.NO_SUCH_JOB)
    if job and reason is Reason.TERMINAL:
        return answer_ended(runtime, job, is_copy="is_copy" in carried_data(task.request.args))
    if job and reason is Reason.EXHAUSTED:
        raise fail_unowned(task, job_id, partial(runtime.store.fail_seen, job, sentences.GAVE_UP), sentences.GAVE_UP)
    if reason is Reason.HELD:
        raise Ignore()
    now = runtime.store.now()
    available_at = (job and job.bookkeeping.available_at) or now
    raise redelivery(task, job_id, max(MIN_REDELIVERY_S, (available_at - now).total_seconds()))


async def generate(runtime: Runtime, attempt: Attempt, progress: Progress) -> Result:
    """Checks the job's input and runs its handler under the attempt's deadline."""
    job, settings = attempt.job, runtime.settings
    handler = find_handler(job.job_type)
    inputs = check_input(handler.input_model, job.input_data)
    provider, where = runtime.providers.get(handler.provider), settings.provider(handler.provider)
    attempt.provider, ends_at = where, asyncio.get_running_loop().time() + attempt.time_left_s()
    await provider.ready(attempt.time_left_s() / 4)  # most of the limit is left for the answer
    attempt.provider = await provider.with_model(where.serving(getattr(inputs, "model", None)))
    if not attempt.is_lease_fresh():  # looked at again, right before a call that costs money
        raise HandBack("its lease ran out before it asked the provider")
    try:
        async with asyncio.timeout_at(ends_at) as deadline:
            return await handler.run(Call(job, inputs, settings, provider, attempt.provider, progress))
    except TimeoutError:
        if deadline.expired():
            raise FailJob(f"the limit of {job.limits.soft_s:g} s", sentences.TOOK_TOO_LONG) from None
        raise RetryJob("TimeoutError") from None


async def run_handler(runtime: Runtime, attempt: Attempt) -> Result:
    """Runs the job's handler on the event loop. Raises a JobError for every end but a result."""
    running, loop = asyncio.current_task(), asyncio.get_running_loop()
    attempt.bind(lambda: running and loop.call_soon_threadsafe(running.cancel))
    notifier = runtime.notifier
    progress = Progress(
        partial(notifier.publish_progress, attempt.job),
        lambda: attempt.is_lease_fresh() and notifier.may_have_listeners(),
        notifier.recheck_s,
    )
    try:
        result = await generate(runtime, attempt, progress)
        if not isinstance(result, Result):
            raise OperatorFault("its handler returned no Result", JobError.default_sentence)
        with contextlib.suppress(asyncio.CancelledError):  # the result is there, and settle sees whose the job is
            await progress.finish()
        return result
    except asyncio.CancelledError:
        error: JobError = attempt.reason or DropJob("cancelled")
    except JobError as raised:
        error = raised
    except Exception as defect:  # of the handler; its text may hold a prompt, its place can't
        error = OperatorFault(f"{type(defect).__name__} at {place_of(defect)}", JobError.default_sentence)
    finally:
        progress.stop()
    error.__context__ = None  # the frames that an error came through hold the answer, and their task holds the error
    raise error.with_traceback(None)


def find_kept(runtime: Runtime, job: Job) -> Result | None:
    """A result that an earlier attempt could not write. If Redis can't be asked, the job is generated again."""
    with contextlib.suppress(NotesUnavailable):
        return runtime.notes.kept_result(job.kept_name)
    return None


def run(runtime: Runtime, attempt: Attempt) -> Outcome:
    """Runs the job's handler on the event loop, within its deadline. Nothing is written here.

    Raises SystemExit: the process is to end, but no shutdown was announced (a revoke does this). The lease runs out.
    """
    job = attempt.job
    if not attempt.is_lease_fresh():  # the process was suspended, or MongoDB's answer took long
        return HandBack("its lease ran out before it began")
    logger.info("%s started", job, extra=log_fields(job, event="started", waited_s=job.waited_s))
    announce_job(runtime, job, Status.PROCESSING, sentences.started(job.attempt, runtime.settings.max_attempts))
    try:
        if job.attempt > 1 and (kept := find_kept(runtime, job)):
            return kept
        future, loop = runtime.loop.submit(run_handler(runtime, attempt))
        try:
            return future.result(attempt.time_left_s() + runtime.stuck_loop_s)
        except TimeoutError:
            runtime.loop.abandon(loop)
            stuck = FailJob("the handler blocks the event loop", sentences.TOOK_TOO_LONG)
            attempt.cancel(stuck)
            return stuck
    except JobError as error:
        return error
    except SystemExit:
        hand_back = HandBack("this process got a signal to end")
        attempt.cancel(hand_back)
        if runtime.shutdown.is_announced:
            return hand_back
        raise


def within_bounds(runtime: Runtime, job: Job, outcome: Outcome) -> Outcome:
    """Gives a retry its wait in seconds. A retry beyond the job's bounds becomes a failure."""
    if not isinstance(outcome, RetryJob):
        return outcome
    settings, store, asked_s = runtime.settings, runtime.store, outcome.after_s
    if job.attempt < settings.max_attempts or not outcome.is_counted:
        delays = (*settings.retry_delays[job.attempt - 1 :], *settings.retry_delays[-1:], 0.0)
        wait_s = delays[0] * random.uniform(0.5, 1.0) if asked_s is None else asked_s
        if not outcome.is_counted:
            wait_s = min(wait_s, settings.retry_after_max)
        is_in_time = job.first_started_at > store.oldest_start(job.limits, wait_s)
        if is_in_time and (asked_s is None or wait_s <= settings.retry_after_max):
            number, wait_s = job.attempt + outcome.is_counted, wait_s or 0.0
            sentence = sentences.trying_again(outcome.sentence, wait_s, number, settings.max_attempts)
            return RetryJob(outcome.detail, sentence, wait_s, is_counted=outcome.is_counted)
        if asked_s is not None and outcome.is_counted:
            return FailJob(outcome.detail, sentences.try_again_after(outcome.sentence, store.now(), asked_s))
    failure = OperatorFault if isinstance(outcome, NotStored) else FailJob
    return failure(outcome.detail, sentences.given_up(outcome.sentence, job.attempt))


def file_name(job: Job, suffix: str) -> str:
    """Job and owner make a file's name, so that a late attempt never touches the file of another."""
    return f"{job.id}-{job.owner}.{suffix}"


def complete(runtime: Runtime, job: Job, result: Result) -> bool:
    """Stores the file, then ends the job. So a completed document never names a file that isn't there."""
    if result.media is None:
        return runtime.store.complete(job, result.output, None)
    url = runtime.artifacts.publish(file_name(job, result.media.suffix), result.media.data)
    return runtime.store.complete(job, {**result.output, result.media.url_field: url}, url)


def discard_files(runtime: Runtime, job: Job) -> None:
    """Deletes the files of this attempt, unless the document names them. The sweeper deletes what is left."""
    with contextlib.suppress(StoreUnavailable):
        url = str((runtime.store.read(job.id) or {}).get("artifact_url"))
        for name in [name for name in runtime.artifacts.names(f"{job.id}-{job.owner}") if name not in url]:
            runtime.artifacts.delete(name)


def write_outcome(runtime: Runtime, attempt: Attempt, outcome: Outcome) -> Outcome:
    """Makes the fenced write that belongs to an outcome. Returns DropJob if the job is no longer this attempt's.

    Raises StoreUnavailable: the write may have been made; try again. StoreRefused, ArtifactsUnavailable: it wasn't.
    """
    store, now = runtime.store, runtime.store.now()
    job = attempt.ended(outcome, now)
    match outcome:
        case Result():
            done = complete(runtime, job, outcome)
        case RetryJob():
            at = now + timedelta(seconds=outcome.after_s or 0)
            done = store.release(job, at, outcome.sentence, counted=outcome.is_counted)
        case HandBack():
            done = store.release(job, now, outcome.sentence, counted=False)
        case FailJob():
            done = store.fail(job, outcome.sentence)
        case _:
            return outcome
    return outcome if done else DropJob("the job is no longer this attempt's")


def write_patiently(runtime: Runtime, attempt: Attempt, outcome: Outcome, signals_arrived: Sequence[int]) -> Outcome:
    """Writes the outcome, again and again while MongoDB is away, until the hard limit or the end of the process.

    A result that can't be written is then kept in Redis. Raises StoreRefused or ArtifactsUnavailable: a store has
    refused it several times.
    """
    job, limits, is_kept, try_s, refusals = attempt.job, attempt.job.limits, False, runtime.settle_try_s, 0
    give_up_at = attempt.started_at + max(limits.hard_s - LIMIT_MARGIN_S, limits.soft_s)
    while True:
        try:
            # A MongoDB that hangs must not outlast the hard limit, nor the grace of a shutdown.
            with pymongo.timeout(max(runtime.poll_store_s, min(try_s, give_up_at - time.monotonic()))):
                written = write_outcome(runtime, attempt, outcome)
            runtime.unwritten_log.over()
            if is_kept:
                runtime.notes.forget_result(job.kept_name)
            return written
        except StoreUnavailable as error:
            runtime.unwritten_log.fault(f"{job} {error}")
            is_refused = isinstance(error, StoreRefused)
            refusals += is_refused or isinstance(error, ArtifactsUnavailable)
            if refusals >= REFUSED_TRIES or (isinstance(error, StoreRefused) and error.is_too_large):
                raise
        result = outcome if isinstance(outcome, Result) and not is_refused else None
        if signals_arrived or runtime.shutdown.is_due or time.monotonic() + runtime.poll_store_s >= give_up_at:
            break
        if result and result.media and runtime.notes.keep_result(job.kept_name, result):
            is_kept, try_s = True, try_s * 2  # a large file takes long, and a kill meanwhile loses nothing now
        time.sleep(runtime.poll_store_s)
    if result:
        runtime.notes.keep_result(job.kept_name, result)
    return LeaveJob("its end couldn't be written: the lease runs out, and a sweeper rescues the job")


def instead_of(runtime: Runtime, attempt: Attempt, outcome: Outcome, error: StoreUnavailable) -> Outcome:
    """What an attempt ends with whose outcome a store has refused. Each step leaves less to be written."""
    job = attempt.job
    if isinstance(error, ArtifactsUnavailable) and isinstance(outcome, Result):
        runtime.notes.keep_result(job.kept_name, outcome)
        return within_bounds(runtime, job, NotStored(str(error)))
    if isinstance(outcome, Result):
        discard_files(runtime, job)
        return OperatorFault(str(error), sentences.CANT_BE_STORED)
    if isinstance(outcome, FailJob):
        runtime.refused_log.fault(f"{job} {error}")
        return EndRefused(str(error))
    return OperatorFault(str(error), sentences.NOT_SET_UP)


def settle(runtime: Runtime, attempt: Attempt, outcome: Outcome) -> Outcome:
    """Ends the attempt by one fenced write, which no signal interrupts. Nothing else of an attempt writes.

    Returns what holds now: the outcome, or one that replaced it since a store refused the first; DropJob if the job is
    no longer this attempt's, so that nothing was written; LeaveJob if it is unknown whether the write was made.
    """
    outcome = within_bounds(runtime, attempt.job, outcome)
    with signals_deferred() as arrived:
        while True:
            try:
                return write_patiently(runtime, attempt, outcome, arrived)
            except StoreUnavailable as error:
                outcome = instead_of(runtime, attempt, outcome, error)


def remove_leftovers(runtime: Runtime, job: Job) -> None:
    """Removes what other attempts at a job left, once it has ended. What can't be reached now stays.

    A job that was put back and has failed still has the file of its former life.
    """
    if job.attempt > 1:
        runtime.notes.forget_result(job.kept_name)
    if job.attempt > 1 or job.has_past:
        with contextlib.suppress(StoreUnavailable):
            for name in runtime.store.find_unreferenced(list(runtime.artifacts.names(f"{job.id}-"))):
                runtime.artifacts.delete(name)


def repeat_final_status(runtime: Runtime, job: Job, *, of_a_cancel: bool) -> None:
    """Publishes the final status again, if the job was ended while this process was suspended.

    This one may have published "processing" since. A cancel by the API has no `completed_at`. It is published
    (`of_a_cancel`) only where this process has published "processing" just before.
    """
    with contextlib.suppress(StoreUnavailable), pymongo.timeout(runtime.poll_store_s):
        seen = runtime.store.look(job.id)
        if seen and seen.status in TERMINAL_STATUSES and (of_a_cancel or seen.document.get("completed_at")):
            announce_end(runtime, seen.document)


def log_end(runtime: Runtime, attempt: Attempt, outcome: Outcome, event: str) -> None:
    """Logs the end of an attempt in one line: waiting and running time, model and provider, tokens, and the reason."""
    record, usage = attempt.record(outcome), usage_of(output_of(outcome))
    reason = "" if isinstance(outcome, Result) else f": {outcome.detail}"
    level = logging.INFO if isinstance(outcome, Result) else runtime.causes.level(outcome.log_level, outcome.detail)
    fields = log_fields(attempt.job, event=record.end, **{**record.document(), **usage})
    logger.log(level, "%s %s%s (%s)", attempt.job, event, reason, in_words(record, usage), extra=fields)


def conclude(task: JobTask, attempt: Attempt, outcome: Outcome) -> Document:
    """Logs what the document holds now, publishes it to the person, and ends the Celery task accordingly.

    Raises JobFailed, Retry, Reject or Ignore for every outcome but a result.
    """
    runtime, job = task.runtime, attempt.job
    match outcome:
        case Result():
            log_end(runtime, attempt, outcome, "completed")
            announce_job(runtime, job, Status.COMPLETED, sentences.READY)
            remove_leftovers(runtime, job)
            return {"job_id": str(job.id), "status": Status.COMPLETED.value}
        case RetryJob():
            wait_s = outcome.after_s or 0.0
            log_end(runtime, attempt, outcome, f"will be tried again in {wait_s:.1f} s")
            announce_job(runtime, job, Status.PROCESSING, outcome.sentence)
            repeat_final_status(runtime, job, of_a_cancel=True)
            raise redelivery(task, job.id, wait_s)
        case HandBack():
            log_end(runtime, attempt, outcome, "handed back")
            raise Reject(outcome.detail, requeue=True)
        case FailJob():
            log_end(runtime, attempt, outcome, "failed")
            announce_job(runtime, job, Status.FAILED, outcome.sentence)
            remove_leftovers(runtime, job)
            raise JobFailed(outcome.sentence)
        case _:
            log_end(runtime, attempt, outcome, "abandoned")
            if not isinstance(outcome, LeaveJob):
                discard_files(runtime, job)
                repeat_final_status(runtime, job, of_a_cancel=False)
            raise JobFailed(outcome.sentence) if isinstance(outcome, EndRefused) else Ignore()


def make_attempt(
    task: JobTask, job_id: ObjectId, job_data: Document, taken_at: float
) -> tuple[Attempt, Outcome] | NotClaimed:
    """Claims the job, runs it, and settles its end. A signal waits for this, or the lease would have to run out."""
    runtime = task.runtime
    with runtime.shutdown.waits_for_job():
        claimed = claim(task, job_id, job_data, taken_at)
        if isinstance(claimed, NotClaimed):
            return claimed
        attempt = Attempt(claimed, runtime.settings.lease_seconds, taken_at)
        runtime.keeper.register(attempt)
        try:
            return attempt, settle(runtime, attempt, run(runtime, attempt))
        finally:
            runtime.keeper.unregister(attempt)


@app.task(bind=True, base=JobTask, name=TASK_NAME, throws=(JobFailed,), max_retries=None, shared=False)
def process_job(task: JobTask, *args: Any, **kwargs: Any) -> Document:
    """Brings one job to its end: claim, run, settle, conclude (contract, section 1).

    Raises:
        JobFailed: the job has failed; the text is the person's sentence.
        Ignore: another attempt has the job, or its end is unknown and a sweeper decides. Retry: it is tried later.
        Reject: the message goes back to the queue.
    """
    taken_at = time.monotonic()
    with task.runtime.shutdown.waits_for_task():
        job_id, job_data = read_message(task, args, kwargs)
        if marker := values.as_text(job_data.get("marker")):
            return receive_marker(task, job_id, marker)
        done = make_attempt(task, job_id, job_data, taken_at)
        return answer_not_claimed(task, job_id, done) if isinstance(done, NotClaimed) else conclude(task, *done)


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
    """In the parent, at its start: once for Celery's own handlers, and once for those of its task logger."""
    logs.install(app.settings.debug, kwargs["logger"].handlers, app.settings.log_format)


@signals.import_modules.connect(sender=app)
def import_handlers(**_: Any) -> None:
    """In the parent, at its start."""
    if fault := modules_fault(app.settings.handler_modules):
        refuse(f"HANDLER_MODULES {fault}", app.settings.log_format)


def refuse_unsafe_pool(worker: Any) -> None:
    """In the parent, at its start: a pool in which no lease would be kept, or that can't work here."""
    pool = str(getattr(worker.pool_cls, "__module__", worker.pool_cls))
    if fault := pool_fault(pool, worker.concurrency, app.settings.lease_seconds):
        refuse(fault, app.settings.log_format)


def share_memory(**_: Any) -> None:
    """In the parent, before each fork: children share what is imported, and no garbage collection copies it."""
    runtime = process_job.runtime  # makes the shutdown time, which children share with their parent
    runtime.providers.preload()
    runtime.forks.increase()
    gc.unfreeze()  # what became garbage since the last fork
    gc.collect()
    gc.freeze()


def start_keeper(**_: Any) -> None:
    """In each child after its fork, and in the only process of the solo pool."""
    runtime = process_job.runtime
    runtime.keeper.start()
    threading.Thread(target=runtime.providers.preload, name="preload", daemon=True).start()


def start_in_threads(instance: Any, **_: Any) -> None:
    """In the only process of the threads pool, before it connects to the broker, which may be away."""
    if instance.pool.__class__.__module__.endswith(".thread"):
        start_keeper()


def note_revoked(request: Any = None, expired: bool = False, **_: Any) -> None:
    """In the parent, for a task that Celery dropped or killed: the next sweep fails its job."""
    with contextlib.suppress(JobFailed):
        job_id, _arguments = parse_arguments(request.args or (), request.kwargs or {})
        task = RevokedTask(job_id, request.root_id or request.id, EXPIRED if expired else REVOKED)
        process_job.runtime.notes.note_revoked(task)


def announce_shutdown(how: str = "", exitcode: int = 0, **_: Any) -> None:
    """In the parent's signal handler. A cold shutdown (Ctrl-C twice, SIGQUIT) has no grace."""
    runtime = process_job.runtime
    runtime.shutdown.announce(runtime.settings.shutdown_grace if how == "Warm" else 0.0, exitcode)


def stop_keeper(**_: Any) -> None:
    """In each process, at its end. A parent that forks has no keeper."""
    if "keeper" in vars(process_job.runtime):
        process_job.runtime.keeper.stop()


HOOKS: tuple[tuple[Any, Callable[..., None]], ...] = (
    (signals.after_setup_logger, set_up_logging),
    (signals.after_setup_task_logger, set_up_logging),
    (signals.worker_before_create_process, share_memory),
    (signals.worker_process_init, start_keeper),
    (signals.celeryd_after_setup, start_in_threads),
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
    process_job.runtime.shutdown.bound(lambda: child_pids(sender.pool))
    for signal, hook in HOOKS:
        signal.connect(hook)


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────

# Each is `command` in the module of worker_commands/ that has its name.
COMMANDS = (
    *("cancel", "check", "demo", "health", "jobs", "metrics", "recover"),
    *("report", "retry", "run", "schema", "show", "status", "submit"),
)


@click.group(
    cls=LazyGroup,
    package="worker_commands",
    names=COMMANDS,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__)
@click.pass_context
def main(context: click.Context) -> None:
    """AI Backend Worker: takes generation jobs from a Celery queue, and brings each one to exactly one end.

    Without a command it runs the worker. Settings come from the environment and from .env.
    """
    write_any_character()
    if context.invoked_subcommand is None and (run_worker := main.get_command(context, "run")):
        context.invoke(run_worker)


if __name__ == "__main__":
    sys.modules["worker"] = sys.modules["__main__"]  # so that `import worker` elsewhere finds this very module
    main()
