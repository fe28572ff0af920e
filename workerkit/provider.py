"""Any OpenAI-compatible server: one call, its answer, and what the two sides had to agree on.

What a refusal means is in refusals.py, what is asked for instead in negotiation.py, how an answer is read in
answers.py.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import importlib
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, Protocol, TypeVar

from workerkit.answers import (
    WEB_PAGE,
    Answer,
    Completion,
    EventReader,
    OnlyThought,
    TextAnswer,
    is_json,
    is_web_page,
    parse_documents,
    parse_event,
    parse_json,
)
from workerkit.breaker import Breaker
from workerkit.client import connection_watched, open_session, provider_errors
from workerkit.errors import Document, FailJob, JobError, OperatorFault, RetryJob
from workerkit.logs import logger
from workerkit.media import decode_picture
from workerkit.models import Choices, Offered, choose, parse_models
from workerkit.negotiation import EFFORT, Learnt, Negotiation
from workerkit.pictures import PictureFetcher, origin_of, origins_of
from workerkit.proxies import proxy_for
from workerkit.refusals import IN_ANSWER, FieldRefused, ModelGone, Unexplained, is_error, judge, read_refusal
from workerkit.sentences import NO_PICTURE, NO_SOUND, UNUSABLE
from workerkit.settings import OPENAI_URL, PROVIDER_KINDS, ProviderKind, ProviderSettings, Settings, redact_url

Made = TypeVar("Made")


class Provider(Protocol):
    """Makes text, pictures and speech. Requests have the OpenAI API's fields.

    `ours` are fields that the job didn't ask for: where the server refuses one, another value or none is sent.
    Every method raises RetryJob or FailJob, and no other error.
    """

    async def ready(self, patience_s: float) -> None:
        """Waits while the provider is away, for at most so many seconds. Raises RetryJob: it is still away."""

    async def with_model(self, where: ProviderSettings) -> ProviderSettings:
        """The same settings with a model: the one that is set, else one that the server offers."""

    async def text(
        self, request: Document, on_delta: Callable[[str], None], ours: Document | None = None
    ) -> TextAnswer:
        """The whole text; `on_delta` is called with each piece as it arrives."""

    async def image(self, request: Document, ours: Document | None = None) -> tuple[bytes, str]:
        """The picture's bytes, and the model that made it."""

    async def speech(self, request: Document, ours: Document | None = None) -> tuple[bytes, str]:
        """The sound's bytes, and the model that made it."""

    async def close(self) -> None:
        """Closes its connections."""


MAX_REFUSAL_BYTES = 2**18
READ_TO_END_S, AFTER_THE_END_S = 0.25, 2.0
BLANK = codecs.BOM_UTF8 + b" \t\r\n"
NEGOTIABLE = (FieldRefused, ModelGone, Unexplained)  # only before the first piece of text
REDIRECTS = range(300, 400)
MODELS_S = 3.0


async def beginning_of(answer: Answer, max_bytes: int) -> bytes:
    """The first bytes of an answer that is read for its error alone."""
    data = b""
    with contextlib.suppress(RetryJob, FailJob), provider_errors():  # without a body the status alone decides
        while len(data) < max_bytes and (piece := await answer.piece()):
            data += piece
    return data[:max_bytes]


async def read_to_end(answer: Answer) -> None:
    """Reads what follows the last event, so that the connection can be used again, and hardly waits for it."""
    with contextlib.suppress(RetryJob, FailJob, TimeoutError), provider_errors():  # the text is whole already
        async with asyncio.timeout(READ_TO_END_S):
            await answer.read()


async def next_piece(answer: Answer, ends_at: float | None) -> bytes:
    """What has come in meanwhile; nothing from that time on, if a time of the event loop is given."""
    if ends_at is None:
        return await answer.piece()
    try:
        async with asyncio.timeout_at(ends_at):
            return await answer.piece()
    except TimeoutError:
        return b""


