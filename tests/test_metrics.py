"""`metrics` as a process, read by a real Prometheus: every query of the dashboard and every alert is run there."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from bson import ObjectId
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families

from testbed.api import Api, WorkerProcess
from testbed.processes import LOOPBACK, SOURCE, free_port, poll
from testbed.prometheus import PrometheusServer, find_prometheus
from testbed.provider import Provider
from testbed.servers import MongoServer, RedisServer
from tests.lab import AUDIO, IMAGE, TEXT, table
from tests.site import JOBS, open_api, running, skipping_outside_ci, worker_settings

pytestmark = [pytest.mark.servers, pytest.mark.timeout(240)]

PATIENCE_S = 60.0
ALERTS, DASHBOARD = SOURCE / "examples/monitoring/alerts.yaml", SOURCE / "examples/grafana/dashboard.json"
PANELS: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
VARIABLES: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["templating"]["list"]
QUERIES = [(panel["title"], each["expr"]) for panel in PANELS for each in panel.get("targets", [])]
# What Grafana puts in for its variables: all values, and intervals for a scrape each second.
GRAFANAS = {"$__rate_interval": "1m", "$__range": "10m", "$instance": ".*", "$type": ".*"}
KEY_REASON = "HTTP 401 invalid_api_key: check the provider's key (TEXT_API_KEY or OPENAI_API_KEY)"
SLOTS = 2
FAILURES = 3  # of different reasons, each of which is met once


def start_exporter(environment: dict[str, str], log: Path, port: int) -> WorkerProcess:
    """Starts an exporter for a Prometheus that asks it every second."""
    command = [str(SOURCE / "worker.py"), "metrics", "--address", LOOPBACK, "--port", str(port), "--interval", "1s"]
    return WorkerProcess(environment, log, command).wait_ready(PATIENCE_S, says="metrics at http://")


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://{LOOPBACK}:{port}/metrics", timeout=15) as answer:
        return str(answer.read().decode())


def value_in(text: str, name: str) -> float | None:
    """The value of a metric that has no labels."""
    found = re.search(rf"^ai_worker_{name} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else None


# ── a deployment that Prometheus watches ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Deployment:
    """A worker whose slots are busy, jobs of every kind, the exporter, and a Prometheus that has read it all."""

    api: Api
    port: int
    prometheus: PrometheusServer


def insert_failed(api: Api, *attempts: dict[str, Any], error_message: str = "No.") -> None:
    """Inserts a job that has just failed after these attempts, as a worker notes it."""
    now = datetime.now(UTC)
    noted = [{"attempt": 1, "ended_at": now, "waited_s": 0.1, "ran_s": 1.5, **each} for each in attempts]
    own = {"attempt": len(noted), "attempts": noted}
    api.insert(TEXT, {}, status="failed", completed_at=now, error_message=error_message, worker=own)


def do_a_round_of_jobs(api: Api) -> None:
    """Lets the worker do a job of each type, and lets jobs fail in each way."""
    jobs = [api.submit(job_type, given) for job_type, given in JOBS.items()]
    for job in [*jobs, api.text("a refused one [status 400]")]:
        api.wait(job)
    insert_failed(api, {"end": "failed", "error": "OperatorFault", "is_operators": True, "reason": KEY_REASON})
    lost, busy = {"end": "lost"}, {"end": "failed", "error": "RetryJob", "reason": "HTTP 503"}
    insert_failed(api, lost, {"end": "retried", "error": "RetryJob", "reason": "HTTP 503"}, busy)


def has_counted(prometheus: PrometheusServer, ends: int) -> bool:
    """Whether Prometheus knows of so many ends."""
    [series] = prometheus.query("sum(ai_worker_jobs_ended_total)")
    return bool(series["value"] == ends)


@pytest.fixture(scope="module")
def deployment(
    mongo_server: MongoServer,
    redis_server: RedisServer,
    running_provider: Provider,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Deployment]:
    with skipping_outside_ci():
        find_prometheus()
    folder, port = tmp_path_factory.mktemp("metrics"), free_port()
    settings = worker_settings(mongo_server, redis_server, running_provider, f"metrics_{ObjectId()}")
    environment = {**settings, "WORKER_POOL": "threads", "WORKER_CONCURRENCY": str(SLOTS)}
    with ExitStack() as stack:
        api = stack.enter_context(open_api(environment))
        worker = WorkerProcess(environment, folder / "worker.log")
        stack.callback(worker.kill)
        stack.callback(start_exporter(environment, folder / "metrics.log", port).kill)
        worker.wait_ready()
        prometheus = stack.enter_context(running(PrometheusServer(f"{LOOPBACK}:{port}", ALERTS)))
        poll(lambda: prometheus.query("ai_worker_workers_alive > 0"), PATIENCE_S, 0.2, "the worker in Prometheus")
        do_a_round_of_jobs(api)
        ends = api.jobs.count_documents({"completed_at": {"$ne": None}})
        poll(partial(has_counted, prometheus, ends), PATIENCE_S, 0.2, "the ends in Prometheus")
        new = "increase(ai_worker_job_failures_total[10m]) > 0"
        poll(lambda: len(prometheus.query(new)) == FAILURES, PATIENCE_S, 0.2, "each failure in Prometheus")
        for _ in range(SLOTS):
            api.wait(api.text("a long one [hang]"), "processing")
        long_ago = datetime.now(UTC) - timedelta(minutes=10)
        waiting = api.insert(TEXT, {"prompt": "waits"}, created_at=long_ago, updated_at=long_ago)
        api.enqueue(waiting)
        poll(lambda: prometheus.query("ai_worker_queue_messages > 0"), PATIENCE_S, 0.2, "the message in Prometheus")
        poll(lambda: prometheus.query(f"ai_worker_slots_busy >= {SLOTS}"), PATIENCE_S, 0.2, "the busy slots there")
        yield Deployment(api, port, prometheus)


# ── the dashboard ────────────────────────────────────────────────────────────────────────────────────────────────


def as_asked(expression: str) -> str:
    for name, value in GRAFANAS.items():
        expression = expression.replace(name, value)
    return expression


@pytest.mark.parametrize(("title", "expression"), QUERIES, ids=[f"{title} {n}" for n, (title, _) in enumerate(QUERIES)])
def test_every_query_of_the_dashboard_is_answered(deployment: Deployment, title: str, expression: str) -> None:
    assert "$" not in as_asked(expression)
    series = deployment.prometheus.query(as_asked(expression))
    assert [one for one in series if one["value"] == one["value"]], f"{title}: no number among {series}"  # NaN differs


@pytest.mark.parametrize("variable", [one for one in VARIABLES if one["type"] == "query"], ids=lambda one: one["name"])
def test_every_variable_of_the_dashboard_has_values(deployment: Deployment, variable: dict[str, Any]) -> None:
    found = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
    assert found
    values = deployment.prometheus.ask(f"label/{found[2]}/values", **{"match[]": found[1]})
    assert set(values) >= ({TEXT, IMAGE, AUDIO} if variable["name"] == "type" else {f"{LOOPBACK}:{deployment.port}"})


def test_every_metric_of_the_exporter_is_in_the_dashboard_or_in_an_alert(deployment: Deployment) -> None:
    families = {family.name: family.type for family in text_string_to_metric_families(scrape(deployment.port))}
    used = ALERTS.read_text() + json.dumps(PANELS)
    assert [name for name in families if name not in used] == []


def test_the_dashboard_is_one_by_grafanas_own_models() -> None:
    """Each field of it is known to Grafana, and has the type that Grafana expects."""
    register_default_plugins()
    dashboard = json.loads(DASHBOARD.read_text())
    known = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(dashboard)))
    for variable in dashboard["templating"]["list"]:
        variable.pop("definition", None)  # Grafana writes it, and its models leave it out

    def missing(ours: Any, theirs: Any, path: str = "") -> list[str]:
        if isinstance(ours, dict):
            return [one for name in ours for one in missing(ours[name], (theirs or {}).get(name), f"{path}/{name}")]
        if isinstance(ours, list):
            return [
                one for pair in zip(ours, theirs or [None] * len(ours), strict=True) for one in missing(*pair, path)
            ]
        return [] if ours == theirs else [path]

    assert missing(dashboard, known) == []


def test_the_panels_of_the_dashboard_have_ids_of_their_own_and_dont_overlap() -> None:
    places = [panel["gridPos"] for panel in PANELS]
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        assert (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )


def test_the_dashboard_takes_whichever_data_source_is_chosen() -> None:
    sources = {str(found) for found in re.findall(r'"uid": "([^"]+)"', DASHBOARD.read_text())}
    assert sources == {"${datasource}", "ai-backend-worker"}


# ── the alerts ───────────────────────────────────────────────────────────────────────────────────────────────────

RAISED = {"AiWorkerOperatorFault", "AiWorkerJobsWait", "AiWorkerJobsLost", "AiWorkerSlotsFull"}
QUIET = {"AiWorkerNoMetrics", "AiWorkerNoWorker", "AiWorkerMongodbAway", "AiWorkerBrokerAway"}


def alerts(prometheus: PrometheusServer) -> dict[str, dict[str, Any]]:
    [group] = prometheus.ask("rules", type="alert")["groups"]
    return {rule["name"]: rule for rule in group["rules"]}


def test_every_alert_can_be_evaluated_and_is_explained(deployment: Deployment) -> None:
    found = alerts(deployment.prometheus)
    assert {name: rule.get("lastError") for name, rule in found.items() if rule["health"] != "ok"} == {}
    described = (SOURCE / "docs/operating.md").read_text()
    assert [name for name in found if f"`{name}`" not in described] == []


def test_the_alerts_are_raised_that_this_deployment_deserves_and_no_others(deployment: Deployment) -> None:
    """`inactive` is Prometheus' word for an alert whose condition doesn't hold."""
    poll(lambda: all(alerts(deployment.prometheus)[name]["state"] != "inactive" for name in RAISED), PATIENCE_S, 0.2)
    states = {name: rule["state"] for name, rule in alerts(deployment.prometheus).items()}
    assert {name for name in QUIET if states[name] != "inactive"} == set()
    assert states["AiWorkerOperatorFault"] == "firing"


def test_an_alert_names_only_metrics_that_the_exporter_has(deployment: Deployment) -> None:
    named = set(re.findall(r"\bai_worker_\w+", re.sub(r"#.*", "", ALERTS.read_text())))
    assert [name for name in named if not re.search(rf"^{name}\b", scrape(deployment.port), re.MULTILINE)] == []


PENDING, BUSY, SLOTS_IN_ALL = 'ai_worker_jobs{state="pending"}', "ai_worker_slots_busy", "ai_worker_slots"
FAILED, COMPLETED = (f'ai_worker_jobs_ended_total{{outcome="{each}"}}' for each in ("failed", "completed"))


@table(
    "name, series, is_raised",
    ("all slots are busy", "AiWorkerSlotsFull", {PENDING: "1x60", BUSY: "2x60", SLOTS_IN_ALL: "2x60"}, True),
    ("one is free", "AiWorkerSlotsFull", {PENDING: "1x60", BUSY: "1x60", SLOTS_IN_ALL: "2x60"}, False),
    ("no worker is there", "AiWorkerSlotsFull", {PENDING: "1x60", BUSY: "0x60", SLOTS_IN_ALL: "0x60"}, False),
    ("half of the jobs fail", "AiWorkerManyFailures", {FAILED: "0+2x60", COMPLETED: "0+2x60"}, True),
    ("one in ten fails", "AiWorkerManyFailures", {FAILED: "0+2x60", COMPLETED: "0+18x60"}, False),
)
def test_an_alert_is_raised_only_where_its_words_are_true(
    tmp_path: Path, name: str, series: dict[str, str], is_raised: bool
) -> None:
    with skipping_outside_ci():
        promtool = find_prometheus("promtool")
    [rule] = [rule for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"] if rule["alert"] == name]
    raised = {"exp_labels": rule["labels"], "exp_annotations": rule["annotations"]}
    expected = {"eval_time": "30m", "alertname": name, "exp_alerts": [raised] if is_raised else []}
    given = [{"series": each, "values": values} for each, values in series.items()]
    test = {"interval": "1m", "input_series": given, "alert_rule_test": [expected]}
    (tmp_path / "test.yml").write_text(json.dumps({"rule_files": [str(ALERTS)], "tests": [test]}))
    ended = subprocess.run([promtool, "test", "rules", tmp_path / "test.yml"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


# ── the format ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_prometheus_own_tool_finds_nothing_wrong_with_the_metrics(deployment: Deployment) -> None:
    command = [str(find_prometheus("promtool")), "check", "metrics"]
    ended = subprocess.run(command, input=scrape(deployment.port), capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout + ended.stderr) == (0, "")


def test_prometheus_reads_the_exporter_without_a_fault(deployment: Deployment) -> None:
    [target] = deployment.prometheus.ask("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")


def test_every_metric_is_explained_in_the_documentation(deployment: Deployment) -> None:
    described = (SOURCE / "docs/operating.md").read_text()
    names = set(re.findall(r"^# TYPE (\S+)", scrape(deployment.port), re.MULTILINE))
    assert len(names) > 15
    assert [name for name in names if f"`{name}`" not in described] == []


def test_a_scrape_holds_no_prompt_key_or_user(deployment: Deployment) -> None:
    text = scrape(deployment.port)
    assert [secret for secret in ("story about AI", "sk-test", "user-1", "a long one") if secret in text] == []


# ── the process ──────────────────────────────────────────────────────────────────────────────────────────────────

Metrics = Callable[[], tuple[WorkerProcess, int]]


@pytest.fixture
def start_metrics(environment: dict[str, str], tmp_path: Path) -> Iterator[Metrics]:
    """Starts an exporter of this test's own."""
    started: list[WorkerProcess] = []

    def start() -> tuple[WorkerProcess, int]:
        port = free_port()
        started.append(start_exporter(environment, tmp_path / f"metrics-{len(started)}.log", port))
        return started[-1], port

    yield start
    for process in started:
        process.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_the_exporter_at_once(start_metrics: Metrics, number: signal.Signals, code: int) -> None:
    process, port = start_metrics()
    scrape(port)
    begun_at = time.monotonic()
    process.signal(number)
    assert process.process.wait(20) == code
    assert time.monotonic() - begun_at < 5
    assert "Traceback" not in process.text()


