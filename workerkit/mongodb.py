"""MongoDB: what its errors mean, how writes are confirmed, and what time it is there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pymongo
from bson import ObjectId, encode
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import BSONError
from bson.raw_bson import RawBSONDocument
from pymongo.errors import DocumentTooLarge, ExecutionTimeout, OperationFailure, PyMongoError, WriteConcernError
from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import ReadPreference
from pymongo.write_concern import WriteConcern

from workerkit.errors import Document, StoreRefused, StoreUnavailable
from workerkit.logs import RepeatedFaultLog
from workerkit.values import is_readable

if TYPE_CHECKING:
    from pymongo.collection import Collection
    from pymongo.cursor import Cursor
    from pymongo.database import Database

# A document over 16 MB, or one that is too large for the memory that the server has for its changes.
TOO_LARGE_CODES = frozenset({10334, 17419, 17420, 388})
# The server's errors that pass: those that MongoDB's drivers try again, and time-outs of the server itself, locks,
# conflicts, a majority that can't be read yet, and credentials that are being changed. Any other error is a refusal.
PASSING_CODES = frozenset(
    {6, 7, 89, 91, 189, 262, 9001, 10107, 11600, 11602, 13435, 13436, 50, 11601, 24, 46, 112, 133, 134, 18}
    # A server under pressure, a cursor or a plan that was killed, keys and routes that aren't known yet.
    | {365, 43, 237, 175, 211, 202, 391, 462}
)
# MongoDB reports a change by itself, so the driver's usual heartbeats, each 10 s, would only cost a large fleet.
CLIENT_OPTIONS: Document = {"appname": "ai-backend-worker", "heartbeatFrequencyMS": 40_000}
SUSPENDED_S = 1.0  # by which the host's two clocks move apart only where it slept, or its time was set
SAME_INDEX_CODES = (85, 86)  # there is one like it, under another name or with other options
# What an operator reads about refusals that are met most.
CAUSES = {
    13: "its user lacks the right, which is readWrite on DATABASE_NAME",
    11000: "a unique index allows only one such document",
    121: "a validator of the collection is against it",
    14031: "its disk is full",
    **dict.fromkeys(TOO_LARGE_CODES, "the document would be too large"),
}
# Whatever a document holds can be read: one text that isn't UTF-8 would fail the whole query, and a date beyond the
# year 9999 as well. `find_one_and_update` would even raise after it has written.
TOLERANT = CodecOptions[Document](
    unicode_decode_error_handler="replace", datetime_conversion=DatetimeConversion.DATETIME_AUTO
)
UNREADABLE_LOG = RepeatedFaultLog("a document is left alone")


def open_database(client: pymongo.MongoClient[Document], name: str) -> Database[Document]:
    """The database, read from its primary and written to a majority with journal.

    This overrides the URL's options: a write without a majority can be rolled back when another primary is elected.
    """
    options: Document = {
        "read_preference": ReadPreference.PRIMARY,
        "write_concern": WriteConcern("majority", j=True),
        "read_concern": ReadConcern("majority"),
    }
    try:
        return client.get_database(name, TOLERANT, **options)
    except NotImplementedError:  # mongomock keeps Python's own values, so it has nothing to decode
        return client.get_database(name, **options)


def read_raw(collection: Collection[Document]) -> Collection[Any]:
    """The collection, read without decoding what lies below a document's top, so that it can be compared as it is."""
    try:
        return collection.with_options(TOLERANT.with_options(document_class=RawBSONDocument))
    except NotImplementedError:
        return collection


def is_passing(error: PyMongoError) -> bool:
    """Whether a later try may succeed: the server wasn't reached, or its answer is about its own state."""
    if not isinstance(error, OperationFailure) or isinstance(error, (ExecutionTimeout, WriteConcernError)):
        return True
    labels = ("RetryableWriteError", "RetryableError", "SystemOverloadedError")
    return error.code in PASSING_CODES or any(map(error.has_error_label, labels))


@contextlib.contextmanager
def unknown_when_unreachable() -> Iterator[None]:
    """Turns the errors of pymongo into the worker's own.

    Raises:
        StoreUnavailable: MongoDB wasn't reached, timed out, or didn't confirm by a majority. So it is unknown whether
            a write was made.
        StoreRefused: MongoDB takes this write neither now nor later, or can't hold one of its values.
    """
    try:
        yield
    except (DocumentTooLarge, OverflowError, BSONError, UnicodeEncodeError) as error:
        is_too_large = isinstance(error, DocumentTooLarge)
        raise StoreRefused(f"MongoDB can't hold it: {type(error).__name__}", is_too_large=is_too_large) from None
    except PyMongoError as error:
        code = error.code if isinstance(error, OperationFailure) else None
        if is_passing(error):
            raise StoreUnavailable(f"{type(error).__name__} {code or ''}".strip()) from error
        cause = CAUSES.get(code or 0, "")
        detail = f"MongoDB refuses it: {type(error).__name__} {code or ''}{cause and ': '}{cause}".strip()
        raise StoreRefused(detail, is_too_large=code in TOO_LARGE_CODES) from error


