"""Every setting: its name, default, bounds and meaning. Nothing else in the worker reads the environment."""

from __future__ import annotations

import codecs
import contextlib
import importlib.util
import os
import re
import sys
import urllib.parse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import pymongo
from dotenv.parser import parse_stream
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from pymongo.errors import PyMongoError

from workerkit.certificates import authority_fault, first_fault, folder_fault, pair_fault
from workerkit.logs import logger
from workerkit.loopback import IN_A_POD, LOOPBACK, ComposeServer, listens, resolves
from workerkit.misspelt import Misspelt, find_misspelt
from workerkit.proxies import ProxyFault, proxy_for
from workerkit.redis_urls import SCHEMES as REDIS_SCHEMES
from workerkit.redis_urls import RedisTarget

ProviderKind = Literal["text", "image", "audio"]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]  # the lowest first
PROVIDER_KINDS: tuple[ProviderKind, ...] = ("text", "image", "audio")
EXIT_BAD_SETTINGS = 2
MAX_SECONDS = 86_400
DOTENV, DOTENV_ENCODING = ".env", "utf-8-sig"  # Windows' editors put a mark in front of UTF-8
MIN_CROWDED_LEASE_S, MAX_UNCROWDED = 10, 100
IMAGE_SIZE = r"[1-9]\d{1,3}x[1-9]\d{1,3}"


def is_duration(value: object) -> bool:
    """Whether it is a number of seconds, up to a day. A message may hold numbers that no clock can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= MAX_SECONDS


# Schemes behind whose host a database, a bucket or a folder is named. Elsewhere a path may hold a token.
SCHEMES_WITH_PLACES = re.compile(
    r"mongodb(\+srv)?|rediss?|sentinel|amqps?|unix|(redis\+)?socket|file|s3|gcs?|gs|az|memory"
)
HARMLESS_PATH = re.compile(r"(/(api|openai|v\d{1,2}((alpha|beta)\d?)?))*/?")
HOST = r"(\[[\da-fA-F:.]+\]|[\w.%~-]*)(:\d*)?"
HOSTS = re.compile(rf"{HOST}(,{HOST})*")


def redact_url(url: str) -> str:
    """The URL as it may be shown: without user, password and query, nor a path that may be secret.

    Where it can't be told what is the host, as with an unescaped `/` in a password, only the scheme is left.
    """
    found = re.fullmatch(r"(?s)([\w+.-]+)://([^/?#]*)(.*)", url)
    if not found:
        return url
    scheme, place, rest = found.groups()
    _, at, hosts = place.rpartition("@")
    if "@" in rest or not HOSTS.fullmatch(hosts):
        return f"{scheme}://***"
    path = re.split("[?#]", rest)[0]
    is_shown = SCHEMES_WITH_PLACES.fullmatch(scheme) or HARMLESS_PATH.fullmatch(path)
    return f"{scheme}://{'***@' if at else ''}{hosts}{path if is_shown else '/…'}"


def as_utf8(text: str) -> str:
    """Text of the environment or the command line, read as UTF-8 also where the locale (`C`, say) knows ASCII alone.

    What is no UTF-8 is left as it is.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        return text


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


# The options of MONGODB_URL that name a file.
MONGODB_TRUST = ("tlsCAFile", "tlsCRLFile")
MONGODB_PAIR, MONGODB_PASSWORD = "tlsCertificateKeyFile", "tlsCertificateKeyFilePassword"


def mongodb_certificates_fault(url: str) -> str:
    """What is wrong with the files that MONGODB_URL names, or an empty string. It takes these names in any case."""
    pairs = [part.partition("=") for part in re.split("[&;]", url.partition("?")[2])]
    given = {name.lower(): urllib.parse.unquote_plus(value) for name, _, value in pairs}
    options = {name: given.get(name.lower(), "") for name in (*MONGODB_TRUST, MONGODB_PAIR, MONGODB_PASSWORD)}
    if (fault := first_fault(options, MONGODB_TRUST)) or not options[MONGODB_PAIR]:
        return fault
    fault = pair_fault(options[MONGODB_PAIR], password=options[MONGODB_PASSWORD])
    return fault and f"{MONGODB_PAIR} {fault}"


