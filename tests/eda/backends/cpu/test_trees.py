"""Trees that the C++ passes draft in one call against the generic way, level by level."""

from collections.abc import Iterator

import pytest
import torch

from eda.backends.cpu.drafter import CpuDraftLayer
from eda.backends.drafting import Reading
from eda.decoder import ScheduledRow, SpeculativeDecoder
from eda.sampling.params import SamplingParams
from eda.speculation.kinds import Tree
from eda.speculation.proposal import Proposal
from eda.speculation.sequence import SequenceState
from tests.support.backends import eager_proposer_of, layer_of, proposer_of
from tests.support.narrow import VOCAB_SIZE, NarrowFamily, make_narrow_family
from tests.support.passes import random_tokens

pytestmark = pytest.mark.usefixtures("_needs_kernels")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> NarrowFamily:
    return make_narrow_family(tmp_path_factory.mktemp("family"))


def states_of(family: NarrowFamily, decoder: SpeculativeDecoder, count: int) -> list[SequenceState]:
    """Sequences right after their prompts, with features that the draft has not read."""
    names = list(family.fine_tunes)
    states = [
        SequenceState(
            token_ids=random_tokens(2 + 3 * place, place, VOCAB_SIZE),
            max_length=80,
            fine_tune=family.fine_tunes[names[place % 3]],
            sampling=SamplingParams(temperature=0.0),
            private=family.modules[place // 2 % 3],
            speculation=Tree(8, top_k=6),
        )
        for place in range(count)
    ]
    for state in states:
        decoder.admit(state)
    decoder.step([ScheduledRow(state, state.num_uncomputed) for state in states])
    return states


def paths_of(proposal: Proposal) -> set[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(proposal.token_ids, proposal.parents, strict=True):
        paths.append((*paths[parent], token))
    assert len(set(paths)) == len(paths)
    return set(paths)


@pytest.fixture(scope="module")
def drafted(family: NarrowFamily) -> Iterator[tuple[SpeculativeDecoder, list[SequenceState], torch.Tensor]]:
    decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=2048)
    states = states_of(family, decoder, 12)
    with torch.inference_mode():
        hidden = proposer_of(decoder).extend(Reading.of(states))
        yield decoder, states, hidden


@pytest.mark.parametrize(
    ("top_k", "depth", "num_nodes"),
    [(4, 5, 16), (3, 3, 8), (1, 4, 9), (5, 1, 3), (6, 4, 200), (2, 8, 10), (4, 3, 1)],
)
def test_trees_are_those_of_the_generic_way(
    drafted: tuple[SpeculativeDecoder, list[SequenceState], torch.Tensor],
    top_k: int,
    depth: int,
    num_nodes: int,
) -> None:
    decoder, states, hidden = drafted
    proposer = proposer_of(decoder)
    shape = {"top_k": top_k, "depth": depth, "num_nodes": num_nodes}
    found = proposer.propose_trees(states, hidden, **shape)
    expected = eager_proposer_of(decoder).propose_trees(states, hidden, **shape)
    sizes = {len(proposal.token_ids) for proposal in found}
    assert sizes == {min(num_nodes, top_k + top_k * top_k * (depth - 1))}
    for ours, theirs in zip(found, expected, strict=True):
        assert all(parent <= place for place, parent in enumerate(ours.parents))
        assert paths_of(ours) == paths_of(theirs)


def test_a_tree_of_one_child_is_the_chain(
    drafted: tuple[SpeculativeDecoder, list[SequenceState], torch.Tensor],
) -> None:
    decoder, states, hidden = drafted
    trees = proposer_of(decoder).propose_trees(states, hidden, top_k=1, depth=6, num_nodes=6)
    chains = proposer_of(decoder).propose_chains(states, hidden, [6] * len(states))
    assert [tree.token_ids for tree in trees] == [chain.token_ids for chain in chains]
    assert all(tree.is_chain for tree in trees)


def test_a_row_has_the_same_tree_alone(
    drafted: tuple[SpeculativeDecoder, list[SequenceState], torch.Tensor],
) -> None:
    decoder, states, hidden = drafted
    together = proposer_of(decoder).propose_trees(states, hidden, top_k=4, depth=4, num_nodes=12)
    for place, state in enumerate(states):
        [alone] = proposer_of(decoder).propose_trees(
            [state], hidden[place : place + 1], top_k=4, depth=4, num_nodes=12
        )
        assert (alone.token_ids, alone.parents) == (together[place].token_ids, together[place].parents)


def test_chains_in_the_call_of_the_extension_are_those_of_the_generic_way(family: NarrowFamily) -> None:
    decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=2048)
    states = states_of(family, decoder, 12)
    lengths = [5, 0, 3, 1, 7, 7, 2, 0, 4, 6, 1, 5]
    layer, reading = layer_of(decoder), Reading.of(states)
    assert isinstance(layer, CpuDraftLayer)
    with torch.inference_mode():
        chains = layer.extend_and_draft(reading, lengths)
        hidden = proposer_of(decoder).extend(reading)
        expected = proposer_of(decoder).propose_chains(states, hidden, lengths)
    assert [chain.token_ids for chain in chains] == [chain.token_ids for chain in expected]
    assert [len(chain.token_ids) for chain in chains] == lengths


def test_near_greedy_sampling_grows_the_greedy_tree(
    drafted: tuple[SpeculativeDecoder, list[SequenceState], torch.Tensor],
) -> None:
    decoder, states, hidden = drafted
    shape = {"top_k": 4, "depth": 4, "num_nodes": 12}
    settings = [SamplingParams(top_k=1), SamplingParams(temperature=0.1), SamplingParams(temperature=0.0)]
    trees = []
    for sampling in settings:
        for state in states:
            state.sampling = sampling
        trees.append(proposer_of(decoder).propose_trees(states, hidden, **shape))
    *nearly, greedy = [[paths_of(proposal) for proposal in tree] for tree in trees]
    assert nearly == [greedy, greedy]
