"""`python worker.py schema`: what the API and the worker exchange, as JSON Schemas or as an AsyncAPI document."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any, Literal

import click
from pydantic import BaseModel, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.json_schema import GenerateJsonSchema

from worker import HANDLERS, PROGRESS_CHANNEL, STATUS_CHANNEL, app, configure
from worker_commands.terminal import say
from workerkit import __version__
from workerkit.schemas import OUTPUTS, JobArguments, JobDocument, JobProgress, JobStatusUpdate, RedisMessage, TaskResult
from workerkit.settings import load_settings

Schema = dict[str, Any]
AnyObject = dict[str, Any]
EXCHANGED: Mapping[str, Any] = {
    "JobDocument": JobDocument,
    "JobArguments": JobArguments,
    "RedisMessage": RedisMessage,
    "TaskResult": TaskResult,
    "JobStatusUpdate": JobStatusUpdate,
    "JobProgress": JobProgress,
}


class PlainSchemas(GenerateJsonSchema):
    """Leaves out the titles that only repeat the names of fields."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schemas_of(types: Mapping[str, Any], place: str) -> Schema:
    """The schemas of these types by their names, and of all types that they refer to. They stand at this place."""
    mode: Literal["validation"] = "validation"
    adapters = [(name, mode, TypeAdapter(one)) for name, one in types.items()]
    template = f"#/{place}/{{model}}"
    named, shared = TypeAdapter.json_schemas(adapters, schema_generator=PlainSchemas, ref_template=template)
    return {**{name: named[name, mode] for name in types}, **shared.get("$defs", {})}


# ── JSON Schemas ─────────────────────────────────────────────────────────────────────────────────────────────────────

CONTRACT = {
    "$schema": GenerateJsonSchema.schema_dialect,
    "$id": "urn:ai-backend-worker:contract",
    "title": "What the API and AI Backend Worker exchange",
    "description": (
        "docs/contract.md explains it. TYPE_input is what the input_data of a job of that type may hold, and "
        "TYPE_output what its output_data holds once it is completed. A number of an input may also come as text. "
        "Where a value of a document is text here and of another type in MongoDB, x-bsonType names that type: to check "
        "a document, write an objectId as 24 hex digits and a date in ISO 8601."
    ),
}


def input_type(job_type: str, model: type[BaseModel]) -> Any:
    """The type of a job's input. One of a person's own may have fields for which there is no JSON Schema."""
    try:
        model.model_json_schema()
    except PydanticInvalidForJsonSchema:
        say(f"{job_type}: no JSON Schema can describe its input {model.__name__}, so any object is allowed")
        return AnyObject
    return model


def when(values: Mapping[str, str], **fields: Schema) -> Schema:
    """A rule for documents that have these values: the fields that they have as well."""
    has_values = {"properties": {name: {"const": value} for name, value in values.items()}}
    return {"if": has_values, "then": {"properties": fields, "required": list(fields)}}


def document_rules() -> list[Schema]:
    """What a document holds in each status, and what a completed one holds for each job type."""
    null, text = {"type": "null"}, {"type": "string"}
    some: Schema = {"not": null}
    started: Schema = {"started_at": some, "error_message": null, "worker": some}
    rules = [
        when({"status": "processing"}, **started, completed_at=null),
        when({"status": "completed"}, **started, completed_at=some, output_data=some),
    ]
    for job_type, output in OUTPUTS.items():
        has_file = any(name.endswith("_url") for name in output.__annotations__)
        fields = {"output_data": {"$ref": f"#/$defs/{job_type}_output"}, "artifact_url": text if has_file else null}
        rules.append(when({"status": "completed", "job_type": job_type}, **fields))
    return rules


def contract_schema() -> Schema:
    """One JSON Schema (2020-12) with all others in its `$defs`. Those of inputs are of all registered job types."""
    types = dict(EXCHANGED)
    for job_type, handler in sorted(HANDLERS.items()):
        types[f"{job_type}_input"] = input_type(job_type, handler.input_model)
        types[f"{job_type}_output"] = OUTPUTS.get(job_type, AnyObject)
    schemas = schemas_of(types, "$defs")
    document = schemas["JobDocument"]
    document["properties"]["job_type"]["enum"] = sorted(HANDLERS)
    document["allOf"] = document_rules()
    return {**CONTRACT, "$defs": schemas}


