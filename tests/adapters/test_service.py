"""Submissions below HTTP, and a server process that is killed while it changes things."""

import errno
import gzip
import random
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from eda.adapters.database import Database
from eda.adapters.errors import (
    ConflictError,
    InvalidInputError,
    StorageFullError,
    TooLargeError,
    UnknownModelError,
)
from eda.adapters.jobs.queue import Job, JobQueue
from eda.adapters.jobs.spec import TrainingOptions
from eda.adapters.jobs.workspaces import Workspaces
from eda.adapters.service import AdapterService, ServiceSettings
from eda.adapters.serving.catalog import Catalog
from eda.adapters.serving.guard import Guard, GuardSettings
from eda.adapters.serving.model_loader import ModelLoader
from eda.adapters.serving.registry import AdapterRegistry
from eda.adapters.serving.traffic import TrafficRecorder
from eda.adapters.store.names import AllowedRoots
from eda.adapters.store.store import AdapterStore
from eda.adapters.submission import AdaptationOptions, DataLimits, DataSource, TargetSource
from eda.backends.loading import load_target
from eda.models.draft import DraftModel
from eda.models.target import TargetModel
from tests.adapters.databases import url_of
from tests.adapters.helpers import warm_processes
from tests.adapters.test_registry import Setup
from tests.support.reference_family import Family, make_family

SELF = DataSource(self_prompts=4)


def make_service(
    data_dir: Path, base: TargetModel, draft: DraftModel, root: Path, database_url: str
) -> AdapterService:
    database = Database(database_url)
    store = AdapterStore(data_dir / "adapters")
    guard = Guard(GuardSettings(baseline_share=0.0))
    registry = AdapterRegistry(ModelLoader(base, draft), store, Catalog(database), guard=guard)
    return AdapterService(
        database,
        registry,
        JobQueue(database, queue_limit=10_000),
        Workspaces(data_dir / "jobs"),
        TrafficRecorder(data_dir / "traffic"),
        ServiceSettings(AllowedRoots([root]), data_limits=DataLimits(max_bytes=1000, reserve_bytes=0)),
    )


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def service(family: Family, tmp_path: Path, database_url: str) -> Iterator[AdapterService]:
    root = family.paths["base"].parent
    service = make_service(tmp_path / "data", family.base, family.draft, root, database_url)
    service.configure({"medical": family.paths["medical"]})
    yield service
    service.database.close()


def source(family: Family, name: str = "code") -> TargetSource:
    return TargetSource(str(family.paths[name]))


def test_configured_models_come_and_go_with_the_settings(service: AdapterService, family: Family) -> None:
    assert service.registry.model_names() == ["base", "medical"]
    with pytest.raises(ConflictError, match="server's settings"):
        service.delete("medical")
    service.create("posted", source(family), SELF, AdaptationOptions())
    root = family.paths["base"].parent
    again = make_service(
        service.workspaces.root.parent, family.base, family.draft, root, url_of(service.database)
    )
    again.configure({"math": family.paths["math"]})
    assert again.registry.model_names() == ["base", "math", "posted"]
    with pytest.raises(ConflictError, match="posted adapter is called"):
        again.configure({"posted": family.paths["math"]})
    again.database.close()


def test_an_adapter_that_comes_along_is_active_until_somebody_chooses(
    service: AdapterService, family: Family, tmp_path: Path
) -> None:
    def restart() -> int | None:
        again = make_service(
            service.workspaces.root.parent,
            family.base,
            family.draft,
            family.paths["base"].parent,
            url_of(service.database),
        )
        again.configure({"medical": family.paths["medical"]})
        active = again.registry.active_versions()["medical"]
        again.database.close()
        return active

    assert service.registry.active_versions()["medical"] is None
    Setup(family, tmp_path / "data", service.database).publish("medical", source="medical")
    assert restart() == 1
    service.registry.sync()
    service.registry.activate("medical", None)
    assert restart() is None


