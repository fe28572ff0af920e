"""Misspelt variables: every slip in a setting's name is recognised, and no name of another program is."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from testbed.processes import SOURCE
from tests.lab import SECRET, table
from tests.site import StartWorker
from workerkit.misspelt import Misspelt, distance, find_misspelt
from workerkit.settings import Settings, announce_settings, load_settings, misspelt_variables, remarks

SETTINGS = sorted(name.upper() for name in Settings.model_fields)


def meant(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The names that are recognised, each with the settings that are proposed."""
    return {one.name: one.meant for one in find_misspelt(dict.fromkeys(names, ".env"), SETTINGS)}


# ── one letter ───────────────────────────────────────────────────────────────────────────────────────────────────


def slips(setting: str) -> Iterator[str]:
    """Every name that one slip of a letter makes of it: left out, put in, replaced, or swapped with the next one."""
    for i, letter in enumerate(setting):
        begin, rest = setting[:i], setting[i + 1 :]
        yield from (begin + one + letter + rest for one in string.ascii_uppercase)
        yield from (begin + one + rest for one in string.ascii_uppercase if not letter.isdigit())
        yield from [begin + rest] if not letter.isdigit() else []
        yield from [begin + rest[0] + letter + rest[1:]] if rest else []
    yield from (setting + one for one in string.ascii_uppercase)


# Slips that make one of these words are left in silence, since other programs have such names.
WORDS_OF_OTHERS = {
    *("APP", "AUDIT", "CERTFILE", "CERTS", "DEBUGS", "DELAY", "DIRS", "FILES", "KEYS", "MODE", "MODES", "NAMES"),
    *("NDEBUG", "NEXT", "POLL", "REGIONS", "SIZE", "SLEEP", "SQL", "SSH", "SSO", "TEST", "TOOL", "URI", "URLS"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_slip_of_one_letter_is_recognised_but_those_that_make_other_programs_names(setting: str) -> None:
    names = set(slips(setting)) - set(SETTINGS)
    recognised = meant(names)
    silent = names - recognised.keys()
    assert [name for name, proposed in recognised.items() if setting not in proposed] == []
    assert [name for name in silent if not set(name.split("_")) - set(setting.split("_")) <= WORDS_OF_OTHERS] == []
    assert len(silent) <= 6


@table(
    "name, settings",
    ("a letter at the end of two names", "TEXT_MODELX", ("TEXT_MODEL", "TEXT_MODELS")),
    ("a letter nearer to one of them", "TEXT_MODLES", ("TEXT_MODELS",)),
)
def test_a_name_between_two_settings_proposes_both(name: str, settings: tuple[str, ...]) -> None:
    assert meant([name]) == {name: settings}


# ── two letters ──────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "name, setting",
    ("in a long word", "WORKER_CNCURENCY", "WORKER_CONCURRENCY"),
    ("in two words", "DATBASE_NMAE", "DATABASE_NAME"),
    ("in short words", "TXT_MDEL", "TEXT_MODEL"),
    ("no underscores", "OPENAIAPIKEY", "OPENAI_API_KEY"),
    ("an underscore too many", "OPEN_AI_API_KEY", "OPENAI_API_KEY"),
    ("an underscore in another place", "SHUTDOW_NGRACE", "SHUTDOWN_GRACE"),
    ("a hyphen", "TEXT-MODEL", "TEXT_MODEL"),
    ("in lower case", "worker_concurency", "WORKER_CONCURRENCY"),
    ("of the contract", "CELERY_TIME_LIMITT", "CELERY_TIME_LIMIT"),
    ("a singular that nobody else has", "HANDLER_MODULE", "HANDLER_MODULES"),
)
def test_other_slips_are_recognised(name: str, setting: str) -> None:
    assert meant([name]) == {name: (setting,)}


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name.count("_")])
def test_a_letter_too_many_in_two_words_is_recognised(setting: str) -> None:
    first, *_, last = setting.split("_")
    name = f"{first}{first[0]}{setting[len(first) : -len(last)]}{last[0]}{last}"
    assert setting in meant([name])[name]


def test_three_letters_are_too_many() -> None:
    assert meant(["WRKER_CNCURENCY", "DATBSE_NMAE", "DEBUGGER"]) == {}


