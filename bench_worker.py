"""How fast and how small the worker is, against a bare Celery task that does the same by hand.

`python bench_worker.py` starts a MongoDB, a Redis with append-only file and a provider of its own, measures
everything and prints a table; `python bench_worker.py --help` lists the parts. Each figure is compared within one
run: rounds of the contestants alternate, the table has medians with the lowest and highest round, and the ratio is
the median of each round's own ratio. Absolute figures belong to this machine at this moment; ratios travel better.

The yardstick is the task at the top of this module: what one would write by hand, with the same settings for events
and results, the same two MongoDB writes (majority, journalled) and the same two publishes, a synchronous openai
client, and the whole answer at once. Ours streams the answer, keeps a lease, and survives what `recovery` does to it.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, astuple, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import click
from bson import ObjectId
from celery import Celery, signals
from openai import OpenAI
from pymongo import MongoClient
from pymongo.collection import Collection
from pymongo.write_concern import WriteConcern
from redis import Redis

IS_BARE_WORKER: Final = "BENCH_BARE_WORKER" in os.environ
if TYPE_CHECKING or not IS_BARE_WORKER:  # the bare worker doesn't pay for what only measuring needs
    import random
    import statistics
    import tempfile
    import traceback
    import urllib.request

    import psutil
    from PIL import Image, ImageDraw, ImageFont
    from rich.console import Console
    from rich.table import Table

    from testbed.api import WorkerProcess
    from testbed.processes import poll, spawn
    from testbed.servers import DATABASE, MongoServer, RedisServer

Document = dict[str, Any]

# --- the bare worker: `celery -A bench_worker:bare worker` --------------------------------------------------

MODEL: Final = "gpt-6-luna"
MOST_TOKENS: Final = 4096
STATUS_CHANNEL: Final = "job_notifications"
PROGRESS_CHANNEL: Final = "job_progress"
BARE_QUEUE: Final = "bench_bare"

bare = Celery("bare", broker=os.environ.get("REDIS_URL"), backend=os.environ.get("REDIS_URL"), set_as_current=False)
bare.conf.update(
    task_default_queue=BARE_QUEUE,
    accept_content=["json"],
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_track_started=True,
    task_soft_time_limit=90,
    task_time_limit=120,
    worker_send_task_events=True,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
)


@cache
def bare_jobs() -> Collection[Document]:
    client: MongoClient[Document] = MongoClient(os.environ["MONGODB_URL"], appname=BARE_QUEUE)
    database = client[os.environ["DATABASE_NAME"]]
    return database.get_collection("jobs", write_concern=WriteConcern("majority", j=True))


@cache
def bare_redis() -> Redis:
    return Redis.from_url(os.environ["REDIS_URL"])


@cache
def bare_openai() -> OpenAI:
    return OpenAI(max_retries=0)


def bare_publish(job_id: str, job_data: Document, status: str, message: str) -> None:
    people = {"user_id": job_data["user_id"], "session_id": job_data["session_id"]}
    notice = {"type": "job_status_update", "job_id": job_id, "status": status, "message": message, **people}
    bare_redis().publish(STATUS_CHANNEL, json.dumps(notice))


def ask(prompt: str) -> Document:
    """The whole answer at once, as most people write it."""
    answer = bare_openai().chat.completions.create(
        model=MODEL, max_tokens=MOST_TOKENS, messages=[{"role": "user", "content": prompt}]
    )
    tokens = answer.usage.total_tokens if answer.usage else 0
    return {"generated_text": answer.choices[0].message.content, "model_used": answer.model, "tokens_used": tokens}


def ask_streaming(prompt: str) -> Document:
    """The same in pieces, as ours asks for it."""
    parts, tokens = [], 0
    messages = [{"role": "user", "content": prompt}]
    request = {"model": MODEL, "max_tokens": MOST_TOKENS, "messages": messages, "stream": True}
    stream: Any = bare_openai().chat.completions.create(**request, stream_options={"include_usage": True})  # type: ignore[call-overload]
    for chunk in stream:
        parts += [choice.delta.content or "" for choice in chunk.choices[:1]]
        tokens = chunk.usage.total_tokens if chunk.usage else tokens
    return {"generated_text": "".join(parts), "model_used": MODEL, "tokens_used": tokens}


def run_by_hand(job_id: str, job_data: Document, asks: Callable[[str], Document]) -> Document:
    """The whole job: write, publish, call, write, publish."""
    jobs, now = bare_jobs(), datetime.now(UTC)
    jobs.update_one({"_id": ObjectId(job_id)}, {"$set": {"status": "processing", "started_at": now, "updated_at": now}})
    bare_publish(job_id, job_data, "processing", "Your job has started.")
    ended = {"status": "completed", "output_data": asks(job_data["input_data"]["prompt"])}
    now = datetime.now(UTC)
    jobs.update_one({"_id": ObjectId(job_id)}, {"$set": {**ended, "completed_at": now, "updated_at": now}})
    bare_publish(job_id, job_data, "completed", "Your result is ready.")
    return {"job_id": job_id, "status": "completed"}


@bare.task(name="bare.process")
def process(job_id: str, job_data: Document) -> Document:
    return run_by_hand(job_id, job_data, ask)


@bare.task(name="bare.process_streaming")
def process_streaming(job_id: str, job_data: Document) -> Document:
    return run_by_hand(job_id, job_data, ask_streaming)


@bare.task(name="bare.body")
def body(job_id: str, job_data: Document) -> None:
    bare_publish(job_id, job_data, "processing", "")


@bare.task(name="bare.noop")
def noop(job_id: str, job_data: Document) -> None:
    return None


# --- inside ours: `HANDLER_MODULES=bench_worker` --------------------------------------------------------------

KEEPER_FILE: Final = "BENCH_KEEPER_FILE"


def note_keeper(**_: object) -> None:
    """Write down which thread is the keeper, as the system counts threads: process and thread id."""
    keepers = [thread.native_id for thread in threading.enumerate() if thread.name == "keeper"]
    if keepers:
        Path(os.environ[KEEPER_FILE]).write_text(f"{os.getpid()} {keepers[0]}\n")


if KEEPER_FILE in os.environ:  # behind the worker's own receivers, which start the keeper
    signals.worker_process_init.connect(note_keeper)
    signals.worker_ready.connect(note_keeper)


# --- figures ------------------------------------------------------------------------------------------------

DIGITS: Final = {"jobs/s": 0, "ms": 1, "MiB": 1}  # after the point; two for every other unit
DEFAULT_DIGITS: Final = 2
View = Literal["ours", "ratio", "difference"]
SIGNS: Final[dict[View, str]] = {"ours": "", "ratio": "÷ ", "difference": "− "}


def spread(values: list[float], digits: int) -> str:
    """The median, and the lowest and highest value where there are several."""
    if not values:
        return ""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


@dataclass(frozen=True)
class Goal:
    """A bound for one view of a figure: ours alone, ours divided by the other, or ours less the other."""

    view: View
    bound: float
    at_least: bool = False

    def share(self, value: float) -> float:
        """How much of what the goal allows this value takes: up to 1 the goal is reached."""
        return self.bound / max(value, 1e-9) if self.at_least else max(value, 0.0) / self.bound

    def __str__(self) -> str:
        return f"{SIGNS[self.view]}{'≥' if self.at_least else '≤'} {self.bound:g}"


@dataclass(frozen=True)
class Figure:
    """One row: a value per round for ours and, where there is one, for the other contestant."""

    name: str
    unit: str
    ours: list[float]
    against: str = ""
    other: list[float] = field(default_factory=list)
    goal: Goal | None = None
    note: str = ""

    @property
    def ratios(self) -> list[float]:
        """Ours divided by the other, round by round; without another, or where it is nothing, empty."""
        return self._by_round(lambda ours, other: ours / other) if self.other and all(self.other) else []

    @property
    def differences(self) -> list[float]:
        """Ours less the other, round by round."""
        return self._by_round(lambda ours, other: ours - other) if self.other else []

    def _by_round(self, view: Callable[[float, float], float]) -> list[float]:
        return [view(ours, other) for ours, other in zip(self.ours, self.other, strict=True)]

    @property
    def shares(self) -> list[float]:
        """How much of what the goal allows each round took."""
        if self.goal is None:
            return []
        views = {"ours": self.ours, "ratio": self.ratios, "difference": self.differences}
        return [self.goal.share(value) for value in views[self.goal.view]]

    @property
    def is_reached(self) -> bool | None:
        """Whether the median reaches the goal; None without one."""
        return statistics.median(self.shares) <= 1 if self.shares else None

    @property
    def digits(self) -> int:
        return DIGITS.get(self.unit, DEFAULT_DIGITS)

    def row(self) -> tuple[str, ...]:
        values = spread(self.ours, self.digits), self.against, spread(self.other, self.digits)
        difference = f"{statistics.median(self.differences):+.{self.digits}f}" if self.differences else ""
        mark = {True: " ✓", False: " ✗", None: ""}[self.is_reached]
        return self.name, self.unit, *values, spread(self.ratios, 2), difference, f"{self.goal or ''}{mark}"

    def as_json(self) -> Document:
        views = {"ours": self.ours, "other": self.other, "ratio": self.ratios, "difference": self.differences}
        medians = {f"median_{name}": statistics.median(values) for name, values in views.items() if values}
        return {**asdict(self), **medians, "ratios": self.ratios, "is_reached": self.is_reached}


# --- contestants and the API's side -------------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    """Who does the jobs: how its worker starts, where it listens, and the name of its task."""

    label: str
    command: tuple[str, ...]
    queue: str
    task: str
    settings: Mapping[str, str] = field(default_factory=dict)  # more environment variables
    python: str = sys.executable
    ready: str = " ready."  # what its log says once it consumes
    enqueue: Callable[[Mapping[str, str], Mapping[str, Document]], None] | None = None  # where it isn't Celery


SOURCE: Final = Path(__file__).parent
STOCK_COMMAND: Final = ("-m", "celery", "-A", "bench_worker:bare", "worker", "--concurrency=1", "--loglevel=INFO")
# In a race the bare worker gets the flags of ours; start and memory are measured as it comes.
LEAN_COMMAND: Final = (*STOCK_COMMAND, "--without-gossip", "--without-mingle")
OURS: Final = Contestant("ours", (str(SOURCE / "worker.py"),), "bench", "src.infrastructure.queue.tasks.process_job")
BARE: Final = Contestant("bare Celery", LEAN_COMMAND, BARE_QUEUE, "bare.process")
STREAMING: Final = replace(BARE, label="bare, streaming too", task="bare.process_streaming")
NOOP: Final = replace(BARE, label="bare, no-op", task="bare.noop")
BODY: Final = replace(BARE, task="bare.body")
STOCK: Final = replace(BARE, label="stock Celery", command=STOCK_COMMAND)
PROMPT: Final = "Tell me something."
WARM_UP_JOBS: Final = 20
PROFILE_BYTES: Final = 64 * 2**20


def in_threads(contestant: Contestant, count: int) -> Contestant:
    """The same with so many jobs at a time in one process."""
    settings = {**contestant.settings, "WORKER_POOL": "threads", "WORKER_CONCURRENCY": str(count)}
    options = ("--pool=threads", f"--concurrency={count}") if contestant.queue == BARE_QUEUE else ()
    return replace(contestant, command=(*contestant.command, *options), settings=settings)


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    rounds: int
    jobs: int
    as_json: bool
    long: bool = False
    chart: Path | None = None


class Bench:
    """Servers and the API's side; a context manager that leaves no process behind.

    It hears notices in the thread that waits for them, so that nothing else delays their time.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self._stack = ExitStack()

    def __enter__(self) -> Bench:
        with ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            mongodb_url = stack.enter_context(MongoServer()).url
            redis_url = stack.enter_context(RedisServer(append_only=True)).url
            self.environment = {"MONGODB_URL": mongodb_url, "DATABASE_NAME": DATABASE, "REDIS_URL": redis_url}
            self.environment |= {"OPENAI_BASE_URL": stack.enter_context(self.provider()), "OPENAI_API_KEY": "sk-bench"}
            self.mongo: MongoClient[Document] = stack.enter_context(MongoClient(mongodb_url))
            self.jobs = self.mongo[DATABASE]["jobs"]
            self._celery = stack.enter_context(Celery("api", broker=redis_url, backend=redis_url, set_as_current=False))
            self.redis: Any = Redis.from_url(redis_url)
            self._pubsub = stack.enter_context(self.listening(STATUS_CHANNEL))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def provider(self) -> Iterator[str]:
        """Yield the URL of a provider in a process of its own, so that it shares no interpreter with a contestant."""
        log = self.folder / f"provider-{time.monotonic_ns()}.log"
        process = spawn([sys.executable, "-m", "testbed", "--provider-only"], log, directory=SOURCE)
        try:
            poll(lambda: "OPENAI_BASE_URL=" in log.read_text(), 20, description="the provider's URL")
            yield log.read_text().split("OPENAI_BASE_URL=")[1].split()[0]
        finally:
            process.terminate()
            process.wait(10)

    @contextmanager
    def listening(self, *channels: str) -> Iterator[Any]:
        """Yield a subscription to these channels."""
        with self.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
            pubsub.subscribe(*channels)
            pubsub.get_message(timeout=1.0)  # the server has confirmed the first of them
            yield pubsub

    @contextmanager
    def counting_mongodb(self, application: str, database_name: str) -> Iterator[Counter[str]]:
        """Count the operations of clients with this name, by kind, as the server's own profiler sees them."""
        database = self.mongo[database_name]
        database.drop_collection("system.profile")
        database.create_collection("system.profile", capped=True, size=PROFILE_BYTES)
        database.command("profile", 2)
        counts: Counter[str] = Counter()
        try:
            yield counts
        finally:
            database.command("profile", 0)
        for entry in database["system.profile"].find({"appName": application}, {"op": 1, "command": 1}):
            counts[next(iter(entry["command"])) if entry["op"] == "command" else entry["op"]] += 1

    @contextmanager
    def counting_redis(self) -> Iterator[Counter[str]]:
        """Count all commands, by name; those that a script calls, too."""
        counts: Counter[str] = Counter()
        self.redis.config_resetstat()
        yield counts
        for name, numbers in self.redis.info("commandstats").items():
            if not name.startswith(("cmdstat_config", "cmdstat_info")):
                counts[name.removeprefix("cmdstat_")] += numbers["calls"]

    def environment_of(self, contestant: Contestant) -> dict[str, str]:
        """Return the variables that the contestant's processes are told."""
        environment = {**self.environment, "CELERY_QUEUE_NAME": contestant.queue, "TEXT_MODEL": MODEL}
        if contestant.queue == BARE_QUEUE:
            environment |= {"BENCH_BARE_WORKER": "1", "PYTHONPATH": str(SOURCE)}
        return {**environment, **contestant.settings}

    def jobs_of(self, contestant: Contestant) -> Collection[Document]:
        return self.mongo[self.environment_of(contestant)["DATABASE_NAME"]]["jobs"]

    @contextmanager
    def worker(self, contestant: Contestant, *, ready: bool = True) -> Iterator[WorkerProcess]:
        """Run the contestant's worker: ready, if asked for, and gone afterwards."""
        log, command = self.folder / f"{time.monotonic_ns()}.log", list(contestant.command)
        worker = WorkerProcess(self.environment_of(contestant), log, command, contestant.python)
        try:
            yield worker.wait_ready(says=contestant.ready) if ready else worker
        finally:
            worker.kill()

    @contextmanager
    def warm_workers(self) -> Iterator[dict[str, WorkerProcess]]:
        """Run ours and the bare one side by side, by queue; both have done a few jobs."""
        with self.worker(OURS) as ours, self.worker(BARE) as bare_worker:
            for contestant in (OURS, BARE, STREAMING):
                self.hear(self.submit(contestant, WARM_UP_JOBS), "completed")
            yield {OURS.queue: ours, BARE.queue: bare_worker}

    def insert(
        self, count: int = 1, prompt: str = PROMPT, collection: Collection[Document] | None = None
    ) -> dict[str, Document]:
        """Insert text jobs as the API does; return what their messages say, by id."""
        now, nothing = datetime.now(UTC), dict.fromkeys(("output_data", "artifact_url", "error_message", "started_at"))
        data = {"job_type": "text_generation", "input_data": {"prompt": prompt}, "user_id": "u", "session_id": None}
        dates: Document = {"created_at": now, "updated_at": now}
        documents = [{**data, **nothing, **dates, "status": "pending"} for _ in range(count)]
        jobs = self.jobs if collection is None else collection
        return {str(job_id): {"job_id": str(job_id), **data} for job_id in jobs.insert_many(documents).inserted_ids}

    def forget(self) -> None:
        """Delete the jobs so far: our sweeper would rescue those that only a no-op task was told of."""
        self.jobs.delete_many({})
        self.redis.delete(OURS.queue, BARE_QUEUE)

    def send(self, contestant: Contestant, jobs: Mapping[str, Document]) -> None:
        """Enqueue jobs as the API does."""
        if contestant.enqueue:
            contestant.enqueue({**os.environ, **self.environment_of(contestant)}, jobs)
            return
        for message in jobs.items():
            self._celery.send_task(contestant.task, args=message, queue=contestant.queue)

    def submit(self, contestant: Contestant, count: int = 1, prompt: str = PROMPT) -> dict[str, Document]:
        """Insert and enqueue."""
        jobs = self.insert(count, prompt, self.jobs_of(contestant))
        self.send(contestant, jobs)
        return jobs

    def hear(self, job_ids: Iterable[str], status: str, timeout_s: float = 60) -> float:
        """Wait until each of the jobs was said to have this status; return when the last was (monotonic).

        Raises: TimeoutError.
        """
        awaited, heard_at, deadline = set(job_ids), time.monotonic(), time.monotonic() + timeout_s
        while awaited:
            message = self._pubsub.get_message(timeout=1.0)
            heard_at = time.monotonic()
            notice = json.loads(message["data"]) if message else {}
            if notice.get("status") == status:
                awaited.discard(notice["job_id"])
            if heard_at > deadline:
                raise TimeoutError(f"{len(awaited)} jobs not {status} within {timeout_s:g} s")
        return heard_at


