"""The prompts that measurements use unless others are named."""

from pathlib import Path

PROMPTS_DIRECTORY = Path(__file__).parent / "prompts"


def bundled_prompts(model: str) -> Path:
    """Those of the domain that ``model`` is named after; general ones for the base and for other names."""
    path = PROMPTS_DIRECTORY / f"{model}.jsonl"
    return path if path.is_file() else PROMPTS_DIRECTORY / "general.jsonl"
