"""Request bodies of the OpenAI endpoints and their extensions.

Unknown parameters are refused by name. Parameters of OpenAI's API that this server does not have are taken where they
ask for nothing: ``null``, and the values in ``NEUTRAL``.

Lists stop at their first wrong item and objects at their first unknown name: one error is told, and a body of a million
wrong values must not cost a million of them.
"""

import json
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, model_validator
from pydantic.fields import FieldInfo

from eda.server.engine.draft_mode import DraftMode
from eda.server.validation import ParameterError

Text = Annotated[str, Field(max_length=2**31 - 1)]
"""Any text. The limit is no limit: with one, half of a surrogate pair, which JSON can spell, is refused."""
TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
TokenIdText = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Label = Annotated[str, Field(max_length=512)]

NO_EFFECT = "accepted for compatibility; has no effect"
MAX_PROMPTS = 1024


class RequestModel(BaseModel):
    """A body that refuses what it does not know."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Parameters of OpenAI's API that this server does not have, with the values, beside ``null``, that ask for nothing
    and are taken."""

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        known = _names_of(cls)
        if not isinstance(data, dict) or (data.keys() <= known.keys() and None not in data.values()):
            return data
        kept: dict[Any, Any] = {}
        has_unknown = False
        for name, value in data.items():
            if name in known:
                if value is not None or known[name].is_required():
                    kept[name] = value
            elif name not in cls.NEUTRAL:
                if not has_unknown:  # one is enough for the error
                    has_unknown, kept[name] = True, value
            elif value is not None and not any(_is_same(value, neutral) for neutral in cls.NEUTRAL[name]):
                raise ParameterError(name, _only_neutral(name, cls.NEUTRAL[name]), "unsupported_parameter")
        return kept


@cache
def _names_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _is_same(value: Any, neutral: Any) -> bool:
    """Equal and of the same type: to Python, ``false`` and ``0`` are equal."""
    return type(value) is type(neutral) and bool(value == neutral)


def _only_neutral(name: str, values: tuple[Any, ...]) -> str:
    if not values:
        return f"the parameter '{name}' is not supported"
    return f"the parameter '{name}' is only taken as {' or '.join(json.dumps(value) for value in values)}"


def _at_most(limit: int) -> BeforeValidator:
    """Counts the entries of an object before it looks at them."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            raise ValueError(f"{len(value)} entries; at most {limit} are taken")
        return value

    return BeforeValidator(check)


class StreamOptions(RequestModel):
    """What a stream carries beside the text."""

    NEUTRAL = {"include_obfuscation": (False,)}

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
    stop: StopString | Annotated[list[StopString], Field(max_length=1024, fail_fast=True)] | None = None
    seed: int | None = Field(
        None,
        ge=-(2**63),
        le=2**63 - 1,
        description="the same text whatever the draft, the batch and the load",
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[TokenIdText, Bias] | None, _at_most(1024)] = Field(
        None, description="token id -> number added to its logit"
    )
    user: Label | None = Field(None, description=NO_EFFECT)
    safety_identifier: Label | None = Field(None, description=NO_EFFECT)
    prompt_cache_key: Label | None = Field(None, description=NO_EFFECT)

    draft: DraftMode = Field(
        "private",
        description="what speculates: the fine-tune's private module, the shared draft alone, a look-up in the text so "
        "far, or nothing; without a draft model the default is a look-up",
    )
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="0 or -1: off")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="1: off")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
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
        if self.includes_usage and not self.stream:
            raise ParameterError("stream_options", "stream_options may only be given when stream is true")
        return self


class CompletionRequest(GenerationOptions):
    """``POST /v1/completions``."""

    NEUTRAL = {"suffix": ("",)}

    prompt: (
        Text
        | Annotated[list[Text], Field(max_length=MAX_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True)]
    ) = Field(description="text, token ids, or a list of either; every prompt gets n completions")
    best_of: int | None = Field(
        None, ge=1, le=1024, description="n, or not given: all completions are returned"
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
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ParameterError(
                "best_of",
                f"best_of is {self.best_of}; it is only taken where it equals n, which is {self.n or 1}",
                "unsupported_parameter",
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

    NEUTRAL = {"annotations": ([],)}

    type: Literal["text"]
    text: Text
    cache_control: dict[str, Any] | None = Field(None, description=NO_EFFECT)


class ChatMessage(RequestModel):
    """One message of a conversation."""

    NEUTRAL = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "reasoning": ("",),
        "reasoning_content": ("",),
        "refusal": ("",),
        "tool_call_id": (),
        "tool_calls": ([],),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] | None = None
    name: Label | None = Field(None, description=NO_EFFECT)
    cache_control: dict[str, Any] | None = Field(None, description=NO_EFFECT)

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


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)]


class ChatCompletionRequest(GenerationOptions):
    """``POST /v1/chat/completions``."""

    NEUTRAL = {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: Messages
    metadata: Annotated[dict[Label, Label] | None, _at_most(16)] = Field(None, description=NO_EFFECT)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="wins over max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=100)

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise ParameterError("top_logprobs", "top_logprobs may only be given when logprobs is true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(RequestModel):
    """``POST /tokenize``: either ``prompt`` or ``messages``."""

    model: str | None = Field(None, description="a served model; default: the base")
    prompt: Text | None = None
    messages: Messages | None = None
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
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
