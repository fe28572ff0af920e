"""What is measured of the worker, against a bare Celery task that does the same by hand.

Each figure is compared within one run: rounds of the contestants alternate, the table has medians with the lowest and
highest round, and the ratio is the median of each round's own ratio. Absolute figures belong to this machine at this
moment; ratios apply to other machines as well.

Each measurement is a command of `python -m bench`, and the first sentence of its docstring is its help.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import statistics
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import psutil
from pymongo.collection import Collection

from bench import BARE_QUEUE, MODEL
from bench.contestants import (
    BARE,
    BODY,
    NOOP,
    OURS,
    PROMPT,
    STOCK,
    STREAMING,
    WARM_UP_JOBS,
    Bench,
    Contestant,
    in_threads,
)
from bench.figures import Document, Figure, Goal
from bench.keeper_thread import KEEPER_FILE
from testbed.api import CHANNELS, PROGRESS_CHANNEL, WorkerProcess
from testbed.processes import poll
from testbed.servers import DATABASE
from worker import Keeper, Runtime, Sweeper, configure
from workerkit.settings import Settings

Measurement = Callable[[Bench], list[Figure]]

OUR_APPLICATION: Final = "ai-backend-worker"  # the name of our connections to MongoDB
REST_S: Final = 0.2  # for the last acknowledgement and the last event
SETTLE_S: Final = 3.0
OUTBOX_S: Final = Keeper.tick_s + 0.5  # at each tick the keeper marks in MongoDB which notices were published
FIRST_SWEEP_S: Final = 32.0  # a worker process doesn't sweep before the time of one lease has passed, which is 30 s


# ── races ────────────────────────────────────────────────────────────────────────────────────────────────────────


def alternate(contestants: tuple[Contestant, ...], rounds: int) -> Iterator[Contestant]:
    """Yield every contestant once a round, each time in another order."""
    for _ in range(rounds):
        yield from random.sample(contestants, len(contestants))


@contextmanager
def filled_queue(
    bench: Bench, contestant: Contestant, worker: WorkerProcess, count: int, prompt: str = PROMPT
) -> Iterator[dict[str, Document]]:
    """Fill a worker's queue while the worker is paused. It continues when the body of the `with` statement begins."""
    os.killpg(worker.process.pid, signal.SIGSTOP)
    jobs = bench.submit(contestant, count, prompt)
    try:
        if contestant.task == NOOP.task:  # which publishes nothing, so one job that does is put behind the others
            jobs = bench.submit(BODY)
        os.killpg(worker.process.pid, signal.SIGCONT)
        yield jobs
    finally:
        time.sleep(REST_S)


def drain_s(bench: Bench, contestant: Contestant, worker: WorkerProcess, count: int, prompt: str = PROMPT) -> float:
    """Return the seconds in which a worker empties a queue that was filled while it was paused."""
    with filled_queue(bench, contestant, worker, count, prompt) as jobs:
        started_at, status = time.monotonic(), "processing" if contestant.task == NOOP.task else "completed"
        return bench.wait_for(jobs, status, timeout_s=max(60.0, float(count))) - started_at


def jobs_per_second(bench: Bench, contestant: Contestant, worker: WorkerProcess, count: int) -> float:
    """Return the speed at which a worker empties a queue that was filled while it was paused."""
    return count / drain_s(bench, contestant, worker, count)


def processes(worker: WorkerProcess) -> list[psutil.Process]:
    """Return a worker's process and its children."""
    parent = psutil.Process(worker.process.pid)
    return [parent, *parent.children(recursive=True)]


def cpu_s(worker: WorkerProcess) -> float:
    """Return the CPU seconds that a worker and its children have used so far, including children that have ended."""
    times = [process.cpu_times() for process in processes(worker)]
    return float(sum(time.user + time.system + time.children_user + time.children_system for time in times))


