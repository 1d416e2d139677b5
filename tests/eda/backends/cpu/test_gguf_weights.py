"""GGUF files on the C++ passes: their own 8 and 4 bits are what is multiplied, and LoRAs work over them."""

import logging
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import TYPES, permuted, write_gguf
from safetensors.torch import load_file
from torch import Tensor

from eda.backends.cpu.body import CpuBody
from eda.backends.cpu.weights import BLOCK, PackedWeight
from eda.backends.loading import load_fine_tune, load_target
from eda.errors import CheckpointError, MismatchError
from eda.formats.model_files import open_model
from eda.formats.quantised import GROUP, QuantisedWeight
from eda.models.target import TargetModel
from tests.support.narrow import mean_error, narrow_lora
from tests.support.passes import Row, complete, random_tokens, run
from tests.support.tiny import edit_json, tiny_target

pytestmark = pytest.mark.usefixtures("_needs_kernels")

SIZES = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 96, "num_hidden_layers": 2}
TOKENS = random_tokens(20, seed=3)
LAYER_0 = "model.layers.0"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("stored"), **SIZES)


@pytest.fixture(scope="module")
def file(stored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(stored, tmp_path_factory.mktemp("gguf") / "model.gguf", TYPES.Q4_0)


def rounded(weight: Tensor, kind: TYPES) -> Tensor:
    """What the gguf package reads back."""
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))


