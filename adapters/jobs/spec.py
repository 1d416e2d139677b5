"""What an adaptation job is asked to do. Plain values: a job row stores them as JSON, a worker reads them back."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self, get_origin, get_type_hints

from annotated_types import Ge, Le
from pydantic import ConfigDict, Field
from pydantic.fields import FieldInfo

from eda.adapters.errors import InvalidInputError
from eda.training.data.scores import DEFAULT_SCORE, SCORES

TargetKind = Literal["target", "lora", "full"]
DataKind = Literal["prompts", "self", "traffic"]
Activation = Literal["if_better", "always", "never"]

DEFAULT_MARGIN = 0.02
"""Share by which held-out acceptance length must beat what is active before ``if_better`` activates."""


DRAFT_ROOM = 32
"""Positions of the model that answering prompts leaves free for draft tokens."""


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How the private module is trained; ``None`` leaves a choice to the trainer.

    An option is declared here and nowhere else: bodies of requests and flags of ``eda adapt`` are made from these
    fields. In brackets stands what ``None`` means.

    Raises:
        InvalidInputError: a value is out of its range, or nothing would be trained.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    intermediate_size: Annotated[
        int | None,
        Field(
            ge=0,
            le=65_536,
            description="width of the private network, units; 0 leaves it out [a quarter of the shared one's]",
        ),
    ] = None
    fc_rank: Annotated[
        int | None,
        Field(
            ge=0,
            le=4_096,
            description="rank of the correction of `fc`; 0 leaves it out [an eighth of the draft's width]",
        ),
    ] = None
    attention_rank: Annotated[
        int | None,
        Field(
            ge=0,
            le=4_096,
            description="rank of the corrections of attention; 0 leaves them out [an eighth of the draft's width]",
        ),
    ] = None
    learning_rate: Annotated[
        float | None, Field(ge=1e-8, le=1.0, description="peak rate [2.56 / hidden size]")
    ] = None
    num_steps: Annotated[
        int | None, Field(ge=1, le=10_000_000, description="optimiser steps, at most [3 passes]")
    ] = None
    batch_size: Annotated[
        int | None, Field(ge=1, le=4_096, description="answers in an optimiser step [16]")
    ] = None
    keep: Annotated[
        float | None, Field(ge=0.01, le=1.0, description="share of the answers that is learned from [0.5]")
    ] = None
    score: Annotated[
        str | None,
        Field(max_length=64, description=f"what chooses them: {', '.join(SCORES)} [{DEFAULT_SCORE}]"),
    ] = None
    max_prompts: Annotated[
        int | None, Field(ge=1, le=1_000_000, description="prompts answered, at most [2000]")
    ] = None
    max_tokens: Annotated[
        int | None, Field(ge=1, le=32_768, description="tokens of an answer, at most [160]")
    ] = None
    held_out: Annotated[
        int | None, Field(ge=1, le=10_000, description="prompts to measure with [32, at most a fifth]")
    ] = None
    seed: Annotated[
        int, Field(ge=0, le=2**31 - 1, description="of shuffling, sampling and initialisation")
    ] = 0

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


def _ranges() -> dict[str, tuple[float, float]]:
    """The lowest and the highest value of each number."""
    found: dict[str, tuple[Any, Any]] = {}
    for name, hint in get_type_hints(TrainingOptions, include_extras=True).items():
        marks = FieldInfo.from_annotation(hint).metadata if get_origin(hint) is Annotated else []
        low = [mark.ge for mark in marks if isinstance(mark, Ge)]
        high = [mark.le for mark in marks if isinstance(mark, Le)]
        if low and high:
            found[name] = (low[0], high[0])
    return found


_RANGES = _ranges()


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