def error_within(answer: Answer, document: Any, body: Document, kind: ProviderKind) -> JobError:
    """What an error in an answer of status 200 means for the job."""
    return judge(read_refusal(IN_ANSWER, document), body, kind, answer.headers, answer.key)


def take(
    completion: Completion, on_delta: Callable[[str], None], body: Document, answer: Answer, document: Any
) -> None:
    """Adds an object of an answer to the text, and passes its piece on. Raises JobError: it is an error."""
    if is_error(document) and not completion.is_finished:
        error = error_within(answer, document, body, "text")
        raise RetryJob(error.detail) if completion.has_text and isinstance(error, NEGOTIABLE) else error
    if isinstance(document, dict) and (delta := completion.add(document)):
        on_delta(delta)


async def read_events(answer: Answer, piece: bytes, completion: Completion, take_one: Callable[[Any], None]) -> None:
    """Reads a stream to its end, and passes on each object that comes."""
    events, ends_at, length = EventReader(), None, -1
    while piece and not events.is_ended:
        for document in chain.from_iterable(map(parse_event, events.feed(piece))):
            take_one(document)
        if not completion.is_finished:
            ends_at = None
        elif completion.length > length:
            ends_at, length = asyncio.get_running_loop().time() + AFTER_THE_END_S, completion.length
        piece = await next_piece(answer, ends_at) if not events.is_ended else b""
    if events.is_ended:
        await read_to_end(answer)
    else:
        with contextlib.suppress(ValueError):  # the last event may be cut off
            for document in chain.from_iterable(map(parse_event, events.finish())):
                take_one(document)
    completion.is_marked_done, completion.is_foreign = events.is_ended, events.is_foreign


async def read_text(answer: Answer, completion: Completion, take_one: Callable[[Any], None]) -> None:
    """Reads an answer by what its bytes are: a stream, JSON, or a web page. Raises OperatorFault: it is a web page."""
    beginning = b""
    while not beginning and (piece := await answer.piece()):
        beginning = piece.lstrip(BLANK)
    if is_web_page(beginning):
        raise OperatorFault(WEB_PAGE)
    if not is_json(beginning):
        return await read_events(answer, beginning, completion, take_one)
    documents, completion.is_marked_done = parse_documents(await answer.read(beginning))
    for document in documents:
        take_one(document)


@dataclass(frozen=True)
class Memory:
    """What a process knows of its servers and their models. It outlives the event loops whose calls found it out."""

    learnt: Learnt = field(default_factory=Learnt)
    choices: Choices = field(default_factory=Choices)


