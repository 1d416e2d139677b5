"""A tokenizer from a GGUF file's metadata.

transformers reads such files too, but leaves out the rules by which several vocabularies split text (those of SmolLM
among them) and says nothing. What is not known here is refused.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from eda.errors import CheckpointError, UnsupportedModelError
from eda.formats.gguf_file.config import TOKEN_TYPES, TOKENS
from eda.formats.gguf_file.header import GgufHeader
from eda.formats.tokenizer import TextTokenizer

_MODEL = "tokenizer.ggml.model"
_SPLITS = "tokenizer.ggml.pre"
_LONGEST_TOKEN = 1024  # characters
_SPACE = "\u2581"

# How text is split before merging, by the names that llama.cpp gives (src/llama-vocab.cpp). Each expression splits
# the pieces that the one before it left.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_EXPRESSIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"), (_GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        (r"\p{N}", _GPT2),
    ),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "dbrx", "smaug-bpe"),
        (_LLAMA3,),
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
# These take a whole piece that is a token as it is, whatever the merges say, and begin a text with BOS.
_WHOLE_PIECES = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "tekken"})


def read_tokenizer(path: Path) -> TextTokenizer:
    """The tokenizer of the GGUF file ``path`` with its special tokens and chat template.

    Raises:
        CheckpointError: no sound GGUF file, or its vocabulary is missing or contradicts itself.
        UnsupportedModelError: a kind of tokenizer that is not implemented.
    """
    header = GgufHeader.read(path)
    kind = header.string(_MODEL)
    tokens = _tokens(header)
    types = header.numbers(TOKEN_TYPES, len(tokens))
    if types is None:
        types = np.full(len(tokens), TokenType.NORMAL)
    try:
        if kind == "gpt2":
            backend = _byte_level(header, tokens)
        elif kind == "llama":
            backend = _sentencepiece(header, tokens, types)
        else:
            raise UnsupportedModelError(
                str(header.error(_MODEL, repr(kind), "supported are 'gpt2' (byte-level BPE) and 'llama'"))
            )
        _add_tokens(backend, tokens, types)
        ids = {name: _special_id(header, name, len(tokens)) for name in ("bos", "eos", "unknown")}
        backend.post_processor = _post_processor(header, kind, tokens, ids)
        named = {
            f"{short}_token": tokens[token_id]
            for short, token_id in zip(("bos", "eos", "unk"), ids.values(), strict=True)
            if token_id is not None
        }
        template = header.string("tokenizer.chat_template", "") or None
        return TextTokenizer(backend, special_tokens=named, template=template)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises plain exceptions for what it cannot use
        raise CheckpointError(f"{path} has a vocabulary that cannot be used: {error}") from error


def _tokens(header: GgufHeader) -> list[str]:
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(header.strings(TOKENS))]
    first: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if first.setdefault(token, index) != index:
            raise header.error(
                TOKENS, f"{token[:40]!r} at {first[token]} and {index}", "each token may be there once"
            )
        if len(token) > _LONGEST_TOKEN:
            raise header.error(
                TOKENS,
                f"a token of {len(token)} characters at {index}",
                f"at most {_LONGEST_TOKEN} are possible",
            )
    return tokens


def _byte_level(header: GgufHeader, tokens: Sequence[str]) -> Tokenizer:
    splits = header.string(_SPLITS, "default")
    if splits not in _EXPRESSIONS:
        raise UnsupportedModelError(
            str(header.error(_SPLITS, repr(splits), f"supported are {', '.join(_EXPRESSIONS)}"))
        )
    merges = [tuple(merge.split(" ")) for merge in header.strings("tokenizer.ggml.merges")]
    for index, merge in enumerate(merges):
        if len(merge) != 2:
            raise header.error(
                "tokenizer.ggml.merges",
                f"{' '.join(merge)[:40]!r} at {index}",
                "two tokens with a space are needed",
            )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=splits in _WHOLE_PIECES))
    if _EXPRESSIONS[splits] == (_QWEN2,):
        backend.normalizer = (
            normalizers.NFC()
        )  # no field of the format says so; these models were trained with it
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(each), behavior="isolated") for each in _EXPRESSIONS[splits]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(header: GgufHeader, tokens: Sequence[str], types: Any) -> Tokenizer:
    """BPE over characters, whose merges follow from the scores: the best-scored token that two neighbours make."""
    scores = header.numbers("tokenizer.ggml.scores", len(tokens))
    if scores is None:
        raise header.error("tokenizer.ggml.scores", "missing", "this kind of tokenizer merges by scores")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    normal = [index for index in range(len(tokens)) if types[index] == TokenType.NORMAL]
    ranked = sorted(normal, key=lambda index: (-float(scores[index]), index))
    pieces = {tokens[index] for index in normal}
    merges = []
    for index in ranked:
        token = tokens[index]
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        found = [pair for pair in halves if pair[0] in pieces and pair[1] in pieces]
        merges += sorted(found, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    unknown = _special_id(header, "unknown", len(tokens))
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    ends: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if header.boolean("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(_SPACE))
        ends.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(ends)
    return backend


def _add_tokens(backend: Tokenizer, tokens: Sequence[str], types: Any) -> None:
    """Tokens that are found in a text before it is split."""
    for kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
        is_special = kind is not TokenType.USER_DEFINED
        backend.add_tokens(
            [
                AddedToken(tokens[index], normalized=False, special=is_special)
                for index in np.flatnonzero(types == kind).tolist()
            ]
        )


def _special_id(header: GgufHeader, name: str, num_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    return header.integer(key, 0, num_tokens - 1) if key in header.fields else None


def _post_processor(header: GgufHeader, kind: str, tokens: Sequence[str], ids: dict[str, int | None]) -> Any:
    """Puts BOS before a text and EOS behind it, where the file or its kind of vocabulary asks for them."""
    begins = kind == "llama" or header.string(_SPLITS, "default") in _WHOLE_PIECES
    wanted = {
        "bos": header.boolean("tokenizer.ggml.add_bos_token", begins),
        "eos": header.boolean("tokenizer.ggml.add_eos_token", False),
    }
    used = {name: ids[name] for name in ("bos", "eos") if wanted[name]}
    for name, token_id in used.items():
        if token_id is None:
            raise header.error(
                f"tokenizer.ggml.{name}_token_id", "missing", f"tokenizer.ggml.add_{name}_token asks for it"
            )
    template = [*(["bos"] if "bos" in used else []), "$A", *(["eos"] if "eos" in used else [])]
    return processors.TemplateProcessing(
        single=" ".join(f"{part}:0" for part in template),
        pair=None,
        special_tokens=[
            {"id": name, "ids": [token_id], "tokens": [tokens[token_id]]}
            for name, token_id in used.items()
            if token_id is not None
        ],
    )
