"""The workers of the queue: how many answer Celery's remote control, and how many jobs they can run at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from worker import Runtime, app
from workerkit.values import as_mapping, as_number

ANSWER_S = 1.0  # for which answers are awaited, since nobody knows how many will come


@dataclass(frozen=True)
class Fleet:
    """The workers that answered. `others` take no jobs from this queue."""

    names: tuple[str, ...] = ()
    slots: int = 0
    others: int = 0


def slots_of(stats: Any) -> int:
    """The jobs that a worker runs at a time, as it says itself."""
    return as_number(as_mapping(as_mapping(stats).get("pool")).get("max-concurrency")) or 1


def queues_of(answer: Any) -> set[object]:
    queues = answer if isinstance(answer, list) else []
    return {as_mapping(queue).get("name") for queue in queues}


def ask(connection: Any, command: str, **options: Any) -> list[tuple[str, Any]]:
    """The workers' answers, each with the worker's name. Two workers of one name are two."""
    replies = app.control.broadcast(command, reply=True, timeout=ANSWER_S, connection=connection, **options) or []
    return [(str(name), answer) for reply in replies for name, answer in as_mapping(reply).items()]


def ask_fleet(runtime: Runtime) -> Fleet:
    """Asks all workers of the broker, which takes a second. A busy worker of the solo pool can't answer.

    Raises the broker's errors.
    """
    queue = runtime.settings.celery_queue_name
    with runtime.broker.connection() as connection:
        stats = ask(connection, "stats")
        named = {"destination": [name for name, _ in stats], "limit": len(stats)}
        queues = dict(ask(connection, "active_queues", **named)) if stats else {}
    ours = [(name, said) for name, said in stats if name not in queues or queue in queues_of(queues[name])]
    slots = sum(slots_of(said) for _, said in ours)
    return Fleet(tuple(name for name, _ in ours), slots, len(stats) - len(ours))


def count_alive(names: Iterable[str], busy_nodes: Mapping[str, int]) -> int:
    """The workers that answered, and those that don't but hold the leases of running jobs.

    The name of a worker that `run` has started ends with the same letters as its node. Another name can't be
    compared, so it may be that of any node.
    """
    answered = list(names)
    marks = {name.partition("@")[0].rpartition("-")[2] for name in answered if name.startswith("worker-")}
    silent = sum(node.rpartition("-")[2] not in marks for node in busy_nodes)
    return len(answered) + max(0, silent - (len(answered) - len(marks)))


def sign_of_life(fleet: Fleet, *, is_swept: bool) -> int:
    """1 if none answers at all, but lost jobs are looked for: a worker is alive whose remote control is refused."""
    return int(is_swept and not fleet.names and not fleet.others)
