"""`python worker.py retry`: sets failed jobs back to `pending` and sends their messages again, as the API does.

The API lets a session have one job that is pending or processing. MongoDB is asked for such jobs before a document is
changed and, a moment later, after it: the API may have looked before the change and inserted a job behind it. Then the
document is set back. So an API that inserts within that moment meets no second job.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, cast

import click
from bson import ObjectId

from worker import Runtime, Status, configure
from worker_commands.changes import (
    ACTIVE,
    CHANGED,
    UNKNOWN,
    Change,
    Plan,
    Progress,
    carry_out,
    ids_missing,
    is_agreed,
    own_fields,
    same_job,
    write_together,
)
from worker_commands.findings import describe
from worker_commands.job_facts import cancelled_by, created_at, ended_when, reason_of, text_of
from worker_commands.selection import (
    JOB_ID,
    Selection,
    find_jobs,
    in_batches,
    read_jobs,
    select_jobs,
    selection_options,
    store_faults_as_sentences,
)
from worker_commands.terminal import EXIT_FAILED, counted, say
from workerkit.bookkeeping import Snapshot
from workerkit.errors import Document
from workerkit.sentences import RETRIED
from workerkit.settings import load_settings

CANCELLED = "an operator or the API ended it (`show` has the sentence); only its id or --reason WORDS select it"
OLDER = "a younger job of the same session is tried again instead"
BUSY = "its session has another job that hasn't ended"
UNDONE = "its session got another job meanwhile"
ODD = "its user or session isn't a text, so it can't be told whether the session has another job"
LATER = "A running worker sends such messages within two minutes or so, once the broker is there."
STOPPING = "it was cancelled a moment ago, and its attempt may still run: call it again in a few seconds"
STOPPING_S = 3.0  # from a cancel until no attempt runs any more
LIMITS = ("time_limit", "soft_time_limit")  # of the former message
READ_BATCH = 500
Session = tuple[str, str | None]


# ── which jobs ───────────────────────────────────────────────────────────────────────────────────────────────────


def session_of(job: Snapshot) -> Session | None:
    """The person and the session; None if these can't be looked for, since they aren't proper texts."""
    user, session = (job.document.get(name) for name in ("user_id", "session_id"))
    texts = [user] if session is None else [user, session]
    if all(type(text) is str and "\ufffd" not in text for text in texts):  # BSON's code is a kind of text, too
        return cast(str, user), session
    return None


def active_jobs(runtime: Runtime, jobs: Iterable[Snapshot]) -> list[tuple[Session | None, ObjectId]]:
    """The jobs that haven't ended of the sessions of these jobs: session and id of each. Raises StoreUnavailable."""
    asked = [session for job in jobs if (session := session_of(job))]
    users, sessions = {user for user, _ in asked}, {session for _, session in asked}
    # Other sessions may be among them, of other persons. Without the second condition it would be all of a person's.
    query = {"status": {"$in": list(ACTIVE)}, "user_id": {"$in": list(users)}, "session_id": {"$in": list(sessions)}}
    found = find_jobs(runtime, query, fields={"user_id": 1, "session_id": 1}) if asked else ()
    return [(session_of(job), job.id) for job in found]


def is_stopping(job: Snapshot, now: datetime) -> bool:
    """Whether an attempt may still run at a job that was cancelled, and would mix its text with the next attempt's."""
    lease_until, ended_at = job.bookkeeping.lease_until, ended_when(job)
    has_lease = lease_until is not None and lease_until > now
    return has_lease and (ended_at is None or now - ended_at < timedelta(seconds=STOPPING_S))


def choose(runtime: Runtime, jobs: Sequence[Snapshot], seen: set[Session], plan: Plan) -> None:
    """Adds to the plan what may be retried of these failed jobs, the youngest of which come first."""
    fresh, now = list[Snapshot](), runtime.store.now()
    for job in jobs:
        session = session_of(job)
        if session is None or session in seen:
            plan.left.add(OLDER if session else ODD, [job.id])
            continue
        seen.add(session)
        if is_stopping(job, now):
            plan.left.add(STOPPING, [job.id])
        else:
            fresh.append(job)
    busy = {session for session, _ in active_jobs(runtime, fresh)}
    for job in fresh:
        if session_of(job) in busy:
            plan.left.add(BUSY, [job.id])
        else:
            plan.add(job.id, text_of(job.document, "job_type"), reason_of(job))


