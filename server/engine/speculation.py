"""How much to draft: by load, and by how well an adapter's drafts are being accepted.

A target pass over one token of one sequence leaves the machine nearly idle, so drafting is free and a tree pays off.
As the batch grows the pass becomes compute-bound and every rejected token costs time, so drafts get shorter.
"""

import json
from collections import OrderedDict
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, Self

from eda.formats.json_files import read_json
from eda.server.engine.draft_mode import DraftMode
from eda.server.engine.sequence import SequenceLabels, StepStats
from eda.speculation.costs import DraftCosts
from eda.speculation.kinds import Chain, Lookup, Off, Speculation, Tree

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


DEAR_VERIFICATION = 0.05
"""From this ``verification_cost`` on, drafts of many tokens lose where few are accepted."""


@dataclass(frozen=True, slots=True)
class SpeculationTable:
    """Levels by batch size, smallest first; the last holds for every larger batch too."""

    levels: tuple[SpeculationLevel, ...]
    costs: DraftCosts = field(default_factory=DraftCosts)

    def __post_init__(self) -> None:
        sizes = [level.max_batch_size for level in self.levels]
        if not sizes or sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
            raise SpeculationTableError(
                f"max_batch_size must rise from level to level, from 1 on; got {sizes}"
            )
        for level in self.levels:
            level.check()

    @classmethod
    def default(cls, costs: DraftCosts | None = None) -> Self:
        """For machines without a calibration; ``costs`` are a backend's.

        Where every further token makes the target's pass clearly longer, chains end where the draft is unsure, and from
        four sequences on there are none, since they were measured to lose (docs/measurements/performance.md). At a
        temperature about half of the draft's tokens are accepted, sure or not: chains are shorter, and how probable a
        drawn token was says little.
        """
        costs = costs or DraftCosts()
        if costs.verification_cost >= DEAR_VERIFICATION:
            return cls(_levels_of_chains(costs.verification_cost), costs)
        return cls(
            (
                SpeculationLevel(1, "tree", 5),
                SpeculationLevel(4, "chain", 4),
                SpeculationLevel(8, "chain", 3),
                SpeculationLevel(16, "chain", 2),
                SpeculationLevel(64, "chain", 1),
            ),
            costs,
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


def _levels_of_chains(verification_cost: float) -> tuple[SpeculationLevel, ...]:
    """The dearer a verified token, the shorter."""
    none = SpeculationLevel(64, "chain", 0)
    if verification_cost > 0.5:  # a token pays only where it is all but certain
        return SpeculationLevel(1, "chain", 1, min_probability=0.8, sampled_chain=0), none
    if verification_cost > 0.25:
        return SpeculationLevel(1, "chain", 2, min_probability=0.5, sampled_chain=1), none
    if verification_cost > 0.1:
        return SpeculationLevel(1, "chain", 4, min_probability=0.4, sampled_chain=2), none
    return (
        SpeculationLevel(1, "chain", 6, min_probability=0.2, sampled_chain=4, sampled_min_probability=0.01),
        SpeculationLevel(2, "chain", 4, min_probability=0.4, sampled_chain=2, sampled_min_probability=0.05),
        none,
    )


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

    Look-ups are measured in the same way, for each model. They follow no level: what they cost follows from the batch.
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
        self._batch_size = 1
        self._measured: OrderedDict[tuple[SequenceLabels, bool], _Measured] = OrderedDict()

    @property
    def level(self) -> SpeculationLevel:
        return self._table.levels[self._level]

    def largest_for(self, draft: DraftMode) -> Speculation:
        """What a sequence must be admitted with, so that whatever is chosen later has its slots."""
        if draft == "none":
            return Off()
        return Lookup() if draft == "lookup" else self.largest

    @property
    def largest(self) -> Chain | Tree:
        """The speculation that takes the most cache slots of all levels."""
        return max(
            (level.speculation(sampled=sampled) for level in self._table.levels for sampled in (False, True)),
            key=lambda item: item.slots,
        )

    def observe_batch(self, batch_size: int) -> None:
        """Called once a step with the number of decoding sequences."""
        if batch_size == 0:
            return
        self._batch_size = batch_size
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
        wanted = Lookup() if isinstance(current, Lookup) else self.level.speculation(sampled=sampled)
        measured = self._measured.get((labels, sampled))
        if measured is None or not wanted.num_nodes:
            return wanted
        best = self._worthwhile(measured, wanted)
        if best == wanted:
            return wanted
        measured.num_avoided += 1
        return wanted if measured.num_avoided % self._probe_every == 0 else best

    def _worthwhile(self, measured: _Measured, wanted: Chain | Tree | Lookup) -> Chain | Tree | Lookup:
        """``wanted``, or what an adapter with this acceptance does better with."""
        costs = self._table.costs
        chain: Chain | Lookup
        if isinstance(wanted, Lookup):
            costs = costs.of_lookup(self._batch_size)
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
