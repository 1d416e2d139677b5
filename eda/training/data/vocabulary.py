"""The reduced draft vocabulary: the tokens that the target really emits.

A token outside it has draft probability zero, which costs acceptance and never correctness, while every draft step
saves its row of the output head.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eda.training.data.samples import Sample


@dataclass(frozen=True, slots=True, eq=False)
class DraftVocabulary:
    """``token_ids`` int64 ``[n]``, ascending; ``coverage``: share of the counted tokens that are among them."""

    token_ids: Tensor
    coverage: float


def choose_draft_vocabulary(
    samples: Sequence[Sample],
    vocab_size: int,
    size: int,
    *,
    always: Iterable[int] = (),
    extra_texts: Iterable[Sequence[int]] = (),
) -> DraftVocabulary:
    """The ``size`` most frequent tokens of the answers.

    Args:
        always: ids that are in it in any case (ends of turns).
        extra_texts: token ids of further texts, counted like answers; say, of domains that fine-tunes will come from.
            Where fewer than ``size`` tokens occur, the lowest other ids fill up: tokenizers number frequent ones first.

    Raises ``ValueError`` unless ``1 <= size <= vocab_size``.
    """
    if not 1 <= size <= vocab_size:
        raise ValueError(f"size is {size}; it must be between 1 and the vocabulary's {vocab_size}")
    counts: Counter[int] = Counter()
    for sample in samples:
        counts.update(sample.response_ids)
    for text in extra_texts:
        counts.update(text)
    chosen = dict.fromkeys(token for token in always if 0 <= token < vocab_size)
    ranked = sorted(counts, key=lambda token: (-counts[token], token))
    for token in (*ranked, *range(vocab_size)):
        if len(chosen) >= size:
            break
        chosen.setdefault(token)
    total = sum(counts.values())
    covered = sum(counts[token] for token in chosen)
    return DraftVocabulary(torch.tensor(sorted(chosen)), covered / total if total else 1.0)
