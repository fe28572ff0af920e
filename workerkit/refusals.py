"""What a refusal of a model server means, whatever its form and wherever it appears: one table for all of them.

A refusal is an HTTP body of any shape, an error within an answer of status 200, or one in a stream. Its words are
matched against closed keywords, after every text that the worker sent has been cut out of them, since servers repeat
prompts. They are never shown or logged.
"""

from __future__ import annotations

import email.utils
import html
import json
import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property
from itertools import islice
from typing import Any

from workerkit import sentences
from workerkit.errors import Document, FailJob, InvalidInput, JobError, OperatorFault, ProviderAway, RetryJob

# ── texts and numbers ────────────────────────────────────────────────────────────────────────────────────────────

MAX_WAIT_CHARACTERS = 40
MIN_WAIT_S, MAX_WAIT_S = 1.0, 30 * 86_400.0  # four tries never pass within a second
UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
SPAN = r"([\d.]{1,20}) ?(ms|milli|m(?!o)|[dhs])[a-z]{0,10}"
SPANS = re.compile(rf"{SPAN}(?:,? ?{SPAN}){{0,4}}")


def seconds_of(value: object) -> float | None:
    """The seconds of `7`, `"7.5"`, `"34s"`, `"1m2.5s"` or `"350ms"`; None for anything else."""
    text = str(value).strip().lower() if isinstance(value, (int, float, str)) and not isinstance(value, bool) else ""
    if len(text) > MAX_WAIT_CHARACTERS:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return min(float(text), MAX_WAIT_S)
    if not SPANS.fullmatch(text):
        return None
    try:
        seconds = [float(number) * UNITS_S.get(unit, UNITS_S["ms"]) for number, unit in re.findall(SPAN, text)]
    except ValueError:
        return None
    return min(sum(seconds), MAX_WAIT_S)


def status_of(value: object) -> int:
    """The HTTP status that an error's code is, or 0."""
    text = str(value) if isinstance(value, (int, str)) else ""
    return int(text) if re.fullmatch(r"[45]\d\d", text) else 0


def parsed(text: str | bytes) -> Any:
    """The JSON in a text, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# ── what a body holds ────────────────────────────────────────────────────────────────────────────────────────────

CODE_KEYS = frozenset({"code", "type", "status", "errorcode"})  # alone, or behind another word and `_`
FIELD_KEYS = frozenset({"param", "parameter", "argument", "property", "loc", "field", "path", "instancepath"})
WAIT_KEYS = frozenset({"retrydelay", "retry_after", "estimated_time"})
MESSAGE_KEYS = re.compile(r"message|msg|error|detail|description|reason|raw|title")
# What repeats the request, or leads elsewhere.
IGNORED_KEYS = frozenset({"input", "ctx", "url", "documentation_url", "flagged_input"})
IGNORED_KEYS |= {"prompt", "messages", "request", "body"}
MAX_VALUES, MAX_MESSAGE_CHARACTERS = 1000, 20_000  # of an error
ERROR_KEYS = ("message", "detail", "error_message", "error_msg", "msg")  # of an error that has no `error`


@dataclass
class Refusal:
    """What an error says, as far as it can be told: `status` is 0 where an answer of status 200 names none."""

    status: int
    codes: list[str] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    wait_s: float | None = None

    def take(self, key: str, value: object) -> None:
        """Takes a value that isn't an object or a list."""
        if key in WAIT_KEYS:
            self.wait_s = self.wait_s or seconds_of(value)
        elif key in FIELD_KEYS and isinstance(value, str):
            self.fields.append(value)
        elif isinstance(value, str) and (key == "reason" or key.rpartition("_")[2] in CODE_KEYS):
            self.codes.append(value)
        elif isinstance(value, str) and MESSAGE_KEYS.search(key):
            rest = MAX_MESSAGE_CHARACTERS - sum(map(len, self.messages))
            self.messages += [value[:rest]] if rest > 0 else []
        if self.status == 0 and key in ("code", "status", "status_code") and (status := status_of(value)):
            self.status = status


