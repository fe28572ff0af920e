"""What a job's `input_data` may hold, for each job type (contract, section 2).

Everything is checked before anything is spent. A fault becomes a sentence for the person who waits.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from workerkit.errors import InvalidInput
from workerkit.media import MAX_PICTURE_SIDE
from workerkit.settings import IMAGE_SIZE

MAX_PROMPT_CHARACTERS = 100_000


def check_words(value: str) -> str:
    if not value.strip():
        raise ValueError("should not be blank")
    return value


Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS), AfterValidator(check_words)]


class JobInput(BaseModel):
    """Base of the inputs. Null counts as missing, numbers are finite, true is no number, unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError("should be an object with the job's parameters")
        return {key: value for key, value in data.items() if value is not None}

    @field_validator("*", mode="before")
    @classmethod
    def refuse_booleans(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("should not be true or false")
        return value


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "user", "assistant"]
    content: Prompt


class TextInput(JobInput):
    prompt: Prompt | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=200)] | None = None
    system: Prompt | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stop: Annotated[str, Field(max_length=200)] | Annotated[list[str], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    response_format: dict[str, Any] | None = None
    model: str | None = None

    PASSED_ON: ClassVar = ("max_tokens", "temperature", "top_p", "stop", "seed", "response_format")

    @model_validator(mode="after")
    def need_words(self) -> TextInput:
        if not self.prompt and not self.messages:
            raise ValueError("needs a `prompt`")
        if sum(len(message.content) for message in self.messages or ()) > MAX_PROMPT_CHARACTERS:
            raise ValueError(f"has messages of over {MAX_PROMPT_CHARACTERS} characters")
        if self.response_format and len(json.dumps(self.response_format, default=str)) > MAX_PROMPT_CHARACTERS:
            raise ValueError("has too large a `response_format`")
        return self

    def conversation(self) -> list[dict[str, str]]:
        """System message, messages and prompt, in this order, as far as they are given."""
        system = [Message(role="system", content=self.system)] if self.system else []
        prompt = [Message(role="user", content=self.prompt)] if self.prompt else []
        return [message.model_dump() for message in (*system, *(self.messages or ()), *prompt)]


class ImageInput(JobInput):
    prompt: Prompt
    size: str | None = Field(None, pattern=rf"^(auto|{IMAGE_SIZE})$")
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = None
    model: str | None = None

    @field_validator("size")
    @classmethod
    def check_sides(cls, value: str | None) -> str | None:
        if value and value != "auto" and max(map(int, value.split("x"))) > MAX_PICTURE_SIDE:
            raise ValueError(f"should be at most {MAX_PICTURE_SIDE}x{MAX_PICTURE_SIDE}")
        return value


class AudioInput(JobInput):
    text: Prompt | None = None
    prompt: Prompt | None = None
    voice: str = Field("default", pattern=r"^[\w .:/-]{1,64}$")
    speed: float | None = Field(None, ge=0.25, le=4)
    format: Literal["wav", "mp3", "opus", "flac"] | None = None
    model: str | None = None

    @model_validator(mode="after")
    def need_words(self) -> AudioInput:
        if not self.text and not self.prompt:
            raise ValueError("needs a `text` (or a `prompt`)")
        return self


def check_input(model: type[BaseModel], input_data: object) -> BaseModel:
    """The checked input. Raises InvalidInput, with a sentence about the first fault."""
    try:
        return model.model_validate(input_data)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in fault["loc"][:3])
        what = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
        sentence = f"The input can't be used: {where or 'it'} {what[:1].lower()}{what[1:]}."
        raise InvalidInput(f"input: {where[:40]} {fault['type']}", sentence) from None
