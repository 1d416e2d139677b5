"""`eda train-draft`, `eda adapt` and `eda bench adaptation` from the command line, on a tiny random family."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from eda.adapters.serving.model_loader import ModelLoader
from eda.adapters.store.store import AdapterStore
from eda.backends.loading import load_fine_tune, load_target
from eda.models.draft import DraftModel
from eda.server.cli import app
from tests.support.family import save_family


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_family(tmp_path_factory.mktemp("family"))
    rows = [{"prompt": f"number {number} and the fox", "response": "the fox jumps"} for number in range(12)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def adapt_arguments(family: Path, store: Path) -> list[object]:
    return [
        *("adapt", "--target", family / "base", "--fine-tune", family / "math", "--draft", family / "draft"),
        *("--name", "math", "--store", store, "--prompts", family / "prompts.jsonl", "--quiet"),
        *("--max-tokens", 8, "--num-steps", 3, "--batch-size", 4, "--held-out", 2, "--skip-triage"),
    ]


def test_train_draft_writes_a_draft_for_this_target(family: Path, tmp_path: Path) -> None:
    arguments = [
        *("train-draft", "--target", family / "base", "--prompts", family / "prompts.jsonl"),
        *("--out", tmp_path / "draft", "--num-prompts", 8, "--held-out", 3, "--max-tokens", 8, "--epochs", 1),
        *("--draft-vocab-size", 64, "--vocabulary-prompts", family / "prompts.jsonl", "--quiet"),
    ]
    output = run(*arguments)
    assert "vocabulary 64 of" in output
    draft = DraftModel.load(tmp_path / "draft")
    assert draft.config.target_fingerprint == load_target(family / "base").fingerprint
    assert re.search(r"training spent: .*evaluation \d+\.\d s \(\d+%\)", output)
    # Run again, it finds the trained state; only what this cost is new.
    assert run(*arguments).splitlines()[0] == output.splitlines()[0]


def test_adapt_publishes_a_version_that_loads_and_says_so_again(family: Path, tmp_path: Path) -> None:
    store = tmp_path / "adapters"
    output = run(*adapt_arguments(family, store))
    assert "adapted" in output
    assert "training spent: " in output
    assert "math/1" in output.replace("\n", "")
    base = load_target(family / "base")
    loader = ModelLoader(base, DraftModel.load(family / "draft"))
    fine_tune = load_fine_tune(family / "math", base, "math")
    manifest, module = loader.private_module(AdapterStore(store), "math", 1, fine_tune.fingerprint)
    assert manifest.provenance["data"]["count"] == 12
    assert module.num_parameters > 0
    again = json.loads(run(*adapt_arguments(family, store), "--json"))
    assert again["version"] == 1
    assert {"optimizer", "backward", "evaluation"} <= set(again["training_seconds"])
    assert manifest.provenance["train"]["seconds"] == again["training_seconds"]
    assert AdapterStore(store).versions("math") == [1]


def test_adapt_names_what_is_wrong(family: Path, tmp_path: Path) -> None:
    wrong = [
        (["--name", "../evil"], "name is '../evil'"),
        (["--score", "luck"], "--score is 'luck'"),
        (["--self-prompts", 5], "give either --prompts FILE or --self-prompts N"),
        (["--fine-tune", tmp_path], "config.json does not exist"),
        (["--prompts", tmp_path / "none.jsonl"], "cannot be read"),
    ]
    for arguments, message in wrong:
        output = run(*adapt_arguments(family, tmp_path / "adapters"), *arguments, code=2)
        assert message in output, output
    (tmp_path / "bad.jsonl").write_text('{"prompt": "fine"}\n{"promt": "typo"}\n')
    output = run(*adapt_arguments(family, tmp_path / "a"), "--prompts", tmp_path / "bad.jsonl", code=2)
    assert "bad.jsonl, line 2" in output


def test_the_ablation_runs_resumes_and_summarises(
    family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    arguments = [
        *("bench", "adaptation", "--target", family / "base", "--draft", family / "draft"),
        *("--fine-tune", f"math={family / 'math'}", "--prompts", f"math={family / 'prompts.jsonl'}"),
        *("--eval-prompts", f"math={family / 'prompts.jsonl'}", "--out", tmp_path / "out"),
        *(
            "--seeds",
            1,
            "--steps",
            2,
            "--batch-size",
            4,
            "--num-prompts",
            6,
            "--held-out",
            3,
            "--eval-count",
            1,
        ),
        *("--max-tokens", 6, "--scores", "deficit", "--methods", "shared", "retrain", "lora", "private"),
    ]
    run(*arguments)
    results = sorted((tmp_path / "out" / "runs").glob("*.json"))
    assert len(results) == 1 + 3 * 3
    changed = {path: path.stat().st_mtime_ns for path in results}
    run(*arguments)
    assert {path: path.stat().st_mtime_ns for path in results} == changed
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())
    by_label = {row["label"]: row for row in rows}
    private = "private, width 0.25, fc rank 0.125, attention rank 0.125"
    assert set(by_label) >= {"shared, unadapted", f"{private}, public", "retrain, half-deficit"}
    assert by_label[f"{private}, regenerated"]["share_of_draft"] < 0.2
    assert all(row["greedy"] >= 1.0 and row["speed_up_greedy"] > 0 for row in rows)
    assert "| math | shared, unadapted |" in (tmp_path / "out" / "summary.md").read_text()
    assert (tmp_path / "out" / "summary.png").stat().st_size > 1000
