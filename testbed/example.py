"""The example API as a process; `python -m testbed.example` draws the picture of its page in docs/ again."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from PIL import Image

from testbed.browser import Browser, Page
from testbed.processes import LOOPBACK, SOURCE, ServerFailed, current_environment, free_port, poll, spawn

START_S: Final = 60.0
STOP_S: Final = 20.0
PICTURE: Final = SOURCE / "docs" / "example.png"
KINDS: Final = {"Text": "text_generation", "Picture": "image_generation", "Sound": "audio_generation"}
HEIGHT: Final = 1000
WIDE, NARROW = 600, 390
FLAT_COLOURS, OTHER_COLOURS = 96, 160  # a picture of so many is half as large, and looks the same


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
        self._environment = {**current_environment(), "PYTHONPATH": str(SOURCE), **(environment or {})}
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


def show_text_and_sound(page: Page) -> bytes:
    """Return a picture of a page with a sound, above which a text grows."""
    submit(page, "Sound", "What goes in comes out again, exactly once.")
    page.wait("document.querySelector('article audio')?.duration")
    submit(page, "Text", "What happens to a job in a queue?")
    page.wait("document.querySelector('article .text').textContent.length > 230")
    return page.screenshot()


def show_picture(page: Page) -> bytes:
    """Return a picture of a page with a picture, on a narrow screen in the dark."""
    page.prefer("dark")
    submit(page, "Picture", "A quiet lake under the mountains at sunset")
    page.wait("document.querySelector('article img')?.naturalWidth")
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    return page.screenshot()


def with_fewer_colours(picture: Image.Image) -> Image.Image:
    """Return the picture with a palette. The most frequent colours, of which all areas are, stay as they are."""
    values = picture.tobytes()
    frequent = Counter(zip(values[::3], values[1::3], values[2::3], strict=True)).most_common(FLAT_COLOURS)
    others = picture.quantize(OTHER_COLOURS, Image.Quantize.FASTOCTREE).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([*(value for colour, _ in frequent for value in colour), *others])
    return picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def draw() -> Image.Image:
    """Return both pictures side by side, as the example makes them by the offline stand-in."""
    offline = {"OPENAI_API_KEY": "", "OPENAI_BASE_URL": ""}
    with tempfile.TemporaryDirectory() as folder, Example(Path(folder), environment=offline) as example:
        with Browser() as browser:
            with browser.page(example.url, WIDE, HEIGHT) as page:
                wide = show_text_and_sound(page)
            with browser.page(example.url, NARROW, HEIGHT) as page:
                narrow = show_picture(page)
    drawn = Image.new("RGB", (WIDE + NARROW, HEIGHT))
    for data, left in ((wide, 0), (narrow, WIDE)):
        drawn.paste(Image.open(io.BytesIO(data)), (left, 0))
    return with_fewer_colours(drawn)


def main() -> None:
    """Write the picture."""
    draw().save(PICTURE, optimize=True)
    print(PICTURE, f"{PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
