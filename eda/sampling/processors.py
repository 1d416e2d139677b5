"""From raw logits to the logits that tokens are chosen by.

One pass over the rows of a batch with different settings: each processor runs once, over the rows that need it,
with its settings as a column. A row's result does not depend on its companions in the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eda.sampling.params import SamplingParams
from eda.transfers import upload


class TokenHistory:
    """Which tokens one sequence's prompt and output hold, for the penalties.

    Costs nothing but the ids until it is first read; then two ``[vocab_size]`` tensors on ``device``.
    """

    def __init__(
        self, prompt_ids: Sequence[int], vocab_size: int, device: torch.device | str = "cpu"
    ) -> None:
        """Raises ``ValueError`` for ids outside ``0`` to ``vocab_size - 1``."""
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._check(prompt_ids)
        self._unread_prompt: list[int] = list(prompt_ids)
        self._unread_output: list[int] = []
        self._prompt_seen: Tensor | None = None
        self._output_counts: Tensor | None = None

    def append(self, token_ids: Sequence[int]) -> None:
        """Adds emitted tokens. Raises ``ValueError`` for ids outside the vocabulary."""
        self._check(token_ids)
        self._unread_output.extend(token_ids)

    @property
    def prompt_seen(self) -> Tensor:
        """Bool ``[vocab_size]``: tokens of the prompt. Not to be written to."""
        if self._prompt_seen is None:
            self._prompt_seen = torch.zeros(self.vocab_size, dtype=torch.bool, device=self.device)
            self._prompt_seen[upload(self._unread_prompt, self.device, torch.int64)] = True
            self._unread_prompt.clear()
        return self._prompt_seen

    @property
    def output_counts(self) -> Tensor:
        """Float32 ``[vocab_size]``: how often each token is in the output. Not to be written to."""
        if self._output_counts is None:
            self._output_counts = torch.zeros(self.vocab_size, dtype=torch.float32, device=self.device)
        if self._unread_output:
            ids = upload(self._unread_output, self.device, torch.int64)
            self._output_counts.index_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))
            self._unread_output.clear()
        return self._output_counts

    def _check(self, token_ids: Sequence[int]) -> None:
        if len(token_ids) and not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            outside = [token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size]
            raise ValueError(
                f"token ids {outside[:5]} are outside the vocabulary of {self.vocab_size} tokens"
            )


@dataclass(frozen=True, slots=True)
class LogitsContext:
    """What one row of logits needs to be processed: the settings and the tokens before the predicted one."""

    params: SamplingParams
    history: TokenHistory | None = None
    """Prompt and emitted tokens. Needed when ``params.needs_history``."""
    path: tuple[int, ...] = ()
    """Drafted tokens between the last emitted token and the token that these logits predict."""
    num_generated: int = 0
    """Output tokens before the predicted one, those of ``path`` included."""

    @property
    def masks_stops(self) -> bool:
        """Whether ``min_tokens`` still forbids the stop ids here."""
        return self.num_generated < self.params.min_tokens and bool(self.params.stop_ids)

    @property
    def is_edited(self) -> bool:
        """Whether penalties, bias or the ``min_tokens`` mask change this row."""
        return self.params.needs_history or bool(self.params.logit_bias) or self.masks_stops

    @property
    def is_active(self) -> bool:
        """Whether processing changes this row at all."""
        return self.is_edited or self.params.reshapes_distribution


def process_logits(
    logits: Tensor, contexts: Sequence[LogitsContext], token_ids: Tensor | None = None
) -> Tensor:
    """Penalties, bias and ``min_tokens`` mask; then, for rows that are not greedy, temperature, top-k, top-p, min-p.

    Args:
        logits: ``[N, V]``, any floating type; never written to.
        contexts: one per row.
        token_ids: int64 ``[V]``, the target's id of each column when the columns are a reduced draft vocabulary.

    Returns:
        Float32 ``[N, V]``, -inf where a token is excluded. ``logits`` itself when it is float32 and nothing is on.

    Raises:
        ValueError: not one context per row, or a penalty is on and a context has no history.

    The semantics are those of the processors and warpers of transformers, except that top-p keeps *all* tokens as
    likely as the last one kept (transformers keeps an arbitrary part of them), so that the result depends neither
    on a sorting algorithm nor on the device.
    """
    if len(contexts) != logits.shape[0]:
        raise ValueError(
            f"{len(contexts)} contexts for {logits.shape[0]} rows of logits; one per row is needed"
        )
    active = [row for row, context in enumerate(contexts) if context.is_active]
    logits = logits.to(torch.float32)
    return _on_rows(logits, active, lambda part: _process(part, [contexts[row] for row in active], token_ids))


def edit_logits(logits: Tensor, contexts: Sequence[LogitsContext], token_ids: Tensor | None = None) -> Tensor:
    """The first half of ``process_logits``, with its arguments: penalties, bias and ``min_tokens`` mask alone."""
    active = [row for row, context in enumerate(contexts) if context.is_edited]
    logits = logits.to(torch.float32)
    return _on_rows(logits, active, lambda part: _edit(part, [contexts[row] for row in active], token_ids))


def _on_rows(logits: Tensor, rows: Sequence[int], process: Callable[[Tensor], Tensor]) -> Tensor:
    """``logits`` with ``process`` applied to ``rows`` alone; out of place."""
    if not rows:
        return logits
    if len(rows) == logits.shape[0]:
        return process(logits)
    index = upload(rows, logits.device)
    return logits.index_copy(0, index, process(logits[index]))


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return upload(values, like.device, torch.float32)[:, None]


def _edit(logits: Tensor, contexts: Sequence[LogitsContext], token_ids: Tensor | None) -> Tensor:
    rows = [row for row, context in enumerate(contexts) if context.params.needs_history]
    logits = _on_rows(logits, rows, lambda part: _penalise(part, [contexts[row] for row in rows], token_ids))
    if any(context.masks_stops or context.params.logit_bias for context in contexts):
        logits = logits + _biases(contexts, logits, token_ids)
    return logits


def _process(logits: Tensor, contexts: Sequence[LogitsContext], token_ids: Tensor | None) -> Tensor:
    logits = _edit(logits, contexts, token_ids)
    params = [context.params for context in contexts]
    temperatures = [1.0 if item.is_greedy else item.temperature for item in params]
    if any(temperature != 1.0 for temperature in temperatures):
        logits = logits / _column(temperatures, logits)
    return _truncate(logits, params)


def _penalise(logits: Tensor, contexts: Sequence[LogitsContext], token_ids: Tensor | None) -> Tensor:
    """Repetition penalty over prompt and output, then frequency and presence penalties over the output."""
    histories = [context.history for context in contexts if context.history is not None]
    if len(histories) != len(contexts):
        raise ValueError("a penalty is on but the history is None; pass the sequence's TokenHistory")
    counts = torch.stack([history.output_counts for history in histories])
    seen = torch.stack([history.prompt_seen for history in histories])
    drafted = [(row, token_id) for row, context in enumerate(contexts) for token_id in context.path]
    if drafted:
        index = upload(drafted, logits.device).unbind(1)
        counts.index_put_(index, counts.new_ones(()), accumulate=True)
    if token_ids is not None:
        counts, seen = counts[:, token_ids], seen[:, token_ids]
    in_output = counts > 0
    params = [context.params for context in contexts]
    if any(item.repetition_penalty != 1.0 for item in params):
        repetition = _column([item.repetition_penalty for item in params], logits)
        repeated = torch.where(logits < 0, logits * repetition, logits / repetition)
        logits = torch.where(seen | in_output, repeated, logits)
    if any(item.frequency_penalty != 0.0 for item in params):
        logits = logits - _column([item.frequency_penalty for item in params], logits) * counts
    if any(item.presence_penalty != 0.0 for item in params):
        logits = logits - _column([item.presence_penalty for item in params], logits) * in_output
    return logits


def _biases(contexts: Sequence[LogitsContext], logits: Tensor, token_ids: Tensor | None) -> Tensor:
    """``[N, V]`` to add: the bias of each row's request, -inf at stop ids that ``min_tokens`` forbids."""
    size = logits.shape[1] if token_ids is None else int(token_ids.max()) + 1
    places: list[tuple[int, int]] = []
    values: list[float] = []
    for row, context in enumerate(contexts):
        entries = list(context.params.logit_bias.items())
        if context.masks_stops:
            entries += [(token_id, float("-inf")) for token_id in context.params.stop_ids]
        for token_id, value in entries:
            if token_id < size:
                places.append((row, token_id))
                values.append(value)
    biases = torch.zeros(len(contexts), size, dtype=torch.float32, device=logits.device)
    if places:
        index = upload(places, logits.device).unbind(1)
        added = upload(values, logits.device, torch.float32)
        biases.index_put_(index, added, accumulate=True)
    return biases if token_ids is None else biases[:, token_ids]


