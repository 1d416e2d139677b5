"""What the draft does in fixed shapes: reading features, drafting chains, drafting trees.

Each function works on buffers alone, never waits for the device, and holds the weights of fine-tunes weakly.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eda.backends.recorded.shapes import Inputs
from eda.models.attention import StaticBatch, static_batch
from eda.models.cache import KVCache
from eda.models.draft import DraftModel
from eda.models.fine_tune import FineTune
from eda.models.lora import LoraAdapter
from eda.models.private import PrivateModule, PrivateSegment
from eda.models.target import TargetModel
from eda.speculation.tree import GrowingTree, grow_tree, rank_nodes


@dataclass(frozen=True, slots=True, eq=False)
class DraftOwners:
    """Whose weights the draft works with: output layer and embeddings of a fine-tune, and a private module."""

    model: TargetModel
    lora: LoraAdapter | None
    """Only where it changes embeddings or output layer."""
    private: PrivateModule | None

    @classmethod
    def of(cls, fine_tune: FineTune, private: PrivateModule | None) -> "DraftOwners":
        shares = fine_tune.output_owner is fine_tune.model
        return cls(fine_tune.model, None if shares else fine_tune.lora, private)

    def references(self) -> tuple[TargetModel, LoraAdapter | None, PrivateModule | None]:
        """Everything that a recording must not outlive."""
        return self.model, self.lora, self.private

    def fine_tune(self) -> FineTune:
        """The part of the fine-tune that the draft sees."""
        return FineTune("", self.model, self.lora)


class StaticDraft:
    """The shared draft with one fine-tune's output layer and one private module, over a cache.

    Args:
        head_rows: gives the fine-tune's output rows of the draft vocabulary.
    """

    def __init__(
        self, draft: DraftModel, cache: KVCache, owners: DraftOwners, head_rows: Callable[[FineTune], Tensor]
    ) -> None:
        self.draft = draft
        self.cache = cache
        self._model = weakref.ref(owners.model)
        self._lora = None if owners.lora is None else weakref.ref(owners.lora)
        self._private = None if owners.private is None else weakref.ref(owners.private)
        self._head_rows = head_rows

    def _fine_tune(self) -> FineTune:
        model = self._model()
        assert model is not None
        return FineTune("", model, self._lora() if self._lora is not None else None)

    def segments(self, count: int) -> list[PrivateSegment]:
        private = self._private() if self._private is not None else None
        return [] if private is None else [PrivateSegment(private, 0, count)]

    def step(self, hidden: Tensor, tokens: Tensor, batch: StaticBatch) -> Tensor:
        """One pass of the draft: ``hidden [T, H]`` and ``tokens [T]`` to outputs ``[T, H]``."""
        embeddings = self._fine_tune().embed(tokens)
        output: Tensor = self.draft(hidden, embeddings, batch, self.cache, self.segments(tokens.shape[0]))
        return output

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 ``[T, V_draft]``."""
        return self.draft.logits(hidden, self._head_rows(self._fine_tune()))

    def batch(
        self,
        positions: Tensor,
        slots: Tensor,
        starts: Tensor,
        contexts: Tensor,
        lengths: Tensor,
        tail: Tensor,
        keys: int,
    ) -> StaticBatch:
        config = self.draft.config
        groups = config.num_heads // config.num_kv_heads
        dtype = self.draft.fc.weight.dtype
        return static_batch(
            positions, slots, starts, contexts, lengths, tail, keys, groups=groups, dtype=dtype
        )


def extension_function(
    static: StaticDraft, inputs: Inputs, features: Tensor, hidden: Tensor, keys: int
) -> Callable[[], None]:
    """Reads ``features [B * Q, 3H]`` and leaves each row's last output in ``hidden [B, H]``."""

    def run() -> None:
        num_rows, width = inputs["positions"].shape
        tail = torch.ones(width, width, dtype=torch.bool, device=hidden.device).tril_()
        batch = static.batch(
            inputs["positions"],
            inputs["slots"],
            inputs["starts"],
            inputs["contexts"],
            inputs["lengths"],
            tail.expand(num_rows, width, width),
            keys,
        )
        fused = static.draft.fuse(features, static.segments(num_rows * width))
        outputs = static.step(fused, inputs["tokens"], batch)
        hidden.copy_(outputs.index_select(0, inputs["last"]))

    return run


@dataclass(frozen=True, slots=True, eq=False)
class ChainBuffers:
    """What a chain of ``N`` tokens for ``B`` rows reads and gives."""

    inputs: Inputs
    """``starts``, ``lengths`` (of the draft's keys), ``steps`` (tokens wanted; 0 in rows that only pad) and
    ``scratch`` (a slot to write to that nobody reads), each ``[B]``."""
    hidden: Tensor
    """``[B, H]``: the extension's outputs."""
    tokens: Tensor
    """Int64 ``[B, N]``."""
    scores: Tensor
    """Float32 ``[B, N]``: log-probabilities under the draft's own logits."""
    temperatures: Tensor
    """Float32 ``[B]``; 1 where nothing is drawn."""
    is_drawn: Tensor
    """Bool ``[B]``: rows that are drawn at random; the others take the likeliest."""
    uniforms: Tensor
    """Float64 ``[B, N]`` in [0, 1)."""
    probabilities: Tensor
    """Float32 ``[N, B, V_draft]``: what drawn tokens were drawn from."""


