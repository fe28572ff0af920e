"""`python worker.py run`: the worker itself."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import click

from worker import NODE, app, configure
from worker_commands.models_in_use import ModelInUse, models_in_use
from worker_commands.terminal import printable
from workerkit import __version__
from workerkit.connections import COMPOSE_UP
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


def print_models(models: Iterable[ModelInUse]) -> None:
    """Prints the models that were chosen as lines for `.env`, and a warning about those that are gone or end soon."""
    for one in models:
        setting = f"{one.where.kind.upper()}_MODEL"
        if one.is_chosen:
            print(printable(f"  {setting}={one.where.model} was chosen, since it isn't set: put this line into .env"))
        if one.fault:
            print(printable(f"  WARNING: {one.where.kind}: {one.fault}."))


def print_remarks(settings: Settings) -> None:
    """Prints what may not be as the operator means it: a server in another's place, a misspelt variable."""
    for remark in remarks(settings):
        print(f"  WARNING: {remark}")
    for one in unresolved_servers(settings):
        start = f"start it ({COMPOSE_UP} {one.host}), then this worker again"
        print(f"  WARNING: {one.host} doesn't resolve here: {start}; or set {one.variable}")


def print_connections(settings: Settings) -> None:
    """Prints what the worker is connected to, without passwords."""
    models = models_in_use(settings)
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
    if proxies := ", ".join(proxies_in_use()):
        rows["proxies"] = proxies
    print(f"AI Backend Worker {__version__}", *(f"  {name:9} {value}" for name, value in rows.items()), sep="\n")
    print_remarks(settings)
    print_models(models)
    if any(settings.provider(kind).is_offline for kind in PROVIDER_KINDS):
        print("  WARNING: no provider is set for some kinds, so the OFFLINE STAND-IN answers, which is no model.")
    sys.stdout.flush()


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
    print_connections(settings)
    options = [f"--pool={settings.pool}", f"--concurrency={settings.worker_concurrency}", "--loglevel=INFO"]
    options += [f"--hostname=worker-{NODE.rsplit('-', 1)[-1]}@%h", "--without-gossip"]
    options += ["--without-mingle"]  # at its start it would wait a second for other workers
    sys.exit(start_celery(["--quiet", "worker", *options, *celery_arguments]))  # quiet: no second banner
