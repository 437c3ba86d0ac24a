"""What all endpoints share: the engine, what the model is called, and what is under way."""

import time
from concurrent.futures import ThreadPoolExecutor

import anyio
from fastapi import Request

from jllm_runtime.engine.engine import Engine
from jllm_runtime.errors import ServerError
from jllm_runtime.loading import check_token_ids
from jllm_runtime.server.requests.chat_prompt import ChatTemplate
from jllm_runtime.server.concurrency import Admission
from jllm_runtime.server.config import ServerConfig
from jllm_runtime.server.requests.engine_requests import Generation
from jllm_runtime.server.errors import ApiError, draining_error
from jllm_runtime.server.responses.logprobs import TokenTexts
from jllm_runtime.server.metrics import Metrics
from jllm_runtime.tokenizer import Tokenizer

WORKERS = 8
"""Threads that render templates, tokenize and compile grammars; both locks and the devices leave no room for many."""


class Service:
    """One engine behind HTTP.

    Attributes:
        engine: what answers.
        config: the settings.
        tokenizer: the model's.
        names: what the model is called, the first in answers.
        created: when the service began, in seconds since 1970.
        metrics: what is counted.
        admission: how many answers are under way.
        embedder: the thread that embeds, one request at a time beside the engine.
        template: the model's chat template.
        texts: the texts of tokens.
        threads: how many threads may prepare requests at a time.
        draining: whether new work is refused because the server is about to end.

    Raises:
        ServerError: the model takes no texts.
    """

    def __init__(self, engine: Engine, config: ServerConfig) -> None:
        model = engine.model
        if model.tokenizer is None:
            raise ServerError("the model has no tokenizer, and a server takes texts; use the library with token ids")
        self.engine = engine
        self.config = config
        self.tokenizer: Tokenizer = model.tokenizer
        self.names = config.names or (model.path.name if model.path is not None else "model",)
        self.created = int(time.time())
        self.admission = Admission(engine.config.max_batch, config.max_queue)
        self.metrics = Metrics(engine.stats, lambda: self.admission.taken)
        self.template = ChatTemplate(self.tokenizer)
        self.texts = TokenTexts(self.tokenizer)
        self.draining = False
        self.embedder = ThreadPoolExecutor(1, "jllm-embedder")
        self.threads = anyio.CapacityLimiter(WORKERS)
        self._generations: set[Generation] = set()

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.names[0]

    @property
    def context(self) -> int:
        """Most tokens of a text, prompt and answer: what the model was made for, or what the pages hold."""
        pages = self.engine.stats().pages * self.engine.config.page_size
        return min(self.engine.model.config.context_length, pages)

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._generations and not self.admission.taken

    def check_model(self, name: str) -> None:
        """Raise an ApiError for a model that is not served."""
        if name not in self.names:
            message = f"there is no model {name!r:.200}, this server has {', '.join(self.names)}"
            raise ApiError(404, message, "model_not_found", "model")

    def checked_prompt(self, token_ids: list[int], param: str, answered: bool = True) -> list[int]:
        """The same prompt.

        Args:
            token_ids: the prompt.
            param: where it came in.
            answered: whether it needs room for an answer, and pages.

        Raises:
            ApiError: it is longer than a prompt may be.
            RequestError: it has ids that are none.
        """
        limit = self.context - 1 if answered else self.engine.model.config.context_length
        if self.config.max_prompt is not None:
            limit = min(limit, self.config.max_prompt)
        if len(token_ids) > limit:
            message = f"the prompt has {len(token_ids)} tokens, at most {limit} are taken"
            raise ApiError(400, message, "context_length_exceeded", param)
        check_token_ids(token_ids, self.engine.model.config)
        return token_ids

    def room(self, prompt: list[int]) -> int:
        """Most tokens of an answer to this prompt."""
        return self.context - len(prompt)

    def check_accepting(self) -> None:
        """Raise an ApiError where new work is refused."""
        self.check_working()
        if self.draining:
            raise draining_error()

    def check_working(self) -> None:
        """Raise an ApiError where the engine has stopped, which only a new start puts right."""
        if self.engine.closed:
            raise ApiError(503, "the engine has stopped", "engine_stopped")

    def begin(self, answers: int) -> Generation:
        """Make room for a request with this many answers.

        Raises:
            ApiError: there is none.
        """
        self.check_accepting()
        self.admission.take(answers)
        generation = Generation(self.engine, self.metrics, self.threads, self.config.request_timeout)
        generation.at_end(lambda: self._ended(generation, answers))
        self._generations.add(generation)
        return generation

    def end_all(self) -> None:
        """Let everything that is under way end with an error."""
        for generation in list(self._generations):
            generation.fail(draining_error())

    def close(self) -> None:
        """Let go of everything but the engine."""
        self.end_all()
        self.embedder.shutdown(wait=False, cancel_futures=True)

    def _ended(self, generation: Generation, answers: int) -> None:
        self._generations.discard(generation)
        self.admission.give_back(answers)


def service_of(request: Request) -> Service:
    """The service of the app that this request came to; a dependency of the endpoints."""
    service: Service = request.app.state.service
    return service
