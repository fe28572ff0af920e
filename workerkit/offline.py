"""The stand-in that answers where no provider is set. Its text, picture and sound say that a stand-in made them."""

from __future__ import annotations

import asyncio
import io
import math
import random
import re
import struct
import textwrap
import wave
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageFont
from PIL.PngImagePlugin import PngInfo

from workerkit.answers import TextAnswer
from workerkit.errors import Document
from workerkit.settings import ProviderSettings

MODEL_OFFLINE = "offline-stand-in"

# ── picture ──────────────────────────────────────────────────────────────────────────────────────────────────────

Colour = tuple[int, ...]

# Words of the prompt choose the place and the hour. If none of them matches, they are drawn at random.
PLACES = {
    "city": r"cit(y|ies)|town|street|tower|skyline|building|house|neon|cyber|futur|robot|office",
    "water": r"sea|ocean|lake|water|river|beach|boat|ship|island|fish|whale|harbo",
    "hills": r"mountain|hill|forest|desert|valley|snow|dragon|castle|meadow|field|mars",
}
# Each has three colours of the sky from top to horizon, then those of the light, the far land and the near land.
HOURS = {
    r"night|star|moon|space|galax|dark|dream|neon|cyber|futur": "#060a1e #13244c #42628e #f5f2de #2c4370 #060913",
    r"sunset|dusk|evening|autumn|fire|lava|desert|mars|red|gold": "#2a1b4d #a5426b #f6a35c #ffe3a8 #8c4a6d #1c1530",
    r"dawn|sunrise|morning|spring|pink|blossom|flower": "#3d4a7c #c77d8e #fbd2a4 #fff1d0 #b98a9a #2b2840",
    r"mist|fog|rain|winter|snow|ice|forest|quiet|tea": "#5f7d85 #a9bfbd #e9ece0 #fffdf2 #a3b8b4 #2a3b3c",
    r"day|noon|summer|blue|sunny|beach|green|meadow|island": "#3f7fbf #8fbfe0 #eef3e8 #fffbe8 #8fb0b8 #1f4a3e",
}
LAMPLIGHT = (255, 214, 140)
DARK_BELOW = 150  # the sum of the top sky's red, green and blue
MAX_SMOOTHED_PIXELS = 3_000_000
MISSING_IN_FONT = re.compile(r"[^ -~\u00a1-\u017e]+")


def mix(one: Colour, other: Colour, share: float) -> Colour:
    return tuple(round(a + (b - a) * share) for a, b in zip(one, other, strict=True))


