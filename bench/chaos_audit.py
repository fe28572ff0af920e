"""The audit of a chaos run: what must never happen, a function for each, and the figures of the run."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from bson import ObjectId

from bench.chaos_plan import IMAGE, TEXT, Refusal, pace_of, tag_of
from bench.chaos_records import CANCELLED, ENDS, LOSSES, Evidence, History, Notice, Step, describe
from bench.figures import Document
from testbed.answers import SOUNDS, Plan, parse_directives, picture, words_for
from testbed.api import TERMINAL
from testbed.processes import SOURCE
from workerkit.values import as_mapping

PLANTED_KEY: Final = "sk-chaos-planted-key"
MAX_ATTEMPTS: Final = 4
CLOCK_TOLERANCE_S: Final = 0.02
NOTICED_S: Final = 2.0  # from the write of an end to its notice, where nothing fails
CANCEL_NOTICED_S: Final = 2.0  # after so long an attempt has seen that the API has cancelled its job
OUTBOX_S: Final = 5.0  # so long after the end of a job its last notice may be published
HONEST_SENTENCES: Final = (
    "This could not be finished after several tries.",
    "This took too long and was stopped.",
    "given up after",
    "The AI service refused this request.",
    "The AI service sent an answer that can't be used.",
    "The AI service's rules don't allow this.",
    "The AI service sent no text.",
    "The AI service sent no picture.",
    "The AI service sent no sound.",
    "Your request can't be used:",
    "The result can't be saved, perhaps since it is too large.",
    "This service isn't set up correctly. Please tell the people who run it.",
)

JobCheck = Callable[[Evidence, History], Iterable[str]]
RunCheck = Callable[[Evidence], Iterable[str]]
JOB_CHECKS: Final[list[JobCheck]] = []
RUN_CHECKS: Final[list[RunCheck]] = []


def of_each_job(check: JobCheck) -> JobCheck:
    """Make a function part of the audit. It yields what is wrong with a job."""
    JOB_CHECKS.append(check)
    return check


def of_the_run(check: RunCheck) -> RunCheck:
    """Make a function part of the audit. It yields what is wrong with the whole run."""
    RUN_CHECKS.append(check)
    return check


# ── each job ─────────────────────────────────────────────────────────────────────────────────────────────────────


@of_each_job
def ends_once(_evidence: Evidence, history: History) -> Iterator[str]:
    """Each document ends by one write, and nothing follows it but the mark that its last notice is published."""
    if history.document.get("status") not in TERMINAL:
        yield f"stuck or lost: {history.document.get('status')}"
        return
    for life in history.lives:
        ends = [step for step in life if step.kind in ENDS]
        if len(ends) != 1:
            yield f"ended {len(ends)} times"
        after = list(itertools.dropwhile(lambda step: step.kind not in ENDS, life))[1:]
        allowed = () if ends and ends[0].kind == CANCELLED else ("noticed",)
        yield from (f"written to after its end: {step}" for step in after if step.kind not in allowed)
    if as_mapping(history.document.get("worker")).get("unnotified"):
        yield "its last notice was never published"


@of_each_job
def is_claimed_one_at_a_time(_evidence: Evidence, history: History) -> Iterator[str]:
    """A job that an attempt holds is not claimed by another, and none is generated after more claims than the cap."""
    if history.plan.extras.spoilt:  # somebody else has written another owner, or another number of attempts
        return
    for step, then in itertools.pairwise(history.steps):
        if then.kind == "claimed" and step.owner is not None and step.status == "processing":
            yield f"claimed while it was held: {then}"
    beyond = [step.at for step in history.claims if step.attempt > MAX_ATTEMPTS]  # these may write a kept result
    if beyond and any(call.started_at > beyond[0] for call in history.calls):
        yield "more attempts than the cap"


@of_each_job
def has_its_result(evidence: Evidence, history: History) -> Iterator[str]:
    """A completed job has exactly what the provider gave; a failed one has an honest sentence and nothing else."""
    document, plan = history.document, history.plan
    output = document.get("output_data") or {}
    if document.get("status") == "failed":
        sentence = str(document.get("error_message"))
        if (output or document.get("artifact_url")) and len(history.lives) == 1:
            yield "failed, with an output"
        if history.ends and history.ends[0].kind == "failed" and not any(one in sentence for one in HONEST_SENTENCES):
            yield f"failed for no good reason: {sentence}"
    elif document.get("status") == "completed":
        if not plan.is_good:
            yield "completed, though its provider or its input was bad"
        elif plan.job_type == TEXT:
            expected = "".join(words_for(Plan(plan.prompt, parse_directives(plan.prompt))))
            if output.get("generated_text") != expected or document["artifact_url"] is not None:
                yield f"not the provider's text: {output}"
        else:
            yield from judge_artifact(evidence, history, output)


def judge_artifact(evidence: Evidence, history: History, output: Document) -> Iterator[str]:
    """Yield what is wrong with the file of a completed job."""
    url, wanted = str(history.document.get("artifact_url")), history.plan.input_data
    data = evidence.files.get(url.removeprefix("/artifacts/"))
    if data is None:
        yield f"its artifact is missing: {url}"
    elif history.plan.job_type == IMAGE:
        width, height = map(int, wanted["size"].split("x"))
        if (output.get("image_url"), output.get("resolution")) != (url, wanted["size"]):
            yield f"wrong output: {output}"
        if data != picture(width, height):
            yield f"not the provider's picture ({len(data)} bytes)"
    else:
        if (output.get("audio_url"), output.get("format")) != (url, wanted["format"]):
            yield f"wrong output: {output}"
        if data != SOUNDS[wanted["format"]][1]():
            yield f"not the provider's sound ({len(data)} bytes)"


@of_each_job
def is_announced_truthfully(evidence: Evidence, history: History) -> Iterator[str]:
    """No status is published before the document has it, nor two ends; the last notice is the document's status."""
    end = history.ends[0] if history.ends else None
    former = [step for life in history.lives[:-1] for step in life if step.kind in ENDS]

    def is_former(notice: Notice) -> bool:
        """The API may put a job back between its end and the notice of that."""
        is_early = end is None or notice.at < end.at - CLOCK_TOLERANCE_S
        return is_early and any(step.status == notice.status and notice.at < step.at + NOTICED_S for step in former)

    notices = [notice for notice in history.last_notices if not is_former(notice)]
    published = {notice.status for notice in notices}
    if {"completed", "failed"} <= published:
        yield "published as completed and as failed"
    if end is None:
        return
    for notice in notices:
        if notice.status in TERMINAL and notice.at < end.at - CLOCK_TOLERANCE_S:
            yield f"published as {notice.status} {end.at - notice.at:.3f} s before the document said so"
        if notice.status in TERMINAL and notice.status != history.document.get("status"):
            yield f"published as {notice.status}, but it is {history.document.get('status')}"
    last = notices[-1].status if notices else None
    has_outbox = history.plan.extras.refusal is not Refusal.CLAIM  # such a document ends without our bookkeeping
    if last not in TERMINAL and end.kind != CANCELLED and has_outbox and not was_away(evidence, history):
        yield f"its last notice is {last}"


