"""A place: a database and a queue of their own, workers that only one test or one module uses, and their jobs."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from bson import ObjectId

from testbed.api import Api, WorkerProcess
from testbed.processes import poll
from testbed.provider import Answerer, Call, Exchange, Provider
from testbed.servers import MongoServer, RedisServer, ReplicaSet
from tests.lab import TEXT
from tests.site import open_api, run_forked, worker_settings

PATIENCE_S = 60.0  # for what takes seconds where the machine is quiet
LEASE_S = 4.0
LIMITS = {"CELERY_SOFT_TIME_LIMIT": "60", "CELERY_TIME_LIMIT": "90"}

# ── the provider ─────────────────────────────────────────────────────────────────────────────────────────────────


class HoldingProvider(Provider):
    """Answers a prompt with "hold NAME" in it only when this name has been let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go: set[str] = set()

    async def _respond(self, exchange: Exchange, answerer: Answerer) -> web.StreamResponse:
        if found := re.search(r"hold \w+", exchange.call.prompt):
            while found[0] not in self.let_go:
                await asyncio.sleep(0.02)
        return await super()._respond(exchange, answerer)


# ── places and jobs ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Step:
    """A job: what its prompt says besides its name, and how it ends whatever happens meanwhile."""

    directives: str
    job_type: str = TEXT
    ends: str = "completed"
    answers: int = 1
    files: int = 0


