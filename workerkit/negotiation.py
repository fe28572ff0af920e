"""What a model server is asked for, and what is asked for instead when it refuses a field.

Nothing is sent that nobody asked for. The fields of a request have three ranks: *needed* (`model`, `messages`,
`prompt`, `input`), *asked* by the job, and *ours*, which the worker or its operator adds. A refused field of ours is
renamed, replaced or left out; of what the job asked for only the cap of a text and a picture's size are. Every other
refused field of the job fails it, by name.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import get_args

from workerkit import sentences
from workerkit.errors import Document, InvalidInput, JobError, OperatorFault
from workerkit.media import nearest_size
from workerkit.refusals import CAP, LATER_CAP, FieldRefused, NamedField, Unexplained
from workerkit.settings import IMAGE_SIZE, Effort, ProviderSettings

MAX_CALLS = 3  # in an attempt
FORGET_AFTER_S = 3600.0
THINKING, EFFORT, FINISH_REASON = "thinking", "reasoning_effort", "finish_reason"
LOWEST_EFFORT = "low"  # which every model that thinks takes
SOUND_FORMATS = ("mp3", "wav", "opus", "flac")
QUALITIES = ("low", "medium", "high", "xhigh", "max", "auto", "standard", "hd")
# Of a field of ours, the setting that its operator can change.
SETTINGS = {"voice": "AUDIO_VOICE", "response_format": "AUDIO_FORMAT", EFFORT: "TEXT_REASONING_EFFORT"}
SETTINGS |= {CAP: "TEXT_MAX_TOKENS", LATER_CAP: "TEXT_MAX_TOKENS", "size": "IMAGE_SIZES"}


def values_offered(named: NamedField) -> list[str]:
    """The values of a field that a refusal offers, out of those that the worker knows."""
    known = {"response_format": SOUND_FORMATS, EFFORT: get_args(Effort), "quality": QUALITIES}.get(named.name, ())
    return [value for value in known if value in named.words.split()]


# vLLM's "at least 7 input tokens" isn't the length of the prompt.
PROMPT_TOKENS = (
    r"(?<!at least )\b(\d+)(?: tokens)? (?:(?:in|from) the (?:messages|prompt|input)|(?:input|prompt) tokens)"
)


def is_too_small(words: str) -> bool:
    """Whether a refusal wants a larger cap."""
    return bool(re.search(r"\b(?:below|at least|minimum|greater than)\b", words))


def lower_cap(words: str, cap: int) -> int | None:
    """The cap of a text that a refusal leaves room for; None if it can't be told.

    It names the most tokens of an answer, or the context's length and the prompt's.

    Raises InvalidInput: the prompt alone is longer than the context.
    """
    context = re.search(r"context (?:length|window|size)(?: [^| \d]+){0,5} (\d+)", words)
    prompt = re.search(PROMPT_TOKENS, words)
    if context and prompt:
        room = int(context[1]) - int(prompt[1])
        if room <= 0:
            raise InvalidInput("the prompt is longer than the context", sentences.TOO_LONG)
        return min(room, cap - 1) or None
    if context or is_too_small(words):
        return None
    smaller = [number for number in map(int, re.findall(r"\b\d{1,9}\b", words)) if 0 < number < cap]
    return max(smaller, default=None)


def other_size(words: str, size: str) -> str | None:
    """The nearest picture size that a refusal allows, by a list or by what divides its sides; None if it says none."""
    if size == "auto":
        return None
    if offered := [one for one in re.findall(rf"\b{IMAGE_SIZE}\b", words) if one != size]:
        return nearest_size(size, offered)
    step = re.search(r"(?:divisible by|multiples? of) ([1-9]\d{0,2})\b", words)
    if step is None:
        return None
    rounded = "x".join(str(max(1, round(int(side) / int(step[1]))) * int(step[1])) for side in size.split("x"))
    return rounded if rounded != size else None


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

    def forget(self, server: str, model: str) -> None:
        self._rules.pop((server, model), None)


# ── one request ──────────────────────────────────────────────────────────────────────────────────────────────────


class Negotiation:
    """One request, as it is sent now. Each refusal of a field changes it, at most so often."""

    def __init__(self, learnt: Learnt, server: str, asked: Document, ours: Document, where: ProviderSettings) -> None:
        self.server, self.model = server, str(asked.get("model", ""))
        self._learnt, self._asked, self._ours, self._where = learnt, asked, ours, where
        self._rules = learnt.rules(server, self.model)
        self._changes: dict[str, str | None] = {}
        self._calls = 0
        self.body = self._begin()

    def _begin(self) -> Document:
        """The request as it is first sent, shaped by what was learnt."""
        self.body = {**self._ours, **self._asked}
        for name, rule in self._rules.items():
            if name == THINKING:
                self._make_room()
            elif rule:
                self._rename(name, rule)
            elif name not in self._asked:
                self._leave_out(name)
        return self.body

    @property
    def may_go_on(self) -> bool:
        return self._calls < MAX_CALLS

    def note_call(self) -> None:
        self._calls += 1

    def use_model(self, model: str) -> None:
        """Begins again with another model. The calls so far count."""
        self.model, self._asked = model, {**self._asked, "model": model}
        self._rules, self._changes = self._learnt.rules(self.server, model), {}
        self._begin()

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
        if not self.may_go_on or THINKING in self._rules | self._changes or not {CAP, LATER_CAP} & self.body.keys():
            return False
        if LATER_CAP in self.body:  # which has room for thinking already
            return False
        self._make_room()
        self._changes[THINKING] = None
        return True

    def mend(self, refusal: FieldRefused | Unexplained) -> None:
        """Changes the request after a refusal. Raises FailJob: it can't be changed so that the server may take it."""
        rules = self._rules.keys() - {FINISH_REASON}
        shaped_by = {*rules, *(self._rules[name] for name in rules)}
        named = refusal.named if isinstance(refusal, FieldRefused) else None
        is_outdated = shaped_by and (named is None or (named.name in shaped_by and not named.is_value))
        if self.may_go_on and is_outdated:
            self._learnt.forget(self.server, self.model)
            self._rules = {}
            self._begin()
        elif named is None:
            raise refusal
        elif not self.may_go_on or not self._change(named):
            raise self._fault(named, refusal.detail)

    def _change(self, named: NamedField) -> bool:
        """Whether the field could be renamed, replaced or left out."""
        if named.name in (CAP, LATER_CAP):
            return self._change_cap(named)
        if named.name == "size":
            return self._change_size(named)
        if not self._is_ours(named.name):
            return False
        if offered := [value for value in values_offered(named) if value != self.body[named.name]]:
            self.body[named.name] = offered[0]
            return True
        is_sound_format = named.name == "response_format" and named.is_value  # one that the worker doesn't know
        if named.name == "voice" or is_sound_format or (named.name == EFFORT and self._where.reasoning_effort):
            return False  # the operator's to set
        self._leave_out(named.name)
        self._changes[named.name] = None
        return True

    def _is_ours(self, name: str) -> bool:
        """Whether the job didn't ask for it. The effort comes with the newer name of the cap."""
        return name not in self._asked and (name in self._ours or name == EFFORT)

    def _change_cap(self, named: NamedField) -> bool:
        cap = self.body[named.name]
        if not named.is_value and named.name == CAP and CAP not in self._changes:
            self._rename(CAP, LATER_CAP)
            self._changes[CAP] = LATER_CAP
            return True
        lower = lower_cap(named.words, cap)
        if lower is None and not named.is_value and CAP in self._asked:
            return False
        self.body[named.name] = lower
        if lower is None:
            del self.body[named.name]
        return True

    def _change_size(self, named: NamedField) -> bool:
        """The nearest size that is allowed. A server that takes none gets none, and the result says what it made."""
        if size := other_size(named.words, self.body["size"]):
            self.body["size"] = size
        else:
            self._leave_out("size")
        return True

    def _rename(self, name: str, to: str) -> None:
        if name not in self.body:
            return
        self.body[to] = self.body.pop(name)
        if to == LATER_CAP:
            self.body[to] += self._where.thinking_tokens
            self.body.setdefault(EFFORT, LOWEST_EFFORT)

    def _make_room(self) -> None:
        if CAP in self.body:
            self.body[CAP] += self._where.thinking_tokens

    def _leave_out(self, name: str) -> None:
        self.body.pop(name, None)
        if name == "stream":
            self.body.pop("stream_options", None)

    def _fault(self, named: NamedField, detail: str) -> JobError:
        """Why the job fails: the person hears of what the job asked for, the operator of everything else."""
        own = CAP if named.name == LATER_CAP and CAP in self._asked else named.name
        if (own in self._asked and named.name != "model") or named.name in ("system", "image_url"):
            return InvalidInput(f"{detail}: the job asked for it", self._sentence(named))
        value = f" (it is {self.body.get(named.name)!r})"
        setting = SETTINGS.get(named.name)
        advice = (
            f"set {setting} to what this server and model take{value}" if setting else "the worker needs this field"
        )
        return OperatorFault(f"{detail}: {advice}")

    def _sentence(self, named: NamedField) -> str:
        offered = [value for value in values_offered(named) if value != self.body.get(named.name)]
        advice = f"use one of: {', '.join(offered)}" if offered else "leave it out, or change it"
        is_sound = named.name == "response_format" and isinstance(self._asked[named.name], str)
        name = "format" if is_sound else CAP if named.name == LATER_CAP else named.name
        return f"The input can't be used: this model doesn't take this `{name}`; {advice}."
