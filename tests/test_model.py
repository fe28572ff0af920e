"""The status machine against a model of it: several workers, any order of steps, a network that loses messages.

Hypothesis drives the real JobStore and Sweeper of three processes over one database: submits, claims, renewals, ends,
hand-backs, sweeps, cancels, revokes, duplicates, lost and late requests, lost replies, dead processes, clocks that
are off, bookkeeping that somebody spoils, documents that are put back, and a validator that refuses writes for good.
`Model` says, from a job's facts alone, what each verb may do to it. Every single write is compared with that: what the
model forbids must not happen, and what it allows must happen in calm weather. At the end of each example the world
calms down, one worker is left, and every job has to end, and its end to be published, within a bounded time.

The same examples run each time, and three times as many in CI. For thousands of new ones, other ones each time:

    MODEL_EXAMPLES=5000 pytest -n0 tests/test_model.py --timeout=0
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import partial, partialmethod
from types import SimpleNamespace
from typing import Any, cast

import mongomock
import pymongo
import pytest
from bson import ObjectId
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kombu.exceptions import OperationalError
from pymongo.errors import AutoReconnect, PyMongoError

import worker
import workerkit.mongodb
from testbed.servers import MongoServer
from tests.lab import bare_settings
from worker import Job, JobStore, NotClaimed, Reason, Sweeper
from workerkit.bookkeeping import Snapshot
from workerkit.broker import QueueList
from workerkit.errors import Document, NotesUnavailable, StoreRefused, StoreUnavailable
from workerkit.logs import logger
from workerkit.lost_messages import LostMessages
from workerkit.messages import COPY, Delivery
from workerkit.mongodb import Clock, ServerClock
from workerkit.notes import EXPIRED, REVOKED, RevokedTask, result_name
from workerkit.sentences import DAMAGED, GAVE_UP, NOT_SET_UP, STOPPED
from workerkit.settings import Limits
from workerkit.turns import EveryTurn, Turns

QUEUE = "ai_jobs"
LEASE_S, ORPHAN_S, DEADLINE_S, MAX_ATTEMPTS, RETRY_S = 10.0, 60.0, 300.0, 2, 1.0
RESCUE_FIRST_S, RESCUE_MAX_S, MARKER_OVERDUE_S = 30.0, 600.0, 400.0
SETTINGS = bare_settings(
    lease_seconds=LEASE_S,
    orphan_after=ORPHAN_S,
    job_deadline=DEADLINE_S,
    retry_delays=(RETRY_S,) * (MAX_ATTEMPTS - 1),
    celery_soft_time_limit=20,
    celery_time_limit=30,
)
MAX_JOBS, HOSTS = 5, 3
ROUND_S, ROUNDS = 30.0, 40  # of the calm at the end: the longest rescue, the longest retry and a lease fit in easily

# ── the model ────────────────────────────────────────────────────────────────────────────────────────────────────


def normal(value: Any) -> Any:
    """A value of a document with aware times."""
    if isinstance(value, dict):
        return {name: normal(each) for name, each in value.items()}
    if isinstance(value, list):
        return [normal(each) for each in value]
    return aware(value) if isinstance(value, datetime) else value


LONGEST_WAIT_S = DEADLINE_S + RESCUE_MAX_S
# How far in the future a time may lie. One that is later counts as missing.
AHEAD_S = {"lease_until": 3600.0, "deadline": 172_800.0, "available_at": LONGEST_WAIT_S, "rescue_at": LONGEST_WAIT_S}
KINDS: dict[str, Any] = {
    **dict.fromkeys(("owner", "node", "queue", "task_id"), str),
    **dict.fromkeys(("pid", "rescues", "attempt"), int),
    **dict.fromkeys((*AHEAD_S, "first_started_at"), datetime),
    **dict.fromkeys(("limits", "past"), list),
}

FOR_READERS = ("message", "attempts")


def own_of(value: Any) -> Any:
    """What `worker` holds, without what nothing is decided by."""
    own = normal(value)
    return {name: each for name, each in own.items() if name not in FOR_READERS} if isinstance(own, dict) else own


@dataclass(frozen=True)
class Facts:
    """What the worker writes in a job's document; None where it isn't there. `own` is what `worker` holds.

    What it holds for readers is in tests/test_attempts.py.
    """

    status: str
    created_at: datetime
    started_at: datetime | None = None
    updated_at: datetime | None = None
    completed_at: datetime | None = None
    output_data: Document | None = None
    artifact_url: str | None = None
    error_message: str | None = None
    own: Any = None

    @classmethod
    def of(cls, document: Document) -> Facts:
        names = [each.name for each in fields(cls) if each.name != "own"]
        return cls(**{name: normal(document.get(name)) for name in names}, own=own_of(document.get("worker")))

    def read(self, name: str, now: datetime) -> Any:
        """A field of the bookkeeping, or None where it makes no sense."""
        value = self.own.get(name) if isinstance(self.own, dict) else None
        if not isinstance(value, KINDS[name]) or isinstance(value, bool):
            return None
        if isinstance(value, int) and not 0 <= value < 2**31:
            return None
        if name == "limits" and not (len(value) == 2 and all(isinstance(each, (int, float)) for each in value)):
            return None
        if name == "past":
            return [life for life in value if isinstance(life, dict)]
        if isinstance(value, datetime) and value > now + timedelta(seconds=AHEAD_S.get(name, 60.0)):
            return None
        return value

    def number(self, name: str, now: datetime) -> int:
        return self.read(name, now) or 0

    def kept(self, now: datetime) -> Document:
        """What a new attempt has from those before."""
        names = ("queue", "task_id", "rescues", "attempt", "first_started_at", "limits", "past")
        return {name: value for name in names if (value := self.read(name, now)) not in (None, [])}

    @property
    def owner(self) -> Any:
        return self.own.get("owner") if isinstance(self.own, dict) else None

    @property
    def unnotified(self) -> datetime | None:
        found = self.own.get("unnotified") if isinstance(self.own, dict) else None
        return found if isinstance(found, datetime) else None

    @property
    def is_active(self) -> bool:
        return self.status in ("pending", "processing")

    @property
    def has_past(self) -> bool:
        return isinstance(self.own, dict) and bool({"attempt", "owner", "unnotified"} & set(self.own))

    def is_older_workers(self, now: datetime) -> bool:
        has_owner = isinstance(self.own, dict) and "owner" in self.own
        return not has_owner or self.started_at != self.read("first_started_at", now)

    def is_released(self, now: datetime) -> bool:
        is_free = self.status == "processing" and isinstance(self.own, dict) and self.owner is None
        return is_free and not self.is_older_workers(now)

    def is_past_bounds(self, hard_s: float, now: datetime) -> bool:
        first_started_at = self.read("first_started_at", now)
        is_too_old = first_started_at and first_started_at <= now - timedelta(seconds=max(DEADLINE_S, hard_s))
        is_used_up = self.number("attempt", now) >= MAX_ATTEMPTS
        return bool(is_too_old or is_used_up) and not self.is_older_workers(now)

    def is_exhausted(self, now: datetime) -> bool:
        return self.is_past_bounds(SETTINGS.limits(self.read("limits", now)).hard_s, now)

    def is_stale(self, now: datetime) -> bool:
        lease_until, rescue_at = (self.read(name, now) for name in ("lease_until", "rescue_at"))
        is_alive = self.read("owner", now) and lease_until and lease_until > now
        is_free = isinstance(self.own, dict) and "owner" in self.own and self.owner is None
        if self.status != "processing" or is_alive or (is_free and rescue_at and rescue_at > now):
            return False
        if not self.is_older_workers(now):
            return True
        return (self.started_at or self.updated_at or self.created_at) < now - timedelta(seconds=ORPHAN_S)

    def ended(self, status: str, now: datetime, own: Document, **more: Any) -> Facts:
        own = {**own, "unnotified": now}
        return replace(self, status=status, updated_at=now, completed_at=now, own=own, **more)

    def failed_as_seen(self, now: datetime, sentence: str) -> Facts:
        """What a failure by somebody other than its attempt makes of it."""
        own = {**self.kept(now), "owner": self.read("owner", now), "attempt": self.number("attempt", now)}
        if self.status == "pending" and self.has_past:  # a life without an attempt
            own |= {"attempt": 0, "past": Model.lives(self, now)}
        return self.ended("failed", now, own, error_message=sentence)


@dataclass(frozen=True)
class Refusal:
    """What a validator refuses of a job: any write that leaves its document like this."""

    condition: Document
    applies: Callable[[Facts], bool]


def has(name: str) -> Callable[[Facts], bool]:
    return lambda facts: isinstance(facts.own, dict) and name in facts.own


NO_FAILURE = Refusal({"status": "failed"}, lambda facts: facts.status == "failed")
REFUSALS = [
    Refusal({"status": "processing"}, lambda facts: facts.status == "processing"),
    Refusal({"status": "completed"}, lambda facts: facts.status == "completed"),
    Refusal({"worker.lease_until": {"$exists": True}}, has("lease_until")),
    Refusal({"worker.rescue_at": {"$exists": True}}, has("rescue_at")),
    Refusal({"worker.unnotified": {"$exists": True}}, has("unnotified")),
    NO_FAILURE,
]


@dataclass
class Call:
    """A verb under way: who called it with what, and the time that its host's clock showed at the first request."""

    verb: str
    host: Host
    pid: int
    arguments: Document
    is_calm: bool
    kept: frozenset[str]  # names of the results that are kept in Redis
    now: datetime
    is_first: bool = True
    is_interrupted: bool = False  # by others, between two of its requests
    times: list[datetime] = field(default_factory=list)  # at which the verb has looked at the clock

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def targets(self) -> dict[ObjectId, Any]:
        """The jobs that it names, by whatever argument."""
        values = [each for value in self.arguments.values() for each in (value if isinstance(value, list) else [value])]
        return {job_id: value for value in values if (job_id := id_of(value))}


