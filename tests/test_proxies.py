"""Proxies between the worker and its provider, or a picture's host: which one a URL takes, and what a proxy refuses.

The proxy in these tests is real: it passes requests on, connects (CONNECT) and asks for a password.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from testbed.network import Certificate, TlsProxy, make_certificate
from testbed.provider import Provider
from tests.lab import KEY, NOWHERE, SECRET, bare_settings, table
from tests.site import run_python
from worker_commands.run import print_start
from workerkit.errors import JobError, OperatorFault, ProviderAway
from workerkit.provider import OpenAIProvider
from workerkit.proxies import ProxyFault, matches, proxy_for
from workerkit.settings import ProviderSettings, load_settings

SetProxies = Callable[..., None]
MODEST_BYTES = 2**18


@dataclass
class Asked:
    """What a proxy was asked for."""

    method: str
    target: str
    login: str = ""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class HttpProxy:
    """A proxy for HTTP and HTTPS that leads to one server, whatever is asked for. `status` makes it refuse."""

    server_port: int
    status: int = 0
    asked: list[Asked] = field(default_factory=list)
    port: int = 0

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[HttpProxy]:
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as listening:
            self.port = listening.sockets[0].getsockname()[1]
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
            login = base64.b64decode(headers.get("proxy-authorization", "").removeprefix("Basic ")).decode()
            method, target, _ = first.split(" ")
            self.asked.append(Asked(method, target, login, headers))
            if self.status:
                writer.write(b"HTTP/1.1 %d Refused\r\nContent-Length: 0\r\n\r\n" % self.status)
            else:
                await self._pass_on(head, method, target, reader, writer)
            await writer.drain()
        writer.close()

    async def _pass_on(
        self, head: str, method: str, target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Asks the server itself, which takes no other host's requests amiss."""
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self.server_port)
        if method == "CONNECT":
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            there_writer.write(head.replace(target, re.sub("^http://[^/]*", "", target), 1).encode())
        pumps = [asyncio.ensure_future(pump(*way)) for way in ((reader, there_writer), (there_reader, writer))]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for one in pumps:
            one.cancel()
        there_writer.close()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(2**16):
            writer.write(piece)
            await writer.drain()


def through(
    proxy: HttpProxy, url: str, ask: Callable[[OpenAIProvider], Awaitable[Any]], use: Callable[[int], None]
) -> Any:
    """Asks a provider while the proxy listens. `use` is told the proxy's port, and sets the environment."""

    async def run() -> Any:
        async with proxy.listening():
            use(proxy.port)
            ours = OpenAIProvider(ProviderSettings(url, KEY, "model", ()), MODEST_BYTES)
            async with ours.session, asyncio.timeout(30):
                return await ask(ours)

    return asyncio.run(run())


def text(ours: OpenAIProvider) -> Awaitable[Any]:
    messages = [{"role": "user", "content": "[say hello]"}]
    return ours.text({"model": "model", "messages": messages}, lambda _: None)


def picture_at(url: str) -> Callable[[OpenAIProvider], Awaitable[Any]]:
    request = {"model": "model", "prompt": f"[url {url}]", "size": "64x48"}
    return lambda ours: ours.image(request)


# ── which way a URL takes ────────────────────────────────────────────────────────────────────────────────────────


