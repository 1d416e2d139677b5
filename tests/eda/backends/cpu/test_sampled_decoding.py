"""Sampled text of the whole decoder on the C++ passes follows the target's own distribution, whatever the draft.

The reference is the probability of every triple of tokens, from the target's logits and the processors in torch;
thousands of sequences are drawn through prefill, drafting, verification and rollback.
"""

from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from eda.backends.cpu.drafter import CpuDraftLayer
from eda.decoder import SpeculativeDecoder
from eda.generation import GenerationRequest, generate
from eda.sampling.params import SamplingParams
from eda.sampling.processors import LogitsContext, process_logits
from eda.speculation.kinds import Chain, Off, Speculation
from tests.support.narrow import NarrowFamily, make_narrow_family
from tests.support.passes import Row, run

pytestmark = pytest.mark.usefixtures("_needs_kernels")

PROMPT = [5, 17, 11]
NUM_DRAWS = 3000
SETTINGS = {
    "temperature 1": SamplingParams(temperature=1.0),
    "temperature 2": SamplingParams(temperature=2.0),
    "nucleus": SamplingParams(temperature=1.5, top_p=0.8),
}
Triple = tuple[int, int, int]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> NarrowFamily:
    return make_narrow_family(tmp_path_factory.mktemp("family"))


def exact_probabilities(family: NarrowFamily, name: str, params: SamplingParams) -> dict[Triple, float]:
    fine_tune = family.fine_tunes[name]
    paths: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    for _ in range(3):
        cache = family.base.new_cache(len(paths) * (len(PROMPT) + 2))
        rows = []
        for path, _ in paths:
            extent = cache.allocator.allocate(len(PROMPT) + len(path))
            rows.append(Row(extent, [*PROMPT, *path], fine_tune.lora, prompt_length=len(PROMPT)))
        logits = torch.stack([lines[-1] for lines in run(fine_tune.model, cache, rows)])
        shares = process_logits(logits, [LogitsContext(params)] * len(paths)).double().softmax(-1).tolist()
        paths = [
            ((*path, token), mass * share)
            for (path, mass), row in zip(paths, shares, strict=True)
            for token, share in enumerate(row)
            if share > 0.0
        ]
    return {(path[0], path[1], path[2]): mass for path, mass in paths}


def draws(
    family: NarrowFamily, name: str, params: SamplingParams, speculation: Speculation
) -> tuple[Counter[Triple], float]:
    """Counts of emitted triples, and the share of decoding passes that accepted a draft token."""
    decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=4096, seed=3)
    request = GenerationRequest(
        PROMPT, 3, sampling=params, speculation=speculation, private=family.modules[1]
    )
    generations = generate(decoder, family.fine_tunes[name], [request] * NUM_DRAWS, max_batch=200)
    passes = [accepted for generation in generations for _, accepted in generation.steps]
    texts = [generation.token_ids for generation in generations]
    return Counter((a, b, c) for a, b, c in texts), sum(count > 0 for count in passes) / len(passes)


def significance(counts: Counter[Triple], exact: dict[Triple, float]) -> float:
    """p-value of a chi-square test over neighbouring outcomes, put together until 20 are expected of each group."""
    assert set(counts) <= set(exact), "a token was emitted that the target excludes"
    observed, expected = [0.0], [0.0]
    for path in sorted(exact):
        if expected[-1] >= 20:
            observed.append(0.0)
            expected.append(0.0)
        observed[-1] += counts[path]
        expected[-1] += exact[path] * NUM_DRAWS
    assert len(expected) > 20
    return float(chisquare(observed, expected).pvalue)


@pytest.mark.parametrize("params", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize(
    "speculation",
    [
        Off(),
        Chain(2),
        Chain(4, min_probability=0.1),
    ],
    ids=["plain", "chain", "chain that ends early"],
)
def test_sampled_text_follows_the_target(
    family: NarrowFamily, speculation: Speculation, params: SamplingParams
) -> None:
    counts, accepting = draws(family, "inner", params, speculation)
    if isinstance(speculation, Chain):
        assert 0.1 < accepting < 0.95, "the test needs accepted and rejected drafts"
    assert significance(counts, exact_probabilities(family, "inner", params)) > 1e-4


def test_the_check_fails_when_drafts_are_accepted_unseen(
    family: NarrowFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test of the test: a draft that misstates its probabilities, so that all it proposes passes, is caught."""
    original = CpuDraftLayer.extend_and_draft

    def overconfident(self: CpuDraftLayer, *arguments: object) -> object:
        proposals = original(self, *arguments)  # type: ignore[arg-type]
        for proposal in proposals:
            if proposal.draft_probs is not None:
                proposal.draft_probs.mul_(0.0).add_(1e-9)
        return proposals

    monkeypatch.setattr(CpuDraftLayer, "extend_and_draft", overconfident)
    params = SETTINGS["temperature 1"]
    counts, _ = draws(family, "inner", params, Chain(3))
    assert significance(counts, exact_probabilities(family, "inner", params)) < 1e-6
