"""Every sentence that the person reads who waits for a job, once: what has happened, and what to do.

Such a person knows no worker, queue or model server. A field that the job itself has is named as the API names it. What
is wrong with an input is said by its validators in inputs.py, within the sentence of `unusable`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

# While the job goes on. Those without a full stop are the beginnings of longer sentences.
BUSY = "The AI service is busy"
AWAY = "The AI service can't be reached"
BROKE_OFF = "The AI service stopped in the middle"
STARTING = "The AI model is starting"
NOT_STORED = "The result can't be saved at the moment"
RESTARTING = "This was interrupted by a restart. It goes on in a moment."
RETRIED = "This is being tried again. You don't have to do anything."
GOES_ON = "This was interrupted. It goes on as soon as possible."

# At its end
READY = "Your result is ready."
FAILED = "This has failed. Please try again."
WENT_WRONG = "Something went wrong. Please try again."
TOOK_TOO_LONG = "This took too long and was stopped. Please try again, perhaps with a smaller request."
GAVE_UP = "This could not be finished after several tries. Please try again."
CANT_BE_STORED = "The result can't be saved, perhaps since it is too large. Please ask for something smaller."
NOT_SET_UP = "This service isn't set up correctly. Please tell the people who run it."
STOPPED = "This was stopped by the people who run this service."
EXPIRED_UNTRIED = "This waited too long before it could begin. Please try again."
REVOKED_SENTENCES = {"revoked": STOPPED, "expired": EXPIRED_UNTRIED}
# … because of what the AI service has answered
UNUSABLE = "The AI service sent an answer that can't be used. Please try again."
TOO_LARGE = "The AI service's answer is too large. Please ask for something smaller."
PICTURE_TOO_LARGE = "The picture from the AI service is too large. Please ask for a smaller one."
REFUSED = "The AI service refused this request. Please change it, or tell the people who run this service."
CONTENT_RULES = "The AI service's rules don't allow this. Please change your request."
NO_TEXT = "The AI service sent no text. Please try again."
NO_SOUND = "The AI service sent no sound. Please try again."
NO_PICTURE = "The AI service sent no picture. Please try again."
PICTURE_GONE = "The picture could not be fetched from the AI service. Please try again."
ONLY_THOUGHT = (
    "The AI model used up the length of its answer by thinking, before the first word. "
    "Please ask for something simpler, or for a longer answer (more `max_tokens`)."
)
# … because of the request
TOO_LONG = "Your request is too long for this AI model. Please send a shorter one."
TOO_LARGE_TO_RUN = "Your request is too large. Please send a smaller one."
DAMAGED = "Your request reached us damaged. Please send it again."
NO_SUCH_JOB = "There is no such job."


def unusable(fault: str) -> str:
    """What the person reads about a request that has to be changed."""
    return f"Your request can't be used: {fault}."


NO_EYES = unusable("this AI model can't look at pictures. Please send the text alone (leave out `image_url`)")
BAD_PICTURE = unusable(
    "the AI service couldn't open a picture in it (`image_url`). "
    "Please check its address, its format (PNG, JPEG, WEBP or GIF) and its size"
)


def field_refused(field: str, offered: Sequence[str]) -> str:
    advice = f"use one of: {', '.join(offered)}" if offered else "leave it out, or change it"
    return unusable(f"this AI model doesn't take this `{field}`; {advice}")


def over_the_cap(field: str, cap: int) -> str:
    return unusable(f"{field} should be at most {cap}")


def model_not_offered(offered: Sequence[str]) -> str:
    return unusable(f"this AI model isn't offered. Choose one of: {', '.join(offered)}")


def unknown_type(job_type: str) -> str:
    return f"This kind of job isn't known here: {job_type[:40]!r}. Please tell the people who run this service."


def at_most_characters(count: str) -> str:
    """What follows TOO_LONG where the AI service says how long a request may be."""
    return f" It takes at most {count} characters."


def started(attempt: int, max_attempts: int) -> str:
    """What the person reads when an attempt begins."""
    return f"Your job has started (try {attempt} of {max_attempts})." if attempt > 1 else "Your job has started."


def trying_again(sentence: str, wait_s: float, attempt: int, max_attempts: int) -> str:
    """What the person reads while a job waits for that attempt."""
    return f"{sentence}; trying again in {math.ceil(wait_s)} s ({attempt} of {max_attempts})."


def given_up(sentence: str, attempts: int) -> str:
    """What the person reads when the last attempt has met something that may be over later."""
    tries = f"{attempts} tries" if attempts > 1 else "one try"
    return f"{sentence}; given up after {tries}. Please try again later."


def try_again_after(sentence: str, now: datetime, wait_s: float) -> str:
    """What the person reads if a provider asks to wait for longer than a job may: the first full minute behind it."""
    at = now + timedelta(seconds=wait_s + 59)
    day = "" if at.date() == now.date() else f"{at:%Y-%m-%d} "
    return f"{sentence}. Please try again after {day}{at:%H:%M} UTC."


def final_sentence(document: Mapping[str, Any]) -> str:
    """What the person reads about a job that has ended."""
    return str(document.get("error_message") or FAILED) if document["status"] == "failed" else READY
