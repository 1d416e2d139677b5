"""Greedy and seeded rows, log-probabilities, and what ``verify`` and ``Proposal`` refuse."""

import itertools
import random

import pytest
import torch
from torch import Tensor

from eda.sampling.draws import draft_scores, propose_chain_tokens
from eda.sampling.params import SamplingParams
from eda.sampling.processors import LogitsContext, TokenHistory, process_logits
from eda.speculation.proposal import Proposal
from eda.speculation.verification import TokenLogprobs, Verdict, VerificationRow, verify
from tests.support.markov import (
    Drafter,
    chain_drafter,
    chi_square_p_value,
    decode,
    exact_joint,
    no_drafter,
    random_table,
    tree_drafter,
)

GREEDY = SamplingParams(temperature=0.0)
VOCAB_SIZE = 40
TARGET = random_table(VOCAB_SIZE, seed=1)
DRAFT = TARGET + random_table(VOCAB_SIZE, seed=2)


def verify_one(logits: Tensor, proposal: Proposal | None, params: SamplingParams = GREEDY) -> Verdict:
    return verify(logits, [VerificationRow(params, proposal, None, 0, 1)], torch.Generator())[0]


def one_hot(*token_ids: int, vocab_size: int = 8) -> Tensor:
    """Logits whose argmax is the given token, one line each."""
    return torch.eye(vocab_size)[list(token_ids)]


# --- greedy -----------------------------------------------------------------------------------------------------


def test_plain_greedy_emits_the_argmax() -> None:
    assert verify_one(one_hot(5), None) == Verdict([5], [], None)


@pytest.mark.parametrize(
    ("drafted", "emitted"),
    [([1, 2, 3], [1, 2, 3, 4]), ([1, 2, 7], [1, 2, 3]), ([7, 2, 3], [1]), ([1, 7, 3], [1, 2])],
)
def test_greedy_chain_stops_at_the_first_mismatch(drafted: list[int], emitted: list[int]) -> None:
    verdict = verify_one(one_hot(1, 2, 3, 4), Proposal.chain(drafted))
    assert verdict == Verdict(emitted, list(range(1, len(emitted))), None)


def test_greedy_tree_follows_the_targets_branch() -> None:
    #        root -> 1:[4], 2:[5];  2 -> 3:[6], 4:[7];  4 -> 5:[0]
    proposal = Proposal([4, 5, 6, 7, 0], [0, 0, 2, 2, 4])
    logits = one_hot(5, 1, 7, 2, 0, 3)
    assert verify_one(logits, proposal) == Verdict([5, 7, 0, 3], [2, 4, 5], None)
    assert verify_one(one_hot(4, 1, 7, 2, 0, 3), proposal) == Verdict([4, 1], [1], None)


def test_ties_go_to_the_first_index() -> None:
    logits = torch.zeros(3, 6)
    logits[:, [2, 4]] = 1.0
    assert verify_one(logits, Proposal.chain([2, 4])).token_ids == [2, 2]


def test_of_equal_siblings_the_first_counts() -> None:
    proposal = Proposal([3, 3, 5], [0, 0, 2])
    assert verify_one(one_hot(3, 4, 5, 6), proposal).accepted_nodes == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_low_precision_logits(dtype: torch.dtype) -> None:
    assert verify_one(one_hot(1, 2, 3).to(dtype), Proposal.chain([1, 2])).token_ids == [1, 2, 3]


def greedy_text(params: SamplingParams, drafter: Drafter, length: int = 25) -> list[int]:
    """Greedy text of the Markov target with every processor at work, one step at a time."""
    history = TokenHistory([7, 3], VOCAB_SIZE, "cpu")
    output: list[int] = []
    while len(output) < length:
        proposal = drafter([([7, 3, *output])[-1]], torch.Generator().manual_seed(len(output)))[0]
        before = [[7, 3, *output][-1], *(proposal.token_ids if proposal else [])]
        row = VerificationRow(params, proposal, history, len(output), 2 + len(output))
        verdict = verify(TARGET[before], [row], torch.Generator())[0]
        output += verdict.token_ids
        history.append(verdict.token_ids)
    return output[:length]


