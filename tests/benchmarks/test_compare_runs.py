"""The comparison from end to end on a tiny family, without any peer but transformers."""

import json
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.peers import transformers_peer
from benchmarks.peers.interface import MissingPeerError
from tests.benchmarks.conftest import FamilyOnDisk


def run(family: FamilyOnDisk, tmp_path: Path, *extra: str) -> tuple[int, dict]:
    code = compare.main(
        [
            *(
                "--models",
                str(family.models),
                "--prompts",
                str(family.prompts),
                "--work",
                str(tmp_path / "work"),
            ),
            *(
                "--num-prompts",
                "2",
                "--tokens",
                "8",
                "--concurrency",
                "1,4",
                "--weights",
                "float32",
                "--pause",
                "0",
            ),
            *("--json", str(tmp_path / "out.json"), *extra),
        ]
    )
    return code, json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _only_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = [
        peer
        for peer in compare.PEERS
        if peer.name in ("llama.cpp bf16", "OpenVINO GenAI", "CTranslate2 int8")
    ]
    monkeypatch.setattr(compare, "PEERS", (*transformers_peer.PEERS, *absent))
    for module in (compare.openvino_peer, compare.ctranslate2_peer):
        monkeypatch.setattr(module, "require", _refuse)
    monkeypatch.setattr(compare.llama_cpp_peer, "library", lambda: _refuse("llama_cpp", "llama-cpp-python"))


def _refuse(module: str, package: str) -> None:
    raise MissingPeerError(f"{package} is not installed")


def test_a_run_without_peers_names_them_and_measures_the_rest(
    family_on_disk: FamilyOnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, document = run(family_on_disk, tmp_path, "--domains", "math,code,medical")
    printed = capsys.readouterr().out
    assert code == 0
    rows = {(row["domain"], row["name"]): row for row in document["rows"]}
    assert ("math", "ours, private, x4") in rows
    assert ("code", "ours, private, x1") not in rows
    assert ("mixed", "ours, none, x16") in rows
    for row in document["rows"]:
        if row["domain"] != "mixed":
            assert (row["share_equal"], row["share_first_choice"]) == (1.0, 1.0), row["name"]
    assert rows["math", "ours, none, x1"]["ratio_to_our_plain"] == 1.0
    assert rows["math", "ours, none, x1"]["tokens_per_round"] == 1.0
    assert rows["math", "transformers generate"]["tokens_per_round"] == 1.0
    missing = document["missing"]
    assert missing["llama.cpp bf16"] == "llama-cpp-python is not installed"
    assert missing["ours, private, x1"] == "code: the family has no private module"
    assert missing["ours, private, x16, mixed"] == "the family has no private module for code"
    assert "missing from this comparison: OpenVINO GenAI (openvino-genai is not installed)" in printed
    assert "the domain medical" in printed


def test_mixed_batches_draft_with_each_rows_own_module(family_on_disk: FamilyOnDisk, tmp_path: Path) -> None:
    _, document = run(family_on_disk, tmp_path, "--domains", "math", "--only", "generate")
    names = [row["name"] for row in document["rows"] if row["domain"] == "mixed"]
    assert names == ["ours, none, x16", "ours, private, x16"]
    assert document["missing"]["transformers prompt lookup"] == "left out with --only"


def test_a_family_without_the_domains_is_nothing_to_measure(
    family_on_disk: FamilyOnDisk, tmp_path: Path
) -> None:
    assert compare.main(["--models", str(family_on_disk.models), "--domains", "medical"]) == 2


def test_an_engine_that_fails_is_an_error(
    family_on_disk: FamilyOnDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(compare.SpeculativeDecoder, "step", fail)
    code, document = run(family_on_disk, tmp_path, "--domains", "math")
    assert code == 1
    assert "RuntimeError: no" in document["missing"]["ours, none, x1"]
