"""Any OpenAI-compatible server over HTTP: texts, what is asked instead, models, keys, errors, connections, proxies.

The provider in these tests is real, and misbehaves as the directives in its prompts say.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import json
import logging
import time
import traceback
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from testbed.answers import REFUSALS, picture, sound_wav
from testbed.processes import poll
from testbed.provider import MODELS, Provider
from tests.http_lab import (
    EVERY_KIND,
    MODEST_BYTES,
    Ask,
    Kind,
    Scripted,
    answer_from,
    answer_of,
    at_url,
    delta,
    http_answer,
    image,
    opened,
    server,
    speech,
    text,
    where,
)
from tests.lab import KEY, NOWHERE, SECRET, table
from workerkit import sentences
from workerkit.answers import OnlyThought
from workerkit.errors import FailJob, JobError, OperatorFault, RetryJob
from workerkit.models import CURRENT
from workerkit.provider import Memory, OpenAIProvider
from workerkit.proxies import proxy_for
from workerkit.settings import ProviderKind

PLACES = ("/v1", "/v1/", "/v1?key=a%2Bb%26c&api-version=1", "/v1/?key=a%2Bb%26c&api-version=1")


@pytest.mark.parametrize("place", PLACES)
def test_what_a_base_url_has_behind_its_question_mark_is_sent_with_each_call(provider: Provider, place: str) -> None:
    url = provider.url.removesuffix("/v1") + "/accounts/token" + place
    assert answer_of(text("[say Hello]"), at_url(url)).text == "Hello"
    [call] = provider.calls
    assert call.route == "/accounts/token/v1/chat/completions"
    assert call.query == place.partition("?")[2]


# ── texts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_text_is_streamed_in_order(provider: Provider) -> None:
    pieces: list[str] = []
    answer = answer_of(text("[say one two three four]", pieces.append), where(provider))
    assert pieces == ["one", " two", " three", " four"]
    assert answer.text == "one two three four"


@pytest.mark.parametrize("said", ["crlf", "cr", "pings", "bare", "late"])
def test_a_stream_may_be_written_in_any_dialect(provider: Provider, said: str) -> None:
    assert answer_of(text(f"[sse {said}] [say one  two three]"), where(provider)).text == "one  two three"


@pytest.mark.parametrize("said", ["[json]", "[json list]", "[json lines]", "[json] [packed]", "[json lines] [drip 0]"])
def test_json_instead_of_a_stream_is_read_and_passed_on(provider: Provider, said: str) -> None:
    pieces: list[str] = []
    answer = answer_of(text(f"{said} [say one two]", pieces.append), where(provider))
    assert (answer.text, "".join(pieces)) == ("one two", "one two")


def test_a_whole_json_that_has_no_reason_is_whole(provider: Provider) -> None:
    assert answer_of(text("[json] [finish] [say one two]"), where(provider)).text == "one two"


def test_objects_on_lines_without_an_end_are_half_a_text() -> None:
    with pytest.raises(RetryJob):
        answer_from(json.dumps({"choices": [{"delta": {"content": "one"}}]}).encode() + b"\n{}", text("Hi"))


def test_a_server_that_calls_its_stream_something_else_is_understood(provider: Provider) -> None:
    assert answer_of(text("[type text/plain] [say grüße]"), where(provider)).text == "grüße"


def stream(*documents: object) -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(document).encode() for document in documents)


@table(
    "body",
    ("blank lines", b"\r\n\n  \n" + stream(delta("one", "stop"))),
    ("a byte order mark", b"\xef\xbb\xbf" + stream(delta("one", "stop"))),
    ("a byte order mark and JSON", b"\xef\xbb\xbf" + json.dumps(delta("one", "stop")).encode()),
    ("blank lines and JSON", b"\n \n" + json.dumps(delta("one", "stop")).encode()),
)
def test_what_stands_in_front_of_a_text_is_skipped(body: bytes) -> None:
    assert answer_from(body, text("Hi")).text == "one"


def test_blank_lines_without_end_are_given_up_soon() -> None:
    began = time.monotonic()
    with pytest.raises(FailJob) as caught:
        answer_from(b"\n" * (MODEST_BYTES + 1), text("Hi"))
    assert caught.value.sentence == sentences.TOO_LARGE
    assert time.monotonic() - began < 10


WHOLE = stream(delta("one "), delta("two", "stop"))


@table(
    "body, whole",
    ("a reason and no mark", WHOLE, "one two"),
    ("no blank line at the end", WHOLE[:-1], "one two"),
    ("no line end at the end", WHOLE[:-2], "one two"),
    ("a mark without a line end", stream(delta("one ")) + b"data: [DONE]", "one "),
    ("junk behind the reason", WHOLE + b"data: {]\n\n", "one two"),
    ("an event that is cut off behind the reason", WHOLE + b'data: {"usa', "one two"),
    ("another shape behind the reason", WHOLE + stream({"choices": 7}), "one two"),
    ("an error behind the reason", WHOLE + stream({"error": {"code": 400, "message": "no"}}), "one two"),
)
def test_a_text_that_is_whole_is_not_lost_for_what_is_wrong_behind_it(body: bytes, whole: str) -> None:
    assert answer_from(body, text("Hi")).text == whole


@table(
    "body",
    ("nothing", b""),
    ("blank lines", b"\r\n\n"),
    ("signs of life alone", b": ping\n\nevent: ping\n\n"),
    ("a first event that is cut off", b'data: {"cho'),
    ("no reason and no mark", stream(delta("one "))),
    ("an event that is cut off", stream(delta("one ")) + stream(delta("two", "stop"))[:-9]),
    ("an error", stream(delta("one "), {"error": {"message": "The engine stopped", "type": "server_error"}})),
    ("an error beside the reason", stream(delta("one "), {**delta("two", "stop"), "error": {"message": "stopped"}})),
)
def test_half_a_text_is_tried_again(body: bytes) -> None:
    with pytest.raises(RetryJob):
        answer_from(body, text("Hi"))


@pytest.mark.parametrize("body", [b"404 page not found", b"data: {}\n\ndata: [DONE]\n\n", b"{}"])
def test_what_is_no_text_at_all_is_not_tried_again(body: bytes) -> None:
    with pytest.raises(FailJob) as caught:
        answer_from(body, text("Hi"))
    assert caught.value.sentence == sentences.UNUSABLE


def test_a_text_whose_pieces_each_have_a_reason_is_half_if_its_connection_breaks() -> None:
    body = stream(delta("one ", "stop"), delta("two ", "stop"))
    with pytest.raises(RetryJob):
        answer_from(body, text("Hi"), content_length=str(len(body) + 9))


def test_an_error_within_a_stream_is_tried_again(provider: Provider) -> None:
    with pytest.raises(RetryJob):
        answer_of(text("[sse error]"), where(provider))


def test_a_stream_that_stays_open_behind_its_last_event_is_not_waited_for(provider: Provider) -> None:
    assert answer_of(text("[linger 30] [say done]"), where(provider), within_s=15).text == "done"


def test_a_stream_that_stays_open_behind_its_reason_is_hardly_waited_for(provider: Provider) -> None:
    assert answer_of(text("[sse bare] [linger 30] [say done]"), where(provider), within_s=15).text == "done"


def test_a_text_whose_pieces_each_have_a_reason_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def send_slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for number in range(6):
            writer.write(stream(delta(str(number), "stop")))
            await asyncio.sleep(0.1 if number < 2 else 1.2)

    async def ask() -> str:
        async with server(send_slowly) as url, opened(at_url(url)) as ours:
            return str((await ours.text({"model": "m", "messages": []}, lambda _: None)).text)

    monkeypatch.setattr("workerkit.provider.AFTER_THE_END_S", 1.0)
    assert asyncio.run(ask()) == "012345"


def test_a_text_names_the_model_and_the_tokens_of_the_answer(provider: Provider) -> None:
    answer = answer_of(text("Hello there [tokens 5]"), where(provider))
    assert (answer.model, answer.tokens) == ("asked-model", 4 + 5)


def test_without_token_counts_the_pieces_are_counted(provider: Provider) -> None:
    assert answer_of(text("[no-usage] [tokens 5]"), where(provider)).tokens == 5


def in_turn(*asks: Ask) -> Ask:
    """Asks one thing after the other, and returns the last answer."""

    async def ask(provider: OpenAIProvider) -> Any:
        return [await one(provider) for one in asks][-1]

    return ask


def test_a_mark_alone_is_an_end_until_the_server_has_given_a_reason(provider: Provider) -> None:
    no_reason = text("[finish] [say two]")
    assert answer_of(in_turn(no_reason, no_reason), where(provider)).text == "two"
    with pytest.raises(RetryJob) as caught:
        answer_of(in_turn(text("[say one]"), no_reason), where(provider))
    assert caught.value.sentence == sentences.BROKE_OFF


def test_another_model_of_a_server_may_give_no_reasons(provider: Provider) -> None:
    assert answer_of(in_turn(text("Hi"), text("[finish] [say two]", model="other")), where(provider)).text == "two"


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("coding", ["gzip", "deflate", "raw"])
def test_an_encoded_answer_is_the_same_answer(provider: Provider, kind: Kind, coding: str) -> None:
    plain, packed = (answer_of(kind(f"[say one two] {said}"), where(provider)) for said in ("", f"[packed {coding}]"))
    assert getattr(packed, "text", packed) == getattr(plain, "text", plain)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_the_worker_asks_for_answers_that_are_not_encoded(kind: Kind) -> None:
    host = Scripted()

    async def ask() -> None:
        async with server(host) as url, opened(at_url(url)) as ours:
            with contextlib.suppress(JobError):
                await kind("Hello")(ours)

    asyncio.run(ask())
    assert "accept-encoding: identity" in host.headers()


# ── what is asked for instead ────────────────────────────────────────────────────────────────────────────────────


def sent(provider: Provider, *names: str) -> list[dict[str, Any]]:
    """These fields of each call, where it had them."""
    return [{name: call.body[name] for name in names if name in call.body} for call in provider.calls]


def test_nothing_is_sent_that_nobody_asked_for(provider: Provider) -> None:
    answer_of(in_turn(text("Hello"), lambda ours: ours.image({"model": "m", "prompt": "p"})), where(provider))
    of_text, of_picture = ({*call.body} for call in provider.calls)
    assert of_text == {"model", "messages", "stream", "stream_options"}
    assert of_picture == {"model", "prompt"}


def test_a_cap_is_renamed_once_for_a_model_that_wants_the_newer_name(provider: Provider) -> None:
    capped = text("[refuse max_tokens] [say hello]", max_tokens=7)
    answer_of(in_turn(capped, capped), where(provider))
    assert sent(provider, "max_tokens", "max_completion_tokens") == [
        {"max_tokens": 7},
        {"max_completion_tokens": 7 + 4096},
        {"max_completion_tokens": 7 + 4096},
    ]


def test_what_was_found_out_outlives_the_event_loop_of_a_call(provider: Provider) -> None:
    memory, capped = Memory(), text("[refuse max_tokens] [say hello]", max_tokens=7)
    for _ in range(2):
        answer_of(capped, where(provider), memory=memory)
    assert len(provider.calls) == 3


@pytest.mark.parametrize("form", REFUSALS)
def test_a_field_of_ours_is_left_out_in_whatever_form_it_is_refused(provider: Provider, form: str) -> None:
    refused = text(f"[refuse stream_options as={form}] [say hello]")
    assert answer_of(in_turn(refused, refused), where(provider)).text == "hello"
    assert [list(fields) for fields in sent(provider, "stream_options")] == [["stream_options"], [], []]


def test_a_server_that_doesnt_stream_answers_as_a_whole(provider: Provider) -> None:
    pieces: list[str] = []
    answer = answer_of(text("[refuse stream] [say one two]", pieces.append), where(provider))
    assert (answer.text, pieces) == ("one two", ["one two"])
    assert sent(provider, "stream", "stream_options")[1] == {}


@table(
    "prompt, calls",
    ("of another cause, though the answer repeats the prompt", "[status 400] max_tokens", 1),
    ("of another field", "[refuse model]", 1),
    ("of the newer name, too", "[refuse max_tokens max_completion_tokens]", 2),
)
def test_a_refusal_that_a_new_name_does_not_mend_fails_the_job(provider: Provider, prompt: str, calls: int) -> None:
    with pytest.raises(FailJob):
        answer_of(text(prompt, max_tokens=7), where(provider))
    assert len(provider.calls) == calls


def test_a_server_that_refuses_everything_is_called_three_times_at_most(provider: Provider) -> None:
    refused = "[refuse max_tokens stream_options max_completion_tokens stream reasoning_effort]"
    with pytest.raises(FailJob):
        answer_of(text(refused, max_tokens=7), where(provider))
    assert len(provider.calls) == 3


@table(
    "error",
    ("a field", {"message": "no", "param": "stream_options", "code": "unsupported_parameter"}),
    ("the model", {"message": "no such model", "code": "model_not_found"}),
    ("no cause", {"message": "no", "code": 400}),
)
def test_nothing_is_asked_for_again_once_a_piece_of_the_text_is_out(error: dict[str, Any]) -> None:
    host, pieces = Scripted({"*": http_answer(stream(delta("one "), {"error": error}))}), list[str]()
    memory = Memory()

    async def ask() -> None:
        async with server(host) as url, opened(at_url(url), memory) as ours:
            memory.learnt.learn(url, "asked-model", {"stream_options": None})  # what else may be wrong about a refusal
            memory.choices.keep(url, "text", "asked-model", is_certain=True)
            await text("Hi", pieces.append)(ours)

    with pytest.raises(RetryJob):
        asyncio.run(ask())
    assert (len(host.requests), pieces) == (1, ["one "])


# ── models that think ────────────────────────────────────────────────────────────────────────────────────────────


def test_thinking_is_no_part_of_the_text(provider: Provider) -> None:
    pieces: list[str] = []
    assert answer_of(text("[think 5] [say one two]", pieces.append), where(provider)).text == "one two"
    assert "".join(pieces) == "one two"


def test_a_model_that_thought_up_to_the_cap_gets_room_for_it_at_once_the_next_time(provider: Provider) -> None:
    thinking = text("[think 20] [say hello]", max_tokens=7)
    assert answer_of(in_turn(thinking, thinking), where(provider)).text == "hello"
    assert sent(provider, "max_tokens") == [{"max_tokens": cap} for cap in (7, 7 + 4096, 7 + 4096)]


def test_a_model_that_thinks_beyond_its_room_fails_the_job_with_both_sides_told(provider: Provider) -> None:
    with pytest.raises(OnlyThought) as caught:
        answer_of(text("[think 90] [say hello]", max_tokens=7), where(provider, thinking_tokens=50))
    assert len(provider.calls) == 2
    assert "TEXT_THINKING_TOKENS" in caught.value.detail
    assert caught.value.sentence == sentences.ONLY_THOUGHT


# ── models that come and go ──────────────────────────────────────────────────────────────────────────────────────


def with_choice(kind: ProviderKind = "text", prompt: str = "[say hello]", url: str | None = None) -> Ask:
    """Chooses a model as none is set, and asks that one. Returns the model."""

    async def ask(ours: OpenAIProvider) -> str:
        model = (await ours.with_model(at_url(ours.base_url if url is None else url, model="", kind=kind))).model
        await text(prompt, model=model)(ours)
        return model

    return ask


def test_the_only_model_of_a_server_is_chosen_once_and_logged(
    provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "worker")
    memory = Memory()
    assert [answer_of(with_choice(), where(provider), memory=memory) for _ in range(2)] == [*MODELS, *MODELS]
    assert provider.lists_given == 1
    assert caplog.messages == [f"TEXT_MODEL={MODELS[0]} was chosen, since it isn't set; put this into .env"]


def test_of_several_models_none_is_chosen_and_the_operator_reads_them(provider: Provider) -> None:
    provider.models = ("small", "large")
    with pytest.raises(OperatorFault, match="offers 2 models: set AUDIO_MODEL to one of: small, large"):
        answer_of(with_choice("audio"), where(provider))
    assert provider.calls == []


def test_a_server_that_lists_no_models_is_asked_all_the_same(provider: Provider) -> None:
    provider.models = None
    answer_of(with_choice(), where(provider))
    assert [call.model for call in provider.calls] == [next(iter(CURRENT["text"]))]


def test_no_job_waits_long_for_a_list_of_models(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never_list(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if b"/models" in await reader.readuntil(b"\r\n\r\n"):
            await reader.read()  # until the worker gives it up
        writer.write(http_answer(stream(delta("one", "stop"))))

    async def ask() -> str:
        async with server(never_list) as url, opened(at_url(url)) as ours, asyncio.timeout(20):
            return str(await with_choice()(ours))

    monkeypatch.setattr("workerkit.provider.MODELS_S", 0.2)
    assert asyncio.run(ask()) in CURRENT["text"]


def test_where_a_chosen_model_is_gone_the_next_one_is_asked_and_remembered(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workerkit.provider.OPENAI_URL", provider.url)
    first, second, *_ = provider.models = tuple(CURRENT["text"])
    ask, memory = with_choice(prompt=f"[gone {first}] [say hello]", url=""), Memory()
    for _ in range(2):
        answer_of(ask, at_url("", model=""), memory=memory)
    assert [call.model for call in provider.calls] == [first, second, second]


def test_however_many_models_are_gone_an_attempt_makes_few_calls(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workerkit.provider.OPENAI_URL", provider.url)
    provider.models = tuple(CURRENT["text"])
    with pytest.raises(OperatorFault):
        answer_of(with_choice(prompt="[gone *]", url=""), at_url("", model=""))
    assert len({call.model for call in provider.calls}) == len(provider.calls) == 3


def test_a_server_that_lists_a_model_and_refuses_it_is_asked_once(provider: Provider) -> None:
    with pytest.raises(OperatorFault, match="TEXT_MODEL"):
        answer_of(with_choice(prompt=f"[gone {MODELS[0]}]"), where(provider), within_s=10)
    assert len(provider.calls) == 1


def test_a_model_that_is_set_and_gone_fails_the_job_at_once(provider: Provider) -> None:
    with pytest.raises(OperatorFault, match="TEXT_MODEL"):
        answer_of(text("[gone asked-model]"), where(provider))
    assert (len(provider.calls), provider.lists_given) == (1, 0)


# ── pictures and sounds ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_picture_and_a_sound_come_as_bytes(provider: Provider) -> None:
    assert answer_of(image("A city"), where(provider)) == (picture(64, 48), "asked-model")
    assert answer_of(speech("Hello"), where(provider)) == (sound_wav(), "asked-model")


@table(
    "prompt",
    ("neither base64 nor a URL", "[empty]"),
    ("another object", "[shape]"),
    ("a list", "[shape list]"),
    ("nulls", "[shape null]"),
    ("a string", "[shape text]"),
    ("broken JSON", "[shape broken]"),
    ("another type for each field", "[shape types]"),
    ("bytes that aren't UTF-8", "[shape utf8]"),
)
def test_a_picture_that_cant_be_had_fails_the_job(provider: Provider, prompt: str) -> None:
    with pytest.raises(FailJob):
        answer_of(image(prompt), where(provider))


@table(
    "prompt, sentence",
    ("no bytes", "[empty]", sentences.NO_SOUND),
    ("JSON", "[shape]", sentences.UNUSABLE),
    ("broken JSON", "[shape broken]", sentences.UNUSABLE),
)
def test_an_answer_that_is_no_sound_fails_the_job(provider: Provider, prompt: str, sentence: str) -> None:
    with pytest.raises(FailJob) as caught:
        answer_of(speech(prompt), where(provider))
    assert caught.value.sentence == sentence


def test_a_sound_whose_encoding_is_cut_off_is_tried_again() -> None:
    with pytest.raises(RetryJob):
        answer_from(gzip.compress(sound_wav())[:-9], speech("Hello"), content_encoding="gzip")


@pytest.mark.parametrize("kind", [image, speech])
def test_an_error_in_an_answer_of_status_200_is_an_error(provider: Provider, kind: Kind) -> None:
    with pytest.raises(RetryJob):
        answer_of(kind("[shape error]"), where(provider))


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_the_key_goes_to_the_provider(provider: Provider, kind: Kind) -> None:
    answer_of(kind("Hello"), where(provider))
    assert [call.authorization for call in provider.calls] == [f"Bearer {KEY}"]


def test_a_server_without_key_gets_none_of_the_environment(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    answer_of(text("Hello"), where(provider, key=""))
    assert SECRET not in str(provider.calls[0].authorization)


def test_user_and_password_in_a_url_come_before_a_key(provider: Provider) -> None:
    named = at_url(provider.url.replace("://", "://user:word@"))
    assert answer_of(text("[say hello]"), named).text == "hello"
    assert provider.calls[0].authorization == f"Basic {base64.b64encode(b'user:word').decode()}"


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_versioned_interface_gets_the_key_in_both_headers(provider: Provider, kind: Kind) -> None:
    answer_of(kind("Hello"), at_url(f"{provider.url}?api-version=2024-10-21"))
    [call] = provider.calls
    assert (call.api_key, call.authorization, call.query) == (KEY, f"Bearer {KEY}", "api-version=2024-10-21")


@table(
    "path, query, api_key, authorization",
    ("by version", "/openai/deployments/my-model", "?api-version=2024-10-21", KEY, None),
    ("without one", "/v1", "", None, f"Bearer {KEY}"),
)
def test_azure_gets_the_key_in_its_own_header_where_its_interface_has_a_version(
    provider: Provider, proxies: Callable[..., None], path: str, query: str, api_key: str, authorization: str
) -> None:
    proxies(http_proxy=f"127.0.0.1:{provider.port}")
    assert answer_of(text("[say hello]"), at_url(f"http://name.openai.azure.com{path}{query}")).text == "hello"
    [call] = provider.calls
    assert (call.route, call.query) == (f"{path}/chat/completions", query.removeprefix("?"))
    assert (call.api_key, call.authorization) == (api_key, authorization)


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [(kind, prompt) for kind in (text, image, speech) for prompt in ("[status 401]", "[status 400]", "[cut]")]
    + [(kind, prompt) for kind in (text, image) for prompt in ("[shape]", "[shape broken]", "[html]", "[empty]")],
)
def test_neither_key_nor_prompt_nor_the_providers_words_reach_an_error(
    provider: Provider, kind: Kind, prompt: str
) -> None:
    with pytest.raises(JobError) as caught:
        answer_of(kind(f"{prompt} {SECRET}"), where(provider))
    shown = "".join(traceback.format_exception(caught.value)) + caught.value.sentence
    for secret in (KEY, SECRET, "Incorrect API key", "testbed)", "Welcome to the proxy"):
        assert secret not in shown


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", EVERY_KIND)
@table(
    "status, error",
    ("a bad request stays bad", 400, FailJob),
    ("a wrong key stays wrong", 401, FailJob),
    ("not allowed", 403, FailJob),
    ("no such model", 404, FailJob),
    ("a server that was slow", 408, RetryJob),
    ("a conflict passes", 409, RetryJob),
    ("too early", 425, RetryJob),
    ("too many", 429, RetryJob),
    ("unprocessable", 422, FailJob),
    ("a server's own fault", 500, RetryJob),
    ("overloaded", 503, RetryJob),
)
def test_an_error_status_says_whether_to_try_again(
    provider: Provider, kind: Kind, status: int, error: type[JobError]
) -> None:
    with pytest.raises(error, match=str(status)):
        answer_of(kind(f"[status {status}]"), where(provider))
    assert len(provider.calls) == 1


@table(
    "given, after_s",
    ("in seconds", "7", 7.0),
    ("less than a second", "0.5", 1.0),
    ("none at all", "0", 1.0),
    ("a date is no number", "Wed,", None),
    ("for ever", "inf", None),
    ("before now", "-3", None),
    ("not at all", "", None),
)
def test_retry_after_is_taken_where_it_is_a_number_of_seconds(
    provider: Provider, given: str, after_s: float | None
) -> None:
    option = f" retry-after={given}" if given else ""
    with pytest.raises(RetryJob) as caught:
        answer_of(text(f"[status 429{option}]"), where(provider))
    assert caught.value.after_s == after_s


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_an_answer_that_breaks_off_is_tried_again(provider: Provider, kind: Kind) -> None:
    with pytest.raises(RetryJob):
        answer_of(kind("[cut]"), where(provider))


@table(
    "prompt, error, sentence",
    ("a clean end in mid-text", "[half]", RetryJob, sentences.BROKE_OFF),
    ("no words", "[empty]", FailJob, sentences.NO_TEXT),
    ("its rules forbid it", "[finish content_filter]", FailJob, sentences.CONTENT_RULES),
    ("another object", "[shape]", FailJob, sentences.UNUSABLE),
    ("a list", "[shape list]", FailJob, sentences.UNUSABLE),
    ("nulls", "[shape null]", FailJob, sentences.UNUSABLE),
    ("a string", "[shape text]", FailJob, sentences.UNUSABLE),
    ("broken JSON", "[shape broken]", FailJob, sentences.UNUSABLE),
    ("an error in JSON", "[shape error]", RetryJob, RetryJob.default_sentence),
)
def test_a_text_that_cant_be_used_ends_with_its_own_sentence(
    provider: Provider, prompt: str, error: type[JobError], sentence: str
) -> None:
    with pytest.raises(error) as caught:
        answer_of(text(prompt), where(provider))
    assert caught.value.sentence == sentence
    assert len(provider.calls) == 1


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_web_page_is_the_operators_fault_and_asks_for_the_url(provider: Provider, kind: Kind) -> None:
    with pytest.raises(OperatorFault, match="is /v1 missing"):
        answer_of(kind("[html]"), where(provider))


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_redirect_is_not_followed_and_the_operator_reads_where_it_leads(provider: Provider, kind: Kind) -> None:
    with pytest.raises(OperatorFault) as caught:
        answer_of(kind(f"[redirect http://user:{SECRET}@127.0.0.1:9/v2/?key={SECRET}]"), where(provider))
    assert "127.0.0.1:9/v2/" in caught.value.detail
    assert SECRET not in caught.value.detail
    assert len(provider.calls) == 1


@pytest.mark.parametrize("coding", ["br", "gzip, br"])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_coding_that_nobody_asked_for_is_the_operators_fault(kind: Kind, coding: str) -> None:
    with pytest.raises(OperatorFault, match="encoded as"):
        answer_from(b"some bytes", kind("Hello"), content_encoding=coding)


@pytest.mark.parametrize("prompt", ["[big 100]", "[endless]"])
@pytest.mark.parametrize("kind", [*EVERY_KIND, pytest.param(lambda prompt: image(f"[url] {prompt}"), id="url")])
def test_an_answer_beyond_the_cap_fails_in_bounded_memory(provider: Provider, kind: Kind, prompt: str) -> None:
    answer_of(kind("warm up"), where(provider))
    tracemalloc.start()
    with pytest.raises(FailJob) as caught:
        answer_of(kind(prompt), where(provider))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "too large" in caught.value.sentence
    assert peak_bytes < 64 * MODEST_BYTES


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_provider_that_isnt_there_is_tried_again_uncounted(kind: Kind) -> None:
    place = at_url(f"http://{NOWHERE}/v1")
    with pytest.raises(RetryJob) as caught:
        answer_of(kind("Hello"), place)
    assert (caught.value.sentence, caught.value.is_counted) == ("The AI service can't be reached", False)


# ── connections ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_calls_share_a_connection(provider: Provider) -> None:
    async def ask_three_times(ours: OpenAIProvider) -> None:
        for kind in (text, text, speech):
            await kind("Hello")(ours)

    answer_of(ask_three_times, where(provider))
    assert len({call.connection for call in provider.calls}) == 1


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("prompt", ["[hang]", "[drip 0.5]"])
def test_a_cancelled_call_closes_its_socket(provider: Provider, kind: Kind, prompt: str) -> None:
    async def begin_and_cancel(ours: OpenAIProvider) -> None:
        call = asyncio.ensure_future(kind(prompt)(ours))
        await asyncio.to_thread(poll, lambda: provider.running, 10)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call

    answer_of(begin_and_cancel, where(provider))
    poll(lambda: provider.calls[0].outcome == "disconnected", 15)


# ── proxies, by our way and by aiohttp's ─────────────────────────────────────────────────────────────────────────


def as_proxy(provider: Provider, scheme: str = "http://") -> str:
    """The provider's address; it answers what is asked of it as a proxy as well."""
    return f"{scheme}127.0.0.1:{provider.port}"


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_the_way_leads_through_the_proxy_that_the_environment_names(
    provider: Provider, proxies: Callable[..., None], variable: str, scheme: str
) -> None:
    proxies(**{variable: as_proxy(provider, scheme), "no_proxy": "elsewhere.invalid"})
    beyond = at_url("http://provider.invalid/v1")
    assert answer_of(text("[say hello]"), beyond).text == "hello"
    with pytest.raises(RetryJob):
        answer_of(text("[say hello]"), at_url("http://elsewhere.invalid/v1"))


