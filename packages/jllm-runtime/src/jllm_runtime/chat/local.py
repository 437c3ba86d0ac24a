"""Chat session with a model in this process."""

from collections.abc import Generator

from jllm_runtime.cache.contiguous import KVDtype
from jllm_runtime.errors import RequestError
from jllm_runtime.generation import stream_generate
from jllm_runtime.model import Model
from jllm_runtime.sampling import SamplingParams


class ChatSession:
    """A conversation with a model.

    Args:
        model: from ``load_model``.
        params: sampling parameters of all messages.
        system: a system message that opens the conversation.
        lookup, kv_dtype: those of ``stream_generate``.

    Attributes:
        messages: the conversation, oldest first, the system message included.
    """

    def __init__(
        self,
        model: Model,
        params: SamplingParams,
        system: str | None = None,
        lookup: int = 0,
        kv_dtype: KVDtype | None = None,
    ) -> None:
        self._model = model
        self._lookup = lookup
        self._kv_dtype = kv_dtype
        self._params = params
        self._system = system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Start the conversation anew, with the system message alone."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def send(self, text: str) -> Generator[str, None, None]:
        """Send a message; the model's message comes piece by piece.

        When the generator is closed or interrupted, the part that has come stays in the conversation. After an error
        in the prompt, the conversation is as it was before.

        Raises:
            RequestError: the conversation is longer than the context, or the chat template refuses it.
        """
        if self._model.tokenizer is None:
            raise RequestError("the model has no tokenizer, so it takes no texts")
        sent = [*self.messages, {"role": "user", "content": text}]
        # The whole conversation is encoded again: a template may write earlier messages differently than they came.
        ids = self._model.tokenizer.encode_chat(sent)
        pieces = stream_generate(self._model, ids, self._params, lookup=self._lookup, kv_dtype=self._kv_dtype)
        answer = ""
        try:
            for piece in pieces:
                answer += piece.text
                yield piece.text
        # Also when the caller closes the generator, as it does after Ctrl-C.
        finally:
            self.messages = [*sent, {"role": "assistant", "content": answer}]
