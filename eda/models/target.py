"""The target: the model whose output the user gets, run over packed tokens and the key/value cache."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from eda.formats.checkpoint import (
    copy_weights,
    layer_projections,
    require_tensors,
)
from eda.formats.config import ModelConfig
from eda.formats.model_files import ModelFiles, open_model
from eda.formats.quantised_layers import Keep, QuantisedLayers
from eda.models.answers import Answer, Logits, Need
from eda.models.attention import PackedBatch, masks_for
from eda.models.cache import KVCache
from eda.models.layers import DecoderLayer, RMSNorm
from eda.models.linear import packed_linear, packed_weight
from eda.models.lora import LoraSegment, add_low_rank
from eda.models.rotary import RotaryEmbedding
from eda.transfers import upload

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_RECOMPUTED = re.compile(r"rotary_emb\.inv_freq$")  # older checkpoints stored what the config determines
# Private in torch; a release without one of them only loses the automatic choice.
_BFLOAT16_CPU_CHECKS = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
TapLayers = tuple[int, int, int]
"""The layers whose outputs are a draft's features: low, middle, high."""


@dataclass(frozen=True, slots=True, eq=False)
class TargetOutput:
    """What a pass over ``T`` tokens gives."""

    hidden: Tensor
    """``[T, hidden_size]`` after the final norm."""
    features: Tensor | None
    """``[T, 3 * hidden_size]``: the hidden states after the three tapped layers, low to high."""
    answer: Answer | None = None
    """On the wanted tokens, logits in float32; ``None`` where none was wanted."""


class TargetBody(Protocol):
    """Runs a target's layers and its output layer."""

    def formats(self, model: "TargetModel") -> tuple[str, ...]:
        """The formats that the weights are read in, each once."""
        ...

    def run(
        self,
        model: "TargetModel",
        embedded: Tensor,
        batch: PackedBatch,
        cache: KVCache,
        lora_segments: Sequence[LoraSegment],
        *,
        taps: TapLayers | None,
        wanted: Sequence[int],
        need: Need,
    ) -> TargetOutput:
        """All layers over ``embedded [T, H]``.

        Arguments as of ``TargetModel.forward``. The answer may be left out: it is then taken from ``logits``.
        """
        ...

    def logits(self, model: "TargetModel", hidden: Tensor, lora_segments: Sequence[LoraSegment]) -> Tensor:
        """``[N, vocab_size]`` of ``hidden [N, H]``, of any floating type."""
        ...


