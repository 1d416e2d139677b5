"""The draft's layer on torch."""

from collections.abc import Sequence

from torch import Tensor

from eda.backends.drafting import Reading, embed
from eda.models.attention import PackedBatch
from eda.models.cache import KVCache
from eda.models.draft import DraftModel
from eda.models.fine_tune import FineTune, FineTuneCache
from eda.models.private import PrivateSegment
from eda.transfers import upload


class TorchDraftLayer:
    """Runs ``draft`` with keys and values in ``cache``, its own."""

    def __init__(self, draft: DraftModel, cache: KVCache) -> None:
        self._draft = draft
        self.cache = cache
        self.head_rows = FineTuneCache(lambda fine_tune: fine_tune.head_rows(draft.draft_token_ids))
        """The fine-tune's output rows of the draft vocabulary, gathered once."""

    def extend(self, reading: Reading, batch: PackedBatch, segments: Sequence[PrivateSegment]) -> Tensor:
        """See ``DraftLayer``."""
        device = batch.positions.device
        ids = upload(reading.tokens, device)
        fused = self._draft.fuse(reading.features, segments)
        hidden = self.step(fused, embed(reading.states, reading.lengths, ids), batch, segments)
        return hidden[upload(reading.lengths, device).cumsum(0) - 1]

    def step(
        self, hidden: Tensor, embeddings: Tensor, batch: PackedBatch, segments: Sequence[PrivateSegment]
    ) -> Tensor:
        """See ``DraftLayer``."""
        output: Tensor = self._draft(hidden, embeddings, batch, self.cache, segments)
        return output

    def logits(self, hidden: Tensor, fine_tune: FineTune) -> Tensor:
        """See ``DraftLayer``."""
        return self._draft.logits(hidden, self.head_rows(fine_tune))
