"""The API's side, for trying the worker: `submit` sends a job and follows it, `demo` needs no server and no key.

Nothing of this runs in production, but for the stand-in that answers where no provider is set. The sections:

    picture, sound, offline stand-in, the API's side, submit, embedded servers, demo
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import logging
import math
import mimetypes
import random
import re
import struct
import sys
import tempfile
import textwrap
import threading
import time
import urllib.request
import warnings
import wave
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gridfs
import pymongo
import redis
from bson import ObjectId
from bson.errors import BSONError
from celery import signals
from kombu.transport import redis as kombu_redis
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageFont
from PIL.PngImagePlugin import PngInfo
from pymongo.errors import PyMongoError
from redis.lock import Lock

import worker
from worker import (
    MODEL_OFFLINE,
    PROVIDER_KINDS,
    TERMINAL_STATUSES,
    Document,
    Runtime,
    Settings,
    Status,
    TextAnswer,
    app,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# ── picture ──────────────────────────────────────────────────────────────────────────────────────────────────────

Colour = tuple[int, ...]

# Words of the prompt choose the hour and the place; where none fits, chance does.
PLACES = {
    "city": r"cit(y|ies)|town|street|tower|skyline|building|house|neon|cyber|futur|robot|office",
    "water": r"sea|ocean|lake|water|river|beach|boat|ship|island|fish|whale|harbo",
    "hills": r"mountain|hill|forest|desert|valley|snow|dragon|castle|meadow|field|mars",
}
# Each with the sky from top to horizon, the light in it, the far land and the near land.
HOURS = {
    r"night|star|moon|space|galax|dark|dream|neon|cyber|futur": "#060a1e #13244c #42628e #f5f2de #2c4370 #060913",
    r"sunset|dusk|evening|autumn|fire|lava|desert|mars|red|gold": "#2a1b4d #a5426b #f6a35c #ffe3a8 #8c4a6d #1c1530",
    r"dawn|sunrise|morning|spring|pink|blossom|flower": "#3d4a7c #c77d8e #fbd2a4 #fff1d0 #b98a9a #2b2840",
    r"mist|fog|rain|winter|snow|ice|forest|quiet|tea": "#5f7d85 #a9bfbd #e9ece0 #fffdf2 #a3b8b4 #2a3b3c",
    r"day|noon|summer|blue|sunny|beach|green|meadow|island": "#3f7fbf #8fbfe0 #eef3e8 #fffbe8 #8fb0b8 #1f4a3e",
}
LAMPLIGHT = (255, 214, 140)
DARK_BELOW = 150  # the sum of the top sky's red, green and blue
MOST_SMOOTHED_PIXELS = 3_000_000
CAPTION_CHARACTERS = re.compile(r"[^ -~\u00a1-\u017e]+")  # others are not in the font


def mix(one: Colour, other: Colour, share: float) -> Colour:
    return tuple(round(a + (b - a) * share) for a, b in zip(one, other, strict=True))


class Scene:
    """A landscape in layers, from the sky to what is near. Sizes are shares of `unit`, so that any format works."""

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
    """Writes over the picture's foot what made it, and for which words, cut off where they don't fit."""
    width, height = picture.size
    size = max(8, min(width // 32, height // 24))
    font, caption = ImageFont.load_default(size), CAPTION_CHARACTERS.sub(" ", f"{MODEL_OFFLINE}: {prompt[:200]}")
    while font.getlength(caption) > width * 0.94:
        caption = caption[:-1]
    place = (width * 0.03, height - size * 0.8)
    ImageDraw.Draw(picture).text(
        place, caption, "white", font, "ls", stroke_width=max(1, size // 14), stroke_fill="black"
    )


def draw_picture(prompt: str, width: int, height: int) -> bytes:
    """A PNG of a landscape by the prompt's words, signed as a stand-in. Drawn at twice its size, for smooth edges."""
    factor = 2 if width * height <= MOST_SMOOTHED_PIXELS else 1
    picture = Scene(prompt, width * factor, height * factor).paint().reduce(factor)
    sign(picture, prompt)
    signature, buffer = PngInfo(), io.BytesIO()
    signature.add_text("Software", MODEL_OFFLINE)
    picture.save(buffer, "PNG", compress_level=3, pnginfo=signature)
    return buffer.getvalue()


