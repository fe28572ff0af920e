"""The chaos run: thousands of jobs while everything around the workers dies, and an audit of every one of them.

`python bench_worker.py chaos` starts a MongoDB (a replica set of one), a Redis with append-only file, a misbehaving
provider and some workers of all pools. It submits jobs at a steady pace, as the API does, while three lanes of faults,
drawn from the seed, kill and pause processes and servers, cancel jobs and repeat messages. A change stream records
every write to every job, a subscriber every notice, the provider every call. When all is quiet again the workers are
ended, `recover` runs once, and the audit compares the four records: what must never happen is in the section "audit",
a function for each. The exit code is 1 when anything was found; each finding has the job's whole history.

The same seed gives the same jobs and faults at the same times; what a fault hits depends on the moment.
"""

from __future__ import annotations

import heapq
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import gridfs
import psutil
from bson import ObjectId
from celery import Celery
from kombu.exceptions import OperationalError
from pymongo import MongoClient
from pymongo.errors import DuplicateKeyError, PyMongoError
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from testbed.answers import SOUNDS, Plan, parse_directives, picture, words_for
from testbed.api import SOURCE, STATUS_CHANNEL, TASK_NAME, TERMINAL, WorkerProcess
from testbed.processes import LOOPBACK, Server
from testbed.provider import Call, Provider
from testbed.servers import DATABASE, MongoServer, RedisServer

Document = dict[str, Any]

# --- what is submitted --------------------------------------------------------------------------------------

TEXT, IMAGE, AUDIO = "text_generation", "image_generation", "audio_generation"
JOB_TYPES: Final = (TEXT, IMAGE, AUDIO)
CANCELLED: Final = "cancelled"
CANCEL_SHARE, REPEAT_SHARE, UNSENT_SHARE, UNUSABLE_SHARE = 0.04, 0.06, 0.005, 0.02
SIDES: Final = (32, 64, 96)


@dataclass(frozen=True)
class Behaviour:
    """What the provider does with a job, and what becomes of it when nothing else goes wrong."""

    weight: int
    directives: str
    job_types: tuple[str, ...] = JOB_TYPES
    is_good: bool = True
    limits: tuple[float, float] | None = None  # soft and hard, in seconds


BEHAVIOURS: Final = (
    Behaviour(50, ""),
    Behaviour(14, "[delay {seconds}]"),
    Behaviour(8, "[pace 0.05]", (TEXT,)),
    Behaviour(5, "[status 500 times=1]"),
    Behaviour(4, "[cut times=1]"),
    Behaviour(3, "[half times=1]", (TEXT,)),
    Behaviour(3, "[status 429 times=1 retry-after=1]"),
    Behaviour(1, "[status 503]", is_good=False),
    Behaviour(2, "[status 400]", is_good=False),
    Behaviour(2, "[hang]", is_good=False, limits=(1.5, 5)),
    Behaviour(1, "[notpicture]", (IMAGE,), is_good=False),
    Behaviour(1, "[truncated]", (IMAGE,), is_good=False),
    Behaviour(1, "[empty]", is_good=False),
    Behaviour(1, "[filter]", (TEXT,), is_good=False),
    Behaviour(1, "[html]", is_good=False),
    Behaviour(1, "[shape list]", (TEXT, IMAGE), is_good=False),
)
UNUSABLE_INPUTS: Final[tuple[Any, ...]] = ({}, {"prompt": ""}, {"prompt": 7, "text": []}, [], {"prompt": {"$ne": 1}})


@dataclass(frozen=True)
class JobPlan:
    """One job to be submitted, and what else happens to it."""

    number: int
    job_type: str
    input_data: Any
    prompt: str
    is_good: bool
    limits: tuple[float, float] | None
    cancel_after_s: float | None
    repeat_after_s: tuple[float, ...]
    is_sent: bool  # else the API died between insert and send

    @property
    def is_usable(self) -> bool:
        """Whether the provider is to be asked at all."""
        return bool(self.prompt)


def input_for(job_type: str, prompt: str, chooser: random.Random) -> Document:
    """Return what the API's clients send for a prompt."""
    if job_type == IMAGE:
        side = chooser.choice(SIDES)
        return {"prompt": prompt, "size": f"{side}x{side}"}
    if job_type == AUDIO:
        return {"text": prompt, "voice": "default", "format": chooser.choice(["flac", "flac", "mp3", "wav"])}
    return {"prompt": prompt, "max_tokens": 200}


def make_plans(seed: int, count: int) -> list[JobPlan]:
    """Draw the jobs from the seed."""
    chooser = random.Random(f"{seed} jobs")
    plans = []
    for number in range(count):
        behaviour = chooser.choices(BEHAVIOURS, [one.weight for one in BEHAVIOURS])[0]
        job_type = chooser.choice(behaviour.job_types)
        directives = behaviour.directives.format(seconds=round(chooser.uniform(0.3, 3), 1))
        prompt = f"{tag_of(seed, number)} something {directives}".strip()
        input_data: Any = input_for(job_type, prompt, chooser)
        is_usable = chooser.random() >= UNUSABLE_SHARE
        if not is_usable:
            input_data, prompt = chooser.choice(UNUSABLE_INPUTS), ""
        cancel = chooser.choice([0.0, 0.2, 1.0, 3.0]) if chooser.random() < CANCEL_SHARE else None
        is_repeated = chooser.random() < REPEAT_SHARE
        repeats = tuple(chooser.choice([0.0, 0.1, 0.5, 2.0, 20.0]) for _ in range(chooser.choice([1, 1, 2])))
        plan = JobPlan(number, job_type, input_data, prompt, is_usable and behaviour.is_good, behaviour.limits, cancel,
                       repeats if is_repeated else (), chooser.random() >= UNSENT_SHARE)  # fmt: skip
        plans.append(plan)
    return plans


def tag_of(seed: int, number: int) -> str:
    """Return the word by which a job's prompt is known; none of them may appear in a log."""
    return f"chaos-{seed}-{number:05}"


# --- faults -------------------------------------------------------------------------------------------------

