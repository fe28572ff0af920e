"""What `metrics` counts: each end once and none missed, whatever happens between two scrapes and during one."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from bson import ObjectId
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from redis.exceptions import ResponseError

import worker
from testbed.processes import poll
from tests.lab import IMAGE, NOWHERE, TEXT, Ago, ago, change, claim, insert, read, table
from tests.test_status import KEY_REASON, ODD, PLACES, attempt, ended
from worker import Runtime
from worker_commands import counts, exporter
from worker_commands.active import read_processing
from worker_commands.counts import Counts, Durations, LabelValues
from worker_commands.exporter import BrokerSeen, BrokerWatch, Ends, Exporter
from worker_commands.fleet import Fleet
from worker_commands.lives import INDEXES, Failure, Life, Outcome, Usage, ended_between
from workerkit.attempts import COMPLETED, ENDS, RETRIED, AttemptRecord
from workerkit.errors import StoreRefused, StoreUnavailable
from workerkit.mongodb import make_indexes
from workerkit.sentences import STOPPED
from workerkit.values import as_time

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Scraper:
    """Scrapes an exporter as Prometheus does, by its text format."""

    def __init__(self, runtime: Runtime, new_for_s: float = 0.0) -> None:
        self.broker = BrokerWatch(runtime)
        self.exporter = Exporter(runtime, self.broker, new_for_s)
        self.exporter.FRESH_S = 0.0
        self._registry = CollectorRegistry()
        self._registry.register(self.exporter)
        self.samples: Samples = {}

    def scrape(self) -> Scraper:
        families = text_string_to_metric_families(generate_latest(self._registry).decode())
        samples = [sample for family in families for sample in family.samples]
        self.samples = {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}
        return self

    def value(self, name: str, **labels: str) -> float | None:
        """The sum of the samples that have these labels; None if there are none."""
        found = [
            value
            for (sample, own), value in self.samples.items()
            if sample == f"ai_worker_{name}" and labels.items() <= dict(own).items()
        ]
        return sum(found) if found else None

    def ended(self) -> dict[str, float]:
        """How many jobs have ended, by their outcome."""
        return {outcome.value: self.value("jobs_ended_total", outcome=outcome) or 0.0 for outcome in Outcome}


@pytest.fixture
def scraper(light_runtime: Runtime) -> Scraper:
    """An exporter that has been scraped once."""
    return Scraper(light_runtime).scrape()


@pytest.fixture
def real_scraper(runtime: Runtime) -> Scraper:
    return Scraper(runtime).scrape()


OUTPUT = {"generated_text": "x", "model_used": "m-1", "tokens_used": 30, "prompt_tokens": 10, "completion_tokens": 20}


def pass_a_moment(runtime: Runtime, job_id: ObjectId) -> None:
    """Waits until the clock is behind the job's end. Here a whole life fits into one millisecond."""
    end = as_time(read(runtime, job_id)["completed_at"])
    poll(lambda: end and runtime.store.now() > end, 5, interval_s=0.001)


def complete(runtime: Runtime, job_id: ObjectId | None = None, owner: str = "", **output: object) -> ObjectId:
    """Claims a job, or a new one, and completes it."""
    job = claim(runtime, job_id, owner or str(ObjectId()))
    record = AttemptRecord(job.attempt, COMPLETED, waited_s=0.1, ran_s=1.0)
    assert runtime.store.complete(replace(job, attempts=(record,)), {**OUTPUT, **output}, None)
    pass_a_moment(runtime, job.id)
    return job.id


def put_back(runtime: Runtime, job_id: ObjectId) -> None:
    """Puts a job back to be tried again, as the API does."""
    pass_a_moment(runtime, job_id)
    change(runtime, job_id, status="pending", updated_at=ago(0))


# ── each end once ────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_ended_before_the_exporter_began_is_not_counted(light_runtime: Runtime) -> None:
    complete(light_runtime)
    assert Scraper(light_runtime).scrape().ended() == {"completed": 0, "failed": 0, "cancelled": 0}


def test_each_end_is_counted_once_over_many_scrapes(light_runtime: Runtime, scraper: Scraper) -> None:
    for number in range(1, 4):
        complete(light_runtime)
        assert scraper.scrape().ended()["completed"] == number
        assert scraper.scrape().ended()["completed"] == number
    assert (scraper.value("tokens_total", kind="prompt"), scraper.value("tokens_total", model="m-1")) == (30, 90)


