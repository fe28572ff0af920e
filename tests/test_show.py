"""`show` and `jobs`: what an operator reads about jobs, whatever their documents hold."""

from __future__ import annotations

import itertools
import json
import re
from datetime import timedelta
from typing import Any

import bson
import pymongo
import pytest
from bson import Code, DatetimeMS, MaxKey, MinKey, ObjectId, Regex, Timestamp
from bson.raw_bson import RawBSONDocument
from click.testing import CliRunner

from tests.lab import IMAGE, KEY, NOWHERE, TEXT, Run, ago, claim, deliver, insert, insert_text, read, table
from worker import Runtime, Status
from worker_commands.job_facts import ALL_FIELDS, as_json, facts_of
from worker_commands.jobs import lines_of
from worker_commands.selection import Selection, find_jobs, newest_first
from worker_commands.show import rows_of
from workerkit.errors import JobFailed
from workerkit.sentences import STOPPED

PROMPT, SAID = "planted prompt", "planted answer"
REFUSED_KEY = "HTTP 401 invalid_api_key: check the provider's key (TEXT_API_KEY or OPENAI_API_KEY)"
AT = {"attempt": 1, "node": "host-1", "provider": "https://api.example.com/v1", "model": "some-model"}
BUSY = {
    **AT,
    "end": "retried",
    "error": "RetryJob",
    "reason": "HTTP 429 rate_limit_exceeded",
    "waited_s": 0.25,
    "ran_s": 3.5,
}
REFUSED = {**AT, "attempt": 2, "end": "failed", "error": "OperatorFault", "reason": REFUSED_KEY, "is_operators": True}


def insert_failed(runtime: Runtime, *attempts: dict[str, Any], **fields: Any) -> ObjectId:
    """Inserts a job that has failed, after these attempts."""
    own = {"owner": "a", "attempt": len(attempts), "attempts": list(attempts), "message": "It isn't set up."}
    usual = {"status": "failed", "error_message": "It isn't set up.", "completed_at": ago(60), "started_at": ago(90)}
    return insert(runtime, **{**usual, "created_at": ago(100), "updated_at": ago(60), "worker": own, **fields})


def rows_in(output: str) -> dict[str, str]:
    """The rows of `show`'s table, with what is folded on one line again."""
    rows: dict[str, str] = {}
    for line in output.splitlines():
        if found := re.fullmatch(r"│ (.*?) +│ (.*?) +│", line):
            name = found[1].strip() or next(reversed(rows))
            rows[name] = f"{rows.get(name, '')} {found[2]}".strip()
    return rows


# ── the life of one job ──────────────────────────────────────────────────────────────────────────────────────────


def test_show_tells_why_a_job_failed_and_what_to_do(runtime: Runtime, run_here: Run) -> None:
    job_id = insert_failed(runtime, BUSY, REFUSED, session_id="s-1")
    rows = rows_in(run_here("show", job_id).out)
    assert (rows["job"], rows["type"], rows["status"]) == (str(job_id), TEXT, "failed")
    assert (rows["user"], rows["session"]) == ("user-1", "s-1")
    assert rows["person reads"] == "It isn't set up."
    assert rows["reason"] == f"OperatorFault: {REFUSED_KEY} (only the operator can help)"
    assert (rows["provider"], rows["model"]) == ("https://api.example.com/v1", "some-model")
    assert re.fullmatch(r"\S+ \S+ UTC \(1 min( \d+ s)? ago\)", rows["ended"])
    assert rows["you can"] == f"python worker.py retry {job_id}"


def test_show_has_waits_and_runs_of_each_attempt(runtime: Runtime, run_here: Run) -> None:
    rows = rows_in(run_here("show", insert_failed(runtime, BUSY, REFUSED)).out)
    assert rows["attempts"] == "2 of 4"
    where = "some-model at https://api.example.com/v1; on host-1"
    assert rows["attempt 1"] == f"waited 0.2 s, ran 3.5 s, retried; RetryJob: HTTP 429 rate_limit_exceeded; {where}"
    assert rows["attempt 2"] == f"failed; OperatorFault: {REFUSED_KEY}; {where}"


