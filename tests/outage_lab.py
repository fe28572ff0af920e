"""What tests of outages share: how servers fail, and workers that hold a job at each step of its way meanwhile.

An outage takes longer than what it does to one job. So each outage meets many jobs at once, every job at another step,
and the tests afterwards look at what has become of each. Waits are short here: seconds prove what minutes would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import ClassVar

import pytest

from testbed.network import Gateway
from testbed.processes import Server, poll
from tests.lab import ago
from tests.place import LEASE_S, LIMITS, PATIENCE_S, HoldingProvider, OpenPlace, Place, Step, assert_ended_once

UNTIL_AWAY = "hold until_it_is_away"  # in a prompt: answered once the server has gone
UNTIL_OVER = "hold until_it_is_over"  # in a prompt: answered once the server is back

# ── how servers fail ─────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    """The server has crashed. It comes back with its data."""
    server.kill()
    try:
        yield
    finally:
        server.start()


@contextmanager
def hung(server: Server) -> Iterator[None]:
    """The server accepts connections and bytes, and answers nothing."""
    server.pause()
    try:
        yield
    finally:
        server.resume()


@contextmanager
def swallowed(gate: Gateway) -> Iterator[None]:
    """The network drops all packets, and neither side gets an error."""
    gate.swallow()
    try:
        yield
    finally:
        gate.pass_on()


def comes_true(condition: Callable[[], object], timeout_s: float = 30) -> bool:
    """Whether a condition becomes true in time. What a fixture sees of an outage must not fail the fixture."""
    with suppress(TimeoutError):
        return bool(poll(condition, timeout_s))
    return False


# ── outages of a broker ──────────────────────────────────────────────────────────────────────────────────────────

POOLS = ("prefork", "threads")
# Celery would try to connect again after 2, 4, 6… seconds.
SHORT_WAITS = """
from functools import partialmethod

import worker
from workerkit.broker import JobConnection

