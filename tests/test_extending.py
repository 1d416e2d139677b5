"""The recipes of docs/extending.md: short, and about files that are there.

Two of them are carried out with toys: a drafting method by ``tests/eda/backends/test_backends.py``, a job stage by
``tests/adapters/test_new_stage.py``.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MOST_LINES = 15


def recipes() -> dict[str, str]:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    _, *parts = re.split(r"^## (.+)\n", page, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


RECIPES = recipes()


def named_paths(recipe: str) -> list[str]:
    return re.findall(r"`([\w-]+(?:/[\w.-]+)+/?)`", recipe)


def test_there_is_a_recipe_for_each_kind_of_addition() -> None:
    assert list(RECIPES) == [
        "An architecture",
        "A drafting method",
        "A weight format",
        "A job stage",
        "A sampling field",
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short_and_names_files_that_exist(name: str) -> None:
    lines = RECIPES[name].strip().splitlines()
    assert len(lines) <= MOST_LINES
    assert max(map(len, lines)) <= 120
    paths = named_paths(RECIPES[name])
    assert len(paths) >= 4
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert any(path.startswith("tests/") for path in paths), "each says which tests show it"


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_quotes_stands_in_its_files(name: str) -> None:
    """Names in code of one word are identifiers of some file that the recipe names."""
    files = [ROOT / path for path in named_paths(RECIPES[name])]
    sources = "\n".join(path.read_text("utf-8") for path in files if path.is_file())
    words = set(re.findall(r"`([A-Za-z_]+)`", RECIPES[name]))
    assert {word for word in words if not re.search(rf"\b{word}\b", sources)} == set()
