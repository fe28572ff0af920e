"""Chores that are done together, each on its own: a fault of one costs only that one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from workerkit.errors import NotesUnavailable, StoreRefused, StoreUnavailable
from workerkit.logs import RepeatedFaultLog, place_of

Chore = Callable[[list[str]], None]


class Chores:
    """Each chore is a function that adds a line for each thing done, under the words that say what its fault means."""

    hang_s = 1.0  # a server that let a chore wait so long before it failed would do so with the next chore

    def __init__(self, chores: Mapping[str, Chore]) -> None:
        self._chores = [(RepeatedFaultLog(fault), chore) for fault, chore in chores.items()]

    def do(self, done: list[str]) -> bool:
        """Does all of them, and says whether that went well.

        Raises:
            StoreUnavailable: MongoDB can't be reached.
        """
        is_well = True
        for log, chore in list(self._chores):
            began_at = time.monotonic()
            if (fault := fault_of(chore, done)) is None:
                log.over()
                continue
            log.fault(fault)
            is_well = False
            if time.monotonic() > began_at + self.hang_s:  # there are more urgent things to do than to wait
                self._chores.remove((log, chore))
                self._chores.append((log, chore))  # so that it can't keep the others from their turn for ever
                break
        return is_well


def fault_of(chore: Chore, done: list[str]) -> str | None:
    try:
        chore(done)
    except (NotesUnavailable, StoreRefused) as error:
        return str(error)
    except StoreUnavailable:
        raise
    except Exception as error:  # the broker's own errors, and defects
        return f"{type(error).__name__} at {place_of(error)}"
    return None
