"""The operator's screens: `check` tries every connection, `status` shows what is going on.

Imported by those two commands only; no part of what handles jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pymongo
import redis
from pymongo.write_concern import WriteConcern
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from worker import (
    PROVIDER_KINDS,
    STATUS_CHANNEL,
    JobError,
    OpenAIProvider,
    ProviderSettings,
    Runtime,
    Settings,
    StoreUnavailable,
    queue_length,
    redact_url,
)

CHECK_TIMEOUT_S = 5
PLAIN_WIDTH = 140
TRUST_ADVICE = "name the authority: tlsCAFile=… in MONGODB_URL, ssl_ca_certs=… in REDIS_URL, SSL_CERT_FILE for others"
NOT_LISTED = "does not list it among its"


@dataclass(frozen=True)
class Finding:
    """A row of `check`: `advice` is empty where all is well."""

    what: str
    seen: str
    advice: str = ""
    is_fault: bool = False


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def probe(what: str, advice: str, look: Callable[[], str]) -> Finding:
    """Runs one look; whatever goes wrong becomes a row with advice, without URLs or keys."""
    try:
        with pymongo.timeout(CHECK_TIMEOUT_S):
            return Finding(what, look())
    except Exception as error:  # the edge of the command: any library's error is an answer here
        if fault := certificate_fault(error):
            return Finding(what, fault, TRUST_ADVICE, is_fault=True)
        if isinstance(error, JobError):
            return Finding(what, error.detail, advice, is_fault=True)
        return Finding(what, f"{type(error).__name__}{error_code(error)}", advice, is_fault=True)


def certificate_fault(error: BaseException | None) -> str:
    """Why a server's certificate was refused, which libraries bury under errors of their own; empty if it was not."""
    while error is not None:
        if found := re.search(r"certificate verify failed: ([\w ,'.:-]+)", str(error)):
            return f"the certificate isn't trusted: {found[1].strip()}"
        error = error.__cause__ or error.__context__
    return ""


def error_code(error: Exception) -> str:
    code = getattr(error, "code", None) or getattr(error, "strerror", None)
    return f" ({code})" if isinstance(code, (int, str)) else ""


def check_mongodb(runtime: Runtime) -> Iterator[Finding]:
    def version() -> str:
        runtime.database.command("ping")
        return f"reached, version {runtime.mongo.server_info()['version']}"

    def write() -> str:
        probes = runtime.database.get_collection("worker_check", write_concern=WriteConcern("majority", j=True))
        written = probes.insert_one({"at": datetime.now(UTC)}).inserted_id
        read = probes.find_one({"_id": written})
        probes.delete_one({"_id": written})
        return "written to the majority with journal, read, deleted" if read else "written, but not found again"

    def indexes() -> str:
        runtime.store.ensure_indexes()
        return "there"

    reached = probe("MongoDB", "is MONGODB_URL right, with user, password and authSource?", version)
    yield reached
    if reached.is_fault:
        return
    yield probe("MongoDB write", "the user needs readWrite on DATABASE_NAME", write)
    yield probe("MongoDB indexes", "the worker runs without them, more slowly: let the user create indexes", indexes)


def check_redis(settings: Settings) -> Iterator[Finding]:
    client = redis.Redis.from_url(settings.redis_url.get_secret_value(), socket_timeout=5, socket_connect_timeout=5)

    def publish() -> str:
        return f"reached; {client.publish(STATUS_CHANNEL, '{}')} listening on {STATUS_CHANNEL}"

    def broker() -> str:
        return f"reached; {queue_length(settings)} waiting in {settings.celery_queue_name}"

    yield probe("Redis", "is REDIS_URL right?", publish)
    yield probe("broker", "is CELERY_BROKER_URL (else REDIS_URL) right?", broker)
    for name, good, advice in (
        ("maxmemory-policy", "noeviction", "another policy lets Redis throw jobs away: set noeviction"),
        ("appendonly", "yes", "without it a restart of Redis loses the queue (the sweeper then takes minutes)"),
    ):
        finding = probe(f"Redis {name}", "could not be read: look at it yourself", partial(redis_setting, client, name))
        yield finding if finding.is_fault or finding.seen == good else replace(finding, advice=advice)


def redis_setting(client: redis.Redis, name: str) -> str:
    value: Any = client.config_get(name)
    return str(value.get(name, "unknown"))


