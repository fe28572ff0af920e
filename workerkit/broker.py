"""The broker (Redis, Sentinel, RabbitMQ) behind Celery: our transports, consumer and result backend, and the queue.

Celery and kombu end the worker, or lose a slot or a job, in some situations that operators meet. Each mend is a
subclass that only our own app uses, so nothing changes for other apps in the same process. For each,
tests/test_broker.py or tests/test_redis_rights.py has a test that fails once a newer version of Celery or kombu doesn't
need it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import redis
from amqp.exceptions import AccessRefused, AMQPError, NotAllowed, NotFound, PreconditionFailed, ResourceLocked
from amqp.protocol import queue_declare_ok_t
from celery import states
from celery.app.amqp import AMQP
from celery.backends.redis import RedisBackend
from celery.concurrency.solo import TaskPool as SoloPool
from celery.worker import state as worker_state
from celery.worker.consumer import Consumer
from celery.worker.request import Request
from kombu import Connection, Queue
from kombu.connection import ConnectionPool, PooledConnection
from kombu.exceptions import ChannelError, OperationalError
from kombu.transport import pyamqp
from kombu.transport import redis as kombu_redis
from kombu.transport.virtual import QoS as VirtualQoS
from kombu.utils.collections import HashedSeq
from redis.backoff import NoBackoff
from redis.exceptions import LockNotOwnedError, NoPermissionError
from redis.lock import Lock
from redis.retry import Retry

from workerkit.errors import Document
from workerkit.logs import RepeatedFaultLog, logger
from workerkit.messages import JOB_ID, own_arguments
from workerkit.process import PARENT, Heartbeat
from workerkit.redis_urls import TIMEOUTS, RedisTarget
from workerkit.settings import EXIT_BAD_SETTINGS, Settings

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


# ── rights ───────────────────────────────────────────────────────────────────────────────────────────────────────

Answer = TypeVar("Answer")
ADVICE = "`python worker.py check` names the right that is missing"
# What Redis says if an operator has renamed a command away. redis-py sends the EXEC of a refused MULTI all the same.
MISSING = ("unknown command", "unknown subcommand", "EXEC without MULTI")


def is_refused(error: BaseException | None) -> bool:
    """Whether Redis refuses a command, a key or a channel to this user, or doesn't have the command."""
    if isinstance(error, NoPermissionError):
        return True
    return isinstance(error, redis.ResponseError) and any(text in str(error) for text in MISSING)


def refusal(error: BaseException) -> str:
    """What Redis says about a command that it refuses, without the command's arguments, which may hold a prompt."""
    return str(error).rpartition("caused error: ")[2].partition(", with args")[0]


class Unneeded:
    """Runs what Celery asks of Redis besides taking jobs. Where Redis refuses it, the worker goes on without it.

    An error would close the worker's connection. Celery would connect again, meet the same refusal and take no job.
    """

    def __init__(self, what: str) -> None:
        self._log = RepeatedFaultLog(f"Redis refuses {what}")

    def run(self, call: Callable[[], Answer], otherwise: Answer) -> Answer:
        try:
            return call()
        except redis.ResponseError as error:
            if not is_refused(error):
                raise
            self._log.fault(f"{refusal(error)}; {ADVICE}")
        return otherwise


DECLARING = Unneeded("to tell a queue's length")
PUBLISHING = Unneeded("Celery's events")
LISTENING = Unneeded("Celery's remote control (inspect, revoke)")
SWEEPING = Unneeded("to delete what clients that are gone have left")


class ScriptlessLock(Lock):
    """redis-py's lock without its Lua scripts, since some servers have no EVALSHA or refuse it."""

    def register_scripts(self) -> None:
        """Does nothing: this lock is only taken and released."""

    def do_release(self, expected_token: Any) -> None:
        def release(pipe: Any) -> None:
            if pipe.get(self.name) != expected_token:
                raise LockNotOwnedError("the lock has expired", lock_name=self.name)
            pipe.multi()
            pipe.delete(self.name)

        self.redis.transaction(release, self.name)


class ScriptlessRedis(redis.Redis):
    """A client whose locks need no Lua scripts."""

    def lock(self, *args: Any, **kwargs: Any) -> Any:
        return super().lock(*args, **{**kwargs, "lock_class": ScriptlessLock})


# ── transports ───────────────────────────────────────────────────────────────────────────────────────────────────


