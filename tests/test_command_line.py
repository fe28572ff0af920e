"""`python worker.py` and its commands as processes: what they print, and by which exit code they end."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from testbed.api import Api
from testbed.forks import WORKER
from testbed.processes import free_port, poll
from testbed.provider import Provider
from tests.lab import KEY, TEXT, ago
from tests.site import CELERY_COMMAND, StartWorker, insert_processing, lease, run_impatiently, run_python, run_worker
from worker import COMMANDS, main

# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────

FAULTS = {
    "MONGODB_URL": "mongo://user:planted-password@host",
    "REDIS_URL": "http://:planted-password@host",
    "CELERY_SOFT_TIME_LIMIT": "ninety",
    "CELERY_TIME_LIMIT": "-1",
    "WORKER_POOL": "gevent",
    "WORKER_CONCURRENCY": "0",
    "OPENAI_BASE_URL": "localhost:1234",
}
STARTS = {"worker.py": (str(WORKER),), "celery": CELERY_COMMAND}


@pytest.mark.parametrize("command", STARTS.values(), ids=STARTS)
def test_every_bad_setting_is_named_at_once_and_the_worker_ends_with_2(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    ended = run_python({**FAULTS, "OPENAI_API_KEY": KEY}, tmp_path, *command)
    shown = ended.stdout + ended.stderr
    assert ended.returncode == 2
    assert [name for name in FAULTS if f"{name} = " not in shown] == []
    assert "Traceback" not in shown
    assert "planted" not in shown


def test_celerys_own_command_names_misspelt_variables(tmp_path: Path) -> None:
    ended = run_python({"WORKER_CONCURENCY": "planted"}, tmp_path, "-m", "celery", "-A", "worker", "report")
    assert "WORKER_CONCURENCY (environment) isn't a setting: is WORKER_CONCURRENCY meant?" in ended.stderr
    assert "planted" not in ended.stdout + ended.stderr


def test_a_soft_limit_over_the_hard_one_is_a_fault(tmp_path: Path) -> None:
    ended = run_worker({"CELERY_SOFT_TIME_LIMIT": "120", "CELERY_TIME_LIMIT": "120"}, tmp_path)
    assert ended.returncode == 2
    assert "CELERY_TIME_LIMIT = '120': should be greater than CELERY_SOFT_TIME_LIMIT" in ended.stderr


def test_a_pool_in_which_no_lease_would_be_kept_is_refused(environment: dict[str, str], tmp_path: Path) -> None:
    ended = run_worker(environment, tmp_path, "run", "--pool=gevent")
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False)
    assert "isn't supported: use prefork, threads or solo" in ended.stderr


@pytest.mark.parametrize("command", STARTS.values(), ids=STARTS)
def test_a_dotenv_file_in_another_encoding_ends_the_worker_with_2_and_advice(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / ".env").write_text("WORKER_POOL=solo\n", encoding="utf-16")
    ended = run_python({}, tmp_path, *command)
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False)
    assert ".env is in UTF-16: save it in UTF-8" in ended.stderr


def test_a_system_without_semaphores_ends_the_prefork_pool_with_2_and_advice(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """It has a read-only /dev/shm, in a mount namespace of its own."""
    mount = (
        "unshare",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs -o ro none /dev/shm && exec "$@"',
        "sh",
    )
    if subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("this system allows no mount namespaces")
    command, variables = [*mount, sys.executable, str(WORKER)], {**os.environ, **environment, "WORKER_POOL": "prefork"}
    ended = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False)
    assert "there are none (Read-only file system): mount a writable /dev/shm" in ended.stderr


def test_more_jobs_than_short_leases_allow_are_refused_on_celerys_command_line_too(
    environment: dict[str, str], tmp_path: Path
) -> None:
    ended = run_worker(environment, tmp_path, "run", "--pool=threads", "--concurrency=300")
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False)
    assert "LEASE_SECONDS should be at least 10 where over 100 jobs run at a time" in ended.stderr


def test_the_worker_reads_dotenv(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("WORKER_POOL=gevent\nAPI_PORT=8000\nPROCESSING_TIMEOUT_SECONDS=120\n")
    ended = run_worker({}, tmp_path)
    assert "WORKER_POOL = 'gevent'" in ended.stderr
    assert "API_PORT" not in ended.stderr


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    shown = CliRunner().invoke(main, [command, "--help"])
    assert shown.exit_code == 0
    assert f"{command} [OPTIONS]" in shown.output


def test_help_lists_the_commands(tmp_path: Path) -> None:
    ended = run_worker({}, tmp_path, "--help")
    assert ended.returncode == 0
    assert all(name in ended.stdout for name in COMMANDS)


def test_the_start_says_what_the_worker_is_connected_to(
    environment: dict[str, str], provider: Provider, start_worker: StartWorker
) -> None:
    worker = start_worker(ready=False)
    poll(lambda: "audio " in worker.text(), 30, description="the last line of what it says")
    wanted = (environment["CELERY_QUEUE_NAME"], environment["DATABASE_NAME"], f"127.0.0.1:{provider.port}")
    assert [what for what in (*wanted, "prefork, 1 at a time") if what not in worker.text()] == []


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_a_worker_that_is_started_as_a_user_starts_it_works(api: Api, start_worker: StartWorker, pool: str) -> None:
    """Most tests fork their workers instead."""
    start_worker(command=[str(WORKER)], WORKER_POOL=pool)
    assert api.wait_notice(api.text("Hello"), "completed")


def test_run_passes_celerys_options_on_and_works(api: Api, start_worker: StartWorker) -> None:
    worker = start_worker(command=[str(WORKER), "run", "--max-tasks-per-child=1000"])
    stats = api.celery.control.inspect([worker.name], timeout=10).stats() or {}
    assert stats[worker.name]["pool"]["max-tasks-per-child"] == 1000
    assert api.wait_notice(api.text("Hello"), "completed")


def test_check_finds_everything_in_order(environment: dict[str, str], tmp_path: Path) -> None:
    ended = run_worker(environment, tmp_path, "check")
    assert ended.returncode == 0, ended.stdout
    assert "FAULT" not in ended.stdout
    wanted = ("MongoDB", "broker", "maxmemory-policy", "artifact store", "provider, text", "provider, audio")
    assert [what for what in wanted if what not in ended.stdout] == []


NO_MONGODB = "mongodb://user:planted@127.0.0.1:{port}/x"
WRONG = {
    "MONGODB_URL": (NO_MONGODB, "start the server that belongs there"),
    "REDIS_URL": ("redis://:planted@127.0.0.1:{port}/0", "start the server that belongs there"),
    "OPENAI_BASE_URL": ("http://127.0.0.1:{port}/v1", "start the server that belongs there"),
    "ARTIFACT_URL": ("file:///proc/no/such/folder", "is ARTIFACT_URL right"),
}


@pytest.mark.parametrize("variable", WRONG)
def test_check_says_what_is_wrong_and_ends_with_1(environment: dict[str, str], tmp_path: Path, variable: str) -> None:
    value, advice = WRONG[variable]
    ended = run_impatiently({**environment, variable: value.format(port=free_port())}, tmp_path, "check")
    assert ended.returncode == 1
    assert "FAULT" in ended.stdout
    assert advice in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr
    assert "planted" not in ended.stdout + ended.stderr


def test_status_shows_jobs_queue_and_failures(environment: dict[str, str], api: Api, tmp_path: Path) -> None:
    for status in ("pending", "completed", "completed"):
        at = datetime.now(UTC) if status == "completed" else None
        api.insert(TEXT, {}, status=status, completed_at=at)
    insert_processing(api, "expired", worker=lease(lease_until=ago(3600)))
    failed = api.insert(TEXT, {}, status="failed", error_message="It broke.", completed_at=datetime.now(UTC))
    api.send("waiting")
    ended = run_worker(environment, tmp_path, "status")
    rows = [" ".join(row.split()) for row in ended.stdout.splitlines()]
    assert ended.returncode == 1
    assert rows[0] == f"NEEDS YOU: No worker answers, so no job of the queue {api.queue} is worked on."
    for row in ("running 0", f"queue {api.queue}: 1 message that no worker has taken", "1 It broke."):
        assert row in rows
    assert "ended in the last hour: 2 completed, 1 failed, 0 cancelled" in rows
    assert any(row.startswith("unowned 1 ") for row in rows)
    assert f"such as job {failed}" in rows


def test_recover_without_mongodb_ends_with_one_sentence(environment: dict[str, str], tmp_path: Path) -> None:
    url = NO_MONGODB.format(port=free_port())
    ended = run_impatiently({**environment, "MONGODB_URL": url}, tmp_path, "recover")
    assert ended.returncode == 1
    assert "MongoDB can't be reached" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_recover_puts_a_lost_job_back_into_the_queue(environment: dict[str, str], api: Api, tmp_path: Path) -> None:
    job = insert_processing(api, "expired", worker=lease(lease_until=ago(3600)))
    ended = run_worker(environment, tmp_path, "recover")
    assert ended.returncode == 0
    assert ended.stdout.strip() == f"job={job} no attempt worked on it: put back into the queue"
    assert api.document(job)["worker"]["owner"] is None
    assert api.redis.llen(api.queue) == 1


def test_recover_says_when_there_is_nothing_to_do(environment: dict[str, str], api: Api, tmp_path: Path) -> None:
    ended = run_worker(environment, tmp_path, "recover")
    assert (ended.returncode, ended.stdout.strip()) == (0, "nothing to recover")


def test_health_is_1_without_a_worker(environment: dict[str, str], tmp_path: Path) -> None:
    assert run_worker({**environment, "TMPDIR": str(tmp_path)}, tmp_path, "health").returncode == 1
