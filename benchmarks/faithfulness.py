"""Whether a contestant's text is the target's own: without that, its speed says nothing.

Two measures. The share of tokens equal to those of transformers ``generate`` is the plain one, but one near-tie decided
the other way changes all the text behind it. So each text is also read once by the target in float32: the share of its
tokens that are the target's first choice *after the same text*, and how far the worst of the others is from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@dataclass(frozen=True, slots=True)
class Faithfulness:
    """Shares from 0 to 1; ``worst_gap`` is in logits, 0 when every token is the first choice."""

    share_equal: float
    share_first_choice: float
    worst_gap: float


def share_equal(texts: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> float:
    """Share of tokens that are equal at the same place of the same text."""
    pairs = [
        (one, other)
        for text, reference in zip(texts, references, strict=True)
        for one, other in zip(text, reference, strict=True)
    ]
    return sum(one == other for one, other in pairs) / len(pairs) if pairs else 1.0


class FaithfulnessCheck:
    """Compares texts with one target's choices in float32."""

    def __init__(self, checkpoint: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def check(
        self,
        prompts: Sequence[Sequence[int]],
        texts: Sequence[Sequence[int]],
        references: Sequence[Sequence[int]],
    ) -> Faithfulness:
        """``references`` are the texts of transformers ``generate`` for the same prompts."""
        gaps = torch.cat([self._gaps(prompt, text) for prompt, text in zip(prompts, texts, strict=True)])
        return Faithfulness(
            share_equal(texts, references), float((gaps <= 0).float().mean()), float(gaps.max())
        )

    @torch.inference_mode()
    def _gaps(self, prompt: Sequence[int], text: Sequence[int]) -> torch.Tensor:
        """Float ``[len(text)]``: how many logits each token is below the best one."""
        ids = torch.tensor([[*prompt, *text]])
        logits = self._model(ids).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
        gaps: torch.Tensor = logits.max(dim=-1).values - chosen
        return gaps