# ── sound ────────────────────────────────────────────────────────────────────────────────────────────────────────

RATE_HZ = 22_050
NOTE_S, RING_S = 0.24, 1.1
MOST_NOTES = 24
LOWEST_HZ, PENTATONIC = 220.0, (0, 2, 4, 7, 9, 12, 14, 16)
PARTIALS = ((1.0, 1.0, 5.0), (2.0, 0.35, 8.0), (5.4, 0.08, 20.0))  # multiple of the pitch, loudness, decay per second
LOUDEST = 26_000


@cache
def bell(semitones: int) -> list[float]:
    """One stroke, so many semitones above the lowest; its higher partials fade sooner."""
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
    """A WAV of bells, a note a word over a slower bass, signed as a stand-in in its comment."""
    words = text.split(maxsplit=MOST_NOTES)[:MOST_NOTES]
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


# ── offline stand-in ─────────────────────────────────────────────────────────────────────────────────────────────

WORD_PAUSE_S = 0.025
DEFAULT_SIZE = (1024, 1024)


class OfflineProvider:
    """Answers where no provider is set: shows the whole path, and signs what it makes."""

    async def ready(self, patience_s: float) -> None:
        return None

    async def text(self, request: Document, on_delta: Callable[[str], None]) -> TextAnswer:
        asked = [message.get("content") for message in request["messages"] if message.get("role") == "user"]
        subject = textwrap.shorten(str(asked[-1] if asked else "nothing")[:1000], 160, placeholder=" …")
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

    async def image(self, request: Document) -> tuple[bytes, str]:
        size = re.fullmatch(r"(\d{2,4})x(\d{2,4})", str(request.get("size")))
        width, height = map(int, size.groups()) if size else DEFAULT_SIZE
        return await asyncio.to_thread(draw_picture, str(request["prompt"]), width, height), MODEL_OFFLINE

    async def speech(self, request: Document) -> tuple[bytes, str]:
        speed = float(request.get("speed") or 1)
        return await asyncio.to_thread(compose_melody, str(request["input"]), speed), MODEL_OFFLINE


# ── the API's side ───────────────────────────────────────────────────────────────────────────────────────────────

SERVER_PATIENCE_S = 5
LISTEN_S = 0.1
READ_EVERY_S = 3.0
DOWNLOAD_S = 30
USER_ID = "try-out"


class Unreachable(Exception):
    """A server can't be reached; the text says which, and what leads there."""


@contextlib.contextmanager
def reaching(server: str, variable: str) -> Iterator[None]:
    errors: tuple[Any, ...] = (PyMongoError, redis.RedisError, *worker.broker_errors())
    try:
        with pymongo.timeout(SERVER_PATIENCE_S):
            yield
    except errors as error:
        advice = f"Is it running, and is {variable} right? `python worker.py check` looks closer."
        raise Unreachable(f"{server} can't be reached ({type(error).__name__}). {advice}") from None


@dataclass
class Followed:
    """A job as its submitter sees it: what was published, and in the end its document."""

    id: ObjectId
    job_type: str
    submitted_at: float = field(default_factory=time.monotonic)
    took_s: float | None = None
    status: Status = Status.PENDING
    message: str = ""
    attempt: int = 0
    sequence: int = -1
    text: str = ""
    document: Document = field(default_factory=dict)

    @property
    def age_s(self) -> float:
        return self.took_s or time.monotonic() - self.submitted_at

    def hear(self, message: Document) -> bool:
        """Takes in a piece of text. False: it is known already, or of an attempt that is over."""
        attempt, sequence = message["attempt"], message["sequence"]
        if (attempt, sequence) <= (self.attempt, self.sequence):
            return False
        self.text = message["delta"] if attempt > self.attempt else self.text + message["delta"]
        self.attempt, self.sequence = attempt, sequence
        return True

    def end(self, document: Document) -> None:
        self.took_s, self.document, self.status = self.age_s, document, Status(document["status"])
        self.message = str(document.get("error_message") or "Your result is ready.")


