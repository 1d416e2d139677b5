"""`eda adapt`: a private module for one fine-tune (stage 2), the same pipeline that the service's jobs run."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from eda.adapters.errors import AdapterServiceError, InvalidInputError, JobInterruptedError
from eda.adapters.jobs.pipeline import AdaptationResult, StageEvent, run_adaptation
from eda.adapters.jobs.spec import AdaptationSpec, DataSpec, TargetKind, TrainingOptions
from eda.adapters.store.names import check_name
from eda.errors import EdaError
from eda.server.commands.options import Weights, options_of, with_options
from eda.training.data.prompts import Prompt, read_prompts
from eda.training.data.scores import DEFAULT_SCORE, SCORES
from eda.training.files import hash_of_json, write_bytes_atomically

WORK_DIRECTORY = ".adapt"
"""Below the store; its names begin with a dot, so it is no adapter."""

OPTIONS = {
    {"intermediate_size": "width"}.get(field.name, field.name): field.name
    for field in fields(TrainingOptions)
}
"""Names of options -> of fields: all of them, one under a shorter name."""


@with_options(options_of(TrainingOptions, OPTIONS, panel="Training"))
def adapt(
    target: Annotated[Path, typer.Option(help="Directory of the base target.")],
    fine_tune: Annotated[
        str, typer.Option(help="Directory or hub id of the fine-tune: PEFT LoRA or full checkpoint.")
    ],
    draft: Annotated[Path, typer.Option(help="Directory of the target's shared draft.")],
    name: Annotated[str, typer.Option(help="Name of the adapter.")],
    store: Annotated[Path, typer.Option(help="Directory of adapters; a new version is published there.")],
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines (may be .gz) with `prompt` or `messages`.")
    ] = None,
    self_prompts: Annotated[
        int | None, typer.Option(min=2, help="Instead: this many prompts that the fine-tune writes itself.")
    ] = None,
    skip_triage: Annotated[
        bool, typer.Option("--skip-triage", help="Train even where the shared draft serves well already.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    weights: Weights = None,
    num_threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. [all]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
    **training: Any,
) -> None:
    """Train a private module on what the fine-tune answers, measure it and publish it as a version of an adapter.

    Interrupted, the same command goes on where it was; finished, it says what it published. First the shared draft is
    measured on the fine-tune: where it keeps 95% of its accepted tokens, nothing is trained.
    """
    import torch

    from eda.adapters.jobs.workspaces import PROMPTS_FILE
    from eda.adapters.store.store import AdapterStore
    from eda.adapters.worker.stage_job import StageJob, StageModels
    from eda.adapters.worker.stages import stages_of
    from eda.server.commands.progress_bars import progress_bars, stop_on_interrupt

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    try:
        options = _training_options(training)
        rows = _read_rows(prompts, self_prompts)
        spec = _specification(
            check_name(name),
            target,
            fine_tune,
            draft,
            rows,
            self_prompts,
            options,
            not skip_triage,
            weights or "auto",
        )
        workspace = store / WORK_DIRECTORY / spec.job_id
        _write_prompts(workspace / PROMPTS_FILE, rows)
        models = StageModels.load(spec, target, draft, device=device, weights=weights or "auto")
        stages = stages_of(StageJob(spec, models, AdapterStore(store)))
        with progress_bars(quiet) as show, stop_on_interrupt() as should_stop:
            counts: dict[str, tuple[int, int]] = {}

            def on_event(event: StageEvent) -> None:
                message = event.message
                if event.kind == "progress":
                    counts[event.stage] = event.done, event.total
                elif event.kind == "stage_finished" and "reason" in event.data:
                    message = str(event.data["reason"])
                elif event.kind != "message":
                    return
                show(event.stage, *counts.get(event.stage, (0, 0)), message, {})

            result = run_adaptation(spec, workspace, stages, on_event, should_stop)
    except JobInterruptedError as error:
        typer.echo(f"eda adapt: {error}; run the same command again to go on", err=True)
        raise typer.Exit(130) from error
    except (AdapterServiceError, EdaError, TimeoutError, ValueError) as error:
        typer.echo(f"eda adapt: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps(result.to_json()))
    else:
        _report(name, store, result)


def _training_options(given: dict[str, Any]) -> TrainingOptions:
    named = {OPTIONS[name]: value for name, value in given.items() if value is not None}
    score = named.get("score", DEFAULT_SCORE)
    if score not in SCORES:
        raise InvalidInputError(f"--score is {score!r}; it must be one of {', '.join(SCORES)}")
    return TrainingOptions(**named)


def _read_rows(prompts: Path | None, self_prompts: int | None) -> list[Prompt]:
    if (prompts is None) == (self_prompts is None):
        raise InvalidInputError("give either --prompts FILE or --self-prompts N")
    return [] if prompts is None else read_prompts(prompts)


def _specification(
    name: str,
    target: Path,
    fine_tune: str,
    draft: Path,
    rows: list[Prompt],
    self_prompts: int | None,
    options: TrainingOptions,
    triage: bool,
    weights: str,
) -> AdaptationSpec:
    """The job. Its id follows from everything that decides the result, so the same command finds its files again."""
    from eda.formats.checkpoint_files import ADAPTER_CONFIG_FILE, is_gguf, resolve_directory
    from eda.formats.model_files import fingerprint_files, open_model
    from eda.models.draft import DraftModel

    path = Path(fine_tune) if is_gguf(fine_tune) else resolve_directory(fine_tune)
    base = open_model(target).fingerprint
    own = fingerprint_files(path)
    kind: TargetKind = "full"
    if (path / ADAPTER_CONFIG_FILE).exists():
        kind, own = "lora", f"{base}+{own}"
    elif own == base:
        kind = "target"
    data = (
        DataSpec("self", self_prompts)
        if self_prompts is not None
        else DataSpec("prompts", len(rows), hash_of_json([_row(prompt) for prompt in rows]))
    )
    spec = AdaptationSpec(
        job_id="",
        adapter=name,
        adapter_uid="",
        kind=kind,
        fine_tune_path=str(path),
        fine_tune_fingerprint=own,
        data=data,
        training=options,
        triage=triage,
    )
    identity = hash_of_json([spec.to_json(), DraftModel.load(draft).fingerprint(), weights])
    return replace(spec, job_id=f"adapt-{identity[:16]}")


def _row(prompt: Prompt) -> dict[str, Any]:
    return {"id": prompt.id, "messages": [dict(message) for message in prompt.messages]}


def _write_prompts(path: Path, rows: list[Prompt]) -> None:
    """The job's own copy, so that it can be resumed when the given file has changed."""
    text = "".join(json.dumps(_row(prompt), ensure_ascii=False) + "\n" for prompt in rows)
    write_bytes_atomically(path, text.encode("utf-8"))


def _report(name: str, store: Path, result: AdaptationResult) -> None:
    if result.version is None:
        typer.echo(f"{result.reason}; nothing was trained (--skip-triage trains all the same)")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "", "acceptance length", "tokens/s", "over plain decoding", title="greedy, held-out prompts"
    )
    for side, label in (("before", "shared draft"), ("after", "adapted")):
        figures = result.metrics[side]
        table.add_row(
            label,
            f"{figures['mean_acceptance_length']:.3f}",
            f"{figures['tokens_per_second']:.1f}",
            "-" if figures["speed_up"] is None else f"{figures['speed_up']:.2f}x",
        )
    Console().print(table)
    if result.training_seconds:
        from eda.training.learning.stopwatch import in_words

        typer.echo(f"training spent: {in_words(result.training_seconds)}")
    typer.echo(f"{store / name / str(result.version)}: {result.reason}")
