"""The broker behind Celery: what only our own app does differently, and why it still has to.

For each difference there is a test that the stock class of Celery or kombu misbehaves. When one of these fails, that
class has been mended, and its docstring says what to delete from workerkit/broker.py.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import kombu.pools
import pytest
import redis
from amqp.exceptions import (
    AccessRefused,
    AMQPNotImplementedError,
    ChannelError,
    NotFound,
    PreconditionFailed,
    error_for_code,
)
from celery import Celery, states
from celery import _state as celery_state
from celery.app.amqp import AMQP
from celery.app.trace import build_tracer, reset_worker_optimizations
from celery.backends.redis import RedisBackend
from celery.worker import state as worker_state
from celery.worker.consumer import Consumer
from celery.worker.consumer.tasks import Tasks
from kombu import Connection, Exchange, Queue
from kombu.connection import PooledConnection
from kombu.transport import redis as kombu_redis

import worker
from testbed.processes import SOURCE
from testbed.servers import RabbitServer, RedisServer
from tests.lab import NOWHERE, SECRET, bare_settings, queued, table
from tests.site import start
from worker import TASK_NAME, Runtime
from workerkit import broker
from workerkit.broker import (
    Broker,
    ExistingQueue,
    JobAMQP,
    JobConnection,
    JobConsumer,
    PooledJobConnection,
    RedisChannel,
    RedisQoS,
    RedisTransport,
    ResultBackend,
    is_safe_id,
    refusal_of,
    transport_options,
    waiting_queue,
)
from workerkit.logs import RepeatedFaultLog
from workerkit.process import Heartbeat

# ── options ──────────────────────────────────────────────────────────────────────────────────────────────────────


@table("time_limit_s, least_s", ("never below an hour", 120, 3600), ("longer than the longest job", 7200, 7201))
def test_no_running_job_is_delivered_again_for_its_length(time_limit_s: float, least_s: float) -> None:
    options = transport_options(bare_settings(celery_time_limit=time_limit_s))
    assert options["visibility_timeout"] >= least_s


@table(
    "url, options",
    ("Redis", "redis://redis", {"visibility_timeout", *broker.REDIS_TIMEOUTS}),
    ("Sentinel", "sentinel://h:1/0?master_name=x", {"visibility_timeout", "master_name", *broker.REDIS_TIMEOUTS}),
    ("RabbitMQ", "amqp://rabbit", set(broker.RABBITMQ_TIMEOUTS)),
    ("RabbitMQ with TLS", "amqps://rabbit", set(broker.RABBITMQ_TIMEOUTS)),
)
def test_each_broker_gets_the_options_that_it_knows(url: str, options: set[str]) -> None:
    assert set(transport_options(bare_settings(celery_broker_url=url))) == options


# ── other apps of the process ────────────────────────────────────────────────────────────────────────────────────

SNAPSHOTS = """
    import importlib, sys

    LIBRARIES = {"amqp", "billiard", "celery", "kombu", "redis", "vine"}
    for name in ("app.base", "app.trace", "backends.redis", "worker", "worker.consumer", "worker.strategy"):
        importlib.import_module(f"celery.{name}")
    for name in ("connection", "pools", "transport.pyamqp", "transport.redis"):
        importlib.import_module(f"kombu.{name}")

    def snapshot():
        seen = {}
        for module_name, module in list(sys.modules.items()):
            if module_name.partition(".")[0] in LIBRARIES:
                for name, value in vars(module).items():
                    if isinstance(value, type) and value.__module__ == module_name:
                        seen.update({(module_name, name, key): part for key, part in vars(value).items()})
                    elif callable(value):
                        seen[module_name, name] = value
        return seen, dict(sys.modules["kombu.transport"].TRANSPORT_ALIASES)

    before, aliases_before = snapshot()
    import worker
    from workerkit.settings import Settings

    runtime = worker.configure(Settings(_env_file=None, redis_url=sys.argv[1]))
    worker.app.send_task("any", queue="theirs")
    assert runtime.broker.queue_length() == 0
    after, aliases_after = snapshot()
    runtime.close()
    print(len(before) > 5000, aliases_before == aliases_after)
    print([name for name, part in before.items() if after.get(name) is not part])
