"""The status machine against a model of it: several workers, any order of steps, a network that loses messages.

Hypothesis drives the real JobStore and Sweeper of three processes over one database: submits, claims, renewals, ends,
hand-backs, sweeps, cancels, revokes, duplicates, lost and late requests, lost replies, dead processes, clocks that
are off. `Model` says, from a job's facts alone, what each verb may do to it. Every single write is compared with that:
what the model forbids must not happen, and what it allows must happen in calm weather. At the end of each example the
world calms down, one worker is left, and every job has to end, and its end to be published, within a bounded time.

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
from collections.abc import Callable, Iterator
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
from worker import DAMAGED, GAVE_UP, STOPPED, Job, JobStore, NotClaimed, Reason, Result, Sweeper
from workerkit.errors import Document, NotesUnavailable, StoreUnavailable
from workerkit.logs import logger
from workerkit.mongodb import Clock
from workerkit.settings import Limits

LEASE_S, ORPHAN_S, DEADLINE_S, MAX_ATTEMPTS, RETRY_S = 10.0, 60.0, 300.0, 2, 1.0
RESCUE_FIRST_S, RESCUE_MAX_S, PENDING_OVERDUE_S = 30.0, 600.0, 60.0
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


@dataclass(frozen=True)
class Facts:
    """All that the worker writes in a job's document, flat; None where it isn't there."""

    status: str
    created_at: datetime
    started_at: datetime | None = None
    updated_at: datetime | None = None
    completed_at: datetime | None = None
    output_data: Document | None = None
    artifact_url: str | None = None
    error_message: str | None = None
    # below `worker`
    owner: str | None = None
    node: str | None = None
    pid: int | None = None
    lease_until: datetime | None = None
    deadline: datetime | None = None
    limits: list[float] | None = None
    available_at: datetime | None = None
    rescue_at: datetime | None = None
    rescues: int | None = None
    attempt: int | None = None
    first_started_at: datetime | None = None
    unnotified: datetime | None = None

    @classmethod
    def of(cls, document: Document) -> Facts:
        own = document.get("worker")
        whole = {**document, **(own if isinstance(own, dict) else {})}
        found: Document = {each.name: whole.get(each.name) for each in fields(cls)}
        times = {key: aware(value) for key, value in found.items() if isinstance(value, datetime)}
        return cls(**{**found, **times})

    @property
    def is_active(self) -> bool:
        return self.status in ("pending", "processing")

    @property
    def is_released(self) -> bool:
        return self.status == "processing" and self.owner is None and self.available_at is not None

    @property
    def is_older_workers(self) -> bool:
        return self.status == "processing" and self.owner is None and self.available_at is None

    @property
    def is_ended_by_us(self) -> bool:
        return not self.is_active and self.completed_at is not None

    def is_past_bounds(self, hard_s: float, now: datetime) -> bool:
        oldest_start = now - timedelta(seconds=max(DEADLINE_S, hard_s))
        is_too_old = self.first_started_at is not None and self.first_started_at <= oldest_start
        return is_too_old or (self.attempt or 0) >= MAX_ATTEMPTS

    def is_exhausted(self, now: datetime) -> bool:
        return self.is_past_bounds(self.limits[0] if self.limits else SETTINGS.celery_time_limit, now)

    def is_stale(self, now: datetime) -> bool:
        if self.is_older_workers:
            return (self.started_at or self.updated_at or self.created_at) < now - timedelta(seconds=ORPHAN_S)
        at = self.lease_until if self.owner else self.rescue_at
        return self.status == "processing" and at is not None and at <= now

    def next_rescue(self, now: datetime) -> dict[str, Any]:
        rescues = self.rescues or 0
        wait_s = min(RESCUE_FIRST_S * 2**rescues, RESCUE_MAX_S)
        return {"rescue_at": now + timedelta(seconds=wait_s), "rescues": rescues + 1}

    def ended(self, status: str, now: datetime, **more: Any) -> Facts:
        return replace(self, status=status, updated_at=now, completed_at=now, unnotified=now, **more)


@dataclass
class Call:
    """A verb under way: who called it with what, and the time that its host's clock showed at the first request."""

    verb: str
    host: Host
    pid: int
    arguments: Document
    is_calm: bool
    kept: frozenset[ObjectId]  # jobs whose results are kept in Redis
    now: datetime = field(default_factory=lambda: datetime.max.replace(tzinfo=UTC))
    is_first: bool = True

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def targets(self) -> dict[ObjectId, Any]:
        """The jobs that it names, by whatever argument."""
        values = [each for value in self.arguments.values() for each in (value if isinstance(value, list) else [value])]
        named = {each: each for each in values if isinstance(each, ObjectId)}
        named |= {each["_id"]: each for each in values if isinstance(each, dict) and "_id" in each}
        return named | {each.id: each for each in values if isinstance(each, Job)}


