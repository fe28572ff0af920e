"""The sub-document `worker` of a job's document, read into a typed value that nothing odd in it can break.

The worker judges a job by this value alone. Before it changes a job that it has read, it compares `raw` with what the
document holds, since a query that is built from the typed value would not match an odd original.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

from bson import ObjectId

from workerkit import sentences
from workerkit.attempts import COMPLETED, FAILED, LOST, LOST_REASON, MAX_KEPT, AttemptRecord, read_records, usage_of
from workerkit.errors import Document
from workerkit.settings import is_duration
from workerkit.values import MAX_TEXT_CHARACTERS, as_mapping, as_number, as_priority, as_seconds, as_text, as_time

MAX_LEASE_S = 3600.0
MAX_LIMIT_S = 2 * 86_400.0
CLOCK_TOLERANCE_S = 60.0  # by which the times of two processes may differ while MongoDB answers slowly
PAST_LIVES = 5
LATER_FIGURES = ("prompt_tokens", "completion_tokens", "pictures")  # which older lives lack
# The indexes of the jobs: name, fields, and options. Those of the bookkeeping hold few jobs, and cost little.
INDEXES: dict[str, tuple[list[str], Document]] = {
    "worker_status_id": (["status", "_id"], {}),
    "worker_node": (["worker.node"], {"partialFilterExpression": {"status": "processing"}}),
    "worker_cancelled": (["worker.lease_until"], {"partialFilterExpression": {"status": "failed"}}),
    "worker_unnotified": (["worker.unnotified"], {"sparse": True}),
}


def as_life(value: Any) -> Document:
    """What is kept of a job's former life: when and why it ended, what it used. Other fields are left out."""
    life = as_mapping(value)
    reason, model = (life.get(name) for name in ("reason", "model"))
    return {
        "ended_at": as_time(life.get("ended_at")),
        "reason": reason[:MAX_TEXT_CHARACTERS] if isinstance(reason, str) else None,
        "model": as_text(model),
        "tokens": as_number(life.get("tokens")),
        "attempts": as_number(life.get("attempts")),
        **{name: as_number(value) for name in LATER_FIGURES if (value := life.get(name)) is not None},
        **({"seconds": seconds} if (seconds := as_seconds(life.get("seconds"))) is not None else {}),
    }


@dataclass(frozen=True)
class Bookkeeping:
    """What the worker noted about a job. A field that is missing, of the wrong type or absurd is None (or 0).

    `rescues` is None as long as every message for the job came from the API. `raw` is the sub-document as it was read.
    `has_owner_field` tells a null owner, which a release leaves, from none.
    """

    raw: Any = None
    has_owner_field: bool = False
    owner: str | None = None
    node: str | None = None
    pid: int | None = None
    queue: str | None = None
    priority: int | None = None
    task_id: str | None = None
    lease_until: datetime | None = None
    deadline: datetime | None = None
    available_at: datetime | None = None
    rescue_at: datetime | None = None
    rescues: int | None = None
    attempt: int = 0
    first_started_at: datetime | None = None
    limits: tuple[float, float] | None = None
    message: str | None = None
    attempts: tuple[AttemptRecord, ...] = ()
    past: tuple[Document, ...] = ()

    @property
    def is_released(self) -> bool:
        return self.has_owner_field and self.raw["owner"] is None

    @property
    def has_past(self) -> bool:
        """Whether the job has been worked on, or ended, before."""
        return bool({"attempt", "owner", "unnotified"} & set(as_mapping(self.raw)))

    def next_attempt(self, lease: Document, max_attempts: int) -> Document:
        """The bookkeeping of the attempt that has this lease. It keeps when the job became available, for the log."""
        since = {"available_at": self.available_at} if self.available_at else {}
        number = self.attempt + 1
        own = {"attempt": number, "message": sentences.started(number, max_attempts), **kept_attempts(self.attempts)}
        return {**self.kept(), **since, **lease, **own}

    def message_options(self) -> Document:
        """With what Celery sends another message for the job: its task's limits, priority and origin."""
        hard_s, soft_s = self.limits or (None, None)
        return {"time_limit": hard_s, "soft_time_limit": soft_s, "priority": self.priority, "root_id": self.task_id}

    def kept(self) -> Document:
        """What stays of it from one attempt to the next, and when the job ends, but for the records of attempts."""
        names = ("queue", "priority", "task_id", "rescues", "attempt", "first_started_at", "limits", "past")
        values = {name: getattr(self, name) for name in names}
        present = {name: value for name, value in values.items() if value not in (None, ())}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in present.items()}


