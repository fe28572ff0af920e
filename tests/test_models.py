"""Which model serves where none is set, and what is said about those that end or aren't offered."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from testbed.provider import Provider
from tests.lab import table
from workerkit.errors import OperatorFault
from workerkit.models import CURRENT, Choices, choose, date_of, parse_models, remark, sizes_of
from workerkit.provider import Memory, OpenAIProvider
from workerkit.settings import ProviderSettings

OPENAI, SERVER = ProviderSettings("", "key", "", ()), ProviderSettings("http://server/v1", "", "", ())
LIST_READ_ON = date(2026, 11, 27)
FIRST, SECOND, *_ = CURRENT["text"]


# ── what a server lists ──────────────────────────────────────────────────────────────────────────────────────────


@table(
    "value, day",
    ("OpenAI's", "2027-01-06", date(2027, 1, 6)),
    ("with a time", "2027-01-06T00:00:00Z", date(2027, 1, 6)),
    ("a Unix time", 1_799_193_600, date(2027, 1, 6)),
    ("none", None, None),
    ("words", "soon", None),
    ("a huge number", 10**30, None),
    ("true is no number", True, None),
)
def test_the_day_on_which_a_model_ends(value: object, day: date | None) -> None:
    assert date_of(value) == day


@table(
    "document, names",
    ("OpenAI's", {"data": [{"id": "a", "shutdown_date": None}, {"id": "b"}]}, ["a", "b"]),
    ("a list", [{"id": "a"}], ["a"]),
    ("names alone", {"data": ["a", "b"]}, ["a", "b"]),
    ("another word", {"models": [{"name": "a"}]}, ["a"]),
    ("none", {"data": [], "models": []}, []),
)
def test_the_models_of_a_list(document: Any, names: list[str]) -> None:
    assert list(parse_models(document)) == names


# ── the choice ───────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "where, offered, gone, model",
    ("OpenAI's first", OPENAI, dict.fromkeys([SECOND, FIRST]), (), FIRST),
    ("the first that the key may use", OPENAI, {SECOND: None}, (), SECOND),
    ("without a list", OPENAI, None, (), FIRST),
    ("the next after one that is gone", OPENAI, None, (FIRST,), SECOND),
    ("a server's only one", SERVER, {"only": None}, (), "only"),
    ("beside one that embeds", SERVER, {"text-embedding-x": None, "bge-reranker": None, "chat": None}, (), "chat"),
    ("a server without a list may take any name", SERVER, None, (), FIRST),
)
def test_a_model_that_is_not_set_is_chosen(
    where: ProviderSettings, offered: dict[str, Any] | None, gone: tuple[str, ...], model: str
) -> None:
    assert choose(where, offered, gone) == model


@table(
    "where, offered, said",
    ("several", SERVER, {"a/b:7b": None, "c": None}, "offers 2 models: set TEXT_MODEL to one of: a/b:7b, c"),
    ("names that could forge a line", SERVER, {"a\nERROR": None, "b": None}, "set TEXT_MODEL to one of: b"),
    ("none", SERVER, {}, "offers 0 models: set TEXT_MODEL to a model, since it lists none"),
    ("none of OpenAI's that are known", OPENAI, {"whisper": None}, f"offers none of {FIRST}"),
)
def test_where_it_cant_be_told_the_operator_reads_the_choices(
    where: ProviderSettings, offered: dict[str, Any], said: str
) -> None:
    with pytest.raises(OperatorFault) as caught:
        choose(where, offered)
    assert said in caught.value.detail


@pytest.mark.parametrize("kind", ["text", "image"])
def test_no_model_of_the_short_list_ends_within_180_days(kind: Any) -> None:
    """OpenAI ends all models for speech on 2027-01-06 and names none after them, so those can't be tested."""
    ends = [day for day in CURRENT[kind].values() if day]
    assert all(day - LIST_READ_ON > timedelta(days=180) for day in ends)


# ── what is said about one in use ────────────────────────────────────────────────────────────────────────────────

SOON = date(2027, 1, 6)


@table(
    "where, model, offered, said",
    ("all well", OPENAI, "m", {"m": None}, ""),
    ("not listed", SERVER, "m", {"a": None}, "m isn't among the 1 models that are offered"),
    ("no list", SERVER, "m", None, ""),
    ("it ends soon", SERVER, "m", {"m": SOON}, "m ends on 2027-01-06: set another TEXT_MODEL before"),
    ("it has ended", OPENAI, "m", {"m": date(2026, 10, 23)}, "m ended on 2026-10-23"),
    ("it ends later", OPENAI, "m", {"m": date(2027, 6, 1)}, ""),
)
def test_a_remark_about_a_model(
    where: ProviderSettings, model: str, offered: dict[str, date | None] | None, said: str
) -> None:
    assert remark(where, model, offered, date(2026, 12, 1)).startswith(said)
    assert bool(said) == bool(remark(where, model, offered, date(2026, 12, 1)))


def test_the_end_of_openais_speech_models_is_known_without_a_list() -> None:
    where = ProviderSettings("", "key", "", (), kind="audio")
    assert "ends on 2027-01-06" in remark(where, "gpt-4o-mini-tts", None, date(2026, 12, 1))


# ── over HTTP ────────────────────────────────────────────────────────────────────────────────────────────────────

