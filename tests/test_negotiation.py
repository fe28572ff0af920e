"""What a server is asked for after it refused a field, how often, and what of it is remembered."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lab import table
from workerkit import sentences
from workerkit.errors import FailJob, InvalidInput, OperatorFault
from workerkit.negotiation import MAX_CALLS, Learnt, Negotiation
from workerkit.refusals import FieldRefused, Unexplained, judge, read_refusal
from workerkit.settings import ProviderSettings

Body = dict[str, Any]
Server = Callable[[Body], Any]  # the error's message, or a whole body, if it refuses; else nothing

URL, HOUR_S = "http://server/v1", 3600.0
WHERE = ProviderSettings(URL, "", "m", (), thinking_tokens=1000)
TEXT: Body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
PICTURE: Body = {"model": "m", "prompt": "A harbour"}
SOUND: Body = {"model": "m", "input": "Good morning"}
STREAM: Body = {"stream": True, "stream_options": {"include_usage": True}}
VOICE: Body = {"voice": "alloy", "response_format": "mp3"}


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def unsupported(name: str, **more: Any) -> Any:
    message = f"Unsupported parameter: '{name}' is not supported with this model."
    return {"error": {"message": message, "param": name, "code": "unsupported_parameter", **more}}


def refusing(*names: str) -> Server:
    """A server that refuses these fields, one after the other."""
    return lambda body: next((unsupported(name) for name in names if name in body), None)


def refusing_value(name: str, value: object, refusal: Any) -> Server:
    """A server that refuses one value of a field."""
    return lambda body: refusal if body.get(name) == value else None


def negotiate(server: Server, asked: Body, ours: Body, learnt: Learnt, where: ProviderSettings = WHERE) -> list[Body]:
    """The bodies that were sent, until one was answered. Raises what ends the job."""
    talk, sent = Negotiation(learnt, URL, asked, ours, where), []
    while True:
        talk.note_call()
        sent.append(dict(talk.body))
        assert len(sent) <= MAX_CALLS
        if not (refused := server(talk.body)):
            talk.confirm()
            return sent
        body = refused if isinstance(refused, dict) else {"error": refused}
        error = judge(read_refusal(400, json.dumps(body).encode()), talk.body, "text", {})
        assert isinstance(error, (FieldRefused, Unexplained))
        talk.mend(error)


def last(server: Server, asked: Body, ours: Body, where: ProviderSettings = WHERE) -> Body:
    return negotiate(server, asked, ours, Learnt(), where)[-1]


def fault(server: Server, asked: Body, ours: Body, where: ProviderSettings = WHERE) -> FailJob:
    with pytest.raises(FailJob) as caught:
        negotiate(server, asked, ours, Learnt(), where)
    return caught.value


def answers_all(body: Body) -> None:
    """A server that takes anything."""


# ── what is ours ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_request_is_sent_as_it_is_at_first() -> None:
    assert negotiate(answers_all, TEXT, STREAM, Learnt()) == [{**STREAM, **TEXT}]


@table(
    "names, left",
    ("how to stream", ("stream_options",), {"stream": True}),
    ("to stream, and so how as well", ("stream",), {}),
    ("one after the other", ("stream_options", "stream"), {}),
)
def test_a_field_of_ours_that_is_refused_is_left_out(names: tuple[str, ...], left: Body) -> None:
    assert last(refusing(*names), TEXT, STREAM) == {**TEXT, **left}


def test_what_the_job_asks_for_wins_over_ours() -> None:
    assert last(answers_all, {**SOUND, "voice": "nova"}, VOICE)["voice"] == "nova"


# ── the cap of a text ────────────────────────────────────────────────────────────────────────────────────────────


@table("asked, ours", ("the job's", {"max_tokens": 200}, {}), ("the operator's", {}, {"max_tokens": 200}))
def test_a_cap_that_is_refused_by_name_gets_its_newer_name_and_room_for_thinking(asked: Body, ours: Body) -> None:
    sent = last(refusing("max_tokens"), {**TEXT, **asked}, ours)
    assert sent == {**TEXT, "max_completion_tokens": 1200, "reasoning_effort": "low"}


def test_an_effort_of_the_operators_is_kept() -> None:
    where = ProviderSettings(URL, "", "m", (), reasoning_effort="high")
    sent = last(refusing("max_tokens"), {**TEXT, "max_tokens": 9}, {"reasoning_effort": "high"}, where)
    assert sent["reasoning_effort"] == "high"


def test_an_effort_of_ours_that_a_model_does_not_take_is_left_out() -> None:
    sent = last(refusing("max_tokens", "reasoning_effort"), {**TEXT, "max_tokens": 9}, {})
    assert sent == {**TEXT, "max_completion_tokens": 1009}


def test_an_effort_of_ours_is_replaced_by_the_lowest_that_is_offered() -> None:
    said = "Unsupported value: 'reasoning_effort' does not support 'low'. Supported values are: 'medium' and 'high'."

    def server(body: Body) -> Any:
        return said if body.get("reasoning_effort") == "low" else refusing("max_tokens")(body)

    assert last(server, {**TEXT, "max_tokens": 9}, {})["reasoning_effort"] == "medium"


VLLM = "This model's maximum context length is 4096 tokens. However, you requested {} tokens ({} in the messages, x)."
NEWER_VLLM = "'max_tokens' is too large. The maximum context length is 4096 tokens, your request has 96 input tokens"
AT_LEAST = "The maximum context length is 4096, and your prompt contains at least 1 input tokens"


@table(
    "message, cap",
    ("what the context leaves", VLLM.format(4108, 12), 4084),
    ("of a newer vLLM", NEWER_VLLM, 4000),
    ("the model's most", "max_tokens is too large: 5000. This model supports at most 1024 completion tokens.", 1024),
    ("in backticks", "`max_tokens` must be less than or equal to `512`", 512),
    ("with thousands", "max_tokens must be at most 2,048", 2048),
    ("no number", "max_tokens is too large for this model", None),
    ("a number that isn't the prompt's", AT_LEAST, None),
    ("it is too small", "max_tokens must be at least 16", None),
)
def test_a_cap_that_is_too_large_is_lowered_or_left_out(message: str, cap: int | None) -> None:
    server = refusing_value("max_tokens", 5000, message)
    assert last(server, {**TEXT, "max_tokens": 5000}, {}).get("max_tokens") == cap


def test_a_prompt_that_leaves_no_room_at_all_is_too_long() -> None:
    error = fault(lambda _: VLLM.format(9000, 8000), {**TEXT, "max_tokens": 1000}, {})
    assert error.sentence == sentences.TOO_LONG


def test_a_cap_that_is_renamed_and_then_too_large_is_lowered() -> None:
    def server(body: Body) -> Any:
        if body.get("max_completion_tokens", 0) > 500:
            return "max_completion_tokens is too large: this model supports at most 500"
        return refusing("max_tokens")(body)

    assert last(server, {**TEXT, "max_tokens": 900}, {})["max_completion_tokens"] == 500


def test_a_job_whose_cap_is_refused_under_both_names_fails_and_names_it() -> None:
    error = fault(refusing("max_tokens", "max_completion_tokens"), {**TEXT, "max_tokens": 9}, {})
    assert isinstance(error, InvalidInput)
    assert "`max_tokens`" in error.sentence


# ── models that think first ──────────────────────────────────────────────────────────────────────────────────────


def test_a_model_that_thought_until_the_cap_gets_more_room_once() -> None:
    talk = Negotiation(Learnt(), URL, {**TEXT, "max_tokens": 200}, {}, WHERE)
    assert [talk.make_room_for_thinking(), talk.make_room_for_thinking()] == [True, False]
    assert talk.body["max_tokens"] == 1200


@table("asked", ("no cap", {}), ("a cap that has room already", {"max_completion_tokens": 9}))
def test_there_is_no_more_room_without_a_cap_of_the_answer(asked: Body) -> None:
    assert not Negotiation(Learnt(), URL, {**TEXT, **asked}, {}, WHERE).make_room_for_thinking()


def test_the_next_job_of_a_model_that_thinks_gets_the_room_at_once() -> None:
    learnt, asked = Learnt(), {**TEXT, "max_tokens": 200}
    talk = Negotiation(learnt, URL, asked, {}, WHERE)
    talk.make_room_for_thinking()
    talk.confirm()
    assert Negotiation(learnt, URL, asked, {}, WHERE).body["max_tokens"] == 1200


# ── pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────

OFFERED = {"param": "size", "message": "Supported values are: '1024x1024', '1536 × 1024', and 'auto'."}


@table(
    "asked_size, refusal, size",
    ("the nearest of a list", "500x510", OFFERED, "1024x1024"),
    ("by its shape", "600x400", OFFERED, "1536x1024"),
    ("no list", "500x510", unsupported("size"), None),
    ("a rule", "500x510", "Invalid size '500x510'. Width and height must both be divisible by 16.", "496x512"),
    ("the model's own choice", "auto", OFFERED, None),
)
def test_a_size_becomes_the_nearest_that_is_offered_or_the_models_own(
    asked_size: str, refusal: Any, size: str | None
) -> None:
    server = refusing_value("size", asked_size, refusal)
    assert last(server, {**PICTURE, "size": asked_size}, {}).get("size") == size


# ── sounds ───────────────────────────────────────────────────────────────────────────────────────────────────────

ONE_OF = "response_format must be one of [{}]"


@table(
    "said, name",
    ("the only one", ONE_OF.format("wav"), "wav"),
    ("one that can be named truly", ONE_OF.format("pcm aac flac"), "flac"),
    ("in other words", "Unsupported format: mp3. Supported formats are: wav, pcm", "wav"),
)
def test_our_sound_format_is_replaced_by_one_that_the_server_offers(said: str, name: str) -> None:
    server = refusing_value("response_format", "mp3", said)
    assert last(server, SOUND, VOICE)["response_format"] == name


def test_our_sound_format_is_left_out_where_the_server_knows_no_such_field() -> None:
    assert last(refusing("response_format"), SOUND, VOICE) == {**SOUND, "voice": "alloy"}


# ── who hears of it ──────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "name, value, shown",
    ("temperature", "temperature", 0.3, "temperature"),
    ("top_p", "top_p", 0.5, "top_p"),
    ("seed", "seed", 7, "seed"),
    ("stop", "stop", ["END"], "stop"),
    ("a form", "response_format", {"type": "json_object"}, "response_format"),
    ("quality", "quality", "hd", "quality"),
    ("speed", "speed", 2.0, "speed"),
    ("voice", "voice", "zelda", "voice"),
    ("a sound's format", "response_format", "flac", "format"),
)
def test_what_the_job_asked_for_fails_it_by_name(name: str, value: object, shown: str) -> None:
    error = fault(refusing(name), {**TEXT, name: value}, STREAM)
    assert isinstance(error, InvalidInput)
    assert f"`{shown}`" in error.sentence


def test_the_values_that_a_model_takes_are_said() -> None:
    said = "Invalid value: 'standard'. Supported values are: 'low', 'medium', 'high', and 'auto'. (quality)"
    error = fault(lambda _: {"error": {"message": said, "param": "quality"}}, {**PICTURE, "quality": "standard"}, {})
    assert error.sentence.endswith("this `quality`; use one of: low, medium, high, auto.")


@table(
    "name, asked, ours, setting",
    ("a voice", "voice", SOUND, VOICE, "AUDIO_VOICE"),
    ("only formats that aren't known", "response_format", SOUND, VOICE, "AUDIO_FORMAT"),
    ("an effort", "reasoning_effort", TEXT, {"reasoning_effort": "max"}, "TEXT_REASONING_EFFORT"),
)
def test_what_the_operator_set_is_the_operators_fault_and_names_the_setting(
    name: str, asked: Body, ours: Body, setting: str
) -> None:
    where = ProviderSettings(URL, "", "m", (), reasoning_effort=ours.get("reasoning_effort", ""))
    error = fault(lambda _: {"error": {"message": "must be one of [pcm]", "param": name}}, asked, ours, where)
    assert (type(error), error.sentence) == (OperatorFault, sentences.NOT_SET_UP)
    assert f"set {setting} to what this server and model take" in error.detail


@table("name", ("messages", "messages"), ("prompt", "prompt"))
def test_words_that_a_model_cant_take_are_the_persons(name: str) -> None:
    error = fault(lambda _: {"error": {"message": "bad", "param": name}}, {"model": "m", name: "x"}, {})
    assert isinstance(error, InvalidInput)


# ── how often ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_server_that_refuses_whatever_is_sent_is_asked_three_times() -> None:
    calls: list[Body] = []

    def server(body: Body) -> Any:
        calls.append(body)
        return unsupported([name for name in body if name not in ("model", "messages")][-1])

    fault(server, TEXT, {"a": 1, "b": 2, "c": 3, "d": 4})
    assert len(calls) == MAX_CALLS == 3


FIELDS = ["max_tokens", "max_completion_tokens", "stream", "stream_options", "reasoning_effort", "temperature", "size"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.sampled_from(FIELDS), max_size=3), max_size=4), st.sets(st.sampled_from(FIELDS)))
def test_every_negotiation_ends_within_three_calls_and_invents_nothing(jobs: list[list[str]], asked: set[str]) -> None:
    values = {"size": "64x64", "reasoning_effort": "low", "temperature": 1, "stream": True, "stream_options": {}}
    wanted = {**TEXT, **{name: values.get(name, 100) for name in asked}}
    learnt = Learnt()
    for names in jobs:
        try:
            sent = negotiate(refusing(*names), wanted, STREAM, learnt)
        except FailJob:
            continue
        known = {*wanted, *STREAM, "max_completion_tokens", "reasoning_effort", "max_tokens"}
        assert all(set(body) <= known for body in sent)
        assert {name: sent[-1].get(name) for name in TEXT} == TEXT


# ── what is remembered ───────────────────────────────────────────────────────────────────────────────────────────


@table(
    "names, asked, ours",
    ("a rename", ("max_tokens",), {**TEXT, "max_tokens": 9}, {}),
    ("what is left out", ("stream_options",), TEXT, STREAM),
    ("both", ("max_tokens", "stream_options"), {**TEXT, "max_tokens": 9}, STREAM),
)
def test_the_second_job_is_asked_right_at_once(names: tuple[str, ...], asked: Body, ours: Body) -> None:
    learnt = Learnt()
    first = negotiate(refusing(*names), asked, ours, learnt)
    assert negotiate(refusing(*names), asked, ours, learnt) == [first[-1]]


@table("server, model", ("another server", "http://other/v1", "m"), ("another model", URL, "other"))
def test_it_holds_for_one_server_and_model(server: str, model: str) -> None:
    learnt, asked = Learnt(), {**TEXT, "max_tokens": 9}
    negotiate(refusing("max_tokens"), asked, {}, learnt)
    other = Negotiation(learnt, server, {**asked, "model": model}, {}, WHERE)
    assert other.body["max_tokens"] == 9


@table(
    "asked, name, refusal",
    ("a size", PICTURE, "size", OFFERED),
    ("a cap", TEXT, "max_tokens", "max_tokens must be at most 20"),
)
def test_values_are_never_remembered(asked: Body, name: str, refusal: Any) -> None:
    value = "500x510" if name == "size" else 50
    server, learnt = refusing_value(name, value, refusal), Learnt()
    assert [len(negotiate(server, {**asked, name: value}, {}, learnt)) for _ in range(2)] == [2, 2]


def test_it_is_forgotten_after_an_hour() -> None:
    clock = Clock()
    learnt = Learnt(clock)
    negotiate(refusing("stream_options"), TEXT, STREAM, learnt)
    clock.now = HOUR_S - 1
    assert len(negotiate(refusing("stream_options"), TEXT, STREAM, learnt)) == 1
    clock.now = HOUR_S
    assert len(negotiate(refusing("stream_options"), TEXT, STREAM, learnt)) == 2


@table(
    "refusal",
    ("the new name", unsupported("max_completion_tokens")),
    ("for no reason that is known", {"error": {"message": "hm"}}),
)
def test_it_is_forgotten_when_a_call_so_shaped_is_refused(refusal: Any) -> None:
    learnt, asked = Learnt(), {**TEXT, "max_tokens": 9}
    negotiate(refusing("max_tokens"), asked, {}, learnt)

    def server(body: Body) -> Any:
        return refusal if "max_completion_tokens" in body else None

    assert negotiate(server, asked, {}, learnt)[-1] == asked
    assert negotiate(server, asked, {}, learnt) == [asked]


def test_a_refusal_of_another_field_leaves_it_as_it_is() -> None:
    learnt, asked = Learnt(), {**TEXT, "max_tokens": 9}
    negotiate(refusing("max_tokens"), asked, {}, learnt)
    with pytest.raises(InvalidInput):
        negotiate(refusing("seed"), {**asked, "seed": 1}, {}, learnt)
    assert len(negotiate(refusing("max_tokens"), asked, {}, learnt)) == 1


def test_a_server_that_ends_its_texts_with_a_reason_is_known_by_that() -> None:
    learnt = Learnt()
    talk = Negotiation(learnt, URL, TEXT, STREAM, WHERE)
    assert talk.done_is_enough
    talk.note_end(has_reason=True)
    after = Negotiation(learnt, URL, TEXT, STREAM, WHERE)
    assert (after.done_is_enough, after.body) == (False, {**STREAM, **TEXT})
