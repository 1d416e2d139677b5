"""The ablation of EDA on a family of models: methods x data x domains x seeds, with the controls.

    python -m benchmarks.adaptation --target models/base --draft models/draft \
        --fine-tune math=models/math --prompts math=data/math/train.jsonl.gz --eval-prompts math=data/math/eval.jsonl \
        --out work/adaptation

Every run writes one JSON file and is skipped when that file is there, so a stopped benchmark goes on. Runs of a domain
learn the same number of steps on batches of the same number of samples, whatever the method and the data. `eda bench
adaptation` is the same program.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.adaptation_runs import GRIDS, METHODS, DataSizes, DomainData, RunSpec, runs_of
from benchmarks.adaptation_summary import load_results, markdown_table, plot, summarise
from eda.backends.loading import load_fine_tune, load_target
from eda.decoder import SpeculativeDecoder
from eda.errors import EdaError
from eda.formats.weight_settings import WeightSetting
from eda.models.draft import DraftModel, check_draft_fits
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateModule
from eda.training.data.prompts import ChatFormat, read_prompts
from eda.training.data.regenerate import RegenerationConfig
from eda.training.data.scores import SCORES
from eda.training.evaluate import EvaluationConfig, Variant, evaluate
from eda.training.files import provenance, write_bytes_atomically, write_json
from eda.training.learning.acceptance import simulate_acceptance
from eda.training.learning.trainees import (
    Trainee,
    lora_trainee,
    merged_draft,
    private_trainee,
    retrain_trainee,
)
from eda.training.learning.trainer import TrainingConfig, train

MEASUREMENTS = 4
"""Times that a run is measured on held-out answers; with many short runs, more would take longer than the training."""


@dataclass(frozen=True)
class Budget:
    """What every run of the benchmark has in common. ``rates``: peak rates of methods that do not take the default."""

    num_steps: int
    batch_size: int
    rates: dict[str, float]
    evaluation: EvaluationConfig | None


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    try:
        domains = _load_domains(options)
        runs = runs_of(options.grids, list(domains), range(options.seeds), options.methods, options.scores)
        budget = _budget(options)
        files: list[Path] = []
        for place, run in enumerate(runs, start=1):
            settings = {
                "budget": asdict(budget) | {"rates": budget.rates.get(run.method)},
                "sizes": asdict(domains[run.domain].sizes),
            }
            path = options.out / "runs" / run.file_name(settings)
            files.append(path)
            if path.exists():
                continue
            _say(f"[{place}/{len(runs)}] {run.domain}, seed {run.seed}: {run.label}")
            result = perform(run, domains[run.domain], budget)
            write_json(path, result)
            _say(f"    simulated {result['simulated']:.3f}, {result['train_seconds']:.0f} s of training")
    except (EdaError, ValueError) as error:
        _say(f"benchmarks.adaptation: {error}")
        return 2
    except KeyboardInterrupt:
        _say("stopped; the same command goes on")
        return 130
    write_summary(options.out, files)
    return 0


def perform(run: RunSpec, data: DomainData, budget: Budget) -> dict[str, Any]:
    """Trains and measures one run."""
    start = time.perf_counter()
    held_out = data.held_out()
    result: dict[str, Any] = {
        "run": asdict(run),
        "label": run.label,
        "budget": {**asdict(budget), "evaluation": None},
        "provenance": provenance(),
        "fine_tune": data.fine_tune.fingerprint,
    }
    draft, private = data.draft, None
    if run.method == "shared":
        simulated = simulate_acceptance(draft, None, held_out)
        result |= {
            "num_parameters": 0,
            "share_of_draft": 0.0,
            "train_seconds": 0.0,
            "simulated": simulated.mean_length,
        }
    else:
        training = data.training(run.data, run.seed)
        trainee = make_trainee(run, data.draft)
        report = train(trainee, training, held_out, training_config(run, budget))
        draft, private = merged_draft(trainee.draft), trainee.private
        result |= {
            "num_parameters": report.num_parameters,
            "share_of_draft": trainee.share_of_draft,
            "train_seconds": report.train_seconds,
            "simulated": report.best_score,
            "best_step": report.best_step,
            "num_steps": report.num_steps,
            "num_samples": len(training),
            "num_tokens": sum(sample.num_roots for sample in training.samples),
            "history": list(report.history),
        }
    if budget.evaluation is not None:
        result["evaluation"] = _evaluate(data, draft, private, budget.evaluation)
    result["seconds"] = time.perf_counter() - start
    return result


def make_trainee(run: RunSpec, draft: DraftModel) -> Trainee:
    """What the run trains, freshly initialised by its seed."""
    if run.method == "retrain":
        return retrain_trainee(draft)
    if run.method == "lora":
        return lora_trainee(draft, run.lora_rank, seed=run.seed)
    ranks = [round(share * draft.config.hidden_size) for share in (run.fc_rank, run.attention_rank)]
    sizes = draft.config.private_config(round(run.width * draft.config.intermediate_size), *ranks)
    private = PrivateModule.initialised(sizes, seed=run.seed)
    if run.initialisation == "random":  # the reference code's start: a draft that begins damaged
        generator = torch.Generator().manual_seed(run.seed + 1)
        with torch.no_grad():
            private.down_proj.normal_(0.0, 0.02, generator=generator)
    return private_trainee(draft, private.to(draft.fc.weight.device))


def training_config(run: RunSpec, budget: Budget) -> TrainingConfig:
    """The settings of a run; no early stop, so that all runs take their full number of steps."""
    num_steps = max(1, round(budget.num_steps * run.steps_share))
    return TrainingConfig(
        num_steps=num_steps,
        evaluate_every=math.ceil(num_steps / MEASUREMENTS),
        batch_size=budget.batch_size,
        unroll_steps=run.unroll_steps,
        loss=run.loss,  # type: ignore[arg-type]
        learning_rate=budget.rates.get(run.method),
        patience=None,
        seed=run.seed,
    )


def _evaluate(
    data: DomainData, draft: DraftModel, private: PrivateModule | None, config: EvaluationConfig
) -> dict[str, Any]:
    # What is trained in float32 is served in the target's type.
    dtype = data.base.model.dtype
    draft = copy.deepcopy(draft).to(dtype)
    private = None if private is None else copy.deepcopy(private).to(dtype)
    decoder = SpeculativeDecoder.for_models(data.base.model, draft, num_slots=config.num_slots, seed=0)
    variants = {
        "plain": Variant(decoder, speculates=False),
        "this": Variant(decoder, private),
    }
    measured = evaluate(data.fine_tune, variants, data.evaluation_prompts, data.chat, config)
    return {temperature: asdict(value) for temperature, value in measured["this"].items()}


def write_summary(out: Path, files: Sequence[Path]) -> None:
    """``summary.json``, ``summary.md`` and ``summary.png`` in ``out``, of this call's runs only."""
    rows = summarise(load_results(files))
    write_json(out / "summary.json", rows)
    table = markdown_table(rows)
    write_bytes_atomically(out / "summary.md", table.encode("utf-8"))
    plot(rows, out / "summary.png")
    print(table)