def unpacked(weight: PackedWeight) -> Tensor:
    """The values ``[outputs, inputs]`` that the passes multiply, element by element as ``matrix.h`` lays them out."""
    assert weight.scales is not None
    outputs, inputs = weight.struct.n, weight.struct.k
    values = torch.empty(outputs, inputs)
    output = torch.arange(outputs)
    block, lane = output // BLOCK, output % BLOCK
    for place in range(inputs):
        group, inner = divmod(place, GROUP)
        scale = weight.scales[block, group, lane].float()
        if weight.format == "int8":
            step = weight.data[block, group, inner // 4, lane, inner % 4].float() - 128
            values[:, place] = step * scale
            continue
        byte = weight.data[block, group, inner % 16 // 4, lane, inner % 4]
        step = (byte >> 4 if inner >= GROUP // 2 else byte & 15).float()
        low = scale * -8 if weight.minimums is None else weight.minimums[block, group, lane].float()
        values[:, place] = step * scale + low
    return values


def packed(model: TargetModel) -> list[PackedWeight]:
    """Of all layers and the output layer."""
    assert isinstance(model.body, CpuBody)
    kernel = model.body._kernel
    return [part for part in kernel._kept if isinstance(part, PackedWeight)] + [kernel._head]


def interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """Half a block of gates, then their partners."""
    half = BLOCK // 2
    return torch.stack([gate.view(-1, half, gate.shape[1]), up.view(-1, half, up.shape[1])], 1).reshape(
        -1, gate.shape[1]
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_the_files_own_values_are_multiplied_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tied: bool
) -> None:
    stored = tiny_target(tmp_path / "hf", tie_word_embeddings=tied, **SIZES)
    file = write_gguf(stored, tmp_path / "model.gguf", TYPES[kind])
    dense: list[tuple[int, int]] = []
    dequantised = QuantisedWeight.dequantised

    def noted(weight: QuantisedWeight) -> Tensor:
        dense.append(weight.shape)
        return dequantised(weight)

    monkeypatch.setattr(QuantisedWeight, "dequantised", noted)
    model = load_target(file)
    assert dense == [(320, 64)] * (1 if tied else 2)  # the embedding, and the head's rows that drafts read
    assert model.weight_formats == ("int8" if kind == "Q8_0" else "int4",)
    own = {
        name: rounded(weight, TYPES[kind]) if weight.dim() == 2 else weight
        for name, weight in load_file(stored / "model.safetensors").items()
    }
    expected: list[Tensor] = []
    for layer in range(2):
        part = {
            name: own[f"model.layers.{layer}.{block}.{name}_proj.weight"]
            for block, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
            for name in names
        }
        expected += [
            torch.cat([part[name] for name in "qkv"]),
            part["o"],
            interleaved(part["gate"], part["up"]),
            part["down"],
        ]
    expected.append(own["model.embed_tokens.weight" if tied else "lm_head.weight"])
    for weight, values in zip(packed(model), expected, strict=True):
        assert torch.equal(unpacked(weight)[: values.shape[0]], values)
    assert torch.equal(model.embedding, own["model.embed_tokens.weight"].bfloat16())


@pytest.mark.parametrize(("kind", "exact"), [("Q4_0", True), ("Q4_1", False)])
def test_fused_parts_of_two_formats_become_8_bits(
    stored: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, exact: bool
) -> None:
    weights = load_file(stored / "model.safetensors")
    value = weights[f"{LAYER_0}.self_attn.v_proj.weight"]
    raw = {"blk.0.attn_v.weight": (gguf.quants.quantize(value.numpy(), TYPES.Q8_0), TYPES.Q8_0)}
    with caplog.at_level(logging.INFO, "eda"):
        model = load_target(write_gguf(stored, tmp_path / "model.gguf", TYPES[kind], raw=raw))
    assert model.weight_formats == ("int8", "int4")
    parts = [weights[f"{LAYER_0}.self_attn.{name}_proj.weight"] for name in "qk"]
    expected = torch.cat([*(rounded(part, TYPES[kind]) for part in parts), rounded(value, TYPES.Q8_0)])
    found = unpacked(packed(model)[0])[: expected.shape[0]]
    assert torch.equal(found, expected) is exact
    torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) / 254)
    assert ("2 parts of qkv layers rounded from int4 to int8" in caplog.text) is not exact


def test_a_fused_layer_that_is_partly_floats_is_dequantised(
    stored: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    value = load_file(stored / "model.safetensors")[f"{LAYER_0}.self_attn.v_proj.weight"]
    raw = {"blk.0.attn_v.weight": (value.numpy(), TYPES.F32)}
    file = write_gguf(stored, tmp_path / "model.gguf", TYPES.Q8_0, raw=raw)
    with caplog.at_level(logging.INFO, "eda"):
        model = load_target(file)
    assert model.weight_formats == ("bfloat16", "int8")
    assert "1 qkv layers dequantised" in caplog.text
    complete(model, TOKENS)


@pytest.mark.parametrize(
    ("weights", "formats"), [("int8", ("int8",)), ("int4", ("int4",)), ("bfloat16", ("bfloat16",))]
)
def test_another_format_than_the_files_own(
    file: Path, weights: str, formats: tuple[str, ...], stored: Path
) -> None:
    model = load_target(file, weights=weights)  # type: ignore[arg-type]
    assert model.weight_formats == formats
    if weights != "bfloat16":  # 4 bits around a middle are exact in 8
        output = load_file(stored / "model.safetensors")[f"{LAYER_0}.self_attn.o_proj.weight"]
        assert torch.equal(unpacked(packed(model)[1])[:64], rounded(output, TYPES.Q4_0))
    assert mean_error([complete(model, TOKENS)], [complete(load_target(file), TOKENS)]) < 0.1


@pytest.mark.parametrize("place", ["scale", "minimum", "embedding"])
def test_values_that_are_not_finite_are_refused(stored: Path, tmp_path: Path, place: str) -> None:
    own = "token_embd.weight" if place == "embedding" else "blk.1.attn_output.weight"
    name = "embed_tokens.weight" if place == "embedding" else "layers.1.self_attn.o_proj.weight"
    weight = load_file(stored / "model.safetensors")[f"model.{name}"]
    rows = gguf.quants.quantize(weight.numpy(), TYPES.Q4_1)
    start = 2 if place == "minimum" else 0
    rows[3, start : start + 2] = np.array([np.inf], np.float16).view(np.uint8)
    file = write_gguf(stored, tmp_path / "model.gguf", TYPES.Q4_1, raw={own: (rows, TYPES.Q4_1)})
    with pytest.raises(CheckpointError, match=f"{name}' holds values that are not finite"):
        load_target(file)


# -- LoRAs -------------------------------------------------------------------------------------------------------------


def test_loras_over_a_file_are_mixed_per_row(stored: Path, file: Path, tmp_path: Path) -> None:
    base = load_target(file)
    tunes = [load_fine_tune(narrow_lora(tmp_path / str(r), stored, r=r), base, str(r)).lora for r in (3, 5)]
    adapters = [None, *tunes]
    alone = [complete(base, TOKENS, adapter) for adapter in adapters]
    assert not torch.equal(alone[0], alone[1])
    cache = base.new_cache(100)
    rows = [Row(cache.allocator.allocate(len(TOKENS)), TOKENS, adapter) for adapter in adapters]
    assert all(map(torch.equal, run(base, cache, rows), alone))
    # What the update adds is what it adds to the same values in float32.
    wide = load_target(file, weights="float32")
    lora = load_fine_tune(tmp_path / "3", wide, "3").lora
    change = complete(wide, TOKENS, lora) - complete(wide, TOKENS)
    assert mean_error([alone[1] - alone[0]], [change]) < 0.2


@pytest.mark.parametrize("named", ["name", "directory", "nothing"])
def test_adapters_of_the_safetensors_model_are_taken_with_a_warning(
    stored: Path, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, named: str
) -> None:
    adapter = narrow_lora(tmp_path / "lora", stored)
    base = {"name": "someone/model", "directory": str(stored), "nothing": None}[named]
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=base)
    assert load_fine_tune(adapter, load_target(file), "lora").lora is not None
    assert "whether" in caplog.text
    assert (base or "a base that it does not name") in caplog.text


def test_an_adapter_of_a_mistral_is_taken_though_the_file_calls_it_a_llama(tmp_path: Path) -> None:
    mistral = tiny_target(tmp_path / "hf", "mistral", **SIZES)
    file = write_gguf(mistral, tmp_path / "model.gguf", TYPES.Q8_0)
    adapter = narrow_lora(tmp_path / "lora", mistral)
    assert load_fine_tune(adapter, load_target(file), "lora").lora is not None


def test_an_adapter_of_a_base_with_other_sizes_is_refused(file: Path, tmp_path: Path) -> None:
    """Its tensors would fit: it adapts the first layers alone."""
    deeper = tiny_target(tmp_path / "deeper", **SIZES | {"num_hidden_layers": 3})
    adapter = narrow_lora(tmp_path / "lora", deeper, layers_to_transform=[0, 1])
    with pytest.raises(MismatchError, match="num_layers 3 \\(this base: 2\\)"):
        load_fine_tune(adapter, load_target(file), "lora")


def test_permuted_rows_are_put_back(stored: Path, file: Path) -> None:
    """The file's own order is another one, so equality above says something."""
    query = load_file(stored / "model.safetensors")[f"{LAYER_0}.self_attn.q_proj.weight"]
    found = open_model(file).checkpoint.quantised(f"{LAYER_0}.self_attn.q_proj.weight")
    assert found is not None
    assert not torch.equal(found.dequantised(), rounded(permuted(query, 4), TYPES.Q4_0))
