"""A Redis that doesn't allow everything: the rights that docs/production.md gives, and what goes on without each."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from kombu import Connection, Exchange, Queue
from redis.exceptions import LockNotOwnedError, NoPermissionError

from testbed.api import Api
from testbed.processes import SOURCE, poll
from testbed.provider import Provider
from testbed.servers import MongoServer, RedisServer, find_redis, find_redis_in_wheel
from tests.lab import TEXT, adopt, bare_settings, table
from tests.site import JOBS, Site, StartWorker, events_of, open_api, running, start
from worker import Runtime
from worker_commands.check import check_redis
from worker_commands.exporter import BrokerWatch
from worker_commands.findings import Finding
from worker_commands.redis_rights import Chore, own_chores, queue_chores, result_chores
from workerkit.broker import JobConnection, ScriptlessLock, ScriptlessRedis, is_refused, refusal

pytestmark = pytest.mark.servers

USER, PASSWORD, QUEUE = "worker", "secret", "ai_jobs"
LINE = re.search(r"^ACL SETUSER worker on >PASSWORD (.+)$", (SOURCE / "docs/production.md").read_text(), re.MULTILINE)
RULES = LINE[1].split() if LINE else []
CONNECTING = ["resetkeys", "resetchannels", "-@all", "+@connection", "-@admin", "-@dangerous"]
RIGHTS = [rule for rule in RULES if rule not in CONNECTING]
REMOTE_CONTROL = ("&/0.celery.pidbox", "~_kombu.binding*", "~*.celery.pidbox", "~*.celery.pidbox??[369]")
RESULTS = ("~celery-task-meta-*", "&celery-task-meta-*")
# What hosted servers take away.
RENAMED = ("EVAL", "EVALSHA", "SCRIPT", "CONFIG", "INFO")

on_each_server = pytest.mark.parametrize("redis_server", ["of PATH", "of the wheel"], indirect=True)
SetRights = Callable[..., None]


@pytest.fixture(scope="module")
def redis_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A Redis of this module's own, since its users are its own."""
    find = find_redis_in_wheel if getattr(request, "param", "") == "of the wheel" else find_redis
    yield from start(RedisServer(find=find))  # type: ignore[misc]


@pytest.fixture
def admin(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_server.url) as client:
        yield client
        client.flushall()


def change_user(admin: redis.Redis, *rules: str) -> None:
    admin.execute_command("ACL", "SETUSER", USER, *rules)  # type: ignore[no-untyped-call]


@pytest.fixture(autouse=True)
def set_rights(admin: redis.Redis) -> SetRights:
    """Gives the user what the documentation says, without some of it: `+command`, `~key` or `&channel`."""

    def set_rights(*without: str) -> None:
        rules = [rule for rule in RULES if rule not in without]
        rules += [f"-{rule[1:]}" for rule in without if rule.startswith("+")]
        change_user(admin, "reset", "on", f">{PASSWORD}", *rules)
        admin.acl_log_reset()

    set_rights()
    return set_rights


def limited_url(server: RedisServer) -> str:
    return f"redis://{USER}:{PASSWORD}@{server.address}/0"


@pytest.fixture
def environment(environment: dict[str, str], redis_server: RedisServer) -> dict[str, str]:
    """A worker as this user, with the queue's usual name."""
    return {**environment, "REDIS_URL": limited_url(redis_server), "CELERY_QUEUE_NAME": QUEUE}


@pytest.fixture
def runtime(redis_server: RedisServer, tmp_path: Path) -> Iterator[Runtime]:
    """What a worker works with as this user. No test of this file asks its MongoDB."""
    with contextlib.closing(adopt(Runtime(bare_settings(redis_url=limited_url(redis_server))), tmp_path)) as runtime:
        yield runtime


@pytest.fixture
def api(environment: dict[str, str], redis_server: RedisServer) -> Iterator[Api]:
    with open_api({**environment, "REDIS_URL": redis_server.url}) as api:
        yield api


