"""`python -m testbed.terminals` writes the pictures of the terminal in docs/ from what the commands really print.

A test compares the pictures with a new run, so it fails when a command's output has changed since.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import pyte
from rich.console import Console
from rich.text import Text

from testbed.api import Api
from testbed.processes import SOURCE
from testbed.servers import MongoServer, RedisServer

COLUMNS: Final = 104
LINES: Final = 80
PICTURES: Final = SOURCE / "docs"
COLOURS: Final = {"default": "", "brown": "yellow"}  # what pyte calls by another name than rich
SVG_TEXT: Final = "{http://www.w3.org/2000/svg}text"


def run_in_terminal(arguments: list[str], environment: Mapping[str, str], folder: Path) -> pyte.Screen:
    """Run `python worker.py` with these arguments in a pseudo-terminal; return the screen as it is at the end."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    terminal, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    command = [sys.executable, str(SOURCE / "worker.py"), *arguments]
    variables = {**os.environ, "TERM": "xterm-256color", "COLUMNS": f"{COLUMNS}", "LINES": f"{LINES}", **environment}
    process = subprocess.Popen(
        command, stdin=child, stdout=child, stderr=child, env=variables, cwd=folder, start_new_session=True
    )
    os.close(child)
    with suppress(OSError):  # Linux raises EIO when the last process has closed its end
        while piece := os.read(terminal, 65_536):
            stream.feed(piece)
    os.close(terminal)
    process.wait()
    return screen


def rows_of(screen: pyte.Screen, replaced: Mapping[str, str]) -> list[Text]:
    """Return the screen's rows with their colours, without the empty ones at the end, and with some words replaced."""
    rows = []
    for number in range(LINES):
        row = Text()
        for column in range(COLUMNS):
            character = screen.buffer[number][column]
            colour = COLOURS.get(character.fg, character.fg)
            row.append(character.data, f"{'bold ' if character.bold else ''}{colour}".strip())
        rows.append(row)
    while rows and not rows[-1].plain.strip():
        rows.pop()
    return [_replace(row, replaced) for row in rows]


def _replace(row: Text, replaced: Mapping[str, str]) -> Text:
    """Return the row with each of these words replaced by another. It loses its colours where that happens."""
    plain = row.plain
    for word, other in replaced.items():
        plain = plain.replace(word, other)
    return row if plain == row.plain else Text(plain)


def draw(rows: list[Text], title: str) -> str:
    """Return an SVG of a terminal with these rows."""
    console = Console(width=COLUMNS, record=True, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    for row in rows:
        row.rstrip()
        console.print(row, soft_wrap=True)
    return console.export_svg(title=title, unique_id=re.sub(r"\W+", "-", title))


def lines_in(svg: str) -> list[str]:
    """Return the lines of text in a picture that `draw` made."""
    lines: dict[float, list[tuple[float, str]]] = {}
    for element in ElementTree.fromstring(svg).iter(SVG_TEXT):
        if element.text and "clip-path" in element.attrib:
            piece = (float(element.attrib["x"]), element.text)
            lines.setdefault(float(element.attrib["y"]), []).append(piece)
    return ["".join(text for _, text in sorted(pieces)).rstrip() for _, pieces in sorted(lines.items())]


def words_in(svg: str) -> list[str]:
    """Return a picture's words with every id and number as 0, so that two runs can be compared.

    Lines and columns don't count: a longer time makes a column wider, and other words wrap.
    """
    text = re.sub(r"[\s\xa0─━]+", " ", " ".join(lines_in(svg)))
    return re.sub(r"\d+([.:]\d+)*", "0", re.sub(r"\b[0-9a-f]{24}\b", "0", text)).split()


def picture_of_demo() -> str:
    """Return the terminal after `python worker.py demo`."""
    with tempfile.TemporaryDirectory() as folder:
        screen = run_in_terminal(["demo"], {"OPENAI_API_KEY": "", "OPENAI_BASE_URL": ""}, Path(folder))
        rows = rows_of(screen, {str(Path(folder).resolve()): "~"})
    return draw(rows, "python worker.py demo")


@contextmanager
def servers_with_jobs() -> Iterator[dict[str, str]]:
    """Start MongoDB and Redis with some jobs in every state; yield the settings that lead there."""
    with ExitStack() as stack:
        mongo, redis = stack.enter_context(MongoServer()), stack.enter_context(RedisServer())
        settings = {"MONGODB_URL": mongo.url, "DATABASE_NAME": "ai_backend", "REDIS_URL": redis.url}
        api = stack.enter_context(closing(Api(mongo.url, redis.url, "ai_backend")))
        now = datetime.now(UTC)
        for _ in range(42):
            api.insert("text_generation", {"prompt": "Hello"}, status="completed", completed_at=now)
        for number in range(3):
            api.insert("image_generation", {"prompt": "A city"}, status="processing", started_at=now)
            api.submit("text_generation", {"prompt": f"Question {number}"})
        failures = (
            ("text_generation", "The AI service is busy; given up after 4 tries. Please try again later."),
            ("image_generation", "Your request can't be used: prompt should not be blank."),
        )
        for minutes, (job_type, sentence) in enumerate(failures, start=2):
            ended_at = now - timedelta(minutes=minutes)
            api.insert(job_type, {}, status="failed", error_message=sentence, completed_at=ended_at)
        yield settings


def picture_of_status() -> str:
    """Return the terminal after `python worker.py status`, with some jobs in every state."""
    with servers_with_jobs() as settings, tempfile.TemporaryDirectory() as folder:
        screen = run_in_terminal(["status"], settings, Path(folder))
    return draw(rows_of(screen, {}), "python worker.py status")


def main() -> None:
    """Write both pictures."""
    for name, picture in (("demo", picture_of_demo()), ("status", picture_of_status())):
        path = PICTURES / f"{name}.svg"
        path.write_text(picture)
        print(path)


if __name__ == "__main__":
    main()