def drafters_of_all_kinds() -> list[Drafter]:
    def random_chain(last: list[int], generator: torch.Generator) -> list[Proposal | None]:
        return [Proposal.chain(torch.randint(VOCAB_SIZE, (5,), generator=generator).tolist())]

    def sampled_chain(last: list[int], generator: torch.Generator) -> list[Proposal | None]:
        return chain_drafter(DRAFT, 4)([*last] * 5, generator)[4:]

    trees = [tree_drafter(DRAFT, children, depth) for children, depth in [(1, 1), (1, 6), (3, 2), (5, 2)]]
    return [random_chain, sampled_chain, tree_drafter(TARGET, 2, 3), *trees]


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(temperature=0.0, repetition_penalty=1.8),
        SamplingParams(temperature=0.0, presence_penalty=1.0, frequency_penalty=0.5),
        SamplingParams(
            temperature=0.0, logit_bias={5: 2.0, 6: 2.0}, min_tokens=12, stop_ids=tuple(range(20))
        ),
        SamplingParams(seed=5),
        SamplingParams(
            seed=6, temperature=0.7, top_p=0.9, repetition_penalty=1.3, min_tokens=9, stop_ids=(1, 2, 3)
        ),
    ],
)
def test_text_does_not_depend_on_the_draft(params: SamplingParams) -> None:
    """Greedy and seeded: no draft, and chains and trees of any length, give the same text."""
    expected = greedy_text(params, no_drafter)
    assert len(set(expected)) > 3
    for drafter in drafters_of_all_kinds():
        assert greedy_text(params, drafter) == expected


def test_min_tokens_and_penalties_count_the_drafted_path() -> None:
    """Inside a proposal the stop id is forbidden exactly until ``min_tokens``, wherever the step began."""
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0]).repeat(4, 1)
    params = SamplingParams(temperature=0.0, min_tokens=3, stop_ids=(0,))
    row = VerificationRow(params, Proposal.chain([1, 1, 1]), None, 1, 5)
    assert verify(logits, [row], torch.Generator())[0].token_ids == [1, 1, 0]

    history = TokenHistory([0], 4, "cpu")
    params = SamplingParams(temperature=0.0, frequency_penalty=1.5)
    row = VerificationRow(params, Proposal.chain([0, 1, 0]), history, 0, 1)
    # 3 2 1 0 -> takes 0; 1.5 2 1 0 -> takes 1; 1.5 0.5 1 0 -> takes 0; 0 0.5 1 0 -> takes 2.
    assert verify(logits, [row], torch.Generator())[0].token_ids == [0, 1, 0, 2]


# --- seeded -----------------------------------------------------------------------------------------------------


def test_seeded_text_does_not_depend_on_companions() -> None:
    rows, before = [], []
    for number, (seed, length) in enumerate(itertools.product([1, 2, None], [0, 2, 5])):
        params = SamplingParams(seed=seed, temperature=0.9, top_k=20 + number)
        rows.append(VerificationRow(params, Proposal.chain([3] * length), None, 0, 9))
        before.append([number] + [3] * length)
    rows.append(VerificationRow(GREEDY, Proposal.chain([1]), None, 0, 9))
    before.append([0, 1])
    together = verify(TARGET[list(itertools.chain(*before))], rows, torch.Generator())
    for row, tokens, verdict in zip(rows, before, together, strict=True):
        if not row.sampling.draws_freely:
            assert verify(TARGET[tokens], [row], torch.Generator())[0] == verdict


@pytest.mark.parametrize(
    "drafter", [no_drafter, chain_drafter(random_table(4, 3), 3), tree_drafter(random_table(4, 3), 2, 2)]
)
def test_over_many_seeds_the_text_has_the_targets_distribution(drafter: Drafter) -> None:
    table, params = random_table(4, 8), SamplingParams(temperature=0.8)
    decoding = decode(table, params, drafter, prompt=[1], length=2, num_sequences=1800, seeds=range(1800))
    assert chi_square_p_value(decoding.counts, exact_joint(table, params, [1], 2)) > 1e-3