def refused(admin: redis.Redis) -> set[tuple[str, str]]:
    """What Redis has refused: the reason, and the name."""
    log: Any = admin.acl_log()
    return {(entry["reason"], entry["object"]) for entry in log}


# ── check ────────────────────────────────────────────────────────────────────────────────────────────────────────


def chores() -> list[Chore]:
    settings = bare_settings()
    return [*queue_chores(settings, 0), *result_chores(settings, 0), *own_chores(settings, 0)]


def rows(runtime: Runtime) -> dict[str, Finding]:
    return {finding.what: finding for finding in check_redis(runtime)}


def test_check_tries_exactly_the_rights_that_the_documentation_gives() -> None:
    uses = [use for chore in chores() for use in chore.uses]
    commands = {f"+{name.lower()}" for use in uses for name in use.commands.split()} - {"+ping"}
    assert commands | {use.rule for use in uses if use.rule} == set(RIGHTS)


@on_each_server
def test_check_finds_the_documented_rights_enough(runtime: Runtime, admin: redis.Redis) -> None:
    found = rows(runtime)
    assert [finding for finding in found.values() if finding.is_fault] == []
    assert [what for what in found if what.startswith("Redis rights")] == ["Redis rights"]
    assert refused(admin) <= {("command", "info"), ("command", "config|get")}


@on_each_server
@pytest.mark.parametrize("right", ["+ping", *RIGHTS])
def test_check_names_a_right_that_is_missing(runtime: Runtime, set_rights: SetRights, right: str) -> None:
    set_rights(right)
    named = [finding for finding in rows(runtime).values() if right in finding.seen.replace(",", "").split()]
    assert [finding.is_fault for finding in named] == [True]
    assert f"ACL SETUSER {USER} " in named[0].advice
    assert right in named[0].advice.split()


def test_check_names_all_missing_rights_in_few_rows(runtime: Runtime, set_rights: SetRights) -> None:
    set_rights(*(right for right in RIGHTS if right[0] in "~&"))
    faults = [finding for finding in rows(runtime).values() if finding.is_fault]
    assert len(faults) == len(chores())
    seen = " ".join(finding.seen for finding in faults).replace(",", "").split()
    assert {right for right in RIGHTS if right[0] in "~&"} <= set(seen)


def test_check_follows_the_names_of_queue_and_database(redis_server: RedisServer, tmp_path: Path) -> None:
    values = {"redis_url": limited_url(redis_server).replace("/0", "/2"), "celery_queue_name": "other"}
    other = adopt(Runtime(bare_settings(**values)), tmp_path)
    with contextlib.closing(other):
        found = rows(other)
    assert found["Redis rights, jobs"].seen == "refused: ~other, ~other??[369]"
    assert found["Redis rights, remote control"].seen == "refused: &/2.celery.pidbox"
    assert found["Redis rights, events"].seen == "refused: &/2.celeryev/*"


def test_check_tries_the_server_of_each_url(redis_server: RedisServer, tmp_path: Path) -> None:
    values = {"redis_url": redis_server.url, "celery_broker_url": limited_url(redis_server)}
    values["celery_result_backend"] = limited_url(redis_server).replace("/0", "/1")
    other = adopt(Runtime(bare_settings(**values)), tmp_path)
    with contextlib.closing(other):
        seen = [finding.seen for finding in check_redis(other) if finding.what == "Redis rights"]
    assert [each.partition(": ")[2] for each in seen] == [
        "jobs, unacknowledged messages, remote control, events",
        "notifications, streamed text, notes",
        "results",
    ]


def test_check_changes_nothing(runtime: Runtime, admin: redis.Redis) -> None:
    """The queue least of all: a worker would take whatever is in it."""
    rows(runtime)
    assert admin.keys() == []


