"""Fetching a picture by its URL: what may be asked and what not, hop by hop, and what the host's errors mean."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import ipaddress
import json
import socket
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from testbed.answers import picture
from testbed.provider import Provider
from tests.http_lab import MODEST_BYTES, Scripted, answer_of, at_url, http_answer, image, opened, server, where
from tests.lab import KEY, NOWHERE, SECRET, table
from workerkit.client import open_session
from workerkit.errors import FailJob, JobError, OperatorFault, ProviderAway, RetryJob
from workerkit.pictures import MAX_HOPS, PictureFetcher, is_public, origins_of, public_address
from workerkit.provider import OpenAIProvider
from workerkit.sentences import PICTURE_GONE, TOO_LARGE

PNG = picture(64, 48)
CANT_BE_FETCHED = "The picture can't be fetched"


def fetched(host: Scripted, path: str = "/a.png", trusted: str = "{host}") -> bytes:
    """Fetches from a host at a path. `{host}` stands for the host's address and port."""

    async def fetch() -> bytes:
        async with server(host) as url, open_session() as session, asyncio.timeout(30):
            address = url.removeprefix("http://")
            host.answers = {name: body.replace(b"{host}", address.encode()) for name, body in host.answers.items()}
            origins = origins_of([trusted.format(host=address)])
            return await PictureFetcher(session, origins, MODEST_BYTES).fetch(f"{url}{path.format(host=address)}")

    return asyncio.run(fetch())


def to(location: str, status: int = 302) -> bytes:
    return http_answer(status=status, location=location)


# ── what may be asked ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_picture_is_fetched_from_the_providers_own_host_without_its_key(provider: Provider) -> None:
    assert answer_of(image("[url]"), where(provider))[0] == PNG
    generated, picture_call = provider.calls
    assert (generated.authorization, picture_call.authorization) == (f"Bearer {KEY}", None)


def test_the_key_of_a_versioned_interface_is_not_for_the_picture_either(provider: Provider) -> None:
    answer_of(image("[url]"), at_url(f"{provider.url}?api-version=1"))
    assert [call.api_key for call in provider.calls] == [KEY, None]


def test_user_and_password_of_the_url_are_not_for_the_picture(provider: Provider) -> None:
    named = at_url(provider.url.replace("://", f"://user:{SECRET}@"))
    assert answer_of(image("[url]"), named)[0] == PNG
    assert provider.calls[1].authorization is None


def test_user_and_password_in_a_pictures_url_are_not_sent() -> None:
    host = Scripted({"/a.png": to(f"http://user:{SECRET}@{{host}}/b.png"), "/b.png": http_answer(PNG)})
    assert fetched(host) == PNG
    assert not any("authorization" in request.lower() or SECRET in request for request in host.requests)


def test_another_port_of_the_providers_host_is_not_asked(provider: Provider) -> None:
    host = Scripted({"*": http_answer(PNG)})

    async def fetch(ours: OpenAIProvider) -> None:
        async with server(host) as url:
            await image(f"[url {url}/a.png]")(ours)

    with pytest.raises(OperatorFault, match="list its host and port in PICTURE_HOSTS"):
        answer_of(fetch, where(provider))
    assert host.requests == []


@table(
    "listed, is_asked",
    ("its host and port", "{host}", True),
    ("with its scheme", "http://{host}", True),
    ("with another scheme", "https://{host}", False),
    ("its host alone, which means the usual ports", "127.0.0.1", False),
    ("another port", "127.0.0.1:1", False),
    ("another name of it", "localhost", False),
)
def test_a_host_inside_the_network_is_asked_where_picture_hosts_lists_it(
    provider: Provider, listed: str, is_asked: bool
) -> None:
    host = Scripted({"*": http_answer(PNG)})

    async def fetch() -> None:
        async with server(host) as url:
            place = where(provider, picture_hosts=(listed.format(host=url.removeprefix("http://")),))
            async with opened(place) as ours:
                await image(f"[url {url}/a.png]")(ours)

    with contextlib.nullcontext() if is_asked else pytest.raises(OperatorFault, match="isn't public"):
        asyncio.run(fetch())
    assert bool(host.requests) is is_asked


