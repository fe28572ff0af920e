"""What a measurement returns: figures with the values of each round, and goals for some of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Literal

Document = dict[str, Any]

DIGITS: Final = {"jobs/s": 0, "ms": 1, "MiB": 1}  # after the point; two for every other unit
DEFAULT_DIGITS: Final = 2
View = Literal["ours", "ratio", "difference"]
SIGNS: Final[dict[View, str]] = {"ours": "", "ratio": "÷ ", "difference": "− "}


def spread(values: list[float], digits: int) -> str:
    """Return the median, with the lowest and highest value where there are several."""
    if not values:
        return ""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


@dataclass(frozen=True)
class Goal:
    """A bound for one view of a figure: ours alone, ours divided by the other, or ours less the other."""

    view: View
    bound: float
    at_least: bool = False

    def share(self, value: float) -> float:
        """Return how much of what the goal allows this value takes. Up to 1 the goal is reached."""
        return self.bound / max(value, 1e-9) if self.at_least else max(value, 0.0) / self.bound

    def __str__(self) -> str:
        return f"{SIGNS[self.view]}{'≥' if self.at_least else '≤'} {self.bound:g}"


@dataclass(frozen=True)
class Figure:
    """One row: a value per round for ours and, where there is one, for the other contestant.

    `not_before` is set where the other has not finished: its values are then lower bounds, and the text says why.
    """

    name: str
    unit: str
    ours: list[float]
    against: str = ""
    other: list[float] = field(default_factory=list)
    goal: Goal | None = None
    note: str = ""
    not_before: str = ""

    @property
    def ratios(self) -> list[float]:
        """Ours divided by the other, round by round. It is empty without another, or where the other is zero."""
        return self._by_round(lambda ours, other: ours / other) if self.other and all(self.other) else []

    @property
    def differences(self) -> list[float]:
        """Ours less the other, round by round."""
        return self._by_round(lambda ours, other: ours - other) if self.other else []

    def _by_round(self, view: Callable[[float, float], float]) -> list[float]:
        return [view(ours, other) for ours, other in zip(self.ours, self.other, strict=True)]

    @property
    def shares(self) -> list[float]:
        """How much of what the goal allows each round took."""
        if self.goal is None:
            return []
        views = {"ours": self.ours, "ratio": self.ratios, "difference": self.differences}
        return [self.goal.share(value) for value in views[self.goal.view]]

    @property
    def is_reached(self) -> bool | None:
        """Whether the median reaches the goal; None without one."""
        return statistics.median(self.shares) <= 1 if self.shares else None

    @property
    def digits(self) -> int:
        """How many digits after the point the unit gets."""
        return DIGITS.get(self.unit, DEFAULT_DIGITS)

    def row(self) -> tuple[str, ...]:
        """Return the cells of the table."""
        against = f"{self.against}: not before" if self.not_before else self.against
        values = spread(self.ours, self.digits), against, spread(self.other, self.digits)
        difference = f"{statistics.median(self.differences):+.{self.digits}f}" if self.differences else ""
        mark = {True: " ✓", False: " ✗", None: ""}[self.is_reached]
        return self.name, self.unit, *values, spread(self.ratios, 2), difference, f"{self.goal or ''}{mark}"

    def as_json(self) -> Document:
        """Return all values with their medians."""
        views = {"ours": self.ours, "other": self.other, "ratio": self.ratios, "difference": self.differences}
        medians = {f"median_{name}": statistics.median(values) for name, values in views.items() if values}
        return {**asdict(self), **medians, "ratios": self.ratios, "is_reached": self.is_reached}


def figure_from(document: Document) -> Figure:
    """Return the figure that `as_json` has written."""
    values = {one.name: document[one.name] for one in fields(Figure) if one.name in document}
    return Figure(**{**values, "goal": Goal(**document["goal"]) if document.get("goal") else None})