def parse_bookkeeping(raw: Any, now: datetime, longest_wait_s: float) -> Bookkeeping:
    """Reads the sub-document. `longest_wait_s` is the longest time from now until a rescue can be due."""
    if not as_mapping(raw):
        return Bookkeeping(raw)

    def time(name: str, ahead_s: float) -> datetime | None:
        return as_time(raw.get(name), now + timedelta(seconds=ahead_s))

    limits, past = (value if isinstance(value := raw.get(name), list) else [] for name in ("limits", "past"))
    message = raw.get("message")
    return Bookkeeping(
        raw,
        has_owner_field="owner" in raw,
        **{name: as_text(raw.get(name)) for name in ("owner", "node", "queue", "task_id")},  # type: ignore[arg-type]
        **{name: as_number(raw.get(name)) for name in ("pid", "rescues")},  # type: ignore[arg-type]
        priority=as_priority(raw.get("priority")),
        attempt=as_number(raw.get("attempt")) or 0,
        lease_until=time("lease_until", MAX_LEASE_S),
        deadline=time("deadline", MAX_LIMIT_S),
        available_at=time("available_at", longest_wait_s),
        rescue_at=time("rescue_at", longest_wait_s),
        first_started_at=time("first_started_at", CLOCK_TOLERANCE_S),
        limits=(limits[0], limits[1]) if len(limits) == 2 and all(map(is_duration, limits)) else None,
        message=message[:MAX_TEXT_CHARACTERS] if isinstance(message, str) else None,
        attempts=read_records(raw.get("attempts")),
        past=tuple(as_life(life) for life in past if isinstance(life, Mapping))[-PAST_LIVES:],
    )


def kept_attempts(records: Sequence[AttemptRecord]) -> Document:
    """What a document keeps of a job's attempts that have ended: the last few."""
    return {"attempts": [record.document() for record in records[-MAX_KEPT:]]} if records else {}


def owner_of(document: Mapping[str, Any]) -> Any:
    """The attempt that has a job or ended it, as its document says."""
    return as_mapping(document.get("worker")).get("owner")


def waiting(available_at: datetime, rescue_s: float) -> Document:
    """What a release notes: that the job has no owner, from when on it may be claimed, and when it is to be rescued."""
    return {"owner": None, "available_at": available_at, "rescue_at": available_at + timedelta(seconds=rescue_s)}


def first_attempt(lease: Document, now: datetime, *, is_copy: bool, former: Snapshot | None = None) -> Document:
    """The bookkeeping with which a job's life begins. Of former lives the last few ends are kept."""
    own = {**lease, "attempt": 1, "first_started_at": now, "message": sentences.started(1, 1)}
    own |= {"rescues": 0} if is_copy else {}
    if former and former.bookkeeping.has_past:
        own["past"] = former.lives()
        if put_back_at := as_time(former.document.get("updated_at"), now):
            own["available_at"] = put_back_at
    return own


