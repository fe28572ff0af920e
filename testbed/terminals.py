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
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import pyte
from rich.console import Console
from rich.text import Text

from testbed.api import Api, WorkerProcess
from testbed.processes import SOURCE, current_environment
from testbed.provider import Provider
from testbed.servers import MongoServer, RedisServer

COLUMNS: Final = 104
LINES: Final = 80
STATUS_COLUMNS: Final = 80
PICTURES: Final = SOURCE / "docs"
COLOURS: Final = {"default": "", "brown": "yellow"}  # what pyte calls by another name than rich
SVG_TEXT: Final = "{http://www.w3.org/2000/svg}text"


class Terminal:
    """A command of `python worker.py` in a pseudo-terminal of its own, whose screen can be read while it runs."""

    def __init__(
        self, arguments: list[str], environment: Mapping[str, str], folder: Path, columns: int, lines: int
    ) -> None:
        """Start the command, and a thread that reads what it writes."""
        self.screen = pyte.Screen(columns, lines)
        self._stream, self._written = pyte.ByteStream(self.screen), b""
        self._terminal, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        command = [sys.executable, str(SOURCE / "worker.py"), *arguments]
        variables = {
            **current_environment(),
            "TERM": "xterm-256color",
            "COLUMNS": f"{columns}",
            "LINES": f"{lines}",
            **environment,
        }
        self.process = subprocess.Popen(
            command, stdin=child, stdout=child, stderr=child, env=variables, cwd=folder, start_new_session=True
        )
        os.close(child)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """Feed the screen until the last process has closed its end, which Linux tells by an error."""
        with suppress(OSError):
            while piece := os.read(self._terminal, 65_536):
                self._written += piece
                self._stream.feed(piece)

    def text(self) -> str:
        """Return the screen's lines as they are now."""
        return "\n".join(line.rstrip() for line in self.screen.display)

    @property
    def is_full_screen(self) -> bool:
        """Whether the command has taken the whole screen, and not yet given the terminal's own lines back."""
        return self._written.rfind(b"\x1b[?1049h") > self._written.rfind(b"\x1b[?1049l")

    def wait(self) -> None:
        """Wait until the command has ended, and all that it wrote is on the screen."""
        self._reader.join()
        self.process.wait()

    def close(self) -> None:
        """End the command if it still runs."""
        self.process.kill()
        self.wait()
        os.close(self._terminal)


@contextmanager
def open_terminal(
    arguments: list[str], environment: Mapping[str, str], folder: Path, columns: int = COLUMNS, lines: int = LINES
) -> Iterator[Terminal]:
    """Run `python worker.py` with these arguments in a pseudo-terminal. It is killed at the end."""
    with closing(Terminal(arguments, environment, folder, columns, lines)) as terminal:
        yield terminal


def run_in_terminal(
    arguments: list[str], environment: Mapping[str, str], folder: Path, columns: int = COLUMNS
) -> pyte.Screen:
    """Run a command to its end; return the screen as it is then."""
    with open_terminal(arguments, environment, folder, columns) as terminal:
        terminal.wait()
        return terminal.screen


def rows_of(screen: pyte.Screen, replaced: Mapping[str, str]) -> list[Text]:
    """Return the screen's rows with their colours, without the empty ones at the end, and with some words replaced."""
    rows = []
    for number in range(screen.lines):
        row = Text()
        for column in range(screen.columns):
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


def draw(rows: list[Text], title: str, columns: int = COLUMNS) -> str:
    """Return an SVG of a terminal with these rows."""
    console = Console(width=columns, record=True, file=io.StringIO(), color_system="truecolor", force_terminal=True)
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


def attempt(end: str, waited_s: float, ran_s: float, **fields: object) -> dict[str, Any]:
    """Return an attempt as a worker notes it."""
    return {"attempt": 1, "end": end, "ended_at": datetime.now(UTC), "waited_s": waited_s, "ran_s": ran_s, **fields}


def insert_ended(api: Api, job_type: str, minutes: int, last: dict[str, Any], sentence: str | None = None) -> None:
    """Insert a job that has ended so many minutes ago, by this attempt: failed if there is a sentence."""
    at = datetime.now(UTC) - timedelta(minutes=minutes)
    status, own = ("failed" if sentence else "completed"), {"attempt": 1, "attempts": [{**last, "ended_at": at}]}
    api.insert(job_type, {}, status=status, completed_at=at, error_message=sentence, worker=own)


def insert_jobs(api: Api) -> None:
    """Insert jobs that have ended in every way within the last hour, and some that are pending."""
    for number in range(42):
        insert_ended(api, "text_generation", 3 + number, attempt("completed", 0.1 + number / 20, 2.2 + number / 10))
    for number in range(8):
        insert_ended(api, "image_generation", 4 + number, attempt("completed", 0.2, 12.5 + number))
    reason = "HTTP 401 invalid_api_key: check the provider's key (IMAGE_API_KEY or OPENAI_API_KEY)"
    fault = attempt("failed", 0.1, 0.4, error="OperatorFault", is_operators=True, reason=reason)
    for minutes in (2, 3, 5):
        insert_ended(
            api, "image_generation", minutes, fault, "This service isn't set up correctly. Please tell whoever runs it."
        )
    wrong = attempt("failed", 0.1, 0.0, error="InvalidInput", reason="input: size value_error")
    insert_ended(api, "image_generation", 21, wrong, "Your request can't be used: size should look like 512x512.")
    busy = attempt("failed", 5.2, 0.9, error="RetryJob", reason="HTTP 429 rate_limit_exceeded")
    insert_ended(api, "text_generation", 34, busy, "The AI service is busy; given up after 4 tries.")
    at = datetime.now(UTC) - timedelta(minutes=2, seconds=10)
    for _ in range(3):
        api.insert("text_generation", {"prompt": "Question"}, created_at=at, updated_at=at)


@contextmanager
def worker_with_jobs(folder: Path) -> Iterator[dict[str, str]]:
    """Start MongoDB, Redis, a provider and a worker with jobs in every state; yield the settings that lead there."""
    with ExitStack() as stack:
        mongo, redis = stack.enter_context(MongoServer()), stack.enter_context(RedisServer())
        provider = stack.enter_context(Provider())
        settings = {"MONGODB_URL": mongo.url, "DATABASE_NAME": "ai_backend", "REDIS_URL": redis.url}
        api = stack.enter_context(closing(Api(mongo.url, redis.url, "ai_backend")))
        own = {"OPENAI_BASE_URL": provider.url, "WORKER_POOL": "threads", "WORKER_CONCURRENCY": "4"}
        # With a long lease it looks for lost messages so late that the pending jobs stay pending.
        worker = WorkerProcess({**settings, **own, "LEASE_SECONDS": "300"}, folder / "worker.log")
        stack.callback(worker.kill)
        worker.wait_ready()
        for job in [api.text("A long answer [hang]") for _ in range(3)]:
            api.wait(job, "processing")
        insert_jobs(api)
        yield settings


def picture_of_status() -> str:
    """Return the terminal after `python worker.py status`, with some jobs in every state."""
    with tempfile.TemporaryDirectory() as name, worker_with_jobs(Path(name)) as settings:
        screen = run_in_terminal(["status"], settings, Path(name), STATUS_COLUMNS)
    return draw(rows_of(screen, {}), "python worker.py status", STATUS_COLUMNS)


def main() -> None:
    """Write both pictures."""
    for name, picture in (("demo", picture_of_demo()), ("status", picture_of_status())):
        path = PICTURES / f"{name}.svg"
        path.write_text(picture)
        print(path)


if __name__ == "__main__":
    main()
