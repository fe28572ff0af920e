"""`python worker.py show JOB`: the life of one job."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import chain

import click
from bson import ObjectId

from worker import Runtime, configure
from worker_commands.job_facts import ALL_FIELDS, as_json, facts_of
from worker_commands.selection import JOB_ID, find_jobs, store_faults_as_sentences
from worker_commands.terminal import duration_text, print_rows
from workerkit.errors import Document
from workerkit.settings import load_settings

Rows = Iterator[tuple[str, str]]


def read_facts(runtime: Runtime, job_id: ObjectId) -> Document:
    """What the job's document says. Raises ClickException: there is none, or MongoDB can't be reached."""
    with store_faults_as_sentences():
        now, max_attempts = runtime.store.now(), runtime.settings.max_attempts
        for job in find_jobs(runtime, {"_id": job_id}, fields=ALL_FIELDS):
            return facts_of(job, now, max_attempts)
    raise click.ClickException(f"There is no job {job_id} in the database {runtime.settings.database_name}.")


# ── the rows ─────────────────────────────────────────────────────────────────────────────────────────────────────


def plain_rows(facts: Document, **names: str) -> Rows:
    """The facts that are shown as they are, under these names."""
    return ((name, str(facts[fact])) for fact, name in names.items() if fact in facts)


def between(earlier: datetime, later: datetime) -> str:
    """The time between; none if another host's clock says that the earlier one comes later."""
    return duration_text(max(0.0, (later - earlier).total_seconds()))


def time_rows(facts: Document, now: datetime) -> Rows:
    for name in ("created", "started", "ended"):
        if time := facts.get(f"{name}_at"):
            yield name, f"{time:%Y-%m-%d %H:%M:%S} UTC ({between(time, now)} ago)"


def reason_rows(facts: Document) -> Rows:
    """Why the job has failed or is to be tried again, where the operator has to know more than the person."""
    reason = ": ".join(filter(None, (facts.get("error"), facts.get("reason"))))
    if reason != facts.get("sentence", ""):
        help_needed = " (only the operator can help)" if facts.get("is_operators") else ""
        yield "reason", f"{reason}{help_needed}"


def attempt_text(attempt: Document) -> str:
    """How long an attempt waited and ran, how it ended and why, and where it was."""
    verbs = {"waited_s": "waited", "ran_s": "ran"}
    spans = [f"{verb} {duration_text(attempt[name])}" for name, verb in verbs.items() if name in attempt]
    end = attempt.get("end", "").replace("_", " ")
    why = ": ".join(attempt[name] for name in ("error", "reason") if name in attempt)
    where = " at ".join(attempt[name] for name in ("model", "provider") if name in attempt)
    node = f"on {attempt['node']}" if "node" in attempt else ""
    return "; ".join(filter(None, (", ".join(filter(None, [*spans, end])), why, where, node)))


def attempt_rows(facts: Document, now: datetime) -> Rows:
    if "attempt" in facts:
        yield "attempts", f"{facts['attempt']} of {facts['max_attempts']}"
    for attempt in facts.get("attempts", []):
        yield f"attempt {attempt.get('attempt', '?')}", attempt_text(attempt)


def lease_text(facts: Document, now: datetime) -> str:
    lease_until = facts.get("lease_until")
    if lease_until and facts["is_alive"]:
        return f"alive: it runs out in {between(now, lease_until)} unless the worker renews it"
    ended = f"ran out {between(lease_until, now)} ago" if lease_until else "isn't known"
    return f"{ended}: a running worker gives the job to the next attempt"


def present_rows(facts: Document, now: datetime) -> Rows:
    """Where the job runs now, or when its next attempt may begin."""
    if "is_alive" in facts:
        process = f", process {facts['pid']}" if "pid" in facts else ""
        since = f", for {duration_text(facts['running_s'])}" if "running_s" in facts else ""
        yield "runs on", f"{facts.get('node', 'an unknown node')}{process}{since}"
        yield "lease", lease_text(facts, now)
    if next_try_at := facts.get("next_try_at"):
        yield "next try", f"in {between(now, next_try_at)}" if next_try_at > now else "due, its message is queued"


def used_rows(facts: Document, now: datetime) -> Rows:
    """What the job used, and what it made."""
    yield from plain_rows(facts, provider="provider", model="model")
    if "tokens" in facts:
        parts = {"prompt_tokens": "in the prompt", "completion_tokens": "in the answer"}
        named = ", ".join(f"{facts[name]} {where}" for name, where in parts.items() if name in facts)
        yield "tokens", f"{facts['tokens']}{f' ({named})' if named else ''}"
    if "duration_seconds" in facts:
        yield "duration", f"{facts['duration_seconds']:g} s"
    yield from plain_rows(facts, resolution="resolution", format="format", file="file")


def message_rows(facts: Document, now: datetime) -> Rows:
    yield from plain_rows(facts, queue="queue", task_id="task", rescues="rescues")
    if "soft_limit_s" in facts:
        yield "limits", f"{facts['soft_limit_s']:g} s, and {facts['hard_limit_s']:g} s by force"
    if facts.get("is_unnotified"):
        yield "notice", "the last one isn't confirmed yet: a running worker publishes it again"


def life_rows(facts: Document, now: datetime) -> Rows:
    for number, life in enumerate(facts.get("former_lives", []), 1):
        ended_at = f"{life['ended_at']:%Y-%m-%d %H:%M:%S} UTC" if "ended_at" in life else ""
        counted = [f"{name}: {life[name]}" for name in ("attempts", "tokens") if name in life]
        yield (
            f"former life {number}",
            ", ".join(filter(None, (ended_at, life.get("reason"), life.get("model"), *counted))),
        )


def command_rows(facts: Document, now: datetime) -> Rows:
    if command := facts.get("command"):
        yield "you can", f"python worker.py {command} {facts['id']}"


def first_rows(facts: Document, now: datetime) -> Rows:
    yield from plain_rows(facts, id="job", type="type", status="status", sentence="person reads")
    yield from reason_rows(facts)
    yield from plain_rows(facts, cancelled_by="cancelled by")
    yield from plain_rows(facts, user_id="user", session_id="session")


ROWS: tuple[Callable[[Document, datetime], Rows], ...] = (
    first_rows,
    time_rows,
    attempt_rows,
    present_rows,
    used_rows,
    message_rows,
    life_rows,
    command_rows,
)


def rows_of(facts: Document, now: datetime) -> list[tuple[str, str]]:
    return list(chain.from_iterable(rows(facts, now) for rows in ROWS))


@click.command("show", short_help="Show the life of one job.")
@click.argument("job_id", metavar="JOB", type=JOB_ID)
@click.option("--json", "is_json", is_flag=True, help="print one JSON object")
def command(job_id: ObjectId, is_json: bool) -> None:
    """Show the life of one job: what the person reads, why it failed, its attempts, and what you can do.

    JOB is its whole id. The job's input and its text are never shown.
    """
    with contextlib.closing(configure(load_settings())) as runtime:
        facts, now = read_facts(runtime, job_id), runtime.store.now()
    if is_json:
        print(json.dumps(as_json(facts), indent=2, ensure_ascii=False))
    else:
        print_rows(("", "the life of one job"), rows_of(facts, now))
