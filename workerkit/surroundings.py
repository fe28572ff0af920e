"""What the worker needs of the system around it: semaphores for prefork, leases long enough, streams for any text."""

from __future__ import annotations

import codecs
import importlib
import io
import sys
import unicodedata
from collections.abc import Sequence
from typing import NoReturn

import billiard

from workerkit.logs import lone_line, place_of
from workerkit.settings import EXIT_BAD_SETTINGS, crowded_lease_fault

# ── the pool ─────────────────────────────────────────────────────────────────────────────────────────────────────

SHARED_MEMORY = "mount a writable /dev/shm (Docker: --tmpfs /dev/shm), or set WORKER_POOL=threads (or solo)"


def refuse(fault: str, log_format: str) -> NoReturn:
    """Ends a start that can't go well, with a sentence in the format of the log."""
    sys.stderr.write(lone_line("CRITICAL", f"The worker can't start: {fault}.", log_format))
    raise SystemExit(EXIT_BAD_SETTINGS)


def semaphores_fault() -> str:
    """Why this system gives no semaphores, or an empty string. On Linux they are files in /dev/shm."""
    try:
        billiard.Lock()
    except (OSError, ImportError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        return f"the prefork pool needs semaphores, and there are none ({reason}): {SHARED_MEMORY}"
    return ""


def pool_fault(pool: str, concurrency: object, lease_s: float) -> str:
    """Why a worker must not start in this pool (the name of its module, or what was asked for), or an empty string."""
    kind = pool.removesuffix("s")
    if not kind.endswith(
        ("prefork", "thread", "solo")
    ):  # another pool runs no keeper, so that each lease would run out
        return f"the pool {pool} isn't supported: use prefork, threads or solo (WORKER_POOL, --pool)"
    crowd = concurrency if isinstance(concurrency, int) else 1
    if fault := crowded_lease_fault(lease_s, crowd):
        return f"LEASE_SECONDS {fault}"
    return semaphores_fault() if kind.endswith("prefork") else ""


def modules_fault(names: Sequence[str]) -> str:
    """Imports modules of job types. Returns what is wrong with one, or an empty string."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # its text may hold a secret, its place can't
            return f"names {name}, which raises {type(error).__name__} at {place_of(error)}"
    return ""


# ── the terminal ─────────────────────────────────────────────────────────────────────────────────────────────────

PLAIN = str.maketrans("“”„‘’–—−·•✓✗→│", '"""\'\'---**+x>|')
SPINNER = range(0x2800, 0x2900)  # braille


def plain(character: str) -> str:
    """The character in ASCII, or the next thing to it."""
    if ord(character) in SPINNER:
        return "*"
    if unicodedata.combining(character):
        return ""
    known = unicodedata.normalize("NFKD", character.translate(PLAIN)).encode("ascii", "ignore").decode()
    return known or "?"


def replace_by_plain(error: UnicodeError) -> tuple[str, int]:
    """The handler of errors "plain" of encodings."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(plain, error.object[error.start : error.end])), error.end


codecs.register_error("plain", replace_by_plain)


def write_any_character() -> None:
    """Makes stdout and stderr write in plain characters what their encoding lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")
