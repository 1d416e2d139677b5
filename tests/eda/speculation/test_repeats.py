"""Earlier matches of the end of a text, against a search through the whole of it."""

import random
from collections.abc import Iterator

import pytest

from eda.speculation.repeats import (
    LONGEST_MATCH,
    PLACES_COMPARED,
    SHORTEST_MATCH,
    RepeatIndex,
    repeated,
)


def longest_match_by_search(text: list[int]) -> tuple[int, int]:
    """Looks at every place, the latest first, and compares token by token."""
    found, longest, seen = 0, 0, 0
    for place in range(len(text) - 1, SHORTEST_MATCH - 1, -1):
        if text[place - SHORTEST_MATCH : place] != text[-SHORTEST_MATCH:]:
            continue
        seen += 1
        length = next(
            (n for n in range(LONGEST_MATCH) if n >= place or text[place - 1 - n] != text[-1 - n]),
            LONGEST_MATCH,
        )
        if length > longest:
            found, longest = place, length
        if seen == PLACES_COMPARED:
            break
    return found, longest


def growing(seed: int) -> Iterator[list[int]]:
    """A text that grows by some tokens at a time, new ones and pieces of itself."""
    chance = random.Random(seed)
    width, text = chance.choice([2, 3, 8, 50]), [0]
    while len(text) < 300:
        if chance.random() < 0.3:
            start = chance.randrange(len(text))
            text += text[start : start + chance.randint(1, 60)]
        else:
            text += [chance.randrange(width) for _ in range(chance.randint(1, 9))]
        yield text


@pytest.mark.parametrize("seed", range(40))
def test_the_longest_match_is_that_of_a_search(seed: int) -> None:
    index, lengths = RepeatIndex(), []
    for text in growing(seed):
        index.read_on(text)
        found = index.longest_match(text)
        assert found == longest_match_by_search(text)
        lengths.append(found[1])
    assert max(lengths) >= 5
    assert index.num_entries <= 2 * len(text) + SHORTEST_MATCH


@pytest.mark.parametrize("text", [[], [1], [1, 1], [1, 2, 3, 4], [1, 2, 3, 2]])
def test_a_text_without_a_match_has_none(text: list[int]) -> None:
    index = RepeatIndex()
    index.read_on(text)
    assert index.longest_match(text) == (0, 0)


class Watched(list[int]):
    """Counts how often it is read."""

    num_reads = 0

    def __getitem__(self, key):  # type: ignore[no-untyped-def]
        self.num_reads += 1
        return super().__getitem__(key)


def test_only_new_tokens_are_read_however_long_the_text_is() -> None:
    reads = []
    for size in (1_000, 100_000):
        chance = random.Random(1)
        text, index = Watched(chance.randrange(20) for _ in range(size)), RepeatIndex()
        index.read_on(text)
        text.num_reads = 0
        text.extend([1, 2, 3])
        index.read_on(text)
        assert text.num_reads == 3
        index.longest_match(text)
        reads.append(text.num_reads)
    assert max(reads) <= 3 + 2 * LONGEST_MATCH * PLACES_COMPARED


@pytest.mark.parametrize(
    ("place", "length", "expected"),
    [(1, 3, [2, 3, 4]), (2, 7, [3, 4, 3, 4, 3, 4, 3]), (3, 2, [4, 4]), (1, 0, [])],
)
def test_a_text_goes_on_as_it_did_and_repeats_itself(place: int, length: int, expected: list[int]) -> None:
    assert repeated([1, 2, 3, 4], place, length) == expected
