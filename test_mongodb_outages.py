"""Real workers while MongoDB is away: killed, hung, or handing over to a new primary.

An outage takes longer than what it does to one job. So each one meets many jobs at once, every job at another step,
and the tests afterwards look at what has become of each.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from bson import ObjectId
from pymongo import MongoClient

import worker
from conftest import open_api, start, worker_settings
from testbed.api import SOURCE, Api, WorkerProcess
from testbed.processes import poll
from testbed.provider import Answerer, Exchange, Provider
from testbed.servers import Member, MongoServer, RedisServer, ReplicaSet

FAULTS: dict[str, tuple[Callable[[MongoServer], object], Callable[[MongoServer], object]]] = {
    "killed": (MongoServer.kill, MongoServer.start),
    "hung": (MongoServer.pause, MongoServer.resume),
}
POOLS = ("prefork", "threads")


# ── what the tests share ─────────────────────────────────────────────────────────────────────────────────────────


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


@dataclass(frozen=True)
class Step:
    """A job that an outage meets at one step of its way, and how it ends all the same."""

    directives: str
    job_type: str = "text_generation"
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
    log_starts: list[int] = field(default_factory=list)

    def start_worker(self, **settings: str) -> WorkerProcess:
        """Starts one more worker; `wait_ready` is the caller's."""
        environment = {**self.environment, "TMPDIR": str(self.folder), **settings}
        worker = WorkerProcess(environment, self.folder / f"worker-{len(self.workers)}.log")
        self.workers.append(worker)
        return worker

    def insert(self, name: str, step: Step) -> ObjectId:
        prompt = f"{ObjectId()} {name} {step.directives}"
        job = self.api.insert(step.job_type, {"prompt": prompt, "size": "512x512"})
        self.jobs[name], self.prompts[job] = job, prompt
        return job

    def send(self, job: ObjectId, **options: Any) -> None:
        """Sends the message without a look into the database, which may be away."""
        self.api.send(str(job), {"job_id": str(job)}, **options)

    def submit(self, name: str, step: Step, **options: Any) -> ObjectId:
        job = self.insert(name, step)
        self.send(job, **options)
        return job

    def calls(self, job: ObjectId) -> list[Any]:
        return self.provider.calls_for(self.prompts[job])

    def wait_call(self, job: ObjectId) -> None:
        poll(lambda: self.calls(job), 30, description=f"a call for {self.prompts[job]!r}")

    def wait_log(self, text: str, timeout_s: float = 40) -> None:
        poll(lambda: any(text in worker.text() for worker in self.workers), timeout_s, description=f"{text!r} logged")

    def mark_logs(self) -> None:
        self.log_starts = [len(worker.text()) for worker in self.workers]

    def log(self) -> str:
        """What the workers wrote since the mark."""
        return "".join(w.text()[begin:] for w, begin in zip(self.workers, self.log_starts, strict=True))

    def files(self, job: ObjectId) -> list[str]:
        """The stored files of a job, in GridFS or in the folder."""
        stored = [file["filename"] for file in self.api.database["artifacts.files"].find()]
        stored += [path.name for path in self.folder.glob("files/*")]
        return [name for name in stored if name.startswith(str(job))]

    def is_kept(self, job: ObjectId) -> bool:
        """Whether a result waits in Redis."""
        return bool(self.api.redis.exists(f"result:{job}"))

    def goes_on(self) -> bool:
        """Whether the next job is completed."""
        job = self.submit("next", Step(""))
        return bool(self.api.wait_notice(job, "completed", timeout_s=30))

    def health(self) -> int:
        """The exit code of `python worker.py health` beside these workers."""
        variables = {**os.environ, **self.environment, "TMPDIR": str(self.folder)}
        command = [sys.executable, str(SOURCE / "worker.py"), "health"]
        return subprocess.run(command, env=variables, cwd=self.folder, capture_output=True).returncode

    def heartbeat_age_s(self) -> float:
        """Seconds since the most silent keeper's last beat."""
        beats = [path.stat().st_mtime for path in self.folder.glob("ai-backend-worker-*/*")]
        return time.time() - min(beats)


