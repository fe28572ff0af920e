"""Why a server can't be reached: the same words whatever client tried it, with host and port and without secrets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import aiohttp
import pymongo
import pytest
import redis
from kombu import Connection

from testbed.servers import DATABASE_USER, MongoServer, RedisServer
from tests.lab import NOWHERE, SECRET, table
from workerkit.connections import NO_NAME, NOTHING, WRONG_LOGIN, advice_for, fault_at, place_of, start_of, user_of
from workerkit.settings import MONGODB_URL

WAIT_S = 0.5
START_REDIS = "start it: docker compose up --wait redis"


@table(
    "url, place",
    ("MongoDB's usual port", "mongodb://user:pw@mongodb/db?authSource=db", "mongodb:27017"),
    ("several hosts", "mongodb://a,b:27018/db", "a:27017,b:27018"),
    ("Redis over TLS", f"rediss://:{SECRET}@cache/0", "cache:6379"),
    ("a socket", "unix:///run/redis.sock", "unix:///run/redis.sock"),
    ("RabbitMQ", f"amqp://guest:{SECRET}@rabbit//", "rabbit:5672"),
    ("a provider", f"http://u:{SECRET}@host:8000/v1?key={SECRET}", "host:8000"),
    ("a host's usual port", "https://api.openai.com/v1", "api.openai.com:443"),
    ("IPv6", "http://[::1]:8000/v1", "[::1]:8000"),
    ("no URL", "gridfs", "gridfs"),
    ("a password with a slash", f"mongodb://u:{SECRET}/x@host/db", "mongodb://***"),
)
def test_a_servers_place_is_its_host_and_port(url: str, place: str) -> None:
    assert place_of(url) == place


@table("url, user", ("named", "mongodb://us%40er:pw@h/db", "us@er"), ("a password alone", "redis://:pw@h/0", ""))
def test_the_user_is_the_one_that_the_url_names(url: str, user: str) -> None:
    assert user_of(url) == user


# ── real clients, and servers that can't be reached ──────────────────────────────────────────────────────────────


def ask_mongodb(url: str) -> None:
    options: dict[str, Any] = {"serverSelectionTimeoutMS": WAIT_S * 1000, "connectTimeoutMS": WAIT_S * 1000}
    with pymongo.MongoClient[Any](url, **options) as client:
        client.admin.command("ping")
        client.get_default_database("x").jobs.find_one()


def ask_redis(url: str) -> None:
    with contextlib.closing(redis.Redis.from_url(url, socket_timeout=WAIT_S, socket_connect_timeout=WAIT_S)) as client:
        client.ping()


def ask_rabbitmq(url: str) -> None:
    with Connection(url, connect_timeout=WAIT_S) as connection:
        connection.connect()


def ask_provider(url: str) -> None:
    async def ask() -> None:
        timeout = aiohttp.ClientTimeout(total=WAIT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url):
            pass

    asyncio.run(ask())


Ask = Callable[[str], None]
CLIENTS: dict[str, Ask] = {"mongodb": ask_mongodb, "redis": ask_redis, "amqp": ask_rabbitmq, "http": ask_provider}
TLS = {"mongodb": "mongodb://{}/?tls=true", "redis": "rediss://{}", "http": "https://{}"}


def fault(ask: Ask, url: str) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (each client has errors of its own)
        ask(url)
    return fault_at(url, caught.value)


@pytest.mark.parametrize("scheme", CLIENTS)
def test_a_port_on_which_nothing_listens(scheme: str) -> None:
    assert fault(CLIENTS[scheme], f"{scheme}://{NOWHERE}/") == f"{NOWHERE}: nothing listens there"


@pytest.mark.parametrize("scheme", CLIENTS)
def test_a_name_that_does_not_resolve(scheme: str) -> None:
    assert fault(CLIENTS[scheme], f"{scheme}://no-such-host.invalid:1/") == f"no-such-host.invalid:1: {NO_NAME}"


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("scheme", ["mongodb", "redis", "http"])
def test_a_server_that_never_answers(silent: str, scheme: str) -> None:
    assert fault(CLIENTS[scheme], f"{scheme}://{silent}/") == f"{silent}: no answer"


@pytest.fixture
def plain() -> Iterator[str]:
    """The address of a server that speaks HTTP without TLS."""

    class Quiet(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("scheme", TLS)
def test_a_server_without_tls(plain: str, scheme: str) -> None:
    assert fault(CLIENTS[scheme], TLS[scheme].format(plain)) == f"{plain}: it doesn't speak TLS"


def test_a_socket_that_is_not_there() -> None:
    assert fault(ask_redis, "unix:///no/such.sock") == "unix:///no/such.sock: there is no such socket"


def test_an_error_of_another_kind_has_no_reason() -> None:
    assert fault_at("http://host/", ValueError(SECRET)) == ""


# ── what to start, and how ───────────────────────────────────────────────────────────────────────────────────────


@table(
    "reason, url, advice",
    (
        "a default",
        NO_NAME,
        MONGODB_URL,
        "start it: docker compose up --wait mongodb; or name another server in VARIABLE",
    ),
    ("compose's name", NO_NAME, "redis://redis/1", f"{START_REDIS}; outside Docker use 127.0.0.1 in VARIABLE"),
    ("another name without a dot", NO_NAME, "http://models/v1", "outside Docker use 127.0.0.1 in VARIABLE"),
    ("a name of the internet", NO_NAME, "redis://a.example", ""),
    ("compose's port", NOTHING, "redis://:pw@127.0.0.1", f"{START_REDIS}; or change VARIABLE"),
    ("another port", NOTHING, "redis://localhost:6390", "start the server that belongs there; or change VARIABLE"),
    ("Ollama's port", NOTHING, "http://127.0.0.1:11434/v1", "start it: ollama serve; or change VARIABLE"),
    ("IPv6", NOTHING, "http://[::1]:11434/v1", "start it: ollama serve; or change VARIABLE"),
    ("RabbitMQ's port", NOTHING, "amqp://localhost", "start it: docker run --detach --publish 127.0.0.1:5672:5672 "),
    ("a server elsewhere", NOTHING, "redis://10.0.0.1", ""),
    ("one that answers", WRONG_LOGIN, "redis://localhost", ""),
)
def test_what_isnt_running_comes_with_what_starts_it_and_the_variable_to_change(
    monkeypatch: pytest.MonkeyPatch, reason: str, url: str, advice: str
) -> None:
    monkeypatch.setattr("workerkit.connections.is_container", lambda: False)
    given = advice_for(reason, url, "VARIABLE")
    assert given.startswith(advice) if advice else not given
    assert start_of(reason, url) in given


def test_in_a_container_the_advice_says_whose_loopback_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workerkit.connections.is_container", lambda: True)
    advice = advice_for(NOTHING, "http://127.0.0.1:11434/v1", "OPENAI_BASE_URL")
    assert advice.endswith("or change OPENAI_BASE_URL (this is a container, and 127.0.0.1 is inside it)")


# ── logins ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.servers
@pytest.mark.slow
def test_a_wrong_password_of_mongodb_names_the_user() -> None:
    with MongoServer(auth=True) as server:
        url = server.url.replace(f"{DATABASE_USER}:", f"{DATABASE_USER}:{SECRET}")
        said = fault(ask_mongodb, url)
    assert said == f"{server.address}: wrong password for user {DATABASE_USER}"


@pytest.mark.servers
@table(
    "login, reason", ("wrong", f":{SECRET}@", "wrong user or password"), ("none", "", "it wants a user and password")
)
def test_a_wrong_password_of_redis(login: str, reason: str) -> None:
    with RedisServer(password="right") as server:
        assert fault(ask_redis, f"redis://{login}{server.address}/0") == f"{server.address}: {reason}"
