"""Measures drafts of all lengths at all batch sizes, and chooses the fastest for each."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from eda.draft import DraftModel
from eda.generation import GenerationRequest, measure
from eda.private import PrivateModule
from eda.speculative import Speculation, SpeculativeDecoder
from eda.target import FineTune, TargetModel
from server.engine.speculation import SpeculationLevel

LARGEST_TREE_BATCH = 2
"""Trees verify many nodes for each sequence; they are tried for very small batches only."""

MIN_PROBABILITIES = (0.1, 0.2, 0.4)
"""Joint draft probabilities at which long chains are tried to end."""

SMALLEST_GAIN = 1.03
"""How much faster than plain decoding a draft must be: below that, noise decides."""


@dataclass(frozen=True, slots=True)
class CalibrationPlan:
    """What is measured: each batch size with chains up to ``max_length`` tokens, ``repeats`` times."""

    batch_sizes: tuple[int, ...]
    max_tokens: int = 48
    max_length: int = 6
    repeats: int = 3

    def candidates(self, batch_size: int) -> list[Speculation]:
        """Plain decoding first."""
        found = [Speculation("chain", 0)]
        found += [Speculation("chain", length) for length in range(1, self.max_length + 1)]
        found += [
            Speculation("chain", self.max_length, min_probability=probability)
            for probability in MIN_PROBABILITIES
        ]
        if batch_size <= LARGEST_TREE_BATCH:
            found += [Speculation("tree", depth) for depth in range(3, self.max_length + 1)]
        return found


@dataclass(frozen=True, slots=True)
class Measurement:
    """Output tokens per second of one setting at one batch size."""

    batch_size: int
    mode: Literal["chain", "tree"]
    num_speculative_tokens: int
    tokens_per_second: float
    mean_acceptance_length: float
    min_probability: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate_decoder(
    target: TargetModel,
    draft: DraftModel | None,
    fine_tune: FineTune,
    private: PrivateModule | None,
    prompts: Sequence[list[int]],
    plan: CalibrationPlan,
    *,
    report: Callable[[Measurement], None] = lambda measurement: None,
) -> tuple[list[Measurement], float]:
    """All measurements, and the time of a draft pass as a fraction of a target pass for one sequence.

    Prompts are cut to what the model holds, and repeated when there are fewer than sequences. Candidates of one batch
    size take turns, so that a machine that changes its pace does so for all of them.
    """
    longest = target.config.max_position_embeddings - plan.max_tokens
    texts = [prompt[:longest] for prompt in prompts]
    room = max(map(len, texts)) + plan.max_tokens + 64
    decoder = SpeculativeDecoder(target, draft, num_slots=max(plan.batch_sizes) * room)
    measurements: list[Measurement] = []
    for batch_size in plan.batch_sizes:
        candidates = plan.candidates(batch_size)
        rates: list[list[float]] = [[] for _ in candidates]
        lengths = [1.0] * len(candidates)
        chosen = [texts[place % len(texts)] for place in range(batch_size)]
        for repeat in range(plan.repeats + 1):
            for place, speculation in enumerate(candidates):
                requests = [
                    GenerationRequest(prompt, plan.max_tokens, speculation=speculation, private=private)
                    for prompt in chosen
                ]
                _, throughput = measure(decoder, fine_tune, requests, max_batch=batch_size)
                if repeat:  # the first round warms caches and kernels
                    rates[place].append(throughput.tokens_per_second)
                    lengths[place] = throughput.mean_acceptance_length
        for speculation, values, length in zip(candidates, rates, lengths, strict=True):
            mode: Literal["chain", "tree"] = "tree" if speculation.mode == "tree" else "chain"
            measurement = Measurement(
                batch_size,
                mode,
                speculation.num_speculative_tokens,
                round(median(values), 3),
                round(length, 4),
                speculation.min_probability,
            )
            measurements.append(measurement)
            report(measurement)
    return measurements, round(draft_cost(measurements), 4)


def draft_cost(measurements: Sequence[Measurement]) -> float:
    """Time of a draft pass over that of a target pass, from chains of the smallest batch.

    A step with a chain of ``k`` tokens takes one target pass and ``k`` draft passes; how long it takes follows from
    tokens per second and tokens per step. The median over all lengths is taken.
    """
    smallest = min(measurement.batch_size for measurement in measurements)
    chains = [
        m for m in measurements if m.batch_size == smallest and m.mode == "chain" and not m.min_probability
    ]
    plain = next(1.0 / m.tokens_per_second for m in chains if m.num_speculative_tokens == 0)
    costs = [
        (m.mean_acceptance_length / m.tokens_per_second / plain - 1.0) / m.num_speculative_tokens
        for m in chains
        if m.num_speculative_tokens
    ]
    return min(max(median(costs), 0.0), 10.0) if costs else 0.15


def best_levels(measurements: Sequence[Measurement]) -> tuple[SpeculationLevel, ...]:
    """The fastest setting of each batch size; plain decoding where no draft is clearly faster."""
    levels: list[SpeculationLevel] = []
    for batch_size in sorted({m.batch_size for m in measurements}):
        here = [m for m in measurements if m.batch_size == batch_size]
        plain = next(m for m in here if m.num_speculative_tokens == 0)
        best = max(here, key=lambda m: m.tokens_per_second)
        if best.tokens_per_second < SMALLEST_GAIN * plain.tokens_per_second:
            best = plain
        levels.append(
            SpeculationLevel(
                batch_size, best.mode, best.num_speculative_tokens, min_probability=best.min_probability
            )
        )
    return tuple(levels)
