"""The tokenizer files of model directories: what a base has, and what a fine-tune brings of its own."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from eda.errors import CheckpointError, MismatchError
from eda.formats.chat_template import template_source
from eda.formats.checkpoint_files import is_gguf, read_json
from eda.formats.gguf_file.tokenizer import read_tokenizer
from eda.formats.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"
_OWN_FILES = (
    TOKENIZER_FILE,
    CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""What makes the text side of a model."""
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_RULES = ("normalizer", "pre_tokenizer", "model", "decoder")
"""The parts of ``tokenizer.json`` that say how text is cut and joined."""
_MAX_FILE_BYTES = 256 << 20
_PROBES = (
    "The quick brown fox, it's 12345.67 times   faster; isn't it?",
    " leading and trailing ",
    "line\n\n  next\tline\r\n",
    "Wörter, café, cafe\u0301, \ufb01ne, ÀÉ",
    "漢字かな交じり文 \U0001f642\U0001f469\u200d\U0001f4bb",
    "def f(x):\n    return x[0]['a'] != 0x1F  # _id",
    "'S 'LL 2nd A1B2 $9,999 \u00a0\u2009x",
)


def load_tokenizer(path: Path) -> TextTokenizer:
    """The tokenizer of a GGUF file or a model directory.

    In a directory text is cut into tokens by ``tokenizer.json`` alone; ``tokenizer_config.json`` says which tokens are
    special and whether a text begins with one. transformers, which rebuilds some tokenizers by the name of their class,
    is asked too, and where its tokens differ a warning says so.

    Raises ``CheckpointError`` when there is no usable tokenizer.
    """
    return read_tokenizer(path) if is_gguf(path) else _load(path, None)


def load_own_tokenizer(directory: Path, base_directory: Path, vocab_size: int) -> TextTokenizer | None:
    """The tokenizer of a fine-tune: what its directory brings, and the base's for what it does not.

    ``None`` when that is the base's own: it brings no files of this kind, or the same.

    Args:
        vocab_size: rows of the embedding, padding included.

    Raises:
        CheckpointError: files cannot be used, or name tokens that are not there.
        MismatchError: a token lies outside of the embedding, or text is cut by other rules than the base's.
    """
    brought = [name for name in _OWN_FILES if (directory / name).is_file()]
    own_ends, base_ends = set(_stated_end_ids(directory)), set(_stated_end_ids(base_directory))
    ends_alike = own_ends == base_ends or not (directory / GENERATION_FILE).is_file()
    if ends_alike and all(_same(directory / name, base_directory / name) for name in brought):
        return None
    if not (base_directory / TOKENIZER_FILE).is_file():
        logger.warning(
            "%s is not asked for tokens and chat template: %s has no tokenizer.json to compare with",
            directory,
            base_directory,
        )
        return None
    if TOKENIZER_FILE in brought:
        _require_same_rules(directory / TOKENIZER_FILE, base_directory / TOKENIZER_FILE)
    own = _load(directory, _load(base_directory, None))
    _require_inside(own, directory, vocab_size)
    return own


def _load(directory: Path, base: TextTokenizer | None) -> TextTokenizer:
    """What ``directory`` brings, over ``base`` where there is one."""
    config_file, file = directory / CONFIG_FILE, directory / TOKENIZER_FILE
    config = read_json(config_file) if config_file.is_file() else {}
    template = template_source(directory, config)
    if base is not None and not file.is_file():
        reference, backend = None, Tokenizer.from_str(base.backend.to_str())
    else:
        reference, problem = _reference(directory)
        backend = _read_backend(file) if file.is_file() else getattr(reference, "backend_tokenizer", None)
        if backend is None:
            raise CheckpointError(
                f"{directory} holds no tokenizer that can be loaded: tokenizer.json is needed ({problem})"
            )
        if reference is None and config:
            logger.warning("%s: transformers cannot load this tokenizer: %s", directory, problem)
    _add_stated_tokens(backend, config, directory)
    specials = _special_tokens(backend, config, reference, directory)
    _mark_special(backend, [*specials.values(), *_extra_special_tokens(config)])
    if reference is not None:
        _say_differences(backend, reference.backend_tokenizer, directory)
    prefix, suffix = _affixes(backend, backend if reference is None else reference.backend_tokenizer)
    if base is not None:
        specials = base.special_tokens | specials
        if template is None and base.chat_template is not None:
            template = base.chat_template.source
        if not file.is_file():
            prefix, suffix = base.prefix, base.suffix
    return TextTokenizer(
        backend,
        special_tokens=specials,
        template=template,
        prefix=prefix,
        suffix=suffix,
        end_ids=_stated_end_ids(directory),
    )


