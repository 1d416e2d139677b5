"""Tiny models whose weights bfloat16 holds exactly, so that errors against float32 are those of the computation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eda.backends.cpu.body import CpuBody
from eda.backends.cpu.weights import WeightFormat
from eda.backends.loading import load_fine_tune, load_target
from eda.formats.quantised import QuantisedWeight
from eda.models.draft import DraftConfig, DraftModel
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateConfig, PrivateModule
from eda.models.target import TargetModel, TargetOutput
from tests.support.tiny import randomise, tiny_lora, tiny_target


def narrow_target(directory: Path, architecture: str = "llama", **overrides: Any) -> Path:
    """``tiny_target`` with rounded weights, in float32 files."""
    path = tiny_target(directory, architecture, **overrides)
    _round_file(path / "model.safetensors")
    return path


def narrow_lora(directory: Path, base: Path, **settings: Any) -> Path:
    """``tiny_lora`` with rounded weights."""
    path = tiny_lora(directory, base, **settings)
    _round_file(path / "adapter_model.safetensors")
    return path


def narrow_draft(config: DraftConfig, seed: int = 0) -> tuple[DraftModel, DraftModel]:
    """The same random draft in bfloat16 and in float32."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(config.vocab_size, generator=generator)[: config.draft_vocab_size].sort().values
    draft = DraftModel(config, chosen)
    randomise(draft, seed)
    narrow = draft.bfloat16().requires_grad_(False)
    wide = DraftModel(config, chosen)
    wide.load_state_dict(narrow.state_dict())
    return narrow, wide.requires_grad_(False)


def narrow_module(config: PrivateConfig, seed: int, scale: float = 0.2) -> PrivateModule:
    """A random private module, float32 as they are served."""
    module = PrivateModule(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.normal_(0.0, scale, generator=generator)
        parameter.copy_(parameter.bfloat16())
    return module


def load(path: Path, *, kernel: bool = True, weights: WeightFormat = "bfloat16") -> TargetModel:
    """The model in bfloat16, on the C++ passes or on torch; the first may round its weights."""
    with pytest.MonkeyPatch.context() as patch:
        if not kernel or weights != "bfloat16":
            patch.setattr("eda.backends.loading.obstacle", lambda *_: "not in this test")
        model = load_target(path, weights="bfloat16")
    if kernel and weights != "bfloat16":
        use_kernel(model, weights=weights)
    assert isinstance(model.body, CpuBody) is kernel
    return model


def use_kernel(
    model: TargetModel, head: QuantisedWeight | None = None, weights: WeightFormat = "bfloat16"
) -> None:
    """Moves a model from torch to the C++ passes."""
    model.body = CpuBody.replacing(model, weights=weights, head=head)


@contextmanager
def outputs_of(model: TargetModel) -> Iterator[list[TargetOutput]]:
    """Collects what the model's passes return."""
    found: list[TargetOutput] = []
    handle = model.register_forward_hook(lambda module, given, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()


def mean_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Mean distance, relative to the mean size of what is expected."""
    distance = torch.cat([(a.float() - b).abs().flatten() for a, b in zip(found, expected, strict=True)])
    return float(distance.mean() / torch.cat([part.abs().flatten() for part in expected]).mean())


VOCAB_SIZE = 26  # so few tokens that a random draft is right now and then


@dataclass
class NarrowFamily:
    """A target, LoRAs on it, a draft and private modules, all random."""

    fine_tunes: dict[str, FineTune]
    draft: DraftModel
    modules: list[PrivateModule | None]

    @property
    def base(self) -> TargetModel:
        return self.fine_tunes["base"].model


def make_narrow_family(directory: Path) -> NarrowFamily:
    """Everything is of odd sizes."""
    base_path = narrow_target(
        directory / "base", hidden_size=48, head_dim=32, intermediate_size=56, vocab_size=VOCAB_SIZE
    )
    base = load(base_path)
    loras = {
        "inner": {"targets": ["q_proj", "v_proj", "down_proj"], "r": 5},
        "deep": {"targets": ["k_proj", "gate_proj", "o_proj"], "r": 3, "layers_to_transform": [1, 3]},
    }
    fine_tunes = {"base": FineTune("base", base)}
    for name, settings in loras.items():
        path = narrow_lora(directory / name, base_path, **settings)
        fine_tunes[name] = load_fine_tune(path, base, name)
    config = DraftConfig(
        hidden_size=48,
        intermediate_size=40,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        tap_layers=(0, 1, 3),
        vocab_size=VOCAB_SIZE,
        draft_vocab_size=23,
        max_position_embeddings=128,
        target_fingerprint=base.fingerprint,
    )
    modules = [
        None,
        narrow_module(config.private_config(20, 3, 5), 1),
        narrow_module(config.private_config(50, 0), 2),
    ]
    return NarrowFamily(fine_tunes, narrow_draft(config)[0], modules)


def _round_file(path: Path) -> None:
    weights = {name: weight.bfloat16().float() for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
