"""Every setting: its name, default, bounds and meaning. Nothing else in the worker reads the environment."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pymongo
import redis
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from pymongo.errors import PyMongoError

from workerkit.proxies import ProxyFault, proxy_for

ProviderKind = Literal["text", "image", "audio"]
PROVIDER_KINDS: tuple[ProviderKind, ...] = ("text", "image", "audio")
EXIT_BAD_SETTINGS = 2
MAX_SECONDS = 86_400
IMAGE_SIZE = r"[1-9]\d{1,3}x[1-9]\d{1,3}"


def is_duration(value: object) -> bool:
    """Whether it is a number of seconds, up to a day. A message may hold numbers that no clock can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= MAX_SECONDS


def redact_url(url: str) -> str:
    """The URL without user, password and query, for the log. It cuts up to the last `@`, which a password may hold."""
    scheme = "".join(re.findall(r"^[\w+.-]*://", url))
    return scheme + re.sub(r"(?s)^.*@", "***@", url[len(scheme) :]).split("?")[0]


def with_certificate_check(url: str) -> str:
    """The URL with `ssl_cert_reqs=required` if it is a `rediss://` one that doesn't say how to check certificates.

    Celery, unlike redis-py, doesn't check them by default.
    """
    if not url.startswith("rediss://") or "ssl_cert_reqs=" in url:
        return url
    return f"{url}{'&' if '?' in url else '?'}ssl_cert_reqs=required"


def split_commas(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def matching(pattern: str, hint: str) -> AfterValidator:
    """Checks a setting, or each part of a list, against a pattern. The message doesn't show the value."""

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
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
PositiveSeconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]
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
# The day on which OpenAI ends each of its models for /audio/speech. This endpoint doesn't offer the successor that
# OpenAI names.
OPENAI_ENDS = dict.fromkeys(("gpt-4o-mini-tts", "tts-1", "tts-1-hd"), "2027-01-06")


@dataclass(frozen=True)
class Limits:
    """How long an attempt may take, in seconds: its own deadline (soft), and Celery's kill of the process (hard)."""

    soft_s: float
    hard_s: float


@dataclass(frozen=True)
class ProviderSettings:
    """The server, key and models of one kind of generation.

    Without a `base_url` that is OpenAI; without a key as well it is the offline stand-in.
    """

    base_url: str
    api_key: str = field(repr=False)
    model: str
    allowed_models: tuple[str, ...]

    @property
    def is_offline(self) -> bool:
        return not self.base_url and not self.api_key

    @property
    def place(self) -> str:
        """The server's address without credentials, for log lines and screens."""
        return "offline stand-in" if self.is_offline else redact_url(self.base_url) or OPENAI_URL

    @property
    def label(self) -> str:
        """Model and server, for the operator; with the day on which OpenAI ends the model if that is near."""
        if self.is_offline:
            return self.place
        ends = "" if self.base_url else OPENAI_ENDS.get(self.model)
        warning = f" (OpenAI ends this model on {ends}: set another server and model before)" if ends else ""
        return f"{self.model} at {self.place}{warning}"