def _truncate(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Top-k, top-p and min-p: each keeps the logits at or above a limit, so that nothing is scattered back."""
    vocab_size = logits.shape[1]
    top_ks = [item.top_k if 0 < item.top_k < vocab_size and not item.is_greedy else 0 for item in params]
    top_ps = [1.0 if item.is_greedy else item.top_p for item in params]
    min_ps = [0.0 if item.is_greedy else item.min_p for item in params]
    rows = [row for row in range(len(params)) if top_ks[row] or top_ps[row] < 1.0 or min_ps[row] > 0.0]

    def keep(part: Tensor) -> Tensor:
        limits = _limits(
            part, [top_ks[row] for row in rows], [top_ps[row] for row in rows], [min_ps[row] for row in rows]
        )
        return part.masked_fill(part < limits, float("-inf"))

    return _on_rows(logits, rows, keep)


def _limits(
    logits: Tensor, top_ks: list[int], top_ps: list[float], min_ps: list[float], width: int = 64
) -> Tensor:
    """``[N, 1]``: the smallest logit that top-k, then top-p, then min-p leave in each row.

    Sorting a whole vocabulary takes longer than a small target's forward pass, and a nucleus rarely has more than some
    dozen tokens. So only the ``width`` largest logits are fetched, and more for rows that keep more.
    """
    vocab_size = logits.shape[1]
    # Min-p looks at the likeliest token alone, which top-k and top-p never remove.
    logarithms: list[float] = torch.tensor(min_ps, dtype=torch.float64).log().tolist()
    ratios = upload(logarithms, logits.device, logits.dtype)[:, None]
    if not any(top_ks) and min(top_ps) == 1.0:
        return logits.amax(-1, keepdim=True) + ratios
    last = upload([(top_k or 1) - 1 for top_k in top_ks], logits.device)[:, None]
    is_top_k = upload([top_k > 0 for top_k in top_ks], logits.device)[:, None]
    masses = upload(top_ps, logits.device, torch.float64)[:, None]
    is_top_p = masses < 1.0

    width = max(width, 1 + max(top_ks))
    largest = logits.topk(min(width, vocab_size)).values
    smallest_top_k = largest.gather(1, last).where(is_top_k, float("-inf"))
    # In float64, so that sums do not depend on how many logits other rows made it fetch.
    survivors = largest.masked_fill(largest < smallest_top_k, float("-inf")).to(torch.float64)
    totals = survivors.logsumexp(-1, keepdim=True)
    if not all(top_ks):
        totals = totals.where(is_top_k, logits.logsumexp(-1, keepdim=True).to(torch.float64))
    probabilities = (survivors - totals).exp()
    cumulative = probabilities.cumsum(-1)
    # A token stays when the tokens likelier than it hold less than top_p; the likeliest always stays.
    num_kept = (cumulative - probabilities < masses).sum(-1, keepdim=True).clamp_(min=1)
    nucleus = largest.gather(1, num_kept - 1).where(is_top_p, float("-inf"))
    limits = torch.maximum(torch.maximum(smallest_top_k, nucleus), largest[:, :1] + ratios)

    if width < vocab_size:
        # Logits equal to the last of the top-k are kept too: all are known once a smaller one has been fetched.
        unknown = torch.where(
            is_top_k, largest[:, -1:] >= smallest_top_k, (cumulative[:, -1:] < masses) & is_top_p
        )
        rows = unknown[:, 0].nonzero()[:, 0]
        if numbers := rows.tolist():
            limits[rows] = _limits(
                logits[rows],
                [top_ks[row] for row in numbers],
                [top_ps[row] for row in numbers],
                [min_ps[row] for row in numbers],
                8 * width,
            )
    return limits
