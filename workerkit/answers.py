"""What a model server answers, as it comes in: read generously, judged strictly.

The server is not trusted: each answer is capped in bytes, also when it is unpacked. Whatever carries the text of a
whole answer is read; what is half is never called done.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workerkit.errors import Document, FailJob, InvalidInput, JobError, OperatorFault, RetryJob
from workerkit.sentences import BROKE_OFF, CONTENT_RULES, NO_TEXT, ONLY_THOUGHT, TOO_LARGE, UNUSABLE

if TYPE_CHECKING:
    import aiohttp

WEB_PAGE = "a web page instead of an answer: does the URL lead to an API, and is /v1 missing in it?"


@dataclass(frozen=True)
class TextAnswer:
    text: str
    model: str
    tokens: int
    is_cut: bool = False  # at the cap of its tokens
    parts: Document = field(default_factory=dict)  # `prompt_tokens` and `completion_tokens`, if the server counts them


# ── bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────

GZIP_CODINGS, DEFLATE, UNSUPPORTED_CODINGS = (
    frozenset({"gzip", "x-gzip"}),
    "deflate",
    frozenset({"br", "zstd", "compress"}),
)
GZIP_MAGIC, GZIP_BITS, ZLIB_BITS, RAW_BITS = b"\x1f\x8b", 31, 15, -15
UNPACKED_AT_ONCE = 2**20


class Unpacker:
    """Unpacks an encoded answer in pieces of bounded size.

    Codings are compared as HTTP says, without case (RFC 9110, section 8.4). One that isn't registered, such as the
    `none` of some gateways, means that the bytes are as they are. Raises FailJob for those that can't be unpacked.
    """

    def __init__(self, content_encoding: str) -> None:
        named = [coding.strip().lower() for coding in content_encoding.split(",")]
        codings = [one for one in named if one in GZIP_CODINGS | UNSUPPORTED_CODINGS or one == DEFLATE]
        if len(codings) > 1 or UNSUPPORTED_CODINGS.intersection(codings):
            raise OperatorFault(f"an answer encoded as {' and '.join(codings)}, which was not asked for")
        self._coding = codings[0] if codings else ""
        self._decoder: zlib._Decompress | None = None
        self._packed = b""  # what isn't unpacked yet
        self._is_first = True

    @property
    def is_cut_off(self) -> bool:
        """Whether the end of what is encoded hasn't come yet."""
        return self._decoder is not None or (self._is_first and bool(self._packed))

    def unpack(self, piece: bytes) -> Iterator[bytes]:
        """Yields what a piece unpacks to, at most a megabyte at a time. Raises FailJob: it isn't encoded like that."""
        if not self._coding:
            yield piece
            return
        self._packed += piece
        while self._decoder or self._begin():
            assert self._decoder
            try:
                unpacked = self._decoder.decompress(self._packed, UNPACKED_AT_ONCE)
            except zlib.error:
                raise FailJob("an answer that isn't encoded as it says", UNUSABLE) from None
            self._packed = self._decoder.unconsumed_tail
            if self._decoder.eof:
                self._packed, self._decoder = self._decoder.unused_data, None
            if unpacked:
                yield unpacked
            if not self._packed and len(unpacked) < UNPACKED_AT_ONCE:  # else zlib may hold back more
                return

    def _begin(self) -> bool:
        """Whether another part begins in what has come; two bytes tell. A text of several parts is one text.

        It is unknown what follows the last part; other readers of gzip leave that out, too (RFC 1952, section 2.2).
        """
        if len(self._packed) < len(GZIP_MAGIC) or not (self._is_first or self._is_another_part()):
            self._packed = self._packed[: len(GZIP_MAGIC)]
            return False
        is_zlib = self._packed[0] & 15 == zlib.DEFLATED and int.from_bytes(self._packed[:2], "big") % 31 == 0
        bits = GZIP_BITS if self._coding in GZIP_CODINGS else ZLIB_BITS if is_zlib else RAW_BITS
        self._decoder, self._is_first = zlib.decompressobj(bits), False
        return True

    def _is_another_part(self) -> bool:
        return self._coding in GZIP_CODINGS and self._packed.startswith(GZIP_MAGIC)


def first_letter(data: bytes) -> bytes:
    return data.removeprefix(codecs.BOM_UTF8).lstrip()[:1]


def is_web_page(data: bytes) -> bool:
    return first_letter(data) == b"<"


def is_json(data: bytes) -> bool:
    return first_letter(data) in (b"{", b"[")


