"""What a command says on a terminal while somebody waits, on the real model."""

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

STATUS = re.compile(r"\0337\033\[\?7l\033\[K(.*?)\0338\033\[\?7h")


@pytest.fixture
def on_a_terminal() -> Callable[..., str]:
    """Runs a command on a terminal, and returns all that was written there."""

    def run(*command: object, **environment: str) -> str:
        main, child = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdin=child,
            stdout=child,
            stderr=child,
            env={**os.environ, "TERM": "xterm", **environment},
        )
        os.close(child)
        written = b""
        try:
            while piece := os.read(main, 4096):
                written += piece
        except OSError:  # on Linux, the end of a terminal that nobody writes to any more
            pass
        finally:
            os.close(main)
        assert process.wait(60) == 0, written
        return written.decode().replace("\r\n", "\n")

    return run


def test_loading_and_compiling_are_shown_and_leave_the_answer_alone(on_a_terminal, smollm2_folder: Path, tmp_path):
    written = on_a_terminal(
        *("-m", "jllm_runtime.cli", "generate", smollm2_folder, "--prompt", "What is the capital of France?"),
        JLLM_CACHE=str(tmp_path),
    )
    shown = STATUS.findall(written)
    assert shown[0] == f"loading {smollm2_folder} ..."
    assert f"loading {smollm2_folder.name} ..." in shown
    assert "compiling 1 program, kept for next time ..." in shown
    # The line leaves the cursor where it is, and is erased from there.
    left = STATUS.sub("", written).replace("\033[K", "")
    first, left = left.split("\n", 1)
    assert first.startswith(f"{smollm2_folder} on 1 x cpu, float32")
    assert re.fullmatch(r"The capital of France is Paris\.\n\[.*load .*, stop\]\n", left), left
    assert re.search(r"\033\[KThe", written)


def test_the_library_keeps_what_it_compiles(on_a_terminal, smollm2_folder: Path, tmp_path):
    code = (
        "import jax, jax.monitoring\n"
        "from jllm_runtime import generate, load_model, SamplingParams\n"
        "compiled, hits = [], []\n"
        "jax.monitoring.register_event_listener(lambda event, **_: hits.append(1) if 'cache_hits' in event else None)\n"
        "jax.monitoring.register_event_duration_secs_listener(\n"
        "    lambda event, _, **__: compiled.append(1) if 'backend_compile' in event else None\n"
        ")\n"
        f"model = load_model({str(smollm2_folder)!r}, progress=False)\n"
        "generate(model, 'Once upon a time', SamplingParams(max_tokens=4), progress=False)\n"
        "print(len(compiled) > 3, len(compiled) - len(hits))"
    )
    first, second = (on_a_terminal("-c", code, JLLM_CACHE=str(tmp_path)) for _ in range(2))
    assert first.startswith("True ")
    assert int(first.split()[1]) > 0
    assert second == "True 0\n"
