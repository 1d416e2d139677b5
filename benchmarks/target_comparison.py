"""One model in every weight format: this engine's beside those that users of other engines would pick.

Plain decoding, and drafts that need no model. "/ same bits" is the ratio to llama.cpp's plain decoding in as many bits
and with as many sequences at a time. A quantised model is another model, so its text may differ: "1st choice" is the
share of its tokens that a float32 pass over the same text would choose.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks import machine
from benchmarks.comparison_report import missing_lines
from benchmarks.comparison_turns import RUN_FAILED, Record, run_in_turns
from benchmarks.faithfulness import FaithfulnessCheck
from benchmarks.own_engine import (
    DRAFTS_WITHOUT_MODEL,
    OWN_VALUES,
    load_as,
    own_target_name,
    target_contestant,
)
from benchmarks.peers import llama_cpp_peer, openvino_peer, transformers_peer, vllm_peer
from benchmarks.peers.interface import Contestant, MissingPeerError, Peer, PeerModel, build_peers, first_line
from benchmarks.peers.llama_context import build_report
from benchmarks.peers.plain_checkpoint import write_plain_from_gguf
from benchmarks.peers.quantised_gguf import tensor_types
from benchmarks.prompts import read_prompts
from eda.backends.cpu.library import instruction_set

RIVALS = {
    "bfloat16": "llama.cpp bf16",
    "int8": "llama.cpp q8_0",
    "int4": "llama.cpp q4_0",
    OWN_VALUES: llama_cpp_peer.THE_FILE,
}
"""llama.cpp's rows of the same bits."""
ROOM_FOR_DRAFTS = 64


@dataclass(frozen=True, slots=True)
class TargetRow:
    """One line of the table. Ratios are ``None`` where there is nothing to compare with."""

    name: str
    concurrency: int
    tokens_per_second: float
    median_tokens_per_second: float
    tokens_per_round: float | None
    num_turns: int
    ratio_to_our_plain: float | None
    rival: str | None
    ratio_to_rival: float | None
    share_first_choice: float | None = None
    worst_gap: float | None = None


def rows_of(
    records: Sequence[Record], shares: Mapping[str, tuple[float, float]], weights: Sequence[str]
) -> list[TargetRow]:
    """Table rows. ``shares`` holds the share of first choices and the worst gap of some records."""
    speeds = {record.name: record.tokens_per_second for record in records}
    formats = {
        own_target_name(format, kind, record.concurrency): format
        for record in records
        for format in weights
        for kind in DRAFTS_WITHOUT_MODEL
    }

    def ratio(speed: float, other: str | None) -> float | None:
        return None if other not in speeds else speed / speeds[other]

    rows = []
    for record in records:
        format, speed = formats.get(record.name), record.tokens_per_second
        plain = None if format is None else own_target_name(format, "none", record.concurrency)
        rival = None if format is None else llama_cpp_peer.at_once(RIVALS[format], record.concurrency)
        share, gap = shares.get(record.name, (None, None))
        rows.append(
            TargetRow(
                record.name,
                record.concurrency,
                speed,
                record.median_tokens_per_second,
                record.tokens_per_round,
                len(record.seconds),
                ratio(speed, plain),
                rival if rival in speeds else None,
                ratio(speed, rival),
                share,
                gap,
            )
        )
    return rows


def table(rows: Sequence[TargetRow]) -> str:
    """The rows as text."""

    def cell(value: float | None, width: int, form: str) -> str:
        return f"{'-' if value is None else format(value, form):>{width}}"

    lines = [
        "",
        f"{'':40}{'tokens/s':>9}{'median':>8}{'tok/round':>10}{'/plain':>8}{'/same bits':>11}{'1st choice':>11}"
        f"{'gap':>6}",
    ]
    for row in rows:
        lines.append(
            f"{row.name:40}{row.tokens_per_second:9.1f}{row.median_tokens_per_second:8.1f}"
            f"{cell(row.tokens_per_round, 10, '.2f')}{cell(row.ratio_to_our_plain, 8, '.2f')}"
            f"{cell(row.ratio_to_rival, 11, '.2f')}{cell(row.share_first_choice, 11, '.1%')}"
            f"{cell(row.worst_gap, 6, '.2f')}"
        )
    return "\n".join(lines)


