"""Any OpenAI-compatible server over HTTP: answers, refusals, keys, proxies, and what happens while it is away.

The provider in these tests is real, and misbehaves as the directives in its prompts say.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import json
import socket
import time
import traceback
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from testbed.answers import picture, sound_wav
from testbed.processes import poll
from testbed.provider import Provider
from tests.lab import KEY, NOWHERE, SECRET, table
from workerkit.answers import Completion, EventReader
from workerkit.breaker import Breaker
from workerkit.errors import FailJob, JobError, ProviderAway, RetryJob
from workerkit.pictures import is_public, public_address
from workerkit.provider import OpenAIProvider
from workerkit.proxies import proxy_for
from workerkit.settings import ProviderSettings

MODEST_BYTES = 2**18
Ask = Callable[[OpenAIProvider], Awaitable[Any]]
Kind = Callable[[str], Ask]
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def where(provider: Provider, key: str = KEY) -> ProviderSettings:
    return at_url(provider.url, key)


def at_url(url: str, key: str = KEY) -> ProviderSettings:
    return ProviderSettings(url, key, "default-model", ())


@contextlib.asynccontextmanager
async def opened(place: ProviderSettings) -> AsyncIterator[OpenAIProvider]:
    """The worker's provider for a server, closed at the end."""
    provider = OpenAIProvider(place, MODEST_BYTES)
    try:
        yield provider
    finally:
        await provider.close()


def answer_of(ask: Ask, place: ProviderSettings, within_s: float = 30) -> Any:
    """Asks a server over HTTP and returns its answer."""

    async def call() -> Any:
        async with opened(place) as provider, asyncio.timeout(within_s):
            return await ask(provider)

    return asyncio.run(call())


def text(prompt: str, on_delta: Callable[[str], None] = lambda _: None) -> Ask:
    request = {"model": "asked-model", "messages": [{"role": "user", "content": prompt}]}
    return lambda provider: provider.text(request, on_delta)


def capped_text(prompt: str, times: int = 1) -> Ask:
    """Asks for a text of at most seven tokens, so many times."""
    request = {"model": "asked-model", "messages": [{"role": "user", "content": prompt}], "max_tokens": 7}

    async def ask(provider: OpenAIProvider) -> Any:
        return [await provider.text(request, lambda _: None) for _ in range(times)]

    return ask


def image(prompt: str) -> Ask:
    return lambda provider: provider.image({"model": "asked-model", "prompt": prompt, "size": "64x48"})


def speech(prompt: str) -> Ask:
    request = {"model": "asked-model", "input": prompt, "voice": "alloy", "response_format": "wav"}
    return lambda provider: provider.speech(request)


PLACES = ("/v1", "/v1/", "/v1?key=a%2Bb%26c&api-version=1", "/v1/?key=a%2Bb%26c&api-version=1")


@pytest.mark.parametrize("place", PLACES)
def test_what_a_base_url_has_behind_its_question_mark_is_sent_with_each_call(provider: Provider, place: str) -> None:
    url = provider.url.removesuffix("/v1") + "/accounts/token" + place
    assert answer_of(text("[say Hello]"), at_url(url)).text == "Hello"
    [call] = provider.calls
    assert call.route == "/accounts/token/v1/chat/completions"
    assert call.query == place.partition("?")[2]


EVERY_KIND = [pytest.param(kind, id=kind.__name__) for kind in (text, image, speech)]


