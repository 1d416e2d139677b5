"""The `eda` console script. Commands live in `server/commands/`, one module each.

These modules declare options. What a command needs to run is imported when it runs, so that help, completion and
wrong options are answered at once.
"""

from importlib import metadata
from typing import Annotated

import typer

from eda.server.commands import adapt, bench, export, generate, serve, train_draft, worker

app = typer.Typer(
    name="eda",
    help="LLM inference with speculative decoding and a private draft module for each fine-tune.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # with the default one, "[auto]" in a help text would be read as markup and vanish
    pretty_exceptions_enable=False,
)
app.command("serve")(serve.serve)
app.command("generate")(generate.generate)
app.command("adapt")(adapt.adapt)
app.command("train-draft")(train_draft.train_draft)
app.command("export")(export.export)
app.command("worker")(worker.worker)
app.add_typer(bench.app, name="bench")


def _show_version(asked: bool) -> None:
    if asked:
        try:
            version = metadata.version("eda-server")
        except metadata.PackageNotFoundError:
            version = "(not installed)"
        typer.echo(f"eda {version}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and end.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    app()
