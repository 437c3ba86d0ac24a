"""From process start to the first token: this project beside the same script written with transformers.

    hatch run oracle:python benchmarks/first_token.py [--runs 5] [--json FILE]

Both load SmolLM2-135M-Instruct in float32 from a folder of their own format, put the same question through the chat
template and leave with the first token. Each run is a new process; the two take turns (A B A B), after one run of each
that is not counted and leaves JLLM's compile cache warm. Both must give the same token.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from smollm2 import gguf

QUESTION = "What is the capital of France?"

JLLM = """
import sys
from jllm_runtime import SamplingParams, load_model, stream_generate
from jllm_runtime.compile_cache import use_compile_cache
use_compile_cache()
model = load_model(sys.argv[1])
prompt = model.tokenizer.encode_chat([{"role": "user", "content": sys.argv[2]}])
print(next(stream_generate(model, prompt, SamplingParams(max_tokens=64))).token_ids[0])
"""

TRANSFORMERS = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
chat = [{"role": "user", "content": sys.argv[2]}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(int(model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1]))
"""


def prepare(folder: Path) -> dict[str, list[str]]:
    """Write the model in both formats; return each contender's command."""
    import torch
    import transformers
    from jllm_convert import convert

    file = gguf()
    convert(file, folder / "jllm")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = transformers.LlamaConfig(
        **{name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    )
    plain = transformers.LlamaForCausalLM(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "hf" / name).write_bytes((folder / "jllm" / name).read_bytes())
    return {
        "jllm": [sys.executable, "-c", JLLM, str(folder / "jllm"), QUESTION],
        "transformers": [sys.executable, "-c", TRANSFORMERS, str(folder / "hf"), QUESTION],
    }


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, str]:
    """Seconds from the start of the process to its end, and the token it printed."""
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - start
    if result.returncode:
        sys.exit(f"a run failed:\n{result.stderr}")
    return seconds, result.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "JLLM_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        commands = prepare(folder)
        tokens = {timed(command, environment)[1] for command in commands.values()}
        seconds: dict[str, list[float]] = {contender: [] for contender in commands}
        for _ in range(arguments.runs):
            for contender, command in commands.items():
                took, token = timed(command, environment)
                seconds[contender].append(took)
                tokens.add(token)
        if len(tokens) != 1:
            sys.exit(f"the contenders do not agree on the first token: {tokens}")

    versions = {package: importlib.metadata.version(package) for package in ("jax", "transformers", "torch")}
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}")
    for contender, runs in seconds.items():
        low, middle, high = min(runs), statistics.median(runs), max(runs)
        print(f"{contender:>13}: median {middle:.2f} s  (min {low:.2f}, max {high:.2f}, {len(runs)} runs)")
    ratios = [ours / theirs for ours, theirs in zip(seconds["jllm"], seconds["transformers"], strict=True)]
    print(f"jllm / transformers, pair by pair: median {statistics.median(ratios):.2f}x")
    if arguments.json:
        report = {"versions": versions, "cores": os.cpu_count(), "seconds": seconds, "ratios": ratios}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
