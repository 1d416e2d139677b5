"""Files that survive interruptions, and errors that name what could not be written."""

import errno
from pathlib import Path

import pytest

from eda.errors import DataError, TrainingError
from eda.training.files import LineWriter, provenance, read_json_if_present, write_json


def test_a_half_written_line_is_removed_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    with LineWriter(path) as writer:
        writer.write({"a": 2})
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "lines.jsonl"
    monkeypatch.setattr("eda.training.files.os.fsync", refuse)
    with (
        pytest.raises(TrainingError, match=r"lines\.jsonl cannot be written.*No space left"),
        LineWriter(path) as w,
    ):
        w.write({"a": 1})
    with pytest.raises(TrainingError, match=r"report\.json cannot be written"):
        write_json(tmp_path / "report.json", {})
    assert not (tmp_path / "report.json").exists()
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_place_of_a_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        write_json(tmp_path / "file" / "report.json", {})
    with pytest.raises(TrainingError, match="cannot be written"):
        LineWriter(tmp_path / "file" / "lines.jsonl")


def test_json_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "report.json"
    assert read_json_if_present(path) is None
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json_if_present(path) == {"a": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["report.json"]
    path.write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        read_json_if_present(path)


def test_provenance_names_command_and_versions() -> None:
    made = provenance()
    assert made["command"]
    assert made["versions"]["torch"]
