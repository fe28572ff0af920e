"""What a model server is asked for, and what is asked for instead when it refuses a field.

Nothing is sent that nobody asked for. The fields of a request have three ranks: *needed* (`model`, `messages`,
`prompt`, `input`), *asked* by the job, and *ours*, which the worker or its operator adds. A refused field of ours is
renamed, replaced or left out; of what the job asked for only the cap of a text and a picture's size are. Every other
refused field of the job fails it, by name.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import get_args

from workerkit import sentences
from workerkit.errors import Document, InvalidInput, JobError, OperatorFault
from workerkit.media import nearest_size
from workerkit.models import FORGET_AFTER_S
from workerkit.refusals import CAP, LATER_CAP, PICTURE_FIELD, FieldRefused, NamedField, Unexplained
from workerkit.settings import IMAGE_SIZE, Effort, ProviderSettings

MAX_CALLS = 3  # in an attempt
THINKING, EFFORT, FINISH_REASON = "thinking", "reasoning_effort", "finish_reason"
LOWEST_EFFORT = "low"  # which every model that thinks takes
SOUND_FORMATS = ("mp3", "wav", "opus", "flac")
QUALITIES = ("low", "medium", "high", "xhigh", "max", "auto", "standard", "hd")
# Of a field of ours, the setting that its operator can change.
SETTINGS = {"voice": "AUDIO_VOICE", "response_format": "AUDIO_FORMAT", EFFORT: "TEXT_REASONING_EFFORT"}
SETTINGS |= {CAP: "TEXT_MAX_TOKENS"}


def values_offered(named: NamedField) -> list[str]:
    """The values of a field that a refusal offers, out of those that the worker knows."""
    known = {"response_format": SOUND_FORMATS, EFFORT: get_args(Effort), "quality": QUALITIES}.get(named.name, ())
    return [value for value in known if value in named.words.split()]


CONTEXT_TOKENS = r"context (?:length|window|size)(?: [^| \d]+){0,5} (\d{1,9})"
# vLLM's "at least 7 input tokens" isn't the length of the prompt.
PROMPT_TOKENS = (
    r"(?<!at least )\b(\d{1,9})(?: tokens)?"
    r" (?:(?:in|from) the (?:messages|prompt|input)|(?:input|prompt) tokens|of text input)"
)


AT_MOST = r"(?:at most|maximum(?: allowed)?(?: (?:is|of|value))*|up to|no more than|less than or equal to)"


def is_too_small(words: str) -> bool:
    """Whether a refusal wants a larger cap."""
    return bool(re.search(r"\b(?:below|at least|minimum|be greater than)\b", words)) and "context" not in words


def is_too_large(words: str) -> bool:
    """Whether a refusal wants a smaller cap, so that without one the answer is shorter than what was asked for."""
    return bool(re.search(r"\b(?:too (?:large|big|high|long)|(?<!be )greater than|exceed\w*|above)\b", words))


def lower_cap(words: str, cap: int) -> int | None:
    """The cap of a text that a refusal leaves room for; None if it can't be told.

    It names the most tokens of an answer, or the context's length and the prompt's.

    Raises InvalidInput: the prompt alone is longer than the context.
    """
    context, prompt = re.search(CONTEXT_TOKENS, words), re.search(PROMPT_TOKENS, words)
    if context and prompt:
        room = int(context[1]) - int(prompt[1])
        if room <= 0:
            raise InvalidInput("the prompt is longer than the context", sentences.TOO_LONG)
        return min(room, cap - 1) or None
    highest = re.search(rf"\b{AT_MOST} (\d{{1,9}})\b", words)
    if context or (is_too_small(words) and not highest):
        return None
    numbers = map(int, [highest[1]] if highest else re.findall(r"\b\d{1,9}\b", words))
    return max((number for number in numbers if 0 < number < cap), default=None)


def other_size(words: str, size: str) -> str | None:
    """The nearest picture size that a refusal allows, as a list or by what sides must be multiples of; or None."""
    offered = [one for one in re.findall(rf"\b{IMAGE_SIZE}\b", words) if one != size]
    if offered and size != "auto":
        return nearest_size(size, offered)
    step = int(found[1]) if (found := re.search(r"(?:divisible by|multiples? of) ([1-9]\d{0,2})\b", words)) else 0
    if step and size != "auto":
        rounded = "x".join(str(max(1, round(int(side) / step)) * step) for side in size.split("x"))
        return rounded if rounded != size else None
    return None


# ── what was learnt ──────────────────────────────────────────────────────────────────────────────────────────────


class Learnt:
    """What this process has found out about the models of its servers. Each of it is forgotten after an hour.

    It depends on server and model alone: `max_tokens` is renamed, a field of ours is left out (None), a model thinks
    before it answers, a stream ends with a finish_reason. It outlives the event loop whose calls found it out.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rules: dict[tuple[str, str], dict[str, tuple[str | None, float]]] = {}

    def rules(self, server: str, model: str) -> dict[str, str | None]:
        """The rules that are younger than an hour, by the field that each is about."""
        now, known = self._clock(), self._rules.get((server, model), {})
        return {name: rule for name, (rule, at) in known.items() if now - at < FORGET_AFTER_S}

    def learn(self, server: str, model: str, changes: Mapping[str, str | None]) -> None:
        now = self._clock()
        self._rules.setdefault((server, model), {}).update({name: (rule, now) for name, rule in changes.items()})

    def forget(self, server: str, model: str, names: Iterable[str]) -> None:
        known = self._rules.get((server, model), {})
        for name in names:
            known.pop(name, None)