LEASE_S, SWEEP_S = 4.0, 1.0
SOFT_LIMIT_S, HARD_LIMIT_S = 8.0, 14.0
LONGEST_OUTAGE_S = 10.0
PROCESS_FAULTS: Final = (
    *("kill a child", "kill a worker", "end a worker", "stop a worker", "kill a child", "stop a child"),
    "kill a worker without its children",
)
SERVER_FAULTS: Final = ("crash Redis", "pause Redis", "cut Redis' connections", "kill MongoDB", "pause MongoDB")


@dataclass(frozen=True)
class Fault:
    """One planned fault: when, what, which of those there are (0..1), and for how long."""

    at_s: float
    kind: str
    pick: float
    seconds: float


@dataclass
class Happened:
    """A fault as it came: the processes it hit, from when until when (Unix seconds)."""

    kind: str
    at: float
    pids: frozenset[int] = frozenset()
    until: float = 0.0


def make_faults(seed: int, kinds: Sequence[str], minutes: float, gap_s: float, longest_s: float) -> list[Fault]:
    """Draw faults from the seed: every kind in each round, with random pauses."""
    chooser, at_s = random.Random(f"{seed} {kinds}"), 1.0
    faults: list[Fault] = []
    while True:
        for kind in chooser.sample(kinds, len(kinds)):
            at_s += chooser.uniform(0.3, 1.7) * gap_s
            if at_s > minutes * 60:
                return faults
            faults.append(Fault(at_s, kind, chooser.random(), chooser.uniform(1, longest_s)))


