"""Child processes that render chat templates, and can be killed.

A template comes with the model, from strangers. The sandbox keeps it from files and from the network, not from looping
for ever or from making a text of a billion characters.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from threading import Event, Lock, Thread, local
from typing import IO, Any, TypeVar, cast

import anyio
import anyio.to_thread

from jllm_runtime.errors import RequestError
from jllm_runtime.named_templates import ChatTemplates
from jllm_runtime.server.errors import ApiError, shutting_down_error
from jllm_runtime.server.template_worker import read_message, to_message

RENDER_TIMEOUT = 10
"""Seconds that a rendering may take. Of ordinary templates the longest conversations take some tenths of a second."""

MAX_PROCESSES = 16
"""Most renderings at a time. Further ones wait: where a template loops on some conversations, there are others."""

CROWDED_TIMEOUT = 2
"""Seconds that a rendering may take while others wait for its process."""

WATCH_INTERVAL = 0.1
"""Seconds between two looks at whether others wait."""

MAX_IDLE = 2
"""Processes that are kept for the next conversations. Each takes some 20 MB."""

Process = subprocess.Popen[bytes]
Result = TypeVar("Result")


class _Caller:
    """One who waits for renderings. Once they have gone, the processes that work for them end."""

    def __init__(self) -> None:
        self._process: Process | None = None
        self._gone = False
        self._changed = Lock()

    def uses(self, process: Process | None) -> None:
        """Say which process works for the caller now."""
        with self._changed:
            self._process = process
            if process is not None and self._gone:
                process.kill()

    def leave(self) -> None:
        """End what works for the caller, now and later."""
        with self._changed:
            self._gone = True
            if self._process is not None:
                self._process.kill()


class TemplateProcesses:
    """Child processes that render chat templates, for any threads.

    Args:
        timeout: seconds that a rendering may take.
    """

    def __init__(self, timeout: float = RENDER_TIMEOUT) -> None:
        # Other threads than those that do the rest of a request: a template that loops holds up conversations only.
        self._threads = anyio.CapacityLimiter(MAX_PROCESSES)
        self._callers = local()
        self._timeout = timeout
        self._idle: list[Process] = []
        self._busy: set[Process] = set()
        self._ending_for_others = 0
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
        process, reply = self._take(), None
        caller: _Caller = getattr(self._callers, "current", None) or _Caller()
        watch = _Watch(process, self._timeout, self._makes_room)
        watch.start()
        try:
            caller.uses(process)
            reply = _ask(process, message)
        except (OSError, ValueError) as error:
            if watch.expired is not None:
                text = f"the model's chat template has taken more than {watch.expired} with this conversation"
                raise ApiError(504, text, "timeout") from error
            if self._closed:
                raise shutting_down_error() from error
            text = "the model's chat template has ended the process that renders it"
            raise RequestError(f"{text} (exit code {process.wait()})") from error
        finally:
            watch.done.set()
            watch.join()
            caller.uses(None)
            self._give_back(process, reusable=reply is not None and "spent" not in reply, made_room=watch.made_room)
        if "error" in reply:
            raise RequestError(reply["error"])
        return str(reply["text"])

    async def on_thread(self, work: Callable[[], Result]) -> Result:
        """Call what renders, on a thread. Where this is cancelled, the renderings end, too."""
        caller = _Caller()

        def call() -> Result:
            self._callers.current = caller
            try:
                return work()
            finally:
                del self._callers.current

        try:
            return await anyio.to_thread.run_sync(call, limiter=self._threads, abandon_on_cancel=True)
        finally:
            caller.leave()

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

    def _makes_room(self) -> bool:
        """Whether a rendering is to end for another that waits: one for each, however many there are."""
        with self._changed:
            if self._threads.statistics().tasks_waiting <= self._ending_for_others:
                return False
            self._ending_for_others += 1
            return True

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

    def _give_back(self, process: Process, reusable: bool, made_room: bool = False) -> None:
        with self._changed:
            self._busy.remove(process)
            self._ending_for_others -= made_room
            if reusable and len(self._idle) < MAX_IDLE and not self._closed:
                self._idle.append(process)
                return
        _end(process)


class _Watch(Thread):
    """Kills a process that takes too long.

    Attributes:
        expired: how long it has taken, in words, where it has been killed.
        made_room: whether that was for another.
        done: set when it need not be watched any more.

    Args:
        process: the process.
        timeout: seconds that it may take.
        makes_room: tells whether it is to end for another that waits.
    """

    def __init__(self, process: Process, timeout: float, makes_room: Callable[[], bool]) -> None:
        super().__init__(daemon=True)
        self.expired: str | None = None
        self.made_room = False
        self.done = Event()
        self._process = process
        self._timeout = timeout
        self._makes_room = makes_room

    def run(self) -> None:
        """Watch until the process is done, or killed."""
        end = time.monotonic() + self._timeout
        wait, expired = min(CROWDED_TIMEOUT, self._timeout), f"{self._timeout:g} s"
        while not self.done.wait(wait):
            left = end - time.monotonic()
            if left > 0 and self._makes_room():
                self.made_room = True
                left, expired = 0, f"{CROWDED_TIMEOUT} s, while others wait,"
            if left <= 0:
                self.expired = expired
                self._process.kill()
                return
            wait = min(WATCH_INTERVAL, left)


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
