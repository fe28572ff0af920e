"""The commands of `python worker.py`: their help, what they print, and how they end."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from click.testing import CliRunner

import worker
from testbed.processes import SOURCE, poll
from testbed.provider import Provider
from tests.lab import IMAGE, KEY, NOWHERE, PNG, SECRET, TEXT, ago, change, claim, deliver, insert, queued, read, table
from worker import COMMANDS, Runtime, Status
from worker_commands.api_side import Followed, fetch_file, writable_folder
from worker_commands.findings import probe
from worker_commands.recover import recover
from worker_commands.submit import NO_WORKER, SubmitView, read_request, submit
from worker_commands.terminal import print_rows, printable
from workerkit.connections import NO_NAME
from workerkit.errors import JobFailed, OperatorFault, ProviderAway, RetryJob
from workerkit.lost_messages import LostMessages
from workerkit.process import Heartbeat
from workerkit.settings import Settings

Command = Callable[..., tuple[int, str]]
AWAY = {"MONGODB_URL": f"mongodb://{NOWHERE}", "REDIS_URL": f"redis://{NOWHERE}"}


# ── what the tests share ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Runs `python worker.py …` in this process, with settings by keyword. Returns exit code and output."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("worker_commands.terminal.PLAIN_WIDTH", 400)
    monkeypatch.setattr(Runtime, "mongodb_timeout_s", 2)

    def run(*arguments: str, **settings: str) -> tuple[int, str]:
        result = CliRunner().invoke(worker.main, arguments, env=settings, prog_name="worker.py")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output

    return run


@pytest.fixture
def environment(environment: dict[str, str], shared_database: str) -> dict[str, str]:
    return {**environment, "DATABASE_NAME": shared_database}


@pytest.fixture
def command_here(command: Command, environment: dict[str, str]) -> Command:
    """The same with the settings of the runtime, on real MongoDB and Redis."""
    return partial(command, **environment)


# ── help and settings ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["", *COMMANDS])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_has_help(command: Command, name: str, option: str) -> None:
    code, output = command(*[name, option][not name :])
    assert (code, output.startswith("Usage: worker.py")) == (0, True)


def test_the_help_lists_every_command(command: Command) -> None:
    _, output = command("--help")
    assert [name for name in COMMANDS if f"\n  {name} " not in output] == []


def test_a_command_is_imported_only_when_it_is_asked_for() -> None:
    script = "import sys, worker; print([name for name in sys.modules if name.startswith('worker_commands')])"
    ended = subprocess.run([sys.executable, "-c", script], cwd=SOURCE, capture_output=True, text=True, timeout=30)
    assert ended.stdout == "[]\n"


@pytest.mark.parametrize("name", ["run", "check", "status", "recover", "report", "metrics", "submit"])
def test_bad_settings_end_a_command_with_2_and_its_faults(command: Command, name: str) -> None:
    arguments = ["--prompt", "Hi"] if name == "submit" else []
    code, output = command(name, *arguments, MONGODB_URL=f"mongodb://user:{SECRET}@", WORKER_POOL="gevent")
    assert code == 2
    assert "MONGODB_URL = (hidden)" in output
    assert "WORKER_POOL = 'gevent'" in output
    assert SECRET not in output


# ── check ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_check_finds_all_well_and_shows_no_key(runtime: Runtime, command_here: Command) -> None:
    code, output = command_here("check")
    assert (code, "FAULT" in output) == (0, False)
    for what in ("MongoDB write", "MongoDB indexes", "broker", "Redis appendonly", "artifact store", "provider, audio"):
        assert what in output
    assert KEY not in output


def test_check_makes_a_picture_and_a_sound_if_it_is_asked_to(
    runtime: Runtime, command_here: Command, provider: Provider
) -> None:
    code, output = command_here("check", "--generate")
    assert (code, "answered with a picture of 1024x1024" in output, "0.76 s of wav" in output) == (0, True, True)
    assert [call.route.rpartition("/")[2] for call in provider.calls] == ["completions", "generations", "speech"]


@table(
    "given, row",
    ("MongoDB", {"MONGODB_URL": f"mongodb://{NOWHERE}/x"}, f"MongoDB {NOWHERE}: nothing listens there"),
    ("Redis", {"REDIS_URL": f"redis://:{SECRET}@{NOWHERE}"}, f"Redis {NOWHERE}: nothing listens there"),
    ("the broker", {"CELERY_BROKER_URL": f"redis://{NOWHERE}"}, f"broker {NOWHERE}: nothing listens there"),
    ("a provider", {"TEXT_BASE_URL": f"http://{NOWHERE}/v1"}, f"provider, text {NOWHERE}: nothing listens there"),
    ("a picture's", {"IMAGE_BASE_URL": f"http://{NOWHERE}/v1"}, f"provider, image {NOWHERE}: nothing listens there"),
    ("a name", {"REDIS_URL": "redis://no-such-name:6379"}, "Redis no-such-name:6379: the name doesn't resolve outside"),
    ("S3", {"ARTIFACT_URL": "s3://bucket", "S3_ENDPOINT_URL": f"http://{NOWHERE}"}, f"artifact store {NOWHERE}: "),
)
def test_check_names_host_port_and_reason(
    runtime: Runtime, command_here: Command, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], row: str
) -> None:
    monkeypatch.setattr("worker_commands.findings.CHECK_TIMEOUT_S", 1)
    _, output = command_here("check", **given)
    assert row in " ".join(re.sub("[│┃]", " ", output).split())


@table(
    "path, seen",
    ("no /v1", "", "HTTP 404: check the URL (TEXT_BASE_URL or OPENAI_BASE_URL; is /v1 missing?)"),
    ("another key", "/v1", "HTTP 401 invalid_request_error invalid_api_key: check the provider's key"),
)
def test_check_says_why_a_provider_refuses(runtime: Runtime, command_here: Command, path: str, seen: str) -> None:
    with Provider(api_key="right") as strict:
        url = strict.url.removesuffix("/v1") + path
        code, output = command_here("check", TEXT_BASE_URL=url, TEXT_API_KEY="wrong", TEXT_MODEL="m")
    assert (code, f"127.0.0.1:{strict.port}: {seen}" in output) == (1, True)


def test_check_leaves_no_file_behind(runtime: Runtime, command_here: Command) -> None:
    command_here("check")
    assert list(runtime.artifacts.names("check-")) == []


@table(
    "given, row",
    ("Redis is away", {"REDIS_URL": f"redis://:{SECRET}@{NOWHERE}"}, "Redis"),
    ("the store is away", {"ARTIFACT_URL": f"file://{__file__}/x"}, "artifact store"),
    ("nothing serves the files", {"ARTIFACT_BASE_URL": "http://127.0.0.2:1"}, "artifact URL"),
    ("a wrong provider", {"TEXT_BASE_URL": f"http://user:{SECRET}@{NOWHERE}/v1"}, "provider, text"),
    ("a wrong module is a bad setting", {"HANDLER_MODULES": "no_such"}, "HANDLER_MODULES"),
)
def test_check_says_what_is_wrong_and_shows_no_secret(
    runtime: Runtime, command_here: Command, given: dict[str, str], row: str
) -> None:
    code, output = command_here("check", **given)
    assert code in (1, 2)
    assert any(row in line and ("FAULT" in line or "=" in line) for line in output.splitlines())
    assert SECRET not in output
    assert KEY not in output


def test_check_says_that_mongodb_is_away(
    runtime: Runtime, command_here: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runtime, "mongodb_timeout_s", 0.1)
    monkeypatch.setattr("worker_commands.findings.CHECK_TIMEOUT_S", 1)
    code, output = command_here("check", MONGODB_URL=f"mongodb://user:{SECRET}@{NOWHERE}")
    assert (code, "MONGODB_URL" in output, SECRET in output) == (1, True, False)


@table(
    "given, text",
    ("a path of the API", {}, "examples/ has the route"),
    ("perhaps another host's loopback", {"ARTIFACT_BASE_URL": f"http://{NOWHERE}"}, "an address that serves"),
    ("no file system", {"ARTIFACT_URL": "data:"}, "stored in data:"),
    ("no model", {"OPENAI_BASE_URL": "", "OPENAI_API_KEY": ""}, "offline stand-in"),
    ("a model that isn't listed", {"TEXT_MODEL": "dear"}, "dear isn't among the 1 models that are offered"),
    ("a model that was chosen", {}, "put TEXT_MODEL=testbed-model into .env"),
    ("a tiny text", {}, "testbed-model at http://127.0.0.1:"),
    ("no picture without being asked", {}, "nothing was generated; --generate makes one"),
    ("a misspelt variable", {"WORKER_CONCURENCY": "4"}, "is WORKER_CONCURRENCY meant?"),
)
def test_check_notes_what_an_operator_should_know(
    runtime: Runtime, command_here: Command, given: dict[str, str], text: str
) -> None:
    code, output = command_here("check", **given)
    assert (code, text in output) == (0, True)


@table(
    "error, seen",
    ("a refused key", OperatorFault("HTTP 401 AuthenticationError: check it"), "HTTP 401 AuthenticationError"),
    ("an error of a gateway", RetryJob("HTTP 504 APITimeoutError"), "HTTP 504 APITimeoutError"),
    ("a model that loads", RetryJob("no answer within 30 s: is its model loading?"), "is its model loading?"),
    ("a server that is away", ProviderAway(NO_NAME), NO_NAME),
)
def test_a_row_of_check_has_a_providers_place_and_its_own_words(error: Exception, seen: str) -> None:
    def fail() -> str:
        raise error

    finding = probe("provider, text", "is the key right?", fail, "http://models/v1", "TEXT_BASE_URL")
    assert finding.seen.startswith("models:80: ")
    assert seen in finding.seen
    assert ("outside Docker" in finding.advice) is (seen == NO_NAME)


def test_check_fetches_a_stored_file_by_its_public_url(runtime: Runtime, command_here: Command, tmp_path: Path) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        public = f"http://127.0.0.1:{server.server_port}/files"
        code, output = command_here("check", ARTIFACT_URL=f"file://{tmp_path}/files", ARTIFACT_BASE_URL=public)
        server.shutdown()
    shown = f"{public.removesuffix('/files')}/…"
    assert (code, f"{shown} answers with the file" in output) == (0, True)


# ── terminals ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_narrow_terminal_gets_lines_instead_of_a_table_and_nothing_is_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker_commands.terminal.PLAIN_WIDTH", 30)
    print_rows(("", "what", "seen"), [("FAULT", "Redis", "[red]A very long sentence about it."), ("ok", "MongoDB", "")])
    shown = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert shown == ["FAULT Redis", "  [red]A very long sentence", "  about it.", "ok MongoDB"]


def test_a_long_word_in_a_table_is_folded_and_not_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker_commands.terminal.PLAIN_WIDTH", 70)
    print_rows(("what", "seen"), [("a", "x" * 100)])
    assert capsys.readouterr().out.count("x") == 100


@table("name, shown", ("check", "check", "/artifacts/..."), ("status", "status", '"Naive" ... ?'))
def test_a_terminal_that_knows_ascii_alone_gets_plain_characters(
    runtime: Runtime, command_here: Command, monkeypatch: pytest.MonkeyPatch, name: str, shown: str
) -> None:
    monkeypatch.setattr(CliRunner.__init__, "__defaults__", ("ascii", *(CliRunner.__init__.__defaults__ or ())[1:]))
    runtime.store.fail(claim(runtime), "“Naïve” … 日")
    _, output = command_here(name)
    assert shown in output
    assert output.isascii()


# ── commands that need MongoDB ───────────────────────────────────────────────────────────────────────────────────


def test_recover_says_that_mongodb_is_away(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "mongodb_timeout_s", 0.1)
    code, output = command("recover", **AWAY)
    assert (code, "MongoDB can't be reached" in output) == (1, True)


# ── health ───────────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "parts, code, says",
    ("both parts are alive", {"keeper": 60, "parent": 60}, 0, "alive\n"),
    (
        "the keeper is silent",
        {"keeper": -1, "parent": 60},
        1,
        "the keeper of process {} has given no sign of life for 0 s\n",
    ),
    (
        "the parent is silent",
        {"keeper": 60, "parent": -1},
        1,
        "the parent of process {} has given no sign of life for 0 s\n",
    ),
    ("no process runs jobs", {"parent": 60}, 1, "no process that runs jobs gives signs of life\n"),
    ("the parent is gone", {"keeper": 60}, 1, "no worker's parent process gives signs of life\n"),
)
def test_health_wants_signs_of_life_of_keeper_and_parent(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, parts: dict[str, float], code: int, says: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for part, silent_s in parts.items():
        Heartbeat(part=part, silent_s=silent_s).beat()
    assert command("health") == (code, says.format(os.getpid()))


def test_health_without_any_process_is_bad(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert command("health")[0] == 1


def test_health_refuses_a_folder_that_is_a_link(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f"ai-backend-worker-{os.getuid()}").symlink_to(tmp_path)
    code, output = command("health")
    assert (code, "is no folder: remove it, or set TMPDIR" in output) == (1, True)


# ── recover ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_recover_says_what_it_did(runtime: Runtime, command_here: Command) -> None:
    assert command_here("recover") == (0, "nothing to recover\n")
    job = claim(runtime)
    change(runtime, job.id, worker__lease_until=ago(5))
    assert command_here("recover") == (0, f"job={job.id} no attempt worked on it: put back into the queue\n")
    assert len(queued(runtime)) == 1


def test_recover_sends_no_copy_of_a_message_that_waits_though_no_worker_has_run_for_a_day(
    runtime: Runtime, command_here: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LostMessages, "overdue_s", 0.0)
    runtime.broker.send(insert(runtime), data={"job_type": "text_generation"})
    for _ in range(3):
        assert command_here("recover") == (0, "nothing to recover\n")


def test_recover_fails_while_the_broker_is_away(runtime: Runtime, command_here: Command) -> None:
    change(runtime, claim(runtime).id, worker__lease_until=ago(5))
    code, output = command_here("recover", CELERY_BROKER_URL=f"redis://{NOWHERE}")
    assert code == 1
    assert "can't be reached" in output


def test_recover_deletes_files_that_no_job_names(light_runtime: Runtime) -> None:
    job = claim(light_runtime)
    light_runtime.store.fail(job, "No.")
    light_runtime.artifacts.publish(f"{job.id}-0123456789abcdef.png", PNG)
    assert recover(light_runtime) == ["1 file(s) deleted that no job names or that are too old"]
    assert list(light_runtime.artifacts.names()) == []


# ── run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments with which Celery was started."""
    started: list[list[str]] = []

    def start(arguments: list[str]) -> int:
        started.append(arguments)
        return 0

    monkeypatch.setattr("worker_commands.run.start_celery", start)
    return started


