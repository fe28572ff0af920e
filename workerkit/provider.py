"""Any OpenAI-compatible server over HTTP: requests, answers, refusals, and what happens while it is away.

The server is not trusted: each answer is capped in bytes and never unpacked, and of an error's text only a plain
error code is kept.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import json
import math
import re
import socket
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from workerkit import __version__
from workerkit.errors import (
    CapRefused,
    Document,
    FailJob,
    InvalidInput,
    JobError,
    OperatorFault,
    ProviderAway,
    RetryJob,
)
from workerkit.proxies import ProxyFault, proxy_for
from workerkit.sentences import TOO_LARGE, UNUSABLE
from workerkit.settings import OPENAI_URL, ProviderSettings

if TYPE_CHECKING:
    import aiohttp
    import yarl

USER_AGENT = f"ai-backend-worker/{__version__}"


@dataclass(frozen=True)
class TextAnswer:
    text: str
    model: str
    tokens: int


class Provider(Protocol):
    """Makes text, pictures and speech. Requests have the OpenAI API's fields.

    Every method raises RetryJob or FailJob, and no other error.
    """

    async def ready(self, patience_s: float) -> None:
        """Waits while the provider is away, for at most so many seconds. Raises RetryJob: it is still away."""

    async def text(self, request: Document, on_delta: Callable[[str], None]) -> TextAnswer:
        """The whole text; `on_delta` is called with each piece as it arrives."""

    async def image(self, request: Document) -> tuple[bytes, str]:
        """The picture's bytes, and the model that made it."""

    async def speech(self, request: Document) -> tuple[bytes, str]:
        """The sound's bytes, and the model that made it."""

    async def close(self) -> None:
        """Closes its connections."""


# ── refusals and errors ──────────────────────────────────────────────────────────────────────────────────────────

RETRIED_STATUSES = frozenset({408, 409, 425, 429})
REFUSED = "The provider refused this request. Change the input and try again."
PROXY_LOGIN, CHECK_PROXY = 407, "check the proxy's user and password, and whether it lets requests to the provider pass"
SET_UP_WRONGLY = {
    **dict.fromkeys((401, 403), "check the provider's key"),
    404: "check the model and the URL",
    PROXY_LOGIN: CHECK_PROXY,
}
AWAY_STATUSES = frozenset({502, 503, 504})  # of a proxy in front of the provider
WRONG_SHAPE_ERRORS = (AttributeError, TypeError, LookupError, ValueError, RecursionError)
# Newer models take the cap of an answer under another name, and count their thinking before the answer in.
CAP, CAP_WITH_THINKING, THINKING_TOKENS = "max_tokens", "max_completion_tokens", 4096


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The seconds of a `Retry-After` header, None without one. Model servers send no dates."""
    with contextlib.suppress(ValueError):
        seconds = float(headers.get("retry-after", ""))
        return seconds if math.isfinite(seconds) and seconds >= 0 else None
    return None


def status_error(status: int, detail: str, headers: Mapping[str, str]) -> JobError:
    """What an HTTP error status of the provider means for the job."""
    if status in RETRIED_STATUSES or status >= 500:
        kind = ProviderAway if status in AWAY_STATUSES else RetryJob
        return kind(detail, RetryJob.default_sentence, retry_after_s(headers))
    if status in SET_UP_WRONGLY:
        return OperatorFault(f"{detail}: {SET_UP_WRONGLY[status]}")
    return FailJob(detail, REFUSED)


def proxy_error(status: int) -> JobError:
    """What it means that a proxy didn't connect the worker with a server. The request was never sent."""
    detail = f"HTTP {status} of the proxy"
    if status in RETRIED_STATUSES or status >= 500:
        return ProviderAway(detail, is_counted=False)
    return OperatorFault(f"{detail}: {CHECK_PROXY}")