def check_artifacts(runtime: Runtime) -> Iterator[Finding]:
    name, data = f"check-{secrets.token_hex(4)}.txt", b"stored by the worker's check"
    urls: list[str] = []

    def store() -> str:
        urls.append(runtime.artifacts.publish_file(name, data))
        return f"stored in {redact_url(runtime.settings.artifact_url)}"

    def fetch() -> str:
        with urllib.request.urlopen(urls[0], timeout=CHECK_TIMEOUT_S) as answer:
            is_the_file = answer.read(len(data) + 1) == data
        return f"{redact_url(urls[0])} answers with the file" if is_the_file else "another content"

    yield probe("artifact store", "is ARTIFACT_URL right, and may the worker write there?", store)
    if urls and urls[0].startswith("http"):
        finding = probe("artifact URL", "ARTIFACT_BASE_URL should be an address that serves the files", fetch)
        is_loopback = urllib.parse.urlsplit(urls[0]).hostname in ("localhost", "127.0.0.1", "::1")
        yield replace(finding, is_fault=finding.is_fault and not is_loopback)  # in a container that's another host
    elif urls and not urls[0].startswith("data:"):
        advice = "the API must serve this path (README.md has the route), or set ARTIFACT_BASE_URL"
        yield Finding("artifact URL", f"{runtime.settings.artifact_base_url}/…", advice)
    if urls:
        with contextlib.suppress(StoreUnavailable):
            runtime.artifacts.delete(name)


def check_providers(settings: Settings) -> Iterator[Finding]:
    for kind in PROVIDER_KINDS:
        where = settings.provider(kind)
        if where.is_offline:
            yield Finding(f"provider, {kind}", where.label, "no model: set OPENAI_API_KEY or OPENAI_BASE_URL")
        else:
            advice = f"is the URL right ({kind.upper()}_BASE_URL or OPENAI_BASE_URL), and the key?"
            finding = probe(f"provider, {kind}", advice, partial(models_seen, where, settings))
            yield replace(finding, advice=f"is {kind.upper()}_MODEL right?") if NOT_LISTED in finding.seen else finding


def models_seen(where: ProviderSettings, settings: Settings) -> str:
    return asyncio.run(list_models(where, settings))


async def list_models(where: ProviderSettings, settings: Settings) -> str:
    provider = OpenAIProvider(where, settings.max_answer_bytes)
    async with asyncio.timeout(CHECK_TIMEOUT_S), provider.session, provider.call("GET", "/models") as answer:
        offered = [model["id"] for model in (await answer.json())["data"]]
    known = "offers it" if where.model in offered else f"{NOT_LISTED} {len(offered)} models"
    return f"{where.label}: {known}"


def check(runtime: Runtime) -> int:
    """Prints a row per thing tried; 1 if one is wrong."""
    settings = runtime.settings
    looks = (check_mongodb(runtime), check_redis(settings), check_artifacts(runtime), check_providers(settings))
    findings = [finding for look in looks for finding in look]
    table = Table("", "what", "seen", "what to do")
    for finding in findings:
        mark = "[red]FAULT[/]" if finding.is_fault else "[yellow]note[/]" if finding.advice else "[green]ok[/]"
        table.add_row(mark, escape(finding.what), escape(finding.seen), escape(finding.advice))
    console().print(table)
    return int(any(finding.is_fault for finding in findings))


def status(runtime: Runtime) -> int:
    """Prints the 3 a.m. screen; 1 if MongoDB can't be reached."""
    try:
        seen = runtime.store.overview()
    except StoreUnavailable as error:
        print(f"MongoDB can't be reached ({error}); try `python worker.py check`", file=sys.stderr)
        return 1
    queue = runtime.settings.celery_queue_name
    table = Table("jobs", "")
    for name, count in seen["counts"].items():
        table.add_row(name, str(count))
    table.add_row("oldest pending", age_text(seen["oldest_pending"]))
    table.add_row("expired leases", f"{seen['expired_leases']} (a running worker takes them up within seconds)")
    table.add_row("notices not confirmed", str(seen["unnotified"]))
    table.add_row(f"waiting in {escape(queue)}", probe("queue", "", lambda: str(queue_length(runtime.settings))).seen)
    console().print(table)
    console().print(errors_table(seen["last_errors"]))
    return 0


def errors_table(jobs: list[dict[str, Any]]) -> Table:
    """The last jobs that failed; what a job's document says is data, never markup."""
    table = Table("when", "job", "type", "last errors")
    for job in jobs:
        what = (str(job.get("job_type"))[:30], str(job.get("error_message"))[:200])
        table.add_row(age_text(job.get("completed_at")), str(job["_id"]), *map(escape, what))
    return table


def age_text(at: datetime | None) -> str:
    if at is None:
        return "-"
    return f"{timedelta(seconds=int((datetime.now(UTC) - at.replace(tzinfo=UTC)).total_seconds()))} ago"
