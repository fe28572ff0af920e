"""The worker's parts in this process, section by section in the order of worker.py; test_processes.py has the rest.

MongoDB and Redis are real where atomicity, shapes or failure are the matter; the provider is always a real server.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import importlib
import io
import ipaddress
import json
import logging
import math
import mimetypes
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
import traceback
import tracemalloc
import wave
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import gridfs
import httpx
import pymongo
import pytest
import redis
from bson import ObjectId
from celery import Celery, uuid
from celery.concurrency import solo, thread
from celery.exceptions import Ignore, Reject, Retry
from click.testing import CliRunner
from fastapi import FastAPI
from kombu import Connection
from moto.server import ThreadedMotoServer
from PIL import Image
from pydantic import BaseModel, ValidationError

import worker
from testbed.answers import SOUND_DURATION_S, picture, picture_bomb, sound_flac, sound_mp3, sound_opus, sound_wav
from testbed.api import Api
from testbed.processes import free_port, poll
from testbed.provider import Provider
from testbed.servers import MongoServer
from worker import (
    Call,
    DropJob,
    FailJob,
    HandBack,
    Job,
    JobError,
    LeaveJob,
    Limits,
    Media,
    Miss,
    MissKind,
    ProviderSettings,
    Result,
    RetryJob,
    Runtime,
    Settings,
    Status,
    StoreUnavailable,
)

LIMITS = Limits(soft_s=90, hard_s=120)
KEY = "sk-test-planted-key"
SECRET = "hunter2"
SOURCE = Path(__file__).parent
NOWHERE = "127.0.0.1:1"  # nothing listens on this port


@pytest.fixture(scope="module")
def database_name(mongo_server: MongoServer) -> Iterator[str]:
    """One database for all tests here, which empty it: to drop it each time would take longer than they do."""
    yield (name := f"test_in_process_{os.getpid()}")
    with pymongo.MongoClient[Any](mongo_server.url) as client:
        client.drop_database(name)


@pytest.fixture
def environment(environment: dict[str, str], database_name: str) -> dict[str, str]:
    return {**environment, "DATABASE_NAME": database_name}


# Commands leave their connections to the end of their process, which here goes on.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}:ResourceWarning")
    for what in ("Unclosed MongoClient", "unclosed <?(socket|transport)")
]


def table(names: str, *rows: tuple[Any, ...]) -> pytest.MarkDecorator:
    """A parametrized table; each row begins with its reason, which names the test."""
    return pytest.mark.parametrize(names, [pytest.param(*values, id=reason) for reason, *values in rows])


def bare_settings(**values: object) -> Settings:
    """Settings from these values alone."""
    return Settings(_env_file=None, **values)  # type: ignore[call-arg]


def insert(runtime: Runtime, **fields: object) -> ObjectId:
    """Inserts a document as the API does; fields replace or add to the usual ones."""
    now = datetime.now(UTC)
    usual = {"user_id": "user-1", "session_id": None, "job_type": "text_generation", "status": "pending"}
    usual |= {"input_data": {"prompt": "Hello [tokens 3]"}, "created_at": now, "updated_at": now}
    inserted: ObjectId = runtime.database["jobs"].insert_one({**usual, **fields}).inserted_id
    return inserted


def read(runtime: Runtime, job_id: ObjectId) -> dict[str, Any]:
    document = runtime.database["jobs"].find_one({"_id": job_id})
    assert document
    return document


def change(runtime: Runtime, job_id: ObjectId, **fields: object) -> None:
    """Sets fields behind the store's back; `worker__owner` is `worker.owner`."""
    named = {name.replace("__", "."): value for name, value in fields.items()}
    runtime.database["jobs"].update_one({"_id": job_id}, {"$set": named})


def ago(seconds: float) -> datetime:
    return datetime.now(UTC) - timedelta(seconds=seconds)


def claim(runtime: Runtime, job_id: ObjectId | None = None, owner: str = "owner-1") -> Job:
    """Claims this job, or a new one."""
    job = runtime.store.claim(job_id or insert(runtime), owner, LIMITS)
    assert isinstance(job, Job)
    return job


def missed(runtime: Runtime, job_id: ObjectId, owner: str = "another") -> MissKind:
    """Tries to claim and returns why that failed."""
    miss = runtime.store.claim(job_id, owner, LIMITS)
    assert isinstance(miss, Miss)
    return miss.kind


def some_job(**fields: Any) -> Job:
    """A job that is in no database."""
    usual = {"id": ObjectId(), "job_type": "text_generation", "user_id": "user-1", "session_id": "s-1"}
    usual |= {"input_data": {"prompt": "planted prompt"}, "owner": "owner-1", "attempt": 1, "limits": LIMITS}
    return Job(**{**usual, "first_started_at": datetime.now(UTC), **fields})


# ── vocabulary ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_clock_adds_what_passed_since_the_servers_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = iter([100.0, 100.0, 107.5])
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: next(passed)))
    clock = worker.Clock()
    clock.synchronise(datetime(2031, 1, 1, tzinfo=UTC))
    assert clock.now() == datetime(2031, 1, 1, 0, 0, 7, 500_000, tzinfo=UTC)


def test_the_clock_keeps_whole_milliseconds_as_documents_do() -> None:
    clock = worker.Clock()
    clock.synchronise(datetime(2031, 1, 1, microsecond=999, tzinfo=UTC))
    assert clock.now().microsecond % 1000 == 0


def test_there_are_the_contracts_four_statuses() -> None:
    assert {status.value for status in Status} == {"pending", "processing", "completed", "failed"}


@table(
    "error, detail, sentence",
    ("nothing given", RetryJob(), "The provider is busy", "The provider is busy"),
    ("a detail is for the log alone", RetryJob("HTTP 503"), "HTTP 503", "The provider is busy"),
    ("both", FailJob("HTTP 400", "Change it."), "HTTP 400", "Change it."),
    ("a sentence is better than no detail", FailJob(sentence="Change it."), "Change it.", "Change it."),
)
def test_an_error_has_a_detail_for_the_log_and_a_sentence_for_the_person(
    error: JobError, detail: str, sentence: str
) -> None:
    assert (error.detail, str(error), error.sentence) == (detail, detail, sentence)


def test_a_job_in_a_log_line_shows_no_prompt() -> None:
    job = some_job(attempt=2)
    assert str(job) == f"job={job.id} attempt=2 type='text_generation'"


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment without any of the worker's variables, in an empty folder."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


@pytest.fixture
def fresh_settings(variables: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The same, and the settings of this process are read anew."""
    worker.current_settings.cache_clear()
    yield variables
    worker.current_settings.cache_clear()


def faults(variables: pytest.MonkeyPatch, **bad: str) -> list[str]:
    for name, value in bad.items():
        variables.setenv(name, value)
    with pytest.raises(ValidationError) as caught:
        Settings()
    return worker.settings_faults(caught.value)


def test_without_variables_the_contracts_defaults_hold(variables: pytest.MonkeyPatch) -> None:
    settings = Settings()
    url = "mongodb://ai_backend_user:ai_backend_password@mongodb:27017/ai_backend?authSource=ai_backend"
    assert settings.mongodb_url.get_secret_value() == url
    assert settings.redis_url.get_secret_value() == "redis://redis:6379/0"
    assert (settings.database_name, settings.celery_queue_name) == ("ai_backend", "ai_jobs")
    assert (settings.celery_soft_time_limit, settings.celery_time_limit) == (90, 120)


def test_every_setting_has_a_default(variables: pytest.MonkeyPatch) -> None:
    assert not [name for name, field in Settings.model_fields.items() if field.is_required()]


def test_an_empty_variable_counts_as_unset(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("CELERY_TIME_LIMIT", "")
    variables.setenv("REDIS_URL", "")
    assert Settings() == bare_settings()


def test_a_dotenv_file_is_read_and_the_environment_wins(variables: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("TEXT_MODEL=from-file\nIMAGE_MODEL=from-file\n")
    variables.setenv("IMAGE_MODEL", "from-environment")
    settings = Settings()
    assert (settings.text_model, settings.image_model) == ("from-file", "from-environment")


def test_the_apis_own_variables_are_ignored(variables: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("API_PORT=8000\nCLERK_SECRET_KEY=x\nPENDING_TIMEOUT_SECONDS=300\nDEBUG=true\n")
    assert Settings().debug


def test_lists_are_separated_by_commas(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("RETRY_DELAYS", "1, 2.5")
    variables.setenv("TEXT_MODELS", "small, large,")
    settings = Settings()
    assert (settings.retry_delays, settings.most_attempts) == ((1, 2.5), 3)
    assert settings.text_models == ("small", "large")


@table(
    "name, value, right",
    ("no scheme", "MONGODB_URL", "localhost:27017", "mongodb://user:password@host:27017/database"),
    ("an unescaped @ in the password", "MONGODB_URL", "mongodb://user:p@ss@host/db", "escape"),
    ("a name that MongoDB refuses", "DATABASE_NAME", "a b", "match pattern"),
    ("a Redis URL without scheme", "REDIS_URL", "localhost:6379", "redis://:password@host:6379/0"),
    ("an unescaped / in the password", "REDIS_URL", "redis://:a/b@host:6379/0", "redis://:password@host:6379/0"),
    ("an unknown broker", "CELERY_BROKER_URL", "kafka://host", "redis:// or amqp://"),
    ("a Sentinel without its master's name", "CELERY_BROKER_URL", "sentinel://host:26379/0", "?master_name=NAME"),
    ("a result backend that isn't Redis", "CELERY_RESULT_BACKEND", "file:///x", "redis://"),
    ("a word for a number", "CELERY_SOFT_TIME_LIMIT", "ninety", "valid number"),
    ("no time at all", "CELERY_SOFT_TIME_LIMIT", "0", "greater than 0"),
    ("not a number", "CELERY_TIME_LIMIT", "nan", "less than or equal to 86400"),
    ("for ever", "CELERY_TIME_LIMIT", "inf", "less than or equal to 86400"),
    ("the hard limit is no later than the soft", "CELERY_TIME_LIMIT", "90", "CELERY_SOFT_TIME_LIMIT"),
    ("neither true nor false", "DEBUG", "maybe", "valid boolean"),
    ("a pool that can't run this", "WORKER_POOL", "gevent", "'prefork', 'threads' or 'solo'"),
    ("no slot", "WORKER_CONCURRENCY", "0", "greater than or equal to 1"),
    ("half a slot", "WORKER_CONCURRENCY", "1.5", "valid integer"),
    ("a lease that no keeper can renew in time", "LEASE_SECONDS", "1", "greater than or equal to 2"),
    ("an endless grace", "SHUTDOWN_GRACE", "inf", "less than or equal to 86400"),
    ("one delay is none", "RETRY_DELAYS", "5,x", "valid number"),
    ("a delay before the failure", "RETRY_DELAYS", "-1", "greater than or equal to 0"),
    ("a module that isn't there", "HANDLER_MODULES", "no_such_module", "modules that can be imported"),
    ("a provider without scheme", "OPENAI_BASE_URL", "api.example.com/v1", "http://host:port/v1"),
    ("a type's server without host", "TEXT_BASE_URL", "http:///v1", "http://host:port/v1"),
    ("sizes in words", "IMAGE_SIZES", "1024x1024,big", "1024x1024,1536x1024"),
    ("a format that can't be checked", "AUDIO_FORMAT", "aac", "'mp3', 'wav', 'opus' or 'flac'"),
    ("an answer of no size", "MAX_ANSWER_BYTES", "10", "greater than or equal to 1024"),
    ("a path instead of a URL", "ARTIFACT_URL", "/tmp/artifacts", "file:///folder"),
    ("an S3 server without scheme", "S3_ENDPOINT_URL", "minio:9000", "http://host:port"),
)
def test_a_bad_value_is_one_fault_with_its_variable_and_what_is_right(
    variables: pytest.MonkeyPatch, name: str, value: str, right: str
) -> None:
    [line] = faults(variables, **{name: value})
    assert line.strip().startswith(f"{name} = ")
    assert right in line


def test_s3_without_any_bucket_is_a_fault(variables: pytest.MonkeyPatch) -> None:
    [line] = faults(variables, ARTIFACT_URL="s3://")
    assert "S3_BUCKET_NAME" in line


def test_all_faults_are_reported_at_once(variables: pytest.MonkeyPatch) -> None:
    bad = {"MONGODB_URL": "x", "CELERY_SOFT_TIME_LIMIT": "200", "WORKER_POOL": "x", "ARTIFACT_URL": "s3://"}
    lines = faults(variables, **bad)
    names = {line.split("=")[0].strip() for line in lines}
    assert names == {"MONGODB_URL", "CELERY_TIME_LIMIT", "WORKER_POOL", "S3_BUCKET_NAME"}


@table(
    "name, value",
    ("no host", "MONGODB_URL", f"mongodb://user:{SECRET}@"),
    ("an unescaped @", "MONGODB_URL", f"mongodb://user:{SECRET}@x@host/db"),
    ("an unescaped / in Redis' password", "REDIS_URL", f"redis://:{SECRET}/x@host:6379/0"),
    ("a broker's password", "CELERY_BROKER_URL", f"kafka://user:{SECRET}@host"),
    ("a result backend's password", "CELERY_RESULT_BACKEND", f"http://user:{SECRET}@host"),
    ("credentials in a provider's URL", "OPENAI_BASE_URL", f"ftp://user:{SECRET}@host"),
    ("an unescaped / in a provider's URL", "TEXT_BASE_URL", f"ftp://user:a/{SECRET}@host"),
    ("a key in a query", "AUDIO_BASE_URL", f"ftp://host/v1?key={SECRET}"),
    ("a provider's URL without scheme", "IMAGE_BASE_URL", f"user:{SECRET}@host/v1"),
    ("an artifact URL with one slash", "ARTIFACT_URL", f"ftp:/user:{SECRET}@host/folder"),
)
def test_a_fault_never_shows_a_secret(
    fresh_settings: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    fresh_settings.setenv(name, value)
    with pytest.raises(SystemExit):
        worker.current_settings()
    printed = capsys.readouterr()
    assert name in printed.err
    assert SECRET not in printed.err + printed.out


def test_bad_settings_end_with_2_and_no_stack_trace(
    variables: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables.setenv("WORKER_POOL", "gevent")
    with pytest.raises(SystemExit) as ended:
        worker.load_settings()
    assert ended.value.code == 2
    assert "WORKER_POOL = 'gevent'" in (printed := capsys.readouterr().err)
    assert "Traceback" not in printed


def test_the_settings_shown_whole_hold_no_secret() -> None:
    url = f"http://user:{SECRET}@host"
    settings = bare_settings(openai_api_key=SECRET, redis_url=f"redis://:{SECRET}@host", text_base_url=url)
    assert SECRET not in repr(bare_settings(openai_api_key=SECRET, redis_url=f"redis://:{SECRET}@host"))
    assert SECRET not in settings.provider("text").label
    assert SECRET not in repr(settings.provider("image"))


@table(
    "timelimit, soft_s, hard_s",
    ("no limits in the message", None, 90, 120),
    ("both are given", [20, 10], 10, 20),
    ("both are null", [None, None], 90, 120),
    ("a hard limit below our soft one", [30, None], 27, 30),
    ("a long hard limit keeps our soft one", [600, None], 90, 600),
    ("a short soft limit keeps our hard one", [None, 10], 10, 120),
    ("a long soft limit moves the hard one along", [None, 300], 300, 330),
    ("soft after hard comes before it", [100, 200], 90, 100),
    ("of the wrong length", [10], 90, 120),
    ("a number that no clock can hold", [10**400, 10**400], 90, 120),
    ("longer than a day", [1e12, 1e12], 90, 120),
    ("words", ["a", "b"], 90, 120),
    ("negative", [-5, -6], 90, 120),
    ("not finite", [float("inf"), float("nan")], 90, 120),
    ("true is no second", [True, True], 90, 120),
    ("an object", {"hard": 1}, 90, 120),
)
def test_a_messages_limits_win_where_they_make_sense(timelimit: object, soft_s: float, hard_s: float) -> None:
    assert bare_settings().limits(timelimit) == Limits(pytest.approx(soft_s), pytest.approx(hard_s))


@table(
    "values, url, key",
    ("nothing is set: offline", {}, "", ""),
    ("a key alone means OpenAI", {"openai_api_key": "shared"}, "", "shared"),
    ("a server alone needs no key", {"openai_base_url": "http://all"}, "http://all", ""),
    ("a server of its own", {"text_base_url": "http://own", "text_api_key": "own"}, "http://own", "own"),
    ("its server never gets the shared key", {"text_base_url": "http://own", "openai_api_key": "k"}, "http://own", ""),
    (
        "a key of its own at the shared server",
        {"openai_base_url": "http://all", "text_api_key": "own"},
        "http://all",
        "own",
    ),
    ("another type's server is none of its", {"image_base_url": "http://i", "image_api_key": "i"}, "", ""),
)
def test_each_type_has_a_server_and_a_key(values: dict[str, str], url: str, key: str) -> None:
    where = bare_settings(**values).provider("text")
    assert (where.base_url, where.api_key) == (url, key)
    assert where.is_offline is not (url or key)


@table(
    "where, label",
    ("offline", ProviderSettings("", "", "m", ()), "offline stand-in"),
    ("OpenAI", ProviderSettings("", "k", "m", ()), "m at https://api.openai.com/v1"),
    ("a server", ProviderSettings("http://u:p@host/v1", "k", "m", ()), "m at http://***@host/v1"),
    ("another server's model of that name", ProviderSettings("http://host", "k", "tts-1", ()), "tts-1 at http://host"),
)
def test_a_provider_is_shown_without_its_credentials(where: ProviderSettings, label: str) -> None:
    assert where.label == label


def test_a_model_that_openai_ends_soon_is_shown_with_its_last_day() -> None:
    assert "OpenAI ends this model on 2027-01-06" in bare_settings(openai_api_key="k").provider("audio").label


@table(
    "url, shown",
    ("no credentials", "redis://host:6379/0", "redis://host:6379/0"),
    ("user and password", "mongodb://user:pw@host/db", "mongodb://***@host/db"),
    ("an @ in the password", "mongodb://user:p@w@host/db", "mongodb://***@host/db"),
    ("a / in the password", "redis://:p/w@host", "redis://***@host"),
    ("a ? in the password", "redis://:p?w@host", "redis://***@host"),
    ("a query", "redis://host/0?password=pw", "redis://host/0"),
    ("no URL", "gridfs", "gridfs"),
)
def test_a_url_is_shown_without_secrets(url: str, shown: str) -> None:
    assert worker.redact_url(url) == shown


@table(
    "values, pool",
    ("as told", {"worker_pool": "solo"}, "solo"),
    ("where fork works, else threads", {}, "threads" if sys.platform == "darwin" else "prefork"),
)
def test_the_pool_is_the_one_asked_for_or_what_works_here(values: dict[str, str], pool: str) -> None:
    assert bare_settings(**values).pool == pool


def test_broker_and_results_are_redis_unless_told_otherwise() -> None:
    other = bare_settings(celery_broker_url="amqp://rabbit", celery_result_backend="redis://results")
    assert (bare_settings().broker_url, bare_settings().result_backend) == ("redis://redis:6379/0",) * 2
    assert (other.broker_url, other.result_backend) == ("amqp://rabbit", "redis://results")


# ── Celery app ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_json_is_spoken() -> None:
    configuration = worker.celery_configuration(bare_settings())
    assert configuration["accept_content"] == ["json"]
    assert {configuration["task_serializer"], configuration["result_serializer"]} == {"json"}


def test_a_message_is_acknowledged_after_its_job_and_comes_back_from_a_dead_worker() -> None:
    configuration = worker.celery_configuration(bare_settings())
    assert configuration["task_acks_late"]
    assert configuration["task_reject_on_worker_lost"]
    assert configuration["worker_prefetch_multiplier"] == 1


def test_the_queue_and_the_hard_limit_are_the_settings() -> None:
    configuration = worker.celery_configuration(bare_settings(celery_queue_name="mine", celery_time_limit=200))
    assert (configuration["task_default_queue"], configuration["task_time_limit"]) == ("mine", 200)


def test_celery_gets_no_soft_limit_since_the_attempt_has_its_own() -> None:
    assert "task_soft_time_limit" not in worker.celery_configuration(bare_settings())


@table("time_limit_s, least_s", ("never below an hour", 120, 3600), ("longer than the longest job", 7200, 7201))
def test_no_running_job_is_delivered_again_for_its_length(time_limit_s: float, least_s: float) -> None:
    configuration = worker.celery_configuration(bare_settings(celery_time_limit=time_limit_s))
    assert configuration["broker_transport_options"]["visibility_timeout"] >= least_s


@table(
    "url, options",
    ("Redis", "redis://redis", {"visibility_timeout", *worker.SOCKET_TIMEOUTS}),
    ("Sentinel", "sentinel://h:1/0?master_name=x", {"visibility_timeout", "master_name", *worker.SOCKET_TIMEOUTS}),
    ("RabbitMQ", "amqp://rabbit", set(worker.RABBITMQ_TIMEOUTS)),
    ("RabbitMQ with TLS", "amqps://rabbit", set(worker.RABBITMQ_TIMEOUTS)),
)
def test_each_broker_gets_the_options_that_it_knows(url: str, options: set[str]) -> None:
    configuration = worker.celery_configuration(bare_settings(celery_broker_url=url))
    assert set(configuration["broker_transport_options"]) == options


def test_celery_takes_broker_and_results_from_the_settings_though_it_knows_the_variables_itself() -> None:
    urls = {"CELERY_BROKER_URL": "rediss://broker/1", "CELERY_RESULT_BACKEND": "redis://results/2"}
    script = "import worker; app = worker.app; print(app.connection_for_read().ssl, app.connection_for_write().ssl)"
    command = [sys.executable, "-c", f"{script}; print(type(app.backend).__name__, app.backend.as_uri())"]
    ended = subprocess.run(command, env={**os.environ, **urls}, cwd=SOURCE, capture_output=True, text=True, timeout=30)
    verified = str({"ssl_cert_reqs": ssl.CERT_REQUIRED})
    assert ended.stdout == f"{verified} {verified}\nResultBackend redis://results/2\n"


def test_only_rabbitmqs_queue_is_declared_by_ourselves() -> None:
    by_url = {url: worker.celery_configuration(bare_settings(celery_broker_url=url)) for url in ("", "amqp://rabbit")}
    assert by_url[""]["task_queues"] is None
    (queue,) = by_url["amqp://rabbit"]["task_queues"]
    assert (queue.name, queue.exchange.name, queue.exchange.type, queue.routing_key) == ("ai_jobs",) * 2 + (
        "direct",
        "ai_jobs",
    )


def test_importing_the_worker_reads_no_settings_and_configures_nothing(tmp_path: Path) -> None:
    script = "import worker; print(worker.current_settings.cache_info().currsize, worker.app.configured)"
    environment = {**os.environ, "MONGODB_URL": "bad", "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert (ended.stdout, ended.stderr) == ("0 False\n", "")


@table(
    "debug, level",
    ("DEBUG is for the worker's own lines", True, logging.DEBUG),
    ("else it tells what happens", False, logging.INFO),
)
def test_libraries_stay_quiet_whatever_debug_says(fresh_settings: pytest.MonkeyPatch, debug: bool, level: int) -> None:
    fresh_settings.setenv("DEBUG", str(debug))
    worker.quieten_libraries(logger=logging.getLogger("no handlers"))
    assert worker.logger.level == level
    assert logging.getLogger("pymongo").level == logging.getLogger("openai").level == logging.INFO
    assert logging.getLogger("httpx2").level == logging.WARNING


def logged(name: str, level: int, message: str, error: BaseException | None = None) -> logging.LogRecord:
    """A line of Celery's after the filter that keeps bodies out of the log."""
    info = (type(error), error, None) if error else None
    record = logging.LogRecord(name, level, __file__, 1, message, (), info)  # type: ignore[arg-type]
    assert worker.without_bodies(record)
    return record


def test_celerys_line_about_a_message_it_cant_read_holds_no_body() -> None:
    line = f"Received invalid task message: x headers:{{}}\nbody: {SECRET}"
    record = logged("celery.worker.consumer.consumer", logging.ERROR, line, ValueError(SECRET))
    assert record.getMessage() == "Received invalid task message: x"
    assert record.exc_info is None


def test_a_message_that_was_given_back_is_no_error() -> None:
    record = logged("celery.app.trace", logging.ERROR, "rejected", Reject("shutting down", requeue=True))
    assert (record.levelname, record.exc_info) == ("INFO", None)


def test_any_other_line_of_celery_stays_as_it_is() -> None:
    record = logged("celery.app.trace", logging.ERROR, "a\nb", error := ValueError("x"))
    assert (record.getMessage(), record.exc_info[1] if record.exc_info else None) == ("a\nb", error)


# ── job store ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pending_job_is_claimed_under_a_lease(runtime: Runtime) -> None:
    job_id = insert(runtime, input_data={"prompt": "Hello"})
    job = claim(runtime, job_id)
    document = read(runtime, job_id)
    assert (job.id, job.owner, job.attempt, job.limits) == (job_id, "owner-1", 1, LIMITS)
    assert (job.user_id, job.session_id, job.input_data) == ("user-1", None, {"prompt": "Hello"})
    assert (document["status"], document["worker"]["pid"]) == ("processing", os.getpid())
    lease_s = (document["worker"]["lease_until"] - document["updated_at"]).total_seconds()
    assert lease_s == runtime.settings.lease_seconds


def test_a_released_job_that_is_due_is_claimed_with_one_more_attempt(runtime: Runtime) -> None:
    job = claim(runtime)
    runtime.store.release(job, ago(1), counted=True)
    assert claim(runtime, job.id, "owner-2").attempt == 2


def test_started_at_is_the_first_start(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, started_at=ago(60), worker__first_started_at=ago(60))
    before = read(runtime, job.id)
    runtime.store.release(job, ago(1), counted=True)
    again = claim(runtime, job.id, "owner-2")
    assert read(runtime, job.id)["started_at"] == before["started_at"]
    assert again.first_started_at.replace(tzinfo=None) == before["worker"]["first_started_at"]


@table(
    "fields",
    ("failed, and set back to pending", {}),
    ("after all its attempts", {"worker__attempt": 4}),
    ("after its deadline", {"worker__first_started_at": ago(3600), "worker__available_at": ago(-3600)}),
    ("whatever its bookkeeping is", {"worker": "text"}),
)
def test_a_job_that_is_set_back_to_pending_starts_afresh(runtime: Runtime, fields: dict[str, Any]) -> None:
    job = claim(runtime)
    runtime.store.fail(job, "No.")
    change(runtime, job.id, **fields)
    change(runtime, job.id, status="pending")
    again = claim(runtime, job.id, "owner-2")
    document = read(runtime, job.id)
    assert (again.attempt, again.owner, document["worker"]["attempt"]) == (1, "owner-2", 1)
    assert (document["completed_at"], document["error_message"]) == (None, None)
    assert document["started_at"] == document["worker"]["first_started_at"] == document["updated_at"]
    assert not {"unnotified", "available_at"} & set(document["worker"])


def test_a_claim_whose_reply_was_lost_is_recognised_by_its_owner(runtime: Runtime) -> None:
    job = claim(runtime)
    assert runtime.store.claim(job.id, job.owner, LIMITS) == job


def test_a_live_lease_is_held(runtime: Runtime) -> None:
    assert missed(runtime, claim(runtime).id) is MissKind.HELD


def test_an_expired_lease_is_never_claimed_before_a_sweeper_released_it(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(60))
    assert missed(runtime, job.id) is MissKind.HELD


def test_an_older_workers_running_job_is_held(runtime: Runtime) -> None:
    assert missed(runtime, insert(runtime, status="processing", worker=None)) is MissKind.HELD


def test_a_released_job_waits_until_it_is_due(runtime: Runtime) -> None:
    job = claim(runtime)
    runtime.store.release(job, ago(-60), counted=True)
    assert missed(runtime, job.id) is MissKind.WAITING


@table("status", ("completed", "completed"), ("failed or cancelled", "failed"))
def test_an_ended_job_is_not_claimed(runtime: Runtime, status: str) -> None:
    miss = runtime.store.claim(insert(runtime, status=status), "owner-1", LIMITS)
    assert isinstance(miss, Miss)
    assert (miss.kind, miss.document["status"]) == (MissKind.TERMINAL, status)


def test_a_job_without_document_is_unknown(runtime: Runtime) -> None:
    assert missed(runtime, ObjectId()) is MissKind.UNKNOWN


@table(
    "fields",
    ("all attempts are used up", {"worker__attempt": 4}),
    ("its deadline has passed", {"worker__first_started_at": ago(3600)}),
)
def test_a_job_at_its_bounds_is_not_claimed(runtime: Runtime, fields: dict[str, Any]) -> None:
    job = claim(runtime)
    runtime.store.release(job, ago(1), counted=True)
    change(runtime, job.id, **fields)
    assert missed(runtime, job.id) is MissKind.EXHAUSTED
    assert isinstance(runtime.store.claim(job.id, "owner-2", LIMITS, bounded=False), Job)


def test_the_job_deadline_is_never_below_the_attempts_own_limit(runtime: Runtime) -> None:
    job = claim(runtime)
    runtime.store.release(job, ago(1), counted=True)
    change(runtime, job.id, worker__first_started_at=ago(700))
    assert isinstance(runtime.store.claim(job.id, "owner-2", Limits(900, 1000)), Job)


def test_of_fifty_claims_at_once_exactly_one_wins(runtime: Runtime) -> None:
    job_id, barrier = insert(runtime), threading.Barrier(50)

    def race(number: int) -> Job | Miss:
        barrier.wait()
        return runtime.store.claim(job_id, f"owner-{number}", LIMITS)

    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(race, range(50)))
    [winner] = [answer for answer in answers if isinstance(answer, Job)]
    assert {answer.kind for answer in answers if isinstance(answer, Miss)} == {MissKind.HELD}
    assert read(runtime, job_id)["worker"]["owner"] == winner.owner