def throughput(bench: Bench) -> list[Figure]:
    """Jobs a second, and CPU time a job.

    A worker does one job at a time, and the provider answers 20 words at once.
    """
    contestants, count = (OURS, BARE, STREAMING, NOOP), bench.options.jobs
    speeds: dict[str, list[float]] = {contestant.label: [] for contestant in contestants}
    costs: dict[str, list[float]] = {contestant.label: [] for contestant in contestants}
    with bench.warm_workers() as workers:
        for contestant in alternate(contestants, bench.options.rounds):
            worker = workers[contestant.queue]
            cpu_before_s = cpu_s(worker)
            speeds[contestant.label].append(jobs_per_second(bench, contestant, worker, count))
            costs[contestant.label].append((cpu_s(worker) - cpu_before_s) / count * 1000)
    figures = []
    for rival in contestants[1:]:
        goal = Goal("ratio", 1.0, at_least=True) if rival is BARE else None
        figures.append(Figure("throughput", "jobs/s", speeds[OURS.label], rival.label, speeds[rival.label], goal))
        figures.append(Figure("CPU per job", "ms", costs[OURS.label], rival.label, costs[rival.label]))
    return sorted(figures, key=lambda figure: figure.name, reverse=True)


# ── latency and start ────────────────────────────────────────────────────────────────────────────────────────────

LATENCY_JOBS: Final = 100


def wait_ms(bench: Bench, contestant: Contestant) -> float:
    """Submit one job to an idle worker; return the milliseconds until its notice `processing`."""
    jobs = bench.insert()
    time.sleep(random.uniform(0.005, 0.025))
    sent_at = time.monotonic()
    bench.send(contestant, jobs)
    started_at = bench.wait_for(jobs, "processing")
    if contestant is OURS:
        bench.wait_for(jobs, "completed")
    return (started_at - sent_at) * 1000


def latency(bench: Bench) -> list[Figure]:
    """From submit to the notice `processing` on an idle worker.

    With bare Celery the time ends at the first line of its task.
    """
    medians: dict[str, list[float]] = {OURS.label: [], BODY.label: []}
    p99s: dict[str, list[float]] = {OURS.label: [], BODY.label: []}
    with bench.warm_workers():
        for contestant in alternate((OURS, BODY), bench.options.rounds):
            waits = [wait_ms(bench, contestant) for _ in range(LATENCY_JOBS)]
            medians[contestant.label].append(statistics.median(waits))
            p99s[contestant.label].append(statistics.quantiles(waits, n=100)[98])
    names = {"submit to processing, median": (medians, 5), "submit to processing, p99": (p99s, 15)}
    return [
        Figure(name, "ms", waits[OURS.label], BODY.label, waits[BODY.label], Goal("difference", max_ms))
        for name, (waits, max_ms) in names.items()
    ]


def start_times(bench: Bench, contestant: Contestant) -> tuple[float, ...]:
    """Start a worker; return the seconds until it is ready, has started a waiting job, and has completed it."""
    jobs, started_at = bench.submit(contestant), time.monotonic()
    with bench.worker(contestant, ready=False) as worker:
        poll(lambda: " ready." in worker.text(), 30, 0.003, "worker ready")
        moments = (time.monotonic(), bench.wait_for(jobs, "processing"), bench.wait_for(jobs, "completed"))
        time.sleep(REST_S)
    return tuple(moment - started_at for moment in moments)


def cold_start(bench: Bench) -> list[Figure]:
    """From the start of the process to the end of its first job.

    Also until it is ready, and until it has started the job, which waits in the queue.
    """
    times: dict[str, list[tuple[float, ...]]] = {OURS.label: [], STOCK.label: []}
    for contestant in alternate((OURS, STOCK), bench.options.rounds):
        times[contestant.label].append(start_times(bench, contestant))
    names = ("start to ready", "start to first job taken", "start to first job done")
    ours, stock = (list(zip(*times[label], strict=True)) for label in (OURS.label, STOCK.label))
    goals = (Goal("ratio", 0.7), None, None)
    return [Figure(names[i], "s", list(ours[i]), STOCK.label, list(stock[i]), goals[i]) for i in range(len(names))]


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────

MEMORY_JOBS: Final = 400
FEW_JOBS, MANY_JOBS, BATCH_JOBS = 100, 10_000, 500


