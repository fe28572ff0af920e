"""The worker against RQ, Dramatiq, arq and taskiq, each doing the same job as the bare Celery task.

`python bench_worker.py rivals` measures jobs a second and CPU time a job; `python bench_worker.py rivals-loss` kills
a whole worker in mid-job while another one stands by. It is a plug-in of `bench_worker.py`, which has the rest.

Every rival runs one worker process that does one job at a time, with its own settings for no loss, in a virtual
environment of its own: made once, with the versions pinned below, in `~/.cache/ai-backend-worker-bench` (or under
`XDG_CACHE_HOME`), so that the project's own environment stays as it is. The job is the same for all: one call with
the same version of the openai SDK, two MongoDB writes (majority, journalled) and two publishes; with synchronous
clients for RQ and Dramatiq, with asynchronous ones for arq and taskiq, as people use them. It is done twice: with the
whole answer at once, as most people write it, and "streaming too", which is the call that ours makes.

What ours does more in each job: a claim that only one worker can win, a lease, a check that it still holds it at the
end, Celery's events and result, and the way from a parent that can kill the job to the child that does it.

A rival's processes import this very file, for its tasks; `BENCH_RIVAL` tells them which framework they have.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bson import ObjectId
from pymongo import AsyncMongoClient, MongoClient
from pymongo.write_concern import WriteConcern

FRAMEWORK: Final = os.environ.get("BENCH_RIVAL", "")
if TYPE_CHECKING or not FRAMEWORK:  # a rival's processes have neither Celery nor what only measuring needs
    import psutil

    import bench_worker
    from bench_worker import OURS, REST_S, WARM_UP_JOBS, Bench, Contestant, Figure
    from testbed.api import WorkerProcess

Document = dict[str, Any]
Jobs = Mapping[str, Document]  # what a message says, by job id

# --- the job, as bench_worker has it ------------------------------------------------------------------------

MODEL: Final = "gpt-6-luna"
MOST_TOKENS: Final = 4096
STATUS_CHANNEL: Final = "job_notifications"
REDIS_URL: Final = os.environ.get("REDIS_URL", "")  # RQ looks for it by this name
QUEUE: Final = os.environ.get("CELERY_QUEUE_NAME", "")
MAJORITY: Final = WriteConcern("majority", j=True)


def request(prompt: str, *, stream: bool) -> Document:
    asked = {"model": MODEL, "max_tokens": MOST_TOKENS, "messages": [{"role": "user", "content": prompt}]}
    return {**asked, "stream": True, "stream_options": {"include_usage": True}} if stream else asked


def output(text: str, tokens: int) -> Document:
    return {"generated_text": text, "model_used": MODEL, "tokens_used": tokens}


def at_once(answer: Any) -> Document:
    return output(answer.choices[0].message.content, answer.usage.total_tokens)


def pieces(chunk: Any) -> tuple[str, int]:
    """Return a chunk's text, and the tokens used if it says so."""
    return "".join(choice.delta.content or "" for choice in chunk.choices[:1]), getattr(chunk.usage, "total_tokens", 0)


def begun() -> Document:
    now = datetime.now(UTC)
    return {"$set": {"status": "processing", "started_at": now, "updated_at": now}}


def ended(output_data: Document) -> Document:
    now = datetime.now(UTC)
    return {"$set": {"status": "completed", "output_data": output_data, "completed_at": now, "updated_at": now}}


def notice(job_id: str, job_data: Document, status: str, message: str) -> str:
    people = {"user_id": job_data["user_id"], "session_id": job_data["session_id"]}
    return json.dumps({"type": "job_status_update", "job_id": job_id, "status": status, "message": message, **people})


@cache
def clients() -> tuple[Any, Any]:
    """Connect a process to MongoDB's jobs and Redis, once."""
    from redis import Redis

    database = MongoClient[Document](os.environ["MONGODB_URL"])[os.environ["DATABASE_NAME"]]
    return database.get_collection("jobs", write_concern=MAJORITY), Redis.from_url(REDIS_URL)


