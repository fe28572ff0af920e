"""Handlers, providers, messages and fields that mean harm, met by real worker processes.

What a job costs is bounded in time and memory whatever the other side does; the worker goes on with the next one;
and neither secrets nor forged lines get out.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId, Timestamp

from conftest import StartWorker, open_api, start, worker_settings
from test_processes import JOBS, TOOK_TOO_LONG, Site, events_of, run_worker
from testbed.answers import RAW_ANSWERS
from testbed.api import SOURCE, TASK_NAME, Api, WorkerProcess
from testbed.network import Certificate, TlsProxy, make_certificate
from testbed.processes import LOOPBACK, free_port, poll
from testbed.provider import Provider
from testbed.servers import DATABASE, DATABASE_PASSWORD, MongoServer, RedisServer

TEXT, IMAGE, AUDIO = JOBS
OWN_HANDLERS = '''
import asyncio, ctypes
from worker import JobInput, Result, handles

class Nothing(JobInput):
    pipe: str = ""
    attempts: list[int] = []

@handles("ignores_cancellation", Nothing)
async def ignores_cancellation(call):
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            continue

@handles("swallows_everything", Nothing)
async def swallows_everything(call):
    while True:
        try:
            await asyncio.sleep(0.1)
        except BaseException:
            pass

@handles("cleans_up_for_ever", Nothing)
async def cleans_up_for_ever(call):
    async def pieces():
        try:
            while True:
                yield "piece"
                await asyncio.sleep(0.1)
        finally:
            await asyncio.sleep(3600)

    async for piece in pieces():
        call.progress(piece)

@handles("holds_the_gil", Nothing)
async def holds_the_gil(call):
    """As a regular expression that takes for ever: no thread of the process runs until a writer opens the pipe."""
    if call.job.attempt in call.input.attempts:
        ctypes.PyDLL(None).open(call.input.pipe.encode(), 0)
    return Result({"words": "done"})
'''
BAD_HANDLERS = ("ignores_cancellation", "swallows_everything", "cleans_up_for_ever")
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ \S+ .*")
GAVE_UP = "This could not be finished after several tries. Please try again."


@pytest.fixture
def pipes(tmp_path: Path) -> list[str]:
    """Two named pipes: whoever opens one to read waits for somebody who opens it to write."""
    paths = [str(tmp_path / f"pipe-{number}") for number in range(2)]
    for path in paths:
        os.mkfifo(path)
    return paths


@pytest.fixture
def own_handlers(tmp_path: Path) -> dict[str, str]:
    """The settings that bring the handlers above."""
    (tmp_path / "own_handlers.py").write_text(OWN_HANDLERS)
    return {"PYTHONPATH": str(tmp_path), "HANDLER_MODULES": "own_handlers"}


# ── limits ───────────────────────────────────────────────────────────────────────────────────────────────────────

LIMITED = {"prefork": BAD_HANDLERS, "threads": BAD_HANDLERS, "solo": BAD_HANDLERS[:1]}


@pytest.mark.slow
@pytest.mark.parametrize(("pool", "job_types"), LIMITED.items())
def test_a_handler_that_cant_be_cancelled_fails_at_the_workers_own_limit(
    api: Api, start_worker: StartWorker, own_handlers: dict[str, str], pool: str, job_types: tuple[str, ...]
) -> None:
    limits = {"CELERY_SOFT_TIME_LIMIT": "0.5", "CELERY_TIME_LIMIT": "30"}
    start_worker(WORKER_POOL=pool, WORKER_CONCURRENCY="3", **limits, **own_handlers)
    jobs = [api.submit(job_type, {}) for job_type in job_types]
    ended = [api.wait(job, timeout_s=15) for job in jobs]
    assert [(job["status"], job["error_message"]) for job in ended] == [("failed", TOOK_TOO_LONG)] * len(jobs)
    assert all(job["completed_at"] - job["started_at"] < timedelta(seconds=10) for job in ended)
    assert api.wait(api.text("the next job"))["status"] == "completed"


@pytest.mark.slow
def test_a_child_that_hangs_in_native_code_is_killed_at_the_workers_own_hard_limit(
    api: Api, start_worker: StartWorker, own_handlers: dict[str, str], pipes: list[str]
) -> None:
    start_worker(CELERY_SOFT_TIME_LIMIT="1", CELERY_TIME_LIMIT="2", **own_handlers)
    job = api.submit("holds_the_gil", {"pipe": pipes[0], "attempts": [1]})
    assert api.wait(job, timeout_s=15)["error_message"] == TOOK_TOO_LONG
    assert api.wait(api.text("the next job"))["status"] == "completed"
    assert api.notices(job) == ["processing", "failed"]


@pytest.mark.slow
def test_the_job_of_a_process_that_hangs_in_native_code_goes_to_another_worker_and_stays_there(
    api: Api, start_worker: StartWorker, own_handlers: dict[str, str], pipes: list[str]
) -> None:
    short = {**own_handlers, "LEASE_SECONDS": "2", "SWEEP_INTERVAL": "0.5"}
    hung = [start_worker(WORKER_POOL=pool, **short) for pool in ("threads", "solo")]
    jobs = [api.submit("holds_the_gil", {"pipe": pipe, "attempts": [1]}) for pipe in pipes]
    poll(lambda: [api.status(job) for job in jobs] == ["processing"] * 2, 10)
    other = start_worker(**short)
    done = [api.wait(job, timeout_s=40) for job in jobs]
    assert [(job["status"], job["worker"]["attempt"]) for job in done] == [("completed", 2)] * 2
    other.stop()
    for pipe in pipes:
        os.close(os.open(pipe, os.O_WRONLY))
    poll(lambda: all(" left after " in worker.text() for worker in hung), 20, description="both have awoken")
    after = [api.document(job) for job in jobs]
    kept = ("status", "output_data", "completed_at", "updated_at")
    assert [[job[key] for key in kept] for job in after] == [[job[key] for key in kept] for job in done]
    assert all(api.wait(job)["status"] == "completed" for job in [api.text(f"next job {i}") for i in range(4)])
    assert [api.notices(job).count("failed") for job in jobs] == [0, 0]


@pytest.mark.slow
def test_a_job_that_hangs_every_process_fails_at_its_bounds(
    api: Api, start_worker: StartWorker, own_handlers: dict[str, str], pipes: list[str]
) -> None:
    short = {**own_handlers, "LEASE_SECONDS": "2", "SWEEP_INTERVAL": "0.5"}
    start_worker(WORKER_POOL="threads", **short)
    released = {"owner": None, "attempt": 3, "available_at": datetime.now(UTC), "first_started_at": datetime.now(UTC)}
    job = api.insert("holds_the_gil", {"pipe": pipes[0], "attempts": [4]}, status="processing", worker=released)
    api.enqueue(job)
    poll(lambda: api.document(job)["worker"]["owner"], 10)
    start_worker(**short)
    assert api.wait(job, timeout_s=20)["error_message"] == GAVE_UP
    assert api.wait(api.text("the next job"))["status"] == "completed"


# ── poison ───────────────────────────────────────────────────────────────────────────────────────────────────────

MOST_GROWTH_MB = 200  # with answers of 32 MiB
MOST_S = 20
TOO_LARGE = "The provider's answer is too large."
UNUSABLE = "The provider's answer could not be used."
REFUSED = "The provider refused this request. Change the input and try again."
UNREACHABLE = "The provider can't be reached; given up after 2 tries. Please try again later."
NOT_FETCHED = "The picture can't be fetched; given up after 2 tries. Please try again later."
BROKE_OFF = "The provider broke off; given up after 2 tries. Please try again later."
PICTURE_TOO_LARGE = "The provider's picture is too large."
COMPLETED = None
TO_THE_LIMIT = ("raw interim-endless", "drip", "status 199")  # each goes on until the soft limit

ENDLESS = ("interim-endless", "chunk-size-endless")  # not even a byte of the answer itself
POISON: list[tuple[str, str, str | None]] = [
    *[(kind, "[big 500]", TOO_LARGE) for kind in JOBS],
    *[(kind, "[endless]", TOO_LARGE) for kind in (IMAGE, AUDIO)],
    *[(IMAGE, f"[url] {said}", TOO_LARGE) for said in ("[big 500]", "[endless]")],
    (TEXT, "[endless] to the limit", TOOK_TOO_LONG),
    (TEXT, "[line 40]", TOO_LARGE),
    (TEXT, "[line 30]", TOO_LARGE),
    (TEXT, "[tiny 10000]", COMPLETED),
    *[(kind, "[gzip 300]", UNUSABLE) for kind in JOBS],
    (IMAGE, "[url] [gzip 300]", UNUSABLE),
    (IMAGE, "[bomb 30000x30000]", UNUSABLE),
    (IMAGE, "[url] [bomb 30000x30000]", UNUSABLE),
    (IMAGE, "[bomb 7000x7000]", PICTURE_TOO_LARGE),
    *[(TEXT, f"[shape {said}]", UNUSABLE) for said in ("deep", "types", "utf8", "error", "text", "list", "null")],
    *[(IMAGE, f"[shape {said}]", UNUSABLE) for said in ("deep", "types", "utf8", "error", "nan")],
    *[(TEXT, f"[shape {said}]", COMPLETED) for said in ("nan", "edges")],
    (AUDIO, "[shape deep]", UNUSABLE),
    *[(kind, "[type text/html]", COMPLETED) for kind in JOBS],
    *[(kind, "[html]", UNUSABLE) for kind in JOBS],
    *[(kind, "[status 204]", UNUSABLE) for kind in JOBS],
    *[(kind, "[status 304]", REFUSED) for kind in JOBS],
    (TEXT, "[status 199] to the limit", TOOK_TOO_LONG),
    *[(TEXT, f"[raw {said}]", UNREACHABLE) for said in RAW_ANSWERS if said not in {*ENDLESS, "switching"}],
    *[(TEXT, f"[raw {said}] to the limit", TOOK_TOO_LONG) for said in ENDLESS],
    (TEXT, "[raw switching]", REFUSED),
    *[(IMAGE, f"[url] [raw {said}]", NOT_FETCHED) for said in ("header-10mb", "chunk-garbage", "length-short")],
    (TEXT, "[half]", BROKE_OFF),
    (TEXT, "[cut]", UNREACHABLE),
    *[(kind, "[drip] to the limit", TOOK_TOO_LONG) for kind in JOBS],
    (IMAGE, "[url] [drip] to the limit", TOOK_TOO_LONG),
]


def memory_mb(pid: int, what: str) -> int:
    """VmRSS or VmHWM (the peak) of a process."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) // 1024


