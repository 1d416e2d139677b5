"""The GGUF that llama.cpp is given: rotary order, names, and what a reader of the format finds in it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.peers.gguf_file import gguf_name, interleave_rotary, write_gguf
from benchmarks.peers.interface import MissingPeerError
from tests.support.tiny import edit_json, tiny_target


def rotate_halves(vector: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """As Hugging Face rotates a head: element i with element i + half."""
    half = len(vector) // 2
    first, second = vector[:half], vector[half:]
    return np.concatenate(
        [
            first * np.cos(angles) - second * np.sin(angles),
            second * np.cos(angles) + first * np.sin(angles),
        ]
    )


def rotate_pairs(vector: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """As llama.cpp rotates a head: element 2i with element 2i + 1."""
    first, second = vector[0::2], vector[1::2]
    rotated = np.empty_like(vector)
    rotated[0::2] = first * np.cos(angles) - second * np.sin(angles)
    rotated[1::2] = second * np.cos(angles) + first * np.sin(angles)
    return rotated


def test_interleaved_rows_give_the_same_scores() -> None:
    chance = np.random.default_rng(0)
    heads, head_dim, width = 3, 8, 5
    query, key = chance.normal(size=(2, heads * head_dim, width))
    hidden, other = chance.normal(size=(2, width))
    angles = 10.0 * chance.random(head_dim // 2)
    interleaved = [interleave_rotary(weight, heads) for weight in (query, key)]
    for head in range(heads):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        expected = rotate_halves(query[rows] @ hidden, 2 * angles) @ rotate_halves(key[rows] @ other, angles)
        found = rotate_pairs(interleaved[0][rows] @ hidden, 2 * angles) @ rotate_pairs(
            interleaved[1][rows] @ other, angles
        )
        assert found == pytest.approx(expected)


def test_interleaving_a_bias_moves_the_same_rows() -> None:
    weight = np.arange(8.0)[:, None]
    assert interleave_rotary(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleave_rotary(weight[:, 0], 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_names() -> None:
    assert gguf_name("model.embed_tokens.weight") == "token_embd.weight"
    assert gguf_name("model.layers.11.self_attn.o_proj.weight") == "blk.11.attn_output.weight"
    with pytest.raises(ValueError, match="q_norm"):
        gguf_name("model.layers.0.self_attn.q_norm.weight")


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_holds_every_tensor_once_and_the_sizes(tmp_path: Path, tied: bool) -> None:
    gguf = pytest.importorskip("gguf")
    source = tiny_target(tmp_path / "target", tokenizer=True, tie_word_embeddings=tied)
    path = write_gguf(source, tmp_path / "model.gguf", "F32")
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    weights = load_file(source / "model.safetensors")
    assert len(tensors) == len(weights)
    assert ("output.weight" in tensors) is not tied
    embedding = weights["model.embed_tokens.weight"].numpy()
    assert np.array_equal(tensors["token_embd.weight"].reshape(embedding.shape), embedding)
    query = weights["model.layers.1.self_attn.q_proj.weight"].numpy()
    assert np.array_equal(tensors["blk.1.attn_q.weight"].reshape(query.shape), interleave_rotary(query, 4))
    assert reader.get_field("llama.attention.head_count_kv").contents() == 2
    assert reader.get_field("llama.rope.dimension_count").contents() == 8
    assert len(reader.get_field("tokenizer.ggml.tokens").contents()) == 320


def test_bfloat16_is_kept_exactly(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source = tiny_target(tmp_path / "target", tokenizer=True)
    reader = gguf.GGUFReader(write_gguf(source, tmp_path / "model.gguf", "BF16"))
    [tensor] = [tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_down.weight"]
    weight = load_file(source / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    stored = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    assert torch.equal(stored.reshape(weight.shape), weight.to(torch.bfloat16).float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "qwen2"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "yarn"),
    ],
)
def test_what_is_no_plain_llama_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    pytest.importorskip("gguf")
    source = tiny_target(tmp_path / "target", tokenizer=True)
    edit_json(source / "config.json", **change)
    with pytest.raises(MissingPeerError, match=message):
        write_gguf(source, tmp_path / "model.gguf", "F32")
