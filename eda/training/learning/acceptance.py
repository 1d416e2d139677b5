"""Acceptance length without decoding: the rounds that a greedy decoder would make, read off known answers.

The draft is unrolled over held-out answers, each step conditioned on the answer's own tokens. As long as a draft's
guesses equal the answer, that is exactly what the decoder would feed it, and what comes after the first wrong guess
does not count.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from eda.models.draft import DraftModel
from eda.models.private import PrivateModule
from eda.training.data.dataset import Dataset, TrainingBatch
from eda.training.learning.stopwatch import Stopwatch
from eda.training.learning.unroll import unroll
from eda.training.progress import ShouldStop, StageStoppedError, never_stop

DEFAULT_DRAFT_TOKENS = 5


@dataclass(frozen=True, slots=True)
class SimulatedAcceptance:
    """What greedy decoding with chains of ``num_draft_tokens`` would have accepted.

    Attributes:
        mean_length: mean tokens per target pass, the bonus token included.
        first_token: share of rounds whose first draft token is accepted.
        per_sample: mean length in each sample, in the dataset's order; 1.0 where a sample has no round.
    """

    mean_length: float
    first_token: float
    num_rounds: int
    per_sample: tuple[float, ...]


@torch.no_grad()
def simulate_acceptance(
    draft: DraftModel,
    private: PrivateModule | None,
    dataset: Dataset,
    *,
    num_draft_tokens: int = DEFAULT_DRAFT_TOKENS,
    batch_size: int = 16,
    should_stop: ShouldStop = never_stop,
    times: Stopwatch | None = None,
) -> SimulatedAcceptance:
    """Simulates greedy decoding of every sample of ``dataset``.

    The answers should be the target's own greedy ones. Rounds are walked as the decoder does: the next one begins
    behind the accepted tokens and the target's own. Near the end a draft is cut so that it never passes the last token.

    ``times`` is told what of it were the target's passes. Raises ``StageStoppedError`` when ``should_stop`` says so.
    """
    head_rows = dataset.states.fine_tune.head_rows(draft.draft_token_ids).to(draft.fc.weight.dtype)
    rounds_of: dict[int, list[int]] = {}
    for indices in dataset.batches_by_size(batch_size):
        if should_stop():
            raise StageStoppedError("stopped while simulating acceptance")
        with times.part("target_states") if times else nullcontext():
            batch = dataset.batch(indices, num_draft_tokens)
        runs = _runs(draft, private, batch, head_rows, num_draft_tokens)
        for index, row, count in zip(indices, runs.tolist(), batch.num_roots.tolist(), strict=True):
            rounds_of[index] = walk_rounds(row[:count])
    rounds = [accepted for values in rounds_of.values() for accepted in values]
    return SimulatedAcceptance(
        mean_length=1.0 + sum(rounds) / len(rounds) if rounds else 1.0,
        first_token=sum(accepted > 0 for accepted in rounds) / len(rounds) if rounds else 0.0,
        num_rounds=len(rounds),
        per_sample=tuple(
            1.0 + sum(values) / len(values) if (values := rounds_of.get(index)) else 1.0
            for index in range(len(dataset.states.samples))
        ),
    )


def _runs(
    draft: DraftModel,
    private: PrivateModule | None,
    batch: TrainingBatch,
    head_rows: Tensor,
    num_steps: int,
) -> Tensor:
    """Int64 ``[B, R]``: how many draft tokens in a row equal the answer's, from each root on."""
    alive = torch.ones_like(batch.tokens, dtype=torch.bool)
    runs = torch.zeros_like(batch.tokens)
    outputs = unroll(
        draft,
        batch.features,
        batch.embeddings,
        num_steps,
        private,
        first_roots=batch.first_roots,
        num_roots=batch.max_roots,
    )
    for step, output in enumerate(outputs):
        valid = alive & batch.valid(step)
        if not valid.any():
            break
        guesses = draft.draft_token_ids[draft.logits(output[valid], head_rows).argmax(-1)]
        answers = torch.roll(batch.tokens, -step, dims=1)[valid]
        alive = torch.zeros_like(alive).masked_scatter_(valid, guesses == answers)
        runs += alive
    return runs


def walk_rounds(runs: Sequence[int]) -> list[int]:
    """Accepted draft tokens of each round, from the runs of correct guesses at every root.

    A round at root ``r`` emits answer tokens from ``r + 1`` on, of ``len(runs) + 1``. The target gives the last token
    of a round itself, so at most ``len(runs) - 1 - r`` draft tokens can be accepted.
    """
    rounds = []
    root = 0
    while root < len(runs):
        accepted = min(runs[root], len(runs) - 1 - root)
        rounds.append(accepted)
        root += accepted + 1
    return rounds
