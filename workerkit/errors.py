"""The errors of the worker. The class of an error decides what happens next; no caller works it out again."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from workerkit import sentences

Document = dict[str, Any]


def as_words(value: object) -> str:
    """A text as a document can hold it. A module of job types may give an exception in its place.

    Then its class alone is kept, since its text may hold a prompt.
    """
    text = type(value).__name__ if isinstance(value, BaseException) else str(value or "")
    return text.encode("utf-8", "replace").decode()


class JobError(Exception):
    """An attempt ended without a result; the subclass says what happens next.

    `sentence` is what the person who waits reads. `detail` is for the log and for the bookkeeping in the job's
    document. Neither may hold a key or a prompt.
    """

    default_sentence: ClassVar = sentences.WENT_WRONG
    log_level: ClassVar = logging.WARNING
    is_operators: ClassVar = False  # whether only the operator can help

    def __init__(self, detail: str = "", sentence: str = "") -> None:
        self.sentence = as_words(sentence) or self.default_sentence
        self.detail = as_words(detail) or self.sentence
        super().__init__(self.detail)


class RetryJob(JobError):
    """The job is tried again after a wait: the provider is busy, can't be reached, or broke off.

    `after_s` is the wait in seconds that the provider asked for, if it did. A try that is not counted doesn't bring
    the job closer to its last one.
    """

    default_sentence = sentences.BUSY

    def __init__(
        self, detail: str = "", sentence: str = "", after_s: float | None = None, *, is_counted: bool = True
    ) -> None:
        super().__init__(detail, sentence)
        self.after_s, self.is_counted = after_s, is_counted


class ProviderAway(RetryJob):
    """The provider can't be reached, so after a few such failures the other jobs wait as well."""

    default_sentence = sentences.AWAY


class NotStored(RetryJob):
    """The artifact store doesn't take the result, which is kept for the next try where Redis takes it."""

    default_sentence = sentences.NOT_STORED
    log_level = logging.ERROR


class FailJob(JobError):
    """The job has failed: trying again would not help, or all tries are used up."""


class InvalidInput(FailJob):
    """The person's input can't be used; the sentence says what to change."""

    log_level = logging.INFO


class OperatorFault(FailJob):
    """A key, a model, a URL or the like is wrong; only the operator can change that, and the log says what."""

    default_sentence = sentences.NOT_SET_UP
    log_level = logging.ERROR
    is_operators = True


class HandBack(JobError):
    """This worker is shutting down. Another one goes on with the job, and the attempt is not counted."""

    default_sentence = sentences.RESTARTING
    log_level = logging.INFO


class DropJob(JobError):
    """The job was cancelled, or another attempt has it. This attempt writes nothing and publishes nothing."""

    log_level = logging.INFO


class LeaveJob(DropJob):
    """It is unknown whether the last write was made. The attempt does nothing more, and its lease runs out."""

    log_level = logging.WARNING


class EndRefused(LeaveJob):
    """MongoDB takes no end of the job in any form, and the log says why. Sweepers go on trying."""

    default_sentence = sentences.NOT_SET_UP
    log_level = logging.ERROR


class JobFailed(Exception):
    """Ends the Celery task in state FAILURE. Its text is the sentence that the person reads."""


class StoreUnavailable(Exception):
    """A store can't be reached, or it is unknown whether a write was made."""


class StoreRefused(StoreUnavailable):
    """MongoDB answered that it doesn't take this write, and a later try would be refused as well.

    A validator is against it, the user lacks the right, or the document would be too large (`is_too_large`) or can't
    be encoded.
    """

    def __init__(self, detail: str, *, is_too_large: bool = False) -> None:
        super().__init__(detail)
        self.is_too_large = is_too_large


class ArtifactsUnavailable(StoreUnavailable):
    """The artifact store didn't take or give a file. While this lasts, MongoDB and other jobs may be fine."""


class NotesUnavailable(StoreUnavailable):
    """Redis can't be asked for the notes that the workers share."""


class NotesRefused(NotesUnavailable):
    """Redis refuses this user one of the notes."""
