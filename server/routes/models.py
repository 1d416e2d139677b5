"""``GET /v1/models`` and ``GET /v1/models/{name}``."""

from typing import Annotated

from fastapi import APIRouter, Depends

from eda.adapters.errors import UnknownModelError
from eda.server.preparation import unknown_model
from eda.server.schemas.responses import ModelCard, ModelList
from eda.server.services import ModelRegistry, Services, services_of

router = APIRouter(tags=["openai"])


def _card(registry: ModelRegistry, name: str) -> ModelCard:
    model = registry.describe(name)
    return ModelCard(
        id=model.name,
        created=model.created,
        owned_by="eda",
        root=model.parent or model.name,
        parent=model.parent,
        max_model_len=model.max_model_len,
        adapter_version=model.adapter_version,
        weights=None if model.weights is None else list(model.weights),
    )


@router.get("/v1/models")
async def list_models(services: Annotated[Services, Depends(services_of)]) -> ModelList:
    """The base model first, then its fine-tunes."""
    registry = services.registry
    cards: list[ModelCard] = []
    for name in registry.model_names():
        try:
            cards.append(_card(registry, name))
        except UnknownModelError:
            continue  # deleted since the names were read
    return ModelList(data=cards)


@router.get("/v1/models/{name}")
async def get_model(name: str, services: Annotated[Services, Depends(services_of)]) -> ModelCard:
    """One model by name."""
    try:
        return _card(services.registry, name)
    except UnknownModelError:
        raise unknown_model(name) from None
