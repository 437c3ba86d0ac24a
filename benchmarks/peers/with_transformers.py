"""A case by transformers and torch: JSON on standard input, JSON on standard output.

A task of the kind ``start`` prints an answer as it comes instead.
"""

import json
import sys
import time
from typing import Any

import torch
from jllm_runtime.benchmarking.peak_memory import peak_rss
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from benchmarks.peers.clocks import count_processor_time


class Clock(StoppingCriteria):
    """Notes when each token is there, and stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Printer:
    """A streamer that prints each token at once; transformers' own waits for the end of a word."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._is_prompt = tokenizer, True

    def put(self, tokens: torch.Tensor) -> None:
        if not self._is_prompt:
            print(self._tokenizer.decode(tokens, skip_special_tokens=True), end="", flush=True)
        self._is_prompt = False

    def end(self) -> None:
        print(flush=True)


def load(task: dict[str, Any]) -> Any:
    """The model, on so many threads."""
    torch.set_num_threads(task["threads"])
    model = AutoModelForCausalLM.from_pretrained(task["weights"], dtype=getattr(torch, task["precision"]))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def prefill(model: Any, prompts: torch.Tensor, repeats: int) -> tuple[list[float], list[list[int]]]:
    """Seconds from the prompts to the first token of each, after one repetition that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        first = model(prompts, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
        seconds.append(time.perf_counter() - start)
    return seconds[1:], first[:, None].tolist()


def decode(model: Any, prompts: torch.Tensor, count: int) -> tuple[list[float], list[list[int]]]:
    """Seconds between the first token of each text and the last, after a few that do not count."""
    settings = {"attention_mask": torch.ones_like(prompts), "do_sample": False}
    model.generate(
        prompts[:, -8:], attention_mask=settings["attention_mask"][:, -8:], do_sample=False, max_new_tokens=4
    )
    clock = Clock()
    made = model.generate(
        prompts, **settings, max_new_tokens=count + 1, stopping_criteria=StoppingCriteriaList([clock])
    )
    return [clock.times[-1] - clock.times[0]], made[:, prompts.shape[1] :].tolist()


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Load, warm up, and time prefill or decode."""
    count_processor_time(task)
    start = time.perf_counter()
    model = load(task)
    load_s = time.perf_counter() - start
    prompts = torch.tensor(task["prompts"])
    with torch.inference_mode():
        if task["kind"] == "prefill":
            seconds, tokens = prefill(model, prompts, task["repeats"])
        else:
            seconds, tokens = decode(model, prompts, task["tokens"])
    return {"seconds": seconds, "tokens": tokens, "load_s": load_s, "peak_rss_bytes": peak_rss()}


def answer(task: dict[str, Any]) -> None:
    """Print the answer to a question as it comes."""
    torch.set_num_threads(task["threads"])
    tokenizer = AutoTokenizer.from_pretrained(task["weights"])
    model = AutoModelForCausalLM.from_pretrained(task["weights"], dtype=getattr(torch, task["precision"]))
    messages = [{"role": "user", "content": task["question"]}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model.generate(**prompt, max_new_tokens=task["tokens"], do_sample=False, streamer=Printer(tokenizer))


if __name__ == "__main__":
    task = json.load(sys.stdin)
    if task["kind"] == "start":
        answer(task)
    else:
        print(json.dumps(run(task)))
