"""Tokenizers from GGUF files: how text is split and merged, special tokens, and what is refused."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_files import ALPHABET
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from eda.errors import CheckpointError, UnsupportedModelError
from eda.formats.gguf_file.tokenizer import read_tokenizer

KINDS = gguf.TokenType
TEXT = (
    "I'LL say: it's 12345.67 o'clock,  naïve — ½ 日本語 한국어 HTMLParser\r\n\n\t\tx = {'a': [1,2]}   \n"
    " <s>ünïcode!!! C++/C#\n\n   end  "
)
BYTES = [*map(chr, ALPHABET)]


def write(file: Path, *, drop: tuple[str, ...] = (), **changes: Any) -> Path:
    """A byte-level vocabulary with ``changes``; ``drop`` names fields that are left out."""
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": [*BYTES, "<s>", "</s>", "<think>", "th", "the"],
        "token_type": [KINDS.NORMAL] * 256
        + [KINDS.CONTROL, KINDS.CONTROL, KINDS.USER_DEFINED, KINDS.NORMAL, KINDS.NORMAL],
        "merges": ["t h", "th e"],
        "bos_token_id": 256,
        "eos_token_id": 257,
        **changes,
    }
    writer = gguf.GGUFWriter(file, "llama")
    for name, value in values.items():
        key = f"tokenizer.ggml.{name}"
        if name in drop:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def encode(file: Path, text: str, *, special: bool = False) -> list[int]:
    ids: list[int] = read_tokenizer(file).backend.encode(text, add_special_tokens=special).ids
    return ids


def bytes_of(text: str) -> list[int]:
    return [
        BYTES.index(character)
        for character in pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(
            text
        )[0][0]
    ]


def test_merges_special_tokens_and_bytes(tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf")
    assert encode(file, "the th") == [260, *bytes_of(" "), 259]
    assert encode(file, "a<think>b</s>") == [*bytes_of("a"), 258, *bytes_of("b"), 257]
    tokenizer = read_tokenizer(file)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (256, 257)
    ids = encode(file, TEXT)
    assert tokenizer.backend.decode(ids, skip_special_tokens=False) == TEXT
    assert tokenizer.decode([256, 258, 260]) == "<think>the"


def _splits(expression: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_text_is_split_as_the_models_own_tokenizers_split_it(tmp_path: Path, name: str) -> None:
    """GPT-2's and SmolLM's rules are pre-tokenizers of the library; transformers knows the other expressions."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    references = {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
    }
    expected = references[name] if name in references else _splits(GGUF_PRE_TOKENIZER_SPLITS[name])
    found = read_tokenizer(write(tmp_path / "model.gguf", pre=name)).backend.pre_tokenizer
    assert found.pre_tokenize_str(TEXT) == expected.pre_tokenize_str(TEXT)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [260]),
        ({"add_bos_token": True}, [256, 260]),
        ({"add_eos_token": True}, [260, 257]),
        ({"pre": "llama-bpe"}, [256, 260]),
        ({"pre": "llama-bpe", "add_bos_token": False}, [260]),
    ],
)
def test_bos_and_eos_are_added_where_the_file_or_the_vocabulary_wants_them(
    tmp_path: Path, changes: dict[str, Any], expected: list[int]
) -> None:
    file = write(tmp_path / "model.gguf", **changes)
    assert encode(file, "the", special=True) == expected
    assert encode(file, "the") == [260]


def test_whole_pieces_need_no_merges_where_the_vocabulary_is_made_so(tmp_path: Path) -> None:
    assert encode(write(tmp_path / "a.gguf", pre="llama-bpe", merges=["a b"], tokens=_with("ab")), "the") == [
        260
    ]
    assert encode(write(tmp_path / "b.gguf", merges=["a b"], tokens=_with("ab")), "the") == bytes_of("the")


def _with(token: str) -> list[str]:
    return [*BYTES, "<s>", "</s>", "<think>", token, "the"]


# -- vocabularies with scores --------------------------------------------------------------------------------------

