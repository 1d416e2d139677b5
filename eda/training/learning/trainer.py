"""One trainer for the shared draft, the private module and the controls: what differs is which parameters learn.

Unrolled steps on the draft's own outputs, soft labels from the target, Muon with a warm-up and a cosine to zero. The
best state is chosen by simulated acceptance length on held-out answers: the loss keeps falling after acceptance has
peaked.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from eda.errors import TrainingError
from eda.training.data.dataset import Dataset, TrainingBatch
from eda.training.files import hash_of_json
from eda.training.learning.acceptance import DEFAULT_DRAFT_TOKENS, simulate_acceptance
from eda.training.learning.checkpoints import TrainingState, load_state, save_state
from eda.training.learning.loss import LossKind, head_loss, step_weights
from eda.training.learning.optimizer import MuonAdamW
from eda.training.learning.precision import autocast, product_dtype
from eda.training.learning.stopwatch import Stopwatch
from eda.training.learning.trainees import Trainee
from eda.training.learning.unroll import unroll
from eda.training.progress import (
    OnProgress,
    ProgressEvent,
    ShouldStop,
    StageStoppedError,
    ignore_progress,
    never_stop,
)

_RATE_TIMES_WIDTH = {"private": 2.56, "shared": 2.56, "lora": 2.56, "retrain": 2.0}


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How to train.

    Attributes:
        num_steps: optimiser steps; ``None`` derives them from ``epochs``.
        batch_size: samples in a step.
        unroll_steps: draft tokens that each root is unrolled over; ``step_decay`` weighs each against the one before.
        learning_rate: peak of the schedule; ``None`` takes ``default_learning_rate``.
        warmup: share of the steps that lead up to it.
        clip: largest norm of the gradient.
        evaluate_every: optimiser steps between measurements on held-out answers; ``None`` makes about twelve.
        patience: measurements without improvement after which training stops; ``None`` never stops early, since most of
            the gain comes when the rate has fallen.
        num_draft_tokens: chain length of the simulated acceptance length.
        checkpoint_seconds: time between checkpoints.
    """

    num_steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 16
    unroll_steps: int = 4
    step_decay: float = 0.8
    loss: LossKind = "lk"
    learning_rate: float | None = None
    warmup: float = 0.04
    weight_decay: float = 0.01
    clip: float = 0.5
    evaluate_every: int | None = None
    patience: int | None = None
    num_draft_tokens: int = DEFAULT_DRAFT_TOKENS
    checkpoint_seconds: float = 60.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What a run did. Lengths are simulated acceptance lengths; ``first_score`` is of the state before training.

    ``seconds`` holds the time of each part (see ``stopwatch.Part``), of interrupted runs too; they add up to the whole.
    """

    num_steps: int
    best_step: int
    best_score: float
    first_score: float
    num_parameters: int
    train_seconds: float
    stopped_early: bool
    history: tuple[dict[str, float], ...]
    seconds: dict[str, float]


def train(
    trainee: Trainee,
    training: Dataset,
    held_out: Dataset,
    config: TrainingConfig,
    *,
    checkpoint: Path | None = None,
    on_progress: OnProgress = ignore_progress,
    should_stop: ShouldStop = never_stop,
) -> TrainingReport:
    """Trains in place and leaves ``trainee`` with its best state.

    Args:
        checkpoint: file to go on from and to save to; ``None`` keeps nothing. A run that goes on gives the same result.

    Raises:
        TrainingError: there is nothing to train or measure on, or a loss or gradient is not finite. The checkpoint then
            holds the weights before that step.
        MismatchError: ``checkpoint`` belongs to another run.
        StageStoppedError: ``should_stop`` said so; the checkpoint is written.
    """
    if not len(training) or not len(held_out):
        raise TrainingError(
            f"{len(training)} usable samples to train on and {len(held_out)} to measure with; both need at least 1 "
            "(an answer needs two tokens)"
        )
    return _Run(trainee, training, held_out, config, checkpoint, on_progress, should_stop).train()


class _Run:
    def __init__(
        self,
        trainee: Trainee,
        training: Dataset,
        held_out: Dataset,
        config: TrainingConfig,
        checkpoint: Path | None,
        on_progress: OnProgress,
        should_stop: ShouldStop,
    ) -> None:
        self.trainee, self.training, self.held_out = trainee, training, held_out
        self.config, self.checkpoint = config, checkpoint
        self.on_progress, self.should_stop = on_progress, should_stop
        self.steps_per_epoch = math.ceil(len(training) / config.batch_size)
        self.num_steps = config.num_steps or math.ceil(config.epochs * self.steps_per_epoch)
        self.evaluate_every = config.evaluate_every or max(1, math.ceil(self.num_steps / 12))
        self.peak_rate = config.learning_rate or default_learning_rate(trainee)
        rows = training.states.fine_tune.head_rows(trainee.draft.draft_token_ids)
        self.head_rows = rows.to(product_dtype(rows.device))
        self.times = Stopwatch(rows.device)
        self.optimizer = MuonAdamW(trainee.parameters, self.peak_rate, config.weight_decay)
        self.run = hash_of_json(
            {
                "config": asdict(config),
                "kind": trainee.kind,
                "shapes": {name: list(p.shape) for name, p in trainee.parameters.items()},
                "fine_tune": training.states.fine_tune.fingerprint,
                "samples": [
                    [s.id, s.length, sum(s.response_ids)] for s in training.samples + held_out.samples
                ],
            }
        )
        self.epoch, self.epoch_batches = -1, list[list[int]]()

    def train(self) -> TrainingReport:
        loaded = (
            load_state(self.checkpoint, self.trainee, self.optimizer, self.run) if self.checkpoint else None
        )
        state = loaded or TrainingState()
        self.times.add(state.seconds)
        try:
            stopped_early = self._train(state)
        finally:  # also when stopped or failed: the state is always the one after a whole step
            self._save(state)
        self.trainee.load(state.best)
        return TrainingReport(
            num_steps=state.step,
            best_step=state.best_step,
            best_score=state.best_score,
            first_score=state.history[0]["acceptance_length"],
            num_parameters=self.trainee.num_parameters,
            train_seconds=state.train_seconds,
            stopped_early=stopped_early,
            history=tuple(state.history),
            seconds=self.times.seconds(),
        )

    def _train(self, state: TrainingState) -> bool:
        """Runs to the end; tells whether that was before the last step."""
        last_saved = time.monotonic()
        while True:
            if self._is_due(state):
                self._measure(state)
            if state.step >= self.num_steps:
                return False
            if self._out_of_patience(state):
                return True
            if self._stopped():
                raise StageStoppedError(f"training stopped after step {state.step} of {self.num_steps}")
            if time.monotonic() - last_saved > self.config.checkpoint_seconds:
                self._save(state)
                last_saved = time.monotonic()
            self._step(state)

    def _is_due(self, state: TrainingState) -> bool:
        """Whether this step is to be measured and was not yet; a run may have been stopped in between."""
        measured = state.history and state.history[-1]["step"] == state.step
        return not measured and (state.step % self.evaluate_every == 0 or state.step == self.num_steps)

    def _step(self, state: TrainingState) -> None:
        start = time.perf_counter()
        with self.times.part("target_states"):
            batch = self.training.batch(self._indices(state.step), self.config.unroll_steps)
        rate = learning_rate(self.peak_rate, self.config.warmup, state.step, self.num_steps)
        with autocast(self.head_rows.device):
            loss, acceptances = batch_loss(self.trainee, batch, self.head_rows, self.config, self.times)
        self.optimizer.zero_grad()
        with self.times.part("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        self._check_frozen(state.step)
        with self.times.part("optimizer"):
            norm = torch.nn.utils.clip_grad_norm_(list(self.trainee.parameters.values()), self.config.clip)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            raise TrainingError(
                f"step {state.step + 1}: the loss is {loss.item()} and the gradient's norm {norm.item()}; both must "
                f"be finite. The weights after step {state.step} are kept (best: step {state.best_step}); "
                "a lower learning rate may help"
            )
        with self.times.part("optimizer"):
            self.optimizer.step(rate)
        state.step += 1
        state.train_seconds += time.perf_counter() - start
        metrics = {"step": float(state.step), "loss": loss.item(), "learning_rate": rate}
        metrics |= {f"acceptance_{step}": value for step, value in enumerate(acceptances)}
        self._report(ProgressEvent("train", state.step, self.num_steps, metrics=metrics))

    def _report(self, event: ProgressEvent) -> None:
        with self.times.part("reporting"):
            self.on_progress(event)

    def _stopped(self) -> bool:
        with self.times.part("reporting"):
            return self.should_stop()

    def _indices(self, step: int) -> list[int]:
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.epoch_batches = self.training.batches_of_epoch(
                self.config.batch_size, self.config.seed, epoch
            )
        return self.epoch_batches[place]

    def _check_frozen(self, step: int) -> None:
        wrong = self.trainee.frozen_with_gradients()
        if wrong:
            raise TrainingError(f"step {step + 1}: frozen parameters received gradients: {', '.join(wrong)}")

    def _measure(self, state: TrainingState) -> None:
        with self.times.part("evaluation"):
            measured = simulate_acceptance(
                self.trainee.draft,
                self.trainee.private,
                self.held_out,
                num_draft_tokens=self.config.num_draft_tokens,
                batch_size=self.config.batch_size,
                should_stop=self._stopped,
                times=self.times,
            )
        point = {
            "step": float(state.step),
            "acceptance_length": measured.mean_length,
            "first_token_acceptance": measured.first_token,
        }
        state.history.append(point)
        if measured.mean_length > state.best_score:
            state.best, state.best_score = self.trainee.state(), measured.mean_length
            state.best_step = state.step
        message = f"acceptance length {measured.mean_length:.3f} after {state.step} steps"
        self._report(ProgressEvent("train", state.step, self.num_steps, message, point))

    def _out_of_patience(self, state: TrainingState) -> bool:
        if self.config.patience is None:
            return False
        since = [point for point in state.history if point["step"] > state.best_step]
        return len(since) >= self.config.patience

    def _save(self, state: TrainingState) -> None:
        if self.checkpoint is None:
            return
        with self.times.part("saving"):
            state.seconds = self.times.seconds()
            save_state(self.checkpoint, state, self.trainee, self.optimizer, self.run)


def batch_loss(
    trainee: Trainee, batch: TrainingBatch, head_rows: Tensor, config: TrainingConfig, times: Stopwatch
) -> tuple[Tensor, list[float]]:
    """The loss of a batch, and the mean probability of acceptance at each step.

    Every step's loss is a mean over the answer tokens that it predicts (prompts and padding are masked out); steps are
    weighed by ``config.step_decay``.
    """
    with times.part("loss"):
        target = batch.distributions(head_rows)
    outputs = unroll(
        trainee.draft,
        batch.features,
        batch.embeddings,
        config.unroll_steps,
        trainee.private,
        first_roots=batch.first_roots,
        num_roots=batch.max_roots,
    )
    total = torch.zeros((), device=batch.features.device)
    acceptances: list[float] = []
    for step, share in enumerate(step_weights(config.unroll_steps, config.step_decay)):
        positions = batch.positions(step)
        if not positions.numel():
            break
        with times.part("draft_forward"):
            hidden = trainee.draft.norm(next(outputs)[batch.valid(step)])
        with times.part("loss"):
            weights = torch.full(positions.shape, share / positions.numel(), device=hidden.device)
            result = head_loss(hidden, head_rows, target, positions, weights, config.loss)
            total = total + result.loss
            acceptances.append(float(result.acceptance.mean()))
    return total, acceptances


def learning_rate(peak: float, warmup: float, step: int, num_steps: int) -> float:
    """Rate of optimiser step ``step`` (from 0): a linear warm-up over the share ``warmup``, then a cosine to zero."""
    leading = max(1, round(warmup * num_steps))
    if step < leading:
        return peak * (step + 1) / leading
    progress = (step - leading) / max(1, num_steps - leading)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def default_learning_rate(trainee: Trainee) -> float:
    """Peak rate by kind and width. Found on a draft 256 wide; falls with the width, as Adam's best rates do.

    A module that starts at zero beside frozen weights takes much larger steps than weights that are trained already.
    """
    return _RATE_TIMES_WIDTH[trainee.kind] / trainee.draft.config.hidden_size
