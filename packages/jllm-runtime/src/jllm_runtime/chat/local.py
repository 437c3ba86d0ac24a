"""Chat session with a model in this process, over the engine and its prefix cache."""

import dataclasses
import weakref
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, ClassVar

from jllm_core.errors import JLLMError

from jllm_runtime.cache.contiguous import KVDtype, cache_capacity
from jllm_runtime.chat.conversation import DEFAULT, ENABLE_THINKING, SETTINGS, THINK, Conversation, Message, Thinking
from jllm_runtime.engine.config import EngineConfig
from jllm_runtime.engine.engine import Engine
from jllm_runtime.engine.request import Request
from jllm_runtime.errors import EngineError, RequestError
from jllm_runtime.generation import STREAM_BLOCK, stream_generate
from jllm_runtime.model import Model
from jllm_runtime.outputs import FinishReason, Piece
from jllm_runtime.progress import compile_status
from jllm_runtime.reasoning import ReasoningParser, opens_thinking
from jllm_runtime.sampling import MAX_SEED, SamplingParams, draw_seed
from jllm_runtime.sampling_summary import describe
from jllm_runtime.tokenizer import Tokenizer

MIN_TOKENS = 2048
"""Fewest tokens that the cache is made for. From there on it doubles, which computes the conversation once more."""


@dataclass
class _Answer:
    """An answer as it comes, with all that it takes to go on with it.

    Attributes:
        sent: the messages that it answers.
        prompt_ids: those in tokens.
        params: with the seed that was drawn.
        parser: separates thinking and content; None for a model that does not think.
        token_ids: the answer's tokens so far.
        reason: why it has ended; None while it has not, or where somebody has left the generator.
    """

    sent: list[Message]
    prompt_ids: list[int]
    params: SamplingParams
    parser: ReasoningParser | None
    token_ids: list[int] = field(default_factory=list)
    thinking: str = ""
    content: str = ""
    reason: FinishReason | None = None

    def add(self, piece: Piece, text: str) -> list[str]:
        """Add a piece with this text; what there is to show of it."""
        self.token_ids += piece.token_ids
        self.reason = piece.output.finish_reason if piece.output else None
        parts = [self.parser.feed(text)] if self.parser else [("", text)]
        # Of an answer that is only cut, the parser goes on with what it holds back.
        if self.parser and self.reason == "stop":
            parts.append(self.parser.finish())
        shown: list[str] = []
        for thinking, content in parts:
            self.thinking += thinking
            self.content += content
            shown += [Thinking(thinking)] if thinking else []
            shown += [content] if content else []
        return shown

    def message(self) -> Message:
        """The model's message so far. The template decides whether a later turn sees the thinking."""
        thinking = {"reasoning_content": self.thinking} if self.thinking else {}
        return {"role": "assistant", "content": self.content, **thinking}


