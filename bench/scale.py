"""What a fleet of workers costs MongoDB and Redis: 10 to 10,000 workers, of which most are simulated.

A simulated worker has the true keeper, sweeper and store, and connections of its own, but no pool. One process sweeps
for a whole fleet, and what that costs is measured by itself. The share of Redis, which is mostly Celery's polling, is
measured on ten real workers and multiplied.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final, cast

from bson import ObjectId
from pymongo.collection import Collection
from pymongo.write_concern import WriteConcern

from bench.contestants import OURS, Bench, Contestant
from bench.figures import Document, Figure, Goal
from bench.measurements import FIRST_SWEEP_S, OUTBOX_S, SETTLE_S, make_api_indexes
from testbed.servers import DATABASE
from worker import Attempt, Job, JobStore, Keeper, Runtime, Sweeper, configure
from workerkit.messages import Delivery
from workerkit.mongodb import ServerClock
from workerkit.process import Heartbeat
from workerkit.settings import Limits, Settings

FLEETS: Final = (10, 100, 1000, 10_000)
REAL_WORKERS, REAL_JOBS = 10, 1000
TRUE_PACE: Final = 200  # workers that one machine simulates without slowing them down
DRIVERS: Final = 4  # processes that the simulated workers share
DRIVERS_READY_S: Final = 120
WINDOW_S: Final = 40.0  # the interval of the drivers' heartbeats; a sweep's longest is 12 s
SWEEP_S: Final = 10.0  # from one sweep of a fleet to the next
SWEEPS: Final = 5
BACKLOG: Final = 10_000
IDLE, RUNNING, WAITING = "idle", "one job each", "10,000 waiting"
STATES: Final = (IDLE, RUNNING, WAITING)
SCALE_QUEUE: Final = "bench_scale"
MAX_CLIENTS: Final = 10_000  # Redis' own default
FULL: Final = 100.0  # percent of a core
UPKEEP_GOALS: Final = {1000: Goal("ours", 25.0), 10_000: Goal("ours", 200.0)}  # by workers that have one job each


# ── what the servers do ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Load:
    """What the two servers do in a second, the share of a core they need for it, and their open connections."""

    operations: float
    examined: float
    mongod_percent: float
    mongod_connections: float
    commands: float
    redis_percent: float
    redis_connections: float

    def __add__(self, other: Load) -> Load:
        return Load(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Load) -> Load:
        return Load(*(mine - theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Load:
        return Load(*(value * factor for value in astuple(self)))


def counters(bench: Bench) -> Load:
    """Return what the servers have done since their start, as they count it; CPU in percent of a core × seconds."""
    mongod, info = bench.mongo.admin.command("serverStatus"), bench.redis.info()
    operations = sum(count for count in mongod["opcounters"].values() if isinstance(count, int))
    mongod_us = mongod["extra_info"]["user_time_us"] + mongod["extra_info"]["system_time_us"]
    return Load(
        operations,
        mongod["metrics"]["queryExecutor"]["scannedObjects"],
        mongod_us / 1e6 * FULL,
        mongod["connections"]["current"],
        info["total_commands_processed"],
        (info["used_cpu_user"] + info["used_cpu_sys"]) * FULL,
        info["connected_clients"],
    )


def load(bench: Bench, seconds: float) -> Load:
    """Watch the servers for so many seconds."""
    before, began_at = counters(bench), time.monotonic()
    time.sleep(seconds)
    after = counters(bench)
    rate = (after - before) * (1 / (time.monotonic() - began_at))
    return replace(rate, mongod_connections=after.mongod_connections, redis_connections=after.redis_connections)


def workers_at(bound: float, small: tuple[int, float], large: tuple[int, float]) -> float:
    """Return how many workers cost so much.

    It follows from the costs of two fleets: a part grows with the fleet, another with its square.
    """
    (n1, cost1), (n2, cost2) = small, large
    square = max((cost2 / n2 - cost1 / n1) / (n2 - n1), 0.0)
    line = cost2 / n2 - square * n2
    return (math.sqrt(line**2 + 4 * square * bound) - line) / (2 * square) if square else bound / line


# ── simulated workers ────────────────────────────────────────────────────────────────────────────────────────────


class Beats:
    """Stands in for a keeper's heartbeat, and counts the beats in memory that the drivers share."""

    def __init__(self, total: Any) -> None:
        self._total = total

    def beat(self) -> None:
        """Count one tick."""
        with self._total.get_lock():
            self._total.value += 1


