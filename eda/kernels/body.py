"""The C++ passes as what runs a target."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eda.answers import Need
from eda.attention import PackedBatch
from eda.kernels.target import TargetKernel
from eda.kv_cache import KVCache
from eda.layers import DecoderLayer
from eda.lora import LoraSegment
from eda.target import TapLayers, TargetModel, TargetOutput


class CpuBody:
    """Runs a target's layers and its output layer in C++, from weights of its own."""

    def __init__(self, kernel: TargetKernel) -> None:
        self._kernel = kernel

    @classmethod
    def replacing(cls, model: TargetModel) -> "CpuBody":
        """Takes over the layers of ``model``, which has none afterwards. The head keeps its plain rows beside.

        ``eda.kernels.target.supports`` says for which models this can be.
        """
        layers = [layer for layer in model.layers if isinstance(layer, DecoderLayer)]
        body = cls(TargetKernel(model.config, layers, model.norm.weight, model.head))
        model.layers = nn.ModuleList()
        return body

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

    def logits(self, model: TargetModel, hidden: Tensor) -> Tensor:
        """See ``TargetBody``."""
        return self._kernel.logits(hidden)
