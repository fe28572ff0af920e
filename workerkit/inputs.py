"""What a job's `input_data` may hold, for each job type (contract, section 2).

Everything is checked before anything is spent. A fault becomes a sentence for the person who waits. The models' JSON
Schemas say the same as the validators, as far as a JSON Schema can; descriptions say the rest.
"""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, LiteralString, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from workerkit import sentences
from workerkit.errors import InvalidInput
from workerkit.media import MAX_PICTURE_SIDE
from workerkit.settings import IMAGE_SIZE

MAX_PROMPT_CHARACTERS = 100_000
MAX_MESSAGES = 200
MAX_PARTS = 100  # of one message

# A document of MongoDB holds 16 MB: the input, the output and the bookkeeping. The API's message carries a copy of the
# input, in Redis a third larger, since kombu encodes it as base64. RabbitMQ 4 refuses messages of over 16 MB.
MAX_PICTURES = 16
MAX_DATA_URL_BYTES = 6_000_000
MAX_DATA_URLS_BYTES = 8_000_000
MAX_URL_CHARACTERS = 8_192

MAX_PLACE_CHARACTERS = 100
MAX_DEPTH = 50  # of a response_format

# In JSON Schemas: only what the regular expressions of all languages mean alike. A blank is what `str.strip` takes off.
NOT_BLANK = "[^\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
BASE64 = "(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{4}|[A-Za-z0-9+/]{3}=|[A-Za-z0-9+/]{2}==)"
SIDE = "(?:[1-9][0-9]{1,2}|[1-3][0-9]{3}|40[0-8][0-9]|409[0-6])"  # up to MAX_PICTURE_SIDE


def check_words(value: str) -> str:
    if not value.strip():
        raise ValueError("should not be blank")
    return value


def is_deeper_than(levels: int, value: object) -> bool:
    """Whether lists and objects are nested deeper. Python's own limit differs from version to version."""
    layer = [value]
    for _ in range(levels):
        inner = [one.values() if isinstance(one, dict) else one for one in layer if isinstance(one, (dict, list))]
        layer = [child for children in inner for child in children]
    return any(isinstance(one, (dict, list)) for one in layer)


def fault_at(place: tuple[int | str, ...], kind: LiteralString, what: str) -> ValidationError:
    """A fault that pydantic reports at this place below the one where it is raised."""
    error = PydanticCustomError(kind, "{what}", {"what": what})
    return ValidationError.from_exception_data("input", [{"type": error, "loc": place, "input": None}])


def either_case(text: str) -> str:
    """A regular expression for the text in small letters and in capitals. A JSON Schema knows no flags."""
    return "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in text)