def _same(file: Path, other: Path) -> bool:
    return other.is_file() and file.read_bytes() == other.read_bytes()


def _read_backend(file: Path) -> Tokenizer:
    if file.stat().st_size > _MAX_FILE_BYTES:
        raise CheckpointError(
            f"{file} has {file.stat().st_size >> 20} MiB; tokenizers of at most {_MAX_FILE_BYTES >> 20} MiB are read"
        )
    try:
        return Tokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # Rust code that panics raises outside of Exception
        raise CheckpointError(f"{file} holds no tokenizer that can be loaded: {error}") from error


def _require_same_rules(file: Path, base_file: Path) -> None:
    """Added tokens may differ; how text is cut may not.

    Rules are patterns and replacements, and those of a stranger may take for ever on a text. A fine-tune has no use for
    others than its base's: its weights have learned from text that was cut like that.
    """
    own_patterns, base_patterns = _patterns(file), _patterns(base_file)
    if strange := sorted(own_patterns - base_patterns):  # they are not even compiled
        raise MismatchError(
            f"{file} cuts text by the pattern {strange[0][:80]!r}, which the base's does not have; without this file, "
            "the base's tokens are used"
        )
    own, base = (json.loads(_read_backend(path).to_str()) for path in (file, base_file))
    differing = [name for name in _RULES if own[name] != base[name]]
    if differing:
        raise MismatchError(
            f"{file} has another {' and '.join(differing)} than the base's; without this file, the base's tokens are "
            "used"
        )


def _patterns(file: Path) -> set[str]:
    """Regular expressions in a ``tokenizer.json``."""
    content = read_json(file)
    found, waiting = set[str](), [content.get(name) for name in _RULES if name != "model"]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if isinstance(value.get("Regex"), str):
                found.add(value["Regex"])
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return found


def _reference(directory: Path) -> tuple[Any, str]:
    """The tokenizer as transformers builds it, or ``None`` and why it does not."""
    from transformers import AutoTokenizer  # as slow to import as torch

    try:
        reference = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
    if not getattr(reference, "is_fast", False):
        return None, f"{type(reference).__name__} is no fast tokenizer"
    reference.backend_tokenizer.no_truncation()
    reference.backend_tokenizer.no_padding()
    return reference, ""


def _add_stated_tokens(backend: Tokenizer, config: Mapping[str, Any], directory: Path) -> None:
    """Tokens that stand beside ``tokenizer.json``, as older directories have them: they must get the stated ids."""
    stated: dict[int, AddedToken] = {}
    decoder = config.get("added_tokens_decoder")
    for key, value in (decoder if isinstance(decoder, dict) else {}).items():
        if isinstance(value, dict) and str(key).isdecimal() and isinstance(value.get("content"), str):
            flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
            stated[int(key)] = AddedToken(
                value["content"], **{flag: bool(value[flag]) for flag in flags if flag in value}
            )
    added = directory / "added_tokens.json"
    for content, token_id in (read_json(added) if added.is_file() else {}).items():
        if isinstance(token_id, int) and token_id not in stated:
            stated[token_id] = AddedToken(content, special=True, normalized=False)
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    for token_id, token in sorted(stated.items()):
        if repr(token) not in known:
            backend.add_tokens([token])
        found = backend.token_to_id(token.content)
        if found != token_id:
            raise CheckpointError(
                f"{directory} gives the token {token.content!r} the id {token_id}; with tokenizer.json it is {found}"
            )


