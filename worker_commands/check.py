"""`python worker.py check`: tries every connection, and gives advice where one fails."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
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
from worker_commands.models_in_use import ModelInUse, models_in_use
from worker_commands.redis_rights import check_rights
from worker_commands.terminal import print_rows
from workerkit.broker import is_refused, refusal
from workerkit.connections import COMPOSE_UP, place_of
from workerkit.errors import RetryJob, StoreRefused, StoreUnavailable
from workerkit.loopback import LOOPBACKS
from workerkit.media import inspect_picture
from workerkit.messages import Delivery
from workerkit.mongodb import unknown_when_unreachable
from workerkit.provider import OpenAIProvider
from workerkit.settings import (
    OPENAI_URL,
    PROVIDER_KINDS,
    ProviderKind,
    Settings,
    load_settings,
    misspelt_variables,
    redact_url,
)
from workerkit.sounds import inspect_sound
from workerkit.values import as_mapping

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


def rehearse_jobs(runtime: Runtime) -> str:
    """Makes the worker's own writes, on jobs that no message names. Raises StoreRefused: MongoDB takes one in part."""
    for end in (complete_job, fail_job, release_job):
        with sample_job(runtime) as job_id:
            job = runtime.store.claim(job_id, secrets.token_hex(8), Delivery(runtime.settings.limits()))
            is_done = isinstance(job, Job) and end(runtime, job)
            if not is_done or "attempt" not in as_mapping((runtime.store.read(job_id) or {}).get("worker")):
                raise StoreRefused("MongoDB takes the end of a job only without the worker's bookkeeping")
    return "a job claimed, completed, failed, released; deleted"


def reached_at(settings: Settings, url: str, more: str) -> str:
    """That a server was reached, and where; and the name in whose place it is used, since that doesn't resolve."""
    names = [name for name, place in settings.loopback.items() if place == place_of(url)]
    return f"{place_of(url)} reached{more}" + "".join(f" ({name} doesn't resolve here)" for name in names)


def check_mongodb(runtime: Runtime) -> Iterator[Finding]:
    url = runtime.settings.mongodb_url.get_secret_value()
    try_here = partial(probe, url=url, variable="MONGODB_URL")

    def version() -> str:
        runtime.database.command("ping")
        return reached_at(runtime.settings, url, f", version {runtime.mongo.server_info()['version']}")

    def write() -> str:
        probes = runtime.database["worker_check"]
        written = probes.insert_one({"at": datetime.now(UTC)}).inserted_id
        read = probes.find_one({"_id": written})
        probes.delete_one({"_id": written})
        return "written to the majority with journal, read, deleted" if read else "written, but not found again"

    def indexes() -> str:
        runtime.store.ensure_indexes()
        return "there"

    another = "is this another MongoDB than compose's? MONGODB_PORT publishes that elsewhere, MONGODB_URL names yours"
    advice = "is MONGODB_URL right, with user, password and authSource?"
    reached = try_here("MongoDB", another if "mongodb" in runtime.settings.loopback else advice, version)
    yield reached
    if reached.is_fault:
        return
    yield try_here("MongoDB write", "the user needs readWrite on DATABASE_NAME", write)
    advice = "the validator of the collection jobs must allow what the worker writes"
    yield try_here("MongoDB documents", advice, partial(rehearse_jobs, runtime))
    advice = "the worker runs without them, more slowly: let the user create indexes"
    yield try_here("MongoDB indexes", advice, indexes)


# What a setting of Redis should be, and what another value leads to.
REDIS_SETTINGS = {
    "maxmemory-policy": ("noeviction", "another policy lets Redis throw jobs away: set noeviction"),
    "appendonly": ("yes", "without it a restart of Redis loses the queue (the sweeper then takes minutes)"),
}


def unless_refused(look: Callable[[], str]) -> str:
    """A refusal shows that the server was reached; the rows about rights name what it refuses."""
    try:
        return look()
    except (redis.ResponseError, OperationalError) as error:
        cause = error.__cause__ if isinstance(error, OperationalError) else error
        if cause is None or not is_refused(cause):
            raise
        return f"reached, but {refusal(cause)}"


def setting_by_info(client: redis.Redis, name: str) -> str:
    if name == "maxmemory-policy":
        return str(client.info("memory")["maxmemory_policy"])
    return "yes" if client.info("persistence")["aof_enabled"] else "no"


def setting_by_config(client: redis.Redis, name: str) -> str:
    value: Any = client.config_get(name)
    return str(value[name])


def redis_setting(client: redis.Redis, name: str) -> str:
    """A setting of the server, which INFO has too. Many hosted servers refuse CONFIG, and the worker needs neither."""
    for look in (setting_by_info, setting_by_config):
        with contextlib.suppress(redis.ResponseError, KeyError):
            return look(client, name)
    return UNREADABLE


