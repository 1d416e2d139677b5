"""``POST /v1/chat/completions``."""

from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import BaseModel

from eda.formats.tokenizer import TextTokenizer
from eda.server.auth import check_priority
from eda.server.engine.sequence import SequenceDelta
from eda.server.preparation import PreparedRequest, acquire, build, chat_prompt, max_model_len_of
from eda.server.rendering import Collected, chat_logprobs, finish_reason_name, metrics_of, usage_of
from eda.server.schemas.generation import ChatCompletionRequest
from eda.server.schemas.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionResponse,
    ChatDelta,
    ChatResponseMessage,
)
from eda.server.services import Services, services_of
from eda.server.streaming import Renderer, respond

router = APIRouter(tags=["openai"])


class ChatRenderer(Renderer):
    """Chat completions: the first chunk of a choice has the role, the last one the finish reason."""

    def __init__(self, body: ChatCompletionRequest, tokenizer: TextTokenizer) -> None:
        super().__init__(body, wants_logprobs=bool(body.logprobs))
        self._body = body
        self._tokenizer = tokenizer

    def body(self, request: PreparedRequest, outputs: list[Collected]) -> BaseModel:
        return ChatCompletionResponse(
            id=self._id(request),
            created=self._created,
            model=request.lease.model_name,
            choices=[self._choice(index, output) for index, output in enumerate(outputs)],
            usage=usage_of(request),
            metrics=metrics_of(request),
            prompt_token_ids=request.prompts[0] if self._body.return_token_ids else None,
        )

    def opening(self, request: PreparedRequest) -> Iterator[BaseModel]:
        for index in range(len(request.sequences)):
            chunk = self.empty_chunk(request)
            chunk.choices = [ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))]
            if self._body.return_token_ids and index == 0:
                chunk.prompt_token_ids = request.prompts[0]
            yield chunk

    def news(self, request: PreparedRequest, index: int, delta: SequenceDelta) -> ChatCompletionChunk:
        chunk = self.empty_chunk(request)
        chunk.choices = [
            ChatChunkChoice(
                index=index,
                delta=ChatDelta(content=delta.text or None),
                logprobs=chat_logprobs(self._tokenizer, delta.logprobs) if self._body.logprobs else None,
                finish_reason=finish_reason_name(delta.finish_reason),
                stop_reason=delta.stop_reason,
                token_ids=list(delta.token_ids) if self._body.return_token_ids else None,
            )
        ]
        return chunk

    def _id(self, request: PreparedRequest) -> str:
        return f"chatcmpl-{request.request_id}"

    def empty_chunk(self, request: PreparedRequest) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._id(request), created=self._created, model=request.lease.model_name, choices=[]
        )

    def _choice(self, index: int, output: Collected) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=ChatResponseMessage(content=output.text),
            logprobs=chat_logprobs(self._tokenizer, output.logprobs) if self._body.logprobs else None,
            finish_reason=finish_reason_name(output.finish_reason) or "stop",
            stop_reason=output.stop_reason,
            token_ids=output.token_ids if self._body.return_token_ids else None,
        )


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletionResponse,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def create_chat_completion(
    body: ChatCompletionRequest, http: Request, services: Annotated[Services, Depends(services_of)]
) -> Response:
    """Answer a conversation under the model's chat template. With ``stream``, the answer is a stream of chunks."""
    check_priority(http.state.client, body.priority)
    max_model_len = max_model_len_of(services, body.model)
    lease = await acquire(services, body.model)
    try:
        tokenizer = services.tokenizer_of(lease.fine_tune)
        messages = [message.as_template_input() for message in body.messages]
        prompt = await chat_prompt(messages, tokenizer, services.templates, max_model_len)
        prepared = build(services, body, lease, http.state.request_id, [prompt], [], max_model_len)
    except BaseException:
        lease.release()
        raise
    if services.settings.log_prompts:
        http.state.log["prompt"] = messages
    renderer = ChatRenderer(body, tokenizer)
    return await respond(services, http, prepared, renderer, stream=bool(body.stream))
