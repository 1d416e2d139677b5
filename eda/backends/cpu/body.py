"""The C++ passes as what runs a target."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eda.backends.cpu.target import TargetKernel
from eda.backends.cpu.weights import WeightFormat
from eda.formats.quantised import QuantisedWeight
from eda.models.answers import Need
from eda.models.attention import PackedBatch
from eda.models.cache import KVCache
from eda.models.layers import DecoderLayer
from eda.models.lora import LoraSegment
from eda.models.target import TapLayers, TargetModel, TargetOutput


class CpuBody:
    """Runs a target's layers and its output layer in C++, from weights of its own."""

    def __init__(self, kernel: TargetKernel) -> None:
        self._kernel = kernel

    @classmethod
    def replacing(
        cls,
        model: TargetModel,
        *,
        weights: WeightFormat = "bfloat16",
        head: QuantisedWeight | None = None,
    ) -> "CpuBody":
        """Takes over the layers of ``model``, which has none afterwards. The head keeps its plain rows beside.

        Weights are rounded to ``weights``; layers that are quantised already stay as they are. ``head`` stands in for
        the model's own output layer where a file holds it quantised.

        ``eda.backends.cpu.target.obstacle`` says for which models this can be.
        """
        layers = [layer for layer in model.layers if isinstance(layer, DecoderLayer)]
        own_head = model.head if head is None else head
        body = cls(TargetKernel(model.config, layers, model.norm.weight, own_head, weights=weights))
        model.layers = nn.ModuleList()
        return body

    def formats(self, model: TargetModel) -> tuple[str, ...]:
        """See ``TargetBody``."""
        return self._kernel.formats

    @property
    def rounding(self) -> WeightFormat:
        """What plain weights are rounded to."""
        return self._kernel.weights

    def run(
        self,
        model: TargetModel,
        embedded: Tensor,
        batch: PackedBatch,
        cache: KVCache,
        lora_segments: Sequence[LoraSegment],
        *,
        taps: TapLayers | None,
        wanted: Sequence[int],
        need: Need,
    ) -> TargetOutput:
        """See ``TargetBody``."""
        cos, sin = model.rotary(batch.positions, batch.rope_lengths, torch.float32)
        # A LoRA on the output layer is added in Python, after the pass.
        inside = () if any(segment.adapter.changes_head for segment in lora_segments) else wanted
        done = self._kernel.run(embedded, batch, cos, sin, cache, lora_segments, taps, inside, need=need)
        return TargetOutput(done.hidden, done.features, done.answer)

    def logits(self, model: TargetModel, hidden: Tensor, lora_segments: Sequence[LoraSegment]) -> Tensor:
        """See ``TargetBody``."""
        logits = self._kernel.logits(hidden)
        for segment in lora_segments:
            self._kernel.change_logits(logits, hidden, segment)
        return logits