class OpenAIProvider:
    """Any OpenAI-compatible server. It has to be made on the event loop that uses it."""

    def __init__(self, where: ProviderSettings, max_bytes: int, memory: Memory | None = None) -> None:
        self.session = open_session()
        base_url, mark, query = (where.base_url or OPENAI_URL).partition("?")
        self.base_url, self._query = base_url.rstrip("/"), mark + query
        self._where, self._max_bytes, memory = where, max_bytes, memory or Memory()
        self._learnt, self._choices = memory.learnt, memory.choices
        self._breaker, self._choosing = Breaker(), asyncio.Lock()
        self._proxy, parts = proxy_for(self.base_url), urllib.parse.urlsplit(self.base_url)
        self._headers = where.key_headers
        trusted = origins_of(where.picture_hosts) | {origin_of(parts)}
        self._pictures = PictureFetcher(self.session, trusted, max_bytes)

    async def close(self) -> None:
        await self.session.close()

    async def ready(self, patience_s: float) -> None:
        await self._breaker.wait(patience_s)

    @contextlib.asynccontextmanager
    async def call(
        self, method: str, path: str, body: Document | None = None, kind: ProviderKind = "text"
    ) -> AsyncIterator[Answer]:
        """Calls the provider and yields the answer, which is still to be read. Leaving early closes the connection.

        Raises:
            RetryJob, FailJob: for every error of the call and of the code that reads the answer.
        """
        with self._breaker.watch(), provider_errors():
            url = self.base_url + path + self._query
            options: Document = {"json": body, "headers": self._headers, "proxy": self._proxy}
            async with self.session.request(method, url, allow_redirects=False, **options) as response:
                with connection_watched(response):
                    answer = Answer(response, self._max_bytes, self._where.api_key)
                    if not 200 <= answer.status < 300:
                        raise await self._refusal(answer, body or {}, kind)
                    yield answer

    async def _refusal(self, answer: Answer, body: Document, kind: ProviderKind) -> JobError:
        """What an answer with an error status means for the job."""
        if answer.status in REDIRECTS:
            place = redact_url(urllib.parse.urljoin(self.base_url, answer.headers.get("location", "")))
            return OperatorFault(f"HTTP {answer.status}: the URL leads to {place}; set that in {kind.upper()}_BASE_URL")
        refusal = read_refusal(answer.status, await beginning_of(answer, MAX_REFUSAL_BYTES))
        return judge(refusal, body, kind, answer.headers, answer.key)

    async def _negotiate(
        self, kind: ProviderKind, asked: Document, ours: Document, send: Callable[[Negotiation], Awaitable[Made]]
    ) -> tuple[Made, str]:
        """Sends a request, changed after each refusal of a field, until it is answered or can't be changed.

        Returns the answer and the model that was asked.
        """
        talk = Negotiation(self._learnt, self.base_url, asked, ours, self._where)
        while True:
            talk.note_call()
            try:
                made = await send(talk)
                talk.confirm()
                return made, talk.model
            except (FieldRefused, Unexplained) as refusal:
                talk.mend(refusal)
            except OnlyThought:
                if not talk.make_room_for_thinking():
                    raise
            except RetryJob:
                talk.confirm()  # it wasn't refused, so the next attempt begins where this one ends
                raise
            except ModelGone:
                if not await self._choose_again(kind, talk):
                    raise

    async def _choose_again(self, kind: ProviderKind, talk: Negotiation) -> bool:
        """Turns to another model after the server has refused the one that was chosen. False: there is none."""
        if not talk.may_go_on or not self._choices.drop(self.base_url, kind, talk.model):
            return False
        where = await self.with_model(replace(self._where, kind=kind, model=""))
        if where.model == talk.model:  # there is no other
            return False
        talk.use_model(where.model)
        return True

    # ── models ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def models(self) -> Offered:
        """The models that the server lists. Raises RetryJob, FailJob: it lists none."""
        try:
            async with asyncio.timeout(MODELS_S), self.call("GET", "/models") as answer:
                return parse_models(await answer.json())
        except TimeoutError:
            raise RetryJob(f"no list of models within {MODELS_S:g} s") from None

    async def with_model(self, where: ProviderSettings) -> ProviderSettings:
        """The same settings with a model. Where none is set, one is chosen once, and logged as a line for `.env`.

        Raises OperatorFault: there are several to choose from, or none.
        """
        if where.model:
            return where
        async with self._choosing:  # many jobs that begin at a time need one list
            return replace(where, model=self._choices.get(self.base_url, where.kind) or await self._choose(where))

    async def _choose(self, where: ProviderSettings) -> str:
        offered = None
        with contextlib.suppress(RetryJob, FailJob):  # then the call itself shows what is wrong
            offered = await self.models()
        gone, is_certain = self._choices.gone(self.base_url), where.is_openai or offered is not None
        model = choose(where, offered, gone)
        self._choices.keep(self.base_url, where.kind, model, is_certain=is_certain)
        reason = "was chosen, since it isn't set; put this into .env" if is_certain else "is tried: no list of models"
        if model not in gone:
            logger.info("%s_MODEL=%s %s", where.kind.upper(), model, reason)
        return model

    # ── texts ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def text(
        self, request: Document, on_delta: Callable[[str], None], ours: Document | None = None
    ) -> TextAnswer:
        """The whole text, streamed where the server streams."""
        added: Document = {**(ours or {}), "stream": True, "stream_options": {"include_usage": True}}
        if self._where.reasoning_effort:
            added[EFFORT] = self._where.reasoning_effort
        answer, _ = await self._negotiate("text", request, added, lambda talk: self._complete(talk, on_delta))
        return answer

    async def _complete(self, talk: Negotiation, on_delta: Callable[[str], None]) -> TextAnswer:
        completion = Completion(talk.model)
        try:
            async with self.call("POST", "/chat/completions", talk.body) as answer:
                await read_text(answer, completion, partial(take, completion, on_delta, talk.body, answer))
        except JobError:
            if not completion.is_finished:
                raise  # else the fault came behind the end of a text that is whole
        whole = completion.whole(done_is_enough=talk.done_is_enough)
        talk.note_end(completion.is_finished)
        return whole

    # ── pictures and sounds ──────────────────────────────────────────────────────────────────────────────────────

    async def image(self, request: Document, ours: Document | None = None) -> tuple[bytes, str]:
        return await self._negotiate("image", request, ours or {}, self._draw)

    async def _draw(self, talk: Negotiation) -> bytes:
        async with self.call("POST", "/images/generations", talk.body, "image") as answer:
            document = await answer.json()
            items = document.get("data") or document.get("images") or []
            for error in (document, *items[:1]):
                if is_error(error):
                    raise error_within(answer, error, talk.body, "image")
            if not items:
                raise FailJob("no picture in the answer", NO_PICTURE)
            if data := items[0].get("b64_json"):
                return decode_picture(data)
            if url := items[0].get("url"):
                if url.startswith("data:"):
                    return decode_picture(url)
                return await self._pictures.fetch(urllib.parse.urljoin(f"{self.base_url}/", url))
        raise FailJob("neither b64_json nor url", UNUSABLE)

    async def speech(self, request: Document, ours: Document | None = None) -> tuple[bytes, str]:
        return await self._negotiate("audio", request, ours or {}, self._speak)

    async def _speak(self, talk: Negotiation) -> bytes:
        async with self.call("POST", "/audio/speech", talk.body, "audio") as answer:
            data = await answer.read()
            if not data:
                raise FailJob("an empty answer", NO_SOUND)
            if is_web_page(data) or is_json(data):
                document = parse_json(data)
                if is_error(document):
                    raise error_within(answer, document, talk.body, "audio")
                raise FailJob("JSON instead of a sound", UNUSABLE)
            return data


