"""The example's page in a real browser, in front of a real worker: what a person does there, and what they see."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId

from examples.api.app import USER_ID
from examples.api.jobs import BUSY, CANCELLED
from testbed.api import Api, WorkerProcess
from testbed.browser import Browser, Page
from testbed.example import Example, submit
from testbed.processes import poll
from testbed.provider import Provider
from testbed.servers import MongoServer, RedisServer
from tests.lab import table
from tests.site import open_api, skipping_outside_ci, worker_settings
from workerkit import sentences

PATIENCE_S = 60.0
SLOW = "[tokens 60] [pace 0.05]"  # three seconds
ENDLESS = "[tokens 900] [pace 0.1]"

pytestmark = [pytest.mark.servers, pytest.mark.timeout(300)]  # a browser takes its time on a busy machine


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with skipping_outside_ci():
        browser = Browser()
    with browser:
        yield browser


@dataclass(frozen=True)
class Stage:
    """The example as a process, a worker, and the provider behind it."""

    example: Example
    api: Api
    provider: Provider


@pytest.fixture(scope="module")
def stage(
    browser: Browser,
    mongo_server: MongoServer,
    redis_server: RedisServer,
    running_provider: Provider,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stage]:
    settings = worker_settings(mongo_server, redis_server, running_provider, f"browser_{ObjectId()}")
    environment = {**settings, "WORKER_POOL": "threads", "WORKER_CONCURRENCY": "4", "SWEEP_INTERVAL": "0.5"}
    folder = tmp_path_factory.mktemp("browser")
    worker = WorkerProcess(environment, folder / "worker.log")
    try:
        with Example(folder, "--servers", environment=environment) as example, open_api(environment) as api:
            worker.wait_ready()
            yield Stage(example, api, running_provider)
    finally:
        worker.kill()


@pytest.fixture
def page(browser: Browser, stage: Stage) -> Iterator[Page]:
    """A page of someone who is new. Its script must not fail."""
    with browser.page(stage.example.url) as page:
        yield page
        assert page.errors == []


# ── what is seen ─────────────────────────────────────────────────────────────────────────────────────────────────


def status(page: Page) -> str:
    """The status of the newest job; nothing if none is shown."""
    return str(page.evaluate("document.querySelector('article')?.dataset.status ?? ''"))


def wait_status(page: Page, wanted: str) -> None:
    poll(lambda: status(page) == wanted, PATIENCE_S, description=f"{wanted} is shown")


def wait_words(page: Page, count: int = 1) -> str:
    """The text of the newest job, as soon as it has so many words."""
    poll(lambda: len(page.text(".text").split()) >= count, PATIENCE_S, description=f"{count} words are shown")
    return page.text(".text")


def newest_job(stage: Stage, page: Page) -> dict[str, Any]:
    """The document of the page's newest job."""
    [cookie] = [each for each in page.cookies() if each["name"] == "example_session"]
    [job] = stage.api.jobs.find({"user_id": USER_ID, "session_id": cookie["value"]}).sort("_id", -1).limit(1)
    return dict(job)


def generated(stage: Stage, page: Page) -> str:
    return str(newest_job(stage, page)["output_data"]["generated_text"])


def shown(page: Page, selector: str) -> bool:
    found = f"document.querySelector({selector!r})"
    return bool(page.evaluate(f"{found} !== null && {found}.checkVisibility()"))


# ── results ──────────────────────────────────────────────────────────────────────────────────────────────────────

WATCH = """
window.lengths = [];
new MutationObserver(() => {
  const article = document.querySelector("article[data-status=processing]");
  if (article) lengths.push(article.querySelector(".text").textContent.length);
}).observe(document.body, {subtree: true, childList: true, characterData: true});
"""


def test_a_text_grows_until_it_is_whole(stage: Stage, page: Page) -> None:
    page.evaluate(WATCH)
    submit(page, "Text", f"A story about a lighthouse {SLOW}")
    wait_status(page, "completed")
    whole = page.text(".text")
    assert whole == generated(stage, page)
    lengths = [length for length in page.evaluate("lengths") if length]
    partial = {length for length in lengths if length < len(whole)}
    assert (lengths, len(partial) >= 2) == (sorted(lengths), True)
    assert page.text(".sentence") == "Your result is ready."


def test_a_picture_shows_and_says_what_it_is_of(page: Page) -> None:
    submit(page, "Picture", "A quiet lake")
    page.wait("document.querySelector('article img')?.naturalWidth > 0")
    wait_status(page, "completed")
    assert shown(page, "article img")
    assert page.evaluate("document.querySelector('article img').alt") == "Picture of: A quiet lake"