def was_away(evidence: Evidence, history: History) -> bool:
    """Return whether the subscriber was away at some moment between the end and the mark that the notice is out."""
    ended_at = history.ends[0].at
    marks = [step.at for step in history.steps if step.kind == "noticed"]
    until = marks[0] if marks else ended_at + OUTBOX_S
    return any(start <= until and ended_at <= end for start, end in evidence.gaps)


@of_each_job
def is_generated_no_more_than_claimed(_evidence: Evidence, history: History) -> Iterator[str]:
    """The provider is called at most once for each claim, never for unusable input, never after the end."""
    if len(history.calls) > len(history.claims):
        yield f"{len(history.calls)} calls in {len(history.claims)} attempts"
    if history.calls and not history.plan.is_usable:
        yield "the provider was called though the input can't be used"
    for end in history.ends[:1]:
        known_at = end.at + (CANCEL_NOTICED_S if end.kind == CANCELLED else CLOCK_TOLERANCE_S)
        late = [call.started_at - end.at for call in history.calls if call.started_at > known_at]
        yield from (f"generated again {seconds:.3f} s after its end" for seconds in late)
    if history.document.get("status") == "completed" and not history.calls:
        yield "completed without a call of the provider"


@of_each_job
def is_rescued_only_for_a_reason(evidence: Evidence, history: History) -> Iterator[str]:
    """A job is taken from an attempt only when a fault has hit its process, a server, or its bookkeeping."""
    for claim, then in history.attempts():
        if then.kind in LOSSES and cause_of(evidence, history, claim, then) == UNKNOWN_CAUSE:
            yield f"taken from a live attempt after {then.at - claim.at:.1f} s: {then}"


# ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────


@of_the_run
def every_artifact_has_a_job(evidence: Evidence) -> Iterator[str]:
    """Every file, and every chunk of one, belongs to a completed document."""
    documents = [history.document for history in evidence.histories.values()]
    named = {str(document.get("artifact_url")).removeprefix("/artifacts/") for document in documents}
    yield from (f"a file without a job: {name}" for name in sorted(evidence.files.keys() - named))
    yield from (f"chunks without a file: {name}" for name in sorted(evidence.chunk_owners - evidence.files.keys()))


@of_the_run
def every_worker_ends_well(evidence: Evidence) -> Iterator[str]:
    """No worker ends by itself, and each ends on SIGTERM; `recover` works."""
    yield from evidence.fleet_faults
    if not evidence.recovered.startswith("exit code 0"):
        yield f"recover: {evidence.recovered}"


@of_the_run
def logs_have_no_secret_and_no_stack_trace(evidence: Evidence) -> Iterator[str]:
    """No log has the provider's key, a prompt, or a stack trace through the worker's own modules."""
    for name, text in evidence.logs.items():
        if PLANTED_KEY in text:
            yield f"{name} has the provider's key"
        if re.search(tag_of(evidence.options.seed, r"\d{5}"), text):
            yield f"{name} has a prompt"
        yield from (f"{name}: stack trace through the worker:\n{block}" for block, is_own in tracebacks(text) if is_own)


OWN_FILES: Final = re.compile(rf'File "{re.escape(str(SOURCE))}/(worker\.py|workerkit/|worker_commands/)')


def tracebacks(text: str) -> Iterator[tuple[str, bool]]:
    """Yield each stack trace of a log, and whether it passes through worker.py, workerkit or worker_commands."""
    for block in text.split("Traceback (most recent call last):\n")[1:]:
        lines = block.splitlines()
        inside = list(itertools.takewhile(lambda line: line.startswith(" ") or not line.strip(), lines))
        trace = "\n".join([*inside, *lines[len(inside) : len(inside) + 1]])
        yield trace, bool(OWN_FILES.search(trace))


def audit(evidence: Evidence) -> list[str]:
    """Return every violation, each with the job's whole history."""
    found = []
    for history in evidence.histories.values():
        faults = [f"{check.__name__}: {fault}" for check in JOB_CHECKS for fault in check(evidence, history)]
        if faults:
            found.append("\n".join([*faults, describe(evidence, history)]))
    return found + [f"{check.__name__}: {fault}" for check in RUN_CHECKS for fault in check(evidence)]


# ── causes ───────────────────────────────────────────────────────────────────────────────────────────────────────

SPOILT: Final = "odd bookkeeping while it ran"
UNKNOWN_CAUSE: Final = "unknown"


def cause_of(evidence: Evidence, history: History, claim: Step, loss: Step) -> str:
    """Return the fault for which an attempt lost its job: of its process, of a server meanwhile, or of its document."""
    lease_s = pace_of(evidence.options).lease_s
    meanwhile = [one for one in evidence.happened if one.at <= loss.at and one.until >= claim.at - lease_s]
    own = [one.kind for one in meanwhile if claim.pid in one.pids]
    around = [one.kind for one in meanwhile if not one.pids]
    return [*own, *around, SPOILT if history.plan.extras.spoilt else UNKNOWN_CAUSE][0]


@dataclass(frozen=True, order=True)
class Recovery:
    """How long a job waited for its next attempt after a fault of the process that held it."""

    seconds: float
    kind: str
    job_id: ObjectId


def recoveries(evidence: Evidence) -> list[Recovery]:
    """Return, for each job whose process was hit, the time until its next claim or its end."""
    found = []
    by_pid = defaultdict(list)
    for happened in evidence.happened:
        for pid in happened.pids:
            by_pid[pid].append(happened)
    for history in evidence.histories.values():
        for claim, then in history.attempts():
            hits = [one for one in by_pid.get(claim.pid or 0, []) if claim.at <= one.at < then.at]
            again = [step for step in history.steps if step.at >= then.at and step.kind in ("claimed", *ENDS)][:1]
            found += [Recovery(step.at - one.at, one.kind, history.job_id) for one in hits for step in again]
    return found


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────