@table(
    "variables, url, proxy",
    ("none", {}, "https://host/v1", None),
    (
        "that of the scheme",
        {"https_proxy": "http://proxy:1", "all_proxy": "http://all:1"},
        "https://h",
        "http://proxy:1",
    ),
    ("that of all schemes", {"http_proxy": "http://proxy:1", "all_proxy": "http://all:1"}, "https://h", "http://all:1"),
    ("without a scheme of its own", {"https_proxy": "proxy:1"}, "https://host", "http://proxy:1"),
    ("not for this host", {"https_proxy": "proxy:1", "no_proxy": "host,other"}, "https://host:8443", None),
)
def test_the_environment_names_a_urls_proxy(
    proxies: Callable[..., None], variables: dict[str, str], url: str, proxy: str | None
) -> None:
    proxies(**variables)
    assert proxy_for(url) == proxy


@pytest.fixture
def netrc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials for this machine in `~/.netrc`, which other programs use."""
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login user password {SECRET}\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.mark.usefixtures("netrc")
@table("key, authorization", ("no key", "", None), ("a key", KEY, f"Bearer {KEY}"))
def test_credentials_in_netrc_are_not_for_the_provider(provider: Provider, key: str, authorization: str | None) -> None:
    answer_of(text("Hello"), where(provider, key))
    assert provider.calls[0].authorization == authorization


def trusting_the_environment(url: str, **options: Any) -> int:
    """Asks for a text by aiohttp with its own reading of the environment. Returns the status."""
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}

    async def ask() -> int:
        async with aiohttp.ClientSession(trust_env=True) as session:
            async with session.post(f"{url}/chat/completions", json=body, **options) as response:
                return response.status

    return asyncio.run(ask())


@table(
    "variable, scheme, error",
    ("it doesn't know the variable", "all_proxy", "http://", aiohttp.ClientConnectorError),
    ("it needs a scheme", "http_proxy", "", aiohttp.InvalidURL),
)
def test_aiohttps_trust_env_misses_proxies_that_other_programs_use(
    provider: Provider, proxies: Callable[..., None], variable: str, scheme: str, error: type[Exception]
) -> None:
    """If this fails, and the two tests below as well: then see what workerkit/proxies.py is still needed for."""
    proxies(**{variable: as_proxy(provider, scheme)})
    with pytest.raises(error):
        trusting_the_environment("http://provider.invalid/v1")


@pytest.mark.usefixtures("netrc")
def test_aiohttps_trust_env_sends_the_credentials_of_netrc_to_the_provider(provider: Provider) -> None:
    """If this fails, and the tests above and below as well: then see what workerkit/proxies.py is still needed for."""
    trusting_the_environment(provider.url)
    assert provider.calls[0].authorization == f"Basic {base64.b64encode(f'user:{SECRET}'.encode()).decode()}"


@pytest.mark.usefixtures("netrc")
def test_aiohttps_trust_env_refuses_a_key_beside_credentials_in_netrc(provider: Provider) -> None:
    """If this fails, and the two tests above as well: then see what workerkit/proxies.py is still needed for."""
    with pytest.raises(ValueError, match="Cannot combine"):
        trusting_the_environment(provider.url, headers={"authorization": f"Bearer {KEY}"})


# ── streams, by our way and by aiohttp's ─────────────────────────────────────────────────────────────────────────


def test_aiohttps_lines_do_not_end_at_cr(provider: Provider) -> None:
    """If this fails: then aiohttp's `readline` may replace `EventReader._lines` in workerkit/answers.py."""
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "[sse cr] [say one two]"}]}

    async def read_lines() -> list[bytes]:
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{provider.url}/chat/completions", json=body) as response:
                return [line async for line in response.content]

    [only] = asyncio.run(read_lines())
    assert only.count(b"\r\rdata: ") > 2


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices": [{"delta": {"content": "one"}}]}\n\n'


