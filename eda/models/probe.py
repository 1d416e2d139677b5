"""One pass over a few tokens of a model that was just loaded: whether its weights give logits that can be used."""

import torch

from eda.errors import CheckpointError
from eda.models.attention import AttentionRow, PackedBatch
from eda.models.fine_tune import FineTune


@torch.inference_mode()
def require_usable(fine_tune: FineTune) -> None:
    """Runs tokens spread over the vocabulary through ``fine_tune``.

    Weights that are finite one by one may still give products that are not, or so large that normalisation leaves
    nothing of them. Raises ``CheckpointError`` when logits are not finite, or all the same.
    """
    model = fine_tune.model
    count = min(4, model.config.max_position_embeddings)
    places = torch.arange(count, device=model.device)
    tokens = places * (model.config.vocab_size - 1) // max(1, count - 1)
    segments = fine_tune.lora_segments(0, count)
    batch = PackedBatch(places, places, [AttentionRow(0, count, 0, count)], rope_lengths=places + 1)
    output = model(tokens, batch, model.new_cache(count), segments)
    logits = model.logits(output.hidden, segments)
    lowest, highest = logits.aminmax(dim=-1)
    if not (lowest.isfinite() & highest.isfinite()).all():
        found = "logits that are not finite"
    elif model.config.vocab_size > 1 and (lowest == highest).all():
        found = "the same logit for every token"
    else:
        return
    raise CheckpointError(
        f"{fine_tune.name!r} gives {found}: its weights are damaged, or too large for {model.dtype}"
    )
