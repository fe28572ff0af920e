"""AI Backend Worker: takes generation jobs from a Celery queue and makes each one end, exactly once.

A message names a job document in MongoDB. The worker claims the document (a lease with a fencing token),
generates text, a picture or sound through an OpenAI-compatible server, and ends the attempt with one fenced write.
Whatever dies on the way, the lease runs out and a sweeper hands the job to the next worker.

    message -> claim -> handler -> Result -> settle: artifact, then complete | fail | release -> notify -> ack

The sections, in the order in which they depend on each other:

    vocabulary, settings, Celery app, job store, notifier, artifacts, provider, handlers, recovery, task, command line
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import math
import mimetypes
import mmap
import os
import random
import re
import secrets
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum, StrEnum
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, TypeVar, cast

import click
import gridfs
import pymongo
import redis
from amqp.exceptions import NotFound
from bson import ObjectId, json_util
from bson.errors import BSONError
from celery import Celery, Task, signals, states
from celery.backends.redis import RedisBackend
from celery.exceptions import Ignore, InvalidTaskError, Reject
from celery.worker import state as worker_state
from celery.worker.consumer import Consumer
from celery.worker.request import Request
from kombu import Exchange, Queue
from kombu.exceptions import OperationalError
from kombu.transport.pyamqp import Transport as RabbitTransport
from kombu.transport.redis import Channel as RedisChannel
from kombu.transport.redis import QoS as KombuQoS
from kombu.transport.virtual import QoS as VirtualQoS
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from pymongo.errors import DocumentTooLarge, OperationFailure, PyMongoError
from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import ReadPreference
from pymongo.write_concern import WriteConcern
from redis.backoff import NoBackoff
from redis.retry import Retry

if TYPE_CHECKING:
    import aiohttp
    import yarl
    from fsspec import AbstractFileSystem
    from pymongo.collection import Collection
    from pymongo.database import Database

__version__ = "1.0.0"

logger = logging.getLogger("worker")

# ── vocabulary ───────────────────────────────────────────────────────────────────────────────────────────────────

Document = dict[str, Any]


class Status(StrEnum):
    """The four statuses of a job document (contract, section 2); a fifth would break the API."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"


ACTIVE_STATUSES = frozenset({Status.PENDING, Status.PROCESSING})
TERMINAL_STATUSES = frozenset({Status.COMPLETED, Status.FAILED})


@dataclass(frozen=True)
class Limits:
    """How long an attempt may take: our own deadline (soft) and Celery's kill (hard), in seconds."""

    soft_s: float
    hard_s: float


@dataclass(frozen=True)
class Job:
    """One claimed job, as its document says: the message is only a hint."""

    id: ObjectId
    job_type: str
    user_id: str
    session_id: str | None
    input_data: Any
    owner: str
    attempt: int
    limits: Limits
    first_started_at: datetime
    leased_at: float = field(default_factory=lambda: time.monotonic(), compare=False)

    def __str__(self) -> str:
        return f"job={self.id} attempt={self.attempt} type={self.job_type!r}"


@dataclass(frozen=True)
class Media:
    """A generated file: its bytes, and the field of `output_data` that takes its URL."""

    data: bytes = field(repr=False)
    suffix: str
    url_field: str


@dataclass(frozen=True)
class Result:
    """What a handler made: the fields of `output_data`, and the file where there is one."""

    output: Document
    media: Media | None = None


class JobError(Exception):
    """Why an attempt ended without a result; the subclass says what happens next.

    `sentence` is for the person who waits, `detail` for the log. Neither holds a key or a prompt.
    """

    default_sentence = "Something went wrong while generating. Please try again."

    def __init__(self, detail: str = "", sentence: str = "") -> None:
        self.sentence = sentence or self.default_sentence
        self.detail = detail or self.sentence
        super().__init__(self.detail)


class RetryJob(JobError):
    """Try again after a wait: the provider is busy, away, or broke off."""

    default_sentence = "The provider is busy"

    def __init__(
        self, detail: str = "", sentence: str = "", after_s: float | None = None, *, is_counted: bool = True
    ) -> None:
        super().__init__(detail, sentence)
        self.after_s, self.is_counted = after_s, is_counted


class ProviderAway(RetryJob):
    """Try again later, and let other jobs wait meanwhile: nobody can reach the provider."""

    default_sentence = "The provider can't be reached"


class FailJob(JobError):
    """Trying again would not help, or the tries are used up: the job has failed."""


class FieldRefused(FailJob):
    """The provider refuses a field of the request, which `field` names."""

    def __init__(self, detail: str, sentence: str, field: str) -> None:
        super().__init__(detail, sentence)
        self.field = field


class HandBack(JobError):
    """This worker is shutting down: another one takes the job, and the attempt doesn't count."""

    default_sentence = "The worker is restarting; your job goes on in a moment."


class DropJob(JobError):
    """The job is no longer ours (cancelled, or taken by another worker): write nothing, tell nobody."""


class LeaveJob(DropJob):
    """Nobody knows whether the last write happened: touch nothing, the lease runs out."""


class StoreUnavailable(Exception):
    """MongoDB or the artifact store can't be reached, or the outcome of a write is unknown: wait, then look again."""


class SpoolUnavailable(StoreUnavailable):
    """Redis can't say whether a result was kept there."""


class JobFailed(Exception):
    """Ends the Celery task in FAILURE; its text is the sentence that the person reads."""


class Clock:
    """The database's time, so that the clocks of hosts don't matter: its last answer plus a monotonic interval."""

    def __init__(self) -> None:
        self.synchronise(datetime.now(UTC))
        self.is_synchronised = False

    def synchronise(self, server_time: datetime) -> None:
        self._pair = (server_time, time.monotonic())
        self.is_synchronised = True

    def now(self) -> datetime:
        """Aware UTC, in whole milliseconds as BSON keeps them."""
        server_time, at = self._pair
        now = server_time + timedelta(seconds=time.monotonic() - at)
        return now.replace(microsecond=now.microsecond // 1000 * 1000)


LOG_EVERY_S = 60.0


class SeldomLog:
    """One line a minute for a fault that goes on, and one when it is over."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._next_at = 0.0

    def fault(self, detail: object) -> None:
        if time.monotonic() >= self._next_at:
            logger.warning("%s: %s (said once a minute while it lasts)", self._what, detail)
            self._next_at = time.monotonic() + LOG_EVERY_S

    def fine(self) -> None:
        if self._next_at:
            logger.info("%s: over", self._what)
            self._next_at = 0.0


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────

ProviderKind = Literal["text", "image", "audio"]
PROVIDER_KINDS: tuple[ProviderKind, ...] = ("text", "image", "audio")
EXIT_BAD_SETTINGS = 2
LONGEST_S = 86_400
IMAGE_SIZE = r"[1-9]\d{1,3}x[1-9]\d{1,3}"


def is_duration(value: object) -> bool:
    """Up to a day: an endless one, or a number that no clock can hold, is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= LONGEST_S


def redact_url(url: str) -> str:
    """The URL without user, password and query. Greedy, so that a password with an unescaped `@` is gone too."""
    scheme = "".join(re.findall(r"^[\w+.-]*://", url))
    return scheme + re.sub(r"(?s)^.*@", "***@", url[len(scheme) :]).split("?")[0]


def verified(url: str) -> str:
    """A `rediss://` URL that says whether to verify the certificate: Celery, unlike redis-py, would not by itself."""
    if not url.startswith("rediss://") or "ssl_cert_reqs=" in url:
        return url
    return f"{url}{'&' if '?' in url else '?'}ssl_cert_reqs=required"


def split_commas(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def matching(pattern: str, hint: str) -> AfterValidator:
    """Checks a setting, or each part of one, against a pattern; the message never shows the value."""

    def check(value: Any) -> Any:
        for part in value if isinstance(value, tuple) else (value,):
            text = part.get_secret_value() if isinstance(part, SecretStr) else part
            if not re.fullmatch(pattern, text):
                raise ValueError(f"should {hint}")
        return value

    return AfterValidator(check)


def check_mongodb_url(value: SecretStr) -> SecretStr:
    url = value.get_secret_value()
    with contextlib.suppress(PyMongoError, ValueError):
        if url.startswith("mongodb+srv://") or pymongo.uri_parser.parse_uri(url, validate=True):
            return value
    raise ValueError("should look like mongodb://user:password@host:27017/database (escape @ : / in a password)")


def check_redis_url(value: SecretStr) -> SecretStr:
    url = value.get_secret_value()
    with contextlib.suppress(ValueError):
        if url == "" or redis.ConnectionPool.from_url(url):
            return value
    raise ValueError("should look like redis://:password@host:6379/0 (or rediss://, unix://)")


def check_module(name: str) -> str:
    with contextlib.suppress(ImportError, ValueError):
        if importlib.util.find_spec(name):
            return name
    raise ValueError("should name modules that can be imported, comma-separated, without .py")


Name = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_commas)]
ModuleName = Annotated[str, AfterValidator(check_module)]
Modules = Annotated[tuple[ModuleName, ...], NoDecode, BeforeValidator(split_commas)]
Sizes = Annotated[Names, matching(IMAGE_SIZE, "be sizes, comma-separated, like 1024x1024,1536x1024")]
Seconds = Annotated[float, Field(ge=0, le=LONGEST_S)]
SomeSeconds = Annotated[float, Field(gt=0, le=LONGEST_S)]
Delays = Annotated[tuple[Annotated[float, Field(ge=0, le=3600)], ...], NoDecode, BeforeValidator(split_commas)]
HttpUrl = Annotated[str, matching(r"|https?://[^/\s]+\S*", "look like http://host:port/v1")]
MongoUrl = Annotated[SecretStr, AfterValidator(check_mongodb_url)]
RedisUrl = Annotated[SecretStr, AfterValidator(check_redis_url)]
BrokerUrl = Annotated[
    SecretStr,
    matching(
        r"|(rediss?|amqps?)://.*|sentinel://[^?]+\?master_name=[^&]+",
        "start with redis:// or amqp://, or look like sentinel://host:26379/0?master_name=NAME",
    ),
]


ArtifactUrl = Annotated[
    str, matching(r"gridfs|data:|[a-z][a-z0-9+.-]*://.*", "be gridfs, data:, or like file:///folder or s3://bucket")
]


NO_SECRET = SecretStr("")
OPENAI_URL = "https://api.openai.com/v1"
MONGODB_URL = "mongodb://ai_backend_user:ai_backend_password@mongodb:27017/ai_backend?authSource=ai_backend"
# The last models that OpenAI's speech interface has; the one that it names as their successor has another interface.
OPENAI_ENDS = dict.fromkeys(("gpt-4o-mini-tts", "tts-1", "tts-1-hd"), "2027-01-06")


@dataclass(frozen=True)
class ProviderSettings:
    """Where one kind of generation goes. An empty `base_url` means OpenAI itself, or offline without a key."""

    base_url: str
    api_key: str = field(repr=False)
    model: str
    allowed_models: tuple[str, ...]

    @property
    def is_offline(self) -> bool:
        return not self.base_url and not self.api_key

    @property
    def label(self) -> str:
        if self.is_offline:
            return "offline stand-in"
        ends = "" if self.base_url else OPENAI_ENDS.get(self.model)
        warning = f" (OpenAI ends this model on {ends}: set another server and model before)" if ends else ""
        return f"{self.model} at {redact_url(self.base_url) or OPENAI_URL}{warning}"


