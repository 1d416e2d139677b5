"""Which implementations a decoder is put together from. Each faster one wraps the one that takes everything."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch

from eda.backends.base import Backend, Drafter, TargetRunner, Verifier
from eda.backends.cpu.body import CpuBody
from eda.backends.cpu.costs import cpu_costs
from eda.backends.cpu.draft import supports
from eda.backends.cpu.drafter import CpuDrafter, CpuDraftLayer, CpuProposer
from eda.backends.cpu.library import instruction_set
from eda.backends.cpu.threads import kernel_threads_only
from eda.backends.cpu.verifier import CpuVerifier
from eda.backends.drafting import Proposer
from eda.backends.eager.draft_layer import TorchDraftLayer
from eda.backends.eager.drafter import ChainTreeDrafter
from eda.backends.eager.lookup import LookupDrafter
from eda.backends.eager.proposer import EagerProposer
from eda.backends.eager.target import EagerTarget
from eda.backends.eager.verifier import RulesVerifier
from eda.backends.recorded.proposer import RecordedProposer
from eda.backends.recorded.replay import CudaGraphBackend, GraphCache, Recorder
from eda.backends.recorded.shapes import MAX_TOKENS, ROWS, WARM_UP_KEYS
from eda.backends.recorded.target import RecordedTarget
from eda.models.draft import DraftModel
from eda.models.fine_tune import FineTune
from eda.models.target import TargetModel
from eda.speculation.kinds import Chain, Lookup, Speculation, Tree

GraphChoice = Literal["auto", "off"] | Recorder | GraphCache
"""How small passes are recorded and replayed: "auto" (CUDA graphs on a GPU), "off", or by this recorder."""


def choose_backend(
    target: TargetModel,
    draft: DraftModel | None,
    *,
    num_slots: int,
    generator: torch.Generator,
    block_verification: bool = False,
    graphs: GraphChoice = "auto",
) -> Backend:
    """The fastest implementations that take ``target`` and ``draft`` here.

    Args:
        num_slots: size of each cache in tokens.
        generator: of draws for drafting and verification, in this order in each step.
        block_verification: accept sampled chains as blocks.
    """
    verifier: Verifier = RulesVerifier(generator, block=block_verification)
    if isinstance(target.body, CpuBody):
        if not block_verification:
            verifier = CpuVerifier(verifier, generator)
        cache = target.new_cache(num_slots)
        trained = None if draft is None else _trained(draft, num_slots, generator, None)[0]
        return Backend(
            "cpu",
            cache,
            EagerTarget(cache),
            verifier,
            _by_kind(trained),
            cpu_costs(instruction_set() or "", target.weight_formats[0]),
            around_step=kernel_threads_only,
        )
    recordings = _recordings(graphs, target)
    spare = 0 if recordings is None else MAX_TOKENS
    cache = target.new_cache(num_slots + spare)
    trained, recorded = None, None
    if draft is not None:
        trained, recorded = _trained(draft, num_slots, generator, recordings)
    drafters = _by_kind(trained)
    runner: TargetRunner = EagerTarget(cache)
    if recordings is None:
        return Backend("torch", cache, runner, verifier, drafters)
    taps = None if draft is None else draft.config.tap_layers
    runner = RecordedTarget(runner, cache, cache.withhold(spare), recordings, taps=taps)
    prepare = partial(_record, target, recordings, runner, recorded)
    return Backend("recorded", cache, runner, verifier, drafters, usual_batches=ROWS, prepare=prepare)


def _by_kind(trained: Drafter | None) -> dict[type[Speculation], Drafter]:
    """The drafter of each kind of speculation. Those that need no draft model are there whatever ``trained`` is."""
    drafters: dict[type[Speculation], Drafter] = {Lookup: LookupDrafter()}
    return drafters if trained is None else drafters | {Chain: trained, Tree: trained}


def _recordings(choice: GraphChoice, target: TargetModel) -> GraphCache | None:
    if choice == "off":
        return None
    if choice == "auto":
        return GraphCache(CudaGraphBackend(target.device)) if target.device.type == "cuda" else None
    return choice if isinstance(choice, GraphCache) else GraphCache(choice)


def _trained(
    draft: DraftModel, num_slots: int, generator: torch.Generator, recordings: GraphCache | None
) -> tuple[Drafter, RecordedProposer | None]:
    """What drafts with ``draft``, and the part of it that is recorded."""
    taps = draft.config.tap_layers
    if supports(draft):
        # The C++ draft is one call already: nothing is recorded beside it.
        layer = CpuDraftLayer(draft, draft.new_cache(num_slots), generator)
        proposer = CpuProposer(EagerProposer(draft, layer, generator), layer)
        return CpuDrafter(ChainTreeDrafter(proposer, taps), layer), None
    cache = draft.new_cache(num_slots + (0 if recordings is None else MAX_TOKENS))
    torch_layer = TorchDraftLayer(draft, cache)
    eager: Proposer = EagerProposer(draft, torch_layer, generator)
    if recordings is None:
        return ChainTreeDrafter(eager, taps), None
    recorded = RecordedProposer(
        eager, draft, cache, cache.withhold(MAX_TOKENS), recordings, generator, torch_layer.head_rows
    )
    return ChainTreeDrafter(recorded, taps), recorded


def _record(
    target: TargetModel,
    recordings: GraphCache,
    runner: RecordedTarget,
    proposer: RecordedProposer | None,
    shapes: Sequence[tuple[int, Speculation]],
) -> int:
    """Records the passes of plain and drafting rounds; greedy, with the base model and the shared draft.

    Others are recorded when they have come up often enough, and so are those of fine-tunes and private modules.
    """
    fine_tune = FineTune("base", target)
    for keys in WARM_UP_KEYS:
        for num_rows, speculation in shapes:
            runner.prepare(target, None, num_rows, 1, keys)
            if proposer is not None:
                runner.prepare(target, None, num_rows, speculation.num_nodes + 1, keys)
                proposer.prepare(fine_tune, num_rows, speculation, keys)
    return len(recordings)
