"""A conversation in the terminal."""

import contextlib
from collections.abc import Generator
from typing import Protocol

import click
from jllm_core.errors import JLLMError

HELP = """\
/help    this list
/reset   forget the conversation
/exit    leave (Ctrl-D does, too)
Ctrl-C   stop the answer; what has come of it stays in the conversation
Anything else is said to the model."""


class Conversation(Protocol):
    """Somebody to talk with."""

    def reset(self) -> None:
        """Forget what was said."""

    def answer(self, text: str) -> Generator[str, None, None]:
        """Say something and get the answer piece by piece. Closing the generator stops it."""


def run_chat(session: Conversation) -> None:
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


def _print_answer(session: Conversation, text: str) -> None:
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
