"""Tiny GGUF files, written with the gguf package from checkpoints that transformers wrote."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

TYPES = gguf.GGMLQuantizationType
_NAMES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
ALPHABET = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144)]
"""The characters that byte-level vocabularies write bytes as; the last 68 stand for what cannot be printed."""


def permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """As llama.cpp's converter orders query and key rows of a Llama."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    checkpoint: Path,
    file: Path,
    kind: TYPES = TYPES.F32,
    *,
    fields: dict[str, Any] | None = None,
    divisors: list[float] | None = None,
    raw: dict[str, tuple[np.ndarray, TYPES]] | None = None,
    tokens: bool = True,
) -> Path:
    """Writes the model in ``checkpoint`` (one safetensors file) to ``file``.

    Args:
        kind: of all matrices whose rows have whole blocks; vectors are float32.
        fields: unsigned integers, floats and strings that are set, or left out where ``None``, by their whole keys.
        divisors: of the rotary frequencies.
        raw: stored bytes that replace those of a tensor, by the file's names.
        tokens: also write a byte-level tokenizer with ``<s>`` and ``</s>``.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    architecture = _NAMES[config["model_type"]].lower()
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    values: dict[str, Any] = {
        f"{architecture}.{key}": value
        for key, value in {
            "block_count": config["num_hidden_layers"],
            "context_length": config["max_position_embeddings"],
            "embedding_length": config["hidden_size"],
            "feed_forward_length": config["intermediate_size"],
            "attention.head_count": heads,
            "attention.head_count_kv": kv_heads,
            "attention.key_length": config["head_dim"],
            "attention.value_length": config["head_dim"],
            "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
            "rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
            "rope.dimension_count": config["head_dim"],
        }.items()
    }
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in (values | (fields or {})).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
    if tokens:
        _add_tokens(writer, config["vocab_size"])
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[_NAMES[config["model_type"]]], config["num_hidden_layers"]
    )
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            weight = permuted(weight, heads if ".q_proj." in name else kv_heads)
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if raw and own in raw:
            writer.add_tensor(own, raw[own][0], raw_dtype=raw[own][1])
            continue
        block = gguf.GGML_QUANT_SIZES[kind][0]
        used = kind if weight.dim() == 2 and weight.shape[1] % block == 0 else TYPES.F32
        writer.add_tensor(own, gguf.quants.quantize(weight.float().numpy(), used), raw_dtype=used)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokens(writer: gguf.GGUFWriter, size: int) -> None:
    tokens = [*map(chr, ALPHABET), "<s>", "</s>", "th", "the"]
    unused = [f"[PAD{index}]" for index in range(len(tokens), size)]
    kinds = gguf.TokenType
    types = [kinds.NORMAL] * 256 + [kinds.CONTROL] * 2 + [kinds.NORMAL] * 2 + [kinds.UNUSED] * len(unused)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens + unused)
    writer.add_token_types(types)
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(False)
    writer.add_chat_template(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    )
