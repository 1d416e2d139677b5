"""Data regeneration: the fine-tune answers the training prompts itself, and the draft learns from these answers.

Answers are drawn with a seed per prompt, so a run that is interrupted and started again gives the same samples as one
that was not, whatever the batches were.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eda.decoder import SpeculativeDecoder
from eda.errors import TrainingError
from eda.generation import Generation, GenerationRequest, generate
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateModule
from eda.sampling.params import SamplingParams
from eda.speculation.kinds import Chain, Off
from eda.training.data.prompts import ChatFormat, Prompt, encode_prompts
from eda.training.data.samples import SAMPLES_FILE, Sample, read_samples
from eda.training.files import (
    LineWriter,
    hash_of_json,
    hash_of_lines,
    provenance,
    read_json_if_present,
    write_json,
)
from eda.training.progress import (
    OnProgress,
    ProgressEvent,
    ShouldStop,
    StageStoppedError,
    ignore_progress,
    never_stop,
)

REPORT_FILE = "regenerate.json"


@dataclass(frozen=True, slots=True)
class RegenerationConfig:
    """How prompts are answered.

    Attributes:
        max_tokens: length of an answer, at most.
        max_prompt_tokens: longer prompts are counted and passed over.
        sampled_share: share of the answers that are drawn at ``temperature``; the others are greedy.
        batch_size: answers that are generated at the same time.
        num_speculative_tokens: draft tokens per step where the decoder has a draft; 0 decodes plainly, which is quicker
            for large batches and for drafts that fit badly.
    """

    max_tokens: int = 160
    max_prompt_tokens: int = 512
    sampled_share: float = 0.3
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 32
    num_speculative_tokens: int = 0
    seed: int = 0

    @property
    def num_slots(self) -> int:
        """Cache slots for a full batch of the longest sequences."""
        longest = self.max_prompt_tokens + self.max_tokens + self.num_speculative_tokens + 2
        return self.batch_size * longest


@dataclass(frozen=True, slots=True)
class RegenerationReport:
    """What came of the prompts. ``num_empty`` answers ended at once and hold nothing to learn."""

    num_prompts: int
    num_samples: int
    num_too_long: int
    num_empty: int
    num_greedy: int
    num_cut: int
    """Answers that reached ``max_tokens``."""
    num_tokens: int
    too_long_ids: tuple[str, ...] = field(default_factory=tuple)
    """The first few of them."""


def regenerate(
    decoder: SpeculativeDecoder,
    fine_tune: FineTune,
    prompts: Sequence[Prompt],
    chat: ChatFormat,
    directory: Path,
    config: RegenerationConfig,
    *,
    private: PrivateModule | None = None,
    on_progress: OnProgress = ignore_progress,
    should_stop: ShouldStop = never_stop,
) -> tuple[list[Sample], RegenerationReport]:
    """Answers ``prompts`` into ``directory/samples.jsonl`` and returns the samples in the prompts' order.

    Each answer is appended as soon as it is complete; a later call with the same arguments adds only what is missing.

    Raises:
        DataError: the samples there are damaged, or the chat template refuses a prompt.
        TrainingError: they were made with other settings, or the disk is full.
        StageStoppedError: ``should_stop`` said so; what is complete is kept.
    """
    encoded = encode_prompts(prompts, chat, should_stop)
    too_long = [prompt.id for prompt, ids in encoded if len(ids) > config.max_prompt_tokens]
    usable = [(prompt, ids) for prompt, ids in encoded if 0 < len(ids) <= config.max_prompt_tokens]
    path = directory / SAMPLES_FILE
    run = _claim(directory, fine_tune, prompts, config)
    done = {sample.id: sample for sample in read_samples(path)}
    missing = [(prompt, ids) for prompt, ids in usable if prompt.id not in done]
    # Long prompts together: a batch then ends at about the same time in all its rows.
    missing.sort(key=lambda pair: len(pair[1]))
    requests = [_request(prompt, ids, config, chat.eos_ids, private) for prompt, ids in missing]
    stopped = False

    with LineWriter(path) as writer:

        def keep(place: int, generation: Generation) -> None:
            prompt, ids = missing[place]
            sample = Sample(
                prompt.id,
                tuple(ids),
                tuple(generation.token_ids),
                requests[place].sampling.temperature,
                generation.finish_reason,
            )
            done[prompt.id] = sample
            writer.write({**asdict(sample), "text": chat.decode(sample.response_ids)})
            on_progress(ProgressEvent("regenerate", len(done), len(usable)))

        def stop() -> bool:
            nonlocal stopped
            stopped = stopped or should_stop()
            return stopped

        if requests:
            generate(
                decoder,
                fine_tune,
                requests,
                max_batch=config.batch_size,
                on_finished=keep,
                should_stop=stop,
            )
    if stopped and len(done) < len(usable):
        raise StageStoppedError(f"regeneration stopped after {len(done)} of {len(usable)} answers")
    samples = [done[prompt.id] for prompt, _ in usable]
    report = _report(samples, len(prompts), too_long)
    write_json(directory / REPORT_FILE, {**run, "report": asdict(report)})
    return samples, report


def is_drawn(prompt_id: str, config: RegenerationConfig) -> bool:
    """Whether a prompt's answer is drawn at the temperature rather than greedy; decided by its id and the seed."""
    return _uniform(prompt_id, config.seed, "mix") < config.sampled_share


def _request(
    prompt: Prompt,
    ids: list[int],
    config: RegenerationConfig,
    eos_ids: frozenset[int],
    private: PrivateModule | None,
) -> GenerationRequest:
    sampling = SamplingParams(temperature=0.0)
    if is_drawn(prompt.id, config):
        seed = int(_uniform(prompt.id, config.seed, "noise") * 2**52)
        sampling = SamplingParams(temperature=config.temperature, top_p=config.top_p, seed=seed)
    length = config.num_speculative_tokens
    speculation = Chain(length) if length else Off()
    return GenerationRequest(ids, config.max_tokens, eos_ids, sampling, speculation, private)


def _uniform(prompt_id: str, seed: int, purpose: str) -> float:
    digest = hashlib.sha256(f"{seed}/{purpose}/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _claim(
    directory: Path, fine_tune: FineTune, prompts: Sequence[Prompt], config: RegenerationConfig
) -> dict[str, Any]:
    """Writes down what the samples are made from; refuses to mix them with others."""
    described = {
        "config": asdict(config),
        "fine_tune": fine_tune.fingerprint,
        "prompts": hash_of_lines(f"{p.id} {hash_of_json([dict(m) for m in p.messages])}" for p in prompts),
    }
    present = read_json_if_present(directory / REPORT_FILE)
    if present is not None and (not isinstance(present, dict) or present.get("made_from") != described):
        raise TrainingError(
            f"{directory} holds answers to other prompts, of another fine-tune or with other settings; "
            "remove it or choose another output directory"
        )
    run = {"made_from": described, "provenance": provenance()}
    if present is None:
        write_json(directory / REPORT_FILE, run)
    return run


def _report(samples: Sequence[Sample], num_prompts: int, too_long: Sequence[str]) -> RegenerationReport:
    return RegenerationReport(
        num_prompts=num_prompts,
        num_samples=len(samples),
        num_too_long=len(too_long),
        num_empty=sum(sample.num_roots == 0 for sample in samples),
        num_greedy=sum(sample.temperature == 0.0 for sample in samples),
        num_cut=sum(sample.finish_reason == "length" for sample in samples),
        num_tokens=sum(len(sample.response_ids) for sample in samples),
        too_long_ids=tuple(too_long[:8]),
    )