@contextlib.contextmanager
def provider_errors() -> Iterator[None]:
    """Turns every error that a provider's answer, or the way to it, can raise into RetryJob or FailJob.

    Only the error's class is kept, since its text may hold the key or the prompt; hence `from None`.
    """
    import aiohttp

    try:
        yield
    except JobError:
        raise
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise ProviderAway(type(error).__name__, is_counted=False) from None  # the request was never sent
    except aiohttp.ClientHttpProxyError as error:
        raise proxy_error(error.status) from None
    except WRONG_SHAPE_ERRORS as error:
        raise FailJob(type(error).__name__, UNUSABLE) from None
    except (aiohttp.ClientError, OSError) as error:
        raise RetryJob(type(error).__name__, ProviderAway.default_sentence) from None


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────

LAST_EVENT = b"[DONE]"
READ_TO_END_S = 0.25
MAX_MODEL_CHARACTERS, MAX_TOKENS = 200, 2**31
MAX_TEXT_CHARACTERS = 4_000_000  # at up to four bytes each, a document can just hold them
MAX_LINE_BYTES = 4 * MAX_TEXT_CHARACTERS


class Answer:
    """A provider's answer as it comes in, up to so many bytes."""

    def __init__(self, response: aiohttp.ClientResponse, max_bytes: int) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise FailJob("a compressed answer, which was not asked for", UNUSABLE)
        self.status, self.headers = response.status, response.headers
        self._content, self._max_bytes, self._count = response.content, max_bytes, 0

    async def piece(self) -> bytes:
        """What has come in meanwhile, or nothing at the end. Raises FailJob: the answer is too large."""
        piece = await self._content.readany()
        self._count += len(piece)
        if self._count > self._max_bytes:
            raise FailJob(f"an answer of over {self._max_bytes} bytes", TOO_LARGE)
        return piece

    async def read(self) -> bytes:
        pieces = []
        while piece := await self.piece():
            pieces.append(piece)
        return b"".join(pieces)

    async def json(self) -> Any:
        return json.loads(await self.read())

    async def read_to_end(self) -> None:
        """Reads what follows the last event, so that the connection can be used again, and hardly waits for it."""
        with contextlib.suppress(RetryJob, FailJob, TimeoutError), provider_errors():  # the text is whole already
            async with asyncio.timeout(READ_TO_END_S):
                await self.read()

    async def refusal(self) -> JobError:
        """What an answer with an error status means for the job."""
        error: Document = {}
        with (
            contextlib.suppress(RetryJob, FailJob),
            provider_errors(),
        ):  # without a readable body the status alone decides
            error = dict((await self.json())["error"])
        code = str(error.get("code") or "")
        safe_code = code if re.fullmatch(r"[\w.-]{1,64}", code) else ""
        fault = status_error(self.status, f"HTTP {self.status} {safe_code}".rstrip(), self.headers)
        names_successor = not error.get("param") and CAP_WITH_THINKING in str(error.get("message"))
        if self.status == 400 and (error.get("param") == CAP or names_successor):
            return CapRefused(fault.detail, fault.sentence)
        return fault