@dataclass(frozen=True)
class Patient:
    """A worker that has done a job of each type, and how much memory its child took for that."""

    site: Site
    child: int
    warm_mb: int

    def growth_mb(self) -> int:
        """How far the child's memory rose above that since the last `forget_peak`."""
        return memory_mb(self.child, "VmHWM") - self.warm_mb

    def forget_peak(self) -> None:
        Path(f"/proc/{self.child}/clear_refs").write_text("5")


@pytest.fixture(scope="module")
def settings_of_one_worker(
    mongo_server: MongoServer, redis_server: RedisServer, running_provider: Provider
) -> dict[str, str]:
    settings = worker_settings(mongo_server, redis_server, running_provider, f"hostile_{ObjectId()}")
    return {**settings, "RETRY_DELAYS": "0.1", "SWEEP_INTERVAL": "0.5", "LEASE_SECONDS": "3", "DEBUG": "true"}


@pytest.fixture(scope="module")
def shared_site(
    settings_of_one_worker: dict[str, str], running_provider: Provider, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("hostile")
    environment = {**settings_of_one_worker, "TMPDIR": str(folder)}
    with open_api(environment) as api:
        worker = WorkerProcess(environment, folder / "worker.log")
        try:
            site = Site(api, worker.wait_ready(), running_provider, environment)
            for job_type, input_data in JOBS.items():
                assert api.wait(api.submit(job_type, input_data))["status"] == "completed"
            yield site
        finally:
            worker.kill()


@pytest.fixture
def site(shared_site: Site) -> Site:
    """One worker for many tests, with a log that begins with the test."""
    return replace(shared_site, log_start=len(shared_site.worker.text()))


@pytest.fixture(scope="module")
def patient(shared_site: Site) -> Patient:
    if sys.platform != "linux":
        pytest.skip("the peak of a process's memory is read from /proc")
    [child] = shared_site.worker.children()
    return Patient(shared_site, child, memory_mb(child, "VmRSS"))


@pytest.mark.parametrize(("job_type", "prompt", "sentence"), POISON, ids=[f"{p[0][:5]} {p[1]}" for p in POISON])
def test_whatever_a_provider_sends_costs_bounded_time_and_memory(
    patient: Patient, site: Site, job_type: str, prompt: str, sentence: str | None
) -> None:
    patient.forget_peak()
    limits = {"soft_time_limit": 1} if "limit" in prompt else {"soft_time_limit": MOST_S}
    job = site.api.submit(job_type, {"prompt": prompt, "text": prompt}, time_limit=60, **limits)
    ended = site.api.wait(job, timeout_s=MOST_S + 5)
    assert (ended["status"], ended["error_message"]) == ("failed" if sentence else "completed", sentence)
    assert patient.growth_mb() < MOST_GROWTH_MB
    assert site.goes_on()
    assert site.worker.children() == [patient.child]
    assert "Traceback" not in site.log()


@pytest.mark.parametrize("shape", ["nan", "edges"])
def test_what_a_provider_says_about_an_answer_has_the_contracts_types(site: Site, shape: str) -> None:
    output = site.api.wait(site.api.text(f"counted [shape {shape}]"))["output_data"]
    assert output == {"generated_text": "words", "model_used": "gpt-6-luna", "tokens_used": 1}


REDIRECTS = [*[(kind, "[redirect http://{address}/]") for kind in JOBS], (IMAGE, "[url] [redirect http://{address}/]")]


@pytest.mark.parametrize(("job_type", "said"), REDIRECTS)
def test_a_redirect_to_another_host_is_not_followed(site: Site, job_type: str, said: str) -> None:
    with socket.create_server((LOOPBACK, 0)) as other:
        other.setblocking(False)
        prompt = said.format(address=f"{LOOPBACK}:{other.getsockname()[1]}")
        job = site.api.submit(job_type, {"prompt": prompt, "text": prompt})
        assert site.api.wait(job)["error_message"] == REFUSED
        with pytest.raises(BlockingIOError):
            other.accept()


# ── a provider that is away ──────────────────────────────────────────────────────────────────────────────────────

TWENTY = [f"number {number} of twenty" for number in range(20)]


@pytest.mark.slow
def test_jobs_wait_for_a_provider_that_is_down_and_complete_once_it_is_up(api: Api, start_worker: StartWorker) -> None:
    provider = Provider()
    limits = {"CELERY_SOFT_TIME_LIMIT": "4", "CELERY_TIME_LIMIT": "30"}
    start_worker(WORKER_POOL="threads", WORKER_CONCURRENCY="20", OPENAI_BASE_URL=provider.url, **limits)
    jobs = [api.text(words) for words in TWENTY]
    down_until = time.monotonic() + 6
    poll(lambda: time.monotonic() > down_until or any(api.status(job) == "failed" for job in jobs), 15)
    with provider:
        ended = [api.wait(job, timeout_s=40)["status"] for job in jobs]
    assert ended == ["completed"] * 20


@pytest.mark.slow
def test_jobs_whose_providers_name_does_not_resolve_wait_too(api: Api, start_worker: StartWorker) -> None:
    start_worker(OPENAI_BASE_URL="http://no-such-host.invalid/v1")
    jobs = [api.text(words) for words in TWENTY]
    first = api.wait_notice(jobs[0], "processing")
    poll(lambda: len(api.notices(jobs[3])) >= 2, 30, description="the fourth job has been tried")
    assert [api.status(job) for job in jobs].count("failed") == 0
    assert first["message"] == "Your job has started."
    assert "The provider can't be reached; trying again in" in api.updates(jobs[0])[1]["message"]


@pytest.mark.slow
def test_a_provider_that_never_answers_fails_jobs_one_by_one_at_their_limit(
    api: Api, start_worker: StartWorker
) -> None:
    with socket.create_server((LOOPBACK, 0), backlog=100) as hole:
        start_worker(OPENAI_BASE_URL=f"http://{LOOPBACK}:{hole.getsockname()[1]}/v1")
        jobs = [api.text(words, soft_time_limit=1, time_limit=9) for words in TWENTY[:3]]
        failed = [api.wait(job) for job in jobs]
    assert [job["error_message"] for job in failed] == [TOOK_TOO_LONG] * 3
    ended_at = sorted(job["completed_at"] for job in failed)
    assert all(later - earlier > timedelta(seconds=0.8) for earlier, later in pairwise(ended_at))


# ── hostile fields ───────────────────────────────────────────────────────────────────────────────────────────────

CONTROL = "\0\x1b[31mred\x1b[0m\r\n2026-01-01 00:00:00,000 INFO MainProcess forged line\u2028\u2029\x85\u202e\x07"
VALUES: dict[str, object] = {
    "control characters": CONTROL,
    "5 MB": "x" * 5_000_000,
    "a blank": " ",
    "a number": 7,
    "a fraction": 1.5,
    "infinity": float("inf"),
    "true": True,
    "null": None,
    "a list": [CONTROL, {"$ne": 1}],
    "an operator": {"$ne": None},
    "a deep object": json.loads('{"a":' * 90 + "1" + "}" * 90),
    "a code": {"$where": "sleep(10000) || true"},
}
SMALL_VALUES = {name: value for name, value in VALUES.items() if name != "5 MB"}
DOCUMENT_ONLY: dict[str, object] = {
    "a date": datetime(1, 1, 1, tzinfo=UTC),
    "an id": ObjectId(),
    "bytes": b"\0\xff",
    "a timestamp": Timestamp(2**32 - 1, 1),
}
DOCUMENT_FIELDS = (
    *("user_id", "session_id", "job_type", "input_data", "created_at", "updated_at", "started_at", "completed_at"),
    *("output_data", "artifact_url", "error_message", "worker"),
)
INPUT_FIELDS = ("prompt", "messages", "system", "max_tokens", "temperature", "stop", "response_format", "model", "seed")
SURROGATES = "\ud800 lone \udfff"


def assert_log_is_clean(site: Site) -> None:
    """Every line is one of our own making: begins with a time, holds no control character, and isn't long."""
    lines = site.log().split("\n")[:-1]
    assert [line[:200] for line in lines if not LINE.fullmatch(line) or not line.isprintable()] == []
    assert [line[:200] for line in lines if len(line) > 1100 or "MainProcess forged" in line[:60]] == []


def assert_each_ended_with_a_sentence(site: Site, jobs: list[ObjectId]) -> None:
    for job in jobs:
        ended = site.api.wait(job, timeout_s=30)
        if ended["status"] == "failed":
            sentence = ended["error_message"]
            assert sentence.endswith(".")
            assert sentence.isprintable()
            assert len(sentence) < 300


@pytest.mark.parametrize("field", DOCUMENT_FIELDS)
def test_a_document_with_anything_in_a_field_reaches_an_end(site: Site, field: str) -> None:
    usual_values = VALUES if field in ("user_id", "job_type", "input_data") else SMALL_VALUES
    values = [*usual_values.values(), *DOCUMENT_ONLY.values()]
    usual = {"job_type": TEXT, "input_data": {"prompt": "hostile"}}
    jobs = [site.api.insert(**{**usual, field: value}) for value in values]  # type: ignore[arg-type]
    for job in jobs:
        site.api.send(str(job), {"job_id": str(job)})
    assert_each_ended_with_a_sentence(site, jobs)
    assert site.goes_on()
    assert_log_is_clean(site)


@pytest.mark.parametrize("field", INPUT_FIELDS)
def test_an_input_with_anything_in_a_field_reaches_an_end(site: Site, field: str) -> None:
    jobs = [
        site.api.submit(job_type, {"prompt": "hostile", "text": "hostile", field: value})
        for job_type in (JOBS if field in ("prompt", "model") else [TEXT])
        for value in (VALUES if field == "prompt" else SMALL_VALUES).values()
    ]
    assert_each_ended_with_a_sentence(site, jobs)
    assert site.goes_on()
    assert_log_is_clean(site)


@pytest.mark.parametrize("field", ["job_id", "user_id", "session_id", "job_type", "input_data", CONTROL])
def test_a_message_with_anything_in_a_field_changes_nothing(site: Site, field: str) -> None:
    jobs = []
    for value in [*(VALUES if field == "user_id" else SMALL_VALUES).values(), SURROGATES]:
        jobs.append(site.api.insert(TEXT, {"prompt": "harmless"}))
        site.api.send(str(jobs[-1]), {"job_id": str(jobs[-1]), "job_type": IMAGE, field: value})
    assert [site.api.wait(job)["status"] for job in jobs] == ["completed"] * len(jobs)
    assert site.goes_on()
    assert {update["user_id"] for job in jobs for update in site.api.updates(job)} == {"user-1"}
    assert_log_is_clean(site)


HEADERS = (
    *("id", "root_id", "parent_id", "group", "group_index", "shadow", "lang", "origin", "argsrepr", "kwargsrepr"),
    *("retries", "timelimit", "eta", "expires", "meth", "stamps", "stamped_headers", "ignore_result", "task"),
)


@pytest.mark.slow
@pytest.mark.parametrize("header", HEADERS)
def test_the_worker_goes_on_after_anything_in_a_messages_header(site: Site, header: str) -> None:
    for value in (CONTROL, SURROGATES, 7, -1, 1.5, True, None, [CONTROL], {CONTROL: CONTROL}):
        site.api.send_body([[str(ObjectId()), {}], {}, {}], headers={header: value})
    assert site.goes_on()
    assert site.worker.process.poll() is None
    assert_log_is_clean(site)


FOREIGN: dict[str, tuple[str, str, bytes]] = {
    "pickle": ("application/x-python-serialize", "binary", b"cos\nsystem\n(S'touch {marker}'\ntR."),
    "yaml": ("application/x-yaml", "utf-8", b"!!python/object/apply:os.system ['touch {marker}']"),
    "msgpack": ("application/x-msgpack", "binary", b"\x93\x90\x80\xc0"),
    "an unknown type": ("application/x-evil\n2026-01-01 forged line", "utf-8", b"evil"),
    "an unknown encoding": ("application/json", "evil\r\nforged line", b"[[],{},{}]"),
    "json 100,000 levels deep": ("application/json", "utf-8", b"[" * 100_000),
    "json of no numbers": ("application/json", "utf-8", b'[["x", NaN], {"y": Infinity}, {}]'),
    "json that is no utf-8": ("application/json", "utf-8", b'[["\xff\xfe"], {}, {}]'),
}


@pytest.mark.parametrize(("content_type", "encoding", "body"), FOREIGN.values(), ids=FOREIGN)
def test_only_json_is_read_and_nothing_else_is_loaded(
    site: Site, tmp_path: Path, content_type: str, encoding: str, body: bytes
) -> None:
    marker = tmp_path / "loaded"
    headers = {"task": TASK_NAME, "id": str(ObjectId()), "lang": "py", "argsrepr": "", "kwargsrepr": ""}
    with site.api.celery.producer_pool.acquire() as producer:
        producer.publish(
            body.replace(b"{marker}", str(marker).encode()),
            content_type=content_type,
            content_encoding=encoding,
            routing_key=site.api.queue,
            headers=headers,
        )
    assert site.goes_on()
    assert not marker.exists()
    assert [line for line in site.log().splitlines() if " ERROR " in line or " CRITICAL " in line or " WARN" in line]
    assert_log_is_clean(site)


OPERATORS: dict[str, Any] = {
    "$where": "sleep(100000) || true",
    "$set": {"status": "completed", "user_id": "thief"},
    "worker.owner": "thief",
    "a.b.$[]": {"$ne": None},
    "$ref": "jobs",
}


def test_operators_in_an_input_are_data(site: Site) -> None:
    job = site.api.submit(TEXT, {"prompt": "plain words", **OPERATORS})
    ended = site.api.wait(job)
    assert (ended["status"], ended["user_id"]) == ("completed", "user-1")
    assert ended["input_data"] == {"prompt": "plain words", **OPERATORS}


@pytest.mark.parametrize("text", ["$where", "$$NOW", '{"$set": {"status": "failed"}}', "$user_id", "a.b.$"])
def test_a_generated_text_is_stored_as_it_is(site: Site, text: str) -> None:
    ended = site.api.wait(site.api.text(f"[say {text}]"))
    assert ended["output_data"]["generated_text"] == text
    assert ended["user_id"] == "user-1"


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
        mongo = stack.enter_context(contextmanager(start)(MongoServer(certificate=certificate)))
        redis = stack.enter_context(contextmanager(start)(RedisServer()))
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
            assert task.get(timeout=15) == {"job_id": str(job), "status": "completed"}
            assert api.wait_notice(job, "completed")
    ended = run_worker(environment, tmp_path, "check")
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("options", ["", "?ssl_ca_certs={foreign}"], ids=["no authority", "another authority"])
def test_a_redis_whose_certificate_isnt_trusted_gets_no_word(
    encrypted: Encrypted, environment: dict[str, str], start_worker: StartWorker, tmp_path: Path, options: str
) -> None:
    foreign = make_certificate(tmp_path)
    url = f"rediss://{LOOPBACK}:{encrypted.proxy.port}/0" + options.format(foreign=foreign.authority)
    before = encrypted.proxy.handshakes
    worker = start_worker(ready=False, **{**environment, **encrypted.settings(foreign), "REDIS_URL": url})
    poll(lambda: "certificate verify failed" in worker.text(), 15)
    assert encrypted.proxy.handshakes == before
    assert " ready." not in worker.text()


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────────────────────

KEY, REDIS_PASSWORD, S3_SECRET, WORDS = "sk-planted-key", "planted-redis-password", "planted-s3-secret", "planted-words"
WRONG_PASSWORD = "planted-wrong-password"
PLANTED = (KEY, REDIS_PASSWORD, S3_SECRET, WORDS, DATABASE_PASSWORD, WRONG_PASSWORD)


@pytest.fixture(scope="module")
def guarded(running_provider: Provider) -> Iterator[dict[str, str]]:
    """The settings of servers that ask for passwords, with every other secret planted too."""
    with ExitStack() as stack:
        mongo = stack.enter_context(contextmanager(start)(MongoServer(auth=True)))
        redis = stack.enter_context(contextmanager(start)(RedisServer(password=REDIS_PASSWORD)))
        servers = {"MONGODB_URL": mongo.url, "DATABASE_NAME": DATABASE, "REDIS_URL": redis.url}
        keys = {"OPENAI_API_KEY": KEY, "AWS_SECRET_ACCESS_KEY": S3_SECRET, "AWS_ACCESS_KEY_ID": "planted-s3-secret-id"}
        short = {"LEASE_SECONDS": "3", "SWEEP_INTERVAL": "0.5", "RETRY_DELAYS": "0.2"}
        yield {
            **servers,
            **keys,
            **short,
            "OPENAI_BASE_URL": running_provider.url,
            "AUDIO_FORMAT": "wav",
            "DEBUG": "true",
        }


def screens(environment: dict[str, str], folder: Path, *commands: str) -> dict[str, str]:
    """What each command shows."""

    def run(command: str) -> str:
        variables = {**os.environ, **environment, "PYTHONPATH": str(SOURCE)}
        arguments = [sys.executable, str(SOURCE / "worker.py"), command]
        ended = subprocess.run(arguments, env=variables, cwd=folder, capture_output=True, text=True, timeout=100)
        return ended.stdout + ended.stderr

    with ThreadPoolExecutor() as pool:
        return dict(zip(commands, pool.map(run, commands), strict=True))


def told(api: Api, worker: WorkerProcess) -> dict[str, str]:
    """What documents (their input apart), notifications, task results and Celery's remote control say."""
    named = [worker.name] if " ready." in worker.text() else []
    inspect = api.celery.control.inspect(named, timeout=5)
    questions = ("active", "reserved", "scheduled", "registered", "stats", "active_queues", "conf", "report")
    results = [str(api.redis.get(key)) for key in api.redis.keys("celery-task-meta-*")]
    return {
        "documents": str(list(api.jobs.find({}, {"input_data": 0}))),
        "notifications": str(api.heard),
        "results": str(results),
        **{f"inspect {question}": str(getattr(inspect, question)()) for question in questions if named},
    }


def leaks(shown: dict[str, str]) -> list[tuple[str, str]]:
    """Where which secret is to be read."""
    return [(place, secret) for place, text in shown.items() for secret in PLANTED if secret in text]


def test_no_secret_shows_anywhere_while_all_goes_well_and_while_jobs_fail(
    guarded: dict[str, str], start_worker: StartWorker, environment: dict[str, str], tmp_path: Path
) -> None:
    environment = {**environment, **guarded}
    worker = start_worker(**environment)
    with open_api(environment) as api, events_of(api) as events:
        faults = (
            "",
            "[status 401]",
            "[status 400]",
            "[status 500 times=1]",
            "[html]",
            "[shape types]",
            "[cut times=1]",
        )
        jobs = [api.submit(kind, {"prompt": f"{WORDS} {fault}", "text": WORDS}) for kind in JOBS for fault in faults]
        jobs += [api.submit(TEXT, wrong) for wrong in ({WORDS: 1}, WORDS, [WORDS], {"prompt": WORDS, "model": WORDS})]
        for job in jobs:
            api.wait(job, timeout_s=30)
        api.text(f"{WORDS} [hang]")
        api.text(f"{WORDS} that waits")
        poll(lambda: api.jobs.count_documents({"status": "processing"}), 10)
        seen = screens(environment, tmp_path, "check", "status", "health", "recover")
        shown = {**told(api, worker), **seen, "log": worker.text(), "events": str(events)}
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
    "no provider": lambda s: {"OPENAI_BASE_URL": f"http://user:{WRONG_PASSWORD}@{LOOPBACK}:{free_port()}/v1"},
}


