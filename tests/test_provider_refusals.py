"""What a model server's refusal means, whatever its form: causes, named fields, echoes of a prompt, waits, the log.

The bodies are in refusals.txt.
"""

from __future__ import annotations

import html
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.lab import KEY, table
from workerkit import refusals, sentences
from workerkit.errors import InvalidInput, JobError, OperatorFault, ProviderAway, RetryJob
from workerkit.refusals import (
    CAP,
    LATER_CAP,
    TABLE,
    FieldRefused,
    ModelGone,
    Sent,
    Unexplained,
    is_error,
    judge,
    read_refusal,
    seconds_of,
)

PROMPT = "Write a poem about the harbour at night."
PLAIN: dict[str, Any] = {"model": "house-model", "messages": [{"role": "user", "content": PROMPT}]}
REQUESTS: dict[str, dict[str, Any]] = {
    "text": {
        "model": "house-model",
        "messages": [{"role": "system", "content": "Be kind to everyone."}, {"role": "user", "content": PROMPT}],
        **{CAP: 200, "temperature": 0.2, "top_p": 0.5, "stop": ["END"], "seed": 7},
        **{"response_format": {"type": "json_object"}, "reasoning_effort": "low"},
        **{"stream": True, "stream_options": {"include_usage": True}},
    },
    "image": {"model": "house-model", "prompt": PROMPT, "size": "512x512", "quality": "hd", "n": 1},
    "audio": {"model": "house-model", "input": PROMPT, "voice": "sage", "response_format": "mp3", "speed": 1.5},
}


def rows() -> Iterator[tuple[str, str, int, bytes]]:
    """Section, server, status and body of each line of refusals.txt."""
    section = ""
    for line in Path(__file__).with_name("refusals.txt").read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            server, status, body = (part.strip() for part in f"{line} ".split(" | ", 2))
            yield section, server, int(status), body.encode()