@pytest.mark.parametrize("are_refused", [False, True])
def test_what_the_worker_doesnt_need_is_a_note(
    runtime: Runtime, admin: redis.Redis, set_rights: SetRights, are_refused: bool
) -> None:
    change_user(admin, *([] if are_refused else ["+info"]))
    found = [rows(runtime)[f"Redis {name}"] for name in ("maxmemory-policy", "appendonly")]
    assert [finding.is_fault for finding in found] == [False, False]
    if are_refused:
        assert all("can't be read" in finding.seen for finding in found)
        assert ["noeviction" in found[0].advice, "yes" in found[1].advice] == [True, True]
    else:
        assert [(finding.seen, finding.advice) for finding in found] == [("noeviction", ""), ("yes", "")]


def test_check_names_a_command_that_the_server_doesnt_have(tmp_path: Path) -> None:
    with running(RedisServer(without=("BRPOP", *RENAMED))) as server:
        runtime = adopt(Runtime(bare_settings(redis_url=server.url)), tmp_path)
        with contextlib.closing(runtime):
            found = rows(runtime)
    assert [finding.what for finding in found.values() if finding.is_fault] == ["Redis rights, jobs"]
    assert found["Redis rights, jobs"].seen == "refused: BRPOP (the server doesn't have it)"


# ── Celery's parts without rights, and why the stock ones need them ──────────────────────────────────────────────


Connect = Callable[[], contextlib.AbstractContextManager[Any]]


@pytest.fixture
def connect(redis_server: RedisServer) -> Connect:
    return lambda: JobConnection(limited_url(redis_server))


@pytest.fixture
def connect_stock(redis_server: RedisServer) -> Connect:
    return lambda: Connection(limited_url(redis_server))


MAILBOX = "worker@here.celery.pidbox"


def listen(channel: Any) -> Any:
    """Subscribes as a worker does for remote control, and reads Redis' answer."""
    fanout = Exchange("celery.pidbox", type="fanout")
    queue = Queue(MAILBOX, fanout, auto_delete=True, expires=300, channel=channel)
    queue.declare()
    channel.basic_consume(MAILBOX, True, lambda _message: None, "tag")
    channel._fanout_to_queue["celery.pidbox"] = MAILBOX
    client = channel.subclient
    client.connection = client.connection_pool.get_connection()
    channel._subscribe()
    channel._receive_one(client)
    return channel


def send_event(channel: Any) -> None:
    exchange = Exchange("celeryev", type="fanout", channel=channel)
    exchange.declare()
    channel.basic_publish(channel.prepare_message("{}"), "celeryev", "task.multi")


def declare(channel: Any) -> None:
    Queue(QUEUE, Exchange(QUEUE), QUEUE, channel=channel).declare()


def sweep(channel: Any) -> None:
    channel.sweep_bindings()


PARTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "the queue is declared, without its length": (declare, "+llen"),
    "the queue is declared, without a table": (declare, "~_kombu.binding*"),
    "an event is sent": (send_event, "&/0.celeryev/*"),
    "remote control, without the channel": (listen, "&/0.celery.pidbox"),
    "remote control, without the table": (listen, "~_kombu.binding*"),
    "remote control, without its queue": (listen, "~*.celery.pidbox"),
    "old tables are deleted, which are refused": (sweep, "~_kombu.binding*"),
    "old tables are deleted, without scripts": (sweep, "+@scripting"),
    "remote control, without scripts": (listen, "+@scripting"),
}
each_part = pytest.mark.parametrize(("use", "right"), PARTS.values(), ids=PARTS)


@each_part
def test_a_refusal_of_what_isnt_needed_is_no_error(
    connect: Connect, set_rights: SetRights, use: Callable[[Any], Any], right: str
) -> None:
    set_rights(right)
    with connect() as connection:
        use(connection.default_channel)


@each_part
def test_kombu_raises_where_what_isnt_needed_is_refused(
    connect_stock: Connect, set_rights: SetRights, use: Callable[[Any], Any], right: str
) -> None:
    """If one of these fails: then delete its method of `RedisMends` from workerkit/broker.py."""
    set_rights(right)
    with contextlib.suppress(redis.ResponseError), connect_stock() as connection:
        with pytest.raises(NoPermissionError):
            use(connection.default_channel)


def hold_a_message(channel: Any) -> None:
    declare(channel)
    channel.basic_publish(channel.prepare_message("{}"), "", QUEUE)
    channel.basic_get(QUEUE)


