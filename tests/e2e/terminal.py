"""A command on a terminal of its own, as a person has it."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

ENTER = "\r"
ASKS, ASKED = "[asks]", "[asked]"
"""What stands on the screen where the chat begins and ends to take a message: it switches bracketed paste."""


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *arguments: object, cache: Path, term: str = "xterm", columns: int = 80) -> None:
        self._main, child = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jllm_runtime.cli", *map(str, arguments)],
            stdin=child,
            stdout=child,
            stderr=child,
            env={**os.environ, "JLLM_CACHE": str(cache), "TERM": term, "COLUMNS": str(columns)}
            | {"PROMPT_TOOLKIT_NO_CPR": "1"},  # nobody here can say where the cursor is
            start_new_session=True,
        )
        os.close(child)
        self._written = ""
        self.screen = ""
        self._seen = 0

    def wait_for(self, text: str, timeout: float = 240) -> str:
        """Read on until the text comes, after whatever was waited for before; what came before it."""
        end = time.monotonic() + timeout
        while text not in self.screen[self._seen :]:
            assert time.monotonic() < end, f"no {text!r} on the screen:\n{self.screen}"
            if select.select([self._main], [], [], 0.2)[0]:
                self._written += os.read(self._main, 4096).decode(errors="replace")
                self.screen = plain(self._written)
        before, self._seen = self._seen, self.screen.index(text, self._seen) + len(text)
        return self.screen[before : self._seen]

    def type(self, text: str) -> None:
        os.write(self._main, text.encode(errors="surrogateescape"))

    def say(self, text: str) -> None:
        """Type a message once the chat asks for one."""
        self.wait_for(ASKS)
        self.type(f"{text}{ENTER}")
        self.wait_for(ASKED)

    def interrupt(self) -> None:
        """Ctrl-C, as the kernel delivers it."""
        os.kill(self._process.pid, signal.SIGINT)

    def close(self) -> int:
        try:
            return self._process.wait(timeout=60)
        finally:
            self.kill()

    def kill(self) -> None:
        """End it in any case, once or again."""
        if self._main >= 0:
            self._process.kill()
            self._process.wait()
            os.close(self._main)
            self._main = -1


def plain(text: str) -> str:
    """A text without carriage returns and escape sequences, the last of which may not have come in whole."""
    text = text.replace("\033[?2004h", ASKS).replace("\033[?2004l", ASKED)
    return re.sub(r"\x1b(\[[0-?]*[ -/]*([@-~]|$)|[()][A-Z0-9]|[78=>]|$)", "", text).replace("\r", "")
