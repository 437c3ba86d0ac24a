"""Chat loop in the terminal."""

import contextlib
from collections.abc import Generator
from typing import Protocol

import click
from jllm_core.errors import JLLMError

HELP = """\
/help    this list
/reset   forget the conversation
/exit    leave (Ctrl-D does, too)
Ctrl-C   stop the answer; the part that has come stays in the conversation
Anything else is sent to the model."""


class ChatBackend(Protocol):
    """A chat session, local or remote."""

    def reset(self) -> None:
        """Start the conversation anew."""

    def send(self, text: str) -> Generator[str, None, None]:
        """Send a message; the model's message comes piece by piece. Closing the generator stops it."""


def run_chat(session: ChatBackend) -> None:
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


def _print_answer(session: ChatBackend, text: str) -> None:
    pieces = session.send(text)
    try:
        for piece in pieces:
            click.echo(piece, nl=False)
        click.echo()
    except KeyboardInterrupt:
        click.echo(" (stopped)")
    # The conversation goes on: a prompt that is too long, for example, can be followed by /reset.
    except JLLMError as error:
        click.echo(f"Error: {error} (/reset starts over)", err=True)
    finally:
        # After Ctrl-C the generator is still open; closing it keeps the part of the message that has come.
        pieces.close()
