"""The import rules of docs/architecture.md, function-level imports included."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def above(*rooms: str) -> set[str]:
    """Of `adapters`: these rooms, and the modules on top of all rooms."""
    return {f"eda.adapters.{name}" for name in (*rooms, "service", "submission")}


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
        "benchmarks",
        "recipes",
    },
    "adapters/store": above("jobs", "serving", "templates", "worker"),
    "adapters/templates": above("jobs", "serving", "store", "worker"),
    "adapters/jobs": above("worker.main", "worker.settings", "worker.stages", "worker.worker"),
    "adapters/serving": above("worker"),
    "adapters/worker": above(),
    "adapters": {"benchmarks", "recipes", "eda.server", "fastapi", "starlette", "uvicorn"},
    "server/engine": {"eda.adapters", "fastapi", "starlette", "uvicorn"},
    "server": {"benchmarks", "recipes"},
}

STOREYS = (
    *("errors", "files", "transfers", "formats", "models", "sampling"),
    *("speculation", "backends", "decoder", "generation", "training"),
)
"""The rooms of ``eda``, lowest first: each imports only those before it."""

OTHER_NAMES = {"server", "adapters"}
"""Packages of others have these names; ours are `eda.server` and `eda.adapters`."""


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def imported_modules(source: str) -> Iterator[str]:
    """Every module that ``source`` imports, at any depth, also through ``__import__`` and ``import_module``.

    A module that is imported from its package by ``from`` is given beside the package.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            yield node.module or ""
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name for name in names if is_module(name))
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


def upward(room: str, source: str) -> set[str]:
    """Imports of ``source``, a file of ``room``, that lead to a higher storey or to a room that has none."""
    allowed = STOREYS[: STOREYS.index(room) + 1]
    imported = (name for name in imported_modules(source) if name.startswith("eda."))
    return {name for name in imported if name.split(".")[1] not in allowed}


def test_storeys_of_eda_import_downwards() -> None:
    found = {}
    for path in (ROOT / "eda").rglob("*.py"):
        room = path.relative_to(ROOT / "eda").parts[0].removesuffix(".py")
        if room in {"__init__", "adapters", "server"}:
            continue
        if names := upward(room, path.read_text(encoding="utf-8")):
            found[str(path.relative_to(ROOT))] = names
    assert found == {}
    assert upward("models", "def f():\n    from eda.backends.base import Backend\n") == {"eda.backends.base"}


def test_no_backend_knows_another() -> None:
    """All may use the one on torch, which takes what they leave; only choice and loading know which there are."""
    folder = ROOT / "eda" / "backends"
    for path in folder.rglob("*.py"):
        own = path.relative_to(folder).parts[0]
        if own in {"choice.py", "loading.py"}:
            continue
        for name in imported_modules(path.read_text(encoding="utf-8")):
            parts = name.split(".")
            if parts[:2] == ["eda", "backends"] and parts[2] in {"cpu", "recorded"}:
                assert parts[2] == own, f"{path} imports {name}"


def test_modules_import_each_other_in_no_circle() -> None:
    """Imports inside functions and for type checks count too."""
    graph = {}
    for top in ("eda", "adapters", "server"):
        for path in (ROOT / top).rglob("*.py"):
            inside = path.relative_to(ROOT).with_suffix("").parts
            module = ".".join(inside if top == "eda" else ("eda", *inside))
            graph[module] = set(imported_modules(path.read_text(encoding="utf-8")))
    for module, imported in graph.items():
        graph[module] = (imported & graph.keys()) - {module}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_the_check_sees_imports_inside_functions() -> None:
    source = (
        "def f():\n"
        "    from eda.server.app import create_app\n"
        "    import importlib\n"
        "    importlib.import_module('eda.adapters.store.store')\n"
    )
    assert violations("eda", source) == {"eda.server.app", "eda.adapters.store.store"}
    assert violations("adapters/serving", "from eda.adapters import worker\n") == {"eda.adapters.worker"}


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


MOST_FLOORS = 8


def floors_of(graph: dict[str, set[str]]) -> dict[str, int]:
    """By room of ``eda``, how many rooms lie one above the other up to it. Raises ``CycleError``."""
    rooms: dict[str, set[str]] = {}
    for name, imported in graph.items():
        _, *parts = name.split(".")
        if parts and parts[0] not in OTHER_NAMES:
            below = rooms.setdefault(parts[0], set())
            below |= {other.split(".")[1] for other in imported if other.startswith("eda.")} - {parts[0]}
    floors: dict[str, int] = {}
    for room in TopologicalSorter(rooms).static_order():
        floors[room] = 1 + max((floors[below] for below in rooms[room]), default=0)
    return floors


def test_the_rooms_of_eda_lie_on_few_floors() -> None:
    graph = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): set(imported_modules(path.read_text("utf-8")))
        for path in (ROOT / "eda").rglob("*.py")
    }
    floors = floors_of(graph)
    assert floors.keys() == {*STOREYS, "__init__"}
    assert max(floors.values()) <= MOST_FLOORS, floors


def test_the_check_of_floors_finds_circles() -> None:
    graph = {"eda.low.a": set(), "eda.mid.b": {"eda.low.a"}, "eda.top": {"eda.mid.b", "eda.low.a"}}
    assert floors_of(graph) == {"low": 1, "mid": 2, "top": 3}
    with pytest.raises(CycleError):
        floors_of(graph | {"eda.low.c": {"eda.top"}})


WHO_COMPUTES = re.compile(
    r"\b(CpuBody|TorchBody|has_kernel|BackendName|backend\.name|eda\.backends\.(?:cpu|eager|recorded))\b"
)
MAY_MENTION = {
    "eda/models/target.py": {"TorchBody"},  # where it lives
    "server/assembly.py": {"backend.name"},  # for the log
}


@pytest.mark.parametrize("folder", ["eda", "adapters", "server"])
def test_nobody_but_the_backends_knows_who_computes(folder: str) -> None:
    """Outside they are one name for logs, and what they state of themselves (``eda/backends/base.py``)."""
    found = {}
    for path in (ROOT / folder).rglob("*.py"):
        name = str(path.relative_to(ROOT))
        mentions = set(WHO_COMPUTES.findall(path.read_text("utf-8"))) - MAY_MENTION.get(name, set())
        if mentions and not name.startswith("eda/backends/"):
            found[name] = mentions
    assert found == {}