@dataclass(frozen=True)
class Snapshot:
    """A job as it was read, without its input and output. Every judgement about a job is made on one of these."""

    document: Mapping[str, Any]
    bookkeeping: Bookkeeping

    @property
    def id(self) -> ObjectId:
        return cast(ObjectId, self.document["_id"])

    @property
    def status(self) -> str | None:
        return as_text(self.document.get("status"))

    @property
    def is_of_older_worker(self) -> bool:
        """Whether a worker that knows no leases took it. It may have left the bookkeeping of a former life in place."""
        own = self.bookkeeping
        return not own.has_owner_field or as_time(self.document.get("started_at")) != own.first_started_at

    def unchanged(self) -> Document:
        """What finds the job as long as it is what was read. A text or list, which may be decoded with losses, counts
        by its type.
        """
        raw = self.bookkeeping.raw
        kind = "string" if type(raw) is str else "array" if isinstance(raw, list) else ""
        return {"_id": self.id, "status": self.status, "worker": {"$type": kind} if kind else {"$eq": raw}}

    def is_stale(self, now: datetime, orphan_after_s: float) -> bool:
        """Whether no attempt works on a job that has started, and a message of it may be lost.

        Its lease ran out, the message after its release is overdue, its bookkeeping is damaged, or a worker of an older
        version left it. Only what says positively that somebody has the job is believed.
        """
        own = self.bookkeeping
        is_alive = own.owner and own.lease_until and own.lease_until > now
        is_waiting = own.is_released and own.rescue_at and own.rescue_at > now
        if is_alive or is_waiting:
            return False
        return not self.is_of_older_worker or self.age(now) > timedelta(seconds=orphan_after_s)

    @property
    def is_unowned(self) -> bool:
        """Whether no attempt has begun, or the last one has released the job."""
        is_released = self.bookkeeping.is_released and not self.is_of_older_worker
        return self.status == "pending" or (self.status == "processing" and is_released)

    def rescued(self, now: datetime, rescue_first_s: float, rescue_max_s: float) -> Document:
        """The fields that a rescue sets, and to what. Each time the next one is twice as far away.

        The life of an older worker's job begins here, with all its attempts and its time.
        """
        own = self.bookkeeping
        rescues = own.rescues or 0
        rescue_s = min(rescue_first_s * 2 ** min(rescues, 10), rescue_max_s)
        begins = {"attempt": 0, "first_started_at": now} if self.is_of_older_worker else {}
        kept = {**own.kept(), **self.records(now), "message": sentences.GOES_ON}
        released = {**kept, **waiting(now, rescue_s), "rescues": rescues + 1, **begins}
        return {"updated_at": now, "worker": released, **({"started_at": now} if begins else {})}

    def failed(self, now: datetime, sentence: str) -> Document:
        """The bookkeeping if the job fails as it was read. A pending one ends a life in which there was no attempt."""
        own = self.bookkeeping
        untried = {"attempt": 0, "past": self.lives()} if self.status == "pending" and own.has_past else {}
        return {**own.kept(), **untried, **self.records(now), "owner": own.owner, "message": sentence}

    def records(self, now: datetime) -> Document:
        """The records of this life's attempts, with that of the one that holds the job and can't end it any more.

        A pending job, and one that an older worker has begun, may still have a former life's: they are left out.
        """
        own = self.bookkeeping
        if self.status == "pending" or self.is_of_older_worker:
            return {}
        lost = [AttemptRecord(own.attempt, LOST, own.node, now, reason=LOST_REASON)] if own.owner else []
        return kept_attempts((*own.attempts, *lost))

    def lives(self) -> list[Document]:
        """The last of its lives that have ended, where another one begins."""
        return [*self.bookkeeping.past, self.life()][-PAST_LIVES:]

    def life(self) -> Document:
        """What is kept of the life that has ended."""
        document, own = self.document, self.bookkeeping
        last = [one.end for one in own.attempts[-1:]]
        # An API may have taken the sentence away when it put the job back.
        reason = document.get("error_message") or (own.message if last == [FAILED] else None)
        ended = {"ended_at": document.get("completed_at"), "reason": reason}
        # A life that didn't complete has left the output of the one before. An older worker has kept no attempts.
        is_own = own.message is None or last == [COMPLETED]
        output = as_mapping(document.get("output_data") if is_own else None)
        used = {"model": output.get("model_used"), **usage_of(output)}
        return as_life({**ended, **used, "attempts": own.attempt})

    def age(self, now: datetime) -> timedelta:
        """The time since it started, as far as its document says; `timedelta.max` where that has no such time."""
        latest = now + timedelta(seconds=MAX_LEASE_S)  # the clock of an older worker's host may have been ahead
        times = (as_time(self.document.get(name), latest) for name in ("started_at", "updated_at", "created_at"))
        since = next(filter(None, times), None)
        return now - since if since else timedelta.max