OpenPlace = Callable[..., Place]


def opener(
    mongo: MongoServer | ReplicaSet, redis: RedisServer, provider: HoldingProvider, folder: Path, stack: ExitStack
) -> OpenPlace:
    """A function that opens places on these servers; the stack closes them."""

    def open_place(name: str, **settings: str) -> Place:
        own = worker_settings(mongo, redis, provider, str(ObjectId()))  # type: ignore[arg-type]
        environment = {**own, "LEASE_SECONDS": "3", "SWEEP_INTERVAL": "0.5", **settings}
        (folder / name).mkdir()
        place = Place(environment, folder / name, stack.enter_context(open_api(environment)), provider)
        stack.callback(lambda: [worker.kill() for worker in place.workers])
        return place

    return open_place


def ended_once(place: Place, job: ObjectId, step: Step) -> None:
    """What is promised for every job: one end, told, from one generation, with no file too many."""
    document = place.api.document(job)
    assert document["status"] == step.ends
    # A second message for an ended job tells its end again.
    assert {status for status in place.api.notices(job) if status in ("completed", "failed")} == {step.ends}
    assert len(place.calls(job)) == step.answers
    assert len(place.files(job)) == step.files
    if step.files:
        assert document["artifact_url"].endswith(place.files(job)[0])


@pytest.fixture(scope="module")
def holding_provider() -> Iterator[HoldingProvider]:
    provider = HoldingProvider()
    with provider:
        yield provider


@pytest.fixture(scope="module")
def mongo_server() -> Iterator[MongoServer]:
    """A MongoDB of this module's own, which its tests take away."""
    yield from start(MongoServer(replica_set=True))  # type: ignore[misc]


# ── an outage within the limits ──────────────────────────────────────────────────────────────────────────────────

STEPS = {
    "before the claim": Step(""),
    "while the handler runs": Step("hold until_it_is_over"),
    "at completion": Step("hold until_it_is_away"),
    "while its file is stored": Step("hold until_it_is_away", "image_generation", files=1),
    "at the release for a retry": Step("hold until_it_is_away [status 500 times=1]", answers=2),
    "when it fails": Step("hold until_it_is_away [status 400]", ends="failed"),
}


@dataclass
class Outage:
    """What is seen of an outage: its places, and what was seen of each meanwhile."""

    places: dict[str, Place]
    seen: dict[str, Meanwhile] = field(default_factory=dict)


@dataclass(frozen=True)
class Meanwhile:
    """What is seen of a place while MongoDB is away."""

    health: int
    heartbeat_age_s: float
    children: list[int]
    log: str


def open_places(open_place: OpenPlace) -> dict[str, Place]:
    """Workers of both pools that hold a job at each step, one that stores files in a folder, and a rival.

    The rival sees the threads' jobs but not their queue: it could only steal.
    """
    limits = {"CELERY_SOFT_TIME_LIMIT": "40", "CELERY_TIME_LIMIT": "60", "WORKER_CONCURRENCY": str(len(STEPS))}
    places = {pool: open_place(pool, WORKER_POOL=pool, **limits) for pool in POOLS}
    places["folder"] = open_place("folder", WORKER_POOL="threads", **limits)
    places["folder"].environment["ARTIFACT_URL"] = f"file://{places['folder'].folder}/files"
    for place in places.values():
        place.start_worker()
    places["threads"].start_worker(CELERY_QUEUE_NAME="another_queue")
    for process in itertools.chain(*(place.workers for place in places.values())):
        process.wait_ready(60)
    return places


