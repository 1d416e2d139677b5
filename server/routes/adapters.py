"""``/adapters``: hand over a fine-tune, look at what is served, choose versions. And vLLM's names for LoRAs."""

import asyncio
import hashlib
import json
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, File, Form, Header, Response, UploadFile
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ValidationError

from eda.adapters.errors import ConflictError, InvalidInputError
from eda.adapters.service import AdapterService, Submission
from eda.adapters.submission import DataSource, TargetSource
from eda.server.adapter_errors import AdapterRoute, ResourceNotFoundError
from eda.server.bodies import check_json
from eda.server.schemas.adapters import (
    ActivateRequest,
    AdaptBody,
    AdapterBody,
    AdapterDetailBody,
    AdapterListBody,
    AdaptRequest,
    CreateAdapterBody,
    CreateAdapterRequest,
    DeletedBody,
    EventBody,
    JobBody,
    LoadLoraRequest,
    PatchAdapterRequest,
    SubmissionBody,
    UnloadLoraRequest,
)
from eda.server.services import Services, services_of
from eda.server.validation import from_problems

router = APIRouter(tags=["adapters"], route_class=AdapterRoute)

Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)]
JsonField = Annotated[str, Form(description="the JSON body of the call without a file, less its data")]
PromptFile = Annotated[UploadFile, File(description="JSON lines with prompt or messages")]
PLAIN_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}
B = TypeVar("B", bound=BaseModel)
_ALIASES = {
    "name": "lora_name",
    "target": "lora_path",
    "target.path": "lora_path",
    "target.kind": "lora_path",
}
"""What ``/v1/load_lora_adapter`` calls the fields of ``POST /adapters``."""


Provided = Annotated[Services, Depends(services_of)]


def adapter_service(services: Provided) -> AdapterService:
    """Dependency: the adapter service, once models are loaded."""
    adapters = services.loaded().adapters
    if adapters is None:
        raise ResourceNotFoundError("this server runs without adapters")
    return adapters


Adapters = Annotated[AdapterService, Depends(adapter_service)]


@router.post("/adapters", status_code=202)
async def create_adapter(
    body: CreateAdapterRequest, response: Response, adapters: Adapters, key: Key = None
) -> SubmissionBody:
    """Serve a fine-tune at once, with the shared draft alone, and start the job that makes its adapter."""
    return await _create(adapters, response, body, body.data.to_source(), key, _hash(body))


@router.post("/adapters/upload", status_code=202)
async def create_adapter_from_file(
    request: JsonField,
    file: PromptFile,
    response: Response,
    adapters: Adapters,
    services: Provided,
    key: Key = None,
) -> SubmissionBody:
    """``POST /adapters`` with the prompts in a file of the form."""
    body = _parse(CreateAdapterBody, request, services.settings.max_body_values)
    content = await file.read()
    return await _create(adapters, response, body, DataSource(upload=content), key, _hash(body, content))


@router.post("/adapters/{name}/jobs", status_code=202)
async def adapt_again(
    name: str, body: AdaptRequest, response: Response, adapters: Adapters, key: Key = None
) -> SubmissionBody:
    """Start another job for a fine-tune in service; it makes the next version."""
    return await _adapt(
        adapters, response, name, body, body.data.to_source(), key, _hash(body, name.encode())
    )


@router.post("/adapters/{name}/jobs/upload", status_code=202)
async def adapt_again_from_file(
    name: str,
    request: JsonField,
    file: PromptFile,
    response: Response,
    adapters: Adapters,
    services: Provided,
    key: Key = None,
) -> SubmissionBody:
    """``POST /adapters/{name}/jobs`` with the prompts in a file of the form."""
    body = _parse(AdaptBody, request, services.settings.max_body_values)
    content = await file.read()
    digest = _hash(body, name.encode(), content)
    return await _adapt(adapters, response, name, body, DataSource(upload=content), key, digest)


@router.get("/adapters")
async def list_adapters(adapters: Adapters) -> AdapterListBody:
    """Everything in service, oldest first."""
    states = await asyncio.to_thread(adapters.describe_all)
    return AdapterListBody(data=[AdapterBody.of(state) for state in states])


@router.get("/adapters/{name}")
async def get_adapter(name: str, adapters: Adapters) -> AdapterDetailBody:
    """Versions, metrics before and after, provenance, live acceptance, and what happened lately."""
    return await asyncio.to_thread(_detail, adapters, name)


