"""Chat templates: which one a directory brings, and messages to the text of a prompt.

A template is Jinja code that came with somebody's model. ``CompiledTemplate`` runs it in a sandbox, which keeps it from
files and objects but not from looping for ever: where a stranger may have written it,
``eda.adapters.templates.renderer`` runs it in a process with limits. This module is imported there, so it needs neither
torch nor transformers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from eda.errors import CheckpointError, DataError

Message = Mapping[str, Any]
"""``role`` and ``content``; content is a text or a list of ``{"type": "text", "text": ...}``."""

TEMPLATE_FILE = "chat_template.jinja"
MAX_SOURCE_CHARS = 1 << 20
_PROBE = "qzxprobe"
"""What a template is tried with; no template writes it by itself. Plain letters: templates trim and fold."""


class ChatTemplateError(DataError):
    """There is no chat template, it cannot be used, or it refuses these messages."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template's source and the special tokens that it may name, as pairs (``("bos_token", "<s>")``)."""

    source: str
    special_tokens: tuple[tuple[str, str], ...] = ()


Render = Callable[[ChatTemplate, Sequence[Message]], str]
"""How messages become text: ``render`` here, or a renderer with limits."""


@dataclass(frozen=True, slots=True)
class ContentForms:
    """Which forms of a message's content a template writes out."""

    text: bool
    parts: bool


class CompiledTemplate:
    """A template that is ready to render.

    Templates are written for content as a text or for content as a list of parts; one that gets the other form often
    writes nothing, without an error. So each role is tried with both forms, and content that came in the form that
    the template does not write is converted.

    Raises ``ChatTemplateError`` for a template that is no Jinja, or that leaves out what users say in either form.
    """

    def __init__(self, template: ChatTemplate) -> None:
        if len(template.source) > MAX_SOURCE_CHARS:
            raise ChatTemplateError(
                f"the chat template has {len(template.source)} characters; at most {MAX_SOURCE_CHARS} are taken"
            )
        self._special_tokens = dict(template.special_tokens)
        try:
            self._template = _environment().from_string(template.source)
        except MemoryError:
            raise
        except Exception as error:  # the compiler of Jinja and that of Python both raise
            raise ChatTemplateError(
                f"the chat template cannot be compiled: {type(error).__name__}: {error}"
            ) from error
        self._forms: dict[str, ContentForms] = {}
        self._forms["user"] = self._find_forms("user", [], [])
        hello = {"role": "user", "content": "hello"}
        self._forms["system"] = self._find_forms("system", [], [hello])
        self._forms["assistant"] = self._find_forms("assistant", [hello], [hello])

    def forms(self, role: str) -> ContentForms:
        """What content of this role is written in; other roles are taken to be like the user's."""
        return self._forms.get(role, self._forms["user"])

    def render(self, messages: Sequence[Message], *, max_chars: int | None = None) -> str:
        """The text of a prompt that asks for the assistant's turn.

        Raises ``ChatTemplateError`` when the template refuses the messages or writes more than ``max_chars``.
        """
        converted = [self._converted(message) for message in messages]
        try:
            return self._write(converted, max_chars)
        except (MemoryError, ChatTemplateError):
            raise
        except Exception as error:  # templates raise what they like
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from error

    def _write(self, messages: Sequence[Message], max_chars: int | None) -> str:
        pieces: list[str] = []
        num_chars = 0
        for piece in self._template.generate(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
        ):
            num_chars += len(piece)
            if max_chars is not None and num_chars > max_chars:
                raise ChatTemplateError(
                    f"the chat template writes more than {max_chars} characters for these messages"
                )
            pieces.append(piece)
        return "".join(pieces)

    def _converted(self, message: Message) -> dict[str, Any]:
        content, forms = message["content"], self.forms(message["role"])
        if isinstance(content, str) and forms.parts and not forms.text:
            content = [{"type": "text", "text": content}]
        elif not isinstance(content, str) and not forms.parts:
            content = "".join(part["text"] for part in content)
        return {**message, "content": content}

    def _find_forms(self, role: str, before: list[Message], after: list[Message]) -> ContentForms:
        shown: list[bool | None] = []
        for content in (_PROBE, [{"type": "text", "text": _PROBE}]):
            messages = [*map(self._converted, before), {"role": role, "content": content}]
            messages += map(self._converted, after)
            try:
                text = self._write(messages, MAX_SOURCE_CHARS)
            except MemoryError:
                raise
            except Exception:
                shown.append(
                    None
                )  # a role or an order that the template does not take says nothing about forms
            else:
                shown.append(_PROBE in text.casefold() and not _shows_list(text))
        if role == "user" and shown == [False, False]:
            raise ChatTemplateError(
                "the chat template leaves out what users say, as a text and as a list of parts"
            )
        return ContentForms(text=bool(shown[0]), parts=bool(shown[1]))


def _shows_list(text: str) -> bool:
    """Whether a list of parts was written as code instead of its words."""
    folded = text.casefold()
    return any(f"{quote}text{quote}: {quote}{_PROBE}" in folded for quote in "'\"")


@lru_cache(maxsize=16)
def _compiled(template: ChatTemplate) -> CompiledTemplate:
    return CompiledTemplate(template)


def render(template: ChatTemplate, messages: Sequence[Message]) -> str:
    """Renders in this process, without limits: for templates of one's own. Raises ``ChatTemplateError``."""
    return _compiled(template).render(messages)


def template_source(directory: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The template that ``directory`` brings: ``chat_template.jinja``, else the one in ``tokenizer_config.json``.

    Of several in the configuration the one called "default" is taken. Raises ``CheckpointError``.
    """
    file = directory / TEMPLATE_FILE
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    stated = tokenizer_config.get("chat_template")
    if isinstance(stated, list):
        named = {entry.get("name"): entry.get("template") for entry in stated if isinstance(entry, dict)}
        stated = named.get("default")
    if stated is not None and not isinstance(stated, str):
        raise CheckpointError(
            f"{directory / 'tokenizer_config.json'} has a chat_template that is a JSON {type(stated).__name__}; "
            "a text was expected"
        )
    return stated


# --- the environment that templates are written for: that of transformers.utils.chat_template_utils ---


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant writes, for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(Namespace):
    """Without names that begin with an underscore, which lead to the insides of Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that ``namespace(self=...)`` works too
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not have the name {name!r}, which begins with an underscore")


class _Dict:
    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment
