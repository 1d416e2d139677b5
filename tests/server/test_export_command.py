"""`eda export`: which version is written, what is said of it, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from safetensors.torch import load_file
from typer.testing import CliRunner

from eda.adapters.store.store import AdapterStore
from eda.backends.loading import load_fine_tune
from eda.models.private import PrivateModule
from eda.server.cli import app
from tests.adapters.fake_stages import manifest_for
from tests.support.family import Family


def export(family: Path, *arguments: object) -> Result:
    flags = ["--target", family / "base", "--draft", family / "draft", *arguments]
    return CliRunner().invoke(app, ["export", *map(str, flags)])


@pytest.fixture
def store(family: Family, family_directory: Path, tmp_path: Path) -> Path:
    """Two versions for `math`, 3 and 5 units wide."""
    store = AdapterStore(tmp_path / "store")
    fine_tune = load_fine_tune(family_directory / "math", family.target, "math")
    for width in (3, 5):
        module = PrivateModule.initialised(family.draft.config.private_config(width), seed=width)
        module.save(tmp_path / "weights.safetensors")
        manifest = replace(
            manifest_for("math", fine_tune=fine_tune.fingerprint),
            target_fingerprint=family.target.fingerprint,
            draft_fingerprint=family.draft.fingerprint(),
            sizes={"hidden_size": 32, "num_features": 96, "intermediate_size": width, "fc_rank": 0},
        )
        store.publish(tmp_path / "weights.safetensors", manifest)
    return store.root


def test_a_version_the_newest_and_the_shared_draft(
    family_directory: Path, store: Path, tmp_path: Path
) -> None:
    math = ("--fine-tune", family_directory / "math", "--store", store, "--name", "math")
    for name, arguments, width in (
        ("first", (*math, "--version", 1), 64 + 3),
        ("newest", math, 64 + 5),
        ("shared", (), 64),
    ):
        result = export(family_directory, *arguments, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        assert f"intermediate size {width}, states [1, 2, 4] of the target" in result.output
        document = json.loads((tmp_path / name / "config.json").read_text())
        assert document["intermediate_size"] == width
        weights = load_file(tmp_path / name / "model.safetensors")
        assert weights["midlayer.mlp.down_proj.weight"].shape == (32, width)
    assert document["eda"]["adapter"] is None
    assert "math version 2" in export(family_directory, *math, "--out", tmp_path / "again").output


def test_refusals_say_what_would_be_right(family_directory: Path, store: Path, tmp_path: Path) -> None:
    named = ("--store", store, "--name", "math")
    math = ("--fine-tune", family_directory / "math")
    for arguments, message in (
        ((*named, "--out", tmp_path / "x"), "made for the fine-tune with fingerprint"),
        ((*math, *named, "--version", 7, "--out", tmp_path / "x"), "no version 7; there are: 1, 2"),
        ((*math, *named, "--out", store), "exists; name a directory that does not"),
        ((*named[:2], "--out", tmp_path / "x"), "--store and --name together"),
        (("--version", 1, "--out", tmp_path / "x"), "--store and --name together"),
        (
            ("--store", tmp_path / "no", "--name", "math", "--out", tmp_path / "x"),
            "there is no such directory",
        ),
        (("--store", store, "--name", "law", "--out", tmp_path / "x"), "holds no version of it"),
        (("--dtype", "int8", "--out", tmp_path / "x"), "must be one of auto, bfloat16, float32"),
    ):
        result = export(family_directory, *arguments)
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.output.split())
        assert not (tmp_path / "x").exists()