# --- measurements -------------------------------------------------------------------------------------------

LATENCY_JOBS: Final = 100
CROWD: Final = 100
THOUSAND: Final = 1000
FEW_JOBS, MANY_JOBS, BATCH_JOBS = 100, 10_000, 500
SAMPLE_S: Final = 0.25
WORDS: Final = 30  # first words in a round
STREAM_WORDS, STREAM_PACE_S = 250, 0.02
BATCH_S: Final = 0.05  # how long the worker gathers streamed text
FEW_ROUNDS: Final = 2
OUTBOX_S: Final = 1.5
FIRST_SWEEP_S: Final = 32.0  # a lease, with which each process begins
NOTEWORTHY: Final = 0.05  # a job
WRITES: Final = frozenset({"insert", "update", "remove", "findAndModify", "findandmodify"})
MEMORY_JOBS: Final = 400
CHILD_ROUNDS: Final = 3
SETTLE_S: Final = 3.0
REST_S: Final = 0.2
VISIBILITY_TIMEOUT_S: Final = 3600.0  # Celery's on Redis; not waited for

Measurement = Callable[["Bench"], "list[Figure]"]
MEASUREMENTS: dict[str, Measurement] = {}
# Only where `--long` or their own command asks for them.
LONG: Final = frozenset({"memory-growth", "rivals-loss", "scale"})