def chain_function(
    static: StaticDraft, buffers: ChainBuffers, keys: int, *, draws: bool
) -> Callable[[], None]:
    """Drafts ``N`` tokens for each row. ``draws``: some row is drawn at random."""
    inputs = buffers.inputs
    draft_token_ids = static.draft.draft_token_ids

    def run() -> None:
        num_steps = buffers.tokens.shape[1]
        hidden = buffers.hidden
        for step in range(num_steps):
            logits = static.logits(hidden)
            columns = logits.argmax(-1)
            if draws:
                # A draft whose logits are not finite must not harm the output: probability 0 is always rejected.
                probabilities = (logits / buffers.temperatures[:, None]).softmax(-1).nan_to_num_(0.0)
                buffers.probabilities[step].copy_(probabilities)
                cumulative = probabilities.cumsum(-1, dtype=torch.float64)
                sought = buffers.uniforms[:, step, None] * cumulative[:, -1:]
                drawn = torch.searchsorted(cumulative, sought, right=True)[:, 0]
                columns = torch.where(buffers.is_drawn, drawn.clamp_(max=logits.shape[1] - 1), columns)
            tokens = draft_token_ids.index_select(0, columns)
            buffers.tokens[:, step].copy_(tokens)
            buffers.scores[:, step].copy_(logits.log_softmax(-1).gather(1, columns[:, None])[:, 0])
            if step + 1 < num_steps:
                hidden = static.step(hidden, tokens, _chain_batch(static, inputs, step, keys))

    return run


def _chain_batch(static: StaticDraft, inputs: Inputs, step: int, keys: int) -> StaticBatch:
    """One token of each row behind ``step`` drafted ones. Rows that want no more write where nobody reads."""
    needed = inputs["steps"] > step + 1
    length = (inputs["lengths"] + step) * needed
    slots = torch.where(needed, inputs["starts"] + length, inputs["scratch"])
    tail = torch.ones(length.shape[0], 1, 1, dtype=torch.bool, device=length.device)
    starts = torch.where(needed, inputs["starts"], inputs["scratch"])
    return static.batch(length[:, None], slots[:, None], starts, length, length + 1, tail, keys)


@dataclass(frozen=True, slots=True, eq=False)
class TreeBuffers:
    """What trees of one shape for ``B`` rows read and give."""

    inputs: Inputs
    """``starts``, ``lengths``, ``steps`` (0 in rows that only pad) and ``scratch`` (the first of ``top_k`` slots)."""
    hidden: Tensor
    """``[B, H]``: the extension's outputs."""
    tokens: Tensor
    parents: Tensor
    """Int64 ``[B, nodes]``: all candidates, see ``GrowingTree.nodes``."""
    values: Tensor
    order: Tensor
    """``[B, num_nodes]``: see ``rank_nodes``."""
    top_k: int
    depth: int


def tree_function(static: StaticDraft, buffers: TreeBuffers, keys: int) -> Callable[[], None]:
    """Drafts a tree for each row."""
    inputs, top_k = buffers.inputs, buffers.top_k

    def expand(hidden: Tensor, tree: GrowingTree | None, level: int) -> tuple[Tensor, Tensor]:
        nodes = hidden.shape[1] if hidden.dim() == 3 else 1
        scores = static.logits(hidden.reshape(-1, hidden.shape[-1])).log_softmax(-1)
        values, columns = scores.view(hidden.shape[0], nodes, -1).topk(top_k, dim=-1)
        return values, columns

    def advance(hidden: Tensor, tokens: Tensor, ancestors: Tensor, level: int) -> Tensor:
        needed = inputs["steps"] > 0
        context = inputs["lengths"] * needed
        drafted = top_k * (level - 1)
        first = torch.where(needed, inputs["starts"] + context + drafted, inputs["scratch"])
        slots = first[:, None] + torch.arange(top_k, device=hidden.device)
        positions = (context + (level - 1) * needed)[:, None].expand(-1, top_k)
        # A row that only pads reads its scratch slots alone.
        starts = torch.where(needed, inputs["starts"], inputs["scratch"])
        lengths = context + top_k + drafted * needed
        batch = static.batch(positions, slots, starts, context, lengths, ancestors, keys)
        return static.step(hidden, tokens, batch)

    def run() -> None:
        tree = grow_tree(
            buffers.hidden,
            static.draft.draft_token_ids,
            top_k=top_k,
            depth=buffers.depth,
            expand=expand,
            advance=advance,
        )
        tokens, joint, parents = tree.nodes()
        values, order = rank_nodes(joint, buffers.values.shape[1])
        for buffer, result in (
            (buffers.tokens, tokens),
            (buffers.parents, parents),
            (buffers.values, values),
            (buffers.order, order),
        ):
            buffer.copy_(result)

    return run