@table(
    "entry, url, is_meant",
    ("a name", "gpu", "http://gpu/v1", True),
    ("a name in capitals", "GPU", "http://gpu/v1", True),
    ("a name with a dot behind it", "gpu", "http://gpu./v1", True),
    ("a domain's host", "example.com", "https://api.example.com", True),
    ("no domain, but the same end", "example.com", "https://myexample.com", False),
    ("a leading dot", ".example.com", "https://api.example.com", True),
    ("a leading dot, and the domain itself", ".example.com", "https://example.com", True),
    ("a leading dot, and the same end", ".example.com", "https://myexample.com", False),
    ("a wildcard for hosts", "*.example.com", "https://a.b.example.com", True),
    ("a wildcard for hosts, and the same end", "*.example.com", "https://myexample.com", False),
    ("a wildcard within a name", "gpu-*", "http://gpu-7:8000/v1", True),
    ("a wildcard for addresses", "192.168.*", "http://192.168.3.4/v1", True),
    ("everything", "*", "https://api.openai.com/v1", True),
    ("an address", "10.1.2.3", "http://10.1.2.3:8000/v1", True),
    ("another address that begins alike", "10.1.2.3", "http://10.1.2.33/v1", False),
    ("a network", "10.0.0.0/8", "http://10.1.2.3:8000/v1", True),
    ("a network's other side", "10.0.0.0/8", "http://11.1.2.3/v1", False),
    ("a network of this machine", "127.0.0.0/8", "http://127.0.0.1:11434/v1", True),
    ("a network by one of its addresses", "10.1.2.3/8", "http://10.9.9.9/v1", True),
    ("a network and a name", "10.0.0.0/8", "http://10.example.com/v1", False),
    ("a port", "gpu:8000", "http://gpu:8000/v1", True),
    ("another port", "gpu:8000", "http://gpu:8001/v1", False),
    ("a port that a URL leaves out", "gpu:443", "https://gpu/v1", True),
    ("a domain's port", ".example.com:8443", "https://api.example.com:8443/v1", True),
    ("a network's port", "10.0.0.0/8:8000", "http://10.1.2.3:8000/v1", True),
    ("a network's other port", "10.0.0.0/8:8000", "http://10.1.2.3/v1", False),
    ("IPv6", "::1", "http://[::1]:8000/v1", True),
    ("IPv6 written otherwise", "0:0:0:0:0:0:0:1", "http://[::1]/v1", True),
    ("IPv6 in brackets", "[::1]", "http://[::1]/v1", True),
    ("IPv6 with a port", "[::1]:8000", "http://[::1]:8000/v1", True),
    ("IPv6 with another port", "[::1]:8000", "http://[::1]:8001/v1", False),
    ("a network of IPv6", "fd00::/8", "http://[fd12::7]/v1", True),
    ("a network of IPv6 in brackets", "[fd00::]/8", "http://[fd12::7]/v1", True),
    ("a network of IPv4 for IPv6", "0.0.0.0/0", "http://[fd12::7]/v1", False),
    ("behind spaces", "other ,  10.0.0.0/8 ", "http://10.1.2.3/v1", True),
    ("separated by spaces", "other 10.0.0.0/8", "http://10.1.2.3/v1", True),
    ("empty", " ,, ", "http://10.1.2.3/v1", False),
)
@pytest.mark.parametrize("variable", ["no_proxy", "NO_PROXY"])
def test_no_proxy_names_what_is_asked_directly(
    proxies: SetProxies, variable: str, entry: str, url: str, is_meant: bool
) -> None:
    proxies(**{variable: entry, "all_proxy": "http://proxy:3128"})
    assert proxy_for(url) == (None if is_meant else "http://proxy:3128")


@table(
    "variables, proxy",
    ("lower case", {"https_proxy": "http://lower:1"}, "http://lower:1"),
    ("upper case", {"HTTPS_PROXY": "http://upper:1"}, "http://upper:1"),
    ("both", {"https_proxy": "http://lower:1", "HTTPS_PROXY": "http://upper:1"}, "http://lower:1"),
    ("empty takes the upper one back", {"https_proxy": "", "HTTPS_PROXY": "http://upper:1"}, None),
    ("of all schemes", {"ALL_PROXY": "http://all:1"}, "http://all:1"),
    ("SOCKS for what has its own", {"ALL_PROXY": "socks5://all:1", "https_proxy": "http://own:1"}, "http://own:1"),
    ("without a scheme", {"https_proxy": " user:password@proxy:1 "}, "http://user:password@proxy:1"),
    ("of another scheme", {"http_proxy": "http://proxy:1"}, None),
)
def test_a_variable_names_the_proxy(proxies: SetProxies, variables: dict[str, str], proxy: str | None) -> None:
    proxies(**variables)
    assert proxy_for("https://api.openai.com/v1") == proxy


@pytest.mark.parametrize("entry", ["10.0.0.0/8", "10.1.*", "10.1.2.3:8000", "[::1]", "fd00::/8"])
def test_urllib_knows_no_networks_no_wildcards_and_no_brackets(proxies: SetProxies, entry: str) -> None:
    """If this fails for all of them: then `proxy_bypass` may replace `matches` in workerkit/proxies.py."""
    proxies(no_proxy=entry)
    assert not any(map(urllib.request.proxy_bypass, ("10.1.2.3", "::1", "fd12::7")))


# ── the way through a real proxy ─────────────────────────────────────────────────────────────────────────────────

LOGINS = (("user", "password"), ("user%40corp", f"{SECRET}%3A%23%2F"), ("user", "p%C3%A9%E2%82%AC"), ("user", "a@b"))


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_a_provider_is_asked_through_the_proxy(provider: Provider, proxies: SetProxies, variable: str) -> None:
    proxy = HttpProxy(provider.port)
    said = through(proxy, "http://gpu.invalid/v1", text, lambda port: proxies(**{variable: f"http://127.0.0.1:{port}"}))
    assert said.text == "hello"
    assert [one.target for one in proxy.asked] == ["http://gpu.invalid/v1/chat/completions"]