class RedisQoS(kombu_redis.QoS):
    """Redis' list of unacknowledged messages, also while Redis is full, read-only or hangs.

    kombu (5.7) ends the worker when `append` fails, and never frees the message's slot when `ack` or `reject` fails.
    A message that isn't on the list is still safe: its job is found again by its document.
    """

    log = RepeatedFaultLog("Redis' list of unacknowledged messages can't be written")
    restore_log = RepeatedFaultLog("messages that killed workers hadn't acknowledged can't be put back into the queue")
    _delivered: Any

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
            self._let_go(delivery_tag, error)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        try:
            super().reject(delivery_tag, requeue=requeue)
        except redis.RedisError as error:
            self._let_go(delivery_tag, error)

    def _let_go(self, delivery_tag: str, error: redis.RedisError) -> None:
        self.log.fault(type(error).__name__)
        VirtualQoS.ack(self, delivery_tag)
        connection = getattr(self.channel.connection, "client", None)
        if connection:  # a hundred messages in a row may have to wait for a Redis that hangs
            connection.on_failed_try()

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().restore_visible(*args, **kwargs)
        except redis.ResponseError as error:
            self.restore_log.fault(f"{refusal(error)}; {ADVICE}" if is_refused(error) else type(error).__name__)

    def restore_unacked(self, client: Any = None) -> None:
        """Puts back what this worker holds, when it ends. kombu (5.7) leaves the channel half closed on an error."""
        try:
            super().restore_unacked(client)
        except redis.ResponseError as error:
            self.log.fault(type(error).__name__)
            self._delivered.clear()


