"""How the stages of training report and how they are told to stop."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from eda.errors import EdaError


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """A stage's state at one moment.

    Attributes:
        stage: "triage", "regenerate", "select", "train" or "evaluate".
        done, total: units of work (samples, steps, prompts).
        metrics: numbers of a curve, for instance ``{"step": 10, "loss": 1.2}``; empty between its points.
    """

    stage: str
    done: int
    total: int
    message: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


OnProgress = Callable[[ProgressEvent], None]
ShouldStop = Callable[[], bool]


class StageStoppedError(EdaError):
    """A stage ended early because ``should_stop`` said so; a later call goes on from its files."""


def ignore_progress(event: ProgressEvent) -> None:
    """For callers that do not watch."""


def never_stop() -> bool:
    """For callers that do not interrupt."""
    return False
