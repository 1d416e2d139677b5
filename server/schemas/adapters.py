"""Bodies of the administrative routes: adapters and jobs."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field

from eda.adapters.jobs.queue import Job, JobEvent
from eda.adapters.jobs.spec import DEFAULT_MARGIN, TrainingOptions
from eda.adapters.service import AdapterState, VersionState
from eda.adapters.serving.guard import LiveAcceptance
from eda.adapters.submission import MAX_SELF_PROMPTS, MIN_PROMPTS, AdaptationOptions, DataSource, TargetSource
from eda.server.schemas.generation import RequestModel

Name = Annotated[str, Field(min_length=1, max_length=64, description="letters, digits and . _ -")]
Path = Annotated[str, Field(min_length=1, max_length=4096)]
Role = Annotated[str, Field(min_length=1, max_length=64)]


class PromptMessage(RequestModel):
    role: Role
    content: str


PromptBody = str | Annotated[list[PromptMessage], Field(fail_fast=True)]


class TargetBody(RequestModel):
    """The fine-tune: a PEFT LoRA directory or a full checkpoint."""

    path: Path | None = Field(None, description="below the server's allowed directories")
    hub_id: Annotated[str, Field(min_length=3, max_length=200)] | None = Field(None, description="owner/name")
    kind: Literal["auto", "lora", "full"] = "auto"

    def to_source(self) -> TargetSource:
        return TargetSource(self.path, self.hub_id, self.kind)


class TrafficBody(RequestModel):
    min_requests: int = Field(
        32, ge=MIN_PROMPTS, le=10_000_000, description="recorded requests that must be there"
    )


class DataBody(RequestModel):
    """Where prompts come from: exactly one of the fields. A file is uploaded to ``.../upload`` instead."""

    prompts: Annotated[list[PromptBody], Field(min_length=1, max_length=100_000, fail_fast=True)] | None = (
        None
    )
    path: Path | None = Field(
        None, description="JSON lines with prompt or messages, below the allowed directories"
    )
    self_prompts: int | None = Field(
        None,
        alias="self",
        ge=MIN_PROMPTS,
        le=MAX_SELF_PROMPTS,
        description="prompts that the fine-tune writes for itself",
    )
    traffic: TrafficBody | None = Field(None, description="recorded requests and the fine-tune's own answers")

    def to_source(self) -> DataSource:
        prompts: list[Any] | None = None
        if self.prompts is not None:
            prompts = [
                prompt if isinstance(prompt, str) else [message.model_dump() for message in prompt]
                for prompt in self.prompts
            ]
        traffic = self.traffic.min_requests if self.traffic is not None else None
        return DataSource(prompts, self.path, None, self.self_prompts, traffic)


class AdaptBody(RequestModel):
    """What to learn from and how. Without ``data`` a file must be uploaded."""

    training: TrainingOptions = Field(default_factory=TrainingOptions)
    triage: bool = Field(True, description="stop when the shared draft is good enough for this fine-tune")
    activate: Literal["if_better", "always", "never"] = "if_better"
    margin: float = Field(
        DEFAULT_MARGIN,
        ge=0,
        le=10,
        description="gain in acceptance length that if_better asks for, as a share",
    )

    def to_options(self) -> AdaptationOptions:
        return AdaptationOptions(self.training, self.triage, self.activate, self.margin)


class AdaptRequest(AdaptBody):
    """``POST /adapters/{name}/jobs``."""

    data: DataBody


class CreateAdapterBody(AdaptBody):
    name: Name
    target: TargetBody
    description: str = Field("", max_length=4_000)


class CreateAdapterRequest(CreateAdapterBody):
    """``POST /adapters``."""

    data: DataBody


class ActivateRequest(RequestModel):
    """``POST /adapters/{name}/activate``."""

    version: int | None = Field(ge=1, le=2**31 - 1, description="null: the shared draft alone")


class LimitsBody(RequestModel):
    traffic_max_mib: int | None = Field(None, ge=1, le=1_000_000, description="recorded traffic, MiB")


class PatchAdapterRequest(RequestModel):
    """``PATCH /adapters/{name}``: what is given is changed."""

    description: str | None = Field(None, max_length=4_000)
    limits: LimitsBody | None = None
    record_traffic: bool | None = Field(
        None, description="keep prompts and answers on disk for a later adaptation"
    )


class LoadLoraRequest(RequestModel):
    """``POST /v1/load_lora_adapter``."""

    lora_name: Name
    lora_path: Path


class UnloadLoraRequest(RequestModel):
    """``POST /v1/unload_lora_adapter``."""

    lora_name: Name
    lora_int_id: int | None = Field(None, description="accepted and not used")


class LiveBody(BaseModel):
    """Acceptance in service: tokens per target pass over the last requests."""

    mean_acceptance_length: float
    num_passes: int
    num_requests: int

    @classmethod
    def of(cls, live: LiveAcceptance | None) -> Self | None:
        if live is None:
            return None
        return cls(
            mean_acceptance_length=round(live.mean_acceptance_length, 4),
            num_passes=live.num_passes,
            num_requests=live.num_requests,
        )


class EventBody(BaseModel):
    id: int
    type: str
    created_at: float = Field(description="seconds since the epoch")
    data: dict[str, Any]

    @classmethod
    def of(cls, event: JobEvent) -> Self:
        return cls(id=event.id, type=event.type, created_at=event.created_at, data=event.data)


class VersionBody(BaseModel):
    """One immutable version; ``problem`` says why it cannot be used."""

    version: int
    created: str | None
    sizes: dict[str, int] | None
    num_bytes: int | None
    metrics: dict[str, Any] | None = Field(description="before and after, on held-out prompts")
    provenance: dict[str, Any] | None
    live: LiveBody | None
    problem: str | None

    @classmethod
    def of(cls, state: VersionState) -> Self:
        manifest = state.manifest
        return cls(
            version=state.version,
            created=manifest.created if manifest else None,
            sizes=dict(manifest.sizes) if manifest else None,
            num_bytes=manifest.weights_bytes if manifest else None,
            metrics=dict(manifest.metrics) if manifest else None,
            provenance=dict(manifest.provenance) if manifest else None,
            live=LiveBody.of(state.live),
            problem=state.problem,
        )


class TrafficUsageBody(BaseModel):
    recording: bool
    num_records: int
    num_bytes: int


class AdapterBody(BaseModel):
    """A fine-tune in service and the versions of its private module. Times are seconds since the epoch."""

    object: Literal["adapter"] = "adapter"
    name: str
    kind: Literal["target", "lora", "full"]
    origin: Literal["configured", "posted"]
    path: str
    description: str
    limits: dict[str, int]
    created_at: float
    updated_at: float
    fine_tune_fingerprint: str
    active_version: int | None = Field(description="null: served with the shared draft alone")
    rejected_versions: list[int] = Field(description="rolled back by the guard")
    loaded: bool
    num_requests: int = Field(description="requests that use it now")
    problem: str | None = Field(description="why the active version is not in service")
    versions: list[VersionBody]
    live_baseline: LiveBody | None = Field(
        description="the shared draft alone, on a share of this model's requests"
    )
    traffic: TrafficUsageBody

    @classmethod
    def of(cls, state: AdapterState) -> Self:
        entry = state.entry
        return cls(
            name=entry.name,
            kind=entry.kind,
            origin=entry.origin,
            path=entry.path,
            description=entry.description,
            limits=entry.limits,
            created_at=entry.created_at,
            updated_at=entry.updated_at,
            fine_tune_fingerprint=entry.fine_tune_fingerprint,
            active_version=entry.active_version,
            rejected_versions=entry.rejected_versions,
            loaded=state.is_loaded,
            num_requests=state.num_requests,
            problem=state.problem,
            versions=[VersionBody.of(version) for version in state.versions],
            live_baseline=LiveBody.of(state.live_baseline),
            traffic=TrafficUsageBody(
                recording=entry.record_traffic,
                num_records=state.traffic.num_records,
                num_bytes=state.traffic.num_bytes,
            ),
        )


class AdapterDetailBody(AdapterBody):
    """With what happened to it, newest first: activations, rollbacks, alarms."""

    events: list[EventBody] = Field(default_factory=list)


class AdapterListBody(BaseModel):
    object: Literal["list"] = "list"
    data: list[AdapterBody]


class JobBody(BaseModel):
    """An adaptation job. Times are seconds since the epoch."""

    object: Literal["adaptation.job"] = "adaptation.job"
    id: str
    adapter: str
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    stage: str | None
    progress: float = Field(description="0 to 1 over all stages")
    eta_seconds: float | None
    message: str
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    attempts: int
    max_attempts: int = Field(description="attempts in a row that may fail in one stage")
    cancel_requested: bool
    created_at: float
    started_at: float | None
    finished_at: float | None

    @classmethod
    def of(cls, job: Job) -> Self:
        same = {name: getattr(job, name) for name in cls.model_fields if name not in ("object", "status")}
        return cls(status=job.state, **same)


class JobListBody(BaseModel):
    object: Literal["list"] = "list"
    data: list[JobBody]
    has_more: bool


class SubmissionBody(BaseModel):
    """What ``POST /adapters`` answers: the fine-tune in service and the job that makes its adapter."""

    adapter: AdapterBody
    job: JobBody


class DeletedBody(BaseModel):
    object: Literal["adapter.deleted"] = "adapter.deleted"
    name: str
    deleted: bool = True
