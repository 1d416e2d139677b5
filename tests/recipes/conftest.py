"""A synthetic corpus and a tiny tokenizer and model, so that the recipe runs within seconds."""

import gzip
import json
import random
from pathlib import Path

import pytest
from transformers import LlamaConfig, PreTrainedTokenizerFast

from recipes.hardware import Hardware
from recipes.text import DOMAINS
from recipes.train_tokenizer import build_tokenizer

_WORDS = (
    "the",
    "a",
    "sum",
    "of",
    "two",
    "numbers",
    "is",
    "return",
    "value",
    "heart",
    "blood",
    "history",
    "def",
)


def _rows(domain: str, count: int, seed: int) -> list[dict[str, str]]:
    chance = random.Random(f"{domain}/{seed}")
    rows = []
    for index in range(count):
        prompt = f"{domain} {index} {seed}: " + " ".join(chance.choices(_WORDS, k=6))
        response = " ".join(chance.choices(_WORDS, k=chance.randint(4, 20)))
        rows.append({"id": f"{domain}-{index}", "prompt": prompt, "response": response, "source": "test"})
    rows.append({"id": "excluded", "prompt": "secret", "response": "secret", "source": "teknium1/GPTeacher"})
    return rows


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with all domains."""
    root = tmp_path_factory.mktemp("data")
    for domain in DOMAINS:
        (root / domain).mkdir()
        with gzip.open(root / domain / "train.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in _rows(domain, 60, seed=0))
        (root / domain / "eval.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in _rows(domain, 8, seed=1)), encoding="utf-8"
        )
    return root


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 320 entries."""
    texts = [" ".join(row.values()) for domain in DOMAINS for row in _rows(domain, 60, seed=0)]
    return build_tokenizer(iter(texts), vocabulary_size=320)


@pytest.fixture
def tiny_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Two layers of width 32."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@pytest.fixture
def hardware() -> Hardware:
    """The CPU in float32, not compiled."""
    return Hardware(device="cpu", compute_dtype="float32", compiled=False, num_threads=1)
