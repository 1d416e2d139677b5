"""Tiny random models on disk, written with transformers and PEFT, for tests of every layer."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


def tiny_target(
    directory: Path,
    architecture: str = "llama",
    *,
    seed: int = 0,
    tokenizer: bool = False,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Writes a random float32 checkpoint into ``directory`` and returns it.

    Args:
        architecture: one of ``ARCHITECTURES``.
        tokenizer: also write a byte-level tokenizer (ids 0 to 255 are bytes, then ``<s>`` and ``</s>``).
        max_shard_size: as in ``save_pretrained``; a small value makes several shards.
        overrides: fields of the transformers config that differ from ``SIZES``.
    """
    config = AutoConfig.for_model(architecture, **{**SIZES, **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    if tokenizer:
        tiny_tokenizer(directory)
    return directory


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that attention, biases and norms all move the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1.0 + 0.2 * noise)
            else:
                weight.copy_(noise * (0.3 if weight.dim() == 1 else 1.5 / weight.shape[1] ** 0.5))


def tiny_lora(
    directory: Path,
    base: Path,
    *,
    r: int = 4,
    targets: Sequence[str] = ALL_LINEAR,
    seed: int = 1,
    **overrides: Any,
) -> Path:
    """Writes a random PEFT LoRA of the checkpoint ``base`` into ``directory`` and returns it.

    ``overrides`` are further fields of ``LoraConfig`` (``use_rslora``, ``modules_to_save``, ...).
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"lora_alpha": 8, "init_lora_weights": False, **overrides}
    adapted = get_peft_model(model, LoraConfig(r=r, target_modules=list(targets), **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
            elif "modules_to_save" in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT announces that it saves embeddings too; that is wanted
        adapted.save_pretrained(directory)
    return directory


def tiny_tokenizer(directory: Path) -> Path:
    """Writes a byte-level ``tokenizer.json`` with a chat template into ``directory`` and returns it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def edit_json(path: Path, **changes: Any) -> None:
    """Overwrites fields of a JSON object on disk; a value of ``...`` removes the field."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for name, value in changes.items():
        if value is ...:
            content.pop(name, None)
        else:
            content[name] = value
    path.write_text(json.dumps(content), encoding="utf-8")