def pss_mib(worker: WorkerProcess) -> float:
    """Return the memory of a worker and its children. What processes share is divided among them (on Linux)."""
    infos = [process.memory_full_info() for process in processes(worker)]
    return float(sum(getattr(info, "pss", info.uss) for info in infos)) / 2**20


def memory(bench: Bench) -> list[Figure]:
    """Memory of a worker's processes, idle and after jobs.

    It is the sum of their proportional shares (PSS), in one round.
    """
    figures, done = [], 0
    with bench.worker(OURS) as ours, bench.worker(STOCK) as stock:
        time.sleep(SETTLE_S)
        for count in (0, bench.options.jobs, MEMORY_JOBS):
            for contestant, worker in ((OURS, ours), (STOCK, stock)) if count else ():
                jobs_per_second(bench, contestant, worker, count)
            done += count
            name = f"memory after {done} jobs" if done else "memory, idle"
            goal = None if done else Goal("ratio", 1.1)
            figures.append(Figure(name, "MiB", [pss_mib(ours)], STOCK.label, [pss_mib(stock)], goal))
    return figures


def memory_growth(bench: Bench) -> list[Figure]:
    """Memory of one child after 10,000 jobs, and after 100.

    Without a name of a measurement it runs only with `--long`.
    """
    with bench.worker(OURS) as worker:
        drain_s(bench, OURS, worker, FEW_JOBS)
        before_mib, child = pss_mib(worker), worker.children()
        for _ in range(MANY_JOBS // BATCH_JOBS):
            drain_s(bench, OURS, worker, BATCH_JOBS)
        note = "" if worker.children() == child else "the child was another one in the end"
        after = [pss_mib(worker)]
    name = f"memory after {MANY_JOBS:,} jobs"
    return [Figure(name, "MiB", after, f"after {FEW_JOBS}", [before_mib], Goal("ratio", 1.1), note)]


# ── many jobs at a time ──────────────────────────────────────────────────────────────────────────────────────────

CROWD: Final = 100
THOUSAND: Final = 1000
THOUSAND_LEASE_S: Final = 30
SAMPLE_S: Final = 0.25


def crowd(bench: Bench) -> list[Figure]:
    """A hundred jobs at the same time in one process.

    The process has a hundred threads, and each job takes a second at the provider.
    """
    ours, bare_one = in_threads(OURS, CROWD), in_threads(BARE, CROWD)
    times: dict[str, list[float]] = {ours.label: [], bare_one.label: []}
    with bench.worker(ours) as our_worker, bench.worker(bare_one) as bare_worker:
        workers = {ours.label: our_worker, bare_one.label: bare_worker}
        for contestant in (ours, bare_one):
            drain_s(bench, contestant, workers[contestant.label], WARM_UP_JOBS)
        for contestant in alternate((ours, bare_one), bench.options.rounds):
            took_s = drain_s(bench, contestant, workers[contestant.label], CROWD, "[delay 1] Tell me something.")
            times[contestant.label].append(took_s)
        sizes = {label: [pss_mib(worker)] for label, worker in workers.items()}
    label = "bare, threads pool"
    return [
        Figure("100 jobs of 1 s", "s", times[ours.label], label, times[bare_one.label], Goal("ratio", 0.5)),
        Figure("memory after these", "MiB", sizes[ours.label], label, sizes[bare_one.label], Goal("ours", 150)),
    ]


@contextmanager
def sampling(look: Callable[[], float | None]) -> Iterator[list[float]]:
    """Call a function again and again in a thread, and yield the list of what it has returned."""
    seen: list[float] = []
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(SAMPLE_S):
            value = look()
            if value is not None:
                seen.append(value)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def calls_at(provider_url: str) -> list[Document]:
    """Return all calls that a provider has had."""
    with urllib.request.urlopen(f"{provider_url.removesuffix('/v1')}/calls", timeout=60) as answer:
        calls: list[Document] = json.load(answer)
    return calls


def max_at_once(calls: Iterable[Document]) -> int:
    """Return how many calls ran at the same time, at most."""
    moments = sorted((call[edge], step) for call in calls for edge, step in (("started_at", 1), ("ended_at", -1)))
    return max(itertools.accumulate(step for _, step in moments))


def shortest_lease_s(bench: Bench) -> float | None:
    """Return the seconds that are left of the running jobs' shortest lease, or None if no job runs."""
    soonest = {"$group": {"_id": None, "at": {"$min": "$worker.lease_until"}}}
    found = list(bench.jobs.aggregate([{"$match": {"status": "processing"}}, soonest]))
    return (found[0]["at"] - datetime.now(UTC)).total_seconds() if found else None


def thousand(bench: Bench) -> list[Figure]:
    """A thousand jobs at the same time in one process.

    Measures time and memory, and whether leases are renewed in time and each job is generated once.
    """
    lease_s, delay_s = THOUSAND_LEASE_S, 75 if bench.options.long else 35
    with bench.provider() as url, keeper_watched(bench, in_threads(OURS, THOUSAND)) as (contestant, keeper_cpu_s):
        settings = {"LEASE_SECONDS": str(lease_s), "SWEEP_INTERVAL": "1", "OPENAI_BASE_URL": url}
        contestant = replace(contestant, settings={**contestant.settings, **settings})
        with bench.worker(contestant) as worker:
            with sampling(lambda: shortest_lease_s(bench)) as leases_s, sampling(lambda: pss_mib(worker)) as sizes_mib:
                cpu_before_s = keeper_cpu_s()
                took_s = drain_s(bench, contestant, worker, THOUSAND, f"[delay {delay_s}] Tell me something.")
                keeper_share = (keeper_cpu_s() - cpu_before_s) / took_s * 100
        calls = calls_at(url)
    goal = Goal("ours", lease_s / 3, at_least=True)
    note = f"{max_at_once(calls)} calls at the provider at once; each job takes {delay_s} s there"
    return [
        Figure("1,000 in flight", "s", [took_s], "one job", [float(delay_s)], note=note),
        Figure("1,000 in flight: memory", "MiB", [max(sizes_mib)]),
        Figure(f"1,000: least left of a {lease_s} s lease", "s", [min(leases_s)], goal=goal),
        Figure("1,000: calls per job", "", [len(calls) / THOUSAND], goal=Goal("ours", 1.0)),
        Figure("1,000: keeper's CPU", "% of a core", [keeper_share]),
    ]


# ── streamed text ────────────────────────────────────────────────────────────────────────────────────────────────

WORDS: Final = 30  # first words in a round
STREAM_WORDS, STREAM_PACE_S = 250, 0.02
BATCH_S: Final = 0.05  # how long the worker gathers streamed text
STREAM_ROUNDS: Final = 2


def word_on_the_wire(url: str, prompt: str) -> float:
    """Make the call without any client; return when the first word came out of the socket (Unix time)."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "stream": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        next(line for line in answer if b'"content": "' in line and b'"content": ""' not in line)
        came_at = time.time()
        answer.read()
    return came_at


def first_words(bench: Bench, url: str) -> dict[str, dict[str, float]]:
    """Return when the first word of each prompt arrived (Unix time): at the subscriber, and on the provider's wire."""
    arrived: dict[str, dict[str, float]] = {OURS.label: {}, "wire": {}}
    with bench.worker(replace(OURS, settings={"OPENAI_BASE_URL": url})):
        bench.wait_for(bench.submit(OURS, WARM_UP_JOBS), "completed")
        with bench.api.subscribed(PROGRESS_CHANNEL) as progress:
            for number in range(bench.options.rounds * WORDS):
                ours, wire = (f"[tokens 10] [pace 0.005] {number} {label}" for label in arrived)
                progress.drain()  # the last words of the job before
                jobs = bench.submit(OURS, prompt=ours)
                progress.read(10.0)
                arrived[OURS.label][ours] = time.time()
                bench.wait_for(jobs, "completed")
                arrived["wire"][wire] = word_on_the_wire(url, wire)
    return arrived


def first_word(bench: Bench) -> list[Figure]:
    """From the call at the provider to the first streamed word.

    The word is seen at the subscriber, and on the provider's wire.
    """
    with bench.provider() as url:
        arrived = first_words(bench, url)
        called = {call["prompt"]: call["started_at"] for call in calls_at(url)}
    rounds = {}
    for label, moments in arrived.items():
        waits = [(at - called[prompt]) * 1000 for prompt, at in moments.items()]
        rounds[label] = [statistics.median(waits[i : i + WORDS]) for i in range(0, len(waits), WORDS)]
    return [Figure("first word", "ms", rounds[OURS.label], "the wire", rounds["wire"], Goal("difference", 60))]


def stream_to_a_listener(bench: Bench, contestant: Contestant) -> tuple[float, float, float]:
    """Return cores used, pieces of text published a second, and words a second that the provider sent."""
    with bench.worker(contestant) as worker, bench.api.subscribed(*CHANNELS) as messages:
        drain_s(bench, contestant, worker, WARM_UP_JOBS)
        prompt, pieces = f"[tokens {STREAM_WORDS}] [pace {STREAM_PACE_S}] {time.monotonic_ns()}", 0
        messages.drain()
        with filled_queue(bench, contestant, worker, CROWD, prompt) as jobs:
            cpu_before_s, started_at, running = cpu_s(worker), time.monotonic(), set(jobs)
            while running and time.monotonic() < started_at + 120:
                message = messages.read(1.0) or {}
                pieces += message.get("type") == "job_progress"
                if message.get("status") == "completed":
                    running.discard(message["job_id"])
            took_s = time.monotonic() - started_at
            return (cpu_s(worker) - cpu_before_s) / took_s, pieces / took_s, CROWD * STREAM_WORDS / took_s


def streaming(bench: Bench) -> list[Figure]:
    """A hundred streamed answers at the same time.

    Each has 50 words a second, and a subscriber receives them all.
    """
    ours = [stream_to_a_listener(bench, in_threads(OURS, CROWD)) for _ in range(STREAM_ROUNDS)]
    other = [stream_to_a_listener(bench, in_threads(STREAMING, CROWD)) for _ in range(STREAM_ROUNDS)]
    cores, pieces, words = (list(values) for values in zip(*ours, strict=True))
    their_cores, _, their_words = (list(values) for values in zip(*other, strict=True))
    label = "bare, publishing no text"
    return [
        Figure("100 streams", "cores", cores, label, their_cores, Goal("ours", 1.0)),
        Figure("100 streams: words", "words/s", words, label, their_words),
        Figure("100 streams: messages", "messages/s", pieces, goal=Goal("ours", CROWD / BATCH_S)),
    ]


# ── what the servers do for a job ────────────────────────────────────────────────────────────────────────────────

NOTEWORTHY: Final = 0.05  # operations a job
WRITES: Final = frozenset({"insert", "update", "remove", "findAndModify", "findandmodify"})


def per_job(counts: Counter[str], jobs: int) -> dict[str, float]:
    """Return the counts divided by the number of jobs, the largest first."""
    return {name: round(count / jobs, 2) for name, count in counts.most_common()}


def difference_named(ours: Mapping[str, float], other: Mapping[str, float]) -> str:
    """Name what ours does more or less often than the other for a job."""
    names = [*ours, *(name for name in other if name not in ours)]
    differences = {name: ours.get(name, 0.0) - other.get(name, 0.0) for name in names}
    return ", ".join(f"{name} {d:+.2f}" for name, d in differences.items() if abs(d) >= NOTEWORTHY) or "nothing"


def count_commands(bench: Bench) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Return MongoDB's operations and Redis' commands for a job, by contestant and kind."""
    on_mongodb, on_redis, count = {}, {}, bench.options.jobs
    with bench.warm_workers() as workers:
        for contestant, name in ((OURS, OUR_APPLICATION), (BARE, BARE_QUEUE), (NOOP, BARE_QUEUE)):
            with bench.counting_mongodb(name, DATABASE) as operations, bench.counting_redis() as redis_commands:
                drain_s(bench, contestant, workers[contestant.queue], count)
                time.sleep(OUTBOX_S)
            on_mongodb[contestant.label] = per_job(operations, count)
            on_redis[contestant.label] = per_job(redis_commands, count)
    return on_mongodb, on_redis


def commands(bench: Bench) -> list[Figure]:
    """MongoDB operations and Redis commands for a job.

    The servers count them. A task that does nothing shows Celery's own.
    """
    on_mongodb, on_redis = count_commands(bench)
    ours, other = on_mongodb[OURS.label], on_mongodb[BARE.label]
    reads, their_reads = ({n: c for n, c in counts.items() if n not in WRITES} for counts in (ours, other))
    writes, their_writes = ({n: c for n, c in counts.items() if n in WRITES} for counts in (ours, other))
    figures = [
        Figure(f"MongoDB {name} per job", "", [sum(mine.values())], BARE.label, [sum(their.values())], goal, note)
        for name, mine, their, goal, note in (
            ("writes", writes, their_writes, Goal("ours", 2.1), difference_named(writes, their_writes)),
            ("reads", reads, their_reads, Goal("ours", 0.1), difference_named(reads, their_reads)),
        )
    ]
    mine = on_redis[OURS.label]
    for label in (BARE.label, NOOP.label):
        totals, note = (sum(mine.values()), sum(on_redis[label].values())), difference_named(mine, on_redis[label])
        figures.append(Figure("Redis commands per job", "", [totals[0]], label, [totals[1]], note=note))
    return figures


# ── what an idle process costs ───────────────────────────────────────────────────────────────────────────────────

IDLE, BUSY = "idle", "100 running"


@contextmanager
def keeper_watched(bench: Bench, contestant: Contestant) -> Iterator[tuple[Contestant, Callable[[], float]]]:
    """Yield the contestant with a module inside that names its keeper's thread, and what returns its CPU seconds."""
    file = bench.folder / f"keeper-{time.monotonic_ns()}"

    def keeper_cpu_s() -> float:
        poll(file.exists, 20, description="the keeper's thread id")
        process, thread = file.read_text().split()
        return int(Path(f"/proc/{process}/task/{thread}/schedstat").read_text().split()[0]) / 1e9

    inside = {"HANDLER_MODULES": "bench.keeper_thread", KEEPER_FILE: str(file)}
    yield replace(contestant, settings={**contestant.settings, **inside}), keeper_cpu_s


def cpu_percent(seconds: float, looks: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Return by name how much of a core was used meanwhile, from functions that return the CPU seconds so far."""
    before_s, began_at = {name: look() for name, look in looks.items()}, time.monotonic()
    time.sleep(seconds)
    took_s = time.monotonic() - began_at
    return {name: (look() - before_s[name]) / took_s * 100 for name, look in looks.items()}


def rates(operations: Counter[str], seconds: float) -> str:
    """Return each kind of operation with its number a second."""
    return ", ".join(f"{kind} {count / seconds:.2f}/s" for kind, count in sorted(operations.items())) or "none"


def watch_upkeep(bench: Bench, seconds: float) -> tuple[dict[str, float], dict[str, Counter[str]]]:
    """Run an idle and a busy worker of ours and a bare one; return the CPU used, and MongoDB's operations of ours."""
    limits = {"CELERY_SOFT_TIME_LIMIT": "300", "CELERY_TIME_LIMIT": "330"}  # no job ends while it is watched
    many, counts = in_threads(replace(OURS, settings=limits), CROWD), {}
    databases = {name: f"{DATABASE}_{name.replace(' ', '_')}" for name in (IDLE, BUSY)}
    with ExitStack() as stack:
        looks = {BARE.label: partial(cpu_s, stack.enter_context(bench.worker(BARE)))}
        for name, database in databases.items():
            apart = replace(many, queue=f"bench_{name}", settings={**many.settings, "DATABASE_NAME": database})
            watched, looks[f"keeper, {name}"] = stack.enter_context(keeper_watched(bench, apart))  # type: ignore[assignment]
            looks[name] = partial(cpu_s, stack.enter_context(bench.worker(watched)))
            if name == BUSY:
                jobs = bench.submit(watched, CROWD, f"[delay {FIRST_SWEEP_S + seconds + 20}] Tell.")
                bench.wait_for(jobs, "processing")
        time.sleep(FIRST_SWEEP_S)
        for name, database in databases.items():
            counts[name] = stack.enter_context(bench.counting_mongodb(OUR_APPLICATION, database))
        used = cpu_percent(seconds, looks)
    return used, counts


def upkeep(bench: Bench) -> list[Figure]:
    """What leases, sweeper and outbox cost a process.

    Measures the CPU time of their thread, and MongoDB operations.
    """
    seconds = 60.0 if bench.options.long else 20.0
    used, counts = watch_upkeep(bench, seconds)
    figures = []
    for name, max_percent, max_operations in ((IDLE, 1.0, 1.0), (BUSY, 3.0, 2.0)):
        operations, note = sum(counts[name].values()) / seconds, rates(counts[name], seconds)
        goals = Goal("ours", max_percent), Goal("ours", max_operations)
        figures += [
            Figure(f"keeper's CPU, {name}", "% of a core", [used[f"keeper, {name}"]], goal=goals[0]),
            Figure(f"MongoDB operations, {name}", "/s", [operations], goal=goals[1], note=note),
        ]
    return [*figures, Figure("CPU of an idle worker", "% of a core", [used[IDLE]], BARE.label, [used[BARE.label]])]


# ── old jobs ─────────────────────────────────────────────────────────────────────────────────────────────────────


def fill_with_old_jobs(jobs: Collection[Document], count: int) -> None:
    """Let the server make jobs that have ended, each a second older than the one before."""
    ended = {"worker": {"owner": "0123456789abcdef", "node": "gone-01234567", "pid": 4711, "attempt": 1}}
    then = {"$subtract": ["$$NOW", "$age_ms"]}
    dates = {"created_at": then, "updated_at": then, "started_at": then, "completed_at": then}
    words = {"output_data": {"generated_text": "word " * 40, "model_used": MODEL, "tokens_used": 60}}
    failed = {"$eq": [{"$mod": ["$number", 10]}, 0]}
    jobs.database.aggregate(
        [
            {"$documents": [{"thousand": {"$range": [0, count // 1000]}}]},
            {"$unwind": "$thousand"},
            {"$project": {"thousand": 1, "one": {"$range": [0, 1000]}}},
            {"$unwind": "$one"},
            {"$project": {"number": {"$add": ["$one", {"$multiply": ["$thousand", 1000]}]}}},
            {"$addFields": {"age_ms": {"$multiply": [{"$add": ["$number", 60]}, 1000]}}},
            {"$project": {"_id": 0, **dates, **ended, **words, "status": {"$cond": [failed, "failed", "completed"]}}},
            {"$addFields": {"user_id": "u", "session_id": None, "job_type": "text_generation"}},
            {"$out": jobs.name},
        ]
    )


def make_api_indexes(jobs: Collection[Document]) -> None:
    """Make the indexes that the API makes."""
    for keys in ("user_id", "status", "job_type", "created_at"):
        jobs.create_index(keys)
    jobs.create_index([("user_id", 1), ("created_at", 1)])


def add_live_jobs(jobs: Collection[Document], count: int) -> None:
    """Add jobs that run or wait, so that every query of a sweep has documents to examine."""
    now = datetime.now(UTC)
    lease = {"owner": "fedcba9876543210", "node": "live", "pid": 1, "lease_until": now + timedelta(hours=1)}
    held = {"status": "processing", "started_at": now, "worker": {**lease, "attempt": 1}}
    common = {"created_at": now, "updated_at": now, "user_id": "u", "job_type": "text_generation"}
    jobs.insert_many([{**common, **held} for _ in range(count)])
    jobs.insert_many([{**common, "status": "pending"} for _ in range(count)])


def sweep_ms(sweeper: Sweeper, count: int) -> float:
    """Return the median of so many sweeps, none of which may find anything to do."""
    times = []
    for _ in range(count):
        started_at = time.perf_counter()
        done = sweeper.sweep()
        times.append((time.perf_counter() - started_at) * 1000)
        assert not done, done
    return statistics.median(times)


def old_jobs(bench: Bench) -> list[Figure]:
    """A sweep with 200,000 old documents, and one without.

    With `--long` there are 1,000,000.
    """
    count = 1_000_000 if bench.options.long else 200_000
    runtimes: dict[str, Runtime] = {}
    for name in ("none", "old"):
        values: dict[str, Any] = {key.lower(): value for key, value in bench.environment.items()}
        settings = Settings(_env_file=None, **{**values, "database_name": f"{DATABASE}_{name}"})
        runtimes[name] = configure(settings)
    fill_with_old_jobs(bench.mongo[f"{DATABASE}_old"]["jobs"], count)
    for name, runtime in runtimes.items():
        make_api_indexes(bench.mongo[f"{DATABASE}_{name}"]["jobs"])
        runtime.store.ensure_indexes()
    for name, runtime in runtimes.items():  # right before the sweeps, since those that wait for a minute are rescued
        add_live_jobs(bench.mongo[f"{DATABASE}_{name}"]["jobs"], CROWD)
        sweep_ms(runtime.sweeper, FEW_JOBS)
    times: dict[str, list[float]] = {name: [] for name in runtimes}
    for _ in range(bench.options.rounds):
        for name in random.sample(sorted(runtimes), len(runtimes)):
            times[name].append(sweep_ms(runtimes[name].sweeper, FEW_JOBS))
    for name, runtime in runtimes.items():
        bench.mongo.drop_database(f"{DATABASE}_{name}")
        runtime.close()
    return [Figure(f"sweep, {count:,} old jobs", "ms", times["old"], "no old jobs", times["none"], Goal("ratio", 1.1))]


# ── recovery ─────────────────────────────────────────────────────────────────────────────────────────────────────

CHILD_ROUNDS: Final = 3
VISIBILITY_TIMEOUT_S: Final = 3600.0  # Celery's on Redis; the measurement doesn't wait for it
REDELIVERED_LATE: Final = "redelivered after an hour (visibility_timeout)"


def seconds_to_recover(bench: Bench, contestant: Contestant, *, whole: bool) -> float:
    """Kill a worker's child while it runs a job, or the whole worker while another one stands by."""
    with ExitStack() as stack:
        victim = stack.enter_context(bench.worker(contestant))
        bench.wait_for(bench.submit(contestant), "completed")
        jobs = bench.submit(contestant, prompt=f"[delay 300 times=1] {time.monotonic_ns()}")
        bench.wait_for(jobs, "processing")
        time.sleep(REST_S)  # the provider has the call, so that only the second one is answered at once
        if whole:
            stack.enter_context(bench.worker(contestant))
        killed_at = time.monotonic()
        if whole:
            victim.kill()
        else:
            os.kill(victim.children()[0], signal.SIGKILL)
        return bench.wait_for(jobs, "completed", timeout_s=120) - killed_at


def recovery(bench: Bench) -> list[Figure]:
    """From kill -9 until another attempt has done the job.

    The lease is the default one. A child is killed in several rounds, the whole worker in one.
    """
    child: dict[str, list[float]] = {OURS.label: [], STOCK.label: []}
    for contestant in alternate((OURS, STOCK), min(bench.options.rounds, CHILD_ROUNDS)):
        child[contestant.label].append(seconds_to_recover(bench, contestant, whole=False))
    whole, goal = [seconds_to_recover(bench, OURS, whole=True)], Goal("ratio", 0.02)
    name, theirs = "recovery, worker killed", [VISIBILITY_TIMEOUT_S]
    return [
        Figure("recovery, child killed", "s", child[OURS.label], STOCK.label, child[STOCK.label]),
        Figure(name, "s", whole, STOCK.label, theirs, goal, not_before=REDELIVERED_LATE),
    ]
