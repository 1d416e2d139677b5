"""The tokenizer, the chat format, packing, and the rows taken from the standard library."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from recipes.standard_library import standard_library_rows
from recipes.text import (
    END_TOKEN,
    PAD_TOKEN,
    Row,
    encode_rows,
    eval_rows,
    pack_rows,
    render_prompt,
    render_row,
    train_rows,
)


def test_tokenizer_round_trips_any_text(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("Hello, world", "x = 12.50\n\n    return  y", "é ☃ 日本\t\r\n", "  leading and trailing  "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_splits_digits(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("1234"))
    assert tokens == ["1", "2", "3", "4"]


def test_special_tokens_are_distinct_and_survive_saving(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.eos_token, loaded.pad_token) == (END_TOKEN, PAD_TOKEN)
    assert loaded.eos_token_id != loaded.pad_token_id
    assert len(loaded.encode(END_TOKEN)) == 1
    assert loaded.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    "response", ["plain", "    indented code\n    more", "\n\nlines first", "12 digits", ""]
)
def test_prompt_ids_are_a_prefix_of_the_training_ids(
    tokenizer: PreTrainedTokenizerFast, response: str
) -> None:
    row = Row("How?\n", response, "test")
    (encoded,) = encode_rows(tokenizer.backend_tokenizer, [row])
    prompt_ids = tokenizer.encode(render_prompt(row.prompt))
    assert encoded.num_prompt_tokens == len(prompt_ids)
    assert encoded.token_ids[: len(prompt_ids)] == prompt_ids
    assert tokenizer.decode(encoded.token_ids[len(prompt_ids) :]) == response + END_TOKEN + "\n"


def test_chat_template_matches_training(tokenizer: PreTrainedTokenizerFast) -> None:
    user = {"role": "user", "content": "How?"}
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert prompt == render_prompt("How?")
    whole = tokenizer.apply_chat_template([user, {"role": "assistant", "content": "So."}], tokenize=False)
    assert whole == render_row(Row("How?", "So.", "test"))
    with_system = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be kind."}, user], tokenize=False
    )
    assert with_system == "<|system|>\nBe kind.<|end|>\n<|user|>\nHow?<|end|>\n"


def test_rows_of_excluded_sources_are_left_out(data: Path) -> None:
    assert {row.source for row in train_rows(data, "code")} == {"test"}
    assert all(row.source == "test" for row in eval_rows(data, "code"))


def test_packed_sequences_start_with_documents() -> None:
    documents = [[1, 11, 12], [2, 21], [3, 31, 32, 33], [4, 41]]
    packed = pack_rows(documents, 4)
    np.testing.assert_array_equal(packed, [[1, 11, 12, 2], [3, 31, 32, 33]])


def test_packing_refuses_too_little_text() -> None:
    with pytest.raises(ValueError, match="shorter than one sequence"):
        pack_rows([[1, 2]], 4)


_MODULE = '''
import os


@decorator
def documented(a: int,
               b: int) -> int:
    """Add two numbers.

    Slowly.
    """
    # A comment that belongs to the source.
    total = a + b
    return total


class Plain:
    def member(self, value):
        if value is None:
            raise ValueError("no value was given to this method")
        return value


def only_documented():
    """Nothing but this."""
'''


def test_standard_library_rows_move_the_docstring_to_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(_MODULE)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text(_MODULE)
    rows = standard_library_rows(False, tmp_path) + standard_library_rows(True, tmp_path)
    documented, plain, member = rows
    assert documented.prompt.startswith("Write the Python function `documented` for the module `module`.")
    assert "Add two numbers." in documented.prompt
    assert "Add two numbers." not in documented.response
    assert documented.response.startswith("@decorator\ndef documented(a: int,\n")
    assert documented.response.endswith("    total = a + b\n    return total")
    assert "A comment" in documented.response
    assert plain.response.startswith("class Plain:\n    def member")
    assert member.response.startswith("def member(self, value):\n    if value")


def test_held_out_modules_of_the_standard_library_are_not_trained_on() -> None:
    held_out = {row.prompt for row in standard_library_rows(held_out=True)}
    trained = {row.prompt for row in standard_library_rows(held_out=False)}
    assert len(held_out) > 100
    assert len(trained) > 5 * len(held_out)
    assert held_out.isdisjoint(trained)
