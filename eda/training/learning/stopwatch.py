"""What a run spends where: every moment belongs to one part, so the parts add up to the whole."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Literal

import torch

Part = Literal[
    "target_states",
    "draft_forward",
    "loss",
    "backward",
    "optimizer",
    "evaluation",
    "saving",
    "reporting",
    "other",
]


class Stopwatch:
    """Runs from its creation. A part inside another interrupts it; time in no part is "other".

    Args:
        device: a GPU works behind Python's back, so it is waited for whenever the part changes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[Part] = ["other"]
        self._since = perf_counter()

    def add(self, earlier: Mapping[str, float]) -> None:
        """Adds the seconds of a run that this one continues."""
        for name, seconds in earlier.items():
            self._seconds[name] += seconds

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Charges the block to ``name``."""
        self._lap()
        self._open.append(name)
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds of each part up to now."""
        self._lap()
        return dict(self._seconds)

    def _lap(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = perf_counter()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now


def in_words(seconds: Mapping[str, float]) -> str:
    """Parts from 1% of the time on, largest first: ``"loss 6.0 s (60%), ..."``."""
    total = sum(seconds.values())
    largest = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(
        f"{name.replace('_', ' ')} {spent:.1f} s ({spent / total:.0%})"
        for name, spent in largest
        if spent >= 0.01 * total
    )
