"""What the bytes of a picture or a sound are, whatever the provider calls them."""

from __future__ import annotations

import io
import wave

import pytest
from PIL import Image

from testbed.answers import SOUND_DURATION_S, picture, picture_bomb, sound_flac, sound_mp3, sound_opus, sound_wav
from tests.lab import table
from workerkit.errors import FailJob
from workerkit.media import inspect_picture, nearest_size
from workerkit.sentences import UNUSABLE
from workerkit.sounds import inspect_sound

# ── sizes ────────────────────────────────────────────────────────────────────────────────────────────────────────

OFFERED = ("1024x1024", "1536x1024", "1024x1536")


@table(
    "asked_size, offered, size",
    ("anything goes", "512x512", (), "512x512"),
    ("offered", "1024x1536", OFFERED, "1024x1536"),
    ("auto is the model's own choice", "auto", OFFERED, "auto"),
    ("a small square", "512x512", OFFERED, "1024x1024"),
    ("wide", "1792x1024", OFFERED, "1536x1024"),
    ("high", "1024x1792", OFFERED, "1024x1536"),
    ("of two squares the nearer", "600x600", ("256x256", "512x512", "1024x1024"), "512x512"),
    ("shape before area", "256x512", ("256x256", "1024x2048"), "1024x2048"),
)
def test_the_nearest_size_that_the_model_knows_is_used(asked_size: str, offered: tuple[str, ...], size: str) -> None:
    assert nearest_size(asked_size, offered) == size


# ── pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────


def picture_as(format_name: str) -> bytes:
    Image.new("RGB", (40, 30)).save(buffer := io.BytesIO(), format_name)
    return buffer.getvalue()


@table(
    "data, resolution, suffix",
    ("PNG", picture(40, 30), "40x30", "png"),
    ("JPEG", picture_as("JPEG"), "40x30", "jpg"),
    ("WebP", picture_as("WEBP"), "40x30", "webp"),
)
def test_a_pictures_resolution_and_format_are_read_from_its_bytes(data: bytes, resolution: str, suffix: str) -> None:
    assert inspect_picture(data) == (resolution, suffix)


@table(
    "data, sentence",
    ("nothing", b"", "could not be used"),
    ("a page", b"<html>no picture</html>", "could not be used"),
    ("a truncated PNG", picture(400, 300)[:-200], "could not be used"),
    ("a truncated JPEG", picture_as("JPEG")[:-200], "could not be used"),
    ("a head alone", picture(40, 30)[:20], "could not be used"),
    ("a format that isn't offered", picture_as("GIF"), "could not be used"),
)
def test_what_is_no_picture_fails_the_job(data: bytes, sentence: str) -> None:
    with pytest.raises(FailJob, match="picture") as caught:
        inspect_picture(data)
    assert sentence in caught.value.sentence


# The pictures are made in the test, since that takes a second, which each of pytest's processes would spend otherwise.
@table("side, sentence", ("many pixels", 9_000, "too large"), ("a bomb", 30_000, "could not be used"))
def test_a_picture_of_too_many_pixels_fails_the_job(side: int, sentence: str) -> None:
    with pytest.raises(FailJob, match="picture") as caught:
        inspect_picture(picture_bomb(side, side))
    assert sentence in caught.value.sentence


# ── sounds ───────────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "data, sound_format",
    ("WAV", sound_wav(), "wav"),
    ("MP3", sound_mp3(), "mp3"),
    ("MP3 with a title", b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + sound_mp3(), "mp3"),
    ("FLAC", sound_flac(), "flac"),
    ("Opus in Ogg", sound_opus(), "opus"),
)
def test_a_sounds_duration_and_format_are_read_from_its_bytes(data: bytes, sound_format: str) -> None:
    same, duration_s, found = inspect_sound(data)
    assert (same, found) == (data, sound_format)
    assert duration_s == pytest.approx(SOUND_DURATION_S, abs=0.06)


def with_comment(data: bytes, comment: bytes) -> bytes:
    """The same WAV with a comment chunk before its samples."""
    at = data.index(b"data", 12)
    return data[:at] + b"LIST" + len(comment).to_bytes(4, "little") + comment + data[at:]


@table(
    "data",
    ("unknown sizes", sound_wav(streaming=True)),
    ("a comment before the samples", with_comment(sound_wav(streaming=True), b"INFOICMT")),
    ("a comment that says data", with_comment(sound_wav(streaming=True), b"INFOICMT with data in it")),
)
def test_a_streamed_wav_gets_its_true_sizes(data: bytes) -> None:
    fixed, duration_s, _ = inspect_sound(data)
    assert duration_s == pytest.approx(SOUND_DURATION_S, abs=0.01)
    with wave.open(io.BytesIO(fixed)) as sound:
        assert sound.getnframes() / sound.getframerate() == pytest.approx(SOUND_DURATION_S)


@table(
    "data",
    ("a page", b"<html>no sound</html>"),
    ("garbage", b"\x01\x02\x03" * 100),
    ("garbage that begins as an MP3", b"\xff\x00garbage" * 50),
    ("a head alone", b"RIFF"),
    ("no samples", sound_wav()[:44]),
    ("a cut FLAC", b"fLaC" + bytes(3)),
    ("a cut Ogg", sound_opus()[:40]),
)
def test_what_is_no_sound_fails_the_job(data: bytes) -> None:
    with pytest.raises(FailJob) as caught:
        inspect_sound(data)
    assert caught.value.sentence == UNUSABLE