@pytest.mark.parametrize("login", LOGINS)
def test_a_proxy_gets_its_user_and_password_and_the_provider_does_not(
    provider: Provider, proxies: SetProxies, login: tuple[str, str]
) -> None:
    user, password = login
    proxy = HttpProxy(provider.port)
    through(
        proxy,
        "http://gpu.invalid/v1",
        text,
        lambda port: proxies(http_proxy=f"http://{user}:{password}@127.0.0.1:{port}"),
    )
    assert proxy.asked[0].login == f"{urllib.parse.unquote(user)}:{urllib.parse.unquote(password)}"
    assert provider.calls[0].authorization == f"Bearer {KEY}"


@table(
    "no_proxy, is_direct",
    ("its network", "10.0.0.0/8, 127.0.0.0/8", True),
    ("a wildcard", "127.0.*", True),
    ("its port", "127.0.0.1:{port}", True),
    ("another port", "127.0.0.1:1", False),
    ("another network", "10.0.0.0/8", False),
    ("all", "*", True),
)
def test_a_provider_that_no_proxy_names_is_asked_directly(
    provider: Provider, proxies: SetProxies, no_proxy: str, is_direct: bool
) -> None:
    proxy, entry = HttpProxy(provider.port), no_proxy.format(port=provider.port)
    through(proxy, provider.url, text, lambda port: proxies(http_proxy=f"127.0.0.1:{port}", NO_PROXY=entry))
    assert bool(proxy.asked) is not is_direct
    assert len(provider.calls) == 1


@table("no_proxy, is_direct", ("by the proxy", "127.0.0.0/8", False), ("directly", "127.0.0.1/8,*.example", True))
def test_a_picture_takes_its_own_way(
    provider: Provider, proxies: SetProxies, monkeypatch: pytest.MonkeyPatch, no_proxy: str, is_direct: bool
) -> None:
    """Its host is not the provider, which is asked directly here."""

    async def look_up(_host: str, _port: int) -> str:
        return "127.0.0.1"  # as if this were a public address

    monkeypatch.setattr("workerkit.pictures.public_address", look_up)
    proxy = HttpProxy(provider.port)
    url = f"http://pictures.example:{provider.port}/a.png"
    with pytest.raises(JobError, match="HTTP 404 for the picture's URL"):  # the provider has no such file
        through(
            proxy,
            provider.url,
            picture_at(url),
            lambda port: proxies(http_proxy=f"127.0.0.1:{port}", no_proxy=no_proxy),
        )
    targets = [one.target for one in proxy.asked]
    assert targets == ([] if is_direct else [f"http://127.0.0.1:{provider.port}/a.png"])


# ── encrypted ────────────────────────────────────────────────────────────────────────────────────────────────────

ASK = """
import asyncio, sys
from workerkit.provider import OpenAIProvider
from workerkit.settings import ProviderSettings

async def ask():
    provider = OpenAIProvider(ProviderSettings(sys.argv[1], "", "model", ()), 2**20)
    async with provider.session, asyncio.timeout(30), provider.call("GET", "/models") as answer:
        print((await answer.json())["object"])

asyncio.run(ask())
"""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def https_provider(certificate: Certificate) -> Iterator[Provider]:
    with Provider(certificate=certificate) as provider:
        yield provider


@pytest.mark.parametrize("to_proxy", ["http", "https"])
def test_an_encrypted_call_goes_through_a_proxy_which_cannot_read_it(
    https_provider: Provider, certificate: Certificate, tmp_path: Path, to_proxy: str
) -> None:
    url, proxy = https_provider.url.replace("127.0.0.1", "localhost"), HttpProxy(https_provider.port)

    async def run() -> str:
        async with proxy.listening():
            with TlsProxy(proxy.port, certificate) as encrypted:
                port = encrypted.port if to_proxy == "https" else proxy.port
                variables = {"HTTPS_PROXY": f"{to_proxy}://user:{SECRET}@127.0.0.1:{port}", "no_proxy": "10.0.0.0/8"}
                variables["SSL_CERT_FILE"] = str(certificate.authority)
                ended = await asyncio.to_thread(run_python, variables, tmp_path, "-c", ASK, url)
                return ended.stdout + ended.stderr

    assert asyncio.run(run()).strip() == "list"
    [asked] = proxy.asked
    assert (asked.method, asked.target, asked.login) == (
        "CONNECT",
        f"localhost:{https_provider.port}",
        f"user:{SECRET}",
    )


# ── a proxy that refuses ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("url", ["http://gpu.invalid/v1", "https://gpu.invalid/v1"])
@table(
    "status, error, detail",
    ("its password", 407, OperatorFault, "check the proxy's user and password"),
    ("the server behind it is away", 502, ProviderAway, "HTTP 502"),
    ("it is busy", 503, ProviderAway, "HTTP 503"),
)
def test_what_a_proxy_refuses_is_no_fault_of_the_persons(
    proxies: SetProxies, url: str, status: int, error: type[JobError], detail: str
) -> None:
    with pytest.raises(error, match=detail):
        through(HttpProxy(0, status), url, text, lambda port: proxies(all_proxy=f"http://127.0.0.1:{port}"))


