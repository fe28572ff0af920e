"""The worker against model servers that others wrote, unmodified: llama.cpp's, the LiteLLM proxy and a speech server.

Each runs in a virtual environment of its own, which is made the first time and takes a minute or two then.
"""

from __future__ import annotations

import base64
import wave
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from io import BytesIO
from typing import IO, Any, Protocol

import pytest
from bson import ObjectId

from testbed.api import CANCELLED, Document, WorkerProcess
from testbed.model_servers import LiteLLMProxy, LlamaServer, ModelServer, SpeechServer
from testbed.processes import poll
from testbed.provider import Provider
from testbed.servers import MongoServer, RedisServer
from tests.lab import AUDIO, IMAGE, PNG, TEXT, table
from tests.site import CACHE, JOBS, Site, artifacts, open_api, running, skipping_outside_ci, worker_settings
from workerkit.sentences import NO_EYES, NOT_SET_UP, TOO_LONG

pytestmark = [pytest.mark.servers, pytest.mark.slow, pytest.mark.timeout(900)]

ENVIRONMENTS = CACHE / "model-servers"
RIGHT_KEY, WRONG_KEY, KEY_BEHIND = "sk-right-key", "sk-wrong-key", "sk-key-of-the-server-behind"
LONG_PROMPT = "letter " * 10_000  # more tokens than the context of llama.cpp's model has
PNG_MAGIC = b"\x89PNG\r\n"
TALE = "Once upon a time a server gave the answer that it had been given."
COMPLETED = ("completed", None)
MADE_UP = {"model": "openai/made-up", "api_key": "none"}  # for a model of LiteLLM's own answers
NOTHING_ELSE = {"OPENAI_API_KEY": "", "AUDIO_FORMAT": ""}  # unsets what the tests of other providers set


# ── servers and workers ──────────────────────────────────────────────────────────────────────────────────────────


def litellm_models(llama: LlamaServer, speech: SpeechServer, provider: Provider) -> dict[str, dict[str, str]]:
    """What LiteLLM answers itself, and what it passes on to which server."""
    scripted = {"api_base": provider.url, "api_key": KEY_BEHIND}
    return {
        "tale": {**MADE_UP, "mock_response": TALE},
        "context-full": {**MADE_UP, "mock_response": "litellm.ContextWindowExceededError"},
        "passed-on": {"model": "openai/passed-on", **scripted},
        "picture": {"model": "openai/picture", **scripted},
        "sound": {"model": "openai/sound", **scripted},
        "letters": {"model": "openai/letters", "api_base": llama.url, "api_key": "none"},
        "voice": {"model": "openai/tts-1", "api_base": speech.url, "api_key": RIGHT_KEY},
        "wrong-key-behind": {"model": "openai/tts-1", "api_base": speech.url, "api_key": WRONG_KEY},
    }


Starting = dict[str, Future[Any]]


@pytest.fixture(scope="module")
def starting(request: pytest.FixtureRequest, running_provider: Provider) -> Iterator[Starting]:
    """Those servers that the selected tests name, each of which starts in a thread while earlier tests run."""
    llama, speech = LlamaServer(ENVIRONMENTS), SpeechServer(ENVIRONMENTS, RIGHT_KEY)
    proxy = LiteLLMProxy(ENVIRONMENTS, litellm_models(llama, speech, running_provider), RIGHT_KEY)
    alone = LiteLLMProxy(ENVIRONMENTS, {"the-only-one": {**MADE_UP, "mock_response": TALE}}, RIGHT_KEY)
    servers: dict[str, ModelServer] = {"llama": llama, "speech": speech, "litellm": proxy, "litellm_alone": alone}
    named = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    with ExitStack() as stack:
        for server in servers.values():
            stack.callback(server.close)
        threads = stack.enter_context(ThreadPoolExecutor(len(servers)))
        yield {name: threads.submit(server.start) for name, server in servers.items() if name in named}


@pytest.fixture(scope="module")
def llama(starting: Starting) -> LlamaServer:
    with skipping_outside_ci():
        server: LlamaServer = starting["llama"].result()
        return server


@pytest.fixture(scope="module")
def speech(starting: Starting) -> SpeechServer:
    with skipping_outside_ci():
        server: SpeechServer = starting["speech"].result()
        return server


@pytest.fixture(scope="module")
def litellm(starting: Starting) -> LiteLLMProxy:
    with skipping_outside_ci():
        server: LiteLLMProxy = starting["litellm"].result()
        return server


