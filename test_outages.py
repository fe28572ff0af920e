"""Outages of Redis, of the network and of clocks: no job is lost, doubled or left hanging, and no worker ends.

One worker per pool lives through all of them, behind gateways, with a Redis of its own; each test puts both through
the same outage. Waits are short here (`SHORT_WAITS`): seconds prove what minutes would.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from redis import Redis

from conftest import StartWorker, open_api, start, worker_settings
from testbed.api import SOURCE, Api, WorkerProcess
from testbed.network import Gateway
from testbed.processes import poll
from testbed.provider import Provider
from testbed.servers import MongoServer, RedisServer, SentinelServer

POOLS = ("prefork", "threads")
SHORT_WAITS = """
import worker

worker.PENDING_OVERDUE_S = 2.0
worker.NOTICE_OVERDUE_S = 1.0
worker.RESCUE_FIRST_S = 2.0
worker.QUEUE_REST_S = 1.0
options = worker.app.conf.broker_transport_options
worker.app.conf.broker_transport_options = {**options, "socket_timeout": 2, "socket_connect_timeout": 2}
worker.app.conf.redis_socket_timeout = worker.app.conf.redis_socket_connect_timeout = 1
"""
LEASE_S = 3
CLOCK_LEASE_S = 8
LIMITS = {"CELERY_SOFT_TIME_LIMIT": "30", "CELERY_TIME_LIMIT": "40", "LEASE_SECONDS": f"{LEASE_S}"}


# ── what the tests share ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Site:
    """A worker of one pool, and the API in front of it."""

    api: Api
    environment: dict[str, str] = field(repr=False)
    log_start: int = 0
    _worker: WorkerProcess | None = None

    @property
    def worker(self) -> WorkerProcess:
        """Started when first asked for; it may not be ready yet."""
        if self._worker is None:
            self._worker = WorkerProcess(self.environment, Path(self.environment["TMPDIR"], f"{ObjectId()}.log"))
        return self._worker

    def end_worker(self) -> None:
        if self._worker:
            self._worker.kill()
        self._worker = None

    def log(self) -> str:
        """The worker's log since the test began."""
        return self.worker.text()[self.log_start :]


@dataclass(frozen=True)
class Sent:
    """A job at one of the sites. Its words are unique, so that its calls of the provider can be told apart."""

    site: Site
    words: str
    id: ObjectId


