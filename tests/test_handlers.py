"""What the handlers ask of a provider, which provider they get, and job types of your own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import worker
from testbed.processes import SOURCE
from testbed.provider import Provider
from tests.lab import IMAGE, TEXT, bare_settings, generate, serving, table
from workerkit.provider import Providers
from workerkit.settings import PROVIDER_KINDS


def body_of(provider: Provider, job_type: str, input_data: object, **values: object) -> dict[str, Any]:
    """What the provider was asked for this input."""
    generate(job_type, input_data, serving(provider, **values))
    return provider.calls[0].body


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_text_parameters_are_passed_on(provider: Provider) -> None:
    more = {"temperature": 0.5, "top_p": 0.9, "stop": ["END"], "seed": 7, "response_format": {"type": "json_object"}}
    body = body_of(provider, "text_generation", {"prompt": "Hi", "max_tokens": 20, **more})
    assert {name: body[name] for name in more} == more
    assert (body["max_tokens"], body["stream"]) == (20, True)


def test_what_isnt_given_isnt_sent(provider: Provider) -> None:
    body = body_of(provider, "text_generation", {"prompt": "Hi", "temperature": None, "unknown_field": 1})
    assert set(body) == {"model", "messages", "stream", "stream_options"}


@table("asked, cap", ("none", None, 50), ("less", 20, 20))
def test_the_operators_cap_is_sent_where_it_is_set_and_a_job_asks_for_no_other(
    provider: Provider, asked: int | None, cap: int
) -> None:
    body = body_of(provider, "text_generation", {"prompt": "Hi", "max_tokens": asked}, text_max_tokens=50)
    assert body["max_tokens"] == cap


def test_a_zero_temperature_is_a_temperature(provider: Provider) -> None:
    assert body_of(provider, "text_generation", {"prompt": "Hi", "temperature": 0})["temperature"] == 0


def test_system_messages_and_prompt_make_the_conversation_in_this_order(provider: Provider) -> None:
    messages = [{"role": "user", "content": "1", "name": "x"}, {"role": "assistant", "content": "2"}]
    body = body_of(provider, "text_generation", {"system": "0", "messages": messages, "prompt": "3"})
    assert [message["content"] for message in body["messages"]] == ["0", "1", "2", "3"]
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "user"]


def test_a_picture_in_a_message_is_passed_on(provider: Provider) -> None:
    words, url = {"type": "text", "text": "What is this?"}, "data:image/png;base64,AAAA"
    content = [words, {"type": "image_url", "image_url": url}]
    body = body_of(provider, TEXT, {"messages": [{"role": "user", "content": content}]})
    sent = [words, {"type": "image_url", "image_url": {"url": url}}]
    assert body["messages"] == [{"role": "user", "content": sent}]


def test_picture_parameters_are_passed_on(provider: Provider) -> None:
    body = body_of(provider, "image_generation", {"prompt": "A city", "size": "256x128", "quality": "hd"})
    assert body == {"model": "testbed-model", "prompt": "A city", "size": "256x128", "quality": "hd"}


def test_a_picture_of_no_size_is_of_the_models_own(provider: Provider) -> None:
    assert body_of(provider, "image_generation", {"prompt": "A city"}) == {"model": "testbed-model", "prompt": "A city"}


def test_sound_parameters_are_passed_on(provider: Provider) -> None:
    asked_for = {"prompt": "Hello", "voice": "nova", "speed": 1.5, "format": "mp3"}
    body = body_of(provider, "audio_generation", asked_for)
    usual = {"model": "testbed-model", "input": "Hello"}
    assert body == {**usual, "voice": "nova", "speed": 1.5, "response_format": "mp3"}


@table("input_data", ("missing", {"text": "Hi"}), ("asked for", {"text": "Hi", "voice": "default"}))
def test_the_default_voice_is_the_configured_one(provider: Provider, input_data: dict[str, str]) -> None:
    assert body_of(provider, "audio_generation", input_data, audio_voice="echo")["voice"] == "echo"


def test_text_wins_over_prompt_where_a_sound_job_has_both(provider: Provider) -> None:
    assert body_of(provider, "audio_generation", {"text": "this", "prompt": "that"})["input"] == "this"


def test_the_sizes_of_a_picture_model_are_a_setting(provider: Provider) -> None:
    body = body_of(provider, IMAGE, {"prompt": "Hi", "size": "512x512"}, image_sizes="64x64,128x64")
    assert body["size"] == "64x64"


# ── providers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_type_has_its_own_server_and_those_alike_share_one() -> None:
    urls = {"openai_base_url": "http://all/v1", "image_base_url": "http://pictures/v1"}

    async def get() -> list[str]:
        providers = Providers(bare_settings(**urls))
        made: list[Any] = [providers.get(kind) for kind in PROVIDER_KINDS]
        assert made[0] is made[2]
        await asyncio.gather(*(provider.close() for provider in made))
        return [provider.base_url for provider in made]

    assert asyncio.run(get()) == ["http://all/v1", "http://pictures/v1", "http://all/v1"]


def test_one_server_with_two_keys_is_asked_with_each_types_own() -> None:
    keys = {"openai_api_key": "the key for text", "image_api_key": "the key for pictures"}

    async def get() -> list[dict[str, str]]:
        providers = Providers(bare_settings(openai_base_url="http://all/v1", image_base_url="http://all/v1", **keys))
        made: list[Any] = [providers.get(kind) for kind in PROVIDER_KINDS[:2]]
        await asyncio.gather(*(provider.close() for provider in made))
        return [provider._headers for provider in made]

    assert asyncio.run(get()) == [{"authorization": f"Bearer {key}"} for key in keys.values()]


def test_with_neither_key_nor_url_the_stand_in_serves_and_signs() -> None:
    pieces: list[str] = []
    result = generate(TEXT, {"prompt": "Hello"}, bare_settings(), pieces)
    assert result.output["model_used"] == "offline-stand-in"
    assert "".join(pieces) == result.output["generated_text"]


@table("values, is_loaded", ("offline", {}, False), ("with a provider", {"openai_base_url": "http://x"}, True))
def test_the_http_client_is_loaded_ahead_where_it_will_be_used(values: dict[str, str], is_loaded: bool) -> None:
    script = """
import json, sys, worker
worker.Runtime(worker.Settings(_env_file=None, **json.loads(sys.argv[1]))).providers.preload()
print("aiohttp" in sys.modules)
"""
    command = [sys.executable, "-c", script, json.dumps(values)]
    ended = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, timeout=30)
    assert ended.stdout == f"{is_loaded}\n"


# ── job types of your own ────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "source, fault",
    ("a fault of its own", "x = 1\nx['secret']", "TypeError at faulty_handlers.py:2"),
    ("a variable that isn't set", "import os\nos.environ['NO_SUCH']", "KeyError at faulty_handlers.py:2"),
    ("a library that isn't there", "import no_such_library", "ModuleNotFoundError at faulty_handlers.py:1"),
    ("no Python", "x = 1\ny = (", "SyntaxError at faulty_handlers.py:2"),
)
def test_a_module_of_job_types_that_cant_be_imported_ends_the_start_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, fault: str
) -> None:
    (tmp_path / "faulty_handlers.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    worker.configure(bare_settings(handler_modules="faulty_handlers"))
    with pytest.raises(SystemExit) as ended:
        worker.import_handlers()
    assert ended.value.code == 2
    assert f"HANDLER_MODULES names faulty_handlers, which raises {fault}." in capsys.readouterr().err
