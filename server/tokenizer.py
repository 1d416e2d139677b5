"""The tokenizer of the served family: text, chat messages and token ids."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eda.errors import CheckpointError
from server.engine.detokenizer import IncrementalDetokenizer

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


class ChatTemplateError(ValueError):
    """There is no chat template, or it refuses these messages."""


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes as: printable ones are themselves, the rest 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class TextTokenizer:
    """Text to ids and back. Safe to use from several threads: nothing is changed after construction.

    Args:
        tokenizer: a fast tokenizer of transformers; others have no incremental decoding that could be relied on.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise CheckpointError("the tokenizer has no tokenizer.json; only fast tokenizers are supported")
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # Truncation set in the file would cut long prompts silently.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._is_byte_level = "ByteLevel" in str(self._backend.decoder)
        self._joined_ids: frozenset[int] = frozenset()
        if "ByteFallback" in str(self._backend.decoder):
            vocabulary = self._backend.get_vocab(with_added_tokens=False)
            self._joined_ids = frozenset(
                i for token, i in vocabulary.items() if _BYTE_FALLBACK.fullmatch(token)
            )
        added = self._backend.get_added_tokens_decoder()
        self._special = {token_id: token.content for token_id, token in added.items() if token.special}
        self.special_ids = frozenset(self._special)
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self.longest_token = max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)
        eos = tokenizer.eos_token_id
        self.eos_ids = frozenset() if eos is None else frozenset({int(eos)})

    @classmethod
    def load(cls, directory: Path) -> "TextTokenizer":
        """Raises ``CheckpointError`` when the directory holds no usable tokenizer."""
        from transformers import AutoTokenizer  # as slow to import as torch

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise CheckpointError(f"{directory} holds no tokenizer that can be loaded: {error}") from error
        return cls(tokenizer)

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """All ids to text, special tokens left out; ids outside the vocabulary have no text."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=True)
        return text

    def detokenizer(self) -> IncrementalDetokenizer:
        """A fresh detokenizer for one output."""
        return IncrementalDetokenizer(self.decode, self.special_ids, self._joined_ids)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Messages to the text of a prompt that asks for the assistant's turn. Raises ``ChatTemplateError``."""
        if not self.has_chat_template:
            raise ChatTemplateError("the model has no chat template; use /v1/completions")
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise what they like
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from error
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; a token may hold a part of a character only."""
        if token_id in self._special:
            content: str = self._special[token_id]
            return content.encode()
        token: str | None = self._backend.id_to_token(token_id)
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
