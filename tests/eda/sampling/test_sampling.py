"""Settings, noise, draws, and the draft's side of a step."""

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from eda.sampling.draws import draft_scores, draw, propose_chain_tokens
from eda.sampling.noise import gumbel_noise
from eda.sampling.params import SamplingParams
from eda.sampling.processors import LogitsContext, TokenHistory
from tests.support.markov import chi_square_p_value, random_table
from tests.support.sampling_reference import reference_logits

# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -0.1, "between 0"),
        ("temperature", math.nan, "between 0"),
        ("temperature", math.inf, "between 0"),
        ("top_k", -1, "0 (off) or a positive number"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("top_p", math.nan, "above 0 and at most 1"),
        ("min_p", -0.1, "between 0 (off) and 1"),
        ("min_p", 1.1, "between 0 (off) and 1"),
        ("repetition_penalty", 0.0, "between 0.01 and 100"),
        ("repetition_penalty", -1.0, "between 0.01 and 100"),
        ("presence_penalty", math.inf, "between -100 and 100"),
        ("frequency_penalty", math.nan, "between -100 and 100"),
        ("logit_bias", {-3: 1.0}, "token ids from 0 on"),
        ("logit_bias", {3: math.nan}, "a number up to"),
        ("logit_bias", {3: math.inf}, "a number up to"),
        ("min_tokens", -1, "0 (off) or a positive number"),
        ("stop_ids", (5, -1), "token ids from 0 on"),
        ("seed", 2**64, "a 64-bit integer"),
        ("seed", -(2**63) - 1, "a 64-bit integer"),
        ("num_logprobs", -1, "None (off), 0 or a positive number"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}") as caught:
        SamplingParams(**{name: value})
    assert expected in str(caught.value)
    shown = value[3] if value in ({3: math.inf},) else value
    assert str(shown) in str(caught.value) or "nan" in str(caught.value)


def test_settings_at_the_edges_are_taken() -> None:
    SamplingParams(temperature=0.0, top_k=0, top_p=1e-9, min_p=1.0, seed=2**64 - 1, num_logprobs=0)
    SamplingParams(seed=-(2**63), logit_bias={0: -math.inf}, repetition_penalty=0.01)


def test_settings_are_copies() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 5.0
    assert params.logit_bias == {1: 2.0}
    assert hash(params) == hash(SamplingParams(logit_bias={1: 2.0}))


def test_properties_of_settings() -> None:
    assert SamplingParams(temperature=0.0, seed=3).is_greedy
    assert SamplingParams(temperature=1e-6).is_greedy
    assert not SamplingParams(seed=3).draws_freely
    assert SamplingParams().draws_freely
    assert not SamplingParams(logit_bias={1: 1.0}, min_tokens=3).needs_history
    for penalty in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert SamplingParams(**{penalty: 0.5}).needs_history


def test_a_tiny_temperature_does_not_overflow() -> None:
    logits = torch.tensor([[60.0, 70.0, 69.0]])
    for temperature in (1e-4, 1e-5):
        contexts = [LogitsContext(SamplingParams(temperature=temperature))]
        _, probs = propose_chain_tokens(logits, contexts, [0], None, 3, torch.Generator())
        assert probs is not None
        assert probs.tolist() == [[0.0, 1.0, 0.0]]


# --- noise -------------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_its_arguments() -> None:
    first = gumbel_noise(7, 3, 50).clone()
    gumbel_noise.cache_clear()
    torch.manual_seed(99)
    assert torch.equal(gumbel_noise(7, 3, 50), first)
    assert first.dtype == torch.float32
    assert first.device.type == "cpu"
    assert torch.equal(gumbel_noise(7, 3, 80)[:50], first), (
        "a token's noise does not depend on the vocabulary"
    )


def test_noise_differs_between_seeds_and_positions() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (2**32, 0), (0, 2**32), (-1, 0), (2**63, 0), (2**64 - 2, 0)]
    noises = {tuple(gumbel_noise(seed, position, 4).tolist()) for seed, position in keys}
    assert len(noises) == len(keys)


def test_noise_is_gumbel_distributed() -> None:
    noise = torch.cat([gumbel_noise(seed, position, 500) for seed in range(10) for position in range(10)])
    assert bool(noise.isfinite().all())
    assert stats.kstest(noise.numpy(), "gumbel_r").pvalue > 1e-3
    neighbours = noise.reshape(100, 500)
    correlation = float(
        torch.corrcoef(torch.stack([neighbours[:-1].flatten(), neighbours[1:].flatten()]))[0, 1]
    )
    assert abs(correlation) < 0.02


# --- draws -------------------------------------------------------------------------------------------------------


def test_draws_have_the_given_distribution() -> None:
    probabilities = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    drawn = draw(probabilities.repeat(5000, 1) * 3, torch.Generator().manual_seed(1))
    counts = torch.bincount(drawn, minlength=6).double()
    assert chi_square_p_value(counts, probabilities.double()) > 1e-3


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2.0**-53])
def test_extreme_uniforms_draw_possible_tokens(uniform: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "eda.sampling.draws.draw_uniforms", lambda *_: torch.tensor([uniform], dtype=torch.float64)
    )
    assert draw(torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]), torch.Generator()).item() in (1, 3)
    assert draw(torch.tensor([[0.0, 1e-38, 0.0]]), torch.Generator()).item() == 1


def test_rows_without_mass_draw_some_token() -> None:
    drawn = draw(torch.tensor([[0.0, 0.0], [math.nan, 1.0]]), torch.Generator())
    assert all(0 <= token < 2 for token in drawn.tolist())


