"""The shared draft and private modules: exact identities, files, refusals."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from eda.errors import CheckpointError, MismatchError
from eda.models.attention import AttentionRow, PackedBatch
from eda.models.draft import DraftModel
from eda.models.private import PrivateConfig, PrivateModule, PrivateSegment
from tests.support.reference_family import Family, make_family


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


def random_module(config: PrivateConfig, seed: int) -> PrivateModule:
    module = PrivateModule(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return module.requires_grad_(False)


def draft_logits(
    draft: DraftModel,
    features: Tensor,
    embeddings: Tensor,
    head_rows: Tensor,
    lengths: list[int],
    segments: list[PrivateSegment],
) -> Tensor:
    """Logits of one pass over rows of ``lengths`` tokens in an empty cache."""
    rows, positions, start = [], [], 0
    for length in lengths:
        rows.append(AttentionRow(start, length, start, length))
        positions += range(length)
        start += length
    batch = PackedBatch(torch.tensor(positions), torch.arange(start), rows)
    hidden = draft(draft.fuse(features, segments), embeddings, batch, draft.new_cache(start), segments)
    return draft.logits(hidden, head_rows)


@pytest.fixture
def inputs(family: Family) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = family.draft.config.hidden_size
    features = torch.randn(12, 3 * size, generator=generator)
    embeddings = torch.randn(12, size, generator=generator)
    return features, embeddings, family.fine_tunes["base"].head_rows(family.draft.draft_token_ids)


def test_a_private_module_before_training_is_the_shared_draft_bit_for_bit(
    family: Family, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    sizes = family.draft.config.private_config(16, fc_rank=4, attention_rank=3)
    module = PrivateModule.initialised(sizes, seed=1)
    shared = draft_logits(family.draft, *inputs, [5, 7], [])
    for segments in ([PrivateSegment(module, 0, 12)], [PrivateSegment(module, 5, 12)]):
        assert torch.equal(draft_logits(family.draft, *inputs, [5, 7], segments), shared)


def test_rows_with_different_private_modules_equal_passes_of_their_own(
    family: Family, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    config = family.draft.config
    modules = [
        random_module(config.private_config(16, 4, 3), 1),
        None,
        random_module(config.private_config(40, 0), 2),
    ]
    lengths, bounds = [4, 3, 5], [(0, 4), (4, 7), (7, 12)]
    segments = [
        PrivateSegment(module, *bound)
        for module, bound in zip(modules, bounds, strict=True)
        if module is not None
    ]
    together = draft_logits(family.draft, *inputs, lengths, segments)
    features, embeddings, head_rows = inputs
    for module, (start, end) in zip(modules, bounds, strict=True):
        own = [] if module is None else [PrivateSegment(module, 0, end - start)]
        alone = draft_logits(
            family.draft, features[start:end], embeddings[start:end], head_rows, [end - start], own
        )
        torch.testing.assert_close(together[start:end], alone, rtol=1e-4, atol=1e-4)
    shared = draft_logits(family.draft, *inputs, lengths, [])
    assert not torch.allclose(together[:4], shared[:4], atol=1e-2)
    torch.testing.assert_close(together[4:7], shared[4:7], rtol=1e-4, atol=1e-4)


def test_the_private_network_is_a_swiglu_network(family: Family) -> None:
    module = random_module(family.draft.config.private_config(20), 3)
    hidden = torch.randn(9, family.draft.config.hidden_size, generator=torch.Generator().manual_seed(4))
    # Written out, without any of the code under test:
    gate, up = (hidden @ module.gate_up_proj.T).chunk(2, dim=-1)
    private = (gate * torch.sigmoid(gate) * up) @ module.down_proj.T
    torch.testing.assert_close(module.feed_forward(hidden), private, rtol=1e-5, atol=1e-6)


def test_corrections_equal_a_draft_with_the_updates_merged_in(
    family: Family, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    module = random_module(family.draft.config.private_config(0, 4, 3), 4)
    merged = copy.deepcopy(family.draft)
    with torch.no_grad():
        merged.fc.weight += module.fc_up @ module.fc_down
        merged.attention.qkv_proj.weight += module.qkv_up @ module.qkv_down
        merged.attention.o_proj.weight += module.o_up @ module.o_down
    expected = draft_logits(merged, *inputs, [5, 7], [])
    found = draft_logits(family.draft, *inputs, [5, 7], [PrivateSegment(module, 0, 12)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, draft_logits(family.draft, *inputs, [5, 7], []), atol=1e-2)


def test_a_saved_module_loads_as_it_was(family: Family, tmp_path: Path) -> None:
    module = random_module(family.draft.config.private_config(16, 4, 3), 5)
    module.save(tmp_path / "private.safetensors")
    loaded = PrivateModule.load(tmp_path / "private.safetensors", module.config)
    assert loaded.fingerprint() == module.fingerprint()
    assert all(not parameter.requires_grad for parameter in loaded.parameters())


def test_module_files_that_do_not_fit_are_refused(family: Family, tmp_path: Path) -> None:
    config = family.draft.config.private_config(16, 4)
    path = tmp_path / "private.safetensors"
    random_module(family.draft.config.private_config(8, 4), 6).save(path)
    with pytest.raises(MismatchError, match=r"holds tensors .*\(16, 32\).* asks for .*\(32, 32\)"):
        PrivateModule.load(path, config)
    bad = {name: weight.clone() for name, weight in random_module(config, 7).state_dict().items()}
    bad["down_proj"][0, 0] = float("nan")
    save_file(bad, path)
    with pytest.raises(CheckpointError, match="'down_proj' holds values that are not finite"):
        PrivateModule.load(path, config)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="states a header of"):
        PrivateModule.load(path, config)
    torch.save({"down_proj": torch.zeros(1)}, tmp_path / "private.bin")
    with pytest.raises(CheckpointError, match=r"not a \.safetensors file"):
        PrivateModule.load(tmp_path / "private.bin", config)


def test_a_saved_draft_loads_with_the_same_fingerprint_and_logits(
    family: Family, inputs: tuple[Tensor, Tensor, Tensor], tmp_path: Path
) -> None:
    family.draft.save(tmp_path / "draft", {"steps": 3})
    loaded = DraftModel.load(tmp_path / "draft")
    assert loaded.config == family.draft.config
    assert loaded.fingerprint() == family.draft.fingerprint()
    expected = draft_logits(family.draft, *inputs, [12], [])
    assert torch.equal(draft_logits(loaded, *inputs, [12], []), expected)
    changed = DraftModel.load(tmp_path / "draft")
    changed.fc.weight.data[0, 0] += 1.0
    assert changed.fingerprint() != loaded.fingerprint()


def test_draft_directories_that_do_not_fit_are_refused(family: Family, tmp_path: Path) -> None:
    directory = tmp_path / "draft"
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        DraftModel.load(directory)
    family.draft.save(directory)
    document = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**document, "intermediate_size": 40}))
    with pytest.raises(MismatchError, match="size mismatch"):
        DraftModel.load(directory)
    (directory / "config.json").write_text(json.dumps({**document, "model_type": "llama"}))
    with pytest.raises(CheckpointError, match='"model_type" must be "eda_draft"'):
        DraftModel.load(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "eda_draft", "tap_layers": [0, 1, 2]}))
    with pytest.raises(CheckpointError, match="lacks a field"):
        DraftModel.load(directory)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"intermediate_size": -1}, "intermediate_size is -1"),
        ({"intermediate_size": 0, "fc_rank": 0}, "all 0"),
        ({"intermediate_size": 4, "fc_rank": -2}, "fc_rank is -2"),
        ({"intermediate_size": 4, "attention_rank": 2}, "query_size is 0"),
    ],
)
def test_impossible_private_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrivateConfig(32, 96, **sizes)
