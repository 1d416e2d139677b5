"""The catalog: which fine-tunes are registered, and which version of each one's adapter is active.

It is the truth that the registry follows: a process that changes it, worker or server, only bumps ``revision``, and
every registry loads what has changed. A row in state "deleting" is no longer served and goes when its files are gone.
"""

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, RowMapping, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from eda.adapters.database import Database, adapters, events
from eda.adapters.errors import ConflictError, UnknownModelError
from eda.adapters.jobs.queue import add_event, cancel_all_of
from eda.adapters.jobs.spec import TargetKind
from eda.adapters.store.names import fold_name

Origin = Literal["configured", "posted"]
LIMIT_FIELDS = ("traffic_max_mib",)
MAX_DESCRIPTION_LENGTH = 4_000


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A registered fine-tune. Times are seconds since the epoch.

    Attributes:
        uid: tells it from an earlier one of the same name.
        origin: "configured" ones come from the server's settings and cannot be deleted by a request.
        active_version: version of the adapter that is served; ``None`` is the shared draft alone.
        rejected_versions: those that the guard rolled back; never chosen by a rollback again.
        revision: grows with every change.
    """

    uid: str
    name: str
    origin: Origin
    kind: TargetKind
    path: str
    fine_tune_fingerprint: str
    state: Literal["serving", "deleting"]
    description: str
    limits: dict[str, int]
    record_traffic: bool
    active_version: int | None
    rejected_versions: list[int]
    revision: int
    created_at: float
    updated_at: float


_COLUMNS = [adapters.c[name] for name in CatalogEntry.__dataclass_fields__]


class Catalog:
    """Reads and changes rows; ``*_in`` methods take part in a caller's transaction."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def all(self) -> list[CatalogEntry]:
        """Every row, deleting ones included, oldest first."""
        with self.database.read() as connection:
            rows = connection.execute(select(*_COLUMNS).order_by(adapters.c.created_at)).mappings().all()
        return [_entry(row) for row in rows]

    def revisions(self) -> dict[str, int]:
        """Revision by uid: what a watcher polls."""
        with self.database.read() as connection:
            rows = connection.execute(select(adapters.c.uid, adapters.c.revision)).all()
        return {row.uid: row.revision for row in rows}

    def get(self, name: str) -> CatalogEntry:
        """Raises ``UnknownModelError``; a row that is being deleted counts as unknown."""
        with self.database.read() as connection:
            return self.get_in(connection, name)

    def get_in(self, connection: Connection, name: str) -> CatalogEntry:
        row = connection.execute(select(*_COLUMNS).where(adapters.c.name == name)).mappings().one_or_none()
        if row is None or row["state"] != "serving":
            raise UnknownModelError(f"there is no adapter {name[:80]!r}", param="name")
        return _entry(row)

    def require_free_name(self, name: str) -> None:
        """Raises ``ConflictError`` when ``name`` is taken, also in another mix of upper and lower case."""
        query = select(adapters.c.name, adapters.c.state).where(adapters.c.folded_name == fold_name(name))
        with self.database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is not None:
            raise _name_in_use(name, row.name, row.state)

    def insert_in(self, connection: Connection, entry: CatalogEntry) -> None:
        """Registers ``entry``. Raises ``ConflictError`` when the name is taken."""
        values = {field: getattr(entry, field) for field in CatalogEntry.__dataclass_fields__}
        try:
            with connection.begin_nested():
                connection.execute(insert(adapters).values(**values, folded_name=fold_name(entry.name)))
        except IntegrityError as error:
            raise _name_in_use(entry.name, entry.name, "serving") from error
        add_event(connection, "registered", {"path": entry.path, "kind": entry.kind}, adapter_uid=entry.uid)

    def configure(
        self,
        name: str,
        *,
        kind: TargetKind,
        path: str,
        fine_tune_fingerprint: str,
        active_version: int | None,
    ) -> CatalogEntry:
        """Enters a fine-tune of the server's settings, or updates its row; an active version is kept if it fits.

        Raises ``ConflictError`` when a posted adapter has the name.
        """
        with self.database.write() as connection:
            query = select(*_COLUMNS).where(adapters.c.folded_name == fold_name(name))
            row = connection.execute(query).mappings().one_or_none()
            if row is None:
                entry = new_entry(
                    name, "configured", kind, path, fine_tune_fingerprint, active_version=active_version
                )
                self.insert_in(connection, entry)
                return entry
            entry = _entry(row)
            if entry.origin != "configured" or entry.name != name:
                raise ConflictError(
                    f"the settings name a fine-tune {name!r}, and a posted adapter is called {entry.name!r}; "
                    "delete that one or rename yours",
                    param="name",
                )
            changes: dict[str, Any] = {
                "kind": kind,
                "path": path,
                "fine_tune_fingerprint": fine_tune_fingerprint,
            }
            if entry.fine_tune_fingerprint != fine_tune_fingerprint:
                changes |= {"active_version": active_version, "rejected_versions": []}
            elif entry.active_version is None and not _was_chosen(connection, entry.uid):
                changes["active_version"] = active_version  # a version that came along since the last start
            if any(getattr(entry, field) != value for field, value in changes.items()):
                _change(connection, entry.uid, changes)
            return self.get_in(connection, name)

    def patch(
        self,
        name: str,
        *,
        description: str | None = None,
        limits: Mapping[str, int] | None = None,
        record_traffic: bool | None = None,
    ) -> CatalogEntry:
        """Changes what is given and leaves the rest. Raises ``UnknownModelError``."""
        with self.database.write() as connection:
            entry = self.get_in(connection, name)
            changes: dict[str, Any] = {}
            if description is not None:
                changes["description"] = description
            if limits is not None:
                changes["limits"] = {**entry.limits, **limits}
            if record_traffic is not None:
                changes["record_traffic"] = record_traffic
            if changes:
                _change(connection, entry.uid, changes)
            return self.get_in(connection, name)

    def set_active(self, name: str, version: int | None, *, cause: str) -> CatalogEntry:
        """Makes ``version`` the one that is served (``None``: the shared draft alone)."""
        with self.database.write() as connection:
            entry = self.get_in(connection, name)
            self.set_active_in(connection, entry, version, cause=cause)
            return self.get_in(connection, name)

    def set_active_in(
        self,
        connection: Connection,
        entry: CatalogEntry,
        version: int | None,
        *,
        cause: str,
        reject: bool = False,
    ) -> None:
        """``reject`` marks the version that is left as one that a rollback must not choose."""
        if version == entry.active_version and not reject:
            return
        changes: dict[str, Any] = {"active_version": version}
        if reject and entry.active_version is not None:
            changes["rejected_versions"] = sorted({*entry.rejected_versions, entry.active_version})
        _change(connection, entry.uid, changes)
        kind = "rolled_back" if reject else "activated"
        data = {"version": version, "previous_version": entry.active_version, "cause": cause}
        add_event(connection, kind, data, adapter_uid=entry.uid)

    def roll_back(self, name: str, *, version: int, to: int | None, cause: str) -> bool:
        """Leaves ``version`` for ``to`` if it is still the active one; tells whether it was."""
        with self.database.write() as connection:
            entry = self.get_in(connection, name)
            if entry.active_version != version:
                return False
            self.set_active_in(connection, entry, to, cause=cause, reject=True)
            return True

    def add_event(self, uid: str, kind: str, data: Mapping[str, Any]) -> None:
        with self.database.write() as connection:
            add_event(connection, kind, data, adapter_uid=uid)

    def begin_deletion(self, name: str) -> CatalogEntry:
        """Takes a posted adapter out of service and cancels its jobs.

        Raises ``UnknownModelError``, or ``ConflictError`` for a configured one.
        """
        with self.database.write() as connection:
            entry = self.get_in(connection, name)
            if entry.origin == "configured":
                raise ConflictError(
                    f"{name!r} comes from the server's settings; remove it there and restart the server",
                    param="name",
                )
            _change(connection, entry.uid, {"state": "deleting"})
            cancel_all_of(connection, entry.uid)
            return entry

    def finish_deletion(self, uid: str) -> None:
        """Frees the name, once the files are gone."""
        with self.database.write() as connection:
            connection.execute(delete(adapters).where(adapters.c.uid == uid))


