"""How much to draft: by load, and by how well an adapter's drafts are being accepted.

A target pass over one token of one sequence leaves the machine nearly idle, so drafting is free and a tree pays off.
As the batch grows the pass becomes compute-bound and every rejected token costs time, so drafts get shorter.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

from eda.backends.base import BackendName
from eda.formats.json_files import read_json
from eda.server.engine.sequence import SequenceLabels, StepStats
from eda.speculation.kinds import Chain, Off, Speculation, Tree

ADAPTERS_TRACKED = 1024
"""Label sets, greedy and sampled apart, whose acceptance is remembered; the longest unused is forgotten first."""


class SpeculationTableError(ValueError):
    """A calibration file that cannot be read, or levels that make no sense."""


@dataclass(frozen=True, slots=True)
class SpeculationLevel:
    """What to draft while at most ``max_batch_size`` sequences are decoding."""

    max_batch_size: int
    mode: Literal["chain", "tree"]
    num_speculative_tokens: int
    """Draft tokens per sequence and step: a chain's length, a tree's depth. 0: no drafting."""
    tree_top_k: int = 4
    tree_num_nodes: int = 16
    min_probability: float = 0.0
    """Joint draft probability below which a chain ends."""
    sampled_chain: int | None = None
    """Length of the chains of sequences with a temperature, which are accepted less often; ``None``: as all others."""
    sampled_min_probability: float = 0.0
    """Joint draft probability below which these chains end."""

    def speculation(self, *, sampled: bool = False) -> Chain | Tree:
        if sampled and self.sampled_chain is not None:
            return Chain(self.sampled_chain, min_probability=self.sampled_min_probability)
        if self.mode == "tree" and self.num_speculative_tokens:
            return Tree(self.num_speculative_tokens, self.tree_top_k, self.tree_num_nodes)
        return Chain(self.num_speculative_tokens, self.min_probability)

    def check(self) -> None:
        """Raises ``SpeculationTableError`` for values that make no sense."""
        if self.mode not in ("chain", "tree"):
            raise SpeculationTableError(f'mode is {self.mode!r}; it must be "chain" or "tree"')
        for name in ("num_speculative_tokens", "sampled_chain"):
            length = getattr(self, name)
            if length is not None and not 0 <= length <= 64:
                raise SpeculationTableError(f"{name} is {length}; it must be from 0 to 64")
        for name in ("min_probability", "sampled_min_probability"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise SpeculationTableError(f"{name} is {getattr(self, name)}; it must be from 0 to below 1")


@dataclass(frozen=True, slots=True)
class DraftCosts:
    """What a draft adds to a step, as fractions of a plain step of one sequence.

    Attributes:
        draft_cost: one pass of the draft over its own outputs.
        verification_cost: one more token in the target's pass.
        extension_cost: the pass that begins a draft, over the features of the accepted tokens, with all that drafting
            at all takes. It gives the first token of a chain.
    """

    draft_cost: float = 0.15
    verification_cost: float = 0.0
    extension_cost: float = 0.15

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0.0 <= value <= 10.0:
                raise SpeculationTableError(f"{field.name} is {value}; it must be from 0 to 10")

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


CPU_PASSES_COSTS = DraftCosts(draft_cost=0.05, verification_cost=0.07, extension_cost=0.22)
"""Of the bundled family on the C++ passes, where reading weights takes most of a plain step."""
TORCH_COSTS = DraftCosts(draft_cost=0.1, verification_cost=0.02, extension_cost=0.15)
"""Of torch's passes, which consist of overhead: a verified token is nearly free."""


