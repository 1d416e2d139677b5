"""llama.cpp through its C interface: one model and one context, with the least Python around them."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.machine import cpu_flags
from benchmarks.peers.interface import require

PACKAGE = "llama-cpp-python"
# Names of features: those that llama.cpp was built with, and what /proc/cpuinfo calls them.
_FEATURES = {
    "AVX2": "avx2",
    "FMA": "fma",
    "F16C": "f16c",
    "AVX_VNNI": "avx_vnni",
    "AVX512": "avx512f",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AMX_INT8": "amx_int8",
    "DOTPROD": "asimddp",
    "MATMUL_INT8": "i8mm",
}


@cache
def library() -> ModuleType:
    """The installed package, made silent. Raises ``MissingPeerError``."""
    module = require("llama_cpp", PACKAGE)
    # The callback has to live as long as the library may call it.
    module.silent_log = module.llama_log_callback(lambda *_: None)
    module.llama_log_set(module.silent_log, None)
    module.llama_backend_init()
    return module


def system_info() -> str:
    """What the installed llama.cpp was built for. Raises ``MissingPeerError``."""
    return str(library().llama_print_system_info().decode())


def missing_features(info: str, flags: frozenset[str]) -> list[str]:
    """What a processor with ``flags`` has and the build that gave ``info`` does not use, by llama.cpp's names."""
    built = {
        part.split("=")[0].split(":")[-1].strip() for part in info.split("|") if part.strip().endswith("= 1")
    }
    return [name for name, flag in _FEATURES.items() if flag in flags and name not in built]


def build_report() -> dict[str, Any]:
    """The build's features, and those of this machine that it leaves unused. Raises ``MissingPeerError``."""
    info = system_info()
    return {
        "package": f"{PACKAGE} {library().__version__}",
        "system_info": info,
        "unused": missing_features(info, cpu_flags()),
    }


class LlamaContext:
    """A GGUF file with room for ``sequences`` sequences of ``max_length`` tokens each.

    llama.cpp's own defaults hold for all else: flash attention where it sees fit, repacked weights, a 16-bit cache.

    Raises:
        MissingPeerError: the package is not installed.
        RuntimeError: the file cannot be loaded.
    """

    def __init__(self, path: Path, *, threads: int, max_length: int, sequences: int = 1) -> None:
        self._lib = library()
        self._model = self._lib.llama_model_load_from_file(
            str(path).encode(), self._lib.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        options = self._lib.llama_context_default_params()
        options.n_ctx = max_length * sequences
        options.n_batch = max(512, sequences)
        options.n_seq_max = sequences
        options.n_threads = options.n_threads_batch = threads
        self._context = self._lib.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no context of {max_length * sequences} tokens for {path}")
        self.max_batch = int(options.n_batch)
        self._batch = self._lib.llama_batch_init(self.max_batch, 0, 1)
        self.vocab_size = int(self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model)))
        self.num_bytes = int(self._lib.llama_model_size(self._model))

    def prepare(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        wanted: Sequence[bool],
    ) -> None:
        """Fills the batch that ``run`` decodes: at most ``max_batch`` tokens, some of which logits are wanted on."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for place, (token, position, sequence, want) in enumerate(
            zip(tokens, positions, sequences, wanted, strict=True)
        ):
            batch.token[place], batch.pos[place], batch.logits[place] = token, position, want
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence

    def run(self) -> None:
        """Decodes the prepared batch. Raises ``RuntimeError``."""
        status = self._lib.llama_decode(self._context, self._batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        self._lib.llama_synchronize(self._context)

    def logits(self, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Float32 ``[count, vocab_size]``: of the wanted tokens in order; a view that the next ``run`` overwrites."""
        pointer = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, (count, self.vocab_size))

    def read(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Reads prompts as the first tokens of sequences 0, 1, ...; gives their likeliest successors."""
        flat = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        found: list[int] = []
        for start in range(0, len(flat), self.max_batch):
            tokens, positions, sequences, wanted = zip(*flat[start : start + self.max_batch], strict=True)
            self.prepare(tokens, positions, sequences, wanted)
            self.run()
            found += self._likeliest(sum(wanted))
        return found

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> list[int]:
        """One token of each sequence; gives their likeliest successors."""
        self.prepare(tokens, positions, range(len(tokens)), [True] * len(tokens))
        self.run()
        return self._likeliest(len(tokens))

    def _likeliest(self, count: int) -> list[int]:
        return [int(token) for token in self.logits(count).argmax(axis=1)] if count else []

    def forget(self, position: int = 0) -> None:
        """Drops what lies at ``position`` and behind it in every sequence."""
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), -1, position, -1)

    def close(self) -> None:
        """Gives the memory back."""
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)
