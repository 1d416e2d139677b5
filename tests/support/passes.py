"""Running packed passes over a target, and the same tokens through transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from eda.models.attention import AttentionRow, PackedBatch
from eda.models.cache import Extent, KVCache
from eda.models.lora import LoraAdapter, LoraSegment
from eda.models.target import TapLayers, TargetModel


@dataclass
class Row:
    """New tokens of one sequence in a pass. ``parents`` makes them a tree: index of each one's parent, -1 for none."""

    extent: Extent
    tokens: Sequence[int]
    lora: LoraAdapter | None = None
    parents: Sequence[int] | None = None
    prompt_length: int = 0
    """Length at which prompt tokens take their dynamic rotary frequencies."""


def run(
    model: TargetModel, cache: KVCache, rows: Sequence[Row], taps: TapLayers | None = None
) -> list[Tensor]:
    """One pass; returns each row's logits ``[n, V]`` and grows the extents (not for trees)."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    lengths: list[int] = []
    attention_rows: list[AttentionRow] = []
    segments: list[LoraSegment] = []
    for row in rows:
        start, count, past = len(ids), len(row.tokens), row.extent.length
        depths, mask = list(range(count)), None
        if row.parents is not None:
            mask = torch.zeros(count, count, dtype=torch.bool)
            for node, parent in enumerate(row.parents):
                if parent >= 0:
                    mask[node] = mask[parent]
                mask[node, node] = True
                depths[node] = int(mask[node].sum()) - 1
        ids += row.tokens
        positions += [past + depth for depth in depths]
        slots += range(row.extent.start + past, row.extent.start + past + count)
        lengths += [max(past + depth + 1, row.prompt_length) for depth in depths]
        attention_rows.append(AttentionRow(start, count, row.extent.start, past + count, mask))
        if row.lora is not None:
            segments.append(LoraSegment(row.lora, start, start + count))
        if row.parents is None:
            row.extent.length += count
    batch = PackedBatch(
        torch.tensor(positions), torch.tensor(slots), attention_rows, rope_lengths=torch.tensor(lengths)
    )
    with torch.inference_mode():
        output = model(torch.tensor(ids), batch, cache, segments, taps=taps)
        logits = model.logits(output.hidden, segments)
    return list(logits.split([len(row.tokens) for row in rows]))


def complete(
    model: TargetModel,
    tokens: Sequence[int],
    lora: LoraAdapter | None = None,
    taps: TapLayers | None = None,
) -> Tensor:
    """Logits ``[n, V]`` of one pass over a whole sequence in a cache of its own."""
    cache = model.new_cache(len(tokens))
    row = Row(cache.allocator.allocate(len(tokens)), tokens, lora, prompt_length=len(tokens))
    return run(model, cache, [row], taps)[0]


def reference(path: Path) -> Any:
    """The transformers model of a checkpoint, float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def reference_logits(model: Any, prompt: Sequence[int], later: Sequence[int] = ()) -> Tensor:
    """Logits ``[n, V]`` of transformers: the prompt in one pass, ``later`` token by token through its cache."""
    with torch.inference_mode():
        output = model(torch.tensor([list(prompt)]), use_cache=True)
        logits = [output.logits[0]]
        for token in later:
            output = model(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits[0])
    return torch.cat(logits).float()


def assert_equal_logits(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Largest difference, relative to the largest expected logit."""
    assert found.shape == expected.shape
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"relative error {error:.2e}"


def random_tokens(count: int, seed: int, vocab_size: int = 320) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(vocab_size, (count,), generator=generator).tolist()
    return tokens
