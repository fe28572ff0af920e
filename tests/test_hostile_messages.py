"""Documents, inputs and messages that hold anything: each job reaches an end, and no forged line gets into the log."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId, Timestamp

from testbed.api import TASK_NAME
from tests.lab import IMAGE, TEXT
from tests.site import JOBS, Site

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ \S+ .*")
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
