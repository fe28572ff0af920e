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
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import click
from bson import ObjectId
from celery import Celery
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

    import psutil
    from PIL import Image, ImageDraw, ImageFont
    from rich.console import Console
    from rich.table import Table

    from testbed import DATABASE, MongoServer, RedisServer, WorkerProcess, poll, spawn

Document = dict[str, Any]

# --- the bare worker: `celery -A bench_worker:bare worker` --------------------------------------------------

MODEL: Final = "gpt-4o-mini"
MOST_TOKENS: Final = 4096
STATUS_CHANNEL: Final = "job_notifications"
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
    client: MongoClient[Document] = MongoClient(os.environ["MONGODB_URL"])
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
            self.environment |= {"OPENAI_BASE_URL": stack.enter_context(self._provider()), "OPENAI_API_KEY": "sk-bench"}
            mongo: MongoClient[Document] = stack.enter_context(MongoClient(mongodb_url))
            self._jobs = mongo[DATABASE]["jobs"]
            self._celery = stack.enter_context(Celery("api", broker=redis_url, backend=redis_url, set_as_current=False))
            client: Any = Redis.from_url(redis_url)
            self._pubsub = stack.enter_context(client.pubsub(ignore_subscribe_messages=True))
            self._pubsub.subscribe(STATUS_CHANNEL)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def _provider(self) -> Iterator[str]:
        """Yield the URL of a provider in a process of its own, so that it shares no interpreter with a contestant."""
        log = self.folder / "provider.log"
        process = spawn([sys.executable, str(SOURCE / "testbed.py"), "--provider-only"], log)
        try:
            poll(lambda: "OPENAI_BASE_URL=" in log.read_text(), 20, description="the provider's URL")
            yield log.read_text().split("OPENAI_BASE_URL=")[1].split()[0]
        finally:
            process.terminate()
            process.wait(10)

    @contextmanager
    def worker(self, contestant: Contestant, *, ready: bool = True) -> Iterator[WorkerProcess]:
        """Run the contestant's worker: ready, if asked for, and gone afterwards."""
        environment = {**self.environment, "CELERY_QUEUE_NAME": contestant.queue, "TEXT_MODEL": MODEL}
        if contestant.queue == BARE_QUEUE:
            environment |= {"BENCH_BARE_WORKER": "1", "PYTHONPATH": str(SOURCE)}
        environment |= contestant.settings
        worker = WorkerProcess(environment, self.folder / f"{time.monotonic_ns()}.log", list(contestant.command))
        try:
            yield worker.wait_ready() if ready else worker
        finally:
            worker.kill()

    @contextmanager
    def warm_workers(self) -> Iterator[dict[str, WorkerProcess]]:
        """Run ours and the bare one side by side, by queue; both have done a few jobs."""
        with self.worker(OURS) as ours, self.worker(BARE) as bare_worker:
            for contestant in (OURS, BARE, STREAMING):
                self.hear(self.submit(contestant, WARM_UP_JOBS), "completed")
            yield {OURS.queue: ours, BARE.queue: bare_worker}

    def insert(self, count: int = 1, prompt: str = PROMPT) -> dict[str, Document]:
        """Insert text jobs as the API does; return what their messages say, by id."""
        now, nothing = datetime.now(UTC), dict.fromkeys(("output_data", "artifact_url", "error_message", "started_at"))
        data = {"job_type": "text_generation", "input_data": {"prompt": prompt}, "user_id": "u", "session_id": None}
        dates: Document = {"created_at": now, "updated_at": now}
        documents = [{**data, **nothing, **dates, "status": "pending"} for _ in range(count)]
        return {
            str(job_id): {"job_id": str(job_id), **data} for job_id in self._jobs.insert_many(documents).inserted_ids
        }

    def send(self, contestant: Contestant, jobs: Mapping[str, Document]) -> None:
        """Enqueue jobs as the API does."""
        for message in jobs.items():
            self._celery.send_task(contestant.task, args=message, queue=contestant.queue)

    def submit(self, contestant: Contestant, count: int = 1, prompt: str = PROMPT) -> dict[str, Document]:
        """Insert and enqueue."""
        jobs = self.insert(count, prompt)
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
MEMORY_JOBS: Final = 400
CHILD_ROUNDS: Final = 3
SETTLE_S: Final = 3.0
REST_S: Final = 0.2
VISIBILITY_TIMEOUT_S: Final = 3600.0  # Celery's on Redis; not waited for

