"""The broker (Redis, Sentinel, RabbitMQ) behind Celery: our transports, consumer and result backend, and the queue.

Celery and kombu end the worker, or lose a slot or a job, in some situations that operators meet. Each mend is a
subclass that only our own app uses, so nothing changes for other apps in the same process. For each,
tests/test_broker.py has a test that fails once a newer version of Celery or kombu doesn't need it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import redis
from amqp.exceptions import NotFound
from celery import states
from celery.app.amqp import AMQP
from celery.backends.redis import RedisBackend
from celery.worker import state as worker_state
from celery.worker.consumer import Consumer
from kombu import Connection, Queue
from kombu.connection import ConnectionPool, PooledConnection
from kombu.exceptions import OperationalError
from kombu.transport import pyamqp
from kombu.transport import redis as kombu_redis
from kombu.transport.virtual import QoS as VirtualQoS
from kombu.utils.collections import HashedSeq
from redis.backoff import NoBackoff
from redis.retry import Retry

from workerkit.errors import Document
from workerkit.logs import RepeatedFaultLog, logger
from workerkit.redis_urls import TIMEOUTS, RedisTarget
from workerkit.settings import Settings

if TYPE_CHECKING:
    from celery import Celery

REDIS_TIMEOUTS = {"socket_connect_timeout": 5, "socket_timeout": 10, "health_check_interval": 25}
# A RabbitMQ that is out of memory stops reading from its publishers, and reports this only later.
RABBITMQ_TIMEOUTS = {"read_timeout": 5, "write_timeout": 5}


def transport_options(settings: Settings) -> Document:
    """The options of the broker's client. Without time-outs a broker that hangs would hold everything up."""
    if settings.is_rabbitmq:
        return RABBITMQ_TIMEOUTS
    # A message that runs longer than this is delivered again and would run twice at a time. So it is long, and lost
    # jobs are found by their leases.
    options = {"visibility_timeout": max(3600, 2 * settings.celery_time_limit)}
    if settings.sentinel_master:
        return {**options, **REDIS_TIMEOUTS, "master_name": settings.sentinel_master}
    return {**options, **settings.broker_target.kombu_options(REDIS_TIMEOUTS)}


# ── transports ───────────────────────────────────────────────────────────────────────────────────────────────────


