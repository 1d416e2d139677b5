"""What every contestant of a comparison looks like, and what a peer is given to become one."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch


class MissingPeerError(Exception):
    """A peer cannot take part here; the message says why, for the table."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and the fine-tune that completes it."""

    domain: str
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Completion:
    """What came out for one prompt.

    ``num_rounds`` counts the target passes after the one that ended the prompt, and ``num_round_tokens`` the tokens
    that they gave; both are ``None`` for an engine that does not tell.
    """

    token_ids: list[int]
    num_rounds: int | None = None
    num_round_tokens: int | None = None


Complete = Callable[[Sequence[Prompt], int], list[Completion]]
"""Completes prompts greedily with exactly so many tokens each: no token ends a text early."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """One row of the table."""

    name: str
    complete: Complete
    concurrency: int = 1


@dataclass(frozen=True, slots=True)
class PeerModel:
    """What a peer needs of one fine-tune.

    Attributes:
        plain: a checkpoint without adapters (a LoRA is merged), with its tokenizer.
        work: directory for converted weights; what lies there is reused.
        dtype: what this engine computes in.
        threads: CPU threads; the same number for every contestant.
        max_length: longest sequence, prompt and output together.
        openvino_exporter: a Python that has optimum-intel, or ``None`` for the running one.
    """

    plain: Path
    work: Path
    dtype: torch.dtype
    threads: int
    max_length: int
    openvino_exporter: str | None = None


@dataclass(frozen=True, slots=True)
class Peer:
    """A way to generate that may not be available. ``build`` raises ``MissingPeerError`` where it is not."""

    name: str
    build: Callable[[PeerModel], Complete]
    concurrency: int = 1


def build_peers(peers: Sequence[Peer], model: PeerModel) -> tuple[list[Contestant], dict[str, str]]:
    """The peers that can take part, and the reasons of the others."""
    contestants, missing = [], {}
    for peer in peers:
        try:
            contestants.append(Contestant(peer.name, peer.build(model), peer.concurrency))
        except MissingPeerError as error:
            missing[peer.name] = str(error)
        except Exception as error:  # whatever a peer's library raises, the others shall still be measured
            missing[peer.name] = f"could not be set up: {first_line(error)}"
    return contestants, missing


def require(module: str, package: str) -> ModuleType:
    """Imports ``module`` of an optional ``package``. Raises ``MissingPeerError``."""
    if importlib.util.find_spec(module) is None:
        raise MissingPeerError(f"{package} is not installed")
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingPeerError(f"{package} cannot be imported: {first_line(error)}") from error


def one_by_one(complete: Callable[[list[int], int], Completion]) -> Complete:
    """A ``Complete`` from a function for a single prompt."""

    def run(prompts: Sequence[Prompt], max_tokens: int) -> list[Completion]:
        return [complete(prompt.token_ids, max_tokens) for prompt in prompts]

    return run


def first_line(error: BaseException) -> str:
    """An exception in one short line."""
    text = str(error).strip()
    line = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {line}"[:240]