class EventReader:
    """Finds server-sent events in a stream of bytes (HTML standard, 9.2.6), and takes only their `data`.

    aiohttp's own `readline` ends lines at LF alone, so a stream with CR would be one line without end
    (`test_aiohttps_lines_do_not_end_at_cr`).
    """

    def __init__(self) -> None:
        self.is_ended = False
        self._line: list[bytes] = []  # the parts of a line whose end hasn't come yet
        self._line_bytes = 0
        self._data: list[bytes] = []
        self._ended_with_cr = False

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Yields the data of each event that ends in this piece, up to the provider's last one.

        Raises:
            FailJob: a line is too long.
        """
        for line in self._lines(piece):
            if line.startswith(b"data:"):
                self._data.append(line[6 if line.startswith(b"data: ") else 5 :])
            elif not line and self._data:
                data = b"\n".join(self._data)
                self._data.clear()
                self.is_ended = data == LAST_EVENT
                if self.is_ended:
                    return
                if data:
                    yield data

    def _lines(self, piece: bytes) -> list[bytes]:
        """The lines that end in this piece. A line ends with CR, LF or both, and both may be in different pieces."""
        if self._ended_with_cr:
            piece = piece.removeprefix(b"\n")
        self._ended_with_cr = piece.endswith(b"\r")
        *lines, rest = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        if lines:
            lines[0] = b"".join([*self._line, lines[0]])
            self._line, self._line_bytes = [], 0
        self._line.append(rest)
        self._line_bytes += len(rest)
        if self._line_bytes > MAX_LINE_BYTES:
            raise FailJob(f"a line of over {MAX_LINE_BYTES} bytes in its stream", TOO_LARGE)
        return lines


class Completion:
    """A text answer as it comes in. A server may send any types, so each one is checked."""

    def __init__(self, model: str) -> None:
        self._model, self._tokens = model, 0
        self._parts: list[str] = []
        self._length = 0
        self._has_begun, self._finish_reason = False, None

    def add(self, chunk: Document) -> str:
        """Takes one event and returns its piece of the text.

        Raises:
            RetryJob: the event is an error. FailJob: the text is too long.
            TypeError, LookupError, AttributeError: the event has another shape.
        """
        self._has_begun, piece = True, ""
        if chunk.get("error"):
            raise RetryJob("an error in the stream", ProviderAway.default_sentence)
        model, tokens = chunk.get("model"), (chunk.get("usage") or {}).get("total_tokens")
        if isinstance(model, str) and 0 < len(model) <= MAX_MODEL_CHARACTERS and model.isprintable():
            self._model = model
        if isinstance(tokens, int) and 0 < tokens < MAX_TOKENS:
            self._tokens = tokens
        for choice in chunk["choices"][:1]:
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
            piece = (choice.get("delta") or {}).get("content") or ""
        self._length += len(piece)
        if not isinstance(piece, str):
            raise TypeError("a piece that isn't text")
        if self._length > MAX_TEXT_CHARACTERS:
            raise FailJob(f"a text of over {MAX_TEXT_CHARACTERS} characters", TOO_LARGE)
        if piece:
            self._parts.append(piece)
        return piece

    def whole(self) -> TextAnswer:
        """The answer, if it has come to its end. Raises RetryJob: it broke off. FailJob: there is no usable text."""
        if not self._has_begun:
            raise FailJob("an answer without any chunk", UNUSABLE)
        if self._finish_reason is None:
            raise RetryJob("the stream ended without a finish_reason: half a text", "The provider broke off")
        if self._finish_reason == "content_filter":
            raise InvalidInput("finish_reason content_filter", "The provider's content rules forbid this text.")
        if not self._parts:
            raise FailJob("an empty text", "The provider returned an empty text.")
        # A server may cut a character in two between pieces; UTF-16 joins its halves again.
        text = "".join(self._parts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return TextAnswer(text, self._model, self._tokens or len(self._parts))


# ── the HTTP client ──────────────────────────────────────────────────────────────────────────────────────────────

CONNECT_S, KEEP_CONNECTION_S, LOOK_AT_CONNECTION_S = 10.0, 60.0, 1.0


def open_session() -> aiohttp.ClientSession:
    """An HTTP client for any number of calls at a time. It keeps no cookies and unpacks nothing."""
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_CONNECTION_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"accept-encoding": "identity", "user-agent": USER_AGENT},
        timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_S),  # the attempt has a deadline for the rest
        auto_decompress=False,
    )


@contextlib.contextmanager
def connection_watched(response: aiohttp.ClientResponse) -> Iterator[None]:
    """Ends a read when its connection is gone. After a broken chunk aiohttp (3.14) closes it but wakes no reader.

    See `test_aiohttp_wakes_no_reader_after_a_broken_chunk`.
    """
    import aiohttp

    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []

    def look() -> None:
        transport = response.connection and response.connection.transport
        if response.connection and (transport is None or transport.is_closing()):
            response.content.set_exception(aiohttp.ClientPayloadError("the connection is closed"))
        timers[:] = [loop.call_later(LOOK_AT_CONNECTION_S, look)]

    timers.append(loop.call_later(LOOK_AT_CONNECTION_S, look))
    try:
        yield
    finally:
        timers[0].cancel()


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is global. IPv6 addresses that lead to an IPv4 one (6to4, Teredo, NAT64) are not."""
    if isinstance(address, ipaddress.IPv6Address):
        is_wrapped = address.sixtofour or address.teredo or address not in ipaddress.ip_network("2000::/3")
        return address.is_global and not is_wrapped
    return address.is_global and not address.is_multicast


