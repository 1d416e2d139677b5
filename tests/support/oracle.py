"""A draft that knows what the target will say: long accepted runs on a random model, right and wrong at will."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from eda.backends.eager.draft_layer import TorchDraftLayer
from eda.backends.eager.proposer import EagerProposer
from eda.decoder import SpeculativeDecoder
from eda.generation import GenerationRequest, generate
from eda.speculation.kinds import Off
from eda.speculation.proposal import Proposal
from eda.speculation.sequence import SequenceState
from tests.support.family import Family


class Oracle:
    """Greedy continuations by plain decoding, one prompt at a time: what every answer is compared with."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._known: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        self._decoder = SpeculativeDecoder.for_models(family.target, num_slots=1024)

    def continuation(self, model: str, prompt_ids: Sequence[int], count: int = 40) -> list[int]:
        """The first ``count`` tokens, end-of-text tokens not heeded."""
        key = (model, tuple(prompt_ids))
        if len(self._known.get(key, ())) < count:
            request = GenerationRequest(list(prompt_ids), count, speculation=Off())
            [generation] = generate(self._decoder, self._family.fine_tunes[model], [request])
            self._known[key] = generation.token_ids
        return self._known[key][:count]

    def text(self, model: str, prompt: str, max_tokens: int) -> str:
        """What a greedy request for ``max_tokens`` must answer."""
        tokenizer = self._family.tokenizer
        tokens = self.continuation(model, tokenizer.encode(prompt), max_tokens)
        for place, token_id in enumerate(tokens):
            if token_id in tokenizer.eos_ids:
                return tokenizer.decode(tokens[:place])
        return tokenizer.decode(tokens)


class OracleProposer(EagerProposer):
    """Proposes the oracle's continuation, spoilt from a random place on for prompts that the oracle was asked about,
    and nonsense for others."""

    def __init__(self, family: Family, oracle: Oracle, num_slots: int) -> None:
        layer = TorchDraftLayer(family.draft, family.draft.new_cache(num_slots))
        super().__init__(family.draft, layer, torch.Generator())
        self._oracle = oracle
        self._random = random.Random(0)
        self.spoils = True

    def _propose(self, state: SequenceState, length: int) -> Proposal:
        key = (state.fine_tune.name, tuple(state.token_ids[: state.num_prompt_tokens]))
        known = self._oracle._known.get(key, [])[state.num_generated :][:length]
        tokens = known + [0] * (length - len(known))
        right = self._random.randrange(length + 1) if self.spoils else length
        wrong = [(token + 1) % self.draft.config.vocab_size for token in tokens[right:]]
        return Proposal(tokens[:right] + wrong, list(range(length)))

    def propose_chains(
        self, states: Sequence[SequenceState], hidden: Tensor, lengths: Sequence[int]
    ) -> list[Proposal]:
        return [self._propose(state, length) for state, length in zip(states, lengths, strict=True)]

    def propose_trees(
        self, states: Sequence[SequenceState], hidden: Tensor, *, top_k: int, depth: int, num_nodes: int
    ) -> list[Proposal]:
        return [self._propose(state, depth) for state in states]
