"""Sizes and switches of a target: its ``config.json`` in one vocabulary for all architectures."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from eda.errors import CheckpointError, UnsupportedModelError

# The configuration classes know each architecture's defaults and the older spellings of a field.
_CONFIG_CLASSES: dict[str, Any] = {
    "LlamaForCausalLM": LlamaConfig,
    "MistralForCausalLM": MistralConfig,
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
}
SUPPORTED_ARCHITECTURES = tuple(_CONFIG_CLASSES)
SUPPORTED_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding of a model."""

    type: str
    """One of ``SUPPORTED_ROPE_TYPES``, or ``divided``: each frequency by its own of the parameter ``divisors``."""
    theta: float
    max_position_embeddings: int
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The type's own parameters as the checkpoint states them (``factor`` and the like)."""

    @classmethod
    def default(cls, *, theta: float, max_position_embeddings: int) -> "RopeConfig":
        """Plain rotary embedding without any scaling."""
        return cls(type="default", theta=theta, max_position_embeddings=max_position_embeddings)

    @property
    def is_dynamic(self) -> bool:
        """Whether frequencies depend on the length of the sequence and not on the position alone."""
        return self.type == "dynamic"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and switches of a decoder-only target. Sizes count elements."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    layer_windows: tuple[int | None, ...]
    """Per layer: how many positions back a token sees, itself included; ``None`` sees all."""
    qkv_bias: bool
    output_bias: bool
    """Bias of the projection that follows attention."""
    mlp_bias: bool
    qk_norm: bool
    """Whether queries and keys are normalised per head before they are rotated."""
    tie_word_embeddings: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    """The type that the checkpoint states for its weights."""

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @classmethod
    def from_directory(cls, path: Path) -> "ModelConfig":
        """Reads ``config.json`` and, for the end-of-sequence tokens, ``generation_config.json``.

        Raises:
            CheckpointError: a file is missing, not JSON, or its values contradict each other.
            UnsupportedModelError: an architecture, rope type, activation or quantisation is not implemented.
        """
        path = Path(path)
        raw = read_json(path / "config.json")
        architecture = _architecture(raw, path)
        _refuse_unsupported(raw, path)
        try:
            config = _CONFIG_CLASSES[architecture].from_dict(dict(raw))
        except Exception as error:  # the validators of transformers raise many types
            raise CheckpointError(
                f"{path / 'config.json'} is not a valid {architecture} config: {error}"
            ) from error
        if config.hidden_act != "silu":
            raise UnsupportedModelError(
                f"{path} has the activation {config.hidden_act!r}; supported is 'silu'"
            )
        is_qwen = architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
        attention_bias = bool(getattr(config, "attention_bias", False))
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if config.num_attention_heads % config.num_key_value_heads:
            raise CheckpointError(
                f"{path / 'config.json'} has {config.num_attention_heads} attention heads and "
                f"{config.num_key_value_heads} key/value heads; the first must be a multiple of the second"
            )
        windows: tuple[int | None, ...]
        if is_qwen:
            windows = tuple(
                config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types
            )
        else:
            windows = (getattr(config, "sliding_window", None),) * config.num_hidden_layers
        return cls(
            architecture=architecture,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            rms_norm_eps=float(config.rms_norm_eps),
            rope=_rope(config),
            layer_windows=windows,
            qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
            output_bias=attention_bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=architecture == "Qwen3ForCausalLM",
            tie_word_embeddings=bool(config.tie_word_embeddings),
            max_position_embeddings=config.max_position_embeddings,
            eos_token_ids=_eos_token_ids(path, config),
            dtype=config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32,
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises ``CheckpointError`` when it is missing or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; a model directory needs one") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}; an object was expected")
    return content


def _architecture(raw: Mapping[str, Any], path: Path) -> str:
    named = raw.get("architectures")
    if not named:
        by_model_type = {config.model_type: name for name, config in _CONFIG_CLASSES.items()}
        named = [by_model_type.get(raw.get("model_type", ""), f"model_type {raw.get('model_type')!r}")]
    for name in named:
        if name in _CONFIG_CLASSES:
            return str(name)
    raise UnsupportedModelError(
        f"{path} holds {', '.join(map(str, named))}; supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
    )


def _refuse_unsupported(raw: Mapping[str, Any], path: Path) -> None:
    """Before the config classes look: they would complain about the parameters of a rope type, not its name."""
    quantization = raw.get("quantization_config")
    if quantization:
        method = (
            quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        )
        raise UnsupportedModelError(
            f"{path} is quantised ({method}); supported are float32, bfloat16 and float16 weights"
        )
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise UnsupportedModelError(
            f"{path} has the rope type {rope_type!r}; supported are {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    partial = (isinstance(rope, dict) and rope.get("partial_rotary_factor")) or raw.get(
        "partial_rotary_factor"
    )
    if partial not in (None, 1.0):
        raise UnsupportedModelError(f"{path} has partial_rotary_factor {partial}; supported is 1.0")


def _rope(config: Any) -> RopeConfig:
    parameters = dict(config.rope_parameters)
    parameters.pop("type", None)  # older spelling of rope_type; both may be present
    return RopeConfig(
        type=parameters.pop("rope_type"),
        theta=float(parameters.pop("rope_theta")),
        max_position_embeddings=config.max_position_embeddings,
        parameters=parameters,
    )


def _eos_token_ids(path: Path, config: Any) -> tuple[int, ...]:
    """The generation config wins: chat models list their end-of-turn token there only."""
    stated = config.eos_token_id
    generation = path / "generation_config.json"
    if generation.exists():
        stated = read_json(generation).get("eos_token_id", stated)
    if stated is None:
        return ()
    return (stated,) if isinstance(stated, int) else tuple(stated)