UNTRUSTED = "a certificate that isn't trusted"


def show_fault(right: dict[str, str], wrong: dict[str, str], folder: Path) -> dict[str, str]:
    """All that is to be seen of a worker whose settings have a fault, with a job that waits for it."""
    folder.mkdir()
    with open_api(right) as api:
        worker = WorkerProcess({**wrong, "TMPDIR": str(folder)}, folder / "worker.log")
        try:
            api.submit(IMAGE, {"prompt": WORDS})
            poll(lambda: re.search(r",\d{3} (WARNING|ERROR|CRITICAL) ", worker.text()), 50)
            return {**told(api, worker), **screens(wrong, folder, "check", "status"), "log": worker.text()}
        finally:
            worker.kill()


@pytest.fixture(scope="module")
def shown_by_fault(
    guarded: dict[str, str], encrypted: Encrypted, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, str]]:
    """What is to be seen of each fault; side by side, since most of the time they wait for an answer."""
    folder = tmp_path_factory.mktemp("faults")
    untrusted = encrypted.settings(make_certificate(folder))

    def show(name: str) -> dict[str, str]:
        right = {**guarded, "CELERY_QUEUE_NAME": f"queue_{ObjectId()}"}
        return show_fault(right, {**right, **(FAULTS[name](right) if name in FAULTS else untrusted)}, folder / name)

    names = [*FAULTS, UNTRUSTED]
    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(show, names), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*FAULTS, UNTRUSTED])