def test_complete_writes_output_and_time_and_clears_the_error(runtime: Runtime) -> None:
    job = claim(runtime)
    assert runtime.store.complete(job, {"image_url": "/a.png"}, "/a.png")
    document = read(runtime, job.id)
    assert (document["status"], document["output_data"]) == ("completed", {"image_url": "/a.png"})
    assert (document["artifact_url"], document["error_message"]) == ("/a.png", None)
    assert document["completed_at"] == document["updated_at"]
    assert (document["worker"]["owner"], "unnotified" in document["worker"]) == ("owner-1", True)


def test_fail_writes_the_sentence_and_completed_at_too(runtime: Runtime) -> None:
    job = claim(runtime)
    assert runtime.store.fail(job, "That was too much.")
    document = read(runtime, job.id)
    assert (document["status"], document["error_message"]) == ("failed", "That was too much.")
    assert isinstance(document["completed_at"], datetime)


@table(
    "text",
    ("an operator of MongoDB", "$inc"),
    ("a reference to a field", "$status"),
    ("dots", "worker.owner"),
    ("null characters", "a\0b"),
    ("another script", "смысл 🜲"),
)
def test_a_generated_text_is_stored_verbatim(runtime: Runtime, text: str) -> None:
    job = claim(runtime)
    runtime.store.complete(job, {"generated_text": text}, None)
    assert read(runtime, job.id)["output_data"] == {"generated_text": text}


def end_by_complete(runtime: Runtime, job: Job) -> bool:
    return runtime.store.complete(job, {}, None)


def end_by_fail(runtime: Runtime, job: Job) -> bool:
    return runtime.store.fail(job, "No.")


def end_by_release(runtime: Runtime, job: Job) -> bool:
    return runtime.store.release(job, ago(0), counted=False)


VERBS = [end_by_complete, end_by_fail, end_by_release]


@pytest.mark.parametrize("end", VERBS)
@table(
    "fields",
    ("another attempt owns it", {"worker__owner": "owner-2"}),
    ("a sweeper released it", {"worker__owner": None}),
    ("the API cancelled it", {"status": "failed", "error_message": "Cancelled."}),
    ("another attempt completed it", {"status": "completed", "worker__owner": "owner-2"}),
)
def test_an_attempt_that_lost_its_job_writes_nothing(
    runtime: Runtime, end: Callable[[Runtime, Job], bool], fields: dict[str, Any]
) -> None:
    job = claim(runtime)
    change(runtime, job.id, **fields)
    before = read(runtime, job.id)
    assert not end(runtime, job)
    assert read(runtime, job.id) == before


@pytest.mark.parametrize("end", VERBS)
def test_a_deleted_document_is_no_longer_ours(runtime: Runtime, end: Callable[[Runtime, Job], bool]) -> None:
    job = claim(runtime)
    runtime.database["jobs"].delete_one({"_id": job.id})
    assert not end(runtime, job)


@pytest.mark.parametrize("end", [end_by_complete, end_by_fail])
def test_an_end_whose_reply_was_lost_is_recognised_as_our_own(
    runtime: Runtime, end: Callable[[Runtime, Job], bool]
) -> None:
    job = claim(runtime)
    assert end(runtime, job)
    before = read(runtime, job.id)
    assert end(runtime, job)
    assert read(runtime, job.id) == before


def test_a_release_whose_reply_was_lost_is_recognised_as_our_own(runtime: Runtime) -> None:
    job = claim(runtime)
    assert end_by_release(runtime, job)
    assert end_by_release(runtime, job)


def test_a_release_whose_reply_was_lost_is_none_once_the_job_was_cancelled(runtime: Runtime) -> None:
    job = claim(runtime)
    assert end_by_release(runtime, job)
    change(runtime, job.id, status="failed")
    assert not end_by_release(runtime, job)


@table("status, attempt", ("a try that counts", True, 1), ("a hand-back doesn't count", False, 0))
def test_release_lets_go_of_the_job(runtime: Runtime, status: bool, attempt: int) -> None:
    job, due = claim(runtime), ago(-20).replace(microsecond=0)
    assert runtime.store.release(job, due, counted=status)
    document = read(runtime, job.id)
    assert (document["status"], document["worker"]["owner"]) == ("processing", None)
    assert document["worker"]["attempt"] == attempt
    assert document["worker"]["available_at"].replace(tzinfo=UTC) == due
    assert document["worker"]["rescue_at"] > document["worker"]["available_at"]


def test_a_pending_job_can_be_failed_without_a_claim(runtime: Runtime) -> None:
    job_id = insert(runtime)
    assert runtime.store.fail_unowned(job_id, "Damaged.")
    document = read(runtime, job_id)
    assert (document["status"], document["error_message"]) == ("failed", "Damaged.")


def test_a_released_job_can_be_failed_without_a_claim(runtime: Runtime) -> None:
    job = claim(runtime)
    runtime.store.release(job, ago(-60), counted=True)
    assert runtime.store.fail_unowned(job.id, "Stopped.")


@table(
    "fields",
    ("somebody runs it", {}),
    ("it has ended", {"status": "completed"}),
    ("it ended without an owner", {"status": "failed", "worker__owner": None}),
)
def test_a_job_that_is_run_or_ended_is_not_failed_without_a_claim(runtime: Runtime, fields: dict[str, Any]) -> None:
    job = claim(runtime)
    change(runtime, job.id, **fields)
    before = read(runtime, job.id)
    assert not runtime.store.fail_unowned(job.id, "Damaged.")
    assert read(runtime, job.id) == before


def test_an_older_workers_running_job_is_not_failed_without_a_claim(runtime: Runtime) -> None:
    assert not runtime.store.fail_unowned(insert(runtime, status="processing"), "Damaged.")


def test_a_renewal_moves_the_lease_and_not_updated_at(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(5))
    before = read(runtime, job.id)
    runtime.store.renew_leases([job])
    after = read(runtime, job.id)
    assert after["worker"]["lease_until"] > before["worker"]["lease_until"]
    assert after["updated_at"] == before["updated_at"]


def test_a_renewal_that_comes_late_does_not_shorten_the_lease(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(-3600))
    before = read(runtime, job.id)
    runtime.store.renew_leases([job])
    assert read(runtime, job.id) == before


@table(
    "fields",
    ("another attempt's lease", {"worker__owner": "owner-2"}),
    ("a released job", {"worker__owner": None}),
    ("an ended job", {"status": "failed"}),
)
def test_a_renewal_touches_only_what_is_still_owned(runtime: Runtime, fields: dict[str, Any]) -> None:
    job, other = claim(runtime), claim(runtime, owner="owner-3")
    change(runtime, job.id, worker__lease_until=ago(5), **fields)
    before = read(runtime, job.id)
    runtime.store.renew_leases([job, other])
    assert read(runtime, job.id) == before


def test_a_lost_job_is_found_among_those_that_run(runtime: Runtime) -> None:
    kept, cancelled, taken, deleted = (claim(runtime, owner=f"owner-{number}") for number in range(4))
    change(runtime, cancelled.id, status="failed")
    change(runtime, taken.id, worker__owner="another")
    runtime.database["jobs"].delete_one({"_id": deleted.id})
    assert runtime.store.find_lost([kept, cancelled, taken, deleted]) == [cancelled, taken, deleted]


def test_an_ended_job_stays_in_the_outbox_until_its_notice_is_out(runtime: Runtime) -> None:
    job, running = claim(runtime), claim(runtime, owner="owner-2")
    runtime.store.fail(job, "No.")
    assert [document["_id"] for document in runtime.store.find_unnotified(0)] == [job.id]
    assert runtime.store.find_unnotified(60) == []
    runtime.store.mark_notified([job.id, running.id])
    assert runtime.store.find_unnotified(0) == []


@table(
    "fields",
    ("its lease ran out", {"worker__lease_until": ago(1)}),
    ("released, and its message was lost", {"worker__owner": None, "worker__rescue_at": ago(1)}),
    ("an older worker's", {"worker": None, "started_at": ago(3600)}),
    ("an older worker's without start", {"worker": None, "started_at": None, "updated_at": ago(3600)}),
    ("an older worker's without any time", {"worker": None, "started_at": None, "updated_at": 1, "created_at": None}),
)
def test_a_job_that_nobody_works_on_is_stale(runtime: Runtime, fields: dict[str, Any]) -> None:
    job = claim(runtime)
    change(runtime, job.id, **fields)
    assert [document["_id"] for document in runtime.store.find_stale()] == [job.id]


@table(
    "fields",
    ("its lease is live", {}),
    ("released a moment ago", {"worker__owner": None, "worker__rescue_at": ago(-3600)}),
    ("its end needs no lease", {"status": "completed", "worker__lease_until": ago(1)}),
    ("an older worker may still work on it", {"worker": None, "started_at": ago(-1800)}),
    ("the same, rescued while it was pending", {"worker": {"rescue_at": ago(1)}, "started_at": ago(-1800)}),
    ("pending is another matter", {"status": "pending", "worker": None, "created_at": ago(3600)}),
)
def test_a_job_that_somebody_works_on_is_not_stale(runtime: Runtime, fields: dict[str, Any]) -> None:
    job = claim(runtime)
    change(runtime, job.id, **fields)
    assert runtime.store.find_stale() == []


def test_orphan_after_is_a_setting(runtime: Runtime) -> None:
    runtime.settings.orphan_after = 5
    job_id = insert(runtime, status="processing", started_at=ago(10))
    assert [document["_id"] for document in runtime.store.find_stale()] == [job_id]


@table(
    "fields",
    ("its lease ran out", {"worker__lease_until": ago(1)}),
    ("released and forgotten", {"worker__owner": None, "worker__rescue_at": ago(1)}),
    ("an older worker's, without bookkeeping", {"worker": None, "started_at": ago(3600)}),
)
def test_a_stale_job_is_released_and_can_be_claimed(runtime: Runtime, fields: dict[str, Any]) -> None:
    job = claim(runtime)
    change(runtime, job.id, **fields)
    [stale] = runtime.store.find_stale()
    assert runtime.store.release_stale(stale)
    assert claim(runtime, job.id, "owner-2").owner == "owner-2"


def test_a_renewal_in_between_saves_the_job_from_the_sweeper(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(1))
    [stale] = runtime.store.find_stale()
    runtime.store.renew_leases([job])
    assert not runtime.store.release_stale(stale)
    assert not runtime.store.fail_stale(stale, "Given up.")
    assert read(runtime, job.id)["worker"]["owner"] == job.owner


def test_of_two_sweepers_one_releases(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(1))
    [stale] = runtime.store.find_stale()
    assert [runtime.store.release_stale(stale) for _ in range(2)] == [True, False]


def test_an_orphan_that_got_a_claim_in_between_is_left_alone(runtime: Runtime) -> None:
    job_id = insert(runtime, status="processing", started_at=ago(3600))
    [stale] = runtime.store.find_stale()
    change(runtime, job_id, worker__owner="owner-1")
    assert not runtime.store.release_stale(stale)


def test_each_rescue_is_twice_as_far_up_to_ten_minutes(runtime: Runtime) -> None:
    job, waits_s = claim(runtime), []
    change(runtime, job.id, worker__owner=None)
    for _ in range(7):
        runtime.store.release_stale(read(runtime, job.id))
        released = read(runtime, job.id)["worker"]
        waits_s.append((released["rescue_at"] - released["available_at"]).total_seconds())
    assert waits_s == [30, 60, 120, 240, 480, 600, 600]


@table(
    "fields, is_past",
    ("the first attempt", {}, False),
    ("the last attempt", {"worker__attempt": 4}, True),
    ("its time is over", {"worker__first_started_at": ago(601)}, True),
    ("its own limit is longer", {"worker__first_started_at": ago(601), "worker__limits": [900, 800]}, False),
    ("an older worker's", {"worker": None}, False),
)
def test_a_job_is_past_its_bounds_by_attempts_or_by_time(
    runtime: Runtime, fields: dict[str, Any], is_past: bool
) -> None:
    job = claim(runtime)
    change(runtime, job.id, **fields)
    assert runtime.store.is_past_bounds(read(runtime, job.id)) is is_past


def test_a_failed_stale_job_keeps_the_sentence(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(1))
    [stale] = runtime.store.find_stale()
    assert runtime.store.fail_stale(stale, "Given up.")
    assert read(runtime, job.id)["error_message"] == "Given up."


