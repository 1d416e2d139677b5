"""The speculative step against transformers' and peft's own greedy decoding, whatever the draft proposes.

Models are random and tiny, in float32. Three kinds of drafts are used: a random shared draft, the same with random
private modules, and an oracle that knows the reference's output and spoils it at random places, so that every number
of accepted tokens and every shape of accepted tree path occurs.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eda.backends.drafting import Reading
from eda.backends.eager.draft_layer import TorchDraftLayer
from eda.backends.eager.drafter import ChainTreeDrafter
from eda.backends.eager.proposer import EagerProposer
from eda.backends.loading import load_target
from eda.decoder import ScheduledRow, SpeculativeDecoder
from eda.errors import MismatchError
from eda.generation import GenerationRequest, generate
from eda.models.draft import DraftConfig, DraftModel
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateModule
from eda.sampling.params import SamplingParams
from eda.speculation.kinds import Chain, Off, Speculation, Tree
from eda.speculation.proposal import Proposal
from eda.speculation.sequence import SequenceState
from tests.support.backends import use_drafter
from tests.support.reference_family import Family, make_family

GREEDY = SamplingParams(temperature=0.0)
CHAIN = Chain(4)
TREE = Tree(3, top_k=3, num_nodes=8)
PLAIN = Off()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


def random_private(draft: DraftModel, seed: int, *, rank: int = 3) -> PrivateModule:
    """A private module with large random weights everywhere: as wrong as a module can be."""
    module = PrivateModule(draft.config.private_config(24, rank, rank))
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.5, generator=generator)
    return module.requires_grad_(False)


@dataclass
class Case:
    model: str
    prompt: list[int]
    expected: list[int]


def make_cases(family: Family, count: int, max_tokens: int, seed: int) -> list[Case]:
    rng = random.Random(seed)
    models = list(family.fine_tunes)
    chosen = [models[index % len(models)] for index in range(count)]
    prompts = [
        [rng.randrange(family.vocab_size) for _ in range(rng.choice([1, 2, 3, 6, 11, 23]))] for _ in chosen
    ]
    expected: dict[int, list[int]] = {}
    for model in models:
        places = [place for place, name in enumerate(chosen) if name == model]
        continuations = family.references(model, [prompts[place] for place in places], max_tokens)
        expected |= dict(zip(places, continuations, strict=True))
    return [Case(model, prompts[place], expected[place]) for place, model in enumerate(chosen)]


def run_mixed(
    decoder: SpeculativeDecoder,
    family: Family,
    cases: Sequence[Case],
    max_tokens: int,
    choose: Callable[[int], tuple[Speculation, PrivateModule | None]],
    *,
    batch_size: int = 7,
    prefill_chunk: int = 5,
) -> list[list[int]]:
    """Decodes all cases in one changing batch: sequences join when others leave, prompts come in small chunks."""
    requests = []
    for place, case in enumerate(cases):
        speculation, private = choose(place)
        fine_tune = family.fine_tunes[case.model]
        requests.append(
            GenerationRequest(case.prompt, max_tokens, frozenset(), GREEDY, speculation, private, fine_tune)
        )
    generations = generate(
        decoder, family.fine_tunes["base"], requests, max_batch=batch_size, prefill_chunk=prefill_chunk
    )
    return [generation.token_ids for generation in generations]


def test_greedy_equals_the_reference_in_mixed_batches_with_any_private_module(family: Family) -> None:
    max_tokens = 12
    cases = make_cases(family, 240, max_tokens, seed=1)
    privates = [
        None,
        *(random_private(family.draft, seed) for seed in range(3)),
        random_private(family.draft, 9, rank=0),
    ]
    modes = [CHAIN, TREE, PLAIN, Chain(1)]
    rng = random.Random(2)
    decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=1024)
    outputs = run_mixed(
        decoder, family, cases, max_tokens, lambda _: (rng.choice(modes), rng.choice(privates))
    )
    for case, output in zip(cases, outputs, strict=True):
        assert output == case.expected, case.model
    assert decoder.cache.allocator.num_free == 1024


class OracleProposer(EagerProposer):
    """Proposes the reference's continuation, spoilt at random: chains and trees with the right path inside."""

    def __init__(self, draft: DraftModel, num_slots: int, truth: dict[int, list[int]], seed: int) -> None:
        super().__init__(draft, TorchDraftLayer(draft, draft.new_cache(num_slots)), torch.Generator())
        self.truth = truth
        self.rng = random.Random(seed)
        self.read_features: dict[int, list[Tensor]] = {}

    def extend(self, reading: Reading) -> Tensor:
        for state, features in zip(reading.states, reading.features.split(reading.lengths), strict=True):
            self.read_features.setdefault(id(state), []).append(features)
        return super().extend(reading)

    def _continuation(self, state: SequenceState) -> list[int]:
        return self.truth[id(state)][state.num_generated :]

    def _wrong(self, token: int) -> int:
        return (token + self.rng.randrange(1, self.draft.config.vocab_size)) % self.draft.config.vocab_size

    def propose_chains(
        self, states: Sequence[SequenceState], hidden: Tensor, lengths: Sequence[int]
    ) -> list[Proposal]:
        proposals = []
        for state, length in zip(states, lengths, strict=True):
            truth = self._continuation(state)
            right = self.rng.randrange(length + 1)
            tokens = [
                truth[index]
                if index < min(right, len(truth))
                else self._wrong(truth[index] if index < len(truth) else 0)
                for index in range(length)
            ]
            proposals.append(Proposal(tokens, list(range(length))))
        return proposals

    def propose_trees(
        self, states: Sequence[SequenceState], hidden: Tensor, *, top_k: int, depth: int, num_nodes: int
    ) -> list[Proposal]:
        proposals = []
        for state in states:
            truth = self._continuation(state)
            right = self.rng.randrange(min(depth, len(truth)) + 1)
            tokens: list[int] = []
            parents: list[int] = []
            on_path = 0
            for level in range(depth):
                correct_child = level < right
                parent = on_path
                siblings = self.rng.randrange(1, top_k + 1)
                place = self.rng.randrange(siblings)
                for sibling in range(siblings):
                    if correct_child and sibling == place:
                        tokens.append(truth[level])
                        on_path = len(tokens)
                    else:
                        tokens.append(self._wrong(truth[level] if level < len(truth) else 0))
                    parents.append(parent)
                if not correct_child:
                    break
            proposals.append(Proposal(tokens, parents))
        return proposals


