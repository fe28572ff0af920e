"""The worker against bare Celery, RQ, Dramatiq, arq and taskiq, each of which does the same job written by hand.

`rivals` measures jobs a second and CPU time a job. `rivals-loss` kills a whole worker while it runs a job and another
one stands by.

Each runs one worker process that does one job at a time, with its own settings against loss, in a virtual environment
of its own. That is made once, with the versions pinned below, in `~/.cache/ai-backend-worker-bench` (or under
`XDG_CACHE_HOME`), so that the project's own environment stays as it is. The job is the same for all (`by_hand`). It is
done twice: with the whole answer at once, and "streaming too", which is the call that this worker makes.

What this worker does more for each job: a claim that only one worker can win, a lease, a check at the end that it still
holds the lease, Celery's events and result, and the way from a parent that can kill the job to the child that runs it.
"""

from __future__ import annotations

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
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import psutil
from bson import ObjectId

from bench.contestants import BARE, OURS, STREAMED, STREAMING, WARM_UP_JOBS, Bench, Contestant, Jobs
from bench.figures import Figure
from bench.measurements import REDELIVERED_LATE, REST_S, alternate, calls_at, cpu_s, jobs_per_second, processes
from testbed.api import STATUS_CHANNEL, Subscription, WorkerProcess
from testbed.processes import SOURCE

CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ai-backend-worker-bench"
SAME_AS_OURS: Final = ("openai", "pymongo")  # their versions
APART: Final = {"DATABASE_NAME": "rivals"}  # otherwise ours would rescue their jobs, which have no lease, after a while