@table(
    "name, other, letters",
    ("the same", "MODEL", "MODEL", 0),
    ("swapped", "MODLE", "MODEL", 1),
    ("left out", "MOEL", "MODEL", 1),
    ("put in", "MODDEL", "MODEL", 1),
    ("replaced", "MOBEL", "MODEL", 1),
    ("two", "OMDLE", "MODEL", 2),
    ("nothing", "", "MODEL", 5),
)
def test_the_distance_counts_letters(name: str, other: str, letters: int) -> None:
    assert distance(name, other) == distance(other, name) == letters


# ── names of other programs ──────────────────────────────────────────────────────────────────────────────────────

OTHERS = {
    "the API, by the contract": """
        API_PORT API_HOST CLERK_SECRET_KEY CLERK_PUBLISHABLE_KEY CLERK_JWKS_URL DOCKER_REGISTRY DOCKER_HOST
        DOCKER_BUILDKIT PROCESSING_TIMEOUT_SECONDS PENDING_TIMEOUT_SECONDS
    """,
    "near a setting": """
        REDIS_URI MONGODB_URI MONGO_URL MONGO_URI MONGO_DB_URL MONGODB_URLS REDIS_URLS TEXT_MODE IMAGE_MODE
        AUDIO_MODE AUDIO_MODES IMAGE_SIZE RETRY_DELAY S3_REGIONS S3_BUCKET_NAMES DATABASE_NAMES OPENAI_API_KEYS
        OPENAI_BASE_URLS SLEEP_INTERVAL NDEBUG DEBUGS TEST_MODEL TEST_API_KEY TEST_BASE_URL NEXT_API_KEY
        AUDIT_FORMAT SSL_CERTFILE SSL_CERTS_DIR SSH_CERT_FILE VIDEO_MODEL VIDEO_MODELS VIDEO_API_KEY
        VIDEO_BASE_URL VIDEO_FORMAT STAGE_API_KEY STAGE_BASE_URL RADIO_FORMAT REDIS_SSL REDIS_TTL REDIS_TLS
        REDIS_DB WORKER_PORT WORKER_TOOL WORKER_POLL RETRY_AFTER_MIN RETRY_AFTER_MS TASK_MODEL TEXT_NODES
        JOB_TIMELINE DATABASE_NODE
    """,
    "with other digits": """
        OPENAI_API_KEY_2 OPENAI_API_KEY1 TEXT_MODEL_2 S3_BUCKET_NAME_1 WORKER_1 S_REGION EC2_REGION S4_REGION
        REDIS_URL_0 MONGODB_URL2
    """,
    "services of Kubernetes and Docker": """
        REDIS_PORT REDIS_PORT_6379_TCP REDIS_PORT_6379_TCP_ADDR REDIS_PORT_6379_TCP_PORT
        REDIS_PORT_6379_TCP_PROTO REDIS_SERVICE_HOST REDIS_SERVICE_PORT REDIS_NAME MONGODB_PORT
        MONGODB_PORT_27017_TCP MONGODB_PORT_27017_TCP_ADDR MONGODB_SERVICE_HOST MONGODB_SERVICE_PORT
        MONGODB_NAME WORKER_SERVICE_HOST ARTIFACTS_PORT ARTIFACTS_SERVICE_HOST KUBERNETES_SERVICE_HOST
        KUBERNETES_PORT_443_TCP HOSTNAME
    """,
    "MongoDB and Redis": """
        MONGODB_HOST MONGODB_USER MONGODB_USERNAME MONGODB_PASSWORD MONGODB_DATABASE MONGODB_DB MONGODB_NAME
        MONGO_INITDB_ROOT_USERNAME MONGO_INITDB_DATABASE MONGO_ROOT_PASSWORD REDIS_HOST REDIS_PASSWORD
        REDIS_USERNAME REDIS_ARGS REDIS_DATABASE REDIS_CACHE_URL REDISCLI_AUTH REDIS_KEY_PREFIX DATABASE_URL
        DATABASE_URI DATABASE_HOST DATABASE_PORT DATABASE_USER DB_NAME DB_URL
    """,
    "Celery and Flower": """
        CELERY_APP CELERY_LOADER CELERY_CONFIG_MODULE CELERY_BROKER_READ_URL CELERY_BROKER_WRITE_URL
        CELERY_TASK_ALWAYS_EAGER CELERY_TASK_TIME_LIMIT CELERY_TASK_SOFT_TIME_LIMIT CELERYD_NODES CELERYD_OPTS
        CELERYD_CONCURRENCY CELERY_WORKER_CONCURRENCY CELERY_QUEUES CELERY_LOG_FILE CELERY_LOG_LEVEL
        CELERY_TIMEZONE CELERY_ACCEPT_CONTENT CELERY_TRACE_APP C_FORCE_ROOT FLOWER_PORT FLOWER_BASIC_AUTH
        FLOWER_BROKER_API BROKER_URL
    """,
    "providers": """
        OPENAI_API_BASE OPENAI_API_TYPE OPENAI_API_VERSION OPENAI_API_BASE_URL OPENAI_API_HOST
        OPENAI_ORGANIZATION OPENAI_ORG_ID OPENAI_PROJECT_ID OPENAI_MODEL OPENAI_PROXY OPENAI_LOG
        OPENAI_WEBHOOK_SECRET OPENAI_KEY AZURE_OPENAI_API_KEY AZURE_OPENAI_ENDPOINT ANTHROPIC_API_KEY
        ANTHROPIC_BASE_URL GEMINI_API_KEY GROQ_API_KEY MISTRAL_API_KEY XAI_API_KEY OPENROUTER_API_KEY
        OLLAMA_HOST OLLAMA_BASE_URL OLLAMA_MODELS LITELLM_MASTER_KEY LITELLM_LOG LANGCHAIN_API_KEY
        LANGSMITH_API_KEY HF_TOKEN HF_HOME EMBEDDING_MODEL CHAT_MODEL MAX_TOKENS IMAGE_NAME IMAGE_TAG
        IMAGE_VERSION IMAGE_MODEL_ID TEXT_COLOR AUDIO_DRIVER AUDIODEV VLLM_API_KEY
    """,
    "S3 and MinIO": """
        AWS_REGION AWS_DEFAULT_REGION AWS_SESSION_TOKEN AWS_PROFILE AWS_ENDPOINT_URL AWS_ENDPOINT_URL_S3
        AWS_ACCESS_KEY AWS_SECRET_KEY AWS_CA_BUNDLE AWS_CONFIG_FILE AWS_MAX_ATTEMPTS AWS_RETRY_MODE
        AWS_BUCKET_NAME AWS_S3_REGION_NAME AWS_STORAGE_BUCKET_NAME S3_BUCKET S3_ENDPOINT S3_ACCESS_KEY
        S3_SECRET_KEY S3_ACCESS_KEY_ID S3_SECRET_ACCESS_KEY S3_USE_SSL S3_REGION_NAME S3_PUBLIC_URL
        MINIO_ROOT_USER MINIO_ENDPOINT MINIO_BUCKET_NAME
    """,
    "Python and the system": """
        PYTHONPATH PYTHONUNBUFFERED PYTHONDEVMODE PYTHONDONTWRITEBYTECODE VIRTUAL_ENV PIP_CERT PATH HOME LANG
        LC_ALL TERM SHELL USER PWD TMPDIR TZ EDITOR HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY REQUESTS_CA_BUNDLE
        CURL_CA_BUNDLE NODE_EXTRA_CA_CERTS SSL_CERT_PATH SSL_KEY_FILE SSLKEYLOGFILE PORT HOST LOG_LEVEL LOG_FILE
        LOGLEVEL DEBUG_MODE DEBUG_LEVEL DEBUGINFOD_URLS DEBIAN_FRONTEND WORKERS WORKER_CLASS WORKER_TIMEOUT
        WORKER_CONNECTIONS WEB_CONCURRENCY MAX_WORKERS WORKER_PROCESSES JOB_NAME JOB_ID JOB_URL BUILD_URL
        TEXTDOMAIN TEXTDOMAINDIR
    """,
    "services of CI": """
        CI GITHUB_ACTIONS GITHUB_TOKEN GITHUB_JOB GITHUB_REF_NAME GITLAB_CI CI_JOB_ID CI_JOB_NAME CI_JOB_URL
        CI_REGISTRY_IMAGE RUNNER_TEMP RUNNER_DEBUG ACTIONS_STEP_DEBUG BUILDKITE_JOB_ID CIRCLE_JOB JENKINS_URL
        TRAVIS_JOB_ID
    """,
    "sites": """
        SECRET_KEY DJANGO_SETTINGS_MODULE ALLOWED_HOSTS FLASK_DEBUG FLASK_APP SENTRY_DSN SMTP_HOST EMAIL_HOST
        NEXT_PUBLIC_API_URL VITE_API_URL NODE_ENV JWT_SECRET SESSION_SECRET STRIPE_API_KEY ARTIFACTORY_URL
        MLFLOW_ARTIFACT_ROOT MLFLOW_S3_ENDPOINT_URL PICTURES_DIR
    """,
}


