"""Token ids to text, one token at a time."""

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no complete UTF-8 character."""


class IncrementalDetokenizer:
    """Turns a growing list of token ids into text that never has to be taken back.

    A byte-level vocabulary may cut a character over several tokens; such a token adds nothing until the character is
    complete. The pieces, joined and closed by ``flush()``, equal the decoding of all ids at once.

    Args:
        decode: token ids to text; special tokens that are to be hidden must be named in ``hidden_texts``.
        hidden_texts: ids of special tokens, with the text that they stand for and that is not shown. They are left out
            before decoding, so they cannot change the spacing of their neighbours.
        joined_ids: ids of single bytes whose run is decoded as one: a wrong byte spoils the right ones before it, so
            the text of a run is certain only when the run has ended.
    """

    __slots__ = ("_decode", "_hidden_texts", "_joined_ids", "_num_emitted", "_num_settled", "_window")

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        hidden_texts: Mapping[int, str] = MappingProxyType({}),
        joined_ids: Collection[int] = (),
    ) -> None:
        self._decode = decode
        self._hidden_texts = hidden_texts
        self._joined_ids = joined_ids
        # Only the last settled piece and what follows it are decoded again. The settled piece stays in the window
        # because some decoders strip the space of the first token that they see.
        self._window: list[int] = []
        self._num_settled = 0
        self._num_emitted = 0

    def push(self, token_id: int) -> str:
        """Returns the text that is certain now and was not before; often empty in the middle of a character."""
        if token_id in self._hidden_texts:
            return ""
        self._window.append(token_id)
        if token_id in self._joined_ids:
            return ""
        text = self._decode(self._window)
        # A replacement mark at the end may be the start of a character whose other bytes are still to come. What
        # stands before the marks ends on a character border, and no later byte changes it.
        certain = text.rstrip(REPLACEMENT)
        piece = certain[self._num_emitted :]
        self._num_emitted = max(self._num_emitted, len(certain))
        if len(certain) == len(text):
            self._settle()
        return piece

    def hidden_text(self, token_id: int) -> str:
        """What a special token stands for; empty for a token whose text is shown."""
        return self._hidden_texts.get(token_id, "")

    def flush(self) -> str:
        """Returns what was held back: the replacement marks of characters that never became complete."""
        text = self._decode(self._window) if self._window else ""
        piece = text[self._num_emitted :]
        self._window, self._num_settled, self._num_emitted = [], 0, 0
        return piece

    def _settle(self) -> None:
        del self._window[: self._num_settled]
        self._num_settled = len(self._window)
        self._num_emitted = len(self._decode(self._window))