def values_of(document: object) -> Iterator[tuple[str, object]]:
    """The texts and numbers of an error, each with the key under which it stands. Their number is bounded."""
    waiting: deque[tuple[str, object]] = deque([("error", document)])
    for _ in range(MAX_VALUES):
        if not waiting:
            return
        key, value = waiting.popleft()
        if isinstance(value, dict):
            named = ((str(name).lower(), one) for name, one in islice(value.items(), MAX_VALUES))
            waiting.extend(item for item in named if item[0] not in IGNORED_KEYS)
        elif isinstance(value, (list, tuple)):
            waiting.extend((key, one) for one in value[:MAX_VALUES])
        elif isinstance(value, str) and value.lstrip()[:1] in ("{", "[") and (inner := parsed(value)) is not None:
            waiting.append((key, inner))  # an error of a server behind this one, as text
        else:
            yield key, value


def read_refusal(status: int, body: object) -> Refusal:
    """What an error says: its body in bytes, or the object in a stream. A web page says nothing but its status."""
    refusal = Refusal(status)
    if isinstance(body, bytes):
        text = body.decode("utf-8", "replace").lstrip("\ufeff \r\n\t")
        document = parsed(text)
        if document is None:
            refusal.messages += [] if text.startswith("<") else [text[:MAX_MESSAGE_CHARACTERS]]
            return refusal
        body = document
    for key, value in values_of(body):
        refusal.take(key, value)
    return refusal


def is_error(document: object) -> bool:
    """Whether an object in an answer of status 200 is an error."""
    if not isinstance(document, dict):
        return False
    if document.get("error"):
        return True
    if choices := document.get("choices"):  # as nearly every event of a text has
        first = choices[0] if isinstance(choices, list) else None
        return isinstance(first, dict) and bool(first.get("error"))
    if "error" in (document.get("object"), document.get("type"), document.get("status")):
        return True
    has_content = any(document.get(key) for key in ("data", "images", "usage"))
    return not has_content and any(isinstance(document.get(key), str) for key in ERROR_KEYS)


# ── how long to wait ─────────────────────────────────────────────────────────────────────────────────────────────

TRY_AGAIN = re.compile(rf"(?:try again|retry|wait) (?:(?:in|after|for) )?({SPANS.pattern})")


def seconds_until(date: str, server_date: str) -> float | None:
    """The seconds until an HTTP date, by the server's own clock where its answer has that."""
    try:
        at = email.utils.parsedate_to_datetime(date)
    except (ValueError, OverflowError):
        return None
    try:
        now = email.utils.parsedate_to_datetime(server_date)
    except (ValueError, OverflowError):
        now = datetime.now(UTC)
    aware_at, aware_now = (moment if moment.tzinfo else moment.replace(tzinfo=UTC) for moment in (at, now))
    return min(max(0.0, (aware_at - aware_now).total_seconds()), MAX_WAIT_S)


def wait_asked_for(headers: Mapping[str, str], refusal: Refusal, said: str) -> float | None:
    """The seconds that the provider asks to wait, at least one; None if it asks for none.

    `retry-after-ms`, `Retry-After` (in seconds or as a date: RFC 9110, section 10.2.3), else what the error says:
    `said` are the words of its messages.
    """
    retry_after = headers.get("retry-after", "")
    in_ms = seconds_of(headers.get("retry-after-ms", ""))
    in_words = TRY_AGAIN.search(said)
    found = (
        None if in_ms is None else in_ms / 1000,
        seconds_of(retry_after),
        seconds_until(retry_after, headers.get("date", "")),
        refusal.wait_s,
        seconds_of(in_words[1]) if in_words else None,
    )
    wait_s = next((one for one in found if one is not None and math.isfinite(one)), None)
    return None if wait_s is None else max(MIN_WAIT_S, wait_s)


# ── words ────────────────────────────────────────────────────────────────────────────────────────────────────────

