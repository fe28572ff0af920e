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

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

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
    from rich.console import Console
    from rich.table import Table

    from testbed import DATABASE, STATUS_CHANNEL, TASK_NAME, MongoServer, RedisServer, WorkerProcess, poll, spawn

Document = dict[str, Any]

# --- the bare worker: `celery -A bench_worker:bare worker` --------------------------------------------------

MODEL: Final = "gpt-4o-mini"
MOST_TOKENS: Final = 4096

bare = Celery("bare", broker=os.environ.get("REDIS_URL"), backend=os.environ.get("REDIS_URL"), set_as_current=False)
bare.conf.update(
    task_default_queue="bench_bare",
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
def bare_jobs(is_durable: bool) -> Collection[Document]:
    client: MongoClient[Document] = MongoClient(os.environ["MONGODB_URL"])
    concern = WriteConcern("majority", j=True) if is_durable else None
    return client[os.environ["DATABASE_NAME"]].get_collection("jobs", write_concern=concern)


@cache
def bare_redis() -> Redis:
    return Redis.from_url(os.environ["REDIS_URL"])


@cache
def bare_openai() -> OpenAI:
    return OpenAI(max_retries=0)


def bare_publish(job_id: str, job_data: Document, status: str, message: str) -> None:
    people = {"user_id": job_data["user_id"], "session_id": job_data["session_id"]}
    notice = {"type": "job_status_update", "job_id": job_id, "status": status, "message": message, **people}
    bare_redis().publish("job_notifications", json.dumps(notice))


def run_bare(job_id: str, job_data: Document, is_durable: bool) -> Document:
    """The whole job by hand: write, publish, call, write, publish."""
    jobs, now = bare_jobs(is_durable), datetime.now(UTC)
    jobs.update_one({"_id": ObjectId(job_id)}, {"$set": {"status": "processing", "started_at": now, "updated_at": now}})
    bare_publish(job_id, job_data, "processing", "Your job has started.")
    answer = bare_openai().chat.completions.create(
        model=MODEL, max_tokens=MOST_TOKENS, messages=[{"role": "user", "content": job_data["input_data"]["prompt"]}]
    )
    tokens = answer.usage.total_tokens if answer.usage else 0
    output = {"generated_text": answer.choices[0].message.content, "model_used": answer.model, "tokens_used": tokens}
    now = datetime.now(UTC)
    ended = {"status": "completed", "output_data": output, "completed_at": now, "updated_at": now}
    jobs.update_one({"_id": ObjectId(job_id)}, {"$set": ended})
    bare_publish(job_id, job_data, "completed", "Your result is ready.")
    return {"job_id": job_id, "status": "completed"}


@bare.task(name="bare.process")
def process(job_id: str, job_data: Document) -> Document:
    return run_bare(job_id, job_data, is_durable=True)


@bare.task(name="bare.process_unsafe")
def process_unsafe(job_id: str, job_data: Document) -> Document:
    return run_bare(job_id, job_data, is_durable=False)


@bare.task(name="bare.body")
def body(job_id: str, job_data: Document) -> None:
    bare_publish(job_id, job_data, "processing", "")


@bare.task(name="bare.noop")
def noop(job_id: str, job_data: Document) -> None:
    return None


# --- figures ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """One row: a value per round for ours and for the other contestant (empty: ours alone)."""

    name: str
    unit: str
    ours: list[float]
    against: str
    other: list[float]
    note: str = ""

    @property
    def ratios(self) -> list[float]:
        """Ours divided by the other, round by round."""
        return [ours / other for ours, other in zip(self.ours, self.other, strict=True)]

    def row(self) -> tuple[str, ...]:
        ratio = spread(self.ratios, 2)
        difference = statistics.median(self.ours) - statistics.median(self.other)
        digits = 0 if self.unit == "jobs/s" else 1 if self.unit in ("ms", "MiB") else 2
        difference_text = f"{difference:+.{digits}f} {self.unit}"
        return self.name, self.unit, spread(self.ours, digits), self.against, spread(self.other, digits), ratio, (
            difference_text
        )

    def as_json(self) -> Document:
        medians = {"median_ours": statistics.median(self.ours), "median_other": statistics.median(self.other)}
        return {**asdict(self), **medians, "ratios": self.ratios, "median_ratio": statistics.median(self.ratios)}


def spread(values: list[float], digits: int) -> str:
    """The median, and the lowest and highest value where there are several."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


# --- contestants and the API's side -------------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    """Who does the jobs: how its worker starts, where it listens, and the name of its task."""

    label: str
    command: tuple[str, ...]
    queue: str
    task: str


STOCK_COMMAND: Final = ("-m", "celery", "-A", "bench_worker:bare", "worker", "--concurrency=1", "--loglevel=INFO")
# In a race the bare worker gets the flags of ours; its start is measured as it comes.
LEAN_COMMAND: Final = (*STOCK_COMMAND, "--without-gossip", "--without-mingle")


class Bench:
    """Servers, the API's side, and how much to measure; a context manager that leaves no process behind.

    It hears notices in the thread that waits for them, so that nothing else delays their time.
    """

    def __init__(self, rounds: int, jobs: int, replica_set: bool, recovery: bool) -> None:
        self.rounds, self.job_count, self.replica_set, self.recovery = rounds, jobs, replica_set, recovery
        self._stack = ExitStack()

    def __enter__(self) -> Bench:
        with ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            mongodb_url = stack.enter_context(MongoServer(replica_set=self.replica_set)).url
            redis_url = stack.enter_context(RedisServer(append_only=True)).url
            self.environment = {
                "MONGODB_URL": mongodb_url,
                "DATABASE_NAME": DATABASE,
                "REDIS_URL": redis_url,
                "OPENAI_BASE_URL": stack.enter_context(self._provider()),
                "OPENAI_API_KEY": "sk-bench",
                "TEXT_MODEL": MODEL,
            }
            mongo: MongoClient[Document] = stack.enter_context(MongoClient(mongodb_url))
            self.jobs = mongo[DATABASE]["jobs"]
            self._celery = stack.enter_context(Celery("api", broker=redis_url, backend=redis_url, set_as_current=False))
            self._pubsub = stack.enter_context(Redis.from_url(redis_url).pubsub(ignore_subscribe_messages=True))
            self._pubsub.subscribe(STATUS_CHANNEL)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def _provider(self) -> Iterator[str]:
        """Yield the URL of a provider in a process of its own, so that it shares no interpreter with a contestant."""
        log = self.folder / "provider.log"
        process = spawn([sys.executable, str(Path(__file__).with_name("testbed.py")), "--provider-only"], log)
        try:
            poll(lambda: "OPENAI_BASE_URL=" in log.read_text(), 20, description="the provider's URL")
            yield log.read_text().split("OPENAI_BASE_URL=")[1].split()[0]
        finally:
            process.terminate()
            process.wait(10)

    @contextmanager
    def worker(self, contestant: Contestant, *, ready: bool = True) -> Iterator[WorkerProcess]:
        """Run the contestant's worker; it is ready, if asked for, and dead afterwards."""
        environment = {**self.environment, "CELERY_QUEUE_NAME": contestant.queue}
        if contestant.queue == BARE.queue:
            environment["BENCH_BARE_WORKER"] = "1"
            contestant = replace(contestant, command=(*contestant.command, f"--queues={contestant.queue}"))
        log = self.folder / f"worker-{time.monotonic_ns()}.log"
        worker = WorkerProcess(environment, log, list(contestant.command))
        try:
            yield worker.wait_ready() if ready else worker
        finally:
            worker.kill()

    @contextmanager
    def warm_workers(self) -> Iterator[dict[str, WorkerProcess]]:
        """Run ours and the bare one side by side, by queue; both have done a few jobs."""
        with self.worker(OURS) as ours, self.worker(BARE) as bare_worker:
            for contestant in (OURS, BARE, UNSAFE):
                job_ids = self.insert(WARM_UP_JOBS)
                self.send(contestant, job_ids)
                self.hear(job_ids, "completed")
            yield {OURS.queue: ours, BARE.queue: bare_worker}

    def insert(self, count: int, prompt: str = "Tell me something.") -> list[str]:
        """Insert text jobs as the API does."""
        now = datetime.now(UTC)
        fields = {"user_id": "user-1", "session_id": None, "job_type": "text_generation", "status": "pending"}
        fields |= {"created_at": now, "updated_at": now} | dict.fromkeys(("output_data", "artifact_url", "started_at"))
        documents: list[Document] = [{**fields, "input_data": {"prompt": prompt}} for _ in range(count)]
        return [str(job_id) for job_id in self.jobs.insert_many(documents).inserted_ids]

    def send(self, contestant: Contestant, job_ids: Iterable[str], prompt: str = "Tell me something.") -> None:
        """Enqueue jobs as the API does."""
        for job_id in job_ids:
            data = {"job_id": job_id, "job_type": "text_generation", "user_id": "user-1", "session_id": None}
            args = (job_id, {**data, "input_data": {"prompt": prompt}})
            self._celery.send_task(contestant.task, args=args, queue=contestant.queue)

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

Measurement = Callable[[Bench], list[Figure]]
MEASUREMENTS: dict[str, Measurement] = {}


def measures(function: Measurement) -> Measurement:
    """Makes a function a part of the benchmark, and a command."""
    MEASUREMENTS[function.__name__.replace("_", "-")] = function
    return function


def alternate(bench: Bench, contestants: tuple[Contestant, ...], rounds: int) -> Iterator[Contestant]:
    """Yield every contestant once a round, each time in another order."""
    for _ in range(rounds):
        yield from random.sample(contestants, len(contestants))


def jobs_per_second(bench: Bench, contestant: Contestant, worker: WorkerProcess, count: int) -> float:
    """Return the speed at which a worker empties a queue that was filled while it was paused."""
    job_ids = bench.insert(count)
    os.killpg(worker.process.pid, signal.SIGSTOP)
    bench.send(contestant, job_ids)
    awaited, status = job_ids, "completed"
    if contestant is NOOP:  # which tells nobody: one that does comes behind it
        awaited, status = bench.insert(1), "processing"
        bench.send(BODY, awaited)
    started_at = time.monotonic()
    os.killpg(worker.process.pid, signal.SIGCONT)
    return count / (bench.hear(awaited, status) - started_at)


@measures
def throughput(bench: Bench) -> list[Figure]:
    """Jobs a second, one at a time, provider answering at once."""
    contestants = (OURS, BARE, UNSAFE, NOOP)
    speeds: dict[str, list[float]] = {contestant.label: [] for contestant in contestants}
    with bench.warm_workers() as workers:
        for contestant in alternate(bench, contestants, bench.rounds):
            speed = jobs_per_second(bench, contestant, workers[contestant.queue], bench.job_count)
            speeds[contestant.label].append(speed)
            time.sleep(0.2)  # the last acknowledgement and event
    return [Figure("throughput", "jobs/s", speeds[OURS.label], c.label, speeds[c.label]) for c in contestants[1:]]


@measures
def latency(bench: Bench) -> list[Figure]:
    """From submit to the notice `processing` on an idle worker; bare: to the first line of the body."""
    medians: dict[str, list[float]] = {OURS.label: [], BODY.label: []}
    worst: dict[str, list[float]] = {OURS.label: [], BODY.label: []}
    with bench.warm_workers():
        for contestant in alternate(bench, (OURS, BODY), bench.rounds):
            waits = sorted(wait_ms(bench, contestant) for _ in range(LATENCY_JOBS))
            medians[contestant.label].append(statistics.median(waits))
            worst[contestant.label].append(statistics.quantiles(waits, n=100)[98])
    return [
        Figure("submit to processing, median", "ms", medians[OURS.label], BODY.label, medians[BODY.label]),
        Figure("submit to processing, p99", "ms", worst[OURS.label], BODY.label, worst[BODY.label]),
    ]


def wait_ms(bench: Bench, contestant: Contestant) -> float:
    job_ids = bench.insert(1)
    time.sleep(random.uniform(0.005, 0.025))
    sent_at = time.monotonic()
    bench.send(contestant, job_ids)
    taken_at = bench.hear(job_ids, "processing")
    if contestant is OURS:
        bench.hear(job_ids, "completed")
    return (taken_at - sent_at) * 1000


@measures
def cold_start(bench: Bench) -> list[Figure]:
    """From the start of the process until it consumes, has taken a waiting job, and has done it."""
    times: dict[str, list[list[float]]] = {OURS.label: [], STOCK.label: []}
    for contestant in alternate(bench, (OURS, STOCK), bench.rounds):
        job_ids = bench.insert(1)
        bench.send(contestant, job_ids)
        started_at = time.monotonic()
        with bench.worker(contestant, ready=False) as worker:
            poll(lambda worker=worker: " ready." in worker.text(), 30, 0.003, "worker ready")  # type: ignore[misc]
            moments = [time.monotonic(), bench.hear(job_ids, "processing"), bench.hear(job_ids, "completed")]
            time.sleep(0.2)
        times[contestant.label].append([moment - started_at for moment in moments])
    names = ("start to ready", "start to first job taken", "start to first job done")
    ours, other = (list(zip(*times[label], strict=True)) for label in (OURS.label, STOCK.label))
    return [Figure(names[i], "s", list(ours[i]), STOCK.label, list(other[i])) for i in range(len(names))]


@measures
def memory(bench: Bench) -> list[Figure]:
    """Memory of all of a worker's processes (PSS), idle and after jobs."""
    with bench.worker(OURS) as ours, bench.worker(STOCK) as stock:
        time.sleep(SETTLE_S)
        idle = [pss_mib(ours)], [pss_mib(stock)]
        for contestant, worker in ((OURS, ours), (BARE, stock)):
            jobs_per_second(bench, contestant, worker, bench.job_count)
        few = [pss_mib(ours)], [pss_mib(stock)]
        for contestant, worker in ((OURS, ours), (BARE, stock)):
            jobs_per_second(bench, contestant, worker, MEMORY_JOBS)
        many = [pss_mib(ours)], [pss_mib(stock)]
    return [
        Figure("memory, idle", "MiB", idle[0], STOCK.label, idle[1]),
        Figure(f"memory after {bench.job_count} jobs", "MiB", few[0], STOCK.label, few[1]),
        Figure(f"memory after {bench.job_count + MEMORY_JOBS} jobs", "MiB", many[0], STOCK.label, many[1]),
    ]


def pss_mib(worker: WorkerProcess) -> float:
    """Memory of a worker and its children; what processes share is divided among them (where the system says so)."""
    parent = psutil.Process(worker.process.pid)
    infos = [process.memory_full_info() for process in (parent, *parent.children(recursive=True))]
    return float(sum(getattr(info, "pss", info.uss) for info in infos)) / 2**20


@measures
def recovery(bench: Bench) -> list[Figure]:
    """From kill -9 until the job is done all the same, with the default lease (one round)."""
    child = [seconds_to_recover(bench, OURS, whole=False)], [seconds_to_recover(bench, STOCK, whole=False)]
    whole = [seconds_to_recover(bench, OURS, whole=True)], [float(bare.conf.visibility_timeout or 3600)]
    note = "bare, whole worker killed: Celery's visibility timeout, not waited for"
    return [
        Figure("recovery, child killed", "s", child[0], STOCK.label, child[1]),
        Figure("recovery, worker killed", "s", whole[0], STOCK.label, whole[1], note),
    ]


def seconds_to_recover(bench: Bench, contestant: Contestant, *, whole: bool) -> float:
    """Kill a worker (or its child) in mid-job, while a second one stands by if the whole is killed."""
    prompt = f"[delay 300 times=1] {contestant.label} {whole}"
    job_ids = bench.insert(1, prompt)
    with ExitStack() as stack:
        victim = stack.enter_context(bench.worker(contestant))
        bench.send(contestant, job_ids, prompt)
        bench.hear(job_ids, "processing")
        time.sleep(1)
        if whole:
            stack.enter_context(bench.worker(contestant))
            victim.kill()
        else:
            for pid in victim.children():
                os.kill(pid, signal.SIGKILL)
        killed_at = time.monotonic()
        return bench.hear(job_ids, "completed", timeout_s=120) - killed_at
