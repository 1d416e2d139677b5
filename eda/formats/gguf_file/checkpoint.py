"""The weights of a GGUF file, by the names and in the order of Hugging Face's checkpoints."""

import logging
from collections import Counter
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor

from eda.errors import CheckpointError, UnsupportedModelError
from eda.formats.checkpoint import layer_projections
from eda.formats.checkpoint_files import TensorEntry, listed
from eda.formats.config import ModelConfig
from eda.formats.gguf_file.config import EMBEDDING, HEAD, ROPE_DIVISORS, read_config
from eda.formats.gguf_file.header import GgufHeader
from eda.formats.quantised import GROUP, QuantisedWeight, concatenated, quantised

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_KEPT = ("Q8_0", "Q4_0", "Q4_1")
_CONVERTED = (
    *("Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4"),
)
SUPPORTED_TYPES = (*_FLOATS, *_KEPT, *_CONVERTED)
_ROWS_AT_ONCE = 4096  # so that the float32 values of a whole embedding are never there at once
_GREATEST_SCALE = 8188.0  # of Q4_0: eight times it is the greatest float16

_OUTSIDE_LAYERS = {
    "model.embed_tokens.weight": EMBEDDING,
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": HEAD,
}
_IN_LAYERS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

_logger = logging.getLogger(__name__)


