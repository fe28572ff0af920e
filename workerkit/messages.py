"""The arguments of messages: those of the API, read; and those of the messages that the worker itself sends."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workerkit.errors import Document, JobFailed
from workerkit.logs import logger
from workerkit.settings import Limits
from workerkit.values import as_priority, as_text

COPY: Document = {"is_copy": True}  # in the data of a message that a sweeper sends since the API's own was lost
JOB_ID = re.compile(r"[0-9a-fA-F]{24}")


def own_arguments(job_id: object, **data: Any) -> tuple[str, Document]:
    """The arguments of a message that the worker itself sends. They hold no prompt, since the job's document has it."""
    return str(job_id), {"job_id": str(job_id), **data}


def parse_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, Document]:
    """The job id in a message's arguments, and all arguments by name. Raises JobFailed: there is no job id."""
    arguments = dict(zip(("job_id", "job_data"), args, strict=False)) | dict(kwargs)
    job_id = arguments.get("job_id")
    if not isinstance(job_id, str) or not JOB_ID.fullmatch(job_id):
        logger.error("dropped a message without a job id (24 hex digits)")
        raise JobFailed("The message names no job.")
    return job_id, arguments


def carried_data(args: Any) -> Document:
    """What a message of the worker's own says in its data, so that it says the same when it is delivered again."""
    data = args[1] if isinstance(args, (list, tuple)) and len(args) > 1 and isinstance(args[1], dict) else {}
    return {name: data[name] for name in ("marker", *COPY) if name in data}


@dataclass(frozen=True)
class Delivery:
    """What a message says besides its job: the limits, and which task and priority it has.

    A rescue keeps the id of the API's task. `is_copy`: a sweeper sent it, since the API's own message was lost.
    """

    limits: Limits
    task_id: str | None = None
    priority: int | None = None
    is_copy: bool = False

    @property
    def origin(self) -> Document:
        """What a lease notes of the message, so that a message of the sweeper's own can have it, too."""
        noted = {"task_id": self.task_id, "priority": self.priority}
        return {name: value for name, value in noted.items() if value is not None}


def describe_delivery(request: Any, limits: Limits, job_data: Document) -> Delivery:
    """What a message says besides its job, by Celery's request of its task."""
    priority = as_priority((request.delivery_info or {}).get("priority"))
    return Delivery(limits, as_text(request.root_id or request.id), priority, is_copy=COPY.items() <= job_data.items())