@contextlib.asynccontextmanager
async def server(answer: Serve) -> AsyncIterator[str]:
    """A server that serves each connection by this function. Yields its URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await answer(reader, writer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        yield "http://{}:{}".format(*listening.sockets[0].getsockname())


# ── texts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_text_is_streamed_in_order(provider: Provider) -> None:
    pieces: list[str] = []
    answer = answer_of(text("[say one two three four]", pieces.append), where(provider))
    assert pieces == ["one", " two", " three", " four"]
    assert answer.text == "one two three four"


@pytest.mark.parametrize("dialect", ["crlf", "cr", "pings"])
def test_a_stream_may_have_any_line_ends_and_empty_events(provider: Provider, dialect: str) -> None:
    assert answer_of(text(f"[sse {dialect}] [say one  two three]"), where(provider)).text == "one  two three"


def test_a_line_end_that_arrives_in_two_pieces_is_one() -> None:
    events = EventReader()
    pieces = (b"data: one\r", b"\ndata: two\r\n\r", b"\n")
    assert [event for piece in pieces for event in events.feed(piece)] == [b"one\ntwo"]


def test_an_error_within_a_stream_is_tried_again(provider: Provider) -> None:
    with pytest.raises(RetryJob):
        answer_of(text("[sse error]"), where(provider))


def test_a_server_that_calls_its_stream_something_else_is_understood(provider: Provider) -> None:
    assert answer_of(text("[type text/plain] [say grüße]"), where(provider)).text == "grüße"


def test_a_stream_that_stays_open_behind_its_last_event_is_not_waited_for(provider: Provider) -> None:
    assert answer_of(text("[linger 30] [say done]"), where(provider), within_s=15).text == "done"


def test_a_text_names_the_model_and_the_tokens_of_the_answer(provider: Provider) -> None:
    answer = answer_of(text("Hello there [tokens 5]"), where(provider))
    assert (answer.model, answer.tokens) == ("asked-model", 4 + 5)


def test_without_token_counts_the_pieces_are_counted(provider: Provider) -> None:
    assert answer_of(text("[no-usage] [tokens 5]"), where(provider)).tokens == 5


@table(
    "parts, whole",
    ("whole characters", ["Да", "!"], "Да!"),
    ("a character cut in two", ["a\ud83d", "\ude00b"], "a😀b"),
    ("half a character alone", ["a\ud83d", "b"], "a\ufffdb"),
)
def test_halves_of_a_character_come_together(parts: list[str], whole: str) -> None:
    completion = Completion("model")
    for part in parts:
        completion.add({"choices": [{"delta": {"content": part}, "finish_reason": "stop"}]})
    assert completion.whole().text == whole


def test_an_answers_cap_is_renamed_for_a_model_that_wants_the_newer_name(provider: Provider) -> None:
    answer_of(capped_text("[refuse max_tokens] [say hello]", times=2), where(provider))
    fields = [{name for name in call.body if name.startswith("max_")} for call in provider.calls]
    assert fields == [{"max_tokens"}, {"max_completion_tokens"}, {"max_completion_tokens"}]
    assert provider.calls[1].body["max_completion_tokens"] == 7 + 4096


@table(
    "prompt, calls",
    ("of another cause, though the answer repeats the prompt", "[status 400] max_tokens", 1),
    ("of another field", "[refuse model]", 1),
    ("of the newer name, too", "[refuse max_tokens max_completion_tokens]", 2),
)
def test_a_refusal_that_a_new_name_does_not_mend_fails_the_job(provider: Provider, prompt: str, calls: int) -> None:
    with pytest.raises(FailJob):
        answer_of(capped_text(prompt), where(provider))
    assert len(provider.calls) == calls


# ── pictures and sounds ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_picture_and_a_sound_come_as_bytes(provider: Provider) -> None:
    assert answer_of(image("A city"), where(provider)) == (picture(64, 48), "asked-model")
    assert answer_of(speech("Hello"), where(provider)) == (sound_wav(), "asked-model")


def test_this_machine_by_its_ipv6_address_is_refused() -> None:
    answer = json.dumps({"data": [{"url": "http://[::1]:9/x.png"}]}).encode()

    async def send_url(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))
        await writer.drain()

    async def fetch() -> None:
        async with server(send_url) as url, opened(at_url(url)) as ours:
            await image("A city")(ours)

    with pytest.raises(FailJob, match="isn't public"):
        asyncio.run(fetch())


def test_a_picture_by_url_is_fetched_from_the_providers_own_host_without_credentials(provider: Provider) -> None:
    assert answer_of(image("[url]"), where(provider))[0] == picture(64, 48)
    generated, fetched = provider.calls
    assert (generated.authorization, fetched.authorization) == (f"Bearer {KEY}", None)


def test_a_picture_elsewhere_is_fetched_from_the_address_that_was_checked(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look_up(host: str, port: int) -> str:
        assert (host, port) == ("pictures.example", provider.port)
        return "127.0.0.1"

    answer_of(image("[url]"), where(provider))
    path = next(call.route for call in provider.calls if call.route.startswith("/files/"))
    monkeypatch.setattr("workerkit.pictures.public_address", look_up)
    data, _ = answer_of(image(f"[url http://pictures.example:{provider.port}{path}]"), where(provider))
    assert data == picture(64, 48)


def test_a_file_that_is_busy_is_tried_again(provider: Provider) -> None:
    with pytest.raises(RetryJob):
        answer_of(image("[url] [status 503]"), where(provider))


@table(
    "prompt",
    ("neither base64 nor a URL", "[empty]"),
    ("a page of a proxy", "[html]"),
    ("another object", "[shape]"),
    ("a list", "[shape list]"),
    ("nulls", "[shape null]"),
    ("a string", "[shape text]"),
    ("broken JSON", "[shape broken]"),
    ("a file of this machine", "[url file:///etc/passwd]"),
    ("no host", "[url http:///x.png]"),
    ("no number for a port", "[url http://host:port/x.png]"),
    ("an address of the operator's network", "[url http://10.0.0.1/x.png]"),
    ("a cloud's metadata", "[url http://169.254.169.254/latest]"),
    ("this machine by name", "[url http://localhost:9/x.png]"),
    ("a redirect isn't followed", "[redirect http://127.0.0.1:9/]"),
    ("nor is the file's", "[url] [redirect http://127.0.0.1:9/]"),
    ("no such file", "[url] [status 404]"),
)
def test_a_picture_that_cant_be_had_fails_the_job(provider: Provider, prompt: str) -> None:
    with pytest.raises(FailJob):
        answer_of(image(prompt), where(provider))


@table(
    "host, address",
    ("public", "93.184.216.34", "93.184.216.34"),
    ("public in IPv6, as a URL has it", "2606:4700::6810:84e5", "[2606:4700::6810:84e5]"),
)
def test_a_public_address_is_taken(host: str, address: str) -> None:
    assert asyncio.run(public_address(host, 443)) == address


NETWORKS = ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"]


INSIDE = [*NETWORKS, "localhost", "::1", "fe80::1", "fd00::1", "::ffff:127.0.0.1"]


@pytest.mark.parametrize("host", INSIDE)
def test_an_address_inside_the_operators_network_is_refused(host: str) -> None:
    with pytest.raises(FailJob, match="isn't public"):
        asyncio.run(public_address(host, 443))


def test_a_host_with_one_address_inside_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_arguments: object, **_options: object) -> list[object]:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in ("93.184.216.34", "10.1.2.3")
        ]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(FailJob, match="isn't public"):
        asyncio.run(public_address("two.example", 443))


@table("address", ("NAT64", "64:ff9b::a00:1"), ("6to4", "2002:7f00:1::"), ("multicast", "224.0.0.1"))
def test_an_address_that_leads_elsewhere_is_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    assert is_public(ipaddress.ip_address("2606:4700::1111"))


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_the_key_goes_to_the_provider(provider: Provider, kind: Kind) -> None:
    answer_of(kind("Hello"), where(provider))
    assert [call.authorization for call in provider.calls] == [f"Bearer {KEY}"]


def test_a_server_without_key_gets_none_of_the_environment(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    answer_of(text("Hello"), where(provider, key=""))
    assert SECRET not in str(provider.calls[0].authorization)


def test_user_and_password_in_a_url_come_before_a_key(provider: Provider) -> None:
    named = ProviderSettings(provider.url.replace("://", "://user:word@"), KEY, "default-model", ())
    assert answer_of(text("[say hello]"), named).text == "hello"
    assert provider.calls[0].authorization == f"Basic {base64.b64encode(b'user:word').decode()}"


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [(kind, prompt) for kind in (text, image, speech) for prompt in ("[status 401]", "[status 400]", "[cut]")]
    + [(kind, prompt) for kind in (text, image) for prompt in ("[shape]", "[shape broken]", "[html]", "[empty]")],
)
def test_neither_key_nor_prompt_nor_the_providers_words_reach_an_error(
    provider: Provider, kind: Kind, prompt: str
) -> None:
    with pytest.raises(JobError) as caught:
        answer_of(kind(f"{prompt} {SECRET}"), where(provider))
    shown = "".join(traceback.format_exception(caught.value)) + caught.value.sentence
    for secret in (KEY, SECRET, "Incorrect API key", "testbed)", "Welcome to the proxy"):
        assert secret not in shown


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", EVERY_KIND)
@table(
    "status, error",
    ("a bad request stays bad", 400, FailJob),
    ("a wrong key stays wrong", 401, FailJob),
    ("not allowed", 403, FailJob),
    ("no such model", 404, FailJob),
    ("a server that was slow", 408, RetryJob),
    ("a conflict passes", 409, RetryJob),
    ("too early", 425, RetryJob),
    ("too many", 429, RetryJob),
    ("unprocessable", 422, FailJob),
    ("a server's own fault", 500, RetryJob),
    ("overloaded", 503, RetryJob),
)
def test_an_error_status_says_whether_to_try_again(
    provider: Provider, kind: Kind, status: int, error: type[JobError]
) -> None:
    with pytest.raises(error, match=str(status)):
        answer_of(kind(f"[status {status}]"), where(provider))
    assert len(provider.calls) == 1


@table(
    "given, after_s",
    ("in seconds", "7", 7.0),
    ("half a second", "0.5", 0.5),
    ("a date is no number", "Wed,", None),
    ("for ever", "inf", None),
    ("before now", "-3", None),
    ("not at all", "", None),
)
def test_retry_after_is_taken_where_it_is_a_number_of_seconds(
    provider: Provider, given: str, after_s: float | None
) -> None:
    option = f" retry-after={given}" if given else ""
    with pytest.raises(RetryJob) as caught:
        answer_of(text(f"[status 429{option}]"), where(provider))
    assert caught.value.after_s == after_s


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_an_answer_that_breaks_off_is_tried_again(provider: Provider, kind: Kind) -> None:
    with pytest.raises(RetryJob):
        answer_of(kind("[cut]"), where(provider))


@table(
    "prompt, error, sentence",
    ("a clean end in mid-text", "[half]", RetryJob, "broke off"),
    ("no words", "[empty]", FailJob, "empty text"),
    ("its rules forbid it", "[filter]", FailJob, "content rules"),
    ("a page of a proxy", "[html]", FailJob, "could not be used"),
    ("another object", "[shape]", FailJob, "could not be used"),
    ("a list", "[shape list]", FailJob, "could not be used"),
    ("nulls", "[shape null]", FailJob, "could not be used"),
    ("a string", "[shape text]", FailJob, "could not be used"),
    ("broken JSON", "[shape broken]", FailJob, "could not be used"),
    ("a redirect isn't followed", "[redirect http://127.0.0.1:9/]", FailJob, "refused"),
)
def test_a_text_that_cant_be_used_fails_with_its_own_sentence(
    provider: Provider, prompt: str, error: type[JobError], sentence: str
) -> None:
    with pytest.raises(error) as caught:
        answer_of(text(prompt), where(provider))
    assert sentence in caught.value.sentence
    assert len(provider.calls) == 1


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_compressed_answer_is_refused_and_never_unpacked(provider: Provider, kind: Kind) -> None:
    with pytest.raises(FailJob, match="compressed"):
        answer_of(kind("[gzip 1]"), where(provider))


@pytest.mark.parametrize("prompt", ["[big 100]", "[endless]"])
@pytest.mark.parametrize("kind", [*EVERY_KIND, pytest.param(lambda prompt: image(f"[url] {prompt}"), id="url")])
def test_an_answer_beyond_the_cap_fails_in_bounded_memory(provider: Provider, kind: Kind, prompt: str) -> None:
    answer_of(kind("warm up"), where(provider))
    tracemalloc.start()
    with pytest.raises(FailJob) as caught:
        answer_of(kind(prompt), where(provider))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "too large" in caught.value.sentence
    assert peak_bytes < 64 * MODEST_BYTES


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_provider_that_isnt_there_is_tried_again_uncounted(kind: Kind) -> None:
    place = at_url(f"http://{NOWHERE}/v1")
    with pytest.raises(RetryJob) as caught:
        answer_of(kind("Hello"), place)
    assert (caught.value.sentence, caught.value.is_counted) == ("The provider can't be reached", False)


# ── connections ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_calls_share_a_connection(provider: Provider) -> None:
    async def ask_three_times(ours: OpenAIProvider) -> None:
        for kind in (text, text, speech):
            await kind("Hello")(ours)

    answer_of(ask_three_times, where(provider))
    assert len({call.connection for call in provider.calls}) == 1


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("prompt", ["[hang]", "[drip 0.5]"])
def test_a_cancelled_call_closes_its_socket(provider: Provider, kind: Kind, prompt: str) -> None:
    async def begin_and_cancel(ours: OpenAIProvider) -> None:
        call = asyncio.ensure_future(kind(prompt)(ours))
        await asyncio.to_thread(poll, lambda: provider.running, 10)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call

    answer_of(begin_and_cancel, where(provider))
    poll(lambda: provider.calls[0].outcome == "disconnected", 15)


# ── proxies, by our way and by aiohttp's ─────────────────────────────────────────────────────────────────────────


def as_proxy(provider: Provider, scheme: str = "http://") -> str:
    """The provider's address; it answers what is asked of it as a proxy as well."""
    return f"{scheme}127.0.0.1:{provider.port}"


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_the_way_leads_through_the_proxy_that_the_environment_names(
    provider: Provider, proxies: Callable[..., None], variable: str, scheme: str
) -> None:
    proxies(**{variable: as_proxy(provider, scheme), "no_proxy": "elsewhere.invalid"})
    beyond = at_url("http://provider.invalid/v1")
    assert answer_of(text("[say hello]"), beyond).text == "hello"
    with pytest.raises(RetryJob):
        answer_of(text("[say hello]"), at_url("http://elsewhere.invalid/v1"))


