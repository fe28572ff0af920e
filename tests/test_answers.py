"""How a provider's answer is read: its bytes, its events, and the text that they make."""

from __future__ import annotations

import asyncio
import codecs
import gzip
import itertools
import json
import tracemalloc
import zlib
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.answers import gzip_bomb
from tests.http_lab import delta
from tests.lab import table
from workerkit import sentences
from workerkit.answers import (
    MAX_LINE_BYTES,
    MAX_TEXT_CHARACTERS,
    Answer,
    Completion,
    EventReader,
    OnlyThought,
    TextAnswer,
    Unpacker,
    parse_documents,
    parse_event,
    parse_json,
)
from workerkit.errors import FailJob, InvalidInput, OperatorFault, RetryJob

WORDS = "Grüße aus 東京 😀. ".encode() * 20
MEGABYTE = 2**20
Pack = Callable[[bytes], bytes]


def cut_in_two(data: bytes) -> Iterable[list[bytes]]:
    """The data in two pieces, cut at each of its bytes."""
    return ([data[:at], data[at:]] for at in range(1, len(data)))


# ── encoded answers ──────────────────────────────────────────────────────────────────────────────────────────────


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def in_parts(data: bytes) -> bytes:
    """gzip in three parts, of which one is empty."""
    return gzip.compress(data[:7]) + gzip.compress(b"") + gzip.compress(data[7:])


def as_it_is(data: bytes) -> bytes:
    return data


def unpacked(coding: str, pieces: Iterable[bytes]) -> bytes:
    unpacker = Unpacker(coding)
    return b"".join(part for piece in pieces for part in unpacker.unpack(piece))


CODINGS: list[tuple[str, str, Pack]] = [
    ("gzip", "gzip", gzip.compress),
    ("its older name", "x-gzip", gzip.compress),
    ("in capitals", "GZIP", gzip.compress),
    ("in several parts", "gzip", in_parts),
    ("beside one that says nothing", "identity, gzip", gzip.compress),
    ("between blanks and commas", " , gzip ", gzip.compress),
    ("deflate as HTTP has it", "deflate", zlib.compress),
    ("deflate as some servers have it", "Deflate", raw_deflate),
    ("none", "", as_it_is),
    ("none by name", "Identity", as_it_is),
    ("none, as a gateway says it", "none", as_it_is),
    ("a character set", "utf-8", as_it_is),
]


@table("coding, pack", *CODINGS)
def test_an_encoded_answer_is_unpacked_wherever_it_is_cut(coding: str, pack: Pack) -> None:
    for pieces in cut_in_two(pack(WORDS)):
        assert unpacked(coding, pieces) == WORDS


@table("coding, pack", *CODINGS[:8])
@settings(max_examples=30, deadline=None)
@given(data=st.binary(), cuts=st.lists(st.integers(0, 300)))
def test_any_bytes_come_out_of_any_pieces(coding: str, pack: Pack, data: bytes, cuts: list[int]) -> None:
    packed, ends = pack(data), sorted(cuts)
    pieces = [packed[start:end] for start, end in zip([0, *ends], [*ends, len(packed)], strict=True)]
    assert unpacked(coding, pieces) == data


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress, raw_deflate])
@pytest.mark.parametrize("count", [MEGABYTE - 1, MEGABYTE, MEGABYTE + 5, MEGABYTE + 100, 3 * MEGABYTE])
def test_nothing_is_held_back_where_a_piece_unpacks_to_much(pack: Pack, count: int) -> None:
    coding = "gzip" if pack is gzip.compress else "deflate"
    assert len(unpacked(coding, [pack(bytes(count))])) == count


@table("behind", ("zeros of a tape", bytes(512)), ("a page's rest", b"</html>"), ("half a sign of more", b"\x1f"))
def test_what_follows_the_last_part_is_left_out_as_other_readers_do(behind: bytes) -> None:
    for pieces in cut_in_two(gzip.compress(b"words") + behind):
        assert unpacked("gzip", pieces) == b"words"