class Model:
    """What each verb may do to a job: its new facts, or None where it has to leave it alone.

    Times of the fence are those that the caller's clock shows; whether a lease is over, the database's time decides.
    """

    @staticmethod
    def claim(call: Call, facts: Facts, _: Any) -> Facts | None:
        now, limits = call.now, call["limits"]
        lease: Document = {"owner": call["owner"], "node": call.host.node, "pid": call.pid, "updated_at": now}
        lease |= {"lease_until": now + timedelta(seconds=LEASE_S), "limits": [limits.hard_s, limits.soft_s]}
        lease |= {"deadline": now + timedelta(seconds=limits.hard_s - call["waited_s"])}
        if facts.status == "pending":
            fresh = Facts(
                "processing", facts.created_at, output_data=facts.output_data, artifact_url=facts.artifact_url
            )
            return replace(fresh, **lease, started_at=now, first_started_at=now, attempt=1)
        is_due = facts.is_released and facts.available_at is not None and facts.available_at <= now
        if not is_due or (call["bounded"] and facts.is_past_bounds(limits.hard_s, now)):
            return None
        lease |= {"first_started_at": min(facts.first_started_at or now, now), "attempt": (facts.attempt or 0) + 1}
        return replace(facts, **lease)

    @staticmethod
    def renew_leases(call: Call, facts: Facts, job: Job) -> Facts | None:
        if facts.status != "processing" or facts.owner != job.owner:
            return None
        until = call.now + timedelta(seconds=LEASE_S)
        return replace(facts, lease_until=max(facts.lease_until or until, until))

    @staticmethod
    def complete(call: Call, facts: Facts, job: Job) -> Facts | None:
        if facts.status != "processing" or facts.owner != job.owner:
            return None
        result = {"output_data": call["output"], "artifact_url": call["artifact_url"], "error_message": None}
        return facts.ended("completed", call.now, **result)

    @staticmethod
    def fail(call: Call, facts: Facts, job: Job) -> Facts | None:
        if facts.status != "processing" or facts.owner != job.owner:
            return None
        return facts.ended("failed", call.now, error_message=call["sentence"])

    @staticmethod
    def release(call: Call, facts: Facts, job: Job) -> Facts | None:
        if facts.status != "processing" or facts.owner != job.owner:
            return None
        available_at = call["available_at"]
        waits = {"available_at": available_at, "rescue_at": available_at + timedelta(seconds=RESCUE_FIRST_S)}
        attempt = (facts.attempt or 0) - (not call["counted"])
        return replace(facts, owner=None, updated_at=call.now, attempt=attempt, **waits)

    @staticmethod
    def is_unchanged(facts: Facts, document: Document) -> bool:
        """Whether the job is still what a sweeper has read."""
        read = Facts.of(document)
        is_same = all(getattr(read, name) == getattr(facts, name) for name in ("owner", "lease_until", "rescue_at"))
        return facts.status == "processing" and is_same

    @staticmethod
    def is_dead(call: Call, facts: Facts) -> bool:
        """Whether it is held by a process of the same node that has died."""
        return facts.owner is not None and facts.pid in call.host.world.dead and facts.node == call.host.node

    @staticmethod
    def release_stale(call: Call, facts: Facts, document: Document) -> Facts | None:
        may_go_on = not facts.is_exhausted(call.now) or document["_id"] in call.kept
        is_free = Model.is_dead(call, facts) or (facts.is_stale(call.host.world.now) and may_go_on)
        if not is_free or not Model.is_unchanged(facts, document):
            return None
        rescue = Facts.of(document).next_rescue(call.now)
        return replace(facts, owner=None, updated_at=call.now, available_at=call.now, **rescue)

    @staticmethod
    def fail_stale(call: Call, facts: Facts, document: Document) -> Facts | None:
        deadline = facts.deadline or call.now
        is_killed = Model.is_dead(call, facts) and call.now >= deadline - timedelta(seconds=1)
        may_go_on = not facts.is_exhausted(call.now) or document["_id"] in call.kept
        is_given_up = facts.is_stale(call.host.world.now) and not may_go_on
        if not (is_killed or is_given_up) or not Model.is_unchanged(facts, document):
            return None
        return facts.ended("failed", call.now, error_message=call["sentence"])

    @staticmethod
    def reserve_rescue(call: Call, facts: Facts, document: Document) -> Facts | None:
        if facts.status != "pending" or facts.rescue_at != Facts.of(document).rescue_at:
            return None
        return replace(facts, **facts.next_rescue(call.now))

    @staticmethod
    def undo_rescue(call: Call, facts: Facts, document: Document) -> Facts | None:
        before = Facts.of(document).rescues or 0
        if not facts.is_active or facts.owner is not None or facts.rescues != before + 1:
            return None
        return replace(facts, rescue_at=call.now + timedelta(seconds=SETTINGS.sweep_interval), rescues=before)

    @staticmethod
    def fail_active(call: Call, facts: Facts, _: Any) -> Facts | None:
        return facts.ended("failed", call.now, error_message=call["sentence"]) if facts.is_active else None

    @staticmethod
    def fail_unowned(call: Call, facts: Facts, _: Any) -> Facts | None:
        if facts.owner is not None or not (facts.status == "pending" or facts.is_released):
            return None
        return facts.ended("failed", call.now, error_message=call["sentence"])

    @staticmethod
    def mark_notified(call: Call, facts: Facts, _: Any) -> Facts | None:
        return replace(facts, unnotified=None)

    @staticmethod
    def after(call: Call, job_id: ObjectId, facts: Facts) -> Facts:
        """What the job is like after this call has done all that it may."""
        verb = getattr(Model, call.verb, None)
        if verb is None or job_id not in call.targets:
            return facts
        return verb(call, facts, call.targets[job_id]) or facts

    @staticmethod
    def reason(facts: Facts | None, now: datetime) -> Reason:
        """Why a claim that has just read these facts got nothing."""
        if facts is None:
            return Reason.UNKNOWN
        if not facts.is_active:
            return Reason.TERMINAL
        if facts.status == "pending":
            return Reason.WAITING
        if facts.owner is not None or facts.is_older_workers:
            return Reason.HELD
        return Reason.EXHAUSTED if facts.is_exhausted(now) else Reason.WAITING


