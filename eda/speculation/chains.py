"""Chains that were drafted to their full length, cut where they should have ended."""

import math
from collections.abc import Sequence

from torch import Tensor

from eda.speculation.proposal import Proposal
from eda.speculation.sequence import SequenceState


def cut_chains(
    states: Sequence[SequenceState],
    lengths: Sequence[int],
    tokens: Sequence[Sequence[float]],
    scores: Sequence[Sequence[float]],
    probabilities: Sequence[Tensor | None],
    draft_token_ids: Tensor,
) -> list[Proposal]:
    """Chains of at most ``lengths[b]`` tokens from longer ones, ended where the draft became unsure.

    Args:
        tokens, scores: target ids and log-probabilities of each row, which may have more rows than ``states``.
        probabilities: float32 ``[n, V_draft]`` of rows that were drawn at random.
    """
    proposals = []
    for row, (state, length) in enumerate(zip(states, lengths, strict=True)):
        kept = kept_length(scores[row][:length], state.min_probability)
        path, drawn_from = [int(token) for token in tokens[row][:kept]], probabilities[row]
        if drawn_from is None or not path:
            proposals.append(Proposal.chain(path))
        else:
            proposals.append(Proposal.chain(path, drawn_from[:kept], draft_token_ids))
    return proposals


def kept_length(scores: Sequence[float], min_probability: float) -> int:
    """How many tokens of a chain stay: it ends behind the one that makes its joint probability too small.

    ``scores`` are the log-probabilities of its tokens.
    """
    if not min_probability:
        return len(scores)
    joint, limit = 0.0, math.log(min_probability)
    for place, score in enumerate(scores, 1):
        joint += score
        if joint < limit:
            return place
    return len(scores)
