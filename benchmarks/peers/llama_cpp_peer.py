"""llama.cpp through llama-cpp-python.

Its C interface in a loop has the least Python around the library, so it is the hardest to beat; several sequences at a
time go through the same. Beside that the package's own ``Llama.generate``, which its users call, plain and with
``LlamaPromptLookupDecoding``.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.gguf_file import write_gguf
from benchmarks.peers.interface import (
    Complete,
    Completion,
    Peer,
    PeerModel,
    Prompt,
    one_by_one,
    require,
)
from benchmarks.peers.llama_context import PACKAGE, LlamaContext, library
from benchmarks.peers.quantised_gguf import quantise
from benchmarks.peers.transformers_peer import LOOKUP_TOKENS

THE_FILE = "llama.cpp, the file"
"""The table's name of a target that is a GGUF file, as llama.cpp runs it."""


def gguf_of(model: PeerModel, kind: str) -> Path:
    """The model's GGUF in ``kind``; written when it is asked for the first time. Raises ``MissingPeerError``."""
    # bfloat16 is what the comparison is about; a run in float32 asks for the same digits as the others have.
    library()
    floats = "F32" if model.dtype == torch.float32 else "BF16"
    plain = write_gguf(model.plain, model.work / f"{floats.lower()}.gguf", floats)
    if kind == "BF16":
        return plain
    return quantise(plain, model.work / f"{kind.lower()}.gguf", kind, model.threads)


def _load(model: PeerModel, kind: str, **options: Any) -> Any:
    return library().Llama(
        str(gguf_of(model, kind)),
        n_ctx=model.max_length,
        n_threads=model.threads,
        n_threads_batch=model.threads,
        verbose=False,
        **options,
    )


def _c_interface(model: PeerModel, path: Path, sequences: int = 1) -> Complete:
    """``sequences`` prompts at a time, a token of each in every pass.

    That is what its server does with as many slots that are all busy, without HTTP and scheduling.
    """
    llama = LlamaContext(path, threads=model.threads, max_length=model.max_length, sequences=sequences)

    def run(prompts: Sequence[Prompt], max_tokens: int) -> list[Completion]:
        llama.forget()
        lengths = [len(prompt.token_ids) for prompt in prompts]
        latest = llama.read([prompt.token_ids for prompt in prompts])
        texts = [[token] for token in latest]
        for done in range(max_tokens - 1):
            latest = llama.step(latest, [length + done for length in lengths])
            for text, token in zip(texts, latest, strict=True):
                text.append(token)
        return [Completion(text, max_tokens - 1, max_tokens - 1) for text in texts]

    return run


def _generate(model: PeerModel, kind: str, *, lookup: bool) -> Complete:
    options: dict[str, Any] = {}
    if lookup:
        speculative = require("llama_cpp.llama_speculative", PACKAGE)
        options["draft_model"] = speculative.LlamaPromptLookupDecoding(
            max_ngram_size=3, num_pred_tokens=LOOKUP_TOKENS
        )
    llama = _load(model, kind, **options)
    evaluate = llama.eval
    passes = [0]

    def counted(tokens: Any) -> None:
        passes[0] += 1
        evaluate(tokens)

    llama.eval = counted

    def complete(prompt: list[int], max_tokens: int) -> Completion:
        llama.reset()  # or a prompt that was seen before would not be read again
        passes[0] = 0
        tokens = list(
            itertools.islice(llama.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0), max_tokens)
        )
        return Completion(tokens, passes[0] - 1, max_tokens - 1)

    return one_by_one(complete)


def _lookup(kind: str) -> Peer:
    return Peer(
        f"llama-cpp-python {kind.lower()} prompt lookup", lambda model: _generate(model, kind, lookup=True)
    )


def at_once(name: str, sequences: int) -> str:
    """The table's name of a row with several sequences at a time."""
    return name if sequences == 1 else f"{name} x{sequences}"


def file_peer(path: Path, sequences: int = 1) -> Peer:
    """A GGUF file as it is."""
    return Peer(at_once(THE_FILE, sequences), lambda model: _c_interface(model, path, sequences), sequences)


def plain_peer(kind: str, sequences: int = 1) -> Peer:
    """Plain decoding in one kind."""
    return Peer(
        at_once(f"llama.cpp {kind.lower()}", sequences),
        lambda model: _c_interface(model, gguf_of(model, kind), sequences),
        sequences,
    )


PEERS = (
    plain_peer("BF16"),
    plain_peer("Q8_0"),
    Peer("llama-cpp-python bf16", lambda model: _generate(model, "BF16", lookup=False)),
    _lookup("BF16"),
    _lookup("Q8_0"),
)
QUANTISED_PEERS = (
    plain_peer("BF16"),
    plain_peer("Q8_0"),
    plain_peer("Q4_0"),
    plain_peer("Q4_K_M"),
    _lookup("Q8_0"),
    _lookup("Q4_0"),
)
