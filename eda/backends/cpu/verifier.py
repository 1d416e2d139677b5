"""Verification of chains in C++: target softmax, acceptance and the draw of the next token in one call."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from eda.backends.base import Verifier
from eda.backends.cpu.library import Sampling, VerifiedRow, kernels
from eda.backends.cpu.threads import num_threads
from eda.backends.cpu.tokens import as_pointer
from eda.models.answers import Logits
from eda.sampling.draws import draw_uniforms
from eda.sampling.params import SamplingDemand, SamplingParams
from eda.speculation.proposal import Proposal
from eda.speculation.verification import (
    AnswerLines,
    Verdict,
    VerificationRow,
    joined,
    verdicts_of,
    with_logprobs,
)

COVERS = SamplingDemand.DRAWS | SamplingDemand.TEMPERATURE | SamplingDemand.CUTS | SamplingDemand.LOGPROBS
"""Of rows that ``verify_chains`` takes; log-probabilities are added to its verdicts afterwards."""


class CpuVerifier:
    """Verifies chains of drawn rows in C++, and hands on all other rows.

    Args:
        inner: verifies the others, afterwards.
        generator: the one of ``inner``. Rows that are verified here draw from it first.
    """

    def __init__(self, inner: Verifier, generator: torch.Generator) -> None:
        self.inner = inner
        self._generator = generator

    def verify(self, rows: Sequence[VerificationRow], lines: Sequence[AnswerLines]) -> list[Verdict]:
        """See ``Verifier``."""
        covered = [
            isinstance(line.answer, Logits) and can_verify(row.sampling, row.proposal)
            for row, line in zip(rows, lines, strict=True)
        ]
        if not any(covered):
            return self.inner.verify(rows, lines)
        quick = [index for index, is_covered in enumerate(covered) if is_covered]
        others = [index for index, is_covered in enumerate(covered) if not is_covered]
        verdicts = dict(
            zip(quick, self._verify([rows[i] for i in quick], [lines[i] for i in quick]), strict=True)
        )
        if others:
            found = self.inner.verify([rows[i] for i in others], [lines[i] for i in others])
            verdicts.update(zip(others, found, strict=True))
        return [verdicts[index] for index in range(len(rows))]

    def _verify(self, rows: Sequence[VerificationRow], lines: Sequence[AnswerLines]) -> list[Verdict]:
        block, first_lines = joined(lines)
        num_uniforms = sum(row.num_lines for row in rows)
        outcomes = verify_chains(
            block.to(torch.float32).contiguous(),
            [row.sampling for row in rows],
            [row.proposal for row in rows],
            first_lines,
            draw_uniforms(num_uniforms, self._generator, block.device),
        )
        return with_logprobs(block, rows, first_lines, verdicts_of(rows, outcomes))


def sampling_of(params: SamplingParams) -> Sampling:
    """The part of a request's settings that shapes its distribution. 0 is the temperature of greedy rows."""
    temperature = 0.0 if params.is_greedy else params.temperature
    # A top_k beyond 32 bits keeps every token.
    return Sampling(params.top_p, temperature, params.min_p, params.top_k if params.top_k < 2**31 else 0)


def can_verify(params: SamplingParams, proposal: Proposal | None) -> bool:
    """Whether ``verify_chains`` covers a row: drawn from unedited logits, with a chain or none."""
    if not params.draws_freely or params.demand not in COVERS:
        return False
    return proposal is None or proposal.is_chain


def verify_chains(
    logits: Tensor,
    samplings: Sequence[SamplingParams],
    proposals: Sequence[Proposal | None],
    first_lines: Sequence[int],
    uniforms: Tensor,
) -> list[tuple[list[int], int]]:
    """Accepted nodes and the token that follows them, for each of ``B`` rows that ``can_verify``.

    The token is -1 where the logits that it would be drawn from are not finite.

    Args:
        logits: raw, float32 ``[N, V]``, contiguous.
        first_lines: the line of each row's root; the lines of its nodes follow.
        uniforms: float64 ``[n + B]`` in [0, 1): one for each drafted token of all rows in order, then one for the last
            token of each row. The same numbers lead ``eda.speculation.rejection`` to the same tokens, but for rounding.
    """
    library = kernels()
    assert library is not None
    rows = (VerifiedRow * len(samplings))()
    kept: list[object] = []  # what rows point to
    num_drafted = 0
    for place, (params, proposal, line) in enumerate(zip(samplings, proposals, first_lines, strict=True)):
        sampling = sampling_of(params)
        proposal = proposal.as_drawn() if proposal is not None and proposal.token_ids else None
        if proposal is None or proposal.draft_probs is None:
            rows[place] = VerifiedRow(sampling, 0, 0, 0, 0, 0, line, num_drafted)
            continue
        num_draft, num_columns = proposal.draft_probs.shape
        tokens = (ctypes.c_int64 * num_draft)(*proposal.token_ids)
        probabilities = proposal.draft_probs.to(torch.float32).contiguous()
        ids = None if proposal.draft_token_ids is None else proposal.draft_token_ids.contiguous()
        kept.append((tokens, probabilities, ids))
        rows[place] = VerifiedRow(
            sampling,
            probabilities.data_ptr(),
            0 if ids is None else ids.data_ptr(),
            ctypes.addressof(tokens),
            num_draft,
            num_columns,
            line,
            num_drafted,
        )
        num_drafted += num_draft
    accepted = (ctypes.c_int32 * len(rows))()
    found = (ctypes.c_int64 * len(rows))()
    library.eda_verify(
        num_threads(),
        rows,
        len(rows),
        as_pointer(logits),
        logits.shape[1],
        as_pointer(uniforms),
        ctypes.c_void_p(uniforms.data_ptr() + num_drafted * uniforms.itemsize),
        accepted,
        found,
    )
    return [(list(range(1, count + 1)), token) for count, token in zip(accepted, found, strict=True)]
