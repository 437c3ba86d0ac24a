"""Time to the first token of a prompt that the engine has seen, beside a new one, for a hybrid of delta nets on a CPU.

    hatch run oracle:python -m benchmarks.seen_prefix [--types int8-bfloat16 bfloat16] [--tokens 1000] [--json FILE]

The random model of ``benchmarks/hybrid.py``. Each round has a new prompt: it is asked for, then asked for again, and
then with 20 more tokens behind it, as in a chat's next turn. Medians; the first round, which compiles, does not count.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
from jllm_runtime import Engine, SamplingParams, load_model

from benchmarks.hybrid import FOLDER, TYPES, VOCABULARY, write_random
from benchmarks.peers.cases import JLLM, Contender
from benchmarks.peers.models import Model

ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
KINDS = ("new", "seen", "20 tokens behind it")


def first_token(engine: Engine, prompt: list[int], reused: int) -> tuple[float, int]:
    """Seconds to the first token, and the token; so many tokens of the prompt must have been reused."""
    start = time.perf_counter()
    output = engine.submit(prompt, ONE_TOKEN).result()
    seconds = time.perf_counter() - start
    if output.reused_tokens != reused:
        raise SystemExit(f"{output.reused_tokens} tokens were reused, not {reused}")
    return seconds, output.token_ids[0]


def measure(weights: Path, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each kind, one a round."""
    rng, seconds = np.random.default_rng(0), {kind: list[float]() for kind in KINDS}
    with Engine(load_model(weights)) as engine:
        size = engine.config.page_size
        for number in range(rounds + 1):
            prompt, more = (rng.integers(0, VOCABULARY, length).tolist() for length in (tokens, 20))
            reused = (tokens - 1) // size * size
            took = [
                first_token(engine, *asked) for asked in ((prompt, 0), (prompt, reused), ([*prompt, *more], reused))
            ]
            if took[0][1] != took[1][1]:
                raise SystemExit("the prompt that was seen has another first token")
            if number:
                for kind, (each, _) in zip(KINDS, took, strict=True):
                    seconds[kind].append(each)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["int8-bfloat16", "bfloat16"], choices=TYPES)
    parser.add_argument("--tokens", type=int, default=1000, help="of the prompts")
    parser.add_argument("--rounds", type=int, default=3, help="counted prompts of each type")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where weights are kept: %(default)s")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    arguments = parser.parse_args()
    model = Model("qwen3.5-0.8b", arguments.folder, has_tokenizer=False, write=write_random, vocabulary=VOCABULARY)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jllm-runtime")}
    print(f"{os.cpu_count()} cores, {versions}; prompts of {arguments.tokens} tokens; medians of {arguments.rounds}")
    records = []
    for precision in arguments.types:
        contender = Contender(JLLM, precision)
        model.prepare(contender, os.cpu_count() or 1)
        seconds = measure(model.weights(contender), arguments.tokens, arguments.rounds)
        new = statistics.median(seconds["new"])
        for kind, each in seconds.items():
            print(f"{precision:>14} {kind:>20} {statistics.median(each):6.2f} s {statistics.median(each) / new:5.2f}x")
        records.append({"type": precision, "seconds": seconds})
    if arguments.json:
        report = {"versions": versions, "tokens": arguments.tokens, "results": records}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
