"""What a refusal of a model server means: one table, for bodies as real servers send them in 2024 to 2026."""

from __future__ import annotations

import html
import json
import time
from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lab import KEY, SECRET, table
from workerkit import sentences
from workerkit.errors import FailJob, InvalidInput, JobError, OperatorFault, ProviderAway, RetryJob
from workerkit.refusals import (
    MAX_WAIT_S,
    Cause,
    FieldRefused,
    ModelGone,
    Unexplained,
    by_status,
    is_error,
    judge,
    read_refusal,
    wait_asked_for,
)

REQUEST: dict[str, Any] = {
    "model": "some-model",
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Tell me a story about rivers."},
    ],
    "max_tokens": 200,
    "temperature": 0.3,
    "top_p": 0.9,
    "stop": ["END"],
    "seed": 7,
    "response_format": {"type": "json_object"},
    "stream": True,
    "stream_options": {"include_usage": True},
    "reasoning_effort": "low",
}
PICTURE = {"model": "some-model", "prompt": "A quiet harbour", "size": "512x512", "quality": "standard"}
SOUND = {"model": "some-model", "input": "Good morning", "voice": "zelda", "response_format": "mp3", "speed": 2}
WITHOUT_CAP = {name: value for name, value in REQUEST.items() if name != "max_tokens"}