@table(
    "variables, url, proxy",
    ("none", {}, "https://host/v1", None),
    (
        "that of the scheme",
        {"https_proxy": "http://proxy:1", "all_proxy": "http://all:1"},
        "https://h",
        "http://proxy:1",
    ),
    ("that of all schemes", {"http_proxy": "http://proxy:1", "all_proxy": "http://all:1"}, "https://h", "http://all:1"),
    ("without a scheme of its own", {"https_proxy": "proxy:1"}, "https://host", "http://proxy:1"),
    ("not for this host", {"https_proxy": "proxy:1", "no_proxy": "host,other"}, "https://host:8443", None),
)
def test_the_environment_names_a_urls_proxy(
    proxies: Callable[..., None], variables: dict[str, str], url: str, proxy: str | None
) -> None:
    proxies(**variables)
    assert proxy_for(url) == proxy


@pytest.fixture
def netrc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials for this machine in `~/.netrc`, which other programs use."""
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login user password {SECRET}\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.mark.usefixtures("netrc")
@table("key, authorization", ("no key", "", None), ("a key", KEY, f"Bearer {KEY}"))
def test_credentials_in_netrc_are_not_for_the_provider(provider: Provider, key: str, authorization: str | None) -> None:
    answer_of(text("Hello"), where(provider, key))
    assert provider.calls[0].authorization == authorization


def trusting_the_environment(url: str, **options: Any) -> int:
    """Asks for a text by aiohttp with its own reading of the environment. Returns the status."""
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}

    async def ask() -> int:
        async with aiohttp.ClientSession(trust_env=True) as session:
            async with session.post(f"{url}/chat/completions", json=body, **options) as response:
                return response.status

    return asyncio.run(ask())


@table(
    "variable, scheme, error",
    ("it doesn't know the variable", "all_proxy", "http://", aiohttp.ClientConnectorError),
    ("it needs a scheme", "http_proxy", "", aiohttp.InvalidURL),
)
def test_aiohttps_trust_env_misses_proxies_that_other_programs_use(
    provider: Provider, proxies: Callable[..., None], variable: str, scheme: str, error: type[Exception]
) -> None:
    """If this fails, and the two tests below as well: then see what workerkit/proxies.py is still needed for."""
    proxies(**{variable: as_proxy(provider, scheme)})
    with pytest.raises(error):
        trusting_the_environment("http://provider.invalid/v1")


@pytest.mark.usefixtures("netrc")
def test_aiohttps_trust_env_sends_the_credentials_of_netrc_to_the_provider(provider: Provider) -> None:
    """If this fails, and the tests above and below as well: then see what workerkit/proxies.py is still needed for."""
    trusting_the_environment(provider.url)
    assert provider.calls[0].authorization == f"Basic {base64.b64encode(f'user:{SECRET}'.encode()).decode()}"


@pytest.mark.usefixtures("netrc")
def test_aiohttps_trust_env_refuses_a_key_beside_credentials_in_netrc(provider: Provider) -> None:
    """If this fails, and the two tests above as well: then see what workerkit/proxies.py is still needed for."""
    with pytest.raises(ValueError, match="Cannot combine"):
        trusting_the_environment(provider.url, headers={"authorization": f"Bearer {KEY}"})


# ── a picture's address, behind a proxy as well ──────────────────────────────────────────────────────────────────


class RecordingProxy:
    """A proxy that has no file, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.requests: list[str] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.requests.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()