def bring_jobs_to_their_steps(place: Place) -> None:
    """A job for each step: those that the outage meets in the handler or later have asked the provider."""
    for name, step in STEPS.items():
        place.insert(name, step)
    asked = [job for name, job in place.jobs.items() if name != "before the claim"]
    for job in asked:
        place.send(job)
    for job in asked:
        place.wait_call(job)
    place.mark_logs()


def look(place: Place) -> Meanwhile:
    """Waits until a write has failed, and looks."""
    place.wait_log("can't be written down")
    return Meanwhile(place.health(), place.heartbeat_age_s(), place.workers[0].children(), place.log())


def wait_for_the_ends(place: Place, steps: Mapping[str, Step]) -> None:
    for name, step in steps.items():
        place.api.wait_notice(place.jobs[name], step.ends, timeout_s=60)
    assert place.goes_on()


@pytest.fixture(scope="module")
def outage(
    request: pytest.FixtureRequest,
    mongo_server: MongoServer,
    redis_server: RedisServer,
    holding_provider: HoldingProvider,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Outage]:
    """An outage that is over: all its jobs have ended."""
    begin, end = FAULTS[request.param]
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("outage")
        outage = Outage(open_places(opener(mongo_server, redis_server, holding_provider, folder, stack)))
        stack.callback(end, mongo_server)
        for place in outage.places.values():
            bring_jobs_to_their_steps(place)
        begin(mongo_server)
        holding_provider.let_go.add("hold until_it_is_away")
        for name, place in outage.places.items():
            place.send(place.jobs["before the claim"])
            outage.seen[name] = look(place)
        end(mongo_server)
        holding_provider.let_go.add("hold until_it_is_over")
        for place in outage.places.values():
            wait_for_the_ends(place, STEPS)
        holding_provider.let_go.clear()
        yield outage


with_each_fault = pytest.mark.parametrize("outage", FAULTS, indirect=True)
in_each_place = pytest.mark.parametrize("name", [*POOLS, "folder"])


@with_each_fault
@in_each_place
@pytest.mark.parametrize("step", STEPS)
def test_a_job_that_an_outage_meets_at_any_step_ends_once(outage: Outage, name: str, step: str) -> None:
    ended_once(outage.places[name], outage.places[name].jobs[step], STEPS[step])


@with_each_fault
@in_each_place
def test_the_worker_and_its_children_live_on(outage: Outage, name: str) -> None:
    worker = outage.places[name].workers[0]
    assert worker.process.poll() is None
    assert set(outage.seen[name].children) <= set(worker.children())


@with_each_fault
@in_each_place
def test_an_outage_is_told_in_a_few_lines_without_stack_traces(outage: Outage, name: str) -> None:
    """At most one from each process's keeper, one from what waits to be written, one from what waits to be claimed."""
    place = outage.places[name]
    processes = len(outage.seen[name].children) + len(place.workers)
    lines = [line for line in outage.seen[name].log.splitlines() if " WARNING " in line or " ERROR " in line]
    assert len([line for line in lines if "MongoDB" in line or "written down" in line]) <= 4 * processes, lines
    assert all("Traceback" not in worker.text() for worker in place.workers)


@with_each_fault
@in_each_place
def test_the_worker_counts_as_healthy_meanwhile(outage: Outage, name: str) -> None:
    assert outage.seen[name].health == 0
    assert outage.seen[name].heartbeat_age_s < 30


@with_each_fault
def test_another_worker_leaves_the_jobs_to_those_whose_leases_ran_out_meanwhile(outage: Outage) -> None:
    rival = outage.places["threads"].workers[1]
    assert "nobody worked on it" not in rival.text()
    jobs = outage.places["threads"].api.jobs.find({"_id": {"$in": list(outage.places["threads"].jobs.values())}})
    assert all("rescues" not in job["worker"] for job in jobs)


# ── an outage longer than the limits ─────────────────────────────────────────────────────────────────────────────

