"""The contract's `.env` on a host: `mongodb` and `redis` don't resolve there, and compose's ports are on 127.0.0.1."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from testbed.api import Api
from testbed.forks import WORKER
from testbed.processes import SOURCE, free_port
from testbed.servers import DATABASE, MongoServer, RedisServer
from tests.lab import bare_settings, table
from tests.site import CELERY_COMMAND, StartWorker, run_impatiently, run_worker, running
from workerkit.loopback import LOOPBACK, listens, resolves
from workerkit.settings import MONGODB_URL, REDIS_URL, Settings, load_settings, remarks, unresolved_servers

MOVED = (
    "mongodb://ai_backend_user:ai_backend_password@127.0.0.1:{}/ai_backend?authSource=ai_backend&directConnection=true"
)


@pytest.fixture
def port() -> Iterator[int]:
    """A port on which something listens."""
    with socket.create_server((LOOPBACK, 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A host on which neither `mongodb` nor `redis` resolves, nothing listens, and no variable is set."""
    for name in os.environ:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("workerkit.settings.resolves", lambda name: False)
    monkeypatch.setenv("MONGODB_PORT", f"{free_port()}")
    monkeypatch.setenv("REDIS_PORT", f"{free_port()}")
    return monkeypatch


def urls(settings: Settings) -> tuple[str, str]:
    return settings.mongodb_url.get_secret_value(), settings.redis_url.get_secret_value()


# ── when it is used ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_port_on_loopback_serves_for_a_default_name_that_does_not_resolve(
    host: pytest.MonkeyPatch, port: int
) -> None:
    host.setenv("MONGODB_PORT", f"{port}")
    settings = load_settings()
    assert urls(settings) == (MOVED.format(port), REDIS_URL)
    assert settings.loopback == {"mongodb": f"127.0.0.1:{port}"}
    assert remarks(settings) == [
        f"mongodb doesn't resolve here, so 127.0.0.1:{port} is used, where compose.yaml publishes it"
    ]


def test_the_broker_and_the_results_follow_redis(host: pytest.MonkeyPatch, port: int) -> None:
    host.setenv("REDIS_PORT", f"{port}")
    settings = load_settings()
    assert settings.broker_url == settings.result_backend == settings.redis_url.get_secret_value()
    assert settings.broker_url == f"redis://127.0.0.1:{port}/0"


def test_the_port_may_stand_in_dotenv_as_compose_reads_it(host: pytest.MonkeyPatch, port: int) -> None:
    host.delenv("REDIS_PORT")
    Path(".env").write_text(f"{(SOURCE / '.env.example').read_text()}\nREDIS_PORT={port}\n")
    assert load_settings().loopback["redis"] == f"127.0.0.1:{port}"


@table(
    "variables",
    ("another password", {"MONGODB_URL": MONGODB_URL.replace("ai_backend_password", "mine")}),
    ("another database", {"MONGODB_URL": MONGODB_URL.replace("/ai_backend?", "/mine?")}),
    ("a replica set", {"MONGODB_URL": f"{MONGODB_URL}&replicaSet=rs0"}),
    ("a pod of Kubernetes", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}),
)
def test_nothing_but_the_default_url_is_ever_changed(
    host: pytest.MonkeyPatch, port: int, variables: dict[str, str]
) -> None:
    for name, value in {"MONGODB_PORT": f"{port}", **variables}.items():
        host.setenv(name, value)
    settings = load_settings()
    assert urls(settings) == (variables.get("MONGODB_URL", MONGODB_URL), REDIS_URL)
    assert remarks(settings) == []


def test_a_name_that_resolves_is_used(host: pytest.MonkeyPatch, port: int) -> None:
    host.setenv("MONGODB_PORT", f"{port}")
    host.setattr("workerkit.settings.resolves", lambda name: name == "mongodb")
    assert urls(load_settings()) == (MONGODB_URL, REDIS_URL)