def test_siblings_are_the_jobs_of_this_node(runtime: Runtime) -> None:
    mine, other, released = (claim(runtime, owner=f"owner-{number}") for number in range(3))
    change(runtime, other.id, worker__node="another-node")
    runtime.store.release(released, ago(0), counted=True)
    assert [document["_id"] for document in runtime.store.find_siblings()] == [mine.id]


@table(
    "input_data, output, what",
    ("an output over 16 MB", {}, {"generated_text": "x" * 17_000_000}, "too large"),
    ("an output that makes the document so", {"prompt": "x" * 9_000_000}, {"a": "x" * 9_000_000}, "too large"),
    ("a number beyond 64 bits", {}, {"tokens_used": 2**64}, "too large"),
)
def test_a_result_that_no_document_can_hold_fails_the_job(
    runtime: Runtime, input_data: dict[str, str], output: dict[str, Any], what: str
) -> None:
    job = claim(runtime, insert(runtime, input_data=input_data))
    with pytest.raises(FailJob) as failed:
        runtime.store.complete(job, output, None)
    assert what in failed.value.sentence


@table(
    "output",
    ("an object of Python", {"generated_text": {1, 2}}),
    ("half a character", {"model_used": "\ud83d"}),
    ("a field's name that isn't text", {1: "x"}),
    ("a null character in a field's name", {"a\0b": "x"}),
)
def test_a_result_that_is_no_document_fails_the_job(runtime: Runtime, output: dict[Any, Any]) -> None:
    with pytest.raises(FailJob):
        runtime.store.complete(claim(runtime), output, None)


@table("bookkeeping", ("null, as in an older document", None), ("of another program", "text"))
def test_a_pending_job_whose_bookkeeping_is_no_sub_document_is_claimed_or_fails(
    runtime: Runtime, bookkeeping: object
) -> None:
    with contextlib.suppress(FailJob):
        assert isinstance(runtime.store.claim(insert(runtime, worker=bookkeeping), "owner-1", LIMITS), Job)


spoilt_bookkeeping = table(
    "bookkeeping",
    ("null, as in an older document", None),
    ("of another program", "text"),
    ("a list", ["text"]),
    ("a list of sub-documents", [{"owner": "x"}]),
)


@spoilt_bookkeeping
@pytest.mark.parametrize("status", ["pending", "processing"])
def test_a_job_can_be_stopped_whatever_its_bookkeeping_is(runtime: Runtime, bookkeeping: object, status: str) -> None:
    failed = runtime.store.fail_active(insert(runtime, status=status, worker=bookkeeping), "Stopped.")
    assert failed is not None
    assert (failed["status"], set(failed["worker"])) == ("failed", {"unnotified"})


@spoilt_bookkeeping
def test_a_pending_job_can_be_failed_whatever_its_bookkeeping_is(runtime: Runtime, bookkeeping: object) -> None:
    job_id = insert(runtime, worker=bookkeeping)
    assert runtime.store.fail_unowned(job_id, "Damaged.")
    assert read(runtime, job_id)["status"] == "failed"


def test_the_indexes_are_made_and_made_again_without_harm(runtime: Runtime) -> None:
    for _ in range(2):
        runtime.store.ensure_indexes()
    names = set(runtime.database["jobs"].index_information())
    assert names == {"_id_", "worker_status", "worker_unnotified"}


@table(
    "question, index",
    ("stale jobs", {"status": "processing", "worker.lease_until": {"$lte": ago(0)}}, "worker_status"),
    ("the outbox", {"worker.unnotified": {"$lte": ago(0)}}, "worker_unnotified"),
)
def test_a_sweep_reads_by_index(runtime: Runtime, question: dict[str, Any], index: str) -> None:
    runtime.store.ensure_indexes()
    plan = runtime.database["jobs"].find(question).explain()
    assert index in json.dumps(plan["queryPlanner"]["winningPlan"], default=str)


class Questions(pymongo.monitoring.CommandListener):
    """Every `find` that a client sends."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def started(self, event: pymongo.monitoring.CommandStartedEvent) -> None:
        if event.command_name == "find":
            parts = ("find", "filter", "sort", "limit", "projection")
            self.asked.append({part: event.command[part] for part in parts if part in event.command})

    def succeeded(self, event: pymongo.monitoring.CommandSucceededEvent) -> None: ...

    def failed(self, event: pymongo.monitoring.CommandFailedEvent) -> None: ...


OLD_JOBS, LIVE_JOBS = 2000, 20
API_INDEXES = ("user_id", "status", "job_type", "created_at", [("user_id", 1), ("created_at", 1)])


def fill_with_old_and_live_jobs(runtime: Runtime) -> None:
    """With the API's own indexes beside the worker's, among which MongoDB has to choose."""
    jobs, common = runtime.database["jobs"], {"user_id": "u", "job_type": "text_generation", "started_at": ago(500)}
    lease = {"owner": "owner-1", "node": worker.NODE, "pid": 1, "lease_until": ago(-60), "attempt": 1}
    states = {"completed": OLD_JOBS, "failed": OLD_JOBS, "processing": LIVE_JOBS, "pending": LIVE_JOBS}
    for status, count in states.items():
        started = {} if status == "pending" else {"worker": lease}
        jobs.insert_many([{**common, **started, "status": status, "created_at": ago(900 + n)} for n in range(count)])
    for index in API_INDEXES:
        jobs.create_index(index)
    runtime.store.ensure_indexes()


@table(
    "look",
    ("stale jobs", lambda store: store.find_stale()),
    ("jobs of this node", lambda store: store.find_siblings()),
    ("jobs whose message was lost", lambda store: store.find_forgotten_pending(lambda: 1)),
    ("the outbox", lambda store: store.find_unnotified(30)),
)
def test_a_sweep_examines_only_jobs_that_run_or_wait(
    runtime: Runtime, look: Callable[[worker.JobStore], object]
) -> None:
    fill_with_old_and_live_jobs(runtime)
    questions = Questions()
    with pymongo.MongoClient[Any](
        runtime.settings.mongodb_url.get_secret_value(), event_listeners=[questions]
    ) as client:
        look(Runtime(runtime.settings, client).store)
    assert questions.asked
    for question in questions.asked:
        explained = runtime.database.command("explain", question, verbosity="executionStats")
        assert "COLLSCAN" not in json.dumps(explained["queryPlanner"]["winningPlan"], default=str), question
        assert explained["executionStats"]["totalDocsExamined"] <= LIVE_JOBS + 1, question


def test_the_clock_takes_the_databases_time(runtime: Runtime) -> None:
    runtime.store.clock.synchronise(datetime(2001, 1, 1, tzinfo=UTC))
    runtime.store.synchronise_clock()
    assert abs(runtime.store.clock.now() - datetime.now(UTC)) < timedelta(minutes=1)


def test_a_process_asks_for_the_databases_time_before_it_judges_a_lease(runtime: Runtime) -> None:
    claim(runtime)
    ahead = worker.Clock()
    ahead.synchronise(ago(-3600))
    ahead.is_synchronised = False
    assert worker.JobStore(runtime.database, "another-node", ahead, runtime.settings).find_stale() == []


def test_a_database_without_a_time_of_its_own_leaves_the_hosts(light_runtime: Runtime) -> None:
    light_runtime.store.synchronise_clock()
    assert abs(light_runtime.store.clock.now() - datetime.now(UTC)) < timedelta(minutes=1)


def test_the_overview_counts_what_an_operator_asks_for(runtime: Runtime) -> None:
    insert(runtime, created_at=datetime(2020, 1, 1))
    expired, failed = claim(runtime), claim(runtime, owner="owner-2")
    change(runtime, expired.id, worker__lease_until=ago(1))
    runtime.store.fail(failed, "No.")
    seen = runtime.store.overview()
    assert seen["counts"] == {"pending": 1, "processing": 1, "completed": 0, "failed": 1}
    assert seen["oldest_pending"] == datetime(2020, 1, 1)
    assert (seen["expired_leases"], seen["unnotified"]) == (1, 1)
    assert [error["error_message"] for error in seen["last_errors"]] == ["No."]


def store_on(client: pymongo.MongoClient[Any]) -> worker.JobStore:
    return worker.JobStore(client["away"], "node", worker.Clock(), bare_settings())


EVERY_VERB: list[Callable[[worker.JobStore], object]] = [
    lambda store: store.synchronise_clock(),
    lambda store: store.ensure_indexes(),
    lambda store: store.read(ObjectId()),
    lambda store: store.claim(ObjectId(), "owner-1", LIMITS),
    lambda store: store.complete(some_job(), {}, None),
    lambda store: store.fail(some_job(), "No."),
    lambda store: store.release(some_job(), ago(0), counted=True),
    lambda store: store.fail_unowned(ObjectId(), "No."),
    lambda store: store.renew_leases([some_job()]),
    lambda store: store.find_lost([some_job()]),
    lambda store: store.mark_notified([ObjectId()]),
    lambda store: store.find_unnotified(0),
    lambda store: store.find_siblings(),
    lambda store: store.find_stale(),
    lambda store: store.release_stale({"_id": ObjectId()}),
    lambda store: store.fail_stale({"_id": ObjectId()}, "No."),
    lambda store: store.overview(),
]


def test_every_verb_says_so_when_mongodb_is_away() -> None:
    with pymongo.MongoClient[Any](f"mongodb://{NOWHERE}", timeoutMS=50) as client, ThreadPoolExecutor(20) as threads:
        tries = [threads.submit(verb, store_on(client)) for verb in EVERY_VERB]
        assert {type(one.exception()) for one in tries} == {StoreUnavailable}


def test_a_mongodb_that_freezes_in_mid_write_leaves_the_outcome_unknown() -> None:
    with MongoServer() as server, pymongo.MongoClient[Any](server.url, timeoutMS=500) as client:
        store = store_on(client)
        assert store.read(ObjectId()) is None
        server.pause()
        with pytest.raises(StoreUnavailable):
            store.claim(ObjectId(), "owner-1", LIMITS)
        server.resume()


def test_the_contracts_user_may_do_all_that_the_worker_does() -> None:
    with MongoServer(auth=True) as server:
        runtime = Runtime(bare_settings(mongodb_url=server.url))
        runtime.store.ensure_indexes()
        job = claim(runtime)
        assert runtime.artifacts.publish(job, Media(b"x", "png", "image_url"))
        assert runtime.store.complete(job, {}, None)
        runtime.mongo.close()


def test_a_user_without_the_right_leaves_the_outcome_unknown() -> None:
    with MongoServer(auth=True) as server, pymongo.MongoClient[Any](server.url, timeoutMS=2000) as client:
        with pytest.raises(StoreUnavailable, match="OperationFailure 13"):
            store_on(client).ensure_indexes()


# ── notifier ─────────────────────────────────────────────────────────────────────────────────────────────────────


def away() -> worker.Notifier:
    """A notifier whose Redis isn't there."""
    return worker.Notifier(redis.Redis.from_url(f"redis://{NOWHERE}", socket_connect_timeout=1))


def heard(api: Api, kind: str, count: int) -> list[dict[str, Any]]:
    """Waits for so many messages of a type and returns them, without the time at which they were heard."""

    def find() -> list[dict[str, Any]]:
        found = [message for message in list(api.heard) if message["type"] == kind]
        return found if len(found) >= count else []

    messages = poll(find, 10, description=f"{count} {kind}")
    return [{key: value for key, value in message.items() if key != "heard_at"} for message in messages]


def test_a_status_message_has_the_contracts_shape(runtime: Runtime, api: Api) -> None:
    document = {"_id": ObjectId(), "user_id": "user-1", "session_id": None, "input_data": {"prompt": "planted"}}
    assert runtime.notifier.publish_status(document, Status.PROCESSING, "It has started.")
    head = {"type": "job_status_update", "user_id": "user-1", "job_id": str(document["_id"])}
    tail = {"status": "processing", "session_id": None, "message": "It has started."}
    assert heard(api, "job_status_update", 1) == [{**head, **tail}]


def test_a_progress_message_names_attempt_and_place(runtime: Runtime, api: Api) -> None:
    job = some_job(attempt=2)
    assert runtime.notifier.publish_progress(job, 7, "some words")
    head = {"type": "job_progress", "user_id": "user-1", "job_id": str(job.id), "session_id": "s-1"}
    assert heard(api, "job_progress", 1) == [{**head, "attempt": 2, "sequence": 7, "delta": "some words"}]


def test_progress_that_nobody_hears_is_reported_and_not_sent_again_for_a_second(
    light_runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    notifier = light_runtime.notifier
    assert notifier.may_be_heard()
    assert not notifier.publish_progress(some_job(), 0, "x")
    assert not notifier.may_be_heard()
    in_a_second = time.monotonic() + worker.PROGRESS_RECHECK_S
    monkeypatch.setattr(time, "monotonic", lambda: in_a_second)
    assert notifier.may_be_heard()


def test_a_status_that_nobody_hears_was_published_all_the_same(light_runtime: Runtime) -> None:
    assert light_runtime.notifier.publish_status({"_id": ObjectId()}, Status.FAILED, "x")


def test_a_redis_that_is_away_is_reported_and_only_a_look_raises(caplog: pytest.LogCaptureFixture) -> None:
    notifier = away()
    assert not notifier.publish_status({"_id": ObjectId()}, Status.FAILED, "x")
    assert not notifier.publish_progress(some_job(), 0, "x")
    assert not notifier.spool_result(some_job(), Result({}))
    with pytest.raises(worker.SpoolUnavailable):
        notifier.spooled_result(ObjectId())
    notifier.forget_result(ObjectId())
    assert "can't be published" in caplog.text


@table(
    "result",
    ("a text", Result({"generated_text": "Да\0$x", "tokens_used": 3})),
    ("a file", Result({"resolution": "1x1"}, Media(b"\x00\xff\x89PNG", "png", "image_url"))),
)
def test_a_kept_result_comes_back_whole(runtime: Runtime, result: Result) -> None:
    job = some_job()
    assert runtime.notifier.spool_result(job, result)
    assert runtime.notifier.spooled_result(job.id) == result
    runtime.notifier.forget_result(job.id)
    assert runtime.notifier.spooled_result(job.id) is None


def test_a_kept_result_is_gone_after_an_hour(runtime: Runtime, api: Api) -> None:
    job = some_job()
    runtime.notifier.spool_result(job, Result({}))
    assert 3_500 < api.redis.ttl(f"result:{job.id}") <= 3_600
    runtime.notifier.forget_result(job.id)


class Listener:
    """Stands in for the notifier: hears progress from a moment on, or fails to."""

    def __init__(self, deaf: int = 0) -> None:
        self.deaf = deaf
        self.pieces: list[tuple[int, str]] = []

    def may_be_heard(self) -> bool:
        self.deaf -= 1
        return self.deaf < 0

    def publish_progress(self, _job: Job, sequence: int, delta: str) -> bool:
        self.pieces.append((sequence, delta))
        return True

    @property
    def text(self) -> str:
        return "".join(delta for _, delta in self.pieces)


def stream(listener: Listener, words: list[str], is_fresh: Callable[[], bool] = lambda: True) -> None:
    """Streams the words, each after a turn of the loop, and finishes."""

    async def send() -> None:
        progress = worker.Progress(some_job(), listener, is_fresh)  # type: ignore[arg-type]
        for word in words:
            progress(word)
            await asyncio.sleep(0.002)
        await progress.finish()

    asyncio.run(send())


def test_progress_comes_in_order_and_in_batches_the_first_piece_at_once() -> None:
    listener, words = Listener(), [f"{number} " for number in range(200)]
    stream(listener, words)
    assert listener.text == "".join(words)
    assert [sequence for sequence, _ in listener.pieces] == list(range(len(listener.pieces)))
    assert listener.pieces[0] == (0, "0 ")
    assert len(listener.pieces) < len(words) / 2


def test_nothing_is_lost_while_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PROGRESS_RECHECK_S", 0.02)
    listener = Listener(deaf=3)
    stream(listener, [f"{number} " for number in range(100)])
    assert listener.text == "".join(f"{number} " for number in range(100))
    assert listener.pieces[0][0] == 0


def test_nothing_is_published_once_the_lease_is_stale() -> None:
    listener = Listener()
    stream(listener, ["a", "b"], is_fresh=lambda: False)
    assert listener.pieces == []


def test_finish_sends_the_rest_without_waiting_for_the_next_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PROGRESS_BATCH_S", 3600.0)
    listener = Listener()
    stream(listener, ["first ", "and ", "last"])
    assert listener.pieces == [(0, "first "), (1, "and last")]


def test_a_stopped_stream_sends_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PROGRESS_BATCH_S", 0.01)
    listener = Listener()

    async def send() -> None:
        progress = worker.Progress(some_job(), listener, lambda: True)  # type: ignore[arg-type]
        progress("late")
        progress.stop()
        with pytest.raises(asyncio.CancelledError):
            await progress.finish()

    asyncio.run(send())
    assert listener.pieces == []


def test_a_stream_without_text_finishes() -> None:
    stream(listener := Listener(), [])
    assert listener.pieces == []


# ── artifacts ────────────────────────────────────────────────────────────────────────────────────────────────────

PNG = picture(8, 8)


def readme_example(beginning: str) -> str:
    """The README's Python example that begins so."""
    blocks = (SOURCE / "README.md").read_text().split("```python\n")[1:]
    [example] = [block.split("```")[0] for block in blocks if block.startswith(beginning)]
    return example


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A real HTTP server that speaks S3, with an empty bucket `pictures`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    s3_client(url).create_bucket(Bucket="pictures")
    yield url
    server.stop()


def s3_client(url: str) -> Any:
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=url, **keys)


def s3_settings(url: str, artifact_url: str) -> dict[str, str]:
    names = {"s3_bucket_name": "pictures", "s3_region": "us-east-1", "s3_endpoint_url": url}
    return {**names, "aws_access_key_id": "key", "aws_secret_access_key": "secret", "artifact_url": artifact_url}


@pytest.fixture(params=["gridfs", "file", "s3"])
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> worker.Artifacts:
    """Every store that keeps files, in turn."""
    if request.param == "gridfs":
        runtime: Runtime = request.getfixturevalue("runtime")
        return runtime.artifacts
    values = {"artifact_url": f"file://{tmp_path}/folder"}
    if request.param == "s3":
        values = s3_settings(request.getfixturevalue("s3"), f"s3://pictures/{tmp_path.name}")
    return worker.open_artifacts(bare_settings(**values), pytest.fail)


def names(artifacts: worker.Artifacts, job: Job) -> list[str]:
    return sorted(artifacts.names(f"{job.id}-"))


def test_a_file_is_named_by_job_and_owner_under_the_base_url(artifacts: worker.Artifacts) -> None:
    job = some_job()
    assert artifacts.publish(job, Media(PNG, "png", "image_url")) == f"/artifacts/{job.id}-owner-1.png"
    assert names(artifacts, job) == [f"{job.id}-owner-1.png"]


def test_a_file_may_be_stored_again(artifacts: worker.Artifacts) -> None:
    job = some_job()
    urls = {artifacts.publish(job, Media(PNG, "png", "image_url")) for _ in range(2)}
    assert (len(urls), len(names(artifacts, job))) == (1, 1)


def test_an_attempt_that_lost_deletes_its_own_files_only(artifacts: worker.Artifacts) -> None:
    job = some_job()
    winner, loser = some_job(id=job.id, owner="winner"), some_job(id=job.id, owner="loser")
    for one in (winner, loser):
        artifacts.publish(one, Media(PNG, "png", "image_url"))
    artifacts.discard(loser)
    assert names(artifacts, job) == [f"{job.id}-winner.png"]


def test_the_winner_deletes_those_of_the_others_and_of_no_other_job(artifacts: worker.Artifacts) -> None:
    job, stranger = some_job(owner="winner"), some_job()
    for one in (job, some_job(id=job.id, owner="loser"), stranger):
        artifacts.publish(one, Media(PNG, "png", "image_url"))
    artifacts.discard_others(job)
    assert names(artifacts, job) == [f"{job.id}-winner.png"]
    assert names(artifacts, stranger) == [f"{stranger.id}-owner-1.png"]


def test_a_file_that_is_gone_can_be_removed(artifacts: worker.Artifacts) -> None:
    artifacts.delete(f"{ObjectId()}-owner-1.png")


def test_a_half_stored_file_in_gridfs_is_replaced(runtime: Runtime) -> None:
    job = some_job()
    name = f"{job.id}-owner-1.png"
    runtime.database["artifacts.chunks"].insert_one({"files_id": name, "n": 0, "data": b"half"})
    runtime.artifacts.publish(job, Media(PNG, "png", "image_url"))
    assert gridfs.GridFS(runtime.database, collection="artifacts").get(name).read() == PNG