def test_a_full_fine_tune_is_served(service: AdapterService, family: Family) -> None:
    submission = service.create("full", source(family, "math"), SELF, AdaptationOptions())
    assert (submission.entry.kind, submission.job.state) == ("full", "queued")
    with service.registry.acquire("full") as lease:
        assert lease.fine_tune.lora is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "holds no prompts"),
        ('{"prompt": "a"}\n{"prompt": ""}\n', "line 2"),
        ('{"prompt": "a"}\n\n[1]\n', "line 3"),
        ('{"prompt": "a"}\n{"prompt": \n', "line 2"),
        ('{"messages": [{"role": "user"}]}\n', "line 1"),
    ],
)
def test_bad_data_names_its_line(service: AdapterService, family: Family, lines: str, message: str) -> None:
    path = family.paths["base"].parent / "prompts.jsonl"
    path.write_text(lines)
    data = DataSource(path=str(path))
    with pytest.raises(InvalidInputError, match=f"data.path.*{message}") as caught:
        service.create("bad", source(family), data, AdaptationOptions())
    assert str(service.workspaces.root) not in str(caught.value)
    assert caught.value.param == "data.path"
    assert list(service.workspaces.root.glob("job-*")) == []
    assert "bad" not in service.registry.model_names()


def test_data_beyond_its_limits(service: AdapterService, family: Family) -> None:
    with pytest.raises(TooLargeError, match="file has"):
        service.create("big", source(family), DataSource(upload=b"x" * 2000), AdaptationOptions())
    for bad, message in (
        ({}, "0 sources"),
        ({"self_prompts": 2, "upload": b"x"}, r"2 sources \(file, self\)"),
        ({"self_prompts": 1}, "data.self is 1; it must be from 2"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            DataSource(**bad)
    with pytest.raises(InvalidInputError, match=r"data\.prompts\[1\] is a JSON int"):
        service.create("odd", source(family), DataSource(prompts=["fine", 3]), AdaptationOptions())


def test_prompts_may_be_packed(service: AdapterService, family: Family) -> None:
    lines = b'{"prompt": "one"}\n{"prompt": "two"}\n{"prompt": "three"}\n'
    packed = family.paths["base"].parent / "prompts.jsonl.gz"
    packed.write_bytes(gzip.compress(lines))
    for name, data in (
        ("by-path", DataSource(path=str(packed))),
        ("sent", DataSource(upload=packed.read_bytes())),
    ):
        job = service.create(name, source(family), data, AdaptationOptions()).job
        assert (service.workspaces.directory(job.id) / "prompts.jsonl").read_bytes() == lines
        assert job.spec["data"]["count"] == 3


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (gzip.compress(b"\n" * 50_000_000), TooLargeError, r"file unpacks to more than the limit"),
        (gzip.compress(b'{"prompt": "one"}\n' * 20)[:-12], InvalidInputError, "file is no whole gzip file"),
        (b"\x1f\x8b\x08" + b"\xff" * 40, InvalidInputError, "file is no whole gzip file"),
    ],
    ids=["bomb", "cut off", "damaged"],
)
def test_packed_prompts_are_unpacked_within_limits(
    service: AdapterService, family: Family, content: bytes, error: type[Exception], message: str
) -> None:
    limits = DataLimits(max_bytes=50_000, reserve_bytes=0)
    service.settings = replace(service.settings, data_limits=limits)
    with pytest.raises(error, match=message):
        service.create("packed", source(family), DataSource(upload=content), AdaptationOptions())
    assert list(service.workspaces.root.glob("job-*")) == []


@pytest.mark.parametrize(
    ("data", "training", "param", "message"),
    [
        (DataSource(prompts=["one"]), {}, "data.prompts", "has 1 prompt; at least 2"),
        (DataSource(upload=b'{"prompt": "a"}\n'), {}, "file", "at least 2"),
        (SELF, {"held_out": 4}, "training.held_out", "is 4 and data.self gives 4 prompts"),
        (DataSource(prompts=["a", "b"]), {"held_out": 2}, "training.held_out", "data.prompts gives 2"),
        (SELF, {"max_tokens": 68}, "training.max_tokens", "it must be at most 67"),
    ],
)
def test_a_job_that_could_only_fail_is_refused(
    service: AdapterService,
    family: Family,
    data: DataSource,
    training: dict[str, int],
    param: str,
    message: str,
) -> None:
    limits = DataLimits(max_bytes=1000, reserve_bytes=0, max_model_len=100)
    service.settings = replace(service.settings, data_limits=limits)
    options = AdaptationOptions(TrainingOptions(**training))
    with pytest.raises(InvalidInputError, match=message) as caught:
        service.create("hopeless", source(family), data, options)
    assert caught.value.param == param
    assert list(service.workspaces.root.glob("job-*")) == []
    assert "hopeless" not in service.registry.model_names()


