"""Redis' URLs: the same URL serves the worker's client, Celery's broker and its result backend, or is refused."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import states, uuid
from kombu import Connection

import worker
from testbed.network import TlsProxy, make_certificate
from testbed.servers import RedisServer
from tests.lab import SECRET, adopt, bare_settings, table
from tests.site import StartWorker, open_api, running
from worker import Runtime
from workerkit.broker import ResultBackend
from workerkit.redis_urls import RedisTarget

PASSWORD = "planted password:/?#@"
QUOTED = "planted%20password%3A%2F%3F%23%40"


def connection_of(url: str) -> dict[str, Any]:
    arguments = RedisTarget.parse(url).connection({})
    return {name: value for name, value in arguments.items() if name != "connection_class"}


@table(
    "url, arguments",
    ("the default", "redis://redis:6379/0", {"host": "redis", "port": 6379, "db": 0}),
    ("no port, no database", "redis://redis", {"host": "redis", "port": 6379, "db": 0}),
    ("the database as an option", "redis://h/1?db=2", {"host": "h", "port": 6379, "db": 2}),
    ("an IPv6 address", "redis://[::1]:7000/3", {"host": "::1", "port": 7000, "db": 3}),
    (
        "a password",
        f"redis://u:{QUOTED}@h",
        {"host": "h", "port": 6379, "db": 0, "username": "u", "password": PASSWORD},
    ),
    ("it as an option", f"redis://h?password={QUOTED}", {"host": "h", "port": 6379, "db": 0, "password": PASSWORD}),
    ("a socket", "unix:///a/b.sock?db=4", {"path": "/a/b.sock", "db": 4}),
    ("a socket as Celery names it", "redis+socket:///a.sock?virtual_host=4", {"path": "/a.sock", "db": 4}),
    ("a socket with a password", f"unix://:{QUOTED}@/a.sock", {"path": "/a.sock", "db": 0, "password": PASSWORD}),
)
def test_a_url_is_read_as_redis_py_reads_it(url: str, arguments: dict[str, Any]) -> None:
    assert connection_of(url) == arguments


@table(
    "option, value",
    ("seconds", "socket_timeout=0.5", 0.5),
    ("whole seconds", "health_check_interval=10", 10),
    ("a version", "protocol=3", 3),
    ("yes or no", "socket_keepalive=no", False),
    ("a word", "client_name=worker", "worker"),
)
def test_an_option_has_the_type_that_redis_py_wants(option: str, value: object) -> None:
    assert connection_of(f"redis://h?{option}")[option.partition("=")[0]] == value


@table("checks", ("redis-py's names", "none"), ("Celery's names", "CERT_NONE"))
def test_certificates_are_checked_unless_the_url_says_otherwise(checks: str) -> None:
    assert connection_of("rediss://h")["ssl_cert_reqs"] == "required"
    assert connection_of(f"rediss://h?ssl_cert_reqs={checks}")["ssl_cert_reqs"] == "none"


@table("of_url, used", ("a shorter one holds", 0.5, 0.5), ("a longer one would hold up the leases", 60, 2))
def test_a_time_out_can_be_made_shorter_only(of_url: float, used: float) -> None:
    target = RedisTarget.parse(f"redis://h?socket_timeout={of_url}")
    assert target.connection({"socket_timeout": 2})["socket_timeout"] == used


def test_the_address_that_celery_shows_of_a_socket_is_its_path(tmp_path: Path) -> None:
    runtime = adopt(Runtime(bare_settings(redis_url=f"unix://:{SECRET}@/a/Redis.sock?db=1")), tmp_path)
    assert worker.app.connection_for_write().as_uri() == "unix:///a/Redis.sock"
    assert SECRET not in str(worker.app.connection_for_write().info()["transport_options"])
    runtime.close()


@table(
    "url, sentence",
    ("another scheme", "http://h", "should look like redis://"),
    ("no scheme", "h:6379", "should look like redis://"),
    ("a scheme without slashes", "redis:h", "should look like redis://"),
    ("an unknown option", "redis://h?nonsense=1", "an option that isn't supported, nonsense: remove it (supported: "),
    ("an option of kombu alone", "redis://h?visibility_timeout=9", "isn't supported, visibility_timeout"),
    ("words for seconds", "redis://h?socket_timeout=soon", "socket_timeout should be seconds"),
    ("no time at all", "redis://h?socket_timeout=0", "socket_timeout should be seconds"),
    ("half a database", "redis://h?db=1.5", "db should be a number"),
    ("another protocol", "redis://h?protocol=4", "protocol should be 2 or 3"),
    ("an empty value", "redis://h?health_check_interval=", "health_check_interval should be whole seconds"),
    ("no value", "redis://h?db", "escaped"),
    ("a database by name", "redis://h/jobs", "should name Redis' database by its number"),
    ("a negative database", "redis://h/-1", "should name Redis' database by its number"),
    (
        "a certificate without TLS",
        "redis://h?ssl_ca_certs=/x",
        "ssl_ca_certs, which needs a URL that begins with rediss",
    ),
    ("a check of no such name", "rediss://h?ssl_cert_reqs=maybe", "should be required, optional or none"),
    ("a folder of authorities", "rediss://h?ssl_ca_path=/no/such", "ssl_ca_path names a folder that isn't there"),
    ("a key alone", "rediss://h?ssl_keyfile=/no/such", "ssl_keyfile"),
    ("a socket with a host", "unix://run/redis.sock", "unix:///path/redis.sock"),
    ("a socket without a path", "unix://", "unix:///path/redis.sock"),
    ("a path that no system takes", f"unix:///{'x' * 200}", "at most 107 bytes"),
    ("a # in a password", f"redis://:{SECRET}#x@h", "escaped"),
    ("a / in a password", f"redis://:{SECRET}/x@h", "escaped"),
    ("a ? in a password", f"redis://:12?{SECRET}=x@h", "escaped"),
    ("a blank", f"redis://:{SECRET} x@h", "escaped"),
)
def test_what_doesnt_work_everywhere_is_refused_with_a_sentence(url: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)) as refused:
        RedisTarget.parse(url)
    assert SECRET not in str(refused.value)


# ── on a real Redis ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def guarded_redis() -> Iterator[RedisServer]:
    with running(RedisServer(password="planted-password", has_socket=True)) as server:
        yield server


URLS = {
    "options": "redis://{at}/1?socket_timeout=3&socket_connect_timeout=1&health_check_interval=10&client_name=w"
    "&socket_keepalive=no&retry_on_timeout=true&username=default&password={password}",
    "an older protocol": "redis://:{password}@{at}/1?protocol=2",
    "the newest protocol": "redis://:{password}@{at}?protocol=3&db=1",
    "a socket": "unix://:{password}@{socket}?db=1&socket_timeout=3&protocol=2",
    "a socket as Celery names it": "redis+socket://{socket}?virtual_host=1&password={password}&socket_keepalive=1",
    "TLS": "rediss://:{password}@{tls}/1?ssl_ca_certs={authority}&ssl_cert_reqs=CERT_REQUIRED&ssl_check_hostname=true",
}


@pytest.fixture(scope="module", params=URLS)
def url(
    guarded_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[str]:
    certificate = make_certificate(tmp_path_factory.mktemp("certificate"))
    with TlsProxy(guarded_redis.port, certificate) as proxy:
        yield URLS[request.param].format(
            at=guarded_redis.address,
            password=guarded_redis.password,
            socket=guarded_redis.socket,
            tls=f"127.0.0.1:{proxy.port}",
            authority=certificate.authority,
        )


@pytest.mark.servers
def test_a_url_serves_client_broker_and_result_backend(guarded_redis: RedisServer, url: str, tmp_path: Path) -> None:
    queue, task_id = f"queue_{time.monotonic_ns()}", uuid()
    with closing(adopt(Runtime(bare_settings(redis_url=url, celery_queue_name=queue)), tmp_path)) as runtime:
        assert runtime.redis.ping()
        runtime.broker.send("any")
        assert runtime.broker.queue_length() == 1
        backend = ResultBackend(app=worker.app, url=url)
        backend.store_result(task_id, None, states.SUCCESS)
        assert backend.get_state(task_id) == states.SUCCESS
        backend.client.close()
    with redis.Redis.from_url(guarded_redis.url.removesuffix("0") + "1") as client:  # all three have used database 1
        assert (client.llen(queue), client.exists(f"celery-task-meta-{task_id}")) == (1, 1)


@pytest.mark.servers
def test_a_job_completes_over_a_unix_socket(
    guarded_redis: RedisServer, environment: dict[str, str], start_worker: StartWorker
) -> None:
    url = f"unix://:{guarded_redis.password}@{guarded_redis.socket}?protocol=3"
    process = start_worker(REDIS_URL=url)
    with open_api({**environment, "REDIS_URL": guarded_redis.url}) as api:
        job = api.text("Hello")
        assert api.wait_notice(job, "completed")
        stats = str(api.celery.control.inspect([process.name], timeout=15).stats())
    assert f"Connected to unix://{guarded_redis.socket}" in process.text()
    assert "planted-password" not in process.text() + stats


# ── why the libraries' own ways don't do ─────────────────────────────────────────────────────────────────────────


def test_kombu_and_celery_read_options_by_rules_of_their_own() -> None:
    """If this fails: then kombu takes redis-py's options, and `_connparams` of workerkit/broker.py may be simpler."""
    with pytest.raises(TypeError):
        Connection("redis://h?socket_timeout=3")
    with pytest.raises(KeyError):
        Connection("unix:///a.sock")