def printable(text: str) -> str:
    """Without control characters, which could steer a terminal."""
    return "".join(c for c in text if c in "\n\t\u200d" or c.isprintable())


class View:
    """Shows jobs while they are followed: a line for each event."""

    def line(self, job: Followed, event: str, words: str) -> None:
        print(f"{job.age_s:6.1f} s  {job.job_type:16}  {event:10}  {printable(words)}", flush=True)

    def on_status(self, job: Followed) -> None:
        self.line(job, job.status, job.message)

    def on_text(self, job: Followed, delta: str) -> None:
        if job.sequence == 0:
            self.line(job, "streaming", f"The first words are there: {delta.strip()} …")

    def on_tick(self, jobs: Sequence[Followed]) -> None:
        """Called about ten times a second."""


class Api:
    """What the API does with a job: listen, insert the document, enqueue (contract, sections 1 to 3).

    Entering it subscribes, so that nothing is missed. It and `submit` raise Unreachable.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._settings, self._jobs = runtime.settings, runtime.database["jobs"]
        url, patience = runtime.settings.redis_url.get_secret_value(), {"socket_connect_timeout": SERVER_PATIENCE_S}
        self._pubsub = redis.Redis.from_url(url, **patience).pubsub()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Api:
        channels = (worker.STATUS_CHANNEL, worker.PROGRESS_CHANNEL)
        with reaching("Redis", "REDIS_URL"):
            self._pubsub.subscribe(*channels)
            for _ in channels:  # each is confirmed
                self._pubsub.get_message(timeout=SERVER_PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._pubsub.close()

    def submit(self, job_type: str, input_data: Document) -> Followed:
        """Each job in a session of its own, since a session may have one that hasn't ended."""
        job_id, now = ObjectId(), datetime.now(UTC)
        copy: Document = {"job_type": job_type, "input_data": input_data, "user_id": USER_ID, "session_id": f"{job_id}"}
        empty = dict.fromkeys(("output_data", "artifact_url", "error_message", "started_at", "completed_at"))
        document = {
            "_id": job_id,
            "status": Status.PENDING.value,
            **copy,
            **empty,
            "created_at": now,
            "updated_at": now,
        }
        with reaching("MongoDB", "MONGODB_URL"):
            self._jobs.insert_one(document)
        try:
            self._enqueue(str(job_id), copy)
        except Unreachable:
            with contextlib.suppress(PyMongoError):  # what is in no queue would be pending for ever
                self._jobs.delete_one({"_id": job_id, "status": Status.PENDING.value})
            raise
        return Followed(job_id, job_type)

    def _enqueue(self, job_id: str, copy: Document) -> None:
        settings = self._settings
        limits: dict[str, Any] = {
            "soft_time_limit": settings.celery_soft_time_limit,
            "time_limit": settings.celery_time_limit,
        }
        with reaching("The queue", "REDIS_URL (or CELERY_BROKER_URL)"), app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=SERVER_PATIENCE_S)
            arguments = (job_id, {"job_id": job_id, **copy})
            queue = settings.celery_queue_name
            app.send_task(worker.TASK_NAME, arguments, queue=queue, connection=connection, **limits)

    def follow(self, jobs: Sequence[Followed], view: View) -> None:
        """Shows what is published about these jobs until all have ended; now and then reads what was missed."""
        read_at = time.monotonic() + READ_EVERY_S
        while not all(job.document for job in jobs):
            message = self._listen()
            for job in jobs:
                if message.get("job_id") == str(job.id):
                    self._take(job, message, view)
                if time.monotonic() >= read_at:
                    self._read(job, view)
            if time.monotonic() >= read_at:
                read_at = time.monotonic() + READ_EVERY_S
            view.on_tick(jobs)

    def _listen(self) -> Document:
        """What was published just now. With Redis away that is nothing, and redis-py connects again by itself."""
        try:
            said = self._pubsub.get_message(ignore_subscribe_messages=True, timeout=LISTEN_S)
            message = json.loads(said["data"]) if said else {}
        except redis.RedisError:
            time.sleep(LISTEN_S)
            return {}
        except ValueError:
            return {}
        return message if isinstance(message, dict) else {}

    def _take(self, job: Followed, message: Document, view: View) -> None:
        if message["type"] == "job_progress" and job.hear(message):
            view.on_text(job, message["delta"])
        elif message["type"] == "job_status_update" and message["status"] in TERMINAL_STATUSES:
            self._read(job, view)
        elif message["type"] == "job_status_update":
            job.status, job.message = Status(message["status"]), str(message["message"])
            view.on_status(job)

    def _read(self, job: Followed, view: View) -> None:
        """Looks at the document, which knows more than any notice. With MongoDB away the next look will do."""
        with contextlib.suppress(PyMongoError), pymongo.timeout(SERVER_PATIENCE_S):
            document = self._jobs.find_one({"_id": job.id}) or {}
            if not job.document and document.get("status") in TERMINAL_STATUSES:
                job.end(document)
                view.on_status(job)
            job.status = Status(document.get("status", job.status))