def needs_one_of(*names: str) -> dict[str, Any]:
    """What a JSON Schema says where one of these fields has to be given."""
    return {"anyOf": [{"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in names]}


# ── fields that are refused by name ──────────────────────────────────────────────────────────────────────────────────

NOTHING: tuple[object, ...] = ("", [], {}, False)
ZERO, ONE = (*NOTHING, 0, "0", "0.0"), (*NOTHING, 1, "1")


@dataclass(frozen=True)
class Unsupported:
    """A field of OpenAI's API that changes what the person gets, and that the worker doesn't pass on.

    `advice` says what to do instead. The `harmless` values ask for what is generated anyway, so they are accepted.
    """

    advice: str
    harmless: tuple[object, ...] = NOTHING

    def is_asked_for(self, value: object) -> bool:
        """Whether the value asks for something. True is not 1, and false is not 0."""
        return not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.harmless)


def or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The JSON Schema of a field that may be missing, which null counts as."""
    null = {"type": "null"}
    schema = {key: value for key, value in schema.items() if key != "default" or value is not None}
    if null in schema.get("anyOf", ()) or not schema.keys() - {"title", "description"}:
        return schema
    said: dict[str, Any] = {key: schema.pop(key) for key in ("title", "description", "default") if key in schema}
    return {**said, "anyOf": [schema, null]}


def takes_booleans(annotation: object) -> bool:
    """Whether a field of this type may be true or false."""
    is_boolean = annotation in (bool, Any) or isinstance(annotation, bool)
    return is_boolean or any(map(takes_booleans, get_args(annotation)))


class Checked(BaseModel):
    """Null counts as missing, numbers are finite, unknown keys are ignored, and those in `REFUSED` refused by name.

    `RULES` is what the JSON Schema says about several fields together.
    """

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    SHAPE: ClassVar = "an object"
    REFUSED: ClassVar[Mapping[str, Unsupported]] = {}
    RULES: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The JSON Schema with what `drop_nulls` adds to the fields: a null for what may be missing, and refusals."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        fields = schema.setdefault("properties", {})
        for name in fields.keys() - set(schema.get("required", ())):
            fields[name] = or_null(fields[name])
        for name, field in cls.REFUSED.items():
            fields.setdefault(name, {"enum": [None, *field.harmless], "description": f"Not supported: {field.advice}."})
        schema |= cls.RULES
        return schema

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError(f"should be {cls.SHAPE}")
        given = {key: value for key, value in data.items() if value is not None}
        for name, field in cls.REFUSED.items():
            if name in given and name not in cls.model_fields and field.is_asked_for(given[name]):
                raise fault_at((name,), "unsupported", f"isn't supported here; {field.advice}")
        return given


class JobInput(Checked):
    """Base of the inputs. Besides what `Checked` does: true is no number, while a number may come as text."""

    SHAPE = "an object with the job's parameters"
    PASSED_ON: ClassVar[Mapping[str, str]] = {}  # fields of the input, each with its name in OpenAI's API

    @field_validator("*", mode="before")
    @classmethod
    def refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and not takes_booleans(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError("should not be true or false")
        return value

    def passed_on(self) -> dict[str, Any]:
        """What the job asks of the provider beside its words, under the names of OpenAI's API."""
        given = {sent: getattr(self, name) for name, sent in self.PASSED_ON.items()}
        return {name: value for name, value in given.items() if value is not None}


Prompt = Annotated[
    str, Field(max_length=MAX_PROMPT_CHARACTERS, json_schema_extra={"pattern": NOT_BLANK}), AfterValidator(check_words)
]


# ── pictures in messages ─────────────────────────────────────────────────────────────────────────────────────────────

PICTURE_KINDS = ("png", "jpeg", "webp", "gif")
WEB_URL = re.compile(r"https?://", re.IGNORECASE)
DATA_URL = re.compile(rf"data:image/({'|'.join(PICTURE_KINDS)});base64,", re.IGNORECASE)


def check_web_url(url: str) -> None:
    """The worker doesn't fetch the URL: the provider gets it, and so it must not hold a password."""
    if len(url) > MAX_URL_CHARACTERS:
        raise ValueError(f"should have at most {MAX_URL_CHARACTERS} characters")
    if " " in url or not url.isprintable():
        raise ValueError("should hold no spaces, line ends or control characters; write them as %20 and the like")
    try:
        address = urlsplit(url)
        has_host = bool(address.hostname) and address.port != 0
    except ValueError:
        has_host = False
    if not has_host:
        raise ValueError("should name a host and, if any, a valid port, like https://example.com/picture.png")
    if "@" in address.netloc:
        raise ValueError("should hold no user and password; use a URL that needs none")


def check_data_url(url: str) -> None:
    if not (head := DATA_URL.match(url)):
        raise ValueError("should begin with data:image/png;base64, or the same with jpeg, webp or gif")
    if len(url) > MAX_DATA_URL_BYTES:
        raise ValueError(f"is over {MAX_DATA_URL_BYTES // 10**6} MB; make the picture smaller, or send its http(s) URL")
    try:
        picture = binascii.a2b_base64(url[head.end() :], strict_mode=True)
        if url.endswith("=") and len(picture) % 3 == 0:  # Python lets more padding pass than there may be
            raise ValueError
    except ValueError:
        raise ValueError("should have valid base64 behind the comma, padded and without line ends") from None
    if not picture:
        raise ValueError("has no picture behind the comma")


def check_url(url: str) -> str:
    if url[:5].lower() == "data:":
        check_data_url(url)
    elif WEB_URL.match(url):
        check_web_url(url)
    else:
        raise ValueError("should be a picture's URL that begins with https://, http:// or data:image/")
    return url


WEB_PATTERN = rf"{either_case('http')}[sS]?://[^/?#@\x00-\x20\x7f]+(?:[/?#][^\x00-\x20\x7f]*)?"
DATA_PATTERN = (
    f"{either_case('data:image/')}(?:{'|'.join(map(either_case, PICTURE_KINDS))}){either_case(';base64,')}{BASE64}"
)
PictureUrl = Annotated[
    str,
    AfterValidator(check_url),
    Field(
        description="An http(s) URL that the model server can reach: it names a host, no user, no port 0, and holds no "
        "control characters. Or a `data:` URL with a PNG, JPEG, WebP or GIF.",
        json_schema_extra={
            "anyOf": [
                {"pattern": f"^{WEB_PATTERN}$", "maxLength": MAX_URL_CHARACTERS},
                {"pattern": f"^{DATA_PATTERN}$", "maxLength": MAX_DATA_URL_BYTES},
            ]
        },
    ),
]


class Picture(Checked):
    SHAPE = "a URL, or an object with a `url`"

    url: PictureUrl
    detail: Literal["auto", "low", "high", "original"] | None = None


class TextPart(Checked):
    type: Literal["text"]
    text: Prompt


class PicturePart(Checked):
    type: Literal["image_url"]
    image_url: Picture

    @field_validator("image_url", mode="before", json_schema_input_type=Picture | PictureUrl)
    @classmethod
    def take_plain_url(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value


# ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────────

PARTS: Mapping[str, type[TextPart | PicturePart]] = {"text": TextPart, "image_url": PicturePart}


def check_part(value: Any) -> TextPart | PicturePart:
    """The part as the model of its type. Left to a union, a fault would be about each of its models."""
    if not isinstance(value, dict):
        raise ValueError("should be an object with a `type`, such as a part of type 'text'")
    kind = value.get("type")
    if isinstance(kind, str) and kind in PARTS:
        return PARTS[kind].model_validate(value)
    if isinstance(kind, str) and re.fullmatch(r"[a-z_]{1,40}", kind):
        raise ValueError(f"is a part of type '{kind}', which isn't supported here; use 'text' and 'image_url'")
    raise fault_at(("type",), "part_type", "should be 'text' or 'image_url'")


Part = Annotated[TextPart | PicturePart, BeforeValidator(check_part)]
Parts = Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS)]
CONTENT_OF_TEXT: TypeAdapter[str] = TypeAdapter(Prompt)
CONTENT_OF_PARTS: TypeAdapter[list[Part]] = TypeAdapter(Parts)


class Message(Checked):
    SHAPE = "an object with `role` and `content`"
    REFUSED = {
        "tool_calls": Unsupported("send what the tools answered as text"),
        "function_call": Unsupported("send what the function answered as text"),
        "audio": Unsupported("send what was said as text, in `content`"),
        "refusal": Unsupported("send the words as text, in `content`"),
    }
    RULES = {  # pictures come from the user alone
        "if": {"properties": {"role": {"not": {"const": "user"}}}},
        "then": {"properties": {"content": {"items": {"properties": {"type": {"const": "text"}}}}}},
    }

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart | PicturePart]

    @field_validator("content", mode="before", json_schema_input_type=Prompt | Parts)
    @classmethod
    def check_content(cls, value: Any) -> str | list[TextPart | PicturePart]:
        if isinstance(value, str):
            return CONTENT_OF_TEXT.validate_python(value)
        if isinstance(value, list):
            return CONTENT_OF_PARTS.validate_python(value)
        raise ValueError("should be a text, or a list of parts of type 'text' and 'image_url'")

    @model_validator(mode="after")
    def refuse_pictures_of_others(self) -> Message:
        for i, part in enumerate(self.parts):
            if self.role != "user" and isinstance(part, PicturePart):
                what = f"is a picture in a message of role '{self.role}'; put it into one of role 'user'"
                raise fault_at(("content", i), "picture_of_another", what)
        return self

    @property
    def parts(self) -> list[TextPart | PicturePart]:
        return [] if isinstance(self.content, str) else self.content

    @property
    def pictures(self) -> list[Picture]:
        return [part.image_url for part in self.parts if isinstance(part, PicturePart)]

    @property
    def characters(self) -> int:
        """How long its texts are. Pictures have a cap of their own."""
        if isinstance(self.content, str):
            return len(self.content)
        return sum(len(part.text) for part in self.parts if isinstance(part, TextPart))


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