def test_no_secret_shows_anywhere_while_something_is_wrong(
    shown_by_fault: dict[str, dict[str, str]], fault: str
) -> None:
    assert "FAULT" in shown_by_fault[fault]["check"]
    assert leaks(shown_by_fault[fault]) == []


def test_check_says_that_a_certificate_isnt_trusted(shown_by_fault: dict[str, dict[str, str]]) -> None:
    rows = re.split(r"\n│ (?=FAULT|ok|note)", shown_by_fault[UNTRUSTED]["check"])
    untrusted = [row for row in rows if row.startswith("FAULT") and "the certificate isn't trusted" in row]
    names = ("MongoDB ", "Redis ", "broker ", "provider, text")
    assert [name for name in names if not any(f"│ {name}" in row for row in untrusted)] == []


@pytest.mark.slow
def test_the_contracts_rights_suffice_for_every_part_of_the_worker(
    guarded: dict[str, str], start_worker: StartWorker, environment: dict[str, str], tmp_path: Path
) -> None:
    environment = {**environment, **guarded}
    with open_api(environment) as api:
        worker = start_worker(**environment)
        job = api.wait(api.submit(IMAGE, JOBS[IMAGE]))
        assert api.database["artifacts.files"].count_documents({"_id": job["artifact_url"].rsplit("/", 1)[1]}) == 1
        poll(lambda: "worker_status" in api.jobs.index_information(), 10)
        assert [
            run_worker(environment, tmp_path, command).returncode for command in ("check", "status", "recover")
        ] == [0] * 3
        assert "could not be made" not in worker.text()
