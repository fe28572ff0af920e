"""MongoDB: what its errors mean for a job, how reads and writes are confirmed, and the database's time."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import pymongo
import pytest
from bson.errors import InvalidDocument
from pymongo.errors import (
    AutoReconnect,
    DocumentTooLarge,
    ExecutionTimeout,
    NetworkTimeout,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WriteConcernError,
    WriteError,
)
from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import ReadPreference
from pymongo.write_concern import WriteConcern

import workerkit.mongodb
from tests.lab import NOWHERE, SECRET, table
from workerkit.errors import StoreRefused, StoreUnavailable
from workerkit.mongodb import Clock, ServerClock, open_database, unknown_when_unreachable

# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "error, detail",
    ("the connection broke", AutoReconnect("gone"), "AutoReconnect"),
    ("no answer in time", NetworkTimeout("late"), "NetworkTimeout"),
    ("no server is there", ServerSelectionTimeoutError("none"), "ServerSelectionTimeoutError"),
    ("not confirmed by a majority", WriteConcernError("timed out", 64), "WriteConcernError 64"),
    ("the primary steps down", OperationFailure("stepping down", 189), "OperationFailure 189"),
    ("the server ran out of time", ExecutionTimeout("late", 50), "ExecutionTimeout 50"),
)
def test_an_error_of_mongodb_leaves_it_unknown_whether_a_write_was_made(error: PyMongoError, detail: str) -> None:
    with pytest.raises(StoreUnavailable) as caught, unknown_when_unreachable():
        raise error
    assert (type(caught.value), str(caught.value)) == (StoreUnavailable, detail)


@table(
    "error, is_too_large",
    ("too large for the client", DocumentTooLarge("over 16 MB"), True),
    ("too large for the server", OperationFailure("too large", 17419), True),
    ("a number beyond 64 bits", OverflowError("int too large"), False),
    ("an object of Python", InvalidDocument("cannot encode"), False),
    ("half a character", UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "surrogates"), False),
    ("a validator is against it", WriteError("failed validation", 121), False),
    ("not allowed", OperationFailure("not authorized", 13), False),
    ("a code of the future", OperationFailure("no", 424_242), False),
)
def test_what_mongodb_never_takes_is_told_from_an_outage(error: Exception, is_too_large: bool) -> None:
    with pytest.raises(StoreRefused) as caught, unknown_when_unreachable():
        raise error
    assert caught.value.is_too_large is is_too_large


def test_the_words_of_an_error_which_may_hold_data_are_not_repeated() -> None:
    with pytest.raises(StoreUnavailable) as caught, unknown_when_unreachable():
        raise OperationFailure(f"bad value {SECRET}", 2)
    assert SECRET not in str(caught.value)


def test_other_errors_pass_through() -> None:
    with pytest.raises(KeyError), unknown_when_unreachable():
        raise KeyError("a defect")


# ── reads and writes ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def lax_client() -> Iterator[pymongo.MongoClient[dict[str, Any]]]:
    """A client whose URL asks for reads from anywhere and writes without confirmation."""
    options = "w=1&journal=false&readPreference=nearest&readConcernLevel=local"
    with pymongo.MongoClient[dict[str, Any]](f"mongodb://{NOWHERE}/?{options}", connect=False) as client:
        yield client


def test_writes_go_to_a_majority_with_journal_whatever_the_url_says(
    lax_client: pymongo.MongoClient[dict[str, Any]],
) -> None:
    assert open_database(lax_client, "jobs").write_concern == WriteConcern("majority", j=True)


def test_reads_see_what_a_majority_has_whatever_the_url_says(lax_client: pymongo.MongoClient[dict[str, Any]]) -> None:
    database = open_database(lax_client, "jobs")
    assert (database.read_preference, database.read_concern) == (ReadPreference.PRIMARY, ReadConcern("majority"))


# ── the database's time ──────────────────────────────────────────────────────────────────────────────────────────


class Host:
    """The two clocks of a host, and a server whose next answers take so many seconds."""

    client = SimpleNamespace(primary=("a", 27017))

    def __init__(self) -> None:
        self.passed_s, self.slept_s, self.asked = 100.0, 0.0, 0
        self.answers_s: list[float] = []

    def monotonic(self) -> float:
        return self.passed_s

    def time(self) -> float:
        return self.passed_s + self.slept_s

    def command(self, _: str) -> dict[str, Any]:
        self.asked += 1
        self.passed_s += self.answers_s.pop(0) if self.answers_s else 0.0
        return {"localTime": self.right_time().replace(tzinfo=None)}

    def right_time(self) -> datetime:
        return datetime(2031, 1, 1, tzinfo=UTC) + timedelta(seconds=self.time())


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host()
    monkeypatch.setattr(workerkit.mongodb, "time", host)
    return host


def test_the_clock_adds_what_passed_since_the_servers_answer(host: Host) -> None:
    clock = Clock()
    clock.synchronise(datetime(2031, 1, 1, tzinfo=UTC))
    host.passed_s += 7.5
    assert clock.now() == datetime(2031, 1, 1, 0, 0, 7, 500_000, tzinfo=UTC)


@table(
    "change, asks",
    ("for a minute it isn't asked again", {"passed_s": 159.0}, False),
    ("a minute has passed", {"passed_s": 161.0}, True),
    ("the host has slept, and its monotonic clock stood still", {"slept_s": 3600.0}, True),
    ("another server is the primary", {"client": SimpleNamespace(primary=("b", 27017))}, True),
)
def test_the_servers_time_is_read_again_when_it_may_have_changed(
    host: Host, change: dict[str, Any], asks: bool
) -> None:
    clock = ServerClock(cast(Any, host))
    clock.read()
    for name, value in change.items():
        setattr(host, name, value)
    clock.refresh()
    assert host.asked == 1 + asks


def test_an_answer_that_took_long_is_asked_for_again(host: Host) -> None:
    """The process may have been stopped in the meantime, and its time would be off by half of that."""
    clock, host.answers_s = ServerClock(cast(Any, host)), [4.0]
    clock.read()
    assert host.asked == 2
    assert host.right_time() == clock.now()


def test_of_a_server_that_always_answers_slowly_the_middle_of_the_wait_counts(host: Host) -> None:
    clock, host.answers_s = ServerClock(cast(Any, host)), [4.0] * 3
    clock.read()
    assert host.asked == 3
    assert (host.right_time() - clock.now()).total_seconds() == -2.0, "it answered at the end of the wait"
    clock.refresh()
    assert host.asked == 4, "it is asked again as soon as possible"


def test_the_clock_keeps_whole_milliseconds_as_documents_do() -> None:
    clock = Clock()
    clock.synchronise(datetime(2031, 1, 1, microsecond=999, tzinfo=UTC))
    assert clock.now().microsecond % 1000 == 0


def test_a_clock_that_was_never_synchronised_shows_the_hosts_time() -> None:
    clock = Clock()
    assert not clock.is_synchronised
    assert abs((clock.now() - datetime.now(UTC)).total_seconds()) < 60
    clock.synchronise(datetime(2031, 1, 1, tzinfo=UTC))
    assert clock.is_synchronised
