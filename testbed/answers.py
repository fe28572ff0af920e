"""What the provider answers: texts, pictures and sounds, and whatever is wrong with them.

A prompt asks for faults by directives in brackets, since the prompt is the only part of a job that reaches the
provider:

    [delay 3]                    waits 3 s before it answers
    [tokens 50]                  number of words in the text
    [pace 0.02]                  seconds between the chunks of a stream
    [say some words]             the text is exactly these words
    [status 500]                 an error in OpenAI's form; [status 429 retry-after=1] adds that header
    [loading]                    a 503 that says that the model is loading
    [refuse max_tokens seed]     a 400 that names one of these fields, as long as the request has one of them;
                                 `as=detail` and the like says so in another form: REFUSALS has them all
    [gone some-model]            a 404 as long as the request asks for this model; `*` stands for any
    [redirect http://...]        a 302 that leads there
    [html]                       status 200 with a page of HTML
    [type text/plain]            another content type
    [hang]                       never answers
    [cut]                        cuts the connection in the middle of the answer
    [half]                       the answer ends in good order, but has neither a finish_reason nor [DONE]
    [finish length]              the finish_reason is this; without a word there is none, but [DONE]
    [think 50]                   this many words of thinking come before the text, within its cap
    [json] [json lines|list]     JSON although a stream was asked for: one object, or its events as lines or a list
    [drip] [drip 0.1]            one byte each second, or at this interval
    [linger 30]                  the connection stays open for 30 s after the last event of a stream
    [empty]                      no text, picture or sound in the answer
    [endless]                    the answer never ends
    [big 500]                    an answer of 500 MB
    [gzip 1000]                  a small compressed body that unpacks to 1000 MB
    [packed] [packed deflate]    the answer is encoded, by gzip or as this says
    [tiny 1000000]               a stream of this many events of one letter each
    [line 30]                    a stream with an event of 30 MB in one line
    [sse crlf|cr|pings|error|late|bare]
                                 other line ends, empty events and comments in between, an error in each event or
                                 behind the end, or no [DONE]
    [no-usage]                   no token counts
    [shape list|null|text|broken|types|edges|nan|deep|utf8|error]
                                 JSON that is not what the interface promises; SHAPES has them all
    [raw NAME]                   bytes that are not HTTP; RAW_ANSWERS has the names
    [notpicture] [truncated]     bytes that are not a picture, or half of a picture
    [bomb] [bomb 30000x30000]    a small file whose picture is huge
    [url] [url http://...]       the answer names the URL of the picture instead of containing it in base64

Directives combine. One with `times=N` applies only to the first N calls with this same prompt. Beside a bare `[url]`
the other directives apply to the *file* behind the URL, and the JSON that names it is correct.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import random
import re
import struct
import sys
import wave
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Final

from PIL import Image

# --- directives ---------------------------------------------------------------------------------------------

FAULTS: Final = frozenset(
    {"status", "loading", "cut", "half", "html", "shape", "empty", "endless", "hang", "redirect", "gone"}
    | {"notpicture", "truncated", "bomb", "gzip", "raw"}
)
DIRECTIVES: Final = (
    FAULTS
    | {"delay", "tokens", "pace", "say", "big", "drip", "tiny", "line", "type"}
    | {"url", "no-usage", "sse", "linger", "refuse", "finish", "think", "json", "packed"}
)
_DIRECTIVE: Final = re.compile(r"\[([a-z-]+)(?:\s+([^\]]*))?\]")
_OPTION: Final = re.compile(r"(?<!\S)(times|retry-after|as)=(\S+)")


@dataclass(frozen=True)
class Directive:
    """One directive of a prompt."""

    argument: str = ""
    times: float = math.inf  # the number of calls with this prompt to which it applies
    retry_after: str = ""
    form: str = ""


def parse_directives(prompt: str) -> dict[str, Directive]:
    """Return the directives of a prompt by name. Brackets with any other name are ordinary text."""
    found: dict[str, Directive] = {}
    for name, argument in _DIRECTIVE.findall(prompt):
        if name == "say":
            found[name] = Directive(argument.strip())
        elif name in DIRECTIVES:
            options = dict(_OPTION.findall(argument))
            rest = _OPTION.sub("", argument).strip()
            times = float(options.get("times", math.inf))
            found[name] = Directive(rest, times, options.get("retry-after", ""), options.get("as", ""))
    return found


@dataclass(frozen=True)
class Plan:
    """The directives that apply to one call."""

    prompt: str
    directives: Mapping[str, Directive]

    def __contains__(self, name: str) -> bool:
        return name in self.directives

    def text(self, name: str, default: str = "") -> str:
        """Return a directive's argument, or the default without one."""
        return self.directives.get(name, Directive()).argument or default

    def number(self, name: str, default: float) -> float:
        """Return a directive's argument as a number, or the default without one."""
        return float(self.text(name) or default)

    @property
    def retry_after(self) -> str:
        """The value for an error's Retry-After header. Empty means that there is no such header."""
        return self.directives.get("status", Directive()).retry_after

    def without(self, name: str) -> Plan:
        """Return the same plan without one of its directives."""
        return Plan(self.prompt, {key: value for key, value in self.directives.items() if key != name})