class ChatSession(Conversation):
    """A conversation with a model in this process.

    The keys and values of earlier turns are kept. While the user reads and types, the newest answer is taken in as a
    part of the next prompt, so that a turn computes little more than its own message.

    Args:
        model: from ``load_model``.
        params: sampling parameters of all messages.
        system: a system message that opens the conversation.
        lookup: that of ``stream_generate``. The engine has no lookup: other than 0, each turn computes the
            conversation anew. Refused for models with delta nets.
        kv_dtype: that of ``stream_generate``.
        variables: more variables of the chat template.

    Raises:
        RequestError: the template has no such variable.
    """

    can_resume: ClassVar[bool] = True

    def __init__(
        self,
        model: Model,
        params: SamplingParams,
        system: str | None = None,
        lookup: int = 0,
        kv_dtype: KVDtype | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self._model = model
        self._lookup = lookup
        self._kv_dtype = kv_dtype
        self._params = self._first_params = params
        self._variables = dict(variables or {})
        if model.tokenizer is not None:
            model.tokenizer.check_variables(self._variables)
        self._first_variables = dict(self._variables)
        self._newest: _Answer | None = None
        self._running: Request | None = None
        self._preparing: Request | None = None
        self._engine: Engine | None = None
        super().__init__(system)

    @property
    def engine(self) -> Engine | None:
        """The engine that computes the answers, for its statistics; None before the first, and where there is none."""
        return self._engine

    def replace(self, messages: Iterable[Message]) -> None:
        self._newest = None
        super().replace(list(messages))

    def resume(self) -> Generator[str, None, None]:
        answer = self._newest
        if answer is None or answer.reason == "stop":
            raise RequestError("there is nothing to continue: the newest answer is whole")
        context = self._model.config.context_length
        if len(answer.prompt_ids) + len(answer.token_ids) >= context:
            raise RequestError(f"the answer cannot be continued: the context of the model, {context} tokens, is full")
        yield from self._run(answer)

    def stop(self) -> bool:
        if self._running is None:
            return False
        self._running.cancel()
        return True

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def settings(self) -> dict[str, Any]:
        own = {name: getattr(self._params, name) for name in SETTINGS}
        if not self._can_think():
            return own
        return {**own, THINK: self._variables.get(ENABLE_THINKING, DEFAULT)}

    def set(self, name: str, value: Any) -> None:
        if name != THINK:
            given = getattr(self._first_params, name) if value == DEFAULT else value
            self._params = dataclasses.replace(self._params, **{name: given})
        elif not self._can_think():
            raise RequestError(f"the model's chat template has no variable {ENABLE_THINKING}, so there is no switch")
        elif value == DEFAULT:
            self._variables = dict(self._first_variables)
        else:
            self._variables[ENABLE_THINKING] = value

    def describe(self) -> str:
        return f"{describe(self._params, self._model)}, at most {self._params.max_tokens} tokens an answer"

    def _can_think(self) -> bool:
        return self._model.tokenizer is not None and ENABLE_THINKING in self._model.tokenizer.chat_variables()

    def _tokenizer(self) -> Tokenizer:
        if self._model.tokenizer is None:
            raise RequestError("the model has no tokenizer, so it takes no texts")
        return self._model.tokenizer

    def _answer(self, sent: list[Message]) -> Generator[str, None, None]:
        tokenizer = self._tokenizer()
        # The whole conversation is encoded again: a template may write earlier messages differently than they came.
        text = tokenizer.render_chat(sent, **self._variables)
        seed = draw_seed() if self._params.seed is None else self._params.seed
        # One seed for the whole of an answer, so that it is the same when it is cut and continued.
        params = dataclasses.replace(self._params, seed=(seed + self._retries) % (MAX_SEED + 1))
        parser = ReasoningParser(opens_thinking(text)) if tokenizer.thinks(**self._variables) else None
        yield from self._run(_Answer(sent, tokenizer.encode_rendered(text), params, parser))

    def _run(self, answer: _Answer) -> Generator[str, None, None]:
        """Compute an answer, or go on with it: behind the tokens of before, it goes on with their text."""
        prompt = [*answer.prompt_ids, *answer.token_ids] if answer.token_ids else answer.prompt_ids
        params = dataclasses.replace(answer.params, max_tokens=self._params.max_tokens)
        pieces = self._pieces(prompt, params)
        answer.reason, self.cut_at = None, None
        try:
            with closing(pieces):
                for piece in pieces:
                    yield from answer.add(piece, self._whole_text(answer, piece))
        # Also when the caller closes the generator, as it does after Ctrl-C.
        finally:
            self.messages = [*answer.sent, answer.message()]
            self._newest = answer
            self.cut_at = len(answer.token_ids) if answer.reason == "length" else None
            self._prepare()

    def _whole_text(self, answer: _Answer, piece: Piece) -> str:
        """The text of a piece, without a character that the end of the answer cuts: it may yet become whole."""
        if piece.output is None or piece.output.finish_reason == "stop":
            return piece.text
        detokenizer = self._tokenizer().detokenizer(hidden=None if answer.params.skip_special_tokens else ())
        for token in [*answer.token_ids, *piece.token_ids]:
            detokenizer.add(token)
        return piece.text.removesuffix(detokenizer.finish())

    def _pieces(self, prompt: list[int], params: SamplingParams) -> Generator[Piece, None, None]:
        """The pieces of an answer, once the request is accepted."""
        if self._lookup:
            pieces = stream_generate(self._model, prompt, params, lookup=self._lookup, kv_dtype=self._kv_dtype)
            return (piece for piece in pieces)
        if self._preparing is not None:
            self._preparing.cancel()
        engine = self._engine_for(len(prompt) + params.max_tokens)
        # A cache that takes all of the memory it may have may still be too small for the longest answer.
        room = engine.config.page_count(self._model) * engine.config.page_size + 1 - len(prompt)
        request = engine.submit(prompt, dataclasses.replace(params, max_tokens=max(1, min(params.max_tokens, room))))

        def until_the_end() -> Generator[Piece, None, None]:
            self._running = request
            try:
                with compile_status():
                    yield from request
            finally:
                self._running = None
                request.cancel()

        return until_the_end()

    def _engine_for(self, tokens: int) -> Engine:
        """The engine, with pages for a text of so many tokens."""
        config = EngineConfig(max_batch=1, decode_steps=STREAM_BLOCK, kv_dtype=self._kv_dtype).fitted(self._model)
        wanted = cache_capacity(max(tokens, MIN_TOKENS), self._model.config.context_length)
        pages, engine = -(-wanted // config.page_size), self._engine
        if engine is not None and (engine.config.pages or 0) >= pages:
            return engine
        try:
            pages = min(pages, config.page_count(self._model))
        except EngineError:
            # The pool of the engine that there is may have taken the memory that the states of a larger one would need.
            if engine is None:
                raise
            return engine
        if engine is None or (engine.config.pages or 0) < pages:
            # Its memory is free before the next one asks for some.
            self.close()
            engine = self._engine = Engine(self._model, dataclasses.replace(config, pages=pages))
            weakref.finalize(self, engine.close)
        return engine

    def _prepare(self) -> None:
        """Compute what is known of the next prompt, while the user reads and types.

        What decode has computed is not reused, and a template may write an answer differently than it came: without
        this, the user would wait for it at the next turn.
        """
        if self._engine is None:
            return
        # A prompt that cannot be is refused when it is asked for.
        with suppress(JLLMError):
            next_prompts = [
                self._tokenizer().encode_chat([*self.messages, {"role": "user", "content": text}], **self._variables)
                for text in ("a", "b")
            ]
            known = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*next_prompts, strict=False))]
            if known:
                self._preparing = self._engine.submit(known, SamplingParams(max_tokens=1))