@pytest.mark.parametrize("speculation", [CHAIN, TREE], ids=["chain", "tree"])
def test_accepted_runs_of_every_length_leave_cache_and_features_as_a_fresh_pass(
    family: Family, speculation: Speculation
) -> None:
    """The text is the reference's, and the features kept for the draft equal those of one prefill over all tokens."""
    max_tokens = 24
    decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=1024)
    truth: dict[int, list[int]] = {}
    oracle = OracleProposer(family.draft, 1024, truth, seed=3)
    use_drafter(decoder, ChainTreeDrafter(oracle, family.draft.config.tap_layers))
    cases = make_cases(family, 18, max_tokens, seed=4)
    accepted_counts: set[int] = set()
    states = []
    for case in cases:
        state = SequenceState(
            token_ids=list(case.prompt),
            max_length=len(case.prompt) + max_tokens,
            fine_tune=family.fine_tunes[case.model],
            sampling=GREEDY,
            speculation=speculation,
        )
        truth[id(state)] = case.expected
        decoder.admit(state)
        decoder.step([ScheduledRow(state, state.num_uncomputed)])
        states.append(state)
    active = list(states)
    while active:
        results = decoder.step([ScheduledRow(state) for state in active])
        accepted_counts |= {result.num_accepted for result in results}
        active = [state for state in active if len(state.token_ids) < state.max_length]
    for case, state in zip(cases, states, strict=True):
        assert state.token_ids[len(case.prompt) :][:max_tokens] == case.expected
        seen = torch.cat([*oracle.read_features[id(state)], state.take_pending_features()])
        fresh = SequenceState(
            token_ids=list(state.token_ids),
            max_length=len(state.token_ids) + 1,
            fine_tune=state.fine_tune,
            sampling=GREEDY,
            speculation=speculation,
        )
        decoder.admit(fresh)
        truth[id(fresh)] = []
        decoder.step([ScheduledRow(fresh, fresh.num_uncomputed)])
        expected = fresh.take_pending_features()[: seen.shape[0]]
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)
        decoder.release(fresh)
    assert accepted_counts >= set(range(speculation.fitting(99, 99) + 1))