CUT, END, SHINGLE = "·", "|", 3
MAX_SENT_WORDS, MAX_CUT_WORDS = 200_000, 50
NONE: frozenset[str] = frozenset()
THOUSANDS = re.compile(r"(?<=\d)[,_](?=\d{3}\b)")
TIMES = re.compile(r"(?<=\d) ?[×*x] ?(?=\d)")  # between the sides of a size
ESCAPE = re.compile(r"\\+(?:u([0-9a-fA-F]{4})|[nrt])")
WORD = re.compile(r"\w+(?:\.\d\w*)*|[.;!?](?=\s|$)|\n")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, and `|` where a sentence ends. Text escaped for JSON or HTML has the same."""
    unescaped = ESCAPE.sub(lambda found: chr(int(found[1], 16)) if found[1] else "\n", html.unescape(text))
    words = WORD.findall(TIMES.sub("x", THOUSANDS.sub("", unescaped.lower())))
    return [END if word[0] in ".;!?\n" else word for word in words]


def strings_of(value: object) -> Iterator[str]:
    """Every text in a request, but for pictures, and words of the interface that a message may need."""
    if isinstance(value, str):
        if not value.startswith("data:"):
            yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            if key not in ("role", "type"):
                yield from strings_of(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from strings_of(one)


def letters_of(text: str) -> str:
    """Letters and digits in lower case, without what stands between them."""
    return re.sub(r"[\W_]+", "", text.lower())


class Sent:
    """The texts of a request, to be cut out of what the server says about it.

    A server may repeat a part of a prompt, so three words in a row that the request has are cut as well. The part may
    begin and end within a word.
    """

    def __init__(self, request: Document, key: str = "") -> None:
        self.request, self._key = request, key
        self._short: set[tuple[str, ...]] = set()
        self._followers: dict[tuple[str, str], set[str]] = {}
        self._leaders: dict[tuple[str, str], set[str]] = {}
        for text in strings_of(request):
            words = [word for word in words_of(text)[:MAX_SENT_WORDS] if word != END]
            if 0 < len(words) < SHINGLE:
                self._short.add(tuple(words))
            for first, second, third in zip(words, words[1:], words[2:], strict=False):
                self._followers.setdefault((first, second), set()).add(third)
                self._leaders.setdefault((second, third), set()).add(first)

    def cut(self, text: str) -> str:
        """The words of a message that the request doesn't have, separated by blanks."""
        found = words_of(text)
        places = [place for place, word in enumerate(found) if word != END]
        words = [found[place] for place in places]
        for at in self._echoes(words):
            found[places[at]] = CUT
        return " ".join(found)

    def _echoes(self, words: list[str]) -> Iterator[int]:
        """The places of the words that repeat the request."""
        for size in (1, 2):
            for at in range(len(words) - size + 1):
                if tuple(words[at : at + size]) in self._short:
                    yield from range(at, at + size)
        for at, (first, second, third) in enumerate(zip(words, words[1:], words[2:], strict=False)):
            followers, leaders = self._followers.get((first, second), NONE), self._leaders.get((second, third), NONE)
            is_cut_behind = any(word.startswith(third) for word in islice(followers, MAX_CUT_WORDS))
            is_cut_before = any(word.endswith(first) for word in islice(leaders, MAX_CUT_WORDS))
            if third in followers or is_cut_behind or is_cut_before:
                yield from range(at, at + SHINGLE)

    @cached_property
    def _letters(self) -> str:
        return " ".join(map(letters_of, (*strings_of(self.request), self._key)))

    def holds(self, token: str) -> bool:
        """Whether a token stands in what was sent, however its words are joined."""
        return letters_of(token) in self._letters


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────


class Cause(StrEnum):
    CONTENT = "content rules"
    TOO_LONG = "too long"
    MONEY = "quota or money"
    KEY = "key"
    MODEL = "model"
    SETUP = "the server's own settings"
    LOADING = "the model is loading"
    PLACE = "URL"
    FIELD = "a field"
    BUSY = "busy"
    UNKNOWN = "unknown"


IN_ANSWER = 0  # the status of an error in an answer of status 200 that names none
BUSY_STATUSES = frozenset({IN_ANSWER, 408, 409, 424, 425, 429, 498, 499})
BAD_REQUESTS = frozenset({IN_ANSWER, *range(400, 500)}) - (BUSY_STATUSES - {IN_ANSWER})


@dataclass(frozen=True)
class Row:
    """One cause: the words of its codes and messages, and the statuses with which these have that meaning."""

    cause: Cause
    statuses: frozenset[int]
    words: re.Pattern[str]


