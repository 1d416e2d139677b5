"""From a GGUF file's metadata to ``ModelConfig``."""

import torch
from gguf.constants import TokenType

from eda.errors import UnsupportedModelError
from eda.formats.config import ModelConfig, RopeConfig
from eda.formats.gguf_file.header import GgufHeader

# llama.cpp's converter writes Mistral as "llama" too; both compute the same.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
TOKENS = "tokenizer.ggml.tokens"
TOKEN_TYPES = "tokenizer.ggml.token_type"
EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
ROPE_DIVISORS = "rope_freqs.weight"

_MAX_POSITIONS = 1 << 24  # the longest context that models claim today is 10 million
_MAX_SIZE = 1 << 24
_LAYER_TENSORS = 9  # weights that every layer of these architectures has
# Keys that change what a model of these architectures computes, with the values that change nothing.
_WITHOUT_EFFECT: dict[str, tuple[float, ...]] = {
    "expert_count": (0,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.causal": (True,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}
_END_IDS = (
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
)
# Control tokens that end a turn or a text in the models of these architectures. Files often name only one of them.
_END_TOKENS = frozenset(
    {"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>"}
)


def read_config(header: GgufHeader, rope_divisors: tuple[float, ...] | None = None) -> ModelConfig:
    """The configuration that ``header`` states.

    Args:
        rope_divisors: the values of the tensor ``rope_freqs.weight``, where the file has one.

    Raises:
        CheckpointError: a field is missing, of another type, or contradicts others.
        UnsupportedModelError: an architecture or a feature that is not implemented.
    """
    name = header.string("general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{header.path}: general.architecture is {name[:100]!r}; supported are {', '.join(ARCHITECTURES)} "
            "(Mistral is written as llama)"
        )
    _refuse_unsupported(header, name)
    # Before anything is made for each layer.
    most_layers = max(1, len(header.tensors) // _LAYER_TENSORS)
    num_layers = header.integer(f"{name}.block_count", 1, most_layers)
    hidden_size = header.integer(f"{name}.embedding_length", 1, _MAX_SIZE)
    num_heads = header.integer(f"{name}.attention.head_count", 1, hidden_size)
    num_kv_heads = header.integer(f"{name}.attention.head_count_kv", 1, num_heads, num_heads)
    if num_heads % num_kv_heads:
        raise header.error(
            f"{name}.attention.head_count_kv", num_kv_heads, f"a divisor of the {num_heads} heads is needed"
        )
    max_positions = header.integer(f"{name}.context_length", 1, _MAX_POSITIONS)
    head_dim = _head_dim(header, name, hidden_size, num_heads)
    has = header.tensors.__contains__
    return ModelConfig(
        architecture=ARCHITECTURES[name],
        vocab_size=_vocab_size(header, name),
        hidden_size=hidden_size,
        intermediate_size=header.integer(f"{name}.feed_forward_length", 1, _MAX_SIZE),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=header.number(f"{name}.attention.layer_norm_rms_epsilon", 1e-12, 1.0),
        rope=_rope(header, name, max_positions, head_dim, rope_divisors),
        layer_windows=(_window(header, name, max_positions),) * num_layers,
        qkv_bias=name == "qwen2" or has("blk.0.attn_q.bias"),
        output_bias=has("blk.0.attn_output.bias"),
        mlp_bias=has("blk.0.ffn_gate.bias"),
        qk_norm=name == "qwen3",
        tie_word_embeddings=not has(HEAD),
        max_position_embeddings=max_positions,
        eos_token_ids=_end_ids(header),
        dtype=torch.float32,
    )


def _refuse_unsupported(header: GgufHeader, name: str) -> None:
    for key, harmless in _WITHOUT_EFFECT.items():
        value = header.fields.get(f"{name}.{key}")
        if value is not None and not any(value is other or value == other for other in harmless):
            raise UnsupportedModelError(str(header.error(f"{name}.{key}", value, "this is not implemented")))
    if header.integer("split.count", 0, 1 << 16, 0) > 1:
        raise UnsupportedModelError(
            f"{header.path} is one part of several (split.count); one whole file is needed: llama-gguf-split --merge"
        )


def _head_dim(header: GgufHeader, name: str, hidden_size: int, num_heads: int) -> int:
    own = header.integer(f"{name}.attention.key_length", 2, _MAX_SIZE, max(2, hidden_size // num_heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        found = header.integer(f"{name}.{key}", 1, _MAX_SIZE, own)
        if found != own:
            raise UnsupportedModelError(
                str(header.error(f"{name}.{key}", found, f"the head's size, {own}, is supported"))
            )
    if own % 2:
        raise header.error(f"{name}.attention.key_length", own, "an even number is needed")
    return own


def _vocab_size(header: GgufHeader, name: str) -> int:
    """The embedding's rows, which the tokens must match where the file has any."""
    if EMBEDDING not in header.tensors:
        raise header.error(f"tensor {EMBEDDING}", "missing", "every model has one")
    size = header.tensors[EMBEDDING].shape[0]
    if TOKENS in header.fields and len(header.strings(TOKENS)) != size:
        raise header.error(TOKENS, f"{len(header.strings(TOKENS))} tokens", f"{EMBEDDING} has {size} rows")
    return header.integer(f"{name}.vocab_size", size, size, size)


def _window(header: GgufHeader, name: str, max_positions: int) -> int | None:
    key = f"{name}.attention.sliding_window"
    window = header.integer(key, 0, 1 << 32, 0)
    if window == 0 or window >= max_positions:
        return None
    if name == "llama" and f"{key}_pattern" not in header.fields:
        return window
    raise UnsupportedModelError(str(header.error(key, window, "windows of some layers are not implemented")))


def _rope(
    header: GgufHeader, name: str, max_positions: int, head_dim: int, divisors: tuple[float, ...] | None
) -> RopeConfig:
    theta = header.number(f"{name}.rope.freq_base", 1.0, 1e12, 10_000.0)
    factor = header.number(
        f"{name}.rope.scaling.factor",
        0.0,
        1e6,
        header.number(f"{name}.rope.scale_linear", 0.0, 1e6, 1.0),  # the key's older name
    )
    kind = header.string(f"{name}.rope.scaling.type", "linear" if factor not in (0.0, 1.0) else "none")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(
            str(
                header.error(
                    f"{name}.rope.scaling.type", repr(kind), "supported are 'none', 'linear' and 'yarn'"
                )
            )
        )
    if kind == "none" or factor in (0.0, 1.0):
        if divisors is None:
            return RopeConfig.default(theta=theta, max_position_embeddings=max_positions)
        if len(divisors) != head_dim // 2:
            raise header.error(
                f"tensor {ROPE_DIVISORS}",
                f"{len(divisors)} values",
                f"{head_dim // 2} are needed, half a head",
            )
        return RopeConfig("divided", theta, max_positions, {"divisors": divisors})
    if divisors is not None:
        raise UnsupportedModelError(
            f"{header.path} has {name}.rope.scaling.type {kind!r} and the tensor {ROPE_DIVISORS}; one is supported"
        )
    parameters: dict[str, float] = {"factor": factor}
    if kind == "yarn":
        parameters["original_max_position_embeddings"] = header.integer(
            f"{name}.rope.scaling.original_context_length", 1, _MAX_POSITIONS, max_positions
        )
        for key in ("beta_fast", "beta_slow"):
            if f"{name}.rope.scaling.yarn_{key}" in header.fields:
                parameters[key] = header.number(f"{name}.rope.scaling.yarn_{key}", 1e-3, 1e6)
    return RopeConfig(kind, theta, max_positions, parameters)


def _end_ids(header: GgufHeader) -> tuple[int, ...]:
    """The tokens that end an output: those that the file names, then control tokens with a name that says so."""
    if TOKENS not in header.fields:
        last = (1 << 31) - 1
        return tuple(header.integer(key, 0, last) for key in _END_IDS if key in header.fields)
    tokens = header.strings(TOKENS)
    ids = [header.integer(key, 0, len(tokens) - 1) for key in _END_IDS if key in header.fields]
    kinds = header.numbers(TOKEN_TYPES, len(tokens))
    if kinds is not None:
        controls = (kinds == TokenType.CONTROL).nonzero()[0].tolist()
        ids += [token_id for token_id in controls if tokens[token_id] in _END_TOKENS]
    return tuple(dict.fromkeys(ids))
