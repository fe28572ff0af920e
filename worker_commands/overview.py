"""How jobs, queue and workers stand, and what of it needs a person: what `status` shows."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import TypeVar

from worker import Runtime, Status
from worker_commands.active import Pending, Processing, State, age_s, is_swept, oldest, read_pending, read_processing
from worker_commands.findings import Finding, probe
from worker_commands.fleet import Fleet, ask_fleet, count_alive, sign_of_life
from worker_commands.lives import (
    CLOCKS_DIFFER_BY,
    FIELDS,
    Failure,
    Life,
    Outcome,
    cancelled_since,
    ended_between,
    has_index_of_ends,
    last_life,
)
from worker_commands.terminal import counted, duration_text, printable
from workerkit.attempts import LOST_REASON
from workerkit.errors import Document
from workerkit.mongodb import iterate, read_raw, unknown_when_unreachable

T = TypeVar("T")

LAST_HOUR = timedelta(hours=1)
FAULTS_COUNT_FOR = timedelta(minutes=10)
UNCONFIRMED_AFTER = timedelta(minutes=1)
MAX_ENDED = 10_000  # jobs of the last hour that are read; of more, the newest

# ── what the servers say ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Jobs:
    """What the documents say. `ended` are the lives of the last hour; `is_cut` says that there are more of them."""

    now: datetime
    pending: Mapping[str, Pending]
    processing: Sequence[Processing]
    ended: Sequence[Life]
    is_cut: bool
    unconfirmed: int
    is_swept: bool

    @property
    def pending_count(self) -> int:
        return sum(each.count for each in self.pending.values())

    @property
    def oldest_pending_s(self) -> float:
        return age_s(oldest(self.pending), self.now)

    def in_state(self, state: State) -> list[Processing]:
        return [job for job in self.processing if job.state is state]

    def busy_nodes(self) -> Counter[str]:
        return Counter(job.node for job in self.in_state(State.RUNNING) if job.node)


@dataclass(frozen=True)
class Overview:
    """A part is None where its server can't be asked; the finding beside it says why."""

    queue: str
    jobs: Jobs | None
    mongodb: Finding
    queue_length: int | None
    broker: Finding
    fleet: Fleet | None
    control: Finding


def read_ended(runtime: Runtime, now: datetime) -> tuple[list[Life], bool]:
    """The lives of the last hour, and whether there are more of them than are read. Raises StoreUnavailable."""
    jobs, latest = read_raw(runtime.database["jobs"]), now + CLOCKS_DIFFER_BY
    ended = ended_between(now - LAST_HOUR, latest, has_index=has_index_of_ends(runtime.database["jobs"]))
    # Failures are read for themselves, so that none is missing however many jobs succeed.
    questions: list[Document] = [{**ended, "status": status} for status in (Status.FAILED, Status.COMPLETED)]
    lives: list[Life] = []
    is_cut = False
    for question in [*questions, cancelled_since(now - LAST_HOUR)]:
        found = jobs.find(question, FIELDS).sort("completed_at", -1).limit(MAX_ENDED)
        read = [life for document in iterate(found) if (life := last_life(document, latest))]
        is_cut = is_cut or len(read) == MAX_ENDED
        lives += read
    return lives, is_cut


def read_jobs(runtime: Runtime) -> Jobs:
    """Raises StoreUnavailable."""
    now, jobs = runtime.store.now(), runtime.database["jobs"]
    ended, is_cut = read_ended(runtime, now)
    with unknown_when_unreachable():
        unconfirmed = jobs.count_documents({"worker.unnotified": {"$lte": now - UNCONFIRMED_AFTER}})
    processing = list(read_processing(jobs, now))
    return Jobs(now, read_pending(jobs, now), processing, ended, is_cut, unconfirmed, is_swept(runtime, now))


def asked(what: str, advice: str, read: Callable[[], T], url: str, variable: str) -> tuple[T | None, Finding]:
    """What was read, or None and why it can't be read."""
    answers: list[T] = []

    def look() -> str:
        answers.append(read())
        return ""

    finding = probe(what, advice, look, url, variable)
    return (answers[0] if answers else None), finding