def row(cause: Cause, statuses: Iterable[int], *words: str) -> Row:
    return Row(cause, frozenset(statuses), re.compile(r"\b(?:" + "|".join(words) + r")\b"))


NEAR = r"(?: [^| ]+){0,6} "
SOON = r"(?: [^| ]+){0,4} "
TABLE = (
    row(
        Cause.CONTENT,
        BAD_REQUESTS | {500},
        r"content (?:policy|management|filter\w*|moderation|exists risk|safety|blocked|violat\w+)",
        r"(?:responsible ai|responsibleai)\w*|moderation\w*|flagged|prohibited (?:content|use)",
        r"safety (?:system|filter\w*|setting\w*|polic\w+|reasons?|guidelines?)|usage (?:polic\w+|guidelines?)",
        rf"(?:violat\w+|against){NEAR}(?:polic\w+|terms|rules|guidelines?)",
        r"sensitive (?:content|words?|information)|data inspection failed|inappropriate content",
        r"\w*(?:敏感|不安全|违规)\w*",
    ),
    row(
        Cause.TOO_LONG,
        BAD_REQUESTS - {402} | {500},
        r"context (?:length|window|size)|maximum context|max context|exceed context size|range of input length",
        r"too many (?:input |prompt )?tokens|string (?:above max length|too long)|should have at most \d+ characters",
        r"(?:request|prompt|input|messages?|payload|entity|text|body|query) (?:is |are )?too (?:long|large|big)",
        rf"reduce{NEAR}(?:length|messages|prompt|input|size)|maximum (?:input|prompt|allowed|model)? ?length",
        rf"(?:input|prompt){NEAR}(?:tokens|characters|length){NEAR}exceed\w*",
        rf"exceed\w*{NEAR}(?:token|input|character) limit|(?:token|input|character)s? limit{SOON}?exceed\w*",
        rf"(?:tokens|input|prompt|length){NEAR}exceeds?{NEAR}(?:maximum|limit|allowed)",
        rf"(?:inputs?|prompt){NEAR}(?:less|fewer|more) than \d+ (?:tokens|characters)|inputs? tokens{NEAR}must be",
    ),
    row(Cause.TOO_LONG, {429}, r"request too large|tokens must be reduced"),
    row(
        Cause.MONEY,
        BAD_REQUESTS | {429},
        rf"insufficient{SOON}?(?:quota|balance|funds?|credits?)|billing\w*|arrear\w*|payment required",
        rf"(?:exceed\w*|reached|out of|over){NEAR}(?:quota|credits?|balance|budget)|quota (?:exceeded|exhausted)",
        r"current quota|credit balance|(?:not enough|more|no|any) (?:credits?|balance)|spend\w* limit",
        rf"(?:balance|quota|credits?|funds){SOON}?(?:insufficient|exhausted|depleted|used up|too low)|\w*overdue\w*",
        r"budget (?:has been )?exceeded|\w*(?:余额不足|额度不足|欠费)\w*",
    ),
    row(
        Cause.KEY,
        BAD_REQUESTS,
        r"(?:api|access|subscription|auth\w*|bearer|virtual) ?(?:key|token)\w*|authentication\w*|credentials?",
        r"unauthori[sz]ed|unauthenticated|permission denied|access denied|account (?:is )?(?:disabled|suspended)",
        r"no (?:connected )?db(?: connection)?",  # of LiteLLM, to a key that isn't its master's
        rf"(?:location|country|region){SOON}?not supported|unsupported (?:location|country|region)",
    ),
    row(
        Cause.MODEL,
        BAD_REQUESTS,
        r"(?:no such|unknown|invalid|unsupported) (?:model|deployment)(?! param| arg| field)",
        r"not a (?:valid|supported|known|chat) model",
        r"(?:model|deployment) ?not ?(?:found|exist|available)",
        rf"models?{SOON}?(?:not|doesn t) (?:found|exist\w*|available|installed|loaded|recogni[sz]ed)",
        rf"models?{SOON}?(?:deprecated|decommissioned|retired|discontinued|shut ?down|removed|disabled)",
        r"model (?:is )?(?:not supported|unavailable|invalid)|(?:not|doesn t) support (?:chat|completions?|generate)",
        rf"(?:failed|unable) to (?:load|access|find){SOON}?model",
        rf"no (?:models?|endpoints?){SOON}?(?:found|available|loaded)",
    ),
    row(Cause.MODEL, {404, 410}, r"models?|deployments?"),
    row(
        Cause.PLACE,
        BAD_REQUESTS,
        r"api version|invalid url|(?:unexpected|unknown|invalid|no such|no) (?:endpoint|route|path)|route not found",
    ),
    row(Cause.BUSY, {400, 403}, r"rate ?limit\w*|throttl\w*|too many requests|overloaded"),
    row(Cause.SETUP, {500, 501, 503}, rf"(?:not|isn t|no){SOON}?(?:configured|installed)|not found on the server host"),
    row(
        Cause.LOADING,
        {503},
        r"(?:still |being )?(?:loading|loaded|pulled|downloading|starting|warming|booting)|initiali[sz]\w+|spinning up",
        r"(?:not|isn t) (?:yet )?ready|cold (?:start|boot)\w*|estimated time",
    ),
)
AWAY_STATUSES = frozenset({502, 503, 504, *range(520, 525)})  # of a proxy in front of the provider
PROXY_LOGIN = 407
BY_STATUS = {
    **dict.fromkeys((401, 403, PROXY_LOGIN), Cause.KEY),
    **dict.fromkeys((404, 405, 410), Cause.PLACE),
    402: Cause.MONEY,
    413: Cause.TOO_LONG,
    451: Cause.CONTENT,
}
BAD_REQUEST_CODES = re.compile(
    r"\b(?:bad ?request|invalid (?:request|argument|parameter|input|value)|validation|unsupported)\w*"
)
EXCEPTION = re.compile(r"\b[A-Z][a-z]+(?:[A-Z][a-z]+){1,6}(?:Error|Exception)\b")


