"""The registry over a tiny real family: leases, swaps, deletion, restart, refusals, unloading."""

import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from eda.adapters.database import Database
from eda.adapters.errors import ConflictError, CorruptVersionError, UnknownModelError, UnknownVersionError
from eda.adapters.serving.catalog import Catalog, new_entry
from eda.adapters.serving.guard import Guard, GuardSettings, GuardVerdict
from eda.adapters.serving.model_loader import ModelLoader
from eda.adapters.serving.registry import AdapterRegistry
from eda.adapters.serving.watcher import RegistryWatcher
from eda.adapters.store.manifest import Manifest
from eda.adapters.store.store import AdapterStore
from eda.models.private import PrivateModule
from tests.adapters.helpers import wait_for
from tests.support.reference_family import Family, make_family


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


@dataclass
class Setup:
    family: Family
    directory: Path
    database: Database

    def registry(self, *, guard: Guard | None = None, max_loaded: int | None = None) -> AdapterRegistry:
        """A registry as a server makes it at start-up."""
        loader = ModelLoader(self.family.base, self.family.draft)
        catalog = Catalog(self.database)
        store = AdapterStore(self.directory / "adapters")
        base = self.family.base
        catalog.configure(
            "base",
            kind="target",
            path=str(self.family.paths["base"]),
            fine_tune_fingerprint=base.fingerprint,
            active_version=None,
        )
        guard = guard or Guard(GuardSettings(baseline_share=0.0))
        registry = AdapterRegistry(loader, store, catalog, guard=guard, max_loaded=max_loaded)
        registry.restore()
        return registry

    def add(self, registry: AdapterRegistry, name: str, source: str = "code") -> None:
        fine_tune = self.family.fine_tunes[source]
        entry = new_entry(name, "posted", "lora", str(self.family.paths[source]), fine_tune.fingerprint)
        with self.database.write() as connection:
            registry.catalog.insert_in(connection, entry)
        registry.register(entry, fine_tune)

    def publish(self, name: str, seed: int = 1, *, source: str = "code", **changes: object) -> Manifest:
        config = self.family.draft.config.private_config(intermediate_size=4)
        module = PrivateModule.initialised(config, seed=seed)
        path = self.directory / "weights.safetensors"
        module.save(path)
        document = {
            "name": name,
            "version": 0,
            "created": "2026-01-01T00:00:00Z",
            "target_fingerprint": self.family.base.fingerprint,
            "fine_tune_fingerprint": self.family.fine_tunes[source].fingerprint,
            "draft_fingerprint": self.family.draft.fingerprint(),
            "sizes": {"hidden_size": 32, "num_features": 96, "intermediate_size": 4, "fc_rank": 0},
            "weights_bytes": 0,
            "weights_sha256": "",
        }
        return AdapterStore(self.directory / "adapters").publish(path, Manifest(**(document | changes)))  # type: ignore[arg-type]


@pytest.fixture
def setup(family: Family, tmp_path: Path, database: Database) -> Setup:
    return Setup(family, tmp_path / "data", database)


def test_a_fine_tune_is_served_with_the_shared_draft_alone_until_a_version_is_active(setup: Setup) -> None:
    registry = setup.registry()
    setup.add(registry, "tune")
    assert registry.model_names() == ["base", "tune"]
    described = registry.describe("tune")
    assert (described.parent, described.adapter_version, described.max_model_len) == ("base", None, 256)
    assert registry.describe("base").parent is None
    with registry.acquire("tune") as lease:
        assert (lease.private, lease.adapter, lease.adapter_version) == (None, None, None)
    setup.publish("tune")
    registry.activate("tune", 1)
    with registry.acquire("tune") as lease:
        assert lease.private is not None
        assert (lease.adapter, lease.adapter_version) == ("tune", 1)
    with pytest.raises(UnknownModelError, match="'other'"):
        registry.acquire("other")