def test_a_model_that_is_too_short_for_a_job_is_refused(service: AdapterService, family: Family) -> None:
    limits = DataLimits(reserve_bytes=0, max_model_len=33)
    service.settings = replace(service.settings, data_limits=limits)
    with pytest.raises(InvalidInputError, match="the model holds 33 tokens; adapting needs more than 33"):
        service.create("short", source(family), SELF, AdaptationOptions())


def test_a_job_for_weights_that_are_gone_or_changed_is_refused(
    service: AdapterService, family: Family, tmp_path: Path
) -> None:
    served = family.paths["base"].parent / "on-the-move"
    shutil.copytree(family.paths["code"], served)
    try:
        service.create("moved", TargetSource(str(served)), SELF, AdaptationOptions())
        [job] = service.queue.page()
        service.queue.cancel(job.id)
        weights = served / "adapter_model.safetensors"
        weights.rename(tmp_path / "away")
        with pytest.raises(ConflictError, match="the weights of 'moved' cannot be read"):
            service.adapt("moved", SELF, AdaptationOptions())
        with pytest.raises(ConflictError, match="the weights of 'moved' cannot be read"):
            service.retry(job.id)
        shutil.copyfile(family.paths["medical"] / "adapter_model.safetensors", weights)
        with pytest.raises(ConflictError, match="other weights now"):
            service.adapt("moved", SELF, AdaptationOptions())
        shutil.copyfile(tmp_path / "away", weights)
        assert service.retry(job.id).state == "queued"
        assert service.adapt("moved", SELF, AdaptationOptions()).job.state == "queued"
    finally:
        shutil.rmtree(served)


def test_a_job_without_a_draft_is_refused(service: AdapterService, family: Family) -> None:
    service.settings = replace(service.settings, has_draft=False)
    for ask in (
        lambda: service.create("law", source(family), SELF, AdaptationOptions()),
        lambda: service.adapt("base", SELF, AdaptationOptions()),
    ):
        with pytest.raises(ConflictError, match="without a shared draft"):
            ask()
    assert service.queue.page() == []
    assert service.registry.model_names() == ["base", "medical"]


