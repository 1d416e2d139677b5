"""Recorded requests as prompts."""

import pytest

from eda.adapters.worker.recorded_prompts import recorded_prompts, usable_records
from eda.errors import DataError
from eda.training.data.samples import Sample

SAMPLES = [
    Sample("good", (1, 2), (3, 4)),
    Sample("one token", (1, 2), (3,)),
    Sample("no prompt", (), (3, 4, 5)),
    Sample("also good", (6,), (7, 8, 9)),
]


def test_only_requests_with_a_prompt_and_two_tokens_are_learned_from() -> None:
    assert list(usable_records(SAMPLES).values()) == [SAMPLES[0], SAMPLES[3]]
    with pytest.raises(DataError, match="3 recorded requests hold 1 answers of two tokens or more"):
        usable_records(SAMPLES[:3])


def test_prompts_are_what_the_model_was_given_and_keep_their_old_description() -> None:
    first, second = recorded_prompts(usable_records(SAMPLES).values())
    assert (first.id, first.token_ids) == ("good", (1, 2))
    assert (second.id, second.token_ids) == ("also good", (6,))
    # Regeneration hashes the messages to know its own files again, also those of earlier releases.
    assert first.messages == ({"role": "recorded", "content": "good"},)
