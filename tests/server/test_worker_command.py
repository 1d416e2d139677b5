"""`eda worker`: which settings reach the worker, and what is refused."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from eda.adapters.worker import main as worker_main
from eda.adapters.worker.settings import SETTINGS_VARIABLE, WorkerSettings
from eda.server.cli import app


def test_settings_reach_the_worker(
    family_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[WorkerSettings] = []
    monkeypatch.setattr(worker_main, "run_training_worker", ran.append)
    base, draft = family_directory / "base", family_directory / "draft"
    flags = ["--target", base, "--draft", draft, "--data-dir", tmp_path, "--num-threads", 3, "--niceness", 5]
    monkeypatch.setenv("EDA_DATABASE_URL", "sqlite:////elsewhere/jobs.sqlite3")
    result = CliRunner().invoke(app, ["worker", *map(str, flags)])
    assert result.exit_code == 0, result.output
    [settings] = ran
    assert (settings.target, settings.draft) == (str(base.resolve()), str(draft.resolve()))
    assert (settings.num_threads, settings.niceness, settings.supervised) == (3, 5, False)
    assert settings.database_url == "sqlite:////elsewhere/jobs.sqlite3"
    assert WorkerSettings.from_environment({SETTINGS_VARIABLE: settings.to_json()}) == settings


def test_a_worker_without_a_draft_is_refused(family_directory: Path, tmp_path: Path) -> None:
    flags = ["--target", str(family_directory / "base"), "--data-dir", str(tmp_path)]
    result = CliRunner().invoke(app, ["worker", *flags])
    assert result.exit_code == 2
    assert "no shared draft to adapt" in result.output
