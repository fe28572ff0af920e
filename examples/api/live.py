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
class GrowingText:
    """What an attempt has written so far, by the rules of docs/contract.md."""

    attempt: int = 0
    pieces: list[str] = field(default_factory=list)

    def add(self, attempt: int, sequence: int, delta: str) -> bool:
        """Puts a piece in the place of the one of its number and of all behind it. Behind a gap nothing is added.

        Pieces are numbered from 0 in each attempt. Returns whether the text has changed.
        """
        pieces = self.pieces if attempt == self.attempt else []
        if attempt < self.attempt or sequence > len(pieces):
            return False
        self.attempt, self.pieces = attempt, [*pieces[:sequence], delta]
        return True

    def __str__(self) -> str:
        return "".join(self.pieces)


NOTHING = GrowingText()


def event(name: str, data: Document) -> str:
    return f"event: {name}\ndata: {json.dumps(data, default=str)}\n\n"


@dataclass(eq=False)
class Page:
    """A page that is open: what it was sent, and whether there is more."""

    owner: Owner
    has_news: asyncio.Event = field(default_factory=asyncio.Event)
    must_read: bool = True  # its documents, since one of them has changed
    jobs: dict[str, Document] | None = None
    texts: dict[str, tuple[GrowingText, str]] = field(default_factory=dict)

    def new_jobs(self, jobs: dict[str, Document]) -> Iterator[str]:
        """The event with those jobs that it was not sent as they are now."""
        if jobs != self.jobs:
            changed = [job for job_id, job in jobs.items() if job != (self.jobs or {}).get(job_id)]
            self.jobs = jobs
            yield event("jobs", {"ids": list(jobs), "changed": changed})

    def new_texts(self, texts: dict[str, GrowingText]) -> Iterator[str]:
        """The events with those parts of running jobs' texts that it was not sent."""
        for job_id in [job_id for job_id, job in (self.jobs or {}).items() if job["status"] == "processing"]:
            text, (known, sent) = texts.get(job_id, NOTHING), self.texts.get(job_id, (NOTHING, ""))
            whole = str(text)
            if text is not known or whole != sent:
                begins = text is not known or not whole.startswith(sent)
                self.texts[job_id] = text, whole
                yield event("text", {"id": job_id, "text": whole if begins else whole[len(sent) :], "begins": begins})


class Live:
    """Listens for all pages, and keeps the texts of running jobs for those that are loaded later.

    `newest` gets a session's jobs by id. It is called in a thread.
    """

    def __init__(self, redis_url: str, newest: Callable[[Owner], dict[str, Document]]) -> None:
        self._redis, self._newest = Redis.from_url(redis_url, health_check_interval=15), newest
        self._pages: set[Page] = set()
        self._texts: dict[str, GrowingText] = {}
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
                self._texts.pop(job_id, None)  # an attempt begins, or the document has the whole
                self.wake(owner)

    def _add(self, job_id: str, attempt: int, sequence: int, delta: str) -> None:
        """Adds a piece to a job's text, and forgets the oldest texts where there are too many."""
        text = self._texts.get(job_id) or GrowingText()
        if text.add(attempt, sequence, delta):
            self._texts[job_id] = text
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
                # A text that ended meanwhile stays on the page until its document was read.
                for sent in () if page.must_read else page.new_texts(self._texts):
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