def test_where_nothing_listens_no_name_is_looked_up_and_nothing_changed(host: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    host.setattr("workerkit.settings.resolves", asked.append)
    assert urls(load_settings()) == (MONGODB_URL, REDIS_URL)
    assert asked == []


@pytest.mark.parametrize("text", ["tcp://10.0.0.1:27017", "0", "65536", "-1", "", "٣", "1" * 5000])
def test_a_port_that_is_none_counts_as_the_usual_one(host: pytest.MonkeyPatch, text: str) -> None:
    asked: list[int] = []
    host.setattr("workerkit.settings.listens", asked.append)
    host.setenv("MONGODB_PORT", text)
    load_settings()
    assert asked[0] == 27017


def test_settings_by_value_alone_look_at_no_port(host: pytest.MonkeyPatch, port: int) -> None:
    """So the demo, which reads no `.env` and brings its own servers, stays with them."""
    host.setenv("MONGODB_PORT", f"{port}")
    assert load_settings(_env_file=None).loopback == {}


def test_a_start_without_servers_names_those_that_cant_be_found(host: pytest.MonkeyPatch) -> None:
    assert [one.host for one in unresolved_servers(load_settings())] == ["mongodb", "redis"]
    assert unresolved_servers(bare_settings(mongodb_url="mongodb://h/d", redis_url="redis://h")) == []


def test_whether_a_name_resolves_and_a_port_is_listened_on(port: int) -> None:
    assert (resolves("localhost"), resolves("no-such-host.invalid")) == (True, False)
    assert (listens(port), listens(free_port())) == (True, False)


# ── a fresh clone: `cp .env.example .env` ────────────────────────────────────────────────────────────────────────

outside_docker = pytest.mark.skipif(
    resolves("mongodb") or resolves("redis"), reason="the names of compose's network resolve here"
)
STARTS = {"worker.py": [str(WORKER)], "celery": [*CELERY_COMMAND, "--concurrency=1", "--loglevel=INFO"]}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a fresh clone, whose `.env` is the example. Nothing listens on compose's ports."""
    (tmp_path / ".env").write_text((SOURCE / ".env.example").read_text())
    return {"MONGODB_PORT": f"{free_port()}", "REDIS_PORT": f"{free_port()}", "COLUMNS": "200"}


@pytest.fixture(scope="module")
def compose() -> Iterator[tuple[MongoServer, RedisServer]]:
    """Servers like compose's: with the contract's user, on ports of 127.0.0.1."""
    with running(MongoServer(auth=True)) as mongodb, running(RedisServer()) as redis:
        yield mongodb, redis


@pytest.fixture
def with_compose(environment: dict[str, str], compose: tuple[MongoServer, RedisServer]) -> dict[str, str]:
    mongodb, redis = compose
    return {**environment, "MONGODB_PORT": f"{mongodb.port}", "REDIS_PORT": f"{redis.port}"}


def rows_of(output: str) -> list[str]:
    """The rows of a table, each on one line. A row begins where its first cell isn't empty."""
    rows: list[list[str]] = []
    for line in output.splitlines():
        cells = [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        if cells and cells[0]:
            rows.append(cells)
        elif cells and rows:
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
    return [" | ".join(row) for row in rows]


@outside_docker
@pytest.mark.servers
def test_a_fresh_dotenv_is_green_at_the_first_try_with_composes_servers(
    with_compose: dict[str, str], tmp_path: Path
) -> None:
    ended = run_worker(with_compose, tmp_path, "check")
    rows = rows_of(ended.stdout)
    assert (ended.returncode, [row for row in rows if row.startswith("FAULT")]) == (0, [])
    [mongodb] = [row for row in rows if row.startswith("ok | MongoDB |")]
    assert mongodb.startswith(f"ok | MongoDB | 127.0.0.1:{with_compose['MONGODB_PORT']} reached, version")
    assert "(mongodb doesn't resolve here)" in mongodb
    assert "docker compose" not in ended.stdout


@outside_docker
@pytest.mark.servers
@pytest.mark.parametrize("command", STARTS.values(), ids=STARTS)
def test_a_worker_with_a_fresh_dotenv_does_jobs_from_composes_servers(
    with_compose: dict[str, str],
    compose: tuple[MongoServer, RedisServer],
    start_worker: StartWorker,
    command: list[str],
) -> None:
    worker = start_worker(command=command, PYTHONPATH=str(SOURCE), **with_compose)
    mongodb, redis = compose
    with closing(Api(mongodb.url, redis.url, DATABASE, "ai_jobs")) as api:
        job = api.text("Hello")
        assert api.wait(job, "completed")["output_data"]["model_used"] == "offline-stand-in"
        assert api.wait_notice(job, "completed")
    assert worker.stop() == 0


@outside_docker
@pytest.mark.servers
def test_a_start_says_loudly_that_composes_ports_are_used(
    with_compose: dict[str, str], start_worker: StartWorker
) -> None:
    log = start_worker(**with_compose).text()
    for name in ("mongodb", "redis"):
        place = f"127.0.0.1:{with_compose[f'{name.upper()}_PORT']}"
        assert f"  WARNING: {name} doesn't resolve here, so {place} is used, where compose.yaml publishes it\n" in log


@outside_docker
def test_with_nothing_running_each_row_says_what_to_start_and_which_variable_to_change(
    environment: dict[str, str], tmp_path: Path
) -> None:
    ended = run_impatiently(environment, tmp_path, "check")
    rows = [row for row in rows_of(ended.stdout) if row.startswith("FAULT")]
    starts = {"MongoDB": "mongodb", "Redis": "redis", "broker": "redis", "artifact store": "mongodb"}
    assert ended.returncode == 1
    assert [row.split(" | ")[1] for row in rows] == list(starts)
    for row, (what, service) in zip(rows, starts.items(), strict=True):
        variable = f"{service.upper()}_URL"
        start = f"start it: docker compose up --wait {service}; or name another server in {variable}"
        assert row.endswith(
            f"{service}:{'27017' if service == 'mongodb' else '6379'}: the name doesn't resolve | {start}"
        )
        assert f"| {what} |" in row
    assert ended.stdout.endswith("\n  docker compose up --wait mongodb redis\n")


@outside_docker
@pytest.mark.servers
def test_another_mongodb_on_composes_port_is_suspected(environment: dict[str, str], tmp_path: Path) -> None:
    with running(MongoServer()) as alien:
        ended = run_impatiently({**environment, "MONGODB_PORT": f"{alien.port}"}, tmp_path, "check")
    [row] = [row for row in rows_of(ended.stdout) if "| MongoDB |" in row]
    assert f"127.0.0.1:{alien.port}: wrong password for user ai_backend_user" in row
    assert "is this another MongoDB than compose's? MONGODB_PORT publishes that elsewhere" in row
