"""Options of commands, made from the fields of what they fill: a field's name, type, range and help are declared there.

A command takes such options as keyword arguments: ``@with_options(options_of(Settings, ("host", "port")))`` on
``def serve(..., **given)``. Options that were not given are ``None``.
"""

import dataclasses
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from annotated_types import Ge, Le
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from eda.formats.weight_settings import WeightSetting

Weights = Annotated[
    WeightSetting | None,
    typer.Option(
        help="What the target's weights run as; auto keeps the checkpoint's precision. [auto]",
        envvar="EDA_WEIGHTS",
        show_default=False,
        show_envvar=False,
    ),
]
"""Of commands that take no other settings of a server."""


def options_of(
    declared: type[Any], names: Iterable[str] | Mapping[str, str], *, panel: str | None = None
) -> list[inspect.Parameter]:
    """Parameters of a command for some fields of a pydantic model or of a dataclass.

    Args:
        names: of the fields or, where a command calls an option otherwise, its name -> the field's.
        panel: heading in the command's help.
    """
    fields = _fields(declared)
    pairs = names if isinstance(names, Mapping) else {name: name for name in names}
    return [_option(name, fields[field], panel) for name, field in pairs.items()]


def with_options(*groups: list[inspect.Parameter]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of ``groups`` after its own; it gets them in its ``**`` parameter."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command).parameters.values()
        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in own
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        parameters += [option for group in groups for option in group]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            command(**given)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _fields(declared: type[Any]) -> dict[str, FieldInfo]:
    if issubclass(declared, BaseModel):
        return dict(declared.model_fields)
    hints = get_type_hints(declared, include_extras=True)
    return {
        field.name: FieldInfo.from_annotated_attribute(hints[field.name], field.default)
        for field in dataclasses.fields(declared)
    }


def _option(name: str, field: FieldInfo, panel: str | None) -> inspect.Parameter:
    kind = _without_none(field.annotation)
    help_text = _help(field)
    if kind is bool:
        switch = typer.Option(
            f"--{name.replace('_', '-')}", help=help_text, rich_help_panel=panel, show_default=False
        )
        annotation: Any = Annotated[bool | None, switch]
    else:
        low = next((mark.ge for mark in field.metadata if isinstance(mark, Ge)), None)
        high = next((mark.le for mark in field.metadata if isinstance(mark, Le)), None)
        bounds: Any = {"min": low, "max": high}
        annotation = Annotated[kind | None, typer.Option(help=help_text, rich_help_panel=panel, **bounds)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation
    [kind] = [kind for kind in get_args(annotation) if kind is not type(None)]
    return kind


def _help(field: FieldInfo) -> str:
    """The description as a sentence, and in brackets what holds where nothing is given."""
    match = re.fullmatch(r"(.*?)\s*(\[[^\]]*\])?", field.description or "", re.DOTALL)
    assert match is not None
    text, default = match[1], match[2]
    if default is None and field.default is not None and field.default is not False:
        default = f"[{field.default:g}]" if isinstance(field.default, float) else f"[{field.default}]"
    sentence = f"{text[:1].upper()}{text[1:]}."
    return f"{sentence} {default}" if default else sentence
