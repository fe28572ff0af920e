"""What is asked for instead when a model server refuses a field: what may change, what is learnt, how often is asked.

The servers here are functions that refuse a request or don't; the worker's own loop asks them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.lab import Clock, table
from workerkit.answers import MORE_ROOM, Answer, Completion, OnlyThought
from workerkit.errors import FailJob, InvalidInput, JobError, OperatorFault, RetryJob
from workerkit.negotiation import LOWEST_EFFORT, MAX_CALLS, Learnt, Negotiation, lower_cap, other_size
from workerkit.provider import Memory, OpenAIProvider, take
from workerkit.refusals import Unexplained, judge, read_refusal, words_of
from workerkit.sentences import ONLY_THOUGHT, TOO_LONG, field_refused
from workerkit.settings import ProviderSettings

Body = dict[str, Any]
Server = Callable[[Body], Body | None]  # a request's refusal, as a body of status 400; or None: it is answered
WHERE: Body = {"base_url": "http://server/v1", "api_key": "", "model": "", "allowed_models": ()}
ASKED = {"model": "m", "messages": [{"role": "user", "content": "Write about the harbour."}]}
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
SPOKEN = {"model": "m", "input": "Write about the harbour."}
DRAWN = {"model": "m", "prompt": "The harbour."}


@contextlib.asynccontextmanager
async def opened(where: ProviderSettings, memory: Memory) -> AsyncIterator[OpenAIProvider]:
    provider = OpenAIProvider(where, 2**20, memory)
    try:
        yield provider
    finally:
        await provider.close()


class Talk:
    """Asks a server for something, as often as the worker does; `sent` are the requests that reached it."""

    def __init__(self, server: Server, memory: Memory | None = None, kind: Any = "text", **where: Any) -> None:
        self.sent: list[Body] = []
        self._server, self._memory, self._kind = server, memory or Memory(), kind
        self._where = ProviderSettings(**{**WHERE, **where})

    async def _send(self, talk: Negotiation) -> None:
        self.sent.append(dict(talk.body))
        if refusal := self._server(talk.body):
            raise judge(read_refusal(400, json.dumps(refusal).encode()), talk.body, self._kind, {})

    def ask(self, asked: Body, ours: Body | None = None) -> list[Body]:
        """The requests until one was answered. Raises JobError: none was."""

        async def negotiate() -> None:
            async with opened(self._where, self._memory) as provider:
                await provider._negotiate(self._kind, asked, ours or {}, self._send)

        self.sent.clear()
        asyncio.run(negotiate())
        return list(self.sent)

    def fault(self, asked: Body, ours: Body | None = None) -> JobError:
        with pytest.raises(JobError) as caught:
            self.ask(asked, ours)
        return caught.value


def unsupported(*names: str) -> Server:
    """Refuses the first of these fields that the request has."""

    def refuse(body: Body) -> Body | None:
        name = next((name for name in names if name in body), None)
        text = f"Unsupported parameter: '{name}' is not supported with this model."
        return {"error": {"message": text, "param": name, "code": "unsupported_parameter"}} if name else None

    return refuse


def says(message: str, name: str, *, unless: Callable[[Any], bool] = lambda _: False) -> Server:
    """Refuses a field with this message, unless its value fits."""
    return lambda body: {"error": {"message": message}} if name in body and not unless(body[name]) else None


def either(*servers: Server) -> Server:
    return lambda body: next((refusal for server in servers if (refusal := server(body))), None)


def takes_all(_body: Body) -> None:
    return None


def takes_nothing(message: str, code: str | None = None) -> Server:
    return lambda _: {"error": {"message": message, "code": code}}


# ── what is sent ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_asked_for_and_what_is_ours_is_sent_and_nothing_else() -> None:
    assert Talk(takes_all).ask(ASKED, STREAMED) == [{**STREAMED, **ASKED}]


def test_what_the_job_asked_for_wins_over_ours() -> None:
    [sent] = Talk(takes_all).ask({**SPOKEN, "voice": "sage"}, {"voice": "alloy"})
    assert sent["voice"] == "sage"


def test_a_request_is_not_changed_for_its_caller() -> None:
    asked, ours = {**ASKED, "max_tokens": 200}, dict(STREAMED)
    Talk(unsupported("max_tokens", "stream_options")).ask(asked, ours)
    assert (asked, ours) == ({**ASKED, "max_tokens": 200}, STREAMED)


# ── leaving out, renaming, replacing ─────────────────────────────────────────────────────────────────────────────


@table(
    "refused, left_out",
    ("the figures", ["stream_options"], {"stream_options"}),
    ("streaming, and the figures with it", ["stream"], {"stream", "stream_options"}),
    ("one after the other", ["stream_options", "max_tokens"], {"stream_options", "max_tokens"}),
)
def test_a_field_of_ours_is_left_out(refused: list[str], left_out: set[str]) -> None:
    last = Talk(unsupported(*refused)).ask(ASKED, {**STREAMED, "max_tokens": 90})[-1]
    assert {"max_tokens", "stream", "stream_options"} - last.keys() == left_out


@table("asked, ours", ("asked by the job", {"max_tokens": 200}, {}), ("set by the operator", {}, {"max_tokens": 200}))
def test_a_renamed_cap_has_room_for_thinking_and_the_lowest_effort(asked: Body, ours: Body) -> None:
    first, last = Talk(unsupported("max_tokens"), thinking_tokens=1000).ask({**ASKED, **asked}, ours)
    assert first["max_tokens"] == 200
    assert last == {**ASKED, "max_completion_tokens": 1200, "reasoning_effort": LOWEST_EFFORT}


def test_the_operators_effort_stays_where_the_cap_is_renamed() -> None:
    talk = Talk(unsupported("max_tokens"), reasoning_effort="high")
    last = talk.ask({**ASKED, "max_tokens": 200}, {"reasoning_effort": "high"})[-1]
    assert last["reasoning_effort"] == "high"


def test_an_effort_of_ours_that_is_refused_is_left_out_or_replaced_by_the_lowest_that_is_offered() -> None:
    offers = says("'reasoning_effort' does not support 'low'; supported values are 'high' and 'medium'",
                  "reasoning_effort", unless=lambda value: value == "medium")  # fmt: skip
    asked = {**ASKED, "max_tokens": 200}
    assert Talk(either(unsupported("max_tokens"), offers)).ask(asked)[-1]["reasoning_effort"] == "medium"
    last = Talk(unsupported("max_tokens", "reasoning_effort")).ask(asked)[-1]
    assert last == {**ASKED, "max_completion_tokens": 4296}


@table(
    "words, cap, lower",
    ("OpenAI", "max_tokens is too large: 5000. This model supports at most 4096 completion tokens", 5000, 4096),
    ("Groq", "`max_tokens` must be less than or equal to `1024`", 5000, 1024),
    ("Anthropic", "max_tokens: 64000 > 32000, which is the maximum allowed", 64000, 32000),
    ("DeepSeek", "the valid range of max_tokens is [1, 8192]", 10_000, 8192),
    ("vLLM, context less prompt", "context length is 4096 tokens and your request has 4000 input tokens", 200, 96),
    ("vLLM of old", "context length is 16384 tokens, requested 19591 (9591 in the messages)", 10_000, 6793),
    ("OpenRouter", "context length is 131072 tokens. You requested 148000 (130000 of text input)", 18_000, 1072),
    ("only the least of the prompt", "context length is 8192 tokens and at least 193 input tokens", 8000, None),
    ("a context alone", "the available context size is 8192 tokens", 9000, None),
    ("no number", "max_tokens is too large", 200, None),
    ("greater than the most", "max_tokens is greater than the maximum allowed 8192", 10_000, 8192),
    ("a range in words", "max_tokens must be at least 1 and at most 8192", 10_000, 8192),
    ("a sign of inequality", "max_tokens: 10000 > 8192, the maximum number of output tokens", 10_000, 8192),
    ("a range in brackets", "the valid range of max_tokens is [1, 8192]", 10_000, 8192),
    ("more than a number", "max_tokens must be greater than 16", 20, None),
    ("larger numbers alone", "max_tokens is too large: at most 4096", 200, None),
    ("a cap that is too small", "integer below minimum value: expected 16, got 5; see error 3", 5, None),
    ("a number that no cap has", "max_tokens must be below " + "9" * 30, 200, None),
    ("the whole room", "context length is 4096 tokens, 4095 input tokens", 200, 1),
)  # fmt: skip
def test_a_refusal_says_how_low_a_cap_has_to_be(words: str, cap: int, lower: int | None) -> None:
    assert lower_cap(" ".join(words_of(words)), cap) == lower


@table("asked, ours", ("asked by the job", {"max_tokens": 5000}, {}), ("set by the operator", {}, {"max_tokens": 5000}))
def test_a_cap_over_the_models_is_lowered(asked: Body, ours: Body) -> None:
    server = says("max_tokens is too large: at most 4096", "max_tokens", unless=lambda cap: cap <= 4096)
    assert [body["max_tokens"] for body in Talk(server).ask({**ASKED, **asked}, ours)] == [5000, 4096]


def test_a_cap_for_which_no_number_is_said_is_left_out_since_less_fits() -> None:
    server = says("Please reduce the length of the messages or completion.", "max_tokens")
    assert Talk(server).ask({**ASKED, "max_tokens": 5000})[-1] == ASKED


def test_a_cap_of_the_jobs_that_is_wrong_for_an_unknown_reason_is_not_left_out_in_silence() -> None:
    talk = Talk(says("Invalid value for max_tokens: expected an integer within the allowed range", "max_tokens"))
    assert "`max_tokens`" in talk.fault({**ASKED, "max_tokens": 50}).sentence
    assert len(talk.sent) == 1


def test_an_input_that_is_too_long_whatever_the_cap_is_said_so() -> None:
    talk = Talk(takes_nothing("no", "context_length_exceeded"))
    assert talk.fault({**ASKED, "max_tokens": 200}).sentence == TOO_LONG
    assert len(talk.sent) == 2


def test_an_input_that_alone_is_longer_than_the_context_is_said_so_at_once() -> None:
    server = says("maximum context length is 100 tokens, your request has 120 input tokens", "max_tokens")
    talk = Talk(server)
    assert talk.fault({**ASKED, "max_tokens": 200}).sentence == TOO_LONG
    assert len(talk.sent) == 1


def test_an_input_found_too_long_at_the_last_call_is_not_blamed_on_the_cap() -> None:
    talk = Talk(either(unsupported("stream", "max_tokens"), takes_nothing("no", "context_length_exceeded")))
    assert talk.fault({**ASKED, "max_tokens": 200}, STREAMED).sentence == TOO_LONG
    assert len(talk.sent) == MAX_CALLS


@table(
    "words, size, other",
    ("a list", "supported values are '1024x1024', '1536x1024' and 'auto'", "1920x1080", "1536x1024"),
    ("with blanks", "use 512 x 512 or 256 x 256", "300x300", "256x256"),
    ("a step", "width and height must both be divisible by 16", "1792x936", "1792x928"),
    ("a step, in other words", "sides must be multiples of 64", "500x500", "512x512"),
    ("a step that it has already", "must be divisible by 8", "512x512", None),
    ("none", "argument not supported", "512x512", None),
    ("the same alone", "512x512 isn't supported", "512x512", None),
    ("sizes that are none", "use 00x00 or 0x9", "512x512", None),
    ("auto is no size to be near of", "supported values are '1024x1024'", "auto", None),
)
def test_the_nearest_size_that_a_refusal_allows(words: str, size: str, other: str | None) -> None:
    assert other_size(" ".join(words_of(words)), size) == other


def test_a_size_becomes_the_nearest_that_the_server_offers() -> None:
    server = says("Invalid size: use 1024x1024 or 1536x1024", "size", unless=lambda size: size == "1536x1024")
    sent = Talk(server, kind="image").ask({**DRAWN, "size": "1920x1080"})
    assert [body["size"] for body in sent] == ["1920x1080", "1536x1024"]


def test_a_server_that_takes_no_size_gets_none() -> None:
    assert Talk(unsupported("size"), kind="image").ask({**DRAWN, "size": "512x512"})[-1] == DRAWN


def test_another_sound_format_that_can_be_named_takes_the_place_of_ours() -> None:
    server = says("response_format should be 'wav' or 'pcm'", "response_format", unless="wav".__eq__)
    last = Talk(server, kind="audio").ask(SPOKEN, {"voice": "alloy", "response_format": "mp3"})[-1]
    assert last["response_format"] == "wav"


def test_a_server_that_knows_no_sound_formats_gets_none() -> None:
    last = Talk(unsupported("response_format"), kind="audio").ask(SPOKEN, {"response_format": "mp3"})[-1]
    assert last == SPOKEN


# ── whose fault it is ────────────────────────────────────────────────────────────────────────────────────────────

FORMAT = {"type": "json_object"}


@table(
    "kind, asked",
    ("temperature", "text", {**ASKED, "temperature": 0.2}),
    ("top_p", "text", {**ASKED, "top_p": 0.5}),
    ("seed", "text", {**ASKED, "seed": 7}),
    ("stop", "text", {**ASKED, "stop": ["END"]}),
    ("response_format", "text", {**ASKED, "response_format": FORMAT}),
    ("quality", "image", {**DRAWN, "quality": "hd"}),
    ("speed", "audio", {**SPOKEN, "speed": 1.5}),
    ("voice", "audio", {**SPOKEN, "voice": "sage"}),
)
def test_what_the_job_asked_for_fails_it_by_name(kind: str, asked: Body) -> None:
    name = list(asked)[-1]
    talk = Talk(unsupported(name), kind=kind)
    fault = talk.fault(asked)
    assert isinstance(fault, InvalidInput)
    expected = f"Your request can't be used: this AI model doesn't take this `{name}`; leave it out, or change it."
    assert fault.sentence == expected
    assert len(talk.sent) == 1


def test_a_sound_format_that_the_job_asked_for_fails_by_the_name_that_the_job_has_for_it() -> None:
    server = says("response_format should be 'wav' or 'flac'", "response_format")
    fault = Talk(server, kind="audio").fault({**SPOKEN, "response_format": "mp3"})
    assert fault.sentence == field_refused("format", ["wav", "flac"])


def test_the_qualities_that_a_server_offers_are_said() -> None:
    server = says("Invalid value for quality; supported values are: 'low', 'medium' and 'high'", "quality")
    fault = Talk(server, kind="image").fault({**DRAWN, "quality": "hd"})
    assert fault.sentence.endswith("`quality`; use one of: low, medium, high.")


def test_a_cap_that_the_job_asked_for_fails_by_its_own_name_where_the_server_takes_neither() -> None:
    talk = Talk(unsupported("max_tokens", "max_completion_tokens"))
    fault = talk.fault({**ASKED, "max_tokens": 200})
    assert isinstance(fault, InvalidInput)
    assert "`max_tokens`" in fault.sentence
    assert len(talk.sent) == 2


def test_a_cap_that_is_too_small_fails_since_without_it_the_text_would_be_longer() -> None:
    server = says("Invalid 'max_tokens': integer below minimum value. Expected 16, got 5.", "max_tokens")
    assert "`max_tokens`" in Talk(server).fault({**ASKED, "max_tokens": 5}).sentence


def test_a_system_message_that_a_model_doesnt_take_is_named() -> None:
    system = [{"role": "system", "content": "Be kind."}, *ASKED["messages"]]
    fault = Talk(says("System role not supported", "messages")).fault({**ASKED, "messages": system})
    assert isinstance(fault, InvalidInput)
    assert "`system`" in fault.sentence


@table(
    "kind, asked, ours, where, setting",
    ("the voice", "audio", SPOKEN, {"voice": "alloy"}, {}, "AUDIO_VOICE"),
    ("a sound format", "audio", SPOKEN, {"response_format": "mp3"}, {}, "AUDIO_FORMAT"),
    ("the effort", "text", ASKED, {"reasoning_effort": "high"}, {"reasoning_effort": "high"}, "TEXT_REASONING_EFFORT"),
)
def test_what_the_operator_set_is_the_operators_fault_and_names_the_setting(
    kind: str, asked: Body, ours: Body, where: Body, setting: str
) -> None:
    [(name, value)] = ours.items()
    talk = Talk(says(f"{name}: unsupported value, must be another", name), kind=kind, **where)
    fault = talk.fault(asked, ours)
    assert isinstance(fault, OperatorFault)
    assert fault.detail.endswith(f"set {setting} to what this server and model take (it is {value!r})")
    assert len(talk.sent) == 1


def test_an_effort_of_the_operators_is_not_replaced_by_another() -> None:
    server = says("'reasoning_effort' does not support 'high'; supported values are 'low'", "reasoning_effort")
    fault = Talk(server, reasoning_effort="high").fault(ASKED, {"reasoning_effort": "high"})
    assert "TEXT_REASONING_EFFORT" in fault.detail


def test_a_cap_of_the_operators_that_is_refused_to_the_end_names_its_setting() -> None:
    lower = iter(range(4000, 0, -1))

    def server(_body: Body) -> Body:
        return {"error": {"message": f"max_tokens must be at most {next(lower)}"}}

    talk = Talk(server)
    assert "set TEXT_MAX_TOKENS" in talk.fault(ASKED, {"max_tokens": 5000}).detail
    assert len(talk.sent) == MAX_CALLS


def test_what_is_refused_for_no_known_reason_is_asked_once() -> None:
    talk = Talk(takes_nothing("no"))
    assert type(talk.fault(ASKED, STREAMED)) is Unexplained
    assert len(talk.sent) == 1


@table(
    "refusal",
    ("of a field", {"error": {"message": "Unsupported parameter: 'stream_options'", "code": 400}}),
    ("for no known reason", {"error": {"message": "no", "code": 400}}),
    ("of the model", {"error": {"message": "x", "code": "model_not_found"}}),
)
def test_an_error_behind_the_first_piece_of_a_text_is_not_negotiated(refusal: Body) -> None:
    completion, answer = Completion("m"), cast(Answer, SimpleNamespace(headers={}, key=""))
    completion.add({"choices": [{"delta": {"content": "Once"}}]})

    with pytest.raises(RetryJob):
        take(completion, print, {**ASKED, **STREAMED}, answer, refusal)


# ── what was learnt ──────────────────────────────────────────────────────────────────────────────────────────────


CAPPED = {**ASKED, "max_tokens": 200}


def calls(server: Server, memory: Memory, asked: Body = CAPPED, ours: Body = STREAMED, **more: Any) -> int:
    return len(Talk(server, memory, **more).ask(asked, ours))


@table(
    "server, first",
    ("a rename", unsupported("max_tokens"), 2),
    ("a field of ours", unsupported("stream_options"), 2),
    ("both", unsupported("max_tokens", "stream_options"), 3),
    ("both, the other way round", unsupported("stream_options", "max_tokens"), 3),
    ("with the effort", unsupported("max_tokens", "reasoning_effort"), 3),
)
def test_a_second_request_asks_right_at_once(server: Server, first: int) -> None:
    memory = Memory()
    assert [calls(server, memory) for _ in range(3)] == [first, 1, 1]


def test_what_two_requests_learnt_apart_holds_together_in_any_order() -> None:
    memory = Memory()
    calls(unsupported("reasoning_effort"), memory, ASKED, {"reasoning_effort": "low"})
    calls(unsupported("max_tokens", "reasoning_effort"), memory)
    assert calls(unsupported("max_tokens", "reasoning_effort"), memory) == 1


def test_a_server_that_takes_neither_name_gets_no_cap_of_the_operators_from_then_on() -> None:
    memory, server = Memory(), unsupported("max_tokens", "max_completion_tokens")
    assert [calls(server, memory, ASKED, {"max_tokens": 90}) for _ in range(2)] == [3, 1]


@table(
    "server, asked, ours, kind",
    ("a lower cap", says("max_tokens: at most 64", "max_tokens", unless=lambda cap: cap <= 64), CAPPED, {}, "text"),
    ("no cap, where no number is said", says("max_tokens is too large", "max_tokens"), CAPPED, {}, "text"),
    (
        "another size",
        says("size: only 1024x1024", "size", unless="1024x1024".__eq__),
        {**DRAWN, "size": "64x64"},
        {},
        "image",
    ),
    ("no size", unsupported("size"), {**DRAWN, "size": "64x64"}, {}, "image"),
    (
        "another format",
        says("response_format should be 'wav'", "response_format", unless="wav".__eq__),
        *(SPOKEN, {"response_format": "mp3"}, "audio"),
    ),
)
def test_a_value_is_never_learnt(server: Server, asked: Body, ours: Body, kind: str) -> None:
    memory = Memory()
    assert [calls(server, memory, asked, ours, kind=kind) for _ in range(2)] == [2, 2]


def test_nothing_is_learnt_from_a_request_that_fails() -> None:
    memory = Memory()
    Talk(unsupported("stream_options", "temperature"), memory).fault({**ASKED, "temperature": 0.2}, STREAMED)
    assert Talk(takes_all, memory).ask(ASKED, STREAMED) == [{**STREAMED, **ASKED}]


@table(
    "other", ("another model", {"asked": {**CAPPED, "model": "n"}}), ("another server", {"base_url": "http://other/v1"})
)
def test_what_was_learnt_holds_for_that_server_and_model_alone(other: Body) -> None:
    memory = Memory()
    calls(unsupported("max_tokens"), memory)
    assert calls(unsupported("max_tokens"), memory, **other) == 2


@table("after_s, sent", ("within the hour", 3599, 1), ("an hour later", 3600, 2))
def test_what_was_learnt_is_forgotten_after_an_hour(after_s: float, sent: int) -> None:
    clock = Clock()
    memory = Memory(learnt=Learnt(clock))
    calls(unsupported("max_tokens"), memory)
    clock.now += after_s
    assert calls(unsupported("max_tokens"), memory) == sent


def test_a_rule_that_the_server_refuses_is_forgotten_and_the_others_are_kept() -> None:
    memory = Memory()
    calls(unsupported("max_tokens", "stream_options"), memory)
    changed = unsupported("max_completion_tokens", "stream_options")
    assert [calls(changed, memory) for _ in range(2)] == [2, 1]


def test_rules_are_forgotten_where_a_request_so_shaped_is_refused_for_no_known_reason() -> None:
    memory = Memory()
    calls(unsupported("stream_options"), memory)

    def needs(body: Body) -> Body | None:
        return None if "stream_options" in body else {"error": {"message": "no"}}

    assert [calls(needs, memory) for _ in range(2)] == [2, 1]


def test_a_job_that_names_a_field_of_ours_gets_it_whatever_was_learnt() -> None:
    memory = Memory()
    calls(unsupported("response_format"), memory, SPOKEN, {"response_format": "mp3"}, kind="audio")
    fault = Talk(unsupported("response_format"), memory, "audio").fault({**SPOKEN, "response_format": "wav"})
    assert isinstance(fault, InvalidInput)


def test_a_stream_needs_a_finish_reason_once_the_server_has_sent_one() -> None:
    learnt, where = Learnt(), ProviderSettings(**WHERE)
    first = Negotiation(learnt, "server", ASKED, {}, where)
    assert first.done_is_enough
    first.note_end(has_reason=False)
    assert Negotiation(learnt, "server", ASKED, {}, where).done_is_enough
    first.note_end(has_reason=True)
    assert not Negotiation(learnt, "server", ASKED, {}, where).done_is_enough


# ── thinking ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Thinker(Talk):
    """A model that thinks for so many tokens before its first word."""

    def __init__(self, tokens: int, **more: Any) -> None:
        super().__init__(unsupported(*more.pop("refused", ())), **more)
        self._tokens = tokens

    async def _send(self, talk: Negotiation) -> None:
        await super()._send(talk)
        cap = talk.body.get("max_completion_tokens") or talk.body.get("max_tokens") or 10**6
        if cap <= self._tokens:
            raise OnlyThought(f"finish_reason length: {MORE_ROOM}", ONLY_THOUGHT)


def test_a_model_that_thought_until_the_cap_is_asked_again_with_more_room() -> None:
    memory = Memory()
    sent = Thinker(500, memory=memory).ask(CAPPED)
    assert [body["max_tokens"] for body in sent] == [200, 200 + 4096]
    assert [body["max_tokens"] for body in Thinker(500, memory=memory).ask(CAPPED)] == [200 + 4096]


def test_room_for_thinking_is_added_once_whatever_was_learnt_first() -> None:
    memory = Memory()
    Thinker(500, memory=memory).ask(CAPPED)
    last = Thinker(500, memory=memory, refused=["max_tokens"]).ask(CAPPED)[-1]
    assert last["max_completion_tokens"] == 200 + 4096


@table(
    "tokens, where, refused, sent",
    ("with all the room", 5000, {}, [], 2),
    ("by its newer name", 5000, {}, ["max_tokens"], 2),
    ("where the operator gives none", 500, {"thinking_tokens": 0}, [], 1),
)
def test_thinking_that_used_up_all_tokens_is_said_to_both(
    tokens: int, where: Body, refused: list[str], sent: int
) -> None:
    talk = Thinker(tokens, refused=refused, **where)
    fault = talk.fault(CAPPED)
    assert fault.sentence == ONLY_THOUGHT
    assert "TEXT_THINKING_TOKENS" in fault.detail
    assert len(talk.sent) == sent


def test_a_model_that_thought_without_any_cap_is_not_asked_again() -> None:
    talk = Thinker(10**7)
    assert talk.fault(ASKED).sentence == ONLY_THOUGHT
    assert len(talk.sent) == 1


# ── any series of refusals ───────────────────────────────────────────────────────────────────────────────────────

FULL = {**CAPPED, "temperature": 0.2, "top_p": 0.5, "stop": ["END"], "seed": 7, "response_format": FORMAT}
DRAWING, SPEAKING = {**DRAWN, "size": "512x512", "quality": "hd"}, {**SPOKEN, "speed": 1.5}
VOICED = {"voice": "alloy", "response_format": "mp3"}
REQUESTS = [(FULL, STREAMED), (ASKED, {**STREAMED, "max_tokens": 90}), (DRAWING, {}), (SPEAKING, VOICED)]
MESSAGES = (
    "Unsupported parameter: '{}'",
    "Unsupported value: '{}' must be one of 'wav', 'low', 'medium', 1024x1024",
    "{} is too large: at most 64",
    "{} must be below 100, expected 16",
    "Please reduce the length of the messages; {}",
    "maximum context length is 4096 tokens, 4090 input tokens, {}",
    "no",
)
SERIES = st.lists(st.tuples(st.integers(0, 20), st.sampled_from(MESSAGES)), max_size=8)


def changeable(asked: Body, name: str) -> bool:
    return name not in asked or name in ("max_tokens", "size")


@examples(max_examples=400, deadline=None)
@given(st.sampled_from(REQUESTS), st.lists(SERIES, min_size=1, max_size=3))
def test_whatever_is_refused_the_talk_ends_soon_and_changes_only_what_may_change(
    request_: tuple[Body, Body], jobs: list[list[tuple[int, str]]]
) -> None:
    (asked, ours), memory = request_, Memory()
    allowed = {*asked, *ours, "max_completion_tokens", "reasoning_effort"}
    for series in jobs:
        refusals = iter(series)

        def server(body: Body, refusals: Any = refusals) -> Body | None:
            number, message = next(refusals, (0, ""))
            names = list(body)
            return {"error": {"message": message.format(names[number % len(names)])}} if message else None

        talk = Talk(server, memory)
        with contextlib.suppress(FailJob):
            talk.ask(asked, ours)
        assert 1 <= len(talk.sent) <= MAX_CALLS
        for body in talk.sent:
            assert body.keys() <= allowed
            assert all(body.get(name) == value for name, value in asked.items() if not changeable(asked, name))
