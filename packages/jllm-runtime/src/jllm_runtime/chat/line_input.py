"""Input of messages: an editor with history on a terminal, plain lines elsewhere."""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import click
import platformdirs

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyPressEvent

PROMPT, MORE = ">>> ", "... "
QUOTES = '"""'
"""Beginning and end of a message of several lines, where the terminal does not say what was pasted."""

HISTORY_FILE = "chat_history"


class LineInput(Protocol):
    """A source of messages."""

    def read(self) -> str:
        """The next message, as it was typed; its lines end with line feeds.

        Raises:
            EOFError: there will be none.
            KeyboardInterrupt: the user has pressed Ctrl-C.
        """


def open_input(commands: Sequence[str]) -> LineInput:
    """The input that fits standard input and output.

    Args:
        commands: what Tab completes at the beginning of a message.
    """
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return EditorInput(commands) if on_terminal else PlainInput()


def history_path() -> Path:
    """The file of the messages that were typed: in ``JLLM_CACHE``, or the platform's folder for the state of a user."""
    folder = os.environ.get("JLLM_CACHE") or platformdirs.user_state_dir("jllm", appauthor=False)
    return Path(folder) / HISTORY_FILE


def is_open(text: str) -> bool:
    """Whether a message begins with quotes that nothing closes."""
    text = text.strip()
    return text.startswith(QUOTES) and not (len(text) >= 2 * len(QUOTES) and text.endswith(QUOTES))


def unquoted(text: str) -> str | None:
    """The message between quotes; None for one without."""
    text = text.strip()
    if not text.startswith(QUOTES):
        return None
    return text.removeprefix(QUOTES).removesuffix(QUOTES).strip()


class PlainInput:
    """Lines of standard input."""

    def __init__(self) -> None:
        # Nobody is asked where messages come from a file or a pipe: answers alone are printed.
        self._prompt, self._more = "", ""
        if sys.stdin.isatty():
            self._prompt, self._more = PROMPT, MORE
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 (gives the prompt its line editing and history)

    def read(self) -> str:
        text = input(self._prompt)
        # The end of a file closes quotes as well.
        with contextlib.suppress(EOFError):
            while is_open(text):
                text += "\n" + input(self._more)
        return text


class EditorInput:
    """Editor on the terminal: what is pasted is one message, Alt-Enter makes a line break, arrows go through history.

    Args:
        commands: what Tab completes at the beginning of a message.
    """

    def __init__(self, commands: Sequence[str]) -> None:
        # Imported here: a chat through a pipe does without.
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.shortcuts import CompleteStyle

        keys = KeyBindings()

        @keys.add("enter")
        def _(event: "KeyPressEvent") -> None:
            buffer = event.current_buffer
            if is_open(buffer.text):
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _(event: "KeyPressEvent") -> None:
            event.current_buffer.insert_text("\n")

        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=MORE,
            key_bindings=keys,
            history=open_history(history_path()),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            reserve_space_for_menu=0,
        )

    def read(self) -> str:
        return self._session.prompt()


def open_history(path: Path) -> "History":
    """The history in a file that its owner alone can read; in memory, with a word of it, where that cannot be."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class TextHistory(FileHistory):
        """History that does without what a file cannot hold."""

        def store_string(self, string: str) -> None:
            # A full disk, or a lone surrogate, is no reason to lose a conversation.
            with contextlib.suppress(OSError, UnicodeEncodeError):
                super().store_string(string)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        click.echo(f"(what you type is not kept for the next chat: {path}: {error.strerror})", err=True)
        return InMemoryHistory()
    return TextHistory(path)
