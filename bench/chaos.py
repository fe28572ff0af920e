"""The chaos run: thousands of jobs while everything around the workers dies, and an audit of every one of them.

`python -m bench chaos` starts a MongoDB (a replica set of one), a Redis with append-only file, a misbehaving provider
and some workers of all pools. It submits jobs at a steady pace, as the API does, while faults drawn from the seed kill
and pause processes and servers, cancel jobs and repeat messages. A change stream records every write to every job, a
subscriber every notice, the provider every call. When no job is left, the workers are ended, `recover` runs once, and
the audit compares the four records. The exit code is 1 when anything was found; each finding has the job's whole
history.
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
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import gridfs
import psutil
import pymongo
from bson import ObjectId
from kombu.exceptions import OperationalError
from pymongo.errors import DuplicateKeyError, PyMongoError
from redis import Redis
from redis.exceptions import RedisError

from bench.chaos_audit import PLANTED_KEY, audit, figures, recoveries
from bench.chaos_plan import (
    VALIDATOR,
    Fault,
    JobPlan,
    Options,
    Pace,
    faults_of_processes,
    faults_of_servers,
    make_plans,
    pace_of,
    tag_of,
)
from bench.chaos_records import ChangeRecorder, Evidence, Happened, History, Notice, describe, fold
from testbed.api import ACTIVE, STATUS_CHANNEL, TERMINAL, Api, WorkerProcess, new_document
from testbed.processes import LOOPBACK, SOURCE, Server, current_environment
from testbed.provider import Provider
from testbed.servers import DATABASE, MongoServer, RedisServer


class Lane(threading.Thread):
    """A thread that does things at their time, one after the other, and what they schedule."""

    def __init__(self, name: str, began_at: float) -> None:
        super().__init__(name=name, daemon=True)
        self._began_at = began_at
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._count = itertools.count()
        self._changed = threading.Condition()
        self._is_closed = False
        self.error: BaseException | None = None

    def now_s(self) -> float:
        """Return the seconds since the run began."""
        return time.monotonic() - self._began_at

    def at(self, at_s: float, action: Callable[[], object]) -> None:
        """Schedule something, in seconds since the run began."""
        with self._changed:
            heapq.heappush(self._due, (at_s, next(self._count), action))
            self._changed.notify()

    def after(self, delay_s: float, action: Callable[[], object]) -> None:
        """Schedule something for later."""
        self.at(self.now_s() + delay_s, action)

    def close(self) -> None:
        """End when nothing is left to do. Raises what the lane's actions raised."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self.join()
        if self.error:
            raise self.error

    def run(self) -> None:
        """Work until the lane is closed and empty."""
        try:
            while action := self._next():
                action()
        except BaseException as error:
            self.error = error

    def _next(self) -> Callable[[], object] | None:
        """Wait until something is due and return it, or None at the end."""
        with self._changed:
            while True:
                wait_s = self._due[0][0] - self.now_s() if self._due else None
                if wait_s is not None and wait_s <= 0:
                    return heapq.heappop(self._due)[2]
                if wait_s is None and self._is_closed:
                    return None
                self._changed.wait(wait_s)


# ── workers ──────────────────────────────────────────────────────────────────────────────────────────────────────

POOLS: Final = (("prefork", 2), ("threads", 8), ("prefork", 2), ("solo", 1))
LEAVE_WITHIN_S: Final = 60.0
LEASES_STOPPED: Final = 2  # for so many leases a process is stopped at most
POSTPONE_S: Final = 0.2  # a fault that can hit no worker now is tried again after so long
BUSY_WITHIN_S: Final = 2.0  # for so long it waits for a process that runs a job, then it hits an idle one
GIVE_UP_S: Final = 20.0  # and after so long it is left out
# The worker's own fixed waits. `--hurry` divides these, so that a short run reaches them.
FIXED_WAITS: Final = (
    *("JobStore.rescue_first_s", "JobStore.rescue_max_s", "LostMessages.overdue_s", "LostMessages.marker_overdue_s"),
    *("Sweeper.notice_overdue_s", "Keeper.tick_s"),
)


def worker_command(hurry: float, *arguments: str) -> list[str]:
    """Return the arguments of Python that run the worker, its fixed waits divided."""
    if hurry == 1:
        return [str(SOURCE / "worker.py"), *arguments]
    changes = "".join(f"worker.{name} /= {hurry}; " for name in FIXED_WAITS)
    return ["-c", f"import worker; {changes} worker.main()", *arguments]


