"""Health, readiness, metrics, version and the tokenizer."""

import asyncio
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import Response

from eda.server.errors import InvalidRequestError, UnavailableError
from eda.server.metrics import CONTENT_TYPE
from eda.server.preparation import chat_prompt, max_model_len_of, tokenize, tokenizer_named
from eda.server.schemas.generation import DetokenizeRequest, TokenizeRequest
from eda.server.schemas.responses import DetokenizeResponse, HealthResponse, TokenizeResponse, VersionResponse
from eda.server.services import Services, services_of
from eda.server.streaming import json_response

router = APIRouter(tags=["operations"])
TOKENS_INLINE = 8_192
"""Tokens up to which an answer is written in the event loop."""
Provided = Annotated[Services, Depends(services_of)]


def package_version() -> str:
    """The installed version of this project."""
    try:
        return version("eda-server")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0+unknown"


@router.get("/health")
async def health(services: Provided) -> HealthResponse:
    """Whether the process works; while models are loading it does. 503 means: restart it."""
    problem = services.health_problem
    if problem is not None:
        raise UnavailableError(problem)
    return HealthResponse()


@router.get("/ready")
async def ready(services: Provided) -> HealthResponse:
    """Whether requests should be sent here: models are loaded and the server is not shutting down."""
    services.loaded()
    if not services.is_ready:
        raise UnavailableError(services.health_problem or "the server is shutting down")
    return HealthResponse()


@router.get("/version")
async def get_version(services: Provided) -> VersionResponse:
    """The server's version, and what its models run on."""
    runtime = services.runtime
    return VersionResponse(
        version=package_version(),
        weights=None if runtime is None else list(runtime.weights),
        instructions=None if runtime is None else runtime.instructions,
    )


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(services: Provided) -> Response:
    """Counters in Prometheus' text format."""
    # In a thread: some of the figures are read from the database.
    return Response(await asyncio.to_thread(services.metrics.render), media_type=CONTENT_TYPE)


@router.post("/tokenize", response_model=TokenizeResponse)
async def tokenize_text(body: TokenizeRequest, services: Provided) -> Response:
    """Token ids of a prompt, or of messages under the chat template."""
    name = body.model if body.model is not None else services.registry.model_names()[0]
    max_model_len = max_model_len_of(services, name)
    tokenizer = await tokenizer_named(services, body.model)
    # Longer texts than the model takes may be counted, within the limit of the body.
    limit = services.settings.max_body_bytes
    if body.messages is not None:
        if body.add_special_tokens:
            raise InvalidRequestError(
                "add_special_tokens is not supported with messages: the chat template writes them",
                param="add_special_tokens",
            )
        tokens = await chat_prompt(
            [message.as_template_input() for message in body.messages], tokenizer, services.templates, limit
        )
    else:
        special = body.add_special_tokens is not False
        tokens = await tokenize(tokenizer, body.prompt or "", limit, param="prompt", special=special)

    def answer() -> Response:
        strings = [tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
        return json_response(
            TokenizeResponse(
                count=len(tokens), max_model_len=max_model_len, tokens=tokens, token_strs=strings
            )
        )

    return answer() if len(tokens) <= TOKENS_INLINE else await asyncio.to_thread(answer)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, services: Provided) -> DetokenizeResponse:
    """The text of token ids; special tokens have none."""
    tokenizer = await tokenizer_named(services, body.model)
    outside = [token for token in body.tokens if token >= tokenizer.vocab_size]
    if outside:
        raise InvalidRequestError(
            f"tokens has {outside[0]}; the vocabulary ends at {tokenizer.vocab_size - 1}",
            param="tokens",
        )
    return DetokenizeResponse(prompt=tokenizer.decode(body.tokens))