SHORT_LIMITS = {"CELERY_SOFT_TIME_LIMIT": "4", "CELERY_TIME_LIMIT": "9", "LEASE_SECONDS": "2"}
KEPT = {"text": Step("hold until_it_is_away"), "picture": Step("hold until_it_is_away", "image_generation", files=1)}
UNCLAIMED = {f"unclaimed {number}": Step("") for number in range(6)}
LONG_PLACES: dict[str, tuple[dict[str, Step], dict[str, str]]] = {
    "prefork": (KEPT, {"WORKER_CONCURRENCY": "2"}),
    "threads": (KEPT, {"WORKER_CONCURRENCY": "2", "WORKER_POOL": "threads"}),
    "past its deadline": (KEPT, {"WORKER_CONCURRENCY": "2", "JOB_DEADLINE": "9"}),
    "worker killed": (KEPT, {"WORKER_CONCURRENCY": "2"}),
    "worker started meanwhile": (UNCLAIMED, {}),
}


def begin_at_completion(places: Mapping[str, Place]) -> None:
    """A worker in each place whose jobs wait for their answers; none yet where it starts during the outage."""
    begun = {name: place for name, place in places.items() if name != "worker started meanwhile"}
    for place in begun.values():
        place.start_worker()
    warm = [
        (place, place.submit(f"warm {n}", Step("hold until_warm"), soft_time_limit=60, time_limit=70))
        for place in begun.values()
        for n in range(len(KEPT))
    ]
    for place, job in warm:
        place.wait_call(job)
    begun["prefork"].provider.let_go.add("hold until_warm")
    for place, job in warm:
        place.api.wait(job)
    held = [(place, place.submit(job_name, step)) for place in begun.values() for job_name, step in KEPT.items()]
    for place, job in held:
        place.wait_call(job)
    for name, step in UNCLAIMED.items():
        places["worker started meanwhile"].insert(name, step)


def sit_it_out(places: Mapping[str, Place]) -> None:
    """What happens while MongoDB is away, until every limit is over."""
    began_at = time.monotonic()
    late = places["worker started meanwhile"]
    late.start_worker()
    for job in late.jobs.values():
        late.send(job)
    for name, place in places.items():
        if place is not late:
            poll(
                lambda place=place: all(place.is_kept(place.jobs[step]) for step in KEPT),
                30,
                description=f"kept: {name}",
            )  # type: ignore[misc]
    places["worker killed"].workers[0].kill()
    places["worker killed"].start_worker().wait_ready(60)
    late.wait_log(" retry: Retry in ")
    poll(lambda: time.monotonic() > began_at + 10, 20, description="the end of every limit")


@dataclass(frozen=True)
class LongOutage:
    places: dict[str, Place]
    children: dict[str, list[int]]
    waiting: int


@pytest.fixture(scope="module")
def long_outage(
    request: pytest.FixtureRequest,
    mongo_server: MongoServer,
    redis_server: RedisServer,
    holding_provider: HoldingProvider,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LongOutage]:
    """An outage beyond all limits that is over: all its jobs have ended."""
    begin, end = FAULTS[request.param]
    with ExitStack() as stack:
        open_place = opener(mongo_server, redis_server, holding_provider, tmp_path_factory.mktemp("long"), stack)
        places = {name: open_place(name, **SHORT_LIMITS, **own) for name, (_, own) in LONG_PLACES.items()}
        stack.callback(end, mongo_server)
        begin_at_completion(places)
        begin(mongo_server)
        holding_provider.let_go.add("hold until_it_is_away")
        sit_it_out(places)
        late = places["worker started meanwhile"]
        children = {name: place.workers[-1].children() for name, place in places.items()}
        outage = LongOutage(places, children, late.api.redis.llen(late.api.queue))  # type: ignore[arg-type]
        end(mongo_server)
        for name, place in places.items():
            wait_for_the_ends(place, LONG_PLACES[name][0])
        holding_provider.let_go.clear()
        yield outage


