"""The `eda` console script. Commands live in `server/commands/`, one module each."""

import typer

from server.commands import adapt, bench, export, generate, serve, train_draft, worker

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


def main() -> None:
    """Entry point of the console script."""
    app()
