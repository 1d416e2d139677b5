"""Drafting with a trained draft: one extension pass over new features, then chains and trees from its outputs."""

from collections.abc import Sequence

from torch import Tensor

from eda.backends.base import DraftRequest
from eda.backends.drafting import Proposer, Reading, in_draft_order
from eda.models.target import TapLayers
from eda.speculation.kinds import Tree
from eda.speculation.proposal import Proposal
from eda.transfers import upload

MAX_PENDING_BYTES = 4 << 20
"""A sequence whose drafting is paused keeps so many bytes of features before the draft reads them anyway: reading costs
the same later, and nothing where drafting never begins again."""

_Shape = tuple[int, int, int] | None
"""Of a tree: children, depth and nodes. ``None``: chains, which are drafted together whatever their lengths."""


class ChainTreeDrafter:
    """Drafts with ``proposer``, which reads the target's features at ``taps``."""

    def __init__(self, proposer: Proposer, taps: TapLayers) -> None:
        self.proposer = proposer
        self._taps = taps

    @property
    def taps(self) -> TapLayers:
        """See ``Drafter``."""
        return self._taps

    def draft(self, requests: Sequence[DraftRequest]) -> list[Proposal | None]:
        """See ``Drafter``."""
        proposals: list[Proposal | None] = [None] * len(requests)
        places = places_to_read(requests)
        if not places:
            return proposals
        hidden = self.proposer.extend(Reading.of([requests[place].state for place in places]))
        by_shape: dict[_Shape, list[int]] = {}
        for line, place in enumerate(places):
            if requests[place].length:
                by_shape.setdefault(_shape(requests[place]), []).append(line)
        for shape, lines in by_shape.items():
            inputs = hidden if len(lines) == len(places) else hidden[upload(lines, hidden.device)]
            chosen = [requests[places[line]] for line in lines]
            for line, proposal in zip(lines, self._propose(chosen, inputs, shape), strict=True):
                proposals[places[line]] = proposal if proposal.token_ids else None
        return proposals

    def _propose(self, requests: Sequence[DraftRequest], hidden: Tensor, shape: _Shape) -> list[Proposal]:
        states = [request.state for request in requests]
        if shape is None:
            return self.proposer.propose_chains(states, hidden, [request.length for request in requests])
        top_k, depth, num_nodes = shape
        return self.proposer.propose_trees(states, hidden, top_k=top_k, depth=depth, num_nodes=num_nodes)


def places_to_read(requests: Sequence[DraftRequest]) -> list[int]:
    """Places of the rows whose features the draft reads now, in draft order: all that draft, and some that do not."""
    places = [
        place
        for place, request in enumerate(requests)
        if request.state.num_pending_features
        and (
            request.length or request.state.is_prefilling or request.state.pending_bytes >= MAX_PENDING_BYTES
        )
    ]
    return [places[index] for index in in_draft_order([requests[place].state for place in places])]


def _shape(request: DraftRequest) -> _Shape:
    speculation = request.state.speculation
    if not isinstance(speculation, Tree):
        return None
    return speculation.top_k, request.length, speculation.num_nodes
