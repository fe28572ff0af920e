"""The stand-in that answers where no provider is set: it signs what it makes, and takes any input."""

from __future__ import annotations

import asyncio
import io
import wave
from typing import Any

import pytest
from PIL import Image

from tests.lab import table
from workerkit.answers import TextAnswer
from workerkit.inputs import MAX_PROMPT_CHARACTERS
from workerkit.media import inspect_picture
from workerkit.offline import MODEL_OFFLINE, OfflineProvider, compose_melody, draw_picture
from workerkit.sounds import inspect_sound

ODD_PROMPTS = table(
    "prompt",
    ("another script", "тихое озеро 湖 🌊"),
    ("half a character", "half \ud83d"),
    ("control characters", "a\0b\x1b[2J\u202e"),
    ("as long as allowed", "x" * MAX_PROMPT_CHARACTERS),
)


def ask_for_text(prompt: str | list[dict[str, Any]], **fields: object) -> tuple[TextAnswer, list[str]]:
    """The answer, and its pieces in the order in which they came."""
    pieces: list[str] = []
    request = {"messages": [{"role": "user", "content": prompt}], **fields}
    return asyncio.run(OfflineProvider().text(request, pieces.append)), pieces


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_text_repeats_what_was_asked_and_says_that_no_model_wrote_it() -> None:
    answer, pieces = ask_for_text("What is a queue?", max_tokens=20)
    assert "What is a queue?" in answer.text
    assert answer.text.startswith(f"[{MODEL_OFFLINE}] No model wrote this")
    assert answer.tokens == len(pieces)


def test_a_text_repeats_the_words_of_a_message_but_not_its_pictures() -> None:
    words = {"type": "text", "text": "What is this?"}
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    answer = ask_for_text([words, picture], max_tokens=20)[0].text
    assert "You asked: “What is this? (a picture)”" in answer


def test_a_text_ends_at_its_cap() -> None:
    answer, pieces = ask_for_text("Hello", max_tokens=3)
    assert (answer.tokens, len(pieces)) == (3, 3)


@ODD_PROMPTS
def test_a_text_answers_any_prompt_briefly(prompt: str) -> None:
    assert len(ask_for_text(prompt, max_tokens=16)[0].text) < 1000


def test_a_stand_in_is_ready_at_once_and_needs_no_closing() -> None:
    async def use() -> None:
        provider = OfflineProvider()
        await provider.ready(0)
        await provider.close()

    asyncio.run(use())


# ── pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "size, resolution",
    ("as asked", "96x64", "96x64"),
    ("narrow", "16x256", "16x256"),
    ("the provider's choice", "auto", "1024x1024"),
)
def test_a_picture_has_the_size_that_was_asked_for(size: str, resolution: str) -> None:
    data, model = asyncio.run(OfflineProvider().image({"prompt": "A quiet lake", "size": size}))
    assert (inspect_picture(data), model) == ((resolution, "png"), MODEL_OFFLINE)


def test_a_pictures_file_says_what_made_it() -> None:
    with Image.open(io.BytesIO(draw_picture("A city", 64, 64))) as picture:
        assert picture.info["Software"] == MODEL_OFFLINE


def test_the_same_words_draw_the_same_picture_and_others_another() -> None:
    first, again, other = (draw_picture(prompt, 64, 64) for prompt in ("A city", "A city", "A city at night"))
    assert first == again != other


@pytest.mark.parametrize("place", ["a city at night", "the sea at dawn", "mountains at noon", "a desert at sunset"])
def test_each_kind_of_landscape_is_drawn(place: str) -> None:
    with Image.open(io.BytesIO(draw_picture(place, 128, 96))) as picture:
        colours = picture.convert("RGB").getcolors(maxcolors=128 * 96)
    assert colours is not None
    assert len(colours) > 100


@ODD_PROMPTS
def test_a_picture_is_drawn_for_any_prompt(prompt: str) -> None:
    assert inspect_picture(draw_picture(prompt, 32, 32)) == ("32x32", "png")


# ── sounds ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_sound_is_a_wav_with_a_note_for_each_word() -> None:
    data, model = asyncio.run(OfflineProvider().speech({"input": "one two three"}))
    same, duration_s, sound_format = inspect_sound(data)
    assert (same, sound_format, model) == (data, "wav", MODEL_OFFLINE)
    assert duration_s == pytest.approx(3 * 0.24 + 1.1, abs=0.01)


@table("speed, least_s, most_s", ("half as fast", 0.5, 3.5, 3.6), ("twice as fast", 2.0, 1.6, 1.7))
def test_a_sound_is_as_fast_as_asked(speed: float, least_s: float, most_s: float) -> None:
    data, _ = asyncio.run(OfflineProvider().speech({"input": "a b c d e", "speed": speed}))
    assert least_s <= inspect_sound(data)[1] <= most_s


def test_a_sounds_file_says_what_made_it() -> None:
    assert f"{MODEL_OFFLINE}: no voice, since no provider is set".encode() in compose_melody("one")


def test_a_sound_uses_the_whole_loudness_and_is_never_cut_off() -> None:
    with wave.open(io.BytesIO(compose_melody("one two three"))) as sound:
        frames = memoryview(sound.readframes(sound.getnframes())).cast("h")
    assert 25_000 < max(abs(frame) for frame in frames) < 32_767


@ODD_PROMPTS
def test_a_sound_is_made_for_any_words_and_stays_short(prompt: str) -> None:
    assert inspect_sound(compose_melody(prompt))[1] < 10
