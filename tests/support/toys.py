"""Small targets, drafts and samples for tests of training."""

import random
from pathlib import Path

import torch
from torch import Tensor

from eda.formats.config import ModelConfig, RopeConfig
from eda.models.attention import AttentionRow, PackedBatch
from eda.models.draft import DraftModel
from eda.models.fine_tune import FineTune
from eda.models.target import TargetModel, default_tap_layers
from eda.training.data.dataset import Dataset
from eda.training.data.prompts import ChatFormat
from eda.training.data.samples import Sample
from eda.training.data.target_states import StateCache
from eda.training.shared_draft import draft_config_for

VOCABULARY = 40


def random_target(seed: int = 0, *, vocab_size: int = VOCABULARY, num_layers: int = 4) -> TargetModel:
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-6,
        rope=RopeConfig.default(theta=10_000.0, max_position_embeddings=256),
        layer_windows=(None,) * num_layers,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_word_embeddings=False,
        max_position_embeddings=256,
        eos_token_ids=(),
        dtype=torch.float32,
    )
    target = TargetModel(config, fingerprint=f"random-{seed}")
    generator = torch.Generator().manual_seed(seed)
    for parameter in target.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(
            1.0 + 0.2 * noise if parameter.dim() == 1 else noise * (1.5 / parameter.shape[1] ** 0.5)
        )
    return target


def cyclic_target(step: int, *, seed: int = 0) -> TargetModel:
    """A target that always says token ``t + step`` after token ``t``, plainly enough to be learned.

    Layers add nothing but a little noise to the embedding; the head maps each token's embedding to its successor.
    """
    target = random_target(seed)
    generator = torch.Generator().manual_seed(7)
    embedding = torch.randn(VOCABULARY, 32, generator=generator)
    target.embedding.copy_(embedding)
    target.head.copy_(torch.roll(embedding, step, dims=0))
    for layer in target.layers:
        for part in (layer.attention.o_proj, layer.feed_forward.down_proj):
            part.weight.mul_(0.02)
    target.norm.weight.fill_(1.0)
    return target


def new_draft(target: TargetModel, *, seed: int = 0, draft_vocab_size: int | None = None) -> DraftModel:
    config = draft_config_for(target, draft_vocab_size or target.config.vocab_size)
    return DraftModel.initialised(config, torch.arange(config.draft_vocab_size), seed=seed)


def spread(draft: DraftModel, seed: int = 0) -> DraftModel:
    """The same draft with large random weights, so that its guesses vary."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in draft.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + 0.2 * noise if parameter.dim() == 1 else 0.3 * noise)
    return draft


def random_samples(count: int, seed: int = 0, *, longest: int = 14) -> list[Sample]:
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(rng.randrange(low, high)))

    return [Sample(f"s{number}", tokens(1, 8), tokens(2, longest)) for number in range(count)]


def cyclic_samples(count: int, step: int, seed: int = 0, *, length: int = 12) -> list[Sample]:
    """What ``cyclic_target(step)`` answers."""
    rng = random.Random(seed)
    samples = []
    for number in range(count):
        prompt = tuple(rng.randrange(VOCABULARY) for _ in range(3))
        answer = tuple((prompt[-1] + step * (place + 1)) % VOCABULARY for place in range(length))
        samples.append(Sample(f"c{number}", prompt, answer, 0.0, "length"))
    return samples


def whole_logits(target: TargetModel, tokens: list[int]) -> Tensor:
    """Logits ``[n, V]`` of one pass over a whole sequence."""
    count = len(tokens)
    positions = torch.arange(count)
    batch = PackedBatch(positions, positions, [AttentionRow(0, count, 0, count)], torch.full((count,), count))
    return target.logits(target(torch.tensor(tokens), batch, target.new_cache(count)).hidden)


def dataset_of(target: TargetModel, samples: list[Sample], memory_bytes: int = 1 << 24) -> Dataset:
    taps = default_tap_layers(target.config.num_layers)
    return Dataset(StateCache(FineTune("toy", target), samples, taps, memory_bytes=memory_bytes))


def weights_of(draft: DraftModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in draft.state_dict().items()}


def byte_chat(directory: Path) -> ChatFormat:
    """A byte-level tokenizer: ids 0 to 255 are bytes, 256 begins and 257 ends a text."""
    from tests.support.tiny import tiny_tokenizer

    return ChatFormat.load(tiny_tokenizer(directory), eos_ids=(257,))
