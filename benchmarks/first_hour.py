"""What one waits for in the first hour: a first token from a GGUF file, turn 15 of a chat, a server's first answer.

    hatch run oracle:python benchmarks/first_hour.py [--against CHECKOUT [--against-env NAME=VALUE]] [--runs 3]

Every figure is of SmolLM2-135M-Instruct, in processes of their own with a cache folder of their own. With --against the
same is run with the packages of another checkout of this repository, in turns (A B A B); --against-env changes its
environment, for example JLLM_KERNELS=xla where its documented install had no kernels. Medians.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from smollm2 import gguf

QUESTION = "What is the capital of France?"
TURNS = 15

CHAT = """
import sys, time
from jllm_runtime import SamplingParams, load_model
from jllm_runtime.chat.local import ChatSession
from jllm_runtime.compile_cache import use_compile_cache
use_compile_cache()
session = ChatSession(load_model(sys.argv[1]), SamplingParams(max_tokens=96, ignore_eos=True))
for turn in range(int(sys.argv[2])):
    start = time.perf_counter()
    pieces = session.send(f"Tell me fact number {turn + 1} about the oceans, in some detail, please.")
    next(pieces)
    first = time.perf_counter() - start
    for _ in pieces:
        pass
print(first)
"""


def environment(checkout: Path, cache: Path, changes: list[str]) -> dict[str, str]:
    """The environment of one side: its packages first, its own cache."""
    packages = os.pathsep.join(str(checkout / "packages" / name / "src") for name in PACKAGES)
    own = dict(change.split("=", 1) for change in changes)
    return {**os.environ, "PYTHONPATH": packages, "JLLM_CACHE": str(cache), **own}


PACKAGES = ("jllm-core", "jllm-convert", "jllm-runtime")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "jllm_runtime.cli", *map(str, arguments)]


def first_output(variables: dict[str, str]) -> float:
    """Seconds from the start of `jllm generate X.gguf` to the first text of its answer."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command("generate", gguf(), "--prompt", QUESTION, "--max-tokens", 16),
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    seconds = time.perf_counter() - start
    process.communicate()
    if process.returncode:
        sys.exit("jllm generate failed")
    return seconds


def decode_rate(variables: dict[str, str]) -> float:
    """Tokens per second of a long answer, as `jllm generate --json` tells."""
    options = ("--raw", "--prompt", "Once upon a time", "--max-tokens", 128, "--json")
    result = subprocess.run(command("generate", gguf(), *options), env=variables, capture_output=True, check=True)
    return float(json.loads(result.stdout)["timings"]["decode_tokens_per_s"])


def server_answer(variables: dict[str, str]) -> float:
    """Seconds from the start of `jllm serve` to the end of the first answer of 8 tokens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8, "model": "smollm2", "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    start = time.perf_counter()
    serve = command("serve", gguf(), "--port", port, "--served-model-name", "smollm2")
    process = subprocess.Popen(serve, env=variables, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            try:
                with urllib.request.urlopen(request, timeout=300) as response:
                    response.read()
                return time.perf_counter() - start
            except urllib.error.URLError:
                time.sleep(0.02)
        sys.exit("jllm serve ended")
    finally:
        process.terminate()
        process.wait()


def chat_turn(variables: dict[str, str]) -> float:
    """Seconds to the first word of the last of TURNS turns."""
    source = next((Path(variables["JLLM_CACHE"]) / "converted").glob("*/manifest.json")).parent
    arguments = [sys.executable, "-c", CHAT, str(source), str(TURNS)]
    return float(subprocess.run(arguments, env=variables, capture_output=True, text=True, check=True).stdout)


FIGURES: tuple[tuple[str, str, Callable[[dict[str, str]], float]], ...] = (
    ("`jllm generate X.gguf`, first token, nothing cached", "s", first_output),
    ("`jllm generate X.gguf`, first token, again", "s", first_output),
    ("`jllm generate X.gguf`, decode", "tokens/s", decode_rate),
    ("`jllm serve X.gguf`, first answer, its programs not cached", "s", server_answer),
    ("`jllm serve X.gguf`, first answer, again", "s", server_answer),
    (f"`jllm chat`, first word of turn {TURNS}", "s", chat_turn),
)
"""In this order: a figure finds in the cache what the earlier ones have left."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout of this repository")
    parser.add_argument("--against-env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    sides = {"this": (Path(__file__).parents[1], [])}
    if options.against is not None:
        sides["against"] = (options.against.resolve(), options.against_env)
    found: dict[str, dict[str, list[float]]] = {name: {side: [] for side in sides} for name, _, _ in FIGURES}
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            for name, unit, measure in FIGURES:
                for side, (checkout, changes) in sides.items():
                    value = measure(environment(checkout, Path(folder) / side, changes))
                    found[name][side].append(value)
                    print(f"{side}: {name}: {value:.2f} {unit}", file=sys.stderr)
    medians = {
        name: {side: statistics.median(values) for side, values in of_sides.items()} for name, of_sides in found.items()
    }
    print(f"| SmolLM2-135M-Instruct, medians of {options.runs} | " + " | ".join(reversed(sides)) + " |")
    print("|---|" + "---|" * len(sides))
    for name, unit, _ in FIGURES:
        cells = " | ".join(f"{medians[name][side]:.2f} {unit}" for side in reversed(sides))
        print(f"| {name} | {cells} |")
    if options.json is not None:
        options.json.write_text(json.dumps({"runs": found, "medians": medians}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