@pytest.mark.parametrize("coding", ["br", "zstd", "Compress", "gzip, br", "deflate, gzip", "gzip, gzip"])
def test_a_coding_that_cant_be_unpacked_is_the_operators_fault(coding: str) -> None:
    with pytest.raises(OperatorFault, match="which was not asked for"):
        Unpacker(coding)


def with_wrong_byte(packed: bytes, at: int) -> bytes:
    return packed[:at] + bytes([packed[at] ^ 0x55]) + packed[at + 1 :]


@table(
    "coding, data",
    ("not encoded at all", "gzip", b'{"data": []}'),
    ("as something else", "gzip", zlib.compress(WORDS)),
    ("a wrong checksum", "gzip", with_wrong_byte(gzip.compress(WORDS), -6)),
    ("a wrong length", "gzip", with_wrong_byte(gzip.compress(WORDS), -1)),
    ("a damaged second part", "gzip", gzip.compress(WORDS) + with_wrong_byte(gzip.compress(WORDS), 12)),
    ("a wrong checksum of zlib", "deflate", with_wrong_byte(zlib.compress(WORDS), -1)),
    ("neither kind of deflate", "deflate", b'{"data": []}'),
)
def test_bytes_that_arent_encoded_as_they_say_cant_be_used(coding: str, data: bytes) -> None:
    with pytest.raises(FailJob) as caught:
        unpacked(coding, [data])
    assert caught.value.sentence == sentences.UNUSABLE


def answer_in(pieces: Iterable[bytes], coding: str = "", max_bytes: int = MEGABYTE) -> Answer:
    """An answer whose bytes come in these pieces."""
    waiting = iter(pieces)

    async def readany() -> bytes:
        return next(waiting, b"")

    headers = {"content-encoding": coding} if coding else {}
    response: Any = SimpleNamespace(status=200, headers=headers, content=SimpleNamespace(readany=readany))
    return Answer(response, max_bytes)


@table("coding, pack", *(row for row in CODINGS[:8] if row[2] is not in_parts))
def test_an_encoded_answer_whose_end_is_missing_is_never_taken_for_a_whole_one(coding: str, pack: Pack) -> None:
    for beginning, _ in cut_in_two(pack(WORDS)):
        with pytest.raises(RetryJob) as caught:
            asyncio.run(answer_in([beginning], coding).read())
        assert caught.value.sentence == sentences.BROKE_OFF


@pytest.mark.parametrize("coding", ["gzip", "deflate", ""])
def test_an_answer_of_no_bytes_is_empty_whatever_its_coding(coding: str) -> None:
    assert asyncio.run(answer_in([], coding).read()) == b""


@table(
    "coding, data",
    ("plain", "", bytes(100)),
    ("packed", "gzip", gzip.compress(bytes(100))),
    ("packed in parts", "gzip", gzip.compress(bytes(60)) + gzip.compress(bytes(40))),
)
def test_the_cap_is_on_what_an_answer_unpacks_to(coding: str, data: bytes) -> None:
    assert len(asyncio.run(answer_in([data], coding, max_bytes=100).read())) == 100
    with pytest.raises(FailJob) as caught:
        asyncio.run(answer_in([data], coding, max_bytes=99).read())
    assert caught.value.sentence == sentences.TOO_LARGE


@table("pack", ("gzip", lambda megabytes: gzip_bomb(megabytes)), ("parts", lambda count: gzip_bomb(1) * count))
def test_a_small_answer_that_unpacks_to_a_huge_one_stays_small(pack: Callable[[int], bytes]) -> None:
    bomb, cap = pack(300), 4 * MEGABYTE
    tracemalloc.start()
    with pytest.raises(FailJob):
        asyncio.run(answer_in([bomb], "gzip", cap).read())
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 3 * cap


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "data, document",
    ("plain", b'{"a": 1}', {"a": 1}),
    ("behind a byte order mark", codecs.BOM_UTF8 + b'{"a": 1}', {"a": 1}),
    ("behind blank lines", b"\r\n \n[1]", [1]),
    ("bytes that are no UTF-8", b'{"a": "\xff!"}', {"a": "\ufffd!"}),
)
def test_json_is_read_as_other_readers_do(data: bytes, document: object) -> None:
    assert parse_json(data) == document


