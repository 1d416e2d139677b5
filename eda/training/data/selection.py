"""Which samples are worth learning from. Every score grows with what the draft would gain."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from eda.models.draft import DraftModel
from eda.models.fine_tune import FineTune
from eda.training.data.dataset import Dataset
from eda.training.data.samples import Sample
from eda.training.data.scores import DEFAULT_SCORE, Score
from eda.training.data.target_states import StateCache, TargetStates, compute_states
from eda.training.learning.loss import head_loss
from eda.training.learning.unroll import unroll
from eda.training.progress import (
    OnProgress,
    ProgressEvent,
    ShouldStop,
    StageStoppedError,
    ignore_progress,
    never_stop,
)

_NEEDS_DRAFT = frozenset({"deficit", "headroom"})
_NEEDS_BASE = frozenset({"mahalanobis", "cosine", "divergence"})
_ROWS = 512
_SHRINKAGE = 0.05
"""Share of a scaled identity in the covariance, which has more entries than there may be tokens."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Chosen samples in their old order. Shares are of the roots (answer tokens that are learned from)."""

    samples: tuple[Sample, ...]
    num_candidates: int
    kept_tokens: int
    candidate_tokens: int


def score_samples(
    base: FineTune,
    fine_tune: FineTune,
    draft: DraftModel,
    samples: Sequence[Sample],
    scores: Sequence[Score] = (DEFAULT_SCORE,),
    *,
    seed: int = 0,
    states: StateCache | None = None,
    batch_size: int = 16,
    on_progress: OnProgress = ignore_progress,
    should_stop: ShouldStop = never_stop,
) -> dict[Score, list[float]]:
    """One number per sample for each of ``scores``, means over the answer's positions.

    ``deficit``: 1 - acceptance of the shared draft's first token, what the draft loses directly. ``headroom``: what a
    perfect draft would gain, the highest probability of a token that the draft can propose, less that of the one it
    does; unlike the deficit it is small where the fine-tune itself is undecided. ``mahalanobis``: distance of the
    fine-tune's features from the distribution of the base's. ``cosine``: 1 - cosine of the two models' features.
    ``divergence``: KL(fine-tune || base) of the next token. ``flatness``: cosine between the fine-tune's distribution
    and the uniform one. ``random``: the control.

    Args:
        states: of ``samples`` under ``fine_tune``; what is cached there is not computed again.

    Raises ``StageStoppedError`` when ``should_stop`` says so.
    """
    wanted = set(scores)
    found: dict[Score, list[float]] = {score: [0.0] * len(samples) for score in scores}
    if "random" in wanted:
        found["random"] = [random.Random(f"{seed}/{sample.id}").random() for sample in samples]
        if wanted == {"random"}:  # no model has a say in it
            return found
    states = states or StateCache(fine_tune, samples, draft.config.tap_layers)
    dataset = Dataset(states)
    moments = _Moments()
    rows: list[tuple[int, Tensor]] = []
    batches = dataset.batches_by_size(batch_size)
    for place, indices in enumerate(batches):
        if should_stop():
            raise StageStoppedError(f"selection stopped after {place} of {len(batches)} batches")
        own = states.get(indices)
        if wanted & _NEEDS_DRAFT:
            for score, values in _draft_scores(draft, dataset, indices).items():
                for index, value in zip(indices, values, strict=True):
                    if score in wanted:
                        found[score][index] = value
        others: list[TargetStates] | list[None] = [None] * len(indices)
        if wanted & _NEEDS_BASE:
            others = compute_states(base, [samples[index] for index in indices], states.tap_layers)
        for index, mine, theirs in zip(indices, own, others, strict=True):
            for score, value in _distribution_scores(fine_tune, base, mine, theirs, wanted).items():
                found[score][index] = value
            if theirs is not None:
                roots = slice(len(samples[index].prompt_ids) - 1, None)
                fine, plain = mine.features[roots].float(), theirs.features[roots].float()
                if "cosine" in wanted:
                    found["cosine"][index] = float((1 - functional.cosine_similarity(fine, plain)).mean())
                if "mahalanobis" in wanted:
                    moments.add(plain)
                    rows.append((index, fine.mean(0)))
        on_progress(ProgressEvent("select", place + 1, len(batches)))
    if "mahalanobis" in wanted:
        distance = moments.distance()
        for index, feature in rows:
            found["mahalanobis"][index] = distance(feature)
    return found


