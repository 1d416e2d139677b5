"""Where figures come from, the parts of a long measurement, and the tables that are made of them."""

import json
from pathlib import Path

import pytest

from benchmarks import machine, measure_formats, measurement_tables
from benchmarks.comparison_turns import run_in_turns
from benchmarks.peers.interface import Completion, Contestant, Prompt
from benchmarks.peers.llama_context import missing_features

INFO = "CPU : SSE3 = 1 | AVX2 = 1 | F16C = 1 | AVX512 = 1 | AVX512_VNNI = 0 | OPENMP = 1 | "
SETTINGS = {
    "command": "python -m benchmarks.quality --target model.gguf",
    "threads": 2,
    "machine": {"processor": "Some CPU", "cores": 2, "flags": ["avx2", "avx512_vnni"]},
    "load_average_before": 0.1,
    "load_average_after": 1.9,
    "llama_cpp": {
        "package": "llama-cpp-python 1",
        "system_info": INFO,
        "unused": ["AVX512_BF16"],
        "tensors": {"q4_0": {"Q4_0": 210, "Q8_0": 1}},
    },
}


def test_features_that_a_build_leaves_unused_are_named() -> None:
    flags = frozenset({"avx2", "f16c", "avx512f", "avx512_vnni", "avx512_bf16"})
    assert missing_features(INFO, flags) == ["AVX512_VNNI", "AVX512_BF16"]
    assert missing_features(INFO, frozenset({"avx2"})) == []


def test_the_machine_is_described_by_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(
        "model name\t: Some CPU\ncpu family\t: 26\nmodel\t\t: 2\nflags\t\t: fpu avx2 avx512_vnni\n\n"
        "model name\t: Other\n"
    )
    monkeypatch.setattr(machine, "_CPUINFO", path)
    found = machine.description()
    assert found["processor"] == "Some CPU (26/2)"
    assert found["flags"] == ["avx2", "avx512_vnni"]


def test_measuring_ends_in_time_with_what_there_is() -> None:
    def complete(prompts: list[Prompt], count: int) -> list[Completion]:
        return [Completion([1] * count) for _ in prompts]

    prompts = [Prompt("math", [place]) for place in range(8)]
    contestants = [Contestant("alone", complete), Contestant("sixteen", complete, 16)]
    records, failed = run_in_turns(contestants, prompts, 4, minutes=0.0)
    assert [(record.name, len(record.seconds)) for record in records] == [("alone", 1)]
    assert failed == {"sixteen": "had no turn within 0 minutes"}


def test_a_table_stands_under_its_command_and_the_machine() -> None:
    document = {
        "kind": "quality",
        "settings": SETTINGS,
        "missing": {"llama.cpp bf16": "not installed"},
        "rows": [
            {"name": "ours int8", "perplexity": 12.3456, "relative": 1.004, "error": 0.001, "seconds": 1.0},
            {"name": "ours int4", "perplexity": 13.0, "relative": None, "error": None, "seconds": 1.0},
        ],
    }
    text = measurement_tables.section("quality", document)
    assert text.startswith("## quality\n\n```bash\npython -m benchmarks.quality --target model.gguf\n```\n")
    assert "| ours int8 | 12.346 | +0.40% ± 0.10% |" in text
    assert "| ours int4 | 13.000 |  |" in text
    assert "Some CPU, 2 cores, flags: avx2 avx512_vnni; 2 threads" in text
    assert "load average 0.1 before, 1.9 after" in text
    assert "features left unused: AVX512_BF16" in text
    assert "q4_0: 210 tensors Q4_0, 1 tensors Q8_0" in text
    assert "- llama.cpp bf16: not installed" in text


def test_parts_that_are_done_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(command: list[str], **_: object) -> object:
        ran.append(command[2])
        if "benchmarks.compare" not in command:
            document = {"kind": "quality", "settings": SETTINGS, "missing": {}, "rows": []}
            Path(command[-1]).write_text(json.dumps(document), encoding="utf-8")
        return measure_formats.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(measure_formats.subprocess, "run", run)
    arguments = ["--target", "model.gguf", "--data", "texts.jsonl", "--out", str(tmp_path)]
    assert measure_formats.main(arguments) == 1
    assert "alone: exit code 0; see alone.log" in capsys.readouterr().out
    assert len(ran) == 5
    ran.clear()
    assert measure_formats.main(arguments) == 1
    assert set(ran) == {"benchmarks.compare"}
    tables = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "## passes-smollm2-135m" in tables
    assert "## quality-model" in tables
    assert "## alone" not in tables
