"""Chromium without a screen: its pages, what a person does there, and what they see.

It is spoken to by the Chrome DevTools Protocol over a pipe. That needs no driver, no port and no package, and Chromium
ends when this process does, since its pipe is closed then.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from testbed.processes import STOP_TIMEOUT_S, ServerFailed, ServerUnavailable, poll

NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ON_A_MAC: Final = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
ANSWER_S: Final = 60.0  # a busy machine is slow, and waiting costs nothing when all goes well
PIECE_BYTES: Final = 1_048_576
OPTIONS: Final = (
    *("--headless=new", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check"),
    "--no-sandbox",  # the sandbox works neither for root nor in most containers
    "--disable-dev-shm-usage",  # that of a container is too small
    "--no-proxy-server",  # whatever the environment says
    *("--autoplay-policy=no-user-gesture-required", "--mute-audio"),
    *("--disable-gpu", "--disable-extensions", "--disable-background-networking", "--disable-component-update"),
    *("--disable-breakpad", "--disable-sync", "--hide-scrollbars"),
)
# Chromium reads commands from descriptor 3 and writes answers to descriptor 4.
LAUNCHER: Final = """
import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""

Document = dict[str, Any]


class BrowserFault(Exception):
    """The browser refused a command, or a script of a page failed."""


def find_chromium() -> str:
    """Return the path of Chromium or Chrome. Raises: ServerUnavailable."""
    found = next(filter(None, map(shutil.which, NAMES)), None) or (str(ON_A_MAC) if ON_A_MAC.exists() else None)
    if found is None:
        raise ServerUnavailable("no chromium: install it with apt-get install chromium (macOS: Google Chrome)")
    return found


class Browser:
    """Chromium as a child process with a profile of its own. It is a context manager."""

    def __init__(self) -> None:
        """Start Chromium. Raises: ServerUnavailable, ServerFailed."""
        chromium = find_chromium()
        self._profile = tempfile.TemporaryDirectory(prefix="testbed-chromium-", ignore_cleanup_errors=True)
        self._log = Path(self._profile.name, "chromium.log")
        its_commands, self._commands = os.pipe()
        self._answers, its_answers = os.pipe()
        launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(its_commands), str(its_answers)]
        command = [*launcher, chromium, *OPTIONS, f"--user-data-dir={self._profile.name}"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(its_commands, its_answers),
                start_new_session=True,
            )
        os.close(its_commands)
        os.close(its_answers)
        self._received, self._numbers = b"", itertools.count(1)
        self.events: list[Document] = []  # those that no command has asked for

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End Chromium with all its processes, and remove its profile."""
        os.close(self._commands)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            os.close(self._answers)
            self._profile.cleanup()

    def call(self, method: str, session: str = "", **parameters: object) -> Document:
        """Send a command, and return its result. Raises: BrowserFault, ServerFailed, TimeoutError."""
        number = next(self._numbers)
        command = {"id": number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        give_up_at = time.monotonic() + ANSWER_S
        while (message := self._receive(give_up_at)).get("id") != number:
            self.events.append(message)
        if "error" in message:
            raise BrowserFault(f"{method}: {message['error'].get('message')}")
        return dict(message["result"])

    def _receive(self, give_up_at: float) -> Document:
        """Return the next message. Raises: ServerFailed, TimeoutError."""
        while b"\0" not in self._received:
            if not select.select([self._answers], [], [], max(0.0, give_up_at - time.monotonic()))[0]:
                raise TimeoutError(f"chromium hasn't answered for {ANSWER_S:g} s")
            if not (piece := os.read(self._answers, PIECE_BYTES)):
                raise ServerFailed(f"chromium has ended:\n{self._log.read_text(errors='replace')[-2000:]}")
            self._received += piece
        message, _, self._received = self._received.partition(b"\0")
        return dict(json.loads(message))

    @contextmanager
    def page(self, url: str, width: int = 900, height: int = 800) -> Iterator[Page]:
        """Open a page, with cookies of its own, and close it at the end."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        try:
            yield Page(self, context, url, width, height)
        finally:
            self.call("Target.disposeBrowserContext", browserContextId=context)


