"""Logits that are not finite: their row fails, whatever it asks for, and the rows beside it do not notice."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eda.backends.cpu.library import kernels
from eda.backends.cpu.verifier import CpuVerifier
from eda.backends.eager.verifier import RulesVerifier
from eda.backends.loading import load_target
from eda.decoder import ScheduledRow, SpeculativeDecoder
from eda.errors import NonFiniteLogitsError
from eda.formats.weight_settings import WeightSetting
from eda.generation import GenerationRequest, generate
from eda.models.answers import Logits
from eda.models.fine_tune import FineTune
from eda.sampling.params import SamplingParams
from eda.speculation.kinds import Off
from eda.speculation.proposal import Proposal
from eda.speculation.sequence import SequenceState
from eda.speculation.verification import AnswerLines, Verdict, VerificationRow
from tests.support.tiny import tiny_target

SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "greedy with logprobs": SamplingParams(temperature=0.0, num_logprobs=2),
    "greedy with a bias": SamplingParams(temperature=0.0, logit_bias={3: 1.0}),
    "seeded": SamplingParams(seed=5),
    "sampled": SamplingParams(),
    "sampled with logprobs": SamplingParams(temperature=0.7, num_logprobs=1),
    "top-k": SamplingParams(top_k=3),
    "nucleus": SamplingParams(temperature=0.8, top_p=0.8),
    "min-p": SamplingParams(min_p=0.2),
    "all cuts": SamplingParams(temperature=1.4, top_k=9, top_p=0.9, min_p=0.02),
}
VOCAB_SIZE = 40


def damaged(kind: str, logits: Tensor) -> Tensor:
    logits = logits.clone()
    if kind == "one NaN":
        logits[17] = math.nan
    else:
        logits[:] = {"all NaN": math.nan, "all infinite": math.inf, "all minus infinite": -math.inf}[kind]
    return logits


@pytest.mark.parametrize("in_kernel", [False, True])
@pytest.mark.parametrize("kind", ["one NaN", "all NaN", "all infinite", "all minus infinite"])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_a_row_without_finite_logits_emits_nothing(
    sampling: SamplingParams, kind: str, in_kernel: bool
) -> None:
    if in_kernel and kernels() is None:
        pytest.skip("the C++ passes cannot run here")
    logits = torch.randn(6, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    chain = Proposal.chain([4, 9])
    if sampling.draws_freely:
        chain = Proposal.chain([4, 9], torch.full((2, VOCAB_SIZE), 1 / VOCAB_SIZE))
    rows = [VerificationRow(sampling, proposal, None, 0, 3) for proposal in (None, chain, None, None)]
    bad = logits.clone()
    bad[1] = damaged(kind, logits[1])  # the chain's root
    bad[4] = damaged(kind, logits[4])

    def verdicts(given: Tensor) -> list[Verdict]:
        generator = torch.Generator().manual_seed(0)
        rules = RulesVerifier(generator)
        verifier = CpuVerifier(rules, generator) if in_kernel else rules
        return verifier.verify(rows, [AnswerLines(Logits(given), first) for first in (0, 1, 4, 5)])

    found, expected = verdicts(bad), verdicts(logits)
    for place in (1, 2):
        verdict = found[place]
        assert (verdict.is_finite, verdict.token_ids, verdict.logprobs) == (False, [], None)
    assert (found[0], found[3]) == (expected[0], expected[3])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("target"), head_dim=32)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["greedy", "greedy with logprobs", "sampled", "seeded"])
def test_a_damaged_model_fails_its_rows_alone(
    directory: Path, weights: WeightSetting, value: float, name: str
) -> None:
    """Damaged after loading, in the C++ passes too; the first chunk of a prompt already holds the bad token."""
    target, broken = (load_target(directory, weights=weights) for _ in range(2))
    broken.embedding.data[7] = value
    decoder = SpeculativeDecoder.for_models(target, num_slots=200, seed=0)
    states = [
        SequenceState([1, 2, token, 3, 4], 20, FineTune(model_name, model), sampling=SAMPLINGS[name])
        for model_name, model, token in (
            ("good", target, 7),
            ("broken", broken, 7),
            ("broken, unharmed", broken, 8),
        )
    ]
    for state in states:
        decoder.admit(state)
    for num_tokens in (4, 1):
        good, bad, unharmed = decoder.step([ScheduledRow(state, num_tokens) for state in states])
    assert len(good.token_ids) == len(unharmed.token_ids) == 1
    assert good.failure is None
    assert bad.token_ids == []
    assert isinstance(bad.failure, NonFiniteLogitsError)
    assert "'broken' after 5 tokens" in str(bad.failure)
    # The slots of the broken row come back; what is left in them harms nobody.
    decoder.release(states[1])
    again = SequenceState([1, 2, 7, 3, 4], 20, FineTune("good", target), sampling=SAMPLINGS["greedy"])
    decoder.admit(again)
    [result] = decoder.step([ScheduledRow(again, 5)])
    assert result.failure is None


def test_generation_without_a_server_raises(directory: Path) -> None:
    target = load_target(directory, weights="float32")
    target.embedding.data[7] = math.nan
    decoder = SpeculativeDecoder.for_models(target, num_slots=64)
    request = GenerationRequest([7], max_tokens=4, speculation=Off())
    with pytest.raises(NonFiniteLogitsError, match="not finite"):
        generate(decoder, FineTune("t", target), [request])
    assert decoder.cache.allocator.num_free == 64