def test_pausing_and_changing_speculation_between_steps_changes_no_token(family: Family) -> None:
    max_tokens = 40
    [case] = make_cases(family, 1, max_tokens, seed=5)
    rng = random.Random(6)
    decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=256)
    state = SequenceState(
        token_ids=list(case.prompt),
        max_length=len(case.prompt) + max_tokens,
        fine_tune=family.fine_tunes[case.model],
        sampling=GREEDY,
        speculation=TREE,
    )
    decoder.admit(state)
    decoder.step([ScheduledRow(state, state.num_uncomputed)])
    while len(state.token_ids) < state.max_length:
        state.speculation = rng.choice(
            [
                TREE,
                CHAIN,
                Chain(0),
                Chain(30),
            ]
        )
        decoder.step([ScheduledRow(state)])
    assert state.token_ids[len(case.prompt) :][:max_tokens] == case.expected
    assert len(state.token_ids) == state.max_length


SEEDED_MODES = {
    "plain": (PLAIN, False),
    "shared": (CHAIN, False),
    "private": (CHAIN, True),
    "longer": (Chain(7), True),
    "tree": (TREE, True),
}


def test_a_seeded_request_gives_the_same_text_with_any_draft_and_any_companions(family: Family) -> None:
    rng = random.Random(7)
    prompts = [[rng.randrange(family.vocab_size) for _ in range(rng.randrange(1, 12))] for _ in range(12)]
    samplings = [
        SamplingParams(
            temperature=rng.choice([0.6, 1.0, 1.5]),
            top_p=rng.choice([1.0, 0.9]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            seed=rng.randrange(1000),
        )
        for _ in prompts
    ]
    model = list(family.fine_tunes)[1]
    texts: dict[str, list[list[int]]] = {}
    for name, (speculation, with_private) in SEEDED_MODES.items():
        decoder = SpeculativeDecoder.for_models(
            family.base, family.draft, num_slots=1024, seed=rng.randrange(100)
        )
        private = random_private(family.draft, 1) if with_private else None
        requests = [
            GenerationRequest(prompt, 16, sampling=sampling, speculation=speculation, private=private)
            for prompt, sampling in zip(prompts, samplings, strict=True)
        ]
        batch = {"plain": 1, "shared": 12, "private": 5, "longer": 3, "tree": 7}[name]
        generations = generate(decoder, family.fine_tunes[model], requests, max_batch=batch)
        texts[name] = [generation.token_ids for generation in generations]
    for name, text in texts.items():
        assert text == texts["plain"], name
    assert len({tuple(text) for text in texts["plain"]}) == len(prompts)


def test_penalties_bias_and_min_tokens_give_the_same_greedy_text_with_and_without_drafting(
    family: Family,
) -> None:
    rng = random.Random(8)
    stop = 3
    sampling = SamplingParams(
        temperature=0.0,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias={5: 2.0, 7: -100.0, stop: 50.0},
        min_tokens=6,
        stop_ids=(stop,),
    )
    prompts = [[rng.randrange(family.vocab_size) for _ in range(rng.randrange(2, 12))] for _ in range(10)]
    outputs = []
    for speculation in (PLAIN, CHAIN, TREE):
        decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=1024)
        requests = [
            GenerationRequest(
                prompt, 14, frozenset({stop}), sampling, speculation, random_private(family.draft, 2)
            )
            for prompt in prompts
        ]
        generations = generate(decoder, family.fine_tunes["base"], requests, max_batch=4)
        outputs.append([generation.token_ids for generation in generations])
    assert outputs[0] == outputs[1] == outputs[2]
    # The bias makes the stop id win as soon as min_tokens allows it, and never before.
    assert {len(output) for output in outputs[0]} == {7}


