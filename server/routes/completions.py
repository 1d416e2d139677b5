"""``POST /v1/completions``."""

from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from eda.formats.tokenizer import TextTokenizer
from eda.server.auth import check_priority
from eda.server.engine.sequence import SequenceDelta
from eda.server.preparation import PreparedRequest, acquire, build, completion_prompts, max_model_len_of
from eda.server.rendering import Collected, completion_logprobs, finish_reason_name, metrics_of, usage_of
from eda.server.schemas.generation import CompletionRequest
from eda.server.schemas.responses import CompletionChoice, CompletionResponse
from eda.server.services import Services, services_of
from eda.server.streaming import Renderer, respond

router = APIRouter(tags=["openai"])


class CompletionRenderer(Renderer):
    """Text completions. ``logprobs`` and ids are cut where the text is."""

    def __init__(self, body: CompletionRequest, tokenizer: TextTokenizer) -> None:
        super().__init__(body, wants_logprobs=body.logprobs is not None)
        self._body = body
        self._tokenizer = tokenizer
        self._offsets: dict[int, int] = {}

    def body(self, request: PreparedRequest, outputs: list[Collected]) -> CompletionResponse:
        response = self.empty_chunk(request)
        response.choices = [self._choice(request, index, output) for index, output in enumerate(outputs)]
        response.usage, response.metrics = usage_of(request), metrics_of(request)
        return response

    def opening(self, request: PreparedRequest) -> Iterator[CompletionResponse]:
        for index in range(len(request.sequences)):
            prompt_ids = request.prompt_of(index) if self._body.return_token_ids else None
            if self._body.echo or prompt_ids is not None:
                chunk = self.empty_chunk(request)
                text = request.echo_of(index)
                chunk.choices = [
                    CompletionChoice(index=index, text=text, finish_reason=None, prompt_token_ids=prompt_ids)
                ]
                yield chunk

    def news(self, request: PreparedRequest, index: int, delta: SequenceDelta) -> CompletionResponse:
        chunk = self.empty_chunk(request)
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + sum(delta.text_lengths)
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = completion_logprobs(self._tokenizer, delta.logprobs, delta.text_lengths, offset=offset)
        chunk.choices = [
            CompletionChoice(
                index=index,
                text=delta.text,
                logprobs=logprobs,
                finish_reason=finish_reason_name(delta.finish_reason),
                stop_reason=delta.stop_reason,
                token_ids=list(delta.token_ids) if self._body.return_token_ids else None,
            )
        ]
        return chunk

    def empty_chunk(self, request: PreparedRequest) -> CompletionResponse:
        return CompletionResponse(
            id=f"cmpl-{request.request_id}", created=self._created, model=request.lease.model_name, choices=[]
        )

    def _choice(self, request: PreparedRequest, index: int, output: Collected) -> CompletionChoice:
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = completion_logprobs(self._tokenizer, output.logprobs, output.text_lengths)
        return CompletionChoice(
            index=index,
            text=request.echo_of(index) + output.text,
            logprobs=logprobs,
            finish_reason=finish_reason_name(output.finish_reason),
            stop_reason=output.stop_reason,
            token_ids=output.token_ids if self._body.return_token_ids else None,
            prompt_token_ids=request.prompt_of(index) if self._body.return_token_ids else None,
        )


@router.post(
    "/v1/completions",
    response_model=CompletionResponse,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def create_completion(
    body: CompletionRequest, http: Request, services: Annotated[Services, Depends(services_of)]
) -> Response:
    """Continue one or several prompts. With ``stream``, the answer is a stream of the same objects."""
    check_priority(http.state.client, body.priority)
    max_model_len = max_model_len_of(services, body.model)
    lease = await acquire(services, body.model)
    try:
        tokenizer = services.tokenizer_of(lease.fine_tune)
        prompts, echoes = await completion_prompts(body, tokenizer, max_model_len)
        prepared = build(services, body, lease, http.state.request_id, prompts, echoes, max_model_len)
    except BaseException:
        lease.release()
        raise
    if services.settings.log_prompts:
        http.state.log["prompt"] = body.prompt
    renderer = CompletionRenderer(body, tokenizer)
    return await respond(services, http, prepared, renderer, stream=bool(body.stream))
