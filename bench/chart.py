"""Pictures of the figures, as SVG: what each goal allows and what was used of it, and the comparison with rivals.

They are drawn from the JSON file that `--save` writes, so that a picture can be drawn again without measuring.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import escape

from bench.contestants import BARE, STREAMED
from bench.figures import Document, Figure, figure_from

FONT: Final = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
INK, FAINT, PALE = "#1f2328", "#6e7781", "#d0d7de"
REACHED, MISSED = "#2da44e", "#cf222e"
OURS_COLOUR, OTHER_COLOUR = "#0969da", "#8c959f"
MARGIN: Final = 28
BAR_GAP: Final = 10  # between a bar and the text beside it
LABEL_SIZE, TEXT_SIZE, TITLE_SIZE = 15, 13, 17


class Drawing:
    """Shapes and texts on a white ground, from top to bottom."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.y = float(MARGIN)
        self._elements: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, fill: str, **more: object) -> None:
        """Draw a rectangle."""
        rest = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
        box = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}"'
        self._elements.append(f'<rect {box} fill="{fill}"{rest}/>')

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = INK) -> None:
        """Draw a line."""
        ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        self._elements.append(f'<line {ends} stroke="{colour}" stroke-width="1.5"/>')

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: int = TEXT_SIZE,
        colour: str = INK,
        anchor: str = "start",
        weight: int = 400,
    ) -> None:
        """Write a text; `y` is the middle of its line."""
        style = f'font-size="{size}" font-weight="{weight}" fill="{colour}" text-anchor="{anchor}"'
        self._elements.append(f'<text x="{x:.1f}" y="{y + size * 0.35:.1f}" {style}>{escape(words)}</text>')

    def heading(self, title: str, *lines: str) -> None:
        """Write a title, and lines of small text below it."""
        self.text(MARGIN, self.y, title, TITLE_SIZE, weight=600)
        for line in filter(None, lines):
            self.y += TEXT_SIZE + 7
            self.text(MARGIN, self.y, line, colour=FAINT)
        self.y += 26

    def svg(self, description: str) -> str:
        """Return the picture. The description is for those who can't see it."""
        height = self.y + MARGIN
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {height:.0f}" width="{self.width}"'
        ground = f'<rect width="{self.width}" height="{height:.0f}" fill="#ffffff"/>'
        body = "\n".join([f"<title>{escape(description)}</title>", ground, *self._elements])
        return f'{head} height="{height:.0f}" role="img" font-family="{FONT}">\n{body}\n</svg>\n'


# ── goals ────────────────────────────────────────────────────────────────────────────────────────────────────────

GOALS_WIDTH, GOALS_ROW, GOALS_FROM, GOALS_TO, MAX_SHARE = 1180, 32, 300, 640, 2.0


def goal_words(figure: Figure) -> str:
    """Return what stands beside a bar: the value that the goal is about, its bound, and what was measured."""
    goal = figure.goal
    assert goal
    median, bound = statistics.median, f"at {'least' if goal.at_least else 'most'} {goal.bound:g}"
    ours = f"{median(figure.ours):.{figure.digits}f} {figure.unit}".strip()
    if goal.view == "ours":
        return f"{ours} ({bound})"
    other = f"{figure.against} {'over ' if figure.not_before else ''}{median(figure.other):.{figure.digits}f}"
    if goal.view == "ratio":
        return f"{median(figure.ratios):.2f}× ({bound}): {ours}, {other}"
    return f"{median(figure.differences):+.{figure.digits}f} ({bound}): {ours}, {other}"


