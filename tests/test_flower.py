"""Flower, as compose.yaml starts it, beside a real worker: what it shows of both, and what it doesn't."""

from __future__ import annotations

import base64
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass

import pytest

from testbed.api import TASK_NAME, Api, WorkerProcess
from testbed.processes import LOOPBACK, SOURCE, Server, current_environment, poll
from testbed.provider import Provider
from testbed.servers import MongoServer, RedisServer
from tests.lab import TEXT
from tests.site import open_api, running, worker_settings

CONFIGURATION = SOURCE / "examples" / "monitoring" / "flowerconfig.py"
REDIS_PASSWORD, FLOWER_PASSWORD = "sk-redis-password", "operator:sk-flower-password"
PROVIDER_KEY = "sk-test-planted-key"  # of tests.site.worker_settings
PROMPT = "a prompt that nobody else may read"


class Flower(Server):
    """Flower with the configuration of compose.yaml, and with a password, since without one it has no API."""

    name = "flower"

    def __init__(self, worker_environment: Mapping[str, str]) -> None:
        super().__init__()
        self.worker_environment = worker_environment

    def _command(self) -> list[str]:
        address = (f"--address={LOOPBACK}", f"--port={self.port}")
        command = [sys.executable, "-m", "celery", "-A", "worker", "flower", f"--conf={CONFIGURATION}", *address]
        return [*command, f"--basic-auth={FLOWER_PASSWORD}"]

    def _environment(self) -> dict[str, str]:
        return {**current_environment(), **self.worker_environment, "PYTHONPATH": str(SOURCE)}

    def _answers(self) -> bool:
        with suppress(OSError):
            return self.get("/healthcheck") == "OK"
        return False

    def get(self, path: str, data: bytes | None = None) -> str:
        """What Flower answers. Raises: OSError, where it refuses."""
        password = base64.b64encode(FLOWER_PASSWORD.encode()).decode()
        request = urllib.request.Request(f"http://{self.address}{path}", data, {"Authorization": f"Basic {password}"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as answer:
            text: str = answer.read().decode()
            return text


@pytest.fixture(scope="module")
def environment(mongo_server: MongoServer, running_provider: Provider) -> Iterator[dict[str, str]]:
    with running(RedisServer(password=REDIS_PASSWORD)) as redis_server:
        yield worker_settings(mongo_server, redis_server, running_provider, "flower")


@pytest.fixture(scope="module")
def api(environment: dict[str, str]) -> Iterator[Api]:
    with open_api(environment) as api:
        api.celery.conf.task_send_sent_event = True  # as the API's own client has it
        yield api


@pytest.fixture(scope="module")
def worker(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    process = WorkerProcess(environment, tmp_path_factory.mktemp("worker") / "worker.log")
    yield process.wait_ready()
    process.kill()


@pytest.fixture(scope="module")
def flower(environment: dict[str, str], worker: WorkerProcess) -> Iterator[Flower]:
    with Flower(environment) as flower:
        online = {worker.name: True}
        poll(lambda: json.loads(flower.get("/api/workers?status=true")) == online, 60, description="a heartbeat")
        flower.get("/api/workers?refresh=true")
        yield flower


@dataclass(frozen=True)
class Tasks:
    """Three tasks whose prompts are the same but for a directive. The worker has one slot."""

    completed: str
    running: str
    waiting: str
    job_of_completed: str


@pytest.fixture(scope="module")
def tasks(flower: Flower, api: Api) -> Tasks:
    jobs = [api.insert(TEXT, {"prompt": f"{PROMPT}{directive}"}) for directive in ("", " [hang]", "")]
    completed, running, waiting = [api.enqueue(job).id for job in jobs]

    def states() -> list[str]:
        shown = json.loads(flower.get("/api/tasks"))
        return [shown.get(task, {}).get("state", "") for task in (completed, running, waiting)]

    expected = ["SUCCESS", "STARTED", "PENDING"]
    poll(lambda: states() == expected, 60, description="a task that is completed, one that runs and one that waits")
    return Tasks(completed, running, waiting, str(jobs[0]))


def test_flower_shows_the_worker_its_queue_and_how_many_tasks_wait(
    flower: Flower, tasks: Tasks, worker: WorkerProcess, api: Api
) -> None:
    shown = json.loads(flower.get("/api/workers"))[worker.name]
    assert [queue["name"] for queue in shown["active_queues"]] == [api.queue]
    assert TASK_NAME in shown["registered"]
    assert json.loads(flower.get("/api/queues/length")) == {"active_queues": [{"name": api.queue, "messages": 1}]}


def test_flower_shows_a_tasks_job_worker_and_result(flower: Flower, tasks: Tasks, worker: WorkerProcess) -> None:
    task = json.loads(flower.get(f"/api/task/info/{tasks.completed}"))
    assert (task["name"], task["worker"], task["args"]) == (TASK_NAME, worker.name, f"['{tasks.job_of_completed}']")
    assert task["result"] == str({"job_id": tasks.job_of_completed, "status": "completed"})
    assert task["runtime"] > 0


def test_an_event_of_the_apis_client_that_comes_late_hides_no_job(flower: Flower, tasks: Tasks, api: Api) -> None:
    late = {"uuid": tasks.completed, "name": TASK_NAME, "args": PROMPT, "kwargs": PROMPT, "routing_key": "came late"}
    with api.celery.events.default_dispatcher() as dispatcher:
        dispatcher.send("task-sent", **late)

    def shown() -> dict[str, object]:
        task: dict[str, object] = json.loads(flower.get(f"/api/task/info/{tasks.completed}"))
        return task

    poll(lambda: shown()["routing_key"] == "came late", 60)
    assert (shown()["args"], shown()["kwargs"]) == (f"['{tasks.job_of_completed}']", "{}")


COLUMNS = "draw=1&start=0&length=10&order[0][column]=0&order[0][dir]=asc&columns[0][data]=name"
PAGES = (
    *("/workers", "/worker/{worker}", "/tasks", f"/tasks/datatable?{COLUMNS}", "/broker", "/metrics"),
    *("/task/{completed}", "/task/{running}", "/task/{waiting}"),
    *("/api/workers?refresh=true", "/api/tasks", "/api/task/info/{waiting}"),
)


@pytest.mark.parametrize("page", PAGES)
def test_no_page_shows_a_prompt_a_password_or_a_key(
    flower: Flower, tasks: Tasks, worker: WorkerProcess, page: str
) -> None:
    shown = flower.get(page.format(worker=worker.name, **asdict(tasks))) + flower.log.read_text()
    assert [secret for secret in (PROMPT, REDIS_PASSWORD, PROVIDER_KEY, FLOWER_PASSWORD) if secret in shown] == []


CHANGES = (
    *("/api/worker/shutdown/{worker}", "/api/task/revoke/{running}"),
    *(f"/api/task/send-task/{TASK_NAME}", f"/api/task/async-apply/{TASK_NAME}"),
)


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_can_be_changed_by_it(flower: Flower, tasks: Tasks, worker: WorkerProcess, change: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="403"):
        flower.get(change.format(worker=worker.name, **asdict(tasks)), b"{}")
