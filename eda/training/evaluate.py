"""What a private module is worth: real decoding of held-out prompts, without a draft, with the shared one, and adapted.

The variants take turns prompt by prompt, so that a machine that slows down slows all of them down.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from eda.decoder import SpeculativeDecoder
from eda.generation import Generation, GenerationRequest, Throughput, generate, summarise
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateModule
from eda.sampling.params import SamplingParams
from eda.speculation.kinds import Chain, Off, Speculation
from eda.training.data.prompts import ChatFormat, Prompt, encode_prompts
from eda.training.files import provenance, write_json
from eda.training.progress import (
    OnProgress,
    ProgressEvent,
    ShouldStop,
    StageStoppedError,
    ignore_progress,
    never_stop,
)

LOOP_LENGTH = 8
LOOP_REPEATS = 3
PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class EvaluationConfig:
    """How to measure.

    Attributes:
        max_tokens: length of an answer, at most. Prompts over ``max_prompt_tokens`` are passed over.
        batch_size: sequences decoded together; 1 is what one user sees.
        speculation: of all variants but plain decoding.
    """

    max_tokens: int = 128
    max_prompt_tokens: int = 512
    temperatures: tuple[float, ...] = (0.0, 1.0)
    batch_size: int = 1
    speculation: Speculation = field(default_factory=Chain)

    @property
    def num_slots(self) -> int:
        """Cache slots for a full batch of the longest sequences."""
        return self.batch_size * (self.max_prompt_tokens + self.max_tokens + self.speculation.slots + 1)


@dataclass(frozen=True, slots=True)
class Variant:
    """A way of decoding: a decoder (its draft is the variant's draft) and a private module."""

    decoder: SpeculativeDecoder
    private: PrivateModule | None = None
    speculates: bool = True


@dataclass(frozen=True, slots=True)
class VariantMeasurement:
    """One variant at one temperature.

    Attributes:
        mean_acceptance_length: tokens per target pass, pooled over all passes.
        accepted_per_position: share of passes that accepted the draft token at each position.
        speed_up: tokens per second over those of plain decoding in the same run; ``None`` without a plain variant.
        loop_share: share of answers that repeat an 8-gram three times or more.
        without_loops: acceptance length of the other answers; ``None`` when all loop.
    """

    num_prompts: int
    num_tokens: int
    seconds: float
    tokens_per_second: float
    mean_acceptance_length: float
    accepted_per_position: tuple[float, ...]
    speed_up: float | None
    loop_share: float
    without_loops: float | None


def evaluate(
    fine_tune: FineTune,
    variants: Mapping[str, Variant],
    prompts: Sequence[Prompt],
    chat: ChatFormat,
    config: EvaluationConfig,
    *,
    output: Path | None = None,
    on_progress: OnProgress = ignore_progress,
    should_stop: ShouldStop = never_stop,
) -> dict[str, dict[str, VariantMeasurement]]:
    """Measurements by variant and by temperature ("0.0", "1.0").

    Args:
        variants: by name; ``"plain"`` is what speed-ups refer to.
        output: JSON file for the result.

    Raises ``StageStoppedError`` when ``should_stop`` says so; nothing is kept, as half a measurement is none.
    """
    encoded = [
        ids for _, ids in encode_prompts(prompts, chat, should_stop) if len(ids) <= config.max_prompt_tokens
    ]
    groups = [encoded[at : at + config.batch_size] for at in range(0, len(encoded), config.batch_size)]
    generations: dict[tuple[str, float], list[Generation]] = {}
    seconds: dict[tuple[str, float], float] = {}
    names = list(variants)
    total = len(groups) * len(config.temperatures)
    # What runs first pays for warming up caches and allocators, so one group runs once for nothing.
    for name in names if groups else ():
        _decode(fine_tune, variants[name], groups[0], chat, config, 0.0)
    for place in range(total):
        temperature, index = config.temperatures[place // len(groups)], place % len(groups)
        for turn in range(len(names)):
            if should_stop():
                raise StageStoppedError(f"evaluation stopped after {place} of {total} groups of prompts")
            name = names[(place + turn) % len(names)]
            start = time.perf_counter()
            made = _decode(fine_tune, variants[name], groups[index], chat, config, temperature)
            key = name, temperature
            seconds[key] = seconds.get(key, 0.0) + time.perf_counter() - start
            generations.setdefault(key, []).extend(made)
        on_progress(ProgressEvent("evaluate", place + 1, total))
    measured: dict[str, dict[str, VariantMeasurement]] = {name: {} for name in names}
    for (name, temperature), made in generations.items():
        plain = (PLAIN, temperature)
        rate = None
        if plain in generations:
            rate = summarise(generations[plain], seconds[plain]).tokens_per_second
        measured[name][str(temperature)] = _measurement(made, seconds[name, temperature], rate)
    if output is not None:
        document = {
            "config": asdict(config),
            "fine_tune": fine_tune.fingerprint,
            "variants": {n: {t: asdict(m) for t, m in by.items()} for n, by in measured.items()},
            "provenance": provenance(),
        }
        write_json(output, document)
    return measured


def loops(token_ids: Sequence[int]) -> bool:
    """Whether some 8-gram occurs three times or more: such text is drafted easily and flatters every draft."""
    counts: dict[tuple[int, ...], int] = {}
    for start in range(len(token_ids) - LOOP_LENGTH + 1):
        gram = tuple(token_ids[start : start + LOOP_LENGTH])
        counts[gram] = counts.get(gram, 0) + 1
        if counts[gram] >= LOOP_REPEATS:
            return True
    return False


def _decode(
    fine_tune: FineTune,
    variant: Variant,
    group: Sequence[Sequence[int]],
    chat: ChatFormat,
    config: EvaluationConfig,
    temperature: float,
) -> list[Generation]:
    speculation = config.speculation if variant.speculates else Off()
    requests = [
        GenerationRequest(
            ids,
            config.max_tokens,
            chat.eos_ids,
            SamplingParams(temperature=temperature),
            speculation,
            variant.private,
        )
        for ids in group
    ]
    return generate(variant.decoder, fine_tune, requests, max_batch=config.batch_size)


def _measurement(
    generations: Sequence[Generation], seconds: float, plain_rate: float | None
) -> VariantMeasurement:
    whole: Throughput = summarise(generations, seconds)
    straight = [generation for generation in generations if not loops(generation.token_ids)]
    rate = whole.tokens_per_second
    return VariantMeasurement(
        num_prompts=len(generations),
        num_tokens=whole.num_tokens,
        seconds=seconds,
        tokens_per_second=rate,
        mean_acceptance_length=whole.mean_acceptance_length,
        accepted_per_position=tuple(whole.accepted_per_position),
        speed_up=rate / plain_rate if plain_rate else None,
        loop_share=1.0 - len(straight) / len(generations) if generations else 0.0,
        without_loops=summarise(straight, 1.0).mean_acceptance_length if straight else None,
    )
