"""`python worker.py metrics`: serves how jobs, queue and workers stand, in the format that Prometheus reads."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from datetime import timedelta

import click
from prometheus_client import CollectorRegistry, start_http_server

from worker import Runtime, configure
from worker_commands.durations import DURATION
from worker_commands.exporter import BrokerWatch, Exporter
from worker_commands.terminal import EXIT_FAILED, EXIT_INTERRUPTED, say
from workerkit.settings import load_settings

INTERVALS_SHOWN_AS_NEW = 1.25  # scrapes aren't exactly as far apart as they should be


def wait_for_the_end() -> int:
    """Waits for SIGTERM, which ends it with 0, or for Ctrl-C."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        ended.wait()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def metrics(runtime: Runtime, address: str, port: int, interval: timedelta) -> int:
    """Serves the metrics until a signal comes. Returns 1 if it can't listen there."""
    new_for_s = interval.total_seconds() * INTERVALS_SHOWN_AS_NEW
    exporter, registry = Exporter(runtime, BrokerWatch(runtime), new_for_s), CollectorRegistry()
    registry.register(exporter)
    try:
        server, _ = start_http_server(port, address, registry)
    except OSError as error:
        fault = f"Port {port} of {address} can't be used ({error.strerror or error})"
        say(f"{fault}: choose another by --port or --address.")
        return EXIT_FAILED
    exporter.start()
    say(f"metrics at http://{address}:{server.server_port}/metrics")
    try:
        return wait_for_the_end()
    finally:
        exporter.stop()
        server.shutdown()
        server.server_close()


@click.command("metrics", short_help="Serve metrics for Prometheus.")
@click.option("--port", type=click.IntRange(0, 65_535), default=9108, show_default=True, help="0: any free one")
@click.option("--address", default="0.0.0.0", show_default=True, help="address to listen on")
@click.option(
    "--interval",
    type=DURATION,
    default="1m",
    show_default=True,
    help="the longest time between two scrapes; a new series shows 0 for so long, so that its first increase is seen",
)
def command(port: int, address: str, interval: timedelta) -> None:
    """Serve metrics of the documents, the queue and the workers, in the format that Prometheus reads.

    One process is enough for all workers of a queue. It holds no prompt, no key and no user.
    """
    with contextlib.closing(configure(load_settings())) as runtime:
        sys.exit(metrics(runtime, address, port, interval))