PIECES = [
    "\u2581",
    "a",
    "b",
    "c",
    "ab",
    "bc",
    "\u2581a",
    "abc",
    "\u2581ab",
    "cc",
    "ca",
    "cab",
    "\u2581\u2581",
]
SCORES = [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -5.0, -4.0, -6.0, -0.5, -7.0, -8.0]
SCORED = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]


def scored(file: Path, **changes: Any) -> Path:
    return write(
        file,
        **{
            "model": "llama",
            "tokens": SCORED,
            "scores": [0.0] * 259 + SCORES,
            "token_type": [
                KINDS.UNKNOWN,
                *[KINDS.CONTROL] * 2,
                *[KINDS.BYTE] * 256,
                *[KINDS.NORMAL] * len(PIECES),
            ],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "unknown_token_id": 0,
            **changes,
        },
        drop=("merges", "pre"),
    )


def by_scores(text: str) -> list[int]:
    """SentencePiece's BPE spelled out: merge the neighbours that make the best-scored piece, leftmost first."""
    symbols = list("\u2581" + text.replace(" ", "\u2581")) if text else []
    while True:
        candidates = [
            (SCORES[PIECES.index(left + right)], -place)
            for place, (left, right) in enumerate(pairwise(symbols))
            if left + right in PIECES
        ]
        if not candidates:
            break
        place = -max(candidates)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    ids: list[int] = []
    for symbol in symbols:
        if symbol in PIECES:
            ids.append(259 + PIECES.index(symbol))
        else:
            ids += [3 + byte for byte in symbol.encode()]
    return ids


@pytest.fixture(scope="module")
def scored_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scored(tmp_path_factory.mktemp("scored") / "model.gguf")


@given(text=st.text(alphabet="abc é日", max_size=24))
def test_scores_decide_what_is_merged(scored_file: Path, text: str) -> None:
    tokenizer = read_tokenizer(scored_file).backend
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == by_scores(text)
    assert tokenizer.decode(ids) == text


def test_scored_vocabularies_begin_with_bos_and_a_space(tmp_path: Path, scored_file: Path) -> None:
    assert encode(scored_file, "ab", special=True) == [1, SCORED.index("\u2581ab")]
    plain = scored(tmp_path / "plain.gguf", add_space_prefix=False)
    assert encode(plain, "ab") == [SCORED.index("ab")]


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model is 't5'; supported are 'gpt2'"),
        ({"pre": "kimi-k2"}, "tokenizer.ggml.pre is 'kimi-k2'; supported are"),
        ({"drop": ("tokens",)}, "tokenizer.ggml.tokens is missing; an array of strings"),
        ({"drop": ("merges",)}, "tokenizer.ggml.merges is missing"),
        ({"drop": ("model",)}, "tokenizer.ggml.model is missing; a string"),
        ({"tokens": [*BYTES, "<s>", "</s>", "a", "th", "the"]}, "each token may be there once"),
        ({"tokens": [*BYTES, "<s>", "</s>", "x" * 5000, "th", "the"]}, "a token of 5000 characters at 258"),
        (
            {"token_type": [1, 2, 3]},
            "tokenizer.ggml.token_type is an array of 3 int32; an array of 261 numbers",
        ),
        ({"merges": ["t h e"]}, "two tokens with a space are needed"),
        ({"merges": ["t q"]}, "a vocabulary that cannot be used"),
        ({"eos_token_id": 261}, "tokenizer.ggml.eos_token_id is 261; a whole number from 0 to 260"),
        ({"add_bos_token": True, "drop": ("bos_token_id",)}, "tokenizer.ggml.bos_token_id is missing"),
        ({"model": "llama", "drop": ("pre",)}, "tokenizer.ggml.scores is missing"),
    ],
)
def test_an_unusable_vocabulary_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    file = write(tmp_path / "model.gguf", **changes)
    kind = UnsupportedModelError if "supported are" in words else CheckpointError
    with pytest.raises(kind) as raised:
        read_tokenizer(file)
    assert str(file) in str(raised.value)
    assert words in str(raised.value)