def measures(function: Measurement) -> Measurement:
    """Makes a function a part of the benchmark, and a command."""
    MEASUREMENTS[function.__name__.replace("_", "-")] = function
    return function


def alternate(contestants: tuple[Contestant, ...], rounds: int) -> Iterator[Contestant]:
    """Yield every contestant once a round, each time in another order."""
    for _ in range(rounds):
        yield from random.sample(contestants, len(contestants))


@contextmanager
def filled_queue(
    bench: Bench, contestant: Contestant, worker: WorkerProcess, count: int, prompt: str = PROMPT
) -> Iterator[dict[str, Document]]:
    """Fill a worker's queue while it is paused; it goes on at the start of what is inside."""
    os.killpg(worker.process.pid, signal.SIGSTOP)
    jobs = bench.submit(contestant, count, prompt)
    try:
        if contestant.task == NOOP.task:  # which tells nobody: one that does comes behind it
            jobs = bench.submit(BODY)
        os.killpg(worker.process.pid, signal.SIGCONT)
        yield jobs
    finally:
        time.sleep(REST_S)  # the last acknowledgement and event


def drain_s(bench: Bench, contestant: Contestant, worker: WorkerProcess, count: int, prompt: str = PROMPT) -> float:
    """Return the time in which a worker empties a queue that was filled while it was paused."""
    with filled_queue(bench, contestant, worker, count, prompt) as jobs:
        started_at, status = time.monotonic(), "processing" if contestant.task == NOOP.task else "completed"
        return bench.hear(jobs, status, timeout_s=max(60.0, float(count))) - started_at


def jobs_per_second(bench: Bench, contestant: Contestant, worker: WorkerProcess, count: int) -> float:
    """Return the speed at which a worker empties a queue that was filled while it was paused."""
    return count / drain_s(bench, contestant, worker, count)


def processes(worker: WorkerProcess) -> list[psutil.Process]:
    """A worker's process and its children."""
    parent = psutil.Process(worker.process.pid)
    return [parent, *parent.children(recursive=True)]


def cpu_s(worker: WorkerProcess) -> float:
    """Return the CPU time that a worker and its children have used so far, those that have ended included."""
    times = [process.cpu_times() for process in processes(worker)]
    return float(sum(time.user + time.system + time.children_user + time.children_system for time in times))


@measures
def throughput(bench: Bench) -> list[Figure]:
    """Jobs a second and CPU time a job, one at a time, with a provider that answers 20 words at once."""
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


def wait_ms(bench: Bench, contestant: Contestant) -> float:
    jobs = bench.insert()
    time.sleep(random.uniform(0.005, 0.025))
    sent_at = time.monotonic()
    bench.send(contestant, jobs)
    taken_at = bench.hear(jobs, "processing")
    if contestant is OURS:
        bench.hear(jobs, "completed")
    return (taken_at - sent_at) * 1000