def openai(message: str, code: object = None, param: object = None, kind: object = "invalid_request_error") -> Any:
    """A body in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def flat(message: object, kind: str = "BadRequestError", code: object = 400, **more: object) -> Any:
    """A body as vLLM and SGLang send it: without a wrapper."""
    return {"object": "error", "message": message, "type": kind, "param": None, "code": code, **more}


def forbidden(*path: str) -> Any:
    return {"type": "extra_forbidden", "loc": ["body", *path], "msg": "Extra inputs are not permitted", "input": True}


def judged(status: int, body: Any, request: dict[str, Any] | None = None, **headers: str) -> JobError:
    raw = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return judge(read_refusal(status, raw), request or REQUEST, "text", named)


MEANINGS: tuple[tuple[type[JobError], str], ...] = (
    (ModelGone, "model"),
    (Unexplained, "unexplained"),
    (OperatorFault, "operator"),
)


def meaning(error: JobError) -> str:
    """Whom the error concerns, in one word; for a field its name."""
    if isinstance(error, FieldRefused):
        return error.named.name
    if isinstance(error, InvalidInput):
        is_content = error.sentence == sentences.CONTENT_RULES
        assert is_content or error.sentence.startswith(sentences.TOO_LONG)
        return "content" if is_content else "too long"
    if isinstance(error, RetryJob):
        is_starting = isinstance(error, ProviderAway) and error.sentence == sentences.STARTING
        assert is_starting is not error.is_counted
        return "starting" if is_starting else "busy"
    return next(word for kind, word in MEANINGS if isinstance(error, kind))


# ── content rules ────────────────────────────────────────────────────────────────────────────────────────────────

SAFETY = "Your request was rejected by the safety system. If you believe this is an error, contact us. "
AZURE_FILTER = "The response was filtered due to the prompt triggering Azure OpenAI's content management policy."


@table(
    "status, body",
    ("OpenAI, pictures", 400, openai(SAFETY + "safety_violations=[sexual].", "moderation_blocked")),
    ("OpenAI, older", 400, openai("Rejected as a result of our safety system.", "content_policy_violation")),
    ("OpenAI, flagged", 400, openai("Your prompt was flagged as violating our usage policy.", "invalid_prompt")),
    ("Azure", 400, openai(AZURE_FILTER, "content_filter", "prompt", None)),
    ("Azure, inner code", 400, {"error": {"message": "x", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}),
    ("Azure, blocked", 403, openai("Temporarily blocked, since it may violate our content policy.", "Forbidden")),
    ("xAI, 403", 403, {"code": "x", "error": "Content violates usage guidelines. Failed check: SAFETY_CHECK_TYPE_BIO"}),
    ("xAI, 400", 400, {"code": "Client specified an invalid argument", "error": "Content violates usage guidelines."}),
    ("DeepSeek", 400, openai("Content Exists Risk", "invalid_request_error")),
    (
        "OpenRouter",
        403,
        {"error": {"code": 403, "message": "Input was flagged", "metadata": {"reasons": ["violence"]}}},
    ),
    ("Anthropic", 400, {"type": "error", "error": {"message": "Output blocked by content filtering policy"}}),
    ("Qwen", 400, openai("Input data may contain inappropriate content.", "data_inspection_failed")),
    ("GLM", 400, {"error": {"code": "1301", "message": "系统检测到输入或生成内容可能包含不安全或敏感内容"}}),
    ("the law", 451, "Unavailable for legal reasons"),
)
def test_content_rules_are_the_persons(status: int, body: Any) -> None:
    assert meaning(judged(status, body)) == "content"


# ── too long ─────────────────────────────────────────────────────────────────────────────────────────────────────

VLLM_OLD = "This model's maximum context length is 4096 tokens. However, your messages resulted in 5000 tokens."
MIDDLE_OUT = "This endpoint's maximum context length is 131072 tokens. However, you requested about 148000 tokens."
RAW = json.dumps({"type": "error", "error": {"message": "prompt is too long: 213456 tokens > 200000 maximum"}})


@table(
    "status, body",
    ("OpenAI", 400, openai(VLLM_OLD, "context_length_exceeded", "messages")),
    ("OpenAI, newer", 400, openai("Your input exceeds the context window of this model.", "context_length_exceeded")),
    ("OpenAI, characters", 400, openai("Invalid 'messages[0].content': string too long.", "string_above_max_length")),
    ("Azure", 400, openai("Input tokens exceed the configured limit of 272000 tokens.")),
    ("Anthropic", 400, {"type": "error", "error": {"message": "prompt is too long: 213456 tokens > 200000 maximum"}}),
    ("Anthropic, bytes", 413, {"error": {"type": "request_too_large", "message": "Request exceeds the maximum."}}),
    ("OpenRouter", 400, openai(MIDDLE_OUT)),
    ("OpenRouter, only within", 400, {"error": {"message": "Provider returned error", "metadata": {"raw": RAW}}}),
    (
        "Gemini",
        400,
        [openai("The input token count (1100000) exceeds the maximum number of tokens allowed (1048576).")],
    ),
    ("Mistral", 400, openai("Prompt contains 140000 tokens, too large for model with 128000 maximum context length")),
    ("xAI", 400, {"error": "This model's maximum prompt length is 131072 but the request contains 150000 tokens."}),
    ("Groq", 413, openai("Request too large for model on tokens per minute (TPM): Limit 6000, Requested 14368", "x")),
    ("OpenAI, for a minute's tokens", 429, openai("Request too large for gpt-x: Limit 10000, Requested 15000.")),
    ("Moonshot", 400, openai("Invalid request: Your request exceeded model token limit: 8192")),
    ("DashScope", 400, openai("<400> InternalError: Range of input length should be [1, 129024]")),
    ("MiniMax", 400, openai("context window exceeds limit (2013)")),
    ("Cohere", 400, {"message": "too many tokens: size limit exceeded by 12345 tokens"}),
    ("vLLM", 400, flat(VLLM_OLD)),
    ("vLLM, decoder", 400, flat("The decoder prompt (length 10127) is longer than the maximum model length of 8192.")),
    ("SGLang", 400, flat("The input (61709 tokens) is longer than the model's context length (40960 tokens).")),
    ("llama.cpp", 400, {"error": {"code": 400, "message": "x", "type": "exceed_context_size_error"}}),
    ("LM Studio", 400, {"error": "the model is loaded with context length of only 4096 tokens, which is not enough."}),
    ("Ollama", 400, openai("the prompt is longer than the context length currently available to the model")),
    ("TGI", 422, {"error": "Input validation error: `inputs` must have less than 4096 tokens. Given: 5000"}),
    ("nginx", 413, "<html><head><title>413 Request Entity Too Large</title></head></html>"),
)
def test_a_prompt_that_is_too_long_is_the_persons(status: int, body: Any) -> None:
    assert meaning(judged(status, body, WITHOUT_CAP)) == "too long"


def test_the_most_characters_that_a_server_takes_are_said() -> None:
    message = (
        "[{'type': 'string_too_long', 'loc': ('body', 'input'), 'msg': 'String should have at most 4096 characters'}]"
    )
    assert judged(400, openai(message), SOUND).sentence.endswith("It takes at most 4096 characters.")


def test_a_context_that_the_cap_overruns_is_about_the_cap() -> None:
    assert meaning(judged(400, flat(VLLM_OLD))) == "max_tokens"


# ── the operator's: money, keys, models, URLs ────────────────────────────────────────────────────────────────────

QUOTA = "You exceeded your current quota, please check your plan and billing details."


@table(
    "status, body",
    ("OpenAI", 429, openai(QUOTA, "insufficient_quota", kind="insufficient_quota")),
    ("OpenAI, newer", 429, openai("You have no credits.", "credit_balance_exhausted", kind="insufficient_quota")),
    ("OpenAI, hard limit", 400, openai("Billing hard limit has been reached", "billing_hard_limit_reached")),
    ("Anthropic", 400, {"error": {"message": "Your credit balance is too low to access the Anthropic API."}}),
    ("DeepSeek", 402, openai("Insufficient Balance", "invalid_request_error", kind="unknown_error")),
    ("OpenRouter", 402, openai("This request requires more credits, or fewer max_tokens.", 402)),
    ("Moonshot", 429, openai("Your account is suspended due to insufficient balance", None, kind="x")),
    ("Perplexity", 401, openai(QUOTA, 401, kind="insufficient_quota")),
    ("LiteLLM", 400, openai("Budget has been exceeded! Current cost: 50.04, Max budget: 50.0")),
    ("GLM", 429, {"error": {"code": "1113", "message": "您的账户余额不足"}}),
    ("no words", 402, ""),
)
def test_quota_and_money_are_the_operators_and_no_busy(status: int, body: Any) -> None:
    error = judged(status, body)
    assert (meaning(error), error.sentence) == ("operator", sentences.NOT_SET_UP)
    assert "check its plan and billing" in error.detail


def test_openais_quota_is_money_even_with_a_wait() -> None:
    assert meaning(judged(429, openai(QUOTA, "insufficient_quota"), retry_after="20")) == "operator"


def test_geminis_quota_of_a_minute_is_a_wait() -> None:
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "57.2s"}]
    error = judged(429, [{"error": {"message": QUOTA, "status": "RESOURCE_EXHAUSTED", "details": details}}])
    assert isinstance(error, RetryJob)
    assert error.after_s == 57.2


LITELLM_KEY = openai("No connected db.", "400", kind="no_db_connection")


@table(
    "status, body",
    ("OpenAI", 401, openai("Incorrect API key provided.", "invalid_api_key")),
    ("DeepSeek", 401, openai("Authentication Fails", "invalid_request_error", kind="authentication_error")),
    ("Anthropic", 401, {"type": "error", "error": {"type": "authentication_error", "message": "invalid x-api-key"}}),
    ("Gemini", 400, [{"error": {"message": "API key not valid.", "status": "INVALID_ARGUMENT"}}]),
    ("xAI", 400, {"code": "invalid-argument", "error": "Incorrect API key provided."}),
    ("Mistral", 401, {"detail": "Invalid API Key"}),
    ("Azure", 401, openai("Access denied due to invalid subscription key or wrong API endpoint.", "401")),
    ("speaches", 403, {"detail": "Invalid API key. The provided API key is incorrect."}),
    ("TGI", 401, b""),
    ("LiteLLM", 400, LITELLM_KEY),
    ("OpenAI, country", 403, openai("Country not supported", "unsupported_country_region_territory")),
    ("Gemini, country", 400, [{"error": {"message": "User location is not supported for the API use."}}]),
    ("a firewall", 403, "<!DOCTYPE html><title>Attention Required! | Cloudflare</title>"),
)
def test_a_refused_key_is_the_operators(status: int, body: Any) -> None:
    error = judged(status, body)
    assert (meaning(error), error.sentence) == ("operator", sentences.NOT_SET_UP)
    assert "TEXT_API_KEY" in error.detail


@table(
    "status, body",
    (
        "OpenAI",
        404,
        openai("The model `some-model` does not exist or you do not have access to it.", "model_not_found"),
    ),
    ("Azure", 404, openai("The API deployment for this resource does not exist.", "DeploymentNotFound")),
    ("OpenRouter", 400, openai("openai/gpt-oss-90b is not a valid model ID", 400)),
    ("OpenRouter, endpoints", 404, openai("No endpoints found for qwen/dead:free", 404)),
    ("Groq", 400, openai("The model `x` has been decommissioned and is no longer supported.", "model_decommissioned")),
    ("Mistral", 400, flat("Invalid model: codestral-mamba-latest", "invalid_model", "1500")),
    ("Gemini", 404, [openai("models/gemini-x is not found for API version v1beta")]),
    ("Ollama", 404, openai('model "llama3.2" not found, try pulling it first', kind="api_error")),
    ("LocalAI", 404, {"error": {"message": 'model "x" not found. To see available models, call GET /v1/models'}}),
    ("Kokoro-FastAPI", 400, {"detail": {"error": "invalid_model", "message": "Unsupported model: gpt-4o-mini-tts"}}),
    ("openedai-speech", 400, {"message": "No such model, must be tts-1 or tts-1-hd.", "code": 400, "param": "model"}),
    ("speaches", 404, {"detail": "Model 'tts-1' is not installed locally."}),
    ("LiteLLM", 400, openai("/chat/completions: Invalid model name passed in model=nosuch.", "400")),
    ("LiteLLM, in a string", 400, openai("400: {'error': '/image/generations: Invalid model name passed in model=x'}")),
    ("DeepSeek", 400, openai("Model Not Exist", "invalid_request_error")),
)
def test_a_model_that_is_not_offered_is_the_operators(status: int, body: Any) -> None:
    error = judged(status, body)
    assert isinstance(error, OperatorFault)
    assert error.sentence == sentences.NOT_SET_UP
    assert "TEXT_MODEL" in error.detail


@table(
    "status, body",
    ("llama.cpp", 404, openai("File Not Found", kind="not_found_error")),
    ("FastAPI", 404, {"detail": "Not Found"}),
    ("a static site", 405, "<html>Not Allowed</html>"),
    ("text", 404, "404 page not found"),
)
def test_a_wrong_url_is_the_operators(status: int, body: Any) -> None:
    error = judged(status, body)
    assert meaning(error) == "operator"
    assert "is /v1 missing?" in error.detail


@table(
    "body",
    (
        "a speech server",
        {"error": {"message": "No default voice is configured for the API.", "code": "no_default_voice"}},
    ),
    ("an engine", {"error": {"message": "The engine is not installed.", "code": "engine_not_installed"}}),
)
def test_a_server_that_is_not_set_up_itself_is_neither_busy_nor_loading(body: Any) -> None:
    assert meaning(judged(503, body)) == "operator"


# ── busy and loading ─────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "status, body",
    ("llama.cpp", 503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}),
    ("Hugging Face", 503, {"error": "Model x is currently loading", "estimated_time": 20.0}),
    ("a gateway", 503, "The model is still warming up"),
    ("not ready", 503, {"detail": "Model is not ready yet"}),
)
def test_a_server_that_loads_its_model_costs_no_try(status: int, body: Any) -> None:
    assert meaning(judged(status, body)) == "starting"


@table(
    "status, body",
    ("rate limit", 429, openai("Rate limit reached for gpt-x on tokens per min (TPM)", "rate_limit_exceeded")),
    ("Bedrock", 429, {"message": "Too many tokens, please wait before trying again."}),
    ("Azure", 429, openai("Requests have exceeded call rate limit. See https://aka.ms/oai/quotaincrease.", "429")),
    ("overloaded", 529, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}),
    ("a bare 503", 503, "Service Unavailable"),
    ("Cloudflare", 524, "<!DOCTYPE html><title>524: A timeout occurred</title>"),
    ("TGI", 424, {"error": "Incomplete generation", "error_type": "incomplete_generation"}),
    ("slow", 408, ""),
    ("Groq", 498, ""),
    ("internal", 500, openai("The server had an error", kind="server_error")),
)
def test_a_busy_server_is_asked_again_and_counted(status: int, body: Any) -> None:
    assert meaning(judged(status, body)) == "busy"


# ── named fields ─────────────────────────────────────────────────────────────────────────────────────────────────

NEWER_NAME = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)
VERIFIED = "Your organization must be verified to stream this model. Please go to the settings and click on Verify."
LITERAL = (
    "1 validation error:\n {'type': 'literal_error', 'loc': ('body', 'reasoning_effort'), 'msg': 'Input should be x'}"
)
VOICES = "[{'type': 'enum', 'loc': ('body', 'voice'), 'msg': \"Input should be 'nova' or 'alloy'\", 'input': 'zelda'}]"


@table(
    "status, body, sent, name",
    ("OpenAI, cap", 400, openai(NEWER_NAME, "unsupported_parameter", "max_tokens"), REQUEST, "max_tokens"),
    ("a gateway, cap", 400, openai(NEWER_NAME), REQUEST, "max_tokens"),
    ("Groq, cap", 400, openai("`max_completion_tokens` must be less than or equal to `100`"), REQUEST, "max_tokens"),
    ("Anthropic, cap", 400, openai("max_tokens: 64000 > 32000, the maximum of output tokens"), REQUEST, "max_tokens"),
    ("OpenAI, temperature", 400, openai("x", "unsupported_value", "temperature"), REQUEST, "temperature"),
    ("Anthropic, temperature", 400, openai("`temperature` is deprecated for this model."), REQUEST, "temperature"),
    ("Groq, temperature", 400, openai("'temperature' : number must be at most 2"), REQUEST, "temperature"),
    ("Moonshot", 400, openai("field Temperature invalid, only 1 is allowed for this model"), REQUEST, "temperature"),
    ("TGI, top_p", 422, {"error": "Input validation error: `top_p` must be > 0.0 and < 1.0"}, REQUEST, "top_p"),
    (
        "OpenAI, top_p",
        400,
        openai("Unsupported parameter: 'top_p' is not supported with this model."),
        REQUEST,
        "top_p",
    ),
    ("xAI, stop", 400, {"error": "Argument not supported on this model: stop"}, REQUEST, "stop"),
    ("xAI, newer", 400, {"error": "Model grok does not support parameter stop."}, REQUEST, "stop"),
    ("LiteLLM, stop", 400, openai("stop: Extra inputs are not permitted"), REQUEST, "stop"),
    (
        "Gemini, seed",
        400,
        [openai('Invalid JSON payload received. Unknown name "seed": Cannot find field.')],
        REQUEST,
        "seed",
    ),
    ("older OpenAI", 400, openai("Unrecognized request argument supplied: seed"), REQUEST, "seed"),
    ("LM Studio", 400, {"error": "'response_format.type' must be 'json_schema' or 'text'"}, REQUEST, "response_format"),
    ("OpenAI, stream", 400, openai(VERIFIED, "unsupported_value", "stream"), REQUEST, "stream"),
    (
        "Mistral, an object",
        422,
        flat({"detail": [forbidden("stream_options", "include_usage")]}),
        REQUEST,
        "stream_options",
    ),
    ("Mistral, a string", 422, flat(json.dumps({"detail": [forbidden("seed")]})), REQUEST, "seed"),
    ("Mistral, a list", 422, {"object": "Error", "message": [forbidden("seed")], "code": 3001}, REQUEST, "seed"),
    ("FastAPI", 422, {"detail": [{"loc": ["body", "stop"], "msg": "Input should be a valid list"}]}, REQUEST, "stop"),
    ("Azure AI", 400, openai("Extra parameters ['stream_options'] are not allowed"), REQUEST, "stream_options"),
    ("SGLang", 400, flat(LITERAL, "Bad Request"), REQUEST, "reasoning_effort"),
    (
        "xAI, effort",
        400,
        {"error": "This model does not support `reasoning_effort` value `low`."},
        REQUEST,
        "reasoning_effort",
    ),
    ("vLLM, a template", 400, flat("System role not supported"), REQUEST, "system"),
    ("roles", 400, flat("Conversation roles must alternate user/assistant/user/assistant/..."), REQUEST, "messages"),
    ("OpenAI, size", 400, openai("Invalid value: '512x512'.", "invalid_value", "size"), PICTURE, "size"),
    ("xAI, size", 400, {"code": "400", "error": "Argument not supported: size"}, PICTURE, "size"),
    ("gpt-image-2", 400, openai("Invalid size '512x512'. Width must be divisible by 16."), PICTURE, "size"),
    ("a picture model", 400, openai("The model 'x' does not support the 'quality' parameter."), PICTURE, "quality"),
    ("OpenAI, voice", 400, openai(VOICES), SOUND, "voice"),
    (
        "Kokoro-FastAPI",
        400,
        {"detail": {"error": "validation_error", "message": "Voice 'zelda' not found."}},
        SOUND,
        "voice",
    ),
    ("Groq, sounds", 400, openai("response_format must be one of [wav]"), SOUND, "response_format"),
    ("another word", 400, {"detail": "Unsupported format: mp3. Supported formats are: wav"}, SOUND, "response_format"),
    (
        "speed",
        422,
        {"detail": [{"loc": ["body", "speed"], "msg": "Input should be less than or equal to 1"}]},
        SOUND,
        "speed",
    ),
)
def test_a_field_that_was_sent_is_found(status: int, body: Any, sent: dict[str, Any], name: str) -> None:
    assert meaning(judged(status, body, sent)) == name


def test_a_field_that_was_not_sent_doesnt_count() -> None:
    body = openai("Unsupported parameter: 'seed'", "unsupported_parameter", "seed")
    assert meaning(judged(400, body, PICTURE)) == "unexplained"


@table("name", *[(name, name) for name in ("stop", "seed", "stream", "size", "speed")])
def test_a_common_word_alone_names_no_field(name: str) -> None:
    body = openai(f"The worker had to {name} here, for the {name} of its engine was wrong")
    assert meaning(judged(400, body, {**REQUEST, **PICTURE, **SOUND})) == "unexplained"


# ── what fits nothing ────────────────────────────────────────────────────────────────────────────────────────────


@table(
    "status, body",
    ("no reason", 400, openai("litellm.BadRequestError: …", "400")),
    ("another status", 418, "I'm a teapot"),
    ("no JSON", 400, "Bad Request"),
    ("a broken body", 400, b'{"error": {"mess'),
    ("no text", 422, b"\xff\xfe\xfd"),
    ("deep", 400, b"[" * 100_000),
    ("a list of words", 400, {"error": ["x", "y"]}),
)
def test_what_fits_nothing_blames_nobody(status: int, body: Any) -> None:
    error = judged(status, body)
    assert isinstance(error, Unexplained)
    assert error.sentence == "The provider refused this request."
    assert f"HTTP {status}" in error.detail


@table("status, cause", ("redirect", 302, Cause.PLACE), ("a login", 407, Cause.KEY), ("away", 502, Cause.BUSY))
def test_a_status_alone_has_a_meaning(status: int, cause: Cause) -> None:
    assert by_status(status) is cause


# ── errors in answers of status 200 ──────────────────────────────────────────────────────────────────────────────


@table(
    "document, is_one",
    ("an object", {"error": {"code": 429}}, True),
    ("a text", {"error": "model runner has stopped"}, True),
    ("vLLM's", flat("EngineCore died", "InternalServerError", 500), True),
    ("Anthropic's", {"type": "error", "error": {"type": "overloaded_error"}}, True),
    ("in a choice", {"choices": [{"error": {"code": 502}, "delta": {}}]}, True),
    ("a detail", {"detail": "no worker"}, True),
    ("a null", {"error": None, "choices": [{"delta": {"content": "x"}}]}, False),
    ("an event", {"object": "chat.completion.chunk", "choices": []}, False),
    ("usage", {"usage": {"total_tokens": 3}, "message": "x"}, False),
    ("a list", [1], False),
)
def test_an_object_is_an_error_or_part_of_an_answer(document: Any, is_one: bool) -> None:
    assert is_error(document) is is_one


@table(
    "document, means",
    ("its code is a status", {"error": {"code": 429, "message": "Rate limit exceeded"}}, "busy"),
    ("too long", {"error": {"code": 400, "type": "exceed_context_size_error"}}, "too long"),
    ("a status as text", {"error": {"code": "503", "message": "Loading model"}}, "starting"),
    ("the request is bad", {"error": {"type": "invalid_request_error", "message": "hm"}}, "unexplained"),
    ("only words", {"error": "model runner has unexpectedly stopped"}, "busy"),
    ("content rules", {"error": {"message": "blocked by our content policy"}}, "content"),
)
def test_an_error_within_an_answer_means_what_its_own_status_would(document: Any, means: str) -> None:
    assert meaning(judge(read_refusal(0, document), WITHOUT_CAP, "text", {})) == means


# ── echoes ───────────────────────────────────────────────────────────────────────────────────────────────────────

TRAPS = (
    "Explain insufficient_quota and why the API key is invalid, please",
    "What does 'This model's maximum context length is 4096 tokens' mean?",
    "Write about content policy, moderation, and flagged prompts",
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
    "The model does not exist, loading model, try again in 20s",
    "quota",
)
REFUSALS = (
    (400, "Invalid request ({}): something else"),
    (400, "could not parse «{}»"),
    (429, "Slow down. You sent: {}"),
    (401, "Incorrect key for {}"),
    (500, "crashed on {}"),
)


def echoing(status: int, template: str, said: str, trap: str) -> str:
    request = {"model": "m", "messages": [{"role": "user", "content": trap}], "max_tokens": 9, "stream": True}
    return meaning(judged(status, openai(template.format(said)), request))


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize(("status", "template"), REFUSALS)
def test_a_prompt_that_is_repeated_changes_no_class(status: int, template: str, trap: str) -> None:
    assert echoing(status, template, trap, trap) == echoing(status, template, "", "Hello")


def shown_as(text: str) -> st.SearchStrategy[str]:
    """A part of a text, from and up to any of its letters, as servers show it."""
    forms = (str, str.upper, repr, json.dumps, html.escape, lambda part: f"«{part}…»")
    bounds = st.tuples(st.integers(0, len(text) // 3), st.integers(len(text) * 2 // 3, len(text)))
    return st.builds(lambda bound, form: form(text[slice(*bound)]), bounds, st.sampled_from(forms))


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(TRAPS[:-1]), st.sampled_from(REFUSALS))
def test_nor_does_a_part_of_it(data: st.DataObject, trap: str, refusal: tuple[int, str]) -> None:
    said = data.draw(shown_as(trap))
    assert echoing(*refusal, said, trap) == echoing(*refusal, "", "Hello")


@table(
    "body",
    ("in a message", openai(f"wrong: {KEY} {SECRET} planted words")),
    ("in a code", openai("x", KEY, kind=KEY)),
    ("in a type", openai("x", kind="planted words with blanks")),
    ("in a param", openai("x", param=f"{SECRET}/../etc")),
    ("as text", f"{KEY} {SECRET} planted words"),
)
@pytest.mark.parametrize("status", [400, 401, 404, 429, 500])
def test_none_of_the_servers_words_are_shown(status: int, body: Any) -> None:
    request = {**REQUEST, "messages": [{"role": "user", "content": f"planted words {SECRET}"}]}
    error = judged(status, body, request)
    shown = f"{error.detail} {error.sentence} {error}"
    assert not [word for word in (KEY, SECRET, "planted", "wrong:") if word in shown]


def test_the_log_gets_code_type_and_parameter() -> None:
    error = judged(400, openai("x", "some_code", "logit_bias", "some_type"))
    assert error.detail.startswith("HTTP 400 some_type some_code param logit_bias: ")


# ── waits ────────────────────────────────────────────────────────────────────────────────────────────────────────

IN_40_S = formatdate(time.time() + 40, usegmt=True)


@table(
    "headers, message, wait_s",
    ("seconds", {"retry-after": "7"}, "", 7.0),
    ("a fraction", {"retry-after": "7.5"}, "", 7.5),
    ("with a unit", {"retry-after": "30s"}, "", 30.0),
    ("milliseconds come first", {"retry-after-ms": "2500", "retry-after": "9"}, "", 2.5),
    ("a date by the server's clock", {"retry-after": IN_40_S, "date": formatdate(time.time(), usegmt=True)}, "", 40.0),
    ("a date that is over", {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, "", 1.0),
    ("none at all", {"retry-after": "0"}, "", 1.0),
    ("before now", {"retry-after": "-3"}, "", None),
    ("for ever", {"retry-after": "inf"}, "", None),
    ("words", {"retry-after": "soon"}, "", None),
    ("a huge number", {"retry-after": "9" * 400}, "", MAX_WAIT_S),
    ("no such date", {"retry-after": "Wed, 99 Foo 2026 99:99:99 GMT"}, "", None),
    ("not given", {}, "", None),
    ("OpenAI's words", {}, "Please try again in 20s.", 20.0),
    ("Groq's words", {}, "Please try again in 1m0.5s. Visit us.", 60.5),
    ("Azure's words", {}, "Please retry after 6 seconds.", 6.0),
    ("milliseconds in words", {}, "Please try again in 350ms", 1.0),
)
def test_the_wait_that_a_provider_asks_for(headers: dict[str, str], message: str, wait_s: float | None) -> None:
    refusal = read_refusal(429, json.dumps(openai(message)).encode())
    found = wait_asked_for(headers, refusal)
    assert found == (None if wait_s is None else pytest.approx(wait_s, abs=1.5 if "date" in headers else 0.01))


@table("key, value, wait_s", ("Gemini", "retryDelay", "34s", 34.0), ("Hugging Face", "estimated_time", 20.5, 20.5))
def test_the_wait_may_stand_in_the_error(key: str, value: object, wait_s: float) -> None:
    body = json.dumps({"error": {"message": "x", "details": [{key: value}]}}).encode()
    assert wait_asked_for({}, read_refusal(429, body)) == wait_s


# ── cost ─────────────────────────────────────────────────────────────────────────────────────────────────────────

ADVERSARIES = (
    "model " * 5000,
    "content violat against " * 1000,
    "exceeds input tokens exceed reduce " * 800,
    "max_tokens must " * 1500,
    "stop seed stream size " * 1200 + "must",
    "1m" * 10_000,
    "try again in " + "1s " * 8000,
    "9" * 20_000,
    "no models no endpoints " * 1000,
)


@pytest.mark.parametrize("message", ADVERSARIES, ids=range(len(ADVERSARIES)))
def test_a_message_that_is_made_to_be_hard_is_read_at_once(message: str) -> None:
    begun = time.process_time()
    for status in (400, 429, 503):
        assert isinstance(judged(status, openai(message)), (FailJob, RetryJob))
    assert time.process_time() - begun < 5  # a search that isn't linear takes minutes
