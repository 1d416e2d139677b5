"""Fine-tune the base model for one domain: all weights, or a LoRA adapter.

    python -m recipes.fine_tune --data DATA --base BASE --domain math --kind full --work WORK --output OUT --minutes 5

Only the tokens of the responses are learnt. Training ends at the token budget or at the time limit, whichever comes
first. Started again, it goes on from its last checkpoint.
"""

import argparse
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.attention import use_blocked_attention
from recipes.domain_rows import fine_tune_rows, held_out_rows
from recipes.hardware import Hardware, choose_hardware
from recipes.head_loss import head_loss
from recipes.held_out import mean_loss
from recipes.optimizer import rate_scale
from recipes.pretrain import save_checkpoint
from recipes.text import FINE_TUNE_DOMAINS, EncodedRow, encode_rows
from recipes.training_loop import Steps, run_steps
from recipes.training_state import LossLog, Position

LORA_RANK = 16
LORA_ALPHA = 32
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class FineTuneSettings:
    """What a fine-tune is trained with. `matrix_rate` is Muon's; `None` leaves every parameter to AdamW."""

    max_tokens: int  # prompts included, padding not
    matrix_rate: float | None
    other_rate: float
    max_seconds: float = math.inf
    tokens_per_step: int = 2048
    max_length: int = 768
    seed: int = 0
    checkpoint_seconds: float = 60.0
    log_every: int = 10


def default_settings(kind: str, max_tokens: int, max_seconds: float) -> FineTuneSettings:
    """Rates for a strong shift in few steps: a third of the base's for all weights, AdamW for the thin LoRA factors."""
    if kind == "full":
        return FineTuneSettings(max_tokens, matrix_rate=0.008, other_rate=1e-3, max_seconds=max_seconds)
    return FineTuneSettings(max_tokens, matrix_rate=None, other_rate=3e-3, max_seconds=max_seconds)


def add_lora(base: LlamaForCausalLM, base_name: str, seed: int, rank: int = LORA_RANK) -> PeftModel:
    """Wrap `base` with a LoRA on every linear layer; only its factors are trainable.

    Rank 16 keeps an adapter at 3 MB. `base_name` is what the saved adapter names as its base.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=LORA_ALPHA * rank // LORA_RANK,
        lora_dropout=0.0,
        target_modules=LORA_MODULES,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = base_name
    return model


def response_loss(trunk: nn.Module, head: Tensor, token_ids: Tensor, labels: Tensor) -> Tensor:
    """Mean loss in nats over the labels that are not -100; both arguments are `[batch, width]`, padded on the right.

    No mask is needed: a causal model cannot see padding that comes later.
    """
    hidden = trunk(input_ids=token_ids[:, :-1], use_cache=False).last_hidden_state
    used = labels[:, 1:] >= 0
    return head_loss(hidden[used], head, labels[:, 1:][used])


def collate(rows: Sequence[EncodedRow], max_length: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels, `[batch, width]`; labels of prompts and of padding are -100."""
    width = min(max(len(row.token_ids) for row in rows), max_length)
    token_ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for index, row in enumerate(rows):
        ids = torch.tensor(row.token_ids[:width])
        token_ids[index, : len(ids)] = ids
        labels[index, row.num_prompt_tokens : len(ids)] = ids[row.num_prompt_tokens :]
    return token_ids, labels


def step_batches(
    rows: Sequence[EncodedRow], settings: FineTuneSettings, first_step: int
) -> Iterator[list[EncodedRow]]:
    """Batches of about `tokens_per_step` tokens, from `first_step` on, the same for any start.

    Rows of similar length go together, so that little is padded: windows of the shuffled rows are sorted by length
    and cut into batches, and the batches of a window shuffled.
    """
    usable = [row for row in rows if row.num_prompt_tokens < settings.max_length]
    step = 0
    epoch = 0
    while True:
        order = random.Random(f"{settings.seed}/{epoch}")
        shuffled_rows = usable[:]
        order.shuffle(shuffled_rows)
        for start in range(0, len(shuffled_rows), 256):
            window = sorted(shuffled_rows[start : start + 256], key=lambda row: len(row.token_ids))
            batches: list[list[EncodedRow]] = [[]]
            for row in window:
                if batches[-1] and (len(batches[-1]) + 1) * len(row.token_ids) > settings.tokens_per_step:
                    batches.append([])
                batches[-1].append(row)
            order.shuffle(batches)
            for batch in batches:
                if step >= first_step:
                    yield batch
                step += 1
        epoch += 1


