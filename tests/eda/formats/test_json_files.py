"""The one reader of JSON files: what it takes, and what it refuses with which words."""

import io
import os
from pathlib import Path

import pytest

from eda.formats.json_files import MAX_DEPTH, MAX_LINE_BYTES, json_lines, open_regular, parse_json, read_json


def test_ordinary_documents_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, -2.5e3, true, null, "\\ud83d\\ude42 \u20ac"], "b": {}}', encoding="utf-8")
    assert read_json(path) == {"a": [1, -2500.0, True, None, "\U0001f642 \u20ac"], "b": {}}
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 200_000, "nested deeper"),
        (b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), "nested deeper"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nested deeper"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' stands twice"),
        (b'{"a": NaN}', "NaN, which is not finite"),
        (b'{"a": -Infinity}', "-Infinity, which is not finite"),
        (b'{"a": 1e999}', "1e999, which is not finite"),
        (b'{"a": ' + b"9" * 101 + b"}", "an integer of 101 digits"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "an integer of 100000 digits"),
        (b'{"a": "\xff"}', "'utf-8' codec"),
        (b'{"a": "\\ud800"}', "not valid Unicode"),
        (b'{"\\udc00": 1}', "not valid Unicode"),
        (b" " * 101, "larger than 100 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "a git-lfs pointer"),
        (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
        (b"<!DOCTYPE html>", "an HTML page"),
        (b"{", "Expecting"),
        (b"", "Expecting"),
    ],
)
def test_what_is_refused_and_why(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(content, max_bytes=100 if content.isspace() else 1 << 20)


def test_what_has_no_end_is_no_file(tmp_path: Path) -> None:
    """A pipe that nobody writes to would be waited for, and a device read, for ever."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
            open_regular(path)


def test_lines_are_limited_in_length_and_in_all() -> None:
    lines = list(json_lines(io.BytesIO(b"1\n\n  \n22\n3"), max_bytes=100))
    assert lines == [(1, b"1\n"), (4, b"22\n"), (5, b"3")]
    with pytest.raises(ValueError, match="line 1 is longer"):
        list(json_lines(io.BytesIO(b"x" * (MAX_LINE_BYTES + 2)), max_bytes=1 << 30))
    with pytest.raises(ValueError, match="more than 9 bytes"):
        list(json_lines(io.BytesIO(b"1234\n" * 3), max_bytes=9))
