"""LoRAs in the C++ passes against PEFT in float32, beside torch's own bfloat16 on the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from eda.backends.loading import load_fine_tune
from eda.models.target import TargetModel
from tests.support.narrow import load, mean_error, narrow_lora, narrow_target
from tests.support.passes import Row, complete, random_tokens, reference, reference_logits, run

pytestmark = pytest.mark.usefixtures("_needs_kernels")

# Ranks fill no vector of 16 but the last one's. Layers differ in rank, or have no update at all.
KINDS: dict[str, dict[str, Any]] = {
    "all linear": {"r": 5},
    "one projection, rsLoRA": {"targets": ["v_proj"], "use_rslora": True, "r": 9, "lora_alpha": 5},
    "ranks by layer": {
        "targets": ["k_proj", "up_proj", "o_proj"],
        "r": 3,
        "rank_pattern": {r"model\.layers\.1\..*": 40, r"model\.layers\.3\..*": 17},
    },
    "without the first layer": {"targets": ["gate_proj", "q_proj"], "r": 6, "layers_to_transform": [1, 3]},
    "output layer": {"targets": ["lm_head", "down_proj"], "r": 7},
    "saved output layer": {"targets": ["down_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "rank 16": {"targets": ["up_proj", "down_proj"], "r": 16},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return narrow_target(
        tmp_path_factory.mktemp("base"),
        "llama",
        hidden_size=48,
        intermediate_size=57,
        vocab_size=129,
        head_dim=32,
        attention_bias=True,
    )


@pytest.fixture(scope="module")
def models(base: Path) -> dict[str, TargetModel]:
    return {"kernel": load(base), "torch": load(base, kernel=False)}


def exact_logits(base: Path, adapter: Path | None, tokens: list[int]) -> torch.Tensor:
    model = reference(base)
    return reference_logits(model if adapter is None else PeftModel.from_pretrained(model, adapter), tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_one_lora(base: Path, models: dict[str, TargetModel], tmp_path: Path, kind: str) -> None:
    adapter = narrow_lora(tmp_path, base, **KINDS[kind])
    sequences = [random_tokens(count, count, vocab_size=129) for count in (1, 4, 13, 30)]
    expected = [exact_logits(base, adapter, tokens) for tokens in sequences]
    unadapted = [exact_logits(base, None, tokens) for tokens in sequences]
    errors = {}
    for name, model in models.items():
        lora = load_fine_tune(adapter, model, kind).lora
        errors[name] = mean_error([complete(model, tokens, lora) for tokens in sequences], expected)
    assert errors["kernel"] <= errors["torch"] < 0.1
    assert errors["kernel"] < mean_error(unadapted, expected) / 3


def test_all_kinds_and_the_bare_base_in_one_pass(
    base: Path, models: dict[str, TargetModel], tmp_path: Path
) -> None:
    adapters = [narrow_lora(tmp_path / str(n), base, seed=n, **kind) for n, kind in enumerate(KINDS.values())]
    adapters_or_none = [*adapters[:3], None, *adapters[3:], None]
    prompts = [random_tokens(3 + 2 * n, seed=n, vocab_size=129) for n in range(len(adapters_or_none))]
    expected = [
        exact_logits(base, adapter, prompt) for adapter, prompt in zip(adapters_or_none, prompts, strict=True)
    ]
    errors = {}
    for name, model in models.items():
        loras = [
            None if adapter is None else load_fine_tune(adapter, model, adapter.name).lora
            for adapter in adapters_or_none
        ]
        cache = model.new_cache(200)
        rows = [
            Row(cache.allocator.allocate(len(prompt)), prompt[:-2], lora)
            for prompt, lora in zip(prompts, loras, strict=True)
        ]
        first = run(model, cache, rows)
        for row, prompt in zip(rows, prompts, strict=True):
            row.tokens = prompt[-2:]
        second = run(model, cache, rows)
        found = [torch.cat(parts) for parts in zip(first, second, strict=True)]
        errors[name] = mean_error(found, expected)
        if name == "kernel":
            alone = [complete(model, *given) for given in zip(prompts, loras, strict=True)]
            for together, single in zip(found, alone, strict=True):
                assert torch.equal(together, single)
    assert errors["kernel"] <= errors["torch"] < 0.1