@table(
    "url",
    ("a file of this machine", "file:///etc/passwd"),
    ("another protocol", "ftp://pictures.example/a.png"),
    ("a port that isn't one", "http://pictures.example:99999/x.png"),
    ("no number for a port", "http://host:port/x.png"),
    ("the operator's network", "http://10.0.0.1/x.png"),
    ("a cloud's metadata", "http://169.254.169.254/latest"),
    ("this machine by name", "http://localhost:9/x.png"),
    ("this machine in IPv6", "http://[::1]:9/x.png"),
    ("this machine as a number", "http://2130706433/x.png"),
    ("this machine in short", "http://127.1/x.png"),
    ("a metadata service of the same scheme", "//169.254.169.254/latest"),
)
def test_a_url_that_leads_into_the_network_or_nowhere_fails_the_job(url: str) -> None:
    host = Scripted({"*": http_answer(json.dumps({"data": [{"url": url}]}).encode())})

    async def fetch() -> None:
        async with server(host) as provider_url, opened(at_url(f"{provider_url}/v1")) as ours, asyncio.timeout(30):
            await image("A city")(ours)

    with pytest.raises(FailJob):
        asyncio.run(fetch())
    assert host.paths == ["/v1/images/generations"]


@table(
    "url, path",
    ("beside the interface", "files/a.png", "/v1/files/a.png"),
    ("from the root", "/files/a.png", "/files/a.png"),
    ("one level up", "../a.png", "/a.png"),
    ("with a query", "/a.png?sig=x%2By", "/a.png?sig=x%2By"),
    ("on the same host", "//{host}/a.png", "/a.png"),
)
def test_a_relative_url_is_relative_to_the_provider(url: str, path: str) -> None:
    host = Scripted()

    async def fetch() -> bytes:
        async with server(host) as provider_url, opened(at_url(f"{provider_url}/v1")) as ours:
            named = url.format(host=provider_url.removeprefix("http://"))
            host.answers = {path: http_answer(PNG)}
            host.answers["/v1/images/generations"] = http_answer(json.dumps({"data": [{"url": named}]}).encode())
            return bytes((await image("A city")(ours))[0])

    assert asyncio.run(fetch()) == PNG
    assert host.paths[1] == path


@table(
    "path, asked",
    ("a signature", "/a.png?sig=a%2Bb%2Fc%3D&se=1+2", "/a.png?sig=a%2Bb%2Fc%3D&se=1+2"),
    ("an escaped slash", "/a%2Fb.png", "/a%2Fb.png"),
    ("a fragment, which is the reader's", "/a.png#top", "/a.png"),
    ("letters that HTTP doesn't have", "/größe 1.png", "/gr%C3%B6%C3%9Fe%201.png"),
)
def test_a_url_is_asked_for_as_it_is_written(path: str, asked: str) -> None:
    host = Scripted({asked: http_answer(PNG)})
    assert fetched(host, path) == PNG


# ── redirects ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("location", ["/b.png", "b.png", "http://{host}/b.png", "//{host}/b.png"])
def test_a_redirect_to_a_place_that_may_be_asked_is_followed(status: int, location: str) -> None:
    assert fetched(Scripted({"/a.png": to(location, status), "/b.png": http_answer(PNG)})) == PNG


@table(
    "location",
    ("another port", f"http://{NOWHERE}/b.png"),
    ("another loopback address", "http://127.0.0.2/b.png"),
    ("the operator's network", "http://10.0.0.1/b.png"),
    ("a cloud's metadata, by the same scheme", "//169.254.169.254/latest"),
    ("another scheme on the same port", "https://{host}/b.png"),
    ("a file", "file:///etc/passwd"),
    ("data", "data:image/png;base64,AAAA"),
)
def test_a_redirect_to_a_place_that_may_not_be_asked_is_refused(location: str) -> None:
    host = Scripted({"/a.png": to(location), "/b.png": http_answer(PNG)})
    with pytest.raises(FailJob):
        fetched(host, trusted="http://{host}")
    assert host.paths == ["/a.png"]


def test_a_host_that_was_checked_may_not_lead_into_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    async def look_up(host: str, port: int) -> str:
        return "127.0.0.1" if host == "pictures.example" else await public_address(host, port)

    async def fetch() -> None:
        async with server(host) as url, open_session() as session:
            named = url.replace("127.0.0.1", "pictures.example")
            await PictureFetcher(session, frozenset(), MODEST_BYTES).fetch(f"{named}/a.png")

    monkeypatch.setattr("workerkit.pictures.public_address", look_up)
    host = Scripted({"*": to("http://127.0.0.1:9/b.png")})
    with pytest.raises(OperatorFault, match="isn't public"):
        asyncio.run(fetch())
    assert len(host.requests) == 1


