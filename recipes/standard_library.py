"""Python functions and classes of the interpreter's own standard library, as prompts and responses.

The signature and the docstring are the prompt, the source without the docstring is the response. The text is read at
run time from the interpreter that runs the recipe (PSF licence), so no copy of it is kept with the project, and
another Python version gives a slightly different set.
"""

import ast
import sysconfig
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path

from recipes.text import Row

SOURCE = "python/standard-library"

# Tests and demonstrations are written in another style than libraries; `encodings` and `pydoc_data` are tables.
_SKIPPED = frozenset(
    {
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "encodings",
        "pydoc_data",
        "site-packages",
        "dist-packages",
    }
)
# One module in this many is held out as a whole: functions of one module resemble each other too much to be divided.
_HELD_OUT_EVERY = 12
_MAX_RESPONSE_CHARACTERS = 1400
_MIN_RESPONSE_CHARACTERS = 60

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def standard_library_rows(held_out: bool, stdlib: Path | None = None) -> list[Row]:
    """Rows from the held-out modules, or from all the others, sorted by module and position."""
    root = stdlib or Path(sysconfig.get_paths()["stdlib"])
    rows = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED.isdisjoint(parts) and is_held_out(parts[0]) == held_out:
            rows += list(_module_rows(path, ".".join(part for part in parts if part != "__init__")))
    unique = {row.prompt: row for row in rows}
    return list(unique.values())


def is_held_out(top_level_module: str) -> bool:
    """Whether a module (with all its submodules) is kept for evaluation; the same on every machine."""
    return zlib.crc32(top_level_module.encode()) % _HELD_OUT_EVERY == 0


def _module_rows(path: Path, module: str) -> Iterator[Row]:
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        return
    lines = source.splitlines()
    for node in tree.body:
        if isinstance(node, _Definition):
            yield from _definition_rows(node, lines, f"the module `{module}`")
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield from _definition_rows(member, lines, f"the class `{node.name}` of `{module}`")


def _definition_rows(node: _Definition, lines: list[str], place: str) -> Iterator[Row]:
    docstring = ast.get_docstring(node)
    first_statement = node.body[1:] if docstring is not None else node.body
    if not first_statement or node.end_lineno is None:
        return
    # Signature lines end where the body begins; the docstring (when there is one) moves to the prompt.
    signature = lines[node.lineno - 1 : node.body[0].lineno - 1]
    after = node.body[0].end_lineno if docstring is not None else node.body[0].lineno - 1
    if not signature or after is None:
        return
    decorators = lines[
        min((d.lineno for d in node.decorator_list), default=node.lineno) - 1 : node.lineno - 1
    ]
    response = textwrap.dedent("\n".join([*decorators, *signature, *lines[after : node.end_lineno]])).strip(
        "\n"
    )
    if not _MIN_RESPONSE_CHARACTERS <= len(response) <= _MAX_RESPONSE_CHARACTERS:
        return
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    text = textwrap.dedent("\n".join(signature)).strip()
    if docstring:
        text += "\n" + textwrap.indent(f'"""{docstring}"""', "    ")
    prompt = f"Write the Python {kind} `{node.name}` for {place}.\n\n{text}"
    if len(prompt) <= _MAX_RESPONSE_CHARACTERS:
        yield Row(prompt, response, SOURCE)
