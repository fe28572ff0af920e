"""The search for jobs whose message the broker has lost.

A broker can't be asked whether it still has the message of a job. But what waits in a list comes out in its order. So
the search notes which jobs are pending, and a minute later sees which of them still are. Where no list of a queue holds
a message by then, theirs are lost. Else a marker goes into each list, behind all that waits there: jobs that are
pending even when the last marker has come out have no message. No clock of an API's host matters for this, and a
backlog costs one message a list, not one a job.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from bson import ObjectId

from workerkit.bookkeeping import CLOCK_TOLERANCE_S
from workerkit.broker import Broker, QueueList
from workerkit.errors import Document
from workerkit.mongodb import unknown_when_unreachable
from workerkit.turns import Turns
from workerkit.values import as_time

if TYPE_CHECKING:
    from pymongo.database import Database


@dataclass(frozen=True)
class Search:
    """How far the search has got: when it noted the pending jobs, when it sent markers, and whether all came out."""

    noted_at: datetime
    sent_at: datetime | None
    is_out: bool


class LostMessages:
    """The search, whose state is in one document that the sweepers of a database hand on.

    All methods raise StoreUnavailable.
    """

    overdue_s = 60.0  # until a message that hasn't come may be lost
    marker_overdue_s = 3600.0  # until a marker that hasn't come out counts as lost
    STATE: ClassVar = {"_id": "lost_messages"}

    def __init__(self, database: Database[Document], turns: Turns, broker: Broker) -> None:
        self._state, self._turns, self._broker = database["worker_turns"], turns, broker

    def find(
        self, now: datetime, find_pending: Callable[[Sequence[ObjectId] | None], list[ObjectId]]
    ) -> tuple[list[ObjectId], int | None]:
        """Goes on with the search. Returns the jobs whose message is lost, and the priority of the last in the queues.

        `find_pending` returns the ids of pending jobs: of all, or of some that are given. Raises the broker's errors.
        """
        search = self._read(now)
        if search is None:
            if ids := find_pending(None):
                self._write({"ids": ids, "noted_at": now, "copied": self._ids("copied")})
        elif now > search.noted_at + timedelta(seconds=self.overdue_s):
            if not (ids := find_pending(self._ids("ids"))):
                self._end()
                return [], None
            if not (queues := self._turns.queues()):  # then it is unknown where messages may wait
                return [], None
            lists = [each for queue in queues for each in self._broker.lists_in_use(queue)]
            is_certain = search.is_out or not lists
            if is_certain or (search.sent_at and now > search.sent_at + timedelta(seconds=self.marker_overdue_s)):
                # On a suspicion each job gets one copy, and no other one before it is certain.
                copied = set() if is_certain else set(self._ids("copied"))
                self._end([] if is_certain else ids)
                priority = max((each.priority for each in lists if each.priority), default=None)
                return [each for each in ids if each not in copied], priority
            if not search.sent_at:
                self._send_markers(ids, lists, search.noted_at, now)
        return [], None

    def receive(self, marker: ObjectId, list_name: str) -> None:
        """Notes that the marker has come out of a list. Nothing happens if it belongs to another search."""
        with unknown_when_unreachable():
            self._state.update_one({**self.STATE, "marker": marker}, {"$pull": {"waiting_in": list_name}})

    def _send_markers(
        self, ids: Sequence[ObjectId], lists: Sequence[QueueList], noted_at: datetime, now: datetime
    ) -> None:
        marker, names = ObjectId(), [each.name for each in lists]
        state = {"ids": list(ids), "noted_at": noted_at, "copied": self._ids("copied")}
        self._write({**state, "marker": marker, "sent_at": now, "waiting_in": names})
        try:
            with self._broker.connection() as connection:
                for each in lists:
                    data = {"marker": each.name}
                    self._broker.send(marker, each.queue, connection, data=data, priority=each.priority)
        except self._broker.errors:
            self._end()  # a marker that came out alone would prove nothing
            raise

    def _read(self, now: datetime) -> Search | None:
        """The search that is under way. A damaged one counts as none."""
        with unknown_when_unreachable():
            found = self._state.find_one(self.STATE, {"ids": 0, "copied": 0}) or {}
        latest = now + timedelta(seconds=CLOCK_TOLERANCE_S)
        noted_at, sent_at = (as_time(found.get(name), latest) for name in ("noted_at", "sent_at"))
        return Search(noted_at, sent_at, found.get("waiting_in") == []) if noted_at else None

    def _ids(self, name: str) -> list[ObjectId]:
        with unknown_when_unreachable():
            found: Any = (self._state.find_one(self.STATE, {name: 1}) or {}).get(name)
        return [each for each in found if isinstance(each, ObjectId)] if isinstance(found, list) else []

    def _write(self, state: Document) -> None:
        with unknown_when_unreachable():
            self._state.replace_one(self.STATE, state, upsert=True)

    def _end(self, copied: Sequence[ObjectId] = ()) -> None:
        """Ends the search, so that the next one begins. It goes on to know which jobs have a copy on a suspicion."""
        self._write({"copied": list(copied)})