Routes = dict[str, Callable[[dict[str, Any]], tuple[int, Any]]]


@contextmanager
def serving(routes: Routes) -> Iterator[tuple[str, list[str]]]:
    """A server with these routes. Yields its base URL, and the routes that were asked, with the model."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")
            asked.append(f"{self.path.rpartition('/')[2]} {body.get('model', '')}".strip())
            status, answer = routes[self.path](body)
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
        server.shutdown()


def say_hello(body: dict[str, Any]) -> tuple[int, Any]:
    return 200, {"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]}


def texts(where: ProviderSettings, times: int = 1, memory: Memory | None = None) -> list[str]:
    """Asks for texts as jobs do, each with the model that is chosen for it."""

    async def ask() -> list[str]:
        provider, made = OpenAIProvider(where, 2**20, memory), []
        try:
            for _ in range(times):
                model = (await provider.with_model(where)).model
                request = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
                made.append((await provider.text(request, lambda _: None)).text)
        finally:
            await provider.close()
        return made

    return asyncio.run(ask())


def test_a_servers_only_model_is_asked_for_once_and_serves_all_jobs(provider: Provider) -> None:
    texts(ProviderSettings(provider.url, "", "", ()), times=3)
    assert [call.model for call in provider.calls] == ["testbed-model"] * 3


@table(
    "models",
    ("not there", lambda _: (404, {"detail": "Not Found"})),
    ("broken", lambda _: (500, b"")),
    ("a page", lambda _: (200, b"<html></html>")),
    ("another shape", lambda _: (200, {"data": 5})),
)
def test_no_job_waits_for_a_list_that_cant_be_had(models: Callable[[dict[str, Any]], tuple[int, Any]]) -> None:
    with serving({"/v1/models": models, "/v1/chat/completions": say_hello}) as (url, asked):
        assert texts(ProviderSettings(url, "", "", ()), times=2) == ["Hello", "Hello"]
    assert asked == ["models", f"completions {FIRST}", f"completions {FIRST}"]


def test_a_list_that_does_not_come_holds_up_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workerkit.provider.MODELS_S", 0.2)
    over = threading.Event()

    def hang(_body: dict[str, Any]) -> tuple[int, Any]:
        over.wait(20)
        return 200, {}

    with serving({"/v1/models": hang, "/v1/chat/completions": say_hello}) as (url, _):
        try:
            assert texts(ProviderSettings(url, "", "", ())) == ["Hello"]
        finally:
            over.set()


def test_a_chosen_model_that_is_gone_is_replaced_within_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_the_first(body: dict[str, Any]) -> tuple[int, Any]:
        gone = {"error": {"code": "model_not_found", "message": "The model does not exist"}}
        return (404, gone) if body["model"] == FIRST else say_hello(body)

    both = {"data": [{"id": FIRST}, {"id": SECOND}]}
    with serving({"/v1/models": lambda _: (200, both), "/v1/chat/completions": refuse_the_first}) as (url, asked):
        monkeypatch.setattr("workerkit.settings.OPENAI_URL", url)
        monkeypatch.setattr("workerkit.provider.OPENAI_URL", url)
        assert texts(OPENAI, times=2) == ["Hello", "Hello"]
    assert asked == ["models", f"completions {FIRST}", "models", f"completions {SECOND}", f"completions {SECOND}"]


def test_a_model_that_is_set_and_gone_is_the_operators_fault() -> None:
    gone = {"error": {"code": "model_not_found", "message": "no"}}
    with serving({"/v1/chat/completions": lambda _: (404, gone)}) as (url, asked):
        with pytest.raises(OperatorFault, match="TEXT_MODEL"):
            texts(ProviderSettings(url, "", "mine", ()))
    assert asked == ["completions mine"]


def test_a_choice_without_a_list_holds_for_a_minute_and_one_from_a_list_for_good() -> None:
    now = [0.0]
    choices = Choices(lambda: now[0])
    choices.keep("a", "text", "guessed", is_certain=False)
    choices.keep("b", "text", "listed", is_certain=True)
    now[0] = 59.0
    assert choices.get("a", "text") == "guessed"
    now[0] = 60.0
    assert (choices.get("a", "text"), choices.get("b", "text")) == (None, "listed")


# ── sizes of pictures ────────────────────────────────────────────────────────────────────────────────────────────

THREE = ("1024x1024", "1536x1024", "1024x1536")


@table(
    "model, wanted, sizes",
    ("the family, behind any URL", "openai/gpt-image-1-mini", "512x512", THREE),
    ("a newer one, which takes many sizes", "gpt-image-2.6-flare", "1792x1008", ()),
    ("but none that is small", "gpt-image-2.6-flare", "512x512", THREE),
    ("nor one that 16 doesn't divide", "gpt-image-2", "1000x1000", THREE),
    ("nor one that is very wide", "gpt-image-2", "3840x1024", THREE),
    ("its own choice", "gpt-image-2", "auto", THREE),
    ("dall-e", "dall-e-3", "512x512", ("1024x1024", "1792x1024", "1024x1792")),
    ("any other", "flux-dev", "512x512", ()),
)
def test_the_sizes_that_a_family_of_models_offers(model: str, wanted: str, sizes: tuple[str, ...]) -> None:
    assert sizes_of(model, wanted) == sizes
