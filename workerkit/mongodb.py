"""MongoDB: what its errors mean, how writes are confirmed, and what time it is there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pymongo
from bson.errors import BSONError
from pymongo.errors import DocumentTooLarge, OperationFailure, PyMongoError
from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import ReadPreference
from pymongo.write_concern import WriteConcern

from workerkit.errors import CANT_BE_STORED, Document, FailJob, StoreUnavailable

if TYPE_CHECKING:
    from pymongo.database import Database

PATH_NOT_VIABLE = 28  # MongoDB's error code: a field is to be set below something that is no sub-document
TOO_LARGE_CODES = frozenset({10334, 17419, 17420})


def open_database(client: pymongo.MongoClient[Document], name: str) -> Database[Document]:
    """The database, read from its primary and written to a majority with journal.

    This overrides the URL's options: a write without a majority can be rolled back when another primary is elected.
    """
    return client.get_database(
        name,
        read_preference=ReadPreference.PRIMARY,
        write_concern=WriteConcern("majority", j=True),
        read_concern=ReadConcern("majority"),
    )


class NoSubDocument(StoreUnavailable):
    """A field can't be set, because what should be its sub-document is null or something else."""


@contextlib.contextmanager
def unknown_when_unreachable() -> Iterator[None]:
    """Turns the errors of pymongo into the worker's own.

    Raises:
        StoreUnavailable: MongoDB wasn't reached, timed out, was not confirmed by a majority, or doesn't allow it. So
            it is unknown whether a write was made.
        FailJob: the document would be too large, or MongoDB can't hold one of its values.
    """
    try:
        yield
    except (DocumentTooLarge, OverflowError, BSONError, UnicodeEncodeError) as error:
        raise FailJob(f"MongoDB can't hold the result: {type(error).__name__}", CANT_BE_STORED) from None
    except PyMongoError as error:
        code = error.code if isinstance(error, OperationFailure) else None
        if code == PATH_NOT_VIABLE:
            raise NoSubDocument("`worker` is no sub-document") from error
        if code in TOO_LARGE_CODES:
            raise FailJob(f"MongoDB can't hold the result: {code}", CANT_BE_STORED) from None
        raise StoreUnavailable(f"{type(error).__name__} {code or ''}".strip()) from error


class Clock:
    """The database's time: its last answer, plus what has passed since on the monotonic clock.

    Leases are judged by it, so it doesn't matter when the clocks of two hosts differ.
    """

    def __init__(self) -> None:
        self.synchronise(datetime.now(UTC))
        self.is_synchronised = False

    def synchronise(self, server_time: datetime) -> None:
        self._pair = (server_time, time.monotonic())
        self.is_synchronised = True

    def now(self) -> datetime:
        """Aware UTC, in whole milliseconds as BSON keeps them."""
        server_time, at = self._pair
        now = server_time + timedelta(seconds=time.monotonic() - at)
        return now.replace(microsecond=now.microsecond // 1000 * 1000)
