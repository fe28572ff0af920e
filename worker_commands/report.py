"""`python worker.py report`: jobs, failures and what was used, so that costs can be reckoned."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import click
import pymongo

from worker import Runtime, Status, configure
from worker_commands.active import date_between, lies_between, text_at
from worker_commands.durations import DURATION
from worker_commands.findings import describe
from worker_commands.lives import (
    CLOCKS_DIFFER_BY,
    EPOCH,
    MAX_AMOUNT,
    as_amount,
    as_words,
    cancelled_since,
    ended_between,
    has_index_of_ends,
)
from worker_commands.terminal import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    figures_table,
    open_console,
    print_lines,
    printable,
    say,
)
from workerkit.errors import Document, StoreUnavailable
from workerkit.mongodb import unknown_when_unreachable
from workerkit.sentences import STOPPED
from workerkit.settings import load_settings

PATIENCE_S = 600.0  # a month of a large deployment takes MongoDB a minute
ROWS_SHOWN = 50
SUMS = ("jobs", "completed", "failed", "cancelled")
TOKENS = ("prompt_tokens", "completion_tokens", "tokens")
MEDIA = ("pictures", "sound_seconds")
FIGURES = (*SUMS, *TOKENS, *MEDIA)
SHOWN = tuple(name for name in FIGURES if name not in ("completed", "cancelled"))  # in 80 columns
NO_NAME = "(none)"
HEADINGS = {"prompt_tokens": "prompt", "completion_tokens": "completion", "sound_seconds": "sound s"}
# A cell that begins like this runs as a formula when a spreadsheet opens the file.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")

# ── the pipeline ─────────────────────────────────────────────────────────────────────────────────────────────────
# It decides on the server what lives.py decides about one document.


def amount(path: str) -> Document:
    """An expression: the number, or 0 for what is no number that something can be counted with."""
    return {"$cond": [lies_between(path, 0, MAX_AMOUNT), path, 0]}


def is_text(path: str) -> Document:
    """An expression: whether it is a text, and not an empty one."""
    return {"$ne": [{"$ifNull": [text_at(path), ""]}, ""]}


def chosen(cases: Sequence[tuple[Document, Any]], otherwise: Any) -> Any:
    """An expression: the value of the first case that holds."""
    for condition, value in reversed(cases):
        otherwise = {"$cond": [condition, value, otherwise]}
    return otherwise


def list_at(path: str) -> Document:
    return {"$cond": [{"$isArray": {"$ifNull": [path, None]}}, path, {"$literal": []}]}


def is_status(status: Status) -> Document:
    return {"$eq": ["$status", status.value]}


def has_no_end() -> Document:
    return {"$eq": [{"$ifNull": ["$completed_at", None]}, None]}


def was_stopped(path: str) -> Document:
    """An expression: whether the sentence there says that an operator has cancelled the job."""
    return {"$eq": [{"$ifNull": [path, None]}, STOPPED]}


def used_if(condition: Document, used: Document) -> Document:
    return {name: {"$cond": [condition, value, 0]} for name, value in used.items()}


def tokens_used(values: str, total: str) -> Document:
    """Expressions: the tokens. A provider may count the whole alone, or the parts alone."""
    prompt, completion = amount(f"{values}.prompt_tokens"), amount(f"{values}.completion_tokens")
    whole = {"$max": [amount(f"{values}.{total}"), {"$add": [prompt, completion]}]}
    return {"prompt_tokens": prompt, "completion_tokens": completion, "tokens": whole}


def last_life(since: datetime, latest: datetime) -> Document:
    """An expression: the life whose end the document's own fields hold. `ended_at` is null where there is none then."""
    has_no_time = {"$and": [is_status(Status.FAILED), has_no_end()]}
    at = {"$cond": [has_no_time, "$created_at", "$completed_at"]}
    outcome = chosen(
        [
            (is_status(Status.COMPLETED), "completed"),
            (has_no_time, "cancelled"),
            (was_stopped("$error_message"), "cancelled"),
            (is_status(Status.FAILED), "failed"),
            (is_text("$error_message"), "failed"),
        ],
        "completed",
    )
    pictures = {"$cond": [is_text("$output_data.resolution"), 1, 0]}
    used = {**tokens_used("$output_data", "tokens_used"), "pictures": pictures}
    used["sound_seconds"] = amount("$output_data.duration_seconds")
    asked = {"$let": {"vars": {"last": {"$arrayElemAt": ["$attempts", -1]}}, "in": text_at("$$last.model")}}
    is_completed = {"$eq": ["$$outcome", "completed"]}
    model = chosen(
        [(is_completed, text_at("$output_data.model_used")), ({"$eq": ["$$outcome", "failed"]}, asked)], None
    )
    life = {"outcome": "$$outcome", "model": model, **used_if(is_completed, used)}
    with_end = {"ended_at": date_between("$$at", since, latest), **life}
    return {"$let": {"vars": {"outcome": outcome, "at": at}, "in": with_end}}


