"""`python worker.py jobs`: a list of jobs, with whole ids."""

from __future__ import annotations

import contextlib
import json
import textwrap
from collections.abc import Sequence
from datetime import timedelta
from itertools import islice

import click

from worker import Runtime, Status, configure
from worker_commands.durations import in_largest_unit
from worker_commands.job_facts import as_json, summary_of
from worker_commands.selection import Selection, select_jobs, selection_options, store_faults_as_sentences
from worker_commands.terminal import open_console, say
from workerkit.bookkeeping import Snapshot
from workerkit.errors import Document
from workerkit.settings import load_settings

USUAL_LIMIT, MAX_LIMIT = 50, 10_000
COLUMNS = {"id": "id", "type": "type", "status": "status", "age": "age", "attempt": "tries"}
WIDE = 120  # columns, from which on reason and user have room on the same line
GAP, INDENT = "  ", "    "


def list_jobs(runtime: Runtime, selection: Selection, limit: int) -> tuple[list[Document], bool]:
    """What `jobs` shows, the newest first, and whether there are more.

    Raises ClickException: MongoDB can't be reached.
    """
    with store_faults_as_sentences():
        now = runtime.store.now()
        found: list[Snapshot] = list(islice(select_jobs(runtime, selection), limit + 1))
    return [summary_of(job, now) for job in found[:limit]], len(found) > limit


def cells_of(job: Document) -> list[str]:
    age = in_largest_unit(timedelta(seconds=job["age_s"])) if "age_s" in job else ""
    return [age if name == "age" else str(job.get(name, "")) for name in COLUMNS]


def said_of(job: Document) -> list[str]:
    """User and reason, which may be long."""
    return [text for name in ("user_id", "reason") if (text := job.get(name))]


def lines_of(jobs: Sequence[Document], width: int) -> list[str]:
    """The list for a screen of this width, with whole ids. On a narrow one user and reason have lines of their own."""
    rows = [list(COLUMNS.values()), *map(cells_of, jobs)]
    said = [["user", "reason"], *map(said_of, jobs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for cells, words in zip(rows, said, strict=True):
        line = GAP.join(cell.ljust(size) for cell, size in zip(cells, widths, strict=True))
        text = GAP.join(words)
        if width >= WIDE:
            lines.append(f"{line}{GAP}{text}".rstrip())
        else:
            folded = textwrap.wrap(text, width, initial_indent=INDENT, subsequent_indent=INDENT)
            lines += [line.rstrip(), *folded]
    return lines


def print_jobs(jobs: Sequence[Document], is_cut: bool) -> None:
    print(*(lines_of(jobs, open_console().width) if jobs else ["no jobs"]), sep="\n")
    if is_cut:
        say(f"The {len(jobs)} newest are shown. There are more: --limit {min(10 * len(jobs), MAX_LIMIT)} shows these.")


@click.command("jobs", short_help="List jobs, the newest first.")
@click.option("--status", "statuses", multiple=True, type=click.Choice([status.value for status in Status]))
@selection_options("user", "type", "since", "reason")
@click.option(
    "--limit", type=click.IntRange(1, MAX_LIMIT), default=USUAL_LIMIT, show_default=True, help="at most so many"
)
@click.option("--json", "is_json", is_flag=True, help="print one JSON object")
def command(
    statuses: Sequence[str], user: str, job_type: str, since: timedelta | None, reason: str, limit: int, is_json: bool
) -> None:
    """List jobs, the newest first, each with its whole id, its age and why it failed. --status can be repeated."""
    selection = Selection(tuple(statuses), user, job_type, since, reason)
    with contextlib.closing(configure(load_settings())) as runtime:
        jobs, is_cut = list_jobs(runtime, selection, limit)
    if is_json:
        print(json.dumps({"jobs": as_json(jobs), "is_cut": is_cut}, indent=2, ensure_ascii=False))
    else:
        print_jobs(jobs, is_cut)
