"""The target's logits against transformers', over every architecture and rope type."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eda.backends.loading import load_target
from eda.formats.config import RopeConfig
from eda.models.rotary import RotaryEmbedding, apply_rotary
from eda.models.target import TargetModel, automatic_dtype, default_tap_layers
from tests.support.passes import (
    Row,
    assert_equal_logits,
    complete,
    random_tokens,
    reference,
    reference_logits,
    run,
)
from tests.support.tiny import ARCHITECTURES, tiny_target

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
# What an architecture has beyond the common sizes; sequences below are longer than the windows.
SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": {
        "head_dim": 16,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": True,
    },
}
PLAIN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
}


def check_against_transformers(path: Path) -> None:
    """Mixed-length prefill in one pass, then decoding in mixed steps: one token here, several there."""
    model = load_target(path, weights="float32")
    cache = model.new_cache(96)
    cache.allocator.allocate(3)  # sequences do not begin at slot 0
    prompts = [random_tokens(count, seed=count) for count in (19, 1, 11)]
    later = [random_tokens(6, seed=100 + row) for row in range(3)]
    extents = [cache.allocator.allocate(30) for _ in prompts]
    rows = [
        Row(extent, prompt, prompt_length=len(prompt))
        for extent, prompt in zip(extents, prompts, strict=True)
    ]
    found = [[logits] for logits in run(model, cache, rows)]
    for step in range(6):
        passed = run(model, cache, [Row(extents[row], [later[row][step]]) for row in range(3)])
        for row in range(3):
            found[row].append(passed[row])
    expected_model = reference(path)
    for row in range(3):
        if row and model.config.rope.is_dynamic:
            expected_model = reference(path)  # it remembers the longest sequence that it saw
        expected = reference_logits(expected_model, prompts[row], later[row])
        assert_equal_logits(torch.cat(found[row]), expected)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_transformers(tmp_path: Path, architecture: str, rope: str) -> None:
    limit = 16 if rope == "dynamic" else 128
    path = tiny_target(
        tmp_path,
        architecture,
        rope_parameters=ROPES[rope],
        max_position_embeddings=limit,
        **PLAIN[architecture],
    )
    check_against_transformers(path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_transformers_with_all_switches(tmp_path: Path, architecture: str) -> None:
    check_against_transformers(tiny_target(tmp_path, architecture, **SPECIAL[architecture]))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> TargetModel:
    """Full and sliding layers in one model."""
    path = tiny_target(tmp_path_factory.mktemp("windowed"), "qwen2", **SPECIAL["qwen2"])
    return load_target(path, weights="float32")


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 14), min_size=1, max_size=3), seed=st.integers(0, 2**32))
def test_any_split_into_passes_gives_the_same_logits(
    windowed: TargetModel, lengths: list[int], seed: int
) -> None:
    chance = random.Random(seed)
    sequences = [random_tokens(length, seed=row) for row, length in enumerate(lengths)]
    cache = windowed.new_cache(64)
    extents = [cache.allocator.allocate(length) for length in lengths]
    found: list[list[torch.Tensor]] = [[] for _ in lengths]
    while unfinished := [row for row, extent in enumerate(extents) if extent.length < lengths[row]]:
        chosen = chance.sample(unfinished, chance.randint(1, len(unfinished)))
        ends = [chance.randint(extents[row].length + 1, lengths[row]) for row in chosen]
        rows = [
            Row(extents[row], sequences[row][extents[row].length : end])
            for row, end in zip(chosen, ends, strict=True)
        ]
        for row, logits in zip(chosen, run(windowed, cache, rows), strict=True):
            found[row].append(logits)
    for row, sequence in enumerate(sequences):
        assert_equal_logits(torch.cat(found[row]), complete(windowed, sequence), 1e-5)


def test_chunked_prefill_of_dynamic_rope_takes_the_prompts_length(tmp_path: Path) -> None:
    path = tiny_target(tmp_path, rope_parameters=ROPES["dynamic"], max_position_embeddings=16)
    model = load_target(path, weights="float32")
    prompt = random_tokens(40, seed=3)
    cache = model.new_cache(40)
    extent = cache.allocator.allocate(40)
    parts = [
        run(model, cache, [Row(extent, prompt[start : start + 7], prompt_length=40)])[0]
        for start in range(0, 40, 7)
    ]
    assert_equal_logits(torch.cat(parts), reference_logits(reference(path), prompt))


def test_dynamic_rope_without_lengths_is_refused() -> None:
    rotary = RotaryEmbedding(RopeConfig("dynamic", 1000.0, 16, {"factor": 2.0}), 8)
    with pytest.raises(ValueError, match="rope_lengths is None"):
        rotary(torch.arange(3), None, torch.float32)


def test_a_sequence_longer_than_the_rotary_table(tmp_path: Path) -> None:
    path = tiny_target(tmp_path, max_position_embeddings=16)
    tokens = random_tokens(50, seed=4)
    found = complete(load_target(path, weights="float32"), tokens)
    assert_equal_logits(found, reference_logits(reference(path), tokens))


@settings(max_examples=15, deadline=None)
@given(prefix_length=st.integers(1, 12), num_nodes=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_tree_nodes_equal_plain_passes_over_their_paths(
    windowed: TargetModel, prefix_length: int, num_nodes: int, seed: int
) -> None:
    chance = random.Random(seed)
    parents = [chance.randint(-1, node - 1) for node in range(num_nodes)]
    prefix, nodes = random_tokens(prefix_length, seed=5), random_tokens(num_nodes, seed=6)
    neighbour = random_tokens(4, seed=7)
    cache = windowed.new_cache(64)
    extent, other = cache.allocator.allocate(30), cache.allocator.allocate(20)
    run(windowed, cache, [Row(extent, prefix)])
    found, beside = run(windowed, cache, [Row(extent, nodes, parents=parents), Row(other, neighbour)])
    for node in range(num_nodes):
        path, parent = [nodes[node]], parents[node]
        while parent >= 0:
            path.insert(0, nodes[parent])
            parent = parents[parent]
        assert_equal_logits(found[node], complete(windowed, prefix + path)[-1], 1e-5)
    assert_equal_logits(beside, complete(windowed, neighbour), 1e-5)


def test_rolling_back_forgets_the_rejected_tokens(windowed: TargetModel) -> None:
    tokens = random_tokens(12, seed=8)
    cache = windowed.new_cache(32)
    extent = cache.allocator.allocate(32)
    run(windowed, cache, [Row(extent, tokens[:8])])
    run(windowed, cache, [Row(extent, random_tokens(5, seed=9))])
    extent.length = 8
    found = run(windowed, cache, [Row(extent, tokens[8:])])[0]
    assert_equal_logits(found, complete(windowed, tokens)[8:], 1e-5)


def test_features_are_the_hidden_states_after_the_tapped_layers(tmp_path: Path) -> None:
    path = tiny_target(tmp_path)
    model = load_target(path, weights="float32")
    tokens = random_tokens(9, seed=10)
    cache = model.new_cache(9)
    batch_row = Row(cache.allocator.allocate(9), tokens)
    captured = []
    handle = model.register_forward_hook(lambda module, given, output: captured.append(output.features))
    run(model, cache, [batch_row], taps=(2, 0, 1))
    handle.remove()
    with torch.inference_mode():
        states = reference(path)(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    expected = torch.cat([states[3][0], states[1][0], states[2][0]], dim=-1)  # state 0 is the embedding
    assert_equal_logits(captured[0], expected)


def test_tap_layers_outside_the_model_are_refused(windowed: TargetModel) -> None:
    with pytest.raises(ValueError, match="three layers between 0 and 3"):
        complete(windowed, [1, 2], taps=(0, 2, 4))


def test_default_tap_layers_exist_in_order_and_differ() -> None:
    for num_layers in range(1, 81):
        low, middle, high = default_tap_layers(num_layers)
        assert 0 <= low <= middle <= high < num_layers
        assert len({low, middle, high}) == min(3, num_layers)
        if num_layers >= 8:
            assert (low, middle, high) == (2, num_layers // 2, num_layers - 3)


def test_a_model_stores_its_tied_head_once(tmp_path: Path) -> None:
    model = load_target(tiny_target(tmp_path, "qwen3", tie_word_embeddings=True))
    assert model.head is model.embedding
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_bfloat16_runs_and_stays_near_float32(tmp_path: Path) -> None:
    path = tiny_target(tmp_path)
    tokens = random_tokens(20, seed=11)
    narrow = complete(load_target(path, weights="bfloat16"), tokens)
    assert narrow.dtype == torch.float32
    assert_equal_logits(narrow, complete(load_target(path, weights="float32"), tokens), 0.1)


def test_automatic_dtype() -> None:
    assert automatic_dtype("cuda") == torch.bfloat16
    assert automatic_dtype("cpu") in (torch.float32, torch.bfloat16)


def test_drafts_can_train_through_rotary_tables_made_in_inference_mode() -> None:
    rotary = RotaryEmbedding(RopeConfig.default(theta=1000.0, max_position_embeddings=16), 8)
    with torch.inference_mode():
        rotary(torch.arange(4), None, torch.float32)
    cos, sin = rotary(torch.arange(4), None, torch.float32)
    queries = torch.randn(4, 2, 8, requires_grad=True)
    rotated, _ = apply_rotary(queries, queries, cos, sin)
    rotated.sum().backward()
    assert queries.grad is not None
