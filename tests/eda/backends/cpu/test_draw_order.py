"""The order of random draws is part of what a seed of the server means: rows that C++ verifies draw first."""

import pytest
import torch

from eda.backends.cpu.verifier import CpuVerifier, can_verify
from eda.backends.eager.verifier import RulesVerifier
from eda.sampling.params import SamplingParams
from eda.speculation.proposal import Proposal
from eda.speculation.verification import VerificationRow
from tests.support.markov import lines_of

pytestmark = pytest.mark.usefixtures("_needs_kernels")

WIDTH = 24
PLAIN, BIASED = SamplingParams(), SamplingParams(logit_bias={2: 1.0})


def mixed_rows() -> list[VerificationRow]:
    """Drawn chains, a drawn row without a draft, a tree, an edited row with and without a chain, a greedy one."""
    generator = torch.Generator().manual_seed(1)

    def chain(length: int) -> Proposal:
        probs = torch.randn(length, WIDTH, generator=generator).softmax(-1)
        return Proposal.chain(torch.multinomial(probs, 1, generator=generator)[:, 0].tolist(), probs)

    settings = [
        (BIASED, chain(2)),
        (PLAIN, chain(3)),
        (SamplingParams(temperature=0.0), Proposal.chain([1, 2])),
        (PLAIN, Proposal([3, 1, 2], [0, 0, 1])),
        (SamplingParams(temperature=0.5, top_p=0.9), chain(2)),
        (BIASED, None),
        (PLAIN, None),
    ]
    return [VerificationRow(params, proposal, None, 0, 1) for params, proposal in settings]


@pytest.mark.parametrize("seed", range(20))
def test_covered_rows_draw_before_the_others_and_each_kind_in_row_order(seed: int) -> None:
    rows = mixed_rows()
    num_lines = sum(row.num_lines for row in rows)
    logits = torch.randn(num_lines, WIDTH, generator=torch.Generator().manual_seed(seed + 100))
    generator = torch.Generator().manual_seed(seed)
    found = CpuVerifier(RulesVerifier(generator), generator).verify(rows, lines_of(logits, rows))

    # The same again, one kind after the other, from a generator that each kind finds where the last one left it.
    apart = torch.Generator().manual_seed(seed)
    rules, verdicts, lines = RulesVerifier(apart), {}, lines_of(logits, rows)
    covered = [can_verify(row.sampling, row.proposal) for row in rows]
    assert covered == [False, True, False, False, True, False, True]
    for wanted, verifier in ((True, CpuVerifier(rules, apart)), (False, rules)):
        places = [place for place, is_covered in enumerate(covered) if is_covered is wanted]
        part = verifier.verify([rows[place] for place in places], [lines[place] for place in places])
        verdicts.update(zip(places, part, strict=True))
    assert found == [verdicts[place] for place in range(len(rows))]
    assert torch.equal(generator.get_state(), apart.get_state())


def test_how_many_numbers_a_step_draws() -> None:
    """Covered rows: one for each node and one for each row. Others: the same for those that are drawn."""
    rows = mixed_rows()
    logits = torch.randn(sum(row.num_lines for row in rows), WIDTH)
    generator, counted = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    CpuVerifier(RulesVerifier(generator), generator).verify(rows, lines_of(logits, rows))
    for count in ((3 + 2) + 3, 2 + 3, 3):
        torch.rand(count, dtype=torch.float64, generator=counted)
    assert torch.equal(generator.get_state(), counted.get_state())