NO_TOOLS = "the model has no tools, so leave it out"
THINKING = "how long the AI model thinks is set here already, so leave it out"
NOT_FOR_TEXT = "leave it out, and for sound send an audio_generation job"

# What changes nothing in a text isn't here: `stream`, `stream_options`, `store`, `metadata`, `user`, `service_tier`,
# `safety_identifier`, `prompt_cache_…`, and `parallel_tool_calls`, which means nothing without `tools`.
UNSUPPORTED_IN_TEXT = {
    "n": Unsupported("send one job for each answer", ONE),
    "best_of": Unsupported("send one job for each answer", ONE),
    "max_completion_tokens": Unsupported("use `max_tokens`"),
    "max_output_tokens": Unsupported("use `max_tokens`"),
    "instructions": Unsupported("use `system`"),
    "previous_response_id": Unsupported("send the earlier messages in `messages`"),
    "tools": Unsupported(NO_TOOLS),
    "tool_choice": Unsupported(NO_TOOLS, (*NOTHING, "none", "auto")),
    "functions": Unsupported(NO_TOOLS),
    "function_call": Unsupported(NO_TOOLS, (*NOTHING, "none", "auto")),
    "web_search_options": Unsupported("the model can't search the web, so leave it out", (False,)),  # {} asks
    "reasoning_effort": Unsupported(THINKING),
    "reasoning": Unsupported(THINKING),
    "verbosity": Unsupported("say in the prompt how long the answer should be", (*NOTHING, "medium")),
    "presence_penalty": Unsupported("leave it out, or use `temperature` or `top_p`", ZERO),
    "frequency_penalty": Unsupported("leave it out, or use `temperature` or `top_p`", ZERO),
    "logit_bias": Unsupported("say in the prompt which words to use or avoid"),
    "logprobs": Unsupported("only the text is kept, so leave it out", ZERO),
    "top_logprobs": Unsupported("only the text is kept, so leave it out", ZERO),
    "modalities": Unsupported(NOT_FOR_TEXT, (*NOTHING, ["text"])),
    "audio": Unsupported(NOT_FOR_TEXT),
    "prediction": Unsupported("leave it out, and the text is written without it"),
    "moderation": Unsupported("leave it out, and the AI service's own rules apply"),
    "suffix": Unsupported("say in the prompt what comes after the text"),
    "echo": Unsupported("only the answer is kept, so leave it out"),
}