def test_show_tells_where_a_job_runs_and_that_its_lease_is_alive(runtime: Runtime, run_here: Run) -> None:
    job = claim(runtime)
    rows = rows_in(run_here("show", job.id).out)
    assert re.fullmatch(r"\S+, process \d+, for \d+\.\d s", rows["runs on"])
    assert re.fullmatch(r"alive: it runs out in \d\.\d s unless the worker renews it", rows["lease"])
    assert (rows["limits"], rows["queue"]) == ("90 s, and 120 s by force", runtime.settings.celery_queue_name)
    assert rows["you can"] == f"python worker.py cancel {job.id}"


def test_show_tells_that_a_lease_has_run_out(runtime: Runtime, run_here: Run) -> None:
    own = {"owner": "a", "node": "host-1", "lease_until": ago(65), "attempt": 1}
    rows = rows_in(run_here("show", insert(runtime, status="processing", worker=own)).out)
    assert re.fullmatch(
        r"ran out 1 min( \d+ s)? ago: a running worker gives the job to the next attempt", rows["lease"]
    )


def test_show_tells_when_the_next_try_comes(runtime: Runtime, run_here: Run) -> None:
    own = {
        "owner": None,
        "available_at": ago(-90),
        "attempt": 1,
        "attempts": [BUSY],
        "message": "Trying again in 90 s.",
    }
    rows = rows_in(run_here("show", insert(runtime, status="processing", worker=own)).out)
    assert re.fullmatch(r"in 1 min( \d+ s)?", rows["next try"])
    assert (rows["person reads"], rows["reason"]) == ("Trying again in 90 s.", "RetryJob: HTTP 429 rate_limit_exceeded")


@table(
    "job_type, output, rows",
    (
        "a text",
        TEXT,
        {"model_used": "m", "tokens_used": 30, "prompt_tokens": 10, "completion_tokens": 20},
        {"model": "m", "tokens": "30 (10 in the prompt, 20 in the answer)"},
    ),
    ("a text whose tokens aren't told apart", TEXT, {"model_used": "m", "tokens_used": 30}, {"tokens": "30"}),
    ("a picture", IMAGE, {"resolution": "64x64"}, {"resolution": "64x64", "file": "/artifacts/a.png"}),
    ("a sound", "audio_generation", {"duration_seconds": 1.5, "format": "wav"}, {"duration": "1.5 s", "format": "wav"}),
)
def test_show_has_what_a_result_used_and_is(
    runtime: Runtime, run_here: Run, job_type: str, output: dict[str, Any], rows: dict[str, str]
) -> None:
    file = "/artifacts/a.png" if job_type == IMAGE else None
    job_id = insert(runtime, job_type=job_type, status="completed", output_data=output, artifact_url=file)
    assert rows.items() <= rows_in(run_here("show", job_id).out).items()


def test_show_of_a_job_that_was_put_back_has_its_former_life_alone(runtime: Runtime, run_here: Run) -> None:
    past = [{"ended_at": ago(900), "reason": "The first no.", "attempts": 4}]
    own = {"owner": "a", "attempt": 2, "attempts": [BUSY, REFUSED], "past": past}
    job_id = insert_failed(runtime, status="pending", worker=own)
    rows = rows_in(run_here("show", job_id).out)
    assert {"attempts", "attempt 1", "started", "ended", "reason"} & rows.keys() == set()
    assert rows["former life 1"].endswith("UTC, The first no., attempts: 4")
    assert rows["former life 2"].endswith("UTC, It isn't set up., attempts: 2")


@table(
    "own, ended_s, sentence, by",
    ("by the API, which writes no end", {"message": "Your job has started."}, None, "Cancelled.", "api"),
    ("by an API that noted nothing else", {}, None, "Cancelled.", "api"),
    ("by the API, after it was put back", {"message": "It isn't set up."}, 900, "Cancelled.", "api"),
    ("by the API, after an operator had and put it back", {"cancelled_by": "x", "message": "No."}, 900, "Done.", "api"),
    ("by an operator", {"cancelled_by": "x", "message": "Stopped."}, 60, "Stopped.", "operator"),
    ("by an operator's revoke", {"message": STOPPED}, 60, STOPPED, "operator"),
)
def test_a_cancelled_job_shows_the_cancel_and_not_what_its_attempts_met_before(
    runtime: Runtime, run_here: Run, own: dict[str, Any], ended_s: int | None, sentence: str, by: str
) -> None:
    own = {"owner": None, "attempt": 1, "attempts": [BUSY], **own}
    job_id = insert_failed(runtime, worker=own, error_message=sentence, completed_at=ended_s and ago(ended_s))
    rows = rows_in(run_here("show", job_id).out)
    assert (rows["person reads"], rows["cancelled by"]) == (sentence, by)
    assert "reason" not in rows
    assert re.search(r"\(1 min( \d+ s)? ago\)", rows["ended"])


