"""How many threads a pass gets while others hold the cores: the policy on a made-up clock, and passes that follow."""

import ctypes
import itertools
import time
from collections.abc import Iterator

import pytest
import torch

from eda.backends.cpu.library import kernels
from eda.backends.cpu.verifier import verify_chains
from eda.sampling.params import SamplingParams
from tests.support.narrow import load, narrow_target
from tests.support.passes import complete, random_tokens

pytestmark = pytest.mark.usefixtures("_needs_kernels", "_own_thread_number")

MS = 1_000_000
SECOND = 1000 * MS
TURN = 4 * MS
"""What a thread that is put aside costs the others."""


class Governor:
    """The C++ governor with a clock of its own."""

    def __init__(self, full: int) -> None:
        library = kernels()
        assert library is not None
        self._library = library
        library.eda_governor_new.restype = ctypes.c_void_p
        self._pointer = ctypes.c_void_p(library.eda_governor_new(full))
        self.now = SECOND
        self.threads = full

    def close(self) -> None:
        self._library.eda_governor_delete(self._pointer)

    def run(self, nanoseconds: int, lost: int = 0, *, only_above: int = 0) -> list[int]:
        """Passes of a millisecond that lose ``lost`` each, those on ``only_above`` threads or fewer nothing.

        Returns the threads of each.
        """
        end, seen = self.now + nanoseconds, []
        while self.now < end:
            loss = lost if self.threads > only_above else 0
            self.now += MS + loss
            self.threads = self._library.eda_governor_next(
                self._pointer, ctypes.c_int64(self.now), ctypes.c_int64(loss)
            )
            seen.append(self.threads)
        return seen


@pytest.fixture
def two() -> Iterator[Governor]:
    governor = Governor(2)
    yield governor
    governor.close()


@pytest.fixture
def eight() -> Iterator[Governor]:
    governor = Governor(8)
    yield governor
    governor.close()


def test_a_quiet_machine_keeps_all_threads(two: Governor) -> None:
    assert set(two.run(2 * SECOND)) == {2}


def test_rare_turns_of_others_are_borne(two: Governor) -> None:
    """A turn of 4 ms twenty times a second costs less than a second thread brings."""
    for _ in range(40):
        assert set(two.run(MS, TURN) + two.run(46 * MS)) == {2}


def test_losing_more_than_a_thread_brings_takes_it_away_at_once(two: Governor) -> None:
    seen = two.run(30 * MS, TURN, only_above=1)
    assert seen.index(1) <= 2


def test_small_losses_in_every_pass_count_too(two: Governor) -> None:
    assert 1 in two.run(40 * MS, MS)
    assert set(two.run(SECOND)[-100:]) == {2}
    assert set(two.run(2 * SECOND, MS // 5)) == {2}


def test_trials_on_a_busy_machine_become_rare(two: Governor) -> None:
    two.run(2 * SECOND, TURN, only_above=1)
    seen = two.run(10 * SECOND, TURN, only_above=1)
    trials = sum(before == 1 and after == 2 for before, after in itertools.pairwise(seen))
    assert 15 <= trials <= 20
    assert seen.count(2) <= trials + 1  # each ends with its first loss


def test_a_machine_that_grows_quiet_gets_all_threads_back(two: Governor) -> None:
    two.run(10 * SECOND, TURN, only_above=1)
    two.run(505 * MS)
    assert set(two.run(SECOND)) == {2}


def test_after_a_quiet_time_a_new_disturbance_is_brief(two: Governor) -> None:
    two.run(10 * SECOND, TURN, only_above=1)
    two.run(5 * SECOND)
    assert 1 in two.run(15 * MS, TURN, only_above=1)
    assert 2 in two.run(10 * MS)


def test_larger_pools_are_halved_down_to_what_is_undisturbed(eight: Governor) -> None:
    """Two of eight cores are free: four threads lose time, two do not."""
    seen = eight.run(3 * SECOND, TURN, only_above=2)
    assert set(seen) == {8, 4, 2}
    assert seen[-500:].count(2) > 490
    calm = eight.run(2 * SECOND)
    assert calm.index(4) < calm.index(8)
    assert set(calm[-500:]) == {8}


def test_one_thread_stays_one() -> None:
    governor = Governor(1)
    assert set(governor.run(SECOND, TURN)) == {1}
    governor.close()


def test_every_row_is_verified_by_fewer_threads_too() -> None:
    library = kernels()
    assert library is not None
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    arguments = [SamplingParams()] * 40, [None] * 40, list(range(40)), uniforms
    torch.set_num_threads(1)
    expected = verify_chains(logits, *arguments)
    torch.set_num_threads(5)
    assert library.eda_threads_after(5, ctypes.c_int64(50 * MS)) < 5
    assert verify_chains(logits, *arguments) == expected


def test_passes_follow_and_results_stay_the_same(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = load(narrow_target(tmp_path_factory.mktemp("model"), hidden_size=48, head_dim=32))
    library = kernels()
    assert library is not None
    tokens = random_tokens(30, seed=1)
    count = 6  # of no other test, so that its governor is at rest
    torch.set_num_threads(count)
    expected = complete(model, tokens)
    assert library.eda_threads_after(count, ctypes.c_int64(50 * MS)) < count
    assert torch.equal(complete(model, tokens), expected)
    torch.set_num_threads(1)
    assert torch.equal(complete(model, tokens), expected)
    deadline = time.monotonic() + 30
    while library.eda_threads_after(count, ctypes.c_int64(0)) < count:
        assert time.monotonic() < deadline, "the threads never came back"
        time.sleep(0.01)
