"""Gumbel noise that depends on a request's seed and a token's position alone.

The argmax of logits plus Gumbel noise is a sample from their softmax. When the noise of each position is fixed by
the seed, the target's token is a function of (seed, position, target distribution): whatever was drafted, the text
is the same. A draft that uses the same noise agrees with the target about as often as is possible (Daliri, Musco,
Suresh 2024, "Coupling without Communication and Drafter-Invariant Speculative Decoding").
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@lru_cache(maxsize=128)
def gumbel_noise(seed: int, position: int, vocab_size: int) -> Tensor:
    """Standard Gumbel noise of each token at one position.

    Args:
        seed: taken modulo 2**64.
        position: absolute position of the token that the noise chooses, from 0 on.

    Returns:
        Float32 ``[vocab_size]`` on the CPU. Cached and shared: not to be written to. The draft and the target ask for
        the same positions within a step, so the cache halves the work.
    """
    # Counter-based generator: (seed, position) is the key, so that distinct positions have independent streams.
    key = np.array([seed % 2**64, position], dtype=np.uint64)
    uniforms = np.random.Generator(np.random.Philox(key=key)).random(vocab_size)
    # -log(-log1p(-u)): the large values, which decide the argmax, come from u near 0, where float32 is finest. The
    # bounds keep the logarithms finite; each cuts off a probability below 1e-7, the upper (important) one 1e-18.
    noise = torch.from_numpy(uniforms).to(torch.float32).clamp_(2.0**-60, 1.0 - 2.0**-24)
    return noise.neg_().log1p_().neg_().log_().neg_()