@table(
    "created_at, job_id",
    ("an hour behind", Ago(3600), ObjectId("650000000000000000000000")),
    ("an hour ahead", Ago(-3600), ObjectId("ff0000000000000000000000")),
)
def test_a_job_that_begins_and_ends_between_two_scrapes_is_counted_whatever_the_apis_clock_says(
    light_runtime: Runtime, scraper: Scraper, created_at: Ago, job_id: ObjectId
) -> None:
    complete(light_runtime, insert(light_runtime, _id=job_id, created_at=created_at))
    assert scraper.scrape().ended()["completed"] == 1


def test_an_old_job_that_is_tried_again_is_counted_again_though_no_scrape_saw_it_active(
    light_runtime: Runtime, scraper: Scraper
) -> None:
    job_id = complete(light_runtime, insert(light_runtime, _id=ObjectId("650000000000000000000000")))
    scraper.scrape()
    for _ in range(2):  # both between two scrapes
        put_back(light_runtime, job_id)
        complete(light_runtime, job_id)
    assert scraper.scrape().ended()["completed"] == 3
    assert scraper.value("tokens_total", model="m-1") == 90


@table(
    "fields",
    ("it runs", {}),
    ("it is pending, and has its end still", None),
    ("it was cancelled then", {"status": "failed"}),
)
def test_a_life_that_ended_between_two_scrapes_is_counted_though_the_next_has_begun(
    light_runtime: Runtime, scraper: Scraper, fields: dict[str, Any] | None
) -> None:
    job_id = insert(light_runtime)
    scraper.scrape()
    complete(light_runtime, job_id)
    put_back(light_runtime, job_id)
    if fields is not None:
        change(light_runtime, claim(light_runtime, job_id, "next").id, **fields)
    assert scraper.scrape().ended()["completed"] == 1
    assert scraper.scrape().ended()["completed"] == 1


def test_an_end_that_becomes_visible_late_is_counted(light_runtime: Runtime, scraper: Scraper) -> None:
    """MongoDB was frozen, for example, and makes the write a minute later."""
    begun_at = light_runtime.store.now()
    complete(light_runtime)
    scraper.scrape()
    change(light_runtime, complete(light_runtime), completed_at=begun_at)
    assert scraper.scrape().ended()["completed"] == 2


def test_an_end_is_counted_though_the_document_is_deleted_later(light_runtime: Runtime, scraper: Scraper) -> None:
    complete(light_runtime)
    scraper.scrape()
    light_runtime.database["jobs"].delete_many({})
    assert scraper.scrape().ended()["completed"] == 1


@table("is_running", ("while it is pending", False), ("while it runs", True))
def test_a_job_that_the_api_cancels_is_counted_as_cancelled(
    light_runtime: Runtime, scraper: Scraper, is_running: bool
) -> None:
    job_id = claim(light_runtime).id if is_running else insert(light_runtime)
    scraper.scrape()
    change(light_runtime, job_id, status="failed", error_message="Cancelled.")
    assert scraper.scrape().ended() == {"completed": 0, "failed": 0, "cancelled": 1}
    assert scraper.scrape().ended()["cancelled"] == 1


def test_a_job_that_is_cancelled_between_two_attempts_and_put_back_is_counted_once(
    light_runtime: Runtime, scraper: Scraper
) -> None:
    job, now = claim(light_runtime), light_runtime.store.now()
    record = AttemptRecord(1, RETRIED, ended_at=now, error="RetryJob", reason="HTTP 503")
    assert light_runtime.store.release(replace(job, attempts=(record,)), now, counted=True)
    scraper.scrape()
    change(light_runtime, job.id, status="failed", error_message="Cancelled.")
    assert scraper.scrape().ended() == {"completed": 0, "failed": 0, "cancelled": 1}
    change(light_runtime, job.id, status="pending", updated_at=ago(0))
    claim(light_runtime, job.id, "next")
    assert scraper.scrape().ended() == {"completed": 0, "failed": 0, "cancelled": 1}


def test_a_life_whose_end_the_api_resets_is_counted_once(light_runtime: Runtime, scraper: Scraper) -> None:
    job_id = complete(light_runtime)
    assert scraper.scrape().ended()["completed"] == 1
    change(light_runtime, job_id, status="pending", completed_at=None, updated_at=ago(0))
    claim(light_runtime, job_id, "next")
    assert scraper.scrape().ended() == {"completed": 1, "failed": 0, "cancelled": 0}


def test_a_job_that_an_operator_cancels_is_counted_as_cancelled(light_runtime: Runtime, scraper: Scraper) -> None:
    assert light_runtime.store.fail_unowned(insert(light_runtime), STOPPED)
    assert scraper.scrape().ended() == {"completed": 0, "failed": 0, "cancelled": 1}
    assert scraper.value("job_failures_total") is None


def test_what_ended_while_mongodb_was_away_for_longer_than_the_overlap_is_counted(
    light_runtime: Runtime, scraper: Scraper, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(light_runtime, complete(light_runtime), completed_at=light_runtime.store.now())
    later = light_runtime.store.now() + timedelta(hours=2)
    monkeypatch.setattr(light_runtime.store, "now", lambda: later)
    assert scraper.scrape().ended()["completed"] == 1


def test_a_clock_that_a_new_primary_sets_back_hides_no_end(
    light_runtime: Runtime, scraper: Scraper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter.Ends, "OVERLAP_S", 1.0)
    real_now = light_runtime.store.now

    def now_in(minutes: float) -> datetime:
        return real_now() + timedelta(minutes=minutes)

    for minutes in (10, 12, 14, 5, 6):  # since the exporter began
        monkeypatch.setattr(light_runtime.store, "now", partial(now_in, minutes))
        complete(light_runtime)
        scraper.scrape()
    assert scraper.ended()["completed"] == 5


def test_what_is_too_much_for_one_scrape_comes_with_the_next_ones(
    light_runtime: Runtime, scraper: Scraper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter.Ends, "READ_FOR_S", -1.0)
    begun_at = light_runtime.store.now()
    for number in range(5):
        change(light_runtime, complete(light_runtime), completed_at=begun_at + timedelta(seconds=1 + number))
    seen = [scraper.scrape().ended()["completed"] for _ in range(8)]
    assert seen == sorted(seen)
    assert (seen[0] < 5, seen[-1]) == (True, 5)


class Breaking:
    """A collection whose queries break off after so many documents."""

    def __init__(self, jobs: Any, after: int) -> None:
        self._jobs, self._left = jobs, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jobs, name)

    def with_options(self, *_: object) -> Breaking:
        return self

    def find(self, *arguments: Any, **options: Any) -> Any:
        return BreakingCursor(self, self._jobs.find(*arguments, **options))

    def count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise StoreUnavailable("it broke off")


class BreakingCursor:
    def __init__(self, owner: Breaking, found: Any) -> None:
        self._owner, self._found = owner, found

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: BreakingCursor(self._owner, getattr(self._found, name)(*arguments))

    def __enter__(self) -> BreakingCursor:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __iter__(self) -> BreakingCursor:
        return self

    def __next__(self) -> Any:
        self._owner.count()
        return next(self._found)


class Chaos:
    """Jobs that live and end at random, and what an exporter should have counted by now."""

    def __init__(self, runtime: Runtime, seed: int) -> None:
        self.random, self._runtime = random.Random(seed), runtime
        self._jobs, self.expected = runtime.database["jobs"], Counter[str]()

    def step(self) -> None:
        """Does something to a job of which the next state is possible."""
        act = self.random.choice([self._insert, self._insert, self._claim, self._end, self._end, self._put_back])
        act()

    def _pick(self, *statuses: str) -> ObjectId | None:
        ids = [job["_id"] for job in self._jobs.find({"status": {"$in": statuses}}, {"_id": 1})]
        return self.random.choice(ids) if ids else None

    def _insert(self) -> None:
        insert(self._runtime, created_at=ago(self.random.uniform(-3600, 3600)))

    def _claim(self) -> None:
        if job_id := self._pick("pending"):
            claim(self._runtime, job_id, str(ObjectId()))

    def _end(self) -> None:
        if job_id := self._pick("processing"):
            owner = str(read(self._runtime, job_id)["worker"]["owner"])
            job = self._runtime.store._job(read(self._runtime, job_id))
            assert job.owner == owner
            if self.random.random() < 0.5:
                assert self._runtime.store.complete(job, OUTPUT, None)
                self.expected["completed"] += 1
            else:
                assert self._runtime.store.fail(job, "No.")
                self.expected["failed"] += 1

    def _put_back(self) -> None:
        job_id = self._pick("completed", "failed")
        if job_id and read(self._runtime, job_id)["completed_at"]:  # of a cancel that is put back nothing remains
            put_back(self._runtime, job_id)

    def cancel_one_that_was_seen(self, seen: set[ObjectId]) -> None:
        """As the API does. The exporter can only know of a cancel if it has seen the job before."""
        job_id = self._pick("processing")
        if job_id in seen and job_id:
            change(self._runtime, job_id, status="failed", error_message="Cancelled.")
            self.expected["cancelled"] += 1


