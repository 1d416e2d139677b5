"""The `eda` console script. Commands live in `server/commands/`, one module each."""

import sys
from collections.abc import Iterable
from importlib import import_module

import typer

COMMANDS = ("serve", "generate", "adapt", "train-draft", "export", "worker", "bench")


def make_app(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """The console script with the commands ``names``; the modules of others are not imported."""
    app = typer.Typer(
        name="eda",
        help="LLM inference with speculative decoding and a private draft module for each fine-tune.",
        no_args_is_help=True,
        rich_markup_mode="markdown",  # with the default one, "[auto]" in a help text would be read as markup and vanish
        pretty_exceptions_enable=False,
    )
    app.callback()(lambda: None)  # else an application of one command would take no name of a command
    for name in names:
        module = import_module(f"server.commands.{name.replace('-', '_')}")
        if name == "bench":
            app.add_typer(module.app, name=name)
        else:
            app.command(name)(getattr(module, name.replace("-", "_")))
    return app


def main() -> None:
    """Entry point of the console script. Most commands import torch, which takes seconds: only what is asked for."""
    asked = sys.argv[1:2]
    make_app(asked if asked and asked[0] in COMMANDS else COMMANDS)()