def prompt_of(body: Mapping[str, Any]) -> str:
    """Return a request's prompt, its input, or the text of all its messages."""
    for key in ("prompt", "input"):
        if isinstance(body.get(key), str):
            return str(body[key])
    texts: list[str] = []
    for message in body.get("messages") or []:
        content = message.get("content") or ""
        parts = [{"text": content}] if isinstance(content, str) else content
        texts += [str(part.get("text", "")) for part in parts]
    return "\n".join(texts)


# --- pictures and sound -------------------------------------------------------------------------------------

SOUND_DURATION_S: Final = 0.76
SAMPLE_RATE_HZ: Final = 16_000
BOMB_SIZE: Final = (30_000, 30_000)
MAX_PICTURE_SIDE: Final = 4096


@lru_cache(maxsize=32)
def picture(width: int, height: int) -> bytes:
    """Return a valid PNG of this size."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@lru_cache(maxsize=4)
def picture_bomb(width: int, height: int) -> bytes:
    """Return a valid PNG of some kilobytes that takes very much memory when it is decoded."""

    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    compressor = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    pixels = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", pixels) + block(b"IEND", b"")


def _checksum(data: bytes, bits: int, polynomial: int) -> int:
    """Return a CRC as FLAC and Ogg define it: the most significant bit comes first, the initial value is zero."""
    value = 0
    for byte in data:
        value ^= byte << (bits - 8)
        for _ in range(8):
            value = (value << 1) ^ (polynomial if value >> (bits - 1) else 0)
            value &= (1 << bits) - 1
    return value


@cache
def sound_wav(streaming: bool = False) -> bytes:
    """Return a tone as WAV. The header of a streaming one has 0xFFFFFFFF for the sizes."""
    count = round(SOUND_DURATION_S * SAMPLE_RATE_HZ)
    tone = [round(8000 * math.sin(math.tau * 440 * index / SAMPLE_RATE_HZ)) for index in range(count)]
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(SAMPLE_RATE_HZ)
        writer.writeframes(struct.pack(f"<{count}h", *tone))
    data = buffer.getvalue()
    unknown = b"\xff" * 4
    return data[:4] + unknown + data[8:40] + unknown + data[44:] if streaming else data


@cache
def sound_mp3() -> bytes:
    """Return silence as MP3, in frames of 1152 samples at 44.1 kHz and 128 kbit/s."""
    frame = b"\xff\xfb\x90\x64" + bytes(413)
    return frame * round(SOUND_DURATION_S * 44_100 / 1152)


@cache
def sound_flac() -> bytes:
    """Return silence as FLAC, in one frame with one constant subframe."""
    count = round(SOUND_DURATION_S * SAMPLE_RATE_HZ)
    format_bits = (SAMPLE_RATE_HZ << 44) | (15 << 36) | count
    information = struct.pack(">HH6xQ16x", count, count, format_bits)
    header = b"\xff\xf8\x70\x08\x00" + struct.pack(">H", count - 1)
    header += bytes([_checksum(header, 8, 0x07)])
    frame = header + bytes(3)
    frame += struct.pack(">H", _checksum(frame, 16, 0x8005))
    return b"fLaC\x80\x00\x00\x22" + information + frame


def _ogg_page(packets: list[bytes], number: int, flags: int, position: int) -> bytes:
    """Return one Ogg page with these packets, each of which must be shorter than 255 bytes."""
    lengths = bytes(len(packet) for packet in packets)
    head = struct.pack("<4sBBqII", b"OggS", 0, flags, position, 1, number)
    tail = bytes([len(packets)]) + lengths + b"".join(packets)
    return head + struct.pack("<I", _checksum(head + bytes(4) + tail, 32, 0x04C11DB7)) + tail


@cache
def sound_opus() -> bytes:
    """Return silence as Opus in Ogg, in packets of 20 ms."""
    count, skipped = round(SOUND_DURATION_S / 0.02), 312  # players skip 312 samples, for which there is one more packet
    head = struct.pack("<8sBBHIHB", b"OpusHead", 1, 1, skipped, 48_000, 0, 0)
    tags = struct.pack("<8sI7sI", b"OpusTags", 7, b"testbed", 0)
    pages = [_ogg_page([head], 0, 2, 0), _ogg_page([tags], 1, 0, 0)]
    return b"".join([*pages, _ogg_page([b"\xf8\xff\xfe"] * (count + 1), 2, 4, count * 960 + skipped)])


SOUNDS: Final[dict[str, tuple[str, Callable[[], bytes]]]] = {
    "wav": ("audio/wav", sound_wav),
    "mp3": ("audio/mpeg", sound_mp3),
    "flac": ("audio/flac", sound_flac),
    "opus": ("audio/ogg", sound_opus),
}


# --- answers ------------------------------------------------------------------------------------------------

WORDS: Final = ("river", "stone", "light", "quiet", "engine", "morning", "letter", "harbour", "copper")
DEFAULT_WORD_COUNT: Final = 20
PIECE: Final = "x" * 65_536
CREATED_AT: Final = 1_700_000_000
_GAP: Final = "@gap@"
MEGABYTE: Final = 1_048_576

Body = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """The body of a response. Several chunks are sent one by one, at the pace of the plan."""

    content_type: str
    chunks: Iterable[bytes]

    @property
    def chunks_known(self) -> list[bytes]:
        """The chunks if they are a list, or an empty list if they are generated while they are sent."""
        return self.chunks if isinstance(self.chunks, list) else []


def words_for(plan: Plan) -> list[str]:
    """Return the words of the text, each with the space before it. The same prompt always gets the same words."""
    if "say" in plan:
        return re.findall(r"\s*\S+", plan.text("say"))
    chooser = random.Random(plan.prompt)
    count = int(plan.number("tokens", DEFAULT_WORD_COUNT))
    return [" " * (index > 0) + chooser.choice(WORDS) for index in range(count)]


def _padding(plan: Plan) -> Iterator[str] | None:
    """Return the filling of a huge or endless answer, or None when the answer is of ordinary size."""
    if "endless" in plan:
        return itertools.repeat(PIECE)
    if "big" in plan:
        return itertools.repeat(PIECE, math.ceil(plan.number("big", 1) * MEGABYTE / len(PIECE)))
    return None


def _json_answer(document: object, gap: Iterable[str] = ()) -> Answer:
    """Return a JSON answer. The pieces replace _GAP in the document, and must not need any escaping."""
    head, *tail = json.dumps(document).split(_GAP)
    pieces = itertools.chain([head], gap, tail) if tail else [head]
    return Answer("application/json", (piece.encode() for piece in pieces) if tail else [head.encode()])


def _event(document: object) -> bytes:
    """Return a server-sent event."""
    return f"data: {json.dumps(document)}\n\n".encode()


def _finish_reason(plan: Plan, is_cut_short: bool) -> str | None:
    """Return the finish_reason of the text."""
    if "half" in plan or "finish" in plan:
        return plan.text("finish") or None
    return "length" if is_cut_short else "stop"


@dataclass(frozen=True)
class Completion:
    """The content of a chat answer, which can be sent as one JSON document or as events."""

    plan: Plan
    model: str
    words: list[str]
    finish_reason: str | None
    thoughts: list[str]

    @property
    def usage(self) -> Body | None:
        """The token counts, or None where the plan says that there are none."""
        if "no-usage" in self.plan:
            return None
        spent, made = len(self.plan.prompt.split()), len(self.words) + len(self.thoughts)
        return {"prompt_tokens": spent, "completion_tokens": made, "total_tokens": spent + made}

    def envelope(self, kind: str, choices: list[Body], **more: object) -> Body:
        """Return a document with the fields that events and whole answers have in common."""
        head: Body = {"id": "chatcmpl-testbed", "object": kind, "created": CREATED_AT, "model": self.model}
        return {**head, "choices": choices, **more}

    def whole(self) -> Answer:
        """Return the answer as one JSON document."""
        padding = _padding(self.plan)
        message = {"role": "assistant", "content": _GAP if padding else "".join(self.words)}
        if self.thoughts:
            message["reasoning_content"] = "".join(self.thoughts)
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        more = {"usage": self.usage} if self.usage else {}
        return _json_answer(self.envelope("chat.completion", [choice], **more), padding or ())

    def chunk(self, delta: Body, finish_reason: str | None = None) -> bytes:
        """Return one event of the stream."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return _event(self.envelope("chat.completion.chunk", [choice]))

    def _all_words(self) -> Iterable[str]:
        """Return the words of the text, or the filling of a huge or endless one."""
        if "endless" in self.plan:
            return itertools.cycle(self.words or [" more"])
        return _padding(self.plan) or self.words

    def events(self, include_usage: bool) -> Iterator[bytes]:
        """Yield the events of a stream: role, thoughts, words, finish_reason, usage and the end mark."""
        if "tiny" in self.plan:
            yield from tiny_events(int(self.plan.number("tiny", 1)))
        if "line" in self.plan:
            yield from _one_line(int(self.plan.number("line", 1)))
        yield self.chunk({"role": "assistant", "content": ""})
        yield from (self.chunk({"reasoning_content": thought}) for thought in self.thoughts)
        yield from (self.chunk({"content": word}) for word in self._all_words())
        if self.finish_reason:
            yield self.chunk({}, self.finish_reason)
        if "half" not in self.plan:
            if include_usage and self.usage:
                yield _event(self.envelope("chat.completion.chunk", [], usage=self.usage))
            yield DONE

    def documents(self) -> Answer:
        """Return the events as JSON without a stream: one on each line, or a list of them."""
        lines = [event.removeprefix(b"data: ").strip() for event in self.events(True) if event != DONE]
        if self.plan.text("json") == "list":
            return Answer("application/json", [b"[" + b",\n".join(lines) + b"]"])
        return Answer("application/x-ndjson", [b"\n".join([*lines, b"[DONE]"])])


