"""Make the bundled family from the data, one stage after the other.

    python -m recipes.build --data DATA --work WORK --output models

A stage whose result exists is skipped, and an interrupted training stage goes on from its last checkpoint, so the same
command finishes what was begun. Results are built in the work directory and copied to the output directory once they
are complete.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.text import FINE_TUNE_DOMAINS

# One full fine-tune is the hard case for a draft; more than one would not fit into the size that is bundled.
BUNDLED_KINDS = {"math": "full", "code": "lora", "medical": "lora"}


@dataclass(frozen=True)
class Stage:
    """A command that makes one file or directory."""

    name: str
    result: Path
    command: Sequence[str]  # module and arguments; `{result}` stands for where to write


@dataclass(frozen=True)
class Limits:
    """Budgets of the training stages, in tokens and minutes; whichever is used up first ends a stage."""

    base_tokens: float
    base_minutes: float
    fine_tune_tokens: float
    fine_tune_minutes: float


def stages(data: Path, work: Path, limits: Limits, all_kinds: bool, threads: int) -> list[Stage]:
    """All stages in order: the bundled fine-tunes first, then (with `all_kinds`) the kinds made to be compared."""
    common = ["--threads", str(threads)]
    listed = [
        Stage(
            "tokenizer",
            work / "tokenizer",
            ["recipes.train_tokenizer", "--data", str(data), "--output", "{result}"],
        ),
        Stage(
            "base",
            work / "base",
            [
                *("recipes.pretrain", "--data", str(data), "--tokenizer", str(work / "tokenizer")),
                *("--work", str(work / "run"), "--output", "{result}"),
                *("--tokens", str(limits.base_tokens), "--minutes", str(limits.base_minutes), *common),
            ],
        ),
    ]
    kinds = list(BUNDLED_KINDS.items())
    if all_kinds:
        kinds += [(domain, "lora" if kind == "full" else "full") for domain, kind in BUNDLED_KINDS.items()]
    for domain, kind in kinds:
        listed.append(
            Stage(
                f"{domain}-{kind}",
                work / f"{domain}-{kind}",
                [
                    *("recipes.fine_tune", "--data", str(data), "--base", str(work / "base")),
                    *(
                        "--domain",
                        domain,
                        "--kind",
                        kind,
                        "--work",
                        str(work / "run"),
                        "--output",
                        "{result}",
                    ),
                    *(
                        "--tokens",
                        str(limits.fine_tune_tokens),
                        "--minutes",
                        str(limits.fine_tune_minutes),
                        *common,
                    ),
                ],
            )
        )
    return listed


def run_stage(stage: Stage) -> None:
    """Run one stage unless its result is there; the result appears in one operation, when it is complete."""
    if stage.result.exists():
        print(f"{stage.name}: done already", flush=True)
        return
    began = time.monotonic()
    # A checkpoint's directory may be named in what is written (an adapter names its base), so only the parent differs.
    partial = stage.result.parent / "partial" / stage.result.name
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    command = [
        argument.format(result=partial) if argument == "{result}" else argument for argument in stage.command
    ]
    print(f"{stage.name}: {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", *command], check=True)
    os.replace(partial, stage.result)
    partial.parent.rmdir()
    print(f"{stage.name}: {time.monotonic() - began:.0f} s", flush=True)


def publish(work: Path, output: Path) -> None:
    """Copy the base and the bundled fine-tunes to the output directory."""
    for name in ("base", *FINE_TUNE_DOMAINS):
        source = work / ("base" if name == "base" else f"{name}-{BUNDLED_KINDS[name]}")
        target = output / name
        if not target.exists():
            partial = output / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
            os.replace(partial, target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="directory with general, math, code and medical"
    )
    parser.add_argument("--work", type=Path, default=Path("work"), help="directory for intermediate files")
    parser.add_argument(
        "--output", type=Path, default=Path("models"), help="directory of the finished family"
    )
    parser.add_argument("--base-tokens", type=float, default=20e6)
    parser.add_argument("--base-minutes", type=float, default=50.0)
    parser.add_argument("--fine-tune-tokens", type=float, default=3e6)
    parser.add_argument("--fine-tune-minutes", type=float, default=6.0)
    parser.add_argument(
        "--bundled-only", action="store_true", help="leave out the kinds made only to be compared"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's own choice)")
    arguments = parser.parse_args()

    limits = Limits(
        arguments.base_tokens, arguments.base_minutes, arguments.fine_tune_tokens, arguments.fine_tune_minutes
    )
    listed = stages(arguments.data, arguments.work, limits, not arguments.bundled_only, arguments.threads)
    bundled = 2 + len(BUNDLED_KINDS)
    for stage in listed[:bundled]:
        run_stage(stage)
    arguments.output.mkdir(parents=True, exist_ok=True)
    publish(arguments.work, arguments.output)
    for stage in listed[bundled:]:
        run_stage(stage)
    # Later stages belong here: the shared draft (`eda train-draft`) and one adapter a domain (`eda adapt`).
    cards = arguments.work / "model_cards.json"
    run_stage(
        Stage(
            "evaluation",
            cards,
            [
                *("recipes.evaluate", "--data", str(arguments.data), "--models", str(arguments.output)),
                *(
                    "--work",
                    str(arguments.work / "run"),
                    "--output",
                    "{result}",
                    "--threads",
                    str(arguments.threads),
                ),
            ],
        )
    )
    run_stage(
        Stage(
            "model cards",
            arguments.output / "README.md",
            [
                *("recipes.model_cards", "--data", str(arguments.data), "--cards", str(cards)),
                *("--output", "{result}"),
            ],
        )
    )


if __name__ == "__main__":
    main()
