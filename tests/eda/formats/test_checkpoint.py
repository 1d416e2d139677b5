"""Reading model directories: configs, shards, full fine-tunes, and what is refused with which words."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eda.backends.loading import load_fine_tune, load_target
from eda.errors import CheckpointError, EdaError, MismatchError, UnsupportedModelError
from eda.formats.checkpoint import Checkpoint
from eda.formats.checkpoint_files import listed, read_header, resolve_directory
from eda.formats.config import ModelConfig
from eda.formats.config_fields import SUPPORTED_ARCHITECTURES, SUPPORTED_ROPE_TYPES
from tests.support.passes import assert_equal_logits, complete, random_tokens, reference, reference_logits
from tests.support.tiny import ARCHITECTURES, edit_json, tiny_target, tiny_tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("stored"))


@pytest.fixture
def target(stored: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(stored, tmp_path / "target")


def refused(path: Path, error: type[EdaError], *parts: str) -> None:
    with pytest.raises(error) as raised:
        load_target(path)
    for part in parts:
        assert part in str(raised.value)


# -- configs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_config_of_every_architecture(tmp_path: Path, architecture: str) -> None:
    config = ModelConfig.from_directory(tiny_target(tmp_path, architecture))
    assert config.architecture.lower() == f"{architecture}forcausallm"
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (32, 48, 320)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (4, 4, 2, 8)
    assert (config.query_size, config.kv_size) == (32, 16)
    assert config.qkv_bias is (architecture == "qwen2")
    assert config.qk_norm is (architecture == "qwen3")
    assert config.layer_windows == ((4096,) if architecture == "mistral" else (None,)) * 4
    assert config.eos_token_ids == (257,)
    assert config.dtype == torch.float32


def test_older_spellings_of_rope_and_dtype_are_read(target: Path) -> None:
    scaling = {"type": "linear", "factor": 2.0}
    edit_json(
        target / "config.json",
        rope_parameters=...,
        rope_scaling=scaling,
        rope_theta=5000.0,
        torch_dtype="bfloat16",
        dtype=...,
    )
    config = ModelConfig.from_directory(target)
    assert (config.rope.type, config.rope.theta, config.rope.parameters["factor"]) == ("linear", 5000.0, 2.0)
    assert config.dtype == torch.bfloat16
    tokens = random_tokens(12, seed=1)
    found = complete(load_target(target, weights="float32"), tokens)
    assert_equal_logits(found, reference_logits(reference(target), tokens))


@pytest.mark.parametrize(
    ("stated", "expected"), [(5, (5,)), ([5, 9], (5, 9)), (None, ()), (..., (257,))], ids=str
)
def test_the_generation_config_says_where_to_stop(
    target: Path, stated: Any, expected: tuple[int, ...]
) -> None:
    edit_json(target / "generation_config.json", eos_token_id=stated)
    assert ModelConfig.from_directory(target).eos_token_ids == expected


def test_an_unknown_architecture_is_refused_with_those_that_are_known(target: Path) -> None:
    edit_json(target / "config.json", architectures=["GPT2LMHeadModel"], model_type="gpt2")
    refused(target, UnsupportedModelError, "GPT2LMHeadModel", *SUPPORTED_ARCHITECTURES)
    edit_json(target / "config.json", architectures=..., model_type="gpt2")
    refused(target, UnsupportedModelError, "model_type 'gpt2'", *SUPPORTED_ARCHITECTURES)


def test_a_config_without_architectures_goes_by_its_model_type(target: Path) -> None:
    edit_json(target / "config.json", architectures=...)
    assert ModelConfig.from_directory(target).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_act": "gelu"}, ["'gelu'", "'silu'"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantised (gptq)", "bfloat16"]),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}},
            ["'longrope'", *SUPPORTED_ROPE_TYPES],
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            ["partial_rotary_factor 0.5"],
        ),
    ],
    ids=["activation", "quantised", "rope", "partial rope"],
)
def test_what_is_not_implemented_is_refused(target: Path, changes: dict[str, Any], parts: list[str]) -> None:
    edit_json(target / "config.json", **changes)
    refused(target, UnsupportedModelError, str(target), *parts)


def test_broken_configs_are_refused(target: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nothing", CheckpointError, "neither a model directory nor a hub id")
    edit_json(target / "config.json", num_key_value_heads=3)
    refused(target, CheckpointError, "4 attention heads and 3 key/value heads")
    edit_json(target / "config.json", num_key_value_heads="many")
    refused(target, CheckpointError, "num_key_value_heads is 'many'", "a whole number")
    (target / "config.json").write_text("[1]", encoding="utf-8")
    refused(target, CheckpointError, "JSON list", "an object")
    (target / "config.json").write_text("{", encoding="utf-8")
    refused(target, CheckpointError, "cannot be read as JSON")
    (target / "config.json").unlink()
    refused(target, CheckpointError, "config.json does not exist")


# -- weights ------------------------------------------------------------------------------------------------------


def test_shards_load_like_one_file(stored: Path, tmp_path: Path) -> None:
    sharded = tiny_target(tmp_path, max_shard_size="40KB")
    assert not (sharded / WEIGHTS).exists()
    assert len(list(sharded.glob("*.safetensors"))) > 2
    whole, parts = (load_target(path, weights="float32") for path in (stored, sharded))
    tokens = random_tokens(10, seed=4)
    assert torch.equal(complete(whole, tokens), complete(parts, tokens))
    assert whole.fingerprint == parts.fingerprint


def test_missing_shards_and_broken_indexes_are_refused(tmp_path: Path) -> None:
    path = tiny_target(tmp_path, max_shard_size="40KB")
    index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    shard = index["weight_map"]["model.norm.weight"]
    (path / shard).rename(path / "elsewhere")
    refused(path, CheckpointError, f"lacks {shard}", "shards that its index names")
    (path / "elsewhere").rename(path / shard)
    edit_json(path / INDEX, weight_map={**index["weight_map"], "model.extra": shard})
    refused(path, CheckpointError, "lack tensors that the index promises: model.extra")
    edit_json(path / INDEX, weight_map={"model.norm.weight": "../other.safetensors"})
    refused(path, CheckpointError, "must lie beside the index")
    edit_json(path / INDEX, weight_map=...)
    refused(path, CheckpointError, "no weight_map")


def test_pickle_weights_are_refused(target: Path) -> None:
    (target / WEIGHTS).rename(target / "pytorch_model.bin")
    refused(target, CheckpointError, "pickle only (pytorch_model.bin)", "can run code", WEIGHTS)
    (target / "pytorch_model.bin").unlink()
    refused(target, CheckpointError, "no weights", WEIGHTS)


def test_missing_unknown_and_misshapen_tensors_are_refused(target: Path) -> None:
    tensors = load_file(target / WEIGHTS)
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, target / WEIGHTS)
    refused(target, CheckpointError, f"missing: {name}")
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, target / WEIGHTS)
    refused(target, CheckpointError, "without use in this architecture: model.layers.0.self_attn.q_proj.bias")
    save_file({**tensors, name: torch.zeros(32, 32)}, target / WEIGHTS)
    refused(target, CheckpointError, f"{name} is [32, 32], its config asks for [16, 32]")
    save_file({**tensors, name: torch.zeros(16, 32, dtype=torch.int8)}, target / WEIGHTS)
    refused(target, UnsupportedModelError, "type I8", "BF16")


def test_stored_rotary_frequencies_are_ignored(target: Path) -> None:
    tensors = load_file(target / WEIGHTS)
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, target / WEIGHTS)
    load_target(target)


@pytest.mark.parametrize("damage", ["empty", "garbage", "cut off", "huge header"])
def test_damaged_files_are_refused(target: Path, damage: str) -> None:
    content = (target / WEIGHTS).read_bytes()
    damaged = {
        "empty": b"",
        "garbage": b"\x05\x00\x00\x00\x00\x00\x00\x00hello",
        "cut off": content[:-100],
        "huge header": (2**40).to_bytes(8, "little") + content[8:],
    }
    (target / WEIGHTS).write_bytes(damaged[damage])
    refused(target, CheckpointError, WEIGHTS)


def test_a_tied_config_over_two_different_matrices_is_not_tied(target: Path) -> None:
    edit_json(target / "config.json", tie_word_embeddings=True)
    model = load_target(target, weights="float32")
    assert model.head is not model.embedding
    tokens = random_tokens(8, seed=2)
    assert_equal_logits(complete(model, tokens), reference_logits(reference(target), tokens))
    tensors = load_file(target / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, target / WEIGHTS)
    model = load_target(target, weights="float32")
    assert model.head is model.embedding
    assert model.config.tie_word_embeddings


def test_a_checkpoint_reads_names_shapes_and_metadata(target: Path) -> None:
    entries, metadata = read_header(target / WEIGHTS)
    checkpoint = Checkpoint.of_model(target)
    assert checkpoint.entries == entries
    assert checkpoint.metadata == metadata == {"format": "pt"}
    assert "model.norm.weight" in checkpoint
    assert entries["model.norm.weight"].shape == (32,)
    with pytest.raises(CheckpointError, match="has no tensor model\\.nothing"):
        checkpoint.tensor("model.nothing")


def test_long_lists_are_cut() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed(list("abcdef")) == "a, b, c, d and 2 more"


# -- hub ----------------------------------------------------------------------------------------------------------


def test_only_safe_files_are_taken_from_the_hub(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(stored)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_target("someone/model").config.num_layers == 4
    assert asked["name"] == "someone/model"
    assert set(asked["allow_patterns"]) == {"*.json", "*.safetensors", "*.jinja"}


def test_an_unreachable_hub_is_a_checkpoint_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(name: str, **options: Any) -> str:
        raise OSError("no route")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        CheckpointError, match="someone/model is no local directory, and the hub gave: no route"
    ):
        resolve_directory("someone/model")


@pytest.mark.parametrize("name", ["model", "a/b/c", "../model", "https://host/model", ""])
def test_other_names_never_reach_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(CheckpointError, match="neither a model directory nor a hub id"):
        resolve_directory(name)


# -- full fine-tunes ----------------------------------------------------------------------------------------------


def test_a_full_checkpoint_is_a_fine_tune(stored: Path, tmp_path: Path) -> None:
    base = load_target(stored, weights="float32")
    tuned = load_fine_tune(tiny_target(tmp_path, seed=7), base, "tuned")
    assert tuned.lora is None
    assert tuned.model is not base
    assert tuned.fingerprint == tuned.model.fingerprint != base.fingerprint
    tokens = random_tokens(9, seed=3)
    assert_equal_logits(complete(tuned.model, tokens), reference_logits(reference(tmp_path), tokens))
    ids = torch.tensor([3, 1])
    assert torch.equal(tuned.embed(ids), tuned.model.embedding[ids])
    assert torch.equal(tuned.head_rows(ids), tuned.model.head[ids])


@pytest.mark.parametrize(
    ("architecture", "changes", "part"),
    [
        ("llama", {"vocab_size": 400}, "vocab_size 400 (base: 320)"),
        ("llama", {"num_hidden_layers": 2}, "num_layers 2 (base: 4)"),
        ("llama", {"num_key_value_heads": 4}, "num_kv_heads 4 (base: 2)"),
        ("mistral", {}, "architecture MistralForCausalLM (base: LlamaForCausalLM)"),
    ],
)
def test_a_full_checkpoint_of_another_model_is_refused(
    stored: Path, tmp_path: Path, architecture: str, changes: dict[str, Any], part: str
) -> None:
    other = tiny_target(tmp_path, architecture, **changes)
    with pytest.raises(MismatchError) as raised:
        load_fine_tune(other, load_target(stored), "other")
    assert part in str(raised.value)


def test_a_full_checkpoint_with_another_tokenizer_is_refused(target: Path, tmp_path: Path) -> None:
    tiny_tokenizer(target)
    other = shutil.copytree(target, tmp_path / "other")
    base = load_target(target)
    load_fine_tune(other, base, "same")
    content = (other / "tokenizer.json").read_text(encoding="utf-8").replace('"B":', '"BB":')
    (other / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(MismatchError, match="another vocabulary"):
        load_fine_tune(other, base, "other")
