"""`report`: the same figures on MongoDB and on its stand-in, whatever the documents hold; tables, CSV and JSON."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import mongomock
import pytest
from bson import Code, Decimal128, ObjectId, encode
from bson.raw_bson import RawBSONDocument
from click.testing import CliRunner

import worker
from tests.lab import NOWHERE, SECRET, Ago, ago, bare_settings, claim, insert, table
from worker import Runtime
from worker_commands import report as report_module
from worker_commands.lives import CLOCKS_DIFFER_BY, INDEXES, Life, last_life, past_lives
from worker_commands.report import FIGURES, MEDIA, TOKENS, as_cell, pipeline, question, read_rows, report, total_of
from worker_commands.terminal import EXIT_FAILED
from workerkit.mongodb import make_indexes
from workerkit.sentences import STOPPED

WEEK = timedelta(days=7)
USED = {"model_used": "m-1", "tokens_used": 30, "prompt_tokens": 10, "completion_tokens": 20}


def ended(runtime: Runtime, minutes: float = 5, **fields: Any) -> ObjectId:
    """A job that has completed so many minutes ago; fields replace the usual ones."""
    at = ago(minutes * 60)
    usual = {"status": "completed", "created_at": at, "completed_at": at, "output_data": USED, "error_message": None}
    return insert(runtime, **{**usual, **fields})


def rows(runtime: Runtime, by: str = "model", since: timedelta = WEEK) -> dict[str | None, dict[str, float]]:
    return {row.name: row.figures for row in read_rows(runtime, runtime.store.now() - since, by)}


@pytest.fixture(params=["light_runtime", pytest.param("runtime", marks=pytest.mark.servers)])
def either_runtime(request: pytest.FixtureRequest) -> Runtime:
    """A runtime on MongoDB's stand-in, and one on a real MongoDB."""
    runtime: Runtime = request.getfixturevalue(request.param)
    return runtime


# ── what is counted ──────────────────────────────────────────────────────────────────────────────────────────────


def test_tokens_pictures_and_sound_are_counted_by_model(either_runtime: Runtime) -> None:
    for _ in range(2):
        ended(either_runtime)
    ended(either_runtime, output_data={"model_used": "m-2", "resolution": "64x64"})
    ended(either_runtime, output_data={"model_used": "m-3", "duration_seconds": 2.5})
    found = rows(either_runtime)
    assert found["m-1"] == {
        **dict.fromkeys(FIGURES, 0),
        **{"jobs": 2, "completed": 2, "prompt_tokens": 20, "completion_tokens": 40, "tokens": 60},
    }
    assert (found["m-2"]["pictures"], found["m-3"]["sound_seconds"]) == (1, 2.5)


def test_tokens_that_the_provider_does_not_tell_apart_count_as_a_whole(either_runtime: Runtime) -> None:
    ended(either_runtime, output_data={"model_used": "m", "tokens_used": 7})
    found = rows(either_runtime)["m"]
    assert (found["tokens"], found["prompt_tokens"], found["completion_tokens"]) == (7, 0, 0)


def test_a_failed_job_counts_by_the_model_that_was_asked_and_uses_nothing(either_runtime: Runtime) -> None:
    """What its output holds is of a former life."""
    attempts = [{"end": "retried", "model": "m-0"}, {"end": "failed", "model": "m-1"}]
    ended(either_runtime, status="failed", error_message="No.", worker={"attempts": attempts})
    found = rows(either_runtime)["m-1"]
    assert (found["jobs"], found["failed"], found["tokens"]) == (1, 1, 0)


def test_a_cancelled_job_counts_by_the_time_of_its_creation(either_runtime: Runtime) -> None:
    fields: dict[str, Any] = {"status": "failed", "completed_at": None, "output_data": None}
    ended(either_runtime, error_message="Cancelled.", **fields)
    ended(either_runtime, created_at=ago(8 * 86_400), error_message="Cancelled.", **fields)
    assert rows(either_runtime)[None] == {**dict.fromkeys(FIGURES, 0), "jobs": 1, "cancelled": 1}


def test_a_job_that_an_operator_cancels_counts_as_cancelled(either_runtime: Runtime) -> None:
    past = [{**PAST, "ended_at": ago(600), "reason": STOPPED}]
    ended(either_runtime, status="failed", error_message=STOPPED, worker={"past": past})
    found = total_of(read_rows(either_runtime, ago(3600), "type"))
    assert (found["jobs"], found["cancelled"], found["tokens"]) == (2, 2, 0)


PAST = {"ended_at": None, "reason": None, "model": "m-0", "tokens": 9, "prompt_tokens": 4, "completion_tokens": 5}


@table(
    "now",
    ("that completed again", {}),
    ("that runs again", {"status": "processing", "completed_at": None, "output_data": None}),
    ("that is pending again", {"status": "pending", "completed_at": None, "output_data": None}),
)
def test_former_lives_are_counted_of_a_job(either_runtime: Runtime, now: dict[str, Any]) -> None:
    lately, long_ago = {**PAST, "ended_at": ago(600)}, {**PAST, "ended_at": ago(8 * 86_400)}
    failed = {**PAST, "ended_at": ago(500), "reason": "No."}
    ended(either_runtime, worker={"past": [long_ago, lately, failed]}, **now)
    found = rows(either_runtime)["m-0"]
    assert (found["jobs"], found["completed"], found["failed"], found["tokens"]) == (2, 1, 1, 9)


def test_a_job_that_was_put_back_and_is_not_claimed_yet_counts_by_the_end_that_its_document_still_has(
    either_runtime: Runtime,
) -> None:
    ended(either_runtime, status="pending")
    ended(either_runtime, status="pending", error_message="No.")
    found = total_of(read_rows(either_runtime, ago(3600), "type"))
    assert (found["jobs"], found["completed"], found["failed"]) == (2, 1, 1)


@table(
    "fields",
    ("before that time", {"completed_at": Ago(8 * 86_400)}),
    ("in the far future", {"completed_at": datetime(9000, 1, 1)}),
    ("not yet", {"status": "processing", "completed_at": None}),
)
def test_a_job_that_has_not_ended_within_the_time_is_not_counted(
    either_runtime: Runtime, fields: dict[str, Any]
) -> None:
    ended(either_runtime, **fields)
    assert rows(either_runtime) == {}


@table(
    "by, names",
    ("by user", "user", {"alice", "bob"}),
    ("by type", "type", {"text_generation", "image_generation"}),
    ("by model", "model", {"m-1"}),
)
def test_rows_stand_for_what_was_asked(either_runtime: Runtime, by: str, names: set[str]) -> None:
    ended(either_runtime, minutes=1, user_id="alice")
    ended(either_runtime, minutes=2 * 1440, user_id="bob", job_type="image_generation")
    assert set(rows(either_runtime, by)) == names


def test_rows_stand_for_days(either_runtime: Runtime) -> None:
    ends = [ago(60), ago(2 * 86_400)]
    for at in ends:
        ended(either_runtime, completed_at=at)
    assert set(rows(either_runtime, "day")) == {f"{at:%Y-%m-%d}" for at in ends}


# ── documents that hold anything ─────────────────────────────────────────────────────────────────────────────────

ODD: list[Any] = [None, True, -1, 2**40, 1.5, float("nan"), float("inf"), "", "text", "7", [], [1], {}, {"a": 1}]
ODD += [
    STOPPED,
    ObjectId(),
    datetime(1, 1, 1),
    datetime(9999, 1, 1),
    [[{}]],
    [{"ended_at": 1}],
    [None, "x", {"ended_at": "y"}],
]
ODD_TO_MONGODB = [Decimal128("5"), Code("x"), b"bytes", re.compile("x"), 2**62]
PLACES = (
    *("user_id", "job_type", "status", "error_message", "completed_at", "created_at", "output_data", "worker"),
    *(f"output_data.{name}" for name in (*USED, "resolution", "duration_seconds")),
    *("worker.attempts", "worker.past"),
    *(f"worker.past.0.{name}" for name in (*PAST, "pictures", "seconds")),
)


def odd_fields(status: str, place: str, value: Any) -> dict[str, Any]:
    """The fields of a job that has ended, with this value at a place such as `worker.past.0.tokens`."""
    fields: dict[str, Any] = {
        "status": status,
        "output_data": {**USED},
        "worker": {"past": [{**PAST, "ended_at": ago(500)}]},
    }
    *parents, last = place.split(".")
    parent: Any = fields
    for name in parents:
        parent = parent[int(name) if isinstance(parent, list) else name]
    parent[last] = value
    return fields


def fill_with_odd_documents(runtime: Runtime, values: list[Any]) -> None:
    for place in PLACES:
        for value in values:
            for status in ("completed", "failed", "pending"):
                ended(runtime, **odd_fields(status, place, value))
        runtime.database["jobs"].update_one({"_id": ended(runtime)}, {"$unset": {place: ""}})


def expected(runtime: Runtime, since: datetime) -> dict[str, float]:
    """The figures as lives.py reads them out of each single document that is found by the time of an end."""
    latest, found = runtime.store.now() + CLOCKS_DIFFER_BY, dict.fromkeys(FIGURES, 0.0)
    for document in runtime.database["jobs"].find(question(since, latest, has_index=True)):
        last = last_life(document, latest)
        lives: Iterator[Life] = iter([*past_lives(document, latest), *([last] if last else [])])
        for life in lives:
            if life.ended_at >= since:
                use = life.usage
                found["jobs"] += 1
                found[life.outcome] += 1
                tokens = use.prompt_tokens + use.completion_tokens + use.other_tokens
                used = (use.prompt_tokens, use.completion_tokens, tokens, use.pictures, use.sound_s)
                for name, amount in zip((*TOKENS, *MEDIA), used, strict=True):
                    found[name] += amount
    return found


def test_the_server_counts_odd_documents_as_one_document_at_a_time_is_counted(either_runtime: Runtime) -> None:
    make_indexes(either_runtime.database["jobs"], INDEXES)
    is_real = not isinstance(either_runtime.mongo, mongomock.MongoClient)
    fill_with_odd_documents(either_runtime, ODD + (ODD_TO_MONGODB if is_real else []))
    since = either_runtime.store.now() - WEEK
    for by in report_module.KEYS if is_real else ["model"]:  # MongoDB's stand-in is slow
        assert total_of(read_rows(either_runtime, since, by)) == pytest.approx(expected(either_runtime, since))


def test_text_that_is_not_utf_8_is_a_name_like_another(runtime: Runtime) -> None:
    job_id = ended(runtime, user_id="name\ufffd")
    raw = encode({**(runtime.database["jobs"].find_one({"_id": job_id}) or {})})
    broken = RawBSONDocument(raw.replace("name\ufffd".encode(), b"name\xff\xfe\xfd"))
    runtime.database["jobs"].delete_one({"_id": job_id})
    runtime.database["jobs"].insert_one(broken)
    [(name, figures)] = rows(runtime, "user").items()
    assert (name, figures["jobs"]) == ("name\ufffd\ufffd\ufffd", 1)


# ── how it is read ───────────────────────────────────────────────────────────────────────────────────────────────


def indexes_in(plan: object) -> set[str]:
    return set(re.findall(r'"indexName": "([^"]+)"', json.dumps(plan, default=str)))


@table(
    "has_index, used",
    ("by the end of jobs", True, {"worker_ended", "created_at_1", "status_1"}),
    ("by their creation, before a worker has made that index", False, {"created_at_1", "status_1"}),
)
def test_a_report_reads_by_indexes_and_not_all_jobs(runtime: Runtime, has_index: bool, used: set[str]) -> None:
    jobs = runtime.database["jobs"]
    jobs.drop_indexes()
    for name in ("user_id", "status", "job_type", "created_at"):
        jobs.create_index(name)
    if has_index:
        make_indexes(jobs, INDEXES)
    jobs.insert_many(
        [{"status": "completed", "created_at": ago(10**7), "completed_at": ago(10**7)} for _ in range(500)]
    )
    stages = pipeline(ago(3600), ago(0), "model", has_index=has_index)
    command = {"aggregate": "jobs", "pipeline": stages, "cursor": {}}
    plan = runtime.database.command("explain", command, verbosity="executionStats")
    assert indexes_in(plan) <= used
    assert ("worker_ended" in indexes_in(plan)) is has_index
    assert "COLLSCAN" not in json.dumps(plan, default=str)
    jobs.drop_indexes()


# ── output ───────────────────────────────────────────────────────────────────────────────────────────────────────

Printed = Callable[..., str]


@pytest.fixture
def printed(light_runtime: Runtime, capsys: pytest.CaptureFixture[str]) -> Printed:
    """What a report prints."""

    def printed(by: str, shape: str) -> str:
        assert report(light_runtime, WEEK, by, shape) == 0
        return capsys.readouterr().out

    return printed


