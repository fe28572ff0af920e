"""README.md and docs/ say what is so: their links, their table of failures and their pictures of the terminal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from testbed.processes import SOURCE
from testbed.terminals import PICTURES, picture_of_demo, picture_of_status, words_in

DOCUMENTS = sorted([*SOURCE.glob("*.md"), *SOURCE.glob("docs/*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_to_a_file_leads_to_one(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_readme_has_at_most_200_lines() -> None:
    assert len((SOURCE / "README.md").read_text().splitlines()) <= 200


def test_every_failure_names_a_test_that_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (SOURCE / "docs/failures.md").read_text()))
    tests = "".join(path.read_text() for path in SOURCE.glob("tests/*.py"))
    assert len(named) > 50
    assert {name for name in named if f"def {name}(" not in tests} == set()


def test_the_picture_of_the_demo_shows_what_the_demo_prints() -> None:
    picture = (PICTURES / "demo.svg").read_text()
    assert words_in(picture) == words_in(picture_of_demo())


@pytest.mark.servers
def test_the_picture_of_status_shows_what_status_prints() -> None:
    picture = (PICTURES / "status.svg").read_text()
    assert words_in(picture) == words_in(picture_of_status())
