"""Verification of chains in C++: by the rule, from the right distributions, and as the verification in torch."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from eda.backends.cpu.verifier import CpuVerifier, can_verify, verify_chains
from eda.backends.eager.verifier import RulesVerifier
from eda.sampling.params import SamplingParams
from eda.sampling.processors import LogitsContext, process_logits
from eda.speculation.proposal import Proposal
from eda.speculation.verification import Verdict, VerificationRow
from tests.support.markov import (
    chain_drafter,
    chi_square_p_value,
    decode,
    exact_joint,
    lines_of,
    no_drafter,
    random_table,
)

pytestmark = pytest.mark.usefixtures("_needs_kernels")

SETTINGS = {
    "plain": SamplingParams(),
    "cold": SamplingParams(temperature=0.35),
    "hot": SamplingParams(temperature=3.0),
    "nucleus": SamplingParams(temperature=0.8, top_p=0.85),
    "top-k": SamplingParams(top_k=3),
    "min-p": SamplingParams(temperature=1.2, min_p=0.15),
    "all cuts": SamplingParams(temperature=1.4, top_k=40, top_p=0.9, min_p=0.02),
}
PLAIN = SETTINGS["plain"]


def target_probs(logits: Tensor, params: SamplingParams) -> Tensor:
    """Float64 distributions, by the processors in torch."""
    return process_logits(logits, [LogitsContext(params)] * len(logits)).double().softmax(-1)


def by_the_rule(
    logits: Tensor, params: SamplingParams, proposal: Proposal | None, uniforms: list[float]
) -> tuple[list[int], int]:
    """Token by token in float64: ``uniforms`` has one for each drafted token, and the last one's."""
    probs = target_probs(logits, params)
    size = probs.shape[1]
    tokens = proposal.token_ids if proposal is not None else []
    remainder = probs[len(tokens)]
    accepted = len(tokens)
    for place, (token, uniform) in enumerate(zip(tokens, uniforms, strict=False)):
        assert proposal is not None
        if proposal.draft_probs is None:  # the only token that was possible
            draft = torch.zeros(size, dtype=torch.float64)
            draft[token] = 1.0
            if uniform >= probs[place, token]:
                remainder, accepted = (probs[place] - draft).clamp(min=0.0), place
                break
            continue
        ids = torch.arange(size) if proposal.draft_token_ids is None else proposal.draft_token_ids
        draft = torch.zeros(size, dtype=torch.float64).index_copy(
            0, ids, proposal.draft_probs[place].double()
        )
        if uniform * draft[token] >= probs[place, token]:
            remainder, accepted = (probs[place] - draft).clamp(min=0.0), place
            break
    cumulative = remainder.cumsum(0)
    chosen = int((cumulative <= uniforms[-1] * cumulative[-1]).sum())
    return list(range(1, accepted + 1)), chosen