@table("location", ("round and round", "/a.png"), ("nowhere", ""), ("ever further", "a.png?a.png"))
def test_redirects_without_end_end(location: str) -> None:
    host = Scripted({"*": to(location)})
    with pytest.raises(FailJob) as caught:
        fetched(host)
    assert caught.value.sentence == PICTURE_GONE
    assert len(host.requests) == MAX_HOPS


# ── the host's errors ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [204, 304, 400, 401, 402, 403, 404, 410, 422])
def test_an_error_of_the_pictures_host_is_neither_the_keys_nor_the_persons(status: int) -> None:
    with pytest.raises(FailJob) as caught:
        fetched(Scripted({"*": http_answer(b'{"error": "invalid_api_key"}' if status >= 400 else b"", status)}))
    assert type(caught.value) is FailJob
    assert (caught.value.detail, caught.value.sentence) == (f"HTTP {status} for the picture's URL", PICTURE_GONE)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_pictures_host_that_is_busy_is_tried_again(status: int) -> None:
    with pytest.raises(RetryJob) as caught:
        fetched(Scripted({"*": http_answer(b"", status, retry_after="7")}))
    assert not isinstance(caught.value, ProviderAway)  # other jobs have nothing to do with this host
    assert caught.value.sentence == CANT_BE_FETCHED


@table(
    "answer",
    ("nothing", b"\n"),
    ("no HTTP", b"SSH-2.0-OpenSSH_9.2\r\n"),
    ("half of it", http_answer(PNG)[:-9]),
    ("half of what is encoded", http_answer(gzip.compress(PNG)[:-9], content_encoding="gzip")),
)
def test_a_picture_that_breaks_off_is_tried_again(answer: bytes) -> None:
    with pytest.raises(RetryJob):
        fetched(Scripted({"*": answer}))


def test_a_pictures_host_that_isnt_there_is_tried_again_and_counts(provider: Provider) -> None:
    place = where(provider, picture_hosts=(NOWHERE,))
    with pytest.raises(RetryJob) as caught:
        answer_of(image(f"[url http://{NOWHERE}/a.png]"), place)
    assert (caught.value.sentence, caught.value.is_counted) == (CANT_BE_FETCHED, True)


def test_an_encoded_picture_is_unpacked() -> None:
    assert fetched(Scripted({"*": http_answer(gzip.compress(PNG), content_encoding="gzip")})) == PNG


@table(
    "body, headers",
    ("plain", bytes(MODEST_BYTES + 1), {}),
    ("encoded", gzip.compress(bytes(MODEST_BYTES + 1)), {"content_encoding": "gzip"}),
)
def test_a_picture_beyond_the_cap_is_too_large(body: bytes, headers: dict[str, str]) -> None:
    with pytest.raises(FailJob) as caught:
        fetched(Scripted({"*": http_answer(body, **headers)}))
    assert caught.value.sentence == TOO_LARGE


# ── addresses ────────────────────────────────────────────────────────────────────────────────────────────────────


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


def test_a_picture_elsewhere_is_fetched_from_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    async def look_up(host: str, _port: int) -> str:
        assert host == "pictures.example"
        return "127.0.0.1"

    async def fetch() -> bytes:
        async with server(host) as url, open_session() as session:
            named = url.replace("127.0.0.1", "pictures.example")
            return await PictureFetcher(session, frozenset(), MODEST_BYTES).fetch(f"{named}/a.png")

    monkeypatch.setattr("workerkit.pictures.public_address", look_up)
    host = Scripted({"/a.png": http_answer(PNG)})
    assert asyncio.run(fetch()) == PNG
    assert any(header.startswith("host: pictures.example:") for header in host.headers())


# ── behind a proxy ───────────────────────────────────────────────────────────────────────────────────────────────


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
    proxy = Scripted()
    answer_of(fetch, where(provider))
    assert proxy.paths == ["http://93.184.216.34/a.png"]
    assert "host: pictures.example" in proxy.headers()


