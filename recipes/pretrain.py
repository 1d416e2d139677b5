"""Train the base model on the general text.

    python -m recipes.pretrain --data DATA --tokenizer TOKENIZER --work WORK --output OUT --tokens 3e6 --minutes 50

Training ends at the token budget or at the time limit, whichever comes first; the learning rate follows whichever is
nearer. Started again, it goes on from its last checkpoint. The first part of it trains a model of a few layers only,
which then grows to its full depth without a change of its outputs: a step of the shallow model costs a third, and
early on it learns as much from a token. The last part sees sequences of twice the length, for the context.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from recipes.attention import use_blocked_attention
from recipes.hardware import Hardware, choose_hardware
from recipes.head_loss import head_loss
from recipes.held_out import mean_loss
from recipes.optimizer import rate_scale
from recipes.text import encode_rows, eval_rows, pack_rows, shuffled, train_rows
from recipes.training_loop import Steps, run_steps
from recipes.training_state import LossLog, Position


@dataclass(frozen=True)
class PretrainSettings:
    """What a base model is trained with. A step sees `micro_batch_size * num_micro_batches` sequences."""

    max_tokens: int
    max_seconds: float = math.inf
    sequence_length: int = 512
    micro_batch_size: int = 8
    num_micro_batches: int = 1
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    num_shallow_layers: int = 5
    shallow_share: float = 0.5  # of the budget; 0 trains at full depth from the start
    long_share: float = (
        0.15  # of the budget, at its end: sequences of twice the length, half as many in a step
    )
    seed: int = 0
    checkpoint_seconds: float = 180.0
    log_every: int = 10


def base_config(
    vocabulary_size: int, eos_token_id: int, pad_token_id: int, *, width: int = 256
) -> LlamaConfig:
    """The family's shape: deep and thin, so that a one-layer draft is cheap beside the target.

    `width` is the hidden size, a multiple of 128: 256 gives 17 million parameters, 128 gives 5 million.
    """
    return LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=20,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=64,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )


def initial_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """A fresh model in float32. Blocks start as the identity: it keeps 20 layers stable at high learning rates."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def grown_model(shallow: LlamaForCausalLM, config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """A model of `config`'s depth with the outputs of `shallow`.

    The layers of `shallow` are spread evenly. The layers between them copy the one before, all but the two output
    projections: those are zero, so a new layer is the identity until it has learnt something.
    """
    model = initial_model(config, seed)
    num_layers, num_shallow = config.num_hidden_layers, shallow.config.num_hidden_layers
    spread = {index * num_layers // num_shallow: index for index in range(num_shallow)}
    weights = shallow.state_dict()
    source = 0
    for index, layer in enumerate(model.model.layers):
        source = spread.get(index, source)
        prefix = f"model.layers.{source}."
        layer_weights = {
            name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)
        }
        if index not in spread:
            for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
                layer_weights[name] = torch.zeros_like(layer_weights[name])
        layer.load_state_dict(layer_weights)
    model.model.embed_tokens.load_state_dict(shallow.model.embed_tokens.state_dict())
    model.model.norm.load_state_dict(shallow.model.norm.state_dict())
    return model


def next_token_loss(trunk: Callable[[Tensor], Tensor], head: Tensor, sequences: Tensor) -> Tensor:
    """Mean loss in nats of `[batch, length]` token ids, every token but the first being a label.

    `trunk` maps token ids to final hidden states; `head` is the output layer's weight.
    """
    hidden = trunk(sequences[:, :-1])
    return head_loss(hidden.flatten(0, 1), head, sequences[:, 1:].flatten())


def step_batches(
    sequences: NDArray[np.uint16], settings: PretrainSettings, first_step: int
) -> Iterator[list[Tensor]]:
    """Micro-batches `[micro_batch_size, length]` of each step from `first_step` on, the same for any start.

    Every pass over the sequences has an order of its own.
    """
    per_step = settings.micro_batch_size * settings.num_micro_batches
    position = first_step * per_step
    epoch, order = -1, np.empty(0, dtype=np.int64)
    while True:
        chosen = []
        for _ in range(per_step):
            if position // len(sequences) != epoch:
                epoch = position // len(sequences)
                order = np.random.default_rng([settings.seed, epoch]).permutation(len(sequences))
            chosen.append(sequences[order[position % len(sequences)]])
            position += 1
        yield list(torch.from_numpy(np.stack(chosen).astype(np.int64)).split(settings.micro_batch_size))


def train(
    model: LlamaForCausalLM,
    sequences: NDArray[np.uint16],
    settings: PretrainSettings,
    hardware: Hardware,
    checkpoint: Path,
    log: LossLog,
    start: Position | None = None,
    until: float = 1.0,
    stop_after_steps: int | None = None,
) -> Position:
    """Train in place until the share `until` of the budget is used, from `checkpoint` or else from `start`.

    `stop_after_steps` interrupts a run on purpose.
    """
    model.to(hardware.device).train()
    if hardware.device == "cpu":
        use_blocked_attention(model)
    trunk = hardware.compile(lambda ids: model.model(input_ids=ids, use_cache=False).last_hidden_state)

    def backward(batches: list[Tensor]) -> tuple[float, int]:
        step_loss = 0.0
        for batch in batches:
            with hardware.autocast():
                loss = next_token_loss(trunk, model.lm_head.weight, batch.to(hardware.device)) / len(batches)
            loss.backward()
            step_loss += float(loss.detach())
        return step_loss, sum(batch.numel() for batch in batches)

    return run_steps(
        model,
        Steps(lambda first: step_batches(sequences, settings, first), backward, rate_scale),
        settings,
        hardware,
        checkpoint,
        log,
        start=replace(start or Position()),
        until=until,
        stop_after_steps=stop_after_steps,
        started={"num_layers": model.config.num_hidden_layers},
    )


def train_growing(
    config: LlamaConfig,
    sequences_of: Callable[[int], NDArray[np.uint16]],
    settings: PretrainSettings,
    hardware: Hardware,
    work: Path,
    log: LossLog,
) -> tuple[LlamaForCausalLM, Position]:
    """Train a shallow model for its share of the budget, then the grown one; resumes in any part.

    `sequences_of` gives the training text `[count, length]` for a length.
    """
    position = None
    model = initial_model(config, settings.seed)
    if settings.shallow_share:
        shallow_config = LlamaConfig.from_dict(
            config.to_dict() | {"num_hidden_layers": settings.num_shallow_layers}
        )
        shallow = initial_model(shallow_config, settings.seed)
        state = work / "base_shallow_state.safetensors"
        short = sequences_of(settings.sequence_length)
        position = train(shallow, short, settings, hardware, state, log, until=settings.shallow_share)
        model = grown_model(shallow, config, settings.seed)
    state = work / "base_state.safetensors"
    long = replace(
        settings,
        sequence_length=2 * settings.sequence_length,
        micro_batch_size=max(1, settings.micro_batch_size // 2),
    )
    # On a CPU, compiling for a second length takes longer than its share of the training gains by it.
    eager = replace(hardware, compiled=hardware.compiled and hardware.device != "cpu")
    for part, where, until in ((settings, hardware, 1.0 - settings.long_share), (long, eager, 1.0)):
        sequences = sequences_of(part.sequence_length)
        position = train(model, sequences, part, where, state, log, start=position, until=until)
    return model, position


def general_sequences(
    data: Path, tokenizer: PreTrainedTokenizerFast, work: Path, length: int, seed: int
) -> NDArray[np.uint16]:
    """The general training text as `[count, length]` token ids, kept in a file under `work` once made."""
    cache = work / f"general_{length}.npy"
    if not cache.exists():
        rows = shuffled(train_rows(data, "general"), seed)
        packed = pack_rows((row.token_ids for row in encode_rows(tokenizer.backend_tokenizer, rows)), length)
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.save(cache, packed)
    loaded: NDArray[np.uint16] = np.load(cache)
    return loaded


def generation_defaults(model: LlamaForCausalLM) -> GenerationConfig:
    """Defaults for serving a model of this size.

    Small models fall into repetition under greedy decoding, and into nonsense when they sample from the whole
    distribution: so a temperature below 1, the nucleus of 0.9, and a light penalty on tokens already there. Greedy
    measurements override all three.
    """
    return GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        repetition_penalty=1.1,
        max_new_tokens=256,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )


def save_checkpoint(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write a bfloat16 checkpoint with its tokenizer, for plain transformers."""
    model.to(torch.bfloat16)
    model.generation_config = generation_defaults(model)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="directory with general/{train.jsonl.gz,eval.jsonl}"
    )
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument(
        "--work", type=Path, required=True, help="directory for checkpoints, packed text and the log"
    )
    parser.add_argument("--output", type=Path, required=True, help="directory of the finished model")
    parser.add_argument("--tokens", type=float, default=20e6, help="token budget (default 2e7)")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="time limit in minutes (default: none)"
    )
    parser.add_argument("--micro-batch-size", type=int, default=8, help="sequences of 512 tokens in one pass")
    parser.add_argument("--num-micro-batches", type=int, default=1, help="passes in one optimiser step")
    parser.add_argument("--width", type=int, default=256, help="hidden size, a multiple of 128 (default 256)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument(
        "--no-compile", action="store_true", help="run eagerly even where compilation is possible"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's own choice)")
    arguments = parser.parse_args()

    settings = PretrainSettings(
        max_tokens=int(arguments.tokens),
        max_seconds=arguments.minutes * 60,
        micro_batch_size=arguments.micro_batch_size,
        num_micro_batches=arguments.num_micro_batches,
    )
    compiled = False if arguments.no_compile else None
    hardware = choose_hardware(dtype=arguments.dtype, compiled=compiled, num_threads=arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    log = LossLog(arguments.work / "base.jsonl")
    config = base_config(
        len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, width=arguments.width
    )

    def sequences_of(length: int) -> NDArray[np.uint16]:
        return general_sequences(arguments.data, tokenizer, arguments.work, length, settings.seed)

    model, position = train_growing(config, sequences_of, settings, hardware, arguments.work, log)
    save_checkpoint(model, tokenizer, arguments.output)

    held_out = encode_rows(tokenizer.backend_tokenizer, eval_rows(arguments.data, "general"))
    loss = mean_loss(model.float(), held_out, responses_only=False)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    log.write(
        {
            "event": "end",
            "parameters": num_parameters,
            "steps": position.step,
            "tokens": position.num_tokens,
            "seconds": round(position.seconds),
            "held_out_loss": round(loss, 4),
            "held_out_perplexity": round(math.exp(loss), 2),
        }
    )


if __name__ == "__main__":
    main()