MONGODB_LOOKS = "should look like mongodb://user:password@host:27017/database (escape @ : / in a password)"


def check_mongodb_url(value: SecretStr) -> SecretStr:
    """Asks pymongo's own client, which connects to nothing yet."""
    url = value.get_secret_value()
    if fault := mongodb_certificates_fault(url):
        raise ValueError(fault)
    with contextlib.suppress(PyMongoError, ValueError, OSError), warnings.catch_warnings(action="ignore"):
        if not url.startswith("mongodb+srv://"):
            pymongo.uri_parser.parse_uri(url, validate=True)
        pymongo.MongoClient[Any](url, connect=False).close()
        return value
    raise ValueError(f"{MONGODB_LOOKS}, and its options like those of pymongo's MongoClient")


def check_redis_url(value: SecretStr) -> SecretStr:
    if url := value.get_secret_value():
        RedisTarget.parse(url)
    return value


BROKERS = "start with redis:// or amqp://, or look like sentinel://host:26379/0?master_name=NAME"


def is_address(url: str, schemes: Sequence[str]) -> bool:
    """Whether it has one of these schemes, a host, and a port that is a number; and no unescaped `@`, `#` or blank."""
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(url)
        is_plain = not re.search(r"[\s#]", url) and "@" not in parts.path + parts.query
        return parts.scheme in schemes and bool(parts.hostname) and parts.port != 0 and is_plain
    return False


def check_broker_url(value: SecretStr) -> SecretStr:
    url = value.get_secret_value()
    scheme = url.partition("://")[0]
    if not url or scheme in REDIS_SCHEMES:
        return check_redis_url(value)
    if scheme in ("amqp", "amqps"):
        if "?" in url or not all(is_address(one, ("amqp", "amqps")) for one in url.split(";")):
            raise ValueError("should look like amqp://user:password@host:5672/vhost, without options behind a ?")
    elif not re.fullmatch(r"sentinel://[^?]+\?master_name=[^&]+", url):
        raise ValueError(f"should {BROKERS}")
    return value


AZURE_HOST = re.compile(r"(?i).+\.(openai\.azure|cognitiveservices\.azure|services\.ai\.azure)\.(com|us|cn)")
AZURE_PATH = re.compile(r"/openai/v1/?(\?.*)?|/(openai/deployments/[^/?]+|models)/?\?(.+&)?api-version=.+")
AZURE_LOOKS = "https://NAME.openai.azure.com/openai/v1 (or end in /openai/deployments/NAME?api-version=…)"


def is_azure(url: str) -> bool:
    return bool(AZURE_HOST.fullmatch(urllib.parse.urlsplit(url).hostname or ""))


def check_server_url(url: str) -> str:
    """Of a provider. Behind a `?` it may have what each call needs, such as `api-version=…`."""
    if url and not is_address(url, ("http", "https")):
        raise ValueError("should look like http://host:port/v1 (escape @ : / # in a user, password or path)")
    if url and is_azure(url) and not AZURE_PATH.fullmatch("/" + "".join(url.split("/", 3)[3:])):
        raise ValueError(f"should look like {AZURE_LOOKS}, since Azure's interface is there")
    return url


def check_picture_hosts(hosts: tuple[str, ...]) -> tuple[str, ...]:
    for host in hosts:
        url = host if "://" in host else f"http://{host}"
        if not re.fullmatch(rf"https?://{HOST}", url) or not is_address(url, ("http", "https")):
            raise ValueError("should be hosts, comma-separated, like cdn.internal or minio:9000")
    return hosts


def check_plain_server_url(url: str) -> str:
    if url and ("?" in url or not is_address(url, ("http", "https"))):
        raise ValueError("should look like http://host:port, without a ?")
    return url


def check_base_url(url: str) -> str:
    if re.search(r"[?#\s]", url):
        raise ValueError("should have no ?, # or blank, since a file's name follows it")
    return url


def check_authority(path: str) -> str:
    if path and (fault := authority_fault(path)):
        raise ValueError(fault)
    return path


def check_authority_folder(path: str) -> str:
    if path and (fault := folder_fault(path)):
        raise ValueError(fault)
    return path


