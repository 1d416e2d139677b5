"""The GPU benchmark: refuses to invent figures without a GPU, and every line of it runs on the CPU."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_passes import PassTiming, bytes_read, llama_config, random_target
from tests.benchmarks.conftest import FamilyOnDisk


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpu.main([]) == 2
    assert "nothing was measured" in capsys.readouterr().err
    assert gpu.main(["--device", "cpu"]) == 2


def test_a_trial_run_on_the_cpu(
    family_on_disk: FamilyOnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    arguments = [
        *("--device", "cpu", "--tiny", "--context", "8", "--repeats", "1", "--rounds", "2", "--tokens", "4"),
        *(
            "--num-prompts",
            "1",
            "--models",
            str(family_on_disk.models),
            "--prompts",
            str(family_on_disk.prompts),
        ),
    ]
    assert gpu.main([*arguments, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "none of these figures means anything" in printed
    assert "no CUDA graphs: this is no CUDA device" in printed
    document = json.loads(path.read_text(encoding="utf-8"))
    assert len(document["passes"]) == len(gpu.PASSES)
    assert all(timing["replayed"] > 0 for timing in document["passes"])
    assert set(document["seconds_per_round"]) == {"graphs off", "graphs on"}
    assert all(
        set(kinds) == {"none", "shared", "private"} for kinds in document["seconds_per_round"].values()
    )
    assert {row["domain"] for row in document["family"]} == {"math", "code"}
    assert set(document["projected"]) == {"shared"}, "code has no private module, so there is no mean for it"


def test_without_a_family_the_rest_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--tiny", "--context", "4", "--repeats", "1", "--rounds", "1"]
    assert gpu.main([*arguments, "--no-graphs", "--models", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "no acceptance measured" in printed
    assert "no CUDA graphs: switched off" in printed
    assert "graphs on" not in printed


def test_the_limit_counts_what_a_pass_reads() -> None:
    config = llama_config(**gpu.SHAPES["tiny"], dtype=torch.bfloat16)
    model = random_target(config, torch.device("cpu"))
    hidden, inner, kv = 64, 96, 2 * 16
    layer = hidden * (hidden + 2 * kv) + hidden * hidden + 3 * hidden * inner + 2 * hidden
    weights = 4 * layer + hidden + 512 * hidden
    assert bytes_read(model, 3, 10) == 2 * (weights + 3 * 10 * 4 * 2 * kv)


def test_shares_of_the_limit() -> None:
    timing = PassTiming(1, 1, 0, seconds=0.02, replayed=0.0125, limit=0.01)
    assert timing.share_of_limit == pytest.approx(0.5)
    assert timing.replayed_share_of_limit == pytest.approx(0.8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_passes_can_be_captured() -> None:
    device = torch.device("cuda")
    target = random_target(llama_config(**gpu.SHAPES["tiny"], dtype=torch.bfloat16), device)
    timings, reason = gpu.measure_passes(target, bandwidth=1e12, context=16, repeats=2, graphs=True)
    assert reason is None
    assert all(timing.replayed is not None for timing in timings)
