"""Endpoint: GET /v1/models."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from jllm_runtime.server.service import Service, get_service

router = APIRouter()


class Abilities(BaseModel):
    """Features of a model."""

    chat: bool = Field(description="It has a chat template.")
    tools: bool = Field(description="It calls tools.")
    thinking: bool = Field(description="It may think before it answers.")
    chat_template_kwargs: list[str] = Field(description="Variables of its chat template.")


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "jllm"
    context_length: int = Field(description="Most tokens of prompt and output.")
    abilities: Abilities


class ModelList(BaseModel):
    """All served models: one, under each of its names."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


@router.get("/v1/models")
async def list_models(service: Annotated[Service, Depends(get_service)]) -> ModelList:
    """All served models."""
    return ModelList(data=[_model_card(service, name) for name in service.names])


# ":path" because names may have slashes, such as those of the Hugging Face hub.
@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, service: Annotated[Service, Depends(get_service)]) -> ModelCard:
    """One served model."""
    service.check_model(model)
    return _model_card(service, model)


def _model_card(service: Service, name: str) -> ModelCard:
    renderer = service.prompt_renderer
    abilities = Abilities(
        chat=renderer.has_template,
        tools=renderer.tool_format is not None,
        thinking=renderer.thinks,
        chat_template_kwargs=renderer.settable_variables(),
    )
    return ModelCard(id=name, created=service.created, context_length=service.context_length, abilities=abilities)
