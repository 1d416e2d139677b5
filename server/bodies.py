"""How much a JSON body asks a parser to build, told from its bytes.

A short body can make millions of objects (``[[],[],...``), and parsing and validating them holds the event loop. So
they are counted before anything is parsed.
"""

import re
from itertools import islice

from eda.server.errors import BodyTooLargeError, InvalidRequestError

VALUES_PER_CONTAINER = 8
"""A list or an object costs a parser and a validator about as much as this many numbers."""


def _to_next(marks: bytes) -> re.Pattern[bytes]:
    """One match for each of ``marks`` outside of strings, and one for the rest. Possessive, so it is linear."""
    others = rb'[^"' + marks + rb"]*+"
    string = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?'  # one that never ends runs to the end of the body
    return re.compile(others + rb"(?:" + string + others + rb")*+(?:[" + marks + rb"]|\Z)", re.DOTALL)


_TO_NEXT_VALUE = _to_next(rb"\[{,")
_TO_NEXT_CONTAINER = _to_next(rb"\[{")


def check_json(body: bytes, limit: int, *, param: str | None = None) -> None:
    """Raises ``ApiError`` for JSON that is not in UTF-8 or has more values than ``limit``; else looks at nothing."""
    if 0 in body:
        # All other encodings of JSON have zero bytes, and would hide what is counted here.
        raise InvalidRequestError(
            f"{param or 'the body'} must be JSON in UTF-8", param=param, code="invalid_json"
        )
    if has_more_values(body, limit):
        raise BodyTooLargeError(
            f"{param or 'the body'} has more than {limit} values, a list or an object counting as "
            f"{VALUES_PER_CONTAINER}",
            param=param,
        )


def has_more_values(body: bytes, limit: int) -> bool:
    """Whether ``body``, read as JSON, has more than ``limit`` values, or lists and objects for an eighth of it.

    Counted are the brackets that open and the commas: every value but the outermost comes after one of them. The time
    is linear in the body whatever it holds.
    """
    return _has_more(body, limit, _TO_NEXT_VALUE, b"[{,") or _has_more(
        body, limit // VALUES_PER_CONTAINER, _TO_NEXT_CONTAINER, b"[{"
    )


def _has_more(body: bytes, limit: int, to_next: re.Pattern[bytes], marks: bytes) -> bool:
    if len(body) <= limit or sum(body.count(mark) for mark in marks) <= limit:
        return False
    match = next(islice(to_next.finditer(body), limit, None), None)
    return match is not None and match[0][-1:] != b"" and match[0][-1] in marks
