"""Rows of text, and how they become token ids.

A row is `{"id", "prompt", "response", "source"}`, one JSON object a line, in `<data>/<domain>/train.jsonl.gz` and
`<data>/<domain>/eval.jsonl`. Every stage of the recipe renders a row with the same markers as the tokenizer's chat
template, so that what the models see in training is what they see when they are served.
"""

import gzip
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

DOMAINS = ("general", "math", "code", "medical")
FINE_TUNE_DOMAINS = ("math", "code", "medical")

# Answers in this set came from a commercial model whose terms may restrict what is trained on them, so weights that
# are distributed must not have seen it.
EXCLUDED_SOURCES = frozenset({"teknium1/GPTeacher"})

PAD_TOKEN = "<|pad|>"
SYSTEM_TOKEN = "<|system|>"
USER_TOKEN = "<|user|>"
ASSISTANT_TOKEN = "<|assistant|>"
END_TOKEN = "<|end|>"
SPECIAL_TOKENS = (PAD_TOKEN, SYSTEM_TOKEN, USER_TOKEN, ASSISTANT_TOKEN, END_TOKEN)


@dataclass(frozen=True)
class Row:
    """One prompt with its response."""

    prompt: str
    response: str
    source: str


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of a rendered row; the first `num_prompt_tokens` of them are what a server would be given."""

    token_ids: list[int]
    num_prompt_tokens: int


def read_rows(path: Path, excluded_sources: frozenset[str] = EXCLUDED_SOURCES) -> list[Row]:
    """Read a `.jsonl` or `.jsonl.gz` file, leaving out the rows of `excluded_sources`."""
    rows = []
    with (
        gzip.open(path, "rt", encoding="utf-8")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8") as lines
    ):
        for line in lines:
            fields = json.loads(line)
            if fields["source"] not in excluded_sources:
                rows.append(Row(fields["prompt"], fields["response"], fields["source"]))
    return rows


def train_rows(data: Path, domain: str) -> list[Row]:
    """The training rows of a domain, in the order of the file."""
    return read_rows(data / domain / "train.jsonl.gz")


def eval_rows(data: Path, domain: str) -> list[Row]:
    """The held-out rows of a domain, in the order of the file."""
    return read_rows(data / domain / "eval.jsonl")


def render_prompt(prompt: str) -> str:
    """The text up to the point where the assistant starts to write (the template's generation prompt included)."""
    return f"{USER_TOKEN}\n{prompt}{END_TOKEN}\n{ASSISTANT_TOKEN}\n"


def render_row(row: Row) -> str:
    """A whole exchange; identical to the chat template applied to the two messages."""
    return f"{render_prompt(row.prompt)}{row.response}{END_TOKEN}\n"


def encode_rows(tokenizer: Tokenizer, rows: Sequence[Row]) -> list[EncodedRow]:
    """Encode rows; the ids of the prompt part are always a prefix of the ids of the whole row."""
    encoded = []
    for start in range(0, len(rows), 4096):
        part = rows[start : start + 4096]
        wholes = tokenizer.encode_batch_fast([render_row(row) for row in part])
        prompts = tokenizer.encode_batch_fast([render_prompt(row.prompt) for row in part])
        encoded += [
            EncodedRow(whole.ids, len(prompt.ids)) for whole, prompt in zip(wholes, prompts, strict=True)
        ]
    return encoded


def pack_rows(token_lists: Iterable[list[int]], length: int) -> NDArray[np.uint16]:
    """Pack documents into `[num_sequences, length]` token ids.

    Every sequence starts with the start of a document, as every served request does; the last document of a sequence is
    cut where the sequence is full, and its rest dropped. (There is more text than a CPU can train on, so dropping the
    rests costs nothing, whereas sequences that start in the middle of a document teach an attention pattern that
    serving never needs.) The incomplete last sequence is dropped.
    """
    sequences = []
    current: list[int] = []
    for token_ids in token_lists:
        current += token_ids
        if len(current) >= length:
            sequences.append(np.array(current[:length], dtype=np.uint16))
            current = []
    if not sequences:
        raise ValueError(f"the text is shorter than one sequence of {length} tokens")
    return np.stack(sequences)


def shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    """A copy of `rows` in an order that depends on `seed` alone."""
    order = list(rows)
    random.Random(seed).shuffle(order)
    return order