@pytest.mark.parametrize("page", [b"<!doctype html>", b"\n <html>", codecs.BOM_UTF8 + b"<?xml version='1.0'?>"])
def test_a_web_page_instead_of_json_is_the_operators_fault(page: bytes) -> None:
    with pytest.raises(OperatorFault, match="is /v1 missing"):
        parse_json(page)


ONE, TWO = {"choices": [1]}, {"choices": [2]}
LINES = f"{json.dumps(ONE)}\n\r\n{json.dumps(TWO)}"


@table(
    "text, documents, is_whole",
    ("one object", json.dumps(ONE), [ONE], True),
    ("one on many lines", json.dumps(ONE, indent=2), [ONE], True),
    ("behind a byte order mark", f"\ufeff{json.dumps(ONE)}", [ONE], True),
    ("a list", json.dumps([ONE, TWO], indent=0), [ONE, TWO], True),
    ("a line each", LINES, [ONE, TWO], False),
    ("with a mark at the end", f"{LINES}\n[DONE]\n", [ONE, TWO], True),
    ("a last line that is cut off", LINES[:-3], [ONE], False),
    ("an object that is cut off", '{"choices": [', [], False),
    ("a sign that ends a line elsewhere", '{"a": "\u2028"}\n{"b": 1}', [{"a": "\u2028"}, {"b": 1}], False),
)
def test_json_instead_of_a_stream_is_one_object_a_list_or_one_on_each_line(
    text: str, documents: list[Any], is_whole: bool
) -> None:
    assert parse_documents(text.encode()) == (documents, is_whole)


# ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────


def events_in(pieces: Iterable[bytes]) -> list[bytes]:
    """The data of the events, as the worker reads them to the end of the stream."""
    reader, found = EventReader(), list[bytes]()
    for piece in pieces:
        found += reader.feed(piece)
    return found + list(reader.finish())


STREAM = (
    ": hi\n\nevent: ping\ndata: {}\n\ndata:größer\ndata: 東京\nid: 7\n\n\ndata:\n\nretry: 1\n\ndata: 😀 \n\n".encode()
)
EVENTS = [b"{}", "größer\n東京".encode(), "😀 ".encode()]


