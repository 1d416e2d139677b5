"""What a decoding step asks of whatever computes it.

Each part has an implementation on torch that takes everything (``eda/backends/eager``). A faster one wraps it, takes
what its allow-list covers, and hands on the rest; so the decoder asks once and never chooses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from eda.answers import Answer, Need
from eda.packing import PassRow
from eda.target import TapLayers, TargetModel
from eda.verification import AnswerLines, Verdict, VerificationRow


@dataclass(frozen=True, slots=True)
class PassPlan:
    """What is wanted of a target pass, at least."""

    need: Need
    taps: TapLayers | None
    """The layers whose outputs the draft will read; ``None`` where nobody reads any."""


@dataclass(frozen=True, slots=True, eq=False)
class PassOutput:
    """What a target pass gives; lines and tokens in the order of its rows."""

    features: Tensor | None
    """``[T, 3 * hidden_size]`` of all tokens."""
    answer: Answer | None
    """On the wanted tokens of all rows; ``None`` where none was wanted."""


class TargetRunner(Protocol):
    """Runs the target over new tokens and leaves their keys and values in the cache."""

    def run(self, model: TargetModel, rows: Sequence[PassRow], plan: PassPlan) -> PassOutput:
        """One pass over all ``rows`` with the weights of ``model`` and each row's LoRA."""
        ...


class Verifier(Protocol):
    """Decides which draft tokens stay, and draws the token that follows them."""

    def verify(self, rows: Sequence[VerificationRow], lines: Sequence[AnswerLines]) -> list[Verdict]:
        """One verdict per row, from the target's answer to it.

        An answer of likeliest tokens belongs to a row that demands no more than these.
        """
        ...
