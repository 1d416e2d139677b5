"""Sampled rows are lossless: chi-square against exact distributions, and proof that the check can fail."""

import pytest
import torch
from torch import Tensor

from eda.sampling.params import SamplingParams
from eda.speculation import rejection
from eda.speculation.proposal import Proposal
from eda.speculation.rejection import _SampledDraft
from eda.speculation.verification import VerificationRow, verify
from tests.support.markov import (
    Drafter,
    chain_drafter,
    chi_square_p_value,
    decode,
    exact_joint,
    no_drafter,
    random_table,
    tree_drafter,
)

VOCAB_SIZE = 5
TARGET = random_table(VOCAB_SIZE, seed=1)
DRAFT = random_table(VOCAB_SIZE, seed=2)
CLOSE_DRAFT = TARGET + 0.3 * DRAFT
"""Accepts often, so that long accepted runs and bonus tokens are common."""

REDUCED_IDS = torch.tensor([3, 0, 4])
REDUCED_DRAFT = DRAFT[:, REDUCED_IDS]

PLAIN = SamplingParams()
TRUNCATED = SamplingParams(temperature=0.8, top_k=4, top_p=0.9, min_p=0.02)
PENALISED = SamplingParams(
    temperature=1.3,
    repetition_penalty=1.4,
    presence_penalty=0.5,
    frequency_penalty=-0.7,
    logit_bias={2: 1.0},
    min_tokens=2,
    stop_ids=(1,),
)

DRAFTERS = {
    "none": no_drafter,
    "chain": chain_drafter(DRAFT, 3),
    "close chain": chain_drafter(CLOSE_DRAFT, 3),
    "reduced chain": chain_drafter(REDUCED_DRAFT, 3, REDUCED_IDS),
    "tree": tree_drafter(DRAFT, 2, 2),
    "tree of likely tokens": tree_drafter(CLOSE_DRAFT, 3, 2),
    "tree with repeats": tree_drafter(DRAFT, 2, 2, repeat=True),
    "deterministic chain": tree_drafter(CLOSE_DRAFT, 1, 3),
    "all tokens as children": tree_drafter(DRAFT, VOCAB_SIZE, 1),
}
PROMPT = [2, 0]


def p_value(
    drafter: Drafter, params: SamplingParams = PLAIN, *, block: bool = False, length: int = 2, num: int = 1200
) -> float:
    decoding = decode(
        TARGET, params, drafter, prompt=PROMPT, length=length, num_sequences=num, seed=11, block=block
    )
    return chi_square_p_value(decoding.counts, exact_joint(TARGET, params, PROMPT, length))


@pytest.mark.parametrize("params", [PLAIN, TRUNCATED, PENALISED], ids=["plain", "truncated", "penalised"])
@pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS.keys())
def test_joint_distribution_is_the_targets(drafter: Drafter, params: SamplingParams) -> None:
    assert p_value(drafter, params) > 1e-3


@pytest.mark.parametrize("params", [PLAIN, TRUNCATED, PENALISED], ids=["plain", "truncated", "penalised"])
@pytest.mark.parametrize("name", ["chain", "close chain", "reduced chain"])
def test_joint_distribution_with_blocks_is_the_targets(name: str, params: SamplingParams) -> None:
    assert p_value(DRAFTERS[name], params, block=True) > 1e-3


@pytest.mark.parametrize(
    ("name", "block"),
    [("chain", False), ("chain", True), ("close chain", True), ("tree of likely tokens", False)],
)
def test_joint_distribution_of_three_tokens_is_the_targets(name: str, block: bool) -> None:
    assert p_value(DRAFTERS[name], block=block, length=3, num=3000) > 1e-3


def test_mixed_rows_in_one_call_keep_their_distributions() -> None:
    """Plain, chain and tree rows, with different settings, side by side."""
    generator = torch.Generator().manual_seed(3)
    settings = [PLAIN, TRUNCATED, SamplingParams(temperature=0.0), SamplingParams(temperature=2.0)]
    tree, chain = DRAFTERS["tree"], DRAFTERS["chain"]
    num = 6000
    proposals = chain([0] * num, generator)
    for index in range(0, num, 3):
        proposals[index] = tree([0], generator)[0]
    rows, before = [], []
    for index, proposal in enumerate(proposals):
        rows.append(VerificationRow(settings[index % 4], proposal, None, 0, 1))
        before += [0, *(proposal.token_ids if proposal else [])]
    verdicts = verify(TARGET[torch.tensor(before)], rows, generator)
    for number, params in enumerate(settings):
        first = torch.tensor([verdict.token_ids[0] for verdict in verdicts[number::4]])
        counts = torch.bincount(first, minlength=VOCAB_SIZE).double()
        if params.is_greedy:
            assert counts[TARGET[0].argmax()] == len(first)
        else:
            assert chi_square_p_value(counts, exact_joint(TARGET, params, [0], 1)) > 1e-3


