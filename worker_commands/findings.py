"""What `check` and `status` found when they tried a server: one row each, with advice where something is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pymongo

from workerkit.broker import refusal_of
from workerkit.connections import advice_for, fault_at, place_of, reason_of, start_of
from workerkit.errors import JobError, StoreUnavailable

CHECK_TIMEOUT_S = 5
TRUST_ADVICE = "name the authority: tlsCAFile=… in MONGODB_URL, ssl_ca_certs=… in REDIS_URL, SSL_CERT_FILE for others"


@dataclass(frozen=True)
class Finding:
    """A row of the table. `advice` is empty where all is well."""

    what: str
    seen: str
    advice: str = ""
    is_fault: bool = False
    start: str = ""  # the command that starts what isn't running


def error_code(error: Exception) -> str:
    code = getattr(error, "code", None) or getattr(error, "strerror", None)
    return f" ({code})" if isinstance(code, (int, str)) else ""


def describe(error: Exception, advice: str, url: str, variable: str) -> tuple[str, str, str]:
    """What went wrong, with the server's host and port, what to do, and the command that starts what isn't running.

    No URL, key or password is in it.
    """
    if refusal := refusal_of(error):
        return f"{place_of(url)}: {refusal.reason}", refusal.advice, ""
    if isinstance(error, JobError):  # has the reason already, or what the provider itself has answered
        reason, fault = error.detail, f"{place_of(url)}: {error.detail}"
    else:
        reason, fault = reason_of(error), fault_at(url, error)
    if fault:
        is_trust, more = "isn't trusted" in fault, advice_for(reason, url, variable) if variable else ""
        return fault, TRUST_ADVICE if is_trust else more or advice, start_of(reason, url) if variable else ""
    known = str(error) if isinstance(error, StoreUnavailable) else type(error).__name__ + error_code(error)
    return (f"{place_of(url)}: {known}" if url else known), advice, ""


def probe(what: str, advice: str, look: Callable[[], str], url: str = "", variable: str = "") -> Finding:
    """Tries one thing on the server at a URL, which a variable has. Whatever goes wrong becomes a row with advice."""
    try:
        with pymongo.timeout(CHECK_TIMEOUT_S):
            return Finding(what, look())
    except Exception as error:  # any library's error is an answer here
        seen, to_do, start = describe(error, advice, url, variable)
        return Finding(what, seen, to_do, is_fault=True, start=start)
