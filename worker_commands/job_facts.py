"""What a job's document says about its life, for operators: never its input or its text, however odd it is."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from bson import ObjectId

from worker import FIGURES, TERMINAL_STATUSES, Status
from worker_commands.terminal import printable
from workerkit.bookkeeping import Snapshot
from workerkit.errors import Document
from workerkit.sentences import STOPPED, final_sentence
from workerkit.values import MAX_TEXT_CHARACTERS, as_mapping, as_number, as_seconds, as_time

# What is read of a job. Its input and its text may be large, and so may be the URL of a file that it holds itself.
FIELDS: Document = dict.fromkeys(("user_id", "session_id", "job_type", "status", "error_message", "worker"), 1)
FIELDS |= dict.fromkeys(("created_at", "started_at", "completed_at", "updated_at"), 1)
ALL_FIELDS: Document = {**FIELDS, "artifact_url": 1, **{f"output_data.{name}": 1 for name in (*FIGURES, "format")}}
MAX_SHOWN_CHARACTERS = 500
COMMANDS = {Status.FAILED: "retry", Status.PENDING: "cancel", Status.PROCESSING: "cancel"}


# ── single values ────────────────────────────────────────────────────────────────────────────────────────────────


def on_one_line(text: str) -> str:
    """A text out of a document as it may be shown: on one line, without control characters, and not without end."""
    line = " ".join(printable(text[: MAX_SHOWN_CHARACTERS + 1]).split())
    return line if len(line) <= MAX_SHOWN_CHARACTERS else f"{line[:MAX_SHOWN_CHARACTERS]}…"


def text_of(document: Mapping[str, Any], name: str) -> str:
    """A field's text as it may be shown; empty if it is none."""
    value = document.get(name)
    return on_one_line(value) if isinstance(value, str) else ""


def without_missing(facts: Document) -> Document:
    return {name: fact for name, fact in facts.items() if fact is not None and fact not in ("", [], {})}


# ── the life ─────────────────────────────────────────────────────────────────────────────────────────────────────


def attempts_of(job: Snapshot) -> list[Document]:
    """The attempts of the job's present life that have ended, the oldest first. What is unknown is left out."""
    if job.status == Status.PENDING:  # those are its former life's
        return []
    records = [record.document() for record in job.bookkeeping.attempts]
    return [{name: on_one_line(v) if isinstance(v, str) else v for name, v in record.items()} for record in records]


def cancelled_by(job: Snapshot) -> str:
    """Who has cancelled the job: `operator`, `api`, or nobody.

    The API writes no time of an end, but that of a former life may still be there. A worker or an operator notes the
    sentence twice, and an operator may have used Celery's `revoke`, which leaves nothing else.
    """
    if job.status != Status.FAILED:
        return ""
    own, sentence = job.bookkeeping, final_sentence(job.document)[:MAX_TEXT_CHARACTERS]
    if job.document.get("completed_at") is None or own.message not in (None, sentence):
        return "api"
    return "operator" if sentence == STOPPED or "cancelled_by" in as_mapping(own.raw) else ""


def deciding_attempt(job: Snapshot) -> Document:
    """The attempt because of which the job has failed or waits for the next one; empty if there is none."""
    has_failed = job.status == Status.FAILED and not cancelled_by(job)
    is_waiting = job.status == Status.PROCESSING and not job.bookkeeping.owner
    return (attempts_of(job) or [{}])[-1] if has_failed or is_waiting else {}


def sentence_of(job: Snapshot) -> str:
    """What the person has read last. Of a failed job it is the document's own, since the API may have cancelled it."""
    if job.status == Status.FAILED:
        return text_of(job.document, "error_message")
    return text_of(as_mapping(job.bookkeeping.raw), "message")


def reason_of(job: Snapshot) -> str:
    """Why the job has failed or is to be tried again, as the operator has to know it; else what the person has read."""
    return str(deciding_attempt(job).get("reason") or sentence_of(job))


def error_of(job: Snapshot) -> str:
    """The class of the error behind that reason."""
    return str(deciding_attempt(job).get("error", ""))


def former_lives(job: Snapshot) -> list[Document]:
    """How the job's former lives ended, the oldest first. The last one of a job that was put back is in its fields."""
    was_put_back = job.status == Status.PENDING and job.bookkeeping.has_past
    lives = [*job.bookkeeping.past, *([job.life()] if was_put_back else [])]
    return [without_missing({**life, "reason": on_one_line(life.get("reason") or "")}) for life in lives]


def created_at(job: Snapshot) -> datetime | None:
    """When the job was made, by its document or else by its id."""
    by_id = job.id.generation_time if isinstance(job.id, ObjectId) else None
    return as_time(job.document.get("created_at")) or by_id


def age_of(job: Snapshot, now: datetime) -> timedelta | None:
    made_at = created_at(job)
    return now - made_at if made_at else None