@pytest.mark.parametrize("family", OTHERS)
def test_names_of_other_programs_are_ignored_in_silence(family: str) -> None:
    names = OTHERS[family].split()
    assert meant([*names, *map(str.lower, names)]) == {}


@pytest.mark.parametrize("file", ["compose.yaml", ".ci/run", "Dockerfile"])
def test_variables_of_our_own_files_are_none_of_them(file: str) -> None:
    names = re.findall(r"\b[A-Z][A-Z0-9_]+\b", (SOURCE / file).read_text())
    assert len(names) > 5
    assert meant(names) == {}


def test_the_settings_themselves_are_none_of_them_in_any_case() -> None:
    assert meant([*SETTINGS, *map(str.lower, SETTINGS), *map(str.title, SETTINGS)]) == {}


def test_a_name_that_could_steer_a_terminal_is_left_out() -> None:
    assert meant(["TEXT\x1bMODEL", "TEXT\nMODEL", "TEXT_MOD\u0415L", "\udcffTEXT_MODEL"]) == {}


# ── where they are found, and shown ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An empty environment, in an empty folder."""
    for name in os.environ:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def test_both_sources_count_and_the_place_is_named(variables: pytest.MonkeyPatch) -> None:
    Path(".env").write_text(
        "\ufeffTEXT_MODLE=a\nexport IMAGE_MODLE='b'\nAUDIO_MODLE\nTEXT_MODEL=c\n# SWEP_INTERVAL=1\n"
    )
    variables.setenv("WORKER_CONCURENCY", "4")
    assert misspelt_variables() == [
        Misspelt("TEXT_MODLE", ".env", ("TEXT_MODEL",)),
        Misspelt("IMAGE_MODLE", ".env", ("IMAGE_MODEL",)),
        Misspelt("AUDIO_MODLE", ".env", ("AUDIO_MODEL",)),
        Misspelt("WORKER_CONCURENCY", "environment", ("WORKER_CONCURRENCY",)),
    ]


