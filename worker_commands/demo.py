"""`python worker.py demo`: one job of each type through the real worker, with nothing else installed or running."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pymongo
import redis
from celery import signals
from kombu.transport import redis as kombu_redis
from redis.lock import Lock

from worker import Runtime, Status, app, configure
from worker_commands.api_side import Api, Followed, Unreachable, View, fetch_file, writable_folder
from worker_commands.terminal import EXIT_FAILED, EXIT_INTERRUPTED, open_console, printable, say
from workerkit.errors import Document
from workerkit.settings import PROVIDER_KINDS, Settings, load_settings

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# ── embedded servers ─────────────────────────────────────────────────────────────────────────────────────────────

LOOPBACK = "127.0.0.1"
WORKER_START_S = 20.0
PROVIDER_FIELDS = ("openai_", "ssl_cert_", *(f"{kind}_" for kind in PROVIDER_KINDS))


@contextlib.contextmanager
def embedded_redis() -> Iterator[str]:
    """Runs a stand-in for Redis on a free port of the loopback address. Yields its URL."""
    from fakeredis import TcpFakeServer

    server: Any = TcpFakeServer((LOOPBACK, 0))
    server.daemon_threads = True
    server.RequestHandlerClass.disable_nagle_algorithm = True
    server.handle_error = lambda *_: None  # a client has closed its connection
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"redis://{LOOPBACK}:{server.server_address[1]}/0"
    scripts: Any = kombu_redis
    with redis.Redis.from_url(url) as client:  # it closes the connection after each error, as of an unknown script
        for script in (scripts.REFRESH_BINDING, scripts.SWEEP_BINDINGS, Lock.LUA_RELEASE_SCRIPT):
            client.script_load(script)
    try:
        yield url
    finally:
        server.shutdown()
        server.server_close()


def embedded_mongodb() -> pymongo.MongoClient[Document]:
    """A stand-in for MongoDB in memory, GridFS included."""
    import mongomock
    from mongomock.gridfs import enable_gridfs_integration

    enable_gridfs_integration()  # type: ignore[no-untyped-call]
    client: pymongo.MongoClient[Document] = mongomock.MongoClient()
    return client


def embedded_runtime(redis_url: str) -> Runtime:
    """Configures this process for the embedded servers. It reads only the provider from the environment, not `.env`."""
    fields = Settings.model_fields.items()
    own = {name: field.get_default() for name, field in fields if not name.startswith(PROVIDER_FIELDS)}
    own |= {"redis_url": redis_url, "worker_pool": "threads", "retry_delays": (2.0,)}
    settings = load_settings(_env_file=None, **own)
    app.set_default()
    return configure(settings, Runtime(settings, mongo=embedded_mongodb()))


@contextlib.contextmanager
def embedded_worker() -> Iterator[threading.Thread]:
    """Runs the real Celery worker in a thread of this process. Yields the thread once it takes jobs."""
    ready = threading.Event()

    def announce(consumer: object) -> None:
        signals.worker_ready.send(sender=consumer)
        ready.set()

    options: dict[str, Any] = {"concurrency": len(PROVIDER_KINDS), "without_gossip": True, "without_mingle": True}
    controller = app.WorkController(pool="threads", loglevel="WARNING", ready_callback=announce, **options)
    thread = threading.Thread(target=controller.start, name="worker", daemon=True)
    thread.start()
    try:
        if not ready.wait(WORKER_START_S):
            raise Unreachable("The embedded worker didn't start.")
        yield thread
    finally:
        controller.stop()


# ── demo ─────────────────────────────────────────────────────────────────────────────────────────────────────────

JOBS: dict[str, Document] = {
    "text_generation": {"prompt": "What happens to a job in a queue?", "max_tokens": 200},
    "image_generation": {"prompt": "A quiet lake under the mountains at sunset", "size": "1024x1024"},
    "audio_generation": {"text": "What goes in comes out again, exactly once.", "voice": "default"},
}
FILE_NAMES = {"image_generation": "picture", "audio_generation": "sound"}
GIVE_UP_AFTER_S = 240.0
SPINNER, TURNS_PER_S = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", 10
MARKS = {Status.COMPLETED: ("✓", "green"), Status.FAILED: ("✗", "red")}
INTRODUCTION = """\
AI Backend Worker: demo. Three jobs go through a real Celery worker, as the API would send them.
Redis and MongoDB are stand-ins inside this process. No server of yours is touched.
"""
NEXT_STEPS = """
What next:
  OPENAI_API_KEY=... python worker.py demo   with a real model (OPENAI_BASE_URL: of another server)
  python worker.py check                     tries the MongoDB and Redis that .env names
  python worker.py                           works on them
  python worker.py submit --prompt "..."     sends that worker a job
  docker compose up                          starts all of it in containers"""


class DemoView(View):
    """Prints lines, for pipes and logs. It raises Unreachable when the worker has stopped."""

    def __init__(self, worker_thread: threading.Thread) -> None:
        self._worker_thread = worker_thread

    def on_tick(self, jobs: Sequence[Followed]) -> None:
        if not self._worker_thread.is_alive() or max(job.age_s for job in jobs) > GIVE_UP_AFTER_S:
            raise Unreachable("The embedded worker has stopped, or it doesn't get its jobs done.")


class LiveView(DemoView):
    """Draws a table again and again, for terminals."""

    def __init__(self, worker_thread: threading.Thread, draw: Callable[[RenderableType], None]) -> None:
        super().__init__(worker_thread)
        self._draw = draw

    def line(self, job: Followed, event: str, words: str) -> None:
        """Nothing: the table shows it."""

    def on_tick(self, jobs: Sequence[Followed]) -> None:
        from rich.table import Table
        from rich.text import Text

        super().on_tick(jobs)
        table = Table.grid(padding=(0, 2, 0, 0))
        for job in jobs:
            frame = SPINNER[int(time.monotonic() * TURNS_PER_S) % len(SPINNER)]
            mark, style = MARKS.get(job.status, (frame, "cyan"))
            words = Text(printable(job.text))
            if not job.text or job.status is not Status.COMPLETED:
                words.append("\n" * bool(job.text) + printable(job.message), "dim")
            table.add_row(Text(mark, style), job.job_type, Text(job.status, style), f"{job.age_s:.1f} s", words)
        self._draw(table)


def terminal() -> Console | None:
    """The console to draw on; None where stdout is no terminal, which gets plain lines."""
    console = open_console()
    return console if sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal else None


def run_jobs(api: Api, worker_thread: threading.Thread, console: Console | None) -> list[Followed]:
    """Sends one job of each type, and shows them until all have ended."""
    jobs = [api.submit(job_type, input_data) for job_type, input_data in JOBS.items()]
    for job in jobs:
        View().line(job, job.status, f"“{JOBS[job.job_type].get('prompt') or JOBS[job.job_type].get('text')}”")
    if console is None:
        api.follow(jobs, DemoView(worker_thread))
        return jobs
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as live:
        api.follow(jobs, LiveView(worker_thread, lambda table: live.update(table, refresh=True)))
    return jobs


def show_job(runtime: Runtime, job: Followed, folder: Path, is_shown: bool) -> None:
    """Prints a text unless it is on the screen already; saves a file and prints its path."""
    output, url = job.document["output_data"], job.document["artifact_url"]
    if not url:
        print(f"text     {output['tokens_used']} tokens by {output['model_used']}, in {len(job.pieces)} pieces")
        if not is_shown:
            print(textwrap.indent(textwrap.fill(printable(output["generated_text"]), 100), " " * 9))
        return
    data = fetch_file(runtime, url) or b""
    path = folder / f"{FILE_NAMES[job.job_type]}{Path(url).suffix}"
    path.write_bytes(data)
    measure = output.get("resolution") or f"{output['duration_seconds']} s"
    print(f"{path.stem:8} {path}  ({measure}, {len(data) / 1000:.0f} kB, by {output['model_used']})")


def run_demo(output: Path | None) -> int:
    """Returns the exit code. Raises Unreachable, OSError."""
    console = terminal()
    print(INTRODUCTION)
    with embedded_redis() as redis_url:
        runtime = embedded_runtime(redis_url)
        for kind in PROVIDER_KINDS:
            print(f"  {kind:5}  by {runtime.settings.provider(kind).label}")
        print(flush=True)
        with embedded_worker() as worker_thread, Api(runtime) as api:
            jobs = run_jobs(api, worker_thread, console)
            print()
            folder = writable_folder(output or Path("demo-output"))
            completed = [job for job in jobs if job.status is Status.COMPLETED]
            for job in completed:
                show_job(runtime, job, folder, is_shown=console is not None)
            print(f"\n{len(completed)} of {len(jobs)} jobs completed in {max(job.age_s for job in jobs):.1f} s.")
            print(NEXT_STEPS, flush=True)
    return 0 if completed == jobs else EXIT_FAILED


def demo(output: Path | None) -> int:
    """Runs one job of each type through the real worker on embedded servers. Returns 0 if all have completed."""
    warnings.simplefilter("ignore")
    log, code = io.StringIO(), EXIT_FAILED
    logging.basicConfig(stream=log, level=logging.WARNING, format="  %(message)s", force=True)
    try:
        code = run_demo(output)
    except (Unreachable, OSError) as error:
        say(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    if code:
        say(f"What the worker logged:\n{log.getvalue() or '  nothing'}")
    return code


@click.command("demo", short_help="Run one job of each type; needs no server and no key.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="folder for picture and sound")
def command(output: Path | None) -> None:
    """Run one job of each type through a real worker, with nothing else installed or running."""
    sys.exit(demo(output))
