"""The import rules of docs/architecture.md, function-level imports included."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ABOVE_SPECULATION = {"eda.backends", "eda.decoder", "eda.generation", "eda.training"}
STAGES = {f"eda.training.{name}" for name in ("triage", "shared_draft", "private_module", "evaluate")}
ABOVE_ROOMS = {"eda.adapters.service", "eda.adapters.submission"}

FORBIDDEN = {
    "eda/formats": {
        "eda.transfers",
        "eda.models",
        "eda.sampling",
        "eda.speculation",
        *ABOVE_SPECULATION,
    },
    "eda/models": {"eda.sampling", "eda.speculation", *ABOVE_SPECULATION},
    "eda/sampling": {"eda.formats", "eda.models", "eda.speculation", *ABOVE_SPECULATION},
    "eda/speculation": ABOVE_SPECULATION,
    "eda/backends": {"eda.decoder", "eda.generation", "eda.training"},
    "eda/backends/eager": {"eda.backends.cpu", "eda.backends.recorded", "eda.backends.choice"},
    "eda/backends/cpu": {"eda.backends.recorded", "eda.backends.choice"},
    "eda/backends/recorded": {"eda.backends.cpu", "eda.backends.choice"},
    "eda/training/data": STAGES,
    "eda/training/learning": {"eda.generation", *STAGES},
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
    "adapters/store": {
        *(f"eda.adapters.{room}" for room in ("jobs", "serving", "templates", "worker")),
        *ABOVE_ROOMS,
    },
    "adapters/templates": {
        *(f"eda.adapters.{room}" for room in ("jobs", "serving", "store", "worker")),
        *ABOVE_ROOMS,
    },
    "adapters/jobs": {
        *(f"eda.adapters.worker.{name}" for name in ("main", "settings", "stages", "worker")),
        *ABOVE_ROOMS,
    },
    "adapters/serving": {"eda.adapters.worker", *ABOVE_ROOMS},
    "adapters/worker": ABOVE_ROOMS,
    "adapters": {"benchmarks", "recipes", "eda.server", "fastapi", "starlette", "uvicorn"},
    "server/engine": {
        *(f"eda.server.{name}" for name in ("commands", "routes", "schemas", "services", "settings")),
        "eda.adapters",
        "fastapi",
        "starlette",
        "uvicorn",
    },
    "server/schemas": {"eda.server.routes", "eda.server.services", "fastapi"},
    "server": {"benchmarks", "recipes"},
}
"""By folder, what its modules never import: a package stands for all that is in it."""

MOST_FLOORS = 8

WHO_COMPUTES = re.compile(
    r"\b(CpuBody|TorchBody|has_kernel|BackendName|backend\.name|eda\.backends\.(?:cpu|eager|recorded))\b"
)
MAY_MENTION = {
    "eda/models/target.py": {"TorchBody"},  # where it lives
    "server/assembly.py": {"backend.name"},  # for the log
}

OTHER_NAMES = {"server", "adapters"}
"""Packages of others have these names; ours are `eda.server` and `eda.adapters`."""


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def nodes_of(node: ast.AST, *, with_types: bool) -> Iterator[ast.AST]:
    """``node`` and all in it, but ``if TYPE_CHECKING`` only where it is wanted."""
    if is_for_types(node) and not with_types:
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from nodes_of(child, with_types=with_types)


def imported_modules(source: str, *, with_types: bool = True) -> Iterator[str]:
    """Every module that ``source`` imports, at any depth, also through ``__import__`` and ``import_module``.

    A name imported from a package may be a module: it is given too.
    """
    for node in nodes_of(ast.parse(source), with_types=with_types):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
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
    assert violations("eda", source) >= {"eda.server.app", "eda.adapters.store.store"}
    assert violations("eda/models", "from eda import sampling\n") == {"eda.sampling"}
    assert violations("eda/models", "import eda.samplings\n") == set()


def own_modules() -> dict[str, Path]:
    """By its import name, the file of each module of this project."""
    found = {}
    for folder in ("eda", "adapters", "server", "benchmarks", "recipes"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if folder in OTHER_NAMES:
                parts = ("eda", *parts)
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def import_graph() -> dict[str, set[str]]:
    """What each module imports of this project, inside functions too, but not for types alone."""
    modules = own_modules()
    return {
        name: (set(imported_modules(path.read_text("utf-8"), with_types=False)) & modules.keys()) - {name}
        for name, path in modules.items()
    }


def test_there_is_no_circle_of_imports() -> None:
    graph = import_graph()
    assert sum(map(len, graph.values())) > 800, "the graph has what the files import"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def floors_of(graph: dict[str, set[str]]) -> dict[str, int]:
    """By room of ``eda``, how many rooms lie one above the other up to it. Raises ``CycleError``."""
    rooms: dict[str, set[str]] = {}
    for name, imported in graph.items():
        _, *parts = name.split(".")
        if parts and parts[0] not in OTHER_NAMES:
            below = rooms.setdefault(parts[0], set())
            below |= {other.split(".")[1] for other in imported if other.count(".")} - {parts[0]}
    floors: dict[str, int] = {}
    for room in TopologicalSorter(rooms).static_order():
        floors[room] = 1 + max((floors[below] for below in rooms[room]), default=0)
    return floors


def test_the_rooms_of_eda_lie_on_few_floors() -> None:
    graph = {name: imported for name, imported in import_graph().items() if name.startswith("eda.")}
    floors = floors_of(graph)
    assert max(floors.values()) <= MOST_FLOORS, floors
    order = ["formats", "models", "speculation", "backends", "decoder", "generation", "training"]
    assert order == sorted(order, key=lambda room: floors[room])


def test_the_check_of_floors_finds_circles() -> None:
    graph = {"eda.low.a": set(), "eda.mid.b": {"eda.low.a"}, "eda.top": {"eda.mid.b", "eda.low.a"}}
    assert floors_of(graph) == {"low": 1, "mid": 2, "top": 3}
    with pytest.raises(CycleError):
        floors_of(graph | {"eda.low.c": {"eda.top"}})


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