def words_of_code(code: str) -> str:
    """A code as words: `content_policy_violation` and `DeploymentNotFound` alike."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", code)
    return " ".join(re.findall(r"[a-z0-9]+", spaced.lower()))


@dataclass(frozen=True)
class Words:
    """What a refusal says, as words: its codes, and its messages without what the request has."""

    codes: str
    said: str

    @property
    def spaced(self) -> str:
        """Codes and messages, with blanks within names such as `image_url`."""
        return f"{self.codes} | {self.said}".replace("_", " ")

    @classmethod
    def of(cls, refusal: Refusal, sent: Sent) -> Words:
        """The classes of exceptions that messages name, as LiteLLM's do, count as codes."""
        named = {name for message in refusal.messages for name in EXCEPTION.findall(message) if not sent.holds(name)}
        codes = " | ".join(map(words_of_code, (*refusal.codes, *sorted(named))))
        return cls(codes, " | ".join(map(sent.cut, refusal.messages)))


def fitting_row(status: int, words: str) -> Cause | None:
    """The cause of the first row of the table that fits these words of a refusal."""
    words = words.replace("_", " ")
    return next((one.cause for one in TABLE if status in one.statuses and one.words.search(words)), None)


# ── a named field ────────────────────────────────────────────────────────────────────────────────────────────────

