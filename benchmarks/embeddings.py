"""Many short texts to embed: one by one, and in batches.

    hatch run oracle:python benchmarks/embeddings.py [--types int8 float32] [--tokens 4 8 16] [--json FILE]

SmolLM2-135M. Texts of 1 to so many random tokens, by turns in one run (A B A B), after one turn that does not count:
some of them in a call of ``embed`` each, and all of them in one call. Medians of milliseconds a text on the clock, the
ratio, the same ratio of the processor's time (which other work beside does not change), and how far the two vectors of
a text are from each other at most. JLLM_KERNELS=xla in the environment leaves everything to XLA.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jllm_runtime import Model, embed, load_model
from smollm2 import TYPES, converted


def timed(work: Callable[[], np.ndarray], texts: int) -> tuple[np.ndarray, float, float]:
    """The vectors, and milliseconds a text: on the clock, and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    made = work()
    return made, (time.perf_counter() - clock) * 1e3 / texts, (time.process_time() - processor) * 1e3 / texts


def compare(model: Model, tokens: int, count: int, alone: int, runs: int) -> dict[str, object]:
    """Both ways by turns."""
    rng = np.random.default_rng(tokens)
    texts = [rng.integers(0, model.config.vocab_size, length).tolist() for length in rng.integers(1, tokens + 1, count)]
    one_by_one: list[tuple[float, float]] = []
    batched: list[tuple[float, float]] = []
    for _ in range(runs + 1):
        each, *took = timed(lambda: np.concatenate([embed(model, [text]) for text in texts[:alone]]), alone)
        one_by_one.append((took[0], took[1]))
        together, *took = timed(lambda: embed(model, texts), count)
        batched.append((took[0], took[1]))
    clock, processor = zip(*one_by_one[1:], strict=True)
    clock_batched, processor_batched = zip(*batched[1:], strict=True)
    return {
        "backend": model.backend.name,
        "tokens": f"1 to {tokens}",
        "count": count,
        "one_by_one_ms": statistics.median(clock),
        "batched_ms": statistics.median(clock_batched),
        "ratio": statistics.median(a / b for a, b in zip(clock, clock_batched, strict=True)),
        "ratio_of_processor_time": statistics.median(a / b for a, b in zip(processor, processor_batched, strict=True)),
        "largest_difference": float(np.abs(each - together[:alone]).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=["int8", "float32"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--count", type=int, default=2048)
    parser.add_argument("--alone", type=int, default=64, help="texts that are also embedded one by one")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--models", type=Path, help="folder of the converted models; a temporary one without it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.types:
            model = load_model(converted(name, options.models or Path(temporary)))
            for tokens in options.tokens:
                row = compare(model, tokens, options.count, options.alone, options.runs)
                found.append({"weights": name, **row})
                print(
                    f"{name}, {row['backend']}, {row['tokens']} tokens: {row['one_by_one_ms']:.1f} ms one by one, "
                    f"{row['batched_ms']:.1f} in batches: {row['ratio']:.1f} times as fast "
                    f"({row['ratio_of_processor_time']:.1f} of processor time), "
                    f"vectors differ by {row['largest_difference']:.0e}",
                    flush=True,
                )
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": platform.processor(), "results": found}, indent=2))


if __name__ == "__main__":
    main()