def make_indexes(collection: Collection[Document], indexes: Mapping[str, tuple[Sequence[str], Document]]) -> None:
    """Makes indexes, given by their names. One that is there already under another name is left as it is."""
    with unknown_when_unreachable():
        for name, (fields, options) in indexes.items():
            try:
                collection.create_index([(field, 1) for field in fields], name=name, **options)
            except OperationFailure as error:
                if error.code not in SAME_INDEX_CODES:
                    raise


def iterate(found: Cursor[Any]) -> Iterator[Any]:
    """The documents of a query, one after the other. Raises what `unknown_when_unreachable` raises.

    A raw document that can't be decoded is left out, so that it keeps nothing from the others.
    """
    with found:
        while True:
            with unknown_when_unreachable():
                if (document := next(found, None)) is None:
                    return
            if is_readable(document):
                yield document
            else:
                UNREADABLE_LOG.fault("pymongo can't decode it")


class Clock:
    """The database's time: its last answer, plus what has passed since on the monotonic clock.

    Leases are judged by it, so it doesn't matter when the clocks of two hosts differ.
    """

    def __init__(self) -> None:
        self.synchronise(datetime.now(UTC))
        self.is_synchronised = False

    def synchronise(self, server_time: datetime) -> None:
        self._pair = (server_time, time.monotonic())
        self._host_offset_s = time.time() - time.monotonic()
        self.is_synchronised = True

    @property
    def age_s(self) -> float:
        """Seconds since the server's last answer."""
        return time.monotonic() - self._pair[1]

    @property
    def was_suspended(self) -> bool:
        """Whether the host has slept since: its monotonic clock stood still then, and the other one was set later."""
        return abs(time.time() - time.monotonic() - self._host_offset_s) > SUSPENDED_S

    def now(self) -> datetime:
        """Aware UTC, in whole milliseconds as BSON keeps them."""
        server_time, at = self._pair
        now = server_time + timedelta(seconds=time.monotonic() - at)
        return now.replace(microsecond=now.microsecond // 1000 * 1000)


class ServerClock(Clock):
    """The time of this database, asked before its first use, since the host's clock may be minutes off.

    `primary` is the server process that answered last (None behind a mongos). All methods raise StoreUnavailable.
    """

    MAX_AGE_S, MAX_ROUND_TRIP_S, TRIES = 60.0, 1.0, 3

    def __init__(self, database: Database[Document]) -> None:
        super().__init__()
        self._database = database
        self.primary: ObjectId | None = None
        self.address: object = None
        self._round_trip_s = 0.0

    def read(self) -> None:
        """Reads the database's time, and which server process is the primary.

        The middle of the wait counts as the time of an answer. One that took long, as when the process is stopped
        meanwhile, could be seconds off, so it is asked for again.
        """
        for _ in range(self.TRIES):
            asked_at = time.monotonic()
            hello = self._ask()
            self._round_trip_s = time.monotonic() - asked_at
            if self._round_trip_s <= self.MAX_ROUND_TRIP_S:
                break
        self.primary = None if hello.get("msg") == "isdbgrid" else hello.get("topologyVersion", {}).get("processId")
        self.synchronise(hello["localTime"].replace(tzinfo=UTC) + timedelta(seconds=self._round_trip_s / 2))
        self.address = self._known_primary()

    def _ask(self) -> Document:
        with unknown_when_unreachable():
            try:
                return self._database.command("hello")
            except NotImplementedError:  # mongomock has no `hello`, so the host's clock serves
                return {"localTime": datetime.now(UTC)}

    def refresh(self) -> None:
        """Reads the time again after a minute, a slow answer or a sleep, or if another server is the primary now."""
        is_doubtful = self.was_suspended or self._round_trip_s > self.MAX_ROUND_TRIP_S
        if is_doubtful or self.age_s > self.MAX_AGE_S or self._known_primary() != self.address:
            self.read()

    def _known_primary(self) -> object:
        """The address of the primary as the client knows it, without asking; None outside of a replica set."""
        return getattr(getattr(self._database, "client", None), "primary", None)

    def now(self) -> datetime:
        if not self.is_synchronised:
            self.read()
        return super().now()


def largest_field(collection: Collection[Document], document_id: object, names: Sequence[str]) -> str:
    """The name of the field that takes most room in a document."""
    with unknown_when_unreachable():
        document = collection.find_one({"_id": document_id}, dict.fromkeys(names, 1)) or {}
    return max(names, key=lambda name: len(encode({"": document.get(name)})))
