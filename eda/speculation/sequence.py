"""What the decoder keeps of one sequence between steps."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from eda.models.cache import Extent
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateModule
from eda.sampling.params import SamplingParams
from eda.sampling.processors import TokenHistory
from eda.speculation.kinds import Chain, Off, Speculation
from eda.transfers import upload


@dataclass(slots=True, eq=False, weakref_slot=True)
class SequenceState:
    """One sequence as the decoder sees it. ``token_ids`` holds the prompt and grows with each emitted token.

    Raises ``ValueError`` for an empty prompt or a ``max_length`` that leaves no room to generate.
    """

    token_ids: list[int]
    max_length: int
    """Prompt and output tokens together, at most."""
    fine_tune: FineTune
    sampling: SamplingParams = field(default_factory=SamplingParams)
    private: PrivateModule | None = None
    speculation: Speculation = field(default_factory=Chain)

    num_prompt_tokens: int = field(init=False)
    drafts: bool = field(init=False)
    """Whether it drafts at all; a sequence that ceases to do so never begins again."""
    keeps_features: bool = field(init=False, default=False)
    """Fixed at the start: whether target features are kept for a draft that reads them."""
    extent: Extent | None = field(init=False, default=None)
    history: TokenHistory | None = field(init=False, default=None)
    num_draft_cached: int = field(init=False, default=0)
    """Tokens whose draft keys and values are in the draft's cache."""
    _pending: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)
        if not self.token_ids:
            raise ValueError("token_ids is empty; a sequence needs at least one prompt token")
        if self.max_length <= self.num_prompt_tokens:
            raise ValueError(
                f"max_length is {self.max_length}; with {self.num_prompt_tokens} prompt tokens it must be larger"
            )
        self.drafts = not isinstance(self.speculation, Off)

    @property
    def num_computed(self) -> int:
        """Tokens whose target keys and values are in the cache."""
        return self.extent.length if self.extent else 0

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed < self.num_prompt_tokens

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def min_probability(self) -> float:
        """Joint draft probability below which its chains end."""
        return self.speculation.min_probability if isinstance(self.speculation, Chain) else 0.0

    @property
    def slot_start(self) -> int:
        if self.extent is None:
            raise RuntimeError("the sequence has no cache slots; admit() it first")
        return self.extent.start

    @property
    def reads_features(self) -> bool:
        """Whether features of new tokens are kept."""
        return self.drafts and self.keeps_features

    @property
    def num_pending_features(self) -> int:
        return self.num_computed - self.num_draft_cached if self.reads_features else 0

    @property
    def pending_bytes(self) -> int:
        """Memory of the features that the draft has not read yet."""
        if not self._pending:
            return 0
        return self.num_pending_features * self._pending[0].shape[1] * self._pending[0].element_size()

    def keep_features(self, features: Tensor) -> None:
        """Stores target features ``[n, 3H]`` of newly accepted tokens until the draft reads them."""
        self._pending.append(features)

    def cut_features(self, num_tokens: int, accepted: list[int]) -> None:
        """Of the features stored last, keeps those of ``num_tokens`` known tokens and of ``accepted`` draft nodes."""
        features = self._pending.pop()
        if accepted == list(range(1, len(accepted) + 1)):
            self.keep_features(features[: num_tokens + len(accepted)])
        else:
            kept = list(range(num_tokens)) + [num_tokens - 1 + node for node in accepted]
            self.keep_features(features[upload(kept, features.device)])

    def take_pending_features(self) -> Tensor:
        """All stored features ``[n, 3H]``, which are then forgotten here."""
        features = self._pending[0] if len(self._pending) == 1 else torch.cat(self._pending)
        self._pending.clear()
        return features
