"""Models from disk, on what runs them fastest here."""

from dataclasses import replace
from pathlib import Path

import torch

from eda.backends.cpu.body import CpuBody
from eda.backends.cpu.target import supports
from eda.errors import MismatchError
from eda.formats.checkpoint import vocabulary
from eda.formats.checkpoint_files import ADAPTER_CONFIG_FILE, resolve_directory
from eda.formats.config import ModelConfig
from eda.formats.model_files import open_model
from eda.formats.tokenizer_files import load_own_tokenizer
from eda.models.fine_tune import FineTune
from eda.models.lora import LoraAdapter
from eda.models.target import TargetModel, TorchBody

# A fine-tune shares the base's draft, whose cache and features have these sizes.
_SHARED_SIZES = (
    "architecture",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
)


def load_target(
    path_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> TargetModel:
    """``TargetModel.load`` on the fastest body for it. The model is frozen: its weights may be laid out anew.

    Without a ``dtype`` it computes in bfloat16 where the C++ passes run it.

    Raises what ``TargetModel.load`` raises.
    """
    if dtype is None and supports(open_model(path_or_hub_id).config, torch.bfloat16, torch.device(device)):
        dtype = torch.bfloat16
    model = TargetModel.load(path_or_hub_id, dtype=dtype, device=device)
    if supports(model.config, model.dtype, model.device):
        model.body = CpuBody.replacing(model)
    elif isinstance(model.body, TorchBody):
        model.body.pack(model)
    return model


def load_fine_tune(path_or_hub_id: str | Path, base: TargetModel, name: str) -> FineTune:
    """A fine-tune of ``base``: a PEFT LoRA directory, or a full checkpoint of the same sizes and vocabulary.

    Raises:
        CheckpointError: unreadable or unsafe.
        UnsupportedModelError: an adapter kind or architecture that is not implemented.
        MismatchError: made for another base, or a full checkpoint with other sizes or another vocabulary.
    """
    path = resolve_directory(path_or_hub_id)
    _check_vocabulary(path, base)
    tokenizer = None
    if base.path is not None and path != base.path:
        tokenizer = load_own_tokenizer(path, base.path, base.config.vocab_size)
    if (path / ADAPTER_CONFIG_FILE).exists():
        lora = LoraAdapter.load(
            path, base.config, base_fingerprint=base.fingerprint, dtype=base.dtype, device=base.device
        )
        return FineTune(name, base, _without_copies(lora, base), tokenizer)
    config = ModelConfig.from_directory(path)
    differing = [
        f"{field} {getattr(config, field)} (base: {getattr(base.config, field)})"
        for field in _SHARED_SIZES
        if getattr(config, field) != getattr(base.config, field)
    ]
    if differing:
        raise MismatchError(f"{path} is no fine-tune of this base: {', '.join(differing)}")
    model = load_target(path, dtype=base.dtype, device=base.device)
    return FineTune(name, model, tokenizer=tokenizer)


def _check_vocabulary(path: Path, base: TargetModel) -> None:
    theirs = vocabulary(path)
    ours = vocabulary(base.path) if theirs is not None and base.path is not None else None
    if theirs is not None and ours is not None and theirs != ours:
        raise MismatchError(
            f"{path / 'tokenizer.json'} has another vocabulary ({len(theirs)} entries) than the base's "
            f"{base.path} ({len(ours)} entries)"
        )


def _without_copies(lora: LoraAdapter, base: TargetModel) -> LoraAdapter:
    """PEFT saves the base's embedding and head along with a LoRA on them; copies of the base's are dropped."""
    embedding, head = lora.embedding_weight, lora.head_weight
    return replace(
        lora,
        embedding_weight=None if embedding is None or torch.equal(embedding, base.embedding) else embedding,
        head_weight=None if head is None or torch.equal(head, base.head) else head,
    )
