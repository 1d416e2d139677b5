"""A GGUF of random weights: the cost of a pass does not depend on what the weights say."""

from pathlib import Path

import numpy as np

from benchmarks.peers.gguf_file import GgufSizes, add_sizes, finish
from benchmarks.peers.interface import require
from eda.formats.config import ModelConfig


def write_random_gguf(config: ModelConfig, destination: Path) -> Path:
    """Writes a Llama of ``config``'s sizes in bfloat16, its output layer tied, unless ``destination`` is there.

    Its tokens are numbers, so it cannot split a text. Raises ``MissingPeerError`` without the gguf package.
    """
    gguf = require("gguf", "gguf")
    if destination.exists():
        return destination
    unfinished = destination.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, "llama")
    add_sizes(
        writer,
        GgufSizes(
            context_length=config.max_position_embeddings,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rope_theta=10000.0,
            rms_norm_eps=config.rms_norm_eps,
            vocab_size=config.vocab_size,
        ),
    )
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"<{index}>" for index in range(config.vocab_size)])
    writer.add_token_merges(["< 0"])
    chance = np.random.default_rng(0)
    types = gguf.GGMLQuantizationType

    def add(name: str, rows: int, columns: int) -> None:
        values = (chance.standard_normal((rows, columns), dtype=np.float32)) * np.float32(0.05)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, types.BF16), raw_dtype=types.BF16)

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(config.hidden_size, np.float32))

    width, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
    add("token_embd", config.vocab_size, width)
    add_norm("output_norm")
    for layer in range(config.num_layers):
        add_norm(f"blk.{layer}.attn_norm")
        add_norm(f"blk.{layer}.ffn_norm")
        add(f"blk.{layer}.attn_q", heads * config.head_dim, width)
        add(f"blk.{layer}.attn_k", kv_heads * config.head_dim, width)
        add(f"blk.{layer}.attn_v", kv_heads * config.head_dim, width)
        add(f"blk.{layer}.attn_output", width, heads * config.head_dim)
        add(f"blk.{layer}.ffn_gate", config.intermediate_size, width)
        add(f"blk.{layer}.ffn_up", config.intermediate_size, width)
        add(f"blk.{layer}.ffn_down", width, config.intermediate_size)
    finish(writer)
    unfinished.rename(destination)
    return destination