class GgufCheckpoint:
    """The tensors of one GGUF file. Reads on demand; opening checks that all are there in the right shapes.

    Q4_0, Q4_1, Q8_0 and floats keep their values exactly. Other quantised matrices become 8 bits in groups of 32.
    """

    def __init__(self, header: GgufHeader, config: ModelConfig) -> None:
        self.path = header.path
        self.header = header
        self.config = config
        expected = _expected(config)
        self._names = {own: name for name, (own, _) in expected.items()}
        _check_tensors(header, expected)
        self.entries: dict[str, TensorEntry] = {
            self._names.get(own, own): entry for own, entry in header.tensors.items() if own != ROPE_DIVISORS
        }
        """By the names of Hugging Face's checkpoints."""

    @classmethod
    def open(cls, path: Path) -> "GgufCheckpoint":
        """Reads the header and checks it against itself.

        Raises:
            CheckpointError: no sound GGUF file; fields or tensors are missing or contradict each other.
            UnsupportedModelError: an architecture, a feature or a type that is not implemented.
        """
        header = GgufHeader.read(path)
        checkpoint = cls(header, read_config(header, _rope_divisors(header)))
        converted = Counter(entry.dtype for entry in checkpoint.entries.values() if entry.dtype in _CONVERTED)
        if converted:
            kinds = ", ".join(f"{count} of {kind}" for kind, count in sorted(converted.items()))
            _logger.info("%s: tensors converted to 8 bits in groups of %d: %s", path, GROUP, kinds)
        return checkpoint

    @cached_property
    def _row_orders(self) -> dict[str, Tensor]:
        """The rows of query and key projections in Hugging Face's order, by the ends of their names."""
        config = self.config
        if config.architecture != "LlamaForCausalLM":
            return {}
        return {
            "self_attn.q_proj": _separated_halves(config.num_heads, config.head_dim),
            "self_attn.k_proj": _separated_halves(config.num_kv_heads, config.head_dim),
        }

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name`` on the CPU: floats in their stored type, others as float32.

        Raises ``CheckpointError`` when it is missing or cannot be read.
        """
        weight = self.quantised(name)
        if weight is not None:
            return weight.dequantised()
        entry = self.entries[name]
        if entry.dtype in _FLOATS:
            values = torch.from_numpy(_stored(entry)).view(_FLOATS[entry.dtype]).view(entry.shape)
        else:
            values = torch.from_numpy(dequantize(_stored(entry), GGMLQuantizationType[entry.dtype]))
        order = self._order(name)
        return values if order is None else values[order]

    def quantised(self, name: str) -> QuantisedWeight | None:
        """The matrix ``name`` in 8 or 4 bits, in the row order of ``tensor``; ``None`` for floats and vectors.

        Raises ``CheckpointError`` when it is missing or cannot be read.
        """
        if name not in self.entries:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        if not self.is_quantised(name):
            return None
        entry = self.entries[name]
        stored, order = _stored(entry), self._order(name)
        if order is not None:
            stored = stored[order.numpy()]
        return _kept(entry, stored) if entry.dtype in _KEPT else _converted(entry, stored)

    def is_quantised(self, name: str) -> bool:
        """See ``WeightSource``."""
        entry = self.entries[name]
        return entry.dtype not in _FLOATS and len(entry.shape) == 2

    def _order(self, name: str) -> Tensor | None:
        parts = name.split(".")
        return self._row_orders.get(".".join(parts[3:-1]))


def _expected(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """By Hugging Face's names: the file's own name, and the shape that ``config`` asks for."""
    matrix = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": matrix,
        "model.norm.weight": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = matrix
    expected = {name: (_OUTSIDE_LAYERS[name], shape) for name, shape in shapes.items()}
    inside: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (config.hidden_size,),
        "post_attention_layernorm.weight": (config.hidden_size,),
    }
    if config.qk_norm:
        inside |= {f"self_attn.{part}_norm.weight": (config.head_dim,) for part in "qk"}
    has_bias = {
        "qkv": config.qkv_bias,
        "output": config.output_bias,
        "gate_up": config.mlp_bias,
        "down": config.mlp_bias,
    }
    for name, projection in layer_projections(config).items():
        inside[f"{name}.weight"] = (projection.out_size, projection.in_size)
        if has_bias[projection.fused]:
            inside[f"{name}.bias"] = (projection.out_size,)
    for layer in range(config.num_layers):
        for name, shape in inside.items():
            stem, _, kind = name.rpartition(".")
            expected[f"model.layers.{layer}.{name}"] = (f"blk.{layer}.{_IN_LAYERS[stem]}.{kind}", shape)
    return expected


def _check_tensors(header: GgufHeader, expected: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    shapes = dict(expected.values())
    missing = [own for own in shapes if own not in header.tensors]
    unknown = [own for own in header.tensors if own not in shapes and own != ROPE_DIVISORS]
    if missing or unknown:
        parts = [f"missing: {listed(missing)}"] if missing else []
        parts += [f"without use in this architecture: {listed(unknown)}"] if unknown else []
        raise CheckpointError(f"{header.path} does not hold the tensors of its metadata; {'; '.join(parts)}")
    misshapen = [
        f"{own} is {list(header.tensors[own].shape)}, the metadata asks for {list(shape)}"
        for own, shape in shapes.items()
        if header.tensors[own].shape != shape
    ]
    if misshapen:
        raise CheckpointError(f"{header.path} has misshapen tensors: {listed(misshapen)}")
    odd = [
        f"{own} is {entry.dtype}"
        for own, entry in header.tensors.items()
        if entry.dtype not in SUPPORTED_TYPES
    ]
    if odd:
        raise UnsupportedModelError(
            f"{header.path} has tensors of types that are not supported: {listed(odd)}; supported are "
            f"{', '.join(SUPPORTED_TYPES)}"
        )


def _rope_divisors(header: GgufHeader) -> tuple[float, ...] | None:
    """What each rotary frequency is divided by: llama.cpp's form of Llama 3's scaling."""
    entry = header.tensors.get(ROPE_DIVISORS)
    if entry is None:
        return None
    if entry.dtype != "F32" or len(entry.shape) != 1 or entry.shape[0] > 4096:
        raise header.error(
            f"tensor {ROPE_DIVISORS}",
            f"{entry.dtype} {list(entry.shape)}",
            "F32, one value per frequency, is needed",
        )
    divisors = tuple(_stored(entry).view(np.float32).tolist())
    if not all(0 < divisor < float("inf") for divisor in divisors):
        raise header.error(f"tensor {ROPE_DIVISORS}", divisors, "positive numbers are needed")
    return divisors


def _separated_halves(num_heads: int, head_dim: int) -> Tensor:
    """Where each row of a Hugging Face projection lies in llama.cpp's.

    Hugging Face rotates element ``i`` of a head with ``i + head_dim / 2``; llama.cpp stores these as neighbours.
    """
    rows = torch.arange(num_heads * head_dim).view(num_heads, head_dim // 2, 2)
    return rows.transpose(1, 2).reshape(-1)


def _stored(entry: TensorEntry) -> NDArray[np.uint8]:
    """The bytes of a tensor, ``[..., bytes of a row]``."""
    try:
        content = np.fromfile(entry.file, np.uint8, entry.end - entry.start, offset=entry.start)
    except OSError as error:
        raise CheckpointError(f"{entry.file} cannot be read: {error}") from error
    if content.size != entry.end - entry.start:
        raise CheckpointError(f"{entry.file} is cut off: it has become shorter since it was opened")
    return content.reshape(*entry.shape[:-1], -1)


def _kept(entry: TensorEntry, rows: NDArray[np.uint8]) -> QuantisedWeight:
    """The layouts are those of ``block_q8_0``, ``block_q4_0`` and ``block_q4_1`` in ggml-common.h.

    In numpy: torch's threads would take longer to meet than such copies last, where other processes want the cores.
    """
    n, k = entry.shape
    blocks = rows.reshape(n, k // GROUP, -1)
    scales = _halves(blocks[..., :2])
    if entry.dtype == "Q8_0":
        values = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
        return QuantisedWeight("int8", torch.from_numpy(values).view(n, k), scales, None)
    pairs, nibbles = blocks[..., -GROUP // 2 :], np.empty((n, k // GROUP, GROUP), np.uint8)
    np.bitwise_and(pairs, 0x0F, out=nibbles[..., : GROUP // 2])
    np.right_shift(pairs, 4, out=nibbles[..., GROUP // 2 :])
    steps = torch.from_numpy(nibbles).view(n, k)
    if entry.dtype == "Q4_1":
        return QuantisedWeight("int4", steps, scales, _halves(blocks[..., 2:4]))
    if scales.float().abs().max() > _GREATEST_SCALE:
        raise CheckpointError(
            f"{entry.file}: a Q4_0 tensor has a scale of {scales.float().abs().max().item():g}; at most "
            f"{_GREATEST_SCALE:g} is supported"
        )
    return QuantisedWeight("int4", steps, scales, scales * -8)


def _halves(pairs: NDArray[np.uint8]) -> Tensor:
    """Float16 numbers of ``[n, groups, 2]`` bytes."""
    return torch.from_numpy(np.ascontiguousarray(pairs).view(np.float16)).squeeze(-1)


def _converted(entry: TensorEntry, rows: NDArray[np.uint8]) -> QuantisedWeight:
    kind = GGMLQuantizationType[entry.dtype]
    parts = [
        quantised(torch.from_numpy(dequantize(rows[first : first + _ROWS_AT_ONCE], kind)), "int8")
        for first in range(0, rows.shape[0], _ROWS_AT_ONCE)
    ]
    return concatenated(parts)
