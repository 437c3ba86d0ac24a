"""Conversations in files: a JSON list of messages, as the OpenAI API has them."""

import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jllm_runtime.chat.conversation import Message
from jllm_runtime.errors import RequestError, check_text

ROLES = ("system", "user", "assistant")
TEXTS = ("content", "reasoning_content")
"""Fields of a message beside its role; the first is always there."""


def save_messages(path: Path, messages: Sequence[Message], overwrite: bool = False) -> None:
    """Write a conversation. Other files are not touched, and a file is replaced as a whole or not at all.

    Args:
        path: the file.
        messages: the conversation.
        overwrite: replace a file that is there.

    Raises:
        RequestError: there is such a file, or it cannot be written.
    """
    text = json.dumps(list(messages), ensure_ascii=False, indent=1) + "\n"
    try:
        if not overwrite:
            # It takes the name; what is written below replaces it.
            path.open("x").close()
        _replace(path, text, made_here=not overwrite)
    except FileExistsError as error:
        raise RequestError(f"there is a file {path} already; save under another name, or remove it first") from error
    except (OSError, ValueError) as error:
        raise RequestError(f"the conversation cannot be saved in {path}: {error}") from error


def load_messages(path: Path) -> list[Message]:
    """Read a conversation.

    Raises:
        RequestError: there is no such file, or it is no list of messages.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"the conversation {path} cannot be read: {error}") from error
    if not isinstance(found, list):
        raise RequestError(f"{path} must be a list of messages, got {type(found).__name__}")
    return [_message(message, f"message {number} in {path}", number) for number, message in enumerate(found, 1)]


def _message(found: Any, where: str, number: int) -> Message:
    if not isinstance(found, dict) or found.get("role") not in ROLES or "content" not in found:
        shown = json.dumps(found)
        raise RequestError(f'{where} must have a "role" ({", ".join(ROLES)}) and "content", got {shown:.80}')
    if found["role"] == "system" and number > 1:
        raise RequestError(f"{where} is a system message; a conversation has one at most, and begins with it")
    for name in TEXTS:
        if not isinstance(found.get(name, ""), str):
            raise RequestError(f"{where}: {name} must be a text, got {type(found[name]).__name__}")
        check_text(found.get(name, ""), f"{name} of {where}")
    # Other fields, such as the names and times of other programs, change nothing here.
    return {name: found[name] for name in ("role", *TEXTS) if name in found}


def _replace(path: Path, text: str, made_here: bool) -> None:
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(text)
        # A temporary file is private; a conversation is as others may read what this user writes.
        temporary.chmod(path.stat().st_mode & 0o777)
        os.replace(temporary, path)
    except BaseException:
        for left in [temporary, path if made_here else None]:
            with contextlib.suppress(OSError):
                if left is not None:
                    left.unlink(missing_ok=True)
        raise
