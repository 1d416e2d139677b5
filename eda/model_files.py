"""What a model is loaded from: a directory in Hugging Face's form, or one GGUF file."""

from dataclasses import dataclass
from pathlib import Path

from eda.checkpoint import Checkpoint, WeightSource, resolve_directory
from eda.config import ModelConfig
from eda.fingerprint import fingerprint_model
from eda.gguf_file.checkpoint import GgufCheckpoint


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk, checked but not loaded."""

    path: Path
    config: ModelConfig
    checkpoint: WeightSource

    @property
    def fingerprint(self) -> str:
        """As ``eda.fingerprint.fingerprint_directory`` defines it."""
        return fingerprint_model(self.config, self.checkpoint)


def is_gguf(path: str | Path) -> bool:
    """Whether ``path`` names a GGUF file (there or not), by its ending."""
    return Path(path).suffix.lower() == ".gguf" and not Path(path).is_dir()


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
    return ModelFiles(path, ModelConfig.from_directory(path), Checkpoint.of_model(path))
