"""Whole targets and drafts by every kind of instructions, with weights of every format."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eda.backends.cpu.body import CpuBody
from eda.backends.cpu.weights import WEIGHT_FORMATS, WeightFormat
from eda.backends.loading import load_fine_tune
from eda.formats.quantised import quantised
from eda.models.lora import LoraAdapter
from eda.models.target import TargetModel
from tests.support.drafting import Part, Rounds, draft_config
from tests.support.instructions import NAMES, build_for
from tests.support.narrow import load, mean_error, narrow_lora, narrow_module, narrow_target, use_kernel
from tests.support.passes import Row, complete, random_tokens, reference, reference_logits, run

pytestmark = pytest.mark.usefixtures("_needs_kernels")

TOKENS = random_tokens(30, seed=1)
# Mean errors relative to what is expected, of a target with few and small sums.
TOLERANCES: dict[WeightFormat, float] = {"bfloat16": 0.02, "int8": 0.06, "int4": 0.06}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 96, "attention_bias": True}
    return narrow_target(tmp_path_factory.mktemp("target"), "llama", **sizes)


@pytest.fixture(scope="module")
def references(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[WeightFormat, Tensor]:
    """Logits of transformers in float32, with the values that the weights of each format stand for."""
    found: dict[WeightFormat, Tensor] = {"bfloat16": reference_logits(reference(path), TOKENS)}
    weights = load_file(path / "model.safetensors")
    for format in ("int8", "int4"):
        directory = tmp_path_factory.mktemp(format)
        (directory / "config.json").write_bytes((path / "config.json").read_bytes())
        rounded = {
            name: quantised(weight, format).dequantised()
            if weight.dim() == 2 and "embed_tokens" not in name
            else weight
            for name, weight in weights.items()
        }
        save_file(rounded, directory / "model.safetensors", metadata={"format": "pt"})
        found[format] = reference_logits(reference(directory), TOKENS)
    return found


def lora_of(path: Path, model: TargetModel, directory: Path) -> LoraAdapter:
    lora = load_fine_tune(narrow_lora(directory, path, r=5), model, "lora").lora
    assert lora is not None
    return lora


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_logits(path: Path, references: dict[WeightFormat, Tensor], name: str, weights: WeightFormat) -> None:
    with build_for(name):
        found = complete(load(path, weights=weights), TOKENS)
    error = mean_error([found], [references[weights]])
    assert error < TOLERANCES[weights]
    others = [mean_error([found], [references[other]]) for other in WEIGHT_FORMATS if other != weights]
    assert error < min(others)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_a_token_alone_in_a_batch_in_chunks_and_in_a_tree(
    path: Path, tmp_path: Path, name: str, weights: WeightFormat
) -> None:
    with build_for(name):
        model = load(path, weights=weights)
        lora = lora_of(path, model, tmp_path)
        whole = {adapter: complete(model, TOKENS, adapter) for adapter in (None, lora)}
        assert not torch.equal(whole[None], whole[lora])
        cache = model.new_cache(200)
        extents = {adapter: cache.allocator.allocate(40) for adapter in whole}
        other = cache.allocator.allocate(20)
        for start, end in ((0, 1), (1, 7), (7, 12), (12, 25)):  # both together, beside a third
            rows = [Row(extent, TOKENS[start:end], adapter) for adapter, extent in extents.items()]
            rows.insert(1, Row(other, random_tokens(3, seed=start)))
            first, _, last = run(model, cache, rows)
            assert torch.equal(first, whole[None][start:end])
            assert torch.equal(last, whole[lora][start:end])
        nodes = [TOKENS[25], 5, TOKENS[26], 6, TOKENS[27], 7]  # every second one is wrong
        parents = [-1, 0, 0, 1, 2, 4]
        found = run(model, cache, [Row(extents[lora], nodes, lora, parents=parents)])[0]
        assert torch.equal(found[[0, 2, 4]], whole[lora][25:28])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_drafts_with_private_modules(name: str, weights: WeightFormat) -> None:
    config = draft_config()
    modules = [None, narrow_module(config.private_config(20, 3, 5), 1)]
    with build_for(name), torch.inference_mode():
        rounds = Rounds(config, weights=weights)
        parts: list[Part] = [
            rounds.part(extent, 5, module, num_steps=3)
            for extent, module in zip(rounds.extents(2), modules, strict=True)
        ]
        together, chains = rounds.extend(parts)
        expected = rounds.extend_on_torch(parts, rounds.wide)
        assert mean_error([together], [expected]) < {"bfloat16": 0.01, "int8": 0.05, "int4": 0.3}[weights]
        alone = [rounds.extend([part]) for part in parts]
        parts[1].temperature = 1.0
        uniforms = torch.rand(1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        hidden, [chain], probabilities = rounds.draw(parts[1:], uniforms)
        # A chain in one call reads the same logits as its steps one by one do.
        steps = rounds.step_logits(parts[1], hidden[0], chain).softmax(-1)
    assert probabilities is not None
    torch.testing.assert_close(probabilities[0, : len(chain)], steps, rtol=1e-4, atol=1e-7)
    assert torch.equal(torch.cat([hidden for hidden, _ in alone]), together)
    assert [chain for _, found in alone for chain in found] == chains


def test_passes_without_products_of_bfloat16_agree_to_the_bit(path: Path) -> None:
    found = []
    for name in ("scalar", "avx2", "avx512"):
        with build_for(name):
            found.append([complete(load(path, weights=weights), TOKENS) for weights in WEIGHT_FORMATS])
    for others in zip(*found, strict=True):
        assert all(torch.equal(one, others[0]) for one in others)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_that_are_quantised_already_keep_their_values(path: Path, weights: WeightFormat) -> None:
    assert weights != "bfloat16"
    expected = complete(load(path, weights=weights), TOKENS)
    model = load(path, kernel=False)
    for layer in model.layers:
        for linear in layer.fused_projections().values():
            linear.quantise(quantised(linear.weight, weights))
    head = quantised(model.head, weights)
    on_torch = complete(model, TOKENS)
    use_kernel(model, head)
    assert isinstance(model.body, CpuBody)
    assert model.body.formats(model) == (weights,)
    assert torch.equal(complete(model, TOKENS), expected)
    assert mean_error([on_torch], [expected]) < 0.1  # its head is not rounded


def test_formats_may_differ_within_a_layer(path: Path) -> None:
    model = load(path, kernel=False)
    for layer in model.layers:
        projections = layer.fused_projections()
        projections["qkv"].quantise(quantised(projections["qkv"].weight, "int8"))
        projections["gate_up"].quantise(quantised(projections["gate_up"].weight, "int4"))
    expected = complete(model, TOKENS)
    use_kernel(model)
    assert isinstance(model.body, CpuBody)
    assert model.body.formats(model) == ("int8", "bfloat16", "int4")
    found = complete(model, TOKENS)
    assert mean_error([found], [expected]) < 0.06
    cache = model.new_cache(30)
    extent = cache.allocator.allocate(30)
    parts = [run(model, cache, [Row(extent, [token])])[0] for token in TOKENS]
    assert torch.equal(torch.cat(parts), found)
