"""Which draft tokens the target accepts, and the token that follows them.

Whatever the rule, the emitted tokens are distributed exactly as the target alone would have produced them:

- greedy and seeded rows walk along the target's own token (the argmax of processed logits, with the noise of the
  seed added when there is one) as long as the draft has it;
- sampled chains are verified by rejection sampling (Leviathan, Kalman, Matias 2023; Chen et al. 2023), or as one block
  (Sun et al. 2024);
- deterministic candidates of sampled rows, trees mostly, are tried one by one at each node (SpecInfer's multi-step
  speculative sampling, Miao et al. 2023, for candidates that are not random).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from eda.kernels.verification import can_verify, verify_chains
from eda.processors import LogitsContext, TokenHistory, process_logits
from eda.proposal import Proposal
from eda.rejection import verify_sampled
from eda.sampling import add_noise, draw_uniforms
from eda.sampling_params import SamplingParams

__all__ = ["Proposal", "TokenLogprobs", "Verdict", "VerificationRow", "verify"]


@dataclass(frozen=True, slots=True)
class VerificationRow:
    """One sequence in a verification."""

    sampling: SamplingParams
    proposal: Proposal | None
    """``None``: plain decoding, one line of logits."""
    history: TokenHistory | None
    """Prompt and emitted tokens, the root included. Needed when a penalty is on."""
    num_generated: int
    """Output tokens emitted before this step."""
    position: int
    """Absolute position of the next token: the number of tokens known so far."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one place, from the target's raw logits (before any processing)."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    """The likeliest tokens with their log-probabilities, likeliest first."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one sequence emits in a step."""

    token_ids: list[int]
    """Accepted draft tokens, then the recovered or bonus token."""
    accepted_nodes: list[int]
    """Numbers (from 1) of the accepted nodes, from the root downwards; ``len`` is ``num_accepted``."""
    logprobs: list[TokenLogprobs] | None
    """One per emitted token; ``None`` when the request wants none."""
    is_finite: bool = True
    """``False``: the target's logits are not finite, so nothing is emitted."""


def verify(
    logits: Tensor | None,
    rows: Sequence[VerificationRow],
    generator: torch.Generator,
    *,
    block: bool = False,
    best: Sequence[int] | None = None,
    in_kernel: bool = False,
) -> list[Verdict]:
    """Verifies the proposals of a batch.

    Args:
        logits: ``[N, V]`` of the target, any floating type. Row ``r`` owns ``1 + n_r`` consecutive lines: its root,
            then its nodes in order. Never written to. ``None`` when ``best`` says all.
        rows: one per sequence.
        generator: source of all randomness of rows that are neither greedy nor seeded.
        block: verify sampled chains as a block, which accepts at least as many tokens on average.
        best: the argmax of each line, where all rows just take the likeliest token of raw logits; -1 where these are
            not finite.
        in_kernel: the C++ functions are there, and verify the rows that they cover.

    Returns:
        One verdict per row.

    Raises:
        ValueError: the number of lines is not what the rows need, or a penalty is on without a history.
    """
    *starts, num_lines = accumulate((1 + _num_nodes(row) for row in rows), initial=0)
    found = len(best or ()) if logits is None else logits.shape[0]
    if num_lines != found:
        raise ValueError(f"logits have {found} lines; these {len(rows)} rows need {num_lines}")
    if logits is None:
        return _verdicts(rows, dict(enumerate(_walk(best or (), rows))))

    covered = [in_kernel and not block and can_verify(row.sampling, row.proposal) for row in rows]
    quick = [index for index, is_covered in enumerate(covered) if is_covered]
    others = [index for index, is_covered in enumerate(covered) if not is_covered]
    outcomes: dict[int, tuple[list[int], int]] = {}
    if quick:
        chosen = [rows[index] for index in quick]
        num_uniforms = sum(1 + _num_nodes(row) for row in chosen)
        found_quick = verify_chains(
            logits.to(torch.float32).contiguous(),
            [row.sampling for row in chosen],
            [row.proposal for row in chosen],
            [starts[index] for index in quick],
            draw_uniforms(num_uniforms, generator, logits.device),
        )
        outcomes.update(zip(quick, found_quick, strict=True))
    if others:
        part = _select(logits, _lines(rows, starts, others))
        found_others = _verify_in_torch(part, [rows[index] for index in others], generator, block=block)
        outcomes.update(zip(others, found_others, strict=True))
    verdicts = _verdicts(rows, outcomes)
    if any(row.sampling.num_logprobs is not None for row in rows):
        return _with_logprobs(logits, rows, starts, verdicts)
    return verdicts


def _verify_in_torch(
    logits: Tensor, rows: Sequence[VerificationRow], generator: torch.Generator, *, block: bool
) -> list[tuple[list[int], int]]:
    """Accepted nodes and the next token of each row, of any kind; ``logits`` are those of these rows alone.

    The token is -1 where the logits that it would be chosen by are not finite.
    """
    *starts, _ = accumulate((1 + _num_nodes(row) for row in rows), initial=0)
    processed = _process(logits, rows)
    sampled = [index for index, row in enumerate(rows) if row.sampling.is_sampled]
    walked = [index for index, row in enumerate(rows) if not row.sampling.is_sampled]
    outcomes: dict[int, tuple[list[int], int]] = {}
    if walked:
        part = _select(processed, _lines(rows, starts, walked))
        outcomes.update(zip(walked, _verify_by_argmax(part, [rows[index] for index in walked]), strict=True))
    if sampled:
        part = _select(processed, _lines(rows, starts, sampled))
        proposals = [rows[index].proposal for index in sampled]
        outcomes.update(zip(sampled, verify_sampled(part, proposals, generator, block=block), strict=True))
    return [outcomes[index] for index in range(len(rows))]


