"""Text to token ids and back."""

import re
from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer

from eda.formats.chat_template import ChatTemplate, ChatTemplateError, Message, render

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes as: printable ones are themselves, the rest 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class TextTokenizer:
    """A model's tokenizer, its special tokens and its chat template.

    Safe to use from several threads: nothing is changed after construction.

    Args:
        backend: encodes and decodes. It is changed: truncation and padding are turned off.
        special_tokens: by name ("eos_token"), as chat templates see them.
        template: source of the chat template; ``None`` where there is none.
        prefix: ids that go before a text that is encoded with special tokens; ``None`` leaves that to the backend.
        suffix: ids that go behind it.
        end_ids: further tokens that end an answer, beside the "eos_token".
    """

    def __init__(
        self,
        backend: Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        template: str | None = None,
        prefix: Sequence[int] | None = None,
        suffix: Sequence[int] = (),
        end_ids: Sequence[int] = (),
    ) -> None:
        self.backend = backend
        # Truncation set in the file would cut long prompts silently.
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = (
            None if template is None else ChatTemplate(template, tuple(sorted(self.special_tokens.items())))
        )
        self.prefix, self.suffix = None if prefix is None else list(prefix), list(suffix)
        self._is_byte_level = "ByteLevel" in str(backend.decoder)
        self.joined_ids: frozenset[int] = frozenset()
        """Tokens of single bytes whose run is decoded as one."""
        if "ByteFallback" in str(backend.decoder):
            vocabulary = backend.get_vocab(with_added_tokens=False)
            self.joined_ids = frozenset(
                i for token, i in vocabulary.items() if _BYTE_FALLBACK.fullmatch(token)
            )
        self.special_texts: dict[int, str] = {
            token_id: token.content
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        self.special_ids = frozenset(self.special_texts)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.longest_token = max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        self.eos_ids = frozenset(end_ids) | (frozenset() if self.eos_id is None else {self.eos_id})
        """Tokens that end an answer."""

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        token_id: int | None = None if token is None else self.backend.token_to_id(token)
        return token_id

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    def require_chat_template(self) -> ChatTemplate:
        """Raises ``ChatTemplateError`` when there is none."""
        if self.chat_template is None:
            raise ChatTemplateError("the model has no chat template; use /v1/completions")
        return self.chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        own = add_special_tokens and self.prefix is not None
        # As a batch: encode() holds the interpreter's lock, so that a long text would stop all other threads.
        [encoding] = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens and not own)
        ids: list[int] = encoding.ids
        return [*(self.prefix or ()), *ids, *self.suffix] if own else ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """All ids to text, special tokens left out; ids outside the vocabulary have no text."""
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=True)
        return text

    def render_chat(self, messages: Sequence[Message]) -> str:
        """Messages to the text of a prompt that asks for the assistant's turn, without limits on the template.

        Raises ``ChatTemplateError``.
        """
        return render(self.require_chat_template(), messages)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; a token may hold a part of a character only."""
        if token_id in self.special_texts:
            return self.special_texts[token_id].encode()
        token: str | None = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level and all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        fallback = _BYTE_FALLBACK.fullmatch(token)
        if fallback:
            return bytes([int(fallback[1], 16)])
        return token.replace("\u2581", " ").encode()

    def token_text(self, token_id: int) -> str:
        """A token by itself, as log-probabilities show it; incomplete characters are written as ``bytes:\\xe4``."""
        content = self.token_bytes(token_id)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
