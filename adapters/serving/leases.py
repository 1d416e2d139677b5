"""What a request holds while it runs, and what the registry keeps for each model."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from eda.adapters.serving.catalog import CatalogEntry
from eda.adapters.store.manifest import Manifest
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateModule


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a client may know of a model. ``created`` is in seconds since the epoch, lengths are in tokens.

    ``weights`` are the formats that its weights run in; ``None`` while it is not in memory.
    """

    name: str
    parent: str | None
    created: int
    adapter_version: int | None
    max_model_len: int
    weights: tuple[str, ...] | None
    description: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class ActiveVersion:
    """A loaded private module and where it came from."""

    manifest: Manifest
    module: PrivateModule

    @property
    def version(self) -> int:
        return self.manifest.version


@dataclass(slots=True, eq=False)
class Served:
    """A model in service. ``num_leases`` and ``last_used`` belong to the registry's lock."""

    entry: CatalogEntry
    fine_tune: FineTune | None
    active: ActiveVersion | None = None
    num_leases: int = 0
    last_used: int = 0
    problem: str | None = None
    loading: threading.Lock = field(default_factory=threading.Lock)


class Lease:
    """One request's hold on a fine-tune and one version of its private module.

    While it is held the fine-tune is not unloaded and the adapter's files are not deleted. ``is_baseline`` marks a
    request that runs with the shared draft alone for the guard's sake.
    """

    __slots__ = (
        "_release",
        "_released",
        "adapter",
        "adapter_version",
        "fine_tune",
        "is_baseline",
        "model_name",
        "private",
    )

    def __init__(
        self,
        model_name: str,
        fine_tune: FineTune,
        active: ActiveVersion | None,
        *,
        is_baseline: bool,
        release: Callable[[], None],
    ) -> None:
        self.model_name = model_name
        self.fine_tune = fine_tune
        self.private: PrivateModule | None = active.module if active else None
        self.adapter: str | None = model_name if active else None
        self.adapter_version: int | None = active.version if active else None
        self.is_baseline = is_baseline
        self._release = release
        self._released = threading.Lock()

    def release(self) -> None:
        """Gives the hold back. Safe to call twice and from any thread."""
        if self._released.acquire(blocking=False):
            self._release()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
