"""What drawing a token costs: a step of decode with each kind of sampling, beside the greedy step.

    hatch run oracle:python benchmarks/sampling.py [--quantize int8 int4] [--batches 1 4] [--json FILE]

A model of the shape of Qwen3-0.6B with random weights of these bits and activations of bfloat16; its vocabulary has
151,936 tokens. Each kind takes a turn of some steps, all in one program (A B C A B C), after one turn that does not
count. Medians; the share is the median of what each turn takes longer than the greedy one beside it. The logits of
random weights are nearly even, which is the longest search for top-p.
"""

import argparse
import json
import os
import platform
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
from decoding import decoded, empty
from jllm_core import Quantization, ShardingRules, init_weights
from jllm_runtime import Model, SamplingParams, make_mesh
from jllm_runtime.planner.catalogue import find_published
from jllm_runtime.programs import contiguous_batch

CONTEXT = 128
QUANTIZATIONS = {"int8": Quantization(8), "int4": Quantization(4, 32)}
KINDS = {
    "greedy": SamplingParams(seed=0),
    "temperature": SamplingParams(temperature=0.8, seed=0),
    "top-k 50": SamplingParams(temperature=0.8, top_k=50, seed=0),
    "top-p 0.9": SamplingParams(temperature=0.8, top_p=0.9, seed=0),
    "both, and min-p": SamplingParams(temperature=0.8, top_k=50, top_p=0.9, min_p=0.05, seed=0),
}


def random_model(name: str, quantization: Quantization) -> Model:
    """A published shape, with random weights."""
    published = find_published(name)
    if published is None:
        raise SystemExit(f"no published model is called {name}")
    mesh = make_mesh(devices=jax.devices()[:1])
    key = jax.random.key(0)
    weights = init_weights(published.config, key, jnp.bfloat16, mesh, quantization=quantization)
    return Model(published.config, weights, mesh, ShardingRules())


def measure(model: Model, batch: int, runs: int, count: int) -> list[dict[str, object]]:
    """All kinds by turns."""
    cache = empty(model, batch, CONTEXT + count)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(runs + 1):
        for kind, params in KINDS.items():
            cache, _, step = decoded(model, cache, CONTEXT, count, params)
            seconds[kind].append(step)
    greedy = seconds["greedy"][1:]
    return [
        {
            "batch": batch,
            "kind": kind,
            "milliseconds": 1e3 * statistics.median(took[1:]),
            "share": statistics.median((a - b) / a for a, b in zip(took[1:], greedy, strict=True)),
        }
        for kind, took in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-0.6b", help="a published shape, as `jllm plan` knows them")
    parser.add_argument("--quantize", nargs="+", default=list(QUANTIZATIONS), choices=QUANTIZATIONS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=16, help=f"of a turn, at most {contiguous_batch.DECODE_BLOCK}")
    parser.add_argument("--runs", type=int, default=7, help="counted turns of each")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    arguments = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}"
    print(f"{machine}; the shape of {arguments.model}; milliseconds a step, medians")
    results = []
    for name in arguments.quantize:
        model = random_model(arguments.model, QUANTIZATIONS[name])
        for batch in arguments.batches:
            for found in measure(model, batch, arguments.runs, arguments.tokens):
                print(
                    f"{name:>5} weights, {batch:2} rows, {found['kind']:>16}: {found['milliseconds']:7.2f} ms, "
                    f"{found['share']:6.1%} of the step",
                    flush=True,
                )
                results.append({"weights": name, **found})
    if arguments.json:
        report = {"machine": machine, "model": arguments.model, "results": results}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