def plan_selected(runtime: Runtime, selection: Selection) -> Plan:
    """Which of the selected jobs may be retried: no cancelled ones, unless their words were asked for.

    A person who has cancelled a job doesn't wait for it. Raises StoreUnavailable.
    """
    plan, seen = Plan(), set[Session]()

    def is_wanted(job: Snapshot) -> bool:
        is_left = not selection.reason and bool(cancelled_by(job))
        plan.left.add(CANCELLED, [job.id] if is_left else [])
        return not is_left

    for batch in in_batches(filter(is_wanted, select_jobs(runtime, selection)), READ_BATCH):
        choose(runtime, batch, seen, plan)
        if plan.is_full:
            break
    plan.job_ids.reverse()  # so that the oldest are the first in the queue
    return plan


def plan_named(runtime: Runtime, job_ids: Sequence[ObjectId]) -> Plan:
    """Which of these jobs may be retried. Raises StoreUnavailable."""
    plan, jobs = Plan(), read_jobs(runtime, job_ids)
    plan.left.add(UNKNOWN, ids_missing(job_ids, jobs))
    for job in jobs:
        if job.status != Status.FAILED:
            plan.left.add(f"it hasn't failed, but is {text_of(job.document, 'status') or 'in no status'}", [job.id])
    failed = [job for job in jobs if job.status == Status.FAILED]
    choose(runtime, sorted(failed, key=lambda job: (str(created_at(job)), job.id), reverse=True), set(), plan)
    plan.job_ids.reverse()
    return plan


# ── retrying them ────────────────────────────────────────────────────────────────────────────────────────────────


class Retry(Change):
    """Retries jobs in batches: documents first, then the notices, then the messages, until the broker refuses one.

    The token stays until a worker claims the job. So of two calls only one sends a message, and nothing is set back
    that somebody else has changed since.
    """

    pause_s = 0.2  # an API that saw no other job before a change has inserted its own by then
    wait = staticmethod(time.sleep)

    def __init__(self, runtime: Runtime, *, has_new_limits: bool = False) -> None:
        super().__init__(runtime)
        self._replaced = {"root_id": None, **(dict.fromkeys(LIMITS) if has_new_limits else {})}
        self._pending = {"status": Status.PENDING.value, "worker.retried_by": self._token}
        self.retried = self.unsent = 0

    def retry(self, job_ids: Sequence[ObjectId], progress: Progress) -> None:
        """Retries these jobs, until the broker doesn't take a message. Raises StoreUnavailable."""
        for failed in self._batches(job_ids, progress, Status.FAILED.value):
            changed = self._set_pending(self._without_busy(failed, BUSY))
            self.in_doubt = 0
            if changed:
                self.wait(self.pause_s)
            jobs = self._without_busy(changed, UNDONE)
            staying = {job.id for job in jobs}
            self._set_back([job for job in changed if job.id not in staying])
            for job in jobs:  # before a worker says that it has begun
                self._publisher.publish(job.document, Status.PENDING, RETRIED)
            self._send(jobs)

    def _without_busy(self, jobs: Sequence[Snapshot], why: str) -> list[Snapshot]:
        """Those of these jobs, each of another session, whose session has no other job that hasn't ended."""
        own = {job.id for job in jobs}
        busy = {session for session, job_id in active_jobs(self._runtime, jobs) if job_id not in own}
        self.left.add(why, [job.id for job in jobs if session_of(job) in busy])
        return [job for job in jobs if session_of(job) not in busy]

    def _set_pending(self, jobs: Sequence[Snapshot]) -> list[Snapshot]:
        """Sets failed jobs to pending, and returns those that this call has changed."""
        now = self._runtime.store.now()
        refused = write_together(self._runtime, {job.id: (same_end(job), self._update(job, now)) for job in jobs})
        for why, job_ids in refused.items():
            self.left.add(why, job_ids)
        changed = {job.id for job in read_jobs(self._runtime, [job.id for job in jobs], **self._pending)}
        seen = changed.union(*refused.values())
        self.left.add(CHANGED, [job.id for job in jobs if job.id not in seen])
        self.retried += len(changed)
        self.unsent += len(changed)
        return [job for job in jobs if job.id in changed]

    def _update(self, job: Snapshot, now: datetime) -> Document:
        """What the API writes to have a job tried again, and what the person is told."""
        own = own_fields(job, message=RETRIED, retried_by=self._token)
        return {"$set": {"status": Status.PENDING.value, "updated_at": now, **own}}

    def _set_back(self, jobs: Sequence[Snapshot]) -> None:
        write_together(self._runtime, {job.id: ({"_id": job.id, **self._pending}, former(job)) for job in jobs})
        self.retried -= len(jobs)
        self.unsent -= len(jobs)

    def _send(self, jobs: Sequence[Snapshot]) -> None:
        """Sends a message for each job, with the limits and the priority of its former one, into the same queue."""
        broker, queues = self._runtime.broker, self._runtime.turns.queues()
        try:
            with broker.connection() if jobs else contextlib.nullcontext() as connection:
                for job in jobs:
                    # A revoke of the former task would end the new life, too, if the new task were of its family.
                    options = {**job.bookkeeping.message_options(), **self._replaced}
                    queue = job.bookkeeping.queue if job.bookkeeping.queue in queues else None
                    broker.send(job.id, queue, connection, **options)
                    self.unsent -= 1
        except broker.errors as error:
            self.fault = describe(cast(Exception, error), "", self._runtime.settings.broker_url, "")[0]