def test_a_proxy_gets_a_pictures_checked_address_and_not_its_name(
    provider: Provider, proxies: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look_up(_host: str, _port: int) -> str:
        return "93.184.216.34"

    async def fetch(ours: OpenAIProvider) -> None:
        async with server(proxy) as url:
            proxies(http_proxy=url)
            with pytest.raises(FailJob, match="HTTP 404 for the picture's URL"):
                await image("[url http://pictures.example/a.png]")(ours)

    monkeypatch.setattr("workerkit.pictures.public_address", look_up)
    proxy = RecordingProxy()
    answer_of(fetch, where(provider))
    [request] = proxy.requests
    assert request.startswith("GET http://93.184.216.34/a.png HTTP/1.1\r\n")
    assert "\r\nhost: pictures.example\r\n" in request.lower()


@pytest.mark.parametrize("host", ["10.0.0.1", "localhost"])
def test_a_picture_in_the_operators_network_is_refused_behind_a_proxy(
    provider: Provider, proxies: Callable[..., None], host: str
) -> None:
    proxies(http_proxy=as_proxy(provider), no_proxy="127.0.0.1")
    with pytest.raises(FailJob, match="isn't public"):
        answer_of(image(f"[url http://{host}/a.png]"), where(provider))


def fetch_by_aiohttp(url: str, **connector: Any) -> None:
    """Gets a URL through a proxy by aiohttp, with a connector that has these options."""

    async def fetch() -> None:
        async with server(RecordingProxy()) as proxy:
            proxy = proxy.replace("127.0.0.1", "localhost")
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(**connector)) as session:
                async with session.get(url, proxy=proxy) as response:
                    assert response.status == 404  # the proxy was asked

    asyncio.run(fetch())


