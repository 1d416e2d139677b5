"""What is told about model directories before anything is built from them: sizes, causes, and without torch."""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eda.backends.loading import load_fine_tune, load_target
from eda.errors import CheckpointError, MismatchError
from eda.formats.checkpoint import MAX_WEIGHT
from eda.formats.config import ModelConfig
from eda.formats.config_fields import SIZE_LIMITS
from eda.formats.draft_files import draft_shapes, read_draft_fields
from eda.formats.preflight import check_draft, check_fine_tune, check_target
from eda.formats.weight_settings import WeightSetting
from eda.models.draft import DraftModel
from eda.models.fine_tune import FineTune
from eda.models.probe import require_usable
from eda.models.target import TargetModel
from tests.support.reference_family import make_family
from tests.support.tiny import edit_json, tiny_lora, tiny_target

WEIGHTS = "model.safetensors"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="module")
def stored_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("family")).paths["draft"]


@pytest.fixture
def target(stored: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stored, tmp_path / "target")


@pytest.fixture
def draft(stored_draft: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stored_draft, tmp_path / "draft")


def refused(check: Any, path: Path, *parts: str) -> None:
    """At once: a size from a file must not decide how long that takes."""
    start = time.monotonic()
    with pytest.raises(CheckpointError) as raised:
        check(path)
    assert time.monotonic() - start < 5
    for part in parts:
        assert part in str(raised.value)


# -- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZE_LIMITS)
@pytest.mark.parametrize("value", [10**9 * 7, 10**90, -1, 1.5, "8", True, [8], {}])
def test_sizes_that_no_model_has_are_refused(target: Path, name: str, value: Any) -> None:
    edit_json(target / "config.json", **{name: value})
    refused(check_target, target, "config.json", name, "a whole number from")
    refused(ModelConfig.from_directory, target, name)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("num_hidden_layers", 1000, "the weights have 4 layers"),
        ("num_hidden_layers", 3, "the weights have 4 layers"),
        ("vocab_size", 1 << 22, "embed_tokens.weight is [320, 32]"),
        ("hidden_size", 1 << 16, "embed_tokens.weight is [320, 32]"),
        ("intermediate_size", 1 << 20, "gate_proj.weight is [48, 32]"),
        ("num_attention_heads", 4096, "q_proj.weight is [32, 32]"),
        ("head_dim", 4096, "q_proj.weight is [32, 32]"),
        ("num_key_value_heads", 4, "k_proj.weight is [16, 32]"),
    ],
)
def test_sizes_are_compared_with_the_headers(target: Path, name: str, value: int, part: str) -> None:
    edit_json(target / "config.json", **{name: value})
    refused(check_target, target, part)
    refused(TargetModel.load, target)


def test_fields_that_decide_nothing_are_not_acted_upon(target: Path) -> None:
    """Handed on, these would make transformers build dictionaries of their size, or call what they name."""
    before = ModelConfig.from_directory(target)
    edit_json(target / "config.json", num_labels=10**9, auto_map={"AutoConfig": "evil.Config"}, to_dict=1)
    assert ModelConfig.from_directory(target) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 0},
        {"rope_theta": -1.0, "rope_parameters": ...},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": [2.0] * 9}},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 10**80}},
        {"rope_parameters": [1]},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": None, "factor": None}},
        {"rms_norm_eps": "small"},
        {"rms_norm_eps": -1e-6},
        {"layer_types": ["full_attention"] * 3, "architectures": ["Qwen2ForCausalLM"]},
        {"layer_types": "full_attention"},
        {"eos_token_id": "</s>"},
        {"eos_token_id": [[1]]},
        {"eos_token_id": list(range(2000))},
        {"attention_bias": "no"},
        {"head_dim": 7},
        {"hidden_act": ["silu"]},
        {"dtype": {"a": 1}},
        {"architectures": [{}]},
        {"architectures": "x" * 10_000},
        {"model_type": ["llama"], "architectures": ...},
    ],
    ids=str,
)
def test_values_that_cannot_be_meant_are_refused(target: Path, changes: dict[str, Any]) -> None:
    edit_json(target / "config.json", **changes)
    refused(ModelConfig.from_directory, target)


@pytest.mark.parametrize("stated", [-1, [5, 10**12], 320])
def test_end_tokens_beyond_the_vocabulary_never_come(target: Path, stated: Any) -> None:
    edit_json(target / "generation_config.json", eos_token_id=stated)
    assert ModelConfig.from_directory(target).eos_token_ids == ((5,) if isinstance(stated, list) else ())


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"hidden_size": 1 << 40}, "hidden_size"),
        ({"draft_vocab_size": 10**9}, "draft_vocab_size"),
        ({"num_heads": 0}, "num_heads"),
        ({"intermediate_size": 1 << 20}, "size mismatch for feed_forward.gate_up_proj.weight"),
        ({"num_kv_heads": 3}, "must be a multiple"),
        ({"tap_layers": [0, 1]}, "tap_layers"),
        ({"tap_layers": [0, 1, "2"]}, "tap_layers"),
        ({"tap_layers": [0, 1, 10**9]}, "tap_layers"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rms_norm_eps": []}, "rms_norm_eps"),
        ({"target_fingerprint": 3}, "target_fingerprint"),
        ({"head_dim": ...}, "lacks a field"),
        ({"model_type": "llama"}, "is not a draft"),
    ],
    ids=str,
)
def test_drafts_are_checked_alike(draft: Path, changes: dict[str, Any], part: str) -> None:
    check_draft(draft)
    edit_json(draft / "config.json", **changes)
    refused(check_draft, draft, part)
    refused(DraftModel.load, draft, part)


