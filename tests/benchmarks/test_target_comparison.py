"""Weight formats of one model: from end to end on a tiny target without llama.cpp, and what the figures mean."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import compare, target_comparison
from benchmarks.comparison_turns import Record
from benchmarks.own_engine import OWN_VALUES, load_as, own_target_name
from benchmarks.peers.gguf_file import write_gguf
from benchmarks.peers.interface import Completion, MissingPeerError, Prompt
from benchmarks.peers.plain_checkpoint import write_plain_from_gguf
from benchmarks.target_comparison import peers_for, rows_of
from tests.support.tiny import tiny_target


def record(name: str, seconds: float, concurrency: int = 1) -> Record:
    made = Record(name, concurrency)
    made.add(seconds, [Prompt("math", [1])] * concurrency, [Completion([0] * 10, 9, 9)] * concurrency)
    return made


def test_ratios_are_to_as_many_bits_and_as_many_sequences() -> None:
    records = [
        record("ours int8", 1.0),
        record("ours int8 x16", 2.0, 16),
        record("ours int4", 0.5),
        record("llama.cpp q8_0", 3.0),
        record("llama.cpp q8_0 x16", 5.0, 16),
        record("llama.cpp bf16", 9.0),
    ]
    rows = {row.name: row for row in rows_of(records, {"ours int8": (0.9, 0.5)}, ["int8", "int4"])}
    assert rows["ours int8"].ratio_to_rival == pytest.approx(3.0)
    assert rows["ours int8 x16"].ratio_to_rival == pytest.approx(2.5)
    assert rows["ours int8 x16"].rival == "llama.cpp q8_0 x16"
    assert (rows["ours int4"].rival, rows["ours int4"].ratio_to_rival) == (None, None), (
        "q4_0 was not measured"
    )
    assert rows["llama.cpp q8_0"].ratio_to_our_plain is None
    assert (rows["ours int8"].share_first_choice, rows["ours int8"].worst_gap) == (0.9, 0.5)
    assert "2.50" in target_comparison.table(list(rows.values()))


def test_rivals_are_among_those_that_are_asked() -> None:
    names = {peer.name: peer.concurrency for peer in peers_for(Path("model.gguf"), [1, 16])}
    for rival in target_comparison.RIVALS.values():
        assert names[rival] == 1
        assert names[f"{rival} x16"] == 16
    assert "vLLM bf16" in names


def test_names_say_what_differs_from_a_plain_lone_sequence() -> None:
    assert own_target_name("int8", "none", 1) == "ours int8"
    assert own_target_name("int8", "lookup", 16) == "ours int8, lookup x16"


def test_an_unknown_format_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights is 'int2'; it must be own or one of bfloat16, int8, int4"):
        load_as(tmp_path, "int2")


def test_a_gguf_becomes_a_plain_checkpoint_of_its_values(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    source = tiny_target(tmp_path / "target", tokenizer=True, tie_word_embeddings=True)
    document = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    document["model"]["vocab"]["ab"] = 300
    document["model"]["merges"] = [["a", "b"]]  # transformers takes a file without merges for another kind
    (source / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    file = write_gguf(source, tmp_path / "model.gguf", "BF16")
    plain = write_plain_from_gguf(file, tmp_path / "plain")
    expected, found = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).state_dict()
        for path in (source, plain)
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    ids = [
        AutoTokenizer.from_pretrained(path).encode("xab", add_special_tokens=False)
        for path in (source, plain)
    ]
    assert ids[0] == ids[1]
    assert ids[0][1:] == [300]


def test_a_run_measures_every_format_and_names_who_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise MissingPeerError("not installed")

    monkeypatch.setattr(target_comparison.llama_cpp_peer, "library", refuse)
    monkeypatch.setattr(target_comparison.openvino_peer, "require", refuse)
    monkeypatch.setattr(target_comparison, "build_report", refuse)
    target = tiny_target(tmp_path / "target", tokenizer=True, head_dim=32)
    (tmp_path / "math.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n', encoding="utf-8")
    code = compare.main(
        [
            *("--target", str(target), "--prompts", str(tmp_path), "--domains", "math", "--num-prompts", "2"),
            *("--tokens", "6", "--concurrency", "1,2", "--pause", "0", "--checked", "1"),
            *("--work", str(tmp_path / "work"), "--json", str(tmp_path / "out.json")),
        ]
    )
    document = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in document["rows"]}
    assert code == 0
    formats = [f"ours {weights}" for weights in ("bfloat16", "int8", "int4")]
    ways = [*formats, *(f"{name}, lookup" for name in formats)]
    measured = {*ways, *(f"{name} x2" for name in ways)}
    assert measured | {"transformers generate", "transformers prompt lookup"} == set(rows)
    assert rows["ours int8 x2"]["concurrency"] == 2
    assert rows["ours int8"]["tokens_per_round"] == 1.0
    assert rows["ours bfloat16"]["worst_gap"] < 0.2
    assert document["missing"]["llama.cpp q4_0 x2"] == "not installed"
    assert "missing from this comparison: vLLM bf16" in capsys.readouterr().out
    assert OWN_VALUES not in {name.split()[-1] for name in rows}, "a directory holds no values of its own"
