"""Stages are run once and appear complete; the model cards name sources, losses and attributions."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from recipes.build import BUNDLED_KINDS, Limits, Recipe, Stage, publish, run_stage
from recipes.model_cards import acceptance_table, draft_section, render, render_samples, retention_table
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


def _recipe(path: Path) -> Recipe:
    limits = Limits(base_tokens=1e6, base_minutes=1, fine_tune_tokens=1e5, fine_tune_minutes=1)
    return Recipe(path / "data", path / "work", limits, threads=1)


def test_stages_come_after_what_they_read(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    stages = recipe.bundled()
    names = [stage.name for stage in stages]
    assert names[:2] == ["tokenizer", "base"]
    assert names[-3:] == ["math adapter", "code adapter", "medical adapter"]
    made: list[str] = []
    for stage in stages:
        used = [
            part for part in stage.command if part.startswith(str(recipe.work)) and not part.endswith("/run")
        ]
        for part in used:
            parents = {part, str(Path(part).parent)}
            assert parents & {*made, str(recipe.work)}, f"{stage.name} reads {part} before it is made"
        made.append(str(stage.result))
    assert sorted(stage.name for stage in recipe.compared()) == ["code-full", "math-lora", "medical-full"]


def test_a_command_that_makes_nothing_is_an_error(tmp_path: Path) -> None:
    stage = Stage("nothing", tmp_path / "missing", ["this"])
    with pytest.raises(FileNotFoundError, match="nothing: the command ended well"):
        run_stage(stage)


def test_publish_copies_what_is_bundled_once_and_without_training_files(tmp_path: Path) -> None:
    recipe, output = _recipe(tmp_path), tmp_path / "models"
    names = ["base", *(f"{domain}-{kind}" for domain, kind in BUNDLED_KINDS.items()), "draft", "adapters"]
    for name in names:
        (recipe.work / name).mkdir(parents=True)
        (recipe.work / name / "weights").write_text(name)
    (recipe.work / "draft" / "training").mkdir()
    (recipe.work / "adapters" / ".adapt").mkdir()
    output.mkdir()
    publish(recipe, output)
    (output / "math" / "weights").write_text("kept")
    publish(recipe, output)
    found = {path.name: (path / "weights").read_text() for path in output.iterdir()}
    models = {"base": "base", "math": "kept", "code": "code-lora", "medical": "medical-lora"}
    assert found == models | {"draft": "draft", "adapters": "adapters"}
    assert not (output / "draft" / "training").exists()
    assert not (output / "adapters" / ".adapt").exists()


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
    samples = render_samples(cards)
    assert "25% of the answers loop" in samples
    assert "    > What?\n" in samples
    assert "    > What?\n" not in text


def _measured(length: float) -> dict[str, object]:
    return {
        "mean_acceptance_length": length,
        "without_loops": length - 0.25,
        "loop_share": 0.5,
        "tokens_per_second": 100.0 * length,
        "speed_up": length / 2,
    }


def test_acceptance_tables_state_loops_speed_and_retention() -> None:
    def at(length: float) -> dict[str, object]:
        return {"0.0": _measured(length), "1.0": _measured(length)}

    models = {
        "base": {"plain": at(1.0), "shared": at(3.0)},
        "math": {"plain": at(1.0), "shared": at(1.5), "private": at(3.5)},
    }
    table = acceptance_table({"models": models})
    assert "| math | private | 3.50 | 3.25 | 50% | 350 | 1.75x | 3.50 | 350 | 1.75x |" in table
    assert "| math | none | 1.00 |" in table
    assert "| math | greedy | 25% | 125% |" in retention_table({"models": models})


def test_the_draft_section_reads_what_the_commands_write(tmp_path: Path) -> None:
    (tmp_path / "draft").mkdir()
    report = {"num_parameters": 1_066_752, "num_steps": 620, "train_seconds": 386.2}
    training = {"training": report, "regeneration": {"num_tokens": 650_000}, "num_samples": 4958}
    document = {"draft_vocab_size": 4096, "vocab_size": 8192, "training": training}
    (tmp_path / "draft" / "config.json").write_text(json.dumps(document))
    learned = {"num_parameters": 167_936, "share_of_draft": 0.136, "num_steps": 204, "train_seconds": 90.4}
    manifest = {"provenance": {"train": learned, "select": {"num_kept": 1000}}}
    for name in FINE_TUNE_DOMAINS:
        (tmp_path / "adapters" / name / "1").mkdir(parents=True)
        (tmp_path / "adapters" / name / "1" / "adapter.json").write_text(json.dumps(manifest))
    text = draft_section(tmp_path)
    assert "4,096 of 8,192 tokens, trained on 4,958 answers of the base (650,000 tokens) in 620 steps" in text
    assert "| code | 167,936 | 14% | 1,000 | 204 | 90 |" in text