class Page:
    """A page that is open. Elements are named by selectors of CSS."""

    def __init__(self, browser: Browser, context: str, url: str, width: int, height: int) -> None:
        """Open the page, and wait until it is loaded."""
        self._browser, self.width, self.height = browser, width, height
        target = browser.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Accessibility"):
            self._call(f"{domain}.enable")
        self.resize(width, height)
        self._call("Page.navigate", url=url)
        self._wait_loaded(f"location.href.startsWith({json.dumps(url)})")

    def _call(self, method: str, **parameters: object) -> Document:
        return self._browser.call(method, self._session, **parameters)

    def _wait_loaded(self, condition: str) -> None:
        """Wait for a page for which this holds. In between there may be none in which a script could run."""

        def is_loaded() -> bool:
            with suppress(BrowserFault):
                return bool(self.evaluate(f"document.readyState === 'complete' && {condition}"))
            return False

        poll(is_loaded, ANSWER_S, description="the page is loaded")

    def _events(self, method: str) -> list[Document]:
        """Return the parameters of the events of this kind so far."""
        own = [event for event in self._browser.events if event.get("sessionId") == self._session]
        return [event["params"] for event in own if event["method"] == method]

    @property
    def errors(self) -> list[str]:
        """What the page's own script has failed with so far."""
        details = [event["exceptionDetails"] for event in self._events("Runtime.exceptionThrown")]
        return [str(each.get("exception", {}).get("description", each["text"])) for each in details]

    def statuses(self, url_end: str) -> list[int]:
        """Return the HTTP status of each answer so far from a URL that ends so."""
        answers = [event["response"] for event in self._events("Network.responseReceived")]
        return [answer["status"] for answer in answers if answer["url"].endswith(url_end)]

    def cookies(self) -> list[Document]:
        """Return the page's cookies, including those that its script can't see."""
        return list(self._call("Network.getCookies")["cookies"])

    def accessibility_tree(self) -> list[Document]:
        """Return what assistive technology is told about the page."""
        return list(self._call("Accessibility.getFullAXTree")["nodes"])

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression in JavaScript; of a promise that for which it stands."""
        options = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = self._call("Runtime.evaluate", expression=expression, **options)
        if "exceptionDetails" in answer:
            raise BrowserFault(f"{expression}: {answer['exceptionDetails'].get('exception', {}).get('description')}")
        return answer["result"].get("value")

    def wait(self, expression: str, timeout_s: float = ANSWER_S) -> Any:
        """Wait until an expression is true, and return its value."""
        return poll(lambda: self.evaluate(expression), timeout_s, description=expression)

    def text(self, selector: str) -> str:
        """Return what is written in the first of these elements; nothing if there is none."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''"))

    def click(self, selector: str) -> None:
        """Move the mouse to the first of these elements that is shown, and click. Raises: BrowserFault."""
        place = self.evaluate(f"""(() => {{
            const element = [...document.querySelectorAll({json.dumps(selector)})].find(e => e.checkVisibility());
            element.scrollIntoView({{block: "center"}});
            const box = element.getBoundingClientRect(), [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
            const top = document.elementFromPoint(x, y);
            if (top !== element && !top.contains(element)) throw new Error(`${{top.outerHTML}} covers it`);
            return [x, y];
        }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            x, y = place
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def write(self, selector: str, text: str) -> None:
        """Click into a field and write a text there."""
        self.click(selector)
        self._call("Input.insertText", text=text)

    def reload(self) -> None:
        """Load the page anew, and wait until it is there."""
        self.evaluate("window.isOld = true")
        self._call("Page.reload")
        self._wait_loaded("!window.isOld")

    def resize(self, width: int, height: int, *, is_phone: bool = False) -> None:
        """Give the page another size, in pixels of CSS."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if is_phone else 1, "mobile": is_phone}
        self._call("Emulation.setDeviceMetricsOverride", **size)

    def prefer(self, colour_scheme: str) -> None:
        """Let the page be looked at by someone who prefers `light` or `dark`."""
        feature = {"name": "prefers-color-scheme", "value": colour_scheme}
        self._call("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self) -> bytes:
        """Return a PNG of what is seen."""
        return base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])