@cache
def completions() -> Any:
    from openai import OpenAI

    return OpenAI(max_retries=0).chat.completions


def ask(prompt: str, *, stream: bool) -> Document:
    answer = completions().create(**request(prompt, stream=stream))
    if not stream:
        return at_once(answer)
    texts, tokens = zip(*map(pieces, answer), strict=True)
    return output("".join(texts), max(tokens))


def run(job_id: str, job_data: Document, *, stream: bool = False) -> Document:
    """The whole job: write, publish, call, write, publish."""
    (jobs, redis), one = clients(), {"_id": ObjectId(job_id)}
    jobs.update_one(one, begun())
    redis.publish(STATUS_CHANNEL, notice(job_id, job_data, "processing", "Your job has started."))
    answer = ask(job_data["input_data"]["prompt"], stream=stream)
    jobs.update_one(one, ended(answer))
    redis.publish(STATUS_CHANNEL, notice(job_id, job_data, "completed", "Your result is ready."))
    return {"job_id": job_id, "status": "completed"}


@cache
def async_clients() -> tuple[Any, Any, Any]:
    from openai import AsyncOpenAI
    from redis.asyncio import Redis

    database = AsyncMongoClient[Document](os.environ["MONGODB_URL"])[os.environ["DATABASE_NAME"]]
    jobs = database.get_collection("jobs", write_concern=MAJORITY)
    return jobs, Redis.from_url(REDIS_URL), AsyncOpenAI(max_retries=0).chat.completions


async def ask_async(prompt: str, *, stream: bool) -> Document:
    answer = await async_clients()[2].create(**request(prompt, stream=stream))
    if not stream:
        return at_once(answer)
    texts, tokens = zip(*[pieces(chunk) async for chunk in answer], strict=True)
    return output("".join(texts), max(tokens))


async def run_async(job_id: str, job_data: Document, *, stream: bool = False) -> Document:
    """The same on an event loop."""
    (jobs, redis, _), one = async_clients(), {"_id": ObjectId(job_id)}
    await jobs.update_one(one, begun())
    await redis.publish(STATUS_CHANNEL, notice(job_id, job_data, "processing", "Your job has started."))
    answer = await ask_async(job_data["input_data"]["prompt"], stream=stream)
    await jobs.update_one(one, ended(answer))
    await redis.publish(STATUS_CHANNEL, notice(job_id, job_data, "completed", "Your result is ready."))
    return {"job_id": job_id, "status": "completed"}


# --- the frameworks: how each knows the job, and how jobs are enqueued ----------------------------------------

RETRIES: Final = 3
RETRY_WAIT_S: Final = 5
LIMIT_S: Final = 120  # as ours: the hard limit

if FRAMEWORK == "rq":  # the parent has all modules before it forks; this opens no connection
    completions()


def enqueue_rq(jobs: Jobs, stream: bool) -> None:
    import rq

    queue = rq.Queue(QUEUE, connection=clients()[1])
    for message in jobs.items():
        options = {"retry": rq.Retry(max=RETRIES), "job_timeout": LIMIT_S}
        queue.enqueue("bench_rivals.run", *message, stream=stream, **options)


def run_and_forget(job_id: str, job_data: Document, stream: bool) -> None:
    """Dramatiq keeps no results by default, and warns of each that is returned."""
    run(job_id, job_data, stream=stream)


def dramatiq_broker() -> Any:
    import dramatiq
    from dramatiq.brokers.redis import RedisBroker

    dramatiq.set_broker(RedisBroker(url=REDIS_URL))
    options = {"max_retries": RETRIES, "min_backoff": RETRY_WAIT_S * 1000, "time_limit": LIMIT_S * 1000}
    return dramatiq.actor(run_and_forget, actor_name="run", queue_name=QUEUE, **options)


def enqueue_dramatiq(jobs: Jobs, stream: bool) -> None:
    actor = dramatiq_broker()
    for message in jobs.items():
        actor.send(*message, stream=stream)


