"""The fused layers of a model whose file holds them in 8 or 4 bits."""

import logging
from collections import Counter
from typing import Literal

from eda.formats.checkpoint import WeightSource, layer_projections, require_sound
from eda.formats.config import ModelConfig
from eda.formats.quantised import Format, QuantisedWeight, concatenated

Keep = Literal["stored", "int8", "int4"]
"""``stored``: in the file's own formats."""

_logger = logging.getLogger(__name__)


class QuantisedLayers:
    """Reads fused weights, layer by layer, and counts what could not stay as it is stored."""

    def __init__(self, checkpoint: WeightSource, config: ModelConfig, keep: Keep) -> None:
        self._checkpoint = checkpoint
        self._keep = keep
        self._parts: dict[str, list[str]] = {}
        for name, projection in layer_projections(config).items():
            self._parts.setdefault(projection.fused, []).append(name)
        self._changes: Counter[str] = Counter()

    def read(self, layer: int) -> dict[str, QuantisedWeight]:
        """By the names that ``Projection.fused`` uses; without those that the file holds as floats, even in part.

        Parts of a fused weight share one format: 8 bits where a part has 8. 4 bits around a middle, GGUF's Q4_0, keep
        their values in 8; those with a minimum, Q4_1, are rounded to the nearest of 255 steps.

        Raises ``CheckpointError`` for weights that cannot be read or are not finite.
        """
        found = {}
        for fused, names in self._parts.items():
            weight = self._fused(fused, [f"model.layers.{layer}.{name}.weight" for name in names])
            if weight is not None:
                found[fused] = weight
        return found

    def report(self) -> None:
        """Logs what was changed."""
        for change, count in self._changes.items():
            _logger.info("%s: %d %s", self._checkpoint.path, count, change)

    def _fused(self, fused: str, names: list[str]) -> QuantisedWeight | None:
        parts = [self._checkpoint.quantised(name) for name in names]
        present = [part for part in parts if part is not None]
        if len(present) < len(parts):
            if present:
                self._changes[f"{fused} layers dequantised: a part of each is stored as floats"] += 1
            return None
        for name, part in zip(names, present, strict=True):
            require_sound(part, name, self._checkpoint.path)
        if self._keep != "stored":
            format: Format = self._keep
        else:
            format = "int8" if any(part.format == "int8" for part in present) else "int4"
        converted = []
        for part in present:
            weight, is_same = part.in_format(format)
            if not is_same:
                self._changes[f"parts of {fused} layers rounded from {part.format} to {format}"] += 1
            converted.append(weight)
        return converted[0] if len(converted) == 1 else concatenated(converted)
