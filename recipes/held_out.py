"""Held-out loss of a causal LM on encoded rows."""

from collections.abc import Sequence

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from recipes.text import EncodedRow


@torch.inference_mode()
def mean_loss(
    model: PreTrainedModel,
    rows: Sequence[EncodedRow],
    responses_only: bool,
    max_length: int = 1024,
    tokens_per_batch: int = 8192,
) -> float:
    """Mean negative log-likelihood in nats per token, over all tokens or over those of the responses.

    A row counts with its first `max_length` tokens. The end marker counts as part of the response.
    """
    was_training = model.training
    model.eval()
    ordered = sorted(rows, key=lambda row: len(row.token_ids))
    total, count = 0.0, 0
    start = 0
    while start < len(ordered):
        stop = start + 1
        while (
            stop < len(ordered)
            and min(len(ordered[stop].token_ids), max_length) * (stop + 1 - start) <= tokens_per_batch
        ):
            stop += 1
        batch = ordered[start:stop]
        start = stop
        width = min(max(len(row.token_ids) for row in batch), max_length)
        token_ids = torch.zeros(len(batch), width, dtype=torch.long)
        labels = torch.full((len(batch), width), -100)
        for index, row in enumerate(batch):
            ids = torch.tensor(row.token_ids[:width])
            token_ids[index, : len(ids)] = ids
            first = row.num_prompt_tokens if responses_only else 1
            labels[index, first : len(ids)] = ids[first:]
        # Padding is on the right, where a causal model cannot see it, so no mask is needed.
        token_ids, labels = token_ids.to(model.device), labels.to(model.device)
        logits = model(input_ids=token_ids, use_cache=False).logits[:, :-1].float()
        total += float(
            functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        )
        count += int((labels[:, 1:] != -100).sum())
    model.train(was_training)
    return total / count
