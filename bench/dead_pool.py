"""How long it takes until all jobs of a node pool that died at once are put back into the queue.

The pool is simulated: documents with leases that have just run out. The workers that are left are real.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final

from bench.contestants import OURS, Bench
from bench.figures import Document, Figure, Goal
from bench.measurements import FIRST_SWEEP_S, make_api_indexes
from testbed.api import new_document
from testbed.processes import poll
from testbed.servers import DATABASE
from workerkit.sentences import GAVE_UP

JOBS: Final = 10_000
WORKERS_LEFT: Final = 10
GIVE_UP_S: Final = 600.0
WITHIN_TWO_MINUTES: Final = Goal("ours", 120.0)
NONE: Final = Goal("ours", 0.5)
DEAD: Final = "dead node"
QUEUE: Final = "bench_dead_pool"


def dead_job() -> Document:
    """Return a job that a worker of the pool has run for a minute."""
    now = datetime.now(UTC)
    started_at = now - timedelta(minutes=1)
    own = {"owner": DEAD, "node": DEAD, "pid": 1, "queue": QUEUE, "attempt": 1, "first_started_at": started_at}
    own |= {"lease_until": now, "deadline": now + timedelta(minutes=1), "limits": [120, 90]}
    started = {"status": "processing", "started_at": started_at, "created_at": started_at}
    return {**new_document("text_generation", {"prompt": "Tell."}, user_id="u"), **started, "worker": own}


def dead_pool(bench: Bench) -> list[Figure]:
    """Until 10,000 jobs of a node pool that died at once are put back, by ten workers.

    It takes minutes, so it runs only with `--long`, or by its own name.
    """
    database = f"{DATABASE}_{QUEUE}"
    jobs = bench.mongo[database]["jobs"]
    contestant = replace(OURS, queue=QUEUE, settings={"DATABASE_NAME": database})
    with ExitStack() as stack:
        stack.callback(bench.mongo.drop_database, database)
        make_api_indexes(jobs)
        workers = [stack.enter_context(bench.worker(contestant, ready=False)) for _ in range(WORKERS_LEFT)]
        for worker in workers:
            worker.wait_ready(60)
        time.sleep(FIRST_SWEEP_S)
        jobs.insert_many([dead_job() for _ in range(JOBS)])
        died_at = time.monotonic()
        poll(lambda: not jobs.count_documents({"worker.node": DEAD}), GIVE_UP_S, interval_s=0.5)
        took_s = time.monotonic() - died_at
        untried = jobs.count_documents({"status": "failed", "error_message": GAVE_UP})
    note = f"by {WORKERS_LEFT} workers, from when the leases of a node pool have run out"
    back = Figure(f"{JOBS:,} lost jobs: put back", "s", [took_s], goal=WITHIN_TWO_MINUTES, note=note)
    return [back, Figure(f"{JOBS:,} lost jobs: failed untried", "", [untried], goal=NONE)]
