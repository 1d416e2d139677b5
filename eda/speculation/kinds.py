"""How a sequence drafts: one class for each method."""

from dataclasses import dataclass
from typing import ClassVar, Literal


def _check(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(
            f"{name} is {value}; it must be {'0 or more' if least == 0 else f'at least {least}'}"
        )


@dataclass(frozen=True, slots=True)
class Off:
    """Plain decoding, for the sequence's whole life."""

    mode: ClassVar[Literal["none"]] = "none"

    @property
    def num_nodes(self) -> int:
        """Draft tokens that the target verifies at most."""
        return 0

    @property
    def slots(self) -> int:
        """Cache slots that one draft takes beyond the accepted tokens."""
        return 0

    def fitting(self, num_tokens: int, num_slots: int) -> int:
        """How long a draft may be where so many tokens are wanted and so many cache slots are free."""
        return 0


@dataclass(frozen=True, slots=True)
class Chain:
    """One token after the other.

    Attributes:
        length: draft tokens; 0 pauses drafting.
        min_probability: a chain ends behind a token that makes its joint draft probability fall below this. Where the
            draft is unsure, further tokens would cost more than they bring; where it is sure, chains may be long.
    """

    mode: ClassVar[Literal["chain"]] = "chain"
    length: int = 5
    min_probability: float = 0.0

    def __post_init__(self) -> None:
        _check("length", self.length, 0)
        if not 0.0 <= self.min_probability < 1.0:
            raise ValueError(f"min_probability is {self.min_probability}; it must be from 0 to below 1")

    @property
    def num_nodes(self) -> int:
        """As of ``Off``."""
        return self.length

    @property
    def slots(self) -> int:
        """As of ``Off``."""
        return self.length + 1

    def fitting(self, num_tokens: int, num_slots: int) -> int:
        """As of ``Off``: tokens."""
        return max(0, min(self.length, num_tokens, num_slots - 1))


@dataclass(frozen=True, slots=True)
class Tree:
    """An EAGLE-2 dynamic tree.

    Attributes:
        depth: levels.
        top_k: children of an expanded node and nodes expanded in each level.
        num_nodes: draft nodes that the target verifies.
    """

    mode: ClassVar[Literal["tree"]] = "tree"
    depth: int = 5
    top_k: int = 4
    num_nodes: int = 16

    def __post_init__(self) -> None:
        _check("depth", self.depth, 1)
        _check("top_k", self.top_k, 1)
        _check("num_nodes", self.num_nodes, 1)

    @property
    def slots(self) -> int:
        """As of ``Off``."""
        return max(self.top_k * self.depth, self.num_nodes) + 1

    def fitting(self, num_tokens: int, num_slots: int) -> int:
        """As of ``Off``: levels. A tree is drafted whole or not at all."""
        return 0 if self.slots > num_slots else max(0, min(self.depth, num_tokens))


@dataclass(frozen=True, slots=True)
class Lookup:
    """What followed the last tokens earlier in the same sequence. It needs no draft model.

    Attributes:
        length: draft tokens at most; 0 pauses drafting.
    """

    mode: ClassVar[Literal["lookup"]] = "lookup"
    length: int = 8

    def __post_init__(self) -> None:
        _check("length", self.length, 0)

    @property
    def num_nodes(self) -> int:
        """As of ``Off``."""
        return self.length

    @property
    def slots(self) -> int:
        """As of ``Off``."""
        return self.length + 1

    def fitting(self, num_tokens: int, num_slots: int) -> int:
        """As of ``Off``: tokens."""
        return max(0, min(self.length, num_tokens, num_slots - 1))


Speculation = Off | Chain | Tree | Lookup