def test_a_seeded_draft_agrees_more_often_than_an_independent_one() -> None:
    """With the target's noise the draft proposes the target's token nearly as often as is possible at all."""
    num = 400
    contexts = [LogitsContext(SamplingParams(seed=seed)) for seed in range(num)]
    unseeded = [LogitsContext(SamplingParams())] * num
    positions = [4] * num
    generator = torch.Generator().manual_seed(0)
    close = TARGET[:1] + 0.3 * random_table(VOCAB_SIZE, 9)[:1]
    rows = [VerificationRow(context.params, None, None, 0, 4) for context in contexts]
    targets = torch.tensor([v.token_ids[0] for v in verify(TARGET[:1].repeat(num, 1), rows, generator)])
    logits = close.repeat(num, 1)
    coupled, none = propose_chain_tokens(logits, contexts, positions, None, VOCAB_SIZE, generator)
    independent, probs = propose_chain_tokens(logits, unseeded, positions, None, VOCAB_SIZE, generator)
    assert none is None
    assert probs is not None
    best_possible = float(torch.minimum(close.softmax(-1), TARGET[:1].softmax(-1)).sum())
    assert float((coupled == targets).double().mean()) > best_possible - 0.1
    assert float((independent == targets).double().mean()) < 0.5 * best_possible


def test_identical_draft_and_target_always_agree_when_seeded() -> None:
    contexts = [LogitsContext(SamplingParams(seed=3, temperature=0.6, top_p=0.9))]
    token, _ = propose_chain_tokens(TARGET[:1], contexts, [11], None, VOCAB_SIZE, torch.Generator())
    row = VerificationRow(contexts[0].params, Proposal.chain(token.tolist()), None, 0, 11)
    assert verify(TARGET[[0, int(token)]], [row], torch.Generator())[0].accepted_nodes == [1]


# --- log-probabilities -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_logprobs", [0, 1, 4, 1000])
def test_logprobs_are_of_the_raw_logits_along_the_accepted_path(num_logprobs: int) -> None:
    params = SamplingParams(temperature=0.0, logit_bias={2: 3.0}, num_logprobs=num_logprobs)
    history = TokenHistory([1], VOCAB_SIZE, "cpu")
    # Grown from the processed logits, so that the walk goes deep and not along the first branch alone.
    contexts = [LogitsContext(params)] * VOCAB_SIZE
    drafter = tree_drafter(process_logits(TARGET, contexts), 2, 2)
    proposal = drafter([6], torch.Generator())[0]
    assert proposal is not None
    before = [6, *proposal.token_ids]
    verdict = verify(TARGET[before], [VerificationRow(params, proposal, history, 0, 1)], torch.Generator())[0]
    assert len(verdict.accepted_nodes) == 2
    assert verdict.logprobs is not None
    assert [entry.token_id for entry in verdict.logprobs] == verdict.token_ids
    for last, entry in zip([6, *verdict.token_ids], verdict.logprobs, strict=False):
        expected = TARGET[last].double().log_softmax(-1)
        assert entry.logprob == pytest.approx(float(expected[entry.token_id]), abs=1e-5)
        values, ids = expected.sort(descending=True)
        count = min(num_logprobs, VOCAB_SIZE)
        assert [token for token, _ in entry.top] == ids[:count].tolist()
        assert [value for _, value in entry.top] == pytest.approx(values[:count].tolist(), abs=1e-5)


def test_logprobs_of_a_batch_go_to_the_rows_that_want_them() -> None:
    counts = [None, 2, 0, None, 3]
    rows, before = [], []
    for index, count in enumerate(counts):
        temperature = 0.0 if index % 2 else 1.0
        params = SamplingParams(temperature=temperature, num_logprobs=count)
        rows.append(VerificationRow(params, Proposal.chain([index]), None, 0, 1))
        before += [index + 10, index]
    verdicts = verify(TARGET[before], rows, torch.Generator().manual_seed(0))
    for index, (count, verdict) in enumerate(zip(counts, verdicts, strict=True)):
        if count is None:
            assert verdict.logprobs is None
            continue
        assert verdict.logprobs is not None
        for last, token, entry in zip([index + 10, index], verdict.token_ids, verdict.logprobs, strict=False):
            assert isinstance(entry, TokenLogprobs)
            assert entry.token_id == token
            assert len(entry.top) == count
            assert entry.logprob == pytest.approx(float(TARGET[last].log_softmax(-1)[token]), abs=1e-5)


