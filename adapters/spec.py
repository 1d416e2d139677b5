"""What an adaptation job is asked to do. Plain values: a job row stores them as JSON, a worker reads them back."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from adapters.errors import InvalidInputError

TargetKind = Literal["target", "lora", "full"]
DataKind = Literal["prompts", "self", "traffic"]
Activation = Literal["if_better", "always", "never"]

ACTIVATIONS: tuple[Activation, ...] = ("if_better", "always", "never")
DEFAULT_MARGIN = 0.02
"""Share by which held-out acceptance length must beat what is active before ``if_better`` activates."""


DRAFT_ROOM = 32
"""Positions of the model that answering prompts leaves free for draft tokens."""


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How the private module is trained; ``None`` leaves a choice to ``eda.training``'s own default.

    Attributes:
        intermediate_size: width of the private feed-forward network, in units; 0 leaves it out.
        fc_rank: rank of the correction of the draft's ``fc``; 0 leaves it out.
        attention_rank: rank of the corrections of the draft's attention projections; 0 leaves them out.
        learning_rate: highest rate of the schedule.
        num_steps: optimiser steps, at most.
        batch_size: samples in a step.
        keep: share of the regenerated samples that are learned from, over 0 to 1.
        score: name of the selection score.
        max_prompts: prompts used, at most; the first ones after shuffling by ``seed``.
        max_tokens: length of a regenerated answer, in tokens, at most.
        held_out: prompts that are kept from training to measure with.
        seed: of shuffling, sampling and initialisation.
    """

    intermediate_size: int | None = None
    fc_rank: int | None = None
    attention_rank: int | None = None
    learning_rate: float | None = None
    num_steps: int | None = None
    batch_size: int | None = None
    keep: float | None = None
    score: str | None = None
    max_prompts: int | None = None
    max_tokens: int | None = None
    held_out: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InvalidInputError(
                    f"training.{name} is {value}; it must be from {low} to {high}", param=f"training.{name}"
                )
        if self.intermediate_size == 0 and self.fc_rank == 0 and self.attention_rank == 0:
            raise InvalidInputError(
                "training.intermediate_size, training.fc_rank and training.attention_rank are all 0; nothing would be "
                "trained",
                param="training",
            )


_RANGES: dict[str, tuple[float, float]] = {
    "intermediate_size": (0, 65_536),
    "fc_rank": (0, 4_096),
    "attention_rank": (0, 4_096),
    "learning_rate": (1e-8, 1.0),
    "num_steps": (1, 10_000_000),
    "batch_size": (1, 4_096),
    "keep": (0.01, 1.0),
    "max_prompts": (1, 1_000_000),
    "max_tokens": (1, 32_768),
    "held_out": (1, 10_000),
    "seed": (0, 2**31 - 1),
}


@dataclass(frozen=True, slots=True)
class DataSpec:
    """Where the prompts come from. "prompts" and "traffic" lie in the job's workspace; "self" are sampled.

    Attributes:
        count: prompts in the file, or prompts that the fine-tune is to write.
        sha256: of the file; empty for "self".
    """

    kind: DataKind
    count: int
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class AdaptationSpec:
    """One adaptation job.

    Attributes:
        adapter: name under which the fine-tune is served.
        fine_tune_path: directory of the fine-tune; ``fine_tune_fingerprint`` is what was there when the job was posted.
        margin: see ``DEFAULT_MARGIN``.
        incumbent_version: version that was active when the job was posted; the new one is measured against it.
    """

    job_id: str
    adapter: str
    adapter_uid: str
    kind: TargetKind
    fine_tune_path: str
    fine_tune_fingerprint: str
    data: DataSpec
    training: TrainingOptions = field(default_factory=TrainingOptions)
    triage: bool = True
    activate: Activation = "if_better"
    margin: float = DEFAULT_MARGIN
    incumbent_version: int | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """Raises ``InvalidInputError`` when ``document`` was written by another release."""
        try:
            data = DataSpec(**document["data"])
            training = TrainingOptions(**document["training"])
            return cls(**{**document, "data": data, "training": training})
        except (KeyError, TypeError) as error:
            raise InvalidInputError(f"the stored job is not one of this release: {error}") from error

    def fingerprint(self) -> str:
        """Hash of everything that decides a stage's result, to tell stale markers from good ones."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
