"""`python worker.py status`: what needs a person, and how jobs, queue and workers stand."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import click

from worker import Runtime, configure
from worker_commands.active import State
from worker_commands.durations import DURATION
from worker_commands.lives import Outcome
from worker_commands.overview import (
    MAX_ENDED,
    Jobs,
    Overview,
    Times,
    Workers,
    find_needs,
    group_failures,
    judge_workers,
    look_at_servers,
    percentile,
    times_by_type,
)
from worker_commands.terminal import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    as_shown,
    counted,
    duration_text,
    figures_table,
    open_console,
    print_lines,
    printable,
)
from workerkit.errors import Document
from workerkit.settings import load_settings

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

WATCH_EVERY_S = 3.0
TYPES_SHOWN, FAILURES_SHOWN = 8, 6
LABEL_WIDTH = 8
TIME_HEADINGS = ("last hour, by type", "jobs", "wait p50", "p95", "run p50", "p95")
TIME_NAMES = ("wait_p50_s", "wait_p95_s", "run_p50_s", "run_p95_s")

# ── as text ──────────────────────────────────────────────────────────────────────────────────────────────────────


def workers_text(workers: Workers) -> str:
    """What is known of the workers, and no more than that."""
    alive = f"{workers.alive} alive" if workers.is_exact else f"at least {workers.alive} alive"
    slots = (
        f"{counted(workers.busy, 'slot')} busy"
        if workers.slots is None
        else f"{workers.busy} of {workers.slots} slots busy"
    )
    known = f"{alive}, {slots}" if workers.alive else "none alive" if workers.is_exact else "not known"
    return f"{known} ({workers.remark})" if workers.remark else known


def rows_of_jobs(jobs: Jobs) -> Iterator[tuple[str, str]]:
    """The jobs that haven't ended, and how the others ended in the last hour."""
    oldest = f", the oldest for {duration_text(jobs.oldest_pending_s)}" if jobs.pending_count else ""
    waiting = jobs.in_state(State.WAITING)
    soonest_s = min(((job.available_at or jobs.now) - jobs.now).total_seconds() for job in waiting) if waiting else 0.0
    soonest = f", the first in {duration_text(soonest_s)}" if waiting else ""
    yield "pending", f"{jobs.pending_count}{oldest}"
    yield "running", f"{len(jobs.in_state(State.RUNNING))}"
    yield "retrying", f"{len(waiting)} waiting for the next try{soonest}"
    if unowned := len(jobs.in_state(State.UNOWNED)):
        yield "unowned", f"{unowned} handed back or lost; a worker takes them up within seconds"
    if jobs.unconfirmed:
        yield "notices", f"{counted(jobs.unconfirmed, 'last notice')} not confirmed; a worker publishes them again"
    counts = [(sum(life.outcome is outcome for life in jobs.ended), outcome) for outcome in Outcome]
    newest = f" (of the newest {MAX_ENDED:,} of each)" if jobs.is_cut else ""
    yield "ended", f"in the last hour: {', '.join(f'{count} {outcome}' for count, outcome in counts)}{newest}"


def rows_of(seen: Overview, workers: Workers) -> Iterator[tuple[str, str]]:
    yield "workers", workers_text(workers)
    if seen.jobs:
        yield from rows_of_jobs(seen.jobs)
    if seen.queue_length is not None:
        yield "queue", f"{seen.queue}: {counted(seen.queue_length, 'message')} that no worker has taken"
    if seen.jobs:
        yield "as of", f"{seen.jobs.now:%Y-%m-%d %H:%M:%S} UTC, by MongoDB's clock"


def figures_of(times: Times) -> list[float | None]:
    """The median and the 95th percentile of the waits, and those of the run times."""
    return [percentile(values, share) for values in (times.waits, times.runs) for share in (0.5, 0.95)]


def seconds_cell(seconds: float | None) -> str:
    return "-" if seconds is None else duration_text(seconds)


def time_cells(name: str, times: Times) -> list[str]:
    return [name or "(no type)", f"{times.jobs}", *map(seconds_cell, figures_of(times))]