class RedisMends:
    """What our channels do differently from kombu's, on Redis and on Sentinel alike."""

    QoS = RedisQoS
    pool: Any
    keyprefix_queue: str
    keyprefix_binding_deadlines: str
    keyprefix_binding_permanent: str
    connection: Any
    connection_class: Any
    _kept_client: Any = None

    def _get_client(self) -> Any:
        client = super()._get_client()  # type: ignore[misc]
        return ScriptlessRedis if client is redis.Redis else client

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

    def queue_declare(self, queue: Any = None, passive: bool = False, **kwargs: Any) -> Any:
        """Whoever declares passively wants to know the queue's length, so a refusal is an error there."""
        declare = partial(super().queue_declare, queue, passive, **kwargs)  # type: ignore[misc]
        return declare() if passive else DECLARING.run(declare, queue_declare_ok_t(queue, 0, 0))

    def _queue_bind(self, *args: Any) -> None:
        """Celery sends to a queue by its name and to all workers over pub/sub. Neither looks the binding up."""
        LISTENING.run(partial(super()._queue_bind, *args), None)  # type: ignore[misc]

    def _delete(self, *args: Any, **kwargs: Any) -> None:
        LISTENING.run(partial(super()._delete, *args, **kwargs), None)  # type: ignore[misc]

    def _put_fanout(self, *args: Any, **kwargs: Any) -> None:
        """Celery would keep each event that is refused, without end, in the hope of sending it later."""
        PUBLISHING.run(partial(super()._put_fanout, *args, **kwargs), None)  # type: ignore[misc]

    def _receive_one(self, client: Any) -> Any:
        return LISTENING.run(partial(super()._receive_one, client), None)  # type: ignore[misc]

    def _now_ms(self) -> int:
        seconds, microseconds = self._create_client().time()
        return int(seconds) * 1000 + int(microseconds) // 1000

    def _refresh_binding(self, keys: list[str], args: list[Any], client: Any) -> None:
        """What kombu's (5.7) Lua script REFRESH_BINDING does. Neither command does harm without the other."""
        (table, deadlines), (member, exchange, expires_ms) = keys, args
        client.sadd(table, member)
        client.zadd(deadlines, {exchange: self._now_ms() + expires_ms}, gt=True)

    def _refresh_bindings(self, queues: list[str]) -> None:
        LISTENING.run(partial(super()._refresh_bindings, queues), None)  # type: ignore[misc]

    def sweep_bindings(self, limit: int = 100) -> int:
        """What kombu's (5.7) Lua script SWEEP_BINDINGS does: it deletes tables that no client has refreshed in time."""

        def sweep(pipe: Any) -> int:
            names = pipe.zrange(deadlines, "-inf", self._now_ms(), byscore=True, offset=0, num=limit)
            overdue = [name.decode() for name in names]
            permanent = {name: self.keyprefix_binding_permanent % (name,) for name in overdue}
            if overdue:
                pipe.watch(*permanent.values())
            gone = [name for name in overdue if not pipe.exists(permanent[name])]
            pipe.multi()
            for name in gone:
                pipe.delete(self.keyprefix_queue % (name,))
            if overdue:
                pipe.zrem(deadlines, *overdue)
            return len(overdue)

        deadlines = self.keyprefix_binding_deadlines
        transaction = partial(self._create_client().transaction, sweep, deadlines, value_from_callable=True)
        return SWEEPING.run(transaction, 0)


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
    on_failed_try: Callable[[], object] = staticmethod(lambda: None)  # called for each failed try to reach the broker

    def _ensure_connection(self, errback: Callable[..., object] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Every try to connect comes through here. The event of Celery's own heartbeat is tried until it is sent."""

        def fail(error: Exception, interval: float) -> None:
            self.on_failed_try()
            if errback:
                errback(error, interval)

        return super()._ensure_connection(fail, *args, **kwargs)

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


# ── queue ────────────────────────────────────────────────────────────────────────────────────────────────────────

WAITING_QUEUE_KEPT_S = 60
NOT_FOUND = "404"  # the code of a ChannelError; kombu's is text, that of RabbitMQ a number


class ExistingQueue(Queue):
    """A queue on RabbitMQ that is taken as it is, with any arguments and whatever exchange leads to it.

    Our own messages go through RabbitMQ's default exchange, which leads to a queue by its name, and so do those of an
    API that configures no exchange. So the worker makes no exchange, whose type might be another than the API's.
    """

    def declare(self, nowait: bool = False, channel: Any = None) -> str:
        own: Any = channel or self.channel
        try:
            self._declare_apart(own, passive=True)
        except NotFound:
            self._make(own)
        return str(self.name)

    def _declare_apart(self, channel: Any, passive: bool = False) -> None:
        """Declares the queue on a channel of its own, since a refusal closes the channel that it comes on."""
        with channel.connection.channel() as another:
            self.queue_declare(passive=passive, channel=another)

    def _make(self, channel: Any) -> None:
        """Makes the queue, and binds it to the exchange of its name if there is one.

        The API has made that exchange. If the queue was deleted, the API would bind its queue again only when it
        connects the next time, and until then RabbitMQ would throw its messages away.
        """
        try:
            self._declare_apart(channel)
        except PreconditionFailed as refusal:  # perhaps the API has just made it
            try:
                return self._declare_apart(channel, passive=True)
            except NotFound:
                raise refusal from None
        try:
            with channel.connection.channel() as another:
                another.exchange_declare(self.exchange.name, "direct", passive=True)  # any type will do
        except NotFound:
            return None
        self.queue_bind(channel=channel)


def waiting_queue(name: str, wait_s: int) -> Queue:
    """A queue of RabbitMQ's in which messages wait before they go to the named queue.

    Messages that waited in a worker's memory instead would each hold a slot. It is deleted when nothing has used it
    for a minute longer than the wait.
    """
    back = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": name}
    times = {"x-message-ttl": wait_s * 1000, "x-expires": (wait_s + WAITING_QUEUE_KEPT_S) * 1000}
    return Queue(f"{name}.waiting-{wait_s}s", queue_arguments={**back, **times})


@dataclass(frozen=True)
class QueueList:
    """A list of messages: those of a queue, or those that have the same priority in it."""

    queue: str
    priority: int | None = None

    @property
    def name(self) -> str:
        return self.queue if self.priority is None else f"{self.queue}:{self.priority}"


def try_waiting_queue(name: str, channel: Any) -> None:
    """Declares a queue for waiting messages. For this RabbitMQ demands all the rights that a retry needs.

    Without one of them each retry would go round and round while it should wait. Raises AMQPError: a right is missing.
    """
    waiting_queue(name, 1)(channel).declare()


class JobAMQP(AMQP):
    """What our Celery app makes its connections and its consumer with."""

    Connection = JobConnection

    def TaskConsumer(self, channel: Any, *args: Any, **kwargs: Any) -> Any:
        consumer = super().TaskConsumer(channel, *args, **kwargs)
        for queue in consumer.queues:
            if isinstance(queue, ExistingQueue):
                try_waiting_queue(queue.name, consumer.channel)
        return consumer


@dataclass(frozen=True)
class Refusal:
    """What RabbitMQ refuses until an operator changes something, in its own words, and what to change."""

    reason: str
    advice: str


def refusal_of(error: BaseException) -> Refusal | None:
    """The refusal that an error of the broker's client stands for; None if it may be over at the next try."""
    if not isinstance(error, AMQPError):
        return None
    reason = " ".join(str(error.reply_text).split())[:300].rstrip(".")
    match error:
        case AccessRefused() if "login" in reason.lower():
            advice = "correct user and password in CELERY_BROKER_URL"
        case AccessRefused():
            advice = "give its user the rights that docs/production.md names"
        case NotAllowed() if "limit" not in reason:  # a limit on connections may soon have room again
            advice = "correct the virtual host in CELERY_BROKER_URL, or let its user in"
        case PreconditionFailed() | ResourceLocked() if error.method_name in ("Exchange.declare", "Queue.declare"):
            advice = "delete it in RabbitMQ, or choose another CELERY_QUEUE_NAME"
        case _:
            return None
    return Refusal(reason, advice)


class Broker:
    """What the worker itself asks of the broker: the length of the queue, and to take a message.

    It gives up after `patience_s` seconds, so that a broker that hangs doesn't keep the keeper from renewing leases.
    """

    PATIENCE_S = 2.0

    def __init__(self, app: Celery, queue: str, task_name: str, patience_s: float = PATIENCE_S) -> None:
        self._app, self._queue, self._task_name, self._patience_s = app, queue, task_name, patience_s

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
            connection.connect()
            yield connection
        except BaseException:
            connection.collect()  # an orderly close would wait for the broker once more
            raise
        connection.release()

    def queue_length(self) -> int:
        """Messages that no worker has taken yet. Redis keeps no empty lists, so a missing queue is an empty one."""
        with self.connection() as connection:
            return self._length(connection, self._queue)

    @staticmethod
    def _length(connection: Any, queue: str) -> int:
        try:
            return int(connection.default_channel.queue_declare(queue, passive=True).message_count)
        except (ChannelError, NotFound) as error:
            # Any other error says nothing about the length, and of an empty queue all pending jobs are sent again.
            if str(error.reply_code) != NOT_FOUND:
                raise
            return 0

    def rehearse(self) -> None:
        """Does on RabbitMQ what a worker does when it starts, but takes no message and makes no lasting queue.

        Raises:
            AMQPError: something is refused.
        """
        with self.connection() as connection:
            channel = connection.default_channel
            try_waiting_queue(self._queue, channel)
            mailbox: Any = self._app.control.mailbox  # type: ignore[attr-defined]
            mailbox.Node(f"worker-check-{self._app.oid}", channel=channel).listen().cancel()

    def lists_in_use(self, queue: str) -> list[QueueList]:
        """The lists of a queue in which messages wait: on Redis one for each priority, on RabbitMQ the queue itself."""
        with self.connection() as connection:
            channel = connection.default_channel
            if not isinstance(channel, kombu_redis.Channel):
                return [QueueList(queue)] if self._length(connection, queue) else []
            key: Any = channel._q_for_pri  # type: ignore[attr-defined]
            steps = [step for step in channel.priority_steps if channel.client.llen(key(queue, step))]
            return [QueueList(queue, step) for step in steps]

    def send(
        self,
        job_id: object,
        queue: str | None = None,
        connection: Any = None,
        *,
        data: Document | None = None,
        **options: Any,
    ) -> None:
        """Puts a message of the worker's own into a queue (by default the worker's), under a new task id.

        No client has this id, so no result is prepared for it. Many messages can share a connection.
        """
        with contextlib.nullcontext(connection) if connection else self.connection() as connection:
            options |= {"queue": queue or self._queue, "retry": False, "ignore_result": True}
            arguments = own_arguments(job_id, **data or {})
            self._app.send_task(self._task_name, args=arguments, connection=connection, **options)


# ── consumer ─────────────────────────────────────────────────────────────────────────────────────────────────────

EVENTS_BATCH_S = 0.05
REFUSED_PAUSE_S = 2.0
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
    """Celery's consumer, with a check in front of it, events in batches, signs of life, and an end to what is hopeless.

    Celery (5.7) ends its consumer, at each start again, on a message whose task isn't text, or whose task is unknown
    and whose id isn't text. Sent one by one, events take half of the parent's time. Where
    RabbitMQ refuses something, Celery asks again several times a second, since `broker_channel_error_retry` is on.

    A sign of life is given by a timer of the event loop, and by each failed try to reach the broker: Celery connects
    again outside of its loop. So only a parent that is stopped, or that hangs, is silent.
    """

    SILENT_S = 120.0  # that the parent may be silent
    SILENT_AFTER_LIMIT_S = 60.0  # that the only process of the solo pool may be silent after the limit of its job
    SILENT_AT_END_S = 3600.0  # that the parent may be silent while it waits for its last jobs
    BEAT_S = 5.0

    refused_log = RepeatedFaultLog("the broker refuses what is needed to take jobs, so none is taken")

    hub: Any
    pool: Any
    on_task_request: Callable[[Any], Any]
    event_dispatcher: Any
    strategies: Any
    _flush_events: Callable[[], None]
    _flush_at = 0.0
    _has_consumed = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._heartbeat = Heartbeat(part=PARENT, silent_s=self.SILENT_S)
        super().__init__(*args, **kwargs)
        if isinstance(self.pool, SoloPool):
            self._run_here, self.on_task_request = self.on_task_request, self._beat_and_run_here

    def start(self) -> None:
        self._heartbeat.beat()
        super().start()

    def register_with_event_loop(self, hub: Any) -> None:
        super().register_with_event_loop(hub)
        hub.call_repeatedly(self.BEAT_S, self._heartbeat.beat)  # until the connection is lost; then it is made anew

    def _beat_and_run_here(self, request: Any) -> None:
        """Runs a job in the solo pool, whose loop stands still meanwhile. The limit may be the message's own."""
        hard_s = request.time_limits[0] or 0.0
        self._heartbeat.beat(max(self.SILENT_S, hard_s + self.SILENT_AFTER_LIMIT_S))
        self._run_here(request)

    def ensure_connected(self, conn: Any) -> Any:
        conn.on_failed_try = self._heartbeat.beat
        return super().ensure_connected(conn)

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        self._heartbeat.beat()
        self._end_or_pause_if_refused(exc)
        super().on_connection_error_before_connected(exc)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        self._heartbeat.beat()
        self._end_or_pause_if_refused(exc)
        super().on_connection_error_after_connected(exc)

    def on_ready(self) -> None:
        super().on_ready()
        self._has_consumed = True

    def _end_or_pause_if_refused(self, error: Exception) -> None:
        """Says what the broker refuses, and waits a little, since Celery (5.7) would try at once. At its start it ends
        a worker that RabbitMQ refuses.

        Later on the worker has jobs to end, and what was once allowed may soon be allowed again, for example when the
        server that RabbitMQ asks for passwords is back. So it goes on trying then.

        Raises:
            SystemExit: RabbitMQ refuses, and the worker has consumed nothing yet.
        """
        refused = refusal_of(error)
        if refused and not self._has_consumed:
            logger.critical('The worker can\'t start: RabbitMQ says "%s": %s.', refused.reason, refused.advice)
            raise SystemExit(EXIT_BAD_SETTINGS)
        if refused or is_refused(error):
            self.refused_log.fault(f"{refused.reason}: {refused.advice}" if refused else f"{refusal(error)}; {ADVICE}")
            time.sleep(REFUSED_PAUSE_S)

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
        self._heartbeat.beat(self.SILENT_AT_END_S)
        self._flush_now()
        super().stop()

    def shutdown(self) -> None:
        """Called when the pool has ended."""
        super().shutdown()
        self._heartbeat.stop()


def child_pids(pool: Any) -> list[int]:
    """The ids of the processes of a prefork pool. There are none in another pool, or in one that has ended."""
    return [process.pid for process in getattr(getattr(pool, "_pool", None), "_pool", ())]


class JobRequest(Request):
    """A message in the parent. It has no soft limit, since the attempt has a deadline of its own in every pool.

    Of its arguments, which hold the prompt, `inspect` and the events show the job's id only.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        task: Any = self.task
        limits = task.runtime.settings.limits(self.request_dict.get("timelimit"))
        self.time_limits = (limits.hard_s, None)
        self._visible_args = [value for value in self.args[:1] if isinstance(value, str) and JOB_ID.fullmatch(value)]
        self._argsrepr, self._kwargsrepr = repr(self._visible_args), "{}"

    def info(self, safe: bool = False) -> Any:
        return {**super().info(safe), "args": self._visible_args, "kwargs": {}}


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
