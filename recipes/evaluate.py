"""What the finished models write: greedy answers to held-out prompts, and how many of them loop.

    python -m recipes.evaluate --data DATA --models MODELS --work WORK --output model_cards.json

Joined with the losses that the training stages logged, the result is what `recipes.model_cards` renders.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.domain_rows import demonstration_prompts, held_out_rows
from recipes.hardware import choose_hardware
from recipes.held_out import mean_loss
from recipes.text import DOMAINS, FINE_TUNE_DOMAINS, encode_rows, render_prompt


def loops(token_ids: Sequence[int], length: int = 8, times: int = 3) -> bool:
    """Whether some run of `length` tokens occurs `times` times or more."""
    runs = Counter(tuple(token_ids[start : start + length]) for start in range(len(token_ids) - length + 1))
    return any(count >= times for count in runs.values())


@torch.inference_mode()
def greedy_answers(
    model: LlamaForCausalLM | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 50,
) -> list[list[int]]:
    """Token ids of the greedy answers, end marker and padding left out."""
    model.eval()
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # The bundled defaults (sampling, repetition penalty) would fill in whatever is not set here.
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    inner.generation_config = greedy
    answers: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        texts = [render_prompt(prompt) for prompt in prompts[start : start + batch_size]]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(inner.device)
        output = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=greedy
        )
        for row in output[:, batch["input_ids"].shape[1] :].tolist():
            stop = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            answers.append(row[:stop])
    return answers


def load_model(directory: Path, base: Path) -> LlamaForCausalLM | PeftModel:
    """A full checkpoint, or a LoRA adapter on `base`, in float32."""
    if (directory / "adapter_config.json").exists():
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, directory)
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)


def last_record(log: Path, event: str) -> dict[str, object]:
    """The last record of this event in a loss log; empty when there is none."""
    found: dict[str, object] = {}
    if log.exists():
        for line in log.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record.get("event") == event:
                found = record
    return found


def measure(
    model: LlamaForCausalLM | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    data: Path,
    domain: str,
    num_prompts: int,
    num_samples: int,
    max_new_tokens: int,
    seed: int = 0,
) -> dict[str, object]:
    """Share of looping answers on held-out prompts of a domain, with the first answers as samples."""
    prompts = demonstration_prompts(data, domain, num_prompts, seed)
    answers = greedy_answers(model, tokenizer, prompts, max_new_tokens)
    return {
        "num_prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "loop_share": sum(map(loops, answers)) / len(answers),
        "ended_share": sum(len(answer) < max_new_tokens for answer in answers) / len(answers),
        "samples": [
            {"prompt": prompt, "answer": tokenizer.decode(answer), "loops": loops(answer)}
            for prompt, answer in list(zip(prompts, answers, strict=True))[:num_samples]
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--models", type=Path, required=True, help="directory with base, math, code and medical"
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="directory with the loss logs of the training stages"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts a domain")
    parser.add_argument("--samples", type=int, default=20, help="answers kept a domain")
    parser.add_argument("--max-tokens", type=int, default=160, help="longest answer in tokens")
    parser.add_argument(
        "--held-out", type=int, default=200, help="held-out rows a domain for the table of losses"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's own choice)")
    arguments = parser.parse_args()

    hardware = choose_hardware(num_threads=arguments.threads)
    base_directory = arguments.models / "base"
    tokenizer = AutoTokenizer.from_pretrained(base_directory)
    held_out = {
        domain: encode_rows(
            tokenizer.backend_tokenizer, held_out_rows(arguments.data, domain, arguments.held_out)
        )
        for domain in DOMAINS
    }
    cards: dict[str, object] = {}
    for name in ("base", *FINE_TUNE_DOMAINS):
        model = load_model(arguments.models / name, base_directory).to(hardware.device)
        kind = "lora" if isinstance(model, PeftModel) else "full"
        domain = "general" if name == "base" else name
        stage = name if name == "base" else f"{name}-{kind}"
        card: dict[str, object] = {
            "training": last_record(arguments.work / f"{stage}.jsonl", "end"),
            "response_losses": {
                other: round(mean_loss(model, held_out[other], responses_only=True), 4) for other in DOMAINS
            },
            "greedy": measure(
                model,
                tokenizer,
                arguments.data,
                domain,
                arguments.prompts,
                arguments.samples,
                arguments.max_tokens,
            ),
        }
        cards[name] = card
        print(f"{name}: {card['response_losses']}", flush=True)
    cards["fine_tunes_measured"] = [
        record
        for domain in FINE_TUNE_DOMAINS
        for kind in ("full", "lora")
        if (record := last_record(arguments.work / f"{domain}-{kind}.jsonl", "end"))
    ]
    arguments.output.write_text(json.dumps(cards, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
