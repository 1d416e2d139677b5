"""The optimiser of every training: Muon for matrices, AdamW for everything else.

Muon (Jordan et al. 2024) replaces a matrix's update by the nearest one whose singular values are equal. In the few
hundred steps that a draft is trained for, it went as far as AdamW in two to three times as many
(docs/measurements/adaptation.md).
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eda.training.learning.precision import product_dtype

_STATE_KEYS = ("momentum_buffer", "exp_avg", "exp_avg_sq")
_VECTOR_RATE = 0.1
"""AdamW's rate for norms, as a share of the matrices' rate."""
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, which brings singular values near 1 quickly rather than exactly."""
_NEWTON_SCHULZ_STEPS = 5
_SMALLEST_NORM = 1e-7


def orthogonalised(matrices: Tensor) -> Tensor:
    """``matrices [n, rows, columns]``, ``rows <= columns``, with singular values between about 0.5 and 1.2.

    Products are in the type of ``matrices``. Values far below a matrix's norm rise less. After Keller Jordan's Muon.
    """
    scaled: Tensor = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp_min(_SMALLEST_NORM)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = scaled @ scaled.mT
        scaled = torch.baddbmm(scaled, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), scaled, beta=a)
    return scaled


class _Muon(torch.optim.Muon):
    """torch's Muon, with matrices of one shape stacked, in the type that the processor multiplies fast.

    torch's own iterates in bfloat16 everywhere; processors without units for it took nine tenths of a training step.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no loss to compute anew
        """Applies the gradients."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[tuple(sorted(parameter.shape))].append(parameter)
            for alike in by_shape.values():
                self._step_alike(alike, group)

    def _step_alike(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Steps matrices of one shape, turned or not."""
        updates = torch.stack([_wide(self._nesterov(p, group["momentum"])) for p in parameters])
        updates = orthogonalised(updates.to(product_dtype(updates.device)))
        rate = group["lr"]
        # What Moonlight (arXiv 2502.16982) scales by: the update's elements are then as large as AdamW's.
        scale = 0.2 * math.sqrt(max(parameters[0].shape))
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1.0 - rate * group["weight_decay"])
            parameter.add_(update if _is_wide(parameter) else update.mT, alpha=-rate * scale)

    def _nesterov(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None  # step passes no others
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        velocity: Tensor = state["momentum_buffer"].lerp_(gradient, 1.0 - momentum)
        return gradient.lerp(velocity, momentum)


def _is_wide(matrix: Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


def _wide(matrix: Tensor) -> Tensor:
    return matrix if _is_wide(matrix) else matrix.mT


class MuonAdamW:
    """Steps named parameters; both parts follow one rate.

    ``rate`` is what AdamW would use: Muon's updates are scaled to the size that AdamW's have.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], rate: float, weight_decay: float) -> None:
        self._parameters = dict(parameters)
        matrices = [p for p in parameters.values() if p.ndim == 2]
        vectors = [p for p in parameters.values() if p.ndim != 2]
        self._parts: list[tuple[torch.optim.Optimizer, float]] = []
        if matrices:
            self._parts.append((_Muon(matrices, lr=rate, weight_decay=weight_decay), 1.0))
        if vectors:
            adamw = torch.optim.AdamW(vectors, lr=rate * _VECTOR_RATE, weight_decay=weight_decay)
            self._parts.append((adamw, _VECTOR_RATE))

    def step(self, rate: float) -> None:
        """Applies the gradients."""
        for part, share in self._parts:
            for group in part.param_groups:
                group["lr"] = rate * share
            part.step()

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for part, _ in self._parts:
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Tensors to go on from, by ``<kind>.<parameter>``."""
        tensors = {}
        for name, parameter in self._parameters.items():
            for part, _ in self._parts:
                for key in _STATE_KEYS:
                    if key in part.state.get(parameter, {}):
                        tensors[f"{key}.{name}"] = part.state[parameter][key]
        return tensors

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Puts back what ``state`` gave after ``step`` steps; other tensors are ignored."""
        for name, parameter in self._parameters.items():
            found = {
                key: tensors[f"{key}.{name}"].to(parameter.device)
                for key in _STATE_KEYS
                if f"{key}.{name}" in tensors
            }
            if not found:
                continue
            owner = next(
                part for part, _ in self._parts if any(p is parameter for p in part.param_groups[0]["params"])
            )
            owner.state[parameter] = dict(found)
            if "exp_avg" in found:
                owner.state[parameter]["step"] = torch.tensor(float(step))
