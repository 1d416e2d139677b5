"""A token's logits are the same bits whatever shares its pass: the ground on which drafting changes no text."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eda.backends.cpu.weights import WEIGHT_FORMATS
from eda.backends.loading import load_fine_tune
from eda.models.lora import LoraAdapter
from eda.models.target import TargetModel
from tests.support.narrow import load, narrow_lora, narrow_target, outputs_of
from tests.support.passes import Row, complete, random_tokens, run

pytestmark = pytest.mark.usefixtures("_needs_kernels")

TOKENS = random_tokens(45, seed=1)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two and three query heads for each key head, which the passes take together or in pairs."""
    sizes = {
        "llama": {"hidden_size": 80, "head_dim": 32, "attention_bias": True, "vocab_size": 321},
        "qwen3": {
            "hidden_size": 48,
            "head_dim": 64,
            "num_attention_heads": 6,
            "intermediate_size": 100,
            "tie_word_embeddings": True,
        },
    }[request.param]
    return narrow_target(tmp_path_factory.mktemp(request.param), request.param, **sizes)


@pytest.fixture(scope="module", params=WEIGHT_FORMATS)
def model(request: pytest.FixtureRequest, path: Path) -> TargetModel:
    return load(path, weights=request.param)


@pytest.fixture(scope="module")
def lora(path: Path, model: TargetModel, tmp_path_factory: pytest.TempPathFactory) -> LoraAdapter:
    directory = narrow_lora(tmp_path_factory.mktemp("lora"), path, r=5)
    lora = load_fine_tune(directory, model, "lora").lora
    assert lora is not None
    return lora


@pytest.fixture(scope="module")
def whole(model: TargetModel) -> Tensor:
    return complete(model, TOKENS)


@pytest.mark.parametrize("sizes", [[1] * 45, [1, 2, 3, 5, 7, 13, 14], [44, 1], [6, 39]], ids=len)
def test_splits_of_a_sequence(model: TargetModel, whole: Tensor, sizes: list[int]) -> None:
    cache = model.new_cache(60)
    cache.allocator.allocate(7)  # sequences do not begin at slot 0
    extent = cache.allocator.allocate(45)
    parts, start = [], 0
    for size in sizes:
        parts += run(model, cache, [Row(extent, TOKENS[start : start + size])])
        start += size
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("count", [1, 12])
def test_other_sequences_in_the_pass(model: TargetModel, whole: Tensor, place: int, count: int) -> None:
    cache = model.new_cache(200)
    rows = [Row(cache.allocator.allocate(40), random_tokens(9 + 5 * n, seed=n)) for n in range(3)]
    extent = cache.allocator.allocate(45)
    run(model, cache, [Row(extent, TOKENS[: 45 - count])])
    rows.insert(place, Row(extent, TOKENS[45 - count :]))
    assert torch.equal(run(model, cache, rows)[place], whole[45 - count :])


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.usefixtures("_own_thread_number")
def test_the_number_of_threads(model: TargetModel, whole: Tensor, count: int) -> None:
    torch.set_num_threads(count)
    assert torch.equal(complete(model, TOKENS), whole)
    cache = model.new_cache(45)
    extent = cache.allocator.allocate(45)
    parts = [run(model, cache, [Row(extent, TOKENS[n : n + 9])])[0] for n in range(0, 45, 9)]
    assert torch.equal(torch.cat(parts), whole)


TAPS = (0, 2, 3)


def test_features(model: TargetModel) -> None:
    cache = model.new_cache(45)
    extent = cache.allocator.allocate(45)
    with outputs_of(model) as outputs:
        complete(model, TOKENS, taps=TAPS)
        for start, end in ((0, 20), (20, 21), (21, 26), (26, 45)):
            run(model, cache, [Row(extent, TOKENS[start:end])], taps=TAPS)
    whole, *parts = [output.features for output in outputs]
    assert whole is not None
    assert torch.equal(torch.cat([part for part in parts if part is not None]), whole)


