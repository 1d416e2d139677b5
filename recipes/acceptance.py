"""Acceptance length and speed of the finished family on held-out prompts: no draft, the shared one, adapted.

    python -m recipes.acceptance --data DATA --models MODELS --output acceptance.json

Prompts are the first ones of each domain's `eval.jsonl`, which no stage has trained on or chosen by. Greedy and at
temperature 1; the three ways of decoding take turns prompt by prompt.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from eda.adapters.serving.model_loader import ModelLoader
from eda.adapters.store.store import AdapterStore
from eda.backends.loading import load_fine_tune, load_target
from eda.decoder import SpeculativeDecoder
from eda.models.draft import DraftModel
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateModule
from eda.speculation.kinds import Chain
from eda.training.data.prompts import ChatFormat, Prompt
from eda.training.evaluate import EvaluationConfig, Variant, evaluate
from recipes.text import FINE_TUNE_DOMAINS, eval_rows


def held_out_prompts(data: Path, domain: str, count: int) -> list[Prompt]:
    """The first `count` held-out prompts of a domain."""
    rows = eval_rows(data, domain)[:count]
    return [
        Prompt(f"{domain}-eval-{index}", ({"role": "user", "content": row.prompt},))
        for index, row in enumerate(rows)
    ]


def newest_private_module(
    store: AdapterStore, loader: ModelLoader, fine_tune: FineTune
) -> PrivateModule | None:
    """The private module of the last published version of a fine-tune's adapter; `None` where there is none."""
    versions = store.versions(fine_tune.name)
    if not versions:
        return None
    return loader.private_module(store, fine_tune.name, versions[-1], fine_tune.fingerprint)[1]


def measure_family(models: Path, data: Path, count: int, max_tokens: int, length: int) -> dict[str, Any]:
    """Measurements by model, way of decoding and temperature, as JSON."""
    target = load_target(models / "base")
    draft = DraftModel.load(models / "draft", dtype=target.dtype)
    loader = ModelLoader(target, draft)
    store = AdapterStore(models / "adapters")
    config = EvaluationConfig(max_tokens=max_tokens, speculation=Chain(length))
    decoder = SpeculativeDecoder.for_models(target, draft, num_slots=config.num_slots, seed=0)
    measured: dict[str, Any] = {}
    for name in ("base", *FINE_TUNE_DOMAINS):
        fine_tune = loader.base if name == "base" else load_fine_tune(models / name, target, name)
        variants = {"plain": Variant(decoder, speculates=False), "shared": Variant(decoder)}
        private = None if name == "base" else newest_private_module(store, loader, fine_tune)
        if private is not None:
            variants["private"] = Variant(decoder, private)
        chat = ChatFormat.load(models / "base", eos_ids=target.config.eos_token_ids)
        domain = "general" if name == "base" else name
        prompts = held_out_prompts(data, domain, count)
        results = evaluate(fine_tune, variants, prompts, chat, config)
        measured[name] = {
            variant: {temperature: asdict(value) for temperature, value in by_temperature.items()}
            for variant, by_temperature in results.items()
        }
        greedy = {variant: round(by["0.0"].mean_acceptance_length, 3) for variant, by in results.items()}
        print(f"{name}: {greedy}", flush=True)
    return {
        "prompts": count,
        "max_tokens": max_tokens,
        "num_speculative_tokens": length,
        "dtype": str(target.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "models": measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="directory with <domain>/eval.jsonl")
    parser.add_argument("--models", type=Path, required=True, help="directory of the finished family")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts a domain")
    parser.add_argument("--max-tokens", type=int, default=128, help="longest answer in tokens")
    parser.add_argument("--length", type=int, default=5, help="draft tokens in a chain")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's own choice)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    measured = measure_family(
        arguments.models, arguments.data, arguments.prompts, arguments.max_tokens, arguments.length
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
