"""What a decoding step asks of whatever computes it.

Each part has an implementation on torch that takes everything (``eda/backends/eager``). A faster one wraps it, takes
what its allow-list covers, and hands on the rest; so the decoder asks once and never chooses.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from eda.models.answers import Answer, Need
from eda.models.cache import KVCache
from eda.models.target import TapLayers, TargetModel
from eda.speculation.costs import DraftCosts
from eda.speculation.kinds import Speculation
from eda.speculation.proposal import Proposal
from eda.speculation.rows import PassRow
from eda.speculation.sequence import SequenceState
from eda.speculation.verification import AnswerLines, Verdict, VerificationRow


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


@dataclass(frozen=True, slots=True, eq=False)
class DraftRequest:
    """One sequence of a step, and how long its draft may be."""

    state: SequenceState
    length: int
    """Tokens of a chain, levels of a tree; 0 for no draft."""


class Drafter(Protocol):
    """Proposes tokens."""

    @property
    def taps(self) -> TapLayers | None:
        """The target's layers whose outputs it reads; ``None`` reads none, and sequences keep none for it."""
        ...

    def draft(self, requests: Sequence[DraftRequest]) -> list[Proposal | None]:
        """A proposal for each request; ``None`` for those that get none, all of length 0 among them."""
        ...


BackendName = Literal["torch", "recorded", "cpu"]


@dataclass(frozen=True, slots=True, eq=False)
class Backend:
    """All that computes for one decoder."""

    name: BackendName
    """For logs and benchmarks."""
    cache: KVCache
    """The target's; its slots are given to sequences."""
    target: TargetRunner
    verifier: Verifier
    drafters: Mapping[type[Speculation], Drafter]
    """By the class of a sequence's speculation. Without one for its class, a sequence is decoded plainly."""
    costs: DraftCosts = field(default_factory=DraftCosts)
    """What a draft is expected to cost here, where nothing was measured."""
    usual_batches: tuple[int, ...] = ()
    """Numbers of sequences that ``prepare`` pays for."""
    around_step: Callable[[], AbstractContextManager[object]] = nullcontext
    prepare: Callable[[Sequence[tuple[int, Speculation]]], int] = lambda shapes: 0
    """Makes ready for so many sequences that draft so, before the first request; how many passes are ready then."""

    @property
    def taps(self) -> TapLayers | None:
        """The layers that a drafter reads; ``None`` where none reads any."""
        return next((drafter.taps for drafter in self.drafters.values() if drafter.taps is not None), None)
