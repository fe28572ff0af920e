"""Which model serves where none is set, what is known about the end of those in use, and how the list is asked for."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from datetime import UTC, date, datetime, timedelta
from typing import Any, get_args

import pytest

from testbed.provider import Provider
from tests.http_lab import Ask, answer_of
from tests.lab import AUDIO, IMAGE, KEY, TEXT, Clock, bare_settings, generate, serving, table
from worker_commands.models_in_use import models_in_use
from workerkit.errors import FailJob, OperatorFault
from workerkit.models import CURRENT, MAX_NAMES, READ_ON, Choices, choose, date_of, parse_models, remark, sizes_of
from workerkit.provider import Memory, OpenAIProvider
from workerkit.refusals import ModelGone
from workerkit.sentences import NOT_SET_UP
from workerkit.settings import ProviderKind, ProviderSettings

ENDS = date(2027, 1, 14)
KINDS: tuple[ProviderKind, ...] = get_args(ProviderKind)
TEXTS = list(CURRENT["text"])


def openai(kind: ProviderKind = "text", model: str = "") -> ProviderSettings:
    return ProviderSettings("", KEY, model, (), kind)


def server(kind: ProviderKind = "text", url: str = "http://server/v1") -> ProviderSettings:
    return ProviderSettings(url, "", "", (), kind)


# ── the list of a server ─────────────────────────────────────────────────────────────────────────────────────────


@table(
    "document, offered",
    ("OpenAI", {"object": "list", "data": [{"id": "a", "shutdown_date": "2027-01-14"}]}, {"a": ENDS}),
    ("no end is known", {"data": [{"id": "a", "shutdown_date": None}, {"id": "b"}]}, {"a": None, "b": None}),
    ("a list alone", [{"id": "a"}, {"id": "b"}], {"a": None, "b": None}),
    ("names alone", {"data": ["a", "b"]}, {"a": None, "b": None}),
    ("by another key", {"models": [{"name": "a"}]}, {"a": None}),
    ("odd items among them", {"data": [None, 7, {"id": 7}, {"id": ""}, {}, {"id": "a"}]}, {"a": None}),
)
def test_the_models_that_a_server_lists(document: Any, offered: dict[str, date | None]) -> None:
    assert parse_models(document) == offered


@pytest.mark.parametrize(
    "document", [None, 7, "models", {}, {"error": "no"}, {"data": 7}, {"data": []}, {"data": None}]
)
def test_another_answer_or_an_empty_one_is_no_list_of_models(document: Any) -> None:
    with pytest.raises((TypeError, LookupError, AttributeError)):
        parse_models(document)


@table(
    "value, day",
    ("a day", "2027-01-14", ENDS),
    ("a time", "2027-01-14T00:00:00Z", ENDS),
    ("seconds since 1970", datetime(2027, 1, 14, tzinfo=UTC).timestamp(), ENDS),
    ("null", None, None),
    ("nothing", "", None),
    ("a word", "soon", None),
    ("a day that there isn't", "2027-02-30", None),
    ("true is no time", True, None),
    ("a time that no clock has", 1e30, None),
    ("not a number", float("nan"), None),
    ("a list", [], None),
)
def test_the_day_on_which_a_model_ends(value: object, day: date | None) -> None:
    assert date_of(value) == day


# ── the list of current models ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["text", "image"])
def test_no_current_model_ends_within_half_a_year_of_the_day_on_which_the_list_was_read(kind: ProviderKind) -> None:
    """Of speech none lasts: OpenAI ends all models of /audio/speech on 2027-01-06, and names no other."""
    assert not {model: ends for model, ends in CURRENT[kind].items() if ends and ends < READ_ON + timedelta(days=180)}


def test_each_kind_has_a_current_model() -> None:
    assert all(CURRENT[kind] for kind in KINDS)


# ── the choice ───────────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "where, offered, gone, chosen",
    ("OpenAI: the first that it offers", openai(), {TEXTS[1]: None, TEXTS[0]: None, "x": None}, [], TEXTS[0]),
    ("OpenAI: the second, if it lacks the first", openai(), {"x": None, TEXTS[1]: None}, [], TEXTS[1]),
    ("OpenAI: none that it refused", openai(), {TEXTS[0]: None, TEXTS[1]: None}, [TEXTS[0]], TEXTS[1]),
    ("OpenAI without a list", openai(), None, [], TEXTS[0]),
    ("OpenAI without a list, after a refusal", openai(), None, [TEXTS[0]], TEXTS[1]),
    ("OpenAI by its URL", server(url="https://api.openai.com/v1/"), {TEXTS[0]: None, "x": None}, [], TEXTS[0]),
    ("OpenAI's pictures", openai("image"), None, [], next(iter(CURRENT["image"]))),
    ("another server's only one", server(), {"local": None}, [], "local"),
    ("beside those of other kinds", server(), {"local": None, "text-embedding-3": None, "x-rerank": None}, [], "local"),
    ("another server without a list", server(), None, [], TEXTS[0]),
    ("the one that is left", server(), {"a": None, "b": None}, ["a"], "b"),
    ("the only one, though it was refused", server(), {"a": None}, ["a"], "a"),
    ("OpenAI's first, though all were refused", openai(), dict.fromkeys(TEXTS), TEXTS, TEXTS[0]),
)
def test_a_model_is_chosen(
    where: ProviderSettings, offered: dict[str, date | None] | None, gone: list[str], chosen: str
) -> None:
    assert choose(where, offered, gone) == chosen


@table(
    "where, offered, gone, advice",
    ("several", server(), ["b", "a"], [], "http://server/v1 offers 2 models: set TEXT_MODEL to one of: b, a"),
    ("none", server("image"), [], [], "offers 0 models: set IMAGE_MODEL to one that it takes"),
    ("none of another kind", server(), ["x-embed"], [], "offers 0 models"),
    ("OpenAI offers none of ours", openai("audio"), ["x"], [], "offers none of gpt-4o-mini-tts: set AUDIO_MODEL"),
)
def test_where_none_can_be_chosen_the_operator_reads_the_choices(
    where: ProviderSettings, offered: list[str], gone: list[str], advice: str
) -> None:
    with pytest.raises(OperatorFault, match="set ") as caught:
        choose(where, dict.fromkeys(offered), gone)
    assert advice in caught.value.detail


def test_the_choices_hold_no_name_that_could_forge_a_line_and_not_too_many() -> None:
    odd = ["a\nERROR forged", "b c", "\x1b[2J", "x" * 500, "org/model:7b@q4+x-1.0"]
    with pytest.raises(OperatorFault) as caught:
        choose(server(), dict.fromkeys([*odd, *(f"m{number}" for number in range(100))]))
    names = caught.value.detail.partition("one of: ")[2].split(", ")
    assert names == ["org/model:7b@q4+x-1.0", *(f"m{number}" for number in range(MAX_NAMES - 1))]


@table(
    "is_certain, after_s, is_kept",
    ("from a list: for good", True, 10**9, True),
    ("without a list: for a minute", False, 59, True),
    ("then it is asked for again", False, 60, False),
)
def test_how_long_a_choice_holds(is_certain: bool, after_s: float, is_kept: bool) -> None:
    choices = Choices(clock := Clock())
    choices.keep("server", "text", "m", is_certain=is_certain)
    clock.now += after_s
    assert (choices.get("server", "text") == "m") is is_kept


def test_a_choice_is_that_of_one_server_and_kind() -> None:
    choices = Choices()
    choices.keep("server", "text", "m", is_certain=True)
    assert choices.get("server", "image") is choices.get("another", "text") is None


def test_a_model_that_is_refused_is_not_chosen_for_an_hour() -> None:
    choices = Choices(clock := Clock())
    choices.keep("server", "text", "m", is_certain=True)
    assert choices.drop("server", "text", "m")
    assert (choices.get("server", "text"), choices.gone("server"), choices.gone("another")) == (None, ["m"], [])
    clock.now += 3600
    assert choices.gone("server") == []


def test_a_model_that_was_guessed_without_a_list_may_be_chosen_again() -> None:
    choices = Choices()
    choices.keep("server", "text", "m", is_certain=False)
    assert choices.drop("server", "text", "m")
    assert (choices.get("server", "text"), choices.gone("server")) == (None, [])


def test_a_model_that_the_job_named_is_not_dropped() -> None:
    choices = Choices()
    choices.keep("server", "text", "m", is_certain=True)
    assert not choices.drop("server", "text", "n")
    assert choices.get("server", "text") == "m"


# ── what is wrong with a model in use ────────────────────────────────────────────────────────────────────────────


@table(
    "where, model, offered, today, said",
    ("nothing", server(), "m", {"m": None}, ENDS, ""),
    ("it isn't offered", server(), "m", {"a": None, "b": None}, ENDS, "m isn't among the 2 models that are offered"),
    ("it has ended", server(), "m", {"m": ENDS}, date(2027, 1, 15), "m ended on 2027-01-14: set another TEXT_MODEL"),
    ("it ends today", server(), "m", {"m": ENDS}, ENDS, "m ends on 2027-01-14"),
    ("it ends in 60 days", server(), "m", {"m": ENDS}, date(2026, 11, 15), "m ends on 2027-01-14"),
    ("it ends in 61 days", server(), "m", {"m": ENDS}, date(2026, 11, 14), ""),
    ("the list has no end, but ours has", openai("audio"), "gpt-4o-mini-tts", None, READ_ON, "ends on 2027-01-06"),
    ("of that name elsewhere", server("audio"), "gpt-4o-mini-tts", None, READ_ON, ""),
    ("no list", server(), "m", None, ENDS, ""),
    ("Ollama's name of it", server(), "m", {"m:latest": None}, ENDS, ""),
    ("Gemini's name of it", server(), "m", {"models/m": ENDS}, ENDS, "m ends on 2027-01-14"),
    ("a deployment of Azure", server(url="https://x.openai.azure.com/openai/v1"), "mine", {"gpt": None}, ENDS, ""),
)
def test_what_is_wrong_with_a_model_in_use(
    where: ProviderSettings, model: str, offered: dict[str, date | None] | None, today: date, said: str
) -> None:
    found = remark(where, model, offered, today)
    assert said in found
    assert bool(found) is bool(said)


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


# ── over HTTP ────────────────────────────────────────────────────────────────────────────────────────────────────


def run(where: ProviderSettings, ask: Ask, memory: Memory | None = None) -> Any:
    return answer_of(ask, where, memory=memory)


def texts(where: ProviderSettings, count: int = 1, prompt: str = "Hello") -> Ask:
    """Asks for so many texts at a time, each as a job does. Returns the models of the answers."""

    async def ask(provider: OpenAIProvider) -> list[str]:
        async def one() -> str:
            chosen = await provider.with_model(where)
            messages = [{"role": "user", "content": prompt}]
            return (await provider.text({"model": chosen.model, "messages": messages}, lambda _: None)).model

        return await asyncio.gather(*(one() for _ in range(count)))

    return ask


@pytest.mark.parametrize("job", [(TEXT, {"prompt": "x"}), (IMAGE, {"prompt": "x"}), (AUDIO, {"text": "x"})])
def test_with_a_url_alone_the_servers_only_model_serves(provider: Provider, job: tuple[str, dict[str, str]]) -> None:
    result = generate(*job, serving(provider))
    assert result.output["model_used"] == provider.calls[0].model == "testbed-model"


def test_the_list_is_asked_for_once_for_many_jobs_at_a_time(provider: Provider) -> None:
    where, memory = server(url=provider.url), Memory()
    assert run(where, texts(where, 20), memory) == ["testbed-model"] * 20
    assert run(where, texts(where, 20), memory) == ["testbed-model"] * 20
    assert provider.lists_given == 1


def test_the_choice_is_logged_as_a_line_for_the_settings(provider: Provider, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "worker")
    run(where := server(url=provider.url), texts(where))
    assert caplog.messages == ["TEXT_MODEL=testbed-model was chosen, since it isn't set; put this into .env"]


def test_a_name_that_was_guessed_is_not_put_forward_for_the_settings(
    provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "worker")
    provider.models_fault = "[status 500]"
    run(where := server(url=provider.url), texts(where))
    assert caplog.messages == [f"TEXT_MODEL={TEXTS[0]} is tried: no list of models"]


def test_a_model_that_is_set_needs_no_list(provider: Provider) -> None:
    generate(TEXT, {"prompt": "x"}, serving(provider, text_model="mine"))
    assert (provider.lists_given, provider.calls[0].model) == (0, "mine")


def test_several_models_are_the_operators_fault_and_nothing_is_asked(provider: Provider) -> None:
    provider.models = ("small", "large")
    with pytest.raises(OperatorFault, match="set TEXT_MODEL to one of: small, large") as caught:
        generate(TEXT, {"prompt": "x"}, serving(provider))
    assert caught.value.sentence == NOT_SET_UP
    assert not provider.calls


@pytest.mark.parametrize("fault", ["[status 404]", "[status 500]", "[html]", "[redirect http://x/]", "[gzip 3]"])
def test_where_the_list_cant_be_had_a_job_is_done_all_the_same(provider: Provider, fault: str) -> None:
    provider.models_fault = fault
    run(where := server(url=provider.url), texts(where, 3))
    assert [call.model for call in provider.calls] == [TEXTS[0]] * 3
    assert provider.lists_given == 1


def test_a_list_that_never_comes_is_waited_for_once_and_shortly(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workerkit.provider.MODELS_S", 0.3)
    provider.models_fault = "[hang]"
    began = time.monotonic()
    run(where := server(url=provider.url), texts(where, 5))
    assert time.monotonic() - began < 10
    assert (len(provider.calls), provider.lists_given) == (5, 1)


def test_the_list_is_asked_for_again_after_a_minute_without(provider: Provider) -> None:
    where, memory = server(url=provider.url), Memory(choices=Choices(clock := Clock()))
    provider.models_fault = "[status 500]"
    run(where, texts(where), memory)
    provider.models_fault = ""
    assert run(where, texts(where), memory) == [TEXTS[0]]
    clock.now += 60
    assert run(where, texts(where), memory) == ["testbed-model"]


@pytest.fixture
def as_openai(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> Provider:
    """The provider in OpenAI's place, with all current models."""
    for module in ("provider", "settings"):
        monkeypatch.setattr(f"workerkit.{module}.OPENAI_URL", provider.url)
    provider.models = tuple(TEXTS)
    return provider


