"""GET /v1/models."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from jllm_runtime.server.service import Service, service_of

router = APIRouter()


class Abilities(BaseModel):
    """What the model can be asked for."""

    chat: bool = Field(description="It holds conversations.")
    tools: bool = Field(description="It calls tools.")
    thinking: bool = Field(description="It may think before it answers.")
    chat_template_kwargs: list[str] = Field(description="Variables of its chat template.")


class ModelReply(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "jllm"
    context_length: int = Field(description="Most tokens of prompt and answer.")
    abilities: Abilities


class ModelsReply(BaseModel):
    """All of them: one, by all its names."""

    object: Literal["list"] = "list"
    data: list[ModelReply]


@router.get("/v1/models")
async def list_models(service: Annotated[Service, Depends(service_of)]) -> ModelsReply:
    """What is served."""
    return ModelsReply(data=[_model(service, name) for name in service.names])


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, service: Annotated[Service, Depends(service_of)]) -> ModelReply:
    """One of them."""
    service.check_model(model)
    return _model(service, model)


def _model(service: Service, name: str) -> ModelReply:
    template = service.template
    abilities = Abilities(
        chat=template.exists,
        tools=template.tool_format is not None,
        thinking=template.thinks,
        chat_template_kwargs=template.known_variables(),
    )
    return ModelReply(id=name, created=service.created, context_length=service.context, abilities=abilities)