def draw_goals(figures: Iterable[Figure], facts: str = "") -> str:
    """Draw a bar for each goal: how much of what it allows was used, with the spread of the rounds."""
    drawing = Drawing(GOALS_WIDTH)
    drawing.heading(
        "AI Backend Worker: what each goal allows, and what was used of it",
        "Median of the rounds; a line from the lowest to the highest. A bar that ends left of 100 % reaches its goal.",
        facts,
    )

    def x_of(share: float) -> float:
        return GOALS_FROM + (GOALS_TO - GOALS_FROM) * min(share, MAX_SHARE) / MAX_SHARE

    drawing.text(x_of(1), drawing.y, "100 %", anchor="middle")
    drawing.y += 14
    top = drawing.y
    for figure in (one for one in figures if one.shares):
        middle = drawing.y + GOALS_ROW / 2
        colour = REACHED if figure.is_reached else MISSED
        drawing.text(GOALS_FROM - BAR_GAP, middle, figure.name, LABEL_SIZE, anchor="end")
        drawing.rect(GOALS_FROM, middle - 9, x_of(statistics.median(figure.shares)) - GOALS_FROM, 18, colour)
        drawing.line(x_of(min(figure.shares)), middle, x_of(max(figure.shares)), middle)
        drawing.text(GOALS_TO + BAR_GAP, middle, goal_words(figure))
        drawing.y += GOALS_ROW
    drawing.line(x_of(1), top, x_of(1), drawing.y)
    return drawing.svg("What each goal allows, and what was used of it")


# ── rivals ───────────────────────────────────────────────────────────────────────────────────────────────────────

RIVALS_WIDTH, RIVALS_ROW, RIVALS_FROM, RIVALS_TO = 960, 40, 200, 870
OURS_NAME: Final = "AI Backend Worker"


@dataclass
class Bar:
    """What one contestant reached: with the streamed call (or the only one), and with the whole answer at once."""

    label: str
    value: float | None = None
    at_once: float | None = None
    bound: float = 0.0  # where it has not finished: the seconds that were waited
    reason: str = ""
    is_ours: bool = False


def speed_bars(figures: Iterable[Figure]) -> list[Bar]:
    """Return jobs a second of all contestants, ours first."""
    bars = {OURS_NAME: Bar(OURS_NAME, is_ours=True)}
    for figure in (one for one in figures if one.name == "throughput"):
        bars[OURS_NAME].value = statistics.median(figure.ours)
        label = figure.against.removesuffix(STREAMED)
        bar = bars.setdefault(label, Bar(label))
        if figure.against.endswith(STREAMED):
            bar.value = statistics.median(figure.other)
        else:
            bar.at_once = statistics.median(figure.other)
    return [bar for bar in bars.values() if bar.value]


def recovery_bars(figures: Iterable[Figure]) -> list[Bar]:
    """Return the seconds until a killed worker's job was done, ours first."""
    bars: list[Bar] = []
    for figure in figures:
        seconds, ours = statistics.median(figure.other), Bar(OURS_NAME, statistics.median(figure.ours), is_ours=True)
        bars = bars or [ours]
        if figure.not_before:
            bars.append(Bar(figure.against, bound=seconds, reason=figure.not_before))
        else:
            bars.append(Bar(figure.against, seconds))
    return bars


def duration(seconds: float) -> str:
    """Return seconds in words."""
    return f"{seconds / 60:g} min" if seconds >= 120 and seconds % 60 == 0 else f"{seconds:.0f} s"


def draw_label(drawing: Drawing, bar: Bar, middle: float) -> str:
    """Write a contestant's name; return the colour of its bar."""
    weight = 600 if bar.is_ours else 400
    drawing.text(RIVALS_FROM - BAR_GAP, middle, bar.label, LABEL_SIZE, anchor="end", weight=weight)
    return OURS_COLOUR if bar.is_ours else OTHER_COLOUR


def draw_bar(drawing: Drawing, y: float, height: float, value: float, full: float, colour: str) -> None:
    """Draw one bar and its number."""
    length = (RIVALS_TO - RIVALS_FROM) * value / full
    drawing.rect(RIVALS_FROM, y, length, height, colour, rx=2)
    drawing.text(RIVALS_FROM + length + 8, y + height / 2, f"{value:.0f}", TEXT_SIZE)