with_each_long_fault = pytest.mark.parametrize("long_outage", FAULTS, indirect=True)
KEEPING_PLACES = [name for name, (steps, _) in LONG_PLACES.items() if steps is KEPT]


@with_each_long_fault
@pytest.mark.parametrize("name", KEEPING_PLACES)
@pytest.mark.parametrize("step", KEPT)
def test_a_result_that_the_outage_outlasted_is_written_down_later(
    long_outage: LongOutage, name: str, step: str
) -> None:
    place = long_outage.places[name]
    ended_once(place, place.jobs[step], KEPT[step])
    by_a_later_attempt = place.api.document(place.jobs[step])["worker"]["attempt"] > 1
    assert not (by_a_later_attempt and place.is_kept(place.jobs[step]))


@with_each_long_fault
@pytest.mark.parametrize("name", LONG_PLACES)
def test_no_child_dies_of_an_outage(long_outage: LongOutage, name: str) -> None:
    process = long_outage.places[name].workers[-1]
    assert process.process.poll() is None
    assert process.children() == long_outage.children[name]
    assert "Traceback" not in process.text()


@with_each_long_fault
def test_a_worker_that_starts_meanwhile_takes_the_jobs_when_it_is_over(long_outage: LongOutage) -> None:
    place = long_outage.places["worker started meanwhile"]
    for name, job in ((name, place.jobs[name]) for name in UNCLAIMED):
        ended_once(place, job, UNCLAIMED[name])
        assert place.api.document(job)["worker"]["attempt"] == 1


@with_each_long_fault
def test_messages_wait_in_the_queue_meanwhile(long_outage: LongOutage) -> None:
    """One is in the slot, one waits to be tried again."""
    assert long_outage.waiting >= len(UNCLAIMED) - 2


# ── whose lease ran out meanwhile ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def open_place(
    mongo_server: MongoServer, redis_server: RedisServer, holding_provider: HoldingProvider, tmp_path: Path
) -> Iterator[OpenPlace]:
    with ExitStack() as stack:
        yield opener(mongo_server, redis_server, holding_provider, tmp_path, stack)


def test_the_sweep_rests_a_lease_after_a_hang_that_no_call_saw_fail(
    mongo_server: MongoServer, runtime: worker.Runtime, api: Api
) -> None:
    runtime.keeper.tick()
    runtime.keeper._sweep_at = 0.0
    owner = {"owner": "about to renew", "node": "elsewhere", "lease_until": datetime.now(UTC), "attempt": 1}
    job = api.insert("text_generation", {}, status="processing", worker=owner)
    mongo_server.pause()
    threading.Timer(4, mongo_server.resume).start()  # over half a lease, less than the patience of a call
    runtime.keeper.tick()
    assert api.document(job)["worker"] == api.document(job)["worker"] | {"owner": "about to renew"}


# ── a new primary ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def replica_set() -> Iterator[ReplicaSet]:
    yield from start(ReplicaSet())  # type: ignore[arg-type, misc]


@pytest.fixture
def members_place(
    replica_set: ReplicaSet, redis_server: RedisServer, holding_provider: HoldingProvider, tmp_path: Path
) -> Iterator[Place]:
    """A place on a whole replica set, without workers."""
    with ExitStack() as stack:
        limits = {"CELERY_SOFT_TIME_LIMIT": "40", "CELERY_TIME_LIMIT": "60"}
        yield opener(replica_set, redis_server, holding_provider, tmp_path, stack)("members", **limits)
        mend(replica_set)


def mend(replica_set: ReplicaSet) -> None:
    for member in replica_set.members:
        member.start().resume()
    replica_set.copy_again()
    replica_set.wait_whole()


