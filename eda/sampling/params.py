"""What one request asks of the sampler."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Flag, auto

_SMALLEST_TEMPERATURE = 1e-5
"""Below this, dividing float32 logits could overflow, and the softmax is one-hot anyway: treated as greedy."""


def _refuse(name: str, value: object, expected: str) -> ValueError:
    return ValueError(f"{name} is {value!r}; it must be {expected}")


class SamplingDemand(Flag):
    """What a request asks of whatever chooses its tokens, beyond the likeliest of the raw logits.

    A fast path declares the flags that it covers, and takes a row where ``params.demand in COVERS``.
    """

    NOTHING = 0
    DRAWS = auto()
    """Tokens are drawn from a generator."""
    SEED = auto()
    """Tokens follow the noise of a seed."""
    TEMPERATURE = auto()
    CUTS = auto()
    """top-k, top-p or min-p."""
    PENALTIES = auto()
    BIAS = auto()
    MIN_TOKENS = auto()
    LOGPROBS = auto()


_RANDOM = SamplingDemand.DRAWS | SamplingDemand.SEED | SamplingDemand.TEMPERATURE | SamplingDemand.CUTS
"""Of no effect on greedy requests."""

DEMAND_OF_FIELD: Mapping[str, tuple[SamplingDemand, object]] = {
    "temperature": (SamplingDemand.TEMPERATURE, 1.0),
    "top_k": (SamplingDemand.CUTS, 0),
    "top_p": (SamplingDemand.CUTS, 1.0),
    "min_p": (SamplingDemand.CUTS, 0.0),
    "repetition_penalty": (SamplingDemand.PENALTIES, 1.0),
    "presence_penalty": (SamplingDemand.PENALTIES, 0.0),
    "frequency_penalty": (SamplingDemand.PENALTIES, 0.0),
    "logit_bias": (SamplingDemand.BIAS, {}),
    "min_tokens": (SamplingDemand.MIN_TOKENS, 0),
    "stop_ids": (SamplingDemand.NOTHING, ()),  # they act through min_tokens
    "seed": (SamplingDemand.SEED, None),
    "num_logprobs": (SamplingDemand.LOGPROBS, None),
}
"""What each field of ``SamplingParams`` demands, and the value with which it demands nothing."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling settings of one request. Checked on construction.

    Raises:
        ValueError: a field out of its range; the message names the field, its value and the range.
    """

    temperature: float = 1.0
    """0 (or anything below 1e-5) is greedy: the argmax of the logits after penalties, bias and ``min_tokens``."""
    top_k: int = 0
    """Keep the ``top_k`` likeliest tokens and those as likely as the last of them; 0 is off."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens that hold at least this mass; 1 is off."""
    min_p: float = 0.0
    """Keep tokens at least ``min_p`` times as likely as the likeliest; 0 is off."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output; 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that are in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time that it is in the output."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Added to the logits of these token ids; -inf bans a token. Ids outside the vocabulary have no effect."""
    min_tokens: int = 0
    """``stop_ids`` are impossible until this many tokens have been generated."""
    stop_ids: tuple[int, ...] = ()
    """EOS and other stop ids. Ids outside the vocabulary have no effect."""
    seed: int | None = None
    """Makes the text a function of the seed and the target's distribution alone."""
    num_logprobs: int | None = None
    """``None``: no log-probabilities; 0: of each emitted token; n: also of the n likeliest tokens."""
    demand: SamplingDemand = field(init=False, repr=False, compare=False)
    """What the fields above ask for together."""

    def __post_init__(self) -> None:
        # Copies, so that a caller's later change of its dict or list cannot reach a running request.
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        if not 0.0 <= self.temperature <= 1e4:
            raise _refuse("temperature", self.temperature, "between 0 (greedy) and 10000")
        if self.top_k < 0:
            raise _refuse("top_k", self.top_k, "0 (off) or a positive number of tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise _refuse("top_p", self.top_p, "above 0 and at most 1 (off)")
        if not 0.0 <= self.min_p <= 1.0:
            raise _refuse("min_p", self.min_p, "between 0 (off) and 1")
        if not 0.01 <= self.repetition_penalty <= 100.0:
            raise _refuse("repetition_penalty", self.repetition_penalty, "between 0.01 and 100; 1 is off")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not -100.0 <= value <= 100.0:
                raise _refuse(name, value, "between -100 and 100; 0 is off")
        for token_id, bias in self.logit_bias.items():
            if token_id < 0:
                raise _refuse(
                    "logit_bias", dict(self.logit_bias), f"keyed by token ids from 0 on, not {token_id}"
                )
            if math.isnan(bias) or bias > 1e6:
                raise _refuse(
                    f"logit_bias[{token_id}]", bias, "a number up to 1000000, or -inf to ban the token"
                )
        if self.min_tokens < 0:
            raise _refuse("min_tokens", self.min_tokens, "0 (off) or a positive number of tokens")
        if any(token_id < 0 for token_id in self.stop_ids):
            raise _refuse("stop_ids", self.stop_ids, "token ids from 0 on")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise _refuse("seed", self.seed, "a 64-bit integer, or None for no seed")
        if self.num_logprobs is not None and self.num_logprobs < 0:
            raise _refuse("num_logprobs", self.num_logprobs, "None (off), 0 or a positive number of tokens")
        object.__setattr__(self, "demand", self._demand())

    def _demand(self) -> SamplingDemand:
        demand = SamplingDemand.NOTHING if self.seed is not None else SamplingDemand.DRAWS
        for name, (flag, neutral) in DEMAND_OF_FIELD.items():
            if getattr(self, name) != neutral:
                demand |= flag
        return demand & ~_RANDOM if self.is_greedy else demand

    @property
    def is_greedy(self) -> bool:
        return self.temperature < _SMALLEST_TEMPERATURE

    @property
    def draws_freely(self) -> bool:
        """Whether tokens are drawn from a generator: neither greedy nor seeded."""
        return self.seed is None and not self.is_greedy

    @property
    def needs_history(self) -> bool:
        """Whether a penalty is on, so that logits depend on which tokens came before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def edits_logits(self) -> bool:
        """Whether penalties, bias or ``min_tokens`` can change the logits, greedy or not."""
        return self.needs_history or bool(self.logit_bias) or self.min_tokens > 0

    @property
    def reshapes_distribution(self) -> bool:
        """Whether temperature, top-k, top-p or min-p change the distribution that is sampled from."""
        return not self.is_greedy and (
            self.temperature != 1.0 or self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0
        )