@pytest.fixture
def served(runtime: Runtime) -> Callable[[str], httpx.Response]:
    """Gets a path from an API that has the README's route."""
    namespace: dict[str, Any] = {}
    exec(readme_example("from fastapi import"), namespace)
    namespace["add_artifacts"](app := FastAPI(), runtime.database)

    async def get(path: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api") as client:
            return await client.get(path)

    return lambda path: asyncio.run(get(path))


def test_the_readmes_route_serves_a_picture_from_gridfs(
    runtime: Runtime, served: Callable[[str], httpx.Response]
) -> None:
    url = runtime.artifacts.publish(some_job(), Media(PNG, "png", "image_url"))
    answer = served(url)
    assert (answer.status_code, answer.content) == (200, PNG)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-content-type-options"] == "nosniff"


@table("name", ("no such file", "x.png"), ("an operator is a name like any other", '{"$ne":1}'))
def test_the_readmes_route_answers_404_for_what_is_not_there(
    runtime: Runtime, served: Callable[[str], httpx.Response], name: str
) -> None:
    runtime.artifacts.publish(some_job(), Media(PNG, "png", "image_url"))
    assert served(f"/artifacts/{name}").status_code == 404


@table(
    "suffix, types",
    ("a picture", "png", {"image/png"}),
    ("a photograph", "jpg", {"image/jpeg"}),
    ("unknown to Python 3.11", "webp", {"image/webp"}),
    ("two names are in use", "wav", {"audio/wav", "audio/x-wav"}),
    ("speech", "mp3", {"audio/mpeg"}),
    ("Opus in Ogg", "opus", {"audio/opus", "audio/ogg"}),
    ("unknown to Python 3.11, too", "flac", {"audio/flac", "audio/x-flac"}),
)
def test_a_file_has_its_content_type_where_the_system_has_no_table(
    monkeypatch: pytest.MonkeyPatch, suffix: str, types: set[str]
) -> None:
    monkeypatch.setattr(mimetypes, "knownfiles", [])  # as in a slim image
    monkeypatch.setattr(mimetypes, "_db", None)
    monkeypatch.setattr(mimetypes, "inited", False)
    url = worker.InlineArtifacts("").publish(some_job(), Media(b"x", suffix, "image_url"))
    assert url.removeprefix("data:").split(";")[0] in types


def test_an_inline_artifact_is_its_own_url() -> None:
    artifacts = worker.open_artifacts(bare_settings(artifact_url="data:"), pytest.fail)
    url = artifacts.publish(some_job(), Media(PNG, "png", "image_url"))
    head, encoded = url.split(",")
    assert (head, base64.b64decode(encoded)) == ("data:image/png;base64", PNG)
    artifacts.discard(some_job())
    artifacts.delete("x")


@table(
    "base_url, url",
    ("a path of the API", "/artifacts", "/artifacts/a.txt"),
    ("a slash too many", "https://cdn.example/files/", "https://cdn.example/files/a.txt"),
)
def test_the_base_url_and_the_name_make_the_url(tmp_path: Path, base_url: str, url: str) -> None:
    settings = bare_settings(artifact_url=f"file://{tmp_path}", artifact_base_url=base_url)
    assert worker.open_artifacts(settings, pytest.fail).publish_file("a.txt", b"x") == url


def test_a_stored_file_can_be_read_by_the_web_server(tmp_path: Path) -> None:
    artifacts = worker.open_artifacts(bare_settings(artifact_url=f"file://{tmp_path}/new/folder/"), pytest.fail)
    artifacts.publish_file("a.txt", b"x")
    assert (tmp_path / "new" / "folder" / "a.txt").read_bytes() == b"x"
    assert (tmp_path / "new" / "folder" / "a.txt").stat().st_mode & 0o777 == 0o644


@table("temporary", ("the same disk", "."), ("temporary files are on another disk", "/dev/shm"))
def test_nobody_ever_sees_half_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, temporary: str) -> None:
    if not Path(temporary).is_dir():
        pytest.skip("there is no other disk")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / temporary))
    artifacts = worker.open_artifacts(bare_settings(artifact_url=f"file://{tmp_path}/files"), pytest.fail)
    seen, data = set(), bytes(8 * 2**20)
    with ThreadPoolExecutor(1) as threads:
        writer = threads.submit(lambda: [artifacts.publish_file(f"{number}.bin", data) for number in range(10)])
        while not writer.done():
            seen |= {path.stat().st_size for path in tmp_path.glob("files/*.bin")}
    assert seen == {len(data)}


def test_s3_takes_the_contracts_names(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = worker.open_artifacts(bare_settings(**s3_settings(s3, "s3://")), pytest.fail)
    artifacts.publish_file("a.png", PNG)
    stored = s3_client(s3).get_object(Bucket="pictures", Key="a.png")
    assert (stored["Body"].read(), stored["ContentType"]) == (PNG, "image/png")


def test_s3_shows_what_another_worker_stored_since_the_last_look(s3: str) -> None:
    artifacts, job = worker.open_artifacts(bare_settings(**s3_settings(s3, "s3://")), pytest.fail), some_job()
    assert names(artifacts, job) == []
    s3_client(s3).put_object(Bucket="pictures", Key=f"{job.id}-another.png", Body=PNG)
    assert names(artifacts, job) == [f"{job.id}-another.png"]


@table(
    "values",
    ("a folder below a file", {"artifact_url": f"file://{__file__}/folder"}),
    ("a bucket that isn't there", {"artifact_url": "s3://no-such"}),
    ("a file system nobody knows", {"artifact_url": "unheard-of://x"}),
    ("GridFS without MongoDB", {"artifact_url": "gridfs"}),
)
def test_a_store_that_cant_be_reached_says_so(s3: str, values: dict[str, str]) -> None:
    with pymongo.MongoClient[Any](f"mongodb://{NOWHERE}", timeoutMS=50) as client:
        settings = bare_settings(**{**s3_settings(s3, ""), **values})
        artifacts = worker.open_artifacts(settings, lambda: client["away"])
        with pytest.raises(StoreUnavailable):
            artifacts.publish_file("a.png", PNG)


# ── provider ─────────────────────────────────────────────────────────────────────────────────────────────────────

MODEST_BYTES = 2**18
Ask = Callable[[worker.Provider], Awaitable[Any]]


def where(provider: Provider, key: str = KEY) -> ProviderSettings:
    return ProviderSettings(provider.url, key, "default-model", ())


def asked(ask: Ask, place: ProviderSettings, most_bytes: int = MODEST_BYTES, within_s: float = 10) -> Any:
    """Asks a provider of our own over HTTP and returns its answer."""

    async def call() -> Any:
        provider = worker.OpenAIProvider(place, most_bytes)
        try:
            async with asyncio.timeout(within_s):
                return await ask(provider)
        finally:
            await provider.session.close()

    return asyncio.run(call())


def text(prompt: str, on_delta: Callable[[str], None] = lambda _: None) -> Ask:
    request = {"model": "asked-model", "messages": [{"role": "user", "content": prompt}]}
    return lambda provider: provider.text(request, on_delta)


def ask_capped(prompt: str, times: int = 1) -> Ask:
    """Asks for a text of at most seven tokens, so many times."""
    request = {"model": "asked-model", "messages": [{"role": "user", "content": prompt}], "max_tokens": 7}

    async def ask(provider: worker.Provider) -> Any:
        return [await provider.text(request, lambda _: None) for _ in range(times)]

    return ask


def image(prompt: str) -> Ask:
    return lambda provider: provider.image({"model": "asked-model", "prompt": prompt, "size": "64x48"})


def speech(prompt: str) -> Ask:
    request = {"model": "asked-model", "input": prompt, "voice": "alloy", "response_format": "wav"}
    return lambda provider: provider.speech(request)


EVERY_KIND = [pytest.param(kind, id=kind.__name__) for kind in (text, image, speech)]
Kind = Callable[[str], Ask]


def test_a_text_is_streamed_in_order(provider: Provider) -> None:
    pieces: list[str] = []
    answer = asked(text("[say one two three four]", pieces.append), where(provider))
    assert pieces == ["one", " two", " three", " four"]
    assert answer.text == "one two three four"


@pytest.mark.parametrize("dialect", ["crlf", "cr", "pings"])
def test_a_stream_may_have_any_line_ends_and_empty_events(provider: Provider, dialect: str) -> None:
    assert asked(text(f"[sse {dialect}] [say one  two three]"), where(provider)).text == "one  two three"


def test_an_answers_cap_is_renamed_for_a_model_that_wants_the_newer_name(provider: Provider) -> None:
    asked(ask_capped("[refuse max_tokens] [say hello]", times=2), where(provider))
    fields = [{name for name in call.body if name.startswith("max_")} for call in provider.calls]
    assert fields == [{"max_tokens"}, {"max_completion_tokens"}, {"max_completion_tokens"}]
    assert provider.calls[1].body["max_completion_tokens"] == 7 + worker.THINKING_TOKENS


@table(
    "prompt, calls",
    ("of another cause, though the answer repeats the prompt", "[status 400] max_tokens", 1),
    ("of another field", "[refuse model]", 1),
    ("of the newer name, too", "[refuse max_tokens max_completion_tokens]", 2),
)
def test_a_refusal_that_a_new_name_does_not_mend_fails_the_job(provider: Provider, prompt: str, calls: int) -> None:
    with pytest.raises(FailJob):
        asked(ask_capped(prompt), where(provider))
    assert len(provider.calls) == calls


def test_an_error_within_a_stream_is_tried_again(provider: Provider) -> None:
    with pytest.raises(RetryJob):
        asked(text("[sse error]"), where(provider))


def test_a_server_that_calls_its_stream_something_else_is_understood(provider: Provider) -> None:
    assert asked(text("[type text/plain] [say grüße]"), where(provider)).text == "grüße"


def test_a_stream_that_stays_open_behind_its_last_event_is_not_waited_for(provider: Provider) -> None:
    assert asked(text("[linger 30] [say done]"), where(provider), within_s=5).text == "done"


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_the_way_leads_through_the_proxy_that_the_environment_names(
    provider: Provider, monkeypatch: pytest.MonkeyPatch, variable: str, scheme: str
) -> None:
    monkeypatch.setenv(variable, provider.url.removesuffix("/v1").replace("http://", scheme))
    monkeypatch.setenv("no_proxy", "elsewhere.invalid")
    beyond = ProviderSettings("http://provider.invalid/v1", KEY, "default-model", ())
    assert asked(text("[say hello]"), beyond).text == "hello"
    with pytest.raises(RetryJob):
        asked(text("[say hello]"), ProviderSettings("http://elsewhere.invalid/v1", KEY, "default-model", ()))


def test_user_and_password_in_a_url_come_before_a_key(provider: Provider) -> None:
    named = ProviderSettings(provider.url.replace("://", "://user:word@"), KEY, "default-model", ())
    assert asked(text("[say hello]"), named).text == "hello"
    assert provider.calls[0].authorization == f"Basic {base64.b64encode(b'user:word').decode()}"


def test_calls_share_a_connection(provider: Provider) -> None:
    async def ask_three_times(asked: worker.OpenAIProvider) -> None:
        for kind in (text, text, speech):
            await kind("Hello")(asked)

    asked(ask_three_times, where(provider))
    assert len({call.connection for call in provider.calls}) == 1


def test_a_text_names_the_model_and_the_tokens_of_the_answer(provider: Provider) -> None:
    answer = asked(text("Hello there [tokens 5]"), where(provider))
    assert (answer.model, answer.tokens) == ("asked-model", 4 + 5)


def test_without_token_counts_the_pieces_are_counted(provider: Provider) -> None:
    assert asked(text("[no-usage] [tokens 5]"), where(provider)).tokens == 5


def test_a_picture_and_a_sound_come_as_bytes(provider: Provider) -> None:
    assert asked(image("A city"), where(provider)) == (picture(64, 48), "asked-model")
    assert asked(speech("Hello"), where(provider)) == (sound_wav(), "asked-model")


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_the_key_goes_to_the_provider(provider: Provider, kind: Kind) -> None:
    asked(kind("Hello"), where(provider))
    assert [call.authorization for call in provider.calls] == [f"Bearer {KEY}"]


def test_a_server_without_key_gets_none_of_the_environment(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    asked(text("Hello"), where(provider, key=""))
    assert SECRET not in str(provider.calls[0].authorization)


@pytest.mark.parametrize("kind", EVERY_KIND)
@table(
    "status, error",
    ("a bad request stays bad", 400, FailJob),
    ("a wrong key stays wrong", 401, FailJob),
    ("not allowed", 403, FailJob),
    ("no such model", 404, FailJob),
    ("a server that was slow", 408, RetryJob),
    ("a conflict passes", 409, RetryJob),
    ("too early", 425, RetryJob),
    ("too many", 429, RetryJob),
    ("unprocessable", 422, FailJob),
    ("a server's own fault", 500, RetryJob),
    ("overloaded", 503, RetryJob),
)
def test_an_error_status_says_whether_to_try_again(
    provider: Provider, kind: Kind, status: int, error: type[JobError]
) -> None:
    with pytest.raises(error, match=str(status)):
        asked(kind(f"[status {status}]"), where(provider))
    assert len(provider.calls) == 1


@table(
    "given, after_s",
    ("in seconds", "7", 7.0),
    ("half a second", "0.5", 0.5),
    ("a date is no number", "Wed,", None),
    ("for ever", "inf", None),
    ("before now", "-3", None),
    ("not at all", "", None),
)
def test_retry_after_is_taken_where_it_is_a_number_of_seconds(
    provider: Provider, given: str, after_s: float | None
) -> None:
    option = f" retry-after={given}" if given else ""
    with pytest.raises(RetryJob) as caught:
        asked(text(f"[status 429{option}]"), where(provider))
    assert caught.value.after_s == after_s


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_an_answer_that_breaks_off_is_tried_again(provider: Provider, kind: Kind) -> None:
    with pytest.raises(RetryJob):
        asked(kind("[cut]"), where(provider))


@table(
    "prompt, error, sentence",
    ("a clean end in mid-text", "[half]", RetryJob, "broke off"),
    ("no words", "[empty]", FailJob, "empty text"),
    ("its rules forbid it", "[filter]", FailJob, "content rules"),
    ("a page of a proxy", "[html]", FailJob, "could not be used"),
    ("another object", "[shape]", FailJob, "could not be used"),
    ("a list", "[shape list]", FailJob, "could not be used"),
    ("nulls", "[shape null]", FailJob, "could not be used"),
    ("a string", "[shape text]", FailJob, "could not be used"),
    ("broken JSON", "[shape broken]", FailJob, "could not be used"),
    ("a redirect isn't followed", "[redirect http://127.0.0.1:9/]", FailJob, "refused"),
)
def test_a_text_that_cant_be_used_is_told_apart(
    provider: Provider, prompt: str, error: type[JobError], sentence: str
) -> None:
    with pytest.raises(error) as caught:
        asked(text(prompt), where(provider))
    assert sentence in caught.value.sentence
    assert len(provider.calls) == 1


@table(
    "prompt",
    ("neither base64 nor a URL", "[empty]"),
    ("a page of a proxy", "[html]"),
    ("another object", "[shape]"),
    ("a list", "[shape list]"),
    ("nulls", "[shape null]"),
    ("a string", "[shape text]"),
    ("broken JSON", "[shape broken]"),
    ("a file of this machine", "[url file:///etc/passwd]"),
    ("no host", "[url http:///x.png]"),
    ("no number for a port", "[url http://host:port/x.png]"),
    ("an address of the operator's network", "[url http://10.0.0.1/x.png]"),
    ("a cloud's metadata", "[url http://169.254.169.254/latest]"),
    ("this machine by name", "[url http://localhost:9/x.png]"),
    ("this machine in IPv6", "[url http://[::1]:9/x.png]"),
    ("a redirect isn't followed", "[redirect http://127.0.0.1:9/]"),
    ("nor is the file's", "[url] [redirect http://127.0.0.1:9/]"),
    ("no such file", "[url] [status 404]"),
)
def test_a_picture_that_cant_be_had_fails_the_job(provider: Provider, prompt: str) -> None:
    with pytest.raises(FailJob):
        asked(image(prompt), where(provider))


def test_a_picture_by_url_is_fetched_from_the_providers_own_host_without_credentials(provider: Provider) -> None:
    assert asked(image("[url]"), where(provider))[0] == picture(64, 48)
    generated, fetched = provider.calls
    assert (generated.authorization, fetched.authorization) == (f"Bearer {KEY}", None)


def test_a_picture_elsewhere_is_fetched_from_the_address_that_was_checked(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look_up(host: str, port: int) -> str:
        assert (host, port) == ("pictures.example", provider.port)
        return "127.0.0.1"

    asked(image("[url]"), where(provider))
    path = next(call.route for call in provider.calls if call.route.startswith("/files/"))
    monkeypatch.setattr(worker, "public_address", look_up)
    data, _ = asked(image(f"[url http://pictures.example:{provider.port}{path}]"), where(provider))
    assert data == picture(64, 48)


def test_a_file_that_is_busy_is_tried_again(provider: Provider) -> None:
    with pytest.raises(RetryJob):
        asked(image("[url] [status 503]"), where(provider))


@table(
    "host, address",
    ("public", "93.184.216.34", "93.184.216.34"),
    ("public in IPv6, as a URL has it", "2606:4700::6810:84e5", "[2606:4700::6810:84e5]"),
)
def test_a_public_address_is_taken(host: str, address: str) -> None:
    assert asyncio.run(worker.public_address(host, 443)) == address


NETWORKS = ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"]
INSIDE = [*NETWORKS, "localhost", "::1", "fe80::1", "fd00::1", "::ffff:127.0.0.1"]


@pytest.mark.parametrize("host", INSIDE)
def test_an_address_inside_the_operators_network_is_refused(host: str) -> None:
    with pytest.raises(FailJob, match="isn't public"):
        asyncio.run(worker.public_address(host, 443))


@pytest.mark.parametrize("prompt", ["[big 100]", "[endless]"])
@pytest.mark.parametrize("kind", [*EVERY_KIND, pytest.param(lambda prompt: image(f"[url] {prompt}"), id="url")])
def test_an_answer_beyond_the_cap_fails_in_bounded_memory(provider: Provider, kind: Kind, prompt: str) -> None:
    asked(kind("warm up"), where(provider))
    tracemalloc.start()
    with pytest.raises(FailJob) as caught:
        asked(kind(prompt), where(provider))
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "too large" in caught.value.sentence
    assert most_bytes < 64 * MODEST_BYTES


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_provider_that_isnt_there_is_tried_again(kind: Kind) -> None:
    place = ProviderSettings(f"http://{NOWHERE}/v1", KEY, "m", ())
    with pytest.raises(RetryJob) as caught:
        asked(kind("Hello"), place)
    assert caught.value.sentence == "The provider can't be reached"


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("prompt", ["[hang]", "[drip 0.5]"])
def test_a_cancelled_call_closes_its_socket(provider: Provider, kind: Kind, prompt: str) -> None:
    async def begin_and_cancel(ours: worker.Provider) -> None:
        call = asyncio.ensure_future(kind(prompt)(ours))
        await asyncio.to_thread(poll, lambda: provider.running, 10)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call

    asked(begin_and_cancel, where(provider), within_s=20)
    poll(lambda: provider.calls[0].outcome == "disconnected", 5)


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [(kind, prompt) for kind in (text, image, speech) for prompt in ("[status 401]", "[status 400]", "[cut]")]
    + [(kind, prompt) for kind in (text, image) for prompt in ("[shape]", "[shape broken]", "[html]", "[empty]")],
)
def test_neither_key_nor_prompt_nor_the_providers_words_reach_an_error(
    provider: Provider, kind: Kind, prompt: str
) -> None:
    with pytest.raises(JobError) as caught:
        asked(kind(f"{prompt} {SECRET}"), where(provider))
    shown = "".join(traceback.format_exception(caught.value)) + caught.value.sentence
    for secret in (KEY, SECRET, "Incorrect API key", "testbed)", "Welcome to the proxy"):
        assert secret not in shown


@table(
    "parts, whole",
    ("whole characters", ["Да", "!"], "Да!"),
    ("a character cut in two", ["a\ud83d", "\ude00b"], "a😀b"),
    ("half a character alone", ["a\ud83d", "b"], "a\ufffdb"),
)
def test_halves_of_a_character_come_together(parts: list[str], whole: str) -> None:
    completion = worker.Completion("model")
    for part in parts:
        completion.add({"choices": [{"delta": {"content": part}, "finish_reason": "stop"}]})
    assert completion.whole().text == whole


async def refused(breaker: worker.Breaker) -> None:
    with pytest.raises(worker.ProviderAway):
        with breaker.watch():
            raise worker.ProviderAway


async def succeeded(breaker: worker.Breaker) -> None:
    with breaker.watch():
        pass


async def is_open(breaker: worker.Breaker) -> bool:
    """Whether a job may try, and soon."""
    with contextlib.suppress(RetryJob):
        await breaker.wait(0.3)
        return True
    return False


@table("failures, goes_through", ("once is nothing", 1, True), ("twice is a pause here", 2, False))
def test_after_failures_in_a_row_the_next_call_waits(
    monkeypatch: pytest.MonkeyPatch, failures: int, goes_through: bool
) -> None:
    monkeypatch.setattr(worker, "FAILURES_BEFORE_PAUSE", 2)

    async def fail_and_try() -> bool:
        breaker = worker.Breaker()
        for _ in range(failures):
            await refused(breaker)
        return await is_open(breaker)

    assert asyncio.run(fail_and_try()) is goes_through


def test_a_success_in_between_starts_the_count_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "FAILURES_BEFORE_PAUSE", 2)

    async def fail_in_turns() -> bool:
        breaker = worker.Breaker()
        for _ in range(3):
            await refused(breaker)
            assert await is_open(breaker)
            await succeeded(breaker)
        return True

    assert asyncio.run(fail_in_turns())


@table("error", ("a busy provider", RetryJob), ("a refusal", FailJob))
def test_one_jobs_own_error_never_makes_others_wait(monkeypatch: pytest.MonkeyPatch, error: type[JobError]) -> None:
    monkeypatch.setattr(worker, "FAILURES_BEFORE_PAUSE", 1)

    async def fail_and_try() -> bool:
        breaker = worker.Breaker()
        with contextlib.suppress(error), breaker.watch():
            raise error
        return await is_open(breaker)

    assert asyncio.run(fail_and_try())


def test_a_pause_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "FAILURES_BEFORE_PAUSE", 1)
    monkeypatch.setattr(worker, "LONGEST_PAUSE_S", 0.2)

    async def wait() -> float:
        breaker, begun = worker.Breaker(), time.monotonic()
        await refused(breaker)
        await breaker.wait(5)
        return time.monotonic() - begun

    assert asyncio.run(wait()) >= 0.2


