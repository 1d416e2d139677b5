"""Toy language models over a few tokens, small enough to know every distribution exactly.

A model is a table ``[V, V]``: row ``t`` holds the logits of the token after ``t``. Many sequences are decoded at once
through ``verify``, and the joint distribution of their first tokens is compared with the exact one.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from scipy import stats
from torch import Tensor

from eda.backends.base import Verifier
from eda.backends.cpu.verifier import CpuVerifier
from eda.backends.eager.verifier import RulesVerifier
from eda.models.answers import Logits
from eda.sampling.params import SamplingParams
from eda.sampling.processors import TokenHistory
from eda.speculation.proposal import Proposal
from eda.speculation.verification import AnswerLines, VerificationRow
from tests.support.sampling_reference import reference_logits

Drafter = Callable[[list[int], torch.Generator], list[Proposal | None]]
"""From the last token of each sequence to its proposal."""


def random_table(vocab_size: int, seed: int, scale: float = 1.5) -> Tensor:
    return torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def no_drafter(last: list[int], generator: torch.Generator) -> list[Proposal | None]:
    return [None] * len(last)


def chain_drafter(table: Tensor, max_length: int, token_ids: Tensor | None = None) -> Drafter:
    """Chains drawn from ``table`` ``[V, V_draft]``; sequence ``r`` gets length ``r % (max_length + 1)``."""

    def propose(last: list[int], generator: torch.Generator) -> list[Proposal | None]:
        tokens = torch.tensor(last)
        drawn, probs = [], []
        for _ in range(max_length):
            probs.append(table[tokens].softmax(-1))
            columns = torch.multinomial(probs[-1], 1, generator=generator)[:, 0]
            tokens = columns if token_ids is None else token_ids[columns]
            drawn.append(tokens)
        chains, draft_probs = torch.stack(drawn, 1).tolist(), torch.stack(probs, 1)
        proposals: list[Proposal | None] = []
        for row, chain in enumerate(chains):
            length = row % (max_length + 1)
            probs_of_row = draft_probs[row, :length]
            proposals.append(Proposal.chain(chain[:length], probs_of_row, token_ids) if length else None)
        return proposals

    return propose


def tree_drafter(table: Tensor, num_children: int, depth: int, *, repeat: bool = False) -> Drafter:
    """The ``num_children`` likeliest tokens of each node; with ``repeat`` the first one twice."""
    children = table.topk(num_children).indices.tolist()
    if repeat:
        children = [[tokens[0], *tokens] for tokens in children]

    def grow(root: int) -> Proposal:
        tokens, parents, level = [], [], [(0, root)]
        for _ in range(depth):
            grown = []
            for parent, last in level:
                for token in children[last]:
                    tokens.append(token)
                    parents.append(parent)
                    grown.append((len(tokens), token))
            level = grown
        return Proposal(tokens, parents)

    trees = [grow(root) for root in range(table.shape[0])]
    return lambda last, generator: [trees[token] for token in last]


def exact_joint(table: Tensor, params: SamplingParams, prompt: list[int], length: int) -> Tensor:
    """``[V] * length``: probability of each output of ``length`` tokens."""
    vocab_size = table.shape[0]
    joint = torch.zeros([vocab_size] * length, dtype=torch.float64)
    for prefix in itertools.product(range(vocab_size), repeat=length - 1):
        probability = 1.0
        for done in range(length):
            output = list(prefix[:done])
            last = (prompt + output)[-1]
            conditional = reference_logits(params, table[last], prompt, output).double().softmax(-1)
            if done < length - 1:
                probability *= float(conditional[prefix[done]])
        joint[prefix] = probability * conditional
    return joint


@dataclass
class Decoding:
    counts: Tensor
    """``[V] * length``: how often each output occurred."""
    num_passes: int
    num_emitted: int


def decode(
    table: Tensor,
    params: SamplingParams,
    drafter: Drafter,
    *,
    prompt: list[int],
    length: int,
    num_sequences: int,
    seed: int = 0,
    block: bool = False,
    seeds: range | None = None,
    in_kernel: bool = False,
) -> Decoding:
    """Decodes until each sequence has ``length`` tokens; tokens beyond that are not counted."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = table.shape[0]
    all_params = [params] * num_sequences
    if seeds is not None:
        all_params = [SamplingParams(temperature=params.temperature, seed=seed) for seed in seeds]
    outputs: list[list[int]] = [[] for _ in range(num_sequences)]
    histories: list[TokenHistory | None] = [None] * num_sequences
    if params.needs_history:
        histories = [TokenHistory(prompt, vocab_size, "cpu") for _ in range(num_sequences)]
    num_passes = num_emitted = 0
    active = list(range(num_sequences))
    while active:
        proposals = drafter([(prompt + outputs[index])[-1] for index in active], generator)
        rows, before = [], []
        for index, proposal in zip(active, proposals, strict=True):
            done = len(outputs[index])
            rows.append(
                VerificationRow(all_params[index], proposal, histories[index], done, len(prompt) + done)
            )
            before.append((prompt + outputs[index])[-1])
            before += proposal.token_ids if proposal else []
        verifier: Verifier = RulesVerifier(generator, block=block)
        if in_kernel:
            verifier = CpuVerifier(verifier, generator)
        verdicts = verifier.verify(rows, lines_of(table[torch.tensor(before)], rows))
        num_passes += len(rows)
        for index, verdict in zip(active, verdicts, strict=True):
            outputs[index] += verdict.token_ids
            num_emitted += len(verdict.token_ids)
            if (history := histories[index]) is not None:
                history.append(verdict.token_ids)
        active = [index for index in active if len(outputs[index]) < length]
    cells = torch.tensor([output[:length] for output in outputs])
    counts = torch.zeros([vocab_size] * length, dtype=torch.float64)
    counts.index_put_(tuple(cells.unbind(1)), torch.ones(num_sequences, dtype=torch.float64), accumulate=True)
    return Decoding(counts, num_passes, num_emitted)


def lines_of(logits: Tensor, rows: Sequence[VerificationRow]) -> list[AnswerLines]:
    """One pass that answered ``rows`` in their order."""
    answer = Logits(logits)
    firsts = accumulate((row.num_lines for row in rows), initial=0)
    return [AnswerLines(answer, first) for first, _ in zip(firsts, rows, strict=False)]


def chi_square_p_value(counts: Tensor, probabilities: Tensor) -> float:
    """How likely counts at least as far from ``probabilities`` are. 0 when something impossible occurred.

    Cells with fewer than 5 expected counts are put together, as the test asks for.
    """
    observed, expected = counts.flatten(), probabilities.flatten() * counts.sum()
    if bool((observed[probabilities.flatten() == 0] > 0).any()):
        return 0.0
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    # Probabilities are float32 softmaxes: their sum differs from 1 by rounding, which the test would refuse.
    expected = expected * (observed.sum() / expected.sum())
    return float(stats.chisquare(observed.numpy(), expected.numpy()).pvalue)
