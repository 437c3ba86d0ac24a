"""Decoding on a CPU by the kernels of jllm-core, beside XLA's own operations.

    hatch run oracle:python benchmarks/decode.py [--types float32 bfloat16 int8 int4] [--batches 1 16] [--json FILE]

SmolLM2-135M, each row with a context of so many tokens, decoded greedily; both must choose the same tokens, but for
bfloat16, which the kernels round less. The two take turns (A B A B), after one turn that does not count. With each turn
256 MiB are read by all threads, for the limit: a step has to read the weights and the filled part of the cache once.
Medians; the ratio is the median of the turns' own.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from decoding import decoded, empty, filled
from jllm_core.backends.base import XLA
from jllm_core.backends.cpu import ffi
from jllm_core.backends.cpu.llvm_builder import F32, Code, Module, Value, Variable, vector
from jllm_core.backends.cpu.threads import Frame, Launch, write_kernel
from jllm_core.backends.cpu.vector_ops import zeros
from jllm_runtime import Model, load_model
from jllm_runtime.cache.contiguous import PREFILL_CHUNK, ContiguousCache
from jllm_runtime.programs import contiguous_batch
from smollm2 import TYPES, converted

MEMORY = 256 * 2**20
BYTES_PER_TASK = 2**18


@dataclass(frozen=True)
class Read:
    """A kernel that reads ``x`` and adds it up, in tasks for all threads."""

    @property
    def operands(self) -> list[str]:
        return ["x"]

    def write(self, module: Module) -> None:
        def prepare(frame: Frame, launch: Launch) -> None:
            launch.set("x", frame.argument(0).data)
            launch.set("y", frame.result(0).data)
            launch.add_phase(frame.argument(0).dim(0) * 4 // BYTES_PER_TASK)

        def read(code: Code, launch: Launch, task: Value) -> None:
            sums = [Variable(code, zeros(code)) for _ in range(8)]
            with code.loop(0, BYTES_PER_TASK, 64 * len(sums)) as place:
                for n, total in enumerate(sums):
                    total.value += code.load(launch["x"] + task * BYTES_PER_TASK + place + 64 * n, vector(F32))
            for total in sums:
                code.store(launch["y"] + 64 * task, total.value)

        write_kernel(module, prepare, [read])


def bandwidth() -> Callable[[], float]:
    """A function that reads memory and says how many bytes a second."""
    memory = jnp.zeros(MEMORY // 4, jnp.float32)
    read = jax.jit(lambda x: ffi.call(Read(), {"x": x}, [(MEMORY // BYTES_PER_TASK, 16)])[0])
    read(memory).block_until_ready()

    def measure() -> float:
        start = time.perf_counter()
        read(memory).block_until_ready()
        return MEMORY / (time.perf_counter() - start)

    return measure


@dataclass
class Side:
    """One of the two: a cache that is filled up to the context, and seconds a step."""

    cache: ContiguousCache
    tokens: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def bytes_of_step(model: Model, batch: int, context: int) -> int:
    """What a step cannot but read."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.weights))
    config, element = model.config, model.weights.dtype.itemsize
    return weights + 2 * config.num_layers * batch * config.num_kv_heads * config.head_dim * context * element


def measure(
    model: Model, batch: int, context: int, runs: int, count: int, read: Callable[[], float]
) -> dict[str, object]:
    """Both sides by turns."""
    xla, kernels = (
        Side(filled(model, empty(model, batch, context + count, backend=backend), context))
        for backend in (XLA(model.placement), model.backend)
    )
    speeds: list[float] = []
    for _ in range(runs + 1):
        for side in (xla, kernels):
            side.cache, side.tokens, step = decoded(model, side.cache, context, count)
            side.seconds.append(step)
        speeds.append(read())
    ratios = [a / b for a, b in zip(xla.seconds[1:], kernels.seconds[1:], strict=True)]
    step, speed = statistics.median(kernels.seconds[1:]), statistics.median(speeds[1:])
    return {
        "batch": batch,
        "context": context,
        "xla_tokens_per_s": batch / statistics.median(xla.seconds[1:]),
        "kernels_tokens_per_s": batch / step,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "gigabytes_per_s": bytes_of_step(model, batch, context) / step / 1e9,
        "read_gigabytes_per_s": speed / 1e9,
        "share_of_reading": bytes_of_step(model, batch, context) / step / speed,
        "same_tokens": float(np.mean(np.array(xla.tokens) == np.array(kernels.tokens))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=TYPES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--context", type=int, default=512, help=f"tokens before, a multiple of {PREFILL_CHUNK}")
    parser.add_argument("--tokens", type=int, default=16, help=f"of a turn, at most {contiguous_batch.DECODE_BLOCK}")
    parser.add_argument("--runs", type=int, default=7, help="counted turns of each")
    parser.add_argument("--models", type=Path, help="where converted models are kept; a temporary folder if not given")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    arguments = parser.parse_args()
    read = bandwidth()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}"
    print(f"{machine}; SmolLM2-135M, context {arguments.context}; tokens a second of all rows, medians")
    print(
        f"{'weights':>9} {'batch':>5} {'XLA':>7} {'kernels':>7} {'ratio':>6} {'GB/s':>6} {'limit':>6} share same tokens"
    )
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.types:
            model = load_model(converted(name, arguments.models or Path(temporary)))
            for batch in arguments.batches:
                found = measure(model, batch, arguments.context, arguments.runs, arguments.tokens, read)
                print(
                    f"{name:>9} {batch:5} {found['xla_tokens_per_s']:7.1f} {found['kernels_tokens_per_s']:7.1f} "
                    f"{found['ratio']:5.2f}x {found['gigabytes_per_s']:6.1f} {found['read_gigabytes_per_s']:6.1f} "
                    f"{found['share_of_reading']:5.0%} {found['same_tokens']:.0%}",
                    flush=True,
                )
                results.append({"weights": name, **found})
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine, "results": results}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