@table(
    "stream",
    ("LF", STREAM),
    ("CR", STREAM.replace(b"\n", b"\r")),
    ("CRLF", STREAM.replace(b"\n", b"\r\n")),
    ("each by turns", STREAM.replace(b"\n\n", b"\r\n\r").replace(b"}\r\n\r", b"}\n\r\n")),
    ("a byte order mark", codecs.BOM_UTF8 + STREAM),
    ("without the last blank line", STREAM[:-1]),
    ("without the last line's end", STREAM[:-2]),
)
def test_the_same_events_come_out_wherever_a_stream_is_cut(stream: bytes) -> None:
    for pieces in cut_in_two(stream):
        assert events_in(pieces) == EVENTS
    assert events_in(bytes([byte]) for byte in stream) == EVENTS


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([b"data: x", b"data:", b": y", b"\r", b"\n", b"\r\n", b"d", b"\xef\xbb\xbf"])), st.data()
)
def test_how_a_stream_is_cut_changes_no_event(parts: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert events_in(filter(None, pieces)) == events_in([stream] if stream else [])


@table(
    "line, data",
    ("a space is left out", b"data: x", b"x"),
    ("only one", b"data:  x ", b" x "),
    ("a tab isn't", b"data:\tx", b"\tx"),
    ("a colon in it", b"data: a: b", b"a: b"),
)
def test_an_events_data_is_what_stands_behind_the_colon(line: bytes, data: bytes) -> None:
    assert events_in([line + b"\n\n"]) == [data]


@pytest.mark.parametrize("line", [b"database: x", b" data: x", b"Data: x", b"data", b": data: x", b"{}"])
def test_other_lines_are_no_data(line: bytes) -> None:
    assert events_in([line + b"\n\n"]) == []


@pytest.mark.parametrize("mark", [b"data: [DONE]", b"data:[DONE]", b"data: [DONE] ", b"data: [DONE]\r"])
def test_nothing_behind_the_last_event_is_read(mark: bytes) -> None:
    reader = EventReader()
    assert list(reader.feed(b"data: x\n\n" + mark + b"\n\ndata: y\n\n")) == [b"x"]
    assert reader.is_ended


def test_a_last_event_without_its_blank_line_is_the_last_one() -> None:
    reader = EventReader()
    assert [*reader.feed(b"data: x\n\ndata: [DONE]"), *reader.finish()] == [b"x"]
    assert reader.is_ended


def test_a_line_without_end_is_given_up_in_bounded_memory() -> None:
    tracemalloc.start()
    with pytest.raises(FailJob) as caught:
        events_in(itertools.repeat(bytes(MEGABYTE)))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.sentence == sentences.TOO_LARGE
    assert peak_bytes < 2 * MAX_LINE_BYTES


@table(
    "data, documents",
    ("an object", b'{"a": 1}', [{"a": 1}]),
    ("behind blanks", b' \n{"a": 1}', [{"a": 1}]),
    ("behind a byte order mark", codecs.BOM_UTF8 + b'{"a": 1}', [{"a": 1}]),
    ("over several lines", b'{"a":\n1}', [{"a": 1}]),
    ("a list of them", b'[{"a": 1}, null, {"b": 2}]', [{"a": 1}, {"b": 2}]),
    ("bytes that are no UTF-8", b'{"a": "\xff"}', [{"a": "\ufffd"}]),
    ("null", b"null", []),
    ("a number", b"7", []),
    ("a text", b'"ping"', []),
    ("a word", b"ping", []),
    ("a word in brackets", b"[PING]", []),
    ("words in brackets", b" [keep-alive now] ", []),
    ("an empty list", b"[]", []),
)
def test_only_objects_are_taken_out_of_an_event(data: bytes, documents: list[Any]) -> None:
    assert parse_event(data) == documents


@pytest.mark.parametrize("data", [b'{"choices": [', b"{]", b'[{"a": 1}', b"{'a': 1}"])
def test_a_broken_object_is_no_word(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_event(data)


# ── texts ────────────────────────────────────────────────────────────────────────────────────────────────────────


END = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


def added(*chunks: dict[str, Any], is_marked_done: bool = False) -> Completion:
    completion = Completion("asked-model")
    for chunk in chunks:
        completion.add(chunk)
    completion.is_marked_done = is_marked_done
    return completion


def whole(*chunks: dict[str, Any]) -> TextAnswer:
    return added(*chunks).whole()


@table(
    "content, text",
    ("a text", "one", "one"),
    ("null", None, ""),
    ("empty", "", ""),
    ("no parts", [], ""),
    ("a part", [{"type": "text", "text": "one"}], "one"),
    ("parts", [{"type": "text", "text": "o"}, "n", {"type": "output_text", "text": "e"}], "one"),
    ("a part that is no list", {"type": "text", "text": "one"}, "one"),
    ("a part without its type", [{"text": "one"}], "one"),
    ("a part of null", [{"type": "text", "text": None}, {"type": "text", "text": "one"}], "one"),
    ("thinking", [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}], ""),
    ("thinking as a text", [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "one"}], "one"),
    ("a part that is no text", [{"type": "reference", "reference_ids": [1]}], ""),
)
def test_the_text_is_read_out_of_any_form_of_content(content: object, text: str) -> None:
    completion = added(delta("Word: "))
    assert completion.add(delta(content)) == text
    assert added(delta("Word: "), delta(content), END).whole().text == f"Word: {text}"


@pytest.mark.parametrize(
    "content", [7, True, {"$gt": ""}, [7], [[]], [None], [{"type": "text", "text": {"value": "x"}}]]
)
def test_content_of_another_kind_is_none(content: object) -> None:
    with pytest.raises(TypeError):
        added(delta(content))


