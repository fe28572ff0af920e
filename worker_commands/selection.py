"""Which jobs a command is about, and how they are read: in any number, whatever they hold, and without their inputs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, TypeVar

import click
from bson import ObjectId

from worker import OBJECT_ID_DIGITS, Runtime
from worker_commands.durations import DURATION
from worker_commands.job_facts import FIELDS, error_of, reason_of, sentence_of
from worker_commands.terminal import printable
from workerkit.bookkeeping import MAX_LIMIT_S, Snapshot, parse_bookkeeping
from workerkit.errors import Document, StoreRefused, StoreUnavailable
from workerkit.mongodb import iterate, read_raw
from workerkit.settings import as_utf8

SHORT_NAMES = {"text": "text_generation", "image": "image_generation", "audio": "audio_generation"}
OLDEST_CHANGED = timedelta(days=1)
SINCE_HELP = "jobs that changed within this time, such as 90s, 15m, 1h or 7d (and were made at most a day before it)"
T = TypeVar("T")


@contextlib.contextmanager
def store_faults_as_sentences() -> Iterator[None]:
    """Turns the errors of the store into what an operator reads. Raises ClickException, which ends with 1."""
    try:
        yield
    except StoreRefused as refusal:
        raise click.ClickException(f"{refusal}; `python worker.py check` shows more") from None
    except StoreUnavailable as error:
        fault = f"MongoDB can't be reached, or takes too long ({error}); try `python worker.py check`"
        raise click.ClickException(fault) from None


# ── which jobs ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Selection:
    """Jobs by what they have in common. Every job meets a condition that is empty."""

    statuses: tuple[str, ...] = ()
    user: str = ""
    job_type: str = ""
    since: timedelta | None = None
    reason: str = ""

    def query(self, now: datetime) -> Document:
        """The conditions that MongoDB checks, so that an index serves in every combination.

        The time of the last change has no index. An id begins with the time at which its job was made, so the ids bound
        the search: jobs that were made more than a day earlier are left out.
        """
        query: Document = {"status": {"$in": list(self.statuses)}} if self.statuses else {}
        query |= {"user_id": self.user} if self.user else {}
        query |= {"job_type": self.job_type} if self.job_type else {}
        if self.since:
            oldest = now - self.since - OLDEST_CHANGED
            query |= {"updated_at": {"$gte": now - self.since}}
            if oldest.timestamp() > 0:  # no id names an earlier time
                query |= {"_id": {"$gte": ObjectId.from_datetime(oldest)}}
        return query

    def matches(self, job: Snapshot) -> bool:
        """Whether the job meets the condition that MongoDB doesn't check."""
        said = " ".join((error_of(job), reason_of(job), sentence_of(job)))
        return self.reason.casefold() in said.casefold()


def read_text(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str:
    """The option's value, or an empty text where it wasn't given.

    Raises BadParameter: an empty value was given. A script's variable that isn't set must not select all jobs.
    """
    if value is not None and not value.strip():
        raise click.BadParameter("it is empty. Leave the option out if jobs shouldn't be selected by it.")
    return as_utf8(value or "")


def read_type(context: click.Context, parameter: click.Parameter, value: str | None) -> str:
    text = read_text(context, parameter, value)
    return SHORT_NAMES.get(text, text)


class JobIdType(click.ParamType):  # type: ignore[type-arg]
    """The whole id of a job, read as an ObjectId."""

    name = "job"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> ObjectId:
        """Reads the id. Raises BadParameter: it has another form."""
        if re.fullmatch(rf"[0-9a-fA-F]{{{OBJECT_ID_DIGITS}}}", str(value)):
            return ObjectId(str(value))
        shown = printable(as_utf8(str(value)))
        self.fail(f"{shown!r} is no job's id, which has {OBJECT_ID_DIGITS} hex digits. `jobs` lists ids.", parameter)


JOB_ID = JobIdType()
OPTIONS: dict[str, Callable[[Any], Any]] = {
    "user": click.option("--user", metavar="ID", callback=read_text, help="jobs of this user_id"),
    "type": click.option(
        "--type", "job_type", metavar="TYPE", callback=read_type, help="text, image, audio, or a full type"
    ),
    "since": click.option("--since", type=DURATION, metavar="TIME", help=SINCE_HELP),
    "reason": click.option(
        "--reason", metavar="WORDS", callback=read_text, help="jobs whose reason or sentence has these words"
    ),
}


def selection_options(*names: str) -> Callable[[Any], Any]:
    """Adds some of the options by which jobs are selected."""

    def add(command: Any) -> Any:
        for name in reversed(names):
            command = OPTIONS[name](command)
        return command

    return add


# ── reading them ─────────────────────────────────────────────────────────────────────────────────────────────────


def find_jobs(
    runtime: Runtime, query: Document, order: Sequence[tuple[str, int]] = (), fields: Document = FIELDS
) -> Iterator[Snapshot]:
    """The jobs that a query finds, one after the other. Raises StoreUnavailable."""
    now = runtime.store.now()
    found = read_raw(runtime.database["jobs"]).find(query, fields)
    for document in iterate(found.sort(list(order)) if order else found):
        yield Snapshot(document, parse_bookkeeping(document.get("worker"), now, MAX_LIMIT_S))


def newest_first(selection: Selection) -> list[tuple[str, int]]:
    """The order in which an index gives the selected jobs, so that MongoDB need not sort documents, which may be large.

    For jobs of one user that is the index on user and time. All others end with the ids.
    """
    return [("created_at" if selection.user else "_id", -1)]


def select_jobs(runtime: Runtime, selection: Selection) -> Iterator[Snapshot]:
    """The selected jobs, the newest first. Raises StoreUnavailable."""
    found = find_jobs(runtime, selection.query(runtime.store.now()), newest_first(selection))
    return filter(selection.matches, found) if selection.reason else found


def read_jobs(runtime: Runtime, job_ids: Sequence[ObjectId], **conditions: Any) -> list[Snapshot]:
    """Those of these jobs that meet the conditions, in the order of the given ids. Raises StoreUnavailable."""
    places = {job_id: place for place, job_id in enumerate(job_ids)}
    return sorted(find_jobs(runtime, {"_id": {"$in": list(places)}, **conditions}), key=lambda job: places[job.id])


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
