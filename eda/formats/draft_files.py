"""The files of a draft's directory, checked before a draft is built from them; needs no torch."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eda.errors import CheckpointError, MismatchError
from eda.formats.checkpoint_files import (
    CONFIG_FILE,
    FLOAT_TYPES,
    WEIGHTS_FILE,
    listed,
    read_header,
    read_json,
)
from eda.formats.config_fields import SIZE_LIMITS

_SIZES = {
    **{name: SIZE_LIMITS[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "head_dim")},
    "draft_vocab_size": SIZE_LIMITS["vocab_size"],
    "num_heads": SIZE_LIMITS["num_attention_heads"],
    "num_kv_heads": SIZE_LIMITS["num_key_value_heads"],
    "max_position_embeddings": SIZE_LIMITS["max_position_embeddings"],
}
_NUMBERS = {"rope_theta": (1e-9, 1e12), "rms_norm_eps": (0.0, 1.0)}


def read_draft_fields(path: Path) -> dict[str, Any]:
    """The fields of ``eda.models.draft.DraftConfig`` in the configuration ``path``.

    Raises ``CheckpointError`` when the file is missing, is no draft's, or a field is absent or cannot be meant.
    """
    document = read_json(path)
    if document.get("model_type") != "eda_draft":
        raise CheckpointError(f'{path} is not a draft: "model_type" must be "eda_draft"')
    absent = [name for name in (*_SIZES, "tap_layers") if name not in document]
    if absent:
        raise CheckpointError(f"{path} lacks a field of a draft configuration: {listed(absent)}")
    for name, limit in _SIZES.items():
        value = document[name]
        if type(value) is not int or not 1 <= value <= limit:
            raise CheckpointError(
                f"{path}: {name} is {str(value)[:80]}; a whole number from 1 to {limit} is needed"
            )
    if document["num_heads"] % document["num_kv_heads"] or document["head_dim"] % 2:
        raise CheckpointError(
            f"{path} has {document['num_heads']} heads, {document['num_kv_heads']} key/value heads and head_dim "
            f"{document['head_dim']}; the first must be a multiple of the second, and the third even"
        )
    taps, most = document["tap_layers"], SIZE_LIMITS["num_hidden_layers"]
    if (
        not isinstance(taps, list)
        or len(taps) != 3
        or not all(type(tap) is int and 0 <= tap < most for tap in taps)
    ):
        raise CheckpointError(f"{path}: tap_layers is {str(taps)[:80]}; three numbers of layers are needed")
    for name, (least, most_allowed) in _NUMBERS.items():
        value = document.get(name, most_allowed)
        if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most_allowed:
            raise CheckpointError(
                f"{path}: {name} is {str(value)[:80]}; a number from {least:g} to {most_allowed:g} is needed"
            )
    if not isinstance(document.get("target_fingerprint", ""), str):
        raise CheckpointError(f"{path}: target_fingerprint must be a string")
    known = (*_SIZES, *_NUMBERS, "target_fingerprint")
    return {name: document[name] for name in known if name in document} | {"tap_layers": tuple(taps)}


def draft_shapes(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a draft with these fields."""
    hidden, inner, size = fields["hidden_size"], fields["intermediate_size"], fields["head_dim"]
    query, kv = fields["num_heads"] * size, fields["num_kv_heads"] * size
    norms = [f"tap_norms.{tap}" for tap in range(3)]
    norms += ["embedding_norm", "hidden_norm", "feed_forward_norm", "norm"]
    return {
        **{f"{norm}.weight": (hidden,) for norm in norms},
        "fc.weight": (hidden, 3 * hidden),
        "attention.qkv_proj.weight": (query + 2 * kv, 2 * hidden),
        "attention.o_proj.weight": (hidden, query),
        "feed_forward.gate_up_proj.weight": (2 * inner, hidden),
        "feed_forward.down_proj.weight": (hidden, inner),
        "draft_token_ids": (fields["draft_vocab_size"],),
    }


def require_draft_tensors(directory: Path, fields: Mapping[str, Any]) -> None:
    """Compares the header of the weights with the configuration.

    Raises ``CheckpointError`` when it cannot be read, ``MismatchError`` when names, shapes or types differ.
    """
    entries, _ = read_header(directory / WEIGHTS_FILE)
    expected = draft_shapes(fields)
    if "draft_token_ids" not in entries:
        raise MismatchError(f"{directory / WEIGHTS_FILE} has no tensor 'draft_token_ids'")
    different = sorted(expected.keys() ^ entries.keys())
    if different:
        raise MismatchError(
            f"{directory / WEIGHTS_FILE} does not hold the tensors of a draft: missing or without use are "
            f"{listed(different)}"
        )
    for name, shape in expected.items():
        entry = entries[name]
        if entry.shape != shape:
            raise MismatchError(
                f"{directory / WEIGHTS_FILE}: size mismatch for {name}: it is {list(entry.shape)}, "
                f"{CONFIG_FILE} asks for {list(shape)}"
            )
        types = ("I64", "I32") if name == "draft_token_ids" else FLOAT_TYPES
        if entry.dtype not in types:
            raise MismatchError(
                f"{directory / WEIGHTS_FILE}: {name} is of type {entry.dtype}; {', '.join(types)} are read"
            )
