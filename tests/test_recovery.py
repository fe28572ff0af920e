"""Jobs that no attempt works on any more, and which worker goes on with them: dead processes, lost messages, leases."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import psutil
import pytest

from testbed.processes import poll
from tests.lab import IMAGE, TEXT, ago
from tests.place import PATIENCE_S, OpenPlace, Outcomes, Place, Scenario, Step, assert_ended_once, side_by_side
from tests.site import Site, artifacts, insert_processing, lease
from workerkit.sentences import GAVE_UP, STOPPED

# ── dead processes ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_job_of_a_killed_child_completes_by_a_second_attempt(site: Site) -> None:
    job = site.api.text("killed child [hang times=1]")
    site.wait_call("killed child")
    os.kill(site.api.document(job)["worker"]["pid"], signal.SIGKILL)
    assert site.api.wait(job)["status"] == "completed"
    assert site.goes_on()
    assert site.api.document(job)["worker"]["attempt"] == 2
    assert len(site.provider.calls_for("killed child")) == 2
    # Celery delivers the message again, and the sweep sends one. The later of them publishes the end once more.
    notices = site.api.notices(job)
    assert (notices[:3], set(notices[3:]) - {"completed"}) == (["processing", "processing", "completed"], set())


def test_a_job_that_kills_every_child_fails_in_the_end(site: Site) -> None:
    job = site.api.text("kills all [hang]")
    killed: set[int] = set()

    def has_failed() -> bool:
        document = site.api.document(job)
        pid = document.get("worker", {}).get("pid")  # none while it waits for its next attempt
        if document["status"] == "processing" and pid and pid not in killed and psutil.pid_exists(pid):
            site.wait_call("kills all", len(killed) + 1)
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        return bool(document["status"] == "failed")

    poll(has_failed, 60)
    assert len(killed) == 4
    assert site.goes_on()


# ── revoked tasks ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_revoked_task_that_runs_fails_its_job_and_the_worker_goes_on(site: Site) -> None:
    job = site.api.insert(TEXT, {"prompt": "revoked while it runs [hang]"})
    task = site.api.enqueue(job)
    site.wait_call("revoked while it runs")
    site.api.celery.control.revoke(task.id, terminate=True)
    assert site.api.wait(job)["error_message"] == STOPPED
    site.api.wait_notice(job, "failed")
    assert site.goes_on()


def test_a_task_that_is_revoked_before_it_runs_fails_its_job(site: Site) -> None:
    first = site.api.text("keeps the slot [hang]")
    site.wait_call("keeps the slot")
    job = site.api.insert(TEXT, {"prompt": "revoked in the queue"})
    task = site.api.enqueue(job)
    assert site.api.celery.control.revoke(task.id, destination=[site.worker.name], reply=True, timeout=30)
    assert site.api.status(first) == "processing"
    site.api.cancel(first)  # so that the slot is free for the revoked one
    assert site.api.wait(job)["error_message"] == STOPPED
    assert not site.provider.calls_for("revoked in the queue")


# ── leases and messages ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_job_with_an_expired_lease_is_rescued(site: Site) -> None:
    job = insert_processing(site.api, "expired", worker=lease(lease_until=ago(3600)))
    assert site.api.wait(job)["status"] == "completed"
    assert site.api.document(job)["worker"]["attempt"] == 2


def test_a_live_lease_of_another_worker_is_never_touched(site: Site) -> None:
    held = insert_processing(site.api, "held elsewhere", worker=lease())
    before = site.api.document(held)
    for _ in range(2):
        site.api.wait(insert_processing(site.api, "expired beside it", worker=lease(lease_until=ago(3600))))
    assert site.api.document(held) == before


def test_a_released_job_whose_message_was_lost_is_rescued(site: Site) -> None:
    times = {"available_at": ago(3600), "rescue_at": ago(3600)}
    job = insert_processing(site.api, "lost", worker=lease(owner=None, attempt=0, **times))
    assert site.api.wait(job)["status"] == "completed"


@pytest.mark.parametrize("bookkeeping", [{}, {"worker": None}], ids=["no field", "null"])
def test_an_old_job_of_a_worker_without_leases_is_taken_over(site: Site, bookkeeping: dict[str, Any]) -> None:
    job = insert_processing(site.api, "orphan", started_at=ago(3600), **bookkeeping)
    assert site.api.wait(job)["status"] == "completed"


def test_a_young_job_of_a_worker_without_leases_is_left_to_it(site: Site) -> None:
    young = insert_processing(site.api, "young", started_at=datetime.now(UTC))
    site.api.wait(insert_processing(site.api, "old", started_at=ago(3600)))
    assert site.api.status(young) == "processing"
    assert not site.provider.calls_for("young")


@pytest.mark.parametrize("what", ["its attempts", "its time"])
def test_a_lost_job_that_has_used_up_its_bounds_fails(site: Site, what: str) -> None:
    used_up: dict[str, Any] = {"attempt": 4} if what == "its attempts" else {"first_started_at": ago(3600)}
    job = insert_processing(site.api, f"used up {what}", worker=lease(lease_until=ago(3600), **used_up))
    site.api.wait_notice(job, "failed")
    assert site.api.document(job)["error_message"] == GAVE_UP
    assert not site.provider.calls_for(f"used up {what}")


# ── side by side with all that ───────────────────────────────────────────────────────────────────────────────────


def kill_a_worker(place: Place) -> None:
    job, step = "killed worker", Step("[hang times=1]", answers=2)
    first = place.start_worker().wait_ready(PATIENCE_S)
    place.submit(job, step)
    place.wait_call(job)
    place.start_worker().wait_ready(PATIENCE_S)
    first.kill()
    place.wait_ends({job: step})
    assert_ended_once(place, job, step)
    assert place.document(job)["worker"]["attempt"] == 2
    assert place.api.notices(place.jobs[job]) == ["processing", "processing", "completed"]


def leave_a_file(place: Place) -> None:
    failed = place.api.insert(IMAGE, {"prompt": "x"}, status="failed", error_message="Cancelled.")
    name = f"{failed}-0123456789abcdef.png"
    artifacts(place.api).put(b"x", _id=name, filename=name)
    place.start_worker()
    poll(lambda: not artifacts(place.api).list(), PATIENCE_S)


SCENARIOS: dict[str, Scenario] = {"killed worker": kill_a_worker, "file": leave_a_file}


@pytest.fixture(scope="module", autouse=True)
def outcomes(open_place: OpenPlace) -> Iterator[Outcomes]:
    """They begin before the first test of the module, and their own tests come last."""
    with side_by_side(open_place, SCENARIOS) as outcomes:
        yield outcomes


def test_the_job_of_a_killed_worker_is_rescued_by_another(outcomes: Outcomes) -> None:
    outcomes["killed worker"].result()


def test_a_file_that_a_dead_attempt_left_is_deleted(outcomes: Outcomes) -> None:
    outcomes["file"].result()
