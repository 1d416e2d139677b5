"""What training needs of the target for a sample: a prefill pass without gradients, and a budget for results."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from eda.models.attention import AttentionRow, PackedBatch
from eda.models.fine_tune import FineTune
from eda.training.data.samples import Sample

DEFAULT_PACK_TOKENS = 4096
DEFAULT_MEMORY_BYTES = 2 << 30
_LOGITS_ROWS = 512
_ARENA_BYTES = 64 << 20
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True, eq=False)
class TargetStates:
    """The target's view of one sample with ``L`` tokens and ``R = sample.num_roots`` roots.

    The draft token that step ``j`` of root ``r`` proposes is judged by the target's distribution at answer position
    ``r + j``, so there is one distribution per root: they are kept as final hidden states, not as rows of logits.
    """

    features: Tensor
    """``[L - 2, 3H]``, half precision: tapped hidden states of all positions up to the last root."""
    hidden: Tensor
    """``[R, H]`` after the final norm, of answer positions ``0 .. R-1``."""
    log_normaliser: Tensor
    """Float32 ``[R]``: logsumexp of the target's logits over the *whole* vocabulary."""
    argmax: Tensor
    """Int64 ``[R]``: the target's likeliest next token."""

    @property
    def num_bytes(self) -> int:
        return sum(
            t.numel() * t.element_size()
            for t in (self.features, self.hidden, self.log_normaliser, self.argmax)
        )


@torch.no_grad()
def compute_states(
    fine_tune: FineTune, samples: Sequence[Sample], tap_layers: tuple[int, int, int]
) -> list[TargetStates]:
    """States of all ``samples`` from one packed prefill pass. Each sample has at least two answer tokens.

    ``tap_layers`` are the draft's: the features must be those it sees in service.
    """
    model, device = fine_tune.model, fine_tune.model.device
    lengths = [sample.length for sample in samples]
    tokens = [token for sample in samples for token in (*sample.prompt_ids, *sample.response_ids)]
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    rope_lengths = torch.cat([torch.full((length,), length, device=device) for length in lengths])
    rows, start = [], 0
    for length in lengths:
        rows.append(AttentionRow(start, length, start, length))
        start += length
    batch = PackedBatch(positions, torch.arange(start, device=device), rows, rope_lengths)
    output = model(
        torch.tensor(tokens, device=device),
        batch,
        model.new_cache(start),
        fine_tune.lora_segments(0, start),
        taps=tap_layers,
    )
    if output.features is None:
        raise RuntimeError("the target returned no features")
    states = []
    for sample, row in zip(samples, rows, strict=True):
        first = row.query_start + len(sample.prompt_ids)
        # A copy: a view would keep the whole pack in memory.
        hidden = output.hidden[first : first + sample.num_roots].clone()
        features = output.features[row.query_start : row.query_start + sample.length - 2]
        normaliser, argmax = _summarise_logits(fine_tune, hidden)
        states.append(TargetStates(_halved(features), hidden, normaliser, argmax))
    return states


def _summarise_logits(fine_tune: FineTune, hidden: Tensor) -> tuple[Tensor, Tensor]:
    normalisers, argmaxes = [], []
    for part in torch.split(hidden, _LOGITS_ROWS):
        logits = fine_tune.model.logits(part, fine_tune.lora_segments(0, part.shape[0]))
        normalisers.append(logits.logsumexp(-1))
        argmaxes.append(logits.argmax(-1))
    return torch.cat(normalisers), torch.cat(argmaxes)


def _halved(features: Tensor) -> Tensor:
    """A copy in 16 bits: float16, which is closer, unless values leave its range (large models' outlier channels)."""
    if features.dtype == torch.bfloat16:
        return features.clone()
    half = features.half()
    return half if torch.isfinite(half).all() else features.bfloat16()


class _Arena:
    """Memory for states in large pieces.

    Kept wherever the allocator finds room, thousands of small tensors would lie scattered over the gaps that a pack's
    large ones leave, no later pack would fit into these, and each would take new memory: ten times what is kept.
    """

    def __init__(self, piece_bytes: int) -> None:
        self._piece_bytes = piece_bytes
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def copy(self, states: TargetStates) -> TargetStates:
        return TargetStates(*(self._copied(getattr(states, item.name)) for item in fields(states)))

    def _copied(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        if self._used + size > self._piece.numel() or self._piece.device != tensor.device:
            self._piece = torch.empty(max(size, self._piece_bytes), dtype=torch.uint8, device=tensor.device)
            self._used = 0
        part = self._piece[self._used : self._used + size].view(tensor.dtype).view(tensor.shape)
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return part.copy_(tensor)


class StateCache:
    """States of samples, computed when first asked for and kept in memory up to ``memory_bytes``.

    ``tap_layers`` are those of the draft that learns from the features. What does not fit is computed again each
    time, so data of any size can be trained on; only time is lost.
    """

    def __init__(
        self,
        fine_tune: FineTune,
        samples: Sequence[Sample],
        tap_layers: tuple[int, int, int],
        *,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        pack_tokens: int = DEFAULT_PACK_TOKENS,
    ) -> None:
        self.fine_tune = fine_tune
        self.samples = list(samples)
        self.tap_layers = tap_layers
        self._memory_bytes = memory_bytes
        self._pack_tokens = pack_tokens
        self._kept: dict[int, TargetStates] = {}
        self._arena = _Arena(min(_ARENA_BYTES, memory_bytes))
        self.used_bytes = 0

    def get(self, indices: Sequence[int]) -> list[TargetStates]:
        """States of the samples at ``indices``, in that order."""
        found = {index: self._kept[index] for index in indices if index in self._kept}
        for pack in self._packs([index for index in dict.fromkeys(indices) if index not in found]):
            states = compute_states(self.fine_tune, [self.samples[index] for index in pack], self.tap_layers)
            for index, state in zip(pack, states, strict=True):
                found[index] = state
                if self.used_bytes + state.num_bytes <= self._memory_bytes:
                    self._kept[index] = self._arena.copy(state)
                    self.used_bytes += state.num_bytes
        return [found[index] for index in indices]

    def _packs(self, missing: Sequence[int]) -> list[list[int]]:
        """Groups whose tokens together stay within ``pack_tokens``, unless one sample alone is longer."""
        packs: list[list[int]] = []
        size = 0
        for index in missing:
            length = self.samples[index].length
            if not packs or size + length > self._pack_tokens:
                packs.append([])
                size = 0
            packs[-1].append(index)
            size += length
        return packs
