"""What drafting costs on the C++ passes, by instruction set and weight format."""

from dataclasses import replace

from eda.speculation.costs import DraftCosts

CPU_COSTS = DraftCosts(draft_cost=0.05, verification_cost=0.07, extension_cost=0.22)
"""Of the bundled family in bfloat16 with AVX512, where reading weights takes most of a plain step."""

_VERIFICATION_COSTS = {
    "avx2": {"bfloat16": 0.3, "int8": 0.6, "int4": 0.65},
    "avx2+vnni": {"bfloat16": 0.3, "int8": 0.15, "int4": 0.65},
    "avx512": {"bfloat16": 0.07, "int8": 0.2, "int4": 0.4},
    "avx512+vnni": {"bfloat16": 0.07, "int8": 0.07, "int4": 0.3},
}
"""A fifth of what five more rows add to a pass over one: ``python -m benchmarks.products``, one thread of a Zen 5 core
that was held to each instruction set. Passes over few rows take the time of reading the weights, those over many the
time of the products, which narrow vectors take longer for."""


def cpu_costs(instructions: str, weights: str) -> DraftCosts:
    """Of a target in the format ``weights``, on ``instructions`` as ``instruction_set`` names them.

    Processors that were not measured, as ARM's, count as the slowest that were.
    """
    family = "avx512" if instructions.startswith("avx512") else "avx2"
    costs = _VERIFICATION_COSTS[f"{family}+vnni" if "vnni" in instructions else family]
    return replace(CPU_COSTS, verification_cost=costs[weights])
