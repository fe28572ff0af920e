"""What `check` and `status` found when they tried a server: one row each, with advice where something is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pymongo

from workerkit.broker import refusal_of
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


def certificate_fault(error: BaseException | None) -> str:
    """Why a server's certificate was refused, or an empty string. Libraries wrap this error in errors of their own."""
    while error is not None:
        if found := re.search(r"certificate verify failed: ([\w ,'.:-]+)", str(error)):
            return f"the certificate isn't trusted: {found[1].strip()}"
        error = error.__cause__ or error.__context__
    return ""


def error_code(error: Exception) -> str:
    code = getattr(error, "code", None) or getattr(error, "strerror", None)
    return f" ({code})" if isinstance(code, (int, str)) else ""


def probe(what: str, advice: str, look: Callable[[], str]) -> Finding:
    """Tries one thing. Whatever goes wrong becomes a row with advice, without URLs or keys."""
    try:
        with pymongo.timeout(CHECK_TIMEOUT_S):
            return Finding(what, look())
    except Exception as error:  # any library's error is an answer here
        if fault := certificate_fault(error):
            return Finding(what, fault, TRUST_ADVICE, is_fault=True)
        if refusal := refusal_of(error):
            return Finding(what, refusal.reason, refusal.advice, is_fault=True)
        if isinstance(error, (JobError, StoreUnavailable)):
            return Finding(what, str(error), advice, is_fault=True)
        return Finding(what, f"{type(error).__name__}{error_code(error)}", advice, is_fault=True)
