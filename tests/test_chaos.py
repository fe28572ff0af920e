"""The chaos run in short, the faults that long runs have found, and proof that its audit finds what it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from pathlib import Path

import pytest
from bson import ObjectId
from celery.exceptions import Ignore

import worker
from bench.chaos import FIXED_WAITS
from bench.chaos_audit import JOB_CHECKS, PLANTED_KEY, RUN_CHECKS, audit
from bench.chaos_plan import (
    IMAGE,
    PROCESS_FAULTS,
    SERVER_FAULTS,
    TEXT,
    JobPlan,
    Options,
    faults_of_processes,
    faults_of_servers,
    make_plans,
    pace_of,
)
from bench.chaos_records import CANCELLED, ChangeRecorder, Evidence, Happened, History, Notice, Step, fold
from testbed.answers import Plan, words_for
from testbed.api import CANCELLED as CANCEL_SENTENCE
from testbed.api import Api
from testbed.processes import SOURCE, poll
from testbed.provider import Call, Provider
from testbed.servers import RedisServer
from tests.lab import DELIVERY, ago, change, claim, gone_pid, insert, look
from tests.site import StartWorker
from workerkit.errors import HandBack

# ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────


# By this seed each kind of fault comes at least once, and processes are stopped first, while all servers are well.
SEED = 1593
HURRIED = Options(jobs=120, workers=2, minutes=0.17, seed=int(os.environ.get("CHAOS_SEED", SEED)), hurry=20)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_amid_chaos_no_job_is_lost_doubled_or_left_hanging(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "chaos", "--json", str(tmp_path / "figures.json")]
    command += [part for name, value in vars(HURRIED).items() for part in (f"--{name}", str(value))]
    done = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    assert "violations: 0" in done.stdout
    planned = {fault.kind for fault in faults_of_processes(HURRIED) + faults_of_servers(HURRIED)}
    assert set(json.loads((tmp_path / "figures.json").read_text())["faults"]) == planned


def test_the_short_run_meets_every_kind_of_fault_and_jobs_of_every_kind() -> None:
    options = replace(HURRIED, seed=SEED)
    assert {fault.kind for fault in faults_of_processes(options)} == set(PROCESS_FAULTS)
    assert {fault.kind for fault in faults_of_servers(options)} == set(SERVER_FAULTS)
    plans = make_plans(SEED, HURRIED.jobs, pace_of(options))
    for kind in ("is_sent", "is_usable", "is_good", "limits", "cancel_after_s", "repeat_after_s"):
        assert {bool(getattr(plan, kind) or 0) for plan in plans} == {True, False}, kind
    for kind in ("own", "spoilt", "put_back_after_s", "padding", "refusal"):
        assert {getattr(plan.extras, kind) not in ((), None, 0) for plan in plans} == {True, False}, kind


@pytest.mark.parametrize("name", FIXED_WAITS)
def test_a_run_in_a_hurry_divides_a_wait_that_the_worker_has(name: str) -> None:
    assert attrgetter(name)(worker) > 0


# ── what it has found ────────────────────────────────────────────────────────────────────────────────────────────


def test_redis_dying_while_a_job_runs_and_a_slot_is_free_does_not_end_the_worker(
    environment: dict[str, str], provider: Provider, start_worker: StartWorker
) -> None:
    database, pools = environment["DATABASE_NAME"], ("prefork", "threads")
    with RedisServer() as redis, ExitStack() as stack:
        own = {"REDIS_URL": redis.url, "WORKER_CONCURRENCY": "2"}
        running = [start_worker(**own, WORKER_POOL=pool, CELERY_QUEUE_NAME=pool, ready=False) for pool in pools]
        apis = [
            stack.enter_context(closing(Api(environment["MONGODB_URL"], redis.url, database, pool))) for pool in pools
        ]
        jobs = [api.text("[delay 2] while Redis dies") for api in apis]
        poll(lambda: len(provider.calls_for("while Redis dies")) == len(jobs), 60)
        redis.restart(crash=True)
        assert [api.wait(job, timeout_s=60)["status"] for api, job in zip(apis, jobs, strict=True)] == ["completed"] * 2
        later = [api.text("after that") for api in apis]
        assert [api.wait(job, timeout_s=60)["status"] for api, job in zip(apis, later, strict=True)] == [
            "completed"
        ] * 2
        assert [worker.process.poll() for worker in running] == [None, None]


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
    job_id = insert(runtime, status="failed")
    chunk = {"files_id": f"{job_id}-0123456789abcdef.png", "n": 0, "data": b"half a picture"}
    runtime.database["artifacts.chunks"].insert_one(chunk)
    runtime.files.sweep()
    assert runtime.database["artifacts.chunks"].count_documents({}) == 0


def take_away(runtime: worker.Runtime, job_id: ObjectId) -> None:
    """As the sweeper does when a lease has run out."""
    assert runtime.store.release_stale(look(runtime, job_id))


@pytest.fixture
def published(runtime: worker.Runtime, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The statuses that this process has published."""
    statuses: list[str] = []

    def publish(_document: object, status: str, _sentence: str) -> bool:
        statuses.append(status)
        return True

    monkeypatch.setattr(runtime.notifier, "publish_status", publish)
    return statuses