worker.LostMessages.overdue_s = 2.0
worker.JobStore.rescue_first_s = 2.0
worker.Sweeper.notice_overdue_s = 1.0
worker.Keeper.tick_s = 0.5
often = {"interval_start": 0.5, "interval_step": 0.0, "interval_max": 0.5}
JobConnection.ensure_connection = partialmethod(JobConnection.ensure_connection, **often)
JobConnection._ensure_connection = partialmethod(JobConnection._ensure_connection, **often)
"""
# What a sweeper logs that has a message to send, and can't.
SWEEP_FAULTS = ("lost jobs can't be put back into the queue", "lost messages can't be looked for")
LASTS_S = 3.0  # so that a retry comes due, sweeps fail, and lines would be repeated

STEPS = {
    "ends": Step(UNTIL_AWAY),
    "goes on": Step(UNTIL_OVER),
    "cancelled": Step("hold for_ever", ends="failed"),
    "retried": Step(f"{UNTIL_AWAY} [status 500 times=1]", answers=2),
    "retried, too": Step(f"{UNTIL_AWAY} [status 500 times=1]", answers=2),
}
SLOTS = len(STEPS)
QUEUED = {f"queued {number}": Step("") for number in range(2)}
LOST = {"lost": Step("")}  # a job whose message never came, so that a sweeper tries to send one meanwhile
ALL_STEPS = {**STEPS, **QUEUED, **LOST}


@dataclass(frozen=True)
class Meanwhile:
    """What is seen of a place while the broker is away."""

    is_ended: bool
    notices: list[str]  # of the job that has ended
    is_cancelled: bool
    are_retries_released: bool
    is_lease_renewed: bool
    are_queued_completed: bool
    has_sweep_failed: bool
    is_keeper_alive: bool


@dataclass(frozen=True)
class Afterwards:
    """What is seen of a place when all its jobs have ended."""

    goes_on: bool
    changed_after_their_end: list[str]
    log: str
    repeats: int  # how often a fault may have been logged in so long a time


@dataclass
class BrokerOutage:
    """An outage that is over."""

    places: Mapping[str, Place]
    meanwhile: dict[str, Meanwhile]
    health: int  # exit code of `python worker.py health` meanwhile
    afterwards: dict[str, Afterwards]


def bring_jobs_to_their_steps(place: Place) -> None:
    """A job runs at each step, and others wait in the queue."""
    for name, step in STEPS.items():
        place.submit(name, step)
    for name in STEPS:
        place.wait_call(name)
    for name, step in QUEUED.items():
        place.submit(name, step)
    place.mark_logs()


def look(place: Place, since: datetime, works_off_its_queue: bool) -> Meanwhile:
    """Waits until all has happened that is to happen, or until it is clear that it doesn't."""

    def is_renewed() -> bool:
        until: datetime = place.document("goes on")["worker"]["lease_until"]
        return until > since + timedelta(seconds=LEASE_S + 1)

    def statuses(*names: str) -> set[str]:
        return {place.document(name)["status"] for name in names}

    def is_released(name: str) -> bool:
        """Whether the first attempt has let the job go.

        A later one may run where the broker still gives messages out: RabbitMQ takes one more before it blocks.
        """
        bookkeeping = place.document(name)["worker"]
        return bookkeeping["owner"] is None or (works_off_its_queue and bookkeeping["attempt"] > 1)

    def beats() -> list[float]:
        return [path.stat().st_ctime for path in place.folder.glob("ai-backend-worker-*/*.keeper")]

    ended = comes_true(lambda: statuses("ends") == {"completed"})
    cancelled = comes_true(lambda: place.calls("cancelled")[0].outcome == "disconnected")
    released = comes_true(lambda: is_released("retried") and is_released("retried, too"))
    renewed = comes_true(is_renewed)
    worked_off = works_off_its_queue and comes_true(lambda: statuses(*QUEUED) == {"completed"})
    swept = works_off_its_queue and comes_true(lambda: any(line in place.log() for line in SWEEP_FAULTS))
    alive = comes_true(lambda: min(beats()) > since.timestamp() + LASTS_S)
    return Meanwhile(
        is_ended=ended,
        notices=place.api.notices(place.jobs["ends"]),
        is_cancelled=cancelled,
        are_retries_released=released,
        is_lease_renewed=renewed,
        are_queued_completed=worked_off,
        has_sweep_failed=swept,
        is_keeper_alive=alive,
    )


def lines_about_no_job(log: str) -> list[str]:
    """What remains of a log is about the outage."""
    return [line for line in log.splitlines() if "job=" not in line and "Task " not in line]


def repeats_since(began_at: datetime) -> int:
    """How often a fault that began then may have been logged: when it began, and again each minute."""
    return 1 + int((datetime.now(UTC) - began_at).total_seconds() / 60)


def look_again(place: Place, since: datetime) -> Afterwards:
    ended_at = {name: place.document(name)["updated_at"] for name in STEPS}
    goes_on = place.goes_on(SLOTS)
    changed = [name for name in STEPS if place.document(name)["updated_at"] != ended_at[name]]
    return Afterwards(goes_on, changed, place.log(), repeats_since(since))


