"""What may be imported before there is anything to compute: a start takes no longer than it must."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "numpy", "sqlalchemy", "fastapi", "uvicorn", "httpx"}
"""Packages that take a tenth of a second or more to import; torch and transformers take seconds."""

REPORT = """
import json, sys
try:
    {code}
finally:
    print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})), file=sys.stderr)
"""


def imported(code: str, *arguments: str, **environment: str) -> tuple[set[str], str]:
    """Top-level packages that are there when ``code`` has run in a fresh interpreter, and what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", REPORT.format(code=code), *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stderr.splitlines()[-1])), result.stdout


def command(*arguments: str, **environment: str) -> tuple[set[str], str]:
    return imported("sys.argv[0] = 'eda'; from eda.server.cli import main; main()", *arguments, **environment)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], "train-draft"),
        (["--version"], "eda "),
        (["serve", "--help"], "--models-dir"),
        (["serve", "--print-config"], '"port": 8000'),
        (["bench", "calibrate", "--help"], "--batch-sizes"),
    ],
    ids=" ".join,
)
def test_what_computes_nothing_imports_nothing_heavy(arguments: list[str], shown: str) -> None:
    packages, text = command(*arguments)
    assert shown in text
    assert packages & HEAVY == set()


def test_completion_imports_nothing_heavy() -> None:
    packages, text = command(_EDA_COMPLETE="complete_bash", COMP_WORDS="eda tr", COMP_CWORD="1")
    assert text.split() == ["train-draft"]
    assert packages & HEAVY == set()


def test_a_worker_that_waits_for_jobs_has_not_imported_torch() -> None:
    code = "import eda.adapters.worker.worker_process, eda.server.worker_settings, eda.server.commands.worker"
    packages, _ = imported(code)
    assert packages & {"torch", "transformers", "numpy"} == set()


def test_transformers_is_imported_when_a_checkpoint_is_read() -> None:
    packages, _ = imported("import eda.adapters.worker.stages, eda.server.graceful_server")
    assert "torch" in packages
    assert "transformers" not in packages


def test_the_version_is_the_packages() -> None:
    _, text = command("--version")
    assert text == f"eda {metadata.version('eda-server')}\n"