def test_a_swap_leaves_running_requests_on_their_version(setup: Setup) -> None:
    registry = setup.registry()
    setup.add(registry, "tune")
    setup.publish("tune", 1)
    setup.publish("tune", 2)
    registry.activate("tune", 1)
    old = registry.acquire("tune")
    module = old.private
    assert module is not None
    before = module.fingerprint()
    registry.activate("tune", 2)
    new = registry.acquire("tune")
    assert (old.adapter_version, new.adapter_version) == (1, 2)
    assert old.private is module
    assert module.fingerprint() == before
    registry.activate("tune", None)
    assert registry.acquire("tune").private is None


def test_a_change_by_another_process_is_followed(setup: Setup) -> None:
    registry = setup.registry()
    setup.add(registry, "tune")
    setup.publish("tune")
    Catalog(setup.database).set_active("tune", 1, cause="job")  # what a worker does
    watcher = RegistryWatcher(registry, poll_seconds=0.01)
    watcher.start()
    wait_for(lambda: registry.describe("tune").adapter_version == 1)
    watcher.stop()


def test_deletion_waits_for_leases(setup: Setup) -> None:
    registry = setup.registry()
    setup.add(registry, "tune")
    setup.publish("tune")
    registry.activate("tune", 1)
    first, second = registry.acquire("tune"), registry.acquire("tune")
    registry.remove("tune")
    assert registry.model_names() == ["base"]
    with pytest.raises(UnknownModelError):
        registry.acquire("tune")
    with pytest.raises(ConflictError, match="being deleted"):
        registry.catalog.require_free_name("TUNE")
    first.release()
    first.release()  # a second release must not count for the other lease
    registry.sync()
    assert registry.store.versions("tune") == [1]
    second.release()
    registry.sync()
    assert registry.store.versions("tune") == []
    registry.catalog.require_free_name("tune")
    setup.add(registry, "tune")  # the name can be used again
    assert registry.describe("tune").adapter_version is None


def test_a_deletion_that_was_interrupted_is_finished_at_start(setup: Setup) -> None:
    registry = setup.registry()
    setup.add(registry, "tune")
    setup.publish("tune")
    registry.catalog.begin_deletion("tune")
    again = setup.registry()
    assert again.model_names() == ["base"]
    assert again.store.versions("tune") == []
    again.catalog.require_free_name("tune")


def test_the_base_and_configured_models_cannot_be_deleted(setup: Setup) -> None:
    registry = setup.registry()
    with pytest.raises(ConflictError, match="base model"):
        registry.remove("base")


def test_restart_restores_everything(setup: Setup) -> None:
    registry = setup.registry()
    for name in ("one", "two"):
        setup.add(registry, name)
        setup.publish(name, 1)
        setup.publish(name, 2)
    registry.activate("one", 2)
    registry.activate("two", 1)
    restored = setup.registry()
    assert restored.model_names() == ["base", "one", "two"]
    assert restored.active_versions() == {"base": None, "one": 2, "two": 1}
    fine_tune = restored.acquire("one").fine_tune
    assert fine_tune.fingerprint == setup.family.fine_tunes["code"].fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_fingerprint": "other"}, "shared draft with fingerprint other"),
        ({"fine_tune_fingerprint": "other"}, "fine-tune with fingerprint other"),
        ({"target_fingerprint": "other"}, "target with fingerprint other"),
        (
            {"sizes": {"hidden_size": 32, "num_features": 96, "intermediate_size": 5, "fc_rank": 0}},
            "holds tensors",
        ),
        (
            {"sizes": {"hidden_size": 16, "num_features": 48, "intermediate_size": 4, "fc_rank": 0}},
            "width 16",
        ),
        ({"sizes": {"hidden_size": 32, "num_features": 96, "intermediate_size": 0, "fc_rank": 0}}, "all 0"),
        (
            {
                "sizes": {
                    "hidden_size": 32,
                    "num_features": 96,
                    "intermediate_size": 4,
                    "fc_rank": 0,
                    "attention_rank": 2,
                    "query_size": 8,
                    "kv_size": 8,
                }
            },
            "queries are 8 wide",
        ),
    ],
)
def test_what_does_not_fit_is_refused(setup: Setup, changes: dict[str, object], message: str) -> None:
    registry = setup.registry()
    setup.add(registry, "tune")
    setup.publish("tune", 1)
    registry.activate("tune", 1)
    setup.publish("tune", 2, **changes)
    with pytest.raises(CorruptVersionError, match=message):
        registry.activate("tune", 2)
    assert registry.active_versions()["tune"] == 1
    with pytest.raises(UnknownVersionError, match="no version 7; there are: 1, 2"):
        registry.activate("tune", 7)


