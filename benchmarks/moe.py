"""What a mixture costs by its number of experts: 128 of them beside 8, at 8 a token, and a dense layer as wide as 8.

    hatch run demo:python benchmarks/moe.py [--tokens 64 256 512 1024 2048] [--hidden 1024] [--width 384] [--json FILE]

Each token is multiplied by the same number of weights in all three. What may differ is that more experts are more
weights to read, which many tokens share and few do not. The default sizes are half of Qwen3-30B-A3B's each way.
One process, one layer, float32, random weights; the three take turns (A B C A B C), after two turns that do not count.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
from jllm_core import MLPLayer, MoEConfig, MoELayer
from jllm_core.ops.mlp import mlp
from jllm_core.ops.moe import moe

ACTIVE, FEW, MANY = 8, 8, 128
LIMIT = 1.5


def matrix(seed: int, *shape: int) -> jax.Array:
    """Random weights that keep the size of what they are multiplied with."""
    return jax.random.normal(jax.random.key(seed), shape) * shape[-2] ** -0.5


def mixture(experts: int, hidden: int, width: int) -> Callable[[jax.Array], jax.Array]:
    """A layer of so many experts, compiled for each number of tokens."""
    layer = MoELayer(
        w_router=matrix(0, hidden, experts),
        we_gate=matrix(1, experts, hidden, width),
        we_up=matrix(2, experts, hidden, width),
        we_down=matrix(3, experts, width, hidden),
    )
    config = MoEConfig(num_experts=experts, experts_per_token=ACTIVE, intermediate_size=width)
    run = jax.jit(moe, static_argnums=2)
    return lambda x: run(x, layer, config)


def dense(hidden: int, width: int) -> Callable[[jax.Array], jax.Array]:
    """A feed-forward layer of this width."""
    layer = MLPLayer(matrix(1, hidden, width), matrix(2, hidden, width), matrix(3, width, hidden))
    run = jax.jit(mlp)
    return lambda x: run(x, layer)


def seconds(layer: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    start = time.perf_counter()
    jax.block_until_ready(layer(x))
    return time.perf_counter() - start


def measure(layers: dict[str, Callable[[jax.Array], jax.Array]], x: jax.Array, runs: int) -> dict[str, list[float]]:
    """Seconds of each run of each layer, taking turns."""
    turns = [{name: seconds(layer, x) for name, layer in layers.items()} for _ in range(runs + 2)]
    return {name: [turn[name] for turn in turns[2:]] for name in layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 512, 1024, 2048], help="tokens of a prefill")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the residual stream")
    parser.add_argument("--width", type=int, default=384, help="width of one expert")
    parser.add_argument("--runs", type=int, default=7, help="counted runs of each")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    arguments = parser.parse_args()
    hidden, width = arguments.hidden, arguments.width
    few, many, plain = f"{FEW} experts", f"{MANY} experts", "dense"
    layers = {
        few: mixture(FEW, hidden, width),
        many: mixture(MANY, hidden, width),
        plain: dense(hidden, ACTIVE * width),
    }
    machine = f"{jax.default_backend()}, {platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}"
    print(f"{machine}; hidden {hidden}, expert width {width}, {ACTIVE} experts a token; medians of {arguments.runs}")
    print(f"{'tokens':>7} {few + ' ms':>13} {many + ' ms':>15} {plain + ' ms':>10} {MANY}/{FEW:<6}")
    results = []
    for tokens in arguments.tokens:
        times = measure(layers, jax.random.normal(jax.random.key(tokens), (1, tokens, hidden)), arguments.runs)
        medians = {name: statistics.median(of) for name, of in times.items()}
        # Pair by pair, so that a machine that slows down for a while slows both.
        ratio = statistics.median(b / a for a, b in zip(times[few], times[many], strict=True))
        columns = [f"{1e3 * medians[name]:{size}.1f}" for name, size in ((few, 13), (many, 15), (plain, 10))]
        print(f"{tokens:7} {' '.join(columns)} {ratio:.2f}x{'' if ratio < LIMIT else f'  (not below {LIMIT}x)'}")
        results.append({"tokens": tokens, "seconds": times, "ratio": ratio})
    if arguments.json:
        report = {"machine": machine, "hidden": hidden, "width": width, "active": ACTIVE, "results": results}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