def past_lives(since: datetime, latest: datetime) -> Document:
    """An expression: the lives before the last claim of a job that was put back."""
    has_failed = is_text("$$life.reason")
    used = {**tokens_used("$$life", "tokens"), "pictures": amount("$$life.pictures")}
    used["sound_seconds"] = amount("$$life.seconds")
    life = {
        "ended_at": date_between("$$life.ended_at", since, latest),
        "outcome": chosen([(was_stopped("$$life.reason"), "cancelled"), (has_failed, "failed")], "completed"),
        "model": text_at("$$life.model"),
        **used_if({"$eq": [has_failed, False]}, used),
    }
    return {"$map": {"input": list_at("$worker.past"), "as": "life", "in": life}}


def question(since: datetime, latest: datetime, *, has_index: bool) -> Document:
    """What finds the jobs of which a life ended then, each part by an index."""
    active = {"status": {"$in": [Status.PENDING.value, Status.PROCESSING.value]}}
    ended = ended_between(since, latest, has_index=has_index)
    return {"$or": [ended, cancelled_since(since), {**active, "worker.past.ended_at": {"$gte": since}}]}


KEYS: dict[str, Any] = {
    "user": "$user",
    "model": "$life.model",
    "type": "$type",
    "day": {"$dateToString": {"format": "%Y-%m-%d", "date": "$life.ended_at"}},
}


def pipeline(since: datetime, latest: datetime, by: str, *, has_index: bool) -> list[Document]:
    """Counts the lives that ended then. MongoDB holds a row for each user, model, type or day, and no jobs."""
    since, latest = since.replace(tzinfo=None), latest.replace(tzinfo=None)  # mongomock keeps UTC without saying so
    # A list of one expression, in the form that mongomock knows as well.
    last = {"$map": {"input": {"$literal": [0]}, "as": "once", "in": last_life(since, latest)}}
    lives = {"$concatArrays": [past_lives(since, latest), last]}
    names = {"user": text_at("$user_id"), "type": text_at("$job_type")}
    counts = {name: {"$sum": {"$cond": [{"$eq": ["$life.outcome", name]}, 1, 0]}} for name in SUMS[1:]}
    sums = {name: {"$sum": f"$life.{name}"} for name in (*TOKENS, *MEDIA)}
    own = {"worker.past": 1, "attempts": list_at("$worker.attempts"), "output_data": 1}
    fields = dict.fromkeys(("status", "error_message", "completed_at", "created_at"), 1)
    order = {"_id": 1} if by == "day" else {"jobs": -1, "_id": 1}
    return [
        {"$match": question(since, latest, has_index=has_index)},
        {"$project": {**fields, **names, **own}},
        {"$project": {"user": 1, "type": 1, "life": lives}},
        {"$unwind": "$life"},
        {"$match": {"life.ended_at": {"$ne": None}}},
        {"$group": {"_id": KEYS[by], "jobs": {"$sum": 1}, **counts, **sums}},
        {"$sort": order},
    ]


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Row:
    """What one user, model, type or day has used. `name` is None for jobs that have none, such as no known model."""

    name: str | None
    figures: dict[str, float]


def whole(value: float) -> float:
    return round(value, 3) if value % 1 else int(value)


def read_rows(runtime: Runtime, since: datetime, by: str) -> list[Row]:
    """The figures of the lives that have ended since then. Raises StoreUnavailable."""
    jobs, latest = runtime.database["jobs"], runtime.store.now() + CLOCKS_DIFFER_BY
    stages = pipeline(max(since, EPOCH.replace(tzinfo=UTC)), latest, by, has_index=has_index_of_ends(jobs))
    with unknown_when_unreachable(), jobs.aggregate(stages, allowDiskUse=True) as groups:
        return [
            Row(as_words(group["_id"]) or None, {name: whole(as_sum(group[name])) for name in FIGURES})
            for group in groups
        ]


