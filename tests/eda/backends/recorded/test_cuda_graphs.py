"""The backend of CUDA graphs: its calls in order, without a GPU; and real graphs where there is one."""

import inspect
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eda.backends.loading import load_fine_tune, load_target
from eda.backends.recorded.replay import CudaGraphBackend, GraphCache
from eda.decoder import SpeculativeDecoder
from eda.formats.weight_settings import WeightSetting
from eda.models.draft import DraftModel
from eda.models.fine_tune import FineTune
from eda.speculation.kinds import Speculation
from eda.speculation.sequence import SequenceState
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

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class FakeCuda:
    """Stands for ``torch.cuda``: writes down what is asked of it. In a capture nothing runs, as on a GPU."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.capturing = False
        self.runs: Callable[[], object] = lambda: None
        outer = self

        class Stream:
            def __init__(self, device: object = None) -> None:
                outer.calls.append("new stream")

            def wait_stream(self, other: object) -> None:
                outer.calls.append("wait")

        class CUDAGraph:
            def replay(self) -> None:
                outer.calls.append("replay")
                outer.runs()

        self.Stream, self.CUDAGraph = Stream, CUDAGraph
        self._current = SimpleNamespace(wait_stream=lambda other: self.calls.append("wait"))

    @contextmanager
    def device(self, device: object) -> Iterator[None]:
        yield

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        self.calls.append("side stream")
        yield
        self.calls.append("back")

    @contextmanager
    def graph(self, graph: object, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.calls.append(f"capture in {pool}")
        self.capturing = True
        yield
        self.capturing = False
        self.calls.append("captured")

    def graph_pool_handle(self) -> str:
        self.calls.append("new pool")
        return "pool"

    def current_stream(self, device: object) -> object:
        return self._current


def test_a_recording_is_warmed_up_aside_captured_replayed_and_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda()
    for name in ("device", "stream", "graph", "graph_pool_handle", "current_stream", "Stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    given, output = torch.tensor([1.0, 2.0]), torch.zeros(2)

    def function() -> None:
        if not cuda.capturing:
            output.copy_(given * 2)

    cuda.runs = function
    backend = CudaGraphBackend(torch.device("cuda", 0))
    replay = backend.capture(function, [output])
    aside = ["wait", "side stream", "back", "wait"]
    assert cuda.calls == ["new pool", "new stream", *aside, "capture in pool", "captured", "replay"]
    given.fill_(5.0)
    replay()
    assert output.tolist() == [10.0, 10.0]
    cuda.calls.clear()
    backend.capture(function, [output])
    assert cuda.calls == [*aside, "capture in pool", "captured", "replay"], "pool and stream are shared"
    cuda.runs = output.zero_
    with pytest.raises(RuntimeError, match="other values than the function itself"):
        backend.capture(function, [output])


def test_the_installed_torch_takes_the_arguments() -> None:
    parameters = inspect.signature(torch.cuda.graph.__init__).parameters
    assert {"pool", "stream", "capture_error_mode"} <= set(parameters)


def on_gpu(family: Family, weights: WeightSetting = "float32") -> Family:
    """The same family on the GPU."""
    base = load_target(family.paths["base"], weights=weights, device="cuda")
    fine_tunes = {"base": FineTune("base", base)}
    fine_tunes |= {
        name: load_fine_tune(family.paths[name], base, name) for name in ("math", "code", "medical")
    }
    draft = DraftModel.load(family.paths["draft"], dtype=base.dtype, device=torch.device("cuda"))
    return Family(family.paths, base, fine_tunes, draft)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("speculation", [PLAIN, CHAIN, TREE], ids=["plain", "chain", "tree"])
@pytest.mark.parametrize("model", ["base", "math", "code", "medical"])
def test_cuda_graphs_give_the_reference_text(family: Family, model: str, speculation: Speculation) -> None:
    there = on_gpu(family)
    private = random_private(there.draft, 4)
    cases = random_cases(family, [model], 6, seed=1)
    for case in cases:
        case.private, case.speculation = private, speculation
    expected = expected_texts(family, cases, 20)
    for batch_size in (1, 3):
        graphs = recording(CudaGraphBackend(there.base.device))
        decoder = SpeculativeDecoder.for_models(there.base, there.draft, num_slots=256, graphs=graphs)
        assert decode(decoder, there, cases, 20, batch_size=batch_size) == expected
        assert graphs.stats.failed == graphs.stats.declined == 0
        assert graphs.stats.replayed > graphs.stats.captured


@pytest.mark.gpu
@needs_gpu
def test_cuda_graphs_in_mixed_batches_and_with_few_of_them(family: Family) -> None:
    there = on_gpu(family)
    rng = random.Random(2)
    cases = random_cases(family, ["base", "math", "code", "medical"], 60, seed=3)
    privates = [None, *(random_private(there.draft, seed) for seed in range(2))]
    for case in cases:
        case.private, case.speculation = rng.choice(privates), rng.choice([PLAIN, CHAIN, TREE])
    graphs = recording(CudaGraphBackend(there.base.device), max_graphs=8)
    decoder = SpeculativeDecoder.for_models(there.base, there.draft, num_slots=1024, graphs=graphs)
    assert decode(decoder, there, cases, 12, batch_size=5, prefill_chunk=5) == expected_texts(
        family, cases, 12
    )
    assert graphs.stats.failed == 0


@pytest.mark.gpu
@needs_gpu
def test_no_step_waits_but_to_read_drafted_and_accepted_tokens(family: Family) -> None:
    """torch's own watch on waits: reads are allowed in one place each, so a step warns at most twice."""
    there = on_gpu(family)
    graphs = GraphCache(CudaGraphBackend(there.base.device), capture_after=1)
    decoder = SpeculativeDecoder.for_models(there.base, there.draft, num_slots=256, graphs=graphs)
    waits: list[int] = []

    def wait(place: int, tokens: list[int]) -> None:
        torch.cuda.synchronize()

    cases = [Case("base", [5, 6, 7])]
    decode(decoder, there, cases, 30, on_tokens=wait)  # records everything
    import warnings

    from eda.decoder import ScheduledRow

    state = SequenceState([5, 6, 7], 33, there.fine_tunes["base"], cases[0].sampling, speculation=CHAIN)
    decoder.admit(state)
    decoder.step([ScheduledRow(state, 3)])
    decoder.step([ScheduledRow(state)])
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for _ in range(3):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                decoder.step([ScheduledRow(state)])
            waits.append(sum("synchroniz" in str(each.message) for each in caught))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert max(waits) <= 2, waits


