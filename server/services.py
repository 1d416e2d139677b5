"""What routes work with: the loaded models, the engine in front of them, settings and counters."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from fastapi import Request

from eda.adapters.service import AdapterService
from eda.adapters.templates.renderer import TemplateRenderer
from eda.formats.tokenizer import TextTokenizer
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateModule
from eda.server.engine.async_engine import AsyncEngine
from eda.server.errors import UnavailableError
from eda.server.metrics import ServerMetrics
from eda.server.settings import Settings


class ServedModel(Protocol):
    """A name that requests may give as ``model``."""

    @property
    def name(self) -> str: ...
    @property
    def parent(self) -> str | None: ...
    @property
    def created(self) -> int: ...
    @property
    def adapter_version(self) -> int | None: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def weights(self) -> tuple[str, ...] | None: ...


class Lease(Protocol):
    """One request's hold on a fine-tune and on one version of its private module."""

    @property
    def model_name(self) -> str: ...
    @property
    def fine_tune(self) -> FineTune: ...
    @property
    def private(self) -> PrivateModule | None: ...
    @property
    def adapter(self) -> str | None: ...
    @property
    def adapter_version(self) -> int | None: ...
    def release(self) -> None: ...


class ModelRegistry(Protocol):
    """The part of ``eda.adapters.serving.registry.AdapterRegistry`` that requests need.

    All that take a name raise ``eda.adapters.errors.UnknownModelError`` for one that is not served. ``acquire``
    reads from disk when ``is_loaded`` is false.
    """

    def model_names(self) -> list[str]: ...
    def describe(self, name: str) -> ServedModel: ...
    def is_loaded(self, name: str) -> bool: ...
    def acquire(self, name: str) -> Lease: ...


@dataclass(slots=True)
class Runtime:
    """What exists once the models are loaded.

    ``tokenizer`` is the base's. ``adapters`` is what the administrative routes work with; ``None`` in a server that has
    none. ``can_draft`` is false in a server without a draft model. ``chat_max_tokens`` bounds chats that give no limit.
    ``weights`` are the formats that the base's weights run in, ``instructions`` the C++ passes' instruction set.
    ``on_start`` is called once the engine runs, ``on_close`` after it has stopped.
    """

    engine: AsyncEngine
    registry: ModelRegistry
    tokenizer: TextTokenizer
    adapters: AdapterService | None = None
    weights: tuple[str, ...] = ()
    instructions: str | None = None
    can_draft: bool = True
    chat_max_tokens: int = 2048
    templates: TemplateRenderer = field(default_factory=TemplateRenderer)
    on_start: Callable[[], None] = lambda: None
    on_close: Callable[[], None] = lambda: None


@dataclass(slots=True)
class Services:
    """One server.

    Attributes:
        load: makes the runtime; called in a thread at start, while ``/health`` already answers. Not needed when
            ``runtime`` is given.
        on_failure: called when loading fails or the engine dies; the process should end then.
    """

    settings: Settings
    load: Callable[["Services"], Runtime] | None = None
    runtime: Runtime | None = None
    metrics: ServerMetrics = field(default_factory=ServerMetrics)
    on_failure: Callable[[BaseException], None] = lambda error: None
    failure: BaseException | None = None
    is_draining: bool = False

    def loaded(self) -> Runtime:
        """The runtime; ``UnavailableError`` while it is loading, or when that failed."""
        if self.runtime is None:
            state = "could not load its models" if self.failure is not None else "is loading its models"
            raise UnavailableError(f"the server {state}")
        return self.runtime

    @property
    def engine(self) -> AsyncEngine:
        return self.loaded().engine

    @property
    def registry(self) -> ModelRegistry:
        return self.loaded().registry

    @property
    def templates(self) -> TemplateRenderer:
        return self.loaded().templates

    def tokenizer_of(self, fine_tune: FineTune) -> TextTokenizer:
        """The fine-tune's own tokenizer and chat template where it brings them, else the base's."""
        return fine_tune.tokenizer or self.loaded().tokenizer

    @property
    def health_problem(self) -> str | None:
        """Why the process should be restarted; ``None`` while it is well."""
        if self.failure is not None:
            what = "loading" if self.runtime is None else "the engine"
            return f"{what} failed: {type(self.failure).__name__}"
        if self.runtime is None:
            return None
        engine = self.runtime.engine
        if engine.failure is not None:
            return f"the engine has failed: {type(engine.failure).__name__}"
        if not engine.is_alive and not self.is_draining:
            return "the engine is not running"
        if engine.seconds_without_progress > self.settings.stall_seconds:
            return f"no step has ended for {engine.seconds_without_progress:.0f} s"
        return None

    @property
    def is_ready(self) -> bool:
        return self.runtime is not None and not self.is_draining and self.health_problem is None


def services_of(request: Request) -> Services:
    """Dependency: the application's services."""
    services: Services = request.app.state.services
    return services
