"""Sizes and switches of a target: its ``config.json`` in one vocabulary for all architectures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eda.errors import CheckpointError, UnsupportedModelError
from eda.formats.checkpoint_files import read_json
from eda.formats.config_fields import (
    MODEL_TYPES,
    end_tokens,
    read_fields,
)


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
        architecture, fields = read_fields(path)
        # Its configuration classes know each architecture's defaults and the older spellings of a field. It takes as
        # long to import as torch, so it is imported when a checkpoint is read.
        from transformers import CONFIG_MAPPING

        try:
            config: Any = CONFIG_MAPPING[MODEL_TYPES[architecture]].from_dict(fields)
            rope = _rope(config)
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
        if len(windows) != config.num_hidden_layers:
            raise CheckpointError(
                f"{path / 'config.json'} has {len(windows)} layer_types; num_hidden_layers is "
                f"{config.num_hidden_layers}"
            )
        if head_dim < 4 or head_dim % 2:
            raise CheckpointError(
                f"{path / 'config.json'} has heads of width {head_dim}; an even number from 4 on is needed"
            )
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
            rope=rope,
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
    stated, place = config.eos_token_id, path / "config.json"
    generation = path / "generation_config.json"
    if generation.exists():
        stated, place = read_json(generation).get("eos_token_id", stated), generation
    return end_tokens(stated, config.vocab_size, place)