DONE: Final = b"data: [DONE]\n\n"
_OVERLOADED: Final[Body] = {"error": {"message": "It is overloaded (testbed).", "code": "overloaded"}}
# How `[sse NAME]` changes each event of a stream.
DIALECTS: Final[Mapping[str, Callable[[bytes], bytes]]] = {
    "crlf": lambda event: event.replace(b"\n", b"\r\n"),
    "cr": lambda event: event.replace(b"\n", b"\r"),
    "pings": lambda event: b": still here\n\nevent: ping\n\ndata:\n\nid: 7\nretry: 10\n" + event,
    "error": lambda event: event.replace(b'"choices"', b'"error": {"message": "overloaded"}, "choices"'),
    "late": lambda event: _event(_OVERLOADED) + event if event == DONE else event,
    "bare": lambda event: b"" if event == DONE else event,
}


def tiny_events(count: int) -> Iterator[bytes]:
    """Yield this many very small events, each with one letter of text. A chunk has a thousand of them."""
    event, at_once = b'data:{"choices":[{"delta":{"content":"x"}}]}\n\n', 1000
    yield from itertools.repeat(event * at_once, count // at_once)
    yield event * (count % at_once)


def _one_line(megabytes: int) -> Iterator[bytes]:
    """Yield one event with a text of this length, in many chunks and without a line break in between."""
    head, tail = json.dumps({"choices": [{"index": 0, "delta": {"content": _GAP}}]}).split(_GAP)
    yield f"data: {head}".encode()
    yield from itertools.repeat(PIECE.encode(), megabytes * MEGABYTE // len(PIECE))
    yield f"{tail}\n\n".encode()


def chat_answer(body: Body, plan: Plan, _origin: str) -> Answer:
    """Return the answer to a chat completion, as a stream if the request wants one."""
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or sys.maxsize
    words = [] if "empty" in plan else words_for(plan)
    thoughts = [" hm"] * min(int(plan.number("think", 0)), limit)
    left = limit - len(thoughts)
    completion = Completion(
        plan, str(body.get("model", "")), words[:left], _finish_reason(plan, len(words) > left), thoughts
    )
    if plan.text("json"):
        return completion.documents()
    if body.get("stream") and "json" not in plan:
        options = body.get("stream_options") or {}
        events = completion.events(bool(options.get("include_usage")))
        return Answer("text/event-stream", map(DIALECTS.get(plan.text("sse"), bytes), events))
    return completion.whole()


def _size(text: str) -> tuple[int, int]:
    """Return width and height of a size like 512x512. Raises: ValueError."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    width, height = (int(side) for side in found.groups()) if found else (0, 0)
    if not (0 < width <= MAX_PICTURE_SIDE and 0 < height <= MAX_PICTURE_SIDE):
        raise ValueError(f"no size that can be made: {text!r}")
    return width, height


def picture_for(body: Body, plan: Plan) -> bytes:
    """Return the bytes of the picture, or whatever the plan wants in their place."""
    if "empty" in plan:
        return b""
    if "notpicture" in plan:
        return b"This is no picture at all. " * 20
    if "bomb" in plan:
        found = re.fullmatch(r"(\d+)x(\d+)", plan.text("bomb"))
        return picture_bomb(*(int(side) for side in found.groups())) if found else picture_bomb(*BOMB_SIZE)
    size = str(body.get("size") or "auto")
    data = picture(*_size("1024x1024" if size == "auto" else size))
    return data[: len(data) // 2] if "truncated" in plan else data


def image_answer(body: Body, plan: Plan, origin: str) -> Answer:
    """Return the answer to a request for a picture, which has the picture in base64 or its URL."""
    padding = _padding(plan)
    if "url" in plan:
        item = {"url": plan.text("url", origin)}
    elif padding:
        item = {"b64_json": _GAP}
    else:
        item = {"b64_json": base64.b64encode(picture_for(body, plan)).decode()}
    return _json_answer({"created": CREATED_AT, "data": [item]}, padding or ())


def _bytes_answer(content_type: str, data: bytes, plan: Plan) -> Answer:
    """Return an answer with these bytes, followed by the filling of a huge or endless answer."""
    padding = _padding(plan)
    if padding is None:
        return Answer(content_type, [data])
    return Answer(content_type, itertools.chain([data], (piece.encode() for piece in padding)))


def file_answer(body: Body, plan: Plan, _origin: str) -> Answer:
    """Return the answer to a request for the URL of a picture."""
    return _bytes_answer("image/png", picture_for(body, plan), plan)


def speech_answer(body: Body, plan: Plan, _origin: str) -> Answer:
    """Return the answer to a request for a sound. It is WAV where the wanted format is not in SOUNDS."""
    content_type, make = SOUNDS.get(str(body.get("response_format") or "mp3"), SOUNDS["wav"])
    return _bytes_answer(content_type, b"" if "empty" in plan else make(), plan)


DEEP_LEVELS: Final = 100_000
_WRONG_TYPES: Final[Body] = {
    "choices": [{"index": "x", "delta": {"content": {"$gt": ""}, "role": 7}, "finish_reason": {"a": 1}}],
    "data": [{"b64_json": {"$ne": 1}, "url": 7}],
}
_WRONG_EDGES: Final[Body] = {
    "model": {"$set": {"status": "completed"}},
    "usage": {"total_tokens": [1]},
    "choices": [{"delta": {"content": "words"}, "finish_reason": "stop"}],
}
_NO_NUMBERS: Final[Body] = {
    "choices": [{"index": math.nan, "delta": {"content": "words"}, "finish_reason": "stop"}],
    "usage": {"total_tokens": math.nan, "prompt_tokens": -math.inf},
    "created": math.inf,
    "data": [{"b64_json": math.nan}],
}
SHAPES: Final[dict[str, Callable[[], str]]] = {
    "": lambda: json.dumps({"unexpected": "shape"}),
    "list": lambda: json.dumps([1, 2, 3]),
    "null": lambda: json.dumps({"id": None, "choices": None, "data": None}),
    "text": lambda: json.dumps("only a string"),
    "broken": lambda: '{"choices": [{"mess',
    "deep": lambda: "[" * DEEP_LEVELS + "]" * DEEP_LEVELS,
    "types": lambda: json.dumps(_WRONG_TYPES),
    "edges": lambda: json.dumps(_WRONG_EDGES),
    "nan": lambda: json.dumps(_NO_NUMBERS),
    "error": lambda: json.dumps(_OVERLOADED),
    "utf8": lambda: '{"choices": [{"delta": {"content": "\udcff\udcfe\udcc0"}, "finish_reason": "stop"}]}',
}


def shape_answer(body: Body, plan: Plan, _origin: str) -> Answer:
    """Return JSON that is not what the interface promises, as a stream if the request wants one."""
    data = SHAPES.get(plan.text("shape"), SHAPES["broken"])().encode(errors="surrogateescape")
    if body.get("stream") and plan.text("shape") != "error":
        return Answer("text/event-stream", [b"data: " + data + b"\n\n", b"data: [DONE]\n\n"])
    return Answer("application/json", [data])


_OK: Final = b"HTTP/1.1 200 OK\r\n"
_CHUNKED: Final = _OK + b"Transfer-Encoding: chunked\r\n\r\n"
_FILLING: Final = PIECE.encode()
RAW_ANSWERS: Final[dict[str, Callable[[], Iterable[bytes]]]] = {
    "nothing": lambda: [],
    "no-http": lambda: [b"SSH-2.0-OpenSSH_9.2\r\n"],
    "header-10mb": lambda: [_OK, b"X: ", *[_FILLING] * 160, b"\r\nContent-Length: 2\r\n\r\n{}"],
    "header-endless": lambda: itertools.chain([_OK, b"X: "], itertools.repeat(_FILLING)),
    "headers-endless": lambda: itertools.chain([_OK], itertools.repeat(b"X: y\r\n" * 8192)),
    "header-nul": lambda: [_OK, b"X: \0\r\nContent-Length: 2\r\n\r\n{}"],
    "interim-endless": lambda: itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n" * 1024),
    "switching": lambda: [b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", _FILLING],
    "length-huge": lambda: [_OK, b"Content-Length: 9" + b"9" * 30 + b"\r\n\r\n{"],
    "length-twice": lambda: [_OK, b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}"],
    "length-short": lambda: [_OK, b"Content-Length: 1000\r\n\r\n{}"],
    "chunk-garbage": lambda: [_CHUNKED, b"zz\r\n{}\r\n0\r\n\r\n"],
    "chunk-negative": lambda: [_CHUNKED, b"-5\r\n{}\r\n0\r\n\r\n"],
    "chunk-size-endless": lambda: itertools.chain([_CHUNKED], itertools.repeat(b"0" * 65_536)),
    "trailer-endless": lambda: itertools.chain([_CHUNKED, b"2\r\n{}\r\n0\r\n"], itertools.repeat(b"X: y\r\n" * 8192)),
}


def _error(field: str, message: str, **named: object) -> Body:
    """Return an error in OpenAI's form."""
    return {"error": {"message": f"Unsupported parameter: {message}", "type": "invalid_request_error", **named}}


# How `[refuse FIELD as=NAME]` refuses a field: a status, a content type, and the body for a field and a prompt.
REFUSALS: Final[dict[str, tuple[int, str, Callable[[str, str], object]]]] = {
    "": (400, "json", lambda field, prompt: _error(field, prompt, param=field, code="unsupported_parameter")),
    "message": (400, "json", lambda field, prompt: _error(field, f"'{field}' (testbed): {prompt}", param=None)),
    "detail": (
        422,
        "json",
        lambda field, prompt: {"detail": [{"loc": ["body", field], "msg": "Extra", "input": prompt}]},
    ),
    "text": (400, "text", lambda field, prompt: f"{field} is not supported (testbed): {prompt}"),
    "answer": (200, "json", lambda field, prompt: _error(field, prompt, param=field, code=400)),
    "stream": (200, "event", lambda field, prompt: _error(field, prompt, param=field, code=400)),
}
_REFUSAL_TYPES: Final = {"json": "application/json", "text": "text/plain", "event": "text/event-stream"}


def refusal(plan: Plan, field: str) -> tuple[int, Answer]:
    """Return a refusal of a field in the form that the plan says, and its status. It repeats the prompt."""
    status, kind, body_for = REFUSALS[plan.directives["refuse"].form]
    body = body_for(field, plan.prompt)
    data = str(body).encode() if kind == "text" else _event(body) if kind == "event" else json.dumps(body).encode()
    return status, Answer(_REFUSAL_TYPES[kind], [data])


PACKINGS: Final = {"gzip": ("gzip", 31), "deflate": ("deflate", 15), "raw": ("deflate", -15)}


def packed(chunks: Iterable[bytes], bits: int) -> Iterator[bytes]:
    """Yield the chunks encoded, each so that it can be unpacked at once."""
    packer = zlib.compressobj(6, zlib.DEFLATED, bits)
    for chunk in chunks:
        yield packer.compress(chunk) + packer.flush(zlib.Z_SYNC_FLUSH)
    yield packer.flush()


@lru_cache(maxsize=2)
def gzip_bomb(megabytes: int) -> bytes:
    """Return a small gzip file that unpacks to this many megabytes."""
    compressor = zlib.compressobj(1, zlib.DEFLATED, 31)
    piece = b" " * MEGABYTE
    return b"".join(compressor.compress(piece) for _ in range(megabytes)) + compressor.flush()


def first_half(chunks: Iterable[bytes]) -> list[bytes]:
    """Return about half of an answer, or some thousand chunks of an endless one."""
    known = list(itertools.islice(chunks, 4096))
    return known[: len(known) // 2] if len(known) > 1 else [chunk[: len(chunk) // 2] for chunk in known]
