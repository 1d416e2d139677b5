"""``/jobs``: adaptation jobs, their progress as it happens, cancel and retry."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Query, Response

from eda.adapters.jobs.queue import JobEvent, JobQueue
from eda.adapters.service import AdapterService
from eda.server.adapter_errors import AdapterRoute
from eda.server.routes.adapters import adapter_service
from eda.server.schemas.adapters import JobBody, JobListBody
from eda.server.services import Services, services_of
from eda.server.streaming import EventStream

router = APIRouter(tags=["jobs"], route_class=AdapterRoute)

POLL_SECONDS = 0.5
KEEP_ALIVE_SECONDS = 15.0
MAX_EVENT_ID = 2**62

Adapters = Annotated[AdapterService, Depends(adapter_service)]
Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]


@router.get("/jobs")
async def list_jobs(
    adapters: Adapters,
    status: Status | None = None,
    adapter: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[
        str | None, Query(max_length=64, description="id of the last job of the page before")
    ] = None,
) -> JobListBody:
    """Newest first."""
    page = await asyncio.to_thread(
        adapters.queue.page, state=status, adapter=adapter, limit=limit + 1, after=after
    )
    return JobListBody(data=[JobBody.of(job) for job in page[:limit]], has_more=len(page) > limit)


@router.get("/jobs/{job_id}")
async def get_job(job_id: str, adapters: Adapters) -> JobBody:
    """One job."""
    return JobBody.of(await asyncio.to_thread(adapters.queue.get, job_id))


@router.get(
    "/jobs/{job_id}/events",
    response_class=Response,
    responses={
        200: {
            "content": {"text/event-stream": {}},
            "description": "Events as they happen, until the job has ended",
        },
        204: {"description": "The job has ended and there is nothing after Last-Event-ID"},
    },
)
async def stream_events(
    job_id: str,
    adapters: Adapters,
    services: Annotated[Services, Depends(services_of)],
    last_event_id: Annotated[str | None, Header(max_length=32)] = None,
) -> Response:
    """Server-sent events: stages, progress, losses and acceptance lengths. ``Last-Event-ID`` resumes after one."""
    last_id = int(last_event_id) if last_event_id and last_event_id.isdecimal() else 0
    last_id = min(last_id, MAX_EVENT_ID)
    job = await asyncio.to_thread(adapters.queue.get, job_id)
    waiting = await asyncio.to_thread(adapters.queue.events_after, job_id, last_id, limit=1)
    if job.is_final and not waiting:
        return Response(status_code=204)  # tells an EventSource not to come again
    return EventStream(_events(adapters.queue, services, job_id, last_id), lambda: None)


@router.post("/jobs/{job_id}/cancel")
async def cancel_job(job_id: str, adapters: Adapters) -> JobBody:
    """End a job. A running one stops within a second or two and keeps what it has finished."""
    return JobBody.of(await asyncio.to_thread(adapters.queue.cancel, job_id))


@router.post("/jobs/{job_id}/retry")
async def retry_job(job_id: str, adapters: Adapters) -> JobBody:
    """Queue a failed or cancelled job again; it goes on after its last finished stage."""
    return JobBody.of(await asyncio.to_thread(adapters.retry, job_id))


async def _events(queue: JobQueue, services: Services, job_id: str, last_id: int) -> AsyncIterator[str]:
    """Stored events, then new ones as they come; between them the job's progress, which is not stored."""
    shown: tuple[str | None, float] | None = None
    quiet_since = time.monotonic()
    while not services.is_draining:
        # The state is read first: an event that comes after a final state belongs to a retry.
        job = await asyncio.to_thread(queue.get, job_id)
        events = await asyncio.to_thread(queue.events_after, job_id, last_id)
        for event in events:
            last_id = event.id
            yield _format(event)
        progress = (job.stage, job.progress)
        if job.state == "running" and progress != shown:
            shown = progress
            data = {
                "stage": job.stage,
                "progress": round(job.progress, 4),
                "eta_seconds": job.eta_seconds,
                "message": job.message,
            }
            yield f"event: progress\ndata: {json.dumps(data)}\n\n"
        elif not events:
            if job.is_final:
                return
            if time.monotonic() - quiet_since > KEEP_ALIVE_SECONDS:
                quiet_since = time.monotonic()
                yield ": still there\n\n"
            await asyncio.sleep(POLL_SECONDS)
            continue
        quiet_since = time.monotonic()


def _format(event: JobEvent) -> str:
    data = {**event.data, "created_at": event.created_at}
    return f"id: {event.id}\nevent: {event.type}\ndata: {json.dumps(data)}\n\n"
