"""What Celery itself says of tasks and workers: events, results, `inspect`; to the API's older client as well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from testbed.api import TASK_NAME
from testbed.processes import SOURCE, poll
from tests.lab import TEXT
from tests.site import CACHE, Site, SiteOf, events_of, run_forked
from workerkit.sentences import REFUSED

LIVES = {
    "is it well": ["task-received", "task-started", "task-succeeded"],
    "try again [status 500 times=1]": ["task-started", "task-retried", "task-started", "task-succeeded"],
    "refused [status 400]": ["task-received", "task-started", "task-failed"],
}


@pytest.mark.parametrize(("prompt", "expected"), LIVES.items())
def test_a_tasks_life_is_reported_by_events(site: Site, prompt: str, expected: list[str]) -> None:
    with events_of(site.api) as events:
        task = site.api.enqueue(site.api.insert(TEXT, {"prompt": prompt}))

        def reported() -> list[str]:
            kinds = [event["type"] for event in list(events) if event.get("uuid") == task.id]
            return [kind for kind in kinds if kind in expected]

        with suppress(TimeoutError):  # the assertion shows what has come instead
            poll(lambda: reported()[-1:] == expected[-1:], 20)
        assert reported() == expected


def test_the_tasks_result_names_job_and_status(site: Site) -> None:
    job = site.api.insert(TEXT, {"prompt": "result"})
    task = site.api.enqueue(job)
    assert task.get(timeout=20) == {"job_id": str(job), "status": "completed"}
    assert task.state == "SUCCESS"


def test_a_failed_jobs_task_ends_in_failure_with_the_persons_sentence(site: Site) -> None:
    task = site.api.enqueue(site.api.insert(TEXT, {"prompt": "refused [status 400]"}))
    assert str(task.get(timeout=20, propagate=False)) == REFUSED
    assert task.state == "FAILURE"
    assert "Traceback" not in site.log()


def test_inspect_active_lists_a_running_job(site: Site) -> None:
    task = site.api.enqueue(site.api.insert(TEXT, {"prompt": "active [hang]"}))
    site.wait_call("active")
    active = site.api.celery.control.inspect([site.worker.name], timeout=10).active() or {}
    assert [(running["id"], running["name"]) for running in active[site.worker.name]] == [(task.id, TASK_NAME)]


INSPECTED = {
    "active": "OK",
    "scheduled": "empty",
    "reserved": "empty",
    "registered": TASK_NAME,
    "active_queues": "queue_prefork",
    "stats": '"prefetch_count"',
}


@pytest.fixture(scope="module")
def inspected(
    sites: SiteOf, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, subprocess.CompletedProcess[str]]:
    """What each command of `celery inspect` prints about the worker. They run side by side."""
    site, folder = sites("prefork"), tmp_path_factory.mktemp("inspect")
    environment = {**site.environment, "PYTHONPATH": f"{site.environment['PYTHONPATH']}:{SOURCE}"}

    program = folder / "celery_command.py"
    program.write_text("from celery.__main__ import main\n\nmain()\n")  # as `python -m celery` does

    def inspect(command: str) -> subprocess.CompletedProcess[str]:
        arguments = ("-A", "worker", "inspect", command, "-d", site.worker.name, "--timeout", "10")
        return run_forked(environment, folder, *arguments, program=program)

    with ThreadPoolExecutor(2) as threads:
        return dict(zip(INSPECTED, threads.map(inspect, INSPECTED), strict=True))


@pytest.mark.parametrize("command", INSPECTED)
def test_celery_inspect_answers(inspected: Mapping[str, subprocess.CompletedProcess[str]], command: str) -> None:
    assert inspected[command].returncode == 0, inspected[command].stderr
    assert INSPECTED[command] in inspected[command].stdout


# ── an older client ──────────────────────────────────────────────────────────────────────────────────────────────

OLD_CLIENT = ("celery==5.3.4", "kombu==5.3.4", "redis==5.0.1")
OLD_CLIENT_SCRIPT = """
import json, sys, threading, time
import celery, kombu, redis

url, queue, task_name, job_id, worker = sys.argv[1:]
app = celery.Celery("api", broker=url, backend=url)
events = []
receiver = app.events.Receiver(app.connection_for_read(), handlers={"*": events.append})
threading.Thread(target=receiver.capture, kwargs={"wakeup": True}, daemon=True).start()
while not events:
    time.sleep(0.05)
args = (job_id, {"job_id": job_id, "job_type": "text_generation", "input_data": {"prompt": "x"}})
result = app.send_task(task_name, args=args, queue=queue, soft_time_limit=20, time_limit=30)
while not [event for event in events if event["type"] == "task-started" and event["uuid"] == result.id]:
    time.sleep(0.05)
inspect = app.control.inspect([worker], timeout=10)
said = {
    "versions": [celery.__version__, kombu.__version__, redis.__version__],
    "active": [[task["name"], task["id"] == result.id] for task in inspect.active()[worker]],
    "pool": inspect.stats()[worker]["pool"]["max-concurrency"],
    "queues": [entry["name"] for entry in inspect.active_queues()[worker]],
    "idle": [inspect.scheduled()[worker], inspect.reserved()[worker]],
    "result": result.get(timeout=20),
}
while "task-succeeded" not in [event["type"] for event in events if event.get("uuid") == result.id]:
    time.sleep(0.05)
said["events"] = [event["type"] for event in events if event.get("uuid") == result.id]
print(json.dumps(said))
"""


@pytest.fixture(scope="session")
def old_python() -> Path:
    """The Python of an environment with the API's client of Celery, made once and kept in the user's cache."""
    folder = CACHE / "-".join([*OLD_CLIENT, f"python{sys.version_info.major}.{sys.version_info.minor}"])
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *OLD_CLIENT]
        ended = subprocess.run(install, capture_output=True, text=True)
        if ended.returncode and not os.environ.get("CI"):
            pytest.skip(f"pip can't install the older client: {ended.stderr.strip()[-300:]}")
        assert ended.returncode == 0, ended.stderr
        complete.touch()
    return python


@pytest.mark.slow
def test_the_apis_older_celery_sends_reads_inspects_and_receives_events(site: Site, old_python: Path) -> None:
    # The job has to run while the client asks about it five times. Only the client knows when it has asked.
    job = site.api.insert(TEXT, {"prompt": "an older client [delay 8]"})
    arguments = [site.api.redis_url, site.api.queue, TASK_NAME, str(job), site.worker.name]
    command = [str(old_python), "-I", "-c", OLD_CLIENT_SCRIPT, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout)
    assert said["versions"] == ["5.3.4", "5.3.4", "5.0.1"]
    assert (said["active"], said["pool"], said["queues"]) == ([[TASK_NAME, True]], 1, [site.api.queue])
    assert said["idle"] == [[], []]
    assert said["result"] == {"job_id": str(job), "status": "completed"}
    assert said["events"] == ["task-received", "task-started", "task-succeeded"]
