"""Durations as they are typed on a command line: `90s`, `15m`, `1h`, `7d`."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import click

UNITS = {"s": timedelta(seconds=1), "m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}
LONGEST = timedelta(days=36_500)  # subtracted from today's date, it still leaves a date that MongoDB can hold
PATTERN = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([smhd])", re.ASCII)


class DurationType(click.ParamType):  # type: ignore[type-arg]
    """A positive number with a unit, read as a timedelta."""

    name = "duration"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> timedelta:
        """Reads the duration. Raises BadParameter: it has another form, is zero, or is longer than a century."""
        if isinstance(value, timedelta):
            return value
        found = PATTERN.fullmatch(str(value).strip().lower())
        if not found:
            self.fail(f"{value!r} should be a number with a unit, such as 90s, 15m, 1h or 7d.", parameter, context)
        # The number is bounded before it is multiplied, since a timedelta has bounds of its own.
        duration = min(float(found[1]), LONGEST / UNITS[found[2]] + 1) * UNITS[found[2]]
        if not timedelta(0) < duration <= LONGEST:
            self.fail(f"{value!r} should be more than 0 and at most {LONGEST.days}d.", parameter, context)
        return duration


DURATION = DurationType()


def in_largest_unit(duration: timedelta) -> str:
    """The duration as one word for a column, rounded down, such as `3h`. A negative one is `0s`."""
    fitting = [unit for unit, length in UNITS.items() if duration >= length]
    unit = fitting[-1] if fitting else "s"
    return f"{max(duration, timedelta(0)) // UNITS[unit]}{unit}"
