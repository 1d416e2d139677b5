"""`eda train-draft`: the shared draft of a target (stage 1)."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from eda.errors import EdaError
from eda.server.commands.options import Weights
from eda.server.settings import ConfigurationError
from eda.training.data.prompts import ChatFormat, Prompt, read_prompts, read_texts
from eda.training.progress import ProgressEvent, StageStoppedError


class Loss(StrEnum):
    LK = "lk"
    KL = "kl"
    TV = "tv"


def train_draft(
    target: Annotated[Path, typer.Option(help="Directory of the target: config, safetensors, tokenizer.")],
    prompts: Annotated[
        Path,
        typer.Option(help="JSON lines (may be .gz) with `prompt` or `messages`; the target answers them."),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the draft; its training files lie in training/.")],
    texts: Annotated[
        Path | None, typer.Option(help="JSON lines with `text`, learned from as they are.")
    ] = None,
    vocabulary_prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help="Further prompt files whose text counts for the draft vocabulary (domains to come); repeatable."
        ),
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts answered, at most.")] = 1500,
    held_out: Annotated[int, typer.Option(min=1, help="Further prompts that choose the best state.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer, at most.")] = 160,
    sampled_share: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of answers drawn at temperature 1; the others are greedy."),
    ] = 0.3,
    draft_vocab_size: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that the draft can propose. [half the target's, at most 32000]"),
    ] = None,
    intermediate_size: Annotated[
        int | None, typer.Option(min=1, help="Width of the feed-forward network. [the target's]")
    ] = None,
    epochs: Annotated[float, typer.Option(min=0.01, help="Passes over the answers.")] = 4.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers in an optimiser step.")] = 16,
    unroll_steps: Annotated[
        int, typer.Option(min=1, max=16, help="Draft tokens learned from each position.")
    ] = 4,
    learning_rate: Annotated[
        float | None, typer.Option(min=1e-8, help="Peak rate. [2.56 / hidden size]")
    ] = None,
    loss: Annotated[Loss, typer.Option(help="lk: KL and total variation; kl; tv.")] = Loss.LK,
    generation_batch: Annotated[int, typer.Option(min=1, help="Answers generated at the same time.")] = 32,
    memory_gib: Annotated[float, typer.Option(min=0, help="Memory for cached target states, in GiB.")] = 2.0,
    seed: Annotated[int, typer.Option(min=0, help="Of shuffling, sampling and initialisation.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    weights: Weights = None,
    num_threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. [all]")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
) -> None:
    """Train a shared draft on the target's own answers. Interrupted, the same command goes on where it was.

    The best state by simulated greedy acceptance length (tokens per target pass with 5 draft tokens, bonus token
    included) on held-out answers is kept.
    """
    import torch

    from eda.backends.loading import load_target
    from eda.server.commands.progress_bars import progress_bars, stop_on_interrupt
    from eda.server.models import choose_device
    from eda.training.data.regenerate import RegenerationConfig
    from eda.training.learning.stopwatch import in_words
    from eda.training.learning.trainer import TrainingConfig
    from eda.training.shared_draft import SharedDraftConfig, train_shared_draft

    config = SharedDraftConfig(
        draft_vocab_size=draft_vocab_size,
        intermediate_size=intermediate_size,
        num_prompts=num_prompts,
        held_out=held_out,
        memory_bytes=int(memory_gib * 2**30),
        regeneration=RegenerationConfig(
            max_tokens=max_tokens, sampled_share=sampled_share, batch_size=generation_batch, seed=seed
        ),
        training=TrainingConfig(
            epochs=epochs,
            batch_size=batch_size,
            unroll_steps=unroll_steps,
            learning_rate=learning_rate,
            loss=loss.value,
            seed=seed,
        ),
        seed=seed,
    )
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    try:
        rows = read_prompts(prompts)
        model = load_target(target, weights=weights or "auto", device=choose_device(device))
        chat = ChatFormat.load(target, eos_ids=model.config.eos_token_ids)
        counted = [text for path in vocabulary_prompts or () for text in _texts_of(read_prompts(path))]
        with progress_bars(quiet) as show, stop_on_interrupt() as should_stop:

            def on_progress(event: ProgressEvent) -> None:
                show(event.stage, event.done, event.total, event.message, event.metrics)

            draft, report = train_shared_draft(
                model,
                chat,
                rows,
                out,
                config,
                texts=read_texts(texts) if texts is not None else (),
                vocabulary_texts=counted,
                on_progress=on_progress,
                should_stop=should_stop,
            )
    except StageStoppedError as error:
        typer.echo(f"eda train-draft: {error}; run the same command again to go on", err=True)
        raise typer.Exit(130) from error
    except (EdaError, ConfigurationError, ValueError) as error:
        typer.echo(f"eda train-draft: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(
        f"{out}: {draft.num_parameters:,} parameters, vocabulary {draft.config.draft_vocab_size:,} of "
        f"{draft.config.vocab_size:,}; simulated acceptance length {report.best_score:.3f} (untrained "
        f"{report.first_score:.3f}) at step {report.best_step} of {report.num_steps}, "
        f"{report.train_seconds:.0f} s in optimiser steps"
    )
    typer.echo(f"training spent: {in_words(report.seconds)}")


def _texts_of(prompts: list[Prompt]) -> list[str]:
    return [prompt.response for prompt in prompts if prompt.response]
