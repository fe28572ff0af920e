"""The job for RQ, Dramatiq, arq and taskiq: how each framework knows it, and how its own client enqueues it.

A framework's worker and client processes import this module, in a virtual environment of the framework's own.
`BENCH_RIVAL` is the framework's name.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from typing import Any, Final

from bench import by_hand
from bench.by_hand import Document, run, run_async

FRAMEWORK: Final = os.environ.get("BENCH_RIVAL", "")
REDIS_URL: Final = os.environ.get("REDIS_URL", "")  # RQ's worker reads this name from its configuration module
QUEUE: Final = os.environ.get("CELERY_QUEUE_NAME", "")
RETRIES: Final = 3
RETRY_WAIT_S: Final = 5
LIMIT_S: Final = 120  # the hard limit of the measured worker
PAUSE_S: Final = 60.0

Jobs = Mapping[str, Document]  # the data of messages, by job id


# ── RQ ───────────────────────────────────────────────────────────────────────────────────────────────────────────

if FRAMEWORK == "rq":  # its parent forks for each job, and should have all modules before; this opens no connection
    by_hand.completions()


def enqueue_rq(jobs: Jobs, stream: bool) -> None:
    """Enqueue jobs by RQ's client."""
    import rq

    queue = rq.Queue(QUEUE, connection=by_hand.redis())
    for message in jobs.items():
        options = {"retry": rq.Retry(max=RETRIES), "job_timeout": LIMIT_S}
        queue.enqueue(f"{by_hand.__name__}.{run.__name__}", *message, stream=stream, **options)


# ── Dramatiq ─────────────────────────────────────────────────────────────────────────────────────────────────────


def run_without_result(job_id: str, job_data: Document, stream: bool) -> None:
    """Run the job. Dramatiq keeps no results by default, and logs a warning for each that is returned."""
    run(job_id, job_data, stream=stream)


def dramatiq_broker() -> Any:
    """Set Dramatiq's broker, and return the actor that runs the job."""
    import dramatiq
    from dramatiq.brokers.redis import RedisBroker

    dramatiq.set_broker(RedisBroker(url=REDIS_URL))
    options = {"max_retries": RETRIES, "min_backoff": RETRY_WAIT_S * 1000, "time_limit": LIMIT_S * 1000}
    return dramatiq.actor(run_without_result, actor_name="run", queue_name=QUEUE, **options)


def enqueue_dramatiq(jobs: Jobs, stream: bool) -> None:
    """Enqueue jobs by Dramatiq's client."""
    actor = dramatiq_broker()
    for message in jobs.items():
        actor.send(*message, stream=stream)


# ── arq ──────────────────────────────────────────────────────────────────────────────────────────────────────────

if FRAMEWORK == "arq":
    import arq
    from arq.connections import RedisSettings

    async def run_in_arq(_context: Document, job_id: str, job_data: Document, stream: bool) -> Document:
        """Run the job. arq tries only those again that ask for it."""
        try:
            return await run_async(job_id, job_data, stream=stream)
        except Exception as error:
            raise arq.Retry(defer=RETRY_WAIT_S) from error

    class ArqSettings:
        """The settings of arq's worker."""

        functions: Final = [arq.func(run_in_arq, name="run")]
        redis_settings = RedisSettings.from_dsn(REDIS_URL)
        queue_name = QUEUE
        max_jobs = 1
        max_tries = 1 + RETRIES
        job_timeout = LIMIT_S
        poll_delay = float(os.environ.get("BENCH_POLL_DELAY", "0.5"))


def enqueue_arq(jobs: Jobs, stream: bool) -> None:
    """Enqueue jobs by arq's client."""

    async def enqueue() -> None:
        pool = await arq.create_pool(ArqSettings.redis_settings, default_queue_name=QUEUE)
        for message in jobs.items():
            await pool.enqueue_job("run", *message, stream=stream)

    asyncio.run(enqueue())


# ── taskiq ───────────────────────────────────────────────────────────────────────────────────────────────────────


def taskiq_broker() -> Any:
    """Return taskiq's broker, which knows the job."""
    from taskiq import SimpleRetryMiddleware
    from taskiq_redis import RedisStreamBroker

    # Without `consumer_id` it would skip what is in the stream already. By redis-py's own timeout of 5 s the worker
    # would break down when the race pauses it for longer.
    broker = RedisStreamBroker(REDIS_URL, queue_name=QUEUE, consumer_id="0", socket_timeout=PAUSE_S)
    broker.add_middlewares(SimpleRetryMiddleware(default_retry_count=1 + RETRIES))
    broker.register_task(run_async, task_name="run", retry_on_error=True, timeout=LIMIT_S)
    return broker


def enqueue_taskiq(jobs: Jobs, stream: bool) -> None:
    """Enqueue jobs by taskiq's client."""

    async def enqueue() -> None:
        broker = taskiq_broker()
        await broker.startup()
        for message in jobs.items():
            await broker.find_task("run").kiq(*message, stream=stream)
        await broker.shutdown()

    asyncio.run(enqueue())


# ── all of them ──────────────────────────────────────────────────────────────────────────────────────────────────

ENQUEUE: Final = {"rq": enqueue_rq, "dramatiq": enqueue_dramatiq, "arq": enqueue_arq, "taskiq": enqueue_taskiq}


def enqueue_all(stream: bool) -> None:
    """Enqueue the jobs that standard input has."""
    ENQUEUE[FRAMEWORK](json.load(sys.stdin), stream)
