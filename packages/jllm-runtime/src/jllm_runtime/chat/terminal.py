"""Chat loop in the terminal."""

import contextlib
import shutil
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Generator, Iterator
from types import FrameType
from typing import Any

import click
from jllm_core.errors import JLLMError

from jllm_runtime.chat.conversation import Conversation, Thinking
from jllm_runtime.chat.line_input import open_input, unquoted
from jllm_runtime.chat.slash_commands import ESCAPE, SlashCommands

DOUBLE_PRESS = 1.0
"""Seconds within which a second Ctrl-C leaves."""


def run_chat(conversation: Conversation, heading: str = "") -> None:
    """Read from the terminal until the user leaves.

    Args:
        conversation: with a model here, or behind a server. It is closed at the end.
        heading: a line about the model.
    """
    if heading:
        click.echo(heading, err=True)
    click.echo("Type a message, or /help. Ctrl-D leaves.", err=True)
    try:
        _Chat(conversation).run()
    finally:
        conversation.close()


class _Chat:
    """The loop, and what it remembers."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._commands = SlashCommands(conversation)
        self._input = open_input(self._commands.completions())
        self._last_press = -DOUBLE_PRESS

    def run(self) -> None:
        while not self._commands.leaving:
            try:
                text = self._input.read()
                self._last_press = -DOUBLE_PRESS
                self._take(text)
            except EOFError:
                click.echo(err=True)
                return
            except KeyboardInterrupt:
                if self._pressed_twice():
                    click.echo(err=True)
                    return
                click.echo("\n(Ctrl-D or /exit leaves)", err=True)

    def _take(self, typed: str) -> None:
        """Do what a message asks for."""
        text, quoted = typed.strip(), unquoted(typed)
        command = self._commands.find(text) if quoted is None else None
        if quoted is not None:
            text = quoted
        elif command is None and (meant := self._commands.typo(text)):
            click.echo(f"(sent to the model; {meant} is a command)", err=True)
        elif text.startswith(ESCAPE):
            text = text[1:]
        if not text:
            return
        # The conversation goes on: a prompt that is too long, for example, can be followed by /reset.
        try:
            made = self._conversation.send(text) if command is None else command()
            if not isinstance(made, str):
                self._show(made)
            elif made:
                click.echo(made)
        except JLLMError as error:
            click.echo(f"Error: {error}{' (/reset starts over)' if command is None else ''}", err=True)

    def _show(self, pieces: Generator[str, None, None]) -> None:
        """Show an answer as it comes."""
        printer = _Printer()
        stopped = forced = False

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal stopped, forced
            self._commands.leaving |= self._pressed_twice()
            # An exception may come up anywhere, and inside a callback of the garbage collector Python drops it. So the
            # answer is asked to end by itself; an exception is for those that cannot, and for the impatient.
            forced = stopped or not self._conversation.stop()
            stopped = True
            if forced:
                raise KeyboardInterrupt

        try:
            with contextlib.closing(pieces), _on_ctrl_c(stop):
                for piece in pieces:
                    printer.show(piece)
                    if forced:
                        break
        except KeyboardInterrupt:
            stopped = True
        except JLLMError:
            if printer.has_shown:
                printer.finish()
            raise
        printer.finish(" (stopped)" if stopped else "")
        if self._conversation.cut_at is not None:
            where = f"at {self._conversation.cut_at} tokens" if self._conversation.cut_at else "by the server's limit"
            way_on = "; /continue goes on" if self._conversation.can_resume else ""
            click.echo(f"(cut {where}{way_on})", err=True)

    def _pressed_twice(self) -> bool:
        """Note a Ctrl-C. Whether it is the second one within DOUBLE_PRESS, with no message between them."""
        now, before = time.monotonic(), self._last_press
        self._last_press = now
        return now - before < DOUBLE_PRESS


@contextlib.contextmanager
def _on_ctrl_c(handle: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Have Ctrl-C call this within the block."""
    # Python lets the main thread alone set handlers; elsewhere Ctrl-C is not ours.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Printer:
    """Printer of an answer: on a terminal with words that wrap, and thinking in a fainter colour."""

    def __init__(self) -> None:
        self._wrap = None
        if sys.stdout.isatty():
            from jllm_runtime.chat.word_wrap import WordWrap

            self._wrap = WordWrap(lambda: shutil.get_terminal_size().columns)
        self._in_thinking = False
        self.has_shown = False

    def show(self, piece: str) -> None:
        """Show a piece."""
        self.has_shown = True
        if self._in_thinking and not isinstance(piece, Thinking):
            self._end_word()
            self._write("\n\n")
        self._in_thinking = isinstance(piece, Thinking)
        self._write(piece)

    def finish(self, remark: str = "") -> None:
        """End the answer's last line, with a remark behind it."""
        self._end_word()
        click.echo(remark)

    def _write(self, text: str) -> None:
        if self._wrap is not None:
            # What a model writes must not move the cursor or change the terminal.
            text = self._wrap.feed("".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc"))
        self._echo(text)

    def _end_word(self) -> None:
        if self._wrap is not None:
            self._echo(self._wrap.finish())

    def _echo(self, text: str) -> None:
        if text:
            click.echo(click.style(text, dim=True) if self._in_thinking else text, nl=False)
