"""What reaches the log: repeats, the lines of libraries, line ends, and the place of an error."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import Reject
from celery.worker.consumer.consumer import INVALID_TASK_ERROR  # type: ignore[attr-defined]

from testbed.api import Api
from testbed.processes import poll
from tests.lab import SECRET, table
from tests.site import StartWorker
from workerkit import logs
from workerkit.logs import LibraryNoiseFilter, OncePerCause, RepeatedFaultLog, on_one_line, place_of, without_reject


def line(message: object, *args: object, error: BaseException | None = None, name: str = "celery") -> logging.LogRecord:
    """An ERROR line, as a logger hands it to its filters."""
    info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord(name, logging.ERROR, __file__, 1, message, args, info)


# ── repeats ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_fault_that_goes_on_is_logged_once_a_minute_and_once_when_over(
    at: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "worker")
    log = RepeatedFaultLog("MongoDB")
    log.over()
    for at[0] in (1000.0, 1001.0, 1059.0, 1061.0):
        log.fault("away")
    log.over()
    log.over()
    said = "MongoDB: away (repeats are logged once a minute)"
    assert caplog.messages == [said, said, "MongoDB: over"]


def test_a_fault_that_comes_back_after_its_end_is_logged_at_once(
    at: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    log = RepeatedFaultLog("MongoDB")
    for detail in ("first", "second"):
        log.fault(detail)
        log.over()
    assert [message.split(" (")[0] for message in caplog.messages] == ["MongoDB: first", "MongoDB: second"]


def test_a_kind_of_line_of_a_library_passes_once_a_minute(at: list[float]) -> None:
    noise, passed = LibraryNoiseFilter(lambda: at[0]), []
    for at[0] in (1000.0, 1001.0, 1059.0, 1060.0):
        passed.append(noise.filter(line("Trying again in %s s", at[0])))
    assert passed == [True, False, False, True]


def test_other_lines_of_a_library_pass_beside_it(at: list[float]) -> None:
    noise = LibraryNoiseFilter()
    lines = [line("one"), line("two"), line("one", name="kombu")]
    assert [noise.filter(record) for record in lines] == [True] * 3


def test_a_line_of_celery_that_names_a_task_always_passes(at: list[float]) -> None:
    noise = LibraryNoiseFilter()
    lines = [line("Hard time limit (%ss) exceeded for %s[%s]", 9, "process_job", task_id) for task_id in "ab"]
    assert [noise.filter(record) for record in lines] == [True, True]


def test_a_cause_is_an_error_once_a_minute_and_an_information_meanwhile() -> None:
    now = [1000.0]
    causes, levels = OncePerCause(lambda: now[0]), []
    for now[0] in (1000.0, 1001.0, 1059.0, 1060.0, 1061.0):
        levels.append(logging.getLevelName(causes.level(logging.ERROR, "a wrong key")))
    assert levels == ["ERROR", "INFO", "INFO", "ERROR", "INFO"]


def test_another_cause_is_an_error_beside_it() -> None:
    causes = OncePerCause()
    assert [causes.level(logging.ERROR, cause) for cause in ("a key", "a model")] == [logging.ERROR] * 2


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO, logging.WARNING])
def test_what_is_no_error_keeps_its_level(level: int) -> None:
    causes = OncePerCause()
    assert [causes.level(level, "busy") for _ in range(2)] == [level] * 2


def test_a_critical_line_is_said_once_a_minute_too() -> None:
    causes = OncePerCause()
    assert [causes.level(logging.CRITICAL, "x") for _ in range(2)] == [logging.CRITICAL, logging.INFO]


def test_any_number_of_causes_takes_bounded_memory() -> None:
    causes = OncePerCause()
    levels = {causes.level(logging.ERROR, f"cause {number}") for number in range(3 * OncePerCause.MAX_REMEMBERED)}
    assert levels == {logging.ERROR}
    assert len(causes._next_at) <= OncePerCause.MAX_REMEMBERED


# ── the lines of libraries ───────────────────────────────────────────────────────────────────────────────────────


def test_celerys_line_about_a_message_it_cant_read_holds_no_body() -> None:
    record = line(INVALID_TASK_ERROR, "no args", SECRET, error=ValueError(SECRET))
    assert LibraryNoiseFilter().filter(record)
    assert record.getMessage() == "Received invalid task message: no args (ValueError at ?)"
    assert record.exc_info is None


def test_a_message_that_was_given_back_is_no_error() -> None:
    record = line("rejected", error=Reject("shutting down", requeue=True))
    assert without_reject(record)
    assert (record.levelname, record.levelno, record.exc_info) == ("INFO", logging.INFO, None)


def test_any_other_line_of_celery_stays_as_it_is() -> None:
    record = line("a\nb", error=(error := ValueError("x")))
    assert without_reject(record)
    assert (record.getMessage(), record.exc_info and record.exc_info[1]) == ("a\nb", error)


# ── one line for each event ──────────────────────────────────────────────────────────────────────────────────────


@table(
    "message, written",
    ("a forged line", ("%s ended", "job\nERROR forged"), r"job\nERROR forged ended"),
    ("a terminal's control sequence", ("\x1b[2Jgone",), r"\x1b[2Jgone"),
    ("a separator that some viewers break at", ("a\u2028b",), r"a\u2028b"),
    ("blanks around it", ("\n words \n",), "words"),
    ("letters of any script", ("Да, 是",), "Да, 是"),
    ("a wrong format string", ("%d jobs", "no number"), "%d jobs"),
)
def test_a_line_holds_no_control_characters(message: tuple[object, ...], written: str) -> None:
    record = line(*message)
    assert on_one_line(record)
    assert record.getMessage() == written


def test_a_long_line_is_cut() -> None:
    record = line("x" * 5000)
    on_one_line(record)
    assert len(record.getMessage()) == logs.MAX_LINE_CHARACTERS


# ── installation ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def loggers_restored() -> Iterator[None]:
    """Puts the levels and filters of all loggers back, since they belong to the process."""
    names = [*logs.LOGGERS_WITH_CONTENT, *logs.LOGGERS_WITH_URLS, *logs.LOGGERS_OF_OUTAGES]
    loggers = [logging.getLogger(name) for name in (*names, "celery.app.trace", "py.warnings", "worker")]
    before = [(logger, logger.level, list(logger.filters)) for logger in loggers]
    yield
    for logger, level, filters in before:
        logger.setLevel(level)
        logger.filters[:] = filters


@pytest.mark.usefixtures("loggers_restored")
@table(
    "debug, level",
    ("DEBUG is for the worker's own lines", True, logging.DEBUG),
    ("else it says what happens", False, logging.INFO),
)
def test_libraries_stay_quiet_whatever_debug_says(debug: bool, level: int) -> None:
    logs.install(debug, [])
    assert logs.logger.level == level
    assert logging.getLogger("pymongo").level == logging.getLogger("openai").level == logging.INFO
    assert logging.getLogger("httpx2").level == logging.WARNING


@pytest.mark.usefixtures("loggers_restored")
def test_every_handler_of_celery_writes_each_event_on_one_line() -> None:
    handler = logging.Handler()
    logs.install(debug=False, handlers=[handler])
    assert handler.filter(record := line("a\nb"))
    assert record.getMessage() == r"a\nb"


@pytest.mark.usefixtures("loggers_restored")
@table(
    "message, is_logged",
    ("Celery's own pending deprecation", "consumer.py:1: CPendingDeprecationWarning: in 5.1", False),
    ("any other warning", "app.py:1: UserWarning: mind this", True),
)
def test_celerys_pending_deprecations_are_not_logged(message: str, is_logged: bool) -> None:
    logs.install(debug=False, handlers=[])
    assert bool(logging.getLogger("py.warnings").filter(line(message))) is is_logged


# ── lines as JSON ────────────────────────────────────────────────────────────────────────────────────────────────────


def as_json(record: logging.LogRecord) -> dict[str, Any]:
    return dict(json.loads(logs.JsonFormatter().format(record)))


def test_a_line_as_json_has_time_level_and_process() -> None:
    record = line('said "hello"')
    wanted = {"level": "ERROR", "process": record.processName, "logger": record.name, "message": 'said "hello"'}
    got = as_json(record)
    assert abs(datetime.fromisoformat(got.pop("time")).timestamp() - record.created) < 0.002
    assert got == wanted


def test_a_line_that_names_a_job_has_its_id() -> None:
    job_id = "6b0a213b98f606a6aa964e7c"
    assert as_json(line(f"job={job_id} not claimed"))["job"] == job_id
    assert "job" not in as_json(line("job=7 not claimed"))


def test_a_line_about_an_attempt_has_its_figures() -> None:
    record = line("job=… completed")
    record.fields = {"event": "completed", "ran_s": 1.25, "reason": None}
    got = as_json(record)
    assert (got["event"], got["ran_s"], "reason" in got) == ("completed", 1.25, False)


@pytest.mark.parametrize("fields", [None, "text", ["a", "b"], 7])
def test_another_librarys_fields_cost_no_line(fields: object) -> None:
    record = line("said")
    record.fields = fields
    assert as_json(record)["message"] == "said"


def test_a_line_as_json_needs_no_encoding_but_ascii() -> None:
    text = logs.json_line("INFO", "“é” \u2028 \ud800")
    assert text.isascii()
    assert json.loads(text)["message"] == "“é” \u2028 \ud800"


def test_an_exception_stays_on_the_line_of_its_event() -> None:
    text = logs.JsonFormatter().format(line("failed", error=ZeroDivisionError("division by zero")))
    assert json.loads(text)["exception"] == "ZeroDivisionError: division by zero"
    assert "\n" not in text


@pytest.mark.usefixtures("loggers_restored")
def test_installing_twice_filters_once() -> None:
    for _ in range(2):
        logs.install(debug=False, handlers=[])
    counts = {len(logging.getLogger(name).filters) for name in logs.LOGGERS_OF_OUTAGES}
    assert counts == {1}


# ── places ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_place_of_an_error_is_file_and_line() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        _ = 1 / 0
    assert re.fullmatch(r"test_logs\.py:\d+", place_of(caught.value))
    assert place_of(ValueError("raised nowhere")) == "?"


def test_the_place_of_a_syntax_error_is_in_the_faulty_file(tmp_path: Path) -> None:
    with pytest.raises(SyntaxError) as caught:
        compile("x = 1\ny = (", str(tmp_path / "faulty.py"), "exec")
    assert place_of(caught.value) == "faulty.py:2"


# ── a worker's whole log ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def json_lines(api: Api, environment: dict[str, str], start_worker: StartWorker) -> list[dict[str, Any]]:
    """The log of a worker that ended jobs in several ways, whose child was killed, and which then got SIGTERM.

    Each line has to be an object.
    """
    worker = start_worker(LOG_FORMAT="json", WORKER_CONCURENCY="2", WORKER_POOL="prefork", SHUTDOWN_GRACE="0")
    prompts = ("planted prompt [say hello]", "planted prompt [status 401]", "planted prompt [status 503 times=1]")
    for prompt in prompts:
        job = api.text(prompt)
        poll(lambda job=job: api.status(job) in ("completed", "failed"), 60)  # type: ignore[misc]
    os.kill(worker.children()[0], signal.SIGKILL)
    poll(lambda: "SIGKILL" in worker.text(), 60)
    running = api.text("planted prompt [hang]")
    poll(lambda: api.status(running) == "processing", 60)
    worker.process.terminate()
    assert worker.process.wait(60) == 0
    assert not [secret for secret in ("planted", environment["OPENAI_API_KEY"]) if secret in worker.text()]
    return [json.loads(line) for line in worker.text().splitlines()]


@pytest.mark.servers
def test_every_line_of_a_worker_is_an_object_from_its_start_to_its_end(json_lines: list[dict[str, Any]]) -> None:
    assert json_lines[0]["event"] == "start"
    assert all(one["level"] and one["message"] and datetime.fromisoformat(one["time"]) for one in json_lines)
    assert any("WORKER_CONCURRENCY meant?" in one["message"] for one in json_lines)
    ends = [(one["event"], one.get("reason")) for one in json_lines if "ran_s" in one]
    assert [event for event, _ in ends] == ["completed", "failed", "retried", "completed", "handed_back"]
    reasons = [reason.partition(":")[0] for _, reason in ends if reason]
    assert reasons[:2] == ["HTTP 401 invalid_request_error invalid_api_key", "HTTP 503 server_error"]
    completed = next(one for one in json_lines if one.get("event") == "completed")
    figures = ("job", "type", "attempt", "waited_s", "ran_s", "provider", "model", "tokens", "prompt_tokens")
    assert [name for name in figures if name not in completed] == []
