"""Why a server can't be reached, in words for the operator, and where it is. Nothing that may be secret is in them."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator

from workerkit.loopback import LOOPBACK, LOOPBACKS, is_container
from workerkit.proxies import USUAL_PORTS
from workerkit.settings import COMPOSE_SERVERS, redact_url

NO_NAME, NOTHING = "the name doesn't resolve", "nothing listens there"
NO_ANSWER = "no answer"
WRONG_LOGIN, NO_LOGIN = "wrong user or password", "it wants a user and password"
# What the errors of all clients say, the most telling first. Their own texts may hold URLs and are never shown.
REASONS: tuple[tuple[str, str], ...] = (
    (r"certificate verify failed: (?P<why>[\w ,'.:-]+)", "the certificate isn't trusted: {why}"),
    (r"WRONG_VERSION_NUMBER|RECORD_LAYER|HTTP_REQUEST|UNKNOWN_PROTOCOL", "it doesn't speak TLS"),
    (r"(?:TLS|SSL)V1_ALERT|CERTIFICATE_REQUIRED|alert certificate required", "it wants a certificate of the client"),
    (r"Name or service not known|nodename nor servname|name resolution|getaddrinfo|ClientConnectorDNSError", NO_NAME),
    (r"No address associated with hostname", NO_NAME),
    (r"WRONGPASS|invalid username-password|invalid password|Authentication failed|AuthenticationFailed", WRONG_LOGIN),
    (r"ACCESS_REFUSED - Login|bad auth", WRONG_LOGIN),
    (r"NOAUTH|AuthenticationError|Authentication required|requires authentication|Unauthorized", NO_LOGIN),
    (r"Connection refused|Connect call failed|Errno 111\b|Errno 61\b", NOTHING),
    (r"Network is unreachable|No route to host|Errno 113\b|Errno 101\b", "there is no route to it"),
    (r"(?:Errno|Error) 2\b[^|]*No such file|FileNotFoundError", "there is no such socket"),
    (r"[Tt]imed? ?out|Timeout|TimeoutError", NO_ANSWER),
    (r"Connection reset|ServerDisconnected|closed by server|connection closed|Broken pipe|EOF", "it hangs up"),
)
PORTS = {"mongodb": 27017, "redis": 6379, "rediss": 6379, "sentinel": 26379, "amqp": 5672, "amqps": 5671, **USUAL_PORTS}
COMPOSE_UP = "docker compose up --wait"  # it returns when the servers are healthy
# What starts a server on this machine, by the port that it usually has.
STARTS = {
    **{one.usual_port: f"{COMPOSE_UP} {one.host}" for one in COMPOSE_SERVERS},
    5672: f"docker run --detach --publish {LOOPBACK}:5672:5672 rabbitmq:4",
    11434: "ollama serve",
    1234: "lms server start",
    8000: "vllm serve MODEL",
    8080: "llama-server --model FILE",
    4000: "litellm --config FILE",
    9000: "minio server FOLDER",
}


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those behind it. Libraries wrap errors in errors of their own."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        inner = getattr(error, "os_error", None)
        error = inner if isinstance(inner, BaseException) else error.__cause__ or error.__context__


def reason_of(error: BaseException) -> str:
    """Why a connection failed, or an empty string if that isn't known."""
    said = " | ".join(f"{type(one).__name__} {one}" for one in chain_of(error))
    for pattern, reason in REASONS:
        if found := re.search(pattern, said):
            return reason.format(**{name: text.strip() for name, text in found.groupdict().items()})
    return ""


def place_of(url: str) -> str:
    """Host and port of a server, or of each one where there are several; the path of a socket."""
    shown = redact_url(url)
    scheme, mark, rest = shown.partition("://")
    port, names = PORTS.get(scheme), rest.split("/")[0].rpartition("@")[2]
    if not mark or names in ("", "***"):  # a socket, a folder, or an address that can't be shown
        return shown
    hosts = names.split(",")
    is_named = re.compile(r".+:\d+")
    return ",".join(host if is_named.fullmatch(host) or not port else f"{host}:{port}" for host in hosts)


def user_of(url: str) -> str:
    """The user that a URL names, or an empty string."""
    login = url.partition("://")[2].split("/")[0].rpartition("@")[0]
    return urllib.parse.unquote(login.partition(":")[0])


def start_of(reason: str, url: str) -> str:
    """The command that starts the server of a URL, if it isn't running on this machine, where it should; else empty."""
    host, _, port = place_of(url).rpartition(":")
    is_of_compose = host in (one.host for one in COMPOSE_SERVERS)
    is_missing = is_of_compose if reason == NO_NAME else reason == NOTHING and host in LOOPBACKS
    return STARTS.get(int(port), "") if is_missing and port.isdigit() else ""


def advice_for(reason: str, url: str, variable: str) -> str:
    """What to do about a reason: what to start, and which variable to change. Empty where the reason tells too little.

    In the contract's default URLs 127.0.0.1 is used by itself, once something listens there.
    """
    host, start = place_of(url).rpartition(":")[0], start_of(reason, url)
    steps = [f"start it: {start}"] if start else []
    if reason == NO_NAME and url in (one.url for one in COMPOSE_SERVERS):
        return "; ".join([*steps, f"or name another server in {variable}"])
    if reason == NO_NAME and re.fullmatch(r"[\w-]+", host):
        return "; ".join([*steps, f"outside Docker use {LOOPBACK} in {variable}"])
    if reason == NOTHING and host in LOOPBACKS:
        inside = f" (this is a container, and {host} is inside it)" if is_container() else ""
        return "; ".join([*(steps or ["start the server that belongs there"]), f"or change {variable}{inside}"])
    return ""


def fault_at(url: str, error: BaseException) -> str:
    """Place and reason in one sentence, such as `mongodb:27017: the name doesn't resolve`; empty if not known."""
    reason = reason_of(error)
    if reason == WRONG_LOGIN and (user := user_of(url)):
        reason = f"wrong password for user {user}"
    return f"{place_of(url)}: {reason}" if reason else ""
