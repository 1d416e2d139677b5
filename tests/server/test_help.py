"""`--help` of every command: nothing of what it should say is lost on the way."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from eda.server.cli import app


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, inner in command.commands.items():
        yield from commands(inner, (*path, name))


@pytest.mark.parametrize(
    ("path", "command"),
    [pytest.param(*item, id=" ".join(item[0])) for item in commands(get_command(app))],
)
def test_help_shows_every_default(path: tuple[str, ...], command: Any) -> None:
    """Defaults that a setting or a model decides stand in brackets, which must not be taken for markup."""
    result = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"})
    assert result.exit_code == 0
    shown = " ".join(result.output.split())
    for option in command.params:
        for default in re.findall(r"\[.*?\]", getattr(option, "help", None) or ""):
            assert default.replace("`", "") in shown, (option.name, default)


def test_help_shows_names_in_angle_brackets() -> None:
    assert "EDA_<NAME>" in CliRunner().invoke(app, ["serve", "--help"]).output