def test_a_port_that_is_taken_ends_it_with_a_sentence(environment: dict[str, str], tmp_path: Path) -> None:
    with closing(socket.create_server((LOOPBACK, 0))) as taken:
        port = taken.getsockname()[1]
        command = [str(SOURCE / "worker.py"), "metrics", "--address", LOOPBACK, "--port", str(port)]
        process = WorkerProcess(environment, tmp_path / "metrics.log", command)
        assert process.process.wait(60) == 1
    said = f"Port {port} of {LOOPBACK} can't be used (Address already in use): choose another by --port or --address."
    assert process.text() == f"{said}\n"


def test_a_restarted_exporter_begins_at_zero_which_prometheus_expects(api: Api, start_metrics: Metrics) -> None:
    first, port = start_metrics()
    insert_failed(api, {"end": "failed", "is_operators": True, "reason": KEY_REASON, "error": "OperatorFault"})
    poll(lambda: value_in(scrape(port), "operator_faults_total") == 1, PATIENCE_S, 0.2)
    first.stop()
    _, port = start_metrics()
    assert value_in(scrape(port), "operator_faults_total") == 0


@pytest.mark.slow
def test_the_exporter_outlives_its_servers_and_tells_which_is_away(running_provider: Provider, tmp_path: Path) -> None:
    with running(MongoServer()) as mongo, running(RedisServer()) as redis:
        environment, port = worker_settings(mongo, redis, running_provider, "away"), free_port()
        process = start_exporter(environment, tmp_path / "metrics.log", port)
        try:

            def are(mongodb_up: float, broker_up: float) -> bool:
                begun_at, text = time.monotonic(), scrape(port)
                assert time.monotonic() - begun_at < 10  # as long as Prometheus waits
                seen = (value_in(text, "mongodb_up"), value_in(text, "broker_up"))
                assert ("ai_worker_jobs{" in text) is (seen[0] == 1)
                return seen == (mongodb_up, broker_up)

            poll(lambda: are(1, 1), PATIENCE_S, 0.2)
            mongo.pause()
            redis.kill()
            poll(lambda: are(0, 0), PATIENCE_S, 0.2)
            mongo.resume()
            redis.start()
            poll(lambda: are(1, 1), PATIENCE_S, 0.2)
        finally:
            process.kill()
    assert "Traceback" not in process.text()
    assert "metrics: MongoDB can't be read" in process.text()
