"""One process at a time has a turn, and the search for lost messages goes on whoever has it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import pytest
from bson import ObjectId
from celery.exceptions import Retry

from tests.lab import TEXT, Notices, ago, claim, deliver, insert, queued, table
from worker import Runtime
from workerkit.errors import StoreUnavailable
from workerkit.lost_messages import LostMessages
from workerkit.messages import COPY, carried_data, own_arguments
from workerkit.turns import Turns

# ── turns ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def process(runtime: Runtime) -> Callable[[], Turns]:
    """Makes another process's turns on the same database."""
    return lambda: Turns(runtime.database, runtime.store.now)


def set_turn(runtime: Runtime, **fields: Any) -> None:
    runtime.database["worker_turns"].update_one({"_id": "chore"}, {"$set": fields}, upsert=True)


def test_of_many_processes_one_gets_the_turn_and_keeps_it(process: Callable[[], Turns]) -> None:
    processes = [process() for _ in range(30)]
    with ThreadPoolExecutor(30) as threads:
        first, second = (list(threads.map(lambda turns: turns.take("chore", 60), processes)) for _ in range(2))
    assert first == second
    assert first.count(True) == 1


def test_a_turn_that_has_run_out_goes_to_one_other(runtime: Runtime, process: Callable[[], Turns]) -> None:
    assert process().take("chore", 60)
    set_turn(runtime, until=ago(5))
    others = [process() for _ in range(30)]
    with ThreadPoolExecutor(30) as threads:
        assert list(threads.map(lambda turns: turns.take("chore", 60), others)).count(True) == 1


def test_a_turn_that_is_given_back_is_free_at_once(process: Callable[[], Turns]) -> None:
    holder, other = process(), process()
    assert holder.take("chore", 60)
    other.give_back("chore")
    assert not other.take("chore", 60)
    holder.give_back("chore")
    assert other.take("chore", 60)


def test_each_chore_has_its_own_turn(process: Callable[[], Turns]) -> None:
    assert process().take("chore", 60)
    assert process().take("another", 60)


@table(
    "fields",
    ("a time in the year 3000", {"until": datetime(3000, 1, 1)}),
    ("text instead of a time", {"until": "later"}),
    ("nothing at all", {"until": None, "holder": None}),
)
def test_a_damaged_turn_is_free(runtime: Runtime, process: Callable[[], Turns], fields: dict[str, Any]) -> None:
    assert process().take("chore", 60)
    set_turn(runtime, **fields)
    assert process().take("chore", 60)


def test_queues_are_registered_once(process: Callable[[], Turns]) -> None:
    for queue in ("ai_jobs", "an.other$queue", "ai_jobs"):
        process().register(queue)
    assert sorted(process().queues()) == ["ai_jobs", "an.other$queue"]


# ── lost messages ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def search(runtime: Runtime) -> LostMessages:
    runtime.turns.register(runtime.settings.celery_queue_name)
    return runtime.lost_messages