class Lane(threading.Thread):
    """Does things at their time, one after the other, and what follows from them."""

    def __init__(self, name: str, began_at: float) -> None:
        super().__init__(name=name, daemon=True)
        self._began_at = began_at
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._count = itertools.count()
        self._changed = threading.Condition()
        self._is_closed = False
        self.error: BaseException | None = None

    def at(self, at_s: float, action: Callable[[], object]) -> None:
        """Schedule something, in seconds since the run began."""
        with self._changed:
            heapq.heappush(self._due, (at_s, next(self._count), action))
            self._changed.notify()

    def after(self, delay_s: float, action: Callable[[], object]) -> None:
        """Schedule something for later."""
        self.at(time.monotonic() - self._began_at + delay_s, action)

    def close(self) -> None:
        """End when nothing is left to do. Raises what the lane's actions raised."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self.join()
        if self.error:
            raise self.error

    def run(self) -> None:
        """Work until closed and empty."""
        try:
            while action := self._next():
                action()
        except BaseException as error:
            self.error = error

    def _next(self) -> Callable[[], object] | None:
        with self._changed:
            while True:
                wait_s = self._due[0][0] - (time.monotonic() - self._began_at) if self._due else None
                if wait_s is not None and wait_s <= 0:
                    return heapq.heappop(self._due)[2]
                if wait_s is None and self._is_closed:
                    return None
                self._changed.wait(wait_s)


# --- workers ------------------------------------------------------------------------------------------------

POOLS: Final = (("prefork", 2), ("threads", 8), ("prefork", 2), ("solo", 1))
PLANTED_KEY: Final = "sk-chaos-planted-key"
LEAVE_WITHIN_S = 60.0
# The worker's own fixed waits, which a short run divides so that it sees what they lead to.
FIXED_WAITS: Final = ("RESCUE_FIRST_S", "RESCUE_LONGEST_S", "PENDING_OVERDUE_S", "NOTICE_OVERDUE_S")


def worker_command(hurry: float, *arguments: str) -> list[str]:
    """Return the arguments of Python that run the worker, its fixed waits divided."""
    if hurry == 1:
        return [str(SOURCE / "worker.py"), *arguments]
    changes = "".join(f"worker.{name} /= {hurry}; " for name in FIXED_WAITS)
    return ["-c", f"import worker; {changes} worker.main()", *arguments]


@dataclass
class Slot:
    """A place in the fleet: its pool, who works there now, and whether it is stopped."""

    number: int
    worker: WorkerProcess
    is_prefork: bool
    is_disturbed: bool = False


class Fleet:
    """The workers, and what is done to them."""

    def __init__(self, environment: Mapping[str, str], folder: Path, count: int, hurry: float) -> None:
        self._environment, self._folder, self._hurry = environment, folder, hurry
        self.logs: list[Path] = []
        self.faults: list[str] = []
        self.happened: list[Happened] = []
        self._started: list[WorkerProcess] = []
        self._leaving: list[tuple[WorkerProcess, float]] = []
        self._orphans: list[int] = []
        self.slots = [Slot(number, self._start(number), POOLS[number % 4][0] == "prefork") for number in range(count)]
        for slot in self.slots:
            slot.worker.wait_ready(60)

    def _start(self, number: int) -> WorkerProcess:
        pool, concurrency = POOLS[number % len(POOLS)]
        log = self._folder / f"worker-{len(self.logs):03}-{pool}.log"
        environment = {**self._environment, "WORKER_POOL": pool, "WORKER_CONCURRENCY": str(concurrency)}
        worker = WorkerProcess(environment, log, worker_command(self._hurry))
        self.logs.append(log)
        self._started.append(worker)
        return worker

    def do(self, fault: Fault, lane: Lane) -> None:
        """Let a fault happen to a worker that is picked among the undisturbed ones; one always is."""
        calm = [slot for slot in self.slots if not slot.is_disturbed]
        if "child" in fault.kind:  # only prefork has any; one killed at its start ends the worker, says Celery
            calm = [slot for slot in calm if slot.is_prefork and " ready." in slot.worker.text()]
        if not calm or ("worker" in fault.kind and len(calm) < 2 and len(self.slots) > 1):
            return
        slot = calm[int(fault.pick * len(calm))]
        actions: dict[str, Callable[[Slot, Fault, Lane], object]] = {
            "kill a child": self._kill_child,
            "kill a worker": self._kill_worker,
            "kill a worker without its children": self._orphan_children,
            "end a worker": self._end_worker,
            "stop a worker": self._stop_worker,
            "stop a child": self._stop_child,
        }
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            actions[fault.kind](slot, fault, lane)

    def _note(self, kind: str, pids: Iterable[int], until: float = 0.0) -> None:
        self.happened.append(Happened(kind, time.time(), frozenset(pids), until or time.time()))

    def _child(self, slot: Slot, fault: Fault) -> int:
        children = sorted(slot.worker.children())
        if not children:
            raise ProcessLookupError
        return children[int(fault.pick * 997) % len(children)]

    def _everyone(self, slot: Slot) -> list[int]:
        return [slot.worker.process.pid, *slot.worker.children()]

    def _kill_child(self, slot: Slot, fault: Fault, _lane: Lane) -> None:
        child = self._child(slot, fault)
        self._note(fault.kind, [child])
        os.kill(child, signal.SIGKILL)

    def _kill_worker(self, slot: Slot, fault: Fault, lane: Lane) -> None:
        self._note(fault.kind, self._everyone(slot))
        self._expect_alive(slot)
        slot.worker.kill()
        slot.is_disturbed = True
        lane.after(min(fault.seconds, 4), lambda: self._replace(slot))

    def _orphan_children(self, slot: Slot, fault: Fault, lane: Lane) -> None:
        """Kill the main process alone, as an out-of-memory killer may; its children end by themselves."""
        self._orphans += slot.worker.children()
        self._note(fault.kind, self._everyone(slot))
        self._expect_alive(slot)
        slot.worker.process.kill()
        slot.is_disturbed = True
        lane.after(min(fault.seconds, 4), lambda: self._replace(slot))

    def _end_worker(self, slot: Slot, fault: Fault, _lane: Lane) -> None:
        self._note(fault.kind, self._everyone(slot))
        self._expect_alive(slot)
        slot.worker.signal(signal.SIGTERM)
        self._leaving.append((slot.worker, time.monotonic()))
        self._replace(slot)

    def _replace(self, slot: Slot) -> None:
        slot.worker = self._start(slot.number)
        slot.is_disturbed = False

    def _stop_worker(self, slot: Slot, fault: Fault, lane: Lane) -> None:
        group, seconds = slot.worker.process.pid, LEASE_S + SWEEP_S + fault.seconds
        self._note(fault.kind, self._everyone(slot), time.time() + seconds)
        os.killpg(group, signal.SIGSTOP)
        slot.is_disturbed = True
        lane.after(seconds, lambda: self._resume(slot, group))

    def _stop_child(self, slot: Slot, fault: Fault, lane: Lane) -> None:
        child, seconds = self._child(slot, fault), LEASE_S + SWEEP_S + fault.seconds
        self._note(fault.kind, [child], time.time() + seconds)
        os.kill(child, signal.SIGSTOP)
        lane.after(seconds, lambda: self._resume_process(child))

    def _resume(self, slot: Slot, group: int) -> None:
        slot.is_disturbed = False
        os.killpg(group, signal.SIGCONT)

    @staticmethod
    def _resume_process(pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def _expect_alive(self, slot: Slot) -> None:
        if (code := slot.worker.process.poll()) is not None:
            self.faults.append(f"{slot.worker.log.name} had ended by itself with exit code {code}")

    def end(self) -> None:
        """Send SIGTERM to all that still run, and see that all end well."""
        for slot in self.slots:
            self._expect_alive(slot)
            slot.worker.signal(signal.SIGTERM)
            self._leaving.append((slot.worker, time.monotonic()))
        for worker, asked_at in self._leaving:
            try:
                code = worker.process.wait(max(1.0, asked_at + LEAVE_WITHIN_S - time.monotonic()))
                if code != 0 and " ready." in worker.text():  # else it was ended before it could listen
                    self.faults.append(f"{worker.log.name} ended with exit code {code} after SIGTERM")
            except subprocess.TimeoutExpired:
                self.faults.append(f"{worker.log.name} didn't end within {LEAVE_WITHIN_S:g} s of SIGTERM")
        self.faults += [f"child {pid} outlives its killed worker" for pid in self._orphans if psutil.pid_exists(pid)]

    def kill(self) -> None:
        """Leave no process behind."""
        for worker in self._started:
            worker.kill()


class Servers:
    """MongoDB and Redis, and what is done to them."""

    def __init__(self, mongo: MongoServer, redis: RedisServer) -> None:
        self._mongo, self._redis = mongo, redis
        self.happened: list[Happened] = []

    def do(self, fault: Fault) -> None:
        """Let a fault happen; return when the server answers again."""
        happened = Happened(fault.kind, time.time())
        self.happened.append(happened)
        happened.until = float("inf")
        server: Server = self._mongo if "MongoDB" in fault.kind else self._redis
        if fault.kind.startswith("pause"):
            server.pause()
            time.sleep(fault.seconds)
            server.resume()
        elif fault.kind.startswith("cut"):
            with suppress(RedisError), Redis.from_url(self._redis.url, socket_timeout=5) as client:
                for kind in ("normal", "pubsub"):
                    client.client_kill_filter(_type=kind, skipme=True)
        else:
            server.kill()
            time.sleep(fault.seconds if server is self._mongo else fault.seconds / 5)
            server.start()
        happened.until = time.time()


# --- records ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Notice:
    """One heard `job_status_update`."""

    at: float
    job_id: str
    status: str


class Listener(threading.Thread):
    """Hears every notice while it is connected, and notes when it wasn't: pub/sub keeps nothing for later."""

    def __init__(self, url: str) -> None:
        super().__init__(name="listener", daemon=True)
        self._url = url
        self._is_ending = threading.Event()
        self.notices: list[Notice] = []
        self.gaps: list[tuple[float, float]] = []
        self._alive_at = 0.0

    def run(self) -> None:
        """Subscribe again and again until ended."""
        while not self._is_ending.is_set():
            with suppress(RedisError, OSError):
                self._listen()
            time.sleep(0.02)

    def _listen(self) -> None:
        with Redis.from_url(self._url, socket_connect_timeout=2, retry=Retry(NoBackoff(), 0)) as client:
            with client.pubsub() as pubsub:
                pubsub.subscribe(STATUS_CHANNEL)
                while not self._is_ending.is_set():
                    message = pubsub.get_message(timeout=0.2)
                    if message and message["type"] == "subscribe":
                        self.gaps.append((self._alive_at, time.time()))
                    if message and message["type"] == "message":
                        notice = json.loads(message["data"])
                        self.notices.append(Notice(time.time(), notice["job_id"], notice["status"]))
                    self._alive_at = time.time() - 0.1

    def end(self) -> None:
        """Stop listening."""
        self._is_ending.set()
        self.join(10)


