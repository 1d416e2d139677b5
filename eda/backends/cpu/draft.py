"""The draft on the C++ passes: its layer, and whole greedy chains and trees in one call."""

import ctypes
import math
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from eda.backends.cpu.library import (
    LARGEST_DRAFT_HIDDEN_SIZE,
    CLoraLayer,
    Draft,
    DraftRow,
    Layer,
    Shape,
    Tokens,
    kernels,
)
from eda.backends.cpu.memory import WeightMemory
from eda.backends.cpu.target import HEAD_SIZES, run_head
from eda.backends.cpu.threads import num_threads
from eda.backends.cpu.tokens import SegmentWeights, TokenArrays, as_pointer
from eda.backends.cpu.weights import (
    PackedLowRank,
    PackedWeight,
    WeightFormat,
    float_vector,
    packed_gate_up,
    padded_intermediate,
)
from eda.models.attention import PackedBatch
from eda.models.cache import KVCache
from eda.models.draft import DraftModel
from eda.models.private import PrivateModule, PrivateSegment

READ = frozenset(
    {
        *("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "tap_layers"),
        *("draft_vocab_size", "rms_norm_eps"),
    }
)
"""Fields of ``DraftConfig`` that the C++ passes compute by, or that ``supports`` looks at."""
IRRELEVANT = frozenset({"vocab_size", "max_position_embeddings", "rope_theta", "target_fingerprint"})
"""All others, as in ``eda/backends/cpu/target.py``: rotary angles are made in Python."""


def supports(draft: DraftModel) -> bool:
    """Whether ``DraftKernel`` can run this draft here."""
    weight, config = draft.fc.weight, draft.config
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and config.head_dim in HEAD_SIZES
        and config.hidden_size % 16 == 0
        and config.hidden_size <= LARGEST_DRAFT_HIDDEN_SIZE
        and kernels() is not None
    )


class DraftHead:
    """Embeddings and output rows of one fine-tune, as the draft reads them."""

    def __init__(self, head_rows: Tensor, embedding: Tensor, *, weights: WeightFormat = "int8") -> None:
        """``head_rows [V_draft, H]``; ``embedding [V, H]``: of any type, since the target's may not be the draft's."""
        self.packed = PackedWeight(head_rows, format=weights)
        self.embedding = embedding.detach().to(torch.bfloat16).contiguous()


