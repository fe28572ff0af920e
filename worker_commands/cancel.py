"""`python worker.py cancel`: fails jobs that haven't ended, as the API does, and tells the persons.

The document is all that is changed. Its owner and its lease stay, since a failed job with a live lease is what running
workers look for (`JobStore.find_cancelled`): the attempt stops, in every pool, and writes nothing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Hashable, Sequence
from datetime import datetime

import click
from bson import ObjectId

from worker import NOTICE, TERMINAL_STATUSES, Runtime, Status, configure
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
from worker_commands.job_facts import text_of
from worker_commands.selection import (
    JOB_ID,
    Selection,
    find_jobs,
    read_jobs,
    selection_options,
    store_faults_as_sentences,
)
from worker_commands.terminal import EXIT_FAILED, counted, say
from workerkit.bookkeeping import Snapshot, owner_of
from workerkit.errors import Document, StoreRefused
from workerkit.sentences import STOPPED
from workerkit.settings import load_settings

ODD_ID = "its id is a document"
TOLD_LATER = "A running worker tells the persons within a minute, once Redis is there."


# ── which jobs ───────────────────────────────────────────────────────────────────────────────────────────────────


def add_to(plan: Plan, job: Snapshot) -> None:
    if not isinstance(job.id, Hashable):
        plan.left.add(ODD_ID, [job.id])
        return
    plan.add(job.id, text_of(job.document, "status"), text_of(job.document, "job_type"))


def plan_selected(runtime: Runtime, selection: Selection) -> Plan:
    """The selected jobs. Raises StoreUnavailable."""
    plan = Plan()
    for job in find_jobs(runtime, selection.query(runtime.store.now())):
        add_to(plan, job)
        if plan.is_full:
            break
    return plan


def plan_named(runtime: Runtime, job_ids: Sequence[ObjectId]) -> Plan:
    """Those of these jobs that haven't ended. Raises StoreUnavailable."""
    plan, jobs = Plan(), read_jobs(runtime, job_ids)
    plan.left.add(UNKNOWN, ids_missing(job_ids, jobs))
    for job in jobs:
        if job.status in ACTIVE:
            add_to(plan, job)
        else:
            ended = "it has ended already" if job.status in TERMINAL_STATUSES else "it is"
            plan.left.add(f"{ended} ({text_of(job.document, 'status') or 'in no status'})", [job.id])
    return plan


# ── cancelling them ──────────────────────────────────────────────────────────────────────────────────────────────


class Cancel(Change):
    """Cancels jobs in batches: documents first, then the notices. A sweep publishes those that Redis doesn't take.

    An attempt's own end and this one exclude each other, since both are writes that ask for the status.
    """

    def __init__(self, runtime: Runtime, statuses: Sequence[str] = ACTIVE) -> None:
        super().__init__(runtime)
        self._statuses, self.cancelled = list(statuses), 0

    def cancel(self, job_ids: Sequence[ObjectId], progress: Progress) -> None:
        """Cancels those of these jobs that still have one of the statuses. Raises StoreUnavailable."""
        for jobs in self._batches(job_ids, progress, {"$in": self._statuses}):
            ended = self._fail(jobs)
            self.cancelled, self.in_doubt = self.cancelled + len(ended), 0
            published = [document for document in ended if self._publisher.publish(document, Status.FAILED, STOPPED)]
            if published:  # else Redis is away, and each try would wait for it once more
                self._runtime.notes.forget_cancelled(self._runtime.turns.queues())
            self._runtime.store.mark_notified([(document["_id"], owner_of(document)) for document in published])

    def _fail(self, jobs: Sequence[Snapshot]) -> list[Document]:
        """Fails these jobs, and returns those that this call has failed, as their notices need them."""
        now = self._runtime.store.now()
        refused = write_together(self._runtime, {job.id: (same_job(job), self._update(job, now)) for job in jobs})
        own = {"status": Status.FAILED.value, "worker.cancelled_by": self._token}
        found = find_jobs(self._runtime, {"_id": {"$in": [job.id for job in jobs]}, **own}, fields=NOTICE)
        ended = {job.id: dict(job.document) for job in found}
        for job in jobs:
            if why := next((why for why, job_ids in refused.items() if job.id in job_ids), ""):
                ended |= self._fail_by_force(job, why)
            elif job.id not in ended:
                self.left.add(CHANGED, [job.id])
        return list(ended.values())

    def _update(self, job: Snapshot, now: datetime) -> Document:
        """What ends the job, and puts its notice into the outbox. A pending job has no owner, or a former life's."""
        former = {"owner": None} if job.status == Status.PENDING else {}
        own = own_fields(job, unnotified=now, message=STOPPED, cancelled_by=self._token, **former)
        times = {"updated_at": now, "completed_at": now}
        return {"$set": {"status": Status.FAILED.value, "error_message": STOPPED, **times, **own}}

    def _fail_by_force(self, job: Snapshot, why: str) -> dict[ObjectId, Document]:
        """Fails a job in whose document there is no room for more, with less in its bookkeeping."""
        try:
            failed = self._runtime.store.fail_seen(job, STOPPED)
        except StoreRefused:
            self.left.add(why, [job.id])
            return {}
        self.left.add(CHANGED, [] if failed else [job.id])
        return {job.id: failed} if failed else {}


