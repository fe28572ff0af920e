"""A module for `HANDLER_MODULES`: it runs inside a measured worker, and writes down which thread is the keeper.

A measurement then reads that thread's CPU time from /proc.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Final

from celery import signals

KEEPER_FILE: Final = "BENCH_KEEPER_FILE"


def write_keeper(**_: object) -> None:
    """Write the process id and the thread id, as the system counts threads, into the file."""
    keepers = [thread.native_id for thread in threading.enumerate() if thread.name == "keeper"]
    if keepers:
        file = Path(os.environ[KEEPER_FILE])
        unfinished = file.with_suffix(".new")
        unfinished.write_text(f"{os.getpid()} {keepers[0]}\n")
        unfinished.replace(file)  # so that nobody reads half of it


def connect(**_: object) -> None:
    """Connect the receivers once the worker has connected its own, which start the keeper and so must run first."""
    signals.worker_process_init.connect(write_keeper)
    signals.worker_ready.connect(write_keeper)


if KEEPER_FILE in os.environ:
    signals.celeryd_after_setup.connect(connect)
