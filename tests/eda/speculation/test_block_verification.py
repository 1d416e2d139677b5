"""Block verification by exact enumeration: no draws, every outcome with its probability in closed form.

For each draft block and each number of accepted tokens the probability follows from the acceptance probabilities
that the implementation computed, and the next token from the remainder that it would draw from. Summed up they must
give the target's joint distribution.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eda.sampling.params import SamplingParams
from eda.speculation import rejection
from eda.speculation.proposal import Proposal
from eda.speculation.rejection import _SampledDraft
from eda.speculation.verification import VerificationRow, verify


@dataclass
class Tree:
    """Conditional distributions after every prefix: ``tables[i]`` is ``[V] * i + [V]``."""

    tables: list[Tensor]

    @classmethod
    def random(cls, vocab_size: int, depth: int, seed: int, scale: float) -> "Tree":
        generator = torch.Generator().manual_seed(seed)
        shapes = [[vocab_size] * (done + 1) for done in range(depth)]
        return cls([(torch.randn(shape, generator=generator) * scale).softmax(-1) for shape in shapes])

    def joint(self) -> Tensor:
        joint = torch.ones((), dtype=torch.float64)
        for table in self.tables:
            joint = joint[..., None] * table.double()
        return joint

    def lines(self, block: tuple[int, ...]) -> Tensor:
        """``[len(self.tables), V]``: the distributions along a block."""
        return torch.stack([table[block[:done]] for done, table in enumerate(self.tables)])


@dataclass
class Enumeration:
    joint: Tensor
    """Probability of the first ``n + 1`` emitted tokens, with the target's own after a step has ended."""
    num_accepted: float
    """Expected accepted draft tokens."""


def enumerate_outcomes(
    target: Tree, draft: Tree, *, block: bool, token_ids: Tensor | None = None
) -> Enumeration:
    """Of one step: ``target`` is one deeper than ``draft``."""
    num_nodes = len(draft.tables)
    joint = torch.zeros_like(target.joint())
    num_accepted = 0.0
    columns = range(draft.tables[0].shape[-1])
    for drafted in itertools.product(columns, repeat=num_nodes):
        tokens = drafted if token_ids is None else tuple(token_ids[list(drafted)].tolist())
        target_probs, draft_probs = target.lines(tokens), draft.lines(drafted)
        row = _SampledDraft.of(Proposal.chain(tokens, draft_probs, token_ids), 0)
        steps = range(num_nodes)
        row.target_at = [float(target_probs[step, tokens[step]]) for step in steps]
        row.draft_at = [float(draft_probs[step, drafted[step]]) for step in steps]
        if 0.0 in row.draft_at:
            continue  # underflow: this block is never drafted
        outcomes = (block_outcomes if block else token_outcomes)(target_probs, row)
        block_probability = math.prod(row.draft_at)
        for length, probability in enumerate(outcomes):
            num_accepted += block_probability * probability * length
            row.nodes = list(range(1, length + 1))
            if block:
                row.weight = rejection.block_weights(row)[length]
            remainder = rejection.remainders(target_probs, [row])[0].double()
            emitted = joint[tokens[:length]]
            following = remainder / remainder.sum()
            for depth in range(length + 1, num_nodes + 1):
                following = following[..., None] * target.tables[depth][tokens[:length]].double()
            emitted += block_probability * probability * following
    return Enumeration(joint, num_accepted)


def block_outcomes(target_probs: Tensor, row: _SampledDraft) -> list[float]:
    """Probability of each number of accepted tokens: the longest accepted prefix wins."""
    acceptances = rejection._block_acceptances(target_probs, [row])[0]
    outcomes = []
    for length in range(len(acceptances) + 1):
        accepted = 1.0 if length == 0 else acceptances[length - 1]
        outcomes.append(accepted * math.prod(1.0 - other for other in acceptances[length:]))
    return outcomes


def token_outcomes(target_probs: Tensor, row: _SampledDraft) -> list[float]:
    """The same for rejection sampling token by token: the first rejection ends it."""
    acceptances = [min(1.0, at / drafted) for at, drafted in zip(row.target_at, row.draft_at, strict=True)]
    outcomes = []
    for length in range(len(acceptances) + 1):
        rejected = 1.0 if length == len(acceptances) else 1.0 - acceptances[length]
        outcomes.append(math.prod(acceptances[:length]) * rejected)
    return outcomes


def trees(vocab_size: int, num_nodes: int, seed: int, scale: float = 1.5) -> tuple[Tree, Tree]:
    return (
        Tree.random(vocab_size, num_nodes + 1, seed, scale),
        Tree.random(vocab_size, num_nodes, seed + 1000, scale),
    )


@pytest.mark.parametrize(("vocab_size", "num_nodes"), [(2, 1), (2, 2), (2, 4), (3, 2), (3, 3), (5, 2)])
@pytest.mark.parametrize("block", [False, True], ids=["tokens", "block"])
def test_all_outcomes_together_give_the_targets_joint_distribution(
    vocab_size: int, num_nodes: int, block: bool
) -> None:
    for seed in range(3):
        target, draft = trees(vocab_size, num_nodes, seed)
        joint = enumerate_outcomes(target, draft, block=block).joint
        torch.testing.assert_close(joint, target.joint(), rtol=0, atol=2e-6)


@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.01, 0.5, 2.0, 10.0, 60.0]),
    num_nodes=st.integers(1, 3),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_blocks_are_exact_and_never_accept_less(seed: int, scale: float, num_nodes: int) -> None:
    """Over nearly equal distributions as over nearly certain ones, with probabilities that underflow."""
    target, draft = trees(3, num_nodes, seed, scale)
    block = enumerate_outcomes(target, draft, block=True)
    torch.testing.assert_close(block.joint, target.joint(), rtol=0, atol=5e-6)
    tokens = enumerate_outcomes(target, draft, block=False)
    assert block.num_accepted >= tokens.num_accepted - 1e-6