class Lab:
    """A worker per pool, and what can fail around them."""

    def __init__(self, folder: Path, redis: RedisServer, mongo: Gateway, provider: Provider) -> None:
        self.folder, self.redis, self.mongo, self.provider = folder, redis, mongo, provider
        self.redis_gate, self.provider_gate = Gateway(redis.url), Gateway(provider.url)
        self.admin = Redis.from_url(redis.url)
        self.sites: list[Site] = []
        (folder / "short_waits.py").write_text(SHORT_WAITS)

    def environment(self, mongo_server: MongoServer, pool: str, **settings: str) -> dict[str, str]:
        own = worker_settings(mongo_server, self.redis, self.provider, f"{pool}_{ObjectId()}")
        places = {
            "MONGODB_URL": f"{self.mongo.url}{'&' if '?' in self.mongo.url else '?'}directConnection=true",
            "REDIS_URL": self.redis_gate.url,
            "OPENAI_BASE_URL": self.provider_gate.url,
            "TMPDIR": str(self.folder),
        }
        modules = {"PYTHONPATH": str(self.folder), "HANDLER_MODULES": "short_waits"}
        return {**own, **places, **modules, **LIMITS, "SWEEP_INTERVAL": "0.5", "WORKER_POOL": pool, **settings}

    def submit(self, prompt: str, count: int = 1) -> list[Sent]:
        """Submits so many jobs at each site."""
        sent = []
        for site in self.sites * count:
            words = f"{ObjectId()} {prompt}"
            sent.append(Sent(site, words, site.api.text(words)))
        return sent

    def run(self, prompt: str) -> list[Sent]:
        """Submits a job at each site and waits until both run."""
        sent = self.submit(prompt)
        for job in sent:
            poll(lambda job=job: self.calls(job), 30, description=f"{job.words} runs")  # type: ignore[misc]
        return sent

    def calls(self, job: Sent) -> int:
        return len(self.provider.calls_for(job.words))

    def wait_status(self, jobs: Sequence[Sent], status: str, timeout_s: float = 30) -> None:
        for job in jobs:
            assert job.site.api.wait(job.id, timeout_s=timeout_s)["status"] == status

    def assert_completed_once(self, jobs: Sequence[Sent], timeout_s: float = 30, calls: int = 1) -> None:
        """Each job gets completed, by this many calls of the provider, and the person is told."""
        self.wait_status(jobs, "completed", timeout_s)
        for job in jobs:
            job.site.api.wait_notice(job.id, "completed", timeout_s=20)
        assert [self.calls(job) for job in jobs] == [calls] * len(jobs)

    def assert_goes_on(self, timeout_s: float = 30) -> None:
        """The same workers take and complete the next job."""
        self.assert_completed_once(self.submit("the next job"), timeout_s)
        assert [site.worker.process.poll() for site in self.sites] == [None] * len(self.sites)

    def wait_leases_renewed(self, jobs: Sequence[Sent]) -> None:
        """Waits until each lease ends later than any could that was taken before now."""
        since = datetime.now(UTC)

        def leases() -> list[datetime]:
            return [job.site.api.document(job.id)["worker"]["lease_until"] for job in jobs]

        poll(lambda: min(leases()) > since + timedelta(seconds=LEASE_S + 1), 6, description="leases renewed")

    def wait_released(self, jobs: Sequence[Sent]) -> None:
        """Waits until each job waits for its next try."""
        for job in jobs:
            poll(lambda job=job: job.site.api.document(job.id)["worker"]["owner"] is None, 15)  # type: ignore[misc]

    def cancel(self, jobs: Sequence[Sent]) -> None:
        """Cancels jobs as the API does, and waits until nothing is generated for them any more."""
        for job in jobs:
            job.site.api.cancel(job.id)
        calls = [self.provider.calls_for(job.words)[0] for job in jobs]
        poll(lambda: all(call.outcome == "disconnected" for call in calls), 6)

    def assert_log_readable(self) -> None:
        for site in self.sites:
            assert "Traceback" not in site.log()
            of_the_outage = [line for line in site.log().splitlines() if "job=" not in line and "Task " not in line]
            assert len(of_the_outage) <= 15, of_the_outage

    def in_order(self) -> Iterator[None]:
        """Before a test its workers run; after it what is left broken is mended, what is unfinished cancelled."""
        for site in self.sites:
            if site.worker.process.poll() is not None:  # an earlier test has ended it, and failed
                site.end_worker()
        for site in self.sites:
            site.log_start = len(site.worker.wait_ready().text())
        yield
        self.mend()
        for site in self.sites:
            for job in site.api.jobs.find({"status": {"$in": ["pending", "processing"]}}, {"_id": 1}):
                site.api.cancel(job["_id"])

    def mend(self) -> None:
        """Ends every outage."""
        self.redis.start()
        self.redis.resume()
        for gate in (self.redis_gate, self.mongo, self.provider_gate):
            gate.pass_on()
        self.admin.config_set("maxmemory", 0)


@pytest.fixture(scope="module")
def shared_lab(
    mongo_server: MongoServer, running_provider: Provider, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lab]:
    with ExitStack() as stack:
        redis = RedisServer()
        stack.enter_context(contextmanager(start)(redis))
        mongo = stack.enter_context(Gateway(mongo_server.url))
        lab = Lab(tmp_path_factory.mktemp("outages"), redis, mongo, running_provider)
        stack.enter_context(lab.redis_gate)
        stack.enter_context(lab.provider_gate)
        stack.callback(lab.admin.close)
        for pool in POOLS:
            environment = lab.environment(mongo_server, pool)
            outside = {**environment, "MONGODB_URL": mongo_server.url, "REDIS_URL": redis.url}
            site = Site(stack.enter_context(open_api(outside)), environment)
            stack.callback(site.end_worker)
            lab.sites.append(site)
        yield lab


@pytest.fixture
def lab(shared_lab: Lab) -> Iterator[Lab]:
    for _ in shared_lab.in_order():
        yield shared_lab


@contextmanager
def stopped(redis: RedisServer) -> Iterator[None]:
    redis.kill()
    yield
    redis.start()


@contextmanager
def hung(redis: RedisServer) -> Iterator[None]:
    redis.pause()
    yield
    redis.resume()


@contextmanager
def full(admin: Redis) -> Iterator[None]:
    admin.config_set("maxmemory", 1)
    yield
    admin.config_set("maxmemory", 0)


