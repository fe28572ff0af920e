"""What `retry` and `cancel` share: they show first what they would change, ask, and then change it in batches."""

from __future__ import annotations

import secrets
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
from bson import ObjectId
from pymongo import UpdateOne
from pymongo.errors import BulkWriteError

from worker import Notifier, Runtime, Status
from worker_commands.job_facts import on_one_line
from worker_commands.selection import in_batches, read_jobs, store_faults_as_sentences
from worker_commands.terminal import EXIT_FAILED, EXIT_INTERRUPTED, counted, print_rows, say
from workerkit.bookkeeping import Snapshot
from workerkit.errors import Document, StoreRefused
from workerkit.mongodb import unknown_when_unreachable

ACTIVE = (Status.PENDING.value, Status.PROCESSING.value)
MAX_JOBS = 100_000  # of one call, so that their ids need little memory
GROUPS_SHOWN, IDS_SHOWN = 20, 5
UNKNOWN = "there is no such job"
CHANGED = "changed meanwhile"


def ids_missing(job_ids: Iterable[ObjectId], jobs: Iterable[Snapshot]) -> list[ObjectId]:
    """Those of these ids, each once, that none of the jobs has."""
    found = {job.id for job in jobs}
    return [job_id for job_id in dict.fromkeys(job_ids) if job_id not in found]


@dataclass
class Left:
    """Jobs that are left as they are: how many for each reason, and the ids of some."""

    counts: Counter[str] = field(default_factory=Counter)
    ids: dict[str, list[ObjectId]] = field(default_factory=dict)

    def add(self, why: str, job_ids: Iterable[ObjectId]) -> None:
        for job_id in job_ids:
            self.counts[why] += 1
            shown = self.ids.setdefault(why, [])
            shown += [job_id] if len(shown) < IDS_SHOWN else []

    def lines(self) -> list[str]:
        def line(why: str, count: int) -> str:
            more = ", …" if count > len(self.ids[why]) else ""
            ids = ", ".join(on_one_line(str(job_id)) for job_id in self.ids[why])
            return f"{counted(count, 'job')} left: {why} ({ids}{more})"

        return [line(why, count) for why, count in self.counts.most_common()]


@dataclass
class Plan:
    """The jobs that a command would change, counted in groups, and those that it would leave."""

    job_ids: list[ObjectId] = field(default_factory=list)
    groups: Counter[tuple[str, ...]] = field(default_factory=Counter)
    left: Left = field(default_factory=Left)

    def add(self, job_id: ObjectId, *group: str) -> None:
        self.job_ids.append(job_id)
        self.groups[group] += 1

    @property
    def is_full(self) -> bool:
        return len(self.job_ids) >= MAX_JOBS

    def show(self, headings: Sequence[str], what: str) -> None:
        """Prints how many jobs of which kinds it is about. `what` says what would happen to them."""
        rows = [(str(count), *group) for group, count in self.groups.most_common(GROUPS_SHOWN)]
        if hidden := self.groups.total() - sum(int(row[0]) for row in rows):
            rows.append((str(hidden), "others", *[""] * (len(headings) - 1)))
        if rows:
            print_rows(("jobs", *headings), rows)
        print(f"{counted(len(self.job_ids), 'job')} {what}.", *self.left.lines(), sep="\n", flush=True)
        if self.is_full:
            print(f"There may be more: one call changes at most {MAX_JOBS}. Call it again afterwards.")


def is_agreed(question: str, is_yes: bool) -> bool:
    """Whether the operator wants it: by `--yes`, or by the answer to this question where there is a terminal."""
    if is_yes:
        return True
    if sys.stdin and sys.stdin.isatty():  # a job of cron may have none
        return click.confirm(question, err=True)
    say("Nothing was done. Add --yes to do it.")
    return False


