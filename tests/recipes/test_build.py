"""Stages are run once and appear complete; the model cards name sources, losses and attributions."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from recipes.build import BUNDLED_KINDS, Limits, Stage, publish, run_stage, stages
from recipes.model_cards import render
from recipes.text import DOMAINS, FINE_TUNE_DOMAINS

_DATA_README = """\
# Data

## Sources

| repository | SPDX licence | where stated |
|---|---|---|
| test | MIT | LICENSE |

## Attribution

- *A Book*, A Publisher.

## Notes

Not part of it.
"""


def test_a_finished_stage_is_skipped(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "recipes.train_tokenizer",
        "--data",
        str(data),
        "--vocabulary-size",
        "320",
        "--output",
        "{result}",
    ]
    stage = Stage("tokenizer", tmp_path / "tokenizer", command)
    run_stage(stage)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "tokenizer")) == 320
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
    capsys.readouterr()
    run_stage(stage)
    assert capsys.readouterr().out == "tokenizer: done already\n"


def test_bundled_fine_tunes_come_before_those_made_to_be_compared(tmp_path: Path) -> None:
    limits = Limits(base_tokens=1e6, base_minutes=1, fine_tune_tokens=1e5, fine_tune_minutes=1)
    names = [stage.name for stage in stages(tmp_path, tmp_path, limits, all_kinds=True, threads=1)]
    assert names[:5] == ["tokenizer", "base", "math-full", "code-lora", "medical-lora"]
    assert sorted(names[5:]) == ["code-full", "math-lora", "medical-full"]
    assert len(stages(tmp_path, tmp_path, limits, all_kinds=False, threads=1)) == 5


def test_publish_copies_the_bundled_kinds_once(tmp_path: Path) -> None:
    work, output = tmp_path / "work", tmp_path / "models"
    for name in ("base", *(f"{domain}-{kind}" for domain, kind in BUNDLED_KINDS.items())):
        (work / name).mkdir(parents=True)
        (work / name / "weights").write_text(name)
    output.mkdir()
    publish(work, output)
    (output / "math" / "weights").write_text("kept")
    publish(work, output)
    found = {path.name: (path / "weights").read_text() for path in output.iterdir()}
    assert found == {"base": "base", "math": "kept", "code": "code-lora", "medical": "medical-lora"}


def test_model_cards_state_losses_samples_and_attributions(data: Path) -> None:
    (data / "README.md").write_text(_DATA_README, encoding="utf-8")
    training = {
        "parameters": 17_000_000,
        "tokens": 1_234_567,
        "steps": 300,
        "seconds": 2400,
        "held_out_loss": 4.5,
        "held_out_perplexity": 90.0,
    }
    card = {
        "training": training,
        "response_losses": dict.fromkeys(DOMAINS, 3.25),
        "greedy": {
            "num_prompts": 100,
            "max_new_tokens": 160,
            "loop_share": 0.25,
            "ended_share": 0.5,
            "samples": [{"prompt": "What?", "answer": "This.\n```\ncode\n```", "loops": False}],
        },
    }
    fine_tune = {
        "domain": "math",
        "kind": "full",
        "trained_parameters": 17_000_000,
        "tokens": 200_000,
        "seconds": 300,
        "held_out_loss_before": 5.0,
        "held_out_loss_after": 3.0,
    }
    cards = dict.fromkeys(("base", *FINE_TUNE_DOMAINS), card) | {"fine_tunes_measured": [fine_tune]}
    text = render(cards, data)
    assert "1,234,567 tokens" in text
    assert "| math, full | 17,000,000 | 200,000 | 300 | 5.00 | 3.00 |" in text
    assert "| base | 3.25 | 3.25 | 3.25 | 3.25 |" in text
    assert "- *A Book*, A Publisher." in text
    assert "Not part of it." not in text
    assert "| test | MIT | general 60, math 60, code 60, medical 60 |" in text
    assert "| python/standard-library | PSF-2.0 | code" in text
    assert "25% of the answers loop" in text
    assert "    > What?\n" in text
