"""How large the cache is by default, what is lowered for it, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from eda.decoder import SpeculativeDecoder
from eda.server.cache_size import DRAFT_ROOM, CacheSize, choose_cache_size, free_memory
from eda.server.settings import ConfigurationError, Settings
from tests.support.family import MAX_LENGTH, Family

MIB = 1024 * 1024


def per_slot(family: Family) -> int:
    return SpeculativeDecoder.bytes_per_slot(family.target, family.draft)


def choose(family: Family, free_bytes: int, **settings: Any) -> CacheSize:
    return choose_cache_size(Settings(**settings), family.target, family.draft, free_bytes=free_bytes)


def test_the_default_is_what_all_running_sequences_need(family: Family) -> None:
    size = choose(family, 64 << 30, max_running=3)
    assert size == CacheSize(3 * (MAX_LENGTH + DRAFT_ROOM), size.num_slots * per_slot(family), MAX_LENGTH)


def test_the_default_takes_at_most_half_of_the_free_memory(family: Family) -> None:
    free = 2 * per_slot(family) * (MAX_LENGTH + DRAFT_ROOM) * 5
    size = choose(family, free)
    assert size.num_slots == 5 * (MAX_LENGTH + DRAFT_ROOM)
    assert size.max_model_len == MAX_LENGTH


def test_a_model_that_is_too_long_for_the_memory_is_served_with_shorter_sequences(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eda.server.cache_size.SHORTEST_USEFUL", 50)
    free = 2 * per_slot(family) * (100 + DRAFT_ROOM)
    assert choose(family, free).max_model_len == 100
    with pytest.raises(
        ConfigurationError, match=r"half of the free memory.*one sequence of 150 tokens needs"
    ):
        choose(family, free, max_model_len=150)
    with pytest.raises(ConfigurationError, match="one sequence of 50 tokens"):
        choose(family, free // 3)


def test_a_long_model_gets_more_than_the_usual_cache_where_there_is_memory(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eda.server.cache_size.DEFAULT_CACHE_BYTES", per_slot(family) * 10)
    assert choose(family, 64 << 30).num_slots == MAX_LENGTH + DRAFT_ROOM


def test_a_cache_that_was_asked_for_is_taken_as_it_is(family: Family) -> None:
    slots = MIB // per_slot(family)
    size = choose(family, 0, cache_mib=1, max_running=10_000)
    assert (size.num_slots, size.max_model_len) == (slots, min(MAX_LENGTH, slots - DRAFT_ROOM))


def test_a_container_limits_the_free_memory(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(cpu, tmp_path) > 10**6
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_memory(cpu, tmp_path) == 4000
    assert free_memory(cpu, tmp_path / "absent") > 10**6
