"""Verification of sampled rows: accept or reject so that the target's distribution comes out exactly.

Rows are put together wherever a tensor is involved (probabilities of the drafted tokens, uniforms, the final draw);
the decisions themselves are arithmetic on a handful of Python floats.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from eda.sampling.draws import draw, draw_uniforms
from eda.speculation.proposal import Proposal


@dataclass(slots=True, eq=False)
class _SampledDraft:
    """One sampled row under verification: what was drafted, and what has been decided so far."""

    token_ids: list[int]
    parents: list[int]
    draft_probs: Tensor | None
    """``[n, V_draft]``; ``None`` for deterministic candidates."""
    draft_token_ids: Tensor | None
    start: int
    """Line of the root in ``target_probs``."""
    target_at: list[float] = field(default_factory=list)
    """Target probability of each node's token at its parent."""
    draft_at: list[float] = field(default_factory=list)
    """Draft probability of each node's token; of no meaning for deterministic candidates."""
    uniforms: list[float] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    """Accepted nodes."""
    rejected: list[int] = field(default_factory=list)
    """Rejected candidate tokens at the last accepted node."""
    weight: float = 1.0
    """Factor on the target's distribution in the residual of a chain."""

    @classmethod
    def of(cls, proposal: Proposal | None, start: int) -> Self:
        if proposal is None or not proposal.token_ids:
            return cls([], [], None, None, start)
        return cls(
            proposal.token_ids, proposal.parents, proposal.draft_probs, proposal.draft_token_ids, start
        )

    @property
    def last_line(self) -> int:
        """Line of the last accepted node in ``target_probs``."""
        return self.start + (self.nodes[-1] if self.nodes else 0)


def _accept_tokens(draft: _SampledDraft) -> None:
    """Rejection sampling of a chain, token by token: accept with probability min(1, target / draft)."""
    for node, (target, drafted, uniform) in enumerate(
        zip(draft.target_at, draft.draft_at, draft.uniforms, strict=True), 1
    ):
        # A token that its distribution cannot give comes from a broken draft, and is never accepted.
        if not (drafted > 0.0 and uniform * drafted < target):
            return
        draft.nodes.append(node)


def _accept_candidates(draft: _SampledDraft) -> None:
    """Deterministic candidates: accept each with its probability among the tokens not rejected before it."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(draft.parents, 1):
        children.setdefault(parent, []).append(node)
    node = 0
    while True:
        remaining = 1.0
        draft.rejected = []
        for child in children.get(node, ()):
            token_id, target = draft.token_ids[child - 1], draft.target_at[child - 1]
            if token_id in draft.rejected:
                continue
            if draft.uniforms[child - 1] * remaining < target:
                draft.nodes.append(child)
                node = child
                break
            draft.rejected.append(token_id)
            remaining = max(remaining - target, 0.0)
        else:
            return


def block_weights(draft: _SampledDraft) -> list[float]:
    """For each prefix of the block, the empty one included, the share of its target mass that drafting it can match."""
    weights = [1.0]
    for target, drafted in zip(draft.target_at, draft.draft_at, strict=True):
        weights.append(min(1.0, weights[-1] * target / drafted) if drafted > 0.0 else 0.0)
    return weights


def _block_acceptances(target_probs: Tensor, drafts: Sequence[_SampledDraft]) -> list[list[float]]:
    """Probability to accept each prefix of 1 to n tokens of each draft, whatever is decided on the others."""
    weights_of = [block_weights(draft) for draft in drafts]
    masses: list[Tensor] = []
    for draft, weights in zip(drafts, weights_of, strict=True):
        if draft.draft_probs is not None and len(weights) > 2:
            factors = torch.tensor(weights[1:-1], dtype=torch.float32, device=target_probs.device)[:, None]
            scaled = factors * target_probs[draft.start + 1 : draft.start + len(weights) - 1]
            residuals = _subtract_draft(scaled, draft.draft_probs[1:], draft.draft_token_ids)
            masses.append(residuals.sum(-1, dtype=torch.float64))
    residual_masses: list[float] = torch.cat(masses).tolist() if masses else []
    acceptances = []
    first = 0
    for weights in weights_of:
        last = first + len(weights) - 2
        inner = zip(weights[1:-1], residual_masses[first:last], strict=True)
        # A weight of 1 gives acceptance 1 also where there is no residual (0 / 0): then the next weight is 1 too.
        row = [mass / (mass + 1.0 - weight) if weight < 1.0 else 1.0 for weight, mass in inner]
        acceptances.append([*row, weights[-1]])
        first = last
    return acceptances


def _accept_blocks(target_probs: Tensor, drafts: Sequence[_SampledDraft]) -> None:
    """Block verification (Sun et al. 2024, "Block Verification Accelerates Speculative Decoding", algorithm 2).

    Each prefix of a block is accepted with a probability of its own, and the longest accepted one wins. So a token
    may be kept although it alone would have been rejected, which is where the block gains over tokens one by one.
    """
    for draft, acceptances in zip(drafts, _block_acceptances(target_probs, drafts), strict=True):
        num_accepted = 0
        for length, (uniform, acceptance) in enumerate(zip(draft.uniforms, acceptances, strict=True), 1):
            if uniform < acceptance:
                num_accepted = length
        draft.nodes = list(range(1, num_accepted + 1))
        draft.weight = block_weights(draft)[num_accepted]


def verify_sampled(
    logits: Tensor, proposals: Sequence[Proposal | None], generator: torch.Generator, *, block: bool
) -> list[tuple[list[int], int]]:
    """Accepted nodes and the token that follows them, for each row; -1 for a token that NaN would decide.

    Args:
        logits: processed, ``[S, V]``; row ``r`` owns ``1 + n_r`` consecutive lines.
        proposals: one per row; ``None`` has no nodes.
        block: verify chains that were drawn from distributions as a block.

    The host waits for the device twice, thrice with blocks, however many rows there are.
    """
    target_probs = logits.to(torch.float32).softmax(-1)
    drafts: list[_SampledDraft] = []
    start = 0
    for proposal in proposals:
        drafts.append(_SampledDraft.of(proposal, start))
        start += 1 + len(drafts[-1].token_ids)
    _look_up(target_probs, [draft for draft in drafts if draft.token_ids], generator)
    if block:
        _accept_blocks(target_probs, [draft for draft in drafts if draft.draft_probs is not None])
    for draft in drafts:
        if draft.draft_probs is None:
            _accept_candidates(draft)
        elif not block:
            _accept_tokens(draft)
    usable = target_probs[:, 0].isfinite()  # a softmax over anything that is not finite is NaN everywhere
    if any(draft.token_ids for draft in drafts):
        last = torch.tensor([draft.last_line for draft in drafts], device=target_probs.device)
        usable, target_probs = usable[last], remainders(target_probs, drafts)
    tokens: list[int] = draw(target_probs, generator).where(usable, -1).tolist()
    return [(draft.nodes, token_id) for draft, token_id in zip(drafts, tokens, strict=True)]


def _look_up(target_probs: Tensor, drafts: Sequence[_SampledDraft], generator: torch.Generator) -> None:
    """Fetches each node's probabilities and its uniform to the host, all rows in one transfer."""
    if not drafts:
        return
    device = target_probs.device
    lines = [draft.start + parent for draft in drafts for parent in draft.parents]
    tokens = [token_id for draft in drafts for token_id in draft.token_ids]
    edges = torch.tensor([lines, tokens], device=device)
    target_at = target_probs[edges[0], edges[1]].to(torch.float64)
    draft_at = _draft_probs_of_tokens(drafts, edges[1], target_probs.shape[1]).to(torch.float64)
    numbers = torch.stack([target_at, draft_at, draw_uniforms(len(tokens), generator, device)]).tolist()
    first = 0
    for draft in drafts:
        last = first + len(draft.token_ids)
        draft.target_at, draft.draft_at, draft.uniforms = (column[first:last] for column in numbers)
        first = last


