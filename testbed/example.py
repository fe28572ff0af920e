"""The example API as a process; `python -m testbed.example` draws the picture of its page in docs/ again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from testbed.browser import Page
from testbed.processes import LOOPBACK, SOURCE, ServerFailed, free_port, poll, spawn

START_S: Final = 60.0
STOP_S: Final = 20.0
PICTURE: Final = SOURCE / "docs" / "example.png"
KINDS: Final = {"Text": "text_generation", "Picture": "image_generation", "Sound": "audio_generation"}
COLOURS: Final = 96  # a picture of so many is a third as large, and looks the same


class Example:
    """`python -m examples.api` as a process, which keeps its port over restarts. It is a context manager.

    It runs in a folder of its own, so that a `.env` beside worker.py doesn't change its settings.
    """

    def __init__(self, folder: Path, *options: str, environment: Mapping[str, str] | None = None) -> None:
        """Choose the port, but start nothing. The environment adds to that of this process."""
        self._folder, self.log = folder, folder / "example.log"
        port = free_port()
        self.url = f"http://{LOOPBACK}:{port}"
        self._command = [sys.executable, "-m", "examples.api", "--port", str(port), *options]
        self._environment = {**os.environ, "PYTHONPATH": str(SOURCE), **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Example:
        """Start the process, and wait until it serves. Raises: ServerFailed, TimeoutError."""
        self.log.write_text("")
        process = self._process = spawn(self._command, self.log, self._environment, self._folder)

        def serves() -> bool:
            if process.poll() is not None:
                raise ServerFailed(f"the example has ended:\n{self.log.read_text()}")
            return self.url in self.log.read_text()

        poll(serves, START_S, description="the example serves")
        return self

    def stop(self) -> int:
        """Send SIGTERM, and return the exit code. A process that doesn't end in time is killed."""
        assert self._process
        self._process.terminate()
        try:
            return self._process.wait(STOP_S)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill the process, as if it had crashed."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Example:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()


def submit(page: Page, kind: str, words: str) -> None:
    """Choose `Text`, `Picture` or `Sound`, write something, and send it."""
    page.click(f"fieldset label:has([value={KINDS[kind]}])")
    page.write("textarea", words)
    page.click("form button")