def judged(status: int, body: object, request: dict[str, Any] = PLAIN, kind: str = "text", **headers: str) -> JobError:
    """What an answer means for a job; `retry_after` and the like are its headers. Status 0 is an error in a stream."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return judge(read_refusal(status, data if status else json.loads(data)), request, kind, named)


def error(message: object, code: object = None, **more: object) -> dict[str, Any]:
    return {"error": {"message": message, "code": code, **more}}


# ── causes ───────────────────────────────────────────────────────────────────────────────────────────────────────

# What each cause is for the worker, what the person reads, and a part of what the log says.
CAUSES: dict[str, tuple[type[JobError], str, str]] = {
    "content": (InvalidInput, sentences.CONTENT_RULES, "content rules"),
    "long": (InvalidInput, sentences.TOO_LONG, "too long"),
    "money": (OperatorFault, sentences.NOT_SET_UP, "quota or money is used up"),
    "key": (OperatorFault, sentences.NOT_SET_UP, "TEXT_API_KEY or OPENAI_API_KEY"),
    "model": (ModelGone, sentences.NOT_SET_UP, "set TEXT_MODEL to one that it lists"),
    "place": (OperatorFault, sentences.NOT_SET_UP, "is /v1 missing?"),
    "setup": (OperatorFault, sentences.NOT_SET_UP, "the server itself isn't set up"),
    "loading": (ProviderAway, sentences.STARTING, "the model is loading"),
    "busy": (RetryJob, "The AI service is busy", ""),
    "away": (ProviderAway, "The AI service is busy", ""),
    "unknown": (Unexplained, sentences.REFUSED, "the provider's own log may say more"),
}
CAUSE_ROWS = [
    pytest.param(section, status, body, id=f"{section}: {server}")
    for section, server, status, body in rows()
    if section in CAUSES
]
FIELD_ROWS = [
    pytest.param(*section.split(), status, body, id=f"{section}: {server}")
    for section, server, status, body in rows()
    if section not in CAUSES
]


def has_cause(found: JobError, cause: str) -> bool:
    kind, sentence, advice = CAUSES[cause]
    return type(found) is kind and found.sentence == sentence and advice in found.detail


@pytest.mark.parametrize(("cause", "status", "body"), CAUSE_ROWS)
def test_a_refusal_has_the_cause_that_a_reader_would_name(cause: str, status: int, body: bytes) -> None:
    assert has_cause(found := judged(status, body), cause), repr(found)


@pytest.mark.parametrize(("cause", "status", "body"), CAUSE_ROWS)
def test_a_request_of_many_fields_changes_no_cause(cause: str, status: int, body: bytes) -> None:
    found = judged(status, body, REQUESTS["text"])
    if cause == "long":  # a lower cap may leave room for the input
        assert isinstance(found, FieldRefused)
        assert (found.named.name, found.named.is_value) == (CAP, True)
    else:
        assert has_cause(found, cause), repr(found)


@pytest.mark.parametrize(("kind", "name", "part", "status", "body"), FIELD_ROWS)
def test_a_refused_field_is_named_as_it_was_sent(kind: str, name: str, part: str, status: int, body: bytes) -> None:
    found = judged(status, body, REQUESTS[kind], kind)
    assert isinstance(found, FieldRefused), repr(found)
    assert (found.named.name, found.named.is_value) == (name, part == "value")


@pytest.mark.parametrize(("kind", "name", "part", "status", "body"), FIELD_ROWS)
def test_a_field_counts_only_where_it_was_sent(kind: str, name: str, part: str, status: int, body: bytes) -> None:
    found = judged(status, body, PLAIN, kind)
    assert not isinstance(found, FieldRefused), found.named


@pytest.mark.parametrize("name", ["stop", "seed", "stream", "size", "speed", "voice", "format"])
def test_a_common_word_alone_names_no_field(name: str) -> None:
    body = error(f"The worker had to {name} here, for the {name} of its engine was wrong")
    assert type(judged(400, body, {**REQUESTS["audio"], **REQUESTS["image"], **REQUESTS["text"]})) is Unexplained


URL = {"url": "https://pictures.example/cat.png"}
SEEN = {
    **PLAIN,
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": PROMPT}, {"type": "image_url", "image_url": URL}]}
    ],
}


@table(
    "status, body",
    ("llama.cpp", 500, error("image input is not supported - hint: you may need to provide the mmproj")),
    ("a gateway", 400, error("This model does not support image input")),
    ("vLLM", 400, error("house-model is not a multimodal model", type="BadRequestError")),
    ("vLLM, by number", 400, error("At most 0 image(s) may be provided in one prompt.", type="BadRequestError")),
    ("OpenRouter", 404, error("No endpoints found that support image input", 404)),
    ("LiteLLM before it", 404, error("NotFoundError: No endpoints found that support image input. Model Group=x")),
    ("OpenAI", 400, error("Invalid content type. image_url is only supported by certain models.", param="messages")),
    ("DeepSeek", 400, error("messages[0]: unknown variant `image_url`, expected `text` at line 1 column 100")),
    ("Groq", 400, error("messages[0].content must be a string")),
    ("Mistral", 400, error("Image input is not enabled for this model", "3051")),
    ("Ollama", 500, error("this model is missing data required for image input")),
    ("pydantic", 422, {"detail": [{"msg": "Input should be a valid string", "loc": ["body", "messages", 0]}]}),
)  # fmt: skip
def test_pictures_that_a_model_cant_see_are_named(status: int, body: object) -> None:
    found = judged(status, body, SEEN)
    assert isinstance(found, FieldRefused), repr(found)
    assert (found.named.name, found.named.is_value) == ("image_url", False)
    assert not isinstance(judged(status, body), FieldRefused)


@table(
    "body",
    ("OpenAI can't fetch it", error(f"Error while downloading {URL['url']}.", "invalid_value", param="url")),
    ("OpenAI, by code", error("Rejected.", "invalid_image_url")),
    ("OpenAI, its format", error("You uploaded an unsupported image. Please use png or jpeg", "invalid_image_format")),
    ("DashScope", error("<400> InternalError: Failed to download multimodal content", "invalid_parameter_error")),
    ("Anthropic", error("Could not process image")),
    ("Anthropic, its size", error("messages.0.content.1: image exceeds 5 MB maximum: 9 bytes > 5 bytes")),
    ("Pillow in a server", error("cannot identify image file <_io.BytesIO object>")),
    ("vLLM, too many", error("At most 1 image(s) may be provided in one prompt.")),
    ("a host that wants a key", error(f"Failed to fetch {URL['url']}: 401 Unauthorized")),
)
def test_a_picture_that_a_server_cant_use_is_the_persons_to_mend(body: object) -> None:
    found = judged(400, body, SEEN)
    assert isinstance(found, FieldRefused), repr(found)
    assert (found.named.name, found.named.is_value) == ("image_url", True)


@table(
    "cause, status, body",
    ("by its rules", "content", 400, error("Your image was rejected, it is not allowed by our safety system.")),
    ("too long", "long", 400, error("The prompt is too long. Make sure that max_model_len is no smaller than the "
     "number of text tokens plus multimodal tokens. For image inputs their number depends on the aspect ratio.")),
    ("the key", "key", 401, error("Incorrect API key provided")),
    ("a fault of the server", "busy", 500, error("Failed to download image")),
    ("no reason", "unknown", 400, error("no")),
)  # fmt: skip
def test_a_request_with_pictures_is_refused_for_other_reasons_too(cause: str, status: int, body: object) -> None:
    assert has_cause(found := judged(status, body, SEEN), cause), repr(found)


def test_each_kind_of_job_has_its_own_settings_in_the_advice() -> None:
    for kind in ("text", "image", "audio"):
        assert f"{kind.upper()}_MODEL" in judged(404, error("x", "model_not_found"), REQUESTS[kind], kind).detail
        assert f"{kind.upper()}_API_KEY" in judged(401, b"", REQUESTS[kind], kind).detail


def test_the_newer_name_of_the_cap_is_named_where_that_was_sent() -> None:
    found = judged(400, error("Unsupported parameter: 'max_tokens'", param=CAP), {**PLAIN, LATER_CAP: 4296})
    assert isinstance(found, FieldRefused)
    assert found.named.name == LATER_CAP


def test_the_most_characters_that_a_server_takes_are_said_to_the_person() -> None:
    body = error(
        "[{'type': 'string_too_long', 'loc': ('body', 'input'), 'msg': 'should have at most 4096 characters'}]"
    )
    found = judged(400, body, REQUESTS["audio"], "audio")
    assert found.sentence == f"{sentences.TOO_LONG} It takes at most 4096 characters."


@table(
    "status, is_counted",
    ("a server that is loading has done nothing", 503, False),
    ("elsewhere the words mean nothing", 500, True),
)
def test_only_a_model_that_is_loading_costs_no_try(status: int, is_counted: bool) -> None:
    found = judged(status, error("Loading model"))
    assert isinstance(found, RetryJob)
    assert found.is_counted is is_counted


def test_a_proxy_that_wants_a_login_is_no_fault_of_the_key() -> None:
    assert "check the proxy's user and password" in judged(407, b"").detail


# ── shapes ───────────────────────────────────────────────────────────────────────────────────────────────────────

WORDS = "it is overloaded"


@table(
    "body",
    ("an object", {"error": {"message": WORDS}}),
    ("a list", [{"error": {"message": WORDS}}]),
    ("a string", WORDS),
    ("an error that is a string", {"error": WORDS}),
    ("an error that is a list", {"error": [WORDS, 7]}),
    ("without an error", {"message": WORDS, "code": 400}),
    ("capital letters", {"Message": WORDS}),
    ("detail as a string", {"detail": WORDS}),
    ("detail as an object", {"detail": {"msg": WORDS, "type": "busy"}}),
    ("detail as a list", {"detail": [{"loc": ["body"], "msg": WORDS}]}),
    ("errors as a list of strings", {"errors": [WORDS]}),
    ("deeper", {"error": {"metadata": {"upstream": [{"description": WORDS}]}}}),
    ("JSON within a string", {"error": {"message": json.dumps({"error": {"message": WORDS}})}}),
    ("JSON within JSON within a string", {"error": json.dumps({"raw": json.dumps([{"message": WORDS}])})}),
    ("nulls around it", {"error": {"message": WORDS, "code": None, "param": None, "type": None, "details": None}}),
    ("a message that is an object", {"message": {"detail": [{"msg": WORDS}]}}),
)
def test_the_words_of_an_error_are_found_in_any_shape(body: object) -> None:
    assert WORDS in read_refusal(400, json.dumps(body).encode()).messages


@table(
    "body, messages",
    ("plain text", b"try later", ["try later"]),
    ("text with a byte order mark", b"\xef\xbb\xbf try later", ["try later"]),
    ("JSON with a byte order mark", b'\xef\xbb\xbf{"error": "try later"}', ["try later"]),
    ("broken JSON", b'{"error": {"mess', ['{"error": {"mess']),
    ("bytes that aren't UTF-8", b"\xff later", ["\ufffd later"]),
    ("a web page", b"\n<html>try later</html>", []),
    ("nothing", b"", [""]),
    ("a number", b"7", []),
)
def test_whatever_a_body_is_it_is_read(body: bytes, messages: list[str]) -> None:
    assert read_refusal(400, body).messages == messages


@table(
    "body, codes",
    ("code and type", {"error": {"code": "a", "type": "b"}}, {"a", "b"}),
    ("a code within an inner error", {"error": {"innererror": {"code": "c"}}}, {"c"}),
    ("names of other kinds", {"error_type": "a", "err_code": "b", "__type": "c", "status": "d"}, {"a", "b", "c", "d"}),
    ("numbers are none", {"error": {"code": 1301, "type": None}}, set()),
)
def test_the_codes_of_an_error_are_found(body: object, codes: set[str]) -> None:
    assert set(read_refusal(400, body).codes) == codes


@table(
    "status, body, right",
    ("the HTTP status wins", 429, {"error": {"code": 400}}, 429),
    ("the error's own, in a stream", 0, {"error": {"code": 429}}, 429),
    ("as a string", 0, {"error": {"code": "503"}}, 503),
    ("beside the error", 0, {"error": "x", "status_code": 401}, 401),
    ("a number that is none", 0, {"error": {"code": 1301}}, 0),
    ("a long number", 0, {"error": {"code": 10**4000}}, 0),
)
def test_the_status_of_an_error(status: int, body: object, right: int) -> None:
    assert read_refusal(status, body).status == right


@table(
    "body",
    ("a number of faults", {"detail": [{"msg": "no " * 30, "loc": ["body", f"field{n}"]} for n in range(50_000)]}),
    ("a message of megabytes", {"error": {"message": "input " * 2_000_000}}),
    ("many names", {"error": {f"message{n}": "x" * 20 for n in range(200_000)}}),
    ("deep", json.loads("[" * 900 + '"busy"' + "]" * 900)),
    ("nested strings", {"error": json.dumps({"error": json.dumps({"error": json.dumps({"error": "[" * 5000})})})}),
)
def test_a_huge_error_costs_bounded_time_and_words(body: object) -> None:
    began = time.process_time()
    refusal = read_refusal(0, body)
    judge(refusal, REQUESTS["text"], "text", {})
    assert sum(map(len, refusal.messages)) <= refusals.MAX_MESSAGE_CHARACTERS
    assert time.process_time() - began < 5


@table(
    "body", ("brackets", b"[" * 200_000), ("objects", b'{"error":' * 50_000), ("a number without end", b"9" * 200_000)
)
def test_a_body_that_no_parser_takes_is_only_text(body: bytes) -> None:
    assert type(judged(400, body)) is Unexplained


@table(
    "document, is_one",
    ("an error", {"error": {"message": "x"}}, True),
    ("an error that is a string", {"error": "x"}, True),
    ("an error within a choice", {"choices": [{"finish_reason": "error", "error": {"code": 502}}]}, True),
    ("by its object", {"object": "error", "message": "x"}, True),
    ("by its type", {"type": "error"}, True),
    ("a message alone", {"message": "x", "code": 429}, True),
    ("a detail alone", {"detail": "Not authenticated"}, True),
    ("a message of a gateway", {"error_code": 18, "error_msg": "x"}, True),
    ("a chunk", {"choices": [{"delta": {"content": "x"}}]}, False),
    ("a chunk whose error is null", {"choices": [{"delta": {"content": "x"}}], "error": None}, False),
    ("a chunk whose error is empty", {"choices": [], "usage": {"total_tokens": 3}, "error": {}}, False),
    ("a chunk that has a message", {"choices": [{"delta": {"content": "x"}}], "message": "ok"}, False),
    ("figures alone", {"usage": {"total_tokens": 3}, "message": "done"}, False),
    ("a picture", {"data": [{"b64_json": "x"}], "message": "ok"}, False),
    ("a ping", {"type": "ping"}, False),
    ("nothing", {}, False),
    ("a list", [{"error": "x"}], False),
    ("null", None, False),
    ("choices of another kind", {"choices": {"a": 1}}, False),
)
def test_what_an_error_in_an_answer_of_status_200_is(document: object, is_one: bool) -> None:
    assert is_error(document) is is_one


# ── echoes ───────────────────────────────────────────────────────────────────────────────────────────────────────

TRAPS = (
    "Explain insufficient_quota, a wrong API key, content policy, max_tokens, context length exceeded, no such model.",
    "Please write about billing.\nCredentials.\nModeration\nflagged: unauthorized! Or arrears; payment required?",
    "Temperature must be lower, stop isn't supported, unsupported value of top_p; seed is invalid in stream_options.",
    "Müller's billing at the café: “access denied”, prompt is too long & <b>credit balance</b> is too low, says Zoë.",
    "Wait: try again in 500 seconds, retry after 90s, it is still loading, the model is starting, rate limit reached.",
    "system messages must alternate; conversation roles should be valid; response_format is invalid; effort too",
)
BASES: dict[str, Callable[[str], tuple[int, Any]]] = {
    "a rate limit": lambda echo: (429, error(f"Too many requests while handling {echo}", "rate_limit_exceeded")),
    "a code of content rules": lambda echo: (400, error(f"Rejected: {echo}", "content_policy_violation")),
    "words of content rules": lambda echo: (400, error(f"Rejected by our safety system: {echo}")),
    "a long input": lambda echo: (400, error(f"This model's maximum context length is 10 tokens: {echo}")),
    "money": lambda echo: (429, error(f"Stop ({echo})", "insufficient_quota")),
    "a key": lambda echo: (401, error(f"{echo} isn't allowed", "invalid_api_key")),
    "a model": lambda echo: (404, error(f"The model `x` does not exist, says {echo}")),
    "a place": lambda echo: (404, {"detail": f"{echo} Not Found"}),
    "a field": lambda echo: (400, error(f"{echo}: Unsupported parameter: 'temperature'")),
    "nothing known": lambda echo: (400, {"error": f"failed to tokenize: {echo}"}),
    "nothing but the echo": lambda echo: (422, echo.encode()),
    "a fault of the server": lambda echo: (500, error(f"worker died on {echo}", "server_error")),
    "a bad gateway": lambda echo: (503, error(f"no worker for {echo}")),
    "an error in a stream": lambda echo: (0, error(f"terminated at {echo}")),
}
ECHOES: dict[str, Callable[[str], str]] = {
    "whole": str,
    "quoted": repr,
    "in JSON": json.dumps,
    "in HTML": html.escape,
    "in capitals": str.upper,
    "in small letters": str.lower,
    "on one line": lambda text: " ".join(text.split()),
    "on lines of one word": lambda text: "\n".join(text.split()),
    "twice": lambda text: f"{text} / {text}",
}


def fate(body: tuple[int, Any], prompt: str) -> tuple[object, ...]:
    """What becomes of a job of this prompt."""
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": prompt}]
    found = judged(*body, {**REQUESTS["text"], "messages": messages})
    wait_s = found.after_s if isinstance(found, RetryJob) else None
    return type(found), found.sentence, wait_s, found.named.name if isinstance(found, FieldRefused) else ""


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap[:20])
def test_a_prompt_that_a_server_repeats_changes_no_cause(base: str, trap: str) -> None:
    without = fate(BASES[base]("it"), trap)
    changed = [name for name, echo in ECHOES.items() if fate(BASES[base](echo(trap)), trap) != without]
    assert not changed


@examples(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(BASES)), st.sampled_from(TRAPS), st.integers(0, 80), st.integers(40, 120))
def test_a_part_of_a_prompt_that_a_server_repeats_changes_no_cause(base: str, trap: str, start: int, end: int) -> None:
    part = trap[start:end]
    assume(len(part.split()) >= 5)  # of fewer words it can't be told whose they are
    assert fate(BASES[base](f"'{part}…'"), trap) == fate(BASES[base]("it"), trap)


def test_what_a_framework_repeats_of_the_request_is_no_code() -> None:
    schema = {"type": "json_schema", "json_schema": {"reason": "content_filter", "code": "insufficient_quota"}}
    body = {"detail": "no", "body": {"response_format": schema}}
    assert type(judged(422, body, {**PLAIN, "response_format": schema})) is Unexplained


# ── the log ──────────────────────────────────────────────────────────────────────────────────────────────────────


ADVICE = "|".join(re.escape(one.format(kind="TEXT")) for one in refusals.ADVICE.values())
LINE = re.compile(
    r"(HTTP \d{3}|an error in an answer of status 200)(?P<codes>( [\w.-]+)*?)( param (?P<param>\w+))?"
    rf"( \((?P<field>\w+)\)|: ({ADVICE}|{'|'.join(refusals.Cause)}))?"
)


def test_the_log_has_status_codes_field_and_advice_and_nothing_else() -> None:
    for section, server, status, body in rows():
        found = LINE.fullmatch(judged(status, body, REQUESTS["text"]).detail)
        assert found, (section, server)
        assert set(found["codes"].split()) <= set(read_refusal(400, body).codes)
        assert {found["param"], found["field"]} <= {None, "system", *refusals.FIELDS}


@table(
    "code",
    ("a key", KEY),
    ("a key of another form", "sk-proj-a8Bc1dEf2gHi3"),
    ("a forged line", "bad\nERROR forged"),
    ("a sentence", "The harbour at night"),
    ("a word of the prompt", "harbour"),
    ("a very long word", "a" * 65),
    ("a URL", "http://user:pw@host/x"),
    ("the control sequence of a terminal", "\x1b[2J"),
)
def test_a_code_that_is_no_plain_token_is_not_logged(code: str) -> None:
    found = judged(400, error("x", code, type=code, param=code))
    assert found.detail.removeprefix("HTTP 400: ") == refusals.ADVICE[refusals.Cause.UNKNOWN]


@pytest.mark.parametrize("code", ["about_the_harbour", "About.The.Harbour", "aboutTheHarbour", "THEHARBOURATNIGHT"])
def test_a_code_that_joins_words_of_the_prompt_is_not_logged(code: str) -> None:
    assert code not in judged(400, error("x", code)).detail


def test_a_code_that_is_the_key_is_not_logged() -> None:
    refusal = read_refusal(400, error("x", "house_key_of_letters"))
    assert "house" not in judge(refusal, PLAIN, "text", {}, "house_key_of_letters").detail


def test_codes_are_logged_for_the_operator() -> None:
    found = judged(400, error("x", "odd_state", type="BadRequestError", param="messages[0].content"))
    assert found.detail.startswith("HTTP 400 odd_state BadRequestError param messages:")


@examples(max_examples=200, deadline=None)
@given(st.text(max_size=300), st.sampled_from([0, 400, 401, 403, 404, 413, 422, 429, 500, 503]))
def test_no_word_of_a_message_reaches_person_or_log(message: str, status: int) -> None:
    planted = f"{message} zanzibar {message}"
    found = judged(status, error(planted), REQUESTS["text"])
    assert "zanzibar" not in found.detail + found.sentence


# ── waits ────────────────────────────────────────────────────────────────────────────────────────────────────────


def wait_of(body: object, **headers: Any) -> float | None:
    found = judged(429, body, **headers)
    assert isinstance(found, RetryJob)
    return found.after_s


NOW = 1_764_266_400.0
LATER, PAST = formatdate(NOW + 90, usegmt=True), formatdate(NOW - 90, usegmt=True)


@table(
    "headers, wait_s",
    ("seconds", {"retry_after": "7"}, 7),
    ("parts of a second", {"retry_after": "7.5"}, 7.5),
    ("blanks around it", {"retry_after": " 7 "}, 7),
    ("a Go duration", {"retry_after": "1m2.5s"}, 62.5),
    ("milliseconds", {"retry_after_ms": "30000"}, 30),
    ("milliseconds first", {"retry_after": "7", "retry_after_ms": "2500"}, 2.5),
    ("seconds, where the milliseconds are none", {"retry_after": "7", "retry_after_ms": "soon"}, 7),
    ("a date, by the server's own clock", {"retry_after": LATER, "date": formatdate(NOW, usegmt=True)}, 90),
    ("a date of the older form", {"retry_after": "Sun Nov  6 08:49:37 1994"}, 1),
    ("a date in the past", {"retry_after": PAST}, 1),
    ("a date far ahead", {"retry_after": "Fri, 31 Dec 9999 23:59:59 GMT"}, 30 * 86_400),
    ("at once", {"retry_after": "0"}, 1),
    ("less than a second", {"retry_after_ms": "1"}, 1),
    ("for ever", {"retry_after": "99999999999999"}, 30 * 86_400),
    ("a number without end", {"retry_after": "9" * 400}, None),
    ("garbage", {"retry_after": "soon"}, None),
    ("infinite", {"retry_after": "inf"}, None),
    ("not a number", {"retry_after": "nan"}, None),
    ("negative", {"retry_after": "-5"}, None),
    ("a date that is none", {"retry_after": "Mon, 99 Foo 2026 99:99:99 GMT"}, None),
    ("nothing", {"retry_after": ""}, None),
)
def test_a_header_says_how_long_to_wait(headers: dict[str, str], wait_s: float | None) -> None:
    assert wait_of(error("slow down"), **headers) == wait_s


@table(
    "body, wait_s",
    (
        "Gemini",
        [{"error": {"message": "x", "details": [{"@type": "RetryInfo", "retryDelay": "57.238747106s"}]}}],
        57.238747106,
    ),
    ("Hugging Face", {"error": "x", "estimated_time": 20.5}, 20.5),
    ("a number beside the error", error("x", retry_after=12), 12),
    ("OpenAI", error("Rate limit reached. Please try again in 4s. Visit the site."), 4),
    ("OpenAI, milliseconds", error("Please try again in 1200ms."), 1.2),
    ("Groq", error("Please try again in 1m2.5s. Need more?"), 62.5),
    ("Groq, hours", error("Please try again in 1h16m0.667s."), 4560.667),
    ("Azure", error("Please retry after 26 seconds."), 26),
    ("Azure, a day", error("Please retry after 86,400 seconds."), 86_400),
    ("GitHub", error("Please wait 42 seconds before retrying."), 42),
    ("in words", error("Try again in 1 minute, 30 seconds"), 90),
    ("months are no minutes", error("try again in 5 months"), None),
    ("no number", error("try again in a few moments"), None),
    ("two points", error("try again in 1.2.3s"), None),
    ("infinite", b'{"error": {"message": "x", "retryDelay": Infinity}}', None),
    ("not a number", b'{"error": {"message": "x", "retry_after": NaN}}', None),
    ("true", error("x", retry_after=True), None),
    ("a list", error("x", retry_after=[]), None),
)
def test_an_error_says_how_long_to_wait(body: object, wait_s: float | None) -> None:
    assert wait_of(body) == wait_s


@pytest.mark.parametrize("name", ["retry_after", "date"])
@pytest.mark.parametrize("odd", ["+99999999999999999999", "-9999999999999999999999999"])
def test_a_date_that_no_clock_has_asks_for_no_wait(name: str, odd: str) -> None:
    dates = {"retry_after": PAST, "date": PAST, name: f"Mon, 01 Jan 2027 00:00:00 {odd}"}
    assert wait_of(error("slow down"), **dates) in (None, refusals.MIN_WAIT_S)


def test_a_header_wins_over_the_words_of_an_error() -> None:
    assert wait_of(error("try again in 90s", retryDelay="60s"), retry_after="7") == 7


@examples(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60), st.text(max_size=60))
def test_whatever_headers_say_a_wait_is_none_or_within_its_bounds(after: str, in_ms: str, date: str) -> None:
    wait_s = wait_of(error("slow down"), retry_after=after, retry_after_ms=in_ms, date=date)
    assert wait_s is None or refusals.MIN_WAIT_S <= wait_s <= refusals.MAX_WAIT_S


# ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

ADVERSARIES = (
    "a", "input ", "tokens ", "exceeds ", "model ", "model not ", "retry in 1ms", "1ms", "1m", "retry " * 3 + " ",
    "content ", "reduce a b c d e ", "quota insufficient ", "'", "max_tokens must ", "stop a b c ", "AaBbCcDd", "Aa",
    "exceed token ", "must a ", "system role a b ", "1,000,", "&amp;", "\\u0041", "\\\\n", "x.1", ". ", "|", "\n", " ",
)  # fmt: skip
PATTERNS = {
    **{f"{one.cause}, row {number}": one.words for number, one in enumerate(TABLE)},
    **{name: value for name, value in vars(refusals).items() if isinstance(value, re.Pattern)},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_patterns_time_is_bounded_whatever_the_message(name: str) -> None:
    began = time.process_time()
    for word in ADVERSARIES:
        text = word * (refusals.MAX_MESSAGE_CHARACTERS // len(word)) + "!"
        PATTERNS[name].search(text)
        PATTERNS[name].fullmatch(text)
    assert time.process_time() - began < 3


@pytest.mark.parametrize("word", ADVERSARIES)
def test_an_adversarial_message_is_judged_at_once(word: str) -> None:
    text = word * (refusals.MAX_MESSAGE_CHARACTERS // len(word)) + "!"
    began = time.process_time()
    for status in (0, 400, 503):
        judged(status, error(text, text[:2000], retryDelay=text), REQUESTS["text"], retry_after=text)
    assert time.process_time() - began < 3


@table(
    "prompt, message",
    ("one word again and again", "word " * 20_000, "word word xword " * 1250),
    ("many words behind the same two", " ".join(f"a b w{n}" for n in range(10_000)), "a b z " * 3300),
    ("many words before the same two", " ".join(f"w{n} a b" for n in range(10_000)), "z a b " * 3300),
)
def test_each_word_of_a_long_message_is_compared_with_few_words_of_a_long_prompt(prompt: str, message: str) -> None:
    sent, calls = Sent({"model": "m", "prompt": prompt}), Counter[str]()
    sys.setprofile(lambda frame, event, argument: calls.update([event]))
    try:
        sent.cut(message)
    finally:
        sys.setprofile(None)
    assert calls.total() < 20 * refusals.MAX_CUT_WORDS * len(message.split())


def test_a_long_wait_in_a_header_is_read_at_once() -> None:
    began = time.process_time()
    assert seconds_of("1ms" * 5000 + "!") is None
    assert time.process_time() - began < 5