def _load_domains(options: argparse.Namespace) -> dict[str, DomainData]:
    target = load_target(options.target, weights=options.weights)
    draft = DraftModel.load(options.draft)
    check_draft_fits(draft, target)
    base = FineTune("base", target)
    sizes = DataSizes(
        options.num_prompts,
        options.held_out,
        options.eval_count,
        RegenerationConfig(max_tokens=options.max_tokens, batch_size=options.generation_batch),
    )
    prompts, evaluation = dict(options.prompts), dict(options.eval_prompts)
    domains = {}
    for name, path in options.fine_tune:
        if name not in prompts or name not in evaluation:
            raise ValueError(f"--prompts {name}=FILE and --eval-prompts {name}=FILE are needed for {name!r}")
        fine_tune = load_fine_tune(path, target, name)
        domains[name] = DomainData(
            name,
            base,
            fine_tune,
            draft,
            ChatFormat.of_fine_tune(fine_tune, options.target),
            read_prompts(prompts[name]),
            read_prompts(evaluation[name]),
            options.out / "domains" / name,
            sizes,
            _say,
        )
    return domains


def _budget(options: argparse.Namespace) -> Budget:
    evaluation = None
    if options.eval_count:
        evaluation = EvaluationConfig(max_tokens=options.max_tokens)
    rates = {method: float(rate) for method, rate in options.rate}
    return Budget(options.steps, options.batch_size, rates, evaluation)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="eda bench adaptation", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--target", type=Path, required=True, help="directory of the base target")
    add("--draft", type=Path, required=True, help="directory of its shared draft")
    for name, what in (
        ("--fine-tune", "fine-tune of a domain"),
        ("--prompts", "its training prompts, with responses for the public control"),
        ("--eval-prompts", "its held-out prompts, for real decoding"),
    ):
        add(name, type=_pair, action="append", required=True, metavar="NAME=PATH", help=what)
    add("--weights", choices=get_args(WeightSetting), default="auto", help="what the target's weights run as")
    add("--out", type=Path, required=True, help="results; a second call goes on from them")
    add("--grids", nargs="+", choices=GRIDS, default=["main"], help="what to compare")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--scores", nargs="+", choices=SCORES, default=list(SCORES), help="selections of the main grid")
    add("--seeds", type=int, default=2, help="number of seeds")
    add("--steps", type=int, default=300, help="optimiser steps of a run")
    add("--batch-size", type=int, default=12, help="samples in a step")
    add(
        "--rate",
        type=_text_pair,
        action="append",
        default=[],
        metavar="METHOD=RATE",
        help="peak learning rate",
    )
    add("--num-prompts", type=int, default=1200, help="training prompts of a domain")
    add("--held-out", type=int, default=48, help="further prompts that choose the best state")
    add("--eval-count", type=int, default=32, help="prompts decoded for real; 0 leaves that out")
    add("--max-tokens", type=int, default=128, help="tokens of an answer, at most")
    add("--generation-batch", type=int, default=32, help="answers generated at the same time")
    add("--num-threads", type=int, default=0, help="processor threads; 0 takes all")
    return parser


def _text_pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} must look like NAME=VALUE")
    return name, value


def _pair(text: str) -> tuple[str, Path]:
    name, value = _text_pair(text)
    return name, Path(value)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
