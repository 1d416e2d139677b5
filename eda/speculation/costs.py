"""What a draft costs."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class DraftCosts:
    """What a draft adds to a step, as fractions of a plain step of one sequence.

    Attributes:
        draft_cost: one pass of the draft over its own outputs.
        verification_cost: one more token in the target's pass.
        extension_cost: the pass that begins a draft, over the features of the accepted tokens, with all that drafting
            at all takes. It gives the first token of a chain.

    The defaults are those of passes that consist of overhead: there a verified token is nearly free.

    Raises ``ValueError`` for costs outside of 0 to 10.
    """

    draft_cost: float = 0.1
    verification_cost: float = 0.02
    extension_cost: float = 0.15

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0.0 <= value <= 10.0:
                raise ValueError(f"{field.name} is {value}; it must be from 0 to 10")

    @classmethod
    def of_json(cls, document: Mapping[str, Any]) -> Self:
        """Files of older versions have a ``draft_cost`` alone: all that a draft token costs, the first one too."""
        draft = float(document["draft_cost"])
        return cls(
            draft,
            float(document.get("verification_cost", 0.0)),
            float(document.get("extension_cost", draft)),
        )

    def of(self, num_passes: int, num_tokens: int) -> float:
        """Of ``num_passes`` passes of the draft, the extension included, and ``num_tokens`` tokens to verify."""
        if not num_passes:
            return 0.0
        return self.extension_cost + self.draft_cost * (num_passes - 1) + self.verification_cost * num_tokens

    def of_lookup(self, batch_size: int) -> "DraftCosts":
        """Of drafts that cost nothing to make, in a batch: fractions of a plain step of so many sequences.

        Each sequence adds a token to the pass, and the other sequences have made that pass longer already.
        """
        step = 1.0 + self.verification_cost * (batch_size - 1)
        return DraftCosts(0.0, self.verification_cost * batch_size / step, 0.0)
