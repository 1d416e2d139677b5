"""LoRA fine-tunes against PEFT, mixed in one batch; and what is refused."""

import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from eda.backends.loading import load_fine_tune, load_target
from eda.errors import CheckpointError, EdaError, MismatchError, UnsupportedModelError
from eda.formats.lora_config import ModulePatterns
from eda.models.fine_tune import FineTune
from eda.models.lora import LoraAdapter, LoraSegment
from eda.models.target import TargetModel
from tests.support.passes import (
    Row,
    assert_equal_logits,
    complete,
    random_tokens,
    reference,
    reference_logits,
    run,
)
from tests.support.tiny import edit_json, tiny_lora, tiny_target, tiny_tokenizer

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def peft_logits(base: Path, adapter: Path, tokens: list[int]) -> torch.Tensor:
    return reference_logits(PeftModel.from_pretrained(reference(base), adapter).eval(), tokens)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("base"), "llama", attention_bias=True)


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("tied"), "qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def model(base: Path) -> TargetModel:
    return load_target(base, weights="float32")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return tiny_lora(tmp_path / "lora", base, targets=["q_proj", "down_proj"])


KINDS: dict[str, dict[str, Any]] = {
    "all linear": {},
    "one projection, rsLoRA": {"targets": ["v_proj"], "use_rslora": True, "r": 9, "lora_alpha": 5},
    "patterns": {
        "targets": ["k_proj", "up_proj", "o_proj"],
        "rank_pattern": {"k_proj": 2, r"model\.layers\.1\..*": 6},
        "alpha_pattern": {"layers.0.mlp.up_proj": 32},
    },
    "some layers": {"targets": ["gate_proj", "q_proj"], "layers_to_transform": [1, 3]},
    "head and embedding": {"targets": ["lm_head", "embed_tokens", "q_proj"]},
    "saved head and embedding": {"targets": ["down_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "saved embedding": {"targets": ["down_proj"], "modules_to_save": ["embed_tokens"]},
    "head alone": {"targets": ["lm_head"]},
}


def test_a_batch_of_different_loras_equals_peft(base: Path, model: TargetModel, tmp_path: Path) -> None:
    """Every kind of LoRA and the bare base in one pass, then decoded together."""
    adapters = [tiny_lora(tmp_path / str(n), base, seed=n, **kind) for n, kind in enumerate(KINDS.values())]
    fine_tunes = [load_fine_tune(path, model, path.name) for path in adapters]
    prompts = [random_tokens(3 + 2 * n, seed=n) for n in range(len(adapters) + 1)]
    cache = model.new_cache(200)
    rows = [
        Row(cache.allocator.allocate(len(prompt)), prompt[:-1], fine_tune and fine_tune.lora)
        for prompt, fine_tune in zip(prompts, [*fine_tunes, None], strict=True)
    ]
    first = run(model, cache, rows)
    for row, prompt in zip(rows, prompts, strict=True):
        row.tokens = prompt[-1:]
    second = run(model, cache, rows)
    for n, path in enumerate([*adapters, None]):
        expected = (
            reference_logits(reference(base), prompts[n])
            if path is None
            else peft_logits(base, path, prompts[n])
        )
        assert_equal_logits(torch.cat([first[n], second[n]]), expected)


@pytest.mark.parametrize(
    "kind",
    [
        {"targets": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"targets": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"targets": ["embed_tokens", "o_proj"]},
        {"targets": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=["saved embedding", "saved and tied", "embedding", "embedding, tied"],
)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_loras_on_a_tied_model_equal_peft(tied_base: Path, tmp_path: Path, kind: dict[str, Any]) -> None:
    adapter = tiny_lora(tmp_path, tied_base, **kind)
    fine_tune = load_fine_tune(adapter, load_target(tied_base, weights="float32"), "tied")
    tokens = random_tokens(12, seed=2)
    found = complete(fine_tune.model, tokens, fine_tune.lora)
    assert_equal_logits(found, peft_logits(tied_base, adapter, tokens))


def test_trees_of_lora_rows(base: Path, model: TargetModel, adapter: Path) -> None:
    lora = load_fine_tune(adapter, model, "a").lora
    prefix, nodes = random_tokens(5, seed=3), random_tokens(3, seed=4)
    cache = model.new_cache(16)
    extent = cache.allocator.allocate(16)
    run(model, cache, [Row(extent, prefix, lora)])
    found = run(model, cache, [Row(extent, nodes, lora, parents=[-1, -1, 0])])[0]
    expected = peft_logits(base, adapter, [*prefix, nodes[0], nodes[2]])
    assert_equal_logits(found[[0, 2]], expected[-2:])


@pytest.mark.parametrize("kind", ["all linear", "head and embedding", "saved head and embedding"])
def test_a_fine_tune_gives_its_own_embeddings_and_head(
    base: Path, model: TargetModel, tmp_path: Path, kind: str
) -> None:
    adapter = tiny_lora(tmp_path, base, **KINDS[kind])
    fine_tune = load_fine_tune(adapter, model, "a")
    merged = PeftModel.from_pretrained(reference(base), adapter).merge_and_unload()
    ids = torch.tensor([5, 0, 319, 7])
    assert_equal_logits(fine_tune.embed(ids), merged.model.embed_tokens.weight.detach()[ids], 1e-6)
    assert_equal_logits(fine_tune.head_rows(ids), merged.lm_head.weight.detach()[ids], 1e-6)
    own_head = kind != "all linear"
    assert fine_tune.output_owner is (fine_tune.lora if own_head else model)
    assert fine_tune.fingerprint != FineTune("b", model).fingerprint == model.fingerprint


def test_copies_of_the_bases_matrices_are_not_kept(base: Path, model: TargetModel, tmp_path: Path) -> None:
    adapter = tiny_lora(tmp_path, base, targets=["lm_head", "embed_tokens"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(adapter / WEIGHTS)
    lora = load_fine_tune(adapter, model, "a").lora
    assert lora is not None
    assert lora.embedding_weight is None
    assert lora.head_weight is None


def test_a_lora_works_in_bfloat16(base: Path, adapter: Path) -> None:
    narrow = load_target(base, weights="bfloat16")
    lora = load_fine_tune(adapter, narrow, "a").lora
    tokens = random_tokens(10, seed=5)
    assert_equal_logits(complete(narrow, tokens, lora), peft_logits(base, adapter, tokens), 0.1)


def test_segments_cover_the_tokens_they_are_asked_for(model: TargetModel, adapter: Path) -> None:
    fine_tune = load_fine_tune(adapter, model, "a")
    assert FineTune("b", model).lora_segments(2, 5) == ()
    (segment,) = fine_tune.lora_segments(2, 5)
    assert isinstance(segment, LoraSegment)
    assert (segment.adapter, segment.start, segment.end) == (fine_tune.lora, 2, 5)


# -- refusals -----------------------------------------------------------------------------------------------------


def refused(adapter: Path, model: TargetModel, error: type[EdaError], *parts: str) -> None:
    with pytest.raises(error) as raised:
        load_fine_tune(adapter, model, "a")
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"use_dora": True}, ["DoRA", "plain LoRA"]),
        ({"peft_type": "IA3"}, ["IA3", "supported is LORA"]),
        ({"bias": "all"}, ["bias='all'", "bias='none'"]),
        ({"init_lora_weights": "pissa_niter_4"}, ["pissa_niter_4", "changes the base's weights"]),
        ({"trainable_token_indices": [1, 2]}, ["trainable_token_indices"]),
        ({"layer_replication": [[0, 2], [1, 3]]}, ["layer replication"]),
        ({"alora_invocation_tokens": [1]}, ["activated LoRA"]),
    ],
)
def test_other_kinds_are_refused(
    adapter: Path, model: TargetModel, changes: dict[str, Any], parts: list[str]
) -> None:
    edit_json(adapter / CONFIG, **changes)
    refused(adapter, model, UnsupportedModelError, str(adapter), *parts)


def test_a_real_dora_adapter_is_refused(base: Path, model: TargetModel, tmp_path: Path) -> None:
    adapter = tiny_lora(tmp_path, base, targets=["q_proj"], use_dora=True)
    refused(adapter, model, UnsupportedModelError, "DoRA")
    edit_json(adapter / CONFIG, use_dora=False)  # the magnitudes are still there
    refused(adapter, model, UnsupportedModelError, "self_attn.q_proj", "supported are q_proj")


def test_pickle_is_refused(adapter: Path, model: TargetModel) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    refused(adapter, model, CheckpointError, "pickle only (adapter_model.bin)", WEIGHTS)


def test_unknown_modules_are_refused(adapter: Path, model: TargetModel) -> None:
    tensors = load_file(adapter / WEIGHTS)
    tensors["base_model.model.model.layers.0.mlp.router.lora_A.weight"] = torch.zeros(4, 32)
    save_file(tensors, adapter / WEIGHTS)
    refused(
        adapter, model, UnsupportedModelError, "model.layers.0.mlp.router", "supported are q_proj", "lm_head"
    )


def test_saved_norms_are_refused(base: Path, model: TargetModel, tmp_path: Path) -> None:
    adapter = tiny_lora(tmp_path, base, targets=["q_proj"], modules_to_save=["model.norm"])
    refused(adapter, model, UnsupportedModelError, "adapts model.norm;")


def test_a_lora_of_a_wider_base_is_refused(model: TargetModel, tmp_path: Path) -> None:
    wide = tiny_target(tmp_path / "wide", hidden_size=64, attention_bias=True)
    adapter = tiny_lora(tmp_path / "lora", wide, targets=["q_proj"])
    shutil.rmtree(wide)
    refused(adapter, model, MismatchError, "model.layers.0.self_attn.q_proj", "[64, 32]", "[32, 32]")


def test_a_lora_of_a_deeper_base_is_refused(model: TargetModel, tmp_path: Path) -> None:
    deep = tiny_target(tmp_path / "deep", num_hidden_layers=6, attention_bias=True)
    adapter = tiny_lora(tmp_path / "lora", deep, targets=["q_proj"])
    shutil.rmtree(deep)
    refused(adapter, model, MismatchError, "model.layers.4.self_attn.q_proj", "4 layers")


def test_a_lora_of_another_vocabulary_is_refused(model: TargetModel, tmp_path: Path) -> None:
    other = tiny_target(tmp_path / "other", vocab_size=400, attention_bias=True)
    adapter = tiny_lora(tmp_path / "lora", other, targets=["q_proj"], modules_to_save=["lm_head"])
    shutil.rmtree(other)
    refused(adapter, model, MismatchError, "lm_head", "[400, 32]", "[320, 32]")


def test_a_lora_that_records_another_base_is_refused(model: TargetModel, tmp_path: Path) -> None:
    """Shapes agree; the base's directory or the fingerprint in the file's metadata tells."""
    twin = tiny_target(tmp_path / "twin", seed=99, attention_bias=True)
    adapter = tiny_lora(tmp_path / "lora", twin, targets=["q_proj"])
    refused(adapter, model, MismatchError, str(twin), model.fingerprint[:16])
    shutil.rmtree(twin)
    load_fine_tune(adapter, model, "a")  # nothing on record that could be compared
    tensors = load_file(adapter / WEIGHTS)
    save_file(tensors, adapter / WEIGHTS, metadata={"base_fingerprint": "0" * 64})
    refused(adapter, model, MismatchError, "0" * 16, model.fingerprint[:16])
    save_file(tensors, adapter / WEIGHTS, metadata={"base_fingerprint": model.fingerprint})
    load_fine_tune(adapter, model, "a")


def test_a_lora_with_another_tokenizer_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    own = shutil.copytree(base, tmp_path / "own")
    tiny_tokenizer(own)
    tiny_tokenizer(adapter)
    model = load_target(own, weights="float32")
    load_fine_tune(adapter, model, "a")
    content = (adapter / "tokenizer.json").read_text(encoding="utf-8").replace('"A":', '"AA":')
    (adapter / "tokenizer.json").write_text(content, encoding="utf-8")
    refused(adapter, model, MismatchError, "another vocabulary", str(own))


def test_half_a_lora_and_wrong_ranks_are_refused(adapter: Path, model: TargetModel) -> None:
    tensors = load_file(adapter / WEIGHTS)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, adapter / WEIGHTS)
    refused(adapter, model, CheckpointError, "one half", "model.layers.0.self_attn.q_proj")
    save_file(tensors, adapter / WEIGHTS)
    edit_json(adapter / CONFIG, r=7)
    refused(adapter, model, CheckpointError, "[4, 32]", "rank 7")
    edit_json(adapter / CONFIG, r=0)
    refused(adapter, model, CheckpointError, "rank 0")
    edit_json(adapter / CONFIG, r=4, rank_pattern={"(": 2})
    refused(adapter, model, CheckpointError, "rank_pattern", "invalid pattern")


def test_an_empty_adapter_is_refused(adapter: Path, model: TargetModel) -> None:
    save_file({}, adapter / WEIGHTS)
    refused(adapter, model, CheckpointError, "no tensors")


def test_loading_needs_no_base_model(adapter: Path, model: TargetModel) -> None:
    lora = LoraAdapter.load(adapter, model.config)
    assert [layer.qkv is not None and layer.output is None for layer in lora.layers] == [True] * 4
    assert lora.head is None
    assert len(lora.fingerprint) == 64


# -- patterns, wholeness, values ------------------------------------------------------------------------------------

SLOW = [
    "(.*)*(.*)*(.*)*(.*)*x",
    "(([a-z._0-9]+)+)+!",
    "(a?){60000}a{60000}",
    r"(.|.)(.|.)*(.|.)*(.|.)*(.|.)*!",
]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
@pytest.mark.parametrize("pattern", SLOW)
def test_a_pattern_is_matched_in_bounded_time(
    adapter: Path, model: TargetModel, field: str, pattern: str
) -> None:
    """Either it is soon found to match nothing, or it is refused; Python's own matcher would go on for years."""
    edit_json(adapter / CONFIG, **{field: {pattern: 4} if field.endswith("pattern") else pattern})
    start = time.monotonic()
    with suppress(CheckpointError):
        load_fine_tune(adapter, model, "a")
    assert time.monotonic() - start < 20


def test_time_for_patterns_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eda.formats.lora_config.MATCH_SECONDS", 0.1)
    patterns = ModulePatterns("here", [r"((.|..)*)*\1[A-Z]"])
    with pytest.raises(CheckpointError, match="here has patterns that take too long to match"):
        patterns.first("model.layers.31.self_attn.q_proj")


@pytest.mark.parametrize(
    ("patterns", "module", "expected"),
    [
        (["q_proj"], "model.layers.1.self_attn.q_proj", 0),
        (["proj"], "model.layers.1.self_attn.q_proj", None),
        (["q_proj", "self_attn.q_proj"], "model.layers.1.self_attn.q_proj", 0),
        ([r".*\.0\..*", "q_proj"], "model.layers.1.self_attn.q_proj", 1),
        ([r".*\.1\..*", "q_proj"], "model.layers.1.self_attn.q_proj", 0),
        ([r"model\.layers\.(?:[02]|1)\..*[qv]_proj"], "model.layers.1.self_attn.q_proj", 0),
        ([r"layers\.1\.self_attn"], "model.layers.1.self_attn.q_proj", None),
    ],
)
def test_patterns_match_as_peft_matches_them(patterns: list[str], module: str, expected: int | None) -> None:
    """PEFT's own rule is one line, in ``peft.utils.get_pattern_key``."""
    assert ModulePatterns("here", patterns).first(module) == expected
    found = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    assert found == (None if expected is None else patterns[expected])


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"r": 10**9}, "rank 1000000000"),
        ({"r": True}, "rank True"),
        ({"r": "4"}, "rank '4'"),
        ({"lora_alpha": 10**80}, "alpha 1000"),
        ({"lora_alpha": None}, "alpha None"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is a JSON list"),
        ({"rank_pattern": {"q_proj": -1}}, "rank -1 (rank_pattern of 'q_proj')"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha 'x'"),
        ({"target_modules": 7}, "target_modules is 7"),
        ({"target_modules": ["q_proj", 3]}, "target_modules"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'"),
        ({"modules_to_save": [["lm_head"]]}, "modules_to_save"),
        ({"layers_to_transform": "1"}, "layers_to_transform"),
        ({"layers_pattern": "blocks"}, "layers_pattern is 'blocks'"),
        ({"exclude_modules": {"a": 1}}, "exclude_modules"),
        ({"target_modules": "x" * 600 + "*"}, "601 characters"),
    ],
    ids=str,
)
def test_fields_that_cannot_be_meant_are_refused(
    adapter: Path, model: TargetModel, changes: dict[str, Any], part: str
) -> None:
    edit_json(adapter / CONFIG, **changes)
    refused(adapter, model, CheckpointError, CONFIG, part)


def test_a_lora_that_is_not_whole_is_refused(adapter: Path, model: TargetModel) -> None:
    tensors = load_file(adapter / WEIGHTS)
    kept = {name: weight for name, weight in tensors.items() if ".layers.2.self_attn.q_proj" not in name}
    save_file(kept, adapter / WEIGHTS)
    refused(adapter, model, CheckpointError, "not whole", "model.layers.2.self_attn.q_proj")
    edit_json(adapter / CONFIG, target_modules=r".*\.(?:[013]\.self_attn\.q_proj|\d\.mlp\.down_proj)")
    load_fine_tune(adapter, model, "a")
    edit_json(
        adapter / CONFIG, target_modules=["q_proj", "down_proj"], exclude_modules="layers.2.self_attn.q_proj"
    )
    load_fine_tune(adapter, model, "a")
    edit_json(adapter / CONFIG, target_modules="all-linear", exclude_modules=None)
    refused(adapter, model, CheckpointError, "not whole")
    edit_json(adapter / CONFIG, target_modules=["down_proj"])
    refused(adapter, model, CheckpointError, "does not match", "model.layers.0.self_attn.q_proj")
    edit_json(adapter / CONFIG, target_modules=None)  # nothing that could be compared
    load_fine_tune(adapter, model, "a")
    edit_json(adapter / CONFIG, modules_to_save=["lm_head"])
    refused(adapter, model, CheckpointError, "not whole", "modules_to_save name lm_head")


@pytest.mark.parametrize(
    ("value", "changes", "part"),
    [
        (float("nan"), {}, "not finite"),
        (float("inf"), {}, "not finite"),
        (1e20, {}, "values up to 1e+20"),
        (1.0, {"lora_alpha": 1e9}, "lora_alpha / r"),
    ],
    ids=str,
)
def test_a_lora_with_impossible_values_is_refused(
    adapter: Path, model: TargetModel, value: float, changes: dict[str, Any], part: str
) -> None:
    edit_json(adapter / CONFIG, **changes)
    tensors = load_file(adapter / WEIGHTS)
    name = "base_model.model.model.layers.3.mlp.down_proj.lora_B.weight"
    tensors[name][0, 0] = value
    save_file(tensors, adapter / WEIGHTS)
    refused(adapter, model, CheckpointError, "lora_B", part)