class Progress:
    """A line on a terminal that says how far the command has got."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._is_shown = sys.stderr.isatty() and total > 0

    def add(self, count: int) -> None:
        self._done += count
        if self._is_shown:
            end = "\n" if self._done >= self._total else "\r"  # what is printed next, such as a fault, replaces it
            print(f"{self._done} of {self._total}", end=end, file=sys.stderr, flush=True)


class Publisher:
    """Publishes statuses. Once Redis can't be reached, it tries no more, since each try takes seconds."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier, self._is_away = notifier, False
        self.unpublished = 0

    def publish(self, document: Mapping[str, Any], status: Status, sentence: str) -> bool:
        """Publishes a status that the document has. False: Redis could not be reached."""
        self._is_away = self._is_away or not self._notifier.publish_status(document, status, sentence)
        self.unpublished += self._is_away
        return not self._is_away


class Change:
    """Changes jobs in batches, and counts what became of them.

    `token` marks what this call has changed. `begun` are the jobs of the batches that were begun. While a batch is
    written, its jobs are `in_doubt`. A `fault` keeps the batches behind it from being tried.
    """

    batch = 200

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self._token = runtime, secrets.token_hex(8)
        self._publisher = Publisher(runtime.notifier)
        self.left, self.fault = Left(), ""
        self.begun = self.in_doubt = 0

    @property
    def unpublished(self) -> int:
        return self._publisher.unpublished

    def _batches(self, job_ids: Sequence[ObjectId], progress: Progress, status: object) -> Iterator[list[Snapshot]]:
        """Those of these jobs that still have the status, in batches. Raises StoreUnavailable."""
        for batch in in_batches(job_ids, self.batch):
            self.begun, self.in_doubt = self.begun + len(batch), len(batch)
            jobs = read_jobs(self._runtime, batch, status=status)
            self.left.add(CHANGED, ids_missing(batch, jobs))
            yield jobs
            progress.add(len(batch))
            if self.fault:
                break

    def say_untried(self, plan: Plan) -> None:
        """Says how many jobs of the plan are in batches that were not begun."""
        if untried := len(plan.job_ids) - self.begun:
            say(f"{counted(untried, 'job')} not tried: as before. Call it again.")


def same_job(job: Snapshot) -> Document:
    """What finds the job as long as it has the status that was read, whatever a worker notes in its bookkeeping."""
    if isinstance(job.bookkeeping.raw, Mapping):
        return {"_id": job.id, "status": job.status, "worker": {"$type": "object"}}
    return job.unchanged()


def own_fields(job: Snapshot, **own: Any) -> Document:
    """The fields by which an update notes something in the bookkeeping, which may be missing or damaged."""
    if isinstance(job.bookkeeping.raw, Mapping):
        return {f"worker.{name}": value for name, value in own.items()}
    return {"worker": {"owner": None, **own}}


def write_together(
    runtime: Runtime, updates: Mapping[ObjectId, tuple[Document, Document]]
) -> dict[str, list[ObjectId]]:
    """Makes these changes (what finds the job, and its update) in one request, each on its own.

    Returns the jobs that MongoDB doesn't take, by its reason. Raises StoreUnavailable; StoreRefused: it takes none.
    """
    jobs, refused = runtime.database["jobs"], dict[str, list[ObjectId]]()
    try:
        with unknown_when_unreachable():
            if updates:
                jobs.bulk_write([UpdateOne(*update) for update in updates.values()], ordered=False)
    except StoreRefused as refusal:
        if not isinstance(refusal.__cause__, BulkWriteError):
            raise
        for job_id, (same, update) in updates.items():  # what was changed already isn't found any more
            try:
                with unknown_when_unreachable():
                    jobs.update_one(same, update)
            except StoreRefused as own_refusal:
                refused.setdefault(str(own_refusal), []).append(job_id)
    return refused


def carry_out(change: Callable[[], None], report: Callable[[], bool]) -> int:
    """Makes a change, and reports in any case what was done. Returns the exit code.

    Raises ClickException: MongoDB can't be reached.
    """
    try:
        with store_faults_as_sentences():
            change()
    except KeyboardInterrupt:
        report()
        return EXIT_INTERRUPTED
    except click.ClickException:
        report()
        raise
    return 0 if report() else EXIT_FAILED
