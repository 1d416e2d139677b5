"""Where the last tokens of a text stood before, kept up to date as the text grows."""

from collections.abc import Sequence

SHORTEST_MATCH = 2
"""Tokens that must have stood together before. One alone says too little about what follows it."""

LONGEST_MATCH = 32
"""Tokens that are compared; a longer match tells no more."""

PLACES_COMPARED = 16
"""Earlier places of the last tokens that are looked at, the latest first."""


class RepeatIndex:
    """Finds the longest earlier match of the end of a growing text, by hash chains as deflate does (RFC 1951, part 4).

    Each place points to the one before it that ends with the same ``SHORTEST_MATCH`` tokens, and a dictionary to the
    last one. A new token costs one entry in each, and a search looks at ``PLACES_COMPARED`` places however long the
    text is.
    """

    def __init__(self) -> None:
        self._latest: dict[tuple[int, ...], int] = {}
        self._earlier = [0] * SHORTEST_MATCH
        """By place, the number of tokens before it: the place before with the same last tokens; 0 for none."""

    def read_on(self, text: Sequence[int]) -> None:
        """Takes in what ``text`` has more than when it was read last."""
        for place in range(len(self._earlier), len(text) + 1):
            last = tuple(text[place - SHORTEST_MATCH : place])
            self._earlier.append(self._latest.get(last, 0))
            self._latest[last] = place

    def longest_match(self, text: Sequence[int]) -> tuple[int, int]:
        """The place behind the longest earlier match of the end of ``text``, which was read, and that match's length.

        Of matches that are equally long, the latest; (0, 0) where there is none.
        """
        end = len(text)
        place = self._earlier[end] if end >= SHORTEST_MATCH else 0
        found, longest = 0, 0
        for _ in range(PLACES_COMPARED):
            if not place or longest == LONGEST_MATCH:
                break
            length = SHORTEST_MATCH
            limit = min(LONGEST_MATCH, place)
            while length < limit and text[place - length - 1] == text[end - length - 1]:
                length += 1
            if length > longest:
                found, longest = place, length
            place = self._earlier[place]
        return found, longest

    @property
    def num_entries(self) -> int:
        """How much it holds: at most two for each token that was read."""
        return len(self._latest) + len(self._earlier)


def repeated(text: Sequence[int], place: int, length: int) -> list[int]:
    """The ``length`` tokens behind ``place``, over and over where there are fewer: a text that repeats goes on so."""
    period = len(text) - place
    return [text[place + number % period] for number in range(length)]
