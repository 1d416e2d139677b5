"""Whole decoders on recorded passes against transformers' greedy decoding. The recordings are functions that are called
again on the same buffers, so everything but CUDA's own part is what runs on a GPU."""

import random

import pytest
import torch

from eda.backends.drafting import Reading
from eda.decoder import ScheduledRow, SpeculativeDecoder
from eda.sampling.params import SamplingParams
from eda.speculation.kinds import Chain, Speculation
from tests.support.backends import eager_proposer_of, layer_of, proposer_of
from tests.support.graph_decoding import (
    CHAIN,
    PLAIN,
    TREE,
    Case,
    decode,
    expected_texts,
    random_cases,
    random_private,
    recording,
    state_of,
)
from tests.support.reference_family import Family

MODELS = ("base", "math", "code", "medical")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("with_private", [False, True], ids=["shared", "private"])
@pytest.mark.parametrize("speculation", [PLAIN, CHAIN, TREE], ids=["plain", "chain", "tree"])
def test_one_domain_equals_the_reference(
    family: Family, model: str, with_private: bool, speculation: Speculation
) -> None:
    """A lone sequence and a batch of three: every pass that decodes is a replay."""
    private = random_private(family.draft, 4) if with_private else None
    cases = random_cases(family, [model], 6, seed=1)
    for case in cases:
        case.private, case.speculation = private, speculation
    expected = expected_texts(family, cases, 20)
    for batch_size in (1, 3):
        graphs = recording()
        decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=256, graphs=graphs)
        assert decode(decoder, family, cases, 20, batch_size=batch_size) == expected
        assert graphs.stats.replayed > graphs.stats.captured > 0
        assert graphs.stats.failed == graphs.stats.declined == 0
        assert decoder.cache.allocator.num_free == 256
        if speculation is not PLAIN:
            assert {key.kind for key in graphs.keys()} == {  # noqa: SIM118 (not a mapping)
                "target pass",
                "draft extension",
                "draft chain" if speculation is CHAIN else "draft tree",
            }


def test_mixed_batches_equal_the_reference(family: Family) -> None:
    """Fine-tunes, private modules, modes, prompt chunks and lengths of all kinds change places in one batch."""
    rng = random.Random(2)
    cases = random_cases(family, MODELS, 120, seed=3)
    privates = [None, *(random_private(family.draft, seed, rank=seed) for seed in range(3))]
    modes = [PLAIN, CHAIN, TREE, Chain(1), Chain(7)]
    for case in cases:
        case.private, case.speculation = rng.choice(privates), rng.choice(modes)
    expected = expected_texts(family, cases, 12)
    graphs = recording(max_graphs=40)
    decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=1024, graphs=graphs)
    outputs = decode(decoder, family, cases, 12, batch_size=5, prefill_chunk=5)
    for case, output, reference in zip(cases, outputs, expected, strict=True):
        assert output == reference, case.model
    assert graphs.stats.replayed > 20
    assert len(graphs) == 40


def test_adjacent_sequences_are_never_touched(family: Family) -> None:
    """Chains longer than some rows want, trees and padding stay within each row's own slots: all others keep every bit,
    and the cache is as full as it can be."""
    graphs = recording()
    cases = random_cases(family, ["base"], 6, seed=5)
    longest = Chain(7)
    short = Chain(1)
    chosen = [longest, short, longest, TREE, longest, short]
    for case, speculation in zip(cases, chosen, strict=True):
        case.speculation = speculation
    # Short chains end first, beside long ones that go on.
    lengths = [30 if case.speculation is longest else 9 for case in cases]
    states = [state_of(family, case, length) for case, length in zip(cases, lengths, strict=True)]
    needed = sum(state.max_length + state.speculation.slots for state in states)
    decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=needed, graphs=graphs)
    for state in states:
        decoder.admit(state)
    assert decoder.cache.allocator.num_free == 0
    decoder.step([ScheduledRow(state, state.num_uncomputed) for state in states])
    for _ in range(30):
        for group in ([0, 1], [2, 5], [3], [4]):
            active = [states[at] for at in group if len(states[at].token_ids) < states[at].max_length]
            others = [at for at in range(len(states)) if states[at] not in active]
            if not active:
                continue
            before = [_slots(decoder, states[at]) for at in others]
            decoder.step([ScheduledRow(state) for state in active])
            for at, kept in zip(others, before, strict=True):
                for old, new in zip(kept, _slots(decoder, states[at]), strict=True):
                    torch.testing.assert_close(new, old, rtol=0.0, atol=0.0)
    for case, state, length, text in zip(
        cases, states, lengths, expected_texts(family, cases, 30), strict=True
    ):
        assert state.token_ids[len(case.prompt) :] == text[:length]
    assert graphs.stats.replayed > 30
    assert graphs.stats.declined == 0


