"""Fingerprints of model directories: equal for equal weights however they are stored, cheap for any size."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eda.formats.checkpoint import Checkpoint, WeightSource
from eda.formats.checkpoint_files import ADAPTER_CONFIG_FILE, read_json
from eda.formats.config import ModelConfig
from eda.formats.lora_config import LoraConfig

_SAMPLE_BYTES = 4096
# What else decides the function that a LoRA computes; everything else in its config is about training.
_LORA_FIELDS = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
)


def fingerprint_directory(path: Path) -> str:
    """SHA-256 (hex) of a checkpoint or a PEFT adapter.

    Covers the config fields that decide what the model computes, and each tensor's name, type, shape and the first,
    middle and last 4 KiB of its contents. File names, sharding, tensor order and end-of-sequence tokens do not count.
    A change that lies between the samples is not seen: this guards against mixing up models, not against forgery.

    Raises:
        CheckpointError: the directory cannot be read as a model.
    """
    path = Path(path)
    if (path / ADAPTER_CONFIG_FILE).exists():
        LoraConfig.from_directory(path)  # refuses what is none
        raw = read_json(path / ADAPTER_CONFIG_FILE)
        fields = {name: raw.get(name) for name in _LORA_FIELDS}
        fields["modules_to_save"] = sorted(fields["modules_to_save"] or [])
        return _fingerprint(fields, Checkpoint.of_adapter(path))
    return fingerprint_model(ModelConfig.from_directory(path), Checkpoint.of_model(path))


def fingerprint_model(config: ModelConfig, checkpoint: WeightSource) -> str:
    """SHA-256 (hex) of a model in files of any format, as ``fingerprint_directory`` describes it.

    Formats differ in the bytes of their tensors, so the same weights as safetensors and as GGUF count as two models.
    """
    return _fingerprint(_canonical(config), checkpoint)


def _canonical(config: ModelConfig) -> dict[str, Any]:
    fields = asdict(config)
    del fields["eos_token_ids"]  # when to stop is no property of the weights
    del fields["dtype"]  # the tensors state theirs
    return fields


def _fingerprint(fields: Mapping[str, Any], checkpoint: WeightSource) -> str:
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, entry in sorted(checkpoint.entries.items()):
        digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
        size = entry.end - entry.start
        offsets = {0, max(0, (size - _SAMPLE_BYTES) // 2), max(0, size - _SAMPLE_BYTES)}
        with entry.file.open("rb") as stream:
            for offset in sorted(offsets):
                stream.seek(entry.start + offset)
                digest.update(stream.read(min(_SAMPLE_BYTES, size - offset)))
    return digest.hexdigest()