LATER_PARTS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], str]] = {
    "remote control is renewed": (listen, lambda channel: channel._refresh_bindings([MAILBOX]), "~_kombu.binding*"),
    "remote control is ended": (listen, lambda channel: channel.close(), "~*.celery.pidbox"),
    "what is held is put back": (hold_a_message, lambda channel: channel.qos.restore_unacked(), "~unacked"),
}
each_later_part = pytest.mark.parametrize(("begin", "use", "right"), LATER_PARTS.values(), ids=LATER_PARTS)


@each_later_part
def test_a_refusal_that_comes_later_is_no_error(
    connect: Connect,
    set_rights: SetRights,
    admin: redis.Redis,
    begin: Callable[[Any], Any],
    use: Callable[[Any], Any],
    right: str,
) -> None:
    change_user(admin, "+@all")
    with connect() as connection:
        begin(connection.default_channel)
        set_rights(right)
        use(connection.default_channel)


@each_later_part
def test_kombu_raises_where_the_refusal_comes_later(
    connect_stock: Connect,
    set_rights: SetRights,
    admin: redis.Redis,
    begin: Callable[[Any], Any],
    use: Callable[[Any], Any],
    right: str,
) -> None:
    """If one of these fails: then delete its method of `RedisMends` or `RedisQoS` from workerkit/broker.py."""
    change_user(admin, "+@all")
    with contextlib.suppress(redis.ResponseError), connect_stock() as connection:
        begin(connection.default_channel)
        set_rights(right)
        with pytest.raises(NoPermissionError):
            use(connection.default_channel)


def test_a_queue_whose_length_is_refused_is_not_called_empty(runtime: Runtime, set_rights: SetRights) -> None:
    """A sweeper would send all pending jobs again, again and again."""
    set_rights("+llen", "+exists")
    with pytest.raises(runtime.broker.errors):
        runtime.broker.queue_length()


def test_the_queue_is_seen_where_the_workers_cant_be_asked(runtime: Runtime, set_rights: SetRights) -> None:
    set_rights(*REMOTE_CONTROL)
    watch = BrokerWatch(runtime)
    watch.look()
    assert watch.seen
    assert (watch.seen.queue_length, watch.seen.fleet) == (0, None)


def test_a_queue_that_isnt_there_is_empty(runtime: Runtime) -> None:
    assert runtime.broker.queue_length() == 0


in_each_way = pytest.mark.parametrize("how", [JobConnection, Connection], ids=["ours", "kombu's"])


@in_each_way
def test_tables_are_deleted_as_kombus_script_does_it(
    how: type[Connection], redis_server: RedisServer, admin: redis.Redis
) -> None:
    """Overdue ones, unless a queue without an end is in them. The others stay."""
    now_ms = time.time() * 1000
    admin.zadd("_kombu.binding_deadlines", {"old": 1, "lasting": 1, "young": now_ms + 60_000})
    for name in ("old", "lasting", "young"):
        admin.sadd(f"_kombu.binding.{name}", "member")
    admin.sadd("_kombu.binding_permanent.lasting", "member")
    with how(redis_server.url) as connection:
        channel: Any = connection.default_channel
        assert channel.sweep_bindings() == 2
    assert admin.exists("_kombu.binding.old", "_kombu.binding.lasting", "_kombu.binding.young") == 2
    assert admin.zrange("_kombu.binding_deadlines", 0, -1) == [b"young"]


@in_each_way
def test_a_binding_is_renewed_as_kombus_script_does_it(
    how: type[Connection], redis_server: RedisServer, admin: redis.Redis
) -> None:
    """A deadline only grows, since several workers share it."""
    with how(redis_server.url) as connection:
        channel: Any = connection.default_channel
        for expires_ms in (5_000_000, 4_000_000):
            keys, args = ["_kombu.binding.x", "_kombu.binding_deadlines"], ["member", "x", expires_ms]
            channel._refresh_binding(keys=keys, args=args, client=admin)
    assert admin.smembers("_kombu.binding.x") == {b"member"}
    deadline: Any = admin.zscore("_kombu.binding_deadlines", "x")
    assert deadline - time.time() * 1000 == pytest.approx(5_000_000, abs=10_000)


