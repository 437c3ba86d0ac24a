"""A conversation with a model that is loaded here."""

from collections.abc import Generator

from jllm_runtime.errors import RequestError
from jllm_runtime.generation import stream_generate
from jllm_runtime.loading import Model
from jllm_runtime.sampling import SamplingParams


class ChatSession:
    """A conversation with a model: the messages so far, and the next answer.

    Args:
        model: from ``load_model``.
        params: of every answer.
        system: the message that opens the conversation.
        lookup, kv_dtype: as ``stream_generate`` has them.

    Attributes:
        messages: the conversation, oldest first, the system message included.
    """

    def __init__(
        self,
        model: Model,
        params: SamplingParams,
        system: str | None = None,
        lookup: int = 0,
        kv_dtype: str | None = None,
    ) -> None:
        self._model = model
        self._lookup = lookup
        self._kv_dtype = kv_dtype
        self._params = params
        self._system = system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def answer(self, text: str) -> Generator[str, None, None]:
        """Say something and get the answer piece by piece.

        When the generator is closed or interrupted, what has come of the answer stays in the conversation. When the
        model does not take the conversation, it stays as it was before.

        Raises:
            RequestError: the conversation has become longer than the context, or the chat template refuses it.
        """
        if self._model.tokenizer is None:
            raise RequestError("the model has no tokenizer, so it takes no texts")
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = self._model.tokenizer.encode_chat(asked)
        pieces = stream_generate(self._model, ids, self._params, lookup=self._lookup, kv_dtype=self._kv_dtype)
        answer = ""
        try:
            for piece in pieces:
                answer += piece.text
                yield piece.text
        finally:
            self.messages = [*asked, {"role": "assistant", "content": answer}]