def test_after_a_pause_one_job_tries_and_its_success_lets_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "FAILURES_BEFORE_PAUSE", 1)

    async def try_in_turn() -> list[bool]:
        breaker = worker.Breaker()
        await refused(breaker)
        await breaker.wait(5)
        others_before = await is_open(breaker)
        await succeeded(breaker)
        return [others_before, await is_open(breaker)]

    assert asyncio.run(try_in_turn()) == [False, True]


def test_a_job_that_waited_in_vain_for_the_provider_comes_back_uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "FAILURES_BEFORE_PAUSE", 1)

    async def wait_in_vain() -> None:
        breaker = worker.Breaker()
        await refused(breaker)
        await breaker.wait(0.1)

    with pytest.raises(RetryJob) as caught:
        asyncio.run(wait_in_vain())
    assert not caught.value.is_counted
    assert caught.value.after_s is not None
    assert 0 < caught.value.after_s <= 1


def test_each_type_has_its_own_server_and_those_alike_share_one() -> None:
    urls = {"openai_base_url": "http://all/v1", "image_base_url": "http://pictures/v1"}

    async def get() -> list[str]:
        providers = worker.Providers(bare_settings(**urls))
        assert providers.get("text") is providers.get("audio")
        return [providers.get(kind).base_url for kind in worker.PROVIDER_KINDS]  # type: ignore[attr-defined]

    assert asyncio.run(get()) == ["http://all/v1", "http://pictures/v1", "http://all/v1"]


def test_with_neither_key_nor_url_the_stand_in_serves_and_signs() -> None:
    provider = worker.Providers(bare_settings()).get("text")
    pieces: list[str] = []
    answer = asyncio.run(text("Hello", pieces.append)(provider))  # type: ignore[arg-type]
    assert answer.model == "offline-stand-in"
    assert "".join(pieces) == answer.text


@table("values, is_loaded", ("offline", {}, False), ("with a provider", {"openai_base_url": "http://x"}, True))
def test_the_http_client_is_loaded_ahead_where_it_will_be_used(values: dict[str, str], is_loaded: bool) -> None:
    script = "import sys, worker, json; worker.Providers(worker.Settings(_env_file=None, **json.loads(sys.argv[1])))"
    command = [sys.executable, "-c", f"{script}.preload(); print('aiohttp' in sys.modules)", json.dumps(values)]
    ended = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, timeout=30)
    assert ended.stdout == f"{is_loaded}\n"


# ── handlers ─────────────────────────────────────────────────────────────────────────────────────────────────────


def generate(job_type: str, input_data: object, settings: Settings, pieces: list[str] | None = None) -> Result:
    """Runs a handler as a worker does: input checked, the type's own provider, over HTTP."""
    handler = worker.find_handler(job_type)
    checked = worker.check_input(handler, input_data)

    async def call() -> Result:
        provider: Any = worker.Providers(settings).get(handler.provider)
        hear = (pieces if pieces is not None else []).append
        async with provider.session:
            defaults = settings.provider(handler.provider)
            return await handler.run(Call(some_job(), checked, settings, provider, defaults, hear))

    return asyncio.run(call())


def serving(provider: Provider, **values: object) -> Settings:
    """Settings with this provider for every type."""
    return bare_settings(**{"openai_base_url": provider.url, "audio_format": "wav", **values})


def body_of(provider: Provider, job_type: str, input_data: object, **values: object) -> dict[str, Any]:
    """What the provider was asked for this input."""
    generate(job_type, input_data, serving(provider, **values))
    return provider.calls[0].body


def fault_of(job_type: str, input_data: object) -> FailJob:
    """The failure that a bad input is, before anything is spent."""
    with pytest.raises(FailJob) as caught:
        worker.check_input(worker.find_handler(job_type), input_data)
    return caught.value


def test_the_contracts_text_job_is_done_and_streamed(provider: Provider) -> None:
    pieces: list[str] = []
    asked_for = {"prompt": "Generate a story about AI", "max_tokens": 200}
    result = generate("text_generation", asked_for, serving(provider), pieces)
    assert result.output["generated_text"] == "".join(pieces)
    assert (result.output["model_used"], result.output["tokens_used"]) == ("gpt-6-luna", 25)
    assert result.media is None


def test_the_contracts_image_job_is_done(provider: Provider) -> None:
    result = generate("image_generation", {"prompt": "A futuristic city", "size": "512x512"}, serving(provider))
    assert result.output == {"model_used": "gpt-image-2.6-flare", "resolution": "512x512"}
    assert result.media == Media(picture(512, 512), "png", "image_url")


def test_the_contracts_audio_job_is_done(provider: Provider) -> None:
    result = generate("audio_generation", {"text": "Hello world", "voice": "default"}, serving(provider))
    assert result.output["duration_seconds"] == pytest.approx(SOUND_DURATION_S, abs=0.01)
    assert (result.output["model_used"], result.output["format"]) == ("gpt-4o-mini-tts", "wav")
    assert result.media == Media(sound_wav(), "wav", "audio_url")


def test_text_parameters_are_passed_on(provider: Provider) -> None:
    more = {"temperature": 0.5, "top_p": 0.9, "stop": ["END"], "seed": 7, "response_format": {"type": "json_object"}}
    body = body_of(provider, "text_generation", {"prompt": "Hi", "max_tokens": 20, **more})
    assert {name: body[name] for name in more} == more
    assert (body["max_tokens"], body["stream"]) == (20, True)


def test_what_isnt_given_isnt_sent(provider: Provider) -> None:
    body = body_of(provider, "text_generation", {"prompt": "Hi", "temperature": None, "unheard_of": 1})
    assert set(body) == {"model", "messages", "max_tokens", "stream", "stream_options"}
    assert body["max_tokens"] == bare_settings().text_max_tokens


def test_a_zero_temperature_is_a_temperature(provider: Provider) -> None:
    assert body_of(provider, "text_generation", {"prompt": "Hi", "temperature": 0})["temperature"] == 0


def test_system_messages_and_prompt_make_the_conversation_in_this_order(provider: Provider) -> None:
    messages = [{"role": "user", "content": "1", "name": "x"}, {"role": "assistant", "content": "2"}]
    body = body_of(provider, "text_generation", {"system": "0", "messages": messages, "prompt": "3"})
    assert [message["content"] for message in body["messages"]] == ["0", "1", "2", "3"]
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "user"]


def test_picture_parameters_are_passed_on(provider: Provider) -> None:
    body = body_of(provider, "image_generation", {"prompt": "A city", "size": "256x128", "quality": "hd"})
    assert body == {"model": "gpt-image-2.6-flare", "prompt": "A city", "n": 1, "size": "256x128", "quality": "hd"}


def test_sound_parameters_are_passed_on(provider: Provider) -> None:
    asked_for = {"prompt": "Hello", "voice": "nova", "speed": 1.5, "format": "mp3"}
    body = body_of(provider, "audio_generation", asked_for)
    usual = {"model": "gpt-4o-mini-tts", "input": "Hello"}
    assert body == {**usual, "voice": "nova", "speed": 1.5, "response_format": "mp3"}


@table("input_data", ("missing", {"text": "Hi"}), ("asked for", {"text": "Hi", "voice": "default"}))
def test_the_default_voice_is_the_configured_one(provider: Provider, input_data: dict[str, str]) -> None:
    assert body_of(provider, "audio_generation", input_data, audio_voice="echo")["voice"] == "echo"


def test_text_wins_over_prompt_where_a_sound_job_has_both(provider: Provider) -> None:
    assert body_of(provider, "audio_generation", {"text": "this", "prompt": "that"})["input"] == "this"


@table(
    "job_type, input_data",
    ("numbers as text", "text_generation", {"prompt": "Hi", "max_tokens": "20", "temperature": "0.7"}),
    ("a whole number with a point", "text_generation", {"prompt": "Hi", "max_tokens": 20.0}),
    ("one stop word", "text_generation", {"prompt": "Hi", "stop": "END"}),
    ("nulls are missing", "text_generation", {"prompt": "Hi", "max_tokens": None, "messages": None, "stop": None}),
    ("messages alone", "text_generation", {"messages": [{"role": "user", "content": "Hi"}]}),
    ("unknown keys", "image_generation", {"prompt": "Hi", "style": "vivid", "n": 9}),
    ("no size", "image_generation", {"prompt": "Hi"}),
    ("the model's own size", "image_generation", {"prompt": "Hi", "size": "auto"}),
    ("an older client's sound", "audio_generation", {"text": "Hi"}),
    ("a newer client's sound", "audio_generation", {"prompt": "Hi"}),
    ("a voice of another server", "audio_generation", {"text": "Hi", "voice": "en_US/amy-low:v2 .1"}),
)
def test_a_good_input_is_taken(job_type: str, input_data: object) -> None:
    worker.check_input(worker.find_handler(job_type), input_data)


TEXT, IMAGE, AUDIO = "text_generation", "image_generation", "audio_generation"


