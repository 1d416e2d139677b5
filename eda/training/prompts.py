"""Prompts for regeneration, from JSON lines, and how a chat is written as token ids."""

import gzip
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from eda.errors import CheckpointError, DataError

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation to be answered.

    Attributes:
        id: from the file, or ``line-<n>``; unique within a list.
        messages: ``{"role", "content"}`` in order, the last one not the assistant's.
        response: an answer that the file brought along; only the "public responses" control trains on it.
    """

    id: str
    messages: tuple[Message, ...]
    response: str | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """Reads JSON lines, plain or gzip: ``{"prompt": ...}`` or ``{"messages": [...]}``, both with an optional ``id``.

    Raises:
        DataError: the file is missing, unreadable, empty, or a line is malformed (its number is named).
    """
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, row in _rows(path):
        prompt = _parse(row, f"line-{number}", f"{path}, line {number}")
        if prompt.id in seen:
            raise DataError(f"{path}, line {number}: id {prompt.id!r} was used in line {seen[prompt.id]}")
        seen[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{path} holds no prompts; JSON lines with 'prompt' or 'messages' are expected")
    return prompts


def read_texts(path: Path) -> list[str]:
    """Reads JSON lines, plain or gzip, with a ``text`` each. Raises ``DataError`` like ``read_prompts``."""
    texts = []
    for number, row in _rows(path):
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{path}, line {number}: 'text' is missing or empty")
        texts.append(text)
    if not texts:
        raise DataError(f"{path} holds no texts; JSON lines with 'text' are expected")
    return texts


def prompts_from_strings(texts: Sequence[str]) -> list[Prompt]:
    """One prompt of the user's for each text."""
    return [
        Prompt(f"line-{number}", ({"role": "user", "content": text},))
        for number, text in enumerate(texts, start=1)
    ]


def split_held_out(
    prompts: Sequence[Prompt], num_held_out: int, *, seed: int, limit: int | None = None
) -> tuple[list[Prompt], list[Prompt]]:
    """Shuffles by ``seed`` and splits into prompts to train on (at most ``limit``) and to measure with.

    The held-out prompts are the first ones of the shuffled list, so they are the same for every ``limit``.

    Raises ``DataError`` when nothing would be left to train on.
    """
    shuffled = list(prompts)
    random.Random(seed).shuffle(shuffled)
    held_out, training = shuffled[:num_held_out], shuffled[num_held_out:]
    if not training:
        raise DataError(
            f"{len(shuffled)} prompts leave none to train on when {num_held_out} are held out; "
            f"at least {num_held_out + 1} are needed"
        )
    return training[:limit], held_out


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers (from 1) and objects; blank lines are passed over."""
    try:
        opened: Any = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}, line {number} is not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise DataError(
                        f"{path}, line {number} holds a JSON {type(row).__name__}; an object was expected"
                    )
                yield number, row
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _parse(row: dict[str, Any], default_id: str, place: str) -> Prompt:
    identity = row.get("id", default_id)
    if "messages" in row:
        messages, response = _messages(row["messages"], place)
    else:
        text = row.get("prompt")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{place}: neither 'messages' nor a non-empty string 'prompt' is there")
        messages, response = ({"role": "user", "content": text},), row.get("response")
    if response is not None and not isinstance(response, str):
        raise DataError(f"{place}: 'response' is a JSON {type(response).__name__}; a string was expected")
    return Prompt(str(identity), messages, response)


def _messages(value: Any, place: str) -> tuple[tuple[Message, ...], str | None]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: 'messages' must be a non-empty list")
    messages: list[Message] = []
    for message in value:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise DataError(f"{place}: each message needs the strings 'role' and 'content'")
        messages.append({"role": message["role"], "content": message["content"]})
    response = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    if not messages:
        raise DataError(f"{place}: 'messages' holds an answer but no prompt")
    return tuple(messages), response


class ChatFormat:
    """A tokenizer with its chat template.

    Without a template the messages' contents stand one per line, as a base model that never saw a chat expects.
    """

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        own = tokenizer.eos_token_id
        self.eos_ids = frozenset(eos_ids) | (frozenset() if own is None else {int(own)})
        """Tokens that end an answer."""

    @classmethod
    def load(cls, *directories: Path, eos_ids: Sequence[int] = ()) -> Self:
        """The tokenizer of the first of ``directories`` that has one (the fine-tune's, then the base's).

        Raises ``CheckpointError`` when none has.
        """
        from transformers import AutoTokenizer  # as slow to import as torch

        for directory in directories:
            if (directory / "tokenizer.json").exists() or (directory / "tokenizer_config.json").exists():
                try:
                    return cls(AutoTokenizer.from_pretrained(str(directory)), eos_ids)
                except Exception as error:  # tokenizers raise many types
                    raise CheckpointError(f"{directory} has an unusable tokenizer: {error}") from error
        names = ", ".join(map(str, directories))
        raise CheckpointError(f"no tokenizer (tokenizer.json) lies in {names}")

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation up to where the assistant's answer begins."""
        return self._encode(self._render(messages))

    def response_ids(self, text: str) -> list[int]:
        """Token ids of an answer, closed with the end-of-turn token."""
        end = self._tokenizer.eos_token_id
        return [*self._encode(text), *([] if end is None else [int(end)])]

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return self._encode(text)

    def user_prefix_ids(self) -> list[int]:
        """Token ids of the template up to where the user's first message begins."""
        mark = "\u2063here\u2063"
        text = self._render([{"role": "user", "content": mark}])
        ids = self._encode(text[: text.index(mark)])
        if ids:
            return ids
        start = self._tokenizer.bos_token_id
        return [int(start)] if start is not None else self._encode("\n")

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def _render(self, messages: Sequence[Message]) -> str:
        if self._tokenizer.chat_template is None:
            return "".join(message["content"] + "\n" for message in messages)
        text: str = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids
