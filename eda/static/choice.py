"""Whether and how a decoder records its passes."""

from typing import Literal

from eda.static.replay import Backend, CudaGraphBackend, GraphCache
from eda.target import TargetModel

GraphChoice = Literal["auto", "off"] | Backend | GraphCache


def graph_cache(choice: GraphChoice, target: TargetModel) -> GraphCache | None:
    """Where a decoder of ``target`` keeps its recordings; ``None`` when it makes none.

    The C++ passes of CPUs are one call each already: nothing is recorded beside them.
    """
    if target.has_kernel or choice == "off":
        return None
    if choice == "auto":
        return GraphCache(CudaGraphBackend(target.device)) if target.device.type == "cuda" else None
    return choice if isinstance(choice, GraphCache) else GraphCache(choice)
