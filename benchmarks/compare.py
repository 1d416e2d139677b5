"""Tokens per second of this engine beside what users would pick instead, on the same weights, in one run.

    python -m benchmarks.compare --models models --prompts benchmarks/prompts --tokens 256 --json out.json

Contestants take turns prompt by prompt, so that a machine that gets slower in the meantime does so for all. Greedy,
no end token, so that all produce the same number of tokens. Figures are medians over prompts, ratios are taken of the
sums. Engines that are not installed are named as missing, never left out silently.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from adapters.loading import ModelLoader
from adapters.store import AdapterStore
from eda.generation import GenerationRequest, generate
from eda.private import PrivateModule
from eda.sampling import SamplingParams
from eda.speculative import Speculation, SpeculativeDecoder
from eda.target import FineTune, TargetModel, load_fine_tune
from server.models import choose_device, load_pair, model_paths
from server.settings import load_settings

DOMAINS = ("math", "code", "medical")
GREEDY = SamplingParams(temperature=0.0)
OTHER_ENGINES = {
    "llama.cpp": "llama_cpp",
    "OpenVINO GenAI": "openvino_genai",
    "CTranslate2": "ctranslate2",
}


@dataclass
class Contestant:
    """One way to generate: ``run`` completes prompts of token ids and returns how many tokens came out."""

    name: str
    run: Callable[[Sequence[list[int]], int], int]
    concurrency: int = 1
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    acceptance: list[tuple[int, int]] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return sum(self.tokens) / sum(self.seconds)

    @property
    def acceptance_length(self) -> float:
        passes = sum(count for count, _ in self.acceptance)
        return 1.0 + sum(accepted for _, accepted in self.acceptance) / passes if passes else 1.0


class OurEngine:
    """This engine on one fine-tune, with one kind of draft."""

    def __init__(
        self,
        decoder: SpeculativeDecoder,
        fine_tune: FineTune,
        private: PrivateModule | None,
        speculation: Speculation,
        concurrency: int,
    ) -> None:
        self.decoder, self.fine_tune, self.private = decoder, fine_tune, private
        self.speculation, self.concurrency = speculation, concurrency
        self.contestant: Contestant | None = None

    def __call__(self, prompts: Sequence[list[int]], max_tokens: int) -> int:
        requests = [
            GenerationRequest(
                prompt, max_tokens, sampling=GREEDY, speculation=self.speculation, private=self.private
            )
            for prompt in prompts
        ]
        generations = generate(self.decoder, self.fine_tune, requests, max_batch=self.concurrency)
        if self.contestant is not None:
            steps = [step for generation in generations for step in generation.steps]
            self.contestant.acceptance.append((len(steps), sum(accepted for _, accepted in steps)))
        return sum(len(generation.token_ids) for generation in generations)


def transformers_contestant(model: Any, name: str, **options: Any) -> Contestant:
    """``generate`` of transformers, one prompt at a time."""

    def run(prompts: Sequence[list[int]], max_tokens: int) -> int:
        total = 0
        for prompt in prompts:
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                output = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_tokens,
                    do_sample=False,
                    repetition_penalty=1.0,
                    eos_token_id=None,
                    pad_token_id=0,
                    **options,
                )
            total += output.shape[1] - len(prompt)
        return total

    return Contestant(name, run)


def our_contestants(
    target: TargetModel,
    draft: Any,
    fine_tune: FineTune,
    private: PrivateModule | None,
    concurrencies: Sequence[int],
    num_slots: int,
) -> list[Contestant]:
    """Plain, shared and private drafting at each concurrency: trees for a lone sequence, chains for a batch."""
    decoder = SpeculativeDecoder(target, draft, num_slots=num_slots)
    contestants = []
    for concurrency in concurrencies:
        shape = (
            Speculation("tree", 5) if concurrency == 1 else Speculation("chain", 4 if concurrency <= 4 else 2)
        )
        kinds: dict[str, tuple[PrivateModule | None, Speculation]] = {"none": (None, Speculation("none"))}
        if draft is not None:
            kinds["shared"] = (None, shape)
        if private is not None:
            kinds["private"] = (private, shape)
        for kind, (module, speculation) in kinds.items():
            engine = OurEngine(decoder, fine_tune, module, speculation, concurrency)
            contestant = Contestant(f"ours, {kind}, x{concurrency}", engine, concurrency)
            engine.contestant = contestant
            contestants.append(contestant)
    return contestants


def measure(contestants: Sequence[Contestant], prompts: Sequence[list[int]], max_tokens: int) -> None:
    """Runs every contestant on every prompt, in turns; those of higher concurrency get that many prompts at once."""
    for contestant in contestants:
        contestant.run(prompts[:1], 16)
        contestant.acceptance.clear()
    for place, prompt in enumerate(prompts):
        turn = place % len(contestants)
        for contestant in [*contestants[turn:], *contestants[:turn]]:
            together = [prompts[(place + offset) % len(prompts)] for offset in range(contestant.concurrency)]
            start = time.perf_counter()
            count = contestant.run([prompt] if contestant.concurrency == 1 else together, max_tokens)
            contestant.seconds.append(time.perf_counter() - start)
            contestant.tokens.append(count)


def report(domain: str, contestants: Sequence[Contestant]) -> list[dict[str, Any]]:
    """Prints a table and returns its rows."""
    by_name = {contestant.name: contestant for contestant in contestants}
    rows = []
    print(f"\n{domain}: {len(contestants[0].tokens)} prompts")
    print(f"{'':34}{'tokens/s':>10}{'median':>10}{'accepted':>10}{'/ ours none':>13}{'/ transformers':>16}")
    for contestant in contestants:
        plain = by_name[f"ours, none, x{contestant.concurrency}"].tokens_per_second
        reference = by_name["transformers generate"].tokens_per_second
        each = [count / seconds for count, seconds in zip(contestant.tokens, contestant.seconds, strict=True)]
        row = {
            "domain": domain,
            "name": contestant.name,
            "tokens_per_second": contestant.tokens_per_second,
            "median_tokens_per_second": statistics.median(each),
            "acceptance_length": contestant.acceptance_length,
            "ratio_to_our_plain": contestant.tokens_per_second / plain,
            "ratio_to_transformers": contestant.tokens_per_second / reference,
        }
        rows.append(row)
        print(
            f"{contestant.name:34}{row['tokens_per_second']:10.1f}{row['median_tokens_per_second']:10.1f}"
            f"{row['acceptance_length']:10.2f}{row['ratio_to_our_plain']:12.2f}x{row['ratio_to_transformers']:15.2f}x"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, help="family directory [the bundled one]")
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "prompts")
    parser.add_argument(
        "--num-prompts", type=int, default=8, help="prompts of each domain, from the file's start"
    )
    parser.add_argument("--tokens", type=int, default=256, help="tokens generated for each prompt")
    parser.add_argument("--concurrency", default="1,4,16")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    transformers_logging.set_verbosity_error()

    settings = load_settings(None, {"models_dir": arguments.models})
    paths = model_paths(settings)
    device = choose_device("cpu")
    target, draft = load_pair(paths, device, "auto")
    tokenizer = AutoTokenizer.from_pretrained(paths.target)
    concurrencies = [int(part) for part in arguments.concurrency.split(",")]
    print(
        f"{target.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.tokens} tokens each"
    )
    for name, module in OTHER_ENGINES.items():
        state = (
            "installed, but not measured by this script yet"
            if importlib.util.find_spec(module)
            else "not installed"
        )
        print(f"missing from this comparison: {name} ({state})")

    rows: list[dict[str, Any]] = []
    for domain in DOMAINS:
        if domain not in paths.fine_tunes:
            print(f"\n{domain}: no such fine-tune in the family")
            continue
        fine_tune = load_fine_tune(paths.fine_tunes[domain], target, domain)
        private = None
        if draft is not None and paths.bundled_adapters is not None:
            store = AdapterStore(paths.bundled_adapters)
            for version in store.versions(domain)[-1:]:
                loader = ModelLoader(target, draft)
                private = loader.private_module(store, domain, version, fine_tune.fingerprint)[1]
        lines = (arguments.prompts / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": json.loads(line)["prompt"]}],
                add_generation_prompt=True,
                return_dict=False,
            )
            for line in lines[: arguments.num_prompts]
        ]
        longest = max(map(len, prompts)) + arguments.tokens + 64
        contestants = our_contestants(
            target, draft, fine_tune, private, concurrencies, longest * max(concurrencies)
        )
        reference = load_reference(paths.target, paths.fine_tunes[domain], target.dtype)
        contestants += [
            transformers_contestant(reference, "transformers generate"),
            transformers_contestant(reference, "transformers prompt lookup", prompt_lookup_num_tokens=5),
        ]
        measure(contestants, prompts, arguments.tokens)
        rows += report(domain, contestants)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def load_reference(base: Path, path: Path, dtype: torch.dtype) -> Any:
    """The fine-tune in plain transformers; a LoRA is merged, which is what its users do for speed."""
    if not (path / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, path).merge_and_unload().eval()


if __name__ == "__main__":
    main()
