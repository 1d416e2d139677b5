"""What the server offers about adapters, without HTTP: create, adapt, describe, activate, change, delete."""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import Connection

from eda.adapters.database import Database
from eda.adapters.errors import (
    AdapterServiceError,
    ConflictError,
    CorruptVersionError,
    InvalidInputError,
    UnknownModelError,
    UnknownVersionError,
)
from eda.adapters.jobs.queue import Job, JobQueue, new_job_id
from eda.adapters.jobs.spec import AdaptationSpec
from eda.adapters.jobs.workspaces import Workspaces
from eda.adapters.serving.catalog import (
    LIMIT_FIELDS,
    MAX_DESCRIPTION_LENGTH,
    Catalog,
    CatalogEntry,
    new_entry,
)
from eda.adapters.serving.guard import LiveAcceptance
from eda.adapters.serving.registry import AdapterRegistry
from eda.adapters.serving.traffic import TrafficRecorder, TrafficUsage
from eda.adapters.store.files import MIB, telling_full_disk
from eda.adapters.store.manifest import Manifest
from eda.adapters.store.names import AllowedRoots, check_name
from eda.adapters.submission import (
    AdaptationOptions,
    DataLimits,
    DataSource,
    TargetSource,
    locate_fine_tune,
    prepare_data,
)
from eda.errors import EdaError
from eda.models.fine_tune import FineTune

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """
    Attributes:
        roots: where paths in requests may lead.
        allow_hub: whether fine-tunes may be downloaded.
        has_draft: whether there is a shared draft to adapt; without one no job could ever run.
    """

    roots: AllowedRoots
    allow_hub: bool = False
    has_draft: bool = True
    data_limits: DataLimits = field(default_factory=DataLimits)


@dataclass(frozen=True, slots=True)
class Submission:
    """A registered fine-tune and, unless it is only to be served, its job."""

    entry: CatalogEntry
    job: Job


@dataclass(frozen=True, slots=True)
class VersionState:
    """A version of an adapter; exactly one of ``manifest`` and ``problem`` is set."""

    version: int
    manifest: Manifest | None
    problem: str | None
    live: LiveAcceptance | None


@dataclass(frozen=True, slots=True)
class AdapterState:
    """Everything that is known about an adapter."""

    entry: CatalogEntry
    versions: list[VersionState]
    live_baseline: LiveAcceptance | None
    traffic: TrafficUsage
    num_requests: int
    is_loaded: bool
    problem: str | None


