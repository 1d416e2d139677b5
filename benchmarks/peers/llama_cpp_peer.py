"""llama.cpp through llama-cpp-python.

Three ways to drive it: its C interface in a loop (the least Python around the library, so the hardest to beat), the
package's own ``Llama.generate``, which its users call, and that with ``LlamaPromptLookupDecoding``.
"""

import ctypes
import itertools
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.gguf_file import write_gguf
from benchmarks.peers.interface import Complete, Completion, Peer, PeerModel, one_by_one, require
from benchmarks.peers.transformers_peer import LOOKUP_TOKENS

PACKAGE = "llama-cpp-python"


def _gguf(model: PeerModel, kind: str) -> Path:
    # bfloat16 is what the comparison is about; a run in float32 asks for the same digits as the others have.
    if kind == "BF16" and model.dtype == torch.float32:
        kind = "F32"
    return write_gguf(model.plain, model.work / f"{kind.lower()}.gguf", kind)


def _load(llama_cpp: Any, model: PeerModel, kind: str, **options: Any) -> Any:
    return llama_cpp.Llama(
        str(_gguf(model, kind)),
        n_ctx=model.max_length,
        n_threads=model.threads,
        n_threads_batch=model.threads,
        verbose=False,
        **options,
    )


def _c_interface(model: PeerModel, kind: str) -> Complete:
    llama_cpp = require("llama_cpp", PACKAGE)
    llama = _load(llama_cpp, model, kind)
    context = llama.ctx
    sampler = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    llama_cpp.llama_sampler_chain_add(sampler, llama_cpp.llama_sampler_init_greedy())

    def decode(tokens: list[int]) -> int:
        values = (ctypes.c_int32 * len(tokens))(*tokens)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(values, len(tokens))):
            raise RuntimeError("llama_decode failed")
        return int(llama_cpp.llama_sampler_sample(sampler, context, -1))

    def complete(prompt: list[int], max_tokens: int) -> Completion:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        size = llama.n_batch
        for start in range(0, len(prompt), size):
            token = decode(prompt[start : start + size])
        tokens = [token]
        while len(tokens) < max_tokens:
            tokens.append(decode(tokens[-1:]))
        return Completion(tokens, max_tokens - 1, max_tokens - 1)

    return one_by_one(complete)


def _generate(model: PeerModel, kind: str, *, lookup: bool) -> Complete:
    llama_cpp = require("llama_cpp", PACKAGE)
    options: dict[str, Any] = {}
    if lookup:
        speculative = require("llama_cpp.llama_speculative", PACKAGE)
        options["draft_model"] = speculative.LlamaPromptLookupDecoding(
            max_ngram_size=3, num_pred_tokens=LOOKUP_TOKENS
        )
    llama = _load(llama_cpp, model, kind, **options)
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


def _bfloat16(model: PeerModel) -> Complete:
    return _c_interface(model, "BF16")


def _q8(model: PeerModel) -> Complete:
    return _c_interface(model, "Q8_0")


def _bfloat16_generate(model: PeerModel) -> Complete:
    return _generate(model, "BF16", lookup=False)


def _bfloat16_lookup(model: PeerModel) -> Complete:
    return _generate(model, "BF16", lookup=True)


def _q8_lookup(model: PeerModel) -> Complete:
    return _generate(model, "Q8_0", lookup=True)


PEERS = (
    Peer("llama.cpp bf16", _bfloat16),
    Peer("llama.cpp q8_0", _q8),
    Peer("llama-cpp-python bf16", _bfloat16_generate),
    Peer("llama-cpp-python bf16 prompt lookup", _bfloat16_lookup),
    Peer("llama-cpp-python q8_0 prompt lookup", _q8_lookup),
)