@contextmanager
def swallowed(gate: Gateway) -> Iterator[None]:
    gate.swallow()
    yield
    gate.pass_on()


OUTAGES: dict[str, Callable[[Lab], Any]] = {
    "stopped": lambda lab: stopped(lab.redis),
    "hung": lambda lab: hung(lab.redis),
    "full": lambda lab: full(lab.admin),
    "unreachable": lambda lab: swallowed(lab.redis_gate),
}
in_each_outage = pytest.mark.parametrize("outage", OUTAGES.values(), ids=OUTAGES)
crash_or_order = pytest.mark.parametrize("crash", [True, False], ids=["crash", "in order"])


def last(seconds: float) -> None:
    """Lets an outage last: the one thing that has to be slept through."""
    time.sleep(seconds)


# ── Redis restarts ───────────────────────────────────────────────────────────────────────────────────────────────


@crash_or_order
def test_an_idle_worker_consumes_again_soon_after_redis_restarted(lab: Lab, crash: bool) -> None:
    lab.assert_goes_on()
    lab.redis.restart(crash)
    lab.assert_goes_on(timeout_s=20)


@crash_or_order
def test_a_job_that_runs_while_redis_restarts_is_generated_once(lab: Lab, crash: bool) -> None:
    jobs = lab.run("busy [delay 2]")
    lab.redis.restart(crash)
    lab.assert_completed_once(jobs)
    lab.assert_goes_on()


def test_jobs_in_the_queue_outlive_a_crash_of_redis(lab: Lab) -> None:
    jobs = lab.run("first [delay 2]") + lab.submit("queued", count=3)
    poll(lambda: lab.admin.info("persistence")["aof_pending_bio_fsync"] == 0, 10)
    lab.redis.restart(crash=True)
    lab.assert_completed_once(jobs)


# ── every outage of Redis ────────────────────────────────────────────────────────────────────────────────────────


@in_each_outage
def test_a_job_that_ends_while_redis_is_away_is_completed_and_told_afterwards(
    lab: Lab, outage: Callable[[Lab], Any]
) -> None:
    jobs = lab.run("ends meanwhile [delay 1]")
    with outage(lab):
        lab.wait_status(jobs, "completed", timeout_s=15)
    lab.assert_completed_once(jobs)
    ended = [job.site.api.document(job.id)["updated_at"] for job in jobs]
    lab.assert_goes_on()
    # Celery's own view of a task whose result it couldn't store turns no document over.
    assert [job.site.api.document(job.id)["updated_at"] for job in jobs] == ended


@pytest.mark.parametrize("outage", [OUTAGES["hung"], OUTAGES["unreachable"]], ids=["hung", "unreachable"])
def test_a_job_keeps_its_lease_while_redis_is_away(lab: Lab, outage: Callable[[Lab], Any]) -> None:
    jobs = lab.run("long [delay 5]")
    with outage(lab):
        lab.wait_leases_renewed(jobs)
    lab.assert_completed_once(jobs)


@in_each_outage
def test_a_cancel_by_the_api_stops_the_generation_while_redis_is_away(lab: Lab, outage: Callable[[Lab], Any]) -> None:
    jobs = lab.run("cancelled meanwhile [hang]")
    with outage(lab):
        lab.cancel(jobs)
    lab.assert_goes_on()
    assert [job.site.api.document(job.id)["error_message"] for job in jobs] == ["Cancelled."] * len(jobs)


@in_each_outage
def test_a_retry_that_comes_due_while_redis_is_away_is_made_afterwards(lab: Lab, outage: Callable[[Lab], Any]) -> None:
    jobs = lab.run("again [delay 0.5] [status 500 times=1]")
    with outage(lab):
        lab.wait_released(jobs)
        last(1.5)
    lab.assert_completed_once(jobs, calls=2)


@in_each_outage
def test_the_log_stays_readable_while_redis_is_away(lab: Lab, outage: Callable[[Lab], Any]) -> None:
    jobs = lab.run("logged [delay 1]")
    with outage(lab):
        lab.wait_status(jobs, "completed", timeout_s=15)
        last(2)
    lab.assert_goes_on()
    lab.assert_log_readable()


