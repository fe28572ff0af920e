"""Redis fails, as the broker and as the channel of notices: no job is lost, doubled or left hanging.

Redis is the broker, the result backend and the notices' channel at once here, as it is by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from bson import ObjectId
from redis import Redis

from testbed.api import STATUS_CHANNEL, WorkerProcess
from testbed.network import Gateway
from testbed.processes import poll
from testbed.provider import Provider
from testbed.servers import MongoServer, RedisServer, SentinelServer
from tests.outage_lab import (
    BrokerLab,
    BrokerOutage,
    BrokerOutages,
    in_each_outage,
    in_each_place,
    lines_about_no_job,
    repeats_since,
)
from tests.place import PATIENCE_S, HoldingProvider, opener
from tests.site import open_api, running, worker_settings

pytestmark = pytest.mark.servers

crash_or_order = pytest.mark.parametrize("crash", [True, False], ids=["crash", "in order"])


class RedisLab(BrokerLab):
    """The lab at a Redis of its own."""

    server: RedisServer
    more_short_waits = """
options = worker.app.conf.broker_transport_options
worker.app.conf.broker_transport_options = {**options, "socket_timeout": 2, "socket_connect_timeout": 2}
worker.app.conf.redis_socket_timeout = worker.app.conf.redis_socket_connect_timeout = 1
"""

    def direct_settings(self) -> dict[str, str]:
        return {"REDIS_URL": self.server.url}

    def gated_settings(self) -> dict[str, str]:
        return {"REDIS_URL": self.gate.url}

    @contextmanager
    def full(self) -> Iterator[None]:
        with Redis.from_url(self.server.url) as admin:
            admin.config_set("maxmemory", 1)
            try:
                yield
            finally:
                admin.config_set("maxmemory", 0)

    def start_again(self) -> None:
        """Lets the workers reach Redis only when the API has subscribed again, so that it misses no notice."""
        self.gate.close()
        self.server.start()
        with Redis.from_url(self.server.url) as admin:
            apis = len(self.places)
            poll(lambda: admin.pubsub_numsub(STATUS_CHANNEL)[0][1] >= apis, PATIENCE_S, description="subscriptions")
        self.gate.start()


@pytest.fixture(scope="module")
def broker_lab(
    mongo_server: MongoServer, holding_provider: HoldingProvider, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RedisLab]:
    folder = tmp_path_factory.mktemp("redis")
    with ExitStack() as stack:
        redis = stack.enter_context(running(RedisServer()))
        gate = stack.enter_context(Gateway(redis.url))
        open_place = opener(mongo_server, redis, holding_provider, folder, stack)
        yield RedisLab(redis, gate, holding_provider, open_place)


@pytest.fixture
def admin(lab: RedisLab) -> Iterator[Redis]:
    with Redis.from_url(lab.server.url) as client:
        yield client


# ── every outage ─────────────────────────────────────────────────────────────────────────────────────────────────


class TestRedisOutages(BrokerOutages):
    """What holds for any broker holds for Redis."""


@in_each_outage
@in_each_place
def test_a_job_that_ends_while_redis_is_away_is_published_afterwards(outage: BrokerOutage, pool: str) -> None:
    place = outage.places[pool]
    assert "completed" in place.api.notices(place.jobs["ends"])


@in_each_place
@pytest.mark.parametrize("outage", ["full"], indirect=True)
def test_jobs_in_the_queue_are_worked_off_while_redis_is_full(outage: BrokerOutage, pool: str) -> None:
    assert outage.meanwhile[pool].are_queued_completed


# ── Redis restarts ───────────────────────────────────────────────────────────────────────────────────────────────


@crash_or_order
def test_an_idle_worker_consumes_again_soon_after_redis_restarted(lab: RedisLab, crash: bool) -> None:
    lab.assert_goes_on()
    lab.restart(crash)
    lab.assert_goes_on()


def test_a_job_that_runs_while_redis_restarts_is_generated_once(lab: RedisLab) -> None:
    """It restarts in order. What a crash does to jobs that run or wait is seen in the outages above."""
    jobs = lab.run("busy", "[delay 2]")
    lab.restart()
    lab.assert_ended_once(jobs)
    lab.assert_goes_on()


# ── connections cut, everything lost, no memory ──────────────────────────────────────────────────────────────────


def test_jobs_complete_once_while_all_connections_to_redis_are_cut_again_and_again(lab: RedisLab) -> None:
    lab.assert_jobs_outlive_cuts(every_s=0.7)


def test_jobs_that_redis_forgot_complete_once_each(lab: RedisLab, admin: Redis) -> None:
    lab.assert_jobs_outlive_the_loss_of_messages(lambda _: admin.flushall())


def test_a_worker_that_has_to_connect_again_while_redis_is_full_waits(lab: RedisLab) -> None:
    began_at, accepted = datetime.now(UTC), lab.gate.accepted
    with lab.full():
        lab.gate.cut()
        # All connect again at once, which makes some forty connections. Those that are refused try it again and again.
        poll(lambda: lab.gate.accepted >= accepted + 100, PATIENCE_S, description="many tries to connect")
    lab.assert_goes_on()
    for place in lab.places.values():
        assert "Traceback" not in place.log()
        lines = lines_about_no_job(place.log())
        assert len(lines) <= 20 * repeats_since(began_at), lines


# ── Sentinel ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_jobs_go_on_by_the_new_master_that_sentinel_chose(
    mongo_server: MongoServer, redis_server: RedisServer, running_provider: Provider, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        master, replica = (stack.enter_context(running(RedisServer())) for _ in range(2))
        with Redis.from_url(replica.url) as client:
            client.execute_command("REPLICAOF", master.host, master.port)
        sentinel = stack.enter_context(running(SentinelServer(master)))
        settings = worker_settings(mongo_server, redis_server, running_provider, f"sentinel_{ObjectId()}")
        environment = {**settings, "TMPDIR": str(tmp_path)}
        before, after = (
            stack.enter_context(open_api({**environment, "CELERY_BROKER_URL": server.url}))
            for server in (master, replica)
        )
        worker = WorkerProcess({**environment, "CELERY_BROKER_URL": sentinel.broker_url}, tmp_path / "worker.log")
        stack.callback(worker.kill)
        worker.wait_ready(PATIENCE_S)
        assert before.wait(before.text("by the first master"))["status"] == "completed"
        master.kill()
        poll(lambda: sentinel.master_port() == replica.port, PATIENCE_S, description="another master")
        assert after.wait(after.text("by the second master"), timeout_s=PATIENCE_S)["status"] == "completed"
        assert worker.process.poll() is None
        assert "Traceback" not in worker.text()