def test_a_lock_without_scripts_is_held_by_one_and_released_by_its_holder_only(redis_server: RedisServer) -> None:
    with ScriptlessRedis.from_url(limited_url(redis_server)) as client:
        locks: list[Any] = [client.lock("unacked_mutex", timeout=60) for _ in range(2)]
        assert [type(lock) for lock in locks] == [ScriptlessLock] * 2
        assert [lock.acquire(blocking=False) for lock in locks] == [True, False]
        locks[0].release()
        assert locks[1].acquire(blocking=False)
        client.set("unacked_mutex", "another's")
        with pytest.raises(LockNotOwnedError):
            locks[1].release()
        assert client.get("unacked_mutex") == b"another's"


@table(
    "text, is_one",
    ("renamed away", "unknown command 'EVALSHA', with args beginning with: 'a' 'prompt'", True),
    ("a transaction that never began", "EXEC without MULTI", True),
    ("full", "OOM command not allowed when used memory > 'maxmemory'.", False),
)
def test_what_counts_as_a_refusal(text: str, is_one: bool) -> None:
    assert is_refused(redis.ResponseError(text)) == is_one
    assert "prompt" not in refusal(redis.ResponseError(text))


# ── whole workers ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def site_of(
    api: Api, start_worker: StartWorker, provider: Provider, environment: dict[str, str]
) -> Callable[..., Site]:
    """Starts a worker as this user. Keyword arguments are settings."""
    return lambda **settings: Site(api, start_worker(**settings), provider, {**environment, **settings})


def assert_completes(site: Site) -> None:
    """Jobs of each type, one that is tried again, and a free slot afterwards."""
    jobs = [site.api.submit(job_type, inputs) for job_type, inputs in JOBS.items()]
    for job in [*jobs, site.api.text("busy at first [status 500 times=1]")]:
        assert site.api.wait_notice(job, "completed")
    assert site.goes_on()


def assert_serves_clients(site: Site) -> None:
    """Results, events, `inspect` and `revoke`."""
    api = site.api
    with events_of(api) as events:
        assert api.enqueue(api.insert(TEXT, JOBS[TEXT])).get(timeout=20)["status"] == "completed"
        kinds = {"task-received", "task-started", "task-succeeded"}
        poll(lambda: kinds <= {event["type"] for event in events}, 10, description="events")
    assert site.worker.name in inspected(api)
    job = api.insert(TEXT, JOBS[TEXT])
    api.celery.control.revoke(api.enqueue(job, countdown=1.5).id)
    assert api.wait(job)["error_message"] == "This was stopped by the people who run this service."


def inspected(api: Api, timeout_s: float = 5) -> dict[str, Any]:
    return api.celery.control.inspect(timeout=timeout_s, limit=1).active() or {}


def assert_rescues_a_killed_child(site: Site) -> None:
    prompt = "kill its process [delay 2 times=1]"
    job = site.api.text(prompt)
    site.wait_call(prompt)
    os.kill(site.api.document(job)["worker"]["pid"], signal.SIGKILL)
    assert site.api.wait_notice(job, "completed")
    assert site.api.document(job)["worker"]["attempt"] == 2


def assert_restores_messages(site: Site, admin: redis.Redis, start_worker: StartWorker) -> None:
    """The message of a killed worker goes back into the queue once its time is over, here at once."""
    prompt = "kill its worker [delay 20]"
    site.api.text(prompt)
    site.wait_call(prompt)
    site.worker.kill()
    held: Any = admin.hkeys("unacked")
    (tag,) = held
    admin.zadd("unacked_index", {tag: 1})
    start_worker(WORKER_POOL=site.pool)
    poll(lambda: not admin.hexists("unacked", tag), 20, description="the message restored")