def load_json(data: bytes) -> Any:
    """What JSON holds. Bytes that aren't UTF-8 are replaced. Raises ValueError, RecursionError: it is no JSON."""
    return json.loads(data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace"))


def parse_json(data: bytes) -> Any:
    """The answer's JSON. Raises OperatorFault: it is a web page. ValueError, RecursionError: it is no JSON."""
    if is_web_page(data):
        raise OperatorFault(WEB_PAGE)
    return load_json(data)


class Answer:
    """A provider's answer as it comes in, up to so many bytes of content. `key` is the one that was sent to it."""

    def __init__(self, response: aiohttp.ClientResponse, max_bytes: int, key: str = "") -> None:
        self.status, self.headers, self.key = response.status, response.headers, key
        self._unpacker = Unpacker(response.headers.get("content-encoding", ""))
        self._content, self._max_bytes, self._count = response.content, max_bytes, 0
        self._unpacked: Iterator[bytes] = iter(())

    async def piece(self) -> bytes:
        """What has come in meanwhile, or nothing at the end. Raises FailJob: the answer is too large."""
        while not (piece := next(self._unpacked, b"")):
            if not (raw := await self._content.readany()):
                return b""
            self._unpacked = self._unpacker.unpack(raw)
        self._count += len(piece)
        if self._count > self._max_bytes:
            raise FailJob(f"an answer of over {self._max_bytes} bytes", TOO_LARGE)
        return piece

    async def read(self, beginning: bytes = b"") -> bytes:
        """All of it. Raises RetryJob: it is encoded, and the end of that is missing."""
        pieces = [beginning]
        while piece := await self.piece():
            pieces.append(piece)
        if self._unpacker.is_cut_off:
            raise RetryJob("an encoded answer that is cut off", BROKE_OFF)
        return b"".join(pieces)

    async def json(self) -> Any:
        return parse_json(await self.read())


# ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────

LAST_EVENT = b"[DONE]"
OTHER_FIELDS = (b":", b"event:", b"id:", b"retry:")
MAX_MODEL_CHARACTERS, MAX_TOKENS = 200, 2**31
MAX_TEXT_CHARACTERS = 4_000_000  # at up to four bytes each, a document can just hold them
MAX_LINE_BYTES = 4 * MAX_TEXT_CHARACTERS


class EventReader:
    """Finds server-sent events in a stream of bytes (HTML standard, 9.2.6), and takes only their `data`.

    aiohttp's own `readline` ends lines at LF alone, so a stream with CR would be one line without end
    (`test_aiohttps_lines_do_not_end_at_cr`).
    """

    def __init__(self) -> None:
        self.is_ended = False
        self.is_foreign = False  # whether something came that stands in no stream of events
        self._is_first = True
        self._line: list[bytes] = []  # the parts of a line whose end hasn't come yet
        self._line_bytes = 0
        self._data: list[bytes] = []
        self._ended_with_cr = False

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Yields the data of each event that ends in this piece, up to the provider's last one.

        Raises:
            FailJob: a line is too long.
        """
        for line in self._lines(piece):
            if line.startswith(b"data:"):
                self._data.append(line[6 if line.startswith(b"data: ") else 5 :])
            elif not line and self._data:
                data = b"\n".join(self._data)
                self._data.clear()
                self.is_ended = data.strip() == LAST_EVENT
                if self.is_ended:
                    return
                if data:
                    yield data
            elif line and not line.startswith(OTHER_FIELDS):
                self.is_foreign = True

    def finish(self) -> Iterator[bytes]:
        """Yields the event whose blank line is missing at the end of a stream. It may be cut off."""
        return self.feed(b"\n\n")

    def _lines(self, piece: bytes) -> list[bytes]:
        """The lines that end in this piece. A line ends with CR, LF or both, and both may be in different pieces."""
        if self._ended_with_cr:
            piece = piece.removeprefix(b"\n")
        self._ended_with_cr = piece.endswith(b"\r")
        *lines, rest = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        if lines:
            lines[0] = b"".join([*self._line, lines[0]])
            self._line, self._line_bytes = [], 0
            if self._is_first:
                lines[0], self._is_first = lines[0].removeprefix(codecs.BOM_UTF8), False
        self._line.append(rest)
        self._line_bytes += len(rest)
        if self._line_bytes > MAX_LINE_BYTES:
            raise FailJob(f"a line of over {MAX_LINE_BYTES} bytes in its stream", TOO_LARGE)
        return lines


WORD_IN_BRACKETS = re.compile(rb"\s*\[[A-Za-z _-]*\]\s*")


def parse_event(data: bytes) -> list[Document]:
    """The objects of an event. None for a ping, a null or a word such as `[PING]`, which carry no text.

    Raises ValueError: it is a broken object. Bytes that aren't UTF-8 are replaced, as the HTML standard says.
    """
    if data[:1] != b"{" and not is_json(data):
        return []
    try:
        found = load_json(data)
    except ValueError:
        if WORD_IN_BRACKETS.fullmatch(data):
            return []
        raise
    return [found] if isinstance(found, dict) else [one for one in found if isinstance(one, dict)]


def parse_documents(data: bytes) -> tuple[list[Any], bool]:
    """The objects of an answer that is JSON although a stream was asked for, and whether it is at its end.

    One object or a list is whole. Of objects on lines the last may be cut off, and the end is `[DONE]` as in a stream.
    """
    try:
        whole = load_json(data)
    except ValueError:
        *lines, last = [line for line in data.splitlines() if line.strip()]
        documents = [document for line in lines for document in parse_event(line)]
        with contextlib.suppress(ValueError):
            documents += parse_event(last)
        return documents, last.strip() == LAST_EVENT
    return whole if isinstance(whole, list) else [whole], True


# ── texts ────────────────────────────────────────────────────────────────────────────────────────────────────────

# Words for the reason why an answer ended, in lower case. Any other word means that it is whole.
NO_REASON = frozenset({"", "null", "none"})
BROKEN_REASONS = re.compile(
    r"(.*_)?error|failed?|abort(ed)?|cancell?ed|timeout|insufficient_system_resource|.*malformed.*"
)
FORBIDDEN_REASONS = re.compile(
    r"content_?filter(ed)?|guardrail_intervened|safety|recitation|blocklist|prohibited_content|spii|sensitive|refusal"
)
CUT_REASONS = re.compile(r"(model_)?length|model_context_window_exceeded|max_(output_|completion_|new_)?tokens")
PLAIN_REASON = re.compile(r"[a-z_]{1,40}")  # that may be logged: a server may send anything, as the prompt itself
THOUGHT_PARTS = frozenset({"thinking", "reasoning", "reasoning_content", "redacted_thinking"})


def text_of_part(part: object) -> str:
    """The text of a part. Thinking is none, and parts of other types, such as references, have none.

    Raises TypeError: it is no part of a message.
    """
    if not isinstance(part, dict) or not {"type", "text"} & part.keys():
        raise TypeError("a content that isn't text")
    text = None if part.get("type") in THOUGHT_PARTS else part.get("text")
    if not isinstance(text, str | None):
        raise TypeError("a part that isn't text")
    return text or ""


def has_thought_part(content: object) -> bool:
    parts = content if isinstance(content, list) else []
    return any(isinstance(part, dict) and part.get("type") in THOUGHT_PARTS for part in parts)


def prompt_and_answer(usage: Document) -> int | None:
    """The tokens of the prompt and of the answer together; None if they aren't counted."""
    asked, made = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return asked + made if isinstance(asked, int) and isinstance(made, int) else None


def total_tokens(usage: Document) -> int:
    """The tokens of a whole call; 0 if they aren't counted."""
    total = usage.get("total_tokens")
    total = prompt_and_answer(usage) if total is None else total
    return total if isinstance(total, int) and 0 < total < MAX_TOKENS else 0


def counted_parts(usage: Document) -> Document:
    """The tokens of the prompt and those of the answer, as far as they are counted."""
    parts = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    return {name: value for name, value in parts.items() if type(value) is int and 0 <= value < MAX_TOKENS}


def has_thinking_tokens(usage: Document) -> bool:
    """Whether tokens were spent on thinking: they are counted apart, or, as by Gemini, in the total alone."""
    details = usage.get("completion_tokens_details")
    counted = details.get("reasoning_tokens") if isinstance(details, dict) else None
    total, without = usage.get("total_tokens"), prompt_and_answer(usage)
    is_in_total = isinstance(total, int) and without is not None and total > without
    return is_in_total or (isinstance(counted, int) and counted > 0)


def text_of(content: object) -> str:
    """The text of a message, which is a string, null, or a list of parts. Raises TypeError: it is something else."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content] if content else []
    return "".join(part if isinstance(part, str) else text_of_part(part) for part in parts)


def finish_reason_of(choice: Document) -> str:
    """The word for why a text ended, in lower case; empty if it goes on. Raises TypeError: it is something else."""
    reason = choice.get("finish_reason") or ""
    if not isinstance(reason, str):
        raise TypeError("a finish_reason that isn't text")
    return "" if reason.lower() in NO_REASON else reason.lower()


MORE_ROOM = "the model used up its tokens by thinking; raise TEXT_THINKING_TOKENS (and TEXT_MAX_TOKENS, if it is set)"


class OnlyThought(OperatorFault):
    """The model used up its tokens before the first word of the answer."""


class Completion:
    """A text answer as it comes in. A server may send any types, so each one is checked."""

    def __init__(self, model: str) -> None:
        self._model, self._tokens, self._counted = model, 0, Document()
        self._parts: list[str] = []
        self.length = 0  # of the text so far, in characters
        self._has_begun = self._has_deltas = self._is_refused = self._has_thought = False
        self._reason = ""
        self._goes_on = False  # behind a finish_reason, which a few servers give with each piece
        self.is_marked_done = False  # by `[DONE]`, or since the answer was one whole object
        self.is_foreign = False  # whether something came that is no stream

    @property
    def has_text(self) -> bool:
        return bool(self._parts)

    @property
    def is_finished(self) -> bool:
        """Whether the server has said why the text ended, so that nothing of it can be missing."""
        return bool(self._reason) and not self._goes_on and not BROKEN_REASONS.fullmatch(self._reason)

    def add(self, chunk: Document) -> str:
        """Takes one event and returns its piece of the text.

        Raises:
            FailJob: the text is too long. TypeError, LookupError, AttributeError: the event has another shape.
        """
        self._note_figures(chunk)
        piece, reason, choices = "", "", chunk.get("choices")
        for choice in choices or ():
            index = choice.get("index")
            if not isinstance(index, int) or index == 0:
                piece += self._text_of_choice(choice)
                reason = finish_reason_of(choice) or reason
        self._has_begun |= bool(choices)
        self.length += len(piece)
        if self.length > MAX_TEXT_CHARACTERS:
            raise FailJob(f"a text of over {MAX_TEXT_CHARACTERS} characters", TOO_LARGE)
        if piece:
            self._parts.append(piece)
            self._goes_on |= bool(self._reason)
        if reason and not (self.is_finished and BROKEN_REASONS.fullmatch(reason)):  # a fault behind the end is none
            self._reason = reason
        return piece

    def _note_figures(self, chunk: Document) -> None:
        model, usage = chunk.get("model"), chunk.get("usage")
        if model != self._model and isinstance(model, str) and 0 < len(model) <= MAX_MODEL_CHARACTERS:
            self._model = model if model.isprintable() else self._model
        if isinstance(usage, dict):
            self._tokens = total_tokens(usage) or self._tokens
            self._counted |= counted_parts(usage)
            self._has_thought |= has_thinking_tokens(usage)

    def _text_of_choice(self, choice: Document) -> str:
        """The text of a choice. Some servers repeat the whole `message` behind the last delta, which is left out."""
        delta = choice.get("delta") or {}
        content = delta.get("content")
        if content:
            self._has_deltas = True
        elif not self._has_deltas:
            delta = choice.get("message") or delta
            content = delta.get("content") or choice.get("text")  # `text` is of the older completions interface
        self._is_refused |= isinstance(delta.get("refusal"), str) and bool(delta["refusal"])
        if not content or not isinstance(content, str):
            self._has_thought |= any(delta.get(name) for name in THOUGHT_PARTS) or has_thought_part(content)
        return text_of(content)

    @property
    def is_cut(self) -> bool:
        """Whether the server ended the text at its cap."""
        return bool(CUT_REASONS.fullmatch(self._reason))

    def whole(self, *, done_is_enough: bool = True) -> TextAnswer:
        """The answer, if it has come to its end.

        `done_is_enough` says whether `[DONE]` is an end where no finish_reason has come.

        Raises RetryJob: it broke off. FailJob: there is no usable text.
        """
        if fault := self._fault(done_is_enough):
            raise fault
        # A server may cut a character in two between pieces; UTF-16 joins its halves again.
        text = "".join(self._parts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return TextAnswer(text, self._model, self._tokens or len(self._parts), self.is_cut, self._counted)

    @property
    def _said_reason(self) -> str:
        """The reason for the log."""
        return self._reason if PLAIN_REASON.fullmatch(self._reason) else "of its own" if self._reason else "none"

    def _fault(self, done_is_enough: bool) -> JobError | None:
        if not self._has_begun:
            is_whole = self.is_marked_done or self.is_foreign
            return FailJob("no text in it", UNUSABLE) if is_whole else RetryJob("it ended before its text", BROKE_OFF)
        if FORBIDDEN_REASONS.fullmatch(self._reason) or (self._is_refused and not self._parts):
            refusal = " with a refusal" if self._is_refused else ""
            return InvalidInput(f"finish_reason {self._said_reason}{refusal}", CONTENT_RULES)
        is_ended = self._reason or (self.is_marked_done and done_is_enough)
        if not is_ended or BROKEN_REASONS.fullmatch(self._reason):
            return RetryJob("the stream ended without a good finish_reason: half a text", BROKE_OFF)
        if self._parts:
            return None
        if self.is_cut and self._has_thought:
            return OnlyThought(f"finish_reason {self._reason} before the first word: {MORE_ROOM}", ONLY_THOUGHT)
        return FailJob(f"an empty text, finish_reason {self._said_reason}", NO_TEXT)