QUANTILES: Final = {"median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def quantiles(values: Iterable[float]) -> Document:
    """Return count, median, 90th and 99th percentile, and maximum."""
    ordered = sorted(values)
    if not ordered:
        return {"count": 0}
    at = {name: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in QUANTILES.items()}
    return {"count": len(ordered), **{name: round(value, 2) for name, value in at.items()}}


def recovery_times(evidence: Evidence) -> Document:
    """Return the recovery times by kind of fault."""
    times = defaultdict(list)
    for one in recoveries(evidence):
        times[one.kind].append(one.seconds)
    return {kind: quantiles(seconds) for kind, seconds in sorted(times.items())}


def extra_calls(evidence: Evidence) -> tuple[Counter[str], Counter[int]]:
    """Return the calls whose answer was lost: by cause, and how many jobs had how many."""
    causes: Counter[str] = Counter()
    per_job: Counter[int] = Counter()
    for history in evidence.histories.values():
        lost = 0
        for claim, then in history.attempts():
            if then.kind in LOSSES and any(claim.at - 0.01 <= call.started_at <= then.at for call in history.calls):
                causes[cause_of(evidence, history, claim, then)] += 1
                lost += 1
        per_job[lost] += 1
    return causes, per_job


def ends_by_sentence(evidence: Evidence) -> Counter[str]:
    """Return how the jobs ended; good ones that failed are counted apart."""
    ends: Counter[str] = Counter()
    for history in evidence.histories.values():
        status, sentence = history.document.get("status"), str(history.document.get("error_message"))
        if history.is_cancelled:
            ends[CANCELLED] += 1
        elif status == "failed":
            ends[f"failed: {sentence[:60]}{' (a good one)' if history.plan.is_good else ''}"] += 1
        else:
            ends[str(status)] += 1
    return ends


def notice_counts(evidence: Evidence) -> Document:
    """Return how many notices there were, how many were repeated, and how many were missed."""
    histories = evidence.histories.values()
    finals = [sum(notice.status in TERMINAL for notice in history.notices) for history in histories]
    ended = [h for h in histories if h.ends and h.ends[0].kind != CANCELLED]
    missed = sum(not h.notices or h.notices[-1].status not in TERMINAL for h in ended)
    return {
        "received": sum(len(history.notices) for history in histories),
        "last one missed: subscriber away": missed,
        "last one received more than once": sum(count > 1 for count in finals),
        "gaps of the subscriber": len(evidence.gaps),
        "seconds in gaps": round(sum(end - start for start, end in evidence.gaps), 1),
    }


def figures(evidence: Evidence) -> Document:
    """Return everything that the run measured."""
    histories = evidence.histories.values()
    causes, per_job = extra_calls(evidence)
    traces = [trace for text in evidence.logs.values() for trace, _is_own in tracebacks(text)]
    kinds = Counter(re.split(r"[:\s]", trace.splitlines()[-1])[0][:80] for trace in traces if trace)
    ended = [h for h in histories if h.ends and h.steps]
    return {
        "jobs": len(histories),
        "seconds": round(evidence.took_s),
        "ends": dict(ends_by_sentence(evidence).most_common()),
        "faults": dict(Counter(one.kind for one in evidence.happened)),
        "submit to end, s": quantiles(h.ends[0].at - h.steps[0].at for h in ended),
        "recovery, s": recovery_times(evidence),
        "attempts": dict(sorted(Counter(len(h.claims) for h in histories).items())),
        "provider calls": sum(len(h.calls) for h in histories),
        "extra calls by cause": dict(causes.most_common()),
        "jobs by extra calls": dict(sorted(per_job.items())),
        "messages repeated": sum(len(h.plan.repeat_after_s) for h in histories),
        "messages never sent": sum(not h.plan.is_sent for h in histories),
        "odd bookkeeping at first": sum(bool(h.plan.extras.own) for h in histories),
        "odd bookkeeping while they ran": sum(bool(h.plan.extras.spoilt) for h in histories),
        "put back by the API": sum(len(h.lives) - 1 for h in histories),
        "large inputs": sum(bool(h.plan.extras.padding) for h in histories),
        "refused by a validator": sum(bool(h.plan.extras.refusal) for h in histories),
        "notices": notice_counts(evidence),
        "stack traces in logs, by kind": dict(kinds.most_common()),
        "recover": evidence.recovered,
    }