async def public_address(host: str, port: int) -> str:
    """An address of the host, if all of its addresses are public.

    Raises:
        FailJob: one is not. A provider must not be able to make the worker read the operator's network.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(entry[4][0])) for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise FailJob("a picture's URL at an address that isn't public", UNUSABLE)
    return f"[{addresses[0]}]" if addresses[0].version == 6 else str(addresses[0])


def picture_proxy(url: str) -> str | None:
    """The proxy that leads to a picture. Raises OperatorFault: the variable that names it can't be followed."""
    try:
        return proxy_for(url)
    except ProxyFault as fault:
        raise OperatorFault(str(fault)) from None


def picture_host_error(answer: Answer) -> JobError:
    """What an error status of a picture's host means: a retry, or a failure. The provider's key plays no part in it."""
    detail = f"HTTP {answer.status} for the picture's URL"
    error = status_error(answer.status, detail, answer.headers)
    if answer.status == PROXY_LOGIN:
        return error
    return RetryJob(detail) if isinstance(error, RetryJob) else FailJob(detail, REFUSED)


# ── a provider that is away ──────────────────────────────────────────────────────────────────────────────────────


class Breaker:
    """After some failures in a row, lets one job at a time try whether the provider is back; the others wait.

    `failures_before_pause` is the number of those failures, `max_pause_s` the longest pause between two tries.
    """

    POLL_S = 0.5

    def __init__(self, failures_before_pause: int = 3, max_pause_s: float = 30.0) -> None:
        self._failures_before_pause, self._max_pause_s = failures_before_pause, max_pause_s
        self._failures = 0
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
                raise ProviderAway("the provider is away", after_s=pause_s, is_counted=False)
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
        except ProviderAway:
            if began_at >= self._paused_at:
                self._failures += 1
                self._pause()
            raise
        except JobError:  # the provider was reached, whatever it answered
            self._reached()
            raise
        self._reached()


# ── the provider ─────────────────────────────────────────────────────────────────────────────────────────────────


