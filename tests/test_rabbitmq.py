"""RabbitMQ as the broker, by its URL alone, with a queue that the API has made in its own way.

What is looked at takes seconds of waiting and little else. So it happens side by side, each in a place of its own, and
each test asserts what has come of one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import amqp
import pytest
from amqp.exceptions import NotFound
from bson import json_util
from kombu import Connection, Exchange, Queue

from testbed.api import WorkerProcess
from testbed.processes import poll
from testbed.servers import RabbitServer
from tests.contract_lab import example
from tests.lab import TEXT
from tests.place import PATIENCE_S, OpenPlace, Outcomes, Place, Scenario, Step, side_by_side
from tests.site import run_forked, running

pytestmark = pytest.mark.servers

QUEUES: dict[str, dict[str, Any]] = {"classic": {"x-max-priority": 3}, "quorum": {"x-queue-type": "quorum"}}
in_each_queue = pytest.mark.parametrize("kind", QUEUES)


def declare_queue(place: Place, kind: str) -> None:
    """Declares the place's queue and exchange as an API with requirements of its own may have done."""
    name = place.api.queue
    queue = Queue(name, Exchange(name, "topic"), name, queue_arguments=QUEUES[kind])
    place.api.celery.conf.task_queues = [queue]
    with Connection(place.environment["CELERY_BROKER_URL"]) as connection:
        queue(connection.default_channel).declare()


def declare_exchange(place: Place, kind: str) -> None:
    """Lets the API publish to an exchange of this type that has the queue's name, and declares this one alone."""
    name = place.api.queue
    exchange = Exchange(name, kind)
    place.api.celery.conf.task_queues = [Queue(name, exchange, name)]
    with Connection(place.environment["CELERY_BROKER_URL"]) as connection:
        exchange(connection.default_channel).declare()


def command(place: Place, *arguments: str) -> str:
    """What a command of the worker prints. It ends with 0."""
    ended = run_forked(place.environment, place.folder, *arguments)
    assert ended.returncode == 0, ended
    return ended.stdout


def gate_of(place: Place) -> str:
    """What lets this place's job end, and no other's."""
    return f"hold until_{place.api.queue}"


def run_in_one_of_two(place: Place) -> tuple[WorkerProcess, WorkerProcess]:
    """Starts two workers, and returns the one that runs a job, which is held, before the other."""
    for _ in range(2):
        place.start_worker(SHUTDOWN_GRACE="0")
    place.wait_ready()
    job = place.submit("job", Step(gate_of(place)))
    place.wait_call("job")
    line = f"job={job} attempt=1 type='text_generation' started"
    poll(lambda: any(line in worker.text() for worker in place.workers), 30, description="the job runs")
    first, second = sorted(place.workers, key=lambda worker: line not in worker.text())
    return first, second


# ── what happens side by side ────────────────────────────────────────────────────────────────────────────────────


RETRY_AFTER_S = 8  # later than all that happens meanwhile


def wait_for_retries(place: Place) -> None:
    place.start_worker()
    place.wait_ready()
    waiting = [f"waiting {number}" for number in range(2)]
    for name in waiting:
        place.submit(name, Step(f"[status 429 times=1 retry-after={RETRY_AFTER_S}]", answers=2))
    for name in waiting:
        poll(lambda name=name: place.document(name).get("worker", {}).get("owner", "") is None, PATIENCE_S)  # type: ignore[misc]
    place.submit("meanwhile", Step(""))
    ended_at = {
        name: place.api.wait(place.jobs[name], timeout_s=PATIENCE_S)["completed_at"] for name in ["meanwhile", *waiting]
    }
    assert min(ended_at, key=lambda name: ended_at[name]) == "meanwhile"
    assert {place.document(name)["status"] for name in ended_at} == {"completed"}
    assert [len(place.calls(name)) for name in waiting] == [2, 2]


def kill_a_worker(place: Place) -> None:
    killed, other = run_in_one_of_two(place)
    killed.kill()
    job = place.jobs["job"]
    poll(lambda: f"job={job} not claimed: it is held by a live lease" in other.text(), PATIENCE_S)
    place.provider.let_go.add(gate_of(place))
    assert place.api.wait(job, timeout_s=PATIENCE_S)["worker"]["attempt"] == 2
    assert len(place.calls("job")) == 2


def hand_back(place: Place) -> None:
    stopped, other = run_in_one_of_two(place)
    assert stopped.stop(PATIENCE_S) == 0
    place.provider.let_go.add(gate_of(place))
    assert place.api.wait(place.jobs["job"], timeout_s=PATIENCE_S)["worker"]["attempt"] == 1
    line = f"job={place.jobs['job']} attempt=1 type='text_generation' completed"
    poll(lambda: line in other.text(), PATIENCE_S)


