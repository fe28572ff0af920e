"""What the worker needs to be allowed on Redis, and a trial of each key, channel and command.

docs/production.md has the same as one `ACL SETUSER` line; tests/test_redis_rights.py compares the two.
"""

from __future__ import annotations

import contextlib
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import redis
from kombu.exceptions import OperationalError

from worker import PROGRESS_CHANNEL, STATUS_CHANNEL, Runtime
from worker_commands.findings import Finding
from workerkit.broker import refusal
from workerkit.redis_urls import CLIENT_OPTIONS
from workerkit.settings import Settings

# ── what the worker uses ─────────────────────────────────────────────────────────────────────────────────────────

# The arguments of a command behind its key or channel.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    **{name: ("1",) for name in ("BRPOP", "LPUSH", "RPUSH", "SADD", "SREM", "ZREM", "HGET", "HDEL", "PUBLISH")},
    "HSET": ("1", "1"),
    "SET": ("1", "EX", "1", "NX"),
    "SETEX": ("1", "1"),
    "ZADD": ("GT", "1", "1"),
    "ZRANGE": ("-inf", "1", "BYSCORE"),
}
HARMLESS = ("PING", "TIME", "WATCH", "UNWATCH", "MULTI", "EXEC")  # these are carried out, in this order
MESSAGES = "BRPOP LPUSH RPUSH LLEN EXISTS"
SEPARATOR = "\x06\x16"  # between a queue's name and a priority, in kombu's names of lists


@dataclass(frozen=True)
class Use:
    """Commands on one key or channel, and the rule by which an ACL allows it. Both are empty where none is named."""

    rule: str
    name: str
    commands: str

    @property
    def trials(self) -> list[tuple[str, ...]]:
        names = self.commands.split()
        return [(each, *([self.name] if self.rule else []), *ARGUMENTS.get(each, ())) for each in names]


@dataclass(frozen=True)
class Chore:
    """What the worker uses Redis for, and what becomes of it where something is refused."""

    what: str
    without: str
    uses: tuple[Use, ...]


def key(rule: str, commands: str, name: str = "") -> Use:
    return Use(f"~{rule}", name or rule, commands)


def channel(rule: str, commands: str, name: str = "") -> Use:
    return Use(f"&{rule}", name or rule, commands)


def taking_jobs(queue: str) -> Chore:
    by_priority = (key(f"{queue}??[369]", MESSAGES, f"{queue}{SEPARATOR}{priority}") for priority in (3, 6, 9))
    uses = (Use("", "", "PING MULTI EXEC"), key(queue, MESSAGES), *by_priority)
    return Chore("jobs", "no job is taken, or none can be tried again", uses)


def unacknowledged_messages() -> Chore:
    return Chore(
        "unacknowledged messages",
        "jobs run, but Redis doesn't deliver the messages of a killed worker again",
        (
            Use("", "", "UNWATCH"),
            key("unacked", "HSET HGET HDEL WATCH"),
            key("unacked_index", "ZADD ZRANGE ZREM"),
            key("unacked_mutex", "SET GET DEL WATCH"),
        ),
    )


def remote_control(database: int) -> Chore:
    mailbox, replies = "worker@check.celery.pidbox", "check.reply.celery.pidbox"
    return Chore(
        "remote control",
        "jobs run, but `inspect` gets no answer, and no task can be revoked",
        (
            Use("", "", "TIME"),
            channel(f"/{database}.celery.pidbox", "PSUBSCRIBE PUNSUBSCRIBE"),
            key("_kombu.binding*", "SADD SREM SMEMBERS DEL", "_kombu.binding.check"),
            key("_kombu.binding*", "SADD SREM EXISTS WATCH", "_kombu.binding_permanent.check"),
            key("_kombu.binding*", "ZADD ZRANGE ZREM WATCH", "_kombu.binding_deadlines"),
            key("*.celery.pidbox", "LLEN DEL", mailbox),
            key("*.celery.pidbox??[369]", "LLEN DEL", f"{mailbox}{SEPARATOR}3"),
            key("*.celery.pidbox", "LPUSH", replies),
        ),
    )


def events(database: int) -> Chore:
    published = channel(f"/{database}.celeryev/*", "PUBLISH", f"/{database}.celeryev/task.multi")
    return Chore("events", "jobs run, but Flower and the API see no events", (published,))


def queue_chores(settings: Settings, database: int) -> list[Chore]:
    """What Celery uses on the broker. Pub/sub knows no databases, so the number is a part of its channels' names."""
    chores = [taking_jobs(settings.celery_queue_name), unacknowledged_messages(), remote_control(database)]
    return [*chores, events(database)] if settings.celery_send_events else chores


def result_chores(_settings: Settings, _database: int) -> list[Chore]:
    """What Celery's result backend uses. It stores a result and publishes it under the same name."""
    name = "celery-task-meta-check"
    stored, published = key("celery-task-meta-*", "GET SETEX", name), channel("celery-task-meta-*", "PUBLISH", name)
    return [Chore("results", "jobs end, but Celery's clients don't see that", (stored, published))]


