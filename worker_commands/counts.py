"""What `metrics` counts of lives that have ended. Each number only ever grows, as Prometheus expects of a counter."""

from __future__ import annotations

import bisect
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric

from worker_commands.lives import NOT_KNOWN, Failure, Life, Outcome, Usage
from workerkit.attempts import ENDS

MAX_LABEL_CHARACTERS = 80
OTHER = "other"
# Values of a label, each of which costs Prometheus a time series.
MAX_TYPES, MAX_ERRORS, MAX_MODELS, MAX_REASONS = 30, 30, 100, 50
WAIT_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
RUN_BUCKETS = (0.25, 0.5, 1, 2.5, 5, 10, 15, 30, 45, 60, 90, 120, 300, 600)
TOKEN_KINDS = ("prompt", "completion", "other")


class LabelValues:
    """The values of a label. A document may hold any number of names, so all beyond a limit count as one."""

    def __init__(self, limit: int, known: Iterable[str] = ()) -> None:
        self._limit, self._values = limit, set(known)

    def name(self, text: str) -> str:
        value = "".join(filter(str.isprintable, text[:MAX_LABEL_CHARACTERS])) or NOT_KNOWN
        if value not in self._values and len(self._values) >= self._limit:
            return OTHER
        self._values.add(value)
        return value


class Durations:
    """A histogram of durations in seconds, for each job type."""

    def __init__(self, bounds: tuple[float, ...], types: Iterable[str]) -> None:
        self._bounds = bounds
        self._counts = defaultdict(lambda: [0] * (len(bounds) + 1), {name: [0] * (len(bounds) + 1) for name in types})
        self._sums: Counter[str] = Counter()

    def add(self, job_type: str, seconds: float) -> None:
        self._counts[job_type][bisect.bisect_left(self._bounds, seconds)] += 1
        self._sums[job_type] += seconds  # type: ignore[assignment]

    def family(self, name: str, help_text: str) -> HistogramMetricFamily:
        family = HistogramMetricFamily(name, help_text, labels=["type"])
        for job_type, counts in self._counts.items():
            sums = [sum(counts[: position + 1]) for position in range(len(counts))]
            bounds = [*map(str, map(float, self._bounds)), "+Inf"]
            family.add_metric([job_type], list(zip(bounds, sums, strict=True)), self._sums[job_type])
        return family


@dataclass
class Table:
    """A counter with labels.

    A series that didn't begin at 0 shows 0 for `new_for_s` seconds. Prometheus takes the first value that it sees for
    the beginning, so without that no query would ever count what came with it.
    """

    new_for_s: float
    name: str
    help_text: str
    labels: tuple[str, ...]
    values: Counter[tuple[str, ...]] = field(default_factory=Counter)
    new_until: dict[tuple[str, ...], float] = field(default_factory=dict)

    def add(self, amount: float, *labels: str) -> None:
        if amount and labels not in self.values:
            self.new_until[labels] = time.monotonic() + self.new_for_s
        self.values[labels] += amount  # type: ignore[assignment]

    def family(self) -> CounterMetricFamily:
        family = CounterMetricFamily(self.name, self.help_text, labels=self.labels)
        for labels, value in self.values.items():
            family.add_metric(labels, 0 if time.monotonic() < self.new_until.get(labels, 0) else value)
        return family


class Counts:
    """The counters and histograms. Those of known types begin at 0, others show 0 for `new_for_s` seconds at first."""

    def __init__(self, types: Iterable[str], new_for_s: float = 0.0) -> None:
        table = partial(Table, new_for_s)
        known = list(types)
        self.types, self.models = LabelValues(MAX_TYPES, known), LabelValues(MAX_MODELS)
        self.errors = LabelValues(MAX_ERRORS)
        # The operator's reasons have a limit of their own, so that no flood of others hides one.
        self.reasons = {is_operators: LabelValues(MAX_REASONS) for is_operators in (True, False)}
        self.ended = table("ai_worker_jobs_ended", "Jobs that have ended.", ("outcome", "type"))
        help_text = "Attempts of ended jobs, by how each attempt ended."
        self.attempts = table("ai_worker_attempts_ended", help_text, ("end", "type"))
        help_text = "Jobs that failed, by the worker's reason. Person-written text is never a reason."
        self.failures = table("ai_worker_job_failures", help_text, ("reason", "error", "operators"))
        help_text = "Jobs that failed by what only the operator can change: a key, a model, a URL, a setting."
        self.faults = table("ai_worker_operator_faults", help_text, ())
        help_text = "Tokens of completed jobs. The kind is other where the provider does not tell them apart."
        self.tokens = table("ai_worker_tokens", help_text, ("model", "kind"))
        self.pictures = table("ai_worker_pictures", "Pictures of completed jobs.", ("model",))
        self.sound = table("ai_worker_sound_seconds", "Seconds of sound of completed jobs.", ("model",))
        self.waits, self.runs = Durations(WAIT_BUCKETS, known), Durations(RUN_BUCKETS, known)
        self._begin_at_zero(known)

    def _begin_at_zero(self, types: Iterable[str]) -> None:
        self.faults.add(0)
        for job_type in types:
            for outcome in Outcome:
                self.ended.add(0, outcome, job_type)
            for end in ENDS:
                self.attempts.add(0, end, job_type)

    def _add_usage(self, usage: Usage) -> None:
        model = self.models.name(usage.model)
        amounts = (usage.prompt_tokens, usage.completion_tokens, usage.other_tokens)
        for kind, amount in zip(TOKEN_KINDS, amounts, strict=True):
            if amount:
                self.tokens.add(amount, model, kind)
        if usage.pictures:
            self.pictures.add(usage.pictures, model)
        if usage.sound_s:
            self.sound.add(usage.sound_s, model)

    def add(self, life: Life) -> None:
        """Counts a life that has ended."""
        job_type = self.types.name(life.job_type)
        self.ended.add(1, life.outcome, job_type)
        for attempt in life.attempts:
            self.attempts.add(1, attempt.end, job_type)
            if attempt.waited_s is not None:
                self.waits.add(job_type, attempt.waited_s)
            if attempt.ran_s is not None:
                self.runs.add(job_type, attempt.ran_s)
        if life.outcome is Outcome.COMPLETED:
            self._add_usage(life.usage)
        elif life.outcome is Outcome.FAILED:
            self._add_failure(life.failure)

    def _add_failure(self, failure: Failure) -> None:
        """By the reason's head alone: what follows a colon is advice, or differs from job to job."""
        head = failure.reason.partition(": ")[0]
        reason, error = self.reasons[failure.is_operators].name(head), self.errors.name(failure.error)
        self.failures.add(1, reason, error, str(failure.is_operators).lower())
        if failure.is_operators:
            self.faults.add(1)

    def families(self) -> Iterator[Metric]:
        tables = (self.ended, self.attempts, self.failures, self.faults, self.tokens, self.pictures, self.sound)
        yield from (table.family() for table in tables)
        yield self.waits.family("ai_worker_attempt_wait_seconds", "How long attempts of ended jobs waited to begin.")
        yield self.runs.family("ai_worker_attempt_run_seconds", "How long attempts of ended jobs ran.")
