"""Tokens per second of this engine beside what users would pick instead, on the same weights, in one run.

    python -m benchmarks.compare --threads 2 --json out.json --plot out.png
    python -m benchmarks.compare --target model.gguf --concurrency 1,16 --threads 2 --json out.json

The first compares drafts on a family of fine-tunes, the second weight formats on one model (see ``target_comparison``).

Contestants take turns prompt by prompt, greedy, with no end token, so that all produce the same number of tokens.
Peers are optional (`pip install -e '.[peers]'`); one that is missing is named with the reason. LoRA fine-tunes are
merged for the peers, which is what their users do for speed. Figures are tokens over seconds of all prompts, so ratios
are ratios of sums; the median is over prompts. The last columns tell whether a text is the target's own: tokens equal
to those of transformers, tokens that a float32 pass over the same text would choose, and the worst gap of the others in
logits. Exits with 1 when this engine itself failed, with 2 when there is nothing to measure.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks import comparison_report as report
from benchmarks import machine
from benchmarks.comparison_turns import RUN_FAILED, Record, run_in_turns
from benchmarks.faithfulness import Faithfulness, FaithfulnessCheck
from benchmarks.own_engine import Family, missing_kinds, own_contestants, own_name
from benchmarks.peers import ctranslate2_peer, llama_cpp_peer, openvino_peer, transformers_peer
from benchmarks.peers.interface import (
    Peer,
    PeerModel,
    Prompt,
    build_peers,
)
from benchmarks.peers.plain_checkpoint import write_plain_checkpoint
from benchmarks.prompts import read_prompts
from benchmarks.target_comparison import compare_target
from eda.adapters.serving.model_loader import ModelLoader
from eda.adapters.store.store import AdapterStore
from eda.backends.loading import load_fine_tune
from eda.decoder import SpeculativeDecoder
from eda.formats.weight_settings import WeightSetting
from eda.models.private import PrivateModule
from eda.server.bundled_prompts import PROMPTS_DIRECTORY
from eda.server.engine.speculation import SpeculationTable
from eda.server.model_paths import ModelPaths, model_paths
from eda.server.models import choose_device, load_pair
from eda.server.settings import load_settings
from recipes.acceptance import newest_private_module

ROOT = Path(__file__).parents[1]
DOMAINS = ("math", "code", "medical")
MIXED_CONCURRENCY = 16
PEERS: tuple[Peer, ...] = (
    *transformers_peer.PEERS,
    *llama_cpp_peer.PEERS,
    *openvino_peer.PEERS,
    *ctranslate2_peer.PEERS,
)
ROOM_FOR_DRAFTS = 64


def load_family(
    paths: ModelPaths, domains: Sequence[str], weights: WeightSetting, device: str = "cpu"
) -> Family:
    """The target, its draft, and each domain's fine-tune and newest private module."""
    target, draft = load_pair(paths, choose_device(device), weights)
    fine_tunes = {domain: load_fine_tune(paths.fine_tunes[domain], target, domain) for domain in domains}
    privates: dict[str, PrivateModule] = {}
    if draft is not None and paths.bundled_adapters is not None:
        store, loader = AdapterStore(paths.bundled_adapters), ModelLoader(target, draft)
        for domain in domains:
            private = newest_private_module(store, loader, fine_tunes[domain])
            if private is not None:
                privates[domain] = private
    return Family(target, draft, fine_tunes, privates)


