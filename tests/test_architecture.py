"""The import rules of docs/architecture.md, function-level imports included."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FORBIDDEN = {
    "eda": {
        "eda.adapters",
        "eda.server",
        "fastapi",
        "starlette",
        "uvicorn",
        "asyncio",
        "threading",
        "sqlalchemy",
    },
    "adapters": {"eda.server", "fastapi", "starlette", "uvicorn"},
    "server/engine": {"eda.adapters", "fastapi", "starlette", "uvicorn"},
    "server": {"benchmarks", "recipes"},
}

OTHER_NAMES = {"server", "adapters"}
"""Packages of others have these names; ours are `eda.server` and `eda.adapters`."""


def imported_modules(source: str) -> Iterator[str]:
    """Every module that ``source`` imports, at any depth, also through ``__import__`` and ``import_module``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            yield node.module or ""
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if (
                name in {"__import__", "import_module"}
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                yield str(node.args[0].value)


def violations(folder: str, source: str) -> set[str]:
    return {
        name
        for name in imported_modules(source)
        if any(name == barred or name.startswith(f"{barred}.") for barred in FORBIDDEN[folder])
    }


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_a_layer_imports_only_what_lies_below_it(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder} has no Python files"
    found = {
        str(path.relative_to(ROOT)): names
        for path in files
        if (names := violations(folder, path.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_the_check_sees_imports_inside_functions() -> None:
    source = (
        "def f():\n"
        "    from eda.server.app import create_app\n"
        "    import importlib\n"
        "    importlib.import_module('eda.adapters.store.store')\n"
    )
    assert violations("eda", source) == {"eda.server.app", "eda.adapters.store.store"}


@pytest.mark.parametrize("package", ["eda", "adapters", "server"])
def test_init_files_hold_a_docstring_and_nothing_else(package: str) -> None:
    for path in (ROOT / package).rglob("__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1, path
        assert isinstance(body[0], ast.Expr), path


@pytest.mark.parametrize("package", ["eda", "adapters", "server", "recipes", "benchmarks"])
def test_names_that_say_nothing_are_not_used(package: str) -> None:
    names = {path.stem for path in (ROOT / package).rglob("*.py")}
    assert names.isdisjoint({"utils", "common", "manager", "helpers", "misc"})


@pytest.mark.parametrize("folder", ["eda", "adapters", "server", "recipes", "benchmarks", "tests"])
def test_modules_are_imported_by_one_name_only(folder: str) -> None:
    """From the top of a checkout, `server` could be imported beside `eda.server`: the same code as other modules."""
    found = {
        str(path.relative_to(ROOT)): names
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "test_packaging.py"  # it runs another `server` on purpose
        and (
            names := OTHER_NAMES
            & {name.partition(".")[0] for name in imported_modules(path.read_text("utf-8"))}
        )
    }
    assert found == {}
