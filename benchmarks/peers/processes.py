"""A contender in a process of its own: asked in JSON, answering in JSON, or in words whose first is timed."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.cases import JLLM, LIMITS, LLAMA, TRANSFORMERS, Contender

SCRIPTS = {
    JLLM: "benchmarks.peers.with_jllm",
    LLAMA: "benchmarks.peers.with_llama_cpp",
    TRANSFORMERS: "benchmarks.peers.with_transformers",
    LIMITS: "benchmarks.peers.limits",
}


@dataclass(frozen=True)
class Start:
    """How a process began to answer.

    Attributes:
        first_s: from its start to its first word.
        text: all that it said.
    """

    first_s: float
    text: str


def ask(contender: Contender, task: dict[str, Any], threads: int, **environment: str) -> dict[str, Any]:
    """Give a contender's script a task; what it answers.

    Raises:
        SystemExit: the script failed; the message is its own.
    """
    process = _start([sys.executable, "-m", SCRIPTS[contender.peer]], threads, environment, subprocess.PIPE)
    out, err = process.communicate(json.dumps(task))
    if process.returncode:
        raise SystemExit(f"{contender.name} failed with {process.returncode}:\n{err}")
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    return answer


def ask_in_words(contender: Contender, task: dict[str, Any], threads: int, **environment: str) -> Start:
    """Give a contender a question, by this project's command or by the contender's script, and time its first word.

    Raises:
        SystemExit: it failed; the message is its own.
    """
    command = [sys.executable, "-m", SCRIPTS[contender.peer]]
    if contender.peer == JLLM:
        command = [sys.executable, "-m", "jllm_runtime.cli", "generate", task["weights"], "--prompt", task["question"]]
        command += ["--max-tokens", str(task["tokens"])]
    start = time.perf_counter()
    process = _start(command, threads, environment, subprocess.PIPE)
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("a process without pipes")
    process.stdin.write(json.dumps(task))
    process.stdin.close()
    process.stdin = None
    first = process.stdout.read(1)
    first_s = time.perf_counter() - start
    rest, err = process.communicate()
    if process.returncode:
        raise SystemExit(f"{contender.name} failed with {process.returncode}:\n{err}")
    return Start(first_s, first + rest)


def _start(command: list[str], threads: int, environment: dict[str, str], pipe: int) -> "subprocess.Popen[str]":
    """A process that sees so many cores and no model hub."""

    def narrow() -> None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])

    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=variables, preexec_fn=narrow)