class Scene:
    """A landscape in layers, from the sky to the near land. All sizes are shares of `unit`, so any format works."""

    def __init__(self, prompt: str, width: int, height: int) -> None:
        self.dice = dice = random.Random(zlib.crc32(prompt.encode("utf-8", "replace")))

        def fits(words: str) -> bool:
            return re.search(rf"\b({words})", prompt[:2000], re.IGNORECASE) is not None

        self.place = next((place for place, words in PLACES.items() if fits(words)), dice.choice(list(PLACES)))
        palette = next((colours for words, colours in HOURS.items() if fits(words)), dice.choice(list(HOURS.values())))
        *self.sky, self.light, self.far, self.near = (ImageColor.getrgb(colour) for colour in palette.split())
        self.is_dark = sum(self.sky[0]) < DARK_BELOW
        self.width, self.height, self.unit = width, height, min(width, height)
        self.horizon, self.light_x = int(height * dice.uniform(0.58, 0.66)), int(width * dice.uniform(0.25, 0.75))
        self.picture = Image.new("RGB", (width, height))
        self.draw = ImageDraw.Draw(self.picture)

    def paint(self) -> Image.Image:
        self.paint_sky()
        self.paint_light()
        self.paint_hills(self.height if self.place == "hills" else self.horizon)
        if self.place == "city":
            self.paint_city()
        elif self.place == "water":
            self.paint_water()
        return self.picture

    def dot(self, x: float, y: float, rx: float, ry: float, share: float) -> None:
        """An ellipse of light, as strong as `share`."""
        behind = self.picture.getpixel((min(self.width - 1, max(0, int(x))), min(self.height - 1, max(0, int(y)))))
        assert isinstance(behind, tuple)
        self.draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=mix(behind, self.light, share))

    def paint_sky(self) -> None:
        dice, size = self.dice, (self.width, self.horizon + 1)
        column = Image.new("RGB", (1, 3))
        column.putdata(self.sky)
        self.picture.paste(column.resize(size, Image.Resampling.BICUBIC))
        noise = Image.frombytes("L", (6, 16), dice.randbytes(6 * 16)).resize(size, Image.Resampling.BICUBIC)
        self.picture.paste(mix(self.light, self.sky[1], 0.4), noise.point([max(0, i - 145) for i in range(256)]))
        for _ in range(300 if self.is_dark else 0):
            radius = self.unit * dice.choice((0.0009, 0.0009, 0.0013, 0.0024))
            y = dice.random() ** 1.5
            self.dot(dice.random() * self.width, y * self.horizon, radius, radius, (1 - y) * dice.uniform(0.4, 1))

    def paint_light(self) -> None:
        """Sun or moon with its glow, low where the sky is dark and red."""
        x, y = self.light_x, int(self.horizon * (0.62 if self.is_dark and self.sky[2][0] > 200 else 0.4))
        radius = self.unit * self.dice.uniform(0.06, 0.1)
        glow = Image.radial_gradient("L").point([round(150 * max(0.0, 1 - i / 181) ** 2.2) for i in range(256)])
        reach = int(radius * 7)
        self.picture.paste(self.light, (x - reach, y - reach), glow.resize((2 * reach, 2 * reach)))
        self.dot(x, y, radius, radius, 1)

    def ridge(self, base: float, swing: float, rough: float, colour: Colour) -> None:
        """Land below a jagged line: points, with displaced ones half-way, again and again."""
        line, scale = [self.dice.uniform(-1, 1) for _ in range(5)], 1.0
        for _ in range(6):
            scale *= rough
            halves = [(left + right) / 2 + self.dice.uniform(-scale, scale) for left, right in pairwise(line)]
            line = [height for pair in zip(line, halves, strict=False) for height in pair] + line[-1:]
        step = self.width / (len(line) - 1)
        tops = [(i * step, base - swing * height) for i, height in enumerate(line)]
        self.draw.polygon([(0, self.height), *tops, (self.width, self.height)], fill=colour)

    def haze(self, top: float) -> None:
        """The horizon's colour over all that lies lower; the next layer covers most of it."""
        if (depth := self.height - int(top)) > 0:
            slope = 110 / 255 * depth / (0.16 * self.unit)
            fade = Image.linear_gradient("L").point([int(min(110, i * slope)) for i in range(256)])
            self.picture.paste(self.sky[2], (0, int(top)), fade.resize((self.width, depth)))

    def paint_hills(self, foot: float) -> None:
        """Ridges from behind the horizon down to `foot`."""
        top, layers = self.horizon - 0.14 * self.unit, 7 if foot > self.horizon else 4
        for share in (i / (layers - 1) for i in range(layers)):
            colour = mix(mix(self.far, self.sky[2], 0.4), self.near, share**1.3)
            base = top + (foot - top) * share**1.2 * 0.9
            self.ridge(base, self.unit * (0.15 - 0.09 * share), 0.56 - 0.08 * share, colour)
            if share < 1:
                self.haze(base)

    def paint_city(self) -> None:
        for share in (0, 1 / 3, 2 / 3, 1):
            foot = self.horizon + (self.height - self.horizon) * (0.1 + 0.75 * share)
            wall, x = mix(mix(self.far, self.sky[2], 0.3), self.near, 0.1 + 0.85 * share), -0.05 * self.unit
            while x < self.width:
                width = self.unit * self.dice.uniform(0.04, 0.1) * (0.8 + 0.7 * share)
                towering = 0.7 + 0.9 * (1 - abs(2 * x / self.width - 1)) * (1 - share / 2)
                self.paint_tower(x, foot - self.unit * self.dice.uniform(0.12, 0.3) * towering, width, foot, wall)
                x += width * self.dice.uniform(0.9, 1.3)
            self.draw.rectangle((0, foot, self.width, self.height), fill=wall)
            if share < 1:
                self.haze(foot - 0.1 * self.unit)

    def paint_tower(self, x: float, top: float, width: float, foot: float, wall: Colour) -> None:
        """A house with a flat or pointed roof or a mast, and some windows lit."""
        self.draw.rectangle((x, top, x + width, foot), fill=wall)
        if (style := self.dice.random()) < 0.15:
            self.draw.polygon([(x, top), (x + width / 2, top - width * 0.8), (x + width, top)], fill=wall)
        elif style < 0.4:
            self.draw.rectangle((x + width * 0.45, top - width * 0.9, x + width * 0.55, top), fill=wall)
        pitch = width / (max(2, int(width / self.unit / 0.017)) + 0.5)
        for row in range(int((foot - top) / pitch / 1.3) - 1):
            for column in range(int(width / pitch)):
                if self.dice.random() < 0.4:
                    left, upper = x + pitch * (0.5 + column), top + pitch * (1.3 * row + 0.8)
                    lit = mix(wall, LAMPLIGHT, self.dice.uniform(0.3, 0.9) if self.is_dark else 0.25)
                    self.draw.rectangle((left, upper, left + pitch * 0.5, upper + pitch * 0.6), fill=lit)

    def paint_water(self) -> None:
        """What is above the horizon, upside down, darker and blurred, with glints under the light."""
        depth, dice, unit = self.height - self.horizon, self.dice, self.unit
        above = self.picture.crop((0, max(0, self.horizon - depth), self.width, self.horizon))
        mirror = above.transpose(Image.Transpose.FLIP_TOP_BOTTOM).resize((self.width, depth))
        mirror = mirror.filter(ImageFilter.BoxBlur((unit * 0.004, unit * 0.012)))
        tint = Image.new("RGB", mirror.size, mix(self.far, self.near, 0.6))
        self.picture.paste(Image.blend(mirror, tint, 0.38), (0, self.horizon))
        for share in (dice.random() for _ in range(160)):
            x = dice.choice((dice.gauss(self.light_x, unit * (0.03 + 0.1 * share)), dice.random() * self.width))
            reach, thickness = unit * (0.01 + 0.09 * share) * dice.uniform(0.3, 1), unit * (0.001 + 0.002 * share)
            self.dot(x, self.horizon + depth * share**1.3, reach, thickness, 0.55 - 0.3 * share)
        self.ridge(self.height * 0.985, unit * 0.05, 0.45, self.near)