def test_an_attempt_that_slept_through_its_job_publishes_nothing_after_the_end(
    runtime: worker.Runtime, published: list[str]
) -> None:
    slept = claim(runtime)
    take_away(runtime, slept.id)
    runtime.store.complete(claim(runtime, slept.id, "owner-2"), {}, None)
    attempt = worker.Attempt(slept, 30)
    worker.announce_job(runtime, slept, worker.Status.PROCESSING, "as it does when it wakes up")
    with pytest.raises(Ignore):
        worker.conclude(worker.process_job, attempt, worker.settle(runtime, attempt, worker.Result({})))
    assert published == ["processing", "completed"]


def test_an_attempt_whose_job_was_cancelled_publishes_nothing(runtime: worker.Runtime, published: list[str]) -> None:
    attempt = worker.Attempt(claim(runtime), 30)
    change(runtime, attempt.job.id, status="failed")
    with pytest.raises(Ignore):
        worker.conclude(worker.process_job, attempt, worker.settle(runtime, attempt, worker.Result({})))
    assert published == []


def test_an_attempt_whose_lease_has_run_out_before_it_begins_calls_no_provider(
    runtime: worker.Runtime, published: list[str], provider: Provider
) -> None:
    job_id = claim(runtime).id
    change(runtime, job_id, worker__lease_until=ago(5))
    claimed = claim(runtime, job_id)  # by the same owner, whose first claim's reply was lost
    attempt = worker.Attempt(claimed, runtime.settings.lease_seconds)
    assert isinstance(worker.run(runtime, attempt), HandBack)
    assert (published, provider.calls) == ([], [])


