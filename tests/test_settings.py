"""The settings: their defaults, what is wrong with a bad value, and what follows from several of them together."""

from __future__ import annotations

import codecs
import errno
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from pydantic import ValidationError

from testbed.network import make_certificate
from testbed.processes import SOURCE
from tests.lab import SECRET, bare_settings, table
from workerkit.settings import ProviderSettings, Settings, load_settings, redact_url, settings_faults


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment without any of the worker's variables, in an empty folder."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def faults(variables: pytest.MonkeyPatch, **bad: str) -> list[str]:
    for name, value in bad.items():
        variables.setenv(name, value)
    with pytest.raises(ValidationError) as caught:
        Settings()
    return settings_faults(caught.value)


# ── what is read ─────────────────────────────────────────────────────────────────────────────────────────────────


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
    assert (settings.retry_delays, settings.max_attempts) == ((1, 2.5), 3)
    assert settings.text_models == ("small", "large")


def test_a_variable_in_utf_8_is_read_where_the_locale_knows_ascii_alone(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("TEXT_MODEL", "mödel".encode().decode("ascii", "surrogateescape"))
    assert Settings().text_model == "mödel"


@table(
    "data",
    ("with the mark of Windows' editors", codecs.BOM_UTF8 + b"TEXT_MODEL=m\xc3\xb6del\n"),
    ("with Windows' ends of lines", b"TEXT_MODEL=m\xc3\xb6del\r\n"),
)
def test_a_dotenv_file_in_utf_8_is_read(variables: pytest.MonkeyPatch, data: bytes) -> None:
    Path(".env").write_bytes(data)
    assert load_settings().text_model == "mödel"


@table(
    "data, right",
    ("UTF-16, as PowerShell writes it", "TEXT_MODEL=m\n".encode("utf-16"), "is in UTF-16: save it in UTF-8"),
    ("UTF-16 without its mark", "TEXT_MODEL=m\n".encode("utf-16-le"), "holds NUL bytes"),
    ("UTF-16 the other way round", codecs.BOM_UTF16_BE + "A=m\n".encode("utf-16-be"), "is in UTF-16"),
    ("Latin-1", "A=1\nTEXT_MODEL=mödel\n".encode("latin-1"), "isn't in UTF-8 (line 2): save it in UTF-8"),
    ("a NUL byte", b"TEXT_MODEL=m\0\n", "holds NUL bytes"),
    ("a folder", "folder", "is a folder"),
    ("a link to nothing", "link", "is a link to a file that isn't there"),
)
def test_a_dotenv_file_that_cant_be_read_is_a_fault_with_advice(
    variables: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: bytes | str, right: str
) -> None:
    path = Path(".env")
    if isinstance(data, bytes):
        path.write_bytes(data)
    elif data == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(SystemExit) as ended:
        load_settings()
    assert ended.value.code == 2
    assert f"\n  .env {right}" in capsys.readouterr().err


def test_a_dotenv_file_of_another_user_is_a_fault_with_advice(
    variables: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    Path(".env").touch()
    variables.setattr(Path, "read_bytes", refuse)
    with pytest.raises(SystemExit):
        load_settings()
    assert ".env can't be read (Permission denied): let the worker's user read it" in capsys.readouterr().err


# ── what is wrong with a value ───────────────────────────────────────────────────────────────────────────────────


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
    ("bytes that aren't UTF-8", "AUDIO_VOICE", "v\udcf6ice", "valid string"),
    ("an effort that no model knows", "TEXT_REASONING_EFFORT", "much", "'none', 'minimal', 'low'"),
    ("fewer than no tokens", "TEXT_THINKING_TOKENS", "-1", "greater than or equal to 0"),
    ("a picture's URL instead of its host", "PICTURE_HOSTS", "http://cdn/pictures", "hosts, comma-separated"),
    ("a host with a port in words", "PICTURE_HOSTS", "minio:port", "hosts, comma-separated"),
    ("Azure without a path", "OPENAI_BASE_URL", "https://x.openai.azure.com", "azure.com/openai/v1"),
    ("Azure without a version", "TEXT_BASE_URL", "https://x.openai.azure.com/openai/deployments/d", "api-version="),
    ("no slot", "WORKER_CONCURRENCY", "0", "greater than or equal to 1"),
    ("half a slot", "WORKER_CONCURRENCY", "1.5", "valid integer"),
    ("a lease that no keeper can renew in time", "LEASE_SECONDS", "1", "greater than or equal to 2"),
    ("an endless grace", "SHUTDOWN_GRACE", "inf", "less than or equal to 86400"),
    ("one delay is none", "RETRY_DELAYS", "5,x", "valid number"),
    ("a delay before the failure", "RETRY_DELAYS", "-1", "greater than or equal to 0"),
    ("a module that isn't there", "HANDLER_MODULES", "no_such_module", "modules that can be imported"),
    ("a provider without scheme", "OPENAI_BASE_URL", "api.example.com/v1", "http://host:port/v1"),
    ("a type's server without host", "TEXT_BASE_URL", "http:///v1", "http://host:port/v1"),
    ("an effort that no model has", "TEXT_REASONING_EFFORT", "extreme", "'low', 'medium', 'high'"),
    ("less than no thinking", "TEXT_THINKING_TOKENS", "-1", "greater than or equal to 0"),
    ("a model's name of pages", "TEXT_MODEL", "x" * 201, "at most 200 characters"),
    ("pictures from a path", "PICTURE_HOSTS", "http://cdn/pictures", "cdn.internal or minio:9000"),
    ("pictures from any host", "PICTURE_HOSTS", "cdn.internal,*", "cdn.internal or minio:9000"),
    ("pictures with a password", "PICTURE_HOSTS", "user:pw@cdn", "cdn.internal or minio:9000"),
    ("pictures from a port in words", "PICTURE_HOSTS", "minio:port", "cdn.internal or minio:9000"),
    ("pictures from a folder", "PICTURE_HOSTS", "file://cdn", "cdn.internal or minio:9000"),
    ("sizes in words", "IMAGE_SIZES", "1024x1024,big", "1024x1024,1536x1024"),
    ("a format that can't be checked", "AUDIO_FORMAT", "aac", "'mp3', 'wav', 'opus' or 'flac'"),
    ("an answer of no size", "MAX_ANSWER_BYTES", "10", "greater than or equal to 1024"),
    ("a path instead of a URL", "ARTIFACT_URL", "/tmp/artifacts", "file:///folder"),
    ("an S3 server without scheme", "S3_ENDPOINT_URL", "minio:9000", "http://host:port"),
    ("an S3 server with a query", "S3_ENDPOINT_URL", "http://minio:9000?x=1", "without a ?"),
    ("a query before a file's name", "ARTIFACT_BASE_URL", "https://cdn.example/x?sig=1", "a file's name follows it"),
    ("a port in words", "OPENAI_BASE_URL", "http://host:port/v1", "http://host:port/v1"),
    ("a fragment", "OPENAI_BASE_URL", "http://host/v1#x", "http://host:port/v1"),
    ("options of a RabbitMQ", "CELERY_BROKER_URL", "amqp://host?heartbeat=x", "without options behind a ?"),
    ("a port of RabbitMQ in words", "CELERY_BROKER_URL", "amqp://host:abc", "amqp://user:password@host:5672"),
    ("an option of another type", "MONGODB_URL", "mongodb://host/?maxPoolSize=many", "its options"),
    ("options that exclude each other", "MONGODB_URL", "mongodb://a,b/?directConnection=true", "its options"),
    ("the same behind a name in the DNS", "MONGODB_URL", "mongodb+srv://a.b.c:27017/", "its options"),
    ("an authority that isn't there", "SSL_CERT_FILE", "/no/such/file.pem", "No such file or directory"),
    ("an authority that is a folder", "SSL_CERT_FILE", "/proc", "Is a directory"),
    ("an authority that is no certificate", "SSL_CERT_FILE", __file__, "holds no certificate"),
    ("a folder that isn't there", "SSL_CERT_DIR", "/no/such/folder", "isn't there"),
)
def test_a_bad_value_is_one_fault_with_its_variable_and_what_is_right(
    variables: pytest.MonkeyPatch, name: str, value: str, right: str
) -> None:
    [line] = faults(variables, **{name: value})
    assert line.strip().startswith(f"{name} = ")
    assert right in line


URLS = {
    "MONGODB_URL": "mongodb://host/?tls=true&{}",
    **dict.fromkeys(("REDIS_URL", "CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"), "rediss://host/0?{}"),
}


@pytest.mark.parametrize("name", URLS)
@table(
    "content, right",
    ("it isn't there", None, "can't be read (No such file or directory)"),
    ("it is a folder", "folder", "can't be read (Is a directory)"),
    ("it is empty", "", "no certificate"),
    ("it is something else", "-----BEGIN NONSENSE-----", "no certificate"),
)
def test_a_certificate_that_cant_be_used_is_a_fault_that_names_its_option(
    variables: pytest.MonkeyPatch, tmp_path: Path, name: str, content: str | None, right: str
) -> None:
    path = tmp_path / "x.pem"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    mongodb, redis = ("tlsCAFile", "tlsCertificateKeyFile", "TLSCRLFILE"), ("ssl_ca_certs", "ssl_certfile")
    for option in mongodb if name == "MONGODB_URL" else redis:
        [line] = faults(variables, **{name: URLS[name].format(f"{option}={path}")})
        assert line.strip().startswith(f"{name} = (hidden): ")
        assert option.lower() in line.lower()
        assert right in line


def test_a_certificate_and_key_that_can_be_used_are_no_fault(variables: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = make_certificate(tmp_path)
    redis_url = f"rediss://host?ssl_ca_certs={made.authority}&ssl_certfile={made.pair}&ssl_ca_path={tmp_path}"
    mongodb_url = f"mongodb://host/?tls=true&tlsCAFile={made.authority}&tlsCertificateKeyFile={made.pair}"
    assert Settings(redis_url=redis_url, mongodb_url=mongodb_url, ssl_cert_file=str(made.authority))


def test_a_key_with_a_password_is_a_fault_and_asks_for_nothing(variables: pytest.MonkeyPatch, tmp_path: Path) -> None:
    locked = BestAvailableEncryption(b"right")
    key = ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked)
    (tmp_path / "key.pem").write_bytes(key)
    certificate = make_certificate(tmp_path).pair
    [line] = faults(variables, REDIS_URL=f"rediss://host?ssl_certfile={certificate}&ssl_keyfile={tmp_path}/key.pem")
    assert "another password" in line


def test_the_authorities_of_a_dotenv_file_reach_the_environment_where_openssl_reads_them(
    variables: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority = make_certificate(tmp_path).authority
    variables.setenv("SSL_CERT_FILE", "")
    Path(".env").write_text(f"SSL_CERT_FILE={authority}\n")
    load_settings()
    assert os.environ["SSL_CERT_FILE"] == str(authority)


@table(
    "lease, concurrency, is_refused",
    ("hundreds of jobs and a short lease", "2", "300", True),
    ("as many jobs and a longer one", "10", "300", False),
    ("a short lease and fewer jobs", "2", "100", False),
)
def test_hundreds_of_jobs_need_leases_that_a_burst_of_starts_cant_outlast(
    variables: pytest.MonkeyPatch, lease: str, concurrency: str, is_refused: bool
) -> None:
    variables.setenv("WORKER_CONCURRENCY", concurrency)
    variables.setenv("LEASE_SECONDS", lease)
    if is_refused:
        [line] = faults(variables)
        assert "LEASE_SECONDS = '2': should be at least 10 where over 100 jobs run at a time" in line
    else:
        assert Settings().lease_seconds == float(lease)


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
    ("a key instead of a URL", "OPENAI_BASE_URL", SECRET),
    ("a token in a provider's path", "OPENAI_BASE_URL", f"http://host/v1/{SECRET}#x"),
    ("a token where the port should be", "OPENAI_BASE_URL", f"http://host:{SECRET}/v1"),
    ("a query behind a public address", "ARTIFACT_BASE_URL", f"https://host/{SECRET}?sig={SECRET}"),
    ("a query of a Redis", "REDIS_URL", f"redis://host?{SECRET}={SECRET}"),
    ("a ? in Redis' password", "REDIS_URL", f"redis://:12?{SECRET}=x@host"),
)
def test_a_fault_never_shows_a_secret(
    variables: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    variables.setenv(name, value)
    with pytest.raises(SystemExit):
        load_settings()
    printed = capsys.readouterr()
    assert name in printed.err
    assert SECRET not in printed.err + printed.out


def test_bad_settings_end_with_2_and_no_stack_trace(
    variables: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables.setenv("WORKER_POOL", "gevent")
    with pytest.raises(SystemExit) as ended:
        load_settings()
    assert ended.value.code == 2
    assert "WORKER_POOL = 'gevent'" in (printed := capsys.readouterr().err)
    assert "Traceback" not in printed


def test_the_settings_shown_whole_hold_no_secret() -> None:
    url = f"http://user:{SECRET}@host"
    settings = bare_settings(openai_api_key=SECRET, redis_url=f"redis://:{SECRET}@host", text_base_url=url)
    assert SECRET not in repr(bare_settings(openai_api_key=SECRET, redis_url=f"redis://:{SECRET}@host"))
    assert SECRET not in settings.provider("text").label
    assert SECRET not in repr(settings)
    assert SECRET not in repr(settings.provider("text"))


# ── what follows from several settings ───────────────────────────────────────────────────────────────────────────


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
    limits = bare_settings().limits(timelimit)
    assert [limits.soft_s, limits.hard_s] == pytest.approx([soft_s, hard_s])


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
    assert where.is_offline is not bool(url or key)


@table(
    "path, is_right",
    ("the newer interface", "/openai/v1", True),
    ("with a slash at its end", "/openai/v1/", True),
    ("with a version of it", "/openai/v1?api-version=preview", True),
    ("a deployment", "/openai/deployments/mine?api-version=2024-10-21", True),
    ("a deployment behind another option", "/openai/deployments/mine/?x=1&api-version=2024-10-21", True),
    ("the catalogue of models", "/models?api-version=2024-05-01-preview", True),
    ("nothing", "", False),
    ("OpenAI's path", "/v1", False),
    ("a deployment without a version", "/openai/deployments/mine", False),
    ("a deployment's version without a value", "/openai/deployments/mine?api-version=", False),
    ("no deployment", "/openai/deployments/?api-version=2024-10-21", False),
    ("the address of a call", "/openai/deployments/mine/chat/completions?api-version=2024-10-21", False),
)
@pytest.mark.parametrize(
    "host", ["mine.openai.azure.com", "MINE.services.ai.azure.com", "x.cognitiveservices.azure.us"]
)
def test_an_address_at_azure_is_checked_at_the_start(
    variables: pytest.MonkeyPatch, host: str, path: str, is_right: bool
) -> None:
    if is_right:
        assert Settings(openai_base_url=f"https://{host}{path}")
    else:
        [line] = faults(variables, OPENAI_BASE_URL=f"https://{host}{path}")
        assert "should look like https://NAME.openai.azure.com/openai/v1 (or end in /openai/deployments/" in line


@pytest.mark.parametrize(
    "url", ["https://openai.azure.com.example/v1", "https://azure.example/v1", "http://localhost/v1"]
)
def test_an_address_elsewhere_may_have_any_path(url: str) -> None:
    assert bare_settings(openai_base_url=url).openai_base_url == url


BEARER, OWN = {"authorization": "Bearer k"}, {"api-key": "k"}


@table(
    "url, key, headers",
    ("OpenAI", "", "k", BEARER),
    ("any server", "http://host/v1", "k", BEARER),
    ("without a key", "http://host/v1", "", {}),
    ("user and password in the address come before it", "http://u:p@host/v1", "k", {}),
    ("Azure's newer interface", "https://x.openai.azure.com/openai/v1", "k", BEARER),
    ("a deployment at Azure", "https://x.openai.azure.com/openai/deployments/m?api-version=1", "k", OWN),
    ("a gateway in front of Azure", "https://gateway/azure?api-version=1", "k", {**BEARER, **OWN}),
    ("another option", "https://gateway/v1?version=1", "k", BEARER),
)
def test_the_key_goes_into_the_header_that_a_server_reads(url: str, key: str, headers: dict[str, str]) -> None:
    assert ProviderSettings(url, key, "m", ()).key_headers == headers


@table(
    "url, is_openai",
    ("no address", "", True),
    ("its own", "https://api.openai.com/v1", True),
    ("its own with a slash", "https://api.openai.com/v1/", True),
    ("another's", "https://api.openai.com.example/v1", False),
)
def test_which_server_is_openai(url: str, is_openai: bool) -> None:
    assert ProviderSettings(url, "k", "", ()).is_openai is is_openai


@table(
    "variables_, cap",
    ("unset: none is sent", {}, {}),
    ("empty: none is sent", {"TEXT_MAX_TOKENS": ""}, {}),
    ("set: that is sent", {"TEXT_MAX_TOKENS": "900"}, {"max_tokens": 900}),
    ("set to its default: that is sent", {"TEXT_MAX_TOKENS": "4096"}, {"max_tokens": 4096}),
)
def test_a_text_has_a_cap_of_ours_only_where_the_operator_set_one(
    variables: pytest.MonkeyPatch, variables_: dict[str, str], cap: dict[str, int]
) -> None:
    for name, value in variables_.items():
        variables.setenv(name, value)
    assert Settings().usual_cap == cap


def test_a_provider_knows_how_much_a_model_may_think_and_where_its_pictures_may_lie() -> None:
    where = bare_settings(
        text_thinking_tokens=100, text_reasoning_effort="high", picture_hosts="minio:9000, https://cdn.internal"
    ).provider("image")
    assert (where.kind, where.thinking_tokens, where.reasoning_effort) == ("image", 100, "high")
    assert where.picture_hosts == ("minio:9000", "https://cdn.internal")


@table(
    "where, label",
    ("offline", ProviderSettings("", "", "m", ()), "offline stand-in"),
    ("OpenAI", ProviderSettings("", "k", "m", ()), "m at https://api.openai.com/v1"),
    ("a server", ProviderSettings("http://u:p@host/v1", "k", "m", ()), "m at http://***@host/v1"),
    ("no model is set", ProviderSettings("http://host", "k", "", ()), "a model of its list at http://host"),
)
def test_a_provider_is_shown_without_its_credentials(where: ProviderSettings, label: str) -> None:
    assert where.label == label


@table(
    "url, shown",
    ("no credentials", "redis://host:6379/0", "redis://host:6379/0"),
    ("user and password", "mongodb://user:pw@host/db", "mongodb://***@host/db"),
    ("an @ in the password", "mongodb://user:p@w@host/db", "mongodb://***@host/db"),
    ("a / in the password", "redis://:p/w@host", "redis://***"),
    ("a ? in the password", "redis://:p?w@host", "redis://***"),
    ("a # in the password", "redis://:p#w@host", "redis://***"),
    ("a : behind the host", "http://host:pw/v1", "http://***"),
    ("a password of a socket", "unix://:pw@/run/redis.sock?db=1", "unix://***@/run/redis.sock"),
    ("several hosts", "mongodb://u:pw@a:1,b:2/db?x=pw", "mongodb://***@a:1,b:2/db"),
    ("an IPv6 address", "redis://:pw@[::1]:6379/0", "redis://***@[::1]:6379/0"),
    ("a harmless path", "https://host/openai/v1/", "https://host/openai/v1/"),
    ("a version of another form", "https://host/v1beta/openai", "https://host/v1beta/openai"),
    ("a path that may be a token", "https://host:8443/v1/acct/pw/openai?key=pw", "https://host:8443/…"),
    ("a query behind the host", "https://host?key=pw", "https://host"),
    ("an @ in a query", "https://host/v1?to=a@pw", "https://***"),
    ("a fragment", "https://host/v1#pw", "https://host/v1"),
    ("a bucket and a folder", "s3://bucket/folder", "s3://bucket/folder"),
    ("a path alone", "/artifacts", "/artifacts"),
    ("a query", "redis://host/0?password=pw", "redis://host/0"),
    ("no URL", "gridfs", "gridfs"),
)
def test_a_url_is_shown_without_secrets(url: str, shown: str) -> None:
    assert redact_url(url) == shown


@table(
    "values, pool",
    ("as set", {"worker_pool": "solo"}, "solo"),
    ("where fork works, else threads", {}, "threads" if sys.platform == "darwin" else "prefork"),
)
def test_the_pool_is_the_one_asked_for_or_what_works_here(values: dict[str, str], pool: str) -> None:
    assert bare_settings(**values).pool == pool


def test_broker_and_results_are_redis_unless_set_otherwise() -> None:
    other = bare_settings(celery_broker_url="amqp://rabbit", celery_result_backend="redis://results")
    assert (bare_settings().broker_url, bare_settings().result_backend) == ("redis://redis:6379/0",) * 2
    assert (other.broker_url, other.result_backend) == ("amqp://rabbit", "redis://results")


@table(
    "url, broker_url, master",
    ("the master's name is an option", "sentinel://host:26379/0?master_name=x", "sentinel://host:26379/0", "x"),
    ("a Redis has none", "redis://host/0?db=1", "redis://host:6379/1", ""),
)
def test_a_sentinels_url_names_its_master(url: str, broker_url: str, master: str) -> None:
    settings = bare_settings(celery_broker_url=url)
    assert (settings.broker_url, settings.sentinel_master) == (broker_url, master)


@table(
    "values, url",
    ("s3:// alone takes the contract's bucket", {"artifact_url": "s3://", "s3_bucket_name": "b"}, "s3://b"),
    (
        "a URL with a bucket is taken as it is",
        {"artifact_url": "s3://own/folder", "s3_bucket_name": "b"},
        "s3://own/folder",
    ),
    ("a bucket's name alone doesn't choose S3", {"s3_bucket_name": "b"}, "gridfs"),
)
def test_s3_is_used_only_where_the_artifact_url_says_so(values: dict[str, str], url: str) -> None:
    assert bare_settings(**values).artifact_store_url == url


# ── documentation ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_table_of_settings_has_every_variable_with_its_default() -> None:
    table_rows = (SOURCE / "docs" / "settings.md").read_text()
    rows = dict(re.findall(r"(?m)^\| `([A-Z0-9_]+)` \| (?:`([^`]*)`)? ?\|", table_rows))
    for name, field in Settings.model_fields.items():
        default: Any = field.get_default()
        default = default.get_secret_value() if hasattr(default, "get_secret_value") else default
        default = ",".join(map(str, default)) if isinstance(default, tuple) else default
        assert rows[name.upper()] == (str(default).lower() if isinstance(default, bool) else str(default)), name
