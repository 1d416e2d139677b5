"""What is wrong with a model directory as far as its small files and headers tell: in milliseconds, without torch."""

from pathlib import Path

from eda.errors import CheckpointError
from eda.formats.checkpoint_files import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    adapter_entries,
    is_gguf,
    model_entries,
    require_directory,
)
from eda.formats.config_fields import read_fields, require_sizes
from eda.formats.draft_files import read_draft_fields, require_draft_tensors
from eda.formats.lora_config import LoraConfig


def check_target(path: Path) -> None:
    """Checks a full checkpoint: a directory, or a GGUF file.

    Raises:
        CheckpointError: files are missing or damaged, or the configuration and the weights contradict each other.
        UnsupportedModelError: an architecture, rope type or type of weights is not implemented.
    """
    if is_gguf(path):
        from eda.formats.gguf_file.header import GgufHeader  # with numpy, which only these files need

        GgufHeader.read(path)
        return
    require_directory(path)
    if (path / ADAPTER_CONFIG_FILE).is_file() and not (path / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{path} is a PEFT adapter, a fine-tune of a model; its base has {CONFIG_FILE} and is needed here"
        )
    _, fields = read_fields(path)
    require_sizes(path, fields, model_entries(path)[0])


def check_fine_tune(path: Path) -> None:
    """Checks a PEFT LoRA or a full checkpoint. Raises as ``check_target``."""
    require_directory(path)
    if not (path / ADAPTER_CONFIG_FILE).is_file():
        check_target(path)
        return
    LoraConfig.from_directory(path)
    adapter_entries(path)


def check_draft(path: Path) -> None:
    """Checks a shared draft. Raises ``CheckpointError`` or ``MismatchError``."""
    require_directory(path)
    require_draft_tensors(path, read_draft_fields(path / CONFIG_FILE))