@table(
    "options, pool",
    ("as configured", [], "--pool=prefork"),
    ("Celery's own options come last", ["--", "--pool=solo"], "--pool=solo"),
)
def test_run_starts_celery_and_prints_what_it_is_connected_to(
    command: Command, started: list[list[str]], options: list[str], pool: str
) -> None:
    _, output = command("run", *options, WORKER_POOL="prefork", REDIS_URL=f"redis://:{SECRET}@host", OPENAI_API_KEY=KEY)
    assert [option for option in started[0] if option.startswith("--pool")][-1] == pool
    assert "redis://***@host" in output
    assert SECRET not in output
    assert KEY not in output


def test_without_a_command_the_worker_runs_and_an_offline_one_says_so(
    command: Command, started: list[list[str]]
) -> None:
    _, output = command()
    assert len(started) == 1
    assert "OFFLINE STAND-IN" in output


@table("name, arguments", ("submit", "submit", ["--prompt", "Hi"]), ("demo", "demo", []))
def test_a_thin_command_ends_with_what_its_module_returns(
    command: Command, monkeypatch: pytest.MonkeyPatch, name: str, arguments: list[str]
) -> None:
    monkeypatch.setattr(f"worker_commands.{name}.{name}", lambda *_: 7)
    assert command(name, *arguments)[0] == 7