def test_draws_are_reproducible() -> None:
    probabilities = torch.rand(50, 20, generator=torch.Generator().manual_seed(0))
    first, second = (draw(probabilities, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)


# --- the draft's side --------------------------------------------------------------------------------------------

VOCAB_SIZE = 12
IDS = torch.tensor([7, 0, 11, 4, 3])
LOGITS = random_table(VOCAB_SIZE, 3)[:4, : len(IDS)]


def propose(params: SamplingParams, num: int = 1, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    logits = LOGITS[:1].repeat(num, 1)
    generator = torch.Generator().manual_seed(seed)
    return propose_chain_tokens(logits, [LogitsContext(params)] * num, [6] * num, IDS, VOCAB_SIZE, generator)


def test_greedy_rows_propose_the_argmax_after_penalties_and_bias() -> None:
    best = LOGITS[0].argmax()
    assert propose(SamplingParams(temperature=0.0))[0].tolist() == [best]
    banned = SamplingParams(temperature=0.0, logit_bias={int(IDS[best]): -math.inf})
    column, draft_probs = propose(banned)
    assert column.item() == LOGITS[0].topk(2).indices[1]
    assert draft_probs is None

    history = TokenHistory([int(IDS[best])], VOCAB_SIZE, "cpu")
    context = LogitsContext(
        SamplingParams(temperature=0.0, presence_penalty=100.0), history, (int(IDS[best]),), 1
    )
    column, _ = propose_chain_tokens(LOGITS[:1], [context], [6], IDS, VOCAB_SIZE, torch.Generator())
    assert column.item() == LOGITS[0].topk(2).indices[1]


def test_sampled_rows_report_the_distribution_that_they_drew_from() -> None:
    params = SamplingParams(temperature=0.7, top_k=4, top_p=0.95, logit_bias={11: 1.0})
    columns, draft_probs = propose(params, num=2500)
    assert draft_probs is not None
    biased = LOGITS[0] + torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    expected = reference_logits(
        SamplingParams(temperature=0.7, top_k=4, top_p=0.95), biased, [0], []
    ).softmax(-1)
    torch.testing.assert_close(draft_probs, expected.expand(2500, -1))
    counts = torch.bincount(columns, minlength=len(IDS)).double()
    assert chi_square_p_value(counts, expected.double()) > 1e-3


def test_seeded_rows_use_the_noise_of_the_targets_ids() -> None:
    for seed in range(20):
        column, _ = propose(SamplingParams(seed=seed, temperature=0.5))
        expected = LOGITS[0] / 0.5 + gumbel_noise(seed, 6, VOCAB_SIZE)[IDS]
        assert column.item() == expected.argmax()


def test_rows_of_all_kinds_in_one_batch() -> None:
    settings = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=4),
        SamplingParams(),
        SamplingParams(seed=5),
    ]
    contexts = [LogitsContext(params) for params in settings]
    positions = [1, 2, 3, 4]
    columns, draft_probs = propose_chain_tokens(
        LOGITS, contexts, positions, IDS, VOCAB_SIZE, torch.Generator().manual_seed(0)
    )
    for row in (0, 1, 3):
        alone, none = propose_chain_tokens(
            LOGITS[row : row + 1],
            contexts[row : row + 1],
            positions[row : row + 1],
            IDS,
            VOCAB_SIZE,
            torch.Generator(),
        )
        assert none is None
        assert alone.item() == columns[row]
    assert draft_probs is not None
    torch.testing.assert_close(draft_probs[2], LOGITS[2].softmax(-1))


def test_a_greedy_row_ignores_its_seed() -> None:
    assert propose(SamplingParams(temperature=0.0, seed=1))[0].item() == LOGITS[0].argmax()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_report_probability_zero(value: float) -> None:
    logits = torch.full((2, 4), value)
    columns, draft_probs = propose_chain_tokens(
        logits, [LogitsContext(SamplingParams())] * 2, [0, 0], None, 4, torch.Generator()
    )
    assert draft_probs is not None
    assert draft_probs.eq(0.0).all()
    assert all(0 <= column < 4 for column in columns.tolist())


def test_draft_scores_are_the_drafts_own_with_noise_where_seeded() -> None:
    settings = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=2.0),
        SamplingParams(seed=9),
        SamplingParams(top_k=1),
        SamplingParams(top_k=1, seed=9),
    ]
    logits = LOGITS[:1].expand(5, -1)
    contexts = [LogitsContext(params) for params in settings]
    scores = draft_scores(logits, contexts, [5, 6, 7, 8, 9], IDS, VOCAB_SIZE)
    own = LOGITS[0].log_softmax(-1)
    for row in (0, 1, 3, 4):
        torch.testing.assert_close(scores[row], own, msg=f"{settings[row]}")
    torch.testing.assert_close(scores[2], (LOGITS[0] + gumbel_noise(9, 7, VOCAB_SIZE)[IDS]).log_softmax(-1))


def test_draft_scores_of_seeded_rows_share_what_the_filters_keep_by_the_noise() -> None:
    params = SamplingParams(temperature=0.5, top_k=3, seed=4)
    [scores] = draft_scores(LOGITS[:1], [LogitsContext(params)], [5], IDS, VOCAB_SIZE)
    own, noise = LOGITS[0].log_softmax(-1), gumbel_noise(4, 5, VOCAB_SIZE)[IDS]
    kept = LOGITS[0].topk(3).indices.tolist()
    others = [column for column in range(len(own)) if column not in kept]
    torch.testing.assert_close(scores[others], own[others])
    assert float(scores[kept].exp().sum()) == pytest.approx(float(own[kept].exp().sum()))
    assert scores[kept].argmax() == (LOGITS[0] / 0.5 + noise)[kept].argmax()
