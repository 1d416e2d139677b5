"""A fine-tune as one plain checkpoint: what engines without adapters are given."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.interface import MissingPeerError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)


def write_plain_checkpoint(base: Path, fine_tune: Path, destination: Path) -> Path:
    """Writes ``fine_tune`` (a full checkpoint, or a PEFT LoRA of ``base``) to ``destination`` unless it is there.

    A LoRA is merged in float32 and rounded once, to the base's own type. Raises ``MissingPeerError`` for a LoRA where
    peft is not installed.
    """
    if (destination / "config.json").exists():
        return destination
    unfinished = destination.with_name(destination.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    if (fine_tune / "adapter_config.json").exists():
        model = _merged(base, fine_tune)
    else:
        model = AutoModelForCausalLM.from_pretrained(fine_tune)
    model.save_pretrained(unfinished)
    for name in TOKENIZER_FILES:
        if (base / name).exists():
            shutil.copy(base / name, unfinished / name)
    unfinished.rename(destination)
    return destination


def write_plain_from_gguf(path: Path, destination: Path) -> Path:
    """Writes what a GGUF file's values are in bfloat16, read by transformers, unless ``destination`` is there."""
    if (destination / "config.json").exists():
        return destination
    unfinished = destination.with_name(destination.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    # Nothing is quantised any more, but transformers goes by where the weights came from.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(unfinished)
    unfinished.rename(destination)
    return destination


def _merged(base: Path, lora: Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingPeerError(f"peft is not installed, so the LoRA {lora.name} cannot be merged") from error
    model = AutoModelForCausalLM.from_pretrained(base)
    stored = model.dtype
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # peft asks transformers for a property by its old name
        merged = PeftModel.from_pretrained(model.to(torch.float32), lora).merge_and_unload()
    return merged.to(stored)
