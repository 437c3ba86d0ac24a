"""POST /v1/completions."""

from collections.abc import AsyncIterator, Iterator
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel

from jllm_runtime.outputs import Piece
from jllm_runtime.server.responses.completion_output import CompletionAnswer
from jllm_runtime.server.requests.engine_requests import Ask, Generation
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.middleware.request_body import JSONRoute
from jllm_runtime.server.prompts import prompt_ids, prompt_list
from jllm_runtime.server.responses.handler import reply_head, respond
from jllm_runtime.server.schemas.completions import CompletionChoice, CompletionReply, CompletionRequest
from jllm_runtime.server.schemas.base import Usage
from jllm_runtime.server.service import Service, service_of
from jllm_runtime.server.responses.streaming import EVENTS
from jllm_runtime.server.responses.usage import UsageCount

router = APIRouter(route_class=JSONRoute)


@router.post("/v1/completions", response_model=CompletionReply, responses=EVENTS)
async def completions(
    body: CompletionRequest, request: Request, service: Annotated[Service, Depends(service_of)]
) -> Response | CompletionReply:
    """Go on with texts as they are, without a chat template."""
    completion = Completion(service, body)
    return await respond(service, request, completion, len(completion.prompts) * body.n, body.stream)


class Completion:
    """One request to go on with some texts.

    Attributes:
        prompts: each a text or a list of token ids.

    Raises:
        ApiError: parameters that cannot be honoured.
    """

    def __init__(self, service: Service, body: CompletionRequest) -> None:
        service.check_model(body.model)
        body.check_stream()
        self._service = service
        self._body = body
        # Nothing but the prompt, with its log-probabilities. The engine makes a token all the same, which nobody sees.
        self._scores_only = body.max_tokens == 0
        if self._scores_only and not body.echo:
            raise ApiError(400, "max_tokens: 0 needs echo: true", "invalid_value", "max_tokens")
        self.prompts = prompt_list(body.prompt)
        self._answers: list[CompletionAnswer] = []
        self._head = reply_head("cmpl", body.model)

    def asks(self) -> Iterator[Ask]:
        """What the engine is asked. Takes its time, and runs on any thread."""
        body, service = self._body, self._service
        asks = [self._ask(prompt) for prompt in self.prompts]
        for number, (prompt, _) in enumerate(asks):
            given = self.prompts[number]
            text = given if isinstance(given, str) else service.tokenizer.decode(given)
            self._answers += [
                CompletionAnswer(
                    number * body.n + index,
                    service.texts,
                    service.engine.model.eos_ids,
                    echo=(text, prompt) if body.echo else None,
                    with_logprobs=body.logprobs is not None,
                    scores_only=self._scores_only,
                )
                for index in range(body.n)
            ]
        yield from asks

    def _ask(self, prompt: str | list[int]) -> Ask:
        body, service = self._body, self._service
        token_ids = prompt_ids(service, prompt, "prompt")
        room = service.room(token_ids)
        limit = room if body.max_tokens is None else max(1, min(body.max_tokens, room))
        prompt_logprobs = body.logprobs if body.echo else None
        return token_ids, body.params(
            limit, body.own_grammar(), logprobs=body.logprobs, prompt_logprobs=prompt_logprobs
        )

    async def choices(self, generation: Generation, usage: UsageCount) -> AsyncIterator[CompletionChoice]:
        """More of each answer, as it comes."""
        async for prompt, piece in generation.pieces():
            usage.add(prompt, piece)
            choice = self._answer(prompt, piece).take(piece)
            if choice is not None:
                yield choice

    async def reply(self, generation: Generation) -> CompletionReply:
        """The answers, when all have come."""
        usage = UsageCount(generation, answers=not self._scores_only)
        async for _ in self.choices(generation, usage):
            pass
        whole = [answer.whole() for answer in self._answers]
        return CompletionReply(**self._head, choices=whole, usage=usage.total())

    async def chunks(self, generation: Generation) -> AsyncIterator[list[BaseModel]]:
        """The events of a stream."""
        usage = UsageCount(generation, answers=not self._scores_only)
        async for choice in self.choices(generation, usage):
            yield [self._chunk([choice])]
        if self._body.wants_usage:
            yield [self._chunk([], usage.total())]

    def _answer(self, prompt: int, piece: Piece) -> CompletionAnswer:
        return self._answers[prompt * self._body.n + piece.index]

    def _chunk(self, choices: list[CompletionChoice], usage: Usage | None = None) -> CompletionReply:
        return CompletionReply(**self._head, choices=choices, usage=usage)