@dataclass
class Slot:
    """A place in the fleet: its pool, the worker that runs there now, and whether a fault is going on."""

    number: int
    worker: WorkerProcess
    is_prefork: bool
    is_disturbed: bool = False


@dataclass(frozen=True)
class Target:
    """What a fault hits: a worker and, for a fault of a child, one of its children."""

    slot: Slot
    child: int = 0


class Fleet:
    """The workers, and the faults that hit them."""

    def __init__(
        self, environment: Mapping[str, str], folder: Path, options: Options, busy_pids: Callable[[], set[int] | None]
    ) -> None:
        self._environment, self._folder, self._busy_pids = environment, folder, busy_pids
        self._hurry, self._pace = options.hurry, pace_of(options)
        self.logs: list[Path] = []
        self.faults: list[str] = []
        self.happened: list[Happened] = []
        self._started: list[WorkerProcess] = []
        self._leaving: list[tuple[WorkerProcess, float]] = []
        self._orphans: list[int] = []
        numbers = range(options.workers)
        self.slots = [Slot(number, self._start(number), POOLS[number % 4][0] == "prefork") for number in numbers]
        for slot in self.slots:
            slot.worker.wait_ready(60)

    def _start(self, number: int) -> WorkerProcess:
        """Start a worker of the pool that belongs to the slot."""
        pool, concurrency = POOLS[number % len(POOLS)]
        log = self._folder / f"worker-{len(self.logs):03}-{pool}.log"
        environment = {**self._environment, "WORKER_POOL": pool, "WORKER_CONCURRENCY": str(concurrency)}
        worker = WorkerProcess(environment, log, worker_command(self._hurry))
        self.logs.append(log)
        self._started.append(worker)
        return worker

    def _pick(self, fault: Fault, *, only_busy: bool) -> Target | None:
        """Return what the fault hits, or None if it can hit nothing now.

        A worker that another fault hits is left alone, and one worker is always left undisturbed. With `only_busy` the
        fault hits a process that runs a job.
        """
        calm = [slot for slot in self.slots if not slot.is_disturbed]
        if "a worker" in fault.kind and len(calm) < 2 and len(self.slots) > 1:
            return None
        if "child" in fault.kind:  # only prefork has children; Celery ends a worker when one dies at its start
            calm = [slot for slot in calm if slot.is_prefork and " ready." in slot.worker.text()]
        busy = self._busy_pids() or set()
        pids = {slot.number: [pid for pid in self._all_pids(slot) if pid in busy or not only_busy] for slot in calm}
        hittable = [slot for slot in calm if pids[slot.number]]
        if not hittable:
            return None
        slot = hittable[int(fault.pick * len(hittable))]
        if not fault.kind.endswith("a child"):
            return Target(slot)
        children = sorted(pid for pid in pids[slot.number] if pid != slot.worker.process.pid)
        return Target(slot, children[int(fault.pick * 997) % len(children)]) if children else None

    def do(self, fault: Fault, lane: Lane) -> None:
        """Let a fault happen, or try again in a moment if it can hit no worker now."""
        actions: dict[str, Callable[[Target, Fault, Lane], object]] = {
            "kill a child": self._kill_child,
            "kill a worker": self._kill_worker,
            "kill a worker without its children": self._orphan_children,
            "end a worker": self._end_worker,
            "stop a worker": self._stop_worker,
            "stop a child": self._stop_child,
        }
        late_s = lane.now_s() - fault.at_s
        with suppress(psutil.NoSuchProcess, ProcessLookupError):  # what should be hit has just ended
            if target := self._pick(fault, only_busy=late_s < BUSY_WITHIN_S):
                actions[fault.kind](target, fault, lane)
                return
        if late_s < GIVE_UP_S:
            lane.after(POSTPONE_S, lambda: self.do(fault, lane))

    def _note(self, kind: str, pids: Iterable[int]) -> Happened:
        """Record a fault of these processes."""
        self.happened.append(Happened(kind, time.time(), frozenset(pids), time.time()))
        return self.happened[-1]

    def _all_pids(self, slot: Slot) -> list[int]:
        return [slot.worker.process.pid, *slot.worker.children()]

    def _kill_child(self, target: Target, fault: Fault, _lane: Lane) -> None:
        self._note(fault.kind, [target.child])
        os.kill(target.child, signal.SIGKILL)

    def _kill_worker(self, target: Target, fault: Fault, lane: Lane) -> None:
        """Kill a worker with its children, as a power cut does."""
        self._lose(target.slot, fault, lane, target.slot.worker.kill)

    def _orphan_children(self, target: Target, fault: Fault, lane: Lane) -> None:
        """Kill the main process alone, as an out-of-memory killer may. Its children have to end by themselves."""
        self._orphans += target.slot.worker.children()
        self._lose(target.slot, fault, lane, target.slot.worker.process.kill)

    def _lose(self, slot: Slot, fault: Fault, lane: Lane, kill: Callable[[], object]) -> None:
        """Kill a worker, and start another one after a while."""
        self._note(fault.kind, self._all_pids(slot))
        self._expect_alive(slot)
        kill()
        slot.is_disturbed = True
        lane.after(fault.seconds, lambda: self._replace(slot))

    def _end_worker(self, target: Target, fault: Fault, _lane: Lane) -> None:
        """Send SIGTERM, as a deployment does, and start another worker at once."""
        slot = target.slot
        self._note(fault.kind, self._all_pids(slot))
        self._expect_alive(slot)
        slot.worker.signal(signal.SIGTERM)
        self._leaving.append((slot.worker, time.monotonic()))
        self._replace(slot)

    def _replace(self, slot: Slot) -> None:
        slot.worker = self._start(slot.number)
        slot.is_disturbed = False

    def _stop_worker(self, target: Target, fault: Fault, lane: Lane) -> None:
        """Stop a worker with its children, as a host that is suspended does."""
        slot, group = target.slot, target.slot.worker.process.pid
        happened = self._note(fault.kind, self._all_pids(slot))
        os.killpg(group, signal.SIGSTOP)
        slot.is_disturbed = True

        def resume() -> None:
            slot.is_disturbed = False
            os.killpg(group, signal.SIGCONT)

        self._resume_once_taken(happened, fault, lane, resume)

    def _stop_child(self, target: Target, fault: Fault, lane: Lane) -> None:
        happened = self._note(fault.kind, [target.child])
        os.kill(target.child, signal.SIGSTOP)

        def resume() -> None:
            with suppress(ProcessLookupError):
                os.kill(target.child, signal.SIGCONT)

        self._resume_once_taken(happened, fault, lane, resume)

    def _resume_once_taken(self, happened: Happened, fault: Fault, lane: Lane, resume: Callable[[], object]) -> None:
        """Resume stopped processes when their jobs have been taken from them, or after some leases.

        They then find what they were doing outdated. Until they resume, the fault goes on.
        """
        happened.until = float("inf")
        give_up_at = time.time() + LEASES_STOPPED * self._pace.lease_s

        def end() -> None:
            happened.until = time.time()
            resume()

        def look() -> None:
            busy = self._busy_pids()
            is_taken = busy is not None and not happened.pids & busy
            wait_s, then = (fault.seconds, end) if is_taken or time.time() > give_up_at else (POSTPONE_S, look)
            lane.after(wait_s, then)

        lane.after(self._pace.lease_s, look)

    def _expect_alive(self, slot: Slot) -> None:
        """Note it as a finding if the worker has ended, though nothing has ended it."""
        if (code := slot.worker.process.poll()) is not None:
            self.faults.append(f"{slot.worker.log.name} had ended by itself with exit code {code}")

    def end(self) -> None:
        """Send SIGTERM to all workers that still run, and check that all end well."""
        for slot in self.slots:
            self._expect_alive(slot)
            slot.worker.signal(signal.SIGTERM)
            self._leaving.append((slot.worker, time.monotonic()))
        for worker, ended_at in self._leaving:
            try:
                code = worker.process.wait(max(1.0, ended_at + LEAVE_WITHIN_S - time.monotonic()))
                if code != 0 and " ready." in worker.text():  # otherwise SIGTERM came before the worker handles it
                    self.faults.append(f"{worker.log.name} ended with exit code {code} after SIGTERM")
            except subprocess.TimeoutExpired:
                self.faults.append(f"{worker.log.name} didn't end within {LEAVE_WITHIN_S:g} s of SIGTERM")
        self.faults += [f"child {pid} outlives its killed worker" for pid in self._orphans if psutil.pid_exists(pid)]

    def kill(self) -> None:
        """Leave no process behind."""
        for worker in self._started:
            worker.kill()


