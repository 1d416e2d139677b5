"""Request bodies of the OpenAI endpoints and their extensions.

Unknown parameters are refused by name. ``null`` means "not given", also for the parameters of OpenAI's API that this
server does not have.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

from server.validation import ParameterError

Text = Annotated[str, Field(max_length=2**31 - 1)]
"""Any text. The limit is no limit: with one, half of a surrogate pair, which JSON can spell, is refused."""
TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
TokenIdText = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]


class RequestModel(BaseModel):
    """A body that refuses what it does not know."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset()
    """Parameters of OpenAI's API that are refused unless they are ``null``."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value for name, value in data.items() if value is not None or name not in cls.UNSUPPORTED
        }


class StreamOptions(RequestModel):
    """What a stream carries beside the text."""

    include_usage: bool = Field(False, description="end with a chunk that has the usage and no choices")


class GenerationOptions(RequestModel):
    """Parameters that completions and chat share."""

    model: str = Field(min_length=1, max_length=256, description="a name that GET /v1/models lists")
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="most tokens to generate")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; default 1")
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=1024, description="completions of each prompt; default 1")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | list[StopString] | None = None
    seed: int | None = Field(
        None,
        ge=-(2**63),
        le=2**63 - 1,
        description="the same text whatever the draft, the batch and the load",
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = Field(None, description="token id -> number added to its logit")
    user: str | None = Field(None, max_length=512, description="accepted for compatibility; has no effect")

    draft: Literal["private", "shared", "none"] = Field(
        "private",
        description="what speculates: the fine-tune's private module, the shared draft alone, or nothing",
    )
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="0 or -1: off")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="1: off")
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, le=2**31 - 1)
    return_token_ids: bool = False
    priority: int = Field(0, ge=-(2**31), le=2**31 - 1, description="smaller ones are admitted first")

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _check_together(self) -> "GenerationOptions":
        if self.stream_options is not None and not self.stream:
            raise ParameterError("stream_options", "stream_options may only be given when stream is true")
        return self


class CompletionRequest(GenerationOptions):
    """``POST /v1/completions``."""

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset({"best_of", "suffix"})

    prompt: Text | list[Text] | TokenIds | list[TokenIds] = Field(
        description="text, token ids, or a list of either; every prompt gets n completions"
    )
    logprobs: int | None = Field(
        None, ge=0, le=100, description="log-probabilities of this many likeliest tokens"
    )
    echo: bool = Field(False, description="begin the text with the prompt; not together with logprobs")

    @model_validator(mode="after")
    def _check_prompt(self) -> "CompletionRequest":
        if isinstance(self.prompt, list) and not self.prompt:
            raise ParameterError(
                "prompt", "prompt is an empty list; give a text, token ids, or a list of either"
            )
        if self.echo and self.logprobs is not None:
            raise ParameterError(
                "echo", "echo together with logprobs is not supported; leave one of them out"
            )
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(RequestModel):
    """A part of a message; text is the only kind that is supported."""

    type: Literal["text"]
    text: Text


class ChatMessage(RequestModel):
    """One message of a conversation."""

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset(
        {"name", "refusal", "audio", "tool_calls", "function_call", "annotations", "tool_call_id"}
    )

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check_content(self) -> "ChatMessage":
        # OpenAI allows null beside tool calls. These are refused by their own name, which must not be hidden.
        if self.content is None:
            raise ParameterError(
                "content",
                f"content of the {self.role} message is null; a text or a list of text parts is needed",
            )
        return self

    def as_template_input(self) -> dict[str, Any]:
        """Under a role that templates know: "developer" is OpenAI's later word for "system"."""
        content: Any = self.content
        if isinstance(content, list):
            content = [{"type": "text", "text": part.text} for part in content]
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatCompletionRequest(GenerationOptions):
    """``POST /v1/chat/completions``."""

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset(
        {
            "audio",
            "function_call",
            "functions",
            "metadata",
            "modalities",
            "parallel_tool_calls",
            "prediction",
            "reasoning_effort",
            "response_format",
            "service_tier",
            "store",
            "tool_choice",
            "tools",
            "web_search_options",
        }
    )

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="wins over max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=100)

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ParameterError("top_logprobs", "top_logprobs may only be given when logprobs is true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(RequestModel):
    """``POST /tokenize``: either ``prompt`` or ``messages``."""

    model: str | None = Field(None, description="a served model; default: the base")
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool | None = Field(
        None, description="default: true for a prompt, false for messages"
    )
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ParameterError("prompt", "give either prompt or messages")
        return self


class DetokenizeRequest(RequestModel):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[TokenId]
