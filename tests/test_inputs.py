"""What a job's input may hold. All of it is checked before anything is spent."""

from __future__ import annotations

import re
import traceback
from typing import Any, ClassVar, Literal

import pytest

from testbed.processes import SOURCE
from tests.lab import AUDIO, IMAGE, SECRET, TEXT, table
from workerkit.errors import InvalidInput
from workerkit.inputs import (
    MAX_DATA_URL_BYTES,
    MAX_DATA_URLS_BYTES,
    MAX_PICTURES,
    AudioInput,
    ImageInput,
    JobInput,
    TextInput,
    Unsupported,
    check_input,
)

Model = type[JobInput]


def fault_of(model: Model, input_data: object) -> InvalidInput:
    """The failure with which a bad input ends the job."""
    with pytest.raises(InvalidInput) as caught:
        check_input(model, input_data)
    return caught.value


WEB_URL = "https://example.com/cat.png"
DATA_URL = "data:image/png;base64,iVBORw0KGgo="


def data_url(length: int) -> str:
    """A `data:` URL of this many characters, and up to three less."""
    head = "data:image/png;base64,"
    return head + "A" * ((length - len(head)) // 4 * 4)


def picture(url: object, **fields: object) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def said(*parts: object, role: str = "user") -> dict[str, Any]:
    """A text input with one message of these parts."""
    return {"messages": [{"role": role, "content": list(parts)}]}


def deep(levels: int) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for _ in range(levels):
        whole = {"x": whole}
    return whole


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


# ── good inputs ──────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "model, input_data",
    ("numbers as text", TextInput, {"prompt": "Hi", "max_tokens": "20", "temperature": "0.7"}),
    ("a whole number with a point", TextInput, {"prompt": "Hi", "max_tokens": 20.0}),
    ("one stop word", TextInput, {"prompt": "Hi", "stop": "END"}),
    ("nulls are missing", TextInput, {"prompt": "Hi", "max_tokens": None, "messages": None, "stop": None}),
    ("messages alone", TextInput, {"messages": [{"role": "user", "content": "Hi"}]}),
    ("the contract's text", TextInput, {"prompt": "Generate a story about AI", "max_tokens": 200}),
    ("the contract's picture", ImageInput, {"prompt": "A futuristic city", "size": "512x512"}),
    ("the contract's sound", AudioInput, {"text": "Hello world", "voice": "default"}),
    ("unknown keys", ImageInput, {"prompt": "Hi", "steps": 30, "n_iter": 9}),
    ("four stop words", TextInput, {"prompt": "Hi", "stop": list("abcd")}),
    ("the highest quality", ImageInput, {"prompt": "Hi", "quality": "max"}),
    ("no size", ImageInput, {"prompt": "Hi"}),
    ("the model's own size", ImageInput, {"prompt": "Hi", "size": "auto"}),
    ("an older client's sound", AudioInput, {"text": "Hi"}),
    ("a newer client's sound", AudioInput, {"prompt": "Hi"}),
    ("a voice of another server", AudioInput, {"text": "Hi", "voice": "en_US/amy-low:v2 .1"}),
)
def test_a_good_input_is_taken(model: Model, input_data: object) -> None:
    assert check_input(model, input_data)


def test_unknown_keys_and_nulls_are_left_out() -> None:
    checked = check_input(TextInput, {"prompt": "Hi", "stop": None, "unheard_of": 1})
    assert checked.model_dump(exclude_unset=True) == {"prompt": "Hi"}


# ── pictures in messages ─────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "part, sent",
    ("from the web", picture(WEB_URL), picture(WEB_URL)),
    ("without TLS", picture("http://10.0.0.7:8000/cat"), picture("http://10.0.0.7:8000/cat")),
    ("in capitals", picture("HTTPS://EXAMPLE.COM/CAT"), picture("HTTPS://EXAMPLE.COM/CAT")),
    ("in the message itself", picture(DATA_URL), picture(DATA_URL)),
    ("of another format", picture("data:image/WebP;base64,AAAA"), picture("data:image/WebP;base64,AAAA")),
    ("with a detail", picture(WEB_URL, detail="low"), picture(WEB_URL, detail="low")),
    ("with the newest detail", picture(WEB_URL, detail="original"), picture(WEB_URL, detail="original")),
    ("without a detail", picture(WEB_URL, detail=None), picture(WEB_URL)),
    ("by a plain URL", {"type": "image_url", "image_url": WEB_URL}, picture(WEB_URL)),
    ("with more keys", {**picture(WEB_URL, name="cat"), "text": None, "cache": 1}, picture(WEB_URL)),
)
def test_a_picture_is_passed_on_in_openais_form(part: dict[str, Any], sent: dict[str, Any]) -> None:
    checked = check_input(TextInput, said(text("What is this?"), part))
    assert isinstance(checked, TextInput)
    assert checked.conversation() == [{"role": "user", "content": [text("What is this?"), sent]}]


