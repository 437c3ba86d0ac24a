"""Drafts by prompt lookup: what they gain where an answer repeats its prompt, and what they cost where none does.

    hatch run oracle:python benchmarks/lookup.py [--types float32 int8] [--runs 5] [--json FILE]

SmolLM2-135M answers with and without ``lookup``, by turns (A B A B), after one turn that does not count; both must give
the same tokens. "edit" and "code" say a text again with small changes, "summarise" quotes from it, "story" is free
text, and in "random" the tokens are drawn so hot that nothing repeats itself: what is lost there is the search. Medians
of tokens a second; the ratio is the median of the turns' own.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path

import jax
from jllm_runtime import Model, SamplingParams, generate, load_model
from jllm_runtime.speculative.prompt_lookup import DEFAULT_DRAFT
from smollm2 import TYPES, converted

TEXT = """\
A lighthouse is a tower that sends out light to guide ships at night. The first lighthouses were fires on hills, later \
fires on towers of stone. In the eighteenth century oil lamps with mirrors took their place, and in 1822 a French \
engineer built a lens of many thin rings of glass, which threw the light of a small lamp as far as thirty kilometres. \
Keepers lived in the towers with their families, trimmed the wicks, wound the clockwork that turned the lens, and kept \
a log of every ship that passed. Today the lamps are electric, they turn themselves on at dusk, and no one lives in \
the towers any more. Many of them have become museums, and in some of them visitors can spend a night."""

CODE = """\
def read_orders(path):
    orders = []
    with open(path) as file:
        for line in file:
            name, count, price = line.strip().split(",")
            orders.append({"name": name, "count": int(count), "price": float(price)})
    return orders


def total(orders):
    result = 0
    for order in orders:
        result += order["count"] * order["price"]
    return result
"""

CASES = {
    "edit": (f"Write this text again, with miles in place of kilometres:\n\n{TEXT}", {}),
    "code": (f"Add a docstring to each function and print the whole code again.\n\n```python\n{CODE}```", {}),
    "summarise": (f"Summarize this text, quoting its most important sentences.\n\n{TEXT}", {}),
    "story": ("Write a story about a dragon and a knight.", {"temperature": 0.8, "top_p": 0.95}),
    "random": ("Write a story about a dragon and a knight.", {"temperature": 5.0}),
}


def measure(model: Model, name: str, tokens: int, lookup: int, runs: int) -> dict[str, object]:
    """Both sides by turns."""
    if model.tokenizer is None:
        raise SystemExit("the model has no tokenizer")
    text, options = CASES[name]
    ids = model.tokenizer.encode_chat([{"role": "user", "content": text}])
    params = SamplingParams(max_tokens=tokens, seed=1, ignore_eos=name == "random", **options)
    speeds: dict[int, list[float]] = {0: [], lookup: []}
    answers = []
    for _ in range(runs + 1):
        for side, speed in speeds.items():
            [output] = generate(model, [ids], params, lookup=side)
            speed.append(output.timings.decode_tokens_per_s)
            answers.append(output.token_ids)
    if any(answer != answers[0] for answer in answers):
        raise SystemExit(f"{name}: the tokens with lookup are not those without")
    plain, looked_up = speeds[0][1:], speeds[lookup][1:]
    ratios = [a / b for a, b in zip(looked_up, plain, strict=True)]
    return {
        "case": name,
        "prompt_tokens": len(ids),
        "tokens": len(answers[0]),
        "plain_tokens_per_s": statistics.median(plain),
        "lookup_tokens_per_s": statistics.median(looked_up),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["float32", "int8"], choices=TYPES)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--lookup", type=int, default=DEFAULT_DRAFT, help="tokens of a draft")
    parser.add_argument("--tokens", type=int, default=128, help="most tokens of an answer")
    parser.add_argument("--runs", type=int, default=5, help="counted turns of each")
    parser.add_argument("--models", type=Path, help="where converted models are kept; a temporary folder if not given")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    arguments = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}"
    print(f"{machine}; SmolLM2-135M, drafts of {arguments.lookup}; tokens a second, medians")
    print(
        f"{'weights':>9} {'case':>10} {'prompt':>6} {'tokens':>6} {'plain':>6} {'lookup':>6} {'ratio':>6}  of the turns"
    )
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.types:
            model = load_model(converted(name, arguments.models or Path(temporary)))
            for case in arguments.cases:
                found = measure(model, case, arguments.tokens, arguments.lookup, arguments.runs)
                print(
                    f"{name:>9} {case:>10} {found['prompt_tokens']:6} {found['tokens']:6} "
                    f"{found['plain_tokens_per_s']:6.1f} {found['lookup_tokens_per_s']:6.1f} {found['ratio']:5.2f}x  "
                    + " ".join(f"{ratio:.2f}" for ratio in found["ratios"]),
                    flush=True,
                )
                results.append({"weights": name, **found})
    if arguments.json:
        report = {"machine": machine, "lookup": arguments.lookup, "results": results}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