def check_redis_settings(client: redis.Redis, url: str) -> Iterator[Finding]:
    for name, (good, advice) in REDIS_SETTINGS.items():
        finding = probe(f"Redis {name}", "is REDIS_URL right?", partial(redis_setting, client, name), url)
        if finding.seen == UNREADABLE:
            yield replace(finding, advice=f"look on the server or in its console: it has to be {good}, since {advice}")
        else:
            yield finding if finding.is_fault or finding.seen == good else replace(finding, advice=advice)


def check_redis(runtime: Runtime) -> Iterator[Finding]:
    client, settings = runtime.redis, runtime.settings
    url = settings.redis_url.get_secret_value()
    own_broker_url = settings.celery_broker_url.get_secret_value()
    broker_url = own_broker_url or url
    try_broker = partial(probe, url=broker_url, variable="CELERY_BROKER_URL" if own_broker_url else "REDIS_URL")

    def publish() -> str:
        return reached_at(settings, url, f"; {client.publish(STATUS_CHANNEL, '{}')} listening on {STATUS_CHANNEL}")

    def broker() -> str:
        waiting = f"; {runtime.broker.queue_length()} waiting in {settings.celery_queue_name}"
        return reached_at(settings, broker_url, waiting)

    def rehearse() -> str:
        runtime.broker.rehearse()
        return "sufficient"

    reached = probe("Redis", "is REDIS_URL right?", partial(unless_refused, publish), url, "REDIS_URL")
    yield reached
    if reached.is_fault and broker_url == url:
        yield replace(reached, what="broker")
    else:
        yield try_broker("broker", "is CELERY_BROKER_URL (else REDIS_URL) right?", partial(unless_refused, broker))
    if settings.is_rabbitmq:
        yield try_broker("broker rights", "is CELERY_BROKER_URL right?", rehearse)
    yield from check_rights(runtime)
    if not reached.is_fault:
        yield from check_redis_settings(client, url)


SERVES_FILES = f"ARTIFACT_BASE_URL should be an address that serves the files (compose's: {COMPOSE_UP} artifacts)"


def check_artifacts(runtime: Runtime, mongodb: Finding) -> Iterator[Finding]:
    """Rows about the store of files. Where that is MongoDB, which can't be reached, it isn't tried again."""
    name, data = f"check-{secrets.token_hex(4)}.txt", b"stored by the worker's check"
    urls: list[str] = []

    def store() -> str:
        urls.append(runtime.artifacts.publish(name, data))
        return f"stored in {redact_url(runtime.settings.artifact_url)}"

    def fetch() -> str:
        with urllib.request.urlopen(urls[0], timeout=findings.CHECK_TIMEOUT_S) as answer:
            is_the_file = answer.read(len(data) + 1) == data
        return f"{redact_url(urls[0])} answers with the file" if is_the_file else "another content"

    settings = runtime.settings
    is_gridfs = settings.artifact_url == "gridfs"
    if is_gridfs and mongodb.is_fault:
        yield replace(mongodb, what="artifact store", seen=f"kept in MongoDB, {mongodb.seen}")
        return
    own_url = settings.s3_endpoint_url or settings.artifact_url
    store_url = settings.mongodb_url.get_secret_value() if is_gridfs else own_url
    variable = "S3_ENDPOINT_URL" if settings.s3_endpoint_url else "ARTIFACT_URL"
    advice = "is ARTIFACT_URL right, and may the worker write there?"
    yield probe("artifact store", advice, store, store_url, variable)
    if urls and urls[0].startswith("http"):
        finding = probe("artifact URL", SERVES_FILES, fetch, urls[0])
        is_loopback = urllib.parse.urlsplit(urls[0]).hostname in LOOPBACKS
        yield replace(finding, is_fault=finding.is_fault and not is_loopback)  # in a container that's another host
    elif urls and not urls[0].startswith("data:"):
        advice = "the API must serve this path (examples/ has the route), or set ARTIFACT_BASE_URL"
        yield Finding("artifact URL", f"{redact_url(runtime.settings.artifact_base_url)}/…", advice)
    if urls:
        with contextlib.suppress(StoreUnavailable):
            runtime.artifacts.delete(name)


# ── providers ────────────────────────────────────────────────────────────────────────────────────────────────────

CALL_S = 30.0
TINY_PROMPT, TINY_CAP = "Say OK.", 16
NOTHING_GENERATED = "nothing was generated; --generate makes one"


async def tiny_text(provider: OpenAIProvider, model: str, settings: Settings) -> str:
    request = {"model": model, "messages": [{"role": "user", "content": TINY_PROMPT}], "max_tokens": TINY_CAP}
    answer = await provider.text(request, lambda _: None)
    return f"{answer.tokens} tokens"


async def tiny_picture(provider: OpenAIProvider, model: str, settings: Settings) -> str:
    data, _ = await provider.image({"model": model, "prompt": "A red dot."})
    return f"a picture of {inspect_picture(data)[0]}"


