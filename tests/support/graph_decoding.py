"""What the tests of recorded passes share: a family, decoders that record at once, requests in a changing batch."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from eda.backends.recorded.replay import GraphCache, Recorder, RerunBackend
from eda.decoder import SpeculativeDecoder
from eda.generation import GenerationRequest, generate
from eda.models.draft import DraftModel
from eda.models.private import PrivateModule
from eda.sampling.params import SamplingParams
from eda.speculation.kinds import Chain, Off, Speculation, Tree
from eda.speculation.sequence import SequenceState
from tests.support.reference_family import Family

GREEDY = SamplingParams(temperature=0.0)
CHAIN = Chain(4)
TREE = Tree(3, top_k=3, num_nodes=8)
PLAIN = Off()


def recording(
    backend: Recorder | None = None, *, max_graphs: int = 128, capture_after: int = 1
) -> GraphCache:
    """A cache of recordings that records at the first time."""
    return GraphCache(backend or RerunBackend(), max_graphs=max_graphs, capture_after=capture_after)


def random_private(draft: DraftModel, seed: int, *, rank: int = 3) -> PrivateModule:
    """A private module with large random weights in all of its parts; ``rank`` 0 leaves the low-rank ones out."""
    module = PrivateModule(draft.config.private_config(24, rank, rank)).to(draft.fc.weight.device)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module.to(draft.fc.weight.dtype).requires_grad_(False)


@dataclass
class Case:
    model: str
    prompt: list[int]
    private: PrivateModule | None = None
    speculation: Speculation = CHAIN
    sampling: SamplingParams = GREEDY


def random_cases(family: Family, models: Sequence[str], count: int, seed: int) -> list[Case]:
    rng = random.Random(seed)
    lengths = [1, 2, 3, 6, 11, 23]
    return [
        Case(models[at % len(models)], [rng.randrange(family.vocab_size) for _ in range(rng.choice(lengths))])
        for at in range(count)
    ]


def state_of(family: Family, case: Case, max_tokens: int) -> SequenceState:
    return SequenceState(
        token_ids=list(case.prompt),
        max_length=len(case.prompt) + max_tokens,
        fine_tune=family.fine_tunes[case.model],
        sampling=case.sampling,
        private=case.private,
        speculation=case.speculation,
    )


def decode(
    decoder: SpeculativeDecoder,
    family: Family,
    cases: Sequence[Case],
    max_tokens: int,
    *,
    batch_size: int = 4,
    prefill_chunk: int = 64,
    on_tokens: Callable[[int, list[int]], None] | None = None,
) -> list[list[int]]:
    """Decodes all cases in one changing batch; sequences join when others leave."""
    requests = [
        GenerationRequest(
            case.prompt,
            max_tokens,
            frozenset(),
            case.sampling,
            case.speculation,
            case.private,
            family.fine_tunes[case.model],
        )
        for case in cases
    ]
    generations = generate(
        decoder,
        family.fine_tunes["base"],
        requests,
        max_batch=batch_size,
        prefill_chunk=prefill_chunk,
        on_tokens=on_tokens,
    )
    return [generation.token_ids for generation in generations]


def expected_texts(family: Family, cases: Sequence[Case], max_tokens: int) -> list[list[int]]:
    """Greedy continuations by transformers."""
    texts: dict[int, list[int]] = {}
    for model in {case.model for case in cases}:
        places = [at for at, case in enumerate(cases) if case.model == model]
        found = family.references(model, [cases[at].prompt for at in places], max_tokens)
        texts |= dict(zip(places, found, strict=True))
    return [texts[at] for at in range(len(cases))]
