"""What a target says about the tokens that follow: asked for the least that is needed, it may say more."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from torch import Tensor


class Need(Enum):
    """The least that a pass has to say of each wanted token."""

    LIKELIEST = auto()
    """Its likeliest successor."""
    LOGITS = auto()


@dataclass(frozen=True, slots=True, eq=False)
class Likeliest:
    """The likeliest successors of ``N`` wanted tokens; the lowest id of equals."""

    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True, eq=False)
class Logits:
    """Raw logits ``[N, vocab_size]`` of ``N`` wanted tokens, in one block. Never written to."""

    values: Tensor


Answer = Likeliest | Logits