@table(
    "chunk",
    ("choices of another kind", {"choices": {"delta": "one"}}),
    ("no choice", {"choices": [None]}),
    ("a delta of another kind", {"choices": [{"delta": "one"}]}),
    ("a reason of another kind", delta("one", {"type": "stop"})),
)
def test_an_event_of_another_shape_is_none(chunk: dict[str, Any]) -> None:
    with pytest.raises((TypeError, AttributeError)):
        added(chunk)


def test_an_event_that_cant_be_read_is_no_end_whatever_its_reason() -> None:
    completion = added(delta("one"))
    with pytest.raises(TypeError):
        completion.add(delta({"$gt": ""}, "stop"))
    with pytest.raises(RetryJob):
        completion.whole()


@table(
    "chunk",
    ("nothing", {}),
    ("null", {"choices": None}),
    ("only figures", {"choices": [], "usage": {"total_tokens": 7}}),
    ("a filter's result", {"choices": [], "prompt_filter_results": [{"prompt_index": 0}]}),
    ("a choice without delta", {"choices": [{"index": 0, "content_filter_results": {}}]}),
    ("a delta of null", {"choices": [{"index": 0, "delta": None}]}),
    ("a role", {"choices": [{"index": 0, "delta": {"role": "assistant"}}]}),
    ("thoughts", {"choices": [{"index": 0, "delta": {"reasoning_content": "hm", "reasoning": "hm"}}]}),
    ("another answer", {"choices": [{"index": 1, "delta": {"content": "two"}, "finish_reason": "length"}]}),
)
def test_an_event_without_a_piece_of_the_text_changes_nothing_of_it(chunk: dict[str, Any]) -> None:
    assert added(delta("one")).add(chunk) == ""
    assert whole(chunk, delta("one"), chunk, END, chunk) == whole(delta("one"), {"usage": chunk.get("usage")}, END)


@pytest.mark.parametrize("index", [0, None, "0", "x", float("nan")])
def test_a_choice_without_a_number_is_the_first(index: object) -> None:
    assert whole({"choices": [{"index": index, "delta": {"content": "one"}}]}, END).text == "one"


def test_the_first_of_several_choices_of_an_event_is_taken() -> None:
    choices = [{"index": number, "delta": {"content": f"text {number}"}} for number in (2, 0, 1)]
    assert whole({"choices": choices}, END).text == "text 0"


