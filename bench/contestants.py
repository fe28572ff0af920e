"""Who is compared, the servers that all share, and the API's side, which submits jobs and waits for notices."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from pymongo.collection import Collection

from bench import BARE_QUEUE, MODEL
from bench.figures import Document
from testbed.api import STATUS_CHANNEL, TASK_NAME, Api, WorkerProcess, message_of, new_document
from testbed.processes import SOURCE, poll, spawn
from testbed.servers import DATABASE, MongoServer, RedisServer

Jobs = Mapping[str, Document]  # the data of messages, by job id


@dataclass(frozen=True)
class Contestant:
    """A worker that is measured: how it starts, which queue it reads, and the name of its task.

    `settings` are more environment variables, `ready` is what its log says once it takes jobs. A framework other than
    Celery has a function that enqueues jobs.
    """

    label: str
    command: tuple[str, ...]
    queue: str
    task: str
    settings: Mapping[str, str] = field(default_factory=dict)
    python: str = sys.executable
    ready: str = " ready."
    enqueue: Callable[[Mapping[str, str], Jobs], None] | None = None


STREAMED: Final = ", streaming too"  # follows the label of a contestant that makes the streamed call
STOCK_COMMAND: Final = ("-m", "celery", "-A", "bench.bare:bare", "worker", "--concurrency=1", "--loglevel=INFO")
# In a race the bare worker gets the flags of ours. Its start and its memory are measured with Celery's defaults.
LEAN_COMMAND: Final = (*STOCK_COMMAND, "--without-gossip", "--without-mingle")
OURS: Final = Contestant("ours", (str(SOURCE / "worker.py"),), "bench", TASK_NAME)
BARE: Final = Contestant("bare Celery", LEAN_COMMAND, BARE_QUEUE, "bare.process")
STREAMING: Final = replace(BARE, label=f"{BARE.label}{STREAMED}", task="bare.process_streaming")
NOOP: Final = replace(BARE, label="bare, no-op", task="bare.noop")
BODY: Final = replace(BARE, task="bare.body")
STOCK: Final = replace(BARE, label="stock Celery", command=STOCK_COMMAND)

PROMPT: Final = "Tell me something."
WARM_UP_JOBS: Final = 20
PROFILE_BYTES: Final = 64 * 2**20


def in_threads(contestant: Contestant, count: int) -> Contestant:
    """Return the same contestant with so many jobs at a time in one process."""
    settings = {**contestant.settings, "WORKER_POOL": "threads", "WORKER_CONCURRENCY": str(count)}
    options = ("--pool=threads", f"--concurrency={count}") if contestant.queue == BARE_QUEUE else ()
    return replace(contestant, command=(*contestant.command, *options), settings=settings)


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    rounds: int
    jobs: int
    as_json: bool = False
    long: bool = False
    chart: Path | None = None
    save: Path | None = None


class Bench:
    """Servers and the API's side. It is a context manager that leaves no process behind.

    The thread that waits for notices reads them itself, so that no other thread delays their time.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self._stack = ExitStack()

    def __enter__(self) -> Bench:
        with ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            mongodb_url = stack.enter_context(MongoServer()).url
            redis_url = stack.enter_context(RedisServer(append_only=True)).url
            self.environment = {"MONGODB_URL": mongodb_url, "DATABASE_NAME": DATABASE, "REDIS_URL": redis_url}
            self.environment |= {"OPENAI_BASE_URL": stack.enter_context(self.provider()), "OPENAI_API_KEY": "sk-bench"}
            self.api = Api(mongodb_url, redis_url, queue=OURS.queue, channels=())
            stack.callback(self.api.close)
            self.mongo, self.jobs = self.api.mongo, self.api.jobs
            self.redis: Any = self.api.redis
            self._notices = stack.enter_context(self.api.subscribed(STATUS_CHANNEL))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def provider(self) -> Iterator[str]:
        """Yield the URL of a provider in a process of its own, so that it shares no interpreter with a contestant."""
        log = self.folder / f"provider-{time.monotonic_ns()}.log"
        process = spawn([sys.executable, "-m", "testbed", "--provider-only"], log, directory=SOURCE)
        try:
            poll(lambda: "OPENAI_BASE_URL=" in log.read_text(), 20, description="the provider's URL")
            yield log.read_text().split("OPENAI_BASE_URL=")[1].split()[0]
        finally:
            process.terminate()
            process.wait(10)

    # ── what the servers count ───────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def counting_mongodb(self, application: str, database_name: str) -> Iterator[Counter[str]]:
        """Count the operations of clients with this name, by kind, as the server's own profiler records them."""
        database = self.mongo[database_name]
        database.drop_collection("system.profile")
        database.create_collection("system.profile", capped=True, size=PROFILE_BYTES)
        database.command("profile", 2)
        counts: Counter[str] = Counter()
        try:
            yield counts
        finally:
            database.command("profile", 0)
        for entry in database["system.profile"].find({"appName": application}, {"op": 1, "command": 1}):
            counts[next(iter(entry["command"])) if entry["op"] == "command" else entry["op"]] += 1

    @contextmanager
    def counting_redis(self) -> Iterator[Counter[str]]:
        """Count all commands by name, including those that a script calls."""
        counts: Counter[str] = Counter()
        self.redis.config_resetstat()
        yield counts
        for name, numbers in self.redis.info("commandstats").items():
            if not name.startswith(("cmdstat_config", "cmdstat_info")):
                counts[name.removeprefix("cmdstat_")] += numbers["calls"]

    # ── workers ──────────────────────────────────────────────────────────────────────────────────────────────────

    def environment_of(self, contestant: Contestant) -> dict[str, str]:
        """Return the variables that the contestant's processes get."""
        environment = {**self.environment, "CELERY_QUEUE_NAME": contestant.queue, "TEXT_MODEL": MODEL}
        if contestant.queue == BARE_QUEUE:
            environment["PYTHONPATH"] = str(SOURCE)
        return {**environment, **contestant.settings}

    def jobs_of(self, contestant: Contestant) -> Collection[Document]:
        """Return the collection in which the contestant looks for its jobs."""
        return self.mongo[self.environment_of(contestant)["DATABASE_NAME"]]["jobs"]

    @contextmanager
    def worker(self, contestant: Contestant, *, ready: bool = True) -> Iterator[WorkerProcess]:
        """Run the contestant's worker, wait until it is ready if asked to, and kill it afterwards."""
        log, command = self.folder / f"{time.monotonic_ns()}.log", list(contestant.command)
        worker = WorkerProcess(self.environment_of(contestant), log, command, contestant.python)
        try:
            yield worker.wait_ready(says=contestant.ready) if ready else worker
        finally:
            worker.kill()

    @contextmanager
    def warm_workers(self) -> Iterator[dict[str, WorkerProcess]]:
        """Run ours and the bare one side by side, by queue, after both have done a few jobs."""
        with self.worker(OURS) as ours, self.worker(BARE) as bare_worker:
            for contestant in (OURS, BARE, STREAMING):
                self.wait_for(self.submit(contestant, WARM_UP_JOBS), "completed")
            yield {OURS.queue: ours, BARE.queue: bare_worker}

    # ── the API's side ───────────────────────────────────────────────────────────────────────────────────────────

    def insert(
        self, count: int = 1, prompt: str = PROMPT, collection: Collection[Document] | None = None
    ) -> dict[str, Document]:
        """Insert text jobs as the API does; return the data of their messages by job id."""
        owner: Document = {"user_id": "u", "session_id": None}
        documents = [new_document("text_generation", {"prompt": prompt}, **owner) for _ in range(count)]
        (self.jobs if collection is None else collection).insert_many(documents)
        return dict(map(message_of, documents))

    def send(self, contestant: Contestant, jobs: Jobs) -> None:
        """Enqueue jobs as the API does."""
        if contestant.enqueue:
            contestant.enqueue({**os.environ, **self.environment_of(contestant)}, jobs)
            return
        for message in jobs.items():
            self.api.send(*message, task=contestant.task, queue=contestant.queue)

    def submit(self, contestant: Contestant, count: int = 1, prompt: str = PROMPT) -> dict[str, Document]:
        """Insert jobs and enqueue them."""
        jobs = self.insert(count, prompt, self.jobs_of(contestant))
        self.send(contestant, jobs)
        return jobs

    def wait_for(self, job_ids: Iterable[str], status: str, timeout_s: float = 60) -> float:
        """Wait until this status was published for each of the jobs; return when the last notice came (monotonic).

        Raises: TimeoutError.
        """
        return self._notices.wait_for(job_ids, status, timeout_s)

    def forget(self) -> None:
        """Delete all jobs, since our sweeper would rescue those for which only a no-op task was run."""
        self.jobs.delete_many({})
        self.redis.delete(OURS.queue, BARE_QUEUE)
