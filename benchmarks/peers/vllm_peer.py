"""vLLM's CPU build, which cannot live in the same Python as this project: it pins another torch."""

from benchmarks.peers.interface import Complete, MissingPeerError, Peer, PeerModel


def _bfloat16(model: PeerModel) -> Complete:
    raise MissingPeerError(
        "its CPU build pins another torch than this project runs on, so it cannot be measured in one process"
    )


PEERS = (Peer("vLLM bf16", _bfloat16),)
