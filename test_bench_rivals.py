"""What the benchmark says of other frameworks is complete; their speed is measured by hand."""

from __future__ import annotations

import pytest

import bench_worker
from bench_rivals import ENQUEUE, RIVALS, Rival


def test_the_rivals_are_parts_of_the_benchmark() -> None:
    assert {"rivals", "rivals-loss"} <= set(bench_worker.MEASUREMENTS)
    assert "rivals-loss" in bench_worker.LONG


def test_every_framework_has_a_rival_under_a_name_of_its_own() -> None:
    assert {rival.framework for rival in RIVALS} == set(ENQUEUE)
    assert len({rival.label for rival in RIVALS}) == len(RIVALS)


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.label)
def test_a_rival_is_pinned_and_explained(rival: Rival) -> None:
    assert all("==" in package for package in rival.packages)
    assert rival.note
    assert rival.recovery
