"""A server in a thread of this process, over real sockets, and the registry it resolves models with."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import uvicorn

from eda.adapters.errors import UnknownModelError
from eda.decoder import SpeculativeDecoder
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateModule
from eda.server.app import create_app
from eda.server.connections import ServerConfig
from eda.server.engine.async_engine import AsyncEngine
from eda.server.engine.scheduler import SchedulerLimits
from eda.server.engine.speculation import SpeculationLevel, SpeculationPolicy, SpeculationTable
from eda.server.services import Runtime, Services
from eda.server.settings import Settings
from eda.speculation.costs import DraftCosts
from tests.support.family import MAX_LENGTH, Family

TABLE = SpeculationTable(
    (
        SpeculationLevel(1, "tree", 3, 3, 8),
        SpeculationLevel(4, "chain", 4),
        SpeculationLevel(16, "chain", 2),
        SpeculationLevel(24, "chain", 0),
    ),
    # Free drafts always pay: whether a test drafts must not depend on what earlier tests had accepted.
    DraftCosts(0.0, 0.0, 0.0),
)


@dataclass
class FakeModel:
    name: str
    parent: str | None
    created: int
    adapter_version: int | None
    max_model_len: int
    weights: tuple[str, ...] | None = ("float32",)


@dataclass
class FakeLease:
    model_name: str
    fine_tune: FineTune
    private: PrivateModule | None
    adapter: str | None
    adapter_version: int | None
    registry: "FakeRegistry"
    released: bool = False

    def release(self) -> None:
        if not self.released:
            self.released = True
            self.registry.num_leases -= 1


@dataclass
class FakeRegistry:
    """Holds everything in dictionaries; ``swap`` is what a publication does."""

    family: Family
    max_model_len: int = MAX_LENGTH
    num_leases: int = 0
    versions: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.versions = dict.fromkeys(self.family.privates, 1)
        self.privates = dict(self.family.privates)

    def model_names(self) -> list[str]:
        return list(self.family.fine_tunes)

    def describe(self, name: str) -> FakeModel:
        if name not in self.family.fine_tunes:
            raise UnknownModelError(name)
        parent = None if name == "base" else "base"
        return FakeModel(name, parent, 1_700_000_000, self.versions.get(name), self.max_model_len)

    def is_loaded(self, name: str) -> bool:
        self.describe(name)
        return True

    def acquire(self, name: str) -> FakeLease:
        if name not in self.family.fine_tunes:
            raise UnknownModelError(name)
        self.num_leases += 1
        private = self.privates.get(name)
        adapter = name if private is not None else None
        return FakeLease(name, self.family.fine_tunes[name], private, adapter, self.versions.get(name), self)

    def swap(self, name: str, private: PrivateModule) -> None:
        self.privates[name] = private
        self.versions[name] = self.versions.get(name, 0) + 1


@dataclass
class Parts:
    """A server's inside, for tests that look at slots and leases."""

    services: Services
    decoder: SpeculativeDecoder
    registry: FakeRegistry

    @property
    def num_free_slots(self) -> int:
        return self.decoder.cache.allocator.num_free

    def is_idle(self) -> bool:
        engine = self.services.engine
        return (
            engine.num_running == 0
            and engine.num_waiting == 0
            and self.num_free_slots == self.decoder.cache.num_slots
            and self.registry.num_leases == 0
        )

    def wait_until_idle(self, seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not self.is_idle():
            assert time.monotonic() < deadline, "the server still holds slots or leases"
            time.sleep(0.01)


def make_parts(
    family: Family,
    *,
    num_slots: int = 4096,
    table: SpeculationTable = TABLE,
    max_tokens_per_step: int = 64,
    settings: Settings | None = None,
) -> Parts:
    """Services around the tiny family. Steps are small, so that prompts are computed in several chunks."""
    settings = settings or Settings()
    decoder = SpeculativeDecoder.for_models(family.target, family.draft, num_slots=num_slots, seed=0)
    services = Services(settings)
    engine = AsyncEngine(
        decoder,
        SpeculationPolicy(table, patience=2),
        SchedulerLimits(settings.max_running, max_tokens_per_step),
        max_waiting=settings.max_waiting,
        on_step_stats=services.metrics.on_step_stats,
        on_finish=services.metrics.on_finish,
        on_death=lambda error: services.on_failure(error),
    )
    registry = FakeRegistry(family)
    services.runtime = Runtime(engine, registry, family.tokenizer)
    return Parts(services, decoder, registry)


@contextlib.contextmanager
def serve(services: Services, *, ready: bool = True) -> Iterator[str]:
    """Runs the application on a free port of this machine; gives its address."""
    settings = services.settings.model_copy(update={"port": 0})
    config = ServerConfig(create_app(services), settings, log_level="warning", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        if ready:
            wait_until_ready(url)
        yield url
    finally:
        server.should_exit = True
        thread.join(20)


def wait_until_ready(url: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while httpx.get(f"{url}/ready").status_code != 200:
        assert time.monotonic() < deadline, "the server did not become ready"
        time.sleep(0.02)