"""


def test_importing_and_using_the_worker_changes_no_class_of_celery_or_kombu(fake_redis_url: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(SNAPSHOTS), fake_redis_url]
    ended = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("True True\n[]\n", "")


STOCK = [AMQP, Connection, Connection, kombu_redis.Transport, kombu_redis.Channel, kombu_redis.QoS]
STOCK_POOLED = [PooledConnection, kombu_redis.Transport, RedisBackend]
OURS = [JobAMQP, JobConnection, JobConnection, RedisTransport, RedisChannel, RedisQoS]
OURS_POOLED = [PooledJobConnection, RedisTransport, ResultBackend]


def used_classes(app: Celery) -> list[type]:
    """What an app uses: for a connection and its clone, a pooled connection, and results."""
    made = app.connection_for_write()
    with made as connection, kombu.pools.connections[made].acquire() as pooled:
        channel: Any = connection.default_channel
        alone = [app.amqp, connection, connection.clone(), connection.transport, channel, channel.qos]
        return list(map(type, [*alone, pooled, pooled.transport, app.backend]))


@pytest.fixture
def stock_app(light_runtime: Runtime) -> Iterator[Celery]:
    """A client such as the API, in this process, at our own app's URL and with the same options."""
    url = light_runtime.settings.redis_url.get_secret_value()
    app = Celery("stock", broker=url, backend=url, set_as_current=False)
    app.conf.broker_transport_options = worker.app.conf.broker_transport_options
    yield app
    app.close()
    kombu.pools.reset()


@table("is_ours_first", ("our app used the URL before", True), ("the other app used it before", False))
def test_another_app_of_the_process_uses_celerys_own_classes(stock_app: Celery, is_ours_first: bool) -> None:
    in_turn: list[Celery] = [worker.app, stock_app] if is_ours_first else [stock_app, worker.app]
    used = {app: used_classes(app) for app in in_turn}
    assert used[stock_app] == STOCK + STOCK_POOLED
    assert used[worker.app] == OURS + OURS_POOLED


def test_no_pool_is_shared_with_another_app(stock_app: Celery) -> None:
    ours, theirs = worker.app.connection_for_write(), stock_app.connection_for_write()
    assert kombu.pools.connections[ours] is not kombu.pools.connections[theirs]
    assert kombu.pools.connections[ours] is kombu.pools.connections[ours.clone()]
    assert kombu.pools.producers[ours] is not kombu.pools.producers[theirs]


@table(
    "url, transport",
    ("Redis", "redis://host", broker.RedisTransport),
    ("Redis with TLS", "rediss://host?ssl_cert_reqs=required", broker.RedisTransport),
    ("Sentinel", "sentinel://host:26379/0", broker.SentinelTransport),
    ("RabbitMQ", "amqp://host", broker.RabbitTransport),
    ("RabbitMQ with TLS", "amqps://host", broker.RabbitTlsTransport),
)
def test_a_url_leads_to_our_transport_and_is_logged_as_it_is(url: str, transport: type) -> None:
    connection = JobConnection(url)
    assert type(connection.transport) is transport
    assert connection.as_uri().partition(":")[0] == url.partition(":")[0]


def test_a_url_that_we_know_nothing_of_leads_to_kombus_own_transport() -> None:
    assert type(JobConnection("memory://").transport) is type(Connection("memory://").transport)


# ── Redis ────────────────────────────────────────────────────────────────────────────────────────────────────────

