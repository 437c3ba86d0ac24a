"""Conversation with a model, wherever it runs: its messages, and what is done with them."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import Any, ClassVar

from jllm_runtime.errors import RequestError, check_text

Message = dict[str, str]

SETTINGS: dict[str, type[int] | type[float]] = {
    **{"temperature": float, "top_k": int, "top_p": float, "min_p": float, "seed": int, "max_tokens": int},
    **{"repetition_penalty": float, "presence_penalty": float, "frequency_penalty": float},
}
"""Sampling parameters that can be changed during a conversation, and the types of their values."""

DEFAULT = "default"
"""The value that sets a parameter back to what it was at the start."""

THINK = "think"
"""The setting for ENABLE_THINKING; its values are true and false."""

ENABLE_THINKING = "enable_thinking"
"""The variable of chat templates that turns thinking on and off."""


class Thinking(str):
    """Piece of an answer that is the model's thinking."""

    __slots__ = ()


class Conversation(ABC):
    """A conversation with a model.

    The answers of ``send``, ``regenerate`` and ``resume`` come piece by piece; pieces of the model's thinking are
    ``Thinking``. When such a generator is closed or interrupted, the part that has come stays in the conversation. When
    the request is refused, the conversation is as it was before.

    Args:
        system: a system message that opens the conversation.

    Attributes:
        messages: the conversation, oldest first, the system message included. Thinking is in ``reasoning_content``.
        cut_at: tokens after which the newest answer was cut by the limit; None where it was not, 0 where a server with
            a limit of its own has cut it.
    """

    can_resume: ClassVar[bool] = False
    """Whether ``resume`` can go on with an answer that was cut or stopped."""

    def __init__(self, system: str | None) -> None:
        if system is not None:
            check_text(system, "the system message")
        self._system = system
        self.messages: list[Message] = []
        self.cut_at: int | None = None
        # How often the newest answer was regenerated, which is added to its seed: with the seed of before it would be
        # the answer of before.
        self._retries = 0
        self.reset()

    @property
    def system(self) -> str | None:
        """The system message."""
        return self._system

    def reset(self) -> None:
        """Start the conversation anew, with the system message alone."""
        self.replace([] if self._system is None else [{"role": "system", "content": self._system}])

    def replace(self, messages: Sequence[Message]) -> None:
        """Put other messages in place of the conversation. Where they have a system message, it is kept from now on."""
        self.messages = list(messages)
        self.cut_at = None
        if self.messages and self.messages[0]["role"] == "system":
            self._system = self.messages[0]["content"]

    def set_system(self, text: str) -> None:
        """Set the system message of this conversation and those after it; an empty text takes it away.

        Raises:
            RequestError: the text is not valid UTF-8.
        """
        check_text(text, "the system message")
        self._system = text or None
        opening = [] if self._system is None else [{"role": "system", "content": self._system}]
        self.replace([*opening, *(message for message in self.messages if message["role"] != "system")])

    def send(self, text: str) -> Generator[str, None, None]:
        """Send a message; the model's message comes piece by piece.

        Raises:
            JLLMError: the text is not valid UTF-8, or the model (or its server) does not take the conversation.
        """
        check_text(text, "the message")
        self._retries = 0
        yield from self._answer([*self.messages, {"role": "user", "content": text}])

    def regenerate(self) -> Generator[str, None, None]:
        """Answer the newest message once more, in place of its answer.

        Raises:
            RequestError: nothing has been asked yet.
            JLLMError: as ``send``.
        """
        question = self._newest_question()
        self._retries += 1
        yield from self._answer(self.messages[: question + 1])

    def resume(self) -> Generator[str, None, None]:
        """Go on with the newest answer, which was cut or stopped.

        Raises:
            RequestError: there is no such answer, or whoever runs the model cannot do this.
        """
        raise RequestError("an answer cannot be continued here; ask for the rest in a message")
        yield ""  # a generator, as those of the subclasses are

    def undo(self) -> str:
        """Take the newest question and its answer back; the question.

        Raises:
            RequestError: nothing has been asked yet.
        """
        at = self._newest_question()
        question = self.messages[at]["content"]
        self.replace(self.messages[:at])
        return question

    def stop(self) -> bool:
        """Let the answer that is coming end soon, from a signal handler.

        Returns:
            Whether it will; else an exception has to end it.
        """
        return False

    def close(self) -> None:
        """Give back what the conversation holds."""
        return

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The values of SETTINGS that are known, and of THINK where the model has it."""

    @abstractmethod
    def set(self, name: str, value: Any) -> None:
        """Change a setting for the answers to come.

        Args:
            name: of SETTINGS, or THINK.
            value: DEFAULT sets it back.

        Raises:
            RequestError: an impossible value, or a setting that the model has not.
        """

    @abstractmethod
    def describe(self) -> str:
        """How tokens are chosen, in words."""

    @abstractmethod
    def _answer(self, sent: list[Message]) -> Generator[str, None, None]:
        """The answer to these messages, which then are the conversation, with the answer behind them."""

    def _newest_question(self) -> int:
        for at in range(len(self.messages) - 1, -1, -1):
            if self.messages[at]["role"] == "user":
                return at
        raise RequestError("nothing has been asked yet")