@pytest.mark.parametrize("own", [{}, {"message": "No. " * 100}, {"message": None}], ids=["none", "a long one", "null"])
def test_an_end_by_a_worker_is_no_cancel_whatever_it_noted_of_its_sentence(
    runtime: Runtime, run_here: Run, own: dict[str, Any]
) -> None:
    own = {"owner": "a", "attempt": 1, "attempts": [REFUSED], **own}
    rows = rows_in(run_here("show", insert_failed(runtime, worker=own, error_message="No. " * 100)).out)
    assert rows["reason"].startswith("OperatorFault: HTTP 401")
    assert "cancelled by" not in rows


def test_a_file_inside_its_url_is_shown_by_its_length(runtime: Runtime, run_here: Run) -> None:
    url = "data:image/png;base64," + "A" * 2_000_000
    job_id = insert(runtime, job_type=IMAGE, status="completed", artifact_url=url, output_data={"image_url": url})
    assert rows_in(run_here("show", job_id).out)["file"] == "data:image/png;base64,… (2000022 characters)"


def test_show_has_all_of_it_as_json(runtime: Runtime, run_here: Run) -> None:
    job_id = insert_failed(runtime, BUSY, REFUSED)
    shown = json.loads(run_here("show", job_id, "--json").out)
    assert (shown["id"], shown["status"], shown["command"]) == (str(job_id), "failed", "retry")
    assert (shown["sentence"], shown["error"], shown["reason"]) == ("It isn't set up.", "OperatorFault", REFUSED_KEY)
    assert shown["attempts"][0] == BUSY
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", shown["ended_at"])


@table(
    "named, code, says",
    ("half an id", "65f0", 2, "'65f0' is no job's id, which has 24 hex digits. `jobs` lists ids."),
    ("a control character", "\x1b[2J", 2, "'[2J' is no job's id"),
    ("an id that no job has", "0" * 24, 1, f"There is no job {'0' * 24} in the database "),
)
def test_show_says_what_is_wrong_with_an_id(runtime: Runtime, run_here: Run, named: str, code: int, says: str) -> None:
    ended = run_here("show", named)
    assert (ended.code, says in ended.err, "\x1b" in ended.err) == (code, True, False)


# ── the list ─────────────────────────────────────────────────────────────────────────────────────────────────────


def ids_of(output: str) -> list[str]:
    return re.findall(r"^[0-9a-f]{24}(?=  )", output, re.MULTILINE)


def test_jobs_lists_whole_ids_the_newest_first(runtime: Runtime, run_here: Run) -> None:
    jobs = [str(insert(runtime)) for _ in range(3)]
    assert ids_of(run_here("jobs").out) == jobs[::-1]


@table(
    "options, found",
    ("all", [], {"pending", "running", "failed", "old", "other"}),
    ("a status", ["--status", "pending"], {"pending", "other"}),
    ("two statuses", ["--status", "processing", "--status", "failed"], {"running", "failed", "old"}),
    ("a person", ["--user", "user-2"], {"other"}),
    ("a person and a status", ["--user", "user-1", "--status", "pending"], {"pending"}),
    ("a type by its short name", ["--type", "image"], {"pending"}),
    ("a type by its whole name", ["--type", "image_generation"], {"pending"}),
    ("lately", ["--since", "1h"], {"pending", "running", "failed", "other"}),
    ("longer ago than there are jobs", ["--since", "36500d"], {"pending", "running", "failed", "old", "other"}),
    ("a reason's words, in any letters", ["--reason", "http 401"], {"failed"}),
    ("an error's class", ["--reason", "OperatorFault"], {"failed"}),
    ("a sentence's words", ["--reason", "too long"], {"old"}),
    ("none", ["--user", "nobody"], set()),
)
def test_jobs_are_selected_by_what_they_have_in_common(
    runtime: Runtime, run_here: Run, options: list[str], found: set[str]
) -> None:
    old = {"_id": ObjectId.from_datetime(ago(3 * 86_400)), "updated_at": ago(2 * 86_400), "status": "failed"}
    jobs = {
        "pending": insert(runtime, job_type=IMAGE),
        "running": claim(runtime).id,
        "failed": insert_failed(runtime, REFUSED),
        "old": insert(runtime, **old, error_message="This took too long."),
        "other": insert(runtime, user_id="user-2"),
    }
    ended = run_here("jobs", *options)
    assert {name for name, job_id in jobs.items() if str(job_id) in ids_of(ended.out)} == found
    assert ("no jobs" in ended.out) is not bool(found)


