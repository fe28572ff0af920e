"""The measurements' arithmetic, files and charts, and their client of the API's side. Speed is measured by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from bench.__main__ import LONG, MEASUREMENTS, main, save
from bench.chart import Bar, draw_files, draw_goals, draw_rivals, recovery_bars, speed_bars
from bench.contestants import STREAMED, Options
from bench.figures import Figure, Goal, figure_from
from bench.keeper_thread import KEEPER_FILE
from bench.rivals import RIVALS, Rival
from bench.scale import Load, workers_at
from testbed.api import remove_foreign_settings, without_foreign_settings
from testbed.processes import SOURCE, poll
from tests.lab import table
from tests.site import StartWorker
from workerkit.settings import Settings

SVG = "{http://www.w3.org/2000/svg}"
OPTIONS = Options(rounds=2, jobs=10)

# ── arithmetic ───────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "small, large, workers",
    ("each costs the same", (100, 10.0), (1000, 100.0), 1000),
    ("each costs as much as there are others", (10, 1.0), (100, 100.0), 100),
    ("both: n / 10 + n² / 10,000", (100, 11.0), (1000, 200.0), 618),
    ("large fleets seem to cost less, which is taken for a line", (100, 10.0), (1000, 50.0), 2000),
)
def test_how_many_workers_fill_a_core_follows_from_two_fleets(
    small: tuple[int, float], large: tuple[int, float], workers: int
) -> None:
    assert workers_at(100.0, small, large) == pytest.approx(workers, abs=0.5)


def test_loads_are_subtracted_and_multiplied_field_by_field() -> None:
    load = Load(7, 6, 5, 4, 3, 2, 1)
    assert (load - load * 0.5) * 2 == load


@table(
    "goal, is_reached",
    ("ours alone, below", Goal("ours", 3.0), True),
    ("ours alone, above", Goal("ours", 1.0), False),
    ("ours alone, at least", Goal("ours", 1.0, at_least=True), True),
    ("the ratio of each round, then the median", Goal("ratio", 0.5), True),
    ("the difference, which is negative", Goal("difference", 0.0001), True),
)
def test_a_goal_is_about_one_view_of_a_figure(goal: Goal, is_reached: bool) -> None:
    assert Figure("a", "s", [1.0, 2.0, 3.0], "b", [2.0, 4.0, 60.0], goal).is_reached is is_reached


def test_a_figure_is_the_same_after_it_was_saved() -> None:
    figure = Figure("a", "s", [1.0], "b", [2.0], Goal("ratio", 0.5, at_least=True), "a note", "a reason")
    assert figure_from(json.loads(json.dumps(figure.as_json()))) == figure


def test_a_bound_is_shown_as_one() -> None:
    assert Figure("a", "s", [1.0], "b", [60.0], not_before="a reason").row()[3:5] == ("b: not before", "60.00")


# ── what is offered ──────────────────────────────────────────────────────────────────────────────────────────────


def test_help_names_every_measurement_and_the_commands_behind_the_figures_in_the_docs() -> None:
    text = CliRunner().invoke(main, ["--help"]).output
    assert all(f"  {name}  " in text for name in (*MEASUREMENTS, "chart", "chaos"))
    assert "python -m bench --long --save docs/figures.json" in text
    assert set(MEASUREMENTS) >= LONG


def test_every_framework_has_a_rival_under_a_name_of_its_own() -> None:
    from bench.rival_jobs import ENQUEUE  # imports the openai SDK, for which only the worker of this test should wait

    assert {rival.framework for rival in RIVALS} == set(ENQUEUE)
    assert len({rival.label for rival in RIVALS}) == len(RIVALS)


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.label)
def test_a_rival_is_pinned_and_explained(rival: Rival) -> None:
    assert all("==" in package for package in rival.packages)
    assert all((rival.note, rival.recovery, rival.not_before))


# ── files and charts ─────────────────────────────────────────────────────────────────────────────────────────────

SPEEDS = [
    Figure("throughput", "jobs/s", [100.0, 110.0], "RQ", [40.0, 60.0]),
    Figure("throughput", "jobs/s", [100.0, 110.0], f"RQ{STREAMED}", [30.0, 40.0]),
    Figure("throughput", "jobs/s", [100.0, 110.0], "arq", [2.0, 2.0]),  # which has no streamed call
    Figure("CPU per job", "ms", [9.0], "RQ", [90.0]),
]
LOSSES = [
    Figure("kill", "s", [33.0], "arq", [124.0]),
    Figure("kill", "s", [33.0], "taskiq", [900.0], not_before="never <as long as>"),
]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_the_rivals_are_drawn_by_the_same_call_and_by_what_a_killed_worker_costs() -> None:
    assert speed_bars(SPEEDS) == [Bar("AI Backend Worker", 105.0, is_ours=True), Bar("RQ", 35.0, 50.0)]
    ours, arq, taskiq = recovery_bars(LOSSES)
    assert (ours.value, arq.value, taskiq.value, taskiq.bound) == (33.0, 124.0, None, 900.0)
    words = texts(draw_rivals(SPEEDS, LOSSES))
    assert {"AI Backend Worker", "105", "35", "50", "33", "124"} <= set(words)
    assert "not done within 15 min: never <as long as>" in words


def test_bars_are_as_long_as_their_values() -> None:
    rects = ElementTree.fromstring(draw_rivals(SPEEDS, [])).iter(f"{SVG}rect")
    ours, streamed, at_once = (float(rect.attrib["width"]) for rect in list(rects)[1:])
    assert [streamed / ours, at_once / ours] == pytest.approx([35 / 105, 50 / 105], rel=0.01)


def test_a_goal_that_is_missed_is_red() -> None:
    figures = [Figure(name, "s", [2.0], goal=Goal("ours", bound)) for name, bound in (("good", 4.0), ("bad", 1.0))]
    svg = draw_goals([*figures, Figure("without a goal", "s", [1.0])])
    fills = [rect.attrib["fill"] for rect in ElementTree.fromstring(svg).iter(f"{SVG}rect")]
    assert fills[1:] == ["#2da44e", "#cf222e"]
    assert "without a goal" not in texts(svg)


def test_charts_are_drawn_from_what_was_saved_by_several_runs(tmp_path: Path) -> None:
    saved, goals, rivals = tmp_path / "docs" / "figures.json", tmp_path / "goals.svg", tmp_path / "rivals.svg"
    save(saved, OPTIONS, {"rivals-loss": LOSSES[:1]})
    save(saved, OPTIONS, {"rivals-loss": LOSSES, "rivals": SPEEDS})
    assert list(json.loads(saved.read_text())) == ["rivals", "rivals-loss"]
    assert len(draw_files(saved, goals, rivals)) == 1  # none of these has a goal
    assert "124" in texts(rivals.read_text())
    save(saved, OPTIONS, {"memory": [Figure("memory", "MiB", [1.0], goal=Goal("ours", 2.0))]})
    done = CliRunner().invoke(main, ["chart", f"--figures={saved}", f"--goals={goals}", f"--rivals={rivals}"])
    assert done.exit_code == 0, done.output
    assert "memory" in texts(goals.read_text())


def test_without_figures_chart_says_how_to_get_some(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["chart", f"--figures={tmp_path / 'none.json'}"])
    assert done.exit_code == 1
    assert "--save" in done.output


# ── the API's side ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_settings_of_whoever_runs_this_reach_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name.upper() for name in Settings.model_fields]
    assert without_foreign_settings(dict.fromkeys([*names, "HOME"], "x")) == {"HOME": "x"}
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://elsewhere")
    remove_foreign_settings()
    assert "CELERY_BROKER_URL" not in os.environ


STAND_FOR_OTHERS = """
import importlib, sys
for name in ("testbed.api", "bench.by_hand", "bench.bare", "bench.rival_jobs"):
    importlib.import_module(name)
    print(name, {"worker", "workerkit"} & {module.split(".")[0] for module in sys.modules} or "")
"""


def test_what_stands_for_others_imports_nothing_of_the_worker() -> None:
    """Neither the API's client, which is a stock one, nor the frameworks that are compared."""
    command = [sys.executable, "-c", STAND_FOR_OTHERS]
    done = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["testbed.api", "bench.by_hand", "bench.bare", "bench.rival_jobs"]


# ── inside a worker ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(sys.platform != "linux", reason="a thread's CPU time is read from /proc")
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_measured_worker_names_its_keepers_thread(start_worker: StartWorker, pool: str, tmp_path: Path) -> None:
    file = tmp_path / "keeper"
    start_worker(WORKER_POOL=pool, HANDLER_MODULES="bench.keeper_thread", **{KEEPER_FILE: str(file)})
    poll(file.exists, 30)
    process, thread = file.read_text().split()
    assert Path(f"/proc/{process}/task/{thread}").exists()
