"""Options of commands that are made from declared fields."""

from typing import Annotated, Any

import pytest
import typer
from pydantic import BaseModel, Field
from typer.main import get_command
from typer.testing import CliRunner

from eda.server.cli import app
from eda.server.commands.options import options_of, with_options
from eda.server.schemas.adapters import AdaptBody

OPTION_OF = {"intermediate_size": "width"}
"""Where the flag has another name than the field."""


class Knobs(BaseModel):
    width: int | None = Field(None, ge=1, le=8, description="width of the thing, units [the widest]")
    rate: float = Field(0.5, description="how fast")
    fast: bool = Field(False, description="in a hurry")


def command() -> tuple[typer.Typer, list[dict[str, Any]]]:
    """A command with an option of its own and three declared ones, one of them under another name."""
    seen: list[dict[str, Any]] = []
    app = typer.Typer(rich_markup_mode="markdown")

    @app.command()
    @with_options(options_of(Knobs, {"size": "width"}), options_of(Knobs, ("rate", "fast"), panel="Speed"))
    def run(name: Annotated[str, typer.Option(help="Whose.")], **given: Any) -> None:
        """Turn knobs."""
        seen.append({"name": name, **given})

    return app, seen


def test_what_is_given_arrives_and_the_rest_is_none() -> None:
    app, seen = command()
    assert CliRunner().invoke(app, ["--name", "x", "--size", "3", "--fast"]).exit_code == 0
    assert CliRunner().invoke(app, ["--name", "y"]).exit_code == 0
    assert seen == [
        {"name": "x", "size": 3, "rate": None, "fast": True},
        {"name": "y", "size": None, "rate": None, "fast": None},
    ]


@pytest.mark.parametrize(("value", "word"), [("0", "equal to 1"), ("9", "equal to 8"), ("wide", "integer")])
def test_the_declared_range_and_type_hold(value: str, word: str) -> None:
    app, seen = command()
    result = CliRunner().invoke(app, ["--name", "x", "--size", value])
    assert result.exit_code == 2
    assert "--size" in result.output
    assert word in result.output
    assert seen == []


def test_help_has_the_description_and_the_default() -> None:
    output = (
        CliRunner().invoke(command()[0], ["--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).output
    )
    assert "Turn knobs." in output
    assert "Width of the thing, units. [the widest]" in output
    assert "How fast. [0.5]" in output
    assert "Speed" in output


def test_a_training_option_is_described_alike_in_requests_and_flags() -> None:
    properties = AdaptBody.model_json_schema()["$defs"]["TrainingOptions"]["properties"]
    shown = {option.name: option.help for option in get_command(app).commands["adapt"].params}  # type: ignore[attr-defined]
    assert len(properties) == 12
    for name, schema in properties.items():
        text = schema["description"].partition(" [")[0]
        assert shown[OPTION_OF.get(name, name)].startswith(f"{text[0].upper()}{text[1:]}. ["), name