def test_a_sound_has_its_duration_seeks_and_plays(page: Page) -> None:
    submit(page, "Sound", "Hello world")
    duration = page.wait("document.querySelector('article audio')?.duration")
    assert math.isfinite(duration)
    assert duration == pytest.approx(0.76, abs=0.1)
    assert shown(page, "article audio")
    assert 206 in page.statuses(".wav")
    page.evaluate("""new Promise(resolve => {
        const audio = document.querySelector("article audio");
        audio.onseeked = resolve;
        audio.currentTime = 0.5;
    })""")
    assert page.evaluate("document.querySelector('article audio').currentTime") == pytest.approx(0.5, abs=0.05)
    page.evaluate("document.querySelector('article audio').play()")
    page.wait("document.querySelector('article audio').ended")


def test_texts_are_shown_as_texts_whatever_they_hold(page: Page) -> None:
    attack = "<img src=x onerror=window.attacked=1>"
    submit(page, "Text", f"{attack} [say <b>bold</b>{attack}]")
    wait_status(page, "completed")
    assert page.text(".text") == f"<b>bold</b>{attack}"
    assert attack in page.text(".prompt")
    assert (
        page.evaluate("window.attacked ?? document.querySelectorAll('article b, .text img, .prompt img').length") == 0
    )


def test_a_failed_job_shows_its_sentence(stage: Stage, page: Page) -> None:
    submit(page, "Text", "Hello [status 400]")
    wait_status(page, "failed")
    assert page.text(".sentence") == newest_job(stage, page)["error_message"] == sentences.REFUSED
    assert (shown(page, "article .retry"), shown(page, "article .cancel")) == (True, False)


# ── buttons ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_cancel_ends_the_job_and_its_generation(stage: Stage, page: Page) -> None:
    submit(page, "Text", f"To be cancelled {ENDLESS}")
    wait_words(page)
    page.click(".cancel")
    clicked_at = time.time()
    wait_status(page, "failed")
    assert page.text(".sentence") == CANCELLED
    job = newest_job(stage, page)
    assert (job["status"], job["error_message"]) == ("failed", CANCELLED)
    assert job["updated_at"].timestamp() < clicked_at + 2
    [call] = stage.provider.calls_for("To be cancelled")
    poll(lambda: call.outcome == "disconnected", PATIENCE_S, description="the generation has ended")


def test_try_again_lets_a_cancelled_job_begin_anew(stage: Stage, page: Page) -> None:
    submit(page, "Text", f"To be tried again {SLOW}")
    wait_words(page, 5)
    page.click(".cancel")
    wait_status(page, "failed")
    page.evaluate(WATCH)
    page.click(".retry")
    wait_status(page, "completed")
    assert page.text(".text") == generated(stage, page)
    lengths = page.evaluate("lengths")
    assert lengths == sorted(lengths)  # nothing of the former life was mixed in
    assert not shown(page, "article .error")


def test_try_again_lets_a_failed_job_begin_anew(stage: Stage, page: Page) -> None:
    submit(page, "Picture", f"A lake {ObjectId()} [status 400 times=1]")
    wait_status(page, "failed")
    page.click(".retry")
    wait_status(page, "completed")
    page.wait("document.querySelector('article img').naturalWidth > 0")


def test_a_second_active_job_is_refused_by_a_sentence(stage: Stage, page: Page) -> None:
    submit(page, "Text", f"The first {ENDLESS}")
    wait_words(page)
    submit(page, "Picture", "The second")
    page.wait("document.querySelector('form .error').textContent")
    assert page.text("form .error") == BUSY
    assert page.evaluate("document.querySelector('textarea').value") == "The second"
    assert page.evaluate("document.querySelectorAll('article').length") == 1
    page.click(".cancel")
    wait_status(page, "failed")
    page.wait("document.querySelector('form .error').textContent === ''")
    page.click("form button")
    page.wait("document.querySelector('article img')?.naturalWidth > 0")


# ── reloads and restarts ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_reload_in_mid_job_loses_nothing(stage: Stage, page: Page) -> None:
    submit(page, "Text", f"A story {SLOW}")
    before = wait_words(page, 10)
    page.reload()
    page.evaluate(WATCH)
    after = wait_words(page, 10)
    assert after.startswith(before)
    assert newest_job(stage, page)["status"] == "processing"  # all this was before its end
    wait_status(page, "completed")
    assert page.text(".text") == generated(stage, page)
    assert page.text(".prompt") == f"A story {SLOW}"


