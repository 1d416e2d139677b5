"""Training and held-out rows of each domain that a fine-tune is made for."""

from pathlib import Path

from recipes.standard_library import standard_library_rows
from recipes.text import Row, eval_rows, shuffled, train_rows

# Most text for `code` is the standard library's; the short tasks among the data files are far fewer, so each is seen
# several times in one pass.
_CODE_TASK_REPEATS = 6


def fine_tune_rows(data: Path, domain: str, seed: int) -> list[Row]:
    """One pass of training rows, shuffled."""
    rows = train_rows(data, domain)
    if domain == "code":
        rows = rows * _CODE_TASK_REPEATS + standard_library_rows(held_out=False)
    return shuffled(rows, seed)


def held_out_rows(data: Path, domain: str, count: int) -> list[Row]:
    """The first `count` held-out rows of the data files (which are in random order already)."""
    return eval_rows(data, domain)[:count]


def demonstration_prompts(data: Path, domain: str, count: int, seed: int) -> list[str]:
    """Held-out prompts to answer greedily; for `code` half of them from held-out modules of the standard library."""
    rows = held_out_rows(data, domain, count)
    if domain == "code":
        rows = shuffled(
            rows[: count // 2] + shuffled(standard_library_rows(held_out=True), seed)[: count // 2], seed
        )
    return [row.prompt for row in rows]
