"""Providers that misbehave or can't be reached: a job's cost is bounded in time and memory, and the worker goes on."""

from __future__ import annotations

import gc
import re
import socket
import sys
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from bson import ObjectId

from testbed.answers import RAW_ANSWERS
from testbed.api import WorkerProcess
from testbed.processes import LOOPBACK, poll
from testbed.provider import Provider
from testbed.servers import MongoServer, RedisServer
from tests.lab import AUDIO, IMAGE, TEXT, claim, insert
from tests.place import PATIENCE_S, OpenPlace, Outcomes, Place, Scenario, Step, side_by_side
from tests.site import JOBS, Site, open_api, worker_settings
from worker import Attempt, Runtime, run
from workerkit.errors import JobError
from workerkit.sentences import NO_PICTURE, NO_SOUND, NOT_SET_UP, PICTURE_TOO_LARGE, TOO_LARGE, TOOK_TOO_LONG, UNUSABLE

# ── poison ───────────────────────────────────────────────────────────────────────────────────────────────────────

MAX_GROWTH_MB = 150  # with answers of 32 MiB
MAX_S = 20
UNREACHABLE = "The AI service can't be reached; given up after 2 tries. Please try again later."
NOT_FETCHED = "The picture can't be fetched; given up after 2 tries. Please try again later."
BUSY = "The AI service is busy; given up after 2 tries. Please try again later."
BROKE_OFF = "The AI service stopped in the middle; given up after 2 tries. Please try again later."
COMPLETED = None
ENDLESS = ("interim-endless", "chunk-size-endless")  # not even a byte of the answer itself
POISON: list[tuple[str, str, str | None]] = [
    *[(kind, "[big 500]", TOO_LARGE) for kind in JOBS],
    *[(kind, "[endless]", TOO_LARGE) for kind in (IMAGE, AUDIO)],
    *[(IMAGE, f"[url] {said}", TOO_LARGE) for said in ("[big 500]", "[endless]")],
    (TEXT, "[endless] to the limit", TOOK_TOO_LONG),
    (TEXT, "[line 40]", TOO_LARGE),
    (TEXT, "[line 30]", TOO_LARGE),
    (TEXT, "[tiny 10000]", COMPLETED),
    *[(kind, "[gzip 300]", TOO_LARGE) for kind in JOBS],
    (IMAGE, "[url] [gzip 300]", TOO_LARGE),
    (IMAGE, "[bomb 30000x30000]", UNUSABLE),
    (IMAGE, "[url] [bomb 30000x30000]", UNUSABLE),
    (IMAGE, "[bomb 7000x7000]", PICTURE_TOO_LARGE),
    *[(TEXT, f"[shape {said}]", UNUSABLE) for said in ("deep", "types", "text", "list", "null")],
    *[(IMAGE, f"[shape {said}]", UNUSABLE) for said in ("deep", "types", "nan")],
    (IMAGE, "[shape utf8]", NO_PICTURE),
    *[(kind, "[shape error]", BUSY) for kind in JOBS],
    *[(TEXT, f"[shape {said}]", COMPLETED) for said in ("nan", "edges", "utf8")],
    (AUDIO, "[shape deep]", UNUSABLE),
    *[(kind, "[type text/html]", COMPLETED) for kind in JOBS],
    *[(kind, "[html]", NOT_SET_UP) for kind in JOBS],
    *[(kind, "[status 204]", said) for kind, said in ((TEXT, BROKE_OFF), (IMAGE, UNUSABLE), (AUDIO, NO_SOUND))],
    *[(kind, "[status 304]", NOT_SET_UP) for kind in JOBS],
    (TEXT, "[status 199] to the limit", TOOK_TOO_LONG),
    *[(TEXT, f"[raw {said}]", UNREACHABLE) for said in RAW_ANSWERS if said not in {*ENDLESS, "switching"}],
    *[(TEXT, f"[raw {said}] to the limit", TOOK_TOO_LONG) for said in ENDLESS],
    (TEXT, "[raw switching]", NOT_SET_UP),
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
def shared_site(
    mongo_server: MongoServer,
    redis_server: RedisServer,
    running_provider: Provider,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    """A worker that takes a try more at most, and has done a job of each type."""
    folder = tmp_path_factory.mktemp("hostile")
    settings = worker_settings(mongo_server, redis_server, running_provider, f"hostile_{ObjectId()}")
    environment = {**settings, "RETRY_DELAYS": "0.1", "DEBUG": "true", "TMPDIR": str(folder)}
    with open_api(environment) as api:
        worker = WorkerProcess(environment, folder / "worker.log")
        try:
            site = Site(api, worker.wait_ready(60), running_provider, environment)
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
    soft_s = 1 if "limit" in prompt else MAX_S
    job = site.api.submit(job_type, {"prompt": prompt, "text": prompt}, soft_time_limit=soft_s, time_limit=90)
    ended = site.api.wait(job, timeout_s=MAX_S + 20)
    assert (ended["status"], ended["error_message"]) == ("failed" if sentence else "completed", sentence)
    assert patient.growth_mb() < MAX_GROWTH_MB
    assert site.goes_on()
    assert site.worker.children() == [patient.child]
    assert "Traceback" not in site.log()


@pytest.mark.parametrize("said", ["[big 40]", "[gzip 40]"])
def test_an_answer_that_cant_be_used_is_let_go_at_once(light_runtime: Runtime, said: str) -> None:
    job = claim(light_runtime, insert(light_runtime, job_type=AUDIO, input_data={"text": said}))
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        assert isinstance(run(light_runtime, Attempt(job, lease_s=30)), JobError)
        kept = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, "*/testbed/*")])
    finally:
        tracemalloc.stop()
        gc.enable()
    assert sum(trace.size for trace in kept.traces) < 2**20


