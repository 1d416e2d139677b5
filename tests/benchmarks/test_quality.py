"""Perplexity: against transformers on the same windows, and what the ratios mean."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import quality
from benchmarks.quality import loss, qualities, token_stream, windows
from tests.support.tiny import tiny_target


def test_windows_are_whole_and_begin_anew() -> None:
    assert windows(list(range(7)), 3) == [[0, 1, 2], [3, 4, 5]]


def test_loss_is_of_the_tokens_behind_the_first() -> None:
    logits = torch.log(torch.tensor([[0.25, 0.75], [0.5, 0.5], [1.0, 1.0]]))
    assert loss(logits, [1, 0, 1]) == pytest.approx((math.log(4) + math.log(2)) / 2)


def test_ratios_are_paired_by_window() -> None:
    losses = {quality.REFERENCE: [1.0, 3.0], "worse": [1.1, 3.1], "uneven": [1.0, 3.2]}
    found = {row.name: row for row in qualities(losses, dict.fromkeys(losses, 0.0))}
    assert found["worse"].perplexity == pytest.approx(math.exp(2.1))
    assert found["worse"].relative == pytest.approx(math.exp(0.1))
    assert found["worse"].error == pytest.approx(0.0, abs=1e-9), "all windows agree"
    assert found["uneven"].error == pytest.approx(math.exp(0.1) * 0.1)


def test_texts_follow_one_another_with_an_end_token_between(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_target(tmp_path / "target", tokenizer=True))
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "response": "one two"}\n{"text": "three"}\n', encoding="utf-8")
    first, second = (tokenizer.encode(text, add_special_tokens=False) for text in ("one two", "three"))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    count = len(first) + len(end) + len(second)
    assert token_stream(data, tokenizer, count) == [*first, *end, *second]
    with pytest.raises(ValueError, match="only"):
        token_stream(data, tokenizer, 10_000)


def test_our_passes_agree_with_transformers(tmp_path: Path) -> None:
    target = tiny_target(tmp_path / "target", tokenizer=True, head_dim=32)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"number {place} and more"}) + "\n" for place in range(40)))
    code = quality.main(
        [
            *("--target", str(target), "--data", str(data), "--tokens", "96", "--window", "24"),
            *(
                "--only",
                "ours,transformers",
                "--work",
                str(tmp_path / "work"),
                "--json",
                str(tmp_path / "out.json"),
            ),
        ]
    )
    rows = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert code == 0
    assert set(rows) == {"ours bfloat16", "ours int8", "ours int4", "transformers float32"}
    assert rows["ours bfloat16"]["relative"] == pytest.approx(1.0)
    for name, tolerance in (("transformers float32", 0.01), ("ours int8", 0.02), ("ours int4", 0.2)):
        assert rows[name]["relative"] == pytest.approx(1.0, abs=tolerance), name


def test_who_cannot_begin_in_time_is_named(tmp_path: Path) -> None:
    target = tiny_target(tmp_path / "target", tokenizer=True, head_dim=32)
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a text that is long enough for two windows of tokens"}\n')
    quality.main(
        [
            *(
                "--target",
                str(target),
                "--data",
                str(data),
                "--tokens",
                "32",
                "--window",
                "16",
                "--minutes",
                "0",
            ),
            *("--only", "ours", "--work", str(tmp_path / "work"), "--json", str(tmp_path / "out.json")),
        ]
    )
    document = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in document["rows"]] == ["ours bfloat16"]
    assert document["missing"]["ours int4"] == "was not begun within 0 minutes"