@table(
    "job_type, input_data, sentence",
    ("nothing", TEXT, {}, "needs a `prompt`"),
    ("null", TEXT, None, "should be an object"),
    ("a list", TEXT, ["Hi"], "should be an object"),
    ("a blank prompt", TEXT, {"prompt": " \n"}, "prompt should not be blank"),
    ("a prompt that is no text", TEXT, {"prompt": 5}, "prompt should be a valid string"),
    ("a prompt too long", TEXT, {"prompt": "x" * 100_001}, "prompt string should have at most 100000 characters"),
    ("true is no number", TEXT, {"prompt": "Hi", "max_tokens": True}, "max_tokens should not be true or false"),
    ("no tokens", TEXT, {"prompt": "Hi", "max_tokens": 0}, "max_tokens should be greater than or equal to 1"),
    ("half a token", TEXT, {"prompt": "Hi", "max_tokens": 1.5}, "max_tokens should be a valid integer"),
    ("too hot", TEXT, {"prompt": "Hi", "temperature": 2.1}, "temperature should be less than or equal to 2"),
    ("not a number", TEXT, {"prompt": "Hi", "temperature": float("nan")}, "temperature should be a finite number"),
    ("more than all", TEXT, {"prompt": "Hi", "top_p": 1.1}, "top_p should be less than or equal to 1"),
    ("five stop words", TEXT, {"prompt": "Hi", "stop": list("abcde")}, "stop"),
    ("a seed beyond 64 bits", TEXT, {"prompt": "Hi", "seed": 2**63}, "seed"),
    ("no messages", TEXT, {"messages": []}, "messages list should have at least 1 item"),
    ("too many messages", TEXT, {"messages": [{"role": "user", "content": "x"}] * 201}, "at most 200 items"),
    ("an unknown role", TEXT, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role should be 'system'"),
    ("messages too long together", TEXT, {"messages": [{"role": "user", "content": "x" * 60_000}] * 2}, "100000"),
    ("a schema too large", TEXT, {"prompt": "Hi", "response_format": {"x": "y" * 100_001}}, "`response_format`"),
    ("no words for a picture", IMAGE, {"size": "512x512"}, "prompt field required"),
    ("a size in words", IMAGE, {"prompt": "Hi", "size": "big"}, "size"),
    ("no width", IMAGE, {"prompt": "Hi", "size": "0x512"}, "size"),
    ("a size too large", IMAGE, {"prompt": "Hi", "size": "8192x512"}, "size should be at most 4096x4096"),
    ("an unknown quality", IMAGE, {"prompt": "Hi", "quality": "best"}, "quality should be 'auto', 'low'"),
    ("no words for a sound", AUDIO, {"voice": "default"}, "needs a `text` (or a `prompt`)"),
    ("a voice that is a path out", AUDIO, {"text": "Hi", "voice": "a" * 65}, "voice"),
    ("too slow", AUDIO, {"text": "Hi", "speed": 0.1}, "speed should be greater than or equal to 0.25"),
    ("a format that can't be checked", AUDIO, {"text": "Hi", "format": "aac"}, "format should be 'wav', 'mp3'"),
)
def test_a_bad_input_fails_with_a_sentence_about_its_fault(job_type: str, input_data: object, sentence: str) -> None:
    assert sentence in fault_of(job_type, input_data).sentence


def test_the_sentence_about_a_bad_input_reads_as_one() -> None:
    assert fault_of(TEXT, {"prompt": "Hi", "temperature": 3}).sentence == (
        "The input can't be used: temperature should be less than or equal to 2."
    )


@table(
    "input_data",
    ("in a prompt", {"prompt": [SECRET]}),
    ("in a role", {"messages": [{"role": SECRET, "content": SECRET}]}),
    ("in a number", {"prompt": SECRET, "seed": SECRET}),
    ("in a choice", {"prompt": SECRET, "stop": {SECRET: SECRET}}),
)
def test_what_the_person_wrote_never_reaches_the_log(input_data: dict[str, Any]) -> None:
    fault = fault_of(TEXT, input_data)
    assert SECRET not in fault.detail + "".join(traceback.format_exception(fault))


def test_more_tokens_than_configured_are_refused_before_anything_is_spent(provider: Provider) -> None:
    with pytest.raises(FailJob) as caught:
        generate(TEXT, {"prompt": "Hi", "max_tokens": 101}, serving(provider, text_max_tokens=100))
    assert "max_tokens should be at most 100" in caught.value.sentence
    assert provider.calls == []


@table(
    "model, used",
    ("none", None, "gpt-6-luna"),
    ("the default", "gpt-6-luna", "gpt-6-luna"),
    ("one on the list", "large", "large"),
)
def test_a_model_on_the_allow_list_is_used(provider: Provider, model: str | None, used: str) -> None:
    body = body_of(provider, TEXT, {"prompt": "Hi", "model": model}, text_models="small,large")
    assert body["model"] == used


@table("model", ("unknown", "dear"), ("empty", ""), ("another type's", "gpt-image-2.6-flare"))
def test_a_model_off_the_list_is_refused_with_the_list(provider: Provider, model: str) -> None:
    with pytest.raises(FailJob) as caught:
        generate(TEXT, {"prompt": "Hi", "model": model}, serving(provider, text_models="small"))
    assert caught.value.sentence == "This model isn't offered. Choose one of: gpt-6-luna, small."
    assert provider.calls == []


GPT_SIZES = worker.GPT_IMAGE_SIZES


@table(
    "asked_size, offered, size",
    ("anything goes", "512x512", (), "512x512"),
    ("offered", "1024x1536", GPT_SIZES, "1024x1536"),
    ("auto is the model's own choice", "auto", GPT_SIZES, "auto"),
    ("a small square", "512x512", GPT_SIZES, "1024x1024"),
    ("wide", "1792x1024", GPT_SIZES, "1536x1024"),
    ("high", "1024x1792", GPT_SIZES, "1024x1536"),
    ("of two squares the nearer", "600x600", ("256x256", "512x512", "1024x1024"), "512x512"),
    ("shape before area", "256x512", ("256x256", "1024x2048"), "1024x2048"),
)
def test_the_nearest_size_that_the_model_knows_is_used(asked_size: str, offered: tuple[str, ...], size: str) -> None:
    assert worker.nearest_size(asked_size, offered) == size


def test_the_sizes_of_a_picture_model_are_a_setting(provider: Provider) -> None:
    body = body_of(provider, IMAGE, {"prompt": "Hi", "size": "512x512"}, image_sizes="64x64,128x64")
    assert body["size"] == "64x64"


def picture_as(format_name: str) -> bytes:
    Image.new("RGB", (40, 30)).save(buffer := io.BytesIO(), format_name)
    return buffer.getvalue()


@table(
    "data, resolution, suffix",
    ("PNG", picture(40, 30), "40x30", "png"),
    ("JPEG", picture_as("JPEG"), "40x30", "jpg"),
    ("WebP", picture_as("WEBP"), "40x30", "webp"),
)
def test_a_pictures_resolution_and_format_are_read_from_its_bytes(data: bytes, resolution: str, suffix: str) -> None:
    assert worker.inspect_picture(data) == (resolution, suffix)


@table(
    "data, sentence",
    ("nothing", b"", "could not be used"),
    ("a page", b"<html>no picture</html>", "could not be used"),
    ("a truncated PNG", picture(400, 300)[:-200], "could not be used"),
    ("a truncated JPEG", picture_as("JPEG")[:-200], "could not be used"),
    ("a head alone", picture(40, 30)[:20], "could not be used"),
    ("a format that isn't offered", picture_as("GIF"), "could not be used"),
    ("many pixels", picture_bomb(9000, 9000), "too large"),
    ("a bomb", picture_bomb(30_000, 30_000), "could not be used"),
)
def test_what_is_no_picture_fails_the_job(data: bytes, sentence: str) -> None:
    with pytest.raises(FailJob, match="picture") as caught:
        worker.inspect_picture(data)
    assert sentence in caught.value.sentence


@table(
    "data, sound_format",
    ("WAV", sound_wav(), "wav"),
    ("MP3", sound_mp3(), "mp3"),
    ("MP3 with a title", b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + sound_mp3(), "mp3"),
    ("FLAC", sound_flac(), "flac"),
    ("Opus in Ogg", sound_opus(), "opus"),
)
def test_a_sounds_duration_and_format_are_read_from_its_bytes(data: bytes, sound_format: str) -> None:
    same, duration_s, found = worker.inspect_sound(data)
    assert (same, found) == (data, sound_format)
    assert duration_s == pytest.approx(SOUND_DURATION_S, abs=0.06)


def with_comment(data: bytes, comment: bytes) -> bytes:
    """The same WAV with a comment chunk before its samples."""
    at = data.index(b"data", 12)
    return data[:at] + b"LIST" + len(comment).to_bytes(4, "little") + comment + data[at:]


@table(
    "data",
    ("unknown sizes", sound_wav(streaming=True)),
    ("a comment before the samples", with_comment(sound_wav(streaming=True), b"INFOICMT")),
    ("a comment that says data", with_comment(sound_wav(streaming=True), b"INFOICMT with data in it")),
)
def test_a_streamed_wav_gets_its_true_sizes(data: bytes) -> None:
    fixed, duration_s, _ = worker.inspect_sound(data)
    assert duration_s == pytest.approx(SOUND_DURATION_S, abs=0.01)
    with wave.open(io.BytesIO(fixed)) as sound:
        assert sound.getnframes() / sound.getframerate() == pytest.approx(SOUND_DURATION_S)


@table(
    "data",
    ("nothing", b""),
    ("a page", b"<html>no sound</html>"),
    ("garbage", b"\x01\x02\x03" * 100),
    ("garbage that begins as an MP3", b"\xff\x00garbage" * 50),
    ("a head alone", b"RIFF"),
    ("no samples", sound_wav()[:44]),
    ("a cut FLAC", b"fLaC" + bytes(3)),
    ("a cut Ogg", sound_opus()[:40]),
)
def test_what_is_no_sound_fails_the_job(data: bytes) -> None:
    with pytest.raises(FailJob) as caught:
        worker.inspect_sound(data)
    assert caught.value.sentence == worker.UNUSABLE


def test_the_readmes_job_type_works(provider: Provider, variables: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my_handlers.py").write_text(readme_example("from pydantic import"))
    variables.syspath_prepend(tmp_path)
    variables.setattr(worker, "HANDLERS", dict(worker.HANDLERS))
    variables.setenv("HANDLER_MODULES", "my_handlers")
    [module] = worker.celery_configuration(Settings())["imports"]
    variables.delitem(sys.modules, module, raising=False)
    importlib.import_module(module)
    result = generate("summary_generation", {"text": "A long text [say short]"}, serving(provider))
    assert result.output == {"generated_text": "short", "model_used": "gpt-6-luna", "tokens_used": 7}


@table(
    "source, fault",
    ("a fault of its own", "x = 1\nx['secret']", "TypeError at faulty_handlers.py:2"),
    ("a variable that isn't set", "import os\nos.environ['NO_SUCH']", "KeyError at faulty_handlers.py:2"),
    ("a library that isn't there", "import no_such_library", "ModuleNotFoundError at faulty_handlers.py:1"),
    ("no Python", "x = 1\ny = (", "SyntaxError at faulty_handlers.py:2"),
)
def test_a_module_of_job_types_that_cant_be_imported_ends_the_start_with_a_sentence(
    fresh_settings: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, fault: str
) -> None:
    (tmp_path / "faulty_handlers.py").write_text(source)
    fresh_settings.syspath_prepend(tmp_path)
    fresh_settings.setenv("HANDLER_MODULES", "faulty_handlers")
    with pytest.raises(SystemExit) as ended:
        worker.import_handlers()
    assert ended.value.code == 2
    assert f"HANDLER_MODULES names faulty_handlers, which raises {fault}." in capsys.readouterr().err


def test_a_job_type_of_ones_own_has_its_input_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wanted(BaseModel):
        text: str

    monkeypatch.setattr(worker, "HANDLERS", {})
    worker.handles("mine", Wanted)(worker.text_generation)
    assert fault_of("mine", {}).sentence == "The input can't be used: text field required."


def test_an_unknown_job_type_is_named_cut_to_size() -> None:
    with pytest.raises(FailJob) as caught:
        worker.find_handler("video_generation" + "!" * 1000)
    assert "video_generation" in caught.value.sentence
    assert len(caught.value.sentence) < 100


# ── recovery ─────────────────────────────────────────────────────────────────────────────────────────────────────


def queued(runtime: Runtime) -> list[dict[str, Any]]:
    """The messages in the runtime's queue, the oldest first: task id, arguments and limits of each."""
    with redis.Redis.from_url(runtime.settings.redis_url.get_secret_value()) as client:
        raw = client.lrange(runtime.settings.celery_queue_name, 0, -1)
    messages = [json.loads(one) for one in reversed(raw)]  # type: ignore[arg-type]
    bodies = [json.loads(base64.b64decode(message["body"])) for message in messages]
    heads = [{name: message["headers"][name] for name in ("id", "timelimit", "eta")} for message in messages]
    return [{**head, "args": body[0]} for head, body in zip(heads, bodies, strict=True)]


def gone_pid() -> int:
    """The id of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The worker's monotonic clock, to be set by hand."""
    now = [1000.0]
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    return now


def test_a_fault_that_goes_on_is_logged_once_a_minute_and_once_when_over(
    at: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "worker")
    log = worker.SeldomLog("MongoDB")
    log.fine()
    for at[0] in (1000.0, 1001.0, 1059.0, 1061.0):
        log.fault("away")
    log.fine()
    log.fine()
    said = "MongoDB: away (said once a minute while it lasts)"
    assert caplog.messages == [said, said, "MongoDB: over"]


def test_a_shutdown_announced_by_the_parent_is_seen_in_its_children_and_back(at: list[float]) -> None:
    shutdown = worker.ShutdownTime()
    child = os.fork()
    if child == 0:
        shutdown.announce(5)
        os._exit(0)
    os.waitpid(child, 0)
    assert shutdown.due_at == 1005.0


def test_of_two_shutdowns_the_earlier_is_due(at: list[float]) -> None:
    shutdown = worker.ShutdownTime()
    for grace_s in (9, 5, 7):
        shutdown.announce(grace_s)
    assert shutdown.due_at == 1005.0


def test_a_shutdown_is_announced_first_and_due_after_its_grace(at: list[float]) -> None:
    shutdown = worker.ShutdownTime()
    assert not shutdown.is_announced
    assert not shutdown.is_due
    shutdown.announce(5)
    assert shutdown.is_announced
    assert not shutdown.is_due
    at[0] += 5
    assert shutdown.is_due


def test_a_cancel_before_the_handler_runs_stops_it_as_it_begins() -> None:
    attempt, stops = worker.Attempt(some_job(), 30), []
    attempt.cancel(DropJob("early"))
    attempt.bind(lambda: stops.append("stopped"))
    assert stops == ["stopped"]


def test_only_the_first_reason_of_a_cancel_counts() -> None:
    attempt, stops = worker.Attempt(some_job(), 30), []
    attempt.bind(lambda: stops.append("stopped"))
    attempt.cancel(HandBack("first"))
    attempt.cancel(DropJob("second"))
    assert (str(attempt.reason), stops) == ("first", ["stopped"])


def test_a_lease_is_fresh_for_as_long_as_it_was_given(at: list[float]) -> None:
    attempt = worker.Attempt(some_job(), 30)
    at[0] += 29
    assert attempt.is_lease_fresh()
    at[0] += 1
    assert not attempt.is_lease_fresh()


def test_no_lease_is_renewed_past_the_hard_limit_and_a_margin(at: list[float]) -> None:
    attempt = worker.Attempt(some_job(), 30)
    at[0] += LIMITS.hard_s
    assert attempt.may_renew()
    at[0] += worker.LIMIT_MARGIN_S
    assert not attempt.may_renew()


@table(
    "fields, timelimit",
    ("its lease ran out", {"worker__lease_until": ago(1)}, [120, 90]),
    ("released, and its message was lost", {"worker__owner": None, "worker__rescue_at": ago(1)}, [120, 90]),
    ("an older worker's", {"worker": None, "started_at": ago(3600)}, [None, None]),
)
def test_a_lost_job_goes_back_into_the_queue_with_its_limits_and_no_prompt(
    runtime: Runtime, fields: dict[str, Any], timelimit: list[float | None]
) -> None:
    job = claim(runtime)
    change(runtime, job.id, **fields)
    assert runtime.sweeper.sweep() == [f"job={job.id} nobody worked on it: put back into the queue"]
    [message] = queued(runtime)
    assert (message["args"], message["timelimit"]) == ([str(job.id), {"job_id": str(job.id)}], timelimit)
    assert isinstance(runtime.store.claim(job.id, "owner-2", LIMITS), Job)


def test_each_rescue_has_a_task_id_of_its_own(runtime: Runtime) -> None:
    job = claim(runtime)
    for _ in range(2):
        change(runtime, job.id, worker__owner=None, worker__rescue_at=ago(1))
        runtime.sweeper.sweep()
    assert len({message["id"] for message in queued(runtime)}) == 2


def test_a_sweep_that_finds_nothing_does_nothing(runtime: Runtime) -> None:
    claim(runtime)
    assert runtime.sweeper.sweep() == []
    assert queued(runtime) == []


def test_a_lost_job_at_its_bounds_fails_and_the_person_is_told(runtime: Runtime, api: Api) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(1), worker__attempt=4)
    assert runtime.sweeper.sweep() == [f"job={job.id} failed: {worker.GAVE_UP}"]
    [notice] = heard(api, "job_status_update", 1)
    assert (notice["status"], notice["message"]) == ("failed", worker.GAVE_UP)
    assert "unnotified" not in read(runtime, job.id)["worker"]
    assert queued(runtime) == []


def test_a_lost_job_at_its_bounds_with_a_kept_result_is_brought_to_its_end(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(1), worker__attempt=4)
    runtime.notifier.spool_result(job, Result({"generated_text": "kept"}))
    runtime.sweeper.sweep()
    assert len(queued(runtime)) == 1
    assert deliver(runtime, job.id)["status"] == "completed"


def test_a_notice_that_got_lost_is_sent_again_once(runtime: Runtime, api: Api) -> None:
    job = claim(runtime)
    runtime.store.complete(job, {}, None)
    change(runtime, job.id, worker__unnotified=ago(31))
    assert runtime.sweeper.sweep() == [f"job={job.id} its last notification was sent again"]
    assert runtime.sweeper.sweep() == []
    assert [notice["status"] for notice in heard(api, "job_status_update", 1)] == ["completed"]


def test_a_notice_that_is_on_its_way_is_not_sent_twice(runtime: Runtime) -> None:
    runtime.store.complete(claim(runtime), {}, None)
    assert runtime.sweeper.sweep() == []


def sweeper(runtime: Runtime, notifier: worker.Notifier) -> worker.Sweeper:
    return worker.Sweeper(runtime.store, notifier, lambda: runtime.artifacts, runtime.settings)


def test_a_notice_stays_in_the_outbox_while_redis_is_away(runtime: Runtime) -> None:
    failed, overdue = claim(runtime), claim(runtime, owner="owner-2")
    change(runtime, failed.id, worker__lease_until=ago(1), worker__attempt=4)
    runtime.store.complete(overdue, {}, None)
    change(runtime, overdue.id, worker__unnotified=ago(31))
    sweeper(runtime, away()).sweep()
    assert [document["_id"] for document in runtime.store.find_unnotified(0)] == [overdue.id]
    assert read(runtime, failed.id)["status"] == "processing", "a result may have been kept: nobody can say now"


def pending(runtime: Runtime, age_s: float, **fields: Any) -> ObjectId:
    """Inserts a job that waits for so long, without any message."""
    document = {"status": "pending", "job_type": TEXT, "input_data": {}, "user_id": "u", "created_at": ago(age_s)}
    inserted: ObjectId = runtime.database["jobs"].insert_one({**document, **fields}).inserted_id
    return inserted


@table(
    "age_s, queued, started_age_s, is_forgotten",
    ("nothing is queued", 120, 0, None, True),
    ("behind a backlog", 120, 5, None, False),
    ("overtaken by one a minute younger", 120, 5, 30, True),
    ("overtaken by one hardly younger", 120, 5, 100, False),
    ("young", 30, 0, None, False),
)
def test_a_pending_job_is_forgotten_only_if_its_message_is_lost(
    runtime: Runtime, age_s: float, queued: int, started_age_s: float | None, is_forgotten: bool
) -> None:
    job_id = pending(runtime, age_s)
    if started_age_s is not None:
        pending(runtime, started_age_s, status="completed", started_at=ago(1))
    found = runtime.store.find_forgotten_pending(lambda: queued)
    assert [document["_id"] for document in found] == [job_id] * is_forgotten


@table("bookkeeping", ("none", {}), ("null", {"worker": None}), ("handed on before", {"worker": {"rescues": 2}}))
def test_a_forgotten_job_is_put_into_the_queue_once_by_many_sweepers(
    runtime: Runtime, bookkeeping: dict[str, Any]
) -> None:
    job_id = pending(runtime, 120, **bookkeeping)
    done = [sweeper(runtime, runtime.notifier).sweep() for _ in range(3)]
    assert [len(lines) for lines in done] == [1, 0, 0]
    assert worker.queue_length(runtime.settings) == 1
    assert runtime.store.claim(job_id, "owner", runtime.settings.limits())


def test_of_two_sweepers_one_takes_a_forgotten_job_upon_itself(runtime: Runtime) -> None:
    pending(runtime, 120)
    [document] = runtime.store.find_forgotten_pending(lambda: 0)
    assert [runtime.store.postpone_rescue(document) for _ in range(2)] == [True, False]


def test_a_sweep_tries_a_hung_redis_once_only(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []
    notifier = away()
    monkeypatch.setattr(notifier, "publish_status", lambda *notice: tried.append(notice))
    for number in range(3):
        job = claim(runtime, owner=f"owner-{number}")
        runtime.store.complete(job, {}, None)
        change(runtime, job.id, worker__unnotified=ago(31))
    sweeper(runtime, notifier).sweep()
    assert len(tried) == 1


def test_a_rescue_without_broker_is_made_up_for_by_a_later_sweep(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(1))
    with monkeypatch.context() as broken:
        broken.setattr(worker, "app", Celery("away", set_as_current=False))
        worker.app.conf.update(worker.celery_configuration(bare_settings(redis_url=f"redis://{NOWHERE}")))
        assert runtime.sweeper.sweep() == []
    change(runtime, job.id, worker__rescue_at=ago(1))
    assert len(sweeper(runtime, runtime.notifier).sweep()) == 1


def test_of_eight_sweepers_at_once_one_rescues_each_job(runtime: Runtime, api: Api) -> None:
    lost, done_for = ([claim(runtime) for _ in range(5)] for _ in range(2))
    for job in lost + done_for:
        change(runtime, job.id, worker__lease_until=ago(1), worker__attempt=4 if job in done_for else 1)
    with ThreadPoolExecutor(8) as threads:
        rounds = list(threads.map(lambda _: runtime.sweeper.sweep(), range(8)))
    assert len([line for lines in rounds for line in lines]) == 10
    assert len(queued(runtime)) == 5
    assert len(heard(api, "job_status_update", 5)) == 5


def test_a_job_whose_process_died_is_released_at_once(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__pid=gone_pid())
    assert runtime.sweeper.release_dead_siblings() == [f"job={job.id} its process died: released"]
    assert isinstance(runtime.store.claim(job.id, "owner-2", LIMITS), Job)


def test_a_job_whose_process_was_killed_at_the_hard_limit_took_too_long(runtime: Runtime, api: Api) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__pid=gone_pid(), worker__deadline=ago(0))
    runtime.sweeper.release_dead_siblings()
    assert read(runtime, job.id)["error_message"] == worker.TOOK_TOO_LONG
    assert heard(api, "job_status_update", 1)[0]["message"] == worker.TOOK_TOO_LONG


@table("fields", ("its process lives", {}), ("of another node", {"worker__pid": 2**22, "worker__node": "other"}))
def test_a_job_of_a_living_or_foreign_process_is_left_alone(runtime: Runtime, fields: dict[str, Any]) -> None:
    job = claim(runtime)
    change(runtime, job.id, **fields)
    assert runtime.sweeper.release_dead_siblings() == []


@table(
    "document, sentence",
    ("a failure says why", {"status": "failed", "error_message": "No."}, "No."),
    ("or at least that", {"status": "failed", "error_message": None}, "The job has failed."),
    ("a success has no message", {"status": "completed"}, "Your result is ready."),
)
def test_an_ended_job_is_told_in_a_sentence(document: dict[str, Any], sentence: str) -> None:
    assert worker.final_sentence(document) == sentence


def test_a_process_is_alive_until_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker.is_process_alive(os.getpid())
    assert not worker.is_process_alive(gone_pid())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a zombie counts as alive")
def test_a_killed_process_that_nobody_has_waited_for_is_dead() -> None:
    killed = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert worker.is_process_alive(killed.pid)
    killed.kill()
    poll(lambda: not worker.is_process_alive(killed.pid), timeout_s=30)
    os.kill(killed.pid, 0)  # it is still there
    killed.communicate()


def test_a_process_of_another_user_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_pid: int, _signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(worker.os, "kill", refuse)
    assert worker.is_process_alive(gone_pid())


def test_a_heartbeat_has_an_age_while_its_process_lives(tmp_path: Path) -> None:
    heartbeat = worker.Heartbeat(tmp_path / "beats")
    assert heartbeat.ages_s() == {}
    heartbeat.beat()
    (tmp_path / "beats" / str(gone_pid())).touch()
    (tmp_path / "beats" / "notes.txt").touch()
    assert list(heartbeat.ages_s()) == [os.getpid()]
    heartbeat.stop()
    assert heartbeat.ages_s() == {}


def test_a_heartbeat_that_cant_be_written_is_said_seldom(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    heartbeat = worker.Heartbeat(tmp_path / "file" / "beats")
    heartbeat.beat()
    heartbeat.beat()
    heartbeat.stop()
    assert len(caplog.messages) == 1


def kept(runtime: Runtime, owner: str = "owner-1") -> worker.Attempt:
    """An attempt that the keeper looks after."""
    attempt = worker.Attempt(claim(runtime, owner=owner), runtime.settings.lease_seconds)
    runtime.keeper.register(attempt)
    return attempt


def test_a_tick_renews_the_leases_of_all_running_jobs(runtime: Runtime) -> None:
    attempts = [kept(runtime, f"owner-{number}") for number in range(2)]
    for attempt in attempts:
        attempt.renewed_at = 0.0
        change(runtime, attempt.job.id, worker__lease_until=ago(1))
    runtime.keeper.tick()
    assert all(attempt.is_lease_fresh() for attempt in attempts)
    assert runtime.store.find_stale() == []


def test_a_lease_is_renewed_three_times_in_its_length(runtime: Runtime, at: list[float]) -> None:
    attempt, renewals = kept(runtime), set()
    for _ in range(12):
        runtime.keeper.tick()
        renewals.add(attempt.renewed_at)
        at[0] += runtime.settings.lease_seconds / 12
    assert len(renewals) == 3


def test_an_ended_attempt_is_not_looked_after(runtime: Runtime) -> None:
    attempt = kept(runtime)
    change(runtime, attempt.job.id, worker__lease_until=ago(1))
    runtime.keeper.unregister(attempt)
    runtime.keeper.tick()
    assert len(runtime.store.find_stale()) == 1


def test_an_attempt_past_its_hard_limit_loses_its_lease(runtime: Runtime) -> None:
    attempt = kept(runtime)
    attempt.started_at -= LIMITS.hard_s + 6
    change(runtime, attempt.job.id, worker__lease_until=ago(1))
    runtime.keeper.tick()
    assert len(runtime.store.find_stale()) == 1


def test_a_tick_stops_the_attempts_that_lost_their_jobs(runtime: Runtime) -> None:
    cancelled, running = kept(runtime, "owner-1"), kept(runtime, "owner-2")
    change(runtime, cancelled.job.id, status="failed")
    runtime.keeper.tick()
    assert isinstance(cancelled.reason, DropJob)
    assert running.reason is None


def test_a_tick_empties_the_outbox_for_what_was_published(runtime: Runtime) -> None:
    published, other = claim(runtime), claim(runtime, owner="owner-2")
    for job in (published, other):
        runtime.store.complete(job, {}, None)
    runtime.keeper.note_published(published.id)
    runtime.keeper.tick()
    assert [document["_id"] for document in runtime.store.find_unnotified(0)] == [other.id]


def test_attempts_are_handed_back_once_the_grace_is_over(runtime: Runtime) -> None:
    attempt = kept(runtime)
    worker.SHUTDOWN.announce(3600)
    runtime.keeper.tick()
    assert attempt.reason is None
    worker.SHUTDOWN.announce(0)
    runtime.keeper.tick()
    assert isinstance(attempt.reason, HandBack)


def test_the_first_tick_makes_the_indexes_and_frees_what_dead_processes_held(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__pid=gone_pid())
    runtime.keeper.tick()
    poll(lambda: "worker_unnotified" in runtime.database["jobs"].index_information(), 10)
    assert read(runtime, job.id)["worker"]["owner"] is None


def tick_for_a_lease(keeper: worker.Keeper, at: list[float], settings: Settings) -> None:
    """Lets a lease's time go by in a keeper's steps: a longer silence would look like an outage."""
    for _ in range(math.ceil(settings.lease_seconds / worker.TICK_S)):
        at[0] += worker.TICK_S
        keeper.tick()


def test_a_keeper_that_just_began_rests_one_lease_before_it_sweeps(runtime: Runtime, at: list[float]) -> None:
    keeper = worker.Keeper(
        runtime.store, runtime.sweeper, worker.SHUTDOWN, worker.Heartbeat(Path("/nowhere")), runtime.settings
    )
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(1))
    keeper.tick()
    assert queued(runtime) == []
    tick_for_a_lease(keeper, at, runtime.settings)
    assert len(queued(runtime)) == 1


def test_after_a_change_of_the_primary_the_keeper_rests_one_lease_before_it_sweeps(
    runtime: Runtime, at: list[float]
) -> None:
    runtime.keeper.tick()
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(1))
    runtime.keeper._sweep_at = 0.0
    runtime.store.primary = ObjectId()  # as if another server had answered until now
    runtime.keeper.tick()
    assert queued(runtime) == []
    tick_for_a_lease(runtime.keeper, at, runtime.settings)
    assert len(queued(runtime)) == 1


def test_a_keeper_that_was_frozen_rests_one_lease_before_it_sweeps(runtime: Runtime, at: list[float]) -> None:
    runtime.keeper.tick()
    runtime.keeper._sweep_at = 0.0
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(1))
    at[0] += runtime.settings.lease_seconds
    runtime.keeper.tick()
    assert queued(runtime) == []
    tick_for_a_lease(runtime.keeper, at, runtime.settings)
    assert len(queued(runtime)) == 1


def test_a_worker_that_shuts_down_sweeps_no_more(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(1))
    worker.SHUTDOWN.announce(3600)
    runtime.keeper._sweep_at = 0.0
    runtime.keeper.tick()
    assert queued(runtime) == []