def test_a_reload_after_the_end_shows_the_results(page: Page) -> None:
    submit(page, "Text", "Hello [say Hello yourself]")
    wait_status(page, "completed")
    submit(page, "Sound", "Hello world")
    page.wait("document.querySelector('article audio')?.duration")
    page.reload()
    page.wait("document.querySelector('article audio')?.duration")
    assert page.evaluate("[...document.querySelectorAll('.text')].map(e => e.textContent)") == ["", "Hello yourself"]


def test_a_reload_while_a_job_waits_for_its_next_try_shows_why_it_waits(stage: Stage, page: Page) -> None:
    submit(page, "Text", f"Hello {ObjectId()} [status 429 retry-after=5 times=1] [say Hello yourself]")
    waiting = r"The AI service is busy; trying again in \d s \(2 of 4\)\."
    poll(lambda: re.fullmatch(waiting, page.text(".sentence")), PATIENCE_S, description="why it waits is shown")
    page.reload()
    poll(lambda: status(page), PATIENCE_S, description="the job is shown")
    assert re.fullmatch(waiting, page.text(".sentence"))
    wait_status(page, "completed")
    assert page.text(".text") == "Hello yourself"


@pytest.mark.slow
def test_an_open_page_goes_on_after_a_restart_of_the_api(stage: Stage, page: Page) -> None:
    submit(page, "Text", "A story [tokens 100] [pace 0.1]")
    wait_words(page, 5)
    stage.example.kill()
    page.wait("!document.querySelector('#connection').hidden")
    stage.example.start()
    page.wait("document.querySelector('#connection').hidden")
    assert newest_job(stage, page)["status"] == "processing"
    page.reload()  # what was written before the restart is known to the worker alone now
    poll(lambda: status(page) == "processing", PATIENCE_S, description="the job is shown")
    assert page.text(".sentence")
    wait_status(page, "completed")
    assert page.text(".text") == generated(stage, page)


# ── for everybody ────────────────────────────────────────────────────────────────────────────────────────────────


def luminance(colour: str) -> float:
    """As WCAG 2 defines it, of `rgb(1, 2, 3)`."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.fixture
def failed_page(page: Page) -> Page:
    submit(page, "Text", "Hello [status 400]")
    wait_status(page, "failed")
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(failed_page: Page, scheme: str) -> None:
    failed_page.prefer(scheme)
    for words, behind in (("h1", "body"), ("header p", "body"), (".prompt", "article"), (".sentence", "article")):
        colours = [f"getComputedStyle(document.querySelector('{words}')).color"]
        colours += [f"getComputedStyle(document.querySelector('{behind}')).backgroundColor"]
        light, dark = sorted((luminance(failed_page.evaluate(colour)) for colour in colours), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (words, scheme)
    assert (luminance(failed_page.evaluate("getComputedStyle(document.body).backgroundColor")) > 0.5) == (
        scheme == "light"
    )


@table("width", ("a small phone", 320), ("a phone", 390), ("a wide screen", 1600))
def test_nothing_is_wider_than_the_screen(failed_page: Page, width: int) -> None:
    failed_page.resize(width, 800, is_phone=width < 400)
    page_width = failed_page.evaluate("document.documentElement.scrollWidth")
    assert page_width <= width


def test_each_control_has_a_name_for_those_who_cant_see_it(failed_page: Page) -> None:
    controls = {"button", "radio", "textbox", "image", "progressbar", "article", "region"}
    tree = [node for node in failed_page.accessibility_tree() if not node["ignored"]]
    found = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree}
    named = {(role, name) for role, name in found if role in controls - {"article"}}
    assert {"Text", "Picture", "Sound", "Make it", "Try again", "What should the text be about?"} <= {
        name for _, name in named
    }
    assert [role for role, name in named if not name] == []


# ── in one process ───────────────────────────────────────────────────────────────────────────────────────────────


def test_all_of_it_runs_in_one_process_without_servers(browser: Browser, tmp_path: Path) -> None:
    with Example(tmp_path) as example:
        with browser.page(example.url) as page:
            page.evaluate(WATCH)
            submit(page, "Text", "A story about a lighthouse")
            wait_status(page, "completed")
            assert "lighthouse" in page.text(".text")
            assert len(set(page.evaluate("lengths"))) > 2
            submit(page, "Picture", "A quiet lake")
            page.wait("document.querySelector('article img')?.naturalWidth > 0")
            submit(page, "Sound", "What goes in comes out again")
            page.wait("document.querySelector('article audio')?.duration > 1")
            assert page.errors == []
            assert example.stop() == 0  # with a page that is open
