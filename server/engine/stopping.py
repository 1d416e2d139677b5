"""When a sequence ends: ids, strings and lengths, checked token by token.

A speculative step emits several tokens at once. Each is looked at in order, as if it had come alone, so that nothing
behind a stop is ever seen, counted or sent.
"""

from dataclasses import dataclass
from enum import StrEnum
from itertools import compress

from eda.server.engine.detokenizer import IncrementalDetokenizer


class FinishReason(StrEnum):
    """Why a sequence ended. The first two are what clients see; the rest end in an error or with nobody listening."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class StopConditions:
    """What ends a sequence.

    ``min_tokens`` holds back ``stop_token_ids`` and ``stop_strings``: before that many tokens they do not stop.
    """

    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    """End-of-text ids included, unless the request ignores them."""
    stop_strings: tuple[str, ...] = ()
    include_stop_string: bool = False


@dataclass(frozen=True, slots=True)
class CheckedToken:
    """One token's outcome: the text that may be sent now and, for the last token, why it is the last."""

    text: str
    num_characters: int = 0
    """Characters that the token itself added, whether or not they may be sent yet."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop id or stop string that matched; ``None`` for end-of-text ids and lengths."""


def held_back_length(text: str, stop_strings: tuple[str, ...]) -> int:
    """Characters at the end of ``text`` that may yet turn out to be the start of a stop string."""
    longest = 0
    for stop in stop_strings:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest


class StopChecker:
    """Follows one sequence's output and finds its end.

    Stop strings are looked for in the text that is shown, and in the same text with that of special tokens.

    Args:
        conditions: what ends the sequence.
        detokenizer: fresh, for this sequence alone.
        hidden_ids: end-of-text ids: they stop without being named as ``stop_reason`` and have no text.
    """

    __slots__ = ("_conditions", "_detokenizer", "_hidden_ids", "_is_shown", "_num_tokens", "_pending")

    def __init__(
        self,
        conditions: StopConditions,
        detokenizer: IncrementalDetokenizer,
        hidden_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._conditions = conditions
        self._detokenizer = detokenizer
        self._hidden_ids = hidden_ids
        self._num_tokens = 0
        self._pending = ""
        self._is_shown: list[bool] = []  # for each character of _pending

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def push(self, token_id: int) -> CheckedToken:
        """Takes the next token. After a ``finish_reason`` no further token may be pushed."""
        conditions = self._conditions
        self._num_tokens += 1
        may_stop = self._num_tokens >= max(1, conditions.min_tokens)

        if may_stop and token_id in conditions.stop_token_ids:
            if not conditions.include_stop_string or token_id in self._hidden_ids:
                stop_reason = None if token_id in self._hidden_ids else token_id
                return CheckedToken(self._rest(), 0, FinishReason.STOP, stop_reason)
            piece = self._detokenizer.push(token_id) + self._detokenizer.flush()
            self._append(piece)
            return CheckedToken(self._take(len(self._pending)), len(piece), FinishReason.STOP, token_id)

        piece = self._detokenizer.push(token_id)
        self._append(piece)
        if conditions.stop_strings:
            self._append(self._detokenizer.hidden_text(token_id), is_shown=False)
        if may_stop and (stopped := self._match(len(piece))):
            return stopped
        if self._num_tokens >= conditions.max_tokens:
            # The flush may itself complete a stop string, when that contains a replacement mark.
            self._append(self._detokenizer.flush())
            if may_stop and (stopped := self._match(len(piece))):
                return stopped
            return CheckedToken(self._rest(), len(piece), FinishReason.LENGTH)

        return CheckedToken(self._take(self._num_certain()), len(piece))

    def flush(self) -> str:
        """The text still held back, for a sequence that ends for a reason outside of its own tokens."""
        return self._rest()

    def _append(self, text: str, *, is_shown: bool = True) -> None:
        self._pending += text
        self._is_shown += [is_shown] * len(text)

    def _shown(self) -> str:
        return "".join(compress(self._pending, self._is_shown))

    def _num_certain(self) -> int:
        """Pending characters that cannot become part of a stop string."""
        stop_strings = self._conditions.stop_strings
        count = len(self._pending) - held_back_length(self._pending, stop_strings)
        if not all(self._is_shown) and (keep := held_back_length(self._shown(), stop_strings)):
            places = [place for place, is_shown in enumerate(self._is_shown) if is_shown]
            count = min(count, places[-keep])
        return count

    def _take(self, length: int) -> str:
        """Takes what is shown of the first ``length`` characters that are pending."""
        text = "".join(compress(self._pending[:length], self._is_shown))
        self._pending, self._is_shown = self._pending[length:], self._is_shown[length:]
        return text

    def _rest(self) -> str:
        self._append(self._detokenizer.flush())
        return self._take(len(self._pending))

    def _match(self, num_characters: int) -> CheckedToken | None:
        """The earliest stop string in the pending text; the longer one when two start at the same place."""
        shown = self._shown()
        found: list[tuple[int, int, str]] = []
        for stop in self._conditions.stop_strings:
            if (start := shown.find(stop)) >= 0:
                found.append((start, -len(stop), stop))
            if len(shown) < len(self._pending) and (start := self._pending.find(stop)) >= 0:
                found.append((sum(self._is_shown[:start]), -len(stop), stop))
        if not found:
            return None
        start, _, stop = min(found)
        text = shown[:start] + (stop if self._conditions.include_stop_string else "")
        self._pending, self._is_shown = "", []
        return CheckedToken(text, num_characters, FinishReason.STOP, stop)