class DraftKernel:
    """Runs one frozen draft. It copies the weights: later changes of the draft are not seen.

    They are rounded to 8 bits, low-rank corrections aside: a draft pass is bound by reading its weights, and what
    rounding does to a guess costs less than the time. Outputs stay exact, since the target verifies every token.
    """

    def __init__(self, draft: DraftModel, cache: KVCache, *, weights: WeightFormat = "int8") -> None:
        library = kernels()
        assert library is not None
        self._library = library
        self._draft = draft
        self._cache = cache
        self._weights = weights
        config, attention, feed_forward = draft.config, draft.attention, draft.feed_forward
        memory = WeightMemory()
        packed = [
            PackedWeight(attention.qkv_proj.weight, format=weights, memory=memory),
            PackedWeight(attention.o_proj.weight, format=weights, memory=memory),
            packed_gate_up(
                feed_forward.gate_up_proj.weight, config.intermediate_size, format=weights, memory=memory
            ),
            PackedWeight(feed_forward.down_proj.weight, format=weights, memory=memory),
            PackedWeight(draft.fc.weight, format=weights, memory=memory),
        ]
        norms = [
            *draft.tap_norms,
            draft.hidden_norm,
            draft.embedding_norm,
            draft.norm,
            draft.feed_forward_norm,
        ]
        vectors = [float_vector(norm.weight) for norm in norms]
        pointers = [vector.data_ptr() for vector in vectors]
        layer = Layer(*(weight.struct for weight in packed[:4]), 0, pointers[6])
        self._kept = (packed, vectors, draft.draft_token_ids.contiguous())
        self._struct = Draft(
            layer,
            packed[4].struct,
            (ctypes.c_void_p * 3)(*pointers[:3]),
            *pointers[3:6],
            self._kept[2].data_ptr(),
            config.draft_vocab_size,
        )
        self._private: WeakKeyDictionary[PrivateModule, _PackedPrivate] = WeakKeyDictionary()
        self._table_length = 0
        self._cos = self._sin = torch.empty(0)
        # Trees bring their own tokens; of this one only the cache is read.
        self._cache_only = Tokens(
            keys=cache.keys.data_ptr(), values=cache.values.data_ptr(), num_slots=cache.num_slots
        )

    def extend(
        self,
        rows: Sequence[DraftRow],
        features: Tensor,
        token_ids: Sequence[int],
        batch: PackedBatch,
        segments: Sequence[PrivateSegment],
        uniforms: Tensor | None = None,
    ) -> tuple[Tensor, list[list[int]], Tensor | None]:
        """Feeds target features to the draft, and drafts each row's chain of ``num_steps`` tokens.

        Args:
            features: ``[T, 3H]``; each row's tokens are ``first_token`` to ``first_token + num_tokens``.
            token_ids: ``T`` ids, of the token behind each feature.
            uniforms: float64 ``[B, longest chain]`` in [0, 1), where rows have a temperature: what their tokens are
                drawn by.

        Returns:
            The output of each row's last token, float32 ``[B, H]``; the chains; and with ``uniforms`` the distributions
            that were drawn from, ``[B, longest chain, V_draft]``, undefined where nothing was.
        """
        longest = max(row.num_steps for row in rows)
        cos_table, sin_table = self._angles(max(row.length for row in rows) + longest)
        cos, sin = cos_table[batch.positions], sin_table[batch.positions]
        layer_weights, fusion_weights = self._private_weights(segments)
        tokens = TokenArrays(batch, cos, sin, self._cache, layer_weights)
        fused = TokenArrays(
            PackedBatch(batch.positions, batch.slots, []), cos, sin, self._cache, fusion_weights
        )
        features = features.to(torch.bfloat16).contiguous()
        hidden = torch.empty(len(rows), self._draft.config.hidden_size)
        out = (ctypes.c_int64 * (len(rows) * longest))()
        counts = (ctypes.c_int32 * len(rows))()
        probabilities = None
        if uniforms is not None:
            probabilities = torch.empty(len(rows), longest, self._draft.config.draft_vocab_size)
        shape = self._shape(segments)
        self._library.eda_draft_round(
            num_threads(),
            ctypes.byref(self._struct),
            ctypes.byref(shape),
            ctypes.byref(tokens.struct),
            ctypes.byref(fused.struct),
            as_pointer(features),
            (ctypes.c_int64 * len(token_ids))(*token_ids),
            as_pointer(cos_table),
            as_pointer(sin_table),
            (DraftRow * len(rows))(*rows),
            len(rows),
            longest,
            None if uniforms is None else as_pointer(uniforms),
            None if probabilities is None else as_pointer(probabilities),
            as_pointer(hidden),
            out,
            counts,
        )
        chains = [out[row * longest : row * longest + count] for row, count in enumerate(counts)]
        return hidden, chains, probabilities

    def _private_weights(
        self, segments: Sequence[PrivateSegment]
    ) -> tuple[list[SegmentWeights], list[SegmentWeights]]:
        """Those of the layer, and those of the fusion of features before it."""
        layer, fusion = [], []
        for part in segments:
            packed = self.private(part.module)
            if packed.fusion:
                fusion.append(SegmentWeights(part.start, part.end, lora=packed.fusion))
            layer.append(
                SegmentWeights(
                    part.start,
                    part.end,
                    lora=packed.attention,
                    private_gate_up=packed.gate_up,
                    private_down=packed.down,
                )
            )
        return layer, fusion

    def forward(
        self, hidden: Tensor, embeddings: Tensor, batch: PackedBatch, segments: Sequence[PrivateSegment]
    ) -> Tensor:
        """One pass: ``hidden`` and ``embeddings``, both ``[T, H]``, to float32 ``[T, H]``."""
        cos, sin = self._draft.rotary(batch.positions, None, torch.float32)
        tokens = TokenArrays(batch, cos, sin, self._cache, self._private_weights(segments)[0])
        embeddings = embeddings.to(torch.bfloat16).contiguous()
        output = hidden.to(torch.float32, copy=True).contiguous()
        shape = self._shape(segments)
        self._library.eda_run_draft(
            num_threads(),
            ctypes.byref(self._struct),
            ctypes.byref(shape),
            ctypes.byref(tokens.struct),
            as_pointer(embeddings),
            as_pointer(output),
        )
        return output

    def logits(self, hidden: Tensor, head: DraftHead) -> Tensor:
        """Float32 ``[N, V_draft]`` of ``hidden [N, H]``."""
        # From float32, as chains and trees do it: else near ties would be broken otherwise there and here.
        norm = self._draft.norm
        normal = functional.rms_norm(hidden.float(), norm.weight.shape, norm.weight.float(), norm.eps)
        return run_head(head.packed, normal.to(torch.bfloat16), self._draft.config.draft_vocab_size)

    def tree(
        self, row: DraftRow, hidden: Tensor, segments: Sequence[PrivateSegment], top_k: int, num_nodes: int
    ) -> tuple[list[int], list[int]]:
        """Tokens and parents of a dynamic tree from ``hidden [H]``; ``row.num_steps`` is its depth."""
        cos, sin = self._angles(row.length + row.num_steps)
        hidden = hidden.float().contiguous()
        most = min(num_nodes, top_k + top_k * top_k * (row.num_steps - 1))
        tokens = (ctypes.c_int64 * most)()
        parents = (ctypes.c_int32 * most)()
        shape = self._shape(segments)
        count = self._library.eda_draft_tree(
            num_threads(),
            ctypes.byref(self._struct),
            ctypes.byref(shape),
            ctypes.byref(self._cache_only),
            as_pointer(cos),
            as_pointer(sin),
            ctypes.byref(row),
            as_pointer(hidden),
            top_k,
            most,
            tokens,
            parents,
        )
        return tokens[:count], parents[:count]

    def private(self, module: PrivateModule) -> "_PackedPrivate":
        """The packed weights of a private module, laid out anew when they have changed."""
        found = self._private.get(module)
        state = _state_of(module)
        if found is None or found.state != state:
            found = self._private[module] = _PackedPrivate(module, state, weights=self._weights)
        return found

    def _angles(self, num_positions: int) -> tuple[Tensor, Tensor]:
        if num_positions > self._table_length:
            self._table_length = max(num_positions, 2 * self._table_length, 1024)
            cos, sin = self._draft.rotary(torch.arange(self._table_length), None, torch.float32)
            self._cos, self._sin = cos.contiguous(), sin.contiguous()
        return self._cos, self._sin

    def _shape(self, segments: Sequence[PrivateSegment]) -> Shape:
        config = self._draft.config
        widths = [config.intermediate_size, *(part.module.config.intermediate_size for part in segments)]
        return Shape(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            2 * config.hidden_size,
            padded_intermediate(max(widths)),
            config.rms_norm_eps,
            1.0 / math.sqrt(config.head_dim),
        )