def random_case(seed: int) -> tuple[Tensor, Proposal | None]:
    """Logits and a chain of 0 to 6 tokens, close enough to be accepted often; every other one over fewer tokens."""
    generator = torch.Generator().manual_seed(seed)
    size = [5, 16, 17, 100, 1003][seed % 5]
    count = seed % 7
    logits = torch.randn(1 + count, size, generator=generator) * 3
    ids = torch.randperm(size, generator=generator)[: max(2, 2 * size // 3)] if seed % 2 else None
    near = logits[:count] + 0.7 * torch.randn(count, size, generator=generator)
    probs = (near if ids is None else near[:, ids]).softmax(-1)
    if not count:
        return logits, None
    columns = torch.multinomial(probs, 1, generator=generator)[:, 0]
    tokens = columns if ids is None else ids[columns]
    return logits, Proposal.chain(tokens.tolist(), probs, ids)


@pytest.mark.parametrize("params", SETTINGS.values(), ids=SETTINGS.keys())
def test_decisions_and_tokens_follow_from_the_uniforms(params: SamplingParams) -> None:
    num_accepted, num_rejected = 0, 0
    for seed in range(420):
        logits, proposal = random_case(seed % 210)
        if proposal is not None and seed >= 210:
            proposal = Proposal.chain(proposal.token_ids)
        generator = torch.Generator().manual_seed(1000 + seed)
        uniforms = torch.rand(len(logits), dtype=torch.float64, generator=generator)
        [found] = verify_chains(logits, [params], [proposal], [0], uniforms)
        assert found == by_the_rule(logits, params, proposal, uniforms.tolist())
        num_accepted += len(found[0])
        num_rejected += len(found[0]) < len(logits) - 1
    assert num_accepted > 50
    assert num_rejected > 50


def test_rows_of_one_call_are_independent() -> None:
    """Different settings, lengths and vocabularies of drafts side by side, on one thread and on three."""
    cases = [random_case(7 * seed + 4 * 5 * (seed % 3) + 3) for seed in range(40)]
    cases = [(logits, proposal) for logits, proposal in cases if logits.shape[1] == 100]
    params = [list(SETTINGS.values())[place % len(SETTINGS)] for place in range(len(cases))]
    starts = [sum(len(logits) for logits, _ in cases[:place]) for place in range(len(cases))]
    drafted = [0 if proposal is None else len(proposal) for _, proposal in cases]
    uniforms = torch.rand(
        sum(drafted) + len(cases), dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    alone = []
    for place, (logits, proposal) in enumerate(cases):
        first = sum(drafted[:place])
        own = torch.cat([uniforms[first : first + drafted[place]], uniforms[sum(drafted) + place :][:1]])
        alone += verify_chains(logits, [params[place]], [proposal], [0], own)
    assert len(cases) > 5
    joined = torch.cat([logits for logits, _ in cases])
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert verify_chains(joined, params, [p for _, p in cases], starts, uniforms) == alone
    finally:
        torch.set_num_threads(before)


def test_all_uniforms_give_the_target_s_distribution() -> None:
    """Exact, not drawn: P(token) over a fine grid of uniforms, and over the draft's tokens by their probabilities."""
    generator = torch.Generator().manual_seed(3)
    logits, draft = torch.randn(2, 6, generator=generator) * 2, torch.randn(4, generator=generator)
    ids, probs, grid = torch.tensor([5, 0, 2, 3]), draft.softmax(-1), 500
    steps = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    line = [0] * grid
    for params in SETTINGS.values():
        emitted = torch.zeros(6, dtype=torch.float64)
        for column, token in enumerate(ids.tolist()):
            proposals = [Proposal.chain([token], probs[None], ids)] * grid
            accepting = verify_chains(
                logits, [params] * grid, proposals, line, torch.cat([steps, torch.full_like(steps, 0.5)])
            )
            accepted = sum(len(nodes) for nodes, _ in accepting) / grid
            emitted[token] += probs[column] * accepted
            if accepted == 1.0:
                continue
            rejecting = verify_chains(
                logits, [params] * grid, proposals, line, torch.cat([torch.ones_like(steps), steps])
            )
            assert not any(nodes for nodes, _ in rejecting)
            counts = torch.bincount(torch.tensor([token for _, token in rejecting]), minlength=6)
            emitted += probs[column] * (1.0 - accepted) * counts / grid
        torch.testing.assert_close(emitted, target_probs(logits[:1], params)[0], rtol=0.0, atol=2 / grid)


def both_ways(logits: Tensor, rows: list[VerificationRow], seed: int) -> tuple[list[Verdict], list[Verdict]]:
    quick, slow = (torch.Generator().manual_seed(seed) for _ in range(2))
    lines = lines_of(logits, rows)
    verifier = CpuVerifier(RulesVerifier(quick), quick)
    return verifier.verify(rows, lines), RulesVerifier(slow).verify(rows, lines)


@pytest.mark.parametrize("params", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_same_generator_leads_torch_to_the_same_verdicts(params: SamplingParams) -> None:
    for seed in range(140):
        logits, proposal = random_case(seed % 70)
        if proposal is not None and seed >= 70:
            proposal = Proposal.chain(proposal.token_ids)
        with_logprobs = replace(params, num_logprobs=2 if seed % 3 else None)
        quick, slow = both_ways(logits, [VerificationRow(with_logprobs, proposal, None, 0, 1)], seed)
        assert quick == slow


def test_rows_that_are_not_covered_keep_their_verdicts_beside_others() -> None:
    """Greedy, seeded, biased and tree rows between drawn ones: the former as without the C++ functions."""
    tree = Proposal([3, 1, 2], [0, 0, 1])
    others = [
        (SamplingParams(temperature=0.0), Proposal.chain([1, 2])),
        (SamplingParams(seed=4), Proposal.chain([1, 2])),
        (SamplingParams(temperature=0.7, seed=9, top_p=0.5), tree),
        (SamplingParams(logit_bias={2: -torch.inf, 4: 100.0}), None),
        (SamplingParams(logit_bias=dict.fromkeys(range(1, 20), -torch.inf)), tree),
    ]
    generator = torch.Generator().manual_seed(0)
    rows, width = [], 20
    for params, proposal in others:
        assert not can_verify(params, proposal)
        rows.append(VerificationRow(params, proposal, None, 0, 1))
        probs = torch.randn(1, width, generator=generator).softmax(-1)
        rows.append(VerificationRow(PLAIN, Proposal.chain([3], probs), None, 0, 1))
    num_lines = sum(1 + (len(row.proposal) if row.proposal else 0) for row in rows)
    logits = torch.randn(num_lines, width, generator=generator)
    quick, slow = both_ways(logits, rows, 1)
    assert quick[:6:2] == slow[:6:2]
    assert quick[6].token_ids == [4]
    assert quick[8].token_ids == [0]
    assert all(len(verdict.token_ids) == 1 + len(verdict.accepted_nodes) for verdict in quick)


VOCAB_SIZE = 5
TARGET = random_table(VOCAB_SIZE, seed=1)
DRAFT = random_table(VOCAB_SIZE, seed=2)
CLOSE_DRAFT = TARGET + 0.3 * DRAFT
REDUCED_IDS = torch.tensor([3, 0, 4])
DRAFTERS = {
    "none": no_drafter,
    "chain": chain_drafter(DRAFT, 3),
    "close chain": chain_drafter(CLOSE_DRAFT, 3),
    "deterministic chain": lambda last, generator: [Proposal.chain([token, 1, token]) for token in last],
    "reduced chain": chain_drafter(DRAFT[:, REDUCED_IDS], 3, REDUCED_IDS),
}
PROMPT = [2, 0]


@pytest.mark.parametrize("params", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("name", DRAFTERS)
def test_joint_distribution_is_the_targets(name: str, params: SamplingParams) -> None:
    found = decode(
        TARGET, params, DRAFTERS[name], prompt=PROMPT, length=3, num_sequences=2000, seed=5, in_kernel=True
    )
    assert chi_square_p_value(found.counts, exact_joint(TARGET, params, PROMPT, 3)) > 1e-3


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_draft_that_misstates_its_distribution_is_noticed(factor: float) -> None:
    """A test of the test: drawn from one distribution, verified with another."""
    honest = DRAFTERS["chain"]

    def dishonest(last: list[int], generator: torch.Generator) -> list[Proposal | None]:
        return [
            None
            if proposal is None
            else replace(proposal, draft_probs=(proposal.draft_probs.log() * factor).softmax(-1))
            for proposal in honest(last, generator)
        ]

    found = decode(
        TARGET, PLAIN, dishonest, prompt=PROMPT, length=2, num_sequences=2500, seed=5, in_kernel=True
    )
    assert chi_square_p_value(found.counts, exact_joint(TARGET, PLAIN, PROMPT, 2)) < 1e-6


# --- corner cases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [0.0, float("nan")])
def test_a_draft_without_a_distribution_harms_nothing(broken: float) -> None:
    proposal = Proposal.chain([0], torch.full((1, VOCAB_SIZE), broken))
    count = 3000
    uniforms = torch.rand(2 * count, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = verify_chains(TARGET[:2], [PLAIN] * count, [proposal] * count, [0] * count, uniforms)
    assert not any(nodes for nodes, _ in found)
    counts = torch.bincount(torch.tensor([token for _, token in found]), minlength=VOCAB_SIZE).double()
    assert chi_square_p_value(counts, TARGET[0].double().softmax(-1)) > 1e-3


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_unit_interval_never_draw_what_is_impossible(uniform: float) -> None:
    logits = torch.full((1, 50), -torch.inf)
    logits[0, 20:30] = 0.0
    expected = 20 if uniform == 0.0 else 29
    uniforms = torch.tensor([uniform], dtype=torch.float64)
    assert verify_chains(logits, [PLAIN], [None], [0], uniforms) == [([], expected)]


def test_equal_distributions_accept_whatever_the_uniforms() -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    probs = logits[:3].softmax(-1)
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.multinomial(probs, 1, generator=generator)[:, 0].tolist()
        uniforms = torch.rand(4, dtype=torch.float64, generator=generator)
        [(nodes, _)] = verify_chains(logits, [PLAIN], [Proposal.chain(tokens, probs)], [0], uniforms)
        assert nodes == [1, 2, 3]


@pytest.mark.parametrize("count", [1, 2, 64, 5000])
def test_tokens_as_likely_as_the_last_one_kept_are_kept(count: int) -> None:
    """``count`` equal tokens behind a likelier one: top-k of 2 keeps them all, top-p of the first one's mass none."""
    logits = torch.full((1, 5100), -80.0)
    logits[0, 17], logits[0, 30 : 30 + count] = 1.0, 0.0
    share = float(target_probs(logits, PLAIN)[0, 17])
    uniforms = torch.tensor([1.0 - 2.0**-53], dtype=torch.float64)
    for params, last in (
        (SamplingParams(top_k=2), 29 + count),
        (SamplingParams(top_p=share + 1e-4), 29 + count),
        (SamplingParams(top_p=share - 1e-4), 17),
        (SamplingParams(min_p=0.3), 29 + count),
        (SamplingParams(min_p=0.4), 17),
        (SamplingParams(top_k=1), 17),
    ):
        assert verify_chains(logits, [params], [None], [0], uniforms) == [([], max(last, 17))]
