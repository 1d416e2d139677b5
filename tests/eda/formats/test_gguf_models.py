"""Targets in GGUF files: the same model as the checkpoint that they were written from, or a refusal that says why."""

import logging
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import TYPES, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from eda.backends.loading import load_target
from eda.errors import CheckpointError, EdaError, UnsupportedModelError
from eda.formats.gguf_file.checkpoint import GgufCheckpoint
from eda.formats.gguf_file.header import GgufHeader
from eda.formats.model_files import open_model
from eda.formats.quantised import quantised
from eda.formats.tokenizer_files import load_tokenizer
from tests.support.passes import assert_equal_logits, complete, random_tokens, reference, reference_logits
from tests.support.tiny import ARCHITECTURES, tiny_target

WIDE = {"intermediate_size": 64}  # whole groups of 32 in every matrix
TOKENS = random_tokens(24, seed=3)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("stored"), num_hidden_layers=3, **WIDE)


@pytest.fixture(scope="module")
def sound(stored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(stored, tmp_path_factory.mktemp("sound") / "sound.gguf")


def logits(path: Path) -> torch.Tensor:
    return complete(load_target(path, weights="float32"), TOKENS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_architecture_gives_the_logits_of_its_checkpoint(
    tmp_path: Path, architecture: str, tied: bool
) -> None:
    checkpoint = tiny_target(tmp_path / "hf", architecture, tie_word_embeddings=tied)
    found = logits(write_gguf(checkpoint, tmp_path / "model.gguf"))
    assert_equal_logits(found, reference_logits(reference(checkpoint), TOKENS))


def test_transformers_own_reader_gives_the_same_logits(sound: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(sound.parent, gguf_file=sound.name, dtype=torch.float32)
    assert_equal_logits(logits(sound), reference_logits(model.eval(), TOKENS))


def test_biases_of_a_llama_are_found_and_their_rows_put_back(tmp_path: Path) -> None:
    checkpoint = tiny_target(tmp_path / "hf", attention_bias=True, mlp_bias=True)
    found = logits(write_gguf(checkpoint, tmp_path / "model.gguf"))
    assert_equal_logits(found, reference_logits(reference(checkpoint), TOKENS))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_these_types_keep_their_own_values(tmp_path: Path, stored: Path, kind: str) -> None:
    file = write_gguf(stored, tmp_path / "model.gguf", TYPES[kind])
    rounded = shutil.copytree(stored, tmp_path / "rounded")
    weights = {
        name: torch.from_numpy(
            gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), TYPES[kind]), TYPES[kind])
        )
        if weight.dim() == 2
        else weight
        for name, weight in load_file(stored / "model.safetensors").items()
    }
    save_file(weights, rounded / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_model(file).checkpoint
    for name, weight in weights.items():
        assert torch.equal(checkpoint.tensor(name).float(), weight), name
        own = checkpoint.quantised(name)
        if weight.dim() == 2 and kind.startswith("Q"):
            assert own is not None
            assert own.format == ("int8" if kind == "Q8_0" else "int4")
            assert torch.equal(own.dequantised(), weight), name
        else:
            assert own is None
    assert_equal_logits(logits(file), reference_logits(reference(rounded), TOKENS))


def test_other_quantised_types_become_8_bits_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = tiny_target(tmp_path / "hf", num_hidden_layers=1, intermediate_size=256)
    chance = np.random.default_rng(0)
    rows = chance.integers(0, 256, (32, 210), dtype=np.uint8)
    rows[:, 208:] = np.array([0.01], np.float16).view(np.uint8)  # the block's own scale
    raw = {"blk.0.ffn_down.weight": (rows, TYPES.Q6_K)}
    file = write_gguf(checkpoint, tmp_path / "model.gguf", TYPES.Q5_0, raw=raw)
    with caplog.at_level(logging.INFO, "eda"):
        found = GgufCheckpoint.open(file)
    assert "converted to 8 bits in groups of 32: 8 of Q5_0, 1 of Q6_K" in caplog.text
    expected = quantised(torch.from_numpy(gguf.quants.dequantize(rows, TYPES.Q6_K)), "int8")
    own = found.quantised("model.layers.0.mlp.down_proj.weight")
    assert own is not None
    assert torch.equal(own.steps, expected.steps)
    assert torch.equal(own.scales, expected.scales)
    assert torch.equal(found.tensor("model.layers.0.mlp.down_proj.weight"), expected.dequantised())


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_scaled_rotary_embeddings(tmp_path: Path, kind: str) -> None:
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    fields: dict[str, Any] = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 2.0}
    divisors = None
    if kind == "yarn":
        parameters["original_max_position_embeddings"] = 64
        fields["llama.rope.scaling.original_context_length"] = 64
    if kind == "llama3":
        parameters, fields = parameters | LLAMA3, {}
        divisors = _llama3_divisors(8, parameters)
    checkpoint = tiny_target(tmp_path / "hf", rope_parameters=parameters)
    file = write_gguf(checkpoint, tmp_path / "model.gguf", fields=fields, divisors=divisors)
    assert_equal_logits(logits(file), reference_logits(reference(checkpoint), TOKENS))