def test_aiohttps_socket_factory_sees_only_the_proxy() -> None:
    """If this fails: then check addresses there, and delete the pinning from `OpenAIProvider._fetch`."""
    seen: list[str] = []

    def make(info: tuple[Any, ...]) -> socket.socket:
        seen.append(info[4][0])
        return socket.socket(*info[:3])

    fetch_by_aiohttp("http://10.0.0.1/a.png", socket_factory=make)
    assert set(seen) <= {"127.0.0.1", "::1"}


def test_aiohttps_resolver_sees_only_the_proxy() -> None:
    """If this fails: then check addresses there, and delete the pinning from `OpenAIProvider._fetch`."""

    class Recording(AbstractResolver):
        def __init__(self) -> None:
            self.hosts: list[str] = []

        async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> list[ResolveResult]:
            self.hosts.append(host)
            found = ResolveResult(hostname=host, host="127.0.0.1", port=port, family=socket.AF_INET, proto=0, flags=0)
            return [found]

        async def close(self) -> None: ...

    resolver = Recording()
    fetch_by_aiohttp("http://internal.invalid/a.png", resolver=resolver)
    assert resolver.hosts == ["localhost"]


# ── streams, by our way and by aiohttp's ─────────────────────────────────────────────────────────────────────────


def test_aiohttps_lines_do_not_end_at_cr(provider: Provider) -> None:
    """If this fails: then aiohttp's `readline` may replace `EventReader._lines` in workerkit/provider.py."""
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "[sse cr] [say one two]"}]}

    async def read_lines() -> list[bytes]:
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{provider.url}/chat/completions", json=body) as response:
                return [line async for line in response.content]

    [only] = asyncio.run(read_lines())
    assert only.count(b"\r\rdata: ") > 2


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices": [{"delta": {"content": "one"}}]}\n\n'


