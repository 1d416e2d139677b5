"""Reaching into the parts that a decoder was put together from, and exchanging its drafter."""

from dataclasses import replace

from eda.backends.base import Drafter
from eda.backends.cpu.drafter import CpuDrafter, CpuDraftLayer, CpuProposer
from eda.backends.drafting import Proposer
from eda.backends.eager.draft_layer import TorchDraftLayer
from eda.backends.eager.drafter import ChainTreeDrafter
from eda.backends.eager.proposer import EagerProposer
from eda.backends.recorded.proposer import RecordedProposer
from eda.decoder import SpeculativeDecoder
from eda.speculation.kinds import Chain, Tree


def proposer_of(decoder: SpeculativeDecoder) -> Proposer:
    """What proposes chains and trees, on the decoder's own backend."""
    drafter = decoder.backend.drafters[Chain]
    if isinstance(drafter, CpuDrafter):
        drafter = drafter.inner
    assert isinstance(drafter, ChainTreeDrafter)
    return drafter.proposer


def eager_proposer_of(decoder: SpeculativeDecoder) -> EagerProposer:
    """What it falls back to."""
    proposer = proposer_of(decoder)
    if isinstance(proposer, RecordedProposer | CpuProposer):
        proposer = proposer.inner
    assert isinstance(proposer, EagerProposer)
    return proposer


def layer_of(decoder: SpeculativeDecoder) -> TorchDraftLayer | CpuDraftLayer:
    """The draft's single passes, with their cache."""
    layer = eager_proposer_of(decoder).layer
    assert isinstance(layer, TorchDraftLayer | CpuDraftLayer)
    return layer


def use_drafter(decoder: SpeculativeDecoder, drafter: Drafter) -> None:
    """Lets ``drafter`` draft instead, chains and trees."""
    decoder.backend = replace(
        decoder.backend, drafters={**decoder.backend.drafters, Chain: drafter, Tree: drafter}
    )