ELECTIONS = {
    "steps down": ReplicaSet.step_down,
    "is killed": ReplicaSet.kill_primary,
    "hangs": ReplicaSet.pause_primary,
}
MEANWHILE = {
    "text 1": Step("hold until_the_election"),
    "text 2": Step("hold until_the_election [tokens 60] [pace 0.05]"),
    "text 3": Step("hold until_it_is_elected"),
    "picture": Step("hold until_the_election", "image_generation", files=1),
    "retry": Step("hold until_the_election [status 500 times=1]", answers=2),
    "failure": Step("hold until_the_election [status 400]", ends="failed"),
}


@pytest.mark.slow
@pytest.mark.parametrize("election", ELECTIONS.values(), ids=ELECTIONS)
def test_no_job_is_lost_or_doubled_when_the_primary(
    replica_set: ReplicaSet, members_place: Place, election: Callable[[ReplicaSet], object]
) -> None:
    place = members_place
    place.start_worker(WORKER_POOL="threads", WORKER_CONCURRENCY="8")
    place.start_worker(WORKER_POOL="prefork", WORKER_CONCURRENCY="2")
    for process in place.workers:
        process.wait_ready(60)
    held = [place.submit(name, step) for name, step in MEANWHILE.items()]
    for job in held:
        place.wait_call(job)
    unclaimed = {f"unclaimed {number}": Step("") for number in range(3)}
    late = [place.insert(name, step) for name, step in unclaimed.items()]
    election(replica_set)
    place.provider.let_go.add("hold until_the_election")
    for job in late:
        place.send(job)
    assert replica_set.primary
    place.provider.let_go.add("hold until_it_is_elected")
    for name, step in (MEANWHILE | unclaimed).items():
        place.api.wait_notice(place.jobs[name], step.ends, timeout_s=60)
    mend(replica_set)
    place.provider.let_go.clear()
    assert place.goes_on()
    for name, step in (MEANWHILE | unclaimed).items():
        ended_once(place, place.jobs[name], step)
        assert "rescues" not in place.api.document(place.jobs[name])["worker"]
    assert all(process.process.poll() is None for process in place.workers)
    assert all("Traceback" not in process.text() for process in place.workers)


def wait_for_a_write(old: MongoServer, place: Place, job: ObjectId) -> None:
    """Waits until the isolated primary has the end of the job, or the worker has given up a try to store its file."""
    completed, database = {"_id": job, "status": "completed"}, place.environment["DATABASE_NAME"]
    with MongoClient[dict[str, Any]](old.root_url) as client:
        jobs = client[database]["jobs"]
        poll(lambda: jobs.find_one(completed) or "can't be written down" in place.workers[0].text(), 20)


LOSSES = {
    "it dies with a text": (ReplicaSet.kill_primary, "text_generation"),
    "it dies with a picture": (ReplicaSet.kill_primary, "image_generation"),
    "it rolls a text back": (ReplicaSet.overrule_primary, "text_generation"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "kind"), LOSSES.values(), ids=LOSSES)
def test_a_result_that_only_the_old_primary_had_is_written_again(
    replica_set: ReplicaSet, members_place: Place, loss: Callable[[ReplicaSet], Member], kind: str
) -> None:
    """Whatever the URL says about writes."""
    place, gate = members_place, f"hold until_{ObjectId()}"
    place.start_worker(MONGODB_URL=f"{replica_set.url}&w=1").wait_ready(60)
    step = Step(gate, kind, files=int(kind == "image_generation"))
    job = place.submit("rolled back", step)
    place.wait_call(job)
    old = replica_set.isolate_primary()
    place.provider.let_go.add(gate)
    wait_for_a_write(old, place, job)
    assert "completed" not in place.api.notices(job)
    replica_set.end_isolation(loss(replica_set))
    place.api.wait_notice(job, "completed", timeout_s=60)
    mend(replica_set)
    if loss is ReplicaSet.overrule_primary:
        poll(lambda: list(old.directory.glob("data/rollback/*/*.bson")), 30, description="what was rolled back")
    assert place.goes_on()
    ended_once(place, job, step)