class BrokenChunk:
    """Sends a good chunk, once it is read a broken one, and notes when the client closes its connection."""

    def __init__(self) -> None:
        self.go_on, self.is_closed = asyncio.Event(), asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(CHUNKED + b"%x\r\n%s\r\n" % (len(EVENT), EVENT))
        await self.go_on.wait()
        writer.write(b"no number\r\n")
        while await reader.read(1024):
            pass
        self.is_closed.set()


def test_a_broken_chunk_ends_the_reading_of_a_stream() -> None:
    async def read() -> None:
        broken = BrokenChunk()
        async with server(broken) as url, opened(at_url(url)) as ours, asyncio.timeout(10):
            await text("Hello", on_delta=lambda _: broken.go_on.set())(ours)

    with pytest.raises(RetryJob):
        asyncio.run(read())


def test_aiohttp_wakes_no_reader_after_a_broken_chunk() -> None:
    """If this fails: then delete `connection_watched` from workerkit/provider.py."""

    async def read() -> bool:
        broken = BrokenChunk()
        async with server(broken) as url, aiohttp.ClientSession() as session, session.get(url) as response:
            assert await response.content.readany() == EVENT
            reading = asyncio.ensure_future(response.content.readany())
            broken.go_on.set()
            await asyncio.wait_for(broken.is_closed.wait(), 10)
            await asyncio.wait([reading], timeout=0.5)
            is_awake = reading.done()
            reading.cancel()
        return is_awake

    assert not asyncio.run(read())


