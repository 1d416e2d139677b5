"""A fine-tune of a target: with a LoRA on the base's weights, or with weights of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor

from eda.formats.tokenizer import TextTokenizer
from eda.models.lora import LoraAdapter, LoraSegment
from eda.models.target import TargetModel

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class FineTune:
    """What a request's ``model`` resolves to: a target, with or without a LoRA on it."""

    name: str
    model: TargetModel
    lora: LoraAdapter | None = None
    tokenizer: TextTokenizer | None = None
    """Its own, where its directory brings tokens, end tokens or a chat template that the base's does not have."""

    @property
    def fingerprint(self) -> str:
        """Of the weights that produce the output: the target's, joined with the LoRA's where there is one."""
        return (
            self.model.fingerprint
            if self.lora is None
            else f"{self.model.fingerprint}+{self.lora.fingerprint}"
        )

    def lora_segments(self, start: int, end: int) -> tuple[LoraSegment, ...]:
        """The LoRA on tokens ``start`` to ``end``; empty without one."""
        return () if self.lora is None else (LoraSegment(self.lora, start, end),)

    @property
    def output_owner(self) -> TargetModel | LoraAdapter:
        """What holds the embeddings and the output layer: LoRAs that leave them alone share their target's."""
        lora = self.lora
        if lora is None:
            return self.model
        parts = (lora.embedding, lora.embedding_weight, lora.head, lora.head_weight)
        return self.model if all(part is None for part in parts) else lora

    def embed(self, token_ids: Tensor) -> Tensor:
        """This fine-tune's embeddings ``[T, hidden_size]`` of ``token_ids`` ``[T]``."""
        return self.model.embed(token_ids, self.lora_segments(0, token_ids.shape[0]))

    def head_rows(self, token_ids: Tensor) -> Tensor:
        """Rows ``[n, hidden_size]`` of this fine-tune's output layer for ``token_ids`` ``[n]``, LoRA merged in."""
        if self.lora is None:
            return self.model.head[token_ids]
        rows = (self.model.head if self.lora.head_weight is None else self.lora.head_weight)[token_ids]
        if self.lora.head is not None:
            rows = rows + self.lora.head.blocks[0].b[token_ids] @ self.lora.head.a
        return rows


class FineTuneCache(Generic[T]):
    """What is made of the embeddings and the output layer of fine-tunes, once for each that has its own.

    The keys are weak: what was made for a fine-tune that is unloaded goes with it.

    Args:
        make: makes the value. It must hold neither the fine-tune nor its model.
    """

    def __init__(self, make: Callable[[FineTune], T]) -> None:
        self._make = make
        self._values: WeakKeyDictionary[TargetModel | LoraAdapter, T] = WeakKeyDictionary()

    def __call__(self, fine_tune: FineTune) -> T:
        """The value for ``fine_tune``."""
        owner = fine_tune.output_owner
        value = self._values.get(owner)
        if value is None:
            value = self._values[owner] = self._make(fine_tune)
        return value

    def __len__(self) -> int:
        return len(self._values)
