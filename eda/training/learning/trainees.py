"""What is trained: the private module, the shared draft, or one of the controls that the method is compared with."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from eda.models.draft import DraftModel
from eda.models.private import PrivateModule


@dataclass(frozen=True, eq=False)
class Trainee:
    """A draft, an optional private module, and which of their parameters learn. All others are frozen.

    Attributes:
        kind: "shared", "private", "retrain" or "lora".
        parameters: by name; these and no others require gradients.
    """

    kind: str
    draft: DraftModel
    private: PrivateModule | None
    parameters: Mapping[str, nn.Parameter]

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def share_of_draft(self) -> float:
        """Trained parameters as a share of the shared draft's and these together."""
        if self.private is not None:
            return private_share(self.private, self.draft)
        return self.num_parameters / self.draft.num_parameters

    def state(self) -> dict[str, Tensor]:
        """Copies of the trained tensors."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Puts tensors from ``state()`` back."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[name])

    def frozen_with_gradients(self) -> list[str]:
        """Names of parameters that are not to be trained and yet received a gradient; must be empty."""
        chosen = {id(parameter) for parameter in self.parameters.values()}
        modules: list[nn.Module] = [self.draft, *([] if self.private is None else [self.private])]
        return [
            name
            for module in modules
            for name, parameter in module.named_parameters()
            if id(parameter) not in chosen and (parameter.requires_grad or parameter.grad is not None)
        ]


def private_share(private: PrivateModule, draft: DraftModel) -> float:
    """The private module's parameters as a share of its own and the shared draft's together."""
    return private.num_parameters / (private.num_parameters + draft.num_parameters)


def shared_trainee(draft: DraftModel) -> Trainee:
    """Stage 1: everything in ``draft`` learns, in place."""
    return Trainee("shared", draft.requires_grad_(True), None, dict(draft.named_parameters()))


def private_trainee(draft: DraftModel, private: PrivateModule) -> Trainee:
    """Stage 2: only ``private`` learns, in place; ``draft`` is frozen."""
    draft.requires_grad_(False)
    draft.zero_grad(set_to_none=True)  # gradients that an earlier stage left behind
    return Trainee("private", draft, private.requires_grad_(True), dict(private.named_parameters()))


def retrain_trainee(draft: DraftModel) -> Trainee:
    """Control: all weights of a copy of ``draft`` learn, starting from the shared ones."""
    own = copy.deepcopy(draft).requires_grad_(True)
    return Trainee("retrain", own, None, dict(own.named_parameters()))


def lora_trainee(draft: DraftModel, rank: int, *, alpha: float | None = None, seed: int = 0) -> Trainee:
    """Control: a LoRA of ``rank`` on every linear layer of a copy of ``draft``.

    ``alpha / rank`` scales the update; ``alpha`` is ``2 * rank`` when ``None``.
    """
    own = copy.deepcopy(draft).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    scale = (2.0 * rank if alpha is None else alpha) / rank
    parameters: dict[str, nn.Parameter] = {}
    for name, linear in [(n, m) for n, m in own.named_modules() if isinstance(m, nn.Linear)]:
        adapted = LowRankLinear(linear, rank, scale, generator)
        parent, _, attribute = name.rpartition(".")
        setattr(own.get_submodule(parent) if parent else own, attribute, adapted)
        parameters[f"{name}.down"] = adapted.down
        parameters[f"{name}.up"] = adapted.up
    return Trainee("lora", own, None, parameters)


class LowRankLinear(nn.Module):
    """A frozen linear layer plus ``scale * up(down(x))``; ``up`` starts at zero."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = linear.weight
        self.scale = scale
        down = torch.empty(rank, linear.in_features)
        bound = 1.0 / math.sqrt(linear.in_features)
        down.uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(down.to(linear.weight))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank).to(linear.weight))

    def forward(self, hidden: Tensor) -> Tensor:
        low = functional.linear(hidden, self.down)
        return functional.linear(hidden, self.weight) + self.scale * functional.linear(low, self.up)

    def merged(self) -> nn.Linear:
        """One plain linear layer that computes the same."""
        linear = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False)
        linear.weight = nn.Parameter((self.weight + self.scale * self.up @ self.down).detach())
        return linear


def merged_draft(draft: DraftModel) -> DraftModel:
    """A copy of a LoRA trainee's draft with plain weights, to decode with; other drafts are returned as they are."""
    adapted = [name for name, module in draft.named_modules() if isinstance(module, LowRankLinear)]
    if not adapted:
        return draft
    plain = copy.deepcopy(draft)
    for name in adapted:
        parent, _, attribute = name.rpartition(".")
        module = plain.get_submodule(name)
        if isinstance(module, LowRankLinear):
            setattr(plain.get_submodule(parent) if parent else plain, attribute, module.merged())
    return plain.requires_grad_(False)