def fetch_file(runtime: Runtime, url: str) -> bytes | None:
    """The file behind a result's URL. None: it can't be had from here."""
    if url.startswith("data:"):
        return base64.b64decode(url.partition(",")[2])
    files = (
        gridfs.GridFS(runtime.database, collection="artifacts") if runtime.settings.artifact_url == "gridfs" else None
    )
    if files and (found := files.find_one({"filename": url.rsplit("/", 1)[-1]})):
        return bytes(found.read())
    if url.startswith(("http://", "https://")):
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=DOWNLOAD_S) as answer:
            return bytes(answer.read())
    return None


def writable_folder(wanted: Path) -> Path:
    """The folder, made if need be; where it can't be written (a read-only container), a new temporary one."""
    with contextlib.suppress(OSError):
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted.resolve()
    return Path(tempfile.mkdtemp(prefix="ai-backend-worker-"))


# ── submit ───────────────────────────────────────────────────────────────────────────────────────────────────────

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
NO_WORKER_AFTER_S = 15.0
SHORT_NAMES = {"text": "text_generation", "image": "image_generation", "audio": "audio_generation"}


def say(words: object) -> None:
    """To stderr: stdout has the result only, so that it can be piped on."""
    print(words, file=sys.stderr, flush=True)


def tolerate_any_character() -> None:
    """What a terminal's encoding can't show becomes a question mark instead of an exception."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


class SubmitView(View):
    """Statuses as lines on stderr; text as it comes on stdout, where that is a terminal."""

    def __init__(self) -> None:
        self.is_streaming = sys.stdout.isatty()
        self._is_line_open = False
        self._hint_at_s = NO_WORKER_AFTER_S

    def line(self, job: Followed, event: str, words: str) -> None:
        if self._is_line_open:
            print(flush=True)
        self._is_line_open = False
        say(f"{job.age_s:6.1f} s  {event:10}  {printable(words)}")

    def on_text(self, job: Followed, delta: str) -> None:
        if self.is_streaming:
            self._is_line_open = True
            print(printable(delta), end="", flush=True)

    def on_tick(self, jobs: Sequence[Followed]) -> None:
        for job in jobs:
            if job.status is Status.PENDING and job.age_s > self._hint_at_s:
                self._hint_at_s = math.inf
                self.line(
                    job, job.status, "no worker seems to be running; is `python worker.py` started? (still waiting)"
                )


def read_request(job_type: str, prompt: str, parameters: Sequence[str]) -> tuple[str, Document]:
    """Job type and input as the API would get them; a parameter's value is JSON, or else text.

    Raises:
        ValueError: there is no such type, or a parameter is malformed.
    """
    app.loader.import_default_modules()  # job types of your own
    full = SHORT_NAMES.get(job_type, job_type)
    if full not in worker.HANDLERS:
        raise ValueError(f"--type {job_type}: should be one of {', '.join([*SHORT_NAMES, *worker.HANDLERS])}")
    input_data: Document = {"text" if full == SHORT_NAMES["audio"] else "prompt": prompt}
    for parameter in parameters:
        name, separator, value = parameter.partition("=")
        if not name or not separator:
            raise ValueError(f"--param {parameter}: should look like size=512x512")
        try:
            input_data[name] = json.loads(value, parse_constant=str)
        except ValueError:
            input_data[name] = value
    return full, input_data


def show_result(runtime: Runtime, job: Followed, view: SubmitView, folder: Path) -> None:
    """Prints a text, saves a file and prints where, or prints what another job type made as JSON."""
    output, url = job.document["output_data"], str(job.document["artifact_url"] or "")
    if url:
        say(", ".join(f"{key}: {value}" for key, value in output.items() if value != url))
        data = fetch_file(runtime, url)
        suffix = mimetypes.guess_extension(url[5:].partition(";")[0]) or ""
        name = f"{job.id}{suffix}" if url.startswith("data:") else url.rsplit("/", 1)[-1]
        if data is None:
            print(url)
        else:
            path = writable_folder(folder) / name
            path.write_bytes(data)
            print(path)
    elif "generated_text" not in output:
        print(json.dumps(output, indent=2, ensure_ascii=False, default=str))
    elif not view.is_streaming or job.text != output["generated_text"]:
        print(output["generated_text"])


def submit_and_follow(runtime: Runtime, job_type: str, input_data: Document, follow: bool, folder: Path) -> int:
    view = SubmitView()
    with Api(runtime) as api:
        job = api.submit(job_type, input_data)
        view.line(job, job.status, f"{job.id}, {job.job_type}, queue {runtime.settings.celery_queue_name}")
        if not follow:
            print(job.id)
            return 0
        try:
            api.follow([job], view)
        except KeyboardInterrupt:
            view.line(job, job.status, f"not waiting any longer; the job goes on: {job.id}")
            return EXIT_INTERRUPTED
    if job.status is Status.FAILED:
        return EXIT_FAILED
    show_result(runtime, job, view, folder)
    return 0


def submit(
    runtime: Runtime, job_type: str, prompt: str, parameters: Sequence[str], follow: bool, output: Path | None
) -> int:
    """Sends a job as the API does and shows what becomes of it; returns the exit code."""
    tolerate_any_character()
    try:
        return submit_and_follow(runtime, *read_request(job_type, prompt, parameters), follow, output or Path())
    except Unreachable as error:
        say(error)
    except (OSError, PyMongoError) as error:
        say(f"The result can't be fetched or saved ({type(error).__name__}: {error}).")
    except (ValueError, OverflowError, BSONError) as error:
        say(error)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return EXIT_FAILED


# ── embedded servers ─────────────────────────────────────────────────────────────────────────────────────────────

LOOPBACK = "127.0.0.1"
WORKER_START_S = 20.0
PROVIDER_FIELDS = ("openai_", *(f"{kind}_" for kind in PROVIDER_KINDS))


@contextlib.contextmanager
def embedded_redis() -> Iterator[str]:
    """A stand-in for Redis on a free loopback port; gives its URL."""
    from fakeredis import TcpFakeServer

    server: Any = TcpFakeServer((LOOPBACK, 0))
    server.daemon_threads = True
    server.RequestHandlerClass.disable_nagle_algorithm = True
    server.handle_error = lambda *_: None  # a client has hung up
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"redis://{LOOPBACK}:{server.server_address[1]}/0"
    scripts: Any = kombu_redis
    with redis.Redis.from_url(url) as client:  # it hangs up after each error, such as the one of an unknown script
        for script in (scripts.REFRESH_BINDING, scripts.SWEEP_BINDINGS, Lock.LUA_RELEASE_SCRIPT):
            client.script_load(script)
    try:
        yield url
    finally:
        server.shutdown()
        server.server_close()


def embedded_mongodb() -> pymongo.MongoClient[Document]:
    """A stand-in for MongoDB in memory, GridFS included."""
    import mongomock
    from mongomock.gridfs import enable_gridfs_integration

    enable_gridfs_integration()  # type: ignore[no-untyped-call]
    client: pymongo.MongoClient[Document] = mongomock.MongoClient()
    return client


def embedded_runtime(redis_url: str) -> Runtime:
    """Turns this process to the embedded servers. Of the environment only the provider counts, of `.env` nothing."""
    fields = Settings.model_fields.items()
    own = {name: field.get_default() for name, field in fields if not name.startswith(PROVIDER_FIELDS)}
    own |= {"redis_url": redis_url, "worker_pool": "threads", "retry_delays": (2.0,)}
    settings = worker.load_settings(_env_file=None, **own)
    worker.current_settings = cache(lambda: settings)  # where Celery and the log look
    app.conf.update(worker.celery_configuration(settings))
    app.set_default()
    worker.process_job.runtime = Runtime(settings, mongo=embedded_mongodb())
    return worker.process_job.runtime


@contextlib.contextmanager
def embedded_worker() -> Iterator[threading.Thread]:
    """The real Celery worker in a thread of this process; gives the thread once it takes jobs."""
    ready = threading.Event()

    def announce(consumer: object) -> None:
        signals.worker_ready.send(sender=consumer)
        ready.set()

    options: dict[str, Any] = {"concurrency": len(SHORT_NAMES), "without_gossip": True, "without_mingle": True}
    controller = app.WorkController(pool="threads", loglevel="WARNING", ready_callback=announce, **options)
    thread = threading.Thread(target=controller.start, name="worker", daemon=True)
    thread.start()
    try:
        if not ready.wait(WORKER_START_S):
            raise Unreachable("The embedded worker didn't start.")
        yield thread
    finally:
        controller.stop()


# ── demo ─────────────────────────────────────────────────────────────────────────────────────────────────────────

JOBS: dict[str, Document] = {
    "text_generation": {"prompt": "What happens to a job in a queue?", "max_tokens": 200},
    "image_generation": {"prompt": "A quiet lake under the mountains at sunset", "size": "1024x1024"},
    "audio_generation": {"text": "What goes in comes out again, exactly once.", "voice": "default"},
}
FILE_NAMES = {"image_generation": "picture", "audio_generation": "sound"}
GIVE_UP_AFTER_S = 240.0
SPINNER, TURNS_PER_S = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", 10
MARKS = {Status.COMPLETED: ("✓", "green"), Status.FAILED: ("✗", "red")}
INTRODUCTION = """\
AI Backend Worker: demo. Three jobs go through a real Celery worker, as the API would send them.
Redis and MongoDB are stand-ins inside this process; the servers of .env and the environment are not touched.
"""
NEXT_STEPS = """
What next:
  OPENAI_API_KEY=... python worker.py demo   with a real model (or OPENAI_BASE_URL=... for any such server)
  python worker.py check                     tries the MongoDB and Redis that .env names
  python worker.py                           works on them
  python worker.py submit --prompt "..."     sends that worker a job
  docker compose up                          starts all of it in containers"""


class DemoView(View):
    """Lines, for pipes and logs; notices when the worker has died."""

    def __init__(self, worker_thread: threading.Thread) -> None:
        self._worker_thread = worker_thread

    def on_tick(self, jobs: Sequence[Followed]) -> None:
        if not self._worker_thread.is_alive() or max(job.age_s for job in jobs) > GIVE_UP_AFTER_S:
            raise Unreachable("The embedded worker has stopped, or it doesn't get its jobs done.")


class LiveView(DemoView):
    """A table that is drawn again and again, for terminals."""

    def __init__(self, worker_thread: threading.Thread, draw: Callable[[RenderableType], None]) -> None:
        super().__init__(worker_thread)
        self._draw = draw

    def line(self, job: Followed, event: str, words: str) -> None:
        """The table says it."""

    def on_tick(self, jobs: Sequence[Followed]) -> None:
        from rich.table import Table
        from rich.text import Text

        super().on_tick(jobs)
        table = Table.grid(padding=(0, 2, 0, 0))
        for job in jobs:
            frame = SPINNER[int(time.monotonic() * TURNS_PER_S) % len(SPINNER)]
            mark, style = MARKS.get(job.status, (frame, "cyan"))
            words = Text(printable(job.text))
            if not job.text or job.status is not Status.COMPLETED:
                words.append("\n" * bool(job.text) + printable(job.message), "dim")
            table.add_row(Text(mark, style), job.job_type, Text(job.status, style), f"{job.age_s:.1f} s", words)
        self._draw(table)


def terminal() -> Console | None:
    """Where the demo draws; None where it prints plain lines."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal else None