def _special_tokens(
    backend: Tokenizer, config: Mapping[str, Any], reference: Any, directory: Path
) -> dict[str, str]:
    """What the files state, else what transformers takes for granted and the vocabulary has."""
    legacy = directory / "special_tokens_map.json"
    named = {**(read_json(legacy) if legacy.is_file() else {}), **config}
    found: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = named.get(name)
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str):
            if backend.token_to_id(token) is not None:
                found[name] = token
            elif name in ("bos_token", "eos_token"):
                raise CheckpointError(
                    f"{directory} names the {name} {token!r}, which tokenizer.json does not have"
                )
        elif name not in named and reference is not None:
            usual = reference.special_tokens_map.get(name)
            if usual is not None and backend.token_to_id(usual) is not None:
                found[name] = usual
    return found


def _extra_special_tokens(config: Mapping[str, Any]) -> list[str]:
    extra: list[Any] = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        value = config.get(name)
        extra += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    tokens = [entry.get("content") if isinstance(entry, dict) else entry for entry in extra]
    return [token for token in tokens if isinstance(token, str)]


def _mark_special(backend: Tokenizer, tokens: Sequence[str]) -> None:
    """Special tokens are found whole in a text and left out of an answer, also where the file has plain ones."""
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokens if token not in known]
    )


def _affixes(backend: Tokenizer, source: Tokenizer) -> tuple[list[int] | None, list[int]]:
    """The ids that ``source`` puts around a text with special tokens, where ``backend`` has the same tokens."""
    plain = source.encode("a", add_special_tokens=False).ids
    whole = source.encode("a", add_special_tokens=True).ids
    start = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), None)
    if start is None or not plain:
        return None, []
    prefix, suffix = whole[:start], whole[start + len(plain) :]
    if any(source.id_to_token(i) != backend.id_to_token(i) for i in (*prefix, *suffix)):
        return None, []
    return prefix, suffix


def _say_differences(backend: Tokenizer, other: Tokenizer, directory: Path) -> None:
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    for text in (*_PROBES, *(f"a {content} b" for content in added[:64])):
        ours = backend.encode(text, add_special_tokens=False).ids
        theirs = other.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            logger.warning(
                "%s: transformers' AutoTokenizer does not follow tokenizer.json: it gives %r as %s, the file gives %s. "
                "The file's tokens are served",
                directory,
                text,
                theirs[:16],
                ours[:16],
            )
            return


def _stated_end_ids(directory: Path) -> list[int]:
    """``eos_token_id`` of ``generation_config.json``: an id or a list of them."""
    file = directory / GENERATION_FILE
    stated = read_json(file).get("eos_token_id") if file.is_file() else None
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    wrong = [value for value in ids if not isinstance(value, int) or isinstance(value, bool) or value < 0]
    if wrong:
        raise CheckpointError(
            f"{file} has the eos_token_id {wrong[0]!r}; a token id, or a list of them, is needed"
        )
    return ids


def _require_inside(tokenizer: TextTokenizer, directory: Path, vocab_size: int) -> None:
    outside = [
        f"{token.content!r} ({token_id})"
        for token_id, token in sorted(tokenizer.backend.get_added_tokens_decoder().items())
        if token_id >= vocab_size
    ]
    outside += [
        f"the end token {token_id}" for token_id in sorted(tokenizer.eos_ids) if token_id >= vocab_size
    ]
    if outside:
        raise MismatchError(
            f"{directory} adds tokens that the base has no room for: {', '.join(outside[:4])}; its embedding ends at "
            f"{vocab_size - 1}"
        )
