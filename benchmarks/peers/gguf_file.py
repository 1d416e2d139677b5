"""Writing a Llama checkpoint as GGUF, the file format of llama.cpp."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from benchmarks.peers.interface import MissingPeerError, require

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE_LAYERS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def interleave_rotary(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Rows of a query or key projection in the order that llama.cpp rotates them.

    Hugging Face rotates element ``i`` of a head with ``i + head_dim / 2``, llama.cpp ``2 * i`` with ``2 * i + 1``. The
    same rows in another order give the same attention scores.
    """
    rows = weight.shape[0]
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name: str) -> str:
    """A tensor's name in GGUF. Raises ``ValueError`` for one that a Llama does not have."""
    if name in OUTSIDE_LAYERS:
        return OUTSIDE_LAYERS[name]
    parts = name.split(".")
    if parts[:2] == ["model", "layers"] and len(parts) > 4:
        inner = NAMES.get(".".join(parts[3:-1]))
        if inner is not None:
            return f"blk.{parts[2]}.{inner}.{parts[-1]}"
    raise ValueError(f"{name} has no place in a Llama of GGUF")


@dataclass(frozen=True, slots=True)
class GgufSizes:
    """What a Llama's GGUF says of its shape."""

    context_length: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    vocab_size: int


def add_sizes(writer: Any, sizes: GgufSizes) -> None:
    """Writes ``sizes`` into the metadata of a ``GGUFWriter``."""
    writer.add_context_length(sizes.context_length)
    writer.add_embedding_length(sizes.hidden_size)
    writer.add_block_count(sizes.num_layers)
    writer.add_feed_forward_length(sizes.intermediate_size)
    writer.add_head_count(sizes.num_heads)
    writer.add_head_count_kv(sizes.num_kv_heads)
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_rope_dimension_count(sizes.head_dim)
    writer.add_rope_freq_base(sizes.rope_theta)
    writer.add_layer_norm_rms_eps(sizes.rms_norm_eps)
    writer.add_vocab_size(sizes.vocab_size)


def finish(writer: Any) -> None:
    """Writes everything that a ``GGUFWriter`` was given to its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(checkpoint: Path, destination: Path, kind: str) -> Path:
    """Writes ``checkpoint`` (a plain Llama with tokenizer.json) to ``destination`` unless it is there.

    Args:
        kind: type of the matrices: ``F32``, ``BF16`` or ``Q8_0``. Vectors are float32, as llama.cpp wants them.

    Raises:
        MissingPeerError: the gguf package is not installed, or the checkpoint is no plain Llama.
    """
    gguf = require("gguf", "gguf")
    if destination.exists():
        return destination
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10_000.0),
        **(config.get("rope_scaling") or {}),
    }
    rope_type = rope.get("rope_type", "default")
    if config["model_type"] != "llama" or rope_type != "default":
        raise MissingPeerError(
            f"GGUF is written for plain Llama models; this is {config['model_type']} with rope {rope_type}"
        )
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads

    sizes = GgufSizes(
        context_length=config["max_position_embeddings"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=float(rope["rope_theta"]),
        rms_norm_eps=config["rms_norm_eps"],
        vocab_size=config["vocab_size"],
    )
    unfinished = destination.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, "llama")
    add_sizes(writer, sizes)
    writer.add_file_type(
        {"F32": gguf.LlamaFileType.ALL_F32, "BF16": gguf.LlamaFileType.MOSTLY_BF16}.get(
            kind, gguf.LlamaFileType.MOSTLY_Q8_0
        )
    )
    _add_vocabulary(gguf, writer, checkpoint, config)

    matrix_type = gguf.GGMLQuantizationType[kind]
    for name, tensor in _tensors(checkpoint):
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        values = tensor.to(torch.float32).numpy()
        if ".self_attn.q_proj." in name:
            values = interleave_rotary(values, heads)
        elif ".self_attn.k_proj." in name:
            values = interleave_rotary(values, kv_heads)
        type_here = matrix_type if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        stored = gguf.quants.quantize(np.ascontiguousarray(values), type_here)
        writer.add_tensor(gguf_name(name), stored, raw_dtype=type_here)
    finish(writer)
    unfinished.rename(destination)
    return destination


def _tensors(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file.get_tensor(name)


def _add_vocabulary(gguf: Any, writer: Any, checkpoint: Path, config: dict[str, Any]) -> None:
    """Byte-level BPE from tokenizer.json. Prompts are fed as ids, so how llama.cpp would split text does not matter."""
    path = checkpoint / "tokenizer.json"
    if not path.exists():
        raise MissingPeerError(f"GGUF needs a vocabulary and {path} does not exist")
    document = json.loads(path.read_text(encoding="utf-8"))
    model, added = document["model"], document.get("added_tokens", [])
    if model["type"] != "BPE":
        raise MissingPeerError(f"GGUF is written for BPE tokenizers; this one is {model['type']}")
    tokens = {index: token for token, index in model["vocab"].items()}
    tokens |= {entry["id"]: entry["content"] for entry in added}
    special = {entry["id"] for entry in added if entry["special"]}
    size = config["vocab_size"]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens.get(index, f"<unused-{index}>") for index in range(size)])
    writer.add_token_types(
        [
            kinds.CONTROL if index in special else kinds.NORMAL if index in tokens else kinds.UNUSED
            for index in range(size)
        ]
    )
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    )
    end = config.get("eos_token_id")
    first = end[0] if isinstance(end, list) else end
    if first is not None:
        writer.add_eos_token_id(first)
        # Without an entry of its own llama.cpp assumes an id that this vocabulary may use for something else.
        writer.add_bos_token_id(config.get("bos_token_id") or first)
    writer.add_add_bos_token(False)