StopWord = Annotated[str, Field(max_length=200)]
Stop = StopWord | Annotated[list[StopWord], Field(max_length=4)]
STOP: TypeAdapter[str | list[str]] = TypeAdapter(Stop)


Model = Annotated[str | None, Field(description="One of those that the operator's settings allow.")]


class TextInput(JobInput):
    """What a text is made from. The model reads `system`, `messages` and `prompt`, in this order."""

    REFUSED = UNSUPPORTED_IN_TEXT
    RULES = needs_one_of("prompt", "messages")

    prompt: Prompt | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = Field(
        None,
        description=f"Their texts have at most {MAX_PROMPT_CHARACTERS:,} characters together. They hold at most "
        f"{MAX_PICTURES} pictures, whose URLs have at most {MAX_DATA_URLS_BYTES:,} characters together.",
    )
    system: Prompt | None = None
    max_tokens: int | None = Field(None, ge=1, description="At most TEXT_MAX_TOKENS, a setting of the operator's.")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    response_format: dict[str, Any] | None = Field(
        None,
        description="As in OpenAI's Chat Completions. "
        f"At most {MAX_PROMPT_CHARACTERS:,} characters as JSON, and nested at most {MAX_DEPTH} levels deep.",
    )
    model: Model = None

    PASSED_ON = {name: name for name in ("max_tokens", "temperature", "top_p", "stop", "seed", "response_format")}

    @field_validator("stop", mode="plain", json_schema_input_type=Stop)
    @classmethod
    def check_stop(cls, value: Any) -> str | list[str]:
        try:
            return STOP.validate_python(value)
        except ValidationError:
            raise ValueError("should be a text of at most 200 characters, or a list of at most 4 of them") from None

    @field_validator("response_format", mode="plain", json_schema_input_type=dict[str, Any])
    @classmethod
    def check_response_format(cls, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError("should be an object, such as one with the `type` 'json_object'")
        if is_deeper_than(MAX_DEPTH, value):
            raise ValueError(f"should not be nested over {MAX_DEPTH} levels deep")
        try:
            length = len(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            raise ValueError("should hold only what JSON can") from None
        if length > MAX_PROMPT_CHARACTERS:
            raise ValueError(f"should have at most {MAX_PROMPT_CHARACTERS} characters as JSON")
        return value

    @model_validator(mode="after")
    def need_words(self) -> TextInput:
        if not self.prompt and not self.messages:
            raise ValueError("needs a `prompt`")
        if sum(message.characters for message in self.messages or ()) > MAX_PROMPT_CHARACTERS:
            raise ValueError(f"has messages of over {MAX_PROMPT_CHARACTERS} characters")
        return self

    @model_validator(mode="after")
    def cap_pictures(self) -> TextInput:
        pictures = [picture for message in self.messages or () for picture in message.pictures]
        if len(pictures) > MAX_PICTURES:
            raise fault_at(("messages",), "pictures", f"hold {len(pictures)} pictures; send at most {MAX_PICTURES}")
        if sum(len(picture.url) for picture in pictures) > MAX_DATA_URLS_BYTES:
            megabytes = MAX_DATA_URLS_BYTES // 10**6
            what = f"hold pictures of over {megabytes} MB together; send fewer, smaller ones or http(s) URLs"
            raise fault_at(("messages",), "pictures", what)
        return self

    def conversation(self) -> list[dict[str, Any]]:
        """System message, messages and prompt, in this order, as far as they are given, in OpenAI's form."""
        system = [Message(role="system", content=self.system)] if self.system else []
        prompt = [Message(role="user", content=self.prompt)] if self.prompt else []
        return [message.model_dump(exclude_none=True) for message in (*system, *(self.messages or ()), *prompt)]


# ── pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────

NO_EDITING = "pictures can't be edited, so describe the whole picture in `prompt`"
NO_MOVING = "pictures don't move, so leave it out"

# What changes nothing in the one picture that is kept isn't here: `stream`, `user`, `safety_identifier`, and
# `input_fidelity`, which means nothing without `image`.
UNSUPPORTED_IN_PICTURES = {
    "n": Unsupported("send one job for each picture", ONE),
    "style": Unsupported("describe the style in `prompt`"),
    "negative_prompt": Unsupported("say in `prompt` what the picture should not show"),
    "background": Unsupported("describe the background in `prompt`", (*NOTHING, "auto")),
    "output_format": Unsupported("the model chooses the file's format, so leave it out", (*NOTHING, "png")),
    "output_compression": Unsupported("the model chooses the file's format, so leave it out", (*NOTHING, 100, "100")),
    "response_format": Unsupported("the picture comes as a URL, in `image_url`", (*NOTHING, "url")),
    "moderation": Unsupported("leave it out, and the AI service's own rules apply", (*NOTHING, "auto")),
    "complexity": Unsupported("use `quality`"),
    "partial_images": Unsupported("only the finished picture is kept, so leave it out", ZERO),
    "image": Unsupported(NO_EDITING),
    "images": Unsupported(NO_EDITING),
    "mask": Unsupported(NO_EDITING),
    "markup": Unsupported(NO_EDITING),
    "frame_count": Unsupported(NO_MOVING),
    "frame_duration_ms": Unsupported(NO_MOVING),
    "svg": Unsupported("pictures are made of pixels, so leave it out"),
}


class ImageInput(JobInput):
    """What a picture is made from."""

    REFUSED = UNSUPPORTED_IN_PICTURES
    PASSED_ON = {"size": "size", "quality": "quality"}

    prompt: Prompt
    size: Annotated[str, Field(json_schema_extra={"pattern": f"^(?:auto|{SIDE}x{SIDE})$"})] | None = Field(
        None, description="Width and height in pixels. The nearest size that the model knows is used."
    )
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = None
    model: Model = None

    @field_validator("size")
    @classmethod
    def check_sides(cls, value: str | None) -> str | None:
        if value is None or value == "auto":
            return value
        if not re.fullmatch(IMAGE_SIZE, value, re.ASCII):
            raise ValueError("should be a width and a height in pixels, like 1024x1024, or 'auto'")
        if max(map(int, value.split("x"))) > MAX_PICTURE_SIDE:
            raise ValueError(f"should be at most {MAX_PICTURE_SIDE}x{MAX_PICTURE_SIDE}")
        return value


# ── sound ────────────────────────────────────────────────────────────────────────────────────────────────────────────

UNSUPPORTED_IN_SOUND = {
    "input": Unsupported("put the words into `text`"),
    "instructions": Unsupported("choose how it sounds by `voice` and `speed`"),
    "response_format": Unsupported("use `format`"),
    "stream_format": Unsupported("the sound comes as a file, so leave it out", (*NOTHING, "audio")),
}


# No other signs in ASCII. Which letters there are beyond it no regular expression says that all languages share.
VOICE_PATTERN = r"^[^\x00-\x1f!-,;-@\[-\^`{-\x7f]{1,64}$"
Voice = Annotated[str, Field(json_schema_extra={"pattern": VOICE_PATTERN})]


class AudioInput(JobInput):
    """What is spoken: `text` or, if there is none, `prompt`."""

    REFUSED = UNSUPPORTED_IN_SOUND
    RULES = needs_one_of("text", "prompt")
    PASSED_ON = {"voice": "voice", "format": "response_format", "speed": "speed"}

    text: Prompt | None = None
    prompt: Prompt | None = None
    voice: str | None = Field(
        None,
        description="Letters and digits of any script, spaces and . : / _ - only. "
        "Without one, or with 'default', the operator's voice speaks.",
    )
    speed: float | None = Field(None, ge=0.25, le=4)
    format: Literal["wav", "mp3", "opus", "flac"] | None = None
    model: Model = None

    @field_validator("voice", mode="plain", json_schema_input_type=Voice)
    @classmethod
    def check_voice(cls, value: Any) -> str | None:
        if isinstance(value, str) and re.fullmatch(r"[\w .:/-]{1,64}", value):
            return None if value == "default" else value
        raise ValueError("should be a voice's name as text, of at most 64 letters, digits, spaces and . : / _ -")

    @model_validator(mode="after")
    def need_words(self) -> AudioInput:
        if not self.text and not self.prompt:
            raise ValueError("needs a `text` (or a `prompt`)")
        return self


# ── the check ────────────────────────────────────────────────────────────────────────────────────────────────────────


# What pydantic says in words that only a programmer knows.
PROGRAMMERS_WORDS = {
    r"^(?:Value error, |Input |String |List )": "",
    r" after validation, not \d+$|, (?:unable to parse|got a number) .*": "",
    "^Field required": "is missing",
    "a valid integer": "a whole number",
    "a valid (?=number|list)": "a ",
    "a valid string": "a text",
}


def in_plain_words(message: str) -> str:
    """What is wrong with a field, as a person reads it behind the field's name."""
    for pattern, words in PROGRAMMERS_WORDS.items():
        message = re.sub(pattern, words, message, flags=re.DOTALL)
    return message[:1].lower() + message[1:]


def check_input(model: type[BaseModel], input_data: object) -> BaseModel:
    """The checked input. Raises InvalidInput, with a sentence about the first fault."""
    try:
        return model.model_validate(input_data)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, fault["loc"]))[:MAX_PLACE_CHARACTERS]
    sentence = sentences.unusable(f"{where or 'it'} {in_plain_words(fault['msg'])}")
    # The log gets names that stand in the code only: further down, a place can hold keys that the person wrote.
    names = {*model.model_fields, *getattr(model, "REFUSED", ())}
    field = fault["loc"][0] if fault["loc"] and fault["loc"][0] in names else "it"
    raise InvalidInput(f"input: {field} {fault['type']}", sentence)