def test_an_attempt_that_sleeps_between_its_start_and_its_call_calls_no_provider(
    runtime: worker.Runtime, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = worker.Attempt(claim(runtime), runtime.settings.lease_seconds)
    monkeypatch.setattr(worker, "announce_job", lambda *_: setattr(attempt, "renewed_at", -1e9))
    assert isinstance(worker.run(runtime, attempt), HandBack)
    assert provider.calls == []


def test_the_job_of_a_killed_child_is_put_into_the_queue_again_since_another_worker_may_have_dropped_its_message(
    runtime: worker.Runtime,
) -> None:
    job_id = claim(runtime).id
    change(runtime, job_id, worker__pid=gone_pid())
    before = runtime.broker.queue_length()
    assert len(runtime.sweeper.release_dead_siblings()) == 1
    assert runtime.broker.queue_length() == before + 1


# ── plans and records ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def recorder(runtime: worker.Runtime) -> Iterator[ChangeRecorder]:
    recorder = ChangeRecorder(runtime.settings.mongodb_url.get_secret_value(), runtime.settings.database_name)
    recorder.start()
    assert recorder.is_open.wait(20)
    yield recorder
    if recorder.is_alive():
        recorder.end()


def test_every_write_to_a_job_is_recorded_by_its_name(runtime: worker.Runtime, recorder: ChangeRecorder) -> None:
    store, owners = runtime.store, iter("abcdef")
    job_id, before = insert(runtime), ago(5)
    held = claim(runtime, job_id, next(owners))
    time.sleep(0.002)  # another lease than before
    store.renew_leases([held])
    store.release(held, before, counted=True)
    store.release(claim(runtime, job_id, next(owners)), before, counted=False)
    store.release(claim(runtime, job_id, next(owners)), datetime.now(UTC) + timedelta(seconds=2), counted=False)
    owner = next(owners)
    poll(lambda: isinstance(store.claim(job_id, owner, DELIVERY), worker.Job), 30, description="a job that is due")
    take_away(runtime, job_id)
    store.complete(claim(runtime, job_id, next(owners)), {}, None)
    store.mark_notified([(job_id, "e")])
    recorder.end()
    kinds = [step.kind for step in fold(recorder.events[job_id])]
    assert kinds == [
        *("insert", "claimed", "renewed", "released", "claimed", "handed back"),
        *("claimed", "put off", "claimed", "rescued", "claimed", "completed", "noticed"),
    ]


def test_the_same_seed_gives_the_same_jobs_and_faults() -> None:
    assert make_plans(7, 50) == make_plans(7, 50) != make_plans(8, 50)
    faults = [faults_of_processes(Options(1, 1, minutes=1, seed=seed, hurry=1)) for seed in (7, 7, 8)]
    assert faults[0] == faults[1] != faults[2]


# ── the audit ────────────────────────────────────────────────────────────────────────────────────────────────────

PROMPT = "chaos-1-00000 something"
OPTIONS = Options(jobs=1, workers=1, minutes=1, seed=1, hurry=1)


def step(at: float, kind: str, status: str, owner: str | None = "a") -> Step:
    return Step(at, kind, status, owner, 11, 1, ())


def call(at: float) -> Call:
    return Call("/v1/chat/completions", PROMPT, "m", {}, None, at)


def a_good_history() -> History:
    plan = JobPlan(0, TEXT, {"prompt": PROMPT}, PROMPT)
    text = "".join(words_for(Plan(PROMPT, {})))
    document = {"status": "completed", "output_data": {"generated_text": text}, "artifact_url": None}
    steps = [step(0, "insert", "pending", None), step(1, "claimed", "processing")]
    steps += [step(3, "completed", "completed"), step(4, "noticed", "completed")]
    notices = [Notice(1.1, "", "processing"), Notice(3.1, "", "completed")]
    return History(plan, ObjectId(), document, steps, notices, [call(1.5)])


def evidence_of(history: History) -> Evidence:
    logs = {"worker.log": "job=1 started"}
    return Evidence(OPTIONS, {history.job_id: history}, [], [], {}, set(), [], logs, "exit code 0: ", 1.0)


def lose(history: History) -> None:
    history.steps[2:2] = [step(1.6, "rescued", "processing", None), step(2, "claimed", "processing", "b")]


def cancel(history: History) -> None:
    history.document = {"status": "failed", "error_message": CANCEL_SENTENCE}
    history.steps[2] = step(3, CANCELLED, "failed")


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
    "it was published too early": ("is_announced_truthfully", lambda h: h.notices.append(Notice(2, "", "completed"))),
    "it was published as failed too": ("is_announced_truthfully", lambda h: h.notices.append(Notice(5, "", "failed"))),
    "its end was not published": ("is_announced_truthfully", lambda h: h.notices.pop()),
    "its end was published, then its start": (
        "is_announced_truthfully",
        lambda h: h.notices.append(Notice(5, "", "processing")),
    ),
    "it was generated twice": ("is_generated_no_more_than_claimed", lambda h: h.calls.append(call(2))),
    "it was generated after its end": ("is_generated_no_more_than_claimed", lambda h: h.calls.append(call(9))),
    "it was never generated": ("is_generated_no_more_than_claimed", lambda h: h.calls.clear()),
    "a live attempt lost it": ("is_rescued_only_for_a_reason", lose),
}