class ChangeRecorder(threading.Thread):
    """Every write to every job, in order, from a change stream that outlives its server."""

    MARKS: Final = "chaos_marks"

    def __init__(self, url: str, database: str = DATABASE) -> None:
        super().__init__(name="changes", daemon=True)
        self._mongo: MongoClient[Document] = MongoClient(url, tz_aware=True)
        self._database = self._mongo[database]
        self._token: Any = None
        self.is_open = threading.Event()
        self.events: dict[ObjectId, list[Document]] = defaultdict(list)

    def run(self) -> None:
        """Follow the stream until the mark is seen."""
        while True:
            with suppress(PyMongoError):
                if self._follow():
                    return
            time.sleep(0.2)

    def _follow(self) -> bool:
        pipeline = [{"$match": {"ns.coll": {"$in": ["jobs", self.MARKS]}}}]
        with self._database.watch(pipeline, resume_after=self._token, max_await_time_ms=500) as stream:
            self._token = stream.resume_token
            self.is_open.set()
            while True:
                event = stream.try_next()
                self._token = stream.resume_token
                if event and event["ns"]["coll"] == self.MARKS:
                    return True
                if event:
                    self.events[event["documentKey"]["_id"]].append(dict(event))

    def end(self) -> None:
        """Wait until everything that was written up to now is recorded."""
        self._database[self.MARKS].insert_one({})
        self.join(60)
        self._mongo.close()


@dataclass(frozen=True)
class Step:
    """One write to a job's document, and how things stood after it."""

    at: float
    kind: str
    status: str
    owner: str | None
    pid: int | None
    attempt: int
    fields: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind}: {self.status}, owner {self.owner}, pid {self.pid}, attempt {self.attempt} {self.fields}"


ENDS: Final = ("completed", "failed", "cancelled")
LOSSES: Final = ("handed back", "rescued")


def name_of_step(before: Document, after: Document, changed: Document, removed: Sequence[str]) -> str:
    """Return what kind of transition a write was."""
    if changed.get("status") in TERMINAL:
        return CANCELLED if changed.get("error_message") == CANCELLED else str(changed["status"])
    if "owner" in changed and after.get("owner"):
        return "claimed"
    if "owner" in changed and "released_by" in changed:
        is_counted, is_due = after["attempt"] == before["attempt"], after["available_at"] <= after["updated_at"]
        return "released" if is_counted else "handed back" if is_due else "put off"
    if "rescues" in changed:
        return "rescued" if after["status"] == "processing" else "sent again"
    if set(changed) == {"lease_until"}:
        return "renewed"
    return "noticed" if not changed and list(removed) == ["worker.unnotified"] else "changed"


def fold(events: Iterable[Document]) -> list[Step]:
    """Turn a document's change events into steps."""
    steps: list[Step] = []
    state: Document = {"status": None}
    for event in events:
        before = dict(state)
        description = event.get("updateDescription") or {}
        changed: Document = {}
        for name, value in (description.get("updatedFields") or event.get("fullDocument") or {}).items():
            changed |= value if name == "worker" and isinstance(value, dict) else {name.removeprefix("worker."): value}
        removed = description.get("removedFields") or []
        state |= changed
        is_update = event["operationType"] == "update"
        kind = name_of_step(before, state, changed, removed) if is_update else event["operationType"]
        fields = tuple(sorted(changed)) if kind in ("changed", "rescued") else ()
        numbers = state.get("owner"), state.get("pid"), state.get("attempt", 0)
        steps.append(Step(event["wallTime"].timestamp(), kind, str(state["status"]), *numbers, fields))
    return steps


# --- the run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    jobs: int
    workers: int
    minutes: float
    seed: int
    hurry: float


def quiet_port(chooser: random.Random) -> int:
    """Return a port below those that clients get: while a server is down nobody else can have its port."""
    while True:
        port = chooser.randrange(20_000, 32_000)
        with suppress(OSError):
            with socket.socket() as probe:
                probe.bind((LOOPBACK, port))
                return port


class Submitter:
    """Inserts and sends as the API does, and goes on through outages."""

    def __init__(self, mongodb_url: str, redis_url: str) -> None:
        self.mongo: MongoClient[Document] = MongoClient(mongodb_url, tz_aware=True, timeoutMS=3000)
        self.jobs = self.mongo[DATABASE]["jobs"]
        self._celery = Celery("api", broker=redis_url, set_as_current=False)
        self._celery.conf.broker_transport_options = {"socket_timeout": 2, "socket_connect_timeout": 2}
        self.unsent = 0

    def insert(self, plan: JobPlan) -> ObjectId:
        """Insert the document, once, however often it takes."""
        now, job_id = datetime.now(UTC), ObjectId()
        nothing = dict.fromkeys(("output_data", "artifact_url", "error_message", "started_at", "completed_at"))
        people = {"user_id": f"user-{plan.number}", "session_id": f"session-{plan.number}" if plan.number % 3 else None}
        what = {"job_type": plan.job_type, "status": "pending", "input_data": plan.input_data, **nothing}
        document = {"_id": job_id, **people, **what, "created_at": now, "updated_at": now}
        with suppress(DuplicateKeyError):
            self._insist(lambda: self.jobs.insert_one(document))
        return job_id

    def send(self, job_id: ObjectId, plan: JobPlan) -> None:
        """Send the message; one that can't be sent is lost, for the sweeper to find."""
        data = {"job_id": str(job_id), "job_type": plan.job_type, "input_data": plan.input_data, "user_id": "u"}
        soft_s, hard_s = plan.limits or (None, None)
        options: Document = {"soft_time_limit": soft_s, "time_limit": hard_s, "ignore_result": True, "queue": "ai_jobs"}
        try:
            self._celery.send_task(TASK_NAME, args=(str(job_id), data), **options)
        except (OperationalError, RedisError, OSError):
            self.unsent += 1

    def cancel(self, job_id: ObjectId) -> None:
        """Cancel as the API does, by the document alone, if the job is still active."""
        active = {"_id": job_id, "status": {"$in": ["pending", "processing"]}}
        update = {"status": "failed", "error_message": CANCELLED, "updated_at": datetime.now(UTC)}
        self._insist(lambda: self.jobs.update_one(active, {"$set": update}))

    def unfinished(self) -> int:
        """Return the number of jobs that haven't ended, or whose last notice isn't out."""
        waiting = [{"status": {"$in": ["pending", "processing"]}}, {"worker.unnotified": {"$exists": True}}]
        return int(self._insist(lambda: self.jobs.count_documents({"$or": waiting})))

    @staticmethod
    def _insist(action: Callable[[], Any]) -> Any:
        while True:
            try:
                return action()
            except DuplicateKeyError:
                raise
            except PyMongoError:
                time.sleep(0.2)

    def close(self) -> None:
        """Close the connections."""
        self._celery.close()
        self.mongo.close()