class Settings(BaseSettings):
    """Every setting, from the environment, else from `.env`. Names are the variables' in lower case.

    The first seven are the contract's (section 4); all others have defaults that do. Unknown variables are ignored.
    """

    model_config = SettingsConfigDict(
        env_file=".env", env_ignore_empty=True, extra="ignore", validate_default=True, hide_input_in_errors=True
    )

    mongodb_url: MongoUrl = SecretStr(MONGODB_URL)  # MongoDB, shared with the API
    database_name: Annotated[str, Field(pattern=r'^[^/\\. "$]{1,63}$')] = "ai_backend"  # database of the jobs
    redis_url: RedisUrl = SecretStr("redis://redis:6379/0")  # queue, results, notifications
    celery_queue_name: Name = "ai_jobs"  # queue to take jobs from
    celery_soft_time_limit: SomeSeconds = 90  # seconds a job may take
    celery_time_limit: SomeSeconds = 120  # seconds after which a hung process is killed
    debug: bool = False  # log more of the worker's own doing (never prompts or keys)

    celery_broker_url: BrokerUrl = NO_SECRET  # another broker than REDIS_URL
    celery_result_backend: RedisUrl = NO_SECRET  # another result backend than REDIS_URL
    celery_send_events: bool = True  # send the task events that the API and Flower read
    worker_pool: Literal["", "prefork", "threads", "solo"] = ""  # Celery pool; empty: prefork where fork works
    worker_concurrency: int = Field(1, ge=1, le=10_000)  # jobs at a time in this worker
    shutdown_grace: Seconds = 4  # seconds a running job may go on after SIGTERM
    handler_modules: Modules = ()  # modules with job types of your own

    lease_seconds: float = Field(30, ge=2, le=600)  # a silent worker loses its jobs after so many seconds
    sweep_interval: float = Field(10, ge=0.2, le=600)  # seconds between looks for lost jobs
    orphan_after: Seconds = 0  # seconds after which an older worker's job is taken over; 0: hard limit + 60
    job_deadline: SomeSeconds = 600  # seconds from the first start in which a job must end
    retry_delays: Delays = (5, 15, 45)  # seconds before each retry; their number is the number of retries
    retry_after_max: Seconds = 120  # longest wait in seconds that a provider may ask for

    openai_api_key: SecretStr = NO_SECRET  # key for the provider
    openai_base_url: HttpUrl = ""  # any OpenAI-compatible server; empty: OpenAI (with a key)
    text_base_url: HttpUrl = ""  # another server for text
    text_api_key: SecretStr = NO_SECRET  # its key
    text_model: Name = "gpt-6-luna"  # model for text
    text_models: Names = ()  # more text models that a job may ask for
    text_max_tokens: int = Field(4096, ge=1)  # most tokens a job may ask for
    image_base_url: HttpUrl = ""  # another server for pictures
    image_api_key: SecretStr = NO_SECRET  # its key
    image_model: Name = "gpt-image-2.6-flare"  # model for pictures
    image_models: Names = ()  # more picture models that a job may ask for
    image_sizes: Sizes = ()  # sizes the picture model knows, the nearest is used (set by itself for gpt-image)
    audio_base_url: HttpUrl = ""  # another server for sound
    audio_api_key: SecretStr = NO_SECRET  # its key
    audio_model: Name = "gpt-4o-mini-tts"  # model for sound
    audio_models: Names = ()  # more sound models that a job may ask for
    audio_voice: Name = "alloy"  # voice for jobs that ask for none or "default"
    audio_format: Literal["mp3", "wav", "opus", "flac"] = "mp3"  # sound format unless a job asks for another
    max_answer_bytes: int = Field(32 * 2**20, ge=1024)  # largest answer of a provider, in bytes

    artifact_url: ArtifactUrl = "gridfs"  # where files go: gridfs, data:, file:///folder, s3://bucket/folder
    artifact_base_url: str = "/artifacts"  # public address in front of a file's name
    artifact_retention_days: float = Field(0, ge=0, le=10_000)  # days after which files are deleted; 0: never
    aws_access_key_id: SecretStr = NO_SECRET  # S3 key
    aws_secret_access_key: SecretStr = NO_SECRET  # S3 secret
    s3_bucket_name: str = ""  # bucket where ARTIFACT_URL is s3:// alone
    s3_region: str = ""  # S3 region
    s3_endpoint_url: HttpUrl = ""  # S3-compatible server; empty: AWS

    @field_validator("celery_time_limit")
    @classmethod
    def check_limits(cls, value: float, info: ValidationInfo) -> float:
        if value <= info.data.get("celery_soft_time_limit", 0):
            raise ValueError("should be greater than CELERY_SOFT_TIME_LIMIT")
        return value

    @field_validator("s3_bucket_name")
    @classmethod
    def check_bucket(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get("artifact_url") == "s3://" and not value:
            raise ValueError("is needed, since ARTIFACT_URL names no bucket")
        return value

    @property
    def broker_url(self) -> str:
        """For Celery; the master's name, which a Sentinel's URL has, is for `transport_options`."""
        url = verified(self.celery_broker_url.get_secret_value() or self.redis_url.get_secret_value())
        return url.partition("?")[0] if url.startswith("sentinel") else url

    @property
    def sentinel_master(self) -> str:
        return self.celery_broker_url.get_secret_value().partition("?master_name=")[2]

    @property
    def is_rabbitmq(self) -> bool:
        return self.broker_url.startswith("amqp")

    @property
    def result_backend(self) -> str:
        return verified(self.celery_result_backend.get_secret_value() or self.redis_url.get_secret_value())

    @property
    def pool(self) -> str:
        return self.worker_pool or ("prefork" if hasattr(os, "fork") and sys.platform != "darwin" else "threads")

    @property
    def most_attempts(self) -> int:
        return 1 + len(self.retry_delays)

    def provider(self, kind: ProviderKind) -> ProviderSettings:
        """URL, key and model of one kind. A server of its own never gets the key of another one."""
        own_url, own_key = getattr(self, f"{kind}_base_url"), getattr(self, f"{kind}_api_key").get_secret_value()
        shared_key = "" if own_url else self.openai_api_key.get_secret_value()
        return ProviderSettings(
            base_url=own_url or self.openai_base_url,
            api_key=own_key or shared_key,
            model=getattr(self, f"{kind}_model"),
            allowed_models=getattr(self, f"{kind}_models"),
        )

    def limits(self, timelimit: object = None) -> Limits:
        """The limits of a message (`[hard, soft]`, either may be null) where they make sense, else the worker's own."""
        is_pair = isinstance(timelimit, (list, tuple)) and len(timelimit) == 2
        asked: Any = timelimit if is_pair else (None, None)
        hard_s, soft_s = (float(number) if is_duration(number) else None for number in asked)
        margin_s = self.celery_time_limit - self.celery_soft_time_limit
        if hard_s is None:
            hard_s = self.celery_time_limit if soft_s is None else max(self.celery_time_limit, soft_s + margin_s)
        soft_s = self.celery_soft_time_limit if soft_s is None else soft_s
        return Limits(soft_s if soft_s < hard_s else hard_s * 0.9, hard_s)


def settings_faults(error: ValidationError) -> list[str]:
    """A line for each fault: the variable, its value where it is no secret, and what would be right."""
    lines = []
    for fault in error.errors():
        name = str(fault["loc"][0])
        text = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
        kind = Settings.model_fields[name].annotation
        shown = "(hidden)" if kind is SecretStr else repr(redact_url(str(fault["input"])))
        default = Settings.model_fields[name].get_default()
        hint = "" if kind is SecretStr or default in ("", ()) else f" (default: {default})"
        lines.append(f"  {name.upper()} = {shown}: {text}{hint}")
    return lines


def load_settings(**overrides: Any) -> Settings:
    """The settings, or every fault on stderr and exit code 2, without a stack trace."""
    try:
        return Settings(**overrides)
    except ValidationError as error:
        lines = settings_faults(error)
        print("The worker can't start, because of its settings:", *lines, sep="\n", file=sys.stderr)
        print("Mend them in the environment or in .env; README.md has a table of all.", file=sys.stderr)
        raise SystemExit(EXIT_BAD_SETTINGS) from None


current_settings = cache(load_settings)


# ── Celery app ───────────────────────────────────────────────────────────────────────────────────────────────────

TASK_NAME = "src.infrastructure.queue.tasks.process_job"
NODE = f"{socket.gethostname()}-{secrets.token_hex(4)}"  # minted before the fork, so that siblings know each other
SOCKET_TIMEOUTS = {"socket_connect_timeout": 5, "socket_timeout": 10, "health_check_interval": 25}
RABBITMQ_TIMEOUTS = {"read_timeout": 5, "write_timeout": 5}  # one that is out of memory reads nothing, and says so late
CHATTY_LOGGERS = [
    *("celery", "kombu", "amqp", "pymongo", "asyncio", "s3fs", "fsspec", "botocore", "urllib3", "PIL"),
    "openai",  # which a handler of one's own may use
]


LOG_FORMAT = "%(asctime)s %(levelname)s %(processName)s %(message)s"
LONGEST_LINE = 1000
EVENTS_BATCH_S = 0.05
CELERY_CONSUMER = "celery.worker.consumer.consumer"
BROKER_LOGGERS = [
    *(CELERY_CONSUMER, "celery.worker.consumer.connection", "celery.worker.request"),
    *("kombu.asynchronous.hub", "kombu.transport.redis"),
]
URL_LOGGERS = ["httpx", "httpx2", "httpcore", "httpcore2"]  # their lines hold whole URLs


class JobQueue(Queue):
    """The queue on RabbitMQ as it is there: the API may have made it otherwise, as a quorum queue say."""

    def declare(self, nowait: bool = False, channel: Any = None) -> str:
        ours: Any = channel or self.channel
        try:
            with ours.connection.channel() as another:  # which a refusal closes
                self.queue_declare(passive=True, channel=another)
        except NotFound:
            super().declare(nowait, channel)
        return str(self.name)


def transport_options(settings: Settings) -> Document:
    """What the broker's client gets; one that hangs must not hold anybody up for ever."""
    if settings.is_rabbitmq:
        return RABBITMQ_TIMEOUTS
    # Long, since a job beyond it would run twice at a time; the lease's sweeper is what rescues.
    options = {"visibility_timeout": max(3600, 2 * settings.celery_time_limit), **SOCKET_TIMEOUTS}
    return {**options, "master_name": settings.sentinel_master} if settings.sentinel_master else options


def celery_configuration(settings: Settings) -> Document:
    """Celery's settings: JSON only, acknowledged late, one job in hand per slot, reconnecting for ever."""
    queue = settings.celery_queue_name
    return {
        # Not broker_url and result_backend alone: Celery prefers the variables of these names, as they are.
        **dict.fromkeys(("broker_url", "broker_read_url", "broker_write_url"), settings.broker_url),
        "result_backend": f"{__name__}.ResultBackend+{settings.result_backend}",
        "imports": settings.handler_modules,
        "task_default_queue": queue,
        "task_queues": [JobQueue(queue, Exchange(queue), queue)] if settings.is_rabbitmq else None,
        "accept_content": ["json"],
        **dict.fromkeys(("task_serializer", "result_serializer"), "json"),
        "timezone": "UTC",
        "enable_utc": True,
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "task_track_started": True,
        "worker_send_task_events": settings.celery_send_events,
        "worker_prefetch_multiplier": 1,
        "worker_cancel_long_running_tasks_on_connection_loss": False,  # with a Redis result backend it loses the job
        "task_time_limit": settings.celery_time_limit,  # no task_soft_time_limit: ours is asyncio.timeout
        "result_expires": 86_400,
        "result_backend_transport_options": {"retry_policy": {"timeout": 5.0}},
        # A result is a copy: no job waits long for it.
        **dict.fromkeys(("redis_socket_connect_timeout", "redis_socket_timeout"), 5),
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "worker_consumer": f"{__name__}:SafeConsumer",
        "broker_channel_error_retry": True,  # a full or read-only Redis must not end the worker
        "broker_transport_options": transport_options(settings),
        **dict.fromkeys(("worker_log_format", "worker_task_log_format"), LOG_FORMAT),
    }


class LenientQoS(KombuQoS):
    """The broker's notes of unacknowledged messages, in a Redis that is full, read-only or hung.

    Kombu's own would end the worker, or never free the message's slot. What can't be noted there is found again by
    its document.
    """

    log = SeldomLog("Redis takes no note of messages")

    def append(self, message: Any, delivery_tag: str) -> None:
        try:
            super().append(message, delivery_tag)
        except redis.ResponseError as error:  # taken out of the queue already: now it is nowhere but here
            self.log.fault(type(error).__name__)
            VirtualQoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        try:
            super().ack(delivery_tag)
        except redis.RedisError as error:
            self.log.fault(type(error).__name__)
            VirtualQoS.ack(self, delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        try:
            super().reject(delivery_tag, requeue=requeue)
        except redis.RedisError as error:
            self.log.fault(type(error).__name__)
            VirtualQoS.ack(self, delivery_tag)

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        with contextlib.suppress(redis.ResponseError):
            super().restore_visible(*args, **kwargs)


class ResultBackend(RedisBackend):
    """Celery's results in Redis. One that can't be stored is let go, since the document is the truth.

    An error here would leave the message unacknowledged and its slot lost, or fail a job that is completed.
    """

    log = SeldomLog("Celery's results can't be stored")

    _get_result_meta: Callable[..., Document]
    _set_with_state: Callable[..., None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.connparams: Document
        self.connparams["retry"] = Retry(NoBackoff(), 0)

    def store_result(self, task_id: str, result: Any, state: str, *args: Any, **kwargs: Any) -> Any:
        try:
            stored = super().store_result(task_id, result, state, *args, **kwargs)
        except (redis.RedisError, OSError) as error:
            self.log.fault(type(error).__name__)
            return result
        self.log.fine()
        return stored

    def _store_result(self, task_id: str, result: Any, state: str, *args: Any, **kwargs: Any) -> Any:
        """Celery looks first whether a success is there, which nothing may replace; but a success may."""
        if state != states.SUCCESS:
            return super()._store_result(task_id, result, state, *args, **kwargs)  # type: ignore[misc]
        meta = self._get_result_meta(result, state, *args, **kwargs)
        self._set_with_state(self.get_key_for_task(task_id), self.encode({**meta, "task_id": task_id}), state)
        return result


def close_without_redis(channel: RedisChannel, close: Callable[[RedisChannel], None] = RedisChannel.close) -> None:
    """Closes a channel whose Redis is gone.

    Kombu (5.7) gives up when the answer that it waits for fails, comes back later without the connection's address, and
    the AttributeError then ends the worker: whenever Redis dies while a job runs and a slot is free.
    """
    try:
        close(channel)
    except (redis.RedisError, OSError):
        close(channel)  # nothing is waited for any more; does nothing where the failure came later


def kept_client(
    channel: RedisChannel,
    asynchronous: bool = False,
    create: Callable[..., Any] = RedisChannel._create_client,  # type: ignore[attr-defined]
) -> Any:
    """A channel's client, made once for its connections. Kombu (5.7) makes one for each command, at a great cost."""
    if asynchronous:  # these belong to one connection each
        return create(channel, asynchronous=True)
    kept = vars(channel).get("kept_client")
    if kept is None or kept.connection_pool is not channel.pool:
        kept = vars(channel)["kept_client"] = create(channel)
    return kept


class Strategies(dict[str, Any]):
    """The tasks that a consumer knows, by name. A message whose task is a list would end it, at each start again."""

    def __getitem__(self, name: object) -> Any:
        if isinstance(name, str):
            return super().__getitem__(name)
        raise KeyError("the message's task is no name")


class SafeConsumer(Consumer):
    """Drops a message of an unknown task, with which Celery's own would end, if its id is missing or no text.

    It sends its events in batches: one by one they take half of the parent's time.
    """

    Strategies = Strategies
    hub: Any
    event_dispatcher: Any
    _flush_events: Callable[[], None]
    _batch_ends_at = 0.0

    def on_send_event_buffered(self) -> None:  # type: ignore[override]
        if self.hub:
            self.hub.call_soon(self._flush_events_in_time)  # from any thread of a pool

    def stop(self) -> None:
        self._flush_batch()
        super().stop()

    def _flush_events_in_time(self) -> None:
        now = time.monotonic()
        if worker_state.should_stop is not None or now >= self._batch_ends_at + EVENTS_BATCH_S:  # after a rest, at once
            self._batch_ends_at = now
            self._flush_batch()
        elif now >= self._batch_ends_at:
            self._batch_ends_at += EVENTS_BATCH_S
            self.hub.call_later(self._batch_ends_at - now, self._flush_batch)

    def _flush_batch(self) -> None:
        if worker_state.should_stop is None:
            self._flush_events()
        elif self.event_dispatcher and not self.event_dispatcher._outbound_buffer:
            self.event_dispatcher.flush(errors=False)  # at the end a broker that hangs is waited for once

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        name = (message.headers or {}).get("task")
        logger.error("dropped a message whose task isn't known here: %.100s", name if isinstance(name, str) else "?")
        message.reject_log_error(logger, self.connection_errors)  # type: ignore[attr-defined]


# In the base class, so that Sentinel's channels have them, too.
RedisChannel.QoS = LenientQoS
RedisChannel._create_client = kept_client  # type: ignore[attr-defined]
RedisChannel.close = close_without_redis  # type: ignore[method-assign, assignment]
# Quorum queues refuse a limit of unacknowledged messages per channel; one per consumer serves every queue.
RabbitTransport.qos_semantics_matches_spec = lambda *_: True  # type: ignore[method-assign]
app = Celery("ai_backend_worker")


@app.add_defaults
def configure() -> Document:
    configuration = celery_configuration(current_settings())
    app.backend_cls = configuration["result_backend"]
    return configuration


class OnceAMinute(logging.Filter):
    """Lets what Celery and kombu repeat while the broker is away pass once a minute each, as one line."""

    kinds = (
        *("Connected to", "consumer: ", "%s (%r)", "Frequent restarts", "Skipping prefetch", "Temporarily reducing"),
        *("Couldn't ", "Error in timer", "Redis ", "maybe_refresh_binding_expiry"),
    )

    def __init__(self) -> None:
        super().__init__()
        self._next_at: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith(self.kinds):
            return True
        kind, now = str(record.msg), time.monotonic()
        if now < self._next_at.get(kind, 0.0):
            return False
        self._next_at[kind] = now + LOG_EVERY_S
        record.msg, record.args, record.exc_info = " ".join(record.getMessage().split()), None, None
        return True


def without_bodies(record: logging.LogRecord) -> bool:
    """Takes messages' bodies and headers (they hold prompts) and our own Reject's stack out of Celery's lines."""
    if record.exc_info and isinstance(record.exc_info[1], Reject):
        record.exc_info, record.levelno, record.levelname = None, logging.INFO, "INFO"
    if record.levelno >= logging.ERROR and record.name == CELERY_CONSUMER:
        text = record.getMessage().splitlines()[0].split(" headers:")[0]
        record.msg, record.args, record.exc_info = text, None, None
    return True


def on_one_line(record: logging.LogRecord) -> bool:
    """Escapes what a message or document brought along that could forge a line or steer a terminal; cuts it short."""
    try:
        text = record.getMessage()
    except Exception:  # a wrong format must not raise in the caller, as it wouldn't without a filter
        text = str(record.msg)
    text = text.strip()[:LONGEST_LINE]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    record.msg, record.args = text, None
    return True


@signals.after_setup_logger.connect
def quieten_libraries(**named: Any) -> None:
    """At DEBUG other libraries log bodies, arguments and URLs: no prompt or key may reach a log by them."""
    for handler in named["logger"].handlers:
        handler.addFilter(on_one_line)
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    for name in URL_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in (CELERY_CONSUMER, "celery.app.trace"):
        logging.getLogger(name).addFilter(without_bodies)
    once_a_minute = OnceAMinute()
    for name in BROKER_LOGGERS:
        logging.getLogger(name).addFilter(once_a_minute)
    logging.getLogger("py.warnings").addFilter(lambda record: "CPendingDeprecation" not in record.getMessage())
    logger.setLevel(logging.DEBUG if current_settings().debug else logging.INFO)


# ── job store ────────────────────────────────────────────────────────────────────────────────────────────────────

MONGODB_TIMEOUT_MS = 10_000


RESCUE_FIRST_S, RESCUE_LONGEST_S = 30.0, 600.0


STALE_BATCH = 100
PENDING_OVERDUE_S = 60.0
OBJECT_ID_DIGITS = 24
PATH_NOT_VIABLE = 28  # MongoDB's code for a sub-document that is something else
TOO_LARGE_CODES = frozenset({10334, 17419, 17420})
CANT_BE_STORED = "The result is too large or can't be stored."
Written = TypeVar("Written")


class MissKind(Enum):
    """Why a claim got nothing; the document was read once to tell."""

    UNKNOWN = "no such document"
    TERMINAL = "has ended already"
    HELD = "is held by a live lease"
    WAITING = "waits for its next try"
    EXHAUSTED = "has used up its attempts or its time"


@dataclass(frozen=True)
class Miss:
    kind: MissKind
    document: Document = field(default_factory=dict)


class NoSubDocument(StoreUnavailable):
    """The document's `worker` is null or another program's: it has to be replaced first."""


@contextlib.contextmanager
def unknown_when_unreachable() -> Iterator[None]:
    """Whatever MongoDB doesn't answer, or refuses, leaves the outcome unknown. What it can't hold fails the job.

    Raises:
        StoreUnavailable: not reached, timed out, not confirmed by a majority, or not allowed.
        FailJob: the document would be too large or isn't one.
    """
    try:
        yield
    except (DocumentTooLarge, OverflowError, BSONError, UnicodeEncodeError) as error:
        raise FailJob(f"MongoDB can't hold the result: {type(error).__name__}", CANT_BE_STORED) from None
    except PyMongoError as error:
        code = error.code if isinstance(error, OperationFailure) else None
        if code == PATH_NOT_VIABLE:
            raise NoSubDocument("`worker` is no sub-document") from error
        if code in TOO_LARGE_CODES:
            raise FailJob(f"MongoDB can't hold the result: {code}", CANT_BE_STORED) from None
        raise StoreUnavailable(f"{type(error).__name__} {code or ''}".strip()) from error


def bookkeeping(document: Document) -> Document:
    """The worker's own fields; empty where the API or an older worker left something else there."""
    worker = document.get("worker")
    return worker if isinstance(worker, dict) else {}


class JobStore:
    """The jobs in MongoDB: a method per transition, each one atomic operation, guarded by status and owner.

    All but the constructor raise StoreUnavailable.
    """

    def __init__(self, database: Database[Document], node: str, clock: Clock, settings: Settings) -> None:
        self._database = database
        self._node = node
        self._settings = settings
        self.clock = clock
        self.primary: ObjectId | None = None
        # Whatever the URL says: a write that a new primary could roll back is none.
        self._jobs: Collection[Document] = database.get_collection(
            "jobs",
            read_preference=ReadPreference.PRIMARY,
            write_concern=WriteConcern("majority", j=True),
            read_concern=ReadConcern("majority"),
        )

    def synchronise_clock(self) -> None:
        """Reads the database's time, and which server process is the primary now (null behind a mongos)."""
        with unknown_when_unreachable():
            try:
                hello = self._database.command("hello")
            except NotImplementedError:  # mongomock has no `hello`: the host's clock serves
                hello = {"localTime": datetime.now(UTC)}
        self.primary = None if hello.get("msg") == "isdbgrid" else hello.get("topologyVersion", {}).get("processId")
        self.clock.synchronise(hello["localTime"].replace(tzinfo=UTC))

    def now(self) -> datetime:
        """The database's time: asked before its first use, since a host's own clock may be minutes off."""
        if not self.clock.is_synchronised:
            self.synchronise_clock()
        return self.clock.now()

    def ensure_indexes(self) -> None:
        with unknown_when_unreachable():
            self._jobs.create_index([("status", 1), ("created_at", 1)], name="worker_status")
            self._jobs.create_index([("worker.unnotified", 1)], name="worker_unnotified", sparse=True)

    def read(self, job_id: ObjectId) -> Document | None:
        with unknown_when_unreachable():
            return self._jobs.find_one({"_id": job_id})

    def claim(
        self, job_id: ObjectId, owner: str, limits: Limits, *, bounded: bool = True, waited_s: float = 0.0
    ) -> Job | Miss:
        """Takes a job that is pending, or released and due. Never an expired lease: those the sweeper releases first.

        A pending job starts afresh, whatever bookkeeping it has: our own never go back there, so the API or an operator
        has put it back to be tried again.

        Call it with the same `owner` until it answers: a claim whose reply was lost is then recognised.
        `bounded=False` ignores attempts and deadline, for a result that is already there; `waited_s` is how long ago
        the message was taken, which is when Celery's hard limit began.
        """
        now = self.now()
        lease = self._lease(now, owner, limits, waited_s)
        begun = {"status": Status.PROCESSING, "updated_at": now}
        anew = {"started_at": now, "completed_at": None, "error_message": None}
        fresh = {**begun, **anew, "worker": {**lease, "attempt": 1, "first_started_at": now}}
        due = {
            "_id": job_id,
            "status": Status.PROCESSING,
            "worker.owner": None,
            "worker.available_at": {"$lte": now},
            **(self._bounds(limits) if bounded else {}),
        }
        again = {
            "$set": {**begun, **{f"worker.{name}": value for name, value in lease.items()}},
            "$inc": {"worker.attempt": 1},
            "$min": {"worker.first_started_at": now},
        }
        take = partial(self._jobs.find_one_and_update, return_document=True)
        pending = {"_id": job_id, "status": Status.PENDING}
        document = self._mending(job_id, lambda: take(pending, {"$set": fresh}) or take(due, again))
        return self._job(document) if document else self._judge_miss(job_id, owner)

    def _lease(self, now: datetime, owner: str, limits: Limits, waited_s: float) -> Document:
        return {
            "owner": owner,
            "node": self._node,
            "pid": os.getpid(),
            "lease_until": now + timedelta(seconds=self._settings.lease_seconds),
            "deadline": now + timedelta(seconds=limits.hard_s - waited_s),
            "limits": [limits.hard_s, limits.soft_s],
        }

    def _mending(self, job_id: ObjectId, write: Callable[[], Written]) -> Written:
        """Does a write below `worker`; where that is no sub-document, it is replaced first."""
        try:
            with unknown_when_unreachable():
                return write()
        except NoSubDocument:
            # `$type: object` would match an array of objects, too.
            spoilt = [{"worker": {"$not": {"$type": "object"}}}, {"worker": {"$type": "array"}}]
        with unknown_when_unreachable():
            self._jobs.update_one({"_id": job_id, "$or": spoilt}, {"$set": {"worker": {}}})
            return write()

    def oldest_start(self, limits: Limits, after_s: float = 0.0) -> datetime:
        """A job whose first start isn't later has used up its time; or will have, in so many seconds."""
        longest_s = max(self._settings.job_deadline, limits.hard_s)
        return self.now() + timedelta(seconds=after_s - longest_s)

    def _bounds(self, limits: Limits) -> Document:
        return {
            "worker.attempt": {"$not": {"$gte": self._settings.most_attempts}},
            "worker.first_started_at": {"$not": {"$lte": self.oldest_start(limits)}},
        }

    def _judge_miss(self, job_id: ObjectId, owner: str) -> Job | Miss:
        document = self.read(job_id)
        if document is None:
            return Miss(MissKind.UNKNOWN)
        worker, status = bookkeeping(document), document.get("status")
        if status in TERMINAL_STATUSES:
            return Miss(MissKind.TERMINAL, document)
        if status not in ACTIVE_STATUSES:
            return Miss(MissKind.UNKNOWN, document)
        if status == Status.PENDING:  # put back since the claim: it can be taken at once
            return Miss(MissKind.WAITING)
        if worker.get("owner") == owner:
            return self._job(document)
        if worker.get("owner") or "available_at" not in worker:
            return Miss(MissKind.HELD, document)
        # Not by its absence alone: it may have been released since the claim.
        return Miss(MissKind.EXHAUSTED if self.is_past_bounds(document) else MissKind.WAITING, document)

    def _job(self, document: Document) -> Job:
        worker = document["worker"]
        hard_s, soft_s = worker["limits"]
        left_s = (worker["lease_until"].replace(tzinfo=UTC) - self.now()).total_seconds()
        return Job(
            id=document["_id"],
            job_type=str(document.get("job_type")),
            user_id=str(document.get("user_id") or ""),
            session_id=document.get("session_id"),
            input_data=document.get("input_data"),
            owner=worker["owner"],
            attempt=worker["attempt"],
            limits=Limits(soft_s, hard_s),
            first_started_at=worker["first_started_at"].replace(tzinfo=UTC),
            leased_at=time.monotonic() - (self._settings.lease_seconds - left_s),
        )

    def complete(self, job: Job, output: Document, artifact_url: str | None) -> bool:
        """Ends the job with its result. False: it is no longer ours, and nothing was written."""
        return self._end(job, Status.COMPLETED, output_data=output, artifact_url=artifact_url, error_message=None)

    def fail(self, job: Job, sentence: str) -> bool:
        """Ends the job with a sentence for the person. False: it is no longer ours, and nothing was written."""
        return self._end(job, Status.FAILED, error_message=sentence)

    def release(self, job: Job, available_at: datetime, *, counted: bool) -> bool:
        """Lets go of the job until `available_at`. False: it is no longer ours, and nothing is written.

        So it is, too, where the reply to an earlier try was lost and the job was taken or ended since.
        """
        update: Document = {"$set": {**self._released(available_at, RESCUE_FIRST_S), "worker.released_by": job.owner}}
        if not counted:
            update["$inc"] = {"worker.attempt": -1}
        with unknown_when_unreachable():
            mine_already = {**self._fence(job), "worker.owner": None, "worker.released_by": job.owner}
            released = self._jobs.update_one(self._fence(job), update).matched_count == 1
            return released or self._jobs.find_one(mine_already, {"_id": 1}) is not None

    def fail_active(self, job_id: ObjectId, sentence: str) -> Document | None:
        """Ends a job whoever runs it (that attempt then loses it). None: it had ended already."""
        update = {"$set": self._ended(Status.FAILED, error_message=sentence)}
        active = {"_id": job_id, "status": {"$in": list(ACTIVE_STATUSES)}}
        return self._mending(job_id, lambda: self._jobs.find_one_and_update(active, update, return_document=True))

    def fail_unowned(self, job_id: ObjectId, sentence: str) -> bool:
        """Ends a job that nobody runs: pending, or released. False: it was not so, and nothing was written."""
        released = {"status": Status.PROCESSING, "worker.owner": None, "worker.available_at": {"$ne": None}}
        unowned = {"_id": job_id, "$or": [{"status": Status.PENDING}, released]}
        update = {"$set": self._ended(Status.FAILED, error_message=sentence)}
        return self._mending(job_id, lambda: self._jobs.update_one(unowned, update).matched_count == 1)

    def _fence(self, job: Job) -> Document:
        return {"_id": job.id, "status": Status.PROCESSING, "worker.owner": job.owner}

    def _ended(self, status: Status, **fields: Any) -> Document:
        now = self.now()
        return {"status": status, "updated_at": now, "completed_at": now, "worker.unnotified": now, **fields}

    def _released(self, available_at: datetime, rescue_s: float) -> Document:
        return {
            "updated_at": self.now(),
            "worker.owner": None,
            "worker.available_at": available_at,
            "worker.rescue_at": available_at + timedelta(seconds=rescue_s),
        }

    def _end(self, job: Job, status: Status, **fields: Any) -> bool:
        with unknown_when_unreachable():
            if self._jobs.update_one(self._fence(job), {"$set": self._ended(status, **fields)}).matched_count:
                return True
            seen = {"status": 1, "worker.owner": 1, "error_message": 1}
            document = self._jobs.find_one({"_id": job.id}, seen) or {}
        if bookkeeping(document).get("owner") != job.owner:
            return False
        if document["status"] == Status.PROCESSING:
            raise StoreUnavailable("the last write isn't confirmed by a majority yet")
        # Mine and terminal: this very write, whose reply was lost; or the API's cancel, which keeps the owner.
        return bool((document["status"], document.get("error_message")) == (status, fields["error_message"]))

    def renew_leases(self, jobs: Sequence[Job]) -> None:
        """One more lease for all of these that are still owned, in one operation; `updated_at` stays."""
        until = self.now() + timedelta(seconds=self._settings.lease_seconds)
        held = {
            "_id": {"$in": [job.id for job in jobs]},
            "status": Status.PROCESSING,
            "worker.owner": {"$in": [job.owner for job in jobs]},
        }
        with unknown_when_unreachable():
            # A renewal that a frozen MongoDB does late, after a younger one, must not shorten the lease.
            self._jobs.update_many(held, {"$max": {"worker.lease_until": until}})

    def find_lost(self, jobs: Sequence[Job]) -> list[Job]:
        """Those of these jobs that were cancelled or taken: no longer processing, or with another owner."""
        with unknown_when_unreachable():
            found = self._jobs.find({"_id": {"$in": [job.id for job in jobs]}}, {"status": 1, "worker.owner": 1})
            owners = {d["_id"]: bookkeeping(d).get("owner") for d in found if d["status"] == Status.PROCESSING}
        return [job for job in jobs if owners.get(job.id) != job.owner]

    def mark_notified(self, job_ids: Sequence[ObjectId]) -> None:
        with unknown_when_unreachable():
            self._jobs.update_many({"_id": {"$in": list(job_ids)}}, {"$unset": {"worker.unnotified": ""}})

    def find_unnotified(self, older_than_s: float) -> list[Document]:
        """Terminal jobs whose notice was not confirmed as published."""
        since = self.now() - timedelta(seconds=older_than_s)
        with unknown_when_unreachable():
            return list(self._jobs.find({"worker.unnotified": {"$lte": since}}).limit(STALE_BATCH))

    def find_siblings(self) -> list[Document]:
        """Jobs that processes of this node hold, dead ones included."""
        with unknown_when_unreachable():
            held = {"status": Status.PROCESSING, "worker.node": self._node, "worker.owner": {"$ne": None}}
            return list(self._jobs.find(held))

    def find_stale(self) -> list[Document]:
        """Jobs nobody works on: lease run out, released and forgotten, or left by an older worker without leases."""
        now = self.now()
        expired = {"worker.lease_until": {"$lte": now}, "worker.owner": {"$ne": None}}
        # A job rescued while it was pending has `rescue_at`, too: once an older worker runs it, only its age counts.
        forgotten = {"worker.owner": {"$exists": True, "$eq": None}, "worker.rescue_at": {"$lte": now}}
        with unknown_when_unreachable():
            stale = list(self._jobs.find({"status": Status.PROCESSING, "$or": [expired, forgotten]}).limit(STALE_BATCH))
            unkept = {"status": Status.PROCESSING, "worker.owner": {"$exists": False}}
            older = self._jobs.find(unkept).limit(STALE_BATCH)
            return stale + [document for document in older if self._is_orphan(document, now)]

    def find_forgotten_pending(self, count_queued: Callable[[], int]) -> list[Document]:
        """Jobs that have waited for over a minute though nothing is queued, or though one a minute younger has started.

        Only then has the broker lost their message: behind a mere backlog a copy would help nobody.
        """
        now, minute = self.now(), timedelta(seconds=PENDING_OVERDUE_S)
        overdue = {"created_at": {"$lt": now - minute}, "worker.rescue_at": {"$not": {"$gt": now}}}
        with unknown_when_unreachable():
            oldest = self._jobs.find({"status": Status.PENDING, **overdue}).sort("created_at", 1).limit(STALE_BATCH)
            if not (waiting := list(oldest)) or count_queued() == 0:
                return waiting
            started = {"started_at": {"$ne": None}, "created_at": {"$lte": now}}  # which leaves out what is no time
            youngest_started = [
                self._jobs.find_one({"status": status, **started}, sort=[("created_at", -1)])
                for status in (Status.PROCESSING, *TERMINAL_STATUSES)
            ]
        overtaken = max((document["created_at"] - minute for document in youngest_started if document), default=None)
        return [document for document in waiting if overtaken and document["created_at"] < overtaken]

    def _is_orphan(self, document: Document, now: datetime) -> bool:
        age_s = self._settings.orphan_after or self._settings.celery_time_limit + 60
        times = [t for t in map(document.get, ("started_at", "updated_at", "created_at")) if isinstance(t, datetime)]
        return not times or times[0].replace(tzinfo=UTC) < now - timedelta(seconds=age_s)

    def is_past_bounds(self, document: Document) -> bool:
        """Whether a job has used up its attempts, or the time since its first start."""
        worker = bookkeeping(document)
        oldest_start = self.oldest_start(self._settings.limits(worker.get("limits")))
        started_at = worker.get("first_started_at")
        too_old = started_at is not None and started_at.replace(tzinfo=UTC) <= oldest_start
        return bool(too_old) or worker.get("attempt", 0) >= self._settings.most_attempts

    def release_stale(self, document: Document) -> bool:
        """Turns a stale job into a released one, due now. False: somebody was quicker.

        Each time the next rescue is twice as far, so that a long queue isn't flooded with copies.
        """
        worker = bookkeeping(document)
        rescue_s, rescues = self._next_rescue(worker)
        update = {**self._released(self.now(), rescue_s), "worker.rescues": rescues}
        if not worker:  # an older worker's job, whose `worker` may be null: MongoDB sets no field below that
            fields = {key.removeprefix("worker."): update.pop(key) for key in list(update) if key.startswith("worker.")}
            update["worker"] = fields
        with unknown_when_unreachable():
            return self._jobs.update_one(self._unchanged(document), {"$set": update}).matched_count == 1

    @staticmethod
    def _next_rescue(worker: Document) -> tuple[float, int]:
        """Seconds until the rescue after this one, and how many there have been then."""
        rescues = worker.get("rescues", 0)
        return min(RESCUE_FIRST_S * 2 ** min(rescues, 10), RESCUE_LONGEST_S), rescues + 1

    def rescue_soon(self, document: Document) -> None:
        """Takes back a rescue whose message couldn't be sent, so that its next one doesn't wait twice as long."""
        unsent = {
            "_id": document["_id"],
            "status": Status.PROCESSING,
            "worker.owner": None,
            "worker.rescues": self._next_rescue(bookkeeping(document))[1],
        }
        due_at = self.now() + timedelta(seconds=self._settings.sweep_interval)
        with unknown_when_unreachable():
            self._jobs.update_one(unsent, {"$inc": {"worker.rescues": -1}, "$set": {"worker.rescue_at": due_at}})

    def postpone_rescue(self, document: Document) -> bool:
        """Takes the rescue of a pending job upon this sweeper. False: somebody was quicker, or the job has started."""
        worker = bookkeeping(document)
        rescue_s, rescues = self._next_rescue(worker)
        update = {"rescue_at": self.now() + timedelta(seconds=rescue_s), "rescues": rescues}
        with unknown_when_unreachable():
            same = {"_id": document["_id"], "status": Status.PENDING, "worker": document.get("worker")}
            return self._jobs.update_one(same, {"$set": {"worker": {**worker, **update}}}).matched_count == 1

    def fail_stale(self, document: Document, sentence: str) -> bool:
        """Ends a stale job. False: somebody was quicker."""
        update = {"$set": self._ended(Status.FAILED, error_message=sentence)}
        with unknown_when_unreachable():
            return self._jobs.update_one(self._unchanged(document), update).matched_count == 1

    def _unchanged(self, document: Document) -> Document:
        same: Document = {"_id": document["_id"], "status": Status.PROCESSING}
        worker = bookkeeping(document)
        if not worker:
            return {**same, "worker": document.get("worker")}
        # The values as they were read: a renewal or another sweeper's release in between makes this a miss.
        return same | {f"worker.{key}": worker.get(key) for key in ("owner", "lease_until", "rescue_at")}

    def find_unnamed(self, names: Sequence[str]) -> list[str]:
        """Those of these files (named by job and owner) whose job has ended and names another file, or none."""
        ids = [ObjectId(name[:OBJECT_ID_DIGITS]) for name in names]
        ended = {"_id": {"$in": ids}, "status": {"$in": list(TERMINAL_STATUSES)}}
        with unknown_when_unreachable():
            found = self._jobs.find(ended, {"artifact_url": 1, "output_data": 1})
            named = {str(d["_id"]): f"{d.get('artifact_url')} {d.get('output_data')}" for d in found}
        return [name for name in names if name not in named.get(name[:OBJECT_ID_DIGITS], name)]

    def overview(self) -> Document:
        """What `status` shows: counts, the oldest pending job, leases that ran out, the last errors."""
        with unknown_when_unreachable():
            count = self._jobs.count_documents
            lease_over = {"worker.owner": {"$ne": None}, "worker.lease_until": {"$lte": self.now()}}
            oldest = self._jobs.find_one({"status": Status.PENDING}, {"created_at": 1}, sort=[("created_at", 1)])
            errors = self._jobs.find({"status": Status.FAILED}, {"error_message": 1, "completed_at": 1, "job_type": 1})
            return {
                "counts": {status.value: count({"status": status}) for status in Status},
                "oldest_pending": (oldest or {}).get("created_at"),
                "expired_leases": count({"status": Status.PROCESSING, **lease_over}),
                "unnotified": count({"worker.unnotified": {"$exists": True}}),
                "last_errors": list(errors.sort("completed_at", -1).limit(5)),
            }


# ── notifier ─────────────────────────────────────────────────────────────────────────────────────────────────────

STATUS_CHANNEL = "job_notifications"
PROGRESS_CHANNEL = "job_progress"
SPOOL_TTL_S = 3600
PROGRESS_BATCH_S = 0.05
PROGRESS_RECHECK_S = 1.0


class Notifier:
    """Tells the API over Redis pub/sub (contract, section 3). A failure is logged and reported, never raised."""

    def __init__(self, client: redis.Redis, database_name: str = "") -> None:
        self._redis = client
        self._database_name = database_name  # a Redis may serve more than one database
        self._revoked_key = f"revoked_jobs:{database_name}"
        self._log = SeldomLog("notifications can't be published")
        self._ask_again_at = 0.0

    def publish_status(self, document: Document, status: Status, sentence: str) -> bool:
        """Publishes a status that the document already has. False: Redis could not be reached."""
        message = {
            "type": "job_status_update",
            "user_id": str(document.get("user_id") or ""),
            "job_id": str(document["_id"]),
            "status": status,
            "session_id": document.get("session_id"),
            "message": sentence,
        }
        return self._publish(STATUS_CHANNEL, message) is not None

    def may_be_heard(self) -> bool:
        """Whether a piece of text is worth sending: a moment ago nobody listened."""
        return time.monotonic() >= self._ask_again_at

    def publish_progress(self, job: Job, sequence: int, delta: str) -> bool:
        """Publishes a piece of text. False: nobody listens, or Redis could not be reached."""
        message = {
            "type": "job_progress",
            "user_id": job.user_id,
            "job_id": str(job.id),
            "session_id": job.session_id,
            "attempt": job.attempt,
            "sequence": sequence,
            "delta": delta,
        }
        listeners = self._publish(PROGRESS_CHANNEL, message)
        self._ask_again_at = 0.0 if listeners else time.monotonic() + PROGRESS_RECHECK_S
        return bool(listeners)

    def _publish(self, channel: str, message: Document) -> int | None:
        try:
            listeners = int(self._redis.publish(channel, json.dumps(message, default=str)))
        except redis.RedisError as error:
            self._log.fault(type(error).__name__)
            return None
        self._log.fine()
        return listeners

    # A finished generation that MongoDB couldn't take waits here for the next attempt.

    def spool_result(self, job: Job, result: Result) -> bool:
        media = result.media and [result.media.data, result.media.suffix, result.media.url_field]
        try:
            # nx: it expires in the end, however often it is kept again
            self._redis.set(f"result:{job.id}", json_util.dumps([result.output, media]), ex=SPOOL_TTL_S, nx=True)
        except redis.RedisError as error:
            logger.error("%s its result could not be kept: %s", job, type(error).__name__)
            return False
        return True

    def spooled_result(self, job_id: ObjectId) -> Result | None:
        """The result that an earlier attempt kept. Raises SpoolUnavailable: it can't be looked up now."""
        try:
            raw = self._redis.get(f"result:{job_id}")
        except redis.RedisError as error:
            raise SpoolUnavailable(f"Redis: {type(error).__name__}") from error
        if not raw:
            return None
        output, media = json_util.loads(raw)
        return Result(output, media and Media(*media))

    def forget_result(self, job_id: ObjectId) -> None:
        with contextlib.suppress(redis.RedisError):  # it expires by itself
            self._redis.delete(f"result:{job_id}")

    def take_turn(self, chore: str, every_s: float) -> bool:
        """Whether this process is the one to do a chore now, of all that share the database."""
        try:
            return bool(self._redis.set(f"{chore}:{self._database_name}", "taken", ex=int(every_s), nx=True))
        except redis.RedisError:  # it can wait
            return False

    # Jobs whose task an operator revoked, until a sweep has failed them.

    def note_revoked(self, job_id: str) -> None:
        try:
            self._redis.sadd(self._revoked_key, job_id)
        except redis.RedisError as error:
            logger.warning("job=%s was revoked, but Redis can't be told: %s", job_id, type(error).__name__)

    def revoked(self) -> list[str]:
        try:
            return [
                str(job_id, "ascii") for job_id in self._redis.smembers(self._revoked_key) if isinstance(job_id, bytes)
            ]
        except redis.RedisError as error:
            raise SpoolUnavailable(f"Redis: {type(error).__name__}") from error

    def forget_revoked(self, job_id: str) -> None:
        with contextlib.suppress(redis.RedisError):  # failing it once more does nothing
            self._redis.srem(self._revoked_key, job_id)


class Progress:
    """Streams a job's text to whoever listens: the first piece at once, then in batches.

    What nobody heard is kept and sent with the next piece. Only used on the event loop.
    """

    def __init__(self, job: Job, notifier: Notifier, is_lease_fresh: Callable[[], bool]) -> None:
        self._job, self._notifier, self._is_lease_fresh = job, notifier, is_lease_fresh
        self._pending: list[str] = []
        self._sequence = 0
        self._flusher: asyncio.Task[None] | None = None
        self._finished = asyncio.Event()

    def __call__(self, delta: str) -> None:
        self._pending.append(delta)
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.get_running_loop().create_task(self._flush())

    async def _flush(self) -> None:
        while self._pending:
            is_last = self._finished.is_set()
            heard = await self._send()
            if is_last:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROGRESS_BATCH_S if heard else PROGRESS_RECHECK_S):
                    await self._finished.wait()

    async def _send(self) -> bool:
        if not (self._is_lease_fresh() and self._notifier.may_be_heard()):  # no thread is taken for nothing
            return False
        count = len(self._pending)
        delta = "".join(self._pending[:count])
        heard = await asyncio.to_thread(self._notifier.publish_progress, self._job, self._sequence, delta)
        if heard:
            del self._pending[:count]
            self._sequence += 1
        return heard

    async def finish(self) -> None:
        """Sends what is left, so that no progress comes after the final status."""
        self._finished.set()
        if self._flusher:
            await self._flusher

    def stop(self) -> None:
        """Sends nothing more."""
        if self._flusher:
            self._flusher.cancel()


# ── artifacts ────────────────────────────────────────────────────────────────────────────────────────────────────


CONTENT_TYPES = {  # slim images have no mime.types, and Python's own table lacks some
    **{"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"},
    **{"wav": "audio/wav", "mp3": "audio/mpeg", "opus": "audio/ogg", "flac": "audio/flac"},
}


def artifact_name(job_id: ObjectId, owner: str, suffix: str) -> str:
    """Named by job and owner, so that a late attempt never touches the winner's file."""
    return f"{job_id}-{owner}.{suffix}"


class Artifacts:
    """Puts a result's file where `ARTIFACT_URL` says, and takes away those of attempts that lost.

    Each kind of store has its own `put`, `names` and `delete`; all methods raise StoreUnavailable.
    """

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url.rstrip("/")

    def put(self, name: str, data: bytes, content_type: str) -> str | None:
        """Stores a file whole or not at all; returns its URL, or None for `base URL + name`."""
        raise NotImplementedError

    def names(self, prefix: str = "") -> Iterator[str]:
        """The names of stored files that begin so."""
        raise NotImplementedError

    def delete(self, name: str) -> None:
        """Takes a file away; one that is gone is no fault."""
        raise NotImplementedError

    def publish(self, job: Job, media: Media) -> str:
        """Stores the file and returns its public URL. Safe to repeat: the name is the attempt's own."""
        return self.publish_file(artifact_name(job.id, job.owner, media.suffix), media.data)

    def publish_file(self, name: str, data: bytes) -> str:
        suffix = name.rsplit(".", 1)[-1]
        content_type = CONTENT_TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
        return self.put(name, data, content_type) or f"{self.base_url}/{name}"

    def discard(self, job: Job) -> None:
        """Deletes what this attempt stored."""
        for name in list(self.names(f"{job.id}-{job.owner}")):
            self.delete(name)

    def discard_others(self, job: Job) -> None:
        """Deletes what other attempts at this job stored."""
        for name in list(self.names(f"{job.id}-")):
            if not name.startswith(f"{job.id}-{job.owner}"):
                self.delete(name)


class GridFSArtifacts(Artifacts):
    """Files beside the jobs, in GridFS (collections `artifacts.files` and `artifacts.chunks`)."""

    def __init__(self, database: Database[Document], base_url: str) -> None:
        super().__init__(base_url)
        self._bucket = gridfs.GridFS(database, collection="artifacts")
        self._index, self._chunks = database["artifacts.files"], database["artifacts.chunks"]

    def put(self, name: str, data: bytes, content_type: str) -> str | None:
        with unknown_when_unreachable():
            try:
                self._bucket.put(data, _id=name, filename=name, metadata={"contentType": content_type})
            except gridfs.errors.FileExists:  # an earlier try at this put
                if self._index.find_one({"_id": name}, {"_id": 1}):  # written last, so all of it
                    return None  # not deleted, to be put again: the document may name it already
                self._bucket.delete(name)
                self._bucket.put(data, _id=name, filename=name, metadata={"contentType": content_type})
        return None

    def names(self, prefix: str = "") -> Iterator[str]:
        """By their chunks, since of a file whose process died in mid-put or mid-delete nothing else may be there."""
        ours = {"$match": {"files_id": {"$regex": f"^{re.escape(prefix)}"}}}
        with unknown_when_unreachable():
            for file in self._chunks.aggregate([ours, {"$sort": {"files_id": 1}}, {"$group": {"_id": "$files_id"}}]):
                yield file["_id"]

    def delete(self, name: str) -> None:
        with unknown_when_unreachable():
            self._bucket.delete(name)


@contextlib.contextmanager
def unknown_when_files_fail() -> Iterator[None]:
    """S3 clients raise their own exceptions as well as OSError: every one of them means that the file isn't there."""
    try:
        yield
    except PermissionError as error:  # trying again would keep the person waiting for nothing
        raise FailJob("the artifact store refuses: run `check`", CANT_BE_STORED) from error
    except Exception as error:
        raise StoreUnavailable(f"artifact store: {type(error).__name__}") from error


class FolderArtifacts(Artifacts):
    """Files in a folder (`file://`), each written under another name first, so that nobody ever sees half of one."""

    def __init__(self, folder: Path, base_url: str) -> None:
        super().__init__(base_url)
        self._folder = folder

    def put(self, name: str, data: bytes, content_type: str) -> str | None:
        part = self._folder / f"{name}.part"
        with unknown_when_files_fail():
            self._folder.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # the document that names it outlives a power cut, too
            part.chmod(0o644)  # the web server in front runs as another user
            part.replace(self._folder / name)
        return None

    def names(self, prefix: str = "") -> Iterator[str]:
        with unknown_when_files_fail(), contextlib.suppress(FileNotFoundError), os.scandir(self._folder) as files:
            yield from (file.name for file in files if file.name.startswith(prefix))

    def delete(self, name: str) -> None:
        with unknown_when_files_fail():
            (self._folder / name).unlink(missing_ok=True)


class FsspecArtifacts(Artifacts):
    """Files in any other file system that fsspec knows; `s3://` with the S3 names of the contract."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.artifact_base_url)
        self._settings = settings
        bare = settings.artifact_url == "s3://"
        self._url = f"s3://{settings.s3_bucket_name}" if bare else settings.artifact_url.rstrip("/")
        self._is_s3 = self._url.startswith("s3://")

    def _open(self) -> tuple[AbstractFileSystem, str]:
        import fsspec

        settings, options = self._settings, Document()
        if self._is_s3:
            options = {
                "use_listings_cache": False,
                "key": settings.aws_access_key_id.get_secret_value() or None,
                "secret": settings.aws_secret_access_key.get_secret_value() or None,
                "endpoint_url": settings.s3_endpoint_url or None,
                "client_kwargs": {"region_name": settings.s3_region} if settings.s3_region else {},
            }
        return fsspec.core.url_to_fs(self._url, **options)  # type: ignore[no-any-return]

    def put(self, name: str, data: bytes, content_type: str) -> str | None:
        with unknown_when_files_fail():
            files, folder = self._open()
            files.pipe_file(f"{folder}/{name}", data, **({"ContentType": content_type} if self._is_s3 else {}))
        return None

    def names(self, prefix: str = "") -> Iterator[str]:
        with unknown_when_files_fail():
            files, folder = self._open()
            for path in files.glob(f"{folder}/{prefix}*"):
                yield path.rsplit("/", 1)[-1]

    def delete(self, name: str) -> None:
        with unknown_when_files_fail():
            files, folder = self._open()
            with contextlib.suppress(FileNotFoundError):
                files.rm_file(f"{folder}/{name}")


class InlineArtifacts(Artifacts):
    """No files: the URL is the data itself, for small set-ups without anything that serves files."""

    def put(self, name: str, data: bytes, content_type: str) -> str | None:
        return f"data:{content_type};base64,{base64.b64encode(data).decode()}"

    def names(self, prefix: str = "") -> Iterator[str]:
        return iter(())

    def delete(self, name: str) -> None:
        return None


def open_artifacts(settings: Settings, database: Callable[[], Database[Document]]) -> Artifacts:
    url, base_url = settings.artifact_url, settings.artifact_base_url
    if url == "gridfs":
        return GridFSArtifacts(database(), base_url)
    if url == "data:":
        return InlineArtifacts(base_url)
    if url.startswith("file://"):
        return FolderArtifacts(Path(url.removeprefix("file://")), base_url)
    return FsspecArtifacts(settings)


# ── provider ─────────────────────────────────────────────────────────────────────────────────────────────────────

RETRIED_STATUSES = frozenset({408, 409, 425, 429})
REFUSED_KEY_STATUSES = frozenset({401, 403})
AWAY_STATUSES = frozenset({502, 503, 504})  # of a proxy in front of it


FAILURES_BEFORE_PAUSE, LONGEST_PAUSE_S, POLL_PROVIDER_S = 3, 30.0, 0.5


LAST_EVENT = b"[DONE]"
LINGER_S, KEEP_CONNECTION_S, LOOK_AT_CONNECTION_S = 0.25, 60.0, 1.0
MODEL_OFFLINE = "offline-stand-in"
TOO_LARGE = "The provider's answer is too large."
LONGEST_MODEL_NAME, MOST_TOKENS = 200, 2**31
MOST_TEXT_CHARACTERS = 4_000_000  # at up to four bytes each a document can hold them
MOST_LINE_BYTES = 4 * MOST_TEXT_CHARACTERS
UNUSABLE = "The provider's answer could not be used."
# Newer models take the cap of an answer under another name, and count the thinking before the answer in.
CAP, CAP_WITH_THINKING, THINKING_TOKENS = "max_tokens", "max_completion_tokens", 4096


@dataclass(frozen=True)
class TextAnswer:
    text: str
    model: str
    tokens: int


class Provider(Protocol):
    """Makes text, pictures and speech. Requests are the OpenAI API's. Each method raises RetryJob or FailJob."""

    async def ready(self, patience_s: float) -> None:
        """Waits for a provider that is away, so long at most. Raises RetryJob: it is still away."""

    async def text(self, request: Document, on_delta: Callable[[str], None]) -> TextAnswer: ...

    async def image(self, request: Document) -> tuple[bytes, str]:
        """The picture's bytes and the model that made it."""

    async def speech(self, request: Document) -> tuple[bytes, str]:
        """The sound's bytes and the model that made it."""


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The seconds of `Retry-After`, the only form that model servers send; None where there is none."""
    with contextlib.suppress(ValueError):
        seconds = float(headers.get("retry-after", ""))
        return seconds if math.isfinite(seconds) and seconds >= 0 else None
    return None


def status_error(status: int, detail: str, headers: Mapping[str, str]) -> JobError:
    """What an HTTP error status of the provider means for the job."""
    if status in RETRIED_STATUSES or status >= 500:
        kind = ProviderAway if status in AWAY_STATUSES else RetryJob
        return kind(detail, RetryJob.default_sentence, retry_after_s(headers))
    if status in REFUSED_KEY_STATUSES:
        return FailJob(f"{detail}: check the provider's key", "The service isn't set up correctly; tell its operator.")
    return FailJob(detail, "The provider refused this request. Change the input and try again.")


WRONG_SHAPE_ERRORS = (AttributeError, TypeError, LookupError, ValueError, RecursionError)


@contextlib.contextmanager
def provider_errors() -> Iterator[None]:
    """Turns whatever a provider's answer or the way to it can raise into RetryJob or FailJob.

    Only the error's class goes on: its text can hold the key and the prompt (hence `from None`).
    """
    import aiohttp

    try:
        yield
    except JobError:
        raise
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise ProviderAway(type(error).__name__, is_counted=False) from None  # nothing was sent, so nothing was tried
    except WRONG_SHAPE_ERRORS as error:
        raise FailJob(type(error).__name__, UNUSABLE) from None
    except (aiohttp.ClientError, OSError) as error:
        raise RetryJob(type(error).__name__, ProviderAway.default_sentence) from None


def open_session() -> aiohttp.ClientSession:
    """An HTTP client for any number of calls at a time. It keeps no cookies and unpacks nothing."""
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_CONNECTION_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"accept-encoding": "identity", "user-agent": f"ai-backend-worker/{__version__}"},
        timeout=aiohttp.ClientTimeout(total=None, connect=10.0),  # the whole attempt has a deadline
        auto_decompress=False,
    )


def proxy_to(url: str) -> str | None:
    """The proxy that `https_proxy` and its like name for a server, as most programs read them."""
    parts, proxies = urllib.parse.urlsplit(url), urllib.request.getproxies()
    found = proxies.get(parts.scheme) or proxies.get("all")
    if not found or urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return found if "://" in found else f"http://{found}"


@contextlib.contextmanager
def connection_watched(response: aiohttp.ClientResponse) -> Iterator[None]:
    """Tells who reads an answer that its connection is gone: aiohttp (3.14) forgets to, after a broken chunk."""
    import aiohttp

    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []

    def look() -> None:
        transport = response.connection and response.connection.transport
        if response.connection and (transport is None or transport.is_closing()):
            response.content.set_exception(aiohttp.ClientPayloadError("the connection is closed"))
        timers[:] = [loop.call_later(LOOK_AT_CONNECTION_S, look)]

    timers.append(loop.call_later(LOOK_AT_CONNECTION_S, look))
    try:
        yield
    finally:
        timers[0].cancel()


class Answer:
    """A provider's answer, as it comes in and up to so many bytes."""

    def __init__(self, response: aiohttp.ClientResponse, most_bytes: int) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise FailJob("a compressed answer, which was not asked for", UNUSABLE)
        self.status, self.headers = response.status, response.headers
        self._content, self._most_bytes, self._count = response.content, most_bytes, 0

    async def piece(self) -> bytes:
        """What came in meanwhile; nothing at the end. Raises FailJob: it is too much."""
        piece = await self._content.readany()
        self._count += len(piece)
        if self._count > self._most_bytes:
            raise FailJob(f"an answer of over {self._most_bytes} bytes", TOO_LARGE)
        return piece

    async def read(self) -> bytes:
        pieces = []
        while piece := await self.piece():
            pieces.append(piece)
        return b"".join(pieces)

    async def json(self) -> Any:
        return json.loads(await self.read())

    async def read_to_end(self) -> None:
        """Reads what comes behind the last event, so that the connection can be used again; hardly waits for it."""
        with contextlib.suppress(RetryJob, FailJob, TimeoutError), provider_errors():  # the text is whole already
            async with asyncio.timeout(LINGER_S):
                await self.read()

    async def refusal(self) -> JobError:
        """What a status other than success means for the job. Of the provider's own words only a plain code goes on."""
        error: Document = {}
        with contextlib.suppress(RetryJob, FailJob), provider_errors():  # without it the status says enough
            error = dict((await self.json())["error"])
        code = str(error.get("code") or "")
        safe_code = code if re.fullmatch(r"[\w.-]{1,64}", code) else ""
        fault = status_error(self.status, f"HTTP {self.status} {safe_code}".rstrip(), self.headers)
        names_successor = not error.get("param") and CAP_WITH_THINKING in str(error.get("message"))
        if self.status == 400 and (error.get("param") == CAP or names_successor):
            return FieldRefused(fault.detail, fault.sentence, CAP)
        return fault


class EventReader:
    """Takes server-sent events out of a stream of bytes (HTML standard, 9.2.6); of their fields only `data`."""

    def __init__(self) -> None:
        self.is_ended = False
        self._line: list[bytes] = []  # the parts of one that isn't whole yet
        self._line_bytes = 0
        self._data: list[bytes] = []
        self._had_half_an_end = False

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Yields the data of each event that ends in this piece, up to the provider's last one. Raises FailJob."""
        for line in self._lines(piece):
            if line.startswith(b"data:"):
                self._data.append(line[6 if line.startswith(b"data: ") else 5 :])
            elif not line and self._data:
                data = b"\n".join(self._data)
                self._data.clear()
                self.is_ended = data == LAST_EVENT
                if self.is_ended:
                    return
                if data:
                    yield data

    def _lines(self, piece: bytes) -> list[bytes]:
        """The lines that end in this piece; a line ends with CR, LF or both."""
        if self._had_half_an_end:
            piece = piece.removeprefix(b"\n")
        self._had_half_an_end = piece.endswith(b"\r")
        *lines, rest = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        if lines:
            lines[0] = b"".join([*self._line, lines[0]])
            self._line, self._line_bytes = [], 0
        self._line.append(rest)
        self._line_bytes += len(rest)
        if self._line_bytes > MOST_LINE_BYTES:
            raise FailJob(f"a line of over {MOST_LINE_BYTES} bytes in its stream", TOO_LARGE)
        return lines


class Breaker:
    """After some failures in a row only one job at a time tries whether the provider is back; the others wait."""

    def __init__(self) -> None:
        self._failures = 0
        self._paused_at = 0.0
        self._resume_at = 0.0

    async def wait(self, patience_s: float) -> None:
        """Waits while the provider is away.

        Raises:
            RetryJob: that took too long; it doesn't count as a try.
        """
        give_up_at = time.monotonic() + patience_s
        while (pause_s := self._resume_at - time.monotonic()) > 0:
            if time.monotonic() >= give_up_at:
                raise ProviderAway("the provider is away", after_s=pause_s, is_counted=False)
            await asyncio.sleep(min(pause_s, patience_s, POLL_PROVIDER_S))
        self._pause()  # the others wait for what comes of this job's try

    def _pause(self) -> None:
        if self._failures >= FAILURES_BEFORE_PAUSE:
            self._paused_at = time.monotonic()
            pause_s = 2.0 ** min(10, self._failures - FAILURES_BEFORE_PAUSE)
            self._resume_at = self._paused_at + min(LONGEST_PAUSE_S, pause_s)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Learns from how a call ends. Those that began before the pause tell nothing new by their failure."""
        began_at = time.monotonic()
        try:
            yield
        except ProviderAway:
            if began_at >= self._paused_at:
                self._failures += 1
                self._pause()
            raise
        except JobError:  # it was reached
            self._failures, self._resume_at = 0, 0.0
            raise
        self._failures, self._resume_at = 0, 0.0


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Global, and no IPv6 address that leads to an IPv4 one (6to4, Teredo, NAT64)."""
    if isinstance(address, ipaddress.IPv6Address):
        is_wrapped = address.sixtofour or address.teredo or address not in ipaddress.ip_network("2000::/3")
        return address.is_global and not is_wrapped
    return address.is_global and not address.is_multicast


async def public_address(host: str, port: int) -> str:
    """An address of the host, if all of them are public.

    Raises:
        FailJob: one is not, so that a provider can't make the worker read the operator's network.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(entry[4][0])) for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise FailJob("a picture's URL at an address that isn't public", UNUSABLE)
    return f"[{addresses[0]}]" if addresses[0].version == 6 else str(addresses[0])


class Completion:
    """A text answer as it comes in. Nothing makes a server keep to the types that the interface names."""

    def __init__(self, model: str) -> None:
        self._model, self._tokens = model, 0
        self._parts: list[str] = []
        self._length = 0
        self._has_begun, self._finish_reason = False, None

    def add(self, chunk: Document) -> str:
        """Takes one event; returns its piece of the text. Raises FailJob, or TypeError and the like on wrong shapes."""
        self._has_begun, piece = True, ""
        if chunk.get("error"):
            raise RetryJob("an error in the stream", ProviderAway.default_sentence)
        model, tokens = chunk.get("model"), (chunk.get("usage") or {}).get("total_tokens")
        if isinstance(model, str) and 0 < len(model) <= LONGEST_MODEL_NAME and model.isprintable():
            self._model = model
        if isinstance(tokens, int) and 0 < tokens < MOST_TOKENS:
            self._tokens = tokens
        for choice in chunk["choices"][:1]:
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
            piece = (choice.get("delta") or {}).get("content") or ""
        self._length += len(piece)
        if not isinstance(piece, str):
            raise TypeError("a piece of text that is none")
        if self._length > MOST_TEXT_CHARACTERS:
            raise FailJob(f"a text of over {MOST_TEXT_CHARACTERS} characters", TOO_LARGE)
        if piece:
            self._parts.append(piece)
        return piece

    def whole(self) -> TextAnswer:
        """The answer, if it came to its end. Raises RetryJob: half of it; FailJob: nothing usable."""
        if not self._has_begun:
            raise FailJob("an answer without any chunk", UNUSABLE)
        if self._finish_reason is None:
            raise RetryJob("the stream ended without a finish_reason: half a text", "The provider broke off")
        if self._finish_reason == "content_filter":
            raise FailJob("finish_reason content_filter", "The provider's content rules forbid this text.")
        if not self._parts:
            raise FailJob("an empty text", "The provider returned an empty text.")
        # Halves of a character that a server cut between two pieces come together again.
        text = "".join(self._parts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return TextAnswer(text, self._model, self._tokens or len(self._parts))


class OpenAIProvider:
    """Any OpenAI-compatible server. Made on the event loop that uses it."""

    def __init__(self, where: ProviderSettings, most_bytes: int) -> None:
        self.session = open_session()
        self.base_url = where.base_url.rstrip("/") or OPENAI_URL
        self._most_bytes = most_bytes
        self._breaker = Breaker()
        self._thinking_models: set[str] = set()
        self._proxy, parts = proxy_to(self.base_url), urllib.parse.urlsplit(self.base_url)
        self._host = parts.hostname
        has_key = where.api_key and "@" not in parts.netloc  # else that is what counts
        self._headers = {"authorization": f"Bearer {where.api_key}"} if has_key else {}

    @contextlib.asynccontextmanager
    async def _ask(self, method: str, url: str | yarl.URL, **options: Any) -> AsyncIterator[Answer]:
        async with self.session.request(method, url, allow_redirects=False, **options) as response:
            with connection_watched(response):
                yield Answer(response, self._most_bytes)

    @contextlib.asynccontextmanager
    async def call(self, method: str, path: str, body: Document | None = None) -> AsyncIterator[Answer]:
        """Asks, and yields the answer, which is still to be read; leaving it early closes the connection.

        Raises:
            RetryJob, FailJob: whatever goes wrong, inside too.
        """
        with self._breaker.watch(), provider_errors():
            url = self.base_url + path
            async with self._ask(method, url, json=body, headers=self._headers, proxy=self._proxy) as answer:
                if not 200 <= answer.status < 300:
                    raise await answer.refusal()
                yield answer

    async def ready(self, patience_s: float) -> None:
        await self._breaker.wait(patience_s)

    async def text(self, request: Document, on_delta: Callable[[str], None]) -> TextAnswer:
        """Asks again, where the model turns out to take the answer's cap under its newer name only."""
        model, cap = request["model"], request.get(CAP)
        if cap is not None and model not in self._thinking_models:
            try:
                return await self._stream(request, on_delta)
            except FieldRefused as refused:
                if refused.field != CAP:
                    raise
                self._thinking_models.add(model)
        if cap is not None:
            request = {**request, CAP_WITH_THINKING: cap + THINKING_TOKENS}
            del request[CAP]
        return await self._stream(request, on_delta)

    async def _stream(self, request: Document, on_delta: Callable[[str], None]) -> TextAnswer:
        completion, events = Completion(request["model"]), EventReader()
        body = {**request, "stream": True, "stream_options": {"include_usage": True}}
        async with self.call("POST", "/chat/completions", body) as answer:
            while not events.is_ended and (piece := await answer.piece()):
                for event in events.feed(piece):
                    if delta := completion.add(json.loads(event)):
                        on_delta(delta)
            await answer.read_to_end()
            return completion.whole()

    async def image(self, request: Document) -> tuple[bytes, str]:
        async with self.call("POST", "/images/generations", request) as answer:
            picture = (await answer.json())["data"][0]
            if data := picture.get("b64_json"):
                return base64.b64decode(data, validate=True), request["model"]
            if url := picture.get("url"):
                return await self._fetch(url), request["model"]
        raise FailJob("neither b64_json nor url", UNUSABLE)

    async def _fetch(self, url: str) -> bytes:
        """A picture that the provider names by URL: no credentials, and no address inside the operator's network."""
        import aiohttp
        import yarl

        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise FailJob(f"a picture at a {parts.scheme[:20]!r} URL", UNUSABLE)
        pinned, headers = parts._replace(netloc=parts.netloc.rpartition("@")[2]), {}
        if parts.hostname != self._host:
            address = await public_address(parts.hostname, parts.port or 443)
            headers = {"host": pinned.netloc}
            pinned = pinned._replace(netloc=f"{address}:{parts.port}" if parts.port else address)
        # Asked for at the address that was checked: a name may resolve to another one the second time.
        quoted = urllib.parse.quote(pinned.geturl(), safe="%/:?#[]@!$&'()*+,;=~")
        asked = yarl.URL(quoted, encoded=True)  # else as it is, since it may be signed
        options = {"headers": headers, "server_hostname": parts.hostname, "proxy": proxy_to(url)}
        try:
            async with self._ask("GET", asked, **options) as answer:
                if answer.status == 200:
                    return await answer.read()
        except (aiohttp.ClientError, OSError) as error:  # of the picture's host: it says nothing of the provider
            raise RetryJob(type(error).__name__, "The picture can't be fetched") from None
        fault = status_error(answer.status, f"HTTP {answer.status} for the picture's URL", answer.headers)
        raise RetryJob(fault.detail) if isinstance(fault, RetryJob) else fault

    async def speech(self, request: Document) -> tuple[bytes, str]:
        async with self.call("POST", "/audio/speech", request) as answer:
            return await answer.read(), request["model"]


class Providers:
    """One provider per server and key, made when first needed, in the process that generates."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._made: dict[tuple[asyncio.AbstractEventLoop, str, str], Provider] = {}

    def preload(self) -> None:
        """Imports the HTTP client before the first job needs it."""
        if not all(self._settings.provider(kind).is_offline for kind in PROVIDER_KINDS):
            importlib.import_module("aiohttp")

    def get(self, kind: ProviderKind) -> Provider:
        """The provider of one kind of generation. Call it on the event loop."""
        where = self._settings.provider(kind)
        if where.is_offline:
            import demo

            return demo.OfflineProvider()
        key = (asyncio.get_running_loop(), where.base_url, where.api_key)  # connections belong to their loop
        if key not in self._made:
            self._made[key] = OpenAIProvider(where, self._settings.max_answer_bytes)
        return self._made[key]


# ── handlers ─────────────────────────────────────────────────────────────────────────────────────────────────────

MOST_PROMPT_CHARACTERS = 100_000
LONGEST_PICTURE_SIDE = 4096
MOST_PICTURE_PIXELS = LONGEST_PICTURE_SIDE**2
PICTURE_SUFFIXES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
GPT_IMAGE_SIZES = ("1024x1024", "1536x1024", "1024x1536")
SOUND_MAGIC = {b"RIFF": "wav", b"OggS": "opus", b"fLaC": "flac", b"ID3": "mp3", b"\xff": "mp3"}


def check_words(value: str) -> str:
    if not value.strip():
        raise ValueError("should not be blank")
    return value


Prompt = Annotated[str, Field(max_length=MOST_PROMPT_CHARACTERS), AfterValidator(check_words)]


@dataclass(frozen=True)
class Call:
    """What a handler gets: the job, its checked input, the provider with its defaults, and where streamed text goes."""

    job: Job
    input: Any
    settings: Settings
    provider: Provider
    defaults: ProviderSettings
    progress: Callable[[str], None]

    @property
    def model(self) -> str:
        """The model asked for, if it is on the allow-list, else the default.

        Raises:
            FailJob: another one was asked for.
        """
        asked = getattr(self.input, "model", None)
        offered = (self.defaults.model, *self.defaults.allowed_models)
        if asked is None or asked in offered:
            return asked or self.defaults.model
        raise FailJob(
            "a model that isn't on the list", f"This model isn't offered. Choose one of: {', '.join(offered)}."
        )


@dataclass(frozen=True)
class Handler:
    run: Callable[[Call], Awaitable[Result]]
    input_model: type[BaseModel]
    provider: ProviderKind


HANDLERS: dict[str, Handler] = {}


def handles(
    job_type: str, input_model: type[BaseModel], *, provider: ProviderKind = "text"
) -> Callable[[Callable[[Call], Awaitable[Result]]], Callable[[Call], Awaitable[Result]]]:
    """Makes an async function the handler of a job type: it gets a Call and returns a Result.

    `input_data` is checked by `input_model` first. The function raises RetryJob or FailJob to end the attempt so.
    """

    def register(run: Callable[[Call], Awaitable[Result]]) -> Callable[[Call], Awaitable[Result]]:
        HANDLERS[job_type] = Handler(run, input_model, provider)
        return run

    return register


def find_handler(job_type: str) -> Handler:
    """The handler of a job type.

    Raises:
        FailJob: there is none.
    """
    if job_type in HANDLERS:
        return HANDLERS[job_type]
    raise FailJob("no handler for this job type", f"This kind of job isn't known here: {job_type[:40]!r}.")


def check_input(handler: Handler, input_data: object) -> BaseModel:
    """The checked input, before anything is spent.

    Raises:
        FailJob: with a sentence about the first fault.
    """
    try:
        return handler.input_model.model_validate(input_data)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in fault["loc"][:3])
        what = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
        sentence = f"The input can't be used: {where or 'it'} {what[:1].lower()}{what[1:]}."
        raise FailJob(f"input: {where[:40]} {fault['type']}", sentence) from None


class JobInput(BaseModel):
    """Base of the inputs: null means missing, numbers are finite, true is no number, unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError("should be an object with the job's parameters")
        return {key: value for key, value in data.items() if value is not None}

    @field_validator("*", mode="before")
    @classmethod
    def refuse_booleans(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("should not be true or false")
        return value


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "user", "assistant"]
    content: Prompt


class TextInput(JobInput):
    prompt: Prompt | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=200)] | None = None
    system: Prompt | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stop: Annotated[str, Field(max_length=200)] | Annotated[list[str], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    response_format: dict[str, Any] | None = None
    model: str | None = None

    PASSED_ON: ClassVar = ("temperature", "top_p", "stop", "seed", "response_format")

    @model_validator(mode="after")
    def need_words(self) -> TextInput:
        if not self.prompt and not self.messages:
            raise ValueError("needs a `prompt`")
        if sum(len(message.content) for message in self.messages or ()) > MOST_PROMPT_CHARACTERS:
            raise ValueError(f"has messages of over {MOST_PROMPT_CHARACTERS} characters")
        if self.response_format and len(json.dumps(self.response_format, default=str)) > MOST_PROMPT_CHARACTERS:
            raise ValueError("has too large a `response_format`")
        return self

    def conversation(self) -> list[dict[str, str]]:
        """System message, messages, prompt: in this order, as far as given."""
        system = [Message(role="system", content=self.system)] if self.system else []
        prompt = [Message(role="user", content=self.prompt)] if self.prompt else []
        return [message.model_dump() for message in (*system, *(self.messages or ()), *prompt)]


@handles("text_generation", TextInput, provider="text")
async def text_generation(call: Call) -> Result:
    """Streams a chat completion; the person reads it while it grows."""
    asked: TextInput = call.input
    most = call.settings.text_max_tokens
    if asked.max_tokens and asked.max_tokens > most:
        raise FailJob("max_tokens over the cap", f"The input can't be used: max_tokens should be at most {most}.")
    request = {"model": call.model, "messages": asked.conversation(), "max_tokens": asked.max_tokens or most}
    request |= {key: getattr(asked, key) for key in TextInput.PASSED_ON if getattr(asked, key) is not None}
    answer = await call.provider.text(request, call.progress)
    return Result({"generated_text": answer.text, "model_used": answer.model, "tokens_used": answer.tokens})


class ImageInput(JobInput):
    prompt: Prompt
    size: str = Field("1024x1024", pattern=rf"^(auto|{IMAGE_SIZE})$")
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = None
    model: str | None = None

    @field_validator("size")
    @classmethod
    def check_sides(cls, value: str) -> str:
        if value != "auto" and max(map(int, value.split("x"))) > LONGEST_PICTURE_SIDE:
            raise ValueError(f"should be at most {LONGEST_PICTURE_SIDE}x{LONGEST_PICTURE_SIDE}")
        return value


def nearest_size(asked: str, offered: Sequence[str]) -> str:
    """The offered size that comes closest in shape, then in area; the asked one where anything goes."""
    if not offered or asked == "auto" or asked in offered:
        return asked
    width, height = map(int, asked.split("x"))

    def distance(size: str) -> tuple[float, float]:
        w, h = map(int, size.split("x"))
        return round(abs(math.log(w / h * height / width)), 2), abs(math.log(w * h / width / height))

    return min(offered, key=distance)


def inspect_picture(data: bytes) -> tuple[str, str]:
    """Resolution and file suffix of a picture that decodes to its end.

    Raises:
        FailJob: it is no PNG, JPEG or WebP, is cut off, or would unpack to too much.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=list(PICTURE_SUFFIXES)) as picture:
            width, height = picture.size
            if width * height > MOST_PICTURE_PIXELS:
                raise FailJob(f"a picture of {width}x{height}", "The provider's picture is too large.")
            picture.load()
            return f"{width}x{height}", PICTURE_SUFFIXES[str(picture.format)]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FailJob(f"no picture: {type(error).__name__}", UNUSABLE) from None


@handles("image_generation", ImageInput, provider="image")
async def image_generation(call: Call) -> Result:
    """Generates a picture; its resolution is read from its bytes."""
    asked: ImageInput = call.input
    is_gpt_image = call.model.startswith("gpt-image") and not call.defaults.base_url
    sizes = call.settings.image_sizes or (GPT_IMAGE_SIZES if is_gpt_image else ())
    request = {"model": call.model, "prompt": asked.prompt, "n": 1, "size": nearest_size(asked.size, sizes)}
    if asked.quality:
        request["quality"] = asked.quality
    data, model = await call.provider.image(request)
    resolution, suffix = await asyncio.to_thread(inspect_picture, data)
    return Result({"model_used": model, "resolution": resolution}, Media(data, suffix, "image_url"))


class AudioInput(JobInput):
    text: Prompt | None = None
    prompt: Prompt | None = None
    voice: str = Field("default", pattern=r"^[\w .:/-]{1,64}$")
    speed: float | None = Field(None, ge=0.25, le=4)
    format: Literal["wav", "mp3", "opus", "flac"] | None = None
    model: str | None = None

    @model_validator(mode="after")
    def need_words(self) -> AudioInput:
        if not self.text and not self.prompt:
            raise ValueError("needs a `text` (or a `prompt`)")
        return self


def with_true_sizes(wav: bytes) -> bytes:
    """Streaming servers send WAV headers with unknown sizes, which read as 24 hours: writes the true ones."""
    at = 12
    while at + 8 <= len(wav):
        name, size = struct.unpack_from("<4sI", wav, at)
        if name == b"data":
            whole, data = struct.pack("<I", len(wav) - 8), struct.pack("<I", min(size, len(wav) - at - 8))
            return wav[:4] + whole + wav[8 : at + 4] + data + wav[at + 8 :]
        at += 8 + size + size % 2
    return wav


def inspect_sound(data: bytes) -> tuple[bytes, float, str]:
    """The sound with a true header, its duration in seconds, and its format.

    Raises:
        FailJob: it is no WAV, MP3, Ogg Opus or FLAC, or has no duration.
    """
    from tinytag import TinyTag
    from tinytag.tinytag import TinyTagException

    sound_format = next((name for magic, name in SOUND_MAGIC.items() if data.startswith(magic)), None)
    if sound_format == "wav":
        data = with_true_sizes(data)
    try:
        duration_s = TinyTag.get(file_obj=io.BytesIO(data), tags=False).duration if sound_format else None
    except (TinyTagException, OSError, ValueError, LookupError, struct.error) as error:
        raise FailJob(f"no sound: {type(error).__name__}", UNUSABLE) from None
    if not sound_format or not duration_s or not math.isfinite(duration_s):
        raise FailJob("no sound that has a duration", UNUSABLE)
    return data, round(duration_s, 2), sound_format


@handles("audio_generation", AudioInput, provider="audio")
async def audio_generation(call: Call) -> Result:
    """Speaks the text; format and duration are read from the bytes."""
    asked: AudioInput = call.input
    request: Document = {
        "model": call.model,
        "input": asked.text or asked.prompt,
        "voice": call.settings.audio_voice if asked.voice == "default" else asked.voice,
        "response_format": asked.format or call.settings.audio_format,
    }
    if asked.speed:
        request["speed"] = asked.speed
    data, model = await call.provider.speech(request)
    data, duration_s, sound_format = await asyncio.to_thread(inspect_sound, data)
    output = {"model_used": model, "duration_seconds": duration_s, "format": sound_format}
    return Result(output, Media(data, sound_format, "audio_url"))


# ── recovery ─────────────────────────────────────────────────────────────────────────────────────────────────────

TICK_S = 1.0
KEEPER_PATIENCE_S = 5.0
ANNOUNCED_WITHIN_S = 1.0
LIMIT_MARGIN_S = 5.0
DEADLINE_TOLERANCE_S = 1.0
NOTICE_OVERDUE_S = 30.0
ARTIFACT_SWEEP_S = 3600.0
ARTIFACT_NAME = re.compile(r"[0-9a-f]{24}-[0-9a-f]{16}\.")
INDEX_PATIENCE_S = 3600.0
QUEUE_REST_S = 5.0
BROKER_PATIENCE_S = 2
TOOK_TOO_LONG = "This took too long and was stopped. Please try again, perhaps with a smaller request."
STOPPED = "This was stopped by the operator."
GAVE_UP = "This could not be finished after several tries. Please try again."


class ShutdownTime:
    """When a shutdown's grace ends, in 8 bytes that the parent shares with every child of a fork."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    def announce(self, grace_s: float) -> None:
        """Called in a signal handler: nothing but the write. The monotonic clock is the host's, the same in all."""
        due_at = time.monotonic() + grace_s
        self._memory[:] = struct.pack("d", min(due_at, self.due_at or due_at))

    @property
    def due_at(self) -> float | None:
        return float(struct.unpack("d", self._memory[:])[0]) or None

    @property
    def is_announced(self) -> bool:
        return self.due_at is not None

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= (self.due_at or math.inf)

    def is_announced_soon(self) -> bool:
        """Waits a moment: a signal to the whole process group may reach a child before its parent has announced it."""
        give_up_at = time.monotonic() + ANNOUNCED_WITHIN_S
        while not self.is_announced and time.monotonic() < give_up_at:
            time.sleep(0.02)
        return self.is_announced


class Attempt:
    """One claimed run of a job, as task, event loop and keeper share it."""

    def __init__(self, job: Job, lease_s: float, taken_at: float | None = None) -> None:
        self.job = job
        self.started_at = time.monotonic() if taken_at is None else taken_at  # when Celery's timer began
        self.lease_s = lease_s
        self.renewed_at = job.leased_at
        self.reason: JobError | None = None
        self._stop: Callable[[], object] | None = None
        self._lock = threading.Lock()

    def is_lease_fresh(self) -> bool:
        return time.monotonic() < self.renewed_at + self.lease_s

    def may_renew(self) -> bool:
        """No lease is immortal: none past the hard limit plus a margin."""
        return time.monotonic() < self.started_at + self.job.limits.hard_s + LIMIT_MARGIN_S

    def time_left_s(self) -> float:
        """The soft limit, or less where the claim had to wait so long that the hard limit would come first."""
        limits = self.job.limits
        latest = self.started_at + limits.hard_s - min(LIMIT_MARGIN_S, limits.hard_s - limits.soft_s)
        return max(0.0, min(limits.soft_s, latest - time.monotonic()))

    def bind(self, stop: Callable[[], object]) -> None:
        """Says how to stop the running handler; at once, if a cancel came before."""
        with self._lock:
            self._stop = stop
            if self.reason:
                stop()

    def cancel(self, reason: JobError) -> None:
        """Stops the handler, which closes its connection to the provider; only the first reason counts."""
        with self._lock:
            if self.reason is None:
                self.reason = reason
                if self._stop:
                    self._stop()


def broker_errors() -> tuple[type[BaseException], ...]:
    """What the broker's transport raises when it can't be reached; each has exceptions of its own."""
    connection = app.connection_for_write()
    unconfirmed = connection.recoverable_connection_errors
    return (OperationalError, OSError, *connection.connection_errors, *connection.channel_errors, *unconfirmed)


def final_sentence(document: Document) -> str:
    """What the person reads about a job that has ended."""
    if document["status"] == Status.FAILED:
        return str(document.get("error_message") or "The job has failed.")
    return "Your result is ready."


def is_process_alive(pid: int) -> bool:
    """Whether it runs. One that was killed and that nobody has waited for yet (a zombie, seen on Linux) doesn't."""
    with contextlib.suppress(OSError):
        # The state follows the command's name, which may hold anything, in brackets.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, but there
        return True
    return True


@contextlib.contextmanager
def broker_connection() -> Iterator[Any]:
    """A connection that gives up soon: a hung broker must not hold the keeper up.

    What is published by it is there: RabbitMQ has confirmed it.
    """
    connection = app.connection_for_write(connect_timeout=BROKER_PATIENCE_S)
    of_redis = dict.fromkeys(("socket_connect_timeout", "socket_timeout"), BROKER_PATIENCE_S)
    of_rabbitmq = {**dict.fromkeys(("read_timeout", "write_timeout"), BROKER_PATIENCE_S), "confirm_publish": True}
    connection.transport_options = {**(connection.transport_options or {}), **of_redis, **of_rabbitmq}
    try:
        yield connection
    except BaseException:
        connection.collect()  # a farewell would wait once more
        raise
    connection.release()


def queue_length(settings: Settings) -> int:
    """Messages that no worker holds yet. A queue that isn't there is empty: Redis keeps no empty lists."""
    with broker_connection() as connection:
        try:
            return int(connection.default_channel.queue_declare(settings.celery_queue_name, passive=True).message_count)
        except connection.channel_errors:
            return 0


class Sweeper:
    """Finds jobs that nobody works on and gets them going again, or ends them at their bounds.

    Safe in any number of processes: each step is a compare-and-set.
    """

    def __init__(
        self, store: JobStore, notifier: Notifier, artifacts: Callable[[], Artifacts], settings: Settings
    ) -> None:
        self._store, self._notifier, self._artifacts, self._settings = store, notifier, artifacts, settings
        self._mute_until = 0.0
        self._artifacts_at = 0.0
        self._queue_log = SeldomLog("nothing can be put back into the queue")
        self._queue_away_until = 0.0

    def sweep(self) -> list[str]:
        """One round; returns a line for each thing done.

        Raises:
            StoreUnavailable: MongoDB can't be reached.
        """
        done: list[str] = []
        no_use: tuple[type[BaseException], ...] = (SpoolUnavailable, *broker_errors())
        try:
            if time.monotonic() >= self._queue_away_until:
                self._recover_jobs(done)
                self._queue_log.fine()
        except no_use as error:  # the rest waits, and costs the keeper no time: leases have to be renewed
            self._queue_log.fault(type(error).__name__)
            self._queue_away_until = time.monotonic() + QUEUE_REST_S
        overdue = self._store.find_unnotified(NOTICE_OVERDUE_S)
        sent = [document["_id"] for document in overdue if self._announce(document)]
        if sent:
            self._store.mark_notified(sent)
        return done + [f"job={job_id} its last notification was sent again" for job_id in sent]

    def _recover_jobs(self, done: list[str]) -> None:
        """Adds a line for each job that goes on, or ends. Raises SpoolUnavailable, or what the broker's client does."""
        for job_id in self._notifier.revoked():
            done += self._fail_revoked(job_id)
        for document in self._store.find_stale():
            done += self._rescue(document)
        for document in self._store.find_forgotten_pending(partial(queue_length, self._settings)):
            if self._store.postpone_rescue(document):
                self._enqueue(document)
                done.append(f"job={document['_id']} its message was lost: put into the queue again")

    def is_time_for_artifacts(self) -> bool:
        """Once an hour, for one process of all."""
        if time.monotonic() < self._artifacts_at:
            return False
        self._artifacts_at = time.monotonic() + ARTIFACT_SWEEP_S
        return self._notifier.take_turn("artifact_sweep", ARTIFACT_SWEEP_S)

    def sweep_artifacts(self, *, all_of_them: bool = False) -> list[str]:
        """Deletes files that attempts which died left behind, and files past `ARTIFACT_RETENTION_DAYS`.

        Names begin with the time of their job, so that without retention only those of the last day are looked at.

        Raises:
            StoreUnavailable, FailJob: MongoDB or the artifact store can't be reached, or refuses.
        """
        artifacts, now = self._artifacts(), self._store.now()
        kept_days = self._settings.artifact_retention_days
        oldest = ObjectId.from_datetime(now - timedelta(days=kept_days)) if kept_days else ObjectId("0" * 24)
        period = int(now.timestamp()) >> 16  # the first four of the 24 digits change every 18 hours
        prefixes = [""] if all_of_them or kept_days else [f"{period - 1:04x}", f"{period:04x}"]
        ours = (name for prefix in prefixes for name in artifacts.names(prefix) if ARTIFACT_NAME.match(name))
        deleted = 0
        while batch := list(itertools.islice(ours, STALE_BATCH)):
            for name in {*self._store.find_unnamed(batch), *(name for name in batch if name < str(oldest))}:
                artifacts.delete(name)
                deleted += 1
        return [f"{deleted} file(s) deleted that no job names, or that are past their time"] if deleted else []

    def _fail_revoked(self, job_id: str) -> list[str]:
        failed = self._store.fail_active(ObjectId(job_id), STOPPED)
        self._notifier.forget_revoked(job_id)
        if failed and self._announce(failed):
            self._store.mark_notified([failed["_id"]])
        return [f"job={job_id} failed: its task was revoked"] if failed else []

    def _rescue(self, document: Document) -> list[str]:
        job_id = document["_id"]
        if self._store.is_past_bounds(document) and not self._notifier.spooled_result(job_id):
            return self._fail(document, GAVE_UP)
        if not self._store.release_stale(document):
            return []
        self._enqueue(document)
        return [f"job={job_id} nobody worked on it: put back into the queue"]

    def _fail(self, document: Document, sentence: str) -> list[str]:
        if not self._store.fail_stale(document, sentence):
            return []
        failed = {**document, "status": Status.FAILED, "error_message": sentence}
        if self._announce(failed):
            self._store.mark_notified([document["_id"]])
        return [f"job={document['_id']} failed: {sentence}"]

    def _announce(self, document: Document) -> bool:
        """After a failure none is tried for a while: each would wait for Redis, and leases have to be renewed."""
        if time.monotonic() < self._mute_until:
            return False
        sent = self._notifier.publish_status(document, Status(document["status"]), final_sentence(document))
        self._mute_until = 0.0 if sent else time.monotonic() + NOTICE_OVERDUE_S
        return sent

    def _enqueue(self, document: Document) -> None:
        """A fresh task id, since a revoked one would be thrown away; no prompt, since the document has it."""
        job_id = str(document["_id"])
        hard_s, soft_s = bookkeeping(document).get("limits") or (None, None)
        options: Document = {"queue": self._settings.celery_queue_name, "time_limit": hard_s, "soft_time_limit": soft_s}
        try:
            with broker_connection() as connection:
                # Nobody knows this task id, so nobody asks for its result; and preparing one would wait for Redis.
                app.send_task(
                    TASK_NAME,
                    args=(job_id, {"job_id": job_id}),
                    connection=connection,
                    retry=False,
                    ignore_result=True,
                    **options,
                )
        except broker_errors():
            self._store.rescue_soon(document)
            raise

    def release_dead_siblings(self) -> list[str]:
        """Lets go of the jobs of this node's dead processes: killed (try again), or over the hard limit (failed)."""
        lines: list[str] = []
        for document in self._store.find_siblings():
            if is_process_alive(document["worker"]["pid"]):
                continue
            deadline = document["worker"]["deadline"].replace(tzinfo=UTC)
            if self._store.now() >= deadline - timedelta(seconds=DEADLINE_TOLERANCE_S):
                lines += self._fail(document, TOOK_TOO_LONG)
            elif self._store.release_stale(document):
                with contextlib.suppress(*broker_errors()):  # then the next rescue does it
                    self._enqueue(document)  # another worker may have dropped Celery's own, while the lease was alive
                lines.append(f"job={document['_id']} its process died: released")
        return lines


class Heartbeat:
    """A file per process that runs jobs, touched by its keeper; `health` looks at their age."""

    STALE_S = 60.0

    def __init__(self, folder: Path | None = None) -> None:
        self._given_folder = folder
        self._log = SeldomLog("the heartbeat file can't be written")

    @property
    def _folder(self) -> Path:
        """Raises OSError where nothing can be written at all."""
        return self._given_folder or Path(tempfile.gettempdir()) / f"ai-backend-worker-{os.getuid()}"

    def beat(self) -> None:
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            (self._folder / str(os.getpid())).touch()
        except OSError as error:
            self._log.fault(error.strerror)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            (self._folder / str(os.getpid())).unlink()

    def ages_s(self) -> dict[int, float]:
        """Seconds since the last beat, by process, of those that are still there."""
        files = [path for path in self._folder.glob("*") if path.name.isdigit()]
        alive = [path for path in files if is_process_alive(int(path.name))]
        return {int(path.name): time.time() - path.stat().st_mtime for path in alive}


class Keeper:
    """One thread per process that runs jobs: keeps their leases, hears of cancels, hands back at shutdown, sweeps."""

    def __init__(
        self, store: JobStore, sweeper: Sweeper, shutdown: ShutdownTime, heartbeat: Heartbeat, settings: Settings
    ) -> None:
        self._store, self._sweeper, self._shutdown, self._heartbeat = store, sweeper, shutdown, heartbeat
        self._settings = settings
        self._attempts: dict[str, Attempt] = {}
        self._notified: list[ObjectId] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._store_log = SeldomLog("MongoDB can't be reached")
        self._is_prepared = False
        self._renew_at = 0.0
        self._answered_at = time.monotonic()
        self._sweep_at = time.monotonic() + settings.lease_seconds  # rest one lease: its owners may be about to renew

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its last tick, which writes down what was notified."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=KEEPER_PATIENCE_S)
        self._heartbeat.stop()

    def register(self, attempt: Attempt) -> None:
        with self._lock:
            self._attempts[attempt.job.owner] = attempt

    def unregister(self, attempt: Attempt) -> None:
        with self._lock:
            self._attempts.pop(attempt.job.owner, None)

    def note_published(self, job_id: ObjectId) -> None:
        """Takes a job out of the outbox, with the next batch."""
        with self._lock:
            self._notified.append(job_id)

    def _run(self) -> None:
        stopping = False
        while True:
            try:
                self.tick()
            except StoreUnavailable as error:
                self._store_log.fault(error)
                self._renew_at = 0.0
                self._sweep_at = time.monotonic() + self._settings.lease_seconds
            except Exception:  # the edge of the thread: without it no lease would be kept
                logger.exception("the keeper goes on after")
            if stopping:
                return
            stopping = self._stopping.wait(TICK_S)

    def tick(self) -> None:
        """One look at everything, most urgent first.

        Raises:
            StoreUnavailable: MongoDB can't be reached; leases run on, and the next tick renews before anything else.
        """
        self._heartbeat.beat()
        with self._lock:
            attempts = list(self._attempts.values())
        if self._shutdown.is_due:
            for attempt in attempts:
                attempt.cancel(HandBack("the grace of the shutdown is over"))
        with pymongo.timeout(KEEPER_PATIENCE_S):
            self._renew(attempts)
            self._cancel_lost(attempts)
            self._empty_outbox()
            self._prepare_store()
            if time.monotonic() >= self._sweep_at and not self._shutdown.is_announced:
                self._sweep()
        self._answered_at = time.monotonic()
        self._store_log.fine()

    def _renew(self, attempts: list[Attempt]) -> None:
        if time.monotonic() < min(self._renew_at, self._sweep_at):
            return
        at, primary_before = time.monotonic(), self._store.primary
        self._store.synchronise_clock()
        silent_s = time.monotonic() - self._answered_at  # MongoDB hung, or this process was frozen
        if primary_before != self._store.primary or silent_s > max(self._settings.lease_seconds / 2, 2 * TICK_S):
            # Owners whose leases ran out meanwhile may be about to renew.
            self._sweep_at = max(self._sweep_at, time.monotonic() + self._settings.lease_seconds)
        kept = [attempt for attempt in attempts if attempt.may_renew()]
        if kept:
            self._store.renew_leases([attempt.job for attempt in kept])
        for attempt in kept:
            attempt.renewed_at = at
        self._renew_at = at + self._settings.lease_seconds / 3

    def _cancel_lost(self, attempts: list[Attempt]) -> None:
        if not attempts:
            return
        lost = {job.owner for job in self._store.find_lost([attempt.job for attempt in attempts])}
        for attempt in attempts:
            if attempt.job.owner in lost:
                attempt.cancel(DropJob("cancelled, or taken by another worker"))

    def _empty_outbox(self) -> None:
        with self._lock:
            batch, self._notified = self._notified, []
        try:
            if batch:
                self._store.mark_notified(batch)
        except StoreUnavailable:
            with self._lock:
                self._notified += batch
            raise

    def _prepare_store(self) -> None:
        """Once: the indexes, and what this node's dead processes left."""
        if self._is_prepared:
            return
        for line in self._sweeper.release_dead_siblings():
            logger.warning(line)
        self._is_prepared = True
        threading.Thread(target=self._ensure_indexes, name="indexes", daemon=True).start()

    def _ensure_indexes(self) -> None:
        """In a thread of its own: on a large collection it takes longer than leases can wait."""
        try:
            with pymongo.timeout(INDEX_PATIENCE_S):
                self._store.ensure_indexes()
        except StoreUnavailable as error:
            logger.warning("indexes could not be made (%s): the worker runs without, more slowly", error)

    def _sweep(self) -> None:
        self._sweep_at = time.monotonic() + self._settings.sweep_interval * random.uniform(0.8, 1.2)
        for line in self._sweeper.release_dead_siblings() + self._sweeper.sweep():
            logger.warning(line)
        if self._sweeper.is_time_for_artifacts():
            threading.Thread(target=self._sweep_artifacts, name="artifacts", daemon=True).start()

    def _sweep_artifacts(self) -> None:
        """In a thread of its own: a slow store of files must not cost leases."""
        try:
            for line in self._sweeper.sweep_artifacts():
                logger.info(line)
        except (StoreUnavailable, FailJob) as error:
            logger.warning("files of lost attempts are looked for again in an hour: %s", error)


# ── task ─────────────────────────────────────────────────────────────────────────────────────────────────────────

STUCK_LOOP_S = 5.0  # how long after its deadline a handler may take to end
STORE_PATIENCE_S = 60.0
PUT_BACK_S = 10.0
POLL_STORE_S = 1.0
SETTLE_TRY_S = 5.0
MOMENT_S = 0.2
WAITING_QUEUE_S = 60
LONGEST_TASK_ID = 200
DAMAGED = "Your request reached us damaged. Please send it again."
SHUTDOWN = ShutdownTime()  # made before the fork, so that children share it
Outcome = Result | JobError
Reply = TypeVar("Reply")


class EventLoopThread:
    """One event loop per process, in its own thread; a loop that a handler has blocked is left behind."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def submit(self, coroutine: Coroutine[Any, Any, Result]) -> tuple[Future[Result], asyncio.AbstractEventLoop]:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="event-loop", daemon=True).start()
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop), self._loop

    def abandon(self, loop: asyncio.AbstractEventLoop) -> None:
        """The next job gets a new loop. What else runs on the blocked one goes on when its handler lets go."""
        with self._lock:
            if self._loop is loop:
                self._loop = None


class Runtime:
    """What one process works with. Everything is made when first used, so never in the parent of a fork."""

    def __init__(self, settings: Settings, mongo: pymongo.MongoClient[Document] | None = None) -> None:
        self.settings = settings
        if mongo is not None:
            self.mongo = mongo

    @cached_property
    def mongo(self) -> pymongo.MongoClient[Document]:
        url = self.settings.mongodb_url.get_secret_value()
        return pymongo.MongoClient(url, timeoutMS=MONGODB_TIMEOUT_MS, appname="ai-backend-worker")

    @cached_property
    def database(self) -> Database[Document]:
        # For the files: whatever the URL says, a completed job must not name one that a new primary never got.
        return self.mongo.get_database(
            self.settings.database_name,
            read_preference=ReadPreference.PRIMARY,
            write_concern=WriteConcern("majority", j=True),
            read_concern=ReadConcern("majority"),
        )

    @cached_property
    def store(self) -> JobStore:
        return JobStore(self.database, NODE, Clock(), self.settings)

    @cached_property
    def notifier(self) -> Notifier:
        options = {
            "socket_connect_timeout": 2,
            "socket_timeout": 2,
            "socket_keepalive": True,
            "health_check_interval": 25,
        }
        client = redis.Redis.from_url(self.settings.redis_url.get_secret_value(), **options)
        return Notifier(client, self.settings.database_name)

    @cached_property
    def artifacts(self) -> Artifacts:
        return open_artifacts(self.settings, lambda: self.database)

    @cached_property
    def providers(self) -> Providers:
        return Providers(self.settings)

    # One for all jobs of the process: an outage is one fault, however many meet it.

    @cached_property
    def waiting_log(self) -> SeldomLog:
        return SeldomLog("jobs wait for MongoDB")

    @cached_property
    def unwritten_log(self) -> SeldomLog:
        return SeldomLog("what jobs came to can't be written down yet")

    @cached_property
    def loop(self) -> EventLoopThread:
        return EventLoopThread()

    @cached_property
    def sweeper(self) -> Sweeper:
        return Sweeper(self.store, self.notifier, lambda: self.artifacts, self.settings)

    @cached_property
    def keeper(self) -> Keeper:
        return Keeper(self.store, self.sweeper, SHUTDOWN, Heartbeat(), self.settings)


JOB_ID = re.compile(r"[0-9a-fA-F]{24}")


class JobRequest(Request):
    """A message in the parent: drops Celery's soft limit, since the attempt's own deadline serves in every pool.

    Of its arguments, which hold the prompt, `inspect` and the events tell the job's id alone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        task: Any = self.task
        limits = task.runtime.settings.limits(self.request_dict.get("timelimit"))
        self.time_limits = (limits.hard_s, None)
        self._told = [value for value in self.args[:1] if isinstance(value, str) and JOB_ID.fullmatch(value)]
        self._argsrepr, self._kwargsrepr = repr(self._told), "{}"

    def info(self, safe: bool = False) -> Any:
        return {**super().info(safe), "args": self._told, "kwargs": {}}


def is_plain(value: object) -> bool:
    """Whether it can be a key of Redis and stand in a log line."""
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= LONGEST_TASK_ID


class JobTask(Task):  # type: ignore[type-arg]
    abstract = True
    Request = JobRequest  # type: ignore[assignment]
    typing = False  # a message of the wrong shape gets an answer of ours

    def start_strategy(self, app: Celery, consumer: Any, **options: Any) -> Callable[..., Any]:
        """Celery's way to take a message, behind a check: a body of another shape would end its consumer."""
        take: Callable[..., Any] = super().start_strategy(app, consumer, **options)

        def check_and_take(message: Any, *rest: Any, **named: Any) -> Any:
            body, headers = message.payload, message.headers
            stamps = headers.get("stamped_headers") or []
            task_id = body.get("id") if isinstance(body, dict) else headers.get("id")
            if not is_plain(task_id) or not isinstance(stamps, list) or not all(map(is_plain, stamps)):
                raise InvalidTaskError("its id or its stamps are no text")
            parts = [body.get("args"), body.get("kwargs"), None] if isinstance(body, dict) else body
            if not isinstance(parts, list) or list(map(type, parts[:2])) != [list, dict] or len(parts) != 3:
                raise InvalidTaskError("its body is not [args, kwargs, options]")
            return take(message, *rest, **named)

        return check_and_take

    @cached_property
    def runtime(self) -> Runtime:
        return Runtime(current_settings())


def waiting_queue(name: str, wait_s: int) -> Queue:
    """Where RabbitMQ keeps messages that wait so long; then they go to the queue. It ends when nobody uses it."""
    back = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": name}
    times = {"x-message-ttl": wait_s * 1000, "x-expires": (wait_s + WAITING_QUEUE_S) * 1000}
    return Queue(f"{name}.waiting-{wait_s}s", queue_arguments={**back, **times})


def put_back(task: JobTask, job_id: ObjectId, wait_s: float) -> Exception:
    """What to raise to see the message again later, under the same task id and limits, without its prompt."""
    arguments: Document = {"args": (str(job_id), {"job_id": str(job_id)}), "kwargs": {}, "countdown": wait_s}
    settings = task.runtime.settings
    if settings.is_rabbitmq:  # in a worker's memory it would hold a slot
        arguments |= {"countdown": 0, "queue": waiting_queue(settings.celery_queue_name, math.ceil(wait_s))}
    try:
        return task.retry(**arguments, max_retries=None, throw=False)
    except Reject:  # the broker is away: Celery's own reject would throw the message away
        return Reject("the broker is away", requeue=True)


def message_limits(task: JobTask) -> Limits:
    return task.runtime.settings.limits(task.request.timelimit)


def wait_for_store(task: JobTask, job_id: ObjectId, action: Callable[[], Reply]) -> Reply:
    """Does something in MongoDB before the job is claimed. While MongoDB is away it waits: no other job could run.

    Raises:
        Retry: it took too long, the message comes again; Reject: the worker is shutting down.
    """
    give_up_at = time.monotonic() + min(STORE_PATIENCE_S, message_limits(task).soft_s / 2)
    log = task.runtime.waiting_log
    while True:
        try:
            # A call that hangs must not reach the hard limit, which would kill the process and lose the message.
            with pymongo.timeout(min(MONGODB_TIMEOUT_MS / 1000, max(POLL_STORE_S, give_up_at - time.monotonic()))):
                answer = action()
            log.fine()
            return answer
        except StoreUnavailable as error:
            log.fault(f"job={job_id} {error}")
        if SHUTDOWN.is_announced:
            raise Reject("shutting down", requeue=True)
        if time.monotonic() > give_up_at:
            raise put_back(task, job_id, PUT_BACK_S)
        time.sleep(POLL_STORE_S)


def announce(runtime: Runtime, document: Document, status: Status, sentence: str) -> None:
    """Publishes a status which the document has; a terminal one then leaves the outbox."""
    if runtime.notifier.publish_status(document, status, sentence) and status in TERMINAL_STATUSES:
        runtime.keeper.note_published(document["_id"])


def fail_unowned(task: JobTask, job_id: ObjectId, sentence: str) -> JobFailed:
    """Fails a job that nobody runs, tells the person, and returns what to raise."""
    runtime = task.runtime
    if wait_for_store(task, job_id, lambda: runtime.store.fail_unowned(job_id, sentence)):
        document = wait_for_store(task, job_id, lambda: runtime.store.read(job_id)) or {"_id": job_id}
        announce(runtime, document, Status.FAILED, sentence)
    return JobFailed(sentence)


def job_named(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, Document]:
    """The job id in a message's arguments, and these by name. Raises JobFailed: there is none."""
    arguments = dict(zip(("job_id", "job_data"), args, strict=False)) | dict(kwargs)
    job_id = arguments.get("job_id")
    if not isinstance(job_id, str) or not JOB_ID.fullmatch(job_id):
        logger.error("dropped a message without a job id (24 hex digits)")
        raise JobFailed("The message names no job.")
    return job_id, arguments


def read_message(task: JobTask, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ObjectId:
    """The job's id. A message of another shape fails the document that it names, if there is one.

    Raises:
        JobFailed: it is no message of the contract.
    """
    job_id, arguments = job_named(args, kwargs)
    fits = len(args) + len(kwargs) == 2 == len(arguments) and isinstance(arguments.get("job_data"), dict)
    if not fits:
        logger.error("job=%s its message has the wrong arguments: (job_id, job_data) are expected", job_id)
        raise fail_unowned(task, ObjectId(job_id), DAMAGED)
    return ObjectId(job_id)


def claim(task: JobTask, job_id: ObjectId, taken_at: float) -> Job | Miss:
    """The claimed job, or why there is none. A lease whose process has died here doesn't count."""
    runtime, limits, owner = task.runtime, message_limits(task), secrets.token_hex(8)

    def attempt_claim(*, bounded: bool = True) -> Job | Miss:
        def try_claim() -> Job | Miss:
            waited_s = time.monotonic() - taken_at
            return runtime.store.claim(job_id, owner, limits, bounded=bounded, waited_s=waited_s)

        return wait_for_store(task, job_id, try_claim)

    claimed = attempt_claim()
    is_held = isinstance(claimed, Miss) and claimed.kind is MissKind.HELD
    if is_held and wait_for_store(task, job_id, runtime.sweeper.release_dead_siblings):
        claimed = attempt_claim()
    is_exhausted = isinstance(claimed, Miss) and claimed.kind is MissKind.EXHAUSTED
    if is_exhausted and wait_for_store(task, job_id, lambda: runtime.notifier.spooled_result(job_id)):
        claimed = attempt_claim(bounded=False)
    return claimed


def answer_miss(task: JobTask, job_id: ObjectId, miss: Miss) -> Document:
    """What becomes of a message whose job couldn't be claimed.

    Raises:
        Ignore: a live attempt has the job. (A result under this task id would make Celery drop its redelivery.)
        Retry: the job waits for its next try. JobFailed: there is no such job, or it is at its bounds.
    """
    logger.info("job=%s not taken: it %s", job_id, miss.kind.value)
    match miss.kind:
        case MissKind.TERMINAL:
            status = Status(miss.document["status"])
            announce(task.runtime, miss.document, status, final_sentence(miss.document))
            return {"job_id": str(job_id), "status": status.value}
        case MissKind.HELD:
            raise Ignore()
        case MissKind.WAITING:
            now = task.runtime.store.now()
            available_at = bookkeeping(miss.document).get("available_at", now).replace(tzinfo=UTC)
            raise put_back(task, job_id, max(MOMENT_S, (available_at - now).total_seconds()))
        case MissKind.EXHAUSTED:
            raise fail_unowned(task, job_id, GAVE_UP)
        case MissKind.UNKNOWN:
            raise JobFailed("There is no such job.")


def announce_job(runtime: Runtime, job: Job, status: Status, sentence: str) -> None:
    document = {"_id": job.id, "user_id": job.user_id, "session_id": job.session_id}
    announce(runtime, document, status, sentence)


def place_of(error: BaseException) -> str:
    """File and line where an exception came from; of a syntax error, where it is."""
    if isinstance(error, SyntaxError):
        return f"{Path(error.filename or '?').name}:{error.lineno}"
    place, trace = "?", error.__traceback__
    while trace:
        if not (file := trace.tb_frame.f_code.co_filename).startswith("<"):  # Python's own frozen modules say nothing
            place = f"{Path(file).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


async def run_handler(runtime: Runtime, attempt: Attempt) -> Result:
    """The handler under its deadline, on the event loop. Every end but a Result is a JobError."""
    running, loop = asyncio.current_task(), asyncio.get_running_loop()
    attempt.bind(lambda: running and loop.call_soon_threadsafe(running.cancel))
    settings, job = runtime.settings, attempt.job
    progress = Progress(job, runtime.notifier, attempt.is_lease_fresh)
    try:
        handler = find_handler(job.job_type)
        checked = check_input(handler, job.input_data)
        provider, defaults = runtime.providers.get(handler.provider), settings.provider(handler.provider)
        ends_at = loop.time() + attempt.time_left_s()
        await provider.ready(attempt.time_left_s() / 4)  # most of the limit is left for the answer
        if not attempt.is_lease_fresh():  # asked once more, as close to what costs money as can be
            raise HandBack("its lease ran out before it asked the provider")
        async with asyncio.timeout_at(ends_at) as deadline:
            result = await handler.run(Call(job, checked, settings, provider, defaults, progress))
        with contextlib.suppress(asyncio.CancelledError):  # the result is there: settle finds out whose the job is
            await progress.finish()
        return result
    except TimeoutError:
        if deadline.expired():
            raise FailJob(f"the limit of {job.limits.soft_s:g} s", TOOK_TOO_LONG) from None
        raise RetryJob("TimeoutError") from None
    except asyncio.CancelledError:
        raise attempt.reason or DropJob("cancelled") from None
    except JobError:
        raise
    except Exception as error:  # the edge of foreign code; its text may hold a prompt, its place can't
        raise FailJob(f"{type(error).__name__} at {place_of(error)}") from None
    finally:
        progress.stop()


def find_kept(runtime: Runtime, job: Job) -> Result | None:
    """A result that an earlier attempt could not write down; where Redis can't say, it is generated again."""
    with contextlib.suppress(SpoolUnavailable):
        return runtime.notifier.spooled_result(job.id)
    return None


def run(runtime: Runtime, attempt: Attempt) -> Outcome:
    """Runs the job's handler on the event loop, within its deadline. Nothing is written here.

    Raises:
        SystemExit: this process was told to end without a shutdown (a revoke): the lease runs out.
    """
    job = attempt.job
    if not attempt.is_lease_fresh():  # this process slept, or MongoDB's answer was long on its way
        return HandBack("its lease ran out before it began")
    logger.info("%s started", job)
    again = f" (try {job.attempt} of {runtime.settings.most_attempts})" if job.attempt > 1 else ""
    announce_job(runtime, job, Status.PROCESSING, f"Your job has started{again}.")
    try:
        if job.attempt > 1 and (kept := find_kept(runtime, job)):
            return kept
        future, loop = runtime.loop.submit(run_handler(runtime, attempt))
        try:
            return future.result(attempt.time_left_s() + STUCK_LOOP_S)
        except TimeoutError:
            runtime.loop.abandon(loop)
            stuck = FailJob("the handler blocks the event loop", TOOK_TOO_LONG)
            attempt.cancel(stuck)
            return stuck
    except JobError as error:
        return error
    except SystemExit:
        attempt.cancel(HandBack("this process was told to end"))
        if SHUTDOWN.is_announced_soon():
            return HandBack("this process was told to end")
        raise


@contextlib.contextmanager
def signals_deferred() -> Iterator[list[int]]:
    """Lets no signal interrupt what is inside, only lists it; each comes afterwards. The main thread alone gets any."""
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
    before = {name: signal.signal(name, lambda number, _: arrived.append(number)) for name in names}
    try:
        yield arrived
    finally:
        for name, handler in before.items():
            signal.signal(name, handler or signal.SIG_DFL)
        for number in arrived:
            signal.raise_signal(number)


def within_bounds(runtime: Runtime, job: Job, outcome: Outcome) -> Outcome:
    """A retry gets its wait in seconds; one beyond the job's bounds becomes a failure."""
    if not isinstance(outcome, RetryJob):
        return outcome
    settings = runtime.settings
    if job.attempt < settings.most_attempts or not outcome.is_counted:
        if outcome.after_s is None:
            delays = (*settings.retry_delays[job.attempt - 1 :], *settings.retry_delays[-1:], 0.0)
            wait_s = delays[0] * random.uniform(0.5, 1.0)
        else:
            wait_s = min(outcome.after_s, settings.retry_after_max)
        if job.first_started_at > runtime.store.oldest_start(job.limits, wait_s):
            return RetryJob(outcome.detail, outcome.sentence, wait_s, is_counted=outcome.is_counted)
    tries = f"{job.attempt} tries" if job.attempt > 1 else "one try"
    return FailJob(outcome.detail, f"{outcome.sentence}; given up after {tries}. Please try again later.")


def complete(runtime: Runtime, job: Job, result: Result) -> bool:
    """Stores the file, then ends the job: a completed document never names a file that isn't there."""
    if result.media is None:
        return runtime.store.complete(job, result.output, None)
    url = runtime.artifacts.publish(job, result.media)
    return runtime.store.complete(job, {**result.output, result.media.url_field: url}, url)


def discard(runtime: Runtime, job: Job) -> None:
    """Takes away what an attempt stored that didn't win."""
    with contextlib.suppress(StoreUnavailable, FailJob):  # the sweeper looks for it, too
        runtime.artifacts.discard(job)


def write_outcome(runtime: Runtime, job: Job, outcome: Outcome) -> Outcome:
    """The table from outcome to fenced write. DropJob: nothing was written, the job is no longer ours.

    Raises:
        StoreUnavailable: try again, the write may have happened.
    """
    store, now = runtime.store, runtime.store.now()
    match outcome:
        case Result():
            try:
                done = complete(runtime, job, outcome)
            except FailJob as error:  # MongoDB can't hold it
                discard(runtime, job)
                return write_outcome(runtime, job, error)
        case RetryJob():
            available_at = now + timedelta(seconds=outcome.after_s or 0)
            done = store.release(job, available_at, counted=outcome.is_counted)
        case HandBack():
            done = store.release(job, now, counted=False)
        case FailJob():
            done = store.fail(job, outcome.sentence)
        case _:
            done = False
    return outcome if done else DropJob("the job is no longer ours")


def write_patiently(runtime: Runtime, attempt: Attempt, outcome: Outcome, signals_arrived: Sequence[int]) -> Outcome:
    """Writes the outcome, again and again while MongoDB is away, until the hard limit or the end of the process.

    A result that can't be written is then kept in Redis.
    """
    log, try_s = runtime.unwritten_log, SETTLE_TRY_S
    give_up_at = attempt.started_at + max(attempt.job.limits.hard_s - LIMIT_MARGIN_S, attempt.job.limits.soft_s)
    while True:
        try:
            # A hung MongoDB must neither outlast the hard limit nor the grace of a shutdown.
            with pymongo.timeout(max(POLL_STORE_S, min(try_s, give_up_at - time.monotonic()))):
                written = write_outcome(runtime, attempt.job, outcome)
            log.fine()
            if try_s > SETTLE_TRY_S and not isinstance(written, LeaveJob):
                runtime.notifier.forget_result(attempt.job.id)
            return written
        except StoreUnavailable as error:
            log.fault(f"{attempt.job} {error}")
        if signals_arrived or SHUTDOWN.is_due or time.monotonic() + POLL_STORE_S >= give_up_at:
            break
        if isinstance(outcome, Result) and outcome.media and runtime.notifier.spool_result(attempt.job, outcome):
            try_s *= 2  # a large file over a slow line takes long, and a kill meanwhile loses nothing now
        time.sleep(POLL_STORE_S)
    if isinstance(outcome, Result):
        runtime.notifier.spool_result(attempt.job, outcome)
    return LeaveJob("MongoDB stayed away: the lease runs out, and the sweeper brings the job back")


def settle(runtime: Runtime, attempt: Attempt, outcome: Outcome) -> Outcome:
    """Ends the attempt with one fenced write, undisturbed; the only place where an attempt writes.

    Returns what holds now: the outcome; DropJob where nothing was written, since the job is no longer ours; LeaveJob
    where MongoDB stayed away, so that nobody knows.
    """
    outcome = within_bounds(runtime, attempt.job, outcome)
    with signals_deferred() as arrived:
        return write_patiently(runtime, attempt, outcome, arrived)


def clean_up(runtime: Runtime, job: Job) -> None:
    """Takes away what earlier attempts at an ended job left; what can't be reached now, stays."""
    if job.attempt > 1:
        runtime.notifier.forget_result(job.id)
        with contextlib.suppress(StoreUnavailable, FailJob):
            runtime.artifacts.discard_others(job)


def tell_again(runtime: Runtime, job: Job) -> None:
    """After an attempt that slept: another may have ended the job before this one said that it has started.

    A cancel by the API, which is told by nobody, writes no `completed_at`.
    """
    with contextlib.suppress(StoreUnavailable):
        document = runtime.store.read(job.id) or {}
        if document.get("status") in TERMINAL_STATUSES and document.get("completed_at"):
            announce(runtime, document, Status(document["status"]), final_sentence(document))


def conclude(task: JobTask, attempt: Attempt, outcome: Outcome) -> Document:
    """Tells the person and Celery what the document says now.

    Raises:
        JobFailed, Retry, Reject, Ignore: for every outcome but a result.
    """
    runtime, job = task.runtime, attempt.job
    took_s = time.monotonic() - attempt.started_at
    match outcome:
        case Result():
            logger.info("%s completed in %.1f s", job, took_s)
            announce_job(runtime, job, Status.COMPLETED, "Your result is ready.")
            clean_up(runtime, job)
            return {"job_id": str(job.id), "status": Status.COMPLETED.value}
        case RetryJob():
            wait_s = outcome.after_s or 0.0
            logger.warning("%s tried again in %.1f s: %s", job, wait_s, outcome.detail)
            number = job.attempt + outcome.is_counted
            next_try = f"trying again in {math.ceil(wait_s)} s ({number} of {runtime.settings.most_attempts})"
            announce_job(runtime, job, Status.PROCESSING, f"{outcome.sentence}; {next_try}.")
            raise put_back(task, job.id, wait_s)
        case HandBack():
            logger.info("%s handed back: %s", job, outcome.detail)
            raise Reject(outcome.detail, requeue=True)
        case FailJob():
            logger.warning("%s failed after %.1f s: %s", job, took_s, outcome.detail)
            announce_job(runtime, job, Status.FAILED, outcome.sentence)
            clean_up(runtime, job)
            raise JobFailed(outcome.sentence)
        case _:
            logger.warning("%s left after %.1f s: %s", job, took_s, outcome)
            if not isinstance(outcome, LeaveJob):
                discard(runtime, job)
                tell_again(runtime, job)
            raise Ignore()


@app.task(bind=True, base=JobTask, name=TASK_NAME, throws=(JobFailed,), max_retries=None, shared=False)
def process_job(task: JobTask, *args: Any, **kwargs: Any) -> Document:
    """Takes one job to its end: claim, run, settle (contract, section 1).

    Raises:
        JobFailed: the job has failed; the text is the person's sentence.
        Ignore: another attempt has the job; Retry: later; Reject: back into the queue.
    """
    taken_at = time.monotonic()
    job_id = read_message(task, args, kwargs)
    claimed = claim(task, job_id, taken_at)
    if isinstance(claimed, Miss):
        return answer_miss(task, job_id, claimed)
    attempt = Attempt(claimed, task.runtime.settings.lease_seconds, taken_at)
    task.runtime.keeper.register(attempt)
    try:
        outcome = settle(task.runtime, attempt, run(task.runtime, attempt))
    finally:
        task.runtime.keeper.unregister(attempt)
    return conclude(task, attempt, outcome)


@signals.import_modules.connect
def import_handlers(**_: Any) -> None:
    """At the start of a worker, in the parent: a fault in a module is one sentence and exit code 2."""
    for name in current_settings().handler_modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # the edge of foreign code; its text may hold a secret, its place can't
            what = f"{type(error).__name__} at {place_of(error)}"
            print(f"The worker can't start: HANDLER_MODULES names {name}, which raises {what}.", file=sys.stderr)
            raise SystemExit(EXIT_BAD_SETTINGS) from None


def start_keeper() -> None:
    runtime = process_job.runtime
    runtime.keeper.start()
    threading.Thread(target=runtime.providers.preload, name="preload", daemon=True).start()


@signals.task_revoked.connect
def note_revoked(request: Any = None, **_: Any) -> None:
    """In the parent, for a task that Celery threw away or killed: the next sweep fails its job."""
    with contextlib.suppress(JobFailed):
        job_id, _arguments = job_named(request.args or (), request.kwargs or {})
        process_job.runtime.notifier.note_revoked(job_id)


@signals.worker_init.connect
def refuse_other_pools(sender: Any, **_: Any) -> None:
    """No keeper would run in them, so that every job would be taken away from them."""
    pool = str(getattr(sender.pool_cls, "__module__", sender.pool_cls))
    if not pool.removesuffix("s").endswith(("prefork", "thread", "solo")):
        print(f"The pool {pool} isn't supported: use prefork, threads or solo (WORKER_POOL).", file=sys.stderr)
        raise SystemExit(EXIT_BAD_SETTINGS)


@signals.worker_before_create_process.connect
def share_memory(**_: Any) -> None:
    """In the parent, before each fork: what a child needs is imported once, and no collection unshares its pages."""
    process_job.runtime.providers.preload()
    gc.unfreeze()  # what became garbage since the last fork
    gc.collect()
    gc.freeze()


@signals.worker_process_init.connect
def start_in_child(**_: Any) -> None:
    """After the fork, and in the solo pool: the keeper's thread begins. Nothing of ours runs in the parent."""
    start_keeper()


@signals.worker_ready.connect
def start_in_threads(sender: Any, **_: Any) -> None:
    if sender.pool.__class__.__module__.endswith(".thread"):
        start_keeper()


@signals.worker_process_shutdown.connect
@signals.worker_shutdown.connect
def stop_keeper(**_: Any) -> None:
    if "keeper" in vars(process_job.runtime):
        process_job.runtime.keeper.stop()


@signals.worker_shutting_down.connect
def announce_shutdown(how: str = "", **_: Any) -> None:
    """In the parent's signal handler. A cold shutdown (Ctrl-C twice, SIGQUIT) has no grace."""
    SHUTDOWN.announce(process_job.runtime.settings.shutdown_grace if how == "Warm" else 0.0)


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────

EXIT_UNHEALTHY = 1


def print_connections(settings: Settings) -> None:
    """What the worker is connected to, without passwords."""
    rows: dict[str, str] = {
        "MongoDB": f"{redact_url(settings.mongodb_url.get_secret_value())}, database {settings.database_name}",
        "Redis": redact_url(settings.redis_url.get_secret_value()),
        "queue": f"{settings.celery_queue_name} at {redact_url(settings.broker_url)}",
        "pool": f"{settings.pool}, {settings.worker_concurrency} at a time",
        "limits": f"{settings.celery_soft_time_limit:g} s, killed after {settings.celery_time_limit:g} s",
        "artifacts": f"{redact_url(settings.artifact_url)}, served at {redact_url(settings.artifact_base_url)}",
        **{kind: settings.provider(kind).label for kind in PROVIDER_KINDS},
    }
    print(f"AI Backend Worker {__version__}", *(f"  {name:9} {value}" for name, value in rows.items()), sep="\n")
    if any(settings.provider(kind).is_offline for kind in PROVIDER_KINDS):
        print("  WARNING: no provider is set for some kinds: the OFFLINE STAND-IN answers, which is no model.")
    sys.stdout.flush()


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.pass_context
def main(context: click.Context) -> None:
    """AI Backend Worker: takes generation jobs from a Celery queue and makes each one end, exactly once.

    Without a command it runs the worker. Settings come from the environment and from .env.
    """
    if context.invoked_subcommand is None:
        context.invoke(cast(click.Group, context.command).commands["run"])


def start_celery(arguments: list[str]) -> int:
    """Runs Celery's own command line; unlike `app.worker_main` it gives the exit code: 1 when the worker broke down."""
    celery_command: Any = importlib.import_module("celery.bin.celery").celery
    celery_command.params[0].default = app
    return int(celery_command.main(args=arguments, standalone_mode=False) or 0)


@main.command("run", context_settings={"ignore_unknown_options": True})
@click.argument("celery_arguments", nargs=-1, type=click.UNPROCESSED)
def run_command(celery_arguments: Sequence[str] = ()) -> None:
    """Run the worker (the default). CELERY_ARGUMENTS are passed to `celery worker`."""
    settings = current_settings()
    print_connections(settings)
    options = [f"--pool={settings.pool}", f"--concurrency={settings.worker_concurrency}", "--loglevel=INFO"]
    options += [f"--hostname=worker-{NODE.rsplit('-', 1)[-1]}@%h", "--without-gossip"]
    options += ["--without-mingle"]  # it would wait a second for other workers at start
    sys.exit(start_celery(["--quiet", "worker", *options, *celery_arguments]))  # its banner would say it again


@main.command()
def check() -> None:
    """Try every connection and say what to do; exits with 1 if something is wrong."""
    import screens

    sys.exit(screens.check(Runtime(current_settings())))


@main.command()
def status() -> None:
    """Show jobs by status, the queue, what is stuck, and the last errors."""
    import screens

    sys.exit(screens.status(Runtime(current_settings())))


@main.command()
def health() -> None:
    """Exit with 0 if this host's worker is alive (for Docker's HEALTHCHECK)."""
    ages_s = Heartbeat().ages_s()
    for pid, age_s in ages_s.items():
        if age_s > Heartbeat.STALE_S:
            print(f"process {pid} has been silent for {age_s:.0f} s")
    print(f"{len(ages_s)} process(es) that run jobs")
    sys.exit(EXIT_UNHEALTHY if not ages_s or max(ages_s.values()) > Heartbeat.STALE_S else 0)


@main.command()
def recover() -> None:
    """Look once for lost jobs and for files that no job names (from cron, where no worker runs all day)."""
    sweeper, where = Runtime(current_settings()).sweeper, "MongoDB"
    try:
        lines = sweeper.sweep()
        where = "the artifact store"
        lines += sweeper.sweep_artifacts(all_of_them=True)
    except (StoreUnavailable, FailJob) as error:
        raise click.ClickException(f"{where} can't be reached ({error}); try `check`") from None
    print(*lines or ["nothing to recover"], sep="\n")


@main.command()
@click.option("--type", "job_type", default="text", show_default=True, help="text, image, audio, or a full job type")
@click.option("--prompt", required=True, help="what to generate")
@click.option("--param", "parameters", multiple=True, metavar="NAME=VALUE", help="more input, such as size=512x512")
@click.option("--follow/--no-follow", default=True, show_default=True, help="wait and show it while it is made")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="folder for the file")
def submit(job_type: str, prompt: str, parameters: Sequence[str], follow: bool, output: Path | None) -> None:
    """Submit a job as the API does, and show what comes back."""
    import demo as demo_module

    sys.exit(demo_module.submit(Runtime(current_settings()), job_type, prompt, parameters, follow, output))


@main.command()
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="folder for picture and sound")
def demo(output: Path | None) -> None:
    """One job of each type through a real worker, with nothing else installed or running."""
    import demo as demo_module

    sys.exit(demo_module.demo(output))


if __name__ == "__main__":
    sys.modules["worker"] = sys.modules["__main__"]  # so that `import worker` elsewhere is this very module
    main()
