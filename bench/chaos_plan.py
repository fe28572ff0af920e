"""What a chaos run submits and which faults it causes, drawn from the seed.

The same seed gives the same jobs and the same faults at the same times; what a fault hits depends on the moment.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from bench.figures import Document

TEXT, IMAGE, AUDIO = "text_generation", "image_generation", "audio_generation"
JOB_TYPES: Final = (TEXT, IMAGE, AUDIO)
CANCEL_SHARE, REPEAT_SHARE, UNUSABLE_SHARE = 0.04, 0.06, 0.02
ODD_SHARE, SPOILT_SHARE, PUT_BACK_SHARE, LARGE_SHARE, REFUSED_SHARE = 0.03, 0.03, 0.05, 0.02, 0.03
SIDES: Final = (32, 64, 96)


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    jobs: int
    workers: int
    minutes: float
    seed: int
    hurry: float


@dataclass(frozen=True)
class Pace:
    """The settings and the rhythm of a run, in seconds. A run in a hurry has short ones, so that it meets all faults.

    A fault of a process lasts up to `longest_fault_s`. A stopped process stays so until its jobs have been taken from
    it, and for that time.
    """

    lease_s: float = 4.0
    sweep_s: float = 1.0
    soft_limit_s: float = 8.0
    hard_limit_s: float = 14.0
    hang_soft_s: float = 1.5
    hang_hard_s: float = 5.0
    longest_delay_s: float = 3.0
    longest_wait_s: float = 20.0  # before a message is repeated
    process_gap_s: float = 4.0  # between two faults of processes, on average
    longest_fault_s: float = 4.0
    server_gap_s: float = 4.0
    server_faults_from_s: float = 1.0
    longest_outage_s: float = 10.0
    unsent_share: float = 0.005  # of the jobs, whose message the API doesn't send


CALM: Final = Pace()
HURRIED: Final = Pace(
    lease_s=2.4,
    sweep_s=0.5,
    soft_limit_s=4.0,
    hard_limit_s=7.0,
    hang_soft_s=1.0,
    hang_hard_s=3.0,
    longest_delay_s=1.0,
    longest_wait_s=3.0,
    process_gap_s=1.0,
    longest_fault_s=1.0,
    server_gap_s=0.4,
    server_faults_from_s=4.0,  # after each outage of Redis, Celery's consumer runs no job for some seconds
    longest_outage_s=1.0,
    unsent_share=0.03,
)


def pace_of(options: Options) -> Pace:
    """Return the pace of a run."""
    return CALM if options.hurry == 1 else HURRIED


# ── jobs ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Behaviour:
    """What the provider does with a job, and whether the job is completed when nothing else goes wrong."""

    weight: int
    directives: str
    job_types: tuple[str, ...] = JOB_TYPES
    is_good: bool = True
    hangs: bool = False


BEHAVIOURS: Final = (
    Behaviour(50, ""),
    Behaviour(14, "[delay {seconds}]"),
    Behaviour(8, "[pace 0.05]", (TEXT,)),
    Behaviour(5, "[status 500 times=1]"),
    Behaviour(4, "[cut times=1]"),
    Behaviour(3, "[half times=1]", (TEXT,)),
    Behaviour(3, "[status 429 times=1 retry-after=1]"),
    Behaviour(1, "[status 503]", is_good=False),
    Behaviour(2, "[status 400]", is_good=False),
    Behaviour(2, "[hang]", is_good=False, hangs=True),
    Behaviour(1, "[notpicture]", (IMAGE,), is_good=False),
    Behaviour(1, "[truncated]", (IMAGE,), is_good=False),
    Behaviour(1, "[empty]", is_good=False),
    Behaviour(1, "[finish content_filter]", (TEXT,), is_good=False),
    Behaviour(1, "[html]", is_good=False),
    Behaviour(1, "[shape list]", (TEXT, IMAGE), is_good=False),
)
UNUSABLE_INPUTS: Final[tuple[Any, ...]] = ({}, {"prompt": ""}, {"prompt": 7, "text": []}, [], {"prompt": {"$ne": 1}})


ODD_BOOKKEEPING: Final[tuple[Any, ...]] = (None, "text", 7, [], [{"owner": "x"}], {"owner": ["x"], "attempt": "2"})
ODD_VALUES: Final[tuple[Any, ...]] = (None, "text", ["x"], {"x": 1}, 2**40, -1, True, datetime(3000, 1, 1))
SPOILT_FIELDS: Final = ("owner", "node", "pid", "lease_until", "attempt", "first_started_at", "limits", "rescue_at")
LARGE_CHARACTERS: Final = (1_000_000, 1_000_000, 1_000_000, 6_000_000)


class Refusal(StrEnum):
    """What a validator of the collection refuses for a job, whose document has this in its field `refuse`."""

    CLAIM = "claim"
    RESULT = "result"


# MongoDB refuses each write after which a document would be like one of these.
VALIDATOR: Final[Document] = {
    "$nor": [
        {"refuse": Refusal.CLAIM.value, "worker": {"$exists": True}},
        {"refuse": Refusal.RESULT.value, "status": "completed"},
    ]
}


@dataclass(frozen=True)
class Extras:
    """What else is unusual about a job.

    `own` is its odd bookkeeping when it is inserted. `spoilt` is a field of it, an odd value, and after how many
    seconds it gets that. `put_back_after_s` is the time after which the API sets it back, once it has ended.
    """

    own: tuple[Any, ...] = ()
    spoilt: tuple[str, Any, float] | None = None
    put_back_after_s: float | None = None
    padding: int = 0
    refusal: Refusal | None = None


@dataclass(frozen=True)
class JobPlan:
    """One job to be submitted, and what else happens to it.

    `limits` are its soft and hard limit, where its message has limits of its own. `is_sent` is False where the API
    dies between insert and send.
    """

    number: int
    job_type: str
    input_data: Any
    prompt: str
    is_good: bool = True
    limits: tuple[float, float] | None = None
    cancel_after_s: float | None = None
    repeat_after_s: tuple[float, ...] = ()
    is_sent: bool = True
    extras: Extras = Extras()

    @property
    def is_usable(self) -> bool:
        """Whether the provider is to be called at all."""
        return bool(self.prompt)


def tag_of(seed: int, number: int | str) -> str:
    """Return the word by which a job's prompt is known. None of them may appear in a log."""
    return f"chaos-{seed}-{number:0>5}"