def settings_from(environment: Mapping[str, str], slower: int) -> Settings:
    """Return the settings that these variables give, with longer leases and intervals than a worker would accept."""
    values: dict[str, Any] = {name.lower(): value for name, value in environment.items()}
    return Settings(_env_file=None, **values).model_copy(
        update={"lease_seconds": 30.0 * slower, "sweep_interval": SWEEP_S * slower}
    )


def simulated_worker(number: int, settings: Settings, heartbeat: Beats, sharing: Runtime | None = None) -> Runtime:
    """Return a worker's runtime as if it had run for a while, with clients of its own or those of another runtime."""
    runtime = Runtime(settings)
    if sharing:
        runtime.mongo, runtime.redis = sharing.mongo, sharing.redis
    runtime.store = JobStore(runtime.database, f"simulated-{number}", ServerClock(runtime.database), settings)
    runtime.heartbeat = cast(Heartbeat, heartbeat)
    runtime.store.clock.read()
    runtime.notes.revoked()  # this opens the connection to Redis
    keeper, now = runtime.keeper, time.monotonic()
    runtime.preparation.has_indexes, runtime.rest.at = True, None
    keeper._renew_at = now + random.uniform(0, settings.lease_seconds / 3)
    keeper._sweep_at = now + random.uniform(0, settings.sweep_interval)
    runtime.files._next_at = now + runtime.files.EVERY_S
    return runtime