def test_a_proxy_that_forbids_a_server_is_the_operators_fault(proxies: SetProxies) -> None:
    with pytest.raises(OperatorFault, match=r"HTTP 403 of the proxy: .*lets requests to the provider pass"):
        through(
            HttpProxy(0, 403),
            "https://gpu.invalid/v1",
            text,
            lambda port: proxies(https_proxy=f"http://127.0.0.1:{port}"),
        )


def test_a_proxy_that_is_away_is_waited_for(proxies: SetProxies) -> None:
    with pytest.raises(ProviderAway) as raised:
        through(HttpProxy(0), "http://gpu.invalid/v1", text, lambda _: proxies(http_proxy=f"http://{NOWHERE}"))
    assert not raised.value.is_counted


# ── what is not supported ────────────────────────────────────────────────────────────────────────────────────────

UNSUPPORTED: tuple[tuple[Any, ...], ...] = (
    (
        "SOCKS",
        {"all_proxy": f"socks5://user:{SECRET}@proxy:1080"},
        "all_proxy = 'socks5://***@proxy:1080': should be an",
    ),
    (
        "SOCKS in capitals",
        {"HTTPS_PROXY": "SOCKS5H://proxy:1080"},
        "https_proxy = 'SOCKS5H://proxy:1080': should be an",
    ),
    ("FTP", {"https_proxy": "ftp://proxy"}, "should be an HTTP proxy"),
    ("a raw # in a password", {"https_proxy": f"http://user:{SECRET}#1@proxy:1"}, "should look like http://user"),
    ("a path", {"https_proxy": "http://proxy:1/somewhere"}, "should look like http://user"),
    ("no host", {"https_proxy": "http://:3128"}, "should look like http://user"),
    ("a URL in no_proxy", {"https_proxy": "proxy:1", "no_proxy": "http://gpu"}, "no_proxy = 'http://gpu': should hold"),
    ("no network", {"https_proxy": "proxy:1", "no_proxy": "10.0.0.0/99"}, "no_proxy = '10.0.0.0/99': should hold"),
    ("Windows' word", {"https_proxy": "proxy:1", "no_proxy": "gpu,<local>"}, "no_proxy = '<local>': should hold"),
)


@table("variables, sentence", *UNSUPPORTED)
def test_the_worker_does_not_start_where_a_key_would_take_another_way(
    proxies: SetProxies, capsys: pytest.CaptureFixture[str], variables: dict[str, str], sentence: str
) -> None:
    proxies(**variables)
    with pytest.raises(SystemExit) as ended:
        load_settings(_env_file=None, openai_api_key=KEY)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert sentence in said
    assert not {SECRET, KEY} & set(re.split(r"\W", said)), said
    assert said.count("\n") == 3  # once for all three kinds


@table(
    "variables, base_url",
    ("there is no provider", {"all_proxy": "socks5://proxy:1"}, ""),
    ("it is not for the provider", {"all_proxy": "socks5://p:1", "no_proxy": "10.0.0.0/8"}, "http://10.1.2.3/v1"),
    ("there is no proxy", {"no_proxy": "10.0.0.0/99"}, "http://10.1.2.3/v1"),
)
def test_the_worker_starts_where_no_key_would(proxies: SetProxies, variables: dict[str, str], base_url: str) -> None:
    proxies(**variables)
    load_settings(_env_file=None, openai_base_url=base_url, openai_api_key="")


def test_a_picture_that_an_unsupported_proxy_leads_to_is_the_operators_fault(
    provider: Provider, proxies: SetProxies, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look_up(_host: str, _port: int) -> str:
        return "93.184.216.34"

    monkeypatch.setattr("workerkit.pictures.public_address", look_up)
    with pytest.raises(OperatorFault, match="all_proxy should be an HTTP proxy"):
        through(
            HttpProxy(0),
            provider.url,
            picture_at("https://pictures.example/a.png"),
            lambda _: proxies(all_proxy="socks5://proxy:1080", no_proxy="127.0.0.0/8"),
        )


def test_the_start_names_the_proxies_without_their_passwords(
    proxies: SetProxies, capsys: pytest.CaptureFixture[str]
) -> None:
    proxies(http_proxy=f"http://user:{SECRET}@proxy:3128", all_proxy="socks5://proxy:1080")
    print_start(bare_settings())
    said = capsys.readouterr().out
    assert "proxies   http://***@proxy:3128 (http), none for https: all_proxy should be an HTTP proxy" in said
    assert SECRET not in said


def test_an_entry_without_a_meaning_is_no_match() -> None:
    with pytest.raises(ProxyFault):
        matches("<local>", "gpu", 80)
