"""Settings from flags, environment and file, and what is printed of them."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from eda.server.cli import app
from eda.server.model_paths import model_paths
from eda.server.settings import ConfigurationError, Settings, load_settings


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "eda.toml", "port = 1\nmax_running = 2\nmax_waiting = 300\n")
    monkeypatch.setenv("EDA_PORT", "10")
    monkeypatch.setenv("EDA_MAX_RUNNING", "20")
    settings = load_settings(file, {"port": 100, "weights": None})
    assert (settings.port, settings.max_running, settings.max_waiting, settings.weights) == (
        100,
        20,
        300,
        "auto",
    )


def test_weights_come_from_the_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "eda.toml", 'weights = "int4"\n')
    assert load_settings(file).weights == "int4"
    monkeypatch.setenv("EDA_WEIGHTS", "int8")
    assert load_settings(file).weights == "int8"
    with pytest.raises(
        ConfigurationError, match=r"weights: .*'auto', 'float32', 'bfloat16', 'int8' or 'int4'"
    ):
        load_settings(file, {"weights": "fp8"})


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    text = 'target = "base"\ndata_dir = "data"\n[fine_tunes]\nlaw = "tunes/law"\n'
    settings = load_settings(write(tmp_path / "eda.toml", text))
    assert settings.target == tmp_path / "base"
    assert settings.data_dir == tmp_path / "data"
    assert settings.fine_tunes == {"law": tmp_path / "tunes/law"}


def test_a_family_of_ones_own(tmp_path: Path, family_directory: Path) -> None:
    text = f"""
        target = "{family_directory}/base"
        draft = "{family_directory}/draft"
        model_name = "mine"
        [fine_tunes]
        arithmetic = "{family_directory}/math"
    """
    paths = model_paths(load_settings(write(tmp_path / "eda.toml", text)))
    assert paths.fine_tunes == {"arithmetic": family_directory / "math"}
    assert paths.draft == family_directory / "draft"


def test_a_directory_with_the_bundled_layout(family_directory: Path) -> None:
    paths = model_paths(load_settings(None, {"models_dir": family_directory}))
    assert list(paths.fine_tunes) == ["code", "full", "math"]
    assert paths.draft == family_directory / "draft"
    assert model_paths(load_settings(None, {"models_dir": family_directory, "no_draft": True})).draft is None


def test_missing_models_are_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no model"):
        model_paths(load_settings(None, {"models_dir": tmp_path}))
    with pytest.raises(ConfigurationError, match="law: there is no directory"):
        model_paths(load_settings(None, {"target": tmp_path, "fine_tunes": {"law": tmp_path / "x"}}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port = 'x'", "port"),
        ("colour = 1", "colour"),
        ("max_waiting = 0", "max_waiting"),
        ("port = ", "TOML"),
        ("[fine_tunes]\nbase = 'x'", "base model and a fine-tune"),
        ("model_name = 'owner/model'", "the name of a model is 'owner/model'; it must be 1 to 64"),
        ("[fine_tunes]\n'../x' = 'x'", "the name of a model is '../x'"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_settings(write(tmp_path / "eda.toml", text))


def test_print_config_shows_everything_but_secrets(tmp_path: Path) -> None:
    environment = {"EDA_API_KEYS": "secret-one,secret-two", "EDA_ADMIN_KEY": "secret-boss"}
    result = CliRunner().invoke(app, ["serve", "--print-config", "--port", "8123"], env=environment)
    assert result.exit_code == 0
    values = json.loads(result.output)
    assert values["port"] == 8123
    assert len(values["api_keys"]) == 2
    assert "secret" not in result.output


def test_refused_settings_end_with_a_sentence() -> None:
    result = CliRunner().invoke(app, ["serve", "--host", "0.0.0.0"])
    assert result.exit_code == 2
    assert "EDA_ADMIN_KEY" in result.output


def test_a_server_without_models_says_what_to_do(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve", "--models-dir", str(tmp_path)])
    assert result.exit_code == 2
    assert "holds no model" in result.output
    assert "--target" in result.output


def test_a_request_is_never_larger_than_the_queue() -> None:
    assert load_settings(None, {"max_waiting": 5}).sequences_limit == 5
    assert load_settings(None, {"max_sequences_per_request": 3}).sequences_limit == 3


def test_every_setting_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE))
    assert documented == set(Settings.model_fields)
