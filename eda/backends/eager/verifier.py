"""Verification by the rules of torch: rows of any kind."""

from collections.abc import Sequence

import torch

from eda.models.answers import Likeliest
from eda.speculation.verification import (
    AnswerLines,
    Verdict,
    VerificationRow,
    follow,
    joined,
    select_lines,
    verify,
)


class RulesVerifier:
    """Applies ``eda.speculation.verification``.

    Args:
        generator: source of all randomness of rows that are neither greedy nor seeded.
        block: verify sampled chains as a block.
    """

    def __init__(self, generator: torch.Generator, *, block: bool = False) -> None:
        self._generator = generator
        self._block = block

    def verify(self, rows: Sequence[VerificationRow], lines: Sequence[AnswerLines]) -> list[Verdict]:
        """See ``Verifier``."""
        verdicts: dict[int, Verdict] = {}
        likeliest: list[int] = []
        told, judged = [], []
        for index, (row, line) in enumerate(zip(rows, lines, strict=True)):
            if isinstance(line.answer, Likeliest):
                told.append(index)
                likeliest += line.answer.token_ids[line.first : line.first + row.num_lines]
            else:
                judged.append(index)
        if told:
            verdicts.update(zip(told, follow(likeliest, [rows[index] for index in told]), strict=True))
        if judged:
            chosen = [rows[index] for index in judged]
            block, first_lines = joined([lines[index] for index in judged])
            logits = select_lines(block, chosen, first_lines)
            found = verify(logits, chosen, self._generator, block=self._block)
            verdicts.update(zip(judged, found, strict=True))
        return [verdicts[index] for index in range(len(rows))]