def id_of(value: Any) -> ObjectId | None:
    match value:
        case ObjectId():
            return value
        case Job() | Snapshot():
            return value.id
        case RevokedTask():
            return ObjectId(value.job_id)
        case (ObjectId() as job_id, _):
            return job_id
    return None


class Model:
    """What each verb may do to a job: its new facts, or None where it has to leave it alone.

    Times of the fence are those that the caller's clock shows; whether a lease is over, the database's time decides.
    """

    @staticmethod
    def claim(call: Call, facts: Facts, _: Any) -> Facts | None:
        now, delivery = call.now, call["delivery"]
        limits = delivery.limits
        lease: Document = {"owner": call["owner"], "node": call.host.node, "pid": call.pid, "queue": QUEUE}
        lease |= {"lease_until": now + timedelta(seconds=LEASE_S), "limits": [limits.hard_s, limits.soft_s]}
        lease |= {"deadline": now + timedelta(seconds=limits.hard_s - call["waited_s"]), "task_id": delivery.task_id}
        if facts.status == "pending":
            own = {**lease, "attempt": 1, "first_started_at": now, **({"rescues": 0} if delivery.is_copy else {})}
            own |= {"past": Model.lives(facts, now)} if facts.has_past else {}
            is_put_back = facts.has_past and facts.updated_at and facts.updated_at <= now
            own |= {"available_at": facts.updated_at} if is_put_back else {}
            fresh = Facts("processing", facts.created_at, now, now, own=own)
            return replace(fresh, output_data=facts.output_data, artifact_url=facts.artifact_url)
        available_at = facts.read("available_at", now)
        is_due = facts.is_released(now) and (available_at is None or available_at <= now)
        if not is_due or (call["bounded"] and facts.is_past_bounds(limits.hard_s, now)):
            return None
        own = {**facts.kept(now), **lease, "attempt": facts.number("attempt", now) + 1}
        own |= {"available_at": available_at} if available_at else {}
        return replace(facts, updated_at=now, own=own)

    @staticmethod
    def lives(facts: Facts, now: datetime) -> list[Document]:
        return [*(facts.read("past", now) or []), Model.life(facts, now)][-5:]

    @staticmethod
    def life(facts: Facts, now: datetime) -> Document:
        """What stays of the life that ended before the job was put back."""
        used = {"model": None, "tokens": None, "attempts": facts.number("attempt", now)}
        return {"ended_at": facts.completed_at, "reason": facts.error_message, **used}

    @staticmethod
    def is_owned(facts: Facts, job: Job) -> bool:
        return facts.status == "processing" and facts.owner == job.owner

    @staticmethod
    def renew_leases(call: Call, facts: Facts, job: Job) -> Facts | None:
        if not Model.is_owned(facts, job):
            return None
        until, before = call.now + timedelta(seconds=LEASE_S), facts.own.get("lease_until")
        until = max(before, until) if isinstance(before, datetime) else until
        return replace(facts, own={**facts.own, "lease_until": until})

    @staticmethod
    def complete(call: Call, facts: Facts, job: Job) -> Facts | None:
        if not Model.is_owned(facts, job):
            return None
        result = {"output_data": call["output"], "artifact_url": call["artifact_url"], "error_message": None}
        return facts.ended("completed", call.now, {**facts.own, "lease_until": call.now}, **result)

    @staticmethod
    def fail(call: Call, facts: Facts, job: Job) -> Facts | None:
        if not Model.is_owned(facts, job):
            return None
        own = {**facts.own, "lease_until": call.now}
        return facts.ended("failed", call.now, own, error_message=call["sentence"])

    @staticmethod
    def release(call: Call, facts: Facts, job: Job) -> Facts | None:
        if not Model.is_owned(facts, job):
            return None
        if not call["counted"] and not isinstance(facts.own.get("attempt", 0), int):
            return None  # MongoDB refuses to count down what is no number
        waits = {"owner": None, **Model.waiting(call["available_at"], RESCUE_FIRST_S), "released_by": job.owner}
        own = {**facts.own, **waits}
        own |= {} if call["counted"] else {"attempt": own.get("attempt", 0) - 1}
        return replace(facts, updated_at=call.now, own=own)

    @staticmethod
    def waiting(available_at: datetime, rescue_s: float) -> Document:
        return {"available_at": available_at, "rescue_at": available_at + timedelta(seconds=rescue_s)}

    @staticmethod
    def is_unchanged(facts: Facts, seen: Snapshot) -> bool:
        """Whether the job is still what was read. MongoDB, unlike Python, tells True from 1."""
        return facts.status == seen.status and repr(facts.own) == repr(own_of(plain(seen.bookkeeping.raw)))

    @staticmethod
    def is_dead(call: Call, facts: Facts) -> bool:
        """Whether it is held by a process of the same node that has died."""
        held = facts.read("owner", call.now) and facts.read("node", call.now) == call.host.node
        return bool(held) and facts.read("pid", call.now) in call.host.world.dead

    @staticmethod
    def release_stale(call: Call, facts: Facts, seen: Snapshot) -> Facts | None:
        now = call.now
        may_go_on = not facts.is_exhausted(now) or Model.is_kept(call, facts, seen.id)
        is_free = Model.is_dead(call, facts) or (facts.is_stale(call.host.world.now) and may_go_on)
        if not is_free or facts.status != "processing" or not Model.is_unchanged(facts, seen):
            return None
        rescues, is_older = facts.number("rescues", now), facts.is_older_workers(now)
        waits = Model.waiting(now, min(RESCUE_FIRST_S * 2 ** min(rescues, 10), RESCUE_MAX_S))
        own = {**facts.kept(now), "owner": None, **waits, "rescues": rescues + 1}
        own |= {"attempt": 0, "first_started_at": now} if is_older else {"attempt": facts.number("attempt", now)}
        return replace(facts, updated_at=now, own=own, started_at=now if is_older else facts.started_at)

    release_together = release_stale  # of each of several jobs

    @staticmethod
    def is_kept(call: Call, facts: Facts, job_id: ObjectId) -> bool:
        """Whether Redis has a result of this very life."""
        started_at = facts.read("first_started_at", call.now)
        return started_at is not None and result_name(job_id, started_at) in call.kept

    @staticmethod
    def fail_seen(call: Call, facts: Facts, seen: Snapshot) -> Facts | None:
        now = call.now
        deadline = facts.read("deadline", now) or now
        is_killed = Model.is_dead(call, facts) and now >= deadline - timedelta(seconds=1)
        is_free = facts.is_stale(call.host.world.now) or facts.is_released(now)
        is_over = facts.is_exhausted(now) or facts.is_past_bounds(SETTINGS.celery_time_limit, now)
        is_given_up = is_free and is_over and not Model.is_kept(call, facts, seen.id)
        is_lost = is_free or Model.is_dead(call, facts)
        is_stuck = is_lost and call["sentence"] == NOT_SET_UP and seen.id in call.host.world.ever_refused
        if (
            not (is_killed or is_given_up or is_stuck)
            or facts.status != "processing"
            or not Model.is_unchanged(facts, seen)
        ):
            return None
        return facts.failed_as_seen(now, call["sentence"])

    @staticmethod
    def undo_rescue(call: Call, facts: Facts, _: Any) -> Facts | None:
        if facts.status != "processing" or facts.own != own_of(call["released"]):
            return None
        rescue_at = call.now + timedelta(seconds=SETTINGS.sweep_interval)
        return replace(facts, own={**facts.own, "rescues": facts.own["rescues"] - 1, "rescue_at": rescue_at})

    @staticmethod
    def fail_revoked(call: Call, facts: Facts, task: RevokedTask) -> Facts | None:
        is_untried = facts.status == "pending" and not facts.has_past
        is_its_own = facts.status == "processing" and facts.read("task_id", call.now) == task.task_id
        if not (is_untried or (is_its_own and task.why == REVOKED)):
            return None
        return facts.failed_as_seen(call.now, call["sentence"])

    @staticmethod
    def fail_unowned(call: Call, facts: Facts, _: Any) -> Facts | None:
        if not (facts.status == "pending" or facts.is_released(call.now)):
            return None
        return facts.failed_as_seen(call.now, call["sentence"])

    @staticmethod
    def mark_notified(call: Call, facts: Facts, told: tuple[ObjectId, str | None]) -> Facts | None:
        if not isinstance(facts.own, dict) or facts.owner != normal(told[1]):
            return None
        return replace(facts, own={name: value for name, value in facts.own.items() if name != "unnotified"})

    @staticmethod
    def possible(call: Call, job_id: ObjectId, facts: Facts) -> list[Facts]:
        """What the call may make of the job, the best first. A failure is written with less where more is refused."""
        verb, target = getattr(Model, call.verb, None), call.targets.get(job_id)
        best = verb(call, facts, target) if verb and target else None
        if best is None:
            return []
        if call.verb not in ("fail", "fail_seen", "fail_revoked", "fail_unowned"):
            return [best]
        attempt = target.attempt if isinstance(target, Job) else best.own["attempt"]
        at_times = [replace(best, updated_at=now, completed_at=now) for now in dict.fromkeys([call.now, *call.times])]
        less = {"owner": best.own["owner"], "attempt": attempt}
        with_notice = [replace(each, own={**less, "unnotified": each.completed_at}) for each in at_times]
        return [best, *with_notice, *(replace(each, own=None) for each in at_times)]

    @staticmethod
    def after(call: Call, job_id: ObjectId, facts: Facts) -> Facts:
        """What the job is like after this call has done all that it may, and that MongoDB takes."""
        world = call.host.world
        taken = (each for each in Model.possible(call, job_id, facts) if not world.refuses(job_id, each))
        return next(taken, facts)

    @staticmethod
    def reason(facts: Facts | None, limits: Limits, now: datetime, bounded: bool) -> Reason:
        """Why a claim that has just read these facts got nothing."""
        if facts is None:
            return Reason.UNKNOWN
        if not facts.is_active:
            return Reason.TERMINAL
        if facts.status == "pending":
            return Reason.WAITING
        if not facts.is_released(now):
            return Reason.HELD
        return Reason.EXHAUSTED if bounded and facts.is_past_bounds(limits.hard_s, now) else Reason.WAITING


