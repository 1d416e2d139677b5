"""Passes in turns, and the random GGUF that llama.cpp is given."""

import json
import time
from pathlib import Path

import pytest

from benchmarks import passes
from benchmarks.passes import ROWS, PassContestant, time_in_turns
from benchmarks.peers.interface import MissingPeerError
from benchmarks.peers.random_gguf import write_random_gguf
from eda.formats.model_files import open_model

TINY = {
    "layers": 2,
    "hidden": 64,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 32,
    "intermediate": 96,
    "vocab": 128,
}


def contestant(name: str, order: list[tuple[str, int]]) -> PassContestant:
    return PassContestant(name, 1, [lambda rows=rows: order.append((name, rows)) for rows in ROWS])


def test_everybody_has_every_number_of_rows_in_every_turn_and_the_first_changes() -> None:
    order: list[tuple[str, int]] = []
    both = [contestant("a", order), contestant("b", order)]
    assert time_in_turns(both, turns=2, seconds=0.0, deadline=time.monotonic() + 60) == 2
    assert list(dict.fromkeys(order[: len(order) // 2])) == [("a", n) for n in ROWS] + [
        ("b", n) for n in ROWS
    ]
    assert order[len(order) // 2][0] == "b"
    assert [len(times) for times in both[0].milliseconds] == [2, 2, 2]
    assert len(order) == 2 * 2 * len(ROWS) * 2, "the first pass of a burst is not counted"


def test_no_turn_begins_after_the_deadline_but_the_first() -> None:
    both = [contestant("a", []), contestant("b", [])]
    assert time_in_turns(both, turns=5, seconds=0.0, deadline=time.monotonic() - 1) == 1


def test_medians_make_the_ratios() -> None:
    made = PassContestant("a", 2_000_000, [], 1.0, {}, [[2.0, 9.0, 1.0], [4.0], [8.0]])
    row = made.as_json()
    assert row["median_ms"] == [2.0, 4.0, 8.0]
    assert row["ratio_to_one_row"] == [1.0, 2.0, 4.0]
    assert row["share_of_floor"] == 0.5
    assert row["megabytes"] == 2.0


def test_the_random_file_is_a_model_of_these_sizes(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    config = passes.shape(passes.argparse.Namespace(**TINY))
    read = open_model(write_random_gguf(config, tmp_path / "random.gguf"))
    assert (read.config.hidden_size, read.config.num_layers, read.config.vocab_size) == (64, 2, 128)
    assert (read.config.num_heads, read.config.num_kv_heads, read.config.head_dim) == (2, 1, 32)
    weight = read.checkpoint.tensor("model.layers.1.mlp.down_proj.weight")
    assert weight.shape == (64, 96)
    assert float(weight.float().std()) == pytest.approx(0.05, rel=0.05)


def test_a_run_without_llama_cpp_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MissingPeerError("not installed")

    monkeypatch.setattr(passes, "LlamaContext", refuse)
    monkeypatch.setattr(passes, "quantise", refuse)
    monkeypatch.setitem(passes.SHAPES, "smollm2-135m", TINY)
    code = passes.main(
        [
            *("--turns", "1", "--seconds", "0", "--context", "8", "--work", str(tmp_path)),
            *("--json", str(tmp_path / "out.json")),
        ]
    )
    document = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert code == 0
    assert [row["name"] for row in document["rows"]] == ["ours bfloat16", "ours int8", "ours int4"]
    assert all(min(row["median_ms"]) > 0 for row in document["rows"])
    assert document["missing"]["llama.cpp q4_k_m"] == "not installed"
