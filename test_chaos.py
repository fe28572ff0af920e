"""The chaos run in short, the faults that long ones have found, and proof that its audit finds what it should."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest
from bson import ObjectId
from celery.exceptions import Ignore

import chaos
import worker
from chaos import Evidence, Happened, History, JobPlan, Notice, Step
from conftest import StartWorker
from testbed.answers import Plan, words_for
from testbed.api import SOURCE, Api
from testbed.processes import poll
from testbed.provider import Call, Provider
from testbed.servers import RedisServer

# ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_amid_chaos_no_job_is_lost_doubled_or_left_hanging() -> None:
    command = [sys.executable, str(SOURCE / "bench_worker.py"), "chaos", "--seed", os.environ.get("CHAOS_SEED", "2")]
    command += ["--jobs", "300", "--workers", "2", "--minutes", "0.6", "--hurry", "10"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    assert "violations: 0" in done.stdout


# ── what it has found ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_redis_dying_while_a_job_runs_and_a_slot_is_free_does_not_end_the_worker(
    pool: str, environment: dict[str, str], provider: Provider, start_worker: StartWorker
) -> None:
    with RedisServer() as redis:
        own = {"REDIS_URL": redis.url, "WORKER_POOL": pool, "WORKER_CONCURRENCY": "2"}
        running = start_worker(**own)
        place = environment["DATABASE_NAME"], environment["CELERY_QUEUE_NAME"]
        with closing(Api(environment["MONGODB_URL"], redis.url, *place)) as api:
            first = api.text("[delay 2] while Redis dies")
            poll(lambda: provider.calls_for("while Redis dies"), 20, description="the provider is asked")
            redis.restart(crash=True)
            assert api.wait(first)["status"] == "completed"
            assert api.wait(api.text("after that"), timeout_s=40)["status"] == "completed"
        assert running.process.poll() is None


def test_a_whole_file_is_left_alone_when_it_is_put_again(
    runtime: worker.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{ObjectId()}-owner.png"
    runtime.artifacts.put(name, b"picture", "image/png")
    monkeypatch.setattr(runtime.artifacts._bucket, "delete", pytest.fail)  # type: ignore[attr-defined]
    runtime.artifacts.put(name, b"picture", "image/png")
    assert list(runtime.artifacts.names()) == [name]


def test_half_a_file_is_put_again(runtime: worker.Runtime) -> None:
    name = f"{ObjectId()}-owner.png"
    runtime.artifacts.put(name, b"picture", "image/png")
    runtime.database["artifacts.files"].delete_one({"_id": name})
    runtime.artifacts.put(name, b"picture", "image/png")
    assert runtime.artifacts._bucket.get(name).read() == b"picture"  # type: ignore[attr-defined]


def test_chunks_of_a_file_that_was_never_finished_are_deleted(runtime: worker.Runtime) -> None:
    job_id = runtime.database["jobs"].insert_one({"status": "failed"}).inserted_id
    chunk = {"files_id": f"{job_id}-0123456789abcdef.png", "n": 0, "data": b"half a picture"}
    runtime.database["artifacts.chunks"].insert_one(chunk)
    runtime.sweeper.sweep_artifacts()
    assert runtime.database["artifacts.chunks"].count_documents({}) == 0


def insert(runtime: worker.Runtime) -> ObjectId:
    what = {"status": "pending", "job_type": "text_generation", "input_data": {"prompt": "words"}, "user_id": "u"}
    return ObjectId(runtime.database["jobs"].insert_one({**what, "created_at": datetime.now(UTC)}).inserted_id)


def claim(runtime: worker.Runtime, job_id: ObjectId) -> worker.Job:
    claimed = runtime.store.claim(job_id, str(ObjectId()), worker.Limits(5, 10))
    assert isinstance(claimed, worker.Job)
    return claimed


def take_away(runtime: worker.Runtime, job_id: ObjectId) -> None:
    """As the sweeper does when a lease has run out."""
    document = runtime.store.read(job_id)
    assert document is not None
    assert runtime.store.release_stale(document)


@pytest.fixture
def told(runtime: worker.Runtime, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The statuses that this process has published."""
    statuses: list[str] = []

    def publish(_document: object, status: str, _sentence: str) -> bool:
        statuses.append(status)
        return True

    monkeypatch.setattr(runtime.notifier, "publish_status", publish)
    return statuses


