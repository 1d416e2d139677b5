"""Growing dynamic draft trees (EAGLE-2, arXiv 2406.16858), whatever runs the draft.

Each level expands the ``top_k`` nodes with the highest joint draft probability into ``top_k`` children; of all nodes
the best are proposed. A child is never likelier than its parent, so the choice is a tree. Nothing here waits for the
device but ``best_nodes``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eda.speculation.proposal import Proposal
from eda.transfers import read


@dataclass(slots=True, eq=False)
class GrowingTree:
    """Trees of ``B`` rows; nodes are numbered from 1, 0 is the root."""

    frontier_tokens: Tensor
    """Int64 ``[B, top_k]``: tokens of the nodes that are expanded next."""
    frontier_ids: Tensor
    """Int64 ``[B, top_k]``: their numbers."""
    tokens: list[Tensor]
    """Each level's candidates, ``[B, n]``."""
    joint: list[Tensor]
    """Their joint log-probabilities."""
    parents: list[Tensor]
    """Numbers of their parents."""

    def nodes(self) -> tuple[Tensor, Tensor, Tensor]:
        """All candidates: tokens, joint log-probabilities and parents, ``[B, nodes]``, parents before children."""
        return torch.cat(self.tokens, 1), torch.cat(self.joint, 1), torch.cat(self.parents, 1)


Expand = Callable[[Tensor, GrowingTree | None, int], tuple[Tensor, Tensor]]
"""``(hidden [B, H] or [B, top_k, H], tree, level)`` to the ``top_k`` best children of each node: log-probabilities and
draft columns, both ``[B, nodes, top_k]``."""
Advance = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""``(hidden [B * top_k, H], tokens [B * top_k], ancestors, level)`` to the draft's next outputs ``[B * top_k, H]``.
``ancestors`` is bool ``[B, top_k, top_k * level]``: which of the drafted keys each node sees."""


def grow_tree(
    hidden: Tensor, draft_token_ids: Tensor, *, top_k: int, depth: int, expand: Expand, advance: Advance
) -> GrowingTree:
    """Trees of one shape for all rows, from the extension's outputs ``hidden [B, H]``."""
    num_rows, device = hidden.shape[0], hidden.device
    scores, columns = expand(hidden, None, 0)
    joint = scores[:, 0]  # [B, top_k]
    first_tokens = draft_token_ids[columns[:, 0]]
    first_ids = torch.arange(1, top_k + 1, device=device).expand(num_rows, top_k)
    no_parents = torch.zeros(num_rows, top_k, dtype=torch.long, device=device)
    tree = GrowingTree(first_tokens, first_ids, [first_tokens], [joint], [no_parents])
    hidden = hidden[:, None].expand(-1, top_k, -1)
    eye = torch.eye(top_k, dtype=torch.bool, device=device).expand(num_rows, top_k, top_k)
    ancestors = eye
    num_known = top_k
    for level in range(1, depth):
        tokens = tree.frontier_tokens.reshape(-1)
        hidden = advance(hidden.reshape(num_rows * top_k, -1), tokens, ancestors, level)
        hidden = hidden.view(num_rows, top_k, -1)
        scores, columns = expand(hidden, tree, level)
        candidates = (joint[:, :, None] + scores).reshape(num_rows, -1)  # [B, top_k * top_k]
        tokens = draft_token_ids[columns].reshape(num_rows, -1)
        tree.tokens.append(tokens)
        tree.joint.append(candidates)
        tree.parents.append(tree.frontier_ids.repeat_interleave(top_k, dim=1))
        joint, chosen = candidates.topk(top_k, dim=1)
        tree.frontier_tokens = tokens.gather(1, chosen)
        tree.frontier_ids = chosen + (num_known + 1)
        num_known += top_k * top_k
        parents = chosen // top_k
        hidden = hidden.gather(1, parents[:, :, None].expand(-1, -1, hidden.shape[2]))
        inherited = ancestors.gather(1, parents[:, :, None].expand(-1, -1, ancestors.shape[2]))
        ancestors = torch.cat([inherited, eye], dim=2)
    return tree


def rank_nodes(joint: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    """The ``num_nodes`` best of each row of ``joint [B, nodes]``, best first: log-probabilities and indices."""
    # A stable sort puts a parent before its child also when both are equally likely.
    values, order = joint.sort(dim=1, descending=True, stable=True)
    return values[:, :num_nodes], order[:, :num_nodes]


def best_nodes(values: Tensor, order: Tensor, tokens: Tensor, parents: Tensor) -> list[Proposal]:
    """The proposals of ``rank_nodes``' choice; reads everything from the device at once."""
    proposals = []
    for row_values, row_order, row_tokens, row_parents in zip(
        *read(values, order, tokens, parents), strict=True
    ):
        kept = sorted(
            int(node) for node, value in zip(row_order, row_values, strict=True) if value > float("-inf")
        )
        new_id = {0: 0, **{node + 1: place + 1 for place, node in enumerate(kept)}}
        proposals.append(
            Proposal(
                [int(row_tokens[node]) for node in kept], [new_id[int(row_parents[node])] for node in kept]
            )
        )
    return proposals
