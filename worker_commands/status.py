"""`python worker.py status`: jobs by status, the queue, what is stuck, and the last errors."""

from __future__ import annotations

import contextlib
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from worker import Runtime, Status, configure
from worker_commands.findings import probe
from worker_commands.terminal import EXIT_FAILED, print_rows, printable, say
from workerkit.errors import Document, StoreUnavailable
from workerkit.mongodb import unknown_when_unreachable
from workerkit.settings import load_settings

ERRORS_SHOWN = 5


def overview(runtime: Runtime) -> Document:
    """Counts by status, the oldest pending job, expired leases, and the last errors. Raises StoreUnavailable."""
    jobs = runtime.database["jobs"]
    with unknown_when_unreachable():
        expired = {"worker.owner": {"$ne": None}, "worker.lease_until": {"$lte": runtime.store.now()}}
        oldest = jobs.find_one({"status": Status.PENDING}, {"created_at": 1}, sort=[("created_at", 1)])
        errors = jobs.find({"status": Status.FAILED}, {"error_message": 1, "completed_at": 1, "job_type": 1})
        return {
            "counts": {status.value: jobs.count_documents({"status": status}) for status in Status},
            "oldest_pending": (oldest or {}).get("created_at"),
            "expired_leases": jobs.count_documents({"status": Status.PROCESSING, **expired}),
            "unnotified": jobs.count_documents({"worker.unnotified": {"$exists": True}}),
            "last_errors": list(errors.sort("completed_at", -1).limit(ERRORS_SHOWN)),
        }


def age_text(at: datetime | None) -> str:
    if at is None:
        return "-"
    return f"{timedelta(seconds=int((datetime.now(UTC) - at.replace(tzinfo=UTC)).total_seconds()))} ago"


def queue_text(runtime: Runtime) -> str:
    found = probe("queue", "", lambda: str(runtime.broker.queue_length()))
    return f"unknown: the broker can't be reached ({found.seen})" if found.is_fault else found.seen


def count_rows(runtime: Runtime, seen: Document) -> list[tuple[str, str]]:
    return [
        *((name, str(count)) for name, count in seen["counts"].items()),
        ("oldest pending", age_text(seen["oldest_pending"])),
        ("expired leases", f"{seen['expired_leases']} (a running worker takes them up within seconds)"),
        ("notices not confirmed", str(seen["unnotified"])),
        (f"waiting in {runtime.settings.celery_queue_name}", queue_text(runtime)),
    ]


def error_rows(jobs: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The last jobs that failed."""
    return [
        (
            age_text(job.get("completed_at")),
            str(job["_id"]),
            printable(str(job.get("job_type"))[:30]),
            printable(str(job.get("error_message"))[:200]),
        )
        for job in jobs
    ]


def status(runtime: Runtime) -> int:
    """Prints how jobs and queue stand; returns 1 if MongoDB can't be reached."""
    try:
        seen = overview(runtime)
    except StoreUnavailable as error:
        say(f"MongoDB can't be reached ({error}); try `python worker.py check`")
        return EXIT_FAILED
    print_rows(("jobs", ""), count_rows(runtime, seen))
    print_rows(("when", "job", "type", "last errors"), error_rows(seen["last_errors"]))
    return 0


@click.command("status", short_help="Show jobs, the queue and the last errors.")
def command() -> None:
    """Show jobs by status, the queue, what is stuck, and the last errors."""
    with contextlib.closing(configure(load_settings())) as runtime:
        sys.exit(status(runtime))
