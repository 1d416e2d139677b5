"""A decoder without a model, for tests of scheduling, stops and failures."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from eda.decoder import ScheduledRow, StepResult
from eda.errors import CacheFullError
from eda.models.cache import Extent
from eda.models.fine_tune import FineTune
from eda.server.engine.detokenizer import IncrementalDetokenizer
from eda.server.engine.sequence import Sequence as EngineSequence
from eda.server.engine.sequence import SequenceLabels
from eda.server.engine.stopping import StopChecker, StopConditions
from eda.speculation.kinds import Chain, Speculation
from eda.speculation.sequence import SequenceState

FINE_TUNE = cast(FineTune, None)
LABELS = SequenceLabels("base", "private")


def next_token(token_ids: Sequence[int]) -> int:
    """What the fake model says after ``token_ids``: lower-case letters, depending on everything before."""
    return 97 + (sum(token_ids) * 31 + len(token_ids) ** 2 * 7 + token_ids[-1] * 13) % 26


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeDecoder:
    """Emits ``continuation`` in runs as long as the speculation allows: every draft token is accepted.

    ``fail`` is asked before a step with its rows; what it returns is raised.
    """

    def __init__(self, num_slots: int = 1000) -> None:
        self.num_slots = num_slots
        self.num_free = num_slots
        self.fail: Callable[[Sequence[ScheduledRow]], BaseException | None] = lambda rows: None
        self.batches: list[list[tuple[SequenceState, int]]] = []
        self.admitted: list[SequenceState] = []

    def _capacity(self, state: SequenceState) -> int:
        return state.max_length + state.speculation.slots

    def can_admit(self, state: SequenceState) -> bool:
        return self._capacity(state) <= self.num_free

    def fits(self, state: SequenceState) -> bool:
        return self._capacity(state) <= self.num_slots

    def admit(self, state: SequenceState) -> None:
        if not self.can_admit(state):
            raise CacheFullError("full")
        state.extent = Extent(0, self._capacity(state))
        self.num_free -= state.extent.capacity
        self.admitted.append(state)

    def release(self, state: SequenceState) -> None:
        if state.extent is not None:
            self.num_free += state.extent.capacity
            state.extent = None

    def step(self, rows: Sequence[ScheduledRow]) -> list[StepResult]:
        error = self.fail(rows)
        if error is not None:
            raise error
        self.batches.append([(row.state, row.num_tokens) for row in rows])
        return [self._step(row) for row in rows]

    def _step(self, row: ScheduledRow) -> StepResult:
        state = row.state
        assert state.extent is not None
        assert row.num_tokens <= state.num_uncomputed
        was_prefilling = state.is_prefilling
        if row.num_tokens < state.num_uncomputed:
            state.extent.length += row.num_tokens
            return StepResult([])
        room = state.max_length - len(state.token_ids) - 1
        drafts = state.drafts and not was_prefilling
        drafted = state.speculation.fitting(room, 1000) if drafts else 0
        emitted = continuation(state.token_ids, drafted + 1)
        state.extent.length += row.num_tokens + drafted
        state.token_ids.extend(emitted)
        return StepResult(emitted, None, drafted, drafted)


def decode_letters(token_ids: Sequence[int]) -> str:
    return bytes(token_ids).decode(errors="replace")


def make_sequence(
    prompt: Sequence[int] = (1, 2, 3),
    max_tokens: int = 10,
    *,
    name: str = "r",
    speculation: Speculation | None = None,
    **options: Any,
) -> EngineSequence:
    """A sequence of the fake model; ``options`` are split between stop conditions and the sequence."""
    conditions = {
        key: options.pop(key)
        for key in ("min_tokens", "stop_token_ids", "stop_strings", "include_stop_string")
        if key in options
    }
    state = SequenceState(
        token_ids=list(prompt),
        max_length=len(prompt) + max_tokens,
        fine_tune=FINE_TUNE,
        speculation=speculation or Chain(4),
    )
    checker = StopChecker(StopConditions(max_tokens, **conditions), IncrementalDetokenizer(decode_letters))
    return EngineSequence(name, state, checker, options.pop("labels", LABELS), **options)