# ── submit ───────────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "job_type, parameters, wanted",
    ("a short name", "text", [], (TEXT, {"prompt": "Hi"})),
    ("a full name", IMAGE, [], (IMAGE, {"prompt": "Hi"})),
    ("words for a sound", "audio", [], ("audio_generation", {"text": "Hi"})),
    ("a number", "text", ["max_tokens=20"], (TEXT, {"prompt": "Hi", "max_tokens": 20})),
    ("text", "image", ["size=64x64"], (IMAGE, {"prompt": "Hi", "size": "64x64"})),
    ("an object", "text", ['x={"a": [1]}'], (TEXT, {"prompt": "Hi", "x": {"a": [1]}})),
    ("an equals sign in a value", "text", ["x=a=b"], (TEXT, {"prompt": "Hi", "x": "a=b"})),
    ("a number that JSON doesn't have", "text", ["x=NaN"], (TEXT, {"prompt": "Hi", "x": "NaN"})),
)
def test_a_request_is_read_as_the_api_gets_it(job_type: str, parameters: list[str], wanted: tuple[str, Any]) -> None:
    assert read_request(job_type, "Hi", parameters) == wanted


@table(
    "job_type, parameters, fault",
    ("an unknown type", "video", [], "--type video: should be one of text, image, audio"),
    ("no value", "text", ["size"], "--param size: should look like size=512x512"),
    ("no name", "text", ["=512"], "--param =512: should look like size=512x512"),
)
def test_a_request_that_cant_be_read_ends_with_2_and_sends_nothing(
    light_runtime: Runtime, capsys: pytest.CaptureFixture[str], job_type: str, parameters: list[str], fault: str
) -> None:
    assert submit(light_runtime, job_type, "Hi", parameters, False, None) == 2
    assert fault in capsys.readouterr().err
    assert light_runtime.database["jobs"].count_documents({}) == 0


