"""A case by this project: JSON on standard input, JSON on standard output."""

import json
import sys
import time
from typing import Any

import numpy as np
from jllm_runtime import load_model
from jllm_runtime.benchmarking.cases import Case
from jllm_runtime.benchmarking.costs import bytes_of_decode, flops_of_prefill
from jllm_runtime.benchmarking.measuring import measure_decode, measure_prefill
from jllm_runtime.benchmarking.peak_memory import peak_rss
from jllm_runtime.compile_cache import use_compile_cache

from benchmarks.peers.clocks import count_processor_time


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Load, warm up, and time prefill or decode as ``jllm bench`` does."""
    use_compile_cache()
    count_processor_time(task)
    start = time.perf_counter()
    model = load_model(task["weights"])
    load_s = time.perf_counter() - start
    prompts = np.array(task["prompts"], np.int32)
    case = Case(prompts.shape[1], prompts.shape[1], max(task["tokens"], 1), len(prompts))
    if task["kind"] == "prefill":
        timed, needs = measure_prefill(model, prompts, task["repeats"]), flops_of_prefill(model, case)
    else:
        timed = measure_decode(model, prompts, task["tokens"], task["repeats"])
        needs = bytes_of_decode(model, case)
    return {
        "seconds": timed.seconds,
        "tokens": timed.tokens,
        "needs": needs,
        "load_s": load_s,
        "compile_s": timed.compile_s,
        "peak_rss_bytes": peak_rss(),
    }


if __name__ == "__main__":
    print(json.dumps(run(json.load(sys.stdin))))