# ── the world ────────────────────────────────────────────────────────────────────────────────────────────────────


def aware(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC)


def plain(value: Any) -> Any:
    """A value that was read raw, as it is read otherwise."""
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


def ids(documents: list[Document]) -> set[ObjectId]:
    return {document["_id"] for document in documents}


class Fate(Enum):
    """What becomes of a request. A late one is done after its caller has given it up, perhaps long after."""

    FINE = 0
    REQUEST_LOST = 1
    REPLY_LOST = 2
    LATE = 3


class Meanwhile(Enum):
    """What others do between two requests of a verb."""

    NOTHING = 0
    CANCEL = 1
    REVOKE = 2
    SWEEP = 3
    CLAIM = 4
    LEASES_RUN_OUT = 5
    LATE_REQUESTS_ARRIVE = 6
    REDIS_GOES_OR_COMES = 7


@dataclass(frozen=True)
class Weather:
    """How long it was quiet, what becomes of the next requests, in order, and what comes right before one of them."""

    quiet_s: float = 0.0
    fates: tuple[Fate, ...] = ()
    meanwhile: Meanwhile = Meanwhile.NOTHING
    before: int = 0

    @property
    def is_calm(self) -> bool:
        return not any(fate is not Fate.FINE for fate in self.fates) and self.meanwhile is Meanwhile.NOTHING


CALM = Weather()


NO_REQUESTS = ("now", "oldest_start", "is_past_bounds", "is_stale")
METHODS = [name for name, value in vars(JobStore).items() if inspect.isfunction(value) and not name.startswith("_")]
VERBS = [name for name in METHODS if name not in NO_REQUESTS]
SIGNATURES = {verb: inspect.signature(getattr(JobStore, verb)) for verb in VERBS}


class WatchedStore(JobStore):
    """The real store; the world knows which verb is under way, and holds it against the model when it has answered."""

    def __init__(self, host: Host, clock: ServerClock) -> None:
        self.host = host
        super().__init__(Network(host), host.node, clock, SETTINGS)  # type: ignore[arg-type]

    def now(self) -> datetime:
        with self.host.acting():
            now = super().now()
        for call in self.host.world.calls[-1:]:
            call.times.append(now)
        return now

    def _watched(self, verb: str, *args: Any, **options: Any) -> Any:
        calls = self.host.world.calls
        is_last_step = calls and calls[-1].verb in ("fail_unowned", "fail_revoked") and not calls[-1].is_interrupted
        if verb == "fail_seen" and is_last_step:
            return super().fail_seen(*args)
        arguments = SIGNATURES[verb].bind(self, *args, **options)
        arguments.apply_defaults()
        with self.host.world.calling(verb, self.host, dict(arguments.arguments)):
            return getattr(JobStore, verb)(self, *args, **options)


for _verb in SIGNATURES:
    setattr(WatchedStore, _verb, partialmethod(WatchedStore._watched, _verb))


