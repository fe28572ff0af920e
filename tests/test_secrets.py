"""Connections with passwords and certificates: they work, and no secret shows anywhere, whatever goes wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from bson import ObjectId

from testbed.api import Api, WorkerProcess
from testbed.network import Certificate, TlsProxy, make_certificate
from testbed.processes import LOOPBACK, SOURCE, free_port, poll
from testbed.provider import Provider
from testbed.servers import DATABASE, DATABASE_PASSWORD, MongoServer, RedisServer
from tests.lab import IMAGE, TEXT
from tests.site import (
    CELERY_COMMAND,
    JOBS,
    Site,
    StartWorker,
    events_of,
    of_each_type,
    open_api,
    run_forked,
    run_impatiently,
    run_worker,
    running,
)

pytestmark = pytest.mark.servers

# ── TLS ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Encrypted:
    """Servers that speak TLS alone, and the settings that lead to them by a given authority."""

    mongo: MongoServer
    redis: RedisServer
    proxy: TlsProxy
    provider: Provider

    def settings(self, certificate: Certificate) -> dict[str, str]:
        return {
            "MONGODB_URL": f"mongodb://{LOOPBACK}:{self.mongo.port}/x?tls=true&tlsCAFile={certificate.authority}",
            "REDIS_URL": f"rediss://{LOOPBACK}:{self.proxy.port}/0?ssl_ca_certs={certificate.authority}",
            "OPENAI_BASE_URL": self.provider.url,
            "SSL_CERT_FILE": str(certificate.authority),
        }


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def encrypted(certificate: Certificate) -> Iterator[Encrypted]:
    with ExitStack() as stack:
        mongo = stack.enter_context(running(MongoServer(certificate=certificate)))
        redis = stack.enter_context(running(RedisServer()))
        proxy = stack.enter_context(TlsProxy(redis.port, certificate))
        yield Encrypted(mongo, redis, proxy, stack.enter_context(Provider(certificate=certificate)))


def test_jobs_complete_over_tls_to_mongodb_redis_and_provider(
    encrypted: Encrypted,
    certificate: Certificate,
    environment: dict[str, str],
    start_worker: StartWorker,
    tmp_path: Path,
) -> None:
    environment = {**environment, **encrypted.settings(certificate)}
    start_worker(**environment)
    with open_api({**environment, "REDIS_URL": encrypted.redis.url}) as api:
        for job_type, input_data in JOBS.items():
            job = api.insert(job_type, input_data)
            task = api.enqueue(job)
            assert task.get(timeout=30) == {"job_id": str(job), "status": "completed"}
            assert api.wait_notice(job, "completed")
    ended = run_worker(environment, tmp_path, "check")
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("options", ["", "?ssl_ca_certs={foreign}"], ids=["no authority", "another authority"])
def test_a_redis_whose_certificate_isnt_trusted_gets_no_data(
    encrypted: Encrypted, environment: dict[str, str], start_worker: StartWorker, tmp_path: Path, options: str
) -> None:
    foreign = make_certificate(tmp_path)
    url = f"rediss://{LOOPBACK}:{encrypted.proxy.port}/0" + options.format(foreign=foreign.authority)
    before = encrypted.proxy.handshakes
    worker = start_worker(ready=False, **{**environment, **encrypted.settings(foreign), "REDIS_URL": url})
    poll(lambda: "certificate verify failed" in worker.text(), 30)
    assert encrypted.proxy.handshakes == before
    assert " ready." not in worker.text()


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────────────────────

KEY, REDIS_PASSWORD, S3_SECRET, WORDS = "sk-planted-key", "planted-redis-password", "planted-s3-secret", "planted-words"
WRONG_PASSWORD = "planted-wrong-password"
PATH_TOKEN, QUERY_TOKEN = "planted-path-token", "planted-query-token"
PLANTED = (PATH_TOKEN, QUERY_TOKEN, KEY, REDIS_PASSWORD, S3_SECRET, WORDS, DATABASE_PASSWORD, WRONG_PASSWORD)


def with_tokens(url: str) -> str:
    """The URL of the provider with a token in its path and one in its query, as gateways have them."""
    return f"{url.removesuffix('/v1')}/accounts/{PATH_TOKEN}/v1?key={QUERY_TOKEN}"


@pytest.fixture(scope="module")
def guarded(running_provider: Provider) -> Iterator[dict[str, str]]:
    """The settings of servers that ask for passwords, with every other secret planted too."""
    with ExitStack() as stack:
        mongo = stack.enter_context(running(MongoServer(auth=True)))
        redis = stack.enter_context(running(RedisServer(password=REDIS_PASSWORD)))
        servers = {"MONGODB_URL": mongo.url, "DATABASE_NAME": DATABASE, "REDIS_URL": redis.url}
        keys = {"OPENAI_API_KEY": KEY, "AWS_SECRET_ACCESS_KEY": S3_SECRET, "AWS_ACCESS_KEY_ID": "planted-s3-secret-id"}
        short = {"LEASE_SECONDS": "3", "SWEEP_INTERVAL": "0.5", "RETRY_DELAYS": "0.2"}
        yield {
            **servers,
            **keys,
            **short,
            "OPENAI_BASE_URL": with_tokens(running_provider.url),
            "AUDIO_FORMAT": "wav",
            "DEBUG": "true",
        }


@pytest.fixture(scope="module")
def guarded_site(
    guarded: dict[str, str], running_provider: Provider, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A worker that reaches these servers as the contract's user, who may only read and write its own database."""
    folder = tmp_path_factory.mktemp("guarded")
    environment = {**guarded, "CELERY_QUEUE_NAME": f"queue_{ObjectId()}", "TMPDIR": str(folder)}
    with open_api(environment) as api:
        worker = WorkerProcess(environment, folder / "worker.log")
        try:
            yield Site(api, worker.wait_ready(60), running_provider, environment)
        finally:
            worker.kill()