@router.patch("/adapters/{name}")
async def patch_adapter(name: str, body: PatchAdapterRequest, adapters: Adapters) -> AdapterDetailBody:
    """Change the description, limits, or whether traffic is recorded."""
    limits = body.limits.model_dump(exclude_none=True) if body.limits is not None else None
    await asyncio.to_thread(
        adapters.patch, name, description=body.description, limits=limits, record_traffic=body.record_traffic
    )
    return await asyncio.to_thread(_detail, adapters, name)


@router.delete("/adapters/{name}", status_code=202)
async def delete_adapter(name: str, adapters: Adapters) -> DeletedBody:
    """Take an adapter out of service. Running requests finish; then its files go."""
    await asyncio.to_thread(adapters.delete, name)
    return DeletedBody(name=name)


@router.delete("/adapters/{name}/traffic", status_code=204)
async def delete_traffic(name: str, adapters: Adapters) -> None:
    """Delete what was recorded of this model's requests."""
    await asyncio.to_thread(adapters.delete_traffic, name)


@router.post("/adapters/{name}/activate")
async def activate(name: str, body: ActivateRequest, adapters: Adapters) -> AdapterDetailBody:
    """Serve a version from now on, an older one too; running requests stay on theirs."""
    await asyncio.to_thread(adapters.registry.activate, name, body.version)
    return await asyncio.to_thread(_detail, adapters, name)


@router.post("/v1/load_lora_adapter", response_class=Response, responses=PLAIN_TEXT)
async def load_lora_adapter(body: LoadLoraRequest, adapters: Adapters) -> Response:
    """Serve a LoRA with the shared draft alone."""
    try:
        await asyncio.to_thread(
            adapters.serve, body.lora_name, TargetSource(path=body.lora_path, kind="lora")
        )
    except ConflictError as error:
        # Where this call comes from, a name in use is a bad request.
        raise InvalidInputError(str(error), param="lora_name") from error
    except InvalidInputError as error:
        raise InvalidInputError(
            _in_words_of_the_alias(str(error)), param=_ALIASES.get(error.param or "")
        ) from error
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_class=Response, responses=PLAIN_TEXT)
async def unload_lora_adapter(body: UnloadLoraRequest, adapters: Adapters) -> Response:
    """Take a LoRA out of service."""
    await asyncio.to_thread(adapters.delete, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def _create(
    adapters: AdapterService,
    response: Response,
    body: CreateAdapterBody,
    data: DataSource,
    key: str | None,
    request_hash: str,
) -> SubmissionBody:
    submission = await asyncio.to_thread(
        adapters.create,
        body.name,
        body.target.to_source(),
        data,
        body.to_options(),
        description=body.description,
        idempotency_key=key,
        request_hash=request_hash,
    )
    return await _accepted(adapters, response, submission)


async def _adapt(
    adapters: AdapterService,
    response: Response,
    name: str,
    body: AdaptBody,
    data: DataSource,
    key: str | None,
    request_hash: str,
) -> SubmissionBody:
    submission = await asyncio.to_thread(
        adapters.adapt, name, data, body.to_options(), idempotency_key=key, request_hash=request_hash
    )
    return await _accepted(adapters, response, submission)


async def _accepted(adapters: AdapterService, response: Response, submission: Submission) -> SubmissionBody:
    response.headers["Location"] = f"/jobs/{submission.job.id}"
    state = await asyncio.to_thread(adapters.describe, submission.entry.name)
    return SubmissionBody(adapter=AdapterBody.of(state), job=JobBody.of(submission.job))


def _in_words_of_the_alias(message: str) -> str:
    for field, alias in sorted(_ALIASES.items(), reverse=True):  # longer ones first
        if message.startswith(field):
            return alias + message.removeprefix(field)
    return message


def _detail(adapters: AdapterService, name: str) -> AdapterDetailBody:
    state = adapters.describe(name)
    events = adapters.queue.adapter_events(state.entry.uid)
    body = AdapterDetailBody.of(state)
    body.events = [EventBody.of(event) for event in events]
    return body


def _parse(model: type[B], text: str, max_values: int) -> B:
    """The JSON in a form field. Raises ``ApiError`` with the first thing that is wrong."""
    check_json(text.encode(errors="replace"), max_values, param="request")
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        problems: list[Any] = error.errors(include_url=False)
        raise from_problems(problems, root="request") from error


def _hash(body: BaseModel, *contents: bytes) -> str:
    """Tells whether two requests with one idempotency key ask for the same thing."""
    digest = hashlib.sha256(json.dumps(body.model_dump(mode="json"), sort_keys=True).encode())
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()