def use_every_command(place: Place) -> None:
    place.add_module("import worker\nworker.LostMessages.overdue_s = 1.0\n")
    waiting = place.submit("waits", Step(""))
    assert "1 waiting in" in command(place, "check")
    assert ": 1 message that no worker has taken" in run_forked(place.environment, place.folder, "status").stdout
    place.start_worker()
    place.wait_ready()
    assert place.api.wait(waiting, timeout_s=PATIENCE_S)["status"] == "completed"
    assert "1 alive, 0 of 1 slots busy" in command(place, "status")
    assert "done by hand" in command(place, "submit", "--prompt", "[say done by hand]")
    command(place, "health")
    long_ago = datetime(2026, 1, 1, tzinfo=UTC)
    forgotten = place.api.insert(TEXT, {"prompt": "forgotten"}, created_at=long_ago)
    command(place, "recover")
    assert place.api.wait(forgotten, timeout_s=PATIENCE_S)["status"] == "completed"


def send_without_celery(place: Place) -> None:
    """Inserts the document of docs/contract.md, and publishes the message there, by a client of AMQP alone."""
    place.start_worker()
    place.wait_ready()
    document, message = json_util.loads(example("2. The document")), json.loads(example("Without Celery, on RabbitMQ"))
    place.api.jobs.insert_one(document)
    headers = message["properties"].pop("headers")
    content = amqp.Message(json.dumps(message["body"]), application_headers=headers, **message["properties"])
    there = urlsplit(place.environment["CELERY_BROKER_URL"])
    with amqp.Connection(f"{there.hostname}:{there.port}") as connection:
        connection.channel().basic_publish(content, message["exchange"], place.api.queue)
        done = place.api.wait(document["_id"], timeout_s=PATIENCE_S)
    assert (done["status"], done["worker"]["limits"]) == ("completed", [120, 90])
    assert message["routing_key"] == "ai_jobs"


def start_after_the_exchange(place: Place, kind: str) -> None:
    declare_exchange(place, kind)
    place.start_worker()
    place.wait_ready()
    place.submit("job", Step(""))
    assert place.api.wait(place.jobs["job"], timeout_s=PATIENCE_S)["status"] == "completed"
    lose_the_queue(place)


def lose_the_queue(place: Place) -> None:
    """The API keeps its connection and doesn't declare again, but the worker makes the queue anew and binds it."""
    with Connection(place.environment["CELERY_BROKER_URL"]) as connection:
        channel: Any = connection.default_channel
        channel.queue_delete(place.api.queue)
        poll(lambda: is_consumed(connection, place.api.queue), PATIENCE_S)
    sent_at = datetime.now(UTC)
    place.submit("afterwards", Step(""))
    ended = place.api.wait(place.jobs["afterwards"], timeout_s=PATIENCE_S)
    assert (ended["completed_at"] - sent_at).total_seconds() < 30  # a sweep would find its message lost after a minute


def is_consumed(connection: Connection, queue: str) -> bool:
    """Whether a worker consumes the queue, which it does after it has bound it."""
    channel: Any = connection.channel()
    with suppress(NotFound), channel:
        return bool(channel.queue_declare(queue, passive=True).consumer_count)
    return False


def start_before_the_exchange(place: Place, kind: str) -> None:
    place.start_worker()
    place.wait_ready()
    declare_exchange(place, kind)
    place.submit("job", Step(""))
    assert place.api.wait(place.jobs["job"], timeout_s=PATIENCE_S)["status"] == "completed"


def be_refused(place: Place, url: str, reason: str, advice: str) -> None:
    """The worker ends at its start, and `check` says the same. What a table has cut in lines is joined."""
    variables = {**place.environment, "CELERY_BROKER_URL": url, "WORKER_POOL": "threads"}
    ended = run_forked(variables, place.folder, "run")
    log = ended.stdout + ended.stderr
    assert ended.returncode == 2, ended
    assert f"The worker can't start: RabbitMQ says \"{reason}" in log
    assert log.count(advice) == 1
    assert "Traceback" not in log
    checked = run_forked(variables, place.folder, "check")
    assert checked.returncode == 1
    assert advice.split()[0] in checked.stdout.split("FAULT")[1]


SCENARIOS: dict[str, tuple[Scenario, str]] = {
    **{f"retries wait, {kind}": (wait_for_retries, kind) for kind in QUEUES},  # the longest first
    **{f"worker killed, {kind}": (kill_a_worker, kind) for kind in QUEUES},
    **{f"handed back, {kind}": (hand_back, kind) for kind in QUEUES},
    "every command": (use_every_command, "quorum"),
    "without Celery": (send_without_celery, "quorum"),
}