CAP, LATER_CAP = "max_tokens", "max_completion_tokens"
CAP_NAMES = (CAP, LATER_CAP, "max_new_tokens", "max_output_tokens")
NEEDED = ("model", "messages", "prompt", "input")
ROLES = ("system", "messages")
PICTURE_FIELD = "image_url"  # of a message
CONTAINERS = ("body", "generation_config", "generationConfig", "parameters")
NAMED_STATUSES = frozenset({IN_ANSWER, 400, 404, 415, 422})
# Words that are common in any message. Only right beside a complaint do they name a field.
COMMON_WORDS = frozenset(
    {"stream", "streaming", "stop", "seed", "size", "quality", "n", "voice", "speed", "format", "formats"}
)
COMPLAINT = (
    r"(?:not|isn t|doesn t|don t|cannot|can t|unsupported|unknown|unrecogni[sz]ed|unexpected|invalid|extra|forbidden"
    r"|must|should|only|too|exceeds?|deprecated|required|missing|expected|one of|out of range|greater|less|larger)"
)
OTHER_NAMES: dict[tuple[str, type], list[str]] = {
    ("response_format", str): ["format", "formats"],  # of a sound
    ("reasoning_effort", str): ["thinking level"],
    ("stream", bool): ["streaming"],
}
# What is said about the pictures of a request: that the model can't see, or that one can't be fetched or read.
PICTURE = r"(?:image|picture|vision|multimodal)\w*"
NO = r"(?:not|isn t|doesn t|don t|cannot|can t|no|only|unknown|unsupported|missing|at most 0)"
NO_EYES = re.compile(
    rf"\b(?:{NO}{SOON}{PICTURE}|{PICTURE}{SOON}{NO}|content must be (?:an? )?(?:\w+ )?(?:string|text)"
    r"|should be a valid string)\b"
)
BAD_PICTURE = re.compile(
    rf"\b(?:(?:download|fetch)\w*|(?:retriev|access|load|open|decod|process|pars|identify|read)\w*{SOON}{PICTURE}"
    rf"|{PICTURE}{SOON}(?:formats?|size|dimensions?|pixels|too|exceed\w*|corrupt\w*|invalid)"
    rf"|(?:invalid|corrupt\w*|too many) {PICTURE}|unsupported {PICTURE}(?! (?:input|content))"
    rf"|at most [1-9]\d* {PICTURE})\b"
)
ROLE = r"(system|developer|assistant|conversation|last) (?:roles?|messages?|prompts?|instructions?)"
ROLE_FAULT = re.compile(rf"\b(?:{ROLE}{SOON}?{COMPLAINT}|{COMPLAINT}{SOON}?{ROLE})\b")
VALUE_FAULT = re.compile(
    r"\b(?:(?:unsupported|invalid) value|must be|should be|supported values?|expected|one of|at (?:most|least)"
    r"|less than|greater|larger|too (?:large|big|high|low|small)|exceeds?|range|maximum|literal error|enum"
    r"|only the default)\b"
)


@dataclass(frozen=True)
class NamedField:
    """A field of the request that the server complains about."""

    name: str
    is_value: bool  # whether the complaint is about its value, so that another value may do
    words: str  # of the complaint, without what the request has; never shown


def root_of(path: str) -> str:
    """`messages` of `messages[0].content`, or `max_tokens` of `body.max_tokens`."""
    names = [name for name in re.findall(r"[A-Za-z_]\w*", path) if name not in CONTAINERS]
    return names[0] if names else ""


def aliases(name: str, value: object) -> list[str]:
    """The names that a server may have for a field of a request, in lower case."""
    names = CAP_NAMES if name in (CAP, LATER_CAP) else (name,)
    others = OTHER_NAMES.get((name, type(value)), [])
    return [form for one in names for form in (one, one.replace("_", ""), one.replace("_", " "))] + others


def messages_of(request: Mapping[str, Any]) -> list[Any]:
    messages = request.get("messages")
    return [one for one in messages if isinstance(one, Mapping)] if isinstance(messages, list) else []


def names_in(words: str, request: Mapping[str, Any]) -> Iterator[str]:
    """The fields of a request that a message complains about, in the order of the request; `system` for that role."""
    for name, value in request.items():
        names = aliases(name, value)
        own, common = (
            "|".join(one for one in names if (one in COMMON_WORDS) is is_common) for is_common in (False, True)
        )
        beside = rf"(?:{common}){SOON}?{COMPLAINT}|{COMPLAINT}{SOON}?(?:{common})" if common else ""
        pattern = "|".join(filter(None, (own, beside)))
        if name not in NEEDED and re.search(rf"\b(?:{pattern})\b", words):
            yield name
    roles = [message["role"] for message in messages_of(request)]
    if len(roles) > 1 and ROLE_FAULT.search(words):
        yield "system" if "system" in roles else "messages"


