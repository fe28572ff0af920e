"""Redis' URLs, each read once for all who connect by it: the worker's client, Celery's broker and its result backend.

redis-py, Celery and kombu read the same URL by three different rules. An option that one of them takes ends another
one with a TypeError, and each spells a Unix socket in another way. So the URL is read here, by redis-py's rules, and
the three get the same arguments for their connections.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

import redis

from workerkit.certificates import first_fault, folder_fault, pair_fault
from workerkit.errors import Document

LOOKS = "should look like redis://:password@host:6379/0 (or rediss://, unix:///path/redis.sock?db=0)"
ESCAPE = f"{LOOKS}, with each @ : / ? # % of a password escaped"
SOCKETS = ("unix", "redis+socket", "socket")  # the last two are Celery's names
SCHEMES = ("redis", "rediss", *SOCKETS)
MAX_SOCKET_PATH_BYTES = 107
TIMEOUTS = {"socket_timeout", "socket_connect_timeout"}
CLIENT_OPTIONS: Document = {**dict.fromkeys(TIMEOUTS, 2), "socket_keepalive": True, "health_check_interval": 25}
ONLY_TCP = {"socket_keepalive"}
BOOLEANS = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}


CERTIFICATE_CHECKS = {name: name for name in ("none", "optional", "required")}


def number_from(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise ValueError
        return int(text)

    return parse


def seconds(text: str) -> float:
    if not re.fullmatch(r"\d{1,5}(\.\d+)?", text, re.ASCII) or float(text) <= 0:
        raise ValueError
    return float(text)


def one_of(values: Mapping[str, Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if (found := values.get(text.lower().removeprefix("cert_"))) is None:
            raise ValueError
        return found

    return parse


def word(text: str) -> str:
    if not re.fullmatch("[!-~]+", text):
        raise ValueError
    return text


# What may stand behind the `?`: how its value is read, and what is right.
OPTIONS: Mapping[str, tuple[Callable[[str], Any], str]] = {
    "db": (number_from(0), "be a number"),
    "virtual_host": (number_from(0), "be a number"),  # Celery's name for the `db` of a socket
    "username": (str, "be text"),
    "password": (str, "be text"),
    "client_name": (word, "be one word"),
    "protocol": (one_of({"2": 2, "3": 3}), "be 2 or 3"),
    "health_check_interval": (number_from(0), "be whole seconds"),
    **dict.fromkeys(TIMEOUTS, (seconds, "be seconds above 0")),
    **dict.fromkeys(("socket_keepalive", "retry_on_timeout"), (one_of(BOOLEANS), "be true or false")),
    "ssl_check_hostname": (one_of(BOOLEANS), "be true or false"),
    "ssl_cert_reqs": (
        one_of({name: name for name in ("none", "optional", "required")}),
        "be required, optional or none",
    ),
    **dict.fromkeys(("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile"), (str, "be a path")),
}
CREDENTIALS = ("username", "password")


def read_options(query: str) -> Document:
    """The options of a URL, by name. Raises ValueError with a sentence, which shows no value."""
    try:
        pairs = parse_qsl(query, strict_parsing=bool(query), keep_blank_values=True)
    except ValueError:
        raise ValueError(ESCAPE) from None
    options: Document = {}
    for name, value in pairs:
        if name not in OPTIONS:
            shown = name if re.fullmatch(r"[a-z_]{1,30}", name) else "?"
            names = ", ".join(sorted(OPTIONS.keys() - {"virtual_host"}))
            raise ValueError(f"has an option that isn't supported, {shown}: remove it (supported: {names})")
        parse, right = OPTIONS[name]
        try:
            options[name] = parse(value)
        except ValueError:
            raise ValueError(f"has an option of a wrong value: {name} should {right}") from None
    return options


def certificates_fault(scheme: str, options: Document) -> str:
    """What is wrong with the options about certificates and with the files that they name, or an empty string."""
    given = [name for name in options if name.startswith("ssl_")]
    if scheme != "rediss":
        return f"has {given[0]}, which needs a URL that begins with rediss://" if given else ""
    if fault := first_fault(options, ["ssl_ca_certs"]):
        return fault
    if options.get("ssl_ca_path") and (fault := folder_fault(options["ssl_ca_path"])):
        return f"ssl_ca_path {fault}"
    certificate, key = (options.get(name, "") for name in ("ssl_certfile", "ssl_keyfile"))
    fault = pair_fault(certificate, key) if certificate or key else ""
    return fault and f"ssl_certfile, or its ssl_keyfile, {fault}"


def split(url: str) -> SplitResult:
    """The parts of a URL that is well-formed and has a scheme of Redis. Raises ValueError with a sentence."""
    parts = urlsplit(url)
    rest = url[len(parts.scheme) + len("://") + len(parts.netloc) :]
    if not re.match(rf"({'|'.join(map(re.escape, SCHEMES))})://", url):
        raise ValueError(LOOKS)
    if "@" in rest or "#" in url or any(c.isspace() for c in url):
        raise ValueError(ESCAPE)
    try:
        parts.port  # noqa: B018 - it raises where there is no number
    except ValueError:
        raise ValueError(ESCAPE) from None
    return parts


def socket_path(parts: SplitResult) -> str:
    """The path of a Unix socket, empty where the URL names a host. Raises ValueError with a sentence."""
    if parts.scheme not in SOCKETS:
        return ""
    path = unquote(parts.path)
    if parts.hostname or not path.strip("/") or len(path.encode("utf-8", "replace")) > MAX_SOCKET_PATH_BYTES:
        raise ValueError("should name a socket by a path of at most 107 bytes, like unix:///path/redis.sock?db=0")
    return path


def database_number(parts: SplitResult, options: Document) -> int:
    """The database, of the options or else of the path. Raises ValueError with a sentence."""
    given = [options.pop(name, None) for name in ("db", "virtual_host")]
    text = "" if parts.scheme in SOCKETS else unquote(parts.path).strip("/")
    if text and not re.fullmatch(r"\d{1,6}", text, re.ASCII):
        raise ValueError("should name Redis' database by its number, like redis://host:6379/0")
    return next((number for number in given if number is not None), int(text or 0))


@dataclass(frozen=True)
class RedisTarget:
    """A Redis and how to connect to it, as a URL says it."""

    is_encrypted: bool
    host: str
    port: int
    path: str  # of a Unix socket; else empty
    db: int
    credentials: Document = field(repr=False)
    options: Document

    @classmethod
    def parse(cls, url: str) -> RedisTarget:
        """Raises ValueError with a sentence, which shows no part of the URL but the names of options."""
        parts = split(url)
        path, options = socket_path(parts), read_options(parts.query)
        db = database_number(parts, options)
        given = {name: unquote(getattr(parts, name) or "") or options.pop(name, "") for name in CREDENTIALS}
        credentials = {name: value for name, value in given.items() if value}
        if fault := certificates_fault(parts.scheme, options):
            raise ValueError(fault)
        is_encrypted = parts.scheme == "rediss"
        if is_encrypted:  # Celery and kombu, unlike redis-py, don't check certificates by themselves
            options = {"ssl_cert_reqs": "required", **options}
        host, port = unquote(parts.hostname or "localhost"), parts.port or 6379
        return cls(is_encrypted, host, port, path, db, credentials, options)

    def with_options(self, own: Document) -> Document:
        """Options of one's own, and those of the URL. A time-out of the URL can be shorter than one's own, not longer.

        A Redis that hangs would otherwise hold up what has to go on meanwhile, such as the renewal of leases.
        """
        merged = {**own, **self.options}
        for name in TIMEOUTS & merged.keys():
            merged[name] = min(source[name] for source in (own, self.options) if name in source)
        return {name: value for name, value in merged.items() if not self.path or name not in ONLY_TCP}

    def connection(self, own: Document) -> Document:
        """The arguments of a pool of connections."""
        kind: type = redis.SSLConnection if self.is_encrypted else redis.Connection
        address: Document = {"connection_class": kind, "host": self.host, "port": self.port}
        if self.path:
            address = {"connection_class": redis.UnixDomainSocketConnection, "path": self.path}
        return {**address, "db": self.db, **self.credentials, **self.with_options(own)}

    def client(self, own: Document = CLIENT_OPTIONS) -> redis.Redis:
        """A client with a pool of its own."""
        return redis.Redis.from_pool(redis.ConnectionPool(**self.connection(own)))

    @property
    def kombu_url(self) -> str:
        """The URL for kombu, without the options. The path of a socket stands in the place of the host."""
        user, password = (quote(self.credentials.get(name, ""), safe="") for name in CREDENTIALS)
        login = f"{user}:{password}@" if user or password else ""
        host = f"[{self.host}]" if ":" in self.host else quote(self.host, safe="")
        place = quote(self.path, safe="") if self.path else f"{host}:{self.port}"
        checks = f"?ssl_cert_reqs={self.options['ssl_cert_reqs']}" if self.is_encrypted else ""
        return f"redis{'s' * self.is_encrypted}://{login}{place}/{self.db}{checks}"

    def kombu_options(self, own: Document) -> Document:
        """The options of kombu's transport; below `connection` those that its channel doesn't know.

        Celery's remote control shows them, so they hold no credentials.
        """
        options = self.with_options(own)
        others = {name: options.pop(name) for name in list(options) if name == "protocol" or name.startswith("ssl_")}
        others |= {"path": self.path} if self.path else {}
        return {**options, "connection": others} if others else options
