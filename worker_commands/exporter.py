"""What `metrics` serves: the jobs as they stand at each scrape, and counts of those that have ended since it began.

An end is counted once, and none is missed, whatever the API's clock says and although the API may delete documents:
each scrape reads the jobs that have ended by the time of their end, which is the database's, and it reads the last
minutes again, since a write may become visible later than its time says.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pymongo
from bson import ObjectId
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pymongo.read_concern import ReadConcern

from worker import HANDLERS, Runtime, Status, app
from worker_commands.active import Pending, Processing, State, age_s, is_swept, read_pending, read_processing
from worker_commands.counts import Counts
from worker_commands.fleet import Fleet, ask_fleet, count_alive, sign_of_life
from worker_commands.lives import (
    CLOCKS_DIFFER_BY,
    FIELDS,
    INDEXES,
    Life,
    Outcome,
    ended_between,
    has_index_of_ends,
    last_life,
    past_lives,
)
from workerkit import __version__
from workerkit.errors import Document, StoreRefused, StoreUnavailable
from workerkit.logs import RepeatedFaultLog, logger, place_of
from workerkit.mongodb import iterate, make_indexes, read_raw, unknown_when_unreachable

if TYPE_CHECKING:
    from pymongo.collection import Collection

ACTIVE = {"status": {"$in": [Status.PENDING.value, Status.PROCESSING.value]}}
IDS_AT_ONCE = 1000

# ── ends ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Ends:
    """Finds each life that ends, once.

    `read` may be ended by an error at any point: what it has returned is noted, and the next call returns the rest.
    """

    OVERLAP_S = 120.0  # by which the last reading is repeated
    REMEMBER = timedelta(minutes=15)  # for which ends are known, since a new primary's clock may be behind
    READ_FOR_S = 3.0  # in one call; what is left comes with the next one
    MAX_ACTIVE = 100_000  # ids of active jobs that are remembered, to find those that are cancelled

    def __init__(self, jobs: Collection[Document], begins_at: datetime) -> None:
        self._jobs = jobs
        # Up to when the ends are read, and when that was, on the monotonic clock. The oldest comes first.
        self._read_until: list[tuple[float, datetime]] = [(time.monotonic(), begins_at)]
        self._go_on_from: datetime | None = None
        self._known_since = begins_at  # earlier ends are never read again
        self._seen: dict[tuple[str, datetime], None] = {}
        self._active: frozenset[ObjectId] = frozenset()
        self._has_index = False

    def read(self, now: datetime, processing: Sequence[Processing]) -> Iterator[Life]:
        """The lives that have ended since the last call. Raises StoreUnavailable."""
        active = self._active_ids()
        since, latest = self._since(now), now + CLOCKS_DIFFER_BY
        for job in processing:  # a former life may have ended a moment ago
            yield from self._unseen(past_lives(job.document, latest), since)
        yield from self._read_ended(since, now, latest)
        gone = self._read_cancelled(self._active - active)
        self._active = active
        for document in gone:
            yield from self._unseen(past_lives(document, latest), since)
            life = last_life(document, latest)
            if life and life.outcome is Outcome.CANCELLED:
                yield life

    def _since(self, now: datetime) -> datetime:
        """From when on ends are read: those before had been read already a while ago.

        The times are compared by the monotonic clock, since a new primary's may be behind the last one's.
        """
        if self._go_on_from:
            return self._go_on_from
        at = time.monotonic()
        while len(self._read_until) > 1 and self._read_until[1][0] <= at - self.OVERLAP_S:
            del self._read_until[0]
        passed_s = at - self._read_until[-1][0]
        since = min(self._read_until[0][1], now - timedelta(seconds=passed_s + self.OVERLAP_S))
        return max(since, self._known_since)

    def _read_ended(self, since: datetime, now: datetime, latest: datetime) -> Iterator[Life]:
        self._has_index = self._has_index or has_index_of_ends(self._jobs)
        asked_at, give_up_at = time.monotonic(), time.monotonic() + self.READ_FOR_S
        found = read_raw(self._jobs).find(ended_between(since, latest, has_index=self._has_index), FIELDS)
        for document in iterate(found.sort("completed_at", 1)):
            life = last_life(document, latest)
            yield from self._unseen(past_lives(document, latest), since)
            yield from self._unseen([life] if life else [], since)
            if time.monotonic() > give_up_at and life and life.ended_at > since:
                self._go_on_from = life.ended_at
                return
        self._go_on_from = None
        self._read_until.append((asked_at, now))
        self._forget_before(min(since, self._read_until[0][1]) - self.REMEMBER)

    def _forget_before(self, until: datetime) -> None:
        self._known_since = max(self._known_since, until)
        for key in [key for key in self._seen if key[1] < self._known_since]:
            del self._seen[key]

    def _unseen(self, lives: Iterator[Life] | Sequence[Life], since: datetime) -> Iterator[Life]:
        for life in lives:
            if life.ended_at >= since and life.key not in self._seen:
                self._seen[life.key] = None
                yield life

    def _active_ids(self) -> frozenset[ObjectId]:
        with unknown_when_unreachable():
            found = self._jobs.find(ACTIVE, {"_id": 1, "status": 1}).limit(self.MAX_ACTIVE)
            return frozenset(document["_id"] for document in found if isinstance(document["_id"], ObjectId))

    def _read_cancelled(self, gone: frozenset[ObjectId]) -> list[Any]:
        """Those of these jobs that were cancelled by their document alone, so that they have no time of an end."""
        ids, jobs = list(gone), read_raw(self._jobs)
        cancelled: list[Any] = []
        for start in range(0, len(ids), IDS_AT_ONCE):
            batch = {"_id": {"$in": ids[start : start + IDS_AT_ONCE]}}
            cancelled += iterate(jobs.find({**batch, "status": Status.FAILED, "completed_at": None}, FIELDS))
        return cancelled


# ── the broker ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class BrokerSeen:
    """What the broker said at a time of the monotonic clock. None: it can't be asked that."""

    at: float
    queue_length: int | None = None
    fleet: Fleet | None = None


