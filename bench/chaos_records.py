"""What is recorded of a chaos run: every write to every job, every notice, every call of the provider, every fault."""

from __future__ import annotations

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from bson import ObjectId
from pymongo import MongoClient
from pymongo.errors import PyMongoError

from bench.chaos_plan import JobPlan, Options
from bench.figures import Document
from testbed.api import CANCELLED as CANCEL_SENTENCE
from testbed.api import TERMINAL
from testbed.provider import Call
from testbed.servers import DATABASE

CANCELLED: Final = "cancelled"
ENDS: Final = ("completed", "failed", CANCELLED)
PUT_BACK: Final = "put back"
LOSSES: Final = ("handed back", "rescued")


@dataclass
class Happened:
    """A fault as it came: the processes it hit, from when until when (Unix times)."""

    kind: str
    at: float
    pids: frozenset[int] = frozenset()
    until: float = 0.0


@dataclass(frozen=True)
class Notice:
    """One `job_status_update` that the subscriber has received."""

    at: float
    job_id: str
    status: str


# ── writes ───────────────────────────────────────────────────────────────────────────────────────────────────────


class ChangeRecorder(threading.Thread):
    """Records every write to every job, in order, from a change stream that it resumes when MongoDB was away."""

    MARKS: Final = "chaos_marks"

    def __init__(self, url: str, database: str = DATABASE) -> None:
        super().__init__(name="changes", daemon=True)
        self._mongo: MongoClient[Document] = MongoClient(url, tz_aware=True)
        self._database = self._mongo[database]
        self._token: Any = None
        self.is_open = threading.Event()
        self.events: dict[ObjectId, list[Document]] = defaultdict(list)

    def run(self) -> None:
        """Follow the stream until the mark that `end` has written."""
        while True:
            with suppress(PyMongoError):
                if self._follow():
                    return
            time.sleep(0.2)

    def _follow(self) -> bool:
        """Record changes. Returns True once the mark was read."""
        pipeline = [{"$match": {"ns.coll": {"$in": ["jobs", self.MARKS]}}}]
        with self._database.watch(pipeline, resume_after=self._token, max_await_time_ms=500) as stream:
            self._token = stream.resume_token
            self.is_open.set()
            while True:
                event = stream.try_next()
                self._token = stream.resume_token
                if event and event["ns"]["coll"] == self.MARKS:
                    return True
                if event:
                    self.events[event["documentKey"]["_id"]].append(dict(event))

    def end(self) -> None:
        """Wait until everything that was written up to now is recorded."""
        self._database[self.MARKS].insert_one({})
        self.join(60)
        self._mongo.close()


@dataclass(frozen=True)
class Step:
    """One write to a job's document, and the state after it."""

    at: float
    kind: str
    status: str
    owner: str | None
    pid: int | None
    attempt: int
    fields: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind}: {self.status}, owner {self.owner}, pid {self.pid}, attempt {self.attempt} {self.fields}"


def name_of_step(before: Document, after: Document, changed: Document, removed: set[str]) -> str:
    """Return what kind of transition a write was."""
    if before.get("status") in TERMINAL and after["status"] == "pending":
        return PUT_BACK
    if changed.get("status") in TERMINAL:
        return CANCELLED if changed.get("error_message") == CANCEL_SENTENCE else str(changed["status"])
    if "owner" in changed and after.get("owner"):
        return "claimed"
    if "owner" in changed and "released_by" in changed:
        is_counted, is_due = after["attempt"] == before["attempt"], after["available_at"] <= after["updated_at"]
        return "released" if is_counted else "handed back" if is_due else "put off"
    if "rescues" in changed:
        return "rescued" if after["status"] == "processing" else "sent again"
    if set(changed) == {"lease_until"}:
        return "renewed"
    return "noticed" if not changed and removed == {"unnotified"} else "changed"


def apply_event(event: Document, state: Document, own: Document) -> Document:
    """Change a document's fields as an event says, and return the bookkeeping as it is then."""
    description = event.get("updateDescription") or {}
    for name, value in (description.get("updatedFields") or event.get("fullDocument") or {}).items():
        if name == "worker":
            own = dict(value) if isinstance(value, dict) else {}
        elif name.startswith("worker."):
            own = {**own, name.removeprefix("worker."): value}
        else:
            state[name] = value
    gone = {name.removeprefix("worker.") for name in description.get("removedFields") or []}
    return {} if "worker" in gone else {name: value for name, value in own.items() if name not in gone}


