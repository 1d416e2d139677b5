"""`eda bench adaptation`: the ablation of EDA, `benchmarks/adaptation.py` of the project's checkout."""

import os
import subprocess
import sys
from pathlib import Path

import typer

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Everything after the command belongs to the benchmark's own parser, `--help` too."""
_CHECKOUT = Path(__file__).resolve().parents[2]


def is_available() -> bool:
    """Whether this is a checkout: an installed package has no benchmarks."""
    return (_CHECKOUT / "benchmarks" / "adaptation.py").is_file()


def bench_adaptation(context: typer.Context) -> None:
    """Compare private modules, full retraining and LoRA on the draft, over data, domains and seeds."""
    path = os.pathsep.join(filter(None, [str(_CHECKOUT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "benchmarks.adaptation", *context.args]
    raise typer.Exit(subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode)