# ── servers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def quiet_port(chooser: random.Random) -> int:
    """Return a port below those that clients get, so that no client gets it while its server is down."""
    while True:
        port = chooser.randrange(20_000, 32_000)
        with suppress(OSError):
            with socket.socket() as probe:
                probe.bind((LOOPBACK, port))
                return port


class Servers:
    """MongoDB and Redis, and the faults that hit them."""

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


# ── the API's side ───────────────────────────────────────────────────────────────────────────────────────────────


PUT_BACK_UNTIL_S: Final = 60.0  # after the last job was submitted


def with_padding(plan: JobPlan) -> Any:
    """Return a job's input, which may have a large field that no worker reads."""
    is_padded = plan.extras.padding and isinstance(plan.input_data, dict)
    return {**plan.input_data, "padding": "x" * plan.extras.padding} if is_padded else plan.input_data


class Submitter:
    """Submits and cancels the planned jobs through the API's client, and goes on through outages."""

    TIMEOUT_S: Final = 3.0

    def __init__(self, mongodb_url: str, redis_url: str) -> None:
        self.api = Api(mongodb_url, redis_url, channels=(STATUS_CHANNEL,), timeout_s=self.TIMEOUT_S)

    def insert(self, plan: JobPlan) -> ObjectId:
        """Insert the document, once, however many tries it takes."""
        owner = {"user_id": f"user-{plan.number}", "session_id": f"session-{plan.number}" if plan.number % 3 else None}
        document = new_document(plan.job_type, with_padding(plan), **owner)
        document |= {"refuse": plan.extras.refusal.value} if plan.extras.refusal else {}
        document |= {"worker": plan.extras.own[0]} if plan.extras.own else {}
        with suppress(DuplicateKeyError):
            self._persist(lambda: self.api.jobs.insert_one(document))
        return ObjectId(document["_id"])

    def send(self, job_id: ObjectId, plan: JobPlan) -> None:
        """Send the message, which names another person. If it can't be sent it is lost, for the sweeper to find."""
        data = {"job_id": str(job_id), "job_type": plan.job_type, "input_data": plan.input_data, "user_id": "u"}
        soft_s, hard_s = plan.limits or (None, None)
        # Stock kombu (5.7) raises AttributeError when Redis dies at the wrong moment of a publish.
        with suppress(OperationalError, RedisError, OSError, AttributeError):
            self.api.send(str(job_id), data, soft_time_limit=soft_s, time_limit=hard_s, ignore_result=True)

    def spoil(self, job_id: ObjectId, field: str, value: Any) -> None:
        """Spoil a field of the bookkeeping of a job, if it runs or waits for its next attempt."""
        active = {"_id": job_id, "status": "processing", "worker.attempt": {"$exists": True}}
        self._persist(lambda: self.api.jobs.update_one(active, {"$set": {f"worker.{field}": value}}))

    def put_back(self, job_id: ObjectId, plan: JobPlan) -> bool:
        """Let the job be tried again, once it has ended and its last notice is out. Returns whether it was."""
        ended = {"_id": job_id, "status": {"$in": list(TERMINAL)}, "worker.unnotified": {"$exists": False}}
        update = {"$set": {"status": "pending", "updated_at": datetime.now(UTC)}}
        is_put_back = bool(self._persist(lambda: self.api.jobs.update_one(ended, update)).matched_count)
        if is_put_back:
            self.send(job_id, plan)
        return is_put_back

    def cancel(self, job_id: ObjectId) -> None:
        """Cancel a job that has not ended."""
        self._persist(lambda: self.api.cancel(job_id))

    def unfinished(self) -> int:
        """Return the number of jobs that haven't ended, or whose last notice isn't out."""
        waiting = [{"status": {"$in": list(ACTIVE)}}, {"worker.unnotified": {"$exists": True}}]
        return int(self._persist(lambda: self.api.jobs.count_documents({"$or": waiting})))

    def busy_pids(self) -> set[int] | None:
        """Return the ids of the processes that hold a job; None while MongoDB is away."""
        held = {"status": "processing", "worker.owner": {"$type": "string"}, "worker.pid": {"$type": "int"}}
        with suppress(PyMongoError), pymongo.timeout(self.TIMEOUT_S / 10):
            found = self.api.jobs.find(held, {"worker.pid": 1})
            return {pid for document in found if isinstance(pid := document["worker"]["pid"], int)}
        return None

    @staticmethod
    def _persist(action: Callable[[], Any]) -> Any:
        """Try again until MongoDB answers. Raises DuplicateKeyError."""
        while True:
            try:
                return action()
            except DuplicateKeyError:
                raise
            except PyMongoError:
                time.sleep(0.2)


# ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────


def worker_settings(mongodb_url: str, redis_url: str, provider_url: str, pace: Pace) -> dict[str, str]:
    """Return the environment of the workers."""
    return {
        "PYTHONPATH": str(SOURCE),
        "MONGODB_URL": mongodb_url,
        "DATABASE_NAME": DATABASE,
        "REDIS_URL": redis_url,
        "OPENAI_BASE_URL": provider_url,
        "OPENAI_API_KEY": PLANTED_KEY,
        "LEASE_SECONDS": str(pace.lease_s),
        "SWEEP_INTERVAL": str(pace.sweep_s),
        "RETRY_DELAYS": "0.2,0.5,1",
        "CELERY_SOFT_TIME_LIMIT": str(pace.soft_limit_s),
        "CELERY_TIME_LIMIT": str(pace.hard_limit_s),
        "SHUTDOWN_GRACE": "1",
        "DEBUG": "true",
    }


def read_whole(file: gridfs.GridOut) -> bytes:
    """Return a file's data; nothing if its chunks are gone, which the audit then finds."""
    try:
        return file.read()
    except gridfs.errors.CorruptGridFile:
        return b""


class Run:
    """One chaos run, from the first server to the evidence. It is a context manager that leaves no process behind."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options, self.folder = options, folder
        self._stack = ExitStack()
        self._began_at = time.monotonic()
        self.histories: dict[ObjectId, History] = {}

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            ports = random.Random()
            mongo = stack.enter_context(MongoServer(quiet_port(ports), replica_set=True))
            redis = stack.enter_context(RedisServer(quiet_port(ports)))
            self.provider = stack.enter_context(Provider(api_key=PLANTED_KEY))
            self.changes = ChangeRecorder(mongo.url)
            self.changes.start()
            self.changes.is_open.wait(20)
            self.submitter = Submitter(mongo.url, redis.url)
            self.submitter.api.database.create_collection("jobs", validator=VALIDATOR)
            stack.callback(self.submitter.api.close)
            self.servers = Servers(mongo, redis)
            self.environment = worker_settings(mongo.url, redis.url, self.provider.url, pace_of(self.options))
            self.fleet = Fleet(self.environment, self.folder, self.options, self.submitter.busy_pids)
            stack.callback(self.fleet.kill)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def go(self) -> Evidence:
        """Submit, disturb, wait until all jobs have ended, end the workers, recover, and collect the evidence."""
        self._began_at = time.monotonic()
        self._submit_amid_faults()
        self.say("all submitted; waiting until all have ended")
        self._settle()
        self.say("ending the workers")
        self.fleet.end()
        self.say("recovering")
        recovered = self._recover()
        self.changes.end()
        self.submitter.api.stop_listening()
        return self._evidence(recovered)

    def say(self, text: str) -> None:
        """Print how far the run is."""
        print(f"{time.monotonic() - self._began_at:5.0f} s  {text}", file=sys.stderr, flush=True)

    def _submit_amid_faults(self) -> None:
        options, pace = self.options, pace_of(self.options)
        processes, servers, messages = (Lane(name, self._began_at) for name in ("processes", "servers", "messages"))
        for fault in faults_of_processes(options):
            processes.at(fault.at_s, lambda fault=fault: self.fleet.do(fault, processes))  # type: ignore[misc]
        for fault in faults_of_servers(options):
            servers.at(fault.at_s, lambda fault=fault: self.servers.do(fault))  # type: ignore[misc]
        for lane in (processes, servers, messages):
            lane.start()
        for plan in make_plans(options.seed, options.jobs, pace):
            due_at = self._began_at + plan.number * options.minutes * 60 / options.jobs
            time.sleep(max(0.0, due_at - time.monotonic()))
            self._submit(plan, messages)
        for lane in (processes, servers, messages):
            lane.close()

    def _submit(self, plan: JobPlan, lane: Lane) -> None:
        """Submit one job, and schedule what else happens to it."""
        job_id = self.submitter.insert(plan)
        self.histories[job_id] = History(plan, job_id)
        if plan.is_sent:
            self.submitter.send(job_id, plan)
        if plan.cancel_after_s is not None:
            lane.after(plan.cancel_after_s, lambda: self.submitter.cancel(job_id))
        for repeat_s in plan.repeat_after_s:
            lane.after(repeat_s, lambda: self.submitter.send(job_id, plan))
        if spoilt := plan.extras.spoilt:
            lane.after(spoilt[2], lambda: self.submitter.spoil(job_id, spoilt[0], spoilt[1]))
        if plan.extras.put_back_after_s is not None:
            lane.after(plan.extras.put_back_after_s, lambda: self._put_back(job_id, plan, lane))
        if plan.number % 500 == 499:
            self.say(f"{plan.number + 1} jobs submitted, {self.submitter.unfinished()} not ended")

    def _put_back(self, job_id: ObjectId, plan: JobPlan, lane: Lane) -> None:
        """Let a job be tried again, as soon as it has ended."""
        is_late = time.monotonic() > self._began_at + self.options.minutes * 60 + PUT_BACK_UNTIL_S / self.options.hurry
        if not self.submitter.put_back(job_id, plan) and not is_late:
            lane.after(0.5, lambda: self._put_back(job_id, plan, lane))

    def _settle(self) -> None:
        """Wait until all jobs have ended and all last notices are out, or until that takes far too long."""
        give_up_at, said_at = time.monotonic() + max(60.0, 600 / self.options.hurry), time.monotonic()
        while (count := self.submitter.unfinished()) and time.monotonic() < give_up_at:
            if time.monotonic() > said_at + 10:
                self.say(f"{count} jobs not ended, or their last notice not published")
                said_at = time.monotonic()
            time.sleep(0.2)

    def _recover(self) -> str:
        """Run `recover` as an operator would."""
        command = [sys.executable, *worker_command(self.options.hurry, "recover")]
        environment = {**current_environment(), **self.environment}
        done = subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=60)
        return f"exit code {done.returncode}: {done.stdout.strip()} {done.stderr.strip()}".strip()

    def _evidence(self, recovered: str) -> Evidence:
        database = self.submitter.api.database
        bucket = gridfs.GridFS(database, collection="artifacts")
        files = {file.filename: read_whole(file) for file in bucket.find({}, no_cursor_timeout=False)}
        chunk_owners = set(map(str, database["artifacts.chunks"].distinct("files_id")))
        logs = {path.name: path.read_text(errors="replace") for path in self.fleet.logs}
        for document in self.submitter.api.jobs.find():
            self.histories[document["_id"]].document = document
        self._sort_in(logs)
        happened = sorted(self.fleet.happened + self.servers.happened, key=lambda one: one.at)
        gaps, took_s = self.submitter.api.gaps, time.monotonic() - self._began_at
        rest = self.fleet.faults, logs, recovered, took_s
        return Evidence(self.options, self.histories, happened, gaps, files, chunk_owners, *rest)

    def _sort_in(self, logs: Mapping[str, str]) -> None:
        """Give each job its steps, notices, calls and log lines."""
        for job_id, events in self.changes.events.items():
            self.histories[job_id].steps = fold(events)
        for one in self.submitter.api.received:
            notice = Notice(one["received_at"], one["job_id"], one["status"])
            self.histories[ObjectId(notice.job_id)].notices.append(notice)
        by_number = {history.plan.number: history for history in self.histories.values()}
        for call in self.provider.calls:
            if found := re.search(tag_of(self.options.seed, r"(\d{5})"), call.prompt):
                by_number[int(found[1])].calls.append(call)
        for name, text in logs.items():
            for line in text.splitlines():
                for found_id in set(re.findall(r"job=([0-9a-f]{24})", line)):
                    self.histories[ObjectId(found_id)].lines.append(f"{name}: {line}")


# ── the report ───────────────────────────────────────────────────────────────────────────────────────────────────

SHOWN_VIOLATIONS, SLOWEST = 10, 5


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


def run(options: Options, json_file: Path | None = None) -> int:
    """Run, audit, print; return the exit code. The logs are kept when anything was found."""
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # it logs each client that was killed
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    with Run(options, folder) as chaos:
        evidence = chaos.go()
    violations, measured = audit(evidence), figures(evidence)
    print_figures(measured)
    print(f"violations: {len(violations)}")
    print(*violations[:SHOWN_VIOLATIONS], sep="\n\n")
    if json_file:
        slowest = [
            describe(evidence, evidence.histories[one.job_id]) for one in sorted(recoveries(evidence))[-SLOWEST:]
        ]
        facts = {**asdict(options), **measured, "violations": violations, "slowest recoveries": slowest}
        json_file.write_text(json.dumps(facts, default=str, indent=2))
    if violations:
        (folder / "violations.txt").write_text("\n\n".join(violations))
        print(f"all of them, and the workers' logs: {folder}")
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0
