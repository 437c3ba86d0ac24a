"""POST /v1/chat/completions."""

from collections.abc import AsyncIterator, Iterator
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel

from jllm_runtime.server.responses.chat_output import ChatAnswer, MessageBuilder
from jllm_runtime.server.requests.engine_requests import Ask, Generation
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.middleware.request_body import JSONRoute
from jllm_runtime.server.parsing.output_parser import OutputParser, opens_thinking
from jllm_runtime.server.parsing.reasoning import CLOSE
from jllm_runtime.server.requests.response_format import Thinking, answer_grammar, offered_tools
from jllm_runtime.server.responses.handler import reply_head, respond
from jllm_runtime.server.schemas.chat import ChatChunk, ChatReply, ChatRequest, ChunkChoice
from jllm_runtime.server.schemas.chat_messages import Tool
from jllm_runtime.server.schemas.base import Usage
from jllm_runtime.server.service import Service, service_of
from jllm_runtime.server.responses.streaming import EVENTS
from jllm_runtime.server.responses.usage import UsageCount

router = APIRouter(route_class=JSONRoute)


@router.post("/v1/chat/completions", response_model=ChatReply, responses=EVENTS)
async def chat_completions(
    body: ChatRequest, request: Request, service: Annotated[Service, Depends(service_of)]
) -> Response | ChatReply:
    """Go on with a conversation."""
    chat = Chat(service, body)
    return await respond(service, request, chat, body.n, body.stream)


class Chat:
    """One request for answers in a conversation.

    Raises:
        ApiError: parameters that cannot be honoured.
    """

    def __init__(self, service: Service, body: ChatRequest) -> None:
        service.check_model(body.model)
        body.check_stream()
        self._service = service
        self._body = body
        self._max_tokens = _max_tokens(body)
        self._tools: list[Tool] = offered_tools(body)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "invalid_value", "top_logprobs")
        self._answers: list[ChatAnswer] = []
        self._head = reply_head("chatcmpl", body.model)

    def asks(self) -> Iterator[Ask]:
        """What the engine is asked. Takes its time, and runs on any thread."""
        body, service, template = self._body, self._service, self._service.template
        text = template.render(body.messages, self._tools, body.chat_template_kwargs)
        # The template writes out every special token itself.
        prompt = service.checked_prompt(service.tokenizer.encode(text, add_special_tokens=False), "messages")
        begun = template.thinks and opens_thinking(text)
        thinking = Thinking(template.thinks and not text.rstrip().endswith(CLOSE), begun)
        grammar = answer_grammar(body, self._tools, template.tool_format, service.tokenizer, thinking)
        # A grammar of the client's own holds for the whole answer, which then has no thoughts.
        thinks = template.thinks and body.own_grammar() is None
        self._answers = [
            ChatAnswer(
                index,
                OutputParser(template.tool_format, thinks, bool(self._tools), thinks and begun),
                service.texts if body.logprobs else None,
                service.engine.model.eos_ids,
                single=not body.parallel_tool_calls,
            )
            for index in range(body.n)
        ]
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        room = service.room(prompt)
        limit = room if self._max_tokens is None else min(self._max_tokens, room)
        yield prompt, body.params(limit, grammar, logprobs=logprobs)

    async def choices(self, generation: Generation, usage: UsageCount) -> AsyncIterator[list[ChunkChoice]]:
        """The deltas of all answers as they come."""
        async for prompt, piece in generation.pieces():
            usage.add(prompt, piece)
            answer = self._answers[piece.index]
            choices = answer.take(piece)
            if answer.cut and all(each.cut or each.finish_reason for each in self._answers):
                generation.cancel()
            if choices:
                yield choices

    async def reply(self, generation: Generation) -> ChatReply:
        """The answers, when all have come."""
        usage = UsageCount(generation)
        messages = [MessageBuilder(answer.index) for answer in self._answers]
        async for choices in self.choices(generation, usage):
            for choice in choices:
                messages[choice.index].add(choice)
        done = [message.choice(self._body.logprobs) for message in messages]
        return ChatReply(**self._head, choices=done, usage=usage.total())

    async def chunks(self, generation: Generation) -> AsyncIterator[list[BaseModel]]:
        """The events of a stream."""
        usage = UsageCount(generation)
        opening = [self._chunk([answer.begin()]) for answer in self._answers]
        async for choices in self.choices(generation, usage):
            yield [*opening, *(self._chunk([choice]) for choice in choices)]
            opening = []
        if self._body.wants_usage:
            yield [self._chunk([], usage.total())]

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(**self._head, choices=choices, usage=usage)


def _max_tokens(body: ChatRequest) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        message = f"max_tokens ({old}) and max_completion_tokens ({new}) are two names of one thing; give one of them"
        raise ApiError(400, message, "invalid_value", "max_tokens")
    if old == 0:
        raise ApiError(400, "max_tokens must be 1 or above, got 0", "invalid_value", "max_tokens")
    return old if new is None else new