@of_each_type
def test_a_worker_works_with_the_contracts_user_alone(guarded_site: Site, job_type: str) -> None:
    api = guarded_site.api
    assert api.wait(api.submit(job_type, JOBS[job_type]))["status"] == "completed"


def test_the_contracts_rights_suffice_for_every_part_of_the_worker(guarded_site: Site, tmp_path: Path) -> None:
    api = guarded_site.api
    job = api.wait(api.submit(IMAGE, JOBS[IMAGE]))
    assert api.database["artifacts.files"].count_documents({"_id": job["artifact_url"].rsplit("/", 1)[1]}) == 1
    poll(lambda: "worker_status_id" in api.jobs.index_information(), 20)
    commands = ("check", "status", "recover")
    assert [run_forked(guarded_site.environment, tmp_path, name).returncode for name in commands] == [0] * 3
    assert "could not be made" not in guarded_site.worker.text()


def screens(environment: dict[str, str], folder: Path, *commands: str) -> str:
    """What commands of the worker print."""
    ended = run_impatiently({**environment, "AWS_MAX_ATTEMPTS": "1"}, folder, *commands)
    return ended.stdout + ended.stderr


def shown_by(api: Api, worker: WorkerProcess) -> dict[str, str]:
    """What documents (their input apart), notifications, task results and Celery's remote control show."""
    named = [worker.name] if " ready." in worker.text() else []
    inspect = api.celery.control.inspect(named, timeout=15)  # the reply of the named worker ends the wait
    questions = ("active", "reserved", "scheduled", "registered", "stats", "active_queues", "conf", "report")
    results = [str(api.redis.get(key)) for key in api.redis.keys("celery-task-meta-*")]
    return {
        "documents": str(list(api.jobs.find({}, {"input_data": 0}))),
        "notifications": str(api.received),
        "results": str(results),
        **{f"inspect {question}": str(getattr(inspect, question)()) for question in questions if named},
    }


def leaks(shown: dict[str, str]) -> list[tuple[str, str]]:
    """Each place that shows a secret, and the secret."""
    return [(place, secret) for place, text in shown.items() for secret in PLANTED if secret in text]


LOUD = {"worker.py": None, "celery": [*CELERY_COMMAND, "--loglevel=DEBUG", "--concurrency=1"]}
ANSWERS = (
    *("", "[status 401]", "[status 400]", "[status 500 times=1]", "[html]", "[shape]", "[shape types]"),
    *("[cut times=1]", "[empty]"),
)
DAMAGED = ([WORDS, {}], [str(ObjectId()), WORDS], [str(ObjectId())])


@pytest.mark.parametrize("command", LOUD.values(), ids=LOUD)
def test_no_secret_shows_anywhere_while_all_goes_well_and_while_jobs_fail(
    guarded: dict[str, str],
    start_worker: StartWorker,
    environment: dict[str, str],
    tmp_path: Path,
    command: list[str] | None,
) -> None:
    environment = {**environment, **guarded, "PYTHONPATH": str(SOURCE)}
    worker = start_worker(command=command, **environment)
    with open_api(environment) as api, events_of(api) as events:
        jobs = [api.submit(kind, {"prompt": f"{WORDS} {said}", "text": WORDS}) for kind in JOBS for said in ANSWERS]
        jobs += [api.submit(TEXT, wrong) for wrong in ({WORDS: 1}, WORDS, [WORDS], {"prompt": WORDS, "model": WORDS})]
        jobs += [api.submit(TEXT, None)]
        for body in DAMAGED:
            api.send(*body, kwargs={WORDS: WORDS})
        for job in jobs:
            api.wait_notice(job, api.wait(job, timeout_s=40)["status"])
        api.text(f"{WORDS} [hang]")
        api.text(f"{WORDS} that waits")
        poll(lambda: api.jobs.count_documents({"status": "processing"}), 20)
        seen = screens(environment, tmp_path, "check", "status", "health", "recover")
        shown = {**shown_by(api, worker), "screens": seen, "log": worker.text(), "events": str(events)}
        assert all(words in seen for words in ("provider, text", "the oldest for", "alive", "recover"))
        assert "process_job" in shown["inspect active"]
        assert leaks(shown) == []


