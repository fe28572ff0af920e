"""`python worker.py submit`: sends a job as the API does, and shows what becomes of it."""

from __future__ import annotations

import contextlib
import json
import math
import mimetypes
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from bson.errors import BSONError
from pymongo.errors import PyMongoError

from worker import HANDLERS, Runtime, Status, app, configure
from worker_commands.api_side import Api, Followed, Unreachable, View, fetch_file, writable_folder
from worker_commands.selection import SHORT_NAMES
from worker_commands.terminal import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, printable, say
from workerkit.errors import Document
from workerkit.settings import as_utf8, load_settings

NO_WORKER_AFTER_S = 15.0
NO_WORKER = "no worker seems to be running; is `python worker.py` started? (still waiting)"


class SubmitView(View):
    """Prints statuses as lines to stderr. On a terminal it prints the text to stdout while it grows."""

    def __init__(self) -> None:
        self.is_streaming = sys.stdout.isatty()
        self._is_line_open = False
        self._hint_at_s = NO_WORKER_AFTER_S

    def line(self, job: Followed, event: str, words: str) -> None:
        if self._is_line_open:
            print(flush=True)
        self._is_line_open = False
        say(f"{job.age_s:6.1f} s  {event:10}  {printable(words)}")

    def on_text(self, job: Followed, delta: str) -> None:
        if self.is_streaming:
            self._is_line_open = True
            print(printable(delta), end="", flush=True)

    def on_tick(self, jobs: Sequence[Followed]) -> None:
        for job in jobs:
            if job.status is Status.PENDING and job.age_s > self._hint_at_s:
                self._hint_at_s = math.inf
                self.line(job, job.status, NO_WORKER)


def read_request(job_type: str, prompt: str, parameters: Sequence[str]) -> tuple[str, Document]:
    """The job type, and the input as the API would get it. A parameter's value is JSON, or else text.

    Raises:
        ValueError: there is no such type, or a parameter is malformed.
    """
    app.loader.import_default_modules()  # job types of your own
    full = SHORT_NAMES.get(job_type, job_type)
    if full not in HANDLERS:
        raise ValueError(f"--type {job_type}: should be one of {', '.join([*SHORT_NAMES, *HANDLERS])}")
    input_data: Document = {"text" if full == SHORT_NAMES["audio"] else "prompt": prompt}
    for parameter in parameters:
        name, separator, value = parameter.partition("=")
        if not name or not separator:
            raise ValueError(f"--param {parameter}: should look like size=512x512")
        try:
            input_data[name] = json.loads(value, parse_constant=str)
        except ValueError:
            input_data[name] = value
    return full, input_data


def show_result(runtime: Runtime, job: Followed, view: SubmitView, folder: Path) -> None:
    """Prints a text; saves a file and prints its path; prints the output of another job type as JSON."""
    output, url = job.document["output_data"], str(job.document["artifact_url"] or "")
    if url:
        say(", ".join(f"{key}: {value}" for key, value in output.items() if value != url))
        data = fetch_file(runtime, url)
        suffix = mimetypes.guess_extension(url[5:].partition(";")[0]) or ""
        name = f"{job.id}{suffix}" if url.startswith("data:") else url.rsplit("/", 1)[-1]
        if data is None:
            print(url)
        else:
            path = writable_folder(folder) / name
            path.write_bytes(data)
            print(path)
    elif "generated_text" not in output:
        print(json.dumps(output, indent=2, ensure_ascii=False, default=str))
    elif not view.is_streaming or job.text != output["generated_text"]:
        print(output["generated_text"])


def submit_and_follow(runtime: Runtime, job_type: str, input_data: Document, follow: bool, folder: Path) -> int:
    view = SubmitView()
    with Api(runtime) as api:
        job = api.submit(job_type, input_data)
        view.line(job, job.status, f"{job.id}, {job.job_type}, queue {runtime.settings.celery_queue_name}")
        if not follow:
            print(job.id)
            return 0
        try:
            api.follow([job], view)
        except KeyboardInterrupt:
            view.line(job, job.status, f"not waiting any longer; the job goes on: {job.id}")
            return EXIT_INTERRUPTED
    if job.status is Status.FAILED:
        return EXIT_FAILED
    show_result(runtime, job, view, folder)
    return 0


def submit(
    runtime: Runtime, job_type: str, prompt: str, parameters: Sequence[str], follow: bool, output: Path | None
) -> int:
    """Sends a job as the API does, and shows what becomes of it. Returns the exit code."""
    try:
        return submit_and_follow(runtime, *read_request(job_type, prompt, parameters), follow, output or Path())
    except Unreachable as error:
        say(error)
    except (OSError, PyMongoError) as error:
        say(f"The result can't be fetched or saved ({type(error).__name__}: {error}).")
    except (ValueError, OverflowError, BSONError) as error:
        say(error)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return EXIT_FAILED


@click.command("submit")
@click.option("--type", "job_type", default="text", show_default=True, help="text, image, audio, or a full job type")
@click.option("--prompt", required=True, help="what to generate")
@click.option("--param", "parameters", multiple=True, metavar="NAME=VALUE", help="more input, such as size=512x512")
@click.option(
    "--follow/--no-follow", default=True, show_default=True, help="wait for the job and show its text as it grows"
)
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="folder in which the file is saved")
def command(job_type: str, prompt: str, parameters: Sequence[str], follow: bool, output: Path | None) -> None:
    """Submit a job as the API does, and show what comes back."""
    with contextlib.closing(configure(load_settings())) as runtime:
        words = (as_utf8(prompt), list(map(as_utf8, parameters)))
        sys.exit(submit(runtime, job_type, *words, follow, output))