# ── AsyncAPI ─────────────────────────────────────────────────────────────────────────────────────────────────────────

OF_EXAMPLE = {"user_id": "user-1", "job_id": "66a1f0c2e4b0a1b2c3d4e5f6", "session_id": None}
EXAMPLES: Mapping[str, Schema] = {
    "JobStatusUpdate": {
        "type": "job_status_update",
        **OF_EXAMPLE,
        "status": "processing",
        "message": "Your job has started.",
    },
    "JobProgress": {"type": "job_progress", **OF_EXAMPLE, "attempt": 1, "sequence": 0, "delta": "Once "},
}


def channel(name: str, address: str, message: str, description: str, **more: Any) -> Schema:
    found = {"messages": {message: {"$ref": f"#/components/messages/{message}"}}}
    return {name: {"address": address, "description": description, **found, **more}}


def operation(name: str, action: str, channel_name: str, summary: str) -> Schema:
    return {name: {"action": action, "channel": {"$ref": f"#/channels/{channel_name}"}, "summary": summary}}


def message(name: str, title: str) -> Schema:
    payload: Schema = {"payload": {"$ref": f"#/components/schemas/{name}"}, "contentType": "application/json"}
    if name in EXAMPLES:
        correlation = {"correlationId": {"location": "$message.payload#/job_id"}}
        payload |= {**correlation, "examples": [{"name": "example", "payload": EXAMPLES[name]}]}
    return {name: {"name": name, "title": title, **payload}}


def asyncapi_document(queue: str) -> Schema:
    """An AsyncAPI 3.0 document of what the worker publishes and of what it takes from the queue on Redis."""
    types = {name: EXCHANGED[name] for name in ("RedisMessage", "JobStatusUpdate", "JobProgress")}
    parameter = {"queue": {"default": queue, "description": "The worker's CELERY_QUEUE_NAME."}}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "AI Backend Worker",
            "version": __version__,
            "description": "docs/contract.md explains it. The operations are the worker's.",
            "license": {"name": "MIT"},
        },
        "defaultContentType": "application/json",
        "servers": {"redis": {"host": "redis:6379", "protocol": "redis", "description": "REDIS_URL"}},
        "channels": {
            **channel("jobs", "{queue}", "RedisMessage", "The queue: a list.", parameters=parameter),
            **channel("jobNotifications", STATUS_CHANNEL, "JobStatusUpdate", "Pub/sub: each status of a job."),
            **channel("jobProgress", PROGRESS_CHANNEL, "JobProgress", "Pub/sub: texts while they are written."),
        },
        "operations": {
            **operation("takeJob", "receive", "jobs", "Takes a job that the API has put into the queue (LPUSH)."),
            **operation("publishStatus", "send", "jobNotifications", "Publishes what the job's document has already."),
            **operation("publishProgress", "send", "jobProgress", "Publishes a piece of a text, if anybody listens."),
        },
        "components": {
            "messages": {
                **message("RedisMessage", "A job to be done"),
                **message("JobStatusUpdate", "A job's status"),
                **message("JobProgress", "A piece of a text"),
            },
            "schemas": schemas_of(types, "components/schemas"),
        },
    }


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


@click.command("schema", short_help="Print what API and worker exchange, as JSON Schemas.")
@click.option("--asyncapi", is_flag=True, help="print an AsyncAPI document of the queue and the two channels instead")
def command(asyncapi: bool) -> None:
    """Print what API and worker exchange, as JSON Schemas: documents, messages, notices, and each job type's input.

    Job types of your own (HANDLER_MODULES) are among them. It needs no server.
    """
    settings = load_settings()
    with contextlib.closing(configure(settings)):
        app.loader.import_default_modules()
        printed = asyncapi_document(settings.celery_queue_name) if asyncapi else contract_schema()
        print(json.dumps(printed, indent=2))
