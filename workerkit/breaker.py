"""What the jobs of a process do while their provider is away: one tries at a time, and the others wait."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator

from workerkit.errors import JobError, ProviderAway


class Breaker:
    """After some failures in a row, lets one job at a time try whether the provider is back; the others wait.

    `failures_before_pause` is the number of those failures, `max_pause_s` the longest pause between two tries.
    """

    POLL_S = 0.5

    def __init__(self, failures_before_pause: int = 3, max_pause_s: float = 30.0) -> None:
        self._failures_before_pause, self._max_pause_s = failures_before_pause, max_pause_s
        self._failures, self._sentence = 0, ""
        self._paused_at = 0.0
        self._resume_at = 0.0

    async def wait(self, patience_s: float) -> None:
        """Waits while the provider is away.

        Raises:
            ProviderAway: it still is after `patience_s` seconds; this doesn't count as a try.
        """
        give_up_at = time.monotonic() + patience_s
        while (pause_s := self._resume_at - time.monotonic()) > 0:
            if time.monotonic() >= give_up_at:
                raise ProviderAway("the provider is away", self._sentence, pause_s, is_counted=False)
            await asyncio.sleep(min(pause_s, patience_s, self.POLL_S))
        self._pause()  # until this job's try has ended, the others wait

    def _pause(self) -> None:
        if self._failures >= self._failures_before_pause:
            self._paused_at = time.monotonic()
            pause_s = 2.0 ** min(10, self._failures - self._failures_before_pause)
            self._resume_at = self._paused_at + min(self._max_pause_s, pause_s)

    def _reached(self) -> None:
        self._failures, self._resume_at = 0, 0.0

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Counts how calls end. A failure doesn't count if its call began before the pause."""
        began_at = time.monotonic()
        try:
            yield
        except ProviderAway as error:
            self._sentence = error.sentence
            if began_at >= self._paused_at:
                self._failures += 1
                self._pause()
            raise
        except JobError:  # the provider was reached, whatever it answered
            self._reached()
            raise
        self._reached()
