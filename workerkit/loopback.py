"""The servers of compose.yaml as they are reached from outside of its network: on the host's loopback.

The contract's URLs name them `mongodb` and `redis`, which resolve in that network alone.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

LOOPBACK = "127.0.0.1"
LOOPBACKS = (LOOPBACK, "localhost", "::1", "[::1]")
CONNECT_S = 0.5
IN_A_POD = "KUBERNETES_SERVICE_HOST"  # a variable that Kubernetes sets in each container
CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")  # files of Docker and Podman


def listens(port: int) -> bool:
    """Whether something listens on this port of 127.0.0.1. It is asked nothing."""
    with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), CONNECT_S):
        return True
    return False


def resolves(host: str) -> bool:
    """Whether a host's name has an address.

    A resolver that can't tell counts as none: systemd's, which Ubuntu has, answers so for a name without a dot.
    """
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def is_container() -> bool:
    return any(Path(mark).exists() for mark in CONTAINER_MARKS)


@dataclass(frozen=True)
class ComposeServer:
    """A server of compose.yaml: the variable that has its URL, the contract's default, and the port on the host."""

    variable: str
    url: str = field(repr=False)
    host: str
    usual_port: int
    port_variable: str  # by which compose.yaml publishes another port
    options: str = ""  # more of them for the URL on the host

    def port(self, variables: Mapping[str, str]) -> int:
        """The port that compose publishes. Kubernetes sets a variable of that name to a URL, which doesn't count."""
        text = variables.get(self.port_variable, "")
        return int(text) if re.fullmatch("[1-9][0-9]{0,4}", text) and int(text) < 2**16 else self.usual_port

    def url_at(self, port: int) -> str:
        return self.url.replace(f"{self.host}:{self.usual_port}", f"{LOOPBACK}:{port}") + self.options
