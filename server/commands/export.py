"""`eda export`: an adapter version as an EAGLE-3 checkpoint for other engines."""

from pathlib import Path
from typing import Annotated

import typer

from eda.adapters.errors import AdapterServiceError, InvalidInputError, UnknownVersionError
from eda.errors import EdaError


def export(
    target: Annotated[Path, typer.Option(help="Directory of the base target.")],
    draft: Annotated[Path, typer.Option(help="Directory of the target's shared draft.")],
    out: Annotated[Path, typer.Option(help="Directory to write; must not exist.")],
    fine_tune: Annotated[
        Path | None, typer.Option(help="Directory of the fine-tune: PEFT LoRA or full checkpoint. [the base]")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Directory of adapters; without it the shared draft alone is written.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the adapter in the store.")] = None,
    version: Annotated[int | None, typer.Option(min=1, help="Version of the adapter. [the newest]")] = None,
    dtype: Annotated[
        str,
        typer.Option(help="auto, bfloat16 or float32; auto takes bfloat16 when no value is rounded by it."),
    ] = "auto",
    with_embeddings: Annotated[
        bool,
        typer.Option("--with-embeddings", help="Write the embeddings too; engines take the target's else."),
    ] = False,
) -> None:
    """Write a shared draft and a private module as one EAGLE-3 checkpoint.

    The private network is joined to the shared one, a correction of `fc` is added to it, and the rows of the
    fine-tune's output layer become `lm_head`: the file drafts exactly what this server drafts. The engine must know
    `fc_norm` (EAGLE-3.1), the norms in front of `fc`.
    """
    import torch

    from eda.adapters.serving.model_loader import ModelLoader
    from eda.adapters.store.export import EXPORT_TYPES, ExportType, export_draft
    from eda.adapters.store.store import AdapterStore
    from eda.backends.loading import load_target
    from eda.models.draft import DraftModel

    try:
        if dtype not in EXPORT_TYPES:
            raise InvalidInputError(f"--dtype is {dtype!r}; it must be one of {', '.join(EXPORT_TYPES)}")
        if (store is None) != (name is None) or (version is not None and name is None):
            raise InvalidInputError(
                "give --store and --name together (and --version with them), or none of them"
            )
        if store is not None and not store.is_dir():
            raise InvalidInputError(f"--store is {store}; there is no such directory")
        stored: ExportType = dtype
        loader = ModelLoader(
            load_target(target, weights="float32"), DraftModel.load(draft, dtype=torch.float32)
        )
        model = loader.base if fine_tune is None else loader.fine_tune(fine_tune, name or fine_tune.name)
        manifest = private = None
        if store is not None and name is not None:
            versions = AdapterStore(store)
            chosen = version if version is not None else _newest(versions.versions(name), name, store)
            manifest, private = loader.private_module(versions, name, chosen, model.fingerprint)
        assert loader.draft is not None
        config = export_draft(
            out,
            loader.draft,
            model,
            private,
            manifest=manifest,
            dtype=stored,
            with_embeddings=with_embeddings,
        )
    except (AdapterServiceError, EdaError) as error:
        typer.echo(f"eda export: {error}", err=True)
        raise typer.Exit(2) from error
    what = "the shared draft" if manifest is None else f"{manifest.name} version {manifest.version}"
    typer.echo(
        f"{out}: {what}, {config['torch_dtype']}, intermediate size {config['intermediate_size']}, states "
        f"{config['eagle_aux_hidden_state_layer_ids']} of the target (0 is its embedding)"
    )


def _newest(versions: list[int], name: str, directory: Path) -> int:
    if not versions:
        raise UnknownVersionError(f"--name is {name!r}; {directory} holds no version of it")
    return versions[-1]
