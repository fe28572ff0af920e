"""`status`: what needs a person and what to do, how jobs and workers stand, and what it says when it can't know."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from rich.console import Console

import worker
from testbed.api import Api
from testbed.processes import SOURCE, free_port, poll
from testbed.terminals import open_terminal
from tests.lab import AUDIO, IMAGE, NOWHERE, SECRET, TEXT, Ago, ago, bare_settings, change, claim, insert, table
from tests.site import StartWorker, run_forked, run_impatiently
from worker import Runtime
from worker_commands import overview
from worker_commands.findings import Finding
from worker_commands.fleet import Fleet, count_alive, queues_of, slots_of
from worker_commands.lives import last_life
from worker_commands.overview import Overview, find_needs, group_failures, judge_workers, percentile, read_jobs
from worker_commands.status import Page, status
from worker_commands.terminal import EXIT_INTERRUPTED, duration_text
from workerkit.attempts import LOST_REASON

FIVE_MINUTES = timedelta(minutes=5)
FINE = Finding("", "")
ASKED = Fleet(("worker-0a1b2c3d@host",), slots=2)
KEY_REASON = "HTTP 401 invalid_api_key: check the provider's key (TEXT_API_KEY or OPENAI_API_KEY)"


def attempt(end: str = "completed", **fields: object) -> dict[str, Any]:
    """An attempt as a worker notes it, with a wait of half a second and a run of two."""
    return {"attempt": 1, "end": end, "ended_at": ago(60), "waited_s": 0.5, "ran_s": 2.0, **fields}


def ended(runtime: Runtime, *attempts: dict[str, Any], minutes: float = 1, **fields: object) -> ObjectId:
    """A job that has failed so many minutes ago, after these attempts; fields replace the usual ones."""
    at = ago(minutes * 60)
    usual = {"status": "failed", "created_at": at, "started_at": at, "completed_at": at, "error_message": "No."}
    own = {"worker": {"attempt": len(attempts), "attempts": list(attempts)}} if attempts else {}
    return insert(runtime, **{**usual, **own, **fields})


def operator_fault(runtime: Runtime, minutes: float = 1, reason: str = KEY_REASON) -> ObjectId:
    return ended(runtime, attempt("failed", is_operators=True, reason=reason, error="OperatorFault"), minutes=minutes)


def look(runtime: Runtime, fleet: Fleet | None = ASKED, broker: Finding = FINE, control: Finding = FINE) -> Overview:
    """What is seen where these workers answered."""
    length = None if broker.is_fault else 0
    return Overview("ai_jobs", read_jobs(runtime), FINE, length, broker, fleet, control)


def kinds(seen: Overview) -> list[str]:
    return [need.kind for need in find_needs(seen, judge_workers(seen), FIVE_MINUTES)]


Shown = Callable[..., str]


@pytest.fixture
def shown(light_runtime: Runtime) -> Shown:
    """The page as text, in so many columns."""

    def shown(columns: int = 80, fleet: Fleet | None = ASKED, **findings: Finding) -> str:
        console = Console(width=columns)
        with console.capture() as captured:
            console.print(Page(console, look(light_runtime, fleet, **findings), FIVE_MINUTES))
        return captured.get()

    return shown


# ── what needs a person ──────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_needs_anybody_where_a_worker_is_alive_and_all_goes_well(light_runtime: Runtime, shown: Shown) -> None:
    ended(light_runtime, attempt(), status="completed", error_message=None)
    assert kinds(look(light_runtime)) == []
    assert shown().startswith("Nothing needs you.")


@table(
    "fleet, says",
    ("none answers", Fleet(), "No worker answers, so no job of the queue ai_jobs is worked on."),
    ("only workers of other queues", Fleet(others=2), "No worker takes jobs from the queue ai_jobs."),
)
def test_no_worker_needs_somebody(light_runtime: Runtime, shown: Shown, fleet: Fleet, says: str) -> None:
    assert kinds(look(light_runtime, fleet)) == ["no_worker"]
    assert shown(fleet=fleet).startswith(f"NEEDS YOU: {says}")


def test_workers_that_cannot_be_asked_and_give_no_other_sign_of_life_need_somebody(
    light_runtime: Runtime, shown: Shown
) -> None:
    refused = Finding("workers", "Redis refuses the user PUBLISH", "advice", is_fault=True)
    assert kinds(look(light_runtime, None, control=refused)) == ["no_worker"]
    assert "They can't be asked: Redis refuses the user PUBLISH" in shown(fleet=None, control=refused)


@table("minutes, needed", ("over the limit", 6, ["pending"]), ("within it", 4, []))
def test_a_job_that_is_pending_for_too_long_needs_somebody(
    light_runtime: Runtime, minutes: float, needed: list[str]
) -> None:
    insert(light_runtime, created_at=ago(minutes * 60), updated_at=ago(minutes * 60))
    assert kinds(look(light_runtime)) == needed


def test_a_job_that_was_put_back_waits_since_then(light_runtime: Runtime) -> None:
    insert(light_runtime, created_at=ago(86_400), updated_at=ago(60))
    seen = read_jobs(light_runtime)
    assert seen.oldest_pending_s == pytest.approx(60, abs=30)


@table(
    "fields, fleet, says",
    ("all slots are busy", {}, Fleet(("a",), slots=1), "All slots are busy"),
    ("slots are free", {}, Fleet(("a",), slots=3), "is its message lost"),
    ("no worker is there", {"worker__lease_until": Ago(5)}, Fleet(), "It waits for a worker."),
)
def test_what_to_do_about_a_job_that_waits_depends_on_the_workers(
    light_runtime: Runtime, shown: Shown, fields: dict[str, Any], fleet: Fleet, says: str
) -> None:
    change(light_runtime, claim(light_runtime).id, **fields)
    insert(light_runtime, created_at=ago(600), updated_at=ago(600))
    assert says in shown(fleet=fleet)


def test_jobs_that_wait_for_their_next_try_point_to_the_provider(light_runtime: Runtime, shown: Shown) -> None:
    job = claim(light_runtime)
    light_runtime.store.release(job, light_runtime.store.now() + timedelta(seconds=40), counted=True)
    insert(light_runtime, created_at=ago(600), updated_at=ago(600))
    page = shown()
    assert "so look at the provider first" in " ".join(page.split())
    assert re.search(r"retrying  1 waiting for the next try, the first in (3\d|40) s", page)


@table(
    "minutes, needed", ("a moment ago", 1, ["operators_fault"]), ("over ten minutes ago", 11, []), ("never", None, [])
)
def test_an_operators_fault_of_the_last_ten_minutes_needs_somebody(
    light_runtime: Runtime, minutes: float | None, needed: list[str]
) -> None:
    if minutes:
        operator_fault(light_runtime, minutes)
    ended(light_runtime, attempt("failed", reason="input: size value_error", error="InvalidInput"))
    assert kinds(look(light_runtime)) == needed


def test_an_operators_fault_that_is_tried_again_needs_somebody_too(light_runtime: Runtime) -> None:
    job = claim(light_runtime)
    stored = attempt("retried", is_operators=True, reason="S3 can't be reached", error="NotStored")
    change(light_runtime, job.id, worker__attempts=[stored])
    assert kinds(look(light_runtime)) == ["operators_fault"]


def test_each_operators_fault_is_named_with_its_cause_a_whole_id_and_what_to_do(
    light_runtime: Runtime, shown: Shown
) -> None:
    operator_fault(light_runtime, reason="HTTP 404: set TEXT_MODEL")
    operator_fault(light_runtime, 2)
    job_id = operator_fault(light_runtime, 1)
    page = " ".join(shown().split())
    assert "NEEDS YOU: HTTP 401 invalid_api_key (2 jobs in the last 10 min, such as" in page
    assert str(job_id) in page
    assert "Check the provider's key (TEXT_API_KEY or OPENAI_API_KEY)." in page
    assert "Set TEXT_MODEL." in page


# ── workers ──────────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "names, nodes, alive",
    ("those that answered", ["worker-0a1b2c3d@a", "worker-11111111@a"], [], 2),
    ("those of one name", ["celery@a", "celery@a"], [], 2),
    ("one that answered and holds jobs is one", ["worker-0a1b2c3d@a"], ["a-0a1b2c3d"], 1),
    ("one in the solo pool is silent while it works", ["worker-0a1b2c3d@a"], ["b-22222222"], 2),
    ("a name that can't be compared may be that node's", ["celery@a"], ["a-0a1b2c3d"], 1),
    ("none answers, but jobs have leases", [], ["a-0a1b2c3d", "b-22222222"], 2),
)
def test_workers_are_counted_by_their_answers_and_by_the_leases_of_jobs(
    names: list[str], nodes: list[str], alive: int
) -> None:
    assert count_alive(names, dict.fromkeys(nodes, 1)) == alive


@table(
    "answer, slots",
    ("a pool's size", {"pool": {"max-concurrency": 8}}, 8),
    ("none", {}, 1),
    ("damage", {"pool": {"max-concurrency": "many"}}, 1),
    ("an error", "error", 1),
)
def test_a_workers_slots_are_read_from_its_answer(answer: Any, slots: int) -> None:
    assert slots_of(answer) == slots


@table("answer, names", ("queues", [{"name": "a"}, {"name": "b"}], {"a", "b"}), ("an error", {"error": "x"}, set()))
def test_a_workers_queues_are_read_from_its_answer(answer: Any, names: set[str]) -> None:
    assert queues_of(answer) == names


@table(
    "fleet, swept, says",
    ("they answer", Fleet(("worker-0a1b2c3d@a",), 2), False, "1 alive, 1 of 2 slots busy (1 of"),
    ("one is silent", Fleet(), False, "1 alive, 1 of 1 slots busy (1 of them can't answer while a job runs)"),
    ("none can be asked", None, False, "at least 1 alive, 1 slot busy (they can't be asked: NOPERM)"),
)
def test_the_row_of_workers_says_what_is_known(
    light_runtime: Runtime, shown: Shown, fleet: Fleet | None, swept: bool, says: str
) -> None:
    change(light_runtime, claim(light_runtime).id, worker__node="b-22222222")
    says = says.replace("1 alive, 1 of 2 slots busy (1 of", "2 alive, 1 of 2 slots busy (1 of")
    assert f"workers   {says}" in shown(160, fleet, control=Finding("workers", "NOPERM", is_fault=True))


def test_workers_that_never_answer_but_look_for_lost_jobs_are_alive(light_runtime: Runtime, shown: Shown) -> None:
    light_runtime.turns.take("sweep", 15)
    assert kinds(look(light_runtime, Fleet())) == []
    assert "at least 1 alive" in shown(fleet=Fleet())
    assert kinds(look(light_runtime, Fleet(others=1))) == ["no_worker"]


@table(
    "fields, row",
    ("its lease is live", {}, "running   1"),
    ("its lease ran out", {"worker__lease_until": Ago(5)}, "unowned   1 handed back or lost"),
    ("an older worker has it", {"worker": None}, "running   1"),
    ("its bookkeeping is damaged", {"worker": {"owner": 7}}, "unowned   1"),
)
def test_a_job_that_is_processed_runs_or_waits_for_a_worker(
    light_runtime: Runtime, shown: Shown, fields: dict[str, Any], row: str
) -> None:
    job = claim(light_runtime)
    started = {"started_at": light_runtime.database["jobs"].find_one({"_id": job.id})["started_at"]}  # type: ignore[index]
    if isinstance(fields.get("worker"), dict):
        fields = {"worker": {**fields["worker"], "first_started_at": started["started_at"]}}
    change(light_runtime, job.id, **fields)
    assert row in shown()


def test_a_job_that_was_handed_back_is_unowned(light_runtime: Runtime, shown: Shown) -> None:
    light_runtime.store.release(claim(light_runtime), light_runtime.store.now(), counted=False)
    assert "unowned   1 handed back or lost; a worker takes them up within seconds" in shown()


# ── the last hour ────────────────────────────────────────────────────────────────────────────────────────────────


def test_waits_and_run_times_are_shown_by_type(light_runtime: Runtime, shown: Shown) -> None:
    for seconds in range(1, 21):
        both = attempt("retried", waited_s=seconds / 10, ran_s=float(seconds))
        ended(light_runtime, both, status="completed", job_type=TEXT)
    ended(light_runtime, attempt(waited_s=None, ran_s=200.0), status="completed", job_type=IMAGE)
    ended(light_runtime, attempt(), minutes=61, status="completed", job_type=AUDIO)
    rows = [line.split() for line in shown().splitlines() if "_generation" in line]
    assert rows == [
        [TEXT, "20", "1.0", "s", "1.9", "s", "10", "s", "19", "s"],
        [IMAGE, "1", "-", "-", "3", "min", "20", "s", "3", "min", "20", "s"],
    ]


def test_a_job_of_an_older_worker_tells_its_times_by_its_own_fields(light_runtime: Runtime) -> None:
    times: dict[str, Any] = {"created_at": ago(90), "started_at": ago(60), "completed_at": ago(40)}
    ended(light_runtime, status="completed", **times)
    [life] = read_jobs(light_runtime).ended
    [only] = life.attempts
    assert [only.waited_s, only.ran_s] == pytest.approx([30, 20], abs=1)


def test_how_jobs_ended_in_the_last_hour_is_counted(light_runtime: Runtime, shown: Shown) -> None:
    for _ in range(3):
        ended(light_runtime, attempt(), status="completed")
    ended(light_runtime, attempt("failed"))
    ended(light_runtime, error_message="Cancelled.", completed_at=None)
    ended(light_runtime, attempt("failed"), minutes=70)
    assert "ended     in the last hour: 3 completed, 1 failed, 1 cancelled\n" in shown()


def test_of_very_many_jobs_the_newest_are_read_and_that_is_said(
    light_runtime: Runtime, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "MAX_ENDED", 5)
    for _ in range(6):
        ended(light_runtime, attempt(), status="completed")
    operator_fault(light_runtime)
    assert "5 completed, 1 failed, 0 cancelled (of the newest" in shown(120)
    assert kinds(look(light_runtime)) == ["operators_fault"]


def test_failures_are_grouped_by_reason_the_operators_first_each_with_a_whole_id(
    light_runtime: Runtime, shown: Shown
) -> None:
    wrong = attempt("failed", reason="input: size value_error", error="InvalidInput")
    inputs = [ended(light_runtime, wrong, minutes=minutes) for minutes in (30, 20)]
    fault = operator_fault(light_runtime, 40)
    lost = ended(light_runtime, attempt("lost", reason=LOST_REASON), minutes=30)
    old = ended(light_runtime, error_message="An old worker's sentence.", minutes=30)
    groups = group_failures(read_jobs(light_runtime).ended)
    assert [(group.count, group.reason, group.job_id) for group in groups] == [
        (1, "HTTP 401 invalid_api_key", fault),
        (2, "input: size value_error", inputs[1]),
        (1, "An old worker's sentence.", old),
        (1, LOST_REASON, lost),
    ]
    page = shown()
    assert all(str(group.job_id) in page and (group.advice or "") in " ".join(page.split()) for group in groups)


def test_no_control_characters_of_a_document_are_shown(light_runtime: Runtime, shown: Shown) -> None:
    ended(light_runtime, job_type="a\x1b[2Jb", error_message="\x1b]0;title\x07No [red]more[/].")
    page = shown()
    assert "\x1b" not in page
    assert "]0;titleNo [red]more[/]." in page


@table(
    "values, share, value",
    ("none", [], 0.5, None),
    ("one", [7.0], 0.95, 7.0),
    ("the middle", [3.0, 1.0, 2.0], 0.5, 2.0),
    ("nearly the largest", [float(n) for n in range(1, 101)], 0.95, 95.0),
)
def test_a_percentile_is_one_of_the_values(values: list[float], share: float, value: float | None) -> None:
    assert percentile(values, share) == value


@table(
    "seconds, text",
    ("less than ten", 0.04, "0.0 s"),
    ("seconds", 12.4, "12 s"),
    ("nearly ten", 9.96, "10 s"),
    ("minutes", 200, "3 min 20 s"),
    ("whole minutes", 300, "5 min"),
    ("hours", 7260, "2 h 1 min"),
    ("hours and seconds", 7205, "2 h"),
    ("days", 200_000, "2 d 7 h"),
)
def test_a_duration_is_told_in_at_most_two_units(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


# ── documents that hold anything ─────────────────────────────────────────────────────────────────────────────────

ODD: list[Any] = [None, True, -1, 2**40, float("nan"), "", "text", [], [1], {}, {"a": 1}, [{}], [None, {"end": 1}]]
ODD += [datetime(1, 1, 1), datetime(9999, 1, 1), ObjectId()]
PLACES = (
    *("job_type", "error_message", "created_at", "updated_at", "started_at", "output_data", "worker"),
    *("worker.attempts", "worker.past", "worker.attempt", "worker.owner", "worker.lease_until", "worker.available_at"),
)


@pytest.mark.parametrize("place", PLACES)
def test_a_document_may_hold_anything(runtime: Runtime, place: str) -> None:
    jobs = runtime.database["jobs"]
    for value in ODD:
        for name in ("pending", "processing", "completed", "failed"):
            jobs.update_one({"_id": ended(runtime, attempt(), status=name)}, {"$set": {place: value}})
    seen = look(runtime)
    console = Console(width=80)
    with console.capture() as captured:
        page = Page(console, seen, FIVE_MINUTES)
        console.print(page)
    assert f"pending   {len(ODD)}" in captured.get()
    assert json.dumps(page.document())


def test_an_end_in_the_far_future_is_none() -> None:
    document = {"_id": 1, "status": "completed", "completed_at": datetime(9000, 1, 1)}
    assert last_life(document, datetime.now(UTC)) is None


# ── widths ───────────────────────────────────────────────────────────────────────────────────────────────────────


def fill(runtime: Runtime) -> None:
    """Jobs of every state and kind, and long names."""
    operator_fault(runtime)
    ended(runtime, attempt("failed", reason="input: size value_error", error="InvalidInput"))
    for kind in (TEXT, IMAGE, "a_kind_of_job_with_a_very_long_name_of_its_own"):
        ended(runtime, attempt(ran_s=3700.0, waited_s=200.0), status="completed", job_type=kind)
    insert(runtime, created_at=ago(700), updated_at=ago(700))
    claim(runtime)


@pytest.mark.parametrize("columns", [40, 60, 80, 120, 200])
def test_a_page_fits_any_width_and_cuts_nothing(light_runtime: Runtime, shown: Shown, columns: int) -> None:
    fill(light_runtime)
    page = shown(columns)
    assert max(map(len, page.splitlines())) <= columns
    assert "…" not in page
    whole = " ".join(page.split())
    ids = [str(job["_id"]) for job in light_runtime.database["jobs"].find({"status": "failed"})]
    assert all(job_id in whole for job_id in ids)
    for words in ("Check the provider's key", "1 h 1 min", "3 min 20 s", "p95", "waits? for a worker|Slots are free"):
        assert re.search(words, whole)


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_json_has_all_of_it(light_runtime: Runtime) -> None:
    fill(light_runtime)
    document = json.loads(json.dumps(Page(Console(), look(light_runtime), FIVE_MINUTES).document()))
    assert [need["kind"] for need in document["needs"]] == ["operators_fault", "pending"]
    assert document["workers"] == {
        "alive": 2,
        "is_exact": True,
        "slots": 2,
        "busy": 1,
        "remark": document["workers"]["remark"],
    }
    jobs = document["jobs"]
    assert (jobs["pending"], jobs["running"], jobs["ended_in_the_last_hour"]["failed"]) == (1, 1, 2)
    assert jobs["oldest_pending_s"] == pytest.approx(700, abs=30)
    assert document["types"][IMAGE] == {
        "jobs": 1,
        "wait_p50_s": 200,
        "wait_p95_s": 200,
        "run_p50_s": 3700,
        "run_p95_s": 3700,
    }
    [fault, inputs] = document["failures"]
    assert (fault["count"], fault["is_operators"], ObjectId.is_valid(fault["job_id"])) == (1, True, True)
    assert datetime.fromisoformat(inputs["last_at"]).tzinfo


# ── servers that are away ────────────────────────────────────────────────────────────────────────────────────────


def run_status(runtime: Runtime, capsys: pytest.CaptureFixture[str], **options: bool) -> tuple[int, str]:
    code = status(runtime, FIVE_MINUTES, **options)
    return code, capsys.readouterr().out


def test_mongodb_and_the_broker_that_are_away_come_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("worker_commands.findings.CHECK_TIMEOUT_S", 0.5)
    away = {"mongodb_url": f"mongodb://user:{SECRET}@{NOWHERE}/x", "redis_url": f"redis://:{SECRET}@{NOWHERE}"}
    runtime = worker.configure(bare_settings(**away))
    code, page = run_status(runtime, capsys)
    lines = page.splitlines()
    assert (code, SECRET in page) == (1, False)
    assert lines[0] == f"NEEDS YOU: MongoDB can't be reached or read: {NOWHERE}: nothing listens there."
    assert f"NEEDS YOU: The broker can't be reached or used: {NOWHERE}: nothing listens there." in lines
    assert "workers   not known" in lines
    code, document = run_status(runtime, capsys, as_document=True)
    assert (code, json.loads(document)["jobs"], json.loads(document)["queue_length"]) == (1, None, None)
    runtime.close()


def test_a_broker_that_is_away_hides_nothing_of_the_documents(
    light_runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    claim(light_runtime)
    worker.app.conf.update(broker_write_url=f"redis://{NOWHERE}")
    code, page = run_status(light_runtime, capsys)
    assert (code, "workers   at least 1 alive, 1 slot busy\n" in page, "running   1" in page) == (1, True, True)


@table("is_watching", ("once", False), ("watching", True))
def test_ctrl_c_is_told_from_something_that_needs_a_person(
    light_runtime: Runtime, monkeypatch: pytest.MonkeyPatch, is_watching: bool
) -> None:
    def interrupt(_: Runtime) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("worker_commands.status.look_at_servers", interrupt)
    assert status(light_runtime, FIVE_MINUTES, is_watching=is_watching) == EXIT_INTERRUPTED


# ── real workers ─────────────────────────────────────────────────────────────────────────────────────────────────


def status_of(environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """What `status --json` prints, with the exit code."""
    seen = run_forked(environment, folder, "status", "--json")
    return {"code": seen.returncode, **json.loads(seen.stdout)}


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_status_sees_a_real_worker_and_its_busy_slots(
    environment: dict[str, str], api: Api, start_worker: StartWorker, tmp_path: Path, pool: str
) -> None:
    """A worker of the solo pool can't answer while it runs a job, but that job has a lease."""
    concurrency = "1" if pool == "solo" else "3"
    start_worker(WORKER_POOL=pool, WORKER_CONCURRENCY=concurrency)
    job = api.text("a long one [hang]")
    api.wait(job, "processing")
    seen = status_of(environment, tmp_path)
    assert (seen["code"], seen["needs"]) == (0, [])
    workers = seen["workers"]
    assert (workers["alive"], workers["slots"], workers["busy"]) == (1, int(concurrency), 1)
    assert (seen["jobs"]["running"], seen["queue_length"]) == (1, 0)
    api.cancel(job)