def test_a_keeper_without_the_right_to_make_indexes_goes_on(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise StoreUnavailable("OperationFailure 13")

    monkeypatch.setattr(runtime.store, "ensure_indexes", refuse)
    runtime.keeper.tick()
    runtime.keeper.tick()
    poll(lambda: "indexes could not be made" in caplog.text, 10)
    assert caplog.text.count("indexes could not be made (OperationFailure 13)") == 1


def file_of(runtime: Runtime, job: Job, suffix: str = "png") -> str:
    """Stores a file of this attempt and returns its name."""
    job = dataclasses.replace(job, owner=hashlib.sha256(job.owner.encode()).hexdigest()[:16])
    return runtime.artifacts.publish(job, Media(PNG, suffix, "image_url")).rsplit("/", 1)[-1]


def files(runtime: Runtime) -> set[str]:
    return set(runtime.artifacts.names())


def test_the_file_of_an_attempt_that_died_is_deleted_when_the_job_has_ended(runtime: Runtime) -> None:
    won, failed = claim(runtime), claim(runtime, owner="owner-2")
    lost = some_job(id=won.id, owner="dead")
    kept = [file_of(runtime, won), file_of(runtime, lost), file_of(runtime, failed)][0]
    runtime.store.complete(won, {}, f"/artifacts/{kept}")
    runtime.store.fail(failed, "No.")
    assert runtime.sweeper.sweep_artifacts() == ["2 file(s) deleted that no job names, or that are past their time"]
    assert files(runtime) == {kept}


def test_files_of_a_job_that_may_still_win_and_of_no_job_at_all_are_kept(runtime: Runtime) -> None:
    kept = {file_of(runtime, claim(runtime)), file_of(runtime, some_job())}
    runtime.artifacts.publish_file("somebody-elses.png", PNG)
    assert runtime.sweeper.sweep_artifacts(all_of_them=True) == []
    assert files(runtime) == {*kept, "somebody-elses.png"}


@table("all_of_them, left", ("in passing", False, 1), ("asked for by `recover`", True, 0))
def test_files_of_days_ago_are_looked_at_when_asked_for(runtime: Runtime, all_of_them: bool, left: int) -> None:
    job = some_job(id=ObjectId.from_datetime(ago(3 * 86_400)))
    runtime.database["jobs"].insert_one({"_id": job.id, "status": "failed"})
    file_of(runtime, job)
    runtime.sweeper.sweep_artifacts(all_of_them=all_of_them)
    assert len(files(runtime)) == left


@table("days, left", ("for ever", 0, 2), ("past its time", 2, 1))
def test_a_file_is_kept_as_long_as_the_setting_says(runtime: Runtime, days: float, left: int) -> None:
    runtime.settings.artifact_retention_days = days
    for age_s in (3 * 86_400, 86_400):
        job = some_job(id=ObjectId.from_datetime(ago(age_s)))
        name = file_of(runtime, job)
        runtime.database["jobs"].insert_one({"_id": job.id, "status": "completed", "artifact_url": f"/a/{name}"})
    runtime.sweeper.sweep_artifacts()
    assert len(files(runtime)) == left


def test_one_process_of_all_looks_for_files_in_an_hour(runtime: Runtime) -> None:
    turns = [sweeper(runtime, runtime.notifier).is_time_for_artifacts() for _ in range(3)]
    assert turns == [True, False, False]


def test_the_keeper_deletes_files_without_holding_leases_up(runtime: Runtime) -> None:
    failed = claim(runtime)
    file_of(runtime, failed)
    runtime.store.fail(failed, "No.")
    runtime.keeper._sweep_at = 0.0
    runtime.store.synchronise_clock()
    runtime.keeper.tick()
    poll(lambda: not files(runtime), 10)


def test_an_artifact_store_that_cant_be_reached_leaves_a_line(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: object) -> list[str]:
        raise StoreUnavailable("artifact store: OSError")

    monkeypatch.setattr(runtime.sweeper, "sweep_artifacts", refuse)
    runtime.keeper._sweep_artifacts()
    assert "looked for again in an hour: artifact store: OSError" in caplog.text


class Troubled:
    """Breaks a keeper's ticks: the first ones by this error, each noted."""

    def __init__(self, keeper: worker.Keeper, error: Exception, times: int) -> None:
        self.tick, self.error, self.left, self.fine = keeper.tick, error, times, 0

    def __call__(self) -> None:
        if self.left:
            self.left -= 1
            raise self.error
        self.tick()
        self.fine += 1


@table(
    "error, said",
    ("MongoDB is away", StoreUnavailable("AutoReconnect"), "MongoDB can't be reached: AutoReconnect"),
    ("a defect of our own", ValueError("planted"), "the keeper goes on after"),
)
def test_the_keepers_thread_survives(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, said: str
) -> None:
    monkeypatch.setattr(worker, "TICK_S", 0.01)
    ticks = Troubled(runtime.keeper, error, times=3)
    monkeypatch.setattr(runtime.keeper, "tick", ticks)
    runtime.keeper.start()
    poll(lambda: ticks.fine >= 2, 10)
    runtime.keeper.stop()
    assert said in caplog.text


def test_after_an_outage_the_keeper_renews_first_and_rests_one_lease_before_it_sweeps(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "TICK_S", 0.01)
    attempt, lost = kept(runtime), claim(runtime, owner="owner-2")
    for job in (attempt.job, lost):
        change(runtime, job.id, worker__lease_until=ago(1))
    runtime.keeper._sweep_at, runtime.keeper._renew_at = 0.0, time.monotonic() + 3600
    ticks = Troubled(runtime.keeper, StoreUnavailable("away"), times=1)
    monkeypatch.setattr(runtime.keeper, "tick", ticks)
    runtime.keeper.start()
    poll(lambda: ticks.fine >= 3, 10)
    runtime.keeper.stop()
    assert [document["_id"] for document in runtime.store.find_stale()] == [lost.id]


def test_the_last_tick_of_a_keeper_that_stops_writes_down_what_was_published(runtime: Runtime, tmp_path: Path) -> None:
    job = claim(runtime)
    runtime.store.complete(job, {}, None)
    runtime.keeper.start()
    poll(lambda: list(tmp_path.glob("heartbeat/*")), 10)
    runtime.keeper.note_published(job.id)
    runtime.keeper.stop()
    assert runtime.store.find_unnotified(0) == []
    assert list(tmp_path.glob("heartbeat/*")) == []


def test_what_was_published_stays_in_the_batch_while_mongodb_is_away(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_job_ids: list[ObjectId]) -> None:
        raise StoreUnavailable("away")

    job = claim(runtime)
    runtime.store.complete(job, {}, None)
    runtime.keeper.note_published(job.id)
    with monkeypatch.context() as broken:
        broken.setattr(runtime.store, "mark_notified", refuse)
        with pytest.raises(StoreUnavailable):
            runtime.keeper.tick()
    runtime.keeper.tick()
    assert runtime.store.find_unnotified(0) == []


# ── task ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def deliver(runtime: Runtime, *args: object, timelimit: object = None, **kwargs: object) -> Any:
    """Runs the task as Celery does for one message; a lone id stands for the contract's two arguments."""
    if len(args) == 1 and isinstance(args[0], ObjectId):
        args = (str(args[0]), {"job_id": str(args[0])})
    task: Any = worker.process_job
    route = {"exchange": "", "routing_key": runtime.settings.celery_queue_name}
    task.push_request(id=uuid(), called_directly=False, timelimit=timelimit, delivery_info=route, retries=0)
    try:
        return task.run(*args, **kwargs)
    finally:
        task.pop_request()


def says(runtime: Runtime, prompt: str, **fields: object) -> ObjectId:
    """Inserts a text job with this prompt."""
    return insert(runtime, input_data={"prompt": prompt}, **fields)


@pytest.fixture
def handler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Call], Awaitable[Result]]], None]:
    """Makes a function the handler of text jobs."""

    class Anything(BaseModel):
        prompt: str = ""

    monkeypatch.setattr(worker, "HANDLERS", dict(worker.HANDLERS))
    return lambda run: worker.HANDLERS.update({TEXT: worker.Handler(run, Anything, "text")})


def test_a_text_job_goes_from_message_to_document_and_person(runtime: Runtime, api: Api) -> None:
    job_id = says(runtime, "[say one two three]")
    assert deliver(runtime, job_id) == {"job_id": str(job_id), "status": "completed"}
    document = read(runtime, job_id)
    wanted = {"generated_text": "one two three", "model_used": "gpt-6-luna", "tokens_used": 7}
    assert (document["output_data"], document["artifact_url"]) == (wanted, None)
    assert [notice["status"] for notice in heard(api, "job_status_update", 2)] == ["processing", "completed"]
    assert "".join(piece["delta"] for piece in heard(api, "job_progress", 1)) == "one two three"


def test_a_picture_job_names_its_file_twice(runtime: Runtime, served: Callable[[str], httpx.Response]) -> None:
    job_id = insert(runtime, job_type=IMAGE, input_data={"prompt": "A city", "size": "64x48"})
    deliver(runtime, job_id)
    document = read(runtime, job_id)
    assert document["artifact_url"] == document["output_data"]["image_url"]
    assert served(document["artifact_url"]).content == picture(64, 48)


def test_a_sound_job_names_its_file_twice(runtime: Runtime, served: Callable[[str], httpx.Response]) -> None:
    job_id = insert(runtime, job_type=AUDIO, input_data={"text": "Hello", "voice": "default"})
    deliver(runtime, job_id)
    document = read(runtime, job_id)
    assert document["artifact_url"] == document["output_data"]["audio_url"]
    assert served(document["artifact_url"]).content == sound_wav()


