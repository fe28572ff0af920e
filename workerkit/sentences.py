"""What the person reads who waits for a job: each sentence that more than one place needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

READY = "Your result is ready."
GOES_ON = "Your job was interrupted, and goes on as soon as a worker is free."
CANT_BE_STORED = "The result is too large or can't be stored."
UNUSABLE = "The provider's answer could not be used."
TOO_LARGE = "The provider's answer is too large."
NOT_SET_UP = "The service isn't set up correctly; tell its operator."
REFUSED = "The provider refused this request."
CONTENT_RULES = "The provider's content rules forbid this. Please change your request."
TOO_LONG = "The input is too long for this model. Please send a shorter one."
NO_EYES = "The input can't be used: this model can't look at pictures. Send the text alone (leave out `image_url`)."
BAD_PICTURE = (
    "The input can't be used: the provider couldn't fetch or read a picture (`image_url`). "
    "Check its URL, its format (PNG, JPEG, WEBP or GIF) and its size."
)
NO_TEXT = "The provider returned an empty text."
NO_SOUND = "The provider returned no sound."
NO_PICTURE = "The provider returned no picture."
PICTURE_GONE = "The provider's picture could not be fetched. Please try again."
STARTING = "The model is starting"
ONLY_THOUGHT = (
    "The model used up its tokens by thinking, before the first word. Ask for more `max_tokens`, or for less."
)
TOOK_TOO_LONG = "This took too long and was stopped. Please try again, perhaps with a smaller request."
GAVE_UP = "This could not be finished after several tries. Please try again."
TOO_LARGE_TO_RUN = "The input is too large. Please send a smaller one."
DAMAGED = "Your request reached us damaged. Please send it again."
STOPPED = "This was stopped by the operator."
EXPIRED_UNTRIED = "This waited too long before it could begin. Please try again."
REVOKED_SENTENCES = {"revoked": STOPPED, "expired": EXPIRED_UNTRIED}


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
    return str(document.get("error_message") or "The job has failed.") if document["status"] == "failed" else READY
