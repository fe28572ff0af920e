"""What the worker needs of the system around it: semaphores, leases long enough, and streams that take any text."""

from __future__ import annotations

import errno
import io

import pytest

from tests.lab import table
from workerkit.surroundings import pool_fault, refuse, write_any_character

# ── the pool ─────────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "pool, concurrency, lease_s, fault",
    ("prefork by its module", "celery.concurrency.prefork", 4, 30, ""),
    ("threads by name", "threads", 4, 30, ""),
    ("a pool without a keeper", "gevent", 4, 30, "isn't supported: use prefork, threads or solo"),
    ("hundreds of jobs and a short lease", "threads", 300, 2, "LEASE_SECONDS should be at least 10"),
    ("hundreds of jobs and a longer one", "threads", 300, 10, ""),
    ("Celery counts the processors itself", "prefork", "auto", 2, ""),
)
def test_a_pool_that_would_lose_leases_is_a_fault(pool: str, concurrency: object, lease_s: float, fault: str) -> None:
    found = pool_fault(pool, concurrency, lease_s)
    assert (fault in found) if fault else not found


@table(
    "error, reason",
    ("/dev/shm is read-only", OSError(errno.EROFS, "Read-only file system"), "(Read-only file system)"),
    ("/dev/shm is full", OSError(errno.ENOSPC, "No space left on device"), "(No space left on device)"),
    ("Python has none", ImportError("no sem_open"), "(ImportError)"),
)
def test_prefork_alone_needs_semaphores(monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    def refuse() -> None:
        raise error

    monkeypatch.setattr("billiard.Lock", refuse)
    assert reason in pool_fault("prefork", 1, 30)
    assert pool_fault("threads", 1, 30) == pool_fault("solo", 1, 30) == ""


@table(
    "log_format, written",
    ("text", "text", 'The worker can\'t start: no "pool".\n'),
    ("JSON", "json", '"level": "CRITICAL", "message": "The worker can\'t start: no \\"pool\\"."}\n'),
)
def test_a_start_that_cant_go_well_ends_with_a_sentence_in_the_format_of_the_log(
    capsys: pytest.CaptureFixture[str], log_format: str, written: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        refuse('no "pool"', log_format)
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(written)


# ── the terminal ─────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "text, encoding, written",
    ("what it has is left as it is", "é “", "utf-8", "é “"),
    ("quotation marks and dots", "“It’s” … – ·", "ascii", '"It\'s" ... - *'),
    ("letters with accents", "Naïve e\u0301", "ascii", "Naive e"),
    ("marks and a spinner", "✓ ✗ ⠋", "ascii", "+ x *"),
    ("another script", "日本", "ascii", "??"),
    ("what no encoding has", "a\udcffb", "utf-8", "a?b"),
    ("another encoding", "é “", "latin-1", 'é "'),
)
def test_a_stream_writes_plain_characters_for_those_it_lacks(
    monkeypatch: pytest.MonkeyPatch, text: str, encoding: str, written: str
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding))
    write_any_character()
    print(text, end="", flush=True)
    assert raw.getvalue().decode(encoding) == written
