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
# The shared draft is trained once, so it may take longer than the defaults of `eda train-draft`.
DRAFT_SETTINGS = ("--num-prompts", "5000", "--epochs", "2")


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


@dataclass(frozen=True)
class Recipe:
    """Where everything lies, and how much of it is made."""

    data: Path
    work: Path
    limits: Limits
    threads: int

    @property
    def training_threads(self) -> list[str]:
        return ["--threads", str(self.threads)]

    @property
    def command_threads(self) -> list[str]:
        return ["--num-threads", str(self.threads)] if self.threads else []

    def directory(self, name: str) -> Path:
        """Where the stage of a model puts it."""
        return self.work / ("base" if name == "base" else f"{name}-{BUNDLED_KINDS[name]}")

    def fine_tune(self, domain: str, kind: str) -> Stage:
        """A fine-tune of one kind."""
        return Stage(
            f"{domain}-{kind}",
            self.work / f"{domain}-{kind}",
            [
                *("recipes.fine_tune", "--data", str(self.data), "--base", str(self.work / "base")),
                *("--domain", domain, "--kind", kind, "--work", str(self.work / "run")),
                *("--output", "{result}", "--tokens", str(self.limits.fine_tune_tokens)),
                *("--minutes", str(self.limits.fine_tune_minutes), *self.training_threads),
            ],
        )

    def adapter(self, domain: str) -> Stage:
        """A domain's adapter: `eda adapt` with its default settings."""
        return Stage(
            f"{domain} adapter",
            self.work / "adapters" / domain / "1",
            [
                *(
                    "eda.server",
                    "adapt",
                    "--target",
                    str(self.work / "base"),
                    "--draft",
                    str(self.work / "draft"),
                ),
                *("--fine-tune", str(self.directory(domain)), "--name", domain),
                *("--prompts", str(self.work / "prompts" / f"{domain}.jsonl")),
                *("--store", str(self.work / "adapters"), "--quiet", *self.command_threads),
            ],
        )

    def bundled(self) -> list[Stage]:
        """The stages that make what is bundled, in order."""
        data, work, limits = str(self.data), self.work, self.limits
        prompts = work / "prompts"
        vocabulary = [
            argument
            for domain in FINE_TUNE_DOMAINS
            for argument in ("--vocabulary-prompts", str(prompts / f"{domain}.jsonl"))
        ]
        return [
            Stage(
                "tokenizer",
                work / "tokenizer",
                ["recipes.train_tokenizer", "--data", data, "--output", "{result}"],
            ),
            Stage(
                "base",
                work / "base",
                [
                    *("recipes.pretrain", "--data", data, "--tokenizer", str(work / "tokenizer")),
                    *(
                        "--work",
                        str(work / "run"),
                        "--output",
                        "{result}",
                        "--tokens",
                        str(limits.base_tokens),
                    ),
                    *("--minutes", str(limits.base_minutes), *self.training_threads),
                ],
            ),
            Stage("prompts", prompts, ["recipes.prompts", "--data", data, "--output", "{result}"]),
            *(self.fine_tune(domain, kind) for domain, kind in BUNDLED_KINDS.items()),
            Stage(
                "draft",
                work / "draft",
                [
                    *("eda.server", "train-draft", "--target", str(work / "base")),
                    *("--prompts", str(prompts / "general.jsonl"), *vocabulary, "--out", "{result}"),
                    *(*DRAFT_SETTINGS, "--quiet", *self.command_threads),
                ],
            ),
            *(self.adapter(domain) for domain in FINE_TUNE_DOMAINS),
        ]

    def compared(self) -> list[Stage]:
        """Fine-tunes of the kinds that are not bundled."""
        return [
            self.fine_tune(domain, "lora" if kind == "full" else "full")
            for domain, kind in BUNDLED_KINDS.items()
        ]


def run_stage(stage: Stage) -> None:
    """Run one stage unless its result is there; the result appears in one operation, when it is complete."""
    if stage.result.exists():
        print(f"{stage.name}: done already", flush=True)
        return
    began = time.monotonic()
    # A checkpoint's directory may be named in what is written (an adapter names its base), so only the parent differs.
    # What a stopped command left there stays: those that can go on find it.
    partial = stage.result.parent / "partial" / stage.result.name
    command = [partial.as_posix() if argument == "{result}" else argument for argument in stage.command]
    print(f"{stage.name}: {' '.join(command)}", flush=True)
    if "{result}" in stage.command:
        partial.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", *command], check=True)
    if "{result}" in stage.command:
        os.replace(partial, stage.result)
        partial.parent.rmdir()
    elif not stage.result.exists():
        raise FileNotFoundError(f"{stage.name}: the command ended well, and {stage.result} is not there")
    print(f"{stage.name}: {time.monotonic() - began:.0f} s", flush=True)


def publish(recipe: Recipe, output: Path) -> None:
    """Copy models, draft and adapters to the output directory; what is there already stays."""
    sources = {name: recipe.directory(name) for name in ("base", *FINE_TUNE_DOMAINS)}
    sources["draft"] = recipe.work / "draft"
    sources["adapters"] = recipe.work / "adapters"
    for name, source in sources.items():
        target = output / name
        if not target.exists():
            partial = output / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            # Samples and checkpoints of training are many times larger than what was made from them.
            shutil.copytree(source, partial, ignore=shutil.ignore_patterns("training", ".*"))
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
    recipe = Recipe(arguments.data, arguments.work, limits, arguments.threads)
    for stage in recipe.bundled():
        run_stage(stage)
    arguments.output.mkdir(parents=True, exist_ok=True)
    publish(recipe, arguments.output)
    for stage in [] if arguments.bundled_only else recipe.compared():
        run_stage(stage)
    data, models, work = str(arguments.data), str(arguments.output), arguments.work
    threads = recipe.training_threads
    for stage in (
        Stage(
            "evaluation",
            work / "model_cards.json",
            [
                *("recipes.evaluate", "--data", data, "--models", models, "--work", str(work / "run")),
                *("--output", "{result}", *threads),
            ],
        ),
        Stage(
            "acceptance",
            work / "acceptance.json",
            ["recipes.acceptance", "--data", data, "--models", models, "--output", "{result}", *threads],
        ),
        Stage(
            "model cards",
            arguments.output / "README.md",
            [
                *("recipes.model_cards", "--data", data, "--cards", str(work / "model_cards.json")),
                *("--acceptance", str(work / "acceptance.json"), "--models", models, "--output", "{result}"),
            ],
        ),
    ):
        run_stage(stage)


if __name__ == "__main__":
    main()