@pytest.fixture(scope="module")
def litellm_alone(starting: Starting) -> LiteLLMProxy:
    """A proxy that has one model, and refuses every other name."""
    with skipping_outside_ci():
        server: LiteLLMProxy = starting["litellm_alone"].result()
        return server


class OpenSite(Protocol):
    def __call__(self, url: str, **settings: str) -> Site: ...


@pytest.fixture(scope="module")
def open_site(
    mongo_server: MongoServer,
    redis_server: RedisServer,
    running_provider: Provider,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[OpenSite]:
    """Starts workers of this server with one slot and these settings, each in a database and a queue of its own."""
    with ExitStack() as stack:

        def open_one(url: str, **settings: str) -> Site:
            usual = worker_settings(mongo_server, redis_server, running_provider, f"real_{ObjectId()}")
            own = {"OPENAI_BASE_URL": url, "WORKER_POOL": "threads", "WORKER_CONCURRENCY": "1", **NOTHING_ELSE}
            environment = {**usual, **own, **settings}
            api = stack.enter_context(open_api(environment))
            worker = WorkerProcess(environment, tmp_path_factory.mktemp("worker") / "worker.log")
            stack.callback(worker.kill)
            return Site(api, worker.wait_ready(), running_provider, environment)

        yield open_one


def ends(site: Site, job_type: str, **input_data: object) -> tuple[str, str | None]:
    """Has the worker do a job. Returns its status and its sentence."""
    job = site.api.wait(site.api.submit(job_type, input_data))
    return job["status"], job["error_message"]


def file_of(site: Site, job: Document) -> IO[bytes]:
    """The file that the job has made."""
    return BytesIO(artifacts(site.api).get(job["artifact_url"].rpartition("/")[2]).read())


def streamed(site: Site, job: ObjectId) -> str:
    """The text that was published piece by piece while it was written."""
    return "".join(piece["delta"] for piece in site.api.progress(job))


def cancel_once_it_is_written(site: Site, job: ObjectId) -> None:
    poll(lambda: site.api.progress(job), 30, description="a piece of the text")
    site.api.cancel(job)


def assert_is_for_the_operator(site: Site, ended: tuple[str, str | None]) -> None:
    """The person learns that it isn't their fault; the log has an error, and neither key."""
    assert ended == ("failed", NOT_SET_UP)
    site.wait_log("ERROR")
    assert WRONG_KEY not in site.log()
    assert KEY_BEHIND not in site.log()


# ── llama.cpp ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def letters(llama: LlamaServer, open_site: OpenSite) -> Site:
    """A worker of which nothing is set but llama.cpp's URL."""
    return open_site(llama.url)


def test_a_url_alone_is_enough_for_llama_cpp(letters: Site, llama: LlamaServer) -> None:
    job = letters.api.wait(letters.api.submit(TEXT, JOBS[TEXT]))
    assert (job["status"], job["error_message"]) == COMPLETED
    assert job["output_data"]["model_used"] == llama.model
    assert f"TEXT_MODEL={llama.model}" in letters.worker.text()


def test_llama_cpp_writes_as_much_as_the_job_asks_for_piece_by_piece(letters: Site) -> None:
    job = letters.api.submit(TEXT, {"prompt": "letters", "max_tokens": 2000})
    output = letters.api.wait(job)["output_data"]
    assert len(output["generated_text"]) == 2000  # a letter each
    assert output["tokens_used"] > 2000
    poll(lambda: streamed(letters, job) == output["generated_text"], 10)
    assert len(letters.api.progress(job)) > 3


def test_a_cancelled_text_frees_llama_cpp_at_once(letters: Site, llama: LlamaServer) -> None:
    job = letters.api.text("letters without an end")
    cancel_once_it_is_written(letters, job)
    poll(lambda: not llama.is_busy, 10, description="llama.cpp idle")
    assert ends(letters, TEXT, prompt="the next", max_tokens=5) == COMPLETED
    assert letters.api.document(job)["error_message"] == CANCELLED


def test_a_prompt_longer_than_llama_cpps_context_is_too_long(letters: Site) -> None:
    assert ends(letters, TEXT, prompt=LONG_PROMPT) == ("failed", TOO_LONG)
    assert ends(letters, TEXT, prompt=LONG_PROMPT, max_tokens=200) == ("failed", TOO_LONG)


def test_a_picture_that_llama_cpps_model_cant_see_is_named(letters: Site) -> None:
    url = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}]
    _, sentence = ends(letters, TEXT, messages=[{"role": "user", "content": parts}])
    assert str(sentence) == NO_EYES