class OpenAIProvider:
    """Any OpenAI-compatible server. It has to be made on the event loop that uses it."""

    def __init__(self, where: ProviderSettings, max_bytes: int) -> None:
        self.session = open_session()
        base_url, mark, query = (where.base_url or OPENAI_URL).partition("?")
        self.base_url, self._query = base_url.rstrip("/"), mark + query
        self._max_bytes = max_bytes
        self._breaker = Breaker()
        self._thinking_models: set[str] = set()
        self._proxy, parts = proxy_for(self.base_url), urllib.parse.urlsplit(self.base_url)
        self._host = parts.hostname
        has_key = where.api_key and "@" not in parts.netloc  # user and password in the URL come before a key
        self._headers = {"authorization": f"Bearer {where.api_key}"} if has_key else {}

    async def close(self) -> None:
        await self.session.close()

    async def ready(self, patience_s: float) -> None:
        await self._breaker.wait(patience_s)

    @contextlib.asynccontextmanager
    async def _request(self, method: str, url: str | yarl.URL, **options: Any) -> AsyncIterator[Answer]:
        async with self.session.request(method, url, allow_redirects=False, **options) as response:
            with connection_watched(response):
                yield Answer(response, self._max_bytes)

    @contextlib.asynccontextmanager
    async def call(self, method: str, path: str, body: Document | None = None) -> AsyncIterator[Answer]:
        """Calls the provider and yields the answer, which is still to be read. Leaving early closes the connection.

        Raises:
            RetryJob, FailJob: for every error of the call and of the code that reads the answer.
        """
        with self._breaker.watch(), provider_errors():
            url = self.base_url + path + self._query
            async with self._request(method, url, json=body, headers=self._headers, proxy=self._proxy) as answer:
                if not 200 <= answer.status < 300:
                    raise await answer.refusal()
                yield answer

    async def text(self, request: Document, on_delta: Callable[[str], None]) -> TextAnswer:
        """The whole text, streamed. A model that refuses `max_tokens` is asked again with the newer name."""
        model, cap = request["model"], request.get(CAP)
        if cap is not None and model not in self._thinking_models:
            try:
                return await self._stream(request, on_delta)
            except CapRefused:
                self._thinking_models.add(model)
        if cap is not None:
            request = {**request, CAP_WITH_THINKING: cap + THINKING_TOKENS}
            del request[CAP]
        return await self._stream(request, on_delta)

    async def _stream(self, request: Document, on_delta: Callable[[str], None]) -> TextAnswer:
        completion, events = Completion(request["model"]), EventReader()
        body = {**request, "stream": True, "stream_options": {"include_usage": True}}
        async with self.call("POST", "/chat/completions", body) as answer:
            while not events.is_ended and (piece := await answer.piece()):
                for event in events.feed(piece):
                    if delta := completion.add(json.loads(event)):
                        on_delta(delta)
            await answer.read_to_end()
            return completion.whole()

    async def image(self, request: Document) -> tuple[bytes, str]:
        async with self.call("POST", "/images/generations", request) as answer:
            picture = (await answer.json())["data"][0]
            if data := picture.get("b64_json"):
                return base64.b64decode(data, validate=True), request["model"]
            if url := picture.get("url"):
                return await self._fetch(url), request["model"]
        raise FailJob("neither b64_json nor url", UNUSABLE)

    async def _fetch(self, url: str) -> bytes:
        """Fetches a picture by its URL, without credentials, and never from the operator's own network.

        The address is checked here and then asked for by number, since a name may lead elsewhere the second time.
        aiohttp's `socket_factory` could check it at the connection, but sees only the proxy where there is one
        (`test_aiohttps_socket_factory_sees_only_the_proxy`).
        """
        import aiohttp
        import yarl

        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise FailJob(f"a picture at a {parts.scheme[:20]!r} URL", UNUSABLE)
        pinned, headers = parts._replace(netloc=parts.netloc.rpartition("@")[2]), {}
        if parts.hostname != self._host:
            address = await public_address(parts.hostname, parts.port or 443)
            headers = {"host": pinned.netloc}
            pinned = pinned._replace(netloc=f"{address}:{parts.port}" if parts.port else address)
        quoted = urllib.parse.quote(pinned.geturl(), safe="%/:?#[]@!$&'()*+,;=~")
        target = yarl.URL(quoted, encoded=True)  # not encoded once more, since a signature may cover it
        options = {"headers": headers, "server_hostname": parts.hostname, "proxy": picture_proxy(url)}
        try:
            async with self._request("GET", target, **options) as answer:
                if answer.status == 200:
                    return await answer.read()
        except aiohttp.ClientHttpProxyError as error:
            raise proxy_error(error.status) from None
        except (aiohttp.ClientError, OSError) as error:  # of the picture's host, which is not the provider
            raise RetryJob(type(error).__name__, "The picture can't be fetched") from None
        raise picture_host_error(answer)

    async def speech(self, request: Document) -> tuple[bytes, str]:
        async with self.call("POST", "/audio/speech", request) as answer:
            return await answer.read(), request["model"]
