"""Batch generation without a server: limits, ends, callbacks, and what is given back."""

import pytest

from eda.decoder import SpeculativeDecoder
from eda.errors import CacheFullError
from eda.generation import Generation, GenerationRequest, generate, measure, summarise
from eda.speculation.kinds import Off, Tree
from tests.support.reference_family import Family, make_family

PROMPTS = [[7, 8, 9], [1], [30, 31, 32, 33, 34], [60, 2]]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), seed=40)


@pytest.fixture
def decoder(family: Family) -> SpeculativeDecoder:
    return SpeculativeDecoder.for_models(family.base, family.draft, num_slots=256)


def test_output_ends_at_the_first_end_token_also_inside_an_accepted_run(
    family: Family, decoder: SpeculativeDecoder
) -> None:
    fine_tune = family.fine_tunes["math"]
    for prompt, expected in zip(PROMPTS, family.references("math", PROMPTS, 20), strict=True):
        for end in sorted(set(expected))[:4]:
            request = GenerationRequest(
                prompt, 20, frozenset({end}), speculation=Tree(3, top_k=3, num_nodes=8)
            )
            [generation] = generate(decoder, fine_tune, [request])
            assert generation.token_ids == expected[: expected.index(end) + 1]
            assert generation.finish_reason == "stop"
    assert decoder.cache.allocator.num_free == 256


def test_callbacks_report_every_token_once_and_each_end_once(
    family: Family, decoder: SpeculativeDecoder
) -> None:
    seen: dict[int, list[int]] = {place: [] for place in range(len(PROMPTS))}
    finished: list[int] = []
    requests = [GenerationRequest(prompt, 5 + place) for place, prompt in enumerate(PROMPTS)]
    generations = generate(
        decoder,
        family.fine_tunes["code"],
        requests,
        max_batch=2,
        on_tokens=lambda place, tokens: seen[place].extend(tokens),
        on_finished=lambda place, _: finished.append(place),
    )
    assert [generation.token_ids for generation in generations] == list(seen.values())
    assert [len(tokens) for tokens in seen.values()] == [5, 6, 7, 8]
    assert sorted(finished) == [0, 1, 2, 3]
    assert {generation.finish_reason for generation in generations} == {"length"}


def test_stopping_early_gives_all_slots_back(family: Family, decoder: SpeculativeDecoder) -> None:
    calls = iter([False, False, True])
    generations = generate(
        decoder,
        family.fine_tunes["base"],
        [GenerationRequest(prompt, 30) for prompt in PROMPTS],
        should_stop=lambda: next(calls),
    )
    assert all(0 < len(generation.token_ids) < 30 for generation in generations)
    assert decoder.cache.allocator.num_free == 256


def test_more_requests_than_slots_wait_for_room_and_impossible_ones_are_refused(
    family: Family, decoder: SpeculativeDecoder
) -> None:
    requests = [GenerationRequest([1, 2, 3], 100) for _ in range(5)]
    generations = generate(decoder, family.fine_tunes["base"], requests)
    assert {len(generation.token_ids) for generation in generations} == {100}
    with pytest.raises(CacheFullError, match="a sequence needs"):
        generate(decoder, family.fine_tunes["base"], [GenerationRequest([1, 2, 3], 300)])
    assert decoder.cache.allocator.num_free == 256


def test_acceptance_length_counts_the_bonus_token() -> None:
    generation = Generation(token_ids=[1] * 9, steps=[(4, 2), (4, 0), (4, 4)])
    assert generation.mean_acceptance_length == pytest.approx(3.0)
    summary = summarise([generation, Generation(token_ids=[1], steps=[(4, 1)])], seconds=2.0)
    assert summary.mean_acceptance_length == pytest.approx((3 + 1 + 5 + 2) / 4)
    assert summary.accepted_per_position == pytest.approx([3 / 4, 2 / 4, 1 / 4, 1 / 4])
    assert summary.tokens_per_second == pytest.approx(5.0)


def test_plain_decoding_has_an_acceptance_length_of_one(family: Family, decoder: SpeculativeDecoder) -> None:
    requests = [GenerationRequest(prompt, 6, speculation=Off()) for prompt in PROMPTS]
    generations, throughput = measure(decoder, family.fine_tunes["base"], requests, max_batch=4)
    assert throughput.mean_acceptance_length == 1.0
    assert throughput.num_tokens == 24
    # The first token comes from the pass that ends the prompt.
    assert {generation.num_target_passes for generation in generations} == {5}
