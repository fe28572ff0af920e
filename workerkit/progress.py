"""A text that grows, streamed in batches to whoever listens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable


class Progress:
    """Streams a text to its subscribers: the first piece at once, then a batch every `batch_s` seconds.

    `publish` takes a number and a piece, and says whether a subscriber received it. A piece that none received is sent
    again with the next one, at the earliest `recheck_s` seconds later. `may_publish` says whether a try is worth a
    thread. Use it on the event loop only.
    """

    def __init__(
        self,
        publish: Callable[[int, str], bool],
        may_publish: Callable[[], bool],
        recheck_s: float,
        batch_s: float = 0.05,
    ) -> None:
        self._publish, self._may_publish, self._recheck_s, self._batch_s = publish, may_publish, recheck_s, batch_s
        self._pending: list[str] = []
        self._sequence = 0
        self._flusher: asyncio.Task[None] | None = None
        self._finished = asyncio.Event()

    def __call__(self, delta: str) -> None:
        self._pending.append(delta)
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.get_running_loop().create_task(self._flush())

    async def _flush(self) -> None:
        while self._pending:
            is_last = self._finished.is_set()
            was_received = await self._send()
            if is_last:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._batch_s if was_received else self._recheck_s):
                    await self._finished.wait()

    async def _send(self) -> bool:
        if not self._may_publish():
            return False
        count = len(self._pending)
        delta = "".join(self._pending[:count])
        was_received = await asyncio.to_thread(self._publish, self._sequence, delta)
        if was_received:
            del self._pending[:count]
            self._sequence += 1
        return was_received

    async def finish(self) -> None:
        """Sends what is left, so that no progress follows the final status."""
        self._finished.set()
        if self._flusher:
            await self._flusher

    def stop(self) -> None:
        """Sends nothing more."""
        if self._flusher:
            self._flusher.cancel()
