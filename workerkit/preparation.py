"""What a worker notes and makes in the database before it can rely on it: its queue, and the indexes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pymongo

from workerkit.errors import StoreRefused, StoreUnavailable
from workerkit.logs import logger
from workerkit.turns import Turns


class Preparation:
    """Registers the queue every hour, and makes the indexes; a minute later once more if that fails."""

    EVERY_S, AGAIN_S = 3600.0, 60.0
    INDEX_PATIENCE_S = 3600.0

    def __init__(self, turns: Turns, queue: str, ensure_indexes: Callable[[], None]) -> None:
        self._turns, self._queue, self._ensure_indexes = turns, queue, ensure_indexes
        self._next_at = 0.0
        self.has_indexes = False

    def do_if_due(self) -> None:
        """Raises StoreUnavailable: the queue can't be registered. It is tried again at the next call."""
        if time.monotonic() < self._next_at:
            return
        try:
            self._turns.register(self._queue)
        except StoreRefused as refusal:  # it costs only what is done for the queue by workers of other queues
            logger.warning("the queue can't be registered: %s", refusal)
        self._next_at = time.monotonic() + self.EVERY_S
        if not self.has_indexes:
            # In a thread of its own: on a large collection this takes longer than leases can wait.
            threading.Thread(target=self._make_indexes, name="indexes", daemon=True).start()

    def _make_indexes(self) -> None:
        try:
            with pymongo.timeout(self.INDEX_PATIENCE_S):
                self._ensure_indexes()
        except StoreUnavailable as error:
            logger.warning("indexes could not be made (%s): the worker runs without them, more slowly", error)
            self._next_at = time.monotonic() + self.AGAIN_S
        else:
            self.has_indexes = True
