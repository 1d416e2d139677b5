"""One model without a server: finding it by name or directory, and one generation with it."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import typer

from eda.adapters.errors import AdapterServiceError
from eda.adapters.serving.model_loader import ModelLoader
from eda.adapters.store.store import AdapterStore
from eda.backends.loading import load_fine_tune
from eda.decoder import SpeculativeDecoder
from eda.errors import MismatchError
from eda.formats.checkpoint_files import is_gguf
from eda.formats.tokenizer import TextTokenizer
from eda.formats.tokenizer_files import load_tokenizer
from eda.generation import Generation, GenerationRequest
from eda.generation import generate as generate_batch
from eda.models.draft import DraftModel
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateModule
from eda.models.target import TargetModel
from eda.server.engine.draft_mode import DraftMode
from eda.server.model_paths import ModelPaths, model_paths
from eda.server.models import choose_device, load_pair
from eda.server.settings import ConfigurationError, Settings
from eda.server.tokenizer import detokenizer_of
from eda.speculation.kinds import Lookup, Off


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What one generation needs."""

    target: TargetModel
    draft: DraftModel | None
    fine_tune: FineTune
    private: PrivateModule | None
    tokenizer: TextTokenizer


def load_model(settings: Settings, name: str, draft: DraftMode | None) -> LoadedModel:
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
    target, shared = load_pair(paths, device, settings.weights)
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
            target, shared = load_pair(ModelPaths(directory, None, {}, None), device, settings.weights)
            fine_tune, tokenizer_directory = FineTune(name, target), directory
    else:
        known = ", ".join([settings.model_name, *paths.fine_tunes])
        raise ConfigurationError(f"--model is {name!r}; it must be a directory or one of: {known}")
    private = None
    if shared is not None and draft in (None, "private"):
        private = _private_module(settings, paths, ModelLoader(target, shared), fine_tune)
    if draft == "private" and private is None:
        raise ConfigurationError(
            f"{name!r} has no private module that fits; use --draft shared, or eda adapt first"
        )
    if draft == "shared" and shared is None:
        raise ConfigurationError(
            "there is no shared draft for this model; use --draft lookup or none, or eda train-draft first"
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


def used_draft(loaded: LoadedModel, wanted: DraftMode | None) -> DraftMode:
    if wanted is not None:
        return wanted
    if loaded.private is not None:
        return "private"
    return "shared" if loaded.draft is not None else "lookup"


def prompt_ids(tokenizer: TextTokenizer, prompt: str, chat: bool) -> list[int]:
    """Token ids of a text, or of a conversation that begins with it."""
    if chat:
        text = tokenizer.render_chat([{"role": "user", "content": prompt}])
        return tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.encode(prompt)


def run_generation(
    loaded: LoadedModel, request: GenerationRequest, eos_ids: frozenset[int], *, show: bool
) -> tuple[Generation, str, float]:
    """The generation, its text, and the seconds that it took, the prompt's computation included."""
    num_slots = len(request.prompt_ids) + request.max_tokens + request.speculation.slots
    draft = None if isinstance(request.speculation, Off | Lookup) else loaded.draft
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
