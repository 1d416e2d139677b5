"""The target's pass of torch: rows of any kind, packed without padding."""

from collections.abc import Sequence

from eda.backends.base import PassOutput, PassPlan
from eda.models.cache import KVCache
from eda.models.target import TargetModel, TargetOutput
from eda.speculation.rows import PassRow, lora_segments, pack_rows, wanted_tokens


class EagerTarget:
    """Runs ``TargetModel`` over packed rows; ``cache`` is the target's."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache

    def run(self, model: TargetModel, rows: Sequence[PassRow], plan: PassPlan) -> PassOutput:
        """See ``TargetRunner``."""
        tokens, batch = pack_rows(rows, model.device)
        output: TargetOutput = model(
            tokens,
            batch,
            self._cache,
            lora_segments(rows),
            taps=plan.taps,
            wanted=wanted_tokens(rows),
            need=plan.need,
        )
        return PassOutput(output.features, output.answer)
