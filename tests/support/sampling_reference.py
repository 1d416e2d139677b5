"""Processed logits as transformers computes them: the independent reference for ``eda.sampling.processors``."""

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from eda.sampling.params import SamplingParams


def reference_logits(params: SamplingParams, logits: Tensor, prompt: list[int], output: list[int]) -> Tensor:
    """One row ``[V]``. Presence and frequency penalties, which transformers lacks, are spelled out in a loop."""
    tokens = torch.tensor([prompt + output])
    scores = logits[None].clone()
    vocab_size = logits.shape[0]
    if params.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(tokens, scores)
    for token in set(output):
        scores[0, token] -= params.frequency_penalty * output.count(token) + params.presence_penalty

    rest = LogitsProcessorList()
    if params.logit_bias:
        rest.append(
            SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias.items()})
        )
    if params.min_tokens and params.stop_ids:
        stops = list(params.stop_ids)
        rest.append(MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, stops, device="cpu"))
    if params.temperature > 0:
        rest.append(TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            rest.append(TopKLogitsWarper(min(params.top_k, vocab_size)))
        rest.append(TopPLogitsWarper(params.top_p))
        rest.append(MinPLogitsWarper(params.min_p))
    return rest(tokens, scores)[0]
