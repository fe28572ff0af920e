"""How an attempt at a job ended: as its document keeps it, and as the log says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from workerkit.errors import Document, FailJob, HandBack, JobError, RetryJob
from workerkit.results import Result
from workerkit.values import MAX_TEXT_CHARACTERS, as_mapping, as_number, as_seconds, as_text, as_time

MAX_KEPT = 10  # of a job's last attempts; those that a shutdown or a server that is away ends are not counted
COMPLETED, FAILED, RETRIED, HANDED_BACK, ABANDONED, LOST = ENDS = (
    *("completed", "failed", "retried", "handed_back", "abandoned"),
    "lost",  # its process died, or was suspended until its lease ran out
)
LOST_REASON = "its process died, or its lease ran out"


@dataclass(frozen=True)
class AttemptRecord:
    """One attempt that has ended. What isn't known, or doesn't apply, is None. Times are in seconds.

    `end` is one of ENDS. `error` is the class of the error, and `reason` what the log says about it. `is_operators`
    says that only the operator can mend it. `provider` is the server's address without what may be secret.
    """

    attempt: int
    end: str
    node: str | None = None
    ended_at: datetime | None = None
    waited_s: float | None = None
    ran_s: float | None = None
    error: str | None = None
    is_operators: bool | None = None
    reason: str | None = None
    provider: str | None = None
    model: str | None = None

    def document(self) -> Document:
        """The record as the job's document keeps it: without what is None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def read_record(value: Any) -> AttemptRecord | None:
    """A record out of a document, without its fields of a wrong type; None if it is no record."""
    raw = as_mapping(value)
    attempt, end, reason = as_number(raw.get("attempt")), raw.get("end"), raw.get("reason")
    if attempt is None or end not in ENDS:
        return None
    texts: Document = {name: as_text(raw.get(name)) for name in ("node", "error", "provider", "model")}
    times: Document = {name: as_seconds(raw.get(name)) for name in ("waited_s", "ran_s")}
    reason = reason[:MAX_TEXT_CHARACTERS] if isinstance(reason, str) else None
    is_operators = True if raw.get("is_operators") is True else None
    ended_at = as_time(raw.get("ended_at"))
    return AttemptRecord(attempt, end, ended_at=ended_at, is_operators=is_operators, reason=reason, **texts, **times)


def read_records(value: Any) -> tuple[AttemptRecord, ...]:
    """The last records of a list out of a document, the oldest first. What is no record is left out."""
    entries = value if isinstance(value, list) else []
    return tuple(filter(None, map(read_record, entries[-MAX_KEPT:])))


def end_of(outcome: Result | JobError) -> str:
    """Which of ENDS an outcome is."""
    match outcome:
        case Result():
            return COMPLETED
        case RetryJob():
            return RETRIED
        case HandBack():
            return HANDED_BACK
        case FailJob():
            return FAILED
    return ABANDONED


def output_of(outcome: Result | JobError) -> Mapping[str, Any]:
    """The output of a result; empty for an error. A handler may return anything."""
    return as_mapping(outcome.output if isinstance(outcome, Result) else None)


def why(outcome: Result | JobError) -> Document:
    """The fields of a record that tell the operator why there is no result."""
    if isinstance(outcome, Result):
        return {}
    reason = outcome.detail[:MAX_TEXT_CHARACTERS]
    return {"error": type(outcome).__name__, "is_operators": outcome.is_operators or None, "reason": reason}


def usage_of(output: Mapping[str, Any]) -> Document:
    """What a result has used, as far as its output says: tokens, pictures, seconds of sound."""
    used: Document = {
        "tokens": as_number(output.get("tokens_used")),
        "prompt_tokens": as_number(output.get("prompt_tokens")),
        "completion_tokens": as_number(output.get("completion_tokens")),
        "pictures": 1 if as_text(output.get("resolution")) else None,
        "seconds": as_seconds(output.get("duration_seconds")),
    }
    return {name: value for name, value in used.items() if value is not None}


def in_words(record: AttemptRecord, usage: Mapping[str, Any]) -> str:
    """The figures of an attempt for a line of the log."""
    figures = [f"waited {record.waited_s:.1f} s"] if record.waited_s is not None else []
    figures += [f"ran {record.ran_s:.1f} s"] if record.ran_s is not None else []
    figures += [" at ".join(filter(None, (record.model, record.provider)))] if record.model else []
    figures += [f"{usage['tokens']} tokens"] if "tokens" in usage else []
    return ", ".join(figures)