def test_health_stays_0_while_redis_hangs(lab: Lab) -> None:
    site = lab.sites[0]
    heartbeat = poll(lambda: [path for path in lab.folder.glob("ai-backend-worker-*/*") if path.name.isdigit()], 10)[0]
    with hung(lab.redis):
        hung_since = time.time()
        poll(lambda: heartbeat.stat().st_mtime > hung_since + 3, 20)
        command = [sys.executable, str(SOURCE / "worker.py"), "health"]
        variables = {**os.environ, **site.environment}
        assert subprocess.run(command, env=variables, cwd=lab.folder, timeout=30, capture_output=True).returncode == 0


# ── connections cut ──────────────────────────────────────────────────────────────────────────────────────────────


def test_jobs_complete_once_while_all_connections_to_redis_are_cut_again_and_again(lab: Lab) -> None:
    jobs = lab.submit("cut off [delay 0.5]", count=6)

    def cut_and_look() -> bool:
        for kind in ("normal", "pubsub"):
            lab.admin.client_kill_filter(_type=kind)
        return all(job.site.api.status(job.id) == "completed" for job in jobs)

    poll(cut_and_look, 60, interval_s=0.7)
    lab.assert_completed_once(jobs)
    lab.assert_goes_on()


# ── Redis loses everything ───────────────────────────────────────────────────────────────────────────────────────


def test_jobs_that_redis_forgot_complete_once_each(lab: Lab) -> None:
    jobs = lab.run("running [delay 2]") + lab.submit("forgotten", count=3)
    lab.admin.flushall()
    lab.assert_completed_once(jobs)
    lab.assert_goes_on()


# ── Redis is full ────────────────────────────────────────────────────────────────────────────────────────────────


def test_jobs_in_the_queue_are_worked_off_while_redis_is_full(lab: Lab) -> None:
    jobs = lab.run("first [delay 1]") + lab.submit("queued", count=3)
    with full(lab.admin):
        lab.wait_status(jobs, "completed")
    lab.assert_completed_once(jobs)


def test_a_worker_that_has_to_connect_again_while_redis_is_full_waits(lab: Lab) -> None:
    with full(lab.admin):
        lab.redis_gate.cut()
        last(4)
    lab.assert_goes_on()
    for site in lab.sites:
        assert "Traceback" not in site.log()
        assert len(site.log().splitlines()) <= 20, site.log()


# ── a network that swallows packets ──────────────────────────────────────────────────────────────────────────────


def test_a_job_that_ends_while_mongodb_is_unreachable_is_completed_afterwards(lab: Lab) -> None:
    jobs = lab.run("mongodb unreachable [delay 1]")
    with swallowed(lab.mongo):
        poll(lambda: all(lab.provider.calls_for(job.words)[0].outcome == "answered" for job in jobs), 10)
        last(LEASE_S + 1)
    lab.assert_completed_once(jobs)


def test_a_job_that_comes_while_mongodb_is_unreachable_waits(lab: Lab) -> None:
    with swallowed(lab.mongo):
        jobs = lab.submit("mongodb unreachable at the claim")
        last(4)
        assert [lab.calls(job) for job in jobs] == [0, 0]
    lab.assert_completed_once(jobs)


def test_a_job_whose_answer_never_arrives_fails_at_its_limit_and_the_worker_goes_on(lab: Lab) -> None:
    words = f"{ObjectId()} [delay 1]"
    jobs = [Sent(site, words, site.api.text(words, soft_time_limit=4, time_limit=8)) for site in lab.sites]
    poll(lambda: lab.calls(jobs[0]) == len(jobs), 10)
    with swallowed(lab.provider_gate):
        lab.wait_status(jobs, "failed", timeout_s=20)
    assert "took too long" in jobs[0].site.api.document(jobs[0].id)["error_message"]
    lab.assert_goes_on()


def test_a_job_that_comes_while_the_provider_is_unreachable_is_done_afterwards(lab: Lab) -> None:
    lab.provider_gate.cut()  # no connection that is open already
    with swallowed(lab.provider_gate):
        jobs = lab.submit("provider unreachable")
        for job in jobs:
            job.site.api.wait(job.id, "processing")
        last(2)
    lab.assert_completed_once(jobs, timeout_s=40)


# ── clocks ───────────────────────────────────────────────────────────────────────────────────────────────────────


