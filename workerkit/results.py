"""What a handler makes of a job."""

from __future__ import annotations

from dataclasses import dataclass, field

from workerkit.errors import Document


@dataclass(frozen=True)
class Media:
    """A generated file: its bytes, and the field of `output_data` that takes its URL."""

    data: bytes = field(repr=False)
    suffix: str
    url_field: str


@dataclass(frozen=True)
class Result:
    """What a handler made: the fields of `output_data`, and a file where there is one."""

    output: Document
    media: Media | None = None