@dataclass
class History:
    """All that is known about one job."""

    plan: JobPlan
    job_id: ObjectId
    document: Document = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    @property
    def ends(self) -> list[Step]:
        """The writes that ended it; there should be one."""
        return [step for step in self.steps if step.kind in ENDS]

    @property
    def claims(self) -> list[Step]:
        """The writes that took it."""
        return [step for step in self.steps if step.kind == "claimed"]

    def attempts(self) -> Iterator[tuple[Step, Step]]:
        """Yield each claim with the step that ended it."""
        lasting = [step for step in self.steps if step.kind not in ("renewed", "noticed")]
        return ((step, then) for step, then in itertools.pairwise(lasting) if step.kind == "claimed")


@dataclass
class Evidence:
    """What the run left behind."""

    options: Options
    histories: dict[ObjectId, History]
    happened: list[Happened]
    gaps: list[tuple[float, float]]
    files: dict[str, bytes]
    chunk_owners: set[str]
    fleet_faults: list[str]
    logs: dict[str, str]
    recovered: str
    took_s: float


def tell(evidence: Evidence, history: History) -> str:
    """Return a job's whole history: writes, notices, calls and faults in order, then its lines in the logs."""
    lines = [(step.at, f"document {step}") for step in history.steps]
    lines += [(notice.at, f"notice {notice.status}") for notice in history.notices]
    lines += [(call.started_at, f"call {call.outcome} after {call.duration_s:.2f} s") for call in history.calls]
    began, ended = (history.steps[0].at, history.steps[-1].at) if history.steps else (0.0, 0.0)
    around = [one for one in evidence.happened if one.at <= ended + 1 and one.until >= began - 1]
    lines += [(one.at, f"fault: {one.kind} for {one.until - one.at:.1f} s {sorted(one.pids)}") for one in around]
    told = [f"  {at - began:8.3f} s  {text}" for at, text in sorted(lines)]
    head = [f"job {history.job_id}: {history.plan}", f"  document: {history.document}"]
    return "\n".join([*head, *told, *(f"    {line}" for line in history.lines)])