Fault = Callable[[redis.Redis], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def full(client: redis.Redis) -> Iterator[None]:
    """Redis refuses whatever needs memory."""
    client.config_set("maxmemory", "1")
    try:
        yield
    finally:
        client.config_set("maxmemory", "0")


@contextlib.contextmanager
def read_only(client: redis.Redis) -> Iterator[None]:
    """Redis refuses every write, as after a failover that made it a replica."""
    client.replicaof("127.0.0.1", "1")
    try:
        yield
    finally:
        client.replicaof("NO", "ONE")


in_each_fault = pytest.mark.parametrize("fault", [full, read_only])


@pytest.fixture(scope="module")
def own_redis() -> Iterator[RedisServer]:
    """A Redis that may be broken, since no other test uses it."""
    yield from start(RedisServer())  # type: ignore[misc]


@pytest.fixture
def client(own_redis: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(own_redis.url) as client:
        yield client
        client.flushall()


class Slot:
    """A channel that takes one message at a time, and a message that it has taken."""

    def __init__(self, connection: Connection) -> None:
        channel: Any = connection.default_channel
        channel.basic_qos(prefetch_count=1)
        channel.queue_declare("jobs")
        channel.basic_publish(channel.prepare_message("{}"), "", "jobs")
        self.channel, self.message = channel, channel.basic_get("jobs", no_ack=True)

    @property
    def is_free(self) -> bool:
        return bool(self.channel.qos.can_consume())

    def append(self) -> None:
        """Puts the message on the list of unacknowledged ones, as kombu does when it delivers it."""
        self.channel.qos.append(self.message, self.message.delivery_tag)


@pytest.fixture
def stock_slot(own_redis: RedisServer, client: redis.Redis) -> Iterator[Slot]:
    with Connection(own_redis.url) as connection:
        yield Slot(connection)


@pytest.fixture
def slot(own_redis: RedisServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slot]:
    monkeypatch.setattr(RedisQoS, "log", RepeatedFaultLog("the list can't be written"))
    with JobConnection(own_redis.url) as connection:
        yield Slot(connection)


@pytest.mark.servers
@in_each_fault
def test_a_message_is_taken_though_redis_refuses_to_list_it(
    slot: Slot, client: redis.Redis, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    with fault(client):
        slot.append()
    assert not slot.is_free
    assert "the list can't be written" in caplog.text


@pytest.mark.servers
@in_each_fault
def test_kombu_loses_a_message_that_redis_refuses_to_list(stock_slot: Slot, client: redis.Redis, fault: Fault) -> None:
    """If this fails for both faults: then delete `append` of `RedisQoS` from workerkit/broker.py."""
    with fault(client), pytest.raises(redis.ResponseError):
        stock_slot.append()
    assert stock_slot.is_free  # the message is neither in the queue nor in the slot


ANSWERS: dict[str, Callable[[Slot], None]] = {
    "ack": lambda slot: slot.channel.basic_ack(slot.message.delivery_tag),
    "reject": lambda slot: slot.channel.basic_reject(slot.message.delivery_tag, requeue=False),
    "requeue": lambda slot: slot.channel.basic_reject(slot.message.delivery_tag, requeue=True),
}
by_each_answer = pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)


@pytest.mark.servers
@by_each_answer
def test_a_slot_is_free_again_though_its_message_cant_be_taken_off_the_list(
    slot: Slot, client: redis.Redis, answer: Callable[[Slot], None]
) -> None:
    slot.append()
    with read_only(client):
        answer(slot)
    assert slot.is_free


@pytest.mark.servers
@by_each_answer
def test_kombu_never_frees_the_slot_of_a_message_that_it_cant_take_off_the_list(
    stock_slot: Slot, client: redis.Redis, answer: Callable[[Slot], None]
) -> None:
    """If this fails: then delete `ack` and `reject` of `RedisQoS` from workerkit/broker.py."""
    stock_slot.append()
    with read_only(client), pytest.raises(redis.ResponseError):
        answer(stock_slot)
    assert not stock_slot.is_free


@pytest.mark.servers
def test_a_message_that_was_never_acknowledged_comes_back_from_the_list(slot: Slot, client: redis.Redis) -> None:
    slot.append()
    assert client.hlen("unacked") == 1
    slot.channel.qos.restore_by_tag(slot.message.delivery_tag)
    assert (client.hlen("unacked"), client.llen("jobs")) == (0, 1)


@pytest.mark.servers
def test_a_search_for_old_messages_goes_on_though_redis_is_read_only(slot: Slot, client: redis.Redis) -> None:
    with read_only(client):
        slot.channel.qos.restore_visible(interval=1)


@pytest.mark.servers
def test_kombus_search_for_old_messages_raises_where_redis_is_read_only(stock_slot: Slot, client: redis.Redis) -> None:
    """If this fails: then delete `restore_visible` of `RedisQoS` from workerkit/broker.py."""
    with read_only(client), pytest.raises(redis.ResponseError):
        stock_slot.channel.qos.restore_visible(interval=1)


def clients_of(connection: Connection) -> list[Any]:
    """The clients that a channel takes for two commands."""
    channel: Any = connection.default_channel
    with channel.conn_or_acquire() as first, channel.conn_or_acquire() as second:
        return [first, second]


def test_a_channel_keeps_its_client(fake_redis_url: str) -> None:
    with JobConnection(fake_redis_url) as connection:
        first, second = clients_of(connection)
    assert first is second


def test_kombu_makes_a_client_for_each_command(fake_redis_url: str) -> None:
    """If this fails: then delete `_create_client` of `RedisMends` from workerkit/broker.py."""
    with Connection(fake_redis_url) as connection:
        first, second = clients_of(connection)
    assert first is not second


def test_a_kept_client_is_not_used_for_another_pool(fake_redis_url: str) -> None:
    with JobConnection(fake_redis_url) as connection:
        channel: Any = connection.default_channel
        first = channel._create_client()
        channel._disconnect_pools()  # as after a lost connection
        assert channel._create_client().connection_pool is channel.pool is not first.connection_pool


def waiting_channel(connection: Connection) -> Any:
    """A channel that waits for Redis to send it a message."""
    channel: Any = connection.default_channel
    channel.queue_declare("jobs")
    channel.basic_consume("jobs", True, lambda _: None, "consumer")
    with contextlib.suppress(TimeoutError):
        connection.drain_events(timeout=0.01)
    return channel


@pytest.mark.servers
def test_a_channel_closes_though_its_redis_is_gone() -> None:
    with RedisServer() as server, JobConnection(server.url) as connection:
        channel = waiting_channel(connection)
        server.kill()
        channel.close()
        assert channel.closed


@pytest.mark.servers
def test_kombus_channel_stops_half_way_when_it_closes_and_its_redis_is_gone() -> None:
    """If this fails: then delete `close` of `RedisMends` from workerkit/broker.py."""
    with RedisServer() as server, Connection(server.url) as connection:
        channel = waiting_channel(connection)
        server.kill()
        with pytest.raises(redis.ConnectionError):
            channel.close()
        assert not channel.closed


# ── RabbitMQ ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def rabbit() -> Iterator[RabbitServer]:
    yield from start(RabbitServer())  # type: ignore[misc]


def queue_of_ours(kind: type[Queue]) -> Queue:
    return kind("quorum", Exchange("quorum"), "quorum")


@pytest.fixture
def quorum_queue(rabbit: RabbitServer) -> str:
    """A quorum queue that the API has declared."""
    queue = Queue("quorum", Exchange("quorum"), "quorum", queue_arguments={"x-queue-type": "quorum"})
    with Connection(rabbit.url) as connection:
        return str(queue(connection.default_channel).declare())


def consume(app: Celery, queue: str) -> None:
    """Begins to consume as Celery's worker does, with the limit that it then sets."""

    class Limited:
        """What Celery's step looks at."""

    with app.connection_for_read() as connection:
        consumer: Any = Limited()
        consumer.app, consumer.connection = app, connection
        step: Any = Tasks(consumer)
        channel: Any = connection.default_channel
        channel.basic_qos(0, 1, step.qos_global(consumer))
        channel.basic_consume(queue, callback=print, consumer_tag="consumer")


@pytest.mark.slow
@pytest.mark.servers
def test_a_quorum_queue_can_be_consumed(rabbit: RabbitServer, quorum_queue: str) -> None:
    consume(Celery("ours", broker=rabbit.url, amqp=JobAMQP, set_as_current=False), quorum_queue)


@pytest.mark.slow
@pytest.mark.servers
def test_celery_sets_a_limit_that_a_quorum_queue_refuses(rabbit: RabbitServer, quorum_queue: str) -> None:
    """If this fails, and not for a server of version 4: then delete `RabbitMends` from workerkit/broker.py."""
    with pytest.raises(AMQPNotImplementedError, match="does not support global qos"):
        consume(Celery("stock", broker=rabbit.url, set_as_current=False), quorum_queue)


@pytest.mark.slow
@pytest.mark.servers
def test_a_queue_is_taken_as_the_api_has_made_it(rabbit: RabbitServer, quorum_queue: str) -> None:
    with JobConnection(rabbit.url) as connection:
        assert queue_of_ours(ExistingQueue)(connection.default_channel).declare() == quorum_queue


@pytest.mark.slow
@pytest.mark.servers
def test_kombu_refuses_a_queue_that_was_made_with_other_arguments(rabbit: RabbitServer, quorum_queue: str) -> None:
    """If this fails: then delete `ExistingQueue` from workerkit/broker.py."""
    with Connection(rabbit.url) as connection, pytest.raises(PreconditionFailed):
        queue_of_ours(Queue)(connection.default_channel).declare()


@pytest.mark.slow
@pytest.mark.servers
def test_a_queue_that_is_not_there_is_made_without_an_exchange(rabbit: RabbitServer) -> None:
    with JobConnection(rabbit.url) as connection:
        channel: Any = connection.default_channel
        ExistingQueue("new", Exchange("new"), "new")(channel).declare()
        assert channel.queue_declare("new", passive=True).message_count == 0
        with pytest.raises(NotFound):
            channel.exchange_declare("new", "direct", passive=True)


@pytest.mark.slow
@pytest.mark.servers
def test_a_message_in_a_waiting_queue_goes_to_its_queue_in_the_end(rabbit: RabbitServer) -> None:
    with JobConnection(rabbit.url) as connection:
        with connection.SimpleQueue("jobs") as jobs, connection.Producer() as producer:
            waiting = waiting_queue("jobs", 0)
            producer.publish("due at once", routing_key=waiting.name, declare=[waiting])
            assert jobs.get(timeout=10).payload == "due at once"


def test_a_waiting_queue_ends_by_itself_when_nothing_has_used_it() -> None:
    queue = waiting_queue("jobs", 45)
    arguments = queue.queue_arguments or {}
    assert queue.name == "jobs.waiting-45s"
    assert (arguments["x-message-ttl"], arguments["x-expires"]) == (45_000, 105_000)


# ── what RabbitMQ refuses ────────────────────────────────────────────────────────────────────────────────────────


def amqp_error(code: int, text: str, method: str = "") -> Exception:
    """An error as the client makes it of RabbitMQ's answer to a method."""
    error = error_for_code(code, text, (0, 0), ChannelError)
    error.method_name = method
    return cast(Exception, error)


LASTING = (
    ("a wrong password", 403, "ACCESS_REFUSED - Login was refused using PLAIN.", "", "correct user and password"),
    (
        "a missing right",
        403,
        "ACCESS_REFUSED - access to queue 'q' refused",
        "Queue.declare",
        "give its user the rights",
    ),
    ("no such virtual host", 530, "NOT_ALLOWED - vhost x not found", "Connection.open", "correct the virtual host"),
    ("another queue", 406, "PRECONDITION_FAILED - inequivalent arg", "Queue.declare", "delete it in RabbitMQ"),
    ("another exchange", 406, "PRECONDITION_FAILED - inequivalent arg", "Exchange.declare", "delete it in RabbitMQ"),
    ("another's queue", 405, "RESOURCE_LOCKED - cannot obtain exclusive access", "Queue.declare", "delete it"),
)
PASSING = (
    ("a node of the cluster is down", 404, "NOT_FOUND - home node is down or inaccessible", "Queue.declare"),
    ("RabbitMQ stops", 320, "CONNECTION_FORCED - broker forced connection closure", ""),
    ("a virtual host starts", 541, "INTERNAL_ERROR - vhost '/' is down", "Connection.open"),
    ("too many connections", 530, "NOT_ALLOWED - connection limit (9) is reached", "Connection.open"),
    ("a message was held too long", 406, "PRECONDITION_FAILED - delivery acknowledgement timed out", ""),
    ("a second ack", 406, "PRECONDITION_FAILED - unknown delivery tag 1", "Basic.ack"),
)


class Starting(JobConsumer):
    """A consumer that hasn't consumed yet, without anything that Celery would set up."""

    def __init__(self) -> None:
        self._heartbeat = cast(Heartbeat, SimpleNamespace(beat=lambda: None))


@table("code, text, method, advice", *LASTING)
def test_a_worker_that_is_refused_ends_at_its_start(
    caplog: pytest.LogCaptureFixture, code: int, text: str, method: str, advice: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        Starting().on_connection_error_after_connected(amqp_error(code, text, method))
    assert ended.value.code == 2
    [line] = caplog.messages
    assert line.startswith(f'The worker can\'t start: RabbitMQ says "{text.rstrip(".")}": {advice}')


@table("code, text, method", *PASSING)
def test_what_may_soon_be_over_is_no_refusal(code: int, text: str, method: str) -> None:
    assert refusal_of(amqp_error(code, text, method)) is None
    assert refusal_of(ConnectionRefusedError()) is None


def test_a_worker_that_has_consumed_goes_on_trying(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker, "REFUSED_PAUSE_S", 0.0)
    monkeypatch.setattr(Consumer, "on_connection_error_before_connected", lambda *_: None)
    monkeypatch.setattr(JobConsumer, "refused_log", RepeatedFaultLog("refused"))
    consumer = Starting()
    consumer._has_consumed = True
    for _ in range(3):
        consumer.on_connection_error_before_connected(amqp_error(403, "ACCESS_REFUSED - Login was refused"))
    assert caplog.messages == [
        "refused: ACCESS_REFUSED - Login was refused: correct user and password in CELERY_BROKER_URL "
        "(repeats are logged once a minute)"
    ]


@pytest.mark.slow
@pytest.mark.servers
def test_a_length_that_rabbitmq_does_not_tell_is_not_zero(rabbit: RabbitServer) -> None:
    app = Celery("ours", broker=rabbit.url.replace("guest:guest", "guest:wrong"), amqp=JobAMQP, set_as_current=False)
    with pytest.raises(AccessRefused):
        Broker(app, "jobs", TASK_NAME).queue_length()


# ── the queue ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_empty_queue_has_no_length_even_where_it_doesnt_exist(light_runtime: Runtime) -> None:
    assert light_runtime.broker.queue_length() == 0


def test_a_message_that_is_sent_waits_in_the_queue_with_its_limits(light_runtime: Runtime) -> None:
    light_runtime.broker.send("id", time_limit=20, soft_time_limit=10)
    assert light_runtime.broker.queue_length() == 1
    [message] = queued(light_runtime)
    assert (message["args"], message["timelimit"]) == (["id", {"job_id": "id"}], [20, 10])


def test_each_message_has_a_task_id_of_its_own(light_runtime: Runtime) -> None:
    for _ in range(2):
        light_runtime.broker.send("id")
    assert len({message["id"] for message in queued(light_runtime)}) == 2


def test_a_message_is_sent_though_the_result_backend_is_away(light_runtime: Runtime) -> None:
    url = light_runtime.settings.redis_url.get_secret_value()
    app = Celery("app", broker=url, backend=f"redis://{NOWHERE}", amqp=JobAMQP, set_as_current=False)
    Broker(app, light_runtime.settings.celery_queue_name, TASK_NAME).send("id")
    assert light_runtime.broker.queue_length() == 1


def broker_at(url: str) -> Broker:
    app = Celery("away", broker=url, amqp=JobAMQP, set_as_current=False)
    return Broker(app, "jobs", TASK_NAME, patience_s=0.2)


def fails_by_its_errors(broker: Broker) -> list[bool]:
    """Whether its calls, each in a thread of its own, raise one of the errors that it names."""
    calls: list[Callable[[], object]] = [broker.queue_length, lambda: broker.send("id")]
    with ThreadPoolExecutor() as threads:
        return [isinstance(call.exception(), broker.errors) for call in [threads.submit(call) for call in calls]]


def test_a_broker_that_is_away_raises_one_of_its_errors() -> None:
    with ThreadPoolExecutor() as threads:
        aways = [broker_at(f"{scheme}://{NOWHERE}") for scheme in ("redis", "amqp")]
        assert list(threads.map(fails_by_its_errors, aways)) == [[True, True], [True, True]]


@pytest.mark.servers
def test_a_broker_that_hangs_is_given_up_after_the_patience() -> None:
    with RedisServer() as server:
        hanging = broker_at(server.url)
        server.pause()
        assert fails_by_its_errors(hanging) == [True, True]


# ── consumer ─────────────────────────────────────────────────────────────────────────────────────────────────────


def return_done() -> str:
    return "done"


@contextlib.contextmanager
def consumer_of(path: str, backend: str) -> Iterator[Any]:
    """A consumer of a worker that isn't started, which knows the task `known`.

    To make a worker tells Celery that this process is one, in which waiting for a result is an error. That is undone.
    """
    app = Celery("worker", broker="memory://", backend=backend, set_as_current=False)
    app.conf.worker_consumer = path
    app.task(name="known", shared=False)(return_done)
    options = {"without_gossip": True, "without_mingle": True, "without_heartbeat": True}
    controller: Any = app.WorkController(pool="threads", hostname="worker@host", **options)
    controller.consumer.update_strategies()
    yield controller.consumer
    reset_worker_optimizations(app)
    will_block: Any = celery_state
    will_block._set_task_join_will_block(False)


@pytest.fixture
def stock_consumer(fake_redis_url: str) -> Iterator[Any]:
    with consumer_of("celery.worker.consumer:Consumer", fake_redis_url) as consumer:
        yield consumer


@pytest.fixture
def consumer(fake_redis_url: str) -> Iterator[Any]:
    with consumer_of("workerkit.broker:JobConsumer", fake_redis_url) as consumer:
        yield consumer


def deliver_to(consumer: Any, headers: Mapping[str, object], body: object, serializer: str = "json") -> Any:
    """Hands a message to the consumer as its channel does, and returns it."""
    with Connection("memory://") as connection, connection.SimpleQueue("poisoned") as queue:
        queue.put(body, headers=dict(headers), serializer=serializer)
        message = queue.queue.get()
        consumer.create_task_handler()(message)
        return message


ANY_BODY: list[object] = [[], {}, {}]
KNOWN = {"task": "known", "id": "id"}
Poison = tuple[str, Mapping[str, object], object, str]
POISON: tuple[Poison, ...] = (
    ("a task that is a list", {"task": ["known"], "id": "id"}, ANY_BODY, "isn't known here: ?"),
    ("an unknown task without an id", {"task": "nope", "id": None}, ANY_BODY, "isn't known here: nope"),
    ("an id that is a list", {"task": "known", "id": ["id"]}, ANY_BODY, "aren't text"),
    ("no body", KNOWN, None, "isn't [args, kwargs, options]"),
    ("a body that is text", KNOWN, SECRET, "isn't [args, kwargs, options]"),
    ("a body that is an object", KNOWN, {}, "isn't [args, kwargs, options]"),
    ("protocol 1 without an id", {}, {"task": "known"}, "aren't text"),
    ("protocol 1 with a list for a task", {}, {"task": ["known"]}, "isn't known here: ?"),
)
MORE_POISON: tuple[Poison, ...] = (
    ("an unknown task", {"task": "nope", "id": "id"}, ANY_BODY, "isn't known here: nope"),
    ("stamps that are text", {**KNOWN, "stamped_headers": "x"}, ANY_BODY, "aren't text"),
    ("arguments that are an object", KNOWN, [{}, {}, {}], "isn't [args, kwargs, options]"),
    ("a fourth part", KNOWN, [[], {}, {}, {}], "isn't [args, kwargs, options]"),
    ("protocol 1 that is a number", {}, 7, "that can't be read (TypeError)"),
)


@table("headers, body, fault", *POISON, *MORE_POISON)
def test_a_message_of_a_wrong_form_is_dropped_with_a_line(
    consumer: Any, caplog: pytest.LogCaptureFixture, headers: Mapping[str, object], body: object, fault: str
) -> None:
    message = deliver_to(consumer, headers, body)
    assert message.acknowledged
    [line] = caplog.messages
    assert line.startswith("dropped a message ")
    assert fault in line
    assert SECRET not in line


@table("headers, body", *(row[:3] for row in POISON))
def test_celery_ends_its_consumer_on_a_message_of_a_wrong_form(
    stock_consumer: Any, headers: Mapping[str, object], body: object
) -> None:
    """If this fails for all rows: then delete `create_task_handler` of `JobConsumer` from workerkit/broker.py."""
    with pytest.raises((TypeError, ValueError, KeyError)):
        deliver_to(stock_consumer, headers, body)


def test_a_message_that_isnt_json_is_dropped_with_a_line(consumer: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert deliver_to(consumer, KNOWN, SECRET, serializer="pickle").acknowledged
    assert "dropped a message that can't be read (ContentDisallowed)" in caplog.text
    assert SECRET not in caplog.text


def test_a_message_of_the_right_form_is_taken(consumer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(consumer, "on_task_request", taken.append)
    consumer.update_strategies()
    deliver_to(consumer, KNOWN, [["argument"], {}, {}])
    assert [(request.name, request.id) for request in taken] == [("known", "id")]


@table(
    "value, is_safe",
    ("text", "5f0e-id", True),
    ("no text", 7, False),
    ("empty", "", False),
    ("a line end", "id\nERROR forged", False),
    ("longer than any key", "x" * 201, False),
)
def test_an_id_is_safe_where_it_can_be_part_of_a_key_and_of_a_line(value: object, is_safe: bool) -> None:
    assert is_safe_id(value) is is_safe


class Events:
    """Stands in for the event loop and the dispatcher of events: keeps what is planned and counts what is sent."""

    def __init__(self) -> None:
        self.planned: list[float] = []
        self.flushes = 0
        self._outbound_buffer: list[object] = []

    def call_soon(self, call: Callable[[], None]) -> None:
        call()

    def call_later(self, wait_s: float, _call: Callable[[], None]) -> None:
        self.planned.append(wait_s)

    def flush(self, errors: bool = True) -> None:
        self.flushes += 1


@pytest.fixture
def events(consumer: Any, monkeypatch: pytest.MonkeyPatch) -> Events:
    events = Events()
    monkeypatch.setattr(consumer, "hub", events)
    monkeypatch.setattr(consumer, "event_dispatcher", events)
    return events


def test_the_events_of_one_moment_are_sent_together(consumer: Any, events: Events) -> None:
    for _ in range(3):
        consumer.on_send_event_buffered()
    assert (events.planned, events.flushes) == ([broker.EVENTS_BATCH_S], 0)


def test_the_events_of_the_next_moment_are_sent_after_it(consumer: Any, events: Events) -> None:
    consumer.on_send_event_buffered()
    consumer._flush_at -= broker.EVENTS_BATCH_S
    consumer.on_send_event_buffered()
    assert len(events.planned) == 2


def test_events_are_sent_at_once_when_the_worker_ends(
    consumer: Any, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_state, "should_stop", 0)
    consumer.on_send_event_buffered()
    assert (events.planned, events.flushes) == ([], 1)


def test_events_that_a_broker_refused_are_not_tried_again_when_the_worker_ends(consumer: Any, events: Events) -> None:
    events._outbound_buffer.append("left by a failure")
    consumer.stop()
    assert events.flushes == 0


# ── results ──────────────────────────────────────────────────────────────────────────────────────────────────────


def finish_a_task(backend: str) -> Any:
    """Runs a task as a worker does, up to the storage of its result. Returns what Celery takes for its outcome."""
    app = Celery("results", broker="memory://", backend=backend, set_as_current=False)
    app.conf.result_backend_transport_options = {"retry_policy": {"timeout": 0.1}}
    task = app.task(name="job", shared=False)(return_done)
    try:
        trace: Any = build_tracer
        return trace("job", task, app=app)("task-id", (), {}, {"id": "task-id"})
    finally:
        app.backend.client.close()  # type: ignore[attr-defined]
        app.close()


def ours(url: str) -> str:
    return f"workerkit.broker.ResultBackend+{url}"


@pytest.fixture
def result_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ResultBackend, "log", RepeatedFaultLog("results can't be stored"))


@pytest.mark.servers
@in_each_fault
@pytest.mark.usefixtures("result_log")
def test_a_task_succeeds_though_redis_refuses_its_result(
    own_redis: RedisServer, client: redis.Redis, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    with fault(client):
        outcome = finish_a_task(ours(own_redis.url))
    assert (outcome.retval, outcome.info) == ("done", None)
    assert "results can't be stored" in caplog.text


@pytest.mark.servers
@in_each_fault
def test_celery_breaks_off_a_task_that_succeeded_when_redis_refuses_its_result(
    own_redis: RedisServer, client: redis.Redis, fault: Fault
) -> None:
    """If this fails: then delete `store_result` of `ResultBackend` from workerkit/broker.py."""
    with fault(client), pytest.raises(redis.ResponseError), pytest.warns(RuntimeWarning, match="Exception raised"):
        finish_a_task(own_redis.url)


@pytest.mark.usefixtures("result_log")
def test_a_result_is_let_go_when_redis_is_away(caplog: pytest.LogCaptureFixture) -> None:
    assert finish_a_task(ours(f"redis://{NOWHERE}")).info is None
    assert "results can't be stored: ConnectionError" in caplog.text


@pytest.mark.usefixtures("result_log")
def test_the_end_of_a_fault_of_the_results_is_logged(fake_redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "worker")
    ResultBackend.log.fault("away")
    finish_a_task(ours(fake_redis_url))
    assert caplog.messages[-1] == "results can't be stored: over"


def reads_of(client: redis.Redis, backend: str) -> int:
    """How many keys a backend reads when it stores a success."""
    client.config_resetstat()
    finish_a_task(backend)
    assert client.exists("celery-task-meta-task-id")
    counts: Any = client.info("commandstats")
    return int(counts.get("cmdstat_get", {}).get("calls", 0))


@pytest.mark.servers
def test_a_success_is_stored_without_a_read(own_redis: RedisServer, client: redis.Redis) -> None:
    assert reads_of(client, ours(own_redis.url)) == 0


@pytest.mark.servers
def test_celery_reads_before_it_stores_a_success(own_redis: RedisServer, client: redis.Redis) -> None:
    """If this fails: then delete `_store_result` of `ResultBackend` from workerkit/broker.py."""
    assert reads_of(client, own_redis.url) == 1


def test_a_failure_never_replaces_a_stored_success(fake_redis_url: str) -> None:
    app = Celery("results", broker="memory://", backend=ours(fake_redis_url), set_as_current=False)
    app.backend.store_result("task-id", "done", states.SUCCESS)
    app.backend.store_result("task-id", ValueError("late"), states.FAILURE)
    assert app.AsyncResult("task-id").state == states.SUCCESS
    app.backend.client.close()  # type: ignore[attr-defined]
    app.close()