@measures
def latency(bench: Bench) -> list[Figure]:
    """From submit to the notice `processing` on an idle worker; bare: to the first line of its body."""
    medians: dict[str, list[float]] = {OURS.label: [], BODY.label: []}
    p99s: dict[str, list[float]] = {OURS.label: [], BODY.label: []}
    with bench.warm_workers():
        for contestant in alternate((OURS, BODY), bench.options.rounds):
            waits = [wait_ms(bench, contestant) for _ in range(LATENCY_JOBS)]
            medians[contestant.label].append(statistics.median(waits))
            p99s[contestant.label].append(statistics.quantiles(waits, n=100)[98])
    names = {"submit to processing, median": (medians, 5), "submit to processing, p99": (p99s, 15)}
    return [
        Figure(name, "ms", waits[OURS.label], BODY.label, waits[BODY.label], Goal("difference", most_ms))
        for name, (waits, most_ms) in names.items()
    ]


def start_times(bench: Bench, contestant: Contestant) -> tuple[float, ...]:
    jobs, started_at = bench.submit(contestant), time.monotonic()
    with bench.worker(contestant, ready=False) as worker:
        poll(lambda: " ready." in worker.text(), 30, 0.003, "worker ready")
        moments = (time.monotonic(), bench.hear(jobs, "processing"), bench.hear(jobs, "completed"))
        time.sleep(REST_S)
    return tuple(moment - started_at for moment in moments)


@measures
def cold_start(bench: Bench) -> list[Figure]:
    """From the start of the process until it consumes, has taken a waiting job, and has done it."""
    times: dict[str, list[tuple[float, ...]]] = {OURS.label: [], STOCK.label: []}
    for contestant in alternate((OURS, STOCK), bench.options.rounds):
        times[contestant.label].append(start_times(bench, contestant))
    names = ("start to ready", "start to first job taken", "start to first job done")
    ours, stock = (list(zip(*times[label], strict=True)) for label in (OURS.label, STOCK.label))
    goals = (Goal("ratio", 0.7), None, None)
    return [Figure(names[i], "s", list(ours[i]), STOCK.label, list(stock[i]), goals[i]) for i in range(len(names))]


def pss_mib(worker: WorkerProcess) -> float:
    """Memory of a worker and its children; what processes share is divided among them (where the system says so)."""
    infos = [process.memory_full_info() for process in processes(worker)]
    return float(sum(getattr(info, "pss", info.uss) for info in infos)) / 2**20


@measures
def memory(bench: Bench) -> list[Figure]:
    """Memory of all of a worker's processes (PSS), idle and after jobs (one round)."""
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


