"""Recorded requests in the place of prompts: token ids are there already, so no chat template is applied."""

from collections.abc import Sequence
from typing import Self

from eda.errors import DataError
from eda.training.prompts import ChatFormat, Message, Prompt
from eda.training.samples import Sample

_ROLE = "recorded"


class RecordedPrompts(ChatFormat):
    """A chat format that finds the token ids of a recorded request by its id.

    Attributes:
        samples: recorded requests with their answers, by id.
    """

    samples: dict[str, Sample]

    @classmethod
    def of(cls, chat: ChatFormat, samples: Sequence[Sample]) -> Self:
        """Raises ``DataError`` when no sample has an answer to learn from."""
        recorded = cls(chat.tokenizer, chat.eos_ids, chat.render)
        recorded.samples = {
            sample.id: sample for sample in samples if sample.num_roots > 0 and sample.prompt_ids
        }
        if len(recorded.samples) < 2:
            raise DataError(
                f"{len(samples)} recorded requests hold {len(recorded.samples)} answers of two tokens or more; "
                "at least 2 are needed"
            )
        return recorded

    @property
    def prompts(self) -> list[Prompt]:
        """One for each recorded request, in the order of recording."""
        return [Prompt(name, ({"role": _ROLE, "content": name},)) for name in self.samples]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        if messages and messages[0]["role"] == _ROLE:
            return list(self.samples[messages[0]["content"]].prompt_ids)
        return super().prompt_ids(messages)