def find_picture(refusal: Refusal, words: Words, request: Mapping[str, Any]) -> NamedField | None:
    """A picture of the job that the server complains about: the picture itself, or that there is one."""
    if not any(isinstance(message.get("content"), list) for message in messages_of(request)):
        return None
    said = words.spaced
    if refusal.status in NAMED_STATUSES and BAD_PICTURE.search(said):
        return NamedField(PICTURE_FIELD, True, words.said)
    if refusal.status in NAMED_STATUSES | {500} and NO_EYES.search(said):  # llama.cpp says so with status 500
        return NamedField(PICTURE_FIELD, False, words.said)
    return None


def find_field(refusal: Refusal, words: Words, request: Mapping[str, Any]) -> NamedField | None:
    """The field that a refusal names, by `param`, by `loc`, or in its message. Only one that was sent counts."""
    if named := find_picture(refusal, words, request):
        return named
    if refusal.status not in NAMED_STATUSES:
        return None
    changeable = [(name, value) for name, value in request.items() if name == "model" or name not in NEEDED]
    known = {alias: name for name, value in changeable for alias in aliases(name, value)}
    structured = (known.get(root_of(path).lower()) for path in refusal.fields)
    name = next((name for name in (*structured, *names_in(f"{words.said} | {words.codes}", request)) if name), None)
    if name is None:
        return None
    return NamedField(name, bool(VALUE_FAULT.search(words.spaced)), words.said)


# ── what it means ────────────────────────────────────────────────────────────────────────────────────────────────

# Fields of the interface, whether they were sent or not.
FIELDS = frozenset({*CAP_NAMES, *NEEDED, "temperature", "top_p", "stop", "seed", "response_format", "reasoning_effort"})
FIELDS |= {"stream", "stream_options", "size", "quality", "n", "voice", "speed", "tools", "logprobs", "instructions"}
FIELDS |= {"logit_bias", "top_k", "top_logprobs", "frequency_penalty", "presence_penalty", "user", "tool_choice"}
SAFE_TOKEN = re.compile(r"[A-Za-z]{2,30}(?:[_.][A-Za-z]{1,30}){0,6}|[1-9]\d{2,4}")  # hardly a key looks like that
ADVICE = {
    Cause.KEY: "check the provider's key ({kind}_API_KEY or OPENAI_API_KEY), and what it is allowed to do",
    Cause.MONEY: "the provider's quota or money is used up: check its plan and billing",
    Cause.MODEL: "the provider doesn't offer this model: set {kind}_MODEL to one that it lists",
    Cause.PLACE: "check the URL ({kind}_BASE_URL or OPENAI_BASE_URL; is /v1 missing?) and {kind}_MODEL",
    Cause.SETUP: "the server itself isn't set up: see its own log and settings",
    Cause.UNKNOWN: "refused for a reason that isn't known here; the provider's own log may say more",
}
CHECK_PROXY = "check the proxy's user and password, and whether it lets requests to the provider pass"


class FieldRefused(FailJob):
    """The provider refuses a field of the request; the negotiation decides what becomes of it."""

    def __init__(self, named: NamedField, detail: str, otherwise: JobError | None = None) -> None:
        super().__init__(detail, sentences.REFUSED)
        self.named, self.otherwise = named, otherwise  # what it means if the field can't be changed, if that is known


class Unexplained(OperatorFault):
    """The provider refuses the request, and it isn't known why. Nobody is blamed."""

    default_sentence = sentences.REFUSED
    is_operators = False


class ModelGone(OperatorFault):
    """The provider doesn't offer the model that was asked for."""


def safe_tokens(refusal: Refusal, sent: Sent) -> list[str]:
    """Codes and types that may be logged: plain words that are no part of what was sent."""
    found = [token for token in refusal.codes if SAFE_TOKEN.fullmatch(token) and not sent.holds(token)]
    found = [token for token in found if token != str(refusal.status)]
    return list(dict.fromkeys(found))[:3]


def describe(refusal: Refusal, sent: Sent) -> str:
    """Status, codes and types for the log."""
    status = f"HTTP {refusal.status}" if refusal.status else "an error in an answer of status 200"
    fields = [root for path in refusal.fields if (root := root_of(path)) in FIELDS | sent.request.keys()]
    return " ".join([status, *safe_tokens(refusal, sent), *(f"param {root}" for root in fields[:1])])


