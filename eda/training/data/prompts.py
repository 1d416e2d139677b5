"""Prompts for regeneration, from JSON lines, and how a chat is written as token ids."""

import gzip
import random
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self, cast

from eda.errors import DataError
from eda.formats.chat_template import ChatTemplateError, Render
from eda.formats.chat_template import render as render_without_limits
from eda.formats.json_files import MAX_LINE_BYTES, json_lines, open_regular, parse_json
from eda.formats.tokenizer import TextTokenizer
from eda.training.progress import ShouldStop, StageStoppedError, never_stop

if TYPE_CHECKING:  # it imports torch, and a file of prompts is checked without
    from eda.models.fine_tune import FineTune

Message = Mapping[str, str]

_SECONDS_BETWEEN_QUESTIONS = 0.2
MAX_TEXT_BYTES = 4 << 30
"""Of a file of prompts or texts after unpacking: a small gzip file can hold any number of them."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation to be answered.

    Attributes:
        id: from the file, or ``line-<n>``; unique within a list.
        messages: ``{"role", "content"}`` in order, the last one not the assistant's.
        response: an answer that the file brought along; only the "public responses" control trains on it.
        token_ids: the conversation as the model got it, where that is known; ``messages`` are not encoded then.
    """

    id: str
    messages: tuple[Message, ...]
    response: str | None = None
    token_ids: tuple[int, ...] | None = None


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
        with _opened(path) as stream:
            for number, line in json_lines(stream, max_bytes=MAX_TEXT_BYTES):
                try:
                    row = parse_json(line, max_bytes=MAX_LINE_BYTES)
                except ValueError as error:
                    raise DataError(f"{path}, line {number} is not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise DataError(
                        f"{path}, line {number} holds a JSON {type(row).__name__}; an object was expected"
                    )
                yield number, row
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with open_regular(path) as stream:
        if path.suffix != ".gz":
            yield stream
            return
        with gzip.GzipFile(fileobj=stream) as text:
            yield cast(BinaryIO, text)


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

    Args:
        eos_ids: tokens that end an answer, beside those of the tokenizer.
        render: runs the chat template; where a stranger may have written it, one with limits.
    """

    def __init__(
        self, tokenizer: TextTokenizer, eos_ids: Iterable[int] = (), render: Render = render_without_limits
    ) -> None:
        self.tokenizer = tokenizer
        self.eos_ids = frozenset(eos_ids) | tokenizer.eos_ids
        """Tokens that end an answer."""
        self.render = render

    @classmethod
    def load(
        cls, directory: Path, *, eos_ids: Iterable[int] = (), render: Render = render_without_limits
    ) -> Self:
        """The format of a model directory. Raises ``CheckpointError`` when it holds no usable tokenizer."""
        from eda.formats.tokenizer_files import load_tokenizer  # it imports transformers

        return cls(load_tokenizer(directory), eos_ids, render)

    @classmethod
    def of_fine_tune(
        cls, fine_tune: "FineTune", base_directory: Path, *, render: Render = render_without_limits
    ) -> Self:
        """The format that ``fine_tune`` is served with: its own where it brings one, else the base's."""
        from eda.formats.tokenizer_files import load_tokenizer

        tokenizer = fine_tune.tokenizer or load_tokenizer(base_directory)
        return cls(tokenizer, fine_tune.model.config.eos_token_ids, render)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation up to where the assistant's answer begins. Raises ``ChatTemplateError``."""
        return self.text_ids(self._render(messages))

    def response_ids(self, text: str) -> list[int]:
        """Token ids of an answer, closed with the end-of-turn token."""
        end = self.tokenizer.eos_id
        return [*self.text_ids(text), *([] if end is None else [end])]

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def user_prefix_ids(self) -> list[int]:
        """Token ids of the template up to where the user's first message begins. Raises ``ChatTemplateError``."""
        mark = "\u2063here\u2063"
        before, found, _ = self._render([{"role": "user", "content": mark}]).partition(mark)
        if not found:
            raise ChatTemplateError("the chat template does not write a user's message as it is")
        ids = self.text_ids(before)
        if ids:
            return ids
        start = self.tokenizer.bos_id
        return [start] if start is not None else self.text_ids("\n")

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self.tokenizer.decode(token_ids)

    def _render(self, messages: Sequence[Message]) -> str:
        template = self.tokenizer.chat_template
        if template is None:
            return "".join(message["content"] + "\n" for message in messages)
        return self.render(template, messages)


def encode_prompts(
    prompts: Sequence[Prompt], chat: ChatFormat, should_stop: ShouldStop = never_stop
) -> list[tuple[Prompt, list[int]]]:
    """Each prompt with its token ids.

    Raises ``DataError`` with the id of a prompt that the chat template refuses, ``StageStoppedError`` when
    ``should_stop`` says so: a template may take its time.
    """
    encoded: list[tuple[Prompt, list[int]]] = []
    last_asked = time.monotonic()
    for prompt in prompts:
        if time.monotonic() - last_asked > _SECONDS_BETWEEN_QUESTIONS:
            last_asked = time.monotonic()
            if should_stop():
                raise StageStoppedError(
                    f"stopped after {len(encoded)} of {len(prompts)} prompts were encoded"
                )
        try:
            ids = chat.prompt_ids(prompt.messages) if prompt.token_ids is None else list(prompt.token_ids)
        except ChatTemplateError as error:
            raise DataError(f"prompt {prompt.id!r}: {error}") from error
        encoded.append((prompt, ids))
    return encoded
