"""Fetching a picture by the URL in a provider's answer. The provider is not trusted with the operator's network."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import urllib.parse
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any

from workerkit.answers import Answer
from workerkit.client import connection_watched, proxy_error
from workerkit.errors import FailJob, JobError, OperatorFault, RetryJob
from workerkit.proxies import USUAL_PORTS, ProxyFault, proxy_for
from workerkit.refusals import CHECK_PROXY, PROXY_LOGIN, Cause, by_status
from workerkit.sentences import PICTURE_GONE, UNUSABLE

if TYPE_CHECKING:
    import aiohttp

REDIRECTS, MAX_HOPS = frozenset({301, 302, 303, 307, 308}), 5
CANT_BE_FETCHED = "The picture can't be fetched"
Origin = tuple[str, str, int]  # scheme, host and port


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
        hint = "if that is right, list its host and port in PICTURE_HOSTS"
        raise OperatorFault(f"a picture's URL at an address that isn't public: {hint}", UNUSABLE)
    return f"[{addresses[0]}]" if addresses[0].version == 6 else str(addresses[0])


def origin_of(parts: urllib.parse.SplitResult) -> Origin:
    """Scheme, host and port of a URL. Raises FailJob: it isn't one that a picture can be fetched from."""
    if parts.scheme not in USUAL_PORTS or not parts.hostname:
        raise FailJob("a picture at a URL that is neither http nor https", UNUSABLE)
    return parts.scheme, parts.hostname, parts.port or USUAL_PORTS[parts.scheme]


def origins_of(hosts: Iterable[str]) -> frozenset[Origin]:
    """The origins of PICTURE_HOSTS: `host`, `host:port`, or with a scheme. Without one both schemes are meant."""
    urls = [url for host in hosts for url in ([host] if "://" in host else [f"http://{host}", f"https://{host}"])]
    return frozenset(origin_of(urllib.parse.urlsplit(url)) for url in urls)


def picture_proxy(url: str) -> str | None:
    """The proxy that leads to a picture. Raises OperatorFault: the variable that names it can't be followed."""
    try:
        return proxy_for(url)
    except ProxyFault as fault:
        raise OperatorFault(str(fault)) from None


def host_error(status: int) -> JobError:
    """What an error status of a picture's host means: a retry, or a failure. The provider's key plays no part in it."""
    detail = f"HTTP {status} for the picture's URL"
    if status == PROXY_LOGIN:
        return OperatorFault(f"{detail}: {CHECK_PROXY}")
    return RetryJob(detail, CANT_BE_FETCHED) if by_status(status) is Cause.BUSY else FailJob(detail, PICTURE_GONE)


class PictureFetcher:
    """Fetches pictures without credentials, and never from the operator's own network.

    What is fetched from a private address is only what scheme, host *and* port of the provider or of PICTURE_HOSTS
    lead to. A redirect is followed under the same rules.
    """

    def __init__(self, session: aiohttp.ClientSession, trusted: frozenset[Origin], max_bytes: int) -> None:
        self._session, self._trusted, self._max_bytes = session, trusted, max_bytes

    async def fetch(self, url: str) -> bytes:
        """The picture's bytes. Raises RetryJob, FailJob."""
        import aiohttp

        try:
            for _ in range(MAX_HOPS):
                async with self._request(url) as answer:
                    if answer.status == 200:
                        return await answer.read()
                    if answer.status not in REDIRECTS:
                        raise host_error(answer.status)
                    url = urllib.parse.urljoin(url, answer.headers.get("location", ""))
        except aiohttp.ClientHttpProxyError as error:
            fault = proxy_error(error.status)
            is_passing = isinstance(fault, RetryJob)  # but it counts, since the picture is made and paid for
            raise (RetryJob(fault.detail, CANT_BE_FETCHED) if is_passing else fault) from None
        except (aiohttp.ClientError, OSError) as error:  # of the picture's host, which is not the provider
            raise RetryJob(type(error).__name__, CANT_BE_FETCHED) from None
        raise FailJob("a picture's URL that redirects for ever", PICTURE_GONE)

    @contextlib.asynccontextmanager
    async def _request(self, url: str) -> AsyncIterator[Answer]:
        """Asks for a URL at the address that was checked, since a name may lead elsewhere the second time.

        aiohttp's `socket_factory` could check it at the connection, but sees only the proxy where there is one
        (`test_aiohttps_socket_factory_sees_only_the_proxy`).
        """
        import yarl

        parts = urllib.parse.urlsplit(url)
        _, host, port = origin = origin_of(parts)
        pinned, headers = parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment=""), {}
        if origin not in self._trusted:
            address = await public_address(host, port)
            headers = {"host": pinned.netloc}
            pinned = pinned._replace(netloc=f"{address}:{parts.port}" if parts.port else address)
        quoted = urllib.parse.quote(pinned.geturl(), safe="%/:?#[]@!$&'()*+,;=~")
        target = yarl.URL(quoted, encoded=True)  # not encoded once more, since a signature may cover it
        options: dict[str, Any] = {"headers": headers, "server_hostname": host, "proxy": picture_proxy(url)}
        async with self._session.get(target, allow_redirects=False, **options) as response:
            with connection_watched(response):
                yield Answer(response, self._max_bytes)
