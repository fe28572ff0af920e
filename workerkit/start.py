"""What a command does before the imports that take most of a second."""

from __future__ import annotations

import os
import signal
import sys

SERVES: tuple[list[str], ...] = ([], ["run"], ["metrics"])  # what is started to run until it is stopped


def end_on_sigterm() -> None:
    """Lets SIGTERM end the process at once, until Celery has installed its own handler.

    Process 1 of a container ignores a signal for which it has no handler. Until Celery has one no job is taken, so
    nothing has to be handed back, and the exit code is that of a worker that ended in order. So is that of `metrics`,
    which holds nothing. Other commands end with the code of a process that SIGTERM has killed.
    """
    exit_code = 0 if sys.argv[1:2] in SERVES else 128 + signal.SIGTERM
    signal.signal(signal.SIGTERM, lambda *_: os._exit(exit_code))