def look_at_servers(runtime: Runtime) -> Overview:
    """Asks MongoDB and the broker at the same time, so that one that hangs delays nothing of the other."""
    settings = runtime.settings
    mongodb_url, broker_url = settings.mongodb_url.get_secret_value(), settings.broker_url
    variable = "CELERY_BROKER_URL" if settings.celery_broker_url else "REDIS_URL"
    with ThreadPoolExecutor(1) as threads:
        advice = "is MONGODB_URL right, with user, password and authSource?"
        reading = threads.submit(asked, "MongoDB", advice, partial(read_jobs, runtime), mongodb_url, "MONGODB_URL")
        asked_for = partial(asked, url=broker_url, variable=variable)
        advice = f"is it running, and is {variable} right?"
        queue_length, broker = asked_for("broker", advice, runtime.broker.queue_length)
        fleet, control = None, broker
        if not broker.is_fault:
            advice = "let the user use Celery's remote control: see docs/production.md"
            fleet, control = asked_for("workers", advice, partial(ask_fleet, runtime))
        jobs, mongodb = reading.result()
    return Overview(settings.celery_queue_name, jobs, mongodb, queue_length, broker, fleet, control)


# ── workers ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Workers:
    """How many are alive: at least so many, where not all could be asked. `slots` is None where nobody told it."""

    alive: int
    is_exact: bool
    slots: int | None
    busy: int
    remark: str = ""


def judge_workers(seen: Overview) -> Workers:
    """Counts the workers by their answers, by the leases of running jobs, and by the search for lost jobs."""
    nodes = seen.jobs.busy_nodes() if seen.jobs else Counter[str]()
    busy = len(seen.jobs.in_state(State.RUNNING)) if seen.jobs else 0
    is_swept = bool(seen.jobs and seen.jobs.is_swept)
    if seen.fleet is None:
        remark = "" if seen.broker.is_fault else f"they can't be asked: {seen.control.seen}"
        return Workers(len(nodes) or int(is_swept), False, None, busy, remark)
    alive, slots = count_alive(seen.fleet.names, nodes), seen.fleet.slots
    if alive == 0 and sign_of_life(seen.fleet, is_swept=is_swept):
        remark = "none answers Celery's remote control, but lost jobs are looked for"
        return Workers(1, False, None, busy, remark)
    silent = alive - len(seen.fleet.names)
    remark = f"{silent} of them can't answer while a job runs" if silent else ""
    return Workers(alive, True, max(slots, busy), busy, remark)


# ── failures ─────────────────────────────────────────────────────────────────────────────────────────────────────

BUSY_ADVICE = "the provider was busy or broke off, each time it was tried"
# What an operator may do about failures that are not called the operator's own, by the class of the error.
ADVICE = {
    "InvalidInput": "the person's input; nothing for you to do",
    "ProviderAway": "is the provider up? `python worker.py check` asks it",
    "RetryJob": BUSY_ADVICE,
    "NotStored": "does the store for files work? `python worker.py check` tries it",
}
# A job that was tried again and again fails by a class that doesn't say why, so its reason counts first.
ADVICE_BY_REASON = (
    ("the limit of", "a faster model, shorter answers, or a higher CELERY_SOFT_TIME_LIMIT"),
    (re.escape(LOST_REASON), "its worker was killed: by whom, or is memory short?"),
    (r"HTTP (429|5\d\d)\b", BUSY_ADVICE),
)


@dataclass
class FailureGroup:
    """Failures of one reason in the last hour. `job_id` is the newest one's."""

    reason: str
    advice: str
    is_operators: bool
    job_id: object
    last_at: datetime
    count: int = 0


def named_reason(failure: Failure) -> tuple[str, str]:
    """The reason, and what to do. An operator's reason has both, with a colon between them."""
    reason = printable(failure.reason or failure.sentence or "no reason is noted").replace("\n", " ")
    if failure.is_operators:
        head, _, tail = reason.partition(": ")
        return head, tail or "see the worker's log"
    by_reason = next((advice for pattern, advice in ADVICE_BY_REASON if re.match(pattern, reason)), "")
    return reason, by_reason or ADVICE.get(failure.error, "")


def group_failures(lives: Iterable[Life]) -> list[FailureGroup]:
    """Failures by reason: the operator's first, then the most frequent."""
    groups: dict[str, FailureGroup] = {}
    for life in lives:
        if life.outcome is Outcome.FAILED:
            reason, advice = named_reason(life.failure)
            new = FailureGroup(reason, advice, life.failure.is_operators, life.job_id, life.ended_at)
            group = groups.setdefault(reason, new)
            group.count += 1
            if life.ended_at > group.last_at:
                group.job_id, group.last_at = life.job_id, life.ended_at
    return sorted(groups.values(), key=lambda group: (not group.is_operators, -group.count, group.reason))


# ── times ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Times:
    """The waits and run times of a type's attempts in the last hour, in seconds."""

    jobs: int = 0
    waits: list[float] = field(default_factory=list)
    runs: list[float] = field(default_factory=list)


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that so large a share of the values doesn't exceed; None if there are no values."""
    if not values:
        return None
    return sorted(values)[math.ceil(share * len(values)) - 1]


def times_by_type(lives: Iterable[Life]) -> dict[str, Times]:
    """The types with the most jobs come first."""
    by_type: dict[str, Times] = {}
    for life in lives:
        if life.outcome is not Outcome.CANCELLED:
            times = by_type.setdefault(life.job_type, Times())
            times.jobs += 1
            times.waits += [each.waited_s for each in life.attempts if each.waited_s is not None]
            times.runs += [each.ran_s for each in life.attempts if each.ran_s is not None]
    return dict(sorted(by_type.items(), key=lambda item: (-item[1].jobs, item[0])))


# ── what needs a person ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Need:
    """Something that needs a person. `kind` is for programs."""

    kind: str
    what: str
    advice: str


def as_sentence(words: str) -> str:
    end = "" if words.endswith((".", "?")) else "."
    return f"{words[:1].upper()}{words[1:]}{end}" if words else ""


def what_to_do(finding: Finding) -> str:
    start = f" Start it: `{finding.start}`." if finding.start else ""
    return f"{as_sentence(finding.advice)}{start}"


def needs_of_servers(seen: Overview) -> Iterator[Need]:
    if seen.mongodb.is_fault:
        what = f"MongoDB can't be reached or read: {seen.mongodb.seen}."
        yield Need("mongodb", what, what_to_do(seen.mongodb))
    if seen.broker.is_fault:
        what = f"The broker can't be reached or used: {seen.broker.seen}."
        yield Need("broker", what, what_to_do(seen.broker))


def need_of_workers(seen: Overview, workers: Workers) -> Iterator[Need]:
    if workers.alive or (seen.fleet is None and seen.jobs is None):  # then nothing is known of workers
        return
    if seen.fleet is None:
        yield Need("no_worker", "There is no sign of a worker.", f"They can't be asked: {seen.control.seen}")
    elif seen.fleet.others:
        what = f"No worker takes jobs from the queue {seen.queue}."
        others = counted(seen.fleet.others, "worker")
        advice = f"Of other queues {others} answered: is CELERY_QUEUE_NAME the same everywhere?"
        yield Need("no_worker", what, advice)
    else:
        what = f"No worker answers, so no job of the queue {seen.queue} is worked on."
        yield Need("no_worker", what, "Start one: `python worker.py`. If it ended by itself, its log says why.")


def advice_for_waiting(jobs: Jobs, workers: Workers) -> str:
    if not workers.alive:
        return "It waits for a worker."
    if workers.slots is not None and workers.busy >= workers.slots:
        return "All slots are busy: start more workers, or raise WORKER_CONCURRENCY."
    if jobs.in_state(State.WAITING):
        return "Jobs wait for their next try, so look at the provider first: `python worker.py check`."
    return "Slots are free: is its message lost, or in another queue? `python worker.py recover` finds lost ones."


def need_of_pending(seen: Overview, workers: Workers, pending_over: timedelta) -> Iterator[Need]:
    jobs, limit_s = seen.jobs, pending_over.total_seconds()
    if jobs and jobs.oldest_pending_s > limit_s:
        what = f"A job has been pending for {duration_text(jobs.oldest_pending_s)}, over {duration_text(limit_s)}."
        yield Need("pending", what, advice_for_waiting(jobs, workers))


def operator_faults(jobs: Jobs) -> Iterator[tuple[Failure, object]]:
    """What only the operator can change, of jobs that failed or will be tried again, and one job's id each time."""
    since = jobs.now - FAULTS_COUNT_FOR
    for life in jobs.ended:
        if life.failure.is_operators and life.ended_at >= since:
            yield life.failure, life.job_id
    for job in jobs.processing:
        for record in job.attempts[-1:]:
            if record.is_operators and record.ended_at and record.ended_at >= since:
                yield Failure(record.reason or "", is_operators=True), job.job_id


def needs_of_faults(jobs: Jobs | None) -> Iterator[Need]:
    """One for each reason: the operator has to do something else for each."""
    found: dict[str, list[tuple[str, object]]] = {}
    for failure, job_id in operator_faults(jobs) if jobs else ():
        reason, advice = named_reason(failure)
        found.setdefault(reason, []).append((advice, job_id))
    for reason, faults in found.items():
        advice, job_id = faults[0]
        often = f"{counted(len(faults), 'job')} in the last {duration_text(FAULTS_COUNT_FOR.total_seconds())}"
        yield Need("operators_fault", f"{reason} ({often}, such as {job_id})", as_sentence(advice))


def find_needs(seen: Overview, workers: Workers, pending_over: timedelta) -> list[Need]:
    """What needs a person, the most urgent first."""
    return [
        *needs_of_servers(seen),
        *need_of_workers(seen, workers),
        *needs_of_faults(seen.jobs),
        *need_of_pending(seen, workers, pending_over),
    ]
