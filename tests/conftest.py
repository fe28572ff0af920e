"""Fixtures for tests of whole worker processes: running workers that the tests of a module share, and outages."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from bson import ObjectId
from click.testing import CliRunner

import worker
from testbed.api import WorkerProcess
from testbed.provider import Provider
from testbed.servers import MongoServer, RedisServer
from tests.lab import Ended, Run
from tests.outage_lab import BrokerLab, BrokerOutage
from tests.place import HoldingProvider, OpenPlace, opener
from tests.site import CACHE, Site, SiteOf, open_api, worker_settings

OWN_HANDLERS = """
import time
from worker import JobInput, Keeper, Result, Runtime, handles

Runtime.stuck_loop_s = 3.0  # a handler that blocks the event loop is given up sooner than usual
Keeper.tick_s = 0.2  # cancels are noticed, and lost jobs found, sooner than usual

class Nap(JobInput):
    seconds: float

@handles("blocking_nap", Nap)
async def blocking_nap(call):
    time.sleep(call.input.seconds)  # what no handler should do: it blocks the event loop
    return Result({"slept": call.input.seconds})
"""


@pytest.fixture(scope="session", autouse=True)
def compiled_modules() -> None:
    """Lets worker processes keep their compiled modules, where the environment forbids that beside the sources.

    A process starts in two thirds of the time then, and the tests start some dozens that way.
    """
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        os.environ["PYTHONPYCACHEPREFIX"] = str(CACHE / "compiled")


# ── running workers ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def sites(
    mongo_server: MongoServer,
    redis_server: RedisServer,
    running_provider: Provider,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[SiteOf]:
    """A worker per pool with one slot. It is started when first asked for, and again where a test has ended it."""
    folder = tmp_path_factory.mktemp("sites")
    (folder / "own_handlers.py").write_text(OWN_HANDLERS)
    own = {"PYTHONPATH": str(folder), "HANDLER_MODULES": "own_handlers"}
    limits = {"CELERY_SOFT_TIME_LIMIT": "20", "CELERY_TIME_LIMIT": "30", "ORPHAN_AFTER": "60"}
    short = {"LEASE_SECONDS": "3", "SWEEP_INTERVAL": "0.3"}
    running: dict[str, Site] = {}
    with ExitStack() as stack:

        def site(pool: str) -> Site:
            if pool not in running or running[pool].worker.process.poll() is not None:
                settings = worker_settings(mongo_server, redis_server, running_provider, f"{pool}_{ObjectId()}")
                environment = {**settings, **own, **limits, **short, "WORKER_POOL": pool, "DEBUG": "true"}
                api = stack.enter_context(open_api(environment))
                worker = WorkerProcess(environment, folder / f"{environment['CELERY_QUEUE_NAME']}.log")
                stack.callback(worker.kill)
                running[pool] = Site(api, worker.wait_ready(60), running_provider, environment)
            return running[pool]

        yield site


@pytest.fixture
def site(sites: SiteOf, request: pytest.FixtureRequest) -> Iterator[Site]:
    """The shared worker of a pool, prefork unless the test says another. What a test leaves unfinished is cancelled."""
    shared = sites(getattr(request, "param", "prefork"))
    yield replace(shared, log_start=len(shared.worker.text()))
    for job in shared.api.jobs.find({"status": {"$in": ["pending", "processing"]}}, {"_id": 1}):
        shared.api.cancel(job["_id"])


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def run_here(environment: dict[str, str], shared_database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs `python worker.py …` in this process, on the servers of `runtime`. Settings by keyword replace its own."""
    monkeypatch.chdir(tmp_path)  # where there is no .env
    own = {**environment, "DATABASE_NAME": shared_database}

    def run(*arguments: object, **settings: str) -> Ended:
        ended = CliRunner().invoke(
            worker.main, list(map(str, arguments)), env={**own, **settings}, prog_name="worker.py"
        )
        assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
        return Ended(ended.exit_code, ended.stdout, ended.stderr)

    return run


# ── outages ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def holding_provider() -> Iterator[HoldingProvider]:
    provider = HoldingProvider()
    with provider:
        yield provider


@pytest.fixture(scope="module")
def open_place(
    mongo_server: MongoServer,
    redis_server: RedisServer,
    holding_provider: HoldingProvider,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[OpenPlace]:
    """Opens places on the session's servers. They are closed when the module's tests have ended."""
    with ExitStack() as stack:
        yield opener(mongo_server, redis_server, holding_provider, tmp_path_factory.mktemp("places"), stack)


@pytest.fixture
def lab(broker_lab: BrokerLab) -> Iterator[BrokerLab]:
    """The lab of a module (its fixture `broker_lab`), in order before the test and afterwards."""
    yield from broker_lab.in_order()


@pytest.fixture(scope="module")
def outage(broker_lab: BrokerLab, request: pytest.FixtureRequest) -> BrokerOutage:
    """An outage of the broker that is over. Its name is the fixture's parameter."""
    return broker_lab.live_through(request.param)


# ── proxies ──────────────────────────────────────────────────────────────────────────────────────────────────────

PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the environment's proxies; those that aren't named are unset."""

    def use(**variables: str) -> None:
        for name in PROXY_VARIABLES:
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return use
