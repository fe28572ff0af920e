"""`python worker.py run`: the worker itself."""

from __future__ import annotations

import importlib
import os
import sys
import warnings as python_warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import click

from worker import NODE, app, configure
from worker_commands.models_in_use import ModelInUse, models_in_use
from worker_commands.terminal import printable
from workerkit import __version__
from workerkit.connections import COMPOSE_UP
from workerkit.logs import json_line
from workerkit.proxies import USUAL_PORTS, ProxyFault, proxy_of
from workerkit.settings import PROVIDER_KINDS, Settings, load_settings, redact_url, remarks, unresolved_servers


def proxies_in_use() -> Iterator[str]:
    """The proxy for each scheme, without user and password, or why the worker can't use it."""
    for scheme in USUAL_PORTS:
        try:
            if proxy := proxy_of(scheme):
                yield f"{redact_url(proxy)} ({scheme})"
        except ProxyFault as fault:
            yield f"none for {scheme}: {fault}"


def connections(settings: Settings, models: Iterable[ModelInUse]) -> dict[str, str]:
    """What the worker is connected to, without passwords."""
    rows: dict[str, str] = {
        "MongoDB": f"{redact_url(settings.mongodb_url.get_secret_value())}, database {settings.database_name}",
        "Redis": redact_url(settings.redis_url.get_secret_value()),
        "queue": f"{settings.celery_queue_name} at {redact_url(settings.broker_url)}",
        "pool": f"{settings.pool}, {settings.worker_concurrency} at a time",
        "limits": f"{settings.celery_soft_time_limit:g} s, killed after {settings.celery_time_limit:g} s",
        "artifacts": f"{redact_url(settings.artifact_url)}, served at {redact_url(settings.artifact_base_url)}",
        **{kind: settings.provider(kind).label for kind in PROVIDER_KINDS},
        **{one.where.kind: printable(one.where.label) for one in models},
    }
    proxies = ", ".join(proxies_in_use())
    return {**rows, "proxies": proxies} if proxies else rows


def notes(models: Iterable[ModelInUse]) -> Iterator[str]:
    """The models that were chosen, as lines for `.env`."""
    for one in models:
        if one.is_chosen:
            setting = f"{one.where.kind.upper()}_MODEL={one.where.model}"
            yield printable(f"{setting} was chosen, since it isn't set: put this line into .env")


def warnings(settings: Settings, models: Iterable[ModelInUse]) -> Iterator[str]:
    """What may not be as the operator means it: a misspelt variable, a server in another's place, a model that ends."""
    yield from remarks(settings)
    for server in unresolved_servers(settings):
        start = f"start it ({COMPOSE_UP} {server.host}), then this worker again"
        yield f"{server.host} doesn't resolve here: {start}; or set {server.variable}"
    yield from (printable(f"{one.where.kind}: {one.fault}.") for one in models if one.fault)
    if any(settings.provider(kind).is_offline for kind in PROVIDER_KINDS):
        yield "no provider is set for some kinds, so the OFFLINE STAND-IN answers, which is no model."


def print_start(settings: Settings) -> None:
    """Prints what the worker is connected to, and what the operator should know, in the format of the log."""
    models = models_in_use(settings)
    name, rows = f"AI Backend Worker {__version__}", connections(settings, models)
    if settings.log_format == "json":
        print(json_line("INFO", name, {"event": "start", **rows}))
        for level, lines in (("INFO", notes(models)), ("WARNING", warnings(settings, models))):
            print(*(json_line(level, line) + "\n" for line in lines), sep="", end="")
    else:
        print(name, *(f"  {what:9} {value}" for what, value in rows.items()), sep="\n")
        for line in (*notes(models), *(f"WARNING: {warning}" for warning in warnings(settings, models))):
            print(f"  {line}")
    sys.stdout.flush()


def speak_json() -> None:
    """Lets this process write as JSON what Celery and Python write without the log: on signals, and before it is there.

    Celery has no setting for that, so its function is replaced, in the process of the worker alone.
    """

    def say_json(message: str, file: Any = sys.__stderr__) -> None:
        os.write(file.fileno(), f"{json_line('INFO', message.strip())}\n".encode())  # a signal may interrupt a print

    def warn_json(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        print(json_line("WARNING", " ".join(f"{category.__name__}: {message}".split())), flush=True)

    celery_worker: Any = importlib.import_module("celery.apps.worker")
    celery_worker.safe_say = say_json
    python_warnings.showwarning = warn_json


def start_celery(arguments: list[str]) -> int:
    """Runs Celery's own command line. Unlike `app.worker_main` it returns the exit code, 1 if the worker broke down."""
    celery_command: Any = importlib.import_module("celery.bin.celery").celery
    celery_command.params[0].default = app
    return int(celery_command.main(args=arguments, standalone_mode=False) or 0)


@click.command("run", context_settings={"ignore_unknown_options": True})
@click.argument("celery_arguments", nargs=-1, type=click.UNPROCESSED)
def command(celery_arguments: Sequence[str] = ()) -> None:
    """Run the worker (the default). CELERY_ARGUMENTS are passed to `celery worker`."""
    settings = configure(load_settings()).settings
    print_start(settings)
    if settings.log_format == "json":
        speak_json()
    options = [f"--pool={settings.pool}", f"--concurrency={settings.worker_concurrency}", "--loglevel=INFO"]
    options += [f"--hostname=worker-{NODE.rsplit('-', 1)[-1]}@%h", "--without-gossip"]
    options += ["--without-mingle"]  # at its start it would wait a second for other workers
    sys.exit(start_celery(["--quiet", "worker", *options, *celery_arguments]))  # quiet: no second banner
