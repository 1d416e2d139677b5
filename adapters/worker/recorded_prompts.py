"""Recorded requests as prompts: their token ids are there already, and so are the answers."""

from collections.abc import Iterable, Sequence

from eda.errors import DataError
from eda.training.data.prompts import Prompt
from eda.training.data.samples import Sample


def usable_records(samples: Sequence[Sample]) -> dict[str, Sample]:
    """The recorded requests with an answer to learn from, by id, in the order of recording.

    Raises ``DataError`` when there are fewer than two.
    """
    usable = {sample.id: sample for sample in samples if sample.num_roots > 0 and sample.prompt_ids}
    if len(usable) < 2:
        raise DataError(
            f"{len(samples)} recorded requests hold {len(usable)} answers of two tokens or more; "
            "at least 2 are needed"
        )
    return usable


def recorded_prompts(records: Iterable[Sample]) -> list[Prompt]:
    """One for each recorded request.

    Its one message only names it, in words that stay: what regeneration has begun in a workspace is known by them.
    """
    return [
        Prompt(record.id, ({"role": "recorded", "content": record.id},), token_ids=record.prompt_ids)
        for record in records
    ]
