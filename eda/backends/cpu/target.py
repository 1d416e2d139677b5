"""A target's layers and output head on the C++ passes."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from eda.backends.cpu.library import CLoraLayer, Layer, Shape, absence, kernels
from eda.backends.cpu.memory import WeightMemory
from eda.backends.cpu.threads import num_threads
from eda.backends.cpu.tokens import SegmentWeights, TokenArrays, as_pointer
from eda.backends.cpu.weights import (
    BLOCK,
    PackedLowRank,
    PackedWeight,
    WeightFormat,
    float_vector,
    packed_gate_up,
    padded_intermediate,
)
from eda.formats.config import ModelConfig
from eda.formats.quantised import QuantisedWeight
from eda.models.answers import Answer, Likeliest, Logits, Need
from eda.models.attention import PackedBatch
from eda.models.cache import KVCache
from eda.models.layers import DecoderLayer
from eda.models.lora import LoraAdapter, LoraSegment, LowRank

HEAD_SIZES = (32, 64, 128)

READ = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"),
        *("head_dim", "rms_norm_eps", "layer_windows", "qkv_bias", "output_bias", "mlp_bias", "qk_norm"),
        "max_position_embeddings",
    }
)
"""Fields of ``ModelConfig`` that the C++ passes compute by, or that ``obstacle`` looks at."""
IRRELEVANT = frozenset(
    # Rotary angles and the shared head are made in Python; the others say nothing about the layers.
    {"architecture", "rope", "tie_word_embeddings", "eos_token_ids", "dtype"}
)
"""All other fields. One that is in neither set would be computed as if it were not there; a test compares."""


def obstacle(config: ModelConfig, device: torch.device) -> str | None:
    """Why ``TargetKernel`` cannot run a model of this kind here; ``None`` where it can, in bfloat16 or less."""
    if device.type != "cpu":
        return f"the device is {device}, and they are for CPUs"
    if config.head_dim not in HEAD_SIZES:
        sizes = ", ".join(map(str, HEAD_SIZES))
        return f"the model has heads of {config.head_dim}, and they take {sizes}"
    if config.hidden_size % 16:
        return f"the model's hidden size is {config.hidden_size}, and they take multiples of 16"
    if config.mlp_bias:
        return "the model's feed-forward layers have biases"
    if any(window is not None and window < config.max_position_embeddings for window in config.layer_windows):
        return "the model has sliding windows"
    return None if kernels() is not None else absence()


@dataclass(frozen=True, slots=True, eq=False)
class KernelOutput:
    """What a pass over ``T`` tokens gives, ``N`` of them wanted."""

    hidden: Tensor
    """``[T, H]`` after the final norm."""
    features: Tensor | None
    """``[T, 3H]``: the states behind the tapped layers."""
    answer: Answer | None
    """On the wanted tokens; -1 for the likeliest where logits are not finite."""


class TargetKernel:
    """Takes over the layers of one target; their own weights may be dropped afterwards."""

    def __init__(
        self,
        config: ModelConfig,
        layers: Sequence[DecoderLayer],
        norm: Tensor,
        head: Tensor | QuantisedWeight,
        *,
        weights: WeightFormat = "bfloat16",
    ) -> None:
        """Tensors are rounded to ``weights``; layers and a head that are quantised already stay as they are."""
        library = kernels()
        assert library is not None
        self._library = library
        self._config = config
        self.weights = weights
        """What plain weights are rounded to."""
        self._memory = WeightMemory()
        self._kept: list[PackedWeight | Tensor] = []
        self._layers = (Layer * config.num_layers)(*(self._layer(layer) for layer in layers))
        self._norm = float_vector(norm)
        self._head = PackedWeight(head, format=weights, memory=self._memory)
        self._shape = Shape(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.hidden_size,
            padded_intermediate(config.intermediate_size),
            config.rms_norm_eps,
            1.0 / math.sqrt(config.head_dim),
        )
        self._loras: WeakKeyDictionary[LoraAdapter, _PackedLora] = WeakKeyDictionary()

    def _layer(self, layer: DecoderLayer) -> Layer:
        projections = layer.fused_projections()
        attention = layer.attention
        own = {name: linear.quantised or linear.weight for name, linear in projections.items()}
        format, memory = self.weights, self._memory
        weights = [
            PackedWeight(own["qkv"], format=format, memory=memory),
            PackedWeight(own["output"], format=format, memory=memory),
            packed_gate_up(own["gate_up"], self._config.intermediate_size, format=format, memory=memory),
            PackedWeight(own["down"], format=format, memory=memory),
        ]
        hidden_padded = -(-self._config.hidden_size // BLOCK) * BLOCK
        vectors: list[Tensor | None] = [
            float_vector(layer.attention_norm.weight),
            float_vector(layer.feed_forward_norm.weight),
            None
            if projections["qkv"].bias is None
            else float_vector(projections["qkv"].bias, weights[0].struct.n),
            None
            if projections["output"].bias is None
            else float_vector(projections["output"].bias, hidden_padded),
            None if attention.q_norm is None else float_vector(attention.q_norm.weight),
            None if attention.k_norm is None else float_vector(attention.k_norm.weight),
        ]
        self._kept += weights
        self._kept += [vector for vector in vectors if vector is not None]
        pointers = [0 if vector is None else vector.data_ptr() for vector in vectors]
        return Layer(*(weight.struct for weight in weights), *pointers)

    @property
    def num_bytes(self) -> int:
        """Of the weights that a pass reads."""
        return self._head.num_bytes + sum(
            part.num_bytes for part in self._kept if isinstance(part, PackedWeight)
        )

    @property
    def formats(self) -> tuple[WeightFormat, ...]:
        """The formats of the layers' weights and of the output head, each once."""
        weights = [part for part in self._kept if isinstance(part, PackedWeight)]
        return tuple(dict.fromkeys(part.format for part in [*weights, self._head]))

    def run(
        self,
        embedded: Tensor,
        batch: PackedBatch,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache,
        lora_segments: Sequence[LoraSegment],
        tap_layers: tuple[int, int, int] | None,
        wanted: Sequence[int] = (),
        *,
        need: Need = Need.LOGITS,
    ) -> "KernelOutput":
        """All layers over ``embedded [T, H]``, and the output head for the tokens in ``wanted``.

        ``cos`` and ``sin`` are float32 ``[T, head_dim]``. Where they are enough, only the likeliest tokens come back.
        """
        special = [
            SegmentWeights(segment.start, segment.end, lora=self._lora(segment.adapter).pointer)
            for segment in sorted(lora_segments, key=lambda segment: segment.start)
        ]
        tokens = TokenArrays(batch, cos, sin, cache, special)
        embedded = embedded.contiguous()
        hidden = torch.empty_like(embedded)
        features = (
            None if tap_layers is None else embedded.new_empty(embedded.shape[0], 3 * embedded.shape[1])
        )
        logits = torch.empty(len(wanted), self._config.vocab_size) if need is Need.LOGITS and wanted else None
        best = (ctypes.c_int64 * len(wanted))()
        self._library.eda_run_target(
            num_threads(),
            ctypes.byref(self._shape),
            self._layers,
            self._config.num_layers,
            as_pointer(self._norm),
            ctypes.byref(self._head.struct),
            ctypes.byref(tokens.struct),
            as_pointer(embedded),
            as_pointer(hidden),
            None if features is None else as_pointer(features),
            (ctypes.c_int32 * 3)(*(tap_layers or (0, 0, 0))),
            (ctypes.c_int32 * len(wanted))(*wanted),
            len(wanted),
            self._config.vocab_size,
            None if logits is None else as_pointer(logits),
            best,
        )
        answer: Answer | None = None
        if wanted:
            answer = Likeliest(list(best)) if logits is None else Logits(logits)
        return KernelOutput(hidden, features, answer)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 ``[N, vocab_size]`` of ``hidden [N, H]``."""
        return run_head(self._head, hidden, self._config.vocab_size)

    def change_logits(self, logits: Tensor, hidden: Tensor, segment: LoraSegment) -> None:
        """Gives the rows of ``segment`` their LoRA's own output layer, or its update of the base's.

        ``logits [N, vocab_size]`` of ``hidden [N, H]`` are changed in place. Torch's products would depend on ``N``.
        """
        rows, lora = slice(segment.start, segment.end), self._lora(segment.adapter)
        if lora.head_weight is not None:
            logits[rows] = run_head(lora.head_weight, hidden[rows], self._config.vocab_size)
        if lora.head is not None:
            a, b = lora.head
            inner = run_head(a, hidden[rows], b.struct.k).to(hidden.dtype)
            logits[rows] += run_head(b, inner, self._config.vocab_size)

    def _lora(self, adapter: LoraAdapter) -> "_PackedLora":
        found = self._loras.get(adapter)
        if found is None:
            found = self._loras[adapter] = _PackedLora(adapter, self._config, self.weights)
        return found


def run_head(head: PackedWeight, hidden: Tensor, num_outputs: int) -> Tensor:
    """Float32 ``[N, num_outputs]``: ``hidden [N, in]`` times a packed weight."""
    library = kernels()
    assert library is not None
    hidden = hidden.contiguous()
    logits = torch.empty(hidden.shape[0], num_outputs)
    library.eda_run_head(
        num_threads(),
        ctypes.byref(head.struct),
        as_pointer(hidden),
        hidden.shape[0],
        hidden.shape[1],
        num_outputs,
        as_pointer(logits),
    )
    return logits


class _PackedLora:
    """All layers' updates of one LoRA."""

    def __init__(self, adapter: LoraAdapter, config: ModelConfig, weights: WeightFormat) -> None:
        self._kept: list[PackedLowRank] = []
        qkv_size = config.query_size + 2 * config.kv_size
        self._layers = (CLoraLayer * config.num_layers)()
        for place, layer in zip(self._layers, adapter.layers, strict=True):
            for name, size in (
                ("qkv", qkv_size),
                ("output", config.hidden_size),
                ("gate_up", 2 * config.intermediate_size),
                ("down", config.hidden_size),
            ):
                update: LowRank | None = getattr(layer, name)
                if update is not None:
                    packed = _packed_low_rank(update, size, config if name == "gate_up" else None)
                    self._kept.append(packed)
                    setattr(place, name, packed.struct)
        self.pointer = ctypes.addressof(self._layers)
        self.head_weight: PackedWeight | None = None
        """Of an output layer of its own."""
        self.head: tuple[PackedWeight, PackedWeight] | None = None
        """Both factors of an update of the output layer."""
        if adapter.head_weight is not None:
            self.head_weight = PackedWeight(adapter.head_weight, format=weights)
        if adapter.head is not None:
            b = _assembled(adapter.head, config.vocab_size)
            self.head = PackedWeight(adapter.head.a), PackedWeight(b)


def _packed_low_rank(update: LowRank, num_outputs: int, gated: ModelConfig | None) -> PackedLowRank:
    b = _assembled(update, num_outputs)
    packed = PackedWeight(b) if gated is None else packed_gate_up(b, gated.intermediate_size)
    return PackedLowRank(update.a, packed)


def _assembled(update: LowRank, num_outputs: int) -> Tensor:
    """All ``b`` in one matrix ``[num_outputs, rank]``.

    Ranks are padded to whole vectors, since the second product reads all of what the first one writes.
    """
    rank = -(-update.a.shape[0] // 16) * 16
    b = torch.zeros(num_outputs, rank, dtype=update.a.dtype)
    for block in update.blocks:
        b[block.out_start : block.out_end, block.rank_start : block.rank_end] = block.b
    return b
