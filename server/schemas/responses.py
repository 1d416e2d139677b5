"""Response bodies."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field

from eda.server.engine.draft_mode import DraftMode


def _is_none(value: Any) -> bool:
    return value is None


T = TypeVar("T")
Omittable = Annotated[T | None, Field(exclude_if=_is_none)]
"""A field that is left out of the body, and not written as null, when there is nothing to say."""


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Every error of the server."""

    error: ErrorDetail


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class RequestMetrics(BaseModel):
    """How fast this request was, over all of its prompts and completions together.

    Units are tokens per second and milliseconds; a "pass" is a decoding pass of the target.
    """

    tokens_per_second: float = Field(
        description="completion tokens over the time from admission to the last one"
    )
    time_to_first_token_ms: float | None = Field(description="from arrival, time in the queue included")
    mean_acceptance_length: float = Field(
        description="tokens emitted per pass, the target's own included; 1: no gain"
    )
    draft_acceptance_rate: float | None = Field(
        description="accepted of proposed draft tokens; null: none proposed"
    )
    num_target_passes: int
    draft: DraftMode = Field(description="what drafted")
    adapter: str | None
    adapter_version: int | None


FinishReasonName = Literal["stop", "length"]


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReasonName | None
    stop_reason: Omittable[int | str] = None
    token_ids: Omittable[list[int]] = None
    prompt_token_ids: Omittable[list[int]] = None


class CompletionResponse(BaseModel):
    """A completion or, in a stream, one chunk of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Omittable[Usage] = None
    metrics: Omittable[RequestMetrics] = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class ChatResponseMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatResponseMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReasonName
    stop_reason: Omittable[int | str] = None
    token_ids: Omittable[list[int]] = None


class ChatCompletionResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    metrics: RequestMetrics
    prompt_token_ids: Omittable[list[int]] = None


class ChatDelta(BaseModel):
    role: Omittable[Literal["assistant"]] = None
    content: Omittable[str] = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReasonName | None = None
    stop_reason: Omittable[int | str] = None
    token_ids: Omittable[list[int]] = None


class ChatCompletionChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Omittable[Usage] = None
    metrics: Omittable[RequestMetrics] = None
    prompt_token_ids: Omittable[list[int]] = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    adapter_version: int | None = Field(description="version of the private module that new requests get")
    weights: list[str] | None = Field(
        description="formats that the weights run in (float32, bfloat16, int8, int4); null while not in memory"
    )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: Omittable[list[str]] = None


class DetokenizeResponse(BaseModel):
    prompt: str


class HealthResponse(BaseModel):
    status: Literal["ok"] = "ok"


class VersionResponse(BaseModel):
    version: str
    weights: list[str] | None = Field(
        description="formats of the base's weights; null while models are loading"
    )
    instructions: str | None = Field(
        description="instruction set of the passes in C++; null while models are loading, or on torch"
    )