def test_status_says_that_no_worker_runs(environment: dict[str, str], api: Api, tmp_path: Path) -> None:
    api.send("waiting")
    ended = run_forked(environment, tmp_path, "status")
    assert ended.returncode == 1
    assert ended.stdout.startswith(f"NEEDS YOU: No worker answers, so no job of the queue {api.queue} is worked on.")
    assert f"queue     {api.queue}: 1 message that no worker has taken" in ended.stdout.splitlines()


def test_status_without_mongodb_ends_with_one_sentence(environment: dict[str, str], tmp_path: Path) -> None:
    url = f"mongodb://user:planted@127.0.0.1:{free_port()}/x"
    ended = run_impatiently({**environment, "MONGODB_URL": url}, tmp_path, "status")
    assert (ended.returncode, ended.stderr) == (1, "")
    assert ended.stdout.startswith("NEEDS YOU: MongoDB can't be reached or read: 127.0.0.1:")
    assert "planted" not in ended.stdout


# ── watching ─────────────────────────────────────────────────────────────────────────────────────────────────────


@table("number, code", ("Ctrl-C", signal.SIGINT, 130), ("SIGTERM", signal.SIGTERM, 143))
def test_watching_on_a_terminal_redraws_until_it_is_ended_and_leaves_the_terminal_as_it_was(
    environment: dict[str, str], api: Api, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    with open_terminal(["status", "--watch"], environment, tmp_path, columns=80, lines=30) as watched:
        poll(lambda: "pending   0" in watched.text(), 60, description="a first page")
        api.insert(TEXT, {"prompt": "one more"})
        poll(lambda: "pending   1" in watched.text(), 60, description="a page with the new job")
        assert watched.is_full_screen
        watched.process.send_signal(number)
        assert watched.process.wait(20) == code
        poll(lambda: not watched.is_full_screen, 20, description="the terminal's own lines again")
        assert "Traceback" not in watched.text()


@table("options, mark", ("as text", [], b"as of     "), ("as JSON", ["--json"], b'{"needs": '))
def test_watching_into_a_pipe_prints_one_page_after_the_other(
    environment: dict[str, str], api: Api, tmp_path: Path, options: list[str], mark: bytes
) -> None:
    output = tmp_path / "pages"
    command = ["python", str(SOURCE / "worker.py"), "status", "--watch", *options]
    with output.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, env={**os.environ, **environment}, cwd=tmp_path)
    try:
        poll(lambda: output.read_bytes().count(mark) >= 2, 60, description="a second page")
        assert b"\x1b" not in output.read_bytes()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.wait()