# ── a provider that is away ──────────────────────────────────────────────────────────────────────────────────────


async def refused(breaker: Breaker) -> None:
    with pytest.raises(ProviderAway):
        with breaker.watch():
            raise ProviderAway


async def succeeded(breaker: Breaker) -> None:
    with breaker.watch():
        pass


async def is_open(breaker: Breaker) -> bool:
    """Whether a job may try, and soon."""
    with contextlib.suppress(RetryJob):
        await breaker.wait(0.3)
        return True
    return False


@table("failures, goes_through", ("once is nothing", 1, True), ("twice is a pause here", 2, False))
def test_after_failures_in_a_row_the_next_call_waits(failures: int, goes_through: bool) -> None:
    async def fail_and_try() -> bool:
        breaker = Breaker(failures_before_pause=2)
        for _ in range(failures):
            await refused(breaker)
        return await is_open(breaker)

    assert asyncio.run(fail_and_try()) is goes_through


def test_a_success_in_between_starts_the_count_again() -> None:
    async def fail_in_turns() -> bool:
        breaker = Breaker(failures_before_pause=2)
        for _ in range(3):
            await refused(breaker)
            assert await is_open(breaker)
            await succeeded(breaker)
        return True

    assert asyncio.run(fail_in_turns())


@table("error", ("a busy provider", RetryJob), ("a refusal", FailJob))
def test_any_answer_in_between_starts_the_count_again(error: type[JobError]) -> None:
    async def fail_in_turns() -> bool:
        breaker = Breaker(failures_before_pause=2)
        for _ in range(3):
            await refused(breaker)
            with contextlib.suppress(error), breaker.watch():
                raise error
        return await is_open(breaker)

    assert asyncio.run(fail_in_turns())


