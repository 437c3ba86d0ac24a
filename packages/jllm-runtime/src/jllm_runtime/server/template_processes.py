"""Child processes that render chat templates, and can be killed.

A template comes with the model, from strangers. The sandbox keeps it from files and from the network, not from looping
for ever or from making a text of a billion characters.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from threading import Event, Lock, Timer
from typing import IO, Any, cast

import anyio

from jllm_runtime.errors import RequestError
from jllm_runtime.named_templates import ChatTemplates
from jllm_runtime.server.errors import ApiError, shutting_down_error
from jllm_runtime.server.template_worker import read_message, to_message

RENDER_TIMEOUT = 10
"""Seconds that a rendering may take. Of ordinary templates the longest conversations take some tenths of a second."""

MAX_PROCESSES = 16
"""Most renderings at a time. Further ones wait: where a template loops on some conversations, there are others."""

MAX_IDLE = 2
"""Processes that are kept for the next conversations. Each takes some 20 MB."""

Process = subprocess.Popen[bytes]


class TemplateProcesses:
    """Child processes that render chat templates, for any threads.

    Attributes:
        threads: limit of the threads that call ``render``. They are other threads than those that do the rest of a
            request: a template that loops holds up conversations only.

    Args:
        timeout: seconds that a rendering may take.
    """

    def __init__(self, timeout: float = RENDER_TIMEOUT) -> None:
        self.threads = anyio.CapacityLimiter(MAX_PROCESSES)
        self._timeout = timeout
        self._idle: list[Process] = []
        self._busy: set[Process] = set()
        self._closed = False
        self._changed = Lock()

    def render(
        self, templates: ChatTemplates, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
    ) -> str:
        """What ``templates.render`` returns of a conversation.

        Args:
            templates: the model's.
            messages, variables: those of its ``render``; JSON, all of them.

        Raises:
            RequestError: the template cannot be read, refuses the messages, or makes too much of them.
            ApiError: 504 where it takes too long, 503 where the server shuts down.
        """
        # The process ends itself a second later, where this one has been killed and cannot.
        seconds = math.ceil(self._timeout) + 1
        asked = {"sources": templates.sources, "special": templates.special, "messages": messages}
        message = to_message({**asked, "variables": variables, "seconds": seconds})
        process, expired, reply = self._take(), Event(), None

        def expire() -> None:
            expired.set()
            process.kill()

        timer = Timer(self._timeout, expire)
        timer.daemon = True
        timer.start()
        try:
            reply = _ask(process, message)
        except (OSError, ValueError) as error:
            if expired.is_set():
                text = f"the model's chat template has taken more than {self._timeout:g} s with this conversation"
                raise ApiError(504, text, "timeout") from error
            if self._closed:
                raise shutting_down_error() from error
            text = "the model's chat template has ended the process that renders it"
            raise RequestError(f"{text} (exit code {process.wait()})") from error
        finally:
            timer.cancel()
            self._give_back(process, reusable=reply is not None and "spent" not in reply)
        if "error" in reply:
            raise RequestError(reply["error"])
        return str(reply["text"])

    def start(self) -> None:
        """Start a process, so that the first conversation does not wait for it."""
        self._give_back(self._take(), reusable=True)

    def close(self) -> None:
        """End all processes. Renderings under way fail, and so do later ones."""
        with self._changed:
            self._closed = True
            for process in self._busy:
                process.kill()
            while self._idle:
                _end(self._idle.pop())

    def _take(self) -> Process:
        with self._changed:
            if self._closed:
                raise shutting_down_error()
            while self._idle:
                process = self._idle.pop()
                # One may have been killed meanwhile, as where the system is out of memory.
                if process.poll() is None:
                    break
                _end(process)
            else:
                process = _start()
            self._busy.add(process)
            return process

    def _give_back(self, process: Process, reusable: bool) -> None:
        with self._changed:
            self._busy.remove(process)
            if reusable and len(self._idle) < MAX_IDLE and not self._closed:
                self._idle.append(process)
                return
        _end(process)


def _start() -> Process:
    return subprocess.Popen(
        [sys.executable, "-m", "jllm_runtime.server.template_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        # Ctrl-C at the terminal is for the server alone.
        start_new_session=True,
    )


def _ask(process: Process, message: bytes) -> dict[str, Any]:
    """The process's reply to a message.

    Raises:
        OSError, ValueError: the process has ended.
    """
    stdin, stdout = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)  # they are pipes
    stdin.write(message)
    stdin.flush()
    reply: dict[str, Any] = json.loads(read_message(stdout) or b"")
    return reply


def _end(process: Process) -> None:
    process.kill()
    process.communicate()