@measures
def memory_growth(bench: Bench) -> list[Figure]:
    """Memory after 10,000 jobs in one child against after 100 (only with `--long`)."""
    with bench.worker(OURS) as worker:
        drain_s(bench, OURS, worker, FEW_JOBS)
        before_mib, child = pss_mib(worker), worker.children()
        for _ in range(MANY_JOBS // BATCH_JOBS):
            drain_s(bench, OURS, worker, BATCH_JOBS)
        note = "" if worker.children() == child else "the child was another one in the end"
        after = [pss_mib(worker)]
    name = f"memory after {MANY_JOBS:,} jobs"
    return [Figure(name, "MiB", after, f"after {FEW_JOBS}", [before_mib], Goal("ratio", 1.1), note)]


@measures
def crowd(bench: Bench) -> list[Figure]:
    """A hundred jobs of a second each at the provider, in one worker process with a hundred threads."""
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
    """Look again and again in a thread, and list what was seen."""
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


def most_at_once(calls: Iterable[Document]) -> int:
    """Return how many calls ran at the same time, at most."""
    moments = sorted((call[edge], step) for call in calls for edge, step in (("started_at", 1), ("ended_at", -1)))
    return max(itertools.accumulate(step for _, step in moments))


@measures
def thousand(bench: Bench) -> list[Figure]:
    """A thousand jobs in flight in one process: time, memory, leases renewed in time, nothing done twice."""
    lease_s, delay_s = 30, 75 if bench.options.long else 35
    running = {"status": "processing"}
    soonest: list[Document] = [{"$match": running}, {"$group": {"_id": None, "at": {"$min": "$worker.lease_until"}}}]

    def lease_left_s() -> float | None:
        found = list(bench.jobs.aggregate(soonest))
        return (found[0]["at"].replace(tzinfo=UTC) - datetime.now(UTC)).total_seconds() if found else None

    with bench.provider() as url, keeper_watched(bench, in_threads(OURS, THOUSAND)) as (contestant, keeper_cpu_s):
        settings = {"LEASE_SECONDS": str(lease_s), "SWEEP_INTERVAL": "1", "OPENAI_BASE_URL": url}
        contestant = replace(contestant, settings={**contestant.settings, **settings})
        with bench.worker(contestant) as worker:
            with sampling(lease_left_s) as leases_s, sampling(lambda: pss_mib(worker)) as sizes_mib:
                cpu_before_s = keeper_cpu_s()
                took_s = drain_s(bench, contestant, worker, THOUSAND, f"[delay {delay_s}] Tell me something.")
                keeper_share = (keeper_cpu_s() - cpu_before_s) / took_s * 100
        calls = calls_at(url)
    goal = Goal("ours", lease_s / 3, at_least=True)
    note = f"{most_at_once(calls)} calls at the provider at once; each job takes {delay_s} s there"
    return [
        Figure("1,000 in flight", "s", [took_s], "one job", [float(delay_s)], note=note),
        Figure("1,000 in flight: memory", "MiB", [max(sizes_mib)]),
        Figure(f"1,000: least left of a {lease_s} s lease", "s", [min(leases_s)], goal=goal),
        Figure("1,000: calls per job", "", [len(calls) / THOUSAND], goal=Goal("ours", 1.0)),
        Figure("1,000: keeper's CPU", "% of a core", [keeper_share]),
    ]


def word_on_the_wire(url: str, prompt: str) -> float:
    """Ask as the SDK does, and return when the first word came out of the socket (Unix time)."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "stream": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        next(line for line in answer if b'"content": "' in line and b'"content": ""' not in line)
        heard_at = time.time()
        answer.read()
    return heard_at


@measures
def first_word(bench: Bench) -> list[Figure]:
    """From the call at the provider to the first streamed word: at the subscriber, and on the provider's wire."""
    heard: dict[str, list[dict[str, float]]] = {OURS.label: [], "wire": []}
    with bench.provider() as url, bench.listening(PROGRESS_CHANNEL) as pubsub:
        with bench.worker(replace(OURS, settings={"OPENAI_BASE_URL": url})):
            bench.hear(bench.submit(OURS, WARM_UP_JOBS), "completed")
            for number in range(bench.options.rounds * WORDS):
                prompt = f"[tokens 10] [pace 0.005] {number}"
                while pubsub.get_message():  # what is left of the job before
                    pass
                jobs = bench.submit(OURS, prompt=f"{prompt} ours")
                pubsub.get_message(timeout=10.0)
                at = {f"{prompt} ours": time.time()}
                bench.hear(jobs, "completed")
                heard[OURS.label].append(at)
                heard["wire"].append({f"{prompt} wire": word_on_the_wire(url, f"{prompt} wire")})
        called = {call["prompt"]: call["started_at"] for call in calls_at(url)}
    waits = {
        label: [(at - called[p]) * 1000 for one in list_ for p, at in one.items()] for label, list_ in heard.items()
    }
    rounds = {
        label: [statistics.median(w[i : i + WORDS]) for i in range(0, len(w), WORDS)] for label, w in waits.items()
    }
    return [Figure("first word", "ms", rounds[OURS.label], "the wire", rounds["wire"], Goal("difference", 60))]


def stream_to_a_listener(bench: Bench, contestant: Contestant) -> tuple[float, float, float]:
    """Return cores used, pieces of text published a second, and words a second that the provider sent."""
    with bench.worker(contestant) as worker, bench.listening(STATUS_CHANNEL, PROGRESS_CHANNEL) as pubsub:
        drain_s(bench, contestant, worker, WARM_UP_JOBS)
        prompt, pieces = f"[tokens {STREAM_WORDS}] [pace {STREAM_PACE_S}] {time.monotonic_ns()}", 0
        while pubsub.get_message():
            pass
        with filled_queue(bench, contestant, worker, CROWD, prompt) as jobs:
            cpu_before_s, started_at, running = cpu_s(worker), time.monotonic(), set(jobs)
            while running and time.monotonic() < started_at + 120:
                message = pubsub.get_message(timeout=1.0)
                if message and message["channel"] == PROGRESS_CHANNEL.encode():
                    pieces += 1
                elif message and (notice := json.loads(message["data"]))["status"] == "completed":
                    running.discard(notice["job_id"])
            took_s = time.monotonic() - started_at
            return (cpu_s(worker) - cpu_before_s) / took_s, pieces / took_s, CROWD * STREAM_WORDS / took_s


@measures
def streaming(bench: Bench) -> list[Figure]:
    """A hundred answers of 50 words a second each at the same time, to somebody who listens."""
    ours = [stream_to_a_listener(bench, in_threads(OURS, CROWD)) for _ in range(FEW_ROUNDS)]
    other = [stream_to_a_listener(bench, in_threads(STREAMING, CROWD)) for _ in range(FEW_ROUNDS)]
    cores, pieces, words = (list(values) for values in zip(*ours, strict=True))
    their_cores, _, their_words = (list(values) for values in zip(*other, strict=True))
    most_pieces = CROWD / BATCH_S
    label = "bare, telling nobody"
    return [
        Figure("100 streams", "cores", cores, label, their_cores, Goal("ours", 1.0)),
        Figure("100 streams: words", "words/s", words, label, their_words),
        Figure("100 streams: messages", "messages/s", pieces, goal=Goal("ours", most_pieces)),
    ]


def per_job(counts: Counter[str], jobs: int) -> dict[str, float]:
    return {name: round(count / jobs, 2) for name, count in counts.most_common()}


def difference_named(ours: Mapping[str, float], other: Mapping[str, float]) -> str:
    """Name what ours does more or less often than the other, a job."""
    names = [*ours, *(name for name in other if name not in ours)]
    differences = {name: ours.get(name, 0.0) - other.get(name, 0.0) for name in names}
    return ", ".join(f"{name} {d:+.2f}" for name, d in differences.items() if abs(d) >= NOTEWORTHY) or "nothing"


@measures
def commands(bench: Bench) -> list[Figure]:
    """MongoDB operations and Redis commands a job, counted by the servers; a no-op task is Celery's floor."""
    on_mongodb: dict[str, dict[str, float]] = {}
    on_redis: dict[str, dict[str, float]] = {}
    count = bench.options.jobs
    with bench.warm_workers() as workers:
        for contestant, name in ((OURS, "ai-backend-worker"), (BARE, BARE_QUEUE), (NOOP, BARE_QUEUE)):
            with bench.counting_mongodb(name, DATABASE) as operations, bench.counting_redis() as redis_commands:
                drain_s(bench, contestant, workers[contestant.queue], count)
                time.sleep(OUTBOX_S)  # ours writes down once a second what was told
            on_mongodb[contestant.label] = per_job(operations, count)
            on_redis[contestant.label] = per_job(redis_commands, count)
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


@contextmanager
def keeper_watched(bench: Bench, contestant: Contestant) -> Iterator[tuple[Contestant, Callable[[], float]]]:
    """Yield the contestant with a module inside that tells its keeper's thread, and what tells its CPU time so far."""
    file = bench.folder / f"keeper-{time.monotonic_ns()}"

    def keeper_cpu_s() -> float:
        poll(file.exists, 20, description="the keeper's thread id")
        process, thread = file.read_text().split()
        return int(Path(f"/proc/{process}/task/{thread}/schedstat").read_text().split()[0]) / 1e9

    inside = {"HANDLER_MODULES": "bench_worker", "BENCH_BARE_WORKER": "1", KEEPER_FILE: str(file)}
    yield replace(contestant, settings={**contestant.settings, **inside}), keeper_cpu_s


def cpu_percent(seconds: float, looks: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Return by name how much of a core was used meanwhile, from what tells the CPU time so far."""
    before_s, began_at = {name: look() for name, look in looks.items()}, time.monotonic()
    time.sleep(seconds)
    took_s = time.monotonic() - began_at
    return {name: (look() - before_s[name]) / took_s * 100 for name, look in looks.items()}


def rates(operations: Counter[str], seconds: float) -> str:
    return ", ".join(f"{kind} {count / seconds:.2f}/s" for kind, count in sorted(operations.items())) or "none"


@measures
def upkeep(bench: Bench) -> list[Figure]:
    """What leases, sweeper and outbox cost a process: CPU of their thread, and MongoDB operations."""
    limits = {"CELERY_SOFT_TIME_LIMIT": "300", "CELERY_TIME_LIMIT": "330"}  # the jobs outlast all of it
    names, many = ("idle", "100 running"), in_threads(replace(OURS, settings=limits), CROWD)
    seconds = 60.0 if bench.options.long else 20.0
    counts: dict[str, Counter[str]] = {}
    looks: dict[str, Callable[[], float]] = {}
    with ExitStack() as stack:
        looks[BARE.label] = partial(cpu_s, stack.enter_context(bench.worker(BARE)))
        for name in names:  # in a database and a queue of its own each
            database = f"{DATABASE}_{name.replace(' ', '_')}"
            apart = replace(many, queue=f"bench_{name}", settings={**many.settings, "DATABASE_NAME": database})
            watched, looks[f"keeper, {name}"] = stack.enter_context(keeper_watched(bench, apart))
            looks[name] = partial(cpu_s, stack.enter_context(bench.worker(watched)))
            if name != names[0]:
                jobs = bench.insert(
                    CROWD, f"[delay {FIRST_SWEEP_S + seconds + 20}] Tell.", bench.mongo[database]["jobs"]
                )
                bench.send(watched, jobs)
                bench.hear(jobs, "processing")
        time.sleep(FIRST_SWEEP_S)
        for name in names:
            database = f"{DATABASE}_{name.replace(' ', '_')}"
            counts[name] = stack.enter_context(bench.counting_mongodb("ai-backend-worker", database))
        used = cpu_percent(seconds, looks)
    figures = []
    for name, most_percent, most_operations in zip(names, (1.0, 3.0), (1.0, 2.0), strict=True):
        keeper, operations = used[f"keeper, {name}"], sum(counts[name].values()) / seconds
        figures += [
            Figure(f"keeper's CPU, {name}", "% of a core", [keeper], goal=Goal("ours", most_percent)),
            Figure(
                f"MongoDB operations, {name}",
                "/s",
                [operations],
                goal=Goal("ours", most_operations),
                note=rates(counts[name], seconds),
            ),
        ]
    return [*figures, Figure("CPU of an idle worker", "% of a core", [used["idle"]], BARE.label, [used[BARE.label]])]


def fill_with_old_jobs(jobs: Collection[Document], count: int) -> None:
    """Let the server make jobs that have ended, each a second older than the one before, then the API's indexes."""
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
    for keys in ("user_id", "status", "job_type", "created_at"):
        jobs.create_index(keys)
    jobs.create_index([("user_id", 1), ("created_at", 1)])


def add_live_jobs(jobs: Collection[Document], count: int) -> None:
    """Jobs that run or wait, so that every query of a sweep has something to look at."""
    now = datetime.now(UTC)
    worker = {
        "owner": "fedcba9876543210",
        "node": "live",
        "pid": 1,
        "lease_until": now + timedelta(hours=1),
        "attempt": 1,
    }
    common = {"created_at": now, "updated_at": now, "user_id": "u", "job_type": "text_generation"}
    jobs.insert_many(
        [{**common, "status": "processing", "started_at": now, "worker": dict(worker)} for _ in range(count)]
    )
    jobs.insert_many([{**common, "status": "pending"} for _ in range(count)])


def sweep_ms(sweeper: Any, count: int) -> float:
    times = []
    for _ in range(count):
        started_at = time.perf_counter()
        assert not sweeper.sweep()
        times.append((time.perf_counter() - started_at) * 1000)
    return statistics.median(times)


@measures
def old_jobs(bench: Bench) -> list[Figure]:
    """A round of the sweeper with 200,000 old documents (with `--long` 1,000,000) against none."""
    import worker

    count = 1_000_000 if bench.options.long else 200_000
    sweepers: dict[str, Any] = {}
    settings: Any = {name.lower(): value for name, value in bench.environment.items()}
    for name, size in (("none", 0), ("old", count)):
        settings["database_name"] = f"{DATABASE}_{name}"
        runtime = worker.Runtime(worker.Settings(_env_file=None, **settings))
        jobs = bench.mongo[settings["database_name"]]["jobs"]
        if size:
            fill_with_old_jobs(jobs, size)
        add_live_jobs(jobs, CROWD)
        make_api_indexes(jobs)
        runtime.store.ensure_indexes()
        sweepers[name] = runtime.sweeper
        sweep_ms(runtime.sweeper, FEW_JOBS)
    times: dict[str, list[float]] = {name: [] for name in sweepers}
    for _ in range(bench.options.rounds):
        for name in random.sample(sorted(sweepers), len(sweepers)):
            times[name].append(sweep_ms(sweepers[name], FEW_JOBS))
    for name in sweepers:
        bench.mongo.drop_database(f"{DATABASE}_{name}")
    return [Figure(f"sweep, {count:,} old jobs", "ms", times["old"], "no old jobs", times["none"], Goal("ratio", 1.1))]


def seconds_to_recover(bench: Bench, contestant: Contestant, *, whole: bool) -> float:
    """Kill a worker's child in mid-job, or the whole worker while another one stands by."""
    with ExitStack() as stack:
        victim = stack.enter_context(bench.worker(contestant))
        bench.hear(bench.submit(contestant), "completed")
        jobs = bench.submit(contestant, prompt=f"[delay 300 times=1] {time.monotonic_ns()}")
        bench.hear(jobs, "processing")
        time.sleep(REST_S)  # the provider has the call, so that only the second one is answered at once
        if whole:
            stack.enter_context(bench.worker(contestant))
        killed_at = time.monotonic()
        if whole:
            victim.kill()
        else:
            os.kill(victim.children()[0], signal.SIGKILL)
        return bench.hear(jobs, "completed", timeout_s=120) - killed_at


@measures
def recovery(bench: Bench) -> list[Figure]:
    """From kill -9 until the job is done all the same, with the default lease (the whole worker: one round)."""
    child: dict[str, list[float]] = {OURS.label: [], STOCK.label: []}
    for contestant in alternate((OURS, STOCK), min(bench.options.rounds, CHILD_ROUNDS)):
        child[contestant.label].append(seconds_to_recover(bench, contestant, whole=False))
    whole = seconds_to_recover(bench, OURS, whole=True)
    return [
        Figure("recovery, child killed", "s", child[OURS.label], STOCK.label, child[STOCK.label]),
        Figure(
            "recovery, worker killed", "s", [whole], "stock: not before", [VISIBILITY_TIMEOUT_S], Goal("ratio", 0.02)
        ),
    ]


# --- scale --------------------------------------------------------------------------------------------------

FLEETS: Final = (10, 100, 1000)
REAL_WORKERS, REAL_JOBS = 10, 1000
TRUE_PACE: Final = 200  # workers that one machine simulates without slowing them down
DRIVERS: Final = 4  # processes that the simulated workers share
WINDOW_S: Final = 11.0  # a sweep's longest interval is 12 s
BACKLOG: Final = 10_000
RUNNING, WAITING = "one job each", "10,000 waiting"
STATES: Final = ("idle", RUNNING, WAITING)
SCALE_QUEUE: Final = "bench_scale"
MAX_CLIENTS: Final = 10_000  # Redis' own default
FULL: Final = 100.0  # percent of a core


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

    def __sub__(self, other: Load) -> Load:
        return Load(*(mine - theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Load:
        return Load(*(value * factor for value in astuple(self)))


class Beats:
    """Takes a keeper's heartbeat, and counts it in memory that the drivers share."""

    def __init__(self, total: Any) -> None:
        self._total = total

    def beat(self) -> None:
        with self._total.get_lock():
            self._total.value += 1


def in_small_letters(environment: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in environment.items()}


def simulated_worker(number: int, settings: Mapping[str, Any], heartbeat: Beats, sharing: Any = None) -> Any:
    """What a process has: a node, a keeper and, unless it shares another's, clients, as if it had run for a while."""
    import worker

    runtime: Any = worker.Runtime(worker.Settings(_env_file=None, **settings))
    if sharing:
        runtime.mongo, runtime.notifier = sharing.mongo, sharing.notifier
    runtime.store = worker.JobStore(runtime.database, f"simulated-{number}", worker.Clock(), runtime.settings)
    runtime.keeper = keeper = worker.Keeper(
        runtime.store, runtime.sweeper, worker.SHUTDOWN, cast(Any, heartbeat), runtime.settings
    )
    runtime.store.synchronise_clock()
    runtime.notifier.revoked()  # both connections are there
    keeper._is_prepared = True
    keeper._renew_at = time.monotonic() + random.uniform(0, runtime.settings.lease_seconds / 3)
    keeper._sweep_at = time.monotonic() + random.uniform(0, runtime.settings.sweep_interval)
    return runtime


def drive_keepers(
    numbers: range, environment: Mapping[str, str], job_ids: list[str], beats: Any, barrier: Any, slower: int
) -> None:
    """In a process of its own: run true keepers, idle at first; from the second signal on with a job each."""
    os.environ.update(environment)  # for Celery's own connections
    import worker

    worker.TICK_S *= slower

    settings = in_small_letters(environment)
    runtimes: list[Any] = []
    for index, number in enumerate(numbers):
        sharing = runtimes[index // slower * slower] if index % slower else None
        runtimes.append(simulated_worker(number, settings, Beats(beats), sharing))
    for runtime in runtimes:
        time.sleep(worker.TICK_S / len(runtimes))
        runtime.keeper.start()
    barrier.wait()
    barrier.wait()
    for runtime, job_id in zip(runtimes, job_ids, strict=True):
        job = runtime.store.claim(ObjectId(job_id), f"{job_id[8:]}", worker.Limits(1800, 3600))
        assert isinstance(job, worker.Job)
        runtime.keeper.register(worker.Attempt(job, runtime.settings.lease_seconds))
    barrier.wait()
    threading.Event().wait()


def counters(bench: Bench) -> Load:
    """What the servers have done since their start, as they count it themselves; CPU in percent of a core x s."""
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
    """How many workers cost so much, from two fleets' costs: a part grows with the fleet, another with its square."""
    (n1, cost1), (n2, cost2) = small, large
    square = max((cost2 / n2 - cost1 / n1) / (n2 - n1), 0.0)
    line = cost2 / n2 - square * n2
    return (math.sqrt(line**2 + 4 * square * bound) - line) / (2 * square) if square else bound / line


def set_created(jobs: Collection[Document], status: str, ago: timedelta) -> None:
    jobs.update_many({"status": status}, {"$set": {"created_at": datetime.now(UTC) - ago}})


def enter_state(bench: Bench, jobs: Collection[Document], barrier: Any, state: str) -> None:
    """Let the drivers begin, claim, or find a backlog, and wait until they have."""
    if state == WAITING:
        bench.redis.lpush(SCALE_QUEUE, "a message")  # the broker has lost none of them
        bench.insert(BACKLOG, "word " * 200, jobs)
        set_created(jobs, "pending", timedelta(minutes=5))
        return
    barrier.wait()
    if state == RUNNING:
        barrier.wait()
        set_created(jobs, "processing", timedelta(minutes=10))  # older than what waits behind them


@contextmanager
def simulated_fleet(bench: Bench, count: int, slower: int) -> Iterator[tuple[Callable[[str], None], Any]]:
    """Yield what brings so many keepers into their next state, and the number of their ticks so far."""
    context, jobs = multiprocessing.get_context("spawn"), bench.mongo[f"{DATABASE}_{SCALE_QUEUE}"]["jobs"]
    job_ids = list(bench.insert(count, collection=jobs))
    set_created(jobs, "pending", timedelta(days=-1))  # from tomorrow: no sweep thinks them lost
    make_api_indexes(jobs)
    environment = {**bench.environment, "DATABASE_NAME": jobs.database.name, "CELERY_QUEUE_NAME": SCALE_QUEUE}
    environment |= {"LEASE_SECONDS": str(30 * slower), "SWEEP_INTERVAL": str(10 * slower)}
    simulated_worker(0, in_small_letters(environment), Beats(None)).store.ensure_indexes()
    beats, barrier = context.Value("q", 0), context.Barrier(DRIVERS + 1, timeout=120)
    shares = [range(count)[index::DRIVERS] for index in range(DRIVERS)]
    drivers = [
        context.Process(target=drive_keepers, args=(share, environment, ids, beats, barrier, slower))
        for share, ids in zip(shares, [job_ids[index::DRIVERS] for index in range(DRIVERS)], strict=True)
    ]

    try:
        for driver in drivers:
            driver.start()
        yield partial(enter_state, bench, jobs, barrier), beats
    finally:
        for driver in drivers:
            driver.kill()
            driver.join()
        bench.redis.delete(SCALE_QUEUE)
        bench.mongo.drop_database(jobs.database.name)


def simulate(bench: Bench, count: int, alone: Load) -> dict[str, Load]:
    """What so many keepers cost in each state.

    This machine's cores can't simulate a large fleet: that runs slower, as many times as share a connection, and what
    it costs is multiplied.
    """
    loads: dict[str, Load] = {}
    slower = max(1, count // TRUE_PACE)
    with simulated_fleet(bench, count, slower) as (enter, beats):
        for state in STATES:
            enter(state)
            ticks_before = beats.value
            loads[state] = (load(bench, WINDOW_S) - alone) * slower
            done = (beats.value - ticks_before) * slower / (count * WINDOW_S)
            print(f"       {count:,} workers, {state}: {done:.0%} of the ticks", file=sys.stderr, flush=True)
    return loads


def per_job_load(bench: Bench, contestant: Contestant, idle: Load) -> tuple[Load, float]:
    """What one job costs, from the API's insert to the last notice, besides upkeep; and Redis' memory in bytes."""
    before, bytes_before, began_at = counters(bench), bench.redis.info()["used_memory"], time.monotonic()
    jobs = bench.insert(REAL_JOBS, collection=bench.mongo[contestant.settings["DATABASE_NAME"]]["jobs"])
    bench.send(contestant, jobs)
    bench.hear(jobs, "completed", timeout_s=120)
    time.sleep(OUTBOX_S)
    used = counters(bench) - before - idle * (time.monotonic() - began_at)
    return used * (1 / REAL_JOBS), (bench.redis.info()["used_memory"] - bytes_before) / REAL_JOBS


@dataclass(frozen=True)
class Fleet:
    """What real workers cost: each of them while it is idle and while it runs a job, and a job that passes through."""

    idle: Load
    busy: Load
    job: Load
    job_bytes: float


def real_fleet(bench: Bench, alone: Load) -> Fleet:
    """Measure a few real workers (prefork, a child each), whose sweeps have begun."""
    database, each = f"{DATABASE}_{SCALE_QUEUE}", 1 / REAL_WORKERS
    contestant = replace(OURS, queue=SCALE_QUEUE, settings={"DATABASE_NAME": database})
    with ExitStack() as stack:
        stack.callback(bench.mongo.drop_database, database)
        workers = [stack.enter_context(bench.worker(contestant, ready=False)) for _ in range(REAL_WORKERS)]
        for worker in workers:
            worker.wait_ready(60)
        warm_up = bench.insert(REAL_JOBS // 10, collection=bench.mongo[database]["jobs"])
        bench.send(contestant, warm_up)
        bench.hear(warm_up, "completed")
        time.sleep(FIRST_SWEEP_S)
        idle = load(bench, WINDOW_S) - alone
        job, job_bytes = per_job_load(bench, contestant, idle)
        jobs = bench.insert(REAL_WORKERS, f"[delay {WINDOW_S * 3}] Tell.", bench.mongo[database]["jobs"])
        bench.send(contestant, jobs)
        bench.hear(jobs, "processing")
        time.sleep(OUTBOX_S)
        return Fleet(idle * each, (load(bench, WINDOW_S) - alone) * each, job, job_bytes)


def journalled_writes(bench: Bench, writers: int) -> float:
    """Writes a second, acknowledged when they are in the journal, by so many at a time."""
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


def fleet_figures(loads: Mapping[int, Mapping[str, Load]], real: Fleet) -> list[Figure]:
    """A fleet's upkeep: MongoDB's from the simulation, Redis' (which is Celery's polling) from real workers."""
    figures = []
    for count, states in loads.items():
        pace = f", simulated {count // TRUE_PACE} times slower" if count > TRUE_PACE else ""
        for state, cost in states.items():
            name, note = f"{count:,} workers, {state}", f"{cost.examined:,.0f} documents examined a second{pace}"
            figures.append(Figure(f"{name}: MongoDB operations", "/s", [cost.operations], note=note))
            figures.append(Figure(f"{name}: mongod", "% of a core", [cost.mongod_percent]))
        figures += [
            Figure(f"{count:,} workers: MongoDB connections", "", [real.busy.mongod_connections * count]),
            Figure(f"{count:,} workers: Redis commands", "/s", [real.idle.commands * count]),
            Figure(f"{count:,} workers: Redis", "% of a core", [real.idle.redis_percent * count]),
            Figure(f"{count:,} workers: Redis connections", "", [real.busy.redis_connections * count]),
        ]
    note = f"connections, and all of Redis: {REAL_WORKERS} real workers' share, multiplied"
    return [*figures[:-1], replace(figures[-1], note=note)]


def wall_figures(loads: Mapping[int, Mapping[str, Load]], real: Fleet) -> list[Figure]:
    """How many workers fill a server, and how many jobs a second."""
    small, large = ((count, loads[count][RUNNING].mongod_percent) for count in FLEETS[1:])
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


@measures
def scale(bench: Bench) -> list[Figure]:
    """What 10, 100 and 1,000 workers cost MongoDB and Redis, and how many fill them (only with `--long`)."""
    alone = load(bench, WINDOW_S)
    real = real_fleet(bench, alone)
    loads = {count: simulate(bench, count, alone) for count in FLEETS}
    idle, busy = (loads[FLEETS[0]][state].operations / FLEETS[0] for state in STATES[:2])
    label = "simulated"
    return [
        Figure("MongoDB operations of an idle worker", "/s", [real.idle.operations], label, [idle]),
        Figure("MongoDB operations of a worker with a job", "/s", [real.busy.operations], label, [busy]),
        *fleet_figures(loads, real),
        *wall_figures(loads, real),
        Figure(
            "journalled writes, 32 at a time", "/s", [journalled_writes(bench, 32)], "1", [journalled_writes(bench, 1)]
        ),
    ]


# --- chart --------------------------------------------------------------------------------------------------

CHART_WIDTH, ROW_HEIGHT, TITLE_HEIGHT, MARGIN = 1720, 46, 120, 40
BARS_FROM, BARS_TO, MOST_SHARE = 560, 1080, 2.0
INK, FAINT, REACHED, MISSED = "#1f2328", "#9aa4af", "#2da44e", "#cf222e"


def chart_words(figure: Figure) -> str:
    """What stands beside a bar; plain letters, since Pillow's own font has no others."""
    goal = figure.goal
    assert goal
    median, bound = statistics.median, f"at {'least' if goal.at_least else 'most'} {goal.bound:g}"
    ours = f"{median(figure.ours):.{figure.digits}f} {figure.unit}"
    if goal.view == "ours":
        return f"{ours} ({bound})"
    other = f"{figure.against} {median(figure.other):.{figure.digits}f}"
    if goal.view == "ratio":
        return f"{median(figure.ratios):.2f}x ({bound}):  {ours}, {other}"
    return f"{median(figure.differences):+.{figure.digits}f} ({bound}):  {ours}, {other}"


def draw_chart(figures: Iterable[Figure], path: Path) -> None:
    """Draw a bar for each goal: how much of what it allows was used, with the spread of the rounds."""
    rows = [figure for figure in figures if figure.shares]
    image = Image.new("RGB", (CHART_WIDTH, TITLE_HEIGHT + ROW_HEIGHT * len(rows) + MARGIN), "white")
    draw, font, small = ImageDraw.Draw(image), ImageFont.load_default(24), ImageFont.load_default(20)

    def x_of(share: float) -> float:
        return BARS_FROM + (BARS_TO - BARS_FROM) * min(share, MOST_SHARE) / MOST_SHARE

    draw.text((MARGIN, 24), "AI Backend Worker: what each goal allows, and what was used of it", INK, font)
    draw.text((MARGIN, 64), "median of the rounds, lowest and highest as a line; up to 100 % is good", FAINT, small)
    draw.text((x_of(1), TITLE_HEIGHT - 10), "100 %", INK, small, anchor="ms")
    for index, figure in enumerate(rows):
        middle = TITLE_HEIGHT + ROW_HEIGHT * index + ROW_HEIGHT // 2
        colour = REACHED if figure.is_reached else MISSED
        draw.text((BARS_FROM - 16, middle), figure.name, INK, font, anchor="rm")
        draw.rectangle((BARS_FROM, middle - 13, x_of(statistics.median(figure.shares)), middle + 13), fill=colour)
        draw.line((x_of(min(figure.shares)), middle, x_of(max(figure.shares)), middle), fill=INK, width=2)
        draw.text((BARS_TO + 16, middle), chart_words(figure), INK, small, anchor="lm")
    draw.line((x_of(1), TITLE_HEIGHT, x_of(1), image.height - MARGIN), fill=INK, width=2)
    image.save(path)


# --- command line -------------------------------------------------------------------------------------------

# Settings of whoever runs this must not reach the workers that it starts.
FOREIGN_SETTINGS: Final = ("OPENAI_", "TEXT_", "CELERY_", "MONGODB_", "REDIS_", "LEASE_", "SWEEP_", "WORKER_", "DEBUG")


def print_table(figures: list[Figure], options: Options, took_s: float) -> None:
    table = Table(*("figure", "unit", "ours", "against", "other", "ours ÷ other", "ours − other", "goal"))
    for figure in figures:
        table.add_row(*figure.row())
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table, *(f"{figure.name}: {figure.note}" for figure in figures if figure.note), sep="\n")
    load = f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
    print(f"{options.rounds} rounds of {options.jobs} jobs: median (lowest–highest); {load}; {took_s:.0f} s")


def measure(options: Options, names: Iterable[str]) -> None:
    """Run these measurements and print what they found."""
    figures: list[Figure] = []
    failed: list[str] = []
    began_at = time.monotonic()
    with Bench(options) as bench:
        for name in names:
            print(f"{time.monotonic() - began_at:4.0f} s  {name} …", file=sys.stderr, flush=True)
            try:
                bench.forget()
                figures += MEASUREMENTS[name](bench)
            except Exception:  # the other figures count all the same
                traceback.print_exc()
                failed.append(name)
    if options.chart:
        draw_chart(figures, options.chart)
    if options.as_json:
        facts = {**asdict(options), "cpus": os.cpu_count(), "load": os.getloadavg(), "at": datetime.now(UTC)}
        print(json.dumps({**facts, "figures": [figure.as_json() for figure in figures]}, default=str, indent=2))
    else:
        print_table(figures, options, time.monotonic() - began_at)
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", default=4, show_default=True, help="Alternating rounds for each figure.")
@click.option("--jobs", default=150, show_default=True, help="Jobs in a round of the race.")
@click.option("--json", "as_json", is_flag=True, help="Print every round for machines instead of a table.")
@click.option("--long", is_flag=True, help="Also what takes over a minute each; 1,000,000 old documents.")
@click.option("--chart", type=click.Path(dir_okay=False, path_type=Path), help="Draw the goals into this PNG file.")
@click.option("--recovery/--no-recovery", default=True, show_default=True, help="Whether workers are killed too.")
@click.pass_context
def main(
    context: click.Context, rounds: int, jobs: int, as_json: bool, long: bool, chart: Path | None, recovery: bool
) -> None:
    """Measure the worker against a bare Celery task: everything, or the part that a command names."""
    for name in [name for name in os.environ if name.startswith(FOREIGN_SETTINGS)]:
        del os.environ[name]
    context.obj = Options(rounds, jobs, as_json, long, chart)
    if context.invoked_subcommand is None:
        left_out = {*(() if recovery else ("recovery",)), *(() if long else LONG)}
        measure(context.obj, [name for name in MEASUREMENTS if name not in left_out])


def add_command(name: str, function: Measurement) -> None:
    @main.command(name, help=function.__doc__)
    @click.pass_obj
    def command(options: Options) -> None:
        measure(options, [name])


@main.command("chaos")
@click.option("--jobs", default=10_000, show_default=True, help="How many jobs to submit.")
@click.option("--workers", default=4, show_default=True, help="How many workers: prefork, threads, prefork, solo …")
@click.option("--minutes", default=12.0, show_default=True, help="How long to submit and to do harm.")
@click.option("--seed", default=1, show_default=True, help="Jobs and faults are drawn from it.")
@click.option("--hurry", default=1.0, show_default=True, help="Divide the worker's own fixed waits by this.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="File for the figures.")
def run_chaos(jobs: int, workers: int, minutes: float, seed: int, hurry: float, json_file: Path | None) -> None:
    """Submit jobs while processes and servers die, then audit every document, notice, file and call."""
    import chaos

    sys.exit(chaos.run(chaos.Options(jobs, workers, minutes, seed, hurry), json_file))


if __name__ == "__main__":
    sys.modules["bench_worker"] = sys.modules["__main__"]  # so that what plugs in adds to this very table
    if importlib.util.find_spec("bench_rivals"):
        importlib.import_module("bench_rivals")
    for measurement_name, measurement in MEASUREMENTS.items():
        add_command(measurement_name, measurement)
    main()