def test_values_that_are_not_finite_are_refused(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = setup.registry()
    setup.add(registry, "tune")
    real = PrivateModule.initialised

    def broken(*args: object, **kwargs: object) -> PrivateModule:
        module = real(*args, **kwargs)  # type: ignore[arg-type]
        with torch.no_grad():
            module.down_proj[0, 0] = float("nan")
        return module

    monkeypatch.setattr(PrivateModule, "initialised", broken)
    setup.publish("tune")
    with pytest.raises(CorruptVersionError, match="not finite"):
        registry.activate("tune", 1)


@pytest.mark.parametrize(
    "damage", ["truncate", "flip", "pickle", "no manifest", "odd manifest", "old schema"]
)
def test_start_up_survives_a_corrupt_version(setup: Setup, damage: str) -> None:
    registry = setup.registry()
    for name in ("good", "bad"):
        setup.add(registry, name)
        setup.publish(name)
        registry.activate(name, 1)
    directory = registry.store.directory("bad", 1)
    weights, manifest = directory / "private.safetensors", directory / "adapter.json"
    match damage:
        case "truncate":
            weights.write_bytes(weights.read_bytes()[:-5])
        case "flip":
            raw = bytearray(weights.read_bytes())
            raw[-1] ^= 1
            weights.write_bytes(bytes(raw))
        case "pickle":
            torch.save({}, directory / "private.bin")
        case "no manifest":
            manifest.unlink()
        case "odd manifest":
            manifest.write_text("[" * 100_000)
        case "old schema":
            manifest.write_text(manifest.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    restored = setup.registry()
    assert restored.active_versions() == {"base": None, "good": 1, "bad": None}
    assert [problem.name for problem in restored.problems] == ["bad"]
    assert restored.problem_of("bad")
    assert restored.acquire("bad").private is None
    assert restored.acquire("good").private is not None


def test_a_fine_tune_whose_files_are_gone_does_not_stop_the_start(setup: Setup, tmp_path: Path) -> None:
    registry = setup.registry()
    shutil.copytree(setup.family.paths["code"], tmp_path / "gone")
    fine_tune = setup.family.fine_tunes["code"]
    entry = new_entry("tune", "posted", "lora", str(tmp_path / "gone"), fine_tune.fingerprint)
    with setup.database.write() as connection:
        registry.catalog.insert_in(connection, entry)
    shutil.rmtree(tmp_path / "gone")
    restored = setup.registry()
    assert restored.model_names() == ["base", "tune"]
    with pytest.raises(UnknownModelError, match="cannot be loaded"):
        restored.acquire("tune")
    assert restored.num_leases("tune") == 0
    shutil.copytree(setup.family.paths["medical"], tmp_path / "gone")
    with pytest.raises(UnknownModelError, match="other weights now"):
        restored.acquire("tune")


def test_least_recently_used_fine_tunes_are_unloaded_and_come_back(setup: Setup) -> None:
    registry = setup.registry(max_loaded=2)
    for name in ("a", "b", "c"):
        setup.add(registry, name)
    loaded = [name for name in ("a", "b", "c") if registry.is_loaded(name)]
    assert loaded == ["b", "c"]
    held = registry.acquire("b")
    with registry.acquire("a") as lease:
        assert lease.fine_tune.fingerprint == setup.family.fine_tunes["code"].fingerprint
        assert [name for name in ("a", "b", "c") if registry.is_loaded(name)] == ["a", "b"]
        with registry.acquire("c"):  # all are in use: the cap waits
            assert all(registry.is_loaded(name) for name in ("a", "b", "c"))
    assert sum(registry.is_loaded(name) for name in ("a", "b", "c")) == 2
    held.release()
    assert registry.is_loaded("base")


def test_a_storm_of_swaps_under_load(setup: Setup) -> None:
    registry = setup.registry()
    setup.add(registry, "tune")
    expected = {None: None}
    for version in (1, 2, 3):
        setup.publish("tune", seed=version)
        _, module = registry.loader.private_module(
            registry.store, "tune", version, setup.family.fine_tunes["code"].fingerprint
        )
        expected[version] = module.fingerprint()  # type: ignore[index]
    wrong: list[object] = []
    done = threading.Event()

    def request() -> None:
        while not done.is_set():
            with registry.acquire("tune") as lease:
                found = lease.private.fingerprint() if lease.private else None
                if expected[lease.adapter_version] != found:  # type: ignore[index]
                    wrong.append((lease.adapter_version, found))

    def swap(offset: int) -> None:
        for turn in range(20):
            registry.activate("tune", (None, 1, 2, 3)[(turn + offset) % 4])
            registry.sync()

    requests = [threading.Thread(target=request) for _ in range(3)]
    swaps = [threading.Thread(target=swap, args=(offset,)) for offset in range(3)]
    for thread in requests + swaps:
        thread.start()
    for thread in swaps:
        thread.join()
    done.set()
    for thread in requests:
        thread.join()
    assert wrong == []
    assert registry.num_leases("tune") == 0
    assert registry.active_versions()["tune"] == registry.catalog.get("tune").active_version
    assert setup.registry().active_versions() == registry.active_versions()


def test_the_guard_rolls_back_to_the_version_before(setup: Setup) -> None:
    registry = setup.registry()
    setup.add(registry, "tune")
    for version in (1, 2, 3):
        setup.publish("tune", seed=version)
    registry.activate("tune", 3)
    registry.apply(GuardVerdict("roll_back", "tune", 3, "slow"))
    assert registry.active_versions()["tune"] == 2
    registry.apply(GuardVerdict("roll_back", "tune", 3, "late"))  # about a version that is no longer active
    assert registry.active_versions()["tune"] == 2
    registry.apply(GuardVerdict("roll_back", "tune", 2, "slow"))
    registry.apply(GuardVerdict("roll_back", "tune", 1, "slow"))
    assert registry.active_versions()["tune"] is None
    assert registry.catalog.get("tune").rejected_versions == [1, 2, 3]
    assert registry.num_rollbacks["tune"] == 3


def test_a_version_that_somebody_brings_back_is_judged_anew(setup: Setup) -> None:
    """Else the guard would take it out again by what it measured before the administrator decided."""
    guard = Guard(GuardSettings(min_passes=20, patience_seconds=0.0))
    registry = setup.registry(guard=guard)
    setup.add(registry, "tune")
    setup.publish("tune")
    registry.activate("tune", 1)

    def measure(tokens: int) -> list[GuardVerdict]:
        for _ in range(40):
            guard.observe("tune", 1, 10, tokens)
            guard.observe("tune", None, 10, 30)
        guard.verdicts({"tune": 1})  # patience is zero, but begins with the first look
        return guard.verdicts({"tune": 1})

    [verdict] = measure(11)
    registry.apply(verdict)
    assert registry.active_versions()["tune"] is None
    registry.activate("tune", 1)
    assert guard.live("tune", 1) is None
    assert guard.verdicts({"tune": 1}) == []
    assert measure(40) == []
    registry.sync()
    assert (live := guard.live("tune", 1)) is not None
    assert live.mean_acceptance_length == 4.0  # a look at the catalog forgets nothing


def test_a_share_of_requests_measures_the_baseline(setup: Setup) -> None:
    registry = setup.registry(guard=Guard(GuardSettings(baseline_share=0.1)))
    setup.add(registry, "tune")
    setup.publish("tune")
    registry.activate("tune", 1)
    leases = [registry.acquire("tune") for _ in range(100)]
    baseline = [lease for lease in leases if lease.is_baseline]
    assert len(baseline) == 10
    assert all(lease.private is None and lease.adapter_version is None for lease in baseline)