# ── the world ────────────────────────────────────────────────────────────────────────────────────────────────────


def aware(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC)


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


NO_REQUESTS = ("now", "oldest_start", "is_past_bounds")
METHODS = [name for name, value in vars(JobStore).items() if inspect.isfunction(value) and not name.startswith("_")]
VERBS = [name for name in METHODS if name not in NO_REQUESTS]
SIGNATURES = {verb: inspect.signature(getattr(JobStore, verb)) for verb in VERBS}


class WatchedStore(JobStore):
    """The real store; the world knows which verb is under way, and holds it against the model when it has answered."""

    def __init__(self, host: Host, clock: Clock) -> None:
        self.host = host
        super().__init__(Network(host), host.node, clock, SETTINGS)  # type: ignore[arg-type]

    def now(self) -> datetime:
        with self.host.acting():
            return super().now()

    def _watched(self, verb: str, *args: Any, **options: Any) -> Any:
        arguments = SIGNATURES[verb].bind(self, *args, **options)
        arguments.apply_defaults()
        with self.host.world.calling(verb, self.host, dict(arguments.arguments)):
            return getattr(JobStore, verb)(self, *args, **options)


for _verb in SIGNATURES:
    setattr(WatchedStore, _verb, partialmethod(WatchedStore._watched, _verb))