class Settings(BaseSettings):
    """Every setting, from the environment, else from `.env`. A field's name is its variable's name in lower case.

    The first seven are the contract's (section 4). Every other one has a default, so that those seven suffice. Unknown
    variables are ignored.
    """

    model_config = SettingsConfigDict(
        env_file=".env", env_ignore_empty=True, extra="ignore", validate_default=True, hide_input_in_errors=True
    )

    mongodb_url: MongoUrl = SecretStr(MONGODB_URL)  # MongoDB, shared with the API
    database_name: Annotated[str, Field(pattern=r'^[^/\\. "$]{1,63}$')] = "ai_backend"  # database of the jobs
    redis_url: RedisUrl = SecretStr("redis://redis:6379/0")  # queue, results, notifications
    celery_queue_name: Name = "ai_jobs"  # queue to take jobs from
    celery_soft_time_limit: PositiveSeconds = 90  # seconds that an attempt may take
    celery_time_limit: PositiveSeconds = 120  # seconds after which the process of an attempt is killed
    debug: bool = False  # show DEBUG lines too (never prompts or keys); the worker itself writes none

    celery_broker_url: BrokerUrl = NO_SECRET  # another broker than REDIS_URL
    celery_result_backend: RedisUrl = NO_SECRET  # another result backend than REDIS_URL
    celery_send_events: bool = True  # send the task events that the API and Flower read
    worker_pool: Literal["", "prefork", "threads", "solo"] = ""  # Celery pool; empty: prefork where fork works
    worker_concurrency: int = Field(1, ge=1, le=10_000)  # jobs at a time in this worker
    shutdown_grace: Seconds = 4  # seconds that a running job may go on after SIGTERM
    handler_modules: Modules = ()  # modules with job types of your own

    lease_seconds: float = Field(30, ge=2, le=600)  # seconds after which a silent worker's jobs go to another
    sweep_interval: float = Field(10, ge=0.2, le=600)  # seconds between two searches for lost jobs
    orphan_after: Seconds = 0  # seconds after which a job without a lease is taken over; 0: hard limit + 60
    job_deadline: PositiveSeconds = 600  # seconds after its first start in which new attempts may begin
    retry_delays: Delays = (5, 15, 45)  # the longest wait before each retry in seconds; one retry for each
    retry_after_max: Seconds = 120  # the longest wait in seconds that a provider may ask for

    openai_api_key: SecretStr = NO_SECRET  # key of the provider
    openai_base_url: HttpUrl = ""  # any OpenAI-compatible server; empty: OpenAI (with a key)
    text_base_url: HttpUrl = ""  # another server for text
    text_api_key: SecretStr = NO_SECRET  # its key
    text_model: Name = "gpt-6-luna"  # model for text
    text_models: Names = ()  # more text models that a job may ask for
    text_max_tokens: int = Field(4096, ge=1)  # the most tokens that a job may ask for
    image_base_url: HttpUrl = ""  # another server for pictures
    image_api_key: SecretStr = NO_SECRET  # its key
    image_model: Name = "gpt-image-2.6-flare"  # model for pictures
    image_models: Names = ()  # more picture models that a job may ask for
    image_sizes: Sizes = ()  # sizes that the picture model offers, the nearest is used (empty: any, or gpt-image's own)
    audio_base_url: HttpUrl = ""  # another server for sound
    audio_api_key: SecretStr = NO_SECRET  # its key
    audio_model: Name = "gpt-4o-mini-tts"  # model for sound
    audio_models: Names = ()  # more sound models that a job may ask for
    audio_voice: Name = "alloy"  # voice where a job asks for none or for "default"
    audio_format: Literal["mp3", "wav", "opus", "flac"] = "mp3"  # sound format where a job asks for none
    max_answer_bytes: int = Field(32 * 2**20, ge=1024)  # the largest answer of a provider in bytes

    artifact_url: ArtifactUrl = "gridfs"  # where files go: gridfs, data:, file:///folder, s3://bucket/folder
    artifact_base_url: str = "/artifacts"  # public address in front of a file's name
    artifact_retention_days: float = Field(0, ge=0, le=10_000)  # days after which files are deleted; 0: never
    aws_access_key_id: SecretStr = NO_SECRET  # S3 key
    aws_secret_access_key: SecretStr = NO_SECRET  # S3 secret
    s3_bucket_name: str = ""  # bucket, if ARTIFACT_URL is just s3://
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
        """The broker's URL for Celery. The master's name in a Sentinel's URL goes into the transport's options."""
        url = with_certificate_check(self.celery_broker_url.get_secret_value() or self.redis_url.get_secret_value())
        return url.partition("?")[0] if url.startswith("sentinel") else url

    @property
    def sentinel_master(self) -> str:
        return self.celery_broker_url.get_secret_value().partition("?master_name=")[2]

    @property
    def is_rabbitmq(self) -> bool:
        return self.broker_url.startswith("amqp")

    @property
    def result_backend(self) -> str:
        return with_certificate_check(
            self.celery_result_backend.get_secret_value() or self.redis_url.get_secret_value()
        )

    @property
    def artifact_store_url(self) -> str:
        """ARTIFACT_URL, with the bucket's name where it is just `s3://`."""
        return f"s3://{self.s3_bucket_name}" if self.artifact_url == "s3://" else self.artifact_url

    @property
    def s3_options(self) -> dict[str, Any]:
        """The options of fsspec's S3 client. Listings aren't cached, since other workers store files as well."""
        return {
            "use_listings_cache": False,
            "key": self.aws_access_key_id.get_secret_value() or None,
            "secret": self.aws_secret_access_key.get_secret_value() or None,
            "endpoint_url": self.s3_endpoint_url or None,
            "client_kwargs": {"region_name": self.s3_region} if self.s3_region else {},
        }

    @property
    def pool(self) -> str:
        return self.worker_pool or ("prefork" if hasattr(os, "fork") and sys.platform != "darwin" else "threads")

    @property
    def max_attempts(self) -> int:
        return 1 + len(self.retry_delays)

    def provider(self, kind: ProviderKind) -> ProviderSettings:
        """Server, key and models of one kind of generation. A server of its own never gets another server's key."""
        own_url, own_key = getattr(self, f"{kind}_base_url"), getattr(self, f"{kind}_api_key").get_secret_value()
        shared_key = "" if own_url else self.openai_api_key.get_secret_value()
        return ProviderSettings(
            base_url=own_url or self.openai_base_url,
            api_key=own_key or shared_key,
            model=getattr(self, f"{kind}_model"),
            allowed_models=getattr(self, f"{kind}_models"),
        )

    def limits(self, timelimit: object = None) -> Limits:
        """The limits of a message where they make sense, else the worker's own.

        A message has them as `[hard, soft]`, and either may be null.
        """
        is_pair = isinstance(timelimit, (list, tuple)) and len(timelimit) == 2
        given: Any = timelimit if is_pair else (None, None)
        hard_s, soft_s = (float(number) if is_duration(number) else None for number in given)
        margin_s = self.celery_time_limit - self.celery_soft_time_limit
        if hard_s is None:
            hard_s = self.celery_time_limit if soft_s is None else max(self.celery_time_limit, soft_s + margin_s)
        soft_s = self.celery_soft_time_limit if soft_s is None else soft_s
        return Limits(soft_s if soft_s < hard_s else hard_s * 0.9, hard_s)


def settings_faults(error: ValidationError) -> list[str]:
    """A line for each fault: the variable, its value unless it is a secret, and what would be right."""
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


def proxy_faults(settings: Settings) -> list[str]:
    """A line for each variable because of which a provider's key might take another way than the operator meant."""
    lines = []
    for kind in PROVIDER_KINDS:
        where = settings.provider(kind)
        try:
            if not where.is_offline:
                proxy_for(where.base_url or OPENAI_URL)
        except ProxyFault as fault:
            lines.append(f"  {fault.name} = {redact_url(fault.value)!r}: {fault.advice}")
    return list(dict.fromkeys(lines))


def load_settings(**overrides: Any) -> Settings:
    """Reads the settings. If any are wrong, prints all faults to stderr and exits with 2."""
    try:
        settings = Settings(**overrides)
        lines = proxy_faults(settings)
    except ValidationError as error:
        lines = settings_faults(error)
    if not lines:
        return settings
    print("The worker can't start, because of its settings:", *lines, sep="\n", file=sys.stderr)
    print("Fix them in the environment or in .env; docs/settings.md lists all variables.", file=sys.stderr)
    raise SystemExit(EXIT_BAD_SETTINGS)
