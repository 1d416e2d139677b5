"""Reading JSON that strangers wrote: limits on size, depth and numbers, and the true cause where a file is no JSON."""

import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

MIB = 1024 * 1024
MAX_BYTES = 16 * MIB
"""Of a JSON file, where the caller names no other limit."""
MAX_LINE_BYTES = 16 * MIB
"""Of one line in a file of JSON lines."""
MAX_DEPTH = 64
"""Lists and objects within each other."""
MAX_DIGITS = 100
"""Of an integer: more would not even fit into a float."""

# How files begin that are often taken for something else.
_BEGINNINGS = (
    (b"version https://git-lfs.github.com/", "a git-lfs pointer, not the file itself; run `git lfs pull`"),
    (b"GGUF", "a GGUF file"),
    (b"PK\x03\x04", "a zip archive (torch.save writes such files), which can run code when loaded"),
    (b"\x80\x02", "a pickle, which can run code when loaded"),
    (b"\x80\x04", "a pickle, which can run code when loaded"),
    (b"\x1f\x8b", "compressed with gzip"),
    (b"<!DOCTYPE", "an HTML page, perhaps of a download that failed"),
    (b"<html", "an HTML page, perhaps of a download that failed"),
)


def described(beginning: bytes) -> str | None:
    """What a file that begins so is, in words, where that is one of the usual mistakes."""
    return next((what for start, what in _BEGINNINGS if beginning.startswith(start)), None)


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading; pipes and devices, which may never end, are refused with ``OSError``."""
    # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"{path} is not a regular file")
    return open(handle, "rb")


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """The document in ``path``.

    Raises ``OSError`` where the file cannot be read, and ``ValueError`` for what ``parse_json`` refuses.
    """
    with open_regular(path) as stream:
        content = stream.read(max_bytes + 1)
    return parse_json(content, max_bytes=max_bytes)


def parse_json(content: bytes, *, max_bytes: int = MAX_BYTES) -> Any:
    """The document in ``content``.

    Raises ``ValueError`` for what is too long, too deep or not valid: text that is no UTF-8 or no Unicode, names that
    stand twice in one object, numbers beyond ``MAX_DIGITS`` and floats that are not finite.
    """
    if len(content) > max_bytes:
        raise ValueError(f"it is larger than {max_bytes} bytes")
    what = described(content)
    if what is not None:
        raise ValueError(f"it is {what}")
    text = content.decode("utf-8")
    try:
        document = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_number,
        )
        _check_depth(document)
        if "\\u" in text:  # only an escape can spell half of a surrogate pair
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"a string in it is not valid Unicode: {error.reason}") from None
    return document


def json_lines(stream: BinaryIO, *, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Line numbers, from 1, and lines that are not blank. Raises ``ValueError`` over the limits."""
    read = number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        read += len(line)
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"line {number} is longer than {MAX_LINE_BYTES} bytes")
        if read > max_bytes:
            raise ValueError(f"it holds more than {max_bytes} bytes of text")
        if line.strip():
            yield number, line


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice[:80]!r} stands twice in one object")
    return document


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it has an integer of {len(digits)} digits; at most {MAX_DIGITS} are read")
    return int(digits)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it has the number {text[:40]}, which is not finite")
    return value


def _check_depth(document: Any) -> None:
    level = [document]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for container in level
            if isinstance(container, dict | list)
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