class Host:
    """A machine with one worker process. A new process has a new pid, and a clock that isn't set yet."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.node = world, f"node-{number}"
        self.behind_s = 0.0
        self.start_process(wall_offset_s=0)

    def start_process(self, wall_offset_s: float) -> None:
        self.world.last_pid += 1
        self.pid = self.world.last_pid
        self.refused_at_s = -math.inf
        with self.acting():
            self.clock = Clock()
            self.clock.synchronise(self.world.now + timedelta(seconds=wall_offset_s))
            self.clock.is_synchronised = False
        self.store = WatchedStore(self, self.clock)
        redis: Any = Redis(self.world)
        self.sweeper = Sweeper(self.store, redis, redis, redis)

    @property
    def monotonic_s(self) -> float:
        return (self.world.now - BEGINNING).total_seconds() - self.behind_s

    @property
    def rests(self) -> bool:
        """Whether its sweeper leaves the queue alone, since Redis was away a moment ago."""
        return self.monotonic_s < self.refused_at_s + Sweeper.broker_rest_s

    def now(self) -> datetime:
        with self.acting():
            return self.clock.now()

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
        answer: Document = self._host.world.travel(lambda: {"localTime": self._host.world.now.replace(tzinfo=None)})
        return answer

    def __getitem__(self, name: str) -> Wire:
        return Wire(self._host, self._host.world.jobs.database[name])


class Wire:
    """A collection at the other end of the network; each request is one of the verb under way."""

    def __init__(self, host: Host, collection: Any) -> None:
        self._host, self._collection = host, collection

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._request, name)

    def _request(self, name: str, *args: Any, **options: Any) -> Any:
        world = self._host.world
        call = world.calls[-1]
        if call.is_first:  # the verb has looked at its clock by now
            call.now, call.is_first = self._host.now(), False
        operation = partial(getattr(self._collection, name), *args, **options)
        return world.travel(operation if name in ("find", "find_one") else lambda: world.watch(call, operation))


class Redis:
    """Notifier, shared notes and broker: published notices, kept results, revoked jobs, the queue."""

    errors = (OperationalError,)

    def __init__(self, world: World) -> None:
        self._world = world

    def _reach(self, error: type[Exception] = NotesUnavailable) -> None:
        if not self._world.is_redis_up:
            self._world.actor.refused_at_s = self._world.actor.monotonic_s
            raise error("Redis is away")

    def publish_status(self, document: Document, status: str, _: str) -> bool:
        assert self._world.facts[document["_id"]].status == status, "a notice says what the document doesn't"
        if self._world.is_redis_up:
            self._world.published[document["_id"]] = status
        return self._world.is_redis_up

    def kept_result(self, job_id: ObjectId) -> Result | None:
        self._reach()
        return self._world.kept.get(job_id)

    def revoked(self) -> list[str]:
        self._reach()
        return [str(job_id) for job_id in self._world.revoked]

    def forget_revoked(self, job_id: str) -> None:
        self._reach()
        assert not self._world.facts[ObjectId(job_id)].is_active, "a revoke is forgotten before it is done"
        self._world.revoked.discard(ObjectId(job_id))

    def send(self, _: str, args: tuple[str, Document], **__: Any) -> None:
        self.queue_length()
        self._world.queue.append(ObjectId(args[0]))

    def queue_length(self) -> int:
        self._reach(OperationalError)
        return len(self._world.queue)


BEGINNING = datetime(2030, 1, 1, tzinfo=UTC)
OURS = {"status", "started_at", "updated_at", "completed_at", "output_data", "artifact_url", "error_message", "worker"}


class World:
    """The database's time, what is in it, everybody who reaches it, and what the model knows."""

    def __init__(self, stage: SimpleNamespace, jobs: Any) -> None:
        stage.world = self
        self.jobs = jobs
        self.jobs.delete_many({})
        self.now = BEGINNING
        self.facts: dict[ObjectId, Facts] = {}
        self.inserted: dict[ObjectId, Document] = {}
        # What each end of an attempt made of its job, by owner and verb.
        self.settled: dict[tuple[str, str], Facts] = {}
        self.refused: set[str] = set()  # owners that got the answer that the job is no longer theirs
        self.calls: list[Call] = []
        self.late: list[Callable[[], Any]] = []
        self.weather, self.requests = CALM, 0
        self.fates: list[Fate] = []
        self.interrupt: Callable[[Meanwhile], None] = lambda _: None
        self.queue: list[ObjectId] = []
        self.revoked: set[ObjectId] = set()
        self.kept: dict[ObjectId, Result] = {}
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
        call = Call(verb, host, host.pid, arguments, self.weather.is_calm, frozenset(self.kept))
        before = dict(self.facts)
        self.calls.append(call)
        try:
            with host.acting():
                yield
        except StoreUnavailable as error:
            if call.is_calm:
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
            self.interrupt(self.weather.meanwhile)
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

    def watch(self, call: Call, operation: Callable[[], Any]) -> Any:
        """Does one operation of a verb, and holds what it wrote against the model."""
        answer = operation()
        for job_id, facts in self.read().items():
            before = self.facts[job_id]
            if facts == before:
                continue
            assert facts == Model.after(call, job_id, before), f"{call.verb} may not do this to {before}"
            assert not facts.is_active or before.is_active, "an ended job ran again"
            self.facts[job_id] = facts
            if isinstance(job := call.targets[job_id], Job):
                assert job.owner not in self.refused, "it had got the answer that the job is no longer its own"
                self.settled[job.owner, call.verb] = facts
        return answer

    def do_late_requests(self) -> None:
        late, self.late = self.late, []
        for operation in late:
            with contextlib.suppress(PyMongoError):  # its caller has given it up
                operation()

    def read(self) -> dict[ObjectId, Facts]:
        return {document["_id"]: Facts.of(document) for document in self.jobs.find()}

    def write(self, job_id: ObjectId, **fields: Any) -> None:
        """A write of others, which no verb of ours makes: what it does are new facts."""
        self.jobs.update_one({"_id": job_id}, {"$set": fields})
        self.facts.update(self.read())


