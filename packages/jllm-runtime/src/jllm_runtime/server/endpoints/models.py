"""Endpoint: GET /v1/models."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from jllm_core.checkpoint import GENERATION_FILE
from pydantic import BaseModel, Field

from jllm_runtime.sampling import PUBLISHABLE, published
from jllm_runtime.server.service import Service, get_service

router = APIRouter()


class Abilities(BaseModel):
    """Features of a model."""

    chat: bool = Field(description="It has a chat template.")
    tools: bool = Field(description="It calls tools.")
    thinking: bool = Field(description="It may think before it answers.")
    chat_template_kwargs: list[str] = Field(description="Variables of its chat template.")


class DefaultSampling(BaseModel):
    """Parameters that the server takes where a request does not give them: those of the model's publisher."""

    temperature: float = Field(description="0 is greedy, and the filters mean nothing then.")
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    max_tokens: int = Field(description="Of a chat, where the request does not turn thinking on or off.")
    max_tokens_without_thinking: int = Field(description="Of a chat where it turns thinking off.")
    source: str | None = Field(description="The file that recommends some of them; null where none does.")


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "jllm"
    context_length: int = Field(description="Most tokens of prompt and output.")
    abilities: Abilities
    default_sampling: DefaultSampling


class ModelList(BaseModel):
    """All served models: one, under each of its names."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


@router.get("/v1/models")
async def list_models(service: Annotated[Service, Depends(get_service)]) -> ModelList:
    """All served models."""
    return ModelList(data=[await _model_card(service, name) for name in service.names])


# ":path" because names may have slashes, such as those of the Hugging Face hub.
@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, service: Annotated[Service, Depends(get_service)]) -> ModelCard:
    """One served model."""
    service.check_model(model)
    return await _model_card(service, model)


async def _model_card(service: Service, name: str) -> ModelCard:
    renderer = service.prompt_renderer
    abilities = Abilities(
        chat=renderer.has_template,
        tools=renderer.tool_format is not None,
        thinking=renderer.thinks,
        chat_template_kwargs=renderer.settable_variables(),
    )
    return ModelCard(
        id=name,
        created=service.created,
        context_length=service.context_length,
        abilities=abilities,
        default_sampling=await _default_sampling(service),
    )


async def _default_sampling(service: Service) -> DefaultSampling:
    params, renderer = service.default_params, service.prompt_renderer
    thinks = await renderer.on_thread(renderer.thinks_by_default)
    return DefaultSampling(
        **{name: getattr(params, name) for name in PUBLISHABLE},
        max_tokens=service.default_max_tokens(thinks),
        max_tokens_without_thinking=service.default_max_tokens(False),
        source=GENERATION_FILE if published(service.engine.model) else None,
    )
