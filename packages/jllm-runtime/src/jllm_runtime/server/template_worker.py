"""Child process that renders chat templates: conversations on standard input, texts on standard output.

A message is JSON behind a line with its number of bytes. This module must stay light: each child imports it.
"""

import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import IO, Any

from jllm_runtime.errors import RequestError
from jllm_runtime.named_templates import ChatTemplates

MAX_MEMORY = 512 * 2**20
"""Most bytes of memory that a rendering may take, beside MEMORY_PER_BYTE for each byte of its conversation."""

MEMORY_PER_BYTE = 16

MAX_TEXT = 4 * 2**20
"""Most characters of a rendered text, beside TEXT_PER_BYTE for each byte of its conversation. The tokenizer would take
many times its memory."""

TEXT_PER_BYTE = 4

PATIENCE = 1.0
"""Seconds of computing after which a rendering has the lowest priority: the model needs the cores."""

BACKGROUND_NICE = 19


def main() -> None:
    """Render until standard input ends."""
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    if os.name == "posix":
        signal.signal(signal.SIGPROF, lambda *_: os.nice(BACKGROUND_NICE))
    while request := read_message(stdin):
        reply = _render_within_limits(request)
        # Without privileges a priority never goes up again.
        if os.name == "posix" and os.nice(0) == BACKGROUND_NICE:
            reply["spent"] = True
        stdout.write(to_message(reply))
        stdout.flush()


def to_message(value: Mapping[str, Any]) -> bytes:
    """The bytes of a message."""
    body = json.dumps(value).encode()
    return b"%d\n%b" % (len(body), body)


def read_message(stream: IO[bytes]) -> bytes | None:
    """The JSON of the next message; None at the end of the stream."""
    head = stream.readline()
    return stream.read(int(head)) if head else None


def _render_within_limits(request: bytes) -> dict[str, Any]:
    """The reply: ``text`` or ``error``, and with ``spent`` that this process should not be used again."""
    memory, length = MAX_MEMORY + MEMORY_PER_BYTE * len(request), MAX_TEXT + TEXT_PER_BYTE * len(request)
    try:
        asked = json.loads(request)
        if os.name == "posix":
            _limit(memory, asked["seconds"])
        templates = ChatTemplates(asked["sources"], asked["special"])
        text = templates.render(asked["messages"], **asked["variables"])
        if len(text) > length:
            return {
                "error": f"the model's chat template makes {len(text)} characters of it, at most {length} are taken"
            }
        return {"text": text}
    except (MemoryError, RequestError) as error:
        if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
            mebibytes = memory // 2**20
            message = f"the model's chat template takes more than {mebibytes} MiB of memory for this conversation"
            return {"error": message, "spent": True}
        return {"error": str(error)}
    finally:
        if os.name == "posix":
            signal.setitimer(signal.ITIMER_PROF, 0)


def _limit(memory: int, seconds: int) -> None:
    """Bound the memory of this process, and the time until its next rendering. Windows has no such limits."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory if most == resource.RLIM_INFINITY else min(memory, most), most))
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    # The server kills a rendering that takes too long. This is for one whose server has been killed itself.
    signal.alarm(seconds)


if __name__ == "__main__":
    main()
