"""The wheel, installed where others have packages called `adapters` and `server`."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "eda", "adapters", "server")
"""What the Dockerfile copies."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: `pip wheel` leaves a build folder in the sources and would reuse an old one."""
    pytest.importorskip("setuptools")
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, checkout / name, symlinks=True)
        else:
            shutil.copy(source, checkout)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(checkout))
    [path] = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages: this project's, and others' with names that it must leave alone."""
    directory = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", str(directory), str(wheel))
    for name in ("adapters", "server"):
        (directory / name).mkdir()
        (directory / name / "__init__.py").write_text(f'OWNER = "the other {name}"\n', encoding="utf-8")
    return directory


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr


def python(site: Path, *arguments: str) -> str:
    """What an interpreter says that sees ``site`` before the environment's own packages, and no checkout."""
    environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "200"}
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=site.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_everything_in_the_wheel_lies_in_eda(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"eda"}
    packed = {name for name in names if name.startswith("eda/")}
    needed = {
        str(Path("" if folder == "eda" else "eda", path.relative_to(ROOT)))
        for folder in ("eda", "adapters", "server")
        for pattern in ("*.py", "*.cpp", "*.h", "*.jsonl")
        for path in (ROOT / folder).rglob(pattern)
    }
    assert packed == needed


def test_packages_of_others_keep_their_names(site: Path) -> None:
    code = """
import adapters, server
import eda.server.cli, eda.adapters.worker, eda.adapters.worker.worker_process
import eda.server.graceful_server
print(adapters.OWNER, server.OWNER, eda.server.__file__, eda.adapters.__file__, sep="\\n")
"""
    assert python(site, "-c", code).splitlines() == [
        "the other adapters",
        "the other server",
        str(site / "eda" / "server" / "__init__.py"),
        str(site / "eda" / "adapters" / "__init__.py"),
    ]


def test_the_installed_command_lists_what_it_can_do(site: Path) -> None:
    """The benchmark of the method needs a checkout; load on a server has its prompts with it."""
    listed = python(site, "-m", "eda.server", "bench", "--help")
    assert "serve" in listed
    assert "calibrate" in listed
    assert "adaptation" not in listed
    code = (
        "from eda.server.bundled_prompts import bundled_prompts as p; print(p('math').stat().st_size > 1000)"
    )
    assert python(site, "-c", code) == "True\n"
    assert (
        "adaptation"
        in subprocess.run(
            [sys.executable, "-m", "eda.server", "bench", "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
    )


@pytest.mark.parametrize("name", ["adapters", "server"])
def test_folders_of_the_checkout_are_packages_of_eda(name: str) -> None:
    link = ROOT / "eda" / name
    assert link.is_symlink(), (
        f"{link} must be a link to ../{name}; check the repository out with symbolic links"
    )
    assert os.readlink(link) == f"../{name}"