@pytest.mark.parametrize("seed", range(12))
def test_whatever_jobs_do_and_wherever_scrapes_break_off_each_end_is_counted_once(
    light_runtime: Runtime, seed: int
) -> None:
    chaos, jobs, now = Chaos(light_runtime, seed), light_runtime.database["jobs"], light_runtime.store.now
    ends, found = Ends(jobs, now()), Counter[str]()

    def scrape(source: Any) -> bool:
        ends._jobs = source
        try:
            for life in ends.read(now(), list(read_processing(jobs, now()))):
                found[life.outcome] += 1
        except StoreUnavailable:
            return False
        return True

    seen: set[ObjectId] = set()
    for _ in range(150):
        chaos.step()
        if chaos.random.random() < 0.1:
            chaos.cancel_one_that_was_seen(seen)
        if chaos.random.random() < 0.3 and scrape(Breaking(jobs, chaos.random.randrange(20))):
            seen = {job["_id"] for job in jobs.find({"status": {"$in": ["pending", "processing"]}}, {"_id": 1})}
    assert scrape(jobs)
    assert found == chaos.expected
    assert sum(chaos.expected.values()) > 10


def test_ends_are_read_by_their_index_and_active_jobs_without_a_document(
    runtime: Runtime, real_scraper: Scraper
) -> None:
    """The collection is as in production: old jobs, and the API's own indexes."""
    jobs = runtime.database["jobs"]
    runtime.store.ensure_indexes()
    make_indexes(jobs, INDEXES)
    for name in ("status", "created_at"):
        jobs.create_index(name)
    old = {"status": "completed", "created_at": ago(10**6), "completed_at": ago(10**6)}
    jobs.insert_many([{**old, "number": number} for number in range(500)])
    plan = jobs.find(ended_between(ago(60), ago(-60), has_index=True)).sort("completed_at", 1).explain()
    assert plan["executionStats"]["totalKeysExamined"] == 0
    assert "worker_ended" in str(plan["queryPlanner"]["winningPlan"])
    plan = jobs.find(exporter.ACTIVE, {"_id": 1, "status": 1}).explain()
    assert (plan["executionStats"]["totalDocsExamined"], plan["executionStats"]["totalKeysExamined"] < 10) == (0, True)
    jobs.drop_indexes()


def test_the_index_of_ends_holds_no_job_that_has_not_ended(runtime: Runtime) -> None:
    jobs = runtime.database["jobs"]
    make_indexes(jobs, INDEXES)
    insert(runtime, completed_at=None)
    stats = runtime.database.command("validate", "jobs")
    assert stats["keysPerIndex"]["worker_ended"] == 0
    complete(runtime)
    assert runtime.database.command("validate", "jobs")["keysPerIndex"]["worker_ended"] == 1
    jobs.drop_indexes()


# ── what is counted ──────────────────────────────────────────────────────────────────────────────────────────────


def test_attempts_count_by_how_they_ended_with_their_waits_and_run_times(
    light_runtime: Runtime, scraper: Scraper
) -> None:
    attempts = [attempt("retried", waited_s=0.2, ran_s=30.5), attempt("lost", waited_s=None, ran_s=None), attempt()]
    ended(light_runtime, *attempts, minutes=-0.01, status="completed")
    scraper.scrape()
    seen = {end: scraper.value("attempts_ended_total", end=end, type=TEXT) for end in ENDS}
    assert seen == {"completed": 1, "failed": 0, "retried": 1, "handed_back": 0, "abandoned": 0, "lost": 1}
    for name, total, below, count in (("wait", 0.7, "0.25", 1), ("run", 32.5, "2.5", 1), ("run", 32.5, "45.0", 2)):
        assert scraper.value(f"attempt_{name}_seconds_sum", type=TEXT) == pytest.approx(total)
        assert scraper.value(f"attempt_{name}_seconds_bucket", type=TEXT, le=below) == count
        assert scraper.value(f"attempt_{name}_seconds_count", type=TEXT) == 2


