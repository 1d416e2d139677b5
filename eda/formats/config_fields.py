"""The fields of a target's ``config.json``, each checked before anything is built from it; needs no torch."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eda.errors import CheckpointError, UnsupportedModelError
from eda.formats.checkpoint_files import CONFIG_FILE, TensorEntry, read_json

MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""transformers' model type of each architecture that is implemented."""
SUPPORTED_ARCHITECTURES = tuple(MODEL_TYPES)
SUPPORTED_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
MAX_EOS_TOKENS = 1024

SIZE_LIMITS = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 4096,
    "max_position_embeddings": 1 << 24,
    "sliding_window": 1 << 31,
    "max_window_layers": 1 << 31,
}
"""Largest values that are read: above those of any model, and small enough for what is built from them."""
_OPTIONAL = ("num_key_value_heads", "head_dim", "sliding_window", "max_window_layers")
_SWITCHES = ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window")
_ROPE_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta")
_OTHERS = ("hidden_act", "rms_norm_eps", "layer_types", "eos_token_id", "dtype", "torch_dtype")
_ROPE_NUMBERS = (
    *("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
)
_ROPE_LIMIT = 1e12
_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")


def read_fields(path: Path) -> tuple[str, dict[str, Any]]:
    """Architecture and fields of the directory ``path``; those that decide nothing here are left out.

    Raises:
        CheckpointError: ``config.json`` is missing, not JSON, or a field has a value that cannot be meant.
        UnsupportedModelError: an architecture, rope type or quantisation is not implemented.
    """
    place = path / CONFIG_FILE
    raw = read_json(place)
    architecture = _architecture(raw, path)
    _refuse_unsupported(raw, path)
    known = (*SIZE_LIMITS, *_SWITCHES, *_ROPE_FIELDS, *_OTHERS)
    fields = {
        name: raw[name] for name in known if name in raw and not (raw[name] is None and name in _ROPE_FIELDS)
    }
    for name, limit in SIZE_LIMITS.items():
        if name in fields and not (fields[name] is None and name in _OPTIONAL):
            _require_size(fields[name], name, limit, place, least=0 if name == "max_window_layers" else 1)
    for name in _SWITCHES:
        if fields.get(name) not in (None, True, False):
            raise CheckpointError(f"{place}: {name} is {_shown(fields[name])}; it must be true or false")
    _require_number(fields.get("rms_norm_eps", 1e-6), "rms_norm_eps", place, least=0.0, limit=1.0)
    if fields.get("rope_theta") is not None:
        _require_number(fields["rope_theta"], "rope_theta", place)
    for name in ("rope_parameters", "rope_scaling"):
        if fields.get(name) is not None:
            fields[name] = _rope_fields(fields[name], name, place)
    types = fields.get("layer_types")
    if types is not None and (
        not isinstance(types, list)
        or len(types) > SIZE_LIMITS["num_hidden_layers"]
        or not all(kind in ("full_attention", "sliding_attention") for kind in types)
    ):
        raise CheckpointError(
            f"{place}: layer_types is {_shown(types)}; a list of 'full_attention' and 'sliding_attention' is needed"
        )
    for name in ("dtype", "torch_dtype", "hidden_act"):
        if not isinstance(fields.get(name, ""), str | None):
            raise CheckpointError(f"{place}: {name} is {_shown(fields[name])}; a string is needed")
    end_tokens(fields.get("eos_token_id"), fields.get("vocab_size"), place)
    return architecture, fields


def end_tokens(stated: Any, vocab_size: int | None, place: Path) -> tuple[int, ...]:
    """The ids of ``eos_token_id``: one, several or none. Those beyond the vocabulary, which never come, are left out.

    Raises ``CheckpointError`` for what are no ids.
    """
    ids = [] if stated is None else stated if isinstance(stated, list) else [stated]
    if len(ids) > MAX_EOS_TOKENS or not all(type(token) is int for token in ids):
        raise CheckpointError(f"{place}: eos_token_id is {_shown(stated)}; ids of tokens are needed")
    return tuple(token for token in ids if 0 <= token < (vocab_size or SIZE_LIMITS["vocab_size"]))


def require_sizes(path: Path, fields: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> None:
    """Raises ``CheckpointError`` where the weights' headers contradict the sizes that the configuration states."""
    layers = {int(match[1]) for match in map(_LAYER.match, entries) if match}
    stated = fields.get("num_hidden_layers")
    if stated is not None and layers and max(layers) + 1 != stated and len(layers) != stated:
        raise CheckpointError(
            f"{path / CONFIG_FILE} says num_hidden_layers {stated}; the weights have {len(layers)} layers"
        )
    heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
    width = fields.get("head_dim") or (hidden // heads if hidden and heads else None)
    key_heads = fields.get("num_key_value_heads") or heads
    prefix = f"model.layers.{min(layers, default=0)}."
    expected = {
        "model.embed_tokens.weight": (fields.get("vocab_size"), hidden),
        f"{prefix}self_attn.q_proj.weight": (heads and width and heads * width, hidden),
        f"{prefix}self_attn.k_proj.weight": (key_heads and width and key_heads * width, hidden),
        f"{prefix}mlp.gate_proj.weight": (fields.get("intermediate_size"), hidden),
    }
    for name, shape in expected.items():
        entry = entries.get(name)
        if entry is None:
            continue  # what is missing is told with everything else that is
        if len(entry.shape) != 2 or any(
            wanted not in (None, found) for wanted, found in zip(shape, entry.shape, strict=True)
        ):
            raise CheckpointError(
                f"{path} has misshapen tensors: {name} is {list(entry.shape)}, its config asks for {list(shape)}"
            )


def _architecture(raw: Mapping[str, Any], path: Path) -> str:
    named = raw.get("architectures")
    if not named:
        kind, by_model_type = raw.get("model_type"), {value: name for name, value in MODEL_TYPES.items()}
        named = [
            by_model_type.get(kind, f"model_type {_shown(kind)}") if isinstance(kind, str) else _shown(kind)
        ]
    if not isinstance(named, list):
        named = [named]
    for name in named:
        if name in SUPPORTED_ARCHITECTURES:
            return str(name)
    shown = ", ".join(name if isinstance(name, str) else repr(name) for name in named[:4])
    raise UnsupportedModelError(
        f"{path} holds {shown[:200]}; supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
    )


def _refuse_unsupported(raw: Mapping[str, Any], path: Path) -> None:
    """Before the config classes look: they would complain about the parameters of a rope type, not its name."""
    quantization = raw.get("quantization_config")
    if quantization:
        method = (
            quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        )
        raise UnsupportedModelError(
            f"{path} is quantised ({str(method)[:80]}); supported are float32, bfloat16 and float16 weights"
        )
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise UnsupportedModelError(
            f"{path} has the rope type {_shown(rope_type)}; supported are {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    partial = (isinstance(rope, dict) and rope.get("partial_rotary_factor")) or raw.get(
        "partial_rotary_factor"
    )
    if partial not in (None, 1.0):
        raise UnsupportedModelError(f"{path} has partial_rotary_factor {_shown(partial)}; supported is 1.0")


def _rope_fields(given: Any, name: str, place: Path) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise CheckpointError(f"{place}: {name} is {_shown(given)}; an object is needed")
    numbers = ("rope_theta", "partial_rotary_factor", *_ROPE_NUMBERS)
    fields = {field: given.get(field) for field in ("rope_type", "type", "truncate", *numbers)}
    fields = {field: value for field, value in fields.items() if value is not None}
    if fields.get("rope_type", fields.get("type", "default")) != "default" and fields.get("factor") is None:
        raise CheckpointError(f"{place}: {name} has no factor, which its type needs")
    for field in numbers:
        if fields.get(field) is not None:
            _require_number(fields[field], f"{name}.{field}", place)
    if fields.get("truncate") not in (None, True, False):
        raise CheckpointError(
            f"{place}: {name}.truncate is {_shown(fields['truncate'])}; it must be true or false"
        )
    return fields


def _require_size(value: Any, name: str, limit: int, place: Path, *, least: int = 1) -> None:
    if type(value) is not int or not least <= value <= limit:
        raise CheckpointError(
            f"{place}: {name} is {_shown(value)}; a whole number from {least} to {limit} is needed"
        )


def _require_number(
    value: Any, name: str, place: Path, *, least: float = 1e-9, limit: float = _ROPE_LIMIT
) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= limit:
        raise CheckpointError(
            f"{place}: {name} is {_shown(value)}; a number from {least:g} to {limit:g} is needed"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