def same_end(job: Snapshot) -> Document:
    """What finds the job as long as it has the end that was read."""
    ended_at = job.document.get("completed_at")
    return {**same_job(job), **({"completed_at": ended_at} if isinstance(ended_at, (datetime, type(None))) else {})}


def former(job: Snapshot) -> Document:
    """The update that sets a job back to what it was before this call."""
    document, own = job.document, job.bookkeeping.raw
    before = {"updated_at": (document, "updated_at")}
    if isinstance(own, Mapping):
        before |= {f"worker.{name}": (own, name) for name in ("message", "retried_by")}
    else:
        before |= {"worker": (document, "worker")}
    kept = {path: fields[name] for path, (fields, name) in before.items() if name in fields}
    absent = {path: "" for path in before if path not in kept}
    return {"$set": {"status": Status.FAILED.value, **kept}, **({"$unset": absent} if absent else {})}


def report(retry: Retry, plan: Plan) -> bool:
    """Prints what was done. Returns whether it was done to each job."""
    print(f"{counted(retry.retried, 'job')} put back into the queue.", *retry.left.lines(), sep="\n", flush=True)
    if retry.unsent:
        reason = f" ({retry.fault})" if retry.fault else ""
        say(f"{counted(retry.unsent, 'job')} of these without a message{reason}: pending. {LATER}")
    if retry.in_doubt:
        say(f"Of the last {retry.in_doubt} it isn't known whether they were put back. If so, they are pending. {LATER}")
    retry.say_untried(plan)
    if retry.unpublished:
        say(f"Redis can't be reached: {counted(retry.unpublished, 'job')} go on without a notice, until they begin.")
    return retry.retried == len(plan.job_ids) and not retry.unsent


def retry_jobs(runtime: Runtime, plan: Plan, *, is_yes: bool, has_new_limits: bool = False) -> int:
    """Shows the plan, asks, and carries it out. Returns the exit code."""
    plan.show(("type", "reason"), "can be tried again")
    if not plan.job_ids:
        return 0
    if not is_agreed(f"Try {counted(len(plan.job_ids), 'job')} again?", is_yes):
        return EXIT_FAILED
    retry = Retry(runtime, has_new_limits=has_new_limits)
    return carry_out(lambda: retry.retry(plan.job_ids, Progress(len(plan.job_ids))), lambda: report(retry, plan))


@click.command("retry", short_help="Try failed jobs again.")
@click.argument("job_ids", metavar="[JOB]...", nargs=-1, type=JOB_ID)
@click.option("--failed", "is_failed", is_flag=True, help="all that failed within --since TIME, but weren't cancelled")
@selection_options("since", "reason", "user", "type")
@click.option(
    "--new-limits",
    "has_new_limits",
    is_flag=True,
    help="with the workers' own limits of time, not those of their former messages",
)
@click.option("--yes", "is_yes", is_flag=True, help="don't ask")
def command(
    job_ids: Sequence[ObjectId], is_failed: bool, has_new_limits: bool, is_yes: bool, **conditions: Any
) -> None:
    """Try failed jobs again: these JOBs, or all that failed lately, with all their tries and their time.

    It first shows how many jobs of which kinds. Of a session that has several, only the youngest is tried again, and
    none while the session has a job that hasn't ended, since the API allows one.
    """
    selection = Selection((Status.FAILED.value,), **conditions)
    if bool(job_ids) == is_failed or (job_ids and selection != Selection(selection.statuses)):
        raise click.UsageError("Name the JOBs, or select jobs by --failed --since TIME (and --reason, --user, --type).")
    if is_failed and not selection.since:
        raise click.UsageError("--failed needs --since, for example --since 1h.")
    with contextlib.closing(configure(load_settings())) as runtime:
        with store_faults_as_sentences():
            plan = plan_selected(runtime, selection) if is_failed else plan_named(runtime, job_ids)
        code = retry_jobs(runtime, plan, is_yes=is_yes, has_new_limits=has_new_limits)
    sys.exit(code or (EXIT_FAILED if job_ids and plan.left.counts else 0))
