"""Who may try while a provider is away: after some failures in a row one job at a time, and the others wait."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from tests.lab import table
from workerkit.breaker import Breaker
from workerkit.errors import FailJob, JobError, ProviderAway, RetryJob
from workerkit.sentences import STARTING


async def refused(breaker: Breaker) -> None:
    with pytest.raises(ProviderAway):
        with breaker.watch():
            raise ProviderAway


async def succeeded(breaker: Breaker) -> None:
    with breaker.watch():
        pass


async def is_open(breaker: Breaker) -> bool:
    """Whether a job may try, and soon."""
    with contextlib.suppress(RetryJob):
        await breaker.wait(0.3)
        return True
    return False


@table("failures, goes_through", ("once is nothing", 1, True), ("twice is a pause here", 2, False))
def test_after_failures_in_a_row_the_next_call_waits(failures: int, goes_through: bool) -> None:
    async def fail_and_try() -> bool:
        breaker = Breaker(failures_before_pause=2)
        for _ in range(failures):
            await refused(breaker)
        return await is_open(breaker)

    assert asyncio.run(fail_and_try()) is goes_through


def test_a_success_in_between_starts_the_count_again() -> None:
    async def fail_in_turns() -> bool:
        breaker = Breaker(failures_before_pause=2)
        for _ in range(3):
            await refused(breaker)
            assert await is_open(breaker)
            await succeeded(breaker)
        return True

    assert asyncio.run(fail_in_turns())


@table("error", ("a busy provider", RetryJob), ("a refusal", FailJob))
def test_any_answer_in_between_starts_the_count_again(error: type[JobError]) -> None:
    async def fail_in_turns() -> bool:
        breaker = Breaker(failures_before_pause=2)
        for _ in range(3):
            await refused(breaker)
            with contextlib.suppress(error), breaker.watch():
                raise error
        return await is_open(breaker)

    assert asyncio.run(fail_in_turns())


@table("error", ("a busy provider", RetryJob), ("a refusal", FailJob))
def test_one_jobs_own_error_never_makes_others_wait(error: type[JobError]) -> None:
    async def fail_and_try() -> bool:
        breaker = Breaker(failures_before_pause=2)
        for _ in range(3):
            with contextlib.suppress(error), breaker.watch():
                raise error
        await refused(breaker)
        return await is_open(breaker)

    assert asyncio.run(fail_and_try())


def test_a_pause_ends() -> None:
    async def wait() -> float:
        breaker, begun = Breaker(failures_before_pause=1, max_pause_s=0.2), time.monotonic()
        await refused(breaker)
        await breaker.wait(5)
        return time.monotonic() - begun

    assert asyncio.run(wait()) >= 0.2


def test_after_a_pause_one_job_tries_and_its_success_lets_the_others_go_on() -> None:
    async def try_in_turn() -> list[bool]:
        breaker = Breaker(failures_before_pause=1)
        await refused(breaker)
        await breaker.wait(5)
        others_before = await is_open(breaker)
        await succeeded(breaker)
        return [others_before, await is_open(breaker)]

    assert asyncio.run(try_in_turn()) == [False, True]


def test_a_job_that_waited_in_vain_for_the_provider_comes_back_uncounted() -> None:
    async def wait_in_vain() -> None:
        breaker = Breaker(failures_before_pause=1)
        await refused(breaker)
        await breaker.wait(0.1)

    with pytest.raises(RetryJob) as caught:
        asyncio.run(wait_in_vain())
    assert not caught.value.is_counted
    assert caught.value.after_s is not None
    assert 0 < caught.value.after_s <= 1


@table("failures, pause_s", ("too few", 2, 0.0), ("enough", 3, 1.0), ("many of one outage", 60, 1.0))
def test_failures_that_overlap_make_one_pause(failures: int, pause_s: float) -> None:
    async def fail(breaker: Breaker) -> None:
        with contextlib.suppress(RetryJob), breaker.watch():
            await asyncio.sleep(0)
            raise ProviderAway

    async def fail_together() -> float:
        breaker = Breaker(failures_before_pause=3)
        await asyncio.gather(*(fail(breaker) for _ in range(failures)))
        return breaker._resume_at - breaker._paused_at

    assert asyncio.run(fail_together()) == pytest.approx(pause_s)


def test_the_pause_doubles_with_each_try_that_fails_up_to_the_longest() -> None:
    async def fail_again_and_again() -> list[float]:
        breaker, pauses = Breaker(failures_before_pause=1, max_pause_s=5), []
        for _ in range(5):
            await refused(breaker)
            with pytest.raises(ProviderAway) as caught:
                await breaker.wait(0)
            pauses.append(caught.value.after_s or 0.0)
        return pauses

    assert asyncio.run(fail_again_and_again()) == pytest.approx([1, 2, 4, 5, 5], abs=0.2)


def test_who_waited_in_vain_says_why_the_provider_is_away() -> None:
    async def wait_in_vain() -> None:
        breaker = Breaker(failures_before_pause=1)
        with contextlib.suppress(ProviderAway), breaker.watch():
            raise ProviderAway("HTTP 503", STARTING)
        await breaker.wait(0)

    with pytest.raises(ProviderAway) as caught:
        asyncio.run(wait_in_vain())
    assert caught.value.sentence == STARTING


def test_a_cancelled_call_says_nothing_about_the_provider() -> None:
    async def cancel_in_between() -> bool:
        breaker = Breaker(failures_before_pause=2)
        await refused(breaker)
        with contextlib.suppress(asyncio.CancelledError), breaker.watch():
            raise asyncio.CancelledError
        await refused(breaker)
        return await is_open(breaker)

    assert not asyncio.run(cancel_in_between())