def check_module(name: str) -> str:
    with contextlib.suppress(ImportError, ValueError):
        if importlib.util.find_spec(name):
            return name
    raise ValueError("should name modules that can be imported, comma-separated, without .py")


Name = Annotated[str, Field(min_length=1)]
ModelName = Annotated[str, Field(max_length=200)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_commas)]
ModuleName = Annotated[str, AfterValidator(check_module)]
Modules = Annotated[tuple[ModuleName, ...], NoDecode, BeforeValidator(split_commas)]
Hosts = Annotated[Names, AfterValidator(check_picture_hosts)]
Sizes = Annotated[Names, matching(IMAGE_SIZE, "be sizes, comma-separated, like 1024x1024,1536x1024")]
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
PositiveSeconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]
Delays = Annotated[tuple[Annotated[float, Field(ge=0, le=3600)], ...], NoDecode, BeforeValidator(split_commas)]
ServerUrl = Annotated[str, Field(repr=False), AfterValidator(check_server_url)]
PlainServerUrl = Annotated[str, Field(repr=False), AfterValidator(check_plain_server_url)]
BaseUrl = Annotated[str, Field(repr=False), AfterValidator(check_base_url)]
MongoUrl = Annotated[SecretStr, AfterValidator(check_mongodb_url)]
RedisUrl = Annotated[SecretStr, AfterValidator(check_redis_url)]
BrokerUrl = Annotated[SecretStr, AfterValidator(check_broker_url)]
AuthorityFile = Annotated[str, AfterValidator(check_authority)]
AuthorityFolder = Annotated[str, AfterValidator(check_authority_folder)]
ArtifactUrl = Annotated[
    str,
    Field(repr=False),
    matching(r"gridfs|data:|[a-z][a-z0-9+.-]*://.*", "be gridfs, data:, or like file:///folder or s3://bucket"),
]


NO_SECRET = SecretStr("")
OPENAI_URL = "https://api.openai.com/v1"
MONGODB_URL = "mongodb://ai_backend_user:ai_backend_password@mongodb:27017/ai_backend?authSource=ai_backend"
REDIS_URL = "redis://redis:6379/0"
COMPOSE_SERVERS = (
    # A replica set would name its members by their hosts in compose's network: so this very server alone is asked.
    ComposeServer("MONGODB_URL", MONGODB_URL, "mongodb", 27017, "MONGODB_PORT", "&directConnection=true"),
    ComposeServer("REDIS_URL", REDIS_URL, "redis", 6379, "REDIS_PORT"),
)


def crowded_lease_fault(lease_s: float, concurrency: int) -> str:
    """Why so many jobs at a time need longer leases, or an empty string.

    One keeper renews all leases of a process, and while hundreds of jobs start at the same time its turn comes late.
    """
    if lease_s >= MIN_CROWDED_LEASE_S or concurrency <= MAX_UNCROWDED:
        return ""
    why = "a burst of starts could hold up the renewal of shorter leases"
    return f"should be at least {MIN_CROWDED_LEASE_S} where over {MAX_UNCROWDED} jobs run at a time, since {why}"


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

    base_url: str = field(repr=False)
    api_key: str = field(repr=False)
    model: str  # empty: one is chosen from those that the server offers
    allowed_models: tuple[str, ...]
    kind: ProviderKind = "text"
    thinking_tokens: int = 4096  # beside those of the answer, for a model that thinks before it answers
    reasoning_effort: str = ""  # how hard such a model thinks; empty: low
    picture_hosts: tuple[str, ...] = ()  # inside the operator's network

    def serving(self, wanted: str | None) -> ProviderSettings:
        """The same settings with the model that a job names, if none is set and the job may name this one."""
        is_allowed = not self.model and wanted in self.allowed_models
        return replace(self, model=wanted) if is_allowed and wanted else self

    @property
    def is_openai(self) -> bool:
        return self.base_url.rstrip("/") in ("", OPENAI_URL)

    @property
    def is_offline(self) -> bool:
        return not self.base_url and not self.api_key

    @property
    def key_headers(self) -> dict[str, str]:
        """The headers that carry the key. User and password in the URL come before it.

        Azure's interface with an `api-version` takes the key in `api-key`, where gateways take it as a bearer's.
        """
        parts = urllib.parse.urlsplit(self.base_url)
        if not self.api_key or "@" in parts.netloc:
            return {}
        is_versioned = "api-version=" in parts.query
        own = {"api-key": self.api_key} if is_versioned else {}
        return own if own and is_azure(self.base_url) else {**own, "authorization": f"Bearer {self.api_key}"}

    @property
    def place(self) -> str:
        """The server's address without what may be secret, for log lines and screens."""
        return "offline stand-in" if self.is_offline else redact_url(self.base_url) or OPENAI_URL

    @property
    def label(self) -> str:
        """Model and server, for the operator."""
        return self.place if self.is_offline else f"{self.model or 'a model of its list'} at {self.place}"