def sign(picture: Image.Image, prompt: str) -> None:
    """Writes at the foot of the picture what made it and for which words, as far as they fit."""
    width, height = picture.size
    size = max(8, min(width // 32, height // 24))
    font, caption = ImageFont.load_default(size), MISSING_IN_FONT.sub(" ", f"{MODEL_OFFLINE}: {prompt[:200]}")
    while font.getlength(caption) > width * 0.94:
        caption = caption[:-1]
    place = (width * 0.03, height - size * 0.8)
    ImageDraw.Draw(picture).text(
        place, caption, "white", font, "ls", stroke_width=max(1, size // 14), stroke_fill="black"
    )


def draw_picture(prompt: str, width: int, height: int) -> bytes:
    """A PNG of a landscape, chosen by the prompt's words. It is drawn at twice its size, for smooth edges."""
    factor = 2 if width * height <= MAX_SMOOTHED_PIXELS else 1
    picture = Scene(prompt, width * factor, height * factor).paint().reduce(factor)
    sign(picture, prompt)
    signature, buffer = PngInfo(), io.BytesIO()
    signature.add_text("Software", MODEL_OFFLINE)
    picture.save(buffer, "PNG", compress_level=3, pnginfo=signature)
    return buffer.getvalue()


# ── sound ────────────────────────────────────────────────────────────────────────────────────────────────────────

RATE_HZ = 22_050
NOTE_S, RING_S = 0.24, 1.1
MAX_NOTES = 24
LOWEST_HZ, PENTATONIC = 220.0, (0, 2, 4, 7, 9, 12, 14, 16)
PARTIALS = ((1.0, 1.0, 5.0), (2.0, 0.35, 8.0), (5.4, 0.08, 20.0))  # multiple of the pitch, loudness, decay per second
LOUDEST = 26_000


@cache
def bell(semitones: int) -> list[float]:
    """One stroke of a bell, so many semitones above the lowest. Higher partials fade sooner."""
    turn = math.tau * LOWEST_HZ * 2 ** (semitones / 12) / RATE_HZ
    stroke = [
        sum(gain * math.exp(-i * decay / RATE_HZ) * math.sin(i * turn * multiple) for multiple, gain, decay in PARTIALS)
        for i in range(int(RATE_HZ * RING_S))
    ]
    return [sample * min(1.0, i / 100) for i, sample in enumerate(stroke)]


def with_comment(wav: bytes, comment: str) -> bytes:
    """The WAV with a comment that players show (RIFF's `INFO` list)."""
    words = comment.encode() + b"\0" * (2 - len(comment) % 2)
    info = b"INFOICMT" + struct.pack("<I", len(words)) + words
    whole = wav + b"LIST" + struct.pack("<I", len(info)) + info
    return whole[:4] + struct.pack("<I", len(whole) - 8) + whole[8:]


def compose_melody(text: str, speed: float = 1.0) -> bytes:
    """A WAV of bells: a note for each word over a slower bass. Its comment says that a stand-in made it."""
    words = text.split(maxsplit=MAX_NOTES)[:MAX_NOTES]
    notes = [PENTATONIC[zlib.crc32(word.encode("utf-8", "replace")) % len(PENTATONIC)] for word in words]
    strokes = [*enumerate(notes), *((i, notes[i] % 12 - 12) for i in range(0, len(notes), 4))]
    strokes += [(len(notes), semitones) for semitones in (-12, 0, 7)]
    step = int(RATE_HZ * NOTE_S / speed)
    mixed = [0.0] * (len(notes) * step + int(RATE_HZ * RING_S))
    for note, semitones in strokes:
        for i, sample in enumerate(bell(semitones), note * step):
            mixed[i] += sample
    scale, buffer = LOUDEST / max(map(abs, mixed)), io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, RATE_HZ, len(mixed), "NONE", ""))
        file.writeframes(struct.pack(f"<{len(mixed)}h", *(int(sample * scale) for sample in mixed)))
    return with_comment(buffer.getvalue(), f"{MODEL_OFFLINE}: no voice, since no provider is set")


# ── the provider ──────────────────────────────────────────────────────────────────────────────────────────────────

WORD_PAUSE_S = 0.025
DEFAULT_SIZE = (1024, 1024)


def words_of(content: Any) -> str:
    """The text of a message's content, without its pictures."""
    if not isinstance(content, list):
        return str(content)
    return " ".join(str(part.get("text", "(a picture)")) for part in content)


class OfflineProvider:
    """A provider that needs no server and no key."""

    async def ready(self, patience_s: float) -> None:
        return None

    async def close(self) -> None:
        return None

    async def with_model(self, where: ProviderSettings) -> ProviderSettings:
        return replace(where, model=where.model or MODEL_OFFLINE)

    async def text(
        self, request: Document, on_delta: Callable[[str], None], ours: Document | None = None
    ) -> TextAnswer:
        prompts = [words_of(message.get("content")) for message in request["messages"] if message.get("role") == "user"]
        subject = textwrap.shorten((prompts[-1] if prompts else "nothing")[:1000], 160, placeholder=" …")
        answer = (
            f"[{MODEL_OFFLINE}] No model wrote this, since no provider is set. You asked: “{subject}” "
            "Your words lay in a queue, a worker claimed them under a lease that no other worker can break, and "
            "these words come back to you one by one, just as a model's would. "
            "With OPENAI_API_KEY or OPENAI_BASE_URL set, a model answers in this place."
        )
        words = re.findall(r"\S+\s*", answer)[: request.get("max_tokens")]
        for word in words:
            on_delta(word)
            await asyncio.sleep(WORD_PAUSE_S)
        return TextAnswer("".join(words), MODEL_OFFLINE, len(words))

    async def image(self, request: Document, ours: Document | None = None) -> tuple[bytes, str]:
        size = re.fullmatch(r"(\d{2,4})x(\d{2,4})", str(request.get("size")))
        width, height = map(int, size.groups()) if size else DEFAULT_SIZE
        return await asyncio.to_thread(draw_picture, str(request["prompt"]), width, height), MODEL_OFFLINE

    async def speech(self, request: Document, ours: Document | None = None) -> tuple[bytes, str]:
        speed = float(request.get("speed") or 1)
        return await asyncio.to_thread(compose_melody, str(request["input"]), speed), MODEL_OFFLINE
