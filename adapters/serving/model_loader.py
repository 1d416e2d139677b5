"""From files to models: the base, its fine-tunes and private modules, each checked before it may be served."""

from pathlib import Path
from typing import Protocol

from eda.adapters.errors import CorruptVersionError
from eda.adapters.store.manifest import Fingerprints, Manifest
from eda.adapters.store.store import AdapterStore
from eda.adapters.store.tensors import refuse_unsafe_files
from eda.adapters.templates.renderer import TemplateRenderer
from eda.backends.loading import load_fine_tune
from eda.errors import CheckpointError, EdaError
from eda.files import PRIVATE_WEIGHTS_FILE
from eda.formats.chat_template import ChatTemplateError
from eda.formats.checkpoint_files import ADAPTER_CONFIG_FILE
from eda.formats.model_files import fingerprint_files
from eda.models.draft import DraftModel, check_draft_fits, check_private_fits
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateConfig, PrivateModule
from eda.models.probe import require_usable
from eda.models.target import TargetModel


class Loader(Protocol):
    """What a registry needs to turn catalog entries into models."""

    @property
    def base(self) -> FineTune: ...
    def fine_tune(self, path: Path, name: str) -> FineTune: ...
    def fingerprint(self, path: Path) -> str: ...
    def private_module(
        self, store: AdapterStore, name: str, version: int, fine_tune_fingerprint: str
    ) -> tuple[Manifest, PrivateModule]: ...


class ModelLoader:
    """Loads fine-tunes of ``base`` and private modules for ``draft``.

    ``draft`` is ``None`` on a server without speculation: fine-tunes are served, private modules are refused.
    Raises ``MismatchError`` when ``draft`` was trained for another base, ``CheckpointError`` when ``base`` computes
    nothing that can be used.

    Args:
        templates: tries the chat template that a fine-tune brings.
    """

    def __init__(
        self,
        base: TargetModel,
        draft: DraftModel | None,
        *,
        base_name: str = "base",
        templates: TemplateRenderer | None = None,
    ) -> None:
        self.base = FineTune(base_name, base)
        self.templates = templates or TemplateRenderer()
        require_usable(self.base)
        self.draft = draft
        self.draft_fingerprint = draft.fingerprint() if draft is not None else ""
        if draft is not None:
            check_draft_fits(draft, base)

    def fine_tune(self, path: Path, name: str) -> FineTune:
        """Raises ``CheckpointError`` (or one of its kinds) for what is no fine-tune of the base."""
        if path == self.base.model.path:
            return FineTune(name, self.base.model)
        fine_tune = load_fine_tune(path, self.base.model, name)
        require_usable(fine_tune)
        if fine_tune.tokenizer is not None and fine_tune.tokenizer.chat_template is not None:
            try:
                self.templates.check(fine_tune.tokenizer.chat_template)
            except ChatTemplateError as error:
                raise CheckpointError(f"{path}: {error}") from error
        return fine_tune

    def fingerprint(self, path: Path) -> str:
        """The fingerprint of the fine-tune in ``path`` as it is on disk now. Raises ``CheckpointError``."""
        if self.base.model.path is None and path == Path():  # a base that was made in memory
            return self.base.fingerprint
        own = fingerprint_files(path)
        is_lora = (path / ADAPTER_CONFIG_FILE).exists()
        return f"{self.base.fingerprint}+{own}" if is_lora else own

    def private_module(
        self, store: AdapterStore, name: str, version: int, fine_tune_fingerprint: str
    ) -> tuple[Manifest, PrivateModule]:
        """A version of an adapter, fully checked.

        Raises ``UnknownVersionError``, or ``CorruptVersionError`` when files are damaged, made for another
        fine-tune, target or draft, misshapen or hold values that are not finite.
        """
        manifest = store.verify(name, version)
        directory = store.directory(name, version)
        if self.draft is None:
            raise CorruptVersionError(f"{directory} needs a shared draft and this server runs without one")
        served = Fingerprints(self.base.model.fingerprint, fine_tune_fingerprint, self.draft_fingerprint)
        served.require_match(manifest, directory)
        return manifest, load_private_module(directory, manifest, self.draft)


def load_private_module(directory: Path, manifest: Manifest, draft: DraftModel) -> PrivateModule:
    """The weights of a version, in ``draft``'s type and on its device.

    Raises ``CorruptVersionError`` for wrong sizes, shapes and values.
    """
    refuse_unsafe_files(directory)
    try:
        config = PrivateConfig(**manifest.sizes)
        check_private_fits(config, draft.config)
        weight = draft.fc.weight
        return PrivateModule.load(
            directory / PRIVATE_WEIGHTS_FILE, config, dtype=weight.dtype, device=weight.device
        )
    except (EdaError, ValueError) as error:
        raise CorruptVersionError(f"{directory} cannot be used: {error}") from error
