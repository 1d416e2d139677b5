"""Prompt lookup: what followed the last tokens where they stood before in the same sequence (Saxena 2023; the longest
match decides, as in SuffixDecoding, arXiv 2411.04975). It needs no model."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from eda.backends.base import DraftRequest
from eda.speculation.proposal import Proposal
from eda.speculation.repeats import RepeatIndex, repeated
from eda.speculation.sequence import SequenceState


class LookupDrafter:
    """Drafts from each sequence's own tokens."""

    taps = None

    def __init__(self) -> None:
        # Keyed weakly: an index goes with its sequence.
        self._indices: WeakKeyDictionary[SequenceState, RepeatIndex] = WeakKeyDictionary()

    def draft(self, requests: Sequence[DraftRequest]) -> list[Proposal | None]:
        """See ``Drafter``. Without an earlier match a sequence gets no draft."""
        return [
            self._draft(request.state, request.length) if request.length else None for request in requests
        ]

    def _draft(self, state: SequenceState, length: int) -> Proposal | None:
        index = self._indices.get(state)
        if index is None:
            index = self._indices[state] = RepeatIndex()
        index.read_on(state.token_ids)
        place, matched = index.longest_match(state.token_ids)
        # As many tokens as matched: the longer two places have agreed, the longer they will.
        drafted = repeated(state.token_ids, place, min(length, matched))
        return Proposal.chain(drafted) if drafted else None
