"""The target's pass over few tokens of few sequences, in fixed shapes."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eda.backends.base import PassOutput, PassPlan, TargetRunner
from eda.backends.recorded.replay import GraphCache, GraphKey, Recordable
from eda.backends.recorded.shapes import MAX_TOKENS, QUERIES, ROWS, Inputs, num_keys, round_up
from eda.models.answers import Logits
from eda.models.attention import static_batch
from eda.models.cache import KVCache
from eda.models.lora import LoraAdapter, LoraSegment
from eda.models.target import TapLayers, TargetModel
from eda.speculation.rows import PassRow


@dataclass(slots=True, eq=False)
class _Buffers:
    """Inputs and outputs of all recordings of one shape ``B x Q``."""

    inputs: Inputs
    logits: Tensor
    features: Tensor


class RecordedTarget:
    """Runs target passes as recordings where there is one for their shape, and hands on all others.

    Args:
        inner: runs the others.
        cache: the target's.
        scratch: the first of ``MAX_TOKENS`` cache slots that belong to no sequence.
        taps: the layers whose outputs the draft reads; ``None`` where nobody reads any.
    """

    def __init__(
        self, inner: TargetRunner, cache: KVCache, scratch: int, graphs: GraphCache, *, taps: TapLayers | None
    ) -> None:
        self.inner = inner
        self._cache = cache
        self._scratch = scratch
        self._graphs = graphs
        self._taps = taps
        self._buffers: dict[tuple[int, int], _Buffers] = {}
        # Of all shapes: only one pass runs at a time, and what it gives is copied.
        self._outputs: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def takes(num_rows: int, longest: int) -> bool:
        """Whether there are recordings for so many rows of at most ``longest`` tokens."""
        return _shape(num_rows, longest) is not None

    def run(self, model: TargetModel, rows: Sequence[PassRow], plan: PassPlan) -> PassOutput:
        """See ``TargetRunner``."""
        return self.replay(model, rows, plan) or self.inner.run(model, rows, plan)

    def replay(self, model: TargetModel, rows: Sequence[PassRow], plan: PassPlan) -> PassOutput | None:
        """The pass from a recording; ``None`` where there is none for it, and nothing has been computed then.

        What it gives is in memory of its own: logits of the wanted tokens, features of all.
        """
        lora = rows[0].lora
        if any(row.lora is not lora for row in rows) or plan.taps not in (None, self._taps):
            return None
        shape = _shape(len(rows), max(len(row.tokens) for row in rows))
        if shape is None:
            return None
        count, width = shape
        keys = num_keys(max(row.context + len(row.tokens) for row in rows), count)
        if keys is None:
            return None
        key = self._key(model, lora, count, width, keys)
        if not self._graphs.wants(key):
            return None
        buffers = self._buffers_of(model, count, width)
        lines, kept = self._load(buffers.inputs, rows, count, width)
        if not self._graphs.run(key, self._maker(model, lora, buffers, keys)):
            return None

        chosen = buffers.inputs["lines"].narrow(0, 0, lines)
        of_all = buffers.inputs["kept"].narrow(0, 0, kept)
        features = buffers.features.index_select(0, of_all) if self._taps is not None else None
        return PassOutput(features, Logits(buffers.logits.index_select(0, chosen)) if lines else None)

    def prepare(
        self, model: TargetModel, lora: LoraAdapter | None, num_rows: int, width: int, keys: int
    ) -> None:
        """Makes the recording for so many rows of ``width`` tokens and ``keys`` keys, where that is a shape."""
        shape = _shape(num_rows, width)
        keys_of_row = None if shape is None else num_keys(keys, shape[0])
        if shape is None or keys_of_row is None:
            return
        key = self._key(model, lora, *shape, keys_of_row)
        if self._graphs.lacks(key):
            buffers = self._buffers_of(model, *shape)
            self._load(buffers.inputs, (), *shape)
            self._graphs.run(key, self._maker(model, lora, buffers, keys_of_row))

    def _key(
        self, model: TargetModel, lora: LoraAdapter | None, count: int, width: int, keys: int
    ) -> GraphKey:
        return self._graphs.key("target pass", (count, width, keys, self._taps), (model, lora))

    def _maker(
        self, model: TargetModel, lora: LoraAdapter | None, buffers: _Buffers, keys: int
    ) -> Callable[[], Recordable]:
        def make() -> Recordable:
            function = target_function(
                model, lora, self._cache, buffers.inputs, buffers.logits, buffers.features, keys, self._taps
            )
            return function, (buffers.logits, buffers.features)

        return make

    def _buffers_of(self, model: TargetModel, count: int, width: int) -> _Buffers:
        buffers = self._buffers.get((count, width))
        if buffers is None:
            total, config, device = count * width, model.config, model.device
            grid = (count, width)
            inputs = Inputs(
                {
                    "tokens": (total,),
                    "positions": grid,
                    "slots": grid,
                    "rope_lengths": grid,
                    "starts": (count,),
                    "contexts": (count,),
                    "lengths": (count,),
                    "tail": (count, width, width),
                    "lines": (total,),
                    "kept": (total,),
                },
                device,
            )
            if self._outputs is None:
                num_features = 3 * config.hidden_size if self._taps is not None else 0
                self._outputs = (
                    torch.zeros(MAX_TOKENS, config.vocab_size, dtype=torch.float32, device=device),
                    torch.zeros(MAX_TOKENS, num_features, dtype=model.dtype, device=device),
                )
            logits, features = (output.narrow(0, 0, total) for output in self._outputs)
            buffers = self._buffers[count, width] = _Buffers(inputs, logits, features)
        return buffers

    def _load(self, inputs: Inputs, rows: Sequence[PassRow], count: int, width: int) -> tuple[int, int]:
        """Fills the inputs. Returns the numbers of wanted tokens and of all tokens."""
        values: dict[str, list[int]] = {
            name: []
            for name in (
                *("tokens", "positions", "slots", "rope_lengths", "starts", "contexts", "lengths"),
                *("tail", "lines", "kept"),
            )
        }
        causal = [int(key <= query) for query in range(width) for key in range(width)]
        for place in range(count):
            first = place * width
            if place >= len(rows):
                scratch = self._scratch + first
                values["tokens"] += [0] * width
                values["positions"] += [0] * width
                values["rope_lengths"] += [1] * width
                values["slots"] += range(scratch, scratch + width)
                values["starts"].append(scratch)
                values["contexts"].append(0)
                values["lengths"].append(1)
                values["tail"] += causal
                continue
            row = rows[place]
            size = len(row.tokens)
            padding = width - size
            own = row.cache_start + row.context
            values["tokens"] += [*row.tokens, *([0] * padding)]
            values["positions"] += [*row.positions, *([0] * padding)]
            values["rope_lengths"] += [*row.rope_lengths, *([1] * padding)]
            values["slots"] += range(own, own + size)
            values["slots"] += range(self._scratch + first + size, self._scratch + first + width)
            values["starts"].append(row.cache_start)
            values["contexts"].append(row.context)
            values["lengths"].append(row.context + size)
            if row.seen is None:
                values["tail"] += causal
            else:
                for line in row.seen:
                    values["tail"] += [*line, *([0] * padding)]
                values["tail"] += causal[size * width :]
            values["lines"] += range(first + row.first_wanted, first + size)
            values["kept"] += range(first, first + size)
        numbers = len(values["lines"]), len(values["kept"])
        inputs.load(values)
        return numbers


def _shape(num_rows: int, longest: int) -> tuple[int, int] | None:
    """Rows and tokens of each row, rounded up; ``None`` for what is too large."""
    count, width = round_up(num_rows, ROWS), round_up(longest, QUERIES)
    if count is None or width is None or count * width > MAX_TOKENS:
        return None
    return count, width


def target_function(
    model: TargetModel,
    lora: LoraAdapter | None,
    cache: KVCache,
    inputs: Inputs,
    logits: Tensor,
    features: Tensor,
    keys: int,
    taps: TapLayers | None,
) -> Callable[[], None]:
    """A target pass over ``inputs`` that leaves its results in ``logits`` and ``features``.

    It never waits for the device, and holds the weights weakly.
    """
    model_of = weakref.ref(model)
    lora_of = None if lora is None else weakref.ref(lora)
    total = inputs["tokens"].shape[0]
    config = model.config

    def run() -> None:
        target, adapter = model_of(), lora_of() if lora_of is not None else None
        assert target is not None
        segments = () if adapter is None else (LoraSegment(adapter, 0, total),)
        batch = static_batch(
            inputs["positions"],
            inputs["slots"],
            inputs["starts"],
            inputs["contexts"],
            inputs["lengths"],
            inputs["tail"].bool(),
            keys,
            groups=config.num_heads // config.num_kv_heads,
            dtype=target.dtype,
            rope_lengths=inputs["rope_lengths"],
        )
        output = target(inputs["tokens"], batch, cache, segments, taps=taps)
        logits.copy_(target.logits(output.hidden, segments))
        if output.features is not None:
            features.copy_(output.features)

    return run
