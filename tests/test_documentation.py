"""The pages name files that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REFERENCE = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
NOTEBOOKS = sorted((ROOT / "docs" / "measurements").glob("*.md"))
CARDS = [ROOT / "models" / "README.md", ROOT / "recipes" / "README.md"]


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", REFERENCE + NOTEBOOKS + CARDS, ids=page_name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        goal = page.parent / file if file else page
        if not goal.exists() or (anchor and anchor not in anchors(goal)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", REFERENCE, ids=page_name)
def test_paths_in_the_code_are_there(page: Path) -> None:
    """Paths from the top of the repository; those of a notebook may be of its date."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/.$])((?:eda|adapters|server|tests|benchmarks|recipes)/[\w/.-]*\w/?)", text)
    missing = {path for path in named if not (ROOT / path).exists()}
    assert missing == set()


def test_the_folder_tree_names_every_room_and_nothing_else() -> None:
    """The tree of docs/architecture.md: folders of `eda`, `adapters` and `server`, and every file that it names."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page.partition("## The folders")[2].partition("```\n")[2].partition("```")[0]
    files = {path.name for top in ("eda", "adapters", "server") for path in (ROOT / top).rglob("*.py")}
    assert set(re.findall(r"\b\w+\.py\b", tree)) <= files
    rooms = {
        path.name
        for top in ("eda", "adapters", "server")
        for path in (ROOT / top).rglob("*")
        if path.is_dir() and not path.is_symlink() and (path / "__init__.py").exists()
    }
    assert rooms <= set(re.findall(r"\b(\w+)/", tree))