class BrokenChunk:
    """Sends a good chunk, once it is read a broken one, and notes when the client closes its connection."""

    def __init__(self) -> None:
        self.go_on, self.is_closed = asyncio.Event(), asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(CHUNKED + b"%x\r\n%s\r\n" % (len(EVENT), EVENT))
        await self.go_on.wait()
        writer.write(b"no number\r\n")
        while await reader.read(1024):
            pass
        self.is_closed.set()


def test_a_broken_chunk_ends_the_reading_of_a_stream() -> None:
    async def read() -> None:
        broken = BrokenChunk()
        async with server(broken) as url, opened(at_url(url)) as ours, asyncio.timeout(10):
            await text("Hello", on_delta=lambda _: broken.go_on.set())(ours)

    with pytest.raises(RetryJob):
        asyncio.run(read())


def test_aiohttp_wakes_no_reader_after_a_broken_chunk() -> None:
    """If this fails: then delete `connection_watched` from workerkit/client.py."""

    async def read() -> bool:
        broken = BrokenChunk()
        async with server(broken) as url, aiohttp.ClientSession() as session, session.get(url) as response:
            assert await response.content.readany() == EVENT
            reading = asyncio.ensure_future(response.content.readany())
            broken.go_on.set()
            await asyncio.wait_for(broken.is_closed.wait(), 10)
            await asyncio.wait([reading], timeout=0.5)
            is_awake = reading.done()
            reading.cancel()
        return is_awake

    assert not asyncio.run(read())
