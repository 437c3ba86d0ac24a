"""Endpoint: POST /v1/completions."""

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel

from jllm_runtime.grammar import Grammar
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.requests.engine_requests import EngineInput, EngineRequests
from jllm_runtime.server.requests.fill_in_middle import FillInMiddle
from jllm_runtime.server.requests.json_body import JSONRoute
from jllm_runtime.server.requests.tool_schemas import check_own_grammar
from jllm_runtime.server.responses.completion_output import CompletionOutput
from jllm_runtime.server.responses.generation_handler import respond, response_header
from jllm_runtime.server.responses.prompt_echo import PromptEcho
from jllm_runtime.server.responses.streaming import EVENT_STREAM_RESPONSES
from jllm_runtime.server.responses.usage import UsageCounter
from jllm_runtime.server.schemas.base import CompletionUsage
from jllm_runtime.server.schemas.completions import Completion, CompletionChoice, CompletionRequest, prompt_list
from jllm_runtime.server.service import Service, get_service

if TYPE_CHECKING:
    from jllm_runtime.outputs import Piece

router = APIRouter(route_class=JSONRoute)


@router.post("/v1/completions", response_model=Completion, responses=EVENT_STREAM_RESPONSES)
async def completions(
    body: CompletionRequest, request: Request, service: Annotated[Service, Depends(get_service)]
) -> Response | Completion:
    """Continuations of texts as they are, without a chat template."""
    handler = CompletionHandler(service, body)
    sequences = len(handler.prompts) * body.n
    return await respond(service, request, handler, sequences=sequences, stream=body.stream)


class CompletionHandler:
    """One request for completions; a ``GenerationHandler``.

    Attributes:
        prompts: the prompts, each a text or a list of token ids.

    Raises:
        ApiError: fields that contradict each other, or a model that is not served.
    """

    def __init__(self, service: Service, body: CompletionRequest) -> None:
        service.check_model(body.model)
        body.check_stream()
        self._service = service
        self._body = body
        # max_tokens: 0 asks for the prompt's log-probabilities alone. The engine makes one token all the same, which
        # is left out of the response and of the usage.
        self._prompt_only = body.max_tokens == 0
        if self._prompt_only and not body.echo:
            raise ApiError(400, "max_tokens: 0 needs echo: true", "invalid_value", "max_tokens")
        # An empty suffix is none, as in the tokenizer of CodeLlama.
        vocab_size = service.engine.model.config.vocab_size
        self._fill_in = FillInMiddle.of(service.tokenizer, vocab_size) if body.suffix else None
        if self._fill_in and body.echo:  # as in OpenAI's API
            raise ApiError(400, "echo and suffix exclude each other", "invalid_value", "echo")
        self.prompts = prompt_list(body.prompt)
        self._outputs: list[CompletionOutput] = []
        self._header = response_header("cmpl", body.model)

    async def prepare(self) -> None:
        """Nothing: prompts are texts already."""

    def engine_inputs(self) -> Iterator[EngineInput]:
        """The prompts and their parameters. Runs on a worker thread."""
        body, service = self._body, self._service
        # All of them before the first is yielded: the engine gets nothing of a request with one prompt too long.
        if (own := body.own_grammar()) is not None:
            check_own_grammar(own)
        inputs = [self._engine_input(prompt, own and own.grammar) for prompt in self.prompts]
        for number, (token_ids, _) in enumerate(inputs):
            options = {"prompt_only": self._prompt_only, "skip_special_tokens": body.skip_special_tokens}
            given = self.prompts[number]
            echo = PromptEcho.of(given, token_ids, service.tokenizer, **options) if body.echo else None
            self._outputs += [
                CompletionOutput(
                    index=number * body.n + index,
                    token_texts=service.token_texts,
                    echo=echo,
                    with_logprobs=body.logprobs is not None,
                    prompt_only=self._prompt_only,
                )
                for index in range(body.n)
            ]
        yield from inputs

    def _engine_input(self, prompt: str | list[int], grammar: Grammar | None) -> EngineInput:
        body, service = self._body, self._service
        token_ids = prompt if isinstance(prompt, list) else service.tokenizer.encode(prompt)
        if self._fill_in and body.suffix:
            token_ids = self._fill_in.prompt(service.tokenizer, prompt, body.suffix)
        service.check_prompt(token_ids, "prompt")
        # At least 1, which max_tokens: 0 (the prompt alone) needs, too.
        max_tokens = max(1, service.max_new_tokens(token_ids, body.max_tokens))
        prompt_logprobs = body.logprobs if body.echo else None
        logprobs = {"logprobs": body.logprobs, "prompt_logprobs": prompt_logprobs}
        params = body.params(service.default_params, max_tokens, grammar, **logprobs)
        return token_ids, self._fill_in.ended(params, service.tokenizer) if self._fill_in else params

    async def collect(self, engine_requests: EngineRequests) -> Completion:
        """The response, when all outputs are complete."""
        usage = UsageCounter(engine_requests, with_outputs=not self._prompt_only)
        async for _ in self._choices(engine_requests, usage):
            pass
        choices = [output.choice() for output in self._outputs]
        return Completion(**self._header, choices=choices, usage=usage.total())

    async def stream(self, engine_requests: EngineRequests) -> AsyncIterator[list[BaseModel]]:
        """The chunks of a streamed response."""
        usage = UsageCounter(engine_requests, with_outputs=not self._prompt_only)
        async for choice in self._choices(engine_requests, usage):
            yield [self._chunk([choice])]
        if self._body.wants_usage:
            yield [self._chunk([], usage.total())]

    async def _choices(self, engine_requests: EngineRequests, usage: UsageCounter) -> AsyncIterator[CompletionChoice]:
        """The choices of all outputs as they come."""
        async for prompt, piece in engine_requests.pieces():
            usage.add(prompt, piece)
            choice = self._output(prompt, piece).add(piece)
            if choice is not None:
                yield choice

    def _output(self, prompt: int, piece: "Piece") -> CompletionOutput:
        # Choices are numbered through all prompts, as OpenAI does.
        return self._outputs[prompt * self._body.n + piece.index]

    def _chunk(self, choices: list[CompletionChoice], usage: CompletionUsage | None = None) -> Completion:
        return Completion(**self._header, choices=choices, usage=usage)
