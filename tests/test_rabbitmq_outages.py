"""RabbitMQ as the broker fails: no job is lost, doubled or left hanging.

Redis stays up, which carries notices and results.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from kombu import Connection

from testbed.network import Gateway
from testbed.servers import MongoServer, RabbitServer, RedisServer
from tests.lab import TEXT
from tests.outage_lab import BrokerLab, BrokerOutage, BrokerOutages, in_each_outage, in_each_place
from tests.place import HoldingProvider, opener
from tests.site import running
from workerkit.sentences import STOPPED

pytestmark = pytest.mark.servers


class RabbitLab(BrokerLab):
    """The lab at a RabbitMQ of its own."""

    server: RabbitServer
    more_short_waits = """
from workerkit import broker

worker.app.conf.broker_transport_options = dict.fromkeys(broker.RABBITMQ_TIMEOUTS, 1)
worker.app.conf.broker_connection_timeout = 1
worker.app.conf.broker_heartbeat = 2
"""

    def direct_settings(self) -> dict[str, str]:
        return {"CELERY_BROKER_URL": self.server.url}

    def gated_settings(self) -> dict[str, str]:
        return {"CELERY_BROKER_URL": self.gate.url}

    @contextmanager
    def full(self) -> Iterator[None]:
        """RabbitMQ is out of memory: it reads nothing any more from a client that publishes."""
        self.server.control("set_vm_memory_high_watermark", "0.00001")
        try:
            yield
        finally:
            self.server.control("set_vm_memory_high_watermark", "0.4")


@pytest.fixture(scope="module")
def broker_lab(
    mongo_server: MongoServer,
    redis_server: RedisServer,
    holding_provider: HoldingProvider,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RabbitLab]:
    folder = tmp_path_factory.mktemp("rabbitmq")
    with ExitStack() as stack:
        rabbit = stack.enter_context(running(RabbitServer()))
        gate = stack.enter_context(Gateway(rabbit.url))
        open_place = opener(mongo_server, redis_server, holding_provider, folder, stack)
        yield RabbitLab(rabbit, gate, holding_provider, open_place)


# ── every outage ─────────────────────────────────────────────────────────────────────────────────────────────────


class TestRabbitMQOutages(BrokerOutages):
    """What holds for any broker holds for RabbitMQ."""


@in_each_outage
@in_each_place
def test_a_job_that_ends_while_rabbitmq_is_away_is_published_at_once(outage: BrokerOutage, pool: str) -> None:
    assert "completed" in outage.meanwhile[pool].notices


@in_each_place
@pytest.mark.parametrize("outage", ["full"], indirect=True)
def test_jobs_in_the_queue_are_worked_off_while_rabbitmq_is_out_of_memory(outage: BrokerOutage, pool: str) -> None:
    """The retries, for which RabbitMQ has no memory, hold no slot. The second finds the connection blocked already."""
    assert outage.meanwhile[pool].are_retries_released
    assert outage.meanwhile[pool].are_queued_completed


@in_each_place
@pytest.mark.parametrize("outage", ["full"], indirect=True)
def test_a_sweeper_that_rabbitmq_lets_wait_costs_no_lease(outage: BrokerOutage, pool: str) -> None:
    assert outage.meanwhile[pool].has_sweep_failed
    assert outage.meanwhile[pool].is_lease_renewed


# ── RabbitMQ restarts ────────────────────────────────────────────────────────────────────────────────────────────


def test_an_idle_worker_consumes_again_soon_after_rabbitmq_restarted(lab: RabbitLab) -> None:
    lab.assert_goes_on()
    lab.restart()
    lab.assert_goes_on()


# ── connections cut, messages lost or delivered again ────────────────────────────────────────────────────────────


def test_jobs_complete_once_while_all_connections_to_rabbitmq_are_cut_again_and_again(lab: RabbitLab) -> None:
    lab.assert_jobs_outlive_cuts(every_s=1.5)


@pytest.mark.parametrize("lose", ["queue_purge", "queue_delete"])
def test_jobs_whose_messages_rabbitmq_has_lost_complete_once_each(lab: RabbitLab, lose: str) -> None:
    with Connection(lab.server.url) as connection:
        channel: Any = connection.default_channel
        lab.assert_jobs_outlive_the_loss_of_messages(getattr(channel, lose))


def test_a_job_that_runs_beyond_rabbitmqs_patience_with_its_message_is_generated_once(lab: RabbitLab) -> None:
    """After `consumer_timeout` RabbitMQ closes the channel and delivers the message again."""
    lab.server.control(
        "eval", "[application:set_env(rabbit, N, 1000) || N <- [consumer_timeout, channel_tick_interval]]."
    )
    lab.gate.cut()  # a channel reads both when it is opened
    jobs = lab.run("long", "[delay 4]")
    lab.assert_ended_once(jobs)
    for place in lab.places.values():
        place.wait_log("not claimed: ")
    for name, usual_ms in (("consumer_timeout", 1_800_000), ("channel_tick_interval", 60_000)):
        lab.server.control("eval", f"application:set_env(rabbit, {name}, {usual_ms}).")
    lab.gate.cut()
    lab.assert_goes_on()


# ── workers that die ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_job_of_a_killed_child_completes_by_a_second_attempt_with_rabbitmq(lab: RabbitLab) -> None:
    place = lab.places["prefork"]
    gate = "hold until_its_child_is_killed"
    [name] = lab.run("killed", gate)
    os.kill(place.document(name)["worker"]["pid"], signal.SIGKILL)
    lab.provider.let_go.add(gate)
    place.api.wait_notice(place.jobs[name], "completed", timeout_s=60)
    assert len(place.calls(name)) == 2
    lab.assert_goes_on()


def test_a_task_revoked_over_rabbitmq_fails_its_job(lab: RabbitLab) -> None:
    api = lab.places["prefork"].api
    job = api.insert(TEXT, {"prompt": "[hang]"})
    task = api.enqueue(job)
    api.wait(job, "processing")
    api.celery.control.revoke(task.id, terminate=True)
    assert api.wait(job, timeout_s=60)["error_message"] == STOPPED
    lab.assert_goes_on()
