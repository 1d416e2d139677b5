"""What the decoder keeps of one sequence between steps."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from eda.kv_cache import Extent
from eda.private import PrivateModule
from eda.sampling import SamplingParams, TokenHistory
from eda.target import FineTune
from eda.transfers import upload


@dataclass(frozen=True, slots=True)
class Speculation:
    """How a sequence drafts.

    Attributes:
        mode: "none" (plain decoding), "chain", or "tree" (EAGLE-2 dynamic tree).
        num_speculative_tokens: length of a chain, depth of a tree; 0 pauses drafting.
        tree_top_k: children of an expanded node and nodes expanded in each level.
        tree_num_nodes: draft nodes that the target verifies.
        min_probability: a chain ends behind a token that makes its joint draft probability fall below this. Where the
            draft is unsure, further tokens would cost more than they bring; where it is sure, chains may be long.
    """

    mode: Literal["none", "chain", "tree"] = "chain"
    num_speculative_tokens: int = 5
    tree_top_k: int = 4
    tree_num_nodes: int = 16
    min_probability: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in ("none", "chain", "tree"):
            raise ValueError(f'mode is {self.mode!r}; it must be "none", "chain" or "tree"')
        if self.num_speculative_tokens < 0:
            raise ValueError(f"num_speculative_tokens is {self.num_speculative_tokens}; it must be 0 or more")
        for name in ("tree_top_k", "tree_num_nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0.0 <= self.min_probability < 1.0:
            raise ValueError(f"min_probability is {self.min_probability}; it must be from 0 to below 1")

    @property
    def num_nodes(self) -> int:
        """Draft tokens that the target verifies at most."""
        if self.mode == "none" or self.num_speculative_tokens == 0:
            return 0
        return self.tree_num_nodes if self.mode == "tree" else self.num_speculative_tokens

    @property
    def slots(self) -> int:
        """Cache slots that one draft of this kind takes beyond the accepted tokens."""
        if self.mode == "tree":
            return max(self.tree_top_k * self.num_speculative_tokens, self.tree_num_nodes) + 1
        return self.num_speculative_tokens + 1


@dataclass(slots=True, eq=False)
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
    speculation: Speculation = field(default_factory=Speculation)

    num_prompt_tokens: int = field(init=False)
    drafts: bool = field(init=False)
    """Whether it drafts at all; a sequence that ceases to do so never begins again."""
    keeps_features: bool = field(init=False, default=False)
    """Fixed at the start: whether target features are kept for a draft that reads them."""
    extent: Extent | None = field(init=False, default=None)
    history: TokenHistory | None = field(init=False, default=None)
    draft_length: int = field(init=False, default=0)
    _pending: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)
        if not self.token_ids:
            raise ValueError("token_ids is empty; a sequence needs at least one prompt token")
        if self.max_length <= self.num_prompt_tokens:
            raise ValueError(
                f"max_length is {self.max_length}; with {self.num_prompt_tokens} prompt tokens it must be larger"
            )
        self.drafts = self.speculation.mode != "none"

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
    def is_sampled(self) -> bool:
        """Whether draft tokens are drawn at random, so that verification needs their probabilities."""
        return not self.sampling.is_greedy and self.sampling.seed is None

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
        return self.num_computed - self.draft_length if self.reads_features else 0

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