# ── one request ──────────────────────────────────────────────────────────────────────────────────────────────────


class Negotiation:
    """One request, as it is sent now. Each refusal of a field changes it, at most so often."""

    def __init__(self, learnt: Learnt, server: str, asked: Document, ours: Document, where: ProviderSettings) -> None:
        self.server, self.model, self._calls = server, str(asked.get("model", "")), 0
        self._learnt, self._asked, self._ours, self._where = learnt, asked, ours, where
        self._begin()

    def _begin(self) -> None:
        self._rules = self._learnt.rules(self.server, self.model)
        self._changes: dict[str, str | None] = {}  # those of this request that are worth learning
        self._values: Document = {}  # other values for fields; None leaves a field out
        self._refused: set[str] = set()
        self.body = self._shaped()

    def use_model(self, model: str) -> None:
        """Begins again with another model. The calls so far count."""
        self.model, self._asked = model, {**self._asked, "model": model}
        self._begin()

    def _shaped(self) -> Document:
        """The request by what was learnt, in whatever order, and by what this one's refusals have said."""
        rules, body = {**self._rules, **self._changes}, {**self._ours, **self._asked}
        is_renamed = rules.get(CAP) == LATER_CAP
        if CAP in body and (is_renamed or THINKING in rules):
            body[CAP] += self._where.thinking_tokens
        if CAP in body and is_renamed:
            body[LATER_CAP] = body.pop(CAP)
            body.setdefault(EFFORT, LOWEST_EFFORT)
        body |= {name: value for name, value in self._values.items() if name in body}
        without = {name for name in body if rules.get(name, "") is None and name not in self._asked}
        without |= {name for name, value in body.items() if value is None}
        without |= {"stream_options"} if "stream" in without else set()
        return {name: value for name, value in body.items() if name not in without}

    @property
    def may_go_on(self) -> bool:
        return self._calls < MAX_CALLS

    def note_call(self) -> None:
        self._calls += 1

    def confirm(self) -> None:
        """Keeps what was changed, since the request so changed was answered."""
        if self._changes:
            self._learnt.learn(self.server, self.model, self._changes)

    def note_end(self, has_reason: bool) -> None:
        """Keeps that this server and model end their streams with a finish_reason."""
        if has_reason and FINISH_REASON not in self._rules:
            self._learnt.learn(self.server, self.model, {FINISH_REASON: None})

    @property
    def done_is_enough(self) -> bool:
        return FINISH_REASON not in self._rules

    def make_room_for_thinking(self) -> bool:
        """Raises the cap of a text for a model that thought until the cap. False: it can't be raised any more."""
        has_room = CAP not in self.body or THINKING in self._rules | self._changes
        if has_room or not self._where.thinking_tokens or not self.may_go_on:
            return False
        self._changes[THINKING] = None
        self._values.pop(CAP, None)
        self.body = self._shaped()
        return True

    def mend(self, refusal: FieldRefused | Unexplained) -> None:
        """Changes the request after a refusal. Raises FailJob: it can't be changed so that the server may take it."""
        named = refusal.named if isinstance(refusal, FieldRefused) else None
        if not (self.may_go_on and (self._drop_rules(named) or self._change(refusal))):
            raise self._fault(refusal)
        self.body = self._shaped()

    def _drop_rules(self, named: NamedField | None) -> bool:
        """Whether rules were dropped because of which the server may refuse the request: those about this field."""
        rules = {name: rule for name, rule in self._rules.items() if name != FINISH_REASON}
        outdated = [name for name, rule in rules.items() if named is None or named.name in (name, rule)]
        if not outdated or (named and named.is_value):
            return False
        if named:
            self._refused.add(named.name)
        self._learnt.forget(self.server, self.model, outdated)
        self._rules = {name: rule for name, rule in self._rules.items() if name not in outdated}
        return True

    def _change(self, refusal: FieldRefused | Unexplained) -> bool:
        """Whether the field that is refused could be renamed, replaced or left out."""
        if isinstance(refusal, Unexplained):
            return False
        named = refusal.named
        name, words = named.name, named.words
        if name in (CAP, LATER_CAP):
            return self._change_cap(named, is_too_long=refusal.otherwise is not None)
        if name == "size":
            self._values["size"] = other_size(words, self.body["size"])
            return True
        is_the_operators = name == "voice" or (name == EFFORT and bool(self._where.reasoning_effort))
        if name in self._asked or name not in self.body or is_the_operators:
            return False
        if offered := [value for value in values_offered(named) if value != self.body[name]]:
            self._values[name] = offered[0]
            return True
        if name == "response_format" and named.is_value:  # a sound in none of the formats that the worker knows
            return False
        self._values.pop(name, None)
        self._changes[name] = None
        return True

    def _change_cap(self, named: NamedField, *, is_too_long: bool) -> bool:
        """Renamed, lowered, or left out: one that the job asked for only if what is made then is shorter still."""
        self._refused.add(named.name)
        is_asked, takes_neither = CAP in self._asked, LATER_CAP in self._refused
        if not named.is_value:
            self._changes[CAP] = None if takes_neither else LATER_CAP
            return not (takes_neither and is_asked)
        lower = lower_cap(named.words, self.body[named.name])
        self._values[named.name] = lower
        return lower is not None or not is_asked or is_too_long or is_too_large(named.words)

    def _fault(self, refusal: FieldRefused | Unexplained) -> JobError:
        """Why the job fails: the person hears of what the job asked for, the operator of everything else."""
        if isinstance(refusal, Unexplained):
            return refusal
        if refusal.otherwise:
            return refusal.otherwise
        name = CAP if refusal.named.name == LATER_CAP else refusal.named.name
        if name in self._asked or name in ("system", PICTURE_FIELD):
            return InvalidInput(f"{refusal.detail}: the job asked for it", self._sentence(name, refusal.named))
        setting, value = SETTINGS.get(name), f"(it is {self.body.get(refusal.named.name)!r})"
        advice = (
            f"set {setting} to what this server and model take {value}" if setting else "the worker needs this field"
        )
        return OperatorFault(f"{refusal.detail}: {advice}")

    def _sentence(self, name: str, named: NamedField) -> str:
        if name == PICTURE_FIELD:
            return sentences.BAD_PICTURE if named.is_value else sentences.NO_EYES
        offered = [value for value in values_offered(named) if value != self.body.get(name)]
        is_sound = name == "response_format" and isinstance(self._asked[name], str)
        return sentences.field_refused("format" if is_sound else name, offered)