class BrokerWatch:
    """Asks the broker every few seconds in a thread of its own: the workers' answers take a second, as does a broker
    that is away, and no scrape waits for them.
    """

    EVERY_S = 10.0
    MAX_AGE_S = 60.0  # what is older isn't shown

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._seen = BrokerSeen(at=-self.MAX_AGE_S)
        self._ended = threading.Event()
        self._log = RepeatedFaultLog("metrics: the broker can't be asked")
        self._thread = threading.Thread(target=self._run, name="broker watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()

    @property
    def seen(self) -> BrokerSeen | None:
        """The last answers; None if they are too old to be told."""
        return self._seen if time.monotonic() < self._seen.at + self.MAX_AGE_S else None

    def look(self) -> None:
        """Asks once. What can't be asked is left out."""
        queue_length = fleet = None
        try:
            queue_length = self._runtime.broker.queue_length()
            fleet = ask_fleet(self._runtime)
            self._log.over()
        except Exception as error:  # nothing may end this thread, since the broker would seem to be gone for good
            self._log.fault(f"{type(error).__name__} at {place_of(error)}")
        self._seen = BrokerSeen(time.monotonic(), queue_length, fleet)

    def _run(self) -> None:
        while not self._ended.is_set():
            self.look()
            self._ended.wait(self.EVERY_S)


# ── the exporter ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class JobsSeen:
    """The jobs that haven't ended, at one time."""

    now: datetime
    pending: dict[str, Pending]
    processing: list[Processing]
    is_swept: bool

    def busy_nodes(self) -> Counter[str]:
        return Counter(job.node for job in self.processing if job.node)

    @property
    def running(self) -> int:
        return sum(job.state is State.RUNNING for job in self.processing)


def gauge(name: str, help_text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help_text, value=value)


class Exporter(Collector):
    """Collects the metrics at each scrape. Scrapes at the same time share one reading.

    While MongoDB is away, what it would say is left out, and `ai_worker_mongodb_up` is 0; the counters stay.
    """

    MONGODB_PATIENCE_S = 5.0  # Prometheus gives a scrape 10 seconds
    FRESH_S = 1.0
    INDEX_PATIENCE_S, INDEX_AGAIN_S = 3600.0, 60.0

    def __init__(self, runtime: Runtime, broker: BrokerWatch, new_for_s: float = 0.0) -> None:
        self._runtime, self._broker = runtime, broker
        app.loader.import_default_modules()  # job types of your own
        self._types = sorted(HANDLERS)
        self._counts = Counts(self._types, new_for_s)
        self._jobs_seen: JobsSeen | None = None
        self._ends: Ends | None = None
        self._read_at = -self.FRESH_S
        self._lock = threading.Lock()
        self._log = RepeatedFaultLog("metrics: MongoDB can't be read")
        self._ended = threading.Event()

    @property
    def _jobs(self) -> Collection[Document]:
        """Read as the primary has it. A majority may confirm an end long after the time that it notes."""
        return self._runtime.database["jobs"].with_options(read_concern=ReadConcern("local"))

    def start(self) -> None:
        """Begins to count, if MongoDB can be reached by now, else at the first scrape that reaches it."""
        threading.Thread(target=self._make_index, name="index", daemon=True).start()
        self._broker.start()
        with self._lock:
            self._read()

    def stop(self) -> None:
        self._ended.set()
        self._broker.stop()

    def _make_index(self) -> None:
        """Makes the index of ends, as workers do. It goes on trying while MongoDB is away."""
        while not self._ended.is_set():
            try:
                with pymongo.timeout(self.INDEX_PATIENCE_S):
                    make_indexes(self._runtime.database["jobs"], INDEXES)
                return
            except StoreRefused as refusal:
                logger.warning("metrics: the index of ended jobs can't be made, so reading takes longer: %s", refusal)
                return
            except StoreUnavailable:
                self._ended.wait(self.INDEX_AGAIN_S)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _read(self) -> None:
        """Reads the documents. It notes what it has read up to a fault."""
        self._jobs_seen = None
        try:
            with pymongo.timeout(self.MONGODB_PATIENCE_S):
                self._jobs_seen = self._read_jobs()
            self._log.over()
        except StoreUnavailable as error:
            self._log.fault(error)
        self._read_at = time.monotonic()

    def _read_jobs(self) -> JobsSeen:
        self._runtime.store.clock.refresh()
        now, jobs = self._runtime.store.now(), self._jobs
        if self._ends is None:
            self._ends = Ends(jobs, begins_at=now)
        processing = list(read_processing(jobs, now))
        for life in self._ends.read(now, processing):
            self._counts.add(life)
        return JobsSeen(now, read_pending(jobs, now), processing, is_swept(self._runtime, now))

    # ── what Prometheus gets ─────────────────────────────────────────────────────────────────────────────────────

    def describe(self) -> Iterator[Metric]:
        """The metrics by name. The registry asks for them when the exporter is registered."""
        yield from self._families(JobsSeen(datetime.now(UTC), {}, [], False), BrokerSeen(0.0, 0, Fleet()))

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            if time.monotonic() >= self._read_at + self.FRESH_S:
                self._read()
            families = list(self._families(self._jobs_seen, self._broker.seen))
        yield from families

    def _families(self, jobs: JobsSeen | None, broker: BrokerSeen | None) -> Iterator[Metric]:
        version = GaugeMetricFamily("ai_worker_build_info", "The version of the exporter.", labels=["version"])
        version.add_metric([__version__], 1)
        yield version
        yield gauge("ai_worker_mongodb_up", "Whether MongoDB could be read at this scrape.", jobs is not None)
        if jobs:
            yield from self._families_of_jobs(jobs)
        if broker:
            yield from self._families_of_broker(broker, jobs)
        yield from self._counts.families()

    def _families_of_jobs(self, jobs: JobsSeen) -> Iterator[Metric]:
        name_of = self._counts.types.name
        states: Counter[tuple[str, str]] = Counter({(s, t): 0 for s in ("pending", *State) for t in self._types})
        oldest_s = dict.fromkeys(self._types, 0.0)
        for job_type, pending in jobs.pending.items():
            name = name_of(job_type)
            states["pending", name] += pending.count
            oldest_s[name] = max(oldest_s.get(name, 0.0), age_s(pending.since, jobs.now))
        states.update((job.state.value, name_of(job.job_type)) for job in jobs.processing)
        help_text = "Jobs that have not ended. A processing job is running, waiting_to_retry or unowned."
        family = GaugeMetricFamily("ai_worker_jobs", help_text, labels=["state", "type"])
        for labels, count in states.items():
            family.add_metric(labels, count)
        yield family
        help_text = "For how long the oldest pending job has been pending; 0 if none is."
        family = GaugeMetricFamily("ai_worker_oldest_pending_age_seconds", help_text, labels=["type"])
        for job_type, seconds in oldest_s.items():
            family.add_metric([job_type], seconds)
        yield family
        yield gauge("ai_worker_slots_busy", "Jobs that workers run at this time.", jobs.running)

    def _families_of_broker(self, broker: BrokerSeen, jobs: JobsSeen | None) -> Iterator[Metric]:
        yield gauge("ai_worker_broker_up", "Whether the broker answered lately.", broker.queue_length is not None)
        if broker.queue_length is not None:
            help_text = "Messages that no worker has taken yet."
            family = GaugeMetricFamily("ai_worker_queue_messages", help_text, labels=["queue"])
            family.add_metric([self._runtime.settings.celery_queue_name], broker.queue_length)
            yield family
        # Where the broker refuses remote control, the documents alone tell of workers.
        fleet = broker.fleet or (Fleet() if jobs and broker.queue_length is not None else None)
        if fleet:
            nodes, swept = (jobs.busy_nodes(), jobs.is_swept) if jobs else ({}, False)
            alive = count_alive(fleet.names, nodes) or sign_of_life(fleet, is_swept=swept)
            yield gauge("ai_worker_workers_alive", "Workers that answer, or that hold the leases of jobs.", alive)
        if broker.fleet:
            slots = max(broker.fleet.slots, jobs.running if jobs else 0)
            yield gauge("ai_worker_slots", "Jobs that the workers can run at a time.", slots)
