"""Jobs learn from what is served: features, distributions and answers of the same weights on the same passes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import TYPES, write_gguf
from torch import Tensor

from eda.adapters.jobs.pipeline import run_adaptation
from eda.adapters.jobs.spec import AdaptationSpec, DataSpec, TrainingOptions
from eda.adapters.serving.model_loader import ModelLoader
from eda.adapters.store.store import AdapterStore
from eda.adapters.worker.stage_job import AdaptationDefaults, StageJob, StageModels
from eda.adapters.worker.stages import STAGES
from eda.backends.cpu.library import kernels
from eda.backends.loading import load_fine_tune, load_target
from eda.decoder import SpeculativeDecoder
from eda.formats.model_files import fingerprint_files
from eda.formats.weight_settings import WeightSetting
from eda.models.draft import DraftConfig, DraftModel
from eda.models.fine_tune import FineTune
from eda.models.target import TargetModel
from eda.training.data import target_states
from eda.training.data.samples import Sample
from eda.training.data.target_states import TargetStates, compute_states
from tests.support.tiny import tiny_lora, tiny_target

SIZES = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 96}
OPTIONS = TrainingOptions(intermediate_size=8, num_steps=3, batch_size=2, max_tokens=8, held_out=2, seed=1)
DEFAULTS = AdaptationDefaults(num_triage=2, evaluation_tokens=6, batch_size=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("base"), tokenizer=True, **SIZES)


def draft_for(target: Path, directory: Path) -> Path:
    config = DraftConfig(
        hidden_size=64,
        intermediate_size=32,
        num_heads=2,
        num_kv_heads=2,
        head_dim=32,
        tap_layers=(0, 1, 3),
        vocab_size=320,
        draft_vocab_size=300,
        max_position_embeddings=128,
        target_fingerprint=fingerprint_files(target),
    )
    DraftModel.initialised(config, torch.arange(300)).save(directory)
    return directory


@pytest.mark.parametrize(
    ("weights", "stored_as", "formats"),
    [("int8", "safetensors", ("int8",)), ("auto", "gguf", ("int4",))],
)
@pytest.mark.parametrize("model", ["base", "lora"])
def test_a_job_learns_from_the_served_passes(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    weights: WeightSetting,
    stored_as: str,
    formats: tuple[str, ...],
    model: str,
) -> None:
    if kernels() is None:
        pytest.skip("the C++ passes cannot run here")
    is_file = stored_as == "gguf"
    target = write_gguf(base, tmp_path / "model.gguf", TYPES.Q4_0) if is_file else base
    draft = draft_for(target, tmp_path / "draft")
    served = load_target(target, weights=weights)
    path = target if model == "base" else tiny_lora(tmp_path / "lora", base)
    tune = FineTune("base", served) if model == "base" else load_fine_tune(path, served, model)
    kind: Any = "target" if model == "base" else "lora"
    loader = ModelLoader(served, DraftModel.load(draft, dtype=served.dtype))
    assert loader.fingerprint(path) == tune.fingerprint
    workspace = tmp_path / "job"
    workspace.mkdir()
    rows = [{"prompt": f"number {number} and the fox"} for number in range(8)]
    (workspace / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = AdaptationSpec(
        "job-1",
        model,
        "uid",
        kind,
        str(path),
        tune.fingerprint,
        DataSpec("prompts", 8),
        OPTIONS,
        triage=False,
    )
    seen: list[tuple[Sample, TargetStates]] = []
    decoding: list[TargetModel] = []

    def noted(
        fine_tune: FineTune, samples: Sequence[Sample], tap_layers: tuple[int, int, int]
    ) -> list[TargetStates]:
        states = compute_states(fine_tune, samples, tap_layers)
        seen.extend(zip(samples, states, strict=True))
        return states

    def for_models(target: TargetModel, *arguments: Any, **named: Any) -> SpeculativeDecoder:
        decoding.append(target)
        return made(target, *arguments, **named)

    made = SpeculativeDecoder.for_models
    monkeypatch.setattr(target_states, "compute_states", noted)
    monkeypatch.setattr(SpeculativeDecoder, "for_models", for_models)
    models = StageModels.load(spec, target, draft, device="cpu", weights=weights)
    job = StageJob(spec, models, AdapterStore(tmp_path / "adapters"), defaults=DEFAULTS)
    result = run_adaptation(
        spec, workspace, [stage(job) for stage in STAGES], lambda event: None, lambda: False
    )
    assert result.version == 1
    assert decoding
    assert {model.weight_formats for model in decoding} == {formats}
    assert seen
    plain = load_target(base, weights="bfloat16")
    other = FineTune("base", plain) if model == "base" else load_fine_tune(path, plain, model)
    for sample, states in seen[:4]:
        [expected] = compute_states(tune, [sample], (0, 1, 3))
        [rounded] = compute_states(other, [sample], (0, 1, 3))
        for name in ("features", "hidden", "log_normaliser"):
            found: Tensor = getattr(states, name)
            assert torch.equal(found, getattr(expected, name))
            assert not torch.equal(found, getattr(rounded, name))
    loader.private_module(job.store, model, 1, tune.fingerprint)