def run_jobs(api: Api, worker_thread: threading.Thread, console: Console | None) -> list[Followed]:
    """One job of each type, shown until all have ended."""
    jobs = [api.submit(job_type, input_data) for job_type, input_data in JOBS.items()]
    for job in jobs:
        View().line(job, job.status, f"“{JOBS[job.job_type].get('prompt') or JOBS[job.job_type].get('text')}”")
    if console is None:
        api.follow(jobs, DemoView(worker_thread))
        return jobs
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as live:
        api.follow(jobs, LiveView(worker_thread, lambda table: live.update(table, refresh=True)))
    return jobs


def show_job(runtime: Runtime, job: Followed, folder: Path, is_shown: bool) -> None:
    """Prints a text that isn't on the screen already, or saves a file and prints where."""
    output, url = job.document["output_data"], job.document["artifact_url"]
    if not url:
        print(f"text     {output['tokens_used']} tokens by {output['model_used']}, in {job.sequence + 1} pieces")
        if not is_shown:
            print(textwrap.indent(textwrap.fill(printable(output["generated_text"]), 100), " " * 9))
        return
    data = fetch_file(runtime, url) or b""
    path = folder / f"{FILE_NAMES[job.job_type]}{Path(url).suffix}"
    path.write_bytes(data)
    measure = output.get("resolution") or f"{output['duration_seconds']} s"
    print(f"{path.stem:8} {path}  ({measure}, {len(data) / 1000:.0f} kB, by {output['model_used']})")


