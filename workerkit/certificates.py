"""Files with certificates and keys: whether they can be used, found out at start.

The libraries that use them report a missing file as late as at the first connection, and then again and again.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Mapping
from pathlib import Path


def read_fault(path: str) -> str:
    """Why a file can't be read, or an empty string."""
    try:
        with Path(path).open("rb") as file:
            file.read(1)
    except (OSError, ValueError) as error:
        return f"names a file that can't be read ({getattr(error, 'strerror', None) or type(error).__name__})"
    return ""


def authority_fault(path: str) -> str:
    """What is wrong with a file of certificates that are to be trusted, or with one of revoked certificates."""
    if fault := read_fault(path):
        return fault
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except OSError:
        return "names a file that holds no certificate in PEM form"
    return ""


def folder_fault(path: str) -> str:
    return "" if Path(path).is_dir() else "names a folder that isn't there"


def pair_fault(certificate: str, key: str = "", password: str = "") -> str:
    """What is wrong with the files of this side's own certificate and of its key, which may be one file."""
    if fault := read_fault(certificate) or (key and read_fault(key)):
        return fault
    try:
        # Without a password OpenSSL would ask for one on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, key or None, lambda: password)
    except (OSError, ValueError):
        return "names no certificate in PEM form with its key, or the key needs another password"
    return ""


def first_fault(options: Mapping[str, str], names: Iterable[str]) -> str:
    """The first fault of the files of authorities that these options name, beginning with the option's name."""
    faults = ((name, authority_fault(options[name])) for name in names if options.get(name))
    return next((f"{name} {fault}" for name, fault in faults if fault), "")
