"""Chores that are done together: what a fault of one costs the others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import workerkit.chores
from workerkit.chores import Chores
from workerkit.errors import NotesUnavailable, StoreUnavailable


class Two:
    """Two chores, of which the first fails."""

    def __init__(self, error: Exception, takes_s: float = 0.0) -> None:
        self.error, self.takes_s, self.at = error, takes_s, 0.0
        self.chores = Chores({"the first fails": self.first, "the second fails": self.second})

    def first(self, done: list[str]) -> None:
        self.at += self.takes_s
        raise self.error

    def second(self, done: list[str]) -> None:
        done.append("second")

    def do(self) -> list[str]:
        done: list[str] = []
        assert not self.chores.do(done)
        return done


@pytest.mark.parametrize("error", [NotesUnavailable("Redis is away"), ValueError("a defect")])
def test_a_fault_of_one_chore_costs_no_other(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    assert Two(error).do() == ["second"]
    assert "the first fails: " in caplog.text


def test_a_chore_that_hangs_is_the_last_one_of_its_round_and_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Two(NotesUnavailable("timed out"), takes_s=5.0)
    monkeypatch.setattr(workerkit.chores, "time", SimpleNamespace(monotonic=lambda: two.at))
    assert two.do() == []
    assert two.do() == ["second"]


def test_without_mongodb_no_chore_goes_on() -> None:
    with pytest.raises(StoreUnavailable):
        Two(StoreUnavailable("AutoReconnect")).chores.do([])
