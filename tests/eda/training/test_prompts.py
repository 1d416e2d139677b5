"""Reading prompts, saying where they are malformed, and writing chats as token ids."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from eda.errors import CheckpointError, DataError
from eda.training.data.prompts import (
    ChatFormat,
    Prompt,
    encode_prompts,
    read_prompts,
    read_texts,
    split_held_out,
)
from tests.support.prompts import prompts_from_strings
from tests.support.toys import byte_chat


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def test_prompts_and_messages_are_read(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because."},
    ]
    path = write_lines(
        tmp_path / "p.jsonl", {"id": 7, "prompt": "One", "response": "1"}, "", {"messages": turns}
    )
    first, second = read_prompts(path)
    assert (first.id, first.messages, first.response) == ("7", ({"role": "user", "content": "One"},), "1")
    assert (second.id, second.response) == ("line-3", "Because.")
    assert [message["role"] for message in second.messages] == ["system", "user"]


def test_gzip_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "x"}\n'))
    assert read_prompts(path)[0].messages[0]["content"] == "x"
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "line 2 is not JSON"),
        ([1], "line 2 holds a JSON list"),
        ({"text": "x"}, "line 2: neither 'messages' nor a non-empty string 'prompt'"),
        ({"prompt": "  "}, "line 2: neither"),
        ({"prompt": "x", "response": 3}, "line 2: 'response' is a JSON int"),
        ({"messages": []}, "line 2: 'messages' must be a non-empty list"),
        ({"messages": [{"role": "user"}]}, "line 2: each message needs"),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            "line 2: 'messages' holds an answer but no prompt",
        ),
        ({"prompt": "x", "id": "a"}, "line 2: id 'a' was used in line 1"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, row: object, message: str) -> None:
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "fine", "id": "a"}, row)
    with pytest.raises(DataError, match=message):
        read_prompts(path)


def test_missing_empty_and_binary_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no prompts"):
        read_prompts(write_lines(tmp_path / "empty.jsonl", ""))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="line 1 is not JSON: 'utf-8'"):
        read_prompts(tmp_path / "binary.jsonl")


def test_texts_are_read(tmp_path: Path) -> None:
    assert read_texts(write_lines(tmp_path / "t.jsonl", {"text": "a b"})) == ["a b"]
    with pytest.raises(DataError, match="line 1: 'text' is missing"):
        read_texts(write_lines(tmp_path / "t.jsonl", {"prompt": "a b"}))


def test_held_out_prompts_do_not_depend_on_the_limit() -> None:
    prompts = prompts_from_strings([f"prompt {number}" for number in range(30)])
    training, held_out = split_held_out(prompts, 5, seed=1)
    fewer, same = split_held_out(prompts, 5, seed=1, limit=10)
    assert held_out == same
    assert fewer == training[:10]
    assert not {prompt.id for prompt in training} & {prompt.id for prompt in held_out}
    assert len(training) == 25
    with pytest.raises(DataError, match="30 prompts leave none to train on when 30 are held out"):
        split_held_out(prompts, 30, seed=1)


def test_chats_follow_the_template(tmp_path: Path) -> None:
    chat = byte_chat(tmp_path)
    ids = chat.prompt_ids([{"role": "user", "content": "hi"}])
    assert chat.decode(ids) == "user: hi\nassistant: "
    assert chat.decode(chat.user_prefix_ids()) == "user: "
    assert chat.response_ids("ok")[-1] == 257
    assert chat.eos_ids == {257}


def test_known_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    chat = byte_chat(tmp_path)
    written = Prompt("a", ({"role": "user", "content": "hi"},))
    known = replace(written, id="b", token_ids=(7, 8, 9))
    assert encode_prompts([written, known], chat) == [
        (written, chat.prompt_ids(written.messages)),
        (known, [7, 8, 9]),
    ]


def test_no_template_and_no_tokenizer(tmp_path: Path) -> None:
    byte_chat(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    chat = ChatFormat.load(tmp_path)
    assert chat.decode(chat.prompt_ids([{"role": "user", "content": "hi"}])) == "hi\n"
    assert chat.user_prefix_ids() == [256]
    with pytest.raises(CheckpointError, match="no tokenizer"):
        ChatFormat.load(tmp_path / "absent")
