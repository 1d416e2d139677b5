"""The target's C++ passes against transformers in float32, beside torch's own bfloat16 on the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eda.backends.loading import load_target
from eda.models.answers import Need
from eda.models.attention import AttentionRow, PackedBatch
from eda.models.target import TargetModel, TorchBody
from tests.support.narrow import load, mean_error, narrow_target, outputs_of
from tests.support.passes import Row, complete, random_tokens, reference, reference_logits, run

pytestmark = pytest.mark.usefixtures("_needs_kernels")

# Sizes that fill no block: of the hidden states, the inner network and the vocabulary; all groups of query heads.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, all biases, head 32": (
        "llama",
        {
            "hidden_size": 48,
            "intermediate_size": 56,
            "vocab_size": 321,
            "head_dim": 32,
            "attention_bias": True,
        },
    ),
    "llama, tied, five heads share a key head": (
        "llama",
        {
            "hidden_size": 80,
            "intermediate_size": 100,
            "vocab_size": 130,
            "head_dim": 64,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2, head 128, odd network": (
        "qwen2",
        {
            "hidden_size": 80,
            "intermediate_size": 33,
            "vocab_size": 257,
            "head_dim": 128,
            "num_attention_heads": 6,
        },
    ),
    "qwen3, head 128, no groups, tied": (
        "qwen3",
        {
            "hidden_size": 48,
            "intermediate_size": 70,
            "vocab_size": 100,
            "head_dim": 128,
            "num_attention_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3, head 64, biases": (
        "qwen3",
        {"hidden_size": 80, "intermediate_size": 90, "head_dim": 64, "attention_bias": True},
    ),
    "mistral without window, head 32": (
        "mistral",
        {
            "hidden_size": 64,
            "intermediate_size": 31,
            "vocab_size": 65,
            "head_dim": 32,
            "num_attention_heads": 8,
            "sliding_window": None,
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_features_are_nearer_to_float32_than_torchs(tmp_path: Path, name: str) -> None:
    architecture, sizes = CASES[name]
    path = narrow_target(tmp_path, architecture, **sizes)
    exact = reference(path)
    models = {"kernel": load(path), "torch": load(path, kernel=False)}
    sequences = [random_tokens(count, count, sizes.get("vocab_size", 320)) for count in (*range(1, 14), 45)]
    expected = [reference_logits(exact, tokens) for tokens in sequences]
    with torch.inference_mode():
        states = [
            exact(torch.tensor([tokens]), output_hidden_states=True).hidden_states for tokens in sequences
        ]
    # State 0 is the embedding.
    expected_features = [torch.cat([state[3][0], state[1][0], state[2][0]], dim=-1) for state in states]
    errors, feature_errors = {}, {}
    for kind, model in models.items():
        with outputs_of(model) as outputs:
            errors[kind] = mean_error(
                [complete(model, tokens, taps=(2, 0, 1)) for tokens in sequences], expected
            )
        features = [output.features for output in outputs if output.features is not None]
        feature_errors[kind] = mean_error(features, expected_features)
    assert errors["kernel"] <= errors["torch"] < 0.1
    assert feature_errors["kernel"] <= feature_errors["torch"] < 0.1


def wanted_of(model: TargetModel, tokens: list[int], wanted: list[int], **how: Need) -> Any:
    cache = model.new_cache(len(tokens))
    batch = PackedBatch(
        torch.arange(len(tokens)), torch.arange(len(tokens)), [AttentionRow(0, len(tokens), 0, len(tokens))]
    )
    with torch.inference_mode():
        return model(torch.tensor(tokens), batch, cache, wanted=wanted, **how)


def test_wanted_logits_and_likeliest_tokens(tmp_path: Path) -> None:
    model = load(narrow_target(tmp_path, hidden_size=48, head_dim=32, vocab_size=321))
    tokens, wanted = random_tokens(11, seed=1), [0, 3, 4, 10]
    everything = complete(model, tokens)
    output = wanted_of(model, tokens, wanted)
    assert output.features is None
    assert torch.equal(output.answer.values, everything[wanted])
    told = wanted_of(model, tokens, wanted, need=Need.LIKELIEST)
    assert told.answer.token_ids == everything[wanted].argmax(-1).tolist()
    assert wanted_of(model, tokens, []).answer is None


def test_the_lowest_id_of_equally_likely_tokens_is_the_best(tmp_path: Path) -> None:
    path = narrow_target(tmp_path, hidden_size=48, head_dim=32, vocab_size=150)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"][75:] = weights["lm_head.weight"][:75]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    best = wanted_of(
        load(path), random_tokens(40, seed=2, vocab_size=150), list(range(40)), need=Need.LIKELIEST
    ).answer.token_ids
    assert max(best) < 75
    assert len(set(best)) > 5


def test_dynamic_rope_takes_each_rows_own_length(tmp_path: Path) -> None:
    path = narrow_target(
        tmp_path,
        hidden_size=48,
        head_dim=32,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0},
    )
    prompts = [random_tokens(40, seed=3), random_tokens(9, seed=4)]
    errors = {}
    for kernel in (True, False):
        model = load(path, kernel=kernel)
        cache = model.new_cache(64)
        rows = [
            Row(cache.allocator.allocate(len(prompt)), prompt, prompt_length=len(prompt))
            for prompt in prompts
        ]
        # transformers remembers the longest sequence that it saw, so each prompt gets a fresh model.
        expected = [reference_logits(reference(path), prompt) for prompt in prompts]
        errors[kernel] = mean_error(run(model, cache, rows), expected)
    assert errors[True] <= errors[False]


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("llama", {"head_dim": 8}),
        ("llama", {"hidden_size": 40, "head_dim": 32}),
        ("llama", {"head_dim": 32, "mlp_bias": True}),
        ("mistral", {"head_dim": 32, "sliding_window": 6}),
    ],
    ids=["head size", "width", "bias of the network", "window"],
)
def test_what_the_passes_cannot_do_runs_on_torch(
    tmp_path: Path, architecture: str, sizes: dict[str, Any]
) -> None:
    path = narrow_target(tmp_path, architecture, **sizes)
    tokens = random_tokens(12, seed=5)
    found = complete(load(path, kernel=False), tokens)
    assert torch.equal(complete(load_target(path, weights="bfloat16"), tokens), found)
    assert isinstance(load_target(path, weights="bfloat16").body, TorchBody)
    assert mean_error([found], [reference_logits(reference(path), tokens)]) < 0.1