@dataclass(frozen=True, slots=True)
class SpeculationTable:
    """Levels by batch size, smallest first; the last holds for every larger batch too."""

    levels: tuple[SpeculationLevel, ...]
    costs: DraftCosts = TORCH_COSTS

    def __post_init__(self) -> None:
        sizes = [level.max_batch_size for level in self.levels]
        if not sizes or sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
            raise SpeculationTableError(
                f"max_batch_size must rise from level to level, from 1 on; got {sizes}"
            )
        for level in self.levels:
            level.check()

    @classmethod
    def default(cls, backend: BackendName = "torch") -> Self:
        """For machines without a calibration.

        On the backend ``cpu``, the C++ passes, a draft step costs little, but every further token makes the target's
        pass longer. So chains end where the draft is unsure, and from four sequences on there are none, since they were
        measured to lose (docs/measurements/performance.md). At a temperature about half of the draft's tokens are
        accepted, sure or not: chains are shorter, and how probable a drawn token was says little.
        """
        if backend == "cpu":
            return cls(
                (
                    SpeculationLevel(
                        1,
                        "chain",
                        6,
                        min_probability=0.2,
                        sampled_chain=4,
                        sampled_min_probability=0.01,
                    ),
                    SpeculationLevel(
                        2,
                        "chain",
                        4,
                        min_probability=0.4,
                        sampled_chain=2,
                        sampled_min_probability=0.05,
                    ),
                    SpeculationLevel(64, "chain", 0),
                ),
                CPU_PASSES_COSTS,
            )
        return cls(
            (
                SpeculationLevel(1, "tree", 5),
                SpeculationLevel(4, "chain", 4),
                SpeculationLevel(8, "chain", 3),
                SpeculationLevel(16, "chain", 2),
                SpeculationLevel(64, "chain", 1),
            )
        )

    def level_for(self, batch_size: int) -> SpeculationLevel:
        """The level of so many sequences."""
        return next((level for level in self.levels if batch_size <= level.max_batch_size), self.levels[-1])

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what ``eda bench calibrate`` wrote, also before it knew all of the costs.

        Raises ``SpeculationTableError``.
        """
        try:
            document = read_json(path)
            levels = tuple(SpeculationLevel(**level) for level in document["levels"])
            return cls(levels, DraftCosts.of_json(document))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SpeculationTableError(f"{path} is not a calibration file: {error}") from error

    def save(self, path: Path, measurements: list[dict[str, object]] | None = None) -> None:
        """Writes the table; ``measurements`` are kept beside it for readers, and ignored by ``load``."""
        document = {
            "levels": [asdict(level) for level in self.levels],
            **asdict(self.costs),
            "measurements": measurements or [],
        }
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def best_chain_length(acceptance: float, costs: DraftCosts, longest: int) -> int:
    """The chain length from 0 to ``longest`` with the most tokens for the time.

    Args:
        acceptance: probability that a draft token is accepted when those before it were.
    """
    best, best_rate = 0, 1.0
    expected, reach = 1.0, 1.0
    for length in range(1, longest + 1):
        reach *= acceptance
        expected += reach
        rate = expected / (1.0 + costs.of(length, length))
        if rate > best_rate:
            best, best_rate = length, rate
    return best


class RunningMean:
    """A mean that follows its latest values: plain over the first ones, exponential after that."""

    __slots__ = ("_smoothing", "count", "value")

    def __init__(self, smoothing: float) -> None:
        self._smoothing = smoothing
        self.value = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += max(self._smoothing, 1.0 / self.count) * (value - self.value)


class _Measured:
    """What is known about the drafts of one set of labels, of greedy or of sampled sequences."""

    __slots__ = ("accepted_per_chain", "accepted_per_tree", "num_avoided", "tried_per_chain")

    def __init__(self, smoothing: float) -> None:
        self.accepted_per_chain = RunningMean(smoothing)
        self.tried_per_chain = RunningMean(smoothing)
        self.accepted_per_tree = RunningMean(smoothing)
        self.num_avoided = 0


class SpeculationPolicy:
    """Chooses each sequence's speculation, step by step.

    The level follows the number of decoding sequences with hysteresis: it changes only after ``patience`` steps in a
    row ask for another one, so that a batch whose size swings around a border does not flap.

    Once an adapter has ``warm_up`` measured steps, its drafts are no longer than its own acceptance makes worthwhile:
    a tree that does not pay becomes a chain, a chain gets shorter or is left out. What is avoided is still tried every
    ``probe_every`` steps, or an adapter that got better could not be noticed. Sequences with a temperature are accepted
    less often than greedy ones, so each adapter is measured for both.
    """

    def __init__(
        self,
        table: SpeculationTable,
        *,
        patience: int = 8,
        warm_up: int = 64,
        smoothing: float = 0.015,
        probe_every: int = 32,
    ) -> None:
        self._table = table
        self._patience = patience
        self._warm_up = warm_up
        self._smoothing = smoothing
        self._probe_every = probe_every
        self._level = 0
        self._steps_against = 0
        self._measured: OrderedDict[tuple[SequenceLabels, bool], _Measured] = OrderedDict()

    @property
    def level(self) -> SpeculationLevel:
        return self._table.levels[self._level]

    @property
    def largest(self) -> Chain | Tree:
        """The speculation that takes the most cache slots of all levels: what a sequence must be admitted with."""
        return max(
            (level.speculation(sampled=sampled) for level in self._table.levels for sampled in (False, True)),
            key=lambda item: item.slots,
        )

    def observe_batch(self, batch_size: int) -> None:
        """Called once a step with the number of decoding sequences."""
        if batch_size == 0:
            return
        wanted = self._wanted(batch_size)
        if wanted == self._level:
            self._steps_against = 0
            return
        self._steps_against += 1
        if self._steps_against >= self._patience:
            self._level, self._steps_against = wanted, 0

    def observe_step(self, stats: StepStats) -> None:
        """Called for every decoded row; keeps running means of what is accepted."""
        if stats.num_draft_tokens == 0:
            return
        key = stats.labels, stats.sampled
        measured = self._measured.pop(key, None) or _Measured(self._smoothing)
        self._measured[key] = measured
        if len(self._measured) > ADAPTERS_TRACKED:
            self._measured.popitem(last=False)
        if stats.mode == "tree":
            measured.accepted_per_tree.add(stats.num_accepted)
        else:
            # The first rejected token was tried too; those behind it were not.
            tried = min(stats.num_accepted + 1, stats.num_draft_tokens)
            measured.accepted_per_chain.add(stats.num_accepted)
            measured.tried_per_chain.add(tried)

    def choose(self, labels: SequenceLabels, current: Speculation, *, sampled: bool) -> Speculation:
        """The speculation for a sequence's next step. A sequence admitted without drafting stays so.

        ``sampled``: it has a temperature, with or without a seed.
        """
        if isinstance(current, Off):
            return current
        wanted = self.level.speculation(sampled=sampled)
        measured = self._measured.get((labels, sampled))
        if measured is None or not wanted.num_nodes:
            return wanted
        best = self._worthwhile(measured, wanted)
        if best == wanted:
            return wanted
        measured.num_avoided += 1
        return wanted if measured.num_avoided % self._probe_every == 0 else best

    def _worthwhile(self, measured: _Measured, wanted: Chain | Tree) -> Chain | Tree:
        """``wanted``, or what an adapter with this acceptance does better with."""
        costs = self._table.costs
        if isinstance(wanted, Tree):
            trees = measured.accepted_per_tree
            cost = costs.of(wanted.depth, wanted.num_nodes)
            if trees.count < self._warm_up or trees.value > cost:
                return wanted
            chain = Chain(wanted.depth, self.level.min_probability)
        else:
            chain = wanted
        accepted, tried = measured.accepted_per_chain, measured.tried_per_chain
        length = chain.length
        if accepted.count >= self._warm_up:
            # Not the mean of each chain's share: chains that end early would count as much as long ones.
            length = best_chain_length(accepted.value / tried.value, costs, length)
        return replace(chain, length=length)

    def _wanted(self, batch_size: int) -> int:
        return self._table.levels.index(self._table.level_for(batch_size))