def test_an_attempt_that_slept_through_its_job_does_not_have_the_last_word(
    runtime: worker.Runtime, told: list[str]
) -> None:
    slept = claim(runtime, insert(runtime))
    take_away(runtime, slept.id)
    runtime.store.complete(claim(runtime, slept.id), {}, None)
    attempt = worker.Attempt(slept, 30)
    worker.announce_job(runtime, slept, worker.Status.PROCESSING, "as it does when it wakes up")
    with pytest.raises(Ignore):
        worker.conclude(worker.process_job, attempt, worker.settle(runtime, attempt, worker.Result({})))
    assert told == ["processing", "completed"]


def test_an_attempt_whose_job_was_cancelled_tells_nobody(runtime: worker.Runtime, told: list[str]) -> None:
    attempt = worker.Attempt(claim(runtime, insert(runtime)), 30)
    runtime.database["jobs"].update_one({"_id": attempt.job.id}, {"$set": {"status": "failed"}})
    with pytest.raises(Ignore):
        worker.conclude(worker.process_job, attempt, worker.settle(runtime, attempt, worker.Result({})))
    assert told == []


def test_an_attempt_whose_lease_has_run_out_before_it_begins_asks_no_provider(
    runtime: worker.Runtime, told: list[str], provider: Provider
) -> None:
    job_id = insert(runtime)
    owner = str(ObjectId())
    assert isinstance(runtime.store.claim(job_id, owner, worker.Limits(5, 10)), worker.Job)
    late = {"worker.lease_until": datetime.now(UTC) - timedelta(seconds=1)}
    runtime.database["jobs"].update_one({"_id": job_id}, {"$set": late})
    claimed = runtime.store.claim(job_id, owner, worker.Limits(5, 10))  # whose reply was lost the first time
    assert isinstance(claimed, worker.Job)
    attempt = worker.Attempt(claimed, runtime.settings.lease_seconds)
    assert isinstance(worker.run(runtime, attempt), worker.HandBack)
    assert (told, provider.calls) == ([], [])


