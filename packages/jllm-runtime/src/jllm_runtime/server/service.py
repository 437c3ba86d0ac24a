"""Shared state of all endpoints: engine, model names, limits, running requests."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio
from fastapi import Request

from jllm_runtime.answer_length import default_max_tokens
from jllm_runtime.engine.timeline import Timeline
from jllm_runtime.errors import ServerError
from jllm_runtime.model import check_token_ids
from jllm_runtime.sampling import SamplingParams
from jllm_runtime.server.concurrency import ConcurrencyLimit
from jllm_runtime.server.config import ServerConfig
from jllm_runtime.server.errors import ApiError, shutting_down_error
from jllm_runtime.server.metrics import Metrics
from jllm_runtime.server.requests.chat_prompt import ChatPromptRenderer
from jllm_runtime.server.requests.engine_requests import EngineRequests
from jllm_runtime.server.responses.logprobs import TokenTexts
from jllm_runtime.server.schemas.sampling import NO_LIMIT
from jllm_runtime.server.template_processes import RENDER_TIMEOUT, TemplateProcesses
from jllm_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jllm_runtime.engine.engine import Engine

WORKERS = 8
"""Threads that tokenize and compile grammars. More would only wait for locks and for the cores that
the model computes on."""


@dataclass(frozen=True)
class Draining:
    """A server that is shutting down.

    Attributes:
        answers: those that run or wait.
        seconds_left: until those that are left are ended.
    """

    answers: int
    seconds_left: float


class Service:
    """An engine behind HTTP. There is one per application; endpoints get it through ``get_service``.

    Attributes:
        engine: runs the requests.
        config: the settings.
        tokenizer: the model's.
        names: names of the model; the first is the one that ``GET /v1/models`` lists first.
        created: start of the service, in seconds since 1970.
        metrics: counters and histograms.
        concurrency: the sequences that run or wait.
        embedder: a single thread for embeddings, which run one request at a time beside the engine's steps.
        default_params: sampling parameters for fields that a request does not give: the publisher's.
        template_processes: run the model's chat template.
        prompt_renderer: the model's chat template, for requests.
        token_texts: texts of single tokens.
        timeline: the last seconds of the engine, for the page.
        workers: limit of the threads that prepare requests.
        deadline: the time (``time.monotonic``) until which running requests may go on, once the server is shutting
            down; None before. New requests are refused then.

    Raises:
        ServerError: the model has no tokenizer.
        RequestError: its chat template has not the variables of the config.
        ModelError: the publisher's sampling parameters are impossible.
    """

    def __init__(self, engine: "Engine", config: ServerConfig) -> None:
        model = engine.model
        if model.tokenizer is None:
            raise ServerError("the model has no tokenizer, and a server takes texts; use the library with token ids")
        self.engine = engine
        self.config = config
        self.tokenizer: Tokenizer = model.tokenizer
        self.names = config.names or (model.path.name if model.path is not None else "model",)
        # OpenAI's "created" is the time of the model's release, which a checkpoint does not tell.
        self.created = int(time.time())
        self.concurrency = ConcurrencyLimit(engine.config.max_batch, config.max_queue)
        self.metrics = Metrics(engine.stats, lambda: self.concurrency.in_use)
        self.default_params = SamplingParams.of(model)
        self.template_processes = TemplateProcesses(min(RENDER_TIMEOUT, config.request_timeout))
        self.prompt_renderer = ChatPromptRenderer(self.tokenizer, self.template_processes, config.template_vars)
        self.token_texts = TokenTexts(self.tokenizer)
        self.timeline = Timeline()
        engine.recorder.add(self.timeline)
        self.deadline: float | None = None
        self.embedder = ThreadPoolExecutor(1, "jllm-embedder")
        self.workers = anyio.CapacityLimiter(WORKERS)
        self._running: set[EngineRequests] = set()

    @property
    def context_length(self) -> int:
        """Most tokens of a sequence, prompt and output: the model's context, or what the cache's pages hold."""
        # With few pages, a single sequence cannot fill the model's context.
        page_tokens = self.engine.stats().pages * self.engine.config.page_size
        return min(self.engine.model.config.context_length, page_tokens)

    @property
    def idle(self) -> bool:
        """Whether no request runs or waits."""
        return not self._running and not self.concurrency.in_use

    @property
    def draining(self) -> Draining | None:
        """What the server still waits for, once it is shutting down."""
        if self.deadline is None:
            return None
        # An embedding is a request without sequences.
        answers = max(len(self._running), self.concurrency.in_use)
        return Draining(answers, round(max(0.0, self.deadline - time.monotonic()), 1))

    def check_model(self, name: str) -> None:
        """Raise an ApiError (404) for a model that is not served."""
        if name not in self.names:
            message = f"there is no model {name!r:.200}, this server has {', '.join(self.names)}"
            raise ApiError(404, message, "model_not_found", "model")

    def prompt_ids(self, prompt: str | list[int], param: str, generates: bool = True) -> list[int]:
        """Token ids of a prompt, checked.

        Args:
            prompt: a text, which is encoded with the model's special tokens, or token ids.
            param: the request's field that holds it, for error messages.
            generates: an output follows, which needs a position and pages.

        Raises:
            ApiError: the prompt is too long.
            RequestError: a token id that the model does not have.
        """
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return self.check_prompt(token_ids, param, generates)

    def check_prompt(self, token_ids: list[int], param: str, generates: bool = True) -> list[int]:
        """The same token ids; errors and arguments are those of ``prompt_ids``."""
        # An output has at least one token. An embedding has none, and uses no pages.
        limit = self.context_length - 1 if generates else self.engine.model.config.context_length
        if self.config.max_prompt is not None:
            limit = min(limit, self.config.max_prompt)
        if len(token_ids) > limit:
            message = f"the prompt has {len(token_ids)} tokens, at most {limit} are taken"
            raise ApiError(400, message, "context_length_exceeded", param)
        check_token_ids(token_ids, self.engine.model.config)
        return token_ids

    def max_new_tokens(self, prompt: list[int], asked: int | None, thinks: bool = False) -> int:
        """Most tokens of an output after this prompt.

        Args:
            prompt: its token ids.
            asked: what the request says; None for the server's default, NO_LIMIT for the whole context.
            thinks: the model may think before it answers.
        """
        room = self.context_length - len(prompt)
        if asked == NO_LIMIT:
            return room
        return min(self.default_max_tokens(thinks) if asked is None else asked, room)

    def default_max_tokens(self, thinks: bool) -> int:
        """Most tokens of an output where the request does not say."""
        return min(self.config.max_tokens or default_max_tokens(thinks), self.context_length)

    def check_accepting(self) -> None:
        """Raise an ApiError (503) where new requests are refused."""
        self.check_alive()
        if self.deadline is not None:
            raise shutting_down_error()

    def check_alive(self) -> None:
        """Raise an ApiError (503) where the engine has stopped; only a restart of the server helps."""
        if self.engine.closed:
            raise ApiError(503, "the engine has stopped", "engine_stopped")

    def start(self, sequences: int) -> EngineRequests:
        """Admit a request for this many sequences. What is returned must be closed.

        Raises:
            ApiError: the server is full or shutting down.
        """
        self.check_accepting()
        # Counted here and not by the engine, which gets the request only after a worker thread has prepared it.
        self.concurrency.acquire(sequences)
        engine_requests = EngineRequests(self.engine, self.metrics, self.workers, self.config.request_timeout)
        engine_requests.add_done_callback(lambda: self._ended(engine_requests, sequences))
        self._running.add(engine_requests)
        return engine_requests

    def fail_all(self) -> None:
        """End all running requests with an error."""
        # A copy: the failing requests remove themselves from the set.
        for engine_requests in list(self._running):
            engine_requests.fail(shutting_down_error())

    def close(self) -> None:
        """End all requests and threads. The engine stays open: it is the caller's."""
        self.fail_all()
        self.engine.recorder.remove(self.timeline)
        self.template_processes.close()
        self.embedder.shutdown(wait=False, cancel_futures=True)

    def _ended(self, engine_requests: EngineRequests, sequences: int) -> None:
        self._running.discard(engine_requests)
        self.concurrency.release(sequences)


def get_service(request: Request) -> Service:
    """FastAPI dependency: the service of the application."""
    service: Service = request.app.state.service
    return service
