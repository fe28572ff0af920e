"""`python -m bench`: measure the worker, draw the charts, or run chaos."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.table import Table

from bench import chaos, measurements
from bench.chaos_plan import Options as ChaosOptions
from bench.chart import draw_files, draw_goals
from bench.contestants import Bench, Options
from bench.dead_pool import dead_pool
from bench.figures import Document, Figure
from bench.measurements import Measurement
from bench.rivals import rivals, rivals_loss
from bench.scale import scale
from testbed.api import remove_foreign_settings

FIGURES_FILE: Final = Path("docs/figures.json")
GOALS_FILE: Final = Path("docs/benchmark.svg")
RIVALS_FILE: Final = Path("docs/rivals.svg")

FUNCTIONS: Final[tuple[Measurement, ...]] = (
    measurements.throughput,
    measurements.latency,
    measurements.cold_start,
    measurements.memory,
    measurements.memory_growth,
    measurements.crowd,
    measurements.thousand,
    measurements.first_word,
    measurements.streaming,
    measurements.commands,
    measurements.upkeep,
    measurements.old_jobs,
    measurements.recovery,
    scale,
    dead_pool,
    rivals,
    rivals_loss,
)
MEASUREMENTS: Final = {function.__name__.replace("_", "-"): function for function in FUNCTIONS}
# These run only with `--long`, or by their own command.
LONG: Final = frozenset({"memory-growth", "rivals-loss", "scale", "dead-pool"})

Sections = Mapping[str, Document]  # what the file of `--save` has, by measurement


# ── measure, print, save ─────────────────────────────────────────────────────────────────────────────────────────


def measure(bench: Bench, names: Iterable[str]) -> tuple[dict[str, list[Figure]], list[str]]:
    """Run these measurements; return their figures by name, and the names of those that failed."""
    figures: dict[str, list[Figure]] = {}
    failed: list[str] = []
    began_at = time.monotonic()
    for name in names:
        print(f"{time.monotonic() - began_at:4.0f} s  {name} …", file=sys.stderr, flush=True)
        try:
            bench.forget()
            figures[name] = MEASUREMENTS[name](bench)
        except Exception:  # the other measurements are worth having all the same
            traceback.print_exc()
            failed.append(name)
    return figures, failed


def facts_about(options: Options) -> Document:
    """Return how and when the measurements were made, and on what machine."""
    how = {"rounds": options.rounds, "jobs": options.jobs, "long": options.long}
    return {**how, "cpus": os.cpu_count(), "load": os.getloadavg(), "at": datetime.now(UTC).isoformat()}


def save(path: Path, options: Options, figures: Mapping[str, list[Figure]]) -> None:
    """Write a section for each measurement into the JSON file. The sections of other measurements stay as they are."""
    sections: dict[str, Document] = json.loads(path.read_text()) if path.exists() else {}
    for name, rows in figures.items():
        sections[name] = {**facts_about(options), "figures": [figure.as_json() for figure in rows]}
    ordered = {name: sections[name] for name in sorted(sections, key=[*MEASUREMENTS, *sections].index)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ordered, ensure_ascii=False, indent=2) + "\n")


def print_table(figures: list[Figure], options: Options, took_s: float) -> None:
    """Print a row for each figure, and the notes below."""
    table = Table(*("figure", "unit", "ours", "against", "other", "ours ÷ other", "ours − other", "goal"))
    for figure in figures:
        table.add_row(*figure.row())
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table, *(f"{figure.name}: {figure.note}" for figure in figures if figure.note), sep="\n")
    load = f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
    print(f"{options.rounds} rounds of {options.jobs} jobs: median (lowest–highest); {load}; {took_s:.0f} s")


def measure_and_report(options: Options, names: Iterable[str]) -> None:
    """Run these measurements; print, draw and save what they found. Exits with 1 if one of them failed."""
    began_at = time.monotonic()
    with Bench(options) as bench:
        by_name, failed = measure(bench, names)
    figures = [figure for rows in by_name.values() for figure in rows]
    if options.chart:
        options.chart.write_text(draw_goals(figures))
    if options.save:
        save(options.save, options, by_name)
    if options.as_json:
        print(json.dumps({**facts_about(options), "figures": [figure.as_json() for figure in figures]}, indent=2))
    else:
        print_table(figures, options, time.monotonic() - began_at)
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────

FILE: Final = click.Path(dir_okay=False, path_type=Path)
LONG_HELP: Final = "Also run the measurements that take over a minute each, and use 1,000,000 old documents."
RECOVERY_HELP: Final = "Also measure the recovery from a killed worker."
HURRY_HELP: Final = "Divide the worker's fixed waits by this. Above 1, leases, limits and faults are shorter as well."
EPILOG: Final = f"""\b
These commands make the figures and charts for docs/. The machine should do nothing else meanwhile.
  python -m bench --long --save {FIGURES_FILE}    (about 35 minutes)
  python -m bench chart