def _slots(decoder: SpeculativeDecoder, state: object) -> list[torch.Tensor]:
    extent = state.extent  # type: ignore[attr-defined]
    caches = (decoder.cache, layer_of(decoder).cache)
    span = slice(extent.start, extent.start + extent.capacity)
    return [part[:, :, span].clone() for cache in caches for part in (cache.keys, cache.values)]


def test_a_broken_companion_harms_nobody(family: Family) -> None:
    """Slots and padding around a sequence hold NaN, as a fine-tune that overflows would leave them."""
    [case] = random_cases(family, ["base"], 1, seed=6)
    expected = expected_texts(family, [case], 20)
    decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=256, graphs=recording())
    for cache in (decoder.cache, layer_of(decoder).cache):
        cache.keys.fill_(float("nan"))
        cache.values.fill_(float("nan"))
    for speculation in (PLAIN, CHAIN, TREE):
        case.speculation = speculation
        assert decode(decoder, family, [case], 20) == expected


def test_a_seeded_request_gives_the_same_text_as_without_recordings(family: Family) -> None:
    """Seeds, penalties and top-p are drafted operation by operation, verified from recorded passes."""
    rng = random.Random(7)
    cases = random_cases(family, ["code"], 8, seed=8)
    for case in cases:
        case.sampling = SamplingParams(
            temperature=rng.choice([0.6, 1.0, 1.5]),
            top_p=rng.choice([1.0, 0.9]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            seed=rng.randrange(1000),
        )
    texts = []
    for graphs in ("off", recording()):
        decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=512, graphs=graphs)
        texts.append(decode(decoder, family, cases, 16))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("reads_once", [False, True])
@pytest.mark.parametrize("min_probability", [0.0, 0.05, 0.3])
def test_replayed_chains_are_those_of_the_loop(
    family: Family, reads_once: bool, min_probability: float
) -> None:
    """Greedy chains, ended by their probability: drafted token by token, in full without a look, and replayed."""
    speculation = Chain(6, min_probability=min_probability)
    cases = [
        Case("base", [3, 5, 8, 13], speculation=speculation),
        Case("base", [2, 7], speculation=Chain(2, min_probability=min_probability)),
    ]
    drafted: list[list[list[int]]] = []
    for graphs in ("off", recording()):
        decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=128, graphs=graphs)
        eager_proposer_of(decoder).reads_once = reads_once
        proposer = proposer_of(decoder)
        states = [state_of(family, case, 20) for case in cases]
        for state in states:
            decoder.admit(state)
        decoder.step([ScheduledRow(state, state.num_uncomputed) for state in states])
        with torch.inference_mode():
            hidden = proposer.extend(Reading.of(states))
            proposals = proposer.propose_chains(states, hidden, [6, 2])
        drafted.append([proposal.token_ids for proposal in proposals])
    assert drafted[0] == drafted[1]
    assert len(drafted[0][1]) <= 2


def test_sampled_chains_are_drawn_from_what_they_say(family: Family) -> None:
    """The given probabilities are the softmax of the draft's logits, and the drawn tokens follow them."""
    decoder = SpeculativeDecoder.for_models(
        family.base, family.draft, num_slots=128, seed=1, graphs=recording()
    )
    proposer = proposer_of(decoder)
    case = Case("base", [3, 5, 8], sampling=SamplingParams(temperature=0.7))
    greedy = Case("base", [4, 4])
    states = [state_of(family, each, 20) for each in (case, greedy)]
    for state in states:
        decoder.admit(state)
    decoder.step([ScheduledRow(state, state.num_uncomputed) for state in states])
    with torch.inference_mode():
        hidden = proposer.extend(Reading.of(states))
        draws = [proposer.propose_chains(states, hidden, [2, 2]) for _ in range(2000)]
        logits = layer_of(decoder).logits(hidden, states[0].fine_tune)
    expected = (logits[0] / 0.7).softmax(-1)
    ids = family.draft.draft_token_ids
    for sampled, likeliest in draws[:50]:
        assert sampled.draft_probs is not None
        assert likeliest.draft_probs is None
        torch.testing.assert_close(sampled.draft_probs[0], expected, rtol=1e-4, atol=1e-6)
        assert likeliest.token_ids[0] == int(ids[logits[1].argmax()])
    counts = torch.zeros(family.vocab_size)
    for sampled, _ in draws:
        counts[sampled.token_ids[0]] += 1
    frequency = counts[ids] / len(draws)
    deviation = (expected * (1 - expected) / len(draws)).sqrt()
    assert bool(((frequency - expected).abs() <= 5 * deviation + 1e-3).all())


