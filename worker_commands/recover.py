"""`python worker.py recover`: one search for lost jobs and for files that no job names."""

from __future__ import annotations

import contextlib
import math

import click

from worker import Runtime, configure
from workerkit.errors import FailJob, StoreUnavailable
from workerkit.settings import load_settings
from workerkit.turns import EveryTurn


def recover(runtime: Runtime) -> list[str]:
    """Searches once; returns a line for each thing done. Raises ClickException: a server can't be reached."""
    where = "MongoDB"
    try:
        runtime.turns = EveryTurn(runtime.database, runtime.store.now)  # it need not wait for a worker's turn
        runtime.turns.register(runtime.settings.celery_queue_name)  # there may have been no worker for a day
        runtime.sweeper.budget_s = math.inf
        lines = runtime.sweeper.sweep()
        if runtime.sweeper.had_fault:
            where = "the broker, or Redis,"
            raise StoreUnavailable("see the log")
        where = "the artifact store"
        return lines + runtime.files.sweep(all_files=True)
    except (StoreUnavailable, FailJob) as error:
        raise click.ClickException(f"{where} can't be reached ({error}); try `python worker.py check`") from None


@click.command("recover", short_help="Search once for lost jobs and forgotten files.")
def command() -> None:
    """Search once for lost jobs and for files that no job names (from cron, where no worker runs all day).

    That the message of a pending job is lost shows only at a later search, a minute or more after the first.
    """
    with contextlib.closing(configure(load_settings())) as runtime:
        print(*recover(runtime) or ["nothing to recover"], sep="\n")