def ended_when(job: Snapshot) -> datetime | None:
    """When the job ended. If the API cancelled it, that is the last change of its document."""
    if job.status not in TERMINAL_STATUSES:
        return None
    by_worker = None if cancelled_by(job) == "api" else as_time(job.document.get("completed_at"))
    return by_worker or as_time(job.document.get("updated_at"))


def times_of(job: Snapshot) -> Document:
    """The times of the present life. One that hasn't begun has the former one's start in its document."""
    started_at = None if job.status == Status.PENDING else as_time(job.document.get("started_at"))
    updated_at = as_time(job.document.get("updated_at"))
    return {
        "created_at": created_at(job),
        "started_at": started_at,
        "ended_at": ended_when(job),
        "updated_at": updated_at,
    }


def attempt_now(job: Snapshot, now: datetime) -> Document:
    """Where the present attempt runs, and whether its lease is alive; or when the next one may begin."""
    own = job.bookkeeping
    if job.status != Status.PROCESSING:
        return {}
    if not own.owner:
        return {"next_try_at": own.available_at}
    hard_s = own.limits[0] if own.limits else None
    began_at = own.deadline - timedelta(seconds=hard_s) if own.deadline and hard_s else None
    return {
        "node": on_one_line(own.node or ""),
        "pid": own.pid,
        "lease_until": own.lease_until,
        "is_alive": bool(own.lease_until and own.lease_until > now),
        "running_s": max(0.0, (now - began_at).total_seconds()) if began_at else None,
    }


def file_of(job: Snapshot) -> str:
    """The URL of the file; of one that holds the file itself, how long it is."""
    url = job.document.get("artifact_url")
    if isinstance(url, str) and url.startswith("data:"):
        return f"{on_one_line(url.partition(',')[0])},… ({len(url)} characters)"
    return text_of(job.document, "artifact_url")


def result_of(job: Snapshot) -> Document:
    """What the present result took and is: that of a job that has ended, since it may be a former life's before."""
    output = as_mapping(job.document.get("output_data"))
    if job.status != Status.COMPLETED:
        return {}
    return {
        "model": text_of(output, "model_used"),
        "tokens": as_number(output.get("tokens_used")),
        "prompt_tokens": as_number(output.get("prompt_tokens")),
        "completion_tokens": as_number(output.get("completion_tokens")),
        "resolution": text_of(output, "resolution"),
        "duration_seconds": as_seconds(output.get("duration_seconds")),
        "format": text_of(output, "format"),
        "file": file_of(job),
    }


def summary_of(job: Snapshot, now: datetime) -> Document:
    """What `jobs` says about a job, and `show` at first. What is unknown is left out."""
    age = age_of(job, now)
    return without_missing(
        {
            "id": on_one_line(str(job.id)),
            "type": text_of(job.document, "job_type"),
            "status": job.status and on_one_line(job.status),
            "user_id": text_of(job.document, "user_id"),
            "session_id": text_of(job.document, "session_id"),
            "age_s": round(age.total_seconds(), 3) if age else None,
            "attempt": job.bookkeeping.attempt if job.status != Status.PENDING else None,
            "sentence": sentence_of(job),
            "error": error_of(job),
            "reason": reason_of(job),
            "is_operators": deciding_attempt(job).get("is_operators"),
            **times_of(job),
        }
    )


def facts_of(job: Snapshot, now: datetime, max_attempts: int) -> Document:
    """What `show` says about a job. What is unknown is left out."""
    own, attempts = job.bookkeeping, attempts_of(job)
    last = attempts[-1] if attempts and job.status in TERMINAL_STATUSES else {}
    hard_s, soft_s = own.limits or (None, None)
    return without_missing(
        {
            **summary_of(job, now),
            "max_attempts": max_attempts,
            "cancelled_by": cancelled_by(job),
            "attempts": attempts,
            **attempt_now(job, now),
            "provider": last.get("provider"),
            "model": last.get("model"),
            **without_missing(result_of(job)),
            "queue": on_one_line(own.queue or ""),
            "task_id": on_one_line(own.task_id or ""),
            "soft_limit_s": soft_s,
            "hard_limit_s": hard_s,
            "rescues": own.rescues,
            "is_unnotified": ("unnotified" in as_mapping(own.raw) and job.status in TERMINAL_STATUSES) or None,
            "former_lives": former_lives(job),
            "command": COMMANDS.get(Status(job.status)) if job.status in set(Status) else None,
        }
    )


def as_json(value: Any) -> Any:
    """The value as JSON can hold it: times in ISO 8601, in UTC."""
    if isinstance(value, Mapping):
        return {name: as_json(each) for name, each in value.items()}
    if isinstance(value, list):
        return [as_json(each) for each in value]
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return value