def input_for(job_type: str, prompt: str, chooser: random.Random) -> Document:
    """Return what the API's clients send for a prompt."""
    if job_type == IMAGE:
        side = chooser.choice(SIDES)
        return {"prompt": prompt, "size": f"{side}x{side}"}
    if job_type == AUDIO:
        return {"text": prompt, "voice": "default", "format": chooser.choice(["flac", "flac", "mp3", "wav"])}
    return {"prompt": prompt, "max_tokens": 200}


def draw_extras(chooser: random.Random, pace: Pace) -> Extras:
    """Draw what else is unusual about a job; most have nothing."""
    field, value = chooser.choice(SPOILT_FIELDS), chooser.choice(ODD_VALUES)
    spoilt = (field, value, chooser.choice([0.1, 0.5, 2.0]))
    own, padding, refusal = (
        chooser.choice(ODD_BOOKKEEPING),
        chooser.choice(LARGE_CHARACTERS),
        chooser.choice([*Refusal]),
    )
    put_back_after_s = chooser.choice([0.0, 0.5, pace.longest_wait_s])
    drawn = [chooser.random() for _ in range(5)]
    is_refused = drawn[4] < REFUSED_SHARE
    return Extras(
        own=(own,) if drawn[0] < ODD_SHARE and not is_refused else (),
        spoilt=spoilt if drawn[1] < SPOILT_SHARE else None,
        put_back_after_s=put_back_after_s if drawn[2] < PUT_BACK_SHARE else None,
        padding=padding if drawn[3] < LARGE_SHARE else 0,
        refusal=refusal if is_refused else None,
    )


