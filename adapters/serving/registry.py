"""The registry: what is served now. Requests take leases from it; the catalog and the store decide what is in it.

A swap is one assignment: ``Served.active`` points to another version. New leases read the new one, running sequences
hold the old module in their lease and finish with it. Loading happens before the assignment and outside the lock
that requests take, so nobody waits for a disk.
"""

import logging
import threading
import time
from pathlib import Path

from eda.adapters.errors import AdapterServiceError, ConflictError, CorruptVersionError, UnknownModelError
from eda.adapters.serving.catalog import Catalog, CatalogEntry
from eda.adapters.serving.guard import Guard, GuardVerdict
from eda.adapters.serving.leases import ActiveVersion, Lease, Served, ServedModel
from eda.adapters.serving.model_loader import Loader
from eda.adapters.store.store import AdapterStore, Problem
from eda.errors import EdaError
from eda.models.fine_tune import FineTune

logger = logging.getLogger(__name__)


class AdapterRegistry:
    """Models by name, the base first.

    Args:
        loader: turns files into models.
        max_model_len: longest sequence in tokens.
        max_loaded: fine-tunes kept in memory beside the base; the least recently used one without leases goes first.
            ``None`` keeps all.
    """

    def __init__(
        self,
        loader: Loader,
        store: AdapterStore,
        catalog: Catalog,
        *,
        guard: Guard | None = None,
        max_model_len: int = 0,
        max_loaded: int | None = None,
    ) -> None:
        self.loader = loader
        self.store = store
        self.catalog = catalog
        self.guard = guard or Guard()
        self.problems: list[Problem] = []
        self.num_rollbacks: dict[str, int] = {}
        self._max_model_len = max_model_len or loader.base.model.config.max_position_embeddings
        self._max_loaded = max_loaded
        self._served: dict[str, Served] = {}
        self._leaving: list[Served] = []
        self._revisions: dict[str, int] = {}
        self._clock = 0
        self._lock = threading.Lock()  # guards the fields above; held for a few instructions only
        self._changing = threading.RLock()  # serialises changes to what is served; may be held while loading

    # --- requests ---

    def model_names(self) -> list[str]:
        """Names that requests may give, the base first, then in order of registration."""
        with self._lock:
            return list(self._served)

    def describe(self, name: str) -> ServedModel:
        """Raises ``UnknownModelError``."""
        with self._lock:
            served = self._find(name)
            entry, active, fine_tune = served.entry, served.active, served.fine_tune
        base = self.loader.base.name
        return ServedModel(
            name=name,
            parent=None if name == base else base,
            created=int(entry.created_at),
            adapter_version=active.version if active else None,
            max_model_len=self._max_model_len,
            weights=None if fine_tune is None else fine_tune.model.weight_formats,
            description=entry.description,
        )

    def is_loaded(self, name: str) -> bool:
        """Whether ``acquire`` returns at once; otherwise it reads the fine-tune from disk first."""
        with self._lock:
            return self._find(name).fine_tune is not None

    def acquire(self, name: str) -> Lease:
        """A lease on what is served under ``name`` now.

        Raises ``UnknownModelError`` when nothing is, or when an unloaded fine-tune can no longer be read.
        """
        with self._lock:
            served = self._find(name)
            served.num_leases += 1  # from here on it stays, whatever happens beside
            self._clock += 1
            served.last_used = self._clock
            fine_tune, active = served.fine_tune, served.active
        try:
            if fine_tune is None:
                fine_tune = self._load_again(served)
            is_baseline = active is not None and self.guard.takes_baseline(name)
        except BaseException:
            self._give_back(served)
            raise
        return Lease(
            name,
            fine_tune,
            None if is_baseline else active,
            is_baseline=is_baseline,
            release=lambda: self._give_back(served),
        )

    # --- changes ---

    def restore(self) -> None:
        """Fills the registry at start-up, and cleans up after a killed server.

        Versions that cannot be used are left out and listed in ``problems``; their models are served with the
        shared draft alone. A fine-tune whose files are gone is kept in the catalog and tried again when asked for.
        """
        with self._changing:
            self.store.clean()
            self.problems = self.store.scan().problems
            for problem in self.problems:
                logger.error(
                    "adapter %s version %s is skipped: %s", problem.name, problem.version, problem.reason
                )
            self.sync()

    def register(self, entry: CatalogEntry, fine_tune: FineTune | None = None) -> None:
        """Serves a catalog entry from now on, with ``fine_tune`` if it is loaded already."""
        with self._changing:
            known = self._served.get(entry.name)
            if known is None:
                self._add(entry, fine_tune)
            elif known.entry.uid == entry.uid:
                self._update(known, entry)

    def sync(self) -> None:
        """Follows the catalog: new and changed entries, deletions whose last lease has ended. Cheap when idle."""
        with self._changing:
            revisions = self.catalog.revisions()
            if revisions != self._revisions:
                entries = self.catalog.all()
                for entry in self._base_first(entries):
                    if self._revisions.get(entry.uid) != entry.revision:
                        self._follow(entry)
                self._drop_all_but({entry.uid for entry in entries if entry.state == "serving"})
            self._finish_deletions()

    def activate(self, name: str, version: int | None, *, cause: str = "request") -> CatalogEntry:
        """Serves ``version`` of the adapter, or the shared draft alone for ``None``; returns when it is in service.

        Raises ``UnknownModelError``, ``UnknownVersionError``, ``CorruptVersionError``; then nothing has changed.
        """
        with self._changing:
            with self._lock:
                served = self._find(name)
            active = self._load_version(served.entry, version) if version is not None else None
            entry = self.catalog.set_active(name, version, cause=cause)
            self._swap(served, entry, active)
            return entry

    def remove(self, name: str) -> None:
        """Takes a posted adapter out of service. Running requests finish; files go when the last lease has ended.

        Raises ``UnknownModelError``, ``ConflictError`` for a model of the server's settings.
        """
        with self._changing:
            if name == self.loader.base.name:
                raise ConflictError(f"{name!r} is the base model; it cannot be deleted", param="name")
            self.catalog.begin_deletion(name)
            self.sync()

    def apply(self, verdict: GuardVerdict) -> None:
        """Acts on what the guard found."""
        with self._changing:
            with self._lock:
                served = self._served.get(verdict.model)
            if served is None:
                return
            logger.warning("model %s version %s: %s", verdict.model, verdict.version, verdict.reason)
            if verdict.kind == "alarm":
                data = {"version": verdict.version, "reason": verdict.reason}
                self.catalog.add_event(served.entry.uid, "acceptance_alarm", data)
            elif verdict.version is not None:
                earlier = self._earlier_version(served.entry, verdict.version)
                if self.catalog.roll_back(
                    verdict.model, version=verdict.version, to=earlier, cause=f"guard: {verdict.reason}"
                ):
                    self.num_rollbacks[verdict.model] = self.num_rollbacks.get(verdict.model, 0) + 1
                self.sync()

    # --- views ---

    def active_versions(self) -> dict[str, int | None]:
        """Version in service by model."""
        with self._lock:
            return {name: s.active.version if s.active else None for name, s in self._served.items()}

    def records_traffic(self, name: str) -> bool:
        """Whether requests for ``name`` are to be recorded; ``False`` for a name that is gone."""
        with self._lock:
            served = self._served.get(name)
            return served is not None and served.entry.record_traffic

    def problem_of(self, name: str) -> str | None:
        """Why the version that should be active is not. Raises ``UnknownModelError``."""
        with self._lock:
            return self._find(name).problem

    def num_leases(self, name: str) -> int:
        """Requests that hold ``name`` now. Raises ``UnknownModelError``."""
        with self._lock:
            return self._find(name).num_leases

    # --- inside; callers hold ``_changing`` unless said otherwise ---

    def _find(self, name: str) -> Served:
        """The caller holds ``_lock``."""
        served = self._served.get(name)
        if served is None:
            raise UnknownModelError(f"there is no model {name[:80]!r}", param="model")
        return served

    def _base_first(self, entries: list[CatalogEntry]) -> list[CatalogEntry]:
        return sorted(entries, key=lambda entry: entry.name != self.loader.base.name)

    def _follow(self, entry: CatalogEntry) -> None:
        known = self._served.get(entry.name)
        if known is not None and known.entry.uid != entry.uid:
            self._take_out(known)
            known = None
        if entry.state == "deleting":
            if known is not None:
                known.entry = entry
                self._take_out(known)
            elif all(served.entry.uid != entry.uid for served in self._leaving):
                self._leaving.append(Served(entry, None))  # a server that was killed began it
        elif known is None:
            self._add(entry, None)
        else:
            self._update(known, entry)
        self._revisions[entry.uid] = entry.revision

    def _add(self, entry: CatalogEntry, fine_tune: FineTune | None) -> None:
        served = Served(entry, fine_tune)
        if fine_tune is None and (self._max_loaded is None or self._num_loaded() < self._max_loaded):
            try:
                served.fine_tune = self._load_fine_tune(entry)
            except EdaError as error:
                served.problem = str(error)
                logger.error("model %s cannot be loaded now: %s", entry.name, error)
        served.active = self._load_active(served)
        with self._lock:
            self._clock += 1
            served.last_used = self._clock
            self._served[entry.name] = served
        self._revisions[entry.uid] = entry.revision
        self._unload_surplus()

    def _update(self, served: Served, entry: CatalogEntry) -> None:
        wanted = entry.active_version
        if wanted == (served.active.version if served.active else None):
            self._swap(served, entry, served.active)
            return
        before = served.entry
        served.entry = entry
        active = self._load_active(served)
        if active is None and wanted is not None:
            # Better the version that works than none; the catalog still names the one that was asked for.
            served.entry = before
            active = served.active
        self._swap(served, entry, active)
        if active is not None and active.version == wanted:
            delay = time.time() - entry.updated_at
            self.catalog.add_event(
                entry.uid, "in_service", {"version": wanted, "seconds_after_activation": delay}
            )

    def _swap(self, served: Served, entry: CatalogEntry, active: ActiveVersion | None) -> None:
        if active is not None and active != served.active and active.version in entry.rejected_versions:
            self.guard.begin(entry.name, active.version)
        if (active.version if active else None) == entry.active_version:
            served.problem = None
        with self._lock:
            served.entry = entry
            served.active = active
        self._revisions[entry.uid] = entry.revision

    def _load_active(self, served: Served) -> ActiveVersion | None:
        version = served.entry.active_version
        if version is None:
            return None
        try:
            return self._load_version(served.entry, version)
        except AdapterServiceError as error:
            served.problem = str(error)
            logger.error("adapter %s version %d is not used: %s", served.entry.name, version, error)
            self.catalog.add_event(
                served.entry.uid, "version_refused", {"version": version, "reason": str(error)}
            )
            return None

    def _load_version(self, entry: CatalogEntry, version: int) -> ActiveVersion:
        fingerprint = entry.fine_tune_fingerprint
        return ActiveVersion(*self.loader.private_module(self.store, entry.name, version, fingerprint))

    def _load_fine_tune(self, entry: CatalogEntry) -> FineTune:
        if entry.name == self.loader.base.name:
            return self.loader.base
        fine_tune = self.loader.fine_tune(Path(entry.path), entry.name)
        if fine_tune.fingerprint != entry.fine_tune_fingerprint:
            raise CorruptVersionError(
                f"{entry.path} holds other weights now than when {entry.name!r} was registered; "
                "delete the adapter and post it again"
            )
        return fine_tune

    def _load_again(self, served: Served) -> FineTune:
        """Loads an unloaded fine-tune for a request that holds a lease; needs no lock."""
        with served.loading:
            if served.fine_tune is None:
                try:
                    fine_tune = self._load_fine_tune(served.entry)
                except EdaError as error:
                    raise UnknownModelError(
                        f"the model {served.entry.name!r} cannot be loaded: {error}", param="model"
                    ) from error
                with self._lock:
                    served.fine_tune = fine_tune
            loaded = served.fine_tune
        self._unload_surplus()
        return loaded

    def _num_loaded(self) -> int:
        base = self.loader.base.name
        return sum(1 for name, s in self._served.items() if name != base and s.fine_tune is not None)

    def _unload_surplus(self) -> None:
        """Needs no lock of its callers."""
        if self._max_loaded is None:
            return
        with self._lock:
            surplus = self._num_loaded() - self._max_loaded
            idle = [
                s
                for n, s in self._served.items()
                if n != self.loader.base.name and s.fine_tune and not s.num_leases
            ]
            for served in sorted(idle, key=lambda s: s.last_used)[: max(surplus, 0)]:
                served.fine_tune = None

    def _take_out(self, served: Served) -> None:
        with self._lock:
            self._served.pop(served.entry.name, None)
        self._leaving.append(served)
        self.guard.forget(served.entry.name)

    def _drop_all_but(self, uids: set[str]) -> None:
        """Stops serving entries that another process deleted for good."""
        for served in [served for served in self._served.values() if served.entry.uid not in uids]:
            self._take_out(served)
        self._revisions = {uid: revision for uid, revision in self._revisions.items() if uid in uids}

    def _finish_deletions(self) -> None:
        for served in list(self._leaving):
            with self._lock:
                in_use = served.num_leases > 0
            if in_use:
                continue
            if served.entry.state == "deleting":
                self.store.delete(served.entry.name)
                self.catalog.finish_deletion(served.entry.uid)
            self._leaving.remove(served)

    def _give_back(self, served: Served) -> None:
        """Needs no lock."""
        with self._lock:
            served.num_leases -= 1
        if self._max_loaded is not None:
            self._unload_surplus()

    def _earlier_version(self, entry: CatalogEntry, version: int) -> int | None:
        """The newest version before ``version`` that was not rolled back; ``None``: the shared draft alone."""
        usable = [
            v for v in self.store.versions(entry.name) if v < version and v not in entry.rejected_versions
        ]
        for candidate in reversed(usable):
            try:
                self._load_version(entry, candidate)
            except AdapterServiceError:
                continue
            return candidate
        return None
