"""Bare Celery with the job written by hand: `celery -A bench.bare:bare worker`, the yardstick of the measurements.

Its settings for events, results and acknowledgement are those of the worker that is measured.
"""

from __future__ import annotations

import os

from celery import Celery

from bench import BARE_QUEUE, by_hand
from bench.by_hand import Document

bare = Celery("bare", broker=os.environ.get("REDIS_URL"), backend=os.environ.get("REDIS_URL"), set_as_current=False)
bare.conf.update(
    task_default_queue=BARE_QUEUE,
    accept_content=["json"],
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_track_started=True,
    task_soft_time_limit=90,
    task_time_limit=120,
    worker_send_task_events=True,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
)


@bare.task(name="bare.process")
def process(job_id: str, job_data: Document) -> Document:
    """The job, with the whole answer at once."""
    return by_hand.run(job_id, job_data)


@bare.task(name="bare.process_streaming")
def process_streaming(job_id: str, job_data: Document) -> Document:
    """The job with a streamed answer, which is the call that the measured worker makes."""
    return by_hand.run(job_id, job_data, stream=True)


@bare.task(name="bare.body")
def body(job_id: str, job_data: Document) -> None:
    """Publish that the first line of the task's body was reached."""
    by_hand.publish(job_id, job_data, "processing", "")


@bare.task(name="bare.noop")
def noop(job_id: str, job_data: Document) -> None:
    """Do nothing, so that only Celery itself is measured."""
