"""Prompt lookup on every backend: the target's own text, in fewer passes, for a target with a draft or without one."""

import gc
import random
from dataclasses import replace

import pytest

from eda.backends.base import DraftRequest
from eda.backends.cpu.library import kernels
from eda.backends.eager.lookup import LookupDrafter
from eda.decoder import ScheduledRow, SpeculativeDecoder
from eda.generation import Generation, GenerationRequest, generate
from eda.models.fine_tune import FineTune
from eda.sampling.params import SamplingParams
from eda.speculation.kinds import Chain, Lookup, Off, Speculation, Tree
from eda.speculation.sequence import SequenceState
from tests.support.graph_decoding import random_private, recording
from tests.support.narrow import VOCAB_SIZE, NarrowFamily, make_narrow_family
from tests.support.reference_family import Family, make_family

needs_kernels = pytest.mark.skipif(kernels() is None, reason="the C++ passes cannot run here")
GREEDY = SamplingParams(temperature=0.0)
MAX_TOKENS = 40


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), seed=3)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> NarrowFamily:
    return make_narrow_family(tmp_path_factory.mktemp("narrow"))


def repetitive_prompts(vocab_size: int, count: int) -> list[list[int]]:
    chance = random.Random(5)
    phrases = [[chance.randrange(vocab_size) for _ in range(chance.randint(2, 6))] for _ in range(count)]
    return [phrase * 3 for phrase in phrases]


def decode(
    decoder: SpeculativeDecoder, fine_tune: FineTune, requests: list[GenerationRequest], batch: int = 4
) -> list[Generation]:
    return generate(decoder, fine_tune, requests, max_batch=batch, prefill_chunk=5)


def requests_of(
    prompts: list[list[int]], allowed: int, vocab_size: int, kind: Speculation
) -> list[GenerationRequest]:
    bias = dict.fromkeys(range(allowed), 200.0) if allowed < vocab_size else {}
    sampling = SamplingParams(temperature=0.0, logit_bias=bias)
    return [GenerationRequest(ids, MAX_TOKENS, sampling=sampling, speculation=kind) for ids in prompts]


def mean_length(generations: list[Generation]) -> float:
    steps = [step for generation in generations for step in generation.steps]
    return 1.0 + sum(accepted for _, accepted in steps) / len(steps)


def references(family: Family, model: str, prompts: list[list[int]], allowed: int) -> list[list[int]]:
    """Greedy continuations by transformers, of the first ``allowed`` tokens alone."""
    texts = [list(ids) for ids in prompts]
    for text in texts:
        for _ in range(MAX_TOKENS):
            text.append(int(family.reference_logits(model, text)[-1, :allowed].argmax()))
    return [text[len(ids) :] for text, ids in zip(texts, prompts, strict=True)]


@pytest.mark.parametrize("graphs", ["off", "recorded"])
@pytest.mark.parametrize(("allowed", "length"), [(96, 1.0), (3, 1.5)], ids=["all tokens", "few tokens"])
@pytest.mark.parametrize("model", ["base", "math", "code"])
def test_greedy_text_is_that_of_transformers_in_fewer_passes(
    family: Family, model: str, allowed: int, length: float, graphs: str
) -> None:
    """Of few tokens a random model repeats what it wrote before."""
    prompts = repetitive_prompts(allowed, 8)
    recordings = recording() if graphs == "recorded" else None
    decoder = SpeculativeDecoder.for_models(
        family.base, num_slots=1024, graphs="off" if recordings is None else recordings
    )
    requests = requests_of(prompts, allowed, family.vocab_size, Lookup())
    found = decode(decoder, family.fine_tunes[model], requests)
    assert [generation.token_ids for generation in found] == references(family, model, prompts, allowed)
    assert mean_length(found) > length
    assert recordings is None or recordings.stats.replayed > 10
    assert decoder.cache.allocator.num_free == 1024


@needs_kernels
def test_greedy_text_of_the_cpp_passes_is_that_of_plain_decoding(narrow: NarrowFamily) -> None:
    decoder = SpeculativeDecoder.for_models(narrow.base, num_slots=1024)
    assert decoder.backend.name == "cpu"
    for allowed, length in ((VOCAB_SIZE, 1.0), (3, 1.5)):
        for fine_tune in narrow.fine_tunes.values():
            plain, drafted = (
                decode(
                    decoder,
                    fine_tune,
                    requests_of(repetitive_prompts(allowed, 6), allowed, VOCAB_SIZE, kind),
                    batch,
                )
                for kind, batch in ((Off(), 1), (Lookup(), 5))
            )
            assert [each.token_ids for each in drafted] == [each.token_ids for each in plain]
            assert mean_length(drafted) >= length