def drive_keepers(
    numbers: range, environment: Mapping[str, str], job_ids: list[str], beats: Any, barrier: Any, slower: int
) -> None:
    """Run true keepers in a process of its own: idle at first, and from the second signal on with a job each."""
    Keeper.tick_s *= slower
    settings = settings_from(environment, slower)
    configure(settings)  # for Celery's own connections
    runtimes: list[Runtime] = []
    for index, number in enumerate(numbers):
        sharing = runtimes[index // slower * slower] if index % slower else None
        runtimes.append(simulated_worker(number, settings, Beats(beats), sharing))
    for runtime in runtimes:
        time.sleep(Keeper.tick_s / len(runtimes))
        runtime.keeper.start()
    barrier.wait()
    barrier.wait()
    for runtime, job_id in zip(runtimes, job_ids, strict=True):
        job = runtime.store.claim(ObjectId(job_id), f"{job_id[8:]}", Delivery(Limits(1800, 3600)))
        assert isinstance(job, Job)
        runtime.keeper.register(Attempt(job, settings.lease_seconds))
    barrier.wait()
    threading.Event().wait()


def set_created(jobs: Collection[Document], status: str, ago: timedelta) -> None:
    """Set the time at which the jobs of a status were created."""
    jobs.update_many({"status": status}, {"$set": {"created_at": datetime.now(UTC) - ago}})


def enter_state(bench: Bench, jobs: Collection[Document], barrier: Any, state: str) -> None:
    """Let the drivers begin, claim, or find a backlog, and wait until they have."""
    if state == WAITING:
        bench.redis.lpush(SCALE_QUEUE, "a message")  # so that the queue isn't empty, and no message seems lost
        bench.insert(BACKLOG, "word " * 200, jobs)
        set_created(jobs, "pending", timedelta(minutes=5))
        return
    barrier.wait()
    if state == RUNNING:
        barrier.wait()
        set_created(jobs, "processing", timedelta(minutes=10))  # older than those that wait behind them


def hold_turn(jobs: Collection[Document], *, is_free: bool = False) -> None:
    """Take the turn of the sweeper from the simulated workers, so that they ask for it in vain, or give it back."""
    until = datetime.now(UTC) + (timedelta(0) if is_free else timedelta(minutes=50))
    turn = {"$set": {"holder": "bench", "until": until}}
    jobs.database["worker_turns"].update_one({"_id": Sweeper.TURN}, turn, upsert=True)


def watch_without_end(bench: Bench, jobs: Collection[Document]) -> None:
    """Note that nothing was cancelled, for simulated workers that read it more seldom than such a note counts."""
    bench.redis.set(f"cancelled:{SCALE_QUEUE}:{jobs.database.name}", "[]")


def sweep_load(bench: Bench, jobs: Collection[Document], sweeping: Runtime, alone: Load) -> Load:
    """Return what the sweeps of a fleet cost in a second, and its watch for cancels.

    One process does both: it sweeps every ten seconds, and looks for cancelled jobs every second.
    """
    before, began_at = counters(bench), time.monotonic()
    for _ in range(SWEEPS):
        hold_turn(jobs, is_free=True)
        sweeping.sweeper.sweep()
        hold_turn(jobs)
        for _ in range(int(SWEEP_S)):
            sweeping.sweeper.watch()
    watch_without_end(bench, jobs)
    used = counters(bench) - before - alone * (time.monotonic() - began_at)
    return used * (1 / SWEEPS / SWEEP_S)


Simulation = tuple[Callable[[str], None], Any, Callable[[Load], Load]]


@contextmanager
def simulated_fleet(bench: Bench, count: int, slower: int) -> Iterator[Simulation]:
    """Yield a function that brings so many keepers into their next state, the number of their ticks so far, and a
    function that measures the sweeps of the fleet.
    """
    context, jobs = multiprocessing.get_context("spawn"), bench.mongo[f"{DATABASE}_{SCALE_QUEUE}"]["jobs"]
    job_ids = list(bench.insert(count, collection=jobs))
    set_created(jobs, "pending", timedelta(days=-1))  # tomorrow, so that no sweep takes them for lost
    make_api_indexes(jobs)
    environment = {**bench.environment, "DATABASE_NAME": jobs.database.name, "CELERY_QUEUE_NAME": SCALE_QUEUE}
    sweeping = simulated_worker(0, settings_from(environment, slower), Beats(None))
    sweeping.store.ensure_indexes()
    sweeping.turns.register(SCALE_QUEUE)
    hold_turn(jobs)
    watch_without_end(bench, jobs)
    beats, barrier = context.Value("q", 0), context.Barrier(DRIVERS + 1, timeout=DRIVERS_READY_S)
    drivers = [
        context.Process(
            target=drive_keepers,
            args=(range(count)[index::DRIVERS], environment, job_ids[index::DRIVERS], beats, barrier, slower),
        )
        for index in range(DRIVERS)
    ]
    try:
        for driver in drivers:
            driver.start()
        yield partial(enter_state, bench, jobs, barrier), beats, partial(sweep_load, bench, jobs, sweeping)
    finally:
        for driver in drivers:
            driver.kill()
            driver.join()
        bench.redis.delete(SCALE_QUEUE, f"cancelled:{SCALE_QUEUE}:{jobs.database.name}")
        bench.mongo.drop_database(jobs.database.name)


def simulate(bench: Bench, count: int, alone: Load) -> dict[str, Load]:
    """Return what so many keepers cost in each state.

    This machine's cores can't simulate a large fleet. So that runs slower, as many times as runtimes share a
    connection, and what it costs is multiplied. The sweeps, of which there are few, are measured at their own pace.
    """
    loads: dict[str, Load] = {}
    slower = max(1, count // TRUE_PACE)
    with simulated_fleet(bench, count, slower) as (enter, beats, measure_sweeps):
        for state in STATES:
            enter(state)
            ticks_before = beats.value
            keepers = (load(bench, WINDOW_S) - alone) * slower
            loads[state] = keepers + measure_sweeps(alone)
            done = (beats.value - ticks_before) * slower * Keeper.tick_s / (count * WINDOW_S)
            print(f"       {count:,} workers, {state}: {done:.0%} of the ticks", file=sys.stderr, flush=True)
    return loads


# ── real workers ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Fleet:
    """What real workers cost: each of them while it is idle and while it runs a job, and a job that passes through."""

    idle: Load
    busy: Load
    job: Load
    job_bytes: float


def data_bytes(bench: Bench) -> float:
    """Return the memory of Redis without the buffers of its connections, some of which are opened by the first jobs."""
    info = bench.redis.info("memory")
    return float(info["used_memory"] - info["mem_clients_normal"])


def per_job_load(bench: Bench, contestant: Contestant, idle: Load) -> tuple[Load, float]:
    """Return what a job costs from the API's insert to its last notice, without upkeep; and Redis' memory in bytes."""
    before, bytes_before, began_at = counters(bench), data_bytes(bench), time.monotonic()
    jobs = bench.submit(contestant, REAL_JOBS)
    bench.wait_for(jobs, "completed", timeout_s=120)
    time.sleep(OUTBOX_S)
    used = counters(bench) - before - idle * (time.monotonic() - began_at)
    return used * (1 / REAL_JOBS), (data_bytes(bench) - bytes_before) / REAL_JOBS


def real_fleet(bench: Bench, alone: Load) -> Fleet:
    """Measure a few real workers (prefork, a child each), whose sweeps have begun."""
    database, each = f"{DATABASE}_{SCALE_QUEUE}", 1 / REAL_WORKERS
    contestant = replace(OURS, queue=SCALE_QUEUE, settings={"DATABASE_NAME": database})
    with ExitStack() as stack:
        stack.callback(bench.mongo.drop_database, database)
        workers = [stack.enter_context(bench.worker(contestant, ready=False)) for _ in range(REAL_WORKERS)]
        for worker in workers:
            worker.wait_ready(60)
        bench.wait_for(bench.submit(contestant, REAL_JOBS // 10), "completed")
        time.sleep(FIRST_SWEEP_S)
        idle = load(bench, WINDOW_S) - alone
        job, job_bytes = per_job_load(bench, contestant, idle)
        jobs = bench.submit(contestant, REAL_WORKERS, f"[delay {WINDOW_S * 2}] Tell.")
        bench.wait_for(jobs, "processing")
        time.sleep(OUTBOX_S)
        return Fleet(idle * each, (load(bench, WINDOW_S) - alone) * each, job, job_bytes)


def journalled_writes(bench: Bench, writers: int) -> float:
    """Return the writes a second, each confirmed once it is in the journal, by so many writers at a time."""
    jobs = bench.mongo[DATABASE].get_collection("journal", write_concern=WriteConcern("majority", j=True))
    until = time.monotonic() + SETTLE_S

    def write(number: int) -> int:
        for count in itertools.count(1):
            jobs.update_one({"_id": number}, {"$inc": {"count": 1}}, upsert=True)
            if time.monotonic() > until:
                return count
        raise AssertionError

    with ThreadPoolExecutor(writers) as pool:
        return sum(pool.map(write, range(writers))) / SETTLE_S


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────


def fleet_figures(loads: Mapping[int, Mapping[str, Load]], real: Fleet) -> list[Figure]:
    """Return a fleet's upkeep: MongoDB's from the simulation, Redis' (which is Celery's polling) from real workers."""
    figures = []
    for count, states in loads.items():
        pace = f", simulated {count // TRUE_PACE} times slower" if count > TRUE_PACE else ""
        for state, cost in states.items():
            name, note = f"{count:,} workers, {state}", f"{cost.examined:,.0f} documents examined a second{pace}"
            figures.append(Figure(f"{name}: MongoDB operations", "/s", [cost.operations], note=note))
            goal = UPKEEP_GOALS.get(count) if state == RUNNING else None
            figures.append(Figure(f"{name}: mongod", "% of a core", [cost.mongod_percent], goal=goal))
        figures += [
            Figure(f"{count:,} workers: MongoDB connections", "", [real.busy.mongod_connections * count]),
            Figure(f"{count:,} workers: Redis commands", "/s", [real.idle.commands * count]),
            Figure(f"{count:,} workers: Redis", "% of a core", [real.idle.redis_percent * count]),
            Figure(f"{count:,} workers: Redis connections", "", [real.busy.redis_connections * count]),
        ]
    note = f"connections, and all of Redis: {REAL_WORKERS} real workers' share, multiplied"
    return [*figures[:-1], replace(figures[-1], note=note)]


def wall_figures(loads: Mapping[int, Mapping[str, Load]], real: Fleet) -> list[Figure]:
    """Return how many workers fill a server, and how many jobs a second."""
    small, large = ((count, loads[count][RUNNING].mongod_percent) for count in FLEETS[2:])
    return [
        Figure("workers that fill a core of mongod", "", [workers_at(FULL, small, large)], note="one job each"),
        Figure("workers that fill Redis' core", "", [FULL / real.idle.redis_percent], note="idle: they poll"),
        Figure("workers that fill Redis' maxclients", "", [MAX_CLIENTS / real.busy.redis_connections]),
        Figure("mongod per job", "ms", [real.job.mongod_percent * 10]),
        Figure("Redis per job", "ms", [real.job.redis_percent * 10]),
        Figure("jobs that fill a core of mongod", "/s", [FULL / real.job.mongod_percent], note="without upkeep"),
        Figure("jobs that fill Redis' core", "/s", [FULL / real.job.redis_percent], note="without upkeep"),
        Figure("Redis' memory per job", "bytes", [real.job_bytes], note="its result, for a day"),
    ]


def scale(bench: Bench) -> list[Figure]:
    """What 10 to 10,000 workers cost MongoDB and Redis.

    It also says how many workers fill them. Without a name of a measurement it runs only with `--long`.
    """
    alone = load(bench, WINDOW_S)
    real = real_fleet(bench, alone)
    loads = {count: simulate(bench, count, alone) for count in FLEETS}
    idle, busy = (loads[FLEETS[0]][state].operations / FLEETS[0] for state in (IDLE, RUNNING))
    many, one = [journalled_writes(bench, 32)], [journalled_writes(bench, 1)]
    return [
        Figure("MongoDB operations of an idle worker", "/s", [real.idle.operations], "simulated", [idle]),
        Figure("MongoDB operations of a worker with a job", "/s", [real.busy.operations], "simulated", [busy]),
        *fleet_figures(loads, real),
        *wall_figures(loads, real),
        Figure("journalled writes, 32 at a time", "/s", many, "1", one),
    ]