@pytest.mark.gpu
@needs_gpu
def test_what_a_graph_cannot_hold_is_refused_and_the_device_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda")
    given, output = torch.ones(4, device=device), torch.zeros(4, device=device)
    graphs = recording(CudaGraphBackend(device))
    key = graphs.key("waits", (1,), (given,))

    def waits() -> None:
        output.copy_(given * given.sum().item())

    with caplog.at_level(logging.WARNING):
        assert not graphs.run(key, lambda: (waits, [output]))
    assert "operation by operation" in caplog.text
    assert (given + 1).tolist() == [2.0] * 4
    fine: dict[str, Any] = {}

    def works() -> None:
        output.copy_(given * 3)

    fine["key"] = graphs.key("works", (1,), (given,))
    assert graphs.run(fine["key"], lambda: (works, [output]))
    given.fill_(2.0)
    assert graphs.run(fine["key"], lambda: (works, [output]))
    assert output.tolist() == [6.0] * 4


@pytest.mark.gpu
@needs_gpu
def test_bfloat16_rounds_on_a_gpu_stay_near_the_argmax(family: Family) -> None:
    there = on_gpu(family, "bfloat16")
    cases = random_cases(family, ["base"], 6, seed=9)
    for case, speculation in zip(cases, [CHAIN, TREE] * 3, strict=True):
        case.speculation = speculation
    decoder = SpeculativeDecoder.for_models(
        there.base, there.draft, num_slots=256, graphs=recording(CudaGraphBackend(there.base.device))
    )
    outputs = decode(decoder, there, cases, 12)
    for case, output in zip(cases, outputs, strict=True):
        logits = family.reference_logits("base", case.prompt + output, dtype=torch.bfloat16)
        rows = logits[len(case.prompt) - 1 : -1]
        chosen = rows.gather(1, torch.tensor(output)[:, None])[:, 0]
        assert (rows.max(-1).values - chosen).max().item() <= 0.25
