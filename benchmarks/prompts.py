"""Held-out prompts in a model's chat template."""

import json
from pathlib import Path
from typing import Any

from benchmarks.peers.interface import Prompt


def read_prompts(directory: Path, domain: str, count: int, tokenizer: Any) -> list[Prompt]:
    """The first ``count`` held-out prompts of a domain, in the chat template."""
    lines = (directory / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [
        Prompt(
            domain,
            tokenizer.apply_chat_template(
                [{"role": "user", "content": json.loads(line)["prompt"]}],
                add_generation_prompt=True,
                return_dict=False,
            ),
        )
        for line in lines
    ]