def test_llama_cpp_answers_to_any_models_name(llama: LlamaServer, open_site: OpenSite) -> None:
    job = (site := open_site(llama.url, TEXT_MODEL="any-name")).api.submit(TEXT, JOBS[TEXT])
    assert site.api.wait(job)["output_data"]["model_used"] == llama.model


def test_llama_cpp_makes_no_pictures_and_the_person_is_not_blamed(letters: Site, llama: LlamaServer) -> None:
    assert_is_for_the_operator(letters, ends(letters, IMAGE, **JOBS[IMAGE]))


def test_a_job_waits_for_a_llama_cpp_that_is_not_up_yet(letters: Site, llama: LlamaServer) -> None:
    llama.stop()
    try:
        job = letters.api.submit(TEXT, JOBS[TEXT])
        poll(lambda: any("can't be reached" in update["message"] for update in letters.api.updates(job)), 30)
    finally:
        llama.start()
    assert letters.api.wait(job)["status"] == "completed"


@table("key", ("a wrong key", WRONG_KEY), ("no key", ""))
def test_a_key_that_llama_cpp_refuses_is_for_the_operator(open_site: OpenSite, llama: LlamaServer, key: str) -> None:
    with running(LlamaServer(ENVIRONMENTS, RIGHT_KEY)) as locked:
        site = open_site(locked.url, OPENAI_API_KEY=key, TEXT_MODEL=locked.model)
        assert_is_for_the_operator(site, ends(site, TEXT, **JOBS[TEXT]))


# ── a speech server ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def voice(speech: SpeechServer, open_site: OpenSite) -> Site:
    """A worker of which nothing is set for sounds but URL, key and model. The server offers no MP3."""
    return open_site(speech.url, OPENAI_API_KEY=RIGHT_KEY, AUDIO_MODEL="tts-1")


def spoken_s(site: Site, **input_data: object) -> float:
    """Has words spoken. The file is a WAV. Returns how many seconds it lasts."""
    job = site.api.wait(site.api.submit(AUDIO, input_data))
    assert (job["status"], job["error_message"]) == COMPLETED
    with wave.open(file_of(site, job)) as sound:
        duration_s: float = sound.getnframes() / sound.getframerate()
    output = job["output_data"]
    assert (output["format"], output["duration_seconds"]) == ("wav", pytest.approx(duration_s, rel=0.05))
    return duration_s


def test_the_speech_server_speaks_in_a_format_that_it_offers(voice: Site) -> None:
    assert 0.3 < spoken_s(voice, **JOBS[AUDIO]) < 3


def test_the_speech_server_speaks_as_long_as_there_are_words(voice: Site) -> None:
    short_s = spoken_s(voice, text="One.", format="wav")
    long_s = spoken_s(voice, text="One word follows another until the sentence has come to its end.", format="wav")
    assert long_s > 2 * short_s


def test_words_that_the_speech_server_finds_too_many_are_too_long(voice: Site) -> None:
    assert ends(voice, AUDIO, text="word " * 1601) == ("failed", f"{TOO_LONG} It takes at most 8000 characters.")


@table("key", ("a wrong key", WRONG_KEY), ("no key", ""))
def test_a_key_that_the_speech_server_refuses_is_for_the_operator(
    speech: SpeechServer, open_site: OpenSite, key: str
) -> None:
    site = open_site(speech.url, OPENAI_API_KEY=key, AUDIO_MODEL="tts-1")
    assert_is_for_the_operator(site, ends(site, AUDIO, **JOBS[AUDIO]))


# ── LiteLLM ──────────────────────────────────────────────────────────────────────────────────────────────────────

UNKNOWN = "unknown-model"


@pytest.fixture(scope="module")
def proxy(
    litellm: LiteLLMProxy, llama: LlamaServer, speech: SpeechServer, running_provider: Provider, open_site: OpenSite
) -> Site:
    """A worker of LiteLLM, whose jobs may ask for any model."""
    models = {"TEXT": "tale", "IMAGE": "picture", "AUDIO": "sound"}
    chosen = {f"{kind}_MODEL": model for kind, model in models.items()}
    offered = ",".join([UNKNOWN, *litellm_models(llama, speech, running_provider)])
    allowed = {f"{kind}_MODELS": offered for kind in models}
    return open_site(litellm.url, OPENAI_API_KEY=RIGHT_KEY, **chosen, **allowed)


def test_litellm_streams_a_text(proxy: Site) -> None:
    job = proxy.api.submit(TEXT, JOBS[TEXT])
    output = proxy.api.wait(job)["output_data"]
    assert (output["generated_text"], output["model_used"]) == (TALE, "tale")
    poll(lambda: streamed(proxy, job) == TALE, 10)