def test_a_disk_that_fills_up_while_prompts_are_written(
    service: AdapterService, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.open

    def full(path: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if "w" in mode:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, mode, *arguments, **named)

    monkeypatch.setattr(Path, "open", full)
    content = b'{"prompt": "a"}\n{"prompt": "b"}\n'
    with pytest.raises(StorageFullError, match="prompts cannot be written: No space left"):
        service.create("big", source(family), DataSource(upload=content), AdaptationOptions())
    assert list(service.workspaces.root.glob("job-*")) == []


@pytest.mark.parametrize("same", [True, False])
def test_one_key_twice_at_the_same_time(
    service: AdapterService, family: Family, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both requests look for an earlier one before either has entered its job."""
    service.create("tune", source(family), SELF, AdaptationOptions())
    both = threading.Barrier(2)
    look = service.queue.find_by_key
    looked: set[int] = set()

    def look_together(key: str) -> Job | None:
        found = look(key)
        if threading.get_ident() not in looked:
            looked.add(threading.get_ident())
            both.wait(10)
        return found

    monkeypatch.setattr(service.queue, "find_by_key", look_together)

    def adapt(digest: str) -> str:
        try:
            submission = service.adapt(
                "tune", SELF, AdaptationOptions(), idempotency_key="key", request_hash=digest
            )
        except ConflictError as error:
            return str(error)
        return submission.job.id

    with ThreadPoolExecutor(2) as pool:
        answers = set(pool.map(adapt, ("a", "a" if same else "b")))
    jobs = service.queue.page(adapter="tune")
    assert len(jobs) == 2
    if same:
        assert answers == {jobs[0].id}
    else:
        assert answers == {
            jobs[0].id,
            "the idempotency key 'key' was used for another request; use a new one",
        }
    assert {path.name for path in service.workspaces.root.glob("job-*")} == {job.id for job in jobs}


def test_targets_that_must_not_be_read(service: AdapterService, family: Family, tmp_path: Path) -> None:
    root = family.paths["base"].parent
    outside = tmp_path / "outside"
    shutil.copytree(family.paths["code"], outside)
    (root / "way-out").symlink_to(outside)
    with pytest.raises(InvalidInputError, match="below the allowed directories"):
        service.serve("x", TargetSource(str(root / "way-out")))
    with pytest.raises(InvalidInputError, match="below the allowed directories"):
        service.serve("x", TargetSource(str(outside)))
    inner = root / "inner"
    shutil.copytree(family.paths["code"], inner)
    (inner / "adapter_model.safetensors").unlink()
    (inner / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    with pytest.raises(InvalidInputError, match="leads out of the allowed directories"):
        service.serve("x", TargetSource(str(inner)))
    (inner / "adapter_model.safetensors").unlink()
    (inner / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(InvalidInputError, match="pickle"):
        service.serve("x", TargetSource(str(inner)))
    (inner / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(InvalidInputError, match="states a header of"):
        service.serve("x", TargetSource(str(inner)))
    with pytest.raises(InvalidInputError, match="must be a directory"):
        service.serve("x", TargetSource(str(family.paths["code"] / "adapter_config.json")))
    assert "x" not in service.registry.model_names()
    shutil.rmtree(inner)
    (root / "way-out").unlink()


def test_a_hub_id_is_never_a_local_directory(
    service: AdapterService, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader takes what exists for a path; a request must not get out of the allowed directories that way."""
    shutil.copytree(family.paths["code"], tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    service.settings = replace(service.settings, allow_hub=True)
    with pytest.raises(InvalidInputError, match="is a local path too") as caught:
        service.serve("x", TargetSource(hub_id="owner/name"))
    assert caught.value.param == "target.hub_id"
    fetched: list[str] = []

    def download(name: str, **_: object) -> str:
        fetched.append(name)
        return str(family.paths["code"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert service.serve("x", TargetSource(hub_id="owner/other")).kind == "lora"
    assert fetched == ["owner/other"]


def churn(data_dir: str, root: str, database_url: str, seed: int, ready: Connection) -> None:
    """A server's life in short: restores everything, then creates, activates and deletes until it is killed."""
    torch.set_num_threads(1)
    base = load_target(Path(root) / "base")
    draft = DraftModel.load(Path(root) / "draft")
    service = make_service(Path(data_dir), base, draft, Path(root), database_url)
    service.configure({})
    chance = random.Random(seed)
    ready.send(True)
    while True:
        name = f"tune-{chance.randrange(4)}"
        action = chance.choice(("create", "activate", "activate", "delete"))
        try:
            if action == "create":
                service.create(name, TargetSource(str(Path(root) / "code")), SELF, AdaptationOptions())
            elif action == "delete":
                service.delete(name)
            else:
                service.registry.activate("keeper", chance.choice((None, 1, 2)))
        except (ConflictError, UnknownModelError):
            pass


@pytest.mark.slow
def test_a_server_killed_while_it_changes_things(family: Family, tmp_path: Path, database_url: str) -> None:
    root, data_dir = family.paths["base"].parent, tmp_path / "data"
    service = make_service(data_dir, family.base, family.draft, root, database_url)
    service.configure({})
    service.serve("keeper", source(family))
    setup = Setup(family, data_dir, service.database)
    for seed in (1, 2):
        setup.publish("keeper", seed)
    service.registry.activate("keeper", 2)
    service.database.close()
    chance = random.Random(3)
    processes = warm_processes()
    for turn in range(20):
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=churn, args=(str(data_dir), str(root), database_url, turn, sender))
        process.start()
        sender.close()
        try:
            assert receiver.recv()
            time.sleep(chance.uniform(0.0, 0.4))
        finally:
            process.kill()
            process.join()
            receiver.close()
        require_consistency(make_service(data_dir, family.base, family.draft, root, database_url))


def require_consistency(service: AdapterService) -> None:
    """What must hold after a restart, wherever the server before was killed."""
    service.configure({})
    registry = service.registry
    entries = {entry.name: entry for entry in service.catalog.all()}
    assert set(registry.model_names()) == set(entries), "nothing may be left half-deleted"
    assert registry.active_versions()["keeper"] == entries["keeper"].active_version
    assert registry.store.scan().problems == []
    assert registry.store.versions("keeper") == [1, 2]
    queued = service.queue.page(state="queued", limit=10_000)
    assert all(service.workspaces.directory(job.id).is_dir() for job in queued)
    assert {job.adapter_uid for job in queued} <= {entry.uid for entry in entries.values()}
    for name in registry.model_names():
        registry.acquire(name).release()
    service.database.close()


def test_a_description_that_not_every_database_takes(service: AdapterService, family: Family) -> None:
    with pytest.raises(InvalidInputError, match="NUL"):
        service.create("tune", source(family), SELF, AdaptationOptions(), description="a\x00b")
    assert service.registry.model_names() == ["base", "medical"]
    with pytest.raises(InvalidInputError, match="NUL"):
        service.patch("medical", description="\x00")