@pytest.mark.parametrize("models", ["family", pytest.param("narrow", marks=needs_kernels)])
def test_a_seed_gives_the_same_text_with_look_ups(models: str, request: pytest.FixtureRequest) -> None:
    loaded = request.getfixturevalue(models)
    decoder = SpeculativeDecoder.for_models(loaded.base, num_slots=1024)
    assert decoder.backend.name == ("torch" if models == "family" else "cpu")
    bias = dict.fromkeys(range(4), 100.0)  # few tokens, so that what stood before comes again
    requests = [
        GenerationRequest(
            ids, MAX_TOKENS, sampling=SamplingParams(seed=seed, temperature=2.0, logit_bias=bias)
        )
        for seed, ids in enumerate(repetitive_prompts(4, 8))
    ]
    plain, drafted = (
        decode(
            decoder,
            loaded.fine_tunes["base"],
            [replace(each, speculation=kind) for each in requests],
        )
        for kind in (Off(), Lookup())
    )
    assert [each.token_ids for each in drafted] == [each.token_ids for each in plain]
    assert len({tuple(each.token_ids) for each in plain}) == 8
    assert mean_length(drafted) > 1.1


def test_look_ups_share_a_batch_with_drafts_of_a_model(family: Family) -> None:
    """Private, shared, plain and looked-up rows, chains and trees, of all fine-tunes."""
    decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=2048)
    private = random_private(family.draft, 1)
    kinds: list[Speculation] = [Lookup(), Chain(4), Off(), Tree(3, 3, 8), Lookup(3), Chain(4)]
    names, prompts = list(family.fine_tunes), repetitive_prompts(3, 24)
    requests = [
        replace(
            request,
            speculation=kinds[place % 6],
            private=private if place % 6 == 5 else None,
            fine_tune=family.fine_tunes[names[place % 4]],
        )
        for place, request in enumerate(requests_of(prompts, 3, family.vocab_size, Lookup()))
    ]
    found = decode(decoder, family.fine_tunes["base"], requests, 7)
    for place, generation in enumerate(found):
        [expected] = references(family, names[place % 4], [prompts[place]], 3)
        assert generation.token_ids == expected
    accepted = [sum(count for _, count in generation.steps) for generation in found]
    assert sum(accepted[0::6]) > 5
    assert sum(accepted[2::6]) == 0


def state_for(family: Family, tokens: list[int], kind: Speculation) -> SequenceState:
    return SequenceState(tokens, len(tokens) + 20, family.fine_tunes["base"], GREEDY, speculation=kind)


def test_a_draft_is_no_longer_than_the_match_and_what_is_asked_for(family: Family) -> None:
    drafter = LookupDrafter()

    def drafted(tokens: list[int], length: int) -> list[int] | None:
        [proposal] = drafter.draft([DraftRequest(state_for(family, tokens, Lookup()), length)])
        return None if proposal is None else proposal.token_ids

    assert drafted([1, 2, 3, 4, 5, 9, 1, 2, 3], 8) == [4, 5, 9]
    assert drafted([1, 2, 3, 4, 5, 9, 1, 2, 3], 2) == [4, 5]
    assert drafted([7, 7, 7, 7], 8) == [7, 7, 7]
    assert drafted([1, 2, 3, 4, 3], 8) is None
    assert drafted([7, 7, 7, 7], 0) is None


def test_accepted_tokens_alone_are_looked_up_and_a_sequence_takes_its_index_along(family: Family) -> None:
    decoder = SpeculativeDecoder.for_models(family.base, num_slots=256)
    drafter = decoder.backend.drafters[Lookup]
    assert isinstance(drafter, LookupDrafter)
    [prompt] = repetitive_prompts(family.vocab_size, 1)
    state = state_for(family, prompt, Lookup())
    decoder.admit(state)
    assert not state.keeps_features
    decoder.step([ScheduledRow(state, state.num_uncomputed)])
    while len(state.token_ids) < state.max_length - 1:  # no draft comes before the last token
        before = list(state.token_ids)
        decoder.step([ScheduledRow(state)])
        [index] = drafter._indices.values()
        assert len(index._earlier) == len(before) + 1
    decoder.release(state)
    del state
    gc.collect()
    assert len(drafter._indices) == 0


def test_a_sequence_without_room_for_a_draft_is_decoded_plainly(family: Family) -> None:
    """Admitted with a short draft, it keeps to its slots whatever is asked for afterwards."""
    decoder = SpeculativeDecoder.for_models(family.base, num_slots=64)
    state = state_for(family, [1, 2] * 4, Lookup(2))
    decoder.admit(state)
    decoder.step([ScheduledRow(state, state.num_uncomputed)])
    state.speculation = Lookup(40)
    while len(state.token_ids) < state.max_length:
        decoder.step([ScheduledRow(state)])
        assert state.extent is not None
        assert state.extent.length <= state.extent.capacity
    [expected] = family.references("base", [[1, 2] * 4], 20)
    assert state.token_ids[8:] == expected