def test_a_table_has_sums_and_only_the_columns_that_are_used(light_runtime: Runtime, printed: Printed) -> None:
    for name in ("a", "b"):
        ended(light_runtime, output_data={**USED, "model_used": name, "tokens_used": 2030, "completion_tokens": 2020})
    lines = printed("model", "table").splitlines()
    assert lines[0].startswith("Jobs that have ended since 20")
    assert [line.split() for line in lines[1:]] == [
        ["model", "jobs", "failed", "prompt", "completion", "tokens"],
        ["a", "1", "-", "10", "2,020", "2,030"],
        ["b", "1", "-", "10", "2,020", "2,030"],
        ["total", "2", "-", "20", "4,040", "4,060"],
    ]


def test_a_table_of_many_rows_says_how_to_get_all(light_runtime: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(60):
        ended(light_runtime, user_id=f"user-{number}")
    report(light_runtime, WEEK, "user", "table")
    out, err = capsys.readouterr()
    assert (out.count("user-"), out.splitlines()[-1].split() == ["total", "60", "-", "600", "1,200", "1,800"]) == (
        50,
        True,
    )
    assert err == "These are the first 50 of 60 rows; --csv and --json print all.\n"


@table(
    "name, cell",
    ("a formula", "=1+1", "'=1+1"),
    ("a sign", "+49", "'+49"),
    ("another", "-1", "'-1"),
    ("a function of old spreadsheets", "@SUM(A1)", "'@SUM(A1)"),
    ("a tab before it", "\t=1", "'\t=1"),
    ("a wide sign", "＝1", "'＝1"),
    ("an address", "a@b", "a@b"),
    ("what steers a terminal", "\x1b[2Ja", "[2Ja"),
    ("a formula behind what is left out", "\x07=1", "'=1"),
    ("none", None, ""),
)
def test_no_cell_runs_as_a_formula_in_a_spreadsheet(name: str | None, cell: str) -> None:
    assert as_cell(name) == cell


def test_csv_has_every_row_and_every_figure(light_runtime: Runtime, printed: Printed) -> None:
    ended(light_runtime, user_id="=cmd|' /C calc'!A0, with a comma")
    [row] = csv.DictReader(io.StringIO(printed("user", "csv")))
    assert row["user"] == "'=cmd|' /C calc'!A0, with a comma"
    assert {name: float(row[name]) for name in FIGURES} == {
        **dict.fromkeys(FIGURES, 0.0),
        **{"jobs": 1, "completed": 1, "prompt_tokens": 10, "completion_tokens": 20, "tokens": 30},
    }


def test_json_has_the_rows_and_their_sum(light_runtime: Runtime, printed: Printed) -> None:
    ended(light_runtime)
    shown = json.loads(printed("model", "json"))
    assert (shown["by"], [row["model"] for row in shown["rows"]]) == ("model", ["m-1"])
    assert shown["total"]["tokens"] == 30
    assert datetime.fromisoformat(shown["since"]) < datetime.now(UTC) - timedelta(days=6)


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_report_of_what_a_worker_did(runtime: Runtime, environment: dict[str, str], shared_database: str) -> None:
    runtime.store.complete(claim(runtime), {**USED, "generated_text": "x"}, None)
    runtime.store.fail(claim(runtime, owner="owner-2"), "No.")
    settings = {**environment, "DATABASE_NAME": shared_database}
    result = CliRunner().invoke(worker.main, ["report", "--since", "1h", "--by", "day", "--csv"], env=settings)
    assert (result.exit_code, result.output.splitlines()[1]) == (0, f"{ago(0):%Y-%m-%d},2,1,1,0,10,20,30,0,0")


@table(
    "options, fault",
    ("no time", ["--since", "soon"], "such as 90s, 15m, 1h or 7d"),
    ("an unknown row", ["--by", "price"], "is not one of 'user', 'model', 'type', 'day'"),
)
def test_an_option_that_cannot_be_read_ends_with_2(options: list[str], fault: str) -> None:
    result = CliRunner().invoke(worker.main, ["report", *options])
    assert (result.exit_code, fault in result.output) == (2, True)


def test_a_report_says_that_mongodb_is_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report_module, "PATIENCE_S", 0.5)
    with contextlib.closing(Runtime(bare_settings(mongodb_url=f"mongodb://user:{SECRET}@{NOWHERE}/x"))) as runtime:
        assert report(runtime, WEEK, "model", "table") == EXIT_FAILED
    said = capsys.readouterr().err
    assert f"MongoDB can't be reached or read: {NOWHERE}: nothing listens there" in said
    assert SECRET not in said