def test_a_value_is_never_shown(variables: pytest.MonkeyPatch) -> None:
    Path(".env").write_text(f"OPENAI_API_KYE={SECRET}\n")
    variables.setenv("TEXT_API_KYE", SECRET)
    assert remarks(load_settings()) == [
        "OPENAI_API_KYE (.env) isn't a setting: is OPENAI_API_KEY meant?",
        "TEXT_API_KYE (environment) isn't a setting: is TEXT_API_KEY meant?",
    ]


def test_a_start_by_celerys_own_command_logs_them(
    variables: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    variables.setenv("TEXT_MODLE", SECRET)
    announce_settings()
    assert caplog.messages == ["TEXT_MODLE (environment) isn't a setting: is TEXT_MODEL meant?"]


def test_the_example_of_a_dotenv_file_has_none(variables: pytest.MonkeyPatch) -> None:
    Path(".env").write_text((SOURCE / ".env.example").read_text())
    assert misspelt_variables() == []


def test_a_line_that_is_no_assignment_is_complained_of_once(
    variables: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Path(".env").write_text("what is this?\nTEXT_MODLE=a\n")
    assert len(remarks(load_settings())) == 1
    assert len(caplog.records) == 1


def test_a_pipe_in_place_of_the_file_is_not_read_a_second_time(variables: pytest.MonkeyPatch) -> None:
    os.mkfifo(".env")
    assert misspelt_variables() == []


@pytest.mark.servers
def test_the_worker_names_them_when_it_starts(start_worker: StartWorker) -> None:
    log = start_worker(WORKER_CONCURENCY=SECRET, REDIS_URI=SECRET).text()
    assert "  WARNING: WORKER_CONCURENCY (environment) isn't a setting: is WORKER_CONCURRENCY meant?\n" in log
    assert "REDIS_URI" not in log
    assert SECRET not in log