class Run:
    """One chaos run, from the first server to the evidence; a context manager that leaves no process behind."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options, self.folder = options, folder
        self._stack = ExitStack()
        self._began_at = time.monotonic()
        self.histories: dict[ObjectId, History] = {}

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            ports = random.Random()
            self.mongo = stack.enter_context(MongoServer(quiet_port(ports), replica_set=True))
            self.redis = stack.enter_context(RedisServer(quiet_port(ports)))
            self.provider = stack.enter_context(Provider(api_key=PLANTED_KEY))
            self.changes = ChangeRecorder(self.mongo.url)
            self.listener = Listener(self.redis.url)
            self.changes.start()
            self.listener.start()
            self.changes.is_open.wait(20)
            self.submitter = Submitter(self.mongo.url, self.redis.url)
            stack.callback(self.submitter.close)
            self.servers = Servers(self.mongo, self.redis)
            self.fleet = Fleet(self._environment(), self.folder, self.options.workers, self.options.hurry)
            stack.callback(self.fleet.kill)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _environment(self) -> dict[str, str]:
        return {
            "PYTHONPATH": str(SOURCE),
            "MONGODB_URL": self.mongo.url,
            "DATABASE_NAME": DATABASE,
            "REDIS_URL": self.redis.url,
            "OPENAI_BASE_URL": self.provider.url,
            "OPENAI_API_KEY": PLANTED_KEY,
            "LEASE_SECONDS": str(LEASE_S),
            "SWEEP_INTERVAL": str(SWEEP_S),
            "RETRY_DELAYS": "0.2,0.5,1",
            "CELERY_SOFT_TIME_LIMIT": str(SOFT_LIMIT_S),
            "CELERY_TIME_LIMIT": str(HARD_LIMIT_S),
            "SHUTDOWN_GRACE": "1",
            "DEBUG": "true",
        }

    def go(self) -> Evidence:
        """Submit, disturb, settle, end, recover, and collect the evidence."""
        self._began_at = time.monotonic()
        self._submit_amid_faults()
        self.say("all submitted; settling")
        self._settle()
        self.say("ending the workers")
        self.fleet.end()
        recovered = self._recover()
        self.changes.end()
        self.listener.end()
        return self._evidence(recovered)

    def say(self, text: str) -> None:
        """Tell whoever watches how far it is."""
        print(f"{time.monotonic() - self._began_at:5.0f} s  {text}", file=sys.stderr, flush=True)

    def _submit_amid_faults(self) -> None:
        options = self.options
        processes, servers, messages = (Lane(name, self._began_at) for name in ("processes", "servers", "messages"))
        longest_s = min(LONGEST_OUTAGE_S, max(2.0, options.minutes * 5))
        for fault in make_faults(options.seed, PROCESS_FAULTS, options.minutes, 4, 4):
            processes.at(fault.at_s, lambda fault=fault: self.fleet.do(fault, processes))  # type: ignore[misc]
        for fault in make_faults(options.seed, SERVER_FAULTS, options.minutes, 4 + longest_s, longest_s):
            servers.at(fault.at_s, lambda fault=fault: self.servers.do(fault))  # type: ignore[misc]
        for lane in (processes, servers, messages):
            lane.start()
        for plan in make_plans(options.seed, options.jobs):
            due_at = self._began_at + plan.number * options.minutes * 60 / options.jobs
            time.sleep(max(0.0, due_at - time.monotonic()))
            self._submit(plan, messages)
        for lane in (processes, servers, messages):
            lane.close()

    def _submit(self, plan: JobPlan, lane: Lane) -> None:
        job_id = self.submitter.insert(plan)
        self.histories[job_id] = History(plan, job_id)
        if plan.is_sent:
            self.submitter.send(job_id, plan)
        if plan.cancel_after_s is not None:
            lane.after(plan.cancel_after_s, lambda: self.submitter.cancel(job_id))
        for repeat_s in plan.repeat_after_s:
            lane.after(repeat_s, lambda: self.submitter.send(job_id, plan))
        if plan.number % 500 == 499:
            self.say(f"{plan.number + 1} jobs submitted, {self.submitter.unfinished()} not ended")

    def _settle(self) -> None:
        give_up_at, said_at = time.monotonic() + max(60.0, 600 / self.options.hurry), time.monotonic()
        while (count := self.submitter.unfinished()) and time.monotonic() < give_up_at:
            if time.monotonic() > said_at + 10:
                self.say(f"{count} jobs not ended or not told")
                said_at = time.monotonic()
            time.sleep(0.5)

    def _recover(self) -> str:
        """Run `recover` as an operator would."""
        command = [sys.executable, *worker_command(self.options.hurry, "recover")]
        environment = {**os.environ, **self._environment()}
        done = subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=60)
        return f"exit code {done.returncode}: {done.stdout.strip()} {done.stderr.strip()}".strip()

    def _evidence(self, recovered: str) -> Evidence:
        database = self.submitter.mongo[DATABASE]
        bucket = gridfs.GridFS(database, collection="artifacts")
        files = {file.filename: file.read() for file in bucket.find({}, no_cursor_timeout=False)}
        chunk_owners = set(map(str, database["artifacts.chunks"].distinct("files_id")))
        logs = {path.name: path.read_text(errors="replace") for path in self.fleet.logs}
        for document in self.submitter.jobs.find():
            self.histories[document["_id"]].document = document
        self._sort_in(logs)
        happened = sorted(self.fleet.happened + self.servers.happened, key=lambda one: one.at)
        took_s = time.monotonic() - self._began_at
        rest = self.fleet.faults, logs, recovered, took_s
        return Evidence(self.options, self.histories, happened, self.listener.gaps, files, chunk_owners, *rest)

    def _sort_in(self, logs: Mapping[str, str]) -> None:
        """Give each job its steps, notices, calls and log lines."""
        for job_id, events in self.changes.events.items():
            self.histories[job_id].steps = fold(events)
        for notice in self.listener.notices:
            self.histories[ObjectId(notice.job_id)].notices.append(notice)
        by_number = {history.plan.number: history for history in self.histories.values()}
        for call in self.provider.calls:
            if found := re.search(rf"chaos-{self.options.seed}-(\d+)", call.prompt):
                by_number[int(found[1])].calls.append(call)
        for name, text in logs.items():
            for line in text.splitlines():
                for found_id in set(re.findall(r"job=([0-9a-f]{24})", line)):
                    self.histories[ObjectId(found_id)].lines.append(f"{name}: {line}")


# --- audit --------------------------------------------------------------------------------------------------

MOST_ATTEMPTS: Final = 4
CLOCK_TOLERANCE_S: Final = 0.02
CANCEL_HEARD_S: Final = 2.0  # after so long an attempt knows that the API has cancelled its job
HONEST_SENTENCES: Final = (
    "This could not be finished after several tries.",
    "This took too long and was stopped.",
    "given up after",
    "The provider refused this request.",
    "The provider's answer could not be used.",
    "The provider's content rules forbid this text.",
    "The provider returned an empty text.",
    "The input can't be used:",
)

JobCheck = Callable[[Evidence, History], Iterable[str]]
RunCheck = Callable[[Evidence], Iterable[str]]
JOB_CHECKS: list[JobCheck] = []
RUN_CHECKS: list[RunCheck] = []


def of_each_job(check: JobCheck) -> JobCheck:
    """Makes a function part of the audit; it yields what is wrong with a job."""
    JOB_CHECKS.append(check)
    return check


def of_the_run(check: RunCheck) -> RunCheck:
    """Makes a function part of the audit; it yields what is wrong with the whole."""
    RUN_CHECKS.append(check)
    return check


@of_each_job
def ends_once(_evidence: Evidence, history: History) -> Iterator[str]:
    """Each document ends by one write, and nothing but the outbox's mark comes after it."""
    if history.document.get("status") not in TERMINAL:
        yield f"stuck or lost: {history.document.get('status')}"
        return
    if len(history.ends) != 1:
        yield f"ended {len(history.ends)} times"
    after = list(itertools.dropwhile(lambda step: step.kind not in ENDS, history.steps))[1:]
    allowed = () if history.ends and history.ends[0].kind == CANCELLED else ("noticed",)
    yield from (f"written to after its end: {step}" for step in after if step.kind not in allowed)
    if history.document.get("worker", {}).get("unnotified"):
        yield "its last notice was never published"


@of_each_job
def is_claimed_one_at_a_time(_evidence: Evidence, history: History) -> Iterator[str]:
    """Only a job that nobody holds is claimed, and not more often than the cap allows."""
    for step, then in itertools.pairwise(history.steps):
        if then.kind == "claimed" and step.owner is not None:
            yield f"claimed while it was held: {then}"
    if any(step.attempt > MOST_ATTEMPTS for step in history.steps):
        yield "more attempts than the cap"


@of_each_job
def has_its_result(evidence: Evidence, history: History) -> Iterator[str]:
    """A completed job has exactly what the provider gave; a failed one has an honest sentence and nothing else."""
    document, plan = history.document, history.plan
    output = document.get("output_data") or {}
    if document.get("status") == "failed":
        sentence = str(document.get("error_message"))
        if output or document.get("artifact_url"):
            yield "failed, with an output"
        if history.ends and history.ends[0].kind == "failed" and not any(one in sentence for one in HONEST_SENTENCES):
            yield f"failed for no good reason: {sentence}"
    elif document.get("status") == "completed":
        if not plan.is_good:
            yield "completed, though its provider or its input was bad"
        elif plan.job_type == TEXT:
            expected = "".join(words_for(Plan(plan.prompt, parse_directives(plan.prompt))))
            if output.get("generated_text") != expected or document["artifact_url"] is not None:
                yield f"not the provider's text: {output}"
        else:
            yield from judge_artifact(evidence, history, output)