def check_texts(checkpoint: Path, records: Sequence[Record], count: int) -> dict[str, Faithfulness]:
    """Faithfulness of each record's first ``count`` texts; nothing without transformers to compare with."""
    by_name = {record.name: record for record in records}
    if report.TRANSFORMERS not in by_name:
        return {}
    reference = by_name[report.TRANSFORMERS]
    texts = {
        tuple(prompt.token_ids): completion.token_ids
        for prompt, completion in zip(reference.prompts, reference.completions, strict=True)
    }
    check = FaithfulnessCheck(checkpoint)
    results = {}
    for record in records:
        prompts = [prompt.token_ids for prompt in record.prompts[:count]]
        results[record.name] = check.check(
            prompts,
            [completion.token_ids for completion in record.completions[:count]],
            [texts[tuple(prompt)] for prompt in prompts],
        )
    return results


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", type=Path, help="family directory [the bundled one]")
    add("--target", type=Path, help="one model instead of a family: a GGUF file or a directory")
    add("--formats", default="bfloat16,int8,int4", help="this engine's formats with --target [%(default)s]")
    add("--minutes", type=float, default=15.0, help="with --target, no prompt begins after that [15]")
    add("--prompts", type=Path, default=PROMPTS_DIRECTORY)
    add("--domains", default=",".join(DOMAINS))
    add("--num-prompts", type=int, default=8, help="prompts of each domain, from the file's start [8]")
    add("--tokens", type=int, default=256, help="tokens generated for each prompt [256]")
    add("--concurrency", default="1,4,16", help="sequences at a time [1,4,16]")
    add("--threads", type=int, default=0, help="CPU threads of every contestant [torch's choice]")
    add("--weights", default="auto", choices=get_args(WeightSetting))
    add("--calibration", type=Path, help="what to draft at which load, by `eda bench calibrate`")
    add("--only", default="", help="peers whose name contains one of these, separated by commas [all]")
    add("--openvino-exporter", help="Python of an environment with optimum-intel [this one]")
    add("--work", type=Path, default=ROOT / "build" / "peers", help="converted weights, reused [build/peers]")
    add("--checked", type=int, default=4, help="texts of each contestant that are checked [4]")
    add("--pause", type=float, default=0.3, help="seconds of rest before each run [0.3]")
    add("--json", type=Path, help="write the figures to this file")
    add("--plot", type=Path, help="write a plot to this PNG file")
    return parser.parse_args(arguments)


def compare_domain(
    options: argparse.Namespace,
    paths: ModelPaths,
    family: Family,
    decoder: SpeculativeDecoder,
    table: SpeculationTable,
    prompts: Sequence[Prompt],
    max_length: int,
) -> tuple[list[report.Row], dict[str, str]]:
    """Everything for one domain."""
    domain = prompts[0].domain
    work = options.work / f"{domain}-{_short(family.fine_tunes[domain].fingerprint)}"
    work.mkdir(parents=True, exist_ok=True)
    plain = write_plain_checkpoint(paths.target, paths.fine_tunes[domain], work / "plain")
    typed = work / str(family.target.dtype).removeprefix("torch.")
    typed.mkdir(exist_ok=True)
    threads = torch.get_num_threads()
    model = PeerModel(plain, typed, family.target.dtype, threads, max_length, options.openvino_exporter)
    wanted = [part for part in options.only.split(",") if part]
    chosen = [peer for peer in PEERS if not wanted or any(part in peer.name for part in wanted)]
    peers, missing = build_peers(chosen, model)
    missing |= {peer.name: "left out with --only" for peer in PEERS if peer not in chosen}
    concurrencies = [int(part) for part in options.concurrency.split(",")]
    contestants = own_contestants(decoder, family, [domain], concurrencies, table)
    for kind, reason in missing_kinds(family, [domain]).items():
        missing |= {own_name(kind, concurrency): reason for concurrency in concurrencies}
    records, failed = run_in_turns([*contestants, *peers], prompts, options.tokens, pause=options.pause)
    missing |= failed
    return report.rows_of(domain, records, check_texts(plain, records, options.checked)), missing