def test_a_model_that_is_gone_is_replaced_within_the_attempt(as_openai: Provider) -> None:
    ask, memory = texts(openai(), prompt=f"[gone {TEXTS[0]}]"), Memory()
    assert [run(openai(), ask, memory) for _ in range(2)] == [[TEXTS[1]], [TEXTS[1]]]
    assert [call.model for call in as_openai.calls] == [TEXTS[0], TEXTS[1], TEXTS[1]]


def test_models_that_are_all_gone_cost_three_calls_at_most(as_openai: Provider) -> None:
    with pytest.raises(ModelGone):
        run(openai(), texts(openai(), prompt="[gone *]"))
    assert len(as_openai.calls) == 3


def test_a_model_that_is_set_is_not_replaced_when_it_is_gone(as_openai: Provider) -> None:
    with pytest.raises(FailJob, match="set TEXT_MODEL"):
        run(where := openai(model=TEXTS[0]), texts(where, prompt="[gone *]"))
    assert len(as_openai.calls) == 1


def test_a_refusal_of_a_servers_only_model_costs_that_job_alone(provider: Provider) -> None:
    where, memory = server(url=provider.url), Memory()
    with pytest.raises(ModelGone, match="set TEXT_MODEL"):
        run(where, texts(where, prompt="[gone *]"), memory)
    assert len(provider.calls) == 1
    assert run(where, texts(where), memory) == ["testbed-model"]