@pytest.mark.parametrize("shape", ["nan", "edges"])
def test_what_a_provider_says_about_an_answer_has_the_contracts_types(site: Site, shape: str) -> None:
    output = site.api.wait(site.api.text(f"counted [shape {shape}]"))["output_data"]
    assert output == {"generated_text": "words", "model_used": "testbed-model", "tokens_used": 1}


REDIRECTS = [(kind, "[redirect http://{address}/]", NOT_SET_UP) for kind in JOBS]
REDIRECTS += [(IMAGE, "[url] [redirect http://{address}/]", UNUSABLE)]


@pytest.mark.parametrize(("job_type", "said", "sentence"), REDIRECTS)
def test_a_redirect_to_another_host_is_not_followed(site: Site, job_type: str, said: str, sentence: str) -> None:
    with socket.create_server((LOOPBACK, 0)) as other:
        other.setblocking(False)
        prompt = said.format(address=f"{LOOPBACK}:{other.getsockname()[1]}")
        job = site.api.submit(job_type, {"prompt": prompt, "text": prompt})
        assert site.api.wait(job)["error_message"] == sentence
        with pytest.raises(BlockingIOError):
            other.accept()


def test_a_model_that_is_loading_costs_no_try_and_the_person_reads_it(site: Site) -> None:
    job = site.api.text("[loading times=4] loaded")  # twice as often as a job has tries here
    assert site.api.wait(job, timeout_s=60)["status"] == "completed"
    said = [update["message"] for update in site.api.updates(job)]
    assert sum(message.startswith("The AI model is starting; trying again in") for message in said) == 4
    assert len(site.provider.calls_for("loaded")) == 5


def test_a_provider_that_asks_to_wait_too_long_fails_the_job_at_once_and_says_when(site: Site) -> None:
    ended = site.api.wait(site.api.text("[status 429 retry-after=3600] patience"))
    assert ended["status"] == "failed"
    assert re.fullmatch(r"The AI service is busy\. Please try again after .*\d\d:\d\d UTC\.", ended["error_message"])
    assert len(site.provider.calls_for("patience")) == 1


# ── a provider that is away ──────────────────────────────────────────────────────────────────────────────────────

TWENTY = {f"number {number} of twenty": Step("") for number in range(20)}


def provider_is_down(place: Place) -> None:
    provider = Provider()
    limits = {"CELERY_SOFT_TIME_LIMIT": "4", "CELERY_TIME_LIMIT": "30"}
    own = {"WORKER_POOL": "threads", "WORKER_CONCURRENCY": "20", "OPENAI_BASE_URL": provider.url}
    place.start_worker(**own, **limits).wait_ready(PATIENCE_S)
    jobs = [place.submit(name, step) for name, step in TWENTY.items()]
    down_until = time.monotonic() + 5  # longer than a job may take
    poll(lambda: time.monotonic() > down_until or any(place.api.status(job) == "failed" for job in jobs), 30)
    with provider:
        ended = [place.api.wait(job, timeout_s=PATIENCE_S)["status"] for job in jobs]
    assert ended == ["completed"] * 20


def providers_name_is_unknown(place: Place) -> None:
    api = place.api
    place.start_worker(OPENAI_BASE_URL="http://no-such-host.invalid/v1").wait_ready(PATIENCE_S)
    jobs = [place.submit(name, step) for name, step in TWENTY.items()]
    first = api.wait_notice(jobs[0], "processing", timeout_s=PATIENCE_S)
    poll(lambda: len(api.notices(jobs[3])) >= 2, PATIENCE_S, description="the fourth job has been tried")
    assert [api.status(job) for job in jobs].count("failed") == 0
    assert first["message"] == "Your job has started."
    assert "The AI service can't be reached; trying again in" in api.updates(jobs[0])[1]["message"]


def provider_never_answers(place: Place) -> None:
    with socket.create_server((LOOPBACK, 0), backlog=100) as hole:
        place.start_worker(OPENAI_BASE_URL=f"http://{LOOPBACK}:{hole.getsockname()[1]}/v1").wait_ready(PATIENCE_S)
        jobs = [place.submit(name, Step(""), soft_time_limit=1, time_limit=9) for name in list(TWENTY)[:3]]
        failed = [place.api.wait(job, timeout_s=PATIENCE_S) for job in jobs]
    assert [job["error_message"] for job in failed] == [TOOK_TOO_LONG] * 3
    ended_at = sorted(job["completed_at"] for job in failed)
    assert all(later - earlier > timedelta(seconds=0.8) for earlier, later in pairwise(ended_at))


SCENARIOS: dict[str, Scenario] = {
    "down": provider_is_down,
    "never answers": provider_never_answers,
    "unknown": providers_name_is_unknown,
}


@pytest.fixture(scope="module", autouse=True)
def outcomes(open_place: OpenPlace) -> Iterator[Outcomes]:
    """They happen while the tests above run."""
    with side_by_side(open_place, SCENARIOS, at_a_time=1) as outcomes:
        yield outcomes


def test_jobs_wait_for_a_provider_that_is_down_and_complete_once_it_is_up(outcomes: Outcomes) -> None:
    outcomes["down"].result()


def test_jobs_whose_providers_name_does_not_resolve_wait_too(outcomes: Outcomes) -> None:
    outcomes["unknown"].result()


def test_a_provider_that_never_answers_fails_jobs_one_by_one_at_their_limit(outcomes: Outcomes) -> None:
    outcomes["never answers"].result()
