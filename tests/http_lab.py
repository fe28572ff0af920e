"""What tests of the way to a model server share: a call over HTTP in one line, and servers that send what one says."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

from testbed.provider import Provider
from tests.lab import KEY
from workerkit.provider import Memory, OpenAIProvider
from workerkit.settings import ProviderSettings

MODEST_BYTES = 2**18
Ask = Callable[[OpenAIProvider], Awaitable[Any]]
Kind = Callable[[str], Ask]
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def at_url(url: str, key: str = KEY, model: str = "default-model", **more: Any) -> ProviderSettings:
    return ProviderSettings(url, key, model, (), **more)


def where(provider: Provider, key: str = KEY, **more: Any) -> ProviderSettings:
    return at_url(provider.url, key, **more)


@contextlib.asynccontextmanager
async def opened(place: ProviderSettings, memory: Memory | None = None) -> AsyncIterator[OpenAIProvider]:
    """The worker's provider for a server, closed at the end."""
    provider = OpenAIProvider(place, MODEST_BYTES, memory)
    try:
        yield provider
    finally:
        await provider.close()


def answer_of(ask: Ask, place: ProviderSettings, within_s: float = 30, memory: Memory | None = None) -> Any:
    """Asks a server over HTTP and returns its answer."""

    async def call() -> Any:
        async with opened(place, memory) as provider, asyncio.timeout(within_s):
            return await ask(provider)

    return asyncio.run(call())


# ── what is asked for ────────────────────────────────────────────────────────────────────────────────────────────


def text(prompt: str, on_delta: Callable[[str], None] = lambda _: None, **fields: Any) -> Ask:
    request = {"model": "asked-model", "messages": [{"role": "user", "content": prompt}], **fields}
    return lambda provider: provider.text(request, on_delta)


def image(prompt: str) -> Ask:
    return lambda provider: provider.image({"model": "asked-model", "prompt": prompt, "size": "64x48"})


def speech(prompt: str) -> Ask:
    request = {"model": "asked-model", "input": prompt, "voice": "alloy", "response_format": "wav"}
    return lambda provider: provider.speech(request)


EVERY_KIND = [pytest.param(kind, id=kind.__name__) for kind in (text, image, speech)]


def delta(content: object, reason: object = None, **more: object) -> dict[str, Any]:
    """An event of a stream, with a piece of the text."""
    return {"choices": [{"index": 0, "delta": {"content": content, **more}, "finish_reason": reason}]}


# ── servers that send what a test says ───────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def server(answer: Serve) -> AsyncIterator[str]:
    """A server that serves each connection by this function. Yields its URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await answer(reader, writer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        yield "http://{}:{}".format(*listening.sockets[0].getsockname())


def http_answer(body: bytes = b"", status: int | str = 200, **headers: str) -> bytes:
    """An answer of HTTP, whose connection ends with it."""
    named = {"content-length": str(len(body)), "connection": "close", **headers}
    lines = [f"HTTP/1.1 {status} Answer", *(f"{name.replace('_', '-')}: {value}" for name, value in named.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass
class Scripted:
    """Answers each request by the bytes at its path, or by those at `*`, and keeps what it was asked."""

    answers: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.requests.append(head)
        if length := re.search(r"(?i)content-length: (\d+)", head):
            await reader.readexactly(int(length[1]))
        writer.write(self.answers.get(head.split(" ")[1]) or self.answers.get("*") or http_answer(status=404))
        await writer.drain()

    @property
    def paths(self) -> list[str]:
        return [request.split(" ")[1] for request in self.requests]

    def headers(self) -> Iterable[str]:
        """The headers of the last request, in lower case."""
        return self.requests[-1].lower().split("\r\n")[1:]


def answer_from(body: bytes, ask: Ask, **headers: str) -> Any:
    """What the worker makes of a server whose every answer is this."""

    async def call() -> Any:
        async with server(Scripted({"*": http_answer(body, **headers)})) as url, opened(at_url(url)) as provider:
            async with asyncio.timeout(30):
                return await ask(provider)

    return asyncio.run(call())