if FRAMEWORK == "arq":
    import arq
    from arq.connections import RedisSettings

    async def run_in_arq(_context: Document, job_id: str, job_data: Document, stream: bool) -> Document:
        """arq tries again only what asks for it."""
        try:
            return await run_async(job_id, job_data, stream=stream)
        except Exception as error:
            raise arq.Retry(defer=RETRY_WAIT_S) from error

    class ArqSettings:
        functions: Final = [arq.func(run_in_arq, name="run")]
        redis_settings = RedisSettings.from_dsn(REDIS_URL)
        queue_name = QUEUE
        max_jobs = 1
        max_tries = 1 + RETRIES
        job_timeout = LIMIT_S
        poll_delay = float(os.environ.get("BENCH_POLL_DELAY", "0.5"))


def enqueue_arq(jobs: Jobs, stream: bool) -> None:
    async def enqueue() -> None:
        pool = await arq.create_pool(ArqSettings.redis_settings, default_queue_name=QUEUE)
        for message in jobs.items():
            await pool.enqueue_job("run", *message, stream=stream)

    asyncio.run(enqueue())


def taskiq_broker() -> Any:
    from taskiq import SimpleRetryMiddleware
    from taskiq_redis import RedisStreamBroker

    broker = RedisStreamBroker(REDIS_URL, queue_name=QUEUE, consumer_id="0")  # "$" skips what is there already
    broker.add_middlewares(SimpleRetryMiddleware(default_retry_count=1 + RETRIES))
    broker.register_task(run_async, task_name="run", retry_on_error=True, timeout=LIMIT_S)
    return broker


def enqueue_taskiq(jobs: Jobs, stream: bool) -> None:
    async def enqueue() -> None:
        broker = taskiq_broker()
        await broker.startup()
        for message in jobs.items():
            await broker.find_task("run").kiq(*message, stream=stream)
        await broker.shutdown()

    asyncio.run(enqueue())


ENQUEUE: Final = {"rq": enqueue_rq, "dramatiq": enqueue_dramatiq, "arq": enqueue_arq, "taskiq": enqueue_taskiq}


def enqueue_all(stream: bool) -> None:
    """Enqueue the jobs that standard input has; runs in the framework's own environment."""
    ENQUEUE[FRAMEWORK](json.load(sys.stdin), stream)


# --- contestants --------------------------------------------------------------------------------------------

SOURCE: Final = Path(__file__).parent
CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ai-backend-worker-bench"
SAME_AS_OURS: Final = ("openai", "pymongo")  # versions
APART: Final = {"DATABASE_NAME": "rivals"}  # or ours would rescue their jobs, which have no lease, after a while


@dataclass(frozen=True)
class Rival:
    """A framework with its settings; notes say what explains its figures, out of its own source."""

    label: str
    framework: str
    packages: tuple[str, ...]
    command: tuple[str, ...]  # of the worker; `{queue}` is its queue
    ready: str
    left: Callable[[Any, str], int]  # how many messages Redis still has for a queue, running ones included
    note: str
    recovery: str
    settings: Mapping[str, str] = field(default_factory=dict)
    most_jobs: int = 1_000_000  # a round
    polls: bool = False  # all the time, so that it would slow the others down

    def contestant(self, *, stream: bool = False) -> Contestant:
        queue, python = re.sub(r"\W+", "_", f"bench_{self.label}"), str(python_for(self))
        return Contestant(
            label=f"{self.label}, streaming too" if stream else self.label,
            command=tuple(word.format(queue=queue) for word in self.command),
            queue=queue,
            task="run",
            settings={"BENCH_RIVAL": self.framework, "PYTHONPATH": str(SOURCE), **APART, **self.settings},
            python=python,
            ready=self.ready,
            enqueue=partial(enqueue_by, python, stream),
        )


def enqueue_by(python: str, stream: bool, environment: Mapping[str, str], jobs: Jobs) -> None:
    """Let the framework's own client enqueue the jobs."""
    command = [python, "-c", f"import bench_rivals; bench_rivals.enqueue_all(stream={stream})"]
    subprocess.run(command, input=json.dumps(jobs), text=True, env=dict(environment), check=True)


