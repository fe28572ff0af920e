"""Durations as they are typed on a command line."""

from __future__ import annotations

from datetime import timedelta

import click
import pytest

from tests.lab import table
from worker_commands.durations import DURATION


@table(
    "typed, duration",
    ("seconds", "90s", timedelta(seconds=90)),
    ("minutes", "15m", timedelta(minutes=15)),
    ("an hour", "1h", timedelta(hours=1)),
    ("days", "7d", timedelta(days=7)),
    ("a fraction", "1.5h", timedelta(minutes=90)),
    ("capitals and spaces", " 2 H ", timedelta(hours=2)),
    ("the longest", "36500d", timedelta(days=36_500)),
)
def test_a_duration_is_a_number_with_a_unit(typed: str, duration: timedelta) -> None:
    assert DURATION.convert(typed, None, None) == duration


@table(
    "typed",
    ("no unit", "90"),
    ("no number", "h"),
    ("nothing", ""),
    ("another unit", "2w"),
    ("two at once", "1h30m"),
    ("a sign", "-1h"),
    ("zero", "0s"),
    ("less than MongoDB's clock can tell", "0.0000001s"),
    ("more than a century", "36501d"),
    ("more than a timedelta can hold", "999999999d"),
    ("digits of another script", "٣h"),
    ("no finite number", "infd"),
)
def test_what_is_no_duration_is_refused_with_an_example_or_the_bounds(typed: str) -> None:
    with pytest.raises(click.BadParameter, match=r"such as 90s, 15m, 1h or 7d|at most 36500d"):
        DURATION.convert(typed, None, None)


def test_a_default_that_is_a_timedelta_stays_as_it_is() -> None:
    assert DURATION.convert(timedelta(hours=1), None, None) == timedelta(hours=1)