def test_a_cancelled_text_ends_behind_litellm_too(proxy: Site) -> None:
    job = proxy.api.submit(TEXT, {"prompt": "cancelled [tokens 2000] [pace 0.05]", "model": "passed-on"})
    cancel_once_it_is_written(proxy, job)
    [call] = proxy.provider.calls_for("cancelled [tokens 2000]")
    poll(lambda: call.outcome == "disconnected", 20, description="the call behind LiteLLM ends")
    assert ends(proxy, TEXT, **JOBS[TEXT]) == COMPLETED


@table("model", ("LiteLLM's own refusal", "context-full"), ("llama.cpp's, passed on by LiteLLM", "letters"))
def test_what_is_too_long_is_too_long_through_litellm(proxy: Site, model: str) -> None:
    assert ends(proxy, TEXT, prompt=LONG_PROMPT, model=model, max_tokens=200) == ("failed", TOO_LONG)


@pytest.mark.parametrize("job_type", JOBS)
def test_a_model_that_litellm_does_not_know_is_for_the_operator(proxy: Site, job_type: str) -> None:
    assert_is_for_the_operator(proxy, ends(proxy, job_type, **{**JOBS[job_type], "model": UNKNOWN}))


@table("key", ("a wrong key", WRONG_KEY), ("no key", ""))
def test_a_key_that_litellm_refuses_is_for_the_operator(litellm: LiteLLMProxy, open_site: OpenSite, key: str) -> None:
    site = open_site(litellm.url, OPENAI_API_KEY=key, TEXT_MODEL="tale")
    assert_is_for_the_operator(site, ends(site, TEXT, **JOBS[TEXT]))


def test_a_key_that_is_refused_behind_litellm_is_for_the_operator(proxy: Site) -> None:
    assert_is_for_the_operator(proxy, ends(proxy, AUDIO, **{**JOBS[AUDIO], "model": "wrong-key-behind"}))
    ended = ends(proxy, TEXT, prompt="hidden words [status 401]", model="passed-on")
    assert_is_for_the_operator(proxy, ended)  # LiteLLM's answer repeats this prompt, and the key that it sent
    assert "hidden words" not in proxy.log()


TROUBLE = table(
    "directive",
    ("too many requests", "[status 429 times=1]"),
    ("a server that is down", "[status 503 times=1]"),
    ("an error in the middle of the stream", "[cut times=1]"),
)


@TROUBLE
def test_trouble_behind_litellm_costs_another_try(proxy: Site, directive: str) -> None:
    prompt = f"tried again {directive}"
    assert ends(proxy, TEXT, prompt=prompt, model="passed-on") == COMPLETED
    assert [call.outcome for call in proxy.provider.calls_for(prompt)] == ["fault", "answered"]


def test_a_model_behind_litellm_that_refuses_max_tokens_is_asked_in_its_own_words(proxy: Site) -> None:
    prompt = "renamed [refuse max_tokens]"
    assert ends(proxy, TEXT, prompt=prompt, model="passed-on", max_tokens=200) == COMPLETED
    refused, answered = proxy.provider.calls_for(prompt)
    assert refused.body["max_tokens"] == 200
    assert answered.body["max_completion_tokens"] >= 200


def test_litellm_passes_pictures_on(proxy: Site) -> None:
    job = proxy.api.wait(proxy.api.submit(IMAGE, JOBS[IMAGE]))
    assert (job["status"], job["error_message"]) == COMPLETED
    assert job["output_data"]["resolution"] == "512x512"
    assert file_of(proxy, job).read().startswith(PNG_MAGIC)


def test_litellm_passes_sounds_on(proxy: Site) -> None:
    assert spoken_s(proxy, **JOBS[AUDIO], format="wav") > 0


def test_a_real_voice_speaks_through_litellm_in_a_format_that_it_offers(proxy: Site) -> None:
    assert 0.3 < spoken_s(proxy, **{**JOBS[AUDIO], "model": "voice"}) < 3


def test_a_model_need_not_be_set_for_a_server_that_knows_only_one(
    litellm_alone: LiteLLMProxy, open_site: OpenSite
) -> None:
    site = open_site(litellm_alone.url, OPENAI_API_KEY=RIGHT_KEY)
    output = site.api.wait(site.api.submit(TEXT, JOBS[TEXT]))["output_data"]
    assert (output["generated_text"], output["model_used"]) == (TALE, "the-only-one")