class Settings(BaseSettings):
    """Every setting, from the environment, else from `.env`. A field's name is its variable's name in lower case.

    The first seven are the contract's (section 4). Every other one has a default, so that those seven suffice. Unknown
    variables are ignored.
    """

    model_config = SettingsConfigDict(
        env_file=DOTENV,
        env_file_encoding=DOTENV_ENCODING,
        env_ignore_empty=True,
        extra="ignore",
        validate_default=True,
        hide_input_in_errors=True,
    )

    mongodb_url: MongoUrl = SecretStr(MONGODB_URL)  # MongoDB, shared with the API
    database_name: Annotated[str, Field(pattern=r'^[^/\\. "$]{1,63}$')] = "ai_backend"  # database of the jobs
    redis_url: RedisUrl = SecretStr(REDIS_URL)  # queue, results, notifications
    celery_queue_name: Name = "ai_jobs"  # queue to take jobs from
    celery_soft_time_limit: PositiveSeconds = 90  # seconds that an attempt may take
    celery_time_limit: PositiveSeconds = 120  # seconds after which the process of an attempt is killed
    debug: bool = False  # show DEBUG lines too (never prompts or keys); the worker itself writes none
    log_format: Literal["text", "json"] = "text"  # lines of the log as text, or each as a JSON object

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
    openai_base_url: ServerUrl = ""  # any OpenAI-compatible server; empty: OpenAI (with a key)
    text_base_url: ServerUrl = ""  # another server for text
    text_api_key: SecretStr = NO_SECRET  # its key
    text_model: ModelName = ""  # model for text; empty: one that the server offers
    text_models: Names = ()  # more text models that a job may ask for
    text_max_tokens: int = Field(4096, ge=1)  # the most tokens that a job may ask for; sent only if it is set
    text_thinking_tokens: int = Field(4096, ge=0)  # more tokens for a model that thinks before it answers
    text_reasoning_effort: Literal["", Effort] = ""  # how hard such a model thinks; empty: low
    image_base_url: ServerUrl = ""  # another server for pictures
    image_api_key: SecretStr = NO_SECRET  # its key
    image_model: ModelName = ""  # model for pictures; empty: one that the server offers
    image_models: Names = ()  # more picture models that a job may ask for
    image_sizes: Sizes = ()  # sizes that the picture model offers, the nearest is used (empty: those of its family)
    picture_hosts: Hosts = ()  # hosts inside the operator's network from which a provider's pictures are fetched
    audio_base_url: ServerUrl = ""  # another server for sound
    audio_api_key: SecretStr = NO_SECRET  # its key
    audio_model: ModelName = ""  # model for sound; empty: one that the server offers
    audio_models: Names = ()  # more sound models that a job may ask for
    audio_voice: Name = "alloy"  # voice where a job asks for none or for "default"
    audio_format: Literal["mp3", "wav", "opus", "flac"] = "mp3"  # sound format where a job asks for none
    max_answer_bytes: int = Field(32 * 2**20, ge=1024)  # the largest answer of a provider in bytes

    artifact_url: ArtifactUrl = "gridfs"  # where files go: gridfs, data:, file:///folder, s3://bucket/folder
    artifact_base_url: BaseUrl = "/artifacts"  # public address in front of a file's name
    artifact_retention_days: float = Field(0, ge=0, le=10_000)  # days after which files are deleted; 0: never
    aws_access_key_id: SecretStr = NO_SECRET  # S3 key
    aws_secret_access_key: SecretStr = NO_SECRET  # S3 secret
    s3_bucket_name: str = ""  # bucket, if ARTIFACT_URL is just s3://
    s3_region: str = ""  # S3 region
    s3_endpoint_url: PlainServerUrl = ""  # S3-compatible server; empty: AWS

    ssl_cert_file: AuthorityFile = ""  # file with the authorities that are trusted; empty: the system's
    ssl_cert_dir: AuthorityFolder = ""  # folder with such files

    _loopback: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def loopback(self) -> dict[str, str]:
        """The hosts of the default URLs that don't resolve here, each with the address that is used in its place."""
        return self._loopback

    @model_validator(mode="before")
    @classmethod
    def read_as_utf8(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {name: as_utf8(value) if isinstance(value, str) else value for name, value in values.items()}

    @field_validator("celery_time_limit")
    @classmethod
    def check_limits(cls, value: float, info: ValidationInfo) -> float:
        if value <= info.data.get("celery_soft_time_limit", 0):
            raise ValueError("should be greater than CELERY_SOFT_TIME_LIMIT")
        return value

    @field_validator("lease_seconds")
    @classmethod
    def check_lease(cls, value: float, info: ValidationInfo) -> float:
        if fault := crowded_lease_fault(value, info.data.get("worker_concurrency", 1)):
            raise ValueError(fault)
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
        url = self.celery_broker_url.get_secret_value()
        if url.startswith(("amqp", "sentinel")):
            return url.partition("?")[0]
        return self.broker_target.kombu_url

    @property
    def broker_target(self) -> RedisTarget:
        """The Redis that is the broker, if neither Sentinel nor RabbitMQ is."""
        return RedisTarget.parse(self.celery_broker_url.get_secret_value() or self.redis_url.get_secret_value())

    @property
    def redis_target(self) -> RedisTarget:
        return RedisTarget.parse(self.redis_url.get_secret_value())

    @property
    def sentinel_master(self) -> str:
        return self.celery_broker_url.get_secret_value().partition("?master_name=")[2]

    @property
    def is_rabbitmq(self) -> bool:
        return self.broker_url.startswith("amqp")

    @property
    def result_backend(self) -> str:
        return self.celery_result_backend.get_secret_value() or self.redis_url.get_secret_value()

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
            kind=kind,
            thinking_tokens=self.text_thinking_tokens,
            reasoning_effort=self.text_reasoning_effort,
            picture_hosts=self.picture_hosts,
        )

    @property
    def usual_cap(self) -> dict[str, Any]:
        """What is sent with a text that names no cap: TEXT_MAX_TOKENS, if the operator has set it."""
        return {"max_tokens": self.text_max_tokens} if "text_max_tokens" in self.model_fields_set else {}

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
    """A line for each fault: the variable, its value unless that may be secret, and what would be right."""
    lines = []
    for fault in error.errors():
        name = str(fault["loc"][0])
        text = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
        kind, value = Settings.model_fields[name].annotation, str(fault["input"])
        is_hidden = kind is SecretStr or (name.endswith("_url") and "://" not in value)  # it may be a misplaced key
        shown = "(hidden)" if is_hidden else repr(redact_url(value))
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


