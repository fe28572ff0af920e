"""What a job's document says of its lives that have ended: how and when each one ended, and what it used.

A job that is put back to `pending` begins another life. `status` and `metrics` read documents by this module. `report`
does the same on the server, in a pipeline. Documents may hold anything: a value of a wrong type counts as nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from bson import Code, Decimal128

from worker import FIGURES, Status
from workerkit.attempts import COMPLETED, FAILED, LOST, AttemptRecord, read_records
from workerkit.errors import Document
from workerkit.mongodb import unknown_when_unreachable
from workerkit.sentences import STOPPED
from workerkit.values import as_mapping, as_time

if TYPE_CHECKING:
    from pymongo.collection import Collection

MAX_AMOUNT = 1e12  # a larger number of tokens or seconds is damage
MAX_WORDS = 300  # characters of a reason, a name or a sentence
CLOCKS_DIFFER_BY = timedelta(hours=1)  # a later end than this from now is damage
NOT_KNOWN = "not known"
# What is read of a document: never its input, and of its output only what was used.
FIELDS: Document = {
    **dict.fromkeys(("status", "job_type", "created_at", "started_at", "completed_at", "error_message"), 1),
    **{f"output_data.{name}": 1 for name in FIGURES},
    **{f"worker.{name}": 1 for name in ("attempt", "attempts", "past")},
}


class Outcome(StrEnum):
    """How a life has ended. It was cancelled by the API, or by an operator (`cancel`, or Celery's `revoke`)."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Usage:
    """What a life that completed has used. `other_tokens` are those that the provider didn't tell apart."""

    model: str = ""
    prompt_tokens: float = 0
    completion_tokens: float = 0
    other_tokens: float = 0
    pictures: float = 0
    sound_s: float = 0


@dataclass(frozen=True)
class Failure:
    """Why a life has failed. The reason is of the worker's own words; only the sentence may be another's."""

    reason: str = ""
    sentence: str = ""
    error: str = ""
    is_operators: bool = False


@dataclass(frozen=True)
class Life:
    job_id: object
    job_type: str
    ended_at: datetime
    outcome: Outcome
    usage: Usage = Usage()
    failure: Failure = Failure()
    attempts: tuple[AttemptRecord, ...] = ()

    @property
    def key(self) -> tuple[str, datetime]:
        """No two lives of a job end at the same time, and an end keeps its time when the next life begins."""
        return str(self.job_id), self.ended_at


# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────


def as_words(value: object) -> str:
    """A text, cut if it is long; an empty one for anything else, and for BSON's code."""
    return value[:MAX_WORDS] if isinstance(value, str) and not isinstance(value, Code) else ""


def as_amount(value: object) -> float:
    """A number that something can be counted with; 0 for any other value."""
    if isinstance(value, Decimal128):
        value = float(value.to_decimal())
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and 0 <= value <= MAX_AMOUNT else 0  # type: ignore[operator, return-value]


def as_entries(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def seconds_between(start: object, end: object) -> float | None:
    began_at, ended_at = as_time(start), as_time(end)
    return max(0.0, (ended_at - began_at).total_seconds()) if began_at and ended_at else None


# ── one document ─────────────────────────────────────────────────────────────────────────────────────────────────


def usage_of(values: Mapping[str, Any], model: str, tokens: str, pictures: float, seconds: str) -> Usage:
    """What was used. The names of some values are others in an output than in the record of a former life."""
    prompt, completion = (as_amount(values.get(name)) for name in ("prompt_tokens", "completion_tokens"))
    other = max(0, as_amount(values.get(tokens)) - prompt - completion)
    return Usage(as_words(values.get(model)), prompt, completion, other, pictures, as_amount(values.get(seconds)))


def usage_of_output(output: Mapping[str, Any]) -> Usage:
    pictures = int(bool(as_words(output.get("resolution"))))
    return usage_of(output, "model_used", "tokens_used", pictures, "duration_seconds")


def usage_of_past(life: Mapping[str, Any]) -> Usage:
    return usage_of(life, "model", "tokens", as_amount(life.get("pictures")), "seconds")


def failure_of(document: Mapping[str, Any], record: AttemptRecord | None) -> Failure:
    """Why the job failed, as its last attempt has it.

    If that one was to be followed by another, the job was given up or cancelled, of which only its sentence tells.
    """
    sentence = as_words(document.get("error_message"))
    if record is None or record.end not in (FAILED, LOST):
        return Failure(sentence=sentence)
    return Failure(record.reason or "", sentence, record.error or "", record.is_operators is True)


def attempts_of(document: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[AttemptRecord, ...]:
    """The attempts of the last life. An older worker noted none, but the job's times tell of a single one."""
    if records := read_records(own.get("attempts")):
        return records
    created, started, ended = (document.get(name) for name in ("created_at", "started_at", "completed_at"))
    if as_amount(own.get("attempt")) > 1 or own.get("past") or as_time(started) is None:
        return ()
    waited_s, ran_s = seconds_between(created, started), seconds_between(started, ended)
    end = COMPLETED if document.get("status") == Status.COMPLETED else FAILED
    return (AttemptRecord(1, end, waited_s=waited_s, ran_s=ran_s),)


def outcome_by(sentence: str) -> Outcome:
    """How a life ended whose sentence this is."""
    if sentence == STOPPED:
        return Outcome.CANCELLED
    return Outcome.FAILED if sentence else Outcome.COMPLETED


def is_cancelled_without_an_end(document: Mapping[str, Any]) -> bool:
    """Whether the API has cancelled the job, by its document alone."""
    return document.get("status") == Status.FAILED and document.get("completed_at") is None


def outcome_of(document: Mapping[str, Any]) -> Outcome:
    """How the last life ended. A job that was put back, and isn't claimed yet, still has the end of its former life."""
    if document.get("status") == Status.COMPLETED:
        return Outcome.COMPLETED
    if is_cancelled_without_an_end(document):
        return Outcome.CANCELLED
    outcome = outcome_by(as_words(document.get("error_message")))
    has_failed = document.get("status") == Status.FAILED and outcome is Outcome.COMPLETED
    return Outcome.FAILED if has_failed else outcome


def last_life(document: Mapping[str, Any], latest: datetime) -> Life | None:
    """The life whose end the document's own fields hold; None if there is none.

    A job that the API has cancelled has no end, so it counts by the time of its creation.
    """
    outcome, own = outcome_of(document), as_mapping(document.get("worker"))
    time = "created_at" if is_cancelled_without_an_end(document) else "completed_at"
    ended_at = as_time(document.get(time), latest)
    if ended_at is None:
        return None
    life = Life(document["_id"], as_words(document.get("job_type")), ended_at, outcome)
    if outcome is Outcome.CANCELLED:
        return life
    usage, failure = usage_of_output(as_mapping(document.get("output_data"))), Failure()
    if outcome is Outcome.FAILED:  # what its output has, if anything, is of a former life
        failure = failure_of(document, next(reversed(read_records(own.get("attempts"))), None))
        usage = Usage(as_words(as_mapping((as_entries(own.get("attempts")) or [None])[-1]).get("model")))
    return Life(life.job_id, life.job_type, ended_at, outcome, usage, failure, attempts_of(document, own))


def past_lives(document: Mapping[str, Any], latest: datetime) -> Iterator[Life]:
    """The lives before the last claim of a job that was put back, as far as they are kept.

    What the record of a failed one says of tokens was used by a life before it, which has a record of its own.
    """
    job_type = as_words(document.get("job_type"))
    for each in as_entries(as_mapping(document.get("worker")).get("past")):
        life = as_mapping(each)
        if ended_at := as_time(life.get("ended_at"), latest):
            sentence = as_words(life.get("reason"))
            outcome = outcome_by(sentence)
            usage = Usage(as_words(life.get("model"))) if sentence else usage_of_past(life)
            yield Life(document["_id"], job_type, ended_at, outcome, usage, Failure(sentence=sentence))


# ── queries ──────────────────────────────────────────────────────────────────────────────────────────────────────

EPOCH = datetime(1970, 1, 1)
# Finds ended jobs by the time of their end. It holds no job that hasn't ended, so an insert doesn't touch it.
INDEXES: dict[str, tuple[list[str], Document]] = {
    "worker_ended": (["completed_at"], {"partialFilterExpression": {"completed_at": {"$gt": EPOCH}}})
}
LONGEST_LIFE = timedelta(days=1)


def has_index_of_ends(jobs: Collection[Document]) -> bool:
    """Whether jobs can be found by the time of their end without reading all of them. Raises StoreUnavailable."""
    with unknown_when_unreachable():
        return any(index["key"][0][0] == "completed_at" for index in jobs.index_information().values())


def ended_between(since: datetime, latest: datetime, *, has_index: bool) -> Document:
    """What finds the jobs that ended then. Without an index of ends, those of which it is known when they were created.

    Then a job that took longer than a day isn't found.
    """
    created = {} if has_index else {"created_at": {"$gte": since - LONGEST_LIFE}}
    return {"completed_at": {"$gte": since, "$lte": latest}, **created}


def cancelled_since(since: datetime) -> Document:
    """What finds the jobs that were created since then and cancelled by their document alone."""
    return {"created_at": {"$gte": since}, "status": Status.FAILED, "completed_at": None}
