"""Sampled output of the whole decoder follows the target's distribution exactly, whatever the draft.

The reference is the target's own probability of every pair of tokens, computed with transformers; thousands of
sequences are drawn through prefill, drafting, verification and rollback. A logit bias leaves a few tokens, so that
even a random draft proposes what the target may well accept.
"""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from scipy.stats import chisquare

from eda.backends.eager.proposer import EagerProposer
from eda.decoder import SpeculativeDecoder
from eda.generation import GenerationRequest, generate
from eda.models.private import PrivateModule
from eda.sampling.params import SamplingParams
from eda.speculation.kinds import Chain, Lookup, Speculation, Tree
from tests.support.reference_family import Family, make_family

NUM_ALLOWED = 4
BIAS = 100.0
TEMPERATURE = 4.0
NUM_DRAWS = 1500
PROMPT = [5, 17, 40]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), seed=20)


def allowed_tokens(family: Family) -> list[int]:
    return family.draft.draft_token_ids[:NUM_ALLOWED].tolist()


def exact_probabilities(
    family: Family, model: str, prompt: Sequence[int] = PROMPT
) -> dict[tuple[int, ...], float]:
    """Probability of each triple of allowed tokens, from the reference's logits."""
    allowed = allowed_tokens(family)
    outcomes: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        for path, mass in outcomes.items():
            logits = family.reference_logits(model, [*prompt, *path])[-1][allowed]
            shares = (logits / TEMPERATURE).softmax(-1).tolist()
            for token, share in zip(allowed, shares, strict=True):
                longer[(*path, token)] = mass * share
        outcomes = longer
    return outcomes


def draws(
    family: Family,
    model: str,
    speculation: Speculation,
    *,
    block: bool = False,
    prompt: Sequence[int] = PROMPT,
) -> tuple[Counter[tuple[int, ...]], float]:
    """Counts of emitted triples, and the share of decoding passes that accepted a draft token."""
    decoder = SpeculativeDecoder.for_models(
        family.base, family.draft, num_slots=4096, seed=1, block_verification=block
    )
    module = PrivateModule(family.draft.config.private_config(24, 3)).requires_grad_(False)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(2))
    sampling = SamplingParams(temperature=TEMPERATURE, logit_bias=dict.fromkeys(allowed_tokens(family), BIAS))
    request = GenerationRequest(prompt, 3, sampling=sampling, speculation=speculation, private=module)
    generations = generate(decoder, family.fine_tunes[model], [request] * NUM_DRAWS, max_batch=150)
    passes = [accepted for generation in generations for _, accepted in generation.steps]
    accepting = sum(count > 0 for count in passes) / len(passes)
    return Counter(tuple(generation.token_ids) for generation in generations), accepting


def significance(counts: Counter[tuple[int, ...]], exact: dict[tuple[int, ...], float]) -> float:
    """p-value of a chi-square test; outcomes that are rarely expected are put together."""
    assert set(counts) <= set(exact), "a token was emitted that the target excludes"
    common = [path for path, mass in exact.items() if mass * NUM_DRAWS >= 5]
    observed = [counts[path] for path in common]
    expected = [exact[path] * NUM_DRAWS for path in common]
    rest = NUM_DRAWS - sum(expected)
    if rest >= 1:
        observed.append(NUM_DRAWS - sum(observed))
        expected.append(rest)
    else:
        expected = [value * sum(observed) / sum(expected) for value in expected]
    return float(chisquare(observed, expected).pvalue)


@pytest.mark.parametrize(
    ("speculation", "block"),
    [
        (Chain(3), False),
        (Chain(3), True),
        (Tree(3, top_k=3, num_nodes=9), False),
    ],
    ids=["chain", "block", "tree"],
)
def test_sampled_output_follows_the_target(family: Family, speculation: Speculation, block: bool) -> None:
    counts, accepting = draws(family, "code", speculation, block=block)
    assert 0.1 < accepting < 0.95, "the test needs accepted and rejected drafts"
    exact = exact_probabilities(family, "code")
    assert significance(counts, exact) > 1e-4


@pytest.mark.parametrize("block", [False, True])
def test_looked_up_drafts_leave_the_distribution_as_it_is(family: Family, block: bool) -> None:
    """The prompt holds each pair of the allowed tokens, so that something follows whatever is drawn."""
    pairs = [0, 0, 1, 0, 2, 0, 3, 1, 1, 2, 1, 3, 2, 2, 3, 3, 0]
    prompt = [*PROMPT, *(allowed_tokens(family)[place] for place in pairs)]
    counts, accepting = draws(family, "code", Lookup(), block=block, prompt=prompt)
    assert 0.1 < accepting < 0.95, "the test needs accepted and rejected drafts"
    assert significance(counts, exact_probabilities(family, "code", prompt)) > 1e-4


def test_the_check_fails_when_drafts_are_accepted_unseen(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test of the test: a draft that misstates its probabilities, so that all it proposes passes, is caught."""
    original = EagerProposer.propose_chains

    def overconfident(self: EagerProposer, *arguments: object) -> object:
        proposals = original(self, *arguments)  # type: ignore[arg-type]
        for proposal in proposals:
            if proposal.draft_probs is not None:
                proposal.draft_probs.mul_(0.0).add_(1e-9)
        return proposals

    monkeypatch.setattr(EagerProposer, "propose_chains", overconfident)
    counts, _ = draws(family, "code", Chain(3))
    assert significance(counts, exact_probabilities(family, "code")) < 1e-4


@pytest.mark.parametrize("seed", [None, 5], ids=["drawn", "seeded"])
@pytest.mark.parametrize("bias", [BIAS, 0.0], ids=["few tokens", "all tokens"])
def test_a_tree_at_temperature_1_with_top_k_1_is_accepted_as_a_greedy_one(
    family: Family, bias: float, seed: int | None
) -> None:
    logit_bias = dict.fromkeys(allowed_tokens(family), bias) if bias else {}
    greedy = SamplingParams(temperature=0.0, logit_bias=logit_bias)
    nearly = SamplingParams(temperature=1.0, top_k=1, logit_bias=logit_bias, seed=seed)
    tree = Tree(4, top_k=3, num_nodes=8)
    prompts = [[5, 17, start] for start in range(40)]

    def run(sampling: SamplingParams) -> list[tuple[list[int], list[tuple[int, int]]]]:
        decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=4096, seed=1)
        requests = [GenerationRequest(ids, 12, sampling=sampling, speculation=tree) for ids in prompts]
        generations = generate(decoder, family.fine_tunes["code"], requests, max_batch=8)
        return [(generation.token_ids, generation.steps) for generation in generations]

    expected = run(greedy)
    assert any(accepted for _, steps in expected for _, accepted in steps), "the test needs accepted drafts"
    assert run(nearly) == expected
