"""The sentences for the person who waits."""

from __future__ import annotations

from datetime import UTC, datetime

from tests.lab import table
from workerkit.sentences import try_again_after

EVENING = datetime(2026, 11, 27, 23, 30, tzinfo=UTC)


@table(
    "wait_s, when",
    ("the same day", 20 * 60, "23:50 UTC"),
    ("within a minute: never too early", 61, "23:32 UTC"),
    ("past midnight", 45 * 60, "2026-11-28 00:15 UTC"),
    ("days later", 9 * 86_400, "2026-12-06 23:30 UTC"),
)
def test_a_long_wait_is_said_as_the_time_at_which_it_ends(wait_s: float, when: str) -> None:
    assert (
        try_again_after("The provider is busy", EVENING, wait_s)
        == f"The provider is busy. Please try again after {when}."
    )
