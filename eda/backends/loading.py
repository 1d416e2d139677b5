"""Models from disk, on what runs them fastest here."""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from eda.backends.cpu.body import CpuBody
from eda.backends.cpu.library import instruction_set
from eda.backends.cpu.target import obstacle
from eda.backends.cpu.weights import WeightFormat
from eda.errors import MismatchError, UnsupportedModelError
from eda.formats.checkpoint import vocabulary
from eda.formats.checkpoint_files import ADAPTER_CONFIG_FILE, resolve_directory
from eda.formats.config import ModelConfig
from eda.formats.model_files import ModelFiles, open_model
from eda.formats.quantised import QuantisedWeight
from eda.formats.quantised_layers import Keep
from eda.formats.tokenizer_files import load_own_tokenizer
from eda.formats.weight_settings import WeightSetting
from eda.models.fine_tune import FineTune
from eda.models.lora import LoraAdapter
from eda.models.target import EMBEDDING, HEAD, TargetModel, TorchBody

_KEEP: dict[WeightSetting, Keep] = {"auto": "stored", "int8": "int8", "int4": "int4"}
_logger = logging.getLogger(__name__)

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
    weights: WeightSetting = "auto",
    device: torch.device | str = "cpu",
) -> TargetModel:
    """``TargetModel.load`` on the fastest body for it. The model is frozen: its weights may be laid out anew.

    Args:
        weights: ``auto`` keeps a GGUF file's own formats and runs floats in bfloat16 on the C++ passes; where these
            cannot run the model, torch runs it in what it is fast in. ``int8`` and ``int4`` round, on the C++ passes;
            what a file holds in that format already keeps its values.

    Raises:
        CheckpointError, UnsupportedModelError: as ``TargetModel.load`` does; also for 8 or 4 bits where the C++ passes
            cannot run the model.
    """
    files, place = open_model(path_or_hub_id), torch.device(device)
    reason = "weights is float32" if weights == "float32" else obstacle(files.config, place)
    if reason is None:
        return _on_cpu_passes(files, weights)
    if weights in ("int8", "int4"):
        raise UnsupportedModelError(
            f"weights is {weights!r}, which only the C++ passes compute with, and they cannot run {files.path}: "
            f"{reason}; use auto, bfloat16 or float32"
        )
    if any(files.checkpoint.is_quantised(name) for name in files.checkpoint.entries):
        _logger.info("%s: 8 and 4 bits dequantised for torch's passes: %s", files.path, reason)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(weights)
    model = TargetModel.load(files, dtype=dtype, device=place)
    if isinstance(model.body, TorchBody):
        model.body.pack(model)
    return model


def _on_cpu_passes(files: ModelFiles, weights: WeightSetting) -> TargetModel:
    rounding: WeightFormat = weights if weights in ("int8", "int4") else "bfloat16"
    keep = _KEEP.get(weights)
    model = TargetModel.load(files, dtype=torch.bfloat16, keep=keep)
    head = None if keep is None else _quantised_head(files, keep)
    model.body = CpuBody.replacing(model, weights=rounding, head=head)
    return model


def _quantised_head(files: ModelFiles, keep: Keep) -> QuantisedWeight | None:
    """The output layer as a file holds it, in its own format or the nearest values of another."""
    name = HEAD if HEAD in files.checkpoint else EMBEDDING
    head = files.checkpoint.quantised(name)
    return head if head is None or keep == "stored" else head.in_format(keep)[0]


def instructions_of(model: TargetModel) -> str | None:
    """The instruction set of the C++ passes that run ``model``; ``None`` where torch does."""
    return instruction_set() if isinstance(model.body, CpuBody) else None


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
            path,
            base.config,
            base_fingerprint=base.fingerprint,
            base_path=base.path,
            dtype=base.dtype,
            device=base.device,
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
    model = load_target(path, weights=_weights_of(base), device=base.device)
    return FineTune(name, model, tokenizer=tokenizer)


def _weights_of(base: TargetModel) -> WeightSetting:
    """What full fine-tunes of ``base`` are loaded with: they share its cache, so never another type."""
    if isinstance(base.body, CpuBody):
        return base.body.rounding
    return "float32" if base.dtype == torch.float32 else "bfloat16"


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
