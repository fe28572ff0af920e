"""`python worker.py health`: is a worker on this host alive?"""

from __future__ import annotations

import sys

import click

from workerkit.process import KEEPER, PARENT, Heartbeat

MISSING = {
    KEEPER: "no process that runs jobs gives signs of life",
    PARENT: "no worker's parent process gives signs of life",
}


def find_faults(heartbeat: Heartbeat) -> list[str]:
    """A sentence for each sign of life that is missing or overdue."""
    try:
        signs = heartbeat.signs_of_life()
    except OSError as error:
        return [f"signs of life can't be read: {error.strerror or error}"]
    parts = {sign.part for sign in signs}
    faults = [sentence for part, sentence in MISSING.items() if part not in parts]
    overdue = [sign for sign in signs if sign.is_overdue]
    return faults + [
        f"the {one.part} of process {one.pid} has given no sign of life for {one.age_s:.0f} s" for one in overdue
    ]


@click.command("health", short_help="Exit with 0 if this host's worker is alive.")
def command() -> None:
    """Exit with 0 if this host's worker is alive (for Docker's HEALTHCHECK)."""
    faults = find_faults(Heartbeat())
    print("\n".join(faults) or "alive")
    sys.exit(1 if faults else 0)