def test_without_following_a_submit_prints_the_jobs_id(
    light_runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(light_runtime, "text", "Hi", [], False, None) == 0
    job_id = ObjectId(capsys.readouterr().out.strip())
    document = read(light_runtime, job_id)
    assert (document["status"], document["job_type"], document["input_data"]) == ("pending", TEXT, {"prompt": "Hi"})
    [message] = queued(light_runtime)
    assert message["args"][0] == str(job_id)
    assert message["timelimit"] == [120, 90]


@pytest.fixture
def follow(light_runtime: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Submits a job and follows it, while the worker does it. Returns exit code, stdout and stderr."""

    def follow(job_type: str, prompt: str, *parameters: str) -> tuple[int, str, str]:
        with ThreadPoolExecutor(1) as threads:
            arguments = (light_runtime, job_type, prompt, parameters, True, tmp_path / "files")
            ended: Future[int] = threads.submit(submit, *arguments)
            [message] = poll(lambda: queued(light_runtime), 10)
            with contextlib.suppress(JobFailed):
                deliver(light_runtime, *message["args"])
            code = ended.result(10)
        return code, *capsys.readouterr()

    return follow


def test_a_submit_prints_the_text_to_stdout_and_what_happens_to_stderr(follow: Callable[..., Any]) -> None:
    code, out, err = follow("text", "[say one two three]")
    assert (code, out) == (0, "one two three\n")
    assert re.findall(r"pending|processing|completed", err) == ["pending", "processing", "completed"]


def test_a_submit_saves_a_file_and_prints_its_path(follow: Callable[..., Any], tmp_path: Path) -> None:
    code, out, err = follow("image", "A city", "size=64x48")
    [saved] = (tmp_path / "files").iterdir()
    assert (code, out) == (0, f"{saved}\n")
    assert saved.read_bytes().startswith(b"\x89PNG")
    assert "resolution: 64x48" in err


def test_a_submit_of_a_job_that_fails_ends_with_1_and_says_why(follow: Callable[..., Any]) -> None:
    code, out, err = follow("text", "[status 400]")
    assert (code, out) == (1, "")
    assert "The AI service refused this request." in err


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker_commands.api_side.SERVER_PATIENCE_S", 2)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("server", ["Redis", "MongoDB"])
def test_a_submit_names_the_server_that_is_away(command: Command, fake_redis_url: str, server: str) -> None:
    settings = AWAY if server == "Redis" else {**AWAY, "REDIS_URL": fake_redis_url}
    code, output = command("submit", "--prompt", "Hi", **settings)
    assert (code, f"{server} can't be reached" in output) == (1, True)


@pytest.mark.usefixtures("impatient")
def test_a_submit_that_cant_be_queued_leaves_no_job_behind(
    light_runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    worker.app.conf.update(broker_write_url=f"redis://{NOWHERE}")
    assert submit(light_runtime, "text", "Hi", [], False, None) == 1
    assert "The queue can't be reached" in capsys.readouterr().err
    assert light_runtime.database["jobs"].count_documents({}) == 0


def test_a_job_that_no_worker_takes_is_explained_once(capsys: pytest.CaptureFixture[str]) -> None:
    view, job = SubmitView(), Followed(ObjectId(), TEXT, submitted_at=time.monotonic() - 20)
    for _ in range(3):
        view.on_tick([job])
    assert capsys.readouterr().err.count(NO_WORKER) == 1


def piece(attempt: int, sequence: int, delta: str) -> dict[str, Any]:
    return {"attempt": attempt, "sequence": sequence, "delta": delta}


def test_a_new_attempt_starts_the_text_again_and_late_pieces_are_left_out() -> None:
    job = Followed(ObjectId(), TEXT)
    pieces = [piece(1, 0, "old "), piece(1, 1, "words"), piece(2, 0, "new "), piece(1, 2, "late"), piece(2, 1, "words")]
    assert [job.add_text(one) for one in pieces] == [True, True, True, False, True]
    assert job.text == "new words"


def test_an_attempt_after_a_hand_back_starts_the_text_again_although_it_has_the_same_number() -> None:
    job = Followed(ObjectId(), TEXT)
    for one in (piece(1, 0, "old "), piece(1, 1, "words"), piece(1, 0, "new "), piece(1, 1, "text")):
        assert job.add_text(one)
    assert job.text == "new text"


def test_a_piece_that_comes_again_with_more_in_it_counts_once() -> None:
    job = Followed(ObjectId(), TEXT)
    for one in (piece(1, 0, "Once "), piece(1, 0, "Once upon "), piece(1, 1, "a time")):
        assert job.add_text(one)
    assert job.text == "Once upon a time"


def test_no_text_is_added_behind_a_gap() -> None:
    job = Followed(ObjectId(), TEXT)
    pieces = [piece(1, 0, "Once "), piece(1, 2, "time"), piece(1, 3, "."), piece(2, 1, "later")]
    assert [job.add_text(one) for one in pieces] == [True, False, False, False]
    assert job.text == "Once "


def test_a_jobs_end_is_read_from_its_document() -> None:
    job = Followed(ObjectId(), TEXT)
    job.end({"status": "failed", "error_message": "No."})
    assert (job.status, job.message) == (Status.FAILED, "No.")


@table(
    "url, data",
    ("in the URL itself", "data:image/png;base64,aGVsbG8=", b"hello"),
    ("a path that only the API serves", "/artifacts/elsewhere.png", None),
    ("a server that is away", f"http://{NOWHERE}/a.png", None),
)
def test_a_file_is_fetched_where_it_can_be_reached(light_runtime: Runtime, url: str, data: bytes | None) -> None:
    assert fetch_file(light_runtime, url) == data


def test_a_file_in_gridfs_is_fetched_without_the_api(light_runtime: Runtime) -> None:
    url = light_runtime.artifacts.publish("a.png", PNG)
    assert fetch_file(light_runtime, f"https://public.example{url}") == PNG


@table("folder", ("it can't be made", Path("/proc/no/folder")), ("it can't be written", Path("/proc/self")))
def test_files_go_into_a_temporary_folder_where_the_wanted_one_cant_be_written(folder: Path) -> None:
    used = writable_folder(folder)
    assert used.name.startswith("ai-backend-worker-")
    used.rmdir()


def test_a_folder_is_made_where_it_is_missing(tmp_path: Path) -> None:
    assert writable_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"


@table(
    "text, shown",
    ("words, lines, tabs", "a\n\tb", "a\n\tb"),
    ("an emoji made of several", "👩\u200d🔬", "👩\u200d🔬"),
    ("what steers a terminal", "\x1b[2Ja\x07\x9b", "[2Ja"),
    ("what turns the text around", "a\u202eb", "ab"),
)
def test_what_a_terminal_would_obey_is_not_printed(text: str, shown: str) -> None:
    assert printable(text) == shown


# ── demo ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_demo_completes_a_job_of_each_type_with_nothing_else_running(tmp_path: Path) -> None:
    """It runs where the terminal knows ASCII alone."""
    command = [sys.executable, str(SOURCE / "worker.py"), "demo", "--output", "files"]
    ascii_alone = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=ascii_alone)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert '"What happens to a job in a queue?"' in ended.stdout
    assert "3 of 3 jobs completed" in ended.stdout
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == ["picture.png", "sound.wav"]