def longest_allowed(words: Words) -> str:
    """The most characters that the provider takes, as it says; or an empty string."""
    found = re.search(r"at most (\d{2,7}) characters", words.said)
    return sentences.at_most_characters(found[1]) if found else ""


def with_status(refusal: Refusal) -> Refusal:
    """An error of status 200 that is about the request gets the status that it should have had."""
    codes = " | ".join(map(words_of_code, refusal.codes))
    return replace(refusal, status=400) if refusal.status == IN_ANSWER and BAD_REQUEST_CODES.search(codes) else refusal


def by_status(status: int) -> Cause:
    """What a status means for which no words are known."""
    if status in BUSY_STATUSES or status >= 500:
        return Cause.BUSY
    return BY_STATUS.get(status, Cause.UNKNOWN if 400 <= status < 500 else Cause.PLACE)


def is_weaker(cause: Cause | None, named: NamedField) -> bool:
    """Whether a cause that only a message's words tell counts less than the field that is named.

    The words for a long input and for a model are also those of complaints about a field.
    """
    if named.name == PICTURE_FIELD:
        return cause is not Cause.CONTENT
    return cause is None or (cause in (Cause.TOO_LONG, Cause.MODEL) and named.name not in ROLES)


def find_cause(refusal: Refusal, words: Words, named: NamedField | None, wait_s: float | None) -> Cause:
    """Codes count first, then a named field, messages and the status.

    A quota that no code names, and that comes with a wait, is one for each minute.
    """
    if cause := fitting_row(refusal.status, words.codes):
        return cause
    cause = fitting_row(refusal.status, words.said)
    if named and named.name == "model":
        return cause or Cause.MODEL
    if named and is_weaker(cause, named):
        return Cause.FIELD
    if cause is Cause.MONEY and refusal.status == 429 and wait_s is not None:
        return Cause.BUSY
    return cause or by_status(refusal.status)


def error_of(cause: Cause, refusal: Refusal, detail: str, kind: str, wait_s: float | None, longest: str) -> JobError:
    match cause:
        case Cause.CONTENT:
            return InvalidInput(f"{detail}: {cause}", sentences.CONTENT_RULES)
        case Cause.TOO_LONG:
            return InvalidInput(f"{detail}: {cause}", sentences.TOO_LONG + longest)
        case Cause.LOADING:
            return ProviderAway(f"{detail}: {cause}", sentences.STARTING, wait_s, is_counted=False)
        case Cause.BUSY:
            away = refusal.status in AWAY_STATUSES
            return (ProviderAway if away else RetryJob)(detail, RetryJob.default_sentence, wait_s)
        case Cause.UNKNOWN:
            return Unexplained(f"{detail}: {ADVICE[cause]}")
        case Cause.MODEL:
            return ModelGone(f"{detail}: {ADVICE[cause].format(kind=kind.upper())}")
    if refusal.status == PROXY_LOGIN:
        return OperatorFault(f"{detail}: {CHECK_PROXY}")
    return OperatorFault(f"{detail}: {ADVICE[cause].format(kind=kind.upper())}")


def judge(refusal: Refusal, request: Document, kind: str, headers: Mapping[str, str], key: str = "") -> JobError:
    """What a refusal of a request means for the job.

    `kind` is text, image or audio, for the names of settings. `key` is the provider's, which a server may repeat.
    """
    refusal, sent = with_status(refusal), Sent(request, key)
    words = Words.of(refusal, sent)
    wait_s, detail = wait_asked_for(headers, refusal, words.said), describe(refusal, sent)
    named = find_field(refusal, words, request)
    cause = find_cause(refusal, words, named, wait_s)
    if cause is Cause.FIELD and named:
        return FieldRefused(named, f"{detail} ({named.name})")
    error = error_of(cause, refusal, detail, kind, wait_s, longest_allowed(words))
    if cause is Cause.TOO_LONG and (cap := next((name for name in (CAP, LATER_CAP) if name in request), None)):
        return FieldRefused(NamedField(cap, True, words.said), f"{detail} ({cap})", error)  # a lower one may do
    return error
