"""Whose turn a chore is, of all processes that share a database, and which queues these take jobs from.

It is in the collection `worker_turns`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from pymongo.errors import DuplicateKeyError

from workerkit.errors import Document
from workerkit.mongodb import unknown_when_unreachable
from workerkit.values import as_time

if TYPE_CHECKING:
    from pymongo.database import Database

QUEUE = "queue:"


class Turns:
    """Takes and gives back turns by compare-and-set, so that one process at a time has each.

    All methods raise StoreUnavailable.
    """

    MAX_S = 7200.0  # a document that says more is damaged

    def __init__(self, database: Database[Document], now: Callable[[], datetime]) -> None:
        self._turns, self._now = database["worker_turns"], now
        self._holder = secrets.token_hex(8)

    def take(self, chore: str, for_s: float) -> bool:
        """Takes a turn that is free, or prolongs one that this process has. False: another process has it."""
        now = self._now()
        turn = {"holder": self._holder, "until": now + timedelta(seconds=for_s)}
        with unknown_when_unreachable():
            seen = self._turns.find_one({"_id": chore})
            if seen is None:
                try:
                    self._turns.insert_one({"_id": chore, **turn})
                except DuplicateKeyError:
                    return False
                return True
            latest = now + timedelta(seconds=self.MAX_S)
            until = as_time(seen.get("until"), latest)
            if until and until > now and seen.get("holder") != self._holder:
                return False
            damaged = {"$or": [{"until": {"$not": {"$type": "date"}}}, {"until": {"$gt": latest}}]}
            unchanged = {"until": seen["until"]} if until else damaged
            return self._turns.update_one({"_id": chore, **unchanged}, {"$set": turn}).matched_count == 1

    def give_back(self, chore: str) -> None:
        """Lets another process take the turn at once. Nothing happens if this process doesn't have it."""
        with unknown_when_unreachable():
            self._turns.update_one({"_id": chore, "holder": self._holder}, {"$set": {"until": self._now()}})

    def register(self, queue: str) -> None:
        """Notes a queue from which a worker takes jobs of this database. It is to be repeated every hour or so."""
        with unknown_when_unreachable():
            self._turns.update_one({"_id": f"{QUEUE}{queue}"}, {"$set": {"seen_at": self._now()}}, upsert=True)

    def queues(self) -> list[str]:
        """The queues that were registered within the last day."""
        lately = {"_id": {"$regex": f"^{QUEUE}"}, "seen_at": {"$gt": self._now() - timedelta(days=1)}}
        with unknown_when_unreachable():
            return [turn["_id"].removeprefix(QUEUE) for turn in self._turns.find(lately)]


class EveryTurn(Turns):
    """Gives every turn at once: to somebody who does a chore by hand, whoever else does it."""

    def take(self, chore: str, for_s: float) -> bool:
        return True

    def give_back(self, chore: str) -> None:
        return None
