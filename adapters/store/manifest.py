"""The manifest of one adapter version: what ``adapter.json`` says about ``private.safetensors``."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from eda.adapters.errors import CorruptVersionError
from eda.formats.json_files import read_json

SCHEMA_VERSION = 1
MANIFEST_FILE = "adapter.json"
MAX_MANIFEST_BYTES = 1024 * 1024
MAX_SIZE = 1 << 22
"""Of a width or rank in elements."""
SIZE_FIELDS = ("hidden_size", "num_features", "intermediate_size", "fc_rank")
LATER_SIZE_FIELDS = ("attention_rank", "query_size", "kv_size")
"""Versions from before private modules corrected attention lack them; 0 is meant then."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """One immutable version of an adapter.

    Attributes:
        version: counts from 1; larger is newer.
        created: ISO 8601, UTC.
        target_fingerprint: of the base target that the shared draft was trained for.
        fine_tune_fingerprint: of the fine-tune whose answers the private module learned.
        draft_fingerprint: of the shared draft that the private module was trained in.
        sizes: fields of ``eda.models.private.PrivateConfig``, in elements.
        weights_bytes: size of the weights file; ``weights_sha256`` is its checksum.
        provenance: where it came from: job, command, versions of packages, hash and kind of the data, seed.
        metrics: "before" (shared draft alone) and "after", measured on held-out prompts.
    """

    name: str
    version: int
    created: str
    target_fingerprint: str
    fine_tune_fingerprint: str
    draft_fingerprint: str
    sizes: Mapping[str, int]
    weights_bytes: int
    weights_sha256: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def job_id(self) -> str | None:
        """The job that made this version, or ``None`` when it was made by hand."""
        job_id = self.provenance.get("job_id")
        return job_id if isinstance(job_id, str) else None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The manifest in ``directory``. Raises ``CorruptVersionError`` when it is missing or malformed."""
        path = directory / MANIFEST_FILE
        try:
            document = read_json(path, max_bytes=MAX_MANIFEST_BYTES)
        except (OSError, ValueError) as error:
            raise CorruptVersionError(f"{path} cannot be read as JSON: {error}") from error
        return cls._parse(document, path)

    @classmethod
    def _parse(cls, document: Any, path: Path) -> Self:
        if not isinstance(document, dict):
            raise CorruptVersionError(f"{path} holds a JSON {type(document).__name__}; expected an object")
        if document.get("schema_version") != SCHEMA_VERSION:
            raise CorruptVersionError(
                f"{path} has schema_version {document.get('schema_version')!r}; this release reads {SCHEMA_VERSION}"
            )
        expected: dict[str, type] = {
            "name": str,
            "version": int,
            "created": str,
            "target_fingerprint": str,
            "fine_tune_fingerprint": str,
            "draft_fingerprint": str,
            "sizes": dict,
            "weights_bytes": int,
            "weights_sha256": str,
            "provenance": dict,
            "metrics": dict,
        }
        for name, kind in expected.items():
            if type(document.get(name)) is not kind:
                raise CorruptVersionError(
                    f"{path}: field {name!r} is {str(document.get(name))[:80]!r}; expected a JSON {kind.__name__}"
                )
        sizes = document["sizes"]
        known = set(SIZE_FIELDS) <= set(sizes) <= {*SIZE_FIELDS, *LATER_SIZE_FIELDS}
        if not known or not all(type(size) is int and 0 <= size <= MAX_SIZE for size in sizes.values()):
            raise CorruptVersionError(
                f"{path}: field 'sizes' must hold the integers {', '.join(SIZE_FIELDS)}, and may hold "
                f"{', '.join(LATER_SIZE_FIELDS)}, each from 0 to {MAX_SIZE}"
            )
        return cls(**{name: document[name] for name in expected})


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """What a private module was made for; all three must match where it is used."""

    target: str
    fine_tune: str
    draft: str

    def require_match(self, manifest: Manifest, place: Path) -> None:
        """Raises ``CorruptVersionError``, naming both sides, when ``manifest`` was made for something else."""
        pairs = (
            ("target", manifest.target_fingerprint, self.target),
            ("fine-tune", manifest.fine_tune_fingerprint, self.fine_tune),
            ("shared draft", manifest.draft_fingerprint, self.draft),
        )
        for what, made_for, served in pairs:
            if made_for != served:
                raise CorruptVersionError(
                    f"{place} was made for the {what} with fingerprint {_short(made_for)}; "
                    f"the one served here has {_short(served)}"
                )


def _short(fingerprint: str) -> str:
    """Both ends: a LoRA's begins with its base's."""
    return fingerprint if len(fingerprint) <= 24 else f"{fingerprint[:12]}...{fingerprint[-12:]}"