def test_logprobs_are_those_of_the_target_with_and_without_drafting(family: Family) -> None:
    prompt = [4, 8, 15, 16, 23, 42]
    decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=256)
    sampling = SamplingParams(temperature=0.0, num_logprobs=3)
    for speculation in (PLAIN, CHAIN, TREE):
        request = GenerationRequest(prompt, 10, sampling=sampling, speculation=speculation)
        [generation] = generate(decoder, family.fine_tunes["base"], [request])
        logits = family.reference_logits("base", prompt + generation.token_ids)
        expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
        assert len(generation.logprobs) == 10
        for entry, token, row in zip(generation.logprobs, generation.token_ids, expected, strict=True):
            assert entry.token_id == token
            assert entry.logprob == pytest.approx(row[token].item(), abs=1e-4)
            assert [index for index, _ in entry.top] == row.topk(3).indices.tolist()


def test_bfloat16_emits_only_tokens_within_a_stated_gap_of_the_argmax(family: Family) -> None:
    """One token and several use different kernels in bfloat16, so equality is not promised; this bound is."""
    gap = 0.25
    base = load_target(family.paths["base"], weights="bfloat16")
    draft = DraftModel.load(family.paths["draft"], dtype=torch.bfloat16)
    decoder = SpeculativeDecoder.for_models(base, draft, num_slots=512)
    rng = random.Random(10)
    for speculation in (CHAIN, TREE):
        prompts = [[rng.randrange(family.vocab_size) for _ in range(8)] for _ in range(10)]
        requests = [
            GenerationRequest(prompt, 12, sampling=GREEDY, speculation=speculation) for prompt in prompts
        ]
        for prompt, generation in zip(
            prompts, generate(decoder, FineTune("base", base), requests), strict=True
        ):
            logits = family.reference_logits("base", prompt + generation.token_ids, dtype=torch.bfloat16)
            rows = logits[len(prompt) - 1 : -1]
            chosen = rows.gather(1, torch.tensor(generation.token_ids)[:, None])[:, 0]
            assert (rows.max(-1).values - chosen).max().item() <= gap


def test_a_step_refuses_rows_that_were_not_admitted(family: Family) -> None:
    decoder = SpeculativeDecoder.for_models(family.base, None, num_slots=64)
    state = SequenceState([1, 2], 10, family.fine_tunes["base"])
    with pytest.raises(ValueError, match="row 0 schedules 2 tokens"):
        decoder.step([ScheduledRow(state, 2)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_ids": [], "max_length": 4}, "token_ids is empty"),
        ({"token_ids": [1, 2, 3], "max_length": 3}, "max_length is 3"),
    ],
)
def test_impossible_sequences_are_refused(family: Family, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceState(fine_tune=family.fine_tunes["base"], **arguments)  # type: ignore[arg-type]


def test_a_draft_for_another_target_is_refused(family: Family, tmp_path: Path) -> None:

    config: DraftConfig = replace(family.draft.config, target_fingerprint="0" * 64)
    other = DraftModel(config, family.draft.draft_token_ids)
    with pytest.raises(MismatchError, match="was trained for the target 0000"):
        SpeculativeDecoder.for_models(family.base, other)