def test_sampling_with_recordings_keeps_the_distribution(family: Family) -> None:
    """The first two tokens of many samples against plain sampling by the target's own probabilities."""
    prompt = [9, 1, 30]
    first = family.reference_logits("base", prompt)[-1].div(2.0).softmax(-1)
    decoder = SpeculativeDecoder.for_models(
        family.base, family.draft, num_slots=1024, seed=3, graphs=recording()
    )
    case = Case("base", prompt, speculation=Chain(2), sampling=SamplingParams(temperature=2.0))
    outputs = decode(decoder, family, [case] * 3000, 3, batch_size=16)
    counts = torch.zeros(family.vocab_size, dtype=torch.float64)
    for output in outputs:
        counts[output[0]] += 1
    deviation = (first * (1 - first) / len(outputs)).sqrt()
    assert bool(((counts / len(outputs) - first).abs() <= 5 * deviation + 1e-3).all())
    likeliest = int(first.argmax())
    second = family.reference_logits("base", [*prompt, likeliest])[-1].div(2.0).softmax(-1)
    after = [output[1] for output in outputs if output[0] == likeliest]
    found = torch.bincount(torch.tensor(after), minlength=family.vocab_size) / len(after)
    deviation = (second * (1 - second) / len(after)).sqrt()
    assert bool(((found - second).abs() <= 5 * deviation + 2.0 / len(after)).all())


def test_the_choice_is_off_where_it_makes_no_sense(family: Family) -> None:
    for choice, name in (("auto", "torch"), ("off", "torch"), (recording(), "recorded")):
        decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=64, graphs=choice)
        assert decoder.backend.name == name, "no GPU"
        assert bool(decoder.backend.usual_batches) is (name == "recorded")


@pytest.mark.parametrize(
    ("count", "speculation"), [(1, TREE), (1, CHAIN), (2, CHAIN), (4, Chain(2)), (2, PLAIN)]
)
def test_after_warming_up_no_greedy_round_has_to_wait_for_a_recording(
    family: Family, count: int, speculation: Speculation
) -> None:
    """Nothing else would be recorded here, and every pass is a replay."""
    graphs = recording(capture_after=10**9)
    decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=512, graphs=graphs)
    assert decoder.warm_up([(count, speculation)]) == len(graphs) > 0
    cases = [Case("base", random_prompt, speculation=speculation) for random_prompt in [[5, 6], [7, 8]] * 2][
        :count
    ]
    states = [state_of(family, case, 20) for case in cases]
    for state in states:
        decoder.admit(state)
    decoder.step([ScheduledRow(state, state.num_uncomputed) for state in states])
    before = graphs.stats.declined
    for _ in range(3):
        decoder.step([ScheduledRow(state) for state in states])
    assert graphs.stats.declined == before
    assert graphs.stats.replayed == 3 * (1 if speculation is PLAIN else 3)
    texts = expected_texts(family, cases, 20)
    for case, state, text in zip(cases, states, texts, strict=True):
        emitted = state.token_ids[len(case.prompt) :]
        assert emitted == text[: len(emitted)]


def test_warming_up_a_decoder_without_recordings_does_nothing(family: Family) -> None:
    assert SpeculativeDecoder.for_models(family.base, family.draft, num_slots=64).warm_up([(1, CHAIN)]) == 0
    alone = SpeculativeDecoder.for_models(family.base, num_slots=64, graphs=recording())
    assert alone.warm_up([(1, CHAIN), (16, CHAIN)]) == 4, "plain passes alone, of two lengths each"