@table("error", ("a busy provider", RetryJob), ("a refusal", FailJob))
def test_one_jobs_own_error_never_makes_others_wait(error: type[JobError]) -> None:
    async def fail_and_try() -> bool:
        breaker = Breaker(failures_before_pause=2)
        for _ in range(3):
            with contextlib.suppress(error), breaker.watch():
                raise error
        await refused(breaker)
        return await is_open(breaker)

    assert asyncio.run(fail_and_try())


def test_a_pause_ends() -> None:
    async def wait() -> float:
        breaker, begun = Breaker(failures_before_pause=1, max_pause_s=0.2), time.monotonic()
        await refused(breaker)
        await breaker.wait(5)
        return time.monotonic() - begun

    assert asyncio.run(wait()) >= 0.2


def test_after_a_pause_one_job_tries_and_its_success_lets_the_others_go_on() -> None:
    async def try_in_turn() -> list[bool]:
        breaker = Breaker(failures_before_pause=1)
        await refused(breaker)
        await breaker.wait(5)
        others_before = await is_open(breaker)
        await succeeded(breaker)
        return [others_before, await is_open(breaker)]

    assert asyncio.run(try_in_turn()) == [False, True]


def test_a_job_that_waited_in_vain_for_the_provider_comes_back_uncounted() -> None:
    async def wait_in_vain() -> None:
        breaker = Breaker(failures_before_pause=1)
        await refused(breaker)
        await breaker.wait(0.1)

    with pytest.raises(RetryJob) as caught:
        asyncio.run(wait_in_vain())
    assert not caught.value.is_counted
    assert caught.value.after_s is not None
    assert 0 < caught.value.after_s <= 1


@table("failures, pause_s", ("too few", 2, 0.0), ("enough", 3, 1.0), ("many of one outage", 60, 1.0))
def test_failures_that_overlap_make_one_pause(failures: int, pause_s: float) -> None:
    async def fail(breaker: Breaker) -> None:
        with contextlib.suppress(RetryJob), breaker.watch():
            await asyncio.sleep(0)
            raise ProviderAway

    async def fail_together() -> float:
        breaker = Breaker(failures_before_pause=3)
        await asyncio.gather(*(fail(breaker) for _ in range(failures)))
        return breaker._resume_at - breaker._paused_at

    assert asyncio.run(fail_together()) == pytest.approx(pause_s)