class _PackedPrivate:
    """One private module; addresses are 0 for parts that it lacks."""

    def __init__(self, module: PrivateModule, state: tuple[int, ...], *, weights: WeightFormat) -> None:
        self.state = state
        self.gate_up = self.down = self.fusion = self.attention = 0
        config = module.config
        if config.intermediate_size:
            self._feed_forward = (
                packed_gate_up(module.gate_up_proj, config.intermediate_size, format=weights),
                PackedWeight(module.down_proj, format=weights),
            )
            self.gate_up, self.down = (weight.pointer for weight in self._feed_forward)
        if config.fc_rank:
            self._fc = _packed_low_rank(module.fc_down, module.fc_up)
            self._fusion = CLoraLayer(qkv=self._fc.struct)
            self.fusion = ctypes.addressof(self._fusion)
        if config.attention_rank:
            self._qkv = _packed_low_rank(module.qkv_down, module.qkv_up)
            self._output = _packed_low_rank(module.o_down, module.o_up)
            self._attention = CLoraLayer(qkv=self._qkv.struct, output=self._output.struct)
            self.attention = ctypes.addressof(self._attention)


def _packed_low_rank(down: Tensor, up: Tensor) -> PackedLowRank:
    """Ranks are padded to whole vectors, since the second product reads all of what the first one writes."""
    padding = -down.shape[0] % 16
    return PackedLowRank(down, PackedWeight(functional.pad(up.detach(), (0, padding))))


def _state_of(module: PrivateModule) -> tuple[int, ...]:
    """Changes whenever the weights do."""
    parts: list[int] = []
    # Asked several times a step, which `parameters()` with its search for submodules is too slow for.
    for parameter in module._parameters.values():
        assert parameter is not None
        parts += [parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version]
    return tuple(parts)