def judge_artifact(evidence: Evidence, history: History, output: Document) -> Iterator[str]:
    """Yield what is wrong with the file of a completed job."""
    url, asked = str(history.document.get("artifact_url")), history.plan.input_data
    data = evidence.files.get(url.removeprefix("/artifacts/"))
    if data is None:
        yield f"its artifact is missing: {url}"
    elif history.plan.job_type == IMAGE:
        width, height = map(int, asked["size"].split("x"))
        if (output.get("image_url"), output.get("resolution")) != (url, asked["size"]):
            yield f"wrong output: {output}"
        if data != picture(width, height):
            yield f"not the provider's picture ({len(data)} bytes)"
    else:
        if (output.get("audio_url"), output.get("format")) != (url, asked["format"]):
            yield f"wrong output: {output}"
        if data != SOUNDS[asked["format"]][1]():
            yield f"not the provider's sound ({len(data)} bytes)"


@of_each_job
def is_told_the_truth(evidence: Evidence, history: History) -> Iterator[str]:
    """Nobody hears a status before the document has it, nor two ends; the last notice is the document's status."""
    told = {notice.status for notice in history.notices}
    if {"completed", "failed"} <= told:
        yield "told as completed and as failed"
    end = history.ends[0] if history.ends else None
    if end is None:
        return
    for notice in history.notices:
        if notice.status in TERMINAL and notice.at < end.at - CLOCK_TOLERANCE_S:
            yield f"told as {notice.status} {end.at - notice.at:.3f} s before the document said so"
        if notice.status in TERMINAL and notice.status != history.document.get("status"):
            yield f"told as {notice.status}, but it is {history.document.get('status')}"
    last = history.notices[-1].status if history.notices else None
    if last not in TERMINAL and end.kind != CANCELLED and not was_away(evidence, history):
        yield f"its last notice is {last}"


def was_away(evidence: Evidence, history: History) -> bool:
    """Return whether the subscriber was away at some moment between the end and the mark that the notice is out."""
    marks = [step.at for step in history.steps if step.kind == "noticed"]
    until = marks[0] if marks else history.ends[0].at + 5
    return any(start <= until and history.ends[0].at <= end for start, end in evidence.gaps)


@of_each_job
def is_generated_no_more_than_claimed(_evidence: Evidence, history: History) -> Iterator[str]:
    """The provider is asked at most once for each claim, never for unusable input, never after the end."""
    if len(history.calls) > len(history.claims):
        yield f"{len(history.calls)} calls in {len(history.claims)} attempts"
    if history.calls and not history.plan.is_usable:
        yield "the provider was asked though the input can't be used"
    for end in history.ends[:1]:
        known_at = end.at + (CANCEL_HEARD_S if end.kind == CANCELLED else CLOCK_TOLERANCE_S)
        late = [call.started_at - end.at for call in history.calls if call.started_at > known_at]
        yield from (f"generated again {seconds:.3f} s after its end" for seconds in late)
    if history.document.get("status") == "completed" and not history.calls:
        yield "completed without asking the provider"


@of_each_job
def is_rescued_only_for_a_reason(evidence: Evidence, history: History) -> Iterator[str]:
    """A job is taken from an attempt only when its process or a server was hit."""
    for claim, then in history.attempts():
        if then.kind in LOSSES and cause_of(evidence, claim, then) == UNKNOWN_CAUSE:
            yield f"taken from a live attempt after {then.at - claim.at:.1f} s: {then}"


@of_the_run
def every_artifact_has_a_job(evidence: Evidence) -> Iterator[str]:
    """Every file, and every chunk of one, belongs to a completed document."""
    documents = [history.document for history in evidence.histories.values()]
    named = {str(document.get("artifact_url")).removeprefix("/artifacts/") for document in documents}
    yield from (f"a file without a job: {name}" for name in sorted(evidence.files.keys() - named))
    yield from (f"chunks without a file: {name}" for name in sorted(evidence.chunk_owners - evidence.files.keys()))


@of_the_run
def every_worker_ends_well(evidence: Evidence) -> Iterator[str]:
    """No worker ends by itself, and each ends on SIGTERM; `recover` works."""
    yield from evidence.fleet_faults
    if not evidence.recovered.startswith("exit code 0"):
        yield f"recover: {evidence.recovered}"


@of_the_run
def logs_hold_no_secret_and_no_crash(evidence: Evidence) -> Iterator[str]:
    """No log has the provider's key, a prompt, or a stack trace through worker.py."""
    for name, text in evidence.logs.items():
        if PLANTED_KEY in text:
            yield f"{name} has the provider's key"
        if f"chaos-{evidence.options.seed}-" in text:
            yield f"{name} has a prompt"
        yield from (f"{name}: stack trace through worker.py:\n{block}" for block, own in tracebacks(text) if own)


def tracebacks(text: str) -> Iterator[tuple[str, bool]]:
    """Yield each stack trace of a log, and whether it passes through worker.py."""
    for block in text.split("Traceback (most recent call last):\n")[1:]:
        lines = block.splitlines()
        inside = list(itertools.takewhile(lambda line: line.startswith(" ") or not line.strip(), lines))
        trace = "\n".join([*inside, *lines[len(inside) : len(inside) + 1]])
        yield trace, f'"{SOURCE / "worker.py"}"' in trace


# --- causes and figures -------------------------------------------------------------------------------------

UNKNOWN_CAUSE: Final = "unknown"


def cause_of(evidence: Evidence, claim: Step, loss: Step) -> str:
    """Return the fault for which an attempt lost its job: one of its process, else one of a server meanwhile."""
    meanwhile = [one for one in evidence.happened if one.at <= loss.at and one.until >= claim.at - LEASE_S]
    own = [one.kind for one in meanwhile if claim.pid in one.pids]
    around = [one.kind for one in meanwhile if not one.pids]
    return (own or around or [UNKNOWN_CAUSE])[0]


@dataclass(frozen=True, order=True)
class Recovery:
    """How long a job waited for somebody else after a fault of the process that held it."""

    seconds: float
    kind: str
    job_id: ObjectId


