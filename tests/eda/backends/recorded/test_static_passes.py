"""Single passes of fixed shape against the packed passes and transformers, and which cache slots they write to."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eda.backends.base import PassPlan
from eda.backends.drafting import Reading
from eda.backends.eager.target import EagerTarget
from eda.backends.loading import load_target
from eda.backends.recorded.shapes import MAX_KEYS, MAX_TOKENS, SMALLEST_KEYS, Inputs, num_keys, round_up
from eda.backends.recorded.target import RecordedTarget
from eda.decoder import ScheduledRow, SpeculativeDecoder
from eda.models.answers import Logits, Need
from eda.models.attention import AttentionRow, PackedBatch
from eda.models.cache import KVCache
from eda.models.lora import LoraAdapter, LoraSegment
from eda.models.target import TargetModel
from eda.speculation.rows import PassRow
from tests.support.backends import proposer_of
from tests.support.graph_decoding import CHAIN, Case, random_private, recording, state_of
from tests.support.passes import Row, assert_equal_logits, random_tokens, reference, reference_logits, run
from tests.support.reference_family import Family
from tests.support.tiny import ARCHITECTURES, tiny_lora, tiny_target

SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {
        "attention_bias": True,
        "mlp_bias": True,
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0},
    },
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
}


TAPS = (1, 2, 3)
PLAN = PassPlan(Need.LOGITS, TAPS)


def passes_of(model: TargetModel, num_slots: int) -> tuple[KVCache, RecordedTarget]:
    cache = model.new_cache(num_slots + MAX_TOKENS)
    scratch = cache.withhold(MAX_TOKENS)
    assert scratch == cache.num_slots == num_slots
    cache.keys.normal_()  # what other sequences have left behind
    cache.values.normal_()
    return cache, RecordedTarget(EagerTarget(cache), cache, scratch, recording(), taps=TAPS)


def static_row(row: Row, first_wanted: int = 0) -> PassRow:
    count, past = len(row.tokens), row.extent.length
    mask, positions = None, list(range(past, past + count))
    if row.parents is not None:
        mask = torch.zeros(count, count, dtype=torch.bool)
        for node, parent in enumerate(row.parents):
            if parent >= 0:
                mask[node] = mask[parent]
            mask[node, node] = True
            positions[node] = past + int(mask[node].sum()) - 1
    lengths = [max(row.prompt_length, position + 1) for position in positions]
    seen = None if mask is None else mask.int().tolist()
    return PassRow(row.tokens, positions, lengths, row.extent.start, past, seen, first_wanted, row.lora)


def replay(passes: RecordedTarget, model: TargetModel, rows: list[Row]) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and features of each row; grows the extents (not for trees)."""
    with torch.inference_mode():
        output = passes.replay(model, [static_row(row) for row in rows], PLAN)
    assert output is not None
    assert isinstance(output.answer, Logits)
    assert output.features is not None
    sizes = [len(row.tokens) for row in rows]
    for row in rows:
        if row.parents is None:
            row.extent.length += len(row.tokens)
    return list(output.answer.values.split(sizes)), list(output.features.split(sizes))