class Providers:
    """One provider for each server and key, made when first needed, in the process that generates."""

    CLOSE_S = 5.0

    def __init__(self, settings: Settings) -> None:
        self._settings, self._memory = settings, Memory()
        self._made: dict[tuple[asyncio.AbstractEventLoop, str, str], Provider] = {}

    def preload(self) -> None:
        """Imports the HTTP client before the first job needs it."""
        if not all(self._settings.provider(kind).is_offline for kind in PROVIDER_KINDS):
            importlib.import_module("aiohttp")

    def get(self, kind: ProviderKind) -> Provider:
        """The provider of one kind of generation. Call it on the event loop, to which its connections then belong."""
        where = self._settings.provider(kind)
        if where.is_offline:
            from workerkit.offline import OfflineProvider

            return OfflineProvider()
        key = (asyncio.get_running_loop(), where.base_url, where.api_key)
        if key not in self._made:
            self._made[key] = OpenAIProvider(where, self._settings.max_answer_bytes, self._memory)
        return self._made[key]

    def close(self) -> None:
        """Closes every provider on its own loop. Call it from another thread, while the loops run."""
        for (loop, _, _), provider in self._made.items():
            with contextlib.suppress(TimeoutError):  # a handler blocks its loop
                asyncio.run_coroutine_threadsafe(provider.close(), loop).result(self.CLOSE_S)
        self._made.clear()