@pytest.mark.parametrize("seed", range(8))
def test_nodes_of_a_tree_and_plain_passes_over_their_paths(
    model: TargetModel, lora: LoraAdapter, seed: int
) -> None:
    chance = random.Random(seed)
    adapter = chance.choice([None, lora])
    num_nodes = chance.randint(2, 14)
    prefix, nodes = random_tokens(chance.randint(1, 33), seed), random_tokens(num_nodes, seed + 100)
    parents = [chance.randint(max(-1, node - 4), node - 1) for node in range(num_nodes)]
    cache = model.new_cache(100)
    extent, other = cache.allocator.allocate(60), cache.allocator.allocate(20)
    run(model, cache, [Row(extent, prefix, adapter)])
    neighbour = Row(other, random_tokens(4, seed=7))
    found = run(model, cache, [neighbour, Row(extent, nodes, adapter, parents=parents)])[1]
    for node in range(num_nodes):
        path, parent = [nodes[node]], parents[node]
        while parent >= 0:
            path.insert(0, nodes[parent])
            parent = parents[parent]
        assert torch.equal(found[node], complete(model, prefix + path, adapter)[-1])


def test_an_accepted_path_moved_in_the_cache(model: TargetModel, whole: Tensor) -> None:
    """What verification does with a tree: the right path's keys move together, and decoding goes on."""
    cache = model.new_cache(60)
    extent = cache.allocator.allocate(60)
    run(model, cache, [Row(extent, TOKENS[:30])])
    wrong = random_tokens(3, seed=8)
    nodes = [TOKENS[30], wrong[0], TOKENS[31], wrong[1], wrong[2], TOKENS[32]]
    run(model, cache, [Row(extent, nodes, parents=[-1, 0, 0, 1, 2, 2])])
    cache.move(torch.tensor([32, 35]), torch.tensor([31, 32]))
    extent.length = 33
    assert torch.equal(run(model, cache, [Row(extent, TOKENS[33:])])[0], whole[33:])


@pytest.mark.parametrize("seed", range(4))
def test_random_schedules_of_rows_with_and_without_a_lora(
    model: TargetModel, lora: LoraAdapter, seed: int
) -> None:
    chance = random.Random(seed)
    lengths = [chance.randint(1, 40) for _ in range(5)]
    sequences = [random_tokens(length, seed=10 * seed + n) for n, length in enumerate(lengths)]
    adapters = [chance.choice([None, lora]) for _ in lengths]
    cache = model.new_cache(sum(lengths))
    extents = [cache.allocator.allocate(length) for length in lengths]
    found: list[list[Tensor]] = [[] for _ in lengths]
    while unfinished := [row for row, extent in enumerate(extents) if extent.length < lengths[row]]:
        chosen = chance.sample(unfinished, chance.randint(1, len(unfinished)))
        ends = [min(lengths[row], extents[row].length + chance.choice([1, 1, 4, 15])) for row in chosen]
        rows = [
            Row(extents[row], sequences[row][extents[row].length : end], adapters[row])
            for row, end in zip(chosen, ends, strict=True)
        ]
        for row, logits in zip(chosen, run(model, cache, rows), strict=True):
            found[row].append(logits)
    for parts, sequence, adapter in zip(found, sequences, adapters, strict=True):
        assert torch.equal(torch.cat(parts), complete(model, sequence, adapter))


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # of a LoRA on a tied model
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"]], ids=["output layer", "embedding"])
def test_loras_beside_the_layers(path: Path, model: TargetModel, tmp_path: Path, targets: list[str]) -> None:
    own = load_fine_tune(narrow_lora(tmp_path, path, r=5, targets=targets), model, "own").lora
    expected = complete(model, TOKENS, own)
    cache = model.new_cache(45)
    extent = cache.allocator.allocate(45)
    parts = [run(model, cache, [Row(extent, TOKENS[n : n + 3], own)])[0] for n in range(0, 45, 3)]
    assert torch.equal(torch.cat(parts), expected)
    extent.length = 0
    parts = [run(model, cache, [Row(extent, [token], own)])[0] for token in TOKENS]
    assert torch.equal(torch.cat(parts), expected)
