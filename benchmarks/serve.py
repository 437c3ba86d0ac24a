"""How fast ``jllm serve`` answers many clients, beside llama.cpp with the same model.

    hatch run oracle:python benchmarks/serve.py [--phases throughput poisson prefix stall] [--json FILE]

SmolLM2-135M in a server process, asked over sockets; prompts of unequal lengths, answers of unequal lengths, greedy.

- throughput: tokens of answers per second of all clients together, each of whom asks again when it is answered; one
  client and 16 of them. Taking in the prompts counts. llama.cpp runs the same requests in a batched loop, without HTTP.
  The two take turns.
- poisson: requests come at random, at 60% of what 16 clients reached.
- prefix: the time to the first token of a prompt of 1,000 tokens and a question, and of another question to the same.
- stall: how long the others wait for more of their answers while a prompt of 2,000 tokens is taken in. A server sends
  several tokens at a time while nothing else happens, so it is given for what the client sees, pieces, and for tokens.

llama.cpp comes with llama-cpp-python; without it the rest is measured.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jllm_runtime import Tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from serving import Reply, Server, ask, using_cache
from serving_prompts import answer_length, long_text, messages
from smollm2 import converted, gguf

CLIENTS = 16
PHASES = ("throughput", "poisson", "prefix", "stall")
QUESTIONS = ("What is this text about?", "Who is in it?")
Result = dict[str, Any]


def request(number: int, **fields: Any) -> Result:
    """The body of request ``number``."""
    body = {"model": "smollm2", "messages": messages(number), "max_tokens": answer_length(number), "temperature": 0}
    return {**body, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}, **fields}


async def closed_loop(url: str, numbers: Sequence[int], clients: int, **fields: Any) -> tuple[float, list[Reply]]:
    """Seconds and replies, where so many clients take the next request as soon as they have an answer."""
    left, replies = iter(numbers), []

    async def client() -> None:
        for number in left:
            replies.append(await ask(url, request(number, **fields)))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - began, good(replies)


def good(replies: list[Reply]) -> list[Reply]:
    """The replies, all of which must be whole."""
    if failed := [reply for reply in replies if reply.error or reply.status != 200]:
        raise SystemExit(f"{len(failed)} of {len(replies)} requests failed: {failed[0].status} {failed[0].error}")
    return replies


def spread(values: Sequence[float]) -> Result:
    """Median and tails, in milliseconds."""
    points = np.percentile(values, (50, 95, 99)) * 1000
    return dict(zip(("p50_ms", "p95_ms", "p99_ms"), (round(float(point), 1) for point in points), strict=True))


class Benchmark:
    """The phases, against one server.

    Args:
        server: that is measured.
        tokenizer: of its model.
        options: of the command line.
    """

    def __init__(self, server: Server, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
        self._server = server
        self._tokenizer = tokenizer
        self._options = options
        self._next = 0
        self._capacity = 0.0

    def warm_up(self) -> None:
        """Have everything compiled that will be measured."""
        phases, url = self._options.phases, self._server.url
        if {"throughput", "poisson", "stall"} & set(phases):
            asyncio.run(closed_loop(url, self._numbers(2), 1, max_tokens=8))
            asyncio.run(closed_loop(url, self._numbers(CLIENTS), CLIENTS, max_tokens=100))
        if "prefix" in phases:
            chat = [{"role": "user", "content": long_text(0, 1050, self._tokenizer)}]
            asyncio.run(closed_loop(url, range(1), 1, messages=chat, max_tokens=8))
        if "stall" in phases:
            for others in self._options.others:
                asyncio.run(self._stall(others))

    def throughput(self) -> Result:
        """One client and many, by turns with llama.cpp."""
        loop = self._llama()
        found: dict[str, list[float]] = {}
        for _ in range(self._options.rounds):
            for clients, count in ((1, self._options.requests // 4), (CLIENTS, self._options.requests)):
                numbers = self._numbers(count)
                seconds, replies = asyncio.run(closed_loop(self._server.url, numbers, clients))
                tokens = sum(reply.tokens for reply in replies)
                found.setdefault(f"jllm_{clients}", []).append(tokens / seconds)
                if clients > 1:
                    self._capacity = count / seconds
                if loop is not None:
                    work = [(self._tokenizer.encode_chat(messages(n)), answer_length(n)) for n in numbers]
                    seconds, made = loop.run(work, clients)
                    found.setdefault(f"llama.cpp_{clients}", []).append(sum(map(len, made)) / seconds)
        medians = {name: statistics.median(each) for name, each in found.items()}
        many, one = medians[f"jllm_{CLIENTS}"], medians["jllm_1"]
        result = {"tokens_per_s": found, "medians": medians, "many_over_one": many / one}
        if loop is not None:
            result["over_llama_cpp"] = many / medians[f"llama.cpp_{CLIENTS}"]
        return result

    def poisson(self) -> Result:
        """Requests that come at random."""
        rate = self._options.rate or 0.6 * (self._capacity or 1.0)
        waits = random.Random(0)

        async def load() -> list[Reply]:
            tasks = []
            for number in self._numbers(self._options.requests):
                tasks.append(asyncio.create_task(ask(self._server.url, request(number))))
                await asyncio.sleep(waits.expovariate(rate))
            return good(await asyncio.gather(*tasks))

        began = time.perf_counter()
        replies = asyncio.run(load())
        seconds = time.perf_counter() - began
        return {
            "requests_per_s": rate,
            "tokens_per_s": sum(reply.tokens for reply in replies) / seconds,
            "first_token": spread([reply.first_s for reply in replies]),
            "between_pieces": spread([gap for reply in replies for gap in reply.gaps]),
            "whole_answer": spread([reply.ended - reply.began for reply in replies]),
        }

    def prefix(self) -> Result:
        """A long prompt for the first time, and with another question."""
        cold, warm = [], []
        for seed in range(1, 2 + 2 * self._options.rounds):
            text = long_text(seed, 1000, self._tokenizer)
            for times, question in zip((cold, warm), QUESTIONS, strict=True):
                chat = [{"role": "user", "content": f"{text}\n\n{question}"}]
                _, [reply] = asyncio.run(closed_loop(self._server.url, [0], 1, messages=chat, max_tokens=4))
                times.append(reply.first_s)
        ratio = statistics.median(warm) / statistics.median(cold)
        return {"first_s": cold, "again_s": warm, "again_over_first": ratio}

    def stall(self) -> Result:
        """Others who get tokens while a long prompt comes."""
        return {str(others): asyncio.run(self._stall(others)) for others in self._options.others}

    async def _stall(self, others: int) -> Result:
        url = self._server.url
        _, calm = await closed_loop(url, self._numbers(others), others, max_tokens=64)
        # The first pieces come while the others' prompts are taken in.
        calm_gaps = [gap for reply in calm for gap in reply.gaps[len(reply.gaps) // 3 :]]
        tokens_a_piece = sum(reply.tokens for reply in calm) / sum(len(reply.times) for reply in calm)
        running = asyncio.Event()

        def begun(reply: Reply) -> None:
            if len(reply.times) == 3:
                running.set()

        bodies = [request(number, max_tokens=400) for number in self._numbers(others)]
        tasks = [asyncio.create_task(ask(url, body, on_text=begun)) for body in bodies]
        await running.wait()
        await asyncio.sleep(0.2 * others)  # until all have begun
        chat = [{"role": "user", "content": long_text(1000 + self._next, 2000, self._tokenizer)}]
        long = await ask(url, request(0, messages=chat, max_tokens=1))
        replies = good([*await asyncio.gather(*tasks), long])[:-1]
        disturbed = [
            after - before
            for reply in replies
            for before, after in zip(reply.times, reply.times[1:], strict=False)
            if after > long.began and before < long.times[0]
        ]
        between, calmly = float(np.percentile(disturbed, 99)), statistics.median(calm_gaps)
        return {
            "long_prompt_tokens": long.usage["prompt_tokens"],
            "long_prompt_first_s": long.first_s,
            "calm_pieces": spread(calm_gaps),
            "disturbed_pieces": spread(disturbed),
            "tokens_a_calm_piece": tokens_a_piece,
            "p99_over_calm_median_pieces": between / calmly,
            "p99_over_calm_median_tokens": between / (calmly / tokens_a_piece),
        }

    def _numbers(self, count: int) -> range:
        self._next += count
        return range(self._next - count, self._next)

    def _llama(self) -> Any:
        if importlib.util.find_spec("llama_cpp") is None:
            print("llama-cpp-python is not installed: without llama.cpp", file=sys.stderr)
            return None
        from llama_loop import LlamaLoop

        loop = LlamaLoop(gguf(), CLIENTS, os.cpu_count() or 1)
        loop.run([(self._tokenizer.encode_chat(messages(0)), 4)], 1)
        return loop


def rows(results: Result) -> list[tuple[str, str, str]]:
    """What the table says: a measure, its value, and what is wanted."""
    lines = []
    if found := results.get("throughput"):
        lines += [
            (f"tokens/s, {name.replace('_', ', clients: ')}", f"{x:.1f}", "") for name, x in found["medians"].items()
        ]
        lines += [(f"{CLIENTS} clients over one", f"{found['many_over_one']:.2f}x", "at least 4x")]
        if "over_llama_cpp" in found:
            lines += [(f"{CLIENTS} clients over llama.cpp", f"{found['over_llama_cpp']:.2f}x", "above 1x")]
    if found := results.get("poisson"):
        lines += [("poisson: requests/s", f"{found['requests_per_s']:.2f}", "")]
        for name in ("first_token", "between_pieces", "whole_answer"):
            value = " / ".join(f"{found[name][point]:.0f}" for point in ("p50_ms", "p95_ms", "p99_ms"))
            lines += [(f"poisson: {name.replace('_', ' ')}, p50 / p95 / p99 ms", value, "")]
    if found := results.get("prefix"):
        first, again = (statistics.median(found[name]) * 1000 for name in ("first_s", "again_s"))
        lines += [("first token after 1,000 tokens, new / seen, ms", f"{first:.0f} / {again:.0f}", "")]
        lines += [("seen over new", f"{found['again_over_first']:.3f}x", "at most 0.15x")]
    for others, found in results.get("stall", {}).items():
        calm, disturbed = found["calm_pieces"]["p50_ms"], found["disturbed_pieces"]["p99_ms"]
        lines += [(f"{others} others: calm p50 / disturbed p99, ms a piece", f"{calm:.0f} / {disturbed:.0f}", "")]
        ratios = (found[f"p99_over_calm_median_{kind}"] for kind in ("pieces", "tokens"))
        lines += [
            (
                f"{others} others: p99 over calm median, pieces / tokens",
                "{:.2f}x / {:.2f}x".format(*ratios),
                "at most 3x",
            )
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side")
    parser.add_argument("--requests", type=int, default=48, help="of 16 clients; one client has a quarter of them")
    parser.add_argument("--others", type=int, nargs="+", default=[1, 4, 15], help="who else is answered in a stall")
    parser.add_argument("--rate", type=float, help="requests per second of the poisson load")
    parser.add_argument(
        "--quantize", choices=["int8", "int4"], help="the weights that JLLM serves; float32 if not given"
    )
    parser.add_argument("--serve", nargs="*", default=[], metavar="OPTION", help="for jllm serve, without their --")
    parser.add_argument("--work", type=Path, help="where models and programs are kept; a temporary folder if not given")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        model = converted(options.quantize or "float32", work)
        tokenizer = Tokenizer.from_folder(model)
        serve = ["--served-model-name", "smollm2", "--max-batch", str(CLIENTS)]
        serve += [f"--{option}" if not option[0].isdigit() else option for option in options.serve]
        with using_cache(work / "cache"), Server(model, *serve, log=work / "server.log") as server:
            benchmark = Benchmark(server, tokenizer, options)
            benchmark.warm_up()
            results = {phase: getattr(benchmark, phase)() for phase in options.phases}
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}; SmolLM2-135M, {options.quantize or 'float32'} {' '.join(options.serve)}")
    for measure, value, wanted in rows(results):
        print(f"{measure:60} {value:>24}  {wanted}")
    if options.json:
        report = {"machine": machine, "weights": options.quantize or "float32", "serve": options.serve, **results}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
