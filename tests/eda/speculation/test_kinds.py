"""Kinds of speculation: what they refuse, the slots that they take, and how long a draft may be."""

import pytest

from eda.speculation.kinds import Chain, Lookup, Off, Speculation, Tree


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Chain(-1), "length is -1; it must be 0 or more"),
        (lambda: Chain(2, min_probability=1.0), "min_probability is 1.0; it must be from 0 to below 1"),
        (lambda: Lookup(-1), "length is -1; it must be 0 or more"),
        (lambda: Tree(0), "depth is 0; it must be at least 1"),
        (lambda: Tree(2, top_k=0), "top_k is 0; it must be at least 1"),
        (lambda: Tree(2, num_nodes=0), "num_nodes is 0; it must be at least 1"),
    ],
)
def test_impossible_drafts_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_slots_hold_every_drafted_token_and_the_last_known_one() -> None:
    assert (Off().slots, Chain(4).slots, Lookup(4).slots) == (0, 5, 5)
    assert Tree(3, top_k=4, num_nodes=8).slots == 13
    assert Tree(3, top_k=2, num_nodes=8).slots == 9


@pytest.mark.parametrize(
    ("kind", "num_tokens", "num_slots", "expected"),
    [
        (Chain(4), 10, 10, 4),
        (Chain(4), 2, 10, 2),
        (Chain(4), 10, 3, 2),
        (Chain(4), 10, 0, 0),
        (Chain(0), 10, 10, 0),
        (Tree(3, 2, 4), 10, 7, 3),
        (Tree(3, 2, 4), 2, 7, 2),
        (Tree(3, 2, 4), 10, 6, 0),
        (Tree(3, 2, 4), -1, 7, 0),
        (Lookup(4), 10, 10, 4),
        (Lookup(4), 2, 10, 2),
        (Lookup(4), 10, 3, 2),
        (Lookup(0), 10, 10, 0),
        (Off(), 10, 10, 0),
    ],
)
def test_a_chain_is_cut_to_what_fits_and_a_tree_is_whole_or_not_at_all(
    kind: Speculation, num_tokens: int, num_slots: int, expected: int
) -> None:
    assert kind.fitting(num_tokens, num_slots) == expected