def content_fault(data: bytes) -> str:
    """Why these bytes can't be read as a text of settings, or an empty string."""
    try:
        text = data.decode(DOTENV_ENCODING)
    except UnicodeDecodeError as error:
        is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        where = "is in UTF-16" if is_utf16 else f"isn't in UTF-8 (line {data[: error.start].count(10) + 1})"
        return f"{where}: save it in UTF-8 (in PowerShell: Set-Content -Encoding utf8)"
    return "holds NUL bytes, as text in UTF-16 does: save it in UTF-8" if "\0" in text else ""


def dotenv_fault(path: Path) -> str:
    """What is wrong with the file as a whole, with advice; or an empty string, also where there is no file."""
    if path.is_dir():
        return "is a folder (Docker makes one where a file to mount is missing): put the file there, or remove it"
    if path.is_symlink() and not path.exists():
        return "is a link to a file that isn't there: put the file there, or remove the link"
    if not path.is_file():  # a pipe can be read only once
        return ""
    try:
        return content_fault(path.read_bytes())
    except OSError as error:
        return f"can't be read ({error.strerror}): let the worker's user read it, or remove it"


def refuse(lines: Sequence[str]) -> NoReturn:
    print("The worker can't start, because of its settings:", *lines, sep="\n", file=sys.stderr)
    print("Fix them in the environment or in .env; docs/settings.md lists all variables.", file=sys.stderr)
    raise SystemExit(EXIT_BAD_SETTINGS) from None


