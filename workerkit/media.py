"""What the bytes of a picture or a sound are, whatever their sender calls them."""

from __future__ import annotations

import base64
import io
import math
import struct
from collections.abc import Sequence

from workerkit.errors import FailJob
from workerkit.sentences import UNUSABLE

MAX_PICTURE_SIDE = 4096
MAX_PICTURE_PIXELS = MAX_PICTURE_SIDE**2
PICTURE_SUFFIXES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
SOUND_MAGIC = {b"RIFF": "wav", b"OggS": "opus", b"fLaC": "flac", b"ID3": "mp3", b"\xff": "mp3"}


def nearest_size(wanted: str, offered: Sequence[str]) -> str:
    """The offered size (like 1024x1024) that is closest in shape, then in area; the wanted one if none is offered."""
    if not offered or wanted == "auto" or wanted in offered:
        return wanted
    width, height = map(int, wanted.split("x"))

    def distance(size: str) -> tuple[float, float]:
        w, h = map(int, size.split("x"))
        return round(abs(math.log(w / h * height / width)), 2), abs(math.log(w * h / width / height))

    return min(offered, key=distance)


def inspect_picture(data: bytes) -> tuple[str, str]:
    """Resolution (like 1024x1024) and file suffix of a picture, which is decoded to its end.

    Raises:
        FailJob: it isn't a PNG, JPEG or WebP, is cut off, or would take too much memory when unpacked.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=list(PICTURE_SUFFIXES)) as picture:
            width, height = picture.size
            if width * height > MAX_PICTURE_PIXELS:
                raise FailJob(f"a picture of {width}x{height}", "The provider's picture is too large.")
            picture.load()
            return f"{width}x{height}", PICTURE_SUFFIXES[str(picture.format)]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FailJob(f"no picture: {type(error).__name__}", UNUSABLE) from None


def decode_picture(text: str) -> bytes:
    return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text)


def with_true_sizes(wav: bytes) -> bytes:
    """The WAV with true sizes in its header. Servers that stream write unknown ones, which read as 24 hours."""
    at = 12
    while at + 8 <= len(wav):
        name, size = struct.unpack_from("<4sI", wav, at)
        if name == b"data":
            whole, data = struct.pack("<I", len(wav) - 8), struct.pack("<I", min(size, len(wav) - at - 8))
            return wav[:4] + whole + wav[8 : at + 4] + data + wav[at + 8 :]
        at += 8 + size + size % 2
    return wav


def inspect_sound(data: bytes) -> tuple[bytes, float, str]:
    """The sound with a true header, its duration in seconds, and its format.

    Raises:
        FailJob: it isn't a WAV, MP3, Ogg Opus or FLAC, or has no duration.
    """
    from tinytag import TinyTag
    from tinytag.tinytag import TinyTagException

    sound_format = next((name for magic, name in SOUND_MAGIC.items() if data.startswith(magic)), None)
    if sound_format == "wav":
        data = with_true_sizes(data)
    try:
        duration_s = TinyTag.get(file_obj=io.BytesIO(data), tags=False).duration if sound_format else None
    except (TinyTagException, OSError, ValueError, LookupError, struct.error) as error:
        raise FailJob(f"no sound: {type(error).__name__}", UNUSABLE) from None
    if not sound_format or not duration_s or not math.isfinite(duration_s):
        raise FailJob("no sound that has a duration", UNUSABLE)
    return data, round(duration_s, 2), sound_format