def test_messages_of_text_alone_stay_plain_texts() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    checked = check_input(TextInput, {"system": "Be brief.", "messages": messages, "prompt": "And now?"})
    assert isinstance(checked, TextInput)
    system, prompt = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "And now?"}
    assert checked.conversation() == [system, *messages, prompt]


@table("role", ("of the system", "system"), ("of the model", "assistant"))
def test_a_message_of_another_role_may_have_parts_of_text(role: str) -> None:
    assert check_input(TextInput, said(text("Hi"), text("again"), role=role))


@table(
    "input_data",
    ("as many pictures as may be", said(*[picture(WEB_URL)] * MAX_PICTURES)),
    ("a picture as large as may be", said(picture(data_url(MAX_DATA_URL_BYTES)))),
    ("pictures that are as large as may be", said(*[picture(data_url(MAX_DATA_URLS_BYTES // 4))] * 4)),
    ("much text beside a large picture", said(picture(data_url(5_000_000)), text("x" * 100_000))),
)
def test_pictures_and_text_have_caps_of_their_own(input_data: dict[str, Any]) -> None:
    assert check_input(TextInput, input_data)


BEGINNING = "should be a picture's URL that begins with https://, http:// or data:image/"
HEAD = "should begin with data:image/png;base64, or the same with jpeg, webp or gif"
BASE64 = "should have valid base64 behind the comma"
HOST = "should name a host and, if any, a valid port"


@table(
    "url, fault",
    ("a file", "file:///etc/passwd", BEGINNING),
    ("a blank", " ", BEGINNING),
    ("a space before it", f" {WEB_URL}", BEGINNING),
    ("bare base64", "iVBORw0KGgo=", BEGINNING),
    ("a number", 5, "should be a text"),
    ("no URL", None, "is missing"),
    ("another scheme", "ftp://example.com/cat.png", BEGINNING),
    ("no host", "https:///cat.png", HOST),
    ("a port without a host", "http://:80/cat.png", HOST),
    ("a port beyond all", "http://example.com:99999/", HOST),
    ("half an address", "http://[::1/cat.png", HOST),
    ("a password", f"https://user:{SECRET}@example.com/cat.png", "should hold no user and password"),
    ("a user", "https://user@example.com/cat.png", "should hold no user and password"),
    ("a space within", "https://example.com/a cat.png", "should hold no spaces"),
    ("a line end", "https://example.com/cat\n.png", "should hold no spaces, line ends"),
    ("too long", "https://example.com/" + "x" * 8192, "should have at most 8192 characters"),
    ("a drawing", "data:image/svg+xml;base64,AAAA", HEAD),
    ("a text", "data:text/html;base64,AAAA", HEAD),
    ("not base64", "data:image/png,AAAA", HEAD),
    ("a character too few", "data:image/png;base64,AAA", BASE64),
    ("padding too early", "data:image/png;base64,AA==AAAA", BASE64),
    ("padding that belongs nowhere", "data:image/png;base64,AAAA====", BASE64),
    ("a line end in base64", "data:image/png;base64,AAAA\nAAAA", BASE64),
    ("base64 of URLs", "data:image/png;base64,-_-_", BASE64),
    ("no ASCII", "data:image/png;base64,ÄÄÄÄ", BASE64),
    ("nothing", "data:image/png;base64,", "has no picture behind the comma"),
    ("too large", data_url(MAX_DATA_URL_BYTES + 4), "is over 6 MB; make the picture smaller"),
)
def test_a_url_that_names_no_picture_is_refused(url: object, fault: str) -> None:
    found = fault_of(TextInput, said(text("Hi"), picture(url)))
    assert found.sentence.startswith(f"Your request can't be used: messages.0.content.1.image_url.url {fault}")


OTHER_TYPE = "is a part of type '{}', which isn't supported here; use 'text' and 'image_url'"


@table(
    "part, place_and_fault",
    ("sound", {"type": "input_audio", "input_audio": {}}, " " + OTHER_TYPE.format("input_audio")),
    ("a file", {"type": "file", "file": {}}, " " + OTHER_TYPE.format("file")),
    ("a refusal", {"type": "refusal", "refusal": "No"}, " " + OTHER_TYPE.format("refusal")),
    ("the type of another interface", {"type": "input_image"}, " " + OTHER_TYPE.format("input_image")),
    ("words instead of a type", {"type": "A <b>cat</b>"}, ".type should be 'text' or 'image_url'"),
    ("a number instead of a type", {"type": 5}, ".type should be 'text' or 'image_url'"),
    ("no type", {"text": "Hi"}, ".type should be 'text' or 'image_url'"),
    ("a text", "Hi", " should be an object with a `type`"),
    ("no text", {"type": "text"}, ".text is missing"),
    ("a blank text", text(" "), ".text should not be blank"),
    ("a number for a text", {"type": "text", "text": 5}, ".text should be a text"),
    ("a text too long", text("x" * 100_001), ".text should have at most 100000 characters"),
    ("no picture", {"type": "image_url"}, ".image_url is missing"),
    ("a list of pictures", {"type": "image_url", "image_url": [WEB_URL]}, ".image_url should be a URL, or an object"),
    ("an unknown detail", picture(WEB_URL, detail="best"), ".image_url.detail should be 'auto', 'low', 'high'"),
)
def test_a_bad_part_is_named_by_its_place(part: object, place_and_fault: str) -> None:
    found = fault_of(TextInput, said(text("Hi"), part))
    assert found.sentence.startswith(f"Your request can't be used: messages.0.content.1{place_and_fault}")


PICTURE_OF_ANOTHER = "messages.0.content.0 is a picture in a message of role '{}'; put it into one of role 'user'"


@table(
    "input_data, fault",
    ("no parts", said(), "messages.0.content should have at least 1 item"),
    ("too many parts", said(*[text("x")] * 101), "messages.0.content should have at most 100 items"),
    ("an object", {"messages": [{"role": "user", "content": text("Hi")}]}, "messages.0.content should be a text, or a"),
    ("a picture of the model's", said(picture(WEB_URL), role="assistant"), PICTURE_OF_ANOTHER.format("assistant")),
    ("a picture of the system's", said(picture(WEB_URL), role="system"), PICTURE_OF_ANOTHER.format("system")),
    ("too many pictures", said(*[picture(WEB_URL)] * 17), "messages hold 17 pictures; send at most 16."),
    ("too large together", said(*[picture(data_url(4_000_004))] * 2), "messages hold pictures of over 8 MB together;"),
    ("too much text", said(text("x" * 60_000), text("x" * 60_000)), "it has messages of over 100000 characters"),
    (
        "too many pictures in many messages",
        {"messages": said(*[picture(WEB_URL)] * 9)["messages"] * 2},
        "messages hold 18 pictures; send at most 16.",
    ),
)
def test_content_that_cant_be_used_fails_with_a_sentence(input_data: dict[str, Any], fault: str) -> None:
    assert fault_of(TextInput, input_data).sentence.startswith(f"Your request can't be used: {fault}")


# ── fields that are refused by name ──────────────────────────────────────────────────────────────────────────────────

USABLE: dict[Model, dict[str, Any]] = {
    TextInput: {"prompt": "Hi"},
    ImageInput: {"prompt": "Hi"},
    AudioInput: {"text": "Hi"},
}


ASKED_FOR: tuple[tuple[str, Model, dict[str, Any], str], ...] = (
    ("many texts", TextInput, {"n": 2}, "n isn't supported here; send one job for each answer"),
    ("many texts, as text", TextInput, {"n": "2"}, "n isn't supported here; send one job for each answer"),
    ("true is not 1", TextInput, {"n": True}, "n isn't"),
    ("the best of many", TextInput, {"best_of": 3}, "best_of isn't"),
    (
        "a cap by its newer name",
        TextInput,
        {"max_completion_tokens": 9},
        "max_completion_tokens isn't supported here; use",
    ),
    (
        "a cap by another name",
        TextInput,
        {"max_output_tokens": 9},
        "max_output_tokens isn't supported here; use `max_to",
    ),
    ("instructions", TextInput, {"instructions": "Be brief."}, "instructions isn't supported here; use `system`"),
    ("an answer before", TextInput, {"previous_response_id": "r_1"}, "previous_response_id isn't"),
    ("tools", TextInput, {"tools": [{"type": "function"}]}, "tools isn't supported here; the model has no tools"),
    ("a choice of a tool", TextInput, {"tool_choice": "required"}, "tool_choice isn't"),
    ("functions", TextInput, {"functions": [{"name": "f"}]}, "functions isn't"),
    ("a function", TextInput, {"function_call": {"name": "f"}}, "function_call isn't"),
    ("a search of the web", TextInput, {"web_search_options": {}}, "web_search_options isn't"),
    ("thinking", TextInput, {"reasoning_effort": "high"}, "reasoning_effort isn't"),
    ("thinking by another name", TextInput, {"reasoning": {"effort": "low"}}, "reasoning isn't"),
    ("length", TextInput, {"verbosity": "low"}, "verbosity isn't supported here; say in the prompt how long"),
    ("a penalty", TextInput, {"presence_penalty": 0.5}, "presence_penalty isn't"),
    ("another penalty", TextInput, {"frequency_penalty": -1}, "frequency_penalty isn't"),
    ("a bias", TextInput, {"logit_bias": {"50256": -100}}, "logit_bias isn't"),
    ("probabilities", TextInput, {"logprobs": True}, "logprobs isn't"),
    ("many probabilities", TextInput, {"top_logprobs": 3}, "top_logprobs isn't"),
    ("sound", TextInput, {"modalities": ["text", "audio"]}, "modalities isn't"),
    ("a sound's voice", TextInput, {"audio": {"voice": "alloy"}}, "audio isn't"),
    ("a prediction", TextInput, {"prediction": {"type": "content"}}, "prediction isn't"),
    ("moderation", TextInput, {"moderation": {"model": "m"}}, "moderation isn't"),
    ("what comes after", TextInput, {"suffix": "The end"}, "suffix isn't"),
    ("the prompt again", TextInput, {"echo": True}, "echo isn't"),
    ("many pictures", ImageInput, {"n": 9}, "n isn't supported here; send one job for each picture"),
    ("a style", ImageInput, {"style": "vivid"}, "style isn't supported here; describe the style in `prompt`"),
    ("what not to show", ImageInput, {"negative_prompt": "rain"}, "negative_prompt isn't"),
    ("a background", ImageInput, {"background": "transparent"}, "background isn't"),
    ("a file's format", ImageInput, {"output_format": "webp"}, "output_format isn't"),
    ("compression", ImageInput, {"output_compression": 50}, "output_compression isn't"),
    (
        "base64",
        ImageInput,
        {"response_format": "b64_json"},
        "response_format isn't supported here; the picture comes as",
    ),
    ("less moderation", ImageInput, {"moderation": "low"}, "moderation isn't"),
    ("planning", ImageInput, {"complexity": "high"}, "complexity isn't"),
    ("halves of pictures", ImageInput, {"partial_images": 2}, "partial_images isn't"),
    ("a picture to edit", ImageInput, {"image": DATA_URL}, "image isn't supported here; pictures can't be edited"),
    ("pictures to edit", ImageInput, {"images": [DATA_URL]}, "images isn't"),
    ("a mask", ImageInput, {"mask": DATA_URL}, "mask isn't"),
    ("a sketch", ImageInput, {"markup": DATA_URL}, "markup isn't"),
    ("a film", ImageInput, {"frame_count": 9}, "frame_count isn't"),
    ("a slow film", ImageInput, {"frame_duration_ms": 500}, "frame_duration_ms isn't"),
    ("a drawing", ImageInput, {"svg": {"model": "m"}}, "svg isn't"),
    ("words by another name", AudioInput, {"input": "Hi"}, "input isn't supported here; put the words into `text`"),
    ("a way to speak", AudioInput, {"instructions": "Whisper."}, "instructions isn't"),
    (
        "a format by another name",
        AudioInput,
        {"response_format": "mp3"},
        "response_format isn't supported here; use `fo",
    ),
    ("a stream of events", AudioInput, {"stream_format": "sse"}, "stream_format isn't"),
)


@table("model, asked_for, advice", *ASKED_FOR)
def test_a_field_that_isnt_supported_is_refused_by_name(model: Model, asked_for: dict[str, Any], advice: str) -> None:
    assert fault_of(model, USABLE[model] | asked_for).sentence.startswith(f"Your request can't be used: {advice}")


def test_the_table_above_has_every_field_that_is_refused() -> None:
    tried = {(model, name) for _, model, asked_for, _ in ASKED_FOR for name in asked_for}
    assert tried == {(model, name) for model in USABLE for name in model.REFUSED}


def test_the_contract_names_every_field_that_is_refused() -> None:
    rows = re.findall(r"^\| `(\w+_generation)` \| (.*) \|$", (SOURCE / "docs/contract.md").read_text(), re.MULTILINE)
    named = {
        job_type: set(re.findall(r"`(\w+)`", cells)) for job_type, cells in rows if "`n`" in cells or "`input`" in cells
    }
    for job_type, model in ((TEXT, TextInput), (IMAGE, ImageInput), (AUDIO, AudioInput)):
        assert set(model.REFUSED) - named[job_type] == set()


def test_the_sentence_about_a_refused_field_reads_as_one() -> None:
    assert fault_of(TextInput, {"prompt": "Hi", "n": 3}).sentence == (
        "Your request can't be used: n isn't supported here; send one job for each answer."
    )


@table(
    "model, fields",
    ("one text", TextInput, {"n": 1, "best_of": "1"}),
    ("no tools", TextInput, {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "functions": []}),
    ("none of them", TextInput, {"tool_choice": "none", "function_call": "none", "parallel_tool_calls": False}),
    ("no penalties", TextInput, {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}}),
    ("no penalties, as text", TextInput, {"presence_penalty": "0", "frequency_penalty": "0.0"}),
    ("no probabilities", TextInput, {"logprobs": False, "top_logprobs": 0}),
    (
        "text alone",
        TextInput,
        {"modalities": ["text"], "audio": None, "verbosity": "medium", "suffix": "", "echo": False},
    ),
    ("nulls", TextInput, {"n": None, "tools": None, "reasoning_effort": None, "max_completion_tokens": None}),
    ("a stream", TextInput, {"stream": True, "stream_options": {"include_usage": True}}),
    ("no stream", TextInput, {"stream": False}),
    (
        "what is for the provider",
        TextInput,
        {"user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto"},
    ),
    ("what is for its cache", TextInput, {"prompt_cache_key": "k", "safety_identifier": "s"}),
    ("one picture", ImageInput, {"n": 1, "response_format": "url", "background": "auto", "style": ""}),
    ("a picture as usual", ImageInput, {"output_format": "png", "output_compression": 100, "moderation": "auto"}),
    ("no picture to edit", ImageInput, {"image": None, "mask": "", "partial_images": 0, "stream": True, "user": "u"}),
    ("a sound as usual", AudioInput, {"stream_format": "audio", "instructions": "", "response_format": None}),
)
def test_a_value_that_changes_nothing_is_taken(model: Model, fields: dict[str, Any]) -> None:
    assert check_input(model, USABLE[model] | fields) == check_input(model, USABLE[model])


@table(
    "field",
    ("calls of tools", {"tool_calls": [{"id": "1"}]}),
    ("a call of a function", {"function_call": {"name": "f"}}),
    ("sound", {"audio": {"id": "a_1"}}),
    ("a refusal", {"refusal": "No."}),
)
def test_a_field_of_a_message_that_isnt_supported_is_refused_by_its_place(field: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", **field}]
    place = f"messages.1.{next(iter(field))}"
    assert f"can't be used: {place} isn't supported here; send " in fault_of(TextInput, {"messages": messages}).sentence


def test_an_answer_of_openai_is_taken_as_a_message() -> None:
    answer: dict[str, Any] = {"role": "assistant", "content": "Hello", "refusal": None, "tool_calls": None}
    assert check_input(TextInput, {"messages": [{**answer, "annotations": []}], "prompt": "And now?"})


class Poster(ImageInput):
    style: str


class Song(JobInput):
    REFUSED: ClassVar = {"bpm": Unsupported("use `tempo`")}
    tempo: int


def test_an_input_of_your_own_refuses_no_field_unless_it_says_so() -> None:
    class Own(JobInput):
        title: str

    assert check_input(Own, {"title": "Hi", "n": 2, "tools": [1], "style": "vivid"})
    assert "bpm isn't supported here; use `tempo`" in fault_of(Song, {"tempo": 90, "bpm": 90}).sentence


def test_an_input_of_your_own_takes_true_and_false_where_it_asks_for_them() -> None:
    class Own(JobInput):
        is_loud: bool
        is_sure: Literal[True] | None = None
        times: int = 1

    assert check_input(Own, {"is_loud": False, "is_sure": True}).model_dump() == {
        "is_loud": False,
        "is_sure": True,
        "times": 1,
    }
    assert "times should not be true or false" in fault_of(Own, {"is_loud": True, "times": True}).sentence


def test_an_input_of_your_own_takes_a_field_that_its_base_refuses() -> None:
    assert check_input(Poster, {"prompt": "Hi", "style": "vivid"}).model_dump()["style"] == "vivid"
    assert "n isn't supported" in fault_of(Poster, {"prompt": "Hi", "style": "vivid", "n": 2}).sentence


# ── bad inputs ───────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "model, input_data, sentence",
    ("nothing", TextInput, {}, "needs a `prompt`"),
    ("null", TextInput, None, "should be an object"),
    ("a list", TextInput, ["Hi"], "should be an object"),
    ("a blank prompt", TextInput, {"prompt": " \n"}, "prompt should not be blank"),
    ("a prompt that is no text", TextInput, {"prompt": 5}, "prompt should be a text"),
    ("a prompt too long", TextInput, {"prompt": "x" * 100_001}, "prompt should have at most 100000 characters"),
    ("true is no number", TextInput, {"prompt": "Hi", "max_tokens": True}, "max_tokens should not be true or false"),
    ("no tokens", TextInput, {"prompt": "Hi", "max_tokens": 0}, "max_tokens should be greater than or equal to 1"),
    ("a word for a number", TextInput, {"prompt": "Hi", "max_tokens": "many"}, "max_tokens should be a whole number."),
    ("another word", TextInput, {"prompt": "Hi", "temperature": "hot"}, "temperature should be a number."),
    ("no list", TextInput, {"messages": "Hi"}, "messages should be a list."),
    ("half a token", TextInput, {"prompt": "Hi", "max_tokens": 1.5}, "max_tokens should be a whole number"),
    ("too hot", TextInput, {"prompt": "Hi", "temperature": 2.1}, "temperature should be less than or equal to 2"),
    ("not a number", TextInput, {"prompt": "Hi", "temperature": float("nan")}, "temperature should be a finite number"),
    ("more than all", TextInput, {"prompt": "Hi", "top_p": 1.1}, "top_p should be less than or equal to 1"),
    ("five stop words", TextInput, {"prompt": "Hi", "stop": list("abcde")}, "stop should be a text of at most 200"),
    ("a stop word too long", TextInput, {"prompt": "Hi", "stop": ["x" * 201]}, "stop should be a text of at most 200"),
    ("a stop word that is none", TextInput, {"prompt": "Hi", "stop": [5]}, "or a list of at most 4 of them"),
    ("a seed beyond 64 bits", TextInput, {"prompt": "Hi", "seed": 2**63}, "seed"),
    ("no messages", TextInput, {"messages": []}, "messages should have at least 1 item"),
    ("too many messages", TextInput, {"messages": [{"role": "user", "content": "x"}] * 201}, "at most 200 items"),
    (
        "an unknown role",
        TextInput,
        {"messages": [{"role": "tool", "content": "x"}]},
        "messages.0.role should be 'system'",
    ),
    ("messages too long together", TextInput, {"messages": [{"role": "user", "content": "x" * 60_000}] * 2}, "100000"),
    ("a message in words", TextInput, {"messages": ["Hi"]}, "messages.0 should be an object with `role` and `content`"),
    ("a message without words", TextInput, {"messages": [{"role": "user"}]}, "messages.0.content is missing"),
    ("a null for words", TextInput, {"messages": [{"role": "user", "content": None}]}, "messages.0.content is missing"),
    ("a blank message", TextInput, {"messages": [{"role": "user", "content": " "}]}, "content should not be blank"),
    (
        "a format in words",
        TextInput,
        {"prompt": "Hi", "response_format": "json"},
        "response_format should be an object",
    ),
    (
        "a schema too large",
        TextInput,
        {"prompt": "Hi", "response_format": {"x": "y" * 100_001}},
        "response_format should have at most 100000 characters",
    ),
    (
        "a schema that is no JSON",
        TextInput,
        {"prompt": "Hi", "response_format": {"x": float("inf")}},
        "response_format should hold only what JSON can",
    ),
    ("a schema too deep", TextInput, {"prompt": "Hi", "response_format": deep(5000)}, "not be nested over 50 levels"),
    ("no words for a picture", ImageInput, {"size": "512x512"}, "prompt is missing"),
    ("a size in words", ImageInput, {"prompt": "Hi", "size": "big"}, "size should be a width and a height in pixels"),
    ("no width", ImageInput, {"prompt": "Hi", "size": "0x512"}, "size should be a width and a height in pixels"),
    (
        "digits of another script",
        ImageInput,
        {"prompt": "Hi", "size": "1٥٠x1٥٠"},
        "size should be a width and a height",
    ),
    ("a size too large", ImageInput, {"prompt": "Hi", "size": "8192x512"}, "size should be at most 4096x4096"),
    ("an unknown quality", ImageInput, {"prompt": "Hi", "quality": "best"}, "quality should be 'auto', 'low'"),
    ("no words for a sound", AudioInput, {"voice": "default"}, "needs a `text` (or a `prompt`)"),
    ("a voice whose name is too long", AudioInput, {"text": "Hi", "voice": "a" * 65}, "voice should be a voice's name"),
    ("a voice with a line end", AudioInput, {"text": "Hi", "voice": "a\n"}, "voice should be a voice's name"),
    (
        "a voice as an object",
        AudioInput,
        {"text": "Hi", "voice": {"id": "v_1"}},
        "voice should be a voice's name as text",
    ),
    ("too slow", AudioInput, {"text": "Hi", "speed": 0.1}, "speed should be greater than or equal to 0.25"),
    ("a format that can't be checked", AudioInput, {"text": "Hi", "format": "aac"}, "format should be 'wav', 'mp3'"),
)
def test_a_bad_input_fails_with_a_sentence_about_its_fault(model: Model, input_data: object, sentence: str) -> None:
    assert sentence in fault_of(model, input_data).sentence


def test_the_sentence_about_a_bad_input_reads_as_one() -> None:
    assert fault_of(TextInput, {"prompt": "Hi", "temperature": 3}).sentence == (
        "Your request can't be used: temperature should be less than or equal to 2."
    )


@table(
    "input_data",
    ("in a prompt", {"prompt": [SECRET]}),
    ("in a role", {"messages": [{"role": SECRET, "content": SECRET}]}),
    ("in a number", {"prompt": SECRET, "seed": SECRET}),
    ("in a choice", {"prompt": SECRET, "stop": {SECRET: SECRET}}),
    ("in a part", said(text("Hi"), {"type": SECRET})),
    ("in a picture's address", said(picture(f"https://u:{SECRET}@example.com/"))),
    ("in a picture", said(picture(f"data:image/png;base64,{SECRET}"))),
    ("in a detail", said(picture(WEB_URL, detail=SECRET))),
    ("in a refused field", {"prompt": "Hi", "tools": [SECRET]}),
    ("in a name", {"prompt": "Hi", "response_format": {SECRET: float("nan")}}),
)
def test_what_the_person_wrote_never_reaches_the_log(input_data: dict[str, Any]) -> None:
    fault = fault_of(TextInput, input_data)
    assert SECRET not in fault.detail + "".join(traceback.format_exception(fault))


def test_the_names_that_the_person_chose_never_reach_the_log() -> None:
    class Own(JobInput):
        weights: dict[str, int]

    fault = fault_of(Own, {"weights": {SECRET: "much"}})
    assert fault.detail == "input: weights int_parsing"
    assert f"weights.{SECRET} should be a whole number" in fault.sentence


def test_a_key_that_an_input_of_your_own_forbids_never_reaches_the_log() -> None:
    class Own(JobInput, extra="forbid"):
        title: str

    assert fault_of(Own, {"title": "Hi", SECRET: 1}).detail == "input: it extra_forbidden"


def test_the_log_names_a_field_that_is_refused() -> None:
    assert fault_of(TextInput, {"prompt": "Hi", "tools": [SECRET]}).detail == "input: tools unsupported"


def test_a_sentence_stays_short_whatever_a_name_is() -> None:
    class Own(JobInput):
        weights: dict[str, int]

    assert len(fault_of(Own, {"weights": {"x" * 5000: "much"}}).sentence) < 250