def report(cancel: Cancel, plan: Plan) -> bool:
    """Prints what was done. Returns whether it was done to each job."""
    print(f"{counted(cancel.cancelled, 'job')} cancelled.", *cancel.left.lines(), sep="\n", flush=True)
    if cancel.in_doubt:
        say(f"Of the last {cancel.in_doubt} it isn't known whether they were cancelled. {TOLD_LATER}")
    cancel.say_untried(plan)
    if cancel.unpublished:
        say(f"Redis can't be reached: {counted(cancel.unpublished, 'job')} ended without a notice. {TOLD_LATER}")
    return cancel.cancelled == len(plan.job_ids)


def cancel_jobs(runtime: Runtime, plan: Plan, statuses: Sequence[str], is_yes: bool) -> int:
    """Shows the plan, asks, and carries it out. Returns the exit code."""
    plan.show(("status", "type"), "can be cancelled")
    if not plan.job_ids:
        return 0
    if not is_agreed(f"Cancel {counted(len(plan.job_ids), 'job')}?", is_yes):
        return EXIT_FAILED
    cancel = Cancel(runtime, statuses)
    return carry_out(lambda: cancel.cancel(plan.job_ids, Progress(len(plan.job_ids))), lambda: report(cancel, plan))


@click.command("cancel", short_help="Cancel jobs that haven't ended.")
@click.argument("job_ids", metavar="[JOB]...", nargs=-1, type=JOB_ID)
@click.option("--pending", "is_pending", is_flag=True, help="jobs that no worker has begun")
@selection_options("user", "type")
@click.option("--yes", "is_yes", is_flag=True, help="don't ask")
def command(job_ids: Sequence[ObjectId], is_pending: bool, user: str, job_type: str, is_yes: bool) -> None:
    """Cancel jobs that haven't ended: these JOBs, those of a --user, or all that are --pending.

    It first shows how many jobs of which kinds. A running one stops within two seconds, and the person is told.
    """
    is_selection = is_pending or bool(user)
    if bool(job_ids) == is_selection or (job_ids and job_type):
        raise click.UsageError("Name the JOBs, or select jobs by --user ID or --pending (and --type).")
    statuses = ACTIVE[:1] if is_pending else ACTIVE
    with contextlib.closing(configure(load_settings())) as runtime:
        with store_faults_as_sentences():
            selection = Selection(statuses, user, job_type)
            plan = plan_selected(runtime, selection) if is_selection else plan_named(runtime, job_ids)
        code = cancel_jobs(runtime, plan, statuses, is_yes)
    sys.exit(code or (EXIT_FAILED if job_ids and plan.left.counts else 0))
