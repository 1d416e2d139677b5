"""`eda generate`: one completion, printed as it comes, and how fast it was."""

import json
import sys
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from adapters.errors import AdapterServiceError
from adapters.loading import ModelLoader
from adapters.store import AdapterStore
from eda.backends.loading import load_fine_tune
from eda.chat_template import ChatTemplateError
from eda.draft import DraftModel
from eda.errors import EdaError, MismatchError
from eda.generation import Generation, GenerationRequest, summarise
from eda.generation import generate as generate_batch
from eda.kinds import Chain, Off, Speculation, Tree
from eda.model_files import is_gguf
from eda.private import PrivateModule
from eda.sampling import SamplingParams
from eda.speculative import SpeculativeDecoder
from eda.target import FineTune, TargetModel
from eda.tokenizer import TextTokenizer
from eda.tokenizer_files import load_tokenizer
from server.models import ModelPaths, choose_device, load_pair, model_paths
from server.settings import ConfigurationError, Settings, load_settings
from server.tokenizer import detokenizer_of


class DraftChoice(StrEnum):
    NONE = "none"
    SHARED = "shared"
    PRIVATE = "private"


class Dtype(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Shape(StrEnum):
    CHAIN = "chain"
    TREE = "tree"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What one generation needs."""

    target: TargetModel
    draft: DraftModel | None
    fine_tune: FineTune
    private: PrivateModule | None
    tokenizer: TextTokenizer


def generate(
    model: Annotated[
        str,
        typer.Option(help="Served name (base, math, ...), a directory (LoRA or checkpoint) or a GGUF file."),
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 256,
    draft: Annotated[
        DraftChoice | None,
        typer.Option(help="What speculates. [the most that the model has]", show_default=False),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="auto: bfloat16 where it is fast, else float32.")] = Dtype.AUTO,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1: off.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0: off.")] = 0,
    seed: Annotated[int | None, typer.Option(help="The same text for any draft.")] = None,
    shape: Annotated[Shape, typer.Option(help="Shape of a draft.")] = Shape.TREE,
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
    try:
        settings = load_settings(
            config,
            {"models_dir": models_dir, "device": device, "num_threads": num_threads, "dtype": str(dtype)},
        )
        loaded = load_model(settings, model, draft)
        sampling = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        speculation = _speculation(shape, num_speculative_tokens)
        ids = prompt_ids(loaded.tokenizer, prompt, chat)
    except (ConfigurationError, EdaError, ChatTemplateError, ValueError) as error:
        typer.echo(f"eda generate: {error}", err=True)
        raise typer.Exit(2) from error
    used = _used_draft(loaded, draft)
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
        Off() if used is DraftChoice.NONE else speculation,
        loaded.private if used is DraftChoice.PRIVATE else None,
    )
    generation, text, seconds = _run(loaded, request, eos_ids, show=not as_json)
    _report(generation, text, seconds, used, as_json)


def load_model(settings: Settings, name: str, draft: DraftChoice | None) -> LoadedModel:
    """Raises ``ConfigurationError`` or ``EdaError`` when the model, or the draft that was asked for, is not there."""
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    device = choose_device(settings.device)
    directory = Path(name)
    try:
        # Nothing of the family belongs to another GGUF file than its own target.
        alone = is_gguf(directory) and directory != settings.target
        paths = ModelPaths(directory, None, {}, None) if alone else model_paths(settings)
    except ConfigurationError:
        if not (directory / "config.json").is_file():
            raise
        paths = ModelPaths(directory, None, {}, None)  # no family, but a model that stands alone
    target, shared = load_pair(paths, device, settings.dtype)
    path = paths.fine_tunes.get(name)
    tokenizer_directory = paths.target
    if name == settings.model_name or directory == paths.target:
        fine_tune = FineTune(name, target)
    elif path is not None or directory.is_dir():
        try:
            fine_tune = load_fine_tune(path or directory, target, name)
        except MismatchError:
            if not (directory / "config.json").is_file():
                raise
            target, shared = load_pair(ModelPaths(directory, None, {}, None), device, settings.dtype)
            fine_tune, tokenizer_directory = FineTune(name, target), directory
    else:
        known = ", ".join([settings.model_name, *paths.fine_tunes])
        raise ConfigurationError(f"--model is {name!r}; it must be a directory or one of: {known}")
    private = None
    if shared is not None and draft in (None, DraftChoice.PRIVATE):
        private = _private_module(settings, paths, ModelLoader(target, shared), fine_tune)
    if draft is DraftChoice.PRIVATE and private is None:
        raise ConfigurationError(
            f"{name!r} has no private module that fits; use --draft shared, or eda adapt first"
        )
    if draft is DraftChoice.SHARED and shared is None:
        raise ConfigurationError(
            "there is no shared draft for this model; use --draft none, or eda train-draft first"
        )
    tokenizer = fine_tune.tokenizer or load_tokenizer(tokenizer_directory)
    return LoadedModel(target, shared, fine_tune, private, tokenizer)


def _private_module(
    settings: Settings, paths: ModelPaths, loader: ModelLoader, fine_tune: FineTune
) -> PrivateModule | None:
    """The newest version that was made for these very weights."""
    roots = [
        root for root in (settings.data_dir / "adapters", paths.bundled_adapters) if root and root.is_dir()
    ]
    for root in roots:
        store = AdapterStore(root)
        try:
            versions = store.versions(fine_tune.name)
        except AdapterServiceError:  # a directory is no adapter's name
            return None
        for version in reversed(versions):
            try:
                return loader.private_module(store, fine_tune.name, version, fine_tune.fingerprint)[1]
            except AdapterServiceError as error:
                typer.echo(f"eda generate: version {version} is not used: {error}", err=True)
    return None


def _used_draft(loaded: LoadedModel, wanted: DraftChoice | None) -> DraftChoice:
    if wanted is not None:
        return wanted
    if loaded.private is not None:
        return DraftChoice.PRIVATE
    return DraftChoice.SHARED if loaded.draft is not None else DraftChoice.NONE


def prompt_ids(tokenizer: TextTokenizer, prompt: str, chat: bool) -> list[int]:
    """Token ids of a text, or of a conversation that begins with it."""
    if chat:
        text = tokenizer.render_chat([{"role": "user", "content": prompt}])
        return tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.encode(prompt)


def _speculation(shape: Shape, length: int) -> Speculation:
    """0 drafts nothing, in any shape. Raises ``ValueError`` for less."""
    return Tree(length) if shape is Shape.TREE and length else Chain(length)


def _run(
    loaded: LoadedModel, request: GenerationRequest, eos_ids: frozenset[int], *, show: bool
) -> tuple[Generation, str, float]:
    """The generation, its text, and the seconds that it took, the prompt's computation included."""
    num_slots = len(request.prompt_ids) + request.max_tokens + request.speculation.slots
    draft = None if isinstance(request.speculation, Off) else loaded.draft
    decoder = SpeculativeDecoder.for_models(loaded.target, draft, num_slots=num_slots)
    detokenizer = detokenizer_of(loaded.tokenizer)
    pieces: list[str] = []

    def write(piece: str) -> None:
        pieces.append(piece)
        if show:
            sys.stdout.write(piece)
            sys.stdout.flush()

    def on_tokens(_: int, token_ids: list[int]) -> None:
        for token_id in token_ids:
            if token_id not in eos_ids:
                write(detokenizer.push(token_id))

    start = time.perf_counter()
    [generation] = generate_batch(decoder, loaded.fine_tune, [request], on_tokens=on_tokens)
    seconds = time.perf_counter() - start
    write(detokenizer.flush())
    return generation, "".join(pieces), seconds


def _report(generation: Generation, text: str, seconds: float, used: DraftChoice, as_json: bool) -> None:
    throughput = summarise([generation], seconds)
    if as_json:
        document = {
            "text": text,
            "token_ids": generation.token_ids,
            "finish_reason": generation.finish_reason,
            "draft": str(used),
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
        f"acceptance length {throughput.mean_acceptance_length:.2f} (draft: {used})",
        err=True,
    )
