"""What the service keeps is for its own user, whatever the umask and whatever was there before."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from eda.adapters.database import Database, sqlite_url
from eda.adapters.private_files import private_directory, private_file


@pytest.fixture(params=[0o000, 0o022], ids=oct, autouse=True)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_data_directory_is_its_owners_alone(tmp_path: Path) -> None:
    private_directory(tmp_path / "some" / "data")
    assert mode(tmp_path / "some" / "data") == 0o700


def test_an_open_data_directory_is_tightened_and_a_foreign_one_is_spoken_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, content in (("data", "adapters"), ("empty", None), ("home", "letters")):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o755)
        if content is not None:
            (tmp_path / name / content).mkdir()
        private_directory(tmp_path / name)
    assert [mode(tmp_path / name) for name in ("data", "empty", "home")] == [0o700, 0o700, 0o755]
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{tmp_path / 'home'} can be read by others")


def test_the_database_and_its_companions_are_private_from_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / "eda.sqlite3"
    database = Database(sqlite_url(path))
    files = [path, *tmp_path.glob("eda.sqlite3-*")]
    assert len(files) == 3, "the test needs the log and the shared memory"
    assert [mode(file) for file in files] == [0o600] * 3
    database.close()


def test_an_open_database_is_tightened(tmp_path: Path) -> None:
    path = tmp_path / "eda.sqlite3"
    first = Database(sqlite_url(path))
    for file in tmp_path.glob("eda.sqlite3*"):
        file.chmod(0o644)
    second = Database(sqlite_url(path))
    assert {mode(file) for file in tmp_path.glob("eda.sqlite3*")} == {0o600}
    first.close()
    second.close()


def test_a_private_file_keeps_its_content(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("kept")
    private_file(tmp_path / "old")
    assert ((tmp_path / "old").read_text(), mode(tmp_path / "old")) == ("kept", 0o600)
