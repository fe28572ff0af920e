"""What a page is sent while jobs run: statuses, and texts as they grow. It listens to both channels of the worker."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from fastapi.concurrency import run_in_threadpool
from pymongo.errors import PyMongoError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from examples.api.jobs import Document, Owner

STATUS_CHANNEL, PROGRESS_CHANNEL = "job_notifications", "job_progress"
KEPT_TEXTS = 1000
READ_EVERY_S = 10.0  # in case that a notification was missed

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Text:
    """What an attempt has written so far."""

    attempt: int = 0
    pieces: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "".join(self.pieces)


NOTHING = Text()


def event(name: str, data: Document) -> str:
    return f"event: {name}\ndata: {json.dumps(data, default=str)}\n\n"


@dataclass(eq=False)
class Page:
    """A page that is open: what it was sent, and whether there is more."""

    owner: Owner
    has_news: asyncio.Event = field(default_factory=asyncio.Event)
    must_read: bool = True  # its documents, since one of them has changed
    jobs: dict[str, Document] | None = None
    texts: dict[str, tuple[Text, int]] = field(default_factory=dict)

    def new_jobs(self, jobs: dict[str, Document]) -> Iterator[str]:
        """The event with those jobs that it was not sent as they are now."""
        if jobs != self.jobs:
            changed = [job for job_id, job in jobs.items() if job != (self.jobs or {}).get(job_id)]
            self.jobs = jobs
            yield event("jobs", {"ids": list(jobs), "changed": changed})

    def new_texts(self, texts: dict[str, Text]) -> Iterator[str]:
        """The events with those parts of running jobs' texts that it was not sent."""
        for job_id in [job_id for job_id, job in (self.jobs or {}).items() if job["status"] == "processing"]:
            text, (known, length) = texts.get(job_id, NOTHING), self.texts.get(job_id, (NOTHING, 0))
            whole, start = str(text), length if text is known else 0
            if text is not known or len(whole) > length:
                self.texts[job_id] = text, len(whole)
                yield event("text", {"id": job_id, "text": whole[start:], "begins": start == 0})


class Live:
    """Listens for all pages, and keeps the texts of running jobs for those that are loaded later.

    `newest` gets a session's jobs by id. It is called in a thread.
    """

    def __init__(self, redis_url: str, newest: Callable[[Owner], dict[str, Document]]) -> None:
        self._redis, self._newest = Redis.from_url(redis_url, health_check_interval=15), newest
        self._pages: set[Page] = set()
        self._texts: dict[str, Text] = {}
        self._is_ending = False

    async def listen(self) -> None:
        """Runs as long as the API. While Redis is away, pages show what the documents say."""
        while True:
            try:
                async with self._redis.pubsub() as channels:
                    await channels.subscribe(STATUS_CHANNEL, PROGRESS_CHANNEL)
                    while True:
                        message = await channels.get_message(timeout=READ_EVERY_S)
                        if message and message["type"] == "message":
                            self._receive(message["data"])
                        elif message:  # subscribed, perhaps once more: what was published before is lost
                            self.wake()
            except (RedisError, OSError) as error:
                logger.warning("notifications can't be received: %s", type(error).__name__)
                await asyncio.sleep(1)

    def _receive(self, data: bytes) -> None:
        with suppress(ValueError, KeyError, TypeError):  # a message of another form
            message = json.loads(data)
            owner, job_id = {name: message[name] for name in ("user_id", "session_id")}, message["job_id"]
            if message["type"] == "job_progress":
                self._add(job_id, int(message["attempt"]), int(message["sequence"]), str(message["delta"]))
                self.wake(owner, must_read=False)
            elif message["type"] == "job_status_update":
                self._texts.pop(job_id, None)  # an attempt begins or has ended
                self.wake(owner)

    def _add(self, job_id: str, attempt: int, sequence: int, delta: str) -> None:
        """Adds a piece of text. They are numbered from 0 in each attempt. Behind a gap nothing is added."""
        text = self._texts.get(job_id, NOTHING)
        last = len(text.pieces) - 1
        if sequence == 0 and attempt >= text.attempt:
            self._texts[job_id] = Text(attempt, [delta])
        elif attempt == text.attempt and sequence in (last, last + 1):
            # The last piece comes again, with more in it, if the worker can't know that it was received.
            text.pieces[sequence:] = [delta]
        while len(self._texts) > KEPT_TEXTS:
            del self._texts[next(iter(self._texts))]

    def wake(self, owner: Owner | None = None, *, must_read: bool = True) -> None:
        """Lets the pages of a session, or all pages, have what is new."""
        for page in self._pages:
            if owner in (None, page.owner):
                page.must_read = page.must_read or must_read
                page.has_news.set()

    def end(self) -> None:
        """Ends all streams, for which a server waits when it shuts down."""
        self._is_ending = True
        self.wake()

    async def stream(self, owner: Owner) -> AsyncIterator[str]:
        """Server-sent events: `jobs` when documents have changed, `text` when texts have grown.

        Each time a page is sent what it hasn't got yet. One that was just loaded has got nothing, so it is sent the
        texts so far in the same way as all that follows: no piece is lost or doubled in between.
        """
        self._pages.add(page := Page(owner))
        try:
            yield "retry: 1000\n\n"  # ms until the browser connects again
            while not self._is_ending:
                page.has_news.clear()
                if page.must_read:
                    page.must_read = False
                    for sent in page.new_jobs(await run_in_threadpool(self._newest, owner)):
                        yield sent
                for sent in page.new_texts(self._texts):
                    yield sent
                try:
                    async with asyncio.timeout(READ_EVERY_S):  # wait_for of Python 3.11 may swallow a cancel
                        await page.has_news.wait()
                except TimeoutError:
                    page.must_read = True
                    yield ": still here\n\n"
        except PyMongoError:
            return  # the browser connects again
        finally:
            self._pages.discard(page)