def _draft_probs_of_tokens(drafts: Sequence[_SampledDraft], tokens: Tensor, vocab_size: int) -> Tensor:
    """``[n]``: the probability that each node's token was drawn with; 0 for deterministic candidates.

    ``tokens`` are the target ids of the nodes of all drafts.
    """
    # Rows of one draft model share its vocabulary: its inverse is made once.
    columns_of: dict[int, Tensor] = {}
    found = tokens.new_zeros(len(tokens), dtype=torch.float32)
    first = 0
    for draft in drafts:
        last = first + len(draft.token_ids)
        if draft.draft_probs is not None:
            columns = tokens[first:last]
            ids = draft.draft_token_ids
            if ids is not None:
                if id(ids) not in columns_of:
                    inverse = tokens.new_full((vocab_size,), -1)
                    columns_of[id(ids)] = inverse.index_copy_(
                        0, ids, torch.arange(len(ids), device=ids.device)
                    )
                columns = columns_of[id(ids)][columns]
            at = draft.draft_probs.gather(1, columns.clamp(min=0)[:, None])[:, 0]
            found[first:last] = at if ids is None else at.where(columns >= 0, 0.0)
        first = last
    return found


def _subtract_draft(scaled_target: Tensor, draft_probs: Tensor, draft_token_ids: Tensor | None) -> Tensor:
    """``[n, V]`` residual, positive part; written into ``scaled_target``."""
    if draft_token_ids is None:
        scaled_target.sub_(draft_probs)
    else:
        # On a CPU, index_add_ along the last axis takes a hundred times as long.
        scaled_target.scatter_add_(1, draft_token_ids.expand(draft_probs.shape[0], -1), draft_probs.neg())
    return scaled_target.clamp_(min=0.0)


def remainders(target_probs: Tensor, drafts: Sequence[_SampledDraft]) -> Tensor:
    """``[S, V]``, not normalised: what each row's recovered or bonus token is drawn from."""
    device = target_probs.device
    target = target_probs[torch.tensor([draft.last_line for draft in drafts], device=device)]
    found = target.clone()
    rejected = [(row, token_id) for row, draft in enumerate(drafts) for token_id in draft.rejected]
    if rejected:
        places = torch.tensor(rejected, device=device)
        found[places[:, 0], places[:, 1]] = 0.0
    chains: dict[int, list[tuple[int, Tensor]]] = {}
    for row, draft in enumerate(drafts):
        if draft.draft_probs is not None and len(draft.nodes) < len(draft.token_ids):
            line = draft.draft_probs[len(draft.nodes)]
            chains.setdefault(id(draft.draft_token_ids), []).append((row, line))
    for members in chains.values():  # one group for each draft vocabulary
        rows = [row for row, _ in members]
        index = torch.tensor(rows, device=device)
        factors = torch.tensor([drafts[row].weight for row in rows], dtype=torch.float32, device=device)
        scaled = factors[:, None] * target[index]
        draft_lines = torch.stack([line for _, line in members])
        found[index] = _subtract_draft(scaled, draft_lines, drafts[rows[0]].draft_token_ids)
    # No mass is left only when rounding rejected a token that exact arithmetic accepts with certainty. The
    # comparison is also false for the NaN of a broken draft.
    return torch.where(found.sum(-1, keepdim=True) > 0.0, found, target)
