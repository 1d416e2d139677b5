"""Every moment belongs to one part."""

import pytest
import torch

from eda.training.learning import stopwatch
from eda.training.learning.stopwatch import Stopwatch, in_words


def test_a_part_interrupts_the_one_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # A look at the clock: at the start, at both ends of each part, and at the end.
    times = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 63.0, 127.0])
    monkeypatch.setattr(stopwatch, "perf_counter", lambda: next(times))
    watch = Stopwatch(torch.device("cpu"))
    with watch.part("evaluation"), watch.part("target_states"):
        pass
    with pytest.raises(KeyError), watch.part("loss"):
        raise KeyError
    watch.add({"loss": 100.0, "saving": 1.0})
    assert watch.seconds() == {
        "other": (1.0 - 0.0) + (31.0 - 15.0) + (127.0 - 63.0),
        "evaluation": (3.0 - 1.0) + (15.0 - 7.0),
        "target_states": 7.0 - 3.0,
        "loss": 100.0 + (63.0 - 31.0),
        "saving": 1.0,
    }


def test_words_name_the_largest_part_first() -> None:
    seconds = {"draft_forward": 3.0, "loss": 6.95, "other": 0.05}
    assert in_words(seconds) == "loss 7.0 s (70%), draft forward 3.0 s (30%)"
    assert in_words({}) == ""