# --- proposals and wrong calls -----------------------------------------------------------------------------------


def test_proposal_knows_its_shape() -> None:
    tree = Proposal([4, 5, 6, 7, 0], [0, 0, 2, 2, 4])
    assert not tree.is_chain
    assert tree.depths() == [1, 1, 2, 2, 3]
    assert [tree.path(node) for node in range(6)] == [(), (4,), (5,), (5, 6), (5, 7), (5, 7, 0)]
    chain = Proposal.chain((8, 9))
    assert chain.is_chain
    assert (chain.token_ids, chain.parents, chain.depths(), len(chain)) == ([8, 9], [0, 1], [1, 2], 2)


def test_impossible_proposals_are_refused() -> None:
    with pytest.raises(ValueError, match="2 token ids and 1 parents"):
        Proposal([1, 2], [0])
    with pytest.raises(ValueError, match="parent of node 1 is 1; it must be between 0 and 0"):
        Proposal([1, 2], [1, 0])
    with pytest.raises(ValueError, match="parent of node 2 is -1"):
        Proposal([1, 2], [0, -1])
    with pytest.raises(ValueError, match="needs 2 rows"):
        Proposal.chain([1, 2], torch.zeros(3, 4))
    with pytest.raises(ValueError, match="only a chain"):
        Proposal([1, 2], [0, 0], torch.zeros(2, 4))


def test_wrong_calls_are_refused() -> None:
    row = VerificationRow(GREEDY, Proposal.chain([1, 2]), None, 0, 1)
    with pytest.raises(ValueError, match="logits have 2 lines; these 1 rows need 3"):
        verify(torch.zeros(2, 8), [row], torch.Generator())
    penalised = VerificationRow(SamplingParams(repetition_penalty=1.2), None, None, 0, 1)
    with pytest.raises(ValueError, match="history is None"):
        verify(torch.zeros(1, 8), [penalised], torch.Generator())


def test_an_empty_batch_has_no_verdicts() -> None:
    assert verify(torch.zeros(0, 8), [], torch.Generator()) == []


def test_random_trees_agree_with_plain_greedy_decoding() -> None:
    """Trees of every shape: what is emitted is a prefix of the greedy text, as long as the tree has it."""
    shuffle = random.Random(0)
    following = TARGET.argmax(-1).tolist()
    for _ in range(200):
        root = shuffle.randrange(VOCAB_SIZE)
        tokens: list[int] = []
        parents: list[int] = []
        for _ in range(shuffle.randrange(12)):
            parent = shuffle.randrange(len(tokens) + 1)
            last = tokens[parent - 1] if parent else root
            token = following[last] if shuffle.random() < 0.6 else shuffle.randrange(VOCAB_SIZE)
            if (parent, token) in zip(parents, tokens, strict=True):
                continue  # the second of two equal siblings would be left out
            tokens.append(token)
            parents.append(parent)
        verdict = verify_one(TARGET[[root, *tokens]], Proposal(tokens, parents))
        last = root
        for token in verdict.token_ids:
            assert token == following[last]
            last = token
        paths = {Proposal(tokens, parents).path(node) for node in range(len(tokens) + 1)}
        assert tuple(verdict.token_ids[:-1]) in paths
        assert tuple(verdict.token_ids) not in paths, "the tree goes further"


def test_draft_scores_of_a_greedy_row_rank_the_processed_logits() -> None:
    params = SamplingParams(temperature=0.0, logit_bias={3: 50.0})
    scores = draft_scores(DRAFT[:1], [LogitsContext(params)], [0], None, VOCAB_SIZE)
    assert scores.argmax() == 3
    assert float(scores.exp().sum()) == pytest.approx(1.0)
