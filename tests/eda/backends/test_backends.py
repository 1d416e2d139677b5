"""The seam between the decoder and what computes: a drafter is one class, whether or not it has a model."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from eda.backends.base import DraftRequest
from eda.decoder import ScheduledRow, SpeculativeDecoder
from eda.generation import GenerationRequest, generate
from eda.sampling.params import SamplingParams
from eda.speculation.kinds import Chain, Off, Speculation, Tree
from eda.speculation.proposal import Proposal
from eda.speculation.sequence import SequenceState
from tests.support.reference_family import Family, make_family

GREEDY = SamplingParams(temperature=0.0)
CHAIN = Chain(4)
TREE = Tree(3, top_k=3, num_nodes=8)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), seed=3)


class RepeatingDrafter:
    """Proposes what followed the last token where that stood before, as prompt lookup does. It has no model."""

    taps = None

    def __init__(self) -> None:
        self.seen: list[DraftRequest] = []

    def draft(self, requests: Sequence[DraftRequest]) -> list[Proposal | None]:
        self.seen += requests
        return [self._draft(request.state.token_ids, request.length) for request in requests]

    @staticmethod
    def _draft(tokens: list[int], length: int) -> Proposal | None:
        places = [place for place, token in enumerate(tokens[:-1]) if token == tokens[-1]]
        found = tokens[places[-1] + 1 :][:length] if places else []
        return Proposal.chain(found) if found else None


def requests_of(family: Family, speculations: Sequence[Speculation]) -> list[GenerationRequest]:
    rng = random.Random(1)
    names = list(family.fine_tunes)
    return [
        GenerationRequest(
            [rng.randrange(family.vocab_size) for _ in range(rng.choice([2, 7, 15]))],
            30,
            sampling=GREEDY,
            speculation=speculations[place % len(speculations)],
            fine_tune=family.fine_tunes[names[place // 2 % len(names)]],
        )
        for place in range(12)
    ]


def texts_of(family: Family, requests: Sequence[GenerationRequest]) -> list[list[int]]:
    texts = []
    for request in requests:
        assert request.fine_tune is not None
        [text] = family.references(request.fine_tune.name, [list(request.prompt_ids)], request.max_tokens)
        texts.append(text)
    return texts


def test_a_drafter_without_a_model_drafts_for_a_target_without_a_draft(family: Family) -> None:
    decoder = SpeculativeDecoder.for_models(family.base, num_slots=1024)
    drafter = RepeatingDrafter()
    decoder.backend = replace(decoder.backend, drafters={Chain: drafter})
    requests = requests_of(family, [CHAIN])
    generations = generate(decoder, family.fine_tunes["base"], requests, max_batch=5, prefill_chunk=4)
    assert [generation.token_ids for generation in generations] == texts_of(family, requests)
    assert sum(accepted for generation in generations for _, accepted in generation.steps) > 10
    assert not any(request.state.keeps_features for request in drafter.seen)
    assert all(request.state.pending_bytes == 0 for request in drafter.seen)


def test_two_drafters_serve_one_batch_each_by_the_mode_of_a_row(family: Family) -> None:
    decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=1024)
    drafter = RepeatingDrafter()
    trained = decoder.backend.drafters[Chain]
    decoder.backend = replace(decoder.backend, drafters={Chain: drafter, Tree: trained})
    requests = requests_of(family, [CHAIN, TREE, Off()])
    generations = generate(decoder, family.fine_tunes["base"], requests, max_batch=6)
    assert [generation.token_ids for generation in generations] == texts_of(family, requests)
    assert {type(request.state.speculation) for request in drafter.seen} == {Chain}
    drafted = [sum(count for count, _ in generation.steps) for generation in generations]
    assert all(drafted[place] for place in range(1, 12, 3)), "trees"
    assert not any(drafted[place] for place in range(2, 12, 3)), "plain rows"


def test_a_sequence_may_change_to_a_drafter_that_reads_nothing_and_back(family: Family) -> None:
    """Features that the trained draft will read are kept meanwhile."""
    decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=256)
    drafter = RepeatingDrafter()
    trained = decoder.backend.drafters[Chain]
    decoder.backend = replace(decoder.backend, drafters={Chain: trained, Tree: drafter})
    [request] = requests_of(family, [CHAIN])[:1]
    assert request.fine_tune is not None
    state = SequenceState(
        list(request.prompt_ids),
        len(request.prompt_ids) + 30,
        request.fine_tune,
        GREEDY,
        speculation=Chain(8),
    )
    decoder.admit(state)
    assert state.keeps_features
    decoder.step([ScheduledRow(state, state.num_uncomputed)])
    drafted: dict[type, int] = {Chain: 0, Tree: 0}
    while len(state.token_ids) < state.max_length:
        state.speculation = CHAIN if len(state.token_ids) % 2 else replace(TREE, num_nodes=4)
        [result] = decoder.step([ScheduledRow(state)])
        drafted[type(state.speculation)] += result.num_draft_tokens
    assert state.token_ids[len(request.prompt_ids) :][:30] == texts_of(family, [request])[0]
    assert drafted[Chain] > 0


def test_a_sequence_that_kept_no_features_is_not_drafted_for_by_a_draft_that_reads_them(
    family: Family,
) -> None:
    decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=256)
    drafter = RepeatingDrafter()
    trained = decoder.backend.drafters[Chain]
    decoder.backend = replace(decoder.backend, drafters={Chain: trained, Tree: drafter})
    state = SequenceState([1, 2, 3], 30, family.fine_tunes["base"], GREEDY, speculation=TREE)
    decoder.admit(state)
    decoder.step([ScheduledRow(state, 3)])
    state.speculation = CHAIN
    [result] = decoder.step([ScheduledRow(state)])
    assert result.num_draft_tokens == 0
    assert len(result.token_ids) == 1