def read_dotenv() -> dict[str, str]:
    """The variables of `.env`, by their names as they stand there. A pipe, which can be read only once, has none."""
    if not Path(DOTENV).is_file():
        return {}
    with Path(DOTENV).open(encoding=DOTENV_ENCODING) as lines:
        return {line.key: line.value or "" for line in parse_stream(lines) if line.key}


def compose_servers(settings: Settings) -> list[ComposeServer]:
    """The servers whose URL is the contract's default. In Kubernetes there are none: a pod's loopback has others."""
    urls = {one: getattr(settings, one.variable.lower()).get_secret_value() for one in COMPOSE_SERVERS}
    return [one for one, url in urls.items() if url == one.url and IN_A_POD not in os.environ]


def unresolved_servers(settings: Settings) -> list[ComposeServer]:
    """Those whose names don't resolve here, and nothing listens on the loopback in their place."""
    return [one for one in compose_servers(settings) if not resolves(one.host)]


def with_loopback(settings: Settings) -> Settings:
    """The settings, with 127.0.0.1 in a default URL whose host doesn't resolve here, if something listens there.

    So the contract's `.env` serves on a host as in a container: compose publishes its servers there. A URL that isn't
    the default is never changed. The port is tried first, since that costs nothing where the name resolves.
    """
    servers = compose_servers(settings)
    if not servers:
        return settings
    variables = {**read_dotenv(), **os.environ}
    ports = {one: port for one in servers if listens(port := one.port(variables)) and not resolves(one.host)}
    urls = {one.variable.lower(): SecretStr(one.url_at(port)) for one, port in ports.items()}
    moved = settings.model_copy(update=urls)
    moved._loopback = {one.host: f"{LOOPBACK}:{port}" for one, port in ports.items()}
    return moved


def misspelt_variables() -> list[Misspelt]:
    """The variables of the environment and of `.env` that are probably misspelt settings."""
    places = {**dict.fromkeys(read_dotenv(), DOTENV), **dict.fromkeys(os.environ, "environment")}
    return list(find_misspelt(places, Settings.model_fields))


def remarks(settings: Settings) -> list[str]:
    """What an operator should know at the start: which server is used in another's place, and what may be misspelt."""
    moved = "{} doesn't resolve here, so {} is used, where compose.yaml publishes it"
    lines = [moved.format(host, place) for host, place in settings.loopback.items()]
    return lines + [f"{one.seen}: {one.advice}" for one in misspelt_variables()]


def load_settings(**overrides: Any) -> Settings:
    """Reads the settings. If any are wrong, prints all faults to stderr and exits with 2.

    OpenSSL reads SSL_CERT_FILE and SSL_CERT_DIR from the environment alone, so those of `.env` are put there.
    """
    if overrides.get("_env_file", DOTENV) and (fault := dotenv_fault(Path(DOTENV))):
        refuse([f"  {DOTENV} {fault}"])
    try:
        settings = Settings(**overrides)
    except ValidationError as error:
        refuse(settings_faults(error))
    if faults := proxy_faults(settings):
        refuse(faults)
    for name in ("ssl_cert_file", "ssl_cert_dir"):
        if value := getattr(settings, name):
            os.environ[name.upper()] = value
    return with_loopback(settings) if overrides.get("_env_file", DOTENV) else settings


def announce_settings() -> Settings:
    """Reads the settings, and logs the remarks on them, where Celery's own command starts the process.

    Celery has not set up the log by then, so they go to stderr, as the faults do.
    """
    settings = load_settings()
    for remark in remarks(settings):
        logger.warning("%s", remark)
    return settings
