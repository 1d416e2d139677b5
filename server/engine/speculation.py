"""How much to draft: by load, and by how well an adapter's drafts are being accepted.

A target pass over one token of one sequence leaves the machine nearly idle, so drafting is free and a tree pays off.
As the batch grows the pass becomes compute-bound and every rejected token costs time, so drafts get shorter.
"""

import json
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, Self

from eda.speculative import Speculation
from server.engine.sequence import SequenceLabels, StepStats

ADAPTERS_TRACKED = 1024
"""Label sets whose acceptance is remembered; the longest unused is forgotten first."""


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

    def speculation(self) -> Speculation:
        return Speculation(
            self.mode,
            self.num_speculative_tokens,
            self.tree_top_k,
            self.tree_num_nodes,
            self.min_probability,
        )


@dataclass(frozen=True, slots=True)
class SpeculationTable:
    """Levels by batch size, smallest first; the last holds for every larger batch too.

    ``draft_cost``: time of one draft pass as a fraction of one target pass.
    """

    levels: tuple[SpeculationLevel, ...]
    draft_cost: float = 0.15

    def __post_init__(self) -> None:
        sizes = [level.max_batch_size for level in self.levels]
        if not sizes or sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
            raise SpeculationTableError(
                f"max_batch_size must rise from level to level, from 1 on; got {sizes}"
            )
        for level in self.levels:
            if level.mode not in ("chain", "tree"):
                raise SpeculationTableError(f'mode is {level.mode!r}; it must be "chain" or "tree"')
            if not 0 <= level.num_speculative_tokens <= 64:
                raise SpeculationTableError(
                    f"num_speculative_tokens is {level.num_speculative_tokens}; it must be from 0 to 64"
                )
            if not 0.0 <= level.min_probability < 1.0:
                raise SpeculationTableError(
                    f"min_probability is {level.min_probability}; it must be from 0 to below 1"
                )
        if not 0.0 <= self.draft_cost <= 10.0:
            raise SpeculationTableError(f"draft_cost is {self.draft_cost}; it must be from 0 to 10")

    @classmethod
    def default(cls, *, cpu_passes: bool = False) -> Self:
        """For machines that nothing was measured on.

        ``cpu_passes``: the target runs on the C++ passes. A draft step costs little there, but every further token
        makes the target's pass longer: so chains that end where the draft is unsure, and none from four sequences on,
        where they were measured to lose (docs/performance.md).
        """
        if cpu_passes:
            return cls(
                (
                    SpeculationLevel(1, "chain", 6, min_probability=0.2),
                    SpeculationLevel(2, "chain", 4, min_probability=0.4),
                    SpeculationLevel(64, "chain", 0),
                ),
                draft_cost=0.08,
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

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what ``eda bench calibrate`` wrote. Raises ``SpeculationTableError``."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            levels = tuple(SpeculationLevel(**level) for level in document["levels"])
            return cls(levels, float(document["draft_cost"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SpeculationTableError(f"{path} is not a calibration file: {error}") from error

    def save(self, path: Path, measurements: list[dict[str, object]] | None = None) -> None:
        """Writes the table; ``measurements`` are kept beside it for readers, and ignored by ``load``."""
        document = {
            "levels": [asdict(level) for level in self.levels],
            "draft_cost": self.draft_cost,
            "measurements": measurements or [],
        }
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def best_chain_length(acceptance: float, draft_cost: float, longest: int) -> int:
    """The chain length from 0 to ``longest`` with the most tokens for the time.

    Args:
        acceptance: probability that a draft token is accepted when those before it were.
        draft_cost: time of a draft pass as a fraction of a target pass.
    """
    best, best_rate = 0, 1.0
    expected, reach = 1.0, 1.0
    for length in range(1, longest + 1):
        reach *= acceptance
        expected += reach
        rate = expected / (1.0 + draft_cost * length)
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
    """What is known about the drafts of one set of labels."""

    __slots__ = ("accepted_per_tree", "chain_acceptance", "num_avoided")

    def __init__(self, smoothing: float) -> None:
        self.chain_acceptance = RunningMean(smoothing)
        self.accepted_per_tree = RunningMean(smoothing)
        self.num_avoided = 0


class SpeculationPolicy:
    """Chooses each sequence's speculation, step by step.

    The level follows the number of decoding sequences with hysteresis: it changes only after ``patience`` steps in a
    row ask for another one, so that a batch whose size swings around a border does not flap.

    Once an adapter has ``warm_up`` measured steps, its drafts are no longer than its own acceptance makes worthwhile:
    a tree that does not pay becomes a chain, a chain gets shorter or is left out. What is avoided is still tried every
    ``probe_every`` steps, or an adapter that got better could not be noticed.
    """

    def __init__(
        self,
        table: SpeculationTable,
        *,
        patience: int = 8,
        warm_up: int = 32,
        smoothing: float = 0.03,
        probe_every: int = 24,
    ) -> None:
        self._table = table
        self._patience = patience
        self._warm_up = warm_up
        self._smoothing = smoothing
        self._probe_every = probe_every
        self._level = 0
        self._steps_against = 0
        self._measured: OrderedDict[SequenceLabels, _Measured] = OrderedDict()

    @property
    def level(self) -> SpeculationLevel:
        return self._table.levels[self._level]

    @property
    def largest(self) -> Speculation:
        """The speculation that takes the most cache slots of all levels: what a sequence must be admitted with."""
        return max((level.speculation() for level in self._table.levels), key=lambda item: item.slots)

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
        measured = self._measured.pop(stats.labels, None) or _Measured(self._smoothing)
        self._measured[stats.labels] = measured
        if len(self._measured) > ADAPTERS_TRACKED:
            self._measured.popitem(last=False)
        if stats.mode == "tree":
            measured.accepted_per_tree.add(stats.num_accepted)
        else:
            # The first rejected token was tried too; those behind it were not.
            tried = min(stats.num_accepted + 1, stats.num_draft_tokens)
            measured.chain_acceptance.add(stats.num_accepted / tried)

    def choose(self, labels: SequenceLabels, current: Speculation) -> Speculation:
        """The speculation for a sequence's next step. A sequence admitted without drafting stays so."""
        if current.mode == "none":
            return current
        wanted = self.level.speculation()
        measured = self._measured.get(labels)
        if measured is None or wanted.num_speculative_tokens == 0:
            return wanted
        best = self._worthwhile(measured, wanted)
        if best == wanted:
            return wanted
        measured.num_avoided += 1
        return wanted if measured.num_avoided % self._probe_every == 0 else best

    def _worthwhile(self, measured: _Measured, wanted: Speculation) -> Speculation:
        """``wanted``, or what an adapter with this acceptance does better with."""
        cost = self._table.draft_cost
        if wanted.mode == "tree":
            trees = measured.accepted_per_tree
            if trees.count < self._warm_up or trees.value > cost * wanted.num_speculative_tokens:
                return wanted
        chains = measured.chain_acceptance
        length = wanted.num_speculative_tokens
        if chains.count >= self._warm_up:
            length = best_chain_length(chains.value, cost, length)
        return replace(wanted, mode="chain", num_speculative_tokens=length)

    def _wanted(self, batch_size: int) -> int:
        for index, level in enumerate(self._table.levels):
            if batch_size <= level.max_batch_size:
                return index
        return len(self._table.levels) - 1
