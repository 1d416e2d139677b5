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

from eda.models.answers import Answer, Logits
from eda.sampling.draws import add_noise
from eda.sampling.params import SamplingParams
from eda.sampling.processors import LogitsContext, TokenHistory, process_logits
from eda.speculation.proposal import Proposal
from eda.speculation.rejection import verify_sampled
from eda.transfers import upload


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

    @property
    def num_lines(self) -> int:
        """Lines of the target's answer: its root and its nodes."""
        return 1 if self.proposal is None else 1 + len(self.proposal.token_ids)


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


Outcome = tuple[list[int], int]
"""Accepted nodes, and the token that follows them."""


@dataclass(frozen=True, slots=True, eq=False)
class AnswerLines:
    """Where the target's answer to one row stands: its root's line and those of its nodes, in order."""

    answer: Answer
    """Of the whole pass, one object for all of its rows."""
    first: int


def verify(
    logits: Tensor, rows: Sequence[VerificationRow], generator: torch.Generator, *, block: bool = False
) -> list[Verdict]:
    """Verifies the proposals of a batch.

    Args:
        logits: ``[N, V]`` of the target, any floating type. Row ``r`` owns ``1 + n_r`` consecutive lines: its root,
            then its nodes in order. Never written to.
        rows: one per sequence.
        generator: source of all randomness of rows that are neither greedy nor seeded.
        block: verify sampled chains as a block, which accepts at least as many tokens on average.

    Returns:
        One verdict per row.

    Raises:
        ValueError: the number of lines is not what the rows need, or a penalty is on without a history.
    """
    *starts, num_lines = accumulate((row.num_lines for row in rows), initial=0)
    if num_lines != logits.shape[0]:
        raise ValueError(f"logits have {logits.shape[0]} lines; these {len(rows)} rows need {num_lines}")
    verdicts = verdicts_of(rows, _outcomes(logits, rows, starts, generator, block=block))
    return with_logprobs(logits, rows, starts, verdicts)


def follow(likeliest: Sequence[int], rows: Sequence[VerificationRow]) -> list[Verdict]:
    """Verdicts of rows that just take the likeliest token of raw logits, from that token at each of their lines."""
    return verdicts_of(rows, _walk(likeliest, rows))


def joined(lines: Sequence[AnswerLines]) -> tuple[Tensor, list[int]]:
    """The logits of all passes among ``lines`` as one block ``[N, V]``, and the first line of each in it."""
    blocks: list[Tensor] = []
    offsets: dict[int, int] = {}
    end = 0
    for line in lines:
        if id(line.answer) not in offsets:
            assert isinstance(line.answer, Logits)
            offsets[id(line.answer)] = end
            blocks.append(line.answer.values)
            end += line.answer.values.shape[0]
    block = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return block, [offsets[id(line.answer)] + line.first for line in lines]


def select_lines(block: Tensor, rows: Sequence[VerificationRow], first_lines: Sequence[int]) -> Tensor:
    """The lines of ``rows`` in their order; ``block`` itself where these are all of its lines."""
    wanted = [
        first + node for row, first in zip(rows, first_lines, strict=True) for node in range(row.num_lines)
    ]
    if wanted == list(range(block.shape[0])):
        return block
    return block[upload(wanted, block.device)]


def _outcomes(
    logits: Tensor,
    rows: Sequence[VerificationRow],
    starts: Sequence[int],
    generator: torch.Generator,
    *,
    block: bool,
) -> list[Outcome]:
    """What comes of rows of any kind; the token is -1 where the logits that it would be chosen by are not finite."""
    processed = _process(logits, rows)
    sampled = [index for index, row in enumerate(rows) if row.sampling.draws_freely]
    walked = [index for index, row in enumerate(rows) if not row.sampling.draws_freely]
    outcomes: dict[int, Outcome] = {}
    if walked:
        part = _select(processed, _lines(rows, starts, walked))
        outcomes.update(zip(walked, _verify_by_argmax(part, [rows[index] for index in walked]), strict=True))
    if sampled:
        part = _select(processed, _lines(rows, starts, sampled))
        proposals = [rows[index].proposal for index in sampled]
        outcomes.update(zip(sampled, verify_sampled(part, proposals, generator, block=block), strict=True))
    return [outcomes[index] for index in range(len(rows))]


def verdicts_of(rows: Sequence[VerificationRow], outcomes: Sequence[Outcome]) -> list[Verdict]:
    """Verdicts without log-probabilities."""
    verdicts = []
    for row, (nodes, token_id) in zip(rows, outcomes, strict=True):
        if token_id < 0:
            verdicts.append(Verdict([], [], None, is_finite=False))
            continue
        accepted = [row.proposal.token_ids[node - 1] for node in nodes] if row.proposal is not None else []
        verdicts.append(Verdict([*accepted, token_id], nodes, None))
    return verdicts


def _lines(rows: Sequence[VerificationRow], starts: Sequence[int], chosen: Sequence[int]) -> list[int]:
    return [starts[index] + node for index in chosen for node in range(rows[index].num_lines)]


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


def _verify_by_argmax(scores: Tensor, rows: Sequence[VerificationRow]) -> list[Outcome]:
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


def _walk(best: Sequence[int], rows: Sequence[VerificationRow]) -> list[Outcome]:
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
        start += row.num_lines
    return outcomes


def with_logprobs(
    logits: Tensor, rows: Sequence[VerificationRow], starts: Sequence[int], verdicts: Sequence[Verdict]
) -> list[Verdict]:
    """The verdicts with log-probabilities where the request wants them; ``starts`` are the rows' first lines."""
    if all(row.sampling.num_logprobs is None for row in rows):
        return list(verdicts)
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