def peers_for(file: Path | None, concurrencies: Sequence[int]) -> list[Peer]:
    """Everyone who is asked to take part. ``file`` is the target where it is a GGUF file."""
    kinds = ("BF16", "Q8_0", "Q4_0", "Q4_K_M")
    peers: list[Peer] = []
    for count in concurrencies:
        if count > 1:
            peers += [llama_cpp_peer.plain_peer(kind, count) for kind in kinds]
            peers += [] if file is None else [llama_cpp_peer.file_peer(file, count)]
            continue
        peers += [*transformers_peer.PEERS, *llama_cpp_peer.QUANTISED_PEERS]
        peers += [] if file is None else [llama_cpp_peer.file_peer(file)]
        peers += [*openvino_peer.QUANTISED_PEERS, *vllm_peer.PEERS]
    return peers


def own_contestants(
    plain: Path, file: Path | None, weights: Sequence[str], concurrencies: Sequence[int], max_length: int
) -> tuple[list[Contestant], dict[str, str]]:
    """This engine in each format, with each kind of draft; and the reasons of those that cannot be."""
    contestants, missing = [], {}
    for format in weights:
        try:
            model = load_as(file if file is not None and format == OWN_VALUES else plain, format)
        except Exception as error:  # whatever is wrong with one format, the others shall still be measured
            missing[own_target_name(format, "none", 1)] = f"could not be set up: {first_line(error)}"
            continue
        contestants += [
            target_contestant(model, format, kind, count, max_length)
            for count in concurrencies
            for kind in DRAFTS_WITHOUT_MODEL
        ]
    return contestants, missing


def first_choices(plain: Path, records: Sequence[Record], count: int) -> dict[str, tuple[float, float]]:
    """Of each record's first ``count`` texts, the share of first choices and the worst gap in logits."""
    if count == 0:
        return {}
    check, found = FaithfulnessCheck(plain), {}
    for record in records:
        texts = [completion.token_ids for completion in record.completions[:count]]
        result = check.check([prompt.token_ids for prompt in record.prompts[:count]], texts, texts)
        found[record.name] = (result.share_first_choice, result.worst_gap)
    return found


def _llama_cpp_report(work: Path) -> dict[str, Any]:
    try:
        report = build_report()
    except MissingPeerError as error:
        return {"missing": str(error)}
    return report | {"tensors": {path.stem: tensor_types(path) for path in sorted(work.glob("*.gguf"))}}


def compare_target(options: argparse.Namespace, command: str) -> int:
    """Runs what ``benchmarks.compare`` was told with ``--target``; gives the exit code."""
    file = options.target if options.target.is_file() else None
    work = options.work / f"target-{options.target.stem}"
    work.mkdir(parents=True, exist_ok=True)
    plain = options.target if file is None else write_plain_from_gguf(file, work / "plain")
    tokenizer = AutoTokenizer.from_pretrained(plain)
    groups = [
        read_prompts(options.prompts, domain, options.num_prompts, tokenizer)
        for domain in options.domains.split(",")
    ]
    prompts = [prompt for group in zip(*groups, strict=True) for prompt in group]
    max_length = max(len(prompt.token_ids) for prompt in prompts) + options.tokens + ROOM_FOR_DRAFTS
    concurrencies = [int(part) for part in options.concurrency.split(",")]
    weights = options.formats.split(",") + ([] if file is None else [OWN_VALUES])
    settings = {
        "command": command,
        "target": options.target.name,
        "threads": torch.get_num_threads(),
        "prompts": len(prompts),
        "tokens": options.tokens,
        "torch": torch.__version__,
        "instruction_set": instruction_set(),
        "machine": machine.description(),
        "load_average_before": machine.load_average(),
    }
    own, missing = own_contestants(plain, file, weights, concurrencies, max_length)
    model = PeerModel(
        plain, work, torch.bfloat16, torch.get_num_threads(), max_length, options.openvino_exporter
    )
    wanted = [part for part in options.only.split(",") if part]
    asked = peers_for(file, concurrencies)
    chosen = [peer for peer in asked if not wanted or any(part in peer.name for part in wanted)]
    missing |= {peer.name: "left out with --only" for peer in asked if peer not in chosen}
    peers, absent = build_peers(chosen, model)
    settings["llama_cpp"] = _llama_cpp_report(work)
    machine.print_settings(settings)
    records, failed = run_in_turns(
        [*own, *peers], prompts, options.tokens, pause=options.pause, minutes=options.minutes
    )
    settings["load_average_after"] = machine.load_average()
    missing |= absent | failed
    rows = rows_of(records, first_choices(plain, records, options.checked), weights)
    print(table(rows))
    print(f"load average {settings['load_average_after']} at the end", *missing_lines(missing), sep="\n")
    if options.json is not None:
        document = {
            "kind": "target",
            "settings": settings,
            "missing": missing,
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    failures = [name for name, reason in missing.items() if name.startswith("ours") and RUN_FAILED in reason]
    return 1 if failures else 0
