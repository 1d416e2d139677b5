"""The optimiser of every stage: Muon for the matrices, AdamW for everything else.

torch ships Muon too, but it orthogonalises in bfloat16 and one matrix at a time, which is slow on processors without
bfloat16 arithmetic. Here matrices of one shape are stacked, and the precision is the caller's choice.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn

# Quintic Newton-Schulz iteration: pushes singular values towards 1 quickly rather than exactly (Jordan et al. 2024).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Replace the singular values of `[count, rows, columns]` matrices by values near 1."""
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = wide @ wide.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        wide = torch.baddbmm(wide, polynomial, wide, beta=a)
    return wide if matrices.shape[-2] <= matrices.shape[-1] else wide.mT


class BatchedMuon:
    """Steps the trainable parameters of a model at rates scaled by one schedule.

    `matrix_rate` is the change of a matrix's singular values a step (for square matrices), or `None` to leave matrices
    to AdamW too; `other_rate` is AdamW's rate, for embeddings and norms.
    """

    def __init__(
        self,
        model: nn.Module,
        matrix_rate: float | None,
        other_rate: float,
        momentum: float = 0.95,
        newton_schulz_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._matrix_rate = matrix_rate or 0.0
        self._other_rate = other_rate
        self._momentum = momentum
        self._dtype = newton_schulz_dtype
        self._groups: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        others = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            is_matrix = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
            if is_matrix and matrix_rate is not None:
                self._groups[parameter.shape].append(parameter)
            else:
                others.append(parameter)
        self._velocity = {
            shape: torch.zeros(len(group), *shape, device=group[0].device)
            for shape, group in self._groups.items()
        }
        self._adamw = (
            torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.95), weight_decay=0.0) if others else None
        )

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Apply the gradients at `scale` times the full rates, and clear them."""
        for shape, group in self._groups.items():
            gradients = torch.stack([parameter.grad for parameter in group if parameter.grad is not None])
            velocity = self._velocity[shape]
            velocity.lerp_(gradients, 1 - self._momentum)
            nesterov = gradients.lerp_(velocity, self._momentum)
            # Tall matrices get larger singular values: so an output element changes as much in any shape.
            rate = self._matrix_rate * scale * max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, update in zip(group, orthogonalize(nesterov.to(self._dtype)), strict=True):
                parameter.add_(update.to(parameter.dtype), alpha=-rate)
                parameter.grad = None
        if self._adamw is not None:
            for options in self._adamw.param_groups:
                options["lr"] = self._other_rate * scale
            self._adamw.step()
            self._adamw.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything needed to go on later, by name (shared storage, not copies)."""
        tensors = {
            f"muon.{rows}x{columns}": self._velocity[shape]
            for shape in self._velocity
            for rows, columns in [shape]
        }
        if self._adamw is not None:
            for index, state in self._adamw.state_dict()["state"].items():
                tensors |= {f"adamw.{index}.{key}": value for key, value in state.items()}
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` returned for the same model."""
        for shape, velocity in self._velocity.items():
            velocity.copy_(tensors[f"muon.{shape[0]}x{shape[1]}"])
        if self._adamw is not None:
            state: dict[int, dict[str, Tensor]] = defaultdict(dict)
            for name, value in tensors.items():
                if name.startswith("adamw."):
                    _, index, key = name.split(".")
                    state[int(index)][key] = value
            self._adamw.load_state_dict({**self._adamw.state_dict(), "state": dict(state)})


def rate_scale(progress: float, warm_up: float = 0.02, decay: float = 0.4) -> float:
    """Share of the full rate at `progress` in [0, 1]: linear warm-up, constant, linear decay to 2%."""
    if progress < warm_up:
        return max(progress, warm_up / 10) / warm_up
    return min(1.0, max((1.0 - progress) / decay, 0.02))
