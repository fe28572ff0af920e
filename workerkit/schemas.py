"""What the API and the worker exchange, as types: documents, messages and notices. docs/contract.md explains it.

At run time these types cost nothing. `python worker.py schema` prints them as JSON Schemas, and the tests hold what a
real worker writes and publishes against those. What a job's input may hold is in inputs.py.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict  # pydantic takes the one of typing from Python 3.12 on

CLOSED = ConfigDict(extra="forbid")  # what the worker alone makes has no other fields than these


def about(description: str, **rules: Any) -> Any:
    """What the JSON Schema of a field says: its description, and what its value has to be."""
    return Field(description=description, **rules)


JobId = Annotated[str, about("The `_id` of the job's document.", pattern="^[0-9a-f]{24}$")]
STATUSES = ("pending", "processing", "completed", "failed")
Status = Annotated[str, Field(json_schema_extra={"enum": list(STATUSES)})]  # the worker's own Status is a text, too
SessionId = Annotated[str | None, about("As in the document; null where that has none.")]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Url = Annotated[str, Field(min_length=1)]

# ── documents ────────────────────────────────────────────────────────────────────────────────────────────────────────

# Of which type a value is in MongoDB, where JSON has only text.
Date = Annotated[datetime, Field(json_schema_extra={"x-bsonType": "date"})]
ObjectIdText = Annotated[str, Field(pattern="^[0-9a-f]{24}$", json_schema_extra={"x-bsonType": "objectId"})]


@with_config(CLOSED)
class TextOutput(TypedDict):
    """The `output_data` of a text."""

    generated_text: Annotated[str, Field(min_length=1)]
    model_used: str
    tokens_used: Annotated[Count, about("Those of the whole call, as the provider counts them; else a rough count.")]
    prompt_tokens: NotRequired[Annotated[Count, about("Missing where the provider doesn't count them.")]]
    completion_tokens: NotRequired[Annotated[Count, about("Missing where the provider doesn't count them.")]]
    is_cut: NotRequired[Annotated[Literal[True], about("The text ended at its cap of tokens.")]]


@with_config(CLOSED)
class ImageOutput(TypedDict):
    """The `output_data` of a picture."""

    image_url: Url
    model_used: str
    resolution: Annotated[str, about("Read from the picture itself.", pattern="^[1-9][0-9]*x[1-9][0-9]*$")]


@with_config(CLOSED)
class AudioOutput(TypedDict):
    """The `output_data` of a sound."""

    audio_url: Url
    model_used: str
    duration_seconds: Annotated[float, about("Read from the sound itself.", gt=0)]
    format: Annotated[Literal["mp3", "wav", "opus", "flac"], about("Read from the sound itself.")]


OUTPUTS: dict[str, Any] = {
    "text_generation": TextOutput,
    "image_generation": ImageOutput,
    "audio_generation": AudioOutput,
}


class AttemptRecord(TypedDict):
    """How one attempt ended."""

    attempt: Count
    ended_at: Date
    end: Literal["completed", "failed", "retried", "handed_back", "lost"]
    node: NotRequired[str]
    waited_s: NotRequired[Annotated[Seconds, about("From the job's creation, a try again, or the time of a retry.")]]
    ran_s: NotRequired[Seconds]
    error: NotRequired[
        Annotated[str, about("`InvalidInput`: the person has to change the request. Other names may change.")]
    ]
    is_operators: NotRequired[Annotated[Literal[True], about("Only the operator can help.")]]
    reason: NotRequired[Annotated[str, about("For the operator. It holds no prompt and no key.")]]
    provider: NotRequired[Annotated[str, about("The server's address, without secrets.")]]
    model: NotRequired[str]


class FormerLife(TypedDict):
    """How a job had ended before the API set it back to `pending`."""

    ended_at: Annotated[Date | None, about("Of a cancelled life null, or that of the attempt before.")]
    reason: Annotated[str | None, about("Its `error_message`; null if it was completed.")]
    model: Annotated[str | None, about("Null, as the rest, if it was not completed.")]
    tokens: Count | None
    attempts: Count | None
    prompt_tokens: NotRequired[Count | None]
    completion_tokens: NotRequired[Count | None]
    seconds: NotRequired[Annotated[Seconds | None, about("Of sound.")]]
    pictures: NotRequired[Count | None]


class Bookkeeping(TypedDict, total=False):
    """The worker's notes about a job. An API may read those that have a description, and writes none of them."""

    message: Annotated[str, about("The worker's last sentence for the person, in whatever status.", min_length=1)]
    attempt: Annotated[Count, about("Which attempt runs or ran last. One that was handed back isn't counted.")]
    attempts: Annotated[list[AttemptRecord], about("Those that have ended, the oldest first.", max_length=10)]
    available_at: Annotated[Date, about("When the attempt may begin, or might have begun.")]
    past: Annotated[list[FormerLife], about("The former lives of a job that was set back.", max_length=5)]
    first_started_at: Date
    owner: str | None
    node: str
    pid: Count
    queue: str
    priority: Count
    task_id: str
    lease_until: Date
    deadline: Date
    limits: Annotated[list[Seconds], Field(min_length=2, max_length=2)]
    rescue_at: Date
    rescues: Count
    released_by: str
    retried_by: str
    cancelled_by: str
    unnotified: Date