EXCHANGES = {
    **{
        f"{kind} exchange before the worker": partial(start_after_the_exchange, kind=kind)
        for kind in ("fanout", "topic")
    },
    **{
        f"{kind} exchange after the worker": partial(start_before_the_exchange, kind=kind)
        for kind in ("fanout", "topic")
    },
}
RIGHTS = "give its user the rights"
# The URL's part that is replaced, the reason that RabbitMQ gives, and what the worker advises.
REFUSALS = {
    "a wrong password": ("guest:wrong@", "ACCESS_REFUSED - Login was refused", "correct user and password"),
    "no such virtual host": ("guest:guest@", "NOT_ALLOWED - vhost none not found", "correct the virtual host"),
    "no rights at all": ("none:pw@", "ACCESS_REFUSED - access to ", RIGHTS),
    "no right to make waiting queues": ("some:pw@", "ACCESS_REFUSED - access to queue 'queue_", RIGHTS),
    "no right to publish": ("mute:pw@", "ACCESS_REFUSED - access to exchange 'amq.default'", RIGHTS),
}
# Each has the patterns of the names that it may configure, write and read. One call of rabbitmqctl makes all of them.
USERS = {"none": ("^$",) * 3, "some": ("^queue_[^.]*$|^worker|celery", ".*", ".*"), "mute": (".*", "^[^a]", ".*")}
ADD_USER = """rabbit_auth_backend_internal:add_user(<<"{0}">>, <<"pw">>, <<"test">>),
rabbit_auth_backend_internal:set_permissions(<<"{0}">>, <<"/">>, <<"{1}">>, <<"{2}">>, <<"{3}">>, <<"test">>)"""


def refusal(name: str, url: str) -> Scenario:
    """A worker that RabbitMQ refuses. The URL leads to the default virtual host with all rights."""
    login, reason, advice = REFUSALS[name]
    there = url.replace("guest:guest@", login)
    if name == "no such virtual host":
        there = there.removesuffix("/") + "none"
    return partial(be_refused, url=there, reason=reason, advice=advice)


def with_its_queue(place: Place, name: str) -> None:
    scenario, kind = SCENARIOS[name]
    declare_queue(place, kind)
    scenario(place)


@pytest.fixture(scope="module")
def outcomes(open_place: OpenPlace) -> Iterator[Outcomes]:
    with running(RabbitServer()) as rabbit:
        open_one = partial(open_place, CELERY_BROKER_URL=rabbit.url, LEASE_SECONDS="4")
        users = ", ".join(ADD_USER.format(name, *rights) for name, rights in USERS.items())
        rabbit.control("eval", f"{users}.")
        scenarios: dict[str, Scenario] = {name: partial(with_its_queue, name=name) for name in SCENARIOS}
        scenarios |= EXCHANGES | {name: refusal(name, rabbit.url) for name in REFUSALS}
        with side_by_side(open_one, scenarios) as outcomes:
            yield outcomes


# ── what has come of it ──────────────────────────────────────────────────────────────────────────────────────────


@in_each_queue
def test_the_job_of_a_killed_worker_is_rescued_though_rabbitmq_delivers_it_again_at_once(
    outcomes: Outcomes, kind: str
) -> None:
    outcomes[f"worker killed, {kind}"].result()


@in_each_queue
def test_another_worker_completes_what_was_handed_back_to_rabbitmq(outcomes: Outcomes, kind: str) -> None:
    outcomes[f"handed back, {kind}"].result()


@in_each_queue
def test_a_retry_that_waits_holds_no_slot_of_rabbitmqs_queue(outcomes: Outcomes, kind: str) -> None:
    outcomes[f"retries wait, {kind}"].result()


def test_every_command_works_with_rabbitmq(outcomes: Outcomes) -> None:
    outcomes["every command"].result()


def test_the_message_of_the_contracts_page_gets_the_pages_job_done_over_rabbitmq(outcomes: Outcomes) -> None:
    outcomes["without Celery"].result()


@pytest.mark.parametrize("name", EXCHANGES)
def test_jobs_complete_whatever_type_of_exchange_the_api_publishes_to(outcomes: Outcomes, name: str) -> None:
    outcomes[name].result()


@pytest.mark.parametrize("name", REFUSALS)
def test_a_worker_that_rabbitmq_refuses_says_so_in_a_sentence_and_ends(outcomes: Outcomes, name: str) -> None:
    outcomes[name].result()
