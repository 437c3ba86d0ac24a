"""Endpoints: POST /tokenize and /detokenize."""

from functools import partial
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Depends

from jllm_runtime.model import check_token_ids
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.requests.ignored_fields import IgnoredFields, get_ignored
from jllm_runtime.server.requests.json_body import JSONRoute
from jllm_runtime.server.requests.template_variables import known_variables
from jllm_runtime.server.schemas.tokens import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from jllm_runtime.server.service import Service, get_service

router = APIRouter(route_class=JSONRoute)


@router.post("/tokenize")
async def tokenize(
    body: TokenizeRequest,
    service: Annotated[Service, Depends(get_service)],
    ignored: Annotated[IgnoredFields, Depends(get_ignored)],
) -> TokenizeResponse:
    """The tokens of a text, or of a conversation."""
    if body.model is not None:
        service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give prompt or messages, one of the two", "invalid_value", "prompt")
    for name in ("tools", "chat_template_kwargs", "continue_final_message", "add_generation_prompt"):
        if body.messages is None and getattr(body, name) != TokenizeRequest.model_fields[name].default:
            raise ApiError(400, f"{name} is for messages", "invalid_value", name)
    if body.messages is not None and body.add_special_tokens is not None:
        raise ApiError(400, "add_special_tokens is for a prompt", "invalid_value", "add_special_tokens")

    text, special = body.prompt or "", body.add_special_tokens is not False
    if body.messages is not None:
        renderer = service.prompt_renderer
        readable = renderer.variables(bool(body.tools))
        rendering = partial(
            renderer.render,
            body.messages,
            body.tools,
            known_variables(body.chat_template_kwargs, readable, service.config.strict, ignored),
            continued=body.continues(body.messages),
            opened=body.add_generation_prompt,
            ignored=ignored,
            strict=service.config.strict,
        )
        text = await renderer.on_thread(rendering)
        special = False  # the template writes them itself

    def run() -> TokenizeResponse:
        tokens = service.tokenizer.encode(text, add_special_tokens=special)
        texts = [service.token_texts.text(token) for token in tokens]
        return TokenizeResponse(
            tokens=tokens, token_strs=texts, count=len(tokens), max_model_len=service.context_length
        )

    return await anyio.to_thread.run_sync(run, limiter=service.workers)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, service: Annotated[Service, Depends(get_service)]) -> DetokenizeResponse:
    """The text of token ids."""
    if body.model is not None:
        service.check_model(body.model)

    def run() -> DetokenizeResponse:
        check_token_ids(body.tokens, service.engine.model.config)
        return DetokenizeResponse(prompt=service.tokenizer.decode(body.tokens, skip_special_tokens=False))

    return await anyio.to_thread.run_sync(run, limiter=service.workers)