def as_sum(value: object) -> float:
    """A sum, which may be larger than any single amount."""
    return as_amount(value) or (float(value) if isinstance(value, (int, float)) else 0.0)


def total_of(rows: Iterable[Row]) -> dict[str, float]:
    total = dict.fromkeys(FIGURES, 0.0)
    for row in rows:
        for name, value in row.figures.items():
            total[name] += value
    return {name: whole(value) for name, value in total.items()}


# ── output ───────────────────────────────────────────────────────────────────────────────────────────────────────


def figure(value: float) -> str:
    return f"{value:,}" if value else "-"


def print_table(rows: Sequence[Row], by: str, since: datetime) -> None:
    """Prints the first rows, and the sums of all. Columns in which nothing was used are left out."""
    total, console = total_of(rows), open_console()
    used = [name for name in SHOWN if total[name] or name in ("jobs", "failed")]

    def cells(name: str, figures: Mapping[str, float]) -> list[str]:
        return [name, *(figure(figures[each]) for each in used)]

    shown = [cells(row.name or NO_NAME, row.figures) for row in rows[:ROWS_SHOWN]]
    headings = [by, *(HEADINGS.get(name, name) for name in used)]
    cancelled = f"; {total['cancelled']:,} of them cancelled" if total["cancelled"] else ""
    print(f"Jobs that have ended since {since:%Y-%m-%d %H:%M} UTC{cancelled}")
    print_lines(console, figures_table(console, headings, [*shown, cells("total", total)]))
    if len(rows) > ROWS_SHOWN:
        say(f"These are the first {ROWS_SHOWN} of {len(rows):,} rows; --csv and --json print all.")


def as_cell(name: str | None) -> str:
    """A text that no spreadsheet takes for a formula: an apostrophe before it says that it is a text."""
    text = printable(name or "")
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


def print_csv(rows: Sequence[Row], by: str, _since: datetime) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow((by, *FIGURES))
    writer.writerows((as_cell(row.name), *row.figures.values()) for row in rows)


def print_json(rows: Sequence[Row], by: str, since: datetime) -> None:
    shown = [{by: row.name, **row.figures} for row in rows]
    print(json.dumps({"since": since.isoformat(), "by": by, "rows": shown, "total": total_of(rows)}, indent=2))


FORMATS: dict[str, Callable[[Sequence[Row], str, datetime], None]] = {
    "table": print_table,
    "json": print_json,
    "csv": print_csv,
}


def report(runtime: Runtime, for_the_last: timedelta, by: str, shape: str) -> int:
    """Prints what was used. Returns 1 if MongoDB can't be asked."""
    try:
        with pymongo.timeout(PATIENCE_S):
            since = runtime.store.now() - for_the_last
            rows = read_rows(runtime, since, by)
    except StoreUnavailable as error:
        url, advice = runtime.settings.mongodb_url.get_secret_value(), "try `python worker.py check`"
        seen, advice, _ = describe(error, advice, url, "MONGODB_URL")
        say(f"MongoDB can't be reached or read: {seen} ({advice})")
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    FORMATS[shape](rows, by, since)
    return 0


@click.command("report", short_help="Count jobs, tokens, pictures and sound.")
@click.option("--since", "for_the_last", type=DURATION, default="7d", show_default=True, help="how far back, up to now")
@click.option("--by", type=click.Choice(list(KEYS)), default="model", show_default=True, help="what a row stands for")
@click.option("--json", "shape", flag_value="json", help="print a JSON object instead of a table")
@click.option("--csv", "shape", flag_value="csv", help="print comma-separated values instead of a table")
@click.option("--table", "shape", flag_value="table", default=True, hidden=True)
def command(for_the_last: timedelta, by: str, shape: str) -> None:
    """Count the jobs that have ended, and the tokens, pictures and seconds of sound that they used.

    A job that was tried again after its end counts once for each end. Money is not counted, since prices differ.
    """
    with contextlib.closing(configure(load_settings())) as runtime:
        sys.exit(report(runtime, for_the_last, by, shape))