@table(
    "args, kwargs",
    ("by position", ("{id}", {}), {}),
    ("by name", (), {"job_id": "{id}", "job_data": {}}),
    ("mixed", ("{id}",), {"job_data": {"user_id": "x"}}),
)
def test_a_message_of_either_calling_convention_is_read(
    runtime: Runtime, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    job_id = says(runtime, "Hello")
    filled = [str(job_id) if one == "{id}" else one for one in args]
    named = {name: str(job_id) if one == "{id}" else one for name, one in kwargs.items()}
    assert deliver(runtime, *filled, **named)["status"] == "completed"


@table(
    "args, kwargs",
    ("no arguments", (), {}),
    ("an id that is none", ("xyz", {}), {}),
    ("an id that is a number", (12, {}), {}),
    ("an id in a list", (["0" * 24], {}), {}),
    ("an id with a line end", ("0" * 24 + "\n", {}), {}),
    ("null", (None, None), {}),
    ("other names", (), {"id": "0" * 24}),
)
def test_a_message_without_a_job_id_is_dropped_with_a_log_line(
    runtime: Runtime, caplog: pytest.LogCaptureFixture, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    with pytest.raises(worker.JobFailed, match="names no job"):
        deliver(runtime, *args, **kwargs)
    assert "without a job id" in caplog.text


@table(
    "args, kwargs",
    ("no data", (), {}),
    ("data that is text", ("text",), {}),
    ("data that is a list", ([],), {}),
    ("a third argument", ({}, 1), {}),
    ("the same argument twice", ({},), {"job_id": "x"}),
    ("an unknown argument", (), {"data": {}}),
)
def test_a_damaged_message_fails_the_document_that_it_names(
    runtime: Runtime, api: Api, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    job_id = says(runtime, "Hello")
    kwargs = {name: str(job_id) if name == "job_id" else value for name, value in kwargs.items()}
    with pytest.raises(worker.JobFailed, match="damaged"):
        deliver(runtime, str(job_id), *args, **kwargs)
    assert read(runtime, job_id)["error_message"] == worker.DAMAGED
    assert heard(api, "job_status_update", 1)[0]["user_id"] == "user-1"


def test_the_document_wins_over_the_message(runtime: Runtime, api: Api) -> None:
    job_id = says(runtime, "[say from the document]")
    lies = {"user_id": "another", "job_type": IMAGE, "input_data": {"prompt": "from the message"}, "job_id": "x"}
    deliver(runtime, str(job_id), lies)
    assert read(runtime, job_id)["output_data"]["generated_text"] == "from the document"
    assert {notice["user_id"] for notice in heard(api, "job_status_update", 2)} == {"user-1"}


def test_a_message_about_an_ended_job_says_so_again_and_generates_nothing(
    runtime: Runtime, api: Api, provider: Provider
) -> None:
    job_id = says(runtime, "Hello")
    first = deliver(runtime, job_id)
    assert deliver(runtime, job_id) == first
    assert len(provider.calls) == 1
    assert heard(api, "job_status_update", 3)[-1]["status"] == "completed"


def test_a_message_about_a_running_job_is_ignored(runtime: Runtime, provider: Provider) -> None:
    job = claim(runtime)
    with pytest.raises(Ignore):
        deliver(runtime, job.id)
    assert (read(runtime, job.id)["worker"]["owner"], provider.calls) == ("owner-1", [])


def test_a_message_about_a_job_whose_process_died_takes_it_over(runtime: Runtime) -> None:
    job = claim(runtime)
    change(runtime, job.id, worker__pid=gone_pid())
    assert deliver(runtime, job.id)["status"] == "completed"


def test_a_message_before_its_time_comes_back_then_without_a_prompt(runtime: Runtime) -> None:
    job = claim(runtime)
    runtime.store.release(job, ago(-60), counted=True)
    with pytest.raises(Retry):
        deliver(runtime, job.id, timelimit=[120, 90])
    [message] = queued(runtime)
    assert message["args"] == [str(job.id), {"job_id": str(job.id)}]
    assert message["timelimit"] == [120, 90]
    assert ago(-55) < datetime.fromisoformat(message["eta"]) < ago(-65)


def test_a_message_about_a_job_at_its_bounds_fails_it(runtime: Runtime) -> None:
    job = claim(runtime)
    runtime.store.release(job, ago(1), counted=True)
    change(runtime, job.id, worker__attempt=4)
    with pytest.raises(worker.JobFailed):
        deliver(runtime, job.id)
    assert read(runtime, job.id)["error_message"] == worker.GAVE_UP


def test_a_message_about_no_document_is_told_as_such(runtime: Runtime) -> None:
    with pytest.raises(worker.JobFailed, match="no such job"):
        deliver(runtime, ObjectId())


@table("bookkeeping", ("null, as in an older document", None), ("of another program", "text"))
def test_a_job_whose_bookkeeping_is_no_sub_document_reaches_an_end(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, bookkeeping: object
) -> None:
    monkeypatch.setattr(worker, "STORE_PATIENCE_S", 0.0)
    job_id = insert(runtime, worker=bookkeeping)
    with contextlib.suppress(worker.JobFailed):
        deliver(runtime, job_id)
    assert read(runtime, job_id)["status"] in ("completed", "failed")


@table(
    "fields, sentence",
    ("an unknown job type", {"job_type": "video_generation"}, "isn't known here"),
    ("no job type", {"job_type": None}, "isn't known here"),
    ("no input", {"input_data": None}, "should be an object"),
    ("a bad input", {"input_data": {"prompt": ""}}, "should not be blank"),
    ("a provider that refuses", {"input_data": {"prompt": "[status 400]"}}, "refused this request"),
    ("a wrong key", {"input_data": {"prompt": "[status 401]"}}, "isn't set up correctly"),
)
def test_a_job_that_can_never_succeed_fails_at_once(
    runtime: Runtime, api: Api, fields: dict[str, Any], sentence: str
) -> None:
    job_id = insert(runtime, **fields)
    with pytest.raises(worker.JobFailed, match=sentence):
        deliver(runtime, job_id)
    document = read(runtime, job_id)
    assert (document["status"], sentence in document["error_message"]) == ("failed", True)
    assert heard(api, "job_status_update", 2)[-1]["message"] == document["error_message"]


def test_a_busy_provider_means_a_wait_that_the_person_reads(runtime: Runtime, api: Api) -> None:
    job_id = says(runtime, "[status 503 times=1]")
    with pytest.raises(Retry):
        deliver(runtime, job_id)
    notice = heard(api, "job_status_update", 2)[-1]
    assert notice["status"] == "processing"
    assert notice["message"] == "The provider is busy; trying again in 1 s (2 of 4)."
    assert read(runtime, job_id)["worker"]["owner"] is None
    assert len(queued(runtime)) == 1


def test_a_retry_that_is_due_completes_the_job(runtime: Runtime, api: Api) -> None:
    job_id = says(runtime, "[status 503 times=1]")
    with pytest.raises(Retry):
        deliver(runtime, job_id)
    change(runtime, job_id, worker__available_at=ago(1))
    assert deliver(runtime, job_id)["status"] == "completed"
    assert "(try 2 of 4)" in heard(api, "job_status_update", 3)[2]["message"]


def test_the_last_try_fails_the_job_and_says_how_many_there_were(runtime: Runtime) -> None:
    job = claim(runtime, says(runtime, "[status 503]"))
    runtime.store.release(job, ago(1), counted=True)
    change(runtime, job.id, worker__attempt=3)
    with pytest.raises(worker.JobFailed, match="given up after 4 tries"):
        deliver(runtime, job.id)


def in_thread(runtime: Runtime, job_id: ObjectId, provider: Provider) -> Future[Any]:
    """Delivers in a thread, and returns once the provider is at work."""
    threads = ThreadPoolExecutor(1)
    delivered = threads.submit(deliver, runtime, job_id)
    threads.shutdown(wait=False)
    poll(lambda: provider.running, 10)
    return delivered


def test_a_cancelled_job_stops_its_generation_and_is_left_as_the_api_wrote_it(
    runtime: Runtime, api: Api, provider: Provider
) -> None:
    job_id = says(runtime, "[hang]")
    delivered = in_thread(runtime, job_id, provider)
    api.cancel(job_id)
    runtime.keeper.tick()
    assert isinstance(delivered.exception(10), Ignore)
    poll(lambda: provider.calls[0].outcome == "disconnected", 5)
    assert read(runtime, job_id)["error_message"] == "Cancelled."
    assert api.notices(job_id) == ["processing"]


def test_a_shutdown_hands_a_running_job_back_uncounted(runtime: Runtime, provider: Provider) -> None:
    job_id = says(runtime, "[hang]")
    delivered = in_thread(runtime, job_id, provider)
    worker.SHUTDOWN.announce(0)
    runtime.keeper.tick()
    rejected = delivered.exception(10)
    assert isinstance(rejected, Reject)
    assert rejected.requeue
    bookkeeping = read(runtime, job_id)["worker"]
    assert (bookkeeping["owner"], bookkeeping["attempt"]) == (None, 0)


def test_a_job_beyond_its_soft_limit_fails_and_closes_its_socket(runtime: Runtime, provider: Provider) -> None:
    deliver(runtime, says(runtime, "warm up"))
    with pytest.raises(worker.JobFailed, match="took too long"):
        deliver(runtime, says(runtime, "[hang]"), timelimit=[60, 0.5])
    poll(lambda: provider.calls_for("[hang]")[0].outcome == "disconnected", 5)


def test_a_handler_that_blocks_the_loop_fails_and_the_next_job_runs(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, handler: Callable[..., None]
) -> None:
    monkeypatch.setattr(worker, "STUCK_LOOP_S", 0.1)
    released = threading.Event()

    async def block(call: Call) -> Result:
        released.wait(0 if call.input.prompt == "quick" else 30)
        return Result({"generated_text": "done"})

    handler(block)
    with pytest.raises(worker.JobFailed, match="took too long"):
        deliver(runtime, says(runtime, "slow"), timelimit=[60, 0.1])
    assert deliver(runtime, says(runtime, "quick"))["status"] == "completed"
    released.set()


def raising(error: BaseException) -> Callable[[Call], Awaitable[Result]]:
    async def run(_call: Call) -> Result:
        raise error

    return run


@table(
    "error, outcome, detail",
    ("a retry stays one", RetryJob("busy", after_s=3), RetryJob, "busy"),
    ("a failure stays one", FailJob("bad"), FailJob, "bad"),
    ("a time-out of its own is no deadline", TimeoutError(), RetryJob, "TimeoutError"),
    ("a cancel that nobody asked for", asyncio.CancelledError(), DropJob, "cancelled"),
    ("a defect names its place", KeyError(SECRET), FailJob, "KeyError at test_worker.py:"),
)
def test_however_a_handler_ends_it_is_an_outcome(
    light_runtime: Runtime, handler: Callable[..., None], error: BaseException, outcome: type[JobError], detail: str
) -> None:
    handler(raising(error))
    ended = worker.run(light_runtime, worker.Attempt(some_job(), 30))
    assert type(ended) is outcome
    assert detail in str(ended)


def test_a_cancel_ends_a_handler_with_the_cancels_reason(light_runtime: Runtime, provider: Provider) -> None:
    attempt = worker.Attempt(some_job(input_data={"prompt": "[hang]"}), 30)
    with ThreadPoolExecutor(1) as threads:
        ended = threads.submit(worker.run, light_runtime, attempt)
        poll(lambda: provider.running, 10)
        attempt.cancel(reason := HandBack("the reason"))
        assert ended.result(10) is reason


def test_a_crash_with_the_prompt_in_its_text_leaks_it_nowhere(
    runtime: Runtime, api: Api, handler: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "worker")
    handler(raising(ValueError(f"can't do {SECRET}")))
    job_id = says(runtime, f"Hello {SECRET}")
    with pytest.raises(worker.JobFailed) as caught:
        deliver(runtime, job_id)
    heard(api, "job_status_update", 2)
    told = caplog.text + str(read(runtime, job_id)["error_message"]) + json.dumps(api.heard)
    assert SECRET not in told + "".join(traceback.format_exception(caught.value))


def test_the_place_of_an_error_is_file_and_line() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        _ = 1 / 0
    assert re.fullmatch(r"test_worker\.py:\d+", worker.place_of(caught.value))
    assert worker.place_of(ValueError("raised nowhere")) == "?"


@table(
    "job, error, least_s, most_s",
    ("the first wait, jittered", some_job(attempt=1), RetryJob(), 2.5, 5),
    ("the second", some_job(attempt=2), RetryJob(), 7.5, 15),
    ("the third", some_job(attempt=3), RetryJob(), 22.5, 45),
    ("as the provider asks", some_job(attempt=3), RetryJob(after_s=7), 7, 7),
    ("at once, if it says so", some_job(attempt=1), RetryJob(after_s=0), 0, 0),
    ("no longer than the cap", some_job(attempt=1), RetryJob(after_s=3600), 120, 120),
    ("uncounted, whatever the tries", some_job(attempt=4), RetryJob(after_s=7, is_counted=False), 7, 7),
)
def test_a_retry_gets_its_wait(
    light_runtime: Runtime, job: Job, error: RetryJob, least_s: float, most_s: float
) -> None:
    outcome = worker.within_bounds(light_runtime, job, error)
    assert isinstance(outcome, RetryJob)
    assert outcome.after_s is not None
    assert least_s <= outcome.after_s <= most_s


@table(
    "job, sentence",
    ("the tries are used up", some_job(attempt=4), "The provider is busy; given up after 4 tries."),
    ("no time is left", some_job(attempt=2, first_started_at=ago(599)), "given up after 2 tries."),
    ("not even for the first", some_job(first_started_at=ago(599)), "given up after one try."),
)
def test_a_retry_beyond_the_bounds_is_a_failure(light_runtime: Runtime, job: Job, sentence: str) -> None:
    outcome = worker.within_bounds(light_runtime, job, RetryJob("HTTP 503", after_s=5))
    assert isinstance(outcome, FailJob)
    assert sentence in outcome.sentence


@pytest.mark.parametrize("outcome", [Result({}), FailJob(), HandBack(), DropJob()])
def test_what_is_no_retry_stays_as_it_is(light_runtime: Runtime, outcome: worker.Outcome) -> None:
    assert worker.within_bounds(light_runtime, some_job(attempt=4), outcome) is outcome


@pytest.fixture
def severed(runtime: Runtime, tmp_path: Path) -> Iterator[Runtime]:
    """The same runtime with MongoDB away, its files in a folder."""
    files = f"file://{tmp_path}/files"
    settings = runtime.settings.model_copy(update={"artifact_url": files})
    with pymongo.MongoClient[Any](f"mongodb://{NOWHERE}", timeoutMS=50) as client:
        severed = Runtime(settings, client)
        severed.keeper = runtime.keeper
        severed.store.clock.synchronise(runtime.store.now())  # it was there at the claim
        yield severed


def late(job: Job) -> worker.Attempt:
    """An attempt whose hard limit is near."""
    attempt = worker.Attempt(job, 30)
    attempt.started_at -= job.limits.hard_s
    return attempt


def test_a_result_that_cant_be_written_is_kept_and_the_next_attempt_uses_it(
    runtime: Runtime, severed: Runtime, provider: Provider
) -> None:
    job = claim(runtime, says(runtime, "Hello"))
    outcome = worker.settle(severed, late(job), Result({"generated_text": "kept"}))
    assert isinstance(outcome, LeaveJob)
    change(runtime, job.id, worker__lease_until=ago(1))
    runtime.sweeper.sweep()
    assert deliver(runtime, job.id)["status"] == "completed"
    assert read(runtime, job.id)["output_data"] == {"generated_text": "kept"}
    assert provider.calls == []
    assert runtime.notifier.spooled_result(job.id) is None


def test_a_picture_that_cant_be_written_is_kept_whole(runtime: Runtime, severed: Runtime) -> None:
    job = claim(runtime, insert(runtime, job_type=IMAGE, input_data={"prompt": "A city"}))
    worker.settle(severed, late(job), Result({}, Media(PNG, "png", "image_url")))
    change(runtime, job.id, worker__lease_until=ago(1))
    runtime.sweeper.sweep()
    deliver(runtime, job.id)
    name = read(runtime, job.id)["artifact_url"].rsplit("/")[-1]
    assert gridfs.GridFS(runtime.database, collection="artifacts").get(name).read() == PNG


def test_an_unknown_outcome_never_deletes_the_file(runtime: Runtime, severed: Runtime, tmp_path: Path) -> None:
    attempt = late(claim(runtime))
    outcome = worker.settle(severed, attempt, Result({}, Media(PNG, "png", "image_url")))
    with pytest.raises(Ignore):
        worker.conclude(SimpleNamespace(runtime=severed), attempt, outcome)  # type: ignore[arg-type]
    assert [path.read_bytes() for path in tmp_path.glob("files/*")] == [PNG]


def test_an_attempt_that_lost_its_job_deletes_its_file(runtime: Runtime) -> None:
    attempt = worker.Attempt(claim(runtime), 30)
    change(runtime, attempt.job.id, status="failed", error_message="Cancelled.")
    outcome = worker.settle(runtime, attempt, Result({}, Media(PNG, "png", "image_url")))
    assert len(names(runtime.artifacts, attempt.job)) == 1
    with pytest.raises(Ignore):
        worker.conclude(SimpleNamespace(runtime=runtime), attempt, outcome)  # type: ignore[arg-type]
    assert names(runtime.artifacts, attempt.job) == []


def test_the_winner_deletes_what_an_earlier_attempt_stored(runtime: Runtime) -> None:
    job_id = insert(runtime, job_type=IMAGE, input_data={"prompt": "A city", "size": "64x48"})
    earlier = claim(runtime, job_id)
    runtime.artifacts.publish(earlier, Media(PNG, "png", "image_url"))
    runtime.store.release(earlier, ago(1), counted=True)
    deliver(runtime, job_id)
    [name] = names(runtime.artifacts, earlier)
    assert read(runtime, job_id)["artifact_url"].endswith(name)


def test_a_result_that_mongodb_cant_hold_fails_the_job(runtime: Runtime, handler: Callable[..., None]) -> None:
    async def write_too_much(_call: Call) -> Result:
        return Result({"generated_text": "x" * 17_000_000})

    handler(write_too_much)
    job_id = says(runtime, "Hello")
    with pytest.raises(worker.JobFailed, match="too large"):
        deliver(runtime, job_id)
    assert read(runtime, job_id)["error_message"] == worker.CANT_BE_STORED


def test_a_write_is_tried_until_mongodb_is_back(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "POLL_STORE_S", 0.01)
    job, complete, failures = claim(runtime), runtime.store.complete, iter([True, True, False])

    def complete_at_last(*args: Any) -> bool:
        if next(failures):
            raise StoreUnavailable("away")
        return complete(*args)

    monkeypatch.setattr(runtime.store, "complete", complete_at_last)
    outcome = worker.settle(runtime, worker.Attempt(job, 30), Result({}))
    assert (outcome, read(runtime, job.id)["status"]) == (Result({}), "completed")


def test_a_write_is_given_up_once_a_shutdown_is_due(severed: Runtime) -> None:
    worker.SHUTDOWN.announce(0)
    assert isinstance(worker.settle(severed, worker.Attempt(some_job(), 30), FailJob()), LeaveJob)


def test_while_mongodb_is_away_a_message_waits_and_then_comes_back_later(
    severed: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.process_job, "runtime", severed)
    monkeypatch.setattr(worker, "STORE_PATIENCE_S", 0.1)
    monkeypatch.setattr(worker, "POLL_STORE_S", 0.05)
    job_id = ObjectId()
    with pytest.raises(Retry):
        deliver(severed, job_id)
    assert [message["args"] for message in queued(severed)] == [[str(job_id), {"job_id": str(job_id)}]]


def test_while_mongodb_is_away_a_shutdown_gives_the_message_back(
    severed: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.process_job, "runtime", severed)
    worker.SHUTDOWN.announce(5)
    with pytest.raises(Reject) as caught:
        deliver(severed, ObjectId())
    assert caught.value.requeue


def test_a_signal_during_the_last_write_comes_after_it() -> None:
    order: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: order.append("signal"))
    try:
        with worker.signals_deferred() as arrived:
            signal.raise_signal(signal.SIGTERM)
            order.append("written")
            assert arrived == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert order == ["written", "signal"]


def test_a_thread_defers_no_signals_since_it_gets_none() -> None:
    def handler_inside() -> object:
        with worker.signals_deferred():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(handler_inside).result() is signal.getsignal(signal.SIGTERM)


def test_a_message_in_the_parent_loses_celerys_soft_limit(runtime: Runtime) -> None:
    app = worker.app
    with Connection("memory://") as connection:
        message = app.amqp.as_task_v2(uuid(), worker.TASK_NAME, args=("x", {}), time_limit=50, soft_time_limit=20)
        with connection.SimpleQueue("parent") as queue:
            queue.put(message.body, headers=message.headers, serializer="json", **message.properties)
            request = worker.JobRequest(queue.get(timeout=5), app=app, task=worker.process_job)
    assert request.time_limits == (50, None)


@table("how, grace_s", ("SIGTERM", "Warm", 7.0), ("Ctrl-C twice", "Cold", 0.0))
def test_a_shutdown_has_the_grace_of_its_kind(runtime: Runtime, at: list[float], how: str, grace_s: float) -> None:
    runtime.settings.shutdown_grace = 7
    worker.announce_shutdown(how=how)
    assert worker.SHUTDOWN.due_at == 1000.0 + grace_s


@table(
    "pool", ("solo announces itself as a child does", solo.TaskPool), ("threads at the worker's start", thread.TaskPool)
)
def test_the_keeper_starts_once_in_the_process_that_runs_jobs(
    runtime: Runtime, tmp_path: Path, pool: Callable[[int], object]
) -> None:
    worker.start_in_threads(SimpleNamespace(pool=pool(1)))
    poll(lambda: list(tmp_path.glob("heartbeat/*")), 10)
    worker.stop_keeper()
    assert not list(tmp_path.glob("heartbeat/*"))


def test_a_parent_that_ran_no_keeper_stops_none(light_runtime: Runtime) -> None:
    del light_runtime.keeper
    worker.stop_keeper()
    assert "keeper" not in vars(light_runtime)


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def command(fresh_settings: pytest.MonkeyPatch, environment: dict[str, str]) -> Callable[..., tuple[int, str]]:
    """Runs `python worker.py …` in this process with settings by keyword; returns exit code and output."""

    def run(*arguments: str, **settings: str) -> tuple[int, str]:
        worker.current_settings.cache_clear()
        fresh_settings.setattr("screens.PLAIN_WIDTH", 400)
        result = CliRunner().invoke(worker.main, arguments, env={**environment, **settings}, prog_name="worker.py")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output

    return run


Command = Callable[..., tuple[int, str]]
COMMANDS = ["run", "check", "status", "health", "recover", "submit", "demo"]


@pytest.mark.parametrize("name", ["", *COMMANDS])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_has_help(command: Command, name: str, option: str) -> None:
    code, output = command(*[name, option][not name :])
    assert (code, output.startswith("Usage: worker.py")) == (0, True)


def test_the_help_lists_every_command(command: Command) -> None:
    _, output = command("--help")
    assert [name for name in COMMANDS if f"\n  {name} " not in output] == []


@pytest.mark.parametrize("name", ["run", "check", "status", "recover"])
def test_bad_settings_end_a_command_with_2_and_its_faults(command: Command, name: str) -> None:
    code, output = command(name, MONGODB_URL=f"mongodb://user:{SECRET}@", WORKER_POOL="gevent")
    assert code == 2
    assert "MONGODB_URL = (hidden)" in output
    assert "WORKER_POOL = 'gevent'" in output
    assert SECRET not in output


def test_check_finds_all_well_and_shows_no_key(runtime: Runtime, command: Command) -> None:
    code, output = command("check")
    assert (code, "FAULT" in output) == (0, False)
    for what in ("MongoDB write", "MongoDB indexes", "broker", "Redis appendonly", "artifact store", "provider, audio"):
        assert what in output
    assert KEY not in output


def test_check_leaves_no_file_behind(runtime: Runtime, command: Command) -> None:
    command("check")
    assert list(runtime.artifacts.names("check-")) == []


@table(
    "given, row",
    ("Redis is away", {"REDIS_URL": f"redis://:{SECRET}@{NOWHERE}"}, "Redis"),
    ("the store is away", {"ARTIFACT_URL": f"file://{__file__}/x"}, "artifact store"),
    ("nothing serves the files", {"ARTIFACT_BASE_URL": "http://127.0.0.2:1"}, "artifact URL"),
    ("a wrong provider", {"TEXT_BASE_URL": f"http://user:{SECRET}@{NOWHERE}/v1"}, "provider, text"),
    ("a wrong module is a bad setting", {"HANDLER_MODULES": "no_such"}, "HANDLER_MODULES"),
)
def test_check_says_what_is_wrong_and_shows_no_secret(
    runtime: Runtime, command: Command, given: dict[str, str], row: str
) -> None:
    code, output = command("check", **given)
    assert code in (1, 2)
    assert any(row in line and ("FAULT" in line or "=" in line) for line in output.splitlines())
    assert SECRET not in output
    assert KEY not in output


def test_check_says_that_mongodb_is_away(runtime: Runtime, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MONGODB_TIMEOUT_MS", 100)
    monkeypatch.setattr("screens.CHECK_TIMEOUT_S", 1)
    code, output = command("check", MONGODB_URL=f"mongodb://user:{SECRET}@{NOWHERE}")
    assert (code, "MONGODB_URL" in output, SECRET in output) == (1, True, False)


@table(
    "given, text",
    ("a path of the API", {}, "README.md has the route"),
    ("perhaps another host's loopback", {"ARTIFACT_BASE_URL": f"http://{NOWHERE}"}, "an address that serves"),
    ("no file system", {"ARTIFACT_URL": "data:"}, "stored in data:"),
    ("no model", {"OPENAI_BASE_URL": "", "OPENAI_API_KEY": ""}, "offline stand-in"),
    ("a model that isn't listed", {"TEXT_MODEL": "dear"}, "does not list it among its 3 models"),
)
def test_check_notes_what_an_operator_should_know(
    runtime: Runtime, command: Command, given: dict[str, str], text: str
) -> None:
    code, output = command("check", **given)
    assert (code, text in output) == (0, True)


def test_check_fetches_a_stored_file_by_its_public_url(runtime: Runtime, command: Command, tmp_path: Path) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        public = f"http://127.0.0.1:{server.server_port}/files"
        code, output = command("check", ARTIFACT_URL=f"file://{tmp_path}/files", ARTIFACT_BASE_URL=public)
        server.shutdown()
    assert (code, f"{public}/check-" in output, "answers with the file" in output) == (0, True, True)


def test_status_shows_jobs_queue_and_errors(runtime: Runtime, api: Api, command: Command) -> None:
    api.text("waiting")
    runtime.store.fail(claim(runtime), "That was [/too] [red]much.")
    code, output = command("status")
    rows = [" ".join(line.replace("│", " ").split()) for line in output.splitlines()]
    assert code == 0
    assert {"pending 1", "processing 0", "failed 1"} <= set(rows)
    assert f"waiting in {runtime.settings.celery_queue_name} 1" in rows
    assert "That was [/too] [red]much." in output


def test_status_says_that_mongodb_is_away(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MONGODB_TIMEOUT_MS", 100)
    code, output = command("status", MONGODB_URL=f"mongodb://{NOWHERE}")
    assert (code, "MongoDB can't be reached" in output) == (1, True)


@table("age_s, code", ("it beat just now", 0, 0), ("it has been silent for long", 300, 1))
def test_health_looks_at_the_heartbeats_of_living_processes(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, age_s: float, code: int
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    worker.Heartbeat().beat()
    [beat] = tmp_path.glob("*/*")
    os.utime(beat, (time.time() - age_s,) * 2)
    found, output = command("health")
    assert (found, "1 process(es)" in output) == (code, True)


def test_health_without_any_process_is_bad(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert command("health") == (1, "0 process(es) that run jobs\n")


def test_recover_says_what_it_did(runtime: Runtime, command: Command) -> None:
    assert command("recover") == (0, "nothing to recover\n")
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(1))
    assert command("recover") == (0, f"job={job.id} nobody worked on it: put back into the queue\n")
    assert len(queued(runtime)) == 1


def test_recover_says_that_mongodb_is_away(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MONGODB_TIMEOUT_MS", 100)
    code, output = command("recover", MONGODB_URL=f"mongodb://{NOWHERE}")
    assert (code, "MongoDB can't be reached" in output) == (1, True)


@table(
    "options, pool",
    ("as configured", [], "--pool=prefork"),
    ("Celery's own options come last", ["--", "--pool=solo"], "--pool=solo"),
)
def test_run_starts_celery_and_prints_what_it_is_connected_to(
    command: Command, monkeypatch: pytest.MonkeyPatch, options: list[str], pool: str
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(worker, "start_celery", lambda arguments: started.append(arguments) or 0)
    _, output = command("run", *options, WORKER_POOL="prefork", REDIS_URL=f"redis://:{SECRET}@host")
    assert [option for option in started[0] if option.startswith("--pool")][-1] == pool
    assert "redis://***@host" in output
    assert SECRET not in output
    assert KEY not in output


def test_without_a_command_the_worker_runs_and_an_offline_one_says_so(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(worker, "start_celery", lambda arguments: started.append(arguments) or 0)
    _, output = command(OPENAI_BASE_URL="", OPENAI_API_KEY="")
    assert len(started) == 1
    assert "OFFLINE STAND-IN" in output


@table("name, arguments", ("submit", "submit", ["--prompt", "Hi"]), ("demo", "demo", []))
def test_a_thin_command_ends_with_what_its_module_returns(
    command: Command, monkeypatch: pytest.MonkeyPatch, name: str, arguments: list[str]
) -> None:
    monkeypatch.setattr(f"demo.{name}", lambda *_: 7)
    assert command(name, *arguments)[0] == 7


def test_a_message_whose_broker_is_away_goes_back_and_is_not_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_broker(**_: object) -> None:
        raise worker.Reject("no broker", requeue=False)

    monkeypatch.setattr(worker.process_job, "retry", no_broker)
    back = worker.put_back(worker.process_job, ObjectId(), 1)
    assert isinstance(back, worker.Reject)
    assert back.requeue


@table("status", ("a fifth one", "archived"), ("none", None))
def test_a_document_of_another_status_is_no_job(runtime: Runtime, status: str | None) -> None:
    job = claim(runtime)
    change(runtime, job.id, status=status, worker__owner=None)
    missed = runtime.store.claim(job.id, "owner-2", runtime.settings.limits())
    assert isinstance(missed, worker.Miss)
    assert missed.kind is worker.MissKind.UNKNOWN


def test_a_claim_that_waited_leaves_less_time_than_the_soft_limit(runtime: Runtime) -> None:
    job = claim(runtime)
    assert worker.Attempt(job, 30, time.monotonic()).time_left_s() == job.limits.soft_s
    long_ago = time.monotonic() - 50
    assert job.limits.soft_s - 50 < worker.Attempt(job, 30, long_ago).time_left_s() < job.limits.soft_s - 10


@table("address", ("NAT64", "64:ff9b::a00:1"), ("6to4", "2002:7f00:1::"), ("multicast", "224.0.0.1"))
def test_an_address_that_leads_elsewhere_is_not_public(address: str) -> None:
    assert not worker.is_public(ipaddress.ip_address(address))
    assert worker.is_public(ipaddress.ip_address("2606:4700::1111"))


@table(
    "failures, pause_s",
    ("too few", worker.FAILURES_BEFORE_PAUSE - 1, 0.0),
    ("enough", worker.FAILURES_BEFORE_PAUSE, 1.0),
    ("many of one outage", 20 * worker.FAILURES_BEFORE_PAUSE, 1.0),
)
def test_failures_that_overlap_make_one_pause(failures: int, pause_s: float) -> None:
    async def fail(breaker: worker.Breaker) -> None:
        with contextlib.suppress(RetryJob), breaker.watch():
            await asyncio.sleep(0)
            raise worker.ProviderAway

    async def fail_together() -> float:
        breaker = worker.Breaker()
        await asyncio.gather(*(fail(breaker) for _ in range(failures)))
        return max(0.0, breaker._resume_at - time.monotonic())

    assert asyncio.run(fail_together()) == pytest.approx(pause_s, abs=0.5)


# ── README ───────────────────────────────────────────────────────────────────────────────────────────────────────

README = Path(worker.__file__).with_name("README.md").read_text()


def test_readmes_table_has_every_variable_with_its_default() -> None:
    rows = dict(re.findall(r"(?m)^\| `([A-Z0-9_]+)` \| (?:`([^`]*)`)? ?\|", README))
    for name, field in Settings.model_fields.items():
        default: Any = field.get_default()
        default = default.get_secret_value() if hasattr(default, "get_secret_value") else default
        default = ",".join(map(str, default)) if isinstance(default, tuple) else default
        assert rows[name.upper()] == (str(default).lower() if isinstance(default, bool) else str(default)), name


def test_readmes_table_of_faults_names_tests_that_exist() -> None:
    tests = "".join(path.read_text() for path in Path(worker.__file__).parent.glob("test_*.py"))
    named = re.findall(r"`(test_\w+)` \|", README)
    assert len(named) > 10
    assert [name for name in named if f"def {name}(" not in tests] == []
