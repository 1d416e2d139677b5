"""Batches for training and for simulated acceptance: samples of similar length, padded at the end."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from eda.training.data.samples import Sample
from eda.training.data.target_states import StateCache
from eda.training.learning.loss import TargetDistributions

_BUCKET_BATCHES = 16
"""Samples are sorted within this many batches: little padding, and batches still differ by epoch."""


@dataclass(frozen=True)
class TrainingBatch:
    """``B`` samples. ``S`` is the longest number of positions, ``R`` the largest number of roots.

    Attributes:
        features: float32 ``[B, S, 3H]``, zero where padded.
        embeddings: ``[B, S + num_steps - 1, H]``, of the token after each position.
        first_roots: int64 ``[B]``: last prompt positions.
        num_roots: int64 ``[B]``.
        tokens: int64 ``[B, R]``: the answer's own tokens from the second on; root ``r`` drafts token ``r`` first.
        hidden: ``[P, H]`` and ``log_normaliser`` ``[P]``: the target's states of all answers, in order.
        argmax: int64 ``[B, R]``: the target's likeliest token in place of each of ``tokens``.
    """

    features: Tensor
    embeddings: Tensor
    first_roots: Tensor
    num_roots: Tensor
    tokens: Tensor
    hidden: Tensor
    log_normaliser: Tensor
    argmax: Tensor

    @property
    def max_roots(self) -> int:
        return self.tokens.shape[1]

    @property
    def num_tokens(self) -> int:
        """Answer tokens that are learned from, counted once."""
        return self.hidden.shape[0]

    @cached_property
    def offsets(self) -> Tensor:
        """Int64 ``[B]``: where each sample's states begin in ``hidden``."""
        return self.num_roots.cumsum(0) - self.num_roots

    def valid(self, step: int) -> Tensor:
        """Bool ``[B, R]``: roots whose token of this step still lies within the answer."""
        return torch.arange(self.max_roots, device=self.num_roots.device) + step < self.num_roots[:, None]

    def positions(self, step: int) -> Tensor:
        """Int64 ``[N]``: rows of ``hidden`` that judge this step, for the ``N`` valid roots in order."""
        roots = torch.arange(self.max_roots, device=self.num_roots.device)
        return (self.offsets[:, None] + roots + step)[self.valid(step)]

    def distributions(self, head_rows: Tensor) -> TargetDistributions:
        """The target's probabilities of the draft vocabulary, recomputed from its hidden states."""
        return TargetDistributions.from_hidden(self.hidden, self.log_normaliser, head_rows)


class Dataset:
    """Samples with their target states; ``chosen`` are indices into ``states.samples``, all of them when ``None``.

    Samples without a root (answers of one token) are left out.
    """

    def __init__(self, states: StateCache, chosen: Sequence[int] | None = None) -> None:
        self.states = states
        indices = range(len(states.samples)) if chosen is None else chosen
        self.usable = [index for index in indices if states.samples[index].num_roots > 0]

    @property
    def samples(self) -> list[Sample]:
        """The samples that are used."""
        return [self.states.samples[index] for index in self.usable]

    def __len__(self) -> int:
        return len(self.usable)

    def batch(self, indices: Sequence[int], num_steps: int) -> TrainingBatch:
        """Builds the batch of the samples at ``indices`` for unrolling ``num_steps`` steps."""
        samples = [self.states.samples[index] for index in indices]
        states = self.states.get(indices)
        fine_tune = self.states.fine_tune
        device = fine_tune.model.device
        length = max(sample.length for sample in samples) - 2
        max_roots = max(sample.num_roots for sample in samples)
        features = torch.zeros(len(samples), length, states[0].features.shape[1], device=device)
        next_tokens = torch.zeros(len(samples), length + num_steps - 1, dtype=torch.long)
        tokens = torch.zeros(len(samples), max_roots, dtype=torch.long)
        argmax = torch.zeros(len(samples), max_roots, dtype=torch.long, device=device)
        for row, (sample, state) in enumerate(zip(samples, states, strict=True)):
            features[row, : state.features.shape[0]] = state.features
            following = torch.tensor((*sample.prompt_ids, *sample.response_ids)[1:])
            count = min(following.shape[0], next_tokens.shape[1])
            next_tokens[row, :count] = following[:count]
            tokens[row, : sample.num_roots] = torch.tensor(sample.response_ids[1:])
            argmax[row, : sample.num_roots] = state.argmax
        with torch.no_grad():
            embeddings = fine_tune.embed(next_tokens.flatten().to(device)).view(*next_tokens.shape, -1)
        return TrainingBatch(
            features=features,
            embeddings=embeddings,
            first_roots=torch.tensor([len(sample.prompt_ids) - 1 for sample in samples], device=device),
            num_roots=torch.tensor([sample.num_roots for sample in samples], device=device),
            tokens=tokens.to(device),
            hidden=torch.cat([state.hidden for state in states]),
            log_normaliser=torch.cat([state.log_normaliser for state in states]),
            argmax=argmax,
        )

    def batches_of_epoch(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        """Indices of each batch, every usable sample once; the same for equal arguments."""
        rng = random.Random(f"{seed}/{epoch}")
        order = list(self.usable)
        rng.shuffle(order)
        bucket = batch_size * _BUCKET_BATCHES
        batches = []
        for start in range(0, len(order), bucket):
            chosen = sorted(order[start : start + bucket], key=self._size)
            batches += [chosen[at : at + batch_size] for at in range(0, len(chosen), batch_size)]
        rng.shuffle(batches)
        return batches

    def batches_by_size(self, batch_size: int) -> list[list[int]]:
        """All usable samples, sorted by size, for measuring."""
        order = sorted(self.usable, key=self._size)
        return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]

    def _size(self, index: int) -> tuple[int, int, int]:
        """Roots first: each costs several unrolled steps, and other positions only the keys of the first."""
        sample = self.states.samples[index]
        return sample.num_roots, sample.length, index
