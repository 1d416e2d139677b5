"""Names of the scores that samples are chosen by; ``selection.py`` computes them."""

from typing import Literal, get_args

Score = Literal["deficit", "headroom", "mahalanobis", "cosine", "divergence", "flatness", "random"]
SCORES: tuple[Score, ...] = get_args(Score)
DEFAULT_SCORE: Score = "random"
