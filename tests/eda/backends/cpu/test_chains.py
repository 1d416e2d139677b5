"""Chains that the C++ passes draft in one call against passes for each of their tokens."""

import math

import pytest
import torch

from tests.support.drafting import Part, Rounds, draft_config
from tests.support.narrow import narrow_module

pytestmark = pytest.mark.usefixtures("_needs_kernels")

LENGTHS = (5, 0, 1, 7, 3, 0, 4, 2)


@pytest.fixture
def rounds() -> Rounds:
    return Rounds(draft_config())


def mixed_parts(rounds: Rounds, num_steps: tuple[int, ...]) -> list[Part]:
    modules = [
        None,
        narrow_module(rounds.config.private_config(20, 3, 4), 1),
        narrow_module(rounds.config.private_config(70, 0), 2),
        narrow_module(rounds.config.private_config(0, 0, 5), 3),
    ]
    return [
        rounds.part(extent, 3 + place, modules[place % 4], steps)
        for place, (extent, steps) in enumerate(
            zip(rounds.extents(len(num_steps), 30), num_steps, strict=True)
        )
    ]


def test_chains_are_the_likeliest_tokens_step_by_step(rounds: Rounds) -> None:
    parts = mixed_parts(rounds, LENGTHS)
    hidden, chains = rounds.extend(parts)
    assert [len(chain) for chain in chains] == list(LENGTHS)
    drafted = []
    for part, start, chain in zip(parts, hidden, chains, strict=True):
        if chain:
            logits = rounds.step_logits(part, start, chain)
            assert rounds.narrow.draft_token_ids[logits.argmax(-1)].tolist() == chain
            drafted += chain
    assert len(set(drafted)) > 5


def test_a_chain_does_not_depend_on_its_neighbours(rounds: Rounds) -> None:
    parts = mixed_parts(rounds, LENGTHS)
    _, together = rounds.extend(parts)
    for part, chain in zip(parts, together, strict=True):
        assert rounds.extend([part])[1] == [chain]


def test_a_shorter_chain_is_the_beginning_of_a_longer_one(rounds: Rounds) -> None:
    parts = mixed_parts(rounds, (8,) * 4)
    _, longest = rounds.extend(parts)
    for part in parts:
        part.num_steps = 3
    assert rounds.extend(parts)[1] == [chain[:3] for chain in longest]
    for part in parts:
        part.num_steps = 0
    assert rounds.extend(parts)[1] == [[]] * 4


def test_chains_end_behind_the_token_that_makes_them_too_unlikely(rounds: Rounds) -> None:
    parts = mixed_parts(rounds, (6,) * 8)
    hidden, full = rounds.extend(parts)
    joint = []
    for part, start, chain in zip(parts, hidden, full, strict=True):
        steps = rounds.step_logits(part, start, chain).log_softmax(-1).max(-1).values
        joint.append(steps.cumsum(0).exp().tolist())
    for length in range(1, 7):
        for part, reached in zip(parts, joint, strict=True):
            # Between what the token before and this one reach, so that rounding decides nothing.
            before = reached[length - 2] if length > 1 else 1.0
            part.min_probability = math.sqrt(before * reached[length - 1])
        assert rounds.extend(parts)[1] == [chain[:length] for chain in full]
    parts[0].min_probability, parts[1].min_probability = 1.0, 0.0
    _, chains = rounds.extend(parts[:2])
    assert chains == [full[0][:1], full[1]]


def test_drafting_leaves_the_extended_cache_as_it_was(rounds: Rounds) -> None:
    parts = mixed_parts(rounds, (0,) * 3)
    expected = rounds.extend(parts)[0]
    known = [
        (rounds.cache.keys[:, :, part.extent.start : part.extent.start + part.count].clone())
        for part in parts
    ]
    for part in parts:
        part.num_steps = 8
    hidden = rounds.extend(parts)[0]
    assert torch.equal(hidden, expected)
    for part, keys in zip(parts, known, strict=True):
        found = rounds.cache.keys[:, :, part.extent.start : part.extent.start + part.count]
        assert torch.equal(found, keys)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_drawn_tokens_invert_the_drafts_own_distributions(rounds: Rounds, temperature: float) -> None:
    parts = mixed_parts(rounds, LENGTHS)
    greedy = rounds.extend(parts)[1]
    for part in parts[::2]:  # drawn and likeliest tokens in one call
        part.temperature = temperature
    uniforms = torch.rand(
        len(parts), max(LENGTHS), dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    uniforms[0, :2] = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    hidden, chains, probabilities = rounds.draw(parts, uniforms)
    assert probabilities is not None
    assert [len(chain) for chain in chains] == list(LENGTHS)
    for place, (part, chain) in enumerate(zip(parts, chains, strict=True)):
        if part.temperature == 0.0:
            assert chain == greedy[place]
        elif chain:
            expected = (rounds.step_logits(part, hidden[place], chain) / temperature).softmax(-1)
            found = probabilities[place, : len(chain)]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
            columns = torch.searchsorted(rounds.narrow.draft_token_ids, torch.tensor(chain))
            ends = found.double().cumsum(-1)
            above = ends.gather(1, columns[:, None])[:, 0]
            below = above - found.double().gather(1, columns[:, None])[:, 0]
            wanted = uniforms[place, : len(chain)]
            assert ((below - 1e-6 <= wanted) & (wanted <= above + 1e-6)).all()
            assert (found.gather(1, columns[:, None]) > 0).all()
