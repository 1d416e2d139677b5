"""The loop that trains the base and its fine-tunes: budget, clipping, rate, log and checkpoints."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import nn

from recipes.hardware import Hardware
from recipes.optimizer import BatchedMuon
from recipes.training_state import LossLog, Position, load_state, save_state

Batch = TypeVar("Batch")


class LoopSettings(Protocol):
    """What the loop reads of a stage's settings."""

    @property
    def max_tokens(self) -> int: ...
    @property
    def max_seconds(self) -> float: ...
    @property
    def matrix_rate(self) -> float | None: ...
    @property
    def other_rate(self) -> float: ...
    @property
    def checkpoint_seconds(self) -> float: ...
    @property
    def log_every(self) -> int: ...


@dataclass(frozen=True)
class Steps(Generic[Batch]):
    """What one stage does in a step.

    Attributes:
        batches: those of all steps from the given one on.
        backward: accumulates gradients of one batch; returns its loss and the tokens that count for the budget.
        rate_scale: of the share of the budget that is used.
    """

    batches: Callable[[int], Iterator[Batch]]
    backward: Callable[[Batch], tuple[float, int]]
    rate_scale: Callable[[float], float]


def run_steps(
    model: nn.Module,
    steps: Steps[Batch],
    settings: LoopSettings,
    hardware: Hardware,
    checkpoint: Path,
    log: LossLog,
    *,
    start: Position,
    until: float = 1.0,
    stop_after_steps: int | None = None,
    started: dict[str, object],
) -> Position:
    """Train in place until the share `until` of the budget is used, from `checkpoint` or else from `start`.

    `stop_after_steps` interrupts a run on purpose; `started` is what the log says of the stage at its start.
    """
    optimizer = BatchedMuon(
        model,
        settings.matrix_rate,
        settings.other_rate,
        newton_schulz_dtype=getattr(torch, hardware.compute_dtype),
    )
    position = load_state(checkpoint, model, optimizer) or start
    log.write({"event": "start", "step": position.step, **started, **hardware.describe()})

    began = time.monotonic() - position.seconds
    saved_at = logged_at = position.seconds
    logged_tokens = position.num_tokens
    losses: list[float] = []
    for batch in steps.batches(position.step):
        progress = max(position.num_tokens / settings.max_tokens, position.seconds / settings.max_seconds)
        if progress >= until:
            break
        loss, num_tokens = steps.backward(batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = steps.rate_scale(progress)
        optimizer.step(scale)
        losses.append(loss)
        position.step += 1
        position.num_tokens += num_tokens
        position.seconds = time.monotonic() - began
        if position.step % settings.log_every == 0:
            log.write(
                {
                    "step": position.step,
                    "tokens": position.num_tokens,
                    "seconds": round(position.seconds, 1),
                    "loss": round(sum(losses) / len(losses), 4),
                    "rate_scale": round(scale, 4),
                    "tokens_per_second": round(
                        (position.num_tokens - logged_tokens) / (position.seconds - logged_at)
                    ),
                }
            )
            logged_at, logged_tokens, losses = position.seconds, position.num_tokens, []
        if position.seconds - saved_at >= settings.checkpoint_seconds:
            save_state(checkpoint, model, optimizer, position)
            saved_at = position.seconds
        if stop_after_steps is not None and position.step >= stop_after_steps:
            break
    save_state(checkpoint, model, optimizer, position)
    return position
