"""Measures drafts of all lengths at all batch sizes, and chooses the fastest for each."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import linear_regression, median
from typing import Any, Literal

import torch
from rich.table import Table

from eda.decoder import SpeculativeDecoder
from eda.generation import GenerationRequest, measure
from eda.models.answers import Logits
from eda.models.attention import AttentionRow, PackedBatch
from eda.models.draft import DraftModel
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateModule
from eda.models.target import TargetModel
from eda.sampling.params import SamplingParams
from eda.server.engine.speculation import SpeculationLevel, SpeculationTable
from eda.speculation.costs import DraftCosts
from eda.speculation.kinds import Chain, Tree

LARGEST_TREE_BATCH = 2
"""Trees verify many nodes for each sequence; they are tried for very small batches only."""

MIN_PROBABILITIES = (0.1, 0.2, 0.4)
"""Joint draft probabilities at which long chains are tried to end."""

TEMPERATURE = 1.0
"""Of the measurements for sequences that are sampled from."""

PASSES_TIMED = 30
"""Target passes of each width that the cost of a verified token is taken from."""

SMALLEST_GAIN = 1.03
"""How much faster than plain decoding a draft must be: below that, noise decides."""


@dataclass(frozen=True, slots=True)
class CalibrationPlan:
    """What is measured: each batch size with chains up to ``max_length`` tokens, ``repeats`` times."""

    batch_sizes: tuple[int, ...]
    max_tokens: int = 48
    max_length: int = 6
    repeats: int = 3

    def candidates(self, batch_size: int, temperature: float = 0.0) -> list[Chain | Tree]:
        """Plain decoding first. Trees for greedy sequences alone."""
        found: list[Chain | Tree] = [Chain(0)]
        found += [Chain(length) for length in range(1, self.max_length + 1)]
        found += [Chain(self.max_length, min_probability=probability) for probability in MIN_PROBABILITIES]
        if batch_size <= LARGEST_TREE_BATCH and not temperature:
            found += [Tree(depth) for depth in range(3, self.max_length + 1)]
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
    temperature: float = 0.0

    @property
    def speculation(self) -> Chain | Tree:
        """What was measured."""
        length = self.num_speculative_tokens
        return Tree(length) if self.mode == "tree" else Chain(length, self.min_probability)

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
) -> tuple[list[Measurement], DraftCosts]:
    """All measurements, greedy and at temperature 1, and what a draft adds to a step of one sequence.

    Prompts are cut to what the model holds, and repeated when there are fewer than sequences. Candidates of one batch
    size take turns, so that a machine that changes its pace does so for all of them.
    """
    longest = target.config.max_position_embeddings - plan.max_tokens
    texts = [prompt[:longest] for prompt in prompts]
    room = max(map(len, texts)) + plan.max_tokens + 64
    decoder = SpeculativeDecoder.for_models(target, draft, num_slots=max(plan.batch_sizes) * room)
    measurements: list[Measurement] = []
    for batch_size in plan.batch_sizes:
        chosen = [texts[place % len(texts)] for place in range(batch_size)]
        for temperature in (0.0, TEMPERATURE):
            for measurement in _measure_all(decoder, fine_tune, private, chosen, plan, temperature):
                measurements.append(measurement)
                report(measurement)
    verified = verification_cost(fine_tune, texts[0], plan.max_length)
    return measurements, draft_costs(measurements, verified)


def _measure_all(
    decoder: SpeculativeDecoder,
    fine_tune: FineTune,
    private: PrivateModule | None,
    prompts: Sequence[list[int]],
    plan: CalibrationPlan,
    temperature: float,
) -> list[Measurement]:
    """All candidates for a batch of ``prompts``, in turns."""
    candidates = plan.candidates(len(prompts), temperature)
    rates: list[list[float]] = [[] for _ in candidates]
    lengths = [1.0] * len(candidates)
    for repeat in range(plan.repeats + 1):
        for place, speculation in enumerate(candidates):
            requests = [
                GenerationRequest(
                    prompt,
                    plan.max_tokens,
                    sampling=SamplingParams(temperature=temperature),
                    speculation=speculation,
                    private=private,
                )
                for prompt in prompts
            ]
            _, throughput = measure(decoder, fine_tune, requests, max_batch=len(prompts))
            if repeat:  # the first round warms caches and kernels
                rates[place].append(throughput.tokens_per_second)
                lengths[place] = throughput.mean_acceptance_length
    found = []
    for speculation, values, length in zip(candidates, rates, lengths, strict=True):
        found.append(
            Measurement(
                len(prompts),
                speculation.mode,
                speculation.depth if isinstance(speculation, Tree) else speculation.length,
                round(median(values), 3),
                round(length, 4),
                0.0 if isinstance(speculation, Tree) else speculation.min_probability,
                temperature,
            )
        )
    return found


@torch.inference_mode()
def verification_cost(fine_tune: FineTune, prompt: Sequence[int], num_tokens: int) -> float:
    """How much longer one more token makes a target pass, as a fraction of the pass over a single one.

    From passes over 1 and over ``1 + num_tokens`` tokens behind ``prompt``, in turns, with the logits of all of them.
    """
    model = fine_tune.model
    cache = model.new_cache(len(prompt) + 1 + num_tokens)

    def run(start: int, count: int) -> float:
        positions = torch.arange(start, start + count, device=model.device)
        ids = torch.tensor([prompt[place % len(prompt)] for place in positions.tolist()], device=model.device)
        batch = PackedBatch(positions, positions, [AttentionRow(0, count, 0, start + count)], positions + 1)
        began = time.perf_counter()
        output = model(ids, batch, cache, fine_tune.lora_segments(0, count), wanted=range(count))
        assert isinstance(output.answer, Logits)
        float(output.answer.values[0, 0])  # waits for an accelerator
        return time.perf_counter() - began

    run(0, len(prompt))
    widths = (1, 1 + num_tokens)
    seconds = [[run(len(prompt), width) for width in widths] for _ in range(PASSES_TIMED)]
    one = median(pair[0] for pair in seconds)
    many = median(pair[1] for pair in seconds)
    return max(many / one - 1.0, 0.0) / num_tokens


def draft_costs(measurements: Sequence[Measurement], verified: float) -> DraftCosts:
    """What a draft adds to a step, from greedy chains of the smallest batch.

    How long a step takes follows from tokens per second and tokens per step. A chain of ``k`` tokens adds one
    extension, ``k - 1`` passes of the draft and ``k`` tokens to verify: a straight line over ``k``. It does not tell
    the passes from the tokens, so ``verified``, the share of a token, is measured apart.
    """
    smallest = min(measurement.batch_size for measurement in measurements)
    chains = [
        m
        for m in measurements
        if m.batch_size == smallest and m.mode == "chain" and not m.min_probability and not m.temperature
    ]
    plain = next(1.0 / m.tokens_per_second for m in chains if m.num_speculative_tokens == 0)
    points = [
        (m.num_speculative_tokens, m.mean_acceptance_length / m.tokens_per_second / plain - 1.0)
        for m in chains
        if m.num_speculative_tokens
    ]
    if not points:
        return DraftCosts()
    if len(points) == 1:
        [(length, added)] = points
        slope, intercept = added / length, 0.0
    else:
        slope, intercept = linear_regression(*zip(*points, strict=True))
    draft = slope - verified
    costs = (draft, verified, intercept + draft)
    return DraftCosts(*(round(min(max(cost, 0.0), 10.0), 4) for cost in costs))


def best_levels(measurements: Sequence[Measurement]) -> tuple[SpeculationLevel, ...]:
    """The fastest setting of each batch size; plain decoding where no draft is clearly faster."""
    levels: list[SpeculationLevel] = []
    for batch_size in sorted({m.batch_size for m in measurements}):
        here = [m for m in measurements if m.batch_size == batch_size]
        best = _fastest([m for m in here if not m.temperature])
        sampled = [m for m in here if m.temperature]
        best_sampled = _fastest(sampled) if sampled else None
        levels.append(
            SpeculationLevel(
                batch_size,
                best.mode,
                best.num_speculative_tokens,
                min_probability=best.min_probability,
                sampled_chain=None if best_sampled is None else best_sampled.num_speculative_tokens,
                sampled_min_probability=0.0 if best_sampled is None else best_sampled.min_probability,
            )
        )
    return tuple(levels)


def _fastest(measurements: Sequence[Measurement]) -> Measurement:
    plain = next(m for m in measurements if m.num_speculative_tokens == 0)
    best = max(measurements, key=lambda m: m.tokens_per_second)
    return plain if best.tokens_per_second < SMALLEST_GAIN * plain.tokens_per_second else best


def calibration_view(measurements: list[Measurement], table: SpeculationTable) -> Table:
    """What was chosen for each batch size, and what it gained, for a terminal."""
    costs = table.costs
    view = Table(
        title="chosen by batch size; fractions of a plain step: "
        f"extension {costs.extension_cost:.2f}, draft pass {costs.draft_cost:.2f}, "
        f"verified token {costs.verification_cost:.2f}"
    )
    for name in ("sequences up to", "temperature", "draft", "tokens/s", "plain", "acceptance"):
        view.add_column(name, justify="right")
    for level in table.levels:
        for temperature in sorted({m.temperature for m in measurements}):
            here = [
                m
                for m in measurements
                if (m.batch_size, m.temperature) == (level.max_batch_size, temperature)
            ]
            chosen = level.speculation(sampled=temperature > 0.0)
            best = next(m for m in here if m.speculation == chosen)
            plain = next(m for m in here if m.num_speculative_tokens == 0)
            length = best.num_speculative_tokens
            name = f"{best.mode} {length}" if length else "none"
            if best.min_probability:
                name += f", to a probability of {best.min_probability:g}"
            view.add_row(
                str(level.max_batch_size),
                f"{temperature:g}",
                name,
                f"{best.tokens_per_second:.1f}",
                f"{plain.tokens_per_second:.1f}",
                f"{best.mean_acceptance_length:.2f}",
            )
    return view
