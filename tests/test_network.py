"""A network that swallows packets between the worker and MongoDB, or between it and the provider."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from testbed.network import Gateway
from testbed.processes import poll
from testbed.servers import MongoServer, RedisServer
from tests.outage_lab import UNTIL_AWAY, swallowed
from tests.place import LEASE_S, PATIENCE_S, HoldingProvider, Place, Step, assert_ended_once, opener
from workerkit.sentences import TOOK_TOO_LONG

pytestmark = pytest.mark.servers

POOLS = ("prefork", "threads")
in_each_place = pytest.mark.parametrize("pool", POOLS)


@dataclass(frozen=True)
class Gated:
    """A worker of each pool behind gateways to MongoDB and to the provider."""

    places: dict[str, Place]
    mongo: Gateway
    provider: Gateway

    def submit(self, name: str, step: Step, **limits: int) -> None:
        for place in self.places.values():
            place.submit(name, step, **limits)

    def wait_call(self, name: str) -> None:
        for place in self.places.values():
            place.wait_call(name)


@pytest.fixture(scope="module")
def gated(
    mongo_server: MongoServer,
    redis_server: RedisServer,
    holding_provider: HoldingProvider,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Gated]:
    with ExitStack() as stack:
        open_place = opener(mongo_server, redis_server, holding_provider, tmp_path_factory.mktemp("network"), stack)
        mongo, provider = (stack.enter_context(Gateway(url)) for url in (mongo_server.url, holding_provider.url))
        behind = {
            # The replica set would tell a client its members' own addresses.
            "MONGODB_URL": f"{mongo.url}{'&' if '?' in mongo.url else '?'}directConnection=true",
            "OPENAI_BASE_URL": provider.url,
        }
        limits = {"CELERY_SOFT_TIME_LIMIT": "60", "CELERY_TIME_LIMIT": "90", "WORKER_CONCURRENCY": "2"}
        places = {pool: open_place(pool, WORKER_POOL=pool, **limits) for pool in POOLS}
        for place in places.values():
            place.start_worker(**behind)
        for place in places.values():
            place.wait_ready()
        yield Gated(places, mongo, provider)


# ── MongoDB ──────────────────────────────────────────────────────────────────────────────────────────────────────

ENDS, COMES = Step(UNTIL_AWAY), Step("")


@pytest.fixture(scope="module")
def calls_meanwhile(gated: Gated, holding_provider: HoldingProvider) -> dict[str, int]:
    """MongoDB was out of reach for longer than a lease. In each place a job ended meanwhile, and another one came.

    Returns how often the provider was called meanwhile for the one that came.
    """
    gated.submit("ends", ENDS)
    gated.wait_call("ends")
    with swallowed(gated.mongo):
        holding_provider.let_go.add(UNTIL_AWAY)
        gated.submit("comes", COMES)
        time.sleep(LEASE_S + 1)  # nothing may happen meanwhile, so there is nothing to wait for but the time
        calls = {pool: len(place.calls("comes")) for pool, place in gated.places.items()}
    for place in gated.places.values():
        place.wait_ends({"ends": ENDS, "comes": COMES})
    holding_provider.let_go.clear()
    return calls


@in_each_place
def test_a_job_that_ends_while_mongodb_is_unreachable_is_completed_afterwards(
    gated: Gated, calls_meanwhile: dict[str, int], pool: str
) -> None:
    assert_ended_once(gated.places[pool], "ends", ENDS)


@in_each_place
def test_a_job_that_comes_while_mongodb_is_unreachable_waits(
    gated: Gated, calls_meanwhile: dict[str, int], pool: str
) -> None:
    assert calls_meanwhile[pool] == 0
    assert_ended_once(gated.places[pool], "comes", COMES)


# ── the provider ─────────────────────────────────────────────────────────────────────────────────────────────────

UNANSWERED, LATE = Step(f"{UNTIL_AWAY} [delay 1]", ends="failed"), Step("")


@pytest.fixture(scope="module")
def provider_outage(gated: Gated, holding_provider: HoldingProvider) -> Gated:
    """The provider was out of reach. In each place a job's answer was lost meanwhile, and another job came."""
    gated.provider.cut()  # so that the second job finds no open connection
    gated.submit("unanswered", UNANSWERED, soft_time_limit=4, time_limit=60)
    gated.wait_call("unanswered")
    with swallowed(gated.provider):
        holding_provider.let_go.add(UNTIL_AWAY)
        gated.submit("late", LATE)
        for place in gated.places.values():
            place.api.wait(place.jobs["late"], "processing", timeout_s=PATIENCE_S)
            place.api.wait(place.jobs["unanswered"], "failed", timeout_s=PATIENCE_S)
    for place in gated.places.values():
        place.wait_ends({"late": LATE})
    holding_provider.let_go.clear()
    return gated


@in_each_place
def test_a_job_whose_answer_never_arrives_fails_at_its_limit_and_the_worker_goes_on(
    provider_outage: Gated, pool: str
) -> None:
    place = provider_outage.places[pool]
    assert place.document("unanswered")["error_message"] == TOOK_TOO_LONG
    assert place.goes_on(slots=2)


@in_each_place
def test_a_job_that_comes_while_the_provider_is_unreachable_is_done_afterwards(
    provider_outage: Gated, pool: str
) -> None:
    place = provider_outage.places[pool]
    poll(lambda: place.api.status(place.jobs["late"]) == "completed", PATIENCE_S)
    assert_ended_once(place, "late", LATE)
