"""The arithmetic behind the benchmark's section on scale."""

from __future__ import annotations

import pytest

from bench_worker import Load, workers_at


@pytest.mark.parametrize(
    ("small", "large", "workers"),
    [
        ((100, 10.0), (1000, 100.0), 1000),  # each costs the same
        ((10, 1.0), (100, 100.0), 100),  # each costs as much as there are others
        ((100, 11.0), (1000, 200.0), 618),  # both: n / 10 + n² / 10,000
        ((100, 10.0), (1000, 50.0), 2000),  # large fleets seem to cost less: no more is made of that than a line
    ],
)
def test_how_many_workers_fill_a_core_follows_from_two_fleets(
    small: tuple[int, float], large: tuple[int, float], workers: int
) -> None:
    assert workers_at(100.0, small, large) == pytest.approx(workers, abs=0.5)


def test_loads_are_subtracted_and_multiplied_field_by_field() -> None:
    load = Load(7, 6, 5, 4, 3, 2, 1)
    assert (load - load * 0.5) * 2 == load
