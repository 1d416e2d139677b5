"""All measurements of weight formats, part by part: each in a process of its own, with a limit in time.

    python -m benchmarks.measure_formats --target model.gguf --data held-out.jsonl --threads 2 --out build/measurements

A part writes ``PART.json``; one whose file is there is not run again, so a run that was cut off goes on where it was.
At the end the tables of all parts are written to ``tables.md``.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measurement_tables import section_of

SPARE_MINUTES = 10.0
"""For what a part does beside measuring: converting weights, loading, checking texts."""


@dataclass(frozen=True, slots=True)
class Part:
    """One command; it may measure for ``minutes``, and is ended ``SPARE_MINUTES`` after that."""

    name: str
    arguments: tuple[str, ...]
    minutes: float


def parts(options: argparse.Namespace) -> list[Part]:
    """All parts in the order of running."""
    shared = ("--threads", str(options.threads), "--work", str(options.work))
    target = ("--target", str(options.target))
    exporter = ("--openvino-exporter", options.openvino_exporter) if options.openvino_exporter else ()
    minutes = ("--minutes", f"{options.minutes:g}")
    turns = ("--turns", str(options.turns))
    texts = ("--num-prompts", str(options.num_prompts), "--tokens", str(options.tokens))
    compare = ("benchmarks.compare", *target, *shared, *minutes, *texts)
    passes = ("benchmarks.passes", *shared, *minutes, *turns)
    made = [
        Part("passes-smollm2-135m", (*passes, "--shape", "smollm2-135m"), options.minutes),
        Part(
            "passes-qwen2.5-1.5b",
            (
                *(*passes, "--shape", "qwen2.5-1.5b", "--weights", "int8", "int4"),
                *("--kinds", "Q8_0", "Q4_0", "Q4_K_M"),
            ),
            options.minutes,
        ),
        Part("alone", (*compare, "--concurrency", "1", *exporter), options.minutes),
        Part("sixteen", (*compare, "--concurrency", "16"), options.minutes),
    ]
    if options.data is not None:
        quality = ("benchmarks.quality", *shared, *minutes, "--data", str(options.data))
        size = ("--tokens", str(options.quality_tokens))
        made += [
            Part(f"quality-{path.stem}", (*quality, *size, "--target", str(path)), options.minutes)
            for path in (options.target, *options.more_targets)
        ]
    return made


def run(part: Part, out: Path) -> str | None:
    """Runs a part unless its figures are there; gives what went wrong."""
    path = out / f"{part.name}.json"
    if path.exists():
        return None
    unfinished = path.with_suffix(".unfinished")
    command = [sys.executable, "-m", *part.arguments, "--json", str(unfinished)]
    with (out / f"{part.name}.log").open("w", encoding="utf-8") as log:
        try:
            limit = 60 * (part.minutes + SPARE_MINUTES)
            code = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return f"ended after {part.minutes + SPARE_MINUTES:g} minutes"
    if not unfinished.exists():
        return f"exit code {code}; see {part.name}.log"
    unfinished.rename(path)
    return None if code == 0 else f"exit code {code}; see {part.name}.log"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--target", type=Path, required=True, help="a GGUF file or a directory")
    add("--more-targets", type=Path, nargs="*", default=[], help="others whose quality is measured")
    add("--data", type=Path, help="JSON lines with held-out texts; without it no quality is measured")
    add("--out", type=Path, default=Path("build/measurements"))
    add("--work", type=Path, default=Path("build/peers"), help="converted weights, reused [build/peers]")
    add("--threads", type=int, default=2)
    add("--minutes", type=float, default=10.0, help="of measuring in each part, at most [10]")
    add("--turns", type=int, default=8, help="of passes [8]")
    add("--num-prompts", type=int, default=4, help="of each domain [4]")
    add("--tokens", type=int, default=128, help="generated for each prompt [128]")
    add("--quality-tokens", type=int, default=16384)
    add("--openvino-exporter", help="Python of an environment with optimum-intel")
    add("--only", default="", help="parts whose name contains this [all]")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    chosen = [part for part in parts(options) if options.only in part.name]
    for part in chosen:
        start = time.monotonic()
        problem = run(part, options.out)
        failed += problem is not None
        print(f"{part.name}: {problem or 'done'}, {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
    files = [options.out / f"{part.name}.json" for part in parts(options)]
    sections = [section_of(path) for path in files if path.exists()]
    (options.out / "tables.md").write_text("\n".join(sections), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