class BrokerLab:
    """A worker of each pool at one broker, behind a gateway, and what can fail there."""

    def __init__(self, server: Server, gate: Gateway, provider: HoldingProvider, open_place: OpenPlace) -> None:
        self.server, self.gate, self.provider = server, gate, provider
        self.places = {pool: self._open(open_place, pool) for pool in POOLS}
        self.outages: dict[str, Callable[[], AbstractContextManager[None]]] = {
            "stopped": self.stopped,
            "hung": lambda: hung(self.server),
            "unreachable": lambda: swallowed(self.gate),
            "full": self.full,
        }

    def _open(self, open_place: OpenPlace, pool: str) -> Place:
        place = open_place(pool, WORKER_POOL=pool, WORKER_CONCURRENCY=f"{SLOTS}", **LIMITS, **self.direct_settings())
        place.add_module(SHORT_WAITS + self.more_short_waits)
        place.environment.update(self.gated_settings())
        return place

    # what is peculiar to a broker

    more_short_waits: ClassVar = ""

    def direct_settings(self) -> dict[str, str]:
        """The settings with which the API reaches the broker."""
        raise NotImplementedError

    def gated_settings(self) -> dict[str, str]:
        """The settings with which the workers reach it."""
        raise NotImplementedError

    @contextmanager
    def full(self) -> Iterator[None]:
        """The broker takes no more messages."""
        raise NotImplementedError
        yield

    def start_again(self) -> None:
        """Starts the server, which has its data still."""
        self.server.start()

    # what holds for all

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The server has crashed."""
        self.server.kill()
        try:
            yield
        finally:
            self.start_again()

    def restart(self, crash: bool = False) -> None:
        """Lets the server crash, or ends it in order, and starts it again."""
        if crash:
            self.server.kill()
        else:
            self.server.stop()
        self.start_again()

    def mend(self) -> None:
        """Ends every outage that a failed test has left."""
        if not self.server.is_running:
            self.start_again()
        self.server.resume()
        self.gate.pass_on()

    def wait_ready(self) -> None:
        """Starts the workers that don't run: all at first, and later those that an earlier test has ended."""
        for place in self.places.values():
            if not place.workers or place.workers[-1].process.poll() is not None:
                place.workers.clear()
                place.start_worker()
        for place in self.places.values():
            place.wait_ready()
            place.mark_logs()

    def live_through(self, name: str) -> BrokerOutage:
        """Lets the broker fail while all places have jobs at each step, and waits until these have ended."""
        self.wait_ready()
        self.provider.let_go.clear()
        for place in self.places.values():
            bring_jobs_to_their_steps(place)
        with self.outages[name]():
            since = datetime.now(UTC)
            for place in self.places.values():
                place.insert("lost", LOST["lost"], created_at=ago(3600))
                place.api.cancel(place.jobs["cancelled"])
            self.provider.let_go.add(UNTIL_AWAY)
            meanwhile = {pool: look(place, since, name == "full") for pool, place in self.places.items()}
            health = self.places["prefork"].health()
        self.provider.let_go.add(UNTIL_OVER)
        for place in self.places.values():
            place.wait_ends({name: step for name, step in ALL_STEPS.items() if name != "cancelled"})
        afterwards = {pool: look_again(place, since) for pool, place in self.places.items()}
        return BrokerOutage(self.places, meanwhile, health, afterwards)

    def in_order(self) -> Iterator[BrokerLab]:
        """Around a test: before it the workers run; after it outages are over, and unfinished jobs are cancelled."""
        self.wait_ready()
        yield self
        self.mend()
        for place in self.places.values():
            place.cancel_unfinished()

    def submit(self, name: str, prompt: str, count: int = 1) -> dict[str, Step]:
        """Submits so many jobs in each place, and returns their names."""
        steps = {f"{name} {number}": Step(prompt) for number in range(count)}
        for place in self.places.values():
            for each, step in steps.items():
                place.submit(each, step)
        return steps

    def run(self, name: str, prompt: str, count: int = 1) -> dict[str, Step]:
        """Submits jobs in each place, and waits until all run."""
        steps = self.submit(name, prompt, count)
        for place in self.places.values():
            for each in steps:
                place.wait_call(each)
        return steps

    def assert_ended_once(self, steps: Mapping[str, Step]) -> None:
        """Waits until each of these jobs has ended, in each place."""
        for place in self.places.values():
            place.wait_ends(steps)
            for name, step in steps.items():
                assert_ended_once(place, name, step)

    def assert_jobs_outlive_cuts(self, every_s: float) -> None:
        """Cuts the workers' connections again and again until jobs have been completed, each by one generation."""
        steps = self.submit("cut off", "[delay 1]", count=3 * SLOTS)

        def cut_and_look() -> bool:
            self.gate.cut()
            jobs = {"_id": {"$in": [place.jobs[name] for place in self.places.values() for name in steps]}}
            return all(
                place.api.jobs.count_documents({**jobs, "status": "completed"}) == len(steps)
                for place in self.places.values()
            )

        poll(cut_and_look, PATIENCE_S, interval_s=every_s)
        self.assert_ended_once(steps)
        self.assert_goes_on()

    def assert_jobs_outlive_the_loss_of_messages(self, lose: Callable[[str], object]) -> None:
        """Lets the broker lose the messages of each queue while jobs run and wait."""
        steps = self.run("running", "[delay 2]", count=SLOTS) | self.submit("lost", "", count=3)
        for place in self.places.values():
            lose(place.api.queue)
        self.assert_ended_once(steps)
        self.assert_goes_on()

    def assert_goes_on(self) -> None:
        """The same workers take and complete jobs in all slots."""
        assert [place.goes_on(SLOTS) for place in self.places.values()] == [True] * len(self.places)