# ── what happens in it ───────────────────────────────────────────────────────────────────────────────────────────


class Meddling(Enum):
    CANCEL = 0
    REVOKE = 1
    DAMAGED_MESSAGE = 2
    OLDER_WORKER_TAKES_IT = 3
    OLDER_WORKER_COMPLETES_IT = 4


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
    limits: Limits
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
SPOILT_SHAPES: list[Any] = [None, "another program's", ["another", "program's"]]


class StatusMachine(RuleBasedStateMachine):
    """Three hosts and some jobs. Every rule is a step that one of them, the API or an operator makes."""

    def __init__(self, stage: SimpleNamespace, jobs: Any, shapes: list[Any]) -> None:
        super().__init__()
        self.world = World(stage, jobs)
        self.world.interrupt = self.interrupt
        self.shapes = shapes
        self.tries: list[Try] = []
        self.stale: list[Document] = []
        self.pending: list[Document] = []
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
        if not is_message_lost:
            self.world.queue.append(job_id)
        for outcome in past:
            self.world.now += timedelta(seconds=RETRY_S)
            attempt = self.deliver(self.world.hosts[0], job_id, Limits(20, 30), CALM, is_patient=False)
            if attempt in self.running() and outcome in ("retry", "hand back"):
                self.end(attempt, outcome, CALM, is_patient=False)
            elif attempt in self.running() and outcome == "kept":
                attempt.outcome = "complete"
                self.leave(attempt)

    @rule(job=PICK, host=HOST, what=st.sampled_from(Meddling), weather=WEATHER)
    def others_meddle(self, job: int, host: int, what: Meddling, weather: Weather) -> None:
        world, job_id = self.world, self.pick_job(job)
        facts = world.facts[job_id]
        match what:
            case Meddling.CANCEL if facts.is_active:
                world.write(job_id, status="failed", error_message="Cancelled.")
            case Meddling.REVOKE:
                world.revoked.add(job_id)
            case Meddling.DAMAGED_MESSAGE:
                self.fail_unowned(world.hosts[host].store, job_id, weather)
            case Meddling.OLDER_WORKER_TAKES_IT if facts.status == "pending":
                world.write(job_id, status="processing", **{"started_at" if host else "updated_at": world.now})
            case Meddling.OLDER_WORKER_COMPLETES_IT if facts.is_older_workers:
                world.write(job_id, status="completed", output_data={"generated_text": "old"})

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
        if job_id in self.world.queue:
            self.world.queue.remove(job_id)
        self.last_owner += 1
        attempt = Try(host, job_id, f"owner-{self.last_owner}", limits)
        self.tries.append(attempt)
        self.claim(attempt, weather, is_patient)
        return attempt

    def ask(self, is_patient: bool, question: Callable[[], Any]) -> Any:
        """Once, or until there is an answer: sooner or later the weather is fine."""
        while True:
            try:
                return question()
            except StoreUnavailable:
                if not is_patient:
                    raise
                self.world.now += timedelta(seconds=1)

    def claim(self, attempt: Try, weather: Weather, is_patient: bool) -> None:
        """As the task does: the same owner until there is an answer."""
        claim = partial(attempt.host.store.claim, attempt.job_id, attempt.owner, attempt.limits, waited_s=1)
        with contextlib.suppress(StoreUnavailable), self.world.under(weather):
            answer = self.ask(is_patient, lambda: claim(bounded=attempt.bounded))
            facts = self.world.facts.get(attempt.job_id)
            if isinstance(answer, Job):
                assert facts
                assert (facts.status, facts.owner) == ("processing", attempt.owner) == ("processing", answer.owner)
                assert (answer.attempt, answer.first_started_at) == (facts.attempt, facts.first_started_at)
                attempt.job = answer
            else:
                assert isinstance(answer, NotClaimed)
                self.answer_not_claimed(attempt, answer.reason, facts)

    def answer_not_claimed(self, attempt: Try, reason: Reason, facts: Facts | None) -> None:
        assert facts is None or not (facts.is_active and facts.owner == attempt.owner), "its own lease is not known"
        assert reason is Model.reason(facts, attempt.host.now())
        self.tries.remove(attempt)
        if reason is Reason.WAITING:
            self.world.queue.append(attempt.job_id)
        elif reason is Reason.TERMINAL:
            self.publish_end(attempt)
        elif reason is Reason.EXHAUSTED and attempt.job_id in self.world.kept:
            self.tries.append(replace(attempt, bounded=False))
        elif reason is Reason.EXHAUSTED and attempt.host.store.fail_unowned(attempt.job_id, GAVE_UP):
            self.publish_end(attempt)

    def publish_end(self, attempt: Try) -> None:
        """Publishes the status of a job that has ended, and takes it out of the outbox."""
        document = {"_id": attempt.job_id}
        redis = Redis(self.world)
        if redis.publish_status(document, self.world.facts[attempt.job_id].status, ""):
            with contextlib.suppress(StoreUnavailable):
                attempt.host.store.mark_notified([attempt.job_id])

    def end(self, attempt: Try, outcome: str, weather: Weather, is_patient: bool) -> None:
        """One fenced write, the same in each repetition."""
        if not attempt.outcome:
            attempt.outcome = outcome
            attempt.available_at = attempt.host.now() + timedelta(seconds=RETRY_S if outcome == "retry" else 0)
        with contextlib.suppress(StoreUnavailable), self.world.under(weather):
            is_written = self.ask(is_patient, lambda: self.write_outcome(attempt))
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
            assert self.world.settled.get((owner, verb)) != facts, "its own write is not known"
            assert verb == "release" or (owner, verb) not in self.world.settled, "its own write is not known"
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
            self.world.kept[attempt.job_id] = Result({"generated_text": attempt.owner})

    # the worker's keeper and sweeper

    @rule(host=HOST, weather=WEATHER, is_patient=st.booleans())
    def renew(self, host: int, weather: Weather, is_patient: bool) -> None:
        """As the keeper does: the clock first, then all leases; then it looks for those that are lost."""
        keeper = self.world.hosts[host]
        jobs = [each.job for each in self.tries if each.host is keeper and each.job]
        with contextlib.suppress(StoreUnavailable), self.world.under(weather):
            keeper.store.synchronise_clock()
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
            is_whole = weather.is_calm and self.world.is_redis_up and not sweeper.rests
            sweeper.sweeper.release_dead_siblings()
            sweeper.sweeper.sweep()
            if is_whole:
                assert self.stale_ids(sweeper.now()) == set(), "a stale job was left"
                assert not self.world.revoked, "a revoked job was left"

    def stale_ids(self, now: datetime) -> set[ObjectId]:
        return {job_id for job_id, facts in self.world.facts.items() if facts.is_stale(now)}

    def forgotten_ids(self, now: datetime, queued: int) -> set[ObjectId]:
        """Pending for over a minute, and nothing queued or a job that is a minute younger has started.

        A job from the future shows nothing: its time is wrong, or this sweeper's clock is behind.
        """
        minute, everything = timedelta(seconds=PENDING_OVERDUE_S), self.world.facts
        begun = [each.created_at for each in everything.values() if each.status != "pending" and each.started_at]
        started = [at for at in begun if at <= now]
        overtaken_by = BEGINNING if not started else max(started) - minute
        return {
            job_id
            for job_id, facts in everything.items()
            if facts.status == "pending" and facts.created_at < now - minute
            if facts.rescue_at is None or facts.rescue_at <= now
            if not queued or facts.created_at < overtaken_by
        }

    @rule(host=HOST, queued=st.integers(0, 1), weather=WEATHER)
    def sweep_by_what_was_read_before(self, host: int, queued: int, weather: Weather) -> None:
        """A slow sweeper: it acts on what it read last time, which may be outdated, and then reads again."""
        sweeper, store = self.world.hosts[host], self.world.hosts[host].store
        with contextlib.suppress(StoreUnavailable), self.world.under(weather):
            for document in self.pending:
                store.reserve_rescue(document)
            for document in self.stale:
                if not store.is_past_bounds(document):
                    store.release_stale(document)
                elif document["_id"] not in self.world.kept:
                    store.fail_stale(document, GAVE_UP)
        self.stale, self.pending = store.find_stale(), store.find_forgotten_pending(lambda: queued)
        self.check_what_is_found(sweeper, queued)

    def check_what_is_found(self, sweeper: Host, queued: int) -> None:
        now, everything = sweeper.now(), self.world.facts
        assert ids(self.stale) == self.stale_ids(now)
        assert ids(self.pending) == self.forgotten_ids(now, queued)
        since = now - timedelta(seconds=30)
        overdue = {key for key, facts in everything.items() if facts.unnotified and facts.unnotified <= since}
        assert ids(sweeper.store.find_unnotified(30)) == overdue
        held = {key for key, facts in everything.items() if facts.status == "processing" and facts.owner}
        assert ids(sweeper.store.find_siblings()) == {key for key in held if everything[key].node == sweeper.node}

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
                rival.store.fail_active(job_id, STOPPED)
            case Meanwhile.CLAIM:
                self.deliver(rival, job_id, Limits(20, 30), CALM, is_patient=False)

    # what always holds

    @invariant()
    def the_documents_are_right(self) -> None:
        documents = {document["_id"]: document for document in self.world.jobs.find()}
        assert {job_id: Facts.of(document) for job_id, document in documents.items()} == self.world.facts
        for job_id, document in documents.items():
            assert document["status"] in ("pending", "processing", "completed", "failed")
            theirs = {key: value for key, value in document.items() if key not in OURS}
            created_at = aware(theirs.pop("created_at"))
            before = {key: value for key, value in self.world.inserted[job_id].items() if key not in OURS}
            assert {**theirs, "created_at": created_at} == before

        for job_id, facts in self.world.facts.items():
            assert 0 <= (facts.attempt or 0) <= MAX_ATTEMPTS or job_id in self.world.ever_kept

    def teardown(self) -> None:
        """In calm weather, with one worker, every job ends, and its end is published."""
        if not self.world.facts:
            return
        self.world.is_redis_up = True
        self.world.do_late_requests()
        for host in self.world.hosts:
            self.kill_process(host, wall_offset_s=0)
        for _ in range(ROUNDS):
            self.healthy_round()
            left = [facts for facts in self.world.facts.values() if facts.is_active or facts.unnotified]
            if not left:
                ended = {job_id: facts.status for job_id, facts in self.world.facts.items() if facts.is_ended_by_us}
                assert ended.items() <= self.world.published.items()
                return
        raise AssertionError(f"after {ROUNDS * ROUND_S:g} s a job has not ended, or its end is not published: {left}")

    def healthy_round(self) -> None:
        self.world.now += timedelta(seconds=ROUND_S)
        self.renew(0, CALM, is_patient=False)
        self.sweep(0, CALM)
        for job_id in list(self.world.queue):
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
        run(stage, client["test_model"]["jobs"], SHAPES_OF_OURS + SPOILT_SHAPES, examples=30, in_ci=80)
        client.drop_database("test_model")