@table(
    "arguments",
    ("list those of everybody", ["jobs", "--user"]),
    ("try those of everybody again", ["retry", "--failed", "--since", "1h", "--yes", "--user"]),
    ("try all again, whatever their reason", ["retry", "--failed", "--since", "1h", "--yes", "--reason"]),
    ("cancel those of everybody", ["cancel", "--pending", "--yes", "--user"]),
    ("cancel those of all types", ["cancel", "--pending", "--yes", "--type"]),
)
@pytest.mark.parametrize("value", ["", " "])
def test_a_scripts_variable_that_isnt_set_doesnt(
    runtime: Runtime, run_here: Run, arguments: list[str], value: str
) -> None:
    jobs = [insert(runtime), insert_failed(runtime)]
    before = [read(runtime, job_id) for job_id in jobs]
    ended = run_here(*arguments, value)
    assert (ended.code, f"Invalid value for '{arguments[-1]}': it is empty." in ended.err) == (2, True)
    assert [read(runtime, job_id) for job_id in jobs] == before


def test_a_list_that_is_cut_says_so_and_how_to_get_more(runtime: Runtime, run_here: Run) -> None:
    jobs = [str(insert(runtime)) for _ in range(3)]
    ended = run_here("jobs", "--limit", 2)
    assert ids_of(ended.out) == jobs[:0:-1]
    assert ended.err == "The 2 newest are shown. There are more: --limit 20 shows these.\n"
    assert run_here("jobs", "--limit", 3).err == ""
    assert json.loads(run_here("jobs", "--limit", 2, "--json").out)["is_cut"] is True


def test_jobs_fit_80_columns_with_whole_ids_users_and_reasons(runtime: Runtime, run_here: Run) -> None:
    user = "user_2NNEqL2nrIRdJ194ndJqAHwEfxC"
    job_id = insert_failed(runtime, REFUSED, user_id=user, job_type="image_generation")
    [job] = json.loads(run_here("jobs", "--json").out)["jobs"]
    lines = lines_of([job], 80)
    assert max(map(len, lines)) <= 80
    assert str(job_id) in lines[2]
    assert " ".join(" ".join(lines[3:]).split()) == f"{user} {REFUSED_KEY}"


def test_a_wide_list_has_each_job_on_a_line_of_its_own(runtime: Runtime, run_here: Run) -> None:
    job_id = insert_failed(runtime, BUSY, REFUSED)
    [heading, line] = run_here("jobs").out.splitlines()
    assert heading.split() == ["id", "type", "status", "age", "tries", "user", "reason"]
    assert line.split(maxsplit=6) == [str(job_id), TEXT, "failed", "1m", "2", "user-1", REFUSED_KEY]


