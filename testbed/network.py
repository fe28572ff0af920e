"""A network that fails: a gateway for TCP, and certificates and a proxy for TLS."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import ClassVar, Final
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from testbed.processes import LOOPBACK, START_TIMEOUT_S, STOP_TIMEOUT_S, free_port

# --- TLS ----------------------------------------------------------------------------------------------------

AUTHORITY: Final = "testbed authority"
PrivateKey = ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Certificate:
    """A server's certificate for this machine, signed by an authority that exists only for it. Both are PEM files."""

    authority: Path  # what a client has to trust
    pair: Path  # the server's certificate and its private key

    def context(self) -> ssl.SSLContext:
        """Return the context with which a server uses this certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.pair)
        return context


def make_certificate(directory: Path) -> Certificate:
    """Make an authority and a server's certificate for 127.0.0.1 and localhost, as two files in the directory."""
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
    """Accepts TLS on behalf of a local server that has none. It runs in a thread and is a context manager."""

    def __init__(self, target_port: int, certificate: Certificate, port: int = 0) -> None:
        """Choose the server by its port, but start nothing."""
        self.port = port or free_port()
        self.handshakes = 0  # how many connections were made by clients that trust the certificate
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
        """Begin to listen. Runs in the proxy's thread."""
        self._server = await asyncio.start_server(self._serve, LOOPBACK, self.port, ssl=self._certificate.context())

    async def _stop(self) -> None:
        """Stop listening and end all connections. Runs in the proxy's thread."""
        self._server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward bytes in both directions until one side closes its connection."""
        self.handshakes += 1
        behind_reader, behind_writer = await asyncio.open_connection(LOOPBACK, self._target_port)
        ways = [self._carry(reader, behind_writer), self._carry(behind_reader, writer)]
        with suppress(asyncio.CancelledError, OSError):
            await asyncio.gather(*ways)
        for one in (writer, behind_writer):
            one.close()

    @staticmethod
    async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one direction. Raises: ConnectionError at its end, so that `_serve` ends the other one too."""
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
        raise ConnectionError("one side has ended")


# --- a network that fails -----------------------------------------------------------------------------------


class Gateway:
    """Forwards TCP connections to a server and fails as a network does. It is a context manager.

    `swallow` has the effect of a cable that is pulled out: no connection is closed or refused, but nothing arrives.
    What was sent meanwhile arrives after `pass_on`.
    """

    CHUNK_BYTES: ClassVar[int] = 65_536
    BACKLOG: ClassVar[int] = 128

    def __init__(self, url: str, host: str = LOOPBACK) -> None:
        """Choose the server by its URL, but start nothing."""
        self.host = host
        self.port = free_port(host)
        target = urlsplit(url)
        assert target.hostname
        assert target.port
        self.accepted = 0  # how many connections clients have made so far
        self._target = (target.hostname, target.port)
        self.url = url.replace(f"{target.hostname}:{target.port}", f"{host}:{self.port}", 1)
        self._passing = threading.Event()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._fillers: list[socket.socket] = []
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None

    def start(self) -> Gateway:
        """Begin to listen and to forward."""
        self._listener = socket.create_server((self.host, self.port), backlog=self.BACKLOG)
        self._passing.set()
        threading.Thread(target=self._accept, args=(self._listener,), name="gateway", daemon=True).start()
        return self

    def close(self) -> None:
        """Stop listening and close all connections."""
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
        """Forward nothing, accept no new connection, and close none."""
        assert self._listener
        self._passing.clear()
        self._listener.listen(0)
        # These connections fill the backlog. Linux then drops the packets of further clients without an answer, as if
        # the network were gone.
        for _ in range(3):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex((self.host, self.port))
            self._fillers.append(filler)

    def pass_on(self) -> None:
        """Forward again, beginning with what was held back."""
        assert self._listener
        for filler in self._fillers:
            filler.close()
        self._fillers.clear()
        self._listener.listen(self.BACKLOG)
        self._passing.set()

    def cut(self) -> int:
        """Close all connections and return how many there were. New ones are accepted."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            self._hang_up(pair)
        return len(pairs)

    def _accept(self, listener: socket.socket) -> None:
        """Accept connections until the listener is closed.

        `accept` fails too when a client has given up its connection meanwhile, so its errors do not end the loop.
        """
        while listener.fileno() >= 0:
            with suppress(OSError):
                client, _ = listener.accept()
                self.accepted += 1
                self._passing.wait()
                self._connect(client)

    def _connect(self, client: socket.socket) -> None:
        """Connect a client with the server, or close its connection when the server can't be reached."""
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
        """Forward one direction until either side closes. After `swallow` the closing is held back too, like data."""
        with suppress(OSError):
            while data := source.recv(self.CHUNK_BYTES):
                self._passing.wait()
                target.sendall(data)
        self._passing.wait()
        self._hang_up(pair)

    def _hang_up(self, pair: tuple[socket.socket, socket.socket]) -> None:
        """Close both sides. The threads that read from them end by that."""
        with self._lock:
            self._pairs.discard(pair)
        for side in pair:
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
            side.close()