class Host:
    """A machine with one worker process. A new process has a new pid, and a clock that isn't set yet."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.node, self.is_rival = world, f"node-{number}", number == HOSTS - 1
        self.behind_s = 0.0
        self.start_process(wall_offset_s=0)

    def start_process(self, wall_offset_s: float) -> None:
        self.world.last_pid += 1
        self.pid = self.world.last_pid
        with self.acting():
            self.clock = ServerClock(cast(Any, Network(self)))
            self.clock.synchronise(self.world.now + timedelta(seconds=wall_offset_s))
            self.clock.is_synchronised = False
        self.store = WatchedStore(self, self.clock)
        redis, network = cast(Any, Redis(self.world)), cast(Any, Network(self))
        # The last host's sweeper takes no notice of turns, as `recover` does.
        turns = (EveryTurn if self.is_rival else Turns)(network, self.store.now)
        lost_messages = LostMessages(network, turns, redis)
        lost_messages.marker_overdue_s = MARKER_OVERDUE_S
        self.lost_messages = lost_messages
        self.sweeper = Sweeper(self.store, turns, lost_messages, redis, redis, redis, LEASE_S)

    @property
    def monotonic_s(self) -> float:
        return (self.world.now - BEGINNING).total_seconds() - self.behind_s

    def now(self) -> datetime:
        with self.acting():
            return self.clock.now()

    def shown_time(self) -> datetime:
        """What its clock shows, or will show once it has asked the database."""
        with self.acting():
            return Clock.now(self.clock) if self.clock.is_synchronised else self.world.now

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        before, self.world.acting = self.world.acting, self
        try:
            yield
        finally:
            self.world.acting = before


class Network:
    """The database as one process reaches it."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def command(self, _: str) -> Document:
        """The time in the middle of a round trip, however long that takes."""
        world = self._host.world
        asked_at = world.now

        def middle() -> Document:
            return {"localTime": (asked_at + (world.now - asked_at) / 2).replace(tzinfo=None)}

        answer: Document = world.travel(middle)
        return answer

    def __getitem__(self, name: str) -> Wire:
        if name == "jobs":
            return Wire(self._host, self._host.world.jobs)
        return SideWire(self._host, self._host.world.jobs.database[name])


class Wire:
    """A collection at the other end of the network; each request is one of the verb under way."""

    def __init__(self, host: Host, collection: Any) -> None:
        self._host, self._collection = host, collection

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._request, name)

    def with_options(self, codec_options: Any) -> Wire:
        return Wire(self._host, self._collection.with_options(codec_options))

    def _request(self, name: str, *args: Any, **options: Any) -> Any:
        world = self._host.world
        call = world.calls[-1]
        if call.is_first:  # the verb has looked at its clock by now
            call.now, call.is_first = self._host.now(), False
        operation = partial(getattr(self._collection, name), *args, **options)
        return world.travel(operation if name in ("find", "find_one") else lambda: world.watch(call, operation))


class SideWire(Wire):
    """A collection that no verb of the store concerns."""

    def _request(self, name: str, *args: Any, **options: Any) -> Any:
        with self._host.acting():
            return self._host.world.travel(partial(getattr(self._collection, name), *args, **options))


class Redis:
    """Notifier, shared notes and broker: published notices, kept results, revoked jobs, the queue."""

    errors = (OperationalError,)

    def __init__(self, world: World) -> None:
        self._world = world

    def _reach(self, error: type[Exception] = NotesUnavailable) -> None:
        if not self._world.is_redis_up:
            raise error("Redis is away")

    def publish_status(self, document: Document, status: str, _: str) -> bool:
        assert self._world.facts[document["_id"]].status == status, "a notice says what the document doesn't"
        if self._world.is_redis_up:
            self._world.published[document["_id"]] = status
        return self._world.is_redis_up

    def kept_result(self, name: str, _queue: str | None = None) -> Any:
        self._reach()
        return self._world.kept.get(name)

    def revoked(self, _queue: str | None = None) -> list[RevokedTask]:
        self._reach()
        return list(self._world.revoked)

    def forget_revoked(self, task: RevokedTask, _queue: str | None = None) -> None:
        self._reach()
        self._world.revoked.discard(task)

    @contextlib.contextmanager
    def connection(self) -> Iterator[None]:
        self._reach(OperationalError)
        yield

    def lists_in_use(self, queue: str) -> list[QueueList]:
        self._reach(OperationalError)
        return [QueueList(queue)] if self._world.queue else []

    def send(self, job_id: ObjectId, *_: Any, data: Document | None = None, **_options: Any) -> None:
        self._reach(OperationalError)
        is_copy = data == COPY
        is_overdue = self._world.now > self._world.marker_sent_at + timedelta(seconds=MARKER_OVERDUE_S)
        assert is_overdue or not (is_copy and job_id in self._world.queue), "a copy of a message that isn't lost"
        if data and not is_copy:
            self._world.markers.add(job_id)
            self._world.marker_sent_at = self._world.now
        self._world.queue.append(job_id)
        self._world.copies |= {job_id} if is_copy else set()


BEGINNING = datetime(2030, 1, 1, tzinfo=UTC)
OURS = {"status", "started_at", "updated_at", "completed_at", "output_data", "artifact_url", "error_message", "worker"}


class World:
    """The database's time, what is in it, everybody who reaches it, and what the model knows."""

    def __init__(self, stage: SimpleNamespace, jobs: Any) -> None:
        stage.world = self
        self.jobs = jobs
        for collection in (self.jobs, self.jobs.database["worker_turns"]):
            collection.delete_many({})
        self.jobs.database["worker_turns"].insert_one({"_id": f"queue:{QUEUE}", "seen_at": datetime(8000, 1, 1)})
        self.now = BEGINNING
        self.facts: dict[ObjectId, Facts] = {}
        self.refusals: dict[ObjectId, Refusal] = {}
        self.ever_refused: set[ObjectId] = set()
        self.inserted: dict[ObjectId, Document] = {}
        # What each end of an attempt made of its job, by owner and verb.
        self.settled: dict[tuple[str, str], Facts] = {}
        self.ended_by_us: set[ObjectId] = set()
        self.refused: set[str] = set()  # owners that got the answer that the job is no longer theirs
        self.calls: list[Call] = []
        self.late: list[Callable[[], Any]] = []
        self.violation: AssertionError | None = None
        self.weather, self.requests = CALM, 0
        self.fates: list[Fate] = []
        self.interrupt: Callable[[Meanwhile], None] = lambda _: None
        self.queue: list[ObjectId] = []
        self.markers: set[ObjectId] = set()  # messages of a search for lost ones
        self.marker_sent_at = self.now
        self.copies: set[ObjectId] = set()  # jobs whose next message is a sweeper's copy
        self.tasks: dict[ObjectId, list[str]] = {}  # the ids of the API's tasks for a job, the latest last
        self.revoked: set[RevokedTask] = set()
        self.kept: dict[str, Any] = {}
        self.ever_kept: set[ObjectId] = set()
        self.published: dict[ObjectId, str] = {}
        self.is_redis_up = True
        self.dead: set[int] = set()
        self.last_pid = 0
        self.acting: Host | None = None  # whose request or clock it is at the moment
        self.hosts = [Host(self, number) for number in range(HOSTS)]

    @property
    def actor(self) -> Host:
        assert self.acting
        return self.acting

    @contextlib.contextmanager
    def under(self, weather: Weather) -> Iterator[None]:
        self.now += timedelta(seconds=weather.quiet_s)
        before = self.weather, self.fates, self.requests
        self.weather, self.fates, self.requests = weather, list(weather.fates), 0
        try:
            yield
        finally:
            self.weather, self.fates, self.requests = before

    @contextlib.contextmanager
    def calling(self, verb: str, host: Host, arguments: Document) -> Iterator[None]:
        """A verb from its call to its answer. In calm weather it has to do all that it may, and to answer."""
        call = Call(verb, host, host.pid, arguments, self.weather.is_calm, frozenset(self.kept), host.shown_time())
        before = dict(self.facts)
        self.calls.append(call)
        try:
            with host.acting():
                yield
        except StoreUnavailable as error:
            if call.is_calm and not isinstance(error, StoreRefused):
                raise AssertionError(f"{verb} did not answer") from error
            raise
        finally:
            self.calls.pop()
        if call.is_calm:
            expected = {job_id: Model.after(call, job_id, facts) for job_id, facts in before.items()}
            assert self.facts == expected, f"{verb} left something undone"

    def travel(self, operation: Callable[[], Any]) -> Any:
        """A request and its reply, as the weather has it."""
        if self.requests == self.weather.before and self.weather.meanwhile is not Meanwhile.NOTHING:
            self.be_interrupted()
        self.requests += 1
        fate = self.fates.pop(0) if self.fates else Fate.FINE
        if fate is Fate.LATE:
            self.late.append(operation)
        if fate in (Fate.LATE, Fate.REQUEST_LOST):
            raise AutoReconnect("the request is lost")
        answer = operation()
        if fate is Fate.REPLY_LOST:
            raise AutoReconnect("the reply is lost")
        return answer

    def be_interrupted(self) -> None:
        calls = self.calls[-1:]
        for call in calls:
            call.is_interrupted = True
        self.interrupt(self.weather.meanwhile)
        for call in calls:
            call.is_interrupted = False

    def watch(self, call: Call, operation: Callable[[], Any]) -> Any:
        """Does one operation of a verb, and holds what it wrote against the model."""
        try:
            return operation()
        finally:
            self.check(call)

    def check(self, call: Call) -> None:
        for job_id, facts in self.read().items():
            before = self.facts[job_id]
            if facts == before:
                continue
            # A late request may come when the validator is another one.
            possible = [Model.after(call, job_id, before)]
            possible += Model.possible(call, job_id, before) if job_id in self.ever_refused else []
            if facts not in possible:  # a sweep goes on after any error, so the steps look for this one
                self.violation = AssertionError(f"{call.verb} made {facts} of {before}, and may make {possible}")
            assert not facts.is_active or before.is_active, "an ended job ran again"
            if not facts.is_active:
                self.ended_by_us.add(job_id)
            self.facts[job_id] = facts
            if call.verb != "renew_leases" and isinstance(job := call.targets[job_id], Job):
                assert job.owner not in self.refused, "it had got the answer that the job is no longer its own"
                self.settled[job.owner, call.verb] = facts

    def do_late_requests(self) -> None:
        late, self.late = self.late, []
        for operation in late:
            with contextlib.suppress(PyMongoError):  # its caller has given it up
                operation()

    def read(self) -> dict[ObjectId, Facts]:
        return {document["_id"]: Facts.of(document) for document in self.jobs.find()}

    def write(self, job_id: ObjectId, **fields: Any) -> None:
        """A write of others, which no verb of ours makes: what it does are new facts."""
        self.jobs.update_one({"_id": job_id}, {"$set": fields}, bypass_document_validation=bool(self.ever_refused))
        self.facts.update(self.read())

    def refuses(self, job_id: ObjectId, facts: Facts) -> bool:
        return job_id in self.refusals and self.refusals[job_id].applies(facts)

    def set_validator(self, refusals: Mapping[ObjectId, Refusal]) -> None:
        self.refusals = dict(refusals)
        self.ever_refused |= set(refusals)
        refused = [{"_id": job_id, **refusal.condition} for job_id, refusal in refusals.items()]
        self.jobs.database.command("collMod", self.jobs.name, validator={"$nor": refused} if refused else {})