def _llama3_divisors(head_dim: int, parameters: dict[str, Any]) -> list[float]:
    """As llama.cpp's converter computes ``rope_freqs.weight``."""
    old, low, high = (
        parameters[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    divisors = []
    for pair in range(head_dim // 2):
        length = 2 * np.pi * parameters["rope_theta"] ** (2 * pair / head_dim)
        smooth = (old / length - low) / (high - low)
        smooth = min(max(smooth, 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / parameters["factor"] + smooth))
    return divisors


def test_the_header_agrees_with_the_gguf_package(sound: Path) -> None:
    header, reader = GgufHeader.read(sound), gguf.GGUFReader(sound)
    assert set(header.tensors) == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        entry = header.tensors[tensor.name]
        assert (entry.start, entry.end - entry.start) == (tensor.data_offset, tensor.n_bytes)
        assert (entry.dtype, list(entry.shape)) == (tensor.tensor_type.name, tensor.shape.tolist()[::-1])
    own = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert set(header.fields) == set(own)
    for key, field in own.items():
        found = header.fields[key]
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == field.contents(), key


def test_the_fingerprint_follows_the_contents(tmp_path: Path, stored: Path, sound: Path) -> None:
    again = write_gguf(stored, tmp_path / "again.gguf", tokens=False)
    assert open_model(again).fingerprint == open_model(sound).fingerprint == load_target(sound).fingerprint
    others = [
        write_gguf(stored, tmp_path / "q8.gguf", TYPES.Q8_0),
        write_gguf(stored, tmp_path / "theta.gguf", fields={"llama.rope.freq_base": 500.0}),
    ]
    assert len({open_model(path).fingerprint for path in [sound, *others]}) == 3


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("general.architecture", "mamba", "supported are llama, qwen2, qwen3"),
        ("llama.block_count", 10**9, "a whole number from 1 to"),
        ("llama.block_count", 2, "without use in this architecture: blk.2."),
        ("llama.block_count", None, "llama.block_count is missing"),
        ("llama.block_count", 3.0, "a whole number"),
        ("llama.embedding_length", 2**31, "a whole number"),
        ("llama.embedding_length", 64, "misshapen"),
        (
            "llama.feed_forward_length",
            2**20,
            "ffn_gate.weight is [64, 32], the metadata asks for [1048576, 32]",
        ),
        ("llama.attention.head_count", 0, "a whole number from 1"),
        ("llama.attention.head_count_kv", 3, "a divisor of the 4 heads"),
        ("llama.attention.key_length", 16, "value_length is 8; the head's size, 16, is supported"),
        ("llama.rope.dimension_count", 4, "the head's size, 8, is supported"),
        ("llama.context_length", 2**32 - 1, "a whole number from 1 to"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "a number from"),
        ("llama.rope.freq_base", -1.0, "a number from 1"),
        ("llama.rope.scaling.type", "longrope", "'longrope'; supported are 'none', 'linear' and 'yarn'"),
        ("llama.vocab_size", 5, "a whole number from 320 to 320"),
        ("llama.expert_count", 8, "not implemented"),
        ("split.count", 3, "one whole file is needed"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, stored: Path, field: str, value: Any, words: str) -> None:
    if field == "general.architecture":
        file = tmp_path / "model.gguf"
        write_gguf(stored, file, tokens=False)
        file.write_bytes(
            file.read_bytes().replace(struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 5) + b"mamba", 1)
        )
    else:
        shared = {"llama.rope.scaling.factor": 2.0} if "scaling" in field else {}
        file = write_gguf(stored, tmp_path / "model.gguf", fields={**shared, field: value})
    with pytest.raises(CheckpointError) as raised:
        load_target(file)
    assert str(file) in str(raised.value)
    assert words in str(raised.value)


def test_what_is_no_file_or_no_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    with pytest.raises(CheckpointError, match=r"model\.gguf cannot be read"):
        load_target(file)
    for content, words in (
        (b"", "begins with b''"),
        (b"PK\x03\x04 and more", "a GGUF file begins with b'GGUF'"),
        (b"GGUF", "is cut off"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "tensors at byte 24 would go beyond"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**64 - 1), "fields at byte 24 would go beyond"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + bytes(99), "the name of field 0"),
        (
            b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"a", 9, 0, 2**63) + bytes(99),
            "a at byte",
        ),
        (b"GGUF" + struct.pack("<IQQQcI", 3, 0, 1, 1, b"a", 77) + bytes(99), "value type 77"),
        (b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"a", 9, 9, 1) + bytes(99), "an array of arrays"),
    ):
        file.write_bytes(content)
        with pytest.raises(CheckpointError) as raised:
            load_target(file)
        assert words in str(raised.value)