def test_blocks_accept_strictly_more_tokens_than_one_by_one() -> None:
    """The example of the paper's introduction: two tokens, a context-free target and draft of opposite bias."""
    target = Tree([torch.tensor([1 / 3, 2 / 3]).expand([2] * done + [2]) for done in range(3)])
    draft = Tree([torch.tensor([2 / 3, 1 / 3]).expand([2] * done + [2]) for done in range(2)])
    assert enumerate_outcomes(target, draft, block=False).num_accepted == pytest.approx(10 / 9, abs=1e-6)
    assert enumerate_outcomes(target, draft, block=True).num_accepted == pytest.approx(11 / 9, abs=1e-6)


def test_a_block_of_one_is_plain_rejection_sampling() -> None:
    target, draft = trees(4, 1, seed=7)
    block = enumerate_outcomes(target, draft, block=True)
    tokens = enumerate_outcomes(target, draft, block=False)
    assert block.num_accepted == pytest.approx(tokens.num_accepted, abs=1e-6)


@pytest.mark.parametrize("block", [False, True], ids=["tokens", "block"])
def test_a_reduced_draft_vocabulary_is_exact(block: bool) -> None:
    token_ids = torch.tensor([3, 1])
    target = Tree.random(4, 3, 1, 1.5)
    draft = Tree.random(2, 2, 2, 1.5)
    joint = enumerate_outcomes(target, draft, block=block, token_ids=token_ids).joint
    torch.testing.assert_close(joint, target.joint(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("block", [False, True], ids=["tokens", "block"])
def test_disjoint_supports_accept_nothing(block: bool) -> None:
    target = Tree([torch.tensor([0.4, 0.6, 0.0]).expand([3] * done + [3]) for done in range(3)])
    draft = Tree([torch.tensor([0.0, 0.0, 1.0]).expand([3] * done + [3]) for done in range(2)])
    tokens = (2, 2)
    logits = target.lines(tokens).log()
    rows = [VerificationRow(SamplingParams(), Proposal.chain(tokens, draft.lines(tokens)), None, 0, 1)] * 200
    verdicts = verify(logits.repeat(200, 1), rows, torch.Generator().manual_seed(0), block=block)
    assert all(verdict.accepted_nodes == [] and verdict.token_ids[0] in (0, 1) for verdict in verdicts)


def test_the_longest_accepted_prefix_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniforms just below and just above the acceptance probability of each prefix decide as they should."""
    target, draft = trees(3, 3, seed=12)
    tokens = (0, 1, 2)
    target_probs, draft_probs = target.lines(tokens), draft.lines(tokens)
    proposal = Proposal.chain(tokens, draft_probs)
    row = VerificationRow(SamplingParams(), proposal, None, 0, 1)
    known = _SampledDraft.of(proposal, 0)
    known.target_at = [float(target_probs[step, token]) for step, token in enumerate(tokens)]
    known.draft_at = [float(draft_probs[step, token]) for step, token in enumerate(tokens)]
    acceptances = rejection._block_acceptances(target_probs, [known])[0]
    assert all(acceptance > 0.01 for acceptance in acceptances)
    for accepted in itertools.product([False, True], repeat=3):
        pairs = list(zip(acceptances, accepted, strict=True))
        if any(acceptance > 0.999 and not kept for acceptance, kept in pairs):
            continue
        uniforms = [acceptance - 1e-4 if kept else acceptance + 1e-4 for acceptance, kept in pairs]
        generator = torch.Generator().manual_seed(0)
        with monkeypatch.context() as patch:
            patch.setattr(
                rejection, "draw_uniforms", lambda *_, values=uniforms: torch.tensor(values).double()
            )
            verdict = verify(target_probs.log(), [row], generator, block=True)[0]
        longest = max((length for length, kept in enumerate(accepted, 1) if kept), default=0)
        assert verdict.accepted_nodes == list(range(1, longest + 1))


# --- the enumeration can fail ------------------------------------------------------------------------------------

_weights, _acceptances, remainders = (
    rejection.block_weights,
    rejection._block_acceptances,
    rejection.remainders,
)


def _weights_as_acceptances(target_probs: Tensor, drafts: list[_SampledDraft]) -> list[list[float]]:
    return [_weights(draft)[1:] for draft in drafts]


def _unclipped_until_the_end(draft: _SampledDraft) -> list[float]:
    ratios = [at / drafted for at, drafted in zip(draft.target_at, draft.draft_at, strict=True)]
    return [min(1.0, math.prod(ratios[:length])) for length in range(len(ratios) + 1)]


def _unweighted_remainders(target_probs: Tensor, drafts: list[_SampledDraft]) -> Tensor:
    for draft in drafts:
        draft.weight = 1.0
    return remainders(target_probs, drafts)


def _without_residual(target_probs: Tensor, drafts: list[_SampledDraft]) -> Tensor:
    return target_probs[torch.tensor([draft.last_line for draft in drafts])]


BROKEN: list[tuple[str, Callable[..., object]]] = [
    ("_block_acceptances", _weights_as_acceptances),
    ("block_weights", _unclipped_until_the_end),
    ("remainders", _unweighted_remainders),
    ("remainders", _without_residual),
]


@pytest.mark.parametrize(("attribute", "rule"), BROKEN)
def test_a_broken_rule_is_noticed(
    attribute: str, rule: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, draft = trees(3, 3, seed=0)
    monkeypatch.setattr(rejection, attribute, rule)
    joint = enumerate_outcomes(target, draft, block=True).joint
    assert float((joint - target.joint()).abs().max()) > 1e-4