def text_of(value: Any) -> str | None:
    """Return a text; None for anything else, which an odd document may have in its place."""
    return value if isinstance(value, str) else None


def number_of(value: Any) -> int | None:
    """Return a whole number; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def fold(events: Iterable[Document]) -> list[Step]:
    """Turn a document's change events into steps."""
    steps: list[Step] = []
    state, own = {"status": None}, {}  # type: tuple[Document, Document]
    for event in events:
        before = {**state, **own}
        own = apply_event(event, state, own)
        after = {**state, **own}
        changed = {name: value for name, value in after.items() if name not in before or before[name] != value}
        is_update = event["operationType"] == "update"
        kind = name_of_step(before, after, changed, set(before) - set(after)) if is_update else event["operationType"]
        fields = tuple(sorted(changed)) if kind in ("changed", "rescued") else ()
        numbers = text_of(own.get("owner")), number_of(own.get("pid")), number_of(own.get("attempt")) or 0
        steps.append(Step(event["wallTime"].timestamp(), kind, str(state["status"]), *numbers, fields))
    return steps


# ── all of it ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class History:
    """All that is known about one job."""

    plan: JobPlan
    job_id: ObjectId
    document: Document = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    @property
    def is_cancelled(self) -> bool:
        """Whether the API has cancelled the job."""
        return bool(self.document.get("error_message") == CANCEL_SENTENCE)

    @property
    def lives(self) -> list[list[Step]]:
        """The writes from the insert, or from when the API put the job back, to its end and what came after that."""
        lives: list[list[Step]] = [[]]
        for step in self.steps:
            if step.kind == PUT_BACK:
                lives.append([])
            lives[-1].append(step)
        return lives

    @property
    def ends(self) -> list[Step]:
        """The writes that ended the job in its last life; there should be one."""
        return [step for step in self.lives[-1] if step.kind in ENDS]

    @property
    def last_notices(self) -> list[Notice]:
        """The notices since its last life began."""
        began_at = self.lives[-1][0].at if len(self.lives) > 1 else 0.0
        return [notice for notice in self.notices if notice.at >= began_at]

    @property
    def claims(self) -> list[Step]:
        """The writes that claimed the job."""
        return [step for step in self.steps if step.kind == "claimed"]

    def attempts(self) -> Iterator[tuple[Step, Step]]:
        """Yield each claim with the step that ended it."""
        lasting = [step for step in self.steps if step.kind not in ("renewed", "noticed")]
        return ((step, then) for step, then in itertools.pairwise(lasting) if step.kind == "claimed")


@dataclass
class Evidence:
    """All that the run has left to be audited.

    `gaps` are the times in which the subscriber was not connected. `files` are the stored artifacts by name, and
    `chunk_owners` the names of the files to which chunks belong. `recovered` is how the command `recover` ended.
    """

    options: Options
    histories: dict[ObjectId, History]
    happened: list[Happened]
    gaps: list[tuple[float, float]]
    files: dict[str, bytes]
    chunk_owners: set[str]
    fleet_faults: list[str]
    logs: dict[str, str]
    recovered: str
    took_s: float


def describe(evidence: Evidence, history: History) -> str:
    """Return a job's whole history: writes, notices, calls and faults in order, then its lines in the logs."""
    lines = [(step.at, f"document {step}") for step in history.steps]
    lines += [(notice.at, f"notice {notice.status}") for notice in history.notices]
    lines += [(call.started_at, f"call {call.outcome} after {call.duration_s:.2f} s") for call in history.calls]
    began, ended = (history.steps[0].at, history.steps[-1].at) if history.steps else (0.0, 0.0)
    around = [one for one in evidence.happened if one.at <= ended + 1 and one.until >= began - 1]
    lines += [(one.at, f"fault: {one.kind} for {one.until - one.at:.1f} s {sorted(one.pids)}") for one in around]
    in_order = [f"  {at - began:8.3f} s  {text}" for at, text in sorted(lines)]
    head = [f"job {history.job_id}: {history.plan}", f"  document: {history.document}"]
    return "\n".join([*head, *in_order, *(f"    {line}" for line in history.lines)])
