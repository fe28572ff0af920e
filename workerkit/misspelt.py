"""Names that are nearly a setting's name, so that they were probably meant to be one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

MAX_LETTERS = 2  # by which a misspelt name differs at most
LONG_WORD = 7  # letters; two changed letters make another word of a shorter one, as `VIDEO` of `AUDIO`
# Words that variables of other programs have where one of ours differs by a letter: `REDIS_URI`, `OPENAI_API_KEYS`,
# `IMAGE_SIZE`, `SLEEP_INTERVAL`. A name that differs by such words alone is another program's, and nobody's mistake.
OTHER_WORD = re.compile(
    r"APP|AUDIT|CERTFILE|CERTS|DB|DEBUGS|DELAY|DIRS|FILES|KEYS|MODES?|MONGO|NAMES|NDEBUG|NEXT|POLL|REGIONS|SIZE|SLEEP"
    r"|SQL|SSH|SSO|TEST|TOOL|URIS?|URLS"
)
PLAIN_NAME = re.compile(r"[A-Z0-9_.-]+")


def distance(name: str, other: str) -> int:
    """How many letters have to be inserted, left out, replaced, or swapped with the next one."""
    before, row = [0], list(range(len(other) + 1))
    for i, letter in enumerate(name, 1):
        before_that, before, row = before, row, [i]
        for j, wanted in enumerate(other, 1):
            fewest = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and name[i - 2] == wanted:
                fewest = min(fewest, before_that[j - 2] + 1)
            row.append(fewest)
    return row[-1]


def is_within_words(name: str, setting: str) -> bool:
    """Whether two letters are in two words, or in one that is long enough, or are underscores."""
    words, wanted = name.split("_"), setting.split("_")
    if len(words) != len(wanted):
        return name.replace("_", "") == setting.replace("_", "")
    limits = (MAX_LETTERS if len(word) >= LONG_WORD else 1 for word in wanted)
    return all(distance(*pair) <= limit for *pair, limit in zip(words, wanted, limits, strict=True))


def letters_between(name: str, setting: str) -> int | None:
    """By how many letters a name differs from a setting's; None: by too many, or by digits, as `OPENAI_API_KEY_2`."""
    if abs(len(name) - len(setting)) > MAX_LETTERS or len(set(name) ^ set(setting)) > 2 * MAX_LETTERS:
        return None  # this alone decides most, much faster than what follows
    if re.sub(r"\D", "", name) != re.sub(r"\D", "", setting):
        return None
    letters = distance(name, setting)
    is_near = letters < MAX_LETTERS or (letters == MAX_LETTERS and is_within_words(name, setting))
    return letters if is_near else None


def has_other_words(name: str, setting: str) -> bool:
    """Whether a name differs from a setting's by words of other programs alone."""
    return all(map(OTHER_WORD.fullmatch, set(name.split("_")) - set(setting.split("_"))))


@dataclass(frozen=True)
class Misspelt:
    """A variable that isn't a setting, where it is set, and the settings of nearly the same name."""

    name: str
    place: str
    meant: tuple[str, ...]

    @property
    def seen(self) -> str:
        return f"{self.name} ({self.place}) isn't a setting"

    @property
    def advice(self) -> str:
        return f"is {' or '.join(self.meant)} meant?"


def find_misspelt(places: Mapping[str, str], settings: Iterable[str]) -> Iterator[Misspelt]:
    """The variables that are probably misspelt settings. `places` says where each is set. Case doesn't matter."""
    wanted = sorted(name.upper() for name in settings)
    for name, place in places.items():
        upper = name.upper()
        if upper in wanted or not PLAIN_NAME.fullmatch(upper):
            continue
        near = {one: letters for one in wanted if (letters := letters_between(upper, one)) is not None}
        if near and not any(has_other_words(upper, one) for one in near):
            yield Misspelt(name, place, tuple(one for one in near if near[one] == min(near.values())))
