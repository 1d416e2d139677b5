"""The cache: allocation keeps its invariants, and appends, rollbacks and moves equal a plain recomputation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from eda.errors import CacheFullError
from eda.models.attention import AttentionRow, PackedBatch, attend, masks_for
from eda.models.cache import Extent, ExtentAllocator, KVCache

NUM_SLOTS = 64


class AllocatorMachine(RuleBasedStateMachine):
    """Random allocations and releases against a set of used slots."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = ExtentAllocator(NUM_SLOTS)
        self.held: list[Extent] = []

    def used(self) -> set[int]:
        return {slot for extent in self.held for slot in range(extent.start, extent.start + extent.capacity)}

    @rule(capacity=st.integers(1, NUM_SLOTS + 2))
    def allocate(self, capacity: int) -> None:
        free = [slot not in self.used() for slot in range(NUM_SLOTS)]
        possible = any(all(free[start : start + capacity]) for start in range(NUM_SLOTS - capacity + 1))
        assert self.allocator.can_allocate(capacity) == possible
        if possible:
            before = self.used()
            extent = self.allocator.allocate(capacity)
            slots = set(range(extent.start, extent.start + extent.capacity))
            assert len(slots) == capacity
            assert slots.isdisjoint(before)
            assert slots <= set(range(NUM_SLOTS))
            self.held.append(extent)
        else:
            with pytest.raises(CacheFullError, match=f"needs {capacity} cache slots"):
                self.allocator.allocate(capacity)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        extent = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.allocator.release(extent)
        with pytest.raises(ValueError, match="free already"):
            self.allocator.release(extent)

    @invariant()
    def counts_add_up(self) -> None:
        assert self.allocator.num_free == NUM_SLOTS - len(self.used())


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_everything_is_free_again_after_all_releases() -> None:
    allocator = ExtentAllocator(NUM_SLOTS)
    extents = [allocator.allocate(7) for _ in range(9)]
    for extent in extents[::2] + extents[1::2]:
        allocator.release(extent)
    assert allocator.allocate(NUM_SLOTS).start == 0


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Rounds of (tokens written, tokens kept of them)."""
    rounds = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    return [(written, draw(st.integers(1, written))) for written in rounds]


@settings(max_examples=40, deadline=None)
@given(histories(), st.integers(0, 5), st.integers(0, 2**31))
def test_append_and_rollback_equal_a_plain_recomputation(
    history: list[tuple[int, int]], offset: int, seed: int
) -> None:
    """What attention sees after any appends and rollbacks is what a list of the kept tokens gives."""
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads, size = 4, 2, 8
    cache = KVCache(num_layers=1, num_kv_heads=kv_heads, head_dim=size, num_slots=64, dtype=torch.float32)
    length = 0
    kept_keys, kept_values = torch.empty(0, kv_heads, size), torch.empty(0, kv_heads, size)
    for written, kept in history:
        keys = torch.randn(written, kv_heads, size, generator=generator)
        values = torch.randn(written, kv_heads, size, generator=generator)
        queries = torch.randn(written, heads, size, generator=generator)
        positions = torch.arange(length, length + written)
        batch = PackedBatch(
            positions, positions + offset, [AttentionRow(0, written, offset, length + written)]
        )
        cache.write(0, batch.slots, keys, values)
        attended = attend(queries, cache.keys[0], cache.values[0], batch, masks_for(batch, None))

        all_keys = torch.cat([kept_keys, keys]).repeat_interleave(2, dim=1)
        all_values = torch.cat([kept_values, values]).repeat_interleave(2, dim=1)
        scores = torch.einsum("qhd,khd->hqk", queries, all_keys) / size**0.5
        hidden = torch.ones(written, length + written).tril(length) == 0
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", weights, all_values)
        torch.testing.assert_close(attended, expected, rtol=1e-5, atol=1e-5)

        length += kept
        kept_keys, kept_values = torch.cat([kept_keys, keys[:kept]]), torch.cat([kept_values, values[:kept]])


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 20))
def test_a_moved_path_lies_behind_the_accepted_tokens(nodes: set[int], start: int) -> None:
    cache = KVCache(num_layers=3, num_kv_heads=2, head_dim=4, num_slots=40, dtype=torch.float32)
    cache.keys.normal_()
    cache.values.normal_()
    path = sorted(nodes)
    source = torch.tensor([start + node for node in path])
    expected_keys, expected_values = cache.keys[:, :, source].clone(), cache.values[:, :, source].clone()
    destination = torch.arange(start + 1, start + 1 + len(path))
    cache.move(source, destination)
    assert torch.equal(cache.keys[:, :, destination], expected_keys)
    assert torch.equal(cache.values[:, :, destination], expected_values)


def test_bytes_per_slot_is_what_the_tensors_take() -> None:
    cache = KVCache(num_layers=3, num_kv_heads=2, head_dim=4, num_slots=10, dtype=torch.bfloat16)
    assert cache.keys.nbytes + cache.values.nbytes == 10 * KVCache.bytes_per_slot(3, 2, 4, torch.bfloat16)