def draw_plan(seed: int, number: int, chooser: random.Random, pace: Pace) -> JobPlan:
    """Draw one job."""
    behaviour = chooser.choices(BEHAVIOURS, [one.weight for one in BEHAVIOURS])[0]
    job_type = chooser.choice(behaviour.job_types)
    directives = behaviour.directives.format(seconds=round(chooser.uniform(0.3, pace.longest_delay_s), 1))
    prompt = f"{tag_of(seed, number)} something {directives}".strip()
    input_data: Any = input_for(job_type, prompt, chooser)
    extras = draw_extras(chooser, pace)
    is_usable = chooser.random() >= UNUSABLE_SHARE
    if not is_usable:
        input_data, prompt = chooser.choice(UNUSABLE_INPUTS), ""
    cancel = chooser.choice([0.0, 0.2, 1.0, 3.0]) if chooser.random() < CANCEL_SHARE else None
    is_repeated = chooser.random() < REPEAT_SHARE
    waits = [0.0, 0.1, 0.5, 2.0, pace.longest_wait_s]
    repeats = tuple(chooser.choice(waits) for _ in range(chooser.choice([1, 1, 2])))
    return JobPlan(
        number,
        job_type,
        input_data,
        prompt,
        is_good=is_usable and behaviour.is_good and extras.refusal is None,
        limits=(pace.hang_soft_s, pace.hang_hard_s) if behaviour.hangs else None,
        cancel_after_s=cancel if extras.put_back_after_s is None else None,
        repeat_after_s=repeats if is_repeated else (),
        is_sent=chooser.random() >= pace.unsent_share,
        extras=extras,
    )


def make_plans(seed: int, count: int, pace: Pace = CALM) -> list[JobPlan]:
    """Draw the jobs from the seed."""
    chooser = random.Random(f"{seed} jobs")
    return [draw_plan(seed, number, chooser, pace) for number in range(count)]


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────

PROCESS_FAULTS: Final = (
    *("kill a child", "kill a worker", "end a worker", "stop a worker", "kill a child", "stop a child"),
    "kill a worker without its children",
)
SERVER_FAULTS: Final = ("crash Redis", "pause Redis", "cut Redis' connections", "kill MongoDB", "pause MongoDB")


@dataclass(frozen=True)
class Fault:
    """One planned fault: when, what, which of the processes that can be hit (0..1), and for how long."""

    at_s: float
    kind: str
    pick: float
    seconds: float


def make_faults(
    seed: int, kinds: Sequence[str], minutes: float, gap_s: float, longest_s: float, from_s: float = 1.0
) -> list[Fault]:
    """Draw faults from the seed: every kind in each round, with random pauses."""
    chooser, at_s = random.Random(f"{seed} {kinds}"), from_s
    faults: list[Fault] = []
    while True:
        for kind in chooser.sample(kinds, len(kinds)):
            at_s += chooser.uniform(0.3, 1.7) * gap_s
            if at_s > minutes * 60:
                return faults
            faults.append(Fault(at_s, kind, chooser.random(), chooser.uniform(min(1.0, longest_s / 2), longest_s)))


def faults_of_processes(options: Options) -> list[Fault]:
    """Return the faults of worker processes."""
    pace = pace_of(options)
    return make_faults(options.seed, PROCESS_FAULTS, options.minutes, pace.process_gap_s, pace.longest_fault_s)


def faults_of_servers(options: Options) -> list[Fault]:
    """Return the faults of MongoDB and Redis. A short run has short outages."""
    pace = pace_of(options)
    longest_s = min(pace.longest_outage_s, max(2.0, options.minutes * 5))
    gap_s, from_s = pace.server_gap_s + longest_s, pace.server_faults_from_s
    return make_faults(options.seed, SERVER_FAULTS, options.minutes, gap_s, longest_s, from_s)
