"""What the commands share when they write to a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH, MIN_TABLE_WIDTH = 140, 70
COLUMNS_ON_A_LINE = 2  # in a terminal that is narrower
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def say(words: object) -> None:
    """Prints to stderr. Only the result goes to stdout, so that it can be piped on."""
    print(words, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """The text without control characters, which could steer a terminal."""
    return "".join(c for c in text if c in "\n\t\u200d" or c.isprintable())


def open_console() -> Console:
    """A console for tables: as wide as the terminal, or of a fixed width where the output goes to a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def print_rows(headings: Sequence[str], rows: Sequence[Sequence[str]], styles: Mapping[str, str] | None = None) -> None:
    """Prints rows as a table, or line by line where the terminal is too narrow for one. No cell is cut.

    `styles` are the colours of some cells. The cells are never read as markup.
    """
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console, colours = open_console(), styles or {}

    def shown(cell: str) -> Text:
        plain = cell.encode(console.encoding, "plain").decode(console.encoding)  # as it will be written, for its width
        return Text(plain, colours.get(cell, ""), overflow="fold")

    cells = [list(map(shown, row)) for row in rows]
    if console.width >= MIN_TABLE_WIDTH:
        table = Table()
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in cells:
            table.add_row(*row)
        console.print(table)
        return
    for row in cells:
        console.print(*row[:COLUMNS_ON_A_LINE])
        for cell in row[COLUMNS_ON_A_LINE:]:
            if cell.plain:
                console.print(Padding(cell, (0, 0, 0, 2), expand=False))
