"""The optimiser of every training: Muon for matrices, AdamW for everything else.

Muon (Jordan et al. 2024) replaces a matrix's update by the nearest one whose singular values are equal. In the few
hundred steps that a draft is trained for, it went as far as AdamW in two to three times as many (docs/adaptation.md).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_STATE_KEYS = ("momentum_buffer", "exp_avg", "exp_avg_sq")
_VECTOR_RATE = 0.1
"""AdamW's rate for norms, as a share of the matrices' rate."""


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
            muon = torch.optim.Muon(
                matrices, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            self._parts.append((muon, 1.0))
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