def wrong_clock(seconds: int) -> dict[str, str]:
    """The environment of a process whose clock is wrong by so much; only the time that passes is right."""
    found = importlib.util.find_spec("libfaketime")
    if not (found and found.submodule_search_locations):
        if os.environ.get("CI") and sys.platform == "linux":
            raise RuntimeError("pip install libfaketime")
        pytest.skip("there is no libfaketime: pip install libfaketime (Linux)")
    library = Path(found.submodule_search_locations[0], "vendor/libfaketime/src/libfaketime.so.1")
    return {"LD_PRELOAD": str(library), "FAKETIME": f"{seconds:+}s", "DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}


@pytest.fixture
def clocks_apart(environment: dict[str, str], start_worker: StartWorker, tmp_path: Path) -> list[WorkerProcess]:
    """Two workers at one queue: a clock five minutes fast, and one five minutes slow."""
    (tmp_path / "short_waits.py").write_text(SHORT_WAITS)
    modules = {"PYTHONPATH": str(tmp_path), "HANDLER_MODULES": "short_waits", "SWEEP_INTERVAL": "0.5"}
    # libfaketime slows a process down so much that a busy machine could cost it a shorter lease
    limits = {**LIMITS, "LEASE_SECONDS": f"{CLOCK_LEASE_S}"}
    workers = [start_worker(ready=False, **limits, **modules, **wrong_clock(offset)) for offset in (300, -300)]
    return [worker.wait_ready() for worker in workers]


def test_clocks_that_differ_by_minutes_neither_double_nor_delay_a_job(
    api: Api, provider: Provider, clocks_apart: list[WorkerProcess]
) -> None:
    words = [f"{number} clocks [delay 0.5]" for number in range(8)]
    words += [f"{number} long [delay {CLOCK_LEASE_S + 2}]" for number in range(2)]
    jobs = [api.text(prompt) for prompt in words]
    for job in jobs:
        assert api.wait(job, timeout_s=40)["worker"]["attempt"] == 1
    assert [len(provider.calls_for(prompt)) for prompt in words] == [1] * len(words)
    now = datetime.now(UTC)
    assert all(abs(now - api.document(job)["completed_at"]) < timedelta(minutes=1) for job in jobs)
    assert all("started" in worker.text() for worker in clocks_apart)


def test_retries_come_in_time_though_clocks_differ_by_minutes(
    api: Api, provider: Provider, clocks_apart: list[WorkerProcess]
) -> None:
    words = [f"{number} retry [status 429 times=1 retry-after=1]" for number in range(6)]
    jobs = [api.text(prompt) for prompt in words]
    for job, prompt in zip(jobs, words, strict=True):
        assert api.wait(job, timeout_s=30)["status"] == "completed"
        assert len(provider.calls_for(prompt)) == 2


def test_a_killed_workers_job_is_rescued_once_though_clocks_differ_by_minutes(
    api: Api, provider: Provider, clocks_apart: list[WorkerProcess]
) -> None:
    words = [f"{number} rescued [delay 2]" for number in range(2)]
    jobs = [api.text(prompt) for prompt in words]
    poll(lambda: len(provider.calls) == 2, 10)
    clocks_apart[0].kill()
    documents = [api.wait(job, timeout_s=30) for job in jobs]
    assert sorted(document["worker"]["attempt"] for document in documents) == [1, 2]
    assert sorted(len(provider.calls_for(prompt)) for prompt in words) == [1, 2]


def test_jobs_go_on_by_the_new_master_that_sentinel_chose(
    mongo_server: MongoServer, redis_server: RedisServer, running_provider: Provider, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        master, replica = (stack.enter_context(contextmanager(start)(RedisServer())) for _ in range(2))
        Redis.from_url(replica.url).replicaof(master.host, master.port)  # type: ignore[attr-defined]
        sentinel: Any = stack.enter_context(contextmanager(start)(SentinelServer(master)))  # type: ignore[arg-type]
        settings = worker_settings(mongo_server, redis_server, running_provider, f"sentinel_{ObjectId()}")
        environment = {**settings, "TMPDIR": str(tmp_path)}
        before, after = (
            stack.enter_context(open_api({**environment, "CELERY_BROKER_URL": server.url}))
            for server in (master, replica)
        )
        worker = WorkerProcess({**environment, "CELERY_BROKER_URL": sentinel.broker_url}, tmp_path / "worker.log")
        stack.callback(worker.kill)
        worker.wait_ready()
        assert before.wait(before.text("by the first master"))["status"] == "completed"
        master.kill()
        poll(lambda: sentinel.master_port() == replica.port, 20, description="another master")
        assert after.wait(after.text("by the second master"), timeout_s=40)["status"] == "completed"
        assert worker.process.poll() is None
        assert "Traceback" not in worker.text()
