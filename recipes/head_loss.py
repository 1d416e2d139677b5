"""Output layer and cross-entropy in one step, in chunks of rows.

Half of the memory traffic of a small model is its logits. Here a chunk of them lives only as long as it takes to form
the loss and both gradients of it, so they stay in the cache and are never stored for the backward pass.
"""

from typing import Any

import torch
from torch import Tensor

_ROWS_PER_CHUNK = 512


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        count = (labels >= 0).sum().clamp_min(1)
        total = torch.zeros((), device=hidden.device)
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight)
        compute_weight = weight.to(hidden.dtype)
        for start in range(0, len(hidden), _ROWS_PER_CHUNK):
            part = slice(start, start + _ROWS_PER_CHUNK)
            probabilities = (hidden[part] @ compute_weight.mT).float().log_softmax(dim=-1)
            used = labels[part] >= 0
            targets = labels[part].clamp_min(0).unsqueeze(1)
            total -= (probabilities.gather(1, targets).squeeze(1) * used).sum()
            # d loss / d logits = softmax - one_hot, averaged over the labels that count.
            gradient = probabilities.exp_()
            gradient.scatter_add_(1, targets, torch.full_like(targets, -1.0, dtype=gradient.dtype))
            gradient.mul_((used / count).unsqueeze(1))
            gradient = gradient.to(hidden.dtype)
            hidden_gradient[part] = gradient @ compute_weight
            weight_gradient += (gradient.mT @ hidden[part]).to(weight.dtype)
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total / count

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * loss_gradient, weight_gradient * loss_gradient, None


def head_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the labels that are not negative.

    `hidden` is `[rows, width]`, `weight` `[vocabulary, width]` (float32 parameters), `labels` `[rows]`.
    """
    loss: Tensor = _HeadLoss.apply(hidden, weight, labels)  # type: ignore[no-untyped-call]
    return loss