# ── what happens in it ───────────────────────────────────────────────────────────────────────────────────────────


class Meddling(Enum):
    CANCEL = 0
    ITS_TASK_IS_REVOKED = 1
    DAMAGED_MESSAGE = 2
    OLDER_WORKER_TAKES_IT = 3
    OLDER_WORKER_COMPLETES_IT = 4
    IT_IS_PUT_BACK = 5
    ITS_TASK_EXPIRES = 6
    ITS_FORMER_TASK_IS_REVOKED = 7


class Trouble(Enum):
    MONGODB_STAYS_AWAY = 0
    HOST_IS_SUSPENDED = 1
    REDIS_GOES_OR_COMES = 2
    REDIS_IS_EMPTIED = 3
    PROCESS_IS_KILLED = 4
    LATE_REQUESTS_ARRIVE = 5


@dataclass
class Try:
    """What a process holds in its memory of a job: a claim not yet answered, or a running attempt."""

    host: Host
    job_id: ObjectId
    owner: str
    delivery: Delivery
    bounded: bool = True
    job: Job | None = None
    outcome: str = ""  # once it is decided, nothing else is written
    available_at: datetime | None = None


TIMES_S = [0.001, 1, 5, 5, LEASE_S - 0.001, LEASE_S, LEASE_S, LEASE_S + 1, 31, 61, DEADLINE_S, 700]
QUIET_S = st.one_of(st.just(0.0), st.sampled_from(TIMES_S))
WEATHER = st.one_of(
    st.builds(Weather, QUIET_S),
    st.builds(
        Weather,
        QUIET_S,
        fates=st.lists(st.sampled_from([*Fate, Fate.REPLY_LOST]), max_size=3).map(tuple),
        meanwhile=st.sampled_from(Meanwhile),
        before=st.integers(0, 3),
    ),
)
MAX_PICK = 7
PICK = st.integers(0, MAX_PICK)  # one of a list, whatever its length
HOST = st.integers(0, HOSTS - 1)
LIMITS = st.sampled_from([Limits(20, 30), Limits(390, 400)])
OUTCOME = st.sampled_from(["retry", "hand back", "complete", "fail"])
PAST = st.lists(st.sampled_from(["running", "retry", "hand back", "kept"]), max_size=2)
ABSENT = "absent"
SHAPES_OF_OURS: list[Any] = [ABSENT, {}]
# mongomock takes `{"worker.x": None}` on these for a miss, and sets fields below them where MongoDB refuses to.
SPOILT_SHAPES: list[Any] = [None, "another program's", ["another", "program's"], 7, {"owner": ["x"], "attempt": "2"}]
ODD_VALUES: list[Any] = [None, "text", 2**40, ["x"], {"x": 1}, datetime(3000, 1, 1, tzinfo=UTC), True, -1]


