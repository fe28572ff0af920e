"""placeholder"""

from __future__ import annotations

import asyncio
import io
import math
import random
import re
import struct
from collections.abc import Callable

from worker import MODEL_OFFLINE, Document, TextAnswer


class OfflineProvider:
    """The stand-in where no provider is set: shows the whole path, and signs what it makes."""

    async def text(self, request: Document, on_delta: Callable[[str], None]) -> TextAnswer:
        subject = str(request["messages"][-1]["content"])[:200]
        story = (
            f"[{MODEL_OFFLINE}] No model wrote this. You asked: “{subject}”. With OPENAI_API_KEY or OPENAI_BASE_URL set, "
            "a real model would answer here, word by word, just as these words arrive."
        )
        words = re.findall(r"\S+\s*", story)[: request.get("max_tokens", 1000)]
        for word in words:
            on_delta(word)
            await asyncio.sleep(0.02)
        return TextAnswer("".join(words), MODEL_OFFLINE, len(words))

    async def image(self, request: Document) -> tuple[bytes, str]:
        size = str(request.get("size", "1024x1024")).split("x")
        width, height = map(int, size) if len(size) == 2 else (1024, 1024)
        return await asyncio.to_thread(draw_landscape, request["prompt"], width, height), MODEL_OFFLINE

    async def speech(self, request: Document) -> tuple[bytes, str]:
        return await asyncio.to_thread(compose_melody, request["input"]), MODEL_OFFLINE


def draw_landscape(prompt: str, width: int, height: int) -> bytes:
    """A PNG of hills under a sky, its colours and shapes from the prompt, signed as a stand-in."""
    from PIL import Image, ImageDraw, ImageFont

    dice = random.Random(prompt)
    hue = dice.randrange(360)
    column = Image.new("RGB", (1, height))
    for y in range(height):
        lightness = 18 + 55 * y // height
        column.putpixel((0, y), hsl_colour(hue + 50 * y // height, 65, lightness))
    picture = column.resize((width, height))
    draw = ImageDraw.Draw(picture)
    for _ in range(90):
        x, y, r = dice.randrange(width), dice.randrange(max(1, height // 2)), dice.choice((0, 0, 1))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 255, 240))
    x, y, r = dice.randrange(width // 5, width), height * dice.randrange(25, 50) // 100, max(2, min(width, height) // 9)
    draw.ellipse((x - r, y - r, x + r, y + r), fill=hsl_colour(hue + 60, 90, 85))
    for layer in range(4):
        base, phase, waves = height * (0.55 + 0.12 * layer), dice.random() * 6, dice.uniform(3, 9)
        tops = [
            (x, base + height * 0.05 * (math.sin(waves * x / width + phase) + 0.5 * math.sin(3.1 * waves * x / width)))
            for x in range(0, width + 1)
        ]
        draw.polygon([(0, height), *tops, (width, height)], fill=hsl_colour(hue + 15 * layer, 45, 36 - 8 * layer))
    caption, font = f"{MODEL_OFFLINE}: {prompt[:60]}", ImageFont.load_default(max(8, width // 32))
    draw.text((width // 40, height - height // 12), caption, font=font, fill=(255, 255, 255))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def hsl_colour(hue: float, saturation: int, lightness: int) -> tuple[int, ...]:
    from PIL import ImageColor

    return ImageColor.getrgb(f"hsl({int(hue) % 360}, {saturation}%, {lightness}%)")


def compose_melody(text: str) -> bytes:
    """A WAV of bells, a note a word (2 to 24), so that another text sounds another way."""
    import wave

    rate, note_s = 16_000, 0.18
    words = (text.split() or ["…"])[:24]
    pitches = [220 * 2 ** (random.Random(word).choice((0, 2, 4, 7, 9, 12, 14, 16)) / 12) for word in words + words[:1]]
    samples = bytearray()
    for pitch in pitches:
        for i in range(int(rate * note_s)):
            t = i / rate
            tone = math.sin(math.tau * pitch * t) + 0.4 * math.sin(math.tau * 2.76 * pitch * t)
            samples += struct.pack("<h", int(9000 * math.exp(-9 * t) * min(1.0, t * 400) * tone))
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(bytes(samples))
    return buffer.getvalue()
