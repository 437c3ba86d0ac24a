"""Keys and values in fewer bits: what decoding gains far into a context, and what the answers lose.

    hatch run oracle:python benchmarks/kv_cache.py [--types float32 int8] [--contexts 512 4096] [--json FILE]

SmolLM2-135M. Speed: a greedy step of decode after so many random tokens, for each type of keys and values by turns
(A B C A B C), after one turn that does not count; medians, and the ratio to the type of the activations. Loss: the
text of the receipts is read 64 tokens at a time over a cache of each type; the mean Kullback-Leibler divergence of its
predictions from those over a cache of float32, in nats a token, and how often the most probable token is another one.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from decoding import decoded, empty, filled
from jllm_convert.quality.receipt import receipt_text
from jllm_core.model import forward
from jllm_runtime import Model, load_model
from jllm_runtime.cache.contiguous import KV_DTYPES, PREFILL_CHUNK, ContiguousCache
from jllm_runtime.programs import contiguous_batch
from smollm2 import TYPES, converted


def speeds(model: Model, batch: int, context: int, runs: int, count: int) -> list[dict[str, object]]:
    """All types by turns."""
    caches = {dtype: filled(model, empty(model, batch, context + count, dtype), context) for dtype in KV_DTYPES}
    seconds: dict[str, list[float]] = {dtype: [] for dtype in KV_DTYPES}
    for _ in range(runs + 1):
        for dtype, took in seconds.items():
            caches[dtype], _, step = decoded(model, caches[dtype], context, count)
            took.append(step)
    usual = seconds[model.weights.dtype.name][1:]
    return [
        {
            "batch": batch,
            "context": context,
            "kv_dtype": dtype,
            "tokens_per_s": batch / statistics.median(took[1:]),
            "ratio": statistics.median(a / b for a, b in zip(usual, took[1:], strict=True)),
            "cache_bytes": sum(slots.nbytes for slots in caches[dtype].keys + caches[dtype].values),
        }
        for dtype, took in seconds.items()
    ]


def losses(model: Model, tokens: int) -> dict[str, tuple[float, float]]:
    """For each type the mean divergence, and the share of other most probable tokens."""
    if model.tokenizer is None:
        raise SystemExit("the model has no tokenizer")
    ids = np.array(model.tokenizer.encode(receipt_text())[:tokens], np.int32)
    ids = ids[: len(ids) // PREFILL_CHUNK * PREFILL_CHUNK]

    @partial(jax.jit, donate_argnums=0)
    def read(cache: ContiguousCache, tokens: jax.Array, start: jax.Array) -> tuple[ContiguousCache, jax.Array]:
        positions = (start + jnp.arange(PREFILL_CHUNK))[None]
        logits, cache = forward(tokens[None], positions, model.weights, model.config, cache, backend=model.backend)
        return cache, jax.nn.log_softmax(logits[0])

    def predictions(dtype: str) -> np.ndarray:
        cache, parts = empty(model, 1, len(ids), dtype), []
        for start in range(0, len(ids), PREFILL_CHUNK):
            cache, part = read(cache, ids[start : start + PREFILL_CHUNK], np.int32(start))
            parts.append(np.asarray(part))
        return np.concatenate(parts)

    exact = predictions("float32")
    found = {}
    for dtype in KV_DTYPES:
        other = predictions(dtype)
        kl = (np.exp(exact.astype(np.float64)) * (exact.astype(np.float64) - other)).sum(axis=-1).mean()
        found[dtype] = float(kl), float((exact.argmax(axis=-1) != other.argmax(axis=-1)).mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["float32", "int8"], choices=TYPES, help="of the weights")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096], help=f"multiples of {PREFILL_CHUNK}")
    parser.add_argument("--tokens", type=int, default=16, help=f"of a turn, at most {contiguous_batch.DECODE_BLOCK}")
    parser.add_argument("--text", type=int, default=512, help="tokens that the loss is measured on, at most")
    parser.add_argument("--runs", type=int, default=5, help="counted turns of each")
    parser.add_argument("--models", type=Path, help="where converted models are kept; a temporary folder if not given")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    arguments = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}"
    print(f"{machine}; SmolLM2-135M; tokens a second of all rows, medians")
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.types:
            model = load_model(converted(name, arguments.models or Path(temporary)))
            loss = losses(model, arguments.text) if arguments.text else {}
            for dtype, (kl, others) in loss.items():
                print(f"{name:>9} weights, {dtype:>8} keys and values: KL {kl:.5f} nats, other best token {others:.2%}")
            for batch in arguments.batches:
                for context in arguments.contexts:
                    for found in speeds(model, batch, context, arguments.runs, arguments.tokens):
                        print(
                            f"{name:>9} weights, {batch:2} rows, context {context:5}, {found['kv_dtype']:>8}: "
                            f"{found['tokens_per_s']:7.1f} tokens/s {found['ratio']:5.2f}x, "
                            f"{found['cache_bytes'] / 2**20:6.1f} MiB",
                            flush=True,
                        )
                        results.append({"weights": name, **found})
            results += [{"weights": name, "kv_dtype": d, "kl_nats": k, "other_best": o} for d, (k, o) in loss.items()]
    if arguments.json:
        report = {"machine": machine, "results": results}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
