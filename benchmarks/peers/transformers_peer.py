"""``generate`` of transformers, plain and with prompt lookup."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers.interface import Complete, Completion, Peer, PeerModel, one_by_one

LOOKUP_TOKENS = 5
"""Draft tokens of prompt lookup, the same in every engine that has it."""


def _build(model: PeerModel, **options: Any) -> Complete:
    reference = AutoModelForCausalLM.from_pretrained(model.plain, dtype=model.dtype).eval()
    passes = [0]

    def count(*_: Any) -> None:
        passes[0] += 1

    reference.register_forward_hook(count)

    def complete(prompt: list[int], max_tokens: int) -> Completion:
        ids = torch.tensor([prompt])
        passes[0] = 0
        with torch.inference_mode():
            output = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                repetition_penalty=1.0,
                eos_token_id=None,
                pad_token_id=0,
                **options,
            )
        tokens = output[0, len(prompt) :].tolist()
        return Completion(tokens, passes[0] - 1, len(tokens) - 1)

    return one_by_one(complete)


def _plain(model: PeerModel) -> Complete:
    return _build(model)


def _prompt_lookup(model: PeerModel) -> Complete:
    return _build(model, prompt_lookup_num_tokens=LOOKUP_TOKENS)


PEERS = (
    Peer("transformers generate", _plain),
    Peer("transformers prompt lookup", _prompt_lookup),
)
