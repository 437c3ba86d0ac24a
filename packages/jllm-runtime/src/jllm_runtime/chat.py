"""A conversation in the terminal."""

import contextlib
from collections.abc import Generator

import click
from jllm_core.errors import JLLMError

from jllm_runtime.errors import RequestError
from jllm_runtime.generation import stream_generate
from jllm_runtime.loading import Model
from jllm_runtime.sampling import SamplingParams

HELP = """\
/help    this list
/reset   forget the conversation
/exit    leave (Ctrl-D does, too)
Ctrl-C   stop the answer; what has come of it stays in the conversation
Anything else is said to the model."""


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


def run_chat(session: ChatSession) -> None:
    """Read from the terminal until the user leaves."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives the prompt its line editing and history)
    click.echo("Type a message, or /help. Ctrl-D leaves.", err=True)
    while True:
        try:
            text = input(">>> ").strip()
        except EOFError:
            click.echo(err=True)
            return
        except KeyboardInterrupt:
            click.echo("\n(Ctrl-D or /exit leaves)", err=True)
            continue
        if text == "/exit":
            return
        if text == "/help":
            click.echo(HELP)
        elif text == "/reset":
            session.reset()
            click.echo("(the conversation is forgotten)")
        elif text.startswith("/"):
            click.echo(f"There is no {text.split()[0]}.\n{HELP}")
        elif text:
            _print_answer(session, text)


def _print_answer(session: ChatSession, text: str) -> None:
    pieces = session.answer(text)
    try:
        for piece in pieces:
            click.echo(piece, nl=False)
        click.echo()
    except KeyboardInterrupt:
        click.echo(" (stopped)")
    except JLLMError as error:
        click.echo(f"Error: {error} (/reset starts over)", err=True)
    finally:
        # Closing keeps what has come of an interrupted answer.
        pieces.close()