def compare_mixed(
    options: argparse.Namespace,
    family: Family,
    decoder: SpeculativeDecoder,
    table: SpeculationTable,
    prompts: Sequence[Sequence[Prompt]],
) -> tuple[list[report.Row], dict[str, str]]:
    """Batches of all domains at once: this engine without a draft, and with each row's private module."""
    kinds = ("none", "private")
    domains = list(family.fine_tunes)
    contestants = own_contestants(decoder, family, domains, [MIXED_CONCURRENCY], table, kinds)
    missing = {
        own_name(kind, MIXED_CONCURRENCY): reason
        for kind, reason in missing_kinds(family, domains).items()
        if kind in kinds
    }
    interleaved = [prompt for group in zip(*prompts, strict=True) for prompt in group]
    records, failed = run_in_turns(contestants, interleaved, options.tokens, pause=options.pause)
    return report.rows_of(report.MIXED, records), missing | failed


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if options.target is not None:
        return compare_target(options, machine.command("benchmarks.compare", arguments))
    paths = model_paths(load_settings(None, {"models_dir": options.models}))
    wanted = options.domains.split(",")
    domains = [domain for domain in wanted if domain in paths.fine_tunes]
    for domain in wanted:
        if domain not in domains:
            print(f"missing from this comparison: the domain {domain} (no such fine-tune in the family)")
    if not domains:
        return 2
    family = load_family(paths, domains, options.weights)
    tokenizer = AutoTokenizer.from_pretrained(paths.target)
    prompts = [read_prompts(options.prompts, domain, options.num_prompts, tokenizer) for domain in domains]
    prompts = [group[: min(map(len, prompts))] for group in prompts]
    longest = max(len(prompt.token_ids) for group in prompts for prompt in group)
    max_length = longest + options.tokens + ROOM_FOR_DRAFTS
    most = max(MIXED_CONCURRENCY, *(int(part) for part in options.concurrency.split(",")))
    decoder = SpeculativeDecoder.for_models(family.target, family.draft, num_slots=max_length * most)
    table = SpeculationTable.default(decoder.backend.costs)
    if options.calibration:
        table = SpeculationTable.load(options.calibration)
    settings = {
        "weights": ", ".join(family.target.weight_formats),
        "command": machine.command("benchmarks.compare", arguments),
        "machine": machine.description(),
        "backend": decoder.backend.name,
        "threads": torch.get_num_threads(),
        "num_prompts": len(prompts[0]),
        "tokens": options.tokens,
        "target": family.target.fingerprint[:16],
        "torch": torch.__version__,
        "load_average": machine.load_average(),
    }
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    if settings["load_average"] > 0.5:
        print("warning: other processes are running on this machine; ratios hold, tokens/s may not")

    rows: list[report.Row] = []
    missing: list[tuple[str, dict[str, str]]] = []
    for domain, group in zip(domains, prompts, strict=True):
        domain_rows, absent = compare_domain(options, paths, family, decoder, table, group, max_length)
        rows += domain_rows
        missing.append((domain, absent))
        print(report.table(f"{domain}: {len(group)} prompts", domain_rows), flush=True)
    mixed_rows, absent = compare_mixed(options, family, decoder, table, prompts)
    rows += mixed_rows
    missing.append((report.MIXED, absent))
    print(report.table("mixed: all domains in one batch", mixed_rows))
    means = report.means_over_domains(rows)
    print(report.table("mean over domains (shares and gaps: the worst)", means))
    reasons = report.missing_reasons(missing)
    print("", *report.missing_lines(reasons), sep="\n")
    settings["load_average_after"] = machine.load_average()
    if options.json is not None:
        document = {
            "kind": "family",
            "settings": settings,
            "missing": reasons,
            "rows": [row.as_json() for row in rows],
            "means": [row.as_json() for row in means],
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if options.plot is not None:
        title = (
            f"{settings['weights']}, {settings['threads']} threads, {options.tokens} tokens for each prompt"
        )
        try:
            report.write_plot(rows, options.plot, title)
        except ImportError:
            print("no plot: matplotlib is not installed (pip install -e '.[bench]')")
    return (
        1 if any(name.startswith("ours") and RUN_FAILED in reason for name, reason in reasons.items()) else 0
    )


def _short(fingerprint: str) -> str:
    return "-".join(part[:8] for part in fingerprint.split("+"))


if __name__ == "__main__":
    sys.exit(main())