def python_for(rival: Rival) -> Path:
    """Return the interpreter of a rival's virtual environment, which is made at the first time."""
    packages = [*rival.packages, *(f"{name}=={version(name)}" for name in SAME_AS_OURS)]
    key = hashlib.sha256(repr((packages, sys.version)).encode()).hexdigest()[:8]
    folder = CACHE / f"{rival.framework}-{key}"
    python, mark = folder / "bin" / "python", folder / "whole"
    if not mark.exists():
        print(f"        making {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *packages], check=True, stdout=sys.stderr)
        mark.touch()
    return python


def left_in_rq(redis: Any, queue: str) -> int:
    keys = f"rq:queue:{queue}", f"rq:queue:{queue}:intermediate"
    return int(sum(map(redis.llen, keys)) + redis.zcard(f"rq:wip:{queue}"))


def left_in_dramatiq(redis: Any, queue: str) -> int:
    return int(redis.hlen(f"dramatiq:{queue}.msgs") + redis.hlen(f"dramatiq:{queue}.DQ.msgs"))


def left_in_arq(redis: Any, queue: str) -> int:
    return int(redis.zcard(queue))


def left_in_taskiq(redis: Any, queue: str) -> int:
    group = redis.xinfo_groups(queue)[0]
    return int(group["pending"] + (group["lag"] or 0))


RQ_WORKER: Final = ("-m", "rq.cli", "worker", "--config", "bench_rivals", "{queue}")
RQ: Final = Rival(
    label="RQ",
    framework="rq",
    packages=("rq==3.0.0", "redis==8.1.0"),
    command=RQ_WORKER,
    ready="*** Listening on",
    left=left_in_rq,
    note="it forks a child for each job, which connects to MongoDB, Redis and the provider anew; like ours, its parent "
    "can kill a job that hangs (60 s after the limit)",
    recovery="its executions expire 90 s after the parent's last heartbeat; a worker looks for them when it has waited "
    "405 s for a job, and at most every 600 s (maintenance_interval)",
)
RQ_SIMPLE: Final = replace(
    RQ,
    label="RQ, SimpleWorker",
    command=(*RQ_WORKER, "--worker-class", "rq.SimpleWorker"),
    note="no child, so that connections stay; a limit is SIGALRM in its only process, which native code doesn't hear",
    recovery="its executions expire after job_timeout + 60 s = 180 s; then as RQ",
)
DRAMATIQ: Final = Rival(
    label="Dramatiq",
    framework="dramatiq",
    packages=("dramatiq==2.2.1", "redis==8.1.0"),
    command=("-m", "dramatiq", "bench_rivals:dramatiq_broker", "--processes", "1", "--threads", "1"),
    ready="ready for action",
    left=left_in_dramatiq,
    note="a thread of the process that reads the queue, so that no job passes between processes; no events, no results "
    "by default; a limit is an exception in that thread, which a hung call doesn't see",
    recovery="messages of a worker that is silent for 60 s (heartbeat_timeout) are put back by one of 1,000 commands "
    "(maintenance_chance), drawn by lot; an idle worker makes one or two a second",
)
ARQ_SLOW: Final = Rival(
    label="arq",
    framework="arq",
    packages=("arq==0.28.0", "redis==5.3.1"),
    command=("-m", "arq", "bench_rivals.ArqSettings"),
    ready="Starting worker",
    left=left_in_arq,
    note="with max_jobs=1 it takes one job a poll, and polls each 0.5 s (poll_delay)",
    recovery="the key that marks a running job lives for job_timeout + 10 s = 130 s; every poll looks",
    most_jobs=10,
)
ARQ: Final = replace(
    ARQ_SLOW,
    label="arq, poll_delay 1 ms",
    settings={"BENCH_POLL_DELAY": "0.001"},
    note="one asyncio process without a parent, no events; a limit cancels at an await, so that a job that blocks the "
    "loop is never stopped; idle, it asks Redis again each millisecond",
    most_jobs=RQ.most_jobs,
    polls=True,
)
TASKIQ: Final = Rival(
    label="taskiq",
    framework="taskiq",
    packages=("taskiq==0.13.0", "taskiq-redis==1.2.4", "redis==8.1.0"),
    command=(
        *("-m", "taskiq", "worker", "bench_rivals:taskiq_broker", "--workers", "1"),
        *("--max-async-tasks", "1", "--ack-type", "when_executed"),
    ),
    ready="Listening started",
    left=left_in_taskiq,
    note="one asyncio process, whose parent only restarts it when it has died; reads 100 messages at once, no events, "
    "no results by default; a limit cancels at an await, so that a job that blocks the loop is never stopped",
    recovery="what is unacknowledged for 600 s (idle_timeout) is claimed by a worker that has just read a new message; "
    "an idle one never looks",
)
RIVALS: Final = (RQ, RQ_SIMPLE, DRAMATIQ, ARQ, ARQ_SLOW, TASKIQ)

# --- measurements -------------------------------------------------------------------------------------------

WAIT_S, LONG_WAIT_S = 60.0, 900.0
DOUBLES_S: Final = 3.0


def notices(pubsub: Any) -> Counter[tuple[str, str]]:
    """Count what was said so far, by job and status."""
    told: Counter[tuple[str, str]] = Counter()
    while message := pubsub.get_message(timeout=REST_S):
        said = json.loads(message["data"])
        told[said["job_id"], said["status"]] += 1
    return told


def warm_up(bench: Bench, contestant: Contestant) -> None:
    """Let a worker do a few jobs, each of which must be written and told as it should."""
    with bench.listening(STATUS_CHANNEL) as pubsub:
        jobs = bench.submit(contestant, WARM_UP_JOBS)
        bench.hear(jobs, "completed")
        told = {said: count for said, count in notices(pubsub).items() if said[0] in jobs}
    expected = {(job_id, status): 1 for job_id in jobs for status in ("processing", "completed")}
    assert told == expected, f"{contestant.label} told {told}"
    whole = {"status": "completed", "started_at": {"$type": "date"}, "output_data.generated_text": {"$gt": ""}}
    done = bench.jobs_of(contestant).count_documents({"_id": {"$in": [ObjectId(job_id) for job_id in jobs]}, **whole})
    assert done == len(jobs), f"{contestant.label} wrote {done} of {len(jobs)}"


@contextmanager
def awake(worker: WorkerProcess, rival: Rival | None) -> Iterator[None]:
    """Let a worker that polls all the time do so only now, or the others would be slower."""
    os.killpg(worker.process.pid, signal.SIGCONT)
    yield
    if rival and rival.polls:
        os.killpg(worker.process.pid, signal.SIGSTOP)


def race(bench: Bench, rival: Rival | None, contestant: Contestant, worker: WorkerProcess) -> tuple[float, float]:
    """Return jobs a second and milliseconds of CPU time a job."""
    count, cpu_before_s = bench.options.jobs, bench_worker.cpu_s(worker)
    if rival:
        count = min(count, rival.most_jobs)
    speed = bench_worker.jobs_per_second(bench, contestant, worker, count)
    cost_ms = (bench_worker.cpu_s(worker) - cpu_before_s) / count * 1000
    if rival:
        left = rival.left(bench.redis, contestant.queue)
        assert not left, f"{rival.label} has acknowledged all but {left}"
    return speed, cost_ms


def rivals(bench: Bench) -> list[Figure]:
    """Jobs a second and CPU time a job against RQ, Dramatiq, arq and taskiq, one at a time in one worker process."""
    plain = {rival.contestant().queue: rival for rival in RIVALS}
    streaming = [rival.contestant(stream=True) for rival in RIVALS if rival is not ARQ_SLOW]
    contestants = (OURS, *(rival.contestant() for rival in RIVALS), *streaming)
    speeds: dict[str, list[float]] = {contestant.label: [] for contestant in contestants}
    costs: dict[str, list[float]] = {contestant.label: [] for contestant in contestants}
    with ExitStack() as stack:
        workers: dict[str, WorkerProcess] = {}
        for contestant in contestants:
            queue = contestant.queue
            if queue not in workers:
                workers[queue] = stack.enter_context(bench.worker(contestant))
            with awake(workers[queue], plain.get(queue)):
                warm_up(bench, contestant)
        for contestant in bench_worker.alternate(contestants, bench.options.rounds):
            queue = contestant.queue
            with awake(workers[queue], plain.get(queue)):
                speed, cost_ms = race(bench, plain.get(queue), contestant, workers[queue])
            speeds[contestant.label].append(speed)
            costs[contestant.label].append(cost_ms)
    notes = {rival.label: f"{rival.label}: {rival.note}" for rival in RIVALS}
    return [
        Figure(name, unit, values[OURS.label], label, values[label], note=notes.get(label, "") if unit != "ms" else "")
        for name, unit, values in (("throughput", "jobs/s", speeds), ("CPU per job", "ms", costs))
        for label in values
        if label != OURS.label
    ]


def kill_whole(worker: WorkerProcess) -> None:
    """Kill all processes at once, as a power cut does; RQ's child is in a process group of its own."""
    for process in bench_worker.processes(worker):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def follow(pubsub: Any, job_ids: set[str], wait_s: float) -> dict[str, list[float]]:
    """Return when each job was said to be completed, in seconds from now; listen on for doubles for a while."""
    began_at, told = time.monotonic(), {job_id: list[float]() for job_id in job_ids}
    until = began_at + wait_s
    while time.monotonic() < until:
        message = pubsub.get_message(timeout=1.0)
        said = json.loads(message["data"]) if message else {}
        if said.get("status") == "completed" and said["job_id"] in told:
            told[said["job_id"]].append(time.monotonic() - began_at)
            if all(told.values()):
                until = min(until, time.monotonic() + DOUBLES_S)
    return told


def kill_all(bench: Bench, contestants: list[Contestant], wait_s: float) -> tuple[dict[str, list[float]], Counter[str]]:
    """Kill each one's worker in mid-job; return when each job was told to be done, and how often it was asked for."""
    with bench.provider() as url, ExitStack() as stack:
        contestants = [replace(one, settings={**one.settings, "OPENAI_BASE_URL": url}) for one in contestants]
        victims, job_ids = [], {}
        for contestant in contestants:
            victims.append(stack.enter_context(bench.worker(contestant)))
            jobs = bench.submit(contestant, prompt=f"[delay 2000 times=1] {contestant.label}")
            bench.hear(jobs, "processing")
            job_ids[contestant.label] = next(iter(jobs))
        for contestant in contestants:
            stack.enter_context(bench.worker(contestant))  # stands by
        pubsub = stack.enter_context(bench.listening(STATUS_CHANNEL))
        for victim in victims:
            kill_whole(victim)
        told = follow(pubsub, set(job_ids.values()), wait_s)
        asked = Counter(call["prompt"].split("] ")[1] for call in bench_worker.calls_at(url))
    return {label: told[job_id] for label, job_id in job_ids.items()}, asked


def rivals_loss(bench: Bench) -> list[Figure]:
    """From kill -9 of a whole worker in mid-job until another one has done the job: all at once, at most 60 s each
    (with `--long` 15 minutes)."""
    wait_s = LONG_WAIT_S if bench.options.long else WAIT_S
    chosen = {rival.label: rival for rival in RIVALS if rival is not ARQ}  # how often it polls doesn't matter here
    told, asked = kill_all(bench, [OURS, *(rival.contestant() for rival in chosen.values())], wait_s)
    ours = told[OURS.label]
    assert len(ours) == 1, f"ours told {len(ours)}×"
    figures = []
    for label, rival in chosen.items():
        moments = told[label]
        outcome = f"told {len(moments)}×, generated {asked[label]}×" if moments else f"not within {wait_s:g} s"
        note = f"{label} {outcome}; {rival.recovery}"
        against = label if moments else f"{label}: not before"
        figures.append(Figure("kill -9 of the worker", "s", ours, against, moments[:1] or [wait_s], note=note))
    return figures


if not FRAMEWORK:
    bench_worker.measures(rivals)
    bench_worker.measures(rivals_loss)