class StatusMachine(RuleBasedStateMachine):
    """Three hosts and some jobs. Every rule is a step that one of them, the API or an operator makes."""

    def __init__(self, stage: SimpleNamespace, jobs: Any, shapes: list[Any]) -> None:
        super().__init__()
        self.world = World(stage, jobs)
        self.world.interrupt = self.interrupt
        self.shapes, self.is_spoilt = shapes, shapes is not SHAPES_OF_OURS
        if self.is_spoilt:
            self.world.set_validator({})
        self.tries: list[Try] = []
        self.stale: list[Snapshot] = []
        self.last_owner = 0

    # the API and the operator

    @initialize(jobs=st.lists(st.tuples(PICK, PAST), min_size=1, max_size=2))
    def begin(self, jobs: list[tuple[int, list[str]]]) -> None:
        for shape, past in jobs:
            self.submit(shape, past, is_message_lost=False)

    @precondition(lambda self: len(self.world.facts) < MAX_JOBS)
    @rule(shape=PICK, past=PAST, is_message_lost=st.booleans())
    def submit(self, shape: int, past: list[str], is_message_lost: bool) -> None:
        """One more job, which may have had attempts before the story begins."""
        job_id, now = ObjectId(f"{len(self.world.facts):024x}"), self.world.now
        document: Document = {"_id": job_id, "status": "pending", "created_at": now, "updated_at": now}
        document |= {"user_id": "user-1", "job_type": "text_generation", "input_data": {"prompt": "Hello"}}
        if (own := self.shapes[shape % len(self.shapes)]) != ABSENT:
            document["worker"] = own
        self.world.jobs.insert_one(document)
        self.world.inserted[job_id] = document
        self.world.facts.update(self.world.read())
        self.enqueue(job_id, is_message_lost=is_message_lost)
        for outcome in past:
            self.world.now += timedelta(seconds=RETRY_S)
            attempt = self.deliver(self.world.hosts[0], job_id, Limits(20, 30), CALM, is_patient=False)
            if attempt in self.running() and outcome in ("retry", "hand back"):
                self.end(attempt, outcome, CALM, is_patient=False)
            elif attempt in self.running() and outcome == "kept":
                attempt.outcome = "complete"
                self.leave(attempt)

    def enqueue(self, job_id: ObjectId, *, is_message_lost: bool = False) -> None:
        """As the API does, each time under a task id of its own."""
        tasks = self.world.tasks.setdefault(job_id, [])
        tasks.append(f"task-{job_id}-{len(tasks)}")
        if not is_message_lost:
            self.world.queue.append(job_id)

    @rule(job=PICK, host=HOST, what=st.sampled_from(Meddling), weather=WEATHER)
    def others_meddle(self, job: int, host: int, what: Meddling, weather: Weather) -> None:
        world, job_id = self.world, self.pick_job(job)
        facts = world.facts[job_id]
        match what:
            case Meddling.CANCEL if facts.is_active:
                world.write(job_id, status="failed", error_message="Cancelled.")
            case Meddling.ITS_TASK_IS_REVOKED | Meddling.ITS_TASK_EXPIRES | Meddling.ITS_FORMER_TASK_IS_REVOKED:
                why = EXPIRED if what is Meddling.ITS_TASK_EXPIRES else REVOKED
                tasks = world.tasks[job_id]
                former = tasks[0] if what is Meddling.ITS_FORMER_TASK_IS_REVOKED else tasks[-1]
                world.revoked.add(RevokedTask(str(job_id), former, why))
            case Meddling.IT_IS_PUT_BACK if not facts.is_active:
                world.write(job_id, status="pending")
                world.published.pop(job_id, None)
                world.ended_by_us.discard(job_id)
                self.enqueue(job_id, is_message_lost=bool(host))
            case Meddling.DAMAGED_MESSAGE:
                self.fail_unowned(world.hosts[host].store, job_id, weather)
            case Meddling.OLDER_WORKER_TAKES_IT if facts.status == "pending":
                world.write(job_id, status="processing", **{"started_at" if host else "updated_at": world.now})
            case Meddling.OLDER_WORKER_COMPLETES_IT if self.is_running_elsewhere(facts):
                world.write(job_id, status="completed", output_data={"generated_text": "old"})

    @rule(job=PICK, field=st.sampled_from(sorted(KINDS)), value=PICK)
    def bookkeeping_is_spoilt(self, job: int, field: str, value: int) -> None:
        """A field has another type, or a time that makes no sense. Only MongoDB itself treats these as MongoDB does."""
        world, job_id = self.world, self.pick_job(job)
        if self.is_spoilt and isinstance(world.facts[job_id].own, dict):
            world.write(job_id, **{f"worker.{field}": ODD_VALUES[value % len(ODD_VALUES)]})

    @rule(job=PICK, refusal=st.sampled_from([None, *REFUSALS]))
    def validator_is_changed(self, job: int, refusal: Refusal | None) -> None:
        """Only MongoDB itself has validators."""
        if self.is_spoilt:
            job_id = self.pick_job(job)
            others = {key: each for key, each in self.world.refusals.items() if key != job_id}
            self.world.set_validator({**others, job_id: refusal} if refusal else others)

    def is_running_elsewhere(self, facts: Facts) -> bool:
        return facts.status == "processing" and facts.is_older_workers(self.world.now)

    def fail_unowned(self, store: JobStore, job_id: ObjectId, weather: Weather) -> None:
        with contextlib.suppress(StoreUnavailable), self.world.under(weather):
            if store.fail_unowned(job_id, DAMAGED):
                assert self.world.facts[job_id].error_message == DAMAGED

    # time, processes, the network

    @rule(which=PICK, host=HOST, what=st.sampled_from(Trouble), seconds=st.sampled_from(TIMES_S))
    def something_breaks(self, which: int, host: int, what: Trouble, seconds: float) -> None:
        world = self.world
        match what:
            case Trouble.MONGODB_STAYS_AWAY if self.tries:
                self.leave(self.tries[which % len(self.tries)])
            case Trouble.HOST_IS_SUSPENDED:  # its monotonic clock stands still meanwhile
                world.now += timedelta(seconds=seconds)
                world.hosts[host].behind_s += seconds
            case Trouble.REDIS_GOES_OR_COMES:
                world.is_redis_up = not world.is_redis_up
            case Trouble.REDIS_IS_EMPTIED:
                world.queue.clear()
                world.copies.clear()
                world.kept.clear()
            case Trouble.PROCESS_IS_KILLED:
                self.kill_process(world.hosts[host], wall_offset_s=(0, -300, 300)[which % 3])
            case Trouble.LATE_REQUESTS_ARRIVE:
                world.do_late_requests()

    def kill_process(self, host: Host, wall_offset_s: float) -> None:
        """Another takes its place on the same node, by whose wall clock it may be minutes earlier or later."""
        self.world.dead.add(host.pid)
        self.tries = [each for each in self.tries if each.host is not host]
        host.start_process(wall_offset_s)

    # the worker's task

    @rule(host=HOST, job=PICK, limits=LIMITS, outcome=OUTCOME, weather=WEATHER, is_patient=st.booleans())
    def work(self, host: int, job: int, limits: Limits, outcome: str, weather: Weather, is_patient: bool) -> None:
        """Takes the job, by its message or by a duplicate; goes on with the claim; or ends the attempt, lost or not."""
        worker, job_id = self.world.hosts[host], self.pick_job(job)
        attempt = next((each for each in self.tries if (each.host, each.job_id) == (worker, job_id)), None)
        if attempt is None:
            self.deliver(worker, job_id, limits, weather, is_patient)
        elif attempt.job is None:
            self.claim(attempt, weather, is_patient)
        else:
            self.end(attempt, outcome, weather, is_patient)

    @rule(host=HOST, job=PICK, limits=LIMITS, outcome=OUTCOME, weather=WEATHER)
    def work_quickly(self, host: int, job: int, limits: Limits, outcome: str, weather: Weather) -> None:
        """An attempt that takes no time."""
        calm = Weather(weather.quiet_s)
        attempt = self.deliver(self.world.hosts[host], self.pick_job(job), limits, calm, is_patient=False)
        if attempt in self.running():
            self.end(attempt, outcome, replace(weather, quiet_s=0.0), is_patient=True)

    def deliver(self, host: Host, job_id: ObjectId, limits: Limits, weather: Weather, is_patient: bool) -> Try:
        """Lets the job's message come out of the queue, and the markers that are at its front then."""
        world = self.world
        if job_id in world.queue:
            world.queue.remove(job_id)
        self.last_owner += 1
        delivery = Delivery(limits, world.tasks[job_id][-1], is_copy=job_id in world.copies)
        world.copies.discard(job_id)
        attempt = Try(host, job_id, f"owner-{self.last_owner}", delivery)
        self.tries.append(attempt)
        self.claim(attempt, weather, is_patient)
        self.receive_markers(host)
        return attempt

    def receive_markers(self, host: Host) -> None:
        while self.world.queue and self.world.queue[0] in self.world.markers:
            host.lost_messages.receive(self.world.queue.pop(0), QUEUE)

    def ask(self, is_patient: bool, question: Callable[[], Any]) -> Any:
        """Once, or until there is an answer: sooner or later the weather is fine."""
        while True:
            try:
                return question()
            except StoreUnavailable as error:
                if not is_patient or isinstance(error, StoreRefused):
                    raise
                self.world.now += timedelta(seconds=1)

    def claim(self, attempt: Try, weather: Weather, is_patient: bool) -> None:
        """As the task does: the same owner until there is an answer."""
        claim = partial(attempt.host.store.claim, attempt.job_id, attempt.owner, attempt.delivery, waited_s=1)
        with contextlib.suppress(StoreUnavailable), self.world.under(weather):
            try:
                answer = self.ask(is_patient, lambda: claim(bounded=attempt.bounded))
            except StoreRefused:  # as the task does
                self.tries.remove(attempt)
                if attempt.host.store.fail_unowned(attempt.job_id, NOT_SET_UP):
                    self.publish_end(attempt)
                return
            facts = self.world.facts.get(attempt.job_id)
            if isinstance(answer, Job):
                assert facts
                assert (facts.status, facts.owner) == ("processing", attempt.owner) == ("processing", answer.owner)
                now = attempt.host.now()
                assert answer.attempt == facts.number("attempt", now)
                assert answer.first_started_at == (facts.read("first_started_at", now) or now)
                attempt.job = answer
            else:
                assert isinstance(answer, NotClaimed)
                self.answer_not_claimed(attempt, answer, facts)

    def answer_not_claimed(self, attempt: Try, answer: NotClaimed, facts: Facts | None) -> None:
        reason, job, now = answer.reason, answer.job, attempt.host.now()
        is_its_own = facts is not None and facts.status == "processing" and facts.owner == attempt.owner
        assert not is_its_own, "its own lease is not known"
        assert reason is Model.reason(facts, attempt.delivery.limits, now, attempt.bounded)
        self.tries.remove(attempt)
        if reason is Reason.WAITING:
            self.world.queue.append(attempt.job_id)
        elif reason is Reason.TERMINAL:
            self.publish_end(attempt)
        elif reason is Reason.EXHAUSTED and job and self.has_kept_result(job):
            self.tries.append(replace(attempt, bounded=False))
        elif reason is Reason.EXHAUSTED and job and attempt.host.store.fail_seen(job, GAVE_UP):
            self.publish_end(attempt)

    def has_kept_result(self, job: Snapshot) -> bool:
        started_at = job.bookkeeping.first_started_at
        return started_at is not None and result_name(job.id, started_at) in self.world.kept

    def publish_end(self, attempt: Try) -> None:
        """Publishes the status of a job that has ended, and takes it out of the outbox."""
        document = {"_id": attempt.job_id}
        redis = Redis(self.world)
        if redis.publish_status(document, self.world.facts[attempt.job_id].status, ""):
            with contextlib.suppress(StoreUnavailable):
                attempt.host.store.mark_notified([(attempt.job_id, self.world.facts[attempt.job_id].owner)])

    def end(self, attempt: Try, outcome: str, weather: Weather, is_patient: bool) -> None:
        """One fenced write, the same in each repetition."""
        if not attempt.outcome:
            attempt.outcome = outcome
            attempt.available_at = attempt.host.now() + timedelta(seconds=RETRY_S if outcome == "retry" else 0)
        with contextlib.suppress(StoreUnavailable), self.world.under(weather):
            try:
                is_written = self.ask(is_patient, lambda: self.write_outcome(attempt))
            except StoreRefused:  # as the task does
                if attempt.outcome == "fail":  # its slot is free, and its lease runs out
                    self.tries.remove(attempt)
                    return
                attempt.outcome = "fail"
                return self.end(attempt, outcome, weather, is_patient)
            self.tries.remove(attempt)
            self.check_answer(attempt, is_written)
            if is_written and attempt.outcome in ("complete", "fail"):
                self.publish_end(attempt)
            elif is_written:
                self.world.queue.append(attempt.job_id)

    def write_outcome(self, attempt: Try) -> bool:
        store, job = attempt.host.store, attempt.job
        assert job
        match attempt.outcome:
            case "complete":
                return store.complete(job, {"generated_text": attempt.owner}, f"/{attempt.owner}")
            case "fail":
                return store.fail(job, f"{attempt.owner} failed.")
        assert attempt.available_at
        return store.release(job, attempt.available_at, counted=attempt.outcome == "retry")

    def check_answer(self, attempt: Try, is_written: bool) -> None:
        facts, owner = self.world.facts[attempt.job_id], attempt.owner
        verb = {"complete": "complete", "fail": "fail"}.get(attempt.outcome, "release")
        if is_written:
            assert (owner, verb) in self.world.settled, "the answer is that it has written, but it has not"
        else:
            assert not (facts.status == "processing" and facts.owner == owner), (
                "the answer is that its job is lost, but it is not"
            )
            # Before the reply to a release is asked for again, the next attempt may have begun.
            # An end without bookkeeping, where MongoDB refuses more, can't be known again.
            is_known = attempt.job_id not in self.world.ever_refused
            assert not is_known or self.world.settled.get((owner, verb)) != facts, "its own write is not known"
            is_known &= verb != "release"
            assert not is_known or (owner, verb) not in self.world.settled, "its own write is not known"
            self.world.refused.add(owner)
        if is_written and verb == "release":
            assert (facts.status, facts.owner) == ("processing", None)
        if is_written and verb == "complete":
            assert (facts.status, facts.output_data) == ("completed", {"generated_text": owner})
        if is_written and verb == "fail":
            assert (facts.status, facts.error_message) == ("failed", f"{owner} failed.")

    def leave(self, attempt: Try) -> None:
        """MongoDB stayed away: the message goes back, or the lease runs out and a result is kept in Redis."""
        self.tries.remove(attempt)
        if attempt.job is None:
            self.world.queue.append(attempt.job_id)
        elif attempt.outcome == "complete" and self.world.is_redis_up:
            self.world.ever_kept.add(attempt.job_id)
            self.world.kept[result_name(attempt.job_id, attempt.job.first_started_at)] = [attempt.owner, None]

    # the worker's keeper and sweeper

    @rule(host=HOST, weather=WEATHER, is_patient=st.booleans())
    def renew(self, host: int, weather: Weather, is_patient: bool) -> None:
        """As the keeper does: the clock first, then all leases; then it looks for those that are lost."""
        keeper = self.world.hosts[host]
        jobs = [each.job for each in self.tries if each.host is keeper and each.job]
        with contextlib.suppress(StoreUnavailable), self.world.under(weather):
            with keeper.acting():
                keeper.clock.read()
            self.ask(is_patient, lambda: keeper.store.renew_leases(jobs))
            lost = keeper.store.find_lost(jobs)
            facts = self.world.facts
            assert lost == [job for job in jobs if self.is_lost(job, facts[job.id])]

    @staticmethod
    def is_lost(job: Job, facts: Facts) -> bool:
        return facts.status != "processing" or facts.owner != job.owner

    @rule(host=HOST, weather=WEATHER)
    def sweep(self, host: int, weather: Weather) -> None:
        sweeper = self.world.hosts[host]
        with sweeper.acting(), contextlib.suppress(StoreUnavailable), self.world.under(weather):
            had_time = sweeper.sweeper.after is None  # else it goes on behind the last one
            is_whole = weather.is_calm and self.world.is_redis_up and had_time and not sweeper.sweeper.had_fault
            sweeper.sweeper.release_dead_siblings()
            sweeper.sweeper.sweep()
            if is_whole and sweeper.sweeper.has_turn:
                endless = {job_id for job_id, refusal in self.world.refusals.items() if refusal is NO_FAILURE}
                assert self.stale_ids(sweeper.now()) <= endless, "a stale job was left"
                assert not self.world.revoked, "a revoked job was left"

    def stale_ids(self, now: datetime) -> set[ObjectId]:
        return {job_id for job_id, facts in self.world.facts.items() if facts.is_stale(now)}

    @rule(host=HOST, weather=WEATHER)
    def sweep_by_what_was_read_before(self, host: int, weather: Weather) -> None:
        """A slow sweeper: it acts on what it read last time, which may be outdated, and then reads again."""
        sweeper, store = self.world.hosts[host], self.world.hosts[host].store
        with contextlib.suppress(StoreUnavailable), self.world.under(weather):
            for job in self.stale:
                with contextlib.suppress(StoreRefused):
                    if not store.is_past_bounds(job):
                        store.release_stale(job)
                    elif not self.has_kept_result(job):
                        store.fail_seen(job, GAVE_UP)
        self.stale = list(store.find_stale())
        self.check_what_is_found(sweeper)

    def check_what_is_found(self, sweeper: Host) -> None:
        now, everything = sweeper.now(), self.world.facts
        assert {job.id for job in self.stale} == self.stale_ids(now)
        since = now - timedelta(seconds=30)
        ended = {key: facts for key, facts in everything.items() if not facts.is_active}
        overdue = {key for key, facts in ended.items() if facts.unnotified and facts.unnotified <= since}
        assert ids(list(sweeper.store.find_unnotified(30))) == overdue
        held = {key for key, facts in everything.items() if facts.status == "processing" and facts.read("owner", now)}
        mine = {key for key in held if everything[key].read("node", now) == sweeper.node}
        assert {job.id for job in sweeper.store.find_siblings()} == mine
        pending = {key for key, facts in everything.items() if facts.status == "pending"}
        assert set(sweeper.store.pending_ids()) == pending
        leases = {key: facts.own.get("lease_until") for key, facts in ended.items() if isinstance(facts.own, dict)}
        cancelled = {key for key, until in leases.items() if isinstance(until, datetime) and until > now}
        assert set(sweeper.store.find_cancelled()) == {key for key in cancelled if everything[key].status == "failed"}

    # what others do between two requests of a verb

    def interrupt(self, meanwhile: Meanwhile) -> None:
        rival, world = self.world.hosts[-1], self.world
        with rival.acting(), world.under(CALM):
            match meanwhile:
                case Meanwhile.SWEEP:
                    rival.sweeper.sweep()
                case Meanwhile.LEASES_RUN_OUT:
                    world.now += timedelta(seconds=LEASE_S)
                case Meanwhile.LATE_REQUESTS_ARRIVE:
                    world.do_late_requests()
                case Meanwhile.REDIS_GOES_OR_COMES:
                    world.is_redis_up = not world.is_redis_up
                case _ if world.calls and (targets := list(world.calls[-1].targets)):
                    self.interfere(meanwhile, targets[0], rival)

    def interfere(self, meanwhile: Meanwhile, job_id: ObjectId, rival: Host) -> None:
        """With the very job that the verb is about."""
        match meanwhile:
            case Meanwhile.CANCEL if self.world.facts[job_id].is_active:
                self.world.write(job_id, status="failed", error_message="Cancelled.")
            case Meanwhile.REVOKE:
                task = RevokedTask(str(job_id), self.world.tasks[job_id][-1], REVOKED)
                rival.store.fail_revoked(task, STOPPED)
            case Meanwhile.CLAIM:
                self.deliver(rival, job_id, Limits(20, 30), CALM, is_patient=False)

    # what always holds

    @invariant()
    def the_documents_are_right(self) -> None:
        if self.world.violation:
            raise self.world.violation
        documents = {document["_id"]: document for document in self.world.jobs.find()}
        assert {job_id: Facts.of(document) for job_id, document in documents.items()} == self.world.facts
        for job_id, document in documents.items():
            assert document["status"] in ("pending", "processing", "completed", "failed")
            theirs = {key: value for key, value in document.items() if key not in OURS}
            created_at = aware(theirs.pop("created_at"))
            before = {key: value for key, value in self.world.inserted[job_id].items() if key not in OURS}
            assert {**theirs, "created_at": created_at} == before

        for job_id, facts in self.world.facts.items():
            attempts = facts.number("attempt", self.world.now)
            assert attempts <= MAX_ATTEMPTS or job_id in self.world.ever_kept or self.is_spoilt

    def teardown(self) -> None:
        """In calm weather, with one worker, every job ends, and its end is published."""
        if not self.world.facts:
            return
        self.world.is_redis_up = True
        if self.is_spoilt:  # a job whose failure is refused as well ends once the operator has changed that
            refusals = self.world.refusals.items()
            self.world.set_validator({job_id: each for job_id, each in refusals if each is not NO_FAILURE})
        self.world.do_late_requests()
        for host in self.world.hosts:
            self.kill_process(host, wall_offset_s=0)
        for _ in range(ROUNDS):
            self.healthy_round()
            left = [facts for job_id, facts in self.world.facts.items() if self.is_left(job_id, facts)]
            if not left:
                with_outbox = {job_id: facts for job_id, facts in self.world.facts.items() if facts.own is not None}
                ended = {key: facts.status for key, facts in with_outbox.items() if key in self.world.ended_by_us}
                assert ended.items() <= self.world.published.items()
                return
        raise AssertionError(f"after {ROUNDS * ROUND_S:g} s a job has not ended, or its end is not published: {left}")

    def is_left(self, job_id: ObjectId, facts: Facts) -> bool:
        """A notice that was published stays in the outbox where MongoDB refuses every change of the document."""
        return facts.is_active or bool(facts.unnotified and not self.world.refuses(job_id, facts))

    def healthy_round(self) -> None:
        self.world.now += timedelta(seconds=ROUND_S)
        self.renew(0, CALM, is_patient=False)
        self.sweep(0, CALM)
        self.receive_markers(self.world.hosts[0])
        for job_id in [each for each in self.world.queue if each not in self.world.markers]:
            self.deliver(self.world.hosts[0], job_id, Limits(20, 30), CALM, is_patient=False)
        for attempt in [each for each in self.tries if each.job is None]:
            self.claim(attempt, CALM, is_patient=False)
        for attempt in self.running():
            self.end(attempt, "complete", CALM, is_patient=False)

    def running(self) -> list[Try]:
        return [each for each in self.tries if each.job]

    def pick_job(self, number: int) -> ObjectId:
        """Rather one that goes on: what has ended is soon dull."""
        active = [job_id for job_id, facts in self.world.facts.items() if facts.is_active]
        chosen = active if active and number != MAX_PICK else list(self.world.facts)
        return chosen[number % len(chosen)]


