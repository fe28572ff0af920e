"""What the commands share when they write to a terminal."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 140
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def say(words: object) -> None:
    """Prints to stderr. Only the result goes to stdout, so that it can be piped on."""
    print(words, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """The text without control characters, which could steer a terminal."""
    return "".join(c for c in text if c in "\n\t\u200d" or c.isprintable())


def tolerate_any_character() -> None:
    """Makes characters that the terminal's encoding lacks question marks instead of exceptions."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def open_console() -> Console:
    """A console for tables: as wide as the terminal, or of a fixed width where the output goes to a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