class AdapterService:
    """The operations behind the administrative routes. Methods block (disk, database, loading)."""

    def __init__(
        self,
        database: Database,
        registry: AdapterRegistry,
        queue: JobQueue,
        workspaces: Workspaces,
        traffic: TrafficRecorder,
        settings: ServiceSettings,
    ) -> None:
        self.database = database
        self.registry = registry
        self.catalog: Catalog = registry.catalog
        self.queue = queue
        self.workspaces = workspaces
        self.traffic = traffic
        self.settings = settings

    def configure(self, fine_tunes: Mapping[str, Path]) -> None:
        """Enters the base and the fine-tunes of the settings, forgets earlier ones, and fills the registry.

        An adapter that comes along in the store and fits is active until somebody chooses otherwise.
        """
        loader = self.registry.loader
        base = loader.base
        loaded = {base.name: (base, base.model.path or Path())}
        loaded |= {
            name: (loader.fine_tune(path, check_name(name)), path) for name, path in fine_tunes.items()
        }
        for entry in self.catalog.all():
            if entry.origin == "configured" and entry.name not in loaded:
                self.catalog.finish_deletion(entry.uid)
        for name, (fine_tune, path) in loaded.items():
            entry = self.catalog.configure(
                name,
                kind="target" if name == base.name else "lora" if fine_tune.lora is not None else "full",
                path=str(path),
                fine_tune_fingerprint=fine_tune.fingerprint,
                active_version=self._newest_usable(name, fine_tune),
            )
            self.registry.register(entry, fine_tune)
        for entry in self.catalog.all():
            self._apply_limits(entry)
        self.registry.restore()

    def create(
        self,
        name: str,
        target: TargetSource,
        data: DataSource,
        options: AdaptationOptions,
        *,
        description: str = "",
        idempotency_key: str | None = None,
        request_hash: str = "",
    ) -> Submission:
        """Serves a new fine-tune with the shared draft alone and queues the job that makes its adapter.

        A repeated call with the same ``idempotency_key`` returns what the first one made.

        Raises ``InvalidInputError``, ``ConflictError``, ``QueueFullError``, ``StorageFullError``, ``TooLargeError``.
        """
        if (earlier := self._repeated(idempotency_key, request_hash)) is not None:
            return earlier
        self._require_draft()
        check_name(name)
        _check_description(description)
        self.catalog.require_free_name(name)
        self._require_room_in_queue()
        entry, fine_tune = self._load_new(name, target, description)
        submission = self._submit(
            entry,
            data,
            options,
            lambda connection: self.catalog.insert_in(connection, entry),
            idempotency_key,
            request_hash,
        )
        if submission.entry is entry:
            self.registry.register(entry, fine_tune)
        return submission

    def adapt(
        self,
        name: str,
        data: DataSource,
        options: AdaptationOptions,
        *,
        idempotency_key: str | None = None,
        request_hash: str = "",
    ) -> Submission:
        """Queues another job for a served fine-tune; it makes the next version. Raises like ``create``."""
        if (earlier := self._repeated(idempotency_key, request_hash)) is not None:
            return earlier
        entry = self.catalog.get(name)
        self._require_draft()
        self._require_weights(entry)
        self._require_room_in_queue()
        return self._submit(
            entry,
            data,
            options,
            lambda connection: self.catalog.get_in(connection, name),  # it may have been deleted meanwhile
            idempotency_key,
            request_hash,
        )

    def retry(self, job_id: str) -> Job:
        """Queues a failed or cancelled job again. Raises like ``JobQueue.retry`` and ``adapt``."""
        job = self.queue.get(job_id)
        self._require_draft()
        with suppress(UnknownModelError):  # the queue says what is wrong then
            self._require_weights(self.catalog.get(job.adapter))
        return self.queue.retry(job_id)

    def serve(self, name: str, target: TargetSource) -> CatalogEntry:
        """Serves a fine-tune with the shared draft alone, without a job. Raises like ``create``."""
        check_name(name)
        self.catalog.require_free_name(name)
        entry, fine_tune = self._load_new(name, target, "")
        with self.database.write() as connection:
            self.catalog.insert_in(connection, entry)
        self.registry.register(entry, fine_tune)
        return entry

    def describe(self, name: str) -> AdapterState:
        """Raises ``UnknownModelError``."""
        entry = self.catalog.get(name)
        live = self.registry.guard.live
        versions: list[VersionState] = []
        for version in self.registry.store.versions(name):
            try:
                manifest, problem = self.registry.store.manifest(name, version), None
            except (CorruptVersionError, UnknownVersionError) as error:
                manifest, problem = None, str(error)
            versions.append(VersionState(version, manifest, problem, live(name, version)))
        try:
            loaded, problem = self.registry.is_loaded(name), self.registry.problem_of(name)
            requests = self.registry.num_leases(name)
        except UnknownModelError:
            loaded, problem, requests = False, "it is about to be served", 0
        traffic = self.traffic.usage(name)
        return AdapterState(entry, versions, live(name, None), traffic, requests, loaded, problem)

    def describe_all(self) -> list[AdapterState]:
        """All adapters in service, oldest first."""
        states = []
        for entry in self.catalog.all():
            if entry.state == "serving":
                try:
                    states.append(self.describe(entry.name))
                except UnknownModelError:
                    continue  # deleted meanwhile
        return states

    def patch(
        self,
        name: str,
        *,
        description: str | None = None,
        limits: Mapping[str, int] | None = None,
        record_traffic: bool | None = None,
    ) -> CatalogEntry:
        """Changes what is given. Raises ``UnknownModelError``, ``InvalidInputError``."""
        if description is not None:
            _check_description(description)
        for field_name, value in (limits or {}).items():
            if field_name not in LIMIT_FIELDS or not 1 <= value <= 1_000_000:
                raise InvalidInputError(
                    f"limits.{field_name} is {value}; limits are {', '.join(LIMIT_FIELDS)}, from 1 to 1000000",
                    param=f"limits.{field_name}",
                )
        entry = self.catalog.patch(
            name, description=description, limits=limits, record_traffic=record_traffic
        )
        self._apply_limits(entry)
        self.registry.sync()
        return entry

    def delete(self, name: str) -> None:
        """Takes an adapter out of service; its recorded traffic goes too. Raises like ``AdapterRegistry.remove``."""
        self.registry.remove(name)
        self.traffic.delete(name)
        self.traffic.limits.pop(name, None)

    def delete_traffic(self, name: str) -> None:
        """Deletes what was recorded of a model's requests. Raises ``UnknownModelError``."""
        self.catalog.get(name)
        self.traffic.delete(name)

    def _apply_limits(self, entry: CatalogEntry) -> None:
        if (mib := entry.limits.get("traffic_max_mib")) is not None:
            self.traffic.limits[entry.name] = mib * MIB

    def _load_new(self, name: str, target: TargetSource, description: str) -> tuple[CatalogEntry, FineTune]:
        """The fine-tune, loaded, and the row that would register it."""
        directory, kind = locate_fine_tune(target, self.settings.roots, allow_hub=self.settings.allow_hub)
        try:
            fine_tune = self.registry.loader.fine_tune(directory, name)
        except AdapterServiceError:
            raise
        except EdaError as error:
            raise InvalidInputError(f"target: {error}", param="target") from error
        entry = new_entry(
            name, "posted", kind, str(directory), fine_tune.fingerprint, description=description
        )
        return entry, fine_tune

    def _submit(
        self,
        entry: CatalogEntry,
        data: DataSource,
        options: AdaptationOptions,
        enter: Callable[[Connection], object],
        idempotency_key: str | None,
        request_hash: str,
    ) -> Submission:
        """Prepares a job's data and queues it in one transaction with ``enter``.

        Of two requests with one key that come at the same time, the second gets what the first one made.
        """
        job_id = new_job_id()
        try:
            with telling_full_disk("the job's prompts"):
                spec = self._spec(entry, job_id, data, options)
            with self.database.write() as connection:
                enter(connection)
                self.queue.insert(
                    connection, spec, idempotency_key=idempotency_key, request_hash=request_hash
                )
        except BaseException as error:
            self.workspaces.remove(job_id)
            if isinstance(error, ConflictError):
                earlier = self._repeated(idempotency_key, request_hash)
                if earlier is not None:
                    return earlier
            raise
        return Submission(entry, self.queue.get(job_id))

    def _spec(
        self, entry: CatalogEntry, job_id: str, data: DataSource, options: AdaptationOptions
    ) -> AdaptationSpec:
        prepared = prepare_data(
            data,
            self.workspaces.directory(job_id),
            model=entry.name,
            options=options.training,
            roots=self.settings.roots,
            traffic=self.traffic,
            limits=self.settings.data_limits,
        )
        return AdaptationSpec(
            job_id=job_id,
            adapter=entry.name,
            adapter_uid=entry.uid,
            kind=entry.kind,
            fine_tune_path=entry.path,
            fine_tune_fingerprint=entry.fine_tune_fingerprint,
            data=prepared,
            training=options.training,
            triage=options.triage,
            activate=options.activate,
            margin=options.margin,
            incumbent_version=entry.active_version,
        )

    def _repeated(self, idempotency_key: str | None, request_hash: str) -> Submission | None:
        """What an earlier request with this key made. Raises ``ConflictError`` when that was another request."""
        if idempotency_key is None or (job := self.queue.find_by_key(idempotency_key)) is None:
            return None
        if job.request_hash != request_hash:
            raise ConflictError(
                f"the idempotency key {idempotency_key[:80]!r} was used for another request; use a new one"
            )
        return Submission(self.catalog.get(job.adapter), job)

    def _require_draft(self) -> None:
        if not self.settings.has_draft:
            raise ConflictError(
                "this server runs without a shared draft, so there is nothing to adapt; start it with a draft, or "
                "serve the fine-tune alone with POST /v1/load_lora_adapter"
            )

    def _require_weights(self, entry: CatalogEntry) -> None:
        """Raises ``ConflictError`` when the fine-tune that a job would read is gone or another one by now."""
        try:
            found = self.registry.loader.fingerprint(Path(entry.path))
        except (EdaError, OSError) as error:
            raise ConflictError(f"the weights of {entry.name!r} cannot be read: {error}") from error
        if found != entry.fine_tune_fingerprint:
            raise ConflictError(
                f"{entry.path} holds other weights now than when {entry.name!r} was registered; "
                "delete the adapter and post it again"
            )

    def _require_room_in_queue(self) -> None:
        with self.database.read() as connection:
            self.queue.require_room(connection)

    def _newest_usable(self, name: str, fine_tune: FineTune) -> int | None:
        registry = self.registry
        for version in reversed(registry.store.versions(name)):
            try:
                registry.loader.private_module(registry.store, name, version, fine_tune.fingerprint)
            except AdapterServiceError as error:
                logger.warning("adapter %s version %d is skipped: %s", name, version, error)
            else:
                return version
        return None


def _check_description(description: str) -> None:
    if len(description) > MAX_DESCRIPTION_LENGTH:
        raise InvalidInputError(
            f"description has {len(description)} characters; at most {MAX_DESCRIPTION_LENGTH} are kept",
            param="description",
        )
    if "\x00" in description:
        raise InvalidInputError("description holds a NUL character", param="description")