# ── the runs ─────────────────────────────────────────────────────────────────────────────────────────────────────


SERIES, STEPS = 11, 40


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Gives worker.py the world's time, processes and broker instead of this machine's."""
    stage = SimpleNamespace(world=None)
    clock = {**vars(time), "monotonic": lambda: stage.world.actor.monotonic_s}
    clock["time"] = lambda: stage.world.now.timestamp()
    processes = {**vars(os), "getpid": lambda: stage.world.actor.pid}
    for module in (worker, workerkit.mongodb):
        monkeypatch.setattr(module, "time", SimpleNamespace(**clock))
    monkeypatch.setattr(worker, "os", SimpleNamespace(**processes))
    monkeypatch.setattr(worker, "is_process_alive", lambda pid: pid not in stage.world.dead)
    monkeypatch.setattr(logger, "disabled", True)
    return stage


def run(stage: SimpleNamespace, jobs: Any, shapes: list[Any], examples: int, in_ci: int) -> None:
    """Many short series: after ten examples hypothesis goes over to variations of those, which show little new."""
    asked = int(os.environ.get("MODEL_EXAMPLES", "0"))
    first, many = (random.randrange(2**32), asked) if asked else (0, in_ci if os.environ.get("CI") else examples)
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    for number in range(first, first + math.ceil(many / SERIES)):
        run_state_machine_as_test(
            cast(Any, seed(number)(lambda: StatusMachine(stage, jobs, shapes))),
            settings=settings(
                max_examples=SERIES,
                stateful_step_count=STEPS,
                database=None,
                deadline=None,
                suppress_health_check=checks,
                report_multiple_bugs=False,
            ),
        )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_store_keeps_to_the_model_on_mongomock(stage: SimpleNamespace) -> None:
    jobs: Any = mongomock.MongoClient()["model"]["jobs"]
    run(stage, jobs, SHAPES_OF_OURS, examples=100, in_ci=300)


@pytest.mark.timeout(600)
def test_the_store_keeps_to_the_model_on_mongodb(stage: SimpleNamespace, mongo_server: MongoServer) -> None:
    with pymongo.MongoClient[Document](mongo_server.url) as client:
        client["test_model"].create_collection("jobs")
        run(stage, client["test_model"]["jobs"], SHAPES_OF_OURS + SPOILT_SHAPES, examples=30, in_ci=80)
        client.drop_database("test_model")
