"""Which model serves where none is set, and what is known about the end of those in use. Models come and go.

OpenAI shuts some down each quarter. The list below is the only place that names current ones.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, date, datetime
from typing import Any

from workerkit.errors import OperatorFault
from workerkit.settings import ProviderKind, ProviderSettings, is_azure

# OpenAI's models that a new deployment gets, the best first, with the day on which OpenAI ends each, if it has named
# one (developers.openai.com/api/docs/deprecations).
READ_ON = date(2026, 11, 27)
CURRENT: dict[ProviderKind, dict[str, date | None]] = {
    "text": {"gpt-6-luna": None, "gpt-6.1-terra": None, "gpt-6.2-sol": None, "gpt-5.6-luna": None},
    "image": {"gpt-image-2.6-flare": None, "gpt-image-2.6-sunburst": None, "gpt-image-2.5-flare": None},
    "audio": {"gpt-4o-mini-tts": date(2027, 1, 6)},
}
NEAR_DAYS = 60
MAX_NAMES = 20
PLAIN_NAME = re.compile(r"[\w./:@+-]{1,120}")
OTHER_KINDS = re.compile(r"embed|rerank|moderation")  # models that answer none of the worker's calls
FORGET_AFTER_S, ASK_AGAIN_S = 3600.0, 60.0

# Sizes that a family of picture models offers, by a part of its name, behind any URL. From gpt-image-2 on others are
# offered too: those with sides that 16 divides, of no extreme shape, neither small nor huge.
FAMILY_SIZES: dict[str, tuple[str, ...]] = {
    "gpt-image": ("1024x1024", "1536x1024", "1024x1536"),
    "dall-e-3": ("1024x1024", "1792x1024", "1024x1792"),
    "dall-e-2": ("256x256", "512x512", "1024x1024"),
}

Offered = Mapping[str, date | None]  # the models that a server lists, each with its last day if that is known


FREE_SIZES = re.compile(r"gpt-image-([2-9]|\d\d)")
MIN_PIXELS, MAX_PIXELS, MAX_SIDE, MAX_RATIO, SIDE_STEP = 655_360, 8_294_400, 3840, 3, 16


def is_free_size(size: str) -> bool:
    """Whether a size is one of the many that newer models of OpenAI offer."""
    width, height = map(int, size.split("x"))
    is_even = width % SIDE_STEP == 0 == height % SIDE_STEP
    is_shape = max(width, height) <= min(MAX_SIDE, MAX_RATIO * min(width, height))
    return is_even and is_shape and MIN_PIXELS <= width * height <= MAX_PIXELS


def sizes_of(model: str, wanted: str) -> tuple[str, ...]:
    """The sizes that a picture model is known to offer instead of this one; none if this one may do."""
    name = model.lower()
    if wanted != "auto" and FREE_SIZES.search(name) and is_free_size(wanted):
        return ()
    return next((sizes for family, sizes in FAMILY_SIZES.items() if family in name), ())


def date_of(value: object) -> date | None:
    """A day, given as `2027-01-06`, as a time in that form, or as a Unix time."""
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return datetime.fromtimestamp(value, UTC).date()
        return date.fromisoformat(str(value)[:10])
    except (ValueError, OverflowError, OSError):
        return None


def parse_models(document: Any) -> Offered:
    """The models in an answer of `GET /models`. A list without any says nothing: servers with one model send such.

    Raises TypeError, LookupError, AttributeError: it is no list of models.
    """
    items = document if isinstance(document, list) else document.get("data") or document.get("models") or []
    named = [(item.get("id") or item.get("name"), item) for item in items if isinstance(item, dict)]
    named += [(item, {}) for item in items if isinstance(item, str)]
    found = {name: date_of(item.get("shutdown_date")) for name, item in named if isinstance(name, str) and name}
    if not found:
        raise LookupError("no models")
    return found


def choose(where: ProviderSettings, offered: Offered | None, gone: Collection[str] = ()) -> str:
    """The model of a server for a kind of which none is set. `gone` are models that it has refused of late.

    OpenAI's is the first of CURRENT that it offers. Another server's is its only one. Where the list can't be had, the
    first of CURRENT is asked for: servers with one model often take any name, and no job waits for a list. One that was
    refused is chosen only where there is no other: it may have been refused for what a single job asked for.

    Raises OperatorFault: it offers none or several; the choices are in the log.
    """
    setting = f"{where.kind.upper()}_MODEL"
    if where.is_openai or offered is None:
        if found := [name for name in CURRENT[where.kind] if offered is None or name in offered]:
            return next((name for name in found if name not in gone), found[0])
        raise OperatorFault(f"{where.place} offers none of {', '.join(CURRENT[where.kind])}: set {setting}")
    names = [name for name in offered if not OTHER_KINDS.search(name.lower())]
    names = [name for name in names if name not in gone] or names
    if len(names) == 1:
        return names[0]
    plain = [name for name in names if PLAIN_NAME.fullmatch(name)]
    choices = f"one of: {', '.join(plain[:MAX_NAMES])}" if plain else "one that it takes"
    raise OperatorFault(f"{where.place} offers {len(names)} models: set {setting} to {choices}")


def listed_name(model: str, offered: Offered) -> str | None:
    """The name under which a server lists a model. Ollama adds `:latest`, and Gemini puts `models/` before it."""
    return next((name for name in (model, f"{model}:latest", f"models/{model}") if name in offered), None)


def remark(where: ProviderSettings, model: str, offered: Offered | None, today: date) -> str:
    """What is wrong with a model in use: it isn't offered, or ends soon. An empty string if nothing is.

    Azure lists what can be deployed, and not what is.
    """
    listed = listed_name(model, offered or {})
    if offered is not None and listed is None and not is_azure(where.base_url):
        return f"{model} isn't among the {len(offered)} models that are offered"
    ends = (offered or {}).get(listed or model) or (CURRENT[where.kind].get(model) if where.is_openai else None)
    if ends and (ends - today).days <= NEAR_DAYS:
        return f"{model} {'ended' if ends < today else 'ends'} on {ends}: set another {where.kind.upper()}_MODEL before"
    return ""


class Choices:
    """The models that this process has chosen, by server and kind. After a refusal another one is, for an hour.

    A choice without the server's list holds for a minute or until it is refused; then the list is asked for again.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._chosen: dict[tuple[str, ProviderKind], tuple[str, float]] = {}
        self._gone: dict[tuple[str, str], float] = {}

    def get(self, server: str, kind: ProviderKind) -> str | None:
        model, until = self._chosen.get((server, kind), ("", 0.0))
        return model if self._clock() < until else None

    def keep(self, server: str, kind: ProviderKind, model: str, *, is_certain: bool) -> None:
        self._chosen[server, kind] = model, math.inf if is_certain else self._clock() + ASK_AGAIN_S

    def gone(self, server: str) -> list[str]:
        now = self._clock()
        return [model for (place, model), at in self._gone.items() if place == server and now - at < FORGET_AFTER_S]

    def drop(self, server: str, kind: ProviderKind, model: str) -> bool:
        """Chooses anew next time, since the server refuses this model. False: it wasn't chosen here."""
        chosen, until = self._chosen.get((server, kind), ("", 0.0))
        if chosen != model:
            return False
        del self._chosen[server, kind]
        if until == math.inf:  # else the name was only a guess
            self._gone[server, model] = self._clock()
        return True