class Search:
    """Goes on with a runtime's search, so many seconds later each time."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self._now = runtime, runtime.store.now()

    def __call__(self, seconds: float = 0) -> list[ObjectId]:
        self._now += timedelta(seconds=seconds)
        lost, _priority = self._runtime.lost_messages.find(self._now, self._runtime.store.pending_ids)
        return lost


@pytest.fixture
def find(runtime: Runtime, search: LostMessages) -> Search:
    return Search(runtime)


def enqueue(runtime: Runtime, job_id: ObjectId, priority: int | None = None) -> None:
    """As the API does."""
    runtime.broker.send(job_id, data={"job_type": "text_generation"}, priority=priority)


def take_one(runtime: Runtime) -> None:
    """Lets the next message come out of the queue, as a worker does."""
    with runtime.broker.connection() as connection:
        message = connection.default_channel.basic_get(runtime.settings.celery_queue_name, no_ack=True)
        arguments, _, _ = message.payload
    deliver(runtime, *arguments)


def test_a_job_that_is_pending_for_a_minute_while_nothing_is_queued_has_no_message(
    runtime: Runtime, find: Search
) -> None:
    job_id = insert(runtime, created_at=datetime(3000, 1, 1))  # the API's clock doesn't matter
    assert (find(), find(59), find(2)) == ([], [], [job_id])


def test_no_message_is_lost_as_long_as_no_queue_is_known(runtime: Runtime) -> None:
    insert(runtime)
    find = Search(runtime)
    assert (find(), find(61), find(61)) == ([], [], [])


def test_a_job_that_has_started_meanwhile_is_not_lost(runtime: Runtime, find: Search) -> None:
    job_id = insert(runtime)
    find()
    claim(runtime, job_id)
    assert find(61) == []


def test_a_job_behind_a_backlog_is_not_lost_until_the_marker_behind_it_came_out(runtime: Runtime, find: Search) -> None:
    jobs = [insert(runtime) for _ in range(3)]
    lost = insert(runtime)
    for job_id in jobs:
        enqueue(runtime, job_id)
    find()
    assert [find(61), find(61), find(61)] == [[], [], []]
    assert len(queued(runtime)) == 4, "one marker, not one copy a job"
    for _ in range(4):
        assert find() == []
        take_one(runtime)
    assert find(1) == [lost]
    assert queued(runtime) == []


def test_each_priority_in_use_gets_a_marker_and_a_rescue_goes_behind_them(
    runtime: Runtime, search: LostMessages
) -> None:
    for priority in (0, 9):
        enqueue(runtime, insert(runtime), priority)
    lost, now = insert(runtime), runtime.store.now()
    for seconds in (0, 61):
        search.find(now + timedelta(seconds=seconds), runtime.store.pending_ids)
    queue = runtime.settings.celery_queue_name
    assert [runtime.redis.llen(f"{queue}{suffix}") for suffix in ("", "\x06\x169")] == [2, 2]
    take_one(runtime)
    take_one(runtime)  # the marker of the first list
    enqueue(runtime, insert(runtime), 9)
    assert search.find(now + timedelta(seconds=70), runtime.store.pending_ids)[0] == []
    for _ in range(2):
        take_one(runtime)
    assert search.find(now + timedelta(seconds=80), runtime.store.pending_ids) == ([lost], 9)


def test_a_marker_that_was_lost_itself_is_waited_for_for_an_hour(runtime: Runtime, find: Search) -> None:
    lost, waiting = insert(runtime), insert(runtime)
    enqueue(runtime, waiting)
    find()
    find(61)
    runtime.redis.delete(runtime.settings.celery_queue_name)
    enqueue(runtime, waiting)
    assert find(3500) == []
    assert set(find(200)) == {lost, waiting}


def test_a_job_gets_one_copy_on_a_suspicion_and_another_only_once_it_is_certain(runtime: Runtime, find: Search) -> None:
    job_id = insert(runtime)
    enqueue(runtime, job_id)
    for expected in ([job_id], [], []):
        find()
        find(61)
        assert find(3601) == expected
    runtime.redis.delete(runtime.settings.celery_queue_name)
    find()
    assert find(61) == [job_id]


def test_a_queue_that_no_worker_has_taken_jobs_from_for_a_day_is_in_no_searchs_way(
    runtime: Runtime, find: Search
) -> None:
    runtime.turns.register("abandoned")
    runtime.database["worker_turns"].update_one({"_id": "queue:abandoned"}, {"$set": {"seen_at": ago(90_000)}})
    runtime.broker.send(ObjectId(), "abandoned")
    job_id = insert(runtime)
    find()
    assert find(61) == [job_id]
    runtime.redis.delete("abandoned")


def test_a_marker_of_a_former_search_proves_nothing(runtime: Runtime, find: Search) -> None:
    job_id = insert(runtime)
    enqueue(runtime, job_id)
    find()
    find(61)
    runtime.lost_messages.receive(ObjectId(), runtime.settings.celery_queue_name)
    assert find(1) == []


def test_no_message_is_lost_that_waits_in_another_queue_of_the_database(runtime: Runtime, find: Search) -> None:
    runtime.turns.register("another")
    insert(runtime)
    runtime.broker.send(ObjectId(), "another")
    find()
    assert find(61) == []
    assert [len(queued(runtime)), runtime.redis.llen("another")] == [0, 2]
    runtime.redis.delete("another")


@table(
    "state",
    ("text for a time", {"noted_at": "yesterday", "ids": []}),
    ("a time to come", {"noted_at": datetime(3000, 1, 1), "ids": []}),
    ("no ids", {"noted_at": datetime(2026, 1, 1), "ids": "none"}),
)
def test_a_damaged_search_begins_anew(runtime: Runtime, find: Search, state: dict[str, Any]) -> None:
    job_id = insert(runtime)
    runtime.database["worker_turns"].insert_one({"_id": "lost_messages", **state})
    find()
    find()
    assert find(61) == [job_id]


@table("data", ("a marker", {"marker": "ai_jobs:0"}), ("a copy", dict(COPY)))
def test_a_message_of_the_workers_own_says_the_same_when_it_is_delivered_again(data: dict[str, Any]) -> None:
    assert carried_data(own_arguments(ObjectId(), **data)) == data
    assert carried_data((str(ObjectId()), {"job_id": "x", "input_data": {"prompt": "planted"}})) == {}


def test_a_marker_waits_for_mongodb_without_becoming_a_job(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise StoreUnavailable("away")

    runtime.store_patience_s, runtime.poll_store_s = 0.0, 0.01
    monkeypatch.setattr(runtime.lost_messages, "receive", refuse)
    marker = ObjectId()
    with pytest.raises(Retry) as retried:
        deliver(runtime, str(marker), {"marker": "ai_jobs:0"})
    again: Any = retried.value
    assert again.sig.args == own_arguments(marker, marker="ai_jobs:0")


def test_a_copy_that_comes_after_the_original_publishes_nothing_again(runtime: Runtime, notices: Notices) -> None:
    job_id = insert(runtime)
    deliver(runtime, str(job_id), {"job_id": str(job_id), "job_type": TEXT})
    runtime.keeper.tick()
    deliver(runtime, str(job_id), {"job_id": str(job_id), **COPY})
    deliver(runtime, insert(runtime))
    assert [notice["status"] for notice in notices.statuses(4)] == ["processing", "completed"] * 2


def test_a_copy_runs_its_job_and_the_late_original_publishes_nothing_again(runtime: Runtime, notices: Notices) -> None:
    job_id = insert(runtime)
    deliver(runtime, str(job_id), {"job_id": str(job_id), **COPY})
    runtime.keeper.tick()  # which takes the notice out of the outbox
    for _ in range(2):
        assert deliver(runtime, str(job_id), {"job_id": str(job_id), "job_type": TEXT})["status"] == "completed"
    other = insert(runtime)
    deliver(runtime, other)
    assert [notice["status"] for notice in notices.statuses(4)] == ["processing", "completed"] * 2
