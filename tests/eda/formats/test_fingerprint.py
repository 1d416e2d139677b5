"""Fingerprints: the same for the same weights however stored, different for any other model."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eda.errors import CheckpointError
from eda.formats.fingerprint import fingerprint_directory
from tests.support.tiny import edit_json, tiny_lora, tiny_target

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("stored"))


@pytest.fixture
def target(stored: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stored, tmp_path / "target")


def test_storage_does_not_count(stored: Path, target: Path, tmp_path: Path) -> None:
    """Name of the directory, sharding, tensor order, metadata, spelling of the config, other files."""
    first = fingerprint_directory(stored)
    assert len(first) == 64
    assert fingerprint_directory(tiny_target(tmp_path / "shards", max_shard_size="40KB")) == first
    tensors = load_file(target / WEIGHTS)
    save_file(dict(reversed(tensors.items())), target / WEIGHTS, metadata={"a": "b" * 5000})
    edit_json(target / "config.json", transformers_version="4.0.0", _name_or_path="x", use_cache=False)
    edit_json(target / "generation_config.json", eos_token_id=[1, 2], temperature=0.5)
    (target / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert fingerprint_directory(target) == first


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 1e-5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
        {"max_position_embeddings": 256},
    ],
)
def test_config_fields_that_change_the_model_count(
    stored: Path, target: Path, changes: dict[str, Any]
) -> None:
    edit_json(target / "config.json", **changes)
    assert fingerprint_directory(target) != fingerprint_directory(stored)


@pytest.mark.parametrize("place", [0, -1])
def test_a_single_value_at_either_end_of_any_tensor_counts(stored: Path, target: Path, place: int) -> None:
    seen = {fingerprint_directory(stored)}
    tensors = load_file(target / WEIGHTS)
    for name in ("lm_head.weight", "model.norm.weight", "model.layers.3.mlp.up_proj.weight"):
        changed = tensors[name].clone()
        changed.view(-1)[place] += 1
        save_file({**tensors, name: changed}, target / WEIGHTS)
        seen.add(fingerprint_directory(target))
    assert len(seen) == 4


def test_names_and_types_of_tensors_count(stored: Path, target: Path) -> None:
    tensors = load_file(target / WEIGHTS)
    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, first: tensors[second], second: tensors[first]}, target / WEIGHTS)
    swapped = fingerprint_directory(target)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, target / WEIGHTS)
    assert len({fingerprint_directory(stored), swapped, fingerprint_directory(target)}) == 3


def test_large_tensors_are_sampled(target: Path) -> None:
    """What is read grows with the number of tensors, not with their size."""
    tensors = load_file(target / WEIGHTS)
    tensors["lm_head.weight"] = torch.zeros(320, 10_000)
    save_file(tensors, target / WEIGHTS)
    before = fingerprint_directory(target)
    tensors["lm_head.weight"][160, 0] = 1.0  # the very middle
    save_file(tensors, target / WEIGHTS)
    assert fingerprint_directory(target) != before
    tensors["lm_head.weight"][160, 0] = 0.0
    tensors["lm_head.weight"][40, 0] = 1.0  # between the samples: stated as not seen
    save_file(tensors, target / WEIGHTS)
    assert fingerprint_directory(target) == before


def test_adapters_have_fingerprints(stored: Path, tmp_path: Path) -> None:
    adapter = tiny_lora(tmp_path / "a", stored, targets=["q_proj"])
    first = fingerprint_directory(adapter)
    assert fingerprint_directory(tiny_lora(tmp_path / "b", stored, targets=["q_proj"])) == first
    assert fingerprint_directory(tiny_lora(tmp_path / "c", stored, targets=["q_proj"], seed=2)) != first
    edit_json(adapter / "adapter_config.json", lora_dropout=0.1, base_model_name_or_path="moved")
    assert fingerprint_directory(adapter) == first
    edit_json(adapter / "adapter_config.json", lora_alpha=99)
    assert fingerprint_directory(adapter) != first


def test_what_is_no_model_has_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        fingerprint_directory(tmp_path)
