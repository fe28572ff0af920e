"""RabbitMQ as the broker, by its URL alone: what holds with Redis holds with it, whatever fails.

One worker per pool lives through all outages, behind a gateway, as in `test_outages.py`, whose lab and waits serve here
too. Redis stays up: it carries notices and results.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from kombu import Connection, Exchange, Queue

from conftest import StartWorker, open_api, start, worker_settings
from test_outages import LEASE_S, LIMITS, POOLS, SHORT_WAITS, Lab, Sent, Site, hung, last, stopped, swallowed
from testbed.api import SOURCE, Api, WorkerProcess
from testbed.network import Gateway
from testbed.processes import poll
from testbed.provider import Provider
from testbed.servers import MongoServer, RabbitServer, RedisServer

MORE_SHORT_WAITS = """
worker.BROKER_PATIENCE_S = 1
worker.app.conf.broker_transport_options = {key: 1 for key in worker.RABBITMQ_TIMEOUTS}
worker.app.conf.broker_connection_timeout = 1
worker.app.conf.broker_heartbeat = 2
"""


# ── what the tests share ─────────────────────────────────────────────────────────────────────────────────────────


class RabbitLab(Lab):
    """The lab, with RabbitMQ as the one server that fails."""

    def __init__(
        self, folder: Path, redis: RedisServer, rabbit: RabbitServer, mongo: MongoServer, provider: Provider
    ) -> None:
        self.folder, self.redis, self.rabbit = folder, redis, rabbit
        self.mongo_server, self.provider = mongo, provider
        self.gate = Gateway(rabbit.url)
        self.sites: list[Site] = []
        (folder / "short_waits.py").write_text(SHORT_WAITS + MORE_SHORT_WAITS)

    def settings(self, pool: str, **settings: str) -> dict[str, str]:
        own = worker_settings(self.mongo_server, self.redis, self.provider, f"{pool}_{ObjectId()}")
        places = {"CELERY_BROKER_URL": self.rabbit.url, "TMPDIR": str(self.folder)}
        modules = {"PYTHONPATH": str(self.folder), "HANDLER_MODULES": "short_waits"}
        return {**own, **places, **modules, **LIMITS, "SWEEP_INTERVAL": "0.5", "WORKER_POOL": pool, **settings}

    def mend(self) -> None:
        self.rabbit.start()
        self.rabbit.resume()
        self.gate.pass_on()


@pytest.fixture(scope="module")
def rabbit() -> Iterator[RabbitServer]:
    yield from start(RabbitServer())  # type: ignore[misc]


@pytest.fixture(scope="module")
def shared_lab(
    rabbit: RabbitServer,
    redis_server: RedisServer,
    mongo_server: MongoServer,
    running_provider: Provider,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RabbitLab]:
    with ExitStack() as stack:
        lab = RabbitLab(tmp_path_factory.mktemp("rabbitmq"), redis_server, rabbit, mongo_server, running_provider)
        stack.enter_context(lab.gate)
        for pool in POOLS:
            environment = lab.settings(pool)
            site = Site(stack.enter_context(open_api(environment)), {**environment, "CELERY_BROKER_URL": lab.gate.url})
            stack.callback(site.end_worker)
            lab.sites.append(site)
        yield lab


@pytest.fixture
def lab(shared_lab: RabbitLab) -> Iterator[RabbitLab]:
    for _ in shared_lab.in_order():
        yield shared_lab


def command(environment: dict[str, str], *arguments: str) -> str:
    """What a command of the worker prints; it ends with 0."""
    whole = [sys.executable, str(SOURCE / "worker.py"), *arguments]
    variables = {**os.environ, **environment}
    ended = subprocess.run(whole, env=variables, cwd=environment["TMPDIR"], timeout=60, capture_output=True, text=True)
    assert ended.returncode == 0, ended
    return ended.stdout


@contextmanager
def out_of_memory(rabbit: RabbitServer) -> Iterator[None]:
    """RabbitMQ reads nothing any more from whoever publishes."""
    rabbit.control("set_vm_memory_high_watermark", "0.00001")
    yield
    rabbit.control("set_vm_memory_high_watermark", "0.4")


OUTAGES: dict[str, Callable[[RabbitLab], Any]] = {
    "stopped": lambda lab: stopped(lab.rabbit),
    "hung": lambda lab: hung(lab.rabbit),
    "unreachable": lambda lab: swallowed(lab.gate),
    "out of memory": lambda lab: out_of_memory(lab.rabbit),
}
in_each_outage = pytest.mark.parametrize("outage", OUTAGES.values(), ids=OUTAGES)


# ── RabbitMQ restarts ────────────────────────────────────────────────────────────────────────────────────────────


def test_an_idle_worker_consumes_again_soon_after_rabbitmq_restarted(lab: RabbitLab) -> None:
    lab.assert_goes_on()
    lab.rabbit.restart()
    lab.assert_goes_on(timeout_s=20)


def test_jobs_that_run_or_wait_while_rabbitmq_crashes_are_generated_once(lab: RabbitLab) -> None:
    jobs = lab.run("running [delay 2]") + lab.submit("queued", count=3)
    lab.rabbit.restart(crash=True)
    lab.assert_completed_once(jobs)
    lab.assert_goes_on()


# ── every outage of RabbitMQ ─────────────────────────────────────────────────────────────────────────────────────


@in_each_outage
def test_a_job_that_ends_while_rabbitmq_is_away_is_completed_and_told_at_once(
    lab: RabbitLab, outage: Callable[[RabbitLab], Any]
) -> None:
    jobs = lab.run("ends meanwhile [delay 1]")
    with outage(lab):
        lab.assert_completed_once(jobs, timeout_s=8)
    lab.assert_goes_on()
    lab.assert_completed_once(jobs)


@pytest.mark.parametrize("outage", [OUTAGES["stopped"], OUTAGES["hung"]], ids=["stopped", "hung"])
def test_a_retry_that_comes_due_while_rabbitmq_is_away_is_made_afterwards(
    lab: RabbitLab, outage: Callable[[RabbitLab], Any]
) -> None:
    jobs = lab.run("again [delay 0.5] [status 500 times=1]")
    with outage(lab):
        lab.wait_released(jobs)
        last(1.5)
    lab.assert_completed_once(jobs, calls=2)


@pytest.mark.parametrize("outage", [OUTAGES["hung"], OUTAGES["out of memory"]], ids=["hung", "out of memory"])
def test_leases_are_kept_and_health_stays_0_while_rabbitmq_is_away(
    lab: RabbitLab, outage: Callable[[RabbitLab], Any]
) -> None:
    jobs = lab.run("long [delay 5]")
    with outage(lab):
        lab.wait_leases_renewed(jobs)
        command(lab.sites[0].environment, "health")
    lab.assert_completed_once(jobs)


@in_each_outage
def test_a_cancel_by_the_api_stops_the_generation_while_rabbitmq_is_away(
    lab: RabbitLab, outage: Callable[[RabbitLab], Any]
) -> None:
    jobs = lab.run("cancelled meanwhile [hang]")
    with outage(lab):
        lab.cancel(jobs)
    lab.assert_goes_on()
    assert [job.site.api.document(job.id)["error_message"] for job in jobs] == ["Cancelled."] * len(jobs)


def test_the_log_stays_readable_while_rabbitmq_is_away(lab: RabbitLab) -> None:
    jobs = lab.run("logged [delay 1]")
    with stopped(lab.rabbit):
        lab.wait_status(jobs, "completed", timeout_s=15)
        last(3)
    lab.assert_goes_on()
    lab.assert_log_readable()


def test_a_sweeper_that_rabbitmq_lets_wait_costs_no_lease(lab: RabbitLab) -> None:
    jobs = lab.run("long [delay 8]")
    with out_of_memory(lab.rabbit):
        for site in lab.sites:
            words = f"{ObjectId()} lost"
            jobs.append(Sent(site, words, site.api.insert("text_generation", {"prompt": words})))
        poll(lambda: all("put back" in site.log() for site in lab.sites), 15, description="a try to enqueue")
    lab.assert_completed_once(jobs)


# ── connections cut, messages lost, memory short ─────────────────────────────────────────────────────────────────


def test_jobs_complete_once_while_all_connections_to_rabbitmq_are_cut_again_and_again(lab: RabbitLab) -> None:
    jobs = lab.submit("cut off [delay 0.5]", count=6)

    def cut_and_look() -> bool:
        lab.gate.cut()
        return all(job.site.api.status(job.id) == "completed" for job in jobs)

    poll(cut_and_look, 60, interval_s=1.5)
    lab.assert_completed_once(jobs)
    lab.assert_goes_on()


@pytest.mark.parametrize("lose", ["queue_purge", "queue_delete"])
def test_jobs_whose_messages_rabbitmq_has_lost_complete_once_each(lab: RabbitLab, lose: str) -> None:
    jobs = lab.run("running [delay 2]") + lab.submit("lost", count=3)
    with Connection(lab.rabbit.url) as connection:
        for site in lab.sites:
            getattr(connection.default_channel, lose)(site.api.queue)
    lab.assert_completed_once(jobs)
    lab.assert_goes_on()


def test_jobs_in_the_queue_are_worked_off_while_rabbitmq_is_out_of_memory(lab: RabbitLab) -> None:
    jobs = lab.run("first [delay 1]") + lab.submit("queued", count=3)
    with out_of_memory(lab.rabbit):
        lab.assert_completed_once(jobs)


def test_retries_that_rabbitmq_has_no_memory_for_hold_no_slot_and_are_made_afterwards(lab: RabbitLab) -> None:
    """The second finds the connection blocked by the first."""
    jobs = lab.run("again [delay 2] [status 500 times=1]") + lab.submit("again, too [status 500 times=1]")
    others = lab.submit("after them")
    with out_of_memory(lab.rabbit):
        lab.wait_status(others, "completed")
    lab.assert_completed_once(jobs, calls=2)


def test_a_job_that_runs_beyond_rabbitmqs_patience_with_its_message_is_generated_once(lab: RabbitLab) -> None:
    """`consumer_timeout`: it closes the channel, and delivers the message again."""
    lab.rabbit.control(
        "eval", "[application:set_env(rabbit, N, 1000) || N <- [consumer_timeout, channel_tick_interval]]."
    )
    lab.gate.cut()  # channels have it from their start
    jobs = lab.run("long [delay 5]")
    lab.assert_completed_once(jobs)
    poll(lambda: all("not taken: " in site.log() for site in lab.sites), 10, description="delivered again")
    for name, usual_ms in (("consumer_timeout", 1_800_000), ("channel_tick_interval", 60_000)):
        lab.rabbit.control("eval", f"application:set_env(rabbit, {name}, {usual_ms}).")
    lab.gate.cut()
    lab.assert_goes_on()


# ── workers that die ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_job_of_a_killed_child_completes_by_a_second_attempt_with_rabbitmq(lab: RabbitLab) -> None:
    jobs = lab.run("killed [delay 1]")[:1]
    os.kill(lab.sites[0].worker.children()[0], signal.SIGKILL)
    lab.assert_completed_once(jobs, calls=2)
    lab.assert_goes_on()


def test_a_task_revoked_over_rabbitmq_fails_its_job(lab: RabbitLab) -> None:
    api = lab.sites[0].api
    job = api.insert("text_generation", {"prompt": "[hang]"})
    task = api.enqueue(job)
    api.wait(job, "processing")
    api.celery.control.revoke(task.id, terminate=True)
    assert api.wait(job)["error_message"] == "This was stopped by the operator."
    lab.assert_goes_on()


# ── a queue as the API has made it ───────────────────────────────────────────────────────────────────────────────


QUEUES = {"classic": {"x-max-priority": 3}, "quorum": {"x-queue-type": "quorum"}}
in_each_queue = pytest.mark.parametrize("queue_arguments", QUEUES.values(), ids=QUEUES)


@pytest.fixture
def api(lab: RabbitLab, queue_arguments: dict[str, Any], environment: dict[str, str]) -> Iterator[Api]:
    """An API that has declared queue and exchange in its own way, at RabbitMQ."""
    environment.update(lab.settings("threads"))
    name = environment["CELERY_QUEUE_NAME"]
    with open_api(environment) as api:
        queue = Queue(name, Exchange(name, "topic"), name, queue_arguments=queue_arguments)
        api.celery.conf.task_queues = [queue]
        with Connection(lab.rabbit.url) as connection:
            queue(connection.default_channel).declare()
        yield api


@pytest.fixture
def workers(api: Api, start_worker: StartWorker) -> list[WorkerProcess]:
    """Two at the queue, without any patience at shutdown."""
    return [worker.wait_ready() for worker in [start_worker(ready=False, SHUTDOWN_GRACE="0") for _ in range(2)]]


def run_in_one_of(workers: list[WorkerProcess], api: Api, prompt: str) -> tuple[ObjectId, list[WorkerProcess]]:
    """A job that runs, and the workers, the one that runs it first."""
    job = api.text(prompt)
    line = f"job={job} attempt=1 type='text_generation' started"
    poll(lambda: any(line in worker.text() for worker in workers), 10, description="the job runs")
    return job, sorted(workers, key=lambda worker: line not in worker.text())


@in_each_queue
def test_a_retry_that_waits_holds_no_slot_of_rabbitmqs_queue(
    api: Api, provider: Provider, start_worker: StartWorker
) -> None:
    start_worker()
    waiting = [api.text(f"{number} [status 429 times=1 retry-after=4]") for number in range(2)]
    for job in waiting:
        api.wait(job, "processing")
        poll(lambda job=job: api.document(job)["worker"]["owner"] is None, 10)  # type: ignore[misc]
    assert api.wait(api.text("meanwhile"))["status"] == "completed"
    assert [api.status(job) for job in waiting] == ["processing"] * 2
    assert [api.wait(job)["status"] for job in waiting] == ["completed"] * 2
    assert len(provider.calls) == 5


@in_each_queue
def test_the_job_of_a_killed_worker_is_rescued_though_rabbitmq_delivers_it_again_at_once(
    api: Api, provider: Provider, workers: list[WorkerProcess]
) -> None:
    job, (killed, other) = run_in_one_of(workers, api, "rescued [delay 2]")
    poll(lambda: provider.calls, 5)
    killed.kill()
    poll(lambda: f"job={job} not taken: it is held by a live lease" in other.text(), LEASE_S)
    assert api.wait(job, timeout_s=30)["worker"]["attempt"] == 2
    assert len(provider.calls) == 2


@in_each_queue
def test_another_worker_completes_what_was_handed_back_to_rabbitmq(api: Api, workers: list[WorkerProcess]) -> None:
    job, (stopped_one, other) = run_in_one_of(workers, api, "handed back [delay 2]")
    assert stopped_one.stop() == 0
    assert api.wait(job)["worker"]["attempt"] == 1
    poll(lambda: f"job={job} attempt=1 type='text_generation' completed" in other.text(), 5)


@pytest.mark.parametrize("queue_arguments", [QUEUES["quorum"]], ids=["quorum"])
def test_every_command_works_with_rabbitmq(api: Api, environment: dict[str, str], start_worker: StartWorker) -> None:
    waiting = api.text("waits")
    assert "1 waiting in" in command(environment, "check")
    assert "│ 1" in command(environment, "status").split("waiting in")[1]
    start_worker()
    assert api.wait(waiting)["status"] == "completed"
    assert "done by hand" in command(environment, "submit", "--prompt", "[say done by hand]")
    command(environment, "health")
    forgotten = api.insert("text_generation", {"prompt": "forgotten"}, created_at=datetime(2026, 1, 1, tzinfo=UTC))
    command(environment, "recover")
    assert api.wait(forgotten)["status"] == "completed"
