"""`eda bench adaptation`: the ablation of EDA, see `benchmarks/adaptation.py`."""

import sys
from pathlib import Path

import typer

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Everything after the command belongs to the benchmark's own parser, `--help` too."""


def bench_adaptation(context: typer.Context) -> None:
    """Compare private modules, full retraining and LoRA on the draft, over data, domains and seeds."""
    root = Path(__file__).parents[2]
    if not (root / "benchmarks").is_dir():
        typer.echo(
            "eda bench adaptation: it lies in benchmarks/ of the project's checkout, which is not here",
            err=True,
        )
        raise typer.Exit(2)
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    from benchmarks.adaptation import main

    raise typer.Exit(main(context.args))
