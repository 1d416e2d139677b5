"""The C++ passes for 64-bit ARM under an emulator, against plain C++ on this processor."""

import shutil
import subprocess
from pathlib import Path

import pytest

from eda.backends.cpu import build

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SOURCE = Path(__file__).parent / "one_pass.cpp"
FLAGS = [flag for flag in build.FLAGS if flag not in ("-fPIC", "-shared")]


def output_of(directory: Path, compiler: str, flags: list[str], emulator: list[str]) -> tuple[str, str]:
    """What the program prints, and the instructions that it says it uses."""
    program = directory / "-".join(["program", *flags]).replace("/", "_")
    include = f"-I{Path(build.__file__).parent}/csrc"
    command = [compiler, *FLAGS, *flags, include, str(SOURCE), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    done = subprocess.run([*emulator, str(program)], check=True, capture_output=True, text=True, timeout=240)
    return done.stdout, done.stderr.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "instructions"),
    [("-march=armv8-a", "neon"), ("-march=armv8.2-a+dotprod", "neon+dotprod")],
    ids=["neon", "dotprod"],
)
def test_neon_gives_the_bits_of_plain_cpp(tmp_path: Path, flags: str, instructions: str) -> None:
    missing = [name for name in (COMPILER, EMULATOR, "g++") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (packages g++-aarch64-linux-gnu and qemu-user)")
    expected, plain = output_of(tmp_path, "g++", ["-DEDA_SCALAR"], [])
    assert plain == "scalar"
    found, name = output_of(tmp_path, COMPILER, [flags, "-static"], [EMULATOR, "-cpu", "max"])
    assert name == instructions
    assert found.count("logits") == 4
    assert found == expected
