"""What strangers might write: odd JSON values, valid documents with odd places, and damaged bytes."""

import copy
import json
import math
from typing import Any

from hypothesis import strategies as st

WORDS = (
    "",
    "x",
    "none",
    "all-linear",
    "silu",
    "model.layers.0",
    "(.*)*x",
    "\ud800",
    "\x00",
    "../..",
    "é" * 40,
)
NUMBERS = (
    *(0, 1, 2, 3, 7, 8, 16, 32, 255, 256, 319, 320, 4096, 65_536, -1, -8, 2**31 - 1, 2**31, 2**63, 2**64),
    *(10**9, 10**18, 10**30, 10**99, 10**120, 0.0, -0.0, 0.5, 1e-9, 1e-300, 1.5, 1e9, 1e300, -1e300),
    *(math.nan, math.inf, -math.inf),
)

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(WORDS),
    st.integers(-10, 1000),
    st.floats(),
    st.text(max_size=20),
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(WORDS), inner, max_size=4)
    ),
    max_leaves=8,
)
"""Any JSON value, and what JSON has no words for, such as NaN."""


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> Any:
    """``document`` with one to three places, at any depth, that hold something else, are gone or are new."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        place = document
        while True:
            inner = (
                [item for item in place.values() if isinstance(item, dict | list) and item]
                if isinstance(place, dict)
                else [item for item in place if isinstance(item, dict | list) and item]
            )
            if not inner or draw(st.integers(0, 2)) == 0:
                break
            place = draw(st.sampled_from(inner))
        keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
        kind = draw(st.sampled_from(("change", "change", "change", "remove", "add", "deepen")))
        if kind == "add" or not keys:
            if isinstance(place, dict):
                place[draw(st.text(max_size=12) | st.sampled_from(WORDS))] = draw(values)
            else:
                place.append(draw(values))
            continue
        key = draw(st.sampled_from(keys))
        if kind == "remove":
            del place[key]
        elif kind == "deepen":
            for _ in range(draw(st.sampled_from((1, 3, 70)))):
                place[key] = [place[key]]
        else:
            place[key] = draw(values)
    return document


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """``content`` with bytes that are changed, cut out, repeated or put in."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(found)))
        kind = draw(st.sampled_from(("change", "cut", "repeat", "insert", "end")))
        if kind == "change" and at < len(found):
            found[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del found[at : at + draw(st.integers(1, 64))]
        elif kind == "repeat":
            found[at:at] = found[max(0, at - 64) : at] * draw(st.integers(1, 40))
        elif kind == "insert":
            found[at:at] = draw(
                st.binary(max_size=16) | st.sampled_from((b"[" * 3000, b"9" * 5000, b"\x00" * 64))
            )
        else:
            del found[at:]
    return bytes(found)


def written(document: Any) -> bytes:
    """As JSON; NaN, infinities and halves of surrogate pairs too."""
    return json.dumps(document).encode()