@pytest.mark.parametrize("name", ["jobs", "show", "retry", "cancel"])
def test_a_terminal_that_knows_ascii_alone_gets_plain_characters(
    runtime: Runtime, run_here: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(CliRunner.__init__, "__defaults__", ("ascii", *(CliRunner.__init__.__defaults__ or ())[1:]))
    job_id = insert(runtime, status="completed", error_message="No.", job_type="“naïve” … 日")
    ended = run_here(name, *([] if name == "jobs" else [job_id]))
    assert (ended.code, ended.out.isascii()) == (int(name in ("retry", "cancel")), True)
    assert ('"naive" ... ?' in ended.out) is (name in ("jobs", "show"))


# ── every index ──────────────────────────────────────────────────────────────────────────────────────────────────


def stages_of(plan: dict[str, Any]) -> set[str]:
    below = [plan["inputStage"]] if "inputStage" in plan else plan.get("inputStages", [])
    return {plan["stage"]}.union(*map(stages_of, below))


def test_each_selection_is_read_by_an_index_and_in_its_order(runtime: Runtime) -> None:
    jobs = runtime.database["jobs"]
    runtime.store.ensure_indexes()
    for name in ("user_id", "status", "job_type", "created_at"):  # those of the API
        jobs.create_index(name)
    jobs.create_index([("user_id", 1), ("created_at", 1)])
    usual = {"job_type": TEXT, "created_at": ago(9), "updated_at": ago(9)}
    jobs.insert_many({"user_id": f"user-{n % 100}", "status": list(Status)[n % 4], **usual} for n in range(500))
    statuses = [(), ("failed",), ("pending", "processing")]
    for chosen in itertools.product(statuses, ["", "user-1"], ["", TEXT], [None, timedelta(hours=1)]):
        selection = Selection(*chosen)
        found = jobs.find(selection.query(runtime.store.now())).sort(newest_first(selection))
        stages = stages_of(found.explain()["queryPlanner"]["winningPlan"])
        assert stages & {"COLLSCAN", "SORT"} == set(), selection


# ── whatever documents hold ──────────────────────────────────────────────────────────────────────────────────────

ODD: list[Any] = [None, "text", "\x1b[2J", [], ["x"], {}, {"x": 1}, 7, -1, 2**40, 1.5, float("nan"), float("inf"), True]
ODD += [DatetimeMS(10**15), DatetimeMS(-(10**15)), MinKey(), MaxKey(), Regex("x"), Code("x"), Timestamp(1, 1), b"x"]
ODD += [ObjectId("6b0a302550c657af12925f6a"), "x" * 100_000, [{"attempt": "x", "ended_at": 7}], [[["x"]]]]
FIELDS = ["user_id", "session_id", "job_type", "status", "error_message", "created_at", "updated_at", "worker"]
FIELDS += ["started_at", "completed_at", "output_data", "artifact_url"]
OWN = ["owner", "node", "pid", "queue", "task_id", "lease_until", "available_at", "attempt", "limits", "past"]
OWN += ["deadline", "first_started_at", "attempts", "message", "unnotified", "rescues"]
RESULTS = [
    "model_used",
    "tokens_used",
    "prompt_tokens",
    "completion_tokens",
    "resolution",
    "duration_seconds",
    "format",
]


def insert_odd(runtime: Runtime, value: Any) -> list[ObjectId]:
    own = {"owner": "a", "attempt": 1, "attempts": [BUSY], "first_started_at": ago(9)}
    usual = {"worker": own, "status": "failed", "output_data": {"model_used": "m"}, "started_at": ago(9)}
    documents: list[dict[str, Any]] = [{**usual, name: value} for name in FIELDS]
    documents += [{**usual, "status": "processing", "worker": {**own, name: value}} for name in OWN]
    documents += [{**usual, "worker": {**own, "attempts": [{**BUSY, name: value}]}} for name in [*BUSY, "ended_at"]]
    documents += [{**usual, "status": "completed", "output_data": {name: value}} for name in RESULTS]
    return list(runtime.database["jobs"].insert_many(documents).inserted_ids)


@pytest.mark.parametrize("value", ODD, ids=lambda value: f"{value!r:.30}")
def test_whatever_a_document_holds_is_shown_without_harm(runtime: Runtime, run_here: Run, value: Any) -> None:
    jobs, now = insert_odd(runtime, value), runtime.store.now()
    listed = run_here("jobs", "--limit", 1000)
    assert sorted(ids_of(listed.out)) == sorted(map(str, jobs))
    assert "\x1b" not in listed.out
    for job in find_jobs(runtime, {}, fields=ALL_FIELDS):
        facts = facts_of(job, now, 4)
        json.dumps(as_json(facts), allow_nan=False)
        assert all("\x1b" not in cell for row in rows_of(facts, now) for cell in row)


def test_text_that_isnt_utf8_and_ids_of_another_kind_are_shown(runtime: Runtime, run_here: Run) -> None:
    jobs = runtime.database["jobs"]
    document = {"_id": ObjectId(), "status": "failed", "user_id": "~~~~", "job_type": "~~~~", "error_message": "~~~~"}
    raw = bson.encode({**document, "worker": {"message": "~~~~", "attempts": [{"reason": "~~~~"}]}})
    jobs.insert_one(RawBSONDocument(raw.replace(b"~~~~", b"\xff\xfe\xff\xfe")))
    jobs.insert_one({"_id": "an id of another kind", "status": "failed"})
    listed = run_here("jobs").out
    assert str(document["_id"]) in listed
    assert "an id of another kind" in listed
    assert run_here("show", document["_id"]).code == 0


# ── what stays hidden ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["as text", "as JSON"])
@table(
    "arguments", ("show", ["show", "JOB"]), ("jobs", ["jobs"]), ("jobs of a reason", ["jobs", "--reason", "Cancelled"])
)
def test_neither_prompts_nor_texts_are_shown(
    runtime: Runtime, run_here: Run, arguments: list[str], options: list[str]
) -> None:
    output = {"generated_text": SAID, "model_used": "m"}
    fields = {"input_data": {"prompt": PROMPT}, "output_data": output}
    job_id = insert(runtime, status="failed", error_message="Cancelled.", **fields)
    ended = run_here(*[str(job_id) if word == "JOB" else word for word in arguments], *options)
    assert str(job_id) in ended.out
    assert PROMPT not in ended.out + ended.err
    assert SAID not in ended.out + ended.err


def bytes_out(runtime: Runtime) -> int:
    """The bytes that MongoDB has sent to all its clients."""
    with pymongo.MongoClient[Any](runtime.settings.mongodb_url.get_secret_value()) as client:
        return int(client.admin.command("serverStatus")["network"]["bytesOut"])


def test_inputs_and_texts_arent_even_read(runtime: Runtime, run_here: Run) -> None:
    large = {"input_data": {"prompt": "x" * 1_000_000}, "output_data": {"generated_text": "x" * 1_000_000}}
    job_id, *_others = [insert(runtime, status="failed", **large) for _ in range(20)]
    before = bytes_out(runtime)
    for arguments in (
        ["jobs"],
        ["show", job_id],
        ["retry", "--failed", "--since", "1h"],
        ["cancel", "--user", "user-1"],
    ):
        run_here(*arguments)
    assert bytes_out(runtime) - before < 1_000_000


# ── together ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_job_that_a_worker_has_failed_is_shown_with_the_providers_refusal(runtime: Runtime, run_here: Run) -> None:
    job_id = insert_text(runtime, f"{PROMPT} [status 401]")
    with pytest.raises(JobFailed):
        deliver(runtime, job_id)
    ended = run_here("show", job_id)
    rows = rows_in(ended.out)
    assert rows["reason"].startswith("OperatorFault: HTTP 401 invalid_request_error invalid_api_key")
    assert rows["reason"].endswith("(only the operator can help)")
    assert re.match(r"waited \d+\.\d s, ran \d+\.\d s, failed; OperatorFault: HTTP 401", rows["attempt 1"])
    assert rows["provider"] == runtime.settings.openai_base_url
    assert PROMPT not in ended.out
    assert KEY not in ended.out


def test_a_job_that_a_worker_has_done_is_shown_as_it_was(runtime: Runtime, run_here: Run) -> None:
    job_id = insert(runtime)
    deliver(runtime, job_id)
    rows = rows_in(run_here("show", job_id).out)
    assert (rows["status"], rows["attempts"], rows["model"]) == ("completed", "1 of 4", "testbed-model")
    assert {"created", "started", "ended", "tokens"} <= rows.keys()
    assert "you can" not in rows


@pytest.mark.parametrize("arguments", [["show", "0" * 24], ["jobs"]], ids=["show", "jobs"])
def test_a_mongodb_that_is_away_is_said_with_advice(
    run_here: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr(Runtime, "mongodb_timeout_s", 0.1)
    ended = run_here(*arguments, MONGODB_URL=f"mongodb://{NOWHERE}")
    assert ended.code == 1
    assert re.search(r"MongoDB can't be reached, or takes too long \(.*\); try `python worker.py check`", ended.err)