# --- the check can fail: each rule below is wrong in one place, and the same harness notices --------------------


def _accept_all_tokens(draft: _SampledDraft) -> None:
    draft.nodes = list(range(1, len(draft.token_ids) + 1))


def _accept_without_ratio(draft: _SampledDraft) -> None:
    """Accepts with the target's probability instead of min(1, target / draft)."""
    for node, (target, uniform) in enumerate(zip(draft.target_at, draft.uniforms, strict=True), 1):
        if uniform >= target:
            return
        draft.nodes.append(node)


def _candidates_without_renormalising(draft: _SampledDraft) -> None:
    node = 0
    while True:
        draft.rejected = []
        for child, parent in enumerate(draft.parents, 1):
            if parent != node:
                continue
            if draft.uniforms[child - 1] < draft.target_at[child - 1]:
                draft.nodes.append(child)
                node = child
                break
            draft.rejected.append(draft.token_ids[child - 1])
        else:
            return


def _blocks_as_chained_weights(target_probs: Tensor, drafts: list[_SampledDraft]) -> None:
    """Accepts each prefix with its weight, as if each were the whole block."""
    for draft in drafts:
        weights = [1.0]
        for target, drafted in zip(draft.target_at, draft.draft_at, strict=True):
            weights.append(min(1.0, weights[-1] * target / drafted))
        lengths = [i for i, uniform in enumerate(draft.uniforms, 1) if uniform < weights[i]]
        draft.nodes = list(range(1, max(lengths, default=0) + 1))
        draft.weight = weights[len(draft.nodes)]


exact_remainders = rejection.remainders


def _target_without_residual(target_probs: Tensor, drafts: list[_SampledDraft]) -> Tensor:
    return target_probs[torch.tensor([draft.last_line for draft in drafts])]


def _bonus_from_draft(target_probs: Tensor, drafts: list[_SampledDraft]) -> Tensor:
    remainders = exact_remainders(target_probs, drafts)
    for row, draft in enumerate(drafts):
        if draft.draft_probs is not None and len(draft.nodes) == len(draft.token_ids):
            remainders[row] = draft.draft_probs[-1]
    return remainders


BROKEN = [
    ("chain", "_accept_tokens", _accept_all_tokens, False),
    ("close chain", "_accept_tokens", _accept_without_ratio, False),
    ("chain", "remainders", _target_without_residual, False),
    ("close chain", "remainders", _bonus_from_draft, False),
    ("reduced chain", "remainders", _target_without_residual, False),
    ("tree of likely tokens", "_accept_candidates", _candidates_without_renormalising, False),
    ("tree of likely tokens", "remainders", _target_without_residual, False),
    ("chain", "_accept_blocks", _blocks_as_chained_weights, True),
    ("chain", "remainders", _target_without_residual, True),
    ("close chain", "remainders", _bonus_from_draft, True),
]


@pytest.mark.parametrize(("name", "attribute", "rule", "block"), BROKEN)
def test_a_broken_rule_is_noticed(
    name: str, attribute: str, rule: object, block: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rejection, attribute, rule)
    assert p_value(DRAFTERS[name], block=block, num=2500) < 1e-6


