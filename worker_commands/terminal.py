"""What the commands share when they write to a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

PLAIN_WIDTH, MIN_TABLE_WIDTH = 140, 70
GAP, MIN_NAME_WIDTH = "  ", 16  # of tables of figures
COLUMNS_ON_A_LINE = 2  # in a terminal that is narrower
UNITS, ONE_DECIMAL_BELOW_S = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s")), 9.95
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def say(words: object) -> None:
    """Prints to stderr. Only the result goes to stdout, so that it can be piped on."""
    print(words, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """The text without control characters, which could steer a terminal."""
    return "".join(c for c in text if c in "\n\t\u200d" or c.isprintable())


def counted(count: int, what: str) -> str:
    """A number of things, such as `1 job` or `3 jobs`."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def duration_text(seconds: float) -> str:
    """A duration in the two units that tell most of it, such as `0.4 s`, `12 s`, `3 min 20 s` or `5 h`."""
    if seconds < ONE_DECIMAL_BELOW_S:
        return f"{seconds:.1f} s"
    left = round(seconds)
    parts: list[tuple[int, str]] = []
    for size, unit in UNITS:
        count, left = divmod(left, size)
        if count or parts:
            parts.append((count, unit))
    return " ".join(f"{count} {unit}" for count, unit in parts[:2] if count)


def open_console() -> Console:
    """A console for tables: as wide as the terminal, or of a fixed width where the output goes to a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def as_shown(console: Console, text: str, style: str = "") -> Text:
    """A text for the console: as it will be written there, so that its width is known. It is never read as markup."""
    from rich.text import Text

    plain = text.encode(console.encoding, "plain").decode(console.encoding)
    return Text(plain, style, overflow="fold")


def figures_table(console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> RenderableType:
    """Rows of a name and figures, as a table without lines; as sentences where the terminal is too narrow for one.

    No figure is cut, and only names are folded.
    """
    from rich.table import Table

    columns = list(zip(headings, *rows, strict=True))
    widths = [max(map(len, column)) + len(GAP) for column in columns]
    if console.width - sum(widths[1:]) < min(widths[0], MIN_NAME_WIDTH):
        pairs = ((name, map(" ".join, zip(headings[1:], cells, strict=True))) for name, *cells in rows)
        return as_shown(console, printable("\n".join(f"{name}: {', '.join(figures)}" for name, figures in pairs)))
    table = Table(box=None, pad_edge=False, padding=(0, len(GAP), 0, 0), header_style="bold")
    table.add_column(headings[0], overflow="fold")
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(as_shown(console, printable(cell)) for cell in row))
    return table


def print_lines(console: Console, page: RenderableType) -> None:
    """Prints a page. A file gets no blanks at the ends of lines, which a table would pad."""
    if console.is_terminal:
        console.print(page)
        return
    with console.capture() as captured:
        console.print(page)
    print(*(line.rstrip() for line in captured.get().splitlines()), sep="\n", flush=True)


def print_rows(headings: Sequence[str], rows: Sequence[Sequence[str]], styles: Mapping[str, str] | None = None) -> None:
    """Prints rows as a table, or line by line where the terminal is too narrow for one. No cell is cut.

    `styles` are the colours of some cells. The cells are never read as markup.
    """
    from rich.padding import Padding
    from rich.table import Table

    console, colours = open_console(), styles or {}
    cells = [[as_shown(console, cell, colours.get(cell, "")) for cell in row] for row in rows]
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
