"""`python -m examples.api`: the example with all that it needs in one process, or (`--servers`) with real servers."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import click
import pymongo
import redis
import uvicorn
from celery import Celery
from dotenv import dotenv_values
from fastapi import FastAPI
from pymongo.errors import PyMongoError

from examples.api.app import create_app

PATIENCE_S = 5
QUEUE = "ai_jobs"
MONGODB_URL = "mongodb://ai_backend_user:ai_backend_password@mongodb:27017/ai_backend?authSource=ai_backend"


def plain_celery(broker_url: str) -> Celery:
    """A client that knows no task. It gives up within seconds where the broker doesn't answer."""
    celery = Celery("example_api", broker=broker_url, set_as_current=False)
    celery.conf.update(
        task_serializer="json",
        broker_connection_timeout=PATIENCE_S,
        broker_transport_options={"socket_connect_timeout": PATIENCE_S, "socket_timeout": PATIENCE_S},
    )
    return celery


@contextmanager
def reaching(server: str, variable: str) -> Iterator[None]:
    """Ends the program with one sentence if a server can't be reached or used. The URL's password isn't in it."""
    try:
        yield
    except (PyMongoError, redis.RedisError, OSError, ValueError) as error:
        advice = f"Is it running, and is {variable} right? `python worker.py check` shows more."
        raise click.ClickException(f"{server} can't be reached ({type(error).__name__}). {advice}") from None


def with_servers(environment: Mapping[str, str | None]) -> FastAPI:
    """The app on the servers that these variables name, with the contract's defaults."""
    redis_url = environment.get("REDIS_URL") or "redis://redis:6379/0"
    with reaching("MongoDB", "MONGODB_URL"):
        mongo: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(
            environment.get("MONGODB_URL") or MONGODB_URL, timeoutMS=PATIENCE_S * 1000
        )
        mongo.admin.command("ping")
    with reaching("Redis", "REDIS_URL"), redis.Redis.from_url(redis_url, socket_connect_timeout=PATIENCE_S) as client:
        client.ping()
    celery = plain_celery(environment.get("CELERY_BROKER_URL") or redis_url)
    database = mongo[environment.get("DATABASE_NAME") or "ai_backend"]
    return create_app(database, redis_url, celery, environment.get("CELERY_QUEUE_NAME") or QUEUE)


@contextmanager
def all_in_one() -> Iterator[FastAPI]:
    """The app with a worker and stand-ins for MongoDB and Redis, as the demo has them. Only this needs the worker."""
    from worker_commands.demo import embedded_redis, embedded_runtime, embedded_worker
    from workerkit.settings import PROVIDER_KINDS

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
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        advice = "Choose another one by --host and --port."
        raise click.ClickException(f"{host} port {port} can't be used ({error}). {advice}") from None


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    host, port = listener.getsockname()[:2]
    print(f"\nOpen http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C ends it)", flush=True)
    Server(uvicorn.Config(app, log_level="warning")).run([listener])


@click.command(context_settings={"max_content_width": 110})
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, help="Port to listen on; 0 takes any free one.")
@click.option("--servers", is_flag=True, help="Use the servers that the environment or .env names.")
def main(host: str, port: int, servers: bool) -> None:
    """Run the example: an API and a page that sends jobs to the worker and follows them.

    Without --servers all is in this process: a worker, and stand-ins for MongoDB and Redis. No server of yours is
    touched, whatever the environment says. A stand-in generates, unless OPENAI_API_KEY, OPENAI_BASE_URL or the like
    is set. Jobs are gone when the process ends.

    With --servers the worker runs elsewhere (`python worker.py`). MONGODB_URL, DATABASE_NAME, REDIS_URL,
    CELERY_BROKER_URL and CELERY_QUEUE_NAME have the same meaning and defaults as for the worker.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises it once more when it has ended
        signal.signal(number, lambda *_: sys.exit(0))
    with ExitStack() as stack:
        listener = stack.enter_context(listen(host, port))
        if servers:
            app = with_servers({**dotenv_values(".env"), **os.environ})
        else:
            for name in {"MONGODB_URL", "REDIS_URL"} & os.environ.keys():
                print(f"{name} is set, but not used without --servers.", file=sys.stderr)
            app = stack.enter_context(all_in_one())
        serve(app, listener)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    main()
