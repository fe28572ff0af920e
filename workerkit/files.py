"""The search for stored files that no job names any more. A file's name begins with the id of its job."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from bson import ObjectId

from workerkit.artifacts import Artifacts
from workerkit.errors import FailJob, StoreUnavailable
from workerkit.logs import logger
from workerkit.turns import Turns


class FileSweeper:
    """Deletes files that attempts which died left behind, and files past `ARTIFACT_RETENTION_DAYS`.

    `find_unreferenced` returns those of some names whose jobs have ended without naming them.
    """

    EVERY_S = 3600.0
    TURN = "files"
    BATCH = 100
    NAME = re.compile(r"[0-9a-f]{24}-[0-9a-f]{16}\.")

    def __init__(
        self,
        artifacts: Callable[[], Artifacts],
        find_unreferenced: Callable[[Sequence[str]], list[str]],
        turns: Turns,
        now: Callable[[], datetime],
        retention_days: float,
    ) -> None:
        self._artifacts, self._find_unreferenced, self._turns = artifacts, find_unreferenced, turns
        self._now, self._retention_days = now, retention_days
        self._next_at = 0.0

    def sweep_if_due(self) -> None:
        """Sweeps every hour, if it is this process's turn among all that share the database.

        It does so in a thread of its own: a slow artifact store must not cost leases. Raises StoreUnavailable.
        """
        if time.monotonic() < self._next_at:
            return
        self._next_at = time.monotonic() + self.EVERY_S
        if self._turns.take(self.TURN, self.EVERY_S):
            threading.Thread(target=self.sweep_and_log, name="files", daemon=True).start()

    def sweep_and_log(self) -> None:
        try:
            for line in self.sweep():
                logger.info(line)
        except (StoreUnavailable, FailJob) as error:
            logger.warning("the next search for files of lost attempts is in an hour: %s", error)

    def sweep(self, *, all_files: bool = False) -> list[str]:
        """One search; returns a line that says how many files were deleted.

        An id begins with the time. So without retention only the files of the last day are listed, unless `all_files`
        are asked for.

        Raises:
            StoreUnavailable: MongoDB or the artifact store can't be reached, or refuses.
        """
        artifacts, now, kept_days = self._artifacts(), self._now(), self._retention_days
        oldest = ObjectId.from_datetime(now - timedelta(days=kept_days)) if kept_days else ObjectId("0" * 24)
        period = int(now.timestamp()) >> 16  # the first four of the 24 digits change every 18 hours
        prefixes = [""] if all_files or kept_days else [f"{period - 1:04x}", f"{period:04x}"]
        names = (name for prefix in prefixes for name in artifacts.names(prefix) if self.NAME.match(name))
        deleted = 0
        while batch := list(itertools.islice(names, self.BATCH)):
            for name in {*self._find_unreferenced(batch), *(name for name in batch if name < str(oldest))}:
                artifacts.delete(name)
                deleted += 1
        return [f"{deleted} file(s) deleted that no job names or that are too old"] if deleted else []
