"""Running a prepared request: as one body, or as server-sent events."""

import asyncio
import contextlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from eda.server.engine.async_engine import OutputStream
from eda.server.engine.engine import EngineError
from eda.server.engine.sequence import SequenceDelta
from eda.server.errors import ApiError, from_engine
from eda.server.logs import logger
from eda.server.middleware import CLIENT_CLOSED_REQUEST
from eda.server.preparation import PreparedRequest
from eda.server.rendering import Collected, metrics_of, usage_of
from eda.server.schemas.generation import GenerationOptions
from eda.server.schemas.responses import ChatCompletionChunk, CompletionResponse
from eda.server.services import Services

DONE = "data: [DONE]\n\n"
LOGPROBS_INLINE = 256
"""Tokens with log-probabilities up to which an answer is written in the event loop; each may list many others."""


Chunk = CompletionResponse | ChatCompletionChunk


class Renderer(ABC):
    """What one endpoint writes: a whole body, or chunks."""

    def __init__(self, options: GenerationOptions, *, wants_logprobs: bool) -> None:
        self._options = options
        self._wants_logprobs = wants_logprobs
        self._created = int(time.time())

    @abstractmethod
    def body(self, request: PreparedRequest, outputs: list[Collected]) -> BaseModel:
        """The answer of a request that is not streamed."""

    @abstractmethod
    def opening(self, request: PreparedRequest) -> Iterator[BaseModel]:
        """Chunks before the first token."""

    @abstractmethod
    def empty_chunk(self, request: PreparedRequest) -> Chunk:
        """A chunk without choices."""

    @abstractmethod
    def news(self, request: PreparedRequest, index: int, delta: SequenceDelta) -> Chunk:
        """A chunk with one choice's news."""

    def chunk(
        self, request: PreparedRequest, index: int, delta: SequenceDelta, is_last: bool
    ) -> BaseModel | None:
        """One choice's news; ``None`` when there are none. ``is_last``: no choice has more to come."""
        wants_tokens = self._options.return_token_ids or self._wants_logprobs
        if not delta.text and delta.finish_reason is None and not (wants_tokens and delta.token_ids):
            return None
        chunk = self.news(request, index, delta)
        if is_last and not self._options.includes_usage:
            chunk.metrics = metrics_of(request)
        return chunk

    def closing(self, request: PreparedRequest) -> Iterator[BaseModel]:
        """Chunks after the last token."""
        if self._options.includes_usage:
            chunk = self.empty_chunk(request)
            chunk.usage, chunk.metrics = usage_of(request), metrics_of(request)
            yield chunk


async def respond(
    services: Services, http: Request, prepared: PreparedRequest, renderer: Renderer, *, stream: bool
) -> Response:
    """Queues the request and answers it. The lease is given back when the answer is over, however it ends."""
    for sequence in prepared.sequences:
        sequence.client = http.state.client.name
    try:
        outputs = services.engine.open(prepared.sequences)
    except EngineError as error:
        prepared.lease.release()
        raise from_engine(error) from error

    def close() -> None:
        outputs.close()
        prepared.lease.release()
        _describe(http, prepared)

    if stream:
        return EventStream(_events(outputs, prepared, renderer, close), close)
    try:
        return await _whole(http, outputs, prepared, renderer)
    finally:
        close()


async def _whole(
    http: Request, outputs: OutputStream, prepared: PreparedRequest, renderer: Renderer
) -> Response:
    collecting = asyncio.ensure_future(_collect(outputs))
    leaving = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            http.state.log["status"] = CLIENT_CLOSED_REQUEST
            return Response(status_code=CLIENT_CLOSED_REQUEST)  # nobody reads it
        try:
            collected = collecting.result()
        except EngineError as error:
            raise _told(prepared, error) from error
        if sum(len(output.logprobs) for output in collected) <= LOGPROBS_INLINE:
            return json_response(renderer.body(prepared, collected))
        return await asyncio.to_thread(lambda: json_response(renderer.body(prepared, collected)))
    finally:
        for task in (collecting, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _collect(outputs: OutputStream) -> list[Collected]:
    collected = [Collected() for _ in outputs.sequences]
    async for index, delta in outputs:
        collected[index].add(delta)
    return collected


async def _disconnected(http: Request) -> None:
    """Returns when the client has gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _events(
    outputs: OutputStream, prepared: PreparedRequest, renderer: Renderer, close: Callable[[], None]
) -> AsyncIterator[str]:
    try:
        for chunk in renderer.opening(prepared):
            yield event(chunk)
        async for index, delta in outputs:
            chunk_or_none = renderer.chunk(prepared, index, delta, not outputs.unfinished)
            if chunk_or_none is not None:
                yield event(chunk_or_none)
        for chunk in renderer.closing(prepared):
            yield event(chunk)
    except Exception as error:
        # The status line is out; the error can only be told inside the stream.
        yield f"data: {json.dumps(_told(prepared, error).body())}\n\n"
    # Before the last event, so that whoever has seen the end finds everything given back.
    close()
    yield DONE


def _told(prepared: PreparedRequest, error: Exception) -> ApiError:
    """What the client learns of ``error``; the log has the rest when it is the server's fault."""
    told = from_engine(error)
    if told.status == 500:
        logger().error("request failed", id=prepared.request_id, exc_info=error)
    return told


def event(chunk: BaseModel) -> str:
    """A chunk as one server-sent event."""
    return f"data: {chunk.model_dump_json(exclude_none=False)}\n\n"


def json_response(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")


class EventStream(StreamingResponse):
    """A stream that calls ``on_close`` when it ends, even when it was never begun."""

    def __init__(self, events: AsyncIterator[str], on_close: Callable[[], None]) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        self._events = events
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()
            closing: Any = getattr(self._events, "aclose", None)
            if closing is not None:
                with contextlib.suppress(RuntimeError):
                    await closing()


def _describe(http: Request, prepared: PreparedRequest) -> None:
    """Adds to the request's log line what was served."""
    metrics, labels = metrics_of(prepared), prepared.sequences[0].labels
    http.state.log.update(
        model=labels.model_name,
        adapter=labels.adapter,
        adapter_version=labels.adapter_version,
        draft=labels.draft,
        prompt_tokens=prepared.num_prompt_tokens,
        completion_tokens=prepared.num_completion_tokens,
        acceptance_length=metrics.mean_acceptance_length,
        first_token_ms=metrics.time_to_first_token_ms,
        finish_reason=",".join(sorted({str(s.finish_reason or "abort") for s in prepared.sequences})),
    )
