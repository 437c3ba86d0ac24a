"""Slash commands of the chat: what a message that begins with one of their names does."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from jllm_runtime.chat.conversation import DEFAULT, SETTINGS, THINK, Conversation
from jllm_runtime.chat.transcript import load_messages, save_messages
from jllm_runtime.errors import RequestError

ESCAPE = "//"
"""A message that begins with this is sent with one stroke less, whatever follows."""

KEYS = """\
Ctrl-C      stop the answer; the part that has come stays in the conversation. Twice leaves
Ctrl-D      leave
Alt-Enter   a line break; what is pasted is one message. Elsewhere \"\"\" begins and ends one of several lines
Anything else is sent to the model, also what begins with another /word; //help sends "/help"."""

MAX_SHOWN = 40
"""Characters of a message that a line about it repeats."""


@dataclass(frozen=True)
class Command:
    """A slash command.

    Attributes:
        run: does it with the words behind its name; returns a line for the user, or an answer that comes.
        help: what it does.
        argument: what stands behind its name.
    """

    run: Callable[[str], "str | Generator[str, None, None]"]
    help: str
    argument: str = ""


class SlashCommands:
    """The commands, for a conversation.

    Args:
        conversation: what they act on.
    """

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        # The file that /save may replace: this chat has written it, or come from it.
        self._file: Path | None = None
        self.leaving = False
        self._commands = {
            "/help": Command(self._help, "this list"),
            "/reset": Command(self._reset, "forget the conversation"),
            "/undo": Command(self._undo, "take the newest message and its answer back"),
            "/regenerate": Command(self._regenerate, "answer the newest message once more"),
            "/continue": Command(self._continue, "go on with an answer that was cut or stopped"),
            "/system": Command(self._system, "set the system message, or show it; - takes it away", "[TEXT]"),
            "/set": Command(self._set, "change how tokens are chosen, or show it", "[NAME VALUE]"),
            "/save": Command(self._save, "write the conversation to a file", "[FILE]"),
            "/load": Command(self._load, "go on with a conversation from a file", "FILE"),
            "/exit": Command(self._exit, "leave"),
            "/quit": Command(self._exit, "leave, too"),
        }

    def completions(self) -> list[str]:
        """What Tab completes."""
        return [*self._commands, *(f"/set {name}" for name in self._conversation.settings())]

    def find(self, text: str) -> Callable[[], "str | Generator[str, None, None]"] | None:
        """The command that a message is, ready to be run; None for a message to the model."""
        name, _, argument = text.partition(" ")
        command = self._commands.get(name)
        if command is None:
            return None
        return lambda: command.run(argument.strip())

    def typo(self, text: str) -> str | None:
        """The command that may have been meant by a message that is none."""
        close = get_close_matches(text.split()[0], self._commands, n=1, cutoff=0.7) if text.startswith("/") else []
        return close[0] if close and not text.startswith(ESCAPE) else None

    def _help(self, _: str) -> str:
        names = [f"{name} {command.argument}".rstrip() for name, command in self._commands.items()]
        width = max(map(len, names)) + 3
        lines = [f"{name:{width}}{command.help}" for name, command in zip(names, self._commands.values(), strict=True)]
        return "\n".join([*lines, KEYS])

    def _exit(self, _: str) -> str:
        self.leaving = True
        return ""

    def _reset(self, _: str) -> str:
        self._conversation.reset()
        return "(the conversation is forgotten)"

    def _undo(self, _: str) -> str:
        return f"(taken back: {_shortened(self._conversation.undo())})"

    def _regenerate(self, _: str) -> Generator[str, None, None]:
        if self._conversation.settings()["temperature"] == 0:
            click.echo("(it is greedy: the same again, unless /set temperature 0.7 or so makes a choice)", err=True)
        return self._conversation.regenerate()

    def _continue(self, _: str) -> Generator[str, None, None]:
        return self._conversation.resume()

    def _system(self, text: str) -> str:
        if not text:
            system = self._conversation.system
            return "(there is no system message)" if system is None else system
        self._conversation.set_system("" if text == "-" else text)
        return "(the system message is set)" if self._conversation.system else "(there is no system message now)"

    def _set(self, words: str) -> str:
        name, _, value = words.partition(" ")
        settings = self._conversation.settings()
        if not name:
            return "\n".join(f"{name:22}{_shown(value)}" for name, value in settings.items())
        # As the options and most libraries spell them.
        name = name.removeprefix("--").replace("-", "_")
        if name not in settings:
            raise RequestError(f"there is no setting {name}; there are {', '.join(settings)}")
        if not value:
            return f"{name} is {_shown(settings[name])}"
        self._conversation.set(name, _value(name, value.strip()))
        return f"({name} is {_shown(self._conversation.settings()[name])} from now on)"

    def _save(self, name: str) -> str:
        path = Path(name).expanduser() if name else self._file
        if path is None:
            raise RequestError("/save needs the name of a file")
        path = path.absolute()
        save_messages(path, self._conversation.messages, overwrite=path == self._file)
        self._file = path
        return f"({_count(self._conversation)} in {path})"

    def _load(self, name: str) -> str:
        if not name:
            raise RequestError("/load needs the name of a file")
        path = Path(name).expanduser().absolute()
        self._conversation.replace(load_messages(path))
        self._file = path
        return f"({_count(self._conversation)} from {path})"


def _value(name: str, text: str) -> Any:
    """The value of a setting that somebody has typed."""
    if text == DEFAULT:
        return DEFAULT
    if name == THINK:
        if text not in ("on", "off"):
            raise RequestError(f"{THINK} must be on, off or {DEFAULT}, got {text!r}")
        return text == "on"
    kind = SETTINGS[name]
    try:
        return kind(text)
    except ValueError as error:
        expected = "a whole number" if kind is int else "a number"
        raise RequestError(f"{name} must be {expected} or {DEFAULT}, got {text!r}") from error


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return DEFAULT if value is None else f"{value}"


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_SHOWN else f"{line[:MAX_SHOWN]}..."


def _count(conversation: Conversation) -> str:
    count = len(conversation.messages)
    return f"{count} message{'' if count == 1 else 's'}"