def run_demo(output: Path | None) -> int:
    console = terminal()
    print(INTRODUCTION)
    with embedded_redis() as redis_url:
        runtime = embedded_runtime(redis_url)
        for kind in PROVIDER_KINDS:
            print(f"  {kind:5}  by {runtime.settings.provider(kind).label}")
        print(flush=True)
        with embedded_worker() as worker_thread, Api(runtime) as api:
            jobs = run_jobs(api, worker_thread, console)
            print()
            folder = writable_folder(output or Path("demo-output"))
            completed = [job for job in jobs if job.status is Status.COMPLETED]
            for job in completed:
                show_job(runtime, job, folder, is_shown=console is not None)
            print(f"\n{len(completed)} of {len(jobs)} jobs completed in {max(job.age_s for job in jobs):.1f} s.")
            print(NEXT_STEPS, flush=True)
    return 0 if completed == jobs else EXIT_FAILED


def demo(output: Path | None) -> int:
    """One job of each type through the real worker on embedded servers; 0 if all three have completed."""
    tolerate_any_character()
    warnings.simplefilter("ignore")
    log, code = io.StringIO(), EXIT_FAILED
    logging.basicConfig(stream=log, level=logging.WARNING, format="  %(message)s", force=True)
    try:
        code = run_demo(output)
    except (Unreachable, OSError) as error:
        say(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    if code:
        say(f"What the worker logged:\n{log.getvalue() or '  nothing'}")
    return code
