"""Prompts from texts."""

from collections.abc import Sequence

from eda.training.data.prompts import Prompt


def prompts_from_strings(texts: Sequence[str]) -> list[Prompt]:
    """One prompt of the user's for each text."""
    return [
        Prompt(f"line-{number}", ({"role": "user", "content": text},))
        for number, text in enumerate(texts, start=1)
    ]