def train(
    model: LlamaForCausalLM | PeftModel,
    rows: Sequence[EncodedRow],
    settings: FineTuneSettings,
    hardware: Hardware,
    checkpoint: Path,
    log: LossLog,
    stop_after_steps: int | None = None,
) -> Position:
    """Train in place until the budget is used (or `stop_after_steps`, to interrupt a run on purpose)."""
    model.to(hardware.device).train()
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    if hardware.device == "cpu":
        use_blocked_attention(causal_lm)

    def backward(batch: list[EncodedRow]) -> tuple[float, int]:
        token_ids, labels = (tensor.to(hardware.device) for tensor in collate(batch, settings.max_length))
        with hardware.autocast():
            loss = response_loss(causal_lm.model, causal_lm.lm_head.weight, token_ids, labels)
        torch.autograd.backward(loss)
        return float(loss.detach()), sum(min(len(row.token_ids), settings.max_length) for row in batch)

    return run_steps(
        model,
        Steps(
            lambda first: step_batches(rows, settings, first),
            backward,
            partial(rate_scale, warm_up=0.05, decay=0.6),
        ),
        settings,
        hardware,
        checkpoint,
        log,
        start=Position(),
        stop_after_steps=stop_after_steps,
        started={"rows": len(rows)},
    )


def save_fine_tune(
    model: LlamaForCausalLM | PeftModel, tokenizer: PreTrainedTokenizerFast, output: Path
) -> None:
    """Write a full checkpoint with its tokenizer, or a PEFT adapter, in bfloat16."""
    if isinstance(model, PeftModel):
        model.to(torch.bfloat16)
        # peft would look for the base by its name (online even) to see whether its embeddings were resized.
        model.save_pretrained(output, save_embedding_layers=False)
        (output / "README.md").unlink(missing_ok=True)  # peft's empty model card
    else:
        save_checkpoint(model, tokenizer, output)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="directory with <domain>/{train.jsonl.gz,eval.jsonl}"
    )
    parser.add_argument("--base", type=Path, required=True, help="directory of the base model")
    parser.add_argument("--domain", choices=FINE_TUNE_DOMAINS, required=True)
    parser.add_argument("--kind", choices=("full", "lora"), required=True)
    parser.add_argument("--work", type=Path, required=True, help="directory for checkpoints and the log")
    parser.add_argument("--output", type=Path, required=True, help="directory of the finished fine-tune")
    parser.add_argument(
        "--tokens", type=float, default=3e6, help="token budget, prompts included (default 3e6)"
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="time limit in minutes (default: none)"
    )
    parser.add_argument(
        "--held-out", type=int, default=200, help="held-out rows that the loss is reported on"
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's own choice)")
    arguments = parser.parse_args()

    name = f"{arguments.domain}-{arguments.kind}"
    # Batches differ in width, so compiling would cost more than a run of minutes gains.
    hardware = choose_hardware(dtype=arguments.dtype, compiled=False, num_threads=arguments.threads)
    settings = default_settings(arguments.kind, int(arguments.tokens), arguments.minutes * 60)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    rows = encode_rows(
        tokenizer.backend_tokenizer, fine_tune_rows(arguments.data, arguments.domain, settings.seed)
    )
    held_out = encode_rows(
        tokenizer.backend_tokenizer, held_out_rows(arguments.data, arguments.domain, arguments.held_out)
    )
    base = LlamaForCausalLM.from_pretrained(arguments.base, dtype=torch.float32).to(hardware.device)
    loss_before = mean_loss(base, held_out, responses_only=True)
    model = base if arguments.kind == "full" else add_lora(base, arguments.base.name, settings.seed)

    log = LossLog(arguments.work / f"{name}.jsonl")
    log.write({"event": "held_out", "when": "before", "loss": round(loss_before, 4)})
    position = train(model, rows, settings, hardware, arguments.work / f"{name}_state.safetensors", log)
    loss_after = mean_loss(model, held_out, responses_only=True)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    save_fine_tune(model, tokenizer, arguments.output)
    log.write(
        {
            "event": "end",
            "domain": arguments.domain,
            "kind": arguments.kind,
            "trained_parameters": trained,
            "steps": position.step,
            "tokens": position.num_tokens,
            "seconds": round(position.seconds),
            "held_out_loss_before": round(loss_before, 4),
            "held_out_loss_after": round(loss_after, 4),
        }
    )


if __name__ == "__main__":
    main()
