"""A look at weights before anything is loaded from them: safetensors with a sound header, and nothing else."""

import os
from pathlib import Path

from eda.adapters.errors import CorruptVersionError
from eda.errors import CheckpointError
from eda.files import PICKLE_SUFFIXES
from eda.formats import checkpoint_files
from eda.formats.checkpoint_files import TensorEntry

_UNSAFE_SUFFIXES = PICKLE_SUFFIXES | {".npy"}


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors in ``path``, proven to fit the file exactly.

    Raises ``CorruptVersionError`` when the file is missing, not safetensors, or its header contradicts its size.
    """
    try:
        return checkpoint_files.read_header(path)[0]
    except CheckpointError as error:
        raise CorruptVersionError(str(error)) from error


def refuse_unsafe_files(directory: Path) -> None:
    """Raises ``CorruptVersionError`` when ``directory`` holds weights in a format that can run code when loaded."""
    for name in sorted(os.listdir(directory)):
        if Path(name).suffix.lower() in _UNSAFE_SUFFIXES:
            raise CorruptVersionError(
                f"{directory / name} is not safetensors; pickle and array files are refused"
            )
