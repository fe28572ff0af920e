"""What the bytes of a picture are, whatever the provider calls them."""

from __future__ import annotations

import base64
import io
import urllib.parse

import pytest
from PIL import Image

from testbed.answers import picture, picture_bomb
from tests.lab import table
from workerkit.errors import FailJob
from workerkit.media import decode_picture, inspect_picture, nearest_size
from workerkit.sentences import UNUSABLE

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


def two_pictures() -> bytes:
    """A JPEG that holds another one, as cameras with two lenses make it."""
    first, second = Image.new("RGB", (40, 30)), Image.new("RGB", (40, 30), "red")
    first.save(buffer := io.BytesIO(), "MPO", save_all=True, append_images=[second])
    return buffer.getvalue()


@table(
    "data, resolution, suffix",
    ("PNG", picture(40, 30), "40x30", "png"),
    ("JPEG", picture_as("JPEG"), "40x30", "jpg"),
    ("WebP", picture_as("WEBP"), "40x30", "webp"),
    ("several JPEGs in one file", two_pictures(), "40x30", "jpg"),
)
def test_a_pictures_resolution_and_format_are_read_from_its_bytes(data: bytes, resolution: str, suffix: str) -> None:
    assert inspect_picture(data) == (resolution, suffix)


@table(
    "data, sentence",
    ("nothing", b"", "can't be used"),
    ("a page", b"<html>no picture</html>", "can't be used"),
    ("a truncated PNG", picture(400, 300)[:-200], "can't be used"),
    ("a truncated JPEG", picture_as("JPEG")[:-200], "can't be used"),
    ("a head alone", picture(40, 30)[:20], "can't be used"),
    ("a format that isn't offered", picture_as("GIF"), "can't be used"),
)
def test_what_is_no_picture_fails_the_job(data: bytes, sentence: str) -> None:
    with pytest.raises(FailJob, match="picture") as caught:
        inspect_picture(data)
    assert sentence in caught.value.sentence


# The pictures are made in the test, since that takes a second, which each of pytest's processes would spend otherwise.
@table("side, sentence", ("many pixels", 9_000, "too large"), ("a bomb", 30_000, "can't be used"))
def test_a_picture_of_too_many_pixels_fails_the_job(side: int, sentence: str) -> None:
    with pytest.raises(FailJob, match="picture") as caught:
        inspect_picture(picture_bomb(side, side))
    assert sentence in caught.value.sentence


# ── base64 ───────────────────────────────────────────────────────────────────────────────────────────────────────

ALL_BYTES = bytes(range(256)) + b"="  # of a length that needs padding
PLAIN = base64.b64encode(ALL_BYTES).decode()
FOR_URLS = base64.urlsafe_b64encode(ALL_BYTES).decode()


@table(
    "text",
    ("plain", PLAIN),
    ("in lines", base64.encodebytes(ALL_BYTES).decode()),
    ("in lines as Windows ends them", PLAIN.replace("A", "A\r\n")),
    ("the alphabet for URLs", FOR_URLS),
    ("unpadded", PLAIN.rstrip("=")),
    ("the alphabet for URLs, unpadded", FOR_URLS.rstrip("=")),
    ("a data: URL", f"data:image/png;base64,{PLAIN}"),
    ("a data: URL in lines", f"data:image/png;base64,\n{base64.encodebytes(ALL_BYTES).decode()}"),
    ("a data: URL with a parameter", f"data:image/png;charset=utf-8;base64,{PLAIN}"),
    ("a data: URL without a type", f"data:;base64,{PLAIN}"),
    ("a data: URL in capitals, after a blank", f" DATA:image/png;BASE64,{PLAIN}"),
    ("a data: URL of escaped base64", f"data:image/png;base64,{urllib.parse.quote(PLAIN, safe='')}"),
    ("a data: URL with escapes alone", f"data:image/png,{urllib.parse.quote(ALL_BYTES)}"),
    ("a data: URL with small escapes", "data:image/png," + "".join(f"%{byte:02x}" for byte in ALL_BYTES)),
)
def test_a_picture_is_read_from_any_form_of_base64(text: str) -> None:
    assert decode_picture(text) == ALL_BYTES


@table(
    "text",
    ("words", "no picture"),
    ("a letter outside the alphabet", PLAIN[:8] + "!" + PLAIN[8:]),
    ("a letter of another script", PLAIN[:8] + "é" + PLAIN[8:]),
    ("half a character", "\ud83d"),
    ("half a character in a data: URL", "data:image/png,\ud83d"),
    ("one letter", "A"),
    ("padding in the middle", "AA==AAAA"),
    ("an address", "https://example.com/picture.png"),
)
def test_what_is_no_base64_fails_the_job(text: str) -> None:
    with pytest.raises(FailJob, match="base64") as caught:
        decode_picture(text)
    assert caught.value.sentence == UNUSABLE