def test_a_name_that_was_guessed_while_a_server_was_away_is_replaced_once_it_is_up(provider: Provider) -> None:
    where, memory = server(url=provider.url), Memory()
    provider.models_fault = "[status 500]"
    run(where, texts(where), memory)
    provider.models_fault = ""
    assert run(where, texts(where, prompt=f"[gone {TEXTS[0]}]"), memory) == ["testbed-model"]
    assert [call.model for call in provider.calls] == [TEXTS[0], TEXTS[0], "testbed-model"]


def test_a_name_server_that_hangs_holds_up_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    is_over, answered = threading.Event(), socket.getaddrinfo

    def hang(*arguments: Any, **options: Any) -> Any:
        is_over.wait(60)
        return answered(*arguments, **options)

    monkeypatch.setattr("workerkit.provider.MODELS_S", 0.3)
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        models = models_in_use(bare_settings(openai_base_url="http://server.invalid/v1"))
        assert not is_over.is_set()
        assert [one.where.kind for one in models] == list(KINDS)
    finally:
        is_over.set()


def test_the_models_that_jobs_may_name_are_looked_at_too(provider: Provider) -> None:
    text, *_ = models_in_use(serving(provider, text_models="testbed-model,dear"))
    assert text.fault == "dear isn't among the 1 models that are offered"