async def tiny_sound(provider: OpenAIProvider, model: str, settings: Settings) -> str:
    ours = {"voice": settings.audio_voice, "response_format": settings.audio_format}
    data, _ = await provider.speech({"model": model, "input": "OK."}, ours)
    _, seconds, sound_format = inspect_sound(data)
    return f"{seconds} s of {sound_format}"


Tiny = Callable[[OpenAIProvider, str, Settings], Awaitable[str]]
TINY_CALLS: dict[ProviderKind, Tiny] = {"text": tiny_text, "image": tiny_picture, "audio": tiny_sound}


async def make_tiny_call(one: ModelInUse, settings: Settings) -> str:
    """What came of the call, and how long it took. Raises JobError: why there is no answer."""
    where, begun = one.where, time.monotonic()
    provider = OpenAIProvider(where, settings.max_answer_bytes)
    try:
        async with asyncio.timeout(CALL_S):
            model = (await provider.with_model(where)).model
            made = await TINY_CALLS[where.kind](provider, model, settings)
    except TimeoutError:
        raise RetryJob(f"no answer within {CALL_S:g} s: is its model still loading?") from None
    finally:
        await provider.close()
    return f"{model} at {where.place} answered with {made} in {time.monotonic() - begun:.1f} s"


def check_provider(one: ModelInUse, settings: Settings, *, is_called: bool) -> Finding:
    """One kind's model and, if it is to be called, a real answer of it."""
    where, what = one.where, f"provider, {one.where.kind}"
    kind = where.kind.upper()

    def call() -> str:
        if one.away and not is_called:
            raise one.away
        return asyncio.run(make_tiny_call(one, settings))

    if one.fault and not where.model:
        return Finding(what, f"{where.place}: {one.fault}", f"set {kind}_MODEL", is_fault=True)
    if not is_called and not one.away:
        return Finding(what, where.label, one.fault or NOTHING_GENERATED)
    advice = f"is the URL right ({kind}_BASE_URL or OPENAI_BASE_URL), and the key?"
    variable = f"{kind}_BASE_URL" if getattr(settings, f"{where.kind}_base_url") else "OPENAI_BASE_URL"
    finding = probe(what, advice, call, where.base_url or OPENAI_URL, variable)
    chosen = f"put {kind}_MODEL={where.model} into .env" if one.is_chosen else ""
    return finding if finding.is_fault else replace(finding, advice=one.fault or chosen)


def check_providers(settings: Settings, *, generate: bool) -> Iterator[Finding]:
    """One tiny text is always generated; a picture and a sound, which cost more, if asked for."""
    for kind in PROVIDER_KINDS:
        if (where := settings.provider(kind)).is_offline:
            yield Finding(f"provider, {kind}", where.label, "no model: set OPENAI_API_KEY or OPENAI_BASE_URL")
    for one in models_in_use(settings):
        yield check_provider(one, settings, is_called=generate or one.where.kind == "text")


# ── all of it ────────────────────────────────────────────────────────────────────────────────────────────────────


def find_all(runtime: Runtime, *, generate: bool) -> Iterator[Finding]:
    """Tries everything that the worker uses, one after the other."""
    for one in misspelt_variables():
        yield Finding("settings", one.seen, one.advice)
    reached, *others = check_mongodb(runtime)
    yield from (reached, *others)
    yield from check_redis(runtime)
    yield from check_artifacts(runtime, reached)
    yield from check_providers(runtime.settings, generate=generate)


def print_starts(found: Sequence[Finding]) -> None:
    """Prints the commands that start what isn't running, each on a line of its own, so that they can be pasted."""
    starts = dict.fromkeys(finding.start for finding in found if finding.start)
    services = [start.removeprefix(COMPOSE_UP) for start in starts if start.startswith(COMPOSE_UP)]
    commands = [COMPOSE_UP + "".join(services)] if services else []
    commands += [start for start in starts if not start.startswith(COMPOSE_UP)]
    if commands:
        print("Start what isn't running, and check again:", *(f"  {one}" for one in commands), sep="\n")


def check(runtime: Runtime, *, generate: bool = False) -> int:
    """Prints a row for each thing tried; returns 1 if one is wrong."""
    findings = list(find_all(runtime, generate=generate))
    marks = ["FAULT" if finding.is_fault else "note" if finding.advice else "ok" for finding in findings]
    rows = [(mark, one.what, one.seen, one.advice) for mark, one in zip(marks, findings, strict=True)]
    print_rows(("", "what", "seen", "what to do"), rows, {"FAULT": "red", "note": "yellow", "ok": "green"})
    print_starts(findings)
    return int(any(finding.is_fault for finding in findings))


@click.command("check", short_help="Try every connection and say what to do.")
@click.option("--generate", is_flag=True, help="Make a picture and a sound as well, which cost more than a text.")
def command(generate: bool) -> None:
    """Try every connection, make one tiny text, and say what to do; exits with 1 if something is wrong."""
    with contextlib.closing(configure(load_settings())) as runtime:
        sys.exit(check(runtime, generate=generate))