def _verdicts(rows: Sequence[VerificationRow], outcomes: dict[int, tuple[list[int], int]]) -> list[Verdict]:
    """Verdicts without log-probabilities, from each row's accepted nodes and next token."""
    verdicts = []
    for index, row in enumerate(rows):
        nodes, token_id = outcomes[index]
        if token_id < 0:
            verdicts.append(Verdict([], [], None, is_finite=False))
            continue
        accepted = [row.proposal.token_ids[node - 1] for node in nodes] if row.proposal is not None else []
        verdicts.append(Verdict([*accepted, token_id], nodes, None))
    return verdicts


def _num_nodes(row: VerificationRow) -> int:
    return 0 if row.proposal is None else len(row.proposal.token_ids)


def _lines(rows: Sequence[VerificationRow], starts: Sequence[int], chosen: Sequence[int]) -> list[int]:
    return [starts[index] + node for index in chosen for node in range(1 + _num_nodes(rows[index]))]


def _select(tensor: Tensor, lines: Sequence[int]) -> Tensor:
    """The given lines; the tensor itself when that is all of them (they are in order)."""
    return tensor if len(lines) == tensor.shape[0] else tensor[torch.tensor(lines, device=tensor.device)]


def _process(logits: Tensor, rows: Sequence[VerificationRow]) -> Tensor:
    """Processed logits of all lines. Rounds nothing and costs nothing when no row has anything to process."""
    if not any(row.sampling.edits_logits or row.sampling.reshapes_distribution for row in rows):
        return logits
    contexts: list[LogitsContext] = []
    for row in rows:
        params, proposal = row.sampling, row.proposal
        contexts.append(LogitsContext(params, row.history, (), row.num_generated))
        if proposal is None:
            continue
        if not params.edits_logits:
            contexts += contexts[-1:] * len(proposal)
            continue
        for node, depth in enumerate(proposal.depths(), 1):
            path = proposal.path(node) if params.needs_history else ()
            contexts.append(LogitsContext(params, row.history, path, row.num_generated + depth))
    return process_logits(logits, contexts)


def _verify_by_argmax(scores: Tensor, rows: Sequence[VerificationRow]) -> list[tuple[list[int], int]]:
    """Greedy and seeded rows: at each node there is one right token; follow it while the draft has it.

    ``scores`` are the processed logits of these rows alone. Returns accepted nodes and the next token of each.
    """
    if any(not row.sampling.is_greedy for row in rows):
        seeds: list[int | None] = []
        positions: list[int] = []
        for row in rows:
            depths = [0] if row.proposal is None else [0, *row.proposal.depths()]
            seeds += [None if row.sampling.is_greedy else row.sampling.seed] * len(depths)
            positions += [row.position + depth for depth in depths]
        scores = add_noise(scores.to(torch.float32), seeds, positions, None, scores.shape[1])
    highest, places = scores.max(-1)  # NaN comes through
    best: list[int] = places.where(highest.isfinite(), -1).tolist()
    return _walk(best, rows)


def _walk(best: Sequence[int], rows: Sequence[VerificationRow]) -> list[tuple[list[int], int]]:
    """Follows the one right token of each line as long as the draft has it."""
    outcomes = []
    start = 0
    for row in rows:
        nodes: list[int] = []
        last = 0
        if row.proposal is not None:
            children: dict[tuple[int, int], int] = {}
            for node, edge in enumerate(zip(row.proposal.parents, row.proposal.token_ids, strict=True), 1):
                children.setdefault(edge, node)  # of equal siblings the first counts
            while child := children.get((last, best[start + last])):
                nodes.append(child)
                last = child
        outcomes.append((nodes, best[start + last]))
        start += 1 + _num_nodes(row)
    return outcomes


def _with_logprobs(
    logits: Tensor, rows: Sequence[VerificationRow], starts: Sequence[int], verdicts: Sequence[Verdict]
) -> list[Verdict]:
    """The verdicts with log-probabilities where the request wants them."""
    places: list[tuple[int, int]] = []
    width = 0
    for row, start, verdict in zip(rows, starts, verdicts, strict=True):
        if row.sampling.num_logprobs is not None and verdict.is_finite:
            width = max(width, row.sampling.num_logprobs)
            lines = [start, *(start + node for node in verdict.accepted_nodes)]
            places += zip(lines, verdict.token_ids, strict=True)
    if not places:
        return list(verdicts)
    lines_index, tokens_index = torch.tensor(places, device=logits.device).unbind(1)
    logprobs = logits[lines_index].to(torch.float32).log_softmax(-1)
    chosen: list[float] = logprobs.gather(1, tokens_index[:, None])[:, 0].tolist()
    likeliest = logprobs.topk(min(width, logits.shape[1]))
    top_values: list[list[float]] = likeliest.values.tolist()
    top_ids: list[list[int]] = likeliest.indices.tolist()

    completed = []
    place = 0
    for row, verdict in zip(rows, verdicts, strict=True):
        count = row.sampling.num_logprobs
        if count is None or not verdict.is_finite:
            completed.append(verdict)
            continue
        entries = []
        for token_id in verdict.token_ids:
            top = list(zip(top_ids[place][:count], top_values[place][:count], strict=True))
            entries.append(TokenLogprobs(token_id, chosen[place], top))
            place += 1
        completed.append(Verdict(verdict.token_ids, verdict.accepted_nodes, entries))
    return completed
