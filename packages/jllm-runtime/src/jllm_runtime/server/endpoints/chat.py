"""Endpoint: POST /v1/chat/completions."""

from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel

from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.parsing.output_parser import OutputParser
from jllm_runtime.server.requests.engine_requests import EngineInput, EngineRequests
from jllm_runtime.server.requests.ignored_fields import IgnoredFields, get_ignored
from jllm_runtime.server.requests.json_body import JSONRoute
from jllm_runtime.server.requests.message_history import text_of
from jllm_runtime.server.requests.response_format import available_tools, forces_call, output_grammar
from jllm_runtime.server.requests.template_variables import chat_variables
from jllm_runtime.server.responses.chat_output import ChatOutput, MessageBuilder
from jllm_runtime.server.responses.generation_handler import respond, response_header
from jllm_runtime.server.responses.streaming import EVENT_STREAM_RESPONSES
from jllm_runtime.server.responses.usage import UsageCounter
from jllm_runtime.server.schemas.base import CompletionUsage
from jllm_runtime.server.schemas.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionChunkChoice,
    ChatCompletionRequest,
)
from jllm_runtime.server.schemas.chat_messages import Tool
from jllm_runtime.server.service import Service, get_service

router = APIRouter(route_class=JSONRoute)


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=EVENT_STREAM_RESPONSES)
async def chat_completions(
    body: ChatCompletionRequest,
    request: Request,
    service: Annotated[Service, Depends(get_service)],
    ignored: Annotated[IgnoredFields, Depends(get_ignored)],
) -> Response | ChatCompletion:
    """The assistant's next message in a conversation."""
    handler = ChatCompletionHandler(service, body, ignored)
    return await respond(service, request, handler, sequences=body.n, stream=body.stream)


class ChatCompletionHandler:
    """One request for chat completions; a ``GenerationHandler``.

    Args:
        service: the shared state.
        body: the request.
        ignored: is told of the parts that change nothing.

    Raises:
        ApiError: fields that contradict each other, or a model that is not served.
    """

    def __init__(self, service: Service, body: ChatCompletionRequest, ignored: IgnoredFields) -> None:
        service.check_model(body.model)
        body.check_stream()
        self._service = service
        self._body = body
        self._ignored = ignored
        self._max_tokens = _max_tokens(body)
        self._continues = body.continues(body.messages)
        self._tools: list[Tool] = available_tools(body)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "invalid_value", "top_logprobs")
        self._text = ""
        self._outputs: list[ChatOutput] = []
        self._header = response_header("chatcmpl", body.model)

    async def prepare(self) -> None:
        """Render the conversation."""
        body, service, renderer = self._body, self._service, self._service.prompt_renderer
        readable = renderer.variables(bool(self._tools))
        takes = partial(renderer.takes, bool(self._tools))

        def rendering() -> str:
            strict, ignored = service.config.strict, self._ignored
            return renderer.render(
                body.messages,
                self._tools,
                chat_variables(body, renderer.thinks, readable, strict, ignored, takes),
                continued=self._continues,
                opened=body.add_generation_prompt,
                ignored=ignored,
                strict=strict,
            )

        self._text = await renderer.on_thread(rendering)

    def engine_inputs(self) -> Iterator[EngineInput]:
        """The rendered conversation and its parameters. Runs on a worker thread."""
        body, service, renderer, text = self._body, self._service, self._service.prompt_renderer, self._text
        prompt = service.tokenizer.encode_rendered(text, continued=self._continues)
        prompt = service.check_prompt(prompt, "messages")
        continued = text_of(body.messages[-1].content) if self._continues else None
        thinking = renderer.thinking(text, continued)
        grammar = output_grammar(body, self._tools, renderer.tool_format, service.tokenizer, thinking, self._ignored)
        # The client's own regex, choice or grammar covers the whole output, so there is no thinking in it.
        may_think = thinking.allowed if self._continues else renderer.thinks
        thinks = may_think and not body.whole_output_grammar()
        self._outputs = [
            ChatOutput(
                index=index,
                parser=OutputParser(
                    renderer.tool_format,
                    thinking=thinks,
                    tools=bool(self._tools),
                    inside_thinking=thinks and thinking.opened,
                    only_calls=forces_call(body),
                    schemas={tool.function.name: tool.function.parameters or {} for tool in self._tools},
                ),
                token_texts=service.token_texts if body.logprobs else None,
                single_call=not body.parallel_tool_calls,
                only_calls=forces_call(body),
            )
            for index in range(body.n)
        ]
        # To the engine, 0 means the token's own log-probability without others, and None means none at all.
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        max_tokens = service.max_new_tokens(prompt, self._max_tokens, thinks=thinking.allowed)
        yield prompt, body.params(service.default_params, max_tokens, grammar, logprobs=logprobs)

    async def collect(self, engine_requests: EngineRequests) -> ChatCompletion:
        """The response, when all outputs are complete."""
        usage = UsageCounter(engine_requests)
        messages = [MessageBuilder(output.index, output.only_calls) for output in self._outputs]
        async for choices in self._choices(engine_requests, usage):
            for choice in choices:
                messages[choice.index].add(choice)
        done = [message.choice(self._body.logprobs) for message in messages]
        return ChatCompletion(**self._header, choices=done, usage=usage.total())

    async def stream(self, engine_requests: EngineRequests) -> AsyncIterator[list[BaseModel]]:
        """The chunks of a streamed response."""
        usage = UsageCounter(engine_requests)
        # Together with the first text, so that an error before it can still have an HTTP status.
        opening = [self._chunk([output.first_choice()]) for output in self._outputs]
        async for choices in self._choices(engine_requests, usage):
            yield [*opening, *(self._chunk([choice]) for choice in choices)]
            opening = []
        if self._body.wants_usage:
            yield [self._chunk([], usage.total())]

    async def _choices(
        self, engine_requests: EngineRequests, usage: UsageCounter
    ) -> AsyncIterator[list[ChatCompletionChunkChoice]]:
        """The deltas of all outputs as they come."""
        async for prompt, piece in engine_requests.pieces():
            usage.add(prompt, piece)
            output = self._outputs[piece.index]
            choices = output.add(piece)
            # The engine can only cancel all sequences of a prompt: when none of them is still of use.
            if output.truncated and all(each.truncated or each.finish_reason for each in self._outputs):
                engine_requests.cancel()
            if choices:
                yield choices

    def _chunk(
        self, choices: list[ChatCompletionChunkChoice], usage: CompletionUsage | None = None
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk(**self._header, choices=choices, usage=usage)


def _max_tokens(body: ChatCompletionRequest) -> int | None:
    """The limit under its old or its new name; None without one."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        message = f"max_tokens ({old}) and max_completion_tokens ({new}) are two names of one thing; give one of them"
        raise ApiError(400, message, "invalid_value", "max_tokens")
    for name in ("max_tokens", "max_completion_tokens"):
        if getattr(body, name) == 0:
            raise ApiError(400, f"{name} must be 1 or above, or -1 (no limit), got 0", "invalid_value", name)
    return old if new is None else new