def recoveries(evidence: Evidence) -> list[Recovery]:
    """Return, for each job whose process was hit, the time until its next claim or its end."""
    found = []
    by_pid = defaultdict(list)
    for happened in evidence.happened:
        for pid in happened.pids:
            by_pid[pid].append(happened)
    for history in evidence.histories.values():
        for claim, then in history.attempts():
            hits = [one for one in by_pid.get(claim.pid or 0, []) if claim.at <= one.at < then.at]
            again = [step for step in history.steps if step.at >= then.at and step.kind in ("claimed", *ENDS)][:1]
            found += [Recovery(step.at - one.at, one.kind, history.job_id) for one in hits for step in again]
    return found


def recovery_times(evidence: Evidence) -> Document:
    """Return the spread of recovery times by kind of fault."""
    times = defaultdict(list)
    for one in recoveries(evidence):
        times[one.kind].append(one.seconds)
    return {kind: spread(seconds) for kind, seconds in sorted(times.items())}


def extra_calls(evidence: Evidence) -> tuple[Counter[str], Counter[int]]:
    """Return the calls whose answer was lost: by cause, and how many jobs had how many."""
    causes: Counter[str] = Counter()
    per_job: Counter[int] = Counter()
    for history in evidence.histories.values():
        lost = 0
        for claim, then in history.attempts():
            if then.kind in LOSSES and any(claim.at - 0.01 <= call.started_at <= then.at for call in history.calls):
                causes[cause_of(evidence, claim, then)] += 1
                lost += 1
        per_job[lost] += 1
    return causes, per_job


def spread(values: Iterable[float]) -> Document:
    """Return count, median, 90th and 99th percentile, and maximum."""
    ordered = sorted(values)
    if not ordered:
        return {"count": 0}
    at = {name: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in QUANTILES.items()}
    return {"count": len(ordered), **{name: round(value, 2) for name, value in at.items()}}


QUANTILES: Final = {"median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def ends_by_sentence(evidence: Evidence) -> Counter[str]:
    """Return how the jobs ended; good ones that failed are named apart."""
    ends: Counter[str] = Counter()
    for history in evidence.histories.values():
        status, sentence = history.document.get("status"), str(history.document.get("error_message"))
        kind = str(status) if status != "failed" or sentence == CANCELLED else f"failed: {sentence[:60]}"
        kind = CANCELLED if sentence == CANCELLED else kind
        ends[f"{kind} (a good one)" if kind.startswith("failed") and history.plan.is_good else kind] += 1
    return ends


def notice_counts(evidence: Evidence) -> Document:
    """Return how many notices there were, were repeated, and weren't heard."""
    histories = evidence.histories.values()
    finals = [sum(notice.status in TERMINAL for notice in history.notices) for history in histories]
    told = [h for h in histories if h.ends and h.ends[0].kind != CANCELLED]
    unheard = sum(not h.notices or h.notices[-1].status not in TERMINAL for h in told)
    return {
        "heard": sum(len(history.notices) for history in histories),
        "last one not heard: subscriber away": unheard,
        "last one heard more than once": sum(count > 1 for count in finals),
        "gaps of the subscriber": len(evidence.gaps) - 1,
        "seconds in gaps": round(sum(end - start for start, end in evidence.gaps[1:]), 1),
    }


def figures(evidence: Evidence) -> Document:
    """Return everything that the run measured."""
    histories = evidence.histories.values()
    causes, per_job = extra_calls(evidence)
    traces = [trace for text in evidence.logs.values() for trace, _own in tracebacks(text)]
    kinds = Counter(re.split(r"[:\s]", trace.splitlines()[-1])[0][:80] for trace in traces if trace)
    ended = [h for h in histories if h.ends and h.steps]
    return {
        "jobs": len(histories),
        "seconds": round(evidence.took_s),
        "ends": dict(ends_by_sentence(evidence).most_common()),
        "faults": dict(Counter(one.kind for one in evidence.happened)),
        "submit to end, s": spread(h.ends[0].at - h.steps[0].at for h in ended),
        "recovery, s": recovery_times(evidence),
        "attempts": dict(sorted(Counter(len(h.claims) for h in histories).items())),
        "provider calls": sum(len(h.calls) for h in histories),
        "extra calls by cause": dict(causes.most_common()),
        "jobs by extra calls": dict(sorted(per_job.items())),
        "messages repeated": sum(len(h.plan.repeat_after_s) for h in histories),
        "messages never sent": sum(not h.plan.is_sent for h in histories),
        "put into the queue again": sum(s.kind == "sent again" for h in histories for s in h.steps),
        "notices": notice_counts(evidence),
        "stack traces in logs, by kind": dict(kinds.most_common()),
        "recover": evidence.recovered,
    }


def audit(evidence: Evidence) -> list[str]:
    """Return every violation, each with the job's whole history."""
    found = []
    for history in evidence.histories.values():
        faults = [f"{check.__name__}: {fault}" for check in JOB_CHECKS for fault in check(evidence, history)]
        if faults:
            found.append("\n".join([*faults, tell(evidence, history)]))
    return found + [f"{check.__name__}: {fault}" for check in RUN_CHECKS for fault in check(evidence)]


def print_figures(values: Mapping[str, Any], indent: str = "") -> None:
    """Print figures as indented lines."""
    for name, value in values.items():
        if isinstance(value, Mapping) and "count" in value:
            print(f"{indent}{name}: " + ", ".join(f"{key} {number}" for key, number in value.items()))
        elif isinstance(value, Mapping):
            print(f"{indent}{name}:")
            print_figures(value, indent + "  ")
        else:
            print(f"{indent}{name}: {value}")


SHOWN_VIOLATIONS, SLOWEST = 10, 5


def run(options: Options, json_file: Path | None = None) -> int:
    """Run, audit, print; return the exit code. The logs are kept when anything was found."""
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # it tells of every client that was killed
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    with Run(options, folder) as chaos:
        evidence = chaos.go()
    violations, measured = audit(evidence), figures(evidence)
    print_figures(measured)
    print(f"violations: {len(violations)}")
    print(*violations[:SHOWN_VIOLATIONS], sep="\n\n")
    if json_file:
        slowest = [tell(evidence, evidence.histories[one.job_id]) for one in sorted(recoveries(evidence))[-SLOWEST:]]
        facts = {**asdict(options), **measured, "violations": violations, "slowest recoveries": slowest}
        json_file.write_text(json.dumps(facts, default=str, indent=2))
    if violations:
        (folder / "violations.txt").write_text("\n\n".join(violations))
        print(f"all of them, and the workers' logs: {folder}")
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0