def test_processing_the_draft_but_not_the_bonus_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slip in the reference code of the paper: the bonus token from the raw distribution."""

    def raw_bonus(target_probs: Tensor, drafts: list[_SampledDraft]) -> Tensor:
        remainders = exact_remainders(target_probs, drafts)
        for row, draft in enumerate(drafts):
            if draft.token_ids and len(draft.nodes) == len(draft.token_ids):
                remainders[row] = TARGET[draft.token_ids[-1]].softmax(-1)
        return remainders

    monkeypatch.setattr(rejection, "remainders", raw_bonus)
    assert p_value(DRAFTERS["close chain"], TRUNCATED) < 1e-6


# --- corner cases ----------------------------------------------------------------------------------------------


def verify_one(
    logits: Tensor,
    proposal: Proposal | None,
    params: SamplingParams = PLAIN,
    *,
    block: bool = False,
    seed: int = 0,
) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return verify(logits, [VerificationRow(params, proposal, None, 0, 1)], generator, block=block)[
        0
    ].token_ids


@pytest.mark.parametrize("block", [False, True])
def test_equal_distributions_accept_everything(block: bool) -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(5))
    probs = logits.softmax(-1)
    for seed in range(200):
        tokens = torch.multinomial(probs[:3], 1, generator=torch.Generator().manual_seed(seed))[:, 0].tolist()
        emitted = verify_one(logits, Proposal.chain(tokens, probs[:3]), block=block, seed=seed)
        assert emitted[:3] == tokens


@pytest.mark.parametrize("block", [False, True])
def test_a_certain_target_overrules_any_draft(block: bool) -> None:
    """The target has one possible token; the draft never draws it, or draws it always."""
    logits = torch.full((3, 8), -torch.inf)
    logits[:, 6] = 0.0
    never = torch.full((2, 8), 1 / 7)
    never[:, 6] = 0.0
    always = torch.eye(8)[[6, 6]]
    for seed in range(50):
        assert verify_one(logits, Proposal.chain([1, 6], never), block=block, seed=seed) == [6]
        assert verify_one(logits, Proposal.chain([6, 6], always), block=block, seed=seed) == [6, 6, 6]
    for seed in range(50):
        tree = Proposal([1, 6, 6, 6, 2], [0, 0, 0, 2, 4])
        assert verify_one(logits[[0] * 6], tree, seed=seed) == [6, 6, 6]


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("broken", [0.0, float("nan")])
def test_a_draft_without_a_distribution_harms_nothing(broken: float, block: bool) -> None:
    """A draft whose logits overflowed reports zeros (or NaN): its token is rejected, the target's own is drawn."""
    logits = TARGET[:2].repeat(3000, 1)
    proposal = Proposal.chain([0], torch.full((1, VOCAB_SIZE), broken))
    rows = [VerificationRow(PLAIN, proposal, None, 0, 1)] * 3000
    verdicts = verify(logits, rows, torch.Generator().manual_seed(0), block=block)
    assert all(not verdict.accepted_nodes for verdict in verdicts)
    counts = torch.bincount(
        torch.tensor([verdict.token_ids[0] for verdict in verdicts]), minlength=VOCAB_SIZE
    )
    assert chi_square_p_value(counts.double(), TARGET[0].double().softmax(-1)) > 1e-3


@pytest.mark.parametrize("block", [False, True])
def test_probabilities_that_underflow_are_never_emitted(block: bool) -> None:
    logits = torch.zeros(3, 6)
    logits[:, 3:] = -1000.0
    draft_probs = torch.full((2, 6), 1e-30)
    draft_probs[:, 5] = 1.0
    for seed in range(100):
        assert set(verify_one(logits, Proposal.chain([5, 5], draft_probs), block=block, seed=seed)) <= {
            0,
            1,
            2,
        }
        assert set(verify_one(logits, Proposal([5, 4], [0, 0]), seed=seed)) <= {0, 1, 2}


def test_all_possible_tokens_as_candidates_always_accept_one() -> None:
    """When every possible token is a candidate, one of them is accepted, rounding or not."""
    for seed in range(300):
        logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(seed))
        tokens = logits[0].topk(3).indices.tolist()
        emitted = verify_one(logits, Proposal(tokens, [0, 0, 0]), SamplingParams(top_k=3), seed=seed)
        assert len(emitted) == 2
        assert emitted[0] in tokens


def test_an_empty_proposal_is_plain_decoding() -> None:
    for proposal in (None, Proposal([], []), Proposal.chain([], torch.zeros(0, VOCAB_SIZE))):
        assert len(verify_one(TARGET[:1], proposal)) == 1


def test_low_precision_logits_are_computed_in_float32() -> None:
    logits = TARGET[:1].bfloat16()
    rows = [VerificationRow(PLAIN, None, None, 0, 1)] * 4000
    verdicts = verify(logits.repeat(4000, 1), rows, torch.Generator().manual_seed(0))
    counts = torch.bincount(
        torch.tensor([verdict.token_ids[0] for verdict in verdicts]), minlength=VOCAB_SIZE
    )
    assert chi_square_p_value(counts.double(), logits[0].double().softmax(-1)) > 1e-3
