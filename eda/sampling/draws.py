"""Choosing tokens: drawing from distributions, and the draft's side of a speculative step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from eda.sampling.noise import gumbel_noise
from eda.sampling.params import SamplingParams
from eda.sampling.processors import LogitsContext, edit_logits, process_logits
from eda.transfers import upload


def draw_uniforms(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Float64 ``[count]`` on ``device``, uniform in [0, 1). The generator may live on another device."""
    uniforms = torch.rand(count, dtype=torch.float64, generator=generator, device=generator.device)
    return uniforms.to(device)


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row, by inverting the cumulative sum in float64.

    Args:
        probabilities: ``[N, V]``, not negative; rows need not sum to 1, and a token of probability 0 is never drawn.

    Returns:
        Int64 ``[N]``. A row without any mass, or with NaN, gives some token of the vocabulary.
    """
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    uniforms = draw_uniforms(probabilities.shape[0], generator, probabilities.device)
    drawn = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    return drawn[:, 0].clamp_(max=probabilities.shape[1] - 1)


def add_noise(
    logits: Tensor,
    seeds: Sequence[int | None],
    positions: Sequence[int],
    token_ids: Tensor | None,
    vocab_size: int,
) -> Tensor:
    """Processed logits plus the Gumbel noise of their positions, in rows that have a seed; out of place.

    Args:
        logits: float32 ``[N, V]``.
        seeds, positions: one per row; rows with seed ``None`` stay as they are.
        token_ids: int64 ``[V]`` for a reduced vocabulary: each column takes the noise of its target id.
        vocab_size: of the target.
    """
    rows = [row for row, seed in enumerate(seeds) if seed is not None]
    if not rows:
        return logits
    per_row = zip(seeds, positions, strict=True)
    noise = torch.stack([gumbel_noise(seed, at, vocab_size) for seed, at in per_row if seed is not None])
    noise = noise.to(logits.device)
    if token_ids is not None:
        noise = noise[:, token_ids]
    if len(rows) == logits.shape[0]:
        return logits + noise
    return logits.index_add(0, upload(rows, logits.device), noise)


def _noise_seed(params: SamplingParams) -> int | None:
    return None if params.is_greedy else params.seed


def propose_chain_tokens(
    draft_logits: Tensor,
    contexts: Sequence[LogitsContext],
    positions: Sequence[int],
    draft_token_ids: Tensor | None,
    vocab_size: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor | None]:
    """The next draft token of each chain.

    Greedy rows take the argmax of the processed logits, seeded rows that of the processed logits plus the noise that
    the target will use, and the others draw from the softmax of the processed logits.

    Args:
        draft_logits: ``[B, V_draft]``.
        contexts: one per row, as for the target at the same place.
        positions: absolute position of the token to propose, one per row.
        draft_token_ids: int64 ``[V_draft]``, target id of each column; ``None`` when the vocabularies are the same.
        vocab_size: of the target.

    Returns:
        Int64 ``[B]`` column indices, and float32 ``[B, V_draft]`` distributions that they were drawn from: ``None``
        when no row is drawn, undefined in rows that are not.
    """
    processed = process_logits(draft_logits, contexts, draft_token_ids)
    seeds = [_noise_seed(context.params) for context in contexts]
    drawn_rows = [row for row, context in enumerate(contexts) if context.params.draws_freely]
    if not drawn_rows:
        return add_noise(processed, seeds, positions, draft_token_ids, vocab_size).argmax(-1), None
    # A draft whose logits are not finite must not harm the output: probability 0 makes verification reject.
    draft_probs = processed.softmax(-1).nan_to_num_(0.0)
    columns = draw(draft_probs, generator)
    if len(drawn_rows) < len(contexts):
        best = add_noise(processed, seeds, positions, draft_token_ids, vocab_size).argmax(-1)
        is_drawn = upload([context.params.draws_freely for context in contexts], columns.device)
        columns = torch.where(is_drawn, columns, best)
    return columns, draft_probs


def draft_scores(
    draft_logits: Tensor,
    contexts: Sequence[LogitsContext],
    positions: Sequence[int],
    draft_token_ids: Tensor | None,
    vocab_size: int,
) -> Tensor:
    """Log-probabilities to grow a tree by: the draft's own, after penalties and bias, before temperature and filters.

    What filters leave of a draft's distribution is too sure of itself: with ``top_k`` 1 every guess has probability 1,
    however doubtful it is, and the tree becomes one deep branch.

    Seeded rows take the noise that the target will use into account, which needs temperature and filters: what the
    filters keep shares its own probability by the noisy scores. Temperatures below 1 do not sharpen those either.

    Arguments as in ``propose_chain_tokens``. Returns float32 ``[B, V_draft]``.
    """
    scores = edit_logits(draft_logits, contexts, draft_token_ids).log_softmax(-1)
    seeds = [_noise_seed(context.params) for context in contexts]
    if all(seed is None for seed in seeds):
        return scores
    processed = process_logits(draft_logits, contexts, draft_token_ids)
    noisy = add_noise(processed, seeds, positions, draft_token_ids, vocab_size)
    softness = [min(1.0, context.params.temperature) for context in contexts]
    shares = (noisy * upload(softness, noisy.device, torch.float32)[:, None]).log_softmax(-1)
    is_kept = processed > float("-inf")
    mass = scores.where(is_kept, float("-inf")).logsumexp(-1, keepdim=True)
    is_noisy = upload([seed is not None for seed in seeds], noisy.device)[:, None]
    return torch.where(is_noisy & is_kept, mass + shares, scores)
