"""A case by llama.cpp, through its C interface: JSON on standard input, JSON on standard output.

A task of the kind ``quantise`` makes a GGUF of another precision instead, and one of the kind ``start`` prints an
answer as it comes.
"""

import ctypes
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np
from jllm_runtime.benchmarking.peak_memory import peak_rss

BATCH = 2048
"""llama.cpp's own default: tokens that one call takes at most."""
FILE_TYPES = {
    "F32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}


class Session:
    """A model, and a context for some texts of a length."""

    def __init__(self, weights: str, texts: int, length: int, threads: int) -> None:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(weights.encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise SystemExit(f"llama.cpp cannot load {weights}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = texts * (-(-length // 256) * 256)
        params.n_batch = BATCH
        params.n_seq_max = texts
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot make a context of {params.n_ctx} tokens for {texts} texts")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(max(BATCH, texts), 0, 1)

    def forget(self, position: int = 0) -> None:
        """Drop what stands from a position on, in every text."""
        llama_cpp.llama_memory_seq_rm(self._memory, -1, position, -1)

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """Take in the prompts, and choose the first token of each."""
        first = []
        for text, prompt in enumerate(prompts):
            for start in range(0, len(prompt), BATCH):
                piece = prompt[start : start + BATCH]
                last = start + len(piece) == len(prompt)
                rows = [(token, start + n, text) for n, token in enumerate(piece)]
                chosen = self._run(rows, [len(piece) - 1] if last else [])
            first += chosen
        return first

    def decode(self, first: list[int], position: int, count: int) -> list[list[int]]:
        """Tokens after the first of each text, which stands at this position."""
        made = [first]
        for step in range(count):
            rows = [(token, position + step, text) for text, token in enumerate(made[-1])]
            made.append(self._run(rows, list(range(len(rows)))))
        return [list(text) for text in zip(*made, strict=True)]

    def _run(self, rows: list[tuple[int, int, int]], wanted: list[int]) -> list[int]:
        """Compute rows (token, position, text); the likeliest next token of those that are wanted."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for n, (token, position, text) in enumerate(rows):
            batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0] = token, position, 1, text
            batch.logits[n] = n in wanted
        if status := llama_cpp.llama_decode(self._context, batch):
            raise SystemExit(f"llama_decode failed with {status}")
        llama_cpp.llama_synchronize(self._context)
        logits = [llama_cpp.llama_get_logits_ith(self._context, n) for n in wanted]
        return [int(np.argmax(np.ctypeslib.as_array(each, (self._vocabulary,)))) for each in logits]


def timed(work: Callable[[], Any], before: Callable[[], None], repeats: int) -> tuple[list[float], Any]:
    """Seconds of each repetition, after one that does not count, and what the last gave."""
    seconds = []
    for _ in range(repeats + 1):
        before()
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return seconds[1:], result


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Load, warm up, and time prefill or decode."""
    prompts, count = task["prompts"], task["tokens"]
    length = len(prompts[0])
    start = time.perf_counter()
    session = Session(task["weights"], len(prompts), length + count + 1, task["threads"])
    load_s = time.perf_counter() - start
    if task["kind"] == "prefill":
        seconds, first = timed(lambda: session.prefill(prompts), session.forget, task["repeats"])
        tokens = [[token] for token in first]
    else:
        first = session.prefill(prompts)
        seconds, tokens = timed(
            lambda: session.decode(first, length, count), lambda: session.forget(length), task["repeats"]
        )
    return {"seconds": seconds, "tokens": tokens, "load_s": load_s, "peak_rss_bytes": peak_rss()}


def quantise(task: dict[str, Any]) -> dict[str, Any]:
    """Write the GGUF ``source`` in this precision to ``target``."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[task["precision"]]
    params.allow_requantize = True
    params.nthread = task["threads"]
    if status := llama_cpp.llama_model_quantize(task["source"].encode(), task["target"].encode(), ctypes.byref(params)):
        raise SystemExit(f"llama_model_quantize failed with {status} on {task['source']}")
    return {}


def answer(task: dict[str, Any]) -> None:
    """Print the answer to a question as it comes."""
    model = llama_cpp.Llama(task["weights"], n_threads=task["threads"], verbose=False)
    messages = [{"role": "user", "content": task["question"]}]
    stream = model.create_chat_completion(messages, max_tokens=task["tokens"], temperature=0.0, stream=True)
    for piece in stream:
        print(piece["choices"][0]["delta"].get("content", ""), end="", flush=True)


@llama_cpp.llama_log_callback
def silent(*_: object) -> None:
    """In place of what llama.cpp tells of its inner workings."""


def main() -> None:
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    task = json.load(sys.stdin)
    if task["kind"] == "start":
        answer(task)
    else:
        print(json.dumps(quantise(task) if task["kind"] == "quantise" else run(task)))


if __name__ == "__main__":
    main()
