"""From a checked body to sequences: tokens, limits, sampling settings and stop conditions."""

import asyncio
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from eda.adapters.errors import UnknownModelError
from eda.adapters.templates.renderer import TemplateRenderer
from eda.formats.chat_template import ChatTemplateError, Message
from eda.formats.tokenizer import TextTokenizer
from eda.sampling.params import SamplingParams
from eda.server.engine.draft_mode import DraftMode
from eda.server.engine.sequence import Sequence, SequenceLabels
from eda.server.engine.stopping import StopChecker, StopConditions
from eda.server.errors import ContextLengthError, InvalidRequestError, UnknownModelNameError
from eda.server.schemas.generation import ChatCompletionRequest, CompletionRequest, GenerationOptions
from eda.server.services import Lease, Services
from eda.server.tokenizer import detokenizer_of, render_chat
from eda.speculation.sequence import SequenceState

DEFAULT_COMPLETION_TOKENS = 16
"""What OpenAI's completions generate when ``max_tokens`` is not given; chats have ``Runtime.chat_max_tokens``."""

TOKENIZE_INLINE = 8_192
"""Characters up to which a text is tokenized in the event loop; longer ones would hold up other requests."""


@dataclass(slots=True)
class PreparedRequest:
    """A request that is ready to be queued. ``sequences`` are prompt-major: all ``n`` of a prompt stand together.

    ``echoes`` has the text of each prompt when the request asks to repeat it, else it is empty.
    """

    request_id: str
    lease: Lease
    sequences: list[Sequence]
    prompts: list[list[int]]
    completions_per_prompt: int
    echoes: list[str]

    def prompt_of(self, index: int) -> list[int]:
        return self.prompts[index // self.completions_per_prompt]

    def echo_of(self, index: int) -> str:
        return self.echoes[index // self.completions_per_prompt] if self.echoes else ""

    @property
    def num_prompt_tokens(self) -> int:
        """Each prompt counts once, however many completions it gets."""
        return sum(map(len, self.prompts))

    @property
    def num_completion_tokens(self) -> int:
        return sum(sequence.num_output_tokens for sequence in self.sequences)


async def acquire(services: Services, model: str) -> Lease:
    """A lease on ``model``. Raises ``UnknownModelNameError``."""
    registry = services.registry
    try:
        if registry.is_loaded(model):
            return registry.acquire(model)
        # A fine-tune that was unloaded is read from disk; other requests must not wait for that.
        return await asyncio.to_thread(registry.acquire, model)
    except UnknownModelError:
        raise unknown_model(model) from None


async def tokenizer_named(services: Services, model: str | None) -> TextTokenizer:
    """The tokenizer of ``model``, or of the base for ``None``. Raises ``UnknownModelNameError``."""
    if model is None:
        return services.loaded().tokenizer
    lease = await acquire(services, model)
    try:
        return services.tokenizer_of(lease.fine_tune)
    finally:
        lease.release()


def max_model_len_of(services: Services, model: str) -> int:
    """Tokens that prompt and output may have together. Raises ``UnknownModelNameError``."""
    try:
        return services.registry.describe(model).max_model_len
    except UnknownModelError:
        raise unknown_model(model) from None


def unknown_model(model: str) -> UnknownModelNameError:
    return UnknownModelNameError(
        f"the model '{model[:256]}' does not exist; GET /v1/models lists those that do", param="model"
    )


async def tokenize(
    tokenizer: TextTokenizer, text: str, limit: int, *, param: str, special: bool
) -> list[int]:
    """``text`` to ids. Raises ``ContextLengthError`` for a text that cannot have ``limit`` tokens or fewer."""
    if len(text) > limit * tokenizer.longest_token:
        raise ContextLengthError(
            f"{param} has {len(text)} characters, which is more than {limit} tokens can hold", param=param
        )
    if len(text) <= TOKENIZE_INLINE:
        return tokenizer.encode(text, add_special_tokens=special)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=special)


async def completion_prompts(
    body: CompletionRequest, tokenizer: TextTokenizer, max_model_len: int
) -> tuple[list[list[int]], list[str]]:
    """Token ids of every prompt and, for ``echo``, their texts."""
    prompts: list[list[int]] = []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            prompts.append(await tokenize(tokenizer, prompt, max_model_len, param="prompt", special=True))
        else:
            prompts.append(list(prompt))
    if not body.echo:
        return prompts, []
    texts = [
        given if isinstance(given, str) else tokenizer.decode(ids)
        for given, ids in zip(body.prompts, prompts, strict=True)
    ]
    return prompts, texts


async def chat_prompt(
    messages: SequenceOf[Message], tokenizer: TextTokenizer, templates: TemplateRenderer, max_model_len: int
) -> list[int]:
    """Token ids of a conversation under the model's template."""
    try:
        text = await render_chat(templates, tokenizer, messages)
    except ChatTemplateError as error:
        raise InvalidRequestError(str(error), param="messages") from error
    # The template writes the special tokens itself.
    return await tokenize(tokenizer, text, max_model_len, param="messages", special=False)


def build(
    services: Services,
    body: CompletionRequest | ChatCompletionRequest,
    lease: Lease,
    request_id: str,
    prompts: list[list[int]],
    echoes: list[str],
    max_model_len: int,
) -> PreparedRequest:
    """Checks lengths and limits and makes the sequences.

    Raises ``InvalidRequestError`` and ``ContextLengthError`` with the parameter at fault.
    """
    settings, tokenizer = services.settings, services.tokenizer_of(lease.fine_tune)
    copies = body.n or 1
    if len(prompts) * copies > settings.sequences_limit:
        raise InvalidRequestError(
            f"{len(prompts)} prompts with n {copies} make {len(prompts) * copies} completions; a request may ask for "
            f"{settings.sequences_limit}",
            param="n" if copies > 1 else "prompt",
        )
    _check_limits(services, body)
    config = lease.fine_tune.model.config
    # Files may name end tokens that the model does not have; these are never generated.
    eos_ids = frozenset(i for i in {*config.eos_token_ids, *tokenizer.eos_ids} if i < config.vocab_size)
    deadline = time.monotonic() + settings.request_timeout
    draft = _draft_mode(services, body, lease)
    uses_adapter = draft == "private"
    labels = SequenceLabels(
        lease.model_name,
        draft,
        lease.adapter if uses_adapter else None,
        lease.adapter_version if uses_adapter else None,
    )
    sequences: list[Sequence] = []
    for place, prompt in enumerate(prompts):
        max_tokens = _max_tokens(
            body, prompt, config.vocab_size, max_model_len, services.loaded().chat_max_tokens
        )
        conditions = StopConditions(
            max_tokens=max_tokens,
            min_tokens=body.min_tokens,
            stop_token_ids=frozenset(body.stop_token_ids or ())
            | (frozenset() if body.ignore_eos else eos_ids),
            stop_strings=tuple(body.stop_strings),
            include_stop_string=body.include_stop_str_in_output,
        )
        for copy in range(copies):
            state = SequenceState(
                token_ids=list(prompt),
                max_length=len(prompt) + max_tokens,
                fine_tune=lease.fine_tune,
                sampling=_sampling(body, conditions, config.vocab_size, copy),
                private=lease.private if uses_adapter else None,
                speculation=services.engine.speculation_for(draft),
            )
            hidden = eos_ids - frozenset(body.stop_token_ids or ())
            checker = StopChecker(conditions, detokenizer_of(tokenizer), hidden)
            sequence = Sequence(
                f"{request_id}-{place * copies + copy}", state, checker, labels, deadline, body.priority
            )
            sequence.prefers_private = body.draft == "private" and draft != "lookup"
            if not services.engine.fits(sequence):
                raise ContextLengthError(
                    f"{len(prompt)} prompt tokens and {max_tokens} output tokens do not fit into the server's cache",
                    param=_length_param(body),
                )
            sequences.append(sequence)
    return PreparedRequest(request_id, lease, sequences, prompts, copies, echoes)


def _draft_mode(services: Services, body: GenerationOptions, lease: Lease) -> DraftMode:
    """What drafts for this request: what it asks for, as far as it is there.

    A model without a private module has the shared draft alone. On a server without a draft the default looks drafts
    up; a draft model that was asked for by name is refused with ``InvalidRequestError``.
    """
    if body.draft in ("lookup", "none"):
        return body.draft
    if not services.loaded().can_draft:
        if "draft" in body.model_fields_set:
            raise InvalidRequestError(
                f'draft is "{body.draft}"; this server runs without a draft model, so leave it out or give "lookup" or '
                '"none"',
                param="draft",
            )
        return "lookup"
    return "private" if body.draft == "private" and lease.private is not None else "shared"


def _length_param(body: GenerationOptions) -> str:
    if isinstance(body, ChatCompletionRequest):
        return "max_completion_tokens" if body.max_completion_tokens is not None else "messages"
    return "max_tokens" if body.max_tokens is not None else "prompt"


def _max_tokens(
    body: CompletionRequest | ChatCompletionRequest,
    prompt: list[int],
    vocab_size: int,
    max_model_len: int,
    chat_max_tokens: int,
) -> int:
    """The most tokens that this prompt may be continued by: cache for all of them is reserved at admission."""
    is_chat = isinstance(body, ChatCompletionRequest)
    prompt_param = "messages" if is_chat else "prompt"
    if not prompt:
        raise InvalidRequestError(
            f"{prompt_param} is empty; at least one token is needed", param=prompt_param
        )
    if max(prompt) >= vocab_size:
        raise InvalidRequestError(
            f"{prompt_param} has the token id {max(prompt)}; the vocabulary ends at {vocab_size - 1}",
            param=prompt_param,
        )
    room = max_model_len - len(prompt)
    if room < 1:
        raise ContextLengthError(
            f"{prompt_param} has {len(prompt)} tokens; the model holds {max_model_len}, one of them for output",
            param=prompt_param,
        )
    wanted = body.max_tokens
    if isinstance(body, ChatCompletionRequest) and body.max_completion_tokens is not None:
        wanted = body.max_completion_tokens
    if wanted is None:
        wanted = min(max(chat_max_tokens, body.min_tokens) if is_chat else DEFAULT_COMPLETION_TOKENS, room)
    elif wanted > room:
        raise ContextLengthError(
            f"{len(prompt)} prompt tokens and {wanted} output tokens are more than the model's {max_model_len}",
            param=_length_param(body),
        )
    if body.min_tokens > wanted:
        raise InvalidRequestError(
            f"min_tokens is {body.min_tokens}; it must not be above the limit of {wanted} tokens",
            param="min_tokens",
        )
    return wanted


def _check_limits(services: Services, body: CompletionRequest | ChatCompletionRequest) -> None:
    settings = services.settings
    if len(body.stop_strings) > settings.max_stop_strings:
        raise InvalidRequestError(
            f"stop has {len(body.stop_strings)} strings; at most {settings.max_stop_strings} are taken",
            param="stop",
        )
    if (body.num_logprobs or 0) > settings.max_logprobs:
        raise InvalidRequestError(
            f"{body.num_logprobs} log-probabilities per token are asked for; the most is {settings.max_logprobs}",
            param="logprobs" if isinstance(body, CompletionRequest) else "top_logprobs",
        )
    if body.logit_bias is not None and len(body.logit_bias) > 1024:
        raise InvalidRequestError(
            f"logit_bias has {len(body.logit_bias)} entries; at most 1024 are taken", param="logit_bias"
        )


def _sampling(
    body: CompletionRequest | ChatCompletionRequest, conditions: StopConditions, vocab_size: int, copy: int
) -> SamplingParams:
    bias = {int(token_id): value for token_id, value in (body.logit_bias or {}).items()}
    for param, token_ids in (("logit_bias", list(bias)), ("stop_token_ids", body.stop_token_ids or [])):
        if outside := [token_id for token_id in token_ids if token_id >= vocab_size]:
            raise InvalidRequestError(
                f"{param} names the token {min(outside)}; the vocabulary ends at {vocab_size - 1}",
                param=param,
            )
    # Copies of one prompt must differ, and each must be reproducible: the seed moves on by one.
    seed = None if body.seed is None else _wrapped(body.seed + copy)
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=bias,
        min_tokens=body.min_tokens,
        stop_ids=tuple(sorted(conditions.stop_token_ids)),
        seed=seed,
        num_logprobs=body.num_logprobs,
    )


def _wrapped(seed: int) -> int:
    """Into the range of signed 64-bit integers."""
    return (seed + 2**63) % 2**64 - 2**63
