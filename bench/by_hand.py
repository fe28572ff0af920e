"""The job as one would write it by hand, without a lease, a fence or a sweeper: what every comparison measures against.

One call by the openai SDK, two MongoDB writes (majority, journalled) and two publishes; with synchronous clients for
Celery, RQ and Dramatiq, with asynchronous ones for arq and taskiq, as people use them. The call is made in two ways:
with the whole answer at once, as most people write it, and streamed, which is the call that this worker makes.

The worker processes of these frameworks import this module, in environments that have little more than pymongo, redis
and openai. So it imports nothing else. It connects when a job first needs that, after a fork.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from functools import cache
from typing import Any, Final

from bson import ObjectId
from openai import AsyncOpenAI, OpenAI
from pymongo import AsyncMongoClient, MongoClient
from pymongo.write_concern import WriteConcern
from redis import Redis

from bench import MODEL

Document = dict[str, Any]

MAX_TOKENS: Final = 4096
STATUS_CHANNEL: Final = "job_notifications"
MAJORITY: Final = WriteConcern("majority", j=True)


# ── what is sent and written ─────────────────────────────────────────────────────────────────────────────────────


def request(prompt: str, *, stream: bool) -> Document:
    """Return the request for a prompt."""
    whole = {"model": MODEL, "max_tokens": MAX_TOKENS, "messages": [{"role": "user", "content": prompt}]}
    return {**whole, "stream": True, "stream_options": {"include_usage": True}} if stream else whole


def output(text: str, tokens: int) -> Document:
    """Return the job's `output_data`."""
    return {"generated_text": text, "model_used": MODEL, "tokens_used": tokens}


def output_of_whole(answer: Any) -> Document:
    """Return the output for an answer that came at once."""
    return output(answer.choices[0].message.content, answer.usage.total_tokens)


def piece_of(chunk: Any) -> tuple[str, int]:
    """Return a chunk's text, and the number of tokens if the chunk has it."""
    return "".join(choice.delta.content or "" for choice in chunk.choices[:1]), getattr(chunk.usage, "total_tokens", 0)


def output_of_pieces(pieces: list[tuple[str, int]]) -> Document:
    """Return the output for a streamed answer."""
    texts, tokens = zip(*pieces, strict=True)
    return output("".join(texts), max(tokens))


def started() -> Document:
    """Return the update at the job's start."""
    now = datetime.now(UTC)
    return {"$set": {"status": "processing", "started_at": now, "updated_at": now}}


def completed(output_data: Document) -> Document:
    """Return the update at the job's end."""
    now = datetime.now(UTC)
    return {"$set": {"status": "completed", "output_data": output_data, "completed_at": now, "updated_at": now}}


def notice(job_id: str, job_data: Document, status: str, message: str) -> str:
    """Return the notification for the API."""
    owner = {"user_id": job_data["user_id"], "session_id": job_data["session_id"]}
    return json.dumps({"type": "job_status_update", "job_id": job_id, "status": status, "message": message, **owner})


# ── synchronous ──────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def jobs() -> Any:
    """Connect to the jobs in MongoDB, once in a process. The server's profiler knows the connection by the queue."""
    client = MongoClient[Document](os.environ["MONGODB_URL"], appname=os.environ["CELERY_QUEUE_NAME"])
    return client[os.environ["DATABASE_NAME"]].get_collection("jobs", write_concern=MAJORITY)


@cache
def redis() -> Redis:
    """Connect to Redis, once in a process."""
    return Redis.from_url(os.environ["REDIS_URL"])


@cache
def completions() -> Any:
    """Return the client for the provider, which opens its connection at the first call."""
    return OpenAI(max_retries=0).chat.completions


def publish(job_id: str, job_data: Document, status: str, message: str) -> None:
    """Publish a status to the API."""
    redis().publish(STATUS_CHANNEL, notice(job_id, job_data, status, message))


def ask(prompt: str, *, stream: bool) -> Document:
    """Call the provider and return the job's output."""
    answer = completions().create(**request(prompt, stream=stream))
    return output_of_pieces(list(map(piece_of, answer))) if stream else output_of_whole(answer)


def run(job_id: str, job_data: Document, *, stream: bool = False) -> Document:
    """The whole job: write, publish, call, write, publish."""
    one = {"_id": ObjectId(job_id)}
    jobs().update_one(one, started())
    publish(job_id, job_data, "processing", "Your job has started.")
    answer = ask(job_data["input_data"]["prompt"], stream=stream)
    jobs().update_one(one, completed(answer))
    publish(job_id, job_data, "completed", "Your result is ready.")
    return {"job_id": job_id, "status": "completed"}


# ── on an event loop ─────────────────────────────────────────────────────────────────────────────────────────────


@cache
def async_jobs() -> Any:
    """Connect to the jobs in MongoDB."""
    client = AsyncMongoClient[Document](os.environ["MONGODB_URL"], appname=os.environ["CELERY_QUEUE_NAME"])
    return client[os.environ["DATABASE_NAME"]].get_collection("jobs", write_concern=MAJORITY)


@cache
def async_redis() -> Any:
    """Connect to Redis."""
    from redis import asyncio  # synchronous workers, whose start is measured too, need not import it

    return asyncio.Redis.from_url(os.environ["REDIS_URL"])


@cache
def async_completions() -> Any:
    """Return the client for the provider."""
    return AsyncOpenAI(max_retries=0).chat.completions


async def ask_async(prompt: str, *, stream: bool) -> Document:
    """Call the provider and return the job's output."""
    answer = await async_completions().create(**request(prompt, stream=stream))
    return output_of_pieces([piece_of(chunk) async for chunk in answer]) if stream else output_of_whole(answer)


async def run_async(job_id: str, job_data: Document, *, stream: bool = False) -> Document:
    """The whole job: write, publish, call, write, publish."""
    one = {"_id": ObjectId(job_id)}
    await async_jobs().update_one(one, started())
    await async_redis().publish(STATUS_CHANNEL, notice(job_id, job_data, "processing", "Your job has started."))
    answer = await ask_async(job_data["input_data"]["prompt"], stream=stream)
    await async_jobs().update_one(one, completed(answer))
    await async_redis().publish(STATUS_CHANNEL, notice(job_id, job_data, "completed", "Your result is ready."))
    return {"job_id": job_id, "status": "completed"}
