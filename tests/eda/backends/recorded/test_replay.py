"""The recordings themselves: how many, for how long, and what happens when one cannot be made."""

import gc
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from eda.backends.loading import load_fine_tune
from eda.backends.recorded.replay import MAX_FAILURES, GraphCache, Replay, RerunBackend, _check_same
from eda.decoder import SpeculativeDecoder
from tests.support.graph_decoding import (
    CHAIN,
    PLAIN,
    TREE,
    Case,
    decode,
    expected_texts,
    random_cases,
    random_private,
    recording,
)
from tests.support.reference_family import Family


class Owner:
    """Something that holds weights."""


class Counting(RerunBackend):
    """Counts recordings; ``error`` makes the next ones fail."""

    def __init__(self, error: RuntimeError | None = None) -> None:
        self.asked = 0
        self.error = error

    def capture(self, function: Callable[[], None], outputs: Sequence[Tensor]) -> Replay:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return super().capture(function, outputs)


def nothing() -> tuple[Callable[[], None], Sequence[Tensor]]:
    return (lambda: None), ()


def use(graphs: GraphCache, kind: str, *owners: object) -> bool:
    key = graphs.key(kind, (1,), owners)
    return graphs.wants(key) and graphs.run(key, nothing)


def test_the_longest_unused_recording_goes_first() -> None:
    owner = Owner()
    graphs = recording(max_graphs=2)
    for kind in ("a", "b", "a", "c"):
        assert use(graphs, kind, owner)
    assert [key.kind for key in graphs.keys()] == ["a", "c"]  # noqa: SIM118 (not a mapping)
    assert (graphs.stats.captured, graphs.stats.replayed, graphs.stats.dropped) == (3, 1, 1)


def test_a_shape_is_recorded_when_it_has_come_up_often_enough() -> None:
    owner = Owner()
    graphs = recording(capture_after=3)
    assert [use(graphs, "a", owner) for _ in range(4)] == [False, False, True, True]
    assert graphs.lacks(graphs.key("b", (1,), (owner,)))
    assert not graphs.lacks(graphs.key("a", (1,), (owner,)))


def test_recordings_go_with_whatever_they_are_for() -> None:
    first, second, private = Owner(), Owner(), Owner()
    graphs = recording()
    assert use(graphs, "a", first, None)
    assert use(graphs, "a", None, first), "the same owner in another role is another key"
    assert use(graphs, "a", second, private)
    del private
    gc.collect()
    assert use(graphs, "a", first, None)
    assert len(graphs) == 2
    del first
    gc.collect()
    assert use(graphs, "b", second)
    assert [key.kind for key in graphs.keys()] == ["b"]  # noqa: SIM118 (not a mapping)
    assert graphs.stats.dropped == 3


def test_an_unloaded_fine_tune_and_private_module_are_freed_with_their_recordings(family: Family) -> None:
    """Recordings keep neither a LoRA nor a private module nor a full fine-tune alive."""
    graphs = recording()
    decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=256, graphs=graphs)
    decode(decoder, family, random_cases(family, ["base"], 1, seed=1), 8)
    kept = len(graphs)
    for name in ("code", "math", "medical"):
        family.fine_tunes["passing"] = load_fine_tune(family.paths[name], family.base, "passing")
        private = random_private(family.draft, 1)
        watched: list[weakref.ref[Any]] = [weakref.ref(private)]
        fine_tune = family.fine_tunes["passing"]
        watched.append(weakref.ref(fine_tune.model if fine_tune.lora is None else fine_tune.lora))
        decode(decoder, family, [Case("passing", [1, 2, 3], private, CHAIN)], 8)
        assert len(graphs) > kept
        del private, fine_tune, family.fine_tunes["passing"]
        gc.collect()
        assert [reference() for reference in watched] == [None, None]
        decode(decoder, family, random_cases(family, ["base"], 1, seed=1), 4)
        assert len(graphs) <= kept + 2, "the base's own, and no others"
        assert all(owner() is not None for key in graphs.keys() for owner in key.owners)  # noqa: SIM118
        kept = len(graphs)


def test_what_cannot_be_recorded_runs_operation_by_operation(
    family: Family, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning that names the reason, and no further tries at every step."""
    backend = Counting(RuntimeError("operation not permitted when stream is capturing\nmore lines"))
    graphs = recording(backend)
    cases = random_cases(family, ["base"], 6, seed=4)
    for case, speculation in zip(cases, [PLAIN, CHAIN, TREE] * 2, strict=True):
        case.speculation = speculation
    decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=256, graphs=graphs)
    with caplog.at_level(logging.WARNING):
        outputs = decode(decoder, family, cases, 16)
    assert outputs == expected_texts(family, cases, 16)
    assert graphs.is_off
    assert MAX_FAILURES <= backend.asked <= MAX_FAILURES + 3, (
        "a step that is under way may try its other passes"
    )
    [record] = [record for record in caplog.records if record.name == "eda.backends.recorded.replay"]
    assert record.getMessage().endswith("operation not permitted when stream is capturing")


def test_one_failure_spoils_one_shape_only(family: Family) -> None:
    """A shape that failed is left alone; others are recorded."""
    backend = Counting()
    graphs = recording(backend)
    owner = Owner()
    backend.error = RuntimeError("out of memory")
    assert not use(graphs, "a", owner)
    backend.error = None
    assert not use(graphs, "a", owner)
    assert use(graphs, "b", owner)
    assert not graphs.is_off
    assert backend.asked == 2


def test_a_failure_in_the_middle_of_a_recording_leaves_nothing_behind(family: Family) -> None:
    """The function has written half of its results before it fails; the step is computed again and is right."""

    class Late(Counting):
        def capture(self, function: Callable[[], None], outputs: Sequence[Tensor]) -> Replay:
            function()
            for output in outputs:
                output.zero_()
            return super().capture(function, outputs)

    cases = random_cases(family, ["code"], 3, seed=6)
    decoder = SpeculativeDecoder.for_models(
        family.base, family.draft, num_slots=256, graphs=recording(Late(RuntimeError("late")))
    )
    assert decode(decoder, family, cases, 16) == expected_texts(family, cases, 16)


def test_errors_that_are_no_refusals_are_not_swallowed() -> None:
    class Broken(RerunBackend):
        def capture(self, function: Callable[[], None], outputs: Sequence[Tensor]) -> Replay:
            raise ValueError("a mistake in the program")

    with pytest.raises(ValueError, match="a mistake"):
        use(recording(Broken()), "a", Owner())


def test_a_replay_that_gives_other_values_is_refused() -> None:
    values = torch.tensor([1.0, float("nan"), 100.0, float("-inf")])
    _check_same([values], [values + 0.5])
    _check_same([torch.zeros(0)], [torch.zeros(0)])
    for other in (values + 3.0, torch.tensor([1.0, 2.0, 100.0, float("-inf")])):
        with pytest.raises(RuntimeError, match="other values than the function itself in output 0"):
            _check_same([values], [other])


def test_few_recordings_serve_many_shapes_by_turns(family: Family) -> None:
    """With room for three recordings every step drops some, and the text stays."""
    cases = random_cases(family, ["base", "code"], 8, seed=9)
    graphs = recording(max_graphs=3)
    decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=512, graphs=graphs)
    assert decode(decoder, family, cases, 16, batch_size=3) == expected_texts(family, cases, 16)
    assert len(graphs) == 3
    assert graphs.stats.dropped > 3