def own_chores(settings: Settings, _database: int) -> list[Chore]:
    """What the worker itself uses on REDIS_URL."""
    queue, database = settings.celery_queue_name, settings.database_name
    return [
        Chore("notifications", "nobody hears of a job's end", (channel(STATUS_CHANNEL, "PUBLISH"),)),
        Chore("streamed text", "nobody sees a text grow", (channel(PROGRESS_CHANNEL, "PUBLISH"),)),
        Chore(
            "notes",
            "a revoked job doesn't fail, and what an outage of MongoDB left over is generated again",
            (
                key(f"result:{queue}:*", "SET GET DEL", f"result:{queue}:{database}:check"),
                key(f"cancelled:{queue}:*", "SET GET", f"cancelled:{queue}:{database}"),
                key(f"revoked:{queue}:*", "SADD SMEMBERS SREM", f"revoked:{queue}:{database}"),
            ),
        ),
    ]


# ── trial ────────────────────────────────────────────────────────────────────────────────────────────────────────


def ask(connection: Any, *command: str) -> str:
    """What Redis says against a command, or an empty string."""
    connection.send_command(*command)
    try:
        connection.read_response()
    except redis.ResponseError as error:
        return refusal(error)
    return ""


def missing_right(said: str, command: str, use: Use) -> str:
    """The right that is missing, as an ACL names it; or what Redis said, if it is something else."""
    if "unknown command" in said:
        return f"{command} (the server doesn't have it)"
    if "permissions" not in said:
        return f"{command} ({said})"
    return f"+{command.lower()}" if "command" in said else use.rule


def missing_rights(connection: Any, chores: list[Chore]) -> Iterator[tuple[Chore, str]]:
    """Tries each command, and leaves the connection in a transaction, which ends with it and is never carried out.

    Redis judges a command by the user's rights when it takes it into the transaction.
    """
    trials = [(chore, use, trial) for chore in chores for use in chore.uses for trial in use.trials]
    trials.sort(key=lambda one: HARMLESS.index(one[2][0]) if one[2][0] in HARMLESS else len(HARMLESS))
    is_open = False
    for chore, use, trial in trials:
        if not is_open and trial[0] not in HARMLESS:
            is_open = not ask(connection, "MULTI")
            if not is_open:  # outside of one the commands would be carried out
                return
        if said := ask(connection, *trial):
            yield chore, missing_right(said, trial[0], use)


def try_chores(client: redis.Redis, chores: list[Chore]) -> Iterator[Finding]:
    """A row for each chore that lacks rights, which names them. A right is named once. If none is missing, one row."""
    pool = client.connection_pool
    connection: Any = pool.get_connection()
    missing: dict[str, Chore] = {}
    try:
        for chore, right in missing_rights(connection, chores):
            missing.setdefault(right, chore)
    finally:
        connection.disconnect()
        pool.release(connection)
    user = pool.connection_kwargs.get("username") or "default"
    for chore in chores:
        if rights := [right for right, first in missing.items() if first is chore]:
            grant = " ".join(right for right in rights if right[0] in "+~&")
            advice = f"{chore.without}; on the server: ACL SETUSER {user} {grant}" if grant else chore.without
            yield Finding(f"Redis rights, {chore.what}", f"refused: {', '.join(rights)}", advice, is_fault=True)
    if not missing:
        yield Finding("Redis rights", f"all that the worker uses: {', '.join(chore.what for chore in chores)}")


# ── which Redis is used for what ─────────────────────────────────────────────────────────────────────────────────


def address(url: str) -> tuple[str, str, int]:
    """What tells one server and database from another."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc, int(parts.path.strip("/") or 0)


@contextlib.contextmanager
def client_of(runtime: Runtime, url: str) -> Iterator[redis.Redis]:
    """A client of the server; where Sentinel names the master, kombu asks it."""
    if url.startswith("sentinel"):
        with runtime.broker.connection() as connection:
            yield connection.default_channel._create_client()
    else:
        with redis.Redis.from_url(url, **CLIENT_OPTIONS) as client:
            yield client


def servers(settings: Settings) -> dict[tuple[str, str, int], tuple[str, list[Chore]]]:
    """Each Redis that the worker uses: its URL, and what it is used for. Where addresses are the same, it is one."""
    by_address: dict[tuple[str, str, int], tuple[str, list[Chore]]] = {}
    uses = (settings.redis_url.get_secret_value(), own_chores), (settings.result_backend, result_chores)
    for url, chores in ((settings.broker_url, queue_chores), *uses):
        if url.startswith(("redis", "sentinel")):
            where = address(url)
            by_address.setdefault(where, (url, []))[1].extend(chores(settings, where[2]))
    return by_address


def check_rights(runtime: Runtime) -> Iterator[Finding]:
    """Rows about each Redis. One that can't be reached has a row elsewhere."""
    for url, chores in servers(runtime.settings).values():
        with contextlib.suppress(redis.ConnectionError, redis.TimeoutError, OperationalError, OSError):
            with client_of(runtime, url) as client:
                yield from try_chores(client, chores)
