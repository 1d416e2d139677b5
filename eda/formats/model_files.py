"""What a model is loaded from: a directory in Hugging Face's form, or one GGUF file."""

from dataclasses import dataclass
from pathlib import Path

from eda.formats.checkpoint import Checkpoint, WeightSource
from eda.formats.checkpoint_files import is_gguf, resolve_directory
from eda.formats.config import ModelConfig
from eda.formats.fingerprint import fingerprint_directory, fingerprint_model
from eda.formats.gguf_file.checkpoint import GgufCheckpoint
from eda.formats.preflight import check_target


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk, checked but not loaded."""

    path: Path
    config: ModelConfig
    checkpoint: WeightSource

    @property
    def fingerprint(self) -> str:
        """As ``eda.formats.fingerprint.fingerprint_directory`` defines it."""
        return fingerprint_model(self.config, self.checkpoint)


def open_model(path_or_hub_id: str | Path) -> ModelFiles:
    """A GGUF file, a local directory, or a hub id.

    Raises:
        CheckpointError: missing, incomplete, misshapen or in an unsafe format.
        UnsupportedModelError: an architecture, a feature or a type that is not implemented.
    """
    if is_gguf(path_or_hub_id):
        gguf = GgufCheckpoint.open(Path(path_or_hub_id))
        return ModelFiles(gguf.path, gguf.config, gguf)
    path = resolve_directory(path_or_hub_id)
    config = ModelConfig.from_directory(path)
    check_target(path)  # before anything is built from these sizes
    return ModelFiles(path, config, Checkpoint.of_model(path))


def fingerprint_files(path: Path) -> str:
    """Of a GGUF file, a checkpoint or a PEFT adapter. Raises what ``open_model`` raises."""
    return open_model(path).fingerprint if is_gguf(path) else fingerprint_directory(path)
