"""The jobs that haven't ended, for `status` and `metrics`: how many wait, since when, and what became of the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from worker import Runtime, Status, Sweeper
from worker_commands.lives import as_words
from workerkit.attempts import AttemptRecord
from workerkit.bookkeeping import Snapshot, parse_bookkeeping
from workerkit.errors import Document
from workerkit.mongodb import iterate, read_raw, unknown_when_unreachable
from workerkit.values import as_mapping, as_time

if TYPE_CHECKING:
    from pymongo.collection import Collection

CLOCK_TOLERANCE = timedelta(minutes=5)  # by which the API's clock may be ahead of the database's
NO_TEXT: Document = {"$literal": {}}
LONGEST_WAIT_S = 86_400.0  # a job waits no longer for its next try, so a later time is damage

# ── pending jobs ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Pending:
    """The pending jobs of a type: how many, and since when the oldest waits (None if no document says it)."""

    count: int = 0
    since: datetime | None = None


def lies_between(path: str, lowest: object, highest: object) -> Document:
    """An expression: whether a value lies between these two.

    BSON orders values by their types first, so this tells numbers, dates and texts from all else. What is missing is
    null here, which comes before them.
    """
    value = {"$ifNull": [path, None]}
    return {"$and": [{"$gte": [value, lowest]}, {"$lte": [value, highest]}]}


def date_between(path: str, since: datetime, until: datetime) -> Document:
    """An expression: the date if it lies between these two, else null."""
    return {"$cond": [lies_between(path, since, until), path, None]}


def text_at(path: str) -> Document:
    """An expression: the text, or null. In BSON's order the empty object comes right behind the texts."""
    return {"$cond": [{"$and": [lies_between(path, "", NO_TEXT), {"$ne": [path, NO_TEXT]}]}, path, None]}


TIMES = ("created_at", "updated_at")


def read_pending(jobs: Collection[Document], now: datetime) -> dict[str, Pending]:
    """The pending jobs by type. They are counted on the server, however many there are. Raises StoreUnavailable.

    A job that was put back waits since then, which `updated_at` tells.
    """
    latest = (now + CLOCK_TOLERANCE).replace(tzinfo=None)  # mongomock keeps UTC without saying so
    times = [date_between(f"${name}", datetime(1970, 1, 1), latest) for name in TIMES]
    pipeline: list[Document] = [
        {"$match": {"status": Status.PENDING}},
        {"$project": {"type": text_at("$job_type"), "since": {"$max": times}}},
        {"$group": {"_id": "$type", "count": {"$sum": 1}, "since": {"$min": "$since"}}},
    ]
    with unknown_when_unreachable():
        groups = list(jobs.aggregate(pipeline))
    # Types that differ only beyond what is kept of their names are one here.
    pending: dict[str, Pending] = {}
    for group in groups:
        name, since = as_words(group["_id"]), as_time(group["since"])
        before = pending.get(name, Pending())
        pending[name] = Pending(before.count + group["count"], min(filter(None, (before.since, since)), default=None))
    return pending


def oldest(pending: Mapping[str, Pending]) -> datetime | None:
    return min((each.since for each in pending.values() if each.since), default=None)


def age_s(since: datetime | None, now: datetime) -> float:
    """Seconds from then until now; 0 where nothing waits, or where the API's clock is ahead."""
    return max(0.0, (now - since).total_seconds()) if since else 0.0


# ── jobs that are processed ──────────────────────────────────────────────────────────────────────────────────────


class State(StrEnum):
    """What becomes of a job whose status is `processing`."""

    RUNNING = "running"
    WAITING = "waiting_to_retry"
    UNOWNED = "unowned"  # handed back, or its process died: a worker takes it up within seconds


@dataclass(frozen=True)
class Processing:
    job_id: object
    job_type: str
    state: State
    node: str
    available_at: datetime | None
    attempts: tuple[AttemptRecord, ...]
    document: Mapping[str, Any]


OWN = ("owner", "node", "lease_until", "available_at", "rescue_at", "first_started_at", "attempts", "past")
PROCESSING_FIELDS = {
    **dict.fromkeys(("status", "job_type", "created_at", "updated_at", "started_at"), 1),
    **{f"worker.{name}": 1 for name in OWN},
}


def state_of(job: Snapshot, now: datetime) -> State:
    own = job.bookkeeping
    if own.is_released and not job.is_of_older_worker:
        return State.WAITING if own.available_at and own.available_at > now else State.UNOWNED
    is_leased = own.owner and own.lease_until and own.lease_until > now
    return State.RUNNING if is_leased or job.is_of_older_worker else State.UNOWNED


def read_processing(jobs: Collection[Document], now: datetime) -> Iterator[Processing]:
    """The jobs whose status is `processing`, of which each worker has a few. Raises StoreUnavailable."""
    for document in iterate(read_raw(jobs).find({"status": Status.PROCESSING}, PROCESSING_FIELDS)):
        own = parse_bookkeeping(document.get("worker"), now, LONGEST_WAIT_S)
        job = Snapshot(document, own)
        state, job_type = state_of(job, now), as_words(document.get("job_type"))
        node = own.node or "" if state is State.RUNNING else ""
        yield Processing(job.id, job_type, state, node, own.available_at, own.attempts, document)


SWEPT_WITHIN = timedelta(seconds=45)


def is_swept(runtime: Runtime, now: datetime) -> bool:
    """Whether a worker has looked for lost jobs a moment ago, which one of those that share the database always does.

    Raises StoreUnavailable.
    """
    with unknown_when_unreachable():
        turn = as_mapping(runtime.database["worker_turns"].find_one({"_id": Sweeper.TURN}))
    until = as_time(turn.get("until"), now + timedelta(hours=1))
    return bool(until and until > now - SWEPT_WITHIN)
