"""The process that the server starts: it comes up by its command, and without a job it loads no torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eda.adapters.worker.settings import SETTINGS_VARIABLE, WorkerSettings
from eda.server.worker_supervisor import WorkerSupervisor
from tests.adapters.helpers import wait_for

ROOT = Path(__file__).parents[2]


def test_the_supervisors_own_command_starts_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    supervisor = WorkerSupervisor(WorkerSettings(str(tmp_path), "", "", poll_seconds=0.05, supervised=True))
    supervisor.start()
    try:
        wait_for(lambda: (tmp_path / "eda.sqlite3").exists(), what="the worker's database")
        assert supervisor.num_restarts == 0
    finally:
        supervisor.stop()


def test_a_worker_without_a_job_has_not_loaded_torch(tmp_path: Path) -> None:
    settings = WorkerSettings(str(tmp_path), "", "", poll_seconds=0.05, supervised=True, niceness=0)
    code = "import sys; from eda.adapters.worker.main import main; main(); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), SETTINGS_VARIABLE: settings.to_json()}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.DEVNULL, timeout=60, check=False
    )
    assert ended.returncode == 0
    assert (tmp_path / "eda.sqlite3").exists()
