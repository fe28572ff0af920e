"""Values out of documents and messages that may hold anything: each is what it should be, or None."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from bson import Code
from bson.errors import BSONError

MAX_TEXT_CHARACTERS = 200
MAX_NUMBER = 2**31 - 1  # as large as a process id can be


def as_text(value: object) -> str | None:
    """A short text; None for anything else, and for BSON's code, which pymongo reads as a kind of text."""
    is_text = isinstance(value, str) and not isinstance(value, Code)
    return value if is_text and 0 < len(value) <= MAX_TEXT_CHARACTERS else None  # type: ignore[arg-type, return-value]


def as_number(value: object) -> int | None:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return value if is_number and 0 <= value <= MAX_NUMBER else None  # type: ignore[operator, return-value]


def as_seconds(value: object) -> float | None:
    """A length of time. A document may hold a number that is none, or that no clock could hold."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and 0 <= value <= MAX_NUMBER else None  # type: ignore[operator, return-value]


def as_priority(value: object) -> int | None:
    """A message's priority, which is one byte on RabbitMQ."""
    number = as_number(value)
    return number if number is not None and number < 256 else None


def as_time(value: object, latest: datetime | None = None) -> datetime | None:
    """A document's date as aware UTC; None if it is no date, or later than `latest`."""
    if not isinstance(value, datetime):  # pymongo makes a DatetimeMS of a date beyond the year 9999
        return None
    time = value.replace(tzinfo=UTC)
    return None if latest and time > latest else time


def is_readable(document: Mapping[str, Any]) -> bool:
    """Whether a document can be decoded. A raw one is decoded when it is first looked into."""
    try:
        document.items()
    except BSONError:
        return False
    return True


def as_mapping(value: Any) -> Mapping[str, Any]:
    """The value, if it is a mapping that can be read; else an empty one."""
    return value if isinstance(value, Mapping) and is_readable(value) else {}
