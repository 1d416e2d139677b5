"""Passes from several threads and from a forked process; torch's own threads in the meantime."""

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from eda.backends.cpu.threads import kernel_threads_only, num_threads
from eda.decoder import SpeculativeDecoder
from eda.generation import GenerationRequest, generate
from eda.models.target import TargetModel
from eda.speculation.kinds import Chain, Off, Speculation, Tree
from tests.support.narrow import VOCAB_SIZE, NarrowFamily, load, make_narrow_family, narrow_target
from tests.support.passes import complete, random_tokens

pytestmark = pytest.mark.usefixtures("_needs_kernels", "_own_thread_number")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> NarrowFamily:
    return make_narrow_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TargetModel:
    return load(narrow_target(tmp_path_factory.mktemp("model"), hidden_size=48, head_dim=64))


def texts_of(family: NarrowFamily, seed: int, speculation: Speculation) -> list[list[int]]:
    decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=1024)
    requests = [
        GenerationRequest(
            random_tokens(3 + n, 10 * seed + n, VOCAB_SIZE), 8, speculation=speculation, private=module
        )
        for n, module in enumerate(family.modules[:2])
    ]
    name = list(family.fine_tunes)[seed % 3]
    return [found.token_ids for found in generate(decoder, family.fine_tunes[name], requests)]


@pytest.mark.parametrize("count", [1, 2])
def test_decoders_in_several_threads(family: NarrowFamily, count: int) -> None:
    chain, tree = Chain(2), Tree(2, top_k=3, num_nodes=6)
    jobs = [(seed, (chain, tree)[seed % 2]) for seed in range(3)]
    expected = [texts_of(family, seed, Off()) for seed, _ in jobs]
    torch.set_num_threads(count)
    start = threading.Barrier(3)

    def work(mine: list[tuple[int, Speculation]]) -> list[list[list[int]]]:
        torch.set_num_threads(count)
        start.wait(30)
        return [texts_of(family, *job) for job in mine]

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(work, [[job] for job in jobs]))
    assert [texts for part in found for texts in part] == expected


def test_passes_with_different_numbers_of_threads_at_once(model: TargetModel) -> None:
    tokens = random_tokens(30, seed=1)
    expected = complete(model, tokens)

    def work(count: int) -> bool:
        torch.set_num_threads(count)
        return all(torch.equal(complete(model, tokens), expected) for _ in range(3))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, [1, 2, 3]))


def test_passes_after_pauses_that_put_the_threads_to_sleep(model: TargetModel) -> None:
    """Threads go to sleep after about half a millisecond; whoever misses the call then never ends its pass."""
    tokens = random_tokens(6, seed=3)
    torch.set_num_threads(3)
    expected = complete(model, tokens)
    for number in range(300):
        time.sleep(number % 30 * 5e-5)
        assert torch.equal(complete(model, tokens), expected)


def test_torch_keeps_to_one_thread_inside_and_gets_its_number_back() -> None:
    torch.set_num_threads(3)
    with kernel_threads_only():
        assert (torch.get_num_threads(), num_threads()) == (1, 3)
        with kernel_threads_only():
            assert (torch.get_num_threads(), num_threads()) == (1, 3)
        assert (torch.get_num_threads(), num_threads()) == (1, 3)
    assert (torch.get_num_threads(), num_threads()) == (3, 3)


def test_torch_gets_its_number_back_after_an_error() -> None:
    def fail() -> None:
        with kernel_threads_only():
            raise KeyError

    torch.set_num_threads(3)
    with pytest.raises(KeyError):
        fail()
    assert (torch.get_num_threads(), num_threads()) == (3, 3)


def test_each_python_thread_has_its_own_number() -> None:
    """Torch's setting is per thread, so one thread's block must neither end nor change another's."""
    inside, leave = threading.Event(), threading.Event()
    found: list[int] = []

    def other() -> None:
        torch.set_num_threads(2)
        with kernel_threads_only():
            inside.set()
            leave.wait(30)
            found.append(num_threads())
        found.append(torch.get_num_threads())

    torch.set_num_threads(3)
    thread = threading.Thread(target=other)
    with kernel_threads_only():
        thread.start()
        assert inside.wait(30)
        assert num_threads() == 3
    assert torch.get_num_threads() == 3
    leave.set()
    thread.join(30)
    assert found == [2, 2]


def in_a_child(work: Callable[[], bool]) -> bool:
    """Whether ``work`` returns true in a forked process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of threads in the parent
        child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.parametrize("count", [1, 2])
def test_a_pass_in_a_forked_process(model: TargetModel, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The pool's threads are the parent's; the child starts its own. Torch itself keeps to one thread, since OpenMP
    does not survive a fork."""
    monkeypatch.setattr("eda.backends.cpu.target.num_threads", lambda: count)
    tokens = random_tokens(20, seed=2)
    expected = complete(model, tokens)
    assert in_a_child(lambda: torch.equal(complete(model, tokens), expected))
    assert torch.equal(complete(model, tokens), expected)