def test_the_shapes_of_a_draft_are_those_that_it_saves(draft: Path) -> None:
    saved = {name: tuple(weight.shape) for name, weight in load_file(draft / WEIGHTS).items()}
    assert draft_shapes(read_draft_fields(draft / "config.json")) == saved


def test_drafts_that_are_not_whole_or_of_other_types_are_refused(draft: Path) -> None:
    weights = load_file(draft / WEIGHTS)
    save_file({name: weight for name, weight in weights.items() if name != "fc.weight"}, draft / WEIGHTS)
    with pytest.raises(MismatchError, match=r"fc\.weight"):
        check_draft(draft)
    save_file({**weights, "draft_token_ids": weights["draft_token_ids"].float()}, draft / WEIGHTS)
    with pytest.raises(MismatchError, match="draft_token_ids is of type F32"):
        check_draft(draft)
    weights["fc.weight"][0, 0] = torch.inf
    save_file(weights, draft / WEIGHTS)
    refused(DraftModel.load, draft, "'fc.weight' holds values that are not finite")


# -- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (float("nan"), "not finite"),
        (float("-inf"), "not finite"),
        (1e30, "values up to 1e+30"),
        (-7e4, "values up to 7e+04"),
    ],
)
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.down_proj.weight"])
def test_checkpoints_with_impossible_values_are_refused(
    target: Path, name: str, value: float, part: str
) -> None:
    weights = load_file(target / WEIGHTS)
    weights[name].view(-1)[-1] = value
    save_file(weights, target / WEIGHTS)
    refused(TargetModel.load, target, name, part)


def test_weights_whose_products_overflow_are_refused(target: Path) -> None:
    """Each value alone could be one; what the model computes from them is nothing."""
    require_usable(FineTune("sound", load_target(target)))
    weights = {name: weight * 0 + MAX_WEIGHT for name, weight in load_file(target / WEIGHTS).items()}
    save_file(weights, target / WEIGHTS)
    formats: tuple[WeightSetting, ...] = ("float32", "bfloat16")
    for format in formats:
        model = load_target(target, weights=format)
        with pytest.raises(CheckpointError, match=r"'huge' gives .*too large"):
            require_usable(FineTune("huge", model))


# -- causes -------------------------------------------------------------------------------------------------------


def test_a_gguf_file_is_told_as_one(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x00" * 100)
    for check in (check_fine_tune, check_draft):
        refused(check, path, "is a GGUF file", "a directory with config.json and safetensors")
    refused(TargetModel.load, path, "general.architecture is missing")  # which does read such files
    refused(check_target, tmp_path / "nothing", "there is no directory")


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_git_lfs_pointer_is_told_as_one(target: Path, name: str) -> None:
    (target / name).write_bytes(LFS)
    refused(check_target, target, name, "git-lfs pointer", "git lfs pull")


@pytest.mark.parametrize(
    ("content", "what"), [(b"PK\x03\x04" + b"\x00" * 90, "zip"), (b"<!DOCTYPE html><p>" + b" " * 90, "HTML")]
)
def test_other_files_under_the_name_of_weights_are_told(target: Path, content: bytes, what: str) -> None:
    (target / WEIGHTS).write_bytes(content)
    refused(check_target, target, WEIGHTS, what, "a safetensors file is needed")


def test_shards_without_their_index_and_renamed_weights_are_told(target: Path) -> None:
    (target / WEIGHTS).rename(target / "model-00001-of-00001.safetensors")
    refused(
        check_target, target, "shards (model-00001-of-00001.safetensors)", "no model.safetensors.index.json"
    )
    (target / "model-00001-of-00001.safetensors").rename(target / "weights.safetensors")
    refused(check_target, target, "it has weights.safetensors", "renamed")


def test_an_adapter_in_place_of_a_base_is_told(stored: Path, tmp_path: Path) -> None:
    adapter = tiny_lora(tmp_path / "lora", stored, targets=["q_proj"])
    check_fine_tune(adapter)
    refused(check_target, adapter, "is a PEFT adapter", "its base")


def test_names_as_in_memory_and_of_other_tools_are_told(stored: Path, tmp_path: Path) -> None:
    base = load_target(stored, weights="float32")
    adapter = tiny_lora(tmp_path / "lora", stored, targets=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    saved = load_file(file)
    for old, new, part in (
        (".weight", ".default.weight", "the adapter's name 'default'"),
        ("base_model.model.", "", "begin with 'base_model.model.'"),
    ):
        save_file({name.replace(old, new): weight for name, weight in saved.items()}, file)
        with pytest.raises(CheckpointError) as raised:
            load_fine_tune(adapter, base, "a")
        assert part in str(raised.value)


def test_the_command_names_a_bad_file_before_torch_is_imported(target: Path, tmp_path: Path) -> None:
    (target / WEIGHTS).write_bytes(LFS)
    program = (
        "import sys\nfrom eda.server.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n"
        "    print(end.code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    arguments = ["serve", "--target", str(target), "--data-dir", str(tmp_path / "data")]
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["2", "False", "False"], done.stderr
    assert f"target: {target / WEIGHTS} is a git-lfs pointer" in done.stderr
    assert not (tmp_path / "data").exists()


def test_names_of_files_that_cannot_be_are_refused(target: Path, stored: Path, tmp_path: Path) -> None:
    edit_json(target / "config.json")
    (target / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "%s"}}' % ("x" * 5000), encoding="utf-8"
    )
    refused(check_target, target, "lacks xxx")
    adapter = tiny_lora(tmp_path / "lora", stored, targets=["q_proj"])
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="y" * 5000)
    load_fine_tune(adapter, load_target(stored, weights="float32"), "a")