def tensor_table(content: bytes, name: str) -> int:
    """Where the number of dimensions of the tensor ``name`` stands."""
    spelled = struct.pack("<Q", len(name)) + name.encode()
    return content.index(spelled) + len(spelled)


@pytest.mark.parametrize(
    ("place", "layout", "value", "words"),
    [
        (0, "<I", 9, "has 9 dimensions; 1 to 4"),
        (4, "<Q", 2**60, "lies at bytes"),
        (4, "<Q", 0, "each must be positive"),
        (12, "<Q", 2**63, "lies at bytes"),
        (20, "<I", 250, "has type 250"),
        (20, "<I", 12, "the first a multiple of 256"),
        (20, "<I", 9, "is Q8_1"),
        (24, "<Q", 2**63, "of a file of"),
        (24, "<Q", 0, "behind the tensor before it"),
        (24, "<Q", 7, "a multiple of 32"),
    ],
)
def test_a_wrong_tensor_is_named(
    tmp_path: Path, sound: Path, place: int, layout: str, value: int, words: str
) -> None:
    content = bytearray(sound.read_bytes())
    name = "blk.1.ffn_up.weight"
    start = tensor_table(content, name) + place
    content[start : start + struct.calcsize(layout)] = struct.pack(layout, value)
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        load_target(file)
    assert str(file) in str(raised.value)
    assert words in str(raised.value)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_a_file_that_is_cut_off_says_so(tmp_path: Path, sound: Path, share: float) -> None:
    file = tmp_path / "model.gguf"
    content = sound.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="cut off"):
        load_target(file)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(data=st.data())
def test_damaged_files_load_or_are_refused(tmp_path: Path, sound: Path, data: st.DataObject) -> None:
    """Changes in the header, where every byte has a meaning: nothing but this package's own errors comes out."""
    content = bytearray(sound.read_bytes())
    header_end = min(entry.start for entry in GgufHeader.read(sound).tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, header_end - 1))
        change = data.draw(
            st.binary(min_size=1, max_size=8)
            | st.sampled_from(
                [struct.pack("<Q", value) for value in (0, 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1)]
            )
        )
        if data.draw(st.booleans()):
            content[place : place + len(change)] = change
        else:
            content[place:place] = change
    file = tmp_path / "damaged.gguf"
    file.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    for read in (lambda: load_target(file, weights="float32"), lambda: load_tokenizer(file)):
        message = str(file)
        try:
            read()
        except EdaError as error:
            message = str(error)
        assert str(file) in message


def test_unsupported_is_a_kind_of_its_own(tmp_path: Path, stored: Path) -> None:
    file = write_gguf(stored, tmp_path / "model.gguf", fields={"llama.logit_scale": 2.0})
    with pytest.raises(UnsupportedModelError, match=r"llama\.logit_scale is 2\.0"):
        open_model(file)