def with_password(url: str, right: str) -> str:
    return url.replace(f":{right}@", f":{WRONG_PASSWORD}@")


FAULTS: dict[str, Callable[[dict[str, str]], dict[str, str]]] = {
    "wrong MongoDB password": lambda s: {"MONGODB_URL": with_password(s["MONGODB_URL"], DATABASE_PASSWORD)},
    "wrong Redis password": lambda s: {"REDIS_URL": with_password(s["REDIS_URL"], REDIS_PASSWORD)},
    "no MongoDB": lambda s: {"MONGODB_URL": f"mongodb://user:{WRONG_PASSWORD}@{LOOPBACK}:{free_port()}/x"},
    "no Redis": lambda s: {"REDIS_URL": f"redis://:{WRONG_PASSWORD}@{LOOPBACK}:{free_port()}/0"},
    "no S3": lambda s: {"ARTIFACT_URL": "s3://bucket", "S3_ENDPOINT_URL": f"http://{LOOPBACK}:{free_port()}"},
    "no provider": lambda s: {
        "OPENAI_BASE_URL": f"http://user:{WRONG_PASSWORD}@{LOOPBACK}:{free_port()}/{PATH_TOKEN}/v1?key={QUERY_TOKEN}"
    },
    "a password of Redis in its query": lambda s: {
        "REDIS_URL": f"redis://{s['REDIS_URL'].rpartition('@')[2]}?password={WRONG_PASSWORD}"
    },
    "no socket of Redis": lambda s: {"REDIS_URL": f"unix://:{WRONG_PASSWORD}@/no/such.sock?db=1"},
    "a public address with tokens": lambda s: {
        "ARTIFACT_BASE_URL": f"http://{LOOPBACK}:{free_port()}/{PATH_TOKEN}",
        "REDIS_URL": with_password(s["REDIS_URL"], REDIS_PASSWORD),
    },
}


UNTRUSTED = "a certificate that isn't trusted"


IMPATIENT_WORKER = """
import worker

worker.Keeper.PATIENCE_S = worker.Runtime.mongodb_timeout_s = 1.0
"""


def show_fault(api: Api, settings: dict[str, str], folder: Path) -> dict[str, str]:
    """All that is to be seen of a worker whose settings have a fault, with a job that waits for it."""
    folder.mkdir()
    (folder / "impatient.py").write_text(IMPATIENT_WORKER)
    own = {"TMPDIR": str(folder), "PYTHONPATH": str(folder), "HANDLER_MODULES": "impatient"}
    worker = WorkerProcess({**settings, **own}, folder / "worker.log")
    try:
        api.submit(IMAGE, {"prompt": WORDS})
        poll(lambda: re.search(r",\d{3} (WARNING|ERROR|CRITICAL) ", worker.text()), 60, description="a warning")
        seen = screens(settings, folder, "check", "status")
        return {**shown_by(api, worker), "screens": seen, "log": worker.text()}
    finally:
        worker.kill()


@pytest.fixture(scope="module")
def shown_by_fault(
    guarded: dict[str, str], encrypted: Encrypted, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, dict[str, str]]]:
    """What is to be seen of each fault. They are shown side by side, since most of the time they wait for an answer."""
    folder = tmp_path_factory.mktemp("faults")
    names = [*FAULTS, UNTRUSTED]
    right = {name: {**guarded, "CELERY_QUEUE_NAME": f"queue_{ObjectId()}"} for name in names}
    wrong = {name: fault(right[name]) for name, fault in FAULTS.items()}
    wrong[UNTRUSTED] = encrypted.settings(make_certificate(folder))
    # All share one database, which each API empties at its end. So none may end before the others.
    with ExitStack() as stack, ThreadPoolExecutor(len(names)) as pool:
        apis = [stack.enter_context(open_api(right[name])) for name in names]
        settings = [{**right[name], **wrong[name]} for name in names]
        folders = [folder / name for name in names]
        yield dict(zip(names, pool.map(show_fault, apis, settings, folders), strict=True))


@pytest.mark.parametrize("fault", [*FAULTS, UNTRUSTED])
def test_no_secret_shows_anywhere_while_something_is_wrong(
    shown_by_fault: dict[str, dict[str, str]], fault: str
) -> None:
    assert "FAULT" in shown_by_fault[fault]["screens"]
    assert leaks(shown_by_fault[fault]) == []


def test_check_says_that_a_certificate_isnt_trusted(shown_by_fault: dict[str, dict[str, str]]) -> None:
    rows = re.split(r"\n│ (?=FAULT|ok|note)", shown_by_fault[UNTRUSTED]["screens"])
    untrusted = [row for row in rows if row.startswith("FAULT") and "the certificate isn't trusted" in row]
    names = ("MongoDB ", "Redis ", "broker ", "provider, text")
    assert [name for name in names if not any(f"│ {name}" in row for row in untrusted)] == []
