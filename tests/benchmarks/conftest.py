"""A tiny random family on disk: base, a LoRA fine-tune, a draft and a private module, with prompts."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from eda.adapters.store.manifest import Manifest
from eda.adapters.store.store import AdapterStore
from eda.backends.loading import load_fine_tune, load_target
from eda.models.draft import DraftConfig, DraftModel
from eda.models.private import PrivateModule
from tests.support.tiny import tiny_lora, tiny_target


@dataclass(frozen=True)
class FamilyOnDisk:
    models: Path
    prompts: Path


@pytest.fixture(scope="session")
def family_on_disk(tmp_path_factory: pytest.TempPathFactory) -> FamilyOnDisk:
    """The family in float32; its fine-tunes are ``math`` (LoRA, with a private module) and ``code`` (LoRA, without)."""
    root = tmp_path_factory.mktemp("family")
    models = root / "models"
    tiny_target(models / "base", tokenizer=True, tie_word_embeddings=True)
    for seed, domain in enumerate(("math", "code"), start=1):
        tiny_lora(models / domain, models / "base", seed=seed)
    base = load_target(models / "base", weights="float32")
    config = DraftConfig(
        hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        tap_layers=(0, 1, 3),
        vocab_size=320,
        draft_vocab_size=200,
        max_position_embeddings=128,
        target_fingerprint=base.fingerprint,
    )
    DraftModel.initialised(config, torch.arange(200)).save(models / "draft")
    draft = DraftModel.load(models / "draft")
    sizes = config.private_config(16)
    PrivateModule.initialised(sizes).save(root / "private.safetensors")
    manifest = Manifest(
        name="math",
        version=0,
        created="2026-01-01T00:00:00+00:00",
        target_fingerprint=base.fingerprint,
        fine_tune_fingerprint=load_fine_tune(models / "math", base, "math").fingerprint,
        draft_fingerprint=draft.fingerprint(),
        sizes=dataclasses.asdict(sizes),
        weights_bytes=0,
        weights_sha256="",
    )
    AdapterStore(models / "adapters").publish(root / "private.safetensors", manifest)
    prompts = root / "prompts"
    prompts.mkdir()
    for domain in ("math", "code"):
        lines = [json.dumps({"id": f"{domain}-{place}", "prompt": f"{domain} {place}"}) for place in range(2)]
        (prompts / f"{domain}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return FamilyOnDisk(models, prompts)