@dataclass
class Place:
    """A database and a queue of their own, their workers, and the jobs there."""

    environment: dict[str, str]
    folder: Path
    api: Api
    provider: HoldingProvider
    workers: list[WorkerProcess] = field(default_factory=list)
    jobs: dict[str, ObjectId] = field(default_factory=dict)
    prompts: dict[ObjectId, str] = field(default_factory=dict)
    log_starts: dict[WorkerProcess, int] = field(default_factory=dict)

    def add_module(self, source: str) -> None:
        """Lets the workers that are started from now on import this module, before they take jobs."""
        (self.folder / "own_module.py").write_text(source)
        self.environment.update({"PYTHONPATH": str(self.folder), "HANDLER_MODULES": "own_module"})

    def start_worker(self, **settings: str) -> WorkerProcess:
        """Starts one more worker. It may not be ready yet."""
        worker = WorkerProcess({**self.environment, **settings}, self.folder / f"worker-{ObjectId()}.log")
        self.workers.append(worker)
        return worker

    def wait_ready(self) -> None:
        for worker in self.workers:
            worker.wait_ready(PATIENCE_S)

    def insert(self, name: str, step: Step, **fields: object) -> ObjectId:
        prompt = f"{ObjectId()} {name} {step.directives}"
        job = self.api.insert(step.job_type, {"prompt": prompt, "size": "512x512"}, **fields)
        self.jobs[name], self.prompts[job] = job, prompt
        return job

    def send(self, job: ObjectId, **options: Any) -> None:
        """Sends the message without a look into the database, which may be away."""
        self.api.send(str(job), {"job_id": str(job)}, **options)

    def submit(self, name: str, step: Step, **options: Any) -> ObjectId:
        job = self.insert(name, step)
        self.send(job, **options)
        return job

    def document(self, name: str) -> dict[str, Any]:
        return self.api.document(self.jobs[name])

    def calls(self, name: str) -> list[Call]:
        return self.provider.calls_for(self.prompts[self.jobs[name]])

    def wait_call(self, name: str) -> None:
        poll(lambda: self.calls(name), PATIENCE_S, description=f"a call for {self.prompts[self.jobs[name]]!r}")

    def wait_ends(self, steps: Mapping[str, Step]) -> None:
        for name, step in steps.items():
            self.api.wait_notice(self.jobs[name], step.ends, timeout_s=PATIENCE_S)

    def mark_logs(self) -> None:
        self.log_starts = {worker: len(worker.text()) for worker in self.workers}

    def log(self) -> str:
        """What the workers wrote since the mark."""
        return "".join(worker.text()[self.log_starts.get(worker, 0) :] for worker in self.workers)

    def wait_log(self, text: str) -> None:
        poll(lambda: text in self.log(), PATIENCE_S, description=f"{text!r} logged")

    def files(self, name: str) -> list[str]:
        """The stored files of a job, in GridFS or in the folder."""
        stored = [file["filename"] for file in self.api.database["artifacts.files"].find()]
        stored += [path.name for path in self.folder.glob("files/*")]
        return [file for file in stored if file.startswith(str(self.jobs[name]))]

    def goes_on(self, slots: int = 1) -> bool:
        """Whether the workers complete the next jobs, so many of them at the same time."""
        gate = f"hold all_at_once_{ObjectId()}"
        steps = {f"next {number}": Step(gate) for number in range(slots)}
        for name, step in steps.items():
            self.submit(name, step)
        for name in steps:
            self.wait_call(name)
        self.provider.let_go.add(gate)
        self.wait_ends(steps)
        return all(worker.process.poll() is None for worker in self.workers)

    def health(self) -> int:
        """The exit code of `python worker.py health` beside these workers."""
        return run_forked(self.environment, self.folder, "health").returncode

    def heartbeat_age_s(self) -> float:
        """Seconds since the most silent keeper's last beat."""
        beats = [path.stat().st_ctime for path in self.folder.glob("ai-backend-worker-*/*.keeper")]
        return time.time() - min(beats)

    def kill_workers(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.workers.clear()

    def cancel_unfinished(self) -> None:
        for job in self.api.jobs.find({"status": {"$in": ["pending", "processing"]}}, {"_id": 1}):
            self.api.cancel(job["_id"])


OpenPlace = Callable[..., Place]


def opener(
    mongo: MongoServer | ReplicaSet, redis: RedisServer, provider: HoldingProvider, folder: Path, stack: ExitStack
) -> OpenPlace:
    """A function that opens places on these servers. The stack closes them."""

    def open_place(name: str, **settings: str) -> Place:
        """Opens a place. The settings are its workers' own; the API reaches the servers directly."""
        own = worker_settings(mongo, redis, provider, str(ObjectId()))
        (folder / name).mkdir()
        environment = {**own, "LEASE_SECONDS": f"{LEASE_S:g}", "SWEEP_INTERVAL": "0.5", "TMPDIR": str(folder / name)}
        api = stack.enter_context(open_api({**environment, **settings}))
        place = Place({**environment, **settings}, folder / name, api, provider)
        stack.callback(place.kill_workers)
        return place

    return open_place


def assert_ended_once(place: Place, name: str, step: Step) -> None:
    """What is promised for every job: one end, which is published, from one generation, with no file too many."""
    document, notices = place.document(name), place.api.notices(place.jobs[name])
    assert document["status"] == step.ends
    # A second message for a job that has ended publishes its end again.
    assert {status for status in notices if status in ("completed", "failed")} == {step.ends}
    assert len(place.calls(name)) == step.answers
    assert len(place.files(name)) == step.files
    if step.files:
        assert document["artifact_url"].endswith(place.files(name)[0])


# ── side by side ─────────────────────────────────────────────────────────────────────────────────────────────────

Scenario = Callable[[Place], None]
Outcomes = Mapping[str, "Future[None]"]


@contextmanager
def side_by_side(open_place: OpenPlace, scenarios: Mapping[str, Scenario], at_a_time: int = 3) -> Iterator[Outcomes]:
    """Runs scenarios in threads, each in a place of its own, and a few at a time, since they wait more than they do.

    Each outcome is to be asked for by a test. A scenario that fails raises there.
    """
    places = {name: open_place(name) for name in scenarios}
    with ThreadPoolExecutor(at_a_time) as threads:
        yield {name: threads.submit(scenario, places[name]) for name, scenario in scenarios.items()}
