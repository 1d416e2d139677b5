"""What a draft hands to verification."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """Drafted tokens of one sequence: a chain or a tree of ``n`` nodes below the last emitted token.

    Raises:
        ValueError: lists of different lengths, a parent that does not come before its child, or ``draft_probs`` that
            have another number of rows or belong to a tree.
    """

    token_ids: list[int]
    """Target ids of nodes 1 to n, parents before children."""
    parents: list[int]
    """``parents[i - 1]`` is the parent of node ``i``; 0 is the root, the last emitted token."""
    draft_probs: Tensor | None = None
    """Float32 ``[n, V_draft]``: the distribution that each node of a chain was drawn from. ``None``: the candidates
    are deterministic, given the tokens before them."""
    draft_token_ids: Tensor | None = None
    """Int64 ``[V_draft]``, distinct: target id of each draft column; ``None`` when the vocabularies are the same."""

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.parents):
            raise ValueError(
                f"{len(self.token_ids)} token ids and {len(self.parents)} parents; one each per node"
            )
        for node, parent in enumerate(self.parents, 1):
            if not 0 <= parent < node:
                raise ValueError(
                    f"the parent of node {node} is {parent}; it must be between 0 and {node - 1}"
                )
        if self.draft_probs is not None:
            if self.draft_probs.shape[0] != len(self.token_ids):
                shape = tuple(self.draft_probs.shape)
                raise ValueError(f"draft_probs is {shape}; it needs {len(self.token_ids)} rows, one per node")
            if not self.is_chain:
                raise ValueError(
                    "draft_probs are given for a tree; only a chain can be drawn from distributions"
                )

    @classmethod
    def chain(
        cls,
        token_ids: Sequence[int],
        draft_probs: Tensor | None = None,
        draft_token_ids: Tensor | None = None,
    ) -> Self:
        """A proposal without branches."""
        return cls(list(token_ids), list(range(len(token_ids))), draft_probs, draft_token_ids)

    def as_drawn(self) -> "Proposal":
        """This chain with the distributions of its tokens: where they are deterministic, each was the only one."""
        if self.draft_probs is not None:
            return self
        tokens = torch.tensor(self.token_ids)
        ids = torch.tensor(sorted(set(self.token_ids)))
        return Proposal.chain(self.token_ids, (tokens[:, None] == ids).to(torch.float32), ids)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_chain(self) -> bool:
        return all(parent == index for index, parent in enumerate(self.parents))

    def depths(self) -> list[int]:
        """Distance of nodes 1 to n from the root; its children have depth 1."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return depths[1:]

    def path(self, node: int) -> tuple[int, ...]:
        """Drafted tokens from the root down to ``node``, its own included; empty for the root (0)."""
        tokens: list[int] = []
        while node:
            tokens.append(self.token_ids[node - 1])
            node = self.parents[node - 1]
        return tuple(reversed(tokens))
