"""Losses of a draft against the target's distributions, with the frozen output head folded in.

A row of logits is as wide as the draft vocabulary, and there is one row for every root and step. The head is never
trained, so the gradient with respect to a row's input is known as soon as its logits are: logits live for one chunk of
rows and are never stored for the backward pass.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

LossKind = Literal["lk", "kl", "tv"]
LOSS_KINDS: tuple[LossKind, ...] = ("lk", "kl", "tv")
LK_ETA = 3.0
"""How fast the hybrid turns from KL to total variation as acceptance grows."""
_CHUNK_ROWS = 256


@dataclass(frozen=True, slots=True, eq=False)
class TargetDistributions:
    """The target's probabilities of the draft vocabulary at ``P`` positions.

    Probabilities are normalised over the whole vocabulary: a row sums to the mass that the draft can reach at all.
    """

    probabilities: Tensor
    """``[P, V_draft]``."""
    mass: Tensor
    """``[P]``: sum of each row."""
    negative_entropy: Tensor
    """``[P]``: sum of ``probability * log(probability)`` over each row; turns cross-entropy into KL divergence."""

    @classmethod
    @torch.no_grad()
    def from_hidden(cls, hidden: Tensor, log_normaliser: Tensor, head_rows: Tensor) -> "TargetDistributions":
        """From final hidden states ``[P, H]``, the full vocabulary's logsumexp ``[P]`` and rows ``[V_draft, H]``."""
        log_probabilities = (hidden.to(head_rows.dtype) @ head_rows.T).float().sub_(log_normaliser[:, None])
        probabilities = log_probabilities.exp()
        negative_entropy = log_probabilities.mul_(probabilities).nan_to_num_(0.0).sum(-1)
        return cls(probabilities, probabilities.sum(-1), negative_entropy)


@dataclass(frozen=True, slots=True, eq=False)
class LossResult:
    """A weighted loss and what it says about the draft, over the rows that it was taken of."""

    loss: Tensor
    """Scalar, differentiable with respect to the rows' inputs."""
    acceptance: Tensor
    """``[N]``: probability that the target accepts the draft's sample, ``sum min(target, draft)``."""


def head_loss(
    hidden: Tensor,
    head_rows: Tensor,
    target: TargetDistributions,
    positions: Tensor,
    weights: Tensor,
    kind: LossKind = "lk",
) -> LossResult:
    """Sum over rows of ``weight * loss(target distribution, draft distribution)``.

    ``kl`` is ``KL(target || draft)`` over the draft vocabulary, ``tv`` the total variation distance
    ``1 - sum min(target, draft)``, and ``lk`` their hybrid ``s * kl + (1 - s) * tv`` with ``s = exp(-3 * acceptance)``
    of the row, not differentiated: KL where the draft is far off, the acceptance rate itself where it is close.

    Args:
        hidden: ``[N, H]``, normalised outputs of the draft.
        head_rows: ``[V_draft, H]``, frozen.
        positions: int64 ``[N]``, the row of ``target`` that each row of ``hidden`` is judged by.
        weights: ``[N]``.
    """
    loss, acceptance = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head_rows, target, positions, weights, kind
    )
    return LossResult(loss, acceptance)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_rows: Tensor,
        target: TargetDistributions,
        positions: Tensor,
        weights: Tensor,
        kind: LossKind,
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = head_rows.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        acceptance = torch.empty(hidden.shape[0], device=hidden.device)
        for start in range(0, hidden.shape[0], _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            losses, accepted, slope = _rows_loss(
                hidden[part] @ rows.T, target, positions[part], kind, gradient is not None
            )
            acceptance[part] = accepted
            total += (losses * weights[part]).sum(dtype=torch.float64)
            if gradient is not None and slope is not None:
                gradient[part] = slope.mul_(weights[part, None]).to(rows.dtype) @ rows
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(acceptance)
        return total.float(), acceptance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None, None, None


def _rows_loss(
    logits: Tensor, target: TargetDistributions, positions: Tensor, kind: LossKind, with_slope: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses ``[n]``, acceptance ``[n]`` and, if asked for, the gradient ``[n, V_draft]`` by the logits.

    ``logits`` are overwritten: every further tensor of this width costs a CPU more than the arithmetic.
    """
    logits = logits.float()
    target_probs, mass = target.probabilities[positions], target.mass[positions]
    score = torch.linalg.vecdot(target_probs, logits)
    largest = logits.amax(-1, keepdim=True)
    draft_probs = logits.sub_(largest).exp_()
    total = draft_probs.sum(-1, keepdim=True)
    draft_probs.div_(total)
    normaliser = (largest + total.log()).squeeze(-1)
    acceptance = torch.minimum(target_probs, draft_probs).sum(-1)
    kl_share = _kl_share(acceptance, kind)
    kl = normaliser * mass - score + target.negative_entropy[positions]
    losses = kl_share * kl + (1.0 - kl_share) * (1.0 - acceptance)
    if not with_slope:
        return losses, acceptance, None
    # d kl / d logits = draft_probs * mass - target_probs; with b = 1 where draft_probs < target_probs,
    # d tv / d logits = draft_probs * (sum(draft_probs * b) - b).
    short = draft_probs * (draft_probs < target_probs)
    slope = draft_probs.mul_((kl_share * mass + (1.0 - kl_share) * short.sum(-1))[:, None])
    slope.addcmul_(target_probs, kl_share[:, None], value=-1.0)
    slope.addcmul_(short, (1.0 - kl_share)[:, None], value=-1.0)
    return losses, acceptance, slope


def _kl_share(acceptance: Tensor, kind: LossKind) -> Tensor:
    if kind == "lk":
        return torch.exp(-LK_ETA * acceptance)
    return torch.full_like(acceptance, 1.0 if kind == "kl" else 0.0)


def step_weights(num_steps: int, decay: float) -> list[float]:
    """Share of each unrolled step in the loss: ``decay ** step``, adding up to 1."""
    raw = [decay**step for step in range(num_steps)]
    return [weight / math.fsum(raw) for weight in raw]
