"""`eda generate`: one completion, printed as it comes, and how fast it was."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from eda.errors import EdaError
from eda.server.commands.options import Weights
from eda.server.engine.draft_mode import DraftMode
from eda.server.settings import ConfigurationError, load_settings

if TYPE_CHECKING:
    from eda.generation import Generation


def generate(
    model: Annotated[
        str,
        typer.Option(help="Served name (base, math, ...), a directory (LoRA or checkpoint) or a GGUF file."),
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 256,
    draft: Annotated[
        DraftMode | None,
        typer.Option(
            help="What speculates. [the most that the model has, lookup without a draft]", show_default=False
        ),
    ] = None,
    weights: Weights = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1: off.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0: off.")] = 0,
    seed: Annotated[int | None, typer.Option(help="The same text for any draft.")] = None,
    shape: Annotated[Literal["chain", "tree"], typer.Option(help="Shape of a draft.")] = "tree",
    num_speculative_tokens: Annotated[
        int, typer.Option(min=1, max=32, help="Length of a chain, depth of a tree.")
    ] = 5,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to --max-tokens.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end instead.")
    ] = False,
    models_dir: Annotated[Path | None, typer.Option(help="Family of models. [bundled]")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of the server.", envvar="EDA_CONFIG")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda. [auto]")] = None,
    num_threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the model.")] = None,
) -> None:
    """Continue a prompt. The text goes to standard output; tokens/s and acceptance length to standard error.

    The acceptance length is the mean number of tokens per decoding pass of the target: 1 without a draft.
    """
    from eda.backends.loading import instructions_of
    from eda.formats.chat_template import ChatTemplateError
    from eda.generation import GenerationRequest
    from eda.sampling.params import SamplingParams
    from eda.server.single_model import load_model, prompt_ids, run_generation, used_draft
    from eda.speculation.kinds import Chain, Lookup, Off, Speculation, Tree

    try:
        settings = load_settings(
            config,
            {"models_dir": models_dir, "device": device, "num_threads": num_threads, "weights": weights},
        )
        loaded = load_model(settings, model, draft)
        sampling = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        length = num_speculative_tokens
        ids = prompt_ids(loaded.tokenizer, prompt, chat)
    except (ConfigurationError, EdaError, ChatTemplateError, ValueError) as error:
        typer.echo(f"eda generate: {error}", err=True)
        raise typer.Exit(2) from error
    used = used_draft(loaded, draft)
    speculation: Speculation = Tree(length) if shape == "tree" else Chain(length)
    if used in ("lookup", "none"):
        speculation = Lookup() if used == "lookup" else Off()
    limits = loaded.fine_tune.model.config
    eos_ids = frozenset() if ignore_eos else frozenset(limits.eos_token_ids) | loaded.tokenizer.eos_ids
    room = limits.max_position_embeddings - len(ids)
    if not ids or room < 1:
        typer.echo(
            f"eda generate: the prompt has {len(ids)} tokens; 1 to {len(ids) + room - 1} are possible",
            err=True,
        )
        raise typer.Exit(2)
    request = GenerationRequest(
        ids,
        min(max_tokens, room),
        eos_ids,
        sampling,
        speculation,
        loaded.private if used == "private" else None,
    )
    generation, text, seconds = run_generation(loaded, request, eos_ids, show=not as_json)
    model_run = loaded.fine_tune.model
    formats, instructions = model_run.weight_formats, instructions_of(model_run)
    _report(generation, text, seconds, used, formats, instructions, as_json)


def _report(
    generation: "Generation",
    text: str,
    seconds: float,
    used: str,
    formats: tuple[str, ...],
    instructions: str | None,
    as_json: bool,
) -> None:
    from eda.generation import summarise

    throughput = summarise([generation], seconds)
    if as_json:
        document = {
            "text": text,
            "token_ids": generation.token_ids,
            "finish_reason": generation.finish_reason,
            "draft": used,
            "weights": list(formats),
            "instructions": instructions,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(throughput.tokens_per_second, 2),
            "mean_acceptance_length": round(throughput.mean_acceptance_length, 4),
            "num_target_passes": generation.num_target_passes,
        }
        typer.echo(json.dumps(document))
        return
    typer.echo()
    typer.echo(
        f"{throughput.num_tokens} tokens in {seconds:.2f} s: {throughput.tokens_per_second:.1f} tokens/s, "
        f"acceptance length {throughput.mean_acceptance_length:.2f} (draft: {used}; weights: {', '.join(formats)}; "
        f"passes: {instructions or 'torch'})",
        err=True,
    )