def message(content: object, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": reason}]}


@table(
    "chunks",
    ("deltas", [delta("one "), delta("two", "stop")]),
    ("messages", [message("one "), message("two"), END]),
    ("a whole message", [message("one two", "stop")]),
    ("a whole message of parts", [message([{"type": "text", "text": "one two"}], "stop")]),
    ("a whole message behind the deltas", [delta("one "), delta("two"), message("one two", "stop")]),
    ("texts of the older interface", [{"choices": [{"text": "one "}]}, {"choices": [{"text": "two"}]}, END]),
    ("text in the event that ends it", [delta("one "), delta("two", "stop"), END]),
    ("text behind the event that ends it", [delta("one ", "stop"), delta("two")]),
)
def test_the_text_is_found_wherever_a_server_puts_it(chunks: list[dict[str, Any]]) -> None:
    assert whole(*chunks).text == "one two"


@table(
    "parts, text",
    ("whole characters", ["Да", "!"], "Да!"),
    ("a character cut in two", ["a\ud83d", "\ude00b"], "a😀b"),
    ("half a character alone", ["a\ud83d", "b"], "a\ufffdb"),
)
def test_halves_of_a_character_come_together(parts: list[str], text: str) -> None:
    assert whole(*map(delta, parts), END).text == text


@pytest.mark.parametrize("reason", [None, "stop"])
def test_a_text_beyond_the_cap_is_too_large(reason: str | None) -> None:
    completion = added(delta("x" * MAX_TEXT_CHARACTERS))
    with pytest.raises(FailJob) as caught:
        completion.add(delta("x", reason))
    assert caught.value.sentence == sentences.TOO_LARGE
    assert not completion.is_finished


# ── the end of a text ────────────────────────────────────────────────────────────────────────────────────────────

GOOD_REASONS = ("stop", "STOP", "end_turn", "stop_sequence", "eos_token", "eos", "tool_calls", "COMPLETE", "unknown")
CUTS = (
    "length",
    "LENGTH",
    "max_tokens",
    "MAX_TOKENS",
    "model_length",
    "max_output_tokens",
    "model_context_window_exceeded",
)
BROKEN = (
    "error",
    "network_error",
    "insufficient_system_resource",
    "abort",
    "aborted",
    "cancelled",
    "canceled",
    "failed",
)
FORBIDDEN = ("content_filter", "contentFilter", "SAFETY", "RECITATION", "PROHIBITED_CONTENT", "sensitive", "refusal")


@pytest.mark.parametrize("reason", GOOD_REASONS)
def test_any_reason_that_is_no_fault_ends_a_text(reason: str) -> None:
    answer = whole(delta("one"), delta(None, reason))
    assert (answer.text, answer.is_cut) == ("one", False)


@pytest.mark.parametrize("reason", CUTS)
def test_a_text_that_ends_at_its_cap_is_whole_and_says_so(reason: str) -> None:
    assert whole(delta("one"), delta(None, reason)).is_cut


@pytest.mark.parametrize("is_marked_done", [False, True])
@pytest.mark.parametrize("reason", [*BROKEN, "MALFORMED_FUNCTION_CALL", "timeout"])
def test_a_reason_that_is_a_fault_means_half_a_text(reason: str, is_marked_done: bool) -> None:
    with pytest.raises(RetryJob) as caught:
        added(delta("one"), delta(None, reason), is_marked_done=is_marked_done).whole()
    assert caught.value.sentence == sentences.BROKE_OFF


@pytest.mark.parametrize("text", ["", "half a text"])
@pytest.mark.parametrize("reason", [*FORBIDDEN, "guardrail_intervened"])
def test_a_reason_of_the_providers_rules_is_the_persons_to_mend(reason: str, text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        whole(delta(text), delta(None, reason))
    assert caught.value.sentence == sentences.CONTENT_RULES


@pytest.mark.parametrize("no_reason", [None, "", "null", "None", False])
def test_a_running_text_has_no_reason_yet(no_reason: object) -> None:
    assert not added(delta("one", no_reason)).is_finished
    assert whole(delta("one", no_reason), END).text == "one"


@table(
    "is_marked_done, done_is_enough, is_whole",
    ("no mark", False, True, False),
    ("a mark", True, True, True),
    ("a mark of a server that gives reasons", True, False, False),
)
def test_a_mark_is_an_end_where_a_server_gives_no_reasons(
    is_marked_done: bool, done_is_enough: bool, is_whole: bool
) -> None:
    completion = added(delta("one"), is_marked_done=is_marked_done)
    if is_whole:
        assert completion.whole(done_is_enough=done_is_enough).text == "one"
    else:
        with pytest.raises(RetryJob):
            completion.whole(done_is_enough=done_is_enough)


def test_a_reason_is_an_end_without_a_mark() -> None:
    assert added(delta("one"), END).whole(done_is_enough=False).text == "one"


@pytest.mark.parametrize("reason", BROKEN)
def test_a_fault_behind_the_end_costs_nothing_of_the_text(reason: str) -> None:
    assert whole(delta("one"), END, delta("", reason)).text == "one"


def test_rules_behind_the_end_still_count() -> None:
    with pytest.raises(InvalidInput):
        whole(delta("one"), END, delta("", "content_filter"))


@table(
    "chunks",
    ("in a stream", [delta(None, refusal="I can't"), delta(None, refusal=" do that."), END]),
    ("without an end", [delta(None, refusal="I can't")]),
    (
        "in a whole message",
        [{"choices": [{"message": {"content": None, "refusal": "I can't."}, "finish_reason": "stop"}]}],
    ),
)
def test_a_refusal_of_the_model_is_the_persons_to_mend(chunks: list[dict[str, Any]]) -> None:
    with pytest.raises(InvalidInput) as caught:
        whole(*chunks)
    assert caught.value.sentence == sentences.CONTENT_RULES


@table(
    "chunk, detail",
    ("an end without a text", delta("", "planted prompt"), "an empty text, finish_reason of its own"),
    ("a refusal", delta(None, "planted prompt", refusal="No."), "finish_reason of its own with a refusal"),
)
def test_a_reason_in_a_servers_own_words_is_not_logged(chunk: dict[str, Any], detail: str) -> None:
    with pytest.raises(FailJob) as caught:
        whole(chunk)
    assert caught.value.detail == detail


@pytest.mark.parametrize("refusal", [None, "", "not that part"])
def test_a_text_beside_a_refusal_is_a_text(refusal: str | None) -> None:
    assert whole(delta("one", refusal=refusal), END).text == "one"


@table(
    "thought",
    ("a field", delta(None, reasoning_content="hm")),
    ("another field", delta(None, reasoning="hm")),
    ("a part", delta([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}])),
    ("tokens of their own", {"usage": {"completion_tokens_details": {"reasoning_tokens": 7}}}),
    ("tokens of the total", {"usage": {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 9}}),
)
@pytest.mark.parametrize("reason", ["length", "MAX_TOKENS"])
def test_thoughts_up_to_the_cap_are_said_to_person_and_operator(reason: str, thought: dict[str, Any]) -> None:
    with pytest.raises(OnlyThought) as caught:
        whole(thought, delta("", reason))
    assert "TEXT_THINKING_TOKENS" in caught.value.detail
    assert caught.value.sentence == sentences.ONLY_THOUGHT


@table(
    "usage",
    ("none", None),
    ("the parts make up the total", {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}),
    ("no thought is counted", {"completion_tokens_details": {"reasoning_tokens": 0}}),
    ("details of another kind", {"completion_tokens_details": 7, "total_tokens": "9"}),
)
def test_an_empty_text_at_its_cap_is_no_thinking_without_a_sign_of_it(usage: object) -> None:
    with pytest.raises(FailJob) as caught:
        whole(delta("", "length"), {"usage": usage})
    assert type(caught.value) is FailJob
    assert caught.value.sentence == sentences.NO_TEXT


@table(
    "chunks, sentence",
    ("no words", [END], sentences.NO_TEXT),
    ("a call of a tool", [delta(None, "tool_calls")], sentences.NO_TEXT),
    ("no event", [], sentences.UNUSABLE),
    ("no choice", [{"choices": []}, {"usage": {"total_tokens": 7}}], sentences.UNUSABLE),
)
def test_an_answer_without_words_is_no_text(chunks: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(FailJob) as caught:
        added(*chunks, is_marked_done=True).whole()
    assert caught.value.sentence == sentence


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "usage, tokens",
    ("the sum", {"total_tokens": 9}, 9),
    ("its parts", {"prompt_tokens": 4, "completion_tokens": 3}, 7),
    ("by other names", {"input_tokens": 4, "output_tokens": 3}, 2),
    ("none", None, 2),
    ("a list", [9], 2),
    ("a text", "9", 2),
    ("of another kind", {"total_tokens": "9"}, 2),
    ("no number", {"total_tokens": float("nan")}, 2),
    ("below nothing", {"total_tokens": -9}, 2),
    ("more than a database takes", {"total_tokens": 2**31}, 2),
)
def test_tokens_are_the_servers_where_it_counts_them_and_else_the_pieces(usage: object, tokens: int) -> None:
    assert whole(delta("one"), delta(" two"), {"usage": usage}, END).tokens == tokens


@table(
    "model, used",
    ("its name", "served-model", "served-model"),
    ("none", None, "asked-model"),
    ("empty", "", "asked-model"),
    ("too long", "m" * 201, "asked-model"),
    ("a line break in it", "model\nforged", "asked-model"),
    ("of another kind", {"$set": 1}, "asked-model"),
)
def test_the_model_is_the_one_that_the_server_names(model: object, used: str) -> None:
    assert whole({**delta("one"), "model": model}, END).model == used
