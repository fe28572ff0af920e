"""`python -m examples.api`: the example in one process with all that it needs, or (`--servers`) on real servers.

Only this file imports code of the worker: its settings, and what its demo has in the place of servers.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import click
import pymongo
import redis
import uvicorn
from celery import Celery
from fastapi import FastAPI
from pymongo.errors import PyMongoError

from examples.api.app import create_app
from worker_commands.api_side import SERVER_PATIENCE_S, Unreachable, reaching
from worker_commands.demo import embedded_redis, embedded_runtime, embedded_worker
from workerkit.settings import PROVIDER_KINDS, load_settings, remarks


def plain_celery(broker_url: str, **options: object) -> Celery:
    """A client that knows no task. It gives up within seconds where the broker doesn't answer."""
    celery = Celery("example_api", broker=broker_url, set_as_current=False)
    limits = {"socket_connect_timeout": SERVER_PATIENCE_S, "socket_timeout": SERVER_PATIENCE_S}
    celery.conf.update(broker_connection_timeout=SERVER_PATIENCE_S, broker_transport_options={**limits, **options})
    return celery


def with_servers() -> FastAPI:
    """The app on the servers of the worker's own settings. Raises Unreachable."""
    settings = load_settings()
    for remark in remarks(settings):
        print(remark, file=sys.stderr)
    mongodb_url, redis_url = settings.mongodb_url.get_secret_value(), settings.redis_url.get_secret_value()
    with reaching("MongoDB", "MONGODB_URL", PyMongoError):
        mongo = pymongo.MongoClient[dict[str, Any]](mongodb_url, timeoutMS=SERVER_PATIENCE_S * 1000)
        mongo.admin.command("ping")
    with reaching("Redis", "REDIS_URL", redis.RedisError):
        redis.Redis.from_url(redis_url, socket_connect_timeout=SERVER_PATIENCE_S).ping()
    sentinel = {"master_name": settings.sentinel_master} if settings.sentinel_master else {}
    celery = plain_celery(settings.broker_url, **sentinel)
    return create_app(mongo[settings.database_name], redis_url, celery, settings.celery_queue_name)


@contextmanager
def in_one_process() -> Iterator[FastAPI]:
    """The app with a worker, and with stand-ins for MongoDB and Redis. Raises Unreachable."""
    for name in sorted({"MONGODB_URL", "REDIS_URL"} & os.environ.keys()):
        print(f"{name} is set, but not used without --servers.", file=sys.stderr)
    with embedded_redis() as redis_url:
        runtime = embedded_runtime(redis_url)
        for kind in PROVIDER_KINDS:
            print(f"  {kind:5}  by {runtime.settings.provider(kind).label}")
        with embedded_worker():
            yield create_app(runtime.database, redis_url, plain_celery(redis_url), runtime.settings.celery_queue_name)


class Server(uvicorn.Server):
    """Ends the pages' streams of events first. Otherwise a shutdown would wait until every page is closed."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        app: Any = self.config.app
        app.state.live.end()
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0].rstrip(".")
        raise click.ClickException(f"can't listen on {host}, port {port}: {reason}. See --host and --port.") from None


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    host, port = listener.getsockname()[:2]
    reachable = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
    print(f"\nOpen http://{reachable}:{port}  (Ctrl-C ends it)", flush=True)
    Server(uvicorn.Config(app, log_level="warning")).run([listener])


@click.command(context_settings={"max_content_width": 110})
@click.option("--servers", is_flag=True, help="Use the servers that the environment or .env names.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, help="Port to listen on; 0 takes any free one.")
def main(servers: bool, host: str, port: int) -> None:
    """Run the example: an API and a page that sends jobs to the worker and shows what becomes of them.

    Without --servers all is in this process: a worker, and stand-ins for MongoDB and Redis. No server of yours is
    touched, whatever MONGODB_URL and REDIS_URL say. With OPENAI_API_KEY or OPENAI_BASE_URL a real model generates.
    Jobs are gone when the process ends.

    With --servers the worker runs elsewhere (`python worker.py`). MONGODB_URL, DATABASE_NAME, REDIS_URL,
    CELERY_BROKER_URL and CELERY_QUEUE_NAME mean what they mean for the worker.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises it once more when it has ended
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        with ExitStack() as stack:
            listener = stack.enter_context(listen(host, port))
            serve(with_servers() if servers else stack.enter_context(in_one_process()), listener)
    except Unreachable as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    main()
