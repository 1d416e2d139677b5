"""Chains whose tokens the C++ passes draw: from the right distributions, by the uniforms that they are given."""

import pytest
import torch
from torch import Tensor

from eda.backends.cpu.library import Sampling
from tests.support.drafting import Part, Rounds, draft_config, packed

pytestmark = pytest.mark.usefixtures("_needs_kernels")

NUM_STEPS = 4


def drawn(
    rounds: Rounds, parts: list[Part], temperatures: list[float], uniforms: Tensor
) -> tuple[Tensor, list[list[int]], Tensor]:
    """A round of one-token extensions: last outputs, chains and distributions."""
    features, tokens, batch = packed(parts)
    rows = [rounds.row(part, first_token=place, num_tokens=1) for place, part in enumerate(parts)]
    for row, temperature in zip(rows, temperatures, strict=True):
        row.sampling = Sampling(1.0, temperature)
    hidden, chains, probabilities = rounds.kernel.extend(rows, features, tokens, batch, [], uniforms)
    assert probabilities is not None
    return hidden, chains, probabilities


def expected_column(distribution: Tensor, uniform: float) -> int:
    cumulative = distribution.double().cumsum(0)
    return int((cumulative <= uniform * cumulative[-1]).sum())


def test_tokens_are_drawn_by_their_uniforms_from_the_softmax_at_the_row_s_temperature() -> None:
    rounds = Rounds(draft_config())
    temperatures = [1.0, 0.5, 0.0, 2.0]
    parts = [rounds.part(extent, 1, num_steps=NUM_STEPS) for extent in rounds.extents(4)]
    uniforms = torch.rand(4, NUM_STEPS, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    hidden, chains, probabilities = drawn(rounds, parts, temperatures, uniforms)
    for place, (part, temperature) in enumerate(zip(parts, temperatures, strict=True)):
        logits = rounds.step_logits(part, hidden[place], chains[place])
        columns = [int((rounds.narrow.draft_token_ids == token).nonzero()) for token in chains[place]]
        if temperature == 0.0:
            assert columns == logits.argmax(-1).tolist()
            continue
        distributions = (logits / temperature).softmax(-1)
        torch.testing.assert_close(probabilities[place, :NUM_STEPS], distributions, rtol=1e-4, atol=1e-6)
        for step, column in enumerate(columns):
            # The kernel's own distribution: at a border, rounding may choose either neighbour.
            assert column == expected_column(probabilities[place, step], float(uniforms[place, step]))


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_column(uniform: float) -> None:
    rounds = Rounds(draft_config())
    parts = [rounds.part(extent, 1, num_steps=1) for extent in rounds.extents(1)]
    uniforms = torch.full((1, 1), uniform, dtype=torch.float64)
    _, chains, _ = drawn(rounds, parts, [1.0], uniforms)
    ids = rounds.narrow.draft_token_ids.tolist()
    assert ids.index(chains[0][0]) == (0 if uniform == 0.0 else len(ids) - 1)
