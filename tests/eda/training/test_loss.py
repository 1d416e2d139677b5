"""The fused losses against their formulas, differentiated by autograd."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from eda.training.learning import loss as loss_module
from eda.training.learning.loss import LOSS_KINDS, LossKind, TargetDistributions, head_loss, step_weights


def plain_loss(draft_logits: Tensor, target_logits: Tensor, columns: Tensor, kind: LossKind) -> Tensor:
    """Per row, straight from the definitions; ``target_logits [N, V]`` cover the whole vocabulary."""
    p = target_logits.softmax(-1)[:, columns]
    q = draft_logits.softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1)
    acceptance = torch.minimum(p, q).sum(-1)
    total_variation = 1 - acceptance
    share = {"kl": torch.ones_like(kl), "tv": torch.zeros_like(kl), "lk": (-3 * acceptance.detach()).exp()}[
        kind
    ]
    return share * kl + (1 - share) * total_variation


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_value_and_gradient_equal_the_formula(kind: LossKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_ROWS", 4)
    torch.manual_seed(0)
    head, columns = torch.randn(20, 8), torch.tensor([0, 3, 4, 9, 13, 19])
    target_hidden = torch.randn(5, 8)
    positions = torch.tensor([0, 4, 2, 2, 1, 3, 0, 4, 1])
    weights = torch.rand(9)
    target_logits = target_hidden @ head.T
    target = TargetDistributions.from_hidden(target_hidden, target_logits.logsumexp(-1), head[columns])
    hidden = torch.randn(9, 8, requires_grad=True)
    result = head_loss(hidden, head[columns], target, positions, weights, kind)
    (result.loss * 2).backward()
    found = hidden.grad
    copy = hidden.detach().clone().requires_grad_(True)
    expected = (plain_loss(copy @ head[columns].T, target_logits[positions], columns, kind) * weights).sum()
    (expected * 2).backward()
    torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, copy.grad, rtol=1e-4, atol=1e-6)


def test_acceptance_counts_only_what_the_draft_can_reach() -> None:
    head = torch.eye(4)
    target_hidden = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    columns = torch.tensor([0, 2])
    p = target_hidden.softmax(-1)[0]
    target = TargetDistributions.from_hidden(target_hidden, target_hidden.logsumexp(-1), head[columns])
    draft_hidden = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    result = head_loss(draft_hidden, head[columns], target, torch.tensor([0]), torch.ones(1), "tv")
    assert float(target.mass) == pytest.approx(float(p[0] + p[2]))
    assert float(result.acceptance) == pytest.approx(min(0.5, float(p[0])) + min(0.5, float(p[2])))
    assert float(result.loss) == pytest.approx(1 - float(result.acceptance))


def test_a_perfect_draft_has_no_loss() -> None:
    torch.manual_seed(1)
    head, hidden = torch.randn(10, 6), torch.randn(3, 6)
    normaliser = functional.linear(hidden, head).logsumexp(-1)
    target = TargetDistributions.from_hidden(hidden, normaliser, head)
    for kind in LOSS_KINDS:
        result = head_loss(hidden, head, target, torch.arange(3), torch.ones(3), kind)
        assert float(result.loss) == pytest.approx(0.0, abs=1e-5)


def test_weights_of_steps_decay_and_add_up() -> None:
    weights = step_weights(3, 0.5)
    assert sum(weights) == pytest.approx(1.0)
    assert weights[1] / weights[0] == pytest.approx(0.5)