def draw_speeds(drawing: Drawing, bars: list[Bar]) -> None:
    """Draw the panel with jobs a second."""
    full = max(value for bar in bars for value in (bar.value, bar.at_once) if value)
    for bar in bars:
        assert bar.value
        middle = drawing.y + RIVALS_ROW / 2
        colour = draw_label(drawing, bar, middle)
        draw_bar(drawing, middle - (15 if bar.at_once else 8), 16, bar.value, full, colour)
        if bar.at_once:
            draw_bar(drawing, middle + 3, 11, bar.at_once, full, PALE)
        drawing.y += RIVALS_ROW


def draw_recoveries(drawing: Drawing, bars: list[Bar]) -> None:
    """Draw the panel with the seconds until a killed worker's job was done."""
    full = max(bar.value or bar.bound for bar in bars)
    for bar in bars:
        middle = drawing.y + RIVALS_ROW / 2
        colour = draw_label(drawing, bar, middle)
        if bar.value is not None:
            draw_bar(drawing, middle - 8, 16, bar.value, full, colour)
        else:
            outline = {"stroke": MISSED, "stroke_dasharray": "5 4", "rx": 2}
            drawing.rect(RIVALS_FROM, middle - 12, RIVALS_TO - RIVALS_FROM, 24, "#fff5f5", **outline)
            words = f"not done within {duration(bar.bound)}: {bar.reason}"
            drawing.text(RIVALS_FROM + 8, middle, words, colour=MISSED)
        drawing.y += RIVALS_ROW


def draw_rivals(speeds: Iterable[Figure], losses: Iterable[Figure], facts: Mapping[str, str] | None = None) -> str:
    """Draw both panels of the comparison with other frameworks, or one of them if the other was not measured."""
    drawing, facts = Drawing(RIVALS_WIDTH), facts or {}
    if bars := speed_bars(speeds):
        drawing.heading(
            "Jobs per second",
            "One worker process, one job at a time; more is better. The thick bars make the same streamed call.",
            "The thin bars take the whole answer at once, which is less work; this worker always streams.",
            facts.get("rivals", ""),
        )
        draw_speeds(drawing, bars)
        drawing.y += MARGIN
    if bars := recovery_bars(losses):
        drawing.heading(
            "Seconds until a killed worker's job is done",
            "kill -9 of the whole worker while it runs a job; another one stands by. Less is better. A single run:",
            "Dramatiq looks for lost messages at random moments, so that its time differs much from run to run.",
            facts.get("rivals-loss", ""),
        )
        draw_recoveries(drawing, bars)
    return drawing.svg(f"{OURS_NAME} compared with {BARE.label}, RQ, Dramatiq, arq and taskiq")


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def figures_of(sections: Mapping[str, Document], name: str) -> list[Figure]:
    """Return the figures of one measurement, or an empty list if the file has none."""
    return [figure_from(document) for document in sections.get(name, {}).get("figures", [])]


def facts_of(section: Mapping[str, Any], *, rounds: bool = True) -> str:
    """Return in a line how and when a measurement was made."""
    if not section:
        return ""
    size = f"{section['rounds']} round(s) of {section['jobs']} jobs, " if rounds else ""
    return f"{size}{section['cpus']} CPUs, load {section['load'][0]:.1f}, {section['at'][:10]}"


def draw_files(figures: Path, goals: Path, rivals: Path) -> list[str]:
    """Draw what the JSON file has into these two files; return a line for each picture that was drawn."""
    sections: dict[str, Document] = json.loads(figures.read_text())
    with_goals = [figure for name in sections for figure in figures_of(sections, name) if figure.goal]
    lines = []
    if with_goals:
        newest = max(sections.values(), key=lambda section: str(section["at"]))
        goals.write_text(draw_goals(with_goals, facts_of(newest)))
        lines.append(f"{goals}: {len(with_goals)} goals")
    speeds, losses = figures_of(sections, "rivals"), figures_of(sections, "rivals-loss")
    if speeds or losses:
        race, loss = sections.get("rivals", {}), sections.get("rivals-loss", {})
        facts = {"rivals": facts_of(race), "rivals-loss": facts_of(loss, rounds=False)}
        rivals.write_text(draw_rivals(speeds, losses, facts))
        lines.append(f"{rivals}: {len(speed_bars(speeds))} speeds, {len(recovery_bars(losses))} recoveries")
    return lines
