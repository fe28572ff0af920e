"""Measurements of the worker, comparisons with other frameworks, and the chaos run: `python -m bench --help`.

- `by_hand`: the job as one would write it by hand, which all compared frameworks run
- `bare`: a bare Celery worker with that job
- `rival_jobs`: the same for RQ, Dramatiq, arq and taskiq; it runs in their own virtual environments
- `contestants`: who is compared, the servers, and the API's side
- `measurements`, `scale`, `rivals`: what is measured; each measurement returns figures
- `figures`, `chart`: rows of the table, and the pictures that are drawn from them
- `chaos_plan`, `chaos`, `chaos_records`, `chaos_audit`: thousands of jobs while everything around the workers dies
"""

from typing import Final

MODEL: Final = "gpt-6-luna"
BARE_QUEUE: Final = "bench_bare"  # of the bare Celery worker