def checks_that_find(evidence: Evidence) -> set[str]:
    return {line.split(":")[0] for finding in audit(evidence) for line in finding.splitlines()} & {
        check.__name__ for check in (*JOB_CHECKS, *RUN_CHECKS)
    }


def test_a_good_history_passes_the_audit() -> None:
    assert audit(evidence_of(a_good_history())) == []


@pytest.mark.parametrize(("check", "spoil"), JOB_FAULTS.values(), ids=JOB_FAULTS)
def test_the_audit_finds_each_fault_planted_in_the_history_of_a_job(
    check: str, spoil: Callable[[History], object]
) -> None:
    history = a_good_history()
    spoil(history)
    assert check in checks_that_find(evidence_of(history))


def test_a_job_lost_by_a_killed_process_is_no_finding() -> None:
    history = a_good_history()
    lose(history)
    evidence = evidence_of(history)
    evidence.happened = [Happened("kill a child", 1.55, frozenset({11}), 1.55)]
    assert audit(evidence) == []


def test_odd_bookkeeping_that_a_cancel_left_is_no_finding() -> None:
    history = a_good_history()
    cancel(history)
    del history.steps[3:], history.notices[1:]
    history.document["worker"] = ["odd"]
    assert audit(evidence_of(history)) == []


def test_an_end_published_while_the_subscriber_was_away_is_no_finding() -> None:
    history = a_good_history()
    history.notices.pop()
    evidence = evidence_of(history)
    evidence.gaps.append((2.9, 3.2))
    assert audit(evidence) == []


RUN_FAULTS: dict[str, tuple[str, Callable[[Evidence], object]]] = {
    "a file without a job": ("every_artifact_has_a_job", lambda e: e.files.update({"stray.png": b"x"})),
    "chunks without a file": ("every_artifact_has_a_job", lambda e: e.chunk_owners.add("stray.png")),
    "a worker that broke down": ("every_worker_ends_well", lambda e: e.fleet_faults.append("exit code 1")),
    "a recovery that failed": ("every_worker_ends_well", lambda e: setattr(e, "recovered", "exit code 1")),
    "a key in a log": ("logs_have_no_secret_and_no_stack_trace", lambda e: e.logs.update(a=PLANTED_KEY)),
    "a prompt in a log": ("logs_have_no_secret_and_no_stack_trace", lambda e: e.logs.update(a=PROMPT)),
}


@pytest.mark.parametrize(("check", "spoil"), RUN_FAULTS.values(), ids=RUN_FAULTS)
def test_the_audit_finds_each_fault_planted_in_a_run(check: str, spoil: Callable[[Evidence], object]) -> None:
    evidence = evidence_of(a_good_history())
    spoil(evidence)
    assert check in checks_that_find(evidence)


@pytest.mark.parametrize("file", ["worker.py", "workerkit/broker.py", "worker_commands/run.py"])
def test_the_audit_finds_a_stack_trace_through_any_file_of_the_worker(file: str) -> None:
    trace = f'Traceback (most recent call last):\n  File "{SOURCE / file}", line 1, in claim\nKeyError: 1\n'
    evidence = evidence_of(a_good_history())
    evidence.logs["worker.log"] += trace
    assert checks_that_find(evidence) == {"logs_have_no_secret_and_no_stack_trace"}
    evidence.logs["worker.log"] = trace.replace(str(SOURCE), "/elsewhere")
    assert audit(evidence) == []


@pytest.mark.parametrize("stored", [None, b"half a pictu"], ids=["missing", "damaged"])
def test_the_audit_finds_a_picture_that_is_missing_or_damaged(stored: bytes | None) -> None:
    history = a_good_history()
    history.plan = JobPlan(0, IMAGE, {"size": "32x32"}, PROMPT)
    url = "/artifacts/a.png"
    history.document.update(output_data={"image_url": url, "resolution": "32x32"}, artifact_url=url)
    evidence = evidence_of(history)
    evidence.files = {"a.png": stored} if stored else {}
    assert "has_its_result" in checks_that_find(evidence)