def test_a_failure_counts_by_the_head_of_the_workers_reason(light_runtime: Runtime, scraper: Scraper) -> None:
    fault = attempt("failed", is_operators=True, reason=KEY_REASON, error="OperatorFault")
    ended(light_runtime, fault, minutes=-0.01)
    ended(light_runtime, attempt("failed", reason="HTTP 503", error="RetryJob"), minutes=-0.02)
    scraper.scrape()
    labels = {"reason": "HTTP 401 invalid_api_key", "error": "OperatorFault", "operators": "true"}
    assert scraper.value("job_failures_total", **labels) == 1
    assert scraper.value("job_failures_total", reason="HTTP 503", error="RetryJob", operators="false") == 1
    assert scraper.value("operator_faults_total") == 1


def test_no_words_of_a_person_or_of_the_api_become_a_label(light_runtime: Runtime, scraper: Scraper) -> None:
    fields: dict[str, Any] = {"minutes": -0.01, "user_id": "planted-user", "input_data": {"prompt": "planted prompt"}}
    ended(light_runtime, error_message="planted sentence", **fields)
    scraper.scrape()
    assert scraper.value("job_failures_total", reason="not known") == 1
    assert "planted" not in str(scraper.samples)


def test_pictures_and_sound_count_by_model(light_runtime: Runtime, scraper: Scraper) -> None:
    complete(light_runtime, model_used="m-2", resolution="64x64")
    complete(light_runtime, model_used="m-3", duration_seconds=2.5)
    scraper.scrape()
    assert scraper.value("pictures_total", model="m-2") == 1
    assert scraper.value("sound_seconds_total", model="m-3") == 2.5


def test_counters_of_known_types_begin_at_zero(scraper: Scraper) -> None:
    """Otherwise Prometheus would not see their first increase."""
    assert scraper.value("jobs_ended_total", outcome="failed", type=IMAGE) == 0
    assert scraper.value("attempt_run_seconds_bucket", type=IMAGE, le="+Inf") == 0
    assert scraper.value("operator_faults_total") == 0