def select(samples: Sequence[Sample], scores: Sequence[float], keep: float) -> Selection:
    """The samples with the highest scores, up to a share ``keep`` of all answer tokens.

    Each temperature gives its own share, at least one sample: drawn answers are less predictable than greedy ones, so
    by most scores they would push these out, and the draft would learn another mix than it will serve. Counting
    tokens, not samples, makes halves chosen by different scores equally long to train on.

    Raises ``ValueError`` unless ``0 < keep <= 1``.
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep is {keep}; it must be above 0 and at most 1")
    usable = [index for index, sample in enumerate(samples) if sample.num_roots > 0]
    by_temperature: dict[float, list[int]] = {}
    for index in sorted(usable, key=lambda index: (-scores[index], index)):
        by_temperature.setdefault(samples[index].temperature, []).append(index)
    chosen: list[int] = []
    for ranked in by_temperature.values():
        chosen += _leading(ranked, [samples[index].num_roots for index in ranked], keep)
    kept = sum(samples[index].num_roots for index in chosen)
    total = sum(samples[index].num_roots for index in usable)
    return Selection(tuple(samples[index] for index in sorted(chosen)), len(usable), kept, total)


def _leading(ranked: Sequence[int], counts: Sequence[int], keep: float) -> list[int]:
    """The first of ``ranked`` whose ``counts`` come nearest to a share ``keep`` of all; at least one."""
    limit = keep * sum(counts)
    chosen: list[int] = []
    kept = 0
    for index, count in zip(ranked, counts, strict=True):
        # The sample that crosses the line is taken when more of it lies on this side than beyond.
        if chosen and kept + count / 2 > limit:
            break
        chosen.append(index)
        kept += count
    return chosen


@torch.no_grad()
def _draft_scores(draft: DraftModel, dataset: Dataset, indices: Sequence[int]) -> dict[Score, list[float]]:
    """Scores that compare the fine-tune with the draft's first token."""
    batch = dataset.batch(indices, 1)
    head_rows = dataset.states.fine_tune.head_rows(draft.draft_token_ids)
    output = next(
        unroll(
            draft,
            batch.features,
            batch.embeddings,
            1,
            first_roots=batch.first_roots,
            num_roots=batch.max_roots,
        )
    )
    positions = batch.positions(0)
    hidden = draft.norm(output[batch.valid(0)])
    weights = torch.ones(len(hidden), device=hidden.device)
    target = batch.distributions(head_rows)
    deficit = 1.0 - head_loss(hidden, head_rows, target, positions, weights).acceptance
    headroom = torch.empty_like(deficit)
    for start in range(0, len(hidden), _ROWS):
        part = slice(start, start + _ROWS)
        proposed = (hidden[part] @ head_rows.to(hidden.dtype).T).argmax(-1)
        probabilities = target.probabilities[positions[part]]
        headroom[part] = probabilities.amax(-1) - probabilities.gather(1, proposed[:, None])[:, 0]
    counts = batch.num_roots.tolist()
    return {
        "deficit": [float(values.mean()) for values in torch.split(deficit, counts)],
        "headroom": [float(values.mean()) for values in torch.split(headroom, counts)],
    }


@torch.no_grad()
def _distribution_scores(
    fine_tune: FineTune,
    base: FineTune,
    mine: TargetStates,
    theirs: TargetStates | None,
    wanted: set[Score],
) -> Mapping[Score, float]:
    """Scores that need logits over the whole vocabulary."""
    divergence = flatness = 0.0
    compared = "divergence" in wanted and theirs is not None
    if not compared and "flatness" not in wanted:
        return {}
    count = mine.hidden.shape[0]
    for start in range(0, count, _ROWS):
        part = slice(start, start + _ROWS)
        log_probs = _log_probabilities(fine_tune, mine, part)
        probs = log_probs.exp()
        flatness += float((1.0 / (probs.norm(dim=-1) * probs.shape[-1] ** 0.5)).sum())
        if theirs is not None and compared:
            divergence += float((probs * (log_probs - _log_probabilities(base, theirs, part))).sum())
    found: dict[Score, float] = {}
    if compared:
        found["divergence"] = divergence / count
    if "flatness" in wanted:
        found["flatness"] = flatness / count
    return found


def _log_probabilities(fine_tune: FineTune, states: TargetStates, part: slice) -> Tensor:
    hidden = states.hidden[part]
    logits = fine_tune.model.logits(hidden, fine_tune.lora_segments(0, hidden.shape[0]))
    return logits - states.log_normaliser[part, None]


class _Moments:
    """Mean and covariance of the base's features, summed in float64 as they come."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Tensor | None = None
        self._products: Tensor | None = None

    def add(self, features: Tensor) -> None:
        """``[n, D]``."""
        wide = features.double()
        total, products = wide.sum(0), wide.T @ wide
        self._count += features.shape[0]
        self._sum = total if self._sum is None else self._sum + total
        self._products = products if self._products is None else self._products + products

    def distance(self) -> "_Mahalanobis":
        if self._sum is None or self._products is None:
            raise ValueError("no features were added; there is no distribution to measure from")
        mean = self._sum / self._count
        covariance = self._products / self._count - mean[:, None] * mean
        scale = covariance.diagonal().mean().clamp(min=1e-12)
        size = covariance.shape[0]
        identity = torch.eye(size, dtype=covariance.dtype, device=covariance.device)
        shrunk = (1.0 - _SHRINKAGE) * covariance + _SHRINKAGE * scale * identity
        return _Mahalanobis(mean, torch.linalg.cholesky(shrunk))


@dataclass(frozen=True, slots=True, eq=False)
class _Mahalanobis:
    mean: Tensor
    factor: Tensor

    def __call__(self, feature: Tensor) -> float:
        difference = (feature.double() - self.mean)[:, None]
        return float(torch.linalg.solve_triangular(self.factor, difference, upper=False).norm())
