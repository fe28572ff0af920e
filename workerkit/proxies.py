"""Which proxy leads to a URL, by the variables that other programs use too: `https_proxy`, `all_proxy`, `no_proxy`.

urllib finds them, in upper and lower case. It knows of `no_proxy` only names, so networks, ports and wildcards are
added here (`test_urllib_knows_no_networks_…`). aiohttp's `trust_env` uses urllib for it, knows no `all_proxy` and no
proxy without a scheme, and sends credentials of `~/.netrc` (`test_aiohttps_trust_env_…`).
"""

from __future__ import annotations

import contextlib
import fnmatch
import ipaddress
import re
import urllib.parse
import urllib.request

USUAL_PORTS = {"http": 80, "https": 443}
NOT_HTTP = "should be an HTTP proxy, like http://host:3128 (SOCKS and others are not supported)"
NO_URL = "should look like http://user:password@host:3128 (escape @ : / # in a password)"
NO_ENTRY = "should hold hosts, networks and wildcards, comma-separated, like gpu,.example.com,10.0.0.0/8,[::1]:8080"


class ProxyFault(ValueError):
    """A variable that can't be followed: its name, its value (which may hold a password) and what would be right."""

    def __init__(self, name: str, value: str, advice: str) -> None:
        super().__init__(f"{name} {advice}")
        self.name, self.value, self.advice = name, value, advice


def find_variable(scheme: str) -> tuple[str, str] | None:
    """The variable that names a proxy for URLs of this scheme, and its value."""
    proxies = urllib.request.getproxies()
    found = ((f"{name}_proxy", proxies.get(name, "").strip()) for name in (scheme, "all"))
    return next(((name, value) for name, value in found if value), None)


def in_latin_1(part: str) -> str:
    """A user or password so written that aiohttp, which encodes it in Latin-1, sends the bytes that curl sends."""
    return urllib.parse.quote(urllib.parse.unquote_to_bytes(part).decode("latin-1"), safe="")


def check_proxy(name: str, value: str) -> str:
    """The URL of the proxy that a variable names. Raises ProxyFault: the worker can't use it."""
    url = value if "://" in value else f"http://{value}"
    if not url.lower().startswith(("http://", "https://")):
        raise ProxyFault(name, url, NOT_HTTP)
    parts = re.fullmatch(r"(\w+://)(?:([^/?#\s]*)@)?((?:\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::\d{1,5})?)/?", url)
    if not parts:
        raise ProxyFault(name, url, NO_URL)
    scheme, login, host = parts.groups()
    return f"{scheme}{':'.join(map(in_latin_1, login.split(':', 1)))}@{host}" if login else f"{scheme}{host}"


def proxy_of(scheme: str) -> str | None:
    """The proxy for URLs of this scheme, if there is one. Raises ProxyFault: the worker can't use it."""
    found = find_variable(scheme)
    return check_proxy(*found) if found else None


def matches(entry: str, host: str, port: int) -> bool:
    """Whether an entry of `no_proxy` stands for a host, which is a name or an address. Names aren't looked up.

    Raises:
        ProxyFault: it is no entry that has a meaning.
    """
    with_port = re.fullmatch(r"(\[.+\]|[^:]+):(\d{1,5})", entry)
    name = (with_port[1] if with_port else entry).lower()
    is_port = not with_port or int(with_port[2]) == port
    with contextlib.suppress(ValueError):
        network = ipaddress.ip_network(re.sub(r"[][]", "", name), strict=False)
        with contextlib.suppress(ValueError):
            return is_port and ipaddress.ip_address(host) in network
        return False  # a name
    domain = name.removeprefix("*").lstrip(".") if name.startswith(("*.", ".")) else name
    if not re.fullmatch(r"[\w.*?-]+", domain):
        raise ProxyFault("no_proxy", entry, NO_ENTRY)
    return is_port and any(fnmatch.fnmatchcase(host, pattern) for pattern in (domain, f"*.{domain}"))


def is_direct(scheme: str, host: str, port: int | None) -> bool:
    """Whether no proxy leads to a host. Raises ProxyFault: `no_proxy` has an entry without a meaning."""
    entries = re.split(r"[,\s]+", urllib.request.getproxies().get("no", "").strip())
    found = [matches(entry, host, port or USUAL_PORTS.get(scheme, 0)) for entry in entries if entry]
    return any(found) or bool(urllib.request.proxy_bypass(host))


def proxy_for(url: str) -> str | None:
    """The proxy that leads to a URL, or None for the direct way. Raises ProxyFault: a variable can't be followed."""
    parts, port = urllib.parse.urlsplit(url), None
    found = find_variable(parts.scheme)
    with contextlib.suppress(ValueError):  # of a port that is no number
        port = parts.port
    if not found or is_direct(parts.scheme, (parts.hostname or "").rstrip("."), port):
        return None
    return check_proxy(*found)
