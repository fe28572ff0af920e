"""`python worker.py check`: tries every connection, and gives advice where one fails."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import click
import redis
from bson import ObjectId
from kombu.exceptions import OperationalError

from worker import STATUS_CHANNEL, Job, Runtime, Status, configure
from worker_commands import findings
from worker_commands.findings import Finding, probe
from worker_commands.redis_rights import check_rights
from worker_commands.terminal import print_rows
from workerkit.broker import is_refused, refusal
from workerkit.errors import StoreRefused, StoreUnavailable
from workerkit.messages import Delivery
from workerkit.mongodb import unknown_when_unreachable
from workerkit.provider import OpenAIProvider
from workerkit.settings import PROVIDER_KINDS, ProviderSettings, Settings, load_settings, redact_url
from workerkit.values import as_mapping

NOT_LISTED = "does not list it among its"
UNREADABLE = "can't be read: Redis refuses INFO and CONFIG, which the worker doesn't need"


@contextlib.contextmanager
def sample_job(runtime: Runtime) -> Iterator[ObjectId]:
    """A job as the contract has it, which no message names. It is deleted at the end."""
    now: Any = datetime.now(UTC)
    nothing = ("output_data", "artifact_url", "error_message", "started_at", "completed_at")
    document: dict[str, Any] = {
        "user_id": "worker-check",
        "session_id": None,
        "job_type": "text_generation",
        "status": Status.PENDING,
    }
    document |= {"input_data": {"prompt": "check"}, **dict.fromkeys(nothing), "created_at": now, "updated_at": now}
    jobs = runtime.database["jobs"]
    with unknown_when_unreachable():
        job_id: ObjectId = jobs.insert_one(document).inserted_id
    try:
        yield job_id
    finally:
        jobs.delete_one({"_id": job_id})


def complete_job(runtime: Runtime, job: Job) -> bool:
    output = {"generated_text": "check", "model_used": "check", "tokens_used": 1}
    return runtime.store.complete(job, output, None)


def fail_job(runtime: Runtime, job: Job) -> bool:
    return runtime.store.fail(job, "This was a check.")


def release_job(runtime: Runtime, job: Job) -> bool:
    return runtime.store.release(job, runtime.store.now(), counted=True)


def check_mongodb(runtime: Runtime) -> Iterator[Finding]:
    def version() -> str:
        runtime.database.command("ping")
        return f"reached, version {runtime.mongo.server_info()['version']}"

    def write() -> str:
        probes = runtime.database["worker_check"]
        written = probes.insert_one({"at": datetime.now(UTC)}).inserted_id
        read = probes.find_one({"_id": written})
        probes.delete_one({"_id": written})
        return "written to the majority with journal, read, deleted" if read else "written, but not found again"

    def indexes() -> str:
        runtime.store.ensure_indexes()
        return "there"

    def rehearse() -> str:
        for end in (complete_job, fail_job, release_job):
            with sample_job(runtime) as job_id:
                job = runtime.store.claim(job_id, secrets.token_hex(8), Delivery(runtime.settings.limits()))
                is_done = isinstance(job, Job) and end(runtime, job)
                if not is_done or "attempt" not in as_mapping((runtime.store.read(job_id) or {}).get("worker")):
                    raise StoreRefused("MongoDB takes the end of a job only without the worker's bookkeeping")
        return "a job claimed, completed, failed, released; deleted"

    reached = probe("MongoDB", "is MONGODB_URL right, with user, password and authSource?", version)
    yield reached
    if reached.is_fault:
        return
    yield probe("MongoDB write", "the user needs readWrite on DATABASE_NAME", write)
    yield probe("MongoDB documents", "the validator of the collection jobs must allow what the worker writes", rehearse)
    yield probe("MongoDB indexes", "the worker runs without them, more slowly: let the user create indexes", indexes)


# What a setting of Redis should be, and what another value leads to.
REDIS_SETTINGS = {
    "maxmemory-policy": ("noeviction", "another policy lets Redis throw jobs away: set noeviction"),
    "appendonly": ("yes", "without it a restart of Redis loses the queue (the sweeper then takes minutes)"),
}


def check_redis(runtime: Runtime) -> Iterator[Finding]:
    client = runtime.redis

    def publish() -> str:
        return f"reached; {client.publish(STATUS_CHANNEL, '{}')} listening on {STATUS_CHANNEL}"

    def broker() -> str:
        return f"reached; {runtime.broker.queue_length()} waiting in {runtime.settings.celery_queue_name}"

    def rehearse() -> str:
        runtime.broker.rehearse()
        return "sufficient"

    yield probe("Redis", "is REDIS_URL right?", partial(unless_refused, publish))
    yield probe("broker", "is CELERY_BROKER_URL (else REDIS_URL) right?", partial(unless_refused, broker))
    if runtime.settings.is_rabbitmq:
        yield probe("broker rights", "is CELERY_BROKER_URL right?", rehearse)
    yield from check_rights(runtime)
    for name, (good, advice) in REDIS_SETTINGS.items():
        finding = probe(f"Redis {name}", "is REDIS_URL right?", partial(redis_setting, client, name))
        if finding.seen == UNREADABLE:
            yield replace(finding, advice=f"look on the server or in its console: it has to be {good}, since {advice}")
        else:
            yield finding if finding.is_fault or finding.seen == good else replace(finding, advice=advice)


def unless_refused(look: Callable[[], str]) -> str:
    """A refusal shows that the server was reached; the rows about rights name what it refuses."""
    try:
        return look()
    except (redis.ResponseError, OperationalError) as error:
        cause = error.__cause__ if isinstance(error, OperationalError) else error
        if cause is None or not is_refused(cause):
            raise
        return f"reached, but {refusal(cause)}"


def redis_setting(client: redis.Redis, name: str) -> str:
    """A setting of the server, which INFO has too. Many hosted servers refuse CONFIG, and the worker needs neither."""
    for look in (setting_by_info, setting_by_config):
        with contextlib.suppress(redis.ResponseError, KeyError):
            return look(client, name)
    return UNREADABLE


def setting_by_info(client: redis.Redis, name: str) -> str:
    if name == "maxmemory-policy":
        return str(client.info("memory")["maxmemory_policy"])
    return "yes" if client.info("persistence")["aof_enabled"] else "no"


def setting_by_config(client: redis.Redis, name: str) -> str:
    value: Any = client.config_get(name)
    return str(value[name])


def check_artifacts(runtime: Runtime) -> Iterator[Finding]:
    name, data = f"check-{secrets.token_hex(4)}.txt", b"stored by the worker's check"
    urls: list[str] = []

    def store() -> str:
        urls.append(runtime.artifacts.publish(name, data))
        return f"stored in {redact_url(runtime.settings.artifact_url)}"

    def fetch() -> str:
        with urllib.request.urlopen(urls[0], timeout=findings.CHECK_TIMEOUT_S) as answer:
            is_the_file = answer.read(len(data) + 1) == data
        return f"{redact_url(urls[0])} answers with the file" if is_the_file else "another content"

    yield probe("artifact store", "is ARTIFACT_URL right, and may the worker write there?", store)
    if urls and urls[0].startswith("http"):
        finding = probe("artifact URL", "ARTIFACT_BASE_URL should be an address that serves the files", fetch)
        is_loopback = urllib.parse.urlsplit(urls[0]).hostname in ("localhost", "127.0.0.1", "::1")
        yield replace(finding, is_fault=finding.is_fault and not is_loopback)  # in a container that's another host
    elif urls and not urls[0].startswith("data:"):
        advice = "the API must serve this path (examples/ has the route), or set ARTIFACT_BASE_URL"
        yield Finding("artifact URL", f"{redact_url(runtime.settings.artifact_base_url)}/…", advice)
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
    async with asyncio.timeout(findings.CHECK_TIMEOUT_S), provider.session, provider.call("GET", "/models") as answer:
        offered = [model["id"] for model in (await answer.json())["data"]]
    known = "offers it" if where.model in offered else f"{NOT_LISTED} {len(offered)} models"
    return f"{where.label}: {known}"


def find_all(runtime: Runtime) -> Iterator[Finding]:
    """Tries everything that the worker uses, one after the other."""
    yield from check_mongodb(runtime)
    yield from check_redis(runtime)
    yield from check_artifacts(runtime)
    yield from check_providers(runtime.settings)


def check(runtime: Runtime) -> int:
    """Prints a row for each thing tried; returns 1 if one is wrong."""
    findings = list(find_all(runtime))
    marks = ["FAULT" if finding.is_fault else "note" if finding.advice else "ok" for finding in findings]
    rows = [(mark, one.what, one.seen, one.advice) for mark, one in zip(marks, findings, strict=True)]
    print_rows(("", "what", "seen", "what to do"), rows, {"FAULT": "red", "note": "yellow", "ok": "green"})
    return int(any(finding.is_fault for finding in findings))


@click.command("check", short_help="Try every connection and say what to do.")
def command() -> None:
    """Try every connection and say what to do; exits with 1 if something is wrong."""
    with contextlib.closing(configure(load_settings())) as runtime:
        sys.exit(check(runtime))
