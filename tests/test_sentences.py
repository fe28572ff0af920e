"""The sentences for the person who waits."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from testbed.processes import SOURCE
from tests.lab import table
from workerkit import errors, inputs, sentences
from workerkit.errors import JobError

EVENING = datetime(2026, 11, 27, 23, 30, tzinfo=UTC)
TABLE = [value for name, value in vars(sentences).items() if name.isupper() and isinstance(value, str)]
BEGINNINGS = [one for one in TABLE if not one.endswith(".")]
MADE = [
    sentences.started(1, 4),
    sentences.started(2, 4),
    *(sentences.trying_again(one, 5, 2, 4) for one in BEGINNINGS),
    *(sentences.given_up(one, attempts) for one in BEGINNINGS for attempts in (1, 4)),
    sentences.try_again_after(sentences.BUSY, EVENING, 600),
    sentences.field_refused("seed", []),
    sentences.field_refused("size", ["512x512"]),
    sentences.over_the_cap("max_tokens", 100),
    sentences.model_not_offered(["small"]),
    sentences.unknown_type("video_generation"),
]
# What somebody who has never seen the code, or a model server, can't know.
JARGON = re.compile(r"(?i)\b(provider|worker|queue|operator|input|token|HTTP|lease|attempt|broker|artifact)s?\b")
SOURCES = [SOURCE / "worker.py", *(SOURCE / "workerkit").glob("*.py"), *(SOURCE / "worker_commands").glob("*.py")]
FAMILY = {name for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, JobError)}


@table(
    "wait_s, when",
    ("the same day", 20 * 60, "23:50 UTC"),
    ("within a minute: never too early", 61, "23:32 UTC"),
    ("past midnight", 45 * 60, "2026-11-28 00:15 UTC"),
    ("days later", 9 * 86_400, "2026-12-06 23:30 UTC"),
)
def test_a_long_wait_is_said_as_the_time_at_which_it_ends(wait_s: float, when: str) -> None:
    sentence = sentences.try_again_after(sentences.BUSY, EVENING, wait_s)
    assert sentence == f"The AI service is busy. Please try again after {when}."


@pytest.mark.parametrize("sentence", [*TABLE, *MADE])
def test_a_sentence_has_no_word_that_only_we_know(sentence: str) -> None:
    assert not JARGON.search(re.sub("`[^`]+`", "", sentence))


@pytest.mark.parametrize("sentence", MADE)
def test_a_whole_sentence_begins_with_a_capital_and_ends_with_a_full_stop(sentence: str) -> None:
    assert sentence[0].isupper()
    assert re.search(r"[^.]\.$", sentence)


@pytest.mark.parametrize("model", [inputs.TextInput, inputs.ImageInput, inputs.AudioInput, inputs.Message])
def test_an_advice_on_a_field_has_no_word_that_only_we_know(model: type[inputs.Checked]) -> None:
    advice = " ".join(field.advice for field in model.REFUSED.values())
    assert not JARGON.search(re.sub("`[^`]+`", "", advice))


def test_no_sentence_stands_twice() -> None:
    assert len(set(TABLE)) == len(TABLE)


# ── in one place ─────────────────────────────────────────────────────────────────────────────────────────────────


def is_text(node: ast.expr | None) -> bool:
    is_constant = isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value != ""
    return isinstance(node, ast.JoinedStr) or is_constant


def sentences_written_in(tree: ast.AST) -> Iterator[int]:
    """The lines that have a sentence for the person as text: as an error's second argument, or by that name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in FAMILY:
            given = [*node.args[1:2], *(one.value for one in node.keywords if one.arg == "sentence")]
            yield from (node.lineno for one in given if is_text(one))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and is_text(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {getattr(target, "id", "") for target in targets}
            yield from [node.lineno] if names & {"sentence", "default_sentence"} else []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_a_sentence_for_the_person_stands_in_the_table_alone(path: Path) -> None:
    assert list(sentences_written_in(ast.parse(path.read_text()))) == []


@table(
    "code",
    ("an error's argument", 'raise FailJob("detail", "No.")'),
    ("an error's argument by name", 'raise RetryJob("detail", sentence=f"No {x}.")'),
    ("a name for it", 'sentence = "No."'),
    ("a class's own", 'class Mine(FailJob):\n    default_sentence = "No."'),
)
def test_a_sentence_that_stands_elsewhere_is_found(code: str) -> None:
    assert list(sentences_written_in(ast.parse(code)))


@pytest.mark.parametrize("name", ["failures.md", "providers.md", "contract.md"])
def test_the_documents_quote_the_sentences_as_they_are(name: str) -> None:
    """Numbers and times are examples, and `…` stands for what is left out."""
    known = re.sub(r"\d+", "0", " | ".join([*TABLE, *MADE]))
    frame, end = sentences.unusable("|").split("|")
    text = " ".join((SOURCE / "docs" / name).read_text().split())
    for quoted in re.findall("“([^”]*)”", text):
        if quoted.startswith(frame) or " " not in quoted:
            continue
        parts = [part.strip() for part in re.sub(r"\d+", "0", quoted).split("…")]
        assert all(part.removesuffix(end) in known for part in parts), quoted