@pytest.mark.parametrize("special", [False, True], ids=["plain", "special"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padded_passes_equal_transformers(tmp_path: Path, architecture: str, special: bool) -> None:
    """Rows of 1 to 3 tokens, three in a pass of four: windows, biases, norms and dynamic rope included."""
    path = tiny_target(tmp_path, architecture, **(SPECIAL[architecture] if special else {}))
    model = load_target(path, weights="float32")
    cache, passes = passes_of(model, 200)
    cache.allocator.allocate(3)
    prompts = [random_tokens(count, seed=count) for count in (19, 1, 11)]
    later = [random_tokens(7, seed=100 + row) for row in range(3)]
    extents = [cache.allocator.allocate(30) for _ in prompts]
    rows = [
        Row(extent, prompt, prompt_length=len(prompt))
        for extent, prompt in zip(extents, prompts, strict=True)
    ]
    found = [[logits] for logits in run(model, cache, rows)]
    done = [0, 0, 0]
    for counts in ((1, 3, 2), (2, 1, 3), (3, 3, 1), (1, 0, 1)):
        active = [row for row in range(3) if counts[row]]
        step = [
            Row(
                extents[row], later[row][done[row] : done[row] + counts[row]], prompt_length=len(prompts[row])
            )
            for row in active
        ]
        for row, logits in zip(active, replay(passes, model, step)[0], strict=True):
            found[row].append(logits)
            done[row] += counts[row]
    assert done == [7, 7, 7]
    expected_model = reference(path)
    for row in range(3):
        if row and model.config.rope.is_dynamic:
            expected_model = reference(path)  # it remembers the longest sequence that it saw
        assert_equal_logits(torch.cat(found[row]), reference_logits(expected_model, prompts[row], later[row]))


@pytest.mark.parametrize("with_lora", [False, True])
def test_trees_and_features_equal_the_packed_pass(tmp_path: Path, with_lora: bool) -> None:
    """Two trees and a chain in one pass, with windows and a LoRA of every layer, the embeddings and the head."""
    path = tiny_target(tmp_path / "base", "qwen2", **SPECIAL["qwen2"])
    model = load_target(path, weights="float32")
    lora = None
    if with_lora:
        targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
        adapter = tiny_lora(tmp_path / "lora", path, targets=(*targets, "embed_tokens"))
        lora = LoraAdapter.load(adapter, model.config)
    cache, passes = passes_of(model, 160)
    extents = [cache.allocator.allocate(40) for _ in range(3)]
    run(model, cache, [Row(extent, random_tokens(9 + at, at), lora) for at, extent in enumerate(extents)])
    parents = [[-1, 0, 0, 1, 1, 2], [-1, 0, 1, 1], None]
    rows = [
        Row(extent, random_tokens(6 if tree is None else len(tree), 50 + at), lora, tree)
        for at, (extent, tree) in enumerate(zip(extents, parents, strict=True))
    ]
    eager_rows = [replace(row, extent=replace(row.extent)) for row in rows]
    logits, features = replay(passes, model, rows)
    expected = run(model, cache, eager_rows)
    for found, wanted in zip(logits, expected, strict=True):
        assert_equal_logits(found, wanted, 1e-5)
    # The chain's features against one pass over its whole sequence.
    tokens = torch.tensor([*random_tokens(11, 2), *rows[2].tokens])
    size = len(tokens)
    places = torch.arange(size)
    packed = PackedBatch(places, places, [AttentionRow(0, size, 0, size)])
    segments = [] if lora is None else [LoraSegment(lora, 0, size)]
    with torch.inference_mode():
        whole = model(tokens, packed, model.new_cache(size), segments, taps=TAPS).features
    assert whole is not None
    assert_equal_logits(features[2], whole[11:], 1e-5)


def test_only_new_slots_and_scratch_are_written(tmp_path: Path) -> None:
    model = load_target(tiny_target(tmp_path), weights="float32")
    cache, passes = passes_of(model, 160)
    extents = [cache.allocator.allocate(40) for _ in range(3)]
    run(model, cache, [Row(extent, random_tokens(7, at)) for at, extent in enumerate(extents)])
    for counts in ((1, 2, 5), (4, 1, 1), (1, 1, 1)):
        before = cache.keys.clone(), cache.values.clone()
        step = [Row(extent, random_tokens(count, 9)) for extent, count in zip(extents, counts, strict=True)]
        new = [
            slot
            for row in step
            for slot in range(
                row.extent.start + row.extent.length, row.extent.start + row.extent.length + len(row.tokens)
            )
        ]
        replay(passes, model, step)
        for was, now in zip(before, (cache.keys, cache.values), strict=True):
            changed = (was != now).any(-1).any(1).any(0).nonzero()[:, 0].tolist()
            assert set(new) <= set(changed)
            assert all(slot in new or slot >= cache.num_slots for slot in changed)


@pytest.mark.parametrize("model", ["base", "math", "medical"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_draft_reads_and_drafts_as_without_recordings(family: Family, model: str, count: int) -> None:
    """Extension outputs, chains and trees of the draft with a private module, from both kinds of passes."""
    private = random_private(family.draft, 2)
    cases = [Case(model, random_tokens(5 + at, at, family.vocab_size), private, CHAIN) for at in range(count)]
    outputs: list[list[Any]] = []
    for graphs in ("off", recording()):
        decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=256, graphs=graphs)
        proposer = proposer_of(decoder)
        states = [state_of(family, case, 30) for case in cases]
        for state in states:
            decoder.admit(state)
        decoder.step([ScheduledRow(state, state.num_uncomputed) for state in states])
        with torch.inference_mode():
            hidden = proposer.extend(Reading.of(states))
            chains = proposer.propose_chains(states, hidden, [5] * count)
            trees = proposer.propose_trees(states, hidden, top_k=3, depth=4, num_nodes=9)
        outputs.append([hidden, [c.token_ids for c in chains], [(t.token_ids, t.parents) for t in trees]])
    assert_equal_logits(outputs[1][0], outputs[0][0], 1e-5)
    assert outputs[0][1:] == outputs[1][1:]


def test_sizes_are_rounded_up_and_bounded() -> None:
    assert [round_up(value, (1, 2, 4)) for value in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, None]
    assert num_keys(1, 1) == num_keys(SMALLEST_KEYS, 16) == SMALLEST_KEYS
    assert num_keys(SMALLEST_KEYS + 1, 1) == 2 * SMALLEST_KEYS
    assert num_keys(MAX_KEYS, 1) == MAX_KEYS
    assert num_keys(MAX_KEYS // 2 + 1, 2) is None


def test_inputs_keep_their_places_and_refuse_what_does_not_fit() -> None:
    inputs = Inputs({"tokens": (3,), "grid": (2, 2)}, torch.device("cpu"))
    place = inputs["grid"].data_ptr()
    inputs.load({"tokens": [1, 2, 3], "grid": [4, 5, 6, 7]})
    inputs.load({"tokens": [9], "grid": [4, 5, 6, 7]})
    assert inputs["tokens"].tolist() == [9, 0, 0]
    assert inputs["grid"].tolist() == [[4, 5], [6, 7]]
    assert inputs["grid"].data_ptr() == place
    with pytest.raises(ValueError, match="tokens has 4 values; the buffer takes 3"):
        inputs.load({"tokens": [1, 2, 3, 4], "grid": []})


def test_what_is_too_large_is_left_to_the_packed_pass(tmp_path: Path) -> None:
    model = load_target(tiny_target(tmp_path), weights="float32")
    cache, passes = passes_of(model, 300)
    extents = [cache.allocator.allocate(10) for _ in range(17)]
    rows = [static_row(Row(extent, [1])) for extent in extents]
    assert passes.replay(model, rows, PLAN) is None, "17 sequences"
    assert passes.replay(model, [static_row(Row(extents[0], [1] * 34))], PLAN) is None, "34 tokens"
    assert passes.replay(model, [replace(rows[0], context=MAX_KEYS)], PLAN) is None, "too many keys"
    assert not RecordedTarget.takes(16, 5)
    assert RecordedTarget.takes(16, 4)