class JobDocument(TypedDict):
    """A document of the collection `jobs`. The API may keep fields of its own beside these: the worker leaves them."""

    _id: ObjectIdText
    user_id: Annotated[str, about("Written by the API.")]
    session_id: NotRequired[Annotated[str | None, about("Written by the API. The worker copies it into each notice.")]]
    job_type: Annotated[str, about("Written by the API.")]
    status: Annotated[
        Status, about("Written by the API: `pending`, or `failed` to cancel. Written by the worker: the other changes.")
    ]
    input_data: Annotated[Any, about("Written by the API. The worker checks it before it spends anything.")]
    output_data: NotRequired[
        Annotated[dict[str, Any] | None, about("Written by the worker with `completed`; it stays until replaced.")]
    ]
    artifact_url: NotRequired[
        Annotated[str | None, about("Written by the worker with `completed`; it stays until replaced.")]
    ]
    error_message: NotRequired[
        Annotated[
            str | None, about("Written by the worker with `failed`, and nulled at a start; by an API that cancels.")
        ]
    ]
    created_at: Annotated[Date, about("Written by the API.")]
    updated_at: Annotated[Date, about("Written by both with each change; the renewal of a lease is none.")]
    started_at: NotRequired[Annotated[Date | None, about("Written by the worker when a life begins.")]]
    completed_at: NotRequired[
        Annotated[Date | None, about("Written by the worker with `completed` and `failed`, and nulled at a start.")]
    ]
    worker: NotRequired[Annotated[Bookkeeping | None, about("Written by the worker alone.")]]


# ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────────

RESERVED = ("marker", "is_copy")  # with these a message would pass for one of the worker's own


@with_config(ConfigDict(json_schema_extra={"not": {"anyOf": [{"required": [name]} for name in RESERVED]}}))
class JobData(TypedDict, total=False):
    """The message's copy of some fields. The worker reads them in the document, so this may be empty."""

    job_id: JobId
    job_type: str
    input_data: Any
    user_id: str
    session_id: str | None


JobArguments = Annotated[tuple[JobId, JobData], about("The task's arguments: (job_id, job_data).")]


class TaskHeaders(TypedDict):
    """The headers of Celery's protocol 2 that the worker looks at. A client may send more of them."""

    task: Literal["src.infrastructure.queue.tasks.process_job"]
    id: Annotated[str, about("The task's id, new for each message; usually a UUID.", min_length=1, max_length=200)]
    root_id: NotRequired[Annotated[str | None, about("The same id.")]]
    timelimit: NotRequired[
        Annotated[
            list[Seconds | None] | None,
            about("The hard and the soft limit in seconds, in this order.", min_length=2, max_length=2),
        ]
    ]
    expires: NotRequired[Annotated[str | None, about("ISO 8601. A job that hasn't begun by then fails.")]]
    eta: NotRequired[Annotated[str | None, about("Leave it out: it is kept for a minute at most.")]]
    retries: NotRequired[Count]


class DeliveryInfo(TypedDict):
    exchange: str
    routing_key: Annotated[str, about("The queue's name.")]


class RedisProperties(TypedDict):
    """What kombu, the library below Celery, needs of a message on Redis."""

    delivery_tag: Annotated[str, about("A new UUID for each message.", min_length=1)]
    delivery_info: DeliveryInfo
    body_encoding: NotRequired[Annotated[Literal["base64"], about("Without it, the body is plain JSON.")]]
    priority: NotRequired[Annotated[int | None, Field(ge=0, le=255)]]
    correlation_id: NotRequired[Annotated[str | None, about("The task's id.")]]


RedisMessage = TypedDict(
    "RedisMessage",
    {
        "body": Annotated[str, about("The JSON text of [[job_id, job_data], {}, {}], in base64.")],
        "content-type": Literal["application/json"],
        "content-encoding": Literal["utf-8"],
        "headers": TaskHeaders,
        "properties": RedisProperties,
    },
)
RedisMessage.__doc__ = "A message as an element of the list on Redis that is the queue."


@with_config(CLOSED)
class TaskResult(TypedDict):
    """The task's result in Celery's result backend. The task of a job that has failed ends in state FAILURE instead."""

    job_id: JobId
    status: Literal["completed", "failed"]


# ── notices ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@with_config(CLOSED)
class JobStatusUpdate(TypedDict):
    """On the channel `job_notifications`: a job has this status, which its document has already."""

    type: Literal["job_status_update"]
    user_id: str
    job_id: JobId
    status: Status
    session_id: SessionId
    message: Annotated[str, about("A sentence for the person who waits.", min_length=1)]


@with_config(CLOSED)
class JobProgress(TypedDict):
    """On the channel `job_progress`: a piece of a text that is being written."""

    type: Literal["job_progress"]
    user_id: str
    job_id: JobId
    session_id: SessionId
    attempt: Annotated[int, Field(ge=1)]
    sequence: Annotated[
        Count, about("Its number: it takes the place of this piece and of all behind it. 0 begins anew.")
    ]
    delta: str