in_each_outage = pytest.mark.parametrize("outage", ["stopped", "hung", "unreachable", "full"], indirect=True)
in_each_place = pytest.mark.parametrize("pool", POOLS)


@in_each_place
@in_each_outage
class BrokerOutages:
    """What holds in every outage of any broker."""

    def test_a_job_that_ends_while_the_broker_is_away_is_completed(self, outage: BrokerOutage, pool: str) -> None:
        assert outage.meanwhile[pool].is_ended
        assert_ended_once(outage.places[pool], "ends", STEPS["ends"])

    def test_what_celery_couldnt_store_turns_no_document_over(self, outage: BrokerOutage, pool: str) -> None:
        """Celery's own view of a task whose result can't be stored is that the task has failed."""
        assert outage.afterwards[pool].changed_after_their_end == []

    def test_a_job_keeps_its_lease_while_the_broker_is_away(self, outage: BrokerOutage, pool: str) -> None:
        """A sweeper that waits for the broker, with a job to enqueue, costs no lease either."""
        assert outage.meanwhile[pool].is_lease_renewed
        assert_ended_once(outage.places[pool], "goes on", STEPS["goes on"])
        assert outage.places[pool].document("goes on")["worker"]["attempt"] == 1

    def test_a_cancel_by_the_api_stops_the_generation_while_the_broker_is_away(
        self, outage: BrokerOutage, pool: str
    ) -> None:
        assert outage.meanwhile[pool].is_cancelled
        assert outage.places[pool].document("cancelled")["error_message"] == "Cancelled."
        assert "completed" not in outage.places[pool].api.notices(outage.places[pool].jobs["cancelled"])

    @pytest.mark.parametrize("name", ["retried", "retried, too"])
    def test_a_retry_that_comes_due_while_the_broker_is_away_is_made_afterwards(
        self, outage: BrokerOutage, pool: str, name: str
    ) -> None:
        assert outage.meanwhile[pool].are_retries_released
        assert_ended_once(outage.places[pool], name, STEPS[name])

    @pytest.mark.parametrize("name", [*QUEUED, *LOST])
    def test_a_job_that_waits_while_the_broker_is_away_is_generated_once(
        self, outage: BrokerOutage, pool: str, name: str
    ) -> None:
        assert_ended_once(outage.places[pool], name, ALL_STEPS[name])

    def test_the_worker_goes_on_with_all_its_slots(self, outage: BrokerOutage, pool: str) -> None:
        assert outage.afterwards[pool].goes_on

    def test_the_log_stays_readable_while_the_broker_is_away(self, outage: BrokerOutage, pool: str) -> None:
        """Each kind of fault takes a line when it begins and one when it is over, from each process that meets it.

        An outage that takes minutes, as on a busy machine, is logged again each minute. A broker that is full answers
        now and then, which ends a fault for a moment. So the bound leaves room; a flood would be hundreds of lines.
        """
        seen, processes = outage.afterwards[pool], 1 + SLOTS * (pool == "prefork")
        lines = lines_about_no_job(seen.log)
        assert "Traceback" not in seen.log
        assert len(lines) <= (30 + 8 * processes) * seen.repeats, lines

    def test_health_stays_0_while_the_broker_is_away(self, outage: BrokerOutage, pool: str) -> None:
        assert outage.meanwhile[pool].is_keeper_alive
        assert outage.health == 0