class Page:
    """What one look at the servers shows, drawn for a console of any width."""

    def __init__(self, console: Console, seen: Overview, pending_over: timedelta) -> None:
        self._console, self._seen = console, seen
        self._workers = judge_workers(seen)
        self._needs = find_needs(seen, self._workers, pending_over)

    def __rich_console__(self, *_: object) -> Iterator[RenderableType]:
        yield from self._draw_needs()
        yield self._grid(rows_of(self._seen, self._workers), "bold")
        if self._seen.jobs:
            yield from self._draw_times(self._seen.jobs)
            yield from self._draw_failures(self._seen.jobs)

    def _shown(self, text: str, style: str = "") -> RenderableType:
        return as_shown(self._console, printable(text), style)

    def _grid(self, rows: Iterable[tuple[str, str]], label_style: str, width: int = LABEL_WIDTH) -> RenderableType:
        from rich.table import Table

        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(width=width)
        grid.add_column(overflow="fold")
        for label, text in rows:
            grid.add_row(self._shown(label, label_style), self._shown(text))
        return grid

    def _draw_needs(self) -> Iterator[RenderableType]:
        from rich.padding import Padding

        if not self._needs:
            yield self._shown("Nothing needs you.\n", "bold green")
        for need in self._needs:
            yield self._shown(f"NEEDS YOU: {need.what}", "bold red")
            yield Padding(self._shown(need.advice), (0, 0, 1, 2))

    def _draw_times(self, jobs: Jobs) -> Iterator[RenderableType]:
        by_type = times_by_type(jobs.ended)
        if not by_type:
            return
        rows = [time_cells(name, times) for name, times in list(by_type.items())[:TYPES_SHOWN]]
        yield self._shown("")
        yield figures_table(self._console, TIME_HEADINGS, rows)
        if len(by_type) > TYPES_SHOWN:
            yield self._shown(f"and {counted(len(by_type) - TYPES_SHOWN, 'more type')} (--json has all)")

    def _draw_failures(self, jobs: Jobs) -> Iterator[RenderableType]:
        groups = group_failures(jobs.ended)
        if not groups:
            return
        yield self._shown("\nfailures of the last hour", "bold")
        for group in groups[:FAILURES_SHOWN]:
            advice = f"\n{group.advice}" if group.advice else ""
            row = (f"{group.count:5}", f"{group.reason}\nsuch as job {group.job_id}{advice}")
            yield self._grid([row], "bold red" if group.is_operators else "bold", 5)
        if len(groups) > FAILURES_SHOWN:
            yield self._shown(f"and {counted(len(groups) - FAILURES_SHOWN, 'more reason')} (--json has all)")

    @property
    def exit_code(self) -> int:
        return EXIT_FAILED if self._needs else 0

    # ── for programs ─────────────────────────────────────────────────────────────────────────────────────────────

    def document(self) -> Document:
        """The same as a JSON object. What can't be asked is null."""
        seen, workers, jobs = self._seen, self._workers, self._seen.jobs
        return {
            "needs": [asdict(need) for need in self._needs],
            "queue": seen.queue,
            "queue_length": seen.queue_length,
            "workers": asdict(workers),
            "jobs": jobs and jobs_document(jobs),
            "types": jobs and types_document(jobs),
            "failures": jobs and [as_json(asdict(group)) for group in group_failures(jobs.ended)],
        }


def as_json(fields: Document) -> Document:
    """Times and ids as text, the others as they are."""

    def plain(value: Any) -> Any:
        return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)

    return {name: value.isoformat() if isinstance(value, datetime) else plain(value) for name, value in fields.items()}


def jobs_document(jobs: Jobs) -> Document:
    states = {state.value: len(jobs.in_state(state)) for state in State}
    ended = {outcome.value: sum(life.outcome is outcome for life in jobs.ended) for outcome in Outcome}
    oldest_s = round(jobs.oldest_pending_s, 1) if jobs.pending_count else None
    counts = {"pending": jobs.pending_count, "oldest_pending_s": oldest_s, **states}
    last_hour = {"ended_in_the_last_hour": ended, "ended_is_cut": jobs.is_cut}
    return {"at": jobs.now.isoformat(), **counts, **last_hour, "unconfirmed_notices": jobs.unconfirmed}


def types_document(jobs: Jobs) -> Document:
    """The types with waits and run times in seconds."""
    by_type = times_by_type(jobs.ended).items()
    return {
        printable(name): {"jobs": times.jobs, **dict(zip(TIME_NAMES, figures_of(times), strict=True))}
        for name, times in by_type
    }


# ── once, or again and again ─────────────────────────────────────────────────────────────────────────────────────


def print_page(console: Console, page: Page, as_document: bool) -> None:
    if as_document:
        print(json.dumps(page.document()), flush=True)
    else:
        print_lines(console, page)


def end_in_order(number: int, _frame: object) -> NoReturn:
    """On SIGTERM: gives the terminal its lines and its cursor back."""
    raise SystemExit(128 + number)


def watch(console: Console, look: Callable[[], Page], as_document: bool) -> None:
    """Shows a new page every few seconds: in place of the last one on a terminal, else behind it. It never returns."""
    from rich.live import Live

    is_live = console.is_terminal and not as_document
    with Live(console=console, screen=True, auto_refresh=False) if is_live else contextlib.nullcontext() as live:
        while True:
            page = look()
            if live:
                live.update(page, refresh=True)
            else:
                print_page(console, page, as_document)
                print(end="" if as_document else "\n", flush=True)
            time.sleep(WATCH_EVERY_S)


def status(runtime: Runtime, pending_over: timedelta, *, as_document: bool = False, is_watching: bool = False) -> int:
    """Prints how jobs, queue and workers stand. Returns 1 if something needs a person."""
    console = open_console()

    def look() -> Page:
        return Page(console, look_at_servers(runtime), pending_over)

    try:
        if is_watching:
            watch(console, look, as_document)
        page = look()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    print_page(console, page, as_document)
    return page.exit_code


@click.command("status", short_help="Show what needs you, the jobs, the queue and the workers.")
@click.option("--json", "as_document", is_flag=True, help="print a JSON object instead of text")
@click.option("--watch", "is_watching", is_flag=True, help="look again every few seconds, until Ctrl-C")
@click.option(
    "--pending-over",
    type=DURATION,
    default="5m",
    show_default=True,
    help="how long a job may be pending before that needs you",
)
def command(as_document: bool, is_watching: bool, pending_over: timedelta) -> None:
    """Show how jobs, queue and workers stand, and first of all what needs a person.

    Exits with 1 if something does: MongoDB or the broker can't be reached, no worker is alive, a job has been pending
    for too long, or a job of the last 10 minutes has failed by what only the operator can change.
    """
    if is_watching:
        signal.signal(signal.SIGTERM, end_in_order)
    with contextlib.closing(configure(load_settings())) as runtime:
        sys.exit(status(runtime, pending_over, as_document=as_document, is_watching=is_watching))