class RedisQoS(kombu_redis.QoS):
    """Redis' list of unacknowledged messages, also while Redis is full, read-only or hangs.

    kombu (5.7) ends the worker when `append` fails, and never frees the message's slot when `ack` or `reject` fails.
    A message that isn't on the list is still safe: its job is found again by its document.
    """

    log = RepeatedFaultLog("Redis' list of unacknowledged messages can't be written")

    def append(self, message: Any, delivery_tag: str) -> None:
        try:
            super().append(message, delivery_tag)
        except redis.ResponseError as error:  # the message is no longer in the queue, so it has to be taken
            self.log.fault(type(error).__name__)
            VirtualQoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        try:
            super().ack(delivery_tag)
        except redis.RedisError as error:
            self.log.fault(type(error).__name__)
            VirtualQoS.ack(self, delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        try:
            super().reject(delivery_tag, requeue=requeue)
        except redis.RedisError as error:
            self.log.fault(type(error).__name__)
            VirtualQoS.ack(self, delivery_tag)

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        with contextlib.suppress(redis.ResponseError):
            super().restore_visible(*args, **kwargs)


class RedisMends:
    """What our channels do differently from kombu's, on Redis and on Sentinel alike."""

    QoS = RedisQoS
    pool: Any
    connection: Any
    connection_class: Any
    _kept_client: Any = None

    def _connparams(self, asynchronous: bool = False) -> Document:
        """The arguments of a connection: kombu's, and those that `RedisTarget.kombu_options` adds."""
        options = self.connection.client.transport_options.get("connection", {})
        if "path" in options:
            self.connection_class = redis.UnixDomainSocketConnection
        arguments: Document = super()._connparams(asynchronous)  # type: ignore[misc]
        unfit = {"host", "port", "socket_keepalive", "socket_keepalive_options"} if "path" in options else set()
        return {**{name: value for name, value in arguments.items() if name not in unfit}, **options}

    def _create_client(self, asynchronous: bool = False) -> Any:
        """The channel's client, made once for its pool. kombu (5.7) makes one for each command, at a great cost."""
        create: Callable[..., Any] = super()._create_client  # type: ignore[misc]
        if asynchronous:  # each of these has a connection of its own
            return create(asynchronous=True)
        if self._kept_client is None or self._kept_client.connection_pool is not self.pool:
            self._kept_client = create()
        return self._kept_client

    def close(self) -> None:
        """Closes the channel, also when its Redis is gone.

        kombu (5.7) stops half-way when the answer that it still waits for fails. Later it comes back to a channel that
        has lost its connection's address, and the AttributeError ends the worker. This happens whenever Redis dies
        while a job runs and a slot is free.
        """
        close: Callable[[], None] = super().close  # type: ignore[misc]
        try:
            close()
        except (redis.RedisError, OSError):
            close()  # now it waits for no answer, and where it had closed already it does nothing


class RedisChannel(RedisMends, kombu_redis.Channel):  # type: ignore[misc]
    pass


class RedisTransport(kombu_redis.Transport):
    Channel = RedisChannel


class SentinelChannel(RedisMends, kombu_redis.SentinelChannel):  # type: ignore[misc]
    pass


class SentinelTransport(kombu_redis.SentinelTransport):
    Channel = SentinelChannel


class RabbitMends:
    """Limits unacknowledged messages per consumer, which every queue allows.

    On RabbitMQ 3 kombu (5.7) limits them per channel, which quorum queues refuse.
    """

    def qos_semantics_matches_spec(self, connection: Any) -> bool:
        return True


class RabbitTransport(RabbitMends, pyamqp.Transport):
    pass


class RabbitTlsTransport(RabbitMends, pyamqp.SSLTransport):
    pass


TRANSPORTS: Mapping[str, type] = {
    "redis": RedisTransport,
    "rediss": RedisTransport,
    "sentinel": SentinelTransport,
    "amqp": RabbitTransport,
    "amqps": RabbitTlsTransport,
}


class JobConnection(Connection):
    """A connection that uses our transports. Its clones and its pools do so as well."""

    transport_cls: Any

    def get_transport_cls(self) -> Any:
        return TRANSPORTS.get(self.transport_cls) or super().get_transport_cls()

    def as_uri(self, *args: Any, **kwargs: Any) -> str:
        """The address for the log. That of a Unix socket is its path, and Celery would show it as a host."""
        path = (self.transport_options or {}).get("connection", {}).get("path")
        return f"unix://{path}" if path else super().as_uri(*args, **kwargs)

    def Pool(self, limit: Any = None, **_: Any) -> ConnectionPool:
        return JobConnectionPool(self, limit)

    def __eqhash__(self) -> Any:
        """kombu shares a pool among equal connections of a process. One of another app is never equal to ours."""
        return HashedSeq(JobConnection, *super().__eqhash__())


class PooledJobConnection(PooledConnection, JobConnection):  # type: ignore[misc]
    pass


class JobConnectionPool(ConnectionPool):
    connection: Any

    def new(self) -> Any:
        return PooledJobConnection(self, **dict(self.connection._info(resolve=False)))


class JobAMQP(AMQP):
    """What our Celery app makes its connections with."""

    Connection = JobConnection


# ── queue ────────────────────────────────────────────────────────────────────────────────────────────────────────

WAITING_QUEUE_KEPT_S = 60


class ExistingQueue(Queue):
    """A queue on RabbitMQ, which is taken as it is if it exists. The API may have made it a quorum queue, say."""

    def declare(self, nowait: bool = False, channel: Any = None) -> str:
        own: Any = channel or self.channel
        try:
            with own.connection.channel() as another:  # a refusal closes the channel that it comes on
                self.queue_declare(passive=True, channel=another)
        except NotFound:
            super().declare(nowait, channel)
        return str(self.name)


def waiting_queue(name: str, wait_s: int) -> Queue:
    """A queue of RabbitMQ's in which messages wait before they go to the named queue.

    Messages that waited in a worker's memory instead would each hold a slot. It is deleted when nothing has used it
    for a minute longer than the wait.
    """
    back = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": name}
    times = {"x-message-ttl": wait_s * 1000, "x-expires": (wait_s + WAITING_QUEUE_KEPT_S) * 1000}
    return Queue(f"{name}.waiting-{wait_s}s", queue_arguments={**back, **times})


class Broker:
    """What the worker itself asks of the broker: the length of the queue, and to take a message.

    It gives up after `patience_s` seconds, so that a broker that hangs doesn't keep the keeper from renewing leases.
    """

    def __init__(self, app: Celery, queue: str, patience_s: float = 2.0) -> None:
        self._app, self._queue, self._patience_s = app, queue, patience_s

    @property
    def errors(self) -> tuple[type[BaseException], ...]:
        """What the other methods raise when the broker can't be reached; each transport has exceptions of its own."""
        connection = self._app.connection_for_write()
        unconfirmed = connection.recoverable_connection_errors
        return (OperationalError, OSError, *connection.connection_errors, *connection.channel_errors, *unconfirmed)

    @contextlib.contextmanager
    def connection(self) -> Iterator[Any]:
        """A connection of its own. Publishing waits for RabbitMQ's confirmation."""
        connection = self._app.connection_for_write(connect_timeout=self._patience_s)
        given = connection.transport_options or {}
        of_redis = {name: min(self._patience_s, given.get(name, self._patience_s)) for name in TIMEOUTS}
        of_rabbitmq = {**dict.fromkeys(("read_timeout", "write_timeout"), self._patience_s), "confirm_publish": True}
        connection.transport_options = {**given, **of_redis, **of_rabbitmq}
        try:
            yield connection
        except BaseException:
            connection.collect()  # an orderly close would wait for the broker once more
            raise
        connection.release()

    def queue_length(self) -> int:
        """Messages that no worker has taken yet. Redis keeps no empty lists, so a missing queue is an empty one."""
        with self.connection() as connection:
            try:
                return int(connection.default_channel.queue_declare(self._queue, passive=True).message_count)
            except connection.channel_errors:
                return 0

    def send(self, task_name: str, args: tuple[Any, ...], **options: Any) -> None:
        """Puts a message into the queue under a new task id. No client has this id, so no result is prepared for it."""
        with self.connection() as connection:
            options |= {"queue": self._queue, "retry": False, "ignore_result": True}
            self._app.send_task(task_name, args=args, connection=connection, **options)


# ── consumer ─────────────────────────────────────────────────────────────────────────────────────────────────────

EVENTS_BATCH_S = 0.05
MAX_TASK_ID_CHARACTERS = 200


def is_safe_id(value: object) -> bool:
    """Whether a value can be a part of a Redis key, and stand in a log line."""
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= MAX_TASK_ID_CHARACTERS


def fault_of(message: Any, tasks: Mapping[str, Any]) -> str:
    """What is wrong with a message's form (Celery's protocol 1 or 2), or an empty string.

    `tasks` are those that the worker knows, by name. Raises whatever a decoder raises.
    """
    headers, body = message.headers, message.payload
    is_first_protocol = "task" not in headers
    name = body["task"] if is_first_protocol else headers["task"]
    if not isinstance(name, str) or name not in tasks:
        return f"whose task isn't known here: {name if isinstance(name, str) else '?'}"
    task_id, stamps = (body if is_first_protocol else headers).get("id"), headers.get("stamped_headers") or []
    if not is_safe_id(task_id) or not isinstance(stamps, list) or not all(map(is_safe_id, stamps)):
        return "whose id or stamps aren't text"
    parts = [body.get("args"), body.get("kwargs"), None] if is_first_protocol else body
    if not isinstance(parts, list) or list(map(type, parts[:2])) != [list, dict] or len(parts) != 3:
        return "whose body isn't [args, kwargs, options]"
    return ""


class JobConsumer(Consumer):
    """Celery's consumer, with a check in front of it and with events in batches.

    Celery (5.7) ends its consumer, at each start again, on a message whose task isn't text, or whose task is unknown
    and whose id isn't text. Sent one by one, events take half of the parent's time.
    """

    hub: Any
    event_dispatcher: Any
    strategies: Any
    _flush_events: Callable[[], None]
    _flush_at = 0.0

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        take: Callable[[Any], Any] = super().create_task_handler(*args, **kwargs)

        def check_and_take(message: Any) -> Any:
            try:
                fault = fault_of(message, self.strategies)
            except Exception as error:  # whatever a message holds must not end the consumer
                return self.on_decode_error(message, error)
            return self._drop(message, fault) if fault else take(message)

        return check_and_take

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self._drop(message, f"that can't be read ({type(exc).__name__})")

    def _drop(self, message: Any, fault: str) -> None:
        logger.error("dropped a message %.140s", fault)
        message.reject_log_error(logger, self.connection_errors)  # type: ignore[attr-defined]

    def on_send_event_buffered(self) -> None:  # type: ignore[override]
        """Called for each event, from any thread of the pool."""
        if self.hub:
            self.hub.call_soon(self._flush_soon if worker_state.should_stop is None else self._flush_now)

    def _flush_soon(self) -> None:
        """Plans one flush for all events of the next moment. A time is kept since a reconnection drops timers."""
        now = time.monotonic()
        if now >= self._flush_at:
            self._flush_at = now + EVENTS_BATCH_S
            self.hub.call_later(EVENTS_BATCH_S, self._flush_events)

    def _flush_now(self) -> None:
        """Sends what is left when the worker ends. Where a broker hangs, one try is enough."""
        if self.event_dispatcher and not self.event_dispatcher._outbound_buffer:
            self.event_dispatcher.flush(errors=False)

    def stop(self) -> None:
        self._flush_now()
        super().stop()


# ── results ──────────────────────────────────────────────────────────────────────────────────────────────────────


class ResultBackend(RedisBackend):
    """Celery's results in Redis. A result that can't be stored is let go, since the job's document has it all.

    With Celery's own (5.7) an error here leaves the message unacknowledged and its slot lost, or fails a job that is
    completed.
    """

    log = RepeatedFaultLog("Celery's results can't be stored")

    connparams: Document
    _get_result_meta: Callable[..., Document]
    _set_with_state: Callable[..., None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.connparams["retry"] = Retry(NoBackoff(), 0)

    def _params_from_url(self, url: str, defaults: Document) -> Document:
        """The arguments of a connection, by the same rules as the worker's own. Celery's differ from redis-py's."""
        kept = ("max_connections", "retry_on_timeout", "client_name", *TIMEOUTS)
        return RedisTarget.parse(url).connection({name: defaults[name] for name in kept if defaults.get(name)})

    def store_result(self, task_id: str, result: Any, state: str, *args: Any, **kwargs: Any) -> Any:
        try:
            stored = super().store_result(task_id, result, state, *args, **kwargs)
        except (redis.RedisError, OSError) as error:
            self.log.fault(type(error).__name__)
            return result
        self.log.over()
        return stored

    def _store_result(self, task_id: str, result: Any, state: str, *args: Any, **kwargs: Any) -> Any:
        """Spares a read. Celery reads first, so that nothing replaces a success; but a success may be replaced."""
        if state != states.SUCCESS:
            return super()._store_result(task_id, result, state, *args, **kwargs)  # type: ignore[misc]
        meta = self._get_result_meta(result, state, *args, **kwargs)
        self._set_with_state(self.get_key_for_task(task_id), self.encode({**meta, "task_id": task_id}), state)
        return result