def new_entry(
    name: str,
    origin: Origin,
    kind: TargetKind,
    path: str,
    fine_tune_fingerprint: str,
    *,
    description: str = "",
    active_version: int | None = None,
) -> CatalogEntry:
    """A row that is not in the table yet."""
    now = time.time()
    return CatalogEntry(
        uid=uuid.uuid4().hex,
        name=name,
        origin=origin,
        kind=kind,
        path=path,
        fine_tune_fingerprint=fine_tune_fingerprint,
        state="serving",
        description=description,
        limits={},
        record_traffic=False,
        active_version=active_version,
        rejected_versions=[],
        revision=1,
        created_at=now,
        updated_at=now,
    )


def _entry(row: RowMapping) -> CatalogEntry:
    return CatalogEntry(**{name: row[name] for name in CatalogEntry.__dataclass_fields__})


def _was_chosen(connection: Connection, uid: str) -> bool:
    """Whether a request, a job or the guard ever decided which version of an adapter is active."""
    decided = events.c.type.in_(("activated", "rolled_back"))
    query = select(events.c.id).where(events.c.adapter_uid == uid, decided).limit(1)
    return connection.execute(query).first() is not None


def _change(connection: Connection, uid: str, changes: Mapping[str, Any]) -> None:
    connection.execute(
        update(adapters)
        .where(adapters.c.uid == uid)
        .values(**changes, revision=adapters.c.revision + 1, updated_at=time.time())
    )


def _name_in_use(name: str, holder: str, state: str) -> ConflictError:
    detail = (
        "it is being deleted; try again when its last request has ended"
        if state == "deleting"
        else "choose another"
    )
    return ConflictError(f"the name {name!r} is in use by adapter {holder!r}; {detail}", param="name")
