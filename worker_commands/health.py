"""`python worker.py health`: is a worker on this host alive?"""

from __future__ import annotations

import sys

import click

from workerkit.process import Heartbeat


@click.command("health", short_help="Exit with 0 if this host's worker is alive.")
def command() -> None:
    """Exit with 0 if this host's worker is alive (for Docker's HEALTHCHECK)."""
    ages_s = Heartbeat().ages_s()
    stale = {pid: age_s for pid, age_s in ages_s.items() if age_s > Heartbeat.STALE_S}
    for pid, age_s in stale.items():
        print(f"process {pid} has given no sign of life for {age_s:.0f} s")
    print(f"{len(ages_s)} process(es) that run jobs")
    sys.exit(1 if stale or not ages_s else 0)
