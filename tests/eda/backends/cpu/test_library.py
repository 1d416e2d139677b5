"""Building the C++ passes, and models on machines that cannot."""

import ctypes
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from eda.backends.cpu import build, library
from eda.backends.loading import load_target
from eda.models.target import TorchBody
from tests.support.narrow import load, narrow_target
from tests.support.passes import complete, random_tokens


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test asks anew, and the tests behind it do so too."""
    monkeypatch.setattr(build, "can_run", lambda _: True)
    monkeypatch.setattr(library, "can_run", lambda _: True)
    library.kernels.cache_clear()
    yield
    library.kernels.cache_clear()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache directory of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("EDA_CPU_KERNELS", raising=False)
    return tmp_path / "cache" / "eda-server"


def compiler(directory: Path, script: str) -> Path:
    """A program that stands in for the compiler; ``$OUT`` is the file that it is to write."""
    path = directory / "compiler"
    path.write_text(f'#!/bin/sh\nfor OUT; do :; done\necho "$OUT" >> "{directory}/calls"\n{script}\n')
    path.chmod(0o755)
    return path


def use(monkeypatch: pytest.MonkeyPatch, path: Path | None) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None if path is None else str(path))


def check_that_models_run_on_torch(directory: Path) -> None:
    path = narrow_target(directory / "model", hidden_size=48, head_dim=32)
    model = load_target(path, weights="bfloat16")
    assert isinstance(model.body, TorchBody)
    tokens = random_tokens(9, seed=1)
    assert torch.equal(complete(model, tokens), complete(load(path, kernel=False), tokens))


def test_the_switch(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("EDA_CPU_KERNELS", "0")
    assert library.kernels() is None
    assert not cache.exists()
    assert not caplog.records
    check_that_models_run_on_torch(tmp_path)


@pytest.mark.parametrize(
    ("is_arm", "capability", "instructions", "can_run"),
    [
        (False, "DEFAULT", "native", False),
        (False, "NO AVX", "native", False),
        (False, "NO AVX", "scalar", True),
        (False, "AVX2", "native", True),
        (False, "AVX512", "avx2", True),
        (True, "DEFAULT", "native", True),
    ],
)
def test_processors(
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
    is_arm: bool,
    capability: str,
    instructions: str,
    can_run: bool,
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(build, "_IS_ARM", is_arm)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert build.can_run(instructions) is can_run
    if not can_run:
        assert library.kernels() is None
    assert not caplog.records


def test_a_name_of_no_instructions(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("EDA_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match="EDA_CPU_ISA is 'mmx'; here it can be native, scalar"):
        library.kernels()


def test_a_library_of_another_layout_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Packed(ctypes.Structure):
        _fields_ = (*library.Packed._fields_[:1], ("k", ctypes.c_int32), ("n", ctypes.c_int32))

    monkeypatch.setattr(library, "_STRUCTURES", (Packed, *library._STRUCTURES[1:]))
    assert library.kernels() is None
    assert "laid out" in caplog.text


def test_every_structure_and_function_is_checked() -> None:
    structures = [
        value
        for value in vars(library).values()
        if isinstance(value, type) and issubclass(value, ctypes.Structure)
    ]
    assert set(structures) == set(library._STRUCTURES)
    passes = library.kernels()
    assert passes is not None
    for name, types in library._ARGUMENTS.items():
        assert tuple(getattr(passes, name).argtypes) == types


def test_no_compiler(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    use(monkeypatch, None)
    assert library.kernels() is None
    assert library.kernels() is None
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "no C++ compiler" in record.message
    check_that_models_run_on_torch(tmp_path)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'pass.cpp:1: error: no such thing' >&2; exit 1", "error: no such thing"),
        ('echo "not a library" > "$OUT"', "cannot be used"),
    ],
    ids=["fails", "writes nonsense"],
)
def test_a_broken_compiler(
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    script: str,
    message: str,
) -> None:
    use(monkeypatch, compiler(tmp_path, script))
    assert library.kernels() is None
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert message in record.message
    check_that_models_run_on_torch(tmp_path)


def test_a_failed_build_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path
) -> None:
    use(monkeypatch, compiler(tmp_path, 'echo half > "$OUT"; exit 1'))
    assert library.kernels() is None
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("where", ["a file in the way", "no home"])
def test_a_cache_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    where: str,
) -> None:
    use(monkeypatch, compiler(tmp_path, "exit 0"))
    if where == "no home":

        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
    else:
        cache.parent.write_text("in the way")
    assert library.kernels() is None
    assert "cannot be used" in caplog.text


def built_by(monkeypatch: pytest.MonkeyPatch, path: Path) -> Path:
    use(monkeypatch, path)
    return build.built(str(path), build.wanted_instructions())


def test_a_build_appears_whole_and_is_reused(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path
) -> None:
    # While the compiler runs, the final name must not be there yet.
    script = f'ls "{cache}" > "{tmp_path}/seen"; echo done > "$OUT"'
    program = compiler(tmp_path, script)
    first = built_by(monkeypatch, program)
    assert first.read_text() == "done\n"
    assert first.name not in (tmp_path / "seen").read_text()
    assert list(cache.iterdir()) == [first]
    before = first.stat()
    assert built_by(monkeypatch, program) == first
    assert first.stat().st_mtime_ns == before.st_mtime_ns
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_a_build_that_another_process_finished_meanwhile_is_replaced_whole(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path
) -> None:
    script = f'for F in "{cache}"/passes-*.so; do :; done; echo mine > "$OUT"'
    program = compiler(tmp_path, script)
    path = built_by(monkeypatch, program)
    path.write_text("theirs")
    open_before = path.open()
    path.unlink()
    assert built_by(monkeypatch, program).read_text() == "mine\n"
    with open_before:  # a process that has loaded the old file keeps it
        assert open_before.read() == "theirs"


@pytest.mark.parametrize("change", ["processor", "compiler", "flags", "instructions", "source"])
def test_another_version_is_another_file(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path, change: str
) -> None:
    program = compiler(tmp_path, 'echo done > "$OUT"')
    first = built_by(monkeypatch, program)
    if change == "processor":
        monkeypatch.setattr(build, "processor", lambda: "flags: other")
    elif change == "instructions":
        monkeypatch.setenv("EDA_CPU_ISA", "scalar")
    elif change == "flags":
        monkeypatch.setattr(build, "FLAGS", ("-O1",))
    elif change == "compiler":
        program = shutil.copy(program, tmp_path / "other")
    else:
        source = shutil.copytree(Path(build.__file__).parent / "csrc", tmp_path / "source" / "csrc")
        with (source / build.SOURCES[-1]).open("a") as file:
            file.write("// more\n")
        monkeypatch.setattr(build, "__file__", str(source.parent / "build.py"))
    assert built_by(monkeypatch, program) != first
    assert len(os.listdir(cache)) == 2


def test_every_header_counts_as_source() -> None:
    here = Path(build.__file__).parent / "csrc"
    assert {path.name for path in here.iterdir() if path.suffix in (".h", ".cpp")} == set(build.SOURCES)