class TorchBody:
    """Runs the modules of the model itself."""

    def __init__(self) -> None:
        self._packed_head: Tensor | None = None

    def formats(self, model: "TargetModel") -> tuple[str, ...]:
        """See ``TargetBody``."""
        return (str(model.dtype).removeprefix("torch."),)

    def pack(self, model: "TargetModel") -> None:
        """Lays the weights of ``model`` out for products on CPUs, where that is faster; it cannot be saved then.

        The head keeps its plain rows, which drafts read, beside it.
        """
        for layer in model.layers:
            assert isinstance(layer, DecoderLayer)
            for linear in layer.fused_projections().values():
                linear.pack()
        self._packed_head = packed_weight(model.head)

    def run(
        self,
        model: "TargetModel",
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
        hidden = embedded
        longest = max(row.kv_len for row in batch.rows)
        model.rotary.reserve(longest, dtype=hidden.dtype, device=hidden.device)
        cos, sin = model.rotary(batch.positions, batch.rope_lengths, hidden.dtype)
        # A window that no row outgrows hides nothing, so its layers share the masks of full attention.
        windows = [w if w is not None and w < longest else None for w in model.config.layer_windows]
        masks = {window: masks_for(batch, window) for window in set(windows)}
        features: dict[int, Tensor] = {}
        for index, layer in enumerate(model.layers):
            hidden = layer(hidden, cos, sin, cache, index, batch, masks[windows[index]], lora_segments)
            if taps is not None and index in taps:
                features[index] = hidden
        fused = None if taps is None else torch.cat([features[index] for index in taps], dim=-1)
        return TargetOutput(model.norm(hidden), fused)

    def logits(self, model: "TargetModel", hidden: Tensor, lora_segments: Sequence[LoraSegment]) -> Tensor:
        """See ``TargetBody``."""
        if self._packed_head is None:
            logits = functional.linear(hidden, model.head)
        else:
            logits = packed_linear(hidden, self._packed_head, model.config.vocab_size)
        for segment in lora_segments:
            rows, adapter = slice(segment.start, segment.end), segment.adapter
            if adapter.head_weight is not None:
                logits[rows] = functional.linear(hidden[rows], adapter.head_weight).to(logits.dtype)
            add_low_rank(logits, hidden, segment, adapter.head)
        return logits


class TargetModel(nn.Module):
    """A decoder-only causal language model. Parameters are frozen."""

    def __init__(self, config: ModelConfig, *, fingerprint: str = "", path: Path | None = None) -> None:
        super().__init__()
        self.config = config
        self.fingerprint = fingerprint
        self.path = path
        """The directory or GGUF file that the weights came from."""
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = (
            self.embedding
            if config.tie_word_embeddings
            else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        )
        self.rotary = RotaryEmbedding(config.rope, config.head_dim)
        self.body: TargetBody = TorchBody()
        """What runs the passes; ``eda.backends.loading`` exchanges it where another is faster."""
        self.requires_grad_(False)

    @classmethod
    def load(
        cls,
        source: str | Path | ModelFiles,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        keep: Keep | None = None,
    ) -> Self:
        """Reads a Hugging Face checkpoint (a local directory or a hub id) or a GGUF file.

        Args:
            dtype: type to compute in; ``None`` chooses by the device (see ``automatic_dtype``).
            keep: leaves layers that a file holds in 8 or 4 bits so, as ``Linear.quantised``; the embedding and the
                output layer become floats.

        Raises:
            CheckpointError: the directory is missing, incomplete, misshapen or in an unsafe format.
            UnsupportedModelError: the architecture is not implemented; the message lists those that are.
        """
        files = source if isinstance(source, ModelFiles) else open_model(source)
        config, checkpoint = files.config, files.checkpoint
        if config.tie_word_embeddings and HEAD in checkpoint and EMBEDDING in checkpoint:
            # A config may say "tied" while the file holds two different matrices; the file is right.
            tied = torch.equal(checkpoint.tensor(HEAD), checkpoint.tensor(EMBEDDING))
            config = replace(config, tie_word_embeddings=tied)
        with torch.device("meta"):  # no time and memory for an initialisation that is overwritten
            model = cls(config, fingerprint=files.fingerprint, path=files.path)
        ignored = re.compile(f"{_RECOMPUTED.pattern}|^{re.escape(HEAD)}$")
        ignored = ignored if config.tie_word_embeddings else _RECOMPUTED
        require_tensors(checkpoint, model._places(), ignored)  # before memory is taken
        if keep is not None:
            model._quantise(QuantisedLayers(checkpoint, config, keep))
        model = model.to(dtype or automatic_dtype(device)).to_empty(device=device)
        if config.tie_word_embeddings:
            model.head = model.embedding
        copy_weights(checkpoint, model._places())
        return model.requires_grad_(False)

    def _quantise(self, source: QuantisedLayers) -> None:
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            fused = layer.fused_projections()
            for name, weight in source.read(index).items():
                fused[name].quantise(weight)
        source.report()

    def _places(self) -> dict[str, Tensor]:
        """Where each tensor of a checkpoint belongs: views of the fused weights, by the checkpoint's names.

        Quantised layers have no such place.
        """
        places: dict[str, Tensor] = {EMBEDDING: self.embedding, "model.norm.weight": self.norm.weight}
        if not self.config.tie_word_embeddings:
            places[HEAD] = self.head
        projections = layer_projections(self.config)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            prefix = f"model.layers.{index}"
            places[f"{prefix}.input_layernorm.weight"] = layer.attention_norm.weight
            places[f"{prefix}.post_attention_layernorm.weight"] = layer.feed_forward_norm.weight
            for name, norm in (("q_norm", layer.attention.q_norm), ("k_norm", layer.attention.k_norm)):
                if norm is not None:
                    places[f"{prefix}.self_attn.{name}.weight"] = norm.weight
            fused = layer.fused_projections()
            for name, projection in projections.items():
                linear = fused[projection.fused]
                rows = slice(projection.out_start, projection.out_start + projection.out_size)
                if linear.quantised is None:
                    places[f"{prefix}.{name}.weight"] = linear.weight.data[rows]
                if linear.bias is not None:
                    places[f"{prefix}.{name}.bias"] = linear.bias.data[rows]
        return places

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def weight_formats(self) -> tuple[str, ...]:
        """What the weights are read as: one of float32, bfloat16, int8, int4; several where layers differ."""
        return self.body.formats(self)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def new_cache(self, num_slots: int) -> KVCache:
        """An empty cache for ``num_slots`` tokens, in the model's type and on its device."""
        return KVCache(
            num_layers=self.config.num_layers,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            num_slots=num_slots,
            dtype=self.dtype,
            device=self.device,
        )

    def embed(self, token_ids: Tensor, lora_segments: Sequence[LoraSegment] = ()) -> Tensor:
        """Embeddings ``[T, hidden_size]`` of ``token_ids`` ``[T]``."""
        hidden = functional.embedding(token_ids, self.embedding)
        for segment in lora_segments:
            rows, adapter = slice(segment.start, segment.end), segment.adapter
            if adapter.embedding_weight is not None:
                hidden[rows] = functional.embedding(token_ids[rows], adapter.embedding_weight)
            if adapter.embedding is not None:
                inner = adapter.embedding.a[:, token_ids[rows]].T
                hidden[rows].addmm_(inner, adapter.embedding.blocks[0].b.T)
        return hidden

    def forward(
        self,
        token_ids: Tensor,
        batch: PackedBatch,
        cache: KVCache,
        lora_segments: Sequence[LoraSegment] = (),
        *,
        taps: TapLayers | None = None,
        wanted: Sequence[int] = (),
        need: Need = Need.LOGITS,
    ) -> TargetOutput:
        """Runs all layers over ``token_ids`` ``[T]`` and leaves their keys and values in ``cache``.

        Shared weights run once for all tokens; a LoRA segment adds its low-rank products to its own tokens.

        Args:
            taps: the layers, counted from 0, whose outputs are the draft's features; ``None`` gives no features.
            wanted: tokens that an answer is wanted on from the same call; ``logits`` computes others.
            need: what the answer has to hold, at least.

        Raises ``ValueError`` for ``taps`` that the model does not have.
        """
        if taps is not None and (len(taps) != 3 or min(taps) < 0 or max(taps) >= self.config.num_layers):
            raise ValueError(
                f"taps is {taps}; three layers between 0 and {self.config.num_layers - 1} are needed"
            )
        hidden = self.embed(token_ids, lora_segments)
        output = self.body.run(self, hidden, batch, cache, lora_segments, taps=taps, wanted=wanted, need=need)
        if output.answer is not None or not wanted:
            return output
        return self._with_logits(output, lora_segments, wanted)

    def _with_logits(
        self, output: TargetOutput, lora_segments: Sequence[LoraSegment], wanted: Sequence[int]
    ) -> TargetOutput:
        if not wanted:
            return output
        hidden = output.hidden
        if len(wanted) < hidden.shape[0]:
            hidden = hidden[upload(wanted, hidden.device)]
        segments = []
        for part in lora_segments:
            inside = [place for place, token in enumerate(wanted) if part.start <= token < part.end]
            if inside:
                segments.append(LoraSegment(part.adapter, inside[0], inside[-1] + 1))
        return replace(output, answer=Logits(self.logits(hidden, segments)))

    def logits(self, hidden: Tensor, lora_segments: Sequence[LoraSegment] = ()) -> Tensor:
        """Float32 ``[N, vocab_size]`` from the final ``hidden`` ``[N, hidden_size]``.

        ``lora_segments`` count these ``N`` rows, not the tokens of the pass.
        """
        return self.body.logits(self, hidden, lora_segments).float()


def automatic_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where it is fast, float32 elsewhere.

    Fast are CUDA devices and CPUs with bfloat16 products in hardware: AMX (Intel) or AVX512-BF16 (AMD since Zen 4, some
    Intel). Other CPUs convert every operand and are slower than in float32.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        checks = (getattr(torch.cpu, name, None) for name in _BFLOAT16_CPU_CHECKS)
        fast = any(check() for check in checks if check is not None)
    else:
        fast = kind == "cuda"
    return torch.bfloat16 if fast else torch.float32


def default_tap_layers(num_layers: int) -> TapLayers:
    """Low, middle and high: ``(2, L // 2, L - 3)``, moved apart where a small model would repeat a layer."""
    high = min(num_layers - 1, max(num_layers - 3, 2))
    low = min(2, max(high - 2, 0))
    middle = min(max(num_layers // 2, low + 1), max(high - 1, low))
    return low, middle, high