# ── the frameworks ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Rival:
    """A framework with its settings. `note` and `recovery` explain its figures, from its own source.

    `left` returns how many messages Redis still has for a queue, including those that run. `not_before` says in a few
    words why a lost job may not be done within the time of the measurement. `polls` marks a worker that asks Redis all
    the time, so that it would slow the others down.
    """

    label: str
    framework: str
    packages: tuple[str, ...]
    command: tuple[str, ...]  # of the worker; `{queue}` stands for its queue
    ready: str
    left: Callable[[Any, str], int]
    note: str
    recovery: str
    not_before: str
    settings: Mapping[str, str] = field(default_factory=dict)
    max_jobs: int = 1_000_000  # in a round
    polls: bool = False

    def contestant(self, *, stream: bool = False) -> Contestant:
        """Return the framework as a contestant, which makes its virtual environment at the first time."""
        queue, python = re.sub(r"\W+", "_", f"bench_{self.label}"), str(python_for(self))
        return Contestant(
            label=f"{self.label}{STREAMED}" if stream else self.label,
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
    command = [python, "-c", f"from bench.rival_jobs import enqueue_all; enqueue_all(stream={stream})"]
    subprocess.run(command, input=json.dumps(jobs), text=True, env=dict(environment), check=True)


def python_for(rival: Rival) -> Path:
    """Return the interpreter of a framework's virtual environment, which is made at the first time."""
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
    """Return how many messages RQ has."""
    keys = f"rq:queue:{queue}", f"rq:queue:{queue}:intermediate"
    return int(sum(map(redis.llen, keys)) + redis.zcard(f"rq:wip:{queue}"))


def left_in_dramatiq(redis: Any, queue: str) -> int:
    """Return how many messages Dramatiq has."""
    return int(redis.hlen(f"dramatiq:{queue}.msgs") + redis.hlen(f"dramatiq:{queue}.DQ.msgs"))


def left_in_arq(redis: Any, queue: str) -> int:
    """Return how many messages arq has."""
    return int(redis.zcard(queue))


def left_in_taskiq(redis: Any, queue: str) -> int:
    """Return how many messages taskiq has."""
    group = redis.xinfo_groups(queue)[0]
    return int(group["pending"] + (group["lag"] or 0))


RQ_WORKER: Final = ("-m", "rq.cli", "worker", "--config", "bench.rival_jobs", "{queue}")
RQ: Final = Rival(
    label="RQ",
    framework="rq",
    packages=("rq==3.0.0", "redis==8.1.0"),
    command=RQ_WORKER,
    ready="*** Listening on",
    left=left_in_rq,
    note="it forks a child for each job, which connects to MongoDB, Redis and the provider again; as with ours, its "
    "parent can kill a job that hangs (60 s after the limit)",
    recovery="its executions expire 90 s after the parent's last heartbeat; a worker looks for them when it has waited "
    "405 s for a job, and at most every 600 s (maintenance_interval)",
    not_before="an idle worker looks for lost jobs every 405 s or more",
)
RQ_SIMPLE: Final = replace(
    RQ,
    label="RQ, SimpleWorker",
    command=(*RQ_WORKER, "--worker-class", "rq.SimpleWorker"),
    note="no child, so that connections stay; the limit is SIGALRM in its only process, which doesn't interrupt native "
    "code",
    recovery="its executions expire after job_timeout + 60 s = 180 s; then as RQ",
)
DRAMATIQ: Final = Rival(
    label="Dramatiq",
    framework="dramatiq",
    packages=("dramatiq==2.2.1", "redis==8.1.0"),
    command=("-m", "dramatiq", "bench.rival_jobs:dramatiq_broker", "--processes", "1", "--threads", "1"),
    ready="ready for action",
    left=left_in_dramatiq,
    note="the job runs in a thread of the process that reads the queue, so that no job passes between processes; no "
    "events, and no results by default; the limit is an exception in that thread, which doesn't end a call that hangs",
    recovery="messages of a worker that is silent for 60 s (heartbeat_timeout) are put back by one of 1,000 commands "
    "(maintenance_chance), which is drawn at random; an idle worker makes one or two commands a second",
    not_before="left to chance: one command in 1,000 looks for lost messages",
)
ARQ_SLOW: Final = Rival(
    label="arq",
    framework="arq",
    packages=("arq==0.28.0", "redis==5.3.1"),
    command=("-m", "arq", "bench.rival_jobs.ArqSettings"),
    ready="Starting worker",
    left=left_in_arq,
    note="with max_jobs=1 it takes one job a poll, and polls each 0.5 s (poll_delay)",
    recovery="the key that marks a running job lives for job_timeout + 10 s = 130 s; every poll looks for it",
    not_before="the mark of a running job lives for 130 s",
    max_jobs=10,
)
ARQ: Final = replace(
    ARQ_SLOW,
    label="arq, poll_delay 1 ms",
    settings={"BENCH_POLL_DELAY": "0.001"},
    note="one asyncio process without a parent, no events; the limit cancels at an await, so that a job that blocks "
    "the loop is never stopped; while it is idle, it asks Redis each millisecond",
    max_jobs=RQ.max_jobs,
    polls=True,
)
TASKIQ: Final = Rival(
    label="taskiq",
    framework="taskiq",
    packages=("taskiq==0.13.0", "taskiq-redis==1.2.4", "redis==8.1.0"),
    command=(
        *("-m", "taskiq", "worker", "bench.rival_jobs:taskiq_broker", "--workers", "1"),
        *("--max-async-tasks", "1", "--ack-type", "when_executed"),
    ),
    ready="Listening started",
    left=left_in_taskiq,
    note="one asyncio process, whose parent only starts it again when it has died; it reads 100 messages at once, no "
    "events, no results by default; the limit cancels at an await, so that a job that blocks the loop is never stopped",
    recovery="what is unacknowledged for 600 s (idle_timeout) is claimed by a worker that has just read a new message; "
    "an idle worker never looks for it",
    not_before="never, as long as no new message arrives",
)
RIVALS: Final = (RQ, RQ_SIMPLE, DRAMATIQ, ARQ, ARQ_SLOW, TASKIQ)


# ── the race ─────────────────────────────────────────────────────────────────────────────────────────────────────


def count_notices(notices: Subscription) -> Counter[tuple[str, str]]:
    """Count the notices that have been published so far, by job and status."""
    counts: Counter[tuple[str, str]] = Counter()
    while notice := notices.read(REST_S):
        counts[notice["job_id"], notice["status"]] += 1
    return counts


def warm_up(bench: Bench, contestant: Contestant) -> None:
    """Let a worker do a few jobs, and check that each was written and published as it should be."""
    with bench.api.subscribed(STATUS_CHANNEL) as notices:
        jobs = bench.submit(contestant, WARM_UP_JOBS)
        bench.wait_for(jobs, "completed")
        published = {notice: count for notice, count in count_notices(notices).items() if notice[0] in jobs}
    expected = {(job_id, status): 1 for job_id in jobs for status in ("processing", "completed")}
    assert published == expected, f"{contestant.label} published {published}"
    whole = {"status": "completed", "started_at": {"$type": "date"}, "output_data.generated_text": {"$gt": ""}}
    done = bench.jobs_of(contestant).count_documents({"_id": {"$in": [ObjectId(job_id) for job_id in jobs]}, **whole})
    assert done == len(jobs), f"{contestant.label} wrote {done} of {len(jobs)}"


@contextmanager
def awake(worker: WorkerProcess, rival: Rival | None) -> Iterator[None]:
    """Let a worker that polls all the time run only now, since it would slow the others down."""
    os.killpg(worker.process.pid, signal.SIGCONT)
    yield
    if rival and rival.polls:
        os.killpg(worker.process.pid, signal.SIGSTOP)


def race(bench: Bench, rival: Rival | None, contestant: Contestant, worker: WorkerProcess) -> tuple[float, float]:
    """Return jobs a second and milliseconds of CPU time a job."""
    count, cpu_before_s = bench.options.jobs, cpu_s(worker)
    if rival:
        count = min(count, rival.max_jobs)
    speed = jobs_per_second(bench, contestant, worker, count)
    cost_ms = (cpu_s(worker) - cpu_before_s) / count * 1000
    if rival:
        left = rival.left(bench.redis, contestant.queue)
        assert not left, f"{rival.label} has acknowledged all but {left}"
    return speed, cost_ms


def race_all(bench: Bench) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return jobs a second, and milliseconds of CPU time a job, of each round by contestant."""
    by_queue = {rival.contestant().queue: rival for rival in RIVALS}
    streaming = [rival.contestant(stream=True) for rival in RIVALS if rival is not ARQ_SLOW]
    bare_ones = (replace(one, settings=APART) for one in (BARE, STREAMING))
    contestants = (OURS, *bare_ones, *(rival.contestant() for rival in RIVALS), *streaming)
    speeds: dict[str, list[float]] = {contestant.label: [] for contestant in contestants}
    costs: dict[str, list[float]] = {contestant.label: [] for contestant in contestants}
    workers: dict[str, WorkerProcess] = {}
    with ExitStack() as stack:
        for contestant in contestants:
            queue = contestant.queue
            if queue not in workers:
                workers[queue] = stack.enter_context(bench.worker(contestant))
            with awake(workers[queue], by_queue.get(queue)):
                warm_up(bench, contestant)
        for contestant in alternate(contestants, bench.options.rounds):
            queue = contestant.queue
            with awake(workers[queue], by_queue.get(queue)):
                speed, cost_ms = race(bench, by_queue.get(queue), contestant, workers[queue])
            speeds[contestant.label].append(speed)
            costs[contestant.label].append(cost_ms)
    return speeds, costs


def rivals(bench: Bench) -> list[Figure]:
    """Speed compared with RQ, Dramatiq, arq and taskiq.

    Measures jobs a second and CPU time a job, one job at a time. Bare Celery is compared as well.
    """
    speeds, costs = race_all(bench)
    notes = {rival.label: f"{rival.label}: {rival.note}" for rival in RIVALS}
    return [
        Figure(name, unit, values[OURS.label], label, values[label], note=notes.get(label, "") if unit != "ms" else "")
        for name, unit, values in (("throughput", "jobs/s", speeds), ("CPU per job", "ms", costs))
        for label in values
        if label != OURS.label
    ]


# ── a killed worker ──────────────────────────────────────────────────────────────────────────────────────────────

WAIT_S, LONG_WAIT_S = 60.0, 900.0
REPEATS_S: Final = 3.0  # after the last job is done, so long a second notice is waited for


def kill_whole(worker: WorkerProcess) -> None:
    """Kill all processes at once, as a power cut does. RQ's child is in a process group of its own."""
    for process in processes(worker):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def follow(notices: Subscription, job_ids: set[str], wait_s: float) -> dict[str, list[float]]:
    """Return at which seconds from now each job was published as completed, repeats included."""
    began_at, moments = time.monotonic(), {job_id: list[float]() for job_id in job_ids}
    until = began_at + wait_s
    while time.monotonic() < until:
        notice = notices.read(1.0) or {}
        if notice.get("status") == "completed" and notice["job_id"] in moments:
            moments[notice["job_id"]].append(time.monotonic() - began_at)
            if all(moments.values()):
                until = min(until, time.monotonic() + REPEATS_S)
    return moments


def kill_all(bench: Bench, contestants: list[Contestant], wait_s: float) -> tuple[dict[str, list[float]], Counter[str]]:
    """Kill each one's worker while it runs a job.

    Returns for each contestant when its job was published as completed, and how often the provider was called for it.
    """
    with bench.provider() as url, ExitStack() as stack:
        contestants = [replace(one, settings={**one.settings, "OPENAI_BASE_URL": url}) for one in contestants]
        victims, job_ids = [], {}
        for contestant in contestants:
            victims.append(stack.enter_context(bench.worker(contestant)))
            jobs = bench.submit(contestant, prompt=f"[delay 2000 times=1] {contestant.label}")
            bench.wait_for(jobs, "processing")
            job_ids[contestant.label] = next(iter(jobs))
        for contestant in contestants:
            stack.enter_context(bench.worker(contestant))  # stands by
        notices = stack.enter_context(bench.api.subscribed(STATUS_CHANNEL))
        for victim in victims:
            kill_whole(victim)
        moments = follow(notices, set(job_ids.values()), wait_s)
        calls = Counter(call["prompt"].split("] ")[1] for call in calls_at(url))
    return {label: moments[job_id] for label, job_id in job_ids.items()}, calls


def rivals_loss(bench: Bench) -> list[Figure]:
    """From kill -9 of a worker until another has done its job.

    All contestants' workers are killed at the same time. It waits 60 s at most, with `--long` 15 minutes.
    Without a name of a measurement it runs only with `--long`.
    """
    wait_s = LONG_WAIT_S if bench.options.long else WAIT_S
    reasons = {BARE.label: ("", REDELIVERED_LATE)}
    chosen = [rival for rival in RIVALS if rival is not ARQ]  # how often arq polls doesn't matter here
    reasons |= {rival.label: (rival.recovery, rival.not_before) for rival in chosen}
    contestants = [OURS, replace(BARE, settings=APART), *(rival.contestant() for rival in chosen)]
    moments, calls = kill_all(bench, contestants, wait_s)
    ours = moments[OURS.label]
    assert len(ours) == 1, f"ours was published {len(ours)} times"
    figures = []
    for label, (recovery, not_before) in reasons.items():
        times = moments[label]
        outcome = f"published {len(times)}×, generated {calls[label]}×" if times else f"not within {wait_s:g} s"
        note, name = f"{label} {outcome}; {recovery or not_before}", "kill -9 of the worker"
        reason = "" if times else not_before
        figures.append(Figure(name, "s", ours, label, times[:1] or [wait_s], note=note, not_before=reason))
    return figures