@pytest.mark.parametrize(
    ("redis_server", "pool"), [("of PATH", "prefork"), ("of the wheel", "threads")], indirect=["redis_server"]
)
def test_a_worker_with_the_documented_rights_does_everything(
    site_of: Callable[..., Site], admin: redis.Redis, start_worker: StartWorker, pool: str
) -> None:
    site = site_of(WORKER_POOL=pool)
    assert_completes(site)
    assert_serves_clients(site)
    if pool == "prefork":
        assert_rescues_a_killed_child(site)
    assert_restores_messages(site, admin, start_worker)
    assert refused(admin) == set()


@table(
    "without, says",
    ("results", RESULTS, "Celery's results can't be stored"),
    ("the mutex of restored messages", ("~unacked_mutex",), "hadn't acknowledged can't be put back into the queue"),
    ("unacknowledged messages", ("~unacked", "~unacked_index"), "list of unacknowledged messages can't be written"),
    ("events", ("&/0.celeryev/*",), "Redis refuses Celery's events"),
    ("remote control", REMOTE_CONTROL, "Redis refuses Celery's remote control"),
)
def test_a_refused_chore_stops_no_job(
    site_of: Callable[..., Site], set_rights: SetRights, admin: redis.Redis, without: tuple[str, ...], says: str
) -> None:
    """Jobs are taken, completed and acknowledged, and the log says once what is left out."""
    set_rights(*without)
    site = site_of(WORKER_CONCURRENCY="1")
    assert_completes(site)
    poll(lambda: not admin.exists("unacked", "unacked_index", QUEUE), 10, description="all messages acknowledged")
    assert site.worker.stop() == 0
    log = site.worker.text()
    lines = [line for line in log.splitlines() if says in line]
    assert 1 <= len(lines) <= 2  # the parent and its child
    assert ("Traceback" in log, "Connection to broker lost" in log) == (False, False)


def test_a_reply_that_is_refused_costs_only_the_reply(site_of: Callable[..., Site], set_rights: SetRights) -> None:
    """The worker is asked, and may not put its answer into the client's list."""
    site = site_of(WORKER_POOL="threads")
    set_rights("~*.celery.pidbox")
    assert inspected(site.api, timeout_s=1) == {}
    assert site.goes_on()
    set_rights()
    poll(lambda: inspected(site.api, timeout_s=1), 20, description="an answer")


def test_a_worker_that_may_take_no_job_says_so_once_and_goes_on_when_it_may(
    site_of: Callable[..., Site], set_rights: SetRights, admin: redis.Redis
) -> None:
    set_rights("+brpop")
    site = site_of(WORKER_POOL="threads")
    job = site.api.text("waits for the right")
    site.wait_log("the broker refuses what is needed to take jobs")
    time.sleep(3)  # a worker that tried without a pause would have logged more and tried hundreds of times
    says = [line for line in site.log().splitlines() if "the broker refuses what is needed" in line]
    assert len(says) == 1
    assert "'brpop' command" in says[0]
    assert "python worker.py check" in says[0]
    log: Any = admin.acl_log()
    assert sum(int(entry["count"]) for entry in log if entry["object"] == "brpop") <= 5
    assert "Traceback" not in site.log()
    set_rights()
    assert site.api.wait_notice(job, "completed")


def test_a_redis_without_scripts_config_and_info_serves_a_worker(
    mongo_server: MongoServer, environment: dict[str, str], provider: Provider, start_worker: StartWorker
) -> None:
    with running(RedisServer(without=RENAMED)) as server:
        settings = {**environment, "REDIS_URL": server.url}
        with open_api(settings) as api, redis.Redis.from_url(server.url) as admin:
            worker = start_worker(REDIS_URL=server.url, WORKER_POOL="threads")
            site = Site(api, worker, provider, {**settings, "WORKER_POOL": "threads"})
            assert_completes(site)
            api.celery.control.revoke(api.enqueue(api.insert(TEXT, JOBS[TEXT]), countdown=60).id)
            poll(lambda: not admin.exists("unacked_mutex"), 5, description="the mutex released")
            assert worker.stop() == 0
            assert "Redis refuses" not in worker.text()