Measurement = Callable[["Bench"], "list[Figure]"]
MEASUREMENTS: dict[str, Measurement] = {}
LONG: Final = frozenset({"memory-growth"})  # only where `--long` or their own command asks for them


def measures(function: Measurement) -> Measurement:
    """Makes a function a part of the benchmark, and a command."""
    MEASUREMENTS[function.__name__.replace("_", "-")] = function
    return function


def alternate(contestants: tuple[Contestant, ...], rounds: int) -> Iterator[Contestant]:
    """Yield every contestant once a round, each time in another order."""
    for _ in range(rounds):
        yield from random.sample(contestants, len(contestants))


def jobs_per_second(bench: Bench, contestant: Contestant, worker: WorkerProcess, count: int) -> float:
    """Return the speed at which a worker empties a queue that was filled while it was paused."""
    os.killpg(worker.process.pid, signal.SIGSTOP)
    jobs, status = bench.submit(contestant, count), "completed"
    if contestant is NOOP:  # which tells nobody: one that does comes behind it
        jobs, status = bench.submit(BODY), "processing"
    started_at = time.monotonic()
    os.killpg(worker.process.pid, signal.SIGCONT)
    speed = count / (bench.hear(jobs, status) - started_at)
    time.sleep(REST_S)  # the last acknowledgement and event
    return speed


@measures
def throughput(bench: Bench) -> list[Figure]:
    """Jobs a second, one at a time, with a provider that answers 20 words at once."""
    contestants = (OURS, BARE, STREAMING, NOOP)
    speeds: dict[str, list[float]] = {contestant.label: [] for contestant in contestants}
    with bench.warm_workers() as workers:
        for contestant in alternate(contestants, bench.options.rounds):
            speed = jobs_per_second(bench, contestant, workers[contestant.queue], bench.options.jobs)
            speeds[contestant.label].append(speed)
    return [Figure("throughput", "jobs/s", speeds[OURS.label], c.label, speeds[c.label]) for c in contestants[1:]]


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
    names = {"submit to processing, median": medians, "submit to processing, p99": p99s}
    return [Figure(name, "ms", waits[OURS.label], BODY.label, waits[BODY.label]) for name, waits in names.items()]


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
    return [Figure(names[i], "s", list(ours[i]), STOCK.label, list(stock[i])) for i in range(len(names))]


def pss_mib(worker: WorkerProcess) -> float:
    """Memory of a worker and its children; what processes share is divided among them (where the system says so)."""
    parent = psutil.Process(worker.process.pid)
    infos = [process.memory_full_info() for process in (parent, *parent.children(recursive=True))]
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
            figures.append(Figure(name, "MiB", [pss_mib(ours)], STOCK.label, [pss_mib(stock)]))
    return figures


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
        Figure("recovery, worker killed", "s", [whole], "its visibility timeout", [VISIBILITY_TIMEOUT_S]),
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
    began_at = time.monotonic()
    with Bench(options) as bench:
        for name in names:
            print(f"{time.monotonic() - began_at:4.0f} s  {name} …", file=sys.stderr, flush=True)
            figures += MEASUREMENTS[name](bench)
    if options.chart:
        draw_chart(figures, options.chart)
    if options.as_json:
        facts = {**asdict(options), "cpus": os.cpu_count(), "load": os.getloadavg(), "at": datetime.now(UTC)}
        print(json.dumps({**facts, "figures": [figure.as_json() for figure in figures]}, default=str, indent=2))
    else:
        print_table(figures, options, time.monotonic() - began_at)


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