A single part is measured again by its name: python -m bench --rounds 6 --save {FIGURES_FILE} rivals
The virtual environments of the compared frameworks are made at the first run, which downloads them.
"""


@click.group(
    invoke_without_command=True,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.option("--rounds", default=4, show_default=True, help="Alternating rounds for each figure.")
@click.option("--jobs", default=150, show_default=True, help="Jobs in a round of the race.")
@click.option("--json", "as_json", is_flag=True, help="Print every round as JSON instead of a table.")
@click.option("--long", is_flag=True, help=LONG_HELP)
@click.option("--chart", type=FILE, help="Draw the goals of this run into this SVG file.")
@click.option("--save", type=FILE, help="Write the figures into this JSON file, from which `chart` draws.")
@click.option("--recovery/--no-recovery", default=True, show_default=True, help=RECOVERY_HELP)
@click.pass_context
def main(
    context: click.Context,
    rounds: int,
    jobs: int,
    as_json: bool,
    long: bool,
    chart: Path | None,
    save: Path | None,
    recovery: bool,
) -> None:
    """Measure the worker against a bare Celery task: everything, or the part that a command names.

    It starts a MongoDB, a Redis with append-only file and a provider of its own. The options stand before the command.
    """
    remove_foreign_settings()
    context.obj = Options(rounds, jobs, as_json, long, chart, save)
    if context.invoked_subcommand is None:
        left_out = {*(() if recovery else ("recovery",)), *(() if long else LONG)}
        measure_and_report(context.obj, [name for name in MEASUREMENTS if name not in left_out])


def add_command(name: str, function: Measurement) -> None:
    """Make a measurement a command."""

    @main.command(name, help=function.__doc__)
    @click.pass_obj
    def command(options: Options) -> None:
        measure_and_report(options, [name])


for measurement_name, measurement in MEASUREMENTS.items():
    add_command(measurement_name, measurement)


@main.command("chart")
@click.option("--figures", type=FILE, default=FIGURES_FILE, show_default=True, help="What `--save` has written.")
@click.option("--goals", type=FILE, default=GOALS_FILE, show_default=True, help="Where the goals are drawn.")
@click.option("--rivals", type=FILE, default=RIVALS_FILE, show_default=True, help="Where the rivals are drawn.")
def draw_charts(figures: Path, goals: Path, rivals: Path) -> None:
    """Draw the two charts in docs/ from saved figures.

    One shows the goals, the other the comparison with other frameworks.
    """
    if not figures.exists():
        raise click.ClickException(f"there is no {figures}; measure with --save {figures} first")
    print(*draw_files(figures, goals, rivals), sep="\n")


@main.command("chaos")
@click.option("--jobs", default=10_000, show_default=True, help="How many jobs to submit.")
@click.option("--workers", default=4, show_default=True, help="How many workers: prefork, threads, prefork, solo …")
@click.option("--minutes", default=12.0, show_default=True, help="How long to submit jobs and to cause faults.")
@click.option("--seed", default=1, show_default=True, help="Seed of the jobs and faults.")
@click.option("--hurry", default=1.0, show_default=True, help=HURRY_HELP)
@click.option("--json", "json_file", type=FILE, help="File for the figures.")
def run_chaos(jobs: int, workers: int, minutes: float, seed: int, hurry: float, json_file: Path | None) -> None:
    """Submit jobs while processes and servers die, then audit.

    The audit looks at every document, notice, file and call to the provider.
    """
    sys.exit(chaos.run(ChaosOptions(jobs, workers, minutes, seed, hurry), json_file))


if __name__ == "__main__":
    main(prog_name="python -m bench")
