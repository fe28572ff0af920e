"""What the bytes of a picture are, whatever their sender calls them."""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
import string
from collections.abc import Sequence

from workerkit.errors import FailJob
from workerkit.sentences import PICTURE_TOO_LARGE, UNUSABLE

MAX_PICTURE_SIDE = 4096
MAX_PICTURE_PIXELS = MAX_PICTURE_SIDE**2
PICTURE_SUFFIXES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}


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
                raise FailJob(f"a picture of {width}x{height}", PICTURE_TOO_LARGE)
            picture.load()
            return f"{width}x{height}", PICTURE_SUFFIXES.get(str(picture.format), "jpg")  # MPO: several JPEGs in one
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FailJob(f"no picture: {type(error).__name__}", UNUSABLE) from None


DATA_URL = re.compile(r"\s*data:[\w/+.-]*(?:;[\w=.+-]+)*,", re.IGNORECASE)
STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")


def unquote(data: bytes) -> bytes:
    """The bytes of percent-encoded text. Quoted-printable differs in its mark only; urllib takes gigabytes."""
    return binascii.a2b_qp(data.replace(b"=", b"=3D").replace(b"%", b"="))


def decode_picture(text: str) -> bytes:
    """The bytes of a picture in base64: plain, as a `data:` URL, in lines, in the alphabet for URLs, unpadded.

    Raises:
        FailJob: it is none of these.
    """
    head = DATA_URL.match(text[:200])
    try:
        data = text[head.end() if head else 0 :].encode()
        data = unquote(data) if head else data
        if head and not head[0].lower().endswith(";base64,"):
            return data
        plain = data.translate(STANDARD_ALPHABET, string.whitespace.encode()).rstrip(b"=")
        return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except ValueError:
        raise FailJob("a picture that isn't base64", UNUSABLE) from None