@pytest.mark.parametrize("host", ["10.0.0.1", "localhost"])
def test_a_picture_in_the_operators_network_is_refused_behind_a_proxy(
    provider: Provider, proxies: Callable[..., None], host: str
) -> None:
    proxies(http_proxy=f"http://127.0.0.1:{provider.port}", no_proxy="127.0.0.1")
    with pytest.raises(FailJob, match="isn't public"):
        answer_of(image(f"[url http://{host}/a.png]"), where(provider))


@table(
    "url, status, error, detail",
    ("its login, asked for a page", "http://93.184.216.34/a.png", 407, OperatorFault, "the proxy's user and password"),
    ("its login, asked for a way", "https://93.184.216.34/a.png", 407, OperatorFault, "the proxy's user and password"),
)
def test_what_a_proxy_refuses_of_a_picture_is_its_own_fault(
    provider: Provider, proxies: Callable[..., None], url: str, status: int, error: type[JobError], detail: str
) -> None:
    async def fetch(ours: OpenAIProvider) -> None:
        async with server(Scripted({"*": http_answer(status=status)})) as proxy:
            proxies(all_proxy=proxy, no_proxy="127.0.0.1")
            await image(f"[url {url}]")(ours)

    with pytest.raises(error, match=detail):
        answer_of(fetch, where(provider))


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_picture_that_is_made_but_that_a_proxy_cant_get_counts_as_a_try(
    provider: Provider, proxies: Callable[..., None], scheme: str
) -> None:
    async def fetch(ours: OpenAIProvider) -> None:
        async with server(Scripted({"*": http_answer(status=502)})) as proxy:
            proxies(all_proxy=proxy, no_proxy="127.0.0.1")
            await image(f"[url {scheme}://93.184.216.34/a.png]")(ours)

    with pytest.raises(RetryJob) as caught:
        answer_of(fetch, where(provider))
    assert (type(caught.value), caught.value.is_counted) == (RetryJob, True)
    assert caught.value.sentence == CANT_BE_FETCHED


def fetch_by_aiohttp(url: str, **connector: Any) -> None:
    """Gets a URL through a proxy by aiohttp, with a connector that has these options."""

    async def fetch() -> None:
        async with server(Scripted()) as proxy:
            proxy = proxy.replace("127.0.0.1", "localhost")
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(**connector)) as session:
                async with session.get(url, proxy=proxy) as response:
                    assert response.status == 404  # the proxy was asked

    asyncio.run(fetch())


def test_aiohttps_socket_factory_sees_only_the_proxy() -> None:
    """If this fails: then check addresses there, and delete the pinning from `PictureFetcher`."""
    seen: list[str] = []

    def make(info: tuple[Any, ...]) -> socket.socket:
        seen.append(info[4][0])
        return socket.socket(*info[:3])

    fetch_by_aiohttp("http://10.0.0.1/a.png", socket_factory=make)
    assert set(seen) <= {"127.0.0.1", "::1"}


def test_aiohttps_resolver_sees_only_the_proxy() -> None:
    """If this fails: then check addresses there, and delete the pinning from `PictureFetcher`."""

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


# ── the answer that names it ─────────────────────────────────────────────────────────────────────────────────────


def picture_in(item: object) -> bytes:
    """The picture that the worker takes out of an answer with this item."""

    async def fetch() -> bytes:
        host = Scripted({"*": http_answer(json.dumps({"data": [item]}).encode())})
        async with server(host) as url, opened(at_url(url)) as ours:
            return bytes((await image("A city")(ours))[0])

    return asyncio.run(fetch())


@table(
    "item",
    ("as text", {"b64_json": base64.b64encode(PNG).decode()}),
    ("beside no URL", {"b64_json": base64.b64encode(PNG).decode(), "url": None}),
    ("as the URL itself", {"url": f"data:image/png;base64,{base64.b64encode(PNG).decode()}"}),
    ("as the URL, beside no text", {"b64_json": None, "url": f"data:;base64,{base64.b64encode(PNG).decode()}"}),
)
def test_a_picture_comes_in_the_answer_itself(item: dict[str, Any]) -> None:
    assert picture_in(item) == PNG


@pytest.mark.parametrize("item", [{}, {"b64_json": "", "url": ""}, None, 7, "text", [], {"url": 7}, {"b64_json": {}}])
def test_an_answer_without_a_picture_fails_the_job(item: object) -> None:
    with pytest.raises(FailJob):
        picture_in(item)