def test_an_attempt_that_sleeps_between_its_start_and_its_call_asks_no_provider(
    runtime: worker.Runtime, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = worker.Attempt(claim(runtime, insert(runtime)), runtime.settings.lease_seconds)
    monkeypatch.setattr(worker, "announce_job", lambda *_: setattr(attempt, "renewed_at", -1e9))
    assert isinstance(worker.run(runtime, attempt), worker.HandBack)
    assert provider.calls == []


def test_the_job_of_a_killed_child_is_put_into_the_queue_again_since_another_worker_may_have_dropped_its_message(
    runtime: worker.Runtime,
) -> None:
    job_id = claim(runtime, insert(runtime)).id
    with subprocess.Popen(["true"]) as dead:
        pass
    runtime.database["jobs"].update_one({"_id": job_id}, {"$set": {"worker.pid": dead.pid}})
    before = worker.queue_length(runtime.settings)
    assert len(runtime.sweeper.release_dead_siblings()) == 1
    assert worker.queue_length(runtime.settings) == before + 1


# ── records ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def recorder(runtime: worker.Runtime) -> Iterator[chaos.ChangeRecorder]:
    recorder = chaos.ChangeRecorder(runtime.settings.mongodb_url.get_secret_value(), runtime.settings.database_name)
    recorder.start()
    assert recorder.is_open.wait(20)
    yield recorder
    if recorder.is_alive():
        recorder.end()


def test_every_write_to_a_job_is_recorded_by_its_name(runtime: worker.Runtime, recorder: chaos.ChangeRecorder) -> None:
    store = runtime.store
    job_id, a_second_ago = insert(runtime), datetime.now(UTC) - timedelta(seconds=1)
    held = claim(runtime, job_id)
    time.sleep(0.002)  # another lease than before
    store.renew_leases([held])
    store.release(held, a_second_ago, counted=True)
    store.release(claim(runtime, job_id), a_second_ago, counted=False)
    store.release(claim(runtime, job_id), datetime.now(UTC) + timedelta(seconds=0.3), counted=False)
    time.sleep(0.4)
    claim(runtime, job_id)
    take_away(runtime, job_id)
    store.complete(claim(runtime, job_id), {}, None)
    store.mark_notified([job_id])
    recorder.end()
    kinds = [step.kind for step in chaos.fold(recorder.events[job_id])]
    assert kinds == [
        *("insert", "claimed", "renewed", "released", "claimed", "handed back"),
        *("claimed", "put off", "claimed", "rescued", "claimed", "completed", "noticed"),
    ]


def test_the_same_seed_gives_the_same_jobs_and_faults() -> None:
    assert chaos.make_plans(7, 50) == chaos.make_plans(7, 50) != chaos.make_plans(8, 50)
    faults = [chaos.make_faults(seed, chaos.PROCESS_FAULTS, 1, 4, 4) for seed in (7, 7, 8)]
    assert faults[0] == faults[1] != faults[2]


# ── the audit ────────────────────────────────────────────────────────────────────────────────────────────────────

PROMPT = "chaos-1-00000 something"
OPTIONS = chaos.Options(jobs=1, workers=1, minutes=1, seed=1, hurry=1)


def step(at: float, kind: str, status: str, owner: str | None = "a") -> Step:
    return Step(at, kind, status, owner, 11, 1, ())


def call(at: float) -> Call:
    return Call("/v1/chat/completions", PROMPT, "m", {}, None, at)


def a_good_history() -> History:
    plan = JobPlan(0, chaos.TEXT, {"prompt": PROMPT}, PROMPT, True, None, None, (), True)
    text = "".join(words_for(Plan(PROMPT, {})))
    document = {"status": "completed", "output_data": {"generated_text": text}, "artifact_url": None}
    steps = [step(0, "insert", "pending", None), step(1, "claimed", "processing")]
    steps += [step(3, "completed", "completed"), step(4, "noticed", "completed")]
    notices = [Notice(1.1, "", "processing"), Notice(3.1, "", "completed")]
    return History(plan, ObjectId(), document, steps, notices, [call(1.5)])


def evidence_of(history: History) -> Evidence:
    gaps, logs = [(0.0, 0.0)], {"worker.log": "job=1 started"}
    return Evidence(OPTIONS, {history.job_id: history}, [], gaps, {}, set(), [], logs, "exit code 0: ", 1.0)


def lose(history: History) -> None:
    history.steps[2:2] = [step(1.6, "rescued", "processing", None), step(2, "claimed", "processing", "b")]


def cancel(history: History) -> None:
    history.document = {"status": "failed", "error_message": chaos.CANCELLED}
    history.steps[2] = step(3, chaos.CANCELLED, "failed")


JOB_FAULTS: dict[str, tuple[str, Callable[[History], object]]] = {
    "it never ended": ("ends_once", lambda h: h.document.update(status="processing")),
    "it is gone": ("ends_once", lambda h: h.document.clear()),
    "it ended twice": ("ends_once", lambda h: h.steps.append(step(5, "completed", "completed"))),
    "it was written to after its end": ("ends_once", lambda h: h.steps.append(step(5, "renewed", "completed"))),
    "it was written to after its cancel": ("ends_once", cancel),
    "its notice stayed in the outbox": ("ends_once", lambda h: h.document.update(worker={"unnotified": 1})),
    "it was taken from its owner": (
        "is_claimed_one_at_a_time",
        lambda h: h.steps.insert(2, step(2, "claimed", "processing", "b")),
    ),
    "its text is another": ("has_its_result", lambda h: h.document["output_data"].update(generated_text="half")),
    "it failed with half an output": ("has_its_result", lambda h: h.document.update(status="failed")),
    "it was told too early": ("is_told_the_truth", lambda h: h.notices.append(Notice(2, "", "completed"))),
    "it was told as failed too": ("is_told_the_truth", lambda h: h.notices.append(Notice(5, "", "failed"))),
    "its end was not told": ("is_told_the_truth", lambda h: h.notices.pop()),
    "its end was told, then its start": ("is_told_the_truth", lambda h: h.notices.append(Notice(5, "", "processing"))),
    "it was generated twice": ("is_generated_no_more_than_claimed", lambda h: h.calls.append(call(2))),
    "it was generated after its end": ("is_generated_no_more_than_claimed", lambda h: h.calls.append(call(9))),
    "it was never generated": ("is_generated_no_more_than_claimed", lambda h: h.calls.clear()),
    "a live attempt lost it": ("is_rescued_only_for_a_reason", lose),
}


def checks_that_find(evidence: Evidence) -> set[str]:
    return {line.split(":")[0] for finding in chaos.audit(evidence) for line in finding.splitlines()} & {
        check.__name__ for check in (*chaos.JOB_CHECKS, *chaos.RUN_CHECKS)
    }


def test_a_good_history_passes_the_audit() -> None:
    assert chaos.audit(evidence_of(a_good_history())) == []


@pytest.mark.parametrize(("check", "spoil"), JOB_FAULTS.values(), ids=JOB_FAULTS)
def test_the_audit_finds_a_job(check: str, spoil: Callable[[History], object]) -> None:
    history = a_good_history()
    spoil(history)
    assert check in checks_that_find(evidence_of(history))


def test_a_job_lost_by_a_killed_process_is_no_finding() -> None:
    history = a_good_history()
    lose(history)
    evidence = evidence_of(history)
    evidence.happened = [Happened("kill a child", 1.55, frozenset({11}), 1.55)]
    assert chaos.audit(evidence) == []


def test_an_end_told_while_the_subscriber_was_away_is_no_finding() -> None:
    history = a_good_history()
    history.notices.pop()
    evidence = evidence_of(history)
    evidence.gaps.append((2.9, 3.2))
    assert chaos.audit(evidence) == []


TRACE = f'Traceback (most recent call last):\n  File "{SOURCE / "worker.py"}", line 1, in claim\nKeyError: 1\n'
RUN_FAULTS: dict[str, tuple[str, Callable[[Evidence], object]]] = {
    "a file without a job": ("every_artifact_has_a_job", lambda e: e.files.update({"stray.png": b"x"})),
    "chunks without a file": ("every_artifact_has_a_job", lambda e: e.chunk_owners.add("stray.png")),
    "a worker that broke down": ("every_worker_ends_well", lambda e: e.fleet_faults.append("exit code 1")),
    "a recovery that failed": ("every_worker_ends_well", lambda e: setattr(e, "recovered", "exit code 1")),
    "a key in a log": ("logs_hold_no_secret_and_no_crash", lambda e: e.logs.update(a=chaos.PLANTED_KEY)),
    "a prompt in a log": ("logs_hold_no_secret_and_no_crash", lambda e: e.logs.update(a=PROMPT)),
    "a stack trace of the worker's": ("logs_hold_no_secret_and_no_crash", lambda e: e.logs.update(a=TRACE)),
}


@pytest.mark.parametrize(("check", "spoil"), RUN_FAULTS.values(), ids=RUN_FAULTS)
def test_the_audit_finds(check: str, spoil: Callable[[Evidence], object]) -> None:
    evidence = evidence_of(a_good_history())
    spoil(evidence)
    assert check in checks_that_find(evidence)


@pytest.mark.parametrize("stored", [None, b"half a pictu"], ids=["missing", "damaged"])
def test_the_audit_finds_a_picture_that_is(stored: bytes | None) -> None:
    history = a_good_history()
    history.plan = JobPlan(0, chaos.IMAGE, {"size": "32x32"}, PROMPT, True, None, None, (), True)
    url = "/artifacts/a.png"
    history.document.update(output_data={"image_url": url, "resolution": "32x32"}, artifact_url=url)
    evidence = evidence_of(history)
    evidence.files = {"a.png": stored} if stored else {}
    assert "has_its_result" in checks_that_find(evidence)
