"""What goes over the wire: OpenAI's chat completions, as far as this server honours them.

Source: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_ITEMS = 256  # turns of a conversation, parts of a turn
INT64 = 1 << 63


class _Given(BaseModel):
    """What a client sends: nothing is converted, nothing unknown is passed over, null is the same as left out."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return {key: v for key, v in values.items() if v is not None} if isinstance(values, dict) else values


def _whole(text: str) -> str:
    """JSON can hold halves of characters, which nothing can encode."""
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("there is half a character in it (a lone surrogate); send it whole or leave it out")
    return text


Text = Annotated[str, AfterValidator(_whole)]


class TextPart(_Given):
    type: Literal["text"]
    text: Text


class ImageURL(_Given):
    url: Text = Field(description="data:image/...;base64,... or, if the server allows it, http(s)")
    detail: Literal["auto"] = Field("auto", description="every picture is seen at the model's own size")


class ImagePart(_Given):
    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Texts = Annotated[list[TextPart], Field(max_length=MAX_ITEMS)]


class SystemMessage(_Given):
    role: Literal["system", "developer"]
    content: Text | Texts


class UserMessage(_Given):
    role: Literal["user"]
    content: Text | Annotated[list[Part], Field(max_length=MAX_ITEMS)]


class AssistantMessage(_Given):
    role: Literal["assistant"]
    content: Text | Texts


AnyMessage = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class StreamOptions(_Given):
    include_usage: bool = Field(False, description="one more chunk at the end, with the usage")


class ResponseFormat(_Given):
    type: Literal["text"]


class ChatRequest(_Given):
    """A question. Settings that are not here are refused."""

    model: Text
    messages: list[AnyMessage] = Field(min_length=1, max_length=MAX_ITEMS, description="the last one is a user's")
    temperature: float = Field(0.0, ge=0, le=2, description="0, the default here, takes the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens")
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    response_format: ResponseFormat | None = None
    user: Text | None = Field(None, description="who asks, for the client's own records; it changes no answer")

    @model_validator(mode="after")
    def _settings_fit(self) -> ChatRequest:
        if self.messages[-1].role != "user":
            raise ValueError(f"messages end with a turn of role '{self.messages[-1].role}'; end with a user's")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError(
                f"max_tokens is {self.max_tokens} and max_completion_tokens {self.max_completion_tokens}; give one"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true; set it or leave top_logprobs out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true; set it or leave stream_options out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


# --- what the server sends -------------------------------------------------------------------------------------------


class TopLogprob(BaseModel):
    """bytes: UTF-8 of the token, null if it is only a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    content: list[TokenLogprob]


class PromptDetails(BaseModel):
    """cached_tokens: those that were in memory and needed no work."""

    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


Reason = Literal["stop", "length"]


class Answer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: Literal[0] = 0
    message: Answer
    logprobs: Logprobs | None
    finish_reason: Reason


class Completion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: Literal[0] = 0
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: Reason | None = None


class Chunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["eyespot"] = "eyespot"


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail
