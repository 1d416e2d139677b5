"""The store: adapter versions on disk, ``<root>/<name>/<version>/``.

Invariants:
- A version directory is complete and durable the moment it has its final name, and never changes afterwards.
- One job publishes at most one version: publishing again returns the version that is there.
- Directories whose name begins with a dot are the store's own (unfinished versions, rubbish).
"""

import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eda.adapters.errors import CorruptVersionError, InvalidInputError, UnknownVersionError
from eda.adapters.store.files import empty_trash, locked, remove_tree, sync_tree, write_json_atomically
from eda.adapters.store.manifest import MANIFEST_FILE, Manifest
from eda.adapters.store.names import check_name
from eda.adapters.store.tensors import read_header, refuse_unsafe_files
from eda.files import PRIVATE_WEIGHTS_FILE, sha256_of_file, sync_directory


@dataclass(frozen=True, slots=True)
class Problem:
    """A version that the store refuses, and why."""

    name: str
    version: str
    reason: str


@dataclass(frozen=True, slots=True)
class StoreReport:
    """What a look through the whole store found."""

    manifests: list[Manifest]
    problems: list[Problem]


class AdapterStore:
    """Adapter versions below ``root``, and read-only ones below ``bundled`` (shipped with a model family)."""

    def __init__(self, root: Path, bundled: Sequence[Path] = ()) -> None:
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        self._bundled = tuple(Path(directory) for directory in bundled)
        self._unfinished = self.root / ".unfinished"
        self._trash = self.root / ".trash"
        self._lock = self.root / ".lock"

    def versions(self, name: str) -> list[int]:
        """Version numbers of ``name``, ascending; corrupt ones are included, unfinished ones never exist."""
        found = {
            version for root in self._roots() for version, _ in _version_directories(root / check_name(name))
        }
        return sorted(found)

    def directory(self, name: str, version: int) -> Path:
        """Where a version lies. Raises ``UnknownVersionError`` when there is none."""
        for root in self._roots():
            path = root / check_name(name) / str(version)
            if (path / MANIFEST_FILE).is_file():
                return path
        known = ", ".join(map(str, self.versions(name))) or "none"
        raise UnknownVersionError(
            f"adapter {name!r} has no version {version}; there are: {known}", param="version"
        )

    def manifest(self, name: str, version: int) -> Manifest:
        """The manifest of a version, its name and number checked against the directory's.

        Raises ``UnknownVersionError`` or ``CorruptVersionError``.
        """
        directory = self.directory(name, version)
        manifest = Manifest.read(directory)
        if (manifest.name, manifest.version) != (name, version):
            raise CorruptVersionError(
                f"{directory} holds the manifest of {manifest.name!r} version {manifest.version}; was it moved?"
            )
        return manifest

    def verify(self, name: str, version: int) -> Manifest:
        """The manifest, after the files were checked: no unsafe formats, sound header, size and checksum.

        Raises ``UnknownVersionError`` or ``CorruptVersionError``.
        """
        manifest = self.manifest(name, version)
        _verify_files(self.directory(name, version), manifest)
        return manifest

    def find_by_job(self, name: str, job_id: str) -> Manifest | None:
        """The version that job ``job_id`` published, or ``None``."""
        for version in reversed(self.versions(name)):
            try:
                manifest = self.manifest(name, version)
            except CorruptVersionError:
                continue
            if manifest.job_id == job_id:
                return manifest
        return None

    def publish(
        self, weights: Path, manifest: Manifest, *, permit: Callable[[], None] = lambda: None
    ) -> Manifest:
        """Adds a version made of a copy of ``weights``; returns its manifest with number, size and checksum filled in.

        Args:
            weights: a safetensors file; it stays where it is.
            manifest: its ``version``, ``weights_bytes`` and ``weights_sha256`` are ignored.
            permit: called right before the version becomes visible, under the store's lock; what it raises is
                passed on and nothing is published (a worker checks there that the job is still its own).

        Raises ``CorruptVersionError`` when ``weights`` is not sound safetensors.
        """
        name = check_name(manifest.name)
        with locked(self._lock):
            self._clean()
            if (
                manifest.job_id is not None
                and (present := self.find_by_job(name, manifest.job_id)) is not None
            ):
                return present
            numbers = self.versions(name)
            complete = replace(
                manifest,
                version=numbers[-1] + 1 if numbers else 1,
                weights_bytes=weights.stat().st_size,
                weights_sha256=sha256_of_file(weights),
            )
            unfinished = self._unfinished / uuid.uuid4().hex
            unfinished.mkdir(parents=True)
            try:
                shutil.copyfile(weights, unfinished / PRIVATE_WEIGHTS_FILE)
                write_json_atomically(unfinished / MANIFEST_FILE, complete.to_json())
                _verify_files(unfinished, complete)
                sync_tree(unfinished)
                permit()
                home = self.root / name
                home.mkdir(exist_ok=True)
                unfinished.rename(home / str(complete.version))
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
            sync_directory(home)
            sync_directory(self.root)
            return complete

    def delete(self, name: str) -> None:
        """Removes all versions of ``name`` that are not bundled; does nothing when there are none."""
        with locked(self._lock):
            self._clean()
            remove_tree(self.root / check_name(name), self._trash)

    def clean(self) -> None:
        """Removes what killed processes left: unfinished versions and half-deleted adapters."""
        with locked(self._lock):
            self._clean()

    def _clean(self) -> None:
        """Whoever writes or deletes holds the lock, so what is found here under the lock is nobody's."""
        empty_trash(self._unfinished)
        empty_trash(self._trash)

    def scan(self) -> StoreReport:
        """Verifies every version. A corrupt one is reported and never raises."""
        manifests: list[Manifest] = []
        problems: list[Problem] = []
        for name, version, path in self._all():
            try:
                check_name(name)
                manifests.append(self.verify(name, int(version)))
            except (
                CorruptVersionError,
                InvalidInputError,
                UnknownVersionError,
                ValueError,
                OSError,
            ) as error:
                problems.append(Problem(name, version, f"{path}: {error}"))
        return StoreReport(manifests, problems)

    def _roots(self) -> tuple[Path, ...]:
        return (self.root, *self._bundled)

    def _all(self) -> Iterator[tuple[str, str, Path]]:
        """Name, version and place of whatever lies where a version should be."""
        seen: set[tuple[str, str]] = set()
        for root in self._roots():
            for home in sorted(root.iterdir()) if root.is_dir() else ():
                if home.name.startswith(".") or not home.is_dir():
                    continue
                for path in sorted(home.iterdir()):
                    if not path.name.startswith(".") and (home.name, path.name) not in seen:
                        seen.add((home.name, path.name))
                        yield home.name, path.name, path


def _version_directories(home: Path) -> Iterator[tuple[int, Path]]:
    if not home.is_dir():
        return
    for path in home.iterdir():
        if path.name.isascii() and path.name.isdigit() and not path.name.startswith("0") and path.is_dir():
            yield int(path.name), path


def _verify_files(directory: Path, manifest: Manifest) -> None:
    refuse_unsafe_files(directory)
    weights = directory / PRIVATE_WEIGHTS_FILE
    read_header(weights)
    size = weights.stat().st_size
    if size != manifest.weights_bytes:
        raise CorruptVersionError(f"{weights} has {size} bytes; its manifest says {manifest.weights_bytes}")
    checksum = sha256_of_file(weights)
    if checksum != manifest.weights_sha256:
        raise CorruptVersionError(
            f"{weights} has the checksum {checksum[:16]}; its manifest says {manifest.weights_sha256[:16]}"
        )
