"""CTranslate2. On CPUs it computes in float32 or with int8 weights; it has no bfloat16 there and no speculation."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.peers.interface import (
    Complete,
    Completion,
    MissingPeerError,
    Peer,
    PeerModel,
    first_line,
    one_by_one,
    require,
)


def _convert(ctranslate2: Any, model: PeerModel, compute_type: str) -> Path:
    destination = model.work / f"ctranslate2-{compute_type}"
    if (destination / "model.bin").exists():
        return destination
    unfinished = destination.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    converter = ctranslate2.converters.TransformersConverter(str(model.plain))
    try:
        converter.convert(str(unfinished), quantization=None if compute_type == "float32" else compute_type)
    except Exception as error:
        raise MissingPeerError(f"CTranslate2 cannot convert this model: {first_line(error)}") from error
    _name_missing_tokens(unfinished / "config.json")
    unfinished.rename(destination)
    return destination


def _name_missing_tokens(path: Path) -> None:
    """The converter writes ``null`` for a tokenizer's missing begin token, which the library then cannot read."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("bos_token", "eos_token"):
        if config.get(name) is None:
            config[name] = config.get("eos_token") or ""
    path.write_text(json.dumps(config), encoding="utf-8")


def _build(model: PeerModel, compute_type: str) -> Complete:
    ctranslate2 = require("ctranslate2", "ctranslate2")
    path = _convert(ctranslate2, model, compute_type)
    generator = ctranslate2.Generator(
        str(path), device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=model.threads
    )
    tokenizer = AutoTokenizer.from_pretrained(model.plain)
    # Every call needs an end token, and min_length forbids it. Padding is never generated, so nothing is lost by that.
    never = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else len(tokenizer) - 1

    def complete(prompt: list[int], max_tokens: int) -> Completion:
        [result] = generator.generate_batch(
            [tokenizer.convert_ids_to_tokens(prompt)],
            max_length=max_tokens,
            min_length=max_tokens,
            sampling_topk=1,
            beam_size=1,
            include_prompt_in_result=False,
            end_token=[never],
        )
        return Completion(list(result.sequences_ids[0]), max_tokens - 1, max_tokens - 1)

    return one_by_one(complete)


def _float32(model: PeerModel) -> Complete:
    return _build(model, "float32")


def _int8(model: PeerModel) -> Complete:
    return _build(model, "int8")


PEERS = (Peer("CTranslate2 float32", _float32), Peer("CTranslate2 int8", _int8))
