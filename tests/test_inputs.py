"""What a job's input may hold. All of it is checked before anything is spent."""

from __future__ import annotations

import traceback
from typing import Any

import pytest

from tests.lab import SECRET, table
from workerkit.errors import InvalidInput
from workerkit.inputs import AudioInput, ImageInput, JobInput, TextInput, check_input

Model = type[JobInput]


def fault_of(model: Model, input_data: object) -> InvalidInput:
    """The failure with which a bad input ends the job."""
    with pytest.raises(InvalidInput) as caught:
        check_input(model, input_data)
    return caught.value


# ── good inputs ──────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "model, input_data",
    ("numbers as text", TextInput, {"prompt": "Hi", "max_tokens": "20", "temperature": "0.7"}),
    ("a whole number with a point", TextInput, {"prompt": "Hi", "max_tokens": 20.0}),
    ("one stop word", TextInput, {"prompt": "Hi", "stop": "END"}),
    ("nulls are missing", TextInput, {"prompt": "Hi", "max_tokens": None, "messages": None, "stop": None}),
    ("messages alone", TextInput, {"messages": [{"role": "user", "content": "Hi"}]}),
    ("unknown keys", ImageInput, {"prompt": "Hi", "style": "vivid", "n": 9}),
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


# ── bad inputs ───────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "model, input_data, sentence",
    ("nothing", TextInput, {}, "needs a `prompt`"),
    ("null", TextInput, None, "should be an object"),
    ("a list", TextInput, ["Hi"], "should be an object"),
    ("a blank prompt", TextInput, {"prompt": " \n"}, "prompt should not be blank"),
    ("a prompt that is no text", TextInput, {"prompt": 5}, "prompt should be a valid string"),
    ("a prompt too long", TextInput, {"prompt": "x" * 100_001}, "prompt string should have at most 100000 characters"),
    ("true is no number", TextInput, {"prompt": "Hi", "max_tokens": True}, "max_tokens should not be true or false"),
    ("no tokens", TextInput, {"prompt": "Hi", "max_tokens": 0}, "max_tokens should be greater than or equal to 1"),
    ("half a token", TextInput, {"prompt": "Hi", "max_tokens": 1.5}, "max_tokens should be a valid integer"),
    ("too hot", TextInput, {"prompt": "Hi", "temperature": 2.1}, "temperature should be less than or equal to 2"),
    ("not a number", TextInput, {"prompt": "Hi", "temperature": float("nan")}, "temperature should be a finite number"),
    ("more than all", TextInput, {"prompt": "Hi", "top_p": 1.1}, "top_p should be less than or equal to 1"),
    ("five stop words", TextInput, {"prompt": "Hi", "stop": list("abcde")}, "stop"),
    ("a seed beyond 64 bits", TextInput, {"prompt": "Hi", "seed": 2**63}, "seed"),
    ("no messages", TextInput, {"messages": []}, "messages list should have at least 1 item"),
    ("too many messages", TextInput, {"messages": [{"role": "user", "content": "x"}] * 201}, "at most 200 items"),
    (
        "an unknown role",
        TextInput,
        {"messages": [{"role": "tool", "content": "x"}]},
        "messages.0.role should be 'system'",
    ),
    ("messages too long together", TextInput, {"messages": [{"role": "user", "content": "x" * 60_000}] * 2}, "100000"),
    ("a schema too large", TextInput, {"prompt": "Hi", "response_format": {"x": "y" * 100_001}}, "`response_format`"),
    ("no words for a picture", ImageInput, {"size": "512x512"}, "prompt field required"),
    ("a size in words", ImageInput, {"prompt": "Hi", "size": "big"}, "size"),
    ("no width", ImageInput, {"prompt": "Hi", "size": "0x512"}, "size"),
    ("a size too large", ImageInput, {"prompt": "Hi", "size": "8192x512"}, "size should be at most 4096x4096"),
    ("an unknown quality", ImageInput, {"prompt": "Hi", "quality": "best"}, "quality should be 'auto', 'low'"),
    ("no words for a sound", AudioInput, {"voice": "default"}, "needs a `text` (or a `prompt`)"),
    ("a voice whose name is too long", AudioInput, {"text": "Hi", "voice": "a" * 65}, "voice"),
    ("a voice with a line end", AudioInput, {"text": "Hi", "voice": "a\n"}, "voice"),
    ("too slow", AudioInput, {"text": "Hi", "speed": 0.1}, "speed should be greater than or equal to 0.25"),
    ("a format that can't be checked", AudioInput, {"text": "Hi", "format": "aac"}, "format should be 'wav', 'mp3'"),
)
def test_a_bad_input_fails_with_a_sentence_about_its_fault(model: Model, input_data: object, sentence: str) -> None:
    assert sentence in fault_of(model, input_data).sentence


def test_the_sentence_about_a_bad_input_reads_as_one() -> None:
    assert fault_of(TextInput, {"prompt": "Hi", "temperature": 3}).sentence == (
        "The input can't be used: temperature should be less than or equal to 2."
    )


@table(
    "input_data",
    ("in a prompt", {"prompt": [SECRET]}),
    ("in a role", {"messages": [{"role": SECRET, "content": SECRET}]}),
    ("in a number", {"prompt": SECRET, "seed": SECRET}),
    ("in a choice", {"prompt": SECRET, "stop": {SECRET: SECRET}}),
)
def test_what_the_person_wrote_never_reaches_the_log(input_data: dict[str, Any]) -> None:
    fault = fault_of(TextInput, input_data)
    assert SECRET not in fault.detail + "".join(traceback.format_exception(fault))