def test_a_new_series_shows_zero_for_a_while_so_that_its_first_increase_is_seen(
    light_runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    scraper = Scraper(light_runtime, new_for_s=75.0).scrape()
    complete(light_runtime)
    ended(light_runtime, attempt("failed", is_operators=True, reason=KEY_REASON), minutes=-0.01)
    scraper.scrape()
    assert (scraper.value("tokens_total"), scraper.value("job_failures_total")) == (0, 0)
    assert (scraper.ended()["completed"], scraper.value("operator_faults_total")) == (1, 1)
    later = time.monotonic() + 76
    monkeypatch.setattr(counts, "time", SimpleNamespace(monotonic=lambda: later))
    scraper.scrape()
    assert (scraper.value("tokens_total"), scraper.value("job_failures_total")) == (30, 1)


@table(
    "text, value",
    ("a name", "gpt-5", "gpt-5"),
    ("none", "", "not known"),
    ("one that is long", "x" * 200, "x" * counts.MAX_LABEL_CHARACTERS),
    ("what steers a terminal", "\x1b[2Ja\n", "[2Ja"),
    ("half a character", "a\ud800", "a"),
)
def test_a_label_is_short_and_printable(text: str, value: str) -> None:
    assert LabelValues(5).name(text) == value


def test_a_label_has_a_bounded_number_of_values() -> None:
    values = LabelValues(3, known=["a"])
    assert [values.name(name) for name in "abcdeab"] == ["a", "b", "c", "other", "other", "a", "b"]


def test_no_flood_of_reasons_hides_one_of_the_operators() -> None:
    counted = Counts([TEXT])
    for number in range(2 * counts.MAX_REASONS):
        failure = Failure(f"a picture of {number}x{number}", error="FailJob")
        counted.add(Life(number, TEXT, ago(0), Outcome.FAILED, Usage(), failure))
    counted.add(Life(1, TEXT, ago(0), Outcome.FAILED, Usage(), Failure("HTTP 401", "", "OperatorFault", True)))
    assert len(counted.failures.values) == counts.MAX_REASONS + 2
    assert counted.failures.values["HTTP 401", "OperatorFault", "true"] == 1


def test_a_histograms_buckets_hold_what_is_at_most_their_bound() -> None:
    durations = Durations((1, 2), ["t"])
    for seconds in (0.5, 1.0, 1.5, 3.0):
        durations.add("t", seconds)
    samples = {sample.labels.get("le"): sample.value for sample in durations.family("x", "Help.").samples}
    assert samples == {"1.0": 2, "2.0": 3, "+Inf": 4, None: 6.0}


@pytest.mark.parametrize("place", PLACES)
def test_a_document_may_hold_anything(runtime: Runtime, real_scraper: Scraper, place: str) -> None:
    jobs = runtime.database["jobs"]
    make_indexes(jobs, INDEXES)
    for value in ODD:
        for name in ("pending", "processing", "completed", "failed"):
            job_id = ended(runtime, attempt(), minutes=-0.01, status=name)
            jobs.update_one({"_id": job_id}, {"$set": {place: value}})
    jobs.insert_one({"_id": {"a": 1}, "status": "completed", "completed_at": ago(0)})
    for _ in range(2):
        seen = real_scraper.scrape()
        assert seen.value("mongodb_up") == 1
        assert seen.value("jobs", state="pending") == len(ODD)
        # Those that are active have an end of a former life, which was not counted before.
        assert sum(seen.ended().values()) >= 4 * len(ODD)


# ── jobs that haven't ended ──────────────────────────────────────────────────────────────────────────────────────


def test_active_jobs_are_shown_by_state_and_type(light_runtime: Runtime, scraper: Scraper) -> None:
    for kind in (TEXT, TEXT, IMAGE):
        insert(light_runtime, job_type=kind, created_at=ago(100), updated_at=ago(100))
    claim(light_runtime)
    now = light_runtime.store.now()
    light_runtime.store.release(claim(light_runtime, owner="b"), now + timedelta(seconds=60), counted=True)
    change(light_runtime, claim(light_runtime, owner="c").id, worker__lease_until=ago(5))
    scraper.scrape()
    seen = {state: scraper.value("jobs", state=state, type=TEXT) for state in ("pending", "running", "unowned")}
    assert seen == {"pending": 2, "running": 1, "unowned": 1}
    assert (scraper.value("jobs", state="waiting_to_retry"), scraper.value("slots_busy")) == (1, 1)
    assert scraper.value("oldest_pending_age_seconds", type=IMAGE) == pytest.approx(100, abs=30)
    assert scraper.value("oldest_pending_age_seconds", type="audio_generation") == 0


# ── servers that are away ────────────────────────────────────────────────────────────────────────────────────────


def test_while_mongodb_is_away_nothing_old_is_shown_but_the_counters_stay(
    light_runtime: Runtime, scraper: Scraper, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete(light_runtime)
    insert(light_runtime)
    assert scraper.scrape().value("jobs", state="pending") == 1

    def fail(*_: object) -> None:
        raise StoreUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(exporter, "read_pending", fail)
        scraper.scrape()
    assert (scraper.value("mongodb_up"), scraper.value("jobs"), scraper.value("slots_busy")) == (0, None, None)
    assert scraper.ended()["completed"] == 1
    assert (scraper.scrape().value("mongodb_up"), scraper.value("jobs", state="pending")) == (1, 1)


def test_an_exporter_that_starts_without_mongodb_begins_to_count_once_it_is_there(
    light_runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    scraper = Scraper(light_runtime)

    def fail(*_: object, **__: object) -> None:
        raise StoreUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(exporter, "Ends", fail)
        assert scraper.scrape().value("mongodb_up") == 0
    complete(light_runtime)
    assert scraper.scrape().ended()["completed"] == 0
    complete(light_runtime)
    assert scraper.scrape().ended()["completed"] == 1


def test_what_the_broker_said_is_shown_with_the_workers(light_runtime: Runtime, scraper: Scraper) -> None:
    for _ in range(2):
        light_runtime.broker.send("waiting")
    scraper.broker.look()
    scraper.scrape()
    assert (scraper.value("broker_up"), scraper.value("queue_messages", queue="ai_jobs")) == (1, 2)
    assert (scraper.value("workers_alive"), scraper.value("slots")) == (0, 0)


def test_a_broker_that_is_away_leaves_out_what_it_would_say(light_runtime: Runtime, scraper: Scraper) -> None:
    worker.app.conf.update(broker_write_url=f"redis://{NOWHERE}")
    scraper.broker.look()
    scraper.scrape()
    assert (scraper.value("broker_up"), scraper.value("queue_messages"), scraper.value("workers_alive")) == (
        0,
        None,
        None,
    )
    assert scraper.value("mongodb_up") == 1


def test_a_broker_that_fails_in_an_unknown_way_is_not_up(
    light_runtime: Runtime, scraper: Scraper, monkeypatch: pytest.MonkeyPatch
) -> None:
    scraper.broker.look()
    monkeypatch.setattr(light_runtime.broker, "queue_length", lambda: 1 // 0)
    scraper.broker.look()
    assert scraper.scrape().value("broker_up") == 0


def test_where_the_broker_refuses_remote_control_leases_and_the_search_for_lost_jobs_tell_of_workers(
    light_runtime: Runtime, scraper: Scraper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ResponseError("NOPERM")

    monkeypatch.setattr(exporter, "ask_fleet", refuse)
    scraper.broker.look()
    assert (scraper.scrape().value("broker_up"), scraper.value("workers_alive")) == (1, 0)
    light_runtime.turns.take("sweep", 15)
    assert (scraper.scrape().value("workers_alive"), scraper.value("slots")) == (1, None)
    claim(light_runtime, owner="a")
    change(light_runtime, claim(light_runtime, owner="b").id, worker__node="b-22222222")
    assert scraper.scrape().value("workers_alive") == 2


def test_what_the_broker_said_long_ago_is_not_shown(
    light_runtime: Runtime, scraper: Scraper, monkeypatch: pytest.MonkeyPatch
) -> None:
    scraper.broker.look()
    monkeypatch.setattr(BrokerWatch, "MAX_AGE_S", 0.0)
    assert scraper.scrape().value("broker_up") is None


@table(
    "fleet, swept, alive",
    ("a silent worker with a job", Fleet(), False, 1),
    ("one that answered, and a silent one", Fleet(("worker-11111111@a",), 2), False, 2),
)
def test_workers_alive_are_those_that_answer_and_those_that_hold_jobs(
    light_runtime: Runtime, scraper: Scraper, fleet: Fleet, swept: bool, alive: int
) -> None:
    claim(light_runtime)
    scraper.broker._seen = BrokerSeen(1e12, 0, fleet)
    assert scraper.scrape().value("workers_alive") == alive


def test_workers_that_never_answer_but_look_for_lost_jobs_are_alive(light_runtime: Runtime, scraper: Scraper) -> None:
    scraper.broker._seen = BrokerSeen(1e12, 0, Fleet())
    assert scraper.scrape().value("workers_alive") == 0
    light_runtime.turns.take("sweep", 15)
    assert scraper.scrape().value("workers_alive") == 1


# ── scrapes at the same time ─────────────────────────────────────────────────────────────────────────────────────


def test_scrapes_at_the_same_time_count_nothing_twice(runtime: Runtime, real_scraper: Scraper) -> None:
    for _ in range(20):
        complete(runtime)
    threads = [threading.Thread(target=real_scraper.scrape) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert real_scraper.scrape().ended()["completed"] == 20


def test_scrapes_within_a_second_share_one_reading(
    light_runtime: Runtime, scraper: Scraper, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings: list[int] = []
    scraper.exporter.FRESH_S = 60.0
    monkeypatch.setattr(scraper.exporter, "_read_jobs", lambda: readings.append(1))
    for _ in range(3):
        scraper.scrape()
    assert readings == []


# ── the index ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_exporter_makes_the_index_of_ends_where_no_worker_has(runtime: Runtime) -> None:
    runtime.database["jobs"].drop_indexes()
    Exporter(runtime, BrokerWatch(runtime))._make_index()
    assert "worker_ended" in runtime.database["jobs"].index_information()
    runtime.database["jobs"].drop_indexes()


def test_without_the_right_to_make_the_index_ends_are_found_by_the_creation_of_jobs(
    light_runtime: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise StoreRefused("MongoDB refuses it: OperationFailure 13")

    monkeypatch.setattr(exporter, "make_indexes", refuse)
    scraper = Scraper(light_runtime).scrape()
    scraper.exporter._make_index()
    assert "the index of ended jobs can't be made, so reading takes longer" in caplog.text
    complete(light_runtime, insert(light_runtime, created_at=ago(3600)))
    assert scraper.scrape().ended()["completed"] == 1
